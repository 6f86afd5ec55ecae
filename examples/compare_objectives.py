"""Compare the objectives on the small world: equal pairs, steps, learning rate and beta, several seeds.

    python examples/compare_objectives.py --model examples/small_world_model --output_dir comparison -- \\
        --train_batch_size 8 --max_train_steps 120 --learning_rate 3e-4 --beta_dpo 500 --rank 8

For each preference, seed and method it samples pairs, trains a LoRA with `train_inversion_dpo.py` (options after
`--` go to it), and measures the gain in mean score on held-out captions and seeds. Prints a table in Markdown and
keeps every run in `<output_dir>/runs.json`; the same command goes on after an interruption.

The cached methods compute what their steps will read before the first step, and read it from then on. With the default
of four draws a pair that pays from the fifth epoch on; `--cached_draws 1` after `--` makes it pay from the second. The
U-Net is counted while it runs: how often it is shown each image of a step, without gradient (inversion and reference)
and with. Seconds are from the first model call to the end of the last step, filling a cache included, while the other
workers keep the machine busy; gain per 1000 seconds is what they buy.
"""

import argparse
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import benchmark
import evaluate
import make_pairs
import numpy as np
import small_world
import torch
from benchmark import train_inversion_dpo

METHODS = {  # objective and timesteps per pair -> options
    "inversion_dpo, 4": ["--objective", "inversion_dpo"],
    "inpo, 1": ["--objective", "inpo"],
    "diffusion_dpo, 1": ["--objective", "diffusion_dpo"],
    "inversion_dpo, 4, cached": ["--objective", "inversion_dpo", "--inversion_cache_dir", "{lora}/cache"],
    "inpo, 1, cached": ["--objective", "inpo", "--inversion_cache_dir", "{lora}/cache"],
    "diffusion_dpo, 1, cached": ["--objective", "diffusion_dpo", "--inversion_cache_dir", "{lora}/cache"],
    "diffusion_dpo, 4": ["--objective", "diffusion_dpo", "--timesteps_per_pair", "4"],
}


def parse_args(argv=None):
    path = os.path.expanduser
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=path, required=True, help="Folder of the small world's pipeline")
    parser.add_argument("--output_dir", type=path, required=True, help="Folder for pairs, LoRAs and runs.json")
    parser.add_argument("--preferences", nargs="+", default=["area", "sharpness"], choices=small_world.PREFERENCES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="Rows of the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of pairs and training")
    parser.add_argument("--num_pairs", type=int, default=256)
    parser.add_argument("--num_images", type=int, default=256, help="Per evaluation")
    parser.add_argument("--workers", type=int, default=2, help="Runs at a time, which share the cores")
    parser.add_argument("train_options", nargs="*", help="After --: options of the training script for all runs")
    return parser.parse_args(argv), parser.error


def train_and_evaluate(args, preference, seed, method):
    """One run: trains the LoRA and returns its gain and cost. Runs in a process of its own."""
    torch.set_num_threads(max(1, os.cpu_count() // args.workers))
    probe = benchmark.Probe()
    output_dir = Path(args.output_dir)
    lora = output_dir / preference / str(seed) / method.replace(", ", "_")
    shutil.rmtree(lora, ignore_errors=True)  # of a run that was interrupted before it was recorded
    train_inversion_dpo.main([
        "--pretrained_model_name_or_path", args.model, "--train_data_dir", str(pairs_folder(args, preference, seed)),
        "--output_dir", str(lora), "--seed", str(seed), "--resolution", str(small_world.SIZE), "--report_to", "none",
        *(option.format(lora=lora) for option in METHODS[method]), *args.train_options,
    ])  # fmt: skip

    pipeline = make_pairs.load_pipeline(args.model)
    pipeline.load_lora_weights(lora)
    after, captions = evaluate.sample_held_out(pipeline, args.num_images)
    result = evaluate.compare(np.load(output_dir / "base.npy"), after, captions, preference)
    shown = Counter()  # images to the VAE, latents to the U-Net without gradient, latents with
    for call, count in probe.calls.items():
        shown[call.function, call.with_gradient] += count * call.size
    record = json.loads((lora / "training_config.json").read_text())
    images = 2 * record["steps"] * record["pairs_per_step"]
    return {
        **result, "seed": seed, "method": method, "seconds": probe.step_ends[-1][0] - probe.started,
        "calls": shown["predict_noise", False] / images, "calls_with_gradient": shown["predict_noise", True] / images,
    }  # fmt: skip


def pairs_folder(args, preference, seed):
    return Path(args.output_dir) / preference / str(seed) / "pairs"


def prepare(args):
    """Samples the base model's pictures for the evaluation and every set of pairs, where they are not there yet."""
    output_dir = Path(args.output_dir)
    if not (output_dir / "base.npy").exists():
        pictures, _ = evaluate.sample_held_out(make_pairs.load_pipeline(args.model), args.num_images)
        np.save(output_dir / "base.npy", pictures)
    for preference in args.preferences:
        for seed in args.seeds:
            folder = pairs_folder(args, preference, seed)
            if not (folder / "train.parquet").exists():
                make_pairs.main(make_pairs.parse_args([
                    "--model", args.model, "--preference", preference, "--output_dir", str(folder),
                    "--num_pairs", str(args.num_pairs), "--seed", str(seed),
                ]))  # fmt: skip


def table(runs, preferences, methods):
    """The gains in Markdown: mean over seeds, each seed, and the ratio to diffusion_dpo at as many timesteps."""
    lines = [
        "| preference | method, timesteps | gain | of each seed | / diffusion_dpo | win rate | captions obeyed "
        "| U-Net calls without / with gradient | seconds | gain per 1000 s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def of(preference, method, key):
        return [run[key] for run in runs if (run["preference"], run["method"]) == (preference, method)]

    for preference in preferences:
        for method in methods:
            gains = of(preference, method, "gain")
            baseline = of(preference, f"diffusion_dpo, {method.split(', ')[1]}", "gain")
            if not gains:
                continue
            ratio = f"{np.mean(gains) / np.mean(baseline):.2f}" if len(baseline) == len(gains) else "-"
            columns = ("gain", "win_rate", "captions_obeyed_after", "calls", "calls_with_gradient", "seconds")
            mean = {key: np.mean(of(preference, method, key)) for key in columns}
            lines.append(
                f"| {preference} | {method} | {mean['gain']:.3f} | {', '.join(f'{gain:.3f}' for gain in gains)} "
                f"| {ratio} | {mean['win_rate']:.1%} | {mean['captions_obeyed_after']:.1%} "
                f"| {mean['calls']:.1f} / {mean['calls_with_gradient']:.0f} | {mean['seconds']:.0f} "
                f"| {1000 * mean['gain'] / mean['seconds']:.3f} |"
            )
    return "\n".join(lines)


def main(args, parser_error):
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path, settings_path = output_dir / "runs.json", output_dir / "settings.json"
    settings = {name: getattr(args, name) for name in ("model", "num_pairs", "num_images", "train_options")}
    if not settings_path.exists():
        settings_path.write_text(json.dumps(settings))
    if json.loads(settings_path.read_text()) != settings:
        parser_error(
            f"--output_dir {output_dir} holds runs with other settings, see {settings_path}; name another folder"
        )
    prepare(args)
    runs = json.loads(path.read_text()) if path.exists() else []
    done = {(run["preference"], run["seed"], run["method"]) for run in runs}
    wanted = [(p, s, m) for s in args.seeds for p in args.preferences for m in args.methods if (p, s, m) not in done]
    spawn = torch.multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, mp_context=spawn, max_tasks_per_child=1)
    try:
        for future in as_completed([pool.submit(train_and_evaluate, args, *run) for run in wanted]):
            runs.append(future.result())
            unfinished = path.with_suffix(".part")
            unfinished.write_text(json.dumps(runs, indent=2) + "\n")
            unfinished.replace(path)
    finally:
        pool.shutdown(cancel_futures=True)
    runs = sorted((run for run in runs if run["seed"] in args.seeds), key=lambda run: run["seed"])
    print(table(runs, args.preferences, args.methods))


if __name__ == "__main__":
    main(*parse_args())

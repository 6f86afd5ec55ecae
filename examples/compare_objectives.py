"""Compare the objectives on the small world: equal pairs, steps, learning rate and beta, several seeds.

    python examples/compare_objectives.py --model examples/small_world_model --output_dir comparison

For each preference, seed and method it samples pairs, trains a LoRA with `train_inversion_dpo.py`, and measures the
gain in mean score on held-out captions and seeds. Prints a table in Markdown and keeps every run in
`<output_dir>/runs.json`; run the same command again to go on after an interruption.

The U-Net is counted while it runs: images shown to it per pair, without gradient (inversion and reference) and with.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import evaluate
import make_pairs
import numpy as np
import small_world
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
METHODS = {  # objective and timesteps per pair -> options
    "inversion_dpo, 4": ["--objective", "inversion_dpo"],
    "inpo, 1": ["--objective", "inpo"],
    "diffusion_dpo, 1": ["--objective", "diffusion_dpo"],
    "diffusion_dpo, 4": ["--objective", "diffusion_dpo", "--timesteps_per_pair", "4"],
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Folder of the small world's pipeline")
    parser.add_argument("--output_dir", required=True, help="Folder for pairs, LoRAs and runs.json")
    parser.add_argument("--preferences", nargs="+", default=["area", "sharpness"], choices=small_world.PREFERENCES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="Rows of the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of pairs and training")
    parser.add_argument("--num_pairs", type=int, default=256)
    parser.add_argument("--num_images", type=int, default=256, help="Per evaluation")
    parser.add_argument("--workers", type=int, default=2, help="Runs at a time, which share the cores")
    parser.add_argument("train_options", nargs="*", help="After --: options of the training script for all runs")
    return parser.parse_args(argv)


def train_and_evaluate(args, preference, seed, method):
    """One run: trains the LoRA and returns its gain and cost. Runs in a process of its own."""
    import train_inversion_dpo

    torch.set_num_threads(max(1, os.cpu_count() // args.workers))
    output_dir = Path(args.output_dir)
    images = {False: 0, True: 0}
    predict_noise = train_inversion_dpo.predict_noise

    def counted(unet, x_t, *rest):
        noise = predict_noise(unet, x_t, *rest)
        images[noise.requires_grad] += len(x_t)
        return noise

    train_inversion_dpo.predict_noise = counted
    lora = output_dir / preference / str(seed) / method.replace(", ", "_").replace(" ", "_")
    options = [
        "--pretrained_model_name_or_path", args.model, "--train_data_dir", str(pairs_folder(args, preference, seed)),
        "--output_dir", str(lora), "--seed", str(seed), "--resolution", str(small_world.SIZE), "--report_to", "none",
    ]  # fmt: skip
    started = time.perf_counter()
    train_inversion_dpo.main([*options, *METHODS[method], *args.train_options])
    seconds = time.perf_counter() - started

    pipeline = make_pairs.load_pipeline(args.model)
    pipeline.load_lora_weights(lora)
    after, captions = evaluate.sample_held_out(pipeline, args.num_images)
    before = np.load(output_dir / "base.npy")
    result = evaluate.compare(before, after, captions, preference)
    calls = {"images": images[False], "images_with_gradient": images[True]}
    return {**result, "seed": seed, "method": method, "seconds": seconds, **calls}


def pairs_folder(args, preference, seed):
    return Path(args.output_dir) / preference / str(seed) / "pairs"


def prepare(args):
    """Samples the base model's pictures for the evaluation and every set of pairs, where they are not there yet."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
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


def table(runs, args):
    """The gains as rows of Markdown: mean over seeds, each seed, and the ratio to diffusion_dpo at one timestep."""
    lines = [
        "| preference | method | gain | of each seed | / diffusion_dpo, 1 | win rate | captions obeyed | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for preference in args.preferences:
        gains = {
            m: [r["gain"] for r in runs if (r["preference"], r["method"]) == (preference, m)] for m in args.methods
        }
        for method in args.methods:
            mine = [run for run in runs if (run["preference"], run["method"]) == (preference, method)]
            if not mine:
                continue
            baseline = gains.get("diffusion_dpo, 1")
            ratio = f"{np.mean(gains[method]) / np.mean(baseline):.2f}" if baseline else "-"
            mean = {
                key: np.mean([run[key] for run in mine]) for key in ("win_rate", "captions_obeyed_after", "seconds")
            }
            lines.append(
                f"| {preference} | {method} | {np.mean(gains[method]):.3f} | "
                f"{', '.join(f'{gain:.3f}' for gain in gains[method])} | {ratio} | {mean['win_rate']:.1%} | "
                f"{mean['captions_obeyed_after']:.1%} | {mean['seconds']:.0f} |"
            )
    return "\n".join(lines)


def main(args):
    prepare(args)
    path = Path(args.output_dir) / "runs.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    done = {(run["preference"], run["seed"], run["method"]) for run in runs}
    wanted = [(p, s, m) for s in args.seeds for p in args.preferences for m in args.methods if (p, s, m) not in done]
    spawn = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        for future in [pool.submit(train_and_evaluate, args, *run) for run in wanted]:
            runs.append(future.result())
            path.write_text(json.dumps(runs, indent=2) + "\n")
    print(table(runs, args))


if __name__ == "__main__":
    main(parse_args())

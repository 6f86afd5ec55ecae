"""Which objective gives more of what is preferred for the same damage, and how soon? Measured on the small world.

    python examples/compare_objectives.py --model examples/small_world_model --output_dir comparison
    python examples/compare_objectives.py --model examples/small_world_model --output_dir comparison-quick --quick

Training moves a model along a curve: more of what is preferred, and more damage to the rest (evaluate.py). So methods
are compared at equal damage, not at equal steps. For each preference, band of timesteps and method the program

    1  tunes learning rate and beta by successive halving: all settings for a few steps, the best third for more, by
       the gain within 5 % damage, on pictures of their own, with the first of the seeds;
    2  trains the best setting for longer, with several seeds, and the same from caches; of the bands, the widest and
       the best of the others;
    3  judges the LoRA at several lengths of training and several scales.

It writes to --output_dir, and goes on there after an interruption. The same command with other methods, bands, more
seeds (the first of them the same) or caches adds their runs:

    runs.csv       every LoRA that was judged: setting, step, seconds, U-Net calls, scale, gain, damage, drifts
    table.md       gains at 2, 5 and 10 % damage, and seconds and calls until a gain within 5 % damage was reached
    frontier.png   gain against damage, without caches
    time.png       gain within 5 % damage against seconds of training, caches included

Seconds are those of one core, from the first model call, filling a cache included. U-Net calls count latents, a
forward and a backward as one each. A shorter run is the beginning of a longer one, and fills only what its steps read.
Tuning trains from a cache that its runs share, which costs half as much; its cost is not told. Forward noise can gain
less from a cache, so the learning rate that is best there may not be the best without.
"""

import csv
import io
import itertools
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import NamedTuple

import small_world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import Parser, number


class Setting(NamedTuple):
    """What is tuned. `band` is the lowest training timestep."""

    method: str
    band: int
    learning_rate: float
    beta: float
    draws: int = 0  # a pair, in a cache; 0: no cache


METHODS = {  # name -> options of the training script; two rivals are re-created, see `train`
    "inpo": ["--objective", "inpo"],
    "inversion_dpo": ["--objective", "inversion_dpo"],
    "diffusion_dpo": ["--objective", "diffusion_dpo"],
    "diffusers_script": ["--objective", "diffusion_dpo"],
    "published_inpo": ["--objective", "inpo"],
}
SCRIPT_BETA = 5000.0  # diffusers' default is 2500, without the half that our beta has
LEARNING_RATES, BETAS = (3e-4, 6e-4, 1.2e-3), (250.0, 500.0, 1000.0)
BANDS = (0, 300, 600)
LIMITS = (0.02, 0.05, 0.1)  # of damage
GOALS = {"area": 0.02, "sharpness": 0.02, "tone": 0.1}  # gains within LIMIT, whose cost is reported
TUNING_SCALES, TUNING_DRAWS = (0.125, 0.25, 0.5, 1.0), 4
QUICK = {  # what --quick changes
    "preferences": ["area"], "methods": ["inpo", "diffusion_dpo", "diffusers_script"], "bands": [0], "rungs": [],
    "learning_rates": [6e-4], "betas": [500.0], "draws": [4], "lengths": [30, 60, 120],
    "seeds": [0], "num_images": 64,
}  # fmt: skip
UNCACHED = ("diffusers_script", "published_inpo")
PICTURE_SEEDS = {"final": 0, "tune": 1}
# What all runs of a folder share, beside the pairs and the meter
SETTINGS = ("model", "num_pairs", "train_batch_size", "num_images", "lengths", "scales")


def settings_to_tune(args, method, band):
    """The grid of a method; none in a band for which its code has no option."""
    if method in UNCACHED and band:
        return []
    betas = (SCRIPT_BETA,) if method == "diffusers_script" else args.betas
    draws = 0 if method in UNCACHED else TUNING_DRAWS
    grid = itertools.product(args.learning_rates, betas)
    return [Setting(method, band, *values, draws) for values in grid]


def parse_args(argv=None):
    path, count, steps = os.path.expanduser, number(int, least=1), number(int, least=2)
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=path, required=True, help="Folder of the small world's pipeline")
    add("--output_dir", type=path, required=True, help="Folder for pairs, runs.csv, table and plots")
    add("--quick", action="store_true", help="A subset that takes 15 minutes: no tuning, one seed, area")
    add("--preferences", nargs="+", default=list(small_world.PREFERENCES), choices=small_world.PREFERENCES)
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    band, positive = number(int, least=0, most=999), number(float, above=0)
    add("--bands", nargs="+", type=band, default=list(BANDS), help="Lowest training timesteps")
    add("--learning_rates", nargs="+", type=positive, default=list(LEARNING_RATES), help="To choose from")
    add("--betas", nargs="+", type=positive, default=list(BETAS), help="To choose from")
    add("--draws", nargs="*", type=count, default=[1, 4], help="Cached draws a pair")
    add("--rungs", nargs="*", type=steps, default=[30, 90], help="Steps of the rounds of tuning; none: no tuning")
    add("--lengths", nargs="+", type=steps, default=[30, 60, 120, 240], help="Steps after which finalists are judged")
    add("--scales", nargs="+", type=positive, default=[0.125, 0.25, 0.5, 0.75, 1.0, 1.25], help="Of the LoRA")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of pairs and training")
    add("--num_pairs", type=count, default=256, help="Sampled; up to a fifth is left out to balance them")
    add("--train_batch_size", type=count, default=16, help="Pairs a step")
    add("--num_images", type=count, default=128, help="Pictures of an evaluation")
    add("--workers", type=count, default=2, help="Runs at a time, a core each")
    parser.set_defaults(**QUICK if parser.parse_known_args(argv)[0].quick else {})
    args = parser.parse_args(argv)
    args.lengths = sorted(args.lengths)
    if not args.rungs and len(args.learning_rates) * len(args.betas) > 1:
        parser.error("--learning_rates and --betas: one of each without --rungs, which choose")
    if not any(settings_to_tune(args, method, band) for method in args.methods for band in args.bands):
        parser.error(f"--methods {' '.join(args.methods)}: have no option for --bands; add 0")
    return args, parser.error


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

import benchmark
import damage
import evaluate
import make_pairs
import numpy as np
import torch
from benchmark import train_inversion_dpo, training_utils

from training_utils import LORA_FILE, lora_weights, write_lora, write_whole

LIMIT = evaluate.MAX_DAMAGE
CONSTANTS = {
    "sharper_winners": make_pairs.SHARPER_WINNERS, "sampling": small_world.SAMPLING,
    "size_slope": damage.SIZE_SLOPE, "edge_slope": damage.EDGE_SLOPE, "tuning_scales": list(TUNING_SCALES),
}  # fmt: skip
COLUMNS = (
    "stage", "preference", "seed", *Setting._fields, "steps", "step", "seconds", "calls", "scale", "gain", "damage",
    "distance_ratio", "sharpness_ratio", "captions_obeyed", *(f"drift_{name}" for name in small_world.PREFERENCES),
)  # fmt: skip


class FlippedApart(benchmark.PreferenceDataset):
    """Winner and loser flipped independently, as diffusers' DPO script for Stable Diffusion does it."""

    def __getitem__(self, key_and_place):
        example = super().__getitem__(key_and_place)
        flips = np.random.default_rng([self.seed, 7, *key_and_place[0]]).random(2) < 0.5
        pixels = [
            image.flip(-1) if flip else image for image, flip in zip(example["pixel_values"], flips, strict=True)
        ]
        return {**example, "pixel_values": torch.stack(pixels)}


# One run


def options_of(setting, cache_dir):
    """The training script's options."""
    cached = ["--cached_draws", str(setting.draws), "--inversion_cache_dir", str(cache_dir)] if setting.draws else []
    return [
        *METHODS[setting.method], "--min_timestep", str(setting.band), "--learning_rate", str(setting.learning_rate),
        "--beta_dpo", str(setting.beta), *cached,
    ]  # fmt: skip


def train(args, folder, cache_dir, preference, seed, setting, lengths):
    """Trains a LoRA and leaves it at each of these lengths; returns seconds and U-Net calls until each."""
    times, script = [], train_inversion_dpo
    probe = benchmark.Probe(script, clock=time.process_time)
    options = [
        "--pretrained_model_name_or_path", args.model, "--train_data_dir", str(pairs_folder(args, preference, seed)),
        "--output_dir", str(folder), "--seed", str(seed), "--resolution", str(small_world.SIZE), "--report_to", "none",
        "--train_batch_size", str(args.train_batch_size), "--rank", "8", "--max_train_steps", str(lengths[-1]),
        "--checkpointing_steps", str(np.gcd.reduce(lengths)),
        *options_of(setting, cache_dir),
    ]  # fmt: skip
    if setting.method == "diffusers_script":
        probe.replace(training_utils, "PreferenceDataset", FlippedApart)
    try:
        if setting.method == "published_inpo":
            train_published(options, setting, folder, probe)
        else:
            script.main(*script.parse_args(options))
    finally:
        probe.close()
    ends, calls = zip(*probe.step_ends, strict=True)
    calls = [unet_calls(count) for count in calls]
    # What was done before the first step filled the cache, more of it than a shorter run would read
    filling = [max(0, 2 * ends[0] - ends[1] - probe.started), max(0, 2 * calls[0] - calls[1])]
    wanted = len(list(Path(cache_dir).glob("*/draw-*/*.safetensors")))
    for length in lengths:
        spared = 1 - min(1, length * args.train_batch_size / wanted) if wanted else 0
        times.append((ends[length - 1] - probe.started - spared * filling[0], calls[length - 1] - spared * filling[1]))
    return times


def unet_calls(calls):
    """Latents shown to the U-Net, those of the policy's step twice: forward and backward."""
    return sum(
        n * call.size * (1 + call.with_gradient) for call, n in calls.items() if call.function == "predict_noise"
    )


def train_published(options, setting, folder, probe):
    """DDIM-InPO's released step, see benchmark.py; LoRAs are left where the training script leaves them."""
    args, seen = train_inversion_dpo.parse_args(options)[0], []

    def step(models, batch):
        seen[:] = [models.unet]
        return benchmark.published_inpo(models, batch, num_steps=5, beta=setting.beta)

    def end_step():
        probe.end_step()
        count = len(probe.step_ends)
        if count % args.checkpointing_steps == 0:
            write_lora(folder / f"checkpoint-{count}" / LORA_FILE, lora_weights(*seen), "unet")

    benchmark.train_rival(train_inversion_dpo, options, step, end_step)


@cache
def start_worker(model, file):
    """What every run of a worker needs: the pipeline, and the base model's pictures as they are seen by the judges."""
    pictures = np.load(file)
    return make_pairs.load_pipeline(model), evaluate.look_at(pictures, evaluate.held_out(len(pictures))[0])


def train_and_judge(args, stage, preference, seed, setting, lengths, scales):
    """One run: trains the LoRA and returns a row of the table for each length and scale."""
    torch.set_num_threads(1)
    name = "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in setting)
    work = Path(args.output_dir) / "work"
    folder, cache_dir, rows = work / f"{stage}-{preference}-{seed}-{name}", work / f"cache-{preference}-{seed}", []
    if stage == "final":  # whose filling is to be timed
        cache_dir = folder / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    costs = train(args, folder, cache_dir, preference, seed, setting, lengths)
    if stage == "tune":  # whose cache others have filled
        costs = [(np.nan, np.nan)] * len(costs)
    pipeline, base = start_worker(args.model, base_file(args, stage))
    sampling = pictures_of(args, stage), PICTURE_SEEDS[stage]
    for length, (seconds, calls) in zip(lengths, costs, strict=True):
        pipeline.unload_lora_weights()  # of a run that failed
        pipeline.load_lora_weights(folder / f"checkpoint-{length}", adapter_name="judged")
        for scale in scales:
            pipeline.set_adapters("judged", scale)
            pictures, captions = evaluate.sample_held_out(pipeline, *sampling)
            found = evaluate.compare_looks(evaluate.look_at(pictures, captions), base, preference)
            rows.append({
                "stage": stage, "preference": preference, "seed": seed, **setting._asdict(), "steps": lengths[-1],
                "step": length, "seconds": seconds, "calls": calls, "scale": scale,
                **{name: found[name] for name in COLUMNS if name in found},
            })  # fmt: skip
    shutil.rmtree(folder)
    return rows


def pictures_of(args, stage):
    """How many pictures an evaluation takes."""
    return args.num_images if stage == "final" else max(1, args.num_images // 2)


def base_file(args, stage):
    return Path(args.output_dir) / f"base-{PICTURE_SEEDS[stage]}.npy"


def pairs_folder(args, preference, seed):
    return Path(args.output_dir) / "pairs" / f"{preference}-{seed}"


def prepare(args):
    """Samples the base model's pictures for the judges and every set of pairs, where they are not there yet."""
    load_pipeline = cache(make_pairs.load_pipeline)
    for stage in ("tune", "final") if args.rungs else ("final",):
        if not base_file(args, stage).exists():
            stream, sampling = io.BytesIO(), (pictures_of(args, stage), PICTURE_SEEDS[stage])
            np.save(stream, evaluate.sample_held_out(load_pipeline(args.model), *sampling)[0])
            write_whole(base_file(args, stage), stream.getvalue())
    for seed in args.seeds:
        files = {name: pairs_folder(args, name, seed) / "train.parquet" for name in args.preferences}
        missing = {name: file for name, file in files.items() if not file.exists()}
        if missing:
            candidates = make_pairs.sample_candidates(load_pipeline(args.model), args.num_pairs, seed)
        for name, file in missing.items():
            make_pairs.write_pairs(file, *candidates, name)


# What runs tell


def gain_within(points, limit):
    """The most gain at a damage of at most 1 + limit, on the way from the base model through (scale, gain, damage).

    Between two scales gain and damage are taken to be linear. Beyond the first crossing nothing counts.
    """
    best, gain, damage = 0.0, 0.0, 1.0
    for _, next_gain, next_damage in sorted(points):
        if next_damage > 1 + limit:
            share = (1 + limit - damage) / (next_damage - damage)
            return max(best, gain + share * (next_gain - gain))
        gain, damage = next_gain, next_damage
        best = max(best, gain)
    return best


def gains_by_step(rows, limit, measure="damage"):
    """{step: (seconds, calls, gain within the damage)} of the rows of one run."""
    steps = {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row)
    return {
        step: (of[0]["seconds"], of[0]["calls"], gain_within([(r["scale"], r["gain"], r[measure]) for r in of], limit))
        for step, of in sorted(steps.items())
    }


def best_gain(rows, limit=LIMIT, measure="damage"):
    """The most gain of one run within the damage, over its lengths and scales."""
    return max(gain for _, _, gain in gains_by_step(rows, limit, measure).values())


def cost_of(rows, gain, limit=LIMIT):
    """Seconds and calls until a run has reached this gain within the damage, linear between lengths; None if never."""
    before = (0.0, 0.0, 0.0)
    for reached in gains_by_step(rows, limit).values():
        if reached[2] >= gain:
            share = (gain - before[2]) / (reached[2] - before[2])
            return tuple(before[i] + share * (reached[i] - before[i]) for i in (0, 1))
        before = reached
    return None


def mark_of(runs, limit):
    """Says of a mean gain that it is a bound or a guess.

    Returns:
        "> " if a run never reached the damage, "~ " if the length at which one gained most was beyond it at its lowest
        scale, so that the gain lies on a straight line from the base model; both, one, or "".
    """
    is_bound = any(all(row["damage"] <= 1 + limit for row in rows) for rows in runs)
    is_guess = False
    for rows in runs:
        found = gains_by_step(rows, limit)
        best = max(found, key=lambda step: found[step][2])
        lowest = min((row for row in rows if row["step"] == best), key=lambda row: row["scale"])
        is_guess |= lowest["damage"] > 1 + limit
    return "> " * is_bound + "~ " * is_guess


def mean_gain(runs, limit):
    """The gain within the damage, mean over the runs of several seeds."""
    return float(np.mean([best_gain(rows, limit) for rows in runs]))


# What is written


def label(setting):
    return setting.method + (f", cache of {setting.draws}" if setting.draws else "")


def table(finals):
    """Gains at each damage and the cost of a gain, in Markdown; finals are {(preference, setting): runs}."""
    lines = [
        "| preference | timesteps | method | learning rate, beta | "
        + " | ".join(f"gain at {limit:.0%}" for limit in LIMITS)
        + " | of each seed, 5 % | by distance alone | seconds to the goal | U-Net calls |",
        "|---|---|---|---|" + "---|" * (len(LIMITS) + 4),
    ]
    for (preference, setting), runs in finals.items():
        gains = " | ".join(f"{mark_of(runs, limit)}{mean_gain(runs, limit):.3f}" for limit in LIMITS)
        seeds = ", ".join(f"{best_gain(rows):.3f}" for rows in runs)
        drawn = np.mean([best_gain(rows, LIMIT, "distance_ratio") for rows in runs])
        costs = [cost_of(rows, GOALS[preference]) for rows in runs]
        reached = [cost for cost in costs if cost]
        cost = f"{len(reached)} of {len(runs)} seeds reach it | "
        if len(reached) == len(runs):
            cost = "{:.0f} | {:,.0f}".format(*np.mean(reached, axis=0))
        lines.append(
            f"| {preference} | from {setting.band} | {label(setting)} | {setting.learning_rate:g}, {setting.beta:g} "
            f"| {gains} | {seeds} | {drawn:.3f} | {cost} |"
        )
    goals = ", ".join(f"{name} {goal:g}" for name, goal in GOALS.items())
    return "\n".join([
        *lines, "", f"The goal is a gain within {LIMIT:.0%} damage: {goals}. >: a seed never reached the damage, more "
        "training would gain more. ~: a seed exceeded it at its lowest scale, interpolated from the base model.",
    ])  # fmt: skip


def plot(finals, file, curve_of, x_label, y_label):
    """A column for each preference, a line for each method; `curve_of(runs)` returns its x and y.

    The upper row shows the widest band of timesteps, the lower one the others: the best of each method, if tuned.
    """
    from matplotlib.figure import Figure

    preferences = list(dict.fromkeys(preference for preference, _ in finals))
    bands = sorted({setting.band for _, setting in finals})
    num_rows = min(len(bands), 2)
    figure = Figure(figsize=(4.2 * len(preferences), 3.4 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, len(preferences), squeeze=False, sharey="col")
    for (preference, setting), runs in finals.items():
        is_widest = setting.band == bands[0]
        axes = panels[0 if is_widest else 1, preferences.index(preference)]
        color, style = f"C{list(METHODS).index(setting.method)}", (0, (setting.draws, 1)) if setting.draws else "-"
        text = label(setting) + ("" if is_widest else f", from {setting.band}")
        marker = "osDv^"[bands.index(setting.band) % 5]
        axes.plot(*curve_of(runs), linestyle=style, color=color, label=text, marker=marker, markersize=4)
        band = f"from {setting.band}" if setting.band else "whole schedule"
        axes.set_title(f"{preference}, {band if is_widest else 'other bands'}")
    for axes in panels.flat:
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, framealpha=0.4)
    figure.savefig(file, dpi=110)


def frontier(runs):
    """Damage in per cent, as far as every seed's went, and the most gain within it, mean over seeds."""
    reached = min(max(row["damage"] for row in rows) for rows in runs) - 1
    limits = np.linspace(0, min(max(reached, 0), 0.12), 25)
    return 100 * limits, [mean_gain(runs, limit) for limit in limits]


def race(runs):
    """Seconds and the most gain within 5 % damage until then, means over seeds."""
    steps = [list(gains_by_step(rows, LIMIT).values()) for rows in runs]
    seconds = np.mean([[at for at, _, _ in lengths] for lengths in steps], axis=0)
    gains = np.mean([np.maximum.accumulate([gain for _, _, gain in lengths]) for lengths in steps], axis=0)
    return [0, *seconds], [0, *gains]


# The program


class Runs:
    """The runs of an output folder: rows by (stage, preference, seed, setting, steps), kept in runs.csv."""

    def __init__(self, args):
        self.args, self.file, self.rows = args, Path(args.output_dir) / "runs.csv", {}
        if self.file.exists():
            with self.file.open(encoding="utf-8", newline="") as stream:
                for row in csv.DictReader(stream):
                    text = ("stage", "preference", "method")
                    row = {name: value if name in text else float(value) for name, value in row.items()}
                    row.update({name: int(row[name]) for name in ("seed", "band", "draws", "steps", "step")})
                    self.add([row])

    def key(self, row):
        setting = Setting(**{name: row[name] for name in Setting._fields})
        return row["stage"], row["preference"], row["seed"], setting, row["steps"]

    def add(self, rows):
        self.rows.setdefault(self.key(rows[0]), []).extend(rows)

    def run(self, jobs):
        """Runs what is not there yet; jobs are (stage, preference, seed, setting, lengths, scales).

        Returns how many failed.
        """
        jobs = [job for job in dict.fromkeys(jobs) if (*job[:4], job[4][-1]) not in self.rows]
        spawn = torch.multiprocessing.get_context("spawn")
        pool, num_failed = ProcessPoolExecutor(self.args.workers, mp_context=spawn), 0
        try:
            futures = [pool.submit(train_and_judge, self.args, *job) for job in jobs]
            for done, future in enumerate(as_completed(futures), start=1):
                if future.exception():
                    num_failed += 1
                    print(f"{time.strftime('%H:%M:%S')} {done}/{len(jobs)} failed: {future.exception()!r}", flush=True)
                    continue
                rows = future.result()
                self.add(rows)
                is_new = not self.file.exists()
                with self.file.open("a", encoding="utf-8", newline="") as stream:
                    writer = csv.DictWriter(stream, COLUMNS)
                    if is_new:
                        writer.writeheader()
                    writer.writerows(rows)
                stage, preference, seed, setting, steps = self.key(rows[0])
                print(
                    f"{time.strftime('%H:%M:%S')} {stage} {done}/{len(jobs)} {preference} seed {seed} "
                    f"{tuple(setting)} {steps} steps: {best_gain(rows):.3f} within {LIMIT:.0%}", flush=True,
                )  # fmt: skip
        finally:
            pool.shutdown(cancel_futures=True)
        return num_failed


def shared_settings(args):
    return {**{name: getattr(args, name) for name in SETTINGS}, **CONSTANTS}


def main(args, error):
    output_dir = Path(args.output_dir)
    file = output_dir / "settings.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != shared_settings(args):
        error(f"--output_dir {args.output_dir}: holds runs with other settings, see {file}; name another folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "settings.json", json.dumps(shared_settings(args)).encode())
    prepare(args)
    runs = Runs(args)

    # 1  Tune, each method in each band
    chosen = {
        (preference, method, band): settings_to_tune(args, method, band)
        for preference in args.preferences for method in args.methods for band in args.bands
    }  # fmt: skip
    num_failed = 0
    for steps in args.rungs:
        how = (steps,), TUNING_SCALES
        jobs = {
            field: [("tune", field[0], args.seeds[0], setting, *how) for setting in settings]
            for field, settings in chosen.items()
        }
        num_failed += runs.run([job for of_field in jobs.values() for job in of_field])
        for field, of_field in jobs.items():
            judged = [job for job in of_field if (*job[:4], steps) in runs.rows]  # others failed
            best = sorted(judged, key=lambda job: -best_gain(runs.rows[*job[:4], steps]))
            chosen[field] = [job[3] for job in best[: -(-len(best) // 3)]]

    # 2  Train the best for longer, in the widest band and in the best of the others, and the same from a cache
    final = []
    for preference, method in itertools.product(args.preferences, args.methods):
        tuned = [chosen[preference, method, band] for band in sorted(args.bands)]
        if not any(tuned):
            continue
        widest, *others = [settings[0] for settings in tuned if settings]
        if args.rungs:
            found = {s: best_gain(runs.rows["tune", preference, args.seeds[0], s, args.rungs[-1]]) for s in others}
            others = sorted(others, key=found.get)[-1:]
        final += [(preference, setting._replace(draws=0)) for setting in (widest, *others)]
    final += [
        (preference, setting._replace(draws=draws))
        for preference, setting in final for draws in args.draws if setting.method not in UNCACHED
    ]  # fmt: skip
    lengths, scales = tuple(args.lengths), tuple(args.scales)
    num_failed += runs.run([
        ("final", preference, seed, setting, lengths, scales)
        for seed in args.seeds for preference, setting in final
    ])  # fmt: skip

    # 3  What they tell, with all that earlier commands added to the folder
    finals = {}
    for (stage, preference, _, setting, steps), rows in sorted(runs.rows.items()):
        if stage == "final" and steps == lengths[-1]:
            finals.setdefault((preference, setting), []).append(rows)
    uncached = {field: of_field for field, of_field in finals.items() if not field[1].draws}
    if not uncached:
        sys.exit("No final run without a cache succeeded, see above")
    report = table(finals)
    (output_dir / "table.md").write_text(report + "\n", encoding="utf-8")
    plot(uncached, output_dir / "frontier.png", frontier, "damage, %", "gain")
    plot(finals, output_dir / "time.png", race, "seconds of training on one core", f"gain within {LIMIT:.0%} damage")
    print(report)
    if num_failed:
        sys.exit(f"{num_failed} runs failed, see above, and are left out; the same command tries them again")


if __name__ == "__main__":
    main(*args_and_error)

"""Say how good a LoRA is, and at which scale to use it: the same prompts and seeds at several scales, scored.

    python examples/judge_lora.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 --lora my-taste \\
        --prompts everyday --scorers pickscore clip brisque --output_dir my-taste-judged

Works for any SD or SDXL model. The first scorer says what is wanted, the others guard against damage; scorers.py lists
them, prompt_sources.py lists prompts. Writes to --output_dir

    judge.html    a page to look at: curves, pictures side by side, the worst losses first; one file, works offline
    judge.md      the table, for a model card
    judge.json    all figures
    images/       every picture, by scale; the same command goes on where it was stopped, and samples none twice

The recommended scale is the lowest whose gain by the first scorer is not significantly below the best, among those at
which no guard has fallen by more than --max_loss standard deviations of its scores at scale 0. If no scale keeps that
limit, it is the lowest that gains significantly, and the report says what it costs.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import logging
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported, it warns of kernels for CPUs
from make_pairs import encode_png, sample_pictures
from prompt_sources import read_prompts
from sample_pairs import check_model, load_pipeline
from scorers import NAMES, check_scorer, load_scorer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from inversion_utils import number, one_line, printable, write_whole

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
SEED = 1_000_000  # far from the seeds of training pairs
SHOWN = {"worst": 12, "best": 6}  # rows of pictures on the page


# Statistics


def resamples(num_prompts, count=2000):
    """Draws of prompts with replacement, (count, num_prompts): pictures of one prompt are not independent."""
    return np.random.default_rng(0).integers(num_prompts, size=(count, num_prompts))


def interval(values):
    """The 95 % bootstrap interval [low, high] of the mean of values (P, K), K for each of P prompts."""
    means = np.nanmean(values, axis=1)[resamples(len(values))].mean(axis=1)
    return [float(bound) for bound in np.quantile(means, [0.025, 0.975])]


def wilson_interval(rate, n, z=1.96):
    """95 % confidence interval [low, high] of a rate observed in n trials."""
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return [float(center - half), float(center + half)]


def sign_test(wins, losses):
    """The two-sided p value of the sign test: how often a fair coin is as one-sided as this; ties do not count."""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def compare(scores, base_scores):
    """Compares scores (P, K), of K pictures for each of P prompts, with the base model's, same prompts and seeds.

    Returns mean; gain and win_rate (a tie counts half), each with its interval; p of the sign test. A win rate of 0 or
    1 gets Wilson's interval, since all resamples of it are alike. Pairs with a score that is not finite are left out.
    """
    gains = np.where(np.isfinite(scores) & np.isfinite(base_scores), scores - base_scores, np.nan)
    gains = gains[~np.isnan(gains).all(axis=1)]
    if not gains.size:
        raise ValueError("no picture has a score that is finite")
    wins = np.where(np.isnan(gains), np.nan, (gains > 0) + 0.5 * (gains == 0))
    n, rate = int((~np.isnan(gains)).sum()), float(np.nanmean(wins))
    return {
        "mean": float(np.mean(scores[np.isfinite(scores)])),
        "gain": float(np.nanmean(gains)),
        "gain_interval": interval(gains),
        "win_rate": rate,
        "win_rate_interval": wilson_interval(rate, n) if rate in (0.0, 1.0) else interval(wins),
        "p": sign_test(int((gains > 0).sum()), int((gains < 0).sum())),
        "pictures": n,
    }


def diversity(thumbnails):
    """Mean distance of two pictures of a prompt, for thumbnails (P, K, D) in [0, 1]; None with one picture for each.

    The distance is the root mean square over D numbers: RGB of 16 x 16 pixels.
    """
    num_prompts, count, _ = thumbnails.shape
    if count < 2:
        return None
    distances = np.sqrt(((thumbnails[:, :, None] - thumbnails[:, None]) ** 2).mean(-1))
    return float(distances.sum() / (num_prompts * count * (count - 1)))


def recommend(scores, scales, names, max_loss):
    """Returns the recommended scale and the reason, for scores {name: (S, P, K)} at rising scales; see the head."""
    base, rows = scales.index(0.0), [i for i, scale in enumerate(scales) if scale]
    wanted, *guards = names
    spoilt = {}
    for i in rows:
        for name in guards:
            before, after = scores[name][base], scores[name][i]
            loss = -np.nanmean(after - before) / max(float(np.nanstd(before)), 1e-9)
            if loss > max_loss:
                spoilt.setdefault(i, []).append(f"{name} by {loss:.2f}")
    why = "; ".join(f"at {scales[i]:g} {' and '.join(losses)}" for i, losses in sorted(spoilt.items()))
    why = f" Fallen by more than {max_loss:g} standard deviations: {why}." if why else ""
    gains = {i: scores[wanted][i] - scores[wanted][base] for i in rows}
    gaining = [i for i in rows if interval(gains[i])[0] > 0]
    allowed = [i for i in gaining if i not in spoilt]
    if not gaining:
        return 0.0, f"Do not use this LoRA: at no scale does {wanted} gain significantly.{why}"
    best = max(allowed or gaining, key=lambda i: np.nanmean(gains[i]))
    chosen = min(i for i in allowed or gaining if not allowed or interval(gains[best] - gains[i])[0] <= 0)
    reason = f"{wanted} gains {np.nanmean(gains[chosen]):.4g}"
    if not allowed:
        reason = f"Every scale that gains costs more than was allowed; this one costs the least. {reason}"
    elif chosen != best:
        reason += f", not significantly less than the best ({np.nanmean(gains[best]):.4g} at {scales[best]:g})"
    return scales[chosen], f"{reason}.{why}"


# Sampling


def sample_scales(pipeline, scales, prompts, seeds, folder, sampling):
    """Samples prompts and seeds (N) at each scale of the adapter "judged" into `folder`, where pictures are not yet.

    Returns a function that opens picture i at the scale with number s.
    """
    batch_size, jobs = sampling["batch_size"], []

    def file(scale, i):
        return Path(folder) / f"scale-{scale:g}" / f"{i:05}.png"

    for scale in scales:
        for i in range(0, len(prompts), batch_size):
            batch = range(i, min(i + batch_size, len(prompts)))
            jobs += [] if all(file(scale, i).exists() for i in batch) else [(scale, batch)]
    for scale, batch in tqdm(jobs, desc="Sampling", disable=not jobs):
        pipeline.enable_lora() if scale else pipeline.disable_lora()
        if scale:
            pipeline.set_adapters("judged", scale)
        pictures = sample_pictures(pipeline, [prompts[i] for i in batch], [seeds[i] for i in batch], **sampling)
        for i, picture in zip(batch, pictures, strict=True):
            write_whole(file(scale, i), encode_png(picture))
    return lambda s, i: Image.open(file(scales[s], i)).convert("RGB")


def judge(picture, prompts, scorers, scales, count, max_loss):
    """Scores N = P x `count` pictures at each scale; `picture(s, i)` is the PIL image i at the scale with number s.

    Returns the figures, and the scores {name: (S, P, count)}.
    """
    scores, spread = {scorer.name: [] for scorer in scorers}, {}
    for s, scale in enumerate(tqdm(scales, desc="Scoring", disable=None)):
        rows, thumbnails = {name: [] for name in scores}, []
        for i in range(0, len(prompts), 64):
            images = [picture(s, j) for j in range(i, min(i + 64, len(prompts)))]
            thumbnails += [np.asarray(x.resize((16, 16), Image.Resampling.BOX)).ravel() / 255 for x in images]
            for scorer in scorers:
                rows[scorer.name].append(scorer.score(images, prompts[i : i + 64]))
        for name, parts in rows.items():
            scores[name].append(np.concatenate(parts).reshape(-1, count))
        spread[f"{scale:g}"] = diversity(np.stack(thumbnails).reshape(-1, count, 768))
    scores = {name: np.stack(values) for name, values in scores.items()}
    scale, reason = recommend(scores, scales, list(scores), max_loss)
    base = scales.index(0.0)
    results = {
        name: {f"{scales[s]:g}": compare(values[s], values[base]) for s in range(len(scales))}
        for name, values in scores.items()
    }
    return {"recommended_scale": scale, "reason": reason, "scorers": results, "diversity": spread}, scores


# What is written


def table(figures):
    """The figures in Markdown."""
    lines = ["| scorer | scale | mean | gain | win rate | sign test |", "|---|---|---|---|---|---|"]
    for name, rows in figures["scorers"].items():
        for scale, row in rows.items():
            low, high = row["gain_interval"]
            first, last = row["win_rate_interval"]
            is_base = float(scale) == 0
            lines.append(
                f"| {name} | {scale} | {row['mean']:.4g} | "
                + (
                    "| | |"
                    if is_base
                    else f"{row['gain']:+.3g} ({low:+.3g} to {high:+.3g}) | {row['win_rate']:.1%} "
                    f"({first:.1%} to {last:.1%}) | p = {row['p']:.2g} |"
                )  # fmt: skip
            )
    values = ", ".join(f"{value:.3f} at {scale}" for scale, value in figures["diversity"].items() if value is not None)
    lines += ["", f"Diversity: {values}." if values else "Diversity: not measured, it needs two pictures of a prompt."]
    return "\n".join(lines)


def markdown(figures):
    run = f"Scorers run: {', '.join(figures['scorers'])}."
    if figures["not_run"]:
        run += f" Not run: {', '.join(figures['not_run'])}."
    return (
        f"**Recommended scale: {figures['recommended_scale']:g}.** {figures['reason']}\n\n{table(figures)}\n\n"
        f"{run} {figures['prompts']} prompts, {figures['images_per_prompt']} pictures each, the same seeds at every "
        "scale; 95 % bootstrap intervals over prompts.\n"
    )


def curves(figures):
    """Gain against scale for each scorer, with intervals, as SVG."""
    from matplotlib.figure import Figure

    names = list(figures["scorers"])
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        rows = figures["scorers"][name]
        scales, gains = [float(scale) for scale in rows], [row["gain"] for row in rows.values()]
        low, high = zip(*(row["gain_interval"] for row in rows.values()), strict=True)
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.fill_between(scales, low, high, alpha=0.2, linewidth=0)
        axes.plot(scales, gains, marker="o")
        axes.axvline(figures["recommended_scale"], color="tab:green", linestyle=":", label="recommended")
        axes.set(title=name, xlabel="LoRA scale", ylabel="gain against the base model")
        axes.legend(fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #c0392b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.answer { border: 1px solid var(--line); border-left: 6px solid var(--good); padding: .8rem 1.1rem; }
.answer b { font-size: 1.25rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid var(--line); }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child { text-align: left; }
.chosen { background: #1a7f3722; } .curves { background: white; border-radius: 6px; overflow-x: auto; }
.curves svg { max-width: 100%; height: auto; }
.row { margin: 1.4rem 0; } .row p { margin: 0 0 .3rem; }
.pictures { display: flex; gap: 6px; } .pictures figure { margin: 0; flex: 1 1 0; min-width: 0; }
.pictures img { width: 100%; display: block; border-radius: 3px; }
figcaption { font-size: .78rem; text-align: center; }
.up { color: var(--good); } .down { color: var(--bad); }
"""


def page(figures, scores, picture, prompts, title):
    """The report as one HTML file that needs nothing else; pictures are shown at most 320 pixels wide."""
    scales, count = figures["scales"], figures["images_per_prompt"]
    base, wanted = scales.index(0.0), next(iter(scores))
    shown_scale = figures["recommended_scale"] or max(scales)
    flat = {name: values.reshape(len(scales), -1) for name, values in scores.items()}
    gains = np.nan_to_num(flat[wanted][scales.index(shown_scale)] - flat[wanted][base])
    order = np.argsort(gains, kind="stable")
    worst = list(order[: min(SHOWN["worst"], len(order))])
    best = [i for i in order[::-1][: SHOWN["best"]] if i not in worst]

    def cell(s, i):
        image, buffer = picture(s, i), io.BytesIO()
        image.thumbnail((320, 320))
        image.save(buffer, "JPEG", quality=88)
        data = base64.b64encode(buffer.getvalue()).decode()
        name = f"LoRA {scales[s]:g}" if scales[s] else "base model"
        value = f"{flat[wanted][s, i]:.4g}"
        change = flat[wanted][s, i] - flat[wanted][base, i]
        kind = "up" if change > 0 else "down" if change < 0 else ""
        return (
            f'<figure><img src="data:image/jpeg;base64,{data}" alt="{name}"><figcaption>{name}<br>'
            f'<span class="{kind}">{value}</span></figcaption></figure>'
        )

    def rows(indices):
        return "".join(
            f'<div class="row"><p>{html.escape(prompts[i])} <small>(picture {i % count + 1})</small></p>'
            f'<div class="pictures">{"".join(cell(s, i) for s in range(len(scales)))}</div></div>' for i in indices
        )  # fmt: skip

    def results(name):
        cells = "".join(
            f'<tr class="{"chosen" if float(s) == figures["recommended_scale"] else ""}"><td>{s}</td>'
            f"<td>{row['mean']:.4g}</td><td>{row['gain']:+.3g}</td>"
            f"<td>{row['gain_interval'][0]:+.3g} to {row['gain_interval'][1]:+.3g}</td><td>{row['win_rate']:.1%}</td>"
            f"<td>{row['win_rate_interval'][0]:.1%} to {row['win_rate_interval'][1]:.1%}</td>"
            f"<td>{row['p']:.2g}</td></tr>"
            for s, row in figures["scorers"][name].items()
        )
        head = "<tr><th>scale<th>mean<th>gain<th>95 %<th>win rate<th>95 %<th>sign test p</tr>"
        role = "what is wanted" if name == wanted else "guard"
        return f"<h2>{html.escape(name)} <small>({role})</small></h2><table>{head}{cells}</table>"

    spread = ", ".join(f"{v:.3f} at {s}" for s, v in figures["diversity"].items() if v is not None) or "not measured"
    not_run = f" Not run: {html.escape(', '.join(figures['not_run']))}." if figures["not_run"] else ""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style>
<h1>{html.escape(title)}</h1>
<div class="answer"><b>Recommended scale: {figures["recommended_scale"]:g}</b><br>
{html.escape(figures["reason"])}</div>
<p>{figures["prompts"]} prompts, {count} pictures each, the same seeds at every scale; against scale 0, the base model.
Intervals are 95 % bootstrap intervals over prompts. Higher is better for every scorer.{not_run}
Diversity, the mean distance of two pictures of a prompt: {spread}.</p>
<div class="curves">{curves(figures)}</div>
{"".join(results(name) for name in scores)}
<h2>Worst losses at scale {shown_scale:g} first, by {html.escape(wanted)}</h2>{rows(worst)}
<h2>Largest gains</h2>{rows(best)}
</html>
"""


# The program


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s --base M --lora L --prompts P --output_dir O [options, see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    path, count = os.path.expanduser, number(int, least=1)
    # fmt: off
    add = parser.add_argument
    add("--base", type=path, required=True, help="model that the LoRA is for: a Hub id or a folder")
    add("--lora", type=path, required=True, help="LoRA: a file, a folder or a Hub id")
    add("--prompts", type=path, required=True, help="text file with a prompt on each line, or a name such as everyday")
    add("--output_dir", type=path, required=True, help="folder for pictures, figures and page")
    add("--scorers", type=path, nargs="+", help="the wanted one first, then guards (all that are installed)")
    add("--scales", type=number(float, least=0), nargs="+", default=list(SCALES), help="of the LoRA; 0 is added")
    add("--max_loss", type=number(float, least=0), default=0.2,
        help="what a guard may fall, in standard deviations; 0.2 is a small effect")
    add("--max_prompts", type=count, help="use only the first N prompts")
    add("--num_images_per_prompt", type=count, default=2, help="pictures of a prompt; more: narrower intervals")
    add("--num_inference_steps", type=count, default=30, help="sampler steps; more costs time")
    add("--guidance_scale", type=number(float, least=0), default=7.5, help="higher obeys prompts more, varies less")
    add("--batch_size", type=count, default=4, help="pictures sampled at a time; more is faster and takes memory")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the weights; the half ones take half the memory")
    add("--seed", type=number(int, least=0), default=0, help="of the pictures, the same at every scale")
    # fmt: on
    return parser.parse_args(argv), parser.error


def available_scorers():
    """The names of scorers that can be run, and those that cannot, with the reason."""
    available, not_run = [], []
    for name in NAMES:
        try:
            check_scorer(name)
            available.append(name)
        except ValueError as problem:
            not_run.append(str(problem))
    return available, not_run


def settings_of(args, prompts, scales):
    """What pictures depend on, as `settings.json` keeps it."""
    lora = Path(args.lora)
    files = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora] if lora.is_file() else []
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else None
    names = ("base", "lora", "num_images_per_prompt", "num_inference_steps", "guidance_scale", "dtype", "seed")
    return {**{name: getattr(args, name) for name in names}, "lora_sha256": digest, "prompts": prompts}


def check_settings(folder, settings, error):
    """Ends the program by `error` if the folder holds pictures with other settings; writes them if it is new."""
    file = folder / "settings.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            error(f"--output_dir {folder} holds pictures with another --{changed[0]}; name another folder")
    elif folder.is_dir() and any(folder.iterdir()):
        error(f"--output_dir {folder} holds something else already; name another folder")
    else:
        try:
            write_whole(file, json.dumps(settings, indent=2).encode())
        except OSError as problem:
            error(f"--output_dir {folder} cannot be written: {one_line(problem)}")


def main(argv=None):
    args, error = parse_args(argv)
    specs, not_run = (args.scorers, []) if args.scorers else available_scorers()
    scales, count = sorted({0.0, *args.scales}), args.num_images_per_prompt
    if not specs:
        error(f"--scorers: none can be run: {'; '.join(not_run)}")
    if scales == [0.0]:
        error("--scales 0: nothing to compare with the base model")
    try:
        prompts = read_prompts(args.prompts, args.max_prompts)
        for spec in specs:
            try:
                check_scorer(spec)
            except ValueError as problem:
                error(f"--scorers {spec}: {printable(str(problem))}")
        check_model("--base", args.base, "--lora", args.lora)
        check_settings(Path(args.output_dir), settings_of(args, prompts, scales), error)
        pipeline = load_pipeline("--base", args.base, "--lora", args.lora, getattr(torch, args.dtype), "judged")
    except ValueError as problem:
        error(printable(str(problem)))
    folder, repeated = Path(args.output_dir), [prompt for prompt in prompts for _ in range(count)]
    seeds = [SEED * (args.seed + 1) + i for i in range(len(repeated))]
    sampling = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "batch_size")}
    picture = sample_scales(pipeline, scales, repeated, seeds, folder / "images", sampling)
    device = pipeline.device
    del pipeline
    try:
        scorers = [load_scorer(spec, device) for spec in specs]
        figures, scores = judge(picture, repeated, scorers, scales, count, args.max_loss)
    except ValueError as problem:
        error(f"--scorers: {printable(str(problem))}")
    about = {"scales": scales, "prompts": len(prompts), "images_per_prompt": count, "not_run": not_run}
    figures = {"base": args.base, "lora": args.lora, **about, **figures}
    title = f"{Path(args.lora).name} on {Path(args.base).name}"
    write_whole(folder / "judge.json", (json.dumps(figures, indent=2) + "\n").encode())
    write_whole(folder / "judge.md", markdown(figures).encode())
    write_whole(folder / "judge.html", page(figures, scores, picture, repeated, title).encode())
    print(markdown(figures))
    print(f"page: {folder / 'judge.html'}")


if __name__ == "__main__":
    main()

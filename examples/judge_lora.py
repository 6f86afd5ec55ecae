"""Say how good LoRAs are, which one is best, and at which scale to use it: the same prompts and seeds, scored.

    python examples/judge_lora.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --lora my-taste/checkpoint-100 my-taste/checkpoint-200 my-taste \\
        --prompts everyday --scorers pickscore clip brisque --output_dir my-taste-judged

Works for any SD or SDXL model. The first scorer says what is wanted, the others guard against damage; scorers.py lists
them, prompt_sources.py lists prompts. Writes to --output_dir

    judge.html    a page to look at: curves, pictures side by side, lowest gains first; one file, works offline
    judge.md      the table, for a model card
    judge.json    all figures
    images/       every picture, by LoRA and scale; the same command goes on where it was stopped, another LoRA, scale
                  or scorer can be added, and no picture is sampled twice

Recommended is, among the LoRAs and scales at which no guard has fallen by more than --max_loss standard deviations of
its scores for the base model, the one that changes the pictures least, if its gain by the first scorer is not
significantly below the best. If none keeps that limit, it is the one that changes them least among those that gain
significantly, and the report says what it costs. Nothing is recommended with fewer than ten prompts, without a guard,
or where the answer is the highest scale tried, beyond which the gain may still rise. The best of many is best by luck,
too: judge it once more, alone, with another --seed.
"""

import base64
import hashlib
import html
import importlib.util
import io
import itertools
import json
import math
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import Parser, number, one_line, printable

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
SEED = 1_000_000  # far from the seeds of training pairs
SHOWN = {"worst": 12, "best": 6}  # rows of pictures on the page
FEWEST_PROMPTS = 10  # to recommend anything
LESS_DIVERSE = 0.8  # of the base model's diversity, below which the report warns


def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s --base M --lora L --prompts P --output_dir O [options, see --help]",
    )
    path, count = os.path.expanduser, number(int, least=1)
    # fmt: off
    add = parser.add_argument
    add("--base", type=path, required=True, help="model that the LoRA is for: a Hub id or a folder")
    add("--lora", type=path, nargs="+", required=True, help="LoRAs: files, folders, such as checkpoints, or Hub ids")
    add("--variant", help="variant of the model's files, such as fp16")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="what the model predicts (its scheduler's)")
    add("--prompts", type=path, required=True, help="text file with a prompt on each line, or a name such as everyday")
    add("--output_dir", type=path, required=True, help="folder for pictures, figures and page")
    add("--scorers", type=path, nargs="+", help="the wanted one first, then guards (all that are installed)")
    add("--scales", type=number(float, least=0), nargs="+", default=list(SCALES), help="of each LoRA; 0 is added")
    add("--max_loss", type=number(float, least=0), default=0.2,
        help="what a guard may fall, in standard deviations; 0.2 is a small effect")
    add("--max_prompts", type=count, help="use only the first N prompts")
    add("--num_images_per_prompt", type=count, default=2, help="pictures of a prompt; more: narrower intervals")
    add("--num_inference_steps", type=count, default=30, help="sampler steps; more costs time")
    add("--guidance_scale", type=number(float, least=0), default=7.5, help="higher obeys prompts more, varies less")
    add("--batch_size", type=count, default=4, help="pictures sampled at a time; more is faster and takes memory")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the weights; the half ones take half the memory")
    add("--seed", type=number(int, least=0), default=0, help="of the pictures, the same for every LoRA and scale")
    # fmt: on
    return parser.parse_args(argv), parser.error


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

import numpy as np
from convert_lora import find_file, read_weights
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from make_pairs import check_model, encode_png, load_lora, sample_pictures
from PIL import Image
from plot_metrics import plot_run
from prompt_sources import read_prompts
from safetensors.torch import save
from sample_pairs import load_options, load_pipeline
from scorers import NAMES, check_scorer, load_scorer
from tqdm.auto import tqdm

from training_utils import METRICS_FILE, write_whole

warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant


class Column(NamedTuple):
    """The pictures of a LoRA at a scale; of the base model if there is no LoRA."""

    lora: str | None
    scale: float

    def __str__(self):
        return f"{self.lora} at {self.scale:g}" if self.lora else "base model"


BASE = Column(None, 0.0)  # always the first of columns


# Statistics


def resamples(num_prompts, count=2000):
    """Draws of prompts with replacement, (count, num_prompts): pictures of one prompt are not independent."""
    return np.random.default_rng(0).integers(num_prompts, size=(count, num_prompts))


def interval(values):
    """The 95 % bootstrap interval [low, high] of the mean of values (P, K), K for each of P prompts; NaN for one."""
    if len(values) < 2:
        return [math.nan, math.nan]
    means = np.nanmean(values, axis=1)[resamples(len(values))].mean(axis=1)
    return [float(bound) for bound in np.quantile(means, [0.025, 0.975])]


def wilson_interval(rate, n, z=1.96):
    """95 % confidence interval [low, high] of a rate observed in n trials."""
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return [max(0.0, float(center - half)), min(1.0, float(center + half))]  # within [0, 1] but for rounding


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


def recommend(scores, columns, change, max_loss):
    """Returns the number of the recommended column, or None, and the reason; see the head. 0: use no LoRA.

    Args:
        scores: {scorer: (C, P, K)}, the wanted one first, then guards.
        change: (C,), how far the pictures are from the base model's, which is column 0.
    """
    wanted, *guards = scores
    rest, num_prompts = range(1, len(columns)), scores[wanted].shape[1]
    if num_prompts < FEWEST_PROMPTS:
        return None, f"{num_prompts} prompts are too few to recommend anything; needed: {FEWEST_PROMPTS} or more."
    spoilt = {}
    for c in rest:
        for name in guards:
            before, after = scores[name][0], scores[name][c]
            loss = -np.nanmean(after - before) / max(float(np.nanstd(before)), 1e-9)
            if loss > max_loss:
                spoilt.setdefault(c, []).append(f"{name} by {loss:.2f}")
    why = "; ".join(f"{columns[c]} ({' and '.join(losses)})" for c, losses in spoilt.items())
    why = f" Fallen by more than {max_loss:g} standard deviations: {why}." if why else ""
    gains = {c: scores[wanted][c] - scores[wanted][0] for c in rest}
    gaining = [c for c in rest if interval(gains[c])[0] > 0]
    if not gaining:
        return 0, f"Use no LoRA: at no scale does {wanted} gain significantly.{why}"
    allowed = [c for c in gaining if c not in spoilt]
    best = max(allowed or gaining, key=lambda c: np.nanmean(gains[c]))
    as_good = [c for c in allowed if interval(gains[best] - gains[c])[0] <= 0]
    chosen = min(as_good or gaining, key=lambda c: change[c])
    found = f"{columns[chosen]} gains {np.nanmean(gains[chosen]):.4g} by {wanted}"
    if chosen != best and allowed:
        found += f", not significantly less than the best ({np.nanmean(gains[best]):.4g}, {columns[best]})"
        found += ", and changes the pictures less"
    if not guards:
        return None, f"{found}, but no guard was run, so nothing says what it costs. Name two scorers or more."
    if not allowed:
        return chosen, f"Whatever gains costs more than was allowed; this changes the pictures least. {found}.{why}"
    if columns[chosen].scale == max(column.scale for column in columns if column.lora == columns[chosen].lora):
        return None, f"{found}, at the highest scale tried: its gain may still rise. Try higher --scales, too.{why}"
    return chosen, f"{found}.{why}"


# Sampling


def fingerprint(lora):
    """Returns a hash of a LoRA, a folder, a file or a Hub id; raises ValueError if it has no weights."""
    try:
        weights, about = read_weights(find_file(lora, None))
    except Exception as problem:  # damaged and missing files, networks and the Hub fail in many kinds
        raise ValueError(f"--lora {lora}: {one_line(problem)}") from problem
    alphas = about.get(LORA_ADAPTER_METADATA_KEY, "")  # safetensors itself writes metadata in any order
    return hashlib.sha256(save(dict(sorted(weights.items()))) + alphas.encode()).hexdigest()


def sample_scales(pipeline, scales, prompts, seeds, folder, sampling, adapter):
    """Samples prompts and seeds (N) at each scale of an adapter into `folder`, where pictures are not yet.

    Returns a function that opens picture i at the scale with number s.
    """
    batch_size, jobs = sampling["batch_size"], []

    def file(scale, i):
        return Path(folder) / f"scale-{scale:g}" / f"{i:05}.png"

    for scale in scales:
        for i in range(0, len(prompts), batch_size):
            batch = range(i, min(i + batch_size, len(prompts)))
            jobs += [] if all(file(scale, i).exists() for i in batch) else [(scale, batch)]
    for scale, batch in tqdm(jobs, desc=f"Sampling {Path(folder).name}", disable=not jobs):
        pipeline.enable_lora() if scale else pipeline.disable_lora()
        if scale:
            pipeline.set_adapters(adapter, scale)
        pictures = sample_pictures(pipeline, [prompts[i] for i in batch], [seeds[i] for i in batch], **sampling)
        for i, picture in zip(batch, pictures, strict=True):
            write_whole(file(scale, i), encode_png(picture))
    return lambda s, i: Image.open(file(scales[s], i)).convert("RGB")


def sample_columns(pipeline, columns, adapters, prompts, seeds, folder, sampling):
    """Samples prompts and seeds (N) for each column into `folder`; `adapters` are the LoRAs' by their names.

    Returns a function that opens picture i of the column with number c.
    """
    folders = {lora: folder / (lora or "base") for lora in dict.fromkeys(column.lora for column in columns)}
    openers = {}
    for lora in folders:
        scales = [column.scale for column in columns if column.lora == lora]
        opener = sample_scales(pipeline, scales, prompts, seeds, folders[lora], sampling, adapters.get(lora))
        openers |= {Column(lora, scale): lambda i, s=s, opener=opener: opener(s, i) for s, scale in enumerate(scales)}
    return lambda c, i: openers[columns[c]](i)


def judge(picture, prompts, scorers, columns, count, max_loss):
    """Scores N = P x `count` pictures of each column; `picture(c, i)` is the PIL image i of the column with number c.

    Returns the figures, and the scores {name: (C, P, count)}.
    """
    scores, thumbnails = {scorer.name: [] for scorer in scorers}, []
    for c in tqdm(range(len(columns)), desc="Scoring", disable=None):
        rows, small = {name: [] for name in scores}, []
        for i in range(0, len(prompts), 64):
            images = [picture(c, j) for j in range(i, min(i + 64, len(prompts)))]
            small += [np.asarray(x.resize((16, 16), Image.Resampling.BOX)).ravel() / 255 for x in images]
            for scorer in scorers:
                rows[scorer.name].append(scorer.score(images, prompts[i : i + 64]))
        for name, parts in rows.items():
            scores[name].append(np.concatenate(parts).reshape(-1, count))
        thumbnails.append(np.stack(small).reshape(-1, count, 768))
    scores = {name: np.stack(values) for name, values in scores.items()}
    spread = [diversity(values) for values in thumbnails]
    change = [float(np.sqrt(((values - thumbnails[0]) ** 2).mean(-1)).mean()) for values in thumbnails]
    chosen, reason = recommend(scores, columns, change, max_loss)
    if chosen and spread[0] is not None and spread[chosen] < LESS_DIVERSE * spread[0]:
        reason += f" The diversity of its pictures has fallen from {spread[0]:.3f} to {spread[chosen]:.3f}."
    results = [
        {
            "lora": column.lora, "scale": column.scale, "change": change[c], "diversity": spread[c],
            "scorers": {name: compare(values[c], values[0]) for name, values in scores.items()},
        }
        for c, column in enumerate(columns)
    ]  # fmt: skip
    column = Column(None, None) if chosen is None else columns[chosen]
    answer = {"recommended_lora": column.lora, "recommended_scale": column.scale, "reason": reason}
    return {**answer, "scorers": list(scores), "results": results}, scores


# What is written


def answer(figures):
    """What is recommended, in a few words."""
    if figures["recommended_scale"] is None:
        return "No recommendation"
    if not figures["recommended_lora"]:
        return "Recommended: the base model"
    return f"Recommended: {figures['recommended_lora']} at scale {figures['recommended_scale']:g}"


def bounds(low, high, form):
    return "of one prompt" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def table(figures):
    """The figures in Markdown."""
    lines = ["| scorer | LoRA | scale | mean | gain | win rate | sign test |", "|---|---|---|---|---|---|---|"]
    for name in figures["scorers"]:
        for result in figures["results"]:
            row = result["scorers"][name]
            line = f"| {name} | {result['lora'] or 'base model'} | {result['scale']:g} | {row['mean']:.4g} |"
            if result["lora"]:
                line += f" {row['gain']:+.3g} ({bounds(*row['gain_interval'], '+.3g')}) | {row['win_rate']:.1%} "
                line += f"({bounds(*row['win_rate_interval'], '.1%')}) | p = {row['p']:.2g} |"
            lines.append(line if result["lora"] else f"{line} | | |")
    spread = [(Column(row["lora"], row["scale"]), row["diversity"]) for row in figures["results"]]
    values = ", ".join(f"{value:.3f} {column}" for column, value in spread if value is not None)
    lines += ["", f"Diversity: {values}." if values else "Diversity: not measured, it needs two pictures of a prompt."]
    return "\n".join(lines)


def markdown(figures):
    run = f"Scorers run: {', '.join(figures['scorers'])}."
    if figures["not_run"]:
        run += f" Not run: {', '.join(figures['not_run'])}."
    return (
        f"**{answer(figures)}.** {figures['reason']}\n\n{table(figures)}\n\n"
        f"{run} {figures['prompts']} prompts, {figures['images_per_prompt']} pictures each, the same seeds for every "
        "LoRA and scale; 95 % bootstrap intervals over prompts.\n"
    )


def how_to_use(figures):
    """Lines that use the recommended LoRA at its scale: in diffusers, and as a file for other programs."""
    lora, scale = figures["recommended_lora"], figures["recommended_scale"]
    if not lora:
        return ""
    path, program = figures["loras"][lora], os.path.relpath(Path(__file__).with_name("convert_lora.py"))
    options = {"pretrained_model_name_or_path": figures["base"], "lora": path, "scale": f"{scale:g}"}
    options |= {"format": "kohya", "output": f"{lora}-{scale:g}.safetensors"}
    command = shlex.join(["python", program, *(word for name in options for word in (f"--{name}", options[name]))])
    return (
        f"To use it in diffusers:\n\n    pipe.load_lora_weights({path!r}, adapter_name='judged')\n"
        f"    pipe.set_adapters('judged', {scale:g})\n\n"
        f"As a file that other programs use at scale 1:\n\n    {command}\n"
    )


def svg(figure):
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def curves(figures):
    """Gain against scale for each scorer, a curve for each LoRA, with intervals, as SVG."""
    from matplotlib.figure import Figure

    names, (base, *results) = figures["scorers"], figures["results"]
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.axhline(0, color="gray", linewidth=0.8)
        for lora in figures["loras"]:
            rows = [base, *(row for row in results if row["lora"] == lora)]
            scales, gains = [row["scale"] for row in rows], [row["scorers"][name]["gain"] for row in rows]
            low, high = zip(*(row["scorers"][name]["gain_interval"] for row in rows), strict=True)
            (line,) = axes.plot(scales, gains, marker="o", label=lora.replace("$", r"\$"))
            axes.fill_between(scales, low, high, alpha=0.15, linewidth=0, color=line.get_color())
            if lora == figures["recommended_lora"]:
                at = figures["recommended_scale"]
                axes.plot(at, gains[scales.index(at)], "*", color="black", markersize=12, label="recommended")
        axes.set(title=name, xlabel="LoRA scale", ylabel="gain against the base model")
        axes.legend(fontsize=8)
    return svg(figure)


def run_folder(lora):
    """The folder of the run that made a LoRA, or None."""
    folder = Path(lora) if Path(lora).is_dir() else Path(lora).parent
    folders = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    return next((folder for folder in folders if (folder / METRICS_FILE).is_file()), None)


def training_runs(loras):
    """The metrics of the runs that made the LoRAs, as HTML, where they are known."""
    parts = []
    for folder in dict.fromkeys(filter(None, map(run_folder, loras))):
        try:
            plot = svg(plot_run(folder))
        except ValueError:  # no step was logged
            continue
        name = html.escape(folder.resolve().name)
        parts.append(f'<h2>Training run {name}</h2><div class="curves">{plot}</div>')
    return "".join(parts)


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
pre { overflow-x: auto; }
.up { color: var(--good); } .down { color: var(--bad); }
"""


def page(figures, scores, picture, prompts, title):
    """The report as one HTML file that needs nothing else; pictures are shown at most 320 pixels wide."""
    columns, count = [Column(row["lora"], row["scale"]) for row in figures["results"]], figures["images_per_prompt"]
    recommended, wanted = Column(figures["recommended_lora"], figures["recommended_scale"]), figures["scorers"][0]
    values = scores[wanted].reshape(len(columns), -1)
    highest = max(range(1, len(columns)), key=lambda c: np.nanmean(values[c] - values[0]))
    shown = columns.index(recommended) if recommended.lora else highest
    gains = np.nan_to_num(values[shown] - values[0])
    order = np.argsort(gains, kind="stable")
    worst = list(order[: min(SHOWN["worst"], len(order))])
    best = [i for i in order[::-1][: SHOWN["best"]] if i not in worst]

    def cell(c, i):
        image, buffer = picture(c, i), io.BytesIO()
        image.thumbnail((320, 320))
        image.save(buffer, "JPEG", quality=88)
        data, name = base64.b64encode(buffer.getvalue()).decode(), html.escape(str(columns[c]))
        change = values[c, i] - values[0, i]
        kind = "up" if change > 0 else "down" if change < 0 else ""
        return (
            f'<figure><img src="data:image/jpeg;base64,{data}" alt="{name}"><figcaption>{name}<br>'
            f'<span class="{kind}">{values[c, i]:.4g}</span></figcaption></figure>'
        )

    def row(lora, i):
        """The base model's picture and those of a LoRA, which stand below those of another one."""
        return "".join(cell(c, i) for c, column in enumerate(columns) if column.lora in (None, lora))

    def rows(indices):
        return "".join(
            f'<div class="row"><p>{html.escape(prompts[i])} <small>(picture {i % count + 1})</small></p>'
            + "".join(f'<div class="pictures">{row(lora, i)}</div>' for lora in figures["loras"]) + "</div>"
            for i in indices
        )  # fmt: skip

    def results(head, cells):
        """A table of columns; `cells(result)` are those of one of them."""
        lines = "".join(
            f'<tr class="{"chosen" if Column(result["lora"], result["scale"]) == recommended else ""}">'
            f"<td>{html.escape(result['lora'] or 'base model')}</td><td>{result['scale']:g}</td>"
            f"{''.join(f'<td>{cell}</td>' for cell in cells(result))}</tr>"
            for result in figures["results"]
        )
        return f"<table><tr><th>LoRA<th>scale{''.join(f'<th>{name}' for name in head)}</tr>{lines}</table>"

    def scored(name):
        def cells(result):
            row = result["scorers"][name]
            return (
                f"{row['mean']:.4g}", f"{row['gain']:+.3g}", bounds(*row["gain_interval"], "+.3g"),
                f"{row['win_rate']:.1%}", bounds(*row["win_rate_interval"], ".1%"), f"{row['p']:.2g}",
            )  # fmt: skip

        role = "what is wanted" if name == wanted else "guard"
        head = ("mean", "gain", "95 %", "win rate", "95 %", "sign test p")
        return f"<h2>{html.escape(name)} <small>({role})</small></h2>{results(head, cells)}"

    def looks(result):
        spread = result["diversity"]
        return f"{result['change']:.3f}", "not measured" if spread is None else f"{spread:.3f}"

    not_run = f" Not run: {html.escape(', '.join(figures['not_run']))}." if figures["not_run"] else ""
    use = how_to_use(figures)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style>
<h1>{html.escape(title)}</h1>
<div class="answer"><b>{html.escape(answer(figures))}</b><br>
{html.escape(figures["reason"])}</div>
{f"<pre>{html.escape(use)}</pre>" if use else ""}
<p>{figures["prompts"]} prompts, {count} pictures each, the same seeds for every LoRA and scale; gains are against the
base model. Intervals are 95 % bootstrap intervals over prompts. Higher is better for every scorer.{not_run}</p>
<div class="curves">{curves(figures)}</div>
{"".join(scored(name) for name in scores)}
<h2>Pictures</h2>
{results(("change", "diversity"), looks)}
<p>Change: mean distance of a picture from the base model's. Diversity: mean distance of two pictures of a prompt.
Both are root mean squares over 16 x 16 pixels in [0, 1].</p>
<h2>Lowest gains by {html.escape(wanted)} first</h2>
<p>Of {len(gains)} pictures of {html.escape(str(columns[shown]))}, {int((gains < 0).sum())} have lost.</p>{rows(worst)}
<h2>Largest gains</h2>{rows(best)}
{training_runs(figures["loras"].values())}
</html>
"""


# The program


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


def read_settings(folder, settings, error):
    """Returns the LoRAs whose pictures the folder holds, {name: {"path", "sha256"}}; none if it is new.

    Ends the program by `error` if it holds pictures with other settings, or something else, or cannot be a folder.
    """
    file = folder / "settings.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed or "loras" not in before:
            error(f"--output_dir {folder} holds pictures with another --{(*changed, 'lora')[0]}; name another folder")
        return before["loras"]
    if folder.is_dir() and any(folder.iterdir()):
        error(f"--output_dir {folder} holds something else already; name another folder")
    parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        error(f"--output_dir {folder} cannot be written: {parent} is not a folder that you may write to")
    return {}


def short_name(lora, taken):
    """Returns a name for a LoRA's pictures: the last part of its path, with more of it if that is taken."""
    path = Path(lora).absolute()
    parts = [printable(part) for part in (path.with_suffix("") if path.suffix == ".safetensors" else path).parts[1:]]
    longer = ("-".join(parts[-count:]) for count in range(1, len(parts) + 1))
    taken = {"base", *(name.casefold() for name in taken)}  # some file systems do not tell capitals apart
    numbered = (f"{parts[-1]}-{count}" for count in itertools.count(2))
    return next(name for name in itertools.chain(longer, numbered) if name.casefold() not in taken)


def name_loras(loras, known, error):
    """Returns names and paths of LoRAs, {name: {"path", "sha256"}}, those of the `known` ones as they were.

    Equal LoRAs, such as that of a run and of its last checkpoint, get one name. Ends the program by `error` if a LoRA
    is not what it was when its pictures were sampled.
    """
    named = {}
    for lora in loras:
        digest = fingerprint(lora)
        equal = next((name for name, other in {**known, **named}.items() if other["sha256"] == digest), None)
        if equal in named:
            print(f"--lora {lora} is the same as {named[equal]['path']}: judged once", file=sys.stderr)
            continue
        same_path = [name for name, other in known.items() if Path(other["path"]).absolute() == Path(lora).absolute()]
        if same_path and not equal:
            error(f"--lora {lora} has changed since its pictures were sampled; name another --output_dir")
        name = equal or short_name(lora, {**known, **named})
        named[name] = {"path": lora, "sha256": digest}
    return named


def set_aside(folder, figures):
    """Renames a report by other scorers, LoRAs or scales than these, so that it is not overwritten, and says so."""
    try:
        before = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        is_same = all(before.get(name) == figures[name] for name in ("scorers", "loras", "scales", "max_loss"))
    except FileNotFoundError:
        return
    except ValueError:
        is_same = False
    if not is_same:
        number = next(n for n in itertools.count(1) if not list(folder.glob(f"judge-{n}.*")))
        for file in folder.glob("judge.*"):
            file.rename(file.with_stem(f"judge-{number}"))
        print(f"the earlier report, by other options, is now {folder / f'judge-{number}.html'}")


def main(args, error):
    specs, not_run = (args.scorers, []) if args.scorers else available_scorers()
    scales, count, folder = sorted({0.0, *args.scales}), args.num_images_per_prompt, Path(args.output_dir)
    if not specs:
        error(f"--scorers: none can be run: {'; '.join(not_run)}")
    if scales == [0.0]:
        error("--scales 0: nothing to compare with the base model")
    if importlib.util.find_spec("matplotlib") is None:
        error("matplotlib is not installed: pip install matplotlib")
    try:
        prompts = read_prompts(args.prompts, args.max_prompts)
        for spec in specs:
            try:
                check_scorer(spec)
            except ValueError as problem:
                error(f"--scorers {spec}: {printable(str(problem))}")
        check_model("--base", args.base, variant=args.variant)
        names = ("base", "variant", "prediction_type", "num_images_per_prompt", "num_inference_steps",
                 "guidance_scale", "dtype", "seed")  # fmt: skip
        settings = {**{name: getattr(args, name) for name in names}, "prompts": prompts}
        known = read_settings(folder, settings, error)
        loras = name_loras(args.lora, known, error)
        pipeline = load_pipeline("--base", args.base, None, None, **load_options(args))
        adapters = {name: f"judged_{i}" for i, name in enumerate(loras)}  # PEFT's names may not hold dots
        for name, lora in loras.items():
            load_lora(pipeline, lora["path"], adapter=adapters[name])
    except ValueError as problem:
        error(printable(str(problem)))
    try:
        write_whole(folder / "settings.json", json.dumps({**settings, "loras": {**known, **loras}}, indent=2).encode())
    except OSError as problem:
        error(f"--output_dir {folder} cannot be written: {one_line(problem)}")
    repeated = [prompt for prompt in prompts for _ in range(count)]
    seeds = [SEED * (args.seed + 1) + i for i in range(len(repeated))]
    sampling = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "batch_size")}
    columns = [BASE, *(Column(name, scale) for name in loras for scale in scales[1:])]
    picture = sample_columns(pipeline, columns, adapters, repeated, seeds, folder / "images", sampling)
    device = pipeline.device
    del pipeline
    try:
        scorers = [load_scorer(spec, device) for spec in specs]
        figures, scores = judge(picture, repeated, scorers, columns, count, args.max_loss)
    except ValueError as problem:
        error(f"--scorers: {printable(str(problem))}")
    paths = {name: lora["path"] for name, lora in loras.items()}
    about = {"scales": scales, "max_loss": args.max_loss, "prompts": len(prompts), "images_per_prompt": count}
    figures = {"base": args.base, "loras": paths, **about, "not_run": not_run, **figures}
    set_aside(folder, figures)
    title = f"{', '.join(loras)} on {Path(args.base).name}"
    for_json = json.loads(json.dumps(figures), parse_constant=lambda _: None)  # JSON has no NaN
    write_whole(folder / "judge.json", (json.dumps(for_json, indent=2) + "\n").encode())
    write_whole(folder / "judge.md", markdown(figures).encode())
    write_whole(folder / "judge.html", page(figures, scores, picture, repeated, title).encode())
    print(f"{markdown(figures)}\n{how_to_use(figures)}\npage: {folder / 'judge.html'}")


if __name__ == "__main__":
    main(*args_and_error)

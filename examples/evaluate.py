"""Compare a LoRA with its base model in the small world: what it gains and what it spoils, at several scales.

    python examples/evaluate.py --model examples/small_world_model --lora aligned --preference area --output_dir out

Samples held-out captions at several scales of the LoRA and prints for each the mean score of the preference, its gain,
how often the aligned picture beats the base picture (a tie counts half), damage, the change of sharpness, and the
share of captions obeyed. Damage is the larger of two: how much farther pictures are from drawings (damage.py), and how
much sharpness they have lost. The recommended scale is that of most gain within 5 % damage. Writes `evaluation.json`
and `before_after.png`, pictures at scales 0, 0.5, 1 and the recommended one.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import small_world
from small_world import add_sampling_options

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import Parser, missing_folder, number

MAX_DAMAGE = 0.05
SCALES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)  # of the LoRA, fine where damage is small


def parse_args(argv=None):
    path, count = os.path.expanduser, number(int, least=1)
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=path, required=True, help="Folder of the base pipeline")
    parser.add_argument("--lora", type=path, required=True, help="Folder with pytorch_lora_weights.safetensors")
    parser.add_argument("--preference", required=True, choices=small_world.PREFERENCES, help="What is to be scored")
    parser.add_argument(
        "--output_dir", type=path, required=True, help="Folder for evaluation.json and before_after.png"
    )
    parser.add_argument("--num_images", type=count, default=128, help="More: a narrower interval")
    scale = number(float, above=0)
    parser.add_argument("--scales", type=scale, nargs="+", default=list(SCALES), help="Of the LoRA; 0 is added")
    add_sampling_options(parser, count)
    return parser.parse_args(argv)


if __name__ == "__main__":  # before the imports that take seconds
    args = parse_args()

import damage
import numpy as np
from judge_lora import SEED, compare, sample_scales
from make_pairs import check_options, load_or_end, sample_pictures
from PIL import Image, ImageDraw, ImageFont


def held_out(num_images, seed=0):
    """Held-out captions in turn, and a new seed for each picture."""
    captions = [small_world.HELD_OUT_CAPTIONS[i % len(small_world.HELD_OUT_CAPTIONS)] for i in range(num_images)]
    return captions, [SEED * (seed + 1) + i for i in range(num_images)]


def sample_held_out(pipeline, num_images, seed=0, **sampling):
    """Pictures, uint8 (N, 64, 64, 3), and their captions."""
    captions, seeds = held_out(num_images, seed)
    return sample_pictures(pipeline, captions, seeds, **sampling), captions


class Looks(NamedTuple):
    """What N pictures show: scores {attribute: (N,)}, whether captions are obeyed (N,), and the nearest drawings."""

    scores: dict[str, np.ndarray]
    is_obeyed: np.ndarray
    fit: damage.Fit


def look_at(pictures, captions):
    """Judges pictures, uint8 (N, 64, 64, 3)."""
    scores = {
        name: np.array([score(picture) for picture in pictures]) for name, score in small_world.PREFERENCES.items()
    }
    is_obeyed = [small_world.follows_caption(*pair) for pair in zip(pictures, captions, strict=True)]
    return Looks(scores, np.array(is_obeyed), damage.fit_drawings(pictures, captions))


def compare_looks(after, before, preference):
    """Gain in what is preferred and what it cost, for pictures of the same captions and seeds.

    Returns score, the mean; gain and win_rate, each with its interval, see judge_lora.py; damage and its two parts,
    ratios to the base model; captions_obeyed; and drift_<attribute>, the change of each attribute's mean in standard
    deviations of the base model's pictures.
    """
    wanted = compare(after.scores[preference][:, None], before.scores[preference][:, None])
    names = ("gain", "gain_interval", "win_rate", "win_rate_interval")
    distance_ratio = damage.distance_ratio(after.fit, before.fit)
    sharpness_ratio = float(after.scores["sharpness"].mean() / before.scores["sharpness"].mean())
    change = {name: after.scores[name].mean() - before.scores[name].mean() for name in before.scores}
    return {
        "score": wanted["mean"],
        **{name: wanted[name] for name in names},
        "damage": max(distance_ratio, 2 - sharpness_ratio),
        "distance_ratio": distance_ratio,
        "sharpness_ratio": sharpness_ratio,
        "captions_obeyed": float(after.is_obeyed.mean()),
        **{f"drift_{name}": float(change[name] / max(before.scores[name].std(), 1e-6)) for name in change},
    }


def recommend(results):
    """The scale of most gain before the damage exceeds its limit, for {scale: `compare_looks`}; 0.0 if none gains."""
    best = 0.0
    for scale, result in sorted(results.items()):
        if result["damage"] > 1 + MAX_DAMAGE:
            break
        if result["gain"] > (results[best]["gain"] if best else 0):
            best = scale
    return best


def draw_before_after(rows, captions, title, subtitle, num_columns=10, zoom=2):
    """Columns of pictures of one caption and seed; `rows` are (label, PIL images)."""
    side, gap, label_width, header = small_world.SIZE * zoom, 6, 150, 108
    num_columns = min(num_columns, len(captions))
    size = (label_width + num_columns * (side + gap) + 8, header + len(rows) * (side + gap) + 8)
    canvas = Image.new("RGB", size, "white")
    pen, font, large = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(24)
    pen.text((14, 10), title, fill="black", font=large)
    pen.text((14, 44), subtitle, fill="#444444", font=font)
    for column in range(num_columns):
        x = label_width + column * (side + gap)
        pen.text((x + side / 2, header - 24), captions[column], fill="black", font=font, anchor="ma")
        for row, (_, pictures) in enumerate(rows):
            picture = pictures[column].resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(picture, (x, header + row * (side + gap)))
    for row, (label, _) in enumerate(rows):
        at = (label_width - 10, header + row * (side + gap) + side / 2)
        pen.multiline_text(at, label, fill="black", font=font, anchor="rm", align="right")
    return canvas


def main(args):
    check_options(args, "evaluation.json")
    if problem := missing_folder(str(Path(args.lora).absolute())):
        args.error(f"--lora {args.lora}: {problem}")
    if not (Path(args.lora) / "pytorch_lora_weights.safetensors").is_file():
        args.error(f"--lora {args.lora}: holds no pytorch_lora_weights.safetensors")
    sampling = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "batch_size")}
    pipeline, (captions, seeds) = load_or_end(args), held_out(args.num_images, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        scales = (0.0, *sorted(args.scales))
        picture = sample_scales(pipeline, scales, captions, seeds, folder, sampling, "lora")
        pictures = {scale: [picture(s, i) for i in range(len(captions))] for s, scale in enumerate(scales)}
    looks = {scale: look_at([np.asarray(image) for image in images], captions) for scale, images in pictures.items()}
    results = {scale: compare_looks(looks[scale], looks[0.0], args.preference) for scale in scales}
    scale = recommend({scale: results[scale] for scale in args.scales})
    found = results[scale]

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    labels = {at: f"LoRA at {at:g}" for at in (0.5, 1.0) if at in scales}
    labels |= {scale: f"LoRA at {scale:g},\nrecommended", 0.0: "base model"}
    low, high = found["win_rate_interval"]
    subtitle = (
        f"at scale {scale:g}, aligned beats base in {found['win_rate']:.1%} of {args.num_images} held-out samples "
        f"(95 % interval {low:.1%} to {high:.1%}); damage {found['damage'] - 1:+.1%}; "
        f"captions obeyed {found['captions_obeyed']:.1%}"
    )
    title, no_scale = f"Preference: more {args.preference}", f"No scale gains within {MAX_DAMAGE:.0%} damage"
    rows = [(labels[scale], pictures[scale]) for scale in sorted(labels)]
    draw_before_after(rows, captions, title, subtitle if scale else no_scale).save(output_dir / "before_after.png")
    record = {"preference": args.preference, "num_images": args.num_images, "recommended_scale": scale}
    record["scales"] = {f"{scale:g}": result for scale, result in results.items()}
    (output_dir / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    print(f"scale   {args.preference:>9}     gain   win rate   damage   sharpness   captions obeyed")
    for at, result in results.items():
        print(
            f"{at:<5g}   {result['score']:9.3f}   {result['gain']:+.3f}   {result['win_rate']:8.1%}   "
            f"{result['damage'] - 1:+6.1%}   {result['sharpness_ratio'] - 1:+9.1%}   {result['captions_obeyed']:15.1%}"
        )
    print(f"Most gain within {MAX_DAMAGE:.0%} damage: scale {scale:g}" if scale else no_scale)
    print(f"picture: {output_dir / 'before_after.png'}")


if __name__ == "__main__":
    main(args)

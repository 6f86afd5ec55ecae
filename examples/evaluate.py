"""Compare a LoRA with its base model in the small world: judge_lora.py with held-out captions and programmed judges.

    python examples/evaluate.py --model examples/small_world_model --lora aligned --preference area --output_dir out

Prints and writes to `<output_dir>/evaluation.json` how often the aligned picture beats the base picture (a tie counts
half) with a 95 % interval, the mean score before and after, and the share of pictures that obey their caption.
`<output_dir>/before_after.png` shows some of them.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import small_world
from judge_lora import SEED, judge, sample_scales
from make_pairs import add_sampling_options, check_options, load_pipeline, sample_pictures
from PIL import Image, ImageDraw, ImageFont
from scorers import of_function


def held_out(num_images, seed=0):
    """Held-out captions in turn, and a new seed for each picture."""
    captions = [small_world.HELD_OUT_CAPTIONS[i % len(small_world.HELD_OUT_CAPTIONS)] for i in range(num_images)]
    return captions, [SEED * (seed + 1) + i for i in range(num_images)]


def sample_held_out(pipeline, num_images, seed=0, **sampling):
    """Pictures, uint8 (N, 64, 64, 3), and their captions."""
    captions, seeds = held_out(num_images, seed)
    return sample_pictures(pipeline, captions, seeds, **sampling), captions


def compare(before, after, captions, preference):
    """Win rate, scores and obeyed captions of pictures `after` against `before`, which share caption and seed."""
    functions = {"score": small_world.PREFERENCES[preference], "captions_obeyed": small_world.follows_caption}
    scorers = [of_function(name, function) for name, function in functions.items()]
    pictures = (before, after)
    figures, _ = judge(lambda s, i: Image.fromarray(np.asarray(pictures[s][i])), captions, scorers, [0.0, 1.0], 1, 0.2)
    result = figures["scorers"]["score"]["1"]
    means = {
        f"{name}_{when}": figures["scorers"][name][scale]["mean"]
        for name in functions for when, scale in (("before", "0"), ("after", "1"))
    }  # fmt: skip
    names = ("win_rate", "win_rate_interval", "gain", "gain_interval", "p")
    return {"preference": preference, "num_images": len(captions), **{name: result[name] for name in names}, **means}


def draw_before_after(before, after, captions, result, num_columns=5, num_rows=2, zoom=3):
    """Rows of captioned columns, each a base picture above the aligned picture of the same caption and seed.

    `before` and `after` hold PIL images, `result` is what `compare` returns.
    """
    side, gap, label_width, label_height, header = small_world.SIZE * zoom, 6, 92, 26, 84
    num_columns = min(num_columns, len(captions))
    num_rows = max(1, min(num_rows, len(captions) // num_columns))
    row_height = label_height + 2 * side + gap + 14
    canvas = Image.new("RGB", (label_width + num_columns * (side + gap) + 8, header + num_rows * row_height), "white")
    pen, font, large = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(24)

    low, high = result["win_rate_interval"]
    pen.text((14, 10), f"Preference: {result['preference']}", fill="black", font=large)
    pen.text(
        (14, 44),
        f"aligned beats base in {result['win_rate']:.1%} of {result['num_images']} held-out samples "
        f"(95 % interval {low:.1%} to {high:.1%}); captions obeyed: {result['captions_obeyed_before']:.1%} before, "
        f"{result['captions_obeyed_after']:.1%} after",
        fill="#444444",
        font=font,
    )
    for i in range(num_rows * num_columns):
        row, column = divmod(i, num_columns)
        x, y = label_width + column * (side + gap), header + row * row_height
        pen.text((x + side / 2, y + 4), captions[i], fill="black", font=font, anchor="ma")
        for k, (name, pictures) in enumerate((("base", before), ("aligned", after))):
            top = y + label_height + k * (side + gap)
            canvas.paste(pictures[i].resize((side, side), Image.Resampling.BICUBIC), (x, top))
            if column == 0:
                pen.text((label_width - 10, top + side / 2), name, fill="black", font=font, anchor="rm")
    return canvas


def parse_args(argv=None):
    path = os.path.expanduser
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=path, required=True, help="Folder of the base pipeline")
    parser.add_argument("--lora", type=path, required=True, help="Folder with pytorch_lora_weights.safetensors")
    parser.add_argument("--preference", required=True, choices=small_world.PREFERENCES, help="What is to be scored")
    parser.add_argument(
        "--output_dir", type=path, required=True, help="Folder for evaluation.json and before_after.png"
    )
    parser.add_argument("--num_images", type=int, default=256, help="More: a narrower interval")
    add_sampling_options(parser)
    args = parser.parse_args(argv)
    check_options(parser, args, "evaluation.json", "num_images")
    if not (Path(args.lora) / "pytorch_lora_weights.safetensors").is_file():
        parser.error(f"--lora {args.lora}: holds no pytorch_lora_weights.safetensors")
    return args


def main(args):
    sampling = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "batch_size")}
    pipeline, (captions, seeds) = load_pipeline(args.model), held_out(args.num_images, args.seed)
    pipeline.load_lora_weights(args.lora, adapter_name="judged")
    with tempfile.TemporaryDirectory() as folder:
        picture = sample_scales(pipeline, [0.0, 1.0], captions, seeds, folder, sampling)
        before, after = ([picture(s, i) for i in range(len(captions))] for s in (0, 1))

    result = compare(before, after, captions, args.preference)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    draw_before_after(before, after, captions, result).save(output_dir / "before_after.png")
    (output_dir / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")

    (low, high), (least, most) = result["win_rate_interval"], result["gain_interval"]
    print(f"win rate         {result['win_rate']:.1%}, 95 % interval {low:.1%} to {high:.1%} (n = {args.num_images})")
    print(
        f"mean {args.preference:<12}{result['score_before']:.3f} -> {result['score_after']:.3f}, "
        f"gain {result['gain']:.3f} ({least:.3f} to {most:.3f})"
    )
    print(f"captions obeyed  {result['captions_obeyed_before']:.1%} -> {result['captions_obeyed_after']:.1%}")
    print(f"picture          {output_dir / 'before_after.png'}")


if __name__ == "__main__":
    main(parse_args())

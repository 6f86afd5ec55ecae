"""Look at preference pairs before training on them: counts, sizes, captions, duplicates, and a contact sheet.

    python examples/inspect_pairs.py --train_data_dir pairs --output_dir look

Takes the data options of the training scripts and reads the pairs as they do. Prints what it finds and writes it to
`<output_dir>/inspection.json`. `<output_dir>/pairs.png` shows some pairs as they are cropped, winner and loser marked:
check that the winners are the better ones. Labels of all rows are read, images and captions of a random sample.
"""

import json
import logging
import math
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pair_files import check_folder

from training_options import Parser, missing_folder, number, one_line, printable

REPORT_FILE, PICTURE_FILE = "inspection.json", "pairs.png"
SIDE = 224  # of a shown image


def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s (--train_data_dir D | --dataset_name N) --output_dir O [options, see --help]",
    )
    path, count = os.path.expanduser, number(int, least=1)
    # fmt: off
    add = parser.add_argument_group("the data options of the training scripts").add_argument
    add("--dataset_name", type=path, help="data set of the Hub, or whatever else datasets.load_dataset takes")
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split_name", default="train", help="split to look at")
    add("--train_data_dir", type=path, help="instead of a name: a folder, such as convert_pairs.py writes")
    add("--cache_dir", type=path, help="folder for downloads")
    add("--image_0_column", default="jpg_0", help="first image")
    add("--image_1_column", default="jpg_1", help="second image")
    add("--label_column", default="label_0", help="1 where image 0 is better, 0 where image 1 is, 0.5 for a tie")
    add("--winner_column", help="instead of a label: column of the better image")
    add("--loser_column", help="column of the worse image")
    add("--caption_column", default="caption", help="caption, or a list of captions")
    add("--strength_column", help="how certain a preference is, 0 to 1")
    add("--tie_policy", choices=["drop", "soft"], default="drop", help="leave ties out, or keep them")
    add("--max_train_samples", type=count, help="use only the first N pairs")
    add = parser.add_argument_group("the inspection").add_argument
    add("--output_dir", type=path, required=True, help=f"folder for {REPORT_FILE} and {PICTURE_FILE}")
    add("--resolution", type=count, default=512, help="side of the square that training crops")
    add("--pretrained_model_name_or_path", type=path, help="model whose tokenizers count the words of captions")
    add("--revision", help="revision of the model")
    add("--sample_size", type=count, default=256, help="pairs whose images are opened; more takes time, finds more")
    add("--num_shown", type=count, default=8, help="pairs in the picture")
    add("--seed", type=number(int, least=0), default=0, help="of the random sample")
    # fmt: on
    args = parser.parse_args(argv)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give the data by either --dataset_name or --train_data_dir")
    if (args.winner_column is None) != (args.loser_column is None):
        parser.error("--winner_column and --loser_column go together")
    check_folder(args.output_dir, parser.error)
    if existing := [name for name in (REPORT_FILE, PICTURE_FILE) if (Path(args.output_dir) / name).exists()]:
        parser.error(f"--output_dir {args.output_dir}: already holds {existing[0]}; give another folder or remove it")
    return args, parser.error


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

import numpy as np
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

from training_utils import LONGEST_CAPTION, BadRow, decode_image, find_model, load_pairs

transformers.logging.set_verbosity_error()  # it warns of what is not used here, such as torchvision


def load_tokenizers(model, revision=None):
    """Returns the tokenizers of a pipeline; raises ValueError if there are none."""
    from diffusers import DiffusionPipeline
    from transformers import AutoTokenizer

    option = "--pretrained_model_name_or_path"
    find_model(option, model, revision, logging.getLogger(__name__).warning)
    try:
        config = DiffusionPipeline.load_config(model, revision=revision)
        parts = [name for name in config if "tokenizer" in name and config[name][0]]  # SDXL's refiner lacks the first
        if not parts:
            raise ValueError("a pipeline without a tokenizer")
        return [AutoTokenizer.from_pretrained(model, subfolder=part, revision=revision) for part in parts]
    except (OSError, ValueError) as problem:
        missing = missing_folder(model, was_asked_for=True)
        raise ValueError(f"{option} {model}: {missing or one_line(problem)}") from problem


class Look(NamedTuple):
    """What is kept of a pair: `small` (2, 8, 8 + 1) are greys of winner and loser; `crops` to be shown, or none."""

    row_name: str
    captions: list[str]
    is_tie: bool
    sizes: list[tuple[int, int]]
    profiles: list[bool]  # whether winner and loser have a colour profile
    small: np.ndarray
    crops: list[Image.Image]


def look_at(pairs, sample_size, num_shown, seed):
    """Returns a `Look` at each pair of a random sample, and the counted reasons why others cannot be opened."""
    looks, reasons = [], Counter()
    places = np.random.default_rng(seed).permutation(len(pairs))[:sample_size]
    for place in tqdm(places, "Looking at pairs", disable=None):
        try:
            pair = pairs[int(place)]
            images = [decode_image(pair.winner), decode_image(pair.loser)]
        except BadRow as problem:
            reasons[str(problem).partition(": ")[0]] += 1
            continue
        small = [np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"), dtype=float) for image in images]
        shown = images if len(looks) < num_shown else []
        crops = [ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS) for image in shown]
        sizes, profiles = [image.size for image in images], [image.info["has_profile"] for image in images]
        name = pairs.row_name(int(place))
        looks.append(Look(name, pair.captions, pair.is_tie, sizes, profiles, np.stack(small), crops))
    return looks, reasons


def inspect(pairs, args, tokenizers):
    """Returns a report of the pairs, names with texts or numbers, and the pairs to show."""
    looks, reasons = look_at(pairs, args.sample_size, args.num_shown, args.seed)
    sizes = np.array([size for look in looks for size in look.sizes] or [(1, 1)])
    captions = [caption for look in looks for caption in look.captions]
    report = {
        "rows": pairs.num_rows,
        "pairs": len(pairs),
        "ties": f"{pairs.num_ties} {'among them' if args.tie_policy == 'soft' else 'left out'}",
        "pairs looked at": f"{len(looks) + reasons.total()} of {len(pairs)}",
        "unusable": dict(reasons) or 0,
        "widths in pixels": quantiles(sizes[:, 0]),
        "heights in pixels": quantiles(sizes[:, 1]),
        "images that are enlarged": f"{np.mean(sizes.min(1) < args.resolution):.1%}",
        "share of an image that cropping discards": f"{np.mean(1 - sizes.min(1) / sizes.max(1)):.1%} on average",
        "images with a colour profile": f"{sum(sum(look.profiles) for look in looks)}, converted to sRGB",
        "pairs of which one image has a profile": sum(sum(look.profiles) == 1 for look in looks),
        "caption lengths in letters": quantiles([len(caption) for caption in captions]),
        **find_duplicates(looks),
    }
    if tokenizers:
        lengths = [
            max(len(t(caption[:LONGEST_CAPTION], verbose=False).input_ids) for t in tokenizers) for caption in captions
        ]
        longest = min(tokenizer.model_max_length for tokenizer in tokenizers)
        report["caption lengths in tokens"] = quantiles(lengths)
        report["captions that are cut"] = f"{sum(n > longest for n in lengths)} of {len(lengths)} (over {longest})"
    labels = pairs.labels[pairs.kept]
    labels = labels[labels != 0.5]
    if not args.winner_column and len(labels):
        share = np.mean(labels == 1)
        is_biased = abs(share - 0.5) > 3 * math.sqrt(0.25 / len(labels))
        doubt = ": the column gives the winner away, is that meant?" if is_biased else ""
        report["image 0 is the winner"] = f"{share:.1%} of {len(labels)} pairs{doubt}"
    return report, looks[: args.num_shown]


def quantiles(values):
    if len(values) == 0:
        return "none"
    low, middle, high = np.quantile(values, (0, 0.5, 1))
    return f"{low:.0f} to {high:.0f}, half of them up to {middle:.0f}"


def find_duplicates(looks):
    """Counts pairs whose two images are nearly alike, pairs that occur again, and those that occur the other way."""
    alike = again = exchanged = 0
    seen = set()
    for small in (look.small for look in looks):
        alike += bool(np.abs(small[0] - small[1]).max() < 3)
        # the signs of the differences of neighbouring pixels: a hash that survives scaling and compression
        winner, loser = ((np.diff(pixels) > 0).tobytes() + pixels.mean().round(-1).tobytes() for pixels in small)
        again += (winner, loser) in seen
        exchanged += winner != loser and (loser, winner) in seen
        seen.add((winner, loser))
    return {
        "pairs of nearly the same image": alike,
        "pairs that occur again": again,
        "pairs that occur again with winner and loser exchanged": exchanged,
    }


def draw_contact_sheet(shown):
    """Returns a picture of pairs as their centre is cropped, two in a row, winner and loser marked."""
    gap, line, columns = 12, 20, 2
    font = ImageFont.load_default(14)
    width, height = 2 * SIDE + 3 * gap, SIDE + 4 * line + gap
    canvas = Image.new("RGB", (columns * width + gap, math.ceil(len(shown) / columns) * height + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for place, look in enumerate(shown):
        x, y = gap + place % columns * width, gap + place // columns * height
        marks = (("tie", "#666666"),) * 2 if look.is_tie else (("WINNER", "#107010"), ("LOSER", "#b01010"))
        for i, (mark, color) in enumerate(marks):
            left = x + i * (SIDE + gap)
            pen.text((left, y), mark, fill=color, font=font)
            canvas.paste(look.crops[i], (left, y + line))
            pen.rectangle((left - 2, y + line - 2, left + SIDE + 1, y + line + SIDE + 1), outline=color, width=2)
        text = textwrap.wrap(f"{look.row_name}: {look.captions[0]}", 64)[:2]
        pen.text((x, y + line + SIDE + 4), "\n".join(text), fill="black", font=font)
    return canvas


def main(args, error):
    try:
        model = args.pretrained_model_name_or_path
        tokenizers = load_tokenizers(model, args.revision) if model else []
        pairs = load_pairs(args)
    except ValueError as problem:
        error(printable(str(problem)))
    report, shown = inspect(pairs, args, tokenizers)
    for name, value in report.items():
        print(f"{name}: {value}")
    if not shown:
        error(f"none of the pairs that were looked at can be opened: {report['unusable']}")
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        draw_contact_sheet(shown).save(output_dir / PICTURE_FILE)
    except OSError as problem:
        error(f"--output_dir {args.output_dir}: {one_line(problem)}")
    print(f"wrote {output_dir / REPORT_FILE} and {output_dir / PICTURE_FILE}")


if __name__ == "__main__":
    main(*args_and_error)

"""Turn preference pairs of any shape and storage into the parquet files that the training scripts read by default.

    python examples/convert_pairs.py --train_data_dir folders --winner_column chosen --loser_column rejected \
        --output_dir pairs
    accelerate launch train_inversion_dpo.py --train_data_dir pairs ...

Writes `<output_dir>/train-<i>-of-<n>.parquet` with the columns

    jpg_0, jpg_1      image files, as they were stored unless the training scripts could not read them
    label_0           1 if image 0 won, 0 if image 1 won, 0.5 for a tie (with --tie_policy soft)
    caption           text, or a list of texts where the data have lists
    strength          with --strength_scale: how certain the preference is, from the scores; train with
                      --strength_column strength

Which image comes first is random, by --seed, whatever the order was: columns then do not tell who won. Every image is
decoded once as a check. Unusable rows are left out and counted by reason; the first ten are named.
"""

import argparse
import contextlib
import math
import os
import re
import shlex
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pair_files import PairWriter, check_output_dir

from training_options import Parser, missing_folder, number, one_line, printable


def label_meaning(text):
    """An argparse type: "left=1" says what a label means, 1 that image 0 won, 0 that image 1 did, 0.5 a tie."""
    label, _, meaning = text.rpartition("=")
    if not label or meaning not in ("0", "1", "0.5", ".5"):
        raise argparse.ArgumentTypeError(f"is {text}; allowed: LABEL=1, LABEL=0 and LABEL=0.5, such as left=1")
    from pair_sources import label_key

    return label_key(label), float(meaning)


def protect_negative_numbers(argv):
    """Puts a blank before words like -1=0 and -1e-3, which argparse would take for options, other than -1."""
    return [
        f" {word}" if re.match(r"-\.?\d", word) and not re.fullmatch(r"-\d+|-\d*\.\d+", word) else word
        for word in argv
    ]


def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s (--train_data_dir D | --dataset_name N) --output_dir O [options, see --help]",
    )
    path, count, share = os.path.expanduser, number(int, least=1), number(float, least=0, most=1)
    # fmt: off
    add = parser.add_argument_group("where the pairs are").add_argument
    add("--dataset_name", type=path, help="data set of the Hub, or whatever else datasets.load_dataset takes")
    add("--dataset_config_name", help="configuration of --dataset_name")
    add("--dataset_split_name", default="train", help="split to convert, or a part of it, such as train[:1000]")
    add("--train_data_dir", type=path, help="instead of a name: a folder of parquet or arrow files, of save_to_disk, "
        "of JSONL or CSV with image paths, an image folder with metadata, folders of equal file names; or one file")
    add("--image_root", type=path, help="folder that relative image paths belong to, if not that of the data file")
    add("--allow_outside_images", action="store_true",
        help="also read images at addresses, and in files outside of the data's folder or --image_root")
    add("--cache_dir", type=path, help="folder for files of the Hub")
    add("--streaming", action="store_true", help="read a data set of the Hub without storing it on the disk")
    add = parser.add_argument_group("which columns are the pair; prompt.text is a nested field").add_argument
    add("--image_0_column", default="jpg_0", help="first image: encoded bytes, paths, addresses or base64")
    add("--image_1_column", default="jpg_1", help="second image")
    add("--label_column", default="label_0", help="1 where image 0 is better, 0 where image 1 is, 0.5 for a tie")
    add("--label_map", nargs="+", action="extend", type=label_meaning, metavar="LABEL=MEANING",
        help="what other labels mean: left=1 right=0 tie=0.5")
    add("--winner_column", help="instead of a label: column of the better image")
    add("--loser_column", help="column of the worse image")
    add("--score_0_column", nargs="+", help="instead of a label: column of image 0's score, higher is better")
    add("--score_1_column", nargs="+", help="column of image 1's score")
    add("--images_column", help="instead of two images: column of a list of images for one caption")
    add("--scores_column", nargs="+", help="column of the list of their scores, higher is better")
    add("--score_weights", nargs="+", type=number(float), metavar="WEIGHT",
        help="weights of several columns of scores, which are summed; below 0 where lower is better")
    add("--caption_column", default="caption", help="caption, or a list of which training takes one at random")
    add("--caption_template", help='instead of a column: text with columns in braces, "{objects}, {style}"')
    add = parser.add_argument_group("which pairs are kept").add_argument
    add("--tie_policy", choices=["drop", "soft"], default="drop",
        help="leave ties out, or keep them with the label 0.5; train with the same option")
    add("--min_score_margin", type=number(float, least=0), default=0.0,
        help="pairs with scores closer than this are ties; higher keeps fewer, clearer pairs")
    add("--pairs_per_group", choices=["best_worst", "all", "adjacent"], default="best_worst",
        help="which pairs to make of a group of images, ranked by score")
    add("--strength_scale", type=number(float, above=0),
        help="write strengths 2 sigmoid(scale * difference of scores) - 1; higher makes close pairs count more")
    add("--min_image_size", type=count, default=1, help="leave out pairs with an image whose shorter side is below")
    add("--max_bad_fraction", type=share, default=0.1, help="stop if a larger share of the rows is unusable")
    add("--max_pairs", type=count, help="write at most N pairs")
    add = parser.add_argument_group("what is written").add_argument
    add("--output_dir", type=path, required=True, help="folder for the parquet files")
    add("--max_side", type=count,
        help="shrink images whose longer side has more pixels; take twice the training resolution or more")
    add("--max_file_mb", type=number(float, above=0), default=500, help="size of a file; higher makes fewer files")
    add("--seed", type=number(int, least=0), default=0, help="of the random order of a pair's two images")
    # fmt: on
    args = parser.parse_args(protect_negative_numbers(sys.argv[1:] if argv is None else argv))
    check_args(args, parser)
    return args, parser.error


SHAPES = {  # of the data, with which an option goes
    "label_column": "labels", "label_map": "labels", "image_0_column": "labels, scores",
    "image_1_column": "labels, scores", "score_weights": "scores, groups", "min_score_margin": "scores, groups",
    "strength_scale": "scores, groups", "pairs_per_group": "groups", "tie_policy": "labels, scores, groups",
}  # fmt: skip


def check_args(args, parser):
    """Ends the program with one line if options contradict each other."""
    from pair_sources import PairColumns

    error = parser.error
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if (args.dataset_name is None) == (args.train_data_dir is None):
        error("give the data by either --dataset_name or --train_data_dir")
    if args.dataset_name and "://" in args.dataset_name:
        error(f"--dataset_name {args.dataset_name}: not an address; give user/name, as the Hub does above a data set")
    if problem := args.dataset_name and missing_folder(args.dataset_name):
        error(f"--dataset_name {args.dataset_name}: {problem}")
    if args.dataset_config_name and not args.dataset_name:
        error("--dataset_config_name goes with --dataset_name; of a local folder, name the configuration's subfolder")
    if args.image_root and not Path(args.image_root).is_dir():
        root = Path(args.image_root).absolute()
        error(f"--image_root {args.image_root}: {missing_folder(str(root)) or 'is not a folder'}")
    couples = [
        {"winner_column", "loser_column"},
        {"score_0_column", "score_1_column"},
        {"images_column", "scores_column"},
    ]
    chosen = [couple for couple in couples if couple & set(given)]
    for couple in chosen:
        if missing := sorted(couple - set(given)):
            error(f"--{(couple & set(given)).pop()} goes together with --{missing[0]}")
    if len(chosen) > 1:
        error(f"--{min(chosen[0])} and --{min(chosen[1])} exclude each other: they are two shapes of data")
    try:
        columns = PairColumns(args)
    except ValueError as problem:
        error(f"--caption_template {args.caption_template!r}: {problem}")
    for name in given:
        if columns.shape not in SHAPES.get(name, columns.shape):
            error(f"--{name} goes with data in the shape of {SHAPES[name]}, not of {columns.shape}")
    if len(set(columns.image_columns)) < len(columns.image_columns):
        error(f"{columns.columns[0][0]} and {columns.columns[1][0]} are both {columns.image_columns[0]}")
    if columns.shape == "scores" and len(args.score_0_column) != len(args.score_1_column):
        error(f"--score_0_column names {len(args.score_0_column)} columns, --score_1_column "
              f"{len(args.score_1_column)}; allowed: the same number")  # fmt: skip
    if args.score_weights and len(args.score_weights) != len(args.score_0_column or args.scores_column):
        error(f"--score_weights has {len(args.score_weights)} numbers; allowed: one for each column of scores")
    for label, meaning in args.label_map or ():
        if columns.meanings[label] != meaning:
            error(f"--label_map gives {label!r} two meanings, {meaning:g} and {columns.meanings[label]:g}")
    if args.caption_template is not None:
        if "caption_column" in given:
            error("--caption_column and --caption_template exclude each other")
        names = [field for field in columns.template if field[1] is not None]
        if not names or any(column == "" or form or conversion for _, column, form, conversion in names):
            error(f"--caption_template is {args.caption_template!r}; allowed: text with columns in braces")
    if args.max_side and args.max_side < args.min_image_size:
        error(f"--max_side is {args.max_side}; allowed: at least --min_image_size, {args.min_image_size}")
    if args.train_data_dir and Path(args.output_dir).resolve().is_relative_to(Path(args.train_data_dir).resolve()):
        error(f"--output_dir {args.output_dir}: lies in --train_data_dir, whose files it would then be among")
    check_output_dir(args.output_dir, error)


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

from pair_sources import PairColumns, content_of, is_outside, open_rows, read_image, to_readable, value_at
from tqdm import tqdm

from training_utils import BadRow

MAX_CLUSTER = 100  # unusable rows, which often stand together, before their share ends the program early


class Report:
    """Counts rows, ties, and unusable rows by reason; names the first ten of these; stops if they are too many."""

    def __init__(self, max_bad_fraction):
        self.max_bad_fraction, self.num_rows, self.num_ties, self.num_bad = max_bad_fraction, 0, 0, 0
        self.reasons, self.first, self.last, self.num_outside = Counter(), None, None, 0

    def leave_out(self, row, problem):
        if row is self.last:  # several pairs of a row count once
            return
        self.num_bad, self.last, self.first = self.num_bad + 1, row, self.first or f"{row.name}: {problem}"
        self.reasons[str(problem).partition(": ")[0]] += 1
        if self.num_bad <= 10:
            with contextlib.suppress(OSError, AttributeError):  # a closed pipe, no console
                tqdm.write(printable(f"left out: {row.name}: {problem}"))
        self.check(MAX_CLUSTER if self.max_bad_fraction else 0)

    def check(self, tolerance=0):
        if self.num_bad > self.max_bad_fraction * self.num_rows + tolerance:
            raise ValueError(
                f"--max_bad_fraction is {self.max_bad_fraction:g}, but of the first {self.num_rows} rows "
                f"{self.num_bad} are unusable: {self.reasons_in_words()}"
            )

    def reasons_in_words(self):
        counts = ", ".join(f"{count} with {reason}" for reason, count in self.reasons.most_common())
        return f"{counts}; the first is {self.first}" if counts else "none is unusable"


def open_image(image, image_root, args, report):
    """Returns the bytes of an image file that training can read; raises BadRow if there are none."""
    if is_outside(image, image_root):
        if not args.allow_outside_images:
            place = one_line(content_of(image))
            raise BadRow(f"an image outside of the data's folder (--allow_outside_images): {place}")
        report.num_outside += 1
    data, (width, height) = to_readable(read_image(image, image_root), args.max_side)
    if min(width, height) < args.min_image_size:
        raise BadRow(f"image below --min_image_size: {width} x {height} pixels")
    return data


def pairs_of(row, args, columns, report):
    """Yields (choice, captions, winner, loser) for the usable pairs of a row, images as the bytes of files."""
    try:
        captions = columns.captions(row.values, row.caption_files)
        choices, images = columns.choices(row.values), columns.images(row.values)
    except BadRow as problem:
        report.leave_out(row, problem)
        return
    report.num_ties += sum(choice.is_tie for choice in choices)
    opened = {}  # by place: an image may be in several pairs
    for choice in choices:
        if choice.is_tie and args.tie_policy == "drop":
            continue
        for place in (choice.winner, choice.loser):
            if place not in opened:
                try:
                    opened[place] = open_image(images[place], row.image_root, args, report)
                except BadRow as problem:
                    report.leave_out(row, problem)
                    opened[place] = None
        winner, loser = opened[choice.winner], opened[choice.loser]
        if winner is not None and winner == loser:
            report.leave_out(row, "both images are the same")
        elif winner is not None and loser is not None:
            yield choice, captions, winner, loser


def convert(args, columns, rows, report):
    """Writes the pairs of the rows and returns their number; raises ValueError if none is left or too many are bad."""
    has_captions = not args.caption_template and any(
        isinstance(value_at(row.values, args.caption_column), list) for row in rows.head
    )
    has_strength, scale = args.strength_scale is not None, args.strength_scale or 0
    writer = PairWriter(args.output_dir, args.seed, has_captions, has_strength, args.max_file_mb * 1e6)
    with writer:
        for row in tqdm(rows.rows, unit=" rows", disable=None):
            report.num_rows += 1
            for choice, captions, winner, loser in pairs_of(row, args, columns, report):
                if len(captions) > 1 and not has_captions:
                    report.leave_out(row, "a list of captions, where the first rows have text")
                    continue
                strength = 1.0 if choice.is_tie else math.tanh(scale * choice.margin / 2)
                captions = captions if has_captions else captions[0]
                writer.add(winner, loser, captions, choice.is_tie, strength if has_strength else None)
                if writer.num_pairs == args.max_pairs:
                    break
            if writer.num_pairs == args.max_pairs:
                break
        report.check()
        if writer.num_pairs == 0:
            counts = f"{report.num_rows} rows: {report.num_ties} ties; {report.reasons_in_words()}"
            raise ValueError(f"no pair is left of {counts}")
    return writer.num_pairs


def main(argv=None):
    """What choose_pairs.py calls."""
    run(*parse_args(argv))


def run(args, error):
    warnings.filterwarnings("ignore", module="PIL")  # whose remarks on damaged images are not ours
    report, columns = Report(args.max_bad_fraction), PairColumns(args)
    try:
        rows = open_rows(args, columns)
        columns.check(rows)
        num_pairs = convert(args, columns, rows, report)
    except ValueError as problem:
        error(printable(str(problem)))
    except OSError as problem:  # what is read is a ValueError
        error(f"--output_dir {args.output_dir}: {one_line(problem)}")
    files = sorted(Path(args.output_dir).glob("*.parquet"))
    more = f" and {len(rows.sources) - 1} more" if len(rows.sources) > 1 else ""
    print(f"read from        {printable(rows.sources[0])}{more}")
    print(f"rows read        {report.num_rows}")
    ties = "ties among them" if args.tie_policy == "soft" else "ties left out"
    print(f"pairs written    {num_pairs}, {ties}: {report.num_ties}")
    print(f"rows left out    {report.num_bad}")
    for reason, count in report.reasons.most_common():
        print(f"    {count:<12} {printable(reason)}")
    if report.num_outside:
        print(f"images outside   {report.num_outside} from addresses or outside of the data's folder")
    print(f"files            {len(files)} in {args.output_dir}, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB")
    folder, ties = shlex.quote(str(args.output_dir)), " --tie_policy soft" if args.tie_policy == "soft" else ""
    print(f"train on them    accelerate launch train_inversion_dpo.py --config examples/configs/sd15_24gb.yaml "
          f"--train_data_dir {folder}{ties} --output_dir my-taste")  # fmt: skip


if __name__ == "__main__":
    run(*args_and_error)

"""Turn preference pairs of any shape and storage into the parquet files that the training scripts read by default.

    python examples/convert_pairs.py --train_data_dir folders --winner_column chosen --loser_column rejected \
        --output_dir pairs
    accelerate launch train_inversion_dpo.py --train_data_dir pairs ...

Takes the data options of the training scripts, and makes of the same rows the same pairs. Writes
`<output_dir>/train-<i>-of-<n>.parquet` with the columns

    jpg_0, jpg_1      image files as bytes, as they were stored
    label_0           1 if image 0 won, 0 if image 1 won, 0.5 for a tie (with --tie_policy soft)
    caption           text, or a list of texts where the data have lists
    score_0, score_1  where the data have scores: sums by --score_weights; --score_0_column score_0
                      --score_1_column score_1 trains on them

Which image comes first is drawn by --seed, for every pair, whatever the order was: columns then do not tell who won.
Every image is decoded once to see that it can be. Rows that cannot be used are left out and counted, the first ten
are named.
"""

import argparse
import io
import itertools
import sys
from functools import partial
from pathlib import Path

from pair_files import PairWriter, check_output_dir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from inversion_utils import (
    BadRow,
    PreferenceDataset,
    RowLog,
    add_data_options,
    check_data_options,
    count_by_reason,
    exceeds,
    list_reasons,
    load_pairs,
    number,
    value_at,
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s (--train_data_dir D | --dataset_name N) --output_dir O [options, see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_data_options(add)
    add("--cache_dir", help="where the Hub's files go")
    add("--output_dir", required=True, help="folder for the parquet files")
    add("--max_file_mb", type=number(float, above=0), default=500, help="size of a file; higher makes fewer files")
    add("--seed", type=number(int, least=0), default=0, help="of the draws which image of a pair comes first")
    args = parser.parse_args(argv)
    check_data_options(args, parser.error)
    output_dir, data = Path(args.output_dir).resolve(), Path(args.train_data_dir or "")
    if args.train_data_dir and data.is_dir() and output_dir.is_relative_to(data.resolve()):
        parser.error(f"--output_dir {args.output_dir}: lies in --train_data_dir, whose files it would then be among")
    return args, parser.error


def to_bytes(image, decoded):
    """Returns an image as the bytes of a file: as they are, or PNG of what was never a file."""
    if isinstance(image, bytes):
        return image
    file = io.BytesIO()
    decoded.save(file, "PNG")
    return file.getvalue()


def convert(pairs, open_pair, log, new_writer, max_bad_fraction):
    """Writes the pairs of a `StreamedPairs` and returns how many.

    Args:
        open_pair: returns the `Pair` of an item, and its decoded images.
        log: a `RowLog` of what cannot be used.
        new_writer: returns a `PairWriter`, told whether there are scores, and whether captions are lists.

    Raises:
        ValueError: if no pair is left, or too many rows cannot be used.
    """
    columns, items = pairs.columns, pairs.in_order()
    first = next(items)
    has_scores = columns.shape in ("scores", "groups")
    has_captions = not columns.caption_template and isinstance(value_at(first.row, columns.caption_column), list)

    def check_bad_rows(is_too_many):
        if is_too_many:
            raise ValueError(
                f"--max_bad_fraction is {max_bad_fraction:g}, but of the first {pairs.seen.num_rows} rows "
                f"{len(log.reasons)} cannot be used: {list_reasons(log.reasons.values())}"
            )

    with new_writer(has_scores=has_scores, has_captions=has_captions) as writer:
        for item in itertools.chain([first], items):
            log.add(item.bad_rows)
            try:
                pair, images = open_pair(item)
                scores = None
                if has_scores:
                    scores = columns.scores(item.row)
                    scores = scores[item.choice.winner], scores[item.choice.loser]
                winner, loser = map(to_bytes, pair[:2], images)
                writer.add(winner, loser, pair.captions if has_captions else pair.captions[0], pair.is_tie, scores)
            except BadRow as problem:
                log.add([(pairs.row_name(item), str(problem))])
            check_bad_rows(exceeds(len(log.reasons), max_bad_fraction, pairs.seen.num_rows))
        log.add(pairs.seen.bad_rows)
        check_bad_rows(len(log.reasons) > max_bad_fraction * pairs.seen.num_rows)
        if writer.num_pairs == 0:
            raise ValueError(f"no pair is left of {pairs.seen.num_rows} rows: no image of a pair can be used")
    return writer.num_pairs


def main(argv=None):
    args, error = parse_args(argv)
    check_output_dir(args.output_dir, error)
    log = RowLog(print, "is left out", {})
    try:
        pairs = load_pairs(args, in_order=True)
        dataset = PreferenceDataset(pairs, 64, 1, 0, False, False, 0.0, args.min_image_size)
        new_writer = partial(PairWriter, args.output_dir, args.seed, max_file_bytes=args.max_file_mb * 1e6)
        num_pairs = convert(pairs, dataset.open, log, new_writer, args.max_bad_fraction)
    except ValueError as problem:
        error(str(problem))
    files = sorted(Path(args.output_dir).glob("*.parquet"))
    ties = "ties among them" if args.tie_policy == "soft" else "ties left out"
    print(f"rows read        {pairs.seen.num_rows}")
    print(f"pairs written    {num_pairs}, {ties}: {pairs.seen.num_ties}")
    print(f"rows left out    {len(log.reasons)}")
    for reason, count in count_by_reason(log.reasons.values()).most_common():
        print(f"    {count:<12} {reason}")
    print(f"files            {len(files)} in {args.output_dir}, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

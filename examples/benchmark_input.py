"""Measure how fast pairs are read, decoded, cropped and tokenized, as the training scripts do it, without training.

    python examples/benchmark_input.py --resolution 512 --num_workers 0 2
    python examples/benchmark_input.py --train_data_dir my-pairs --resolution 1024 --random_crop

Writes pairs of pictures as JPEG files of a given size into parquet, or reads yours, and lets the loader deliver
batches as fast as it can. Prints pairs a second for each number of workers, and what a pair costs one core. All
options but those in --help are those of train_inversion_dpo.py: data, resolution, cropping, batch size.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import number, printable


def parse_args(argv=None):
    """Returns this program's options, and the rest."""
    path = os.path.expanduser
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add, count, natural = parser.add_argument, number(int, least=1), number(int, least=0)
    add("--image_size", type=count, default=768, help="pixels of a side of the pictures that are written")
    add("--num_workers", type=natural, nargs="+", default=[0, 2], help="numbers of the loader's processes to compare")
    add("--num_pairs", type=count, default=200, help="pairs to deliver; more are steadier")
    add("--output", type=path, help="also write the figures to this file, as JSON")
    return parser.parse_known_args(argv)


if __name__ == "__main__":  # before the imports that take seconds
    args_and_rest = parse_args()

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from train_small_world import make_tokenizer

import train_inversion_dpo
from training_utils import PreferenceDataset, collate, decode_image, load_pairs, resize_and_crop, visit_batches


def write_pairs(folder, image_size, num_pairs=32):
    """Writes pairs of pictures with the detail of photographs, smooth regions and noise, as JPEG of quality 90."""
    rng = np.random.default_rng(0)

    def picture():
        smooth = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        pixels = np.asarray(smooth.resize((image_size, image_size), Image.Resampling.BICUBIC), dtype=float)
        pixels = pixels + rng.normal(0, 6, pixels.shape)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        return file.getvalue()

    rows = [
        {"jpg_0": picture(), "jpg_1": picture(), "label_0": float(i % 2), "caption": "a red circle"}
        for i in range(num_pairs)
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(Path(folder) / "train.parquet")


def pairs_a_second(dataset, batch_size, num_workers, num_pairs):
    """Returns pairs a second once the loader runs, its start not counted."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=visit_batches(len(dataset.pairs), batch_size, 0),
        collate_fn=partial(collate, tokenizers=[make_tokenizer()]),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    batches = iter(loader)
    for _ in range(2 * num_workers + 1):  # what was made while the workers started
        next(batches)
    start, num_batches = time.perf_counter(), -(-num_pairs // batch_size)
    for _ in range(num_batches):
        next(batches)
    return num_batches * batch_size / (time.perf_counter() - start)


def cost_of_a_pair(dataset, count=20):
    """Returns milliseconds of processor time for each part of a pair."""
    batch, parts = next(visit_batches(len(dataset.pairs), count, 0)), {}

    def timed(name, function, values):
        start = time.process_time()
        results = [function(value) for value in values]
        parts[name] = (time.process_time() - start) / count * 1e3
        return results

    pairs = timed("read", dataset.pairs.__getitem__, [place for _, place in batch])
    files = [image for pair in pairs for image in (pair.winner, pair.loser)]
    images = timed("decode", lambda data: decode_image(data, 2 * dataset.resolution), files)
    timed("resize and crop", lambda image: resize_and_crop(image, dataset.resolution, (0.5, 0.5), False), images)
    return parts


def main(args, training_options):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not {"--dataset_name", "--train_data_dir"} & {option.split("=")[0] for option in training_options}:
            write_pairs(folder, args.image_size)
            training_options += ["--train_data_dir", folder]
        unused = ["--pretrained_model_name_or_path", "unused", "--output_dir", "unused"]
        train_args, error = train_inversion_dpo.parse_args([*unused, *training_options])
        try:
            pairs = load_pairs(train_args)
        except ValueError as problem:
            error(printable(str(problem)))
        dataset = PreferenceDataset(
            pairs, train_args.resolution, 1, 0, train_args.random_crop, train_args.random_flip
        )  # fmt: skip
        batch_size = train_args.train_batch_size
        figures = {
            "pairs a second": {
                f"{workers} workers": pairs_a_second(dataset, batch_size, workers, args.num_pairs)
                for workers in args.num_workers
            },
            "milliseconds a pair, one core": cost_of_a_pair(dataset),
        }
    for title, values in figures.items():
        print(title)
        for name, value in values.items():
            print(f"  {name:<16} {value:8.1f}")
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*args_and_rest)

"""Measure how fast pairs are read, decoded, cropped and tokenized, as the training scripts do it, without training.

    python examples/benchmark_input.py --resolution 512 --dataloader_num_workers 2

Writes pairs of pictures as JPEG files of a given size into parquet, or reads yours with the data options of the
training scripts, and lets the loader deliver batches as fast as it can. Prints pairs a second for each number of
workers, and what a pair costs one core.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from train_small_world import make_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from inversion_utils import (  # noqa: E402
    PreferenceDataset,
    add_data_options,
    check_data_options,
    decode_image,
    load_pairs,
    number,
    resize_and_crop,
)
from train_inversion_dpo import collate  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    count, natural = number(int, least=1), number(int, least=0)
    add_data_options(parser.add_argument)
    add = parser.add_argument
    add("--cache_dir", help="where downloads are kept")
    add("--image_size", type=count, default=768, help="pixels of a side of the pictures that are written")
    add("--resolution", type=count, default=512, help="pixels of a side that training takes")
    add("--train_batch_size", type=count, default=4, help="pairs a batch")
    add("--dataloader_num_workers", type=natural, nargs="+", default=[0, 2], help="numbers of workers to compare")
    add("--num_pairs", type=count, default=200, help="pairs to deliver; more are steadier")
    add("--output", help="also write the figures to this file, as JSON")
    args = parser.parse_args(argv)
    if args.dataset_name or args.train_data_dir:
        check_data_options(args, parser.error)
    return args, parser.error


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
    Dataset.from_list(rows).to_parquet(Path(folder) / "train.parquet")


def pairs_a_second(dataset, args, num_workers):
    """Returns pairs a second once the loader runs, its start not counted."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=dataset.pairs.batches(args.train_batch_size, 0),
        collate_fn=partial(collate, tokenizers=[make_tokenizer()], model_index={}),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    batches = iter(loader)
    for _ in range(2 * num_workers + 1):  # what was made while the workers started
        next(batches)
    start = time.perf_counter()
    num_batches = -(-args.num_pairs // args.train_batch_size)
    for _ in range(num_batches):
        next(batches)
    return num_batches * args.train_batch_size / (time.perf_counter() - start)


def cost_of_a_pair(dataset, count=20):
    """Returns milliseconds of one core for each part of a pair."""
    items, parts = dataset.pairs.sample(count, 0), {}

    def timed(name, function, values):
        start = time.perf_counter()
        results = [function(value) for value in values]
        parts[name] = (time.perf_counter() - start) / len(items) * 1e3
        return results

    pairs = timed("read", dataset.pairs.__getitem__, items)
    images = timed("decode", decode_image, [image for pair in pairs for image in pair[:2]])
    timed("resize and crop", lambda image: resize_and_crop(image, dataset.resolution, (0.5, 0.5), False), images)
    return parts


def main(argv=None):
    args, error = parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not (args.dataset_name or args.train_data_dir):
            write_pairs(folder, args.image_size)
            args.train_data_dir = folder
        try:
            pairs = load_pairs(args)
        except ValueError as problem:
            error(str(problem))
        dataset = PreferenceDataset(pairs, args.resolution, 1, 0, True, True, 0.0)
        figures = {
            "pairs a second": {
                f"{workers} workers": pairs_a_second(dataset, args, workers) for workers in args.dataloader_num_workers
            },
            "milliseconds a pair, one core": cost_of_a_pair(dataset),
        }
    for title, values in figures.items():
        print(title)
        for name, value in values.items():
            print(f"  {name:<16} {value:8.1f}")
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Preference training of a diffusion model's LoRA: the run, as the training scripts share it.

    1  options       how they are read: in `training_options.py`, which needs no torch
    2  pairs         preference pairs: a better and a worse image for one caption, and how a visit draws from them
    3  targets       a cache of what training does not change, and pairs that are kept out to watch the policy on
    4  LoRA          how it is added, written and read
    5  the run       checkpoints, metrics, signals, and what the loop calls
    6  results       validation pictures, model card, Hub

The method is in `inversion_utils.py`, which knows none of this.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import html
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, ModelCardData, constants, errors, hf_hub_download
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from inversion_utils import IMAGE_AXIS, Targets, preference_loss, to_device
from training_options import LORA_TARGETS, inversion_steps, missing_folder, one_line, printable, timesteps_per_pair

# 2  Pairs

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # PIL's others are rare or run programs (EPS)
MAX_IMAGE_BYTES = 2**28  # of a file
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_IMAGE_BYTES  # text and profiles, never looked at
CONVERTER = "examples/convert_pairs.py converts other data"


class BadRow(Exception):
    """A data row that cannot become a training example. The message is "reason" or "reason: details"."""


class Pair(NamedTuple):
    """Two images of one caption, the better one first."""

    winner: bytes  # of an image file, as is the loser
    loser: bytes
    captions: list[str]  # one or more, of which a visit takes one at random
    strength: float  # how certain the preference is, in [0, 1], see `preference_loss`
    is_tie: bool  # neither image is better, and the winner is image 0


def load_pairs(args: argparse.Namespace) -> "PreferencePairs":
    """Returns the pairs that the data options name; raises ValueError, naming the option, if there are none."""
    from datasets import load_dataset

    stage("Reading pairs")
    split, data, cache = args.dataset_split_name, args.train_data_dir or args.dataset_name, args.cache_dir
    source = f"--dataset_name {data}" if args.dataset_name else f"--train_data_dir {data}"
    if problem := missing_folder(data) or (args.train_data_dir and not Path(data).is_dir() and "it is not a folder"):
        raise ValueError(f"{source}: {missing_folder(data, was_asked_for=True) or problem}")
    if args.dataset_name:
        find_model("--dataset_name", data, repo_type="dataset", cache_dir=args.cache_dir)
    try:
        if (Path(data) / "state.json").exists() or (Path(data) / "dataset_dict.json").exists():
            rows = load_saved(data, split)
        else:
            load = functools.partial(load_dataset, data, args.dataset_config_name, split=split, cache_dir=cache)
            try:
                rows = load()
            except Exception as error:
                if "BatchSize" not in f"{error}{error.__cause__}":
                    raise
                rows = load(batch_size=1000)  # which a first shard of no rows would make 0
        if not hasattr(rows, "num_rows"):
            raise ValueError("it is not a single split")
    except Exception as error:  # `datasets` raises a dozen kinds, its own and those of pyarrow, fsspec and the Hub
        reason = one_line(error) + (f" ({one_line(error.__cause__)})" if error.__cause__ else "")
        if "No space left" in reason:
            source = f"the cache of `datasets` ({cache or 'HF_HOME'}, see --cache_dir) is on a full disk: {source}"
        raise ValueError(f"{source}, split {split!r}, cannot be loaded: {reason}") from error
    names = ("winner", "loser") if args.winner_column else ("image_0", "image_1", "label")
    names += ("caption", "strength") if args.strength_column else ("caption",)
    columns, folder = {name: getattr(args, f"{name}_column") for name in names}, Path(data)
    folder = folder if folder.is_dir() else None
    return PreferencePairs(rows.with_format(None), columns, args.tie_policy, args.max_train_samples, folder)


def load_saved(folder: str, split: str):
    """Returns the rows that `save_to_disk` wrote, of a split or a slice of one, as `load_dataset` names it."""
    from datasets import Dataset, ReadInstruction, concatenate_datasets, load_from_disk

    saved = load_from_disk(folder)
    splits = {str(saved.split or "train"): saved} if isinstance(saved, Dataset) else saved
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


class PreferencePairs:
    """Preference pairs in the rows of a `datasets.Dataset`: `self[place]` is a `Pair` or raises `BadRow`.

    Labels and strengths are read at once, images and captions when a pair is.

    Args:
        columns: by what they hold: "image_0", "image_1" and "label" (1: image 0 is better, 0: image 1 is, 0.5:
            neither), or "winner" and "loser"; "caption"; and, optionally, "strength".
        tie_policy: "drop" leaves ties out, "soft" keeps them.
        max_pairs: keep the first so many pairs; all if None.
        folder: where image files that the rows name must lie; anywhere if None.

    Raises ValueError if a column is missing or holds something else, or no pair is left.
    """

    def __init__(self, rows, columns, tie_policy="drop", max_pairs=None, folder=None):
        for name, column in columns.items():
            if column not in rows.column_names:
                found = ", ".join(rows.column_names)
                raise ValueError(f"--{name}_column {column}: the data have no such column, only {found}. {CONVERTER}")
            _check_column(name, column, rows.features[column])
        self.columns, self.folder, self.fingerprint, self.what = columns, folder, rows._fingerprint, "rows"
        self.images = [columns[name] for name in columns if name not in ("label", "caption", "strength")]
        self.labels = self._numbers(rows, "label", lambda x: np.isin(x, (0, 0.5, 1)))
        self.strengths = self._numbers(rows, "strength", lambda x: (x >= 0) & (x <= 1))
        self.num_rows, self.num_ties = len(rows), int((self.labels == 0.5).sum())
        is_usable = ~np.isnan(self.labels + self.strengths)
        self.num_unusable = int((~is_usable).sum())
        self.kept = np.flatnonzero(is_usable & ((tie_policy == "soft") | (self.labels != 0.5)))[:max_pairs]
        if len(self.kept) == 0:
            reasons = f"{self.num_ties} ties, {self.num_unusable} without a label 0, 0.5 or 1 or a strength in 0..1"
            raise ValueError(f"no pair is left of {self.num_rows} rows: {reasons}. {CONVERTER}")
        self.rows = rows.select_columns([*self.images, columns["caption"]])
        for image in self.images:
            if hasattr(rows.features[image], "decode_example"):
                self.rows = self.rows.cast_column(image, type(rows.features[image])(decode=False))

    def hold_out(self, count: int) -> "PreferencePairs":
        """Takes `count` pairs out, the same for every seed of a run, and returns them; ValueError if none is left."""
        if count >= len(self):
            raise ValueError(f"--num_eval_pairs {count}: allowed: fewer than the {len(self)} pairs of the data")
        held_out, chosen = copy.copy(self), np.random.default_rng(0).permutation(len(self))[:count]
        held_out.kept, self.kept = self.kept[np.sort(chosen)], np.delete(self.kept, chosen)
        held_out.what = "held-out rows"
        return held_out

    def _numbers(self, rows, name: str, is_allowed: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Returns the numbers in an optional column, NaN where they are missing or not allowed; 1 without a column."""
        if name not in self.columns:
            return np.ones(len(rows))
        column = self.columns[name]
        values = rows.select_columns([column]).with_format("arrow")[:][column].cast("float64").to_numpy()
        return np.where(is_allowed(values), values, np.nan)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, place: int) -> Pair:
        index = int(self.kept[place])
        try:
            row = self.rows[index]
        except ValueError as error:  # text that is not UTF-8
            raise BadRow(f"unreadable row: {one_line(error)}") from error
        images = [self._image(row[image]) for image in self.images]
        captions = row[self.columns["caption"]]
        captions = [text for text in (captions if isinstance(captions, list) else [captions]) if text and text.strip()]
        if not captions:
            raise BadRow("no caption")
        winner, loser = images if self.labels[index] > 0 else images[::-1]
        return Pair(winner, loser, captions, float(self.strengths[index]), bool(self.labels[index] == 0.5))

    def _image(self, value: bytes | dict[str, Any] | None) -> bytes:
        """Returns the bytes that a row holds, or those of the file that it names."""
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        try:
            if data is None and path is not None:
                path = os.path.join(self.folder or "", path)
                if self.folder and not is_within(path, self.folder):
                    raise BadRow(f"image outside the data's folder: {path}")
                if Path(path).is_file() and Path(path).stat().st_size > MAX_IMAGE_BYTES:
                    raise BadRow(f"image larger than {MAX_IMAGE_BYTES} bytes: {path}")
                data = Path(path).read_bytes() if Path(path).is_file() else None  # a device or a pipe may never end
        except (OSError, ValueError, RuntimeError) as error:  # no permission, not a file's name, a loop of links
            raise BadRow(f"unreadable image: {one_line(error)}") from error
        if not data:
            raise BadRow(f"no image: {path} is not a file" if path else "no image")
        return data

    def row_name(self, place: int) -> str:
        """Returns the name of a pair's row in messages; rows are counted from 0."""
        return f"row {self.kept[place]}"


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, as it is written, lies in a folder or in what that is a link to; `datasets` follows the link."""
    path = Path(os.path.abspath(path))
    return path.is_relative_to(os.path.abspath(folder)) or path.is_relative_to(os.path.realpath(folder))


def _check_column(name: str, column: str, feature: Any) -> None:
    """Raises ValueError if a column's type is not what the pairs need."""
    if name == "caption" and hasattr(feature, "feature"):  # a list
        feature = feature.feature
    kind = "numbered names" if hasattr(feature, "names") else str(getattr(feature, "dtype", type(feature).__name__))
    if name == "caption":
        needed, fits = "text, or lists of text", kind in ("string", "large_string")
    elif name in ("label", "strength"):  # not a ClassLabel, which numbers names in an order of its own
        needed, fits = "numbers", kind.startswith(("float", "int", "uint", "bool", "decimal"))
    else:
        is_file = isinstance(feature, dict) and feature.keys() <= {"bytes", "path"}
        needed, fits = "encoded images", is_file or kind in ("binary", "large_binary", "PIL.Image.Image")
    if not fits:
        raise ValueError(f"--{name}_column {column}: the column holds {kind}; needed: {needed}. {CONVERTER}")


def check_tokenizer(tokenizer) -> None:
    """Raises ValueError if a tokenizer has no length, or no vocabulary, so that all captions are alike."""
    if tokenizer.model_max_length > 10_000:
        raise ValueError("it has no model_max_length; is its folder complete?")
    one, other = tokenizer(["a red circle", "a blue square"], padding="max_length", truncation=True).input_ids
    if one == other:
        raise ValueError("it gives different captions the same ids; its vocabulary is missing")


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """Returns an upright sRGB image: EXIF orientation is applied, transparency becomes white, the first frame counts.

    `image.info["original_size"]` is its (height, width). A JPEG may come at a half, a quarter or an eighth of that as
    long as no side has fewer pixels than `min_side`: decoding it so takes much less time. Raises BadRow if the bytes
    are no image that can be read, or one of more than 8 bits.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        size = image.size[::-1]
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are not 8-bit numbers (mode {image.mode})")
        image.load()
        with contextlib.suppress(Exception):  # broken EXIF is no reason to do without the pixels
            if image.format != "TIFF" and image.getexif().get(0x0112, 1) > 4:  # it lies on its side; PIL turns a TIFF
                size = size[::-1]
            image = ImageOps.exif_transpose(image)
        has_profile, image = "icc_profile" in image.info, to_srgb(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as error:  # PIL raises nearly every kind on damaged files
        message = re.sub(r" <_io.BytesIO[^>]*>", "", one_line(error))
        raise BadRow(f"unreadable image: {message}") from error
    image.info = {"original_size": size, "has_profile": has_profile}
    return image


def to_srgb(image: Image.Image) -> Image.Image:
    """Returns an image in sRGB, by its colour profile, as browsers show it; as it is if there is none that works."""
    with contextlib.suppress(Exception):  # PIL's own error and others, of profiles and of modes that do not fit them
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        if "sRGB" not in ImageCms.getProfileDescription(profile):
            alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
            plain = {"LA": "L", "PA": "RGB", "P": "RGB", "RGBA": "RGB"}.get(image.mode, image.mode)
            plain = ImageCms.profileToProfile(
                image.convert(plain), profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            plain.info.pop("transparency", None)  # a colour of before
            if alpha:
                plain.putalpha(alpha)
            return plain
    return image


def resize_and_crop(
    image: Image.Image, resolution: int, crop: tuple[float, float], flip: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a square window of an image of `decode_image`, whose shorter side becomes `resolution`.

    `crop` (top, left) in [0, 1] places the window in what is left over, relatively, so that two images of other shapes
    are cut alike: 0.5 is the centre. The image is mirrored before it is cut, so top and left belong to what is seen.

    Returns:
        pixels: (3, resolution, resolution) in [-1, 1].
        time_ids: (6,), as SDXL is told (arXiv 2307.01952, section 2.2): height and width of the original image, top
            and left of the window in pixels of the resized image, height and width of the window.
    """
    image, original_size = ImageOps.mirror(image) if flip else image, image.info["original_size"]
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    top, left = round(crop[0] * (height - resolution)), round(crop[1] * (width - resolution))
    x, y = image.width / width, image.height / height
    window = (left * x, top * y, (left + resolution) * x, (top + resolution) * y)  # what is cut off is never resized
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=window, reducing_gap=3.0)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    time_ids = torch.tensor([*original_size, top, left, resolution, resolution], dtype=torch.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels)), time_ids


LONGEST_CAPTION = 4000  # characters, many more than the 77 tokens that are read of a caption


class PreferenceDataset(torch.utils.data.Dataset):
    """Training examples by (key, place): the pair at a place, and all random draws of a visit to it.

    The key alone seeds the draws: (0, visit), where `visit` is the running number of a pair over the whole run, or
    (3, place, draw) for one of the draws that a cache keeps, see `TargetCache`. So they are the same for any number of
    processes, any accumulation and after any restart. An unusable row is replaced by the next. `self[key, place]` has

        key, row: the key, and the name of the row;
        pixel_values, time_ids: (2, 3, resolution, resolution) and (2, 6), winner and loser, see `resize_and_crop`;
        caption: text, empty for a share `empty_prompts` of the visits;
        uniforms: (M,) float64 in [0, 1), from which `sample_timesteps` makes the training timesteps;
        strength, is_tie: see `Pair`;
        skipped: list of (row, reason), the unusable rows; a RuntimeError after a hundred in a row.
    """

    def __init__(self, pairs, resolution, num_targets, seed, random_crop=False, random_flip=False, empty_prompts=0.0):
        self.pairs, self.resolution, self.num_targets, self.seed = pairs, resolution, num_targets, seed
        self.random_crop, self.random_flip, self.empty_prompts = random_crop, random_flip, empty_prompts

    def __getitem__(self, key_and_place: tuple[tuple[int, ...], int]) -> dict[str, Any]:
        key, place = key_and_place
        rng = np.random.default_rng([self.seed, *key])
        top, left, flip, empty, *uniforms = rng.random(4 + self.num_targets)
        crop, flip = (top, left) if self.random_crop else (0.5, 0.5), self.random_flip and flip < 0.5
        skipped, images = [], None
        while images is None:
            try:
                pair = self.pairs[place]
                images = [decode_image(image, 2 * self.resolution) for image in (pair.winner, pair.loser)]
            except BadRow as problem:
                skipped.append((self.pairs.row_name(place), str(problem)))
                if len(skipped) == min(100, len(self.pairs)):
                    row, reason = skipped[0]
                    what = f"none of {len(skipped)} {self.pairs.what} in a row can be used"
                    raise RuntimeError(f"{what}; {row}: {reason}") from None
                place = (place + 1) % len(self.pairs)
        pixels, time_ids = zip(*(resize_and_crop(x, self.resolution, crop, flip) for x in images), strict=True)
        is_empty = empty < self.empty_prompts
        return {
            "key": key,
            "row": self.pairs.row_name(place),
            "pixel_values": torch.stack(pixels),
            "time_ids": torch.stack(time_ids),
            "caption": "" if is_empty else pair.captions[int(rng.integers(len(pair.captions)))][:LONGEST_CAPTION],
            "uniforms": torch.tensor(uniforms, dtype=torch.float64),
            "strength": pair.strength,
            "is_tie": pair.is_tie,
            "skipped": skipped,
        }


def collate(examples: list[dict[str, Any]], tokenizers: Sequence) -> dict[str, Any]:
    """Returns a batch of B examples: images (2B, ...), winners first; uniforms (M, B); a tokenizer's ids (B, L)."""
    captions = [example["caption"] for example in examples]
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return {
        "keys": [example["key"] for example in examples],
        "rows": [example["row"] for example in examples],
        "pixel_values": torch.stack([example["pixel_values"] for example in examples], dim=1).flatten(0, 1),
        "time_ids": torch.stack([example["time_ids"] for example in examples], dim=1).flatten(0, 1),
        "input_ids": [tokenizer(captions, **options).input_ids for tokenizer in tokenizers],
        "is_empty": torch.tensor([not caption for caption in captions]),
        "uniforms": torch.stack([example["uniforms"] for example in examples], dim=1),
        "strength": torch.tensor([example["strength"] for example in examples]),
        "is_tie": torch.tensor([example["is_tie"] for example in examples]),
        "skipped": [row for example in examples for row in example["skipped"]],
    }


def visit_batches(num_pairs, batch_size, seed, visit=0, process_index=0, num_processes=1, num_draws=None) -> Iterator:
    """Yields batches of (key, place) without end, for one process of several, from a visit on; a `batch_sampler`.

    The processes take turns, a batch each, so any division of a step's visits into processes and accumulation covers
    the same pairs, and a restart only has to name its first visit. `num_draws` is the number of draws per pair in a
    cache, of which each epoch takes the next; None without a cache.
    """
    epoch, order, first = None, None, visit + process_index * batch_size
    while True:
        batch = []
        for visit in range(first, first + batch_size):
            if visit // num_pairs != epoch:
                epoch = visit // num_pairs
                order = np.random.default_rng([seed, 2, epoch]).permutation(num_pairs)
            place = int(order[visit % num_pairs])
            batch.append(((0, visit) if num_draws is None else (3, place, epoch % num_draws), place))
        yield batch
        first += num_processes * batch_size


def forward_noise(keys: list[tuple[int, ...]], seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns normal noise (M, 2B, C, h, w), `shape` (M, C, h, w), by B visits' keys, for winner and loser alike."""
    # Random streams: 0, 3 and 5 draw for a visit, a cache and a held-out pair, each + 1 its noise; 2 orders an epoch.
    seeds = [int(np.random.default_rng([seed, key[0] + 1, *key[1:]]).integers(2**62)) for key in keys]
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds], dim=1)
    return torch.cat([noise, noise], dim=1)


def note_skipped(rows: Iterable[tuple[str, str]], skipped: dict[str, str], warn: Callable[[str], None]) -> None:
    """Adds (row, reason) to the rows skipped so far, and warns of the first ten."""
    for row, reason in rows:
        if row not in skipped and len(skipped) < 10:
            warn(printable(f"{row} is skipped: {reason}"))
        skipped.setdefault(row, reason)


# 3  Targets: the cache, and held-out pairs

NOT_FINITE = "its targets are not finite: the VAE overflows"
NUM_BANDS = 5  # of timesteps, in which held-out pairs are watched
WINNER_LIMIT = 0.02  # how far the error of held-out winners may lie above the reference's


class TargetCache(torch.utils.data.Dataset):
    """Targets on disk: `self[key, place]` reads those of one draw of the pair at a place.

    A pair has a few draws of crop, flip, empty caption, timesteps and forward noise, of which each epoch takes the
    next. The path is the index: `<folder>/draw-<draw>/<place>.safetensors`, a file that is there whole or not at all.
    So a run that was killed goes on where it stopped, and processes share the work. `cache_dir` holds a folder for
    each set of settings, which are all that determines the targets, and are written to its `settings.json`.
    """

    def __init__(self, cache_dir: str | Path, settings: dict[str, Any], row_name: Callable[[int], str]):
        text, self.row_name = json.dumps(settings, indent=2, sort_keys=True).encode(), row_name
        self.folder = Path(cache_dir) / checksum(text)[:16]
        if not (self.folder / "settings.json").exists():
            write_whole(self.folder / "settings.json", text)

    def path(self, place: int, draw: int) -> Path:
        return self.folder / f"draw-{draw}" / f"{place}.safetensors"

    def missing(self, draws: Iterable[tuple[int, int]], warn: Callable[[str], None]) -> list[tuple[int, int]]:
        """Returns those of the draws that have no file, or one that was cut short, which is named."""
        missing = []
        for place, draw in draws:
            try:
                with safe_open(self.path(place, draw), "pt"):
                    continue
            except SafetensorError as error:
                warn(f"{self.path(place, draw)} is damaged and is computed again: {one_line(error)}")
            except FileNotFoundError:
                pass
            missing.append((place, draw))
        return missing

    def save(self, keys: Sequence[tuple[int, ...]], targets: Targets) -> None:
        """Writes the targets of a batch, a file each; raises RuntimeError if the folder cannot be written."""
        values = {name: getattr(targets, name).cpu() for name in targets._fields if name != "cond"}
        cond = {f"cond.{name}": value.cpu() for name, value in targets.cond.items()}
        for i, (_, place, draw) in enumerate(keys):
            images = torch.tensor([i, len(keys) + i])
            tensors = {name: values[name].index_select(axis, images) for name, axis in IMAGE_AXIS.items()}
            for name, value in cond.items():  # a caption belongs to both images
                tensors[name] = value[images[:1] if torch.equal(value[i], value[len(keys) + i]) else images]
            tensors |= {name: values[name][i].clone() for name in ("strength", "is_tie", "usable")}
            try:
                write_whole(self.path(place, draw), save(tensors))
            except OSError as error:
                raise RuntimeError(f"--inversion_cache_dir: {self.folder} cannot be written: {one_line(error)}. Make "
                                   "room and repeat the command, which goes on from there") from None  # fmt: skip

    def __getitem__(self, key_and_place: tuple[tuple[int, ...], int]) -> dict[str, Any]:
        _, place, draw = key_and_place[0]
        return {**load_file(self.path(place, draw)), "row": self.row_name(place)}


def collate_targets(stored: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a batch with the `Targets` of B visits, from what `TargetCache` holds of them."""

    def join(name, axis):
        values = [torch.cat([tensors[name]] * (2 // tensors[name].shape[axis]), axis) for tensors in stored]
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)

    tensors = {name: join(name, axis) for name, axis in IMAGE_AXIS.items()}
    tensors["cond"] = {name.removeprefix("cond."): join(name, 0) for name in stored[0] if name.startswith("cond.")}
    tensors |= {name: torch.stack([x[name] for x in stored]) for name in ("strength", "is_tie", "usable")}
    tensors["usable"] = tensors["usable"].repeat(2)
    return {"targets": Targets(**tensors), "rows": [x["row"] for x in stored], "skipped": []}


def open_cache(args, accelerator, pairs, settings, first, last, warn) -> tuple:
    """Returns the cache, None without one, and the batches of (key, place) that this process has to find for it.

    What determines targets are `settings`, the data, and the options named here. What is missing is looked for among
    the visits from `first` to `last`, or among all draws of all pairs if they are to be precomputed. A batch that
    lacks a draw is found whole, so that the last bits of its targets do not depend on what has been found already.
    """
    from accelerate.utils import broadcast_object_list

    if not args.inversion_cache_dir:
        return None, []
    names = ["resolution", "random_crop", "random_flip", "proportion_empty_prompts", "tie_policy", "seed", "variant"]
    names += ["max_train_samples", "num_eval_pairs", "quantize_base", "timesteps_subset"]
    names += [name for name in vars(args) if name.endswith("_column")]
    settings |= {name: getattr(args, name) for name in names}
    settings["lora_init"] = settings["lora_init"] if args.reference == "init" else None
    settings |= {"data": [pairs.fingerprint, len(pairs)], "timesteps_per_pair": timesteps_per_pair(args)}
    settings["pixels"] = "sRGB"  # by their colour profiles
    settings["inversion_steps"] = None if args.objective == "diffusion_dpo" else inversion_steps(args)
    settings = broadcast_object_list([settings])[0]  # `datasets` may tell processes different fingerprints
    first, last = (0, len(pairs) * args.cached_draws) if args.precompute_only else (first, last)
    visits = visit_batches(len(pairs), 1, args.seed, first, num_draws=args.cached_draws)
    draws = list(dict.fromkeys(key[1:] for _, ((key, _),) in zip(range(first, last), visits, strict=False)))
    draws = draws[accelerator.process_index :: accelerator.num_processes]
    try:
        cache = TargetCache(args.inversion_cache_dir, settings, pairs.row_name)
        missing = set(cache.missing(draws, warn))
    except OSError as error:
        raise ValueError(f"--inversion_cache_dir {args.inversion_cache_dir}: {one_line(error)}") from error
    batches = [draws[i : i + args.train_batch_size] for i in range(0, len(draws), args.train_batch_size)]
    batches = [batch for batch in batches if not missing.isdisjoint(batch)]
    return cache, [[((3, place, draw), place) for place, draw in batch] for batch in batches]


def fill_cache(accelerator, cache, batches, load, find_targets, note, stop) -> bool:
    """Finds the targets that this process's share of the cache lacks; returns whether a signal came first."""
    is_hidden = not batches or not accelerator.is_local_main_process
    for batch in tqdm(load(batch_sampler=batches), total=len(batches), desc="Caching", disable=is_hidden):
        targets = find_targets(batch)
        cache.save(batch["keys"], targets)
        note(batch["skipped"] + not_finite(batch["rows"], targets.usable))
        if stop.received:
            break
    return bool(accelerator.reduce(torch.tensor(float(stop.received), device=accelerator.device)) > 0)


def not_finite(rows: Sequence[str], usable: torch.Tensor) -> list[tuple[str, str]]:
    """Returns (row, reason) of the B pairs that are not usable, see `Targets`; this waits for the device."""
    return [(row, NOT_FINITE) for row, is_finite in zip(rows, usable.tolist(), strict=False) if not is_finite]


def hold_out(args, accelerator, pairs, training_timesteps, load, find_targets, note) -> "HeldOut":
    """Returns the held-out pairs with their targets: this process's share, a timestep in the middle of each band."""
    from accelerate.utils import send_to_device

    last, num_bands = len(training_timesteps), min(NUM_BANDS, len(training_timesteps))
    places, size = range(len(pairs))[accelerator.process_index :: accelerator.num_processes], args.train_batch_size
    batches = [[((5, place, 0), place) for place in places[i : i + size]] for i in range(0, len(places), size)]
    loader = load(PreferenceDataset(pairs, args.resolution, num_bands, args.seed), batch_sampler=batches)
    targets, is_hidden = [], not accelerator.is_local_main_process
    for batch in tqdm(loader, "Held-out pairs", total=len(batches), disable=is_hidden):
        batch["uniforms"] = torch.full_like(batch["uniforms"], 0.5)
        found = find_targets(batch)
        # An unreadable row was replaced by the next, which is held out, too, and would be counted twice.
        is_own = [row == pairs.row_name(key[1]) for key, row in zip(batch["keys"], batch["rows"], strict=True)]
        note(batch["skipped"] + not_finite(batch["rows"], found.usable))
        usable = found.usable & torch.tensor(is_own * 2, device=accelerator.device)
        targets.append(send_to_device(found._replace(usable=usable), "cpu"))
    count = torch.tensor(float(sum(batch.usable.sum() for batch in targets)), device=accelerator.device)
    if not accelerator.reduce(count):
        raise RuntimeError(f"no held-out pair can be used: {NOT_FINITE}")
    edges = [training_timesteps[[m * last // num_bands, (m + 1) * last // num_bands - 1]] for m in range(num_bands)]
    return HeldOut(targets, [f"{int(first)}-{int(end)}" for first, end in edges], args.beta_dpo)


class HeldOut:
    """Pairs kept out of training, at fixed timesteps and noise: what the policy predicts better than the reference.

    Args:
        batches: `Targets` of this process's share, with a timestep in each of M bands.
        bands: names of the bands, such as "200-399".
        beta: see `preference_loss`.
    """

    def __init__(self, batches: list[Targets], bands: list[str], beta: float):
        self.batches, self.bands, self.beta, self._said = batches, bands, beta, set()

    @torch.no_grad()
    def measure(self, accelerator, errors: Callable[[Targets], torch.Tensor]) -> dict[str, float]:
        """Returns the metrics, over all processes, from the policy's `errors` (M, 2B) at targets.

        `eval/margins` and `eval/accuracies` as in training; `eval/winner_error` and `eval/loser_error`, by which share
        the policy's error is larger than the reference's; and each of the four in each band.
        """
        from accelerate.utils import send_to_device

        sums = torch.zeros(7, len(self.bands), device=accelerator.device)
        for targets in self.batches:
            targets = send_to_device(targets, accelerator.device)
            policy, reference = errors(targets), targets.reference_error
            _, metrics = preference_loss(policy, reference, self.beta, is_tie=targets.is_tie)
            margin, correct = metrics["rewards/margins"], metrics["rewards/accuracies"]
            parts = (*policy.chunk(2, 1), *reference.chunk(2, 1), margin, correct, torch.ones_like(margin))
            sums += torch.stack([part.where(targets.usable.chunk(2)[0], 0.0).sum(1) for part in parts])
        policy_w, policy_l, reference_w, reference_l, margin, correct, count = accelerator.reduce(sums).cpu()
        parts = {"margins": (margin, count), "accuracies": (correct, count)}
        parts |= {"winner_error": (policy_w, reference_w), "loser_error": (policy_l, reference_l)}
        logs = {}
        for name, (value, of) in parts.items():
            zero = 1 if name.endswith("_error") else 0
            logs[f"eval/{name}"] = value.sum() / of.sum() - zero
            logs |= {f"eval/{name}/{band}": x - zero for band, x in zip(self.bands, value / of, strict=True)}
        return {name: float(value) for name, value in logs.items()}

    def note(self, logs: dict[str, float], step: int) -> str:
        """Returns what the log should say, once each, of a policy that decays or does not move; "" otherwise."""
        winner, loser = logs["eval/winner_error"], logs["eval/loser_error"]
        decays, rests = winner > WINNER_LIMIT and loser > 0, max(abs(winner), abs(loser)) < 1e-4
        if not (decays or rests) or decays in self._said:
            return ""
        self._said.add(decays)
        text = "the policy has not moved. A higher --learning_rate or more steps help"
        if decays:
            text = f"the errors of winners, {winner:+.1%}, and losers, {loser:+.1%}, have both risen: pictures decay. "
            text += "A lower LoRA scale, fewer steps or a higher --beta_dpo help"
        return f"step {step}: on held-out pairs {text}"


def checksum(data: bytes | Path) -> str:
    """Returns the SHA-256 of bytes, or of a file."""
    with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(file: Path, data: bytes) -> None:
    """Writes a file under another name and renames it, so that it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def only_variant(folder: Path) -> str:
    """Returns the variant, such as fp16, of a folder's weights, if there are none without one, else ""."""
    names = [file.name.split(".") for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)]
    variants = [parts[1].split("-")[0] for parts in names if len(parts) == 3]
    return variants[0] if variants and len(variants) == len(names) else ""


def fingerprint(model: str, commit: str | None) -> str:
    """Returns what tells a model from others: its commit on the Hub, or a hash of its files' sizes and times."""
    if not Path(model).is_dir():
        return f"{model} {commit}"
    files = sorted(file for pattern in ("*", "*/*") for file in Path(model).glob(pattern) if file.is_file())
    listing = [(str(f.relative_to(model)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return checksum(json.dumps(listing).encode())


def find_model(option: str, model: str, revision=None, note=None, repo_type="model", cache_dir=None) -> None:
    """Raises ValueError if a model is neither here nor on the Hub; without a network, `note` is told, once for all."""
    if problem := missing_folder(model):
        raise ValueError(f"{option} {model}: {problem}")
    if Path(model).exists():
        return
    path = missing_folder(model, was_asked_for=True)  # it may have been one
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().repo_info(model, revision=revision, repo_type=repo_type, timeout=10)
            return
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        reason = path or f"it is not on the Hub, or private: {one_line(error)}"
        if isinstance(error, errors.GatedRepoError):
            reason = "accept its licence on the Hub, and log in with `hf auth login`"
        raise ValueError(f"{option} {model}: {reason}") from error
    except Exception as error:  # networks fail in many kinds
        note = note or logging.getLogger("training").warning
        note(f"the Hub cannot be reached ({one_line(error)}); only what was downloaded before is used")
        os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "1", True
    downloaded = Path(cache_dir or constants.HF_HUB_CACHE, f"{repo_type}s--{model.replace('/', '--')}")
    if path and not downloaded.exists():
        raise ValueError(f"{option} {model}: {path}")


def load_part(kind, option: str, path: str, warn: Callable[[str], None], **options):
    """Returns a frozen part of a model, whole and finite, or raises ValueError with the option, part and weight."""
    name = f"{option} {path}: {options.get('subfolder') or 'the VAE'}"
    try:
        options["ignore_mismatched_sizes"] = True  # they are named below
        part, info = kind.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # damaged files fail in many kinds
        hint = ". Try it without --variant" if options.get("variant") else ". Does it exist with --variant fp16 only?"
        hint = hint if "file named" in str(error) else ""
        raise ValueError(f"{name} cannot be loaded: {one_line(error)}{hint}") from error
    if other := sorted(info["mismatched_keys"]):
        raise ValueError(f"{name} has {len(other)} weights of another shape, such as {other[0][0]}")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{name} lacks {len(missing)} weights, such as {missing[0]}")
    if unexpected := sorted(info["unexpected_keys"]):
        warn(f"{name} has {len(unexpected)} weights that are not used, such as {unexpected[0]}")
    for key, value in part.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name}: {key} is not finite")
    return part.requires_grad_(False).eval()


# 4  LoRA

LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"


@contextlib.contextmanager
def reference_policy(denoiser) -> Iterator[None]:
    """Within it, `denoiser` is the reference policy: the same weights with the LoRA off, or with a frozen one on."""
    is_frozen_lora = "reference" in denoiser.peft_config
    denoiser.set_adapter("reference") if is_frozen_lora else denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.set_adapter("default") if is_frozen_lora else denoiser.enable_adapters()


def add_lora(denoiser, rank: int, targets=LORA_TARGETS, init=None, reference="base") -> list[torch.nn.Parameter]:
    """Adds a LoRA in float32, adapter "default", alpha = rank, freezes all else, and returns the LoRA's parameters.

    `targets` are modules' names or the ends of names, or a single regular expression that matches names as a whole.
    `init`, from `read_lora`, is where the LoRA begins, and what decides its rank and targets. With `reference` "init"
    a frozen copy of it, adapter "reference", is added, to which `reference_policy` switches.
    Raises ValueError if a target fits no module.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig, set_peft_model_state_dict

    is_pattern = not init and len(targets) == 1 and any(character in targets[0] for character in "*+?|()[]^$\\")
    rank, targets = lora_shape(init) if init else (rank, list(targets))
    names = [f".{name}" for name, _ in denoiser.named_modules()]
    lost = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    denoiser.requires_grad_(False)
    try:
        if lost and not is_pattern:
            raise ValueError(f"no module of the model is called {lost[0]}")
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant
        modules = targets[0] if is_pattern else targets
        for adapter in ("reference", "default") if reference == "init" else ("default",):  # the last one is active
            config = LoraConfig(r=rank, target_modules=modules, lora_alpha=rank, init_lora_weights="gaussian")
            denoiser.add_adapter(config, adapter)
            cast_training_params(denoiser, dtype=torch.float32)
            if init:
                set_peft_model_state_dict(denoiser, init, adapter_name=adapter)
    except (ValueError, re.error) as error:
        raise ValueError(f"--lora_target_modules {' '.join(targets)}: {one_line(error)}") from error
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def lora_weights(denoiser) -> dict[str, torch.Tensor]:
    """Returns the adapter "default": `<module>.lora_A.weight` (rank, in, ...), `.lora_B.weight` (out, rank, ...)."""
    from peft import get_peft_model_state_dict

    return {name: value.float().cpu() for name, value in get_peft_model_state_dict(denoiser).items()}


def lora_shape(lora: dict[str, torch.Tensor]) -> tuple[int, list[str]]:
    """Returns the rank of a LoRA of `lora_weights`, and the names of its modules."""
    down = {name.removesuffix(".lora_A.weight"): value for name, value in lora.items() if ".lora_A." in name}
    return len(next(iter(down.values()))), sorted(down)


def write_lora(file: Path, lora: dict[str, torch.Tensor], part: str) -> None:
    """Writes a LoRA of `lora_weights` as `pipe.load_lora_weights` reads it; `part` of the pipeline is its model."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    rank, modules = lora_shape(lora)
    config = {f"{part}.r": rank, f"{part}.lora_alpha": rank, f"{part}.target_modules": modules}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config)}
    write_whole(file, save({f"{part}.{name}": value.contiguous() for name, value in lora.items()}, metadata))


def read_lora(path: str | Path, denoiser, part: str, cache_dir=None) -> dict[str, torch.Tensor]:
    """Returns a LoRA that `write_lora` wrote, from a file, a folder or the Hub.

    Raises ValueError if it is something else, or does not fit `denoiser`, which is on the meta device and gets a LoRA.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import get_peft_model_state_dict

    try:
        file = Path(path, LORA_FILE) if Path(path).is_dir() else path
        file = file if Path(path).exists() else hf_hub_download(str(path), LORA_FILE, cache_dir=cache_dir)
        with safe_open(file, "pt") as stored:
            config = json.loads((stored.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
            lora = {name.removeprefix(f"{part}."): stored.get_tensor(name) for name in stored.keys()}
    except Exception as error:  # damaged and missing files, networks and the Hub fail in many kinds
        raise ValueError(one_line(error)) from error
    try:
        rank, modules = lora_shape(lora)
        add_lora(denoiser, rank, modules)
        expected = {name: value.shape for name, value in get_peft_model_state_dict(denoiser).items()}
    except (ValueError, StopIteration):
        rank, expected = None, {}
    is_ours = rank == config.get(f"{part}.r") == config.get(f"{part}.lora_alpha")
    if not is_ours or expected != {name: value.shape for name, value in lora.items()}:
        raise ValueError("it is in another format, or for another model. `python examples/convert_lora.py --format "
                         "diffusers ...` makes a LoRA that can be used of what diffusers reads")  # fmt: skip
    if infinite := [name for name, value in lora.items() if not value.isfinite().all()]:
        raise ValueError(f"{infinite[0]} is not finite")
    return lora


def sgm_names(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Returns what modules of diffusers' SDXL U-Net, or the beginnings of their names, are called in sgm's code."""
    layers, kinds = unet_config["layers_per_block"], unet_config["up_block_types"]
    layers = [layers] * len(kinds) if isinstance(layers, int) else layers
    names = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "mid_block.attentions.0": "middle_block.1"}
    for k in (0, 2):
        names[f"time_embedding.linear_{k // 2 + 1}"] = f"time_embed.{k}"
        names[f"add_embedding.linear_{k // 2 + 1}"] = f"label_emb.0.{k}"
    resnets, k = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}, 0
    for i, count in enumerate(layers):
        for j in range(count):
            k += 1
            resnets[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{k}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{k}.1"
        k += 1
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{k}.0.op"
    k = -1
    for i, count in enumerate(reversed(layers)):
        for j in range(count + 1):
            k += 1
            resnets[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{k}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{k}.1"
        place = 2 if "Attn" in kinds[i] else 1  # behind the resnet, and the attention if there is one
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{k}.{place}.conv"
    parts = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
    parts["conv_shortcut"] = "skip_connection"
    return names | {f"{a}.{part}": f"{b}.{sgm}" for a, b in resnets.items() for part, sgm in parts.items()}


def write_kohya(file, lora, unet_config, title: str, prediction_type="epsilon", resolution: int | None = None) -> None:
    """Writes a LoRA of `lora_weights` with kohya's names, as ComfyUI, Forge, AUTOMATIC1111 and sd-scripts read it.

    They are made of diffusers' module names for SD 1.5 and 2.x, and of sgm's for SDXL. The metadata say which model
    the LoRA is for: AUTOMATIC1111 hides it under others (keys: sd-scripts, github.com/Stability-AI/ModelSpec).
    """
    (rank, modules), tensors = lora_shape(lora), {}
    is_sdxl = unet_config.get("addition_embed_type") == "text_time"
    is_sd2, sgm = not is_sdxl and unet_config["cross_attention_dim"] == 1024, sgm_names(unet_config) if is_sdxl else {}
    for module in modules:
        start = next((start for start in sgm if f"{module}.".startswith(f"{start}.")), "")
        name = "lora_unet_" + (sgm.get(start, "") + module.removeprefix(start)).replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = lora[f"{module}.lora_A.weight"].contiguous()
        tensors[f"{name}.lora_up.weight"] = lora[f"{module}.lora_B.weight"].contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    base, kind = ("sdxl_base_v1-0", "xl-v1-base") if is_sdxl else ("sd_v1", "v1")
    if is_sd2:
        base, kind = "sd_v2", "v2-768-v" if prediction_type == "v_prediction" else "v2-512"
    metadata = {
        "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_output_name": title,
        "ss_network_alpha": str(rank), "ss_base_model_version": base, "ss_v2": str(is_sd2), "modelspec.title": title,
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"stable-diffusion-{kind}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if is_sdxl else "diffusers",
        "modelspec.prediction_type": prediction_type.split("_")[0], "modelspec.date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if resolution:
        metadata["modelspec.resolution"] = f"{resolution}x{resolution}"
        metadata["ss_resolution"] = f"({resolution}, {resolution})"
    write_whole(file, save(tensors, metadata))


# 5  The run

METRICS_FILE, STATE_FILE, OPTIMIZER_FILE, LOCK_FILE = "metrics.jsonl", "training_state.json", "optimizer.bin", ".lock"
CARD_FILE, CONFIG_FILE, VALIDATION_DIR = "README.md", "training_config.json", "validation"
FINAL_RESULTS = (LORA_FILE, KOHYA_FILE, CARD_FILE, CONFIG_FILE)  # of a run that ended
RESULTS = (*FINAL_RESULTS, METRICS_FILE, VALIDATION_DIR)  # beside checkpoints and logs


@dataclasses.dataclass
class Progress:
    """What a run was started with and how far it has come: the state of its loop, and a checkpoint's JSON."""

    options: dict[str, Any]
    num_pairs: int  # to train on, on which the order of the visits depends
    lora_init: str | None  # the hash of the LoRA that the run began with
    step: int = 0
    visit: int = 0  # the next one, see `PreferenceDataset`
    good_steps: int = 0  # that were not skipped, by which the learning rate's schedule goes
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # rows so far, with the reason each

    def advance(self, num_visits: int, is_bad: bool) -> None:
        self.step, self.visit, self.good_steps = self.step + 1, self.visit + num_visits, self.good_steps + (not is_bad)


PROCESSES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def check_launcher(environment: Mapping[str, str], num_processes: int | None = None) -> None:
    """Raises ValueError if accelerate was told to shard the model, or has not formed a group of all processes."""
    if environment.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        raise ValueError(
            "fp8, which ACCELERATE_MIXED_PRECISION asks for, is not supported; use --mixed_precision bf16"
        )
    for name in ("DeepSpeed", "FSDP", "Megatron_LM", "Parallelism_config"):
        if environment.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() not in ("false", "0", "no", "off"):
            raise ValueError(f"{name} is not supported: launch with accelerate's MULTI_GPU (examples/ddp.yaml); for "
                             "memory, see --quantize_base and --offload")  # fmt: skip
    name = next((name for name in PROCESSES if environment.get(name, "").isdecimal()), None)
    if num_processes and name and 1 < int(environment[name]) != num_processes:
        raise ValueError(f"{environment[name]} processes were started ({name}), but accelerate sees {num_processes}: "
                         "each would train a whole run into --output_dir. Does torch see the GPUs? On CPUs, set "
                         "ACCELERATE_USE_CPU=true")  # fmt: skip


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the complete checkpoints of a run, the newest last."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))


def read_checkpoint(folder: Path) -> Progress:
    """Returns what a checkpoint says of its run; raises ValueError, naming the file, if one is missing or damaged."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        progress, checksums = Progress(**state["progress"]), state["checksums"]
        files = {*checksums, LORA_FILE, OPTIMIZER_FILE} - {STATE_FILE}
        found = {name: checksum(folder / name) for name in files}
    except OSError as error:
        raise ValueError(one_line(error)) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{STATE_FILE} is damaged or of another version") from error
    found[STATE_FILE] = checksum(json.dumps(state["progress"]).encode())
    if damaged := [name for name in found if found[name] != checksums.get(name)]:
        raise ValueError(f"{damaged[0]} is damaged")
    return progress


def find_checkpoint(output_dir, resume_from_checkpoint, note) -> tuple[Path | None, Progress | None]:
    """Returns the checkpoint to resume from, and how far its run had come; None, None to start anew.

    `resume_from_checkpoint` is a folder `checkpoint-<step>`, by name within `output_dir` or by path; "latest", which
    is the newest in `output_dir` that is sound, if there is any; or None. Damaged ones are named to `note`.
    Raises ValueError if there is no such checkpoint, none of them is sound, or a newer one is in `output_dir`.
    """
    if resume_from_checkpoint is None:
        return None, None
    checkpoints, option = find_checkpoints(output_dir), f"--resume_from_checkpoint {resume_from_checkpoint}"
    candidates = checkpoints[::-1]
    if resume_from_checkpoint != "latest":
        named = (Path(output_dir, resume_from_checkpoint), Path(resume_from_checkpoint))
        candidates = [folder for folder in named if (folder / STATE_FILE).exists()][:1]
        if not candidates:
            raise ValueError(f"{option}: allowed are 'latest' and a folder checkpoint-<step> with {STATE_FILE} in it")
        if candidates[0].resolve() in [older.resolve() for older in checkpoints[:-1]]:
            raise ValueError(f"{option}: {checkpoints[-1].name} is newer; move it away, or name another --output_dir")
    for folder in candidates:
        try:
            return folder, read_checkpoint(folder)
        except ValueError as error:
            note(f"{folder.name} is left out: {error}")
    if candidates:
        raise ValueError(f"{option}: no sound checkpoint; 'latest' takes the newest sound one in --output_dir, if any")
    note(f"{option}: there is no checkpoint in {output_dir}, so the run starts at step 0")
    return None, None


def go_on(checkpoint: Path, before: Progress, progress: Progress, note: Callable[[str], None]) -> Progress:
    """Returns the progress of a run that goes on from a checkpoint's; what has changed goes to `note`.

    Raises ValueError if another run would come of it: other data, another objective or LoRA, the cache on or off.
    """
    count = "the number of pairs to train on"
    old, new = ({**x.options, count: x.num_pairs, "lora_init": x.lora_init} for x in (before, progress))
    names = ("max_train_samples", "num_eval_pairs", count, "objective", "reference", "lora_init", "rank")
    for name in (*names, "lora_target_modules", "use_8bit_adam", "inversion_cache_dir"):
        if old.get(name) != new[name] and not (name.endswith("_dir") and old.get(name) and new[name]):
            was, now = ("another LoRA" if x and name == "lora_init" else x for x in (old.get(name), new[name]))
            raise ValueError(f"--resume_from_checkpoint: {name} is {now}, but {checkpoint} was made with {was}; "
                             "a run must keep it")  # fmt: skip
    free = [name for name in progress.options if name not in ("resume_from_checkpoint", "config", "lora_init")]
    changed = [f"--{name} {new[name]} (it was {old.get(name)})" for name in free if new[name] != old.get(name)]
    if changed:
        note(f"Options that differ from the start of the run: {', '.join(changed)}")
    return dataclasses.replace(before, options=progress.options)


def register_lora_checkpointing(accelerator, denoiser, part: str) -> None:
    """Makes `accelerator.save_state` and `load_state` keep the LoRA, adapter "default", instead of the whole model."""
    from peft import set_peft_model_state_dict

    def save_hook(models, weights, folder):
        if accelerator.is_main_process:
            write_lora(Path(folder) / LORA_FILE, lora_weights(denoiser), part)
        if weights:
            weights.pop()

    def load_hook(models, folder):
        models.clear()
        lora = {name.removeprefix(f"{part}."): x for name, x in load_file(Path(folder) / LORA_FILE).items()}
        set_peft_model_state_dict(denoiser, lora, adapter_name="default")

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def save_checkpoint(accelerator, output_dir: Path, progress: Progress, total_limit: int | None) -> None:
    """Writes `checkpoint-<step>` whole or not at all, then removes the oldest; a damaged one in its way is renamed."""
    folder = output_dir / f"checkpoint-{progress.step}"
    partial = folder.with_name(f"partial-{folder.name}")
    if accelerator.is_main_process:
        for stale in output_dir.glob("partial-checkpoint-*"):  # of a run that was killed while writing
            shutil.rmtree(stale)
    accelerator.wait_for_everyone()
    with writing(folder):
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state = dataclasses.asdict(progress)
            checksums = {file.name: checksum(file) for file in sorted(partial.iterdir())}
            checksums[STATE_FILE] = checksum(json.dumps(state).encode())
            text = json.dumps({"progress": state, "checksums": checksums}, indent=2)
            (partial / STATE_FILE).write_text(text, encoding="utf-8")
            if folder.exists():
                folder.rename(folder.with_name(f"damaged-{folder.name}-{time.time_ns()}"))
            partial.rename(folder)
    if accelerator.is_main_process and total_limit:
        older = [folder for folder in find_checkpoints(output_dir) if int(folder.name[11:]) <= progress.step]
        for old in older[:-total_limit]:  # not those beyond this step, which are damaged
            shutil.rmtree(old)


def check_output_dir(output_dir: str | Path, checkpoint: Path | None, resume_from_checkpoint: str | None) -> None:
    """Raises ValueError if the folder holds another run than the one that is resumed.

    With "latest", metrics and pictures may be there, of a run that died before its first checkpoint.
    """
    folder, checkpoints = Path(output_dir), find_checkpoints(output_dir)
    is_own = resume_from_checkpoint == "latest" and (folder / LOCK_FILE).exists()
    names = FINAL_RESULTS if is_own else RESULTS
    found = checkpoints[-1:] + [folder / name for name in names if (folder / name).exists()]
    if found and not (checkpoint and checkpoint.resolve().parent == folder.resolve()):
        remedy = "continue that run with --resume_from_checkpoint latest" if checkpoints else "move it away"
        raise ValueError(f"--output_dir {output_dir} holds {found[0].name} already; name another folder, or {remedy}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file")


def lock_output_dir(output_dir: str | Path, is_main_process=True):
    """Returns what keeps a folder to this run and its processes; ValueError if it is in use or not writable."""
    if not is_main_process:
        return None
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        lock = FileLock(Path(output_dir, LOCK_FILE), is_singleton=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"--output_dir {output_dir} is in use by another run; wait for it or name another") from error
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be written: {one_line(error)}") from error
    return lock


def stage(line: str) -> None:
    """Logs what begins, in the main process, also before accelerate has started."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("training").setLevel(logging.INFO)
        logging.getLogger("training").info(line)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, an error of the disk is a RuntimeError that names the file and the way to go on."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and "writ" not in str(error):  # torch says "file write failed"
            raise
        free, advice = "", "Go on with --resume_from_checkpoint latest"
        with contextlib.suppress(OSError):
            free = f", {shutil.disk_usage(path.parent).free >> 20} MiB are free"
        raise RuntimeError(f"{path} cannot be written{free}: {one_line(error)}. {advice}") from error


def add_metrics(file: Path, *rows: dict[str, float], mode="a") -> None:
    """Appends rows to a file of metrics, a line of JSON each; null stands for what is not finite."""
    with writing(file), file.open(mode, encoding="utf-8") as stream:
        for row in rows:
            row = {name: value if math.isfinite(value) else None for name, value in row.items()}
            stream.write(json.dumps(row) + "\n")


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Returns what `add_metrics` wrote, a dict a step; lines that are damaged or were cut short are left out."""
    rows = []
    for line in file.read_bytes().split(b"\n")[:-1] if file.exists() else ():
        with contextlib.suppress(ValueError, AttributeError):
            row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
            rows += [row] if "step" in row and all(isinstance(value, int | float) for value in row.values()) else []
    return rows


def cut_metrics(file: Path, step: int, warn: Callable[[str], None]) -> None:
    """Cuts the lines beyond a step, of a run that went on without reaching its next checkpoint, and damaged ones."""
    if file.exists():
        rows = read_metrics(file)
        if damaged := file.read_bytes().count(b"\n") - len(rows):
            warn(f"{file}: damaged lines left out: {damaged}")
        add_metrics(partial := file.with_suffix(".partial"), *(row for row in rows if row["step"] <= step), mode="w")
        partial.replace(file)


class StopSignal:
    """Remembers the first signal to end, so that the loop can save and stop; a second one acts as it used to."""

    # Of users, of a closed terminal (unless `nohup` ignores it), and of clusters; Windows has the first two.
    NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    NUMBERS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))

    def __init__(self, announce: Callable[[str], None]):
        self.received, self.announce = 0, announce  # the signal's number
        heard = [number for number in self.NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._remember) for number in heard}

    def _remember(self, number, frame):
        self.received = number
        self.restore()
        self.announce(f"{signal.Signals(number).name}: stopping after this step; once more to stop at once")

    @staticmethod
    def leave_to_the_main_process(worker: int) -> None:
        """A `worker_init_fn`: a signal may reach a whole group of processes, but workers must outlast the step."""
        for number in StopSignal.NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Gives the signals back to whoever handled them before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


class Verdict(RuntimeError):
    """What the loop raises of a run that is not worth going on with."""


def rescue(accelerator, output_dir: Path, progress: Progress, is_between_steps: bool, error: Exception, logger):
    """Saves a run that an error ends between two steps, if it is of one process, or else names the last checkpoint."""
    step = progress.step
    is_alone, is_worth_it = accelerator.num_processes == 1, step and not isinstance(error, Verdict)
    for _ in range(2 if is_alone and is_between_steps and is_worth_it else 0):
        with contextlib.suppress(Exception):  # of the disk or the device; or torch names a killed worker a second time
            if not (output_dir / f"checkpoint-{step}").exists():
                save_checkpoint(accelerator, output_dir, progress, None)
    names = [folder.name for folder in find_checkpoints(output_dir)]
    last = f"go on from {names[-1]} with --resume_from_checkpoint latest" if names else "nothing was saved yet"
    logger.error(f"the run ended after step {step}: {one_line(error)}; {last}", main_process_only=False)


class RunningMeans:
    """Means of metrics over the batches of a step, kept on the device until they are asked for."""

    def __init__(self):
        self._values = {}

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float().mean())

    def pop(self, accelerator) -> dict[str, float]:
        """Returns the means over batches and processes, and starts anew; this waits for the device, once a step."""
        means = torch.stack([torch.stack(values).mean() for values in self._values.values()])
        names, self._values = list(self._values), {}
        return dict(zip(names, accelerator.reduce(means, reduction="mean").tolist(), strict=True))


@contextlib.contextmanager
def on_device(modules: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Within it, frozen modules are on the device. Their own copy stays where it is, so nothing is copied back."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    homes = [(tensor, tensor.data) for tensor in tensors if tensor.device != device]
    try:
        for tensor, home in homes:
            tensor.data = to_device(home, device)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


@torch.no_grad()
def encode_images(vae, pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Returns scaled latents (N, C, h, w) in float32, the mode of the VAE's posterior, for pixels (N, 3, H, W)."""
    pixel_values = to_device(pixel_values, vae.device).to(vae.dtype)
    latents = [vae.encode(chunk).latent_dist.mode() for chunk in pixel_values.split(batch_size)]
    latents = torch.cat(latents).float() * vae.config.scaling_factor
    return latents.contiguous()  # as a cache returns them: kernels round by the memory layout


def leave(accelerator, lock) -> None:
    """Ends training in all processes at once; the caller has let go of the model that accelerate wrapped.

    A process that takes the group down while another is at work may hang. So may one whose wrapper outlives the group.
    """
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()
    if lock:
        lock.release(force=True)


# 6  Results

PUSHED = (*FINAL_RESULTS, f"{VALIDATION_DIR}/step-*.png")
NOT_REPEATED = ("output_dir", "resume_from_checkpoint", "precompute_only", "config")  # by a run with the same options


class Validation:
    """Samples prompts at several scales of the LoRA, from the same seeds: pictures with a column for each scale.

    The pipeline is made of the models that train. Training goes on as if nothing had been sampled.

    Args:
        part: of the pipeline is the model with the LoRA.
        args: the script's options; 0 among the scales is the base model.
        autocast: context of the pipeline's calls.
        warn: called with a line if sampling fails.
    """

    def __init__(self, pipeline, part, args, autocast, warn):
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.part, self.denoiser = pipeline, part, getattr(pipeline, part)
        self.folder, self.prompts = Path(args.output_dir, VALIDATION_DIR), args.validation_prompts
        self.seeds = range(args.seed, args.seed + args.num_validation_images)
        self.scales, self.autocast, self.warn = args.validation_lora_scales, autocast, warn
        self.sampling = {"num_inference_steps": args.validation_inference_steps, "height": args.resolution,
                         "width": args.resolution, "guidance_scale": args.validation_guidance_scale}  # fmt: skip
        self._base = None  # the base model's samples never change

    def load(self, file: Path) -> None:
        """Puts the LoRA that was saved in the place of the one that was trained, which ends training."""
        self.denoiser.delete_adapters(list(self.denoiser.peft_config))
        self.denoiser.load_lora_adapter(file, prefix=self.part, adapter_name="default")

    def sample(self, step: int) -> list[Path]:
        """Writes <folder>/step-<step>-prompt-<number>.png, a row for each seed; none, and a warning, if that fails."""
        from accelerate.utils.memory import clear_device_cache

        denoiser, device = self.denoiser, self.denoiser.device
        was_training, devices = denoiser.training, [device] if device.type == "cuda" else []
        others = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        eager = torch.compiler.set_stance("force_eager")  # no graphs for samples
        files = [self.folder / f"step-{step:06}-prompt-{i}.png" for i in range(len(self.prompts))]
        denoiser.eval()
        try:
            with eager, torch.random.fork_rng(devices), on_device(others, device):
                with tqdm(desc=f"Validation at step {step}", total=len(self.scales) * len(self.prompts)) as bar:
                    columns = [self._sample_all(scale, bar) for scale in self.scales]
            self.folder.mkdir(exist_ok=True)
            for file, prompt, *samples in zip(files, self.prompts, *columns, strict=True):
                self._picture(prompt, samples).save(file)
        except Exception as error:  # out of memory, above all: no reason to lose what was trained
            self.warn(f"no validation pictures at step {step}, training goes on: {one_line(error)}")
            files = []
        denoiser.train(was_training)
        clear_device_cache()
        return files

    def _sample_all(self, scale: float, bar) -> list[list[Image.Image]]:
        """Returns a list of samples for each prompt, with the LoRA at a scale."""
        denoiser = self.denoiser
        if scale == 0 and self._base:
            bar.update(len(self.prompts))
            return self._base
        try:
            denoiser.set_adapters("default", scale) if scale else denoiser.disable_adapters()
            samples = [(self._sample(prompt), bar.update())[0] for prompt in self.prompts]
        finally:
            denoiser.set_adapters("default", 1.0) if scale else denoiser.enable_adapters()
        self._base = self._base or (None if scale else samples)
        return samples

    def _picture(self, prompt: str, samples: list[list[Image.Image]]) -> Image.Image:
        """Returns samples, a list for each scale, side by side, with the prompt and the scales above them."""
        from diffusers.utils import make_image_grid

        rows = [image for row in zip(*samples, strict=True) for image in row]
        grid = make_image_grid(rows, rows=len(self.seeds), cols=len(self.scales))
        width, text = grid.width // len(self.scales), max(10, grid.width // len(self.scales) // 16)
        picture, font = ImageOps.expand(grid, (0, 4 * text, 0, 0), "white"), ImageFont.load_default(text)
        pen, line = ImageDraw.Draw(picture), printable(prompt)
        while pen.textlength(line, font) > grid.width and len(line) > 1:
            line = line.removesuffix("\u2026")[:-1] + "\u2026"
        pen.text((grid.width / 2, text), line, "black", font, anchor="mm")
        for i, scale in enumerate(self.scales):
            label = f"LoRA {scale:g}" if scale else "base model"
            pen.text(((i + 0.5) * width, 3 * text), label, "black", font, anchor="mm")
        return picture

    @torch.no_grad()
    def _sample(self, prompt: str) -> list[Image.Image]:
        """Returns a sample per seed, decoded in the VAE's own precision: SDXL's overflows in half."""
        vae, samples = self.pipeline.vae, []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on any device
            with self.autocast():
                latents = self.pipeline(prompt, generator=generator, output_type="latent", **self.sampling).images
            pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
            if not pixels.isfinite().all():
                self.warn(f"validation: a sample for {prompt!r} is not finite; try bf16 instead of fp16")
            samples += self.pipeline.image_processor.postprocess(pixels.float().nan_to_num())
        return samples


def log_pictures(accelerator, files: list[Path], step: int) -> None:
    """Shows pictures in those trackers that accelerate gives a common way to: tensorboard and wandb."""
    for tracker in accelerator.trackers:
        pictures = {f"validation/prompt-{i}": np.asarray(Image.open(file))[None] for i, file in enumerate(files)}
        if tracker.name in ("tensorboard", "wandb"):
            tracker.log_images(pictures, step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}))


def save_results(
    args, accelerator, denoiser, part, pipeline, prediction_type, progress, pairs, pairs_per_step, validation, repo_id,
    began, logger,
) -> int:  # fmt: skip
    """Writes what a finished run leaves, and uploads it if asked to; returns the exit code."""
    if not progress.good_steps:
        raise Verdict("no step of this run was good; there is nothing to save")
    folder, files = Path(args.output_dir), []
    name, lora = folder.resolve().name, lora_weights(denoiser)
    with writing(folder / LORA_FILE):
        write_lora(folder / LORA_FILE, lora, part)
        if args.output_kohya_format:
            write_kohya(folder / KOHYA_FILE, lora, denoiser.config, name, prediction_type, args.resolution)
    logger.info(f"Saved {folder / LORA_FILE}")
    if validation:
        validation.load(folder / LORA_FILE)
        files = validation.sample(progress.step)
    log_pictures(accelerator, files, progress.step)
    pictures = dict(zip(args.validation_prompts or (), (f"{VALIDATION_DIR}/{x.name}" for x in files), strict=False))
    metrics, libraries = {}, ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
    for row in read_metrics(folder / METRICS_FILE):
        for key in (key for key in row if math.isfinite(row[key]) and key.count("/") < 2 and key != "step"):
            metrics.setdefault(key, []).append(row[key])
    is_count = ("eval/", "bad_steps")  # of which the last value counts, not the mean over steps
    record = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "pipeline": pipeline,
        "rank": lora_shape(lora)[0], "steps": progress.step, "pairs_per_step": pairs_per_step,
        "processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision,
        "data": {"pairs": len(pairs), "ties in the data": pairs.num_ties,
                 "rows skipped": len(progress.skipped) + pairs.num_unusable},
        "options": {k: v for k, v in progress.options.items() if k not in NOT_REPEATED},
        "metrics": {k: x[-1] if k.startswith(is_count) else float(np.mean(x[-20:])) for k, x in metrics.items()},
        "versions": {"python": sys.version.split()[0], **{x: importlib.metadata.version(x) for x in libraries}},
    }  # fmt: skip
    with writing(folder / CONFIG_FILE):
        (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / CARD_FILE).write_text(model_card(record, name, pictures, repo_id), encoding="utf-8")
    judge = ["--base", args.pretrained_model_name_or_path, "--lora", str(folder), "--prompts", "everyday"]
    judge = shlex.join(["python", "examples/judge_lora.py", *judge, "--output_dir", f"{name}-judged"])
    kohya = KOHYA_FILE if args.output_kohya_format else "add --output_kohya_format"
    minutes = (time.monotonic() - began) / 60
    pictures = folder / VALIDATION_DIR if files else "add --validation_prompts"
    logger.info(f"Done: {progress.step} steps of {pairs_per_step} pairs; this command took {minutes:.1f} minutes.\n"
                f"  pictures      {pictures}\n  judge it      {judge}\n"
                f"  in diffusers  pipe.load_lora_weights({str(folder)!r})\n  in ComfyUI    {kohya}")  # fmt: skip
    return push_to_hub(repo_id, folder, logger) if repo_id else 0


def model_card(record: dict[str, Any], name: str, pictures: dict[str, str], repo_id: str | None) -> str:
    """Returns a LoRA's card, by what `training_config.json` holds, its name, pictures by prompt, and id on the Hub."""
    options, base = record["options"], record["options"]["pretrained_model_name_or_path"]
    dataset = options["dataset_name"] or options["train_data_dir"]
    init = options["lora_init"]
    names = {x: f"the local folder `{Path(x).name}`" if Path(x).exists() else x for x in (base, dataset, init or "")}
    began = f"Training began with the LoRA {names[init]}, reference policy: {options['reference']}. " if init else ""
    metadata = ModelCardData(
        base_model=base if names[base] == base else None,
        datasets=[dataset] if names[dataset] == dataset and "/" in dataset else None,
        library_name="diffusers",
        tags=["lora", "diffusers", "text-to-image", "dpo", "inversion-dpo", "template:sd-lora"],
        widget=[{"text": prompt, "output": {"url": file}} for prompt, file in pictures.items()] or None,
    )
    columns = ", ".join(f"LoRA {s:g}" if s else "base model" for s in options["validation_lora_scales"])
    files = f"`{LORA_FILE}` is for diffusers; other programs read it in part, without a word, or not at all"
    if options["output_kohya_format"]:
        files += (
            f". `{KOHYA_FILE}`, the same LoRA, is for ComfyUI, Forge, AUTOMATIC1111, sd-scripts, InvokeAI, OneTrainer"
        )
    prompts = [html.escape(" ".join(prompt.split())) or "(empty prompt)" for prompt in pictures]
    gallery = [f"<p>{p}</p>\n\n![{columns}]({f})\n" for p, f in zip(prompts, pictures.values(), strict=True)]
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", record["command"]))])
    where, newline = base if names[base] == base else f"path/to/{Path(base).name}", "\n"
    kind = options["prediction_type"]  # which the model's own scheduler does not say
    kind = f"pipe.scheduler.register_to_config(prediction_type={kind!r})\n" if kind else ""
    return f"""---
{metadata.to_yaml()}
---
# {repo_id.split("/")[-1] if repo_id else name}

A LoRA for {names[base]}, aligned with preference pairs (a better and a worse image for the same caption) by
inversion-based DPO ([arXiv 2507.11554](https://arxiv.org/abs/2507.11554),
[arXiv 2503.18454](https://arxiv.org/abs/2503.18454)), objective `{options["objective"]}`. The base model's licence
applies. {began}{f"The same prompts and seeds, from left to right: {columns}." if pictures else ""}

{newline.join(gallery)}
```python
from diffusers import {record["pipeline"]}

pipe = {record["pipeline"]}.from_pretrained({where!r}).to("cuda")
{kind}pipe.load_lora_weights({repo_id or "path/to/this/folder"!r}, adapter_name="aligned")
pipe.set_adapters("aligned", 1.0)  # a lower scale keeps more of the base model
```

{files}.

Data: {names[dataset]}; {", ".join(f"{what} {count}" for what, count in record["data"].items())}.
{record["steps"]} steps of {record["pairs_per_step"]} pairs at {options["resolution"]} pixels, rank {record["rank"]}.

{fence}
{record["command"]}
{fence}

{", ".join(f"{library} {version}" for library, version in record["versions"].items())}; mean over the last steps:
{", ".join(f"`{metric}` {value:.4g}" for metric, value in record["metrics"].items())}.

These metrics compare noise predictions. They do not say that the pictures are better: look at them. Attributes that
the pairs did not judge may have drifted, and biases of the pairs and of the base model remain.
"""


def create_hub_repo(args: argparse.Namespace) -> str:
    """Returns the id of the model repository, which it creates if it is not there; ValueError if the Hub refuses."""
    name, private, api = args.hub_model_id or Path(args.output_dir).resolve().name, args.hub_private_repo, HfApi()
    try:
        repo_id = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # one that exists may be readable only
        if private and not api.model_info(repo_id).private:
            raise ValueError("it exists and is public, against --hub_private_repo; make it private or name another")
    except Exception as error:  # bad names, tokens and networks raise many kinds
        remedy = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        raise ValueError(f"--push_to_hub to {name}: {one_line(error)}; {remedy}") from error
    return repo_id


def push_to_hub(repo_id: str, folder: Path, logger) -> int:
    """Uploads the LoRA, its card, pictures and configuration, or logs the command for it; returns the exit code."""
    files = {"repo_id": repo_id, "folder_path": folder, "allow_patterns": list(PUSHED)}
    try:
        HfApi().upload_folder(**files, commit_message="Training finished")
    except Exception as error:  # networks and servers fail in many kinds
        patterns = [word for pattern in PUSHED for word in ("--include", pattern)]
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *patterns])
        logger.error(f"the upload to {repo_id} failed: {one_line(error)}\nEverything is in {folder}. Repeat the "
                     f"upload, after `hf auth login`, with\n{command}")  # fmt: skip
        return 1
    logger.info(f"Pushed to {repo_id}")
    return 0

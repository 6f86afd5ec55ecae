"""What convert_pairs.py reads: rows of many formats, pairs of four shapes, images of every kind.

    1  rows     `open_rows` gives the rows of a data set, folder or file in order
    2  pairs    `PairColumns` says which images of a row are a pair, and which of the two is better
    3  images   `read_image` and `to_readable` give the bytes of an image file that the training scripts can read

Another format is another function in `READERS`; another shape of data is another branch of `PairColumns.choices`.
"""

import base64
import contextlib
import csv
import gzip
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import stat
import string
import sys
import threading
import unicodedata
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from training_options import missing_folder, one_line
from training_utils import MAX_IMAGE_BYTES, BadRow, decode_image, find_model, is_within, load_saved

# 1  Rows


class Row(NamedTuple):
    """A row: its name for messages, the folder that its relative image paths belong to, and its values by column."""

    name: str
    image_root: Path
    values: dict[str, Any]
    caption_files: str = ""  # where its caption is from or was looked for, for messages


class Rows(NamedTuple):
    """Rows that are read once, in order; `head` are the first few, `features` the types as `datasets` writes them."""

    head: list[Row]
    rows: Iterator[Row]
    features: dict[str, Any]
    sources: list[str]  # what is read, for a report
    folder: Path | None = None  # what else is in it, a message can tell

    @classmethod
    def of(cls, rows: Iterable[Row], features: dict[str, Any], sources: Sequence[Any]) -> "Rows":
        rows = iter(rows)
        head = list(itertools.islice(rows, 10))
        return cls(head, itertools.chain(head, rows), features, list(map(str, sources)))

    @property
    def names(self) -> list[str]:
        """The columns, as far as the first rows tell."""
        return list(dict.fromkeys(name for row in self.head for name in row.values))


def open_rows(args, columns: "PairColumns") -> Rows:
    """Returns the rows that the data options name. Local files are read where they are, without a copy.

    Raises:
        ValueError: if there is nothing to read, or on reading, in one line that names the option.
    """
    option = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"

    def read_on(rows, name=""):
        try:
            for row in rows:
                name = row.name
                yield row
        except Exception as error:  # as below
            raise ValueError(f"{option}: cannot be read beyond {name}: {one_line(error)}") from error

    try:
        rows = _find_slices(args, columns)
        if not rows.head:
            raise ValueError("there are no rows")
    except Exception as error:  # `datasets` raises a dozen kinds, its own and those of pyarrow, fsspec and the Hub
        reason, cause = one_line(error), one_line(error.__cause__) if error.__cause__ else ""
        reason += f" ({cause})" if cause not in reason else ""
        raise ValueError(f"{option}, split {args.dataset_split_name!r}, cannot be read: {reason}") from error
    return rows._replace(rows=read_on(rows.rows))


def _find_slices(args, columns: "PairColumns") -> Rows:
    """Returns the rows of a split, or of slices and sums of splits as `datasets` spells them: train[:10%]+test."""
    from datasets import ReadInstruction

    spec, paths = args.dataset_split_name, [path for _, path in columns.columns]
    if not set(spec) & set("[+("):
        return _find_rows(args, spec, columns.image_columns, paths)
    instruction, lengths = ReadInstruction.from_spec(spec), {}
    for name in (re.match(r"\s*([\w.]+)", part)[1] for part in spec.split("+")):
        lengths[name] = sys.maxsize  # which shares, and places from the end, cannot do with: they read the rows twice
        if re.search(r"%|[\[:]-", spec):
            lengths[name] = sum(1 for _ in _find_rows(args, name, columns.image_columns, paths[-1:]).rows)
    parts = instruction.to_absolute(lengths)
    found = [_find_rows(args, part.splitname, columns.image_columns, paths) for part in parts]
    rows = (itertools.islice(rows.rows, part.from_, part.to) for rows, part in zip(found, parts, strict=True))
    sources = dict.fromkeys(source for rows in found for source in rows.sources)
    return Rows.of(itertools.chain.from_iterable(rows), found[0].features, list(sources))


def _find_rows(args, split: str, image_columns: Sequence[str], paths: Sequence[str]) -> Rows:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    path = _existing(args.train_data_dir or args.dataset_name, ".")
    if args.dataset_name:
        find_model("the data set", args.dataset_name, None, logging.getLogger(__name__).warning, "dataset")
        dataset = load_dataset(
            args.dataset_name, args.dataset_config_name, split=split, cache_dir=args.cache_dir,
            streaming=args.streaming or path.exists(),
        )  # fmt: skip
        return _rows_of_dataset(dataset, args.image_root or path, paths, args.dataset_name)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _rows_of_dataset(load_saved(str(path), split), args.image_root or path, paths, path)
    if problem := missing_folder(str(path.absolute())):
        raise FileNotFoundError(problem)
    folders = [_existing(column, path) for column in image_columns]
    has_folders = all(folder.is_dir() for folder in folders)
    try:
        rows = _rows_of_files(find_data_files(path, split), args.image_root, paths)
        if not has_folders or all(column_of(column, rows.names) for column in image_columns):
            return rows._replace(folder=path if path.is_dir() else path.parent)
    except FileNotFoundError as error:
        if not has_folders:
            wanted = " and ".join(image_columns)
            raise FileNotFoundError(f"{error}, and no sub-folders {wanted}; {contents_of(path)}") from None
    except Exception:
        if not has_folders:
            raise
    if split != "train":
        raise ValueError("folders of images are one split, 'train'")
    # files, if any, have the captions only
    return rows_of_folders(path, dict(zip(image_columns, folders, strict=True)), args.caption_column)


def _rows_of_dataset(dataset, image_root: Path | str, paths: Sequence[str], source: Path | str) -> Rows:
    from datasets import Dataset

    dataset = dataset.with_format(None).to_iterable_dataset() if isinstance(dataset, Dataset) else dataset
    features = {}
    if dataset.features is not None:
        features = dataset.features.to_dict()
        dataset = dataset.decode(False).select_columns(_columns_of(paths, list(dataset.features)))
    rows = (Row(f"row {i}", Path(image_root), values) for i, values in enumerate(dataset))
    return Rows.of(rows, features, [source])


def sub_folders(folder: Path) -> list[str]:
    """Returns the names of a folder's sub-folders that hold data as far as their names tell."""
    return sorted(file.name for file in folder.iterdir() if file.is_dir() and not is_hidden(Path(file.name, "x")))


def contents_of(folder: Path) -> str:
    """Returns which sub-folders and kinds of files a folder holds, for messages; each kind with its first file."""
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if not file.is_dir()]
    by_kind = {}
    for file in (file for file in files if not is_hidden(file)):
        by_kind.setdefault(file.suffix.lower() or "without ending", []).append(str(file))
    kinds = sorted(by_kind.items(), key=lambda item: -len(item[1]))[:5]
    found = [f"sub-folders {', '.join(names[:10])}"] if (names := sub_folders(folder)) else []
    found += [f"files {', '.join(f'{names[0]} ({len(names)} {kind})' for kind, names in kinds)}"] if kinds else []
    return f"it has {' and '.join(found)}" if found else "it is empty"


SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval", "validation_unique", "test_unique")


def find_data_files(path: Path, split: str) -> list[Path]:
    """Returns the files at a path that hold the rows of a split, all of one format.

    A file belongs to the split that a folder above it is named after, or that its own name contains as a word:
    `pairs_train.csv` to train. Files that belong to no split are train if nothing else is. A `metadata` file at the
    top or in the split's folder goes first, with those further down; then parquet and arrow files, also in
    subfolders; then JSONL and CSV at the top or in the split's folder. Hidden files are left alone.

    Raises:
        ValueError, FileNotFoundError: if there are none.
    """
    if path.is_file():
        if suffix_of(path) not in READERS:
            raise ValueError(f"the file ends in {path.suffix or 'nothing'}; allowed: {', '.join(READERS)}")
        return [path]
    files = [
        file for file in sorted(path.rglob("*"))
        if suffix_of(file) in READERS and not is_hidden(file.relative_to(path)) and file.is_file()
    ]  # fmt: skip
    near = [file for file in files if file.parent in (path, path / split)]
    metadata = [file for file in files if file.name.startswith("metadata.") and suffix_of(file) != ".json"]
    groups = [metadata if set(metadata) & set(near) else []]
    for suffix, place in ((".parquet", files), (".arrow", files), (".jsonl", near), (".csv", near)):
        groups.append([file for file in place if suffix_of(file) == suffix])
    for group in groups:
        splits = {file: split_of(file.relative_to(path), {*SPLIT_NAMES, split}) for file in group}
        own = [file for file in group if splits[file] == split]
        if not own and split == "train":
            own = [file for file in group if splits[file] is None]
        if own:
            return own
    raise FileNotFoundError("no parquet, arrow, JSONL or CSV files of this split, and no metadata of an image folder")


def split_of(file: Path, names: Iterable[str]) -> str | None:
    """Returns which of the names a relative path has as a folder, or else its file name contains as a word."""
    for folder in reversed(file.parts[:-1]):
        if folder in names or folder.lower() in names:
            return folder if folder in names else folder.lower()
    words = [name for name in names if re.search(rf"(?i)(?<![^\W\d_]){re.escape(name)}(?![^\W\d_])", file.name)]
    return max(words, key=len, default=None)  # validation_unique is not validation


def suffix_of(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


LEFT_BEHIND = {  # by storage devices, Windows and checks of a disk
    "@eadir", "@recently-snapshot", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "recycler",
    "system volume information", "lost+found", "found.000",
}  # fmt: skip


def is_hidden(path: Path) -> bool:
    """Whether a relative path is hidden, as caches are, or in a folder that systems and file managers leave behind."""
    is_special = any(part.startswith("__") or part.lower() in LEFT_BEHIND for part in path.parts[:-1])
    return is_special or any(part.startswith(".") for part in path.parts)


def _open(file: Path):
    return gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb")


def _read_parquet(file: Path, paths: Sequence[str]) -> tuple[pa.Schema, Iterator[dict[str, Any]]]:
    parquet = pq.ParquetFile(_open(file), pre_buffer=False)
    batches = parquet.iter_batches(16, columns=_columns_of(paths, parquet.schema_arrow.names))
    return parquet.schema_arrow, (row for batch in batches for row in batch.to_pylist())


def _read_arrow(file: Path, paths: Sequence[str]) -> tuple[pa.Schema, Iterator[dict[str, Any]]]:
    try:
        batches = reader = pa.ipc.open_stream(_open(file))
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(_open(file))
        batches = map(reader.get_batch, range(reader.num_record_batches))
    columns = _columns_of(paths, reader.schema.names)
    parts = (batch.select(columns)[i : i + 16] for batch in batches for i in range(0, len(batch), 16))
    return reader.schema, (row for part in parts for row in part.to_pylist())


def _read_json(file: Path, _: Sequence[str] = ()) -> tuple[None, Iterator[dict[str, Any]]]:
    """Reads objects, usually one on each line, or a list of objects, which has to fit into memory."""

    def parse():
        with io.TextIOWrapper(_open(file), encoding="utf-8-sig") as text:
            pending = next((line for line in text if line.strip()), "")
            if pending.lstrip().startswith("["):
                yield from json.loads(pending + text.read())
                return
            for line in itertools.chain([""], text):
                pending += line
                try:
                    value = json.loads(pending) if pending.strip() else None
                except json.JSONDecodeError as error:
                    if error.pos >= len(pending.rstrip()):
                        continue  # an object on several lines
                    raise ValueError(f"not JSON: {pending[:80]!r}: {one_line(error)}") from None
                if pending.strip():
                    yield value
                pending = ""
            if pending:
                raise ValueError(f"ends within an object: {pending[:80]!r}")

    def check(value):
        if not isinstance(value, dict):
            raise ValueError(f"{value!r:.80} is not an object with a field for each column")
        return value

    return None, map(check, parse())


def _read_csv(file: Path, _: Sequence[str]) -> tuple[None, Iterator[dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # base64
    text = io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="")
    header = text.readline()  # spreadsheets separate by semicolons or tabs, too
    text.seek(0)
    rows = csv.DictReader(text, delimiter=max(",;\t", key=header.count))
    missing = (None, "", "nan", "NaN")
    return None, ({k: None if v in missing else v for k, v in row.items() if k is not None} for row in rows)


READERS = {
    ".parquet": _read_parquet, ".arrow": _read_arrow, ".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv,
}  # fmt: skip


def reason_of(error: Exception) -> str:
    """Returns an error's message on one line; where text is not UTF-8, what to do about it."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text, but perhaps Latin-1 or UTF-16; save it as UTF-8"
    return one_line(error)


def _rows_of_files(files: list[Path], image_root: str | None, paths: Sequence[str]) -> Rows:
    is_metadata = files[0].name.startswith("metadata.")  # of an image folder, whose columns get other names

    def read(file):
        try:
            for i, row in enumerate(READERS[suffix_of(file)](file, () if is_metadata else paths)[1]):
                row = _with_columns_of_metadata(row) if is_metadata else row
                yield Row(f"{file.name}, row {i}", Path(image_root or file.parent), row)
        except Exception as error:
            raise ValueError(f"{file}: {reason_of(error)}") from error

    rows = Rows.of(itertools.chain.from_iterable(map(read, files)), {}, files)
    schema = READERS[suffix_of(files[0])](files[0], paths)[0]
    stored = json.loads((schema.metadata or {}).get(b"huggingface", "{}")) if schema is not None else {}
    return rows._replace(features=stored.get("info", {}).get("features") or {})


def _with_columns_of_metadata(value: Any) -> Any:
    """Adds the columns that `datasets` makes of an image folder's metadata: `a` for `a_file_name`."""
    if isinstance(value, list):
        return [_with_columns_of_metadata(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {name: _with_columns_of_metadata(item) for name, item in value.items()}
    added = {}
    for ending, base in (("file_name", "image"), ("file_names", "images")):
        added |= {n.removesuffix(ending).rstrip("_") or base: v for n, v in value.items() if n.endswith(ending)}
    return added | value


IMAGE_SUFFIXES = frozenset(Image.registered_extensions())


CAPTION_SUFFIXES = (".txt", ".caption")


def rows_of_folders(folder: Path, folders: dict[str, Path], caption_column: str) -> Rows:
    """Returns a row for every file name below the subfolders `folders`, with an image's path in each of their columns.

    Names are compared without their suffix. A row's caption is in a .txt or .caption file of the same name, beside one
    of the images or in the folder itself, or in a JSONL file of the folder, whose rows have a `file_name` and any
    further columns.

    Raises:
        ValueError: if a name occurs twice in a subfolder, or no name in all of them.
    """
    images = {column: _images_by_name(place) for column, place in folders.items()}
    names = sorted(set().union(*images.values()))
    if not set.intersection(*map(set, images.values())):
        begins = [f"{column}/{min(files)}" for column, files in images.items() if files]
        begins += [f"{column} (no image; {contents_of(folders[column])})" for column in images if not images[column]]
        raise ValueError(f"no image has the same name in all of the folders, which begin with {', '.join(begins)}")
    known = {}
    for file in sorted(
        file for file in folder.iterdir() if suffix_of(file) == ".jsonl" and not is_hidden(Path(file.name))
    ):
        try:
            known |= {_stem(str(row["file_name"]), folders): row for row in _read_json(file)[1]}
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file} has a line that is no row with a file_name: {reason_of(error)}") from error
    if known and not known.keys() & set(names):
        raise ValueError(f"no file_name of the JSONL is that of an image: {min(known)} is none of {names[0]}, ...")
    captions = [_captions_by_name(place) for place in (*folders.values(), folder)]
    more = "" if known or any(files.keys() & set(names) for files in captions) else f"; {contents_of(folder)}"

    def read():
        for name in names:
            row = {**known.get(name, {}), **{column: files.get(name) for column, files in images.items()}}
            file = next((files[name] for files in captions if name in files), None)
            beside = ", ".join(f"{column}/{name}.txt" for column in folders)
            sought = f"neither {beside} nor {name}.txt in {folder}{more}"
            if caption_column not in row and file:
                # What is not UTF-8 is kept as halves of characters, which `captions` refuses, for this row only.
                row[caption_column] = file.read_text(encoding="utf-8-sig", errors="surrogateescape").strip()
            yield Row(name, folder, {caption_column: None, **row}, str(file or sought))

    return Rows.of(read(), {}, list(folders.values()))


def _stem(name: str, image_columns: Iterable[str] = ()) -> str:
    """Returns an image's relative path without the suffix, and without the column's folder if it begins with one.

    Names from Windows and macOS, with backslashes and with accents as characters of their own, are the same names.
    """
    path = Path(unicodedata.normalize("NFC", name.replace("\\", "/")))
    if len(path.parts) > 1 and path.parts[0] in [unicodedata.normalize("NFC", column) for column in image_columns]:
        path = path.relative_to(path.parts[0])
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def _files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Returns the files below a folder with these suffixes, relative to it and in order; hidden ones are left out."""
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.suffix.lower() in suffixes)
    return [file for file in files if not is_hidden(file)]


def _images_by_name(folder: Path) -> dict[str, str]:
    """Returns the absolute paths of a folder's images by their name below it, without suffix."""
    files = {}
    for file in _files_below(folder, IMAGE_SUFFIXES):
        name = _stem(str(file))
        if name in files:
            raise ValueError(f"{files[name]} and {folder / file} have the same name except for the suffix")
        files[name] = str((folder / file).absolute())
    return files


def _captions_by_name(folder: Path) -> dict[str, Path]:
    """Returns a folder's texts by the name of their image, of which they may keep the suffix: a.txt or a.png.txt."""
    files = [file for file in _files_below(folder, CAPTION_SUFFIXES) if (folder / file).is_file()]
    files.sort(key=lambda file: CAPTION_SUFFIXES.index(file.suffix.lower()), reverse=True)
    return {_stem(str(file.with_suffix(""))): folder / file for file in files}  # .txt before .caption


# 2  Pairs


class Choice(NamedTuple):
    """Which two images of a row are a pair, by their places in the row; of a tie, the first stands for the winner."""

    winner: int
    loser: int
    margin: float = math.nan  # of the winner's score over the loser's, if there are scores
    is_tie: bool = False


LABEL_MEANINGS = {"0.0": 0.0, "0.5": 0.5, "1.0": 1.0, "false": 0.0, "true": 1.0}  # by `label_key`


def label_key(label: Any) -> str:
    """Returns a label as `--label_map` is looked up: text without case, numbers whatever their type."""
    text = unicodedata.normalize("NFC", str(label)).strip().lower()
    try:
        return str(float(text) + 0.0)  # which is 0.0 for -0.0
    except ValueError:
        return text


class PairColumns:
    """Which columns of the data are a pair, by the options, in one of four shapes.

        labels    two images, and a label that says whether image 0 won: Pick-a-Pic's shape, the default
        winners   a winner's column and a loser's
        scores    two images with a score each, higher is better
        groups    a list of images with a list of scores, of which pairs are made

    A column may be a nested field, "prompt.text"; a field of a list's items, "images.score", is the list of them.
    """

    def __init__(self, args):
        self.args, self.label_names = args, []
        # A map replaces the default meanings: a map that does not fit the data is then noticed.
        self.meanings = LABEL_MEANINGS if args.label_map is None else dict(args.label_map)
        self.template = list(string.Formatter().parse(args.caption_template or ""))
        self.shape = (
            "winners" if args.winner_column else "groups" if args.images_column
            else "scores" if args.score_0_column else "labels"
        )  # fmt: skip
        options = {"winners": ("winner_column", "loser_column"), "groups": ("images_column",)}
        options = options.get(self.shape, ("image_0_column", "image_1_column"))
        self.image_columns = [getattr(args, option) for option in options]
        options += ("label_column",) if self.shape == "labels" else ()
        columns = [(f"--{option}", getattr(args, option)) for option in options]
        for option in ("score_0_column", "score_1_column", "scores_column"):
            columns += [(f"--{option}", column) for column in getattr(args, option) or ()]
        columns += [("--caption_template", column) for _, column, _, _ in self.template if column]
        self.columns = columns if args.caption_template else [*columns, ("--caption_column", args.caption_column)]

    def check(self, rows: Rows) -> None:
        """Raises ValueError if the rows lack a column; notes the names of labels that are stored as numbers."""
        for option, path in self.columns:
            if column_of(path, rows.names) is None:
                names = sub_folders(rows.folder) if rows.folder and path in self.image_columns else []
                more = f"; nor is it one of the sub-folders {', '.join(names[:10])}" if names else ""
                raise ValueError(f"{option} {path}: the data has no such column, only {', '.join(rows.names)}{more}")
            if all(value_at(row.values, path, nothing=row) is row for row in rows.head):
                raise ValueError(f"{option} {path}: {column_of(path, rows.names)} has no such field")
        feature = value_at(rows.features, self.args.label_column) if self.shape == "labels" else None
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            self.label_names = feature["names"]
            if not {label_key(name) for name in self.label_names} & self.meanings.keys():
                raise ValueError(
                    f"--label_column {self.args.label_column} holds the names {', '.join(self.label_names)[:200]}; "
                    "say by --label_map what they mean"
                )

    def images(self, row: dict[str, Any]) -> list[Any]:
        """Returns the images of a row in order, as they are stored; raises BadRow if they do not fit the scores."""
        images = [value_at(row, path) for path in self.image_columns]
        if self.shape != "groups":
            return images
        count = len(images[0]) if isinstance(images[0], list) else "no"
        if count != len(self.scores(row)):
            raise BadRow(f"images and scores differ in number: {count} images, {len(self.scores(row))} scores")
        return images[0]

    def choices(self, row: dict[str, Any]) -> list[Choice]:
        """Returns the pairs of a row, ties among them; looks at no image. Raises BadRow without label or scores."""
        if self.shape == "winners":
            return [Choice(0, 1)]
        if self.shape == "labels":
            meaning = self._meaning(value_at(row, self.args.label_column))
            return [Choice(1, 0) if meaning == 0 else Choice(0, 1, is_tie=meaning == 0.5)]
        scores = self.scores(row)
        places = [place for place, score in enumerate(scores) if not math.isnan(score)]
        if len(places) < 2:
            raise BadRow("no score" if self.shape == "scores" else "fewer than two images with a score")
        places.sort(key=lambda place: -scores[place])
        if self.args.pairs_per_group == "all":
            pairs = itertools.combinations(places, 2)
        else:
            pairs = itertools.pairwise(
                places if self.args.pairs_per_group == "adjacent" else places[:: len(places) - 1]
            )
        margins = [(winner, loser, scores[winner] - scores[loser]) for winner, loser in pairs]
        least = self.args.min_score_margin
        return [Choice(winner, loser, margin, margin == 0 or margin < least) for winner, loser, margin in margins]

    def _meaning(self, label: Any) -> float:
        if label is None or label != label:
            raise BadRow("no label")
        if self.label_names and isinstance(label, int) and 0 <= label < len(self.label_names):
            label = self.label_names[label]
        if (key := label_key(label)) not in self.meanings:
            known = "none of 0, 0.5, 1; say what it means by --label_map, such as left=1 right=0"
            known = known if self.args.label_map is None else "not named by --label_map"
            raise BadRow(f"label not understood: --label_column {self.args.label_column} holds {label!r:.80}, {known}")
        return self.meanings[key]

    def scores(self, row: dict[str, Any]) -> list[float]:
        """Returns the score of each image, NaN for one that has none; for rows of scores or groups."""
        if self.shape == "scores":
            pairs = zip(self.args.score_0_column, self.args.score_1_column, strict=True)
            columns = [[value_at(row, path) for path in pair] for pair in pairs]
        else:
            columns = [value_at(row, path) for path in self.args.scores_column]
        if not all(isinstance(column, list) for column in columns):
            raise BadRow("no score")
        if len({len(column) for column in columns}) > 1:
            raise BadRow(f"columns of scores differ in number: {' and '.join(str(len(c)) for c in columns)}")
        weights = self.args.score_weights or [1.0] * len(columns)
        sums = (
            sum(weight * _score(score) for weight, score in zip(weights, of_one_image, strict=True))
            for of_one_image in zip(*columns, strict=True)
        )
        return [total if math.isfinite(total) else math.nan for total in sums]

    def captions(self, row: dict[str, Any], files: str = "") -> list[str]:
        """Returns the captions of a row, at least one; raises BadRow, which tells `files`, if there is none."""
        if self.template:
            values = [(text, as_text(value_at(row, column)) if column else "") for text, column, _, _ in self.template]
            caption = " ".join("".join(text + value for text, value in values).split()).strip(" ,;")
            captions = [caption] if caption and any(value for _, value in values) else []
        else:
            value = value_at(row, self.args.caption_column)
            captions = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
            captions = [text for text in captions if text.strip()]
        if not captions:
            raise BadRow(f"no caption: {files}" if files else "no caption")
        try:
            "".join(captions).encode()
        except UnicodeEncodeError as error:  # half a character, which JSON can hold
            if files and error.object[error.start] >= "\udc80":  # a byte of a file
                raise BadRow(f"caption is not UTF-8, but perhaps Latin-1; save it as UTF-8: {files}") from error
            raise BadRow(f"caption is not valid Unicode: {one_line(error)}") from error
        return captions


def _score(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)  # of a decimal, too
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRow(f"score is not a number: {value!r:.80}") from error


def column_of(path: str, names: Iterable[str]) -> str | None:
    """Returns the column that a path "column.field.field" begins with; column names may contain dots."""
    return max((name for name in names if path == name or path.startswith(name + ".")), key=len, default=None)


def _columns_of(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the columns that the paths begin with; all, for a message, if one of them does not exist."""
    columns = {column_of(path, names) for path in paths}
    return sorted(columns) if columns and None not in columns else list(names)


def value_at(row: dict[str, Any], path: str, nothing: Any = None) -> Any:
    """Returns what a row holds at a path, `nothing` if there is no such field; fields of a list's items are a list."""
    if path in row:
        return row[path]
    column = column_of(path, row)
    value = row[column] if column is not None else None
    for field in path[len(column or path) + 1 :].split("."):
        if isinstance(value, list):
            value = [item.get(field) if isinstance(item, dict) else None for item in value]
        else:
            value = value.get(field, nothing) if isinstance(value, dict) else nothing if value is not None else None
    return value


def as_text(value: Any) -> str:
    """Returns a value of a structured caption in words: lists with commas, the parts of an item with blanks."""
    if isinstance(value, dict):
        return " ".join(filter(None, map(as_text, value.values())))
    if isinstance(value, list):
        items = (" ".join(filter(None, map(as_text, v))) if isinstance(v, list) else as_text(v) for v in value)
        return ", ".join(filter(None, items))
    return "" if value is None or value != value else str(value).strip()


# 3  Images

MAX_SECONDS = 60  # for reading from an address


def read_image(value: Any, image_root: Path | str) -> bytes | Image.Image:
    """Returns the encoded bytes of an image; an image that is already decoded as a PIL image.

    Args:
        value: encoded bytes, also in base64 or as a data: address; a path, relative to `image_root`; an address that
            fsspec opens; a `datasets` image, {"bytes", "path"}; rows of 8-bit pixels.

    Raises:
        BadRow: if there is none.
    """
    value = content_of(value)
    if value is None:
        raise BadRow("no image")
    try:
        if isinstance(value, bytes | Image.Image):
            return value
        if isinstance(value, list):
            pixels = np.asarray(value)
            if pixels.dtype.kind not in "iu" or pixels.size == 0 or pixels.min() < 0 or pixels.max() > 255:
                raise ValueError("a list that does not hold rows of pixels from 0 to 255")
            return Image.fromarray(pixels.astype("u1"))
        if not isinstance(value, str):
            raise ValueError(f"it is of type {type(value).__name__}")
        if value.startswith("data:"):
            return base64.b64decode(value.partition(",")[2])
        if value.startswith("file://"):
            path = Path(value.removeprefix("file://"))
            return _read_file(path if path.exists() else Path(unquote(str(path))))
        if "://" in value[:4096]:
            return _read_address(value.strip())
        return _read_path_or_base64(value, image_root)
    except Exception as error:  # fsspec's file systems raise nearly every kind
        raise BadRow(f"unreadable image: {one_line(error)}") from error


def content_of(value: Any) -> Any:
    """Returns what `read_image` opens of a `datasets` image; other values as they are."""
    return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value


def is_outside(value: Any, image_root: Path | str) -> bool:
    """Whether an image, as `read_image` takes it, is at an address, or in a file that is not below `image_root`."""
    value = content_of(value)
    if not isinstance(value, str) or value.startswith("data:"):
        return False
    if "://" in value[:4096]:
        return True
    try:
        path = _existing(value, image_root)
        return path.exists() and not is_within(path, image_root)
    except (OSError, ValueError):  # base64, which is too long for a path
        return False


def _existing(value: str, root: Path | str) -> Path:
    """Returns the path that a text names in a folder; if that does not exist, the one that another system means by it.

    Windows writes backslashes; macOS writes accents as characters of their own, other systems do not.
    """
    value = os.path.expanduser(value[:4096])
    if (path := Path(root, value)).exists():
        return path
    path = Path(root)
    for part in Path(value.replace("\\", "/")).parts:
        forms = [path / part, *(path / unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        path = next((form for form in forms if form.exists()), forms[0])
    return path


def _read_path_or_base64(value: str, image_root: Path | str) -> bytes:
    path, exists = Path(image_root, os.path.expanduser(value[:4096])), False
    with contextlib.suppress(OSError, ValueError):  # too long for a path, or with a NUL
        path = _existing(value, image_root)
        exists = path.exists()
    if exists:
        return _read_file(path)
    if len(value) >= 32:  # no image file is shorter
        with contextlib.suppress(ValueError):
            text = "".join(value.split()).replace("-", "+").replace("_", "/")
            return base64.b64decode(text, validate=True)
    raise FileNotFoundError(f"no such file: {str(path.absolute())[:250]}")


def _read_file(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"not a regular file: {path}")
    with open(path, "rb") as file:
        return _read_bounded(file)


def _read_bounded(file) -> bytes:
    data = bytearray()
    while part := file.read(2**20):
        data += part
        if len(data) > MAX_IMAGE_BYTES:
            raise ValueError(f"larger than {MAX_IMAGE_BYTES} bytes")
    return bytes(data)


def _read_address(address: str) -> bytes:
    """Reads in a thread: a timeout of the connection alone does not end a slow server that keeps sending bytes."""
    import fsspec  # comes with `datasets`

    outcome = queue.SimpleQueue()

    def read():
        try:
            if address.startswith(("http://", "https://")):
                request = urllib.request.Request(ascii_address(address), headers={"User-Agent": "inversion-dpo"})
                opened = urllib.request.urlopen(request, timeout=MAX_SECONDS)
            else:
                opened = fsspec.open(address, "rb")
            with opened as file:
                outcome.put(_read_bounded(file))
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        data = outcome.get(timeout=MAX_SECONDS)
    except queue.Empty:
        data = TimeoutError(f"not complete after {MAX_SECONDS} seconds")
    if isinstance(data, Exception):
        raise ValueError(f"{one_line(data)}: {address[:200]}") from data
    return data


def ascii_address(address: str) -> str:
    """Returns an http address with blanks and letters beyond ASCII in the form that servers understand."""
    if not (host := urlsplit(address).netloc).isascii():
        address = address.replace(host, host.encode("idna").decode(), 1)
    return quote(re.sub("%(?![0-9a-fA-F]{2})", "%25", address), safe="%/:=&?~#+!$,;'@()*[]")


def to_readable(image: bytes | Image.Image, max_side: int | None = None) -> tuple[bytes, tuple[int, int]]:
    """Returns the bytes of an image file that the training scripts can read, and its (width, height).

    Files stay as they are if they can be read. Others become 8-bit PNG: 16 bits, unusual formats, decoded images. An
    image with a side above `max_side` is shrunk, and saved as JPEG of quality 95 if it was JPEG, else as PNG.

    Raises:
        BadRow: if it cannot be decoded, or its pixels are floating-point numbers.
    """
    is_readable = isinstance(image, bytes)
    try:
        decoded = decode_image(image) if is_readable else _decode_unusual(image)
    except BadRow:  # perhaps not damaged, but only unusual
        decoded, is_readable = _decode_unusual(image), False
    if max_side and max(decoded.size) > max_side:
        is_jpeg = is_readable and Image.open(io.BytesIO(image)).format in ("JPEG", "MPO")
        decoded.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=None)
        image = _encode(decoded, "JPEG" if is_jpeg else "PNG")
    elif not is_readable:
        image = _encode(decoded, "PNG")
    return image, decoded.size if is_readable else decode_image(image).size


def _decode_unusual(image: bytes | Image.Image) -> Image.Image:
    """Returns an upright image with 8 bits a channel, RGB or RGBA."""
    try:
        if isinstance(image, bytes):
            Image.init()  # which knows all formats
            image = Image.open(io.BytesIO(image), formats=tuple(set(Image.OPEN) - {"EPS"}))  # EPS runs a program
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        if image.mode.startswith("I"):  # PIL would clip them
            pixels = np.asarray(image).astype(np.int64)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError("its pixels have more than 16 bits")
            is_16_bit = image.mode != "I" or pixels.max() > 255
            image = Image.fromarray((pixels // 257 if is_16_bit else pixels).astype("u1"))
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Exception as error:  # PIL raises nearly every kind on damaged files
        message = re.sub(r" <_io.BytesIO[^>]*>", "", one_line(error))
        raise BadRow(f"unreadable image: {message}") from error


def _encode(image: Image.Image, image_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **({"quality": 95, "subsampling": 0} if image_format == "JPEG" else {}))
    return file.getvalue()

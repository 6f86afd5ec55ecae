"""Write preference pairs as the training scripts read them by default, and check the folders that tools write to."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_BYTES = 32 * 2**20  # of images, which wait in memory


def check_output_dir(output_dir, error):
    """Ends the program by `error` if the folder holds parquet files or cannot be written to; does not make it."""
    output_dir = Path(output_dir)
    if any(output_dir.rglob("*.parquet")):
        error(f"--output_dir {output_dir}: already holds parquet files; give another folder or remove them")
    check_folder(output_dir, error)


def check_folder(output_dir, error):
    """Ends the program by `error` if the folder cannot be written to, before any work is done; does not make it."""
    folder = Path(output_dir).absolute()
    existing = next(folder for folder in (folder, *folder.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "cannot be written to" if existing.is_dir() else "is a file"
        error(f"--output_dir {output_dir}: {existing} {problem}")


class PairWriter:
    """Writes pairs as `train-<i>-of-<n>.parquet`, n files of a folder that appear there when all are complete.

    Columns: `jpg_0` and `jpg_1` (image files of any format, typed as `datasets.Image`), `label_0` (1 if image 0 won,
    0 if image 1 won, 0.5 for a tie), `caption`, and perhaps `strength`. Which image comes first is random for each
    pair, so that the order of the columns does not tell who won.

    Use it as a context manager; if the block raises, no file stays.

    Args:
        seed: of the random order.
        has_captions: whether `caption` is a list of texts.
        has_strength: whether there is a column `strength`.
        max_file_bytes: about how large a file may grow; memory does not depend on it.
    """

    def __init__(self, output_dir, seed, has_captions=False, has_strength=False, max_file_bytes=500e6):
        from datasets import Features, Image, List, Value

        self.output_dir, self.max_file_bytes = Path(output_dir), max_file_bytes
        self.rng = np.random.default_rng(seed)
        features = {"jpg_0": Image(), "jpg_1": Image(), "label_0": Value("float64"), "caption": Value("string")}
        if has_captions:
            features["caption"] = List(Value("string"))
        if has_strength:
            features["strength"] = Value("float64")
        self.schema = Features(features).arrow_schema  # its metadata tell the Hub's viewer what is an image
        self.num_pairs = self.file_bytes = self.group_bytes = 0
        self.rows, self.files, self.parquet = [], [], None

    def __enter__(self):
        self.output_dir.mkdir(parents=True, exist_ok=True)
        # Should this be killed: readers of the folder take no file with another suffix for one of their own.
        self.unfinished = tempfile.TemporaryDirectory(prefix="unfinished-", dir=self.output_dir)
        return self

    def add(self, winner, loser, caption, is_tie=False, strength=None):
        """Adds a pair: the bytes of two image files, a caption or a list of captions, perhaps a strength."""
        winner_place = 0 if self.rng.random() < 0.5 else 1
        row = {"label_0": 0.5 if is_tie else 1.0 - winner_place, "caption": caption}
        row[f"jpg_{winner_place}"] = {"bytes": winner, "path": None}
        row[f"jpg_{1 - winner_place}"] = {"bytes": loser, "path": None}
        if strength is not None:
            row["strength"] = strength
        self.rows.append(row)
        self.num_pairs += 1
        self.group_bytes += len(winner) + len(loser)
        if self.group_bytes >= min(ROW_GROUP_BYTES, self.max_file_bytes):
            self._write_rows()

    def _write_rows(self):
        if self.parquet is None:
            self.files.append(Path(self.unfinished.name) / f"{len(self.files)}.part")
            self.parquet = pq.ParquetWriter(self.files[-1], self.schema)
        self.parquet.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.file_bytes += self.group_bytes
        self.rows, self.group_bytes = [], 0
        if self.file_bytes >= self.max_file_bytes:
            self._close_file()

    def _close_file(self):
        if self.parquet is not None:
            self.parquet.close()
        self.parquet, self.file_bytes = None, 0

    def __exit__(self, kind, *_):
        with self.unfinished:
            if kind is None and self.rows:
                self._write_rows()
            self._close_file()
            if kind is None:
                for i, file in enumerate(self.files):
                    file.rename(self.output_dir / f"train-{i:05}-of-{len(self.files):05}.parquet")

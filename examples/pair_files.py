"""Writing preference pairs as the training scripts read them by default: what convert_pairs and sample_pairs share."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_BYTES = 32 * 2**20  # of images, which wait in memory


def check_output_dir(output_dir, error):
    """Ends the program by `error` if parquet files are in the folder, or if there cannot be a folder."""
    output_dir = Path(output_dir)
    if any(output_dir.rglob("*.parquet")):
        error(f"--output_dir {output_dir}: already holds parquet files; give another folder or remove them")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        error(f"--output_dir {output_dir}: {problem.strerror}")


class PairWriter:
    """Writes pairs as `train-<i>-of-<n>.parquet`, n files of a folder that appear there when all are complete.

    Columns: `jpg_0` and `jpg_1` (image files of any format as bytes), `label_0` (1 if image 0 won, 0 if image 1 won,
    0.5 for a tie), `caption`, and with `has_scores` also `score_0` and `score_1`. Which image comes first is drawn for
    each pair, so that the order of the columns does not tell who won.

    Use it as a context manager; if the block raises, nothing stays.

    Args:
        seed: of the draws.
        has_captions: whether `caption` is a list of them.
        max_file_bytes: about how large a file may grow; memory does not depend on it.
    """

    def __init__(self, output_dir, seed, has_scores=False, has_captions=False, max_file_bytes=500e6):
        self.output_dir, self.max_file_bytes = Path(output_dir), max_file_bytes
        self.rng = np.random.default_rng(seed)
        fields = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64()}
        fields["caption"] = pa.list_(pa.string()) if has_captions else pa.string()
        if has_scores:
            fields |= {"score_0": pa.float64(), "score_1": pa.float64()}
        self.schema = pa.schema(fields)
        self.num_pairs = self.num_bytes = self.file_bytes = self.group_bytes = 0
        self.rows, self.files, self.parquet = [], [], None

    def __enter__(self):
        # A reader of the folder takes no file of another suffix for one of its own, should this be killed.
        self.unfinished = tempfile.TemporaryDirectory(prefix="unfinished-", dir=self.output_dir)
        return self

    def add(self, winner, loser, caption, is_tie=False, scores=None):
        """Adds a pair: bytes of two image files; `scores` are those of winner and loser."""
        order = [0, 1] if self.rng.random() < 0.5 else [1, 0]  # the place of the winner, and of the loser
        row = {"label_0": 0.5 if is_tie else float(order[0] == 0), "caption": caption}
        for place, image in zip(order, (winner, loser), strict=True):
            row[f"jpg_{place}"] = image
        for place, score in zip(order, scores or (), strict=False):
            row[f"score_{place}"] = score
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
        self.num_bytes += self.group_bytes
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

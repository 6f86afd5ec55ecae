"""Preference pairs: from files on disk to the examples that the loop sees."""

import io
import itertools

import numpy as np
import pytest
import torch
from conftest import encode, pair_rows, random_image, write_parquet
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from inversion_utils import (
    BadRow,
    PairColumns,
    PreferenceDataset,
    PreferencePairs,
    RowLog,
    Source,
    VisitBatches,
    decode_image,
    forward_noise,
    load_rows,
    resize_and_crop,
)

COLUMNS = PairColumns()


def labelled(rows, **options):
    return PreferencePairs(Source(Dataset.from_list(rows), "."), COLUMNS, **options)


def preferences(pairs, resolution=32, num_targets=2, seed=0, crop=False, flip=False, empty=0.0):
    return PreferenceDataset(pairs, resolution, num_targets, seed, crop, flip, empty)


def brightness(value):
    return np.asarray(decode_image(value), dtype=float).mean()


def save_parquet(rows, folder):
    return write_parquet(rows, folder)


def save_to_disk(rows, folder):
    Dataset.from_list(rows).save_to_disk(folder)
    return folder


def save_splits_to_disk(rows, folder):
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(folder)
    return folder


def save_image_features(rows, folder):
    features = Features(jpg_0=Image(), jpg_1=Image(), label_0=Value("float64"), caption=Value("string"))
    Dataset.from_list(rows).cast(features).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("save", [save_parquet, save_to_disk, save_splits_to_disk, save_image_features])
def test_winners_win_whatever_the_storage(save, tmp_path):
    """The rows' winners are bright, whichever column they stand in."""
    rows = pair_rows(8)
    assert {row["label_0"] for row in rows} == {0.0, 1.0}
    pairs = PreferencePairs(load_rows(train_data_dir=save(rows, tmp_path / "data")), COLUMNS)
    assert len(pairs) == 8
    for pair, row in zip(pairs, rows, strict=True):
        assert brightness(pair.winner) > 127 > brightness(pair.loser)
        assert pair.captions == [row["caption"]]


def test_another_split_and_other_columns(tmp_path):
    rows = [{"better?": 1, "a": r["jpg_0"], "b": r["jpg_1"], "text": r["caption"]} for r in pair_rows(3)]
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:2])}).save_to_disk(tmp_path / "d")
    columns = PairColumns(image_0_column="a", image_1_column="b", label_column="better?", caption_column="text")
    pairs = PreferencePairs(load_rows(train_data_dir=str(tmp_path / "d"), split="test"), columns)
    assert len(pairs) == 2 and pairs[0].winner == rows[0]["a"]


def test_a_folder_of_parquet_files_may_hold_other_files_and_splits(tmp_path):
    """An output folder below it for one, with the JSON files of its checkpoints."""
    rows = pair_rows(5)
    Dataset.from_list(rows[:2]).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    Dataset.from_list(rows[2:3]).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    (tmp_path / "test").mkdir()
    Dataset.from_list(rows[3:]).to_parquet(tmp_path / "test" / "data.parquet")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training_state.json").write_text("{}")
    assert load_rows(train_data_dir=str(tmp_path)).rows["jpg_0"][:] == [row["jpg_0"] for row in rows[:3]]
    assert len(load_rows(train_data_dir=str(tmp_path), split="test").rows) == 2
    (tmp_path / "test" / "data.parquet").rename(tmp_path / "other.parquet")
    assert len(load_rows(train_data_dir=str(tmp_path)).rows) == 3
    with pytest.raises(ValueError, match="split 'test', cannot be loaded: no parquet, arrow"):
        load_rows(train_data_dir=str(tmp_path), split="test")


def test_ties_and_rows_without_a_label_are_left_out_and_counted():
    rows = pair_rows(6)
    for row, label in zip(rows, (1.0, 0.5, 0.0, None, float("nan"), 2.0), strict=True):
        row["label_0"] = label
    pairs = labelled(rows)
    assert pairs.kept["row"].tolist() == [0, 2] and pairs.num_ties == 1
    counts = {"pairs": 2, "ties left out": 1, "rows skipped for no label": 2}
    assert pairs.counts() == {**counts, "rows skipped for label not understood": 1}
    assert pairs.row_name(1) == "row 2"
    assert len(labelled(rows, max_pairs=1)) == 1


def test_formats_and_modes_become_upright_rgb():
    red = PILImage.new("RGB", (6, 4), (250, 0, 0))
    assert decode_image(encode(red)).getpixel((0, 0)) == (250, 0, 0)
    assert decode_image({"bytes": encode(red), "path": None}).getpixel((0, 0)) == (250, 0, 0)
    assert decode_image(red.convert("P")).mode == "RGB"
    assert decode_image(encode(PILImage.new("L", (6, 4), 7))).getpixel((0, 0)) == (7, 7, 7)
    transparent = PILImage.new("RGBA", (6, 4), (250, 0, 0, 0))
    assert decode_image(encode(transparent)).getpixel((0, 0)) == (255, 255, 255)
    exif = PILImage.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    assert decode_image(encode(red, "JPEG", exif=exif)).size == (4, 6)


def test_a_path_is_read(tmp_path):
    PILImage.new("RGB", (6, 4), "blue").save(tmp_path / "x.png")
    assert decode_image(str(tmp_path / "x.png")).getpixel((0, 0)) == (0, 0, 255)
    assert decode_image({"bytes": None, "path": str(tmp_path / "x.png")}).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("value", [b"", b"nonsense", None, 3, {"bytes": None, "path": None}, "no/such/file.png"])
def test_what_is_no_image_is_a_bad_row(value):
    with pytest.raises(BadRow, match="unreadable image|no image"):
        decode_image(value)


def test_damaged_bytes_are_bad_rows_or_images(tmp_path):
    """Whatever happens to the bytes of a file, the answer is an image or a BadRow."""
    rng = np.random.default_rng(0)
    image = random_image(rng)
    refused = 0
    for image_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encode(image, image_format)
        for _ in range(40):
            damaged = bytearray(data)
            for position in rng.integers(len(data), size=8):
                damaged[position] = rng.integers(256)
            try:
                assert decode_image(bytes(damaged[: rng.integers(len(data))])).mode == "RGB"
            except BadRow:
                refused += 1
    assert refused > 100


def test_pixels_are_scaled_and_the_shorter_side_fits():
    image = PILImage.new("RGB", (40, 20), (255, 0, 0))
    pixels = resize_and_crop(image, 16, (0.5, 0.5), flip=False).pixels
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert (pixels[0] == 1).all() and (pixels[1:] == -1).all()


@pytest.mark.parametrize(("left", "expected"), [(0.0, 0), (0.5, 8), (1.0, 16)])
def test_crop_and_flip_are_relative(left, expected):
    ramp = np.tile(np.arange(32, dtype=np.uint8)[None, :, None], (16, 1, 3))
    view = resize_and_crop(PILImage.fromarray(ramp), 16, (0.0, left), flip=False)
    mirrored = resize_and_crop(PILImage.fromarray(ramp[:, ::-1]), 16, (0.0, left), flip=True)
    assert torch.allclose((view.pixels[0, 0] + 1) * 127.5, torch.arange(expected, expected + 16.0), atol=1e-4)
    assert torch.equal(mirrored.pixels, view.pixels)
    assert view.corner == mirrored.corner == (0, expected)


def test_views_tell_the_original_size_and_the_corner_in_resized_pixels():
    """As SDXL's micro-conditioning wants them: (height, width) before resizing, (top, left) after it."""
    tall = resize_and_crop(PILImage.new("RGB", (100, 300)), 64, (1.0, 0.5), flip=False)
    assert tall.original_size == (300, 100) and tall.corner == (192 - 64, 0)
    exif = PILImage.Exif()
    exif[0x0112] = 6
    turned = encode(PILImage.new("RGB", (100, 300)), "JPEG", exif=exif)
    assert resize_and_crop(decode_image(turned), 64, (0.5, 0.5), flip=False).original_size == (100, 300)


@pytest.mark.parametrize("size", [(90, 50), (41, 77), (64, 64), (33, 200)])
def test_resizing_the_window_comes_to_cutting_the_resized_image(size):
    image = random_image(np.random.default_rng(0), size)
    for top, left in ((0.0, 0.0), (0.5, 0.3), (1.0, 1.0)):
        view = resize_and_crop(image, 24, (top, left), flip=False)
        scale = 24 / min(size)
        whole = image.resize([max(24, round(side * scale)) for side in size], PILImage.Resampling.LANCZOS)
        y, x = view.corner
        expected = np.asarray(whole, dtype=int)[y : y + 24, x : x + 24]
        assert np.abs((view.pixels.numpy().transpose(1, 2, 0) + 1) * 127.5 - expected).max() < 3


def test_winner_and_loser_are_cut_alike_and_visits_are_not():
    """Both images of the pair are the same ramp, so cut and flipped alike they stay equal."""
    ramp = PILImage.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    row = {"jpg_0": encode(ramp), "jpg_1": encode(ramp, "BMP"), "label_0": 1.0, "caption": "ramp"}
    dataset = preferences(labelled([row]), crop=True, flip=True)
    views = [dataset[visit, 0]["pixel_values"] for visit in range(16)]
    assert all(torch.equal(winner, loser) for winner, loser in views)
    assert len({tuple(view[0, 0, 0].tolist()) for view in views}) > 12
    assert {bool(view[0, 0, 0, 0] < view[0, 0, 0, -1]) for view in views} == {True, False}


def test_the_example_depends_on_seed_and_visit_alone():
    pairs = labelled(pair_rows(4))
    one, again = (preferences(pairs, crop=True, flip=True, empty=0.5)[7, 2] for _ in range(2))
    assert torch.equal(one["pixel_values"], again["pixel_values"]) and torch.equal(one["uniforms"], again["uniforms"])
    assert one["caption"] == again["caption"] and one["visit"] == 7
    assert not torch.equal(one["uniforms"], preferences(pairs)[8, 2]["uniforms"])
    assert not torch.equal(one["uniforms"], preferences(pairs, seed=1)[7, 2]["uniforms"])
    assert one["uniforms"].shape == (2,) and ((0 <= one["uniforms"]) & (one["uniforms"] < 1)).all()


def test_captions_are_emptied_in_the_given_share():
    dataset = preferences(labelled(pair_rows(1)), resolution=8, empty=0.2)
    empty = sum(dataset[visit, 0]["caption"] == "" for visit in range(400))
    assert 50 < empty < 115


def test_a_bad_row_is_replaced_within_its_visit():
    rows = pair_rows(4)
    rows[1]["jpg_0"] = b"damaged"
    dataset = preferences(labelled(rows), crop=True)
    example = dataset[5, 1]
    assert [name for name, _ in example["bad_rows"]] == ["row 1"] * len(example["bad_rows"]) != []
    assert example["caption"] in {rows[i]["caption"] for i in (0, 2, 3)}
    assert torch.equal(example["uniforms"], dataset[5, 0]["uniforms"])
    assert torch.equal(example["pixel_values"], dataset[5, 1]["pixel_values"])


def test_what_nobody_foresaw_names_its_row(monkeypatch):
    monkeypatch.setattr("inversion_utils.resize_and_crop", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match="^row 2: ZeroDivisionError: division by zero"):
        preferences(labelled(pair_rows(3)))[0, 2]


def test_bad_rows_are_named_once_and_counted():
    lines = []
    log = RowLog(lines.append, "is skipped", {}, named=2)
    log.add([("row 1", "why"), ("row 1", "why")])
    log.add([("row 2", "why"), ("row 3", "why")])
    assert len(log.reasons) == 3 and len(lines) == 2 and "row 1" in lines[0] and "row 2" in lines[1]


def first(batches, count):
    return list(itertools.islice(batches, count))


def test_an_epoch_visits_every_pair_once_in_another_order():
    visits = [item for batch in first(VisitBatches(10, 5, seed=0), 4) for item in batch]
    assert [visit for visit, _ in visits] == list(range(20))
    epochs = [[index for _, index in visits[:10]], [index for _, index in visits[10:]]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert epochs[0] != [index for batch in first(VisitBatches(10, 5, seed=1), 2) for _, index in batch]


@pytest.mark.parametrize("num_pairs", [3, 10])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes_share_the_same_visits(num_pairs, num_processes):
    """Also where the data set is smaller than a batch, and where batches straddle epochs."""
    size = 8 // num_processes
    shares = [
        first(VisitBatches(num_pairs, size, 0, process_index=rank, num_processes=num_processes), 3)
        for rank in range(num_processes)
    ]
    together = sorted(item for share in shares for batch in share for item in batch)
    assert together == [item for batch in first(VisitBatches(num_pairs, 8, 0), 3) for item in batch]


def test_a_restart_continues_the_visits():
    whole = first(VisitBatches(7, 4, 0), 6)
    assert first(VisitBatches(7, 4, 0, first_visit=8), 4) == whole[2:]


def test_forward_noise_is_shared_within_a_pair_and_belongs_to_the_visit():
    noise = forward_noise([3, 4], seed=0, shape=(2, 4, 8, 8))
    assert noise.shape == (2, 4, 4, 8, 8)
    assert torch.equal(noise[:, :2], noise[:, 2:])
    assert torch.equal(noise[:, 1], forward_noise([4], seed=0, shape=(2, 4, 8, 8))[:, 0])
    assert not torch.equal(noise[0, 0], noise[0, 1]) and not torch.equal(noise[0, 0], noise[1, 0])
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_an_image_survives_the_way_to_the_batch(tmp_path):
    """A picture of the training size arrives pixel for pixel."""
    picture = random_image(np.random.default_rng(0), (32, 32))
    row = {"jpg_0": encode(PILImage.new("RGB", (32, 32))), "jpg_1": encode(picture), "label_0": 0.0, "caption": "x"}
    rows = load_rows(train_data_dir=write_parquet([row], tmp_path / "one"))
    winner, loser = preferences(PreferencePairs(rows, COLUMNS))[0, 0]["pixel_values"]
    assert np.array_equal(((winner + 1) * 127.5).round().byte().numpy().transpose(1, 2, 0), np.asarray(picture))
    assert (loser == -1).all()
    assert PILImage.open(io.BytesIO(row["jpg_1"])).size == (32, 32)

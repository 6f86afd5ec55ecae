"""Preference pairs: from files on disk to the examples that the loop sees."""

import errno
import itertools
import json
import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CAPTIONS, assert_same, command_line, encode, logged, lora, pair_rows, random_image, write_parquet
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageCms, PngImagePlugin

import train_inversion_dpo
import training_utils
from training_utils import (
    BadRow,
    PreferenceDataset,
    decode_image,
    forward_noise,
    load_pairs,
    resize_and_crop,
    visit_batches,
)

COLUMNS = {"image_0": "jpg_0", "image_1": "jpg_1", "label": "label_0", "caption": "caption"}
WINNERS = {"winner_column": "jpg_0", "loser_column": "jpg_1"}


def pairs_in(folder, **options):
    """The pairs that the script reads from a folder with these options."""
    words = command_line(pretrained_model_name_or_path="m", output_dir="o", train_data_dir=folder, **options)
    return load_pairs(train_inversion_dpo.parse_args(words)[0])


def examples(pairs, resolution=32, num_targets=2, seed=0, crop=False, flip=False, empty=0.0):
    return PreferenceDataset(pairs, resolution, num_targets, seed, crop, flip, empty)


def brightness(data):
    return np.asarray(decode_image(data), dtype=float).mean()


def check_winners_are_bright(pairs, count):
    assert len(pairs) == count
    for place in range(count):
        assert brightness(pairs[place].winner) > 127 > brightness(pairs[place].loser)


# Labels, captions, strengths


@pytest.mark.parametrize("kind", ["float32", "float64", "int64", "int8", "uint8", "bool"])
def test_the_label_says_which_image_is_better(tmp_path, kind):
    """The rows' winners are bright, whichever column they stand in."""
    rows = pair_rows(8)
    assert {row["label_0"] for row in rows} == {0.0, 1.0}
    data = Dataset.from_list(rows)
    data.cast_column("label_0", Value(kind)).to_parquet(tmp_path / "train.parquet")
    check_winners_are_bright(pairs_in(tmp_path), 8)


def test_winner_and_loser_columns(tmp_path):
    rows = [{"chosen": r["jpg_1"], "rejected": r["jpg_0"], "caption": "x"} for r in pair_rows(8) if not r["label_0"]]
    write_parquet(rows, tmp_path)
    check_winners_are_bright(pairs_in(tmp_path, winner_column="chosen", loser_column="rejected"), len(rows))


def test_ties_and_rows_without_a_usable_label_or_strength_are_left_out_and_counted(tmp_path):
    labels, strengths = (1.0, 0.5, 0.0, None, float("nan"), 2.0, 1.0, 1.0, 1.0), (0, 1, 0.5, 1, 1, 1, 1, 1.1, None)
    data = zip(pair_rows(9), labels, strengths, strict=True)
    write_parquet(
        [{**row, "label_0": label, "sure": float(s) if s is not None else s} for row, label, s in data], tmp_path
    )
    for options, kept in (
        ({}, [0, 2, 6]),
        ({"tie_policy": "soft"}, [0, 1, 2, 6]),
        ({"max_train_samples": 2}, [0, 2]),
        ({"max_train_samples": 99}, [0, 2, 6]),
    ):
        pairs = pairs_in(tmp_path, strength_column="sure", **options)
        assert [pairs.row_name(place) for place in range(len(pairs))] == [f"row {row}" for row in kept]
        assert [pairs[place].is_tie for place in range(len(pairs))] == [row == 1 for row in kept]
        assert [pairs[place].strength for place in range(len(pairs))] == [float(strengths[row]) for row in kept]
        assert (pairs.num_ties, pairs.num_unusable) == (1, 5)


def test_each_visit_takes_one_of_several_captions(tmp_path):
    captions = ["a", "b", "c", "", None]
    write_parquet([{**row, "caption": captions} for row in pair_rows(2)], tmp_path)
    dataset = examples(pairs_in(tmp_path))
    taken = [dataset[(0, visit), 0]["caption"] for visit in range(30)]
    assert set(taken) == {"a", "b", "c"}
    assert taken == [dataset[(0, visit), 0]["caption"] for visit in range(30)]


def test_a_strength_scales_the_logits(train, tmp_path):
    """So a half with twice the beta is a whole, to the bit."""
    rows = pair_rows()
    whole = write_parquet([{**row, "sure": 1.0} for row in rows], tmp_path / "whole")
    half = write_parquet([{**row, "sure": 0.5} for row in rows], tmp_path / "half")
    options = {"objective": "inpo", "inversion_steps": 1, "learning_rate": 1e-3, "strength_column": "sure"}
    a = train("a", train_data_dir=whole, beta_dpo=1000, **options)
    b = train("b", train_data_dir=half, beta_dpo=2000, **options)
    assert_same(lora(a), lora(b))
    assert logged(b, "rewards/margins")[1] == 2 * logged(a, "rewards/margins")[1] != 0


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("label", "image_0"),
        ("label", ClassLabel(names=["image_0", "image_1"])),
        ("image_0", "images/1.png"),
        ("image_1", "https://example.org/1.png"),
        ("caption", 3),
        ("strength", "high"),
        ("strength", None),
    ],
    ids=str,
)
def test_columns_of_another_kind_are_refused_and_the_converter_is_named(refused, no_models, tmp_path, column, values):
    rows, name = pair_rows(2), {**COLUMNS, "strength": "sure"}[column]
    values, feature = (1, values) if isinstance(values, ClassLabel) else (values, None)
    if values is not None:
        rows = [{**row, name: values} for row in rows]
    data = Dataset.from_list(rows)
    if feature:
        data = data.cast_column(name, feature)
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    message = refused(train_data_dir=tmp_path / "data", **({"strength_column": name} if column == "strength" else {}))
    assert f"--{column}_column {name}" in message and "examples/convert_pairs.py" in message


# Storage


def save_parquet(rows, folder):
    write_parquet(rows, folder)


def save_image_features(rows, folder):
    features = Features(jpg_0=Image(), jpg_1=Image(), label_0=Value("float64"), caption=Value("string"))
    folder.mkdir()
    Dataset.from_list(rows).cast(features).to_parquet(folder / "train.parquet")


def save_plain_structs(rows, folder):
    """As other tools than `datasets` write images: no features are named in the file."""
    folder.mkdir()
    rows = [{**row, **{c: {"bytes": row[c], "path": None} for c in ("jpg_0", "jpg_1")}} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def save_to_disk(rows, folder):
    Dataset.from_list(rows).save_to_disk(folder)


def save_splits_to_disk(rows, folder):
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(folder)


def save_image_folder(rows, folder):
    """The layout that `datasets` documents for folders of images: metadata.jsonl names files beside it."""
    (folder / "train").mkdir(parents=True)
    lines = []
    for i, row in enumerate(rows):
        line = {"label_0": row["label_0"], "caption": row["caption"]}
        for column in ("jpg_0", "jpg_1"):
            (folder / "train" / f"{i}_{column}.png").write_bytes(row[column])
            line[f"{column}_file_name"] = f"{i}_{column}.png"
        lines.append(json.dumps(line))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))


STORAGES = [
    save_parquet,
    save_image_features,
    save_plain_structs,
    save_to_disk,
    save_splits_to_disk,
    save_image_folder,
]


@pytest.mark.parametrize("save", STORAGES)
def test_winners_win_whatever_the_storage(save, tmp_path):
    rows = pair_rows(6)
    save(rows, tmp_path / "data")
    pairs = pairs_in(tmp_path / "data")
    check_winners_are_bright(pairs, 6)
    assert sorted(pair.captions[0] for pair in (pairs[i] for i in range(6))) == sorted(r["caption"] for r in rows)
    if save in (save_splits_to_disk, save_image_folder):
        names = {"dataset_split_name": "test"}
        if save is save_splits_to_disk:
            assert len(pairs_in(tmp_path / "data", **names)) == 1
        else:
            with pytest.raises(ValueError, match="--train_data_dir"):
                pairs_in(tmp_path / "data", **names)


def save_paths(folder, *paths):
    """Rows whose winners are files by path, and whose losers are images."""
    rows = pair_rows(len(paths))
    for row, path in zip(rows, paths, strict=True):
        row |= {"jpg_0": {"bytes": None, "path": str(path)}, "jpg_1": {"bytes": row["jpg_1"], "path": None}}
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def test_only_files_within_the_datas_folder_are_read(tmp_path):
    """A data set from elsewhere must not read what else lies on the disk, nor wait for pipes and devices."""
    folder = tmp_path / "data"
    folder.mkdir()
    for place in (folder / "inside.png", tmp_path / "outside.png"):
        place.write_bytes(encode(PILImage.new("RGB", (8, 8), "blue")))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    names = ["inside.png", "link.png", "no-such.png", "pipe.png", ".", "../outside.png", "loop.png", "\0", "x" * 5000]
    save_paths(folder, *(folder / name for name in names), "/dev/zero")
    pairs = pairs_in(folder, **WINNERS)
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a pipe or a device was read"))
    signal.alarm(20)
    try:
        for place in (0, 1):  # a link in the folder is the user's own, and the Hub's cache is made of them
            assert decode_image(pairs[place].winner).getpixel((0, 0)) == (0, 0, 255)
        for place in range(2, len(pairs)):
            with pytest.raises(BadRow):
                pairs[place]
        pairs.folder = None  # as for data from the Hub, whose files lie in its cache
        for place in (2, 3, 4, 6, 7, 8, 9):
            with pytest.raises(BadRow):
                pairs[place]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(encode(PILImage.new("RGB", (8, 8), "blue")) + bytes(2000))
    save_paths(tmp_path, tmp_path / "large.png")
    assert pairs_in(tmp_path, **WINNERS)[0]
    monkeypatch.setattr(training_utils, "MAX_IMAGE_BYTES", 2000)
    with pytest.raises(BadRow, match="2000 bytes"):
        pairs_in(tmp_path, **WINNERS)[0]


def test_an_image_folder_behind_a_link(tmp_path):
    real, folder = tmp_path / "real", tmp_path / "data"
    for name, color in (("chosen", "white"), ("rejected", "black")):
        (real / name).mkdir(parents=True)
        PILImage.new("RGB", (8, 8), color).save(real / name / "0.png")
    row = {"chosen_file_name": "chosen/0.png", "rejected_file_name": "rejected/0.png", "caption": "a"}
    (real / "metadata.jsonl").write_text(json.dumps(row))
    folder.symlink_to(real)
    pair = pairs_in(folder, winner_column="chosen", loser_column="rejected")[0]
    assert decode_image(pair.winner).getpixel((0, 0)) == (255, 255, 255)


# Images


def test_formats_and_modes_become_upright_rgb():
    red, size = (250, 0, 0), (6, 4)
    image, clear = PILImage.new("RGB", size, red), PILImage.new("RGBA", size, (*red, 0))
    frames = {"save_all": True, "append_images": [PILImage.new("RGB", size, "blue")], "duration": 100}
    for data, expected in (
        (encode(image), red),
        (encode(image.convert("P", palette=PILImage.Palette.ADAPTIVE)), red),
        (encode(image, "GIF", **frames), red),
        (encode(image, "WEBP", lossless=True, **frames), red),
        (encode(PILImage.new("L", size, 7)), (7, 7, 7)),
        (encode(PILImage.new("1", size, 1)), (255, 255, 255)),
        (encode(PILImage.new("CMYK", size, (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (encode(clear), (255, 255, 255)),
        (encode(PILImage.new("RGBA", size, (0, 0, 0, 51))), (204, 204, 204)),
        (encode(PILImage.new("LA", size, (0, 0))), (255, 255, 255)),
        (encode(PILImage.new("P", size, 0), transparency=0), (255, 255, 255)),
    ):
        decoded = decode_image(data)
        assert decoded.mode == "RGB" and decoded.size == size and decoded.info["original_size"] == size[::-1]
        assert np.abs(np.subtract(decoded.getpixel((0, 0)), expected)).max() <= 1
    exif = PILImage.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    for image_format in ("JPEG", "PNG", "WEBP", "TIFF"):
        turned = decode_image(encode(image, image_format, exif=exif))
        assert turned.size == turned.info["original_size"][::-1] == (4, 6)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_eight_bits_are_unreadable(mode):
    with pytest.raises(BadRow):
        decode_image(encode(PILImage.new(mode, (6, 4)), "TIFF"))


def test_damaged_bytes_are_bad_rows_or_images():
    """Whatever happens to the bytes of a file, the answer is an image or a BadRow."""
    rng, refused = np.random.default_rng(0), 0
    image = random_image(rng)
    for image_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encode(image, image_format)
        for _ in range(40):
            damaged = bytearray(data)
            for position in rng.integers(len(data), size=8):
                damaged[position] = rng.integers(256)
            try:
                assert decode_image(bytes(damaged[: rng.integers(len(data))]), 8).mode == "RGB"
            except BadRow:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(1600, 1200), (700, 1500)])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(size, orientation):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = encode(random_image(np.random.default_rng(0), size), "JPEG", exif=exif, quality=95)
    full, small = decode_image(data), decode_image(data, min_side=128)
    assert full.info["original_size"] == (size if orientation == 6 else size[::-1]) == small.info["original_size"]
    assert 128 <= min(small.size) <= min(full.size) / 4
    (expected, expected_ids), (pixels, time_ids) = (
        resize_and_crop(x, 64, (0.3, 0.7), flip=True) for x in (full, small)
    )
    assert torch.equal(time_ids, expected_ids)
    difference = (pixels - expected).abs() * 127.5
    assert difference.mean() < 1 and difference.max() < 8


@pytest.mark.parametrize(("left", "expected"), [(0.0, 0), (0.5, 8), (1.0, 16)])
def test_crop_and_flip_are_relative(left, expected):
    ramp = np.tile(np.arange(32, dtype=np.uint8)[None, :, None], (16, 1, 3))
    images = [decode_image(encode(PILImage.fromarray(array))) for array in (ramp, ramp[:, ::-1].copy())]
    pixels, time_ids = resize_and_crop(images[0], 16, (0.0, left), flip=False)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert torch.allclose((pixels[0, 0] + 1) * 127.5, torch.arange(expected, expected + 16.0), atol=1e-4)
    mirrored, mirrored_ids = resize_and_crop(images[1], 16, (0.0, left), flip=True)
    assert torch.equal(mirrored, pixels) and torch.equal(mirrored_ids, time_ids)
    assert time_ids.tolist() == [16, 32, 0, expected, 16, 16]


@pytest.mark.parametrize("size", [(90, 50), (41, 77), (64, 64), (33, 200)])
def test_a_window_is_cut_out_of_the_resized_image(size):
    """And SDXL is told where, in pixels of the resized image, and how large the original one was."""
    image = decode_image(encode(random_image(np.random.default_rng(0), size)))
    for top, left in ((0.0, 0.0), (0.5, 0.3), (1.0, 1.0)):
        pixels, time_ids = resize_and_crop(image, 24, (top, left), flip=False)
        scale = 24 / min(size)
        whole = image.resize([max(24, round(side * scale)) for side in size], PILImage.Resampling.LANCZOS)
        x, y = round(left * (whole.width - 24)), round(top * (whole.height - 24))
        assert time_ids.tolist() == [size[1], size[0], y, x, 24, 24]
        expected = np.asarray(whole, dtype=int)[y : y + 24, x : x + 24]
        assert np.abs((pixels.numpy().transpose(1, 2, 0) + 1) * 127.5 - expected).max() < 3


# Visits


def test_winner_and_loser_are_cut_alike_and_visits_are_not(tmp_path):
    """Both images of the pair are the same ramp, so cut and flipped alike they stay equal."""
    ramp = PILImage.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    row = {"jpg_0": encode(ramp), "jpg_1": encode(ramp, "BMP"), "label_0": 1.0, "caption": "ramp"}
    dataset = examples(pairs_in(write_parquet([row], tmp_path)), crop=True, flip=True)
    views = [dataset[(0, visit), 0] for visit in range(16)]
    assert all(torch.equal(*view["pixel_values"]) and torch.equal(*view["time_ids"]) for view in views)
    pixels = [view["pixel_values"][0, 0, 0] for view in views]
    assert len({tuple(row.tolist()) for row in pixels}) > 12
    assert {bool(row[0] < row[-1]) for row in pixels} == {True, False}


def test_the_example_depends_on_seed_and_visit_alone(pairs_dir):
    pairs = pairs_in(pairs_dir)
    one, again = (examples(pairs, crop=True, flip=True, empty=0.5)[(0, 7), 2] for _ in range(2))
    assert torch.equal(one["pixel_values"], again["pixel_values"]) and torch.equal(one["uniforms"], again["uniforms"])
    assert one["caption"] == again["caption"]
    assert not torch.equal(one["uniforms"], examples(pairs)[(0, 8), 2]["uniforms"])
    assert not torch.equal(one["uniforms"], examples(pairs, seed=1)[(0, 7), 2]["uniforms"])
    assert one["uniforms"].shape == (2,) and ((0 <= one["uniforms"]) & (one["uniforms"] < 1)).all()


def test_captions_are_emptied_in_the_given_share(pairs_dir):
    dataset = examples(pairs_in(pairs_dir), resolution=8, empty=0.2)
    assert 50 < sum(dataset[(0, visit), 0]["caption"] == "" for visit in range(400)) < 115


def test_unreadable_rows_are_replaced_by_the_next(tmp_path):
    """Deterministically: all else of the visit stays. If nothing can be read, that is an error, no endless loop."""
    rows = pair_rows(5)
    rows[1]["jpg_1"] = rows[1]["jpg_1"][:50]
    rows[2]["caption"] = None
    rows[4]["jpg_0"] = b""
    dataset = examples(pairs_in(write_parquet(rows, tmp_path / "some")), crop=True)
    for place, skipped, row in ((1, [1, 2], 3), (4, [4], 0), (3, [], 3)):
        example, same = dataset[(0, 5), place], dataset[(0, 5), row]
        assert [name for name, _ in example["skipped"]] == [f"row {i}" for i in skipped]
        assert example["row"] == f"row {row}" and torch.equal(example["pixel_values"], same["pixel_values"])
    write_parquet([rows[1]] * 3, tmp_path / "none")
    with pytest.raises(RuntimeError, match="row 2"):
        examples(pairs_in(tmp_path / "none"))[(0, 0), 2]


def first(count, *args, **options):
    return list(itertools.islice(visit_batches(*args, **options), count))


def test_an_epoch_visits_every_pair_once_in_another_order():
    visits = sum(first(4, 10, 5, seed=0), [])
    assert [key for key, _ in visits] == [(0, visit) for visit in range(20)]
    epochs = [[place for _, place in visits[:10]], [place for _, place in visits[10:]]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert epochs[0] != [place for _, place in sum(first(2, 10, 5, seed=1), [])]


@pytest.mark.parametrize("num_pairs", [3, 10])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes_share_the_visits_and_a_restart_goes_on_there(num_pairs, num_processes):
    """Also where the data set is smaller than a batch, and where batches straddle epochs."""
    size = 8 // num_processes
    for visit in (0, 8):
        shares = [
            first(3, num_pairs, size, 0, visit=visit, process_index=rank, num_processes=num_processes)
            for rank in range(num_processes)
        ]
        together = sorted(item for share in shares for batch in share for item in batch)
        assert together == sum(first(4, num_pairs, 8, 0), [])[visit : visit + 24][: len(together)]


def test_with_a_cache_each_epoch_takes_the_next_draw():
    visits = sum(first(5, 4, 4, 0, num_draws=2), [])
    assert [key[2] for key, _ in visits] == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [0] * 4
    assert all(key[:2] == (3, place) for key, place in visits)


def test_forward_noise_is_shared_within_a_pair_and_belongs_to_the_visit():
    noise = forward_noise([(0, 3), (0, 4)], seed=0, shape=(2, 4, 8, 8))
    assert noise.shape == (2, 4, 4, 8, 8)
    assert torch.equal(noise[:, :2], noise[:, 2:])
    assert torch.equal(noise[:, 1], forward_noise([(0, 4)], seed=0, shape=(2, 4, 8, 8))[:, 0])
    assert not torch.equal(noise[0, 0], noise[0, 1]) and not torch.equal(noise[0, 0], noise[1, 0])
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


# Data as `datasets` and people keep them


@pytest.mark.parametrize("form", ["pandas", "numpy", "torch", "arrow"])
def test_a_format_that_was_kept_on_disk_does_not_count(form, tmp_path):
    Dataset.from_list(pair_rows(4)).with_format(form).save_to_disk(tmp_path / "data")
    check_winners_are_bright(pairs_in(tmp_path / "data"), 4)


def test_columns_that_were_chosen_for_a_format_do_not_count(tmp_path):
    Dataset.from_list(pair_rows(4)).with_format("torch", columns=["label_0"]).save_to_disk(tmp_path / "data")
    check_winners_are_bright(pairs_in(tmp_path / "data"), 4)


def test_slices_of_saved_data_are_read_as_those_of_others(tmp_path):
    rows = Dataset.from_list(pair_rows(8))
    rows.save_to_disk(tmp_path / "single")
    DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "splits")
    write_parquet(pair_rows(8), tmp_path / "parquet")
    for split, places in {
        "train": range(8),
        "train[:3]": range(3),
        "train[50%:]": range(4, 8),
        "train[-1:]": [7],
    }.items():
        for folder in ("single", "splits", "parquet"):
            pairs = pairs_in(tmp_path / folder, dataset_split_name=split)
            captions = [pairs[place].captions for place in range(len(pairs))]
            assert captions == [[CAPTIONS[place % 4]] for place in places]
    assert len(pairs_in(tmp_path / "splits", dataset_split_name="train+test[:2]")) == 10
    for folder in ("single", "splits"):
        with pytest.raises(ValueError, match="--train_data_dir .*validation"):
            pairs_in(tmp_path / folder, dataset_split_name="validation")


def test_paths_in_parquet_are_relative_to_the_data(tmp_path):
    rows = pair_rows(4)
    (tmp_path / "data" / "images").mkdir(parents=True)
    for i, row in enumerate(rows):
        for name in ("jpg_0", "jpg_1"):
            (tmp_path / "data" / "images" / f"{i}-{name}.png").write_bytes(row[name])
            row[name] = {"bytes": None, "path": f"images/{i}-{name}.png"}
    check_winners_are_bright(pairs_in(write_parquet(rows, tmp_path / "data")), 4)
    rows[0]["jpg_0"]["path"] = "../secret.png"
    (tmp_path / "secret.png").write_bytes(b"secret")
    with pytest.raises(BadRow, match="outside"):
        pairs_in(write_parquet(rows, tmp_path / "other"))[0]


def test_a_shard_without_rows(tmp_path):
    folder, rows = tmp_path / "data", Dataset.from_list(pair_rows(4))
    folder.mkdir()
    rows.select([]).to_parquet(folder / "train-00000-of-00002.parquet")
    rows.to_parquet(folder / "train-00001-of-00002.parquet")
    check_winners_are_bright(pairs_in(folder), 4)


def test_a_full_disk_is_not_the_datas_fault(tmp_path, monkeypatch):
    def load(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ValueError, match="full disk"):
        pairs_in(write_parquet(pair_rows(2), tmp_path / "data"))


# Metadata and colour


def test_metadata_never_costs_the_pixels():
    """Megabytes of text, a huge or broken profile, broken EXIF."""
    image = random_image(np.random.default_rng(0))
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    text.add_itxt("workflow", "y" * 2_000_000, zip=True)
    exif, noise = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xffbroken", np.random.default_rng(0).bytes(2_000_000)
    for options in ({"pnginfo": text}, {"icc_profile": b"no profile"}, {"icc_profile": noise}, {"exif": exif}):
        assert np.array_equal(decode_image(encode(image, "PNG", **options)), image)
    plain = decode_image(encode(image, "JPEG"))
    for options in ({"exif": exif}, {"icc_profile": b"no profile"}):
        assert np.array_equal(decode_image(encode(image, "JPEG", **options)), plain)


def test_truncated_pixels_are_still_an_error():
    data = encode(random_image(np.random.default_rng(0), (400, 320)))
    with pytest.raises(BadRow):
        decode_image(data[: len(data) // 2])


def profile_of(gamma):
    """A profile of sRGB's primaries and another gamma, in bytes: PIL's own with other tone curves and name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    tags = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + bytes(2)
    name = b"mluc" + bytes(4) + (1).to_bytes(4, "big") + (12).to_bytes(4, "big") + b"enUS" + (8).to_bytes(4, "big")
    name += (28).to_bytes(4, "big") + "test".encode("utf-16-be")
    for tag, content in ((b"rTRC", curve), (b"gTRC", curve), (b"bTRC", curve), (b"desc", name)):
        profile[tags[tag] + 4 : tags[tag] + 12] = len(profile).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        profile += content + bytes(-len(content) % 4)
    profile[:4] = len(profile).to_bytes(4, "big")
    return bytes(profile)


def test_transparency_outlives_a_profile():
    """Red that is declared transparent is white, with a profile and without one."""
    red = PILImage.new("RGB", (32, 32), (255, 0, 0))
    for options in ({}, {"icc_profile": profile_of(1.0)}):
        pixels = np.asarray(decode_image(encode(red, transparency=(255, 0, 0), **options)), int)
        assert pixels[16, 16].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("mode", "image_format"), [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "JPEG")])
def test_colours_are_those_that_browsers_show(mode, image_format):
    """A gamma of 1: what is stored as 128 is seen as 188."""
    image = PILImage.new("RGB", (32, 32), (128, 64, 200))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    seen = [round(255 * (1.055 * (value / 255) ** (1 / 2.4) - 0.055)) for value in (128, 64, 200)]
    for options, expected in (({"icc_profile": profile_of(1.0)}, seen), ({}, [128, 64, 200])):
        pixels = np.asarray(decode_image(encode(image, image_format, **options)), int)
        assert np.abs(pixels[16, 16] - expected).max() <= 3


def test_an_srgb_profile_changes_nothing():
    image = random_image(np.random.default_rng(0))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode_image(encode(image, icc_profile=profile)), image)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_profile_of_another_kind_of_colour_is_ignored(mode):
    image = PILImage.new("L", (32, 32), 100).convert(mode)
    data = encode(image, "TIFF", icc_profile=profile_of(1.0))
    assert np.abs(np.asarray(decode_image(data), int) - np.asarray(image.convert("RGB"), int)).max() <= 2


def test_two_files_of_one_picture_do_not_teach_their_profiles():
    seen = np.asarray(decode_image(encode(PILImage.new("RGB", (32, 32), (55,) * 3), icc_profile=profile_of(1.0))))
    level = int(seen[0, 0, 0])
    assert np.array_equal(decode_image(encode(PILImage.new("RGB", (32, 32), (level,) * 3))), seen) and level > 120

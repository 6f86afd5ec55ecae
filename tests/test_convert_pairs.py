"""examples/convert_pairs.py: whatever the data's shape, the parquet files hold the same pairs by the defaults."""

import io
import json

import convert_pairs
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import encode, write_parquet
from datasets import Dataset
from PIL import Image
from test_data_shapes import GROUP, SCORES, STORAGES, data_args, labelled_rows, png

from inversion_utils import decode_image, load_pairs


def convert(tmp_path, *options):
    """Runs the program; returns its folder of parquet files."""
    output_dir = tmp_path / "out"
    convert_pairs.main([str(option) for option in (*options, "--output_dir", output_dir)])
    return output_dir


def contents(pairs):
    """What matters of pairs, in no order: pixels of winner and loser, captions, whether a tie."""
    pixels = ([decode_image(image).tobytes() for image in pair[:2]] for pair in pairs)
    pixels = (sorted(images) if pair.is_tie else images for images, pair in zip(pixels, pairs, strict=True))
    return sorted((images, pair.captions, pair.is_tie) for images, pair in zip(pixels, pairs, strict=True))


def assert_same_pairs(tmp_path, *options, expected=None):
    """The files, read by the defaults, are the pairs that the options make of the data."""
    output_dir = convert(tmp_path, *options)
    ties = ["--tie_policy", "soft"] if "soft" in options else []
    converted = load_pairs(data_args("--train_data_dir", output_dir, *ties))
    original = load_pairs(data_args(*(option for option in options if option != "--streaming")))
    assert len(converted) == len(original) == (expected or len(original))
    assert contents(converted) == contents(original)
    return output_dir


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
@pytest.mark.parametrize("store", STORAGES)
def test_every_storage(store, streaming, tmp_path):
    (tmp_path / "in").mkdir()
    assert_same_pairs(tmp_path, "--train_data_dir", store(tmp_path / "in"), *streaming, expected=4)


SHAPES = {
    "winners": ["--winner_column", "w", "--loser_column", "l"],
    "labels": ["--image_0_column", "w", "--image_1_column", "l", "--label_map", "l=1", "r=0", "t=0.5"],
    "soft": ["--image_0_column", "w", "--image_1_column", "l", "--label_map", "l=1", "r=0", "t=0.5",
             "--tie_policy", "soft"],
    "scores": ["--image_0_column", "w", "--image_1_column", "l", "--score_0_column", "s", "--score_1_column", "t"],
    "scores, soft": ["--image_0_column", "w", "--image_1_column", "l", "--score_0_column", "s", "--score_1_column",
                     "t", "--tie_policy", "soft", "--min_score_margin", "1.5"],
    "groups": ["--images_column", "images", "--scores_column", "scores"],
    "all of groups": ["--images_column", "images", "--scores_column", "scores", "--pairs_per_group", "all"],
    "texts": ["--winner_column", "w", "--loser_column", "l", "--caption_column", "texts"],
    "template": ["--winner_column", "w", "--loser_column", "l", "--caption_template", "{caption}: {texts}"],
}  # fmt: skip


def shaped_rows(num_rows=9):
    names = list(range(num_rows))
    return [
        {
            "w": png("best", i), "l": png("worst", i), "label_0": "lrt"[i % 3], "s": float(i % 4), "t": 1.0,
            "images": [png(name, i) for name in GROUP], "scores": SCORES, "caption": f"é {i}",
            "texts": [f"a {i}", f"b {i}"],
        }
        for i in names
    ]  # fmt: skip


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, streaming, tmp_path):
    data = write_parquet(shaped_rows(), tmp_path / "in")
    assert_same_pairs(tmp_path, "--train_data_dir", data, *SHAPES[shape], *streaming)


def test_scores_are_kept_and_can_be_trained_on(tmp_path):
    data = write_parquet(shaped_rows(), tmp_path / "in")
    output_dir = convert(tmp_path, "--train_data_dir", data, *SHAPES["all of groups"])
    original = load_pairs(data_args("--train_data_dir", data, *SHAPES["all of groups"]))
    columns = ["--score_0_column", "score_0", "--score_1_column", "score_1"]
    again = load_pairs(data_args("--train_data_dir", output_dir, *columns))
    assert contents(again) == contents(original)
    assert sorted(pair.margin for pair in again) == sorted(pair.margin for pair in original)


def test_the_order_of_columns_does_not_tell_the_winner_and_belongs_to_the_seed(tmp_path):
    data = write_parquet([{"w": png("best", i), "l": png("worst", i), "caption": "x"} for i in range(60)], tmp_path)
    labels = {}
    for seed in (0, 0, 1):
        folder = tmp_path / "in"
        options = ["--train_data_dir", data / "train-00000.parquet", *SHAPES["winners"], "--seed", seed]
        output_dir = convert(folder, *options)
        rows = pq.read_table(output_dir).to_pylist()
        labels.setdefault(seed, []).append([row["label_0"] for row in rows])
        assert all(decode_image(row["jpg_0"]).getpixel((9, 9))[0] == (250 if row["label_0"] else 40) for row in rows)
        (output_dir / "train-00000-of-00001.parquet").unlink()
    assert labels[0][0] == labels[0][1] != labels[1][0]
    assert 15 < sum(labels[0][0]) < 45


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
def test_rows_that_cannot_be_used_are_counted_and_named(streaming, tmp_path, capsys):
    rows = labelled_rows() + labelled_rows()
    rows[1]["jpg_0"] = b"damaged"
    rows[2]["caption"] = " "
    rows[-1]["label_0"] = None  # after the last pair
    data = write_parquet(rows, tmp_path / "in")
    options = ["--train_data_dir", data, "--max_bad_fraction", 0.5, *streaming]
    num_pairs = pq.read_table(convert(tmp_path, *options)).num_rows
    printed = capsys.readouterr().out
    bad = sum("left out" in line for line in printed.splitlines() if line.startswith("row "))
    for line in ("row 1 is left out: unreadable image", "row 2 is left out: no caption", "    1            no label"):
        assert line in printed
    assert f"rows read        {len(rows)}" in printed and f"pairs written    {num_pairs}, ties left out" in printed
    assert f"rows left out    {bad}\n" in printed


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
@pytest.mark.parametrize("share", ["images", "labels", "all"])
def test_too_many_bad_rows_leave_nothing(share, streaming, tmp_path, capsys):
    rows = shaped_rows(12)
    for row in rows[: 12 if share == "all" else 4]:
        row["w"], row["label_0"] = b"damaged" if share != "labels" else row["w"], None if share == "labels" else "l"
    data = write_parquet(rows, tmp_path / "in")
    with pytest.raises(SystemExit) as stop:
        convert(tmp_path, "--train_data_dir", data, *SHAPES["labels"], *streaming)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--max_bad_fraction is 0.1, but of the first" in message
    assert not any((tmp_path / "out").iterdir())


def test_files_are_bounded_and_a_large_set_is_several(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"w": encode(Image.fromarray(rng.integers(0, 256, (64, 64, 3), "u1"))), "l": png("worst", i), "caption": "x"}
        for i in range(12)
    ]
    data = write_parquet(rows, tmp_path / "in")
    output_dir = assert_same_pairs(tmp_path, "--train_data_dir", data, *SHAPES["winners"])
    assert [file.name for file in output_dir.iterdir()] == ["train-00000-of-00001.parquet"]
    options = ["--train_data_dir", data, *SHAPES["winners"], "--max_file_mb", 0.04]
    several = convert(tmp_path / "several", *options)
    names = sorted(file.name for file in several.iterdir())
    assert len(names) > 2 and names == [f"train-{i:05}-of-{len(names):05}.parquet" for i in range(len(names))]
    assert max(file.stat().st_size for file in several.iterdir()) < 80_000
    assert len(load_pairs(data_args("--train_data_dir", several))) == 12


def test_what_is_there_is_refused(tmp_path, capsys):
    data = write_parquet(shaped_rows(), tmp_path / "in")
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "a.parquet").write_bytes(b"")
    (tmp_path / "file").write_text("")
    for folder, named in (
        (tmp_path / "out", "already holds parquet files"),
        (data, "lies in --train_data_dir"),
        (data / "new", "lies in --train_data_dir"),
        (tmp_path / "file" / "x", "file/x: "),
    ):
        with pytest.raises(SystemExit) as stop:
            convert_pairs.main(["--train_data_dir", str(data), *SHAPES["winners"], "--output_dir", str(folder)])
        assert stop.value.code == 2 and named in capsys.readouterr().err
    assert not (data / "new").exists()


def test_rows_that_are_images_in_memory_become_png(tmp_path):
    decoded = Image.new("RGB", (8, 8), "red")
    assert Image.open(io.BytesIO(convert_pairs.to_bytes(decoded, decoded))).format == "PNG"
    assert convert_pairs.to_bytes(b"as it is", decoded) == b"as it is"


def test_the_scripts_train_on_it_by_default(train, tmp_path):
    data = write_parquet(shaped_rows(), tmp_path / "in")
    output_dir = convert(tmp_path, "--train_data_dir", data, *SHAPES["groups"])
    config = json.loads((train(train_data_dir=output_dir, max_train_steps=1) / "training_config.json").read_text())
    assert config["data"]["pairs"] == 9


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    data = write_parquet(shaped_rows(), tmp_path / "in")
    monkeypatch.setattr(convert_pairs, "to_bytes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(tmp_path, "--train_data_dir", data, *SHAPES["winners"])
    assert not any((tmp_path / "out").iterdir())


def test_captions_of_lists_stay_lists_and_others_text(tmp_path):
    data = write_parquet(shaped_rows(), tmp_path / "in")
    output_dir = convert(tmp_path, "--train_data_dir", data, *SHAPES["texts"])
    assert pq.read_table(output_dir)["caption"].to_pylist()[0] == ["a 0", "b 0"]
    assert Dataset.from_parquet(str(output_dir / "*.parquet")).features["caption"].feature.dtype == "string"

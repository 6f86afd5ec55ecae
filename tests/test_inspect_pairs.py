"""examples/inspect_pairs.py: what a look at the pairs tells before training."""

import io
import json
import shutil
import sys

import inspect_pairs
import numpy as np
import pytest
from conftest import encode, pair_rows, random_image, write_json, write_parquet
from diffusers import DiffusionPipeline
from PIL import Image


@pytest.fixture
def inspect(tmp_path):
    """Runs the program on rows; returns its report, and its picture as pixels."""

    def run(rows, *options, output="look"):
        data = write_parquet(rows, tmp_path / f"pairs {len(list(tmp_path.iterdir()))}")
        options = ["--train_data_dir", data, "--output_dir", tmp_path / output, "--resolution", 32, *options]
        inspect_pairs.main(*inspect_pairs.parse_args(list(map(str, options))))
        with Image.open(tmp_path / output / "pairs.png") as picture:
            return json.loads((tmp_path / output / "inspection.json").read_text()), np.asarray(picture)

    return run


@pytest.fixture
def refused(inspect, capsys):
    """Runs the program with what it must refuse, and returns its one line."""

    def run(rows, *options, **more):
        with pytest.raises(SystemExit) as stop:
            inspect(rows, *options, **more)
        assert stop.value.code == 2
        usage, message = capsys.readouterr().err.splitlines()[-2:]
        assert usage.startswith("usage: ")
        return message

    return run


def test_the_report_counts_what_is_in_the_data(inspect, tiny_model, tiny_sdxl_model, capsys):
    rng = np.random.default_rng(0)
    pictures = [encode(random_image(rng, (40, 80))) for _ in range(12)]
    captions = ["one", "a b c", "abcdefghijklmnopqrstuvwxyz", "x", "y", "z"]
    rows = [
        {"jpg_0": pictures[2 * i], "jpg_1": pictures[2 * i + 1], "label_0": 1.0, "caption": captions[i]}
        for i in range(6)
    ]
    rows += [{**rows[0], "caption": "again"}, {**rows[0], "caption": "third"}]
    rows.append({**rows[1], "label_0": 0.0})
    same = random_image(rng, (20, 20))
    rows.append({"jpg_0": encode(same, "BMP"), "jpg_1": encode(same), "label_0": 1.0, "caption": "twice"})
    rows.append({**rows[0], "jpg_1": b"damaged"})
    rows.append({**rows[2], "label_0": 0.5})
    report, _ = inspect(rows, "--pretrained_model_name_or_path", tiny_model)
    expected = {
        "rows": 12,
        "pairs": 11,
        "ties": "1 left out",
        "pairs looked at": "11 of 11",
        "unusable": {"unreadable image": 1},
        "widths in pixels": "20 to 40, half of them up to 40",
        "images that are enlarged": "10.0%",
        "share of an image that cropping discards": "45.0% on average",
        "captions that are cut": "1 of 10 (over 16)",
        "caption lengths in tokens": "3 to 28, half of them up to 5",
        "pairs of nearly the same image": 1,
        "pairs that occur again": 2,
        "pairs that occur again with winner and loser exchanged": 1,
        "image 0 is the winner": "90.9% of 11 pairs",
    }
    assert {name: report[name] for name in expected} == expected
    printed = capsys.readouterr().out
    assert "pairs that occur again: 2\n" in printed and "ties: 1 left out\n" in printed
    options = ["--tie_policy", "soft", "--sample_size", 4, "--pretrained_model_name_or_path", tiny_sdxl_model]
    report, _ = inspect(rows, *options, output="again")
    assert report["pairs looked at"] == "4 of 12" and report["ties"] == "1 among them"


def test_a_column_that_gives_the_winner_away_is_told(inspect):
    rows = [{**pair_rows(1, seed)[0], "label_0": 1.0} for seed in range(12)]
    report, _ = inspect(rows)
    assert report["image 0 is the winner"].startswith("100.0% of 12 pairs: ")
    report, _ = inspect(rows, "--winner_column", "jpg_0", "--loser_column", "jpg_1", output="columns")
    assert "image 0 is the winner" not in report


def test_the_picture_shows_winners_and_losers_as_such(inspect):
    """Winners of `pair_rows` are bright; below a mark in the winner's colour lies the brighter image."""
    _, picture = inspect(pair_rows(6), "--num_shown", 1)

    def brightness(color):
        is_frame = (picture == color).all(2)
        rows, columns = np.flatnonzero(is_frame.sum(1) > 100), np.flatnonzero(is_frame.sum(0) > 100)
        return picture[rows[0] + 3 : rows[-1] - 3, columns[0] + 3 : columns[-1] - 3].mean()

    assert brightness((16, 112, 16)) > 127 > brightness((176, 16, 16))
    _, larger = inspect(pair_rows(6), "--num_shown", 5, output="larger")
    assert larger.shape[0] > 2.5 * picture.shape[0]


def test_a_models_folder_that_is_not_there_is_not_looked_for_on_the_hub(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: pytest.fail("it was"))
    message = refused(pair_rows(2), "--pretrained_model_name_or_path", tmp_path / "nothing")
    assert "no such folder" in message


def test_of_two_tokenizers_one_may_be_missing(inspect, tiny_sdxl_model, tmp_path):
    shutil.copytree(tiny_sdxl_model, tmp_path / "refiner")
    write_json(tmp_path / "refiner" / "model_index.json", tokenizer=[None, None])
    shutil.rmtree(tmp_path / "refiner" / "tokenizer")
    report, _ = inspect(pair_rows(2), "--pretrained_model_name_or_path", tmp_path / "refiner")
    assert "caption lengths in tokens" in report


def test_bad_input_is_refused_and_nothing_overwritten(refused, tmp_path):
    rows = pair_rows(2)
    for i, name in enumerate(("inspection.json", "pairs.png")):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / name).write_text("mine")
        assert "--output_dir" in refused(rows, output=str(i))
        assert (tmp_path / str(i) / name).read_text() == "mine"
    (tmp_path / "file").write_text("")
    for options, named in (
        (["--pretrained_model_name_or_path", tmp_path / "nothing"], "no such folder"),
        (["--pretrained_model_name_or_path", "no/such-model"], "--pretrained_model_name_or_path no/such-model"),
        (["--caption_column", "nothing"], "--caption_column"),
        (["--winner_column", "jpg_0"], "--loser_column"),
        (["--dataset_name", "x"], "--dataset_name"),
        (["--output_dir", tmp_path / "file" / "x"], "--output_dir"),
    ):
        assert named in refused(rows, *options)
    assert "unreadable image" in refused([{**rows[0], "jpg_0": b"damaged"}])
    assert not (tmp_path / "look").exists()


def test_names_in_the_data_do_not_reach_the_terminal_as_they_are(refused):
    message = refused([{**row, "\x1b]0;title\x07": 1} for row in pair_rows(2)], "--label_column", "better")
    assert "--label_column better" in message and "title" in message and "\x1b" not in message


@pytest.mark.parametrize("console", ["cp1252", "ascii"])
def test_a_console_that_cannot_show_a_name_ends_nothing(console, inspect, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=console, write_through=True))
    inspect(pair_rows(2), output="日本")
    assert "\\u65e5\\u672c" in raw.getvalue().decode(console)


def test_a_caption_of_megabytes_is_cut_before_it_is_tokenized(inspect, tiny_model):
    rows = [{**row, "caption": "a " * 5000} for row in pair_rows(2)]
    report, _ = inspect(rows, "--pretrained_model_name_or_path", tiny_model)
    assert "2002" in report["caption lengths in tokens"] and report["captions that are cut"].startswith("2 of 2")

"""Preference data as people have it: from files on disk, in every shape and storage, to the loop's batch."""

import argparse
import base64
import csv
import functools
import gzip
import http.server
import io
import itertools
import json
import math
import re
import shlex
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encode
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

import train_inversion_dpo
from inversion_utils import (
    BadRow,
    PairColumns,
    PreferenceDataset,
    StreamedPairs,
    add_data_options,
    as_text,
    check_data_options,
    decode_image,
    label_meaning,
    load_pairs,
    read_image,
)

GREYS = {"best": 250, "good": 180, "poor": 110, "worst": 40}  # winners are the lighter images


def picture(name):
    return PILImage.new("RGB", (40, 32), (GREYS[name],) * 3)


def png(name, number=0):
    """An image of its own for each number, and of a grey that tells its name."""
    image = picture(name)
    image.putpixel((number % 40, number // 40), (0, 0, 0))
    return encode(image)


def data_args(*options):
    """The data options as the scripts read them."""
    parser = argparse.ArgumentParser()
    add_data_options(parser.add_argument)
    parser.add_argument("--cache_dir")
    args = parser.parse_args([str(option) for option in options])
    check_data_options(args, parser.error)
    return args


def batch_of(*options, count=None, **dataset_options):
    """A batch of all pairs, by the script's own way from the options to the loop."""
    pairs = load_pairs(data_args(*options))
    count = count or pairs.num_pairs or 4
    dataset = PreferenceDataset(pairs, 32, 1, 0, False, False, 0.0, **dataset_options)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=pairs.batches(count, 0), collate_fn=lambda examples: examples
    )
    return next(iter(loader))


def greys(example):
    """The grey of winner and loser, in the middle of the picture."""
    return tuple(round((float(view[0, 16, 16]) + 1) * 127.5) for view in example["pixel_values"])


def assert_winners(examples, *expected):
    """Each example has two images, by name, the winner's first, and the caption that belongs to them."""
    seen = sorted((*greys(example), example["caption"]) for example in examples)
    assert seen == sorted((GREYS[winner], GREYS[loser], caption) for winner, loser, caption in expected)


LABELLED = [  # image_0, image_1, the label of image 0, caption
    ("best", "worst", 1.0, "zero"),
    ("worst", "best", 0.0, "one"),
    ("good", "poor", 1.0, "two"),
    ("poor", "good", 0.0, "three"),
]
EXPECTED = [("best", "worst", "zero"), ("best", "worst", "one"), ("good", "poor", "two"), ("good", "poor", "three")]


def labelled_rows(image=png):
    return [
        {"jpg_0": image(a, 2 * i), "jpg_1": image(b, 2 * i + 1), "label_0": label, "caption": caption}
        for i, (a, b, label, caption) in enumerate(LABELLED)
    ]


def write_files(folder):
    """Writes the images as files and returns rows with their relative paths."""
    (folder / "images").mkdir(parents=True)
    numbers = itertools.count()

    def path(name, number):
        file = folder / "images" / f"{next(numbers)}-{name}.png"
        file.write_bytes(png(name, number))
        return str(file.relative_to(folder))

    return labelled_rows(path)


def to_parquet(folder):
    Dataset.from_list(labelled_rows()).to_parquet(folder / "train.parquet")
    return folder


def to_arrow(folder):
    Dataset.from_list(labelled_rows()).save_to_disk(folder / "saved")
    (folder / "saved" / "state.json").unlink()
    return folder / "saved"


def to_disk(folder):
    Dataset.from_list(labelled_rows()).save_to_disk(folder / "saved")
    return folder / "saved"


def to_jsonl(folder):
    rows = write_files(folder)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def to_csv(folder):
    rows = write_files(folder)
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "pairs.csv"


def to_base64_jsonl(folder):
    rows = labelled_rows(lambda name, number: base64.b64encode(png(name, number)).decode())
    rows[0]["jpg_0"] = "data:image/png;base64," + rows[0]["jpg_0"]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def to_image_folder(folder):
    rows = write_files(folder)
    rows = [{f"{k}_file_name" if k.startswith("jpg") else k: v for k, v in row.items()} for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def to_image_features(folder):
    features = Features(jpg_0=Image(), jpg_1=Image(), label_0=Value("float64"), caption=Value("string"))
    Dataset.from_list(labelled_rows(), features=features).to_parquet(folder / "train.parquet")
    return folder


STORAGES = [to_parquet, to_arrow, to_disk, to_jsonl, to_csv, to_base64_jsonl, to_image_folder, to_image_features]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
@pytest.mark.parametrize("store", STORAGES)
def test_every_storage(store, streaming, tmp_path):
    assert_winners(batch_of("--train_data_dir", store(tmp_path), *streaming), *EXPECTED)


def test_a_hub_style_name_with_a_split(tmp_path):
    """`load_dataset` also takes a folder as a name."""
    to_parquet(tmp_path)
    assert_winners(batch_of("--dataset_name", tmp_path), *EXPECTED)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([True, False, True, False], []),
        ([1, 0, 1, 0], []),
        (["left", "Right", "LEFT ", "right"], ["--label_map", "left=1", "right=0"]),
        (["0", "1", "0", "1"], ["--label_map", "0=1", "1=0"]),
        ([1, 2, 1, 2], ["--label_map", "1=1", "2=0"]),
        ([-1.0, 1.0, -1.0, 1.0], ["--label_map", " -1=1", "1=0"]),
        ([True, False, True, False], ["--label_map", "true=1", "false=0"]),
    ],
)
def test_labels_of_every_kind(labels, options, tmp_path):
    rows = [{**row, "label_0": label} for row, label in zip(labelled_rows(), labels, strict=True)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    assert_winners(batch_of("--train_data_dir", tmp_path, *options), *EXPECTED)


def test_winner_and_loser_columns(tmp_path):
    rows = [{"good one": png("best", i), "bad one": png("worst", i), "caption": str(i)} for i in range(3)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    options = ["--winner_column", "good one", "--loser_column", "bad one"]
    expected = [("best", "worst", str(i)) for i in range(3)]
    assert_winners(batch_of("--train_data_dir", tmp_path, *options), *expected)
    assert_winners(batch_of("--train_data_dir", tmp_path, *options, "--streaming", count=3), *expected)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
@pytest.mark.parametrize("captions", ["beside the winner", "in the folder", "in one JSONL"])
def test_two_folders_of_equal_names(captions, streaming, tmp_path):
    for folder, name in (("chosen", "best"), ("rejected", "worst")):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for i in range(3):
            suffix = ".PNG" if folder == "chosen" else ".jpeg"  # names are equal but for the suffix
            (tmp_path / folder / "deep" / f"{i}{suffix}").write_bytes(png(name, i))
    if captions == "in one JSONL":
        rows = [{"file_name": f"deep/{i}.png", "caption": f"caption {i}"} for i in range(3)]
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        place = tmp_path / "chosen" if captions == "beside the winner" else tmp_path
        (place / "deep").mkdir(exist_ok=True)
        for i in range(3):
            (place / "deep" / f"{i}.txt").write_text(f"caption {i}")
    options = ["--train_data_dir", tmp_path, "--winner_column", "chosen", "--loser_column", "rejected", *streaming]
    assert_winners(batch_of(*options, count=3), *[("best", "worst", f"caption {i}") for i in range(3)])


def test_folders_without_a_common_name_or_with_one_twice(tmp_path):
    for folder, name in (("chosen", "1_w.png"), ("rejected", "1_l.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(png("best"))
    options = ["--train_data_dir", tmp_path, "--winner_column", "chosen", "--loser_column", "rejected"]
    with pytest.raises(ValueError, match="no image has the same name.*chosen/1_w, rejected/1_l"):
        load_pairs(data_args(*options))
    (tmp_path / "chosen" / "1_w.jpg").write_bytes(png("best"))
    with pytest.raises(ValueError, match="same name but for the suffix"):
        load_pairs(data_args(*options))


def test_a_file_without_its_partner_is_a_bad_row(tmp_path):
    for folder, names in (("chosen", "ab"), ("rejected", "a")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.png").write_bytes(png("best" if folder == "chosen" else "worst"))
            (tmp_path / folder / f"{name}.txt").write_text(name)
    options = ["--train_data_dir", tmp_path, "--winner_column", "chosen", "--loser_column", "rejected"]
    with pytest.raises(ValueError, match=r"of 2 rows 1 cannot be used: 1 with no image \(the first: row 1"):
        load_pairs(data_args(*options))
    pairs = load_pairs(data_args(*options, "--max_bad_fraction", 0.5))
    assert len(pairs) == 1 and pairs[0].captions == ["a"]
    pairs = load_pairs(data_args(*options, "--streaming"))
    assert len(pairs.sample(5, 0)) == 1 and pairs.seen.bad_rows == [("row 1", "no image")]


SCORED = [
    ("best", "worst", 3.0, 1.0),
    ("poor", "good", 0.1, 0.3),
    ("good", "good", 0.5, 0.5),
    ("best", "good", 2, 1.9),
]


@pytest.fixture
def scored(tmp_path):
    rows = [
        {"jpg_0": png(a, 2 * i), "jpg_1": png(b, 2 * i + 1), "s0": s, "s1": t, "t0": 0.0, "t1": 9.0, "caption": str(i)}
        for i, (a, b, s, t) in enumerate(SCORED)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    return ["--train_data_dir", tmp_path, "--score_0_column", "s0", "--score_1_column", "s1"]


def test_two_images_with_scores(scored):
    decided = [("best", "worst", "0"), ("good", "poor", "1"), ("best", "good", "3")]
    assert_winners(batch_of(*scored), *decided)
    assert_winners(batch_of(*scored, "--min_score_margin", 0.15), *decided[:2])
    assert_winners(batch_of(*scored, "--streaming", count=3), *decided)
    examples = batch_of(*scored, "--tie_policy", "soft", "--min_score_margin", 0.15)
    assert sorted(example["caption"] for example in examples if example["is_tie"]) == ["2", "3"]


def test_the_strength_of_a_preference_follows_from_its_margin(scored):
    examples = batch_of(*scored, "--tie_policy", "soft", strength_scale=2.0)
    strengths = {example["caption"]: example["strength"] for example in examples}
    assert strengths["2"] == 1.0  # a tie is not scaled: its target is no preference
    for caption, margin in (("0", 2.0), ("1", 0.2), ("3", 0.1)):
        assert strengths[caption] == pytest.approx(2 / (1 + math.exp(-2.0 * margin)) - 1)
    assert {example["strength"] for example in batch_of(*scored)} == {1.0}


def test_several_scores_are_weighed(scored):
    options = [*scored[:2], "--score_0_column", "s0", "t0", "--score_1_column", "s1", "t1"]
    flipped = batch_of(*options, "--score_weights", 1, 1)
    assert {greys(example) for example in flipped if example["caption"] == "0"} == {(40, 250)}
    assert_winners(batch_of(*options, "--score_weights", 1, 0), ("best", "worst", "0"), ("good", "poor", "1"),
                   ("best", "good", "3"))  # fmt: skip
    lower_is_better = batch_of(*scored, "--score_weights", -1)
    assert {greys(example) for example in lower_is_better if example["caption"] == "0"} == {(40, 250)}


GROUP = ["poor", "best", "worst", "good"]
SCORES = [2.0, 9.0, 1.0, 7.5]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("best_worst", [("best", "worst")]),
        ("adjacent", [("best", "good"), ("good", "poor"), ("poor", "worst")]),
        ("all", [("best", "good"), ("best", "poor"), ("best", "worst"), ("good", "poor"), ("good", "worst"),
                 ("poor", "worst")]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True], ids=["lists", "list of structs"])
def test_groups_of_images_with_scores(how, expected, nested, streaming, tmp_path):
    images = [png(name) for name in GROUP]
    if nested:
        row = {"items": [{"image": image, "score": score} for image, score in zip(images, SCORES, strict=True)]}
        columns = ["--images_column", "items.image", "--scores_column", "items.score"]
    else:
        row = {"images": images, "scores": SCORES}
        columns = ["--images_column", "images", "--scores_column", "scores"]
    Dataset.from_list([{**row, "caption": "x"}]).to_parquet(tmp_path / "train.parquet")
    options = ["--train_data_dir", tmp_path, *columns, "--pairs_per_group", how, *streaming]
    assert_winners(batch_of(*options, count=len(expected)), *[(*pair, "x") for pair in expected])


def test_groups_of_image_features_and_names(tmp_path):
    features = Features(images=List(Image()), scores=List(Value("float32")), caption=Value("string"))
    rows = [{"images": [png(name) for name in GROUP], "scores": SCORES, "caption": "x"}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    options = ["--train_data_dir", tmp_path / "saved", "--images_column", "images", "--scores_column", "scores"]
    (example,) = batch_of(*options)
    assert_winners([example], ("best", "worst", "x"))
    assert example["row"] == "row 0, images 1 and 2"
    assert_winners(batch_of(*options, "--streaming", count=1), ("best", "worst", "x"))


def test_images_without_a_score_leave_their_group_and_shifted_lists_are_refused(tmp_path):
    rows = [
        {"images": [png(name, 1) for name in GROUP], "scores": [2.0, None, 1.0, 7.5], "caption": "one missing"},
        {"images": [png(name, 2) for name in GROUP], "scores": [None, None, 1.0, float("nan")], "caption": "one left"},
        {"images": [png(name, 3) for name in GROUP[:3]], "scores": SCORES, "caption": "shifted"},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    options = ["--train_data_dir", tmp_path, "--images_column", "images", "--scores_column", "scores"]
    pairs = load_pairs(data_args(*options, "--max_bad_fraction", 0.4))
    assert pairs.counts() == {
        "pairs": 2, "ties left out": 0, "rows skipped for fewer than two images with a score": 1
    }  # fmt: skip
    assert [read_image(image) == png(name, 1) for image, name in zip(pairs[0][:2], ("good", "worst"), strict=True)]
    with pytest.raises(BadRow, match="images and scores differ in number: 3 images, 4 scores"):
        pairs[1]


def test_structured_captions(tmp_path):
    rows = [
        {
            "winner": png("best", i), "loser": png("worst", i), "texts": ["one", " ", "two"],
            "prompt": {"text": f"nested {i}"}, "objects": ["cat", "mat"], "relations": [["cat", "on", "mat"]],
            "style": "oil" if i else None, "dotted.name": "dots",
        }
        for i in range(2)
    ]  # fmt: skip
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    options = ["--train_data_dir", tmp_path, "--winner_column", "winner", "--loser_column", "loser"]

    def captions(*more):
        return [example["caption"] for example in sorted(batch_of(*options, *more), key=lambda e: e["row"])]

    assert captions("--caption_column", "prompt.text") == ["nested 0", "nested 1"]
    assert captions("--caption_column", "dotted.name") == ["dots", "dots"]
    template = "{objects}: {relations}, {style}"
    expected = ["cat, mat: cat on mat", "cat, mat: cat on mat, oil"]
    assert captions("--caption_template", template) == expected
    pairs = load_pairs(data_args(*options, "--caption_column", "texts"))
    dataset = PreferenceDataset(pairs, 32, 1, 0, False, False, 0.0)
    drawn = [dataset[visit, 0]["caption"] for visit in range(40)]
    assert 8 < drawn.count("one") < 32 and set(drawn) == {"one", "two"}
    assert drawn == [dataset[visit, 0]["caption"] for visit in range(40)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a cat", "a cat"), (3, "3"), (None, ""), (["a", "b"], "a, b"), (["a", None, ""], "a"),
        ({"subject": "cat", "verb": "sits"}, "cat sits"),
        ([{"n": 2, "what": "cats"}, {"n": 1, "what": "dog"}], "2 cats, 1 dog"),
        ([["a", "on", "b"], ["c", "by", "d"]], "a on b, c by d"),
    ],
)  # fmt: skip
def test_structures_in_words(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--winner_column", "a"], "--winner_column and --loser_column go together"),
        (["--score_0_column", "a"], "--score_0_column and --score_1_column go together"),
        (["--images_column", "a"], "--images_column and --scores_column go together"),
        (["--winner_column", "a", "--loser_column", "b", "--images_column", "c", "--scores_column", "d"], "exclude"),
        (["--winner_column", "a", "--loser_column", "b", "--label_column", "c"], "--label_column and --winner_column"),
        (["--winner_column", "a", "--loser_column", "b", "--image_0_column", "c"], "--image_0_column and --winner"),
        (["--winner_column", "a", "--loser_column", "b", "--tie_policy", "soft"], "--tie_policy soft"),
        (["--score_0_column", "a", "b", "--score_1_column", "c"], "names 2 columns, --score_1_column 1"),
        (["--score_0_column", "a", "--score_1_column", "c", "--score_weights", "1", "2"], "--score_weights has 2"),
        (["--score_weights", "1"], "--score_weights goes with"),
        (["--min_score_margin", "1"], "--min_score_margin goes with"),
        (["--pairs_per_group", "all"], "--pairs_per_group goes with --images_column"),
        (["--label_map", "left"], "--label_map: is left; allowed"),
        (["--label_map", "left=2"], "--label_map: is left=2; allowed"),
        (["--label_map", "left=1", "LEFT=0"], "--label_map gives 'left' two meanings, 1 and 0"),
        (["--caption_template", "no columns"], "--caption_template is 'no columns'"),
        (["--caption_template", "{a!r}"], "--caption_template is"),
        (["--caption_template", "{a"], "--caption_template '{a'"),
        (["--caption_template", "{a}", "--caption_column", "b"], "--caption_column and --caption_template"),
        (["--shuffle_buffer_size", "9"], "--shuffle_buffer_size goes with --streaming"),
        (["--max_bad_fraction", "1.5"], "--max_bad_fraction: is 1.5"),
    ],
)  # fmt: skip
def test_contradicting_options(options, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        data_args("--train_data_dir", tmp_path, *options)
    assert error.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"streaming": True, "max_train_steps": None}, "--streaming needs --max_train_steps"),
        ({"preference_strength": "margin"}, "--preference_strength margin goes with"),
        ({"preference_strength_scale": 2}, "--preference_strength_scale goes with"),
        ({"tie_policy": "soft", "loss_type": "hinge"}, "--tie_policy soft goes with --loss_type"),
    ],
)
def test_options_that_contradict_the_training(refused, no_models, options, named):
    assert named in refused(**options)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--winner_column", "nothing", "--loser_column", "jpg_1"], "--winner_column nothing: the data has no such"),
        (
            ["--winner_column", "jpg_0", "--loser_column", "label_0"],
            "--loser_column label_0: the column holds float64",
        ),
        (["--images_column", "jpg_0", "--scores_column", "label_0"], "holds binary; needed: lists of images"),
        (["--score_0_column", "caption", "--score_1_column", "label_0"], "--score_0_column caption: the column holds"),
        (["--caption_column", "prompt.txt"], "--caption_column prompt.txt: prompt has no field txt, only text"),
        (["--caption_template", "{nothing}"], "--caption_template nothing: the data has no such column"),
    ],
)
def test_columns_that_do_not_fit(options, named, streaming, tmp_path):
    rows = [{**row, "prompt": {"text": "x"}} for row in labelled_rows()]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=named):
        load_pairs(data_args("--train_data_dir", tmp_path, *options, *streaming))


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"pairs.txt": ""}, "no parquet, arrow, JSONL or CSV files"),
        ({"train.jsonl": "", "train/b.jsonl": ""}, "lie in different folders"),
        ({"train.jsonl": "{nonsense"}, "cannot be loaded"),
        ({"metadata.jsonl": '{"caption": "x"}'}, "cannot be loaded"),
    ],
)
def test_folders_that_cannot_be_read(files, named, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=named):
        load_pairs(data_args("--train_data_dir", tmp_path))


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "pairs.xlsx").write_text("")
    with pytest.raises(ValueError, match="the file ends in .xlsx; allowed: .parquet, .arrow, .jsonl, .json, .csv"):
        load_pairs(data_args("--train_data_dir", tmp_path / "pairs.xlsx"))


def test_too_many_bad_rows_are_refused_with_their_reasons(tmp_path):
    rows = labelled_rows() * 3
    rows[1] = {**rows[1], "caption": ""}
    rows[2] = {**rows[2], "label_0": 7.0}
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError) as error:
        load_pairs(data_args("--train_data_dir", tmp_path))
    assert "--max_bad_fraction is 0.1, but of 12 rows 2 cannot be used: 1 with no caption (the first: row 1" in str(
        error.value
    ) and "1 with label not understood (the first: row 2" in str(error.value)
    pairs = load_pairs(data_args("--train_data_dir", tmp_path, "--max_bad_fraction", 0.2))
    assert pairs.counts()["pairs"] == 10
    assert len(load_pairs(data_args("--train_data_dir", tmp_path, "--max_train_samples", 1))) == 1


def test_images_that_are_too_small_or_the_same_are_bad_rows(tmp_path):
    rows = labelled_rows()
    rows[1]["jpg_1"] = rows[1]["jpg_0"]
    rows[2]["jpg_0"] = encode(PILImage.new("RGB", (31, 90)))
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    examples = batch_of("--train_data_dir", tmp_path, min_image_size=32)
    reasons = dict(bad_row for example in examples for bad_row in example["bad_rows"])
    assert reasons == {
        "row 1": "both images are the same",
        "row 2": "image below --min_image_size: 31 x 90 pixels",
    }
    assert {example["row"] for example in examples} == {"row 0", "row 3"}


def stored(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def test_sixteen_bits_cmyk_and_animations():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for image_format in ("PNG", "TIFF"):
        pixels = np.asarray(decode_image(stored(PILImage.fromarray(ramp), image_format)))[..., 0]
        assert abs(pixels.astype(float) - ramp / 257).max() <= 1
    cmyk = PILImage.new("RGB", (8, 8), (200, 30, 30)).convert("CMYK")
    assert abs(np.asarray(decode_image(stored(cmyk, "JPEG")))[0, 0].astype(int) - (200, 30, 30)).max() < 12
    frames = [PILImage.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for image_format in ("GIF", "WEBP", "PNG"):
        animated = stored(frames[0], image_format, save_all=True, append_images=frames[1:])
        assert decode_image(animated).getpixel((4, 4))[0] > 240
    with pytest.raises(BadRow, match="unreadable image: its pixels are floating-point"):
        decode_image(stored(PILImage.new("F", (8, 8)), "TIFF"))
    with pytest.raises(BadRow, match="more than 16 bits"):
        decode_image(stored(PILImage.fromarray(np.full((8, 8), 70000, np.int32)), "TIFF"))


def test_paths_are_relative_to_the_file_and_names_of_what_is_missing_are_told(tmp_path):
    rows = write_files(tmp_path)
    rows[0]["jpg_0"] = "images/nothing.png"
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = load_pairs(data_args("--train_data_dir", tmp_path))
    with pytest.raises(BadRow, match="unreadable image: .*images/nothing.png"):
        pairs[0]
    assert decode_image(pairs[1].winner).getpixel((20, 16)) == (250,) * 3


def stream_of(tmp_path, num_rows=50, **options):
    """A stream of numbered pairs in three files, with ties and a row without a caption among them."""
    for part, rows in enumerate(np.array_split(np.arange(num_rows), 3)):
        table = [
            {
                "jpg_0": png("best", i), "jpg_1": png("worst", i), "label_0": 0.5 if i % 7 == 3 else 1.0,
                "caption": "" if i == 5 else str(i),
            }
            for i in rows.tolist()
        ]  # fmt: skip
        Dataset.from_list(table).to_parquet(tmp_path / f"train-{part}.parquet")
    return ["--train_data_dir", tmp_path, "--streaming", "--shuffle_buffer_size", 8,
            *(str(part) for option in options.items() for part in (f"--{option[0]}", option[1]))]  # fmt: skip


def visits_of(pairs, count, batch_size=4, **options):
    batches = pairs.batches(batch_size, 0, **options)
    taken = list(itertools.islice(batches, count))
    assert all(item.name == f"row {item.row['caption']}" for batch in taken for _, item in batch)
    return [(visit, item.row["caption"]) for batch in taken for visit, item in batch], batches


def test_a_stream_visits_every_pair_once_an_epoch_in_mixed_order(tmp_path):
    pairs = load_pairs(data_args(*stream_of(tmp_path)))
    assert isinstance(pairs, StreamedPairs)
    usable = [str(i) for i in range(50) if i % 7 != 3 and i != 5]
    visits, _ = visits_of(pairs, 2 * len(usable), batch_size=1)
    assert [visit for visit, _ in visits] == list(range(2 * len(usable)))
    epochs = [[caption for _, caption in visits[: len(usable)]], [caption for _, caption in visits[len(usable) :]]]
    assert sorted(epochs[0], key=int) == sorted(epochs[1], key=int) == usable
    assert epochs[0] != epochs[1] and epochs[0] != usable


def test_processes_share_a_stream(tmp_path):
    pairs = load_pairs(data_args(*stream_of(tmp_path)))
    whole, _ = visits_of(pairs, 30, batch_size=4)
    shares = [visits_of(pairs, 30, batch_size=2, process_index=rank, num_processes=2)[0] for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == whole


@pytest.mark.parametrize("visit", [0, 4, 20, 44, 76, 100])
def test_a_stream_goes_on_where_a_checkpoint_says(visit, tmp_path):
    """Also in the midst of a block, of a file and of a later epoch, read by another object."""
    pairs = load_pairs(data_args(*stream_of(tmp_path)))
    whole, _ = visits_of(pairs, 40)
    _, batches = visits_of(pairs, visit // 4 + 6)  # as workers do, it has read ahead
    position = json.loads(json.dumps(batches.position(visit)))
    again = load_pairs(data_args(*stream_of(tmp_path)))
    rest, _ = visits_of(again, 40 - visit // 4, visit=visit, position=position)
    assert rest == whole[visit:]


def test_rows_of_a_stream_that_cannot_be_used_are_reported_once(tmp_path):
    """By their columns, before the pair that follows; a damaged image counts as a tie, its pixels are no numbers."""
    options = stream_of(tmp_path)
    rows = Dataset.from_parquet(str(tmp_path / "train-1.parquet")).to_list()
    number = next(i for i, row in enumerate(rows) if row["label_0"] == 1.0)
    rows[number]["jpg_0"] = b"damaged"
    Dataset.from_list(rows).to_parquet(tmp_path / "train-1.parquet")
    pairs = load_pairs(data_args(*options))
    dataset = PreferenceDataset(pairs, 32, 1, 0, False, False, 0.0)
    examples = [dataset[item] for batch in itertools.islice(pairs.batches(1, 0), 42) for item in batch]
    reasons = [bad_row for example in examples for bad_row in example["bad_rows"]]
    assert [name for name, _ in sorted(reasons)] == [f"row {17 + number}", "row 5"]
    (unreadable,) = [example for example in examples if example["pixel_values"].isnan().any()]
    assert unreadable["row"] == f"row {17 + number}" and unreadable["pixel_values"].isnan().all()


def test_rows_after_the_last_pair_of_a_stream_are_reported_by_the_next_epoch(tmp_path):
    rows = labelled_rows()[:2]
    Dataset.from_list([*rows, {**rows[0], "caption": ""}]).to_parquet(tmp_path / "train.parquet")
    batches = load_pairs(data_args("--train_data_dir", tmp_path, "--streaming")).batches(1, 0)
    bad_rows = [[name for name, _ in item.bad_rows] for ((_, item),) in itertools.islice(batches, 6)]
    assert sorted(bad_rows[:2]) == [[], []] and sorted(bad_rows[2:4]) == [[], ["row 2"]]


def test_a_stream_of_the_first_pairs_only(tmp_path):
    pairs = load_pairs(data_args(*stream_of(tmp_path, max_train_samples=10)))
    visits, _ = visits_of(pairs, 20, batch_size=1)
    first = sorted(int(caption) for _, caption in visits[:10])
    assert first == sorted(int(caption) for _, caption in visits[10:]) == [0, 1, 2, 4, 6, 7, 8, 9, 11, 12]


def test_a_stream_without_a_pair(tmp_path):
    rows = [{**row, "caption": ""} for row in labelled_rows()]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no pair is left of 4 rows of the stream; 4 with no caption"):
        batch_of("--train_data_dir", tmp_path, "--streaming")


def test_defaults_are_pick_a_pics():
    args = data_args("--train_data_dir", ".")
    assert PairColumns.of(args) == PairColumns()
    assert PairColumns().image_columns() == {"--image_0_column": "jpg_0", "--image_1_column": "jpg_1"}
    assert label_meaning("Draw=0.5") == ["draw", 0.5]
    assert hasattr(train_inversion_dpo, "load_pairs")


def readme_flags():
    """The flags of README's tables of data shapes, a list of words per line."""
    readme = (Path(train_inversion_dpo.__file__).parent / "README.md").read_text()
    section = readme[readme.index("### Your data") : readme.index("**First look, then train.**")]
    for line in section.splitlines():
        if line.startswith("|"):
            flags = [code for code in re.findall(r"`([^`]*)`", line) if code.startswith("--")]
            yield from ([shlex.split(flags[0])] if flags else [])


@pytest.mark.parametrize("flags", list(readme_flags()), ids=" ".join)
def test_the_readmes_flags_are_understood(flags):
    if not {"--train_data_dir", "--dataset_name"} & set(flags):
        flags = ["--train_data_dir", ".", *flags]
    if "--scores_column" in flags and "--images_column" not in flags:
        flags = [*flags, "--images_column", "images"]
    if "--max_train_steps" in flags:  # the scripts', not the data's
        flags = flags[: flags.index("--max_train_steps")] + flags[flags.index("--max_train_steps") + 2 :]
    data_args(*flags)


def test_the_readme_has_flags_for_every_shape():
    words = {word for flags in readme_flags() for word in flags}
    assert {"--label_column", "--label_map", "--winner_column", "--score_0_column", "--images_column",
            "--score_weights", "--caption_column", "--caption_template", "--streaming"} <= words  # fmt: skip


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([True, False, True, False], ["--label_map", "1=0", "0=1"], "true|True"),
        ([1, 0, 1, 0], ["--label_map", "true=0", "false=1"], "holds 1"),
        (["1", "0", "best", "0"], [], "holds 'best'"),
        ([1.0, 0.0, 2.0, 0.0], ["--label_map", "1.0=1", "0.0=0"], "holds 2.0, not named by --label_map"),
    ],
)
def test_a_label_that_the_map_does_not_name_is_never_read_by_itself(labels, options, message, streaming, tmp_path):
    rows = [{**row, "label_0": label} for row, label in zip(labelled_rows(), labels, strict=True)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    args = data_args("--train_data_dir", tmp_path, "--max_bad_fraction", 1, *options, *streaming)
    if not streaming:
        with pytest.raises(ValueError, match=f"label not understood.*({message})"):
            load_pairs(argparse.Namespace(**vars(args) | {"max_bad_fraction": 0.1}))
    else:
        pairs = load_pairs(args)
        try:
            items = pairs.sample(9, 0)
        except ValueError as error:
            assert "4 with label not understood" in str(error)
        else:
            assert len(items) == 3


@pytest.mark.parametrize("store", ["parquet", "disk", "stream"])
@pytest.mark.parametrize(
    ("names", "labels", "options"),
    [
        (["left", "right"], [0, 1, 0, 1], ["--label_map", "left=1", "right=0"]),
        (["1", "0"], [0, 1, 0, 1], []),
        (["no", "yes"], [1, 0, 1, 0], ["--label_map", "yes=1", "no=0"]),
    ],
)
def test_labels_stored_as_numbers_of_names(names, labels, options, store, tmp_path):
    features = Features(
        jpg_0=Value("binary"), jpg_1=Value("binary"), label_0=ClassLabel(names=names), caption=Value("string")
    )
    rows = [{**row, "label_0": label} for row, label in zip(labelled_rows(), labels, strict=True)]
    rows = Dataset.from_list(rows, features=features)
    rows.save_to_disk(tmp_path / "data") if store == "disk" else rows.to_parquet(tmp_path / "data" / "train.parquet")
    streaming = ["--streaming"] if store == "stream" else []
    assert_winners(batch_of("--train_data_dir", tmp_path / "data", *options, *streaming, count=4), *EXPECTED)


def test_names_of_labels_without_a_meaning(tmp_path):
    rows = Dataset.from_list(labelled_rows()).cast_column("label_0", Value("int64"))
    rows.cast_column("label_0", ClassLabel(names=["left", "right"])).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="--label_column label_0 holds the names left, right; say by --label_map"):
        load_pairs(data_args("--train_data_dir", tmp_path / "data"))


def test_hidden_files_and_other_splits_are_left_alone(tmp_path):
    to_parquet(tmp_path)
    for name in (".cache/train-x.parquet", "._train.parquet", "validation-0.parquet", "test/data.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Dataset.from_list(labelled_rows() * 2).to_parquet(tmp_path / name)
    assert load_pairs(data_args("--train_data_dir", tmp_path)).num_pairs == 4
    (tmp_path / "train.parquet").rename(tmp_path / "pairs.parquet")
    assert load_pairs(data_args("--train_data_dir", tmp_path)).num_pairs == 4
    assert load_pairs(data_args("--train_data_dir", tmp_path, "--dataset_split_name", "test")).num_pairs == 8


@pytest.mark.parametrize("layout", ["jsonl", "csv", "metadata", "parquet"])
@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
def test_files_with_the_columns_win_over_folders_of_their_names(layout, streaming, tmp_path):
    """A table beside the folders that it points into, which are called like its columns."""
    for column, name in (("chosen", "best"), ("rejected", "worst")):
        (tmp_path / column).mkdir()
        for i in range(3):
            (tmp_path / column / f"{i}.png").write_bytes(png(name, i))
    rows = [{"chosen": f"chosen/{i}.png", "rejected": f"rejected/{2 - i}.png", "caption": f"no {i}"} for i in range(3)]
    if layout == "jsonl":
        (tmp_path / "pairs.JSONL").write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif layout == "csv":
        lines = ["chosen,rejected,caption", *(",".join(row.values()) for row in rows)]
        (tmp_path / "pairs.csv").write_text("\n".join(lines))
    elif layout == "metadata":
        rows = [{"chosen_file_name": r["chosen"], "rejected_file_name": r["rejected"], "caption": r["caption"]}
                for r in rows]  # fmt: skip
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    options = ["--train_data_dir", tmp_path, "--winner_column", "chosen", "--loser_column", "rejected", *streaming]
    assert_winners(batch_of(*options, count=3), *[("best", "worst", f"no {i}") for i in range(3)])
    with pytest.raises(SystemExit):
        data_args("--train_data_dir", tmp_path, "--winner_column", "chosen", "--loser_column", "chosen")


def test_captions_of_folders_in_files_as_editors_write_them(tmp_path):
    """Byte-order marks, hidden files beside, names with the folder or a dot in them, odd line separators in a text."""
    for column, name in (("chosen", "best"), ("rejected", "worst")):
        (tmp_path / column).mkdir()
        for i, stem in enumerate(("v1.0", "b")):
            (tmp_path / column / f"{stem}.png").write_bytes(png(name, i))
            (tmp_path / column / f"._{stem}.png").write_bytes(b"resource fork")
    rows = [{"file_name": "v1.0", "caption": "one\u2028two"}]
    (tmp_path / "captions.jsonl").write_text(
        "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    (tmp_path / "._captions.jsonl").write_bytes(b"\x00\x05")
    (tmp_path / "chosen" / "b.txt").write_text("\ufefftext\n", encoding="utf-8")
    options = ["--train_data_dir", tmp_path, "--winner_column", "chosen", "--loser_column", "rejected"]
    assert_winners(batch_of(*options), ("best", "worst", "one\u2028two"), ("best", "worst", "text"))
    rows = [{"file_name": "rejected/b.png", "caption": "prefixed"}, {"file_name": "v1.0.png", "caption": "suffixed"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert_winners(batch_of(*options), ("best", "worst", "prefixed"), ("best", "worst", "suffixed"))
    (tmp_path / "captions.jsonl").write_text('{"file_name": "zzz", "caption": "x"}')
    with pytest.raises(ValueError, match="no file_name of the JSONL is that of an image: zzz"):
        load_pairs(data_args(*options))
    (tmp_path / "captions.jsonl").write_text('{"caption": "x"}\n{nonsense')
    with pytest.raises(ValueError, match="captions.jsonl, line 1, is no row with a file_name"):
        load_pairs(data_args(*options))


def test_image_folders_of_splits(tmp_path):
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / split).mkdir()
        rows = []
        for i in range(count):
            for name in ("best", "worst"):
                (tmp_path / split / f"test_{i}_{name}.png").write_bytes(png(name, i))
            rows.append({"jpg_0_file_name": f"test_{i}_best.png", "jpg_1_file_name": f"test_{i}_worst.png",
                         "label_0": 1, "caption": str(i)})  # fmt: skip
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_pairs(data_args("--train_data_dir", tmp_path)).num_pairs == 2
    assert load_pairs(data_args("--train_data_dir", tmp_path, "--dataset_split_name", "test")).num_pairs == 1


@pytest.mark.parametrize("store", [to_parquet, to_jsonl, to_image_folder])
def test_paths_with_brackets_blanks_and_umlauts(store, tmp_path):
    (tmp_path / "j [v2] ü x").mkdir()
    assert_winners(batch_of("--train_data_dir", store(tmp_path / "j [v2] ü x")), *EXPECTED)


def test_compressed_jsonl_and_captions_that_look_like_nothing(tmp_path):
    rows = write_files(tmp_path)
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert_winners(batch_of("--train_data_dir", tmp_path), *EXPECTED)
    (tmp_path / "pairs.jsonl.gz").unlink()
    lines = ["jpg_0,jpg_1,label_0,caption", *(f"{r['jpg_0']},{r['jpg_1']},{r['label_0']},None" for r in rows)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    assert {example["caption"] for example in batch_of("--train_data_dir", tmp_path)} == {"None"}


def test_base64_of_every_dialect():
    data = bytes(range(256)) * 2
    for text in (base64.b64encode(data), base64.encodebytes(data), base64.urlsafe_b64encode(data)):
        assert read_image(text.decode()) == data


def test_addresses(tmp_path):
    (tmp_path / "a.png").write_bytes(png("best"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert read_image(f"{address}/a.png") == png("best")
        with pytest.raises(BadRow, match="unreadable image: HTTP Error 404"):
            read_image(f"{address}/b.png")
    finally:
        server.shutdown()
    assert read_image((tmp_path / "a.png").as_uri()) == png("best")

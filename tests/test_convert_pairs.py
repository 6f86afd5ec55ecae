"""examples/convert_pairs.py: whatever shape and storage the data have, the training scripts read the same pairs."""

import base64
import contextlib
import csv
import functools
import gzip
import http.server
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
from pathlib import Path

import convert_pairs
import numpy as np
import pair_sources
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    ReadInstruction,
    Value,
)
from huggingface_hub import HfApi, constants
from PIL import ExifTags
from PIL import Image as PILImage

import train_inversion_dpo
from training_utils import decode_image, load_pairs

GREYS = {"best": 250, "good": 180, "poor": 110, "worst": 40}  # winners are the lighter images


def png(name, number=0, size=(40, 32)):
    """An image of its own for each number, and of a grey that tells its name."""
    image = PILImage.new("RGB", size, (GREYS[name],) * 3)
    image.putpixel((number % size[0], number // size[0]), (0, 0, 0))
    return encode(image)


def name_of(image):
    """The name that an image's grey tells."""
    grey = decode_image(image).getpixel((20, 16))[0]
    return min(GREYS, key=lambda name: abs(GREYS[name] - grey))


def read_back(folder, *options):
    """The pairs that the training script reads in a folder."""
    argv = ["--pretrained_model_name_or_path", "x", "--output_dir", "y", "--train_data_dir", folder, *options]
    pairs = load_pairs(train_inversion_dpo.parse_args(list(map(str, argv)))[0])
    return [pairs[i] for i in range(len(pairs))]


def assert_winners(folder, *expected):
    """The pairs in a folder are these, by names of winner and loser and by caption."""
    found = [(name_of(pair.winner), name_of(pair.loser), *pair.captions) for pair in read_back(folder)]
    assert sorted(found) == sorted(expected)


@pytest.fixture
def convert(tmp_path):
    """Runs the program and returns its folder."""
    numbers = itertools.count()

    def run(data, *options, name="--train_data_dir"):
        output_dir = tmp_path / f"out {next(numbers)}"
        convert_pairs.main([str(option) for option in (name, data, *options, "--output_dir", output_dir)])
        return output_dir

    return run


@pytest.fixture
def refused(convert, capsys):
    """Runs the program with what it must refuse, and returns the one line that it printed for it."""

    def run(data, *options, **more):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            convert(data, *options, **more)
        assert stop.value.code == 2
        printed = capsys.readouterr()
        usage, message = [line for line in printed.err.splitlines() if not line.startswith("left out: ")]
        assert usage.startswith("usage: ") and "Traceback" not in printed.err + printed.out
        return message.split(": error: ", 1)[1]

    return run


LABELLED = [  # image_0, image_1, the label of image 0, caption
    ("best", "worst", 1.0, "zero"),
    ("worst", "best", 0.0, "one é"),
    ("good", "poor", 1.0, "two"),
    ("poor", "good", 0.0, "None"),  # which is text, whatever pandas thinks
]
EXPECTED = [("best", "worst", "zero"), ("best", "worst", "one é"), ("good", "poor", "two"), ("good", "poor", "None")]


def labelled_rows(image=png):
    return [
        {"jpg_0": image(a, 2 * i), "jpg_1": image(b, 2 * i + 1), "label_0": label, "caption": caption}
        for i, (a, b, label, caption) in enumerate(LABELLED)
    ]


def write_parquet(rows, file, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, **options).to_parquet(file)
    return file.parent


# Storages


def write_files(folder):
    """Writes the images as files and returns rows with their relative paths."""
    (folder / "images").mkdir(parents=True)

    def path(name, number):
        file = folder / "images" / f"{number} test.png"  # which is no split
        file.write_bytes(png(name, number))
        return str(file.relative_to(folder))

    return labelled_rows(path)


def lines(rows):
    return "\n".join(map(json.dumps, rows))


STORAGES = {}


def storage(write):
    """Registers a function that writes `labelled_rows` in a folder, and returns what to convert if not the folder."""
    STORAGES[write.__name__] = write
    return write


@storage
def parquet(folder):
    write_parquet(labelled_rows(), folder / "deep" / "0.parquet")


@storage
def image_features(folder):
    features = Features(jpg_0=Image(), jpg_1=Image(), label_0=Value("float64"), caption=Value("string"))
    write_parquet(labelled_rows(), folder / "train.parquet", features=features)


@storage
def view_types(folder):  # as polars writes them
    types = {"jpg_0": pa.binary_view(), "jpg_1": pa.binary_view(), "label_0": pa.int8(), "caption": pa.string_view()}
    pq.write_table(pa.Table.from_pylist(labelled_rows(), pa.schema(types)), folder / "train.parquet")


@storage
def arrow_file(folder):
    table = pa.Table.from_pylist(labelled_rows())
    with pa.ipc.new_file(folder / "pairs.arrow", table.schema) as file:
        file.write_table(table)


@storage
def saved(folder):
    Dataset.from_list(labelled_rows()).save_to_disk(folder)


@storage
def arrow_stream(folder):
    saved(folder)
    (folder / "state.json").unlink()


@storage
def saved_splits(folder):
    rows = Dataset.from_list(labelled_rows())
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(folder)


@storage
def jsonl(folder):
    (folder / "pairs.JSONL").write_text("\ufeff" + lines(write_files(folder)).replace("\n", "\r\n\n"), "utf-8")


@storage
def compressed_jsonl(folder):
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(lines(write_files(folder)).encode()))


@storage
def json_list(folder):
    (folder / "pairs.json").write_text(json.dumps(write_files(folder), indent=2))
    return folder / "pairs.json"


@storage
def indented_objects(folder):
    (folder / "pairs.json").write_text("\n\n".join(json.dumps(row, indent=2) for row in write_files(folder)))
    return folder / "pairs.json"


@storage
def comma_separated(folder):
    rows = write_files(folder)
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@storage
def separated_by_semicolons(folder):
    rows = write_files(folder)
    rows = [";".join(map(str, row)) for row in (rows[0], *(row.values() for row in rows))]
    (folder / "pairs.csv").write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")


@storage
def separated_by_tabs(folder):
    rows = write_files(folder)
    rows = ["\t".join(map(str, row)) for row in (rows[0], *(row.values() for row in rows))]
    (folder / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")


@storage
def paths_of_windows(folder):
    rows = [{k: v.replace("/", "\\") if "jpg" in k else v for k, v in row.items()} for row in write_files(folder)]
    (folder / "pairs.jsonl").write_text(lines(rows))


@storage
def paths_of_another_unicode_form(folder):
    """macOS writes accents as characters of their own, and archives keep that."""
    rows = write_files(folder / "ä é")
    (folder / "ä é").rename(folder / unicodedata.normalize("NFD", "ä é"))
    rows = [{k: f"ä é/{v}" if "jpg" in k else v for k, v in row.items()} for row in rows]
    (folder / "pairs.jsonl").write_text(lines(rows))


@storage
def base64_jsonl(folder):
    encoders = itertools.cycle([base64.b64encode, base64.encodebytes, base64.urlsafe_b64encode])
    rows = labelled_rows(lambda *image: next(encoders)(png(*image)).decode())
    rows[0]["jpg_0"] = "data:image/png;base64," + rows[0]["jpg_0"]
    (folder / "pairs.jsonl").write_text(lines(rows))


@storage
def pixels(folder):
    rows = labelled_rows(lambda *image: np.asarray(decode_image(png(*image))).tolist())
    (folder / "pairs.jsonl").write_text(lines(rows))


@storage
def image_folder(folder):
    rows = write_files(folder / "train")
    rows = [{f"{k}_file_name" if k.startswith("jpg") else k: v for k, v in row.items()} for row in rows]
    (folder / "train" / "metadata.jsonl").write_text(lines(rows))
    (folder / "test").mkdir()
    (folder / "test" / "metadata.jsonl").write_text(lines([{"jpg_0_file_name": "a.png"}]))


@storage
def image_folder_with_columns_of_other_names(folder):
    (folder / "metadata.jsonl").write_text(lines(write_files(folder)))


@pytest.mark.parametrize("write", STORAGES.values(), ids=STORAGES)
def test_every_storage(write, convert, tmp_path):
    folder = tmp_path / "j [v2] ü x"
    folder.mkdir()
    assert_winners(convert(write(folder) or folder), *EXPECTED)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
def test_a_data_set_by_name_with_a_configuration(streaming, convert, tmp_path):
    """`load_dataset` takes folders as names, too."""
    write_parquet(labelled_rows()[:1], tmp_path / "in" / "a" / "x.parquet")
    write_parquet(labelled_rows(), tmp_path / "in" / "b" / "y.parquet")
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}/*" for name in "ab")
    (tmp_path / "in" / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    options = ["--dataset_config_name", "b", "--cache_dir", tmp_path / "cache", *streaming]
    assert_winners(convert(tmp_path / "in", *options, name="--dataset_name"), *EXPECTED)
    assert not any(tmp_path.glob("cache/**/*.arrow"))


SPLITS = {"train": list(map(str, range(40))), "test": ["a", "b", "c"]}  # their captions


def with_splits(folder, kind):
    """A folder with the rows of two splits, as files or as `save_to_disk` writes them."""
    splits = {
        split: [{"jpg_0": png("best", i), "jpg_1": png("worst", i), "label_0": 1, "caption": captions[i]}
                for i in range(len(captions))]
        for split, captions in SPLITS.items()
    }  # fmt: skip
    if kind == "saved":
        DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()}).save_to_disk(folder)
        return folder
    for split, rows in splits.items():
        if kind == "jsonl":
            for row in rows:
                row |= {name: base64.b64encode(row[name]).decode() for name in ("jpg_0", "jpg_1")}
            folder.mkdir(exist_ok=True)
            (folder / f"{split}.jsonl").write_text(lines(rows))
        else:
            write_parquet(rows, folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "saved", "by name"])
def test_a_split_may_be_a_slice_or_a_sum_as_datasets_spells_them(kind, convert, refused, tmp_path):
    folder, specs = with_splits(tmp_path / "in", kind), ["train[:5]", "train[35:]", "train[-3:]", "train[:10%]"]
    options = {"name": "--dataset_name"} if kind == "by name" else {}
    specs += ["train[10:20]+test[1:]", "test+train[95%:]", "train[33%:66%](closest)", "train[:99]", "train+test[:-1]"]
    for spec in specs:
        parts = ReadInstruction.from_spec(spec).to_absolute({split: len(rows) for split, rows in SPLITS.items()})
        expected = [caption for part in parts for caption in SPLITS[part.splitname][part.from_ : part.to]]
        found = read_back(convert(folder, "--dataset_split_name", spec, **options))
        assert expected and [pair.captions[0] for pair in found] == expected
    for spec in ("train[:x]", "nothing[:5]", "train[50:]", "train[", "train[:10%](odd)"):
        assert spec in refused(folder, "--dataset_split_name", spec, **options)


def test_of_folders_a_slice_is_taken_and_there_is_one_split(convert, refused, tmp_path):
    folder = write_folders(tmp_path / "in", names=("a", "b"))
    for name in "ab":
        (folder / f"{name}.txt").write_text(name)
    assert_winners(convert(folder, *WINNERS, "--dataset_split_name", "train[50%:]"), ("best", "worst", "b"))
    assert "'test'" in refused(folder, *WINNERS, "--dataset_split_name", "test")


@pytest.mark.parametrize("kind", ["pandas", "torch", "numpy"])
def test_a_format_that_is_saved_with_the_rows_does_not_matter(kind, convert, tmp_path):
    rows = Dataset.from_list(labelled_rows()).with_format(kind, columns=["caption"])
    rows.save_to_disk(tmp_path / "in")
    assert_winners(convert(tmp_path / "in"), *EXPECTED)


def test_files_of_other_splits_and_hidden_ones_are_left_alone(convert, refused, tmp_path):
    def names(*files, split="train"):
        folder = tmp_path / "-".join(files).replace("/", " ")
        for i, file in enumerate(files):
            rows = [{"jpg_0": png("best", i), "jpg_1": png("worst", i), "label_0": 1, "caption": file}]
            write_parquet(rows, folder / file)
        pairs = read_back(convert(folder, "--dataset_split_name", split))
        return sorted(caption for pair in pairs for caption in pair.captions)

    assert names("pairs_train.parquet", "pairs_test.parquet") == ["pairs_train.parquet"]
    assert names("pairs_train.parquet", "pairs_test.parquet", split="test") == ["pairs_test.parquet"]
    shards = [f"data/{split}-00000-of-00001-a.parquet" for split in ("validation", "validation_unique", "test")]
    assert names(*shards, split="validation") == shards[:1]
    assert names(*shards, split="validation_unique") == shards[1:2]
    assert names("pairs.parquet", "training.parquet", "test/pairs.parquet") == ["pairs.parquet", "training.parquet"]
    assert names("pairs.parquet", "Train/a.parquet") == ["Train/a.parquet"]
    assert names("pairs.parquet", ".cache/pairs.parquet", "._pairs.parquet") == ["pairs.parquet"]
    (tmp_path / "only").mkdir()
    write_parquet(labelled_rows(), tmp_path / "only" / "test.parquet")
    assert "--train_data_dir" in refused(tmp_path / "only")


def write_folders(folder, suffixes=(".PNG", ".jpeg"), names=("deep/v1.0", "deep/b")):
    """Two folders with images of equal names except for the suffix, and hidden files between them."""
    for (column, name), suffix in zip((("chosen", "best"), ("rejected", "worst")), suffixes, strict=True):
        for i, stem in enumerate(names):
            file = folder / column / f"{stem}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(name, i))
            (file.parent / f"._{file.name}").write_bytes(b"resource fork")
    return folder


WINNERS = ["--winner_column", "chosen", "--loser_column", "rejected"]


@pytest.mark.parametrize("captions", ["beside the winner", "in the folder", "in a JSONL", "in a JSONL with folders"])
def test_two_folders_of_equal_names(captions, convert, refused, tmp_path):
    folder = write_folders(tmp_path / "in")
    if "JSONL" in captions:
        prefix, suffix = ("chosen/", ".png") if "folders" in captions else ("", "")
        row = '{"file_name": "%sdeep/%s%s", "caption": "%s\u2028é"}'
        text = "\ufeff" + "\n".join(row % (prefix, name, suffix, name) for name in ("v1.0", "b", "c"))
        (folder / "captions.jsonl").write_text(text, "utf-8")
        (folder / "._captions.jsonl").write_bytes(b"\x00\x05")
    else:
        place = folder / "chosen" if captions == "beside the winner" else folder
        (place / "deep").mkdir(exist_ok=True)
        for name in ("v1.0", "b"):
            (place / "deep" / f"{name}.txt").write_text(f"\ufeff{name}\u2028é\n", "utf-8")
    assert_winners(convert(folder, *WINNERS), *[("best", "worst", f"{name}\u2028é") for name in ("v1.0", "b")])
    if "JSONL" in captions:
        for text in ('{"file_name": "zzz", "caption": "x"}', '{"caption": "x"}', "{nonsense"):
            (folder / "captions.jsonl").write_text(text)
            assert "--train_data_dir" in refused(folder, *WINNERS)


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.Caption", "a.png.txt", "a.JPEG.caption"])
@pytest.mark.parametrize("place", ["chosen", "rejected", "."])
def test_caption_files_of_every_name(name, place, convert, tmp_path):
    folder = write_folders(tmp_path / "in", names=("a",))
    (folder / place / name).write_text("a caption")
    assert_winners(convert(folder, *WINNERS), ("best", "worst", "a caption"))


def test_a_txt_file_goes_before_a_caption_file(convert, tmp_path):
    folder = write_folders(tmp_path / "in", names=("a",))
    for name in ("a.caption", "a.txt"):
        (folder / name).write_text(name)
    assert_winners(convert(folder, *WINNERS), ("best", "worst", "a.txt"))


def test_captions_that_are_missing_are_told_with_where_they_were_looked_for(refused, tmp_path):
    folder = write_folders(tmp_path / "in", names=("deep/a", "deep/b"))
    (folder / "captions").mkdir()
    (folder / "captions" / "a.json").write_text("{}")
    message = refused(folder, *WINNERS)
    for told in ("chosen/deep/a.txt", "rejected/deep/a.txt", "captions, chosen, rejected", "(1 .json)", "(2 .png)"):
        assert told in message


def test_what_a_folder_holds_is_told_where_its_pairs_are_not_found(refused, tmp_path):
    folder = write_folders(tmp_path / "in", names=("a",))
    (folder / "chosen").rename(folder / "good")
    (folder / "@eaDir").mkdir()
    message = refused(folder, *WINNERS)
    assert "good, rejected" in message and "chosen and rejected" in message and "eaDir" not in message
    (folder / "captions.jsonl").write_text('{"file_name": "a", "caption": "x"}')
    message = refused(folder, *WINNERS)
    assert "--winner_column chosen" in message and "good, rejected" in message
    (folder / "good").rename(folder / "chosen")
    (folder / "chosen" / "a.PNG").rename(folder / "chosen" / "a.heic")
    assert "a.heic (1 .heic)" in refused(folder, *WINNERS)


LEFT_BEHIND = ["@eaDir", "@EADIR", "$RECYCLE.BIN", "__MACOSX", "System Volume Information", "#recycle", ".Trash-1000"]


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_systems_leave_behind_holds_no_pairs(name, convert, tmp_path):
    folder = write_folders(tmp_path / "in", names=("a", f"{name}/a", f"{name}/b.png/THUMB"))
    (folder / "a.txt").write_text("a")
    assert_winners(convert(folder, *WINNERS), ("best", "worst", "a"))
    write_parquet([], tmp_path / "table" / name / "train.parquet")
    write_parquet(labelled_rows(), tmp_path / "table" / "train.parquet")
    assert_winners(convert(tmp_path / "table"), *EXPECTED)


def test_a_file_whose_name_begins_with_two_underscores_is_an_image(convert, tmp_path):
    """Collections of drawings name their downloads so; only folders that begin so are caches."""
    folder = write_folders(tmp_path / "in", names=("__somebody__sample",))
    (folder / "__somebody__sample.txt").write_text("a")
    assert_winners(convert(folder, *WINNERS), ("best", "worst", "a"))


@pytest.mark.parametrize("captions", ["file", "JSONL"])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_the_same_in_both_unicode_forms_and_with_backslashes(forms, captions, convert, tmp_path):
    folder, (one, other) = tmp_path / "in", forms
    for column, form, grey in (("gewählt", one, "best"), ("rejected", other, "worst")):
        file = folder / unicodedata.normalize(form, column) / "ü" / unicodedata.normalize(form, "über é.png")
        file.parent.mkdir(parents=True)
        file.write_bytes(png(grey))
    if captions == "file":
        (folder / "ü").mkdir()
        (folder / "ü" / unicodedata.normalize(other, "über é.txt")).write_text("x")
    else:
        name = unicodedata.normalize(other, "gewählt\\ü\\über é.png")
        (folder / "captions.JSONL").write_text(json.dumps({"file_name": name, "caption": "x"}))
    columns = ["--winner_column", unicodedata.normalize(other, "gewählt"), "--loser_column", "rejected"]
    assert_winners(convert(folder, *columns), ("best", "worst", "x"))


def test_the_datas_folder_may_be_typed_in_the_other_unicode_form(convert, tmp_path):
    write_parquet(labelled_rows(), tmp_path / unicodedata.normalize("NFD", "é ü") / "train.parquet")
    assert_winners(convert(tmp_path / unicodedata.normalize("NFC", "é ü")), *EXPECTED)


def test_names_that_are_not_unicode_are_names_too(convert, tmp_path, capsys):
    """Linux takes any bytes, as an old archive from Windows holds them."""
    folder = write_folders(tmp_path / "in", names=("a", os.fsdecode(b"K\xe4se")))
    (folder / "a.txt").write_text("a")
    (folder / os.fsdecode(b"K\xe4se.txt")).write_text("b")
    (folder / "chosen" / os.fsdecode(b"\xfcbrig.png")).write_bytes(png("best", 9))
    assert_winners(
        convert(folder, *WINNERS, "--max_bad_fraction", 0.5), ("best", "worst", "a"), ("best", "worst", "b")
    )
    assert "left out: " in capsys.readouterr().out


def test_labels_in_words_are_told_of_the_map_and_are_the_same_in_both_unicode_forms(convert, refused, tmp_path):
    labels = [unicodedata.normalize("NFD", label) for label in ("schön", "übel", "schön", "übel")]
    data = with_labels(labels, tmp_path / "in" / "train.parquet")
    assert "--label_map" in refused(data)
    assert_winners(convert(data, "--label_map", "schön=1", "ÜBEL=0"), *EXPECTED)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl", "metadata.jsonl", "captions.jsonl"])
def test_text_in_another_encoding_is_told(name, encoding, refused, tmp_path):
    folder = write_folders(tmp_path / "in", names=("a",)) if name == "captions.jsonl" else tmp_path / "in"
    rows = [{"file_name": "a", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 1, "caption": "Käse"}]
    text = (
        "jpg_0,jpg_1,label_0,caption\na.png,b.png,1,Käse" if "csv" in name else json.dumps(rows[0], ensure_ascii=False)
    )
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding=encoding)
    message = refused(folder, *(WINNERS if name == "captions.jsonl" else []))
    assert name in message and "UTF-8" in message and "Latin-1" in message


def test_a_caption_file_that_is_not_utf8_is_a_bad_row_with_its_name(convert, tmp_path, capsys):
    folder = write_folders(tmp_path / "in\x1b[31m")
    for name, text in (("v1.0", b"v1.0"), ("b", "Käse".encode("latin-1"))):
        (folder / "deep" / f"{name}.txt").parent.mkdir(exist_ok=True)
        (folder / "deep" / f"{name}.txt").write_bytes(text)
    assert_winners(convert(folder, *WINNERS, "--max_bad_fraction", 0.5), ("best", "worst", "v1.0"))
    output = capsys.readouterr().out
    assert "left out: deep/b: caption is not UTF-8, but perhaps Latin-1" in output and "deep/b.txt" in output
    assert "[31m" in output and "\x1b" not in output


def test_folders_behind_links(convert, tmp_path):
    """The folder itself and those within it: what the links' owner put there is not outside."""
    write_folders(tmp_path / "real", names=("a",))
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "made of links").mkdir()
    for name in ("chosen", "rejected", "a.txt"):
        (tmp_path / "made of links" / name).symlink_to(tmp_path / "real" / name)
    for folder in ("link", "made of links"):
        assert_winners(convert(tmp_path / folder, *WINNERS), ("best", "worst", "a"))


def test_folders_that_do_not_fit_together(convert, refused, tmp_path, capsys):
    one = write_folders(tmp_path / "one", names=("a",))
    (one / "chosen" / "b.png").write_bytes(png("best"))
    for name in "ab":
        (one / f"{name}.txt").write_text(name)
    assert_winners(convert(one, *WINNERS, "--max_bad_fraction", 0.5), ("best", "worst", "a"))
    assert "b: no image" in capsys.readouterr().out
    (one / "chosen" / "a.jpg").write_bytes(png("best"))
    assert "--train_data_dir" in refused(one, *WINNERS)  # a name twice
    (two := tmp_path / "two").mkdir()
    for file in ("chosen/1_w.png", "rejected/1_l.png"):
        (two / file).parent.mkdir()
        (two / file).write_bytes(png("best"))
    assert "chosen/1_w" in refused(two, *WINNERS)


@pytest.mark.parametrize("layout", ["pairs.jsonl", "metadata.jsonl", "pairs.parquet"])
def test_a_table_wins_over_the_folders_that_its_columns_are_called_like(layout, convert, tmp_path):
    folder = write_folders(tmp_path / "in", (".png", ".png"), ("0", "1"))
    ending = "_file_name" if "metadata" in layout else ""
    columns = (f"chosen{ending}", f"rejected{ending}", "caption")
    rows = [dict(zip(columns, (f"chosen/{i}.png", f"rejected/{1 - i}.png", str(i)), strict=True)) for i in range(2)]
    write_parquet(rows, folder / layout) if "parquet" in layout else (folder / layout).write_text(lines(rows))
    assert_winners(convert(folder, *WINNERS), ("best", "worst", "0"), ("best", "worst", "1"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pairs.txt", ""), ("train.jsonl", ""), ("train.jsonl", "{nonsense"), ("train.jsonl", "[1, 2]"),
        ("train.jsonl", '{"jpg_0": 1'), ("metadata.jsonl", '{"caption": "x"}'), ("train.parquet", "nonsense"),
        ("train.arrow", "nonsense"), ("train.csv", "jpg_0,jpg_1,label_0,caption\n\xff,b,1,x"),
        ("dataset_dict.json", "{}"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_read(name, text, refused, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(text.encode("latin-1"))
    message = refused(tmp_path / "in")
    assert "--output_dir" not in message and ("--train_data_dir" in message or "--image_0_column" in message)
    assert not (tmp_path / "out 0").exists()


def test_files_that_are_not_there_or_of_another_kind(refused, tmp_path):
    (tmp_path / "pairs.xlsx").write_text("")
    assert ".xlsx" in refused(tmp_path / "pairs.xlsx")
    assert str(tmp_path / "nothing") in refused(tmp_path / "nothing")
    (tmp_path / "pairs").mkdir()
    near = f"did you mean {tmp_path / 'pairs'}?"
    assert near in refused(tmp_path / "piars")
    assert near in refused(tmp_path / "piars", name="--dataset_name")
    assert near in refused(tmp_path / "pairs.xlsx", "--image_root", tmp_path / "piars")
    assert "user/name" in refused("https://huggingface.co/datasets/a/b", name="--dataset_name")


def test_text_that_is_not_utf8_ends_the_program_with_the_place(refused, tmp_path):
    """Parquet files do not check that their text is UTF-8."""
    texts = pa.array([b"good"] * 20 + [b"\xff\xfe"])
    table = {"w": [png("best", i) for i in range(21)], "l": [png("worst", i) for i in range(21)]}
    table["caption"] = pa.Array.from_buffers(pa.string(), 21, texts.buffers())
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(table), tmp_path / "in" / "train.parquet")
    assert "train.parquet, row 15" in refused(tmp_path / "in", *BEST)
    assert not list(tmp_path.glob("out*/*"))


# Shapes


def with_labels(labels, file, feature=None):
    """A folder with `labelled_rows` that have other labels."""
    rows = [{**row, "label_0": label} for row, label in zip(labelled_rows(), labels, strict=True)]
    features = {"jpg_0": Value("binary"), "jpg_1": Value("binary"), "label_0": feature, "caption": Value("string")}
    return write_parquet(rows, file, features=Features(features) if feature else None)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([True, False, True, False], []),
        (["1", "0", "1", "0.0"], []),
        (["left", "Right", "LEFT ", "right"], ["--label_map", "left=1", "right=0"]),
        ([1, 2, 1, 2], ["--label_map", "1=1", "2=0"]),
        ([-1.0, 1.0, -1.0, 1.0], ["--label_map", "-1=1", "1=0"]),
        ([-1.5, 1, -1.5, 1], ["--label_map=-1.5=1", "--label_map=1=0"]),
        ([True, False, True, False], ["--label_map", "true=1", "false=0"]),
    ],
)
def test_labels_of_every_kind(labels, options, convert, tmp_path):
    assert_winners(convert(with_labels(labels, tmp_path / "in" / "train.parquet"), *options), *EXPECTED)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([True, False, True, False], ["--label_map", "1=0", "0=1"]),
        ([1, 0, 1, 0], ["--label_map", "true=0", "false=1"]),
        (["1", "0", "best", "0"], []),
        ([1.0, 0.0, 2.0, 0.0], ["--label_map", "1.0=1", "0.0=0"]),
        ([1.0, 0.0, None, 0.0], []),
    ],
)
def test_a_label_that_the_map_does_not_name_is_never_guessed(labels, options, refused, tmp_path):
    data = with_labels(labels, tmp_path / "in" / "train.parquet")
    assert "label" in refused(data, *options, "--max_bad_fraction", 0)


@pytest.mark.parametrize("store", ["parquet", "arrow", "disk"])
@pytest.mark.parametrize(("names", "options"), [("lr", ["--label_map", "l=1", "r=0"]), ("10", [])])
def test_labels_stored_as_numbers_of_names(names, options, store, convert, refused, tmp_path):
    data = with_labels([0, 1, 0, 1], tmp_path / "parquet" / "0.parquet", ClassLabel(names=list(names)))
    if store != "parquet":
        data, rows = tmp_path / "saved", Dataset.from_parquet(str(data / "0.parquet"), cache_dir=tmp_path / "cache")
        rows.save_to_disk(data)
    if store == "arrow":
        (data / "state.json").unlink()
    assert_winners(convert(data, *options), *EXPECTED)
    assert "--label_column" in refused(data, "--label_map", "up=1", "down=0")


def shaped_rows(num_rows=9):
    return [
        {
            "w": png("best", i), "l": png("worst", i), "label": "lrt"[i % 3], "word": "x", "s": float(i % 4), "t": 1.0,
            "caption": str(i), "texts": [f"a {i}", " ", f"b {i}"], "prompt": {"text": f"nested {i}"},
            "objects": ["cat", None, "mat"], "relations": [["cat", "on", "mat"]], "style": "oil" if i else None,
            "dotted.name": "dots", "counts": [{"n": 2, "what": "cats"}, {"n": 1, "what": "dog"}],
        }
        for i in range(num_rows)
    ]  # fmt: skip


@pytest.fixture
def shaped(tmp_path):
    return write_parquet(shaped_rows(), tmp_path / "in" / "train.parquet")


BEST = ["--winner_column", "w", "--loser_column", "l"]
SCORES = ["--image_0_column", "w", "--image_1_column", "l", "--score_0_column", "s", "--score_1_column", "t"]
LABELS = ["--image_0_column", "w", "--image_1_column", "l", "--label_column", "label",
          "--label_map", "l=1", "r=0", "t=.5"]  # fmt: skip


@pytest.mark.parametrize("tie_policy", ["drop", "soft"])
@pytest.mark.parametrize(
    ("options", "signs"),
    [
        (LABELS, "+-0+-0+-0"),
        (SCORES, "-0++-0++-"),
        ([*SCORES, "--min_score_margin", "1.5"], "000+000+0"),
        ([*SCORES, "--min_score_margin", "1"], "-0++-0++-"),
        ([*SCORES, "--score_weights", "-1e0"], "+0--+0--+"),
        ([*SCORES[:5], "s", "t", "--score_1_column", "t", "t", "--score_weights", "0", "1"], "000000000"),
    ],
)
def test_two_images_with_labels_or_scores(options, signs, tie_policy, convert, refused, shaped):
    options = [*options, "--tie_policy", tie_policy]
    if tie_policy == "drop" and not set(signs) & {"+", "-"}:
        assert "9 ties" in refused(shaped, *options)
        return
    pairs = read_back(convert(shaped, *options), "--tie_policy", tie_policy)
    signs_of = {"best": "+", "worst": "-"}
    found = {pair.captions[0]: "0" if pair.is_tie else signs_of[name_of(pair.winner)] for pair in pairs}
    expected = {str(i): sign for i, sign in enumerate(signs) if tie_policy == "soft" or sign != "0"}
    assert found == expected and len(pairs) == len(expected)


def test_strengths_follow_from_scores(convert, shaped):
    output_dir = convert(shaped, *SCORES, "--strength_scale", 2, "--tie_policy", "soft", "--min_score_margin", 0.5)
    for pair in read_back(output_dir, "--strength_column", "strength", "--tie_policy", "soft"):
        margin = abs(int(pair.captions[0]) % 4 - 1)
        assert pair.strength == pytest.approx(1.0 if margin == 0 else 2 / (1 + math.exp(-2 * margin)) - 1)
    assert "strength" not in pq.read_schema(next(convert(shaped, *SCORES).iterdir())).names


GROUP = ["poor", "best", "worst", "good"]
GROUP_SCORES = [2.0, 9.0, 1.0, 7.5]


@pytest.mark.parametrize(
    ("how", "expected"),
    [("best_worst", "best worst"), ("adjacent", "best good, good poor, poor worst"),
     ("all", "best good, best poor, best worst, good poor, good worst, poor worst")],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True], ids=["lists", "list of structs"])
def test_groups_of_images_with_scores(how, expected, nested, convert, tmp_path):
    images = [png(name) for name in GROUP]
    if nested:
        row = {"items": [{"image": image, "score": s} for image, s in zip(images, GROUP_SCORES, strict=True)]}
        columns, features = ["--images_column", "items.image", "--scores_column", "items.score"], None
    else:
        row = {"images": images, "scores": GROUP_SCORES}
        columns = ["--images_column", "images", "--scores_column", "scores"]
        features = Features(images=List(Image()), scores=List(Value("float32")), caption=Value("string"))
    data = write_parquet([{**row, "caption": "x"}], tmp_path / "in" / "train.parquet", features=features)
    output_dir = convert(data, *columns, "--pairs_per_group", how)
    assert_winners(output_dir, *[(*pair.split(), "x") for pair in expected.split(", ")])


def test_of_a_group_the_usable_images_stay_and_its_row_counts_once(convert, tmp_path, capsys):
    scores = [[2.0, None, 1.0, 7.5], [None, math.inf, 1.0, math.nan], GROUP_SCORES[:3], None, GROUP_SCORES]
    images = [[png(name, i) for name in GROUP] for i in range(5)]
    images[4][0], images[4][3] = b"damaged", b"also damaged"
    rows = [{"images": images[i], "scores": scores[i], "caption": str(i)} for i in range(5)]
    options = ["--images_column", "images", "--scores_column", "scores", "--pairs_per_group", "all"]
    data = write_parquet(rows, tmp_path / "in" / "train.parquet")
    output_dir = convert(data, *options, "--max_bad_fraction", 1)
    expected = [("good", "poor", "0"), ("good", "worst", "0"), ("poor", "worst", "0"), ("best", "worst", "4")]
    assert_winners(output_dir, *expected)
    assert "rows left out    4\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "captions"),
    [
        (["--caption_column", "texts"], ["a 1", "b 1"]),
        (["--caption_column", "prompt.text"], ["nested 1"]),
        (["--caption_column", "dotted.name"], ["dots"]),
        (["--caption_template", "{objects}: {relations}, {style}"], ["cat, mat: cat on mat, oil"]),
        (["--caption_template", "{counts} {{ {prompt}"], ["2 cats, 1 dog { nested 1"]),
    ],
)
def test_captions(options, captions, convert, shaped):
    assert read_back(convert(shaped, *BEST, *options))[1].captions == captions


def test_half_a_character_is_no_caption(convert, tmp_path, capsys):
    """JSON can hold one, parquet cannot."""
    rows = write_files(tmp_path / "in")
    rows[0]["caption"] = "\ud83d"
    (tmp_path / "in" / "pairs.jsonl").write_text(lines(rows))
    assert_winners(convert(tmp_path / "in", "--max_bad_fraction", 0.5), *EXPECTED[1:])
    assert "row 0: caption" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("", "--image_0_column"),
        ("--winner_column nothing --loser_column l", "--winner_column"),
        ("--winner_column w --loser_column s", "unreadable image"),
        ("--images_column w --scores_column s", "no score"),
        ("--image_0_column w --image_1_column l --score_0_column s --score_1_column word", "number"),
        ("--winner_column w --loser_column l --caption_column prompt.txt", "--caption_column"),
        ("--winner_column w --loser_column l --caption_column s", "no caption"),
        ("--winner_column w --loser_column l --caption_template {nothing}", "--caption_template"),
    ],
)
def test_columns_that_do_not_fit(options, named, refused, shaped):
    assert named in refused(shaped, *options.split())


@pytest.mark.parametrize(
    "options",
    [
        "--dataset_name x", "--dataset_config_name x", "--image_root nothing", "--winner_column a",
        "--scores_column a", "--score_0_column a", "--winner_column a --loser_column a",
        "BEST --scores_column d --images_column c",
        "BEST --label_column c", "BEST --image_0_column c", "BEST --tie_policy soft", "BEST --strength_scale 1",
        "SCORES --label_map l=1", "SCORES --score_weights 1 2", "SCORES --strength_scale 0", "--score_weights 1",
        "--score_0_column a b --score_1_column c", "--min_score_margin 1", "--pairs_per_group all",
        "--label_map left=2", "--label_map left=1 LEFT=0", "--caption_template x", "--caption_template {a!r}",
        "--caption_template {a", "--caption_template {a} --caption_column b", "--max_side 10 --min_image_size 20",
        "--max_bad_fraction 1.5", "--output_dir in/x", "--output_dir full",
        "--train_data_dir nothing --output_dir in/train.parquet/x",  # known before data are looked for
    ],
)  # fmt: skip
def test_options_that_contradict_each_other(options, shaped, tmp_path, monkeypatch, capsys):
    """The message names the last of them."""
    monkeypatch.chdir(tmp_path)
    write_parquet(labelled_rows(), tmp_path / "full" / "deep" / "0.parquet")
    options = options.replace("BEST", " ".join(BEST)).replace("SCORES", " ".join(SCORES)).split()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        convert_pairs.main(["--train_data_dir", "in", "--output_dir", "out", *options])
    assert stop.value.code == 2
    usage, message = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and [word for word in options if word.startswith("--")][-1] in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "in" / "x").exists()


def run(*options, **environment):
    return subprocess.run(
        [sys.executable, convert_pairs.__file__, *map(str, options)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def test_from_the_command_line(tmp_path):
    """A label below zero, and paths that begin with a tilde."""
    rows = [{**row, "label_0": {1: -1, 0: 1}[row["label_0"]]} for row in write_files(tmp_path / "images")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pairs.jsonl").write_text(lines(rows))
    paths = ["--train_data_dir", "~/in", "--image_root", "~/images", "--output_dir", "~/out", "--cache_dir", "~/cache"]
    done = run(*paths, "--label_map", "-1=1", "1=0", HOME=str(tmp_path))
    assert done.returncode == 0 and done.stderr == ""
    assert_winners(tmp_path / "out", *EXPECTED)
    done = run(*paths, "--label_map", "-1=1", "1=0", HOME=str(tmp_path))
    assert done.returncode == 2 and "--output_dir" in done.stderr and "Traceback" not in done.stderr


def test_without_a_network_a_data_set_of_the_hub_fails_at_once(refused, monkeypatch):
    """Half a minute of retries came before the message; the Hub is asked once."""
    asked = []

    def no_network(_, repo, repo_type, **__):
        asked.append((repo, repo_type))
        raise ConnectionError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "repo_info", no_network)
    assert "--dataset_name some/data" in refused("some/data", name="--dataset_name")
    assert constants.HF_HUB_OFFLINE and asked == [("some/data", "dataset")]


def test_help_is_nothing_but_the_help():
    done = run("--help")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("usage: ")


class ClosedPipe(io.RawIOBase):
    def writable(self):
        return True

    def write(self, _):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("console", ["cp1252", "ascii", "latin-1", "closed pipe", "none"])
def test_a_console_that_cannot_show_a_name_ends_nothing(console, convert, tmp_path, monkeypatch):
    rows = write_files(tmp_path / "日本 é")
    rows[0]["jpg_0"] = "画像→.png"  # which is not there, and named
    (tmp_path / "日本 é" / "ペア.jsonl").write_text(lines(rows))
    raw = ClosedPipe() if console == "closed pipe" else io.BytesIO()
    encoding = "utf-8" if console in ("closed pipe", "none") else console
    stdout = None if console == "none" else io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    with contextlib.suppress(BrokenPipeError):  # of the report, when the work is done
        convert(tmp_path / "日本 é", "--max_bad_fraction", 0.5)
    assert_winners(tmp_path / "out 0", *EXPECTED[1:])
    if console not in ("closed pipe", "none"):
        assert "\\u753b" in raw.getvalue().decode(console)


# What is written


def test_the_hubs_viewer_and_a_plain_load_show_images(convert, shaped):
    (file,) = convert(shaped, *BEST).iterdir()
    row = Dataset.from_parquet(str(file))[0]
    assert row["jpg_0"].size == (40, 32) and list(row) == ["jpg_0", "jpg_1", "label_0", "caption"]
    assert pq.read_table(file)["jpg_0"][0].as_py()["bytes"] in (png("best"), png("worst"))  # as they were


def test_the_order_of_columns_does_not_tell_the_winner_and_belongs_to_the_seed(convert, tmp_path):
    data = write_parquet(shaped_rows(60), tmp_path / "in" / "train.parquet")
    labels = []
    for seed in (0, 0, 1):
        rows = pq.read_table(convert(data, *BEST, "--seed", seed)).to_pylist()
        assert all(name_of(row["jpg_0"]["bytes"]) == ("best" if row["label_0"] else "worst") for row in rows)
        labels.append([row["label_0"] for row in rows])
    assert labels[0] == labels[1] != labels[2] and 15 < sum(labels[0]) < 45


def test_unusable_rows_are_counted_by_reason_and_the_first_ten_are_named(convert, tmp_path, capsys):
    rows = shaped_rows(60)
    for i in range(20, 35):
        rows[i]["w"] = b"damaged"
    rows[1]["caption"] = " "
    rows[2]["w"] = rows[2]["l"]
    rows[3]["w"] = png("best", size=(31, 90))
    rows[-1]["w"] = None
    data = write_parquet(rows, tmp_path / "in" / "train.parquet")
    pairs = read_back(convert(data, *BEST, "--max_bad_fraction", 0.4, "--min_image_size", 32))
    printed = capsys.readouterr().out.splitlines()
    assert [pair.captions[0] for pair in pairs] == [row["caption"] for i, row in enumerate(rows)
                                                    if i not in {1, 2, 3, *range(20, 35), 59}]  # fmt: skip
    named = [line for line in printed if line.startswith("left out: ")]
    assert all(f"row {i}: " in line for i, line in zip([1, 2, 3, *range(20, 27)], named, strict=True))
    counts = {int(line.split()[0]) for line in printed if line.startswith("    ")}
    assert counts == {15, 1} and "rows left out    19" in printed and "rows read        60" in printed
    assert "pairs written    41, ties left out: 0" in printed


@pytest.mark.parametrize(
    ("num_rows", "bad", "fraction", "rows_read"),
    [(12, {0, 11}, 0.1, 12), (12, range(12), 0.1, 12), (1250, range(1250), 0.1, 112), (50, range(1, 3), 0, 2)],
)
def test_too_many_unusable_rows_end_the_program_early_and_leave_nothing(
    num_rows, bad, fraction, rows_read, refused, tmp_path
):
    rows = [{"w": png("best", i), "l": png("worst", i), "caption": "x"} for i in range(num_rows)]
    for i in bad:
        rows[i]["w"] = b"damaged"
    data = write_parquet(rows, tmp_path / "in" / "train.parquet")
    message = refused(data, *BEST, "--max_bad_fraction", fraction, "--max_file_mb", 0.1)
    assert "--max_bad_fraction" in message and f"first {rows_read} rows" in message
    assert f"row {min(bad)}:" in message and not list(tmp_path.glob("out*/*"))


@pytest.mark.parametrize("bad", [range(2), range(100), range(600, 720)], ids=["first two", "first 100", "cluster"])
def test_bad_rows_that_stand_together_do_not_end_the_program(bad, convert, tmp_path, capsys):
    """They are few of all: a shard, or a folder of them, is missing."""
    rows = [{"w": png("best", i), "l": png("worst", i), "caption": "x"} for i in range(1250)]
    for i in bad:
        rows[i]["w"] = b"damaged"
    convert(write_parquet(rows, tmp_path / "in" / "train.parquet"), *BEST)
    assert f"rows left out    {len(bad)}\n" in capsys.readouterr().out


def test_a_full_disk_ends_the_program_and_leaves_nothing(refused, shaped, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_pairs.PairWriter, "add", fail)
    assert "--output_dir" in refused(shaped, *BEST)
    assert not list(tmp_path.glob("out*/*"))


def test_files_are_bounded_and_a_large_set_is_several(convert, tmp_path):
    rng = np.random.default_rng(0)
    noise = [encode(PILImage.fromarray(rng.integers(0, 256, (64, 64, 3), "u1"))) for _ in range(12)]
    rows = [{"w": image, "l": png("worst", i), "caption": str(i)} for i, image in enumerate(noise)]
    data = write_parquet(rows, tmp_path / "in" / "train.parquet")
    several = convert(data, *BEST, "--max_file_mb", 0.04)
    names = sorted(file.name for file in several.iterdir())
    assert len(names) > 2 and names == [f"train-{i:05}-of-{len(names):05}.parquet" for i in range(len(names))]
    assert max(file.stat().st_size for file in several.iterdir()) < 80_000
    assert [pair.captions[0] for pair in read_back(several)] == [str(i) for i in range(12)]


def test_max_pairs_reads_no_further_than_it_has_to(convert, tmp_path):
    rows = write_files(tmp_path / "in")
    rows[1]["jpg_0"] = "nothing.png"  # in whose place comes another
    (tmp_path / "in" / "pairs.jsonl").write_text(lines(rows * 3) + "\n{nonsense")
    output_dir = convert(tmp_path / "in", "--max_pairs", 8, "--max_bad_fraction", 0.5)
    assert_winners(output_dir, *(3 * [EXPECTED[0], *EXPECTED[2:]])[:8])


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_memory_does_not_grow_with_the_data(suffix, convert, tmp_path):
    row = {**write_files(tmp_path / "in")[0], "ballast": "x" * 2**18}
    with open(tmp_path / "in" / f"pairs.{suffix}", "w") as file:
        if suffix == "csv":
            file.write(",".join(row) + "\n")
        for _ in range(100):
            file.write((json.dumps(row) if suffix == "jsonl" else ",".join(map(str, row.values()))) + "\n")
    tracemalloc.start()
    try:
        convert(tmp_path / "in")
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**18
    finally:
        tracemalloc.stop()


# Images


def converted_image(convert, tmp_path, data, *options):
    """What becomes of an image file."""
    rows = [{"w": data, "l": png("worst", 5), "caption": "x"}]
    (tmp_path / "in").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "train.parquet")
    return read_back(convert(tmp_path / "in", *BEST, *options))[0].winner


@pytest.mark.parametrize("kind", ["uint16", "int32", "dark int32", "TIFF", "TGA", "JPEG2000", "CMYK"])
def test_what_the_training_scripts_cannot_read_becomes_8_bit_png(kind, convert, tmp_path):
    ramp = np.linspace(0, 255 if "dark" in kind else 65535, 64).round().reshape(8, 8)
    if "int" in kind:
        data = encode(PILImage.fromarray(ramp.astype(kind.split()[-1])), "TIFF")
        expected = ramp if "dark" in kind else ramp // 257
        expected = np.repeat(expected[..., None], 3, 2)
    elif kind == "CMYK":  # which can be read as it is
        image = PILImage.new("RGB", (8, 8), (200, 30, 30)).convert("CMYK")
        data = encode(image, "JPEG")
        expected = np.asarray(PILImage.open(io.BytesIO(data)).convert("RGB"))
    else:
        image = PILImage.fromarray(np.repeat((ramp // 257).astype("u1")[..., None], 3, 2))
        data, expected = encode(image, kind), np.asarray(image)
    found = converted_image(convert, tmp_path, data)
    np.testing.assert_array_equal(np.asarray(decode_image(found)), expected)
    assert found == data if kind == "CMYK" else PILImage.open(io.BytesIO(found)).mode in ("L", "RGB")


def test_pixels_of_unknown_range_and_programs_are_refused(refused, tmp_path):
    images = [(PILImage.new("F", (8, 8)), "TIFF"), (PILImage.fromarray(np.full((8, 8), 70000, np.int32)), "TIFF")]
    for image, image_format in [*images, (PILImage.new("RGB", (8, 8)), "EPS")]:  # which a program would have to draw
        rows = [{"w": encode(image, image_format), "l": png("worst"), "caption": "x"}]
        data = write_parquet(rows, tmp_path / "in" / "train.parquet")
        assert "unreadable image" in refused(data, *BEST)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_max_side_shrinks_well_and_leaves_smaller_images_alone(image_format, convert, tmp_path):
    rng = np.random.default_rng(0)
    image = PILImage.fromarray(rng.integers(0, 256, (6, 9, 3), "u1")).resize((120, 80), PILImage.Resampling.BICUBIC)
    exif = PILImage.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stands on its side
    data = encode(image, image_format, exif=exif, **({"lossless": True} if image_format == "WEBP" else {}))
    assert converted_image(convert, tmp_path, data, "--max_side", 120) == data
    found = converted_image(convert, tmp_path, data, "--max_side", 60)
    assert PILImage.open(io.BytesIO(found)).format == ("JPEG" if image_format == "JPEG" else "PNG")
    expected = decode_image(data).resize((40, 60), PILImage.Resampling.LANCZOS)
    difference = np.abs(np.asarray(decode_image(found)).astype(int) - np.asarray(expected))
    assert difference.mean() < (1.5 if image_format == "JPEG" else 0.01)


def test_transparency_survives_in_what_is_unusual(convert, tmp_path):
    image = PILImage.new("RGBA", (40, 32), (250, 0, 0, 0))
    found = converted_image(convert, tmp_path, encode(image, "TGA"), "--max_side", 20)
    assert decode_image(found).getpixel((9, 9)) == (255, 255, 255)


def assert_left_out(convert, capsys, folder, image, *named):
    """A row with that image is left out, named in words, and another one stays."""
    rows = [{"jpg_0": str(image), "jpg_1": "b.png", "label_0": 1, "caption": "x"}, *write_files(folder)[:1]]
    (folder / "b.png").write_bytes(png("worst"))
    (folder / "pairs.jsonl").write_text(lines(rows))
    started = time.monotonic()
    output_dir = convert(folder, "--max_bad_fraction", 0.5, "--allow_outside_images")
    assert_winners(output_dir, EXPECTED[0])
    printed = capsys.readouterr().out
    assert "row 0: unreadable image: " in printed and all(str(name) in printed for name in named)
    assert time.monotonic() - started < 10


def test_a_path_that_is_not_found_is_told_in_full(convert, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_left_out(convert, capsys, Path("in"), "images/nothing", tmp_path / "in" / "images" / "nothing")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_not_read(kind, convert, tmp_path, capsys):
    place = tmp_path / "odd.png"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
    assert_left_out(convert, capsys, tmp_path / "in", place, place)


@pytest.fixture
def server(tmp_path):
    """The address of a server of `tmp_path` / web, which sends /drip.png a byte at a time."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if re.search("%(?![0-9A-F]{2})", self.path):
                return self.send_error(400)
            if "drip" not in self.path:
                return super().do_GET()
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)

    (tmp_path / "web").mkdir()
    handler = functools.partial(Handler, directory=tmp_path / "web")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_addresses(server, convert, tmp_path, capsys):
    web = tmp_path / "web"
    for i, name in enumerate(("a.png", "ein Bild é 100%.png", "日本.png", "l.png")):
        (web / name).write_bytes(png("worst" if name == "l.png" else "best", i))
    names = ("a.png", "ein Bild é 100%.png", "日本.png", "%E6%97%A5%E6%9C%AC.png?x=1 é")
    addresses = [
        *(f"{server}/{name}" for name in names),
        (web / "ein Bild é 100%.png").as_uri(),
        f"file://{web}/ein Bild é 100%.png",
        str(web / "a.png"),
    ]
    rows = [{"w": a, "l": f"{server}/l.png", "caption": str(i)} for i, a in enumerate(addresses)]
    rows.append({**rows[0], "w": f"{server}/nothing.png"})
    (tmp_path / "pairs.jsonl").write_text(lines(rows))
    output_dir = convert(tmp_path / "pairs.jsonl", *BEST, "--max_bad_fraction", 0.2, "--allow_outside_images")
    assert_winners(output_dir, *[("best", "worst", str(i)) for i in range(len(addresses))])
    printed = capsys.readouterr().out
    assert "404" in printed and "images outside   15 " in printed  # a path below the folder is not among them


@pytest.mark.parametrize("place", ["up", "absolute", "home", "file", "address", "typed", "bytes"])
def test_what_lies_outside_of_the_data_is_read_only_if_that_is_allowed(
    place, server, convert, tmp_path, capsys, monkeypatch
):
    """The path of a stranger's row may name any file of this machine; the folder may be widened by --image_root."""
    monkeypatch.setenv("HOME", str(tmp_path / "web"))
    (tmp_path / "web" / "secret.png").write_bytes(png("best", 0))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "l.png").write_bytes(png("worst", 0))
    image = {
        "up": "../web/secret.png", "absolute": str(tmp_path / "web" / "secret.png"), "home": "~/secret.png",
        "file": (tmp_path / "web" / "secret.png").as_uri(), "address": f"{server}/secret.png",
        "typed": {"bytes": None, "path": "../web/secret.png"},
        "bytes": {"bytes": "../web/secret.png", "path": None},  # which is opened like a path
    }[place]  # fmt: skip
    rows = [{"w": image, "l": "l.png", "caption": "outside"}, {"w": "l.png", "l": "l.png", "caption": "same"}]
    (tmp_path / "in" / "pairs.jsonl").write_text(lines(rows))
    options = (tmp_path / "in" / "pairs.jsonl", *BEST, "--max_bad_fraction", 1)
    with pytest.raises(SystemExit):
        convert(*options)
    assert "1 with an image outside of the data's folder (--allow_outside_images)" in capsys.readouterr().err
    assert_winners(convert(*options, "--allow_outside_images"), ("best", "worst", "outside"))
    assert "images outside   1 " in capsys.readouterr().out


def test_addresses_have_limits(server, convert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pair_sources, "MAX_SECONDS", 0.5)
    assert_left_out(convert, capsys, tmp_path / "slow", f"{server}/drip.png", "drip.png")
    monkeypatch.setattr(pair_sources, "MAX_IMAGE_BYTES", 2000)
    (tmp_path / "web" / "large.png").write_bytes(bytes(2001))
    assert_left_out(convert, capsys, tmp_path / "large", f"{server}/large.png", "2000 bytes")
    assert_left_out(convert, capsys, tmp_path / "file", tmp_path / "web" / "large.png", "2000 bytes")

"""Preference data as nobody would write them: images, labels, scores, captions, columns that hypothesis invents.

Rows are converted and read back as the training scripts read them. No usable row may be lost, no pair swapped, and bad
data end in one line; what is right is decided here, by oracles that know nothing of the code.

    HYPOTHESIS_PROFILE=long python -m pytest tests/test_fuzz.py

looks for minutes where the ordinary run, which is the same every time, looks for seconds.
"""

import base64
import contextlib
import io
import itertools
import json
import math
import os
import re
import string
import tempfile
from decimal import Decimal
from pathlib import Path

import convert_pairs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, event, example, given, settings
from hypothesis import strategies as st
from pair_sources import PairColumns, read_image, to_readable
from PIL import ExifTags, Image

import train_inversion_dpo
from training_utils import BadRow, decode_image, load_pairs

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("quick", max_examples=60, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=1000, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Images

MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "La", "RGBa",
         "I;16"]  # fmt: skip
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO", "PCX", "DIB", "SGI"]
LOSSLESS = ("PNG", "BMP", "TIFF", "WEBP", "PPM", "TGA", "SGI")
SIDES = st.one_of(st.integers(1, 5), st.sampled_from([1, 2, 300, 3000]), st.integers(6, 70))


@st.composite
def images(draw):
    """An image of any mode, with noise, and sometimes with a palette whose colours are transparent."""
    mode = draw(st.sampled_from(MODES))
    width, height = draw(SIDES), draw(SIDES)
    assume(width * height <= 20_000)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if mode in ("I", "I;16"):
        most = draw(st.sampled_from([1, 255, 256, 65535] + [70_000] * (mode == "I")))
        pixels = rng.integers(0, most + 1, (height, width)).astype("u2" if mode == "I;16" else "i4")
        return Image.fromarray(pixels)
    if mode == "F":
        return Image.fromarray(rng.random((height, width), dtype="f4"))
    origin = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    bands = len(Image.new(origin, (1, 1)).getbands())
    image = Image.frombytes(origin, (width, height), rng.bytes(width * height * bands))
    if mode != origin:
        image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    if mode == "P" and draw(st.booleans()):
        image.info["transparency"] = draw(st.one_of(st.integers(0, 255), st.binary(min_size=1, max_size=256)))
    if mode in ("L", "RGB") and draw(st.booleans()):
        image.info["transparency"] = 7 if mode == "L" else (7, 8, 9)
    return image


@st.composite
def image_files(draw):
    """(image, format, orientation, bytes) of what PIL is able to save, and to read again."""
    image, image_format = draw(images()), draw(st.sampled_from(FORMATS))
    options, orientation = {}, 1
    if draw(st.booleans()):
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = orientation = draw(st.integers(0, 9))
    if draw(st.integers(0, 3)) == 0:
        options |= {"save_all": True, "append_images": [image.copy()] * draw(st.integers(1, 2))}
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    if image_format == "WEBP":
        options["lossless"] = True
    file = io.BytesIO()
    try:
        image.save(file, image_format, **options)
        Image.open(io.BytesIO(file.getvalue())).load()
    except Exception:  # not every mode, size and option goes into every format
        assume(False)
    return image, image_format, orientation, file.getvalue()


@settings(max_examples=3 * settings().max_examples)
@given(image_files(), st.one_of(st.none(), st.integers(1, 100)))
def test_what_pil_saves_is_made_readable(saved, max_side):
    image, image_format, orientation, data = saved
    with Image.open(io.BytesIO(data)) as file:
        file.load()
        stored_mode, size, largest = file.mode, file.size, max(np.ravel(file.getextrema()))
        has_exif = orientation in range(2, 9) and file.getexif().get(ExifTags.Base.Orientation) == orientation
    if stored_mode == "F" or stored_mode == "I" and largest > 65535:
        with pytest.raises(BadRow, match="^unreadable image: its pixels"):
            to_readable(data, max_side)
        return
    readable, found_size = to_readable(data, max_side)
    decoded = decode_image(readable)
    size = size[::-1] if has_exif and orientation >= 5 else size
    assert decoded.mode == "RGB" and decoded.size == found_size
    if max_side and max(size) > max_side:
        assert max(found_size) == max_side
        return
    assert found_size == size
    if image_format not in LOSSLESS or orientation not in (0, 1, 9):
        return
    if stored_mode.startswith("I"):
        pixels = np.minimum(np.asarray(image).astype(int), 65535)  # as some formats store it
        expected = pixels if stored_mode == "I" and largest <= 255 else pixels // 257
        np.testing.assert_array_equal(np.asarray(decoded)[..., 0], expected)
    if image.mode in ("1", "L", "RGB") and "transparency" not in image.info:
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@given(image_files(), st.data())
def test_damaged_images_are_bad_rows_or_readable(saved, data):
    damaged = bytearray(saved[-1])
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(damaged) - 1, data.draw(st.sampled_from([40, 400, 10**9])))))
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    damaged = bytes(damaged[: data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))])
    try:
        readable, size = to_readable(damaged, data.draw(st.one_of(st.none(), st.integers(1, 100))))
    except BadRow as error:
        assert str(error).startswith("unreadable image: ") and "\n" not in str(error)
    else:
        assert decode_image(readable).size == size


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters()), st.binary()),
    lambda parts: st.one_of(st.lists(parts, max_size=3), st.dictionaries(st.text(), parts, max_size=3)),
    max_leaves=6,
)
ADDRESSES = st.builds(
    "".join,
    st.lists(
        st.one_of(st.sampled_from(["data:", ";base64,", "file://", "memory://", "x://", "zip://", "::", "/", "..",
                                   "\0", "\ud800", "~", "%", "A" * 4095, "QUJD", "=", "\n"]), st.text(max_size=5)),
        max_size=5,
    ),
)  # fmt: skip


@given(st.one_of(ANYTHING, ADDRESSES, st.fixed_dictionaries({"bytes": ANYTHING, "path": ANYTHING})))
def test_anything_in_place_of_an_image(value):
    try:
        readable, size = to_readable(read_image(value, Path(__file__).parent))
    except BadRow as error:
        assert str(error).startswith(("unreadable image: ", "no image")) and "\n" not in str(error)
    else:
        assert decode_image(readable).size == size


# Rows


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(number) for number in range(64)]
NAMES = st.one_of(
    st.sampled_from(["a", "a.b", "a.b.c", "b", "b.c", ".", "a.", ".a", " ", "a b", "é", "日本語", "images.score"]),
    st.text(string.printable.replace("\0", ""), min_size=1, max_size=4),
)
STORAGES = st.sampled_from(["parquet", "arrow", "jsonl"])


def write(rows, storage, folder):
    """Writes rows in one of several formats, of whatever they can hold."""
    if storage == "jsonl":
        encode = {bytes: lambda value: base64.b64encode(value).decode(), Decimal: str}
        text = "\n".join(json.dumps(row, default=lambda value: encode[type(value)](value)) for row in rows)
        (folder / "pairs.jsonl").write_text(text)
        return
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError):
        assume(False)
    if storage == "parquet":
        pq.write_table(table, folder / "pairs.parquet", row_group_size=4)
    else:
        with pa.ipc.new_stream(folder / "pairs.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=4)


def convert(rows, storage, options, soft=False, strength=False):
    """The pairs that the training script reads after a conversion, in order, and the number of rows left out."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        folder = Path(folder)
        for name in ("in", "out"):
            (folder / name).mkdir()
        write(rows, storage, folder / "in")
        argv = ["--train_data_dir", folder / "in", "--output_dir", folder / "out", "--max_bad_fraction", "1", *options]
        argv += ["--tie_policy", "soft"] if soft else []
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                convert_pairs.main(list(map(str, argv)))
        except SystemExit as stop:
            assert stop.code == 2 and len(errors.getvalue().splitlines()) == 2, errors.getvalue()
            event(errors.getvalue().splitlines()[-1][:150])
            return [], None
        argv = ["--train_data_dir", folder / "out", "--cache_dir", folder / "cache"]
        argv += [
            "--pretrained_model_name_or_path",
            "x",
            "--output_dir",
            "y",
            *(["--tie_policy", "soft"] if soft else []),
        ]
        argv += ["--strength_column", "strength"] if strength else []
        pairs = load_pairs(train_inversion_dpo.parse_args(list(map(str, argv)))[0])
        found = [pairs[i] for i in range(len(pairs))]
        assert f"pairs written    {len(found)}," in printed.getvalue()
        event("converted")
        return found, int(re.search("rows left out +([0-9]+)", printed.getvalue())[1])


LABEL_KINDS = {
    "float": st.one_of(st.none(), st.sampled_from([0.0, 1.0, 0.5, -0.0, 2.0, -1.0, 1e300]), st.floats(0, 1)),
    "int": st.one_of(st.none(), st.integers(-2, 3), st.integers(-(2**63), 2**63 - 1)),
    "bool": st.one_of(st.none(), st.booleans()),
    "str": st.one_of(st.none(), st.sampled_from(["0", "1", "0.5", "left", " Left", "RIGHT", "tie", ""]),
                     st.text(max_size=3)),
    "decimal": st.one_of(st.none(), st.sampled_from([Decimal("0"), Decimal("1"), Decimal("0.5"), Decimal("2.5")])),
    "list": st.one_of(st.none(), st.lists(st.integers(0, 1), max_size=2)),
    "struct": st.one_of(st.none(), st.fixed_dictionaries({"x": st.integers(0, 1)})),
}  # fmt: skip
MAP_KEYS = st.one_of(
    st.sampled_from(["0", "1", "0.5", "2", "left", "right", "Tie", "true", "False", "-1", "a=b", " x "]),
    st.text(min_size=1, max_size=3),
)
CAPTIONS = st.one_of(
    st.none(), st.sampled_from(["", " ", "\t\n", "\u2003", "a cat", "é", "日本語 🐈"]), st.text(max_size=6)
)
WORDS = st.sampled_from(["a cat", "é", "日本語 🐈", "a", "b"])


def number_of(text):
    try:
        return float(text)
    except ValueError:
        return None


def meaning_of(label, label_map):
    """1, 0 or 0.5 of a label, None if it has no meaning."""
    if label is None or isinstance(label, float) and math.isnan(label):
        return None
    text = ("true" if label else "false") if isinstance(label, bool) else str(label).strip().lower()
    for key, meaning in label_map or [["0", 0], ["0.5", 0.5], ["1", 1], ["false", 0], ["true", 1]]:
        if key == text or number_of(key) is not None and number_of(key) == number_of(text):
            return meaning
    return None


@given(st.data(), st.booleans(), STORAGES)
def test_labels(data, soft, storage):
    names = data.draw(st.lists(NAMES, min_size=4, max_size=4, unique=True))
    kind, wild = (
        data.draw(st.sampled_from(list(LABEL_KINDS))),
        data.draw(st.sampled_from(["labels", "captions", "images"])),
    )
    labels = LABEL_KINDS[kind] if wild == "labels" else st.sampled_from([0, 1, 1, 0, 0.5])
    captions = CAPTIONS if wild == "captions" else WORDS
    words, options = [], ["image_0_column", "image_1_column", "label_column", "caption_column"]
    options = [f"--{option}={name}" for option, name in zip(options, names, strict=True)]
    if wild == "labels" and data.draw(st.booleans()):
        keys = data.draw(st.lists(MAP_KEYS, min_size=1, max_size=3))
        words = [f"{key}={data.draw(st.sampled_from(['0', '1', '0.5', '.5']))}" for key in keys]
    label_map = [convert_pairs.label_meaning(word) for word in words]
    assume(len(dict(label_map)) == len({*label_map}))
    texts = st.lists(captions, max_size=3) if data.draw(st.booleans()) else captions
    rows, expected, num_ties = [], [], 0
    for i in range(data.draw(st.integers(1, 9))):
        images = (PICTURES[2 * i], PICTURES[2 * i + 1])
        if wild == "images":
            images = data.draw(st.sampled_from([images, images[::-1], (None, images[0]), (b"", b"")]))
        label, caption = data.draw(labels), data.draw(texts)
        rows.append(dict(zip(names, (*images, label, caption), strict=True)))
        meaning = meaning_of(label, label_map)
        captions = [text for text in (caption if isinstance(caption, list) else [caption]) if text and text.strip()]
        if meaning is not None and captions and all(images):
            num_ties += meaning == 0.5
            if meaning != 0.5 or soft:
                expected.append(({*images} if meaning == 0.5 else images if meaning else images[::-1], captions))
        elif meaning == 0.5 and captions and not soft:
            num_ties += 1  # nobody looks at the images of a tie that is left out
    found, num_left_out = convert(rows, storage, [*options, *(f"--label_map={word}" for word in words)], soft)
    assert [({*pair[:2]} if pair.is_tie else pair[:2], pair.captions) for pair in found] == expected
    assert num_left_out in (None, len(rows) - len(expected) - (0 if soft else num_ties))


SCORE_KINDS = {
    "float": st.one_of(st.floats(-9, 9), st.floats(), st.sampled_from([0.0, 1.0, 1.7e308, -1.7e308, 5e-324, None])),
    "int": st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1)),
    "decimal": st.one_of(st.none(), st.decimals(-9, 9, places=2), st.decimals(-9, 9, places=2)),
}
WEIGHTS = st.one_of(st.sampled_from([1.0, -1.0, 0.0, 0.5]), st.floats(-1e308, 1e308))


def total(scores, weights):
    """The weighed sum of scores, None where one of them or the sum is none."""
    if any(score is None or not math.isfinite(score) for score in scores):
        return None
    result = sum(weight * float(score) for weight, score in zip(weights, scores, strict=True))
    return result if math.isfinite(result) else None


@given(st.data(), st.booleans(), st.booleans(), STORAGES)
def test_scores(data, is_group, soft, storage):
    """Groups, or two images with scores each, with one or two columns of scores."""
    draw = data.draw
    kinds = [SCORE_KINDS[draw(st.sampled_from(list(SCORE_KINDS)))] for _ in range(draw(st.integers(1, 2)))]
    weights = draw(st.one_of(st.none(), st.lists(WEIGHTS, min_size=len(kinds), max_size=len(kinds))))
    least, how = (
        draw(st.one_of(st.just(0.0), st.floats(0, 3))),
        draw(st.sampled_from(["best_worst", "all", "adjacent"])),
    )
    scale = draw(st.one_of(st.none(), st.floats(0.01, 10)))
    options = [f"--min_score_margin={least}", *(["--score_weights", *weights] if weights else [])]
    options += ["--strength_scale", scale] if scale else []
    if is_group:
        options += ["--images_column", "images", "--scores_column", *(f"s {k}" for k in range(len(kinds)))]
        options += ["--pairs_per_group", how]
    else:
        for place in range(2):
            options += [f"--score_{place}_column", *(f"s {k}.{place}" for k in range(len(kinds)))]
    rows, counts, score_of, number = [], [], {}, 0
    for _ in range(draw(st.integers(1, 6))):
        count = draw(st.integers(0, 4)) if is_group else 2
        images = PICTURES[number : number + count]
        number += count
        scores = [[draw(kind) for _ in range(count)] for kind in kinds]
        if is_group and draw(st.integers(0, 9)) == 0:
            scores[-1] = draw(st.sampled_from([None, scores[-1] + scores[-1][:1]]))
        if is_group:
            row = {"images": images, **{f"s {k}": column for k, column in enumerate(scores)}}
        else:
            row = {"jpg_0": images[0], "jpg_1": images[1]}
            row |= {f"s {k}.{place}": column[place] for k, column in enumerate(scores) for place in range(2)}
        rows.append({**row, "caption": "x"})
        if any(column is None or len(column) != count for column in scores):
            continue
        sums = [total([column[i] for column in scores], weights or [1.0] * len(kinds)) for i in range(count)]
        known = {image: score for image, score in zip(images, sums, strict=True) if score is not None}
        score_of |= known
        ranked = sorted(known.values(), reverse=True)
        pairs = {"all": itertools.combinations(ranked, 2), "adjacent": itertools.pairwise(ranked)}
        pairs = pairs.get(how, [(ranked[0], ranked[-1])]) if is_group and ranked else [tuple(ranked)]
        counts += [
            pair for pair in pairs
            if len(known) > 1 and (soft or pair[0] - pair[1] > 0 and pair[0] - pair[1] >= least)
        ]  # fmt: skip
    found, _ = convert(rows, storage, options, soft, scale is not None)
    scores = [(score_of[pair.winner], score_of[pair.loser]) for pair in found]
    assert sorted(max(pair, pair[::-1]) for pair in scores) == sorted(counts)
    for pair, (winner, loser) in zip(found, scores, strict=True):
        margin = abs(winner - loser)
        assert pair.is_tie == (margin == 0 or margin < least) and (pair.is_tie or winner > loser)
        expected = math.tanh(scale * margin / 2) if scale and not pair.is_tie else 1.0
        assert pair.strength == pytest.approx(expected)


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(st.characters(), max_size=5)
    ),
    lambda parts: st.one_of(st.lists(parts, max_size=3), st.dictionaries(st.sampled_from("abc"), parts, max_size=3)),
    max_leaves=4,
)
SENSIBLE = {
    "label_0": st.sampled_from([0, 1, 0.5, None]),
    "caption": CAPTIONS,
    "jpg_0": st.sampled_from([*PICTURES[:2], b"damaged", None]),
    "jpg_1": st.just(PICTURES[2]),
}
GOOD = {
    "label_0": st.sampled_from([0, 1]), "caption": WORDS, "jpg_0": st.sampled_from(PICTURES[:2]),
    "jpg_1": st.just(PICTURES[2]),
}  # fmt: skip


@settings(max_examples=settings().max_examples // 2)
@given(st.data(), st.sampled_from([None, *SENSIBLE]))
def test_jsonl_of_anything(data, wild):
    """At most one column holds anything at all; rows that are sensible are read nevertheless."""
    values = {name: strategy if name == wild else GOOD[name] for name, strategy in SENSIBLE.items()}
    if wild:
        values[wild] = st.one_of(GOOD[wild], SENSIBLE[wild], JSON_VALUES)
    rows = data.draw(st.lists(st.fixed_dictionaries(values), min_size=1, max_size=6))
    found, _ = convert(rows, "jsonl", [])
    usable = [
        row for row in rows
        if type(row["label_0"]) in (int, float) and row["label_0"] in (0, 1) and isinstance(row["caption"], str)
        and row["caption"].strip() and row["caption"].isprintable() and row["jpg_0"] in PICTURES
        and row["jpg_1"] in PICTURES
    ]  # fmt: skip
    captions = [caption for pair in found for caption in pair.captions]
    assert all(row["caption"] in captions for row in usable)


# Options and captions


@given(st.one_of(st.text(max_size=12), st.builds("".join, st.lists(st.sampled_from(
    ["{", "}", "{{", "}}", "{a}", "{b.c}", "{a!r}", "{a:3}", "{}", "{0}", "{a[0]}", ", ", ";", " ", "x", "é"])))),
    ANYTHING, ANYTHING)  # fmt: skip
@example("{a}", ";", None)
def test_caption_templates(template, a, b):
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = ["--train_data_dir", ".", "--output_dir", "/nothing", f"--caption_template={template}"]
            args, _ = convert_pairs.parse_args(options)
    except SystemExit as stop:
        assert stop.code == 2
        return
    try:
        (caption,) = PairColumns(args).captions({"a": a, "b": {"c": b}})
    except BadRow as error:
        assert str(error).startswith(("no caption", "caption is not"))
    else:
        assert caption.strip() and "\n" not in caption


@given(st.text(max_size=8), st.sampled_from(["", "=", "=0", "=1", "=.5", "=0.5", "=2", "= 1", "=1=0"]), st.booleans())
@example("-1", "=0", True)
@example("-1e3", "=0", True)
@example("-.5", "=0", True)
def test_label_maps(label, meaning, is_word):
    assume(not is_word or not label.startswith("-") or number_of(label) is not None)
    argument = label + meaning
    key, _, value = argument.rpartition("=")
    options = ["--train_data_dir", ".", "--output_dir", "/nothing"]
    options += ["--label_map", argument] if is_word else [f"--label_map={argument}"]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args, _ = convert_pairs.parse_args(options)
    except SystemExit as stop:
        assert stop.code == 2 and (not key or value not in ("0", "1", ".5", "0.5"))
    else:
        ((found, found_meaning),) = args.label_map
        assert found_meaning == {"0": 0, "1": 1}.get(value, 0.5)
        assert found == key.strip().lower() or number_of(found) == number_of(key) or math.isnan(float(found))

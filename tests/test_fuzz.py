"""Preference data as nobody would write them: images, labels, scores, captions, columns that hypothesis invents.

Nothing but `BadRow` may come of a row and nothing but our own `ValueError` of a data set, no usable row may be lost
and no pair swapped; what is right is decided here, by oracles that know nothing of inversion_utils.py.

    HYPOTHESIS_PROFILE=long python -m pytest tests/test_fuzz.py

looks for minutes where the ordinary run, which is the same every time, looks for seconds.
"""

import io
import itertools
import json
import math
import os
import string
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, assume, event, example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from test_data_shapes import data_args

from inversion_utils import (
    BadRow,
    PairColumns,
    PreferencePairs,
    Source,
    StreamedPairs,
    as_text,
    decode_image,
    label_meaning,
    load_pairs,
    read_image,
    resize_and_crop,
)

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("quick", max_examples=100, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=1000, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
PLACE = Path(__file__).parent

# Images

MODES = [
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "La",
    "RGBa",
    "I;16",
]
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO", "PCX", "DIB", "SGI"]
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
    bands = len(Image.new(mode, (1, 1)).getbands())
    if mode in ("1", "P", "PA", "La", "RGBa"):
        origin = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}[mode]
        bands = len(Image.new(origin, (1, 1)).getbands())
        image = Image.frombytes(origin, (width, height), rng.bytes(width * height * bands))
        image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    else:
        image = Image.frombytes(mode, (width, height), rng.bytes(width * height * bands))
    if mode == "P" and draw(st.booleans()):
        image.info["transparency"] = draw(st.one_of(st.integers(0, 255), st.binary(min_size=1, max_size=256)))
    if mode in ("L", "RGB") and draw(st.booleans()):
        image.info["transparency"] = 7 if mode == "L" else (7, 8, 9)
    return image


@st.composite
def image_files(draw):
    """(image, format, orientation, bytes) of what PIL is able to save."""
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
    except Exception:  # not every mode, size and option goes into every format
        assume(False)
    try:
        with Image.open(io.BytesIO(file.getvalue())) as stored:
            stored.load()
    except Exception:  # nor does PIL read all that it writes
        assume(False)
    return image, image_format, orientation, file.getvalue()


@settings(max_examples=3 * settings().max_examples)
@given(image_files())
def test_what_pil_saves_is_read(saved):
    image, image_format, orientation, data = saved
    with Image.open(io.BytesIO(data)) as file:
        file.load()
        stored_mode, size, largest = file.mode, file.size, max(np.ravel(file.getextrema()))
        has_exif = orientation in range(2, 9) and file.getexif().get(ExifTags.Base.Orientation) == orientation
    if stored_mode == "F" or stored_mode == "I" and largest > 65535:
        with pytest.raises(BadRow, match="^unreadable image: its pixels"):
            decode_image(data)
        return
    lossless = image_format in ("PNG", "BMP", "TIFF", "WEBP", "PPM", "TGA", "SGI")
    decoded = decode_image(data)
    if stored_mode.startswith("I") and lossless and orientation in (0, 1, 9):
        pixels = np.minimum(np.asarray(image).astype(int), 65535)  # as some formats store it
        expected = pixels if stored_mode == "I" and largest <= 255 else pixels // 257
        np.testing.assert_array_equal(np.asarray(decoded)[..., 0], expected)
    assert decoded.mode == "RGB"
    assert decoded.size == (size[::-1] if has_exif and orientation >= 5 else size)
    if image.mode in ("1", "L", "RGB") and "transparency" not in image.info and lossless and orientation in (0, 1, 9):
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@given(image_files(), st.data())
def test_damaged_images_are_bad_rows_or_images(saved, data):
    damaged = bytearray(saved[-1])
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(damaged) - 1, data.draw(st.sampled_from([40, 400, 10**9])))))
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    damaged = bytes(damaged[: data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))])
    try:
        decoded = decode_image(damaged)
    except BadRow as error:
        assert str(error).startswith(("unreadable image: ", "no image")) and "\n" not in str(error)
    else:
        assert decoded.mode == "RGB" and min(decoded.size) > 0


@given(st.tuples(SIDES, SIDES), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.sampled_from([1, 8, 32, 65]))
def test_windows_of_extreme_images(size, top, left, flip, resolution):
    assume(size[0] * size[1] < 500_000)
    view = resize_and_crop(Image.effect_noise(size, 200).convert("RGB"), resolution, (top, left), flip)
    assert view.pixels.shape == (3, resolution, resolution) and view.pixels.isfinite().all()
    assert -1 <= view.pixels.min() <= view.pixels.max() <= 1
    assert view.original_size == size[::-1] and min(view.corner) >= 0


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
    for read in (read_image, decode_image):
        try:
            assert isinstance(read(value), bytes | Image.Image)
        except BadRow as error:
            assert str(error).startswith(("unreadable image: ", "no image")) and "\n" not in str(error)


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


def read(pairs, items):
    """What is read of items: (winner, loser, captions, margin, is_tie), or the reason why not."""
    found = []
    for item in items:
        try:
            pair = pairs[item]
            found.append((*pair[:2], tuple(pair.captions), repr(pair.margin), pair.is_tie))
        except BadRow as error:
            found.append(str(error))
    return found


def both_ways(rows, columns, num_shards=1):
    """The pairs of a data set, None if there are none; asserts that they are those of the same rows as a stream."""
    source = Source(rows, PLACE)
    stream = Source(rows.to_iterable_dataset(num_shards=num_shards), PLACE)
    results = []
    for load in (
        lambda: PreferencePairs(source, columns),
        lambda: StreamedPairs(stream, columns, 3),
    ):
        try:
            pairs = load()
            items = range(len(pairs)) if isinstance(pairs, PreferencePairs) else list(pairs.in_order())
            results.append((pairs, read(pairs, items)))
        except ValueError as error:
            assert type(error) is ValueError, f"not ours: {error!r}"
            results.append((None, None))
    (mapped, of_map), (streamed, of_stream) = results
    assert of_map == of_stream
    if mapped is not None:
        bad = [row for item in streamed.in_order() for row in item.bad_rows] + streamed.seen.bad_rows
        assert streamed.seen.num_ties == mapped.num_ties and len(bad) == mapped.bad.total()
        assert streamed.seen.num_rows == mapped.num_rows == len(rows)
    return of_map


LABEL_KINDS = {
    "float": st.one_of(st.none(), st.sampled_from([0.0, 1.0, 0.5, -0.0, 2.0, -1.0, 1e300]), st.floats()),
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


def meaning_of(label, label_map):
    """1, 0 or 0.5 of a label, None if it has no meaning."""
    if label is None or isinstance(label, float) and math.isnan(label):
        return None
    text = ("true" if label else "false") if isinstance(label, bool) else str(label).strip().lower()
    for key, meaning in label_map or [["0", 0], ["0.5", 0.5], ["1", 1], ["false", 0], ["true", 1]]:
        if key == text or number_of(key) is not None and number_of(key) == number_of(text):
            return meaning
    return None


def number_of(text):
    try:
        return float(text)
    except ValueError:
        return None


CAPTIONS = st.one_of(
    st.none(), st.sampled_from(["", " ", "\t\n", "\u2003", "a cat", "é", "日本語 🐈"]), st.text(max_size=6)
)


@st.composite
def labelled_data(draw):
    names = draw(st.lists(NAMES, min_size=4, max_size=4, unique=True))
    kind = draw(st.sampled_from(list(LABEL_KINDS)))
    label_map = None
    if draw(st.booleans()):
        keys = draw(st.lists(MAP_KEYS, min_size=1, max_size=3))
        label_map = [label_meaning(f"{key}={draw(st.sampled_from(['0', '1', '0.5', '.5']))}") for key in keys]
    texts = st.one_of(st.none(), st.lists(CAPTIONS, max_size=3)) if draw(st.booleans()) else CAPTIONS
    rows = []
    for i in range(draw(st.integers(1, 9))):
        images = draw(
            st.sampled_from([(PICTURES[2 * i], PICTURES[2 * i + 1])] * 5 + [(None, PICTURES[0]), (b"", b"")])
        )
        rows.append(dict(zip(names, (*images, draw(LABEL_KINDS[kind]), draw(texts)), strict=True)))
    columns = PairColumns(
        image_0_column=names[0], image_1_column=names[1], label_column=names[2], caption_column=names[3],
        label_map=label_map, tie_policy=draw(st.sampled_from(["drop", "soft"])),
    )  # fmt: skip
    return rows, names, columns


def usable_texts(value):
    texts = value if isinstance(value, list) else [value]
    return tuple(text for text in texts if text is not None and text.strip() != "")


def dataset_of(rows):
    """A data set, of whatever rows arrow takes."""
    try:
        return Dataset.from_list(rows)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError):
        assume(False)


@given(labelled_data(), st.integers(1, 3))
def test_labels(data, num_shards):
    rows, names, columns = data
    expected = []
    for row in rows:
        image_0, image_1, label, caption = (row[name] for name in names)
        meaning, texts = meaning_of(label, columns.label_map), usable_texts(caption)
        if meaning is None or not texts or image_0 is None or meaning == 0.5 and columns.tie_policy == "drop":
            continue
        if not image_0:
            expected.append("both images are the same")
            continue
        winner, loser = (image_1, image_0) if meaning == 0 else (image_0, image_1)
        expected.append((winner, loser, texts, "nan", meaning == 0.5))
    rows = dataset_of(rows)
    assume(rows.column_names)
    found = both_ways(rows, columns, min(num_shards, len(rows)))
    found = [pair.partition(": ")[0] if isinstance(pair, str) else pair for pair in found or []]
    assert found == expected


SCORE_KINDS = {
    "float": st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 1.0, 1.5, -1.0, 1.7e308, -1.7e308, 5e-324])),
    "int": st.one_of(st.none(), st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1)),
    "decimal": st.one_of(st.none(), st.decimals(-9, 9, places=2)),
}
WEIGHTS = st.one_of(st.sampled_from([1.0, -1.0, 0.0, 0.5]), st.floats(-1e308, 1e308))


def total(scores, weights):
    """The weighed sum of scores, None where one of them or the sum is none."""
    if any(score is None or not math.isfinite(score) for score in scores):
        return None
    result = sum(weight * float(score) for weight, score in zip(weights, scores, strict=True))
    return result if math.isfinite(result) else None


@st.composite
def scored_data(draw):
    """Rows of groups, or of two images with scores each, with one or two columns of scores."""
    kinds = [SCORE_KINDS[draw(st.sampled_from(list(SCORE_KINDS)))] for _ in range(draw(st.integers(1, 2)))]
    weights = draw(st.one_of(st.none(), st.lists(WEIGHTS, min_size=len(kinds), max_size=len(kinds))))
    is_group = draw(st.booleans())
    rows, number = [], 0
    for _ in range(draw(st.integers(1, 6))):
        count = draw(st.integers(0, 4)) if is_group else 2
        images = [PICTURES[number + i] for i in range(count)]
        number += count
        scores = [[draw(kind) for _ in range(count)] for kind in kinds]
        if is_group:
            if draw(st.integers(0, 9)) == 0:
                scores[-1] = draw(st.sampled_from([None, scores[-1] + scores[-1][:1]]))
            row = {"images": images, **{f"s {k}": column for k, column in enumerate(scores)}}
        else:
            row = {"jpg_0": images[0], "jpg_1": images[1]}
            row |= {f"s {k}.{place}": column[place] for k, column in enumerate(scores) for place in range(2)}
        rows.append({**row, "caption": "x"})
    options = {
        "score_weights": weights,
        "min_score_margin": draw(st.one_of(st.just(0.0), st.floats(0, 3))),
        "tie_policy": draw(st.sampled_from(["drop", "soft"])),
    }
    if is_group:
        options |= {"images_column": "images", "scores_column": [f"s {k}" for k in range(len(kinds))]}
        options["pairs_per_group"] = draw(st.sampled_from(["best_worst", "all", "adjacent"]))
    else:
        for place in range(2):
            options[f"score_{place}_column"] = [f"s {k}.{place}" for k in range(len(kinds))]
    return rows, PairColumns(**options), len(kinds), is_group, weights or [1.0] * len(kinds)


@given(scored_data())
def test_scores(data):
    rows, columns, num_columns, is_group, weights = data
    counts, score_of = [], {}
    for row in rows:
        places = range(len(row["images"])) if is_group else range(2)
        images = row["images"] if is_group else [row["jpg_0"], row["jpg_1"]]
        if is_group:
            lists = [row[f"s {k}"] for k in range(num_columns)]
            if any(scores is None or len(scores) != len(lists[0]) for scores in lists):
                continue
            if len(lists[0]) != len(images):
                continue
            scores = [total([column[i] for column in lists], weights) for i in places]
        else:
            scores = [total([row[f"s {k}.{i}"] for k in range(num_columns)], weights) for i in places]
        known = {images[i]: scores[i] for i in places if scores[i] is not None}
        score_of |= known
        if len(known) < 2:
            continue
        ranked = sorted(known.values(), reverse=True)
        pairs = {
            "best_worst": [(ranked[0], ranked[-1])],
            "adjacent": list(itertools.pairwise(ranked)),
            "all": list(itertools.combinations(ranked, 2)),
        }[columns.pairs_per_group]
        counts += [
            (high, low) for high, low in pairs
            if columns.tie_policy == "soft" or high - low > 0 and high - low >= columns.min_score_margin
        ]  # fmt: skip
    found = both_ways(dataset_of(rows), columns) or []
    found = [pair for pair in found if isinstance(pair, tuple)]
    assert sorted((score_of[pair[0]], score_of[pair[1]]) for pair in found) == sorted(counts)
    for winner, loser, _, margin, is_tie in found:
        difference = score_of[winner] - score_of[loser]
        assert difference >= 0 and float(margin) == difference
        assert is_tie == (difference == 0 or difference < columns.min_score_margin)


@settings(max_examples=settings().max_examples // 4)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=40), st.data())
def test_a_stream_goes_on_where_it_was(rows, data):
    """With bad rows and ties, any buffer, shards, number of pairs and place."""
    table = [
        {"jpg_0": PICTURES[i], "jpg_1": PICTURES[i + 1], "label_0": [1.0, 0.0, 0.5, None][label],
         "caption": str(i) if has_caption else ""}
        for i, (label, has_caption) in enumerate(rows)
    ]  # fmt: skip
    usable = [row["caption"] for row in table if row["label_0"] in (0, 1) and row["caption"]]
    assume(usable)
    max_pairs = data.draw(st.one_of(st.none(), st.integers(1, 50)))
    num_shards = data.draw(st.integers(1, min(4, len(table))))
    source = Source(Dataset.from_list(table).to_iterable_dataset(num_shards=num_shards), PLACE)
    buffer_size, batch_size = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    first, ahead = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 4))

    def visits(count, *place):
        batches = StreamedPairs(source, PairColumns(), buffer_size, max_pairs).batches(batch_size, 1, *place)
        taken = itertools.islice(batches, count)
        return [(visit, item.row["caption"]) for batch in taken for visit, item in batch], batches

    whole, _ = visits(first + 6)
    epoch = usable[:max_pairs]
    assert sorted(caption for _, caption in whole[: len(epoch)]) == sorted(epoch)[: len(whole)] or len(whole) < len(
        epoch
    )
    _, batches = visits(first + ahead + 1)
    position = json.loads(json.dumps(batches.position(first * batch_size)))
    rest, _ = visits(6, first * batch_size, position)
    assert rest == whole[first * batch_size :]


# Options and captions


@given(st.one_of(st.text(max_size=12), st.builds("".join, st.lists(st.sampled_from(
    ["{", "}", "{{", "}}", "{a}", "{b.c}", "{a!r}", "{a:3}", "{}", "{0}", "{a[0]}", ", ", ";", " ", "x", "é"])))),
    ANYTHING, ANYTHING)  # fmt: skip
@example("{a}", ";", None)
def test_caption_templates(template, a, b):
    row = {"a": a, "b": {"c": b}}
    try:
        args = data_args("--train_data_dir", ".", f"--caption_template={template}")
    except SystemExit as stop:
        assert stop.code == 2
        return
    columns = PairColumns.of(args)
    try:
        columns.check(["a", "b", "jpg_0", "jpg_1", "label_0"], None)
    except ValueError as error:
        assert str(error).startswith("--caption_template ")
        return
    try:
        (caption,) = columns.captions(row)
    except BadRow as error:
        assert str(error).startswith("no caption")
    else:
        assert caption.strip() and "\n" not in caption


@given(st.text(max_size=8), st.sampled_from(["", "=", "=0", "=1", "=.5", "=0.5", "=2", "= 1", "=1=0"]))
def test_label_maps(label, meaning):
    argument = f" {label}{meaning}"
    key, _, value = argument.rpartition("=")
    try:
        args = data_args("--train_data_dir", ".", "--label_map", argument)
    except SystemExit as stop:
        assert stop.code == 2 and (not key or value not in ("0", "1", ".5", "0.5"))
    else:
        ((found, found_meaning),) = args.label_map
        assert found_meaning == {"0": 0, "1": 1}.get(value, 0.5)
        assert found == key.strip().lower() or number_of(found) == number_of(key) or math.isnan(float(found))


@given(ANYTHING)
def test_anything_in_words(value):
    assert isinstance(as_text(value), str)


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
    "jpg_0": st.sampled_from(["0.png", "0.png", "2.png", "", None]),
    "jpg_1": st.just("1.png"),
}


@st.composite
def json_rows(draw):
    """Rows of which at most one column holds anything at all."""
    wild = draw(st.sampled_from([None, *SENSIBLE]))
    values = {**SENSIBLE, wild: st.one_of(SENSIBLE.get(wild, st.none()), JSON_VALUES)}
    values.pop(None, None)
    return draw(st.lists(st.fixed_dictionaries(values), min_size=1, max_size=6))


@settings(max_examples=settings().max_examples // 4)
@given(json_rows())
def test_jsonl_of_anything(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("jsonl")
    for i in range(2):
        (folder / f"{i}.png").write_bytes(PICTURES[i])
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = []
    for streaming in ([], ["--streaming"]):
        try:
            args = data_args("--train_data_dir", folder, *streaming, "--max_bad_fraction", 1)
            args.cache_dir = str(tmp_path_factory.getbasetemp() / "cache")
            pairs = load_pairs(args)
            found.append(read(pairs, pairs.in_order() if streaming else range(len(pairs))))
        except ValueError as error:
            assert type(error) is ValueError and "\n" not in str(error), repr(error)
            found.append(None)
    event("pairs" if found[0] else "none")
    assert found[0] == found[1]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map", "stream"])
def test_text_that_is_none(streaming, tmp_path):
    """Parquet files do not check that their text is UTF-8."""
    texts = pa.array([b"good", b"\xff\xfe", b"fine"])
    texts = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    table = {"jpg_0": PICTURES[:3], "jpg_1": PICTURES[3:6], "label_0": [1.0, 0.0, 1.0], "caption": texts}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        pairs = load_pairs(data_args("--train_data_dir", tmp_path, *streaming))
        list(pairs.in_order())
    assert caught.type is ValueError and "beyond row" in str(caught.value)

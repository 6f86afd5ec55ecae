"""examples/sample_pairs.py: pairs from two models' pictures of the same prompts and seeds."""

import io
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import convert_lora
import make_pairs
import numpy as np
import pyarrow.parquet as pq
import pytest
import sample_pairs
import torch
from conftest import ONE_THREAD, build_pipeline, build_sdxl_pipeline, command_line, write_json
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

import train_inversion_dpo
from training_utils import LORA_FILE, add_lora, decode_image, load_pairs, lora_weights, write_kohya, write_lora

ONE_MODEL = {"winner_model": None, "loser_model": None, "model": "no/such-model", "scorer": "clip"}
PROMPTS = ["a red circle", "  a blue square  ", "", "a green heart"]


def read_back(folder):
    """The pairs that the training script reads in a folder."""
    argv = ["--pretrained_model_name_or_path", "x", "--output_dir", "y", "--train_data_dir", str(folder)]
    pairs = load_pairs(train_inversion_dpo.parse_args(argv)[0])
    return [pairs[i] for i in range(len(pairs))]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The tiny model with another U-Net."""
    folder = tmp_path_factory.mktemp("other_model")
    pipeline = build_pipeline()
    with torch.no_grad():
        for weight in pipeline.unet.parameters():
            weight.mul_(1.5)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def sample(tiny_model, other_model, tmp_path):
    """Runs the program on the two models; returns its folder."""

    def run(lines=PROMPTS, output="out", **options):
        file = tmp_path / "prompts.txt"
        file.write_text("\n".join(lines))
        defaults = {
            "winner_model": other_model, "loser_model": tiny_model, "prompts": file, "output_dir": tmp_path / output,
            "num_inference_steps": 2, "batch_size": 2,
        }  # fmt: skip
        options = {name: value for name, value in {**defaults, **options}.items() if value is not None}
        words = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        sample_pairs.main(*sample_pairs.parse_args(words))
        return tmp_path / output

    return run


@pytest.fixture
def refused(sample, capsys):
    """Runs the program with options that it must refuse before weights load, and returns its one line."""

    def run(**options):
        with pytest.raises(SystemExit) as stop:
            sample(**options)
        assert stop.value.code == 2
        usage, message = capsys.readouterr().err.strip().splitlines()[-2:]
        assert usage.startswith("usage: ")
        return message.split(": error: ", 1)[1]

    return run


def test_winners_are_the_one_models_pictures_and_losers_the_others(sample, tiny_model, other_model):
    pairs = read_back(sample(num_pairs_per_prompt=2))
    captions = [pair.captions[0] for pair in pairs]
    assert captions == [prompt.strip() for prompt in PROMPTS if prompt for _ in range(2)]
    for model, side in ((other_model, 0), (tiny_model, 1)):
        pipeline = make_pairs.load_pipeline(model)
        for i, pair in enumerate(pairs):  # each alone: a picture does not depend on its batch
            (picture,) = make_pairs.sample_pictures(pipeline, [captions[i]], [i], 2, 7.5)
            assert abs(pixels(pair[side]).astype(int) - picture).max() <= 1


def test_the_order_of_columns_does_not_tell_the_winner(sample):
    rows = pq.read_table(sample(lines=["a cat"], num_pairs_per_prompt=16)).to_pylist()
    assert list(rows[0]) == ["jpg_0", "jpg_1", "label_0", "caption"]
    assert {row["label_0"] for row in rows} == {0.0, 1.0}


def test_the_same_seed_gives_the_same_files_and_another_seed_others(sample):
    files = [sample(output=str(i), seed=seed) / "train-00000-of-00001.parquet" for i, seed in enumerate((0, 0, 1))]
    first, again, other = (pq.read_table(file).to_pylist() for file in files)
    assert first == again and not {row["jpg_0"]["bytes"] for row in first} & {row["jpg_0"]["bytes"] for row in other}


def test_a_model_with_and_without_a_lora(sample, tiny_model, tmp_path):
    pipeline = build_pipeline()
    torch.manual_seed(1)
    for weight in add_lora(pipeline.unet, 4):
        torch.nn.init.normal_(weight)
    write_lora(tmp_path / "lora" / LORA_FILE, lora_weights(pipeline.unet), "unet")
    pairs = read_back(sample(winner_model=tiny_model, winner_lora=tmp_path / "lora"))
    plain = make_pairs.sample_pictures(make_pairs.load_pipeline(tiny_model), ["a red circle"], [0], 2, 7.5)[0]
    winner, loser = (pixels(image).astype(int) for image in pairs[0][:2])
    assert abs(loser - plain).max() <= 1 < abs(winner - plain).max()


def made_of(kind, folder):
    """A LoRA for the tiny model, or of another kind."""
    pipeline = build_pipeline()
    torch.manual_seed(1)
    for weight in add_lora(pipeline.unet, 4):
        torch.nn.init.normal_(weight)
    unet, file = lora_weights(pipeline.unet), folder / "lora.safetensors"
    if kind == "PEFT's folder":
        convert_lora.write_peft(folder / "peft", unet)
        return folder / "peft"
    if kind == "kohya's names":
        write_kohya(file, unet, pipeline.unet.config, "it", "epsilon", 32)
        return file
    pipeline.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    weights = {f"unet.{name}": value for name, value in unet.items()}
    text = {name: torch.ones_like(value) for name, value in get_peft_model_state_dict(pipeline.text_encoder).items()}
    if kind == "a transformer's":
        weights = {f"transformer.{name}": value for name, value in unet.items()}
    elif kind == "16 of 56 modules":
        weights = {name if "up_blocks.0" in name else name.replace("_blocks.", "_blocks.9", 1): value
                   for name, value in weights.items()}  # fmt: skip
    elif kind == "the text encoder's as well":
        weights |= {f"text_encoder.{name}": value for name, value in text.items()}
    elif kind == "another text encoder's":
        weights |= {f"text_encoder_2.{name}": value for name, value in text.items()}
    save_file(weights, file)
    return file


@pytest.mark.parametrize(
    ("kind", "count"), [("diffusers' names", 56), ("kohya's names", 56), ("the text encoder's as well", 58)]
)
def test_a_lora_that_fits_is_loaded_and_its_modules_are_counted(kind, count, tiny_model, tmp_path, capsys):
    pipelines = [make_pairs.load_pipeline(tiny_model) for _ in range(2)]
    make_pairs.load_lora(pipelines[1], str(made_of(kind, tmp_path)))
    assert f" {count} modules" in capsys.readouterr().out
    before, after = (make_pairs.sample_pictures(pipeline, ["a cat"], [0], 2).astype(int) for pipeline in pipelines)
    assert abs(before - after).max() > 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("PEFT's folder", "convert_lora.py"),
        ("a transformer's", "for a transformer"),
        ("16 of 56 modules", "of its 56 modules 16 fit"),
        ("another text encoder's", "of its 58 modules 56 fit"),
    ],
)
@pytest.mark.parametrize("option", ["lora", "winner_lora", "loser_lora"])
def test_a_lora_that_does_not_fit_ends_the_program_before_anything_is_sampled_or_written(
    option, kind, said, refused, tiny_model, tmp_path, monkeypatch
):
    """diffusers leaves out silently what does not fit: the pictures were those without the LoRA."""
    monkeypatch.setattr(sample_pairs, "pictures_of", lambda *_: pytest.fail("it was sampled"))
    (tmp_path / "taste.py").write_text("def light(image, prompt):\n    return 0\n")
    one = {**ONE_MODEL, "model": tiny_model, "scorer": f"{tmp_path / 'taste.py'}:light"} if option == "lora" else {}
    lora = made_of(kind, tmp_path)
    line = refused(**one, **{option: lora})
    assert line.startswith(f"--{option} {lora}: ") and said in line and not (tmp_path / "out").exists()


def test_what_the_models_predict_can_be_said(sample, tiny_model, other_model, tmp_path):
    """Their schedulers may be wrong."""
    model = shutil.copytree(tiny_model, tmp_path / "v")
    write_json(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    pictures = [
        pixels(read_back(sample(output=str(i), winner_model=model, loser_model=other_model, **options))[0].winner)
        for i, (model, options) in enumerate(
            [(model, {}), (tiny_model, {"prediction_type": "v_prediction"}), (model, {"prediction_type": "epsilon"})]
        )
    ]
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()


def test_libraries_say_nothing(tiny_model, tmp_path):
    """Neither of torchvision, nor of each part that loads, nor that a LoRA is the U-Net's alone."""
    (tmp_path / "prompts.txt").write_text("a cat")
    options = {
        "winner_model": tiny_model, "winner_lora": made_of("diffusers' names", tmp_path), "loser_model": tiny_model,
        "prompts": tmp_path / "prompts.txt", "num_inference_steps": 1, "output_dir": tmp_path / "out",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, sample_pairs.__file__, *command_line(**options)], env=ONE_THREAD, capture_output=True,
        text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 2)


def test_sdxl(sample, tmp_path):
    build_sdxl_pipeline().save_pretrained(tmp_path / "xl")
    pairs = read_back(sample(winner_model=tmp_path / "xl"))
    assert len(pairs) == 3 and decode_image(pairs[0].winner).size == (32, 32)


def test_one_model_at_a_time_is_in_memory(sample, monkeypatch):
    alive = []
    load = sample_pairs.load_pipeline

    def watched(*args, **options):
        assert not any(reference() for reference in alive)
        pipeline = load(*args, **options)
        alive.append(weakref.ref(pipeline.unet))
        return pipeline

    monkeypatch.setattr(sample_pairs, "load_pipeline", watched)
    sample()
    assert len(alive) == 2


def test_black_and_equal_pictures_are_left_out(sample, monkeypatch, capsys):
    calls = iter(range(100))

    def pictures_of(*_):
        model = next(calls)
        for i in range(4):
            yield np.full((8, 8, 3), 0 if (model, i) in ((0, 0), (1, 1)) else 9 if i == 2 else 10 + model, "u1")

    monkeypatch.setattr(sample_pairs, "pictures_of", pictures_of)
    assert pq.read_table(sample(lines=list("abcd")))["caption"].to_pylist() == ["d"]
    assert "wrote 1 pairs of 4 prompts" in capsys.readouterr().out


@pytest.mark.parametrize("scale", [1, -1])
def test_the_best_and_the_worst_of_one_model_become_a_pair(sample, tiny_model, tmp_path, monkeypatch, scale):
    """By a function of the user's, which is also told the prompt; each picture has a seed of its own."""
    (tmp_path / "taste.py").write_text(
        "import numpy\ndef light(image, prompt):\n"
        f"    assert prompt in {[prompt.strip() for prompt in PROMPTS]}\n    return {scale} * numpy.mean(image)\n"
    )
    options = {**ONE_MODEL, "model": tiny_model, "scorer": f"{tmp_path / 'taste.py'}:light"}
    pairs = read_back(sample(**options, num_pictures_per_pair=3, num_pairs_per_prompt=2))
    pipeline, seed = make_pairs.load_pipeline(tiny_model), 0
    for pair in pairs:
        group = make_pairs.sample_pictures(pipeline, pair.captions * 3, range(seed, seed + 3), 2, 7.5)
        ranked, seed = sorted(group, key=lambda picture: scale * picture.mean()), seed + 3
        for side, expected in ((pair.loser, ranked[0]), (pair.winner, ranked[-1])):
            assert abs(pixels(side).astype(int) - expected).max() <= 1
    assert [pair.captions[0] for pair in pairs] == [prompt.strip() for prompt in PROMPTS if prompt for _ in range(2)]


def test_what_cannot_be_ranked_is_left_out_and_counted(sample, tiny_model, tmp_path, monkeypatch, capsys):
    pictures = [0, 0, 5, 6, 7, 7, 9, 8]  # both black, two that differ, two alike, and one that is not finite

    def pictures_of(*_):
        return (np.full((8, 8, 3), value, "u1") for value in pictures)

    (tmp_path / "taste.py").write_text(
        "def light(image, prompt):\n    x = image.getpixel((0, 0))[0]\n    return float('nan') if x == 9 else x\n"
    )
    monkeypatch.setattr(sample_pairs, "pictures_of", pictures_of)
    options = {**ONE_MODEL, "model": tiny_model, "scorer": f"{tmp_path / 'taste.py'}:light"}
    (pair,) = read_back(sample(lines=list("abcd"), num_pictures_per_pair=2, **options))
    assert pair.captions == ["b"] and pixels(pair.winner).max() == 6
    printed = capsys.readouterr().out
    assert "3 left out, 2 with fewer than two usable pictures, 1 of equal scores" in printed


def test_models_and_loras_that_are_not_there_are_told_with_the_nearest_name(
    refused, tiny_model, tmp_path, monkeypatch
):
    load_config = make_pairs.DiffusionPipeline.load_config

    def local(model, **options):
        assert Path(model).exists(), "it was looked for on the Hub"
        return load_config(model, **options)

    monkeypatch.setattr(make_pairs.DiffusionPipeline, "load_config", local)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / LORA_FILE).write_bytes(b"")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(tiny_model)
    for option, typed, near in (
        ("winner_model", "models/mien", "models/mine"),
        ("loser_model", "models/mien", "models/mine"),
        ("winner_lora", "loar", "lora"),
        ("loser_lora", f"lora/{LORA_FILE[:-1]}", f"lora/{LORA_FILE}"),
        ("prompts", "promts.txt", "prompts.txt"),
    ):
        line = refused(**{option: tmp_path / typed})
        assert line.startswith(f"--{option} {tmp_path / typed}: ") and f"did you mean {tmp_path / near}?" in line
    line = refused(**{**ONE_MODEL, "model": tiny_model, "scorer": f"clip={tmp_path}/models/mien"})
    assert "--scorer" in line and f"did you mean {tmp_path / 'models' / 'mine'}?" in line


def test_a_variant_of_the_weights_is_named_and_read(sample, refused, tmp_path):
    build_pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    pair = {"winner_model": tmp_path / "half", "loser_model": tmp_path / "half"}
    lora = tmp_path / "lora"
    pipeline = build_pipeline()
    for weight in add_lora(pipeline.unet, 4):
        torch.nn.init.normal_(weight)
    write_lora(lora / LORA_FILE, lora_weights(pipeline.unet), "unet")
    line = refused(**pair, winner_lora=lora)
    assert line.startswith(f"--winner_model {tmp_path / 'half'}: ") and "--variant fp16" in line
    assert read_back(sample(**pair, winner_lora=lora, variant="fp16", lines=["a cat"]))


def test_a_models_vae_is_named_where_it_is_at_fault(refused, tmp_path):
    build_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    assert f"--loser_model {tmp_path / 'model'}: its vae " in refused(loser_model=tmp_path / "model")


@pytest.mark.parametrize("console", ["cp1252", "ascii"])
def test_a_console_that_cannot_show_a_name_ends_nothing(console, sample, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=console, write_through=True))
    assert read_back(sample(lines=["a cat"], output="日本"))
    assert "\\u65e5" in raw.getvalue().decode(console)


def test_bad_input_is_refused_before_weights_load(refused, tiny_model, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(sample_pairs, "load_pipeline", load)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "train.parquet").write_bytes(b"")
    for options, named in (
        ({"winner_model": tiny_model}, "--winner_model and --loser_model are both"),
        ({"winner_model": tmp_path / "empty"}, "no model_index.json in it"),
        ({"loser_model": "no/such-model"}, "--loser_model no/such-model: "),
        ({"winner_lora": tmp_path / "empty"}, "holds no .safetensors file"),
        ({"prompts": tmp_path / "none.txt"}, "none.txt: cannot be read"),
        ({"prompts": tmp_path / "bytes.txt"}, "bytes.txt: cannot be read"),
        ({"lines": [" ", ""]}, "no prompt is in it"),
        ({"winner_model": None}, "--winner_model is missing"),
        ({"scorer": "clip"}, "--winner_model and --scorer do not go together"),
        ({**ONE_MODEL, "scorer": None}, "--scorer is missing"),
        ({**ONE_MODEL, "scorer": "beauty"}, "--scorer beauty: there is no scorer"),
        ({**ONE_MODEL, "scorer": f"{__file__}:nothing"}, "has no attribute 'nothing'"),
        ({**ONE_MODEL, "num_pictures_per_pair": 1}, "--num_pictures_per_pair 1"),
        ({"num_pairs_per_prompt": 0}, "--num_pairs_per_prompt: is 0; allowed: at least 1"),
        ({"output": "full"}, "already holds parquet files"),
    ):
        assert named in refused(**options)

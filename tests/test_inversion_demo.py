"""The inversion demo: what it reconstructs, the pipelines that it takes, what it writes and what it refuses."""

import io
import json
import shutil
import sys
from pathlib import Path

import inversion_demo
import pytest
import small_world
import torch
from conftest import write_json
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from inversion_utils import inversion_nodes, invert

MODEL = str(Path(inversion_demo.__file__).parent / "small_world_model")


@pytest.fixture
def picture(tmp_path):
    """A drawn picture's file, saved with a margin that the demo's central square leaves out."""
    look = small_world.Look(0.2, 2.0, 0.6, 0.1, 0.0, (0.0, 0.0), 1.0)
    image = Image.new("RGB", (96, 64), "black")
    image.paste(Image.fromarray(small_world.draw("a green heart", look)), (16, 0))
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def demo(picture, tmp_path, capsys):
    """Runs the demo; returns its printed lines by their first words, and the folder it wrote."""

    def run(model=MODEL, output="inverted", **options):
        argv = ["--model", str(model), "--image", str(picture), "--output_dir", str(tmp_path / output)]
        for name, value in options.items():
            argv += [f"--{name}", str(value)]
        capsys.readouterr()
        inversion_demo.main(*inversion_demo.parse_args(argv))
        lines = capsys.readouterr().out.splitlines()
        return {line[:17].strip(): line[17:] for line in lines}, tmp_path / output

    return run


def test_what_the_model_predicts_can_be_said(demo, tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "v")
    write_json(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    plain, wrong, right = (
        demo(model, output, num_steps=4, **options)[0]["implied noise"]
        for model, output, options in (
            (MODEL, "1", {}), (model, "2", {}), (model, "3", {"prediction_type": "epsilon"})
        )
    )  # fmt: skip
    assert plain == right != wrong


@pytest.fixture
def refused(demo, capsys, monkeypatch):
    """Runs the demo with options that it must refuse before it loads weights, and returns its one line."""

    def load(*_):
        raise AssertionError("weights were loaded")

    def run(**options):
        monkeypatch.setattr(inversion_demo, "load_without_checker", load)
        with pytest.raises(SystemExit) as stop:
            demo(**options)
        assert stop.value.code == 2
        usage, message = capsys.readouterr().err.strip().splitlines()
        assert usage.startswith("usage: ")
        return message.split(": error: ", 1)[1]

    return run


def decibels(lines):
    """PSNR of the VAE round trip, of the reconstruction against it, and of the reconstruction against the original."""
    to_round_trip, to_original = lines["reconstruction"].split(", ")
    return [float(text.split(" dB")[0]) for text in (lines["VAE round trip"], to_round_trip, to_original)]


def test_more_calls_reconstruct_better_up_to_the_vae(demo):
    measured = [decibels(demo(output=f"steps_{n}", num_steps=n, prompt="a green heart")[0]) for n in (4, 8, 16, 32)]
    ceilings, to_round_trip, to_original = zip(*measured, strict=True)
    assert len(set(ceilings)) == 1 and ceilings[0] > 30
    assert all(after > before + 2 for before, after in zip(to_round_trip, to_round_trip[1:], strict=False)), measured
    assert to_round_trip[2] > 38 and to_round_trip[3] > 45, measured
    assert abs(to_original[3] - ceilings[0]) < 1, measured


def test_another_prompt_does_not_give_the_picture_back():
    """The reconstruction is sampled by the model: another prompt on the way back makes something else of x_t."""
    noise_scheduler, resolution = inversion_demo.read_model(MODEL, None)
    pipeline = inversion_demo.load_without_checker(MODEL)
    heart, star = (
        inversion_demo.noise_predictor(pipeline, noise_scheduler, prompt, resolution)
        for prompt in ("a green heart", "a yellow star")
    )
    latents, abar = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), noise_scheduler.alphas_cumprod
    timesteps = torch.tensor([999])
    x_t = invert(heart, latents, timesteps, abar, 16).latents[0]
    nodes = inversion_nodes(timesteps[None], abar, 16)[0].unique().tolist()
    same, other = (inversion_demo.sample_back(predict, x_t, nodes, abar) for predict in (heart, star))
    assert (same - latents).square().mean() < 0.2 * (other - latents).square().mean()


def test_files_hold_what_was_printed(demo):
    lines, folder = demo(prompt="a green heart", timestep=700, num_steps=6)
    assert sorted(path.name for path in folder.iterdir()) == sorted(inversion_demo.OUTPUTS)
    with safe_open(folder / "noise.safetensors", "pt") as file:
        x_t, noise = file.get_tensor("latents"), file.get_tensor("noise")
        assert file.metadata() == {"timestep": "700"}
    assert x_t.shape == noise.shape == (1, 4, 8, 8)
    assert f"{noise.std():.3f} at timestep 700" in lines["implied noise"]
    assert lines["model calls"] == "6 to invert, 6 to sample back"
    reconstruction, noise_picture = (Image.open(folder / name) for name in ("reconstruction.png", "noise.png"))
    assert reconstruction.size == noise_picture.size == (64, 64)
    assert noise_picture.getpixel((0, 0)) == pytest.approx((noise[0, :3, 0, 0] / 3 * 127.5 + 127.5).tolist(), abs=0.51)
    # The comparison's last panel is the reconstruction, enlarged to 256 pixels; its first has no margin of the file.
    comparison = Image.open(folder / "comparison.png")
    panels = [comparison.crop((14 + i * 270, 76, 270 + i * 270, 332)).resize((64, 64), 0) for i in range(4)]
    assert panels[2].tobytes() == noise_picture.tobytes() and panels[3].tobytes() == reconstruction.tobytes()
    assert min(panels[0].getpixel((0, 0))) > 100


def test_psnr_worked_by_hand():
    black, grey = Image.new("RGB", (2, 2), "black"), Image.new("RGB", (2, 2), (51, 51, 51))
    assert inversion_demo.psnr(black, grey) == pytest.approx(13.979, abs=1e-3)  # 20 log10(255 / 51)
    assert inversion_demo.psnr(grey, grey) == float("inf")


def test_a_v_prediction_model_is_inverted_below_its_level_without_signal(demo, tiny_v_model):
    lines, _ = demo(tiny_v_model, num_steps=16)
    assert "at timestep 998" in lines["implied noise"]
    assert decibels(lines)[1] > 35


def test_an_sdxl_pipeline_is_inverted(demo, tiny_sdxl_model):
    # Not to the end: at high timesteps an untrained epsilon model's errors are multiplied by s_t.
    lines, _ = demo(tiny_sdxl_model, num_steps=16, prompt="a red circle", resolution=40, timestep=300)
    assert decibels(lines)[1] > 30


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sdxl_model"])
def test_the_unet_is_conditioned_as_the_pipeline_does_it(request, model):
    folder = request.getfixturevalue(model)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    noise_scheduler, resolution = inversion_demo.read_model(folder, 40)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    size = {"height": 40, "width": 40, "guidance_scale": 1.0, "num_inference_steps": 1, "output_type": "latent"}
    pipeline("a red circle", **size)
    predict = inversion_demo.noise_predictor(pipeline, noise_scheduler, "a red circle", resolution)
    predict(torch.zeros(1, 4, 5, 5), torch.tensor([500]))
    by_pipeline, by_demo = seen
    torch.testing.assert_close(by_demo["encoder_hidden_states"], by_pipeline["encoder_hidden_states"])
    torch.testing.assert_close(by_demo.get("added_cond_kwargs"), by_pipeline["added_cond_kwargs"])
    assert (by_demo.get("added_cond_kwargs") is None) == (model == "tiny_model")


def test_mistakes_end_with_one_line_before_weights_load(refused, tmp_path, picture):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    mistakes = [
        ("image", "nowhere.png"), ("image", tmp_path / "text.png"), ("model", tmp_path / "empty"),
        ("model", "nobody/nothing"), ("timestep", 1000), ("resolution", 60), ("num_steps", 0), ("output_dir", picture),
    ]  # fmt: skip
    for name, value in mistakes:
        line = refused(**{name: value})
        assert f"--{name}" in line and str(value) in line, line
    assert not (tmp_path / "inverted").exists()


def test_a_folder_that_is_not_there_is_told_with_the_nearest_name(refused, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "models" / "mine")
    for typed in (tmp_path / "models" / "mien", "./models/mien", "models/mien", "~/models/mien", "models/x/mine"):
        monkeypatch.setenv("HOME", str(tmp_path))
        line = refused(model=typed)
        assert line.startswith("--model ") and "no such folder" in line
        assert "models/mine" in line or "x" in line
    assert "no such folder" not in refused(model="nobody/nothing")


def test_the_part_that_is_at_fault_is_named(refused, tiny_model, tmp_path):
    weights = "diffusion_pytorch_model.safetensors"
    for name, part, spoil in (
        ("gone", "vae", shutil.rmtree),
        ("tokenless", "tokenizer", shutil.rmtree),  # of which transformers makes an empty one
        ("weightless", "vae", lambda folder: (folder / weights).unlink()),
        ("cut", "vae", lambda folder: (folder / weights).write_bytes((folder / weights).read_bytes()[:900])),
        ("other", "vae", lambda folder: write_json(folder / "config.json", _class_name="AutoencoderTiny")),
        ("text", "vae", lambda folder: (folder / "config.json").write_text("{")),
        ("unet", "unet", lambda folder: (folder / "config.json").write_text("{")),
        ("schedule", "scheduler", shutil.rmtree),
    ):
        shutil.copytree(tiny_model, tmp_path / name)
        spoil(tmp_path / name / part)
        line = refused(model=tmp_path / name)
        assert line.startswith(f"--model {tmp_path / name}: its {part} "), line


def test_weights_that_fail_when_they_are_loaded_end_with_one_line(demo, tiny_model, tmp_path, capsys):
    shutil.copytree(tiny_model, tmp_path / "bent")
    write_json(tmp_path / "bent" / "unet" / "config.json", block_out_channels=[32, 64])
    with pytest.raises(SystemExit) as stop:
        demo(tmp_path / "bent")
    assert stop.value.code == 2 and f"error: --model {tmp_path / 'bent'}: " in capsys.readouterr().err.splitlines()[-1]


def test_a_variant_of_the_weights_is_named_and_read(demo, refused, tiny_model, tmp_path, monkeypatch):
    DiffusionPipeline.from_pretrained(tiny_model).save_pretrained(tmp_path / "half", variant="fp16")
    assert "--variant fp16" in refused(model=tmp_path / "half")
    monkeypatch.undo()  # of what fails when weights are loaded
    demo(tmp_path / "half", variant="fp16", num_steps=2)


@pytest.mark.parametrize("console", ["cp1252", "ascii"])
def test_a_console_that_cannot_show_a_name_ends_nothing(console, demo, tiny_model, tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=console, write_through=True))
    demo(tiny_model, "日本", num_steps=2)
    assert (tmp_path / "日本" / "comparison.png").exists() and "\\u65e5" in raw.getvalue().decode(console)


def test_nothing_is_overwritten(refused, tmp_path):
    for name in inversion_demo.OUTPUTS:
        file = tmp_path / name / name
        file.parent.mkdir()
        file.write_text("precious")
        assert f"--output_dir {file.parent}: already holds {name}" in refused(output_dir=file.parent)
        assert list(file.parent.iterdir()) == [file] and file.read_text() == "precious"


def test_pipelines_that_it_cannot_invert_are_refused(refused, tiny_model, tmp_path):
    def changed(file, **entries):
        folder = tmp_path / "_".join(entries)
        shutil.copytree(tiny_model, folder)
        write_json(folder / file, **entries)
        return folder

    other = changed("model_index.json", _class_name="StableDiffusionInpaintPipeline")
    assert "it is a StableDiffusionInpaintPipeline; supported are" in refused(model=other)
    sample = changed("scheduler/scheduler_config.json", prediction_type="sample")
    assert "its scheduler predicts 'sample'; supported are epsilon and v_prediction" in refused(model=sample)
    levels = changed("scheduler/scheduler_config.json", beta_end=0.012)
    file = levels / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("beta")}))
    assert "its scheduler has no schedule of betas" in refused(model=levels)

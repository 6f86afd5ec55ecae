"""The inversion demo: what it reconstructs, the pipelines that it takes, what it writes and what it refuses."""

import json
import shutil
from pathlib import Path

import inversion_demo
import pytest
import small_world
import torch
from conftest import build_pipeline, write_json
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from inversion_utils import inversion_nodes, invert, sample_back

MODEL = str(Path(inversion_demo.__file__).parent / "small_world_model")


@pytest.fixture(scope="session")
def tiny_xl_model(tmp_path_factory):
    """Folder of an SDXL pipeline with random weights: 32 px pictures, 4 x 4 latents."""
    small = build_pipeline()
    text_config = CLIPTextConfig(**{**small.text_encoder.config.to_dict(), "projection_dim": 16})
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2, addition_time_embed_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=small.vae, text_encoder=CLIPTextModel(text_config), tokenizer=small.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config), tokenizer_2=small.tokenizer,
        unet=unet, scheduler=small.scheduler, add_watermarker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny_xl_model")
    pipeline.save_pretrained(folder)
    return folder


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
        inversion_demo.main(argv)
        lines = capsys.readouterr().out.splitlines()
        return {line[:17].strip(): line[17:] for line in lines}, tmp_path / output

    return run


@pytest.fixture
def refused(demo, capsys, monkeypatch):
    """Runs the demo with options that it must refuse before it loads weights, and returns its one line."""

    def load(model):
        raise AssertionError("weights were loaded")

    def run(**options):
        monkeypatch.setattr(inversion_demo, "load_pipeline", load)
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
    pipeline = inversion_demo.load_pipeline(MODEL)
    heart, star = (
        inversion_demo.noise_predictor(pipeline, noise_scheduler, prompt, resolution)
        for prompt in ("a green heart", "a yellow star")
    )
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([999])
    x_t = invert(heart, latents, timesteps, noise_scheduler.alphas_cumprod, 16).latents[0]
    nodes = inversion_nodes(timesteps[None], noise_scheduler.alphas_cumprod, 16)[0].unique().tolist()
    same, other = (sample_back(predict, x_t, nodes, noise_scheduler.alphas_cumprod) for predict in (heart, star))
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


def test_noise_of_a_v_prediction_model_is_that_of_diffusers(tiny_v_model):
    noise_scheduler, resolution = inversion_demo.read_model(tiny_v_model, None)
    pipeline = inversion_demo.load_pipeline(tiny_v_model)
    predict = inversion_demo.noise_predictor(pipeline, noise_scheduler, "a star", resolution)
    x_t, t = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([700])
    with torch.no_grad():
        cond = pipeline.encode_prompt("a star", "cpu", 1, False)[0]
        output = pipeline.unet(x_t, t, encoder_hidden_states=cond).sample
    scheduler = DDIMScheduler.from_pretrained(tiny_v_model, subfolder="scheduler")
    scheduler.set_timesteps(1000)
    expected = scheduler.step(output, 700, x_t).pred_original_sample
    abar = noise_scheduler.alphas_cumprod[700]
    torch.testing.assert_close((x_t - (1 - abar).sqrt() * predict(x_t, t)) / abar.sqrt(), expected)


def test_an_sdxl_pipeline_is_inverted(demo, tiny_xl_model):
    # Not to the end: at high timesteps an untrained epsilon model's errors are multiplied by s_t.
    lines, _ = demo(tiny_xl_model, num_steps=16, prompt="a red circle", resolution=40, timestep=300)
    assert decibels(lines)[1] > 30


@pytest.mark.parametrize("model", ["tiny_model", "tiny_xl_model"])
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
    assert refused(image="nowhere.png") == "--image nowhere.png: no such file"
    (tmp_path / "text.png").write_text("not a picture")
    assert f"--image {tmp_path / 'text.png'}: unreadable image" in refused(image=tmp_path / "text.png")
    (tmp_path / "empty").mkdir()
    assert refused(model=tmp_path / "empty").endswith("empty: not a saved pipeline (no model_index.json in it)")
    assert refused(model="nobody/nothing").startswith("--model nobody/nothing: ")
    assert refused(timestep=1000) == "--timestep is 1000; allowed: 0 to 999, the last timestep that has signal"
    assert refused(resolution=60) == "--resolution is 60; allowed: multiples of 8, the VAE's factor"
    assert "at least 1" in refused(num_steps=0)
    assert refused(output_dir=picture).startswith(f"--output_dir {picture}: ")
    assert not (tmp_path / "inverted").exists()


@pytest.mark.parametrize("name", inversion_demo.OUTPUTS)
def test_nothing_is_overwritten(refused, tmp_path, name):
    (tmp_path / "inverted").mkdir()
    (tmp_path / "inverted" / name).write_text("precious")
    assert f"already holds {name}; give another folder or remove it" in refused()
    assert [path.name for path in (tmp_path / "inverted").iterdir()] == [name]


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
    shutil.copytree(tiny_model, tmp_path / "other_levels")
    file = tmp_path / "other_levels" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in config.items() if not name.startswith("beta")}))
    assert "its scheduler has no schedule of betas" in refused(model=tmp_path / "other_levels")

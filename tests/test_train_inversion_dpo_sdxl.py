"""The SDXL script: what its own functions do, and one run of all that it shares with its twin."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import build_pipeline, build_sdxl_pipeline, encode, pair_rows, random_image, write_json, write_parquet
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from test_train_inversion_dpo import ONE_THREAD, ROOT, assert_same, logged, lora

import inversion_utils
import train_inversion_dpo_sdxl
from inversion_utils import LORA_FILE


@pytest.fixture
def script():
    return train_inversion_dpo_sdxl


@pytest.fixture
def tiny_model(tiny_sdxl_model):
    return tiny_sdxl_model


@pytest.fixture
def seen(script, monkeypatch):
    """The conditioning of every U-Net call."""
    conditions = []
    original = script.predict_noise

    def predict_noise(unet, x_t, timesteps, cond, *args):
        conditions.append(cond)
        return original(unet, x_t, timesteps, cond, *args)

    monkeypatch.setattr(script, "predict_noise", predict_noise)
    return conditions


def mixed_rows(num_rows=4):
    """Pairs whose winner is 40 x 32 and whose loser is 96 x 64 (width x height)."""
    rng = np.random.default_rng(0)
    sizes = {"jpg_0": (40, 32), "jpg_1": (96, 64)}
    images = [{name: encode(random_image(rng, size)) for name, size in sizes.items()} for _ in range(num_rows)]
    return [{**row, "label_0": 1.0, "caption": "a red circle"} for row in images]


def draw(pipe, seed=0, prompt="a red circle"):
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, height=32, width=32, num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.mark.parametrize("objective", ["inversion_dpo", "inpo", "diffusion_dpo"])
def test_lora_loads_into_the_pipeline_and_changes_the_picture(train, tiny_model, objective):
    output_dir = train(objective=objective, learning_rate=1e-2)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    before = draw(pipe)
    pipe.load_lora_weights(output_dir)
    assert (draw(pipe) - before).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)


V_PREDICTION = {"prediction_type": "v_prediction"}


@pytest.mark.parametrize("scheduler", [{}, V_PREDICTION, {**V_PREDICTION, "rescale_betas_zero_snr": True}], ids=len)
def test_the_first_update_tells_winner_from_loser(train, tmp_path, scheduler):
    build_sdxl_pipeline(**scheduler).save_pretrained(tmp_path / "model")
    pair = write_parquet(pair_rows(1), tmp_path / "pair")
    output_dir = train(
        pretrained_model_name_or_path=tmp_path / "model", train_data_dir=pair,
        train_batch_size=16, learning_rate=3e-3, report_to="tensorboard",
    )  # fmt: skip
    before, after = logged(output_dir, "rewards/margins")
    assert abs(before) < 1e-3 and after > 0.01
    assert logged(output_dir, "loss")[1] < logged(output_dir, "loss")[0]


def test_the_conditioning_is_the_pipelines(train, tiny_model, tmp_path, seen):
    """Embeddings, pooled embeddings and each image's own time_ids, the same for inversion, policy and reference."""
    train(
        train_data_dir=write_parquet(mixed_rows(), tmp_path / "mixed"), max_train_steps=1, train_batch_size=2,
        objective="inpo", inversion_model="policy", inversion_steps=2,
    )  # fmt: skip
    assert len(seen) == 4  # two calls of the inversion, the reference's, the policy's
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    embeds, _, pooled, _ = pipe.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=False)
    winner, loser = (
        pipe._get_add_time_ids(size, corner, (32, 32), torch.float32, text_encoder_projection_dim=12)
        for size, corner in (((32, 40), (0, 4)), ((64, 96), (0, 8)))
    )
    for cond in seen:
        torch.testing.assert_close(cond["encoder_hidden_states"], embeds.expand(4, -1, -1))
        torch.testing.assert_close(cond["added_cond_kwargs"]["text_embeds"], pooled.expand(4, -1))
        assert torch.equal(cond["added_cond_kwargs"]["time_ids"], torch.cat([winner, winner, loser, loser]))


def test_the_conditioning_matters(train, tmp_path, script, monkeypatch):
    """Other crops, other weights: the micro-conditioning reaches the U-Net. The pixels are the same."""
    data = {"train_data_dir": write_parquet(mixed_rows(), tmp_path / "mixed"), "max_train_steps": 2}
    right = lora(train("right", **data))
    original = script.encode_prompts

    def encode_prompts(text_encoders, input_ids, batch):
        return original(text_encoders, input_ids, {**batch, "time_ids": torch.full_like(batch["time_ids"], 1024.0)})

    monkeypatch.setattr(script, "encode_prompts", encode_prompts)
    fixed = lora(train("fixed", **data))
    assert not any(torch.equal(value, fixed[key]) for key, value in right.items())


def test_guidance_leaves_the_micro_conditioning_alone(train, tmp_path, seen):
    data = write_parquet(mixed_rows(), tmp_path / "mixed")
    train(train_data_dir=data, max_train_steps=1, objective="inpo", inversion_steps=1, inversion_guidance_scale=2.0)
    given, empty = (seen[0]["added_cond_kwargs"][name].chunk(2) for name in ("time_ids", "text_embeds"))
    assert torch.equal(*given) and not torch.equal(*empty)


@pytest.mark.parametrize("own_vae", [True, False])
def test_the_models_own_vae_stays_in_float32(train, tiny_model, tmp_path, script, monkeypatch, own_vae):
    dtypes = []
    original = script.encode_images
    monkeypatch.setattr(script, "encode_images", lambda vae, *args: dtypes.append(vae.dtype) or original(vae, *args))
    shutil.copytree(tiny_model / "vae", tmp_path / "other_vae")
    vae = {} if own_vae else {"pretrained_vae_model_name_or_path": tmp_path / "other_vae"}
    train(mixed_precision="bf16", max_train_steps=1, **vae)
    assert dtypes == [torch.float32 if own_vae else torch.bfloat16]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_pictures_show_the_base_and_the_lora_from_the_same_seeds(train, tiny_model, monkeypatch, precision):
    drawn = []
    original = inversion_utils.draw_side_by_side
    monkeypatch.setattr(
        inversion_utils,
        "draw_side_by_side",
        lambda title, rows, columns: drawn.append(rows) or original(title, rows, columns),
    )
    options = {"validation_prompts": ["a red circle"], "num_validation_images": 1, "validation_inference_steps": 2}
    output_dir = train(learning_rate=1e-2, mixed_precision=precision, **options)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    for label in ("base model", "step 2"):
        if label == "step 2":
            pipe.load_lora_weights(output_dir)
        expected = (draw(pipe)[0].permute(1, 2, 0) * 255).numpy()
        difference = np.asarray(drawn[0][label][0], dtype=float) - expected
        assert np.abs(difference).mean() < (1 if precision == "no" else 3) and expected.std() > 5
    assert "StableDiffusionXLPipeline.from_pretrained" in (output_dir / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "trajectory_chunk": 1},
        {"use_8bit_adam": True, "loss_type": "ipo", "lora_target_modules": [r".*attn2\.to_(k|v)"]},
        {"timesteps_subset": [249, 499, 749, 999], "inversion_steps": 4, "proportion_empty_prompts": 0.5},
        {"random_crop": True, "random_flip": True, "dataloader_num_workers": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_train(train, options):
    weights = lora(train(**options))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    assert sum(value.abs().sum() for key, value in weights.items() if "lora_B" in key or "lora.up" in key) > 0


def test_same_weights_in_chunks_with_accumulation_and_after_a_stop(train):
    options = {"random_crop": True, "random_flip": True, "max_train_steps": 4, "checkpointing_steps": 2}
    whole = train("whole", train_batch_size=4, **options)
    parts = train("parts", train_batch_size=2, gradient_accumulation_steps=2, trajectory_chunk=3, **options)
    assert_same(lora(parts), lora(whole), atol=2e-6)
    shutil.copytree(whole / "checkpoint-2", whole.with_name("stopped") / "checkpoint-2")
    resumed = train("stopped", train_batch_size=4, resume_from_checkpoint="latest", **options)
    assert_same(lora(resumed), lora(whole))


@pytest.mark.parametrize("zeros", [True, False])
def test_empty_prompts_are_what_the_pipeline_takes_them_for(train, tiny_model, tmp_path, seen, zeros):
    """All zeros where the model says so, as its unconditional branch was trained; else the empty text's embeddings."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    write_json(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    train(
        pretrained_model_name_or_path=folder, max_train_steps=2, train_batch_size=4, proportion_empty_prompts=0.5,
        objective="inpo", inversion_steps=1, inversion_guidance_scale=2.0,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    _, empty, _, empty_pooled = pipe.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=True)
    assert (empty == 0).all() == (empty_pooled == 0).all() == zeros
    embeds, pooled = seen[0]["encoder_hidden_states"], seen[0]["added_cond_kwargs"]["text_embeds"]
    torch.testing.assert_close(embeds[8:], empty.expand(8, -1, -1))  # the unconditional half
    torch.testing.assert_close(pooled[8:], empty_pooled.expand(8, -1))
    emptied = torch.tensor([torch.allclose(row, empty[0]) for row in embeds[:8]])
    assert 0 < emptied.sum() < 8 and torch.equal(emptied[:4], emptied[4:])
    assert torch.equal(emptied, torch.tensor([torch.allclose(row, empty_pooled[0]) for row in pooled[:8]]))


def test_a_model_folder_without_an_index_is_enough(train, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model_index.json").unlink()
    drawing = {"validation_prompts": ["a red circle"], "num_validation_images": 1, "validation_inference_steps": 1}
    assert (train(pretrained_model_name_or_path=folder, **drawing) / "validation").is_dir()


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "sigma"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample'"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels"),
    ],
)
def test_unsuitable_models_are_refused(refused, no_models, tiny_model, tmp_path, file, changes, named):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    write_json(folder / file, **changes)
    assert named in refused(pretrained_model_name_or_path=folder)


def test_each_script_refuses_the_others_models(refused, no_models, tmp_path):
    build_pipeline().save_pretrained(tmp_path / "sd")
    assert "train_inversion_dpo.py aligns SD 1.5" in refused(pretrained_model_name_or_path=tmp_path / "sd")


def test_a_text_encoder_is_missing(refused, tiny_model, tmp_path):
    """As in SDXL's refiner, which has the second one only."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    assert f"{folder} cannot be loaded" in refused(pretrained_model_name_or_path=folder)


def test_copied_alone_into_an_empty_folder_it_trains(tiny_model, pairs_dir, tmp_path):
    for name in ("train_inversion_dpo_sdxl.py", "inversion_utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "train_inversion_dpo_sdxl.py",
        "--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pairs_dir, "--output_dir", "out",
        "--resolution", "32", "--max_train_steps", "1", "--validation_prompts", "a red circle",
        "--validation_inference_steps", "1",
    ]  # fmt: skip
    environment = {key: value for key, value in ONE_THREAD.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_file(tmp_path / "out" / LORA_FILE)
    assert Image.open(tmp_path / "out" / "validation" / "step-000001-prompt-0.png")

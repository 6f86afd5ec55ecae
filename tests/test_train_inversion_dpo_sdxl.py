"""The SDXL script: what its own functions do, and one run of all that it shares with its twin."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    assert_same,
    build_pipeline,
    build_sdxl_pipeline,
    encode,
    logged,
    lora,
    pair_rows,
    random_image,
    write_json,
    write_parquet,
)
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from test_train_inversion_dpo import LINEAR, record_unet_calls, resume, sample

import train_inversion_dpo_sdxl


@pytest.fixture
def script():
    return train_inversion_dpo_sdxl


@pytest.fixture
def tiny_model(tiny_sdxl_model):
    return tiny_sdxl_model


@pytest.fixture
def unet_calls(monkeypatch):
    return record_unet_calls(monkeypatch)


@pytest.fixture
def mixed_pairs(tmp_path):
    """Pairs whose winner is 40 x 32 and whose loser is 96 x 64 (width x height)."""
    rng = np.random.default_rng(0)
    sizes = {"jpg_0": (40, 32), "jpg_1": (96, 64)}
    rows = [{name: encode(random_image(rng, size)) for name, size in sizes.items()} for _ in range(4)]
    return write_parquet([{**row, "label_0": 1.0, "caption": "a red circle"} for row in rows], tmp_path / "mixed")


@pytest.mark.parametrize("objective", ["inversion_dpo", "inpo", "diffusion_dpo"])
def test_the_lora_loads_in_the_pipeline_and_changes_the_picture(train, tiny_model, objective):
    output_dir = train(objective=objective, learning_rate=1e-2)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    before = sample(pipe)
    pipe.load_lora_weights(output_dir)
    assert (sample(pipe) - before).abs().max() > 1e-3
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(pipe), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_first_step_tells_winner_from_loser(train, tmp_path, prediction_type):
    v = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True} if prediction_type != "epsilon" else {}
    build_sdxl_pipeline(**v).save_pretrained(tmp_path / "model")
    output_dir = train(
        pretrained_model_name_or_path=tmp_path / "model", learning_rate=3e-3, train_batch_size=16,
        train_data_dir=write_parquet(pair_rows(1), tmp_path / "pair"),
    )  # fmt: skip
    before, after = logged(output_dir, "rewards/margins")
    assert abs(before) < 1e-3 and after > 0.01
    assert logged(output_dir, "rewards/chosen")[1] > logged(output_dir, "rewards/rejected")[1]
    assert logged(output_dir, "loss")[1] < logged(output_dir, "loss")[0]


def test_the_conditioning_is_the_pipelines(train, tiny_model, mixed_pairs, unet_calls):
    """Embeddings, pooled embeddings and each image's own time_ids, the same for inversion, policy and reference."""
    method = {"objective": "inpo", "inversion_model": "policy", "inversion_steps": 2}
    train(train_data_dir=mixed_pairs, max_train_steps=1, **method)
    assert len(unet_calls) == 4  # two calls of the inversion, the reference's, the policy's
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    embeds, _, pooled, _ = pipe.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=False)
    winner, loser = (
        pipe._get_add_time_ids(size, corner, (32, 32), torch.float32, text_encoder_projection_dim=12)
        for size, corner in (((32, 40), (0, 4)), ((64, 96), (0, 8)))
    )
    for call in unet_calls:
        torch.testing.assert_close(call["text"], embeds.expand(4, -1, -1))
        torch.testing.assert_close(call["text_embeds"], pooled.expand(4, -1))
        assert torch.equal(call["time_ids"], torch.cat([winner, winner, loser, loser]))


@pytest.mark.parametrize("zeros", [True, False])
def test_empty_prompts_are_what_the_pipeline_takes_them_for(train, tiny_model, tmp_path, unet_calls, zeros):
    """All zeros where the model says so, as its unconditional branch was trained; else the empty text's embeddings."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    write_json(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    train(
        pretrained_model_name_or_path=folder, max_train_steps=1, train_batch_size=8, proportion_empty_prompts=0.5,
        objective="diffusion_dpo",
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    _, empty, _, empty_pooled = pipe.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=True)
    assert (empty == 0).all() == (empty_pooled == 0).all() == zeros
    emptied, emptied_pooled = (
        [torch.allclose(row, expected[0], atol=1e-5) for row in unet_calls[0][name]]
        for name, expected in (("text", empty), ("text_embeds", empty_pooled))
    )
    assert emptied == emptied_pooled and emptied[:8] == emptied[8:] and 0 < sum(emptied) < 16


@pytest.mark.parametrize("own_vae", [True, False])
def test_the_models_own_vae_and_the_lora_stay_in_float32(train, tiny_model, tmp_path, monkeypatch, own_vae):
    dtypes, vae_encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda vae, x: dtypes.append(vae.dtype) or vae_encode(vae, x))
    shutil.copytree(tiny_model / "vae", tmp_path / "other_vae")
    vae = {} if own_vae else {"pretrained_vae_model_name_or_path": tmp_path / "other_vae"}
    weights = lora(train(mixed_precision="bf16", max_train_steps=1, gradient_checkpointing=True, **vae))
    assert dtypes == [torch.float32 if own_vae else torch.bfloat16]
    assert all(value.dtype == torch.float32 and value.any() for value in weights.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_validation_shows_what_the_pipeline_draws(train, tiny_model, precision):
    """The base model on the left, the LoRA on the right. bf16 may round, but the VAE does not."""
    options = {"validation_prompts": ["a red circle"], "num_validation_images": 1, "validation_inference_steps": 2}
    output_dir = train(learning_rate=0.1, mixed_precision=precision, **options)
    picture = np.asarray(Image.open(output_dir / "validation" / "step-000002-prompt-0.png"), dtype=float)[-32:]
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_model)
    base = sample(pipe)
    pipe.load_lora_weights(output_dir)
    for shown, pixels in ((picture[:, :32], base), (picture[:, 32:], sample(pipe))):
        expected = pixels.permute(1, 2, 0).numpy() * 255
        assert np.abs(shown - expected).mean() < (1 if precision == "no" else 3) and expected.std() > 5
    assert np.abs(picture[:, :32] - picture[:, 32:]).mean() > 4


def test_parts_of_a_batch_and_a_stop_do_not_change_the_run(train, mixed_pairs):
    options = {"train_data_dir": mixed_pairs, "max_train_steps": 4, "checkpointing_steps": 2, **LINEAR}
    options |= {"random_crop": True, "random_flip": True, "inversion_steps": 4}
    whole = train("whole", train_batch_size=4, **options)
    parts = train("parts", train_batch_size=2, gradient_accumulation_steps=2, trajectory_chunk=3, **options)
    assert max(logged(whole, "rewards/margins")) > 0.1
    assert_same(lora(parts), lora(whole), atol=2e-6)
    assert_same(resume(train, whole, "checkpoint-2", "resumed", train_batch_size=4, **options), lora(whole))


def test_a_model_folder_without_an_index_is_enough(train, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model_index.json").unlink()
    drawing = {"validation_prompts": ["a red circle"], "num_validation_images": 1, "validation_inference_steps": 1}
    output_dir = train(pretrained_model_name_or_path=folder, max_train_steps=1, **drawing)
    assert len(list((output_dir / "validation").iterdir())) == 1
    assert json.loads((output_dir / "training_config.json").read_text())["pipeline"] == "StableDiffusionXLPipeline"


UNSUITABLE = [
    ("scheduler", {"_class_name": "EDMEulerScheduler"}), ("scheduler", {"_class_name": "FlowMatchLCMScheduler"}),
    ("scheduler", {"prediction_type": "sample"}), ("unet", {"time_cond_proj_dim": 256}), ("unet", {"in_channels": 9}),
]  # fmt: skip


@pytest.mark.parametrize(("part", "changes"), UNSUITABLE, ids=str)
def test_unsuitable_models_are_refused(refused, no_models, tiny_model, tmp_path, part, changes):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    write_json(next((folder / part).glob("*config.json")), **changes)
    message = refused(pretrained_model_name_or_path=folder)
    assert f"--pretrained_model_name_or_path {folder}" in message and "weights were loaded" not in message


def test_a_model_of_the_other_script_is_sent_there(refused, no_models, tmp_path):
    build_pipeline().save_pretrained(tmp_path / "sd")
    assert "train_inversion_dpo.py" in refused(pretrained_model_name_or_path=tmp_path / "sd")


def test_a_text_encoder_is_missing(refused, tiny_model, tmp_path):
    """As in SDXL's refiner, which has the second one only."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    assert f"--pretrained_model_name_or_path {folder}" in refused(pretrained_model_name_or_path=folder)

"""The LoRA as a file: that nobody can misread it, that a run can begin with it, and what it is compared with."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from conftest import assert_same, build_pipeline, build_sdxl_pipeline, logged, lora
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import set_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_inversion_dpo
import train_inversion_dpo_sdxl
import training_utils
from training_options import LORA_TARGETS
from training_utils import (
    KOHYA_FILE,
    LORA_FILE,
    add_lora,
    lora_weights,
    reference_policy,
    sgm_names,
    write_kohya,
    write_lora,
)

QUICK = {"objective": "inpo", "inversion_steps": 1, "learning_rate": 1e-2}
TARGETS = {
    "attention": list(LORA_TARGETS),
    "projections": ["to_q", "to_out.0", "proj_in", "proj_out"],
    "feed-forward": ["ff.net.0.proj", "ff.net.2"],
    "convolutions": ["to_v", "conv1", "conv2", "conv_shortcut", "time_emb_proj"],
    "pattern": [r".*(down_blocks.*\.to_k|conv_in|conv_out|time_embedding\.linear_1|samplers\.0\.conv)"],
}
FAMILIES = {
    "sd": (train_inversion_dpo, build_pipeline),
    "sdxl": (train_inversion_dpo_sdxl, build_sdxl_pipeline),
}


def output_of(unet):
    """A U-Net's output for fixed inputs."""
    generator, config = torch.Generator().manual_seed(0), unet.config
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 4), (2, 5, config.cross_attention_dim)))
    added = {"text_embeds": torch.randn(2, 12, generator=generator), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return unet(x, torch.tensor([10, 900]), text, added_cond_kwargs=added).sample


def random_lora(unet, rank=4, targets=LORA_TARGETS):
    """Gives a U-Net a LoRA of random weights, and returns the U-Net."""
    torch.manual_seed(1)
    for parameter in add_lora(unet, rank, targets):
        torch.nn.init.normal_(parameter, std=0.2)
    return unet


# One file that nobody can misread


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_fresh_pipeline_loads_every_module_of_a_trained_lora(kind, targets, train, script, monkeypatch, request):
    """Whatever the targets, at its full effect, from the file, from that of kohya, and from a checkpoint."""
    other, build = FAMILIES[kind]
    monkeypatch.setattr(script, "main", other.main)  # what `train` runs
    output_dir = train(
        **QUICK, rank=4, lora_target_modules=TARGETS[targets], output_kohya_format=True,
        pretrained_model_name_or_path=request.getfixturevalue({"sd": "tiny_model", "sdxl": "tiny_sdxl_model"}[kind]),
    )  # fmt: skip
    trained = build().unet
    base = output_of(trained)
    add_lora(trained, 4, TARGETS[targets])
    weights = {name.removeprefix("unet."): value for name, value in lora(output_dir).items()}
    set_peft_model_state_dict(trained, weights)
    expected = output_of(trained)
    assert (expected - base).abs().max() > 1e-2
    for path in (output_dir, output_dir / KOHYA_FILE, output_dir / "checkpoint-2"):
        pipe = build()
        pipe.load_lora_weights(path)
        assert sum(hasattr(module, "lora_A") for module in pipe.unet.modules()) == len(weights) / 2
        torch.testing.assert_close(output_of(pipe.unet), expected, rtol=0, atol=1e-4)
    assert all(
        name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in lora(output_dir)
    )
    with safe_open(output_dir / LORA_FILE, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == 4


SDXL = dict(
    block_out_channels=(320, 640, 1280), down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    up_block_types=[*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"], transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20], cross_attention_dim=2048, use_linear_projection=True, layers_per_block=2,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip


@pytest.mark.parametrize("config", [SDXL, build_sdxl_pipeline().unet.config], ids=["SDXL base", "small"])
def test_sgm_names_are_those_that_diffusers_converts_back(config):
    """All modules that a LoRA can have, through diffusers' converter of original checkpoints."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    names, checkpoint = sgm_names(unet.config), {}
    for module, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            (start,) = [start for start in names if f"{module}.".startswith(f"{start}.")]
            name = f"model.diffusion_model.{names[start]}{module.removeprefix(start)}"
            checkpoint |= {f"{name}.{kind}": f"{module}.{kind}" for kind, _ in layer.named_parameters()}
    converted = convert_ldm_unet_checkpoint(dict(checkpoint), unet.config)
    assert len(converted) == len(checkpoint) > 100 and all(name == value for name, value in converted.items())


BASES = {  # the U-Net's configuration, the prediction: what programs look for, see write_kohya
    ("sd", 768, "epsilon"): ("sd_v1", "False", "stable-diffusion-v1/lora"),
    ("sd", 1024, "epsilon"): ("sd_v2", "True", "stable-diffusion-v2-512/lora"),
    ("sd", 1024, "v_prediction"): ("sd_v2", "True", "stable-diffusion-v2-768-v/lora"),
    ("sdxl", 2048, "v_prediction"): ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora"),
}


@pytest.mark.parametrize("base", BASES)
def test_the_kohya_file_says_for_which_model_it_is(base, tmp_path):
    """AUTOMATIC1111 hides a LoRA that does not while a model of another kind is loaded. No paths, no prompts."""
    kind, width, prediction_type = base
    unet = random_lora(FAMILIES[kind][1]().unet)
    config = {**unet.config, "cross_attention_dim": width}
    write_kohya(tmp_path / "it.safetensors", lora_weights(unet), config, "my-taste", prediction_type, 768)
    with safe_open(tmp_path / "it.safetensors", "pt") as file:
        metadata = file.metadata()
    names = ("ss_base_model_version", "ss_v2", "modelspec.architecture")
    assert tuple(metadata[name] for name in names) == BASES[base]
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "my-taste"
    assert (metadata["modelspec.resolution"], metadata["ss_resolution"]) == ("768x768", "(768, 768)")
    assert metadata["modelspec.prediction_type"] == prediction_type.split("_")[0]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4")
    assert not any(character in value for value in metadata.values() for character in "\\~")


def test_files_get_the_mode_of_the_umask(train):
    for umask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(umask)
        try:
            output_dir = train(f"run-{umask}", **QUICK, output_kohya_format=True)
        finally:
            os.umask(before)
        files = [path for path in output_dir.rglob("*") if path.is_file()]
        assert len(files) >= 8 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def damage(kind, file):
    weights = load_file(file)
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    name = next(name for name in weights if ".lora_B." in name)
    if kind == "text encoder":
        weights["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 16)
    elif kind == "unknown module":
        weights |= {f"unet.nowhere.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    elif kind == "not finite":
        weights[name][0] = float("nan")
    elif kind == "half of a module":
        weights.pop(name)
    elif kind == "other kind":
        weights["unet.conv_in.hada_w1_a"] = torch.ones(4, 4)
    elif kind == "dora":
        weights = {f"lora_unet_conv_in.{name}": torch.ones(4, 4) for name in ("lora_up.weight", "lora_down.weight")}
        weights["lora_unet_conv_in.dora_scale"] = torch.ones(4, 1)
    elif kind == "no LoRA":
        weights = {"conv_in.weight": torch.ones(4, 4)}
    if kind == "alpha":
        metadata = {
            name: value.replace('"unet.lora_alpha": 4', '"unet.lora_alpha": 2') for name, value in metadata.items()
        }
    save_file(weights, file, None if kind == "no metadata" else metadata)


@pytest.mark.parametrize(
    "kind", ["text encoder", "alpha", "no metadata", "unknown module", "not finite", "half of a module", "other kind",
             "dora", "no LoRA", "empty", "cut short", "sdxl", "missing", "empty folder"],
)  # fmt: skip
def test_a_lora_that_does_not_fit_is_refused_before_weights_load(kind, refused, no_models, tmp_path):
    file = tmp_path / "init.safetensors"
    write_lora(
        file, lora_weights(random_lora((build_sdxl_pipeline if kind == "sdxl" else build_pipeline)().unet)), "unet"
    )
    damage(kind, file)
    if kind in ("empty", "cut short"):
        file.write_bytes(file.read_bytes()[: 0 if kind == "empty" else 5000])
    (tmp_path / "folder").mkdir()
    path = {"missing": tmp_path / "nothing.safetensors", "empty folder": tmp_path / "folder"}.get(kind, file)
    assert refused(lora_init=path, rank=None).startswith(f"--lora_init {path}: ")


# Begin with a LoRA


@pytest.fixture
def first(train):
    """A LoRA of a run of its own."""
    return train("first", **QUICK, max_train_steps=3)


INIT = {**QUICK, "rank": None, "seed": 5}


def test_a_run_goes_on_from_a_lora_against_the_base_or_against_that_lora(train, first):
    """With the base as reference the first margin is that of the LoRA, with the LoRA itself it is zero."""
    margins, errors, options = {}, {}, {**INIT, "objective": "diffusion_dpo", "max_train_steps": 1}
    for reference in ("base", "init"):
        run = train(reference, **options, lora_init=first, reference=reference)
        margins[reference] = logged(run, "rewards/margins")[0]
        errors[reference] = [logged(run, f"{model}_error")[0] for model in ("policy", "reference")]
        assert json.loads((run / "training_config.json").read_text())["rank"] == 4
    plain = train("plain", **{**options, "rank": 4})
    assert errors["base"][1] == pytest.approx(logged(plain, "reference_error")[0], rel=1e-6)
    assert abs(margins["base"]) > 1e-3 and margins["init"] == pytest.approx(0, abs=1e-6)
    assert errors["base"][0] == pytest.approx(errors["init"][0], rel=1e-6) == errors["init"][1]


def test_without_a_step_of_any_size_the_saved_lora_is_the_initial_one(train, first):
    run = train(**INIT | {"learning_rate": 1e-30}, lora_init=first / LORA_FILE)
    assert_same(lora(run), lora(first), atol=1e-7)


def test_the_frozen_reference_does_not_move_and_the_policy_does():
    unet = random_lora(build_pipeline().unet)
    init, start = lora_weights(unet), output_of(unet)
    unet = build_pipeline().unet
    parameters = add_lora(unet, 1, init=init, reference="init")
    assert len(parameters) == len(init) and all(parameter.dtype == torch.float32 for parameter in parameters)
    for parameter in parameters:
        parameter.data += 0.1
    with reference_policy(unet):
        torch.testing.assert_close(output_of(unet), start, rtol=0, atol=1e-6)
    assert [p.requires_grad for n, p in unet.named_parameters() if "reference" in n] == [False] * len(init)
    assert [p.requires_grad for n, p in unet.named_parameters() if "default" in n] == [True] * len(init)
    assert not torch.allclose(output_of(unet), start)


@pytest.mark.parametrize("cache", [None, "cache"])
def test_a_run_from_a_lora_is_resumed_exactly(train, first, tmp_path, cache):
    options = {**INIT, "lora_init": first, "reference": "init", "random_flip": True, "checkpointing_steps": 2}
    options |= {"inversion_cache_dir": cache and tmp_path / cache}
    whole = train("whole", **options, max_train_steps=4)
    train("broken", **options, max_train_steps=2)
    broken = train("broken", **options, max_train_steps=4, resume_from_checkpoint="latest")
    assert_same(lora(broken), lora(whole))


def test_a_resumed_run_keeps_the_lora_it_began_with(train, refused, first):
    train(**INIT, lora_init=first, max_train_steps=1)
    weights = load_file(first / LORA_FILE)
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1e-3}, first / LORA_FILE)
    changes = [{"lora_init": first}, {"lora_init": None, "rank": 16}]
    for change in changes:
        message = refused(**{**INIT, **change}, max_train_steps=2, resume_from_checkpoint="latest")
        assert "lora_init" in message


def test_the_cache_of_a_frozen_lora_is_another_one(train, first, tmp_path):
    options = {**INIT, "inversion_cache_dir": tmp_path / "cache", "max_train_steps": 1}
    count = lambda: len(list((tmp_path / "cache").glob("*/settings.json")))  # noqa: E731
    train("plain", **{**options, "rank": 4})
    train("base", **options, lora_init=first)
    assert count() == 1
    train("init", **options, lora_init=first, reference="init")
    assert count() == 2


# Pictures


def test_the_last_pictures_are_of_the_saved_file(train, monkeypatch):
    """So that a broken file is seen: here one whose LoRA has become zero."""

    def write_zeros(file, weights, part):
        write_lora(file, {name: torch.zeros_like(value) for name, value in weights.items()}, part)

    monkeypatch.setattr(training_utils, "write_lora", write_zeros)
    options = {"validation_prompts": ["a"], "validation_inference_steps": 2, "num_validation_images": 1}
    output_dir = train(**{**QUICK, "learning_rate": 3e-2}, **options, validation_steps=1)
    differences = []
    for step in (1, 2):
        pixels = np.asarray(Image.open(output_dir / f"validation/step-{step:06}-prompt-0.png"), dtype=float)[-32:]
        differences.append(np.abs(pixels[:, :32] - pixels[:, 32:]).mean())
    assert differences[0] > 0.5 and differences[1] == 0


def test_columns_are_the_scales_that_were_asked_for(train, tiny_model):
    options = {"validation_prompts": ["a"], "validation_inference_steps": 2, "num_validation_images": 1, "seed": 3}
    output_dir = train(**{**QUICK, "learning_rate": 3e-2}, **options, validation_lora_scales=[1.25, 0, 0.5])
    pixels = np.asarray(Image.open(output_dir / "validation/step-000002-prompt-0.png"), dtype=float)[-32:]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipe.load_lora_weights(output_dir, adapter_name="it")
    for column, scale in zip(np.split(pixels, 3, axis=1), (1.25, 0, 0.5), strict=True):
        pipe.set_adapters("it", scale)
        generator = torch.Generator().manual_seed(3)
        sample = pipe("a", height=32, width=32, num_inference_steps=2, generator=generator).images[0]
        assert np.abs(np.asarray(sample, dtype=float) - column).mean() < 0.1
    assert np.abs(pixels[:, :32] - pixels[:, 64:]).mean() > 0.5

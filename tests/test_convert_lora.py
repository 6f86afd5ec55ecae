"""examples/convert_lora.py: one LoRA in every format, each with the same effect on the model."""

import os
import stat
import subprocess
import sys

import convert_lora
import pytest
import torch
from conftest import ONE_THREAD, ROOT, build_pipeline, build_sdxl_pipeline
from peft import PeftModel
from safetensors.torch import load_file
from test_lora import TARGETS, output_of, random_lora

from inversion_utils import lora_weights, write_kohya, write_lora

MODELS = {"sd": ("tiny_model", build_pipeline), "sdxl": ("tiny_sdxl_model", build_sdxl_pipeline)}


def convert(model, lora, form, output):
    convert_lora.main([
        "--pretrained_model_name_or_path", str(model), "--lora", str(lora), "--format", form, "--output", str(output),
    ])  # fmt: skip
    return output


def outputs_of(file, build, form):
    """What a fresh U-Net returns with a LoRA in a format."""
    pipe = build()
    if form == "peft":
        with torch.no_grad():
            return output_of(PeftModel.from_pretrained(pipe.unet, file))
    pipe.load_lora_weights(file)
    return output_of(pipe.unet)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", MODELS)
def test_each_format_and_back_has_the_effect_of_the_original(kind, targets, tmp_path, request, capsys):
    fixture, build = MODELS[kind]
    model, unet = request.getfixturevalue(fixture), random_lora(build().unet, targets=TARGETS[targets])
    expected, count = output_of(unet), len(lora_weights(unet)) // 2
    assert (expected - output_of(build().unet)).abs().max() > 0.1
    write_lora(tmp_path / "diffusers.safetensors", lora_weights(unet))
    write_kohya(tmp_path / "kohya.safetensors", lora_weights(unet), unet.config)
    for source in ("diffusers", "kohya"):
        for form in ("diffusers", "kohya", "peft"):
            output = tmp_path / f"{source}-{form}{'' if form == 'peft' else '.safetensors'}"
            convert(model, tmp_path / f"{source}.safetensors", form, output)
            assert f"{count} modules of rank 4" in capsys.readouterr().out
            torch.testing.assert_close(outputs_of(output, build, form), expected, rtol=0, atol=1e-4)


def test_the_kohya_file_alone_says_what_is_added_to_each_weight(tmp_path):
    """As the other programs do it: W + up @ down * alpha / rank, with names made of the model's module names."""
    unet = random_lora(build_pipeline().unet, targets=["to_q", "proj_in", "ff.net.2", "conv1", "conv_shortcut"])
    write_kohya(tmp_path / "kohya.safetensors", lora_weights(unet), unet.config)
    tensors, merged, seen = load_file(tmp_path / "kohya.safetensors"), build_pipeline().unet, 0
    for name, layer in merged.named_modules():
        prefix = f"lora_unet_{name.replace('.', '_')}"
        if f"{prefix}.alpha" in tensors:
            down, up = tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"]
            delta = (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
            layer.weight.data += delta * tensors[f"{prefix}.alpha"] / len(down)
            seen += 3
    assert seen == len(tensors)
    torch.testing.assert_close(output_of(merged), output_of(unet), rtol=0, atol=1e-4)


def test_the_kohya_file_of_sdxl_has_the_names_of_the_original_code(tmp_path):
    """Written down by hand for the small model: two blocks, a layer each on the way down, two on the way up."""
    unet = random_lora(build_sdxl_pipeline().unet, targets=["to_q", "proj_in", "ff.net.2", "conv1", "conv_shortcut"])
    write_kohya(tmp_path / "kohya.safetensors", lora_weights(unet), unet.config)
    assert {
        f"lora_unet_{name}.alpha" for name in (
            "input_blocks_1_0_in_layers_2", "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
            "input_blocks_3_0_skip_connection", "middle_block_1_proj_in", "middle_block_2_in_layers_2",
            "output_blocks_1_1_transformer_blocks_0_ff_net_2", "output_blocks_2_0_skip_connection",
        )
    } <= load_file(tmp_path / "kohya.safetensors").keys()  # fmt: skip


def test_files_get_the_mode_of_the_umask(tiny_model, tmp_path):
    write_lora(tmp_path / "lora.safetensors", lora_weights(random_lora(build_pipeline().unet)))
    before = os.umask(0o022)
    try:
        folder = convert(tiny_model, tmp_path / "lora.safetensors", "peft", tmp_path / "peft")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= modes.keys() and set(modes.values()) == {0o644}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora": "no/such/lora"}, "--lora"), ({"lora": "README.md"}, "--lora"), ({"lora": "examples"}, "--lora"),
        ({"pretrained_model_name_or_path": "examples"}, "--pretrained_model_name_or_path"),
        ({"output": "pyproject.toml"}, "--output"), ({"output": "x"}, "--output"),
        ({"output": "x.safetensors", "format": "peft"}, "--output"), ({"format": "lycoris"}, "--format"),
        ({"output": "pyproject.toml/x.safetensors"}, "--output"),
        ({"pretrained_model_name_or_path": "sdxl"}, "--lora"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, named, tiny_model, tiny_sdxl_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    write_lora(tmp_path / "lora.safetensors", lora_weights(random_lora(build_pipeline().unet)))
    options = {
        "pretrained_model_name_or_path": tiny_model, "lora": tmp_path / "lora.safetensors", "format": "kohya",
        "output": tmp_path / "new.safetensors", **changes,
    }  # fmt: skip
    if options["pretrained_model_name_or_path"] == "sdxl":
        options["pretrained_model_name_or_path"] = tiny_sdxl_model
    with pytest.raises(SystemExit) as stop:
        convert_lora.main([str(word) for name, value in options.items() for word in (f"--{name}", value)])
    *_, message = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and f"error: {'argument ' if named == '--format' else ''}{named}" in message
    assert not (tmp_path / "new.safetensors").exists()


def test_what_exists_is_not_overwritten(tiny_model, tmp_path):
    write_lora(tmp_path / "lora.safetensors", lora_weights(random_lora(build_pipeline().unet)))
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(SystemExit):
        convert(tiny_model, tmp_path / "lora.safetensors", "kohya", tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_help_prints_nothing_else():
    command = [sys.executable, ROOT / "examples" / "convert_lora.py", "--help"]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")

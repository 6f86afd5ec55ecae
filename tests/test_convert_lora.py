"""examples/convert_lora.py: one LoRA in every format, each with the same effect on the model."""

import json
import os
import stat
import subprocess
import sys

import convert_lora
import pytest
import torch
from conftest import ONE_THREAD, ROOT, build_pipeline, build_sdxl_pipeline
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import TARGETS, output_of, random_lora

from training_utils import add_lora, lora_shape, lora_weights, sgm_names, write_kohya, write_lora

MODELS = {"sd": ("tiny_model", build_pipeline), "sdxl": ("tiny_sdxl_model", build_sdxl_pipeline)}


def convert(model, lora, form, output, *more):
    words = ["--pretrained_model_name_or_path", model, "--lora", lora, "--format", form, "--output", output, *more]
    convert_lora.main(*convert_lora.parse_args(list(map(str, words))))
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
def test_each_format_and_back_again_has_the_effect_of_the_original(kind, targets, tmp_path, request, capsys):
    fixture, build = MODELS[kind]
    model, unet = request.getfixturevalue(fixture), random_lora(build().unet, targets=TARGETS[targets])
    expected, count = output_of(unet), len(lora_weights(unet)) // 2
    assert (expected - output_of(build().unet)).abs().max() > 0.1
    write_lora(tmp_path / "first.safetensors", lora_weights(unet), "unet")
    source = tmp_path / "first.safetensors"
    for form in ("kohya", "peft", "diffusers"):
        output = tmp_path / f"{form}{'' if form == 'peft' else '.safetensors'}"
        source = convert(model, source, form, output)
        assert f"{count} modules of rank 4" in capsys.readouterr().out
        torch.testing.assert_close(outputs_of(output, build, form), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("kind", MODELS)
def test_scale_1_of_what_is_written_is_the_scale_asked_for(kind, form, tmp_path, request, capsys):
    fixture, build = MODELS[kind]
    unet, pipe = random_lora(build().unet), build()
    write_lora(tmp_path / "lora.safetensors", lora_weights(unet), "unet")
    pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="it")
    pipe.set_adapters("it", 0.4)
    expected = output_of(pipe.unet)
    assert (expected - output_of(unet)).abs().max() > 0.01
    output = tmp_path / f"taste{'' if form == 'peft' else '.safetensors'}"
    convert(request.getfixturevalue(fixture), tmp_path / "lora.safetensors", form, output, "--scale", "0.4")
    torch.testing.assert_close(outputs_of(output, build, form), expected, rtol=0, atol=1e-4)
    assert "scale 0.4 of " in capsys.readouterr().out


@pytest.mark.parametrize("kind", MODELS)
def test_the_kohya_file_says_what_it_is(kind, tiny_model, tiny_v_model, tiny_sdxl_model, tmp_path):
    _, build = MODELS[kind]
    write_lora(tmp_path / "lora.safetensors", lora_weights(random_lora(build().unet)), "unet")
    model = {"sd": tiny_v_model, "sdxl": tiny_sdxl_model}[kind]
    output = convert(model, tmp_path / "lora.safetensors", "kohya", tmp_path / "my-taste.safetensors")
    with safe_open(output, "pt") as file:
        about = file.metadata()
    assert (about["modelspec.title"], about["modelspec.resolution"]) == ("my-taste", "32x32")
    assert about["modelspec.prediction_type"] == {"sd": "v", "sdxl": "epsilon"}[kind]


def test_the_kohya_file_alone_says_what_is_added_to_each_weight(tmp_path):
    """As the other programs do it: W + up @ down * alpha / rank, with names made of the model's module names."""
    unet = random_lora(build_pipeline().unet, targets=["to_q", "proj_in", "ff.net.2", "conv1", "conv_shortcut"])
    write_kohya(tmp_path / "kohya.safetensors", lora_weights(unet), unet.config, "taste")
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
    write_kohya(tmp_path / "kohya.safetensors", lora_weights(unet), unet.config, "taste")
    assert {
        f"lora_unet_{name}.alpha" for name in (
            "input_blocks_1_0_in_layers_2", "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
            "input_blocks_3_0_skip_connection", "middle_block_1_proj_in", "middle_block_2_in_layers_2",
            "output_blocks_1_1_transformer_blocks_0_ff_net_2", "output_blocks_2_0_skip_connection",
        )
    } <= load_file(tmp_path / "kohya.safetensors").keys()  # fmt: skip


def test_files_get_the_mode_of_the_umask(tiny_model, tmp_path):
    write_lora(tmp_path / "lora.safetensors", lora_weights(random_lora(build_pipeline().unet)), "unet")
    before = os.umask(0o022)
    try:
        folder = convert(tiny_model, tmp_path / "lora.safetensors", "peft", tmp_path / "peft")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= modes.keys() and set(modes.values()) == {0o644}


# LoRAs of other programs


def written_as(form, unet, path):
    """Writes a U-Net's LoRA of rank 4 as other programs, and earlier versions of this one, wrote it, with alpha 2."""
    weights = {f"unet.{name}": value for name, value in lora_weights(unet).items()}
    raw = {name: value * 2 if ".lora_B." in name else value for name, value in weights.items()}
    modules = lora_shape(lora_weights(unet))[1]
    config, metadata = {"unet.r": 4, "unet.lora_alpha": 2.0, "unet.target_modules": modules}, {"format": "pt"}

    def renamed(start, module_name):
        names = {"A": "lora_down", "B": "lora_up"}
        tensors = {f"{start}{module_name(module)}.{names[x]}.weight": raw[f"unet.{module}.lora_{x}.weight"]
                   for module in modules for x in "AB"}  # fmt: skip
        return tensors | {f"{start}{module_name(module)}.alpha": torch.tensor(2.0) for module in modules}

    if form == "mixed names, alpha in the metadata":
        raw = {
            name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
            if ".attn" in name
            else name: value
            for name, value in raw.items()
        }
        metadata["lora_adapter_metadata"] = json.dumps(config)
    elif form == "kohya":
        raw = renamed("lora_unet_", lambda module: module.replace(".", "_"))
    elif form == "ComfyUI":
        sgm = sgm_names(unet.config)

        def original(module):
            start = next((start for start in sgm if f"{module}.".startswith(f"{start}.")), "")
            return sgm.get(start, "") + module.removeprefix(start)

        raw = renamed("diffusion_model.", original)
    elif form == "PEFT":
        path.mkdir()
        LoraConfig(r=4, lora_alpha=1, use_rslora=True, target_modules=modules).save_pretrained(path)  # 1 / sqrt(4)
        raw = {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in raw.items()}
        path = path / "adapter_model.safetensors"
    elif form == "ranks differ":
        raw = {}
        for i, name in enumerate(f"unet.{module}" for module in modules):
            down, up = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            if i % 2:  # the same product, as one of rank 6
                down, up = torch.cat([down, down[:2]]), torch.cat([up, torch.zeros_like(up[:, :2])], dim=1)
            raw |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    else:
        raw = {name: value.half() for name, value in weights.items()}
    save_file({name: value.contiguous() for name, value in raw.items()}, path, metadata)


@pytest.mark.parametrize(
    "form", ["mixed names, alpha in the metadata", "kohya", "ComfyUI", "PEFT", "ranks differ", "half precision"]
)
@pytest.mark.parametrize("kind", MODELS)
def test_loras_of_other_programs_are_read_with_their_full_effect(kind, form, tmp_path):
    _, build = MODELS[kind]
    targets = ["to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv"]
    unet = random_lora(build().unet, targets=targets)
    written_as(form, unet, tmp_path / "other")
    weights, fresh = convert_lora.read_any_lora(tmp_path / "other", unet.config), build().unet
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert lora_shape(weights)[0] == (6 if form == "ranks differ" else 4)
    add_lora(fresh, 1, init=weights)
    atol = 1e-2 if form == "half precision" else 1e-5
    torch.testing.assert_close(output_of(fresh), output_of(unet), rtol=0, atol=atol)
    assert (output_of(unet) - output_of(build().unet)).abs().max() > 0.1


@pytest.mark.parametrize("more", [
    {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)},
    {"bundle_emb.me.string_to_param.*": torch.ones(2, 16)},
])  # fmt: skip
def test_unet_only_leaves_out_the_rest(more, tiny_model, tmp_path, capsys):
    weights = {f"unet.{name}": value for name, value in lora_weights(random_lora(build_pipeline().unet)).items()}
    save_file(weights | more, tmp_path / "lora.safetensors")
    with pytest.raises(SystemExit):
        convert(tiny_model, tmp_path / "lora.safetensors", "kohya", tmp_path / "new.safetensors")
    assert "--unet_only" in capsys.readouterr().err
    convert(tiny_model, tmp_path / "lora.safetensors", "diffusers", tmp_path / "new.safetensors", "--unet_only")
    written = load_file(tmp_path / "new.safetensors")
    assert written.keys() == weights.keys() and all(written[name].equal(weights[name]) for name in weights)


def damage(kind, file):
    weights = load_file(file)
    name = next(name for name in weights if ".lora_B." in name)
    module = "lora_unet_down_blocks_0_attentions_0_proj_in"
    pair = {f"{module}.{name}.weight": torch.ones(4, 4) for name in ("lora_up", "lora_down")}
    if kind == "unknown module":
        weights |= {f"unet.nowhere.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    elif kind == "not finite":
        weights[name][0] = float("nan")
    elif kind == "half of a module":
        weights.pop(name)
    elif kind == "wrong size":
        weights[name] = weights[name][1:].contiguous()
    elif kind in OTHERS:
        weights = {name.replace("M", module): torch.ones(4, 4) for name in OTHERS[kind]}
        weights |= pair if kind in ("DoRA", "Tucker") else {}
    save_file(weights, file)


OTHERS = {
    "DoRA": ["M.dora_scale"], "LoHa": [f"M.hada_w{i}_{x}" for i in "12" for x in "ab"], "LoKr": ["M.lokr_w1"],
    "Tucker": ["M.lora_mid.weight"], "OFT": ["M.oft_blocks"], "IA3": ["M.weight", "M.on_input"],
    "full differences": ["M.diff", "M.diff_b"], "transformer": ["transformer.transformer_blocks.0.x.lora_A.weight"],
    "no LoRA": ["conv_in.weight"],
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [*OTHERS, "unknown module", "not finite", "half of a module", "wrong size", "empty", "cut short", "pickle",
             "empty folder", "wrong size of PEFT", "IA3 of PEFT", "DoRA of PEFT"],
)  # fmt: skip
def test_what_cannot_be_read_is_named(kind, tiny_model, tmp_path, capsys):
    lora, unet = tmp_path / "lora.safetensors", random_lora(build_pipeline().unet)
    write_lora(lora, lora_weights(unet), "unet")
    damage(kind, lora)
    if kind in ("empty", "cut short"):
        lora.write_bytes(lora.read_bytes()[: 0 if kind == "empty" else 5000])
    elif kind == "pickle":
        lora = lora.with_suffix(".bin")
        torch.save({}, lora)
    elif kind == "empty folder":
        lora = tmp_path / "folder"
        lora.mkdir()
    elif kind == "wrong size of PEFT":
        lora = convert(tiny_model, lora, "peft", tmp_path / "peft")
        damage("wrong size", lora / "adapter_model.safetensors")
    elif kind.endswith("of PEFT"):
        lora = tmp_path / "peft"
        ia3 = IA3Config(target_modules=["to_q"], feedforward_modules=[])
        config = ia3 if "IA3" in kind else LoraConfig(target_modules=["to_q"], use_dora=True)
        get_peft_model(build_pipeline().unet, config).save_pretrained(lora)
    with pytest.raises(SystemExit) as stop:
        convert(tiny_model, lora, "kohya", tmp_path / "new.safetensors")
    *_, message = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and f"error: --lora {lora}: " in message
    assert kind not in OTHERS or kind == "no LoRA" or kind.split()[0] in message.split(str(lora))[1]
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_the_lora_of_another_family_is_called_so(form, tiny_model, tiny_sdxl_model, tmp_path, capsys):
    output = tmp_path / ("xl" if form == "peft" else "xl.safetensors")
    write_lora(tmp_path / "plain.safetensors", lora_weights(random_lora(build_sdxl_pipeline().unet)), "unet")
    convert(tiny_sdxl_model, tmp_path / "plain.safetensors", form, output)
    with pytest.raises(SystemExit) as stop:
        convert(tiny_model, output, "diffusers", tmp_path / "new.safetensors")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--lora" in message and "this LoRA is for " in message
    assert "size mismatch" not in message and (form != "kohya" or "SDXL" in message)


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
    write_lora(tmp_path / "lora.safetensors", lora_weights(random_lora(build_pipeline().unet)), "unet")
    options = {
        "pretrained_model_name_or_path": tiny_model, "lora": tmp_path / "lora.safetensors", "format": "kohya",
        "output": tmp_path / "new.safetensors", **changes,
    }  # fmt: skip
    if options["pretrained_model_name_or_path"] == "sdxl":
        options["pretrained_model_name_or_path"] = tiny_sdxl_model
    with pytest.raises(SystemExit) as stop:
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        convert_lora.main(*convert_lora.parse_args(words))
    *_, message = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and f"error: {'argument ' if named == '--format' else ''}{named}" in message
    assert not (tmp_path / "new.safetensors").exists()


def test_what_exists_is_not_overwritten(tiny_model, tmp_path):
    write_lora(tmp_path / "lora.safetensors", lora_weights(random_lora(build_pipeline().unet)), "unet")
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(SystemExit):
        convert(tiny_model, tmp_path / "lora.safetensors", "kohya", tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_help_prints_nothing_else():
    command = [sys.executable, ROOT / "examples" / "convert_lora.py", "--help"]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")

"""Options that make a run faster or smaller and must not change what it learns."""

import contextlib
import json
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch._inductor.config
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from test_train_inversion_dpo import ONE_THREAD, ROOT, assert_same, draw_picture, logged, lora, spoil_losses

import inversion_utils
from inversion_utils import on_device


@pytest.fixture
def small_unet(tiny_model, tmp_path):
    """The tiny model with a U-Net of one level, which takes seconds to trace."""
    folder = shutil.copytree(tiny_model, tmp_path / "small_unet")
    shutil.rmtree(folder / "unet")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=4, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"], cross_attention_dim=16,
        mid_block_type=None,
    ).save_pretrained(folder / "unet")  # fmt: skip
    return folder


@pytest.fixture
def compile_quickly(monkeypatch):
    """Compiles without a C++ compiler, graphs and all but the kernels; returns dynamo's counters."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: original(*args, backend="aot_eager", **options))
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, 2),  # reference, policy with a gradient
        ({"trajectory_chunk": 3, "gradient_checkpointing": True}, 5),  # the policy 2 x 2: chunk sizes and gradient
    ],
    ids=["plain", "chunks"],
)
def test_compiled_equals_eager_with_few_graphs(train, small_unet, tmp_path, compile_quickly, options, graphs):
    options |= {"pretrained_model_name_or_path": small_unet, "lora_target_modules": ["to_q"]}
    options |= {"learning_rate": 1e-3, "max_train_steps": 4, "checkpointing_steps": 2}
    eager = train("eager", **options)
    shutil.copytree(eager / "checkpoint-2", tmp_path / "compiled" / "checkpoint-2")
    options |= {"validation_prompts": ["a red circle"], "validation_steps": 1, "num_validation_images": 1}
    options |= {"validation_inference_steps": 1, "resume_from_checkpoint": "latest"}
    assert_same(lora(train("compiled", compile=True, **options)), lora(eager), atol=1e-5)
    assert compile_quickly["stats"]["unique_graphs"] == graphs + 1  # and the check's own
    assert not compile_quickly["graph_break"]


def test_without_a_compiler_nothing_is_loaded(refused, no_models, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    message = refused(compile=True)
    assert "--compile needs a C++ compiler, such as g++" in message and "no-such-compiler" in message
    torch._dynamo.reset()


def test_checkpointing_is_around_the_policy_only(train, monkeypatch):
    """Where no gradient is wanted nothing is stored, so recomputing would be waste."""
    with_gradient = []
    original = torch.utils.checkpoint.checkpoint

    def checkpoint(*args, **options):
        with_gradient.append(torch.is_grad_enabled())
        return original(*args, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", checkpoint)
    train(max_train_steps=1, gradient_checkpointing=True, trajectory_chunk=3)
    assert with_gradient and all(with_gradient)


def test_the_fused_optimizer_takes_the_same_steps(train, script, monkeypatch):
    fused = train("fused", max_train_steps=3, learning_rate=1e-3)
    original, seen = torch.optim.AdamW, []

    def adamw(*args, fused, **options):
        seen.append(fused)
        return original(*args, **options)

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    plain = train("plain", max_train_steps=3, learning_rate=1e-3)
    assert seen == [True]
    assert_same(lora(fused), lora(plain), atol=1e-6)


def test_log_every_logs_means(train, monkeypatch):
    """Of the updates since the last, the run's last ones too; one that is not finite does not spoil the others."""
    spoil_losses(monkeypatch, at_steps={1})
    options = {"max_train_steps": 5, "lr_scheduler": "linear", "report_to": "tensorboard"}
    output_dir = train(log_every=2, **options)
    every = json.loads((output_dir / "checkpoint-5" / "training_state.json").read_text())["metrics"]
    for tag in ("loss", "lr", "policy_error", "rewards/margins"):
        first, _, third, fourth, fifth = (row[tag] for row in every)
        assert logged(output_dir, tag) == pytest.approx([first, (third + fourth) / 2, fifth], rel=1e-5), tag
    assert logged(output_dir, "bad_steps") == [1, 1, 1]


class OnDevice(torch.Tensor):
    """A tensor as if on an accelerator: what is computed of it is one too, and reading its values is counted."""

    reads = []
    READERS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "equal")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        by_mask = name == "__getitem__" and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if name in cls.READERS or by_mask:
            cls.reads.append(name)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("options", [{}, {"objective": "diffusion_dpo"}, {"trajectory_chunk": 3}], ids=str)
def test_an_update_waits_for_the_device_once(train, script, monkeypatch, options):
    """The metrics are read once per update, whatever the batches; everything else follows from the latents."""
    original = script.encode_images
    monkeypatch.setattr(script, "encode_images", lambda *args: original(*args).as_subclass(OnDevice))
    OnDevice.reads.clear()
    train(max_train_steps=3, gradient_accumulation_steps=2, **options)
    assert OnDevice.reads == ["tolist"] * 3


def test_quantizing_needs_a_gpu(refused, no_models):
    assert refused(quantize_base="nf4") == "--quantize_base needs a GPU; diffusers does not quantize on cpu"


def test_quantizing_needs_bitsandbytes(refused, no_models, script, monkeypatch):
    monkeypatch.setattr(script, "is_bitsandbytes_available", lambda: False)
    assert "--quantize_base int8 needs bitsandbytes" in refused(quantize_base="int8")


@pytest.fixture
def quantizes_on_cpus(script, monkeypatch):
    """Takes away the refusals, ours and diffusers': bitsandbytes has kernels for CPUs."""
    from diffusers.quantizers import bitsandbytes as quantizers

    monkeypatch.setattr(script, "check_quantization", lambda device: None)
    for quantizer in (quantizers.BnB4BitDiffusersQuantizer, quantizers.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **options: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda *args: {"": "cpu"})


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_learns_nearly_the_same(train, quantizes_on_cpus, tiny_model, script, monkeypatch, kind):
    """The LoRA is float32, starts at the quantized reference, and moves as it would from the other."""
    unets, add_lora = [], script.add_lora
    monkeypatch.setattr(script, "add_lora", lambda unet, *args: unets.append(unet) or add_lora(unet, *args))
    options = {"max_train_steps": 3, "learning_rate": 2e-3, "train_batch_size": 4, "trajectory_chunk": 3}
    plain = train("plain", report_to="tensorboard", **options)
    options |= {"quantize_base": kind, "mixed_precision": "bf16", "gradient_checkpointing": True}
    pictures = {"validation_prompts": ["a"], "num_validation_images": 1, "validation_inference_steps": 2}
    quantized = train("quantized", report_to="tensorboard", checkpointing_steps=2, **options, **pictures)
    kinds = {module.__class__.__name__ for module in unets[1].modules() if not hasattr(module, "lora_A")}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind] in kinds
    (start, *_, end), (_, *_, plain_end) = (logged(folder, "rewards/margins") for folder in (quantized, plain))
    assert abs(start) < 1e-4  # the policy begins as the reference, in whatever chunks either is called
    assert abs(plain_end) > 0.1 and end == pytest.approx(plain_end, rel=0.25)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in lora(quantized).values())
    assert len(list((quantized / "validation").glob("*.png"))) == 1
    shutil.copytree(quantized / "checkpoint-2", quantized.with_name("resumed") / "checkpoint-2")
    assert_same(lora(train("resumed", resume_from_checkpoint="latest", **options)), lora(quantized))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    before = draw_picture(pipe)
    pipe.load_lora_weights(quantized)
    assert (draw_picture(pipe) - before).abs().max() > 1e-4


def test_offloaded_modules_come_and_go(monkeypatch):
    """The weights at home are not touched, and are back also after an error. "cpu:0" stands for an accelerator."""
    monkeypatch.setattr(inversion_utils, "to_device", lambda tensor, device: tensor.clone())
    module = torch.nn.BatchNorm1d(3).requires_grad_(False)
    home = {name: (value.clone(), value.data_ptr()) for name, value in module.state_dict().items()}
    with pytest.raises(MemoryError), on_device([module], torch.device("cpu:0")):
        for name, value in module.state_dict().items():
            assert value.data_ptr() != home[name][1]
            value.add_(1)
        raise MemoryError
    for name, value in module.state_dict().items():
        assert torch.equal(value, home[name][0]) and value.data_ptr() == home[name][1]
    with on_device([module], torch.device("cpu")):  # which is there already
        assert all(value.data_ptr() == home[name][1] for name, value in module.state_dict().items())


def test_with_offload_the_encoders_are_on_the_device_only_where_they_are_used(train, script, monkeypatch):
    moved, uses, inside = [], [], []

    @contextlib.contextmanager
    def watched(modules, device):
        inside.append([type(module).__name__ for module in modules])
        with on_device(modules, device):
            yield
        uses.append(inside.pop())

    def to(self, *args, **options):
        moved.append(type(self).__name__)
        return original(self, *args, **options)

    def encode(function, *args):
        assert inside
        return function(*args)

    options = {"max_train_steps": 2, "validation_prompts": ["a"], "num_validation_images": 1}
    options |= {"validation_inference_steps": 1, "inversion_guidance_scale": 1.5, "learning_rate": 1e-3}
    plain = lora(train("plain", **options))
    original = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(script, "on_device", watched)
    monkeypatch.setattr(inversion_utils, "on_device", watched)
    for name in ("encode_images", "encode_prompts"):
        monkeypatch.setattr(script, name, partial(encode, getattr(script, name)))
    assert_same(lora(train("offload", offload=True, **options)), plain)
    assert not {"AutoencoderKL", "CLIPTextModel"} & set(moved[: moved.index("UNet2DConditionModel") + 1])
    with_vae = [names for names in uses if "AutoencoderKL" in names]
    assert len(with_vae) == 3 and all("CLIPTextModel" in names for names in with_vae)  # two batches and the pictures
    assert uses.count(["CLIPTextModel"]) == 2  # empty prompts, for guidance


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_sharding_is_refused(refused, no_models, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    message = refused()
    assert message.upper().startswith(f"{name} IS NOT SUPPORTED") and "examples/ddp.yaml" in message


def test_the_configuration_for_several_gpus(train, tiny_model, pairs_dir, tmp_path):
    """On two CPUs in place of GPUs: two processes with half the batch each take the steps of one."""
    options = {"max_train_steps": 3, "learning_rate": 1e-3, "report_to": "none"}
    one = train("one", train_batch_size=4, **options)
    options |= {"mixed_precision": "no", "train_batch_size": 2, "resolution": 32, "rank": 4}
    options |= {
        "pretrained_model_name_or_path": tiny_model,
        "train_data_dir": pairs_dir,
        "output_dir": tmp_path / "two",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "examples" / "ddp.yaml"]
    command = [*launcher, "--main_process_port", "0", ROOT / "train_inversion_dpo.py", *words]
    done = subprocess.run(list(map(str, command)), env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "updates of 4 pairs" in done.stderr
    assert_same(lora(tmp_path / "two"), lora(one), atol=2e-6)

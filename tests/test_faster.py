"""Options that make a run faster or smaller and must not change what it learns."""

import json
import shutil

import pytest
import torch
import torch._inductor.config
from diffusers import UNet2DConditionModel
from test_train_inversion_dpo import assert_same, logged, lora, spoil_losses


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
    options |= {"pretrained_model_name_or_path": small_unet, "lora_target_modules": ["to_q", "to_v"]}
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

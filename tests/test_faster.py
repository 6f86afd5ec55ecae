"""Options that make a run faster or smaller and must not change what it learns."""

import shutil

import pytest
import torch
from conftest import assert_same, logged, lora
from diffusers import UNet2DConditionModel

import training_utils
from training_utils import on_device

INPO = {"objective": "inpo", "inversion_steps": 2, "learning_rate": 1e-3, "max_train_steps": 3}


# Memory


class Saved:
    """A tensor that a graph keeps for its backward pass; counts the bytes of all that are alive."""

    alive = peak = 0

    def __init__(self, tensor):
        self.tensor, self.size = tensor, tensor.nbytes
        Saved.alive += self.size
        Saved.peak = max(Saved.peak, Saved.alive)

    def __del__(self):
        Saved.alive -= self.size


def peak_of(train, output, **options):
    Saved.alive = Saved.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        train(output, max_train_steps=1, inversion_steps=4, **options)
    return Saved.peak


def test_memory_is_flat_in_the_trajectory(train):
    """With a chunk of one timestep the graph of one is in memory, however many there are."""
    one = peak_of(train, "one", timesteps_per_pair=1)
    assert peak_of(train, "four", timesteps_per_pair=4, trajectory_chunk=1) < 1.05 * one
    assert peak_of(train, "whole", timesteps_per_pair=4) > 2.5 * one  # frozen weights are saved once


def test_checkpointing_is_around_the_policy_only(train, monkeypatch):
    """Where no gradient is wanted nothing is stored, so recomputing would be waste."""
    with_gradient, original = [], torch.utils.checkpoint.checkpoint

    def checkpoint(*args, **options):
        with_gradient.append(torch.is_grad_enabled())
        return original(*args, **options)

    plain = train("plain", **INPO)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", checkpoint)
    assert_same(lora(train("checkpointed", gradient_checkpointing=True, **INPO)), lora(plain), atol=1e-6)
    assert with_gradient and all(with_gradient)


def test_offloaded_modules_come_and_go(monkeypatch):
    """The weights at home are not touched, and are back also after an error. "cpu:0" stands for an accelerator."""
    monkeypatch.setattr(training_utils, "to_device", lambda tensor, device: tensor.clone())
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


def test_with_offload_the_encoders_stay_at_home_and_the_weights_are_the_same(train, monkeypatch):
    moved, original = [], torch.nn.Module.to

    def to(self, *args, **options):
        moved.append(type(self).__name__)
        return original(self, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    drawing = {"validation_prompts": ["a"], "num_validation_images": 1, "validation_inference_steps": 1}
    plain = lora(train("plain", **INPO, **drawing))
    assert {"AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel"} <= set(moved)
    moved.clear()
    assert_same(lora(train("offload", offload=True, **INPO, **drawing)), plain)
    assert "UNet2DConditionModel" in moved and not {"AutoencoderKL", "CLIPTextModel"} & set(moved)


# Speed


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


@pytest.mark.parametrize("options", [{}, {"objective": "diffusion_dpo"}, {"trajectory_chunk": 3}, "cached"], ids=str)
def test_a_step_waits_for_the_device_once(train, script, monkeypatch, tmp_path, options):
    """The metrics are read once per step, whatever the batches; everything else follows from the latents."""
    send, encode = script.send_to_device, training_utils.encode_images
    options = {"inversion_cache_dir": tmp_path / "cache", "cached_draws": 1} if options == "cached" else options
    if "inversion_cache_dir" in options:
        train("filling", max_train_steps=4, **options)

    def send_to_device(targets, *args, **rest):
        targets = send(targets, *args, **rest)
        return targets._replace(latents=targets.latents.as_subclass(OnDevice))

    monkeypatch.setattr(training_utils, "encode_images", lambda *args: encode(*args).as_subclass(OnDevice))
    monkeypatch.setattr(script, "send_to_device", send_to_device)
    OnDevice.reads.clear()
    train(max_train_steps=2, gradient_accumulation_steps=2, **options)
    assert OnDevice.reads == ["tolist"] * 2


@pytest.fixture
def small_unet(tiny_model, tmp_path):
    """The tiny model with a U-Net of one level, which takes seconds to trace."""
    folder = shutil.copytree(tiny_model, tmp_path / "small_unet")
    shutil.rmtree(folder / "unet")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=4, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=["CrossAttnDownBlock2D"], up_block_types=["UpBlock2D"], cross_attention_dim=16,
        mid_block_type=None,
    ).save_pretrained(folder / "unet")  # fmt: skip
    return folder


@pytest.mark.parametrize("reference", ["base", "init"])
def test_compiled_equals_eager_and_never_gives_up(train, small_unet, monkeypatch, tmp_path, reference):
    """Policy and reference, the last batch of the cache and the last chunk: each is compiled anew, whatever torch's
    limit was. Beyond it torch would run eagerly and say so in a warning only. No kernels are made here."""
    options = {"pretrained_model_name_or_path": small_unet, "lora_target_modules": ["to_q"], "cached_draws": 1}
    options |= {"trajectory_chunk": 3, "train_batch_size": 3, "max_train_steps": 3, "learning_rate": 1e-3}
    if reference == "init":
        lora_init = train("init", **{**options, "inversion_steps": 4, "max_train_steps": 1})
        options |= {"lora_init": lora_init, "reference": "init", "rank": None}
        del options["lora_target_modules"]
    eager = train("eager", inversion_cache_dir=tmp_path / "eager cache", **options)
    compile_blocks = UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(
        UNet2DConditionModel, "compile_repeated_blocks", lambda unet: compile_blocks(unet, backend="eager")
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = {"recompile_limit": 2, "accumulated_recompile_limit": 2, "fail_on_recompile_limit_hit": True}
    drawing = {"validation_prompts": ["a"], "num_validation_images": 1, "validation_inference_steps": 1}
    with torch._dynamo.config.patch(config):
        compiled = train("compiled", compile=True, inversion_cache_dir=tmp_path / "cache", **options, **drawing)
    assert_same(lora(compiled), lora(eager), atol=1e-6)
    counters = torch._dynamo.utils.counters
    assert 2 < counters["stats"]["unique_graphs"] <= 8 and not counters["graph_break"]
    torch._dynamo.reset()


def test_the_fused_optimizer_takes_the_same_steps(train, monkeypatch):
    fused = train("fused", **INPO)
    original, seen = torch.optim.AdamW, []

    def adamw(*args, fused, **options):
        seen.append(fused)
        return original(*args, **options)

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    plain = train("plain", **INPO)
    assert seen == [True]
    assert_same(lora(fused), lora(plain), atol=5e-6)


def test_8_bit_adam_learns_nearly_the_same_and_is_resumed(train):
    options = {**INPO, "rank": 256, "max_train_steps": 4, "checkpointing_steps": 2}  # small tensors keep 32 bits
    plain, small = (train(f"{bits} bits", use_8bit_adam=bits == 8 or None, **options) for bits in (32, 8))
    optimizer = torch.load(small / "checkpoint-2" / "optimizer.bin", weights_only=True)
    assert "torch.uint8" in repr(optimizer["state"])
    margins = [logged(folder, "rewards/margins")[-1] for folder in (plain, small)]
    assert abs(margins[0]) > 0.01 and margins[1] == pytest.approx(margins[0], rel=0.2)
    shutil.copytree(small / "checkpoint-2", small.with_name("resumed") / "checkpoint-2")
    resumed = train("resumed", use_8bit_adam=True, resume_from_checkpoint="latest", **options)
    assert_same(lora(resumed), lora(small))

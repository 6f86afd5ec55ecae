"""The estimate of memory: on real tensors the same bytes as on fake ones, and the script's own peak beside it."""

import contextlib
import json
from functools import cache, partial
from pathlib import Path

import estimate_memory
import pytest
import torch
import torch.nn.functional as F
from estimate_memory import (
    FAMILIES,
    GIB,
    VAE,
    LiveBytes,
    adam_8bit_bytes,
    adam_bytes,
    along_a_line,
    build_unet,
    count_parts,
    encode_memory,
    estimate,
    materialize,
    num_parameters,
    policy_memory,
    set_checkpointing,
    smallest_card,
    train_steps,
    trainable,
    until_out_of_memory,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from train_small_world import make_unet, make_vae

import train_inversion_dpo

MODEL = Path(estimate_memory.__file__).parent / "small_world_model"
CONFIG = {name: value for name, value in make_unet().config.items() if not name.startswith("_")}
SMALL = FAMILIES["sd15"]._replace(unet=CONFIG)
TINY = SMALL._replace(  # goes through more quickly
    unet=CONFIG
    | {"block_out_channels": (32,), "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D"]}
)
RESOLUTION, LATENTS = 64, 2


def build_real(family, checkpointing=False, weight_dtype=torch.float32):
    torch.manual_seed(0)
    unet = materialize(build_unet(family, 4, weight_dtype), "cpu")
    set_checkpointing(unet, checkpointing)
    for part in unet.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return unet


def fake_memory(family, num_latents=LATENTS, checkpointing=False, weight_dtype=torch.float32):
    unet = build_unet(family, 4, weight_dtype)
    set_checkpointing(unet, checkpointing)
    with FakeTensorMode():
        return policy_memory(materialize(unet, "cpu"), num_latents, RESOLUTION, weight_dtype)


@cache
def tiny_memory(num_latents=LATENTS, checkpointing=False):
    return fake_memory(TINY, num_latents, checkpointing)


@pytest.mark.parametrize(
    "family, unet, text_encoders",
    [("sd15", 859_520_964, 123_060_480), ("sdxl", 2_567_463_684, 123_060_480 + 694_659_840)],
)
def test_parameters_are_those_of_the_published_models(family, unet, text_encoders):
    parts = count_parts(FAMILIES[family], 4, torch.bfloat16)
    assert parts["U-Net"] == (unet, 2 * unet)
    assert parts["text encoders"] == (text_encoders, 2 * text_encoders)
    assert parts["VAE"] == (83_653_863, (4 if family == "sdxl" else 2) * 83_653_863)


def test_the_lora_grows_linearly_with_its_rank():
    ranks = {rank: num_parameters(build_unet(SMALL, rank, torch.float32), True) for rank in (1, 2, 16)}
    assert ranks[1] > 0 and ranks[2] == 2 * ranks[1] and ranks[16] == 16 * ranks[1]


def test_optimizer_states_are_those_of_the_optimizers():
    parameters = [torch.nn.Parameter(torch.ones(*shape)) for shape in ((16, 320), (4, 320), (5, 1000))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if x.numel() > 1]
    assert adam_bytes(parameters) == sum(x.nbytes for x in states)

    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    optimizer.step()
    names = ("state1", "state2", "absmax1", "absmax2")
    states = [state[name] for state in optimizer.state.values() for name in names if name in state]
    assert adam_8bit_bytes(parameters) == sum(x.nbytes for x in states) < adam_bytes(parameters)


def test_live_bytes_worked_by_hand():
    before = torch.ones(1000)
    with LiveBytes() as memory:
        before.mul_(2)
        before.view(10, 100)
        assert memory.live == 0
        one = before + 1
        view = one[:10]
        two = one * 2
        del one
        assert memory.live == 8000  # by its view, all of it stays
        del view
        assert memory.live == 4000 and memory.peak == 8000
        two.add_(1)
    assert memory.peak == 8000


@pytest.mark.parametrize(
    "family, checkpointing, weight_dtype",
    [
        (SMALL, True, torch.float32),
        (SMALL, False, torch.bfloat16),
        (TINY, False, torch.float32),
        (TINY, True, torch.bfloat16),
    ],
    ids=["float32-checkpointing", "bfloat16", "tiny-float32", "tiny-bfloat16-checkpointing"],
)
def test_fake_tensors_need_the_same_bytes_as_real_ones(family, checkpointing, weight_dtype):
    real = policy_memory(build_real(family, checkpointing, weight_dtype), LATENTS, RESOLUTION, weight_dtype)
    assert fake_memory(family, LATENTS, checkpointing, weight_dtype) == real
    assert 0 < real[0] < real[1]


def test_encoding_needs_the_same_on_fake_tensors_as_on_real_ones():
    with FakeTensorMode():
        fake = encode_memory(make_vae(), 4, 64, 8)
    assert fake == encode_memory(make_vae(), 4, 64, 8) > 4 * 8 * 64 * 64 * 4  # a first feature map at least
    assert encode_memory(make_vae(), 4, 64, 1) < 0.4 * fake


def test_norms_under_autocast_are_followed_as_cuda_has_them(monkeypatch):
    with estimate_memory.autocast_as_on_cuda(torch.bfloat16) as autocast:
        x, weight = torch.ones(1, 4, 2, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
        assert F.group_norm(x, 2, weight, bias=weight).dtype == torch.bfloat16
        with autocast():
            assert F.group_norm(x, 2, weight, bias=weight).dtype == torch.float32
            assert F.layer_norm(x, (2,)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert F.group_norm(x, 2, weight).dtype == torch.bfloat16  # restored
    as_on_cuda = fake_memory(TINY, weight_dtype=torch.bfloat16)[0]
    monkeypatch.setattr(estimate_memory.mock.patch, "multiple", lambda *args, **kwargs: contextlib.nullcontext())
    assert fake_memory(TINY, weight_dtype=torch.bfloat16)[0] < 0.9 * as_on_cuda  # as on a CPU


def test_attention_keeps_what_efficient_kernels_keep():
    """Query, key, value, output and log-sum-exp; the meta device by itself would keep the matrix."""

    def kept(device):
        q, k, v = (torch.ones(1, 2, 64, 8, device=device, requires_grad=True) for _ in range(3))
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(id(x), x), lambda x: x):
            F.scaled_dot_product_attention(q, k, v)
        return sum(x.untyped_storage().nbytes() for x in saved.values())

    with FakeTensorMode():
        assert kept("cpu") == 4 * 2 * 64 * (4 * 8 + 1)
    assert kept("meta") > 4 * 2 * 64 * 64


def test_checkpointing_and_smaller_chunks_need_less():
    for index in (0, 1):  # kept, and the peak
        assert 1.5 * tiny_memory(checkpointing=True)[index] < tiny_memory()[index]
        for checkpointing in (False, True):
            chunk_1, chunk_4 = (tiny_memory(n, checkpointing=checkpointing)[index] for n in (2, 8))
            assert 3 * chunk_1 < chunk_4 <= 4 * chunk_1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_kept_lies_on_the_line_and_the_peak_not_above(checkpointing):
    kept, peak = tiny_memory(4, checkpointing=checkpointing)
    line = along_a_line(lambda n: tiny_memory(n, checkpointing=checkpointing), [2, 4, 8])
    assert line[2] == tiny_memory(2, checkpointing=checkpointing)
    assert line[4][0] == pytest.approx(kept, rel=1e-4)
    assert peak <= line[4][1] < 1.02 * peak


def test_the_smallest_card_worked_by_hand():
    assert smallest_card(10 * GIB) == 12 and smallest_card(10.01 * GIB) == 24
    assert smallest_card(71 * GIB) == 80 and smallest_card(72 * GIB) is None


def test_sdxl_conditioning_reaches_its_unet():
    """A small U-Net of SDXL's kind goes through forward and backward."""
    config = FAMILIES["sdxl"].unet | {
        "block_out_channels": (32, 32), "attention_head_dim": (2, 2), "transformer_layers_per_block": (1, 1),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1,
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    family = FAMILIES["sdxl"]._replace(unet=config)
    kept, peak = fake_memory(family, 2, True, torch.bfloat16)
    assert 0 < kept < peak


def test_a_step_needs_what_the_estimate_says():
    """Within 10 %: the policy's peak, gradients and the optimizer's states, in real steps that change the LoRA."""
    unet = build_real(TINY)
    lora = sum(parameter.nbytes for parameter in trainable(unet))
    _, policy = tiny_memory(2)
    before = [parameter.clone() for parameter in trainable(unet)]
    with LiveBytes() as memory:
        _, seconds = train_steps(unet, 1, 1, RESOLUTION, torch.float32, torch.device("cpu"), num_steps=2)
    assert memory.peak == pytest.approx(policy + 3 * lora, rel=0.1) and seconds > 0
    assert any(not torch.equal(*pair) for pair in zip(before, trainable(unet), strict=True))


def test_the_training_script_needs_what_the_estimate_says(train, monkeypatch):
    """On the shipped model: encoding to the byte but for the pixels, which lie on the CPU, the policy within 10 %."""
    peaks = {}

    def follow(name):
        function = getattr(train_inversion_dpo, name)

        def call(*args):
            with LiveBytes() as memory:
                result = function(*args)
            peaks[name] = memory.peak
            return result

        monkeypatch.setattr(train_inversion_dpo, name, call)

    follow("encode_images")
    follow("backward_in_chunks")
    train(
        pretrained_model_name_or_path=MODEL, resolution=RESOLUTION, train_batch_size=1, max_train_steps=1,
        trajectory_chunk=1, gradient_checkpointing=True, mixed_precision="no",
    )  # fmt: skip
    with FakeTensorMode():
        encode = encode_memory(make_vae(), 2, RESOLUTION, 8)
    assert peaks["encode_images"] == encode - 2 * 3 * RESOLUTION**2 * 4
    _, policy = fake_memory(SMALL, 2, True)
    assert peaks["backward_in_chunks"] == pytest.approx(policy, rel=0.1)


@pytest.fixture
def tiny_family(monkeypatch):
    """The tiny U-Net, with a VAE as small, where families are looked up."""
    monkeypatch.setitem(FAMILIES, "tiny", TINY)
    for name in ("block_out_channels", "layers_per_block", "norm_num_groups"):
        monkeypatch.setitem(VAE, name, make_vae().config[name])
    return TINY


def test_the_sum_is_the_parts_and_the_larger_of_policy_and_encode(tiny_family):
    parts, rows = estimate(tiny_family, [64], [2], [1], 4, torch.float32)
    assert len(rows) == 2 and {row["checkpointing"] for row in rows} == {False, True}
    resident = sum(size for name, (_, size) in parts.items() if name != "AdamW, 8-bit")
    for row in rows:
        assert row["sum"] - resident == max(row["policy"], row["encode"])
        assert row["fits"] == smallest_card(row["sum"])


def test_main_prints_and_writes_the_same_figures(tiny_family, tmp_path, capsys):
    output = tmp_path / "figures.json"
    options = ["--model", "tiny", "--resolution", "64", "--train_batch_size", "1", "--output", str(output)]
    estimate_memory.main(estimate_memory.parse_args([*options, "--trajectory_chunk", "1"]))
    figures, lines = json.loads(output.read_text()), capsys.readouterr().out.splitlines()
    assert len(figures["settings"]) == 2 == sum(line.startswith("| 64 | 1 | 1 |") for line in lines)
    assert f"| U-Net | {figures['parts']['U-Net'][0]:,} | {figures['parts']['U-Net'][1] / GIB:.2f} |" in lines


def test_batches_double_until_memory_is_out():
    def run(batch_size, limit):
        if batch_size > limit:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return -batch_size

    for limit, reached in ((0, []), (1, [1]), (5, [1, 2, 4])):
        assert list(until_out_of_memory(partial(run, limit=limit))) == [(n, -n) for n in reached]
    with pytest.raises(ZeroDivisionError):  # anything else is not caught
        list(until_out_of_memory(lambda batch_size: 1 / 0))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of the resident set from Linux")
def test_the_gpu_mode_runs_on_a_cpu(tiny_family, monkeypatch, capsys):
    def limited(unet, batch_size, **options):
        if batch_size > 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return train_steps(unet, batch_size, **options, num_steps=1)

    args = estimate_memory.parse_args(["--model", "tiny", "--resolution", "16", "--trajectory_chunk", "2"])
    monkeypatch.setattr(estimate_memory, "train_steps", limited)
    rows = estimate_memory.train(args, tiny_family, torch.float32, torch.device("cpu"))
    settings = [(row["checkpointing"], row["chunk"], row["pairs"]) for row in rows]
    assert settings == [(True, 2, 1), (False, 2, 1)]
    assert all(row["seconds"] > 0 and 0 < row["estimated"] < row["peak"] for row in rows)  # a process is larger
    assert capsys.readouterr().out.count("| 16 | 1 |") == len(rows)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resolution", "500"], "--resolution is 500; allowed: multiples of 8"),
        (["--resolution", "0"], "--resolution is 0"),
        (["--train_batch_size", "0"], "--train_batch_size: is 0; allowed: at least 1"),
        (["--trajectory_chunk", "0"], "--trajectory_chunk: is 0"),
        (["--vae_encode_batch_size", "0"], "--vae_encode_batch_size: is 0"),
        (["--rank", "0"], "--rank: is 0"),
        (["--model", "sd3"], "sd15"),
        (["--mixed_precision", "fp8"], "bf16"),
        (["--output", "nowhere/figures.json"], "--output nowhere/figures.json: no such folder"),
        (["--train", "--train_batch_size", "2"], "--train_batch_size goes without --train"),
        (["--train"], "--train needs a GPU"),
    ],
)
def test_wrong_options_end_with_2_and_one_line(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        estimate_memory.parse_args(options)
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_chunks_of_the_gpu_mode_are_at_most_its_timesteps(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert estimate_memory.parse_args(["--train"]).resolution == [1024]
    with pytest.raises(SystemExit) as ended:
        estimate_memory.parse_args(["--train", "--trajectory_chunk", "8"])
    assert ended.value.code == 2 and "allowed with --train are 1 to 4" in capsys.readouterr().err

"""Say before a GPU is rented what a training step will need of its memory, for SD 1.5 and SDXL, without weights.

    python examples/estimate_memory.py --model sdxl
    python examples/estimate_memory.py --model sd15 --resolution 512 --train_batch_size 1 8 --trajectory_chunk 1 4 8

Runs on a CPU, in minutes and little memory: models in their real shapes but without values (on the meta device, and in
PyTorch's FakeTensorMode) go through the training script's own functions, forward and backward.

Counted from these models: parameters, and the bytes of frozen weights, LoRA, gradients and optimizer states. Measured
by going through the step:

    kept     what the policy's forward leaves for its backward: every storage that autograd saved, once, no weights
    policy   the most that is alive at once in that forward and backward. Under gradient checkpointing this holds the
             stored inputs of the blocks and the recomputed inside of the block that is at work
    encode   the most that is alive at once while the VAE encodes a batch, --vae_encode_batch_size images at a time

The sum is weights, LoRA, gradients, AdamW's states in float32, and the larger of policy and encode. Kept and policy
are measured at the fewest and the most latents asked for, and read off a straight line in between: kept lies on it,
policy, as the largest of several straight lines, on or below it.

Where a CPU differs from a GPU, the GPU is followed. Under fp16 and bf16, group and layer norm compute in float32, as
CUDA's autocast has it, which keeps float32 copies of their inputs and outputs. Attention keeps query, key, value,
output and log-sum-exp, as the flash and memory-efficient kernels do; meta tensors by themselves would take the path
that keeps the whole attention matrix, in float32 and more than once.

Estimated, not measured: everything below PyTorch's tensors, which is CUDA itself, workspaces of kernels and libraries
and fragments in the allocator. For these, "fits in" wants a tenth of the sum and 1 GiB more than the sum. Text
encoders count by their weights; validation pictures and data-parallel buckets of gradients do not count.

    python examples/estimate_memory.py --model sdxl --train

needs a GPU: it takes real steps with random weights there (the reference inverts, the policy learns, AdamW steps),
from one pair doubling until memory is out, and prints the measured peak beside the estimated one, and the seconds. Its
steps are tested on a CPU with a small U-Net; **it has not been run on a GPU yet**.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import sys
import time
import weakref
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from inversion_utils import (  # noqa: E402
    add_lora,
    backward_in_chunks,
    encode_images,
    invert,
    number,
    prediction_error,
    preference_loss,
    reference_policy,
    sample_timesteps,
)
from train_inversion_dpo import predict_noise  # noqa: E402

GIB = 2**30
CARDS = (12, 24, 80)  # GiB
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NUM_TOKENS = 77
NUM_TARGETS = 4  # the script's default timesteps_per_pair for inversion_dpo

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


class Family(NamedTuple):
    """A model family's shapes.

    Attributes:
        resolution: pixels of a side that it was made for.
        unet: arguments of `UNet2DConditionModel`.
        text_encoders: (class, arguments of `CLIPTextConfig`) each.
        has_float32_vae: whether its VAE breaks in half precision and stays in float32.
    """

    resolution: int
    unet: dict[str, Any]
    text_encoders: list[tuple[type, dict[str, int]]]
    has_float32_vae: bool


FAMILIES = {
    "sd15": Family(512, {"sample_size": 64, "cross_attention_dim": 768}, [(CLIPTextModel, CLIP_L)], False),
    "sdxl": Family(
        1024,
        {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        [(CLIPTextModel, CLIP_L), (CLIPTextModelWithProjection, CLIP_G)],
        True,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    count = number(int, least=1)
    add = parser.add_argument
    add("--model", choices=FAMILIES, default="sdxl", help="Model family")
    add("--resolution", type=int, nargs="+", help="Pixels of a side (512 1024; with --train the family's own)")
    add("--train_batch_size", type=count, nargs="+", help="Pairs per process and forward (1 2 4)")
    add("--trajectory_chunk", type=count, nargs="+", default=[1, 4], help="Timesteps per policy call")
    add("--vae_encode_batch_size", type=count, default=8, help="Images per VAE call")
    add("--rank", type=count, default=16, help="Rank of the LoRA")
    add("--mixed_precision", choices=DTYPES, default="bf16")
    add("--train", action="store_true", help="Take real steps on a GPU instead, and compare")
    add("--output", help="Also write the figures to this file, as JSON")
    args = parser.parse_args(argv)
    for resolution in args.resolution or []:
        if resolution < 8 or resolution % 8:
            parser.error(f"--resolution is {resolution}; allowed: multiples of 8, the VAE's factor")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    if args.train and args.train_batch_size:
        parser.error("--train_batch_size goes without --train, which finds the largest by itself")
    if args.train and not torch.cuda.is_available():
        parser.error("--train needs a GPU, which this machine does not have")
    if args.train and max(args.trajectory_chunk) > NUM_TARGETS:
        parser.error(f"--trajectory_chunk: allowed with --train are 1 to {NUM_TARGETS}, the timesteps of its pairs")
    args.resolution = args.resolution or ([FAMILIES[args.model].resolution] if args.train else [512, 1024])
    args.train_batch_size = args.train_batch_size or [1, 2, 4]
    return args


# 1  Models without data, and what their weights take


def build_unet(family, rank, weight_dtype):
    """Returns the U-Net with its LoRA as the training script makes them, on the meta device."""
    with torch.device("meta"):
        unet = torch.nn.Module.to(UNet2DConditionModel(**family.unet), weight_dtype)
        add_lora(unet, rank, rank)
    return unet.train()


def materialize(module, device):
    """Puts a module from the meta device on another, without values; within `FakeTensorMode` it takes no memory."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            setattr(part, name, torch.nn.Parameter(empty, requires_grad=weight.requires_grad))
    return module


def set_checkpointing(unet, enabled):
    (unet.enable_gradient_checkpointing if enabled else unet.disable_gradient_checkpointing)()


def build_text_encoders(family):
    with torch.device("meta"):
        return [kind(CLIPTextConfig(**config)) for kind, config in family.text_encoders]


def build_vae(weight_dtype):
    with torch.device("meta"):
        return torch.nn.Module.to(AutoencoderKL(**VAE), weight_dtype).requires_grad_(False).eval()


def trainable(unet):
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def num_parameters(module, requires_grad=None):
    return sum(p.numel() for p in module.parameters() if requires_grad in (None, p.requires_grad))


def adam_bytes(parameters):
    """Bytes of AdamW's mean and variance, in float32."""
    return sum(2 * 4 * parameter.numel() for parameter in parameters)


def adam_8bit_bytes(parameters):
    """Bytes of the states of bitsandbytes' AdamW8bit: tensors below 4096 elements stay in float32.

    The others take one byte a value and a float32 scale for every 256.
    """
    return sum(2 * (n + 4 * math.ceil(n / 256)) if n >= 4096 else 2 * 4 * n for n in (p.numel() for p in parameters))


def count_parts(family, rank, weight_dtype):
    """Returns, for what stays in memory, {name: (parameters, bytes)}."""
    unet, size = build_unet(family, rank, weight_dtype), weight_dtype.itemsize
    frozen, lora = num_parameters(unet, False), num_parameters(unet, True)
    vae = num_parameters(build_vae(weight_dtype))
    text_encoders = sum(map(num_parameters, build_text_encoders(family)))
    return {
        "U-Net": (frozen, frozen * size),
        "VAE": (vae, vae * (4 if family.has_float32_vae else size)),
        "text encoders": (text_encoders, text_encoders * size),
        "LoRA, float32": (lora, lora * 4),
        "gradients": (lora, lora * 4),
        "AdamW": (2 * lora, adam_bytes(trainable(unet))),
        "AdamW, 8-bit": (2 * lora, adam_8bit_bytes(trainable(unet))),
    }


# 2  What a step keeps and needs


def storages(*trees):
    return [x.untyped_storage() for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """Follows the memory of tensors that are made within it, and only of those.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at once.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in storages(args, kwargs):  # made before: not ours
            self._seen.setdefault(storage, True)
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage not in self._seen:
                self._seen[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)


@contextlib.contextmanager
def autocast_as_on_cuda(weight_dtype):
    """A CPU's autocast with the entries of CUDA's that a U-Net meets and a CPU's lacks: norms compute in float32.

    The norms stay replaced over a backward within it, whose checkpointed blocks run again; autocast is to be entered
    anew, by the yielded callable, for the forward alone, as in training.
    """

    def in_float32(norm):
        def call(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                args = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
                kwargs = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
            return norm(*args, **kwargs)

        return call

    with mock.patch.multiple(F, group_norm=in_float32(F.group_norm), layer_norm=in_float32(F.layer_norm)):
        yield lambda: autocast("cpu", weight_dtype)


def autocast(device_type, weight_dtype):
    if weight_dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type, weight_dtype)


def random_cond(unet, num_latents, weight_dtype, device):
    """Returns a conditioning of the shapes that the U-Net takes."""
    shape = (num_latents, NUM_TOKENS, unet.config.cross_attention_dim)
    cond = {"encoder_hidden_states": torch.randn(shape, dtype=weight_dtype, device=device)}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        cond["added_cond_kwargs"] = {
            "text_embeds": torch.randn(num_latents, pooled, dtype=weight_dtype, device=device),
            "time_ids": torch.randn(num_latents, 6, device=device),
        }
    return cond


def policy_memory(unet, num_latents, resolution, weight_dtype):
    """Returns the bytes that the policy's forward keeps for its backward, and the peak of both, without weights.

    The gradients exist before, as in all batches of an accumulated update but the first.

    Args:
        unet: with its LoRA and, if wanted, gradient checkpointing; of real tensors on the CPU or, within
            `FakeTensorMode`, of fake ones, for which the result is the same.
        num_latents: 2 x pairs x timesteps of a policy call.
        resolution: pixels of a side.
        weight_dtype: of the frozen weights and of autocast.
    """
    shape = (num_latents, unet.config.in_channels, resolution // 8, resolution // 8)
    x_t, noise, timesteps = torch.randn(shape), torch.randn(shape), torch.randint(0, 1000, shape[:1])
    cond = random_cond(unet, num_latents, weight_dtype, "cpu")
    for parameter in trainable(unet):
        parameter.grad = torch.zeros_like(parameter)
    weights = {id(storage): storage for storage in storages(list(unet.parameters()))}
    kept = WeakIdKeyDictionary()  # forgets what a discarded graph had saved

    def keep(tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            kept[storage] = storage.nbytes()
        return tensor

    with LiveBytes() as memory, autocast_as_on_cuda(weight_dtype) as autocast_forward:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with autocast_forward():
                predicted = predict_noise(unet, x_t, timesteps, cond, None, "epsilon", weight_dtype)
            loss = prediction_error(predicted, noise).sum()
        del predicted
        kept_bytes = sum(kept.values())
        loss.backward()
    return kept_bytes, memory.peak


def encode_memory(vae, num_images, resolution, batch_size):
    """Returns the peak bytes of encoding images with the VAE, `batch_size` at a time, without its weights."""
    with LiveBytes() as memory:
        encode_images(vae, torch.randn(num_images, 3, resolution, resolution), batch_size)
    return memory.peak


def smallest_card(size):
    """Returns the GiB of the smallest card that takes `size` bytes, a tenth of them and 1 GiB more, or None."""
    return next((card for card in CARDS if 1.1 * size + GIB <= card * GIB), None)


def along_a_line(measure, sizes):
    """Returns {size: measure(size)} measured at the ends of `sizes`, with tuples of numbers on a line between."""
    low, high = min(sizes), max(sizes)
    ends = {size: measure(size) for size in {low, high}}
    share = {size: (size - low) / max(1, high - low) for size in sizes}
    return {
        size: tuple(
            math.ceil(a + share[size] * (b - a)) for a, b in zip(ends[low], ends[high], strict=True)
        )
        for size in sizes
    }  # fmt: skip


def estimate(family, resolutions, batch_sizes, chunks, rank, weight_dtype, vae_encode_batch_size=8, report=print):
    """Returns the parts of `count_parts` and a row for each setting."""
    parts = count_parts(family, rank, weight_dtype)
    resident = sum(size for name, (_, size) in parts.items() if name != "AdamW, 8-bit")
    sizes = sorted({2 * batch_size * chunk for batch_size in batch_sizes for chunk in chunks})
    unet = build_unet(family, rank, weight_dtype)
    vae = build_vae(torch.float32 if family.has_float32_vae else weight_dtype)
    rows = []
    with FakeTensorMode():
        materialize(unet, "cpu")
        materialize(vae, "cpu")
        for resolution in resolutions:
            encode = {size: encode_memory(vae, 2 * size, resolution, vae_encode_batch_size) for size in batch_sizes}
            for checkpointing in (False, True):
                report(f"going through {resolution} px, {'with' if checkpointing else 'without'} checkpointing")
                set_checkpointing(unet, checkpointing)
                policy = along_a_line(lambda n, px=resolution: policy_memory(unet, n, px, weight_dtype), sizes)
                for batch_size in batch_sizes:
                    for chunk in chunks:
                        kept, peak = policy[2 * batch_size * chunk]
                        total = resident + max(peak, encode[batch_size])
                        rows.append({
                            "resolution": resolution, "pairs": batch_size, "chunk": chunk,
                            "checkpointing": checkpointing, "kept": kept, "policy": peak,
                            "encode": encode[batch_size], "sum": total, "fits": smallest_card(total),
                        })  # fmt: skip
    return parts, rows


def print_estimate(args, parts, rows):
    print(f"{args.model}, LoRA of rank {args.rank}, mixed precision {args.mixed_precision}\n")
    print("| part | values | GiB |")
    print("|---|---|---|")
    for name, (values, size) in parts.items():
        print(f"| {name} | {values:,} | {size / GIB:.2f} |")
    print("\nIn GiB; sum: all parts but the 8-bit states, and the larger of policy and encode\n")
    print("| pixels | pairs | trajectory_chunk | gradient checkpointing | kept | policy | encode | sum | fits in |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        figures = " | ".join(f"{row[name] / GIB:.2f}" for name in ("kept", "policy", "encode", "sum"))
        print(
            f"| {row['resolution']} | {row['pairs']} | {row['chunk']} | {'yes' if row['checkpointing'] else 'no'} "
            f"| {figures} | {row['fits'] or 'none of these'} |"
        )
    print(f"\nFits in: of {', '.join(map(str, CARDS))} GiB the smallest with room for 1.1 times the sum and 1 GiB.")


# 3  Real steps


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, for which the next measured would have to pay
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak resident set starts anew


def peak_memory():
    """Peak memory in GiB since the last reset: of the GPU, or else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def train_steps(unet, batch_size, chunk, resolution, weight_dtype, device, num_steps=3):
    """Takes steps as the training script does from latents on; returns peak GiB and the fastest step's seconds.

    The reference inverts to the targets in n = M + 4 steps, the policy learns from them chunk by chunk, AdamW steps.
    fp16 goes without loss scaling, which changes neither memory nor time.
    """
    parameters = trainable(unet)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    optimizer.zero_grad()  # what a step that ran out of memory has left
    abar = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    num_latents, side = 2 * batch_size, resolution // 8
    latents = torch.randn(num_latents, unet.config.in_channels, side, side, device=device)
    cond = random_cond(unet, num_latents, weight_dtype, device)
    chunks = [slice(m, m + chunk) for m in range(0, NUM_TARGETS, chunk)]

    def predict(x_t, timesteps):
        repeats = len(x_t) // num_latents
        repeated = tree_map(lambda x: x.repeat(repeats, *[1] * (x.ndim - 1)), cond)
        with autocast(device.type, weight_dtype):
            return predict_noise(unet, x_t, timesteps, repeated, None, "epsilon", weight_dtype)

    reset_peak_memory()
    seconds = []
    for _ in range(num_steps):
        synchronize()
        started = time.perf_counter()
        timesteps = sample_timesteps(torch.rand(NUM_TARGETS, batch_size), 0, 999).repeat(1, 2)
        with reference_policy(unet):
            trajectory = invert(predict, latents, timesteps, abar, NUM_TARGETS + 4, predict_at_targets=True)
        reference_error = prediction_error(trajectory.predicted, trajectory.noise).mean(0)

        def policy_error(chunk, trajectory=trajectory):
            x_t, noise = trajectory.latents[chunk], trajectory.noise[chunk]
            predicted = predict(x_t.flatten(0, 1), trajectory.timesteps[chunk].flatten())
            return prediction_error(predicted.view_as(noise), noise)

        def loss_of(error, reference_error=reference_error):
            return preference_loss(error.mean(0), reference_error, 2000.0)[0].mean()

        backward_in_chunks([partial(policy_error, chunk) for chunk in chunks], loss_of, torch.Tensor.backward)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return peak_memory(), min(seconds)


def until_out_of_memory(run):
    """Yields (batch_size, run(batch_size)) for batches of 1, 2, 4, ... until the GPU's memory does not suffice."""
    batch_size = 1
    while True:
        try:
            result = run(batch_size)
        except torch.cuda.OutOfMemoryError:
            return
        yield batch_size, result
        batch_size *= 2


def estimated_peak(family, batch_size, chunk, resolution, checkpointing, rank, weight_dtype):
    """Returns what `train_steps` should need, in GiB: the estimate without VAE and text encoders."""
    unet = build_unet(family, rank, weight_dtype)
    set_checkpointing(unet, checkpointing)
    weights = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in unet.parameters())
    with FakeTensorMode():
        _, policy = policy_memory(materialize(unet, "cpu"), 2 * batch_size * chunk, resolution, weight_dtype)
    return (weights + policy) / GIB


def train(args, family, weight_dtype, device):
    """Prints and returns, for each setting that the GPU's memory allows, measured and estimated peak and seconds."""
    unet = materialize(build_unet(family, args.rank, weight_dtype), device)
    for part in unet.modules():
        if hasattr(part, "reset_parameters"):  # random values
            part.reset_parameters()
    print(f"{args.model}, LoRA of rank {args.rank}, mixed precision {args.mixed_precision}; U-Net alone, in GiB\n")
    print("| pixels | pairs | trajectory_chunk | gradient checkpointing | peak | estimated | seconds a step |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for resolution, checkpointing, chunk in product(args.resolution, (True, False), args.trajectory_chunk):
        set_checkpointing(unet, checkpointing)
        run = partial(
            train_steps, unet, chunk=chunk, resolution=resolution, weight_dtype=weight_dtype, device=device
        )  # fmt: skip
        for batch_size, (peak, seconds) in until_out_of_memory(run):
            estimated = estimated_peak(family, batch_size, chunk, resolution, checkpointing, args.rank, weight_dtype)
            rows.append({
                "resolution": resolution, "pairs": batch_size, "chunk": chunk, "checkpointing": checkpointing,
                "peak": peak, "estimated": estimated, "seconds": seconds,
            })  # fmt: skip
            print(
                f"| {resolution} | {batch_size} | {chunk} | {'yes' if checkpointing else 'no'} | {peak:.2f} "
                f"| {estimated:.2f} | {seconds:.2f} |",
                flush=True,
            )
        torch.cuda.empty_cache()
    return rows


def main(args):
    family, weight_dtype = FAMILIES[args.model], DTYPES[args.mixed_precision]
    if args.train:
        figures = {"steps": train(args, family, weight_dtype, torch.device("cuda"))}
    else:
        parts, rows = estimate(
            family, args.resolution, args.train_batch_size, args.trajectory_chunk, args.rank, weight_dtype,
            args.vae_encode_batch_size, partial(print, file=sys.stderr, flush=True),
        )  # fmt: skip
        print_estimate(args, parts, rows)
        figures = {"parts": parts, "settings": rows}
    if args.output:
        Path(args.output).write_text(json.dumps({**vars(args), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())

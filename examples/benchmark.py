"""Measure what a training step costs, for each method, in one run: seconds, memory, model calls, share of its floor.

    python examples/benchmark.py --model tiny
    python examples/benchmark.py --model sd15 --resolution 256
    python examples/benchmark.py --model sdxl --mixed_precision bf16

Runs the real training script on a model with random weights, method after method, round after round, so that a busy
machine slows all alike; the fastest step of each counts, the median stands beside it in the JSON. Two rivals run in a
loop of their own, on the same models, batches and optimizer, made of the script's own functions:

    published_inpo           DDIM-InPO's released step: the policy inverts without guidance, with eta 0.1, in
                             --inpo_steps calls, then policy and reference at one timestep a pair
    published_inversion_dpo  Inversion-DPO's released step: the reference inverts with guidance 2, then policy and
                             reference at all --inversion_dpo_steps nodes, guided again, with all graphs of the
                             policy kept until one backward; the text is encoded four times

The second is timed, not trained: where policy and reference are equal, as at the start, its gradient is exactly zero.
Both put winner and loser, conditional and unconditional into one call, as our objectives do.

The cached methods read from the disk what was computed before, and have neither text encoder nor VAE in memory.

Two floors tell how much of a step could not be saved. The FLOP floor: the floating-point operations of the model calls
that a method needs, forward and backward, counted, at the rate that a plain matrix product reaches on this device, in
the run's precision, in the same run. (A call that is made twice to save memory is needed once.) The call floor: every
model call that the step makes, at the fastest time of that call made by itself. Overhead is what is neither U-Net,
VAE, text encoder, backward nor optimizer, in one more step whose parts are timed apart.
"""

import argparse
import gc
import io
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from estimate_memory import DTYPES, FAMILIES, VAE, peak_memory, reset_peak_memory, synchronize
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from train_small_world import make_text_encoder, make_tokenizer, make_unet, make_vae
from transformers import CLIPTextConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_inversion_dpo  # noqa: E402
import train_inversion_dpo_sdxl  # noqa: E402
from inversion_utils import (  # noqa: E402
    PreferenceDataset,
    VisitBatches,
    add_lora,
    alpha_sigma,
    map_condition,
    number,
    prediction_error,
    preference_loss,
    reference_policy,
    sample_timesteps,
    versions,
)

RESOLUTIONS = {"tiny": 64, **{name: family.resolution for name, family in FAMILIES.items()}}
CALLS = ("predict_noise", "encode_images", "encode_prompts")  # the script's functions that call a model
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's counter does not know
CPU_ATTENTION_FLOPS = {
    CPU_ATTENTION: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *args, **kwargs: sdpa_backward_flop_count(grad, q, k, v),
}  # fmt: skip


def default_methods():
    return [name for name in METHODS if name not in ON_REQUEST]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    count = number(int, least=1)
    add = parser.add_argument
    add("--model", choices=RESOLUTIONS, default="tiny", help="Size of the random model")
    add("--resolution", type=int, help="Pixels of a side (64 for tiny, 512 for sd15, 1024 for sdxl)")
    add("--train_batch_size", type=count, default=1, help="Pairs a step")
    add("--mixed_precision", default="no", choices=DTYPES)
    add("--rounds", type=count, default=3, help="More: less noise")
    add("--steps", type=count, default=2, help="Measured steps per round and method")
    add(
        "--methods", nargs="+", choices=METHODS, default=default_methods(),
        help="Rows of the table; all but the compiled ones if not given",
    )  # fmt: skip
    add("--inpo_steps", type=count, default=10, help="Calls of the inversion in published_inpo; its authors take 10")
    add(
        "--inversion_dpo_steps", type=count, default=40,
        help="Nodes of published_inversion_dpo, whose graphs are all in memory (its code has 40, its script 80), and "
        "of two rows of ours: inverting as many, four of them trained, and training all",
    )  # fmt: skip
    add("--output", help="Also write the figures to this new file, as JSON")
    args = parser.parse_args(argv)
    args.resolution = RESOLUTIONS[args.model] if args.resolution is None else args.resolution
    if args.resolution < 8 or args.resolution % 8:
        parser.error(f"--resolution is {args.resolution}; allowed: multiples of 8, the VAE's factor")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error("--mixed_precision fp16 needs a GPU, which this machine does not have; use bf16 or no")
    if "inversion_dpo, as many nodes" in args.methods and args.inversion_dpo_steps < 4:
        parser.error(
            f"--inversion_dpo_steps is {args.inversion_dpo_steps}; allowed: 4 and above, for the targets of "
            "'inversion_dpo, as many nodes', or leave that out of --methods"
        )
    if args.output and not Path(args.output).resolve().parent.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    if args.output and Path(args.output).exists():
        parser.error(f"--output {args.output} exists; name a new file")
    return args


# 1  Models and data


def make_modules(family, tokenizer, weight_dtype):
    """Returns text encoders, VAE and U-Net of a family with random weights, made in the dtype that they keep."""
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    usual = torch.get_default_dtype()

    def make(dtype, kind, *args, **kwargs):
        torch.set_default_dtype(dtype)  # never in float32 first: that would need twice the memory
        try:
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                return kind(*args, **kwargs)
        finally:
            torch.set_default_dtype(usual)

    text_encoders = [
        make(weight_dtype, kind, CLIPTextConfig(**config, **tokens)) for kind, config in family.text_encoders
    ]
    vae = make(torch.float32 if family.has_float32_vae else weight_dtype, AutoencoderKL, **VAE)
    return text_encoders, vae, make(weight_dtype, UNet2DConditionModel, **family.unet)


def build_models(model, weight_dtype):
    """Returns tokenizers, text encoders, VAE and U-Net as `load_models` of the script does, with random weights."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if model == "tiny":
        text_encoders, vae, unet = [make_text_encoder(tokenizer)], make_vae(), make_unet()
        for module in (*text_encoders, vae, unet):
            torch.nn.Module.to(module, weight_dtype)
    else:
        tokenizer.model_max_length = 77
        text_encoders, vae, unet = make_modules(FAMILIES[model], tokenizer, weight_dtype)
    for module in (*text_encoders, vae, unet):
        module.requires_grad_(False).eval()
    return [tokenizer] * len(text_encoders), text_encoders, vae, unet


def write_pairs(folder, resolution, num_pairs):
    """Writes pairs of random images."""
    rng = np.random.default_rng(0)

    def image():
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    rows = [{"jpg_0": image(), "jpg_1": image(), "label_0": 1.0, "caption": "a red circle"} for _ in range(num_pairs)]
    Dataset.from_list(rows).to_parquet(Path(folder) / "train.parquet")


# 2  The rivals


class Models(NamedTuple):
    """What a rival's step works with: the training script's functions, the models, and accelerate around them."""

    script: Any
    accelerator: Accelerator
    text_encoders: list
    vae: torch.nn.Module
    unet: torch.nn.Module
    alphas_cumprod: torch.Tensor
    weight_dtype: torch.dtype
    vae_encode_batch_size: int

    def encode_images(self, batch):
        return self.script.encode_images(self.vae, batch["pixel_values"], self.vae_encode_batch_size)

    def encode_prompts(self, batch, name="input_ids"):
        return self.script.encode_prompts(self.text_encoders, batch[name], batch)

    def predict(self, x_t, t, cond):
        """Returns the noise prediction (N, C, h, w) at x_t and one t for all; within `reference_policy`, its one."""
        timesteps = torch.full((len(x_t),), int(t), device=x_t.device)
        with self.accelerator.autocast():
            return self.script.predict_noise(
                self.unet, x_t, timesteps, cond, self.alphas_cumprod, "epsilon", self.weight_dtype
            )

    def predict_guided(self, x_t, t, cond, empty_cond, scale=2.0):
        both = map_condition(lambda x, empty: torch.cat([x, empty]), cond, empty_cond)
        noise, unconditional = self.predict(torch.cat([x_t, x_t]), t, both).chunk(2)
        return unconditional + scale * (noise - unconditional)


def ddim_inversion_step(x, noise, p, q, alphas_cumprod, eta=0.0):
    """Returns x at timestep q >= p from x at p: DDIM (arXiv 2010.02502, equation 12) with its variance, upwards."""
    (alpha_p, sigma_p), (alpha_q, sigma_q) = (alpha_sigma(t, alphas_cumprod, x) for t in (p, q))
    std = eta * sigma_p / sigma_q * (1 - (alpha_q / alpha_p).square()).sqrt()
    clean = (x - sigma_p * noise) / alpha_p
    return alpha_q * clean + (sigma_q.square() - std.square()).sqrt() * noise + std * torch.randn_like(x)


def even_nodes(last, num_steps):
    """Returns `num_steps` + 1 timesteps from 0 to `last`, int64."""
    return torch.linspace(0, int(last), num_steps + 1, dtype=torch.float64).round().long()


def published_inpo(models, batch, num_steps, beta=2000.0):
    """One step of DDIM-InPO (arXiv 2503.18454) as it was released, up to its gradients; returns the loss.

    The policy inverts without a gradient and is told where the latent is going; the first pair's timestep serves the
    whole batch. The released code walks a grid over the whole schedule as far as its timestep, here all `num_steps`
    lie below it, so that every step costs the same.
    """
    latents, cond, abar = models.encode_images(batch), models.encode_prompts(batch), models.alphas_cumprod
    t = sample_timesteps(batch["uniforms"], 0, len(abar) - 1)[0, 0]
    x = latents
    with torch.no_grad():
        for p, q in pairwise(even_nodes(t, num_steps)):
            x = ddim_inversion_step(x, models.predict(x, q, cond), p, q, abar, eta=0.1)
    alpha, sigma = alpha_sigma(t, abar, x)
    target = (x - alpha * latents) / sigma
    with torch.no_grad(), reference_policy(models.unet):
        reference_error = prediction_error(models.predict(x, t, cond), target)
    policy_error = prediction_error(models.predict(x, t, cond), target)
    loss = preference_loss(policy_error, reference_error, beta)[0].mean()
    models.accelerator.backward(loss)
    return loss.detach()


def published_inversion_dpo(models, batch, num_steps, beta=2000.0):
    """One step of Inversion-DPO (arXiv 2507.11554) as it was released, up to its gradients; returns the loss.

    Policy and reference are compared with each other at every node, with weights 1 / (2 abar_t), each at the latent of
    the level below. Their distance is least where they are equal, so there the gradient is exactly zero.
    """
    abar, unet = models.alphas_cumprod, models.unet
    x, states = models.encode_images(batch), []
    nodes = even_nodes(len(abar) - 1, num_steps)
    cond, empty_cond = models.encode_prompts(batch), models.encode_prompts(batch, "empty_input_ids")
    with torch.no_grad(), reference_policy(unet):
        for p, q in pairwise(nodes):
            states.append(x)
            x = ddim_inversion_step(x, models.predict_guided(x, q, cond, empty_cond), p, q, abar)
    cond, empty_cond = models.encode_prompts(batch), models.encode_prompts(batch, "empty_input_ids")
    distances = []
    for x_t, t in zip(states, nodes[1:], strict=True):
        with torch.no_grad(), reference_policy(unet):
            reference_noise = models.predict_guided(x_t, t, cond, empty_cond)
        policy_noise = models.predict_guided(x_t, t, cond, empty_cond)
        distances.append(prediction_error(policy_noise, reference_noise) / (2 * abar[t]))
    winner, loser = torch.stack(distances).mean(0).chunk(2)
    loss = -F.logsigmoid(beta / 2 * (winner - loser)).mean()
    models.accelerator.backward(loss)
    return loss.detach()


def train_rival(script, options, step, end_step):
    """Trains as the script does with these options, by another step; `end_step` is called after each update."""
    args, _ = script.parse_args(options)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    pairs, noise_scheduler = script.load_pairs(args), script.load_noise_scheduler(args)
    weight_dtype = DTYPES[args.mixed_precision]
    tokenizers, text_encoders, vae, unet = script.load_models(args, weight_dtype)
    for module in (*text_encoders, vae, unet):
        module.to(accelerator.device)
    parameters = add_lora(unet, args.rank, args.lora_alpha or args.rank)
    optimizer = script.create_optimizer(args, parameters, args.train_batch_size)
    dataloader = torch.utils.data.DataLoader(
        PreferenceDataset(pairs, args.resolution, 1, args.seed, False, False, 0.0),
        batch_sampler=VisitBatches(len(pairs), args.train_batch_size, args.seed),
        collate_fn=partial(script.collate, tokenizers=tokenizers, model_index={}),
        pin_memory=accelerator.device.type == "cuda",
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    unet.train()
    abar = noise_scheduler.alphas_cumprod.to(accelerator.device)
    models = Models(
        script, accelerator, text_encoders, vae, unet, abar, weight_dtype, args.vae_encode_batch_size
    )  # fmt: skip
    batches = iter(dataloader)
    for _ in range(args.max_train_steps):
        step(models, next(batches))
        accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        end_step()


# 3  What is measured


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        options: the training script's; "{folder}" in them becomes a new, empty folder, "{nodes}" the benchmark's
            --inversion_dpo_steps.
        rival: (benchmark's options) -> a step (models, batch) instead of the script's own, or None.
        warmup: updates that come before the measured ones. An update visits each pair once.
    """

    options: list[str]
    rival: Callable | None = None
    warmup: int = 1


CACHED = ["--inversion_cache_dir", "{folder}", "--cached_timesteps", "1"]  # filled beforehand
ON_REQUEST = ("inpo, compiled",)  # on a CPU compiling takes many minutes

METHODS = {
    "diffusion_dpo": Method(["--objective", "diffusion_dpo"]),
    "inpo": Method(["--objective", "inpo"]),
    "inversion_dpo": Method(["--objective", "inversion_dpo"]),
    "inversion_dpo, chunks of 1": Method(["--objective", "inversion_dpo", "--trajectory_chunk", "1"]),
    "inversion_dpo, as many nodes": Method(["--objective", "inversion_dpo", "--inversion_steps", "{nodes}"]),
    "inversion_dpo, all nodes": Method(
        [
            "--objective",
            "inversion_dpo",
            "--timesteps_per_pair",
            "{nodes}",
            "--inversion_steps",
            "{nodes}",
            "--trajectory_chunk",
            "1",
        ]
    ),
    "inpo, cached": Method(["--objective", "inpo", *CACHED]),
    "inversion_dpo, cached": Method(["--objective", "inversion_dpo", *CACHED]),
    "diffusion_dpo, cached latents": Method(["--objective", "diffusion_dpo", "--cache_latents", *CACHED]),
    "inpo, compiled": Method(["--objective", "inpo", "--compile"], warmup=2),
    "published_inpo": Method([], lambda args: partial(published_inpo, num_steps=args.inpo_steps)),
    "published_inversion_dpo": Method(
        [], lambda args: partial(published_inversion_dpo, num_steps=args.inversion_dpo_steps)
    ),
}


class Call(NamedTuple):
    """A kind of model call: the script's function, on how many images or captions, and whether with a backward."""

    function: str
    size: int
    with_gradient: bool
    is_reference: bool

    def __str__(self):
        how = ", with backward" if self.with_gradient else ", reference" if self.is_reference else ""
        return f"{self.function} x{self.size}{how}"


def is_reference(unet):
    """Whether the U-Net has a LoRA that is switched off."""
    layer = next((layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)), None)
    return layer is not None and layer.disable_adapters


def repeat(function, arguments, call, autocast):
    """Makes a call of the script again, with its backward where it had one, under `autocast` as it was."""
    device_type, enabled, dtype = autocast
    with (
        torch.set_grad_enabled(call.with_gradient),
        reference_policy(arguments[0]) if call.is_reference else nullcontext(),
    ):
        with torch.autocast(device_type, dtype, enabled=enabled):
            result = function(*arguments)
        if call.with_gradient:
            result.square().mean().backward()


class Probe:
    """Stands in for a script's model calls until closed: counts them, keeps a way to repeat them, times steps.

    Args:
        script: the training script, a module.
        on_step: called with the number of updates made, at the end of each, before its time is taken.

    Attributes:
        calls: how often each kind of `Call` was made.
        repeats: a way to make a call of each kind again.
        started: time of the first call.
        step_ends: (time, calls until then) at the end of each update.
        seconds: what was spent in each part while `is_timing_parts`, which makes the device wait for every call.
    """

    def __init__(self, script=train_inversion_dpo, on_step=lambda step: None):
        self.calls, self.repeats, self.step_ends, self.seconds = Counter(), {}, [], Counter()
        self.started = None
        self.is_timing_parts = False
        self._script, self._on_step, self._patches = script, on_step, ExitStack()
        for name in CALLS:
            self.replace(script, name, self._counted(name, getattr(script, name)))
        self.replace(Accelerator, "backward", self._timed("backward", Accelerator.backward))
        self.replace(AcceleratedOptimizer, "step", self._timed("optimizer", AcceleratedOptimizer.step))
        pop = script.RunningMeans.pop

        def pop_and_end_step(means, accelerator):
            logs = pop(means, accelerator)
            self.end_step()
            return logs

        self.replace(script.RunningMeans, "pop", pop_and_end_step)

    def end_step(self):
        synchronize()
        self._on_step(len(self.step_ends) + 1)
        self.step_ends.append((time.perf_counter(), Counter(self.calls)))

    def replace(self, where, name, value):
        """Replaces an attribute of the script, or of what it uses, until the probe is closed."""
        self._patches.callback(setattr, where, name, getattr(where, name))
        setattr(where, name, value)

    def _timed(self, name, function):
        def call(*args, **kwargs):
            if not self.is_timing_parts:
                return function(*args, **kwargs)
            synchronize()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            self.seconds[name] += time.perf_counter() - started
            return result

        return call

    def _counted(self, name, function):
        timed = self._timed(name, function)

        def call(module, inputs, *rest):
            self.started = self.started or time.perf_counter()
            is_unet = name == "predict_noise"
            size = len(inputs[0] if name == "encode_prompts" else inputs)  # of captions there are ids per encoder
            kind = Call(name, size, is_unet and torch.is_grad_enabled(), is_unet and is_reference(module))
            self.calls[kind] += 1
            if kind not in self.repeats:
                device = "cuda" if torch.cuda.is_available() else "cpu"
                autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
                self.repeats[kind] = partial(repeat, function, (module, inputs, *rest), kind, autocast)
            return timed(module, inputs, *rest)

        return call

    def close(self):
        self._patches.close()


class Round(NamedTuple):
    """What one run of a method gave: the measured steps' seconds, calls a step, and the rest as in `figures`."""

    seconds: list[float]
    calls: dict[Call, float]
    call_floor: float
    overhead: float
    memory: float


def measure(args, method, folder, flops):
    """Runs a method for its warm-up, the measured steps and one more whose parts are timed; returns a `Round`.

    Args:
        flops: counted floating-point operations by kind of `Call`, to which those of new kinds are added.
    """
    gc.collect()  # the models of the method before
    script = train_inversion_dpo_sdxl if args.model == "sdxl" else train_inversion_dpo
    last = method.warmup + args.steps
    memory = 0.0

    def on_step(step):
        nonlocal memory
        if step == method.warmup:
            reset_peak_memory()  # leaves out building the models and the first allocations
        elif step == last:
            memory, probe.is_timing_parts = peak_memory(), True
        elif step == last + 1:
            probe.is_timing_parts = False

    probe = Probe(script, on_step)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    probe.replace(script, "load_noise_scheduler", lambda script_args: scheduler)
    probe.replace(script, "load_model_index", lambda script_args: {})

    def load_models(script_args, weight_dtype):
        tokenizers, text_encoders, vae, unet = build_models(args.model, weight_dtype)
        if script_args.inversion_cache_dir and not script_args.precompute_only:
            text_encoders, vae = (), None  # as in the script; all is in the cache
        return tokenizers, text_encoders, vae, unet

    probe.replace(script, "load_models", load_models)
    probe.replace(script, "model_digest", lambda script_args: "random")
    probe.replace(script, "cache_size", lambda script_args, pairs, weight_dtype: (0, 0, 0, 0))
    options = [
        "--pretrained_model_name_or_path", folder, "--train_data_dir", folder, "--report_to", "none",
        "--output_dir", tempfile.mkdtemp(dir=folder), "--resolution", str(args.resolution),
        "--train_batch_size", str(args.train_batch_size), "--max_train_steps", str(last + 1),
        "--checkpointing_steps", str(last + 1), "--mixed_precision", args.mixed_precision,
        *(
            option.format(folder=tempfile.mkdtemp(dir=folder), nodes=args.inversion_dpo_steps)
            for option in method.options
        ),
    ]  # fmt: skip
    try:
        if method.rival:
            train_rival(script, options, method.rival(args), probe.end_step)
        else:
            if "--inversion_cache_dir" in options:  # so that the measured steps read it from the disk
                script.main([*options, "--precompute_only"])
                probe.repeats.clear()  # they keep the models of that run
                gc.collect()
            script.main(options)
        ends, counts = zip(*probe.step_ends, strict=True)
        seconds = [later - earlier for earlier, later in pairwise(ends[method.warmup - 1 : last])]
        made = counts[last - 1] - counts[method.warmup - 1]
        calls = {call: count / args.steps for call, count in made.items()}
        overhead = 1 - sum(probe.seconds.values()) / (ends[last] - ends[last - 1])
        call_floor = sum(count * fastest(probe.repeats[call]) for call, count in calls.items())
        for call in calls.keys() - flops.keys():
            flops[call] = count_flops(probe.repeats[call])
    finally:
        probe.close()
    return Round(seconds, calls, call_floor, overhead, memory)


def fastest(call, repeats=2):
    """Seconds of a call, the fastest of a few."""
    times = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def count_flops(call):
    """Returns the floating-point operations of a call's matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
        call()
    return counter.get_total_flops()


def matmul_rate(dtype):
    """Returns the floating-point operations a second of a plain product of square matrices, the best of some sizes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = []
    for size in (2048, 4096, 8192) if device == "cuda" else (512, 1024):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates.append(2 * size**3 / fastest(partial(torch.mm, a, b), repeats=3))
    return max(rates)


def is_needed(method, call):
    """Whether a method's result depends on such a call.

    The script's policy goes without a gradient to save memory only: chunk after chunk, before each comes with one.
    """
    by_policy = call.function == "predict_noise" and not call.is_reference and not call.with_gradient
    return bool(method.rival) or "--inversion_model" in method.options or not by_policy


def figures(method, rounds, flops, rate, batch_size):
    """Returns what the table and the JSON say of a method.

    Args:
        rounds: its `Round`s.
        flops: by kind of `Call`.
        rate: floating-point operations a second of a matrix product.
    """
    calls = rounds[0].calls
    times = [seconds for one in rounds for seconds in one.seconds]
    seconds, call_floor = min(times), min(one.call_floor for one in rounds)
    needed = sum(count * flops[call] for call, count in calls.items() if is_needed(method, call))

    def evaluations(select):
        return sum(count * c.size for c, count in calls.items() if c.function == "predict_noise" and select(c))

    return {
        "seconds": seconds,
        "median_seconds": statistics.median(times),
        "pairs_per_second": batch_size / seconds,
        "memory_gib": min(one.memory for one in rounds),
        "reference_evaluations": evaluations(lambda call: call.is_reference),
        "policy_evaluations": evaluations(lambda call: not call.is_reference),
        "policy_evaluations_with_gradient": evaluations(lambda call: call.with_gradient),
        "needed_flops": needed,
        "flop_floor_seconds": needed / rate,
        "flop_floor_share": needed / rate / seconds,
        "call_floor_seconds": call_floor,
        "call_floor_share": call_floor / seconds,
        "overhead_share": statistics.median(one.overhead for one in rounds),
        "calls": {str(call): count for call, count in calls.items()},
    }


def table(figures_by_method):
    """The figures in Markdown."""
    lines = [
        "| method | seconds a step | median | / diffusion_dpo | pairs a second | peak memory, GiB "
        "| U-Net: reference / policy / of these with gradient | FLOP floor | call floor | overhead |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures_by_method.items():
        ratio = "" if row["ratio_to_diffusion_dpo"] is None else f"{row['ratio_to_diffusion_dpo']:.2f}"
        counts = (row[f"{who}_evaluations{how}"] for who, how in
                  (("reference", ""), ("policy", ""), ("policy", "_with_gradient")))  # fmt: skip
        lines.append(
            f"| {name} | {row['seconds']:.3f} | {row['median_seconds']:.3f} | {ratio} "
            f"| {row['pairs_per_second']:.3g} | {row['memory_gib']:.2f} | {' / '.join(f'{n:g}' for n in counts)} "
            f"| {row['flop_floor_share']:.0%} | {row['call_floor_share']:.0%} | {row['overhead_share']:.1%} |"
        )
    return "\n".join(lines)


def main(args):
    rounds, flops, rate = {method: [] for method in args.methods}, {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(folder, args.resolution, args.train_batch_size)
        for _ in range(args.rounds):
            rate = max(rate, matmul_rate(DTYPES[args.mixed_precision]))
            for method in args.methods:
                rounds[method].append(measure(args, METHODS[method], folder, flops))
    found = {
        method: figures(METHODS[method], runs, flops, rate, args.train_batch_size) for method, runs in rounds.items()
    }
    for row in found.values():
        baseline = found.get("diffusion_dpo")
        row["ratio_to_diffusion_dpo"] = row["seconds"] / baseline["seconds"] if baseline else None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.model}, {args.resolution} px, {args.train_batch_size} pairs a step, mixed precision "
        f"{args.mixed_precision}, {device}; a matrix product reaches {rate / 1e9:.3g} GFLOP/s\n"
    )
    print(table(found))
    print("\nU-Net: evaluations of single latents a step. FLOP floor, call floor, overhead: shares of the step.")
    if args.output:
        record = {
            "device": device, **vars(args), "matmul_flops_per_second": rate, "versions": versions(), "figures": found,
        }  # fmt: skip
        Path(args.output).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())

"""Measure what a training step costs, for each method, in one run: seconds, memory, model calls, overhead.

    python examples/benchmark.py --model tiny
    python examples/benchmark.py --model sd15 --resolution 256
    python examples/benchmark.py --model sdxl --mixed_precision bf16 -- --gradient_checkpointing

Runs the real training script on a model with random weights, method after method, round after round, so that a busy
machine slows all alike. The fastest step of each counts; the median stands beside it. Two rivals run in a loop of
their own, on the same models, batches and optimizer, made of the script's own functions:

    published_inpo           DDIM-InPO's released step: the policy inverts without guidance, with eta 0.1, in
                             --inpo_steps calls, then policy and reference at one timestep a pair
    published_inversion_dpo  Inversion-DPO's released step: the reference inverts with guidance 2, then policy and
                             reference at all --inversion_dpo_steps nodes, guided again, with all graphs of the
                             policy kept until one backward; the text is encoded four times

The second is timed, not trained: where policy and reference are equal, as at the start, its gradient is exactly zero.
Both put winner and loser, conditional and unconditional into one call, as our objectives do. The cached methods fill
their cache before the first step; their steps read it from the disk.

Peak memory is that of the measured steps: on a GPU of all tensors, on a CPU of the whole process (Linux only).
Overhead is the share of a step that is neither U-Net, VAE, text encoder, backward nor optimizer; it is measured in one
more step, in which the device waits for each of them.
"""

import ctypes
import gc
import importlib.metadata
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import Parser, number

RESOLUTIONS = {"tiny": 64, "sd15": 512, "sdxl": 1024}
CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")
CALLS = ("predict_noise", "encode_images", "encode_prompts")  # the script's functions that call a model


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        options: the training script's; "{folder}" in them becomes the run's own folder, "{nodes}" the benchmark's
            --inversion_dpo_steps.
        rival: (benchmark's options) -> a step (models, batch) instead of the script's own, or None.
        warmup: steps that come before the measured ones.
    """

    options: list[str]
    rival: Callable | None = None
    warmup: int = 1


CACHED = ["--inversion_cache_dir", "{folder}/cache", "--cached_draws", "1"]
AS_MANY_NODES = ["--objective", "inversion_dpo", "--inversion_steps", "{nodes}"]
ON_REQUEST = ("inpo, compiled",)  # compiling takes minutes on a CPU

METHODS = {
    "diffusion_dpo": Method(["--objective", "diffusion_dpo"]),
    "inpo": Method(["--objective", "inpo"]),
    "inversion_dpo": Method(["--objective", "inversion_dpo"]),
    "inversion_dpo, chunks of 1": Method(["--objective", "inversion_dpo", "--trajectory_chunk", "1"]),
    "inversion_dpo, as many nodes": Method(AS_MANY_NODES),
    "inversion_dpo, all nodes": Method(
        [*AS_MANY_NODES, "--timesteps_per_pair", "{nodes}", "--trajectory_chunk", "1"]
    ),
    "diffusion_dpo, cached": Method(["--objective", "diffusion_dpo", *CACHED]),
    "inpo, cached": Method(["--objective", "inpo", *CACHED]),
    "inversion_dpo, cached": Method(["--objective", "inversion_dpo", *CACHED]),
    "inpo, compiled": Method(["--objective", "inpo", "--compile"], warmup=2),
    "published_inpo": Method([], lambda args: partial(published_inpo, num_steps=args.inpo_steps)),
    "published_inversion_dpo": Method(
        [], lambda args: partial(published_inversion_dpo, num_steps=args.inversion_dpo_steps)
    ),
}  # fmt: skip


def parse_args(argv=None):
    path = os.path.expanduser
    parser = Parser(description=__doc__.split("\n")[0])
    count, default_methods = number(int, least=1), [name for name in METHODS if name not in ON_REQUEST]
    add = parser.add_argument
    add("--model", choices=RESOLUTIONS, default="tiny", help="size of the random model")
    add("--resolution", type=int, help="pixels of a side (64 for tiny, 512 for sd15, 1024 for sdxl)")
    add("--train_batch_size", type=count, default=1, help="pairs a step")
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="of the frozen parts")
    add("--rounds", type=count, default=3, help="runs of each method; more are steadier")
    add("--steps", type=count, default=2, help="measured steps of each run; more are steadier")
    add("--methods", nargs="+", choices=METHODS, default=default_methods, help="rows (all but 'inpo, compiled')")
    add("--inpo_steps", type=count, default=10, help="calls of published_inpo's inversion; its authors take 10")
    add("--inversion_dpo_steps", type=number(int, least=4), default=40,
        help="nodes of published_inversion_dpo, whose graphs are all in memory (its code has 40, its script 80), and "
        "of two rows of ours: inverting as many, four of them trained, and training all")  # fmt: skip
    add("--output", type=path, help="also write the figures to this new file, as JSON")
    add("train_options", nargs="*",
        help="after --: options of the training script; of those that change a step's cost, the published_ rows know "
        "--gradient_checkpointing, --use_8bit_adam and --rank")  # fmt: skip
    args = parser.parse_args(argv)
    args.resolution = RESOLUTIONS[args.model] if args.resolution is None else args.resolution
    if args.resolution < 8 or args.resolution % 8:
        parser.error(f"--resolution is {args.resolution}; allowed: multiples of 8, the VAE's factor")
    if any(option.startswith("--gradient_accumulation_steps") for option in args.train_options):
        parser.error("--gradient_accumulation_steps: a step is measured, which is one batch; see --train_batch_size")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    if args.output and Path(args.output).exists():
        parser.error(f"--output {args.output} exists; name a new file")
    return args, parser.error


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from benchmark_input import write_pairs
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from train_small_world import MAX_TOKENS, make_text_encoder, make_tokenizer, make_unet, make_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import train_inversion_dpo
import train_inversion_dpo_sdxl
import training_utils
from inversion_utils import alpha_sigma, prediction_error, preference_loss, sample_timesteps
from training_utils import (
    PreferenceDataset,
    RunningMeans,
    add_lora,
    collate,
    load_pairs,
    reference_policy,
    visit_batches,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# 1  Models and data


class Family(NamedTuple):
    """Models of one size: callables that make them with random weights, and for what they are made.

    SDXL's VAE overflows in half precision and stays in float32.
    """

    max_tokens: int
    text_encoders: list[Callable[[], torch.nn.Module]]
    vae: Callable[[], torch.nn.Module]
    unet: Callable[[], torch.nn.Module]
    has_float32_vae: bool = False


def make_clip(kind, hidden_size, num_layers, num_heads, **options):
    sizes = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, **options}
    return kind(CLIPTextConfig(num_hidden_layers=num_layers, num_attention_heads=num_heads, **sizes))


make_clip_l = partial(make_clip, CLIPTextModel, 768, 12, 12)
make_clip_g = partial(make_clip, CLIPTextModelWithProjection, 1280, 32, 20, projection_dim=1280)
make_full_vae = partial(
    AutoencoderKL, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
make_sd15_unet = partial(UNet2DConditionModel, sample_size=64, cross_attention_dim=768)
make_sdxl_unet = partial(
    UNet2DConditionModel, sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
FAMILIES = {
    "tiny": Family(MAX_TOKENS, [lambda: make_text_encoder(make_tokenizer())], make_vae, make_unet),
    "sd15": Family(77, [make_clip_l], make_full_vae, make_sd15_unet),
    "sdxl": Family(77, [make_clip_l, make_clip_g], make_full_vae, make_sdxl_unet, has_float32_vae=True),
}


def make_frozen(kind, dtype):
    """Returns a model made in the dtype that it keeps, not in float32 first, which would need twice the memory."""
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return kind().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(usual)


def make_encoders(family, weight_dtype):
    """Returns text encoders and VAE."""
    vae_dtype = torch.float32 if family.has_float32_vae else weight_dtype
    return [make_frozen(kind, weight_dtype) for kind in family.text_encoders], make_frozen(family.vae, vae_dtype)


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

    def encode_images(self, batch):
        return training_utils.encode_images(self.vae, batch["pixel_values"], 8)  # the script's --vae_encode_batch_size

    def encode_prompts(self, batch):
        return self.script.encode_prompts(self.text_encoders, batch, {})

    def predict(self, x_t, t, cond):
        """Returns the noise prediction (N, C, h, w) at x_t and one t for all; within `reference_policy`, its one."""
        timesteps = torch.full((len(x_t),), int(t), device=x_t.device)
        with self.accelerator.autocast():
            return self.script.predict_noise(self.unet, x_t, timesteps, cond, None, "epsilon", self.weight_dtype)

    def predict_guided(self, x_t, t, cond, empty_cond, scale=2.0):
        both = {name: torch.cat([cond[name], empty_cond[name]]) for name in cond}
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
    latents, abar, unet = models.encode_images(batch), models.alphas_cumprod, models.unet
    x, states, distances, nodes = latents, [], [], even_nodes(len(abar) - 1, num_steps)
    captions = batch, {**batch, **batch["empty"]}
    conds = [models.encode_prompts(texts) for texts in captions]
    with torch.no_grad(), reference_policy(unet):
        for p, q in pairwise(nodes):
            states.append(x)
            x = ddim_inversion_step(x, models.predict_guided(x, q, *conds), p, q, abar)
    conds = [models.encode_prompts(texts) for texts in captions]
    for x_t, t in zip(states, nodes[1:], strict=True):
        with torch.no_grad(), reference_policy(unet):
            reference_noise = models.predict_guided(x_t, t, *conds)
        policy_noise = models.predict_guided(x_t, t, *conds)
        distances.append(prediction_error(policy_noise, reference_noise) / (2 * abar[t]))
    winner, loser = torch.stack(distances).mean(0).chunk(2)
    loss = -F.logsigmoid(beta / 2 * (winner - loser)).mean()
    models.accelerator.backward(loss)
    return loss.detach()


def collate_with_empty(examples, tokenizers):
    """Returns the script's batch, and in "empty" what it would hold of empty captions."""
    without = collate([{**example, "caption": ""} for example in examples], tokenizers)
    return {**collate(examples, tokenizers), "empty": {name: without[name] for name in ("input_ids", "is_empty")}}


def train_rival(script, options, step, end_step):
    """Trains as the script does with these options, by another step; `end_step` is called after each."""
    args, error = script.parse_args(options)
    accelerator, weight_dtype = script.start(args)
    text_encoders, vae = script.load_encoders(args, weight_dtype)
    tokenizers, unet = script.load_tokenizers(args), script.load_denoiser(args, weight_dtype)
    for module in (unet, vae, *text_encoders):
        module.to(accelerator.device)
    parameters, pairs = add_lora(unet, args.rank), load_pairs(args)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    dataloader = torch.utils.data.DataLoader(
        PreferenceDataset(pairs, args.resolution, 1, args.seed),
        batch_sampler=visit_batches(len(pairs), args.train_batch_size, args.seed),
        collate_fn=partial(collate_with_empty, tokenizers=tokenizers),
        pin_memory=DEVICE == "cuda",
    )
    policy, optimizer, _ = script.prepare_training(
        args, error, accelerator, unet, parameters, None, 0, args.max_train_steps
    )
    policy.train()
    abar = script.read_configs(args, warnings.warn)[0].alphas_cumprod
    models = Models(script, accelerator, text_encoders, vae, policy, abar, weight_dtype)
    for _, batch in zip(range(args.max_train_steps), dataloader, strict=False):
        step(models, batch)
        accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        end_step()


# 3  What is measured


class Call(NamedTuple):
    """A kind of model call: the script's function, on how many images or captions, and for what."""

    function: str
    size: int
    with_gradient: bool
    is_reference: bool


def is_reference(unet):
    """Whether the U-Net has a LoRA that is switched off."""
    layer = next((layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)), None)
    return layer is not None and layer.disable_adapters


class Probe:
    """Stands in for a script's model calls until closed: counts them, and takes the time of steps.

    Args:
        script: the training script, a module.
        on_step: called with the number of steps made, at the end of each, before its time is taken.
        clock: what tells the time, in seconds.

    Attributes:
        calls: how often each kind of `Call` was made.
        started: time of the first call.
        step_ends: (time, calls until then) at the end of each step.
        seconds: what was spent in parts of the step while `is_timing_parts`, when the device waits for each.
    """

    def __init__(self, script=train_inversion_dpo, on_step=lambda step: None, clock=time.perf_counter):
        self.calls, self.step_ends, self.seconds = Counter(), [], 0.0
        self.started, self.is_timing_parts = None, False
        self._on_step, self._clock, self._patches = on_step, clock, ExitStack()
        for name in CALLS:
            owner = script if hasattr(script, name) else training_utils
            self.replace(owner, name, self._counted(name, self._timed(getattr(owner, name))))
        self.replace(script, "check_prediction_type", lambda *_: None)  # of no step
        self.replace(Accelerator, "backward", self._timed(Accelerator.backward))
        self.replace(AcceleratedOptimizer, "step", self._timed(AcceleratedOptimizer.step))
        pop = RunningMeans.pop

        def pop_and_end_step(means, accelerator):
            logs = pop(means, accelerator)
            self.end_step()
            return logs

        self.replace(RunningMeans, "pop", pop_and_end_step)

    def end_step(self):
        synchronize()
        self._on_step(len(self.step_ends) + 1)
        self.step_ends.append((self._clock(), Counter(self.calls)))

    def replace(self, where, name, value):
        """Replaces an attribute of the script, or of what it uses, until the probe is closed."""
        self._patches.callback(setattr, where, name, getattr(where, name))
        setattr(where, name, value)

    def _timed(self, function):
        def call(*args, **kwargs):
            if not self.is_timing_parts:
                return function(*args, **kwargs)
            seconds, result = timed(partial(function, *args, **kwargs))
            self.seconds += seconds
            return result

        return call

    def _counted(self, name, function):
        def call(module, inputs, *rest):
            self.started, is_unet = self.started or self._clock(), name == "predict_noise"
            size = len(inputs["is_empty"] if name == "encode_prompts" else inputs)
            self.calls[Call(name, size, is_unet and torch.is_grad_enabled(), is_unet and is_reference(module))] += 1
            return function(module, inputs, *rest)

        return call

    def close(self):
        self._patches.close()


class Run(NamedTuple):
    """What one run of a method gave: the measured steps' seconds, and a step's calls, overhead and GiB."""

    seconds: list[float]
    calls: dict[Call, float]
    overhead: float
    memory: float


def measure(args, method, folder):
    """Runs a method: warm-up, the measured steps, and one more whose parts are timed."""
    gc.collect()  # the models of the method before
    script = train_inversion_dpo_sdxl if args.model == "sdxl" else train_inversion_dpo
    family, tokenizer = FAMILIES[args.model], make_tokenizer()
    tokenizer.model_max_length = family.max_tokens
    last, memory = method.warmup + args.steps, math.nan

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
    tokenizers = [tokenizer] * len(family.text_encoders)
    probe.replace(script, "read_configs", lambda *_: (scheduler, {}, tokenizers, {"lora_init": None}, None))
    probe.replace(script, "load_tokenizers", lambda script_args: tokenizers)
    probe.replace(script, "load_encoders", lambda script_args, dtype: make_encoders(family, dtype))
    probe.replace(script, "load_denoiser", lambda script_args, dtype: make_frozen(family.unet, dtype))
    output_dir = tempfile.mkdtemp(dir=folder)
    options = [
        "--pretrained_model_name_or_path", folder, "--train_data_dir", f"{folder}/pairs", "--report_to", "none",
        "--output_dir", output_dir, "--resolution", str(args.resolution),
        "--train_batch_size", str(args.train_batch_size), "--max_train_steps", str(last + 1),
        "--checkpointing_steps", str(last + 1), "--mixed_precision", args.mixed_precision,
        *args.train_options,
        *(option.format(folder=output_dir, nodes=args.inversion_dpo_steps) for option in method.options),
    ]  # fmt: skip
    try:
        if method.rival:
            train_rival(script, options, method.rival(args), probe.end_step)
        else:
            script.main(*script.parse_args(options))
    finally:
        probe.close()
    ends, counts = zip(*probe.step_ends, strict=True)
    made = counts[last - 1] - counts[method.warmup - 1]
    return Run(
        seconds=[later - earlier for earlier, later in pairwise(ends[method.warmup - 1 : last])],
        calls={call: count / args.steps for call, count in made.items()},
        overhead=1 - probe.seconds / (ends[last] - ends[last - 1]),
        memory=memory,
    )


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(call):
    """Returns the seconds of a call, until the device is done, and its result."""
    synchronize()
    started = time.perf_counter()
    result = call()
    synchronize()
    return time.perf_counter() - started, result


def reset_peak_memory():
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_REFS.exists():
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, for which the next measured would have to pay
        CLEAR_REFS.write_text("5")  # the peak resident set starts anew


def peak_memory():
    """Returns GiB since the last reset: of the GPU's tensors, or else of the process; NaN where neither is known."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if not CLEAR_REFS.exists():
        return math.nan
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


# 4  The table


def figures(runs, batch_size):
    """Returns what the table and the JSON say of a method; model calls are counted per image."""
    times = [seconds for run in runs for seconds in run.seconds]

    def calls(function, is_counted=lambda call: True):
        sizes = [count * c.size for c, count in runs[0].calls.items() if c.function == function and is_counted(c)]
        return sum(sizes) / (2 * batch_size)

    return {
        "seconds": min(times),
        "median_seconds": statistics.median(times),
        "pairs_per_second": batch_size / min(times),
        "memory_gib": statistics.median(run.memory for run in runs),
        "reference_calls": calls("predict_noise", lambda call: call.is_reference),
        "policy_calls": calls("predict_noise", lambda call: not call.is_reference),
        "policy_calls_with_gradient": calls("predict_noise", lambda call: call.with_gradient),
        "vae_calls": calls("encode_images"),
        "text_encoder_calls": calls("encode_prompts"),
        "overhead": statistics.median(run.overhead for run in runs),
    }


def table(figures_by_method):
    """The figures in Markdown."""
    lines = [
        "| method | seconds a step | median | / diffusion_dpo | pairs a second | peak memory, GiB "
        "| U-Net calls: reference / policy / of these with gradient | overhead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures_by_method.items():
        ratio = "" if row["ratio_to_diffusion_dpo"] is None else f"{row['ratio_to_diffusion_dpo']:.2f}"
        counts = (row[name] for name in ("reference_calls", "policy_calls", "policy_calls_with_gradient"))
        lines.append(
            f"| {name} | {row['seconds']:.3f} | {row['median_seconds']:.3f} | {ratio} "
            f"| {row['pairs_per_second']:.3g} | {row['memory_gib']:.2f} | {' / '.join(f'{n:g}' for n in counts)} "
            f"| {row['overhead']:.1%} |"
        )
    return "\n".join(lines)


def main(args, error):
    if args.mixed_precision == "fp16" and DEVICE == "cpu":
        error("--mixed_precision fp16 needs a GPU, which this machine does not have; use bf16 or no")
    runs = {method: [] for method in args.methods}
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(f"{folder}/pairs", args.resolution, args.train_batch_size)
        for _ in range(args.rounds):
            for method in args.methods:
                runs[method].append(measure(args, METHODS[method], folder))
    found = {method: figures(runs[method], args.train_batch_size) for method in args.methods}
    for row in found.values():
        baseline = found.get("diffusion_dpo")
        row["ratio_to_diffusion_dpo"] = row["seconds"] / baseline["seconds"] if baseline else None
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.model}, {args.resolution} px, {args.train_batch_size} pairs a step, mixed precision "
        f"{args.mixed_precision}, {device}\n"
    )
    print(table(found))
    print("\nU-Net calls: how often a step shows it each image.")
    if args.output:
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        record = {"device": device, **vars(args), "versions": versions, "figures": found}
        Path(args.output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*args_and_error)

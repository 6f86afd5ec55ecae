"""Measure what a training step costs, for each objective, in one run: seconds, peak memory, share of its floor.

    python examples/benchmark.py --model tiny
    python examples/benchmark.py --model sd15 --resolution 256

Runs the real training script on a model with random weights, objective after objective, round after round, so that a
busy machine slows all alike; the fastest step of each counts. The floor is what the model calls alone would cost:
every call that the step makes (counted while it runs), times the fastest time of that call made by itself.
"""

import argparse
import gc
import io
import json
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from train_small_world import make_text_encoder, make_tokenizer, make_unet, make_vae
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_inversion_dpo  # noqa: E402
from inversion_utils import reference_policy  # noqa: E402

METHODS = {
    "diffusion_dpo": ["--objective", "diffusion_dpo"],
    "inpo": ["--objective", "inpo"],
    "inversion_dpo": ["--objective", "inversion_dpo"],
    "inversion_dpo, chunks of 1": ["--objective", "inversion_dpo", "--trajectory_chunk", "1"],
}


RESOLUTIONS = {"tiny": 64, "sd15": 512}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["tiny", "sd15"], default="tiny", help="Size of the random model")
    parser.add_argument("--resolution", type=int, help="Pixels of a side (64 for tiny, 512 for sd15)")
    parser.add_argument("--train_batch_size", type=int, default=1, help="Pairs a step")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--rounds", type=int, default=3, help="More: less noise")
    parser.add_argument("--steps", type=int, default=2, help="Measured steps per round and objective")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", help="Also write the figures to this file, as JSON")
    args = parser.parse_args(argv)
    if min(args.rounds, args.steps, args.train_batch_size) < 1:
        parser.error("--rounds, --steps and --train_batch_size: allowed are 1 and above")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    return args


def build_models(args, weight_dtype):
    """Tokenizer, text encoder, VAE and U-Net with random weights, on the device and in the dtype of training."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if args.model == "tiny":
        modules = make_text_encoder(tokenizer), make_vae(), make_unet()
    else:
        tokenizer.model_max_length = 77
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            modules = (
                CLIPTextModel(CLIPTextConfig(
                    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                )),
                AutoencoderKL(
                    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                ),
                UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            )  # fmt: skip
    text_encoder, vae, unet = (module.requires_grad_(False).eval().to(weight_dtype) for module in modules)
    return [tokenizer], [text_encoder], vae, unet


def write_pairs(folder, resolution):
    """Writes eight pairs of random images."""
    rng = np.random.default_rng(0)

    def image():
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    rows = [{"jpg_0": image(), "jpg_1": image(), "label_0": 1.0, "caption": "a red circle"} for _ in range(8)]
    Dataset.from_list(rows).to_parquet(Path(folder) / "train.parquet")


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak resident set starts anew


def peak_memory():
    """Peak memory in GiB since the last reset: of the GPU, or else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


class Call(NamedTuple):
    """A kind of model call: the script's function, on how many images or captions, and whether with a backward."""

    function: str
    size: int
    with_gradient: bool
    is_reference: bool

    def __str__(self):
        how = ", with backward" if self.with_gradient else ", reference" if self.is_reference else ""
        return f"{self.function} x{self.size}{how}"


def repeat(function, arguments, with_gradient, is_reference):
    """Makes a call of the script again, with its backward where it had one."""
    with torch.set_grad_enabled(with_gradient), reference_policy(arguments[0]) if is_reference else nullcontext():
        result = function(*arguments)
        if with_gradient:
            result.square().mean().backward()


class Probe:
    """Stands in for the script's model calls until closed: counts them, keeps a way to repeat them, times whole steps.

    Attributes:
        calls: how often each kind of `Call` was made.
        repeats: a way to make a call of each kind again.
        step_ends: (time, calls until then) at the end of each update.
    """

    def __init__(self, on_first_update=lambda: None):
        self.calls, self.repeats, self.step_ends = Counter(), {}, []
        self._patches = ExitStack()
        script = train_inversion_dpo
        for name in ("predict_noise", "encode_images", "encode_prompts"):
            self.replace(name, self._counted(name, getattr(script, name)))
        pop = script.RunningMeans.pop

        def timed_pop(means, accelerator):
            if not self.step_ends:
                on_first_update()
            logs = pop(means, accelerator)
            self.step_ends.append((time.perf_counter(), Counter(self.calls)))
            return logs

        script.RunningMeans.pop = timed_pop
        self._patches.callback(setattr, script.RunningMeans, "pop", pop)

    def replace(self, name, value):
        """Replaces a name of the script until the probe is closed."""
        self._patches.callback(setattr, train_inversion_dpo, name, getattr(train_inversion_dpo, name))
        setattr(train_inversion_dpo, name, value)

    def _counted(self, name, function):
        def call(module, inputs, *rest):
            with_gradient = name == "predict_noise" and torch.is_grad_enabled()
            layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
            is_reference = bool(layers) and layers[0].disable_adapters
            key = Call(name, len(inputs), with_gradient, is_reference)
            self.calls[key] += 1
            self.repeats[key] = partial(repeat, function, (module, inputs, *rest), with_gradient, is_reference)
            return function(module, inputs, *rest)

        return call

    def close(self):
        self._patches.close()


def measure(args, method, folder):
    """Runs the script for a few steps; returns the fastest step's seconds, its floor, its calls, and peak memory."""
    probe = Probe(reset_peak_memory)  # leaves out building the models and the first allocations
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    probe.replace("load_noise_scheduler", lambda script_args: scheduler)
    probe.replace("load_models", lambda script_args, weight_dtype: build_models(args, weight_dtype))
    options = [
        "--pretrained_model_name_or_path", "random", "--train_data_dir", folder, "--report_to", "none",
        "--output_dir", tempfile.mkdtemp(dir=folder), "--resolution", str(args.resolution or RESOLUTIONS[args.model]),
        "--train_batch_size", str(args.train_batch_size), "--max_train_steps", str(args.steps + 1),
        "--mixed_precision", args.mixed_precision,
    ]  # fmt: skip
    try:
        train_inversion_dpo.main([*options, *METHODS[method]])
        memory = peak_memory()
        ends, counts = zip(*probe.step_ends, strict=True)  # the first step warms up
        seconds = min(later - earlier for earlier, later in pairwise(ends))
        calls = {call: count // args.steps for call, count in (counts[-1] - counts[0]).items()}
        floor = sum(count * fastest(probe.repeats[call]) for call, count in calls.items())
    finally:
        probe.close()
    return seconds, floor, calls, memory


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


def main(args):
    results = {method: [] for method in args.methods}
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(folder, args.resolution or RESOLUTIONS[args.model])
        for _ in range(args.rounds):
            for method in args.methods:
                results[method].append(measure(args, method, folder))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, {args.train_batch_size} pairs a step, {args.mixed_precision} mixed precision, {device}\n")
    print("| objective | seconds a step | of its floor | / diffusion_dpo | peak memory, GiB | calls |")
    print("|---|---|---|---|---|---|")
    figures = {}
    for method, runs in results.items():
        seconds, floor = min(run[0] for run in runs), min(run[1] for run in runs)
        calls = {str(call): count for call, count in runs[0][2].items()}
        figures[method] = {"seconds": seconds, "floor": floor, "calls": calls, "memory": min(run[3] for run in runs)}
        ratio = seconds / figures["diffusion_dpo"]["seconds"] if "diffusion_dpo" in figures else float("nan")
        calls = ", ".join(f"{count} {call}" for call, count in figures[method]["calls"].items())
        memory = figures[method]["memory"]
        print(f"| {method} | {seconds:.3f} | {seconds / floor:.2f} | {ratio:.2f} | {memory:.2f} | {calls} |")
    if args.output:
        Path(args.output).write_text(json.dumps({"device": device, **vars(args), "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())

"""Inversion-based preference optimisation: what `train_inversion_dpo.py` and its SDXL twin have in common.

    1  inversion     `invert` finds, by DDIM inversion, the noise that belongs to an image
    2  objectives    `preference_loss` turns policy and reference errors into a DPO loss
    3  pairs         reading preference pairs: a better and a worse image for one caption
    4  training      LoRA, checkpoints, and the rest of what both scripts share around the loop
    5  results       what a run leaves: validation pictures, report, model card, upload to the Hub

Sections 1 and 2 are plain PyTorch and know neither the model nor the training script: copy them, or import this file,
into a trainer of your own. Inversion-DPO is arXiv 2507.11554, DDIM-InPO is arXiv 2503.18454, Diffusion-DPO is
arXiv 2311.12908.

Symbols: abar_t = `alphas_cumprod[t]`, alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), and the noise level
s_t = sigma_t / alpha_t (0.029 at t = 0 and 14.6 at t = 999 for Stable Diffusion). Winner and loser images always
travel in one batch (2B, ...): the B winners first, then the B losers.
"""

import argparse
import contextlib
import html
import importlib.metadata
import io
import json
import math
import platform
import re
import shlex
import shutil
import signal
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

# 1  Inversion

# Above this noise level a latent is noise to any model: steps that end there are first order, and no free node is
# spent there. Only zero-terminal-SNR schedules reach it (Stable Diffusion's own ends at 14.6).
HIGHEST_RESOLVED_LEVEL = 20.0
KARRAS_RHO = 7.0  # Karras et al. 2022 (arXiv 2206.00364), equation 5
LARGEST_HISTORY_WEIGHT = 2.0
PREDICTION_TYPES = ("epsilon", "v_prediction")

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Trajectory(NamedTuple):
    """One inversion pass, seen at its M targets per sample.

    Attributes:
        timesteps: (M, N) int64, the targets.
        latents: (M, N, C, h, w), the inverted latents x_t.
        noise: (M, N, C, h, w), the implied noise tau_t = (x_t - alpha_t x_0) / sigma_t: predicting it at (x_t, t)
            makes the one-step estimate of x_0 exact. This is the target that the policy is trained on.
        predicted: (M, N, C, h, w), the inverter's own noise predictions at (x_t, t), or None if not asked for.
    """

    timesteps: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor
    predicted: torch.Tensor | None


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a tensor, without waiting where it goes to an accelerator."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def alpha_sigma(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, like: torch.Tensor):
    """Returns alpha_t and sigma_t (..., 1, 1, 1) for timesteps (...), on the device and in the dtype of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)  # in half precision 1 - abar is wrong or zero at small t
    table = to_device(alphas_cumprod.to(dtype), like.device)
    abar = table[to_device(timesteps, like.device)][..., None, None, None]
    return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """Returns x_t = alpha_t x_0 + sigma_t noise.

    Args:
        latents: (N, C, h, w), x_0.
        noise: (..., N, C, h, w).
        timesteps: (..., N) int64.
        alphas_cumprod: (T,), the noise schedule.
    """
    alpha, sigma = alpha_sigma(timesteps, alphas_cumprod, latents)
    return alpha * latents + sigma * noise


def noise_from_model_output(
    model_output: torch.Tensor,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """Returns the noise that a model's output stands for **at its own (x_t, t)**, float32 or wider.

    v-prediction (Salimans & Ho 2022, arXiv 2202.00512) is v = alpha_t eps - sigma_t x_0, so that
    eps = sigma_t x_t + alpha_t v.

    Args:
        model_output: (N, C, h, w), what the network returned for (x_t, timesteps).
        x_t: (N, C, h, w), what the network was shown.
        timesteps: (N,) int64.
        alphas_cumprod: (T,), the noise schedule.
        prediction_type: "epsilon" or "v_prediction", as in the scheduler's configuration.

    Raises:
        ValueError: for any other prediction type.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; supported are 'epsilon' and 'v_prediction'")
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    if prediction_type == "epsilon":
        return model_output.to(dtype)
    alpha, sigma = alpha_sigma(timesteps, alphas_cumprod, x_t.to(dtype))
    return sigma * x_t + alpha * model_output


def inversion_nodes(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, num_steps: int, spacing: str = "karras"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places the nodes of an inversion: per sample, `num_steps` timesteps that contain all of its targets.

    Node 0 is the clean image; nodes 1..n are returned. Every interval between neighbouring targets (the first begins
    at t = 0) is divided evenly in s^(1/7) or in t, and the free nodes go one by one to the interval whose pieces are
    then the longest. A division falls on the timestep nearest to it. Repeated nodes are steps of length zero.

    Args:
        timesteps: (M, N) int64, sorted along M: the targets of each of N samples.
        alphas_cumprod: (T,), the noise schedule.
        num_steps: n >= M.
        spacing: "karras" divides evenly in s^(1/7), "uniform" in t.

    Returns:
        nodes: (n, N) int64 on the CPU, the timestep of node k + 1 in row k.
        target_index: (M, N) int64 on the CPU, from 1 to n: the node that is target m, so that
            `nodes.gather(0, target_index - 1)` equals `timesteps`. The last target is node n.

    Raises:
        ValueError: if an argument has a wrong shape, dtype or range.
    """
    _check_nodes(timesteps, alphas_cumprod, num_steps, spacing)
    timesteps = timesteps.long().cpu()
    num_targets, num_samples = timesteps.shape
    if spacing == "karras":
        coordinate = noise_levels(alphas_cumprod).clamp(max=HIGHEST_RESOLVED_LEVEL) ** (1 / KARRAS_RHO)
    else:
        coordinate = torch.arange(len(alphas_cumprod), dtype=torch.float64)

    ends = timesteps
    starts = torch.cat([torch.zeros_like(timesteps[:1]), timesteps[:-1]])
    lengths = coordinate[ends] - coordinate[starts]
    pieces = torch.ones_like(timesteps)
    samples = torch.arange(num_samples)
    for _ in range(num_steps - num_targets):
        pieces[(lengths / pieces).argmax(0), samples] += 1

    target_index = pieces.cumsum(0)
    number = torch.arange(1, num_steps + 1)[:, None].expand(-1, num_samples)
    interval = (target_index[None] < number[:, None]).sum(1)  # (n, N): the interval that each node ends a piece of
    start, end, count = (x.gather(0, interval) for x in (starts, ends, pieces))
    piece = number - (target_index.gather(0, interval) - count)  # 1..count
    position = torch.lerp(coordinate[start], coordinate[end], piece / count.double())
    above = torch.searchsorted(coordinate, position).clamp(1, len(coordinate) - 1)
    nearest = torch.where(coordinate[above] - position < position - coordinate[above - 1], above, above - 1)
    nodes = torch.where(piece == count, end, nearest.clamp(start, end))
    return nodes, target_index


def _check_nodes(timesteps, alphas_cumprod, num_steps, spacing) -> None:
    if alphas_cumprod.ndim != 1 or alphas_cumprod.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"alphas_cumprod has shape {tuple(alphas_cumprod.shape)} and dtype {alphas_cumprod.dtype}; needed: (T,), "
            "float32 or float64 (half precision makes sigma_0 wrong or zero: keep a copy of your own)"
        )
    if timesteps.is_floating_point() or timesteps.dtype == torch.bool:
        raise ValueError(f"timesteps have dtype {timesteps.dtype}; needed: integers")
    if timesteps.ndim != 2 or timesteps.numel() == 0:
        raise ValueError(f"timesteps have shape {tuple(timesteps.shape)}; needed: (N,) or (M, N), not empty")
    if timesteps.min() < 0 or timesteps.max() >= len(alphas_cumprod):
        lowest, highest = int(timesteps.min()), int(timesteps.max())
        raise ValueError(f"timesteps reach from {lowest} to {highest}; allowed: 0 to {len(alphas_cumprod) - 1}")
    falls = (timesteps[1:] < timesteps[:-1]).any(0)
    if falls.any():
        sample = int(falls.int().argmax())
        raise ValueError(f"timesteps of sample {sample} are {timesteps[:, sample].tolist()}; needed: sorted along M")
    if not isinstance(num_steps, int) or num_steps < len(timesteps):
        raise ValueError(
            f"num_steps is {num_steps!r}; needed: an int, at least the number of targets, {len(timesteps)}"
        )
    if spacing not in ("karras", "uniform"):
        raise ValueError(f"spacing is {spacing!r}; allowed: 'karras', 'uniform'")


def noise_levels(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Returns s_t = sigma_t / alpha_t, (T,) float64 on the CPU; infinite where alpha_t is 0."""
    alphas_cumprod = alphas_cumprod.double().cpu()
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def _step_weights(nodes: torch.Tensor, levels: torch.Tensor, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, per step and sample, the ratio s_p / s_q (n, N) and the history weight w (n, N), both float64.

    Step k goes from level p, node k, to level q, node k + 1. w makes the estimate E = e_p + w (e_p - e_o) the mean
    over the step of the line through e_o and e_p in log s (Adams-Bashforth of second order): with r = s_q / s_p,
    w = (r ln r / (r - 1) - 1) / ln(s_p / s_o).
    """
    s_q = levels[nodes]
    s_p = torch.cat([torch.zeros_like(s_q[:1]), s_q[:-1]])
    repeated = s_p == s_q
    ratio = torch.where(repeated, 1.0, s_p / s_q)
    ratio[0] = 0.0  # from the clean image tau = E, whatever the level
    weight = torch.zeros_like(ratio)
    if order == 1:
        return ratio, weight
    s_o = levels[0].expand(nodes.shape[1])  # the first evaluation is eps(x_0, 0)
    for k in range(1, len(nodes)):
        r = s_q[k] / s_p[k]
        w = (r * r.log() / (r - 1) - 1) / (s_p[k] / s_o).log()
        usable = (s_p[k] > s_o) & (s_q[k] > s_p[k]) & (s_q[k] <= HIGHEST_RESOLVED_LEVEL)
        weight[k] = torch.where(usable, w.clamp(0, LARGEST_HISTORY_WEIGHT), 0.0)
        s_o = torch.where(repeated[k], s_o, s_p[k])
    return ratio, weight


@torch.no_grad()
def invert(
    predict: Predict,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    num_steps: int = 8,
    *,
    order: int = 2,
    spacing: str = "karras",
    predict_at_targets: bool = False,
) -> Trajectory:
    """Inverts clean latents to chosen timesteps along the model's own DDIM trajectory (eta = 0).

    DDIM (Song et al. 2021, arXiv 2010.02502, equation 12) from level p to level q moves x / alpha by s_q - s_p along a
    noise estimate E. Carrying the implied noise tau as the state, this reads

        tau_q = E + (s_p / s_q) (tau_p - E),      x_q = alpha_q x_0 + sigma_q tau_q

    The model is always called at the level that the latent really has: E is its prediction there, extrapolated to
    second order with the prediction before (Adams-Bashforth in log s). The first call shows it x_0 itself at t = 0.

    Args:
        predict: (x_t (N, C, h, w), timesteps (N,) int64) -> noise prediction (N, C, h, w). Bind model, prompt and
            guidance to it; see `noise_from_model_output` for v-prediction. Without guidance the inversion is accurate;
            at guidance 2 its error triples.
        latents: (N, C, h, w), the clean, scaled latents x_0. The state is kept in float32, or float64 if they are.
        timesteps: (N,) integers, each sample's target from 0 to T - 1; or (M, N), M targets per sample, sorted along
            M, all reached exactly on the way to the last.
        alphas_cumprod: (T,) float32 or float64, the noise schedule. Keep it and the timesteps on the CPU: reading them
            there waits for no device.
        num_steps: n >= M, the number of steps, each one call of `predict`. M + 4 or more is recommended.
        order: 2, or 1 for plain Euler steps.
        spacing: "karras" (evenly in s^(1/7)) or "uniform" (evenly in t); see `inversion_nodes`.
        predict_at_targets: also return the predictions at the targets. All but the last come with the inversion; the
            last takes one call more, n + 1 in all.

    Returns:
        The `Trajectory`, on the device of `latents`.

    Raises:
        ValueError: if an argument has a wrong shape, dtype or range.
    """
    timesteps = timesteps[None] if timesteps.ndim == 1 else timesteps
    if latents.ndim != 4 or not latents.is_floating_point():
        shape, dtype = tuple(latents.shape), latents.dtype
        raise ValueError(f"latents have shape {shape} and dtype {dtype}; needed: (N, C, h, w), floating point")
    if timesteps.ndim != 2 or timesteps.shape[1] != len(latents):
        shape = tuple(timesteps.shape)
        raise ValueError(f"timesteps have shape {shape}; needed: (N,) or (M, N) with N = {len(latents)}")
    if order not in (1, 2):
        raise ValueError(f"order is {order!r}; allowed: 1, 2")
    latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
    nodes, target_index = inversion_nodes(timesteps, alphas_cumprod, num_steps, spacing)
    ratio, weight = _step_weights(nodes, noise_levels(alphas_cumprod), order)
    abar = alphas_cumprod.double().cpu()[nodes]
    tables = torch.stack([abar.sqrt(), (1 - abar).sqrt(), ratio, weight, (ratio != 1).double()]).to(latents.dtype)
    alpha, sigma, ratio, weight, moves = to_device(tables, latents.device)[..., None, None, None]
    node_timesteps = to_device(torch.cat([torch.zeros_like(nodes[:1]), nodes]), latents.device)
    # targets_at[k]: which targets m of which samples i are node k, (2, number of them)
    by_node, counts = target_index.flatten().argsort(), target_index.flatten().bincount(minlength=num_steps + 1)
    targets_at = torch.stack([by_node // len(latents), by_node % len(latents)])
    targets_at = to_device(targets_at, latents.device).split(counts.tolist(), dim=1)
    shape = (*timesteps.shape, *latents.shape[1:])
    states, noise = latents.new_empty(shape), latents.new_empty(shape)
    predicted = latents.new_empty(shape) if predict_at_targets else None

    x, tau, e_o = latents, torch.zeros_like(latents), torch.zeros_like(latents)
    for k in range(num_steps + int(predict_at_targets)):
        e_p = predict(x, node_timesteps[k]).to(latents.dtype)
        if e_p.shape != x.shape:
            raise ValueError(f"predict returned shape {tuple(e_p.shape)}; needed: that of x_t, {tuple(x.shape)}")
        m, i = targets_at[k]
        if predict_at_targets:
            predicted[m, i] = e_p[i]
        if k == num_steps:
            break
        estimate = e_p + weight[k] * (e_p - e_o)
        tau = torch.lerp(estimate, tau, ratio[k])
        x = alpha[k] * latents + sigma[k] * tau
        e_o = torch.lerp(e_o, e_p, moves[k])  # a step of length zero does not enter the history
        m, i = targets_at[k + 1]
        states[m, i], noise[m, i] = x[i], tau[i]
    return Trajectory(to_device(timesteps.long(), latents.device), states, noise, predicted)


# 2  Objectives

LOSS_TYPES = ("sigmoid", "hinge", "ipo")


def sample_timesteps(uniforms: torch.Tensor, min_timestep: int, max_timestep: int) -> torch.Tensor:
    """Returns timesteps drawn uniformly from min..max (inclusive), one from each of M equal strata, (M, B) int64.

    Args:
        uniforms: (M, B) in [0, 1), a random number per stratum and pair.
        min_timestep, max_timestep: the band of training timesteps.

    Raises:
        ValueError: if the band is empty.
    """
    if min_timestep > max_timestep:
        raise ValueError(f"min_timestep is {min_timestep}, max_timestep {max_timestep}; needed: min <= max")
    strata = torch.arange(len(uniforms), dtype=torch.float64)[:, None]
    width = max_timestep - min_timestep + 1
    offset = ((strata + uniforms.double()) / len(uniforms) * width).floor().long()
    return min_timestep + offset.clamp(max=width - 1)


def prediction_error(noise_prediction: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared error of each example: (..., C, h, w) twice -> (...) in float32.

    Raises:
        ValueError: if the shapes differ.
    """
    if noise_prediction.shape != noise.shape:
        raise ValueError(f"shapes differ: {tuple(noise_prediction.shape)} and {tuple(noise.shape)}")
    return (noise_prediction.float() - noise.float()).square().mean(dim=(-3, -2, -1))


def preference_loss(
    policy_error: torch.Tensor,
    reference_error: torch.Tensor,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the preference loss of each pair and its metrics (Wallace et al. 2023, arXiv 2311.12908, equation 14).

    With the log-ratio a = -(policy_error - reference_error), positive where the policy predicts better than the
    reference, the logits are (beta / 2) (a_w - a_l). Minimising the loss lowers the winner's error and raises the
    loser's.

        sigmoid  -log sigmoid(logits); with label smoothing e: -(1 - e) log sigmoid(logits) - e log sigmoid(-logits)
        hinge    relu(1 - logits)                   (SLiC, arXiv 2305.10425)
        ipo      (logits - 1/2)^2                   (IPO, arXiv 2310.12036, in scaled form)

    Args:
        policy_error, reference_error: (..., 2B), the B winners first, then the B losers.
        beta: the tie to the reference, "beta T omega" in Diffusion-DPO: larger keeps the policy closer.
        loss_type: "sigmoid", "hinge" or "ipo".
        label_smoothing: in [0, 0.5), the share of labels believed wrong; sigmoid only.

    Returns:
        loss: (..., B), not reduced.
        metrics: detached (..., B): rewards/chosen = (beta / 2) a_w, rewards/rejected = (beta / 2) a_l,
            rewards/accuracies (a tie counts one half) and rewards/margins = chosen - rejected, the logits.

    Raises:
        ValueError: for an unknown loss type, label smoothing with a loss that has none, or errors of odd shape.
    """
    if policy_error.shape != reference_error.shape or policy_error.ndim == 0 or policy_error.shape[-1] % 2:
        raise ValueError(
            f"policy_error has shape {tuple(policy_error.shape)}, reference_error {tuple(reference_error.shape)}; "
            "needed: both (..., 2B)"
        )
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}; allowed: {', '.join(LOSS_TYPES)}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type != "sigmoid"):
        raise ValueError(f"label_smoothing is {label_smoothing}; allowed: [0, 0.5), and only with loss_type 'sigmoid'")
    rewards = beta / 2 * (reference_error - policy_error)
    chosen, rejected = rewards.chunk(2, dim=-1)
    logits = chosen - rejected
    if loss_type == "sigmoid":
        loss = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    elif loss_type == "hinge":
        loss = F.relu(1 - logits)
    else:
        loss = (logits - 0.5).square()
    metrics = {
        "rewards/chosen": chosen.detach(),
        "rewards/rejected": rejected.detach(),
        "rewards/accuracies": (logits.detach().sign() + 1) / 2,
        "rewards/margins": logits.detach(),
    }
    return loss, metrics


def backward_in_chunks(
    error_chunks: list[Callable[[], torch.Tensor]],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
    no_sync: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """Back-propagates a loss of all targets' errors with the graph of one chunk of targets in memory at a time.

    The loss depends on the policy only through its errors, so a first pass without gradient gives the errors and the
    loss's gradient by them, and a second pass runs forward and backward chunk by chunk, weighted by that gradient. It
    equals keeping all graphs, for any loss, at the cost of one more forward. A single chunk needs one pass only.

    Args:
        error_chunks: callables that compute the policy's errors, (m, 2B) each, with their graph.
        loss_of: (M, 2B) errors -> scalar loss.
        backward: called with each scalar to be back-propagated.
        no_sync: context for every pass but the last, in which gradients of several processes are not yet reduced.
    """
    if len(error_chunks) == 1:
        backward(loss_of(error_chunks[0]()))
        return
    with torch.no_grad(), no_sync():
        errors = [chunk() for chunk in error_chunks]
    leaf = torch.cat(errors).requires_grad_()
    gradients = torch.autograd.grad(loss_of(leaf), leaf)[0].split([len(error) for error in errors])
    for i, (chunk, gradient) in enumerate(zip(error_chunks, gradients, strict=True)):
        with contextlib.nullcontext() if i == len(error_chunks) - 1 else no_sync():
            backward((chunk() * gradient).sum())


# 3  Preference pairs


class Pair(NamedTuple):
    """A winner and a loser, as anything `decode_image` takes, and their caption."""

    winner: Any
    loser: Any
    caption: str


class BadRow(Exception):
    """A data row that cannot become a training example; the message says why."""


def one_line(error: Exception) -> str:
    """Returns the beginning of an error's message, for a message of our own."""
    return " ".join(str(error).split())[:300]


def load_rows(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
):
    """Returns the `datasets.Dataset` of a split: of a data set by name, or of a local folder.

    Args:
        dataset_name, dataset_config_name: whatever `datasets.load_dataset` takes.
        train_data_dir: instead of a name, a folder that `save_to_disk` wrote, or one with parquet files.

    Raises:
        ValueError: if there is nothing to load, in one line that names the option.
    """
    from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()
    source = f"--dataset_name {dataset_name}" if dataset_name else f"--train_data_dir {train_data_dir}"
    try:
        if dataset_name:
            rows = load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
        elif not (folder := Path(train_data_dir)).is_dir():
            raise FileNotFoundError("no such folder")
        elif (folder / "state.json").exists():
            rows = load_from_disk(folder)
        elif (folder / "dataset_dict.json").exists():
            rows = load_from_disk(folder / split)
        elif files := parquet_files(folder, split):
            rows = load_dataset("parquet", data_files={split: files}, split=split, cache_dir=cache_dir)
        else:
            raise FileNotFoundError("the folder holds no parquet files of this split, nor what save_to_disk writes")
    except Exception as error:  # `datasets` raises a dozen kinds, its own and those of pyarrow, fsspec and the Hub
        raise ValueError(f"{source}, split {split!r}, cannot be loaded: {one_line(error)}") from error
    if isinstance(rows, DatasetDict) or not hasattr(rows, "column_names"):
        raise ValueError(f"{source} is not a single split of a map-style data set")
    return rows


def parquet_files(folder: Path, split: str) -> list[str]:
    """Returns the folder's parquet files of a split: named after it, or in a folder that is; for "train" else all."""
    files = sorted(folder.rglob("*.parquet"))
    own = [f for f in files if f.name.startswith(split) or split in f.relative_to(folder).parent.parts]
    return [str(file) for file in own or (files if split == "train" else [])]


def _check_column_type(option: str, column: str, feature) -> None:
    """Raises ValueError if a column of images or captions holds something else."""
    kind = str(getattr(feature, "dtype", feature))
    text, needed = {"string", "large_string"}, "text"
    if "image" in option:
        text, needed = text | {"binary", "large_binary", "PIL.Image.Image"}, "images, encoded bytes or paths"
        if isinstance(feature, dict) and {"bytes", "path"} & feature.keys():
            return
    elif "caption" not in option:
        return
    if kind not in text:
        raise ValueError(f"{option} {column}: the column holds {kind}; needed: {needed}")


class LabelledPairs:
    """Preference pairs in Pick-a-Pic's shape: each row has two images, a caption, and a label for image 0.

    Label 1 means that image 0 won, 0 that image 1 won, and 0.5 is a tie. Ties and rows without a valid label are left
    out and counted. Another shape of data is another class with `__len__`, `__getitem__` that returns a `Pair` or
    raises `BadRow`, `row_name` and `counts`.

    Args:
        rows: a `datasets.Dataset`.
        image_0_column, image_1_column, label_column, caption_column: the names of its columns.
        max_pairs: keep the first so many pairs; all if None.

    Raises:
        ValueError: if a column is missing, or no pair is left.
    """

    def __init__(self, rows, image_0_column, image_1_column, label_column, caption_column, max_pairs=None):
        from datasets import Image as ImageFeature

        columns = {
            "--image_0_column": image_0_column,
            "--image_1_column": image_1_column,
            "--label_column": label_column,
            "--caption_column": caption_column,
        }
        for option, column in columns.items():
            if column not in rows.column_names:
                found = ", ".join(rows.column_names)
                raise ValueError(f"{option} {column}: the data has no such column, only {found}")
        rows = rows.select_columns(list(dict.fromkeys(columns.values())))
        for option, column in columns.items():
            _check_column_type(option, column, rows.features[column])
        for column in (image_0_column, image_1_column):
            if isinstance(rows.features[column], ImageFeature):  # decode in the workers, where errors can name the row
                rows = rows.cast_column(column, ImageFeature(decode=False))
        self.rows = rows
        self.image_columns = (image_0_column, image_1_column)
        self.label_column, self.caption_column = label_column, caption_column

        labels = rows.select_columns([label_column]).with_format("arrow")[:].column(0).to_pylist()
        kinds = np.array([label if label in (0, 0.5, 1) else np.nan for label in labels], dtype=float)
        self.num_ties = int((kinds == 0.5).sum())
        self.num_unlabelled = int(np.isnan(kinds).sum())
        self.kept = np.flatnonzero((kinds == 0) | (kinds == 1))[:max_pairs]
        if len(self.kept) == 0:
            seen = ", ".join(dict.fromkeys(repr(label) for label in labels[:1000]))[:100]
            raise ValueError(
                f"no pair is left of {len(labels)} rows: {self.num_ties} ties, {self.num_unlabelled} labels that are "
                f"none of 0, 0.5, 1 (--label_column {label_column} begins with {seen or 'nothing'})"
            )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[int(self.kept[index])]
        caption = row[self.caption_column]
        if not isinstance(caption, str) or not caption.strip():
            raise BadRow(f"the caption is {caption!r}")
        image_0, image_1 = (row[column] for column in self.image_columns)
        winner, loser = (image_0, image_1) if row[self.label_column] == 1 else (image_1, image_0)
        return Pair(winner, loser, caption)

    def row_name(self, index: int) -> str:
        return f"row {self.kept[index]}"

    def counts(self) -> dict[str, int]:
        """Returns what the data hold, in words for people."""
        return {"pairs": len(self), "ties left out": self.num_ties, "rows without a label": self.num_unlabelled}


def decode_image(value: Any) -> Image.Image:
    """Returns an upright RGB image from encoded bytes, a path, a `datasets` image ({"bytes", "path"}) or a PIL image.

    EXIF orientation is applied, transparency becomes white.

    Raises:
        BadRow: if there is no image to be read.
    """
    try:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, Image.Image):
            if not isinstance(value, bytes | str):
                raise TypeError(f"the image is of type {type(value).__name__}")
            value = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        image = ImageOps.exif_transpose(value)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # PIL raises nearly every kind on damaged files
        raise BadRow(f"unreadable image ({type(error).__name__}: {error})") from error


class View(NamedTuple):
    """A square window of an image, and where it lies, as SDXL is told (arXiv 2307.01952, section 2.2).

    Attributes:
        pixels: (3, resolution, resolution) in [-1, 1].
        original_size: (height, width) of the whole image, in its own pixels.
        corner: (top, left) of the window, in pixels of the resized image.
    """

    pixels: torch.Tensor
    original_size: tuple[int, int]
    corner: tuple[int, int]


def resize_and_crop(image: Image.Image, resolution: int, crop: tuple[float, float], flip: bool) -> View:
    """Returns a square window of the image, whose shorter side becomes `resolution`.

    `crop` (top, left) in [0, 1] places the square in what is left over, relatively, so that two images of other shapes
    are cut alike: 0.5 is the centre. The image is mirrored before it is cut, so `corner` belongs to what is seen.
    """
    original_size = (image.height, image.width)
    image = ImageOps.mirror(image) if flip else image
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = round(crop[0] * (height - resolution)), round(crop[1] * (width - resolution))
    pixels = np.asarray(image, dtype=np.float32)[top : top + resolution, left : left + resolution] / 127.5 - 1
    return View(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), original_size, (top, left))


def visit_rng(seed: int, visit: int, purpose: int = 0) -> np.random.Generator:
    """Returns the random numbers of one visit: the running number of a pair over the whole run.

    Draws that depend on nothing else are the same for any number of processes, any accumulation and after any restart.
    """
    return np.random.default_rng([seed, purpose, visit])


class PreferenceDataset(torch.utils.data.Dataset):
    """Training examples by (visit, index): pixels and all random draws of that visit.

    `self[visit, index]` is a dict with
        visit: the running number of the pair over the run;
        row: its name;
        pixel_values: (2, 3, resolution, resolution) in [-1, 1], winner and loser, cropped and flipped alike;
        original_sizes, corners: (2, 2) int64, of winner and loser, see `View`;
        caption: str, empty for a share `proportion_empty_prompts` of the visits;
        uniforms: (M,) float64 in [0, 1), from which `sample_timesteps` makes the training timesteps;
        bad_rows: list of (name, reason) of unreadable pairs that this visit met and replaced by another.
    """

    MAX_ATTEMPTS = 100

    def __init__(self, pairs, resolution, num_targets, seed, random_crop, random_flip, proportion_empty_prompts):
        self.pairs, self.resolution, self.num_targets, self.seed = pairs, resolution, num_targets, seed
        self.random_crop, self.random_flip = random_crop, random_flip
        self.proportion_empty_prompts = proportion_empty_prompts

    def __getitem__(self, visit_and_index: tuple[int, int]) -> dict[str, Any]:
        visit, index = visit_and_index
        rng = visit_rng(self.seed, visit)
        top, left, flip, empty, *uniforms = rng.random(4 + self.num_targets)
        crop = (top, left) if self.random_crop else (0.5, 0.5)
        flip = self.random_flip and flip < 0.5
        bad_rows = []
        for _ in range(self.MAX_ATTEMPTS):
            try:
                pair = self.pairs[index]
                images = [decode_image(image) for image in (pair.winner, pair.loser)]
                break
            except BadRow as error:
                bad_rows.append((self.pairs.row_name(index), str(error)))
                index = int(rng.integers(len(self.pairs)))
        else:
            name, reason = bad_rows[0]
            raise RuntimeError(f"{self.MAX_ATTEMPTS} pairs drawn in a row are unreadable; the first: {name}, {reason}")
        views = [resize_and_crop(image, self.resolution, crop, flip) for image in images]
        return {
            "visit": visit,
            "row": self.pairs.row_name(index),
            "pixel_values": torch.stack([view.pixels for view in views]),
            "original_sizes": torch.tensor([view.original_size for view in views]),
            "corners": torch.tensor([view.corner for view in views]),
            "caption": "" if empty < self.proportion_empty_prompts else pair.caption,
            "uniforms": torch.tensor(uniforms, dtype=torch.float64),
            "bad_rows": bad_rows,
        }


class VisitBatches:
    """An endless batch sampler of (visit, index) for one process of several; pass it as `batch_sampler`.

    Visit v of the run is the pair at place v mod P of epoch v div P's permutation (P pairs). The processes take turns,
    a batch each, so any division of an update's visits into processes and accumulation steps covers the same pairs,
    and a restart only has to name its first visit.
    """

    def __init__(self, num_pairs, batch_size, seed, first_visit=0, process_index=0, num_processes=1):
        self.num_pairs, self.batch_size, self.seed = num_pairs, batch_size, seed
        self.first_visit = first_visit + process_index * batch_size
        self.stride = num_processes * batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = None, None
        first = self.first_visit
        while True:
            batch = []
            for visit in range(first, first + self.batch_size):
                if visit // self.num_pairs != epoch:
                    epoch = visit // self.num_pairs
                    order = np.random.default_rng([self.seed, 2, epoch]).permutation(self.num_pairs)
                batch.append((visit, int(order[visit % self.num_pairs])))
            yield batch
            first += self.stride


def forward_noise(visits: list[int], seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns standard normal noise (M, 2B, C, h, w), drawn by visit, the same for winner and loser.

    Args:
        visits: the B visits of the batch.
        shape: (M, C, h, w), of one pair's noise.
    """
    generators = (torch.Generator().manual_seed(int(visit_rng(seed, visit, 1).integers(2**62))) for visit in visits)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators], dim=1)
    return torch.cat([noise, noise], dim=1)


class RowLog:
    """Counts distinct rows by name, with a reason each, and warns of the first few."""

    def __init__(self, warn: Callable[[str], None], what: str, known: dict[str, str], named: int = 10):
        self.warn, self.what, self.named, self.reasons = warn, what, named, dict(known)

    def add(self, rows: list[tuple[str, str]]) -> None:
        for name, reason in rows:
            if name not in self.reasons and len(self.reasons) < self.named:
                self.warn(f"{name} {self.what}: {reason}")
            self.reasons[name] = reason


# 4  Training


def number(kind: type, *, least=-math.inf, above=-math.inf, most=math.inf, below=math.inf) -> Callable[[str], Any]:
    """Returns an argparse type: a finite int or float within the bounds."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    allowed = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))

    def parse(text):
        value = kind(text)
        if not (least <= value <= most and above < value < below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"is {text}; allowed: {allowed}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `kind` itself cannot read the text
    return parse


LORA_FILE = "pytorch_lora_weights.safetensors"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "training_state.json"  # of a checkpoint
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


def map_condition(function: Callable, *conditions: dict[str, Any]) -> dict[str, Any]:
    """Applies a function to every tensor of a (nested) conditioning dict, or to the matching tensors of several."""
    mapped = {}
    for key, value in conditions[0].items():
        values = [condition[key] for condition in conditions]
        mapped[key] = map_condition(function, *values) if isinstance(value, dict) else function(*values)
    return mapped


@contextlib.contextmanager
def reference_policy(unet) -> Iterator[None]:
    """Within it, `unet` is the reference policy: the same weights with the LoRA switched off."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


@torch.no_grad()
def encode_images(vae, pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Returns scaled latents (N, C, h, w) in float32, the mode of the VAE's posterior, for pixels (N, 3, H, W)."""
    pixel_values = to_device(pixel_values, vae.device).to(vae.dtype)
    latents = [vae.encode(chunk).latent_dist.mode() for chunk in pixel_values.split(batch_size)]
    return torch.cat(latents).float() * vae.config.scaling_factor


def finite_pairs(latents: torch.Tensor) -> torch.Tensor:
    """Returns (2B,) bool: whether both latents of a sample's pair are finite, for latents (2B, C, h, w)."""
    is_finite = latents.isfinite().flatten(1).all(1)
    return is_finite.view(2, -1).all(0).repeat(2)


def tokenize(tokenizers: Sequence, captions: list[str]) -> list[torch.Tensor]:
    """Returns token ids (B, L) of each tokenizer, padded and cut to the text encoder's length."""
    return [
        tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        for tokenizer in tokenizers
    ]


def cut_captions(tokenizers: Sequence, examples: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns (row name, what happened) of the examples whose captions are longer than the text encoders read."""
    longest = min(tokenizer.model_max_length for tokenizer in tokenizers)
    lengths = [len(tokenizers[0](example["caption"], verbose=False).input_ids) for example in examples]
    return [
        (example["row"], f"{length} tokens, of which {longest} are read")
        for example, length in zip(examples, lengths, strict=True)
        if length > longest
    ]


class StopSignal:
    """Remembers the first SIGTERM or SIGINT instead of dying of it, so that the loop can save and stop.

    A second one finds the handlers that were there before, and ends the process if they do.
    """

    def __init__(self, announce: Callable[[str], None]):
        self.received = 0  # the signal's number
        self.announce = announce
        self._handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def _remember(self, number, frame):
        self.received = number
        self.restore()
        self.announce(f"{signal.Signals(number).name}: stopping after this update; once more to stop at once")

    def restore(self) -> None:
        """Gives the signals back to whoever handled them before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


class RunningMeans:
    """Means of metrics over the batches of an update, kept on the device until they are asked for."""

    def __init__(self):
        self._values = {}

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float().mean())

    def pop(self, accelerator) -> dict[str, float]:
        """Returns the means over batches and processes, and starts anew; this waits for the device, once an update."""
        means = torch.stack([torch.stack(values).mean() for values in self._values.values()])
        names, self._values = list(self._values), {}
        return dict(zip(names, accelerator.reduce(means, reduction="mean").tolist(), strict=True))


def leave_signals_to_the_main_process(worker: int) -> None:
    """A `worker_init_fn`: a signal may reach all processes of a group; workers must last until the update is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def check_lora_targets(unet_config: dict[str, Any], targets: list[str]) -> None:
    """Raises ValueError unless a LoRA fits on what is named, for a U-Net of this configuration; loads no weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    names = [f".{name}" for name, _ in unet.named_modules()]
    try:
        add_lora(unet, 1, 1, targets)
        for target in targets if len(targets) > 1 else []:
            if not any(name.endswith(f".{target}") for name in names):
                raise ValueError(f"no module of the U-Net is called {target}")
    except (ValueError, re.error) as error:
        raise ValueError(f"--lora_target_modules {' '.join(targets)}: {one_line(error)}") from error


def add_lora(unet, rank: int, lora_alpha: float, targets: Sequence[str] = LORA_TARGETS) -> list[torch.nn.Parameter]:
    """Adds a LoRA in float32 to a U-Net, freezes all else, and returns the LoRA's parameters.

    Args:
        targets: the modules' names, or the ends of their names; or a single regular expression that matches names
            as a whole. By default the attention projections.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.requires_grad_(False)
    is_pattern = len(targets) == 1 and any(character in targets[0] for character in "*+?|()[]^$\\")
    modules = targets[0] if is_pattern else list(targets)
    config = LoraConfig(r=rank, lora_alpha=lora_alpha, init_lora_weights="gaussian", target_modules=modules)
    unet.add_adapter(config)
    cast_training_params(unet, dtype=torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def is_zero_lora(unet) -> bool:
    """Whether the U-Net's LoRA changes nothing: all its up-projections are zero, as they are before training."""
    return not any(value.any() for name, value in unet.named_parameters() if "lora_B" in name)


def save_lora(unet, folder: str | Path, pipeline_class) -> Path:
    """Writes the U-Net's LoRA to `folder`, loadable with `pipe.load_lora_weights(folder)`, and returns the file."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    partial = "partial_" + LORA_FILE
    pipeline_class.save_lora_weights(
        save_directory=folder,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        weight_name=partial,
        **_collate_lora_metadata({"unet": unet}),
    )
    return (Path(folder) / partial).replace(Path(folder) / LORA_FILE)


def load_lora(unet, folder: str | Path, pipeline_class) -> None:
    """Loads a LoRA that `save_lora` wrote into the U-Net's adapter "default", in float32.

    Raises:
        ValueError: if its parameters are not those of the U-Net's adapter (another rank, another model).
    """
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    state_dict, _ = pipeline_class.lora_state_dict(folder, weight_name=LORA_FILE)
    state_dict = {key.removeprefix("unet."): value.float() for key, value in state_dict.items()}
    state_dict = convert_unet_state_dict_to_peft(state_dict)
    expected = {key: value.shape for key, value in get_peft_model_state_dict(unet).items()}
    if expected != {key: value.shape for key, value in state_dict.items()}:
        raise ValueError(f"{Path(folder) / LORA_FILE} does not fit: it belongs to another model or another --rank")
    set_peft_model_state_dict(unet, state_dict, adapter_name="default")


def register_lora_checkpointing(accelerator, unet, pipeline_class) -> None:
    """Makes `accelerator.save_state` and `load_state` keep the LoRA instead of the whole U-Net."""

    def save_hook(models, weights, folder):
        if accelerator.is_main_process:
            save_lora(unet, folder, pipeline_class)
        if weights:
            weights.pop()

    def load_hook(models, folder):
        models.clear()
        load_lora(unet, folder, pipeline_class)

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def checkpoint_steps(output_dir: str | Path) -> dict[int, Path]:
    """Returns the complete checkpoints of a run by their step, in rising order."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(folder.name)]
    return dict(sorted((int(CHECKPOINT_NAME.fullmatch(folder.name)[1]), folder) for folder in folders))


class Checkpoint(NamedTuple):
    """Where a run stopped: a complete folder `checkpoint-<step>`.

    Attributes:
        folder: the folder.
        step: updates made.
        visit: the next pair visit, see `visit_rng`.
        num_pairs: pairs in the data, on which the order of the visits depends.
        options: the run's options by name.
        metrics: those of every update so far, with its "step".
        bad_rows, cut_captions: what happened to rows so far, by name, see `RowLog`.
    """

    folder: Path
    step: int
    visit: int
    num_pairs: int
    options: dict[str, Any]
    metrics: list[dict[str, float]]
    bad_rows: dict[str, str]
    cut_captions: dict[str, str]


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Checkpoint | None:
    """Returns the checkpoint to resume from, None to start anew.

    Args:
        resume_from_checkpoint: a folder `checkpoint-<step>`, by name within `output_dir` or by path; "latest", which
            is the newest in `output_dir`, or none if there is none yet; or None.

    Raises:
        ValueError: if the folder does not exist, is no checkpoint, or is not the newest of `output_dir`: going on from
            an older one would leave the newer ones of another course beside it.
    """
    if resume_from_checkpoint is None:
        return None
    newest = max(checkpoint_steps(output_dir).items(), default=(0, None))[1]
    if resume_from_checkpoint == "latest":
        if newest is None:
            return None
        folders = [newest]
    else:
        folders = [Path(output_dir) / resume_from_checkpoint, Path(resume_from_checkpoint)]
    for folder in folders:
        if CHECKPOINT_NAME.fullmatch(folder.name) and (folder / STATE_FILE).exists():
            if _is_within(folder, output_dir) and folder.name != newest.name:
                raise ValueError(
                    f"--resume_from_checkpoint {resume_from_checkpoint}: {newest.name} of the same run is newer; "
                    "move it away, or name another --output_dir"
                )
            try:
                return Checkpoint(folder, **json.loads((folder / STATE_FILE).read_text()))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{folder / STATE_FILE} is damaged: {error}") from error
    raise ValueError(
        f"--resume_from_checkpoint {resume_from_checkpoint}: no such checkpoint; allowed are 'latest' and a folder "
        f"checkpoint-<step> with {STATE_FILE} in it"
    )


def check_resumed_run(checkpoint: Checkpoint, num_pairs: int, options: dict[str, Any], free: set[str]) -> None:
    """Raises ValueError if a resumed run has other data or options than it began with, but for the `free` options."""
    if num_pairs != checkpoint.num_pairs:
        raise ValueError(
            f"the data have {num_pairs} pairs, but {checkpoint.folder} was made with {checkpoint.num_pairs}"
        )
    for name in checkpoint.options.keys() - free:
        before, now = checkpoint.options[name], options.get(name)
        if before != now:
            raise ValueError(f"--{name} is {now}, but {checkpoint.folder} was made with {before}; a run must keep it")


def save_checkpoint(accelerator, checkpoint: Checkpoint, total_limit: int | None) -> None:
    """Writes a checkpoint's folder whole or not at all, then removes the oldest beyond `total_limit`."""
    state = checkpoint._asdict()
    folder = state.pop("folder")
    partial = folder.with_name(f"partial-{folder.name}")
    if accelerator.is_main_process:
        for stale in folder.parent.glob("partial-checkpoint-*"):  # of a run that was killed while writing
            shutil.rmtree(stale)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE_FILE).write_text(json.dumps(state))
        partial.rename(folder)
        if total_limit is not None:
            for old in list(checkpoint_steps(folder.parent).values())[:-total_limit]:
                shutil.rmtree(old)


def _is_within(folder: Path, parent: str | Path) -> bool:
    return folder.resolve().parent == Path(parent).resolve()


def check_output_dir(output_dir: str | Path, checkpoint: Checkpoint | None) -> None:
    """Raises ValueError if the folder cannot be written, or holds another run than the one `checkpoint` continues."""
    folder = Path(output_dir)
    is_continued = checkpoint is not None and _is_within(checkpoint.folder, folder)
    checkpoints = [path.name for path in checkpoint_steps(folder).values()]
    found = checkpoints[-1:] + [name for name in RESULTS if (folder / name).exists()]
    if found and not is_continued:
        remedy = "continue that run with --resume_from_checkpoint latest" if checkpoints else "move it away"
        raise ValueError(f"--output_dir {output_dir} holds {found[0]} already; name another folder, or {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be written: {error}") from error


# 5  What a run leaves

CARD_FILE = "README.md"
CONFIG_FILE = "training_config.json"
REPORT_FILE = "report.png"
VALIDATION_DIR = "validation"
RESULTS = (LORA_FILE, CARD_FILE, CONFIG_FILE, REPORT_FILE)
PUSHED = (LORA_FILE, CARD_FILE, CONFIG_FILE, REPORT_FILE, f"{VALIDATION_DIR}/step-*.png")


class Validation:
    """Draws prompts with the LoRA off and on, from the same seeds, and writes them side by side as labelled pictures.

    The pipeline is made of the models that train; nothing is loaded twice. Training goes on as if nothing had been
    drawn: random state, mode and precision of the models are put back.

    Args:
        pipeline: a text-to-image pipeline with the U-Net that is trained.
        folder: pictures are written to `folder`/step-<step>-prompt-<number>.png.
        prompts: one picture each.
        num_images: samples per prompt; sample i has seed `seed` + i.
        sampling: keyword arguments of the pipeline's call.
        autocast: context of the U-Net's calls.
        warn: called with a line if a sample is not finite.
    """

    def __init__(self, pipeline, folder, prompts, num_images, seed, sampling, autocast, warn):
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.folder, self.prompts = pipeline, Path(folder), prompts
        self.seeds = range(seed, seed + num_images)
        self.sampling, self.autocast, self.warn = sampling, autocast, warn
        self._without = None  # the base model's samples never change

    def draw(self, step: int) -> list[Path]:
        """Returns the pictures' files, in the order of the prompts; none, and a warning, if they cannot be drawn."""
        from accelerate.utils.memory import clear_device_cache

        try:
            return self._draw(step)
        except Exception as error:  # out of memory, above all: no reason to lose what was trained
            self.warn(f"no validation pictures at step {step}, training goes on: {one_line(error)}")
            return []
        finally:
            clear_device_cache()

    def _draw(self, step: int) -> list[Path]:
        unet = self.pipeline.unet
        was_training = unet.training
        unet.eval()
        try:
            with torch.random.fork_rng(devices=[unet.device] if unet.device.type == "cuda" else []):
                if self._without is None:
                    with reference_policy(unet):
                        self._without = [self._sample(prompt) for prompt in self.prompts]
                with_lora = [self._sample(prompt) for prompt in self.prompts]
        finally:
            unet.train(was_training)
        self.folder.mkdir(exist_ok=True)
        files = [self.folder / f"step-{step:06}-prompt-{i}.png" for i in range(len(self.prompts))]
        for file, prompt, *samples in zip(files, self.prompts, self._without, with_lora, strict=True):
            draw_side_by_side(prompt, {"base model": samples[0], f"step {step}": samples[1]}, self.seeds).save(file)
        return files

    @torch.no_grad()
    def _sample(self, prompt: str) -> list[Image.Image | None]:
        """Returns a sample per seed, None for one that is not finite."""
        samples = []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on any device
            with self.autocast():
                latents = self.pipeline(prompt, generator=generator, output_type="latent", **self.sampling).images
            samples.append(decode_latents(self.pipeline.vae, latents))
        if None in samples:
            self.warn(f"validation: the model's output for {prompt!r} is not finite; try bf16 instead of fp16")
        return samples


def decode_latents(vae, latents: torch.Tensor) -> Image.Image | None:
    """Returns the picture of scaled latents (1, C, h, w), decoded in float32; None if they are not finite.

    Many VAEs turn pictures black in half precision, hence float32 here, whatever precision the VAE is kept in.
    """
    dtype, cast = vae.dtype, torch.nn.Module.to  # diffusers' own `to` warns at every change of precision
    cast(vae, torch.float32)
    try:
        pixels = vae.decode(latents.float() / vae.config.scaling_factor).sample[0]
    finally:
        cast(vae, dtype)
    if not pixels.isfinite().all():
        return None
    pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def draw_side_by_side(title: str, rows: dict[str, list[Image.Image | None]], columns: Iterator[int]) -> Image.Image:
    """Returns one picture with a row of samples per label, equal seeds below each other, `title` above."""
    columns = list(columns)
    sizes = [sample.width for samples in rows.values() for sample in samples if sample is not None]
    side, gap, left, line = min(512, max([256, *sizes])), 8, 104, 22
    font = ImageFont.load_default(15)
    width = left + len(columns) * (side + gap)
    title = textwrap.wrap(title, max(10, (width - 2 * gap) // 8)) or ["(empty prompt)"]
    top = gap + line * (len(title) + 1)
    canvas = Image.new("RGB", (width, top + len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, words in enumerate(title):
        pen.text((gap, gap + i * line), words, fill="black", font=font)
    for i, seed in enumerate(columns):
        pen.text(
            (left + i * (side + gap) + side / 2, top - line), f"seed {seed}", fill="#555555", font=font, anchor="ma"
        )
    for j, (label, samples) in enumerate(rows.items()):
        y = top + j * (side + gap)
        pen.text((left - gap, y + side / 2), label, fill="black", font=font, anchor="rm")
        for i, sample in enumerate(samples):
            box = (left + i * (side + gap), y)
            if sample is None:
                pen.rectangle((*box, box[0] + side, y + side), fill="#dddddd")
                pen.text((box[0] + side / 2, y + side / 2), "not finite", fill="black", font=font, anchor="mm")
            else:
                canvas.paste(ImageOps.pad(sample, (side, side), Image.Resampling.BICUBIC, "white"), box)
    return canvas


def log_pictures(accelerator, files: list[Path], step: int) -> None:
    """Shows pictures in those trackers that accelerate gives a common way to: tensorboard and wandb."""
    for tracker in accelerator.trackers:
        for file in files:
            name, picture = f"validation/{file.stem.split('-', 2)[2]}", np.asarray(Image.open(file))
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [picture]}, step=step)


def final_metrics(metrics: list[dict[str, float]], updates: int = 20) -> dict[str, float]:
    """Returns the mean of each metric over the last updates that were finite, and how many were not in all."""
    rows = [row for row in metrics if all(map(math.isfinite, row.values()))][-updates:]
    means = {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else {}) if name != "step"}
    return {**means, **({"bad_steps": metrics[-1]["bad_steps"]} if "bad_steps" in means else {})}  # which is a count


def draw_report(metrics: list[dict[str, float]], file: str | Path, title: str, loss_type: str) -> None:
    """Draws the course of a run: loss, accuracy, rewards and margin, policy and reference error.

    Args:
        metrics: a dict per update, with its "step" and the logged metrics by name.
        file: the picture to write.
        title: stands above it.
        loss_type: of the run, on which the loss of an untrained policy depends.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = {
        "loss": ["loss"],
        "implicit accuracy (says nothing of the pictures)": ["rewards/accuracies"],
        "rewards": ["rewards/margins", "rewards/chosen", "rewards/rejected"],
        "error of the noise prediction": ["policy_error", "reference_error"],
    }
    untrained_loss = preference_loss(torch.zeros(2), torch.zeros(2), 1.0, loss_type)[0].item()
    untrained = {"loss": untrained_loss, "rewards/accuracies": 0.5, "rewards/margins": 0.0}
    steps = np.array([row["step"] for row in metrics])
    window = max(1, len(steps) // 20)
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    figure.suptitle(f"{title}\nthin: each update, thick: mean over {window}; dotted: a policy equal to the reference")
    for axes, (name, keys) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for key, color in zip(keys, ("tab:blue", "tab:green", "tab:red"), strict=False):
            values = np.array([row[key] for row in metrics])
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.4)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1 :], smooth, color=color, linewidth=2, label=key)
            if key in untrained:
                axes.axhline(untrained[key], color="gray", linestyle=":")
        axes.set_title(name)
        axes.set_xlabel("update")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=100)


def is_local(name: str | None) -> bool:
    """Whether a model or data set is a folder of this machine, not a Hub id."""
    return name is not None and Path(name).exists()


def base_license(model: str, token: str | None = None) -> dict[str, str]:
    """Returns the licence entries of a model's card, from its folder or the Hub; {} where they are not known."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(Path(model) / CARD_FILE if is_local(model) else model, token=token).data
    except Exception:  # no card, no network, a private or damaged one: all mean "not known"
        return {}
    return {key: value for key in ("license", "license_name", "license_link") if (value := data.get(key))}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that decide what a run does."""
    names = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def command_line(argv: list[str], secret: str = "--hub_token") -> str:
    """Returns the command as one would type it, without the value of the secret option."""
    words, hide = [], False
    for word in argv:
        words.append("..." if hide else f"{secret}=..." if word.startswith(f"{secret}=") else word)
        hide = word == secret
    return shlex.join(words)


def model_card(record: dict[str, Any], pictures: dict[str, str], license: dict[str, str], repo_id: str | None) -> str:
    """Returns the model card (README.md) of a LoRA, in Markdown with the Hub's metadata.

    Args:
        record: what `training_config.json` holds.
        pictures: by prompt, the file of its samples without and with the LoRA, relative to the card.
        license: the base model's licence entries, {} where not known.
        repo_id: the LoRA's place on the Hub, None if it is not pushed.
    """
    from huggingface_hub import ModelCardData

    options, data, base = record["options"], record["data"], record["options"]["pretrained_model_name_or_path"]
    dataset = options["dataset_name"] or options["train_data_dir"]
    on_hub = [name for name in [options["dataset_name"]] if name and "/" in name and not is_local(name)]
    metadata = ModelCardData(
        base_model=None if is_local(base) else base,
        base_model_relation=None if is_local(base) else "adapter",
        datasets=on_hub or None,
        library_name="diffusers",
        tags=["lora", "diffusers", "text-to-image", "dpo", "inversion-dpo", "template:sd-lora"],
        widget=[{"text": prompt, "output": {"url": file}} for prompt, file in pictures.items()] or None,
        **license,
    )
    base_text = f"a local model, `{Path(base).name}`" if is_local(base) else f"[{base}](https://huggingface.co/{base})"
    data_text = f"a local folder, `{Path(dataset).name}`" if is_local(dataset) else f"`{dataset}`"
    counts = ", ".join(f"{name} {count}" for name, count in data.items())
    license_text = (
        f"That of the base model: {license.get('license_name', license['license'])}."
        if "license" in license
        else "Not known to the training script; the base model's licence applies."
    )
    title = repo_id.split("/")[-1] if repo_id else Path(options["output_dir"]).resolve().name
    gallery = "\n".join(
        f"<p>{html.escape(' '.join(prompt.split())) or '(empty prompt)'}</p>\n\n![without and with the LoRA]({file})\n"
        for prompt, file in pictures.items()
    )
    metrics = "\n".join(f"| `{name}` | {value:.4g} |" for name, value in record["metrics"].items())
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", record["command"]))])
    library_versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""---
{metadata.to_yaml()}
---
# {title}

A LoRA for {base_text}, aligned with preference pairs (a better and a worse image for the same caption) by
inversion-based DPO: DDIM inversion finds the noise that belongs to each image, and a DPO loss on that noise trains the
adapter. The methods: Inversion-DPO ([arXiv 2507.11554](https://arxiv.org/abs/2507.11554)) and DDIM-InPO
([arXiv 2503.18454](https://arxiv.org/abs/2503.18454)). Objective of this run: `{options["objective"]}`.

{gallery or "No validation pictures were asked for."}

## Use

```python
from diffusers import {record["pipeline"]}

pipe = {record["pipeline"]}.from_pretrained({base!r}).to("cuda")
pipe.load_lora_weights({repo_id or "path/to/this/folder"!r})
```

## Training

- Data: {data_text}; {counts}.
- {record["updates"]} updates of {record["pairs_per_update"]} pairs; processes: {record["processes"]}, mixed precision:
  {record["mixed_precision"]}.
- Versions: {library_versions}.

{fence}
{record["command"]}
{fence}

Means over the last updates:

| metric | value |
|---|---|
{metrics}

## Limits

- The metrics compare noise predictions. They do not say that the pictures are better: look at them.
- What the pairs did not judge may have drifted. Biases of the pairs and of the base model remain.
- Trained at {options["resolution"]} pixels. The text encoding is the base model's; the LoRA is on these modules of the
  U-Net: `{" ".join(options["lora_target_modules"])}`.

## Licence

{license_text}
"""


def write_results(
    folder: str | Path,
    record: dict[str, Any],
    metrics: list[dict[str, float]],
    pictures: dict[str, str],
    repo_id: str | None,
    token: str | None,
) -> None:
    """Writes what stands beside a finished LoRA: training_config.json, report.png and the model card."""
    folder = Path(folder)
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    options = record["options"]
    if metrics:
        title = f"{folder.resolve().name}, {options['objective']}"
        draw_report(metrics, folder / REPORT_FILE, title, options["loss_type"])
    license = base_license(options["pretrained_model_name_or_path"], token)
    (folder / CARD_FILE).write_text(model_card(record, pictures, license, repo_id), encoding="utf-8")


def create_hub_repo(hub_model_id: str | None, output_dir: str, token: str | None, private: bool) -> str:
    """Creates a model repository on the Hub, unless it is there, and returns its id.

    Raises:
        ValueError: if the Hub refuses, or a private repository was asked for and a public one is there.
    """
    from huggingface_hub import HfApi

    name, api = hub_model_id or Path(output_dir).resolve().name, HfApi(token=token)
    try:
        repo_id = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # one that exists may be readable only
        is_public = private and not api.model_info(repo_id).private
    except Exception as error:  # bad names, tokens and networks raise many kinds
        raise ValueError(
            f"--push_to_hub: the Hub refuses {name}: {one_line(error)}; log in with `hf auth login`, or set HF_TOKEN "
            "to a token that may write there"
        ) from error
    if is_public:
        raise ValueError(f"--hub_private_repo: {repo_id} exists and is public; make it private or name another")
    return repo_id


def push_to_hub(repo_id: str, folder: str | Path, token: str | None) -> None:
    """Uploads the LoRA, its card, pictures and configuration; no checkpoints, no logs.

    Raises:
        RuntimeError: if that fails, with the command that repeats it.
    """
    from huggingface_hub import HfApi

    try:
        HfApi(token=token).upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(PUSHED), commit_message="Training finished"
        )
    except Exception as error:  # networks and servers fail in many kinds
        patterns = [word for pattern in PUSHED for word in ("--include", pattern)]
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *patterns])
        raise RuntimeError(
            f"the upload to {repo_id} failed: {one_line(error)}\n"
            f"Everything is in {folder}. Repeat the upload, after `hf auth login`, with\n{command}"
        ) from error

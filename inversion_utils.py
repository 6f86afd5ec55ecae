"""Inversion-based preference optimisation: what `train_inversion_dpo.py` and its SDXL twin have in common.

    1  inversion     `invert` finds, by DDIM inversion, the noise that belongs to an image
    2  objectives    `preference_loss` turns policy and reference errors into a DPO loss
    3  pairs         preference pairs: a better and a worse image for one caption, and how a visit draws from them
    4  cache         targets of the policy that training does not change, kept on disk
    5  training      LoRA, checkpoints, validation, results

Sections 1 and 2 are plain PyTorch and know neither the model nor the training script: copy them, or import this file,
into a trainer of your own. Inversion-DPO is arXiv 2507.11554, DDIM-InPO is arXiv 2503.18454, Diffusion-DPO is
arXiv 2311.12908.

Symbols: abar_t = `alphas_cumprod[t]`, alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), and the noise level
s_t = sigma_t / alpha_t (0.029 at t = 0 and 14.6 at t = 999 for Stable Diffusion). Winner and loser images always
travel in one batch (2B, ...): the B winners first, then the B losers.
"""

import argparse
import contextlib
import copy
import hashlib
import html
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    # In single precision 1 - abar is inexact at small t, in half precision wrong or zero.
    abar = alphas_cumprod.double()
    tables = to_device(torch.stack([abar.sqrt(), (1 - abar).sqrt()]).to(like.dtype), like.device)
    alpha, sigma = tables[:, to_device(timesteps, like.device)][..., None, None, None]
    return alpha, sigma


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
    strength: torch.Tensor | None = None,
    is_tie: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the preference loss of each pair and its metrics (Wallace et al. 2023, arXiv 2311.12908, equation 14).

    With the log-ratio a = -(policy_error - reference_error), positive where the policy predicts better than the
    reference, the logits are (beta / 2) (a_w - a_l). Minimising the loss lowers the winner's error and raises the
    loser's. A `strength` below 1, of a preference that is less than certain, scales the logits in the loss (SmPO,
    arXiv 2506.02698). A tie pulls them towards zero.

        sigmoid  -log sigmoid(logits); with label smoothing e: -(1 - e) log sigmoid(logits) - e log sigmoid(-logits)
        hinge    relu(1 - logits)                   (SLiC, arXiv 2305.10425)
        ipo      (logits - 1/2)^2                   (IPO, arXiv 2310.12036, in scaled form)

    Args:
        policy_error, reference_error: (..., 2B), the B winners first, then the B losers.
        beta: the tie to the reference, "beta T omega" in Diffusion-DPO: larger keeps the policy closer.
        loss_type: "sigmoid", "hinge" or "ipo".
        label_smoothing: in [0, 0.5), the share of labels believed wrong; sigmoid only. A tie is one of one half.
        strength: (B,) in [0, 1], 1 for each if None.
        is_tie: (B,) bool, whether neither image is better, False for each if None; not with hinge.

    Returns:
        loss: (..., B), not reduced.
        metrics: detached (..., B): rewards/chosen = (beta / 2) a_w, rewards/rejected = (beta / 2) a_l,
            rewards/accuracies (one half for equal rewards and for ties) and rewards/margins = chosen - rejected,
            the logits before they are scaled.

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
    if loss_type == "hinge" and is_tie is not None and is_tie.any():
        raise ValueError("hinge has no loss for ties; use 'sigmoid' or 'ipo'")
    rewards = beta / 2 * (reference_error - policy_error)
    chosen, rejected = rewards.chunk(2, dim=-1)
    margins = chosen - rejected
    logits = margins if strength is None else strength * margins
    is_tie = torch.zeros_like(logits, dtype=torch.bool) if is_tie is None else is_tie.expand_as(logits)
    if loss_type == "sigmoid":
        smoothing = torch.full_like(logits, label_smoothing).masked_fill(is_tie, 0.5)
        loss = -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)
    elif loss_type == "hinge":
        loss = F.relu(1 - logits)
    else:
        loss = (logits - torch.full_like(logits, 0.5).masked_fill(is_tie, 0.0)).square()
    metrics = {
        "rewards/chosen": chosen.detach(),
        "rewards/rejected": rejected.detach(),
        "rewards/accuracies": torch.where(is_tie, 0.5, (margins.detach().sign() + 1) / 2),
        "rewards/margins": margins.detach(),
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

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # PIL's others are rare or run programs (EPS)
MAX_IMAGE_BYTES = 2**28  # of a file
CONVERTER = "examples/convert_pairs.py converts other data"


class BadRow(Exception):
    """A data row that cannot become a training example. The message is "reason" or "reason: details"."""


class Pair(NamedTuple):
    """Two images of one caption, the better one first."""

    winner: bytes  # of an image file, as is the loser
    loser: bytes
    captions: list[str]  # one or more, of which a visit takes one at random
    strength: float  # how certain the preference is, in [0, 1], see `preference_loss`
    is_tie: bool  # neither image is better, and the winner is image 0


def one_line(error: Exception) -> str:
    """Returns the beginning of an error's message on one line, or its class if it has none."""
    return printable(str(error))[:300] or type(error).__name__


def printable(text: str) -> str:
    """Returns a text on one line, in which nothing is left of escape sequences, such as data may hold, but letters."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


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


def with_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Returns the command line, after the options of the file that its `--config` names, so that it wins.

    The file is YAML or JSON, options by name, or a run's `training_config.json`. Ends the program if it is of no use.
    """
    import yaml

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=os.path.expanduser)
    file, words = finder.parse_known_args(argv)[0].config, []
    if file is None:
        return list(argv)
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        # In YAML `no` would be false, and 1e-4 text: all scalars stay as they are written, and argparse reads them.
        values = json.loads(text) if file.endswith(".json") else yaml.load(text, Loader=yaml.BaseLoader)
        values = values.get("options", values) if isinstance(values, dict) else None
        if not isinstance(values, dict):
            raise ValueError("it does not hold options by name")
        for name, value in values.items():
            if name not in actions:
                raise ValueError(f"there is no option called {name}")
            if value is None or name == "config" or (isinstance(value, str) and value in ("", "~", "null")):
                continue
            action, is_list = actions[name], isinstance(value, list)
            if isinstance(value, dict) or (is_list and action.nargs != "+"):
                raise ValueError(f"{name} is {value}; needed: a single value")
            if isinstance(action, argparse.BooleanOptionalAction):
                if str(value).lower() not in ("true", "false"):
                    raise ValueError(f"{name} is {value}; allowed: true and false")
                words.append(f"--{name}" if str(value).lower() == "true" else f"--no-{name}")
            else:
                words += [f"--{name}", *map(str, value)] if is_list else [f"--{name}={value}"]
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {file}: {one_line(error)}")
    return [*words, *argv]


def load_pairs(args: argparse.Namespace) -> "PreferencePairs":
    """Returns the pairs that the data options name; raises ValueError, naming the option, if there are none."""
    from datasets import Dataset, disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()
    split, folder = args.dataset_split_name, Path(args.train_data_dir or args.dataset_name)
    source = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"
    try:
        if args.train_data_dir and not folder.is_dir():
            raise FileNotFoundError(f"{folder.resolve()} is not a folder")
        if (folder / "state.json").exists():
            rows = load_from_disk(folder)
        elif (folder / "dataset_dict.json").exists():
            rows = load_from_disk(folder / split)
        else:
            name = args.train_data_dir or args.dataset_name
            rows = load_dataset(name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
        if not isinstance(rows, Dataset):
            raise ValueError("it is not a single split")
    except Exception as error:  # `datasets` raises a dozen kinds, its own and those of pyarrow, fsspec and the Hub
        reason = one_line(error) + (f" ({one_line(error.__cause__)})" if error.__cause__ else "")
        raise ValueError(f"{source}, split {split!r}, cannot be loaded: {reason}") from error
    names = ("winner", "loser") if args.winner_column else ("image_0", "image_1", "label")
    names += ("caption", "strength") if args.strength_column else ("caption",)
    columns = {name: getattr(args, f"{name}_column") for name in names}
    return PreferencePairs(rows, columns, args.tie_policy, args.max_train_samples, folder if folder.is_dir() else None)


class PreferencePairs:
    """Preference pairs in the rows of a `datasets.Dataset`: `self[place]` is a `Pair` or raises `BadRow`.

    Labels and strengths are read at once. Images and captions are read when a pair is.

    Args:
        columns: the columns by what they hold: "image_0", "image_1" and "label" (1: image 0 is better, 0: image 1 is,
            0.5: neither), or "winner" and "loser"; "caption"; and, optionally, "strength".
        tie_policy: "drop" leaves ties out, "soft" keeps them.
        max_pairs: keep the first so many pairs; all if None.
        folder: where image files that the rows name must lie; anywhere if None.

    Raises ValueError if a column is missing or holds something else, or no pair is left.
    """

    def __init__(self, rows, columns, tie_policy="drop", max_pairs=None, folder=None):
        for name, column in columns.items():
            if column not in rows.column_names:
                found = ", ".join(rows.column_names)
                raise ValueError(f"--{name}_column {column}: the data have no such column, only {found}. {CONVERTER}")
            _check_column(name, column, rows.features[column])
        self.columns, self.folder, self.fingerprint, self.what = columns, folder, rows._fingerprint, "rows"
        self.images = [columns[name] for name in columns if name not in ("label", "caption", "strength")]
        self.labels = self._numbers(rows, "label", lambda x: np.isin(x, (0, 0.5, 1)))
        self.strengths = self._numbers(rows, "strength", lambda x: (x >= 0) & (x <= 1))
        self.num_rows, self.num_ties = len(rows), int((self.labels == 0.5).sum())
        is_usable = ~np.isnan(self.labels + self.strengths)
        self.num_unusable = int((~is_usable).sum())
        self.kept = np.flatnonzero(is_usable & ((tie_policy == "soft") | (self.labels != 0.5)))[:max_pairs]
        if len(self.kept) == 0:
            reasons = f"{self.num_ties} ties, {self.num_unusable} without a label 0, 0.5 or 1 or a strength in 0..1"
            raise ValueError(f"no pair is left of {self.num_rows} rows: {reasons}. {CONVERTER}")
        self.rows = rows.select_columns([*self.images, columns["caption"]])
        for image in self.images:
            if hasattr(rows.features[image], "decode_example"):
                self.rows = self.rows.cast_column(image, type(rows.features[image])(decode=False))

    def hold_out(self, count: int) -> "PreferencePairs":
        """Takes `count` pairs out, the same for every seed of a run, and returns them; ValueError if none is left."""
        if count >= len(self):
            raise ValueError(f"--num_eval_pairs {count}: allowed: fewer than the {len(self)} pairs of the data")
        held_out, chosen = copy.copy(self), np.random.default_rng(0).permutation(len(self))[:count]
        held_out.kept, self.kept = self.kept[np.sort(chosen)], np.delete(self.kept, chosen)
        held_out.what = "held-out rows"
        return held_out

    def _numbers(self, rows, name: str, is_allowed: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Returns the numbers in an optional column, NaN where they are missing or not allowed; 1 without a column."""
        if name not in self.columns:
            return np.ones(len(rows))
        column = self.columns[name]
        values = rows.select_columns([column]).with_format("arrow")[:][column].cast("float64").to_numpy()
        return np.where(is_allowed(values), values, np.nan)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, place: int) -> Pair:
        index = int(self.kept[place])
        try:
            row = self.rows[index]
        except ValueError as error:  # text that is not UTF-8
            raise BadRow(f"unreadable row: {one_line(error)}") from error
        images = [self._image(row[image]) for image in self.images]
        captions = row[self.columns["caption"]]
        captions = [text for text in (captions if isinstance(captions, list) else [captions]) if text and text.strip()]
        if not captions:
            raise BadRow("no caption")
        winner, loser = images if self.labels[index] > 0 else images[::-1]
        return Pair(winner, loser, captions, float(self.strengths[index]), bool(self.labels[index] == 0.5))

    def _image(self, value: bytes | dict[str, Any] | None) -> bytes:
        """Returns the bytes that a row holds, or those of the file that it names."""
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        try:
            if data is None and path is not None:
                if self.folder and not is_within(path, self.folder):
                    raise BadRow(f"image outside the data's folder: {path}")
                if Path(path).is_file() and Path(path).stat().st_size > MAX_IMAGE_BYTES:
                    raise BadRow(f"image larger than {MAX_IMAGE_BYTES} bytes: {path}")
                data = Path(path).read_bytes() if Path(path).is_file() else None  # a device or a pipe may never end
        except (OSError, ValueError, RuntimeError) as error:  # no permission, not a file's name, a loop of links
            raise BadRow(f"unreadable image: {one_line(error)}") from error
        if not data:
            raise BadRow(f"no image: {path} is not a file" if path else "no image")
        return data

    def row_name(self, place: int) -> str:
        """Returns the name of a pair's row in messages; rows are counted from 0."""
        return f"row {self.kept[place]}"


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, as it is written, lies in a folder or in what that is a link to; `datasets` follows the link."""
    path = Path(os.path.abspath(path))
    return path.is_relative_to(os.path.abspath(folder)) or path.is_relative_to(os.path.realpath(folder))


def _check_column(name: str, column: str, feature: Any) -> None:
    """Raises ValueError if a column's type is not what the pairs need."""
    if name == "caption" and hasattr(feature, "feature"):  # a list
        feature = feature.feature
    kind = "numbered names" if hasattr(feature, "names") else str(getattr(feature, "dtype", type(feature).__name__))
    if name == "caption":
        needed, fits = "text, or lists of text", kind in ("string", "large_string")
    elif name in ("label", "strength"):  # not a ClassLabel, which numbers names in an order of its own
        needed, fits = "numbers", kind.startswith(("float", "int", "uint", "bool", "decimal"))
    else:
        is_file = isinstance(feature, dict) and feature.keys() <= {"bytes", "path"}
        needed, fits = "encoded images", is_file or kind in ("binary", "large_binary", "PIL.Image.Image")
    if not fits:
        raise ValueError(f"--{name}_column {column}: the column holds {kind}; needed: {needed}. {CONVERTER}")


def check_tokenizer(tokenizer) -> None:
    """Raises ValueError if a tokenizer has no length, or no vocabulary, so that all captions are alike."""
    if tokenizer.model_max_length > 10_000:
        raise ValueError("it has no model_max_length; is its folder complete?")
    one, other = tokenizer(["a red circle", "a blue square"], padding="max_length", truncation=True).input_ids
    if one == other:
        raise ValueError("it gives different captions the same ids; its vocabulary is missing")


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """Returns an upright RGB image: EXIF orientation is applied, transparency becomes white, the first frame counts.

    `image.info["original_size"]` is its (height, width). A JPEG may come at a half, a quarter or an eighth of that as
    long as no side has fewer pixels than `min_side`: decoding it so takes much less time. Raises BadRow if the bytes
    are no image that can be read, or one of more than 8 bits.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        size = image.size[::-1]
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        if image.format != "TIFF" and image.getexif().get(0x0112, 1) > 4:  # it lies on its side; PIL turns a TIFF
            size = size[::-1]
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are not 8-bit numbers (mode {image.mode})")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as error:  # PIL raises nearly every kind on damaged files
        message = re.sub(r" <_io.BytesIO[^>]*>", "", one_line(error))
        raise BadRow(f"unreadable image: {message}") from error
    image.info = {"original_size": size}
    return image


def resize_and_crop(
    image: Image.Image, resolution: int, crop: tuple[float, float], flip: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a square window of an image of `decode_image`, whose shorter side becomes `resolution`.

    `crop` (top, left) in [0, 1] places the window in what is left over, relatively, so that two images of other shapes
    are cut alike: 0.5 is the centre. The image is mirrored before it is cut, so top and left belong to what is seen.

    Returns:
        pixels: (3, resolution, resolution) in [-1, 1].
        time_ids: (6,), as SDXL is told (arXiv 2307.01952, section 2.2): height and width of the original image, top
            and left of the window in pixels of the resized image, height and width of the window.
    """
    image, original_size = ImageOps.mirror(image) if flip else image, image.info["original_size"]
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    top, left = round(crop[0] * (height - resolution)), round(crop[1] * (width - resolution))
    x, y = image.width / width, image.height / height
    window = (left * x, top * y, (left + resolution) * x, (top + resolution) * y)  # what is cut off is never resized
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=window, reducing_gap=3.0)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    time_ids = torch.tensor([*original_size, top, left, resolution, resolution], dtype=torch.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels)), time_ids


LONGEST_CAPTION = 4000  # characters, many more than the 77 tokens that are read of a caption


class PreferenceDataset(torch.utils.data.Dataset):
    """Training examples by (key, place): the pair at a place, and all random draws of a visit to it.

    The key alone seeds the draws: (0, visit), where `visit` is the running number of a pair over the whole run, or
    (3, place, draw) for one of the draws that a cache keeps, see `TargetCache`. So they are the same for any number of
    processes, any accumulation and after any restart. An unusable row is replaced by the next. `self[key, place]` has

        key, row: the key, and the name of the row;
        pixel_values, time_ids: (2, 3, resolution, resolution) and (2, 6), winner and loser, see `resize_and_crop`;
        caption: text, empty for a share `proportion_empty_prompts` of the visits;
        uniforms: (M,) float64 in [0, 1), from which `sample_timesteps` makes the training timesteps;
        strength, is_tie: see `Pair`;
        skipped: list of (row, reason), the unusable rows; a RuntimeError after a hundred in a row.
    """

    def __init__(
        self, pairs, resolution, num_targets, seed, random_crop=False, random_flip=False, proportion_empty_prompts=0.0
    ):
        self.pairs, self.resolution, self.num_targets, self.seed = pairs, resolution, num_targets, seed
        self.random_crop, self.random_flip = random_crop, random_flip
        self.proportion_empty_prompts = proportion_empty_prompts

    def __getitem__(self, key_and_place: tuple[tuple[int, ...], int]) -> dict[str, Any]:
        key, place = key_and_place
        rng = np.random.default_rng([self.seed, *key])
        top, left, flip, empty, *uniforms = rng.random(4 + self.num_targets)
        crop, flip = (top, left) if self.random_crop else (0.5, 0.5), self.random_flip and flip < 0.5
        skipped, images = [], None
        while images is None:
            try:
                pair = self.pairs[place]
                images = [decode_image(image, 2 * self.resolution) for image in (pair.winner, pair.loser)]
            except BadRow as problem:
                skipped.append((self.pairs.row_name(place), str(problem)))
                if len(skipped) == min(100, len(self.pairs)):
                    row, reason = skipped[0]
                    what = f"none of {len(skipped)} {self.pairs.what} in a row can be used"
                    raise RuntimeError(f"{what}; {row}: {reason}") from None
                place = (place + 1) % len(self.pairs)
        pixels, time_ids = zip(*(resize_and_crop(x, self.resolution, crop, flip) for x in images), strict=True)
        is_empty = empty < self.proportion_empty_prompts
        return {
            "key": key,
            "row": self.pairs.row_name(place),
            "pixel_values": torch.stack(pixels),
            "time_ids": torch.stack(time_ids),
            "caption": "" if is_empty else pair.captions[int(rng.integers(len(pair.captions)))][:LONGEST_CAPTION],
            "uniforms": torch.tensor(uniforms, dtype=torch.float64),
            "strength": pair.strength,
            "is_tie": pair.is_tie,
            "skipped": skipped,
        }


def collate(examples: list[dict[str, Any]], tokenizers: Sequence) -> dict[str, Any]:
    """Returns a batch of B examples: images (2B, ...), winners first; uniforms (M, B); a tokenizer's ids (B, L)."""
    captions = [example["caption"] for example in examples]
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return {
        "keys": [example["key"] for example in examples],
        "rows": [example["row"] for example in examples],
        "pixel_values": torch.stack([example["pixel_values"] for example in examples], dim=1).flatten(0, 1),
        "time_ids": torch.stack([example["time_ids"] for example in examples], dim=1).flatten(0, 1),
        "input_ids": [tokenizer(captions, **options).input_ids for tokenizer in tokenizers],
        "is_empty": torch.tensor([not caption for caption in captions]),
        "uniforms": torch.stack([example["uniforms"] for example in examples], dim=1),
        "strength": torch.tensor([example["strength"] for example in examples]),
        "is_tie": torch.tensor([example["is_tie"] for example in examples]),
        "skipped": [row for example in examples for row in example["skipped"]],
    }


def visit_batches(
    num_pairs: int, batch_size: int, seed: int, visit=0, process_index=0, num_processes=1, num_draws=None
) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    """Yields batches of (key, place) without end, for one process of several, from a visit on; a `batch_sampler`.

    The processes take turns, a batch each, so any division of a step's visits into processes and accumulation covers
    the same pairs, and a restart only has to name its first visit. `num_draws` is the number of draws per pair in a
    cache, of which each epoch takes the next; None without a cache.
    """
    epoch, order, first = None, None, visit + process_index * batch_size
    while True:
        batch = []
        for visit in range(first, first + batch_size):
            if visit // num_pairs != epoch:
                epoch = visit // num_pairs
                order = np.random.default_rng([seed, 2, epoch]).permutation(num_pairs)
            place = int(order[visit % num_pairs])
            batch.append(((0, visit) if num_draws is None else (3, place, epoch % num_draws), place))
        yield batch
        first += num_processes * batch_size


def forward_noise(keys: list[tuple[int, ...]], seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns standard normal noise (M, 2B, C, h, w), seeded by the keys of B visits, the same for winner and loser.

    `shape` is (M, C, h, w).
    """
    # Random streams: 0, 3 and 5 draw for a visit, a cache and a held-out pair, each + 1 its noise; 2 orders an epoch.
    seeds = [int(np.random.default_rng([seed, key[0] + 1, *key[1:]]).integers(2**62)) for key in keys]
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds], dim=1)
    return torch.cat([noise, noise], dim=1)


def note_skipped(rows: Iterable[tuple[str, str]], skipped: dict[str, str], warn: Callable[[str], None]) -> None:
    """Adds (row, reason) to the rows skipped so far, and warns of the first ten."""
    for row, reason in rows:
        if row not in skipped and len(skipped) < 10:
            warn(printable(f"{row} is skipped: {reason}"))
        skipped.setdefault(row, reason)


# 4  Cache


class Targets(NamedTuple):
    """What the policy's step needs to know of a batch of B visits, winners first. Training changes none of it."""

    latents: torch.Tensor  # (2B, C, h, w), x_0, zero where not usable
    timesteps: torch.Tensor  # (M, 2B) int64, shared by winner and loser
    noise: torch.Tensor  # (M, 2B, C, h, w), likewise, what to predict: the implied noise, or the forward noise
    reference_error: torch.Tensor | None  # (M, 2B), None while it is not known
    usable: torch.Tensor  # (2B,) bool, False for a pair that overflows in a model: a tie without gradient
    strength: torch.Tensor  # (B,), see `preference_loss`
    is_tie: torch.Tensor  # (B,) bool, likewise
    cond: dict[str, torch.Tensor]  # the U-Net's conditioning by name, (2B, ...) each


def without_overflow(targets: Targets) -> Targets:
    """Returns the targets with pairs that overflowed in any model, as their errors tell, marked and set to zero."""
    usable = targets.reference_error.isfinite().all(0).view(2, -1).all(0).repeat(2)
    zeroed = {name: getattr(targets, name).where(usable[:, None, None, None], 0.0) for name in ("latents", "noise")}
    zeroed["cond"] = {k: v.where(usable.view(-1, *[1] * (v.ndim - 1)), 0.0) for k, v in targets.cond.items()}
    return targets._replace(usable=usable, reference_error=targets.reference_error.where(usable, 0.0), **zeroed)


IMAGE_AXIS = {"latents": 0, "timesteps": 1, "noise": 1, "reference_error": 1}  # where the 2B images stand


class TargetCache(torch.utils.data.Dataset):
    """Targets on disk: `self[key, place]` reads those of one draw of the pair at a place.

    A pair has a few draws of crop, flip, empty caption, timesteps and forward noise, of which each epoch takes the
    next. The path is the index: `<folder>/draw-<draw>/<place>.safetensors`, a file that is there whole or not at all.
    So a run that was killed goes on where it stopped, and processes share the work. `cache_dir` holds a folder for
    each set of settings, which are all that determines the targets, and are written to its `settings.json`.
    """

    def __init__(self, cache_dir: str | Path, settings: dict[str, Any]):
        text = json.dumps(settings, indent=2, sort_keys=True)
        self.folder = Path(cache_dir) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.unusable = set()  # draws without finite targets, which have no file
        if not (self.folder / "settings.json").exists():
            write_whole(self.folder / "settings.json", text.encode())

    def part(self, name: str) -> "TargetCache":
        """Returns a cache of other pairs with the same settings, in a folder within this one's."""
        part = copy.copy(self)
        part.folder, part.unusable = self.folder / name, set()
        return part

    def path(self, place: int, draw: int) -> Path:
        return self.folder / f"draw-{draw}" / f"{place}.safetensors"

    def missing(self, draws: Iterable[tuple[int, int]], warn: Callable[[str], None]) -> list[tuple[int, int]]:
        """Returns those of the draws that have no file, or one that was cut short, which is named."""
        from safetensors import SafetensorError, safe_open

        missing = []
        for place, draw in draws:
            try:
                with safe_open(self.path(place, draw), "pt"):
                    continue
            except SafetensorError as error:
                warn(f"{self.path(place, draw)} is damaged and is computed again: {one_line(error)}")
            except FileNotFoundError:
                pass
            missing.append((place, draw))
        return missing

    def save(self, keys: Sequence[tuple[int, ...]], targets: Targets) -> list[int]:
        """Writes the targets of a batch, a file each; returns the indices of the pairs that are not usable.

        Raises RuntimeError if the folder cannot be written.
        """
        from safetensors.torch import save

        values = {name: getattr(targets, name).cpu() for name in targets._fields if name != "cond"}
        cond = {f"cond.{name}": value.cpu() for name, value in targets.cond.items()}
        for i, (_, place, draw) in enumerate(keys):
            if not values["usable"][i]:
                continue
            images = torch.tensor([i, len(keys) + i])
            tensors = {name: values[name].index_select(axis, images) for name, axis in IMAGE_AXIS.items()}
            for name, value in cond.items():  # a caption belongs to both images
                tensors[name] = value[images[:1] if torch.equal(value[i], value[len(keys) + i]) else images]
            tensors |= {name: values[name][i].clone() for name in ("strength", "is_tie")}
            try:
                write_whole(self.path(place, draw), save(tensors))
            except OSError as error:
                raise RuntimeError(f"--inversion_cache_dir: {self.folder} cannot be written: {one_line(error)}. Make "
                                   "room and repeat the command, which goes on from there") from None  # fmt: skip
        return [i for i in range(len(keys)) if not values["usable"][i]]

    def __getitem__(self, key_and_place: tuple[tuple[int, ...], int]) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        _, place, draw = key_and_place[0]
        usable = (place, draw) not in self.unusable
        file = self.path(place, draw) if usable else next(self.folder.glob("draw-*/*.safetensors"))
        return {**load_file(file), "usable": torch.tensor(usable)}


def collate_targets(stored: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Returns a batch with the `Targets` of B visits, from what `TargetCache` holds of them."""

    def join(name, axis):
        values = [torch.cat([tensors[name]] * (2 // tensors[name].shape[axis]), axis) for tensors in stored]
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)

    tensors = {name: join(name, axis) for name, axis in IMAGE_AXIS.items()}
    tensors["cond"] = {name.removeprefix("cond."): join(name, 0) for name in stored[0] if name.startswith("cond.")}
    tensors |= {name: torch.stack([x[name] for x in stored]) for name in ("strength", "is_tie", "usable")}
    tensors["usable"] = tensors["usable"].repeat(2)
    return {"targets": Targets(**tensors), "rows": [], "skipped": []}


def write_whole(file: Path, data: bytes) -> None:
    """Writes a file under another name and renames it, so that it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def only_variant(folder: Path) -> str:
    """Returns the variant, such as fp16, of a folder's weights, if there are none without one, else ""."""
    names = [file.name.split(".") for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)]
    variants = [parts[1].split("-")[0] for parts in names if len(parts) == 3]
    return variants[0] if variants and len(variants) == len(names) else ""


def fingerprint(model: str, commit: str | None) -> str:
    """Returns what tells a model from others: its commit on the Hub, or a hash of its files' sizes and times."""
    if not Path(model).is_dir():
        return f"{model} {commit}"
    parts = ("", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    files = [file for part in parts for file in sorted(Path(model, part).glob("*")) if file.is_file()]
    listing = [(str(f.relative_to(model)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


# 5  Training

LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
CARD_FILE, CONFIG_FILE, REPORT_FILE = "README.md", "training_config.json", "report.png"
METRICS_FILE, VALIDATION_DIR, BEST_DIR = "metrics.jsonl", "validation", "best"
FINAL_RESULTS = (LORA_FILE, KOHYA_FILE, CARD_FILE, CONFIG_FILE, REPORT_FILE)  # of a run that ended
RESULTS = (*FINAL_RESULTS, METRICS_FILE, VALIDATION_DIR, BEST_DIR)  # beside checkpoints and logs
PUSHED = (*FINAL_RESULTS, f"{VALIDATION_DIR}/step-*.png")
STATE_FILE, RAW_LORA_FILE = "training_state.json", "raw_lora_weights.safetensors"  # of a checkpoint
OPTIMIZER_FILE, CHECKSUMS_FILE = "optimizer.bin", "checksums.json"  # the latter of all others
LOCK_FILE = ".lock"  # of --output_dir
GO_ON = "Make room and go on with --resume_from_checkpoint latest"
WINNER_LIMIT = 0.02  # how far the error of held-out winners may lie above the reference's
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raises ValueError if accelerate was told to shard the model, see examples/README.md for the reasons."""
    for name in ("DeepSpeed", "FSDP", "Megatron_LM", "Parallelism_config"):
        if environment.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() not in ("false", "0", "no", "off"):
            raise ValueError(f"{name} is not supported: launch with accelerate's MULTI_GPU (examples/ddp.yaml); for "
                             "memory, see --quantize_base and --offload")  # fmt: skip


@contextlib.contextmanager
def reference_policy(unet) -> Iterator[None]:
    """Within it, `unet` is the reference policy: the same weights with the LoRA switched off, or a frozen one on."""
    is_frozen_lora = "reference" in unet.peft_config
    unet.set_adapter("reference") if is_frozen_lora else unet.disable_adapters()
    try:
        yield
    finally:
        unet.set_adapter("default") if is_frozen_lora else unet.enable_adapters()


@contextlib.contextmanager
def on_device(modules: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Within it, frozen modules are on the device. Their own copy stays where it is, so nothing is copied back."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    homes = [(tensor, tensor.data) for tensor in tensors if tensor.device != device]
    try:
        for tensor, home in homes:
            tensor.data = to_device(home, device)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


@torch.no_grad()
def encode_images(vae, pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Returns scaled latents (N, C, h, w) in float32, the mode of the VAE's posterior, for pixels (N, 3, H, W)."""
    pixel_values = to_device(pixel_values, vae.device).to(vae.dtype)
    latents = [vae.encode(chunk).latent_dist.mode() for chunk in pixel_values.split(batch_size)]
    latents = torch.cat(latents).float() * vae.config.scaling_factor
    return latents.contiguous()  # as a cache returns them: kernels round by the memory layout


class StopSignal:
    """Remembers the first SIGTERM or SIGINT, so that the loop can save and stop; a second one acts as it used to."""

    def __init__(self, announce: Callable[[str], None]):
        self.received, self.announce = 0, announce  # the signal's number
        self._handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}

    def _remember(self, number, frame):
        self.received = number
        self.restore()
        self.announce(f"{signal.Signals(number).name}: stopping after this step; once more to stop at once")

    def restore(self) -> None:
        """Gives the signals back to whoever handled them before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def leave_signals_to_the_main_process(worker: int) -> None:
    """A `worker_init_fn`: a signal may reach a whole group of processes, but workers must outlast the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class RunningMeans:
    """Means of metrics over the batches of a step, kept on the device until they are asked for."""

    def __init__(self):
        self._values = {}

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float().mean())

    def pop(self, accelerator) -> dict[str, float]:
        """Returns the means over batches and processes, and starts anew; this waits for the device, once a step."""
        means = torch.stack([torch.stack(values).mean() for values in self._values.values()])
        names, self._values = list(self._values), {}
        return dict(zip(names, accelerator.reduce(means, reduction="mean").tolist(), strict=True))


def read_lora(path: str | Path, unet_config: dict[str, Any], lora_loader, cache_dir=None) -> dict[str, torch.Tensor]:
    """Returns a U-Net's LoRA in float32, from a file, a folder or the Hub, in any of the formats that diffusers reads.

    The names are PEFT's: `<module>.lora_A.weight` (rank, in, ...) and `<module>.lora_B.weight` (out, rank, ...). The
    latter contains alpha / rank, and lower ranks are filled up with zeros, so one rank holds for all modules, and
    alpha equals it.

    Raises ValueError if it is no LoRA, of another model, of a text encoder too, or of a kind with other weights.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.lora_base import _best_guess_weight_name
    from diffusers.utils import convert_unet_state_dict_to_peft
    from huggingface_hub import hf_hub_download
    from peft.tuners.lora import LoraLayer
    from safetensors import safe_open

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    logging.disable(logging.ERROR)  # diffusers logs what is raised here
    try:
        name = _best_guess_weight_name(str(path)) or LORA_FILE  # of a folder or on the Hub
        if not Path(path).exists():
            path = hf_hub_download(str(path), name, cache_dir=cache_dir)
        file = str(Path(path, name) if Path(path).is_dir() else path)
        with safe_open(file, "pt") as stored:
            if any("dora" in name for name in stored.keys()):  # which diffusers leaves out
                raise ValueError("it is a DoRA, whose magnitudes are not supported")
        weights, alphas, metadata = lora_loader.lora_state_dict(
            file, unet_config=unet.config, return_lora_metadata=True, use_safetensors=True
        )
        weights = convert_unet_state_dict_to_peft(weights)  # every name, where diffusers looks at the first alone
        for name in weights:
            if not name.startswith("unet."):
                raise ValueError(f"{name} does not belong to a U-Net; a LoRA of the text encoder is not supported")
            if not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise ValueError(f"{name} is not a LoRA's down- or up-projection")
        unet.load_lora_adapter(
            weights, prefix="unet", network_alphas=alphas, metadata=metadata, adapter_name="default",
            low_cpu_mem_usage=True,
        )  # fmt: skip
    except Exception as error:  # damaged, missing and foreign files fail in many kinds
        raise ValueError(one_line(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, LoraLayer)}
    if 2 * len(layers) != len(weights):
        raise ValueError(f"it has {len(weights) / 2:g} modules, of which this model has {len(layers)}")
    rank, lora = max(layer.r["default"] for layer in layers.values()), {}
    for name, layer in layers.items():
        down, up = (weights[f"unet.{name}.lora_{x}.weight"] for x in "AB")  # the model's own copies are empty
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"{name} is not finite")
        up, missing = up.float() * layer.scaling["default"], rank - len(down)
        lora[f"{name}.lora_A.weight"] = F.pad(down.float(), [0, 0] * (down.ndim - 1) + [0, missing])
        lora[f"{name}.lora_B.weight"] = F.pad(up, [0, 0] * (up.ndim - 2) + [0, missing])
    return lora


def lora_shape(lora: dict[str, torch.Tensor]) -> tuple[int, list[str]]:
    """Returns the rank of a LoRA of `read_lora`, and the names of its modules."""
    down = {name.removesuffix(".lora_A.weight"): value for name, value in lora.items() if ".lora_A." in name}
    return len(next(iter(down.values()))), sorted(down)


def add_lora(
    unet, rank: int, lora_alpha: float, targets: Sequence[str] = LORA_TARGETS, init=None, reference="base"
) -> list[torch.nn.Parameter]:
    """Adds a LoRA in float32, adapter "default", to a U-Net, freezes all else, and returns the LoRA's parameters.

    `targets` are modules' names or the ends of names, or a single regular expression that matches names as a whole.
    `init`, from `read_lora`, is where the LoRA begins, and what decides its rank, alpha and targets. With `reference`
    "init" a frozen copy of it, adapter "reference", is added, to which `reference_policy` switches.
    Raises ValueError if a target fits no module.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig, set_peft_model_state_dict

    is_pattern = len(targets) == 1 and any(character in targets[0] for character in "*+?|()[]^$\\")
    if init:
        rank, targets = lora_shape(init)
        lora_alpha, is_pattern = rank, False
    modules = targets[0] if is_pattern else list(targets)
    names = [f".{name}" for name, _ in unet.named_modules()]
    lost = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    unet.requires_grad_(False)
    try:
        if lost and not is_pattern:
            raise ValueError(f"no module of the U-Net is called {lost[0]}")
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant
        for adapter in ("reference", "default") if reference == "init" else ("default",):  # the last one is active
            config = LoraConfig(r=rank, target_modules=modules, lora_alpha=lora_alpha, init_lora_weights="gaussian")
            unet.add_adapter(config, adapter)
            cast_training_params(unet, dtype=torch.float32)
            if init:
                set_peft_model_state_dict(unet, init, adapter_name=adapter)
    except (ValueError, re.error) as error:
        raise ValueError(f"--lora_target_modules {' '.join(targets)}: {one_line(error)}") from error
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def lora_weights(unet) -> dict[str, torch.Tensor]:
    """Returns the adapter "default" as `read_lora` does: with alpha / rank in the up-projections."""
    from peft import get_peft_model_state_dict

    config = unet.peft_config["default"]
    weights = {name: value.float().cpu() for name, value in get_peft_model_state_dict(unet).items()}
    scale = config.lora_alpha / config.r
    return {name: value * scale if ".lora_B." in name else value for name, value in weights.items()}


def write_lora(file: Path, lora: dict[str, torch.Tensor], **about: str) -> None:
    """Writes a LoRA of `read_lora` as `pipe.load_lora_weights` reads it, with PEFT's names; `about`: more metadata."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from safetensors.torch import save

    rank, modules = lora_shape(lora)
    config = {"unet.r": rank, "unet.lora_alpha": rank, "unet.target_modules": modules}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config), **about}
    write_whole(file, save({f"unet.{name}": value.contiguous() for name, value in lora.items()}, metadata))


def sgm_names(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Returns what modules of diffusers' SDXL U-Net, or the beginnings of their names, are called in sgm's code."""
    layers, kinds = unet_config["layers_per_block"], unet_config["up_block_types"]
    layers = [layers] * len(kinds) if isinstance(layers, int) else layers
    names = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "mid_block.attentions.0": "middle_block.1"}
    for k in (0, 2):
        names[f"time_embedding.linear_{k // 2 + 1}"] = f"time_embed.{k}"
        names[f"add_embedding.linear_{k // 2 + 1}"] = f"label_emb.0.{k}"

    def add_resnet(name, sgm_name):
        parts = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
        for part, sgm_part in {**parts, "conv_shortcut": "skip_connection"}.items():
            names[f"{name}.{part}"] = f"{sgm_name}.{sgm_part}"

    add_resnet("mid_block.resnets.0", "middle_block.0")
    add_resnet("mid_block.resnets.1", "middle_block.2")
    k = 0
    for i, count in enumerate(layers):
        for j in range(count):
            k += 1
            add_resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{k}.0")
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{k}.1"
        k += 1
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{k}.0.op"
    k = -1
    for i, count in enumerate(reversed(layers)):
        for j in range(count + 1):
            k += 1
            add_resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{k}.0")
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{k}.1"
        place = 2 if "Attn" in kinds[i] else 1  # behind the resnet, and the attention if there is one
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{k}.{place}.conv"
    return names


def write_kohya(file: Path, lora: dict[str, torch.Tensor], unet_config: Mapping[str, Any]) -> None:
    """Writes a LoRA of `read_lora` with kohya's names, as ComfyUI, Forge, AUTOMATIC1111 and sd-scripts read it.

    They are made of diffusers' module names for SD 1.5 and 2.x, and of sgm's for SDXL.
    """
    from safetensors.torch import save

    (rank, modules), tensors = lora_shape(lora), {}
    sgm = sgm_names(unet_config) if unet_config.get("addition_embed_type") == "text_time" else {}
    for module in modules:
        start = next((start for start in sgm if f"{module}.".startswith(f"{start}.")), "")
        name = "lora_unet_" + (sgm.get(start, "") + module.removeprefix(start)).replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = lora[f"{module}.lora_A.weight"].contiguous()
        tensors[f"{name}.lora_up.weight"] = lora[f"{module}.lora_B.weight"].contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    about = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    write_whole(file, save(tensors, {"format": "pt", **about}))


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Returns a hash of tensors and their names."""
    from safetensors.torch import save

    return hashlib.sha256(save(dict(sorted(tensors.items())))).hexdigest()


def register_lora_checkpointing(accelerator, unet) -> None:
    """Makes `accelerator.save_state` and `load_state` keep the LoRA, adapter "default", instead of the whole U-Net.

    A checkpoint holds it twice: as `write_lora` does, and raw, since folding alpha / rank in is not exactly undone.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file, save

    def save_hook(models, weights, folder):
        if accelerator.is_main_process:
            write_lora(Path(folder) / LORA_FILE, lora_weights(unet))
            raw = {name: value.cpu().contiguous() for name, value in get_peft_model_state_dict(unet).items()}
            write_whole(Path(folder) / RAW_LORA_FILE, save(raw))
        if weights:
            weights.pop()

    def load_hook(models, folder):
        models.clear()
        raw = load_file(Path(folder) / RAW_LORA_FILE)
        expected = {name: value.shape for name, value in get_peft_model_state_dict(unet).items()}
        if expected != {name: value.shape for name, value in raw.items()}:
            raise ValueError(f"{Path(folder) / RAW_LORA_FILE} does not fit: it belongs to another model or --rank")
        set_peft_model_state_dict(unet, raw, adapter_name="default")

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


class Checkpoint(NamedTuple):
    """Where a run stopped: a complete folder `checkpoint-<step>`."""

    folder: Path
    step: int
    visit: int  # the next one, see `PreferenceDataset`
    good_steps: int  # that were not skipped, by which the learning rate's schedule goes
    num_pairs: int  # in the data, on which the order of the visits depends
    lora_init: str | None  # the hash of the LoRA that the run began with
    options: dict[str, Any]
    skipped: dict[str, str]  # rows so far, with the reason each


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the complete checkpoints of a run, the newest last."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))


def damage_of(checkpoint: Path) -> str:
    """Returns what is wrong with a checkpoint's files, "" if nothing is."""
    try:
        checksums = json.loads((checkpoint / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        if missing := {STATE_FILE, RAW_LORA_FILE, OPTIMIZER_FILE} - checksums.keys():
            return f"{CHECKSUMS_FILE} lacks {min(missing)}"
        damaged = [name for name, checksum in checksums.items() if checksum_of(checkpoint / name) != checksum]
        return f"{damaged[0]} is damaged" if damaged else ""
    except OSError as error:
        return one_line(error)
    except (ValueError, AttributeError):
        return f"{CHECKSUMS_FILE} is damaged"


def checksum_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_checkpoint(
    output_dir: str | Path, resume_from_checkpoint: str | None, note: Callable[[str], None]
) -> Checkpoint | None:
    """Returns the checkpoint to resume from, None to start anew.

    `resume_from_checkpoint` is a folder `checkpoint-<step>`, by name within `output_dir` or by path; "latest", which
    is the newest in `output_dir` that is sound, if there is one; or None. Newer ones that are damaged are moved aside
    by the main process, and named to `note`. Raises ValueError if the named folder is no checkpoint, damaged, or not
    the newest of `output_dir`.
    """
    checkpoints, option = find_checkpoints(output_dir), f"--resume_from_checkpoint {resume_from_checkpoint}"
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        while checkpoints and (damage := damage_of(checkpoints[-1])):
            folder = checkpoints.pop()
            if is_main_process():
                aside = folder.with_name(f"damaged-{folder.name}")
                while aside.exists():
                    aside = aside.with_name(f"{aside.name}-again")
                folder.rename(aside)
                note(f"{folder.name}: {damage}; it is now {aside.name}")
                if not checkpoints:
                    note("no sound checkpoint is left, so a run starts at step 0")
        if not checkpoints:
            return None
    named = [Path(output_dir) / resume_from_checkpoint, Path(resume_from_checkpoint)]
    folders = checkpoints[-1:] if resume_from_checkpoint == "latest" else named
    folder = next((folder for folder in folders if (folder / STATE_FILE).exists()), None)
    if folder is None:
        raise ValueError(f"{option}: allowed are 'latest' and a folder checkpoint-<step> with {STATE_FILE} in it")
    if folder.resolve() in [older.resolve() for older in checkpoints[:-1]]:
        raise ValueError(f"{option}: {checkpoints[-1].name} is newer; move it away, or name another --output_dir")
    if resume_from_checkpoint != "latest" and (damage := damage_of(folder)):
        raise ValueError(f"{option}: {damage}; 'latest' takes the newest sound checkpoint of --output_dir")
    try:
        return Checkpoint(folder, **json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(f"{option}: {folder / STATE_FILE} is of another version: {one_line(error)}") from error


def check_resumed_run(checkpoint: Checkpoint, options: dict[str, Any], num_pairs: int, lora_init: str | None) -> str:
    """Returns, in words, the options that differ from those of the checkpoint.

    Raises ValueError if another run would come of it: other data, another objective or LoRA, the cache on or off.
    """
    count = "the number of pairs to train on"
    before = {**checkpoint.options, count: checkpoint.num_pairs, "lora_init": checkpoint.lora_init}
    now, names = {**options, count: num_pairs, "lora_init": lora_init}, ("max_train_samples", "num_eval_pairs", count)
    names += ("objective", "reference", "lora_init", "rank", "lora_alpha", "lora_target_modules", "use_8bit_adam")
    for name in (*names, "inversion_cache_dir"):
        old, new = before.get(name, now[name]), now[name]  # an older version may lack an option
        if old != new and not (name.endswith("_dir") and old and new):
            new, old = (new and "another LoRA", old and "its own") if name == "lora_init" else (new, old)  # hashes
            raise ValueError(f"--resume_from_checkpoint: {name} is {new}, but {checkpoint.folder} was made with "
                             f"{old}; a run must keep it")  # fmt: skip
    names = [name for name in options if options[name] != checkpoint.options.get(name)]
    names = [name for name in names if name not in ("resume_from_checkpoint", "config", "lora_init")]
    return ", ".join(f"--{name} {options[name]} (it was {before.get(name)})" for name in names)


def save_checkpoint(accelerator, checkpoint: Checkpoint, total_limit: int | None) -> None:
    """Writes a checkpoint's folder whole or not at all, then removes the oldest beyond `total_limit`."""
    state = checkpoint._asdict()
    folder = state.pop("folder")
    partial = folder.with_name(f"partial-{folder.name}")
    if accelerator.is_main_process:
        for stale in folder.parent.glob("partial-checkpoint-*"):  # of a run that was killed while writing
            shutil.rmtree(stale)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
            checksums = {file.name: checksum_of(file) for file in sorted(partial.iterdir())}
            (partial / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
            partial.rename(folder)
    except (OSError, RuntimeError) as error:  # torch says "file write failed" of a full disk
        free = f"{shutil.disk_usage(folder.parent).free / 2**20:.0f} MiB are free"
        raise RuntimeError(f"{folder} cannot be written, {free}: {one_line(error)}. {GO_ON}") from error
    if accelerator.is_main_process:
        for old in find_checkpoints(folder.parent)[:-total_limit] if total_limit else []:
            shutil.rmtree(old)


def is_main_process() -> bool:
    """Whether this is the first of the run's processes, as launchers say it."""
    return os.environ.get("RANK", "0") == "0"


class Lock(NamedTuple):
    """What keeps --output_dir to this run while its file is open, or until the process ends in any way."""

    file: Any
    owner: str  # what the file held, the hash of the options of the run that began there; "" if none did
    is_new: bool  # whether the folder is

    def undo(self, output_dir: str | Path) -> None:
        """Removes what a refused run has made of the file and its folder, before anyone else can have the lock."""
        with contextlib.suppress(OSError):
            if not self.owner:
                Path(output_dir, LOCK_FILE).unlink()
            if self.is_new:
                Path(output_dir).rmdir()


def lock_output_dir(output_dir: str | Path) -> Lock | None:
    """Returns the lock of a folder, which the main process takes for all.

    On Windows, and on a file system without locks, it keeps nobody out. Raises ValueError if another run has the
    folder, or it cannot be written.
    """
    if not is_main_process():
        return None
    place = Path(output_dir, LOCK_FILE)
    is_new = not place.parent.exists()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("a+")
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be written: {one_line(error)}") from error
    try:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a data loader's process would inherit
        if not os.path.samestat(os.fstat(file.fileno()), place.stat()):  # a refused run has just removed it
            raise BlockingIOError
    except (BlockingIOError, PermissionError, FileNotFoundError) as error:
        raise ValueError(f"--output_dir {output_dir} is in use by another run; wait for it or name another") from error
    except OSError:
        pass
    file.seek(0)
    return Lock(file, file.read(), is_new)


def check_output_dir(
    output_dir: str | Path, checkpoint: Checkpoint | None, options: Mapping[str, Any], lock: Lock | None = None
) -> None:
    """Raises ValueError if the folder cannot be written, or holds another run than the one that is resumed.

    With "latest", metrics, pictures and best/ may be there if a run with the same options left them, one that was
    killed before its first checkpoint.
    """
    folder, checkpoints = Path(output_dir), find_checkpoints(output_dir)
    same = {k: v for k, v in options.items() if k not in ("output_dir", "resume_from_checkpoint", "config")}
    owner = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
    is_own = options.get("resume_from_checkpoint") == "latest" and (lock is None or lock.owner == owner)
    results = FINAL_RESULTS if is_own else RESULTS
    found = checkpoints[-1:] + [folder / name for name in results if (folder / name).exists()]
    if found and not (checkpoint and checkpoint.folder.resolve().parent == folder.resolve()):
        remedy = "continue that run with --resume_from_checkpoint latest" if checkpoints else "move it away"
        raise ValueError(f"--output_dir {output_dir} holds {found[0].name} already; name another folder, or {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if lock:
            lock.file.truncate(0)
            lock.file.write(owner)
            lock.file.flush()
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be written: {one_line(error)}") from error


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Within it, an OSError, such as of a full disk, is a RuntimeError that names the file and the way to go on."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"{file} cannot be written: {one_line(error)}. {GO_ON}") from error


def add_metrics(file: Path, step: int, metrics: dict[str, float]) -> None:
    """Appends a line of JSON; null stands for what is not finite."""
    metrics = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": step, **metrics}) + "\n")


def _metrics_in(line: bytes) -> dict[str, float] | None:
    try:
        row = {name: math.nan if x is None else x for name, x in json.loads(line).items()}
    except (ValueError, AttributeError):
        return None
    return row if "step" in row and all(isinstance(x, int | float) for x in row.values()) else None


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Returns what `add_metrics` wrote, a dict a step; lines that are damaged or were cut short are left out."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [row for row in map(_metrics_in, lines) if row]


def cut_metrics(file: Path, step: int, warn: Callable[[str], None]) -> None:
    """Cuts the lines beyond a step, of a run that went on without reaching its next checkpoint, and damaged ones."""
    if file.exists():
        lines = file.read_bytes().split(b"\n")[:-1]
        rows = [_metrics_in(line) for line in lines]
        if None in rows:
            warn(f"{file}: damaged lines left out: {rows.count(None)}")
        kept = [line + b"\n" for line, row in zip(lines, rows, strict=True) if row and row["step"] <= step]
        write_whole(file, b"".join(kept))


def best_margin(file: Path, step: int) -> float:
    """Returns the margin of the best LoRA, 0 if unknown; removes one whose step is beyond the one to go on from."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            about = stored.metadata() or {}
        if int(about["step"]) <= step:
            return float(about["margin"])
        if is_main_process():
            file.unlink()
    except (OSError, SafetensorError, KeyError):
        pass
    return 0.0


class HeldOut:
    """Pairs kept out of training, at fixed timesteps and noise: what the policy predicts better than the reference.

    Args:
        batches: `Targets` of this process's share, with a timestep in each of M bands.
        bands: names of the bands, such as "200-399".
        beta: see `preference_loss`.
        best: the margin to exceed, see `best_margin`.
    """

    def __init__(self, batches: list[Targets], bands: list[str], beta: float, best: float = 0.0):
        self.batches, self.bands, self.beta, self.best, self._said = batches, bands, beta, best, set()

    @torch.no_grad()
    def measure(self, accelerator, errors: Callable[[Targets], torch.Tensor]) -> dict[str, float]:
        """Returns the metrics, over all processes, from the policy's `errors` (M, 2B) at targets.

        `eval/margins` and `eval/accuracies` as in training; `eval/winner_error` and `eval/loser_error`, by which share
        the policy's error is larger than the reference's; and each of the four in each band.
        """
        from accelerate.utils import send_to_device

        sums = torch.zeros(7, len(self.bands), device=accelerator.device)
        for targets in self.batches:
            targets = send_to_device(targets, accelerator.device)
            policy, reference = errors(targets), targets.reference_error
            _, metrics = preference_loss(policy, reference, self.beta, is_tie=targets.is_tie)
            margin, correct = metrics["rewards/margins"], metrics["rewards/accuracies"]
            parts = (*policy.chunk(2, 1), *reference.chunk(2, 1), margin, correct, torch.ones_like(margin))
            sums += torch.stack([part.where(targets.usable.chunk(2)[0], 0.0).sum(1) for part in parts])
        policy_w, policy_l, reference_w, reference_l, margin, correct, count = accelerator.reduce(sums).cpu()
        parts = {"margins": (margin, count), "accuracies": (correct, count)}
        parts |= {"winner_error": (policy_w, reference_w), "loser_error": (policy_l, reference_l)}
        logs = {}
        for name, (value, of) in parts.items():
            zero = 1 if name.endswith("_error") else 0
            logs[f"eval/{name}"] = value.sum() / of.sum() - zero
            logs |= {f"eval/{name}/{band}": x - zero for band, x in zip(self.bands, value / of, strict=True)}
        return {name: float(value) for name, value in logs.items()}

    def is_best(self, logs: dict[str, float]) -> bool:
        """Whether the margin is the best so far, with the winner's error within `WINNER_LIMIT`; then remembers it."""
        is_best = logs.get("eval/margins", 0.0) > self.best and logs["eval/winner_error"] <= WINNER_LIMIT
        self.best = logs["eval/margins"] if is_best else self.best
        return is_best

    def note(self, logs: dict[str, float], step: int) -> str:
        """Returns what the log should say, once each, of a policy that decays or does not move; "" otherwise."""
        winner, loser = logs["eval/winner_error"], logs["eval/loser_error"]
        decays, rests = winner > WINNER_LIMIT and loser > 0, max(abs(winner), abs(loser)) < 1e-4
        if not (decays or rests) or decays in self._said:
            return ""
        self._said.add(decays)
        text = "the policy has not moved. A higher --learning_rate or more steps help"
        if decays:
            text = f"the errors of winners, {winner:+.1%}, and losers, {loser:+.1%}, have both risen: pictures decay. "
            text += "A lower LoRA scale, fewer steps or a higher --beta_dpo help"
        return f"step {step}: on held-out pairs {text}"


def plot_report(metrics: list[dict[str, float]], file: str | Path, title: str, loss_type: str) -> None:
    """Plots the course of a run from what `read_metrics` returns; the loss of an untrained policy is `loss_type`'s."""
    from matplotlib.figure import Figure

    panels = {
        "loss": ["loss"],
        "implicit accuracy (says nothing about the images)": ["rewards/accuracies"],
        "rewards": ["rewards/margins", "rewards/chosen", "rewards/rejected"],
        "error of the noise prediction": ["policy_error", "reference_error"],
    }
    evaluated = [row for row in metrics if "eval/margins" in row]
    if evaluated:
        errors = [f"eval/{name}_error" for name in ("winner", "loser")]
        panels["implicit accuracy (says nothing about the images)"] += ["eval/accuracies"]
        panels |= {"held-out pairs: margin": ["eval/margins"], "held-out pairs: error above the reference's": errors}
    untrained_loss = preference_loss(torch.zeros(2), torch.zeros(2), 1.0, loss_type)[0].item()
    untrained = {"loss": untrained_loss, "rewards/accuracies": 0.5, "rewards/margins": 0.0}
    untrained |= {"eval/margins": 0.0, "eval/winner_error": 0.0}
    num_rows, mean_over = len(panels) // 2, max(1, len(metrics) // 20)
    figure = Figure(figsize=(12, 3.75 * num_rows), layout="constrained")
    figure.suptitle(f"{title}\nthin: each step, thick: mean over {mean_over}; dotted: a policy equal to the reference")
    for axes, (name, keys) in zip(figure.subplots(num_rows, 2).flat, panels.items(), strict=True):
        for key, color in zip(keys, ("tab:blue", "tab:green", "tab:red"), strict=False):
            rows, window = (evaluated, 1) if key.startswith("eval/") else (metrics, mean_over)
            rows = [row for row in rows if key in row]  # not in one that was damaged
            steps, values = [row["step"] for row in rows], np.array([row[key] for row in rows])
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.4)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1 :], smooth, color=color, linewidth=2, label=key)
            for band in dict.fromkeys(name for row in rows for name in row if name.startswith(f"{key}/")):
                points = [(row["step"], row[band]) for row in rows if band in row]  # a resumed run may have others
                axes.plot(*zip(*points, strict=True), color=color, linewidth=0.6, alpha=0.6)
                axes.annotate(band.split("/")[-1], points[-1], fontsize=7, color=color)
            if key in untrained:
                axes.axhline(untrained[key], color="gray", linestyle=":")
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=100)


class Validation:
    """Samples prompts at several scales of the LoRA, from the same seeds: pictures with a column for each scale.

    The pipeline is made of the models that train. Training goes on as if nothing had been sampled.

    Args:
        folder: pictures are written to `folder`/step-<step>-prompt-<number>.png, with a row for each seed.
        scales: of the LoRA; 0 is the base model.
        sampling: keyword arguments of the pipeline's call.
        autocast: context of the pipeline's calls.
        warn: called with a line if sampling fails.
    """

    def __init__(self, pipeline, folder, prompts, seeds, scales, sampling, autocast, warn):
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.folder, self.prompts, self.seeds = pipeline, Path(folder), prompts, seeds
        self.scales, self.sampling, self.autocast, self.warn = scales, sampling, autocast, warn
        self._base = None  # the base model's samples never change

    def load(self, file: Path) -> None:
        """Puts the LoRA that was saved in the place of the one that was trained, which ends training."""
        self.pipeline.unet.delete_adapters(list(self.pipeline.unet.peft_config))
        self.pipeline.unet.load_lora_adapter(file, prefix="unet", adapter_name="default")

    def sample(self, step: int) -> list[Path]:
        """Returns the pictures' files, in the order of the prompts; none, and a warning, if that fails."""
        from accelerate.utils.memory import clear_device_cache

        unet = self.pipeline.unet
        was_training, devices = unet.training, [unet.device] if unet.device.type == "cuda" else []
        others = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        eager = torch.compiler.set_stance("force_eager")  # no graphs for samples
        files = [self.folder / f"step-{step:06}-prompt-{i}.png" for i in range(len(self.prompts))]
        unet.eval()
        try:
            with eager, torch.random.fork_rng(devices), on_device(others, unet.device):
                columns = [self._sample_all(scale) for scale in self.scales]
            self.folder.mkdir(exist_ok=True)
            for file, *samples in zip(files, *columns, strict=True):
                self._picture(samples).save(file)
        except Exception as error:  # out of memory, above all: no reason to lose what was trained
            self.warn(f"no validation pictures at step {step}, training goes on: {one_line(error)}")
            files = []
        unet.train(was_training)
        clear_device_cache()
        return files

    def _sample_all(self, scale: float) -> list[list[Image.Image]]:
        """Returns a list of samples for each prompt, with the LoRA at a scale."""
        unet = self.pipeline.unet
        if scale == 0 and self._base:
            return self._base
        try:
            unet.set_adapters("default", scale) if scale else unet.disable_adapters()
            samples = [self._sample(prompt) for prompt in self.prompts]
        finally:
            unet.set_adapters("default", 1.0) if scale else unet.enable_adapters()
        self._base = self._base or (None if scale else samples)
        return samples

    def _picture(self, samples: list[list[Image.Image]]) -> Image.Image:
        """Returns samples, a list for each scale, side by side, with the scales above them."""
        from diffusers.utils import make_image_grid

        rows = [image for row in zip(*samples, strict=True) for image in row]
        grid = make_image_grid(rows, rows=len(self.seeds), cols=len(self.scales))
        width, text = grid.width // len(self.scales), max(10, grid.width // len(self.scales) // 16)
        picture = ImageOps.expand(grid, (0, 2 * text, 0, 0), "white")
        pen, font = ImageDraw.Draw(picture), ImageFont.load_default(text)
        for i, scale in enumerate(self.scales):
            label = f"LoRA {scale:g}" if scale else "base model"
            pen.text(((i + 0.5) * width, text), label, "black", font, anchor="mm")
        return picture

    @torch.no_grad()
    def _sample(self, prompt: str) -> list[Image.Image]:
        """Returns a sample per seed, decoded in the VAE's own precision: SDXL's overflows in half."""
        vae, samples = self.pipeline.vae, []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on any device
            with self.autocast():
                latents = self.pipeline(prompt, generator=generator, output_type="latent", **self.sampling).images
            pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
            if not pixels.isfinite().all():
                self.warn(f"validation: a sample for {prompt!r} is not finite; try bf16 instead of fp16")
            samples += self.pipeline.image_processor.postprocess(pixels.float().nan_to_num())
        return samples


def log_pictures(accelerator, files: list[Path], step: int) -> None:
    """Shows pictures in those trackers that accelerate gives a common way to: tensorboard and wandb."""
    for tracker in accelerator.trackers:
        pictures = {f"validation/prompt-{i}": np.asarray(Image.open(file))[None] for i, file in enumerate(files)}
        if tracker.name in ("tensorboard", "wandb"):
            tracker.log_images(pictures, step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}))


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that decide what a run does."""
    names = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def write_results(folder: Path, record: dict[str, Any], pictures: dict[str, str], repo_id: str | None) -> None:
    """Writes what stands beside a finished LoRA: `training_config.json`, `report.png` and the model card.

    `record` says how it was trained; `pictures` and `repo_id` are those of `model_card`.
    """
    metrics, options = read_metrics(folder / METRICS_FILE), record["options"]
    rows = [row for row in metrics if all(map(math.isfinite, row.values()))][-20:]
    names = [name for name in (rows[0] if rows else ()) if name != "step" and not name.startswith("eval/")]
    means = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
    last = next((row for row in reversed(metrics) if "eval/margins" in row), {})
    means |= {name: value for name, value in last.items() if name.startswith("eval/") and name.count("/") == 1}
    means |= {"bad_steps": metrics[-1].get("bad_steps", 0)} if metrics else {}  # a count
    record = {**record, "metrics": means, "versions": versions()}
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if metrics:
        title = f"{folder.resolve().name}, {options['objective']}"
        plot_report(metrics, folder / REPORT_FILE, title, options["loss_type"])
    (folder / CARD_FILE).write_text(model_card(record, pictures, repo_id), encoding="utf-8")


def model_card(record: dict[str, Any], pictures: dict[str, str], repo_id: str | None) -> str:
    """Returns the model card of a LoRA, in Markdown with the Hub's metadata, from what `training_config.json` holds.

    `pictures` are the files of samples by prompt, `repo_id` is the LoRA's place on the Hub, None if it is not pushed.
    """
    from huggingface_hub import ModelCardData

    options, base = record["options"], record["options"]["pretrained_model_name_or_path"]
    dataset = options["dataset_name"] or options["train_data_dir"]
    init = options["lora_init"]
    names = {
        name: f"the local folder `{Path(name).name}`" if Path(name).exists() else name
        for name in (base, dataset, init or "")
    }
    began = f"Training began with the LoRA {names[init]}, reference policy: {options['reference']}. " if init else ""
    metadata = ModelCardData(
        base_model=base if names[base] == base else None,
        datasets=[dataset] if names[dataset] == dataset and "/" in dataset else None,
        library_name="diffusers",
        tags=["lora", "diffusers", "text-to-image", "dpo", "inversion-dpo", "template:sd-lora"],
        widget=[{"text": prompt, "output": {"url": file}} for prompt, file in pictures.items()] or None,
    )
    columns = ", ".join(f"LoRA {s:g}" if s else "base model" for s in options["validation_lora_scales"])
    files = f"`{LORA_FILE}` is for diffusers"
    if options["output_kohya_format"]:
        files += f", `{KOHYA_FILE}`, the same LoRA, for ComfyUI, Forge, AUTOMATIC1111 and sd-scripts"
    prompts = [html.escape(" ".join(prompt.split())) or "(empty prompt)" for prompt in pictures]
    gallery = [f"<p>{p}</p>\n\n![{columns}]({f})\n" for p, f in zip(prompts, pictures.values(), strict=True)]
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", record["command"]))])
    where, newline = base if names[base] == base else f"path/to/{Path(base).name}", "\n"
    return f"""---
{metadata.to_yaml()}
---
# {repo_id.split("/")[-1] if repo_id else Path(options["output_dir"]).resolve().name}

A LoRA for {names[base]}, aligned with preference pairs (a better and a worse image for the same caption) by
inversion-based DPO ([arXiv 2507.11554](https://arxiv.org/abs/2507.11554),
[arXiv 2503.18454](https://arxiv.org/abs/2503.18454)), objective `{options["objective"]}`. The base model's licence
applies. {began}{f"The same prompts and seeds, from left to right: {columns}." if pictures else ""}

{newline.join(gallery)}
```python
from diffusers import {record["pipeline"]}

pipe = {record["pipeline"]}.from_pretrained({where!r}).to("cuda")
pipe.load_lora_weights({repo_id or "path/to/this/folder"!r}, adapter_name="aligned")
pipe.set_adapters("aligned", 1.0)  # a lower scale keeps more of the base model
```

{files}.

Data: {names[dataset]}; {", ".join(f"{name} {count}" for name, count in record["data"].items())}.
{record["steps"]} steps of {record["pairs_per_step"]} pairs at {options["resolution"]} pixels, rank {record["rank"]}.

{fence}
{record["command"]}
{fence}

{", ".join(f"{name} {version}" for name, version in record["versions"].items())}; mean over the last steps:
{", ".join(f"`{name}` {value:.4g}" for name, value in record["metrics"].items())}.

These metrics compare noise predictions. They do not say that the pictures are better: look at them. Attributes that
the pairs did not judge may have drifted, and biases of the pairs and of the base model remain.
"""


def create_hub_repo(hub_model_id: str | None, output_dir: str, token: str | None, private: bool) -> str:
    """Creates a model repository on the Hub, unless it is there, and returns its id.

    Raises ValueError if the Hub refuses, or a private repository was asked for and a public one is there.
    """
    from huggingface_hub import HfApi

    name, api = hub_model_id or Path(output_dir).resolve().name, HfApi(token=token)
    try:
        repo_id = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # one that exists may be readable only
        if private and not api.model_info(repo_id).private:
            raise ValueError("it exists and is public, against --hub_private_repo; make it private or name another")
    except Exception as error:  # bad names, tokens and networks raise many kinds
        remedy = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        raise ValueError(f"--push_to_hub to {name}: {one_line(error)}; {remedy}") from error
    return repo_id


def push_to_hub(repo_id: str, folder: str | Path, token: str | None) -> None:
    """Uploads the LoRA, its card, pictures and configuration; no checkpoints, no logs.

    Raises RuntimeError if that fails, with the command that repeats it.
    """
    from huggingface_hub import HfApi

    try:
        HfApi(token=token).upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(PUSHED), commit_message="Training finished"
        )
    except Exception as error:  # networks and servers fail in many kinds
        patterns = [word for pattern in PUSHED for word in ("--include", pattern)]
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *patterns])
        raise RuntimeError(f"the upload to {repo_id} failed: {one_line(error)}\nEverything is in {folder}. Repeat the "
                           f"upload, after `hf auth login`, with\n{command}") from error  # fmt: skip

"""Inversion-based preference optimisation: what `train_inversion_dpo.py` and its SDXL twin have in common.

    1  inversion     `invert` finds, by DDIM inversion, the noise that belongs to an image
    2  objectives    `preference_loss` turns policy and reference errors into a DPO loss
    3  pairs         reading preference pairs: a better and a worse image for one caption
    4  cache         keeping what inversion found, across epochs and runs
    5  training      LoRA, checkpoints, and the rest of what both scripts share around the loop
    6  results       what a run leaves: validation pictures, report, model card, upload to the Hub
    7  dry run       what can be known of data, inversion and cost before a run

Sections 1 and 2 are plain PyTorch and know neither the model nor the training script: copy them, or import this file,
into a trainer of your own. Inversion-DPO is arXiv 2507.11554, DDIM-InPO is arXiv 2503.18454, Diffusion-DPO is
arXiv 2311.12908.

Symbols: abar_t = `alphas_cumprod[t]`, alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), and the noise level
s_t = sigma_t / alpha_t (0.029 at t = 0 and 14.6 at t = 999 for Stable Diffusion). Winner and loser images always
travel in one batch (2B, ...): the B winners first, then the B losers.
"""

import argparse
import base64
import binascii
import concurrent.futures
import contextlib
import glob
import hashlib
import html
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import string
import tempfile
import textwrap
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial, reduce
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


class Pair(NamedTuple):
    """Two images of one caption, the better one first.

    Attributes:
        winner, loser: encoded bytes, or PIL images.
        captions: one caption or more; a visit takes one of them at random.
        margin: by how much the winner's score is above the loser's, NaN where the data have no scores.
        is_tie: neither image is better; `winner` is then the one that stands first.
    """

    winner: Any
    loser: Any
    captions: list[str]
    margin: float = math.nan
    is_tie: bool = False


class Choice(NamedTuple):
    """Which two images of a row are a pair, by their places among the row's images; else as in `Pair`."""

    winner: int
    loser: int
    margin: float = math.nan
    is_tie: bool = False


class RowPairs(NamedTuple):
    """The pairs of a row that are trained on, and the number of ties, left out or not, and of captions."""

    choices: list[Choice]
    num_ties: int
    num_captions: int


class BadRow(Exception):
    """A data row that cannot become a training example. The message is "reason" or "reason: details"."""


class NoUsablePair(RuntimeError):
    """Many pairs in a row cannot become training examples."""


def count_by_reason(reasons: Iterable[str]) -> Counter:
    """Returns how often each reason occurs in messages of `BadRow`."""
    return Counter(reason.partition(": ")[0] for reason in reasons)


def list_reasons(reasons: Iterable[str]) -> str:
    """Returns what `count_by_reason` counts, in words."""
    return ", ".join(f"{count} with {reason}" for reason, count in count_by_reason(reasons).items())


def exceeds(num_bad: float, fraction: float, num_rows: float) -> bool:
    """Whether clearly more than a fraction of so many rows are bad: by three standard deviations of the count."""
    expected = fraction * num_rows
    return num_bad > expected + 3 * math.sqrt(expected)


def one_line(error: Exception) -> str:
    """Returns the beginning of an error's message, for a message of our own; its kind if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


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


def label_meaning(text: str) -> list[str | float]:
    """An argparse type: "left=1" says what a label means, 1 that image 0 won, 0 that image 1 did, 0.5 a tie."""
    label, _, meaning = text.rpartition("=")
    if not label or meaning not in ("0", "1", "0.5", ".5"):
        raise argparse.ArgumentTypeError(f"is {text}; allowed: LABEL=1, LABEL=0 and LABEL=0.5, such as left=1")
    return [label_key(label), float(meaning)]


def label_key(label: Any) -> str:
    """Returns a label as `--label_map` is looked up: text without case, numbers whatever their type."""
    text = str(label).strip().lower()
    try:
        return str(float(text) + 0.0)  # which is 0.0 for -0.0
    except ValueError:
        return text


LABEL_MEANINGS = {"0.0": 0.0, "0.5": 0.5, "1.0": 1.0, "false": 0.0, "true": 1.0}  # by `label_key`


@dataclass(frozen=True)
class PairColumns:
    """Which columns of the data are a pair, in one of four shapes; the fields are options of the scripts.

        labels    two images, and a label that says whether image 0 won: Pick-a-Pic's shape, the default
        winners   a winner's column and a loser's
        scores    two images with a score each, higher is better
        groups    a list of images with a list of scores, of which pairs are made

    A column may be a nested field, "prompt.text"; a field of a list's items, "images.score", is the list of them.
    """

    image_0_column: str = "jpg_0"
    image_1_column: str = "jpg_1"
    label_column: str = "label_0"
    label_map: list[tuple[str, float]] | None = None
    winner_column: str | None = None
    loser_column: str | None = None
    score_0_column: list[str] | None = None
    score_1_column: list[str] | None = None
    images_column: str | None = None
    scores_column: list[str] | None = None
    score_weights: list[float] | None = None
    min_score_margin: float = 0.0
    pairs_per_group: str = "best_worst"
    caption_column: str = "caption"
    caption_template: str | None = None
    tie_policy: str = "drop"

    @classmethod
    def of(cls, args: argparse.Namespace) -> "PairColumns":
        """Returns what the options of `add_data_options` say."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    @property
    def shape(self) -> str:
        if self.winner_column:
            return "winners"
        if self.images_column:
            return "groups"
        return "scores" if self.score_0_column else "labels"

    @cached_property
    def meanings(self) -> dict[str, float]:
        """What labels mean, by `label_key`. With a map nothing else is understood, lest one that does not fit be
        ignored."""
        return LABEL_MEANINGS if self.label_map is None else dict(self.label_map)

    def image_columns(self) -> dict[str, str]:
        """Returns the columns of images by their options."""
        if self.shape == "winners":
            return {"--winner_column": self.winner_column, "--loser_column": self.loser_column}
        if self.shape == "groups":
            return {"--images_column": self.images_column}
        return {"--image_0_column": self.image_0_column, "--image_1_column": self.image_1_column}

    def other_columns(self) -> list[tuple[str, str]]:
        """Returns (option, column) of all that is not an image."""
        columns = []
        if self.shape == "labels":
            columns.append(("--label_column", self.label_column))
        for option in ("score_0_column", "score_1_column", "scores_column"):
            columns += [(f"--{option}", column) for column in getattr(self, option) or ()]
        if not self.caption_template:
            return [*columns, ("--caption_column", self.caption_column)]
        return columns + [("--caption_template", column) for _, column in self._template() if column]

    def _template(self) -> list[tuple[str, str | None]]:
        """Returns the template as pieces of text, each followed by a column or None."""
        return [(text, column) for text, column, _, _ in string.Formatter().parse(self.caption_template)]

    def check(self, names: Sequence[str], features: dict[str, Any] | None) -> None:
        """Raises ValueError if the data lack a column, or one cannot hold what it is said to hold."""
        options = [*self.image_columns().items(), *self.other_columns()]
        for option, path in options:
            if column_of(path, names) is None:
                raise ValueError(f"{option} {path}: the data has no such column, only {', '.join(names)}")
        for option, path in options if features else []:
            kinds = {"--label_column": None, "--caption_template": None, "--caption_column": "text"}
            kinds |= dict.fromkeys(("--score_0_column", "--score_1_column", "--scores_column"), "numbers")
            _check_column_type(option, path, feature_at(option, path, features), kinds.get(option, "images"))

    def with_label_names(self, features: dict[str, Any] | None) -> "PairColumns":
        """Returns these columns for rows whose label is stored as the number of a name (a `datasets.ClassLabel`)."""
        if not features or self.shape != "labels":
            return self
        feature = feature_at("--label_column", self.label_column, features)
        if not hasattr(feature, "int2str"):
            return self
        keys = [label_key(name) for name in feature.names]
        numbers = [[label_key(i), self.meanings[key]] for i, key in enumerate(keys) if key in self.meanings]
        if not numbers:
            raise ValueError(
                f"--label_column {self.label_column} holds the names {', '.join(feature.names)[:200]}; say by "
                "--label_map what they mean"
            )
        return replace(self, label_map=numbers)

    def images(self, row: dict[str, Any]) -> list[Any]:
        """Returns the images of a row in order, as they are stored."""
        images = [value_at(row, path) for path in self.image_columns().values()]
        if self.shape != "groups":
            return images
        scores = self.scores(row)
        if not isinstance(images[0], list) or len(images[0]) != len(scores):
            count = len(images[0]) if isinstance(images[0], list) else "no"
            raise BadRow(f"images and scores differ in number: {count} images, {len(scores)} scores")
        return images[0]

    def choices(self, row: dict[str, Any]) -> list[Choice]:
        """Returns the pairs of a row, ties among them; looks at no image.

        Raises:
            BadRow: if there is no valid label or score.
        """
        if self.shape == "winners":
            return [Choice(0, 1)]
        if self.shape == "labels":
            value = self._label(value_at(row, self.label_column))
            return [Choice(0, 1) if value == 1 else Choice(1, 0) if value == 0 else Choice(0, 1, is_tie=True)]
        scores = self.scores(row)
        places = [place for place, score in enumerate(scores) if not math.isnan(score)]
        if len(places) < 2:
            raise BadRow("no score" if self.shape == "scores" else "fewer than two images with a score")
        places.sort(key=lambda place: -scores[place])
        if self.pairs_per_group == "all":
            chosen = itertools.combinations(places, 2)
        else:
            chosen = itertools.pairwise(places if self.pairs_per_group == "adjacent" else [places[0], places[-1]])
        margins = [(winner, loser, scores[winner] - scores[loser]) for winner, loser in chosen]
        return [
            Choice(winner, loser, margin, margin == 0 or margin < self.min_score_margin)
            for winner, loser, margin in margins
        ]

    def pairs_of(self, row: dict[str, Any], lacks_image: bool) -> "RowPairs":
        """Returns what a row gives to train on; looks at no image.

        Raises:
            BadRow: if it lacks an image, has no caption, or no valid label or score.
        """
        if lacks_image:
            raise BadRow("no image")
        num_captions, choices = len(self.captions(row)), self.choices(row)
        num_ties = sum(choice.is_tie for choice in choices)
        if num_ties and self.tie_policy == "drop":
            choices = [choice for choice in choices if not choice.is_tie]
        return RowPairs(choices, num_ties, num_captions)

    def _label(self, label: Any) -> float:
        if label is None or label != label:
            raise BadRow("no label")
        if (key := label_key(label)) not in self.meanings:
            known = "none of 0, 0.5, 1" if self.label_map is None else "not named by --label_map"
            raise BadRow(f"label not understood: --label_column {self.label_column} holds {label!r:.80}, {known}")
        return self.meanings[key]

    def scores(self, row: dict[str, Any]) -> list[float]:
        """Returns the score of each image, NaN for one that has none; for rows of scores or groups."""
        if self.shape == "scores":
            columns = [
                [value_at(row, path) for path in pair]
                for pair in zip(self.score_0_column, self.score_1_column, strict=True)
            ]
        else:
            columns = [value_at(row, path) for path in self.scores_column]
        if not all(isinstance(column, list) for column in columns):
            raise BadRow("no score")
        if len({len(column) for column in columns}) > 1:
            raise BadRow(f"columns of scores differ in number: {' and '.join(str(len(c)) for c in columns)}")
        weights = self.score_weights or [1.0] * len(columns)
        sums = (
            sum(
                weight * (math.nan if score is None else float(score))  # of a decimal, too
                for weight, score in zip(weights, of_one_image, strict=True)
            )
            for of_one_image in zip(*columns, strict=True)
        )
        return [total if math.isfinite(total) else math.nan for total in sums]

    def captions(self, row: dict[str, Any]) -> list[str]:
        """Returns the captions of a row, at least one; raises BadRow if there is none."""
        if self.caption_template:
            values = [(text, as_text(value_at(row, column)) if column else "") for text, column in self._template()]
            caption = " ".join("".join(text + value for text, value in values).split()).strip(" ,;")
            if caption and any(value for _, value in values):
                return [caption]
            raise BadRow("no caption: all columns of --caption_template are empty")
        value = value_at(row, self.caption_column)
        captions = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        captions = [text for text in captions if text.strip()]
        if not captions:
            raise BadRow(f"no caption: it is {value!r:.80}")
        return captions


def column_of(path: str, names: Iterable[str]) -> str | None:
    """Returns the column that a path "column.field.field" begins with; column names may contain dots."""
    return max((name for name in names if path == name or path.startswith(name + ".")), key=len, default=None)


def value_at(row: dict[str, Any], path: str) -> Any:
    """Returns what a row holds at a path, None if nothing; fields of a list's items are a list."""
    if path in row:
        return row[path]
    column = column_of(path, row)
    value = row[column] if column is not None else None
    for field in path[len(column or path) + 1 :].split("."):
        if isinstance(value, list):
            value = [item.get(field) if isinstance(item, dict) else None for item in value]
        else:
            value = value.get(field) if isinstance(value, dict) else None
    return value


def feature_at(option: str, path: str, features: dict[str, Any]) -> Any:
    """Returns the `datasets` feature at a path; raises ValueError if the column has no such field."""
    column = column_of(path, features)
    feature, is_list = features[column], False
    for field in path[len(column) + 1 :].split(".") if path != column else []:
        while hasattr(feature, "feature"):
            feature, is_list = feature.feature, True
        if not isinstance(feature, dict) or field not in feature:
            found = ", ".join(feature) if isinstance(feature, dict) else "none"
            raise ValueError(f"{option} {path}: {column} has no field {field}, only {found}")
        feature = feature[field]
    return [feature] if is_list else feature


def _check_column_type(option: str, column: str, feature: Any, needed: str | None) -> None:
    """Raises ValueError if a column holds something else than images, text or numbers."""
    is_list = isinstance(feature, list) or hasattr(feature, "feature")
    if is_list:
        feature = feature[0] if isinstance(feature, list) else feature.feature
    kind = str(getattr(feature, "dtype", feature))
    is_image = isinstance(feature, dict) and {"bytes", "path"} & feature.keys()
    fits = {
        "images": is_image or kind in ("string", "large_string", "binary", "large_binary", "PIL.Image.Image"),
        "text": kind in ("string", "large_string"),
        "numbers": kind.startswith(("float", "int", "uint", "decimal")),
        None: True,
    }[needed]
    if option in ("--images_column", "--scores_column"):
        needed, fits = f"lists of {needed}", fits and is_list
    elif option != "--caption_column" and needed is not None:  # a caption may be one of a list
        fits = fits and not is_list
    if not fits and kind != "null":
        kind = f"lists of {kind}" if is_list else kind
        raise ValueError(f"{option} {column}: the column holds {kind}; needed: {needed}")


def as_text(value: Any) -> str:
    """Returns a value of a structured caption in words: lists with commas, the parts of an item with blanks."""
    if isinstance(value, dict):
        value = list(value.values())
        return " ".join(filter(None, map(as_text, value)))
    if isinstance(value, list):
        items = (" ".join(filter(None, map(as_text, v))) if isinstance(v, list) else as_text(v) for v in value)
        return ", ".join(filter(None, items))
    return "" if value is None or value != value else str(value).strip()


SHUFFLE_BUFFER_SIZE = 256


def add_data_options(add: Callable[..., Any]) -> None:
    """Adds the options that say where preference pairs are and how they are read; `check_data_options` checks them."""
    defaults = PairColumns()
    # fmt: off
    add("--dataset_name", help="preference pairs: whatever datasets.load_dataset takes")
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split_name", default="train", help="split to train on")
    add("--train_data_dir", help="instead of a name: a folder of parquet or arrow files, of save_to_disk, of JSONL or "
        "CSV with image paths, an image folder with metadata, folders of equal file names; or one such file")
    add("--streaming", action="store_true", help="read the data from beginning to end without a copy on the disk")
    add("--shuffle_buffer_size", type=number(int, least=1), default=SHUFFLE_BUFFER_SIZE,
        help="rows of a stream that are mixed at a time; more mix better and take memory")
    add("--image_0_column", default=defaults.image_0_column,
        help="column of the first image: encoded bytes, paths, images or base64")
    add("--image_1_column", default=defaults.image_1_column, help="column of the second image")
    add("--label_column", default=defaults.label_column,
        help="column that is 1 where image 0 won, 0 where image 1 won, 0.5 for a tie")
    add("--label_map", nargs="+", type=label_meaning, metavar="LABEL=MEANING",
        help="what other labels mean: left=1 right=0 tie=0.5")
    add("--winner_column", help="instead of a label: column of the better image")
    add("--loser_column", help="column of the worse image")
    add("--score_0_column", nargs="+", help="instead of a label: column of image 0's score, higher is better")
    add("--score_1_column", nargs="+", help="column of image 1's score")
    add("--images_column", help="instead of two images: column of a list of images for one caption")
    add("--scores_column", nargs="+", help="column of the list of their scores, higher is better")
    add("--score_weights", nargs="+", type=number(float), metavar="WEIGHT",
        help="weights of several columns of scores, which are summed; below 0 where lower is better")
    add("--min_score_margin", type=number(float, least=0), default=defaults.min_score_margin,
        help="pairs with scores closer than this are ties; higher keeps fewer, clearer pairs")
    add("--pairs_per_group", choices=["best_worst", "all", "adjacent"], default=defaults.pairs_per_group,
        help="which pairs are made of a group of images, ranked by score")
    add("--caption_column", default=defaults.caption_column,
        help="column of the caption, or of a list of which each visit takes one at random")
    add("--caption_template", help='instead of a column: text with columns in braces, "{objects}, {style}"')
    add("--tie_policy", choices=["drop", "soft"], default=defaults.tie_policy,
        help="leave ties out, or train towards no preference between the two images")
    add("--max_train_samples", type=number(int, least=1), help="train on the first so many pairs only")
    add("--min_image_size", type=number(int, least=1), default=1,
        help="skip pairs with an image whose shorter side has fewer pixels; higher is pickier")
    add("--max_bad_fraction", type=number(float, least=0, most=1), default=0.1,
        help="end the run if a larger share of the rows cannot be used; higher tolerates more")
    # fmt: on


def check_data_options(args: argparse.Namespace, error: Callable[[str], None]) -> None:
    """Ends the run by `error` if options of `add_data_options` contradict each other."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        error("give the data by either --dataset_name or --train_data_dir")
    defaults = PairColumns()
    couples = [("winner_column", "loser_column"), ("score_0_column", "score_1_column"),
               ("images_column", "scores_column")]  # fmt: skip
    for couple in couples:
        given = [name for name in couple if getattr(args, name)]
        if len(given) == 1:
            error(f"--{couple[0]} and --{couple[1]} go together; only --{given[0]} is given")
    given = [couple[0] for couple in couples if getattr(args, couple[0])]
    if len(given) > 1:
        error(f"--{given[0]} and --{given[1]} exclude each other: they are two shapes of data")
    columns = PairColumns.of(args)
    images = list(columns.image_columns().items())
    if len(images) == 2 and images[0][1] == images[1][1]:
        error(f"{images[0][0]} and {images[1][0]} are both {images[0][1]}; allowed: two columns")
    others = {
        "labels": (),
        "winners": ("label_column", "label_map", "image_0_column", "image_1_column"),
        "scores": ("label_column", "label_map"),
        "groups": ("label_column", "label_map", "image_0_column", "image_1_column"),
    }
    for name in others[columns.shape]:
        if getattr(args, name) != getattr(defaults, name):
            error(f"--{name} and --{given[0]} exclude each other: they are two shapes of data")
    if columns.shape not in ("scores", "groups"):
        for name in ("score_weights", "min_score_margin"):
            if getattr(args, name) != getattr(defaults, name):
                error(f"--{name} goes with --score_0_column or --scores_column")
    if columns.shape != "groups" and args.pairs_per_group != defaults.pairs_per_group:
        error("--pairs_per_group goes with --images_column")
    if columns.shape == "winners" and args.tie_policy != "drop":
        error("--tie_policy soft goes with labels or scores: with --winner_column there are no ties")
    if args.score_0_column and len(args.score_0_column) != len(args.score_1_column):
        error(f"--score_0_column names {len(args.score_0_column)} columns, --score_1_column "
              f"{len(args.score_1_column)}; allowed: as many")  # fmt: skip
    scores = args.score_0_column or args.scores_column or ()
    if args.score_weights and len(args.score_weights) != len(scores):
        error(f"--score_weights has {len(args.score_weights)} numbers; allowed: {len(scores)}, one a column of scores")
    meanings = {}
    for label, meaning in args.label_map or ():
        if meanings.setdefault(label, meaning) != meaning:
            error(f"--label_map gives {label!r} two meanings, {meanings[label]:g} and {meaning:g}")
    if args.caption_template is not None:
        if args.caption_column != defaults.caption_column:
            error("--caption_column and --caption_template exclude each other")
        try:
            pieces = list(string.Formatter().parse(args.caption_template))
        except ValueError as problem:
            error(f"--caption_template {args.caption_template!r}: {problem}")
        if not any(column for _, column, _, _ in pieces) or any(
            column == "" or spec or conversion for _, column, spec, conversion in pieces
        ):
            error(f"--caption_template is {args.caption_template!r}; allowed: text with columns in braces")
    if not args.streaming and args.shuffle_buffer_size != SHUFFLE_BUFFER_SIZE:
        error("--shuffle_buffer_size goes with --streaming")


class Source(NamedTuple):
    """Data rows, a `datasets.Dataset` or `IterableDataset`, and the folder that relative image paths belong to."""

    rows: Any
    image_root: Path


IMAGE_SUFFIXES = frozenset(Image.registered_extensions())


def load_rows(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    streaming: bool = False,
    image_columns: Sequence[str] = (),
    caption_column: str = "caption",
) -> Source:
    """Returns the rows of a split: of a data set by name, or of a local folder or file.

    Args:
        dataset_name, dataset_config_name: whatever `datasets.load_dataset` takes.
        train_data_dir: instead of a name, a folder or file of the kinds that README.md lists.
        streaming: return an `IterableDataset`, which is read from beginning to end and leaves no copy on the disk.
        image_columns: if the folder has subfolders of all these names, then these are the columns, and files of equal
            names below them the rows, with their captions in .txt or JSONL files, see `rows_of_folders`.

    Raises:
        ValueError: if there is nothing to load, in one line that names the option.
    """
    from datasets import Dataset, IterableDataset, disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()
    source = f"--dataset_name {dataset_name}" if dataset_name else f"--train_data_dir {train_data_dir}"
    path = Path(train_data_dir or dataset_name).expanduser()
    root = path if path.is_dir() else path.parent
    load = partial(load_dataset, split=split, cache_dir=cache_dir, streaming=streaming)
    has_folders = bool(image_columns) and all((path / column).is_dir() for column in image_columns)
    try:
        if dataset_name:
            rows = load(dataset_name, dataset_config_name)
        elif not path.exists():
            raise FileNotFoundError("no such folder or file")
        elif (path / "state.json").exists():
            rows = load_from_disk(path)
        elif (path / "dataset_dict.json").exists():
            rows = load_from_disk(path / split)
        else:
            try:
                rows, root = load_files(path, split, load)
                if has_folders and not all(column_of(column, columns_of(rows)) for column in image_columns):
                    rows = None  # the files have the captions only
            except Exception:
                if not has_folders:
                    raise
                rows = None
            if rows is None:
                rows = Dataset.from_list(rows_of_folders(path, image_columns, caption_column))
    except Exception as error:  # `datasets` raises a dozen kinds, its own and those of pyarrow, fsspec and the Hub
        reason = one_line(error) + (f" ({one_line(error.__cause__)})" if error.__cause__ else "")
        raise ValueError(f"{source}, split {split!r}, cannot be loaded: {reason}") from error
    if not isinstance(rows, Dataset | IterableDataset):
        raise ValueError(f"{source} is not a single split")
    if streaming and isinstance(rows, Dataset):
        rows = rows.to_iterable_dataset()
    return Source(rows, root)


def columns_of(rows: Any) -> list[str]:
    """Returns the names of the columns; of a stream that does not know them, those of its first row."""
    if rows.features is not None:
        return list(rows.features)
    first = next(iter(rows.take(1)), None)
    if first is None:
        raise ValueError("the stream is empty")
    return list(first)


def load_files(path: Path, split: str, load: Callable) -> tuple[Any, Path]:
    """Returns the rows of an image folder with metadata, or of data files, and the folder their paths belong to.

    Args:
        load: `datasets.load_dataset` for the split.
    """
    for folder in (path / split, path):
        if any((folder / f"metadata.{kind}").exists() for kind in ("jsonl", "csv", "parquet")):
            return load("imagefolder", data_files={split: glob.escape(str(folder)) + "/**"}), folder
    builder, files = find_data_files(path, split)
    options = {}
    if builder == "csv":  # by default "None" and "NA" are no captions
        options = {"keep_default_na": False, "na_values": ["", "nan", "NaN"]}
    return load(builder, data_files={split: [glob.escape(str(file)) for file in files]}, **options), files[0].parent


DATA_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


def find_data_files(path: Path, split: str) -> tuple[str, list[Path]]:
    """Returns the files of a split at a path and the name of the `datasets` builder that reads them.

    Files belong to a split if they are named after it or lie in a folder that is; all that belong to no split belong
    to "train" if nothing else does. Parquet and arrow files may lie deeper in the folder; JSONL and CSV, to which
    paths of images are relative, and which have the suffixes of many other things, lie at its top or in the split's
    folder. Hidden files are left alone.

    Raises:
        ValueError, FileNotFoundError: if there are none, or if it is not clear which.
    """

    def suffix_of(file):
        return Path(file.name.lower().removesuffix(".gz")).suffix

    def belongs_to(file, name):
        words = [*file.relative_to(path).parent.parts, re.match("[a-z]*", file.name.lower())[0]]
        return name in words

    if path.is_file():
        if suffix_of(path) not in DATA_FORMATS:
            raise ValueError(f"the file ends in {path.suffix or 'nothing'}; allowed: {', '.join(DATA_FORMATS)}")
        return DATA_FORMATS[suffix_of(path)], [path]
    for suffix in (".parquet", ".arrow", ".jsonl", ".csv"):
        is_deep = suffix in (".parquet", ".arrow")
        places = [path.rglob("*")] if is_deep else [path.glob("*"), (path / split).glob("*")]
        files = sorted(
            file
            for place in places
            for file in place
            if suffix_of(file) == suffix and file.is_file() and not is_hidden(file.relative_to(path))
        )
        own = [file for file in files if belongs_to(file, split)]
        if not own and split == "train":
            own = [file for file in files if not any(belongs_to(file, name) for name in SPLIT_NAMES)]
        if not is_deep and len({file.parent for file in own}) > 1:
            raise ValueError(f"{own[0]} and {own[-1]} lie in different folders; name one of the files")
        if own:
            return DATA_FORMATS[suffix], own
    raise FileNotFoundError("no parquet, arrow, JSONL or CSV files of this split, no metadata of an image folder")


def is_hidden(path: Path) -> bool:
    """Whether a relative path is hidden, as caches and what file managers leave behind are."""
    return any(part.startswith((".", "__")) for part in path.parts)


def rows_of_folders(folder: Path, image_columns: Sequence[str], caption_column: str) -> list[dict[str, Any]]:
    """Returns a row for every file name below the subfolders `image_columns`, with an image's path in each column.

    Names are compared without their suffix. A row's caption is in a .txt file of the same name, beside one of the
    images or in the folder itself, or in a JSONL file of the folder, whose rows have a `file_name` and whatever else
    the row shall have.

    Raises:
        ValueError: if a name occurs twice in a subfolder, or no name in all of them.
    """
    images = {column: _files_by_name(folder / column) for column in image_columns}
    names = sorted(set().union(*images.values()))
    if not set.intersection(*map(set, images.values())):
        begins = ", ".join(f"{column}/{min(files, default='(no image)')}" for column, files in images.items())
        raise ValueError(f"no image has the same name in all of the folders, which begin with {begins}")
    known = {}
    for file in sorted(file for file in folder.glob("*.jsonl") if not is_hidden(Path(file.name))):
        for line_number, line in enumerate(read_text(file).split("\n"), 1):
            try:
                row = json.loads(line) if line.strip() else None
                if row is not None:
                    known[_stem(str(row["file_name"]), image_columns)] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {line_number}, is no row with a file_name: {one_line(error)}"
                ) from error
    if known and not known.keys() & set(names):
        raise ValueError(f"no file_name of the JSONL is that of an image: {min(known)} is none of {names[0]}, ...")
    rows = []
    for name in names:
        row = {**known.get(name, {}), **{column: files.get(name) for column, files in images.items()}}
        for place in (*image_columns, "."):
            text = folder / place / f"{name}.txt"
            if caption_column not in row and text.is_file():
                row[caption_column] = read_text(text).strip()
        rows.append(row)
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def read_text(file: Path) -> str:
    """Returns the text of a UTF-8 file, with or without a byte-order mark; raises ValueError that names the file."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {one_line(error)}") from error


def _stem(name: str, image_columns: Sequence[str] = ()) -> str:
    """Returns an image's relative path without the suffix, and without the column's folder if it begins with one."""
    path = Path(name)
    if len(path.parts) > 1 and path.parts[0] in image_columns:
        path = path.relative_to(path.parts[0])
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def _files_by_name(folder: Path) -> dict[str, str]:
    """Returns the absolute paths of a folder's images by their name below it, without suffix."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(file.relative_to(folder)):
            name = _stem(str(file.relative_to(folder)))
            if name in files:
                raise ValueError(f"{files[name]} and {file} have the same name but for the suffix")
            files[name] = str(file.resolve())
    return files


def load_pairs(args: argparse.Namespace, in_order: bool = False) -> "PreferencePairs | StreamedPairs":
    """Returns the preference pairs that `add_data_options` asks for; raises ValueError if there are none.

    Args:
        in_order: to be read once, from beginning to end; rows that could be read at any place are a stream, too.
    """
    columns = PairColumns.of(args)
    source = load_rows(
        args.dataset_name, args.dataset_config_name, args.train_data_dir, args.dataset_split_name, args.cache_dir,
        args.streaming, list(columns.image_columns().values()), args.caption_column,
    )  # fmt: skip
    if in_order and not args.streaming:
        source = source._replace(rows=source.rows.to_iterable_dataset())
    if args.streaming or in_order:
        return StreamedPairs(source, columns, args.shuffle_buffer_size, args.max_train_samples)
    return PreferencePairs(source, columns, args.max_train_samples, args.max_bad_fraction)


def read_pair(columns: PairColumns, row: dict[str, Any], choice: Choice, image_root: Path) -> Pair:
    """Returns a pair of a data row with its images read but not decoded; raises BadRow if one is missing."""
    images = columns.images(row)
    winner, loser = (read_image(images[place], image_root) for place in (choice.winner, choice.loser))
    if winner == loser:
        raise BadRow("both images are the same")
    return Pair(winner, loser, columns.captions(row), choice.margin, choice.is_tie)


class PreferencePairs:
    """Preference pairs of rows that can be read at any place, `self[index]` is a `Pair` or raises `BadRow`.

    The labels, scores and captions of all rows are read at once; the images are not.

    Args:
        max_pairs: keep the first so many pairs, look at no row beyond; all if None.
        max_bad_fraction: the largest share of rows without a label, score or caption.

    Attributes:
        max_captions: the most captions that a row has.

    Raises:
        ValueError: if a column is missing, too many rows are bad, or no pair is left.
    """

    def __init__(self, source: Source, columns: PairColumns, max_pairs=None, max_bad_fraction=1.0):
        rows = source.rows
        columns.check(rows.column_names, rows.features)
        columns = columns.with_label_names(rows.features)
        self.columns, self.image_root = columns, source.image_root
        images = {column_of(path, rows.column_names) for path in columns.image_columns().values()}
        others = {column_of(path, rows.column_names) for _, path in columns.other_columns()}
        self.rows = rows.select_columns(sorted(images | others)).with_format("arrow")  # decodes no image
        whole_images = sorted(images & set(columns.image_columns().values()))
        self.num_rows = self.num_ties = self.max_captions = 0
        self.bad, self.first_bad = Counter(), {}
        kept = []
        for table in self.rows.iter(100 if images & others else 10_000):  # structs may hold images and scores
            try:
                rows_of_table = table.select(sorted(others)).to_pylist()
                are_missing = [table.column(column).is_null().to_pylist() for column in whole_images]
            except ValueError as error:  # text that is none
                raise ValueError(f"the rows beyond row {self.num_rows} cannot be read: {one_line(error)}") from error
            for place, row in enumerate(rows_of_table):
                if max_pairs is not None and len(kept) >= max_pairs:
                    break
                try:
                    found = columns.pairs_of(row, any(is_missing[place] for is_missing in are_missing))
                except BadRow as error:
                    reason = str(error).partition(": ")[0]
                    self.bad[reason] += 1
                    self.first_bad.setdefault(reason, f"row {self.num_rows}, {error}")
                else:
                    self.num_ties += found.num_ties
                    self.max_captions = max(self.max_captions, found.num_captions)
                    kept += [(self.num_rows, *choice) for choice in found.choices]
                self.num_rows += 1
        self.kept = np.array(kept[:max_pairs], dtype=[("row", "i8"), ("winner", "i4"), ("loser", "i4"),
                                                      ("margin", "f8"), ("is_tie", "?")])  # fmt: skip
        bad = "; ".join(
            f"{count} with {reason} (the first: {self.first_bad[reason]})" for reason, count in self.bad.items()
        )
        if len(self.kept) == 0:
            raise ValueError(f"no pair is left of {self.num_rows} rows: {self.num_ties} ties" + (bad and f"; {bad}"))
        if self.bad.total() > max_bad_fraction * self.num_rows:
            raise ValueError(
                f"--max_bad_fraction is {max_bad_fraction:g}, but of {self.num_rows} rows "
                f"{self.bad.total()} cannot be used: {bad}"
            )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Pair:
        row, *choice = self.kept[index].item()
        try:
            (values,) = self.rows[row].to_pylist()
        except ValueError as error:
            raise BadRow(f"unreadable row: {one_line(error)}") from error
        return read_pair(self.columns, values, Choice(*choice), self.image_root)

    @property
    def num_pairs(self) -> int:
        return len(self)

    def row_name(self, index: int) -> str:
        row, winner, loser, *_ = self.kept[index].item()
        return f"row {row}" + (f", images {winner} and {loser}" if self.columns.shape == "groups" else "")

    def skipped_before(self, index: int) -> list[tuple[str, str]]:
        """Returns nothing: what was skipped is known from the start, see `counts`."""
        return []

    def another(self, rng: np.random.Generator) -> int:
        """Returns an index at random."""
        return int(rng.integers(len(self)))

    def sample(self, count: int, seed: int) -> list[int]:
        """Returns the indices of so many pairs at random, of all if there are fewer."""
        return np.random.default_rng([seed, 4]).permutation(len(self))[:count].tolist()

    def first_wins(self, items: list[int]) -> list[bool]:
        """Returns for all pairs whether image 0 won, as far as the data tell; `items` are those of a stream."""
        if self.columns.shape not in ("labels", "scores"):
            return []
        return (self.kept["winner"] == 0)[~self.kept["is_tie"]].tolist()

    def batches(self, batch_size, seed, visit=0, position=None, process_index=0, num_processes=1) -> "VisitBatches":
        """Returns the batch sampler of a process; `position` is that of a stream, there is none here."""
        return VisitBatches(len(self), batch_size, seed, visit, process_index, num_processes)

    def counts(self) -> dict[str, int]:
        """Returns what the data hold, in words for people."""
        ties = "ties among them" if self.columns.tie_policy == "soft" else "ties left out"
        bad = {f"rows skipped for {reason}": count for reason, count in self.bad.items()}
        return {"pairs": len(self), ties: self.num_ties, **bad}


class StreamedPair(NamedTuple):
    """A pair of a stream, with its row, since a stream cannot be read again.

    Attributes:
        name: the row's name.
        row: what the row holds; no image is decoded.
        choice: which of its images are the pair.
        bad_rows: (name, reason) of the rows between the pair before and this one that cannot be used.
    """

    name: str
    row: dict[str, Any]
    choice: Choice
    bad_rows: list[tuple[str, str]]


class StreamedPairs:
    """Preference pairs of a stream: `self[streamed_pair]` is a `Pair` or raises `BadRow`.

    Visit v of a run is the v-th pair of the stream, which starts again when it ends; blocks of `buffer_size` rows are
    mixed. Every process reads the whole stream, so that the visits are the same for any number of processes.

    Args:
        buffer_size: rows of a block, kept in memory twice, with their images.
        max_pairs: start again after so many pairs.

    Raises:
        ValueError: if a column is missing, or the stream is empty; on reading, if it ends in an error.
    """

    num_pairs = None  # unknown

    def __init__(self, source: Source, columns: PairColumns, buffer_size: int, max_pairs: int | None = None):
        rows = source.rows
        names = columns_of(rows)
        columns.check(names, rows.features)
        columns = columns.with_label_names(rows.features)
        paths = [*columns.image_columns().values(), *(path for _, path in columns.other_columns())]
        rows = rows.select_columns(sorted({column_of(path, names) for path in paths}))
        self.rows = pickle.dumps(rows.decode(False) if rows.features else rows)
        self.columns, self.image_root = columns, source.image_root
        self.buffer_size, self.max_pairs = buffer_size, max_pairs

    def __getitem__(self, item: StreamedPair) -> Pair:
        return read_pair(self.columns, item.row, item.choice, self.image_root)

    def row_name(self, item: StreamedPair) -> str:
        return item.name

    def skipped_before(self, item: StreamedPair) -> list[tuple[str, str]]:
        return item.bad_rows

    def another(self, rng: np.random.Generator) -> None:
        """Returns None: a stream has no pair in another place."""

    def counts(self) -> dict[str, int]:
        """Returns nothing: what a stream holds is not known before it is read."""
        return {}

    def sample(self, count: int, seed: int) -> list[StreamedPair]:
        """Returns the first so many pairs, of all if there are fewer."""
        return list(itertools.islice(self.in_order(), count))

    def in_order(self) -> Iterator[StreamedPair]:
        """Yields the pairs once, in the order of the stream; `self.seen` tells what its rows held, block by block."""
        for block in self._blocks(None, buffer_size=1, is_endless=False):
            yield from block.items

    def first_wins(self, items: list[StreamedPair]) -> list[bool]:
        """Returns for these pairs whether image 0 won, as far as the data tell."""
        if self.columns.shape not in ("labels", "scores"):
            return []
        return [item.choice.winner == 0 for item in items if not item.choice.is_tie]

    def batches(self, batch_size, seed, visit=0, position=None, process_index=0, num_processes=1) -> "StreamBatches":
        """Returns the batch sampler of a process, from the `StreamBatches.position` of a visit on."""
        return StreamBatches(self, batch_size, seed, visit, position, process_index, num_processes)

    def _blocks(
        self, position: dict[str, Any] | None, buffer_size: int, is_endless: bool = True
    ) -> Iterator["StreamBlock"]:
        """Yields the blocks of the stream, from a block's position on."""
        position = position or {"first_visit": 0, "row": 0, "pairs": 0, "state": None, "bad_rows": []}
        rows = pickle.loads(self.rows)  # with a place of its own in the stream
        start = rows.state_dict()
        bad_rows = [tuple(row) for row in position["bad_rows"]]  # since the last pair, perhaps of the epoch before
        while True:
            rows.load_state_dict(position["state"] or start)
            items, row_number, num_pairs = [], position["row"], position["pairs"]
            num_rows = num_ties = 0
            for row in _read_stream(rows, row_number):
                name = f"row {row_number}"
                row_number, num_rows = row_number + 1, num_rows + 1
                lacks_image = any(value_at(row, path) is None for path in self.columns.image_columns().values())
                try:
                    found = self.columns.pairs_of(row, lacks_image)
                except BadRow as error:
                    bad_rows.append((name, str(error)))
                    continue
                num_ties += found.num_ties
                room = None if self.max_pairs is None else self.max_pairs - num_pairs
                for choice in found.choices[:room]:
                    items.append(StreamedPair(name, row, choice, bad_rows))
                    bad_rows, num_pairs = [], num_pairs + 1
                if num_rows >= buffer_size and items:
                    self.seen = StreamCounts(row_number, num_ties, bad_rows)
                    yield StreamBlock(position, items)
                    position = {
                        "first_visit": position["first_visit"] + len(items),
                        "row": row_number,
                        "pairs": num_pairs,
                        "state": rows.state_dict(),
                        "bad_rows": bad_rows,
                    }
                    items, num_rows = [], 0
                if num_pairs == self.max_pairs:
                    break
            self.seen = StreamCounts(row_number, num_ties, bad_rows)
            if items:
                yield StreamBlock(position, items)
            elif num_pairs == 0:
                reasons = list_reasons(reason for _, reason in bad_rows)
                raise ValueError(f"no pair is left of {row_number} rows of the stream" + (reasons and f"; {reasons}"))
            if not is_endless:
                return
            position = {
                "first_visit": position["first_visit"] + len(items), "row": 0, "pairs": 0, "state": None,
                "bad_rows": bad_rows,
            }  # fmt: skip


def _read_stream(rows: Iterable[dict[str, Any]], row_number: int) -> Iterator[dict[str, Any]]:
    """Yields rows; raises ValueError in one line where they cannot be read on."""
    rows = iter(rows)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as in `load_rows`
            where = f"the stream cannot be read beyond row {row_number}"
            raise ValueError(f"{where}: {type(error).__name__}, {one_line(error)}") from error
        row_number += 1
        yield row


class StreamCounts(NamedTuple):
    """What the rows of a stream held that were read since its beginning.

    Attributes:
        num_rows: all of them.
        num_ties: pairs that are ties, whether left out or not.
        bad_rows: (name, reason) of those that cannot be used and come after the last pair.
    """

    num_rows: int
    num_ties: int
    bad_rows: list[tuple[str, str]]


class StreamBlock(NamedTuple):
    """Consecutive pairs of a stream, and where in the stream they begin: what a checkpoint keeps."""

    position: dict[str, Any]
    items: list[StreamedPair]


class StreamBatches:
    """An endless batch sampler of (visit, `StreamedPair`) for one process of several; pass it as `batch_sampler`.

    It reads in the main process, one block ahead in a thread; images are decoded in the workers.
    """

    def __init__(self, pairs, batch_size, seed, visit=0, position=None, process_index=0, num_processes=1):
        self.pairs, self.batch_size, self.seed, self.visit, self.start = pairs, batch_size, seed, visit, position
        self.process_index, self.num_processes = process_index, num_processes
        self._positions = []  # of the blocks begun, in order

    def __iter__(self) -> Iterator[list[tuple[int, StreamedPair]]]:
        batch = []
        for visit, item in self._visits():
            if (
                visit >= self.visit
                and (visit - self.visit) // self.batch_size % self.num_processes == self.process_index
            ):
                batch.append((visit, item))
            if len(batch) == self.batch_size:
                yield batch
                batch = []

    def _visits(self) -> Iterator[tuple[int, StreamedPair]]:
        blocks = self.pairs._blocks(self.start, self.pairs.buffer_size)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(next, blocks)
            while True:
                block = ahead.result()
                ahead = thread.submit(next, blocks)
                self._positions.append(block.position)
                first = block.position["first_visit"]
                order = np.random.default_rng([self.seed, 2, first]).permutation(len(block.items))
                yield from ((first + place, block.items[index]) for place, index in enumerate(order))

    def position(self, visit: int) -> dict[str, Any]:
        """Returns from where to read so that `visit` comes next, as JSON; earlier visits are then forgotten."""
        while len(self._positions) > 1 and self._positions[1]["first_visit"] <= visit:
            self._positions.pop(0)
        return self._positions[0]


def read_image(value: Any, image_root: Path | str = "") -> bytes | Image.Image:
    """Returns the encoded bytes of an image, not yet decoded; a PIL image as it is.

    Args:
        value: encoded bytes, also in base64 or as a data: address; a path, relative to `image_root`; an address that
            fsspec opens; or a `datasets` image, {"bytes", "path"}.

    Raises:
        BadRow: if there is none.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise BadRow("no image")
    if isinstance(value, bytes | Image.Image):
        return value
    try:
        if not isinstance(value, str):
            raise ValueError(f"it is of type {type(value).__name__}")
        if value.startswith("data:"):
            return base64.b64decode(value.partition(",")[2])
        if value.startswith(("http://", "https://")):
            request = urllib.request.Request(value, headers={"User-Agent": "inversion-dpo"})
            with urllib.request.urlopen(request, timeout=30) as file:
                return file.read()
        if "://" in value[:4096]:
            import fsspec  # comes with `datasets`

            with fsspec.open(value, "rb") as file:
                return file.read()
        with contextlib.suppress(OSError):  # a name too long for a path may be base64
            path = Path(image_root, value).expanduser()
            if path.is_file() or len(value) < 100:
                return path.read_bytes()
        try:
            text = "".join(value.split()).replace("-", "+").replace("_", "/")
            return base64.b64decode(text, validate=True)
        except binascii.Error:
            raise FileNotFoundError(f"{value[:200]} is neither a file nor base64") from None
    except Exception as error:  # fsspec's file systems raise nearly every kind
        raise BadRow(f"unreadable image: {one_line(error)}") from error


def decode_image(value: Any) -> Image.Image:
    """Returns an upright RGB image of anything that `read_image` takes.

    EXIF orientation is applied, transparency becomes white, 16 bits become 8, an animation its first frame.

    Raises:
        BadRow: if there is no image to be read.
    """
    value = read_image(value)
    try:
        image = value if isinstance(value, Image.Image) else Image.open(io.BytesIO(value))
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        if image.mode.startswith("I"):  # PIL would clip them
            pixels = np.asarray(image).astype(np.int64)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError("its pixels have more than 16 bits")
            image = Image.fromarray(
                (pixels // 257 if image.mode != "I" or pixels.max() > 255 else pixels).astype("u1")
            )
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # PIL raises nearly every kind on damaged files
        message = re.sub(r" <_io.BytesIO[^>]*>", "", one_line(error))
        raise BadRow(f"unreadable image: {message}") from error


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
    top, left = round(crop[0] * (height - resolution)), round(crop[1] * (width - resolution))
    x, y = image.width / width, image.height / height
    window = (left * x, top * y, (left + resolution) * x, (top + resolution) * y)  # what is cut off is never resized
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=window)
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return View(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), original_size, (top, left))


def visit_rng(seed: int, visit: int, purpose: int = 0) -> np.random.Generator:
    """Returns the random numbers of one visit: the running number of a pair over the whole run.

    Draws that depend on nothing else are the same for any number of processes, any accumulation and after any restart.
    """
    return np.random.default_rng([seed, purpose, visit])


def draw_rng(seed: int, index: int, draw: int) -> np.random.Generator:
    """Returns the random numbers of one of a pair's repeated visits, see `InversionCache`."""
    return np.random.default_rng([seed, 3, index, draw])


class PreferenceDataset(torch.utils.data.Dataset):
    """Training examples by (visit, item): pixels and all random draws of that visit.

    An item is what the pairs' batch sampler gives: an index of `PreferencePairs`, or a `StreamedPair`.
    `self[visit, item]` is a dict with
        visit: the running number of the pair over the run;
        row: its name;
        pixel_values: (2, 3, resolution, resolution) in [-1, 1], winner and loser, cropped and flipped alike;
        original_sizes, corners: (2, 2) int64, of winner and loser, see `View`;
        caption: str, empty for a share `proportion_empty_prompts` of the visits;
        strength: how strong the preference is, in [0, 1], see `preference_loss`; 1 without `strength_scale`;
        is_tie: bool, whether there is none;
        uniforms: (M,) float64 in [0, 1), from which `sample_timesteps` makes the training timesteps;
        bad_rows: list of (name, reason) of unusable rows that this visit met.

    An unusable pair is replaced by another. In a stream, where there is no other, its pixels are NaN.

    With a `cache`, an `InversionCache`, the draws belong to the pair and its draw instead of the visit, but for the
    timesteps where the cache keeps latents only. Then there is
        cached: what the cache knows of this visit, see `CachedVisit`;
    and pixel_values, original_sizes and corners are left out where it knows all.

    Args:
        min_image_size: the least length of the shorter side, in pixels.
        strength_scale: k of the strength 2 sigmoid(k margin) - 1 (SmPO, arXiv 2506.02698); 1 throughout if None.
    """

    MAX_ATTEMPTS = 100

    def __init__(
        self, pairs, resolution, num_targets, seed, random_crop, random_flip, proportion_empty_prompts,
        min_image_size=1, strength_scale=None,
    ):  # fmt: skip
        self.pairs, self.resolution, self.num_targets, self.seed = pairs, resolution, num_targets, seed
        self.random_crop, self.random_flip = random_crop, random_flip
        self.proportion_empty_prompts = proportion_empty_prompts
        self.min_image_size, self.strength_scale = min_image_size, strength_scale
        self.cache = None

    def __getitem__(self, visit_and_item: tuple[int, Any]) -> dict[str, Any]:
        visit, item = visit_and_item
        try:
            return self._example(visit, item)
        except NoUsablePair:
            raise
        except Exception as error:  # nothing that is foreseen: say at least where
            raise RuntimeError(f"{self.pairs.row_name(item)}: {type(error).__name__}: {one_line(error)}") from error

    def _example(self, visit: int, item: Any) -> dict[str, Any]:
        rng = visit_rng(self.seed, visit)
        top, left, flip, empty, *uniforms = rng.random(4 + self.num_targets)
        if self.cache:
            rng = draw_rng(self.seed, item, visit // self.pairs.num_pairs % self.cache.num_draws)
            top, left, flip, empty, *repeated, which = rng.random(5 + self.num_targets)
            uniforms = uniforms if self.cache.latents_only else repeated
        uniforms = torch.tensor(uniforms, dtype=torch.float64)
        crop = (top, left) if self.random_crop else (0.5, 0.5)
        flip, is_empty = self.random_flip and flip < 0.5, empty < self.proportion_empty_prompts
        bad_rows, caption, cached = list(self.pairs.skipped_before(item)), None, None
        for _ in range(self.MAX_ATTEMPTS):
            try:
                if self.cache:
                    pair = self.pairs[item]
                    caption = "" if is_empty else pair.captions[int(which * len(pair.captions))]
                    cached = self.cache.look_up(pair, caption, crop, flip, uniforms)
                    if cached.is_complete:
                        break
                pair, images = self.open(item, pair if self.cache else None)
                break
            except BadRow as error:
                bad_rows.append((self.pairs.row_name(item), str(error)))
            if (other := self.pairs.another(rng)) is None:
                pair, images = Pair(None, None, [""]), [Image.new("RGB", (self.resolution, self.resolution))] * 2
                break
            item = other
        else:
            name, reason = bad_rows[0]
            raise NoUsablePair(f"{self.MAX_ATTEMPTS} pairs drawn in a row are unusable; the first: {name}, {reason}")
        if caption is None:
            caption = "" if is_empty else pair.captions[int(rng.integers(len(pair.captions)))]
        has_margin = self.strength_scale is not None and not pair.is_tie
        example = {
            "visit": visit,
            "row": self.pairs.row_name(item),
            "caption": caption,
            "strength": math.tanh(self.strength_scale * pair.margin / 2) if has_margin else 1.0,
            "is_tie": pair.is_tie,
            "uniforms": uniforms,
            "bad_rows": bad_rows,
            "cached": cached,
        }
        if cached and cached.is_complete:
            return example
        views = [resize_and_crop(image, self.resolution, crop, flip) for image in images]
        pixel_values = torch.stack([view.pixels for view in views])
        return example | {
            "pixel_values": pixel_values if pair.winner is not None else torch.full_like(pixel_values, math.nan),
            "original_sizes": torch.tensor([view.original_size for view in views]),
            "corners": torch.tensor([view.corner for view in views]),
        }

    def open(self, item: Any, pair: Pair | None = None) -> tuple[Pair, list[Image.Image]]:
        """Returns a pair, if it is not known yet, and its decoded images; raises BadRow if it cannot be used."""
        pair = pair or self.pairs[item]
        images = [decode_image(image) for image in (pair.winner, pair.loser)]
        for image in images:
            if min(image.size) < self.min_image_size:
                raise BadRow(f"image below --min_image_size: {image.width} x {image.height} pixels")
        return pair, images


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

    def position(self, visit: int) -> None:
        """Returns None: of rows that can be read at any place, the visit says all; see `StreamBatches.position`."""


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
            self.reasons.setdefault(name, reason)


# 4  Inversion cache

CACHE_FORMAT = 1  # part of every key: to be raised when what an entry holds, or how it is computed, changes
GIB = 2**30
SHARDS = "cache-*.safetensors"
SHARD_BYTES = 64 * 2**20
CACHE_OVERHEAD = 2**10  # bytes of an entry's names, shapes and checksum, at most
SAMPLED_BYTES, SAMPLE_STRIDE = 2**12, 2**20  # of a large file: so many bytes at every so many
PARTIAL_SECONDS = 24 * 3600  # after which a shard that is not whole is no longer being written
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "BOOL": torch.bool,
}  # fmt: skip
IMAGE_CONDITION = "time_ids"  # conditioning that belongs to the image; all other belongs to the caption

Entry = dict[str, torch.Tensor]


class Visits(NamedTuple):
    """What the policy's step needs to know of a batch of B visits; a cache keeps all of it, or all but the last two.

    Attributes:
        latents: (2B, C, h, w), x_0, zero where they are not usable.
        usable: (2B,) bool, see `finite_pairs`.
        cond: the U-Net's conditioning (2B, ...).
        trajectory: the states and targets, None if not known yet.
        reference_error: (M, 2B), the reference's errors at these states, None if not known yet.
    """

    latents: torch.Tensor
    usable: torch.Tensor
    cond: dict[str, Any]
    trajectory: Trajectory | None = None
    reference_error: torch.Tensor | None = None


class CachedVisit(NamedTuple):
    """What a cache knows of a visit and of its caption: their keys, and their entries or None.

    Attributes:
        damaged: list of (file, reason) of the cache's damaged files that were met so far.
    """

    key: str
    text_key: str
    entry: Entry | None
    text: Entry | None
    damaged: list[tuple[str, str]]

    @property
    def is_complete(self) -> bool:
        return self.entry is not None and self.text is not None


class Place(NamedTuple):
    """Where an entry lies.

    Attributes:
        file: the shard.
        checksum: of the entry.
        begins: the first byte of each of its tensors in the file.
        layout: name, dtype and shape of each of them; one object for the entries of a shard that are alike.
    """

    file: Path
    checksum: str
    begins: tuple[int, ...]
    layout: tuple[tuple[str, str, tuple[int, ...]], ...]


def is_usable(entry: Entry) -> bool:
    """Returns whether a visit's latents are finite, see `finite_pairs`; a caption's entry always is usable."""
    return "usable" not in entry or bool(entry["usable"].all())


def digest(*parts: Any, size: int = 16) -> str:
    """Returns a hash of bytes, and of the text of anything else, each with its length."""
    total = hashlib.blake2b(digest_size=size)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode(errors="surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def image_digest(value: Any) -> str:
    """Returns a hash of an image: of encoded bytes as they are, else of its pixels."""
    if isinstance(value, bytes):
        return digest(value)
    image = decode_image(value)
    return digest(image.size, image.tobytes())


def files_digest(folder: str | Path, parts: Sequence[str]) -> str:
    """Returns a hash of the configurations and weights in some parts (subfolders) of a model's folder.

    Files above 16 strides are sampled: their size, and 4 KiB of every MiB, the beginning with the names and shapes of
    the weights among them. Another fine-tune changes those; a change of less than a MiB of weights may be overlooked.
    """
    found = []
    for file in sorted(file for part in parts for file in Path(folder, part).glob("*")):
        if file.suffix in (".json", ".safetensors", ".bin", ".txt"):
            size = file.stat().st_size
            step, length = (SAMPLE_STRIDE, SAMPLED_BYTES) if size > 16 * SAMPLE_STRIDE else (max(size, 1), size)
            with file.open("rb") as stream:
                for position in range(0, size, step):
                    stream.seek(position)
                    found.append(stream.read(length))
            found.append(f"{file.relative_to(folder)} {size}")
    return digest(*found)


def split_visits(visits: Visits) -> list[tuple[Entry, Entry]]:
    """Returns for each visit its entry, with both images in the axis of the batch, and its caption's, on the CPU."""

    def by_pair(values, axis):
        return values.detach().cpu().unflatten(axis, (2, -1)).movedim(axis + 1, 0)

    columns, texts = {"latents": by_pair(visits.latents, 0), "usable": by_pair(visits.usable, 0)}, {}
    if visits.trajectory is not None:
        columns |= {name: by_pair(getattr(visits.trajectory, name), 1) for name in ("timesteps", "noise")}
        columns["reference_error"] = by_pair(visits.reference_error, 1)
    for name, values in _flatten(visits.cond).items():
        if name.endswith(IMAGE_CONDITION):
            columns[name] = by_pair(values, 0)
        else:
            texts[name] = values.chunk(2)[0].cpu()
    return [
        tuple({name: x[i].clone(memory_format=torch.contiguous_format) for name, x in part.items()} for part in parts)
        for i, parts in enumerate([(columns, texts)] * len(columns["latents"]))
    ]


def join_visits(found: list[tuple[Entry, Entry]], alphas_cumprod: torch.Tensor) -> Visits:
    """Returns a batch of visits from their entries and their captions', on the device of `alphas_cumprod`."""
    entries, texts = zip(*found, strict=True)

    def join(name, axis):
        values = torch.stack([entry[name] for entry in entries], dim=axis + 1).flatten(axis, axis + 1)
        return to_device(values, alphas_cumprod.device)

    cond = {name: join(name, 0) for name in entries[0] if name.endswith(IMAGE_CONDITION)}
    for name in texts[0]:
        values = to_device(torch.stack([text[name] for text in texts]), alphas_cumprod.device)
        cond[name] = torch.cat([values, values])
    visits = Visits(join("latents", 0), join("usable", 0), _unflatten(cond))
    if "noise" not in entries[0]:
        return visits
    timesteps, noise = join("timesteps", 1), join("noise", 1)
    x_t = add_noise(visits.latents, noise, timesteps, alphas_cumprod)
    trajectory = Trajectory(timesteps, x_t, noise, None)
    return visits._replace(trajectory=trajectory, reference_error=join("reference_error", 1))


def _flatten(cond: dict[str, Any], prefix: str = "") -> Entry:
    flat = {}
    for name, value in cond.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _unflatten(flat: Entry) -> dict[str, Any]:
    cond = {}
    for name, value in flat.items():
        *outer, inner = name.split(".")
        reduce(lambda level, key: level.setdefault(key, {}), outer, cond)[inner] = value
    return cond


class InversionCache:
    """Keeps in a folder what visits need and the policy does not change, and the conditioning of captions.

    Visits repeat: a pair has `num_draws` draws of crop, flip, empty caption and timesteps, one an epoch by turns, so
    that from epoch `num_draws` on nothing is computed twice. An entry's key is a hash over all that determines it, so
    one made by other settings is never found.

    Entries lie in shards, safetensors files that are written whole or not at all and never changed, with a checksum of
    every entry in their metadata. Any number of processes may share the folder. What is damaged counts as missing;
    where two shards hold an entry, the later one is read.

    Args:
        folder: is made if need be.
        text_settings: all but the caption that determines its conditioning.
        visit_settings: all that determines a visit's entry but images, crop, flip, caption and timesteps.
        training_timesteps: (K,), from which the visit's `uniforms` choose.
        num_draws: draws per pair.
        latents_only: entries hold latents, and timesteps are no part of the key.
    """

    def __init__(self, folder, text_settings, visit_settings, training_timesteps, num_draws, latents_only):
        self.folder, self.training_timesteps = Path(folder), training_timesteps
        self.num_draws, self.latents_only = num_draws, latents_only
        self.text_prefix, self.prefix = (
            digest(CACHE_FORMAT, json.dumps(settings, sort_keys=True), size=8)
            for settings in (text_settings, visit_settings)
        )
        self.damaged = {}  # file name -> what is wrong
        self._shards, self._index, self._listed = set(), {}, None  # files that were listed; key -> place; when
        self._pending, self._pending_bytes, self.is_writable = {}, 0, True
        self.folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.folder).close()
        for stale in self.folder.glob("cache-*.partial"):  # of a run that was killed while writing
            with contextlib.suppress(OSError):  # another process may do the same, or it may be another user's
                if time.time() - stale.stat().st_mtime > PARTIAL_SECONDS:
                    stale.unlink()
        self._refresh()

    def look_up(self, pair: Pair, caption: str, crop, flip: bool, uniforms: torch.Tensor) -> CachedVisit:
        """Returns what is known of a visit; raises BadRow if an image file cannot be read."""
        parts = [image_digest(pair.winner), image_digest(pair.loser), crop, flip]
        if not self.latents_only:
            index = sample_timesteps(uniforms[:, None], 0, len(self.training_timesteps) - 1)
            parts += [caption, self.training_timesteps[index].flatten().tolist()]
        key, text_key = f"{self.prefix}-{digest(*parts)}", f"{self.text_prefix}-{digest(caption)}"
        return CachedVisit(key, text_key, self.find(key), self.find(text_key), list(self.damaged.items()))

    def complete(self, batch: dict[str, Any], compute: Callable[[Any], Visits]) -> list[tuple[Entry, Entry]]:
        """Returns the entries of a batch's visits and of their captions; computes and keeps those that are missing.

        Everything is returned as it is kept, so that a run that fills the cache and one that reads it are equal.
        """
        missing = [c for c, is_known in zip(batch["cached"], batch["is_known"], strict=True) if not is_known]
        found = {key: self.find(key) for cached in missing for key in (cached.key, cached.text_key)}
        if any(entry is None for entry in found.values()):
            for cached, (entry, text) in zip(missing, split_visits(compute(batch["missing"])), strict=True):
                for key, part in ((cached.key, entry), (cached.text_key, text)):
                    if found[key] is None:
                        found[key] = part
                        self._add(key, part)
            if self._pending_bytes > SHARD_BYTES:
                self.flush()
        known = zip(*(_unstack(batch["known"][part]) for part in ("entry", "text")), strict=True)
        return [
            next(known) if is_known else (found[cached.key], found[cached.text_key])
            for cached, is_known in zip(batch["cached"], batch["is_known"], strict=True)
        ]

    def find(self, key: str) -> Entry | None:
        """Returns an entry, None if it is missing or damaged."""
        if key in self._pending:
            return self._pending[key]
        if key not in self._index:
            self._refresh()  # another process may have written it
        if key in self._index:
            try:
                return _read_entry(key, self._index[key])
            except (OSError, ValueError) as error:
                self.damaged.setdefault(self._index.pop(key).file.name, one_line(error))
        return None

    def flush(self) -> None:
        """Writes what is not on the disk yet to a shard; if that fails, says so, and nothing more is kept."""
        if not self._pending:
            return
        try:
            self._write_shard()
        except OSError as error:  # a full disk: no reason to lose what is trained
            self.is_writable = False
            logging.getLogger(__name__).warning(
                f"--inversion_cache_dir {self.folder} cannot be written, what is missing is computed at every visit "
                f"from now on: {one_line(error)}"
            )
        self._pending, self._pending_bytes, self._listed = {}, 0, None
        self._refresh()

    def _write_shard(self) -> None:
        from safetensors.torch import save

        tensors = {f"{key}/{name}": x for key, entry in self._pending.items() for name, x in entry.items()}
        checksums = {key: _checksum(key, entry) for key, entry in self._pending.items()}
        file = self.folder / f"cache-{time.time_ns():020}-{uuid.uuid4().hex[:8]}.safetensors"
        partial = file.with_suffix(".partial")
        try:
            with partial.open("wb") as stream:
                stream.write(save(tensors, checksums))
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(file)
        finally:
            partial.unlink(missing_ok=True)

    def size(self) -> int:
        """Returns the bytes of all shards in the folder."""
        return sum(file.stat().st_size for file in self.folder.glob(SHARDS))

    def num_visits(self) -> int:
        """Returns how many visits with these settings have an entry, of these data or others."""
        return sum(key.startswith(self.prefix) for key in self._index)

    def _add(self, key, entry) -> None:
        """Keeps an entry; not what is not finite or not usable, which may have been an accident."""
        is_sound = all(value.isfinite().all() for value in entry.values()) and is_usable(entry)
        if self.is_writable and is_sound and self.find(key) is None:
            self._pending[key] = entry
            self._pending_bytes += sum(value.nbytes for value in entry.values())

    def _refresh(self) -> None:
        try:
            changed = self.folder.stat().st_mtime_ns
        except FileNotFoundError:  # deleted since: all is missing, and `flush` says that nothing can be written
            return
        if changed == self._listed:
            return
        for file in sorted(set(self.folder.glob(SHARDS)) - self._shards):
            self._shards.add(file)
            try:
                self._index.update(_read_header(file))
            except (OSError, ValueError) as error:
                self.damaged[file.name] = one_line(error)
        self._listed = changed


def _checksum(key: str, entry: Entry) -> str:
    parts = []
    for name, value in sorted(entry.items()):
        parts += [name, value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()]
    return digest(key, *parts)


def _read_header(file: Path) -> dict[str, Place]:
    """Returns where each entry of a shard lies, by its key.

    Raises:
        ValueError: if the file is not whole, or its header is not.
    """
    with file.open("rb") as stream:
        size, length = os.fstat(stream.fileno()).st_size, int.from_bytes(stream.read(8), "little")
        if length > size:
            raise ValueError("the file is cut short or its header is damaged")
        header = json.loads(stream.read(length))
    start, end, found, layouts = 8 + length, 0, {}, {}
    try:
        checksums = header.pop("__metadata__")
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            key, part = name.split("/")
            dtype, shape, (begin, after) = tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"]
            if after - begin != num_bytes(dtype, shape):
                raise ValueError("its header is damaged")
            found.setdefault(key, []).append((start + begin, (part, dtype, shape)))
            end = after
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"its header is damaged ({error!r})") from error
    if found.keys() != checksums.keys():
        raise ValueError("its header is damaged")
    if size != start + end:
        raise ValueError(f"it has {size} bytes instead of {start + end}")
    places = {}
    for key, tensors in found.items():
        begins, layout = zip(*tensors, strict=True)
        places[key] = Place(file, checksums[key], begins, layouts.setdefault(layout, layout))
    return places


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Returns the bytes of a tensor, by safetensors' name of its dtype."""
    return DTYPES[dtype].itemsize * math.prod(shape)


def _read_entry(key: str, place: Place) -> Entry:
    """Returns an entry of a shard; raises ValueError or OSError if it is not what was written."""
    entry = {}
    try:
        with place.file.open("rb") as stream:
            for begin, (name, dtype, shape) in zip(place.begins, place.layout, strict=True):
                stream.seek(begin)
                data = bytearray(stream.read(num_bytes(dtype, shape)))
                entry[name] = torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"an entry is damaged: {error}") from error
    if _checksum(key, entry) != place.checksum:
        raise ValueError("the checksum of an entry is wrong")
    return entry


def fill_cache(cache, batches: Iterator, compute: Callable, on_batch: Callable, accelerator, stop) -> bool:
    """Computes what a cache misses of some batches; returns whether it went through all of them before a signal.

    Args:
        batches: as many in every process.
        compute: see `InversionCache.complete`.
        on_batch: called with each batch and, of each of its visits, whether it is usable.
        stop: a `StopSignal`; one process's ends all.

    Raises:
        RuntimeError: in all processes, once one of them cannot write to the folder.
    """

    def state():
        """Returns whether a process was told to stop, and whether one cannot write."""
        flags = torch.tensor([stop.received > 0, not cache.is_writable], device=accelerator.device)
        return (accelerator.reduce(flags.float()) > 0).tolist()

    for batch in batches:
        completed = cache.complete(batch, compute)
        on_batch(batch, [is_usable(entry) for entry, _ in completed])
        if any(state()):
            break
    cache.flush()
    is_stopping, is_full = state()
    if is_full:
        raise RuntimeError(
            f"--inversion_cache_dir {cache.folder} cannot be written any more and holds a part of the cache, "
            f"{cache.size() / GIB:.3f} GiB; make room, and go on with the same command"
        )
    return not is_stopping


def collate_cached(
    examples: list[dict[str, Any]], collate: Callable[[list[dict[str, Any]]], dict[str, Any]], tokenizers: Sequence
) -> dict[str, Any]:
    """Returns a batch of examples of which a cache knows some: what `InversionCache.complete` and the loop need.

    "known" are the entries of those that `is_known`, "missing" is the batch that `collate` makes of the others, None
    where there are none.
    """
    missing = [example for example in examples if not example["cached"].is_complete]
    known = [example["cached"] for example in examples if example["cached"].is_complete]
    return {
        "visits": [example["visit"] for example in examples],
        "rows": [example["row"] for example in examples],
        "strength": torch.tensor([example["strength"] for example in examples]),
        "is_tie": torch.tensor([example["is_tie"] for example in examples]),
        "uniforms": torch.stack([example["uniforms"] for example in examples], dim=1),
        "bad_rows": [bad_row for example in examples for bad_row in example["bad_rows"]],
        "cut_captions": cut_captions(tokenizers, examples),
        "cached": [example["cached"]._replace(entry=None, text=None) for example in examples],
        "is_known": [example["cached"].is_complete for example in examples],
        "known": {part: _stack([getattr(cached, part) for cached in known]) for part in ("entry", "text")},
        "missing": collate(missing) if missing else None,
    }


def _stack(entries: list[Entry]) -> Entry:
    """Returns entries as one of a tensor each: a tensor that comes from a worker takes a file descriptor."""
    return {name: torch.stack([entry[name] for entry in entries]) for name in (entries[0] if entries else ())}


def _unstack(entries: Entry) -> list[Entry]:
    """Undoes `_stack`."""
    return [dict(zip(entries, values, strict=True)) for values in zip(*entries.values(), strict=True)]


# 5  Training

LORA_FILE = "pytorch_lora_weights.safetensors"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "training_state.json"  # of a checkpoint
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raises ValueError if accelerate was told to shard the model; to be asked before it starts doing so.

    Under accelerate, DeepSpeed steps the optimizer within the backward pass, so that chunks of a trajectory cannot be
    summed up and a bad update cannot be skipped. With FSDP every call of the U-Net is one of all processes together,
    while here one that misses entries of a cache, or draws validation pictures, makes calls that the others do not.
    """
    from accelerate.utils import str_to_bool

    for name in ("DeepSpeed", "FSDP", "Megatron_LM", "Parallelism_config"):
        if str_to_bool(environment.get(f"ACCELERATE_USE_{name.upper()}", "false")):
            raise ValueError(
                f"{name} is not supported: launch with accelerate's MULTI_GPU (examples/ddp.yaml); for memory, see "
                "--quantize_base and --offload"
            )


def check_compiler(device: torch.device) -> None:
    """Raises ValueError unless torch.compile works on the device, tried on a function of one line."""
    try:
        torch.compile(lambda x: 2 * x)(torch.ones(2, device=device))
    except Exception as error:  # a compiler may be missing, too old, or without headers
        remedy = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler, such as g++"
        raise ValueError(f"--compile needs {remedy}, and failed on {device}: {one_line(error)}") from error


QUANTIZATIONS = ("nf4", "int8")


def check_quantization(device: torch.device) -> None:
    """Raises ValueError unless diffusers quantizes on the device."""
    if device.type not in ("cuda", "xpu"):
        raise ValueError(f"--quantize_base needs a GPU; diffusers does not quantize on {device.type}")


def quantization(kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments with which `from_pretrained` quantizes linear layers (QLoRA, arXiv 2305.14314).

    Args:
        kind: "nf4", "int8", or None for no quantization.
        dtype: of the products and of all else.
    """
    from diffusers import BitsAndBytesConfig

    if kind is None:
        return {}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    else:  # above a threshold, columns that any row of the batch has an outlier in would be taken out of all rows:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which warns at every product that is not in half
        options = {"load_in_8bit": True, "llm_int8_threshold": 0.0}  # policy and reference see different batches
    return {"quantization_config": BitsAndBytesConfig(**options)}


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


@contextlib.contextmanager
def on_device(modules: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Within it, frozen modules are on the device; weights that came from elsewhere are then dropped there.

    Their own copy stays where it is, so nothing is copied back.
    """
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


def leave_together(accelerator) -> None:
    """Ends training in all processes at once; the caller has let go of the model that accelerate wrapped.

    A process that takes the group down while another is at work may hang. So may one whose wrapper outlives the group:
    freed when the interpreter ends, it would join the group's threads while these wait for the interpreter.
    """
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()


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
        num_pairs: pairs in the data, on which the order of the visits depends; None for a stream.
        options: the run's options by name.
        metrics: those of every update so far, with its "step".
        stream: from where a stream goes on, see `StreamBatches.position`; None for data of known length.
        bad_rows, cut_captions: what happened to rows so far, by name, see `RowLog`.
    """

    folder: Path
    step: int
    visit: int
    num_pairs: int | None
    options: dict[str, Any]
    metrics: list[dict[str, float]]
    stream: dict[str, Any] | None
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


def check_resumed_run(checkpoint: Checkpoint, num_pairs: int | None, options: dict[str, Any], free: set[str]) -> None:
    """Raises ValueError if a resumed run has other data or options than it began with, but for the `free` options."""
    if num_pairs != checkpoint.num_pairs:
        raise ValueError(
            f"the data have {num_pairs} pairs, but {checkpoint.folder} was made with {checkpoint.num_pairs}"
        )
    if bool(options.get("inversion_cache_dir")) != bool(checkpoint.options.get("inversion_cache_dir")):
        raise ValueError(
            f"{checkpoint.folder} was made {'with' if checkpoint.options.get('inversion_cache_dir') else 'without'} "
            "--inversion_cache_dir; a run must keep to that, since a cache has draws of its own"
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


# 6  What a run leaves

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
        was_training, dtype = unet.training, unet.dtype
        unet.eval()
        # Latents in the U-Net's precision, as in training: autocast does not reach quantized layers.
        in_own_precision = unet.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))
        try:
            devices = [unet.device] if unet.device.type == "cuda" else []
            others = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
            eager = torch.compiler.set_stance("force_eager")  # no graphs for samples
            with eager, torch.random.fork_rng(devices), on_device(others, unet.device):
                if self._without is None:
                    with reference_policy(unet):
                        self._without = [self._sample(prompt) for prompt in self.prompts]
                with_lora = [self._sample(prompt) for prompt in self.prompts]
        finally:
            in_own_precision.remove()
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


def mean_metrics(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each metric over those updates that were finite, or the last one's; a count stays one."""
    last = metrics[-1]
    rows = [row for row in metrics if all(map(math.isfinite, row.values()))] or [last]
    means = {name: float(np.mean([row[name] for row in rows])) for name in last if name not in ("step", "bad_steps")}
    return {**means, "bad_steps": last["bad_steps"]}


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


# 7  Dry run

DRY_RUN_FILE = "dry_run.json"
CONTACT_SHEET_FILE = "dry_run.png"
DRY_RUN_UPDATES = 3


def inspect_pairs(
    dataset: PreferenceDataset, tokenizers: Sequence, max_bad_fraction: float, sample_size: int = 128
) -> dict[str, Any]:
    """Returns what a look at the pairs shows: at all labels and captions, and at the images of a random sample.

    Of a stream the sample is the beginning, and its labels are the sample's. If the sample has clearly more unusable
    rows than `max_bad_fraction`, as will end the run, there is an entry "problem".
    """
    pairs = dataset.pairs
    items = pairs.sample(sample_size, dataset.seed)
    opened, unusable = [], [reason for item in items for _, reason in pairs.skipped_before(item)]
    if pairs.num_pairs is None and len(items) < sample_size:
        unusable += [reason for _, reason in pairs.seen.bad_rows]  # after the last pair
    num_rows = len(items) + len(unusable)
    for item in items:
        try:
            opened.append(dataset.open(item))
        except BadRow as error:
            unusable.append(str(error))
    captions = [caption for pair, _ in opened for caption in pair.captions]
    lengths = [len(tokenizers[0](caption, verbose=False).input_ids) for caption in captions]
    longest = min(tokenizer.model_max_length for tokenizer in tokenizers)
    sizes = np.array([image.size for _, images in opened for image in images] or [(1, 1)])
    shorter = sizes.min(1)
    first_wins = pairs.first_wins(items)
    report = {
        "rows": pairs.counts() or "a stream, whose length is not known",
        "pairs looked at": f"{len(items)} of {pairs.num_pairs}" if pairs.num_pairs else f"the first {len(items)}",
        "of these unusable": dict(count_by_reason(unusable)) or 0,
        "caption lengths in tokens": _quantiles(lengths),
        "captions longer than what is read": f"{sum(n > longest for n in lengths)} of {len(lengths)} (over {longest})",
        "widths in pixels": _quantiles(sizes[:, 0]),
        "heights in pixels": _quantiles(sizes[:, 1]),
        "images that are enlarged": f"{np.mean(shorter < dataset.resolution):.1%}",
        "share of an image that cropping discards": f"{np.mean(1 - shorter / sizes.max(1)):.1%} on average",
        **find_duplicates(opened),
    }
    if first_wins:
        share, count = np.mean(first_wins), len(first_wins)
        is_biased = abs(share - 0.5) > 3 * math.sqrt(0.25 / count)
        report["image 0 is the winner"] = f"{share:.1%} of {count} pairs" + (
            ": its column tells who wins, is that meant?" if is_biased else ""
        )
    if exceeds(len(unusable), max_bad_fraction, num_rows):
        report["problem"] = (
            f"--max_bad_fraction is {max_bad_fraction:g}, but of {num_rows} rows looked at {len(unusable)} cannot be "
            f"used: {list_reasons(unusable)}"
        )
    return report


def _quantiles(values: Sequence[float]) -> str:
    if len(values) == 0:
        return "none"
    low, middle, high = np.quantile(values, (0, 0.5, 1))
    return f"{low:.0f} to {high:.0f}, half of them up to {middle:.0f}"


def find_duplicates(opened: list[tuple[Pair, list[Image.Image]]]) -> dict[str, int]:
    """Counts pairs whose two images are nearly alike, pairs that occur again, and those that occur the other way."""
    alike = again = reversed_pairs = 0
    seen = set()
    for _, images in opened:
        small = [np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"), dtype=float) for image in images]
        alike += bool(np.abs(small[0] - small[1]).max() < 3)
        # the signs of the differences of neighbouring pixels, a hash that survives scaling and compression
        winner, loser = ((np.diff(pixels) > 0).tobytes() + pixels.mean().round(-1).tobytes() for pixels in small)
        again += (winner, loser) in seen
        reversed_pairs += winner != loser and (loser, winner) in seen
        seen.add((winner, loser))
    return {
        "pairs of nearly the same image": alike,
        "pairs that occur again": again,
        "pairs that occur again with winner and loser exchanged": reversed_pairs,
    }


def draw_contact_sheet(examples: list[dict[str, Any]]) -> Image.Image:
    """Returns examples of `PreferenceDataset` as they are trained on, two a row, winner and loser marked."""
    side, gap, line, columns = 224, 12, 20, 2
    font = ImageFont.load_default(14)
    width, height = 2 * side + 3 * gap, side + 4 * line + gap
    rows = math.ceil(len(examples) / columns)
    canvas = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for place, example in enumerate(examples):
        x, y = gap + place % columns * width, gap + place // columns * height
        pixels = ((example["pixel_values"].nan_to_num(-1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        marks = (("tie", "#666666"),) * 2 if example["is_tie"] else (("WINNER", "#107010"), ("LOSER", "#b01010"))
        for i, (mark, color) in enumerate(marks):
            left = x + i * (side + gap)
            pen.text((left, y), mark, fill=color, font=font)
            canvas.paste(Image.fromarray(pixels[i]).resize((side, side)), (left, y + line))
            pen.rectangle((left - 2, y + line - 2, left + side + 1, y + line + side + 1), outline=color, width=2)
        text = textwrap.wrap(f"{example['row']}: {example['caption'] or '(emptied)'}", 64)[:2]
        pen.text((x, y + line + side + 4), "\n".join(text), fill="black", font=font)
    return canvas


def sample_back(predict: Predict, x_t: torch.Tensor, nodes: list[int], alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Returns x_0, sampled from x_t with a call of `predict` for every node, from the last down to the first.

    Args:
        predict: as for `invert`.
        x_t: (N, C, h, w), at the last node.
        nodes: rising timesteps, without repetitions.
        alphas_cumprod: (T,), the noise schedule.
    """
    from diffusers import DPMSolverMultistepScheduler

    before = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    sampler = DPMSolverMultistepScheduler(trained_betas=(1 - alphas_cumprod / before).tolist())
    sampler.set_timesteps(timesteps=nodes[::-1])
    for t in sampler.timesteps:
        x_t = sampler.step(predict(x_t, t.to(x_t.device).expand(len(x_t))), t, x_t).prev_sample
    return x_t


@torch.no_grad()
def reconstruction_errors(
    predict: Predict, latents: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, **inversion: Any
) -> dict[str, float]:
    """Returns, for four bands of the training timesteps, how far inverting and sampling back leads from the latents.

    Each is the root mean square of the difference, relative to that of the latents, from the middle of the band, where
    the inversion ends. Sampling back takes 20 steps of a second-order solver, so that the inversion's error counts.

    Args:
        predict, latents, alphas_cumprod, inversion: as for `invert`, a single target each.
        timesteps: (K,), the training timesteps, rising.
    """
    errors = {}
    for band in timesteps.tensor_split(min(4, len(timesteps))):
        target = band[len(band) // 2]
        x_t = invert(predict, latents, target.expand(len(latents)), alphas_cumprod, **inversion).latents[0]
        nodes = inversion_nodes(target.view(1, 1), alphas_cumprod, 20)[0].unique().tolist()
        difference = sample_back(predict, x_t, nodes, alphas_cumprod) - latents
        errors[f"{band[0]}..{band[-1]}"] = float(difference.square().mean().sqrt() / latents.square().mean().sqrt())
    return errors


def peak_memory() -> str:
    """Returns the most memory that was in use so far: of the GPU by tensors, or else of the process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / GIB:.2f} GiB of the GPU's memory in tensors, CUDA not counted"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return f"{peak / 2 ** (30 if platform.system() == 'Darwin' else 20):.2f} GiB resident in the process, on the CPU"


def report_dry_run(output_dir: str | Path, report: dict[str, Any], **sections: dict[str, Any]) -> None:
    """Adds sections to a dry run's report, prints them, and writes the whole to `DRY_RUN_FILE`."""

    def lines(entries, indent):
        for name, value in entries.items():
            if isinstance(value, dict):
                yield f"{indent}{name}"
                yield from lines(value, indent + "  ")
            else:
                yield f"{indent}{name}: {value:.3g}" if isinstance(value, float) else f"{indent}{name}: {value}"

    report.update(sections)
    print("\n".join(lines(sections, "")), flush=True)
    (Path(output_dir) / DRY_RUN_FILE).write_text(json.dumps(report, indent=2) + "\n")

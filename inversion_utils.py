"""Inversion-based preference optimisation: the method, in plain PyTorch.

    1  inversion     `invert` finds, by DDIM inversion, the noise that belongs to an image
    2  objectives    `preference_loss` turns policy and reference errors into a DPO loss
    3  targets       `Targets` are what a step of the policy needs to know of its pairs

Nothing here knows a model, a file or a training script: copy this file, or import it, into a trainer of your own.
Inversion-DPO is arXiv 2507.11554, DDIM-InPO is arXiv 2503.18454, Diffusion-DPO is arXiv 2311.12908.

Symbols: abar_t = `alphas_cumprod[t]`, alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), and the noise level
s_t = sigma_t / alpha_t (0.029 at t = 0 and 14.6 at t = 999 for Stable Diffusion). Winner and loser images always
travel in one batch (2B, ...): the B winners first, then the B losers.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

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


# 3  Targets


class Targets(NamedTuple):
    """What the policy's step needs to know of a batch of B visits, winners first. Training changes none of it."""

    latents: torch.Tensor  # (2B, C, h, w), x_0, zero where not usable
    timesteps: torch.Tensor  # (M, 2B) int64, shared by winner and loser
    noise: torch.Tensor  # (M, 2B, C, h, w), likewise, what to predict: the implied noise, or the forward noise
    reference_error: torch.Tensor | None  # (M, 2B), None while it is not known
    usable: torch.Tensor  # (2B,) bool, False for a pair that overflows in a model: a tie without gradient
    strength: torch.Tensor  # (B,), see `preference_loss`
    is_tie: torch.Tensor  # (B,) bool, likewise
    cond: dict[str, torch.Tensor]  # the denoiser's conditioning by name, (2B, ...) each


IMAGE_AXIS = {"latents": 0, "timesteps": 1, "noise": 1, "reference_error": 1}  # where the 2B images stand in `Targets`


def without_overflow(targets: Targets) -> Targets:
    """Returns the targets with pairs that overflowed in any model, as their errors tell, marked and set to zero."""
    usable = targets.reference_error.isfinite().all(0).view(2, -1).all(0).repeat(2)
    zeroed = {name: getattr(targets, name).where(usable[:, None, None, None], 0.0) for name in ("latents", "noise")}
    zeroed["cond"] = {k: v.where(usable.view(-1, *[1] * (v.ndim - 1)), 0.0) for k, v in targets.cond.items()}
    return targets._replace(usable=usable, reference_error=targets.reference_error.where(usable, 0.0), **zeroed)

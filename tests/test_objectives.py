"""The objectives: losses worked by hand, and the directions in which they push."""

import math

import pytest
import torch

from inversion_utils import prediction_error, preference_loss, sample_timesteps

LOSSES = ["sigmoid", "hinge", "ipo"]
# Log-ratios a = reference - policy: winners .1, 0, -.2; losers -.1, 0, .1. With beta 10 the logits are 1, 0, -1.5.
REFERENCE = torch.tensor([0.3, 0.5, 0.1, 0.4, 0.2, 0.6], dtype=torch.float64)
POLICY = torch.tensor([0.2, 0.5, 0.3, 0.5, 0.2, 0.5], dtype=torch.float64)
BETA = 10.0


def swapped(errors):
    return torch.cat(errors.chunk(2, -1)[::-1], -1)


def assert_close(a, b, atol=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "expected"),
    [
        ("sigmoid", 0.0, [0.31326168751822286, 0.6931471805599453, 1.7014132779827524]),
        # log(1 + e^-x) grows by x when the sign of x is flipped, so smoothing by .1 adds .1 x
        ("sigmoid", 0.1, [0.41326168751822286, 0.6931471805599453, 1.5514132779827524]),
        ("hinge", 0.0, [0.0, 1.0, 2.5]),
        ("ipo", 0.0, [0.25, 0.25, 4.0]),
    ],
)
def test_losses_worked_by_hand(loss_type, label_smoothing, expected):
    loss, metrics = preference_loss(POLICY, REFERENCE, BETA, loss_type, label_smoothing)
    assert_close(loss, expected)
    assert_close(metrics["rewards/chosen"], [0.5, 0.0, -1.0])
    assert_close(metrics["rewards/rejected"], [-0.5, 0.0, 0.5])
    assert_close(metrics["rewards/margins"], [1.0, 0.0, -1.5])
    assert_close(metrics["rewards/accuracies"], [1.0, 0.5, 0.0])
    assert len(metrics) == 4


@pytest.mark.parametrize("loss_type", LOSSES)
def test_descending_lowers_the_winners_error_and_raises_the_losers(loss_type):
    policy = REFERENCE.clone().requires_grad_()  # where training starts: the policy is the reference
    loss, metrics = preference_loss(policy, REFERENCE, BETA, loss_type)
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert (gradient[:3] > 0).all() and (gradient[3:] < 0).all()
    assert_close(gradient[:3], -gradient[3:])
    # The slope at equality: sigmoid beta/4, hinge beta/2, ipo beta/2.
    assert_close(gradient[:3], [BETA / (4 if loss_type == "sigmoid" else 2)] * 3)
    assert_close(metrics["rewards/accuracies"], [0.5] * 3)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_only_the_margin_between_winner_and_loser_matters(loss_type):
    shift = torch.tensor([0.05, -0.1, 0.2] * 2, dtype=torch.float64)
    expected, _ = preference_loss(POLICY, REFERENCE, BETA, loss_type)
    assert_close(preference_loss(POLICY + shift, REFERENCE, BETA, loss_type)[0], expected)
    assert_close(preference_loss(POLICY + shift, REFERENCE + shift, BETA, loss_type)[0], expected)
    # beta scales log-ratios, so it and the errors may be traded
    assert_close(preference_loss(POLICY / 2, REFERENCE / 2, 2 * BETA, loss_type)[0], expected)


def test_swapping_winner_and_loser_mirrors_the_metrics():
    loss, metrics = preference_loss(POLICY, REFERENCE, BETA)
    mirrored_loss, mirrored = preference_loss(swapped(POLICY), swapped(REFERENCE), BETA)
    assert_close(mirrored["rewards/chosen"], metrics["rewards/rejected"])
    assert_close(mirrored["rewards/rejected"], metrics["rewards/chosen"])
    assert_close(mirrored["rewards/margins"], -metrics["rewards/margins"])
    assert_close(mirrored["rewards/accuracies"], 1 - metrics["rewards/accuracies"])
    assert_close(mirrored_loss - loss, metrics["rewards/margins"])
    for smoothing in (0.1, 0.3):  # smoothing mixes the two labels
        smoothed, _ = preference_loss(POLICY, REFERENCE, BETA, "sigmoid", smoothing)
        assert_close(smoothed, (1 - smoothing) * loss + smoothing * mirrored_loss)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_leading_dimensions_are_independent(loss_type):
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.rand(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    loss, metrics = preference_loss(policy, reference, BETA, loss_type)
    assert loss.shape == (3, 4, 3) and all(value.shape == (3, 4, 3) for value in metrics.values())
    for i in range(3):
        for j in range(4):
            row, row_metrics = preference_loss(policy[i, j], reference[i, j], BETA, loss_type)
            assert_close(loss[i, j], row)
            for name, value in row_metrics.items():
                assert_close(metrics[name][i, j], value)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_huge_betas_stay_finite(loss_type):
    policy = POLICY.float().requires_grad_()
    loss, _ = preference_loss(policy, REFERENCE.float(), 1e6, loss_type)
    loss.sum().backward()
    assert loss.isfinite().all() and policy.grad.isfinite().all()


# Errors


def test_error_is_the_mean_square_of_each_example():
    noise = torch.zeros(2, 3, 4, 2, 2)
    prediction = noise.clone()
    prediction[0, 1, 3, 0, 1] = 4.0  # one of 16 elements: 16 / 16
    prediction[1, 2] = -0.5
    assert prediction_error(prediction, noise).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.25]]
    assert prediction_error(prediction[0], noise[0]).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_error_is_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    prediction, noise = (300 * torch.randn(2, 8, 4, 8, 8, generator=generator)).to(dtype)  # squares overflow in half
    error = prediction_error(prediction, noise)
    assert error.dtype == torch.float32 and error.shape == (8,)
    expected = (prediction.double() - noise.double()).square().mean((1, 2, 3)).float()
    torch.testing.assert_close(error, expected, rtol=1e-5, atol=0)
    mixed = prediction_error(prediction, noise.float())
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=0)


# Timesteps

BANDS = pytest.mark.parametrize(("low", "high"), [(0, 999), (700, 999), (0, 0), (5, 7), (3, 12), (999, 999)])


@BANDS
@pytest.mark.parametrize("num_targets", [1, 2, 3, 4, 7])
def test_timesteps_are_one_from_each_stratum(low, high, num_targets):
    uniforms = torch.rand(num_targets, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = sample_timesteps(uniforms, low, high)
    assert timesteps.dtype == torch.int64 and timesteps.shape == (num_targets, 200)
    assert (timesteps.diff(dim=0) >= 0).all()
    width = high - low + 1
    for m, row in enumerate(uniforms.tolist()):
        expected = [low + math.floor((m + u) / num_targets * width) for u in row]
        assert timesteps[m].tolist() == expected
        assert min(expected) >= low + math.floor(m / num_targets * width)
        assert max(expected) <= min(high, low + math.floor((m + 1) / num_targets * width))


@BANDS
@pytest.mark.parametrize("num_targets", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_timesteps_stay_within_their_band_to_the_last_bit(low, high, num_targets, dtype):
    one = torch.ones(num_targets, 1, dtype=dtype)
    assert sample_timesteps(torch.zeros_like(one), low, high)[0].item() == low
    assert sample_timesteps(torch.nextafter(one, -one), low, high)[-1].item() == high


@BANDS
@pytest.mark.parametrize("num_targets", [1, 2, 5])
def test_every_timestep_is_equally_likely(low, high, num_targets):
    width = high - low + 1
    # With this many evenly spaced numbers every timestep is hit the same number of times over all strata.
    grid = (torch.arange(20 * width, dtype=torch.float64) + 0.5) / (20 * width)
    timesteps = sample_timesteps(grid.expand(num_targets, -1), low, high)
    counts = torch.bincount(timesteps.flatten() - low, minlength=width)
    assert counts.tolist() == [20 * num_targets] * width


def test_a_weak_preference_scales_the_logits_and_a_tie_pulls_them_to_zero():
    policy, reference = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]).double(), torch.full((6,), 1.5).double()
    strength, is_tie = torch.tensor([1.0, 0.5, 1.0]).double(), torch.tensor([False, False, True])
    for loss_type, expected in (
        ("sigmoid", [math.log1p(math.exp(-1)), math.log1p(math.exp(-0.5)), 0.5 + math.log1p(math.exp(-1))]),
        ("ipo", [0.25, 0.0, 1.0]),
    ):
        loss, metrics = preference_loss(policy, reference, 2.0, loss_type, strength=strength, is_tie=is_tie)
        assert torch.allclose(loss, torch.tensor(expected).double())
        assert metrics["rewards/margins"].tolist() == [1, 1, 1]  # unscaled
        assert metrics["rewards/accuracies"].tolist() == [1, 1, 0.5]
    loss, _ = preference_loss(policy, reference, 2.0, "hinge", strength=strength, is_tie=torch.zeros(3).bool())
    assert loss.tolist() == [0, 0.5, 0]


# Refusals name the argument

PAIRS, TIE = torch.rand(6), torch.tensor([True, False, False])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        *[(lambda x=x: preference_loss(PAIRS, PAIRS, 1.0, x), "loss_type") for x in ("", "kto", "Sigmoid")],
        *[
            (lambda x=x: preference_loss(PAIRS, PAIRS, 1.0, *x), "label_smoothing")
            for x in (("sigmoid", -0.1), ("sigmoid", 0.5), ("hinge", 0.1), ("ipo", 0.1))
        ],
        (lambda: preference_loss(PAIRS, PAIRS, 1.0, "hinge", is_tie=TIE), "ties"),
        (lambda: preference_loss(PAIRS[:3], PAIRS[:3], 1.0), "policy_error"),
        (lambda: preference_loss(PAIRS.expand(4, 6), PAIRS, 1.0), "policy_error"),
        (lambda: preference_loss(PAIRS[0], PAIRS[0], 1.0), "policy_error"),
        (lambda: prediction_error(torch.rand(6, 4, 2, 2), torch.rand(1, 4, 2, 2)), "shapes"),  # would broadcast
        (lambda: sample_timesteps(torch.rand(1, 2), 10, 5), "min_timestep"),
    ],
)
def test_what_makes_no_sense_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()

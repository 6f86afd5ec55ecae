"""The inverter: what holds for every model, and accuracy on models whose exact inversion is known."""

import math

import pytest
import torch
from analytic import alpha_sigma, gaussian, gaussian_noise, mixture, sd_alphas_cumprod, zero_snr_alphas_cumprod

from inversion_utils import add_noise, inversion_nodes, invert, noise_from_model_output

SD, ZERO_SNR = sd_alphas_cumprod(), zero_snr_alphas_cumprod()
both_tables = pytest.mark.parametrize("table", [SD, ZERO_SNR], ids=["sd", "zero_snr"])
both_orders = pytest.mark.parametrize("order", [1, 2])
both_spacings = pytest.mark.parametrize("spacing", ["karras", "uniform"])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_targets(num_targets, count, seed=0, low=0, high=1000):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (num_targets, count), generator=generator).sort(0).values


def wavy(x_t, timesteps):
    """A model without any structure, per element: whatever holds for it does not depend on the model."""
    return torch.sin(x_t) * (1 + timesteps[:, None, None, None].to(x_t.dtype) / 1000) + 0.3


class Recorder:
    """Wraps a model and keeps what it was shown."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, x_t, timesteps):
        self.calls.append((x_t.clone(), timesteps.clone()))
        return self.model(x_t, timesteps)


def rmse(a, b):
    return (a - b).square().mean().sqrt().item()


def assert_close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The yardstick


def test_tables_are_those_of_diffusers():
    from diffusers import DDPMScheduler

    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for table, rescale in ((SD, False), (ZERO_SNR, True)):
        expected = DDPMScheduler(**config, rescale_betas_zero_snr=rescale).alphas_cumprod
        torch.testing.assert_close(table.float(), expected, rtol=1e-4, atol=1e-6)


@both_tables
def test_fine_solution_is_the_closed_form_of_a_gaussian(table):
    model, timesteps = gaussian(std=0.2), torch.tensor([0, 1, 30, 300, 700, 998, 999])
    latents = model.sample(len(timesteps))
    expected = gaussian_noise(model, latents, timesteps, table)
    assert_close(model.fine_noise(latents, timesteps, table), expected, 1e-6)


def test_fine_solution_of_a_mixture_has_converged():
    model, timesteps = mixture(0), random_targets(1, 32)[0]
    latents = model.sample(32)
    coarse, fine = (model.fine_noise(latents, timesteps, SD, steps) for steps in (300, 450))
    assert_close(coarse, fine, 1e-6)


# Exact properties


@both_tables
@both_spacings
@pytest.mark.parametrize(("num_targets", "num_steps"), [(1, 1), (1, 8), (4, 4), (4, 9)])
def test_model_is_called_once_a_step_at_the_level_of_its_latent(table, spacing, num_targets, num_steps):
    timesteps, latents, constant = random_targets(num_targets, 32), randn(32, 4, 2, 2), randn(32, 4, 2, 2, seed=1)
    model = Recorder(lambda x_t, t: constant)
    invert(model, latents, timesteps, table, num_steps, spacing=spacing)
    assert len(model.calls) == num_steps
    assert all(t.dtype == torch.int64 and t.shape == (32,) and x_t.shape == latents.shape for x_t, t in model.calls)

    nodes, _ = inversion_nodes(timesteps, table, num_steps, spacing)
    (first_latents, first_timesteps), *inner = model.calls
    assert first_latents.equal(latents) and not first_timesteps.any()
    for (x_t, t), node in zip(inner, nodes, strict=False):
        assert t.equal(node)
        alpha, sigma = alpha_sigma(table, t)
        assert_close(x_t, alpha * latents + sigma * constant)


@both_orders
def test_samples_do_not_influence_each_other(order):
    timesteps, latents = random_targets(3, 12), randn(12, 4, 2, 2)
    timesteps[:, 0], timesteps[:, 1] = 0, 999
    together = invert(wavy, latents, timesteps, SD, 7, order=order, predict_at_targets=True)
    for i in range(12):
        alone = invert(wavy, latents[i : i + 1], timesteps[:, i : i + 1], SD, 7, order=order, predict_at_targets=True)
        for a, b in zip(alone, together, strict=True):
            assert_close(a[:, 0], b[:, i])

    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = invert(
        wavy, latents[permutation], timesteps[:, permutation], SD, 7, order=order, predict_at_targets=True
    )
    for a, b in zip(shuffled, together, strict=True):
        assert_close(a, b[:, permutation])

    elsewhere = timesteps.clone()
    elsewhere[:, -1] = torch.tensor([5, 5, 800])
    for a, b in zip(invert(wavy, latents, elsewhere, SD, 7, order=order)[1:3], together[1:3], strict=True):
        assert_close(a[:, :-1], b[:, :-1])
        assert not torch.allclose(a[:, -1], b[:, -1])


@both_tables
def test_v_prediction_is_inverted_like_epsilon(table):
    epsilon, timesteps, latents = mixture(0), random_targets(3, 32), mixture(0).sample(32)
    timesteps[-1, 0] = 999

    def velocity(x_t, t):
        alpha, sigma = alpha_sigma(table, t)
        clean, noise = epsilon.posterior(x_t, alpha, sigma)
        return alpha * noise - sigma * clean

    def predict(x_t, t):
        return noise_from_model_output(velocity(x_t, t), x_t, t, table, "v_prediction")

    expected = invert(epsilon.predictor(table), latents, timesteps, table, predict_at_targets=True)
    found = invert(predict, latents, timesteps, table, predict_at_targets=True)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-10)


@both_tables
@both_orders
@pytest.mark.parametrize(("num_targets", "num_steps"), [(1, 1), (1, 8), (4, 4), (4, 8)])
def test_predicted_is_the_models_answer_at_the_targets(table, order, num_targets, num_steps):
    # The latents differ, so the targets' places among the nodes do too.
    timesteps, latents = random_targets(num_targets, 32), mixture(0).sample(32)
    timesteps[:, 0], timesteps[:, 1], timesteps[: num_targets // 2, 2] = 0, 999, 0
    model = Recorder(mixture(0).predictor(table))
    found = invert(model, latents, timesteps, table, num_steps, order=order, predict_at_targets=True)
    assert len(model.calls) <= num_steps + 1
    for m in range(num_targets):
        assert_close(found.predicted[m], model.model(found.latents[m], found.timesteps[m]))
    without = invert(model, latents, timesteps, table, num_steps, order=order)
    assert without.latents.equal(found.latents) and without.noise.equal(found.noise)


@pytest.mark.parametrize("latents_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("table_dtype", [torch.float64, torch.float32])
def test_state_is_kept_in_float32_or_wider(latents_dtype, model_dtype, table_dtype):
    latents, timesteps = randn(16, 4, 2, 2).to(latents_dtype), random_targets(2, 16)
    model = Recorder(lambda x_t, t: wavy(x_t, t).to(model_dtype))
    found = invert(model, latents, timesteps, SD.to(table_dtype), predict_at_targets=True)
    state_dtype = torch.float64 if latents_dtype == torch.float64 else torch.float32
    assert {tensor.dtype for tensor in found[1:]} == {state_dtype}
    # The tolerance is of the model's rounding, not of half-precision schedules (7 % at small t) or states.
    exact = invert(wavy, latents.double(), timesteps, SD)
    atol = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[model_dtype]
    torch.testing.assert_close(found.noise.double(), exact.noise, rtol=0, atol=atol)


def test_any_integers_and_buffers_will_do_and_there_is_no_gradient():
    latents, timesteps, buffer = randn(8, 4, 2, 2), random_targets(2, 8), torch.empty(8, 4, 2, 2, dtype=torch.float64)
    model = Recorder(lambda x_t, t: buffer.copy_(wavy(x_t, t)))  # it answers in the same buffer every time
    found = invert(model, latents.clone().requires_grad_(), timesteps.int(), SD, predict_at_targets=True)
    assert {t.dtype for _, t in model.calls} == {torch.int64}
    for a, b in zip(found, invert(wavy, latents, timesteps, SD, predict_at_targets=True), strict=True):
        assert a.equal(b) and not a.requires_grad


# The nodes


@both_tables
@both_spacings
@pytest.mark.parametrize(("num_targets", "num_steps"), [(1, 1), (1, 8), (2, 3), (3, 3), (4, 8), (4, 17), (8, 20)])
@pytest.mark.parametrize("high", [4, 30, 1000])
def test_nodes_rise_and_divide_each_interval_between_targets_evenly(table, spacing, num_targets, num_steps, high):
    timesteps = random_targets(num_targets, 24, seed=num_steps, high=high)
    timesteps[-1, 0], timesteps[: (num_targets + 1) // 2, 1], timesteps[:, 3] = 999, 0, timesteps[0, 3]
    timesteps[num_targets // 2 :, 2] = timesteps[-1, 2]
    nodes, target_index = inversion_nodes(timesteps, table, num_steps, spacing)
    assert nodes.dtype == target_index.dtype == torch.int64
    assert nodes.shape == (num_steps, 24) and target_index.shape == (num_targets, 24)
    assert nodes.gather(0, target_index - 1).equal(timesteps)
    assert nodes[-1].equal(timesteps[-1]) and (nodes.diff(dim=0) >= 0).all()
    coordinate = torch.arange(1000.0, dtype=torch.float64)
    if spacing == "karras":
        coordinate = ((1 - table) / table).sqrt().clamp(max=20) ** (1 / 7)
    for i in range(24):
        ends, last_nodes = coordinate[[0, *timesteps[:, i].tolist()]], target_index[:, i].tolist()
        pieces = torch.tensor([0, *last_nodes]).diff()
        widths = ends.diff() / pieces
        for start, width, count, last in zip(ends, widths, pieces, last_nodes, strict=False):
            exact = start + width * torch.arange(1, count + 1)
            inside = nodes[last - count : last, i]
            neighbours = coordinate[torch.stack([inside - 1, inside + 1]).clamp(0, 999)]
            half_a_timestep = (coordinate[inside] - neighbours).abs().amax(0) / 2
            assert ((coordinate[inside] - exact).abs() <= half_a_timestep + 1e-12).all()
        # A free node was worth it: no interval had longer pieces before it got its last one.
        assert (ends.diff()[pieces > 1] / (pieces[pieces > 1] - 1) >= widths.max() - 1e-9).all()


# The steps, against the formulas written out for one number


def slow_inversion(x_0, nodes, table, order):
    """Returns x at nodes 1..n for one number x_0 under `wavy`, carrying y = x / alpha along dy = E ds."""

    def level(t):
        return math.inf if table[t] == 0 else math.sqrt((1 - table[t]) / table[t])

    y, x, s, t, history, visited = x_0, x_0, 0.0, 0, None, []
    for end in nodes:
        prediction = math.sin(x) * (1 + t / 1000) + 0.3
        if level(end) != s:
            known_at, estimate = level(t), prediction
            if order == 2 and history is not None and level(end) <= 20 and known_at > history[1]:
                r, history_ratio = level(end) / s, s / history[1]
                w = (math.log(r) * r / (r - 1) - 1) / math.log(history_ratio)
                estimate += min(max(w, 0.0), 2.0) * (prediction - history[0])
            if math.isinf(level(end)):
                x = estimate  # alpha = 0, sigma = 1, and the way there is infinitely long
            else:
                y += (level(end) - s) * estimate
                x = math.sqrt(table[end]) * y
            history, s, t = (prediction, known_at), level(end), end
        visited.append(x)
    return visited


@both_tables
@both_orders
@both_spacings
@pytest.mark.parametrize(("num_targets", "num_steps"), [(1, 2), (1, 8), (3, 5), (4, 10)])
def test_steps_follow_the_formulas(table, order, spacing, num_targets, num_steps):
    timesteps, latents = random_targets(num_targets, 40, seed=num_steps), randn(40, 1, 1, 1)
    rows = [[0] * 4, [0, 0, 1, 3], [499, 500, 999, 999], [5, 5, 800, 800], [0, 990, 998, 999], [997, 998, 999, 999]]
    for i, row in enumerate(rows):
        timesteps[:, i] = torch.tensor(row[-num_targets:])
    found = invert(wavy, latents, timesteps, table, num_steps, order=order, spacing=spacing)
    alpha, sigma = alpha_sigma(table, timesteps)
    assert_close(found.latents, alpha * latents + sigma * found.noise)
    assert found.timesteps.equal(timesteps) and found.timesteps.dtype == torch.int64 and found.predicted is None
    nodes, target_index = inversion_nodes(timesteps, table, num_steps, spacing)
    for i in range(40):
        visited = slow_inversion(latents[i].item(), nodes[:, i].tolist(), table.tolist(), order)
        expected = [visited[k - 1] for k in target_index[:, i].tolist()]
        assert found.latents[:, i].flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


# Accuracy on models whose exact inversion is known


@both_tables
@pytest.mark.parametrize("std", [0.2, 0.5, 1.0, 2.0])
def test_a_gaussian_is_inverted_to_its_closed_form(table, std):
    model, timesteps = gaussian(std=std), random_targets(1, 256)[0]
    latents = model.sample(256)
    expected = gaussian_noise(model, latents, timesteps, table)
    assert rmse(invert(model.predictor(table), latents, timesteps, table, 10).noise[0], expected) < 0.02


@pytest.fixture(scope="module", params=range(2))
def solved(request):
    """A mixture, latents from it, four sorted random timesteps each, and the exact noise there."""
    model, timesteps = mixture(request.param), random_targets(4, 96, seed=request.param)
    latents = model.sample(96, seed=request.param)
    exact = torch.stack([model.fine_noise(latents, t, SD) for t in timesteps])
    # One target per sample, uniform over the schedule although the four are sorted.
    pick = torch.randint(4, (1, 96), generator=torch.Generator().manual_seed(request.param))
    one = exact.gather(0, pick[..., None, None, None].expand(1, *latents.shape))[0]
    return model.predictor(SD), latents, timesteps, exact, timesteps.gather(0, pick)[0], one


def test_one_target_is_exact(solved):
    """The usual DDIM inversion, whose model is told the level that the latent goes to, has an error above 0.25."""
    predict, latents, _, _, timesteps, exact = solved
    assert rmse(invert(predict, latents, timesteps, SD, 8).noise[0], exact) < 0.035


@pytest.mark.parametrize(("num_steps", "bound"), [(5, 0.25), (8, 0.07), (10, 0.045)])
def test_four_targets_are_all_exact(solved, num_steps, bound):
    predict, latents, timesteps, exact, _, _ = solved
    assert rmse(invert(predict, latents, timesteps, SD, num_steps).noise, exact) < bound


def test_karras_spacing_pays(solved):
    predict, latents, _, _, timesteps, exact = solved
    karras, uniform = (
        rmse(invert(predict, latents, timesteps, SD, 8, spacing=spacing).noise[0], exact)
        for spacing in ("karras", "uniform")
    )
    assert karras < uniform / 6


def test_error_falls_with_the_order_of_the_steps():
    # A wide Gaussian, for which neither the start at t = 0 nor rounding to integer timesteps limits the accuracy.
    model, timesteps = gaussian(std=5.0), torch.full((64,), 500)
    latents = model.sample(64)
    expected = gaussian_noise(model, latents, timesteps, SD)
    for order, low, high in ((1, 1.8, 2.2), (2, 3.5, 4.8)):
        few, more, many = (
            rmse(invert(model.predictor(SD), latents, timesteps, SD, n, order=order).noise[0], expected)
            for n in (8, 16, 32)
        )
        assert low < few / more < high
        assert low < more / many < high


# Conversions


@both_tables
def test_add_noise_is_the_forward_process(table):
    latents, noise, timesteps = randn(6, 4, 2, 2), randn(6, 4, 2, 2, seed=1), torch.tensor([0, 1, 250, 500, 998, 999])
    for i, t in enumerate(timesteps.tolist()):
        expected = math.sqrt(table[t]) * latents[i] + math.sqrt(1 - table[t]) * noise[i]
        assert_close(add_noise(latents, noise, timesteps, table)[i], expected)


@both_tables
def test_model_outputs_become_noise_at_their_own_timestep(table):
    latents, noise, timesteps = randn(6, 4, 2, 2), randn(6, 4, 2, 2, seed=1), torch.tensor([0, 1, 250, 500, 998, 999])
    alpha, sigma = alpha_sigma(table, timesteps)
    x_t, velocity = alpha * latents + sigma * noise, alpha * noise - sigma * latents
    assert_close(noise_from_model_output(noise, x_t, timesteps, table, "epsilon"), noise)
    assert_close(noise_from_model_output(velocity, x_t, timesteps, table, "v_prediction"), noise)


def test_other_prediction_types_are_refused():
    x_t = randn(2, 4, 2, 2)
    with pytest.raises(ValueError, match="prediction_type"):
        noise_from_model_output(x_t, x_t, torch.tensor([1, 2]), SD, "sample")


# Refusals name the argument

LATENTS = torch.zeros(2, 4, 2, 2)


@pytest.mark.parametrize(
    "changed",
    [
        {"timesteps": torch.tensor([5, 1000])},
        {"timesteps": torch.tensor([-1, 5])},
        {"timesteps": torch.tensor([[5, 6], [5, 4]])},  # falls
        {"timesteps": torch.tensor([5.0, 6.0])},
        {"timesteps": torch.tensor([True, False])},
        {"timesteps": torch.tensor([5])},
        {"timesteps": torch.tensor([[5], [6]])},
        {"timesteps": torch.tensor(5)},
        {"timesteps": torch.zeros(0, 2, dtype=torch.int64)},
        {"timesteps": torch.zeros(1, 1, 2, dtype=torch.int64)},
        {"num_steps": 0},
        {"num_steps": -3},
        {"num_steps": 2, "timesteps": torch.tensor([[5, 6]] * 3)},
        {"order": 3},
        {"order": 0},
        {"spacing": "leading"},
        {"alphas_cumprod": SD.half()},
        {"alphas_cumprod": SD.bfloat16()},
        {"alphas_cumprod": SD[None]},
        {"latents": LATENTS[0]},
        {"latents": LATENTS[None]},
        {"latents": LATENTS.int()},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_wrong_arguments_are_refused_before_the_model_is_called(changed):
    model = Recorder(wavy)
    arguments = {"latents": LATENTS, "timesteps": torch.tensor([5, 6]), "alphas_cumprod": SD, **changed}
    with pytest.raises(ValueError, match=next(iter(changed))):
        invert(model, **arguments)
    assert not model.calls


def test_a_model_that_answers_in_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        invert(lambda x_t, t: x_t[:1], LATENTS, torch.tensor([5, 6]), SD)

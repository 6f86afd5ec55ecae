"""The benchmark: its counts are the formulas', its rivals compute what was published, its figures are all there."""

import gc
import json
import math
import time
import weakref
from pathlib import Path

import benchmark
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from benchmark import METHODS, Method, Models, Probe, count_flops, ddim_inversion_step, even_nodes
from diffusers import DDPMScheduler
from estimate_memory import FAMILIES, VAE
from test_estimate_memory import SMALL
from train_small_world import make_vae

import train_inversion_dpo
from inversion_utils import add_lora, tokenize

B, INPO_STEPS, NODES = 2, 3, 4
IMAGES = 2 * B
ABAR = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
HAS_CLEAR_REFS = Path("/proc/self/clear_refs").exists()
has_clear_refs = pytest.mark.skipif(not HAS_CLEAR_REFS, reason="reads the peak of the resident set from Linux")


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(folder, *options):
    """Runs the benchmark in small, and returns what it wrote."""
    reset_accelerate()
    output = folder / "figures.json"
    small = ["--resolution", "32", "--train_batch_size", str(B), "--rounds", "1", "--steps", "1"]
    rivals = ["--inpo_steps", str(INPO_STEPS), "--inversion_dpo_steps", str(NODES)]
    benchmark.main(benchmark.parse_args([*small, *rivals, "--output", str(output), *options]))
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    if not HAS_CLEAR_REFS:
        pytest.skip("reads the peak of the resident set from Linux")
    return run(tmp_path_factory.mktemp("benchmark"))


def trajectory_steps(*options):
    """(targets, inversion steps) that the script takes by default."""
    required = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    args, _ = train_inversion_dpo.parse_args([*required, *options])
    return train_inversion_dpo.timesteps_per_pair(args), train_inversion_dpo.inversion_steps(args)


def test_counts_of_calls_are_the_formulas(record):
    """Evaluations per image: by the reference, by the policy, and of these with a gradient."""
    (m, n), (m_inpo, n_inpo) = (trajectory_steps("--objective", name) for name in ("inversion_dpo", "inpo"))
    expected = {
        "diffusion_dpo": (1, 1, 1),
        "inpo": (n_inpo + 1, m_inpo, m_inpo),
        "inversion_dpo": (n + 1, m, m),
        "inversion_dpo, chunks of 1": (n + 1, 2 * m, m),
        "inversion_dpo, as many nodes": (NODES + 1, m, m),
        "inversion_dpo, all nodes": (NODES + 1, 2 * NODES, NODES),
        "inpo, cached": (0, m_inpo, m_inpo),
        "inversion_dpo, cached": (0, m, m),
        "diffusion_dpo, cached latents": (1, 1, 1),
        "published_inpo": (1, INPO_STEPS + 1, 1),
        "published_inversion_dpo": (2 * NODES + 2 * NODES, 2 * NODES, 2 * NODES),  # guidance doubles all of them
    }
    names = ("reference_evaluations", "policy_evaluations", "policy_evaluations_with_gradient")
    found = {method: tuple(row[name] / IMAGES for name in names) for method, row in record["figures"].items()}
    assert found == expected
    for method, row in record["figures"].items():
        times = 0 if "cached" in method else 1
        assert row["calls"].get(f"encode_images x{IMAGES}", 0) == times
        assert row["calls"].get(f"encode_prompts x{B}", 0) == (4 if method == "published_inversion_dpo" else times)


def test_the_figures_are_all_there_and_agree(record):
    assert set(record["figures"]) == set(benchmark.default_methods()) == set(record["methods"])
    assert set(METHODS) - set(benchmark.default_methods()) == set(benchmark.ON_REQUEST)
    assert record["model"] == "tiny" and record["device"].startswith("CPU") and "torch" in record["versions"]
    baseline = record["figures"]["diffusion_dpo"]
    for row in record["figures"].values():
        seconds = row["seconds"]
        assert row["median_seconds"] >= seconds > 0 and row["memory_gib"] > 0
        assert row["pairs_per_second"] * seconds == pytest.approx(B)
        assert row["ratio_to_diffusion_dpo"] == seconds / baseline["seconds"]
        assert row["flop_floor_seconds"] == row["needed_flops"] / record["matmul_flops_per_second"]
        assert row["flop_floor_share"] == row["flop_floor_seconds"] / seconds > 0
        assert row["call_floor_share"] == row["call_floor_seconds"] / seconds > 0
        assert 0 < row["overhead_share"] < 1


def test_needed_flops_leave_out_what_only_saves_memory(record):
    """Chunks of 1 make more calls for the same result; per latent evaluated, all methods need alike."""
    rows = record["figures"]
    assert rows["inversion_dpo, chunks of 1"]["needed_flops"] == rows["inversion_dpo"]["needed_flops"]
    inpo, dpo = rows["published_inpo"]["needed_flops"], rows["diffusion_dpo"]["needed_flops"]
    inner = rows["inpo"]["needed_flops"] - dpo  # as many evaluations more as the script's inversion has steps
    per_step = inner / trajectory_steps("--objective", "inpo")[1]
    assert (inpo - dpo) / INPO_STEPS == pytest.approx(per_step, rel=0.1)  # the policy's have the LoRA's on top
    assert inpo - dpo > INPO_STEPS * per_step


def test_the_table_has_a_row_for_each_method(record):
    lines = benchmark.table(record["figures"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == benchmark.default_methods()


@pytest.fixture
def models():
    """The tiny model with a LoRA at its start, as a rival's step gets it."""
    reset_accelerate()
    _, text_encoders, vae, unet = benchmark.build_models("tiny", torch.float32)
    add_lora(unet, 4, 4)
    parts = train_inversion_dpo, Accelerator(mixed_precision="no"), text_encoders, vae, unet
    return Models(*parts, ABAR, torch.float32, 8)


@pytest.fixture
def batch():
    tokenizers = [benchmark.make_tokenizer()]
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.rand(IMAGES, 3, 32, 32, generator=generator) * 2 - 1,
        "input_ids": tokenize(tokenizers, ["a red circle"] * B),
        "empty_input_ids": tokenize(tokenizers, [""] * B),
        "uniforms": torch.full((1, B), 0.5),
    }


def gradients(unet):
    return {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}


def move_lora(unet):
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_published_inversion_dpo_has_no_gradient_where_policy_and_reference_are_equal(models, batch):
    loss = benchmark.published_inversion_dpo(models, batch, NODES)
    assert loss.item() == pytest.approx(math.log(2))
    found = gradients(models.unet)
    assert found and all(gradient is not None and not gradient.any() for gradient in found.values())
    move_lora(models.unet)
    benchmark.published_inversion_dpo(models, batch, NODES)
    assert all(gradient.any() for gradient in gradients(models.unet).values())


def test_published_inpo_has_a_gradient_from_the_start(models, batch):
    loss = benchmark.published_inpo(models, batch, INPO_STEPS)
    assert loss.item() == pytest.approx(math.log(2))
    for name, gradient in gradients(models.unet).items():
        assert gradient.any() == ("lora_B" in name)  # lora_A waits for lora_B to leave zero


def test_published_inpo_inverts_by_the_policy(models, batch, monkeypatch):
    seen, states = [], []

    def predict(unet, x_t, timesteps, *rest):
        states.append(x_t)
        seen.append((benchmark.is_reference(unet), torch.is_grad_enabled(), timesteps.tolist()))
        return predict_noise(unet, x_t, timesteps, *rest)

    predict_noise = train_inversion_dpo.predict_noise
    monkeypatch.setattr(train_inversion_dpo, "predict_noise", predict)
    batch["uniforms"][0, 1] = 0.9  # the first pair's timestep serves all
    benchmark.published_inpo(models, batch, 2)
    calls = [(False, False, 250), (False, False, 500), (True, False, 500), (False, True, 500)]
    assert seen == [(*who, [t] * IMAGES) for *who, t in calls]
    benchmark.published_inpo(models, batch, 2)
    assert torch.equal(states[0], states[4]) and not torch.equal(states[1], states[5])  # eta adds fresh noise


def kept_by(step, models, batch, monkeypatch, num_steps):
    """How many tensors autograd keeps when the backward begins, and how many backwards there are."""
    kept, at_backward = [], []
    monkeypatch.setattr(models.accelerator, "backward", lambda loss: at_backward.append(len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(0) or tensor, lambda tensor: tensor):
        step(models, batch, num_steps)
    return at_backward


def test_published_inversion_dpo_keeps_the_graphs_of_all_nodes(models, batch, monkeypatch):
    [two], [four] = (
        kept_by(benchmark.published_inversion_dpo, models, batch, monkeypatch, num_steps) for num_steps in (2, 4)
    )
    assert four == pytest.approx(2 * two, rel=0.01)
    [inpo], [more] = (kept_by(benchmark.published_inpo, models, batch, monkeypatch, steps) for steps in (2, 4))
    assert more == inpo == pytest.approx(two / 2, rel=0.1)


def test_a_ddim_step_with_the_true_noise_reaches_the_level_exactly():
    torch.manual_seed(0)
    x_0, noise = torch.randn(2, 1, 4, 64, 64, dtype=torch.float64)
    abar = ABAR.double()
    for p, q in torch.tensor([[0, 300], [300, 999], [5, 5]]):
        x, expected = (abar[t].sqrt() * x_0 + (1 - abar[t]).sqrt() * noise for t in (p, q))
        exact = ddim_inversion_step(x, noise, p, q, abar)
        torch.testing.assert_close(exact, expected)
        noisy = ddim_inversion_step(x, noise, p, q, abar, eta=0.1)
        implied = (noisy - abar[q].sqrt() * x_0) / (1 - abar[q]).sqrt()
        assert implied.var().item() == pytest.approx(noise.var().item(), abs=0.02)  # fresh noise replaces some of it
        assert torch.equal(noisy, exact) == (p == q).item()


def test_nodes_are_even_from_the_clean_image_to_the_last():
    assert even_nodes(999, 3).tolist() == [0, 333, 666, 999]
    assert even_nodes(torch.tensor(1), 2).tolist() == [0, 0, 1] and even_nodes(0, 2).tolist() == [0, 0, 0]


def test_flops_worked_by_hand():
    x, frozen = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3)
    assert count_flops(lambda: x @ frozen) == 2 * 5 * 7 * 3
    assert count_flops(lambda: (x @ frozen).sum().backward()) == 2 * 2 * 5 * 7 * 3  # none for the frozen weight
    q = torch.randn(1, 2, 64, 8, requires_grad=True)
    product = 2 * 2 * 64 * 64 * 8
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * product
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == (2 + 5) * product


@has_clear_refs
def test_overhead_is_what_no_model_call_takes(tmp_path, monkeypatch):
    def slowed(name):
        function = getattr(train_inversion_dpo, name)

        def call(*args, **kwargs):
            time.sleep(0.5)
            return function(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(train_inversion_dpo, name, call)
            (tmp_path / name).mkdir()
            return run(tmp_path / name, "--methods", "diffusion_dpo")["figures"]["diffusion_dpo"]["overhead_share"]

    assert slowed("preference_loss") > 0.5 > 0.3 > slowed("encode_images")


def test_a_closed_probe_leaves_nothing_behind():
    def replaced():
        functions = [getattr(train_inversion_dpo, name) for name in benchmark.CALLS]
        classes = train_inversion_dpo.RunningMeans.pop, Accelerator.backward, benchmark.AcceleratedOptimizer.step
        return [*functions, *classes]

    before = replaced()
    probe = Probe()
    assert all(new is not old for new, old in zip(replaced(), before, strict=True))
    probe.close()
    assert replaced() == before


def test_a_method_gets_its_own_folder_and_warm_up(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_inversion_dpo, "main", lambda options: seen.append(options) or 1 / 0)
    args = benchmark.parse_args(["--steps", "3"])
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            benchmark.measure(args, Method(["--logging_dir", "{folder}/logs"], warmup=4), str(tmp_path), {})
    first, second = (dict(zip(options[::2], options[1::2], strict=True)) for options in seen)
    assert first["--max_train_steps"] == "8"  # one more than measured, whose parts are timed
    assert first["--logging_dir"] != second["--logging_dir"]
    assert Path(first["--logging_dir"]).parent.parent == tmp_path


@has_clear_refs
def test_the_memory_of_a_cached_method_is_that_of_its_u_net_alone(tmp_path, monkeypatch):
    """Neither the run that filled the cache nor the models that encoded are still there when the peak is measured."""
    made, alive = [], []

    def build_models(*args):
        models = real_build_models(*args)
        made.extend(map(weakref.ref, (*models[1], *models[2:])))
        return models

    def reset_peak_memory():
        gc.collect()
        alive.append([type(model()).__name__ for model in made if model() is not None])

    real_build_models = benchmark.build_models
    monkeypatch.setattr(benchmark, "build_models", build_models)
    monkeypatch.setattr(benchmark, "reset_peak_memory", reset_peak_memory)
    run(tmp_path, "--methods", "diffusion_dpo", "inpo, cached")
    assert alive == [["CLIPTextModel", "AutoencoderKL", "UNet2DConditionModel"], ["UNet2DConditionModel"]]


@pytest.fixture
def small_sdxl(monkeypatch):
    """SDXL's parts in small, where families are looked up."""
    sdxl = FAMILIES["sdxl"]
    clip = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 49408}
    sizes = ({"hidden_size": 16}, {"hidden_size": 32, "projection_dim": 16})
    unet = sdxl.unet | {
        "block_out_channels": (32, 32), "attention_head_dim": (2, 2), "transformer_layers_per_block": (1, 1),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1, "cross_attention_dim": 48,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }  # fmt: skip
    encoders = [(kind, clip | size) for (kind, _), size in zip(sdxl.text_encoders, sizes, strict=True)]
    monkeypatch.setitem(FAMILIES, "sdxl", sdxl._replace(unet=unet, text_encoders=encoders))
    for name in ("block_out_channels", "layers_per_block", "norm_num_groups"):
        monkeypatch.setitem(VAE, name, make_vae().config[name])


def dtypes(module):
    return {parameter.dtype for parameter in module.parameters()}


def test_models_are_made_in_the_dtype_that_they_keep(small_sdxl, monkeypatch):
    """SDXL's VAE stays in float32, and no module is ever wider than it ends up."""
    largest = []
    register = torch.nn.Module.register_parameter

    def watch(module, name, parameter):
        largest.append(parameter.dtype if parameter is not None else None)
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", watch)
    tokenizers, text_encoders, vae, unet = benchmark.build_models("sdxl", torch.bfloat16)
    assert len(tokenizers) == len(text_encoders) == 2 and tokenizers[0].model_max_length == 77
    assert all(dtypes(module) == {torch.bfloat16} for module in (unet, *text_encoders))
    assert dtypes(vae) == {torch.float32} and torch.get_default_dtype() == torch.float32
    assert largest.count(torch.float32) == len(list(vae.parameters()))
    for family in ("tiny", "sd15"):
        monkeypatch.setitem(FAMILIES, "sd15", SMALL._replace(text_encoders=FAMILIES["sdxl"].text_encoders[:1]))
        _, [text_encoder], vae, unet = benchmark.build_models(family, torch.bfloat16)
        assert all(dtypes(module) == {torch.bfloat16} for module in (text_encoder, vae, unet))


@has_clear_refs
def test_sdxl_goes_the_same_way(small_sdxl, tmp_path, monkeypatch):
    monkeypatch.setattr(train_inversion_dpo, "main", None)  # its twin is to run
    monkeypatch.setattr(benchmark, "matmul_rate", lambda dtype: 1e9)  # of bfloat16, slow on some CPUs
    trained = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kw: trained.append(0) or step(*args, **kw))
    methods = ["inversion_dpo", "published_inpo", "published_inversion_dpo"]
    record = run(tmp_path, "--model", "sdxl", "--mixed_precision", "bf16", "--resolution", "16", "--methods", *methods)
    assert list(record["figures"]) == methods and len(trained) == 3 * len(methods)
    m, n = trajectory_steps()
    assert record["figures"]["inversion_dpo"]["reference_evaluations"] == IMAGES * (n + 1)
    assert record["figures"]["published_inversion_dpo"]["policy_evaluations"] == IMAGES * 2 * NODES
    assert all(row["ratio_to_diffusion_dpo"] is None for row in record["figures"].values())
    assert "nan" not in benchmark.table(record["figures"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "sd3"], "'sdxl'"),
        (["--resolution", "100"], "--resolution is 100; allowed: multiples of 8"),
        (["--resolution", "0"], "--resolution is 0"),
        (["--train_batch_size", "0"], "--train_batch_size: is 0; allowed: at least 1"),
        (["--rounds", "0"], "--rounds: is 0"),
        (["--steps", "many"], "--steps"),
        (["--inpo_steps", "0"], "--inpo_steps: is 0"),
        (["--inversion_dpo_steps", "-1"], "--inversion_dpo_steps: is -1"),
        (["--inversion_dpo_steps", "3"], "--inversion_dpo_steps is 3; allowed: 4 and above"),
        (["--methods", "dpo"], "'published_inpo'"),
        (["--mixed_precision", "fp8"], "'bf16'"),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16 needs a GPU"),
        (["--output", "nowhere/figures.json"], "--output nowhere/figures.json: no such folder"),
        (["--output", "README.md"], "--output README.md exists"),
    ],
)
def test_wrong_options_end_with_2_and_one_line(options, message, capsys, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        benchmark.parse_args(options)
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]

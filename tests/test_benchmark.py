"""The benchmarks: counts are the formulas', rivals compute what was published, figures are all there."""

import json
import math
import time
import weakref

import benchmark
import benchmark_input
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from benchmark import FAMILIES, METHODS, Family, Models, ddim_inversion_step, even_nodes
from diffusers import DDPMScheduler
from train_small_world import make_model, make_tokenizer, make_vae

import train_inversion_dpo
import training_utils
from training_utils import add_lora

B, INPO_STEPS, NODES = 2, 3, 4
IMAGES = 2 * B
ABAR = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
DEFAULT_METHODS = [name for name in METHODS if name not in benchmark.ON_REQUEST]
has_clear_refs = pytest.mark.skipif(not benchmark.CLEAR_REFS.exists(), reason="Linux tells the peak of the process")


def run(folder, *options):
    """Runs the benchmark in small, and returns what it wrote."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    output = folder / "figures.json"
    small = ["--resolution", "32", "--train_batch_size", str(B), "--rounds", "1", "--steps", "1"]
    rivals = ["--inpo_steps", str(INPO_STEPS), "--inversion_dpo_steps", str(NODES)]
    benchmark.main(*benchmark.parse_args([*small, *rivals, "--output", str(output), *options]))
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What a run of all methods wrote, and as "alive" the models in memory when the peak of each began to count."""
    made, alive = [], []

    def make_frozen(*args):
        model = real_make_frozen(*args)
        made.append(weakref.ref(model))
        return model

    def reset_peak_memory():
        real_reset_peak_memory()
        alive.append({type(model()).__name__ for model in made if model() is not None})

    real_make_frozen, real_reset_peak_memory = benchmark.make_frozen, benchmark.reset_peak_memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "make_frozen", make_frozen)
        patch.setattr(benchmark, "reset_peak_memory", reset_peak_memory)
        record = run(tmp_path_factory.mktemp("benchmark"))
    return {**record, "alive": dict(zip(record["figures"], alive, strict=True))}


def trajectory_steps(*options):
    """(targets, inversion steps) that the script takes by default."""
    required = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    args, _ = train_inversion_dpo.parse_args([*required, *options])
    return train_inversion_dpo.timesteps_per_pair(args), train_inversion_dpo.inversion_steps(args)


def test_counts_of_calls_are_the_formulas(record):
    """Calls per image: of the reference, of the policy, of these with a gradient, of VAE and text encoder."""
    (m, n), (m_inpo, n_inpo) = (trajectory_steps("--objective", name) for name in ("inversion_dpo", "inpo"))
    expected = {
        "diffusion_dpo": (1, 1, 1, 1, 0.5),  # winner and loser share a caption
        "inpo": (n_inpo + 1, m_inpo, m_inpo, 1, 0.5),
        "inversion_dpo": (n + 1, m, m, 1, 0.5),
        "inversion_dpo, chunks of 1": (n + 1, 2 * m, m, 1, 0.5),
        "inversion_dpo, as many nodes": (NODES + 1, m, m, 1, 0.5),
        "inversion_dpo, all nodes": (NODES + 1, 2 * NODES, NODES, 1, 0.5),
        "diffusion_dpo, cached": (0, 1, 1, 0, 0),
        "inpo, cached": (0, m_inpo, m_inpo, 0, 0),
        "inversion_dpo, cached": (0, m, m, 0, 0),
        "published_inpo": (1, INPO_STEPS + 1, 1, 1, 0.5),
        "published_inversion_dpo": (4 * NODES, 2 * NODES, 2 * NODES, 1, 2),  # guidance doubles all of them
    }
    names = ("reference_calls", "policy_calls", "policy_calls_with_gradient", "vae_calls", "text_encoder_calls")
    assert {method: tuple(row[name] for name in names) for method, row in record["figures"].items()} == expected


def test_a_cached_method_s_memory_holds_the_u_net_alone(record):
    """What filled the cache is gone when the steps are measured."""
    for method, alive in record["alive"].items():
        encoders = set() if "cached" in method else {"CLIPTextModel", "AutoencoderKL"}
        assert alive == {"UNet2DConditionModel", *encoders}, method


def test_the_figures_are_all_there_and_agree(record):
    assert list(record["figures"]) == DEFAULT_METHODS == record["methods"]
    assert record["model"] == "tiny" and record["device"].startswith("CPU") and "torch" in record["versions"]
    baseline = record["figures"]["diffusion_dpo"]
    for row in record["figures"].values():
        assert row["median_seconds"] >= row["seconds"] > 0 and 0 < row["overhead"] < 1
        assert row["pairs_per_second"] * row["seconds"] == pytest.approx(B)
        assert row["ratio_to_diffusion_dpo"] == row["seconds"] / baseline["seconds"]
        assert row["memory_gib"] > 0 or not benchmark.CLEAR_REFS.exists()
    lines = benchmark.table(record["figures"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == DEFAULT_METHODS


@pytest.fixture
def models():
    """The tiny model with a LoRA at its start, as a rival's step gets it."""
    family = FAMILIES["tiny"]
    text_encoders, vae = benchmark.make_encoders(family, torch.float32)
    unet = benchmark.make_frozen(family.unet, torch.float32)
    add_lora(unet, 4)
    accelerator = Accelerator(mixed_precision="no")
    return Models(train_inversion_dpo, accelerator, text_encoders, vae, unet, ABAR, torch.float32)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    example = {
        "pixel_values": torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1, "time_ids": torch.zeros(2, 6),
        "caption": "a red circle", "uniforms": torch.tensor([0.5]), "strength": 1.0, "is_tie": False,
        "key": (0, 0), "row": "row 0", "skipped": [],
    }  # fmt: skip
    return benchmark.collate_with_empty([example] * B, [make_tokenizer()])


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


def test_published_inversion_dpo_is_guided_by_empty_captions(models, batch, monkeypatch):
    conds = []
    monkeypatch.setattr(
        Models, "predict_guided", lambda self, x_t, t, *cond: conds.append(cond) or x_t + 0 * self.unet.conv_in.bias[0]
    )
    monkeypatch.setattr(models.accelerator, "backward", lambda loss: None)
    benchmark.published_inversion_dpo(models, batch, NODES)
    [caption, *_], [empty, *_] = (cond["encoder_hidden_states"] for cond in conds[0])
    ids = make_tokenizer()(["a red circle", ""], padding="max_length", return_tensors="pt").input_ids
    expected = models.text_encoders[0](ids)[0]
    torch.testing.assert_close(torch.stack([caption, empty]), expected)
    assert len(conds) == 3 * NODES


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
    batch["uniforms"] = torch.tensor([[0.5, 0.9]])  # the first pair's timestep serves all
    benchmark.published_inpo(models, batch, 2)
    calls = [(False, False, 250), (False, False, 500), (True, False, 500), (False, True, 500)]
    assert seen == [(*who, [t] * IMAGES) for *who, t in calls]
    benchmark.published_inpo(models, batch, 2)
    assert torch.equal(states[0], states[4]) and not torch.equal(states[1], states[5])  # eta adds fresh noise


def test_published_inversion_dpo_keeps_the_graphs_of_all_nodes(models, batch, monkeypatch):
    def kept_by(step, num_steps):
        """How many tensors the one backward finds kept."""
        backward, kept, backwards = Accelerator(mixed_precision="no").backward, [], []
        monkeypatch.setattr(models.accelerator, "backward", lambda loss: backwards.append(0) or backward(loss))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: kept.append(0) or x):
            step(models, batch, num_steps)
        assert len(backwards) == 1
        return len(kept)

    two, four = (kept_by(benchmark.published_inversion_dpo, n) for n in (2, 4))
    assert four == pytest.approx(2 * two, rel=0.01)
    assert kept_by(benchmark.published_inpo, 4) == kept_by(benchmark.published_inpo, 2)


def test_a_ddim_step_with_the_true_noise_reaches_the_level_exactly():
    torch.manual_seed(0)
    x_0, noise = torch.randn(2, 1, 4, 64, 64, dtype=torch.float64)
    abar = ABAR.double()
    for p, q in torch.tensor([[0, 300], [300, 999], [5, 5]]):
        x, expected = (abar[t].sqrt() * x_0 + (1 - abar[t]).sqrt() * noise for t in (p, q))
        exact = ddim_inversion_step(x, noise, p, q, abar)
        torch.testing.assert_close(exact, expected)
        noisy = ddim_inversion_step(x, noise, p, q, abar, eta=1.0)
        implied = (noisy - abar[q].sqrt() * x_0) / (1 - abar[q]).sqrt()
        assert implied.var().item() == pytest.approx(noise.var().item(), abs=0.05)  # fresh noise replaces some of it
        assert torch.equal(noisy, exact) == (p == q).item()
    assert even_nodes(999, 3).tolist() == [0, 333, 666, 999] and even_nodes(torch.tensor(1), 2).tolist() == [0, 0, 1]


def test_overhead_is_what_no_model_call_takes(tmp_path, monkeypatch):
    def slowed(name, owner=train_inversion_dpo):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            time.sleep(1.0)
            return function(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, call)
            (tmp_path / name).mkdir()
            return run(tmp_path / name, "--methods", "diffusion_dpo")["figures"]["diffusion_dpo"]["overhead"]

    assert slowed("preference_loss") > 0.5 > 0.3 > slowed("encode_images", training_utils)


@has_clear_refs
def test_the_peak_of_memory_is_told_although_it_is_over():
    benchmark.reset_peak_memory()
    before = benchmark.peak_memory()
    torch.ones(2**26)  # a quarter of a GiB
    assert benchmark.peak_memory() - before == pytest.approx(0.25, abs=0.05)
    benchmark.reset_peak_memory()
    assert benchmark.peak_memory() - before == pytest.approx(0, abs=0.05)


@pytest.fixture
def small_sdxl(monkeypatch):
    """SDXL's parts in small, where families are looked up."""

    def part(name):
        return lambda: make_model("sdxl", make_tokenizer())[name]

    small = Family(8, [part("text_encoder"), part("text_encoder_2")], make_vae, part("unet"), True)
    monkeypatch.setitem(FAMILIES, "sdxl", small)
    return small


def test_models_are_in_the_run_s_precision_but_for_sdxls_vae(small_sdxl):
    text_encoders, vae = benchmark.make_encoders(small_sdxl, torch.bfloat16)
    unet = benchmark.make_frozen(small_sdxl.unet, torch.bfloat16)
    for module, dtype in ((vae, torch.float32), *((part, torch.bfloat16) for part in (unet, *text_encoders))):
        assert {(parameter.dtype, parameter.requires_grad) for parameter in module.parameters()} == {(dtype, False)}
    assert len(text_encoders) == 2 and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "family, unet, text_encoders",
    [("sd15", 859_520_964, [123_060_480]), ("sdxl", 2_567_463_684, [123_060_480, 694_659_840])],
)
def test_parameters_are_those_of_the_published_models(family, unet, text_encoders):
    def count(kind):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in kind().parameters())

    family = FAMILIES[family]
    assert count(family.unet) == unet and count(family.vae) == 83_653_863
    assert [count(kind) for kind in family.text_encoders] == text_encoders


def test_sdxl_goes_the_same_way(small_sdxl, tmp_path, monkeypatch):
    monkeypatch.setattr(train_inversion_dpo, "main", None)  # its twin is to run
    trained = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kw: trained.append(0) or step(*args, **kw))
    methods = ["inversion_dpo", "published_inpo", "published_inversion_dpo"]
    record = run(tmp_path, "--model", "sdxl", "--mixed_precision", "bf16", "--resolution", "16", "--methods", *methods)
    assert list(record["figures"]) == methods and len(trained) == 3 * len(methods)
    _, num_steps = trajectory_steps("--objective", "inversion_dpo")
    assert record["figures"]["inversion_dpo"]["reference_calls"] == num_steps + 1
    assert record["figures"]["published_inversion_dpo"]["policy_calls"] == 2 * NODES
    assert all(row["ratio_to_diffusion_dpo"] is None for row in record["figures"].values())
    assert "nan" not in benchmark.table(record["figures"])


@pytest.mark.parametrize(
    "options, name",
    [
        (["--model", "sd3"], "--model"),
        (["--resolution", "100"], "--resolution is 100"),
        (["--train_batch_size", "0"], "--train_batch_size"),
        (["--inversion_dpo_steps", "3"], "--inversion_dpo_steps"),
        (["--methods", "dpo"], "--methods"),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16 needs a GPU"),
        (["--output", "nowhere/figures.json"], "--output nowhere/figures.json"),
        (["--output", "README.md"], "--output README.md"),
    ],
)
def test_wrong_options_end_with_2_and_one_line(options, name, capsys, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    with pytest.raises(SystemExit) as ended:
        benchmark.main(*benchmark.parse_args(options))
    assert ended.value.code == 2 and name in capsys.readouterr().err.splitlines()[-1]


def test_reading_is_measured_on_drawn_pictures_and_on_pairs_of_one_s_own(tmp_path, pairs_dir, capsys):
    for options in (["--image_size", "64"], ["--train_data_dir", str(pairs_dir), "--random_flip"]):
        output = tmp_path / f"{len(options)}.json"
        small = ["--resolution", "32", "--num_workers", "0", "--num_pairs", "4"]
        benchmark_input.main(*benchmark_input.parse_args([*small, *options, "--output", str(output)]))
        rate, parts = json.loads(output.read_text()).values()
        assert rate["0 workers"] > 0 and list(parts) == ["read", "decode", "resize and crop"]
        assert all(value > 0 for value in parts.values())
    with pytest.raises(SystemExit) as ended:
        benchmark_input.main(*benchmark_input.parse_args(["--train_data_dir", str(tmp_path / "nowhere")]))
    assert ended.value.code == 2 and "--train_data_dir" in capsys.readouterr().err.splitlines()[-1]

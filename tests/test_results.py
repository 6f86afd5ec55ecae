"""What a run leaves: validation pictures, report, model card, tracker entries."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from conftest import build_pipeline
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

import inversion_utils
from inversion_utils import (
    CONFIG_FILE,
    LORA_FILE,
    STATE_FILE,
    Validation,
    add_lora,
    base_license,
    command_line,
    decode_latents,
    draw_report,
    final_metrics,
    log_pictures,
    model_card,
)

DRAWING = {
    "validation_prompts": ["a red circle", "a blue square"], "validation_steps": 2, "num_validation_images": 2,
    "validation_inference_steps": 2,
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """Every picture that validation makes, as (title, rows of samples)."""
    pictures = []
    original = inversion_utils.draw_side_by_side

    def draw_side_by_side(title, rows, columns):
        pictures.append((title, rows))
        return original(title, rows, columns)

    monkeypatch.setattr(inversion_utils, "draw_side_by_side", draw_side_by_side)
    return pictures


def test_validation_does_not_disturb_training(train):
    """Bit for bit, with workers, accumulation and checkpointing; the pictures are there at 2, 4 and the end."""
    options = {
        "max_train_steps": 5, "random_flip": True, "random_crop": True, "objective": "diffusion_dpo",
        "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "checkpointing_steps": 3,
    }  # fmt: skip
    plain, watched = train("plain", **options), train("watched", **options, **DRAWING)
    for name in (LORA_FILE, f"checkpoint-3/{LORA_FILE}"):
        expected, got = load_file(plain / name), load_file(watched / name)
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert sorted(path.name for path in (watched / "validation").iterdir()) == [
        f"step-{step:06}-prompt-{i}.png" for step in (2, 4, 5) for i in (0, 1)
    ]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_pictures_show_the_base_and_the_lora_from_the_same_seeds(train, tiny_model, drawn, precision):
    """They are what the saved LoRA draws in a pipeline of the user's."""
    options = {"learning_rate": 1e-2, "mixed_precision": precision, "seed": 7, **DRAWING, "validation_steps": 100}
    output_dir = train(max_train_steps=3, **options)
    assert [title for title, _ in drawn] == DRAWING["validation_prompts"]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    for label in ("base model", "step 3"):
        if label == "step 3":
            pipe.load_lora_weights(output_dir)
        for title, rows in drawn:
            for i, sample in enumerate(rows[label]):
                expected = pipe(
                    title, height=32, width=32, num_inference_steps=2, generator=torch.Generator().manual_seed(7 + i)
                ).images[0]
                difference = np.asarray(sample, dtype=float) - np.asarray(expected, dtype=float)
                assert np.abs(difference).mean() < (0.1 if precision == "no" else 2)
                assert np.std(np.asarray(sample)) > 5  # not black
    changed = np.asarray(drawn[0][1]["base model"][0], float) - np.asarray(drawn[0][1]["step 3"][0], float)
    assert np.abs(changed).mean() > 4


def test_validation_puts_everything_back(tmp_path):
    pipe = build_pipeline()
    pipe.vae.to(torch.bfloat16)
    add_lora(pipe.unet, 4, 4)
    pipe.unet.train()
    before = {key: value.clone() for key, value in pipe.vae.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    sampling = {"height": 32, "width": 32, "num_inference_steps": 1}
    validation = Validation(pipe, tmp_path, ["x"], 1, 0, sampling, torch.no_grad, pytest.fail)
    pipe.scheduler.step = lambda *args, step=pipe.scheduler.step, **options: torch.rand(1) and step(*args, **options)
    validation.draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.unet.training and all(p.requires_grad for name, p in pipe.unet.named_parameters() if "lora_" in name)
    assert pipe.vae.dtype == torch.bfloat16
    assert all(torch.equal(value, before[key]) for key, value in pipe.vae.state_dict().items())


def test_pictures_that_fail_leave_no_trace_and_do_not_end_the_run(train, monkeypatch, caplog):
    """Out of memory is likeliest here: what was trained is saved, with its card, and the models are as they were."""
    calls, original = [], inversion_utils.decode_latents

    def decode_latents(vae, latents):
        calls.append(vae)
        if len(calls) == 2:  # after the base model's sample, while the LoRA's is drawn
            raise torch.OutOfMemoryError("out of memory")
        return original(vae, latents)

    options = {"max_train_steps": 4, "validation_prompts": ["x"], "num_validation_images": 1, "validation_steps": 2}
    options["validation_inference_steps"] = 1
    plain = train("plain", max_train_steps=4)
    monkeypatch.setattr(inversion_utils, "decode_latents", decode_latents)
    watched = train("watched", **options)
    assert len(calls) == 3 and [file.name for file in (watched / "validation").iterdir()] == [
        "step-000004-prompt-0.png"
    ]
    assert any("no validation pictures at step 2" in record.getMessage() for record in caplog.records)
    for key, value in load_file(plain / LORA_FILE).items():
        assert torch.equal(load_file(watched / LORA_FILE)[key], value)
    assert (watched / "README.md").is_file()


def test_a_vae_that_overflows_in_half_precision_still_draws():
    vae = build_pipeline().vae.half()
    vae.decoder.conv_in.weight.data *= 3_000 / vae.decoder.conv_in.weight.abs().max()
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half() * 20
    with torch.no_grad():
        assert not vae.decode(latents / vae.config.scaling_factor).sample.isfinite().all()
        picture = decode_latents(vae, latents)
    assert picture.size == (32, 32) and np.std(np.asarray(picture)) > 1 and vae.dtype == torch.float16


def test_a_sample_that_is_not_finite_is_named_and_drawn_as_such(tmp_path, drawn):
    pipe, warnings = build_pipeline(), []
    add_lora(pipe.unet, 4, 4)
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    sampling = {"height": 32, "width": 32, "num_inference_steps": 1}
    files = Validation(pipe, tmp_path, ["x"], 2, 0, sampling, torch.no_grad, warnings.append).draw(1)
    assert drawn[0][1] == {"base model": [None, None], "step 1": [None, None]}
    assert "'x' is not finite" in warnings[0]
    assert (np.asarray(Image.open(files[0])) == 0xDD).mean() > 0.5


def metrics_of(steps):
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    return [
        {"step": i, **{name: 1.0 / i for name in names}, "policy_error": 0.1, "reference_error": 0.2}
        for i in range(1, steps + 1)
    ]


@pytest.mark.parametrize("steps", [1, 2, 100])
@pytest.mark.parametrize(("loss_type", "untrained"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 0.25)])
def test_the_report_draws_what_was_logged(tmp_path, monkeypatch, steps, loss_type, untrained):
    from matplotlib.figure import Figure

    figures = []
    original = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: figures.append(self) or original(self, *args, **kw)
    )
    metrics = metrics_of(steps)
    metrics[-1]["loss"] = float("nan")
    draw_report(metrics, tmp_path / "report.png", "a run", loss_type)
    assert min(Image.open(tmp_path / "report.png").size) > 500
    lines = [line for axes in figures[0].axes for line in axes.lines]
    for key in metrics[0].keys() - {"step"}:
        values = [row[key] for row in metrics]
        assert any(np.array_equal(line.get_ydata(), values, equal_nan=True) for line in lines), key
    dotted = [line.get_ydata()[0] for line in figures[0].axes[0].lines if line.get_linestyle() == ":"]
    assert dotted == pytest.approx([untrained])


def test_final_metrics_are_means_over_the_last_finite_updates():
    metrics = metrics_of(40)
    metrics[-1]["loss"] = float("nan")
    assert final_metrics(metrics, 2)["loss"] == pytest.approx((1 / 39 + 1 / 38) / 2)
    counted = [{**row, "bad_steps": row["step"] // 20} for row in metrics]
    assert final_metrics(counted, 2)["bad_steps"] == 2  # of all 40, not a mean
    assert "step" not in final_metrics(metrics) and final_metrics([]) == {}


def test_a_resumed_run_reports_all_its_updates(train, tmp_path):
    options = {"report_to": "none", "checkpointing_steps": 2, "objective": "inpo"}
    train(max_train_steps=2, **options)
    output_dir = train(max_train_steps=4, resume_from_checkpoint="latest", **options)
    whole = train("whole", max_train_steps=4, **options)
    rows, expected = (
        json.loads((folder / "checkpoint-4" / STATE_FILE).read_text())["metrics"] for folder in (output_dir, whole)
    )
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows == expected
    records = [json.loads((folder / CONFIG_FILE).read_text()) for folder in (output_dir, whole)]
    assert records[0]["metrics"] == records[1]["metrics"] == final_metrics(rows)


def test_the_card_says_what_was_done(train, tiny_model, pairs_dir):
    output_dir = train(max_train_steps=2, **DRAWING)
    card = ModelCard.load(output_dir / "README.md")
    assert card.data.tags == ["lora", "diffusers", "text-to-image", "dpo", "inversion-dpo", "template:sd-lora"]
    assert card.data.base_model is None  # a local folder is no Hub id
    assert [entry["text"] for entry in card.data.widget] == DRAWING["validation_prompts"]
    assert all((output_dir / entry["output"]["url"]).is_file() for entry in card.data.widget)
    assert f"a local model, `{tiny_model.name}`" in card.text and f"a local folder, `{pairs_dir.name}`" in card.text
    for words in (
        "pairs 8, ties left out 0, captions cut 0", "2 updates of 2 pairs",
        f"torch {torch.__version__}", "pipe.load_lora_weights(", "--max_train_steps 2", "## Limits",
        "Not known to the training script",
    ):  # fmt: skip
        assert words in card.text, words
    record = json.loads((output_dir / CONFIG_FILE).read_text())
    assert record["options"]["rank"] == 4 and record["updates"] == 2
    for name, value in record["metrics"].items():
        assert f"| `{name}` | {value:.4g} |" in card.text


RECORD = {
    "command": "train.py", "pipeline": "StableDiffusionPipeline", "updates": 1, "pairs_per_update": 1,
    "processes": 1, "mixed_precision": "no", "data": {"pairs": 1}, "metrics": {}, "versions": {},
    "options": {
        "pretrained_model_name_or_path": "somebody/model", "dataset_name": "somebody/pairs", "train_data_dir": None,
        "objective": "inpo", "output_dir": "out", "resolution": 512, "lora_target_modules": ["to_q"],
    },
}  # fmt: skip


def test_a_base_and_data_on_the_hub_are_linked_with_the_licence():
    license = {"license": "other", "license_name": "their-licence", "license_link": "LICENSE.md"}
    card = ModelCard(model_card(RECORD, {}, license, "me/lora"))
    assert card.data.base_model == "somebody/model" and card.data.datasets == ["somebody/pairs"]
    assert {key: card.data.get(key) for key in license} == license
    assert "https://huggingface.co/somebody/model" in card.text and "their-licence" in card.text
    assert "pipe.load_lora_weights('me/lora')" in card.text and "# lora" in card.text


def test_prompts_cannot_break_the_card():
    prompts = {"<b>a</b>\n---\n# x: [y](z)": "validation/a.png", "# b": "validation/c.png", "": "validation/b.png"}
    card = ModelCard(model_card({**RECORD, "command": "a.py '\n```\n# x'"}, prompts, {}, None))
    assert "\n````\na.py" in card.text and "\n# b" not in card.text
    assert [entry["text"] for entry in card.data.widget] == list(prompts)
    assert "&lt;b&gt;a&lt;/b&gt; ---" in card.text and "(empty prompt)" in card.text


def test_the_licence_of_a_local_base_is_read_from_its_card(tmp_path):
    assert base_license(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\nA model.\n")
    assert base_license(str(tmp_path)) == {"license": "openrail++"}
    assert base_license("no/such-model") == {}


def test_the_command_line_hides_the_token():
    assert command_line(["a.py", "--hub_token", "hf_x", "--rank", "4"]) == "a.py --hub_token ... --rank 4"
    assert command_line(["a.py", "--hub_token=hf_x", "two words"]) == "a.py --hub_token=... 'two words'"


def test_trackers_keep_options_and_pictures(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output_dir = train(max_train_steps=2, **{**DRAWING, "report_to": "tensorboard"})
    events = EventAccumulator(str(output_dir / "logs" / "inversion-dpo"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("validation/prompt-1")] == [2]
    hparams = next((output_dir / "logs" / "inversion-dpo").rglob("hparams.yml")).read_text()
    assert "learning_rate: 0.0001" in hparams and "validation_prompts" in hparams


def test_pictures_reach_wandb_as_accelerate_wants_them(tmp_path):
    class Tracker:
        def __init__(self, name):
            self.name, self.seen = name, []

        def log_images(self, values, step):
            self.seen.append((values, step))

    trackers = [Tracker("wandb"), Tracker("another")]
    Image.new("RGB", (3, 2), "red").save(tmp_path / "step-000002-prompt-0.png")
    log_pictures(type("Accelerator", (), {"trackers": trackers}), [tmp_path / "step-000002-prompt-0.png"], 2)
    ((values, step),) = trackers[0].seen
    assert step == 2 and values["validation/prompt-0"][0].shape == (2, 3, 3) and trackers[1].seen == []


def test_progress_is_told(train, caplog):
    with caplog.at_level(logging.INFO):
        output_dir = train(max_train_steps=1)
    assert any(f"Saved {output_dir / LORA_FILE}" in record.getMessage() for record in caplog.records)

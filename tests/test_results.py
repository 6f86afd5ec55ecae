"""What a run leaves: metrics, validation pictures, model card, configuration, tracker entries."""

import argparse
import json
import math
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import assert_same, build_pipeline, command_line, logged, lora
from diffusers import AutoencoderKL, StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

import train_inversion_dpo
from training_utils import KOHYA_FILE, NOT_REPEATED, Validation, add_lora, model_card

PROMPTS = ["a red circle", "a blue <b>square</b>\n# not a heading"]
DRAWING = {
    "validation_prompts": PROMPTS, "validation_steps": 2, "num_validation_images": 2, "validation_inference_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def argv(tiny_model, pairs_dir, tmp_path_factory):
    return command_line(
        pretrained_model_name_or_path=tiny_model, train_data_dir=pairs_dir, resolution=32, train_batch_size=2, rank=4,
        output_dir=tmp_path_factory.mktemp("results") / "taste", max_train_steps=3, learning_rate=1e-2, seed=7,
        lr_scheduler="linear", **DRAWING,
    )  # fmt: skip


@pytest.fixture(scope="module")
def output_dir(argv):
    """The folder of a run of three steps with validation at the second and at the end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_inversion_dpo.py", *argv])
        train_inversion_dpo.main(*train_inversion_dpo.parse_args())
    assert handlers == {number: signal.getsignal(number) for number in handlers}
    return Path(train_inversion_dpo.parse_args(argv)[0].output_dir)


def picture(output_dir, step, prompt):
    """Columns of samples (columns, rows * 32, 32, 3), such as the base model's and the LoRA's."""
    file = output_dir / "validation" / f"step-{step:06}-prompt-{prompt}.png"
    pixels = np.asarray(Image.open(file), dtype=float)[-2 * 32 :]  # labels stand above
    return np.stack(np.split(pixels, pixels.shape[1] // 32, axis=1))


def test_the_folder_holds_these_and_nothing_half_written(output_dir):
    names = {"README.md", "checkpoint-3", "logs", "metrics.jsonl", "pytorch_lora_weights.safetensors"}
    assert {path.name for path in output_dir.iterdir()} == names | {"training_config.json", "validation", ".lock"}
    files = {f"step-{step:06}-prompt-{i}.png" for step in (2, 3) for i in (0, 1)}
    assert {path.name for path in (output_dir / "validation").iterdir()} == files
    assert not list(output_dir.rglob("*partial*"))


def test_metrics_are_a_line_a_step(output_dir):
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(set(row) == {
        "step", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "policy_error", "reference_error", "grad_norm", "lr", "bad_steps",
    } for row in rows)  # fmt: skip
    assert [row["lr"] for row in rows] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert rows[0]["policy_error"] == pytest.approx(rows[0]["reference_error"], rel=1e-5)
    for row in rows:
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5)


def test_pictures_show_the_base_and_the_lora_from_the_same_seeds(output_dir, tiny_model):
    """They are what the saved LoRA draws in a pipeline of the user's."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    for column in (0, 1):
        for i, prompt in enumerate(PROMPTS):
            samples = [
                pipe(prompt, height=32, width=32, num_inference_steps=2, generator=torch.Generator().manual_seed(seed))
                for seed in (7, 8)
            ]
            expected = np.concatenate([np.asarray(sample.images[0], dtype=float) for sample in samples])
            assert np.abs(picture(output_dir, 3, i)[column] - expected).mean() < 0.1 and expected.std() > 5
        pipe.load_lora_weights(output_dir)
    base, with_lora = picture(output_dir, 3, 0)
    assert np.abs(base - with_lora).mean() > 4
    assert np.array_equal(picture(output_dir, 2, 0)[0], base)


def test_trackers_get_metrics_options_and_pictures(output_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "logs" / "inversion-dpo"), size_guidance={"images": 0}).Reload()
    for name in ("loss", "lr", "rewards/margins", "bad_steps"):
        assert [x.value for x in events.Scalars(name)] == pytest.approx(logged(output_dir, name), rel=1e-5)
    assert [image.step for image in events.Images("validation/prompt-1")] == [2, 3]
    hparams = next((output_dir / "logs" / "inversion-dpo").rglob("hparams.yml")).read_text()
    assert "learning_rate: 0.01" in hparams and "validation_prompts" in hparams


def test_the_configuration_says_how_the_run_is_repeated(output_dir, argv):
    record = json.loads((output_dir / "training_config.json").read_text())
    options = {k: v for k, v in vars(train_inversion_dpo.parse_args(argv)[0]).items() if k not in NOT_REPEATED}
    assert record["options"] == options and "output_dir" not in options
    assert record["steps"] == 3 and record["pairs_per_step"] == 2 and record["data"]["pairs"] == 8
    assert record["versions"]["torch"] == torch.__version__
    assert record["metrics"]["loss"] == pytest.approx(np.mean(logged(output_dir, "loss")))


def test_the_card_says_what_was_done(output_dir, tiny_model, pairs_dir):
    card = ModelCard.load(output_dir / "README.md")
    assert {"lora", "diffusers", "text-to-image", "dpo", "template:sd-lora"} <= set(card.data.tags)
    assert card.data.base_model is None  # a local folder is no Hub id
    assert [entry["text"] for entry in card.data.widget] == PROMPTS
    assert all((output_dir / entry["output"]["url"]).is_file() for entry in card.data.widget)
    assert f"`{tiny_model.name}`" in card.text and f"`{pairs_dir.name}`" in card.text
    assert "# taste" in card.text and "3 steps of 2 pairs" in card.text and "--max_train_steps 3" in card.text
    assert "TO" + "DO" not in card.text and "\n# not" not in card.text.split("```")[0]
    snippet = card.text.split("```python\n")[1].split("```")[0]
    assert "import StableDiffusionPipeline\n" in snippet
    names = {}
    snippet = snippet.replace(f"path/to/{tiny_model.name}", str(tiny_model)).replace('"cuda"', '"cpu"')
    exec(snippet.replace("path/to/this/folder", str(output_dir)), names)
    assert names["pipe"].get_active_adapters() == ["aligned"]


RECORD = {
    "command": "train.py", "pipeline": "StableDiffusionXLPipeline", "steps": 1, "pairs_per_step": 1, "rank": 4,
    "processes": 1, "mixed_precision": "no", "data": {"pairs": 1}, "metrics": {}, "versions": {},
    "options": {
        "pretrained_model_name_or_path": "somebody/model", "dataset_name": "somebody/pairs", "train_data_dir": None,
        "objective": "inpo", "resolution": 512, "validation_lora_scales": [0.0, 0.7],
        "output_kohya_format": True, "lora_init": "somebody/lora", "reference": "init",
        "prediction_type": "v_prediction",
    },
}  # fmt: skip


def test_a_base_and_data_on_the_hub_are_linked():
    card = ModelCard(model_card(RECORD, "out", {}, "me/lora"))
    assert card.data.base_model == "somebody/model" and card.data.datasets == ["somebody/pairs"]
    assert (
        "pipe.load_lora_weights('me/lora', " in card.text and f"`{KOHYA_FILE}`" in card.text and "# lora" in card.text
    )
    assert "import StableDiffusionXLPipeline\n" in card.text
    assert "pipe.scheduler.register_to_config(prediction_type='v_prediction')\n" in card.text


def test_prompts_and_commands_cannot_break_the_card():
    prompts = {"<b>a</b>\n---\n# x: [y](z)": "validation/a.png", "# b": "validation/c.png", "": "validation/b.png"}
    card = ModelCard(model_card({**RECORD, "command": "a.py '\n```\n# x'"}, "out", prompts, None))
    assert "\n````\na.py" in card.text and "\n# b" not in card.text
    assert [entry["text"] for entry in card.data.widget] == list(prompts)
    assert card.text.count("![base model, LoRA 0.7]") == 3
    assert "&lt;b&gt;a&lt;/b&gt; ---" in card.text and "(empty prompt)" in card.text


def test_a_resumed_run_reports_all_its_steps_once(train):
    """Also those that a killed run took beyond its last checkpoint, whose last line may be cut short."""
    options = {"objective": "inpo", "inversion_steps": 1, "checkpointing_steps": 2}
    whole = train("whole", max_train_steps=4, **options)
    output_dir = train(max_train_steps=2, **options)
    with (output_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 9.0}) + "\n" + '{"step": 4, "lo')
    train(max_train_steps=4, resume_from_checkpoint="latest", **options)
    assert (output_dir / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    records = [json.loads((folder / "training_config.json").read_text()) for folder in (output_dir, whole)]
    assert records[0]["metrics"] == records[1]["metrics"]


def test_validation_does_not_disturb_training(train):
    """Bit for bit, with accumulation and checkpointing, whatever random numbers the sampling takes."""
    options = {
        "max_train_steps": 3, "random_flip": True, "objective": "diffusion_dpo", "checkpointing_steps": 1,
        "gradient_checkpointing": True, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    plain, watched = train("plain", **options), train("watched", **options, **DRAWING)
    for folder in ("checkpoint-3", "."):
        assert_same(lora(watched / folder), lora(plain / folder))
    state = "checkpoint-3/random_states_0.pkl"
    assert (plain / state).read_bytes() == (watched / state).read_bytes()


def validation_of(pipe, folder, warnings):
    add_lora(pipe.unet, 4)
    args = argparse.Namespace(
        output_dir=folder, validation_prompts=["x"], seed=0, num_validation_images=2, resolution=32,
        validation_lora_scales=[0.0, 0.5], validation_inference_steps=1, validation_guidance_scale=7.5,
    )  # fmt: skip
    return Validation(pipe, "unet", args, torch.no_grad, warnings.append)


def test_validation_puts_everything_back(tmp_path):
    pipe, warnings = build_pipeline(), []
    validation = validation_of(pipe, tmp_path, warnings)
    pipe.unet.train()
    before = {key: value.clone() for part in (pipe.unet, pipe.vae) for key, value in part.state_dict().items()}
    scales = [module.scaling["default"] for module in pipe.unet.modules() if hasattr(module, "lora_A")]
    step, state = pipe.scheduler.step, torch.get_rng_state()
    pipe.scheduler.step = lambda *args, **options: torch.rand(1) and step(*args, **options)  # as ancestral ones do
    assert [file.is_file() for file in validation.sample(1)] == [True] and not warnings
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.unet.training and all(p.requires_grad for name, p in pipe.unet.named_parameters() if "lora_" in name)
    after = {key: value for part in (pipe.unet, pipe.vae) for key, value in part.state_dict().items()}
    assert_same(after, before)
    assert scales == [module.scaling["default"] for module in pipe.unet.modules() if hasattr(module, "lora_A")]


def test_a_sample_that_is_not_finite_is_named(tmp_path):
    pipe, warnings = build_pipeline(), []
    validation = validation_of(pipe, tmp_path, warnings)
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    assert validation.sample(1)[0].is_file() and "'x' is not finite" in warnings[0]


def test_validation_that_fails_costs_nothing_else(train, monkeypatch, caplog):
    """Out of memory is likeliest here, for the LoRA's samples at step 2. What was trained goes on and is saved."""
    calls, decode = [], AutoencoderKL.decode

    def fails_once(vae, latents):
        calls.append(latents)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("out of memory")
        return decode(vae, latents)

    plain = train("plain", max_train_steps=3)
    monkeypatch.setattr(AutoencoderKL, "decode", fails_once)
    watched = train("watched", max_train_steps=3, **DRAWING)
    assert {path.name[:11] for path in (watched / "validation").iterdir()} == {"step-000003"}
    assert any("out of memory" in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert_same(lora(watched), lora(plain))
    assert ModelCard.load(watched / "README.md").data.widget

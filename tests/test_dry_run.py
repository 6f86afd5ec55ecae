"""What a dry run reports, leaves alone, and costs; and what the data options do to the training itself."""

import json
import subprocess

import numpy as np
import pytest
import torch
from conftest import encode, pair_rows, random_image, write_parquet
from datasets import Dataset
from PIL import Image as PILImage
from test_train_inversion_dpo import ONE_THREAD, assert_same, launch, lora

from inversion_utils import (
    CONTACT_SHEET_FILE,
    DRY_RUN_FILE,
    LORA_FILE,
    PairColumns,
    PreferenceDataset,
    PreferencePairs,
    Source,
    exceeds,
    inspect_pairs,
    inversion_nodes,
    reconstruction_errors,
    sample_back,
)


class Words:
    """A tokenizer that reads three words and adds a begin and an end."""

    model_max_length = 5

    def __call__(self, caption, verbose):
        return type("Tokens", (), {"input_ids": [0, *caption.split(), 0]})


def inspect(rows, columns=None, **options):
    pairs = PreferencePairs(Source(Dataset.from_list(rows), "."), columns or PairColumns())
    return inspect_pairs(PreferenceDataset(pairs, 32, 1, 0, False, False, 0.0), [Words()], 0.1, **options)


def test_a_dry_run_reports_and_leaves_nothing_but_its_report(train, tmp_path, capsys):
    """Trackers, checkpoints, LoRA, pictures and Hub are left alone, and the real run may follow in the same folder."""
    rows = pair_rows(8)
    rows[3]["jpg_0"] = b"damaged"
    data = write_parquet(rows, tmp_path / "data")
    options = {"train_data_dir": data, "max_train_steps": 40, "checkpointing_steps": 1, "report_to": "tensorboard"}
    output_dir = train(**options, dry_run=True, validation_prompts=["a cat"], push_to_hub=True, max_bad_fraction=0.5)
    assert sorted(file.name for file in output_dir.iterdir()) == [DRY_RUN_FILE, CONTACT_SHEET_FILE]
    report = json.loads((output_dir / DRY_RUN_FILE).read_text())
    assert report["data"]["rows"] == {"pairs": 8, "ties left out": 0}
    assert report["data"]["of these unusable"] == {"unreadable image": 1}
    assert report["training"]["updates"] == 40 and report["training"]["trainable parameters"] == 10752
    assert 0 < report["training"]["seconds an update"] * 40 == pytest.approx(report["training"]["hours"] * 3600)
    (errors,) = report["inversion"].values()
    assert list(errors) == ["0..249", "250..499", "500..749", "750..999"] and all(0 < e < 100 for e in errors.values())
    printed = capsys.readouterr().out
    assert printed.count("pairs looked at: 8 of 8") == 1 and "unreadable image: 1" in printed
    with PILImage.open(output_dir / CONTACT_SHEET_FILE) as sheet:
        colors = np.asarray(sheet.convert("RGB"))
    assert (colors == (16, 112, 16)).all(2).sum() > 100 < (colors == (176, 16, 16)).all(2).sum()
    assert (train(**options, max_bad_fraction=0.5) / LORA_FILE).exists()


def test_a_dry_run_of_a_resumed_run_and_of_the_baseline(train):
    output_dir = train(max_train_steps=2, objective="diffusion_dpo")
    before = lora(output_dir)
    train(max_train_steps=30, objective="diffusion_dpo", resume_from_checkpoint="latest", dry_run=True)
    report = json.loads((output_dir / DRY_RUN_FILE).read_text())
    assert report["training"]["updates"] == 28 and "inversion" not in report
    assert_same(before, lora(output_dir))
    assert not (output_dir / "checkpoint-5").exists()


def test_a_dry_run_is_refused_where_the_run_would_be(refused, no_models, tmp_path):
    rows = [{**row, "caption": ""} for row in pair_rows(8)]
    assert "no pair is left" in refused(dry_run=True, train_data_dir=write_parquet(rows, tmp_path / "data"))


def test_the_report_counts_what_is_in_the_data():
    rng = np.random.default_rng(0)
    pictures = [encode(random_image(rng, (40, 80))) for _ in range(12)]
    captions = ["one", "a b c", "a b c d", "x", "y", "z"]
    rows = [
        {"jpg_0": pictures[2 * i], "jpg_1": pictures[2 * i + 1], "label_0": 1.0, "caption": captions[i]}
        for i in range(6)
    ]
    rows.append({**rows[0], "caption": "again"})
    rows.append({**rows[1], "label_0": 0.0})
    jpeg = encode(PILImage.fromarray(np.asarray(random_image(rng, (20, 20)))), "BMP")
    rows.append({"jpg_0": jpeg, "jpg_1": encode(PILImage.open(__import__("io").BytesIO(jpeg))), "label_0": 1.0,
                 "caption": "twice"})  # fmt: skip
    report = inspect(rows)
    assert report["pairs looked at"] == "9 of 9" and report["of these unusable"] == 0
    assert report["captions longer than what is read"] == "1 of 9 (over 5)"
    assert report["caption lengths in tokens"] == "3 to 6, half of them up to 3"
    assert report["widths in pixels"] == "20 to 40, half of them up to 40"
    assert report["images that are enlarged"] == "11.1%"
    assert report["share of an image that cropping discards"] == "44.4% on average"
    assert report["pairs of nearly the same image"] == 1
    assert report["pairs that occur again"] == 1
    assert report["pairs that occur again with winner and loser exchanged"] == 1
    assert report["image 0 is the winner"] == "88.9% of 9 pairs"
    assert inspect(rows, sample_size=4)["pairs looked at"] == "4 of 9"


def test_a_column_that_tells_the_winner_is_remarked():
    rows = [{**pair_rows(1, seed)[0], "label_0": 1.0} for seed in range(12)]
    assert inspect(rows)["image 0 is the winner"].startswith("100.0% of 12 pairs: its column tells who wins")
    columns = PairColumns(winner_column="jpg_0", loser_column="jpg_1")
    assert "image 0 is the winner" not in inspect(rows, columns)


def test_reconstruction_is_exact_for_a_model_that_is_and_not_for_one_that_guesses():
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square(), 0)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def gaussian(x_t, timesteps):
        """The score of standard normal data: noise is sigma x."""
        return (1 - alphas_cumprod[timesteps]).sqrt()[:, None, None, None] * x_t

    errors = reconstruction_errors(gaussian, latents, torch.arange(1000), alphas_cumprod, num_steps=8)
    assert len(errors) == 4 and max(errors.values()) < 0.02
    coarse = reconstruction_errors(gaussian, latents, torch.arange(1000), alphas_cumprod, num_steps=1, order=1)
    assert coarse["750..999"] > 10 * errors["750..999"]
    nodes = inversion_nodes(torch.tensor([[500]]), alphas_cumprod, 20)[0].unique().tolist()
    assert torch.allclose(sample_back(gaussian, latents, nodes, alphas_cumprod), latents, atol=0.01)


@pytest.mark.parametrize(
    ("bad", "fraction", "rows", "expected"),
    [(0, 0.0, 10, False), (1, 0.0, 10, True), (3, 0.1, 8, False), (4, 0.1, 10, False), (5, 0.1, 10, True),
     (10, 0.1, 100, False), (20, 0.1, 100, True), (100, 1.0, 100, False)],
)  # fmt: skip
def test_clearly_more_than_a_fraction(bad, fraction, rows, expected):
    assert exceeds(bad, fraction, rows) is expected


@pytest.mark.parametrize("streaming", [None, True], ids=["map", "stream"])
def test_too_many_unreadable_images_end_the_run_with_their_reasons(train, tmp_path, streaming):
    rows = pair_rows(40)
    for row in rows[::2]:
        row["jpg_1"] = b"damaged"
    rows[1]["jpg_0"] = rows[1]["jpg_1"]
    data = write_parquet(rows, tmp_path / "data")
    with pytest.raises(RuntimeError, match="--max_bad_fraction is 0.1, but .*[0-9]+ with unreadable image"):
        train(train_data_dir=data, max_train_steps=40, train_batch_size=4, streaming=streaming)
    assert not (tmp_path / "run" / LORA_FILE).exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_on_a_stream_goes_on_exactly(train, tmp_path, workers):
    """In a later epoch, in the midst of a block, with unusable rows, whatever the workers had read ahead."""
    rows = pair_rows(14)
    rows[4]["caption"] = " "
    rows[9]["jpg_0"] = rows[9]["jpg_0"][:60]
    data = write_parquet(rows, tmp_path / "data")
    options = {
        "train_data_dir": data, "streaming": True, "shuffle_buffer_size": 5, "random_crop": True,
        "dataloader_num_workers": workers, "train_batch_size": 3, "max_bad_fraction": 0.5,
    }  # fmt: skip
    whole = train("whole", max_train_steps=7, **options)
    train("stopped", max_train_steps=5, checkpointing_steps=5, **options)
    stopped = train("stopped", max_train_steps=7, resume_from_checkpoint="latest", **options)
    assert_same(lora(whole), lora(stopped))
    state = json.loads((stopped / "checkpoint-5" / "training_state.json").read_text())
    assert state["num_pairs"] is None and 10 <= state["stream"]["first_visit"] <= 15


def test_two_processes_on_a_stream_equal_one(train, tiny_model, tmp_path):
    data = write_parquet(pair_rows(11), tmp_path / "data")
    one = train("one", train_data_dir=data, train_batch_size=4, max_train_steps=4, streaming=True)
    options = ["--streaming", "--max_train_steps", "4"]
    done = subprocess.run(
        launch(tmp_path / "two", tiny_model, data, *options, processes=2),
        env=ONE_THREAD, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(lora(tmp_path / "two"), lora(one), atol=2e-6)


def test_a_stream_cannot_be_resumed_as_a_table(train, refused):
    train(streaming=True, max_train_steps=1)
    assert "the data have 8 pairs" in refused(max_train_steps=2, resume_from_checkpoint="latest")


def scored_rows(margin):
    return [
        {**row, "s0": margin * row["label_0"], "s1": margin * (1 - row["label_0"])}
        for row in pair_rows(8)
    ]  # fmt: skip


def test_a_weak_preference_moves_the_weights_less_and_a_certain_one_as_without(train, tmp_path):
    options = {"score_0_column": "s0", "score_1_column": "s1", "learning_rate": 1e-3, "max_train_steps": 3}
    data = {margin: write_parquet(scored_rows(margin), tmp_path / f"data{margin}") for margin in (0.01, 50)}
    plain = train("plain", train_data_dir=data[50], **options)
    options |= {"preference_strength": "margin", "preference_strength_scale": 2.0}
    certain = train("certain", train_data_dir=data[50], **options)
    assert_same(lora(plain), lora(certain))

    def grad_norm(output_dir):
        return json.loads((output_dir / "training_config.json").read_text())["metrics"]["grad_norm"]

    weak = train("weak", train_data_dir=data[0.01], **options)
    assert grad_norm(weak) < 0.05 * grad_norm(plain)


def test_soft_ties_are_trained_towards_no_preference(train, tmp_path):
    """A tie's loss is least at a margin of zero, where training begins: alone, ties leave the model where it is."""
    ties = [{**row, "label_0": 0.5} for row in pair_rows(8)]
    output_dir = train(
        train_data_dir=write_parquet(ties, tmp_path / "ties"), tie_policy="soft", learning_rate=1e-6,
        adam_weight_decay=0, max_train_steps=3,
    )  # fmt: skip
    record = json.loads((output_dir / "training_config.json").read_text())
    assert record["data"]["ties among them"] == 8
    assert record["metrics"]["rewards/accuracies"] == 0.5
    assert record["metrics"]["grad_norm"] < 1e-3

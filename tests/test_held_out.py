"""--num_eval_pairs: pairs kept out of training, on which the policy is watched."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import assert_same, encode, lora, pair_rows, write_parquet
from PIL import Image

import training_utils
from inversion_utils import Targets
from training_utils import METRICS_FILE, WINNER_LIMIT, HeldOut, read_metrics

QUICK = {"objective": "inpo", "inversion_steps": 1, "learning_rate": 1e-3}
EVAL = {"num_eval_pairs": 3, "eval_steps": 2, "max_train_steps": 4}


def evaluated(output_dir):
    return [row for row in read_metrics(output_dir / METRICS_FILE) if "eval/margins" in row]


@pytest.fixture
def held_out_rows(monkeypatch):
    """The rows that training and watching see, in two sets."""
    seen = {"train": set(), "eval": set()}
    collate = training_utils.collate

    def watched(examples, tokenizers):
        for example in examples:
            seen["eval" if example["key"][0] == 5 else "train"].add(example["row"])
        return collate(examples, tokenizers)

    monkeypatch.setattr(training_utils, "collate", watched)
    return seen


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("objective", ["inpo", "inversion_dpo", "diffusion_dpo"])
def test_held_out_pairs_are_watched_and_not_trained_on(train, held_out_rows, tmp_path, objective, cache):
    """At five timesteps each, whatever the objective; every metric starts at the reference and moves."""
    options = {"objective": objective, "learning_rate": 1e-3, **EVAL, "max_train_steps": 6}
    if cache:
        options["inversion_cache_dir"] = tmp_path / "cache"
    output_dir = train(**options)
    assert len(held_out_rows["eval"]) == 3 and len(held_out_rows["train"]) == 5
    assert not held_out_rows["eval"] & held_out_rows["train"]
    rows = evaluated(output_dir)
    assert [row["step"] for row in rows] == [2, 4, 6]
    bands = ["0-199", "200-399", "400-599", "600-799", "800-999"]
    for row in rows:
        names = {"margins", "accuracies", "winner_error", "loser_error"}
        names |= {f"{name}/{band}" for name in names for band in bands}
        assert {f"eval/{name}" for name in names} == {name for name in row if name.startswith("eval/")}
    assert rows[0]["eval/margins"] != 0 and abs(rows[0]["eval/winner_error"]) < 0.5
    assert json.loads((output_dir / "training_config.json").read_text())["metrics"]["eval/margins"] == pytest.approx(
        rows[-1]["eval/margins"]
    )


def test_watching_changes_nothing_else_and_is_the_same_for_any_batch_size(train, tmp_path):
    rows = pair_rows(8)
    rest = np.sort(np.random.default_rng(0).permutation(8)[3:])
    plain = train(
        "plain", train_data_dir=write_parquet([rows[i] for i in rest], tmp_path / "rest"), max_train_steps=4, **QUICK
    )
    data = write_parquet(rows, tmp_path / "all")
    watched = train("watched", train_data_dir=data, **QUICK, **EVAL)
    assert_same(lora(watched), lora(plain))
    parts = train("parts", train_data_dir=data, train_batch_size=1, gradient_accumulation_steps=2, **QUICK, **EVAL)
    for one, other in zip(evaluated(watched), evaluated(parts), strict=True):
        for name in (name for name in one if name.startswith("eval/")):
            assert one[name] == pytest.approx(other[name], abs=1e-4), name


def test_with_a_cache_the_same_is_measured(train, tmp_path):
    """Held-out pairs are not in the cache: they are inverted at the start of each run."""
    options = {**QUICK, **EVAL, "inversion_cache_dir": tmp_path / "cache"}
    first, again = train("first", **options), train("again", **options)
    assert evaluated(again) == evaluated(first) and len(evaluated(first)) == 2
    assert_same(lora(again), lora(first))


def test_a_resumed_run_measures_the_same(train):
    options = {**QUICK, **EVAL, "checkpointing_steps": 1}
    whole = train("whole", **options)
    train("broken", **{**options, "max_train_steps": 3})
    broken = train("broken", **options, resume_from_checkpoint="latest")
    assert_same(lora(broken), lora(whole))
    assert evaluated(broken)[-1] == evaluated(whole)[-1]


def targets_of(reference_error):
    """Targets of M timesteps and B pairs with these reference errors (M, 2B)."""
    n = reference_error.shape[1]
    return Targets(
        torch.zeros(n, 1, 1, 1), torch.zeros_like(reference_error).long(), None, reference_error,
        torch.ones(n, dtype=torch.bool), torch.ones(n // 2), torch.zeros(n // 2, dtype=torch.bool), {},
    )  # fmt: skip


def test_the_metrics_worked_by_hand():
    """Two bands, two pairs in two batches: winners at 1 and 2, losers at 4, by the reference."""
    held_out = HeldOut([targets_of(torch.tensor([[1.0, 4.0], [2.0, 4.0]]))] * 2, ["low", "high"], 10.0)
    tie = targets_of(torch.tensor([[1.0, 4.0], [2.0, 4.0]]))
    tie = tie._replace(is_tie=torch.tensor([True]), usable=torch.tensor([True, True]))
    overflown = tie._replace(usable=torch.tensor([False, False]))
    policy = iter([torch.tensor([[0.5, 4.0], [2.0, 5.0]]), torch.tensor([[1.5, 4.0], [2.0, 4.0]])])
    logs = held_out.measure(Accelerator(cpu=True), lambda targets: next(policy))
    margins = 5 * torch.tensor([0.5, 1.0, -0.5, 0.0])
    assert logs["eval/margins"] == pytest.approx(margins.mean().item())
    assert logs["eval/accuracies"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert logs["eval/winner_error"] == pytest.approx((0.5 + 1.5 + 2 + 2) / 6 - 1)
    assert logs["eval/loser_error"] == pytest.approx(17 / 16 - 1)
    assert logs["eval/margins/low"] == pytest.approx(0) and logs["eval/margins/high"] == pytest.approx(2.5)
    assert (logs["eval/accuracies/low"], logs["eval/accuracies/high"]) == (0.5, 0.75)
    assert logs["eval/winner_error/low"] == pytest.approx(0) and logs["eval/loser_error/high"] == pytest.approx(1 / 8)
    held_out.batches = [tie, overflown]
    logs = held_out.measure(Accelerator(cpu=True), lambda targets: targets.reference_error - torch.tensor([0.5, 0]))
    assert logs["eval/accuracies"] == 0.5 and logs["eval/margins"] == 2.5  # which is neither won nor counted


def logs_of(margin, winner, loser=0.1):
    return {"eval/margins": margin, "eval/winner_error": winner, "eval/loser_error": loser}


def test_decay_and_standing_still_are_named_once():
    held_out = HeldOut([], [], 1.0)
    assert held_out.note(logs_of(1.0, WINNER_LIMIT / 2), 10) == held_out.note(logs_of(1.0, 0.5, -0.1), 15) == ""
    line = held_out.note(logs_of(1.0, 0.5), 20)
    assert line.startswith("step 20: ") and "+50.0%" in line and "--beta_dpo" in line
    assert held_out.note(logs_of(1.0, 0.6), 30) == ""
    still = logs_of(0.0, 1e-6, -1e-6)
    assert "has not moved" in held_out.note(still, 40) and held_out.note(still, 50) == ""


HELD_OUT = np.sort(np.random.default_rng(0).permutation(8)[:3])


@pytest.mark.parametrize("cache", [False, True])
def test_broken_held_out_rows_are_left_out_and_counted(train, refused, script, tmp_path, monkeypatch, cache):
    seen = []
    monkeypatch.setattr(
        training_utils, "HeldOut", lambda targets, *rest: seen.extend(targets) or HeldOut(targets, *rest)
    )
    options = {**QUICK, **EVAL, "train_batch_size": 3}
    options |= {"inversion_cache_dir": tmp_path / "cache"} if cache else {}
    rows = pair_rows(8)
    rows[HELD_OUT[0]]["jpg_0"] = b"damaged"
    output_dir = train(train_data_dir=write_parquet(rows, tmp_path / "data"), **options)
    assert json.loads((output_dir / "training_config.json").read_text())["data"]["rows skipped"] == 1
    assert sum(int(targets.usable.sum()) for targets in seen) == 2 * 2  # images
    for i in HELD_OUT:
        rows[i]["jpg_0"] = b"damaged"
    message = refused(output="empty", train_data_dir=write_parquet(rows, tmp_path / "none"), **options)
    assert "3 held-out rows" in message


@pytest.mark.parametrize("cache", [False, True])
def test_held_out_pairs_that_overflow(train, script, tmp_path, monkeypatch, cache):
    rows, encode_images = pair_rows(8), training_utils.encode_images

    def overflow(vae, pixels, *rest):
        latents = encode_images(vae, pixels, *rest)
        latents[(pixels.flatten(1) == 1).all(1)] = float("inf")
        return latents

    monkeypatch.setattr(training_utils, "encode_images", overflow)
    for i in HELD_OUT:
        rows[i] |= {"jpg_0": encode(Image.new("RGB", (32, 32), "white"))}
    options = {"inversion_cache_dir": tmp_path / "cache"} if cache else {}
    with pytest.raises(RuntimeError, match="no held-out pair can be used"):
        train(train_data_dir=write_parquet(rows, tmp_path / "data"), **QUICK, **EVAL, **options)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"objective": "inpo", "inversion_steps": 2}, {(1, 2), (5, 6)}),  # as many free nodes for five targets
        ({"timesteps_per_pair": 8}, {(8, 12), (5, 12)}),
        ({"timesteps_per_pair": 6, "timesteps_subset": list(range(9, 999, 150))}, {(6, 6), (5, 5)}),  # targets only
    ],
)  # fmt: skip
def test_held_out_pairs_are_inverted_at_least_as_exactly(train, script, monkeypatch, options, calls):
    seen, invert = set(), script.invert

    def watched(predict, latents, timesteps, alphas_cumprod, steps, **how):
        seen.add((len(timesteps), steps))
        return invert(predict, latents, timesteps, alphas_cumprod, steps, **how)

    monkeypatch.setattr(script, "invert", watched)
    train(**{"objective": "inversion_dpo", **options}, **EVAL | {"max_train_steps": 1})
    assert seen == calls


@pytest.mark.parametrize("cache", [False, True])
def test_a_held_out_pair_whose_inversion_overflows_is_left_out(train, script, tmp_path, monkeypatch, cache):
    invert = script.invert

    def overflow(predict, latents, *rest, **options):
        trajectory = invert(predict, latents, *rest, **options)
        if len(trajectory.noise) == 5:  # of held-out pairs
            trajectory.noise[0, 0] = float("inf")
        return trajectory

    monkeypatch.setattr(script, "invert", overflow)
    options = {"inversion_cache_dir": tmp_path / "cache"} if cache else {}
    output_dir = train(**QUICK, **EVAL, **options, train_batch_size=3)
    assert all(np.isfinite(list(row.values())).all() for row in evaluated(output_dir))
    assert json.loads((output_dir / "training_config.json").read_text())["data"]["rows skipped"] == 1


@pytest.mark.parametrize("options", [{"num_eval_pairs": 8}, {"num_eval_pairs": -1}])
def test_what_is_refused(refused, no_models, options):
    assert f"--{next(iter(options))}" in refused(**options)

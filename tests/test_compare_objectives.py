"""The comparison at equal damage: its arithmetic by hand, and one run from training to the plots."""

import csv

import compare_objectives
import pytest
import torch
from compare_objectives import Setting, best_gain, cost_of, gain_within
from test_small_world import MODEL


@pytest.mark.parametrize(
    ("points", "limit", "gain"),
    [
        ([], 0.05, 0.0),
        ([(0.5, 0.04, 1.02), (1.0, 0.08, 1.04)], 0.05, 0.08),  # never that much damage
        ([(1.0, 0.08, 1.10)], 0.05, 0.04),  # halfway from the base model
        ([(1.0, 0.08, 1.06), (0.5, 0.05, 1.02)], 0.04, 0.065),  # halfway between two scales, whatever their order
        ([(0.5, 0.05, 0.98), (1.0, 0.03, 1.04)], 0.05, 0.05),  # the best on the way
        ([(0.5, 0.04, 1.10), (1.0, 0.20, 1.01)], 0.05, 0.02),  # what lies beyond a crossing does not count
    ],
)  # fmt: skip
def test_gain_within_a_damage_by_hand(points, limit, gain):
    assert gain_within(points, limit) == pytest.approx(gain)


def test_gains_that_are_bounds_or_interpolated_from_the_base_are_marked():
    def run(*lengths):
        """Gain and damage at scales 0.5 and 1, for each length of training."""
        return [
            {"scale": scale, "step": step, "gain": gain, "damage": damage, "seconds": 1.0, "calls": 1}
            for step, points in enumerate(lengths) for scale, (gain, damage) in zip((0.5, 1), points, strict=True)
        ]  # fmt: skip

    below, across, beyond = [(0.1, 1.01), (0.2, 1.04)], [(0.2, 1.01), (0.4, 1.1)], [(0.5, 1.06), (0.9, 1.2)]
    low_across = [(0.02, 1.01), (0.04, 1.1)]
    for mark, runs in {
        "> ": [run(below), run(across)], "": [run(across), run(below, across), run(low_across, across)],
        "~ ": [run(across), run(low_across, beyond)], "> ~ ": [run(below), run(beyond)],
    }.items():  # fmt: skip
        assert compare_objectives.mark_of(runs, 0.05) == mark


def rows_of(*lengths):
    """Rows of a run: (step, seconds, calls, gain) at scale 1, without damage."""
    names = ("step", "seconds", "calls", "gain")
    return [{**dict(zip(names, values, strict=True)), "scale": 1.0, "damage": 1.0} for values in lengths]


def test_the_cost_of_a_gain_by_hand():
    rows = rows_of((10, 4.0, 100, 0.02), (20, 8.0, 200, 0.01), (30, 12.0, 300, 0.05))
    assert best_gain(rows) == 0.05
    assert cost_of(rows, 0.01) == pytest.approx((2.0, 50))
    assert cost_of(rows, 0.03) == pytest.approx((10.0, 250))  # a gain that was lost meanwhile does not help
    assert cost_of(rows, 0.06) is None


def test_a_run_from_training_to_the_plots(tmp_path):
    """Without tuning; finals are cached, too; the same command does nothing again."""
    argv = [
        "--model", MODEL, "--output_dir", str(tmp_path), "--preferences", "area", "--methods", "diffusion_dpo",
        "published_inpo", "--bands", "0", "--learning_rates", "1e-2", "--betas", "500", "--draws", "1", "--rungs",
        "--lengths", "4", "2", "--scales", "1", "--seeds", "3", "--num_pairs", "8", "--train_batch_size", "2",
        "--num_images", "2", "--workers", "1",
    ]  # fmt: skip
    parsed = compare_objectives.parse_args(argv)
    compare_objectives.main(*parsed)
    with (tmp_path / "runs.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == compare_objectives.COLUMNS
    assert len(rows) == 3 * 2
    costs = {
        (r["method"], r["draws"], r["step"]): (float(r["calls"]), float(r["seconds"]))
        for r in rows
    }  # fmt: skip
    # Latents: a batch of 4, with gradient twice, and one forward by the reference, which the cache takes once a pair
    assert [costs["diffusion_dpo", "0", step][0] for step in "24"] == [24, 48]
    assert costs["diffusion_dpo", "1", "2"][0] == 24 and 32 + 8 < costs["diffusion_dpo", "1", "4"][0] <= 48
    # The same, and five forwards more for the inversion
    assert [costs["published_inpo", "0", step][0] for step in "24"] == [2 * 4 * 8, 4 * 4 * 8]
    assert 0 < costs["diffusion_dpo", "0", "2"][1] < costs["diffusion_dpo", "0", "4"][1]
    for name in ("table.md", "frontier.png", "time.png"):
        assert (tmp_path / name).stat().st_size > 100
    assert not list((tmp_path / "work").glob("final-*"))
    compare_objectives.main(*parsed)
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == len(rows) + 1
    for wrong in (["--num_images", "5"], ["--betas", "1", "2"], ["--methods", "published_inpo", "--bands", "300"]):
        with pytest.raises(SystemExit):
            compare_objectives.main(*compare_objectives.parse_args([*argv, *wrong]))


def test_the_best_settings_and_bands_go_on(tmp_path, monkeypatch):
    """The widest band and the best of the others; of their settings the best, for every seed and from every cache."""

    def run(self, jobs):
        for stage, preference, seed, setting, lengths, scales in jobs:
            if stage == "tune" and setting.beta == 250:
                continue  # it failed
            gain = setting.learning_rate + setting.beta / 1e4 + (setting.band == 300)
            row = dict(stage=stage, preference=preference, seed=seed, **setting._asdict(), steps=lengths[-1])
            judged = dict(gain=gain, damage=1.0, distance_ratio=1.0, seconds=1.0, calls=2)
            self.rows.setdefault((stage, preference, seed, setting, lengths[-1]), []).extend(
                {**row, "step": length, "scale": scale, **judged} for length in lengths for scale in scales
            )
        done.append(jobs)
        return sum(job[0] == "tune" and job[3].beta == 250 for job in jobs)

    done = []
    monkeypatch.setattr(compare_objectives, "prepare", lambda args: None)
    monkeypatch.setattr(compare_objectives.Runs, "run", run)
    argv = [
        "--model", "m", "--output_dir", str(tmp_path), "--preferences", "tone", "--methods", "inpo",
        "diffusers_script", "--learning_rates", "0.1", "0.3", "0.2", "--draws", "4", "--seeds", "0", "1",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="9 runs failed"):
        compare_objectives.main(*compare_objectives.parse_args(argv))
    assert [len(jobs) for jobs in done] == [3 * 9 + 3, 3 * 2 + 1, 2 * (3 + 2)]
    assert {job[3] for job in done[2]} == {
        *(Setting("inpo", band, 0.3, 1000.0, draws) for band in (0, 300) for draws in (0, 4)),
        Setting("diffusers_script", 0, 0.3, 5000.0),
    }  # fmt: skip
    assert {job[2] for job in done[2]} == {0, 1}


def test_the_rival_flips_winner_and_loser_apart():
    class Pairs(compare_objectives.FlippedApart):
        def __init__(self):
            self.seed = 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            compare_objectives.benchmark.PreferenceDataset, "__getitem__",
            lambda self, item: {"pixel_values": torch.arange(12.0).reshape(2, 3, 1, 2)},
        )  # fmt: skip
        seen = {
            tuple(bool(image[0, 0, 0] > image[0, 0, 1]) for image in Pairs()[(0, visit), 0]["pixel_values"])
            for visit in range(40)
        }
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


def test_rivals_are_tuned_as_far_as_they_have_options():
    args, _ = compare_objectives.parse_args(["--model", "m", "--output_dir", "o", "--quick"])
    assert args.lengths == [30, 60, 120] and args.rungs == []
    own = compare_objectives.settings_to_tune(args, "diffusers_script", 0)
    assert own == [Setting("diffusers_script", 0, rate, 5000.0) for rate in args.learning_rates]
    assert compare_objectives.settings_to_tune(args, "published_inpo", 600) == []


def test_curves_by_hand():
    """As far as the damage of every run went, and the best so far at each length; means over two runs."""
    one, other = rows_of((10, 4.0, 1, 0.02), (20, 8.0, 1, 0.01)), rows_of((10, 6.0, 1, 0.04), (20, 10.0, 1, 0.06))
    assert compare_objectives.race([one, other]) == ([0, 5.0, 9.0], [0, pytest.approx(0.03), pytest.approx(0.04)])
    one[0]["damage"], other[0]["damage"] = 1.04, 1.2
    damage, gains = compare_objectives.frontier([one, other])
    assert damage[0] == 0 and damage[-1] == pytest.approx(4) and gains[-1] == pytest.approx((0.02 + 0.06) / 2)

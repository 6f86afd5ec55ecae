"""examples/plot_metrics.py: the course of a run, plotted from its metrics.jsonl."""

import json
import math

import numpy as np
import plot_metrics
import pytest
from PIL import Image

from training_utils import CONFIG_FILE, METRICS_FILE, read_metrics

NAMES = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "policy_error",
         "reference_error", "lr", "grad_norm")  # fmt: skip
EVAL = ("margins", "accuracies", "winner_error", "loser_error")


def log(folder, step, row):
    with (folder / METRICS_FILE).open("a") as stream:
        stream.write(json.dumps({"step": step, **row}) + "\n")


def write_run(folder, num_steps=4, bands=(), loss_type=None):
    """A run's folder; at its steps it looked at held-out pairs, in bands that changed when it was resumed."""
    folder.mkdir(exist_ok=True)
    for step in range(1, num_steps + 1):
        row = {name: i + step / num_steps for i, name in enumerate(NAMES)}
        if step <= len(bands):
            row |= {f"eval/{name}{end}": step / 7 for name in EVAL for end in ("", f"/{bands[step - 1]}")}
        log(folder, step, row)
    if loss_type:
        (folder / CONFIG_FILE).write_text(json.dumps({"options": {"loss_type": loss_type}}))
    return folder


def plot(words):
    plot_metrics.main(*plot_metrics.parse_args(words))


def lines(axes, style):
    return [line.get_ydata() for line in axes.lines if line.get_linestyle() == style]


@pytest.mark.parametrize(
    ("loss_type", "untrained"), [(None, math.log(2)), ("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 0.25)]
)
def test_what_was_logged_is_drawn_and_what_is_untrained_is_dotted(tmp_path, loss_type, untrained):
    run = write_run(tmp_path / "run", bands=["0-99", "0-99"], loss_type=loss_type)
    log(run, 5, dict.fromkeys(NAMES))  # a step that was not finite
    figure, rows = plot_metrics.plot_run(run), read_metrics(run / METRICS_FILE)
    drawn = [values for axes in figure.axes for values in lines(axes, "-")]
    for key in rows[0].keys() - {"step", "lr", "grad_norm"}:
        values = [row[key] for row in rows if key in row]
        assert any(np.array_equal(line, values, equal_nan=True) for line in drawn), key
    assert [line[0] for line in lines(figure.axes[0], ":")] == pytest.approx([untrained])


def test_held_out_pairs_get_panels_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "without", bands=[])
    write_run(tmp_path / "with", bands=["0-99", "0-99"])
    plot(["with", "without"])
    (width, height), without = (Image.open(tmp_path / name / "report.png").size for name in ("with", "without"))
    assert without == (width, height * 2 // 3) and min(without) > 500


def test_a_run_whose_bands_changed_and_a_line_that_was_damaged(tmp_path):
    run = write_run(tmp_path / "run", num_steps=45, bands=["0-99", "500-599"])
    with (run / METRICS_FILE).open("a") as stream:
        stream.write('{"step": 46, "policy_error": 1}\n{"step": 47, "loss')
    bands = [text.get_text() for axes in plot_metrics.plot_run(run).axes for text in axes.texts]
    assert sorted(set(bands)) == ["0-99", "500-599"]


def test_a_name_that_would_be_a_formula(tmp_path):
    plot([str(write_run(tmp_path / "$run_{$"))])
    assert (tmp_path / "$run_{$" / "report.png").exists()


def test_a_picture_of_this_program_is_replaced_and_nothing_else(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    plot([str(run)])
    before = (run / "report.png").read_bytes()
    write_run(run)  # the run went on
    plot([str(run)])
    assert (run / "report.png").read_bytes() != before and str(run / "report.png") in capsys.readouterr().out
    for name, content in (("mine.png", "mine"), ("metrics.jsonl", None), ("drawn.png", "PNG")):
        file = run / name
        if content == "PNG":
            Image.new("RGB", (4, 4)).save(file)
        elif content:
            file.write_text(content)
        kept = file.read_bytes()
        with pytest.raises(SystemExit) as stop:
            plot([str(run), "--output", str(file)])
        assert stop.value.code == 2 and "--output" in capsys.readouterr().err and file.read_bytes() == kept


def test_what_is_refused(tmp_path, capsys):
    run, empty = write_run(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    (empty / METRICS_FILE).touch()
    two, lost = [run, run, "--output", tmp_path / "x.png"], [run, "--output", run / "no" / "x"]
    refused = {METRICS_FILE: ([tmp_path], [tmp_path / "nothing"], [empty]), "--output": (two, lost)}
    for named, argv in ((name, argv) for name in refused for argv in refused[name]):
        with pytest.raises(SystemExit) as stop:
            plot([str(word) for word in argv])
        *_, message = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and "error: " in message and named in message
    assert not list(tmp_path.rglob("*.png"))

"""Plot the course of a training run: loss, implicit accuracy, rewards, errors, and held-out pairs if there are any.

    python examples/plot_metrics.py my-taste

Reads `metrics.jsonl` in the folder of a run, or of several, and writes `report.png` beside it. A thin line is
each step, a thick one the mean over a twentieth of the run. Dotted: a policy that equals the reference.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import LOSS_TYPES, Parser, one_line


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    path = os.path.expanduser
    parser.add_argument("run", type=path, nargs="+", help="--output_dir of a training run")
    parser.add_argument("--output", type=path, help="PNG file to write, for one run (report.png in the run's folder)")
    return parser.parse_args(argv), parser.error


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

import numpy as np
import torch
from PIL import Image

from inversion_utils import preference_loss
from training_utils import CONFIG_FILE, METRICS_FILE, read_metrics

PROGRAM = {"Software": "plot_metrics.py"}  # in the picture's metadata, so that nothing else is overwritten


def plot_metrics(metrics, title, loss_type="sigmoid"):
    """Returns a matplotlib Figure of what `read_metrics` returns, with the loss of an untrained policy dotted."""
    from matplotlib.figure import Figure

    panels = {
        "loss": ["loss"],
        "implicit accuracy (says nothing about the images)": ["rewards/accuracies"],
        "rewards": ["rewards/margins", "rewards/chosen", "rewards/rejected"],
        "error of the noise prediction": ["policy_error", "reference_error"],
    }
    evaluated = [row for row in metrics if "eval/margins" in row]
    if evaluated:
        errors = [f"eval/{name}_error" for name in ("winner", "loser")]
        panels["implicit accuracy (says nothing about the images)"] += ["eval/accuracies"]
        panels |= {"held-out pairs: margin": ["eval/margins"], "held-out pairs: error above the reference's": errors}
    untrained_loss = preference_loss(torch.zeros(2), torch.zeros(2), 1.0, loss_type)[0].item()
    untrained = {"loss": untrained_loss, "rewards/accuracies": 0.5, "rewards/margins": 0.0}
    untrained |= {"eval/margins": 0.0, "eval/winner_error": 0.0}
    num_rows, mean_over = len(panels) // 2, max(1, len(metrics) // 20)
    figure = Figure(figsize=(12, 3.75 * num_rows), layout="constrained")
    figure.suptitle(f"{title}\nthin: each step, thick: mean over {mean_over}; dotted: a policy equal to the reference")
    for axes, (name, keys) in zip(figure.subplots(num_rows, 2).flat, panels.items(), strict=True):
        for key, color in zip(keys, ("tab:blue", "tab:green", "tab:red"), strict=False):
            rows, window = (evaluated, 1) if key.startswith("eval/") else (metrics, mean_over)
            rows = [row for row in rows if key in row]  # not in one that was damaged
            steps, values = [row["step"] for row in rows], np.array([row[key] for row in rows])
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.4)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid") if len(values) >= window else []
            axes.plot(steps[window - 1 :], smooth, color=color, linewidth=2, label=key)
            for band in dict.fromkeys(name for row in rows for name in row if name.startswith(f"{key}/")):
                points = [(row["step"], row[band]) for row in rows if band in row]  # a resumed run may have others
                axes.plot(*zip(*points, strict=True), color=color, linewidth=0.6, alpha=0.6)
                axes.annotate(band.split("/")[-1], points[-1], fontsize=7, color=color)
            if key in untrained:
                axes.axhline(untrained[key], color="gray", linestyle=":")
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def plot_run(folder):
    """Returns a Figure of the run in a folder; raises ValueError if that holds no metrics."""
    file = Path(folder) / METRICS_FILE
    metrics = read_metrics(file)
    if not metrics:
        raise ValueError(f"{METRICS_FILE} holds no step" if file.is_file() else f"holds no {METRICS_FILE}")
    try:  # written when a run ends
        loss_type = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))["options"]["loss_type"]
    except (OSError, ValueError, LookupError, TypeError):
        loss_type = None
    title = Path(folder).resolve().name.replace("$", r"\$")  # which would begin a formula
    return plot_metrics(metrics, title, loss_type if loss_type in LOSS_TYPES else "sigmoid")


def is_ours(file):
    """Whether a file is a picture that this program wrote."""
    try:
        with Image.open(file) as picture:
            return picture.info.get("Software") == PROGRAM["Software"]
    except OSError:
        return False


def main(args, error):
    if importlib.util.find_spec("matplotlib") is None:
        error("matplotlib is not installed: pip install matplotlib")
    if args.output and len(args.run) > 1:
        error(f"--output {args.output}: {len(args.run)} runs do not go into one file")
    for run in args.run:
        output = Path(args.output or Path(run, "report.png"))
        if output.exists() and not is_ours(output):
            error(f"--output {output} exists and is not a picture of this program; name another or remove it")
        try:
            plot_run(run).savefig(output, format="png", dpi=100, metadata=PROGRAM)
        except ValueError as problem:
            error(f"{run}: {one_line(problem)}")
        except OSError as problem:
            error(f"--output {output} cannot be written: {one_line(problem)}")
        print(f"wrote {output}")


if __name__ == "__main__":
    main(*args_and_error)

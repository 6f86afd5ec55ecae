"""Options of the training scripts: how they are read, from a file too, and which of them go together.

Needs no torch, so that a mistyped option is told at once.
"""

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LOSS_TYPES = ("sigmoid", "hinge", "ipo")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


def one_line(error: Exception) -> str:
    """Returns the beginning of an error's message on one line, or its class if it has none."""
    return printable(str(error))[:300] or type(error).__name__


def printable(text: str) -> str:
    """Returns a text on one line, in which nothing is left of escape sequences, such as data may hold, but letters."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def number(kind: type, *, least=-math.inf, above=-math.inf, most=math.inf, below=math.inf) -> Callable[[str], Any]:
    """Returns an argparse type: a finite int or float within the bounds."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    allowed = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))

    def parse(text):
        value = kind(text)
        if not (least <= value <= most and above < value < below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"is {text}; allowed: {allowed}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `kind` itself cannot read the text
    return parse


def with_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> list[str]:
    """Returns the command line, or the program's own, after the options of the file that its `--config` names.

    So the command line wins. The file is YAML, options by name, or a run's `training_config.json`. Ends the program if
    it is of no use.
    """
    import yaml

    argv = sys.argv[1:] if argv is None else argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=os.path.expanduser)
    file, words = finder.parse_known_args(argv)[0].config, []
    if file is None:
        return list(argv)
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    try:
        # In YAML `no` would be false, and 1e-4 text: all scalars stay as they are written, and argparse reads them.
        values = yaml.load(Path(file).read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
        values = values.get("options", values) if isinstance(values, dict) else None
        if not isinstance(values, dict):
            raise ValueError("it does not hold options by name")
        for name, value in values.items():
            if name not in actions:
                raise ValueError(f"there is no option called {name}")
            if name == "config" or value in ("", "~", "null"):
                continue
            action, is_list = actions[name], isinstance(value, list)
            if isinstance(value, dict) or (is_list and action.nargs != "+"):
                raise ValueError(f"{name} is {value}; needed: a single value")
            if isinstance(action, argparse.BooleanOptionalAction) and value.lower() in ("true", "false"):
                words.append(f"--{name}" if value.lower() == "true" else f"--no-{name}")
            else:
                words += [f"--{name}", *value] if is_list else [f"--{name}={value}"]
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {file}: {one_line(error)}")
    return [*words, *argv]


def check_options(args: argparse.Namespace, error: Callable[[str], Any]) -> None:
    """Ends the run by `error` if options contradict each other or need what is not installed."""
    columns, has_cache = (args.image_0_column, args.image_1_column, args.label_column), bool(args.inversion_cache_dir)
    data, least = args.train_data_dir and Path(args.train_data_dir).resolve(), timesteps_per_pair(args)
    lacking = {name for name in ("bitsandbytes", "xformers", args.report_to) if not importlib.util.find_spec(name)}
    inside = [name for name in ("output_dir", "inversion_cache_dir")
              if data and vars(args)[name] and Path(vars(args)[name]).resolve().is_relative_to(data)]  # fmt: skip
    rules = {
        f"--{''.join(inside[:1])} lies in --train_data_dir, whose files it would then be among": inside,
        "give the data by either --dataset_name or --train_data_dir": (args.dataset_name is None) == (data is None),
        "--winner_column and --loser_column go together": bool(args.winner_column) != bool(args.loser_column),
        "--winner_column excludes --image_0_column, --image_1_column and --label_column":
            args.winner_column and columns != ("jpg_0", "jpg_1", "label_0"),
        "--tie_policy soft does not go with --loss_type hinge, which has no loss for ties":
            args.loss_type == "hinge" and args.tie_policy == "soft",
        "--label_smoothing needs --loss_type sigmoid": args.loss_type != "sigmoid" and args.label_smoothing,
        "--lr_warmup_steps needs another --lr_scheduler than constant, such as constant_with_warmup":
            args.lr_scheduler == "constant" and args.lr_warmup_steps,
        "--timesteps_subset excludes --min_timestep and --max_timestep":
            args.timesteps_subset and (args.min_timestep, args.max_timestep) != (0, None),
        f"--inversion_steps is {args.inversion_steps}; needed: {least} or more, one a timestep":
            args.objective != "diffusion_dpo" and inversion_steps(args) < least,
        "--inversion_model policy goes with an objective that inverts, and without --inversion_cache_dir":
            args.inversion_model == "policy" and (has_cache or args.objective == "diffusion_dpo"),
        "--reference init needs --lora_init": args.reference == "init" and not args.lora_init,
        "--lora_init decides these itself: --rank and --lora_target_modules":
            args.lora_init and (args.rank, args.lora_target_modules) != (16, list(LORA_TARGETS)),
        "--precompute_only needs --inversion_cache_dir": args.precompute_only and not has_cache,
        "--use_8bit_adam and --quantize_base need bitsandbytes: pip install bitsandbytes":
            "bitsandbytes" in lacking and (args.use_8bit_adam or args.quantize_base),
        "--enable_xformers_memory_efficient_attention needs xformers: pip install xformers":
            "xformers" in lacking and args.enable_xformers_memory_efficient_attention,
        f"--report_to {args.report_to} is not installed: pip install {args.report_to}":
            args.report_to in lacking - {"all", "none"},
    }  # fmt: skip
    for message, is_broken in rules.items():
        if is_broken:
            error(message)


def timesteps_per_pair(args: argparse.Namespace) -> int:
    """Returns the number of targets of a pair."""
    return args.timesteps_per_pair or (4 if args.objective == "inversion_dpo" else 1)


def inversion_steps(args: argparse.Namespace) -> int:
    """Returns the steps of an inversion. A distilled model is called at its own timesteps only: all targets."""
    return args.inversion_steps or timesteps_per_pair(args) + (0 if args.timesteps_subset else 4)


def allowed_timesteps(args: argparse.Namespace, alphas_cumprod) -> list[int]:
    """Returns the training timesteps, rising; raises ValueError if the schedule (T,) does not have them.

    A level without signal (zero terminal SNR) is never trained on: its error is zero by construction.
    """
    last, count = int((alphas_cumprod > 0).sum()) - 1, timesteps_per_pair(args)
    subset = sorted(set(args.timesteps_subset or ()))
    if subset and (subset[-1] > last or len(subset) < count):
        raise ValueError(f"--timesteps_subset is {subset}; allowed: {count} timesteps or more, from 0 to {last}")
    highest = last if args.max_timestep is None else args.max_timestep
    if not args.min_timestep <= highest <= last:
        band = f"--min_timestep {args.min_timestep} and --max_timestep {highest}"
        raise ValueError(f"{band}; allowed: an interval within 0 to {last}")
    return subset or list(range(args.min_timestep, highest + 1))

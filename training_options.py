"""Options of the training scripts: how they are read, from a file too, and which of them go together.

Needs no torch, so that a mistyped option is told at once.
"""

import argparse
import contextlib
import difflib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
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
    """Returns a text on one line, without control characters, of which data may hold escape sequences."""
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


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the one of the names that is most like this one, "" if none is."""
    plain = {other.lower().replace("-", "_"): other for other in names}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), plain, 1)
    return plain[found[0]] if found else ""


def missing_folder(value: str, was_asked_for=False) -> str:
    """Returns what to say of a local path to nothing, with the nearest name there is; "" if it is no such path.

    A path is what begins with `/`, `.` or `~`, or holds a backslash or more than one slash. Other values may be on the
    Hub. If they are not (`was_asked_for`), those are paths, too, whose parent or nearest name is here.
    """
    path = Path(os.path.expanduser(value))
    with contextlib.suppress(OSError):  # a name that is too long, a folder that may not be read
        if path.exists() or "://" in value:
            return ""
        parent = next(parent for parent in path.parents if parent.is_dir())
        near = nearest(path.relative_to(parent).parts[0], (child.name for child in parent.iterdir()))
        is_path = value[:1] in ("/", ".", "~") or "\\" in value or value.count("/") > 1
        if is_path or (was_asked_for and (near or parent != Path())):
            meant = Path(parent, near, *path.relative_to(parent).parts[1:])
            meant = meant if meant.exists() else parent / near
            return f"no such folder: {value}" + (f"; did you mean {meant}?" if near else "")
    return ""


class Parser(argparse.ArgumentParser):
    """Reads options as argparse does, after those of the file that `--config` names, so that the command line wins.

    The file is YAML, options by name, or a run's `training_config.json`. Dashes stand for underscores, too. For
    an unknown option, the message suggests the nearest one.
    """

    def __init__(self, **options):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(**{"formatter_class": formatter, "allow_abbrev": False, **options})
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a console that lacks a letter shows its code, and ends no program
                stream.reconfigure(errors="backslashreplace")

    def parse_known_args(self, args=None, namespace=None):
        words = self._known(list(sys.argv[1:] if args is None else args))
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=os.path.expanduser)
        file = finder.parse_known_args(words)[0].config if "--config" in self._option_string_actions else None
        try:
            words = [*self._words_of(file), *words] if file else words
        except Exception as error:  # yaml's own among them
            self.error(f"--config {file}: {one_line(error)}")
        return super().parse_known_args(words, namespace)

    def _known(self, words: list[str]) -> list[str]:
        """Returns the words with the options' own names; ends the program at an option that there is not."""
        known = self._option_string_actions
        for i, word in enumerate(words[: words.index("--")] if "--" in words else words):
            name, has_value, value = word.partition("=")
            if name.startswith(("\u2013", "\u2014")):
                self.error(f"{name} begins with a dash that is not the keyboard's; write --{name[1:].lstrip('-')}")
            if name in known or not re.match("--?[A-Za-z]", name):
                action = known.get(name)
            else:
                near = nearest(f"--{name.lstrip('-')}", known)
                if near.replace("-", "_") != name.replace("-", "_"):
                    self.error(f"there is no option {name}" + (f"; did you mean {near}?" if near else ""))
                action, words[i] = known[near], near + has_value + value
            follows = value if has_value else " ".join(words[i + 1 : i + 2])
            if action and action.type is os.path.expanduser and not follows.strip():
                self.error(f"{name} is empty; is a shell variable not set?")
            if isinstance(action, argparse.BooleanOptionalAction) and (
                has_value or follows.lower() in ("true", "false", "yes", "no", "1", "0")
            ):
                off = next(x for x in action.option_strings if x.startswith("--no-"))
                self.error(f"{name} takes no value; without {follows!r} it turns on, {off} turns it off")
        return words

    def _words_of(self, file: str) -> list[str]:
        """Returns the options of a file as words of a command line; raises an error if it is of no use."""
        import yaml

        # In YAML `no` would be false, and 1e-4 text: all scalars stay as they are written, and argparse reads them.
        values = yaml.load(Path(file).read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
        values, words = values.get("options", values) if isinstance(values, dict) else None, []
        if not isinstance(values, dict):
            raise ValueError("it does not hold options by name")
        for name, value in values.items():
            action, is_list = self._option_string_actions.get(f"--{name.replace('-', '_')}"), isinstance(value, list)
            if action is None or action.dest == "help":
                near = nearest(name, (action.dest for action in self._actions))
                raise ValueError(f"there is no option {name}" + (f"; did you mean {near}?" if near else ""))
            if action.dest == "config" or value in ("", "~", "null"):
                continue
            if isinstance(value, dict) or (is_list and action.nargs != "+"):
                raise ValueError(f"{name} is {value}; needed: a single value")
            if isinstance(action, argparse.BooleanOptionalAction) and value.lower() in ("true", "false"):
                words.append(f"--{action.dest}" if value.lower() == "true" else f"--no-{action.dest}")
            else:
                words += [f"--{action.dest}", *value] if is_list else [f"--{action.dest}={value}"]
        return words


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
        f"--dataset_name {args.dataset_name} is a web address; needed: its name on the Hub, user/name":
            "://" in (args.dataset_name or ""),
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

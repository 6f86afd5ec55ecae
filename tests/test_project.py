"""Promises between the project's files: requirements, script headers, commands and snippets in the READMEs."""

import argparse
import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from conftest import ROOT, build_pipeline
from diffusers.optimization import SchedulerType

import inversion_utils
import training_options

SCRIPTS = ["train_inversion_dpo.py", "train_inversion_dpo_sdxl.py"]
HELPERS = {  # and what each may import of the others
    "inversion_utils.py": set(),
    "training_options.py": set(),
    "training_utils.py": {"inversion_utils", "training_options"},
}
TOOLS = sorted(file.name for file in (ROOT / "examples").glob("*.py") if "def parse_args" in file.read_text())
PAGES = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "examples" / "docs").glob("*.md"))
READMES = {name: (ROOT / name).read_text() for name in ("README.md", "examples/README.md", *PAGES)}
SNIPPETS = [code for text in READMES.values() for code in re.findall(r"```python\n(.*?)```", text, re.S)]
LAUNCHER = {
    "--multi_gpu", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--config_file",
    "--nnodes", "--requeue", "--signal",
}  # fmt: skip
NOT_OFFERED = {"--lora_alpha", "--scale_lr", "--allow_tf32", "--logging_dir", "--hub_token", "--save_best"}
TOP_LEVEL = {
    *SCRIPTS, *HELPERS, "requirements.txt", "constraints.txt", "README.md", "examples", "tests",
    "LICENSE", "pyproject.toml", ".ci", ".gitignore",
}  # fmt: skip


def module(name):
    return importlib.import_module(Path(name).stem)


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_names_the_same_lower_bounds_as_requirements(name):
    header = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / name).read_text(), re.M | re.S)[1]
    named = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.M))["dependencies"]
    assert set(named) | {"bitsandbytes>=0.50.0"} == set(requirements("requirements.txt"))


def test_the_tested_versions_satisfy_the_lower_bounds():
    tested = dict(line.split("==") for line in requirements("constraints.txt"))
    for line in requirements("requirements.txt"):
        name, bound = line.split(">=")
        assert [int(x) for x in tested[name].split(".")] >= [int(x) for x in bound.split(".")], name


@pytest.mark.parametrize("name", [*SCRIPTS, *HELPERS])
def test_a_script_needs_the_helpers_beside_it_and_packages_that_are_required(name):
    """The method needs torch alone, and options are read without it."""
    nodes = list(ast.walk(ast.parse((ROOT / name).read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {re.split("[>=]", line)[0] for line in requirements("requirements.txt")} | {"PIL", "tqdm", "yaml"}
    packages = {"inversion_utils.py": {"torch"}, "training_options.py": {"yaml"}}.get(name, packages)
    allowed = packages | sys.stdlib_module_names | HELPERS.get(name, {Path(helper).stem for helper in HELPERS})
    assert {module.split(".")[0] for module in imported} <= allowed


def test_choices_are_those_of_the_libraries():
    """They are literals, so that options are read before the libraries are imported."""
    schedulers = {kind.value for kind in SchedulerType} - {"piecewise_constant"}  # which needs rules
    assert set(training_options.LR_SCHEDULERS) == schedulers
    assert {*training_options.TRACKERS, "all"} == {str(kind) for kind in LoggerType}
    assert training_options.LOSS_TYPES == inversion_utils.LOSS_TYPES
    installed = {name for name in training_options.TRACKERS if importlib.util.find_spec(name)}
    assert installed == {str(kind) for kind in get_available_trackers()}


def tracked_files():
    """What is in the repository, or is new and not ignored."""
    command = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no clone of the repository")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_the_top_level_holds_what_design_lists():
    assert {file.relative_to(ROOT).parts[0] for file in tracked_files()} == TOP_LEVEL


def test_nothing_is_left_to_be_done():
    for file in tracked_files():
        with contextlib.suppress(UnicodeDecodeError):
            text = file.read_text(encoding="utf-8")
            assert "TO" + "DO" not in text and "FIX" + "ME" not in text, file


def commands():
    """The invocations of scripts and tools in READMEs and pages, as (program, options)."""
    found = []
    for text in READMES.values():
        lines = re.sub(r"\\\n\s*", " ", text).splitlines()
        inline = [code for line in lines for code in re.findall(r"`([^`]+)`", line)]
        blocks = [line for line in lines if line.startswith("    ")]
        fenced = [line for code in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
                  for line in re.sub(r"\\\n\s*", " ", code).splitlines()]  # fmt: skip
        for line in [*blocks, *fenced, *inline]:
            if match := re.search(r"(?:python3?|accelerate launch|torchrun) .*?(?:examples/)?(\w+\.py)(.*)", line):
                options = shlex.split(re.split(r" [#>|]", match[2])[0])
                if match[1] in (*SCRIPTS, *TOOLS) and options and not {"...", "--help"} & set(options):
                    found.append((match[1], options))
    return found


def parse(name, options):
    """The options as the program reads them; a program returns them alone or with more."""
    args = module(name).parse_args(options)
    return args[0] if isinstance(args, tuple) else args


@pytest.mark.parametrize(("name", "options"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_readmes_commands_parse(name, options, tmp_path, monkeypatch):
    """In the repository, beside the folders that are asked for at once."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for folder in ("my-candidates", "small/lora"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "small/lora/pytorch_lora_weights.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert parse(name, options)


def test_the_readmes_show_how_to_train_and_to_convert():
    names = [name for name, _ in commands()]
    assert {*SCRIPTS, "convert_pairs.py"} <= set(names) and len(names) >= 8
    assert any("invert(" in code for code in SNIPPETS)


def test_options_named_in_the_readmes_exist():
    """In the tables and the text too; whose they are is not checked."""
    printed = io.StringIO()
    for name in (*SCRIPTS, *TOOLS):
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            module(name).parse_args(["--help"])
    known = set(re.findall(r"--\w+", printed.getvalue()))
    assert not known & NOT_OFFERED
    known |= LAUNCHER | NOT_OFFERED
    for name, text in READMES.items():
        assert set(re.findall(r"(?<![\w-])--[a-z]\w*", text)) <= known, name


def test_what_is_not_offered_is_listed_once():
    assert set(re.findall(r"--[a-z]\w*", READMES["README.md"])) >= NOT_OFFERED
    for name in NOT_OFFERED:
        assert sum(text.count(name) for text in READMES.values()) == 1, name


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere_and_no_figure_is_missing(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", READMES[name]):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), target
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, target
    assert not re.search(r"@[A-Z_]+@", READMES[name])


def test_the_readme_is_what_a_user_reads_first():
    assert len(READMES["README.md"].splitlines()) <= 230
    assert (ROOT / "README.md").stat().st_size <= 18_000


def test_every_page_and_file_of_options_is_in_the_index():
    index = READMES["examples/README.md"]
    assert all(name.removeprefix("examples/") in index for name in PAGES) and "configs/" in index
    recipes = READMES["examples/docs/recipes.md"]
    assert all(file.name in recipes for file in (ROOT / "examples" / "configs").glob("*.yaml"))
    assert all(name in index for name in TOOLS)


@pytest.mark.parametrize("snippet", [code for code in SNIPPETS if "invert(" in code])
def test_the_inversion_snippet_runs(snippet):
    pipe = build_pipeline()
    names = {
        "noise_scheduler": pipe.scheduler, "unet": pipe.unet, "encoder_hidden_states": torch.randn(2, 16, 16),
        "prediction_type": "epsilon", "latents": torch.randn(2, 4, 4, 4), "timesteps": torch.tensor([10, 700]),
    }  # fmt: skip
    exec(snippet, names)
    trajectory = names["trajectory"]
    assert trajectory.timesteps.tolist() == [[10, 700]]
    abar = pipe.scheduler.alphas_cumprod[[10, 700]].view(2, 1, 1, 1)
    one_step = (trajectory.latents[0] - (1 - abar).sqrt() * trajectory.noise[0]) / abar.sqrt()
    torch.testing.assert_close(one_step, names["latents"], rtol=0, atol=1e-4)


class Parser(Exception):
    """Carries a program's parser out of it."""


SCRIPTS_AND_TOOLS = [*ROOT.glob("train*.py"), *(ROOT / "examples").glob("*.py")]
PROGRAMS = sorted(path for path in SCRIPTS_AND_TOOLS if "def parse_args" in path.read_text())
PATHS = re.compile(
    ".*_dir|.*name_or_path|lora(_init)?|(.*_)?model|dataset_name|output|image|image_root|vae|prompts|scorers?|config"
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_paths_in_the_home_folder_are_expanded(program, monkeypatch):
    """Shells leave a tilde alone in --output_dir=~/x."""

    def parse(parser, *args):
        raise Parser(parser)

    module = importlib.import_module(program.stem)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    monkeypatch.setattr(module, "with_config", lambda parser, argv: argv, raising=False)
    with pytest.raises(Parser) as caught:
        module.parse_args([])
    actions = caught.value.args[0]._actions
    actions = [action for action in actions if PATHS.fullmatch(action.dest) and not action.choices]
    assert actions
    for action in actions:
        assert action.type and action.type("~/x") == os.path.expanduser("~/x"), action.dest

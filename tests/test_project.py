"""Promises between the project's files: requirements, the scripts' own headers, the README's commands and snippets."""

import re
import shlex
import tomllib
from pathlib import Path

import convert_pairs
import pytest
import sample_pairs
import torch
from conftest import build_pipeline

import train_inversion_dpo
import train_inversion_dpo_sdxl

SCRIPTS = {f"{script.__name__}.py": script for script in (train_inversion_dpo, train_inversion_dpo_sdxl)}
TOOLS = (convert_pairs, sample_pairs)
ROOT = Path(train_inversion_dpo.__file__).parent
README = (ROOT / "README.md").read_text()


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


def commands():
    """The README's invocations of the training scripts, as (script, list of options)."""
    blocks = re.findall(r"^    accelerate launch .*?(?=\n\n)", README, re.M | re.S)
    lines = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    return [(word, line[i + 1 :]) for line in lines for i, word in enumerate(line) if word in SCRIPTS]


def test_the_readme_has_commands_for_both_scripts():
    assert {name for name, _ in commands()} == set(SCRIPTS) and len(commands()) >= 6


@pytest.mark.parametrize(("name", "options"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_readmes_commands_parse(name, options):
    args, _ = SCRIPTS[name].parse_args(options)
    assert args.output_dir


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_the_readmes_commands_of_the_tools_parse(tool):
    (block,) = re.findall(rf"^    python examples/{tool.__name__}.py (.*?)(?=\n\n)", README, re.M | re.S)
    args, _ = tool.parse_args(shlex.split(block.replace("\\\n", " ")))
    assert args.output_dir


def test_options_named_in_the_readme_exist(capsys):
    for program in (train_inversion_dpo, *TOOLS):
        with pytest.raises(SystemExit):
            program.parse_args(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    section = README[README.index("## From pairs to a LoRA") : README.index("## Which objective")]
    launcher = {"--multi_gpu", "--num_processes", "--help", "--model", "--train", "--num_images"}
    assert set(re.findall(r"--\w+", section)) - launcher <= known


def test_the_readmes_inversion_snippet_runs():
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "invert(" in code)
    pipe = build_pipeline()
    names = {
        "noise_scheduler": pipe.scheduler, "unet": pipe.unet, "encoder_hidden_states": torch.randn(2, 16, 16),
        "prediction_type": "epsilon", "latents": torch.randn(2, 4, 4, 4), "timesteps": torch.tensor([10, 700]),
    }  # fmt: skip
    exec(snippet, names)
    trajectory = names["trajectory"]
    assert trajectory.timesteps.tolist() == [[10, 700]]
    alpha, sigma = (
        f(pipe.scheduler.alphas_cumprod[[10, 700]]).view(2, 1, 1, 1) for f in (torch.sqrt, lambda a: (1 - a).sqrt())
    )
    one_step = (trajectory.latents[0] - sigma * trajectory.noise[0]) / alpha
    torch.testing.assert_close(one_step, names["latents"], rtol=0, atol=1e-4)

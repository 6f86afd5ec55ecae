"""The launch scripts in examples/, run with a stand-in for `accelerate` that writes down what it was given."""

import os
import subprocess

import pytest
from conftest import ROOT

import train_inversion_dpo

SCRIPTS = sorted((ROOT / "examples").glob("train_*.sh"))

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)


@pytest.fixture
def launch(tmp_path):
    """Runs a launch script; returns the finished process, and what `accelerate` was given or None."""
    record = tmp_path / "arguments"
    stub = tmp_path / "bin" / "accelerate"
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > '{record}'\nexit $STATUS\n")
    stub.chmod(0o755)

    def run(script, *extra, **variables):
        record.unlink(missing_ok=True)
        environment = {"PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}", "STATUS": "0", **variables}
        process = subprocess.run(
            ["bash", script, *extra], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        return process, record.read_text().split("\0")[:-1] if record.exists() else None

    return run


@pytest.fixture
def options(launch, tmp_path):
    """Runs a launch script and returns its options as the training script reads them."""

    def run(script, *extra, **variables):
        process, arguments = launch(script, *extra, **variables)
        assert process.returncode == 0 and not process.stderr
        assert arguments[0] == "launch"
        assert (tmp_path / arguments[1]).samefile(train_inversion_dpo.__file__)
        return train_inversion_dpo.parse_args(arguments[2:])[0]

    return run


def test_there_are_launch_scripts():
    assert len(SCRIPTS) >= 3


@each_script
def test_defaults_parse_and_add_up_to_64_pairs_a_step(options, script):
    args = options(script, DATA="owner/pairs")
    assert args.dataset_name == "owner/pairs" and args.train_data_dir is None
    assert args.train_batch_size * args.gradient_accumulation_steps == 64
    assert args.resolution == (768 if "sd21" in script.name else 512)
    saving = args.gradient_checkpointing, args.use_8bit_adam, args.trajectory_chunk == args.train_batch_size == 1
    assert saving == (True, True, True) or "12gb" not in script.name


@each_script
def test_data_model_and_output_are_chosen_and_appended_options_win(options, script, tmp_path):
    (tmp_path / "my pairs").mkdir()
    extra = ("--max_train_steps=7", "--lr_warmup_steps", "3", "--label_column=my label")
    args = options(script, *extra, DATA="my pairs", MODEL="my model", OUTPUT="my taste")
    assert args.train_data_dir == "my pairs" and args.dataset_name is None
    assert args.pretrained_model_name_or_path == "my model" and args.output_dir == "my taste"
    assert (args.max_train_steps, args.lr_warmup_steps, args.label_column) == (7, 3, "my label")


@each_script
@pytest.mark.parametrize("variables", [{}, {"DATA": ""}], ids=["unset", "empty"])
def test_without_data_nothing_is_launched(launch, script, variables):
    process, arguments = launch(script, **variables)
    assert process.returncode == 2 and arguments is None
    (line,) = process.stderr.splitlines()
    assert "DATA" in line


@each_script
def test_a_failure_is_passed_on(launch, script):
    assert launch(script, DATA="pairs", STATUS="7")[0].returncode == 7

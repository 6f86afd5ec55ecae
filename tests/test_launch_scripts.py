"""The launch scripts in examples/, run with a stand-in for `accelerate` that writes down what it was given."""

import os
import subprocess
from pathlib import Path

import pytest

import train_inversion_dpo

EXAMPLES = Path(train_inversion_dpo.__file__).parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("train_*.sh"))

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)


@pytest.fixture
def launch(tmp_path):
    """Runs a launch script; returns the finished process, and what `accelerate` was given or None."""
    record = tmp_path / "arguments"
    stub = tmp_path / "bin" / "accelerate"
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > '{record}'\n")
    stub.chmod(0o755)

    def run(script, *extra, **variables):
        record.unlink(missing_ok=True)
        environment = {"PATH": f"{stub.parent}{os.pathsep}{os.environ['PATH']}", **variables}
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


def test_the_launch_scripts_are_these():
    assert [script.name for script in SCRIPTS] == ["train_12gb.sh", "train_sd15.sh", "train_sd21_v.sh"]


@each_script
def test_defaults_parse_and_add_up_to_64_pairs_an_update(options, script):
    args = options(script, DATA="owner/pairs")
    assert args.dataset_name == "owner/pairs" and args.train_data_dir is None
    assert args.train_batch_size * args.gradient_accumulation_steps == 64


@each_script
def test_model_data_and_output_are_overridden(options, script, tmp_path):
    (tmp_path / "my pairs").mkdir()
    args = options(script, DATA="my pairs", MODEL="my model", OUTPUT="my taste")
    assert args.train_data_dir == "my pairs" and args.dataset_name is None
    assert args.pretrained_model_name_or_path == "my model" and args.output_dir == "my taste"


@each_script
def test_appended_options_win(options, script):
    args = options(script, "--max_train_steps=7", "--lr_warmup_steps", "3", "--label_column=my label", DATA="pairs")
    assert (args.max_train_steps, args.lr_warmup_steps, args.label_column) == (7, 3, "my label")


@each_script
@pytest.mark.parametrize("variables", [{}, {"DATA": ""}], ids=["unset", "empty"])
def test_without_data_nothing_is_launched(launch, script, variables):
    process, arguments = launch(script, **variables)
    assert process.returncode == 2 and arguments is None
    (line,) = process.stderr.splitlines()
    assert line.startswith("DATA is not set: ") and script.name in line


@each_script
def test_a_failure_is_passed_on(launch, script, tmp_path):
    (tmp_path / "bin" / "accelerate").write_text("#!/bin/sh\nexit 7\n")
    assert launch(script, DATA="pairs")[0].returncode == 7


def test_what_the_scripts_are_for(options):
    sd15, sd21, small = (
        options(EXAMPLES / name, DATA="pairs") for name in ("train_sd15.sh", "train_sd21_v.sh", "train_12gb.sh")
    )
    assert sd15.resolution == small.resolution == 512 and sd21.resolution == 768
    assert small.gradient_checkpointing and small.use_8bit_adam
    assert small.trajectory_chunk == small.train_batch_size == small.vae_encode_batch_size == 1
    saving = {"trajectory_chunk", "train_batch_size", "gradient_accumulation_steps", "use_8bit_adam"}
    differing = {name for name, value in vars(small).items() if value != getattr(sd15, name)}
    assert differing == saving | {"vae_encode_batch_size"}

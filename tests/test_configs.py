"""The YAML files in examples/configs, and the commands at their heads, as the training scripts read them."""

import re
import shlex

import pytest
import yaml
from conftest import ROOT

import train_inversion_dpo
import train_inversion_dpo_sdxl

FILES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
SAVING = {  # memory, at the cost of time or of some rounding
    "train_batch_size": 1, "gradient_checkpointing": True, "trajectory_chunk": 1, "vae_encode_batch_size": 1,
    "use_8bit_adam": True,
}  # fmt: skip

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def script_of(file):
    return train_inversion_dpo_sdxl if file.stem.startswith("sdxl") else train_inversion_dpo


def parsed(file, *options):
    words = ["--config", str(file), "--train_data_dir", "d", "--output_dir", "o", *options]
    return script_of(file).parse_args(words)[0]


def test_there_is_a_file_for_each_family_and_for_small_cards():
    assert {"sd15_24gb", "sd15_12gb", "sd21_768v", "sdxl_24gb"} <= {file.stem for file in FILES}


@each_file
def test_every_option_is_the_scripts_own_and_is_read(file):
    values = yaml.safe_load(file.read_text())
    options = vars(parsed(file))
    for name, value in values.items():
        assert options[name] == value, name
    required = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o"]
    defaults = vars(script_of(file).parse_args(required)[0])
    assert {name for name in options if options[name] != defaults[name]} <= {*values, "config"}


@each_file
def test_a_step_has_64_pairs_at_the_models_own_resolution(file):
    args = parsed(file)
    assert args.train_batch_size * args.gradient_accumulation_steps == 64
    own = {"sd15": 512, "sd21": 768, "sdxl": 1024}
    assert args.resolution == own[file.stem[:4]]


@each_file
def test_pictures_are_seen_and_each_has_its_checkpoint(file):
    args = parsed(file)
    assert args.validation_prompts and 0 in args.validation_lora_scales
    assert args.validation_steps % args.checkpointing_steps == 0 == args.max_train_steps % args.validation_steps


@each_file
def test_files_for_small_cards_save_memory(file):
    args = vars(parsed(file))
    if file.stem.endswith("12gb"):
        assert {name: args[name] for name in SAVING} == SAVING
    elif not file.stem.endswith("80gb"):
        assert args["gradient_checkpointing"] and args["vae_encode_batch_size"] == 1


@each_file
def test_data_model_and_output_are_chosen_and_the_command_line_wins(file):
    more = [
        "--max_train_steps=7",
        "--lr_warmup_steps",
        "3",
        "--no-gradient_checkpointing",
        "--validation_prompts",
        "b",
    ]
    args = parsed(file, *more, "--pretrained_model_name_or_path", "my model")
    assert (args.train_data_dir, args.output_dir, args.pretrained_model_name_or_path) == ("d", "o", "my model")
    assert (args.max_train_steps, args.lr_warmup_steps, args.validation_prompts) == (7, 3, ["b"])
    assert not args.gradient_checkpointing


@each_file
@pytest.mark.parametrize("missing", ["data", "output_dir"])
def test_data_and_output_are_for_the_user_to_name(file, missing, capsys):
    options = {"data": ["--output_dir", "o"], "output_dir": ["--train_data_dir", "d"]}[missing]
    with pytest.raises(SystemExit) as ended:
        script_of(file).parse_args(["--config", str(file), *options])
    assert ended.value.code == 2 and missing in capsys.readouterr().err


@each_file
def test_the_command_at_its_head_works(file, monkeypatch):
    """And the head says what was measured, or that it was calculated."""
    monkeypatch.chdir(ROOT)
    head = "\n".join(line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
    command = shlex.split(re.search(r"^accelerate launch (.*)$", head.replace("\\\n", ""), re.M)[1])
    assert command[0] == f"{script_of(file).__name__}.py"
    args = script_of(file).parse_args(command[1:])[0]
    assert (ROOT / args.config).samefile(file)
    assert re.search("calculated|[Mm]easured", head) and "GiB" in head

"""`--config`: options from a file, which the command line overrules."""

import json

import pytest
from conftest import assert_same, lora

import train_inversion_dpo

REQUIRED = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
YAML = """
# a comment
pretrained_model_name_or_path: m
dataset_name: d
output_dir: ~/o
mixed_precision: no
learning_rate: 1e-3
random_flip: true
max_timestep: null
hub_model_id:
validation_prompts: ["a red: circle", no]
timesteps_subset: [10, 20]
timesteps_per_pair: 2
"""


def parsed(*words):
    return vars(train_inversion_dpo.parse_args([*map(str, words)])[0])


def test_a_yaml_file_stands_for_the_command_line(tmp_path):
    """Each value is what the same word on the command line would be, also where YAML would make another of it."""
    file = tmp_path / "options.yaml"
    file.write_text(YAML)
    same = [
        *REQUIRED[:4], "--output_dir", "~/o", "--mixed_precision", "no", "--learning_rate", "1e-3", "--random_flip",
        "--validation_prompts", "a red: circle", "no", "--timesteps_subset", "10", "20", "--timesteps_per_pair", "2",
    ]  # fmt: skip
    assert {**parsed("--config", file), "config": None} == parsed(*same)


def test_the_command_line_wins(tmp_path):
    (tmp_path / "options.yml").write_text(YAML)
    options = parsed(
        "--config", tmp_path / "options.yml", "--learning_rate", 5e-4, "--no-random_flip", "--output_dir=x",
        "--validation_prompts", "b", "--timesteps_subset", 1, 2, 3,
    )  # fmt: skip
    assert (options["learning_rate"], options["random_flip"], options["output_dir"]) == (5e-4, False, "x")
    assert options["validation_prompts"] == ["b"] and options["timesteps_subset"] == [1, 2, 3]
    assert options["timesteps_per_pair"] == 2


def test_a_runs_own_configuration_repeats_it(train, tmp_path):
    prompts = ['a \U0001f600 "circle"', "no"]
    first = train(
        "first", objective="inpo", inversion_steps=1, learning_rate=1e-3, random_flip=True, seed=3,
        validation_prompts=prompts, validation_inference_steps=1, num_validation_images=1,
    )  # fmt: skip
    nothing = dict.fromkeys(["pretrained_model_name_or_path", "train_data_dir", "resolution", "train_batch_size"])
    nothing |= dict.fromkeys(["max_train_steps", "rank", "report_to", "objective"])
    second = train("second", config=first / "training_config.json", **nothing)
    assert_same(lora(second), lora(first))
    records = [json.loads((folder / "training_config.json").read_text())["options"] for folder in (first, second)]
    assert records[0] == records[1] and records[0]["validation_prompts"] == prompts


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_rat: 1", "learning_rat"), ("help: true", "help"), ("random_flip: 2", "random_flip"),
        ("- rank", "by name"), ("rank: {a: 1}", "rank"), ("rank: [1, 2]", "rank"), ("rank: 0", "rank"),
        ("rank: [1", "options.yaml"), ("", "options.yaml"), ("loss_type: dpo", "loss_type"),
    ],
)  # fmt: skip
def test_what_is_refused(refused, no_models, tmp_path, text, named):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    assert named in refused(config=file, rank=None)


def test_a_file_that_is_not_there_or_not_text_is_refused(refused, no_models, tmp_path):
    (tmp_path / "options.json").write_bytes(b"\xff\xfe{")
    for file in ("options.json", "nothing.yaml", ""):
        assert refused(config=tmp_path / file).startswith(f"--config {tmp_path / file}: ")

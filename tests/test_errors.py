"""What must be refused: exit code 2 and one line that names the option, before any weights load."""

import importlib.util
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ONE_THREAD, ROOT, assert_same, command_line, logged, lora, pair_rows, write_json, write_parquet
from datasets import ClassLabel, Dataset
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import train_inversion_dpo
from training_options import missing_folder
from training_utils import LOCK_FILE, LORA_FILE, PROCESSES, check_launcher

# The first option of each command line is the one that the message must name.
# fmt: off
COMMAND_LINES = [
    {"train_data_dir": None}, {"train_data_dir": "no/such/data"}, {"train_data_dir": "pyproject.toml"},
    {"dataset_name": "and --train_data_dir"}, {"dataset_name": "no-such/data", "train_data_dir": None},
    {"pretrained_model_name_or_path": "no/such/model"}, {"pretrained_model_name_or_path": "examples"},
    {"pretrained_model_name_or_path": None}, {"pretrained_model_name_or_path": "no-such/model", "revision": "v1"},
    {"output_dir": "pyproject.toml"}, {"output_dir": None},
    {"resume_from_checkpoint": "checkpoint-7"}, {"resume_from_checkpoint": "examples"},
    {"image_0_column": "left"}, {"image_1_column": "label_0"}, {"image_0_column": "caption"},
    {"label_column": "label"}, {"label_column": "caption"}, {"caption_column": "text"}, {"caption_column": "label_0"},
    {"strength_column": "certainty"}, {"strength_column": "caption"},
    {"winner_column": "jpg_0"}, {"winner_column": "chosen", "loser_column": "jpg_1"},
    {"max_train_samples": 0}, {"tie_policy": "keep"}, {"tie_policy": "soft", "loss_type": "hinge"},
    {"rank": 0}, {"rank": "many"}, {"lora_target_modules": ["to_z"]},
    {"reference": "init"}, {"reference": "policy"}, {"lora_init": "no/such/lora", "rank": None},
    {"lora_init": "examples", "rank": None}, {"lora_init": "README.md", "rank": None}, {"lora_init": "x", "rank": 8},
    {"validation_lora_scales": [-1]}, {"validation_lora_scales": []}, {"config": "no/such/file.yaml"},
    {"lora_target_modules": ["to_q", "to_k2"]}, {"lora_target_modules": ["to_q(("]}, {"lora_target_modules": ["norm"]},
    {"learning_rate": "nan"}, {"learning_rate": "-1e-4"}, {"beta_dpo": -1}, {"beta_dpo": "inf"},
    {"objective": "dpo"}, {"loss_type": "dpo"}, {"label_smoothing": 0.5}, {"label_smoothing": 0.1, "loss_type": "ipo"},
    {"proportion_empty_prompts": 1}, {"resolution": 100}, {"seed": 2**32}, {"dataloader_num_workers": -1},
    {"train_batch_size": 0}, {"gradient_accumulation_steps": 0}, {"max_train_steps": 1.5}, {"adam_beta2": 1},
    {"checkpointing_steps": 0}, {"checkpoints_total_limit": 0}, {"lr_scheduler": "piecewise_constant"},
    {"lr_warmup_steps": 1}, {"timesteps_per_pair": 0}, {"inversion_steps": 3},
    {"min_timestep": 500, "max_timestep": 400}, {"max_timestep": 1000}, {"timesteps_subset": [999, 1000, 1, 2]},
    {"timesteps_subset": [999, 1]}, {"timesteps_subset": [9, 99, 399, 999], "min_timestep": 1},
    {"inversion_model": "policy", "objective": "diffusion_dpo"},
    {"inversion_model": "policy", "inversion_cache_dir": "cache"}, {"precompute_only": True}, {"cached_draws": 0},
    {"mixed_precision": "fp16"}, {"mixed_precision": "fp8"}, {"quantize_base": "nf4"}, {"quantize_base": "int4"},
    {"enable_xformers_memory_efficient_attention": True}, {"report_to": "nothing"}, {"report_to": "dvclive"},
    {"validation_steps": 0}, {"validation_guidance_scale": -1}, {"num_validation_images": 0},
    {"push_to_hub": True}, {"push_to_hub": True, "hub_model_id": "not a name"},
    {"streaming": True}, {"learning_rat": 1e-4}, {"lora_alpha": 8}, {"hub_token": "x"},  # not there, or not any more
    {"winner_column": "jpg_0", "loser_column": "jpg_1", "label_column": "label_1"},
    {"output_dir": "data/lora", "train_data_dir": "data"}, {"inversion_cache_dir": "data", "train_data_dir": "data"},
]
# fmt: on


@pytest.mark.parametrize("options", COMMAND_LINES, ids=lambda options: "-".join(command_line(**options))[:60])
def test_command_lines(refused, no_models, monkeypatch, options):
    monkeypatch.chdir(ROOT)
    message = refused(**options)
    assert f"--{next(iter(options))}" in message
    assert "weights were loaded" not in message


@pytest.mark.parametrize("split", ["nowhere", "train[:0]", "train["])
def test_splits(refused, no_models, split):
    assert "--train_data_dir" in refused(dataset_split_name=split)


def test_what_is_not_installed(refused, no_models, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for option, value in {"use_8bit_adam": True, "quantize_base": "nf4"}.items():
        assert f"--{option}" in (message := refused(**{option: value})) and "pip install bitsandbytes" in message


@pytest.mark.parametrize("way", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_launchers_that_shard_the_model(refused, no_models, monkeypatch, way):
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    assert "not supported" in refused()


def unet(**changes):
    return lambda folder: write_json(folder / "unet" / "config.json", **changes)


def scheduler(**changes):
    return lambda folder: write_json(folder / "scheduler" / "scheduler_config.json", **changes)


def cut_short(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:40])


def remove(name):
    return lambda folder: shutil.rmtree(folder / name)


def dit(folder):
    (folder / "unet").rename(folder / "transformer")
    write_json(folder / "model_index.json", _class_name="PixArtAlphaPipeline")


MODELS = {
    "prediction_type": scheduler(prediction_type="sample"),
    "beta_schedule": scheduler(beta_schedule="unheard of"),
    "edm": scheduler(_class_name="EDMEulerScheduler"),
    "flow": scheduler(_class_name="FlowMatchEulerDiscreteScheduler"),
    "unknown_sampler": scheduler(_class_name="UnheardScheduler"),
    "sdxl": unet(addition_embed_type="text_time"),
    "image_prompt": unet(encoder_hid_dim_type="image_proj"),
    "inpainting": unet(in_channels=9),
    "dit": dit,
    "damaged_config": cut_short("unet/config.json"),
    "no_vae": remove("vae"),
    "no_scheduler": remove("scheduler"),
}


@pytest.mark.parametrize("damage", MODELS.values(), ids=MODELS)
def test_unsuitable_and_damaged_models(refused, no_models, tiny_model, tmp_path, damage):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    damage(folder)
    message = refused(pretrained_model_name_or_path=folder)
    assert f"--pretrained_model_name_or_path {folder}" in message and "weights were loaded" not in message


def test_another_vae_that_does_not_exist_is_named(refused, no_models):
    assert "no-such-vae" in refused(pretrained_vae_model_name_or_path="no-such-vae")


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_damaged_weights(refused, tiny_model, tmp_path, name):
    """Known only when they are loaded."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    cut_short(name)(folder)
    assert f"--pretrained_model_name_or_path {folder}" in refused(pretrained_model_name_or_path=folder)


DATA = {
    "ties": {"label_0": 0.5},
    "no_labels": {"label_0": float("nan")},
    "other_labels": {"label_0": 2.0},
    "not_images": {"jpg_0": b"not an image"},
    "no_images": {"jpg_1": b""},
    "no_captions": {"caption": " "},
}


@pytest.mark.parametrize("change", DATA.values(), ids=DATA)
def test_data_without_a_usable_pair(refused, no_models, tmp_path, change):
    rows = [{**row, **change} for row in pair_rows(4)]
    message = refused(train_data_dir=write_parquet(rows, tmp_path / "data"))
    assert "4 rows" in message


def test_labels_that_are_names_are_refused_since_their_numbers_are_in_any_order(refused, no_models, tmp_path):
    rows = Dataset.from_list([{**row, "label_0": 1} for row in pair_rows(2)])
    (tmp_path / "data").mkdir()
    rows.cast_column("label_0", ClassLabel(names=["left", "right"])).to_parquet(tmp_path / "data" / "train.parquet")
    assert "--label_column label_0" in refused(train_data_dir=tmp_path / "data")


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing else"], ids=["empty", "damaged"])
def test_a_damaged_parquet_file(refused, no_models, tmp_path, content):
    folder = write_parquet(pair_rows(4), tmp_path / "data")
    next(folder.glob("*.parquet")).write_bytes(content)
    assert f"--train_data_dir {folder}" in refused(train_data_dir=folder)


@pytest.mark.parametrize("name", [LORA_FILE, "README.md", "training_config.json", "metrics.jsonl"])
def test_an_output_dir_in_use_is_refused_and_kept(refused, no_models, tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_bytes(b"precious")
    for options in ({}, {"resume_from_checkpoint": "latest"}):
        message = refused(**options)
        assert f"--output_dir {folder}" in message and name in message
    assert (folder / name).read_bytes() == b"precious" and [path.name for path in folder.iterdir()] == [name]


def test_what_may_not_be_resumed(train, refused, tmp_path, caplog):
    """Other data, another LoRA, objective or way to find the targets. Other differences are named in a warning."""
    output_dir = train(max_train_steps=1)
    before, resume = lora(output_dir), {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    assert f"--output_dir {output_dir}" in refused() and (output_dir / LOCK_FILE).exists()
    others = {"rank": 8, "objective": "inpo", "lora_target_modules": ["to_q"]}
    others["inversion_cache_dir"] = tmp_path / "cache"
    others |= {"max_train_samples": 7, "num_eval_pairs": 1, "use_8bit_adam": True}
    others["train_data_dir"] = write_parquet(pair_rows(7), tmp_path / "fewer")
    for name, value in others.items():
        message = refused(**{name: value}, **resume)
        assert "--resume_from_checkpoint" in message and (name == "train_data_dir" or name in message)
    assert_same(before, lora(output_dir))
    train("held", max_train_samples=7, max_train_steps=1)
    assert "max_train_samples is None" in refused(output="held", num_eval_pairs=1, **resume)  # 7 of 8, too
    train(seed=1, **resume)
    assert any("--seed 1" in record.getMessage() for record in caplog.records if record.levelname == "WARNING")


def test_the_process_ends_with_2_one_line_and_no_traceback(tiny_model, pairs_dir, tmp_path):
    """The one from which a shell script learns it; --label_column is known to be wrong only late."""
    options = command_line(
        pretrained_model_name_or_path=tiny_model, train_data_dir=pairs_dir, output_dir=tmp_path / "run",
        label_column="better",
    )  # fmt: skip
    command = [sys.executable, ROOT / "train_inversion_dpo.py", *options, "--resolution", "32"]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert done.returncode == 2 and len(lines) == 1 and "--label_column better" in lines[0], done.stderr
    assert not (tmp_path / "run").exists()
    assert "Traceback" not in done.stderr and lines[0] == done.stderr.splitlines()[-1] and not done.stdout


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--learning_rat", "1"], "--learning_rate"), (["-learning_rate", "1"], "--learning_rate"),
        (["--Rank", "4"], "--rank"), (["--validation_prompt", "a"], "--validation_prompts"),
        (["\u2013rank", "4"], "--rank"), (["--gradient_checkpointing", "true"], "--no-gradient_checkpointing"),
        (["--random_flip=False"], "--no-random_flip"), (["--train_data_dir", ""], "--train_data_dir is empty"),
        (["--output_dir="], "--output_dir is empty"),
        (["--config", "options.yaml"], "learning_rate"),
    ],
)  # fmt: skip
def test_what_was_meant_is_offered(words, meant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.yaml").write_text("learning_rates: 1")
    with pytest.raises(SystemExit) as stop:
        train_inversion_dpo.parse_args(words)
    *_, usage, line = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and meant in line and "--train_data_dir" in usage


def test_a_web_address_is_no_name_of_a_dataset(refused, no_models):
    assert "user/name" in refused(train_data_dir=None, dataset_name="https://hub/datasets/user/name")


def test_dashes_stand_for_underscores():
    required = ["--pretrained-model-name-or-path", "m", "--train-data-dir=d", "--output_dir", "o"]
    args = train_inversion_dpo.parse_args([*required, "--no-random-flip", "--max-train-steps", "3"])[0]
    assert (args.max_train_steps, args.random_flip, args.train_data_dir) == (3, False, "d")


@pytest.mark.parametrize(
    ("value", "is_path"),
    [
        ("/no/such", True), ("./no", True), ("~/no/such", True), ("a\\b", True), ("a/b/c", True),
        ("user/model-1.5", False), ("model", False), ("tests", False),
    ],
)  # fmt: skip
def test_a_path_is_told_from_a_hub_id(value, is_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert bool(missing_folder(value)) == is_path


def test_the_nearest_folder_is_offered(tmp_path, monkeypatch):
    (tmp_path / "models" / "my-model" / "unet").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for value in (tmp_path / "models" / "my-modle", "./models/my-modle", f"{tmp_path}/modles/my-model"):
        assert missing_folder(str(value)).endswith("models/my-model?")
    assert missing_folder("models/my-modle") == ""  # may be on the Hub
    assert missing_folder("models/my-modle", was_asked_for=True).endswith("models/my-model?")
    assert missing_folder("user/model", was_asked_for=True) == ""


@pytest.mark.parametrize(
    "option", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "train_data_dir", "lora_init"]
)
def test_a_mistyped_folder_is_not_sought_on_the_hub(refused, no_models, tiny_model, tmp_path, monkeypatch, option):
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the Hub was asked"))
    message = refused(**{option: f"{tmp_path}/nothing", "rank": None})
    assert message.startswith(f"--{option} {tmp_path}/nothing: no such folder")


@pytest.mark.parametrize("has_network", [True, False])
def test_a_model_that_is_not_on_the_hub(refused, no_models, monkeypatch, tmp_path, has_network):
    """Without a network that is said once, and nothing is tried again."""
    asked = []

    def model_info(*args, **options):
        asked.append(args)
        response = SimpleNamespace(headers={}, request=None)
        raise RepositoryNotFoundError("404: no such repository", response=response) if has_network else OSError("down")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    message = refused(pretrained_model_name_or_path="models/mien")
    assert len(asked) == 1 and message.startswith("--pretrained_model_name_or_path models/mien")
    assert ("models/mine?" if has_network else "cannot be reached") in message


# Launchers


@pytest.mark.parametrize("name", PROCESSES)
def test_two_processes_without_a_group_are_refused(refused, no_models, monkeypatch, name):
    """Each would be a whole run."""
    monkeypatch.setenv(name, "2")
    assert f"2 processes were started ({name})" in refused()


def test_what_does_not_prove_a_second_process(train, monkeypatch):
    """One node's share, an allocation of which this is one step's one process, and a launcher that says one."""
    for name, value in {"LOCAL_WORLD_SIZE": "2", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    train(max_train_steps=1)
    check_launcher({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}, 4)  # two nodes


def test_precisions_that_only_the_environment_asks_for(refused, no_models, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "fp8" in refused() or "accelerate" in refused()


# Schedules


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-7}, "--lr_scheduler polynomial"),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}, "--lr_warmup_steps is 2"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 500}, "--lr_warmup_steps is 500"),
    ],
)
def test_schedules_that_come_to_nothing(refused, no_models, options, named):
    assert named in refused(**options)


# Models that are not whole


def change_weights(folder, part, change):
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    change(
        weights, sorted(name for name in weights if weights[name].is_floating_point() and weights[name].ndim > 1)[0]
    )
    save_file(weights, file, {"format": "pt"})


CHANGES = {
    "missing": lambda weights, name: weights.pop(name),
    "foreign": lambda weights, name: weights.update({f"model.{key}": weights.pop(key) for key in list(weights)}),
    "shape": lambda weights, name: (
        weights.update({name: weights[name][:1].repeat(2 * len(weights[name]), 1)})
        if weights[name].ndim == 2
        else weights.pop(name)
    ),
    "nan": lambda weights, name: weights[name].view(-1)[:1].fill_(float("nan")),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_part_that_is_not_whole_is_named(refused, tiny_model, tmp_path, part, kind):
    """It would train on random text states and exit with 0, or end with a traceback of meta tensors."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    change_weights(folder, part, CHANGES[kind])
    message = refused(pretrained_model_name_or_path=folder)
    assert message.startswith(f"--pretrained_model_name_or_path {folder}: {part}")
    assert "not finite" in message if kind == "nan" else "lacks" in message or "another shape" in message


def test_weights_that_nobody_uses_are_only_named(train, tiny_model, tmp_path, caplog):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    change_weights(folder, "unet", lambda weights, name: weights.update({"extra.weight": torch.ones(2)}))
    weights = lora(train(pretrained_model_name_or_path=folder, max_train_steps=1))
    assert_same(weights, lora(train("plain", max_train_steps=1)))
    lines = [record.getMessage() for record in caplog.records if "extra.weight" in record.getMessage()]
    assert sum("--pretrained_model_name_or_path" in line for line in lines) == 1


def test_another_vae_is_blamed_by_its_own_option(refused, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model / "vae", tmp_path / "vae")
    for damage in (lambda: change_weights(tmp_path, "vae", CHANGES["missing"]), (folder / "config.json").unlink):
        damage()
        assert refused(pretrained_vae_model_name_or_path=folder).startswith(
            f"--pretrained_vae_model_name_or_path {folder}"
        )


@pytest.mark.first_look
@pytest.mark.parametrize("said", ["epsilon", "v_prediction"])
def test_a_wrong_prediction_type_is_noticed_and_can_be_put_right(train, tmp_path, caplog, said):
    """On a model that was trained; the small world's predicts epsilon."""
    folder = shutil.copytree(ROOT / "examples" / "small_world_model", tmp_path / "model")
    write_json(folder / "scheduler" / "scheduler_config.json", prediction_type=said)
    options = {"pretrained_model_name_or_path": folder, "resolution": 64, "objective": "diffusion_dpo"}
    options |= {"max_train_steps": 1, "lora_target_modules": ["to_q"]}
    wrong = train("as it is said", **options)
    warned = [record.getMessage() for record in caplog.records if "--prediction_type" in record.getMessage()]
    assert len(warned) == (said != "epsilon") and all("epsilon" in line for line in warned)
    right = train("as it is", prediction_type="epsilon", **options)
    assert len(warned) == sum("--prediction_type" in record.getMessage() for record in caplog.records)
    errors = [logged(run, "reference_error")[0] for run in (right, wrong)]
    assert errors[0] == errors[1] if said == "epsilon" else errors[0] < errors[1]

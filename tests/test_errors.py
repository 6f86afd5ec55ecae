"""Wrong command lines and broken inputs: one line that names culprit and remedy, exit code 2, before weights load."""

import shutil

import pytest
from conftest import pair_rows, write_json, write_parquet
from datasets import Dataset, Image

from inversion_utils import LORA_FILE


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train_data_dir": None}, ["--dataset_name", "--train_data_dir"]),
        ({"dataset_name": "x"}, ["--dataset_name", "--train_data_dir"]),
        ({"rank": 0}, ["--rank", "0", "at least 1"]),
        ({"rank": "many"}, ["--rank", "many"]),
        ({"lora_alpha": 0}, ["--lora_alpha", "0", "above 0"]),
        ({"learning_rate": "nan"}, ["--learning_rate", "nan"]),
        ({"beta_dpo": -1}, ["--beta_dpo", "-1", "above 0"]),
        ({"train_batch_size": 0}, ["--train_batch_size", "0", "at least 1"]),
        ({"proportion_empty_prompts": 1.5}, ["--proportion_empty_prompts", "1.5"]),
        ({"label_smoothing": 0.5}, ["--label_smoothing", "0.5", "below 0.5"]),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, ["--label_smoothing", "sigmoid", "ipo"]),
        ({"loss_type": "dpo"}, ["--loss_type", "dpo", "sigmoid"]),
        ({"resolution": 100}, ["--resolution", "100", "8"]),
        ({"seed": 2**32}, ["--seed", str(2**32), "at most"]),
        ({"lr_scheduler": "piecewise_constant"}, ["--lr_scheduler", "piecewise_constant", "cosine"]),
        ({"lr_warmup_steps": 1}, ["--lr_warmup_steps", "constant_with_warmup"]),
        ({"lr_warmup_steps": 5, "lr_scheduler": "linear"}, ["--lr_warmup_steps is 5", "--max_train_steps 2"]),
        ({"objective": "diffusion_dpo", "inversion_steps": 9}, ["--inversion_steps", "diffusion_dpo"]),
        ({"mixed_precision": "fp16"}, ["--mixed_precision fp16", "GPU", "bf16"]),
        ({"inversion_steps": 3}, ["--inversion_steps", "3", "4"]),
        ({"inversion_guidance_scale": 0.5}, ["--inversion_guidance_scale", "0.5", "at least 1"]),
        ({"min_timestep": 500, "max_timestep": 400}, ["--min_timestep 500", "--max_timestep 400"]),
        ({"max_timestep": 1000}, ["--max_timestep 1000", "999"]),
        ({"report_to": "nothing"}, ["--report_to", "nothing", "tensorboard"]),
        ({"report_to": "dvclive"}, ["--report_to dvclive", "pip install dvclive"]),
        ({"enable_xformers_memory_efficient_attention": True}, ["xformers", "pip install xformers"]),
        ({"timesteps_subset": [999, 1000, 1, 2]}, ["--timesteps_subset", "1000", "999"]),
        ({"timesteps_subset": [999, 1]}, ["--timesteps_subset", "--timesteps_per_pair 4"]),
        ({"timesteps_subset": [9], "min_timestep": 1, "objective": "inpo"}, ["--timesteps_subset", "--min_timestep"]),
        ({"lora_target_modules": ["to_z"]}, ["--lora_target_modules to_z"]),
        ({"lora_target_modules": ["to_q", "to_kk"]}, ["--lora_target_modules to_q to_kk", "called to_kk"]),
        ({"lora_target_modules": ["to_q(("]}, ["--lora_target_modules to_q(("]),
        ({"lora_target_modules": ["norm1"]}, ["--lora_target_modules norm1", "not supported"]),
        ({"train_text_encoder": True}, ["--train_text_encoder", "out of scope"]),
        ({"validation_steps": 5}, ["--validation_steps", "--validation_prompts"]),
        ({"num_validation_images": 1}, ["--num_validation_images", "--validation_prompts"]),
        ({"validation_prompts": ["x"], "validation_guidance_scale": -1}, ["--validation_guidance_scale", "least 0"]),
        ({"hub_model_id": "me/lora"}, ["--hub_model_id", "--push_to_hub"]),
        ({"hub_private_repo": True}, ["--hub_private_repo", "--push_to_hub"]),
        ({"hub_token": "hf_secret"}, ["--hub_token", "--push_to_hub"]),
        ({"hub_token": "hf_secret", "push_to_hub": True, "report_to": "wandb"}, ["--hub_token", "wandb", "hf auth"]),
        ({"push_to_hub": True, "hub_model_id": "not a name"}, ["--push_to_hub", "not a name"]),
        ({"push_to_hub": True}, ["--push_to_hub", "HF_HUB_OFFLINE"]),
        ({"resume_from_checkpoint": "checkpoint-7"}, ["--resume_from_checkpoint", "checkpoint-7", "latest"]),
        ({"pretrained_model_name_or_path": "no/such/model"}, ["--pretrained_model_name_or_path no/such/model"]),
        ({"pretrained_vae_model_name_or_path": "no-vae"}, ["no usable vae (no-vae)"]),
        ({"train_data_dir": "no/such/data"}, ["--train_data_dir no/such/data", "no such folder"]),
        ({"train_data_dir": None, "dataset_name": "no-such/data"}, ["--dataset_name no-such/data", "be loaded"]),
        ({"dataset_split_name": "nowhere"}, ["nowhere", "cannot be loaded"]),
        ({"image_0_column": "left"}, ["--image_0_column left", "jpg_0"]),
        ({"caption_column": "text"}, ["--caption_column text", "caption"]),
        ({"label_column": "label"}, ["--label_column label", "label_0"]),
        ({"label_column": "caption"}, ["no pair is left", "--label_column caption", "a red circle"]),
        ({"image_1_column": "label_0"}, ["--image_1_column label_0", "float64", "images"]),
        ({"caption_column": "label_0"}, ["--caption_column label_0", "float64", "text"]),
        ({"output_dir": "pyproject.toml"}, ["--output_dir pyproject.toml", "cannot be written"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_command_lines(refused, no_models, monkeypatch, request, options, named):
    monkeypatch.chdir(request.config.rootpath)
    message = refused(**options)
    assert all(text in message for text in named), message
    assert "hf_secret" not in message


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


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (scheduler(prediction_type="sample"), "'sample'"),
        (scheduler(beta_schedule="unheard of"), "unheard of"),
        (scheduler(_class_name="EDMEulerScheduler"), "EDMEulerScheduler"),
        (scheduler(_class_name="FlowMatchEulerDiscreteScheduler"), "flow"),
        (scheduler(_class_name="UnheardScheduler"), "no scheduler UnheardScheduler"),
        (unet(addition_embed_type="text_time"), "SDXL"),
        (unet(encoder_hid_dim_type="image_proj"), "encoder_hid_dim_type"),
        (unet(in_channels=9), "takes 9 channels"),
        (dit, "PixArtAlphaPipeline"),
        (cut_short("unet/config.json"), "config"),
        (remove("vae"), "vae"),
        (remove("scheduler"), "scheduler"),
    ],
    ids=["prediction_type", "beta_schedule", "edm", "flow", "sampler", "sdxl", "image_prompt", "inpainting", "dit",
         "damaged_config", "no_vae", "no_scheduler"],
)  # fmt: skip
def test_unsuitable_and_damaged_models(refused, no_models, tiny_model, tmp_path, damage, named):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    damage(folder)
    message = refused(pretrained_model_name_or_path=folder)
    assert f"--pretrained_model_name_or_path {folder}" in message and named in message


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_damaged_weights(refused, tiny_model, tmp_path, name):
    """Known only when they are loaded."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    cut_short(name)(folder)
    assert f"--pretrained_model_name_or_path {folder} cannot be loaded" in refused(
        pretrained_model_name_or_path=folder
    )


def ties(rows):
    return [{**row, "label_0": 0.5} for row in rows]


def not_images(rows):
    return [{**row, "jpg_0": b"not an image"} for row in rows]


def no_captions(rows):
    return [{**row, "caption": " "} for row in rows]


def nan_labels(rows):
    return [{**row, "label_0": float("nan")} for row in rows]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (ties, "no pair is left of 4 rows: 4 ties"),
        (nan_labels, "no pair is left of 4 rows: 0 ties; 4 with no label (the first: row 0, no label)"),
        (lambda rows: [], "cannot be loaded"),
        (not_images, "unreadable"),
        (no_captions, "4 with no caption (the first: row 0, no caption: it is ' ')"),
    ],
    ids=["ties", "nan_labels", "empty", "not_images", "no_captions"],
)
def test_data_without_a_usable_pair(refused, no_models, tmp_path, change, named):
    rows, features = change(pair_rows(4)), Dataset.from_list(pair_rows(1)).features
    rows = Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    assert named in refused(train_data_dir=tmp_path / "data")


def test_a_damaged_parquet_file(refused, no_models, tmp_path):
    folder = write_parquet(pair_rows(4), tmp_path / "data")
    file = next(folder.glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-20])
    assert f"--train_data_dir {folder}" in refused(train_data_dir=folder)


def test_columns_of_images_texts_and_structs_are_what_images_may_be_in(train, tmp_path):
    rows = pair_rows(4)
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.png").write_bytes(row["jpg_0"])
        row["jpg_0"] = str(tmp_path / f"{i}.png")
        row["jpg_1"] = {"bytes": row["jpg_1"], "path": None}
    train("structs", train_data_dir=write_parquet(rows, tmp_path / "structs"), max_train_steps=1)
    (tmp_path / "images").mkdir()
    images = Dataset.from_list(rows).cast_column("jpg_0", Image()).cast_column("jpg_1", Image())
    images.to_parquet(tmp_path / "images" / "train.parquet")
    train("images", train_data_dir=tmp_path / "images", max_train_steps=1)


def test_an_output_dir_in_use_is_refused_and_kept(refused, no_models, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (LORA_FILE, "README.md", "report.png", "training_config.json"):
        (folder / name).write_bytes(b"precious")
        message = refused()
        assert f"--output_dir {folder} holds {name} already" in message and "move it away" in message
        assert (folder / name).read_bytes() == b"precious"
        (folder / name).unlink()


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(train, tmp_path):
    """Pictures and logs of the attempt are in the folder; --resume_from_checkpoint latest begins at the start."""
    (tmp_path / "run" / "validation").mkdir(parents=True)
    (tmp_path / "run" / "validation" / "step-000001-prompt-0.png").write_bytes(b"")
    assert (train(resume_from_checkpoint="latest", max_train_steps=1) / LORA_FILE).exists()


def test_checkpoints_of_another_run(train, refused, tmp_path):
    train(max_train_steps=1)
    resume = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    message = refused(rank=8, **resume)
    assert "--rank is 8" in message and "was made with 4" in message
    assert "--seed is 1" in refused(seed=1, **resume)
    fewer = write_parquet(pair_rows(7), tmp_path / "fewer")
    assert "the data have 7 pairs" in refused(train_data_dir=fewer, **resume)
    (tmp_path / "run" / "checkpoint-1" / "training_state.json").write_text("{")
    assert "training_state.json is damaged" in refused(**resume)

"""A random Stable Diffusion pipeline of a few kilobytes, preference pairs on disk, and the script run in-process."""

import gc
import io
import json
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the client is imported

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import train_inversion_dpo
import train_inversion_dpo_sdxl
from training_utils import LORA_FILE, METRICS_FILE

torch.set_num_threads(1)
gc.freeze()  # what was imported is never garbage: each run's own collection then takes a tenth of the time

ROOT = Path(train_inversion_dpo.__file__).parent
ONE_THREAD = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # of processes that tests start
CAPTIONS = ["a red circle", "a blue square", "a green heart", "a yellow star"]


def build_parts(**scheduler_options):
    """The parts that tiny SD and SDXL pipelines share, and the arguments of their text encoders and U-Net."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=16)
    text_config = dict(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4, scaling_factor=1.0,
    )  # fmt: skip
    unet_config = dict(
        sample_size=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, **scheduler_options,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "vae": vae, "scheduler": scheduler}, text_config, unet_config


def build_pipeline(**scheduler_options):
    parts, text_config, unet_config = build_parts(**scheduler_options)
    return StableDiffusionPipeline(
        **parts, unet=UNet2DConditionModel(**unet_config, cross_attention_dim=16),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def build_sdxl_pipeline(**scheduler_options):
    parts, text_config, unet_config = build_parts(**scheduler_options)
    unet = UNet2DConditionModel(
        **unet_config, cross_attention_dim=16 + 24, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 6 * 8,
    )  # fmt: skip
    second = CLIPTextConfig(**{**text_config, "hidden_size": 24, "projection_dim": 12})
    return StableDiffusionXLPipeline(
        **parts, tokenizer_2=parts["tokenizer"], unet=unet, text_encoder=CLIPTextModel(CLIPTextConfig(**text_config)),
        text_encoder_2=CLIPTextModelWithProjection(second), add_watermarker=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of an epsilon-prediction SD pipeline with random weights: 32 px pictures, 4 x 4 latents."""
    folder = tmp_path_factory.mktemp("tiny_model")
    build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_v_model(tmp_path_factory):
    """The same as `tiny_model`, with v-prediction and zero terminal SNR."""
    folder = tmp_path_factory.mktemp("tiny_v_model")
    build_pipeline(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(folder)
    return folder


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def random_image(rng, size=(40, 32)):
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def pair_rows(num_rows=8, seed=0):
    """Rows in Pick-a-Pic's columns; winners are bright and losers dark, on either side."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        image = np.asarray(random_image(rng), dtype=float)
        bright, dark = (encode(Image.fromarray(x.astype(np.uint8))) for x in (127 + image / 2, image / 2))
        first_wins = int(rng.integers(2))
        jpg_0, jpg_1 = (bright, dark) if first_wins else (dark, bright)
        rows.append({"jpg_0": jpg_0, "jpg_1": jpg_1, "label_0": float(first_wins), "caption": CAPTIONS[i % 4]})
    return rows


def write_parquet(rows, folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(Path(folder) / "train-00000.parquet")
    return folder


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory):
    return write_parquet(pair_rows(), tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def tiny_sdxl_model(tmp_path_factory):
    """Folder of an epsilon-prediction SDXL pipeline with random weights: 32 px pictures, 4 x 4 latents."""
    folder = tmp_path_factory.mktemp("tiny_sdxl_model")
    build_sdxl_pipeline().save_pretrained(folder)
    return folder


def command_line(**options):
    """The words of a command line: options by keyword, flags as True, lists as several words, None left out."""
    words = []
    for name, value in options.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def lora(output_dir):
    return load_file(output_dir / LORA_FILE)


def assert_same(a, b, atol=0.0):
    """Two state dicts hold the same weights."""
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=atol)


def logged(output_dir, name):
    """A metric of a run, a number a step."""
    return [json.loads(line)[name] for line in (output_dir / METRICS_FILE).read_text().splitlines()]


@pytest.fixture(autouse=True)
def without_a_first_look(request, monkeypatch):
    """Spares runs the two calls that tell what a model predicts: here, models are random and calls are counted."""
    if not request.node.get_closest_marker("first_look"):
        for script in (train_inversion_dpo, train_inversion_dpo_sdxl):
            monkeypatch.setattr(script, "check_prediction_type", lambda *_: None)


@pytest.fixture
def script():
    """The training script under test; the SDXL script's tests replace it, and `tiny_model`."""
    return train_inversion_dpo


@pytest.fixture
def train(script, tiny_model, pairs_dir, tmp_path, monkeypatch):
    """Runs the script's main with small settings and returns --output_dir; options by keyword, flags as True."""

    def run(output="run", **options):
        output_dir = tmp_path / output
        defaults = {
            "pretrained_model_name_or_path": tiny_model, "train_data_dir": pairs_dir, "output_dir": output_dir,
            "resolution": 32, "train_batch_size": 2, "max_train_steps": 2, "rank": 4, "report_to": "none",
            "objective": "inversion_dpo",  # of the three the one with the most parts
        }  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["train.py", *command_line(**{**defaults, **options})])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        script.main(*script.parse_args())
        return output_dir

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield run
    for number, handler in handlers.items():  # which a run that failed has not restored
        signal.signal(number, handler)


@pytest.fixture
def refused(train, capsys):
    """Runs the script with options that it must refuse, and returns the one line that follows its usage."""

    def run(**options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train(**options)
        assert stop.value.code == 2
        *_, usage, message = capsys.readouterr().err.strip().splitlines()
        assert usage.startswith("usage: ") and ": error: " in message
        return message.split(": error: ", 1)[1]

    return run


@pytest.fixture
def loss_scaling(script, monkeypatch):
    """Gives fp16 on the CPU what accelerate gives it only on a GPU: autocast and a loss scaler; returns scalers."""
    scalers = []

    def accelerator(**options):
        accelerator = Accelerator(**options)
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
        scalers.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(script, "Accelerator", accelerator)
    return scalers


@pytest.fixture
def no_models(script, monkeypatch):
    """Makes loading any weights a failure."""

    def load(*args, **kwargs):
        pytest.fail("weights were loaded")  # which no `except Exception` catches

    monkeypatch.setattr(script, "load_denoiser", load)
    monkeypatch.setattr(script, "load_encoders", load)


def write_json(path, **changes):
    """Changes entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

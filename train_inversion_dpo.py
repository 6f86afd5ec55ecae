#!/usr/bin/env python
# /// script
# dependencies = [
#     "torch>=2.13.0",
#     "diffusers>=0.42.0",
#     "transformers>=5.23.0",
#     "accelerate>=1.15.0",
#     "peft>=0.21.0",
#     "datasets>=5.2.0",
#     "safetensors>=0.8.0",
#     "numpy>=2.0",
#     "pillow>=11.0",
#     "filelock>=4.3",
#     "huggingface_hub>=2.4",
#     "tensorboard>=2.20",
#     "pyyaml>=6.0",
# ]
# ///
"""Aligns Stable Diffusion 1.5 / 2.x with preference pairs: a LoRA by inversion-based DPO.

    accelerate launch train_inversion_dpo.py \
        --pretrained_model_name_or_path=... --dataset_name=... --output_dir=...

Each step: 1 encode winner, loser and caption; 2 invert both images with the reference policy (the model without its
LoRA) to a few timesteps, which yields the noise that belongs to each image; 3 the reference's errors there, which the
inversion knows already; 4 the policy's errors at the same states, and the DPO loss on both. A cache keeps 1 to 3.

Against the papers: 1 the target is the noise implied by the image, not the reference's prediction (with which a LoRA
never starts to move); 2 the latent is inverted to exactly the timestep it is trained at; 3 a LoRA is trained, not the
whole model. examples/docs/method.md explains each.

Needs `inversion_utils.py`, `training_utils.py` and `training_options.py` beside it, nothing else.
"""

import argparse
import contextlib
import datetime
import logging
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from training_options import LORA_TARGETS, LOSS_TYPES, LR_SCHEDULERS, TRACKERS, Parser, check_options, number


def parse_args(argv=None):
    parser = Parser(
        description="Align Stable Diffusion 1.5 / 2.x with preference pairs by inversion-based DPO.",
        usage="%(prog)s --pretrained_model_name_or_path M --train_data_dir D --output_dir O [options, see --help]",
    )
    count, natural, positive = number(int, least=1), number(int, least=0), number(float, above=0)
    fraction, scale, path = number(float, least=0, below=1), number(float, least=0), os.path.expanduser
    flag = {"action": argparse.BooleanOptionalAction, "default": False}

    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", type=path, required=True, help="Hub id or folder of the model to align")
    add("--pretrained_vae_model_name_or_path", type=path, help="another VAE than the model's own")
    add("--revision", help="revision of the model on the Hub")
    add("--variant", help="variant of the model's files, such as fp16")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="what the model predicts (its scheduler's)")
    add("--cache_dir", type=path, help="folder for downloads")
    add("--config", type=path, help="options in YAML, or a run's training_config.json; the command line wins")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", type=path, help="preference pairs: whatever datasets.load_dataset takes")
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split_name", default="train", help="split to train on")
    add("--train_data_dir", type=path, help="a local folder instead, such as examples/convert_pairs.py writes")
    add("--image_0_column", default="jpg_0", help="column of the first image")
    add("--image_1_column", default="jpg_1", help="column of the second image")
    add("--label_column", default="label_0", help="column: 1 if image 0 is better, 0 if image 1 is, 0.5 for a tie")
    add("--winner_column", help="instead of a label: column of the better image")
    add("--loser_column", help="column of the worse image")
    add("--caption_column", default="caption", help="column of captions, or of lists from which each visit takes one")
    add("--strength_column", help="column of how certain a preference is, 0 to 1; higher counts more")
    add("--tie_policy", choices=["drop", "soft"], default="drop", help="leave ties out, or teach no preference")
    add("--max_train_samples", type=count, help="use only the first N pairs")
    add("--resolution", type=count, default=512, help="pixels of a side; higher is slower and takes more memory")
    add("--random_crop", **flag, help="crop at random, winner and loser alike, instead of at the centre")
    add("--random_flip", **flag, help="mirror half of the pairs, winner and loser alike")
    add("--proportion_empty_prompts", type=fraction, default=0.0, help="share of captions emptied; the papers use 0.2")
    add("--dataloader_num_workers", type=natural, default=0, help="processes that load images; 0: the main one")

    add = parser.add_argument_group("objective and inversion").add_argument
    add("--objective", choices=["inpo", "inversion_dpo", "diffusion_dpo"], default="inpo",
        help="what is compared: single inverted states, the mean over an inversion trajectory, or plain forward noise")
    add("--timesteps_per_pair", type=count, help="more are steadier and slower (4 for inversion_dpo, else 1)")
    add("--min_timestep", type=natural, default=0, help="lowest training timestep")
    add("--max_timestep", type=natural, help="highest training timestep; high ones teach layout, not detail")
    add("--timesteps_subset", type=natural, nargs="+", help="only these, such as a distilled model's own")
    add("--trajectory_chunk", type=count, default=4, help="timesteps per policy call; fewer take less memory")
    add("--inversion_steps", type=count, help="model calls; more are more exact (timesteps_per_pair + 4)")
    add("--inversion_model", choices=["reference", "policy"], default="reference", help="the policy cannot be cached")
    add("--beta_dpo", type=positive, default=2000.0,
        help="higher stays closer to the reference; the loss has beta / 2: 5000 is 2500 in diffusers' SD script")
    add("--loss_type", choices=LOSS_TYPES, default="sigmoid", help="loss on the difference of winner and loser")
    add("--label_smoothing", type=number(float, least=0, below=0.5), default=0.0, help="share of mislabelled pairs")

    add = parser.add_argument_group("cache of what training does not change, for runs of several epochs").add_argument
    add("--inversion_cache_dir", type=path, help="folder for latents, noise, reference errors and text embeddings")
    add("--cached_draws", type=count, default=4, help="variants of a pair, one an epoch; more take more disk")
    add("--precompute_only", **flag, help="fill the cache with all draws of all pairs, train nothing")

    add = parser.add_argument_group("LoRA and optimization").add_argument
    add("--rank", type=count, default=16, help="rank of the LoRA, also its alpha; higher learns and takes more memory")
    add("--lora_target_modules", nargs="+", default=list(LORA_TARGETS), help="ends of names, or a regular expression")
    add("--lora_init", type=path, help="LoRA to go on from, which decides rank and targets: path or Hub id")
    add("--reference", choices=["base", "init"], default="base", help="the base model without or with --lora_init")
    add("--learning_rate", type=positive, default=1e-4, help="learning rate after warm-up")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="schedule of the learning rate")
    add("--lr_warmup_steps", type=natural, default=0, help="steps over which the learning rate rises from 0")
    add("--train_batch_size", type=count, default=4, help="pairs per process and forward; more take more memory")
    add("--gradient_accumulation_steps", type=count, default=1, help="batches per step; more are steadier and slower")
    add("--num_train_epochs", type=count, default=1, help="passes over the pairs, if --max_train_steps is not given")
    add("--max_train_steps", type=count, help="optimizer steps in all, instead of --num_train_epochs")
    add("--use_8bit_adam", **flag, help="Adam with 8-bit states, by bitsandbytes")
    add("--adam_beta1", type=fraction, default=0.9, help="decay of Adam's mean; higher remembers longer")
    add("--adam_beta2", type=fraction, default=0.999, help="decay of Adam's variance; higher is smoother")
    add("--adam_weight_decay", type=fraction, default=1e-2, help="weight decay of the LoRA; higher keeps it smaller")
    add("--adam_epsilon", type=positive, default=1e-8, help="floor of Adam's denominator; higher makes smaller steps")
    add("--max_grad_norm", type=positive, default=1.0, help="norm to which gradients are clipped; lower is steadier")
    add("--gradient_checkpointing", **flag, help="less memory, about a third slower policy call")
    add("--quantize_base", choices=["nf4", "int8"], help="4 or 8 bits for frozen linear layers: less exact")
    add("--offload", **flag, help="keep VAE and text encoders in CPU memory between uses; slower")
    add("--compile", **flag, help="compile the model's blocks: slow first steps, faster others")
    add("--vae_encode_batch_size", type=count, default=8, help="images per VAE call; fewer take less memory")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="of the frozen parts (accelerate's setting)")
    add("--enable_xformers_memory_efficient_attention", **flag, help="xformers attention instead of SDPA")

    add = parser.add_argument_group("validation: pictures at scales of the LoRA, from the same seeds").add_argument
    add("--validation_prompts", nargs="+", help="prompts to sample, each in quotes; also sampled at the end")
    add("--validation_steps", type=count, default=100, help="steps between validations; fewer take more time")
    add("--validation_lora_scales", type=scale, nargs="+", default=[0.0, 1.0], help="columns; 0 is the base model")
    add("--num_eval_pairs", type=natural, default=0, help="pairs kept out of training, to watch the policy on")
    add("--eval_steps", type=count, default=100, help="steps between looks at these; fewer take more time")
    add("--num_validation_images", type=count, default=4, help="samples per prompt; more show more and take time")
    add("--validation_inference_steps", type=count, default=30, help="sampler steps; more are finer and slower")
    add("--validation_guidance_scale", type=scale, default=7.5, help="higher obeys the prompt more and varies less")

    add = parser.add_argument_group("Hugging Face Hub").add_argument
    add("--push_to_hub", **flag, help="upload LoRA, card, pictures and configuration at the end")
    add("--hub_model_id", help="repository, as user/name (the name of --output_dir)")
    add("--hub_private_repo", **flag, help="create the repository as a private one")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=path, required=True, help="folder for the LoRA, checkpoints, pictures and logs")
    add("--output_kohya_format", **flag, help="also write a file for ComfyUI, Forge, AUTOMATIC1111, sd-scripts")
    add("--seed", type=number(int, least=0, most=2**32 - 1), default=0, help="the same seed gives the same run")
    add("--checkpointing_steps", type=count, default=100, help="steps between checkpoints; the last has one too")
    add("--checkpoints_total_limit", type=count, help="keep only the N newest checkpoints")
    add("--resume_from_checkpoint", type=path, help="'latest' in --output_dir, or a folder checkpoint-<step>")
    add("--report_to", choices=["all", *TRACKERS, "none"], default="tensorboard", help="where metrics are logged")
    # fmt: on

    args = parser.parse_args(argv)
    check_options(args, parser.error)
    return args, parser.error


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, gather_object, send_to_device, set_seed
from safetensors.torch import save
from tqdm.auto import tqdm

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported, it warns of kernels for CPUs

import diffusers
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.utils import check_min_version
from transformers import CLIPTextModel, CLIPTokenizer

import training_utils as utils
from inversion_utils import (
    PREDICTION_TYPES,
    Targets,
    add_noise,
    backward_in_chunks,
    invert,
    noise_from_model_output,
    prediction_error,
    preference_loss,
    sample_timesteps,
    to_device,
    without_overflow,
)
from training_options import allowed_timesteps, inversion_steps, one_line, printable, timesteps_per_pair

check_min_version("0.42.0")
logger = get_logger(__name__)
transformers.logging.set_verbosity_error()  # it warns of what is not used here, such as torchvision
transformers.logging.disable_progress_bar()  # of parts that load in a second

PIPELINE = "StableDiffusionPipeline"
PART, DENOISER = "unet", UNet2DConditionModel  # what is trained of it
MODEL = "--pretrained_model_name_or_path"
MAX_BAD_STEPS = 20  # in a row, before the run ends


def where(args, subfolder, **options):
    """Returns the keyword arguments with which `from_pretrained` finds a part of the model."""
    return {"subfolder": subfolder, "revision": args.revision, "cache_dir": args.cache_dir, **options}


def vae_location(args):
    """Returns the option and the path of the VAE, and the keyword arguments that find it there."""
    if vae := args.pretrained_vae_model_name_or_path:
        variant = utils.only_variant(Path(vae)) or None  # --variant is the model's
        return "--pretrained_vae_model_name_or_path", vae, {"cache_dir": args.cache_dir, "variant": variant}
    return MODEL, args.pretrained_model_name_or_path, where(args, "vae", variant=args.variant)


def read_configs(args, note):
    """Returns noise scheduler, pipeline's configuration, tokenizers, the model's identity, and the initial LoRA."""
    model, (vae_option, vae_path, vae_options) = args.pretrained_model_name_or_path, vae_location(args)
    source, pipeline_config = f"{MODEL} {model}", {}
    utils.find_model(MODEL, model, args.revision, note, cache_dir=args.cache_dir)
    for option, value in {vae_option: vae_path, "--lora_init": args.lora_init or model}.items():
        if value != model:
            utils.find_model(option, value, None, note, cache_dir=args.cache_dir)
    if Path(model).is_file():
        convert = f"diffusers.{PIPELINE}.from_single_file({model!r}).save_pretrained('my-model')"
        raise ValueError(f'{source} is a single file; make a folder of it: python -c "import diffusers; {convert}"; '
                         "it cannot tell v-prediction, see --prediction_type")  # fmt: skip
    with contextlib.suppress(OSError, ValueError):
        pipeline_config = DiffusionPipeline.load_config(model, revision=args.revision, cache_dir=args.cache_dir)
    blame, part = f"{source} (a {pipeline_config.get('_class_name', 'model')})", PART
    try:
        config, commit = DENOISER.load_config(model, return_commit_hash=True, **where(args, part))
        part = "scheduler"
        scheduler = DDPMScheduler.load_config(model, **where(args, part))
        scheduler |= {"prediction_type": args.prediction_type} if args.prediction_type else {}
        noise_scheduler = DDPMScheduler.from_config(scheduler)
        blame, part = f"{vae_option} {vae_path}", "VAE"
        vae, vae_commit = AutoencoderKL.load_config(vae_path, return_commit_hash=True, **vae_options)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{blame} has no {part} that this script can use: {one_line(error)}") from error
    sampler, prediction_type = scheduler.get("_class_name", "DDPMScheduler"), noise_scheduler.config.prediction_type
    if problem := family_problem(config, pipeline_config):
        raise ValueError(f"{source}: {problem}")
    if config.get("in_channels", 4) != vae.get("latent_channels", 4):
        raise ValueError(f"{source}: {PART} and VAE differ in channels; inpainting models are not supported")
    if sampler.startswith(("EDM", "FlowMatch")) or not hasattr(diffusers, sampler):
        raise ValueError(f"{source} has a {sampler}; models scaled by sigma and flow models are not supported")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"{source} predicts {prediction_type!r}; supported are {' and '.join(PREDICTION_TYPES)}")
    factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    parts = (PART, "text_encoder", "text_encoder_2", *(["vae"] if vae_path == model else []))
    for folder in (Path(model, name) for name in parts):
        if not args.variant and (variant := utils.only_variant(folder)):
            raise ValueError(f"{source}: {folder} holds one variant only; try --variant {variant}")
    try:
        part = "tokenizer"
        for tokenizer in (tokenizers := load_tokenizers(args)):
            utils.check_tokenizer(tokenizer)
        part = f"scheduler for --validation_prompts ({sampler})"
        _ = args.validation_prompts and load_sampler(args)
    except Exception as error:  # `transformers` fails in many kinds
        raise ValueError(f"{source} has no usable {part}: {one_line(error)}") from error
    if args.resolution % factor:
        raise ValueError(f"--resolution is {args.resolution}; allowed: multiples of {factor}, the VAE's factor")
    configs = [{k: v for k, v in x.items() if k[0] != "_"} for x in (pipeline_config, noise_scheduler.config)]
    fingerprints, lora_init = [utils.fingerprint(model, commit), utils.fingerprint(vae_path, vae_commit)], None
    with torch.device("meta"):
        empty = DENOISER.from_config(config)
    if args.lora_init:
        try:
            lora_init = utils.read_lora(args.lora_init, empty, PART, args.cache_dir)
        except ValueError as error:
            raise ValueError(f"--lora_init {args.lora_init}: {error}") from error
    else:
        utils.add_lora(empty, 1, args.lora_target_modules)
    lora_hash = utils.checksum(save(lora_init)) if lora_init else None
    identity = {"pipeline": PIPELINE, "model": fingerprints, "configs": configs, "lora_init": lora_hash}
    return noise_scheduler, pipeline_config, tokenizers, identity, lora_init


def load_denoiser(args, weight_dtype):
    """Returns the model in `weight_dtype`, its linear layers quantized (QLoRA, arXiv 2305.14314) if asked for."""
    options = {"dtype": weight_dtype, "variant": args.variant}
    if args.quantize_base == "nf4":
        options["quantization_config"] = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=weight_dtype
        )
    elif args.quantize_base == "int8":  # a threshold would make a sample's result depend on the rest of its batch
        options["quantization_config"] = diffusers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    path, options = args.pretrained_model_name_or_path, where(args, PART, **options)
    return utils.load_part(DENOISER, MODEL, path, logger.warning, **options)


def load_sampler(args):
    """Returns the scheduler that the model is sampled with, for validation."""
    model = args.pretrained_model_name_or_path
    name = DDPMScheduler.load_config(model, **where(args, "scheduler")).get("_class_name", "DDPMScheduler")
    changes = {"prediction_type": args.prediction_type} if args.prediction_type else {}
    return getattr(diffusers, name).from_pretrained(model, **where(args, "scheduler"), **changes)


# What belongs to the family of models


def family_problem(unet, pipeline_config):
    """Returns why a U-Net's configuration is not one of SD 1.5 or 2.x, "" if it is."""
    if unet.get("addition_embed_type") == "text_time":
        return "this is an SDXL model, see train_inversion_dpo_sdxl.py; this script aligns SD 1.5 and 2.x"
    kinds = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
    kinds = [kind for kind in kinds if unet.get(kind)]
    return f"its U-Net has a {kinds[0]}, which SD 1.5 and 2.x do not have" if kinds else ""


def load_tokenizers(args):
    """Returns the tokenizers."""
    return [CLIPTokenizer.from_pretrained(args.pretrained_model_name_or_path, **where(args, "tokenizer"))]


def load_encoders(args, weight_dtype):
    """Returns text encoders and VAE, in `weight_dtype` and frozen."""
    options = where(args, "text_encoder", variant=args.variant, dtype=weight_dtype)
    text_encoder = utils.load_part(CLIPTextModel, MODEL, args.pretrained_model_name_or_path, logger.warning, **options)
    option, path, options = vae_location(args)
    return [text_encoder], utils.load_part(AutoencoderKL, option, path, logger.warning, dtype=weight_dtype, **options)


def make_pipeline(args, pipeline_config, tokenizers, text_encoders, vae, denoiser):
    """Returns a pipeline of the loaded models, for validation."""
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoders[0], tokenizer=tokenizers[0], unet=denoiser, scheduler=load_sampler(args),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def encode_prompts(text_encoders, batch, pipeline_config):
    """Returns the denoiser's conditioning (2B, ...), for the winners and the losers of a batch."""
    text_encoder = text_encoders[0]
    embeds = text_encoder(to_device(batch["input_ids"][0], text_encoder.device))[0]
    return {"encoder_hidden_states": torch.cat([embeds, embeds])}


def predict_noise(unet, x_t, timesteps, cond, alphas_cumprod, prediction_type, weight_dtype):
    """Returns the U-Net's noise prediction (N, C, h, w), float32, for epsilon- and v-prediction models alike."""
    model_output = unet(x_t.to(weight_dtype), timesteps, **cond).sample
    return noise_from_model_output(model_output, x_t, timesteps, alphas_cumprod, prediction_type)


# The run


def start(args):
    """Returns the accelerator and the dtype of the frozen weights; ValueError if one lacks a GPU that it needs."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=3))],  # while one process samples
    )
    utils.check_launcher(os.environ, accelerator.num_processes)
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError("--mixed_precision fp16 needs a GPU, which this run does not have; use bf16 or no")
    if args.quantize_base and accelerator.device.type not in ("cuda", "xpu"):
        raise ValueError(f"--quantize_base {args.quantize_base} needs a GPU, which this run does not have")
    logger.setLevel(logging.INFO)
    set_seed(args.seed)
    return accelerator, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def load_models(args, device, weight_dtype, lora_init, has_encoders):
    """Returns text encoders and VAE, [] and None if not needed, the denoiser with its LoRA, the LoRA's parameters."""
    utils.stage("Loading the model")
    text_encoders, vae = load_encoders(args, weight_dtype) if has_encoders else ([], None)
    base = load_denoiser(args, weight_dtype)
    for module in (base,) if args.offload or not has_encoders else (base, vae, *text_encoders):
        module.to(device)
    parameters = utils.add_lora(base, args.rank, args.lora_target_modules, lora_init, args.reference)
    if args.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        base.enable_xformers_memory_efficient_attention()
    if args.compile:  # blocks share their code: policy, reference and every shape count against one limit
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
        base.compile_repeated_blocks()
    return text_encoders, vae, base, parameters


def make_lr_scheduler(args, optimizer, max_train_steps, last_epoch=-1):
    """Returns the learning rate's schedule, after some steps; raises ValueError if the options make none."""
    warmup, name, rate = args.lr_warmup_steps, args.lr_scheduler, args.learning_rate
    if warmup and warmup >= max_train_steps:
        raise ValueError(f"--lr_warmup_steps is {warmup}; needed: fewer than the {max_train_steps} steps of the run")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    try:
        return get_scheduler(name, optimizer, None, warmup, max_train_steps, last_epoch=last_epoch)
    except ValueError as error:
        raise ValueError(f"--lr_scheduler {name} with --learning_rate {rate}: {one_line(error)}") from error


@torch.no_grad()
def check_prediction_type(prediction_type, encode, batch, base, predict, alphas_cumprod, seed):
    """Warns if the model seems to predict something else, on one pair.

    Read as the other type, the reference's error at forward noise is then lower at every one of five levels.
    """
    (latents, cond), timesteps = encode(batch), torch.tensor([1, 3, 5, 7, 9]) * (len(alphas_cumprod) // 10)
    noise = to_device(utils.forward_noise([(0, 0)], seed, (5, *latents.shape[1:])), latents.device)
    timesteps = to_device(timesteps[:, None].repeat(1, 2), latents.device)
    x_t = add_noise(latents, noise, timesteps, alphas_cumprod).flatten(0, 1)
    cond = {name: value.repeat(5, *[1] * (value.ndim - 1)) for name, value in cond.items()}
    with utils.reference_policy(base):
        output, errors = predict(base, x_t, timesteps.flatten(), cond, "epsilon"), {}  # as the model gives it
    for kind in PREDICTION_TYPES:
        predicted = noise_from_model_output(output, x_t, timesteps.flatten(), alphas_cumprod, kind).view_as(noise)
        errors[kind] = prediction_error(predicted, noise).mean(1)
    (other,) = {*PREDICTION_TYPES} - {prediction_type}
    if (errors[other] < errors[prediction_type]).all():
        logger.warning(f"The model seems to predict {other}, not {prediction_type}: use --prediction_type {other}?")


def prepare_training(args, refuse, accelerator, base, parameters, checkpoint, good_steps, max_train_steps):
    """Returns the policy, which is the denoiser wrapped, the optimizer, and the learning rate's schedule.

    The schedule stays unprepared and takes a step with the optimizer, so it is the same for any number of processes.
    """
    optimizer_class = partial(torch.optim.AdamW, fused=accelerator.device.type in ("cpu", "cuda"))
    if args.use_8bit_adam:
        import bitsandbytes as bnb

        optimizer_class = bnb.optim.AdamW8bit
    optimizer = optimizer_class(
        parameters, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay, eps=args.adam_epsilon,
    )  # fmt: skip
    lr_scheduler = make_lr_scheduler(args, optimizer, max_train_steps, good_steps - 1 if checkpoint else -1)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    policy, prepared_optimizer = accelerator.prepare(base, optimizer)
    utils.register_lora_checkpointing(accelerator, base, PART)
    if checkpoint:
        try:
            accelerator.load_state(checkpoint)
        except Exception as error:  # damaged files fail in many kinds; torch goes on to advise an unsafe way
            refuse(f"{checkpoint} cannot be loaded: {one_line(error).partition('. ')[0]}")
        accelerator.step = 0  # checkpoints lie between steps, whatever the accumulation was
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)  # by this command's options, not by the checkpoint's
        logger.info(f"Resuming from {checkpoint}")
    return policy.train(), prepared_optimizer, lr_scheduler


def main(args, refuse):
    notes, output_dir, num_targets = [], Path(args.output_dir), timesteps_per_pair(args)
    began, warn = time.monotonic(), partial(logger.warning, main_process_only=False)  # of what this process met

    # What can be known before weights load
    try:
        utils.check_launcher(os.environ)
        checkpoint, before = utils.find_checkpoint(output_dir, args.resume_from_checkpoint, notes.append)
        utils.check_output_dir(output_dir, checkpoint, args.resume_from_checkpoint)
        noise_scheduler, pipeline_config, tokenizers, identity, lora_init = read_configs(args, notes.append)
        training_timesteps = torch.tensor(allowed_timesteps(args, noise_scheduler.alphas_cumprod))
        pairs = utils.load_pairs(args)
        eval_pairs = pairs.hold_out(args.num_eval_pairs)
        progress = utils.Progress(vars(args), len(pairs), identity["lora_init"])
        if checkpoint:
            progress = utils.go_on(checkpoint, before, progress, notes.append)
        train_dataset = utils.PreferenceDataset(
            pairs, args.resolution, num_targets, args.seed,
            args.random_crop, args.random_flip, args.proportion_empty_prompts,
        )  # fmt: skip
        train_dataset[(0, 0), 0]  # is there a pair that can be read?
        _ = args.num_eval_pairs and utils.PreferenceDataset(eval_pairs, args.resolution, 1, args.seed)[(0, 0), 0]
        accelerator, weight_dtype = start(args)
        device, num_processes = accelerator.device, accelerator.num_processes
        pairs_per_step = args.train_batch_size * accelerator.gradient_accumulation_steps * num_processes
        visits_to_go = max(0, args.num_train_epochs * len(pairs) - progress.visit)
        max_train_steps = args.max_train_steps or progress.step + math.ceil(visits_to_go / pairs_per_step)
        make_lr_scheduler(args, torch.optim.SGD([torch.zeros(1)], args.learning_rate), max_train_steps)
        settings = {**identity, "dtype": str(weight_dtype), "timesteps": [int(training_timesteps[i]) for i in (0, -1)]}
        last = progress.visit + pairs_per_step * (max_train_steps - progress.step)
        cache, batches = utils.open_cache(args, accelerator, pairs, settings, progress.visit, last, warn)
        repo_id = utils.create_hub_repo(args) if args.push_to_hub and not args.precompute_only else None
        lock = utils.lock_output_dir(output_dir, accelerator.is_main_process)
        utils.check_output_dir(output_dir, checkpoint, args.resume_from_checkpoint)  # used by now?
        has_encoders = not cache or bool(batches or args.num_eval_pairs or args.validation_prompts)
        text_encoders, vae, base, parameters = load_models(args, device, weight_dtype, lora_init, has_encoders)
    except (ValueError, RuntimeError) as problem:
        refuse(printable("; ".join([str(problem), *notes])))
    for line in notes:
        logger.warning(line)

    # The parts of a step
    prediction_type, alphas_cumprod = noise_scheduler.config.prediction_type, noise_scheduler.alphas_cumprod

    def chunks_of(count):
        return [slice(m, m + args.trajectory_chunk) for m in range(0, count, args.trajectory_chunk)]

    @torch.no_grad()
    def encode(batch):
        with utils.on_device((vae, *text_encoders), device):
            latents = utils.encode_images(vae, batch["pixel_values"], args.vae_encode_batch_size)
            return latents, encode_prompts(text_encoders, batch, pipeline_config)

    def predict(model, x_t, timesteps, cond, kind=prediction_type):
        with accelerator.autocast():
            return predict_noise(model, x_t, timesteps, cond, alphas_cumprod, kind, weight_dtype)

    def errors(model, x_t, targets, chunk):
        """A model's errors (m, 2B) at a chunk of the targets, in one call."""
        x_t, timesteps, noise = x_t[chunk], targets.timesteps[chunk], targets.noise[chunk]
        cond = {name: value.repeat(len(x_t), *[1] * (value.ndim - 1)) for name, value in targets.cond.items()}
        predicted = predict(model, x_t.flatten(0, 1), timesteps.flatten(), cond).view_as(x_t)
        return prediction_error(predicted, noise).where(targets.usable, 0.0)

    @torch.no_grad()
    def all_errors(model, targets):
        x_t = add_noise(targets.latents, targets.noise, targets.timesteps, alphas_cumprod)
        return torch.cat([errors(model, x_t, targets, chunk) for chunk in chunks_of(len(x_t))])

    @torch.no_grad()
    def find_targets(batch):
        """Parts 1 to 3, which training does not change: a cache keeps what they find."""
        # 1  Encode
        latents, cond = encode(batch)
        index = sample_timesteps(batch["uniforms"], 0, len(training_timesteps) - 1)
        timesteps, reference_noise = training_timesteps[index].repeat(1, 2), None  # shared by winner and loser

        # 2  Invert, by default with the reference; the baseline takes forward noise instead
        if args.objective == "diffusion_dpo":
            noise = to_device(utils.forward_noise(batch["keys"], args.seed, (len(index), *latents.shape[1:])), device)
        else:
            more = len(index) - num_targets  # held-out pairs have other numbers of targets
            steps = inversion_steps(args) + (more if args.timesteps_subset else max(0, more))
            by_reference = args.inversion_model == "reference"
            with utils.reference_policy(base) if by_reference else contextlib.nullcontext():
                trajectory = invert(
                    partial(predict, base, cond=cond), latents, timesteps, alphas_cumprod, steps,
                    predict_at_targets=by_reference,
                )  # fmt: skip
            noise, reference_noise = trajectory.noise, trajectory.predicted

        # 3  The reference's errors at the targets, known from the inversion if the reference inverted
        strength, is_tie = to_device(batch["strength"], device), to_device(batch["is_tie"], device)
        every = torch.ones((), dtype=torch.bool, device=device)  # what overflows is not known yet
        targets = Targets(latents, to_device(timesteps, device), noise, None, every, strength, is_tie, cond)
        if reference_noise is not None:
            reference_error = prediction_error(reference_noise, noise)
        else:
            with utils.reference_policy(base):
                reference_error = all_errors(base, targets)
        return without_overflow(targets._replace(reference_error=reference_error))

    # Data; the cache and held-out pairs before the loop
    stop, note = utils.StopSignal(logger.warning), partial(utils.note_skipped, skipped=progress.skipped, warn=warn)
    load = partial(
        torch.utils.data.DataLoader, num_workers=args.dataloader_num_workers, pin_memory=device.type == "cuda",
        worker_init_fn=utils.StopSignal.leave_to_the_main_process,
    )  # fmt: skip
    load_images = partial(load, collate_fn=partial(utils.collate, tokenizers=tokenizers))
    load_data, is_stopping, held_out = partial(load_images, train_dataset), False, None
    if has_encoders:  # does the model predict what its scheduler says?
        batch = utils.collate([train_dataset[(0, 0), 0]], tokenizers)
        check_prediction_type(prediction_type, encode, batch, base, predict, alphas_cumprod, args.seed)
    if cache:
        is_stopping = utils.fill_cache(accelerator, cache, batches, load_data, find_targets, note, stop)
        logger.info(f"The cache {cache.folder} {'is not filled yet' if is_stopping else 'holds what this run reads'}")
        load_data = partial(load, cache, collate_fn=utils.collate_targets)
    if is_stopping or args.precompute_only:
        stop.restore()
        utils.leave(accelerator, lock)
        sys.exit(128 + (stop.received or signal.SIGTERM) if is_stopping else 0)
    if args.num_eval_pairs:
        held_out = utils.hold_out(args, accelerator, eval_pairs, training_timesteps, load_images, find_targets, note)
    share = (accelerator.process_index, num_processes, args.cached_draws if cache else None)
    visits = utils.visit_batches(len(pairs), args.train_batch_size, args.seed, progress.visit, *share)
    dataloader = load_data(batch_sampler=visits)

    # Optimizer, trackers, validation
    policy, optimizer, lr_scheduler = prepare_training(
        args, refuse, accelerator, base, parameters, checkpoint, progress.good_steps, max_train_steps
    )
    if args.report_to != "none":
        config = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(args).items()}
        accelerator.init_trackers("inversion-dpo", config=config)
    if accelerator.is_main_process:
        utils.cut_metrics(output_dir / utils.METRICS_FILE, progress.step, logger.warning)
    validation = None
    if args.validation_prompts and accelerator.is_main_process:
        pipeline = make_pipeline(args, pipeline_config, tokenizers, text_encoders, vae, base)
        validation = utils.Validation(pipeline, PART, args, accelerator.autocast, logger.warning)
    if cache and not validation:
        text_encoders = vae = None
    logger.info(
        f"Pairs: {len(pairs)} (of {pairs.num_rows} rows; ties: {pairs.num_ties}, no label: {pairs.num_unusable}); "
        f"{max_train_steps} steps of {pairs_per_step} pairs; {args.objective}, {num_targets} of timesteps "
        f"{training_timesteps[0]} to {training_timesteps[-1]}; {sum(p.numel() for p in parameters):,} parameters"
    )
    if progress.step >= max_train_steps:
        logger.info(f"Nothing to train: {progress.step} steps are done. Only the results are written")
    bar = tqdm(None, "Steps", max_train_steps, initial=progress.step, disable=not accelerator.is_local_main_process)
    means, usable_rows, bad_steps_in_a_row, has_moved = utils.RunningMeans(), [], 0, bool(checkpoint)

    is_between_steps = True
    try:
        for batch in dataloader if progress.step < max_train_steps else ():
            note(batch["skipped"])
            with accelerator.accumulate(policy):
                targets = send_to_device(batch["targets"], device, non_blocking=True) if cache else find_targets(batch)
                x_t = add_noise(targets.latents, targets.noise, targets.timesteps, alphas_cumprod)
                usable_rows.append((batch["rows"], targets.usable))

                # 4  The policy's errors at the same states, and the DPO loss
                def loss_of(policy_error, targets=targets):
                    reference_error = targets.reference_error
                    means.add(policy_error=policy_error, reference_error=reference_error)
                    if args.objective == "inversion_dpo":  # the mean over the trajectory stands inside the log-sigmoid
                        policy_error, reference_error = policy_error.mean(0), reference_error.mean(0)
                    loss, metrics = preference_loss(
                        policy_error, reference_error, args.beta_dpo, args.loss_type, args.label_smoothing,
                        targets.strength, targets.is_tie if args.tie_policy == "soft" else None,
                    )  # fmt: skip
                    means.add(loss=loss, **metrics)
                    return loss.mean()

                backward_in_chunks(
                    [partial(errors, policy, x_t, targets, chunk) for chunk in chunks_of(num_targets)],
                    loss_of, accelerator.backward, partial(accelerator.no_sync, policy),
                )  # fmt: skip
                if not accelerator.sync_gradients:
                    continue

                # Once per step: clip, look at the metrics, update
                means.add(grad_norm=accelerator.clip_grad_norm_(parameters, args.max_grad_norm))
                means.add(stop=torch.full((), stop.received > 0, device=device))  # a tensor's copy would wait
                means.add(usable=torch.cat([usable for _, usable in usable_rows]))
                logs = means.pop(accelerator)
                is_stopping, usable_share = logs.pop("stop") > 0, logs.pop("usable")
                is_bad = not (usable_share and math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"]))
                is_between_steps = False
                if not is_bad:
                    optimizer.step()
                elif accelerator.scaler is not None:  # of a loss in half precision, which adapts to bad steps
                    accelerator.scaler.update()
                optimizer.zero_grad()

            progress.advance(pairs_per_step, is_bad)
            step, is_last = progress.step, progress.step == max_train_steps
            logs |= {"lr": lr_scheduler.get_last_lr()[0], "bad_steps": step - progress.good_steps}
            bad_steps_in_a_row = bad_steps_in_a_row + 1 if is_bad else 0
            if not is_bad:
                lr_scheduler.step()
            is_between_steps = True
            for rows, usable in usable_rows if usable_share < 1 else ():
                note(utils.not_finite(rows, usable))
            usable_rows.clear()
            if held_out and (step % args.eval_steps == 0 or is_last):
                logs |= held_out.measure(accelerator, partial(all_errors, base))
                if line := held_out.note(logs, step):
                    logger.warning(line)
            accelerator.log(logs, step=step)
            if accelerator.is_main_process:
                utils.add_metrics(output_dir / utils.METRICS_FILE, {"step": step, **logs})
            bar.update()
            bar.set_postfix(loss=logs["loss"], acc=logs["rewards/accuracies"], margin=logs["rewards/margins"])
            if bad_steps_in_a_row == MAX_BAD_STEPS or (is_last and not progress.good_steps):
                reason = "loss or gradient are not finite" if usable_share else utils.NOT_FINITE
                remedy = "a lower --learning_rate, another --mixed_precision or --pretrained_vae_model_name_or_path"
                raise utils.Verdict(f"{bad_steps_in_a_row} bad steps in a row: {reason}. Try {remedy}")
            has_moved = has_moved or logs["grad_norm"] > 0
            if progress.good_steps == 10 and not has_moved:
                raise utils.Verdict("after 10 steps the LoRA is unchanged: do winner and loser differ in any pair?")
            if is_stopping or is_last or step % args.checkpointing_steps == 0:
                progress.skipped.update(gather_object(list(progress.skipped.items())))
                utils.save_checkpoint(accelerator, output_dir, progress, args.checkpoints_total_limit)
            if validation and step % args.validation_steps == 0 and not (is_last or is_stopping):
                utils.log_pictures(accelerator, validation.sample(step), step)
            if is_stopping or is_last:
                break
    except Exception as problem:
        utils.rescue(accelerator, output_dir, progress, is_between_steps, problem, logger)
        raise

    # Results
    bar.close()
    stop.restore()
    exit_code = 0
    if progress.skipped or progress.step > progress.good_steps:
        logger.warning(f"Skipped rows: {len(progress.skipped)}, skipped steps: {progress.step - progress.good_steps}")
    if progress.step < max_train_steps:
        logger.warning(f"Stopped after step {progress.step}; go on with --resume_from_checkpoint latest")
        exit_code = 128 + (stop.received or signal.SIGTERM)  # as a shell reports a signal
    elif accelerator.is_main_process:
        exit_code = utils.save_results(
            args, accelerator, base, PART, PIPELINE, prediction_type, progress, pairs, pairs_per_step, validation,
            repo_id, began, logger,
        )  # fmt: skip
    policy = None  # the wrapper goes before the group of processes
    utils.leave(accelerator, lock)
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    main(*args_and_error)

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
#     "matplotlib>=3.10",
#     "huggingface_hub>=2.4",
#     "tensorboard>=2.20",
# ]
# ///
"""Aligns Stable Diffusion 1.5 / 2.x with preference pairs: a LoRA by inversion-based DPO.

    accelerate launch train_inversion_dpo.py \
        --pretrained_model_name_or_path=... --dataset_name=... --output_dir=...

Each step: 1 encode winner, loser and caption; 2 invert both images with the reference policy (the U-Net without its
LoRA) to a few timesteps, which yields the noise that belongs to each image; 3 states x_t and targets tau; 4 the
policy's and the reference's errors, and the DPO loss on them.

Against the papers: 1 the target is the noise implied by the image, not the reference's prediction (with which a LoRA
never starts to move); 2 the latent is inverted to exactly the timestep it is trained at; 3 a LoRA is trained, not the
whole U-Net. README.md explains each. Needs `inversion_utils.py` beside it, nothing else.
"""

import argparse
import contextlib
import datetime
import itertools
import logging
import math
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, ProjectConfiguration, gather_object, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.utils import check_min_version, is_bitsandbytes_available, is_xformers_available
from diffusers.utils.torch_utils import is_compiled_module
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from inversion_utils import (
    CACHE_OVERHEAD,
    CONTACT_SHEET_FILE,
    DRY_RUN_UPDATES,
    GIB,
    LORA_TARGETS,
    LOSS_TYPES,
    PREDICTION_TYPES,
    QUANTIZATIONS,
    VALIDATION_DIR,
    Checkpoint,
    InversionCache,
    PairColumns,
    PreferenceDataset,
    RowLog,
    RunningMeans,
    StopSignal,
    Trajectory,
    Validation,
    Visits,
    add_data_options,
    add_lora,
    add_noise,
    backward_in_chunks,
    check_compiler,
    check_data_options,
    check_launcher,
    check_lora_targets,
    check_output_dir,
    check_quantization,
    check_resumed_run,
    collate_cached,
    command_line,
    count_by_reason,
    create_hub_repo,
    cut_captions,
    digest,
    draw_contact_sheet,
    encode_images,
    exceeds,
    files_digest,
    fill_cache,
    final_metrics,
    find_checkpoint,
    finite_pairs,
    forward_noise,
    inspect_pairs,
    invert,
    is_local,
    is_zero_lora,
    join_visits,
    leave_signals_to_the_main_process,
    leave_together,
    list_reasons,
    load_pairs,
    log_pictures,
    map_condition,
    mean_metrics,
    noise_from_model_output,
    number,
    on_device,
    one_line,
    peak_memory,
    prediction_error,
    preference_loss,
    push_to_hub,
    quantization,
    reconstruction_errors,
    reference_policy,
    register_lora_checkpointing,
    report_dry_run,
    sample_timesteps,
    save_checkpoint,
    save_lora,
    to_device,
    tokenize,
    versions,
    write_results,
)

check_min_version("0.42.0")
logger = get_logger(__name__)

PIPELINE_CLASS = StableDiffusionPipeline
LR_SCHEDULERS = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]  # which needs rules
# Options that a resumed run may change: they do not change what is learned, only how long and how fast, or name where
# model and data are, which may have moved.
FREE_ON_RESUME = set(
    "pretrained_model_name_or_path pretrained_vae_model_name_or_path cache_dir dataset_name train_data_dir "
    "output_dir resume_from_checkpoint max_train_steps num_train_epochs train_batch_size "
    "gradient_accumulation_steps trajectory_chunk vae_encode_batch_size gradient_checkpointing "
    "enable_xformers_memory_efficient_attention allow_tf32 dataloader_num_workers dry_run max_bad_fraction "
    "max_bad_steps checkpointing_steps checkpoints_total_limit logging_dir report_to validation_prompts "
    "validation_steps num_validation_images validation_inference_steps validation_guidance_scale push_to_hub "
    "hub_model_id hub_private_repo compile log_every offload inversion_cache_dir precompute_only".split()
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Align Stable Diffusion 1.5 / 2.x with preference pairs by inversion-based DPO.",
        usage="%(prog)s --pretrained_model_name_or_path M --dataset_name D --output_dir O [options, see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    count, natural, positive = number(int, least=1), number(int, least=0), number(float, above=0)
    fraction = number(float, least=0, below=1)

    # fmt: off
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pretrained_model_name_or_path", required=True,
        help="model to align: a Hub id or a folder in diffusers' layout")
    add("--pretrained_vae_model_name_or_path", help="another VAE than the model's own")
    add("--revision", help="revision of the model on the Hub")
    add("--variant", help="variant of the model's files, such as fp16")
    add("--cache_dir", help="where downloads are kept")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add_data_options(add)
    add("--resolution", type=int, default=512, help="pixels of a side; higher is slower and takes more memory")
    add("--random_crop", action="store_true", help="crop at random, winner and loser alike, instead of at the centre")
    add("--random_flip", action="store_true", help="mirror half of the pairs, winner and loser alike")
    add("--proportion_empty_prompts", type=fraction, default=0.0, help="share of captions emptied; the papers use 0.2")
    add("--dataloader_num_workers", type=natural, default=0, help="processes that load images; 0: the main one")

    group = parser.add_argument_group("objective and inversion")
    add = group.add_argument
    add("--objective", choices=["inversion_dpo", "inpo", "diffusion_dpo"], default="inversion_dpo",
        help="what is compared: the mean over an inversion trajectory, single inverted states, or plain forward noise")
    add("--timesteps_per_pair", type=count,
        help="targets per pair; more: steadier and slower (4 for inversion_dpo, else 1)")
    add("--min_timestep", type=natural, default=0, help="lowest training timestep")
    add("--max_timestep", type=natural,
        help="highest training timestep; a band of high ones learns layout faster, not detail")
    add("--timesteps_subset", type=natural, nargs="+",
        help="instead of a band: train at these only, as a distilled few-step model is sampled at")
    add("--trajectory_chunk", type=count, default=4,
        help="timesteps per policy call; less takes less memory, and a second forward where not all fit into one")
    add("--inversion_steps", type=count,
        help="U-Net calls of an inversion; more: more exact (timesteps_per_pair + 4, without the 4 for a subset)")
    add("--inversion_model", choices=["reference", "policy"], default="reference",
        help="who inverts; the reference's predictions are then also the loss's, the policy costs extra calls")
    add("--inversion_order", type=int, choices=[1, 2], default=2,
        help="order of the inversion's steps; 1 is plain Euler")
    add("--inversion_spacing", choices=["karras", "uniform"], default="karras", help="where the inversion's steps lie")
    add("--inversion_guidance_scale", type=number(float, least=1), default=1.0,
        help="guidance while inverting; above 1 it is inexact")
    add("--beta_dpo", type=positive, default=2000.0,
        help="tie to the reference, higher stays closer; the loss has beta / 2, diffusers' SD script has beta")
    add("--loss_type", choices=LOSS_TYPES, default="sigmoid", help="loss on the difference of winner and loser")
    add("--label_smoothing", type=number(float, least=0, below=0.5), default=0.0,
        help="share of labels believed wrong; sigmoid only")
    add("--preference_strength", choices=["none", "margin"], default="none",
        help="margin: pairs with close scores count less, logits are scaled by 2 sigmoid(k (score_w - score_l)) - 1")
    add("--preference_strength_scale", type=positive, default=1.0,
        help="k, in 1 / units of the scores; higher counts closer pairs as certain")

    group = parser.add_argument_group("cache: what training does not change, kept across epochs and runs")
    add = group.add_argument
    add("--inversion_cache_dir", help="folder where latents, noise, reference errors and text embeddings are kept")
    add("--cached_timesteps", type=count, default=4,
        help="draws of timesteps, crop and flip per pair, one an epoch by turns; more vary more and take more disk")
    add("--cache_latents", action="store_true",
        help="keep latents and text embeddings only: for diffusion_dpo and --inversion_model policy")
    add("--precompute_only", action="store_true", help="fill the cache, and end without training")

    group = parser.add_argument_group("LoRA and optimization")
    add = group.add_argument
    add("--rank", type=count, default=16, help="rank of the LoRA; higher learns more and takes more memory")
    add("--lora_alpha", type=positive, help="scale of the LoRA, times 1 / rank; higher learns faster (rank)")
    add("--lora_target_modules", nargs="+", default=list(LORA_TARGETS),
        help="modules that get a LoRA: ends of names, or one regular expression; more learn more, take more memory")
    add("--train_text_encoder", action="store_true", help="out of scope: the LoRA is the U-Net's alone")
    add("--learning_rate", type=positive, default=1e-4, help="learning rate after warm-up")
    add("--scale_lr", action="store_true", help="multiply the learning rate by processes x accumulation x batch size")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant",
        help="course of the learning rate")
    add("--lr_warmup_steps", type=natural, default=0, help="updates over which the learning rate rises from 0")
    add("--train_batch_size", type=count, default=4,
        help="pairs per process and forward; more is steadier, takes memory")
    add("--gradient_accumulation_steps", type=count, default=1, help="batches per update; more is steadier and slower")
    add("--num_train_epochs", type=count, default=1, help="passes over the pairs, if --max_train_steps is not given")
    add("--max_train_steps", type=count, help="updates in all, instead of --num_train_epochs")
    add("--use_8bit_adam", action="store_true", help="Adam with 8-bit states, by bitsandbytes")
    add("--adam_beta1", type=fraction, default=0.9, help="decay of Adam's mean; higher remembers longer")
    add("--adam_beta2", type=fraction, default=0.999, help="decay of Adam's variance; higher is smoother")
    add("--adam_weight_decay", type=fraction, default=1e-2, help="weight decay of the LoRA; higher keeps it smaller")
    add("--adam_epsilon", type=positive, default=1e-8, help="floor of Adam's denominator; higher is calmer")
    add("--max_grad_norm", type=positive, default=1.0, help="gradients are scaled down to this norm; lower is calmer")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower policy step")
    add("--quantize_base", choices=QUANTIZATIONS,
        help="keep the frozen linear layers of the U-Net in 4 or 8 bits: less memory, less exact, slower")
    add("--offload", action="store_true",
        help="keep VAE and text encoders in the CPU's memory between uses: less memory, some copying per batch")
    add("--compile", action="store_true",
        help="compile the U-Net by torch.compile: the first update takes minutes, the others less time")
    add("--vae_encode_batch_size", type=count, default=8, help="images per VAE call; less takes less memory")
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="precision of the frozen parts (accelerate's setting)")
    add("--allow_tf32", action="store_true", help="faster float32 products on Ampere GPUs and later, less exact")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers attention instead of SDPA")

    group = parser.add_argument_group("validation: pictures without and with the LoRA, from the same seeds")
    add = group.add_argument
    add("--validation_prompts", nargs="+", help="prompts to draw, each in quotes; also drawn at the end")
    add("--validation_steps", type=count, default=100, help="updates between pictures; fewer cost more time")
    add("--num_validation_images", type=count, default=4, help="samples per prompt; more show more and cost time")
    add("--validation_inference_steps", type=count, default=30, help="sampler steps; more are finer and slower")
    add("--validation_guidance_scale", type=number(float, least=0), default=7.5,
        help="guidance of the samples; higher obeys the prompt more and varies less")

    group = parser.add_argument_group("Hugging Face Hub")
    add = group.add_argument
    add("--push_to_hub", action="store_true", help="upload LoRA, card, pictures and configuration at the end")
    add("--hub_model_id", help="repository, as user/name (the name of --output_dir)")
    add("--hub_token", help="token that may write; HF_TOKEN or `hf auth login` keep it out of the command line")
    add("--hub_private_repo", action="store_true", help="create the repository as a private one")

    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_dir", required=True, help="folder for the LoRA, checkpoints, pictures and logs")
    add("--dry_run", action="store_true",
        help="report on data, inversion, memory and speed, after three updates that are thrown away; train nothing")
    add("--seed", type=number(int, least=0, most=2**32 - 1), default=0, help="the same seed gives the same run")
    add("--max_bad_steps", type=count, default=20, help="end after so many updates in a row with NaN or infinity")
    add("--checkpointing_steps", type=count, default=100, help="updates between checkpoints; the last has one too")
    add("--checkpoints_total_limit", type=count, help="keep the newest so many checkpoints only")
    add("--resume_from_checkpoint", help="'latest' in --output_dir, or a folder checkpoint-<step>")
    add("--logging_dir", default="logs", help="folder of the logs, within --output_dir")
    add("--log_every", type=count, default=1, help="updates between logged metrics, each the mean since the last")
    add("--report_to", choices=[*LoggerType.list(), "none"], default="tensorboard", help="where metrics are logged")
    # fmt: on

    args = parser.parse_args(argv)
    check_args(args, parser.error, parser.get_default)
    return args, parser.error


def check_args(args, error, default):
    """Ends the run by `error` if an option contradicts another or needs what is not installed."""
    check_data_options(args, error)
    if args.streaming and args.max_train_steps is None:
        error("--streaming needs --max_train_steps: how long an epoch of a stream is, is not known")
    has_scores = PairColumns.of(args).shape in ("scores", "groups")
    if args.preference_strength == "margin" and not has_scores:
        error("--preference_strength margin goes with --score_0_column or --scores_column")
    if args.preference_strength == "none" and args.preference_strength_scale != default("preference_strength_scale"):
        error("--preference_strength_scale goes with --preference_strength margin")
    if args.tie_policy == "soft" and args.loss_type == "hinge":
        error("--tie_policy soft goes with --loss_type sigmoid and ipo: hinge has no loss for ties")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        error("--lr_warmup_steps goes with another --lr_scheduler than constant: constant_with_warmup, for instance")
    if args.max_train_steps is not None and args.lr_warmup_steps >= args.max_train_steps:
        error(f"--lr_warmup_steps is {args.lr_warmup_steps}; allowed: below --max_train_steps {args.max_train_steps}")
    if args.label_smoothing and args.loss_type != "sigmoid":
        error(f"--label_smoothing goes with --loss_type sigmoid, not {args.loss_type}")
    if args.objective == "diffusion_dpo":
        for name in ("steps", "model", "order", "spacing", "guidance_scale"):
            if getattr(args, f"inversion_{name}") != default(f"inversion_{name}"):
                error(f"--inversion_{name} goes with an --objective that inverts, not with diffusion_dpo")
    elif inversion_steps(args) < timesteps_per_pair(args):
        error(
            f"--inversion_steps is {args.inversion_steps}; allowed: the {timesteps_per_pair(args)} timesteps and above"
        )
    if not args.inversion_cache_dir:
        for name in ("cached_timesteps", "cache_latents", "precompute_only"):
            if getattr(args, name) != default(name):
                error(f"--{name} goes with --inversion_cache_dir")
    elif args.streaming:
        error("--inversion_cache_dir does not go with --streaming: the pairs of a stream do not return")
    elif args.precompute_only and args.dry_run:
        error("--precompute_only and --dry_run exclude each other")
    elif args.cache_latents and args.inversion_guidance_scale > 1:
        error("--cache_latents goes with --inversion_guidance_scale 1: it does not keep the empty prompt's embedding")
    elif not args.cache_latents and (args.objective == "diffusion_dpo" or args.inversion_model == "policy"):
        name = "objective diffusion_dpo" if args.objective == "diffusion_dpo" else "inversion_model policy"
        error(f"--{name} with --inversion_cache_dir needs --cache_latents: noise and states are new at every visit")
    if not args.validation_prompts:
        for name in ("validation_steps", "num_validation_images", "validation_inference_steps",
                     "validation_guidance_scale"):  # fmt: skip
            if getattr(args, name) != default(name):
                error(f"--{name} goes with --validation_prompts")
    if not args.push_to_hub:
        for name in ("hub_model_id", "hub_token", "hub_private_repo"):
            if getattr(args, name):
                error(f"--{name} goes with --push_to_hub")
    if args.hub_token and args.report_to not in ("tensorboard", "none"):
        error(
            f"--hub_token with --report_to {args.report_to} would store the token in the tracker, with the command "
            "line; log in with `hf auth login` instead"
        )
    if args.train_text_encoder:
        error("--train_text_encoder is out of scope: the LoRA is the U-Net's alone; leave the option out")
    if args.timesteps_subset and (args.min_timestep, args.max_timestep) != (0, None):
        error("--timesteps_subset and --min_timestep, --max_timestep exclude each other")
    if args.use_8bit_adam and not is_bitsandbytes_available():
        error("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes")
    if args.quantize_base and not is_bitsandbytes_available():
        error(f"--quantize_base {args.quantize_base} needs bitsandbytes: pip install bitsandbytes")
    if args.report_to not in ("all", "none", *map(str, get_available_trackers())):
        error(f"--report_to {args.report_to} is not installed: pip install {args.report_to}")
    if args.enable_xformers_memory_efficient_attention and not is_xformers_available():
        error("--enable_xformers_memory_efficient_attention needs xformers: pip install xformers")


def timesteps_per_pair(args):
    return args.timesteps_per_pair or (4 if args.objective == "inversion_dpo" else 1)


def inversion_steps(args):
    """A distilled model is called at its own timesteps only: then the targets are all the nodes there are."""
    return args.inversion_steps or timesteps_per_pair(args) + (0 if args.timesteps_subset else 4)


def allowed_timesteps(args, noise_scheduler):
    """Returns the training timesteps (K,), rising; raises ValueError if the schedule does not have them.

    A level without signal (zero terminal SNR) is never trained on: its error is zero by construction.
    """
    last = int((noise_scheduler.alphas_cumprod > 0).sum()) - 1
    if args.timesteps_subset:
        subset, least = sorted(set(args.timesteps_subset)), timesteps_per_pair(args)
        if subset[-1] > last:
            raise ValueError(f"--timesteps_subset is {subset}; allowed: timesteps from 0 to {last}")
        if len(subset) < least:
            raise ValueError(f"--timesteps_subset is {subset}, fewer than --timesteps_per_pair {least}: lower that")
        return torch.tensor(subset)
    highest = last if args.max_timestep is None else args.max_timestep
    if not args.min_timestep <= highest <= last:
        raise ValueError(
            f"--min_timestep {args.min_timestep} and --max_timestep {highest}; allowed: an interval within 0 to {last}"
        )
    return torch.arange(args.min_timestep, highest + 1)


def load_model_index(args):
    """Returns the pipeline's own configuration, {} for a folder without one."""
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        return DiffusionPipeline.load_config(args.pretrained_model_name_or_path, **where)
    except (OSError, ValueError):
        return {}


def vae_location(args):
    """Returns the path of the VAE, and the keyword arguments that find it there."""
    if args.pretrained_vae_model_name_or_path:
        return args.pretrained_vae_model_name_or_path, {"cache_dir": args.cache_dir}
    where = {"subfolder": "vae", "revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    return args.pretrained_model_name_or_path, where


def check_family(source, unet):
    """Raises ValueError if a U-Net's configuration is not one of SD 1.5 or 2.x."""
    if unet.get("addition_embed_type") == "text_time":
        raise ValueError(f"{source} is an SDXL model; this script aligns SD 1.5 and 2.x")
    kinds = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
    if kind := next((kind for kind in kinds if unet.get(kind)), None):
        raise ValueError(f"{source}: its U-Net has {kind} {unet[kind]!r}, which SD 1.5 and 2.x do not have")


def load_noise_scheduler(args):
    """Returns the model's noise scheduler from configurations alone; raises ValueError if the model is unsuitable."""
    model, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    source = f"--pretrained_model_name_or_path {model}"
    vae_path, vae_where = vae_location(args)
    try:
        part = "unet"
        unet = UNet2DConditionModel.load_config(model, subfolder="unet", **where)
        part = "scheduler"
        scheduler = DDPMScheduler.load_config(model, subfolder="scheduler", **where)
        noise_scheduler = DDPMScheduler.from_config(scheduler)
        part = f"vae ({vae_path})"
        vae = AutoencoderKL.load_config(vae_path, **vae_where)
    except (OSError, ValueError, NotImplementedError) as error:
        kind = load_model_index(args).get("_class_name")
        source += f" (a {kind})" if kind else ""
        raise ValueError(f"{source} has no usable {part}, which this script needs: {one_line(error)}") from error
    check_family(source, unet)
    if args.lora_target_modules != list(LORA_TARGETS):
        check_lora_targets(unet, args.lora_target_modules)
    if unet.get("in_channels", 4) != vae.get("latent_channels", 4):
        raise ValueError(
            f"{source}: its U-Net takes {unet.get('in_channels')} channels, its VAE makes "
            f"{vae.get('latent_channels')}; inpainting and other image-conditioned models are not supported"
        )
    factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    if args.resolution < factor or args.resolution % factor:
        raise ValueError(f"--resolution is {args.resolution}; allowed: multiples of {factor}, the VAE's factor")
    sampler, prediction_type = scheduler.get("_class_name", "DDPMScheduler"), noise_scheduler.config.prediction_type
    if sampler.startswith(("EDM", "FlowMatch")):
        raise ValueError(f"{source} has a {sampler}: models scaled by sigma and flow models are not supported")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"{source} predicts {prediction_type!r}; supported are 'epsilon' and 'v_prediction'")
    if not hasattr(diffusers, sampler):
        raise ValueError(f"{source}: diffusers has no scheduler {sampler}")
    return noise_scheduler


def load_encoders(args, weight_dtype):
    """Returns text encoders and VAE, in `weight_dtype` and frozen."""
    model = args.pretrained_model_name_or_path
    where = {"revision": args.revision, "cache_dir": args.cache_dir, "variant": args.variant, "dtype": weight_dtype}
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder", **where)
    vae_path, vae_where = vae_location(args)
    vae = AutoencoderKL.from_pretrained(vae_path, dtype=weight_dtype, **vae_where)
    return [text_encoder.requires_grad_(False).eval()], vae.requires_grad_(False).eval()


def load_models(args, weight_dtype):
    """Returns tokenizers, text encoders, VAE and U-Net, these in `weight_dtype`; all but the U-Net are frozen.

    With a cache, text encoders and VAE are None until `load_encoders` is needed: nothing of it is missing, perhaps.
    """
    model = args.pretrained_model_name_or_path
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    tokenizers = [CLIPTokenizer.from_pretrained(model, subfolder="tokenizer", **where)]
    are_needed = not args.inversion_cache_dir or args.validation_prompts or args.dry_run
    text_encoders, vae = load_encoders(args, weight_dtype) if are_needed else (None, None)
    unet = UNet2DConditionModel.from_pretrained(
        model, subfolder="unet", variant=args.variant, dtype=weight_dtype, **where,
        **quantization(args.quantize_base, weight_dtype),
    )  # fmt: skip
    return tokenizers, text_encoders, vae, unet


def load_sampler(args):
    """Returns the scheduler that the model is sampled with, for validation."""
    model, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    name = DDPMScheduler.load_config(model, subfolder="scheduler", **where).get("_class_name", "DDPMScheduler")
    return getattr(diffusers, name).from_pretrained(model, subfolder="scheduler", **where)


def make_pipeline(args, model_index, tokenizers, text_encoders, vae, unet):
    """Returns a pipeline of the loaded models, for validation."""
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoders[0], tokenizer=tokenizers[0], unet=unet, scheduler=load_sampler(args),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def collate(examples, tokenizers, model_index):
    """Returns a batch of B pairs: pixel_values (2B, 3, H, W), winners first, uniforms (M, B), and lists."""
    return {
        "visits": [example["visit"] for example in examples],
        "strength": torch.tensor([example["strength"] for example in examples]),
        "is_tie": torch.tensor([example["is_tie"] for example in examples]),
        "rows": [example["row"] for example in examples],
        "pixel_values": torch.stack([example["pixel_values"] for example in examples], dim=1).flatten(0, 1),
        "input_ids": tokenize(tokenizers, [example["caption"] for example in examples]),
        "empty_input_ids": tokenize(tokenizers, [""] * len(examples)),
        "uniforms": torch.stack([example["uniforms"] for example in examples], dim=1),
        "bad_rows": [bad_row for example in examples for bad_row in example["bad_rows"]],
        "cut_captions": cut_captions(tokenizers, examples),
    }


@torch.no_grad()
def encode_prompts(text_encoders, input_ids, batch):
    """Returns the U-Net's conditioning (2B, ...), for the winners and the losers, of token ids (B, L)."""
    text_encoder = text_encoders[0]
    embeds = text_encoder(to_device(input_ids[0], text_encoder.device))[0]
    return {"encoder_hidden_states": torch.cat([embeds, embeds])}


def predict_noise(unet, x_t, timesteps, cond, alphas_cumprod, prediction_type, weight_dtype):
    """Returns the U-Net's noise prediction (N, C, h, w), float32, for epsilon- and v-prediction models alike."""
    model_output = unet(x_t.to(weight_dtype), timesteps, **cond).sample
    return noise_from_model_output(model_output, x_t, timesteps, alphas_cumprod, prediction_type)


def model_digest(args):
    """Returns a hash of the model's files, see `files_digest`; of a model on the Hub, of its commit."""
    model, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    parts = ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    _, commit = UNet2DConditionModel.load_config(model, subfolder="unet", return_commit_hash=True, **where)
    vae_path, vae_where = vae_location(args)
    _, vae_commit = AutoencoderKL.load_config(vae_path, return_commit_hash=True, **vae_where)
    return digest(
        files_digest(model, parts) if is_local(model) else commit,
        files_digest(vae_path, [vae_where.get("subfolder", "")]) if is_local(vae_path) else vae_commit,
        args.variant,
    )


def open_cache(args, noise_scheduler, model_index, training_timesteps, weight_dtype):
    """Returns the cache; raises ValueError or OSError if it cannot be written or the disk has no room for it."""
    settings = {
        "pipeline": PIPELINE_CLASS.__name__,
        "model": model_digest(args),
        "other_vae": args.pretrained_vae_model_name_or_path is not None,
        "dtype": str(weight_dtype),
        "allow_tf32": args.allow_tf32,
        "force_zeros_for_empty_prompt": model_index.get("force_zeros_for_empty_prompt"),
    }
    inversion = {
        "prediction_type": noise_scheduler.config.prediction_type,
        "alphas_cumprod": digest(noise_scheduler.alphas_cumprod.double().numpy().tobytes()),
        "steps": inversion_steps(args),
        "order": args.inversion_order,
        "spacing": args.inversion_spacing,
        "guidance_scale": args.inversion_guidance_scale,
        "quantize_base": args.quantize_base,
    }
    visit_settings = {
        **settings,
        "resolution": args.resolution,
        "min_image_size": args.min_image_size,
        **({} if args.cache_latents else inversion),
    }
    return InversionCache(
        args.inversion_cache_dir, settings, visit_settings, training_timesteps,
        args.cached_timesteps, args.cache_latents,
    )  # fmt: skip


def cache_size(args, pairs, weight_dtype):
    """Returns the numbers of visits and of captions in the full cache, at most, and the bytes of one of each.

    Every caption is counted, as if no two were alike.
    """
    model, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    unet = UNet2DConditionModel.load_config(model, subfolder="unet", **where)
    vae_path, vae_where = vae_location(args)
    vae = AutoencoderKL.load_config(vae_path, **vae_where)
    side = args.resolution // 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    latents = 2 * 4 * vae.get("latent_channels", 4) * side**2  # float32, winner and loser
    pooled = unet.get("projection_class_embeddings_input_dim") or 0
    text = (77 * unet.get("cross_attention_dim", 1280) + pooled) * weight_dtype.itemsize  # CLIP reads 77 tokens
    draws = args.cached_timesteps
    if args.cache_latents and not args.random_crop:  # latents differ by their flip alone
        draws = min(draws, 1 + args.random_flip)
    kept = 1 if args.cache_latents else 1 + timesteps_per_pair(args)
    captions = min(args.cached_timesteps, pairs.max_captions)
    return len(pairs) * draws, len(pairs) * captions, kept * latents + CACHE_OVERHEAD, text + CACHE_OVERHEAD


def create_optimizer(args, parameters, visits_per_update):
    """Returns AdamW over the LoRA's parameters, in 8 bit if asked for, else in one kernel where there is one."""
    optimizer_class = partial(torch.optim.AdamW, fused=parameters[0].device.type in ("cpu", "cuda"))
    if args.use_8bit_adam:
        import bitsandbytes as bnb

        optimizer_class = bnb.optim.AdamW8bit
    return optimizer_class(
        parameters,
        lr=args.learning_rate * (visits_per_update if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def main(argv=None):
    args, error = parse_args(argv)
    num_targets = timesteps_per_pair(args)
    options = {name: value for name, value in vars(args).items() if name != "hub_token"}  # as they may be written down
    try:
        check_launcher(os.environ)
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        check_output_dir(args.output_dir, checkpoint)
        noise_scheduler, model_index = load_noise_scheduler(args), load_model_index(args)
        training_timesteps = allowed_timesteps(args, noise_scheduler)
        pairs = load_pairs(args)
        if checkpoint:
            check_resumed_run(checkpoint, pairs.num_pairs, options, FREE_ON_RESUME)
        train_dataset = PreferenceDataset(
            pairs, args.resolution, num_targets, args.seed,
            args.random_crop, args.random_flip, args.proportion_empty_prompts, args.min_image_size,
            args.preference_strength_scale if args.preference_strength == "margin" else None,
        )  # fmt: skip
        train_dataset[0, pairs.sample(1, args.seed)[0]]  # finds out before the models load whether a pair is readable
        repo_id = None
        if args.push_to_hub and not args.dry_run and not args.precompute_only:
            repo_id = create_hub_repo(args.hub_model_id, args.output_dir, args.hub_token, args.hub_private_repo)
    except (ValueError, RuntimeError) as problem:
        error(str(problem))

    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, args.logging_dir)
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=3))],  # while one process draws
    )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        error("--mixed_precision fp16 needs a GPU, which this run does not have; use bf16 or no")
    try:
        if args.compile:
            check_compiler(accelerator.device)
        if args.quantize_base:
            check_quantization(accelerator.device)
    except ValueError as problem:
        error(str(problem))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    if args.hub_token:
        logger.warning(
            "--hub_token: launchers print the command line if a run fails; HF_TOKEN or `hf auth login` are safer"
        )
    if args.inversion_guidance_scale > 1:
        logger.warning("--inversion_guidance_scale above 1 makes the inversion inexact: its error triples at 2")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    set_seed(args.seed)
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    visits_per_update = args.train_batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes
    step, visit = (checkpoint.step, checkpoint.visit) if checkpoint else (0, 0)
    max_train_steps = args.max_train_steps
    if max_train_steps is None:
        visits_to_go = max(0, args.num_train_epochs * pairs.num_pairs - visit)
        max_train_steps = step + math.ceil(visits_to_go / visits_per_update)

    cache, report = None, {}
    if args.inversion_cache_dir:
        num_visits, num_captions, visit_bytes, caption_bytes = cache_size(args, pairs, weight_dtype)
        try:
            cache = open_cache(args, noise_scheduler, model_index, training_timesteps, weight_dtype)
            free = shutil.disk_usage(args.inversion_cache_dir).free
        except (OSError, ValueError) as problem:
            error(f"--inversion_cache_dir {args.inversion_cache_dir} cannot be used: {one_line(problem)}")
        missing = max(0, num_visits - cache.num_visits())
        if not args.precompute_only:
            missing = min(missing, (max_train_steps - step) * visits_per_update)
        needed = num_visits * visit_bytes + num_captions * caption_bytes
        to_come = missing * visit_bytes + min(missing, num_captions) * caption_bytes
        logger.info(
            f"The cache takes at most {needed / GIB:.2f} GiB when it is full, {to_come / GIB:.2f} are to come; "
            f"the folder holds {cache.size() / GIB:.2f}"
        )
        if to_come > free:
            error(
                f"--inversion_cache_dir {args.inversion_cache_dir} has {free / GIB:.2f} GiB free; needed: "
                f"{to_come / GIB:.2f}, less with a lower --cached_timesteps"
            )
        if args.dry_run:
            logger.warning(
                "A dry run computes what the cache would give: its seconds are those of updates without one"
            )
            cache = None
            if accelerator.is_main_process:
                sizes = {"GiB at most": needed / GIB, "GiB to come": to_come / GIB, "GiB free": free / GIB}
                report_dry_run(args.output_dir, report, cache=sizes)
        train_dataset.cache = cache

    try:
        tokenizers, text_encoders, vae, unet = load_models(args, weight_dtype)
    except Exception as problem:  # damaged files fail in many kinds
        model = args.pretrained_model_name_or_path
        error(f"--pretrained_model_name_or_path {model} cannot be loaded: {one_line(problem)}")
    stay = () if vae is None or args.offload else (*text_encoders, vae)
    for module in (unet, *stay):
        module.to(accelerator.device)
    lora_parameters = add_lora(unet, args.rank, args.lora_alpha or args.rank, args.lora_target_modules)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()

    batches = pairs.batches(
        args.train_batch_size, args.seed, 0 if args.precompute_only else visit,
        checkpoint.stream if checkpoint else None, accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    collate_rows = partial(collate, tokenizers=tokenizers, model_index=model_index)
    if cache:
        collate_rows = partial(collate_cached, collate=collate_rows, tokenizers=tokenizers)
    dataloader = torch.utils.data.DataLoader(
        train_dataset,
        batch_sampler=batches,
        collate_fn=collate_rows,
        worker_init_fn=leave_signals_to_the_main_process,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )

    optimizer = create_optimizer(args, lora_parameters, visits_per_update)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )
    # The schedule stays unprepared and is stepped once per update, so it is the same for any number of processes.
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)
    policy, base = unet, unwrap_model(accelerator, unet)  # gradients are reduced through the wrapper only
    register_lora_checkpointing(accelerator, base, PIPELINE_CLASS)
    if args.compile:  # in place, so that reference and policy, wrapped or not, both are; a graph per mode and batch
        base.compile(dynamic=False)
    if checkpoint:
        accelerator.load_state(checkpoint.folder)
        accelerator.step = 0  # checkpoints lie between updates, whatever the accumulation was
        logger.info(f"Resuming from {checkpoint.folder}")
    if args.report_to != "none" and not args.dry_run and not args.precompute_only:
        config = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in options.items()
        }
        accelerator.init_trackers("inversion-dpo", config=config)

    prediction_type = noise_scheduler.config.prediction_type
    alphas_cumprod = noise_scheduler.alphas_cumprod  # on the CPU, where the inverter plans its steps
    alphas_cumprod_on_device = alphas_cumprod.to(accelerator.device)

    def predict(model, x_t, timesteps, cond):
        with accelerator.autocast():
            return predict_noise(model, x_t, timesteps, cond, alphas_cumprod_on_device, prediction_type, weight_dtype)

    def predict_guided(x_t, timesteps, cond, empty_cond):
        """The inverter's predictions; with guidance, conditional and unconditional ones in one call."""
        scale = args.inversion_guidance_scale
        if scale == 1:
            return predict(base, x_t, timesteps, cond)
        cond = map_condition(lambda x, empty: torch.cat([x, empty]), cond, empty_cond)
        noise, unconditional = predict(base, torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), cond).chunk(2)
        return unconditional + scale * (noise - unconditional)

    def predict_targets(model, trajectory, chunk, cond):
        """A model's predictions (m, 2B, C, h, w) at a chunk of a trajectory's targets, in one call."""
        x_t, timesteps = trajectory.latents[chunk], trajectory.timesteps[chunk]
        cond = map_condition(lambda x: x.repeat(len(x_t), *[1] * (x.ndim - 1)), cond)
        return predict(model, x_t.flatten(0, 1), timesteps.flatten(), cond).view_as(x_t)

    def encode(batch):
        """Step 1: latents (2B, C, h, w) and conditioning (2B, ...) of a batch."""
        nonlocal text_encoders, vae
        if vae is None:
            text_encoders, vae = load_encoders(args, weight_dtype)
            for module in () if args.offload else (*text_encoders, vae):
                module.to(accelerator.device)
        with on_device((vae, *text_encoders), accelerator.device):
            latents = encode_images(vae, batch["pixel_values"], args.vae_encode_batch_size)
            cond = encode_prompts(text_encoders, batch["input_ids"], batch)
        usable = finite_pairs(latents)  # the others count as ties, without a gradient, and are named below
        latents = latents.where(usable[:, None, None, None], 0.0)
        return Visits(latents, usable, cond)

    def encode_empty_prompts(batch):
        """What guidance is away from, None without guidance."""
        if args.inversion_guidance_scale == 1:
            return None
        with on_device(text_encoders, accelerator.device):
            return encode_prompts(text_encoders, batch["empty_input_ids"], batch)

    def follow(visits, batch):
        """Steps 2 and 3: the trajectory of encoded visits, and the reference's errors (M, 2B) on it."""
        latents, usable, cond = visits[:3]
        index = sample_timesteps(batch["uniforms"], 0, len(training_timesteps) - 1)
        timesteps = training_timesteps[index].repeat(1, 2)  # (M, 2B), shared by winner and loser

        # 2  Invert with the reference; the baseline takes forward noise instead
        if args.objective == "diffusion_dpo":
            timesteps = to_device(timesteps, latents.device)
            noise = forward_noise(batch["visits"], args.seed, (num_targets, *latents.shape[1:]))
            noise = to_device(noise, latents.device)
            x_t = add_noise(latents, noise, timesteps, alphas_cumprod_on_device)
            trajectory = Trajectory(timesteps, x_t, noise, None)
        else:
            by_reference = args.inversion_model == "reference"
            with reference_policy(base) if by_reference else contextlib.nullcontext():
                trajectory = invert(
                    partial(predict_guided, cond=cond, empty_cond=encode_empty_prompts(batch)),
                    latents, timesteps, alphas_cumprod, inversion_steps(args),
                    order=args.inversion_order, spacing=args.inversion_spacing,
                    predict_at_targets=by_reference and args.inversion_guidance_scale == 1,
                )  # fmt: skip

        # 3  Errors (M, 2B) of the reference at the trajectory's states, known from the inversion if it inverted
        reference_noise = trajectory.predicted
        if reference_noise is None:
            with torch.no_grad(), reference_policy(base):
                reference_noise = torch.cat([predict_targets(base, trajectory, chunk, cond) for chunk in chunks])
        reference_error = prediction_error(reference_noise, trajectory.noise).where(usable, 0.0)
        return visits._replace(trajectory=trajectory._replace(predicted=None), reference_error=reference_error)

    def compute_entries(batch):
        """What a cache keeps of a batch."""
        return encode(batch) if args.cache_latents else follow(encode(batch), batch)

    chunks = [slice(m, m + args.trajectory_chunk) for m in range(0, num_targets, args.trajectory_chunk)]
    metrics, known = (checkpoint.metrics, checkpoint[-2:]) if checkpoint else ([], ({}, {}))
    warn_of_row = partial(logger.warning, main_process_only=False)
    bad_rows = RowLog(warn_of_row, "is skipped", known[0])
    long_captions = RowLog(warn_of_row, "has its caption cut", known[1])
    damaged_shards = RowLog(warn_of_row, "of the cache is damaged, what it held is computed again", {})

    def note_unusable(names, usable):
        lost = [name for name, is_usable in zip(names, usable, strict=False) if not is_usable]
        bad_rows.add([(name, "latents not finite: the VAE overflows") for name in lost])

    def note(batch, usable=()):
        """Counts and names what was met in a batch's rows and in the cache."""
        bad_rows.add(batch["bad_rows"])
        note_unusable(batch["rows"], usable)
        long_captions.add(batch["cut_captions"])
        if cache:
            damaged_shards.add([shard for cached in batch["cached"] for shard in cached.damaged])
            damaged_shards.add(list(cache.damaged.items()))

    def reasons_of_all_processes():
        return [dict(gather_object(list(log.reasons.items()))) for log in (bad_rows, long_captions)]

    def warn_of_skipped(reasons):
        """Returns how many rows were skipped for each reason, and says so."""
        skipped = count_by_reason(reasons.values())
        for reason, count in skipped.items():
            logger.warning(f"{count} rows were skipped for {reason}")
        return skipped

    validation = None
    if args.validation_prompts and accelerator.is_main_process and not args.dry_run:
        sampling = {
            "height": args.resolution, "width": args.resolution,
            "num_inference_steps": args.validation_inference_steps, "guidance_scale": args.validation_guidance_scale,
        }  # fmt: skip
        pipeline = make_pipeline(args, model_index, tokenizers, text_encoders, vae, base)
        validation = Validation(
            pipeline, Path(args.output_dir) / VALIDATION_DIR, args.validation_prompts, args.num_validation_images,
            args.seed, sampling, accelerator.autocast, logger.warning,
        )  # fmt: skip
    means, stop, is_stopping = RunningMeans(), StopSignal(logger.warning), False
    if args.precompute_only:
        num_batches = math.ceil(
            args.cached_timesteps * pairs.num_pairs / (visits_per_update // args.gradient_accumulation_steps)
        )
        to_do = tqdm(
            itertools.islice(dataloader, num_batches), total=num_batches, desc="Batches",
            disable=not accelerator.is_local_main_process,
        )  # fmt: skip
        started = time.monotonic()
        is_filled = fill_cache(cache, to_do, compute_entries, note, accelerator, stop)
        stop.restore()
        accelerator.wait_for_everyone()
        logger.info(
            f"{'Filled' if is_filled else 'Stopped filling'} the cache after {time.monotonic() - started:.0f} s: "
            f"{cache.size() / GIB:.3f} GiB in {args.inversion_cache_dir}"
        )
        skipped = reasons_of_all_processes()[0]
        warn_of_skipped(skipped)
        policy = unet = None  # the wrapper goes before the group of processes
        leave_together(accelerator)
        if len(skipped) > args.max_bad_fraction * len(pairs):
            raise RuntimeError(
                f"--max_bad_fraction is {args.max_bad_fraction:g}, but {len(skipped)} of {len(pairs)} pairs cannot be "
                "used; the cache holds the others"
            )
        if not is_filled:
            sys.exit(128 + (stop.received or signal.SIGTERM))
        return
    data = ", ".join(f"{count} {name}" for name, count in pairs.counts().items())
    logger.info(
        f"{data or 'a stream of pairs'}; {max_train_steps} updates of {visits_per_update} pairs; {args.objective} at "
        f"{num_targets} timesteps a pair in {training_timesteps[0]}..{training_timesteps[-1]}; "
        f"{sum(parameter.numel() for parameter in lora_parameters):,} trainable parameters"
    )
    last_step, times = max_train_steps, []
    if args.dry_run:
        last_step = step + DRY_RUN_UPDATES
        if accelerator.is_main_process:
            examples = [train_dataset[i, item] for i, item in enumerate(pairs.sample(8, args.seed))]
            draw_contact_sheet(examples).save(Path(args.output_dir) / CONTACT_SHEET_FILE)
            data = inspect_pairs(train_dataset, tokenizers, args.max_bad_fraction)
            report_dry_run(args.output_dir, report, data=data)
            if "problem" in data:
                error(data["problem"])
    progress = tqdm(total=last_step, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)
    policy.train()
    good_steps = bad_steps = bad_steps_in_a_row = 0

    usable_rows, num_bad_rows, first_visit = [], 0, visit
    for batch in dataloader if step < last_step else []:
        note(batch)
        means.add(bad_rows=torch.tensor(float(len(batch["bad_rows"])), device=accelerator.device))
        with accelerator.accumulate(policy):
            # 1  Encode, 2 invert, 3 find the reference's errors; a cache has all of these, or the first, from before
            if cache:
                visits = join_visits(cache.complete(batch, compute_entries), alphas_cumprod_on_device)
            else:
                visits = encode(batch)
            if visits.trajectory is None:
                visits = follow(visits, batch)
            usable_rows.append((batch["rows"], visits.usable))
            device = accelerator.device
            strength = to_device(batch["strength"], device) if args.preference_strength == "margin" else None
            is_tie = to_device(batch["is_tie"], device) if args.tie_policy == "soft" else None

            # 4  Errors of the policy at the same states, chunk by chunk, and the loss
            def policy_error(chunk, visits=visits):
                noise = predict_targets(policy, visits.trajectory, chunk, visits.cond)
                return prediction_error(noise, visits.trajectory.noise[chunk]).where(visits.usable, 0.0)

            def loss_of(policy_error, visits=visits, strength=strength, is_tie=is_tie):
                reference_error = visits.reference_error
                means.add(policy_error=policy_error, reference_error=reference_error)
                if args.objective == "inversion_dpo":  # the mean over the trajectory stands inside the log-sigmoid
                    policy_error, reference_error = policy_error.mean(0), reference_error.mean(0)
                loss, metrics = preference_loss(
                    policy_error, reference_error, args.beta_dpo, args.loss_type, args.label_smoothing,
                    strength, is_tie,
                )  # fmt: skip
                means.add(loss=loss, **metrics)
                return loss.mean()

            backward_in_chunks(
                [partial(policy_error, chunk) for chunk in chunks],
                loss_of, accelerator.backward, partial(accelerator.no_sync, policy),
            )  # fmt: skip
            if not accelerator.sync_gradients:
                continue

            # Once per update: clip, look at the metrics, step
            means.add(grad_norm=accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm))
            means.add(stop=torch.full((), stop.received > 0, device=accelerator.device))  # a tensor's copy would wait
            means.add(usable=torch.cat([usable for _, usable in usable_rows]))
            logs = means.pop(accelerator)
            is_stopping = logs.pop("stop") > 0
            usable_share = logs.pop("usable")
            num_bad_rows += logs.pop("bad_rows") * visits_per_update / args.train_batch_size
            if usable_share < 1:
                for names, usable in usable_rows:
                    note_unusable(names, usable.tolist())
            usable_rows.clear()
            is_bad = not (usable_share and math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"]))
            if usable_share and (not is_bad or accelerator.scaler is not None):
                optimizer.step()  # a loss scaler skips bad steps by itself, and must see them to adapt
            elif accelerator.scaler is not None:
                accelerator.scaler.update()
            optimizer.zero_grad()

        step, visit = step + 1, visit + visits_per_update
        good_steps, bad_steps = good_steps + (not is_bad), bad_steps + is_bad
        bad_steps_in_a_row = bad_steps_in_a_row + 1 if is_bad else 0
        logs |= {"lr": lr_scheduler.get_last_lr()[0], "bad_steps": bad_steps}
        metrics.append({"step": step, **logs})
        if is_stopping or step % args.log_every == 0 or step == max_train_steps:
            accelerator.log(mean_metrics(metrics[-((step - 1) % args.log_every + 1) :]), step=step)
        if not is_bad:
            lr_scheduler.step()
        progress.update()
        times.append(time.perf_counter())
        progress.set_postfix_str(
            f"loss={logs['loss']:.4f}, acc={logs['rewards/accuracies']:.2f}, margin={logs['rewards/margins']:.3f}"
        )
        if bad_steps_in_a_row >= args.max_bad_steps:
            culprit, remedy = "loss or gradient were not finite", "a lower --learning_rate, or bf16 instead of fp16"
            if not usable_share:
                culprit, remedy = "no latents were finite", "another precision or --pretrained_vae_model_name_or_path"
            raise RuntimeError(
                f"{culprit} for {bad_steps_in_a_row} updates in a row; the LoRA and the last checkpoint are "
                f"as they were before. Try {remedy}"
            )
        if exceeds(num_bad_rows, args.max_bad_fraction, visit - first_visit + num_bad_rows):
            reasons = list_reasons(reasons_of_all_processes()[0].values())
            num_rows = round(visit - first_visit + num_bad_rows)
            raise RuntimeError(
                f"--max_bad_fraction is {args.max_bad_fraction:g}, but of {num_rows} rows read so far clearly more "
                f"cannot be used: {reasons}"
            )
        if good_steps == 10 and is_zero_lora(base):
            raise RuntimeError(
                "after 10 updates the LoRA is still zero, so nothing is learned: is the learning rate above 0, "
                f"and do winner and loser differ? (lr {lr_scheduler.get_last_lr()[0]}, grad_norm {logs['grad_norm']})"
            )
        is_due = is_stopping or step % args.checkpointing_steps == 0 or step == max_train_steps
        if is_due and not args.dry_run:
            folder = Path(args.output_dir) / f"checkpoint-{step}"
            reasons = reasons_of_all_processes()
            reached = Checkpoint(
                folder, step, visit, pairs.num_pairs, options, metrics, batches.position(visit), *reasons
            )
            save_checkpoint(accelerator, reached, args.checkpoints_total_limit)
            if cache:
                cache.flush()
        if validation and step % args.validation_steps == 0 and step < max_train_steps and not is_stopping:
            log_pictures(accelerator, validation.draw(step), step)
        if is_stopping or step >= last_step:
            break

    progress.close()
    stop.restore()
    is_unfinished, push_failed = is_stopping and step < last_step, False
    skipped, cut = reasons_of_all_processes()
    skipped = warn_of_skipped(skipped)
    if cut:
        logger.warning(f"{len(cut)} captions were longer than what is read")
    if bad_steps:
        logger.warning(f"{bad_steps} updates were skipped, their loss or gradient was not finite")
    if args.dry_run and accelerator.is_main_process and not is_unfinished:
        if args.objective != "diffusion_dpo":
            with reference_policy(base):
                errors = reconstruction_errors(
                    partial(predict_guided, cond=visits.cond, empty_cond=encode_empty_prompts(batch)),
                    visits.latents, training_timesteps, alphas_cumprod, num_steps=inversion_steps(args),
                    order=args.inversion_order, spacing=args.inversion_spacing,
                )  # fmt: skip
            report_dry_run(args.output_dir, report, inversion={"relative error of going there and back, from": errors})
        seconds = min(after - before for before, after in itertools.pairwise(times))
        updates = max_train_steps - step + len(times)
        cost = {
            "trainable parameters": sum(parameter.numel() for parameter in lora_parameters),
            "peak memory": peak_memory(),
            "seconds an update": seconds,
            "updates": updates,
            "hours": seconds * updates / 3600,
        }
        report_dry_run(args.output_dir, report, training=cost)
    if is_unfinished:
        logger.warning(f"Stopped after step {step}; go on with --resume_from_checkpoint latest")
    elif accelerator.is_main_process and not args.dry_run:
        logger.info(f"Saved {save_lora(base, args.output_dir, PIPELINE_CLASS)}")
        files = validation.draw(step) if validation else []
        log_pictures(accelerator, files, step)
        record = {
            "command": command_line([Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)]),
            "pipeline": PIPELINE_CLASS.__name__,
            "updates": step,
            "pairs_per_update": visits_per_update,
            "processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "data": {
                **pairs.counts(),
                **{f"rows skipped while training for {r}": n for r, n in skipped.items()},
                "captions cut": len(cut),
            },  # fmt: skip
            "metrics": final_metrics(metrics),
            "versions": versions(),
            "options": options,
        }
        pictures = dict(
            zip(args.validation_prompts or [], (f"{VALIDATION_DIR}/{f.name}" for f in files), strict=False)
        )
        write_results(args.output_dir, record, metrics, pictures, repo_id, args.hub_token)
        if repo_id:
            try:
                push_to_hub(repo_id, args.output_dir, args.hub_token)
            except RuntimeError as problem:
                logger.error(problem)
                push_failed = True
            else:
                logger.info(f"Pushed to {repo_id}")
    policy = unet = None  # the wrapper goes before the group of processes
    leave_together(accelerator)
    if is_unfinished:
        sys.exit(128 + (stop.received or signal.SIGTERM))  # as a shell reports a signal
    if push_failed:
        sys.exit(1)


def unwrap_model(accelerator, model):
    """Returns the model inside the wrappers of accelerate and torch.compile."""
    model = accelerator.unwrap_model(model)
    return model._orig_mod if is_compiled_module(model) else model


if __name__ == "__main__":
    main()

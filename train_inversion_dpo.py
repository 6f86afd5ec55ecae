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
#     "pyyaml>=6.0",
# ]
# ///
"""Aligns Stable Diffusion 1.5 / 2.x with preference pairs: a LoRA by inversion-based DPO.

    accelerate launch train_inversion_dpo.py \
        --pretrained_model_name_or_path=... --dataset_name=... --output_dir=...

Each step: 1 encode winner, loser and caption; 2 invert both images with the reference policy (the U-Net without its
LoRA) to a few timesteps, which yields the noise that belongs to each image; 3 the reference's errors there, which the
inversion knows already; 4 the policy's errors at the same states, and the DPO loss on both. A cache keeps 1 to 3.

Against the papers: 1 the target is the noise implied by the image, not the reference's prediction (with which a LoRA
never starts to move); 2 the latent is inverted to exactly the timestep it is trained at; 3 a LoRA is trained, not the
whole U-Net. examples/README.md explains each. Needs `inversion_utils.py` beside it, nothing else.
"""

import argparse
import contextlib
import datetime
import itertools
import logging
import math
import os
import shlex
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    send_to_device,
    set_seed,
)
from tqdm.auto import tqdm

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported, it warns of kernels for CPUs

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.utils import check_min_version, is_bitsandbytes_available, is_xformers_available
from transformers import CLIPTextModel, CLIPTokenizer

from inversion_utils import (
    BEST_DIR,
    KOHYA_FILE,
    LORA_FILE,
    LORA_TARGETS,
    LOSS_TYPES,
    METRICS_FILE,
    PREDICTION_TYPES,
    VALIDATION_DIR,
    Checkpoint,
    HeldOut,
    PreferenceDataset,
    RunningMeans,
    StopSignal,
    TargetCache,
    Targets,
    Validation,
    add_lora,
    add_metrics,
    add_noise,
    backward_in_chunks,
    best_margin,
    check_launcher,
    check_output_dir,
    check_resumed_run,
    check_tokenizer,
    collate,
    collate_targets,
    create_hub_repo,
    cut_metrics,
    encode_images,
    find_checkpoint,
    fingerprint,
    forward_noise,
    hash_tensors,
    invert,
    leave_signals_to_the_main_process,
    load_pairs,
    lock_output_dir,
    log_pictures,
    lora_shape,
    lora_weights,
    noise_from_model_output,
    note_skipped,
    number,
    on_device,
    one_line,
    only_variant,
    prediction_error,
    preference_loss,
    printable,
    push_to_hub,
    read_lora,
    reference_policy,
    register_lora_checkpointing,
    sample_timesteps,
    save_checkpoint,
    to_device,
    visit_batches,
    with_config,
    without_overflow,
    write_kohya,
    write_lora,
    write_results,
    writing,
)

check_min_version("0.42.0")
logger = get_logger(__name__)

PIPELINE, LORA_LOADER = "StableDiffusionPipeline", StableDiffusionLoraLoaderMixin
LR_SCHEDULERS = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]  # which needs rules
MAX_BAD_STEPS = 20  # in a row, before the run ends
NUM_BANDS = 5  # of timesteps, in which held-out pairs are watched
NOT_FINITE = "its targets are not finite: the VAE overflows"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Align Stable Diffusion 1.5 / 2.x with preference pairs by inversion-based DPO.",
        usage="%(prog)s --pretrained_model_name_or_path M --dataset_name D --output_dir O [options, see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count, natural, positive = number(int, least=1), number(int, least=0), number(float, above=0)
    fraction, path = number(float, least=0, below=1), os.path.expanduser
    flag = {"action": argparse.BooleanOptionalAction, "default": False}

    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", type=path, required=True,
        help="model to align: a Hub id, or a folder in diffusers' layout")
    add("--pretrained_vae_model_name_or_path", type=path, help="another VAE than the model's own")
    add("--revision", help="revision of the model on the Hub")
    add("--variant", help="variant of the model's files, such as fp16")
    add("--cache_dir", type=path, help="folder for downloads")
    add("--config", type=path,
        help="file of options, YAML or JSON, such as a run's training_config.json; the command line wins")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", type=path, help="preference pairs: whatever datasets.load_dataset takes")
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split_name", default="train", help="split to train on")
    add("--train_data_dir", type=path, help="a local folder instead, such as examples/convert_pairs.py writes")
    add("--image_0_column", default="jpg_0", help="column of the first image")
    add("--image_1_column", default="jpg_1", help="column of the second image")
    add("--label_column", default="label_0",
        help="column of the label: 1 if image 0 is better, 0 if image 1 is, 0.5 for a tie")
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
    add("--timesteps_per_pair", type=count,
        help="targets per pair; more are steadier and slower (4 for inversion_dpo, else 1)")
    add("--min_timestep", type=natural, default=0, help="lowest training timestep")
    add("--max_timestep", type=natural, help="highest training timestep; high ones teach layout, not detail")
    add("--timesteps_subset", type=natural, nargs="+",
        help="instead of a band: only these timesteps, such as those that a distilled model is sampled at")
    add("--trajectory_chunk", type=count, default=4,
        help="timesteps per policy call; fewer take less memory, and a second forward if one call does not hold all")
    add("--inversion_steps", type=count,
        help="U-Net calls of an inversion; more are more exact (timesteps_per_pair + 4, without the 4 for a subset)")
    add("--inversion_model", choices=["reference", "policy"], default="reference",
        help="what inverts; the policy takes extra calls and cannot be cached")
    add("--beta_dpo", type=positive, default=2000.0,
        help="higher stays closer to the reference; the loss has beta / 2: 5000 is 2500 in diffusers' SD script")
    add("--loss_type", choices=LOSS_TYPES, default="sigmoid", help="loss on the difference of winner and loser")
    add("--label_smoothing", type=number(float, least=0, below=0.5), default=0.0,
        help="share of labels believed wrong; higher trusts them less; sigmoid only")

    add = parser.add_argument_group("cache of what training does not change, for runs of several epochs").add_argument
    add("--inversion_cache_dir", type=path, help="folder for latents, noise, reference errors and text embeddings")
    add("--cached_draws", type=count, default=4,
        help="draws of timesteps, crop and flip per pair, one per epoch in turn; more vary more and take more disk")
    add("--precompute_only", **flag, help="fill the cache with all draws of all pairs, train nothing")

    add = parser.add_argument_group("LoRA and optimization").add_argument
    add("--rank", type=count, default=16, help="rank of the LoRA; higher learns more and takes more memory")
    add("--lora_alpha", type=positive, help="scale of the LoRA, times 1 / rank; higher learns faster (rank)")
    add("--lora_target_modules", nargs="+", default=list(LORA_TARGETS),
        help="modules that get a LoRA: ends of names, or one regular expression; more learn more and take more memory")
    add("--lora_init", type=path, help="LoRA to go on from, which decides rank, alpha and targets: path or Hub id")
    add("--reference", choices=["base", "init"], default="base",
        help="reference policy: the base model, or the base model with the LoRA of --lora_init")
    add("--learning_rate", type=positive, default=1e-4, help="learning rate after warm-up")
    add("--scale_lr", **flag, help="multiply the learning rate by processes x accumulation x batch size")
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
    add("--quantize_base", choices=["nf4", "int8"],
        help="keep the U-Net's frozen linear layers in 4 or 8 bits, on a GPU: less memory, less exact, slower")
    add("--offload", **flag, help="keep VAE and text encoders in CPU memory between uses; slower")
    add("--compile", **flag, help="compile the U-Net's blocks: slow first steps, faster others")
    add("--vae_encode_batch_size", type=count, default=8, help="images per VAE call; fewer take less memory")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="of the frozen parts (accelerate's setting)")
    add("--allow_tf32", **flag, help="faster, less exact float32 products on Ampere GPUs and later")
    add("--enable_xformers_memory_efficient_attention", **flag, help="xformers attention instead of SDPA")

    add = parser.add_argument_group("validation: pictures at scales of the LoRA, from the same seeds").add_argument
    add("--validation_prompts", nargs="+", help="prompts to sample, each in quotes; also sampled at the end")
    add("--validation_steps", type=count, default=100, help="steps between validations; fewer take more time")
    add("--validation_lora_scales", type=number(float, least=0), nargs="+", default=[0.0, 1.0],
        help="columns of the pictures; 0 is the base model, and a lower scale keeps more of it")
    add("--num_eval_pairs", type=natural, default=0, help="pairs kept out of training, to watch the policy on")
    add("--eval_steps", type=count, default=100, help="steps between looks at these; fewer take more time")
    add("--save_best", **flag, help="keep in best/ their best LoRA whose winners' error rose by at most 2 %%")
    add("--num_validation_images", type=count, default=4, help="samples per prompt; more show more and take time")
    add("--validation_inference_steps", type=count, default=30, help="sampler steps; more are finer and slower")
    add("--validation_guidance_scale", type=number(float, least=0), default=7.5,
        help="guidance of the samples; higher obeys the prompt more and varies less")

    add = parser.add_argument_group("Hugging Face Hub").add_argument
    add("--push_to_hub", **flag, help="upload LoRA, card, pictures and configuration at the end")
    add("--hub_model_id", help="repository, as user/name (the name of --output_dir)")
    add("--hub_token", help="token that may write; HF_TOKEN or `hf auth login` keep it out of the command line")
    add("--hub_private_repo", **flag, help="create the repository as a private one")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=path, required=True, help="folder for the LoRA, checkpoints, pictures and logs")
    add("--output_kohya_format", **flag,
        help=f"also write {KOHYA_FILE}, for ComfyUI, Forge, AUTOMATIC1111 and sd-scripts")
    add("--seed", type=number(int, least=0, most=2**32 - 1), default=0, help="the same seed gives the same run")
    add("--checkpointing_steps", type=count, default=100, help="steps between checkpoints; the last has one too")
    add("--checkpoints_total_limit", type=count, help="keep only the N newest checkpoints")
    add("--resume_from_checkpoint", type=path, help="'latest' in --output_dir, or a folder checkpoint-<step>")
    add("--logging_dir", type=path, default="logs", help="folder of the logs, within --output_dir")
    add("--report_to", choices=[*LoggerType.list(), "none"], default="tensorboard", help="where metrics are logged")
    # fmt: on

    args = parser.parse_args(with_config(parser, argv))
    check_args(args, parser.error)
    return args, parser.error


def check_args(args, error):
    """Ends the run by `error` if options contradict each other or need what is not installed."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        error("give the data by either --dataset_name or --train_data_dir")
    for name in ("output_dir", "inversion_cache_dir"):
        folder, data = getattr(args, name), args.train_data_dir
        if folder and data and Path(folder).resolve().is_relative_to(Path(data).resolve()):
            error(f"--{name} {folder} lies in --train_data_dir, whose files it would then be among")
    if bool(args.winner_column) != bool(args.loser_column):
        error("--winner_column and --loser_column go together")
    columns = (args.image_0_column, args.image_1_column, args.label_column)
    if args.winner_column and columns != ("jpg_0", "jpg_1", "label_0"):
        error("--winner_column excludes --image_0_column, --image_1_column and --label_column")
    if args.loss_type == "hinge" and args.tie_policy == "soft":
        error("--tie_policy soft does not go with --loss_type hinge, which has no loss for ties")
    if args.loss_type != "sigmoid" and args.label_smoothing:
        error(f"--label_smoothing goes with --loss_type sigmoid, not {args.loss_type}")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:
        error("--lr_warmup_steps needs another --lr_scheduler than constant, such as constant_with_warmup")
    if args.timesteps_subset and (args.min_timestep, args.max_timestep) != (0, None):
        error("--timesteps_subset excludes --min_timestep and --max_timestep")
    if args.objective != "diffusion_dpo" and inversion_steps(args) < timesteps_per_pair(args):
        error(
            f"--inversion_steps is {args.inversion_steps}; needed: {timesteps_per_pair(args)} or more, one a timestep"
        )
    if args.inversion_model == "policy" and (args.inversion_cache_dir or args.objective == "diffusion_dpo"):
        error("--inversion_model policy goes with an objective that inverts, and without --inversion_cache_dir")
    if args.save_best and not args.num_eval_pairs:
        error("--save_best needs --num_eval_pairs")
    if args.reference == "init" and not args.lora_init:
        error("--reference init needs --lora_init")
    if args.lora_init and (args.rank, args.lora_alpha, args.lora_target_modules) != (16, None, list(LORA_TARGETS)):
        error("--lora_init decides these itself: --rank, --lora_alpha and --lora_target_modules")
    if args.precompute_only and not args.inversion_cache_dir:
        error("--precompute_only needs --inversion_cache_dir")
    if args.hub_token and args.report_to not in ("tensorboard", "none"):
        error(f"--hub_token would be stored by --report_to {args.report_to}; log in with `hf auth login` instead")
    if args.report_to not in ("all", "none", *map(str, get_available_trackers())):
        error(f"--report_to {args.report_to} is not installed: pip install {args.report_to}")
    if (args.use_8bit_adam or args.quantize_base) and not is_bitsandbytes_available():
        error("--use_8bit_adam and --quantize_base need bitsandbytes: pip install bitsandbytes")
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
    last, count = int((noise_scheduler.alphas_cumprod > 0).sum()) - 1, timesteps_per_pair(args)
    subset = sorted(set(args.timesteps_subset or ()))
    if subset and (subset[-1] > last or len(subset) < count):
        raise ValueError(f"--timesteps_subset is {subset}; allowed: {count} timesteps or more, from 0 to {last}")
    highest = last if args.max_timestep is None else args.max_timestep
    if not args.min_timestep <= highest <= last:
        band = f"--min_timestep {args.min_timestep} and --max_timestep {highest}"
        raise ValueError(f"{band}; allowed: an interval within 0 to {last}")
    return torch.tensor(subset or range(args.min_timestep, highest + 1))


def where(args, subfolder, **options):
    """Returns the keyword arguments with which `from_pretrained` finds a part of the model."""
    return {"subfolder": subfolder, "revision": args.revision, "cache_dir": args.cache_dir, **options}


def vae_location(args):
    """Returns the path of the VAE, and the keyword arguments that find it there."""
    if args.pretrained_vae_model_name_or_path:
        variant = only_variant(Path(args.pretrained_vae_model_name_or_path)) or None  # --variant is the model's
        return args.pretrained_vae_model_name_or_path, {"cache_dir": args.cache_dir, "variant": variant}
    return args.pretrained_model_name_or_path, where(args, "vae", variant=args.variant)


def read_configs(args):
    """Returns noise scheduler, pipeline's configuration or {}, tokenizers, the model's fingerprints, and initial LoRA.

    Loads no weights of the model. Raises ValueError if this script does not align it.
    """
    model, (vae_path, vae_options) = args.pretrained_model_name_or_path, vae_location(args)
    source, pipeline_config, part = f"--pretrained_model_name_or_path {model}", {}, "unet"
    if Path(model).is_file():
        convert = f"diffusers.{PIPELINE}.from_single_file({model!r}).save_pretrained('my-model')"
        raise ValueError(f'{source} is a single file; make a folder of it: python -c "import diffusers; {convert}"')
    with contextlib.suppress(OSError, ValueError):
        pipeline_config = DiffusionPipeline.load_config(model, revision=args.revision, cache_dir=args.cache_dir)
    try:
        unet, commit = UNet2DConditionModel.load_config(model, return_commit_hash=True, **where(args, "unet"))
        part = "scheduler"
        scheduler = DDPMScheduler.load_config(model, **where(args, "scheduler"))
        noise_scheduler = DDPMScheduler.from_config(scheduler)
        part = f"vae ({vae_path})"
        vae, vae_commit = AutoencoderKL.load_config(vae_path, return_commit_hash=True, **vae_options)
    except (OSError, ValueError, NotImplementedError) as error:
        kind = pipeline_config.get("_class_name", "model")
        raise ValueError(f"{source} (a {kind}) has no {part} that this script can use: {one_line(error)}") from error
    sampler, prediction_type = scheduler.get("_class_name", "DDPMScheduler"), noise_scheduler.config.prediction_type
    if problem := family_problem(unet):
        raise ValueError(f"{source}: {problem}")
    if unet.get("in_channels", 4) != vae.get("latent_channels", 4):
        raise ValueError(
            f"{source}: U-Net and VAE differ in channels; inpainting models and the like are not supported"
        )
    if sampler.startswith(("EDM", "FlowMatch")) or not hasattr(diffusers, sampler):
        raise ValueError(f"{source} has a {sampler}; models scaled by sigma and flow models are not supported")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"{source} predicts {prediction_type!r}; supported are {' and '.join(PREDICTION_TYPES)}")
    factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    parts = ("unet", "text_encoder", "text_encoder_2", *(["vae"] if vae_path == model else []))
    for folder in (Path(model, name) for name in parts):
        if not args.variant and (variant := only_variant(folder)):
            raise ValueError(f"{source}: {folder} holds one variant only; try --variant {variant}")
    try:
        part = "tokenizer"
        for tokenizer in (tokenizers := load_tokenizers(args)):
            check_tokenizer(tokenizer)
        part = f"scheduler for --validation_prompts ({sampler})"
        _ = args.validation_prompts and load_sampler(args)
    except Exception as error:  # `transformers` fails in many kinds
        raise ValueError(f"{source} has no usable {part}: {one_line(error)}") from error
    if args.resolution % factor:
        raise ValueError(f"--resolution is {args.resolution}; allowed: multiples of {factor}, the VAE's factor")
    lora_init, fingerprints = None, [fingerprint(model, commit), fingerprint(vae_path, vae_commit)]
    if args.lora_init:
        try:
            lora_init = read_lora(args.lora_init, unet, LORA_LOADER, cache_dir=args.cache_dir)
        except ValueError as error:
            raise ValueError(f"--lora_init {args.lora_init}: {error}") from error
    elif args.lora_target_modules != list(LORA_TARGETS):
        with torch.device("meta"):
            add_lora(UNet2DConditionModel.from_config(unet), 1, 1, args.lora_target_modules)
    return noise_scheduler, pipeline_config, tokenizers, fingerprints, lora_init


def load_unet(args, weight_dtype):
    """Returns the U-Net in `weight_dtype`, its linear layers quantized (QLoRA, arXiv 2305.14314) if asked for."""
    options = {"dtype": weight_dtype, "variant": args.variant}
    if args.quantize_base == "nf4":
        options["quantization_config"] = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=weight_dtype
        )
    elif args.quantize_base == "int8":  # a threshold would make a sample's result depend on the rest of its batch
        options["quantization_config"] = diffusers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return UNet2DConditionModel.from_pretrained(args.pretrained_model_name_or_path, **where(args, "unet", **options))


def load_sampler(args):
    """Returns the scheduler that the model is sampled with, for validation."""
    model = args.pretrained_model_name_or_path
    name = DDPMScheduler.load_config(model, **where(args, "scheduler")).get("_class_name", "DDPMScheduler")
    return getattr(diffusers, name).from_pretrained(model, **where(args, "scheduler"))


# What belongs to the family of models


def family_problem(unet):
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
    model, options = args.pretrained_model_name_or_path, {"variant": args.variant, "dtype": weight_dtype}
    text_encoder = CLIPTextModel.from_pretrained(model, **where(args, "text_encoder", **options))
    vae_path, vae_options = vae_location(args)
    vae = AutoencoderKL.from_pretrained(vae_path, dtype=weight_dtype, **vae_options)
    return [text_encoder.requires_grad_(False).eval()], vae.requires_grad_(False).eval()


def make_pipeline(args, pipeline_config, tokenizers, text_encoders, vae, unet):
    """Returns a pipeline of the loaded models, for validation."""
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoders[0], tokenizer=tokenizers[0], unet=unet, scheduler=load_sampler(args),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def encode_prompts(text_encoders, batch, pipeline_config):
    """Returns the U-Net's conditioning (2B, ...), for the winners and the losers of a batch."""
    text_encoder = text_encoders[0]
    embeds = text_encoder(to_device(batch["input_ids"][0], text_encoder.device))[0]
    return {"encoder_hidden_states": torch.cat([embeds, embeds])}


def predict_noise(unet, x_t, timesteps, cond, alphas_cumprod, prediction_type, weight_dtype):
    """Returns the U-Net's noise prediction (N, C, h, w), float32, for epsilon- and v-prediction models alike."""
    model_output = unet(x_t.to(weight_dtype), timesteps, **cond).sample
    return noise_from_model_output(model_output, x_t, timesteps, alphas_cumprod, prediction_type)


# The run


def start(args, error):
    """Returns the accelerator and the dtype of the frozen weights; sets up logging, seeds and precision."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, args.logging_dir)
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=3))],  # while one process samples
    )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        error("--mixed_precision fp16 needs a GPU, which this run does not have; use bf16 or no")
    if args.quantize_base and accelerator.device.type not in ("cuda", "xpu"):
        error(f"--quantize_base {args.quantize_base} needs a GPU, which this run does not have")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    if args.hub_token:
        logger.warning("--hub_token: launchers print the command line if a run fails; `hf auth login` is safer")
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    set_seed(args.seed)
    return accelerator, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def open_cache(args, pairs, timesteps, weight_dtype, fingerprints, configs, lora_hash):
    """Returns the cache of the targets with this run's settings, the same in all processes."""
    names = ["resolution", "random_crop", "random_flip", "proportion_empty_prompts", "tie_policy", "seed"]
    names += ["max_train_samples", "num_eval_pairs", "variant", "allow_tf32", "quantize_base"]
    names += [name for name in vars(args) if name.endswith("_column")]
    settings = {
        "pipeline": PIPELINE,
        "model": fingerprints,
        "configs": [{k: v for k, v in config.items() if not k.startswith("_")} for config in configs],
        "dtype": str(weight_dtype),
        "reference": lora_hash if args.reference == "init" else None,
        "data": [pairs.fingerprint, len(pairs)],
        "timesteps": [timesteps_per_pair(args), int(timesteps[0]), int(timesteps[-1]), args.timesteps_subset],
        "inversion_steps": None if args.objective == "diffusion_dpo" else inversion_steps(args),
        **{name: getattr(args, name) for name in names},
    }
    settings = broadcast_object_list([settings])[0]  # `datasets` may tell processes different fingerprints
    return TargetCache(args.inversion_cache_dir, settings)


def draws_to_read(args, batches, num_pairs, visit, count):
    """Returns (place, draw) of what a number of visits read from the cache, or of all there is to precompute."""
    if args.precompute_only:
        visit, count = 0, num_pairs * args.cached_draws
    visits = itertools.islice(batches(batch_size=1, visit=visit, num_draws=args.cached_draws), max(0, count))
    return list(dict.fromkeys(key[1:] for ((key, _),) in visits))


def batches_of(items, batch_size, wanted):
    """Cuts items into batches and returns those that hold a wanted one.

    So an item's batch, and with it the last bits of its targets, are the same whatever has been found already.
    """
    wanted, batches = set(wanted), [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    return [batch for batch in batches if not wanted.isdisjoint(batch)]


def fill_cache(accelerator, cache, batches, load, find_targets, note, stop):
    """Computes the targets that this process's share of the cache lacks; returns whether a signal came first."""
    batches = [[((3, place, draw), place) for place, draw in batch] for batch in batches]
    is_hidden = not batches or not accelerator.is_local_main_process
    for batch in tqdm(load(batch_sampler=batches), total=len(batches), desc="Caching", disable=is_hidden):
        not_finite = cache.save(batch["keys"], find_targets(batch))
        cache.unusable |= {batch["keys"][i][1:] for i in not_finite}
        note(batch["skipped"] + [(batch["rows"][i], NOT_FINITE) for i in not_finite])
        if stop.received:
            break
    cache.unusable = set(gather_object(list(cache.unusable)))
    if cache.unusable and not any(cache.folder.glob("draw-*/*.safetensors")):
        raise RuntimeError(f"no pair can be used: {NOT_FINITE}")
    return bool(accelerator.reduce(torch.tensor(float(stop.received), device=accelerator.device)) > 0)


def hold_out(args, accelerator, pairs, step, training_timesteps, load, find_targets, note, cache, missing):
    """Returns the held-out pairs with their targets: this process's share, a timestep in the middle of each band."""
    last, num_bands = len(training_timesteps), min(NUM_BANDS, len(training_timesteps))
    places = range(len(pairs))[accelerator.process_index :: accelerator.num_processes]
    dataset, targets = PreferenceDataset(pairs, args.resolution, num_bands, args.seed), []

    def batches(places, wanted):
        return [[((5, x, 0), x) for x in batch] for batch in batches_of(places, args.train_batch_size, wanted)]

    for batch in load(dataset, batch_sampler=batches(places, missing if cache else places)):
        note(batch["skipped"])
        batch["uniforms"] = torch.full_like(batch["uniforms"], 0.5)
        found = find_targets(batch)
        # An unreadable row was replaced by the next, which is held out, too, and would be counted twice.
        rows = zip(batch["keys"], batch["rows"], found.usable.tolist(), strict=False)
        rows = [(row, row == pairs.row_name(key[1]), is_finite) for key, row, is_finite in rows]
        note((row, NOT_FINITE) for row, is_own, is_finite in rows if is_own and not is_finite)
        is_own = torch.tensor([is_own for _, is_own, _ in rows] * 2, device=accelerator.device)
        found = found._replace(usable=found.usable & is_own)
        if cache:
            cache.unusable |= {batch["keys"][i][1:] for i in cache.save(batch["keys"], found)}
        else:
            targets.append(send_to_device(found, "cpu"))
    if cache:
        usable = [place for place in places if (place, 0) not in cache.unusable]
        stored = load(cache, batch_sampler=batches(usable, usable), collate_fn=collate_targets)
        targets = [batch["targets"] for batch in stored]
    count = torch.tensor(float(sum(batch.usable.sum() for batch in targets)), device=accelerator.device)
    if not accelerator.reduce(count):
        raise RuntimeError(f"no held-out pair can be used: {NOT_FINITE}")
    edges = [training_timesteps[[m * last // num_bands, (m + 1) * last // num_bands - 1]] for m in range(num_bands)]
    bands = [f"{int(first)}-{int(end)}" for first, end in edges]
    return HeldOut(targets, bands, args.beta_dpo, best_margin(Path(args.output_dir, BEST_DIR, LORA_FILE), step))


def prepare_training(args, error, accelerator, unet, parameters, checkpoint, max_train_steps, visits_per_step):
    """Returns the policy, which is the U-Net wrapped, the optimizer and the learning rate's schedule, resumed or new.

    The schedule stays unprepared and takes a step with the optimizer, so it is the same for any number of processes.
    """
    optimizer_class = partial(torch.optim.AdamW, fused=accelerator.device.type in ("cpu", "cuda"))
    if args.use_8bit_adam:
        import bitsandbytes as bnb

        optimizer_class = bnb.optim.AdamW8bit
    optimizer = optimizer_class(
        parameters, lr=args.learning_rate * (visits_per_step if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay, eps=args.adam_epsilon,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps,
        last_epoch=checkpoint.good_steps - 1 if checkpoint else -1,
    )  # fmt: skip
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    policy, prepared_optimizer = accelerator.prepare(unet, optimizer)
    register_lora_checkpointing(accelerator, unet)
    if checkpoint:
        try:
            accelerator.load_state(checkpoint.folder)
        except Exception as problem:  # damaged files fail in many kinds; torch goes on to advise an unsafe way
            error(f"{checkpoint.folder} cannot be loaded: {one_line(problem).partition('. ')[0]}")
        accelerator.step = 0  # checkpoints lie between steps, whatever the accumulation was
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)  # by this command's options, not by the checkpoint's
        logger.info(f"Resuming from {checkpoint.folder}")
    return policy, prepared_optimizer, lr_scheduler


def make_validation(args, accelerator, *parts):
    """Returns what samples the validation prompts, None if there are none; `parts` are those of `make_pipeline`."""
    if not args.validation_prompts or not accelerator.is_main_process:
        return None
    sampling = {
        "height": args.resolution, "width": args.resolution, "num_inference_steps": args.validation_inference_steps,
        "guidance_scale": args.validation_guidance_scale,
    }  # fmt: skip
    return Validation(
        make_pipeline(args, *parts), Path(args.output_dir) / VALIDATION_DIR, args.validation_prompts,
        range(args.seed, args.seed + args.num_validation_images), args.validation_lora_scales, sampling,
        accelerator.autocast, logger.warning,
    )  # fmt: skip


def save_lora(args, unet, folder, **about):
    """Writes the LoRA that was trained, or the best one so far with its step and margin, and returns it."""
    lora = lora_weights(unet)
    with writing(folder / LORA_FILE):
        write_lora(folder / LORA_FILE, lora, **about)
        if args.output_kohya_format and not about:
            write_kohya(folder / KOHYA_FILE, lora, unet.config)
    if not about:
        logger.info(f"Saved {folder / LORA_FILE}")
    return lora


def leave(accelerator):
    """Ends training in all processes at once; the caller has let go of the model that accelerate wrapped.

    A process that takes the group down while another is at work may hang. So may one whose wrapper outlives the group.
    """
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args, refuse = parse_args(argv)
    num_targets, output_dir = timesteps_per_pair(args), Path(args.output_dir)
    options = {name: value for name, value in vars(args).items() if name != "hub_token"}  # as they may be written down

    # What can be known before weights load
    notes, lock = [], None

    def error(line):
        if lock:
            lock.undo(output_dir)
        refuse(line)

    try:
        check_launcher(os.environ)
        lock = lock_output_dir(args.output_dir)  # held as long as this runs
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint, notes.append)
        check_output_dir(args.output_dir, checkpoint, options, lock)
        noise_scheduler, pipeline_config, tokenizers, fingerprints, lora_init = read_configs(args)
        lora_hash = hash_tensors(lora_init) if lora_init else None
        training_timesteps = allowed_timesteps(args, noise_scheduler)
        pairs = load_pairs(args)
        eval_pairs = pairs.hold_out(args.num_eval_pairs)
        changed = check_resumed_run(checkpoint, options, len(pairs), lora_hash) if checkpoint else ""
        train_dataset = PreferenceDataset(
            pairs, args.resolution, num_targets, args.seed,
            args.random_crop, args.random_flip, args.proportion_empty_prompts,
        )  # fmt: skip
        train_dataset[(0, 0), 0]  # is there a pair that can be read?
        _ = args.num_eval_pairs and PreferenceDataset(eval_pairs, args.resolution, 1, args.seed)[(0, 0), 0]
        repo_id = None
        if args.push_to_hub and not args.precompute_only:
            repo_id = create_hub_repo(args.hub_model_id, args.output_dir, args.hub_token, args.hub_private_repo)
    except (ValueError, RuntimeError) as problem:
        error(printable("; ".join([str(problem), *notes])))
    accelerator, weight_dtype = start(args, error)
    warn = partial(logger.warning, main_process_only=False)  # of what this process met
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    for line in notes + ([f"Options that differ from the start of the run: {changed}"] if changed else []):
        logger.warning(line)
    step, visit, good_steps = (checkpoint.step, checkpoint.visit, checkpoint.good_steps) if checkpoint else (0, 0, 0)
    visits_per_step = args.train_batch_size * accelerator.gradient_accumulation_steps * num_processes
    visits_to_go = max(0, args.num_train_epochs * len(pairs) - visit)
    max_train_steps = args.max_train_steps or step + math.ceil(visits_to_go / visits_per_step)
    batches = partial(visit_batches, len(pairs), seed=args.seed)

    # Models; VAE and text encoders only if something is to be encoded
    cache, eval_cache, missing, eval_missing = None, None, [], []
    try:
        if args.inversion_cache_dir:
            configs = (pipeline_config, noise_scheduler.config)
            cache = open_cache(args, pairs, training_timesteps, weight_dtype, fingerprints, configs, lora_hash)
            draws = draws_to_read(args, batches, len(pairs), visit, visits_per_step * (max_train_steps - step))
            draws = draws[rank::num_processes]
            missing = cache.missing(draws, warn)
            eval_cache = cache.part("held-out")
            draws_of_held_out = [(place, 0) for place in range(args.num_eval_pairs)]
            eval_missing = [place for place, _ in eval_cache.missing(draws_of_held_out, warn)]
    except OSError as problem:
        error(f"--inversion_cache_dir {args.inversion_cache_dir} cannot be used: {one_line(problem)}")
    has_encoders = not cache or bool(missing or eval_missing or args.validation_prompts)
    try:
        text_encoders, vae = load_encoders(args, weight_dtype) if has_encoders else ([], None)
        base = load_unet(args, weight_dtype)
    except Exception as problem:  # damaged files fail in many kinds
        hint = ". Does it exist with --variant fp16 only?" if "file named" in str(problem) and not args.variant else ""
        error(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path} cannot be used: "
              f"{one_line(problem)}{hint}")  # fmt: skip
    for module in (base,) if args.offload or not has_encoders else (base, vae, *text_encoders):
        module.to(device)
    del module  # which would keep a text encoder in memory
    lora_parameters = add_lora(
        base, args.rank, args.lora_alpha or args.rank, args.lora_target_modules, lora_init, args.reference
    )
    if args.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        base.enable_xformers_memory_efficient_attention()
    if args.compile:  # blocks share their code: policy, reference and every shape count against one limit
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
        base.compile_repeated_blocks()

    # The parts of a step
    prediction_type, alphas_cumprod = noise_scheduler.config.prediction_type, noise_scheduler.alphas_cumprod

    def chunks_of(count):
        return [slice(m, m + args.trajectory_chunk) for m in range(0, count, args.trajectory_chunk)]

    def predict(model, x_t, timesteps, cond):
        with accelerator.autocast():
            return predict_noise(model, x_t, timesteps, cond, alphas_cumprod, prediction_type, weight_dtype)

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
        with on_device((vae, *text_encoders), device):
            latents = encode_images(vae, batch["pixel_values"], args.vae_encode_batch_size)
            cond = encode_prompts(text_encoders, batch, pipeline_config)
        index = sample_timesteps(batch["uniforms"], 0, len(training_timesteps) - 1)
        timesteps, reference_noise = training_timesteps[index].repeat(1, 2), None  # shared by winner and loser

        # 2  Invert, by default with the reference; the baseline takes forward noise instead
        if args.objective == "diffusion_dpo":
            noise = to_device(forward_noise(batch["keys"], args.seed, (len(index), *latents.shape[1:])), device)
        else:
            more = len(index) - num_targets  # held-out pairs have other numbers of targets
            steps = inversion_steps(args) + (more if args.timesteps_subset else max(0, more))
            by_reference = args.inversion_model == "reference"
            with reference_policy(base) if by_reference else contextlib.nullcontext():
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
            with reference_policy(base):
                reference_error = all_errors(base, targets)
        return without_overflow(targets._replace(reference_error=reference_error))

    # Data, and the cache before the loop
    skipped, stop = dict(checkpoint.skipped) if checkpoint else {}, StopSignal(logger.warning)
    note = partial(note_skipped, skipped=skipped, warn=warn)
    load = partial(
        torch.utils.data.DataLoader, num_workers=args.dataloader_num_workers, pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
    )  # fmt: skip
    load_images = partial(load, collate_fn=partial(collate, tokenizers=tokenizers))
    load_data, is_stopping, held_out = partial(load_images, train_dataset), False, None
    if cache:
        is_stopping = fill_cache(
            accelerator, cache, batches_of(draws, args.train_batch_size, missing), load_data, find_targets, note, stop
        )
        logger.info(f"The cache {cache.folder} {'is not filled yet' if is_stopping else 'holds what this run reads'}")
        load_data = partial(load, cache, collate_fn=collate_targets)
    if accelerator.is_main_process:
        cut_metrics(output_dir / METRICS_FILE, step, logger.warning)
    if args.num_eval_pairs and not is_stopping:
        how = (step, training_timesteps, load_images, find_targets, note, eval_cache, eval_missing)
        held_out = hold_out(args, accelerator, eval_pairs, *how)
    if is_stopping or args.precompute_only:
        stop.restore()
        leave(accelerator)
        sys.exit(128 + (stop.received or signal.SIGTERM) if is_stopping else 0)
    share = {"process_index": rank, "num_processes": num_processes, "num_draws": args.cached_draws if cache else None}
    dataloader = load_data(batch_sampler=batches(args.train_batch_size, visit=visit, **share))

    # Optimizer, trackers, validation
    policy, optimizer, lr_scheduler = prepare_training(
        args, error, accelerator, base, lora_parameters, checkpoint, max_train_steps, visits_per_step
    )
    if args.report_to != "none":
        config = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in options.items()}
        accelerator.init_trackers("inversion-dpo", config=config)
    validation = make_validation(args, accelerator, pipeline_config, tokenizers, text_encoders, vae, base)
    if cache and not validation:
        text_encoders = vae = None
    logger.info(
        f"Pairs: {len(pairs)}; ties in the data: {pairs.num_ties}; rows without a usable label: {pairs.num_unusable}; "
        f"steps: {max_train_steps} of {visits_per_step} pairs; {args.objective}; timesteps per pair: {num_targets}, "
        f"{training_timesteps[0]} to {training_timesteps[-1]}; parameters: {sum(p.numel() for p in lora_parameters):,}"
    )
    if step >= max_train_steps:
        logger.info(f"Nothing to train: {step} steps are done. Only the results are written")
    progress = tqdm(total=max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)
    means, usable_rows, bad_steps_in_a_row, has_moved = RunningMeans(), [], 0, bool(checkpoint)
    policy.train()

    for batch in dataloader if step < max_train_steps else ():
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
            means.add(grad_norm=accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm))
            means.add(stop=torch.full((), stop.received > 0, device=device))  # a tensor's copy would wait
            means.add(usable=torch.cat([usable for _, usable in usable_rows]))
            logs = means.pop(accelerator)
            is_stopping, usable_share = logs.pop("stop") > 0, logs.pop("usable")
            is_bad = not (usable_share and math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"]))
            if not is_bad:
                optimizer.step()
            elif accelerator.scaler is not None:  # of a loss in half precision, which adapts to bad steps
                accelerator.scaler.update()
            optimizer.zero_grad()

        step, visit, good_steps = step + 1, visit + visits_per_step, good_steps + (not is_bad)
        logs |= {"lr": lr_scheduler.get_last_lr()[0], "bad_steps": step - good_steps}
        bad_steps_in_a_row = bad_steps_in_a_row + 1 if is_bad else 0
        if not is_bad:
            lr_scheduler.step()
        if usable_share < 1:
            flags = [(row, ok) for rows, usable in usable_rows for row, ok in zip(rows, usable.tolist(), strict=False)]
            note((row, NOT_FINITE) for row, ok in flags if not ok)
        usable_rows.clear()
        if held_out and (step % args.eval_steps == 0 or step == max_train_steps):
            logs |= held_out.measure(accelerator, partial(all_errors, base))
            if line := held_out.note(logs, step):
                logger.warning(line)
            if args.save_best and held_out.is_best(logs) and accelerator.is_main_process:
                save_lora(args, base, output_dir / BEST_DIR, step=str(step), margin=str(held_out.best))
        accelerator.log(logs, step=step)
        if accelerator.is_main_process:
            add_metrics(output_dir / METRICS_FILE, step, logs)
        progress.update()
        progress.set_postfix_str(
            f"loss={logs['loss']:.4f}, acc={logs['rewards/accuracies']:.2f}, margin={logs['rewards/margins']:.3f}"
        )
        if bad_steps_in_a_row == MAX_BAD_STEPS:
            reason = "loss or gradient are not finite" if usable_share else NOT_FINITE
            remedy = "a lower --learning_rate, another --mixed_precision or --pretrained_vae_model_name_or_path"
            raise RuntimeError(f"{MAX_BAD_STEPS} bad steps in a row: {reason}. Try {remedy}")
        has_moved = has_moved or logs["grad_norm"] > 0
        if good_steps == 10 and not has_moved:
            raise RuntimeError("after 10 steps the LoRA is unchanged: do winner and loser differ in any pair?")
        if is_stopping or step % args.checkpointing_steps == 0 or step == max_train_steps:
            folder = output_dir / f"checkpoint-{step}"
            known = dict(gather_object(list(skipped.items())))
            reached = Checkpoint(folder, step, visit, good_steps, len(pairs), lora_hash, options, known)
            save_checkpoint(accelerator, reached, args.checkpoints_total_limit)
        if validation and step % args.validation_steps == 0 and step < max_train_steps and not is_stopping:
            log_pictures(accelerator, validation.sample(step), step)
        if is_stopping or step == max_train_steps:
            break

    # Results
    progress.close()
    stop.restore()
    skipped, exit_code = dict(gather_object(list(skipped.items()))), 0
    if skipped or step > good_steps:
        logger.warning(f"Skipped rows: {len(skipped)}, skipped steps: {step - good_steps}")
    if step < max_train_steps:
        logger.warning(f"Stopped after step {step}; go on with --resume_from_checkpoint latest")
        exit_code = 128 + (stop.received or signal.SIGTERM)  # as a shell reports a signal
    elif accelerator.is_main_process:
        if args.save_best and not (output_dir / BEST_DIR / LORA_FILE).exists():
            logger.warning(f"{BEST_DIR}/ is empty: no margin was above 0 with the winners' error within the limit")
        lora, files = save_lora(args, base, output_dir), []
        if validation:
            validation.load(output_dir / LORA_FILE)
            files = validation.sample(step)
        log_pictures(accelerator, files, step)
        command = shlex.join([Path(sys.argv[0]).name, *argv])
        record = {
            "command": command.replace(args.hub_token, "...") if args.hub_token else command,
            "pipeline": PIPELINE,
            "rank": lora_shape(lora)[0],
            "steps": step,
            "pairs_per_step": visits_per_step,
            "processes": num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "data": {
                "pairs": len(pairs),
                "ties in the data": pairs.num_ties,
                "rows skipped": len(skipped) + pairs.num_unusable,
            },
            "options": options,
        }
        names = [f"{VALIDATION_DIR}/{file.name}" for file in files]
        pictures = dict(zip(args.validation_prompts or (), names, strict=False))
        with writing(output_dir):
            write_results(output_dir, record, pictures, repo_id)
        try:
            if repo_id:
                push_to_hub(repo_id, output_dir, args.hub_token)
                logger.info(f"Pushed to {repo_id}")
        except RuntimeError as problem:
            logger.error(problem)
            exit_code = 1
    policy = None  # the wrapper goes before the group of processes
    leave(accelerator)
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    main()

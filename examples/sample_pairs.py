"""Sample preference pairs from two models: the same prompts and seeds, one model's pictures win, the other's lose.

    python examples/sample_pairs.py --winner_model better --loser_model worse --prompts prompts.txt --output_dir pairs
    accelerate launch train_inversion_dpo.py --train_data_dir pairs ...

The two may be one model with and without a LoRA, `--winner_lora`. Writes `<output_dir>/train-<i>-of-<n>.parquet` in
the columns that the training scripts read by default, see pair_files.py; pictures are stored as PNG. One model at a
time is in memory; the winners wait on the disk.

Pairs with a picture that is black (what a safety checker leaves, or an overflow in half precision), and pairs of equal
pictures, are left out and counted.
"""

import argparse
import gc
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported, it warns of kernels for CPUs
from diffusers import DiffusionPipeline
from make_pairs import encode_png, sample_pictures
from pair_files import PairWriter, check_output_dir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from inversion_utils import number, one_line


def read_prompts(file):
    """Returns the lines of a text file that are not blank; raises ValueError if there are none."""
    try:
        prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"--prompts {file}: cannot be read: {one_line(problem)}") from problem
    if not prompts:
        raise ValueError(f"--prompts {file}: no prompt is in it")
    return prompts


def check_model(option, model, lora):
    """Raises ValueError if a pipeline or its LoRA is not there; loads no weights."""
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"--{option}_model {model}: not a saved pipeline (no model_index.json in it)")
    try:
        DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as problem:
        raise ValueError(f"--{option}_model {model}: {one_line(problem)}") from problem
    if lora and Path(lora).is_dir() and not any(Path(lora).glob("*.safetensors")):
        raise ValueError(f"--{option}_lora {lora}: holds no .safetensors file")


def load_pipeline(option, model, lora, dtype):
    """Returns a pipeline with its LoRA, on the GPU if there is one; raises ValueError if it cannot be loaded."""
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as problem:
        raise ValueError(f"--{option}_model {model}: {one_line(problem)}") from problem
    if lora:
        try:
            pipeline.load_lora_weights(lora)
        except (OSError, ValueError, RuntimeError) as problem:
            raise ValueError(f"--{option}_lora {lora}: {one_line(problem)}") from problem
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def pictures_of(pipeline, prompts, seeds, num_inference_steps, guidance_scale, batch_size):
    """Yields a picture for each prompt and seed, uint8 (H, W, 3)."""
    for i in range(0, len(prompts), batch_size):
        batch = slice(i, i + batch_size)
        yield from sample_pictures(
            pipeline, prompts[batch], seeds[batch], num_inference_steps, guidance_scale, batch_size
        )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s --winner_model W --loser_model L --prompts FILE --output_dir O [options, see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    path, count = os.path.expanduser, number(int, least=1)
    # fmt: off
    add = parser.add_argument
    add("--winner_model", type=path, required=True, help="pipeline of the better pictures: a Hub id or a folder")
    add("--loser_model", type=path, required=True, help="pipeline of the worse pictures")
    add("--winner_lora", type=path, help="LoRA on the better model: a Hub id, a folder or a file")
    add("--loser_lora", type=path, help="LoRA on the worse model")
    add("--prompts", type=path, required=True, help="text file with a prompt on each line")
    add("--output_dir", type=path, required=True, help="folder for the parquet files")
    add("--num_pairs_per_prompt", type=count, default=1, help="pairs with seeds of their own; more vary more")
    add("--num_inference_steps", type=count, default=30, help="sampler steps of both models; more costs time")
    add("--guidance_scale", type=number(float, least=0), default=7.5, help="higher obeys prompts more, varies less")
    add("--batch_size", type=count, default=4, help="pictures sampled at a time; more is faster and takes memory")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the weights; the half ones take half the memory")
    add("--seed", type=number(int, least=0), default=0, help="of the pictures, the same for both models")
    # fmt: on
    return parser.parse_args(argv), parser.error


def main(argv=None):
    args, error = parse_args(argv)
    check_output_dir(args.output_dir, error)
    if (args.winner_model, args.winner_lora) == (args.loser_model, args.loser_lora):
        error(f"--winner_model and --loser_model are both {args.winner_model}, so all pictures would be equal")
    try:
        prompts = read_prompts(args.prompts)
        check_model("winner", args.winner_model, args.winner_lora)
        check_model("loser", args.loser_model, args.loser_lora)
        num_pairs, num_left_out = sample_pairs(args, prompts)
    except ValueError as problem:
        error(str(problem))
    print(f"wrote {num_pairs} pairs of {len(prompts)} prompts to {args.output_dir}; {num_left_out} left out")


def sample_pairs(args, prompts):
    """Writes the pairs; returns how many, and how many are left out because a picture is black or both are equal."""
    prompts = [prompt for prompt in prompts for _ in range(args.num_pairs_per_prompt)]
    seeds = [args.seed * len(prompts) + i for i in range(len(prompts))]
    sampling = (args.num_inference_steps, args.guidance_scale, args.batch_size)
    dtype = getattr(torch, args.dtype)
    num_left_out = 0
    with (
        PairWriter(args.output_dir, args.seed) as writer,
        tempfile.TemporaryDirectory(prefix="unfinished-", dir=args.output_dir) as waiting,
    ):
        pipeline = load_pipeline("winner", args.winner_model, args.winner_lora, dtype)
        for i, picture in enumerate(pictures_of(pipeline, prompts, seeds, *sampling)):
            if picture.any():
                (Path(waiting) / f"{i}.png").write_bytes(encode_png(picture))
        del pipeline
        gc.collect()
        torch.cuda.empty_cache()
        pipeline = load_pipeline("loser", args.loser_model, args.loser_lora, dtype)
        for i, picture in enumerate(pictures_of(pipeline, prompts, seeds, *sampling)):
            winner, loser = Path(waiting) / f"{i}.png", encode_png(picture)
            if winner.exists() and picture.any() and winner.read_bytes() != loser:
                writer.add(winner.read_bytes(), loser, prompts[i])
            else:
                num_left_out += 1
        if writer.num_pairs == 0:
            raise ValueError(f"no pair is left: of all {len(prompts)} a picture is black, or both are equal")
    return writer.num_pairs, num_left_out


if __name__ == "__main__":
    main()

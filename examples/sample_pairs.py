"""Sample preference pairs: from two models, one of which wins, or from one model, whose best picture wins.

    python examples/sample_pairs.py --winner_model better --loser_model worse --prompts everyday --output_dir pairs
    python examples/sample_pairs.py --model M --lora L --scorer pickscore --prompts everyday --output_dir pairs
    accelerate launch train_inversion_dpo.py --train_data_dir pairs ...

Two models draw the same prompts and seeds; they may be one model with and without a LoRA, `--winner_lora`. One model
draws several pictures of each prompt, and the best and the worst by a scorer (see scorers.py) become a pair. Prompts
are a text file with one on each line, or a name (see prompt_sources.py).

Writes `<output_dir>/train-<i>-of-<n>.parquet` in the columns that the training scripts read by default, see
pair_files.py; pictures are stored as PNG. One model at a time is in memory, beside the scorer. Pairs with a black
picture (what a safety checker leaves, or an overflow in half precision) and pairs of equal pictures or scores are left
out and counted.
"""

import gc
import itertools
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import Parser, number, printable


def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s {--winner_model W --loser_model L | --model M --scorer S} --prompts P --output_dir O [...]",
    )
    path, count = os.path.expanduser, number(int, least=1)
    # fmt: off
    add = parser.add_argument
    add("--winner_model", type=path, help="two models: pipeline of the better pictures, a Hub id or a folder")
    add("--loser_model", type=path, help="pipeline of the worse pictures")
    add("--winner_lora", type=path, help="LoRA on the better model: a Hub id, a folder or a file")
    add("--loser_lora", type=path, help="LoRA on the worse model")
    add("--model", type=path, help="one model: pipeline of all pictures")
    add("--lora", type=path, help="LoRA on it")
    add("--variant", help="variant of all models' files, such as fp16")
    add("--prediction_type", choices=["epsilon", "v_prediction"],
        help="what all models predict (their schedulers')")
    add("--scorer", type=path, help="what ranks its pictures: pickscore, clip, brisque or file.py:function")
    add("--num_pictures_per_pair", type=count, default=4, help="of which best and worst are kept; more differ more")
    add("--prompts", type=path, required=True, help="text file with a prompt on each line, or a name")
    add("--output_dir", type=path, required=True, help="folder for the parquet files")
    add("--num_pairs_per_prompt", type=count, default=1, help="pairs with seeds of their own; more vary more")
    add("--num_inference_steps", type=count, default=30, help="sampler steps of all models; more costs time")
    add("--guidance_scale", type=number(float, least=0), default=7.5, help="higher obeys prompts more, varies less")
    add("--batch_size", type=count, default=4, help="pictures sampled at a time; more is faster and takes memory")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the weights; the half ones take half the memory")
    add("--seed", type=number(int, least=0), default=0, help="of the pictures, the same for both models")
    # fmt: on
    return parser.parse_args(argv), parser.error


def check_modes(args, error):
    """Ends the program by `error` unless the options name two models, or one and a scorer."""
    two = [name for name in ("winner_model", "loser_model", "winner_lora", "loser_lora") if getattr(args, name)]
    one = [name for name in ("model", "lora", "scorer") if getattr(args, name)]
    if two and one:
        error(f"--{two[0]} and --{one[0]} do not go together: name two models, or one and a scorer")
    for name in ("model", "scorer") if one else ("winner_model", "loser_model"):
        if not getattr(args, name):
            error(f"--{name} is missing: name --winner_model and --loser_model, or --model and --scorer")
    if args.num_pictures_per_pair < 2:
        error(f"--num_pictures_per_pair {args.num_pictures_per_pair}: a pair needs 2")
    if two and (args.winner_model, args.winner_lora) == (args.loser_model, args.loser_lora):
        error(f"--winner_model and --loser_model are both {args.winner_model}, so all pictures would be equal")


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

import make_pairs
import numpy as np
import torch
from make_pairs import check_model, encode_png, sample_pictures
from pair_files import PairWriter, check_output_dir
from PIL import Image
from prompt_sources import read_prompts
from scorers import check_scorer, load_scorer


def load_pipeline(model_option, model, lora_option, lora, dtype, variant=None, prediction_type=None):
    """Returns a pipeline with its LoRA, on the GPU if there is one; raises ValueError if it cannot be loaded."""
    pipeline = make_pairs.load_pipeline(model, model_option, dtype, prediction_type, variant=variant)
    if lora:
        make_pairs.load_lora(pipeline, lora, lora_option)
    return pipeline


def pictures_of(pipeline, prompts, seeds, num_inference_steps, guidance_scale, batch_size):
    """Yields a picture for each prompt and seed, uint8 (H, W, 3)."""
    for i in range(0, len(prompts), batch_size):
        batch = slice(i, i + batch_size)
        yield from sample_pictures(
            pipeline, prompts[batch], seeds[batch], num_inference_steps, guidance_scale, batch_size
        )


def main(args, error):
    check_modes(args, error)
    check_output_dir(args.output_dir, error)
    try:
        prompts = read_prompts(args.prompts)
        if args.model:
            try:
                check_scorer(args.scorer)
            except ValueError as problem:
                error(f"--scorer {args.scorer}: {printable(str(problem))}")
            check_model("--model", args.model, "--lora", args.lora, args.variant)
        else:
            check_model("--winner_model", args.winner_model, "--winner_lora", args.winner_lora, args.variant)
            check_model("--loser_model", args.loser_model, "--loser_lora", args.loser_lora, args.variant)
        captions, left_out = [prompt for prompt in prompts for _ in range(args.num_pairs_per_prompt)], Counter()
        writer, sample = PairWriter(args.output_dir, args.seed), sample_by_score if args.model else sample_from_two
        sample(args, captions, writer, left_out)
        if writer.num_pairs == 0:
            raise ValueError(f"no pair is left of {len(captions)}: {dict(left_out)}")
    except ValueError as problem:
        error(printable(str(problem)))
    reasons = "".join(f", {count} {reason}" for reason, count in left_out.items())
    print(f"wrote {writer.num_pairs} pairs of {len(prompts)} prompts to {args.output_dir}; "
          f"{left_out.total()} left out{reasons}")  # fmt: skip


def load_options(args):
    return {"dtype": getattr(torch, args.dtype), "variant": args.variant, "prediction_type": args.prediction_type}


def sample_from_two(args, captions, writer, left_out):
    """Writes pairs of two models; the winners wait on the disk. Counts in `left_out` what is not a pair, by reason."""
    seeds = [args.seed * len(captions) + i for i in range(len(captions))]
    sampling = (args.num_inference_steps, args.guidance_scale, args.batch_size)
    options = load_options(args)
    if args.loser_lora:  # does it fit? The better model's pictures take hours, and one model is in memory
        load_pipeline("--loser_model", args.loser_model, "--loser_lora", args.loser_lora, **options)
        gc.collect()
        torch.cuda.empty_cache()
    pipeline = load_pipeline("--winner_model", args.winner_model, "--winner_lora", args.winner_lora, **options)
    with writer, tempfile.TemporaryDirectory(prefix="unfinished-", dir=args.output_dir) as waiting:
        for i, picture in enumerate(pictures_of(pipeline, captions, seeds, *sampling)):
            if picture.any():
                (Path(waiting) / f"{i}.png").write_bytes(encode_png(picture))
        del pipeline
        gc.collect()
        torch.cuda.empty_cache()
        pipeline = load_pipeline("--loser_model", args.loser_model, "--loser_lora", args.loser_lora, **options)
        for i, picture in enumerate(pictures_of(pipeline, captions, seeds, *sampling)):
            winner, loser = Path(waiting) / f"{i}.png", encode_png(picture)
            if not (winner.exists() and picture.any()):
                left_out["with a black picture"] += 1
            elif winner.read_bytes() == loser:
                left_out["of equal pictures"] += 1
            else:
                writer.add(winner.read_bytes(), loser, captions[i])


def sample_by_score(args, captions, writer, left_out):
    """Writes pairs of the best and the worst of several pictures of one model, as `sample_from_two` does."""
    pipeline = load_pipeline("--model", args.model, "--lora", args.lora, **load_options(args))
    scorer, count = load_scorer(args.scorer, pipeline.device), args.num_pictures_per_pair
    seeds = [args.seed * len(captions) * count + i for i in range(len(captions) * count)]
    repeated = [caption for caption in captions for _ in range(count)]
    pictures = pictures_of(
        pipeline, repeated, seeds, args.num_inference_steps, args.guidance_scale, args.batch_size
    )  # fmt: skip
    with writer:
        for caption in captions:
            group = [picture for picture in itertools.islice(pictures, count) if picture.any()]
            scores = scorer.score([Image.fromarray(picture) for picture in group], [caption] * len(group))
            scored = [pair for pair in zip(scores, group, strict=True) if np.isfinite(pair[0])]
            if len(scored) < 2:
                left_out["with fewer than two usable pictures"] += 1
                continue
            (high, best), (low, worst) = (choose(scored, key=lambda pair: pair[0]) for choose in (max, min))
            if high > low:
                writer.add(encode_png(best), encode_png(worst), caption)
            else:
                left_out["of equal scores"] += 1


if __name__ == "__main__":
    main(*args_and_error)

"""Sample preference pairs of the small world from a model and label them with a programmed preference.

    python examples/make_pairs.py --model examples/small_world_model --preference area --output_dir pairs

Writes `<output_dir>/train.parquet` in Pick-a-Pic's columns: `jpg_0` and `jpg_1` (image files as bytes; PNG in spite of
the name, since JPEG would blur the very edges that the sharpness preference judges), `label_0` (1 if image 0 won, 0 if
image 1 won, 0.5 for a tie) and `caption`. Load it with `load_dataset("parquet", data_files="<output_dir>/*.parquet")`.

Among a few hundred pairs, winners differ from losers by chance in what is not judged, too, and a model learns that as
well. So some pairs are left out, until winners and losers are alike on average in the other attributes. Only in
sharpness winners stay a little ahead: training softens edges, whatever is preferred, and such pairs make up for it.
"""

import argparse
import io
import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import small_world
import torch
from PIL import Image

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported, it warns of kernels for CPUs
from diffusers import DiffusionPipeline

SAMPLING = {"num_inference_steps": 16, "guidance_scale": 1.5, "batch_size": 16}  # defaults of options and functions
TIE_MARGIN = 0.01
SHARPER_WINNERS = 0.25  # standard deviations


def add_sampling_options(parser):
    parser.add_argument("--num_inference_steps", type=int, help="Sampler steps; more costs time")
    parser.add_argument("--guidance_scale", type=float, help="Above 1: obeys captions more, varies less")
    parser.add_argument("--batch_size", type=int, help="Pictures sampled at a time")
    parser.set_defaults(**SAMPLING)
    parser.add_argument("--seed", type=int, default=0)


def check_options(parser, args, new_file, *counts):
    """Ends the program with one line if the model or a count is unusable, or if `new_file` is there already."""
    for name in (*counts, "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if not (Path(args.model) / "model_index.json").is_file():
        parser.error(f"--model {args.model}: not a saved pipeline (no model_index.json in it)")
    if (Path(args.output_dir) / new_file).exists():
        parser.error(f"--output_dir {args.output_dir}: already holds {new_file}; give another folder or remove it")


def load_pipeline(model):
    """The pipeline of the folder, of the class that its model_index.json names: Stable Diffusion or SDXL."""
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def sample_pictures(
    pipeline,
    captions,
    seeds,
    num_inference_steps=SAMPLING["num_inference_steps"],
    guidance_scale=SAMPLING["guidance_scale"],
    batch_size=SAMPLING["batch_size"],
    **options,
):
    """One picture per caption and seed, uint8 (N, H, W, 3); each depends on its own caption and seed only.

    `options` go to the pipeline, such as SDXL's `original_size`.
    """
    pictures = []
    for i in range(0, len(captions), batch_size):
        batch = pipeline(
            captions[i : i + batch_size],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch_size]],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="np",
            **options,
        ).images
        pictures.append(np.round(batch * 255).astype(np.uint8))
    return np.concatenate(pictures)


def label_pairs(scores_0, scores_1, tie_margin):
    """`label_0` of pairs with these scores, (N,): 1 where image 0 scores higher, 0.5 where they differ by less."""
    return np.where(np.abs(scores_0 - scores_1) < tie_margin, 0.5, (scores_0 > scores_1).astype(float))


def balanced(differences, tolerance=0.02):
    """Which pairs to keep, bool (N,), for the mean winner minus loser, (N, K), to be within the tolerance in all K.

    Leaves out the pair that pulls the means outwards most, one after another. It stops at a fifth of all, which a few
    hundred pairs do not need. Ties have differences of 0.
    """
    kept = np.ones(len(differences), dtype=bool)
    for _ in range(len(differences) // 5):
        means = differences[kept].mean(axis=0)
        if np.abs(means).max() <= tolerance:
            break
        kept[np.argmax(np.where(kept, differences @ means, -np.inf))] = False
    return kept


def encode_png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def parse_args(argv=None):
    path = os.path.expanduser
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=path, required=True, help="Folder of the pipeline to sample from")
    parser.add_argument("--preference", required=True, choices=small_world.PREFERENCES, help="What winners have")
    parser.add_argument("--output_dir", type=path, required=True, help="Folder for train.parquet")
    parser.add_argument("--num_pairs", type=int, default=256)
    parser.add_argument(
        "--tie_margin", type=float, default=TIE_MARGIN, help="Scores closer than this are labelled a tie"
    )
    add_sampling_options(parser)
    args = parser.parse_args(argv)
    check_options(parser, args, "train.parquet", "num_pairs")
    return args


def sample_candidates(pipeline, num_pairs, seed, **sampling):
    """Captions of N pairs, and their pictures, uint8 (2N, H, W, 3): all first images, then all second images."""
    captions = [small_world.TRAINING_CAPTIONS[i % len(small_world.TRAINING_CAPTIONS)] for i in range(num_pairs)]
    seeds = [seed * 2 * num_pairs + i for i in range(2 * num_pairs)]  # no two pictures share one
    return captions, sample_pictures(pipeline, captions * 2, seeds, **sampling)


def write_pairs(path, captions, pictures, preference, tie_margin=TIE_MARGIN):
    """Labels pairs, see `sample_candidates`, by a preference, and writes them as parquet, but for a few."""
    scores = {  # (2, N) each
        name: np.array([score(picture) for picture in pictures]).reshape(2, -1)
        for name, score in small_world.PREFERENCES.items()
    }
    label_0 = label_pairs(*scores[preference], tie_margin)
    excess = [
        (2 * label_0 - 1) * (first - second) / np.std([first, second])
        - (label_0 != 0.5) * (SHARPER_WINNERS if name == "sharpness" else 0.0)
        for name, (first, second) in scores.items() if name != preference
    ]  # fmt: skip
    kept = np.flatnonzero(balanced(np.stack(excess, axis=1)))
    files, (scores_0, scores_1) = [encode_png(picture) for picture in pictures], scores[preference][:, kept]
    columns = {
        "jpg_0": [files[i] for i in kept],
        "jpg_1": [files[len(captions) + i] for i in kept],
        "label_0": label_0[kept],
        "caption": [captions[i] for i in kept],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    pq.write_table(pa.table(columns), unfinished)
    unfinished.replace(path)
    print(
        f"wrote {path}: {len(kept)} of {len(captions)} pairs, {(label_0[kept] == 0.5).sum()} of them ties; "
        f"mean {preference} of winners {np.maximum(scores_0, scores_1).mean():.3f}, of losers "
        f"{np.minimum(scores_0, scores_1).mean():.3f}"
    )


def main(args):
    sampling = {name: getattr(args, name) for name in SAMPLING}
    captions, pictures = sample_candidates(load_pipeline(args.model), args.num_pairs, args.seed, **sampling)
    write_pairs(Path(args.output_dir) / "train.parquet", captions, pictures, args.preference, args.tie_margin)


if __name__ == "__main__":
    main(parse_args())

"""Sample preference pairs of the small world from a model and label them with a programmed preference.

    python examples/make_pairs.py --model examples/small_world_model --preference area --output_dir pairs

Writes `<output_dir>/train.parquet` in Pick-a-Pic's columns: `jpg_0` and `jpg_1` (image files as bytes; PNG in spite of
the name, since JPEG would blur the very edges that the sharpness preference judges), `label_0` (1 if image 0 won, 0 if
image 1 won, 0.5 for a tie) and `caption`. Load it with `load_dataset("parquet", data_files="<output_dir>/*.parquet")`.

Among a few hundred pairs, winners differ from losers by chance in what is not judged, too, and a model learns that as
well. So some pairs are left out, until winners and losers are alike on average in the other attributes. Only in
sharpness winners stay a little ahead: training softens edges, whatever is preferred, and such pairs make up for it.
"""

import io
import logging
import os
import re
import sys
from pathlib import Path

import small_world
from small_world import add_sampling_options

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import Parser, missing_folder, number, one_line, printable

TIE_MARGIN = 0.01
SHARPER_WINNERS = 0.25  # standard deviations


def parse_args(argv=None):
    path, count = os.path.expanduser, number(int, least=1)
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=path, required=True, help="Folder of the pipeline to sample from")
    parser.add_argument("--preference", required=True, choices=small_world.PREFERENCES, help="What winners have")
    parser.add_argument("--output_dir", type=path, required=True, help="Folder for train.parquet")
    parser.add_argument("--num_pairs", type=count, default=256)
    parser.add_argument(
        "--tie_margin", type=float, default=TIE_MARGIN, help="Scores closer than this are labelled a tie"
    )
    add_sampling_options(parser, count)
    return parser.parse_args(argv)


if __name__ == "__main__":  # before the imports that take seconds
    args = parse_args()

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from convert_lora import check_kind, find_file, read_weights
from pair_files import check_folder
from PIL import Image
from safetensors import SafetensorError, safe_open
from small_world import SAMPLING

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported, it warns of kernels for CPUs

import diffusers
import transformers
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer

from training_utils import find_model, only_variant

for library in (diffusers.utils, transformers):  # which tell of each part as it loads, and what a LoRA leaves alone
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()


def check_options(args, new_file):
    """Ends the program with one line if the model is unusable, or if `new_file` is there already."""
    try:
        check_model("--model", str(Path(args.model).absolute()))
    except ValueError as problem:
        args.error(printable(str(problem)))
    check_folder(args.output_dir, args.error)
    if (Path(args.output_dir) / new_file).exists():
        args.error(f"--output_dir {args.output_dir}: already holds {new_file}; give another folder or remove it")


def check_model(option, model, lora_option=None, lora=None, variant=None):
    """Raises ValueError if a pipeline, a part of it or its LoRA is not there; loads no weights."""
    for name, value in ((option, model), (lora_option, lora)):
        if value:
            find_model(name, str(value), None, logging.getLogger(__name__).warning)
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{option} {model}: not a saved pipeline (no model_index.json in it)")
    if Path(model).is_file():
        raise ValueError(f"{option} {model}: is a single file; make a folder of it by from_single_file of diffusers")
    try:
        config = DiffusionPipeline.load_config(str(model))
    except (OSError, ValueError) as error:
        raise not_loaded(option, model, error) from error
    if Path(model).is_dir():
        parts = {name for name, kind in config.items() if isinstance(kind, list) and kind[0]}
        for part in sorted(parts - {"safety_checker", "feature_extractor", "image_encoder"}):  # one can do without
            if problem := fault_of_part(Path(model, part), variant):
                raise ValueError(f"{option} {model}: its {part} {problem}")
    if lora and Path(lora).is_dir() and not any(Path(lora).glob("*.safetensors")):
        raise ValueError(f"{lora_option} {lora}: holds no .safetensors file")


def not_loaded(option, value, error, hint=""):
    """Returns the ValueError for what an option names: no such folder, if it may have been one, or the error."""
    missing = missing_folder(str(value), was_asked_for=True)
    return ValueError(f"{option} {value}: {missing or one_line(error) + hint}")


def fault_of_part(folder, variant):
    """Returns what is wrong with the folder of a pipeline's part, as far as no weights need to be loaded; or ""."""
    if not folder.is_dir():
        return f"is missing: no such folder: {folder}"
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"is damaged: {file.name}: {one_line(error)}"
    if (folder / "config.json").is_file() and not {*folder.glob("*.safetensors"), *folder.glob("*.bin")}:
        return f"has no weights in {folder}"
    if not variant and (only := only_variant(folder)):
        return f"holds one variant of its weights only; try --variant {only}"
    return ""


def load_pipeline(model, option="--model", dtype=torch.float32, prediction_type=None, **options):
    """Returns a pipeline, on the GPU if there is one; raises ValueError if it cannot be loaded.

    `prediction_type` says what the model predicts, where its scheduler is wrong.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(model, dtype=dtype, **options)
    except Exception as error:  # diffusers, transformers and safetensors fail in many kinds
        has_hint = "file named" in str(error) and not options.get("variant") and not Path(model).is_dir()
        hint = " Does it exist with --variant fp16 only?" if has_hint else ""
        raise not_loaded(option, model, error, hint) from error
    if prediction_type:
        if "prediction_type" not in pipeline.scheduler.config:
            raise ValueError(f"--prediction_type {prediction_type}: {option} {model} has no such setting")
        pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def load_lora(pipeline, lora, option="--lora", adapter="lora"):
    """Loads a LoRA, a file, a folder or a Hub id, into a pipeline as an adapter, and says how many modules it has.

    Raises ValueError unless all of them fit the model: diffusers leaves out the others, or all, without an error.
    """
    unet = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    try:
        file = find_file(lora, None)
        if unet:
            check_kind(*read_weights(file), pipeline.unet.config)
        state = pipeline.lora_state_dict(str(file), **unet)
        state = state[0] if isinstance(state, tuple) else state  # with alphas
        pipeline.load_lora_weights(str(file), adapter_name=adapter)
    except Exception as error:  # damaged, missing and foreign files fail in many kinds
        raise not_loaded(option, lora, error) from error
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, LoraLayer)]
    loaded = sum(adapter in layer.scaling for layer in layers)
    count = sum(bool(re.search(r"\.lora_B\.|[._]up\.weight$", name)) for name in state)
    if loaded != count or not count:
        hint = "" if loaded or not unet else "; examples/convert_lora.py reads other formats, such as PEFT's"
        raise ValueError(f"{option} {lora}: of its {count} modules {loaded} fit the model{hint}")
    print(f"{option} {lora}: {count} modules, all of which fit the model", flush=True)


def load_or_end(args):
    """Returns the pipeline of `--model`, with `--lora` if there is one; ends the program if that fails."""
    try:
        pipeline = load_pipeline(args.model)
        if "lora" in args:
            load_lora(pipeline, args.lora)
    except ValueError as problem:
        args.error(printable(str(problem)))
    return pipeline


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
    check_options(args, "train.parquet")
    sampling = {name: getattr(args, name) for name in SAMPLING}
    captions, pictures = sample_candidates(load_or_end(args), args.num_pairs, args.seed, **sampling)
    write_pairs(Path(args.output_dir) / "train.parquet", captions, pictures, args.preference, args.tie_margin)


if __name__ == "__main__":
    main(args)

"""Scorers of pictures, by which judge_lora.py compares and sample_pairs.py ranks. For all of them higher is better.

    pickscore           PickScore (Kirstain et al. 2023, arXiv 2305.01569), trained on people's choices
    clip                100 times the cosine of picture and prompt (CLIP ViT-L/14): is the prompt obeyed?
    brisque             minus BRISQUE (Mittal et al. 2012), which rises with noise, blur and blocks: does it decay?
    file.py:function    your own: function(image, prompt) -> number, called with a PIL image at a time

`pickscore` and `clip` take another model, or a folder, after `=`, as in `clip=openai/clip-vit-base-patch32`. `brisque`
needs `pip install "brisque[opencv-python-headless]"`, which brings its own weights.

Other reward models are functions of yours. For HPS v2.1 or ImageReward, whose packages pin old libraries and need
torchvision (not tried here), a file in the environment where they work is

    import ImageReward
    model = ImageReward.load("ImageReward-v1.0")

    def reward(image, prompt):
        return model.score(prompt, [image])
"""

import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import missing_folder, one_line
from training_utils import find_model

PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP = "openai/clip-vit-large-patch14"
NAMES = ("pickscore", "clip", "brisque")


class Scorer(NamedTuple):
    """A name, and a function from N PIL images and their prompts to N scores, float64; higher is better."""

    name: str
    score: Callable[[list, list[str]], np.ndarray]


def check_scorer(spec):
    """Raises ValueError, in one line, if a scorer is unknown or lacks what it needs. Loads no weights."""
    name, _, path = spec.partition("=")
    if name in ("pickscore", "clip"):
        from transformers import AutoConfig

        model = clip_model(name, path)
        find_model(name, model, None, logging.getLogger(__name__).warning)
        try:
            AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            missing = missing_folder(model, was_asked_for=True)
            raise ValueError(f"{name} {model}: cannot be loaded: {missing or one_line(error)}") from error
    elif spec == "brisque":
        if importlib.util.find_spec("brisque") is None or importlib.util.find_spec("cv2") is None:
            raise ValueError('brisque is not installed: pip install "brisque[opencv-python-headless]"')
    elif ".py:" in spec:
        load_function(spec)
    else:
        raise ValueError(f"there is no scorer {spec!r}; allowed: {', '.join(NAMES)} and file.py:function")


def load_scorer(spec, device="cpu", batch_size=8):
    """Returns the scorer that a specification names, see the head of this file; raises ValueError if that fails."""
    check_scorer(spec)
    name, _, path = spec.partition("=")
    if name in ("pickscore", "clip"):
        return Scorer(name, clip_scorer(name, path, device, batch_size))
    if name == "brisque":
        return Scorer(name, brisque_scorer())
    return of_function(spec.rpartition(":")[2], load_function(spec))


def of_function(name, function):
    """Returns the scorer that calls function(image, prompt) once for each picture."""

    def score(images, prompts):
        return np.array([float(function(*pair)) for pair in zip(images, prompts, strict=True)])

    return Scorer(name, score)


@cache  # a file that loads a model when it is imported does so once
def load_function(spec):
    """Returns a function in a Python file, which may import from its own folder."""
    file, _, name = spec.rpartition(":")
    file = Path(file).expanduser()
    if not file.is_file():
        raise ValueError(f"scorer {spec}: there is no file {file}")
    sys.path.insert(0, str(file.resolve().parent))
    try:
        module_spec = importlib.util.spec_from_file_location(f"scorer_{file.stem}", file)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        function = getattr(module, name)
        inspect.signature(function).bind("image", "prompt")
    except Exception as error:  # whatever somebody else's file raises
        raise ValueError(f"scorer {spec}: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.pop(0)
    return function


def clip_model(name, path):
    return os.path.expanduser(path) or (PICKSCORE if name == "pickscore" else CLIP)


def clip_scorer(name, path, device, batch_size):
    """Returns PickScore's score, exp(logit scale) times the cosine, or CLIP's, 100 times the cosine."""
    from transformers import AutoProcessor, CLIPModel

    model_path = clip_model(name, path)
    processor_path = PICKSCORE_PROCESSOR if model_path == PICKSCORE else model_path
    try:
        model = CLIPModel.from_pretrained(model_path).eval().to(device)
        processor = AutoProcessor.from_pretrained(processor_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"scorer {name}: {model_path} cannot be loaded: {one_line(error)}") from error
    scale = model.logit_scale.exp().item() if name == "pickscore" else 100.0

    @torch.no_grad()
    def score(images, prompts):
        scores = []
        for i in range(0, len(images), batch_size):
            batch = processor(
                text=prompts[i : i + batch_size], images=images[i : i + batch_size], padding=True, truncation=True,
                return_tensors="pt",
            ).to(device)  # fmt: skip
            output = model(**batch)  # whose embeddings are normalised
            scores.append(scale * (output.image_embeds * output.text_embeds).sum(-1).double().cpu())
        return torch.cat(scores).numpy()

    return score


def brisque_scorer():
    from brisque import BRISQUE

    class Brisque(BRISQUE):
        def calculate_brisque_features(self, *args, **options):
            """Numbers, where the package returns arrays of one number, which numpy 2.4 does not take for numbers."""
            features = super().calculate_brisque_features(*args, **options)
            return np.array([np.ravel(feature)[0] for feature in features], dtype=np.float64)

    model = Brisque(url=False)
    return lambda images, prompts: np.array([-model.score(np.asarray(image.convert("RGB"))) for image in images])

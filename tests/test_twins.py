"""The two scripts share their text on purpose; what differs is named here, and nothing else may."""

import ast
import difflib
import inspect
from pathlib import Path

import train_inversion_dpo as sd
import train_inversion_dpo_sdxl as sdxl

DIFFERENT_OPTIONS = {"resolution": (512, 1024), "validation_guidance_scale": (7.5, 5.0)}
RESOLUTION = (
    'add("--resolution", type=count, default={}, help="pixels of a side; higher is slower and takes more memory")'
)
DIFFERENT_LINES = [  # outside of the docstring and the family's functions, (SD, SDXL)
    (
        "from diffusers.loaders import StableDiffusionLoraLoaderMixin",
        "from diffusers.loaders import StableDiffusionXLLoraLoaderMixin",
    ),
    (
        "from transformers import CLIPTextModel, CLIPTokenizer",
        "from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer",
    ),
    (
        'PIPELINE, LORA_LOADER = "StableDiffusionPipeline", StableDiffusionLoraLoaderMixin',
        'PIPELINE, LORA_LOADER = "StableDiffusionXLPipeline", StableDiffusionXLLoraLoaderMixin',
    ),
    (
        'description="Align Stable Diffusion 1.5 / 2.x with preference pairs by inversion-based DPO.",',
        'description="Align Stable Diffusion XL with preference pairs by inversion-based DPO.",',
    ),
    (RESOLUTION.format(512), RESOLUTION.format(1024)),
    (
        'add("--validation_guidance_scale", type=number(float, least=0), default=7.5,',
        'add("--validation_guidance_scale", type=number(float, least=0), default=5.0,',
    ),
]


def parts(script):
    """A script's lines without docstring and family, and the names of the functions that belong to the family."""
    text = Path(script.__file__).read_text(encoding="utf-8")
    before, rest = text.split("\n# What belongs to the family of models\n")
    family, after = rest.split("\n# The run\n")
    docstring = ast.parse(text).body[0]
    lines = [
        line for i, line in enumerate(before.splitlines(), 1) if not docstring.lineno <= i <= docstring.end_lineno
    ]
    return lines + after.splitlines(), [node.name for node in ast.parse(family).body]


def test_all_but_the_family_differs_exactly_in_the_named_lines():
    changed = [line for line in difflib.ndiff(parts(sd)[0], parts(sdxl)[0]) if line[0] in "-+"]
    removed, added = ([line[2:].strip() for line in changed if line[0] == sign] for sign in "-+")
    assert list(zip(removed, added, strict=True)) == DIFFERENT_LINES


def test_the_familys_functions_are_called_alike_and_differ():
    """One that has become equal in both scripts belongs to the shared ones."""
    names = parts(sd)[1]
    assert names == parts(sdxl)[1] and len(names) <= 6
    for name in names:
        one, other = getattr(sd, name), getattr(sdxl, name)
        assert inspect.signature(one) == inspect.signature(other)
        assert inspect.getsource(one) != inspect.getsource(other)


def test_the_defaults_differ_exactly_as_named():
    required = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    one, other = (vars(script.parse_args(required)[0]) for script in (sd, sdxl))
    assert one.keys() == other.keys()
    assert {name: (one[name], other[name]) for name in one if one[name] != other[name]} == DIFFERENT_OPTIONS

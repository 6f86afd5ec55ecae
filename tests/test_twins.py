"""The scripts share their text on purpose; what differs is named here, and nothing else may."""

import ast
import difflib
import inspect
from itertools import combinations
from pathlib import Path

import pytest

import train_inversion_dpo
import train_inversion_dpo_sdxl

SCALE = (
    'add("--validation_guidance_scale", type=scale, default={}, help="higher obeys the prompt more and varies less")'
)
SIDE = 'add("--resolution", type=count, default={}, help="pixels of a side; higher is slower and takes more memory")'
TWINS = {  # script: its own lines, outside of docstring and family, and its defaults
    train_inversion_dpo: (
        [
            "from transformers import CLIPTextModel, CLIPTokenizer",
            'PIPELINE = "StableDiffusionPipeline"',
            'description="Align Stable Diffusion 1.5 / 2.x with preference pairs by inversion-based DPO.",',
            SIDE.format(512),
            SCALE.format(7.5),
        ],
        {"resolution": 512, "validation_guidance_scale": 7.5},
    ),
    train_inversion_dpo_sdxl: (
        [
            "from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer",
            'PIPELINE = "StableDiffusionXLPipeline"',
            'description="Align Stable Diffusion XL with preference pairs by inversion-based DPO.",',
            SIDE.format(1024),
            SCALE.format(5.0),
        ],
        {"resolution": 1024, "validation_guidance_scale": 5.0},
    ),
}
PAIRS = list(combinations(TWINS, 2))


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


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_all_but_the_family_differs_exactly_in_the_named_lines(one, other):
    changed = [line for line in difflib.ndiff(parts(one)[0], parts(other)[0]) if line[0] in "-+"]
    for script, sign in ((one, "-"), (other, "+")):
        assert sorted(line[2:].strip() for line in changed if line[0] == sign) == sorted(TWINS[script][0])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_familys_functions_are_called_alike_and_differ(one, other):
    """One that has become equal in all scripts belongs to the shared ones."""
    names = parts(one)[1]
    assert names == parts(other)[1] and len(names) <= 7
    for name in names:
        assert inspect.signature(getattr(one, name)) == inspect.signature(getattr(other, name))
        assert inspect.getsource(getattr(one, name)) != inspect.getsource(getattr(other, name))


def test_the_defaults_differ_exactly_as_named():
    required = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    defaults = {script: vars(script.parse_args(required)[0]) for script in TWINS}
    for script, (_, own) in TWINS.items():
        assert defaults[script] == {**defaults[train_inversion_dpo], **own}

"""The two scripts share their text on purpose; what differs is named here, and nothing else may."""

import ast
import difflib
from pathlib import Path

import train_inversion_dpo
import train_inversion_dpo_sdxl

FAMILY_FUNCTIONS = {"check_family", "load_encoders", "load_models", "make_pipeline", "collate", "encode_prompts"}
DIFFERENT_OPTIONS = {"resolution": (512, 1024), "validation_guidance_scale": (7.5, 5.0)}
DIFFERENT_LINES = [  # of parse_args and the module's own text, (SD, SDXL)
    (
        "from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, "
        "UNet2DConditionModel",
        "from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline, "
        "UNet2DConditionModel",
    ),
    (
        "from transformers import CLIPTextModel, CLIPTokenizer",
        "from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer",
    ),
    ("PIPELINE_CLASS = StableDiffusionPipeline", "PIPELINE_CLASS = StableDiffusionXLPipeline"),
    (
        'description="Align Stable Diffusion 1.5 / 2.x with preference pairs by inversion-based DPO.",',
        'description="Align Stable Diffusion XL with preference pairs by inversion-based DPO.",',
    ),
    (
        'add("--resolution", type=int, default=512, help="pixels of a side; higher is slower and takes more memory")',
        'add("--resolution", type=int, default=1024, help="pixels of a side; higher is slower and takes more memory")',
    ),
    (
        'add("--validation_guidance_scale", type=number(float, least=0), default=7.5,',
        'add("--validation_guidance_scale", type=number(float, least=0), default=5.0,',
    ),
]


def parts(script):
    """The text of a script's functions by name, and all the rest of it but the docstring."""
    text = Path(script.__file__).read_text()
    tree = ast.parse(text)
    lines = text.splitlines()
    functions, taken = {}, set(range(tree.body[0].end_lineno))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            functions[node.name] = "\n".join(lines[first : node.end_lineno])
            taken |= set(range(first, node.end_lineno))
    return functions, [line for i, line in enumerate(lines) if i not in taken]


SD, SDXL = parts(train_inversion_dpo), parts(train_inversion_dpo_sdxl)


def differences(old, new):
    changed = [line for line in difflib.ndiff(old, new) if line[0] in "-+"]
    removed, added = ([line[2:].strip() for line in changed if line[0] == sign] for sign in "-+")
    return list(zip(removed, added, strict=True))


def test_functions_differ_exactly_where_the_family_does():
    """In both directions: a family function that has become equal belongs to the shared ones."""
    assert list(SD[0]) == list(SDXL[0])
    assert {name for name in SD[0] if SD[0][name] != SDXL[0][name]} == FAMILY_FUNCTIONS | {"parse_args"}


def test_imports_constants_and_options_differ_exactly_in_the_named_lines():
    assert (
        differences(SD[1], SDXL[1]) + differences(SD[0]["parse_args"].splitlines(), SDXL[0]["parse_args"].splitlines())
        == DIFFERENT_LINES
    )


def test_the_defaults_differ_exactly_as_named():
    required = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    sd, sdxl = (vars(script.parse_args(required)[0]) for script in (train_inversion_dpo, train_inversion_dpo_sdxl))
    assert sd.keys() == sdxl.keys()
    assert {name: (sd[name], sdxl[name]) for name in sd if sd[name] != sdxl[name]} == DIFFERENT_OPTIONS

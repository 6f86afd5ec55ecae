"""Convert a U-Net's LoRA between the formats of diffusers, kohya and PEFT, and fold a scale into it.

    python examples/convert_lora.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --lora my-taste --scale 0.4 --format kohya --output my-taste.safetensors

It reads what `pipe.load_lora_weights` of diffusers reads, kohya's names included, what ComfyUI saves, and a folder of
PEFT, with the scale (alpha / rank) that the file asks for. It writes

    diffusers   a file for `pipe.load_lora_weights`, and for `--lora_init` of the training scripts
    kohya       a file for ComfyUI, Forge, AUTOMATIC1111 and sd-scripts
    peft        a folder for `PeftModel.from_pretrained(unet, folder)`

With `--scale 0.4`, what is written has at scale 1 the effect that the original has at 0.4. Scales are folded into the
weights, and alpha equals the rank. Of the model only the configurations of U-Net and scheduler are read. A LoRA of
another family of models is refused, as are kinds with other weights than a down- and an up-projection, such as LoHa.
"""

import json
import logging
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import Parser, number, one_line


def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s --pretrained_model_name_or_path M --lora L --format F --output O [options, see --help]",
    )
    path = os.path.expanduser
    # fmt: off
    add = parser.add_argument
    add("--pretrained_model_name_or_path", type=path, required=True, help="model that the LoRA is for")
    add("--lora", type=path, required=True, help="LoRA to convert: a file, a folder or a Hub id")
    add("--scale", type=number(float, above=0), default=1.0,
        help="what scale 1 of the output is to be, such as the scale that judge_lora.py recommends")
    add("--format", choices=["diffusers", "kohya", "peft"], required=True, help="what to write")
    add("--output", type=path, required=True, help="file to write, ending with .safetensors; a folder for peft")
    add("--unet_only", action="store_true", help="leave out weights of text encoders, and bundled embeddings")
    add("--revision", help="revision of the model on the Hub")
    add("--cache_dir", type=path, help="folder for downloads")
    # fmt: on
    return parser.parse_args(argv), parser.error


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

import torch
import torch.nn.functional as F

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported, it warns of kernels for CPUs
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, _best_guess_weight_name
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save

from training_utils import LORA_FILE, lora_shape, sgm_names, write_kohya, write_lora, write_whole

PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
OTHER_KINDS = {  # by what the names of weights hold
    r"dora|lora_magnitude": "a DoRA", r"\.hada_": "a LoHa", r"\.lokr_": "a LoKr", r"\.oft_": "an OFT",
    r"\.on_input$|ia3": "an IA3", r"\.lora_mid\.": "a LoCon with Tucker decomposition",
    r"\.diff(_b)?$": "a file of full differences of weights",
}  # fmt: skip
TEXT_ENCODER = r"text_encoder|lora_te\d?_|clip_[lgh]\."
TRANSFORMER = r"transformer\.|lora_transformer_|.*(double|single|joint)_(transformer_)?blocks"
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of the text that a U-Net sees


def find_file(path, cache_dir):
    """Returns the file of a LoRA that is a file itself, in a folder, or on the Hub."""
    if Path(path).is_file():
        file = Path(path)
    elif (Path(path) / PEFT_CONFIG).is_file():
        file = Path(path, PEFT_FILE)
    else:
        name = _best_guess_weight_name(str(path)) or LORA_FILE
        file = Path(path, name) if Path(path).is_dir() else Path(hf_hub_download(path, name, cache_dir=cache_dir))
    if file.suffix in (".bin", ".ckpt", ".pt", ".pth"):
        raise ValueError(f"{file.name} may run programs when it is read; convert it to .safetensors where it is safe")
    return file


def read_weights(file):
    """Returns the tensors of a file by their names, and its metadata."""
    with safe_open(file, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}


def check_kind(weights, about, unet_config):
    """Raises ValueError if weights, by their names and sizes, are no LoRA that can be read, or another family's."""
    for name in weights:
        if kind := next((kind for pattern, kind in OTHER_KINDS.items() if re.search(pattern, name)), None):
            raise ValueError(f"it is {kind}, and only a LoRA with a down- and an up-projection for each module can be "
                             f"converted ({name})")  # fmt: skip
        if re.match(TRANSFORMER, name):
            raise ValueError(f"this LoRA is for a transformer, such as that of FLUX or SD 3, not for a U-Net ({name})")
    pattern = r".*attn2[._]to_k.*(lora_A|down)\.weight"
    width = next((value.shape[1] for name, value in weights.items() if re.fullmatch(pattern, name)), None)
    expected = unet_config["cross_attention_dim"]
    if width not in (None, expected):
        is_sdxl = about.get("ss_base_model_version", "").startswith("sdxl")
        own = "SDXL" if unet_config.get("addition_embed_type") == "text_time" else FAMILIES.get(expected, "another")
        other = "SDXL" if is_sdxl else FAMILIES.get(width, "another model")
        raise ValueError(f"this LoRA is for {other}: its text is {width} wide, that of this model ({own}) {expected}")


def comfyui_names(weights, unet_config):
    """Returns ComfyUI's weights with diffusers' names, and its alphas, for `load_lora_adapter`."""
    names, alphas = {f"{sgm}.": f"{name}." for name, sgm in sgm_names(unet_config).items()}, {}
    for name in list(weights):
        plain = name.removeprefix("diffusion_model.")
        start = next((start for start in names if plain.startswith(start)), "")
        plain = f"unet.{names.get(start, '')}{plain.removeprefix(start)}"
        value = weights.pop(name)
        if plain.endswith(".alpha"):
            alphas[plain] = value.item()
        else:
            weights[plain.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")] = value
    return weights, alphas


def load_peft(unet, weights, folder):
    """Adds the adapter of PEFT's folder to a U-Net, without its weights; returns these by `unet.<module>`."""
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"it is a {config.peft_type.value} of PEFT, of which only a LoRA can be converted")
    unet.add_adapter(config, "default")
    return {f"unet.{name.removeprefix('base_model.model.')}": value for name, value in weights.items()}


def load_other(unet, weights, about):
    """Adds a LoRA of any other format to a U-Net, without its weights; returns these by `unet.<module>`."""
    if all(name.startswith("diffusion_model.") for name in weights):
        weights, alphas = comfyui_names(weights, unet.config)
    else:
        is_sdxl = unet.config.get("addition_embed_type") == "text_time"
        loader = StableDiffusionXLLoraLoaderMixin if is_sdxl else StableDiffusionLoraLoaderMixin
        weights, alphas = loader.lora_state_dict(weights, unet_config=unet.config)
    weights = convert_unet_state_dict_to_peft(weights)  # every name, where diffusers looks at the first alone
    for name in weights:
        if not (name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight"))):
            raise ValueError(f"{name} is not the down- or up-projection of a module of a U-Net")
    metadata = json.loads(about.get(LORA_ADAPTER_METADATA_KEY, "null"))
    unet.load_lora_adapter(
        dict(weights), prefix="unet", network_alphas=alphas, metadata=metadata, adapter_name="default",
        low_cpu_mem_usage=True,
    )  # fmt: skip
    return weights


def read_any_lora(path, unet_config, cache_dir=None, unet_only=False):
    """Returns a U-Net's LoRA in float32, from a file, a folder or the Hub, in any format that this program reads.

    The names are PEFT's: `<module>.lora_A.weight` (rank, in, ...) and `<module>.lora_B.weight` (out, rank, ...). The
    latter contains alpha / rank, and lower ranks are filled up with zeros, so one rank holds for all modules, and
    alpha equals it. With `unet_only`, text encoders' weights and bundled embeddings are left out.

    Raises ValueError if it is no LoRA, of another model, of a text encoder too, or of a kind with other weights.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
    logging.disable(logging.ERROR)  # diffusers logs what is raised here
    try:
        file = find_file(path, cache_dir)
        weights, about = read_weights(file)
        others = [name for name in weights if re.match(f"{TEXT_ENCODER}|bundle_emb", name)]
        if others and not unet_only:
            kind = "a bundled embedding" if others[0].startswith("bundle_emb") else "weights of a text encoder"
            raise ValueError(f"it holds {kind} ({others[0]}); --unet_only leaves them out")
        weights = {name: value for name, value in weights.items() if name not in others}
        check_kind(weights, about, unet.config)
        is_peft = file.name == PEFT_FILE
        weights = load_peft(unet, weights, file.parent) if is_peft else load_other(unet, weights, about)
    except Exception as error:  # damaged, missing and foreign files fail in many kinds
        raise ValueError(one_line(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, LoraLayer)}
    if not layers or {f"unet.{name}.lora_{x}.weight" for name in layers for x in "AB"} != weights.keys():
        raise ValueError(f"it has {len(weights) / 2:g} modules, of which this model has {len(layers)}")
    rank, lora = max(layer.r["default"] for layer in layers.values()), {}
    for name, layer in layers.items():
        down, up = (weights[f"unet.{name}.lora_{x}.weight"] for x in "AB")  # the model's own copies are empty
        if (down.shape, up.shape) != (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape):
            raise ValueError(f"it is for another model, whose {name} has another size")
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"{name} is not finite")
        up, missing = up.float() * layer.scaling["default"], rank - len(down)
        lora[f"{name}.lora_A.weight"] = F.pad(down.float(), [0, 0] * (down.ndim - 1) + [0, missing])
        lora[f"{name}.lora_B.weight"] = F.pad(up, [0, 0] * (up.ndim - 2) + [0, missing])
    return lora


def scaled(lora, scale):
    """Returns a LoRA whose effect at scale 1 is that of the given one at `scale`."""
    return {name: value * scale if ".lora_B." in name else value for name, value in lora.items()}


def write_peft(folder, lora):
    """Writes a LoRA of `read_any_lora` as a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""
    rank, modules = lora_shape(lora)
    LoraConfig(r=rank, lora_alpha=rank, target_modules=modules).save_pretrained(folder)
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in lora.items()}
    write_whole(folder / PEFT_FILE, save(tensors, {"format": "pt"}))


def main(args, error):
    model, output = args.pretrained_model_name_or_path, Path(args.output)
    hub = {"revision": args.revision, "cache_dir": args.cache_dir}
    if output.exists():
        error(f"--output {output} exists already; name another or remove it")
    if (args.format == "peft") == (output.suffix == ".safetensors"):
        kind = "folder" if args.format == "peft" else "file that ends with .safetensors"
        error(f"--output {output}: --format {args.format} needs a {kind}")
    try:
        config = UNet2DConditionModel.load_config(model, subfolder="unet", **hub)
        scheduler = DDIMScheduler.load_config(model, subfolder="scheduler", **hub)
    except (OSError, ValueError) as problem:
        error(f"--pretrained_model_name_or_path {model} has no U-Net: {one_line(problem)}")
    try:
        lora = read_any_lora(args.lora, config, args.cache_dir, args.unet_only)
    except ValueError as problem:
        error(f"--lora {args.lora}: {problem}")
    lora = scaled(lora, args.scale)
    try:
        if args.format == "peft":
            write_peft(output, lora)
        elif args.format == "kohya":
            resolution = 8 * config["sample_size"]  # pixels to a latent, in all that have a U-Net
            write_kohya(output, lora, config, output.stem, scheduler.get("prediction_type", "epsilon"), resolution)
        else:
            write_lora(output, lora, "unet")
    except OSError as problem:
        error(f"--output {output} cannot be written: {one_line(problem)}")
    rank, modules = lora_shape(lora)
    print(f"wrote {output}: {len(modules)} modules of rank {rank}; its scale 1 is scale {args.scale:g} of {args.lora}")


if __name__ == "__main__":
    main(*args_and_error)

"""Convert a U-Net's LoRA between the formats of diffusers, kohya and PEFT.

    python examples/convert_lora.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --lora my-taste --format kohya --output my-taste.safetensors

It reads whatever `pipe.load_lora_weights` of diffusers reads, kohya's names included, with the scale (alpha / rank)
that the file asks for, and writes

    diffusers   a file for `pipe.load_lora_weights`, and for `--lora_init` of the training scripts
    kohya       a file for ComfyUI, Forge, AUTOMATIC1111 and sd-scripts
    peft        a folder for `PeftModel.from_pretrained(unet, folder)`

The scale is folded into the weights, and alpha equals the rank. Of the model only the U-Net's configuration is read.
A LoRA of the text encoder is refused, as are the kinds with other weights than a down- and an up-projection.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported, it warns of kernels for CPUs
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from peft import LoraConfig
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from inversion_utils import lora_shape, one_line, read_lora, write_kohya, write_lora, write_whole


def write_peft(folder, lora):
    """Writes a LoRA of `read_lora` as a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""
    rank, modules = lora_shape(lora)
    LoraConfig(r=rank, lora_alpha=rank, target_modules=modules).save_pretrained(folder)
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in lora.items()}
    write_whole(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s --pretrained_model_name_or_path M --lora L --format F --output O [options, see --help]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    path = os.path.expanduser
    # fmt: off
    add = parser.add_argument
    add("--pretrained_model_name_or_path", type=path, required=True, help="model that the LoRA is for")
    add("--lora", type=path, required=True, help="LoRA to convert: a file, a folder or a Hub id")
    add("--format", choices=["diffusers", "kohya", "peft"], required=True, help="what to write")
    add("--output", type=path, required=True, help="file to write, ending with .safetensors; a folder for peft")
    add("--revision", help="revision of the model on the Hub")
    add("--cache_dir", type=path, help="folder for downloads")
    # fmt: on
    return parser.parse_args(argv), parser.error


def main(argv=None):
    args, error = parse_args(argv)
    model, output, hub = args.pretrained_model_name_or_path, Path(args.output), {"cache_dir": args.cache_dir}
    if output.exists():
        error(f"--output {output} exists already; name another or remove it")
    if (args.format == "peft") == (output.suffix == ".safetensors"):
        kind = "folder" if args.format == "peft" else "file that ends with .safetensors"
        error(f"--output {output}: --format {args.format} needs a {kind}")
    try:
        config = UNet2DConditionModel.load_config(model, subfolder="unet", revision=args.revision, **hub)
    except (OSError, ValueError) as problem:
        error(f"--pretrained_model_name_or_path {model} has no U-Net: {one_line(problem)}")
    is_sdxl = config.get("addition_embed_type") == "text_time"
    loader = StableDiffusionXLLoraLoaderMixin if is_sdxl else StableDiffusionLoraLoaderMixin
    try:
        lora = read_lora(args.lora, config, loader, **hub)
    except ValueError as problem:
        error(f"--lora {args.lora}: {problem}")
    try:
        if args.format == "peft":
            write_peft(output, lora)
        elif args.format == "kohya":
            write_kohya(output, lora, config)
        else:
            write_lora(output, lora)
    except OSError as problem:
        error(f"--output {output} cannot be written: {one_line(problem)}")
    rank, modules = lora_shape(lora)
    print(f"wrote {output}: {len(modules)} modules of rank {rank}")


if __name__ == "__main__":
    main()

"""Find the noise that belongs to a picture, and sample the picture back from it.

    python examples/inversion_demo.py --model examples/small_world_model --image picture.png --output_dir inverted

Uses `invert` of inversion_utils.py and any Stable Diffusion 1.x, 2.x or SDXL pipeline with epsilon- or v-prediction.
Writes four files to `--output_dir`:

    comparison.png       original, VAE round trip, implied noise and reconstruction side by side
    reconstruction.png   the picture sampled back
    noise.png            the implied noise: its first three channels as red, green and blue, -3 to 3 as black to white
    noise.safetensors    "latents", the inverted x_t, and "noise", the implied noise, both (1, 4, h, w)

and prints their PSNR, in decibels, higher is closer. The VAE round trip is the ceiling: no inversion gives back what
the VAE loses.

The reconstruction is sampled from x_t by DPM-Solver++ 2M (diffusers' own scheduler, so not this project's formulas run
backwards) at the inversion's nodes, one model call each, with the same prompt and without guidance. Estimating x_0
from x_t and the implied noise in one step would prove nothing: it is exact by construction, whatever the model.
"""

import math
import os
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import Parser, number, one_line, printable

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
OUTPUTS = ("comparison.png", "reconstruction.png", "noise.png", "noise.safetensors")


def parse_args(argv=None):
    path = os.path.expanduser
    parser = Parser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s --model M --image I --output_dir O [options, see --help]",
    )
    count = number(int, least=1)
    # fmt: off
    add = parser.add_argument
    add("--model", type=path, required=True, help="Stable Diffusion 1.x, 2.x or SDXL pipeline: a Hub id or a folder")
    add("--variant", help="variant of the model's files, such as fp16")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="what the model predicts (its scheduler's)")
    add("--image", type=path, required=True, help="picture to invert; its central square is used")
    add("--prompt", default="", help="what the picture shows; the model is told so on both ways")
    add("--output_dir", type=path, required=True, help="folder for " + ", ".join(OUTPUTS))
    add("--num_steps", type=count, default=20, help="model calls each way; more reconstructs better and takes longer")
    add("--timestep", type=number(int, least=0), help="how far to invert (the last timestep that has signal)")
    add("--resolution", type=count, help="pixels per side (the model's own)")
    # fmt: on
    return parser.parse_args(argv), parser.error


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from make_pairs import check_model, load_pipeline
from pair_files import check_folder
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

from inversion_utils import PREDICTION_TYPES, inversion_nodes, invert, noise_from_model_output
from training_utils import BadRow, decode_image, encode_images, resize_and_crop


def read_model(model, resolution, variant=None, prediction_type=None):
    """Returns the noise scheduler and the resolution of a pipeline, from its configurations alone.

    Args:
        model: a Hub id or a folder.
        resolution: pixels per side, or None for the model's own.
        variant: of the files of weights, such as "fp16".
        prediction_type: what the model predicts, where its scheduler is wrong.

    Raises:
        ValueError: if the pipeline cannot be inverted here, or not at this resolution.
    """
    check_model("--model", model, variant=variant)
    pipeline = DiffusionPipeline.load_config(model)["_class_name"]
    if pipeline not in PIPELINES:
        raise ValueError(f"--model {model}: it is a {pipeline}; supported are {' and '.join(PIPELINES)}")
    configs = {}
    for part, kind in (("scheduler", DDPMScheduler), ("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        try:
            configs[part] = kind.load_config(model, subfolder=part)
        except (OSError, ValueError) as error:
            raise ValueError(f"--model {model}: its {part} cannot be used: {one_line(error)}") from error
    schedule, unet, vae = configs.values()
    if (kind := vae.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise ValueError(f"--model {model}: its vae is an {kind}; supported is AutoencoderKL")
    noise_scheduler = DDPMScheduler.from_config(schedule)
    if prediction_type:
        noise_scheduler.register_to_config(prediction_type=prediction_type)
    prediction_type = noise_scheduler.config.prediction_type
    if "beta_start" not in schedule or prediction_type not in PREDICTION_TYPES:
        kind = f"predicts {prediction_type!r}" if "beta_start" in schedule else "has no schedule of betas"
        raise ValueError(f"--model {model}: its scheduler {kind}; supported are {' and '.join(PREDICTION_TYPES)}")
    factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    if not resolution and not isinstance(unet.get("sample_size"), int):
        raise ValueError(f"--model {model}: its unet names no size; give --resolution")
    resolution = resolution or unet["sample_size"] * factor
    if resolution % factor:
        raise ValueError(f"--resolution is {resolution}; allowed: multiples of {factor}, the VAE's factor")
    return noise_scheduler, resolution


def load_without_checker(model, variant=None):
    """Returns the pipeline in float32, on the GPU if there is one, without SD 1.x's safety checker."""
    is_xl = DiffusionPipeline.load_config(model)["_class_name"] == "StableDiffusionXLPipeline"
    unused = {} if is_xl else {"safety_checker": None, "requires_safety_checker": False}
    return load_pipeline(model, variant=variant, **unused)


@torch.no_grad()
def noise_predictor(pipeline, noise_scheduler, prompt, resolution):
    """Returns predict(x_t (1, C, h, w), timesteps (1,)) -> noise, without guidance, as `invert` wants it."""
    unet = pipeline.unet
    embeds = pipeline.encode_prompt(
        prompt, device=unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    cond = {"encoder_hidden_states": embeds[0]}
    if type(pipeline).__name__ == "StableDiffusionXLPipeline":  # whose prompts have a pooled embedding, the third
        side = (resolution, resolution)
        width = pipeline.text_encoder_2.config.projection_dim
        time_ids = pipeline._get_add_time_ids(side, (0, 0), side, torch.float32, text_encoder_projection_dim=width)
        cond["added_cond_kwargs"] = {"text_embeds": embeds[2], "time_ids": time_ids.to(unet.device)}

    @torch.no_grad()
    def predict(x_t, timesteps):
        output = unet(x_t, timesteps, **cond).sample
        return noise_from_model_output(
            output, x_t, timesteps, noise_scheduler.alphas_cumprod, noise_scheduler.config.prediction_type
        )

    return predict


def sample_back(predict, x_t, nodes, alphas_cumprod):
    """Returns x_0, sampled from x_t (N, C, h, w) with a call of `predict` for every node, from the last to the first.

    `nodes` are rising timesteps without repetitions; x_t is at the last of them.
    """
    before = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    sampler = DPMSolverMultistepScheduler(trained_betas=(1 - alphas_cumprod / before).tolist())
    sampler.set_timesteps(timesteps=nodes[::-1])
    for t in sampler.timesteps:
        x_t = sampler.step(predict(x_t, t.to(x_t.device).expand(len(x_t))), t, x_t).prev_sample
    return x_t


@torch.no_grad()
def decode_latents(vae, latents):
    """Returns the picture of scaled latents (1, C, h, w)."""
    return to_picture(vae.decode(latents / vae.config.scaling_factor).sample[0])


def to_picture(pixels):
    """Returns pixels (3, H, W) in [-1, 1] as a picture; what is outside is clipped."""
    values = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(values.round().byte().permute(1, 2, 0).cpu().numpy())


def noise_picture(noise, resolution):
    """Returns noise (1, C, h, w) as a picture: three channels as colours, three standard deviations as their range."""
    return to_picture(noise[0, :3] / 3).resize((resolution, resolution), Image.Resampling.NEAREST)


def psnr(picture, other):
    """Returns the peak signal-to-noise ratio of two pictures in decibels, infinite where they are equal."""
    error = np.square(np.asarray(picture, dtype=float) - np.asarray(other, dtype=float)).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def draw_comparison(panels, heading):
    """Returns pictures of one size side by side.

    Args:
        panels: (picture, title, remark) each.
        heading: one line above them.
    """
    side = panels[0][0].width
    side *= math.ceil(256 / side)
    unit = side / 256  # labels grow with the pictures
    gap, top = round(14 * unit), round(76 * unit)
    canvas = Image.new("RGB", (gap + len(panels) * (side + gap), top + side + round(32 * unit)), "white")
    pen, font, large = ImageDraw.Draw(canvas), ImageFont.load_default(15 * unit), ImageFont.load_default(19 * unit)
    pen.text((gap, 12 * unit), heading, fill="#444444", font=font)
    for i, (picture, title, remark) in enumerate(panels):
        x = gap + i * (side + gap)
        pen.text((x, 43 * unit), title, fill="black", font=large)
        canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, top))
        pen.text((x, top + side + 7 * unit), remark, fill="#444444", font=font)
    return canvas


def main(args, error):
    output_dir = Path(args.output_dir)
    check_folder(output_dir, error)
    for name in OUTPUTS:
        if (output_dir / name).exists():
            error(f"--output_dir {args.output_dir}: already holds {name}; give another folder or remove it")
    if not Path(args.image).is_file():
        error(f"--image {args.image}: no such file")
    try:
        image = decode_image(Path(args.image).read_bytes())
        noise_scheduler, resolution = read_model(args.model, args.resolution, args.variant, args.prediction_type)
    except BadRow as problem:
        error(f"--image {args.image}: {one_line(problem)}")
    except ValueError as problem:
        error(printable(str(problem)))
    alphas_cumprod = noise_scheduler.alphas_cumprod
    last = int((alphas_cumprod > 0).sum()) - 1
    timestep = last if args.timestep is None else args.timestep
    if timestep > last:
        error(f"--timestep is {timestep}; allowed: 0 to {last}, the last timestep that has signal")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        pipeline = load_without_checker(args.model, args.variant)
    except OSError as problem:
        error(f"--output_dir {args.output_dir}: {one_line(problem)}")
    except ValueError as problem:
        error(printable(str(problem)))

    predict = noise_predictor(pipeline, noise_scheduler, args.prompt, resolution)
    pixels, _ = resize_and_crop(image, resolution, (0.5, 0.5), flip=False)
    latents = encode_images(pipeline.vae, pixels[None], batch_size=1)
    timesteps = torch.tensor([timestep])
    trajectory = invert(predict, latents, timesteps, alphas_cumprod, args.num_steps)
    x_t, noise = trajectory.latents[0], trajectory.noise[0]
    nodes = inversion_nodes(timesteps[None], alphas_cumprod, args.num_steps)[0].unique().tolist()
    sampled = sample_back(predict, x_t, nodes, noise_scheduler.alphas_cumprod)

    original, round_trip = to_picture(pixels), decode_latents(pipeline.vae, latents)
    reconstruction = decode_latents(pipeline.vae, sampled)
    noise_image = noise_picture(noise, resolution)
    ceiling, reached = psnr(round_trip, original), psnr(reconstruction, original)
    to_round_trip, deviation = psnr(reconstruction, round_trip), noise.std().item()
    prompt = textwrap.shorten(args.prompt, 70, placeholder=" ...")
    calls = f"{args.num_steps} model calls, sampled back in {len(nodes)}"
    comparison = draw_comparison(
        [
            (original, "original", f"{resolution} x {resolution} pixels"),
            (round_trip, "VAE round trip", f"{ceiling:.1f} dB, the ceiling"),
            (noise_image, "implied noise", f"standard deviation {deviation:.2f}"),
            (reconstruction, "reconstruction", f"{reached:.1f} dB; to the round trip {to_round_trip:.1f} dB"),
        ],
        f'Prompt "{prompt}". Inverted to timestep {timestep} in {calls}',
    )
    save_file(
        {"latents": x_t.cpu(), "noise": noise.cpu()}, output_dir / "noise.safetensors", {"timestep": str(timestep)}
    )
    noise_image.save(output_dir / "noise.png")
    reconstruction.save(output_dir / "reconstruction.png")
    comparison.save(output_dir / "comparison.png")
    print(f"VAE round trip   {ceiling:.1f} dB against the original")
    print(f"reconstruction   {to_round_trip:.1f} dB against the round trip, {reached:.1f} dB against the original")
    print(f"implied noise    standard deviation {deviation:.3f} at timestep {timestep}")
    print(f"model calls      {args.num_steps} to invert, {len(nodes)} to sample back")
    print(f"picture          {output_dir / 'comparison.png'}")


if __name__ == "__main__":
    main(*args_and_error)

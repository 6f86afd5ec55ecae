"""Train a small Stable Diffusion or SDXL pipeline from nothing on the pictures of `small_world.py`.

    python examples/train_small_world.py --output_dir my_small_world
    python examples/train_small_world.py --family sdxl --vae examples/small_world_model --output_dir my_sdxl_world

It has every part of the real thing: a CLIP tokenizer and text encoder, an AutoencoderKL that turns 64x64 pixels into
8x8x4 latents, a UNet2DConditionModel with cross-attention at every level and SD's noise schedule. First the
autoencoder is trained, unless `--vae` names a trained one, then U-Net and text encoder together, with 10 % empty
captions. The exponential average of the weights is saved, U-Net and autoencoder in half precision.

`--family sdxl` has two text encoders, of which the last layer but one is used, the second one's pooled embedding, and
SDXL's micro-conditioning: the U-Net is told the size of a picture before it was enlarged, and where a crop was taken
from a larger one. At sampling, a small `original_size` asks for a blurred picture, and `crops_coords_top_left` for one
that is shifted to the top left.

The pipeline is written every `--save_steps` steps and at the end. Run the same command again to go on after an
interruption.

The weights that are shipped in `examples/small_world_model` were made while this script was still changing: the
autoencoder in three resumed stages (3450 steps) with other learning rates and weights of the edge loss, the U-Net in
one run of 2000 steps with the settings below. A run of the command above has not been compared with them; judging by
its measured seconds per step it takes about half an hour on two cores.

Those in `examples/small_world_sdxl_model` were made by exactly the second command above, but for the folder's name, in
35 minutes on one core of a busy machine (0.65 seconds per step, 27 minutes, where it was undisturbed).
They follow sizes and crops in the right direction, but less far than the training pictures go: sharpness falls from
0.277 to 0.242 at `original_size=(28, 28)` (96 held-out samples), where it falls from 0.365 to about 0.21 in training.
"""

import copy
import logging
import math
import os
import sys
import time
from pathlib import Path

import small_world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import Parser, number

MAX_TOKENS = 8  # start, "a", colour, shape, end, and room to spare
ADDITION_TIME_EMBED_DIM = 16  # of each of the six numbers that condition SDXL's U-Net besides the caption
WHOLE = (small_world.SIZE, small_world.SIZE, 0, 0, small_world.SIZE, small_world.SIZE)  # order: see crop_and_blur
UNET_STEPS = {"sd": 2000, "sdxl": 2500}


def parse_args(argv=None):
    path, count = os.path.expanduser, number(int, least=1)
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output_dir",
        type=path,
        required=True,
        help="The pipeline; training state lies beside it, as *.pt",
    )
    parser.add_argument("--family", default="sd", choices=["sd", "sdxl"], help="Kind of pipeline")
    parser.add_argument(
        "--vae",
        type=path,
        help="Pipeline folder whose trained autoencoder to take, instead of training one",
    )
    parser.add_argument("--num_pictures", type=count, default=9000, help="Pictures to draw; more generalise better")
    parser.add_argument("--vae_steps", type=count, default=3000, help="Autoencoder training; more gives crisper edges")
    parser.add_argument("--vae_batch_size", type=count, default=16)
    parser.add_argument(
        "--kl_weight", type=float, default=1e-4, help="Higher: smoother latents, less faithful pictures"
    )
    parser.add_argument(
        "--unet_steps", type=count, help="U-Net training; more obeys captions better (2000 for sd, 2500 for sdxl)"
    )
    parser.add_argument("--unet_batch_size", type=count, default=64)
    parser.add_argument("--learning_rate", type=float, default=0.015, help="Of Muon, which trains the weight matrices")
    parser.add_argument("--save_steps", type=count, default=250, help="Write state and pipeline every this many steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.unet_steps is None:
        args.unet_steps = UNET_STEPS[args.family]
    return args, parser.error


if __name__ == "__main__":  # before the imports that take seconds
    args_and_error = parse_args()

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # when imported, it warns of kernels for CPUs
transformers.logging.set_verbosity_error()  # when diffusers is imported, it warns of torchvision
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)


def check_options(args, error):
    """Ends the program by `error` if the output folder or `--vae` is unusable."""
    settings = Path(f"{args.output_dir}.settings.pt")
    if settings.exists():
        if torch.load(settings, weights_only=True) != vars(args):
            error(f"--output_dir {args.output_dir}: an interrupted run had other options; remove its *.pt files")
    elif (Path(args.output_dir) / "model_index.json").exists():
        error(f"--output_dir {args.output_dir} holds a pipeline already; name another folder")
    if args.vae and not (Path(args.vae) / "vae" / "config.json").is_file():
        error(f"--vae {args.vae}: not a pipeline folder with an autoencoder (no vae/config.json in it)")


def make_tokenizer():
    """CLIP's byte-pair tokenizer, knowing the letters and, as one token each, the words of the small world."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in sorted({word for caption in small_world.CAPTIONS for word in caption.split()}):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(pieces)):
            merge = ("".join(pieces[:i]), pieces[i])
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(merge))
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def make_text_encoder(tokenizer, hidden_size=64, model_class=CLIPTextModel):
    return model_class(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=hidden_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae():
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=small_world.SIZE,
    )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -5.0  # log variance: start with little noise in the latents
    return vae


def make_unet(**options):
    """The U-Net of the SD family; `options` replace or add to its settings."""
    return UNet2DConditionModel(**{
        "sample_size": small_world.SIZE // 8,
        "block_out_channels": (64, 80),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "attention_head_dim": 4,  # the number of heads, in spite of its name
        "norm_num_groups": 16,
        **options,
    })  # fmt: skip


def make_model(family, tokenizer):
    """The parts that are trained together: U-Net and text encoders, by their names in the pipeline."""
    if family == "sd":
        return torch.nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)})
    return torch.nn.ModuleDict({
        "unet": make_unet(
            block_out_channels=(64, 72),
            norm_num_groups=8,
            cross_attention_dim=32 + 48,  # the widths of the text encoders
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=ADDITION_TIME_EMBED_DIM,
            projection_class_embeddings_input_dim=48 + 6 * ADDITION_TIME_EMBED_DIM,
        ),
        "text_encoder": make_text_encoder(tokenizer, 32),
        "text_encoder_2": make_text_encoder(tokenizer, 48, CLIPTextModelWithProjection),
    })  # fmt: skip


def make_scheduler():
    """A sampler with SD's noise schedule, so that training scripts can read the schedule from its config."""
    return DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, timestep_spacing="trailing"
    )


def draw_pictures(num_pictures, seed):
    """uint8 pictures (N, 64, 64, 3) and the index (N,) of each one's caption in `small_world.CAPTIONS`."""
    rng = np.random.default_rng(seed)
    indices = np.arange(num_pictures) % len(small_world.CAPTIONS)
    looks = [small_world.random_look(rng) for _ in indices]
    pictures = [small_world.draw(small_world.CAPTIONS[i], look) for i, look in zip(indices, looks, strict=True)]
    return torch.from_numpy(np.stack(pictures)), torch.from_numpy(indices)


def crop_and_blur(pictures, seed):
    """What SDXL's micro-conditioning is about (Podell et al., 2023, section 2.2), done to pictures (N, 64, 64, 3).

    Half of the pictures are taken for a window of a larger picture, of up to 80 pixels a side. A third have passed
    through fewer pixels than they have now, down to 24 a side, and so are blurred.

    Returns:
        The pictures, and `time_ids` (N, 6), in pixels: height and width before any enlarging, top and left of the
        window, height and width of the window. `WHOLE` is what a picture as it was drawn has.
    """
    rng, changed, time_ids = np.random.default_rng(seed), [], []
    for picture in pictures.numpy():
        size = small_world.SIZE if rng.random() < 0.5 else rng.integers(small_world.SIZE, 81)
        original_size = size if rng.random() < 2 / 3 else rng.integers(24, size + 1)
        top, left = rng.integers(0, size - small_world.SIZE + 1, size=2)
        image = Image.fromarray(picture)
        for side in (original_size, size):
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        changed.append(np.asarray(image)[top : top + small_world.SIZE, left : left + small_world.SIZE])
        time_ids.append((original_size, original_size, top, left, small_world.SIZE, small_world.SIZE))
    return torch.from_numpy(np.stack(changed)), torch.tensor(time_ids)


def to_pixels(pictures):
    """uint8 (N, 64, 64, 3) to float (N, 3, 64, 64) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).contiguous() / 127.5 - 1


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made nearly orthogonal, per weight matrix (Jordan et al., 2024).

    Rare directions (here: colour, fine edges) learn as fast as the dominant ones; with Adam the autoencoder needs
    several times as many steps. A convolution's weight counts as a matrix with one row per output channel.
    """

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:  # the last layer of a text encoder, where the last but one is used
                    continue
                state = self.state[weight]
                average = state.setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"]).flatten(1)
                rows, columns = update.shape
                update = orthogonalize(update if rows <= columns else update.T)
                update = (update if rows <= columns else update.T).reshape(weight.shape)
                weight.sub_(update * group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrix):
    """A matrix (rows <= columns) with the same singular vectors and all singular values near 1."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):  # Newton-Schulz iteration, coefficients of the Muon authors
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x


def fit(name, model, loss_on, num_steps, learning_rate, state_path, save_steps, seed, on_save=None):
    """Trains `model`, matrices with Muon, the rest with Adam; returns the exponential average of its weights.

    Args:
        loss_on: callable (model, generator) -> scalar loss on a random batch. The generator is seeded anew for every
            step, so that an interrupted run goes on exactly as it would have.
        on_save: called with the averaged model after every save.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    matrices = {n: p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n}
    others = [p for n, p in model.named_parameters() if n not in matrices]
    optimizers = Muon(matrices.values(), lr=learning_rate), torch.optim.Adam(others, lr=learning_rate / 8)
    parts = {"model": model, "average": average, "muon": optimizers[0], "adam": optimizers[1]}
    first_step = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        first_step = state.pop("step")
        for key, value in state.items():
            parts[key].load_state_dict(value)

    generator, started, losses = torch.Generator(), time.time(), []
    for step in range(first_step, num_steps):
        loss = loss_on(model, generator.manual_seed(seed * num_steps + step))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))  # after a warm-up
        for optimizer, base in zip(optimizers, (learning_rate, learning_rate / 8), strict=True):
            optimizer.param_groups[0]["lr"] = base * decay
            optimizer.step()
        average.update_parameters(model)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(
                f"{name} {step + 1}/{num_steps} loss {np.mean(losses):.5f} {time.time() - started:.0f} s", flush=True
            )
            losses.clear()
        if (step + 1) % save_steps == 0 or step + 1 == num_steps:
            unfinished = state_path.with_suffix(".part")
            torch.save({"step": step + 1} | {key: part.state_dict() for key, part in parts.items()}, unfinished)
            unfinished.replace(state_path)
            if on_save is not None:
                on_save(average.module)
    return average.module.eval().requires_grad_(False)


def roughness(pixels):
    """Root mean square difference between neighbouring pixels, per 8x8 window: tells a crisp edge from a soft one."""
    dx, dy = pixels.diff(dim=-1)[..., 1:, :], pixels.diff(dim=-2)[..., 1:]
    return (F.avg_pool2d(dx.square() + dy.square(), 8, stride=4) + 1e-4).sqrt()


def autoencoder_loss(pictures, batch_size, kl_weight):
    """Loss of a reconstruction: values, colour counting double; edges, in place and in roughness; KL term.

    Where an edge cannot be placed to a fraction of a pixel, the other terms are least if it is blurred; the roughness
    keeps crisp edges crisp.
    """

    def loss_on(vae, generator):
        pixels = to_pixels(pictures[torch.randint(len(pictures), (batch_size,), generator=generator)])
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        edges = edges + 3 * (roughness(decoded) - roughness(pixels)).abs().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        chroma = error - error.mean(dim=1, keepdim=True)
        values = error.abs().mean() + 4 * error.square().mean() + 4 * chroma.square().mean()
        return values + edges + kl_weight * kl

    return loss_on


def encode_captions(model, tokens, captions, time_ids):
    """The keyword arguments that condition the U-Net on captions: rows `captions` (N,) of `tokens` (31, 8)."""
    if "text_encoder_2" not in model:
        return {"encoder_hidden_states": model["text_encoder"](tokens).last_hidden_state[captions]}
    outputs = [model[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    encoder_hidden_states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return {
        "encoder_hidden_states": encoder_hidden_states[captions],
        "added_cond_kwargs": {"text_embeds": outputs[1].text_embeds[captions], "time_ids": time_ids},
    }


def noise_prediction_loss(latents, captions, time_ids, tokens, alphas_cumprod, batch_size):
    """Mean squared error of the predicted noise; `tokens` (31, 8) are the 30 captions and, last, the empty one."""

    def loss_on(model, generator):
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        is_empty = torch.rand(batch_size, generator=generator) < 0.1
        caption = torch.where(is_empty, len(tokens) - 1, captions[rows])
        timesteps = torch.randint(len(alphas_cumprod), (batch_size,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        abar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        x_t = abar.sqrt() * latents[rows] + (1 - abar).sqrt() * noise
        cond = encode_captions(model, tokens, caption, time_ids[rows])
        return F.mse_loss(model["unet"](x_t, timesteps, **cond).sample, noise)

    return loss_on


def make_pipeline(family, vae, model, tokenizer, scheduler):
    """The pipeline of the parts, U-Net and autoencoder in half precision."""
    parts = {
        **model,  # text encoders stay as they are: tiny, and transformers would load them in half precision too
        "unet": copy.deepcopy(model["unet"]).half(),
        "vae": copy.deepcopy(vae).half(),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }
    if family == "sdxl":  # an empty caption is encoded like any other, in training as in sampling
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, force_zeros_for_empty_prompt=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def main(args, error):
    check_options(args, error)
    torch.manual_seed(args.seed)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = Path(f"{output_dir}.settings.pt")  # an interrupted run goes on with the settings that it began with
    if not settings.exists():
        torch.save(vars(args), settings)
    tokenizer, scheduler = make_tokenizer(), make_scheduler()
    pictures, captions = draw_pictures(args.num_pictures, args.seed)
    print(f"drew {len(pictures)} pictures", flush=True)

    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, subfolder="vae", dtype=torch.float32, local_files_only=True)
    else:
        vae = fit(
            "autoencoder",
            make_vae(),
            autoencoder_loss(pictures, args.vae_batch_size, args.kl_weight),
            args.vae_steps,
            args.learning_rate,
            Path(f"{output_dir}.vae.pt"),
            args.save_steps,
            args.seed,
        )
    time_ids = torch.tensor(WHOLE).expand(len(pictures), 6)
    if args.family == "sdxl":  # two variants of each picture
        pictures, captions = pictures.repeat(2, 1, 1, 1), captions.repeat(2)
        pictures, time_ids = crop_and_blur(pictures, args.seed)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_pixels(batch)).latent_dist.mode() for batch in pictures.split(64)])
    if not args.vae:
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    print(f"latents: mean {latents.mean((0, 2, 3)).tolist()} std {latents.std((0, 2, 3)).tolist()}", flush=True)

    def save_pipeline(model):
        make_pipeline(args.family, vae, model, tokenizer, scheduler).save_pretrained(output_dir)

    tokens = tokenizer([*small_world.CAPTIONS, ""], padding="max_length", return_tensors="pt").input_ids
    model = fit(
        "U-Net",
        make_model(args.family, tokenizer),
        noise_prediction_loss(
            latents * vae.config.scaling_factor,
            captions,
            time_ids,
            tokens,
            scheduler.alphas_cumprod,
            args.unet_batch_size,
        ),
        args.unet_steps,
        args.learning_rate,
        Path(f"{output_dir}.unet.pt"),
        args.save_steps,
        args.seed,
        on_save=save_pipeline,
    )
    save_pipeline(model)


if __name__ == "__main__":
    main(*args_and_error)

#!/usr/bin/env bash
# Aligns Stable Diffusion 1.5 with your preference pairs, meant for one GPU of 12 GB.
#
#     DATA=my-pairs OUTPUT=my-taste bash examples/train_12gb.sh [more options of train_inversion_dpo.py]
#
# DATA     a folder of pairs, or the name of a data set on the Hub; columns: README.md, "Your data". Required.
# OUTPUT   folder for the LoRA, checkpoints and logs (aligned-sd15)
# MODEL    a Hub id or a folder (stable-diffusion-v1-5/stable-diffusion-v1-5)
#
# Needs `pip install -r requirements.txt` (with bitsandbytes, for Adam's 8-bit states) and, for bf16, an Ampere GPU or
# later: append --mixed_precision=fp16 for an older one. Options that you append win over those below.
#
# As train_sd15.sh, also 64 pairs a step, but with what saves memory: one pair at a time, one timestep of several
# differentiated at a time, checkpointed activations, one image at a time through the VAE, 8-bit Adam. Its weights differ
# from those of train_sd15.sh only by rounding and 8-bit Adam; it takes longer. Untested on trained full-size weights,
# and on a card of 12 GB.
set -euo pipefail

set -- \
    --train_batch_size=1 \
    --gradient_accumulation_steps=64 \
    --trajectory_chunk=1 \
    --vae_encode_batch_size=1 \
    --use_8bit_adam \
    "$@"
source "$(dirname "${BASH_SOURCE[0]}")/train_sd15.sh"

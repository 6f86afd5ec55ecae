#!/usr/bin/env bash
# Aligns Stable Diffusion 1.5 with your preference pairs, meant for one GPU of 24 GB.
#
#     DATA=my-pairs OUTPUT=my-taste bash examples/train_sd15.sh [more options of train_inversion_dpo.py]
#
# DATA     a folder of pairs, or the name of a data set on the Hub; columns: README.md, "Your data". Required.
# OUTPUT   folder for the LoRA, checkpoints and logs (aligned-sd15)
# MODEL    a Hub id or a folder (stable-diffusion-v1-5/stable-diffusion-v1-5)
#
# Needs `pip install -r requirements.txt` and, for bf16, an Ampere GPU or later: append --mixed_precision=fp16 for an
# older one. Options that you append win over those below. Number of GPUs: `accelerate config`.
#
# 400 steps and a fifth of the captions emptied are DDIM-InPO's settings; beta 2000, the default, is that of both
# papers. 64 pairs a step (4 x 16; the paper has 1024) and 50 steps of warm-up are chosen for one GPU; objective,
# learning rate and rank are the script's defaults. Untested on trained full-size weights.
set -euo pipefail

if [ -z "${DATA:-}" ]; then
    echo "DATA is not set: DATA=my-pairs bash examples/${0##*/}, a folder or a Hub name" >&2
    exit 2
fi
[ -d "$DATA" ] && source=--train_data_dir || source=--dataset_name

exec accelerate launch "$(dirname "${BASH_SOURCE[0]}")/../train_inversion_dpo.py" \
    --pretrained_model_name_or_path="${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}" \
    "$source=$DATA" \
    --output_dir="${OUTPUT:-aligned-sd15}" \
    --mixed_precision=bf16 \
    --train_batch_size=4 \
    --gradient_accumulation_steps=16 \
    --gradient_checkpointing \
    --proportion_empty_prompts=0.2 \
    --max_train_steps=400 \
    --lr_scheduler=constant_with_warmup \
    --lr_warmup_steps=50 \
    --dataloader_num_workers=4 \
    "$@"

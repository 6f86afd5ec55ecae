#!/usr/bin/env bash
# From nothing to an aligned model, on any machine: install, sample preference pairs from a small Stable Diffusion
# pipeline, train a LoRA on them with the real script, and compare the model with and without it.
#
#     bash examples/quickstart.sh [area | sharpness | tone]
#
# The argument is the hidden preference to teach (area if none is given). Results go to quickstart/<preference>.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

preference=${1:-area}
case $preference in
    area | sharpness | tone) ;;
    *) echo "usage: bash examples/quickstart.sh [area | sharpness | tone]; got '$preference'" >&2; exit 2 ;;
esac
results=quickstart/$preference
if [ -e "$results" ]; then
    [ -e "$results/before_after.png" ] && remedy="look at $results/before_after.png, or remove the folder to run again" \
        || remedy="an earlier run did not finish; remove the folder to run again"
    echo "$results exists already: $remedy" >&2
    exit 2
fi

bash examples/install.sh
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
model=examples/small_world_model
started=$SECONDS

echo "1/3  Sampling pairs and labelling them: the picture with more $preference wins"
.venv/bin/python examples/make_pairs.py --model $model --preference "$preference" --output_dir "$results/pairs"

echo "2/3  Training"
.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    train_inversion_dpo.py \
    --pretrained_model_name_or_path $model \
    --train_data_dir "$results/pairs" \
    --output_dir "$results/lora" \
    --resolution 64 \
    --timesteps_per_pair 2 \
    --min_timestep 600 \
    --train_batch_size 8 \
    --max_train_steps 80 \
    --learning_rate 5e-4 \
    --beta_dpo 1000

echo "3/3  Comparing: the same held-out captions and seeds with and without the LoRA"
.venv/bin/python examples/evaluate.py --model $model --lora "$results/lora" --preference "$preference" \
    --output_dir "$results"
echo "Done in $((SECONDS - started)) seconds after installation"

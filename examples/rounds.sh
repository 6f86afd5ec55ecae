#!/usr/bin/env bash
# Rounds of preference optimisation on the small world: sample pictures from the current LoRA, make pairs of the best and
# the worst by a scorer, train on them, repeat; against one run of as many steps on the first pairs.
#
#     bash examples/rounds.sh [area | sharpness | tone] [base | init]
#
# The last argument is the reference policy of rounds 2 and 3: the base model, or the LoRA that the round begins with
# (base if none is given). Results go to rounds/<preference>-<reference>.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

preference=${1:-area} reference=${2:-base}
if [ $# -gt 2 ] || [[ ! $preference =~ ^(area|sharpness|tone)$ || ! $reference =~ ^(base|init)$ ]]; then
    echo "usage: bash examples/rounds.sh [area | sharpness | tone] [base | init]; got '$*'" >&2
    exit 2
fi
model=examples/small_world_model results=rounds/$preference-$reference
if [ -e "$results" ]; then
    echo "$results exists already; remove the folder to run again" >&2
    exit 2
fi

bash examples/install.sh
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
steps=40

sample() { # folder, seed, options: 120 pairs, the best and the worst of four pictures each
    .venv/bin/python examples/sample_pairs.py --model $model --scorer "examples/small_world.py:$preference" \
        --prompts small_world_training --num_pairs_per_prompt 6 --num_pictures_per_pair 4 --num_inference_steps 16 \
        --guidance_scale 1.5 --batch_size 64 --output_dir "$1" --seed "$2" "${@:3}"
}

train() { # pairs, folder, steps, options
    .venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
        train_inversion_dpo.py --pretrained_model_name_or_path $model --train_data_dir "$1" --output_dir "$2" \
        --objective inversion_dpo \
        --max_train_steps "$3" --resolution 64 --timesteps_per_pair 2 --min_timestep 600 --train_batch_size 8 \
        --learning_rate 5e-4 --beta_dpo 1000 "${@:4}"
}

evaluate() { # LoRA
    .venv/bin/python examples/evaluate.py --model $model --lora "$1" --preference "$preference" --output_dir "$1-judged"
}

lora=()
for round in 1 2 3; do
    echo "Round $round"
    sample "$results/pairs-$round" "$round" ${lora[0]+--lora "${lora[0]}"}
    train "$results/pairs-$round" "$results/round-$round" $steps --seed "$round" \
        ${lora[0]+--lora_init "${lora[0]}" --reference "$reference"}
    lora=("$results/round-$round")
    evaluate "${lora[0]}"
done
echo "One run of $((3 * steps)) steps on the first pairs"
train "$results/pairs-1" "$results/one-run" $((3 * steps)) --seed 1
evaluate "$results/one-run"

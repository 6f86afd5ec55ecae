#!/usr/bin/env bash
# From nothing to an aligned model, on any machine: install, sample preference pairs from a small Stable Diffusion
# pipeline, train a LoRA on them with the real script, compare the model with and without it at several scales, and
# write the LoRA so that its scale 1 is the recommended one.
#
#     bash examples/quickstart.sh [sdxl] [tone | area | sharpness]
#
# The last argument is the hidden preference to teach (tone if none is given); with sdxl, a small SDXL pipeline learns
# it by the SDXL script. Results go to quickstart/<preference> or quickstart/sdxl-<preference>.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arguments=$*
script=train_inversion_dpo.py model=examples/small_world_model prefix=
if [ "${1:-}" = sdxl ]; then
    script=train_inversion_dpo_sdxl.py model=examples/small_world_sdxl_model prefix=sdxl-
    shift
fi
preference=${1:-tone}
if [ $# -gt 1 ] || [[ ! $preference =~ ^(tone|area|sharpness)$ ]]; then
    echo "usage: bash examples/quickstart.sh [sdxl] [tone | area | sharpness]; got '$arguments'" >&2
    exit 2
fi
steps=80 min_timestep=0
[ "$preference" != area ] || steps=40 min_timestep=600 # size is decided at high noise, and learned there sooner
results=quickstart/$prefix$preference
if [ -e "$results" ]; then
    [ -e "$results/before_after.png" ] && hint="look at $results/before_after.png, or remove the folder to run again" \
        || hint="an earlier run did not finish; remove the folder to run again"
    echo "$results exists already: $hint" >&2
    exit 2
fi

bash examples/install.sh
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
started=$SECONDS

echo "1/4  Sampling pairs and labelling them: the picture with more $preference wins"
.venv/bin/python examples/make_pairs.py --model $model --preference "$preference" \
    --num_pairs 128 --num_inference_steps 10 --output_dir "$results/pairs"

echo "2/4  Training"
.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    $script \
    --pretrained_model_name_or_path $model \
    --train_data_dir "$results/pairs" \
    --output_dir "$results/lora" \
    --resolution 64 \
    --min_timestep $min_timestep \
    --train_batch_size 16 \
    --max_train_steps $steps \
    --learning_rate 5e-4 \
    --beta_dpo 500 \
    --inversion_cache_dir "$results/cache" --cached_draws 1 \
    --validation_prompts "a red circle" "a blue star" \
    --validation_guidance_scale 1.5 \
    --validation_inference_steps 10

echo "3/4  Comparing: the same held-out captions and seeds at several scales of the LoRA"
.venv/bin/python examples/evaluate.py --model $model --lora "$results/lora" --preference "$preference" \
    --num_images 64 --num_inference_steps 10 --scales 0.125 0.25 0.375 0.5 --output_dir "$results"

scale=$(.venv/bin/python -c 'import json, sys; print(json.load(open(sys.argv[1]))["recommended_scale"])' \
    "$results/evaluation.json")
echo "4/4  Writing the LoRA so that its scale 1 is the recommended one, $scale"
[ "$scale" = 0.0 ] || .venv/bin/python examples/convert_lora.py --pretrained_model_name_or_path $model \
    --lora "$results/lora" --scale "$scale" --format diffusers --output "$results/$preference.safetensors"
echo "Done in $((SECONDS - started)) seconds after installation"

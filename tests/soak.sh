#!/usr/bin/env bash
# Kills real runs at random moments and compares what comes of them, bit for bit, with runs that nobody disturbed; then
# takes 5,000 small steps and prints how memory grows. Not part of tests/run.sh; takes about 15 minutes on two cores.
#
#     bash tests/soak.sh [--kills 50] [--steps 5000]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/install.sh tests/requirements.txt
export TRANSFORMERS_VERBOSITY=error
exec .venv/bin/python tests/soak.py "$@"

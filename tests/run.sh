#!/usr/bin/env bash
# Makes .venv, installs, checks the style and runs the tests, a file at a time in each of two processes.
# Options go to pytest: bash tests/run.sh -k inversion; -n 0 runs them in one process, as --pdb and -s need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/install.sh tests/requirements.txt
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"

#!/usr/bin/env bash
# Makes the virtual environment .venv in the repository and installs the tested versions (constraints.txt) into it.
#
#     bash examples/install.sh [requirements.txt ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usable='import sys, pip; sys.exit(sys.version_info < (3, 11))'
if ! .venv/bin/python -c "$usable" 2>/dev/null; then
    if [ -e .venv ]; then
        echo ".venv exists, but has no pip or a Python older than 3.11; remove it and run this again" >&2
        exit 2
    fi
    for python in python3 python3.13 python3.12 python3.11 ""; do
        [ -n "$python" ] || { echo "Python 3.11 or newer with ensurepip is needed and was not found" >&2; exit 2; }
        "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
echo "Installing $(echo requirements.txt "$@"): on a new machine a download of some GB, 2 with torch for CPUs, into .venv"
requirements=(-r requirements.txt)
for file in "$@"; do requirements+=(-r "$file"); done
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${requirements[@]}" -c constraints.txt

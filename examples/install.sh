#!/usr/bin/env bash
# Makes the virtual environment .venv in the repository and installs the tested versions (constraints.txt) into it.
#
#     bash examples/install.sh [requirements.txt ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    for python in python3 python3.13 python3.12 python3.11 ""; do
        [ -n "$python" ] || { echo "Python 3.11 or newer is needed and was not found" >&2; exit 2; }
        "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
echo "Installing $(echo requirements.txt "$@")"
requirements=(-r requirements.txt)
for file in "$@"; do requirements+=(-r "$file"); done
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${requirements[@]}" -c constraints.txt

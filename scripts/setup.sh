#!/usr/bin/env bash
# Make .venv with the given requirements file (default: requirements.txt); again only when that file has changed.
# Usage: source scripts/setup.sh [requirements-test.txt]      Another Python: PYTHON=python3.12 source scripts/setup.sh
_top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_wanted=${1:-requirements.txt}
_stamp="$_top/.venv/.installed-$_wanted"
if [ ! -x "$_top/.venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$_top/.venv" || return 1
fi
if ! cat "$_top/requirements.txt" "$_top/$_wanted" | cmp -s - "$_stamp"; then
    echo "installing $_wanted into .venv (a minute or two, 6 GB)"
    # --no-compile: half a minute less, for of all those modules few are ever imported
    "$_top/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar on --no-compile \
        -r "$_top/$_wanted" || return 1
    cat "$_top/requirements.txt" "$_top/$_wanted" > "$_stamp"
fi
unset PYTHONDONTWRITEBYTECODE  # where it is set, each process would compile again what it imports
export PATH="$_top/.venv/bin:$PATH" VIRTUAL_ENV="$_top/.venv"

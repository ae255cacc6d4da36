#!/usr/bin/env bash
# The whole check: environment, lint, house rules, tests. Arguments go to pytest: bash scripts/test.sh tests/unit -k queue
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements-test.txt
ruff check .
ruff format --check .
mypy
python scripts/dev/check_layout.py
# one thread a process: spinning threads of several processes on few cores cost more than they give
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE
python -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist worksteal "${@:--q}"

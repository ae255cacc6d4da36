#!/usr/bin/env bash
# The whole check: environment, lint, house rules, everyday tests. Arguments go to pytest instead:
#   bash scripts/test.sh tests/unit -k queue     these tests alone
#   bash scripts/test.sh --slow                  every slow test, by name; no lint
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements-test.txt
# one thread a process: spinning threads of several processes on few cores cost more than they give
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE
several=(--numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder)
tests() {
    python -m pytest "$@" && return
    [ -n "${ONCE_MORE:-}" ] || return 1
    # Tests of processes, clocks and sockets can fail where others slow the machine down.
    echo "ONCE MORE, one after another: the tests that failed"
    NOT_AFTER=inf python -m pytest "$@" --numprocesses 0 --last-failed --last-failed-no-failures none
}
log=$(mktemp)
trap 'rm "$log"' EXIT
failed=0
if [ "${1:-}" = --slow ]; then
    shift
    slurm=tests/contract/test_slurm.py  # a cluster of its own, which mostly waits: beside the others
    tests -v -m slow -o cache_dir=.pytest_cache/slurm "$slurm" "$@" > "$log" 2>&1 &
    beside=$!
    # the files that have slow tests: importing all takes as long as many of them
    [ $# -gt 0 ] || set -- $(grep -rl --include="test_*.py" "mark\.slow" tests | grep -vx "$slurm" | sort)
    tests "${several[@]}" -v -m slow --ignore "$slurm" "$@" || failed=1
else
    ruff check .
    ruff format --check .
    python scripts/dev/check_layout.py
    mypy > "$log" 2>&1 &  # it takes a minute of one core
    beside=$!
    tests "${several[@]}" "${@:--q}" || failed=1
fi
wait $beside || failed=1
cat "$log"
exit $failed

#!/usr/bin/env bash
# Runs every check, the cheap ones first, and stops at the first that fails. CI runs this and nothing else.
# Arguments go to the last stage: "tools/test.sh -k axes"; "tools/test.sh -n 0" runs it in one process.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup.sh

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The models are tiny: more threads cost more than they give, and two processes share the machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

stage() { # stage NAME COMMAND...
    local name="$1" began=$SECONDS code=0
    shift
    printf '\n=== %s: %s\n' "$name" "$*"
    "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        printf '=== %s failed after %d s\n' "$name" "$((SECONDS - began))"
        exit "$code"
    fi
    printf '=== %s passed in %d s\n' "$name" "$((SECONDS - began))"
}

stage format ruff format --check .
stage lint ruff check .
stage types mypy
stage imports lint-imports
stage doctests python -m pytest -q --doctest-modules graphprune README.md
printf '\n=== tests\n'
# Each file in one process, since its fixtures are kept for the tests of that file.
exec python -m pytest -m "not slow and not network and not browser" -n 2 --dist loadfile "$@"

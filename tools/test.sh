#!/usr/bin/env bash
# Runs every check, the cheap ones first, and stops at the first that fails. CI runs this and nothing else.
# Arguments go to the last stage: "tools/test.sh -k axes"; "tools/test.sh -n 0" runs it in one process.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup.sh

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The models are tiny: more threads cost more than they give, and two processes share the machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

summary=""
spent="$(mktemp)"
trap 'printf "\n%s" "$summary"; rm -f "$spent"' EXIT

seconds() { # SINCE: seconds of processor time that all that has ended took, less SINCE
    awk -v since="$1" 'NR == 2 { split($0, t, /[ms ]+/); printf "%.0f", t[1] * 60 + t[2] + t[3] * 60 + t[4] - since }' "$spent"
}

stage() { # stage NAME COMMAND...
    local name="$1" began=$SECONDS code=0 before
    shift
    times >"$spent"
    before="$(seconds 0)"
    printf '\n=== %s: %s\n' "$name" "$*"
    "$@" || code=$?
    times >"$spent" # not in a subshell, which has no children
    summary+="$(printf '%6d s of processor time (%d s altogether): %s' "$(seconds "$before")" "$(seconds 0)" "$name")"$'\n'
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
# Each file in one process, since its fixtures are kept for the tests of that file.
stage tests python -m pytest -m "not slow and not network and not browser" -n 2 --dist loadfile "$@"

#!/usr/bin/env bash
# Sets graphprune up, then prunes something for you to see. Arguments go to tools/demo.py.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup.sh
exec python tools/demo.py "$@"

# Makes .venv at the top of the checkout with everything that graphprune and its tests need, and activates it.
# Source it (". tools/setup.sh") or run it. A second run installs nothing, until pyproject.toml or the pins change.
#
#   GRAPHPRUNE_PYTHON   an interpreter that has everything already: it is used as it is and nothing is installed

_graphprune_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

_graphprune_find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "graphprune needs Python 3.11 or newer, with venv" >&2
    return 1
}

_graphprune_fingerprint() { # of what was asked for, not of what was installed
    "$1" - "$_graphprune_root" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
parts = [str(root), sys.version]
parts += [(root / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "tools/constraints.txt")]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON
}

_graphprune_setup() {
    local root="$_graphprune_root" venv python wanted
    if [ -n "${GRAPHPRUNE_PYTHON:-}" ]; then
        PATH="$(cd "$(dirname "$GRAPHPRUNE_PYTHON")" && pwd):$PATH"
        export PATH
        return 0
    fi
    venv="$root/.venv"
    # A virtual environment that was copied or whose interpreter is gone does not run from its new place.
    if [ "$("$venv/bin/python" -c 'import sys; print(sys.prefix)' 2>/dev/null)" != "$venv" ]; then
        python="$(_graphprune_find_python)" || return 1
        echo "making $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" || return 1
    fi
    wanted="$(_graphprune_fingerprint "$venv/bin/python")" || return 1
    if [ "$(cat "$venv/graphprune.stamp" 2>/dev/null)" != "$wanted" ]; then
        rm -f "$venv/graphprune.stamp"
        # torch alone first: the pin decides which build is taken before anything else can ask for another.
        # Python compiles what is imported; pip would compile all of torch, for longer than the rest takes.
        "$venv/bin/python" -m pip install --no-compile -c "$root/tools/constraints.txt" torch==2.13.0 || return 1
        "$venv/bin/python" -m pip install --no-compile -c "$root/tools/constraints.txt" -e "$root[ort-gpu,dev]" || return 1
        echo "$wanted" > "$venv/graphprune.stamp"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}

_graphprune_setup || { return 1 2>/dev/null || exit 1; }

# shellcheck shell=bash
# Sourced by the other scripts, which then call use_python or make_python. Changes to the project's folder.
unset CDPATH # with it, `cd bin/..` may go elsewhere
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# Idle threads sleep instead of spinning. With two processes on two cores this was three times faster; with one process
# decoding with small models took twice as long. If the machine is yours alone, `export OMP_WAIT_POLICY=ACTIVE`.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

# Lengths differ from pass to pass, which leaves gaps in a GPU's memory unless its segments can grow.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# Set PYTHON to the first of: $PYTHON as it is; .venv and then the active environment, if their packages have the
# versions of requirements.txt (with the argument `dev` also those of the extra).
find_python() {
    if [ -n "${PYTHON:-}" ]; then return; fi
    for PYTHON in .venv/bin/python python python3; do
        if "$PYTHON" -m ram.environment "$@" >/dev/null 2>&1; then return; fi
    done
    PYTHON=
    return 1
}

# Set PYTHON, or exit with a line that says what to do.
use_python() {
    if find_python; then return; fi
    echo "error: neither .venv nor the active python has the packages of requirements.txt: run 'bash bin/demo.sh'," \
        "which makes .venv, or set PYTHON=/path/to/python" >&2
    exit 2
}

is_new_enough() { "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Set PYTHON; if there is none, make .venv, or complete it. With the argument `dev`, with the tools of the checks.
make_python() {
    if find_python "$@"; then return; fi
    if ! is_new_enough .venv/bin/python; then
        local base=
        for base in python3.14 python3.13 python3.12 python3.11 python3 python ''; do
            if [ -n "$base" ] && is_new_enough "$base"; then break; fi
        done
        if [ -z "$base" ]; then
            echo "error: no Python 3.11 or newer that has venv: install one (Debian: apt-get install python3-venv)," \
                "or set PYTHON=/path/to/python" >&2
            exit 2
        fi
        "$base" -m venv --clear .venv
    fi
    PYTHON=.venv/bin/python
    echo "installing requirements.txt into .venv, which takes a minute or more"
    local install=(.venv/bin/python -m pip install -qq --disable-pip-version-check)
    # torch and its CUDA packages differ by machine; everything else has one version and a hash. A package without a
    # wheel is built apart from .venv, by the versions of setuptools and its helpers that it asks for.
    "${install[@]}" "$(grep '^torch==' requirements.txt)"
    "${install[@]}" --use-pep517 --require-hashes --no-deps -r requirements.lock
    if [ "${1:-}" = dev ]; then "${install[@]}" -e '.[dev]'; fi
}

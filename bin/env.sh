# shellcheck shell=bash
# Sourced by the other scripts. Changes to the project's folder and picks a Python, that of the active environment first.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# Idle threads sleep instead of spinning. With two processes on two cores this was three times faster; with one process
# decoding with small models took twice as long. If the machine is yours alone, `export OMP_WAIT_POLICY=ACTIVE`.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi

# Create .venv from requirements.txt and requirements.lock, unless .venv was made from the same files.
make_venv() {
    PYTHON=.venv/bin/python
    if [ -x .venv/bin/python ] && cat requirements.txt requirements.lock | cmp -s - .venv/requirements.installed; then return; fi
    echo "installing requirements.txt into .venv (1.6 GB, a minute or two)"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    # torch and its CUDA packages differ by machine; everything else has one version and a hash.
    .venv/bin/python -m pip install -qq --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
    .venv/bin/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
    cat requirements.txt requirements.lock > .venv/requirements.installed
}

# Sourced by the other scripts: goes to the project's folder and picks a Python, the active environment's first.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Waiting threads sleep instead of spinning. Two processes on the same two cores ran three times faster so; alone,
# decoding with small models took twice as long: `export OMP_WAIT_POLICY=ACTIVE` where the machine is yours.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi

# Makes .venv with requirements.txt unless it is there, complete and newer.
make_venv() {
    PYTHON=.venv/bin/python
    if [ -x .venv/bin/python ] && cmp -s requirements.txt .venv/requirements.installed; then return; fi
    echo "installing requirements.txt into .venv (1.6 GB, a minute or two)"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python -m pip install -qq --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.installed
}

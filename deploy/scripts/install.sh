#!/usr/bin/env bash
# Installs torch for CPU, the pinned closure and this tree's command `tandem` into a virtual environment,
# which it makes if need be.
#   install.sh VENV PYTHON TORCH_INDEX
set -euo pipefail
venv=$1 python=$2 torch_index=$3
torch='torch==2.13.0+cpu'
root="$(dirname "$0")/../.."
requirements="$root/deploy/requirements/cpu.txt"

fail() { echo "$*" >&2; exit 1; }

pip_install() {  # -qq: errors only
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-deps "$@"
}

command -v "$python" >/dev/null ||
    fail "There is no $python on this machine: install Python 3.11 or newer, or name yours with PYTHON=..."
"$python" "$(dirname "$0")/check_host.py"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv --clear "$venv"
    else  # Debian keeps it in python3-venv; a pip of its own does as well
        "$python" -m venv --clear --without-pip "$venv"
        "$python" -m pip --python "$venv/bin/python" install -qq pip ||
            fail "$python has neither ensurepip nor pip: install one, on Debian with \`apt-get install python3-venv\`."
    fi
fi

echo "Installing $torch and $(grep -c '==' "$requirements") pinned packages into $venv (some minutes) ..."
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
brief=(--retries 1 --timeout 30)  # a source that does not answer must not hold up the next one
if ! pip_install "${brief[@]}" "$torch" 2>"$errors" &&
    ! pip_install "${brief[@]}" --index-url "$torch_index" "$torch" 2>>"$errors"; then
    cat "$errors" >&2
    fail "$torch is neither in pip's configured sources nor to be had from $torch_index:" \
        "name an index that has it with TORCH_INDEX=..., or put its wheel in a folder named by PIP_FIND_LINKS."
fi
pip_install --requirement "$requirements" ||
    fail "The pinned packages of deploy/requirements/cpu.txt could not be installed: see pip's message above."
# Built with the pinned setuptools, so that nothing more is fetched; the tree stays where it is.
pip_install --no-index --no-build-isolation --editable "$root" ||
    fail "The command tandem could not be installed from $root: see pip's message above."

#!/usr/bin/env bash
# Installs torch for CPU, the pinned packages and this tree's command `tandem` into a virtual environment,
# which it creates if necessary.
#   install.sh VENV PYTHON TORCH_INDEX
set -euo pipefail
venv=$1 python=$2 torch_index=$3
torch='torch==2.13.0+cpu'
root="$(dirname "$0")/../.."
requirements="$root/deploy/requirements/cpu.txt"

fail() { echo "$*" >&2; exit 1; }

pip_install() {  # -qq prints only errors
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-deps "$@"
}

command -v "$python" >/dev/null ||
    fail "$python is not installed: install Python 3.11 or newer, or pass your Python as PYTHON=..."
"$python" "$(dirname "$0")/check_host.py"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv --clear "$venv"
    else  # Debian ships ensurepip in python3-venv; the pip of $python can replace it
        "$python" -m venv --clear --without-pip "$venv"
        "$python" -m pip --python "$venv/bin/python" install -qq pip ||
            fail "$python has neither ensurepip nor pip: install one, on Debian with \`apt-get install python3-venv\`."
    fi
fi

echo "Installing $torch and $(grep -c '==' "$requirements") pinned packages into $venv (some minutes) ..."
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
brief=(--retries 1 --timeout 30)  # an unresponsive source must not delay the next one
if ! pip_install "${brief[@]}" "$torch" 2>"$errors" &&
    ! pip_install "${brief[@]}" --index-url "$torch_index" "$torch" 2>>"$errors"; then
    cat "$errors" >&2
    fail "$torch is available neither from pip's configured sources nor from $torch_index:" \
        "pass an index that has it as TORCH_INDEX=..., or set PIP_FIND_LINKS to a folder with its wheel."
fi
pip_install --requirement "$requirements" ||
    fail "The pinned packages of deploy/requirements/cpu.txt could not be installed: see pip's message above."
# An editable install, built offline with the pinned setuptools.
pip_install --no-index --no-build-isolation --editable "$root" ||
    fail "The command tandem could not be installed from $root: see pip's message above."

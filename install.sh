#!/usr/bin/env bash
# Makes .venv and installs a requirements file into it:  ./install.sh requirements.txt
# PYTHON chooses the interpreter (default python3). alfworld's planner is built from source; if that fails, only the
# alfworld wheel is installed, which is enough for everything but the TextWorld reference engine.
set -euo pipefail
cd "$(dirname "$0")"

requirements=$1
python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
    echo "install.sh: cannot run '$python'; expected Python 3.11 or 3.12. Choose one: make PYTHON=python3.12 ..." >&2
    exit 1
}
case $version in
    3.11 | 3.12) ;;
    *)
        echo "install.sh: '$python' is Python $version, expected 3.11 or 3.12. Choose one: make PYTHON=python3.12 ..." >&2
        exit 1
        ;;
esac

if [ ! -x .venv/bin/pip ]; then
    "$python" -m venv --clear .venv || {
        echo "install.sh: cannot create a virtual environment; on Debian: apt install python$version-venv" >&2
        exit 1
    }
fi
export PATH="$PWD/.venv/bin:$PATH" # the planner's build calls `python`
pip() { python -m pip --disable-pip-version-check "$@"; }

echo "installing $requirements into .venv (takes minutes the first time)"
missing=$(for tool in cmake make g++; do command -v "$tool" > /dev/null || printf '%s ' "$tool"; done)
if [ -z "$missing" ] && pip install --quiet --requirement "$requirements"; then
    exit 0
fi

planner='^(alfworld|textworld|fast_downward_textworld)=='
if ! grep -qE "$planner" "$requirements"; then
    pip install --quiet --requirement "$requirements"
    exit 0
fi
echo "installing without TextWorld, the reference engine: ${missing:+no }${missing:-its build failed}"
echo "  (to add it: apt install cmake make g++, rm -r .venv and run make again; everything else works without it)"
others=$(mktemp)
trap 'rm -f "$others"' EXIT
grep -vE "$planner" "$requirements" > "$others"
pip install --quiet --requirement "$others"
pip install --quiet --no-deps "$(grep -oE '^alfworld==[0-9.]+' "$requirements")"

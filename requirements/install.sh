#!/bin/sh
# Make an environment ready for `make`: find a Python, create the folder, install a lock and the project.
#
#   sh requirements/install.sh serve          .venv: what `make demo` and `make up` need
#   sh requirements/install.sh dev            .venv: the same and the tools of `make test` and `make check`
#   VENV=.venv-torch sh requirements/install.sh dev torch         the reference library besides
#   VENV=.venv-gpu sh requirements/install.sh dev gpu             and onnxruntime for CUDA in place of the CPU's
#   VENV=.venv-torch sh requirements/install.sh starter           and what the starter models are made with
#   VENV=.venv-triton sh requirements/install.sh triton           a real Triton server, without the project
#   VENV=.venv-deploy sh requirements/install.sh deploy           what checks and loads deploy/, without the project
#
# Needs sh, Python >= 3.11 with its venv module, and a package index that pip can reach (your own pip
# configuration counts). Everything comes as wheels with pinned hashes: no compiler. Each thing that can be
# missing ends in one sentence that says what to do.
set -eu

lock=$1
extra=${2:-}
venv=${VENV:-.venv}
cd "$(dirname "$0")/.."
here=$(pwd -P)

fail() {
    printf 'embedmesh: %s\n' "$1" >&2
    exit 1
}

# Running it, not only finding it: version managers put names on PATH that lead nowhere.
new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

python=
if [ -n "${PYTHON:-}" ]; then
    new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer."
    python=$PYTHON
else
    for candidate in python3.13 python3.12 python3.11 python3; do
        if new_enough "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || fail "Python 3.11 or newer is needed and none is on PATH: install one (Debian 12, Ubuntu 24.04 or newer: apt install python3 python3-venv), or name yours: make PYTHON=/path/to/python3 ..."
fi

if [ "$(cat "$venv/home" 2>/dev/null)" != "$here" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    # An environment is bound to its folder and its Python: begin anew when either is gone.
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot create virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)."
    # Environment 360 MiB (dev 740), model 90, its archive and conversion as much again, pip's cache 200 (dev 260).
    need_mib=1000
    [ "$lock" != dev ] || need_mib=1250
    [ "$extra" != torch ] || need_mib=7000
    [ "$extra" != gpu ] || need_mib=14000
    free_mib=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free_mib" -ge "$need_mib" ] ||
        fail "only $free_mib MiB are free on the disk of $here and about $need_mib are needed: make room and try again."
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python could not create $here/$venv (its reason is above)."
    printf '%s\n' "$here" >"$venv/home"
fi

pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --quiet "$@" ||
        fail "pip could not install what is locked in requirements/ (its reason is above). Is a package index reachable? Behind a mirror or proxy set PIP_INDEX_URL or HTTPS_PROXY; if the disk is full make room; then try again."
}

printf 'Installing %s locked packages into %s (the first time this takes about a minute) ...\n' \
    "$(grep -c '==' "requirements/$lock.txt")" "$venv" >&2
# Without dependencies: the lock names them all, and the resolver of older pips trips over extras as soon as
# something newer than the lock is out.
wheels='--only-binary :all:'
[ "$lock" != starter ] || wheels=--no-build-isolation # pyvips has no wheel
# shellcheck disable=SC2086
pip_install --require-hashes --no-deps $wheels -r "requirements/$lock.txt"
if [ "$lock" = dev ]; then
    pip_install --require-hashes --no-build-isolation --no-deps -r requirements/sdist.txt
fi
if [ "$extra" = gpu ]; then
    # onnxruntime and onnxruntime-gpu write the same files: the one goes before the other comes.
    "$venv/bin/python" -m pip uninstall --disable-pip-version-check --quiet --yes onnxruntime
    pip_install --require-hashes --no-deps --only-binary :all: -r requirements/gpu.txt
fi
if [ "$extra" = torch ] || [ "$extra" = gpu ]; then
    pip_install torch==2.13.0 'transformers>=5.23,<5.25' 'sentence-transformers>=6.2,<6.3'
fi
if [ "$lock" != triton ] && [ "$lock" != deploy ]; then
    pip_install --no-build-isolation --no-deps --no-index --editable .
fi

#!/bin/sh
# Put what one role needs into an environment of its own. The Dockerfile runs this, and so can you.
#
#   sh deploy/docker/install.sh gateway|encoder|gpu FOLDER
#
# Needs Python >= 3.11 with venv, and a package index that pip can reach. Everything is locked, with hashes, and comes as wheels,
# so no compiler. pip itself stays outside of FOLDER, whose modules are compiled: its file system may be read-only.
set -eu
role=$1
folder=$2
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/pip"
python3 -m venv --without-pip "$folder"

"$work/pip/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps \
    --require-hashes --only-binary :all: -r requirements/build.txt
"$work/pip/bin/python" -m hatchling build --target wheel --directory "$work/wheel"
"$work/pip/bin/python" -m pip --python "$folder/bin/python" install --quiet --disable-pip-version-check --no-cache-dir \
    --no-deps --require-hashes --only-binary :all: --no-compile -r "requirements/$role.txt"
"$work/pip/bin/python" -m pip --python "$folder/bin/python" install --quiet --disable-pip-version-check --no-cache-dir \
    --no-deps --no-index --no-compile "$work"/wheel/*.whl

# Tests of packages are never run here.
find "$folder"/lib*/python3*/site-packages -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +
"$folder/bin/python" -m compileall -q -j 0 "$folder"/lib*/python3*/site-packages

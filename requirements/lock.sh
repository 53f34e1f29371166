#!/bin/sh
# Make the locks anew from pyproject.toml: one set of versions that live together, for Python 3.11 to 3.13.
#
#   sh requirements/lock.sh UV
#
# serve.txt   `make demo`, `make up`                  dev.txt     serve + `make bench` + tests + checks
# client.txt  `import embedmesh` and nothing else     sdist.txt   the one tool without a wheel, installed last
# starter.txt `make starter`, beside dev
# gateway.txt, encoder.txt, gpu.txt   what the images of deploy/docker/ hold; build.txt builds the wheel for them
# deploy.txt  what checks and loads deploy/, in an environment of its own
# triton.txt  a real Triton server, in an environment of its own (Python 3.11 or 3.12, x86-64)
# lowest.txt  the same with the oldest grpcio and protobuf that we promise to work with
set -eu
uv=$1
cd "$(dirname "$0")/.."

compile() {
    out=requirements/$1
    shift
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url \
        --no-emit-find-links --output-file "$out" "$@"
}

compile dev.txt --upgrade --only-binary :all: --extra cli --extra bench --extra tracing --group dev pyproject.toml
compile serve.txt --upgrade --only-binary :all: --extra cli --group build --constraints requirements/dev.txt pyproject.toml
compile client.txt --upgrade --only-binary :all: --constraints requirements/dev.txt pyproject.toml
compile gateway.txt --upgrade --only-binary :all: --extra gateway --extra tracing --constraints requirements/dev.txt pyproject.toml
compile encoder.txt --upgrade --only-binary :all: --extra encoder --extra openvino --extra triton --extra tracing \
    --constraints requirements/dev.txt pyproject.toml
compile gpu.txt --upgrade --only-binary :all: --extra gpu --extra triton --extra tracing \
    --constraints requirements/dev.txt pyproject.toml
compile build.txt --upgrade --only-binary :all: --constraints requirements/dev.txt --group pyproject.toml:build
compile deploy.txt --upgrade --only-binary :all: --group pyproject.toml:deploy
compile starter.txt --upgrade --constraints requirements/dev.txt --group pyproject.toml:starter
# Its numpy has no wheels for Python 3.13, nor the server for another platform.
"$uv" pip compile --quiet --upgrade --only-binary :all: --python-version 3.11 --python-platform x86_64-manylinux_2_35 \
    --generate-hashes --no-header --no-emit-index-url --no-emit-find-links --output-file requirements/triton.txt \
    --group pyproject.toml:triton-server
compile sdist.txt --upgrade --group pyproject.toml:sdist
printf 'numpy>=2.1\n' >requirements/.numpy # older ones have no wheels for Python 3.13
compile lowest.txt --upgrade --only-binary :all: --resolution lowest-direct --constraints requirements/.numpy pyproject.toml
rm requirements/.numpy

#!/bin/sh
# Put the starter models into FOLDER/text, FOLDER/image and FOLDER/audio, for the images of the encoders.
#
#   sh deploy/docker/models.sh FOLDER
set -eu
folder=$1
cd "$(dirname "$0")/../.."
sh requirements/install.sh serve
mkdir -p "$folder"
EMBEDMESH_CACHE_DIR="$folder/.cache" .venv/bin/python -c '
import shutil, sys
from embedmesh_cli.starter import TOWERS, ensure_starter, starter_tower
shutil.copytree(ensure_starter(print), f"{sys.argv[1]}/text")
for modality in TOWERS:
    shutil.copytree(starter_tower(modality), f"{sys.argv[1]}/{modality}")
' "$folder"
rm -rf "$folder/.cache"

"""What `helm test` runs: every modality that was installed has a ready model, and a text becomes a vector."""

import os
import sys
import time
from pathlib import Path

import embedmesh

address, *modalities = sys.argv[1:]
given = os.environ
tls = embedmesh.Tls(given["TLS_CA"], given.get("TLS_CERT"), given.get("TLS_KEY")) if "TLS_CA" in given else False
token = Path(given["TOKEN_FILE"]).read_text(encoding="utf-8").strip() if "TOKEN_FILE" in given else None
give_up = time.monotonic() + 300
# Keys without TLS are for clusters that encrypt by other means.
with embedmesh.Client(address, tls=tls, token=token, allow_insecure_token=True) as client:
    while True:
        try:
            ready = {model.modality: model.name for model in client.list_models(timeout=10) if model.ready}
        except embedmesh.EmbedMeshError as error:
            ready, problem = {}, str(error)
        else:
            problem = f"no ready model for {', '.join(sorted(set(modalities) - set(ready)))}"
        if set(modalities) <= set(ready):
            break
        if time.monotonic() > give_up:
            sys.exit(f"{address}: {problem}. Look at the encoders' pods and logs.")
        print(f"waiting: {problem}", flush=True)
        time.sleep(2)
    print("ready:", ", ".join(f"{modality} {name}" for modality, name in sorted(ready.items())))
    if "text" in modalities:
        answer = client.embed(["Is anybody there?"], timeout=30)
        print(f"a text became {answer.vectors.shape[1]} numbers, made by {answer.models[0].name}")

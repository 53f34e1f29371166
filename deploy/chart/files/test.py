"""What `helm test` runs: every modality that was installed has a ready model, and a text becomes a vector."""

import sys
import time

import embedmesh

address, *modalities = sys.argv[1:]
give_up = time.monotonic() + 300
with embedmesh.Client(address) as client:
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

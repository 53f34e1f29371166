"""Write what follows from other files: values.schema.json and the table of values in the chart's README.

    python deploy/generate.py             # write
    python deploy/generate.py --check     # end with status 1 when something is out of date

Types and defaults come from values.yaml, descriptions from its comments that begin with `--`, and the flags under
`settings` from the settings of the processes themselves, so that the chart knows no flag that they do not.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from embedmesh_encoder.settings import AudioSettings, ImageSettings, TextSettings
from embedmesh_gateway.settings import GatewaySettings
from embedmesh_server.settings import NodeSettings

CHART: Final = Path(__file__).resolve().parent / "chart"
BEGIN, END = "<!-- values: made by deploy/generate.py -->\n", "<!-- end -->\n"

# The chart gives these itself: addresses, models, and what it learns from other values.
_OWN: Final = {
    *("host", "port", "http_port", "ready_file", "model", "models"),
    *("tls_cert", "tls_key", "tls_client_ca", "tracing", "trace_ratio"),
}
_OWN_OF_GATEWAY: Final = {
    *("text_target", "image_target", "audio_target", "redis_url", "keys_file"),
    *("upstream_tls_ca", "upstream_tls_cert", "upstream_tls_key"),
}
# Kubernetes checks what is in these.
_FREE: Final = {
    *("annotations", "podAnnotations", "podLabels", "labels", "nodeSelector", "affinity", "behavior", "resources"),
    *("env", "tolerations", "clients", "metrics", "pullSecrets", "spreadOver", "paths", "folders", "command", "args"),
}
_STRINGS: Final = {"pullSecrets", "spreadOver", "paths", "folders", "command", "args"}
_NAME: Final = "^[a-z]([-a-z0-9]{0,28}[a-z0-9])?$"
_QUANTITY: Final = r"^([0-9.]+([EPTGMk]i?|m)?)?$"
# By name of the key, wherever it stands.
_NARROWED: Final[dict[str, dict[str, Any]]] = {
    "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "type": {"enum": ["ClusterIP", "LoadBalancer", "NodePort"]},
    "kind": {"enum": ["none", "hpa", "keda"]},
    "from": {"enum": ["image", "pvc", "init"]},
    "modality": {"enum": ["", "text", "image", "audio"]},
    "digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "registry": {"pattern": "^([^/].*[^/])?$"},
    "mountPath": {"pattern": "^/.*[^/]$"},
    "sizeLimit": {"pattern": _QUANTITY},
    "maxmemory": {"pattern": "^[0-9]+([kmg]b?)?$"},
    "endpoint": {"pattern": "^(https?://.+)?$"},
    "ratio": {"minimum": 0, "maximum": 1},
    "prometheusAddress": {"pattern": "^(https?://.+)?$"},
    "interval": {"pattern": "^[0-9]+(ms|s|m)$"},
    "latencyTargetSeconds": {"type": "number", "exclusiveMinimum": 0},
    "runbookBase": {"pattern": "^(https?://.+/)?$"},
    "port": {"minimum": 1, "maximum": 65535},
    "replicas": {"minimum": 0},
    "minReplicas": {"minimum": 1},
    "maxReplicas": {"minimum": 1},
    "queueCostUnits": {"minimum": 1},
    "requestsInFlight": {"minimum": 1},
    "maxUnavailable": {"minimum": 0},
    "maxSurge": {"minimum": 0},
    "count": {"minimum": 0},
    "startupSeconds": {"minimum": 5},
}


def main() -> int:
    """Do it; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when something is out of date")
    check = parser.parse_args().check
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    readme = CHART / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    wanted = {
        CHART / "values.schema.json": json.dumps(schema(yaml.safe_load(text)), indent=2) + "\n",
        readme: before + BEGIN + table(text) + END + rest.partition(END)[2],
    }
    stale = [path for path, new in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != new]
    for path in stale:
        if check:
            sys.stderr.write(f"{path} is out of date: run `python deploy/generate.py` and commit what it writes.\n")
        else:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if check and stale else 0


def settings(*kinds: type[NodeSettings], without: set[str]) -> dict[str, Any]:
    """JSON schema of the flags that any of `kinds` takes."""
    properties: dict[str, Any] = {}
    for kind in kinds:
        for name, found in kind.model_json_schema()["properties"].items():
            if name not in without:
                # A path, or none: absent is none here.
                narrowed = next(iter(found.pop("anyOf", ())), {}) | found
                properties[name] = {
                    key: narrowed[key]
                    for key in ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "description")
                    if key in narrowed
                }
    return {"type": "object", "additionalProperties": False, "properties": dict(sorted(properties.items()))}


def schema(values: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of the chart's values."""
    result = _object(values)
    properties = result["properties"]
    encoder = properties["encoderDefaults"]
    encoder["properties"]["settings"] = {"$ref": "#/$defs/encoderSettings"}
    properties["gateway"]["properties"]["settings"] = {"$ref": "#/$defs/gatewaySettings"}
    properties["encoderDefaults"] = {"$ref": "#/$defs/encoder"}
    properties["encoders"] = {
        "type": "object",
        "additionalProperties": False,
        "patternProperties": {_NAME: {"$ref": "#/$defs/encoder"}},
    }
    # Helm hands these to every chart.
    properties["global"] = {"type": "object"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the embedmesh chart (made by deploy/generate.py)",
        **result,
        "$defs": {
            "encoder": encoder,
            "gatewaySettings": settings(GatewaySettings, without=_OWN | _OWN_OF_GATEWAY),
            "encoderSettings": settings(TextSettings, ImageSettings, AudioSettings, without=_OWN),
        },
    }


def _object(values: dict[str, Any]) -> dict[str, Any]:
    properties = {key: _value(key, value) for key, value in values.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _value(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        found: dict[str, Any] = {"type": "array", "items": {"type": "string" if key in _STRINGS else "object"}}
    elif isinstance(value, dict):
        found = {"type": "object"} if key in _FREE else _object(value)
    else:
        found = {"type": {str: "string", bool: "boolean", int: "integer", float: "number"}[type(value)]}
    # `metrics` and `clients` are lists, `type` and the like plain values: a name narrows plain values only.
    return found if isinstance(value, dict) else found | _NARROWED.get(key, {})


def table(text: str) -> str:
    """The table of values, from values.yaml with its comments."""
    values = yaml.safe_load(text)
    path: list[tuple[int, str]] = []
    about: list[str] = []
    rows = ["| value | default | |", "| --- | --- | --- |"]
    for line in text.splitlines():
        if comment := re.fullmatch(r"\s*# (-- )?(.*)", line):
            if comment[1]:
                about = [comment[2]]
            elif about:
                about.append(comment[2])
        elif key := re.match(r"( *)([A-Za-z]+):", line):
            depth = len(key[1])
            path = [(at, name) for at, name in path if at < depth] + [(depth, key[2])]
            if about:
                names = [name for _, name in path]
                default = values
                for name in names:
                    default = default[name]
                shown = json.dumps(default) if default != "" else ""
                rows.append(f"| `{'.'.join(names)}` | {f'`{shown}`' if shown else ''} | {' '.join(about)} |")
            about = []
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())

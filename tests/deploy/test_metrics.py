"""What deploy/ says of metrics, flags and ports is what the code has. Needs no tool."""

import json
import re
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry

from embedmesh_encoder.settings import AudioSettings, ImageSettings, TextSettings
from embedmesh_gateway.settings import GatewaySettings
from embedmesh_server.metrics import EncoderMetrics, FileMetrics, GatewayMetrics, ServerMetrics, WorkersMetrics
from embedmesh_server.settings import NodeSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FILES = DEPLOY / "chart/files"
KINDS: tuple[type[NodeSettings], ...] = (GatewaySettings, TextSettings, ImageSettings, AudioSettings)
# Flags of helm, kubectl, docker, promtool, k6, Envoy, Prometheus, Valkey, `embedmesh` and the soak, in texts of deploy/
OTHERS = {
    *("--set", "--values", "--install", "--namespace", "--strict", "--help", "--address"),
    *("--from-literal", "--from-file", "--kustomize", "--follow"),
    *("--file", "--target", "--tag", "--build", "--wait"),
    *("--summary-export", "--config", "--config-path", "--storage"),
    *("--reuse-values", "--selector", "--previous", "--prefix", "--tail", "--filename", "--output", "--dry-run"),
    *("--ignore-daemonsets", "--delete-emptydir-data", "--latency"),
    *("--texts", "--text-model", "--target-ms", "--cache-entries", "--field", "--role"),
    *("--minutes", "--rate"),
    *("--bind", "--save", "--appendonly", "--loglevel", "--maxmemory", "--maxmemory-policy", "--protected-mode"),
}


def exported() -> dict[str, str]:
    """Every name on /metrics -> the metric it belongs to."""
    registry = CollectorRegistry()
    ServerMetrics(registry, "any")
    EncoderMetrics(registry)
    GatewayMetrics(registry)
    WorkersMetrics(registry)
    FileMetrics(registry)
    names: dict[str, str] = {}
    for metric in registry.collect():
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(metric.type, ("",))
        names |= {metric.name + ending: metric.name for ending in endings}
    return names


def texts() -> dict[Path, str]:
    """Every text file of deploy/ but this list's own."""
    return {
        path: path.read_text()
        for path in sorted(DEPLOY.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path != DEPLOY / "README.md"
    }


def named() -> set[str]:
    """Every metric that deploy/ names, outside of its README."""
    found = set()
    for text in texts().values():
        found |= set(re.findall(r"\b(?:embedmesh|process|python)_[a-z0-9_]+\b", text))
    # Names of packages, commands and scripts, which look alike.
    return found - {"embedmesh_gateway", "embedmesh_encoder", "embedmesh_server", "embedmesh_cli"}


def documented() -> str:
    (section,) = re.findall(
        r"### Metrics that nothing here names\n(.*?)\n#", (DEPLOY / "README.md").read_text(), re.DOTALL
    )
    return str(section)


def test_every_metric_named_exists() -> None:
    known = exported()
    in_prose = set(known.values())
    assert sorted(name for name in named() if name not in known and name not in in_prose) == []


def test_queries_use_exported_names() -> None:
    """Prose may say embedmesh_requests; a query must say embedmesh_requests_total."""
    known = exported()
    rules = yaml.safe_load((FILES / "rules.yaml").read_text())
    queries = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    board = json.loads((FILES / "dashboard.json").read_text())
    queries += [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    queries += re.findall(r"```promql\n(.*?)```", (DEPLOY / "OPERATIONS.md").read_text(), re.DOTALL)
    for query in queries:
        metrics = set(re.findall(r"(?<![:\w])(?:embedmesh|process)_\w+", query))
        assert metrics <= set(known), query


def test_metrics_that_nothing_names_are_documented() -> None:
    known = exported()
    unnamed = set(known.values()) - {known.get(name, name) for name in named()}
    assert set(re.findall(r"`((?:embedmesh|process|python)_\w+)`", documented())) == unnamed


def test_recorded_names_that_are_used_are_recorded() -> None:
    rules = yaml.safe_load((FILES / "rules.yaml").read_text())
    recorded = {rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule}
    for text in texts().values():
        assert set(re.findall(r"\bembedmesh:\w+:\w+", text)) <= recorded


def test_every_alert_says_what_to_do() -> None:
    rules = yaml.safe_load((FILES / "rules.yaml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    for alert in alerts:
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert len(alert["annotations"]["runbook"]) > 100, alert["alert"]
    tested = (DEPLOY / "prometheus/rules_test.yaml").read_text()
    assert [alert["alert"] for alert in alerts if f'alertname="{alert["alert"]}"' not in tested] == []


def test_every_flag_named_exists() -> None:
    """Also in prose; those of other programs are listed, so that a misspelt one of ours is none of them."""
    known = {"--" + name.replace("_", "-") for kind in KINDS for name in kind.model_fields} | OTHERS
    for path, text in texts().items():
        if path.suffix in {".md", ".yaml", ".yml", ".json", ".txt"}:
            assert sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known) == [], path
    readme = (DEPLOY / "README.md").read_text()
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) - known) == []


def test_every_variable_named_exists() -> None:
    known = {
        f"EMBEDMESH_{prefix}_{name.upper()}"
        for prefix, kind in zip(("GATEWAY", "TEXT", "IMAGE", "AUDIO"), KINDS, strict=True)
        for name in kind.model_fields
    }
    for path, text in texts().items():
        assert set(re.findall(r"EMBEDMESH_[A-Z_]+", text)) <= known | {"EMBEDMESH_CACHE_DIR"}, path


def test_ports_are_those_of_the_code() -> None:
    """Of the chart's containers; whoever reads `--help` should find the same numbers in the cluster."""
    helpers = (DEPLOY / "chart/templates/_helpers.tpl").read_text()
    defaults = {kind: (kind.model_fields["port"].default, kind.model_fields["http_port"].default) for kind in KINDS}
    ports, http_ports = (
        dict(re.findall(r'"(\w+)" (\d+)', line)) for line in re.findall(r"get \(dict (.*)\) \. -}}", helpers)
    )
    for modality, kind in zip(("text", "image", "audio"), KINDS[1:], strict=True):
        assert (int(ports[modality]), int(http_ports[modality])) == defaults[kind]
    gateway = (DEPLOY / "chart/templates/gateway.yaml").read_text()
    assert "--port={} --http-port={}".format(*re.findall(r"--(?:http-)?port=(\d+)", gateway)) == (
        "--port={} --http-port={}".format(*defaults[GatewaySettings])
    )


def test_panels_stand_beside_each_other() -> None:
    board = json.loads((FILES / "dashboard.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_adapter_serves_what_autoscalers_ask_for() -> None:
    values = yaml.safe_load((DEPLOY / "prometheus/adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    pattern = re.search(r'__name__=~"(.+?)"', rule["seriesQuery"])
    assert pattern
    asked = set(re.findall(r"name: (embedmesh_\w+)", (DEPLOY / "chart/templates/_helpers.tpl").read_text()))
    assert asked == {name for name in exported() if re.search(pattern[1], name)}

"""What the chart renders: valid, refused where impossible, restricted, and consistent in itself."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from embedmesh_encoder.settings import AudioSettings, EncoderSettings, ImageSettings, TextSettings
from embedmesh_server.metrics import EncoderMetrics, ServerMetrics

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/chart"
# The oldest that Chart.yaml allows, one in the middle, the newest that there are schemas of.
KUBERNETES = ("1.27", "1.32", "1.37")
# Kinds of others, whose schemas are not in Kubernetes: their content is tested by those who read it.
FOREIGN = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}


def of_kind(manifests: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [each for each in manifests if each["kind"] in kinds]


def pods(manifests: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, str]]]:
    """Name, spec and labels of every pod that would run."""
    found = []
    for each in manifests:
        if each["kind"] == "Deployment":
            template = each["spec"]["template"]
            found.append((each["metadata"]["name"], template["spec"], template["metadata"]["labels"]))
        elif each["kind"] == "Pod":
            found.append((each["metadata"]["name"], each["spec"], each["metadata"]["labels"]))
    return found


def test_lint(helm: Any, example: Path | None) -> None:
    done = helm("lint", "--strict", CHART, *(["--values", example] if example else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
def test_is_valid(render: Any, example: Path | None, version: str, tool: Any, tmp_path: Path) -> None:
    manifests = [each for each in render(example, version=f"{version}.0") if each["kind"] not in FOREIGN]
    path = tmp_path / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(manifests))
    done = subprocess.run(
        [tool("kubernetes-validate"), "--strict", "-k", version, path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0, done.stdout
    assert [line for line in lines if not line.startswith("INFO")] == []
    assert len(lines) == len(manifests)


def test_older_kubernetes_is_refused(helm: Any) -> None:
    done = helm("template", "mesh", CHART, "--kube-version=1.26.0")
    assert done.returncode != 0
    assert "1.27" in done.stderr


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        # By the schema.
        (["encoders.text.replica=3"], "encoders.text: Additional property replica is not allowed"),
        (["gateway.replicas=two"], "gateway.replicas: Invalid type. Expected: integer, given: string"),
        (["gateway.settings.cache_timeout=20"], "Additional property cache_timeout is not allowed"),
        (["gateway.settings.port=1"], "Additional property port is not allowed"),
        (["gateway.settings.redis_url=redis://a"], "Additional property redis_url is not allowed"),
        (["gateway.settings.cache_ttl_seconds=0"], "Must be greater than or equal to 1"),
        (["encoderDefaults.settings.backend=onnx"], "backend must be one of the following"),
        (["encoderDefaults.settings.model=/m"], "Additional property model is not allowed"),
        (["encoderDefaults.settings.tracing=true"], "Additional property tracing is not allowed"),
        (["tracing.endpoint=collector:4317"], "tracing.endpoint: Does not match pattern"),
        (["tracing.ratio=2"], "tracing.ratio: Must be less than or equal to 1"),
        (["gateway.image.digest=latest"], "gateway.image.digest: Does not match pattern"),
        (["gateway.autoscaling.kind=vpa"], "gateway.autoscaling.kind must be one of the following"),
        (["monitoring.prometheusRule.latencyTargetSeconds=0"], "Must be greater than 0"),
        (["monitoring.prometheusRule.runbookBase=https://example.org/deploy"], "runbookBase: Does not match pattern"),
        # By the templates.
        (["gateway.settings.keys_file=/k"], "Additional property keys_file is not allowed"),
        (["gateway.tls.clientCertificates=true", "test.secretName=t"], "set gateway.tls.secretName to a Secret"),
        (["gateway.keys.secretName=k"], "set test.secretName to a Secret with token"),
        (["meshTls.gatewaySecretName=g"], "meshTls.gatewaySecretName and meshTls.encoderSecretName go together"),
        (["gateway.settings.upstream_tls_name=n"], "set meshTls"),
        (["encoders.text=null", "encoders.image=null", "encoders.audio=null"], "there is nothing to serve"),
        (["encoderDefaults.enabled=false"], "encoders: none is enabled"),
        (["redis.existingSecret.name=r"], "a gateway has one cache: add valkey.enabled=false"),
        (["encoders.speech.models.paths={/m}"], 'encoders.speech.modality is "speech": set it to text, image or audio'),
        (["encoders.gateway.modality=text"], "the name is taken by the chart's own gateway"),
        (["encoders.text.models.paths=null"], "encoders.text.models.paths is empty: name the folder"),
        (["encoders.text.models.from=pvc"], "set encoders.text.models.pvc.claimName"),
        (["encoders.text.models.from=init"], "set image and command of encoders.text.models.init"),
        (
            ["encoders.text.models.from=pvc,encoders.text.models.pvc.claimName=c,encoders.text.models.paths={/a/m}"],
            "/a/m is not below /models",
        ),
        (["encoders.text.settings.backend=cuda"], "backend cuda needs a GPU: set encoders.text.gpu.count=1"),
        (
            ["encoders.text.settings.backend=openvino", "encoders.text.gpu.count=1"],
            "backend openvino uses no GPU of its pod, and 1 would be reserved",
        ),
        (["encoders.image.settings.row_width=128"], "row_width is a setting of text encoders"),
        (["encoders.text.settings.compile_cache=/c"], "set encoders.text.compileCache.sizeLimit instead"),
        (["encoders.text.maxSurge=0", "encoders.text.maxUnavailable=0"], "no upgrade could begin"),
        (
            ["gateway.autoscaling.kind=hpa", "gateway.autoscaling.minReplicas=9"],
            "minReplicas is 9 and maxReplicas 8: fewest may not exceed most",
        ),
        (["encoders.text.autoscaling.kind=keda"], "set encoders.text.autoscaling.prometheusAddress"),
        (
            ["encoders.more.modality=text", "encoders.more.models.paths={/models/other}"],
            "must make the same vectors",
        ),
        (
            [
                "encoders.more.modality=text,encoders.more.models.paths={/models/text}",
                "encoders.more.gpu.count=1,encoders.more.settings.backend=cuda",
            ],
            "must make the same vectors",
        ),
        # backend auto would take the GPU where there is one.
        (
            ["encoders.more.modality=text,encoders.more.models.paths={/models/text},encoders.more.gpu.count=1"],
            "GPUs to all or none",
        ),
    ],
)
def test_impossible_values_are_refused(helm: Any, values: list[str], sentence: str) -> None:
    words = [word for value in values for word in ("--set", value)]
    done = helm("template", "mesh", CHART, "--kube-version=1.32.0", *words)
    assert done.returncode != 0, "rendered"
    assert sentence in done.stderr
    assert "nil pointer" not in done.stderr


def test_generated_files_are_current() -> None:
    done = subprocess.run([sys.executable, "deploy/generate.py", "--check"], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0


def test_settings_of_one_modality_are_known() -> None:
    """The template that refuses them elsewhere has them by name."""
    common = set(EncoderSettings.model_fields)
    own = {
        (name, modality)
        for modality, kind in (("text", TextSettings), ("image", ImageSettings), ("audio", AudioSettings))
        for name in set(kind.model_fields) - common
    }
    template = (CHART / "templates/_helpers.tpl").read_text()
    (line,) = re.findall(r"\$setting, \$modality := dict (.*) -}}", template)
    words = json.loads("[" + line.replace(" ", ",") + "]")
    assert set(zip(words[::2], words[1::2], strict=True)) == own


def test_flags_are_written_as_the_commands_read_them(render: Any) -> None:
    manifests = render(
        None,
        "--set=encoders.audio.settings.max_message_bytes=100000000",
        # --set would make a string of it, which is refused.
        "--set-json=encoders.audio.settings.aging_seconds=2.5",
        "--set=encoders.audio.settings.cuda_graphs=true,encoders.audio.settings.triton_shared_memory=false",
    )
    (spec,) = [spec for name, spec, _ in pods(manifests) if name == "mesh-embedmesh-audio"]
    args = spec["containers"][0]["args"]
    assert {
        "--max-message-bytes=100000000",
        "--aging-seconds=2.5",
        "--cuda-graphs",
        "--no-triton-shared-memory",
    } <= set(args)


def test_spans_are_sent_where_there_is_a_receiver(render: Any) -> None:
    told = ["--set=tracing.endpoint=http://collector:4317", "--set-json=tracing.ratio=0.5"]
    for words in ([], told):
        for name, spec, _ in pods(render(None, *words)):
            (container,) = spec["containers"]
            if "valkey" not in name and "test" not in name:
                assert ("--tracing" in container["args"], "--trace-ratio=0.5" in container["args"]) == (
                    bool(words),
                ) * 2
                endpoint = {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4317"}
                assert (endpoint in container.get("env", [])) == bool(words)


@pytest.mark.parametrize(
    ("resources", "threads"),
    [
        ("requests.cpu=2", 2),
        ("limits.cpu=500m", 1),
        ("limits.cpu=2500m", 3),
        ("limits.cpu=1.5", 2),
        ("requests.cpu=null", 0),
    ],
)
def test_threads_follow_from_the_cores_of_the_container(render: Any, resources: str, threads: int) -> None:
    (spec,) = [
        s for n, s, _ in pods(render(None, f"--set=encoderDefaults.resources.{resources}")) if n.endswith("-text")
    ]
    assert f"--threads={threads}" in spec["containers"][0]["args"]


def test_gpus_are_asked_for_by_name(render: Any) -> None:
    found = {name: spec["containers"][0] for name, spec, _ in pods(render(CHART / "ci/gpu.yaml"))}
    text, image, audio = (found[f"mesh-embedmesh-{modality}"] for modality in ("text", "image", "audio"))
    assert text["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": 1}
    assert image["resources"]["limits"] == {"memory": "1Gi", "nvidia.com/mig-1g.10gb": 1}
    assert audio["resources"]["limits"] == {"memory": "1Gi"}
    assert text["image"] == "embedmesh-encoder-gpu:0.1.0"
    assert audio["image"] == "embedmesh-encoder-cpu:0.1.0"


def test_the_examples_of_the_readme_render(render: Any, tmp_path: Path) -> None:
    models, tls = re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL)
    for values, roles in (
        (models, ("gateway", "text", "image", "valkey", "test")),
        (tls, ("gateway", "text", "image", "audio", "valkey", "test")),
    ):
        (tmp_path / "values.yaml").write_text(values)
        names = {name for name, _, _ in pods(render(tmp_path / "values.yaml"))}
        assert names == {f"mesh-embedmesh-{role}" for role in roles}


def test_pods_are_restricted(rendered: Any) -> None:
    for name, spec, _ in pods(rendered):
        assert spec["automountServiceAccountToken"] is False, name
        # EMBEDMESH_GATEWAY_SERVICE_HOST and the like would be refused as unknown settings.
        assert spec["enableServiceLinks"] is False, name
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 10_000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert {"requests", "limits"} <= set(container["resources"]), name
            assert "memory" in container["resources"]["limits"], name


def test_everything_stands_in_the_namespace_of_the_release(rendered: Any) -> None:
    assert {each["metadata"]["namespace"] for each in rendered} == {"ns"}


def test_selectors_find_the_pods_meant(rendered: Any) -> None:
    """Every Service, budget and policy selects some pod, by a port that the pod has."""
    everything = pods(rendered)
    for each in of_kind(rendered, "Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment"):
        spec = each["spec"]
        selector = spec.get("selector") or spec["podSelector"]
        wanted = selector.get("matchLabels", selector).items()
        chosen = [pod for _, pod, labels in everything if wanted <= labels.items()]
        assert chosen, (each["kind"], each["metadata"]["name"])
        if each["kind"] == "Deployment":
            assert len(chosen) == 1
        if each["kind"] == "Service" and not each["metadata"]["name"].endswith("-metrics"):
            names = {port["targetPort"] for port in spec["ports"]}
            for pod in chosen:
                assert names <= {port["name"] for port in pod["containers"][0]["ports"]}


def test_the_gateway_calls_headless_services_that_exist(rendered: Any) -> None:
    services = {each["metadata"]["name"]: each["spec"] for each in of_kind(rendered, "Service")}
    (gateway,) = [spec for name, spec, _ in pods(rendered) if name.endswith("-gateway")]
    targets = [re.fullmatch(r"--(\w+)-target=dns:///([^.]+)\.ns\.svc\.cluster\.local\.:(\d+)", arg) for arg in
               gateway["containers"][0]["args"]]  # fmt: skip
    found = [match for match in targets if match]
    assert found
    for match in found:
        service = services[match[2]]
        assert service["clusterIP"] == "None"
        assert service["selector"]["embedmesh.io/modality"] == match[1]
        assert [port["port"] for port in service["ports"]] == [int(match[3])]


def test_encoders_end_their_connections_by_age(rendered: Any) -> None:
    for name, spec, labels in pods(rendered):
        if labels["app.kubernetes.io/component"] == "encoder":
            assert "--max-connection-age-seconds=300" in spec["containers"][0]["args"], name


def test_pods_get_the_time_to_drain(render: Any) -> None:
    for _, spec, labels in pods(render(None, "--set=encoderDefaults.settings.drain_seconds=120")):
        if labels["app.kubernetes.io/component"] == "encoder":
            assert spec["terminationGracePeriodSeconds"] > 120 + 5


def test_autoscalers_ask_for_metrics_that_encoders_have(rendered: Any) -> None:
    registry = CollectorRegistry()
    ServerMetrics(registry, "text")
    EncoderMetrics(registry)
    known = {metric.name for metric in registry.collect()}
    for each in of_kind(rendered, "HorizontalPodAutoscaler"):
        assert {metric["pods"]["metric"]["name"] for metric in each["spec"]["metrics"]} <= known
    for each in of_kind(rendered, "ScaledObject"):
        for trigger in each["spec"]["triggers"]:
            query = trigger["metadata"]["query"]
            match = re.fullmatch(r'sum\((\w+)\{namespace="ns", pod=~"(.+)"\}\)', query)
            assert match, query
            assert match[1] in known
            assert re.fullmatch(match[2], each["spec"]["scaleTargetRef"]["name"] + "-5d4f8c7b9-x2x9z")


def test_scaled_deployments_name_no_replicas(rendered: Any) -> None:
    """Or every upgrade would undo what the autoscaler did."""
    scaled = {
        each["spec"]["scaleTargetRef"]["name"] for each in of_kind(rendered, "HorizontalPodAutoscaler", "ScaledObject")
    }
    for each in of_kind(rendered, "Deployment"):
        assert ("replicas" in each["spec"]) is (each["metadata"]["name"] not in scaled)


def test_secrets_come_by_reference(render: Any) -> None:
    for _, spec, labels in pods(render(CHART / "ci/external-redis-pvc.yaml")):
        if labels["app.kubernetes.io/component"] == "gateway":
            (url,) = [each for each in spec["containers"][0]["env"] if each["name"].endswith("REDIS_URL")]
            assert url["valueFrom"] == {"secretKeyRef": {"name": "redis", "key": "url"}}
            return
    pytest.fail("no gateway")


def test_a_folder_of_models_is_followed(render: Any) -> None:
    for name, spec, _ in pods(render(CHART / "ci/external-redis-pvc.yaml")):
        args = spec["containers"][0].get("args", [])
        if name.endswith("text"):
            assert [arg for arg in args if "model" in arg] == ["--models=/models", "--default-model=all-MiniLM-L6-v2"]
            return
    pytest.fail("no text encoder")


def test_notes_say_what_to_type_next(helm: Any, tmp_path: Path) -> None:
    """Without a cluster helm shows no notes, so they are rendered as a manifest."""
    shutil.copytree(CHART, tmp_path / "chart")
    notes = (tmp_path / "chart/templates/NOTES.txt").read_text()
    (tmp_path / "chart/templates/notes.yaml").write_text("notes: |\n  .\n" + textwrap.indent(notes, "  "))
    done = helm(
        "template", "mesh", tmp_path / "chart", "--namespace=ns", "--kube-version=1.32.0", "-s=templates/notes.yaml"
    )
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)["notes"]
    assert "the encoders audio, image, text." in shown
    assert "\n  helm test mesh --namespace ns\n" in shown
    assert "kubectl --namespace ns port-forward service/mesh-embedmesh-gateway 50050:50050\n" in shown
    assert "There is no Redis" not in shown


# What checkov finds and we mean so: check, on what, why.
ACCEPTED = [
    ("CKV_K8S_8", r"Pod\..*-test", "the test pod ends by itself"),
    ("CKV_K8S_9", r"Pod\..*-test", "the test pod ends by itself"),
    ("CKV2_K8S_6", r"Pod\..*-test", "the test pod listens on nothing"),
    ("CKV2_K8S_6", r"Pod\.of-text-only\..*", "text-only.yaml turns policies off on purpose"),
    ("CKV_K8S_43", r".*", "which digest an image has, whoever pushes it knows (image.digest)"),
    ("CKV_K8S_11", r".*", "no CPU limits by default: throttled encoders are slow in bursts; CPU is requested"),
    ("CKV_K8S_15", r".*", "tags are versions, and a node must be able to start a pod while the registry is away"),
    ("CKV_K8S_35", r".*-gateway", "settings are read from flags, variables and TOML; the variable comes from a Secret"),
]


def test_policy_scan(render: Any, tool: Any, tmp_path: Path) -> None:
    for example in (None, *sorted((CHART / "ci").glob("*.yaml"))):
        # A namespace for each: policies of one must not count for another.
        name = example.stem if example else "default"
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(render(example, f"--namespace=of-{name}")))
    done = subprocess.run(
        [tool("checkov"), "--directory", tmp_path, "--framework", "kubernetes", "--output", "json", "--quiet"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    report = json.loads(done.stdout)
    failed = {(each["check_id"], each["check_name"], each["resource"]) for each in report["results"]["failed_checks"]}
    unused = set(range(len(ACCEPTED)))
    unexplained = []
    for check, name, resource in sorted(failed):
        reasons = {i for i, (known, on, _) in enumerate(ACCEPTED) if known == check and re.fullmatch(on, resource)}
        unused -= reasons
        if not reasons:
            unexplained.append((check, name, resource))
    assert unexplained == []
    assert [ACCEPTED[i] for i in unused] == [], "exceptions that nothing needs"
    assert report["summary"]["passed"] > 1000

"""Every container that the chart renders starts here, passes its own probes, and drains."""

import asyncio
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import trustme

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]


def component(spec: dict[str, Any]) -> str:
    return str(spec["metadata"]["labels"]["app.kubernetes.io/component"])


async def test_containers_start_and_pass_their_probes(
    rendered: Any,
    models: Path,
    tmp_path: Path,
    make_container: Any,
    make_place: Any,
) -> None:
    deployments = [each for each in rendered if each["kind"] == "Deployment"]
    place = make_place({"/models": models, "/content": models, "/compiled": tmp_path / "compiled", **secrets(tmp_path)})
    (tmp_path / "compiled").mkdir()
    containers: dict[str, Any] = {}
    grace: dict[str, float] = {}
    for each in deployments:
        name, pod = each["metadata"]["name"], each["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        containers[name] = make_container(container, place, tmp_path / f"{name}.log")
        grace[name] = pod["terminationGracePeriodSeconds"]
        for init in pod.get("initContainers", ()):
            # Its volume is the encoder's: both see the same folder.
            (tmp_path / name).mkdir()
            own = make_place({**place.folders, "/models": tmp_path / name}, place.hosts, place.secrets)
            first = make_container(init, own, tmp_path / f"{name}-init.log")
            await first.start()
            assert await first.ended() == 0, first.log.read_text()
            containers[name] = make_container(container, own, tmp_path / f"{name}.log")
    learn_hosts(rendered, containers, place)
    place.secrets["redis", "url"] = ""
    (gateway_name,) = [each["metadata"]["name"] for each in deployments if component(each) == "gateway"]
    gateway = containers.pop(gateway_name)
    try:
        await asyncio.gather(*(container.start() for container in containers.values()))
        gpus = {
            name
            for name, one in containers.items()
            if {"--backend=cuda", "--backend=tensorrt"} & set(one.spec.get("args", ()))
        }
        for name in gpus:
            await refuses_without_a_gpu(containers[name])
        await asyncio.gather(*(one.healthy() for name, one in containers.items() if name not in gpus))
        # One encoder is enough for it.
        await gateway.start()
        await gateway.healthy()
        if not gpus:
            await runs_the_chart_s_own_test(rendered, make_container, place, tmp_path)
            for valkey in (one for name, one in containers.items() if name.endswith("-valkey")):
                await holds_vectors(valkey.ports[6379])
        assert await gateway.stop(grace[gateway_name]) == 0
        stopped = await asyncio.gather(*(one.stop(grace[name]) for name, one in containers.items() if name not in gpus))
        assert set(stopped) == {0}
    finally:
        for one in (gateway, *containers.values()):
            await one.end()
    for one in (gateway, *containers.values()):
        for hook in one.spec.get("lifecycle", {}).values():
            assert shutil.which(hook["exec"]["command"][0])


def secrets(folder: Path) -> dict[str, Path]:
    """The Secrets of ci/secured.yaml, as they are mounted; each side of a hop trusts its own authority only."""
    clients, mesh = trustme.CA(), trustme.CA()
    leaves = {
        "clients": (clients, "localhost"),
        "authorities": (clients, "localhost"),
        "test": (clients, "test.internal"),
        "upstream": (mesh, "gateway.internal"),
        "encoder": (mesh, "localhost"),
    }
    mounted: dict[str, Path] = {}
    for name, (authority, host) in leaves.items():
        at = mounted[f"/secrets/{name}"] = folder / "secrets" / name
        at.mkdir(parents=True)
        leaf = authority.issue_cert(host)
        (at / "tls.crt").write_bytes(leaf.cert_chain_pems[0].bytes())
        (at / "tls.key").write_bytes(leaf.private_key_pem.bytes())
        (at / "ca.crt").write_bytes(authority.cert_pem.bytes())
    (mounted["/secrets/test"] / "token").write_text("a-token-of-the-test\n")
    keys = mounted["/secrets/keys"] = folder / "secrets/keys"
    keys.mkdir()
    digest = hashlib.sha256(b"a-token-of-the-test").hexdigest()
    (keys / "keys.toml").write_text(f'[keys.test]\nsha256 = "{digest}"\n')
    return mounted


def learn_hosts(rendered: Any, containers: dict[str, Any], place: Any) -> None:
    """Map the address of each Service to a process that it selects."""
    domain = "ns.svc.cluster.local."
    for service in (each for each in rendered if each["kind"] == "Service"):
        name = service["metadata"]["name"]
        for each in (each for each in rendered if each["kind"] == "Deployment"):
            labels = each["spec"]["template"]["metadata"]["labels"]
            container = containers[each["metadata"]["name"]]
            if not service["spec"]["selector"].items() <= labels.items() or name.endswith("-metrics"):
                continue
            for port in service["spec"]["ports"]:
                (target,) = [p for p in container.spec["ports"] if p["name"] == port["targetPort"]]
                here = container.ports[target["containerPort"]]
                place.hosts[f"{name}.{domain}", str(port["port"])] = here


async def refuses_without_a_gpu(container: Any) -> None:
    """All flags are understood; only the hardware is missing on this machine."""
    assert await container.ended() == 2
    said = container.log.read_text()
    assert "no such" not in said
    assert "onnxruntime-gpu" in said


async def holds_vectors(port: int) -> None:
    """The gateway found the Valkey that its variable names, and wrote what was just made."""
    async with redis.asyncio.Redis(port=port) as client, asyncio.timeout(10):
        while not await client.dbsize():
            await asyncio.sleep(0.05)


async def runs_the_chart_s_own_test(rendered: Any, make_container: Any, place: Any, folder: Path) -> None:
    (pod,) = [each for each in rendered if each["kind"] == "Pod"]
    test = make_container(pod["spec"]["containers"][0], place, folder / "test.log")
    await test.start()
    try:
        assert await test.ended() == 0, test.log.read_text()
    finally:
        await test.end()
    assert "ready:" in test.log.read_text()
    assert "a text became 384 numbers" in test.log.read_text()


async def test_the_chart_s_own_test_fails_without_models(
    render: Any, tmp_path: Path, make_container: Any, make_place: Any
) -> None:
    (pod,) = [each for each in render() if each["kind"] == "Pod"]
    spec = pod["spec"]["containers"][0]
    spec["args"][0] = spec["args"][0].replace("+ 300", "+ 1")
    place = make_place(hosts={("mesh-embedmesh-gateway.ns.svc.cluster.local.", "50050"): 1})
    test = make_container(spec, place, tmp_path / "test.log")
    await test.start()
    assert await test.ended() == 1
    assert "Look at the encoders' pods and logs." in test.log.read_text()


async def test_variables_of_service_links_would_be_refused(
    tmp_path: Path, make_container: Any, make_place: Any
) -> None:
    """Why every pod has enableServiceLinks false."""
    spec = {
        "name": "gateway",
        "command": ["embedmesh-gateway"],
        "args": ["--text-target=localhost:1"],
        "env": [{"name": "EMBEDMESH_GATEWAY_SERVICE_HOST", "value": "10.0.0.1"}],
    }
    container = make_container(spec, make_place(), tmp_path / "gateway.log")
    await container.start()
    assert await container.ended() == 2
    assert "EMBEDMESH_GATEWAY_SERVICE_HOST: no such setting" in container.log.read_text()


async def test_the_startup_probe_waits_for_models(
    render: Any,
    models: Path,
    tmp_path: Path,
    make_container: Any,
    make_place: Any,
) -> None:
    """A model that cannot be loaded never becomes ready: the process ends with a reason."""
    broken = tmp_path / "models/text"
    shutil.copytree(models / "text", broken)
    (broken / "tokenizer.json").write_text(json.dumps({}))
    (deployment,) = [e for e in render() if e["kind"] == "Deployment" and e["metadata"]["name"].endswith("-text")]
    container = make_container(
        deployment["spec"]["template"]["spec"]["containers"][0],
        make_place({"/models": broken.parent}),
        tmp_path / "log",
    )
    await container.start()
    assert await container.ended() == 1
    assert "sha256" in container.log.read_text()

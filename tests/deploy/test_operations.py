"""What the guide says can be done so: alerts have their heading, commands are taken, names exist, queries parse."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from embedmesh_cli.__main__ import app

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
GUIDE = (DEPLOY / "OPERATIONS.md").read_text()
RULES = yaml.safe_load((DEPLOY / "chart/files/rules.yaml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", GUIDE, re.DOTALL | re.MULTILINE)


def commands(program: str) -> Iterator[list[str]]:
    """Every command of the program, also those within sentences and after a pipe or `&&`."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += re.findall(rf"`({program} [^`]+)`", GUIDE)
    for line in lines:
        words = shlex.split(line, comments=True)
        part: list[str] = []
        for word in [*words, "&&"]:
            if word in {"&&", "|", "||"} or word.endswith(";"):
                if part[:1] == [program]:
                    yield part
                part = []
            else:
                part.append(word)


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_alert_has_its_part_of_the_guide() -> None:
    (section,) = re.findall(r"^## Alerts\n(.*?)^## ", GUIDE, re.DOTALL | re.MULTILINE)
    assert re.findall(r"^### (.+)$", section, re.MULTILINE) == list(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook_url"] == f"OPERATIONS.md#{anchor(name)}"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", GUIDE)
    assert len(targets) > 20
    for target in targets:
        name, _, heading = target.partition("#")
        path = (DEPLOY / name).resolve() if name else DEPLOY / "OPERATIONS.md"
        assert path.exists(), target
        text = path.read_text() if path.is_file() else ""
        found = {anchor(each) for each in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
        assert not heading or heading in found, target


def test_runbooks_are_addresses_where_the_chart_is_told_one(render: Any) -> None:
    for base in ("", "https://example.org/embedmesh/deploy/"):
        manifests = render(
            None,
            "--set=monitoring.prometheusRule.enabled=true",
            f"--set-string=monitoring.prometheusRule.runbookBase={base}",
        )
        (made,) = [each for each in manifests if each["kind"] == "PrometheusRule"]
        urls = [r["annotations"]["runbook_url"] for g in made["spec"]["groups"] for r in g["rules"] if "alert" in r]
        assert urls == [base + rule["annotations"]["runbook_url"] for rule in ALERTS.values()]


def test_helm_takes_every_upgrade(helm: Any, tmp_path: Path) -> None:
    """A release is needed for `upgrade`; rendering with the same values finds what is wrong with them."""
    found = list(commands("helm"))
    upgrades = [words for words in found if words[1] == "upgrade"]
    assert len(upgrades) >= 6
    (tmp_path / "values.yaml").write_text("gateway: {replicas: 3}")
    here = {"deploy/chart": str(ROOT / "deploy/chart"), "values.yaml": str(tmp_path / "values.yaml")}
    for words in found:
        assert words[1] in {"upgrade", "rollback", "get"}
        assert "mesh" in words
    for words in upgrades:
        values = [word for word in words[2:] if word not in {"--install", "--reuse-values", "--wait"}]
        done = helm("template", "--kube-version=1.32.0", *(here.get(word, word) for word in values))
        assert done.returncode == 0, (words, done.stderr)


def test_kubectl_names_what_is_there(render: Any) -> None:
    manifests = render()
    there = {f"{each['kind'].lower()}/{each['metadata']['name']}" for each in manifests}
    named = set(re.findall(r"\bdeployment/[a-z-]+", GUIDE))
    assert named
    assert named <= there
    for label in re.findall(r"--selector ([a-z./]+)=mesh", GUIDE):
        assert all(
            label in each["spec"]["template"]["metadata"]["labels"]
            for each in manifests
            if each["kind"] == "Deployment"
        )


@pytest.mark.parametrize("words", list(commands("embedmesh")), ids=" ".join)
def test_our_command_takes_every_line(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    context = command.make_context("embedmesh", words[1:])
    name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    while hasattr(command, "commands"):
        context = command.make_context(name, rest, parent=context)
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    given, _, _ = command.make_parser(context).parse_args(list(rest))
    assert given is not None


def test_prometheus_reads_every_query(tool: Any, tmp_path: Path) -> None:
    queries = [line for block in blocks("promql") for line in block.splitlines()]
    assert len(queries) > len(ALERTS)
    rules = [{"record": f"guide:query:{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "guide", "rules": rules}]}))
    done = subprocess.run(
        [tool("promtool"), "check", "rules", path], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

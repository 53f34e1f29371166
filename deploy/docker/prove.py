"""Carry out the Dockerfile without a container engine, in a clean Debian root, and try what comes out.

    sudo python deploy/docker/prove.py FOLDER [TARGET ...]       # by default gateway and encoder-cpu

Needs root and debootstrap. Every stage is a folder: FROM copies one, RUN runs in it by chroot, COPY copies. Then the
target is started as its USER, with its ENV, on a read-only root with only /tmp to write to, and asked for its health.
Finished stages are taken as they are: remove FOLDER to begin anew. It needs Debian's mirror and a package index.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
DOCKERFILE: Final = ROOT / "deploy/docker/Dockerfile"
# What a build is given of this machine: how it reaches its package index.
_PASSED: Final = re.compile(r"PIP_(?!FIND_LINKS).*|(https?|no)_proxy|SSL_CERT_FILE", re.IGNORECASE)
_DONE: Final = ".done"
# Of a target: what is started, and what its HTTP port is asked for. A gateway without encoders is alive, not ready.
_PORTS: Final = "--port=0 --http-port=18080"
_TRIALS: Final = {
    "gateway": {f"embedmesh-gateway --text-target=localhost:1 {_PORTS}": "healthz"},
    "encoder-cpu": {
        f"embedmesh-encoder text --model=/models/text {_PORTS}": "readyz",
        f"embedmesh-encoder text --model=/models/text --backend=openvino {_PORTS}": "readyz",
        f"embedmesh-encoder image --model=/models/image {_PORTS}": "readyz",
        f"embedmesh-encoder audio --model=/models/audio {_PORTS}": "readyz",
    },
}


class Stage:
    """A FROM with what follows it."""

    def __init__(self, base: str, name: str) -> None:
        self.base, self.name = base, name
        self.steps: list[tuple[str, str]] = []
        self.env: dict[str, str] = {}
        self.user = "0:0"
        self.where = "/"


def parse(text: str) -> dict[str, Stage]:
    """Read the few instructions that the Dockerfile uses; any other is an error."""
    stages: dict[str, Stage] = {}
    joined = re.sub(r"\\\n\s*", "", text)
    stage: Stage | None = None
    for line in joined.splitlines():
        word, _, rest = line.partition(" ")
        if not line or word in {"#", "ARG", "EXPOSE", "CMD"}:
            continue
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = stages[name] = Stage(base, name)
            if base in stages:
                stage.env, stage.user, stage.where = dict(stages[base].env), stages[base].user, stages[base].where
        elif stage and word == "ENV":
            stage.env |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif stage and word == "USER":
            stage.user = rest
        elif stage and word == "WORKDIR":
            stage.where = rest
        elif stage and word in {"RUN", "COPY"}:
            stage.steps.append((word, rest))
        else:
            raise SystemExit(f"prove.py does not know this instruction: {line}")
    return stages


def say(line: str) -> None:
    """Tell what happens."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def build(stages: dict[str, Stage], name: str, folder: Path) -> Path:
    """Make the root of a stage, and of all that it builds on."""
    root = folder / name
    if (root / _DONE).exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    stage = stages.get(name)
    if stage is None:
        say(f"debootstrap {name}")
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], check=True, stdout=subprocess.DEVNULL)
        # As the image of that name comes.
        shutil.rmtree(root / "var/lib/apt/lists")
        for package in (root / "var/cache/apt").rglob("*.[db][ei][bn]"):
            package.unlink()
        (root / _DONE).touch()
        return root
    base = build(stages, "debian" if stage.base.startswith("$") else stage.base, folder)
    subprocess.run(["cp", "--archive", base, root], check=True)
    (root / _DONE).unlink()
    (root / stage.where.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for word, rest in stage.steps:
        say(f"{name}: {word} {rest}")
        started = time.monotonic()
        if word == "RUN":
            run(root, stage, rest)
        elif rest.startswith("--from="):
            source, path, target = rest.removeprefix("--from=").split()
            subprocess.run(
                ["cp", "--archive", build(stages, source, folder) / path.lstrip("/"), root / target.lstrip("/")],
                check=True,
            )
        else:
            copy_context(root / stage.where.lstrip("/"))
        say(f"  {time.monotonic() - started:.0f} s")
    (root / _DONE).touch()
    return root


def run(root: Path, stage: Stage, command: str) -> None:
    """Run a command in a root, as a build does: with the network, and the certificates of this machine."""
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | stage.env
    env |= {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
    binds = {"/proc": "/proc", "/dev": "/dev", "/etc/resolv.conf": "/etc/resolv.conf"}
    for name in {"PIP_CERT", "SSL_CERT_FILE"} & set(env):
        # Elsewhere: the package of certificates writes its own.
        env[name] = binds.setdefault(env[name], f"/run/{name}.pem")
    mounts = []
    for outside, path in binds.items():
        inside = root / path.lstrip("/")
        if not inside.exists():
            inside.touch()
        mounts.append(f"mount --rbind {shlex.quote(outside)} {shlex.quote(str(inside))}")
    script = " && ".join([*mounts, f"exec chroot {shlex.quote(str(root))} sh -c 'cd {stage.where} && {command}'"])
    subprocess.run(["unshare", "--mount", "sh", "-c", script], check=True, env=env)


def copy_context(target: Path) -> None:
    """COPY . . with the lines of Dockerfile.dockerignore."""
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    for pattern in kept:
        for path in ROOT.glob(pattern):
            inside = target / path.relative_to(ROOT)
            inside.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, inside, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(path, inside)


def size(root: Path, *paths: str) -> str:
    """Disk that paths of a root take, in MB."""
    done = subprocess.run(
        ["du", "--summarize", "--total", "--block-size=1MB", *(root / path for path in paths)],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()[-1].split()[0]


def attempt(root: Path, stage: Stage, command: str, path: str) -> None:
    """Start a command of the target as its user on a read-only root, and wait for a good answer."""
    (root / "proc").mkdir(exist_ok=True)
    script = " && ".join(
        [
            f"mount --bind {root} {root}",
            f"mount --bind /proc {root}/proc",
            f"mount --bind /dev {root}/dev",
            f"mount -t tmpfs -o mode=1777 none {root}/tmp",
            f"mount -o remount,ro,bind {root}",
            f"exec chroot --userspec={stage.user} {root} {command}",
        ]
    )
    process = subprocess.Popen(["unshare", "--mount", "sh", "-c", script], env=stage.env)
    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:18080/{path}", timeout=5):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > give_up:
                    raise SystemExit(f"{command}: does not answer (its log is above)") from None
                time.sleep(0.2)
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        (real,) = re.findall(r"^Uid:\t(\d+)", status, re.MULTILINE)
        (resident,) = re.findall(r"^VmRSS:\s+(\d+)", status, re.MULTILINE)
        say(f"{command}: answers as user {real} on a read-only root, {int(resident) // 1024} MiB resident")
    finally:
        process.terminate()
        ended = process.wait(timeout=30)
    if ended != 0:
        raise SystemExit(f"{command}: ended with status {ended} after SIGTERM")


def main() -> None:
    """Do it."""
    if len(sys.argv) == 1 or os.geteuid() != 0 or not shutil.which("debootstrap"):
        raise SystemExit(
            "usage, as root and with debootstrap installed: python deploy/docker/prove.py FOLDER [TARGET ...]"
        )
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stages = parse(DOCKERFILE.read_text(encoding="utf-8"))
    for name in sys.argv[2:] or list(_TRIALS):
        root = build(stages, name, folder)
        whole, base, ours = size(root, "."), size(folder / "python", "."), size(root, "opt/embedmesh")
        say(f"{name}: {whole} MB, of it Debian with Python {base} MB, /opt/embedmesh {ours} MB")
        for command, path in _TRIALS.get(name, {}).items():
            attempt(root, stages[name], command, path)


if __name__ == "__main__":
    main()

"""Build the wheel, install it where only the light client's dependencies are, and use it there.

`make check` runs this: what users get is the wheel, not this folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The newest and the oldest dependencies we promise to work with.
LOCKS = ("client.txt", "lowest.txt")

# Runs in the clean environment. The servers' packages are in the wheel, their dependencies are not installed.
PROBE = """
import sys
import embedmesh, embedmesh.v1.gateway_pb2_grpc
assert "site-packages" in embedmesh.__file__, embedmesh.__file__
heavy = {"embedmesh_server", "embedmesh_encoder", "embedmesh_gateway", "embedmesh_cli", "onnxruntime", "tokenizers",
         "redis", "pydantic", "prometheus_client", "grpc_health", "grpc_reflection", "typer", "rich", "onnx"}
loaded = heavy & {name.partition(".")[0] for name in sys.modules}
assert not loaded, f"import embedmesh loads {sorted(loaded)}"
with embedmesh.Client("localhost:1", retries=0) as client:
    try:
        client.embed(["nobody is there"], timeout=5)
    except embedmesh.EmbedMeshError as error:
        assert error.retryable, error
"""
NEEDED = {
    "embedmesh/py.typed",
    "embedmesh/v1/gateway_pb2.pyi",
    "embedmesh/v1/gateway.proto",
    "embedmesh_cli/demo/wordnet.tsv",
    "embedmesh_cli/demo/LICENSE.wordnet",
    "embedmesh_cli/demo/page.html",
    "embedmesh_cli/demo/pictures.tsv",
    "embedmesh_cli/demo/pictures/rocket.png",
    "embedmesh_cli/demo/speech.tsv",
    "embedmesh_cli/demo/speech/rocket.ogg",
    "embedmesh_cli/starter/models/audio/model.onnx",
    "embedmesh_cli/starter/models/audio/model.toml",
    "embedmesh_cli/starter/models/image/model.onnx",
    "embedmesh_cli/starter/models/image/model.toml",
    "embedmesh_encoder/__main__.py",
    "embedmesh_gateway/__main__.py",
    "embedmesh_server/node.py",
}


def main() -> None:
    """Do it; ends with a message when something is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", work)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        if missing := sorted(NEEDED - names):
            raise SystemExit(f"{wheel.name} lacks {', '.join(missing)}")
        stray = [name for name in names if not name.startswith("embedmesh") or "__pycache__" in name]
        if stray:
            raise SystemExit(f"{wheel.name} has strays: {', '.join(sorted(stray))}")
        for lock in LOCKS:
            environment = work / lock
            run(sys.executable, "-m", "venv", environment)
            python = environment / "bin" / "python"
            pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--quiet")
            locked = ("--require-hashes", "--no-deps", "--only-binary", ":all:")
            run(*pip, *locked, "--requirement", ROOT / "requirements" / lock)
            run(*pip, "--no-deps", "--no-index", wheel)
            run(*pip, "--no-index", "embedmesh")  # pip agrees that every dependency is there
            run(python, "-I", "-W", "error", "-c", PROBE, cwd=work)
            sys.stdout.write(f"{wheel.name} works alone with {lock}\n")


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command; end with what it said when it fails."""
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)  # noqa: S603  (those above)
    if done.returncode:
        words = " ".join(map(str, command))
        raise SystemExit(f"failed: {words[:200]}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()

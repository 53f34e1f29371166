"""Generate the committed stubs and the descriptor set from `embedmesh/v1/*.proto`.

`make proto` runs this; `make check` runs it with `--check` and fails when the committed
files differ from what the generator writes.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from importlib import resources
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

PROTOS = Path(__file__).parent
# The generator is old on purpose: its output runs on protobuf 6.30 up and grpcio 1.72 up.


def generate(out: Path) -> None:
    """Write `*_pb2*.py{,i}` below `out/embedmesh/v1` and `out/v1.binpb`."""
    sources = sorted((PROTOS / "embedmesh" / "v1").glob("*.proto"))
    googleapis = Path(status_pb2.__file__).parents[2]
    well_known = resources.files("grpc_tools") / "_proto"
    bin_dir = Path(sys.executable).parent
    common = [
        f"-I{PROTOS}",
        f"-I{googleapis}",
        f"-I{well_known}",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
        *(str(path) for path in sources),
    ]
    for options in (
        [f"--python_out={out}", f"--grpc_python_out={out}", f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}"],
        ["--include_imports", "--include_source_info", f"--descriptor_set_out={out / 'v1.binpb'}"],
    ):
        if protoc.main(["protoc", *options, *common]) != 0:
            raise SystemExit("protoc failed")
    for source in sources:
        # A file without a service gets an empty service stub: not worth committing.
        if "\nservice " not in source.read_text():
            for suffix in (".py", ".pyi"):
                (out / "embedmesh" / "v1" / f"{source.stem}_pb2_grpc{suffix}").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare, and fail on a difference")
    if not parser.parse_args().check:
        generate(PROTOS)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        generate(out)
        fresh = {p.relative_to(out) for p in out.rglob("*") if p.is_file() and p.name != "v1.binpb"}
        kept = {p.relative_to(PROTOS) for p in PROTOS.glob("embedmesh/v1/*_pb2*")}
        stale = fresh ^ kept | {p for p in fresh & kept if not filecmp.cmp(out / p, PROTOS / p, shallow=False)}
        if stale:
            raise SystemExit("stale stubs, run `make proto`: " + ", ".join(sorted(map(str, stale))))


if __name__ == "__main__":
    main()

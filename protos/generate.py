"""Generate the committed stubs from `embedmesh/v1/*.proto`.

`make proto` runs this; `make check` runs it with `--check` and fails when the committed
stubs differ from what the generator writes. The descriptor set of the last release,
`v1.binpb`, is what `buf breaking` compares with: only `--release` rewrites it.
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
BASELINE = PROTOS / "v1.binpb"


def run_protoc(*options: str) -> None:
    """Run protoc over all files of the contract."""
    googleapis = Path(status_pb2.__file__).parents[2]
    well_known = resources.files("grpc_tools") / "_proto"
    includes = [f"-I{folder}" for folder in (PROTOS, googleapis, well_known)]
    if protoc.main(["protoc", *options, *includes, *map(str, sources())]) != 0:
        raise SystemExit("protoc failed: see above")


def sources() -> list[Path]:
    """List the files of the contract."""
    return sorted((PROTOS / "embedmesh" / "v1").glob("*.proto"))


def write_stubs(out: Path) -> None:
    """Write `*_pb2*.py{,i}` below `out/embedmesh/v1`."""
    plugins = Path(sys.executable).parent
    run_protoc(
        *(f"--plugin={name}={plugins / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
    )
    for source in sources():
        # A file without a service gets an empty service stub: not worth committing.
        if "\nservice " not in source.read_text():
            for suffix in (".py", ".pyi"):
                (out / "embedmesh" / "v1" / f"{source.stem}_pb2_grpc{suffix}").unlink(missing_ok=True)


def write_descriptor_set(path: Path) -> None:
    """Write the contract as one `FileDescriptorSet`, with imports and comments, for buf."""
    run_protoc("--include_imports", "--include_source_info", f"--descriptor_set_out={path}")


def stale_stubs() -> list[str]:
    """List the committed stubs that differ from what the generator writes, the missing and the superfluous too."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_stubs(out)
        fresh = {path.relative_to(out) for path in out.rglob("*_pb2*")}
        kept = {path.relative_to(PROTOS) for path in PROTOS.glob("embedmesh/v1/*_pb2*")}
        same = {path for path in fresh & kept if filecmp.cmp(out / path, PROTOS / path, shallow=False)}
        return sorted(map(str, (fresh | kept) - same))


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="only compare the stubs, and fail on a difference")
    action.add_argument("--descriptor-set", type=Path, metavar="PATH", help="only write the descriptor set to PATH")
    action.add_argument("--release", action="store_true", help="also make this contract the baseline, v1.binpb")
    arguments = parser.parse_args()
    if arguments.check:
        stale = stale_stubs()
        if stale:
            raise SystemExit("stale stubs, run `make proto`: " + ", ".join(stale))
    elif arguments.descriptor_set:
        write_descriptor_set(arguments.descriptor_set)
    else:
        write_stubs(PROTOS)
        if arguments.release or not BASELINE.exists():
            write_descriptor_set(BASELINE)


if __name__ == "__main__":
    main()

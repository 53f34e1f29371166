"""Write the golden bytes of messages that have none yet.

To add one: write `golden/<Message>[.<variant>].json` (protobuf's JSON, field names as in the
.proto files), run `python tests/contract/make_golden.py`, commit both files. Bytes once written
are never written again: that old bytes keep their meaning is what they are for.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2  # noqa: F401  (registers what errors are made of)

from embedmesh.v1 import audio_pb2, catalog_pb2, gateway_pb2, image_pb2, text_pb2  # noqa: F401  (registers the messages)

GOLDEN = Path(__file__).parent / "golden"


def main() -> None:
    """Write what is missing."""
    pool = descriptor_pool.Default()  # type: ignore[no-untyped-call]
    for path in sorted(GOLDEN.glob("*.json")):
        binary = path.with_suffix(".binpb")
        if not binary.exists():
            kind = pool.FindMessageTypeByName(f"embedmesh.v1.{path.name.partition('.')[0]}")
            message = json_format.Parse(path.read_text(), message_factory.GetMessageClass(kind)())
            binary.write_bytes(message.SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()

"""A mesh at work on real text, in a minute: `embedmesh demo`."""

from embedmesh_cli.demo.show import demo

__all__ = ["demo"]

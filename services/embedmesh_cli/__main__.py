"""The `embedmesh` command."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from embedmesh_cli import bench, embed, models, up
from embedmesh_cli.console import UserError
from embedmesh_cli.demo import demo

__all__ = ["app", "main"]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"embedmesh {version('embedmesh')}")
        raise typer.Exit


def _root(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """One gRPC address for embeddings: batched ONNX encoders behind a caching gateway.

    Start a mesh with `embedmesh up`, then, in another terminal, `embedmesh embed "hello world"`.
    """


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

app = typer.Typer(
    name="embedmesh",
    callback=_root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: it keeps [up] and {..} as they are, wastes no columns on frames, and can be piped.
    rich_markup_mode=None,
    context_settings=_CONTEXT,
)
app.command("up", context_settings={**_CONTEXT, "auto_envvar_prefix": "EMBEDMESH_UP"})(up.up)
app.command("embed", epilog=embed.EXAMPLES)(embed.embed)
app.add_typer(models.app, name="models")
app.command("demo")(demo)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)


def main() -> None:
    """Run the command; what the user can put right is one sentence on stderr, never a traceback."""
    try:
        app(prog_name="embedmesh")
    except UserError as error:
        sys.stderr.write(f"embedmesh: {error}\n")
        sys.exit(error.status)


if __name__ == "__main__":
    main()

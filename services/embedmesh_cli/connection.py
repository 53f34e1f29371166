"""How commands reach a mesh that speaks TLS or asks for a key: by variables that all of them read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedmesh import Tls
from embedmesh_cli.console import USAGE, UserError

__all__ = ["credentials"]


def credentials(
    *, tls: bool = False, token: str | None = None, environ: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Give what a client is made with, besides its address.

    Args:
        tls: Speak TLS even where no variable names files.
        token: To send; the variables count where it is None.
        environ: The variables.

    Raises:
        UserError: A file cannot be read, or half of a pair is missing.
    """
    names = [environ.get(f"EMBEDMESH_TLS_{name}") or None for name in ("CA", "CERT", "KEY")]
    try:
        files = Tls(*names) if any(names) else None
        if files is not None:
            files.credentials()  # reads the files, so that one that is missing is told here
    except ValueError as error:
        raise UserError(f"{error} (EMBEDMESH_TLS_CERT, EMBEDMESH_TLS_KEY).", USAGE) from None
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror} (EMBEDMESH_TLS_...).", USAGE) from None
    if token is None:
        token = environ.get("EMBEDMESH_TOKEN") or None
    if token is None and (path := environ.get("EMBEDMESH_TOKEN_FILE")):
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not a text"
            raise UserError(f"{path}: {reason} (EMBEDMESH_TOKEN_FILE).", USAGE) from None
    return {"tls": files or tls, "token": token}

"""Memory that is free, and that the C library keeps all the same."""

from __future__ import annotations

import ctypes
from typing import Final

__all__ = ["trim"]

# Of glibc alone; it takes 0 for "all that is free".
_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Let the system have what is free. Takes milliseconds; does nothing where the C library has no way to."""
    if _malloc_trim:
        _malloc_trim(0)

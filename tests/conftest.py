"""What tests of several packages share."""

from pathlib import Path

import pytest

from embedmesh_cli.starter import ensure_starter


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """Folder of the real text model, made in the user's cache the first time."""
    return ensure_starter(lambda line: None)

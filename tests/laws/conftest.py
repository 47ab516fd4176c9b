from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.laws.forge import Forge, forge


@pytest.fixture(scope="session")
def made() -> Iterator[Forge]:
    """Runs command lines in no time."""
    with forge() as one:
        yield one

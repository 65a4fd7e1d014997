"""What the battery compiles is thrown away after each module."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped() -> Iterator[None]:
    """Hundreds of programs alive in one process exhaust its memory maps in LLVM."""
    yield
    jax.clear_caches()

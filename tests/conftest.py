"""Compiled programs must not pile up over the suite."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs() -> Iterator[None]:
    """Each program maps memory, and Linux limits how many maps a process may have.

    Past some hundreds of programs LLVM says "Cannot allocate memory", with gigabytes
    free.
    """
    yield
    jax.clear_caches()

"""Programs of tests compile quickly, and do not pile up over the suite."""

import os
from collections.abc import Iterator

import jax
import pytest

# Read when the first program is compiled. LLVM's work is most of what tests take, and
# does not change how programs are split, or what they compute.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs() -> Iterator[None]:
    """Each program maps memory, and Linux limits how many maps a process may have.

    Past some hundreds of programs LLVM says "Cannot allocate memory", with gigabytes
    free.
    """
    yield
    jax.clear_caches()

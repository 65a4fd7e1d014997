"""Products with sparse matrices: one operator, a reference that defines it, and faster
forms that are tested against it.
"""

from topkast_jax.ops.api import IMPLEMENTATIONS, compiling_for, sparse_matmul

__all__ = ["IMPLEMENTATIONS", "compiling_for", "sparse_matmul"]

"""Products with sparse matrices: one operator, a reference that defines it, and faster
forms that are tested against it.
"""

from topkast_jax.ops.api import IMPLEMENTATIONS, sparse_matmul

__all__ = ["IMPLEMENTATIONS", "sparse_matmul"]

"""`sparse_matmul`: the operator, and which implementation serves it."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from topkast_jax.layouts.packed import BlockMatrix, Index
from topkast_jax.ops import reference, xla
from topkast_jax.ops.product import Product

IMPLEMENTATIONS: dict[str, Product] = {
    "expanded": reference.expanded,
    "columns": xla.by_columns,
    "blocks": xla.by_blocks,
    "blocks_rows_first": xla.by_blocks_rows_first,
    "batch": xla.by_batch,
    "entries": xla.by_entries,
}
"""By name: the reference; a loop over columns of blocks (fan_in); over blocks, for
activations [features, rows] or [rows, features]; all blocks in one batched product; a loop
over single entries."""

WORTHWHILE = 1024
"""Entries of a block from which a product of its own pays on CPU (32 x 32)."""

FEW = 0.1
"""Densities of A, A and B, of the three products, up to whose sum a loop over single
entries pays on CPU: 97 % forward and backward, or 98 and 95 %."""

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "platform", default=None
)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within it products are chosen for a platform that this process need not have.

    For programs that are lowered ahead of time; what jit has traced before it keeps.

    Args:
      platform: "cpu", "gpu" or "tpu", as `jax.default_backend()` names them.
    """
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def _on_cpu() -> bool:
    return (_PLATFORM.get() or jax.default_backend()) == "cpu"


def sparse_matmul(
    x: Any,
    matrix: BlockMatrix,
    implementation: str | None = None,
    *,
    features_first: bool = False,
) -> Float[Array, "..."]:
    """x @ W for a matrix that is stored by units, W on A forward and its gradient on B.

    Differentiable once, in reverse: the gradient of x uses A, that of the values reaches
    all of B. Only "expanded" forms the dense matrix, and its dense gradient, for the length
    of a product.

    Args:
      x: activations [..., inputs]; or [inputs, rows], see `features_first`.
      matrix: of one slice; its window and inputs are contracted, flattened in C order.
      implementation: a name of `IMPLEMENTATIONS`; None chooses by structure and shape.
      features_first: computes W^T x for x [inputs, rows]: the cheaper form for fan-in
        and for small blocks.
    Returns:
      [..., outputs], or [outputs, rows]; outputs are flattened in C order.
    Raises:
      NotImplementedError: the named implementation does not do this structure.
      ValueError: an unknown name, shapes that do not fit, or a stack of matrices.
    """
    x = jnp.asarray(x)
    name = implementation
    if name is None:
        name = choose(matrix.index, features_first)
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={name!r} is not one of {', '.join(IMPLEMENTATIONS)}"
        )
    grid = matrix.index.here
    inputs, outputs = grid.matrix_shape
    if grid.axes.stack:
        raise ValueError(
            f"a stack of matrices {grid.stack}: take one of them, by scan or vmap"
        )
    dtype = jnp.result_type(x, matrix.values)
    x, values = x.astype(dtype), matrix.values.astype(dtype)
    if (x.shape[0] if features_first else x.shape[-1]) != inputs:
        raise ValueError(
            f"x of shape {x.shape} does not fit a matrix of {inputs} inputs"
        )
    flat = x if features_first else x.reshape(-1, inputs)
    flip = features_first == IMPLEMENTATIONS[name].rows_first
    y = _matmul(name, flat.T if flip else flat, values, matrix.index)
    y = y.T if flip else y
    return y if features_first else y.reshape(*x.shape[:-1], outputs)


def choose(index: Index, features_first: bool = False) -> str:
    """Name of the implementation that `sparse_matmul` takes by itself.

    By structure and the size of blocks; on CPU, where this was measured, batches lose
    to loops, elsewhere loops of small products do.
    """
    grid = index.here
    if grid.plain or grid.structure.scope == "group":
        few = 2 * index.k_forward + index.index.shape[-1] <= FEW * grid.count
        few = few and grid.structure.parts == 1
        return "entries" if few and _on_cpu() else "expanded"
    if _scattered(index):
        return "expanded"
    high, wide = grid.structure.block
    if grid.structure.scope == "column":
        inputs = high * index.k_forward // grid.selections
        return "columns" if inputs * wide >= WORTHWHILE else "expanded"
    if high * wide < WORTHWHILE:
        return "expanded"
    if not _on_cpu():
        return "batch"
    return "blocks" if features_first else "blocks_rows_first"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(name: str, x: Array, values: Array, index: Index) -> Array:
    product = _by_group(name, index)
    return product.forward(x, values, index)


def _matmul_fwd(name: str, x: Array, values: Array, index: Index) -> Any:
    return _matmul(name, x, values, index), (x, values, index)


def _matmul_bwd(name: str, residuals: Any, dy: Array) -> Any:
    x, values, index = residuals
    product = _by_group(name, index)
    dx = product.input_gradient(dy, values, index)
    dvalues = product.weight_gradient(x, dy, index)
    nothing = jax.tree.map(lambda i: jnp.zeros(i.shape, jax.dtypes.float0), index)
    return dx, dvalues.astype(values.dtype), nothing


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _scattered(index: Index) -> bool:
    """Whether the inputs of a group do not follow each other: a window comes before."""
    grid = index.here
    window = math.prod(grid.shape[a] for a in grid.axes.window)
    return grid.structure.parts > 1 and window > 1 and _cuts_inputs(index)


def _cuts_inputs(index: Index) -> bool:
    return index.here.structure.along == "inputs"


def _by_group(name: str, index: Index) -> Product:
    """An implementation, for each group of a matrix at once; see `tk.groups_of`.

    As a batch, so that devices which hold different groups compute their own.
    """
    product, parts = IMPLEMENTATIONS[name], index.here.structure.parts
    if parts == 1 or name == "expanded":  # which knows of groups
        return product
    inputs = _cuts_inputs(index)
    if _scattered(index):
        raise NotImplementedError(
            f"{index.here.structure.name}, along the inputs of a window"
        )

    def cut(x: Array) -> Array:
        if product.rows_first:
            return x.reshape(len(x), parts, -1).swapaxes(0, 1)
        return x.reshape(parts, -1, x.shape[-1])

    def joined(x: Array) -> Array:
        if product.rows_first:
            return x.swapaxes(0, 1).reshape(x.shape[1], -1)
        return x.reshape(-1, x.shape[-1])

    def forward(x: Array, values: Array, index: Index) -> Array:
        if inputs:
            return jax.vmap(product.forward)(cut(x), values, index).sum(0)
        return joined(jax.vmap(product.forward, (None, 0, 0))(x, values, index))

    def input_gradient(dy: Array, values: Array, index: Index) -> Array:
        if not inputs:
            return jax.vmap(product.input_gradient)(cut(dy), values, index).sum(0)
        return joined(jax.vmap(product.input_gradient, (None, 0, 0))(dy, values, index))

    def weight_gradient(x: Array, dy: Array, index: Index) -> Array:
        if inputs:
            return jax.vmap(product.weight_gradient, (0, None, 0))(cut(x), dy, index)
        return jax.vmap(product.weight_gradient, (None, 0, 0))(x, cut(dy), index)

    return Product(forward, input_gradient, weight_gradient)

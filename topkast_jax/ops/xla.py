"""Sparse products as loops over blocks, or over single entries, in plain XLA.

All add in float32. On CPU a transposition around a product can cost more than the product:
XLA fuses it into its neighbour, whose accesses then miss every cache. So the loop over
blocks is there for [features, n] and, `*_rows_first`, for [n, features].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from topkast_jax.layouts.packed import Index
from topkast_jax.ops.product import Product

WRITTEN_OUT = 16
"""Turns up to which a loop is written out: XLA copies what a loop carries."""


def _loop(turn: Any, carry: Any, operands: Any) -> Any:
    turns = len(jax.tree.leaves(operands)[0])
    return lax.scan(turn, carry, operands, unroll=turns <= WRITTEN_OUT)


def _sides(index: Index) -> tuple[int, int, int, int]:
    """(rows of blocks, inputs of a block, columns of blocks, outputs of a block)."""
    grid = index.here
    if grid.plain or grid.structure.scope == "group" or index.index.ndim > 1:
        raise NotImplementedError(
            f"{grid.structure.name}: units of single entries are not multiplied by blocks"
        )
    _, inputs, outputs = grid.whole
    high, wide = grid.structure.block
    return inputs // high, high, outputs // wide, wide


def _parts(x: Array, parts: int, side: int) -> Array:
    """[features, n] as [parts, side, n]."""
    return x.reshape(parts, side, x.shape[-1])


def _joined(x: Array, dtype: Any) -> Array:
    """Inverse of `_parts`."""
    return x.reshape(-1, x.shape[-1]).astype(dtype)


def _panels(x: Array, parts: int) -> Array:
    """[n, features] as [parts, n, side]."""
    return x.reshape(len(x), parts, -1).swapaxes(0, 1)


def _flat(panels: Array, dtype: Any) -> Array:
    """Inverse of `_panels`."""
    return panels.swapaxes(0, 1).reshape(panels.shape[1], -1).astype(dtype)


def _dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    dims = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


# Constant fan-in: one product for each column of blocks.


def _columns(index: Index) -> tuple[int, int, int, int, Array, Array]:
    """Sides, and the rows of each column's blocks: those of A, then the rest of B."""
    sides = _sides(index)
    if index.here.structure.scope != "column":
        raise NotImplementedError("columns of blocks: the structure is not fan_in")
    rows = index.index // sides[2]
    first = rows[: index.k_forward].reshape(sides[2], -1)
    return (*sides, first, rows[index.k_forward :].reshape(sides[2], -1))


def _columns_forward(x: Array, values: Array, index: Index) -> Array:
    r, high, c, wide, rows, _ = _columns(index)
    n = rows.shape[1]
    blocks = values[: index.k_forward].reshape(c, n * high, wide)
    source = _parts(x, r, high)

    def column(_: None, operands: Any) -> tuple[None, Array]:
        block, at = operands
        seen = source.at[at].get(mode="promise_in_bounds", unique_indices=True)
        return None, _dot(block, seen.reshape(n * high, -1), (0, 0))

    _, y = _loop(column, None, (blocks, rows))
    return _joined(y, x.dtype)


def _columns_input_gradient(dy: Array, values: Array, index: Index) -> Array:
    r, high, c, wide, rows, _ = _columns(index)
    n = rows.shape[1]
    blocks = values[: index.k_forward].reshape(c, n * high, wide)

    def column(dx: Array, operands: Any) -> tuple[Array, None]:
        block, at, g = operands
        part = _dot(block, g, (1, 0)).reshape(n, high, -1)
        options: Any = dict(unique_indices=True, mode="promise_in_bounds")
        return dx.at[at].add(part, **options), None

    zero = jnp.zeros((r, high, dy.shape[-1]), jnp.float32)
    operands = (blocks, rows, _parts(dy, c, wide))
    return _joined(_loop(column, zero, operands)[0], dy.dtype)


def _columns_weight_gradient(x: Array, dy: Array, index: Index) -> Array:
    r, high, c, wide, first, rest = _columns(index)
    rows = jnp.concatenate([first, rest], axis=1)
    n = rows.shape[1]
    source = _parts(x, r, high)

    def column(_: None, operands: Any) -> tuple[None, Array]:
        at, g = operands
        seen = source.at[at].get(mode="promise_in_bounds", unique_indices=True)
        part = _dot(seen.reshape(n * high, -1), g, (1, 1))
        return None, part.astype(x.dtype).reshape(n, high, wide)

    _, found = _loop(column, None, (rows, _parts(dy, c, wide)))
    split = first.shape[1]
    parts = (found[:, :split], found[:, split:])
    return jnp.concatenate([part.reshape(-1, high, wide) for part in parts])


by_columns = Product(
    _columns_forward, _columns_input_gradient, _columns_weight_gradient
)


# Any list of blocks: one product for each block.


def _list_forward(x: Array, values: Array, index: Index) -> Array:
    r, high, c, wide = _sides(index)
    at = index.index[: index.k_forward]
    source = _parts(x, r, high)

    def block(y: Array, operands: Any) -> tuple[Array, None]:
        value, row, column = operands
        return y.at[column].add(_dot(value, source[row], (0, 0))), None

    zero = jnp.zeros((c, wide, x.shape[-1]), jnp.float32)
    operands = (values[: index.k_forward], at // c, at % c)
    return _joined(_loop(block, zero, operands)[0], x.dtype)


def _list_input_gradient(dy: Array, values: Array, index: Index) -> Array:
    r, high, c, wide = _sides(index)
    at = index.index[: index.k_forward]
    source = _parts(dy, c, wide)

    def block(dx: Array, operands: Any) -> tuple[Array, None]:
        value, row, column = operands
        return dx.at[row].add(_dot(value, source[column], (1, 0))), None

    zero = jnp.zeros((r, high, dy.shape[-1]), jnp.float32)
    operands = (values[: index.k_forward], at // c, at % c)
    return _joined(_loop(block, zero, operands)[0], dy.dtype)


def _list_weight_gradient(x: Array, dy: Array, index: Index) -> Array:
    r, high, c, wide = _sides(index)
    source, cotangent = _parts(x, r, high), _parts(dy, c, wide)

    def block(_: None, operands: Any) -> tuple[None, Array]:
        row, column = operands
        found = _dot(source[row], cotangent[column], (1, 1))
        return None, found.astype(x.dtype)

    return _loop(block, None, (index.index // c, index.index % c))[1]


by_blocks = Product(_list_forward, _list_input_gradient, _list_weight_gradient)


# The same for [n, features], of which panels of contiguous rows are made.


def _list_forward_rows(x: Array, values: Array, index: Index) -> Array:
    r, _, c, wide = _sides(index)
    at = index.index[: index.k_forward]
    source = _panels(x, r)

    def block(y: Array, operands: Any) -> tuple[Array, None]:
        value, row, column = operands
        return y.at[column].add(_dot(source[row], value, (1, 0))), None

    zero = jnp.zeros((c, len(x), wide), jnp.float32)
    operands = (values[: index.k_forward], at // c, at % c)
    return _flat(_loop(block, zero, operands)[0], x.dtype)


def _list_input_gradient_rows(dy: Array, values: Array, index: Index) -> Array:
    r, high, c, _ = _sides(index)
    at = index.index[: index.k_forward]
    source = _panels(dy, c)

    def block(dx: Array, operands: Any) -> tuple[Array, None]:
        value, row, column = operands
        return dx.at[row].add(_dot(source[column], value, (1, 1))), None

    zero = jnp.zeros((r, len(dy), high), jnp.float32)
    operands = (values[: index.k_forward], at // c, at % c)
    return _flat(_loop(block, zero, operands)[0], dy.dtype)


def _list_weight_gradient_rows(x: Array, dy: Array, index: Index) -> Array:
    r, _, c, _ = _sides(index)
    source, cotangent = _panels(x, r), _panels(dy, c)

    def block(_: None, operands: Any) -> tuple[None, Array]:
        row, column = operands
        found = _dot(source[row], cotangent[column], (0, 0))
        return None, found.astype(x.dtype)

    return _loop(block, None, (index.index // c, index.index % c))[1]


by_blocks_rows_first = Product(
    _list_forward_rows,
    _list_input_gradient_rows,
    _list_weight_gradient_rows,
    rows_first=True,
)


# Any list of blocks at once: as many products in one, then sums. Needs memory for the
# activations of every block, and hardware that likes batches.


def _batch_forward(x: Array, values: Array, index: Index) -> Array:
    r, high, c, _ = _sides(index)
    at = index.index[: index.k_forward]
    source = _parts(x, r, high)
    parts = jnp.einsum(
        "nio,nib->nob",
        values[: index.k_forward],
        source[at // c],
        preferred_element_type=jnp.float32,
    )
    return _joined(jax.ops.segment_sum(parts, at % c, c), x.dtype)


def _batch_input_gradient(dy: Array, values: Array, index: Index) -> Array:
    r, _, c, wide = _sides(index)
    at = index.index[: index.k_forward]
    source = _parts(dy, c, wide)
    parts = jnp.einsum(
        "nio,nob->nib",
        values[: index.k_forward],
        source[at % c],
        preferred_element_type=jnp.float32,
    )
    return _joined(jax.ops.segment_sum(parts, at // c, r), dy.dtype)


def _batch_weight_gradient(x: Array, dy: Array, index: Index) -> Array:
    r, high, c, wide = _sides(index)
    source, cotangent = _parts(x, r, high), _parts(dy, c, wide)
    found = jnp.einsum(
        "nib,nob->nio",
        source[index.index // c],
        cotangent[index.index % c],
        preferred_element_type=jnp.float32,
    )
    return found.astype(x.dtype)


by_batch = Product(_batch_forward, _batch_input_gradient, _batch_weight_gradient)


# Single entries, so many at a time: nothing as large as the matrix is made.

AT_ONCE = 1024
"""Entries of one turn: that many rows of activations are gathered."""


def _entries(index: Index, n: int) -> tuple[Array, Array]:
    """Rows and columns of the first n entries, [turns, AT_ONCE], the last filled up."""
    grid = index.here
    if grid.entries > 1 or grid.structure.parts > 1 or index.index.ndim > 1:
        raise NotImplementedError(f"{grid.structure.name}: units are no single entries")
    rows, columns = grid.rows_and_columns(index.index[:n])
    return _turns(rows), _turns(columns)


def _turns(x: Array) -> Array:
    """[n] as [turns, AT_ONCE], the last turn filled up with zeros."""
    turns = -(-len(x) // AT_ONCE)
    return jnp.pad(x, (0, turns * AT_ONCE - len(x))).reshape(turns, AT_ONCE)


def _sums(values: Array, source: Array, seen: Array, to: Array, features: int) -> Array:
    """[features, n]: at `to`, the sums of the rows `seen` of a source, times values."""

    def turn(y: Array, operands: Any) -> tuple[Array, None]:
        value, at, where = operands
        part = value[:, None] * source.at[at].get(mode="promise_in_bounds")
        return y.at[where].add(part, mode="promise_in_bounds"), None

    zero = jnp.zeros((features, source.shape[-1]), jnp.float32)
    y, _ = lax.scan(turn, zero, (_turns(values), seen, to))
    return y.astype(source.dtype)


def _entries_forward(x: Array, values: Array, index: Index) -> Array:
    rows, columns = _entries(index, index.k_forward)
    outputs = index.here.matrix_shape[1]
    return _sums(values[: index.k_forward], x, rows, columns, outputs)


def _entries_input_gradient(dy: Array, values: Array, index: Index) -> Array:
    rows, columns = _entries(index, index.k_forward)
    inputs = index.here.matrix_shape[0]
    return _sums(values[: index.k_forward], dy, columns, rows, inputs)


def _entries_weight_gradient(x: Array, dy: Array, index: Index) -> Array:
    n = len(index.index)

    def turn(operands: tuple[Array, Array]) -> Array:
        row = x.at[operands[0]].get(mode="promise_in_bounds")
        column = dy.at[operands[1]].get(mode="promise_in_bounds")
        return jnp.sum(row * column, axis=1, dtype=jnp.float32)

    return lax.map(turn, _entries(index, n)).reshape(-1)[:n].astype(x.dtype)


by_entries = Product(
    _entries_forward, _entries_input_gradient, _entries_weight_gradient
)

"""meProp and SWAT: sparse cotangents and sparse activations, by rules of differentiation.

No method for `tk.sparse`: nothing is kept from step to step, what is zero is chosen anew
in every pass. Both compose with sparse weights. Dense arrays with zeros are multiplied,
so neither saves time or memory by itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from topkast_jax.distribution import require_sparsity
from topkast_jax.select import top_k


def meprop(
    y: Any,
    sparsity: float | None = None,
    *,
    k: Any = None,
    axes: tuple[int, ...] = (-1,),
    unified: bool = False,
) -> Float[Array, "..."]:
    """y itself; on the way back, only the k largest entries of its cotangent pass.

    With y = x W and g = dL/dy, a layer's gradients become

        dL/dW = x^T top_k(g)      dL/dx = top_k(g) W^T

    where top_k keeps the k entries of each row that are largest in magnitude, and zeros
    elsewhere. `unified` chooses the same k outputs for all rows: those whose sum of |g|
    over the rows is largest, so that whole columns of W are left out.

    What is kept depends on the cotangent, which no linear map of tangents can express:
    reverse mode and what is built on it (jvp of grad included), `jax.jvp` of this
    function raises.

    Args:
      y: output of a product, before its bias: [..., outputs]. So the bias keeps its whole
        gradient, as in the authors' code.
      sparsity: fraction of zeros in a row, in [0, 1): k = round((1 - sparsity) * size).
      k: instead, how many entries of a row pass, as the paper counts; may be traced.
      axes: of `y` that make up one row. All others are rows, each with k of its own.
      unified: one choice for all rows. Under `jax.vmap` a call sees its own rows only.
    Returns:
      `y`. A NaN in the cotangent counts as the largest, hence is passed on and seen; ties
      go to the first.
    Raises:
      ValueError: both or none of sparsity and k, k outside [1, size of a row], axes that
        `y` does not have, or a `y` that is not of real floats.
    Example:
      >>> g = jnp.array([[1.0, -3.0, 2.0], [0.5, 0.25, -0.25]])
      >>> jax.grad(lambda y: (g * meprop(y, k=1)).sum())(jnp.zeros((2, 3))).tolist()
      [[0.0, -3.0, 0.0], [0.5, 0.0, 0.0]]
      >>> def loss(y):
      ...     return (g * meprop(y, k=1, unified=True)).sum()
      >>> jax.grad(loss)(jnp.zeros((2, 3))).tolist()
      [[0.0, -3.0, 0.0], [0.0, 0.25, 0.0]]

    Reference:
      Sun et al., "meProp", 2017, arXiv 1706.06197; unified over the minibatch: Sun et
      al., "Training Simplification and Model Simplification", 2017, arXiv 1711.06528.
    """
    y = _floats(y, "meprop", "y")
    row = _within(axes, y.shape, "meprop")
    size = math.prod(y.shape[a] for a in row)
    count = _count(sparsity, k, size, "meprop")
    if _whole(count, size):
        return y
    return _meprop(row, unified, y, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _meprop(row: tuple[int, ...], unified: bool, y: Array, k: Any) -> Array:
    del row, unified, k
    return y


def _meprop_fwd(row: tuple[int, ...], unified: bool, y: Array, k: Any) -> Any:
    # Not through the rule again: jvp of grad comes here with tangents.
    del row, unified
    return y, k


def _meprop_bwd(row: tuple[int, ...], unified: bool, k: Any, g: Any) -> Any:
    g = jnp.asarray(g)
    scores = _magnitude(g)
    if unified:
        rows = tuple(a for a in range(g.ndim) if a not in row)
        wide = jnp.promote_types(g.dtype, jnp.float32)
        scores = jnp.sum(scores, rows, dtype=wide, keepdims=True)
    return jnp.where(top_k(scores, k, row), g, jnp.zeros_like(g)), None


_meprop.defvjp(_meprop_fwd, _meprop_bwd)


def swat(
    x: Any,
    w: Any,
    sparsity: float,
    *,
    activation_sparsity: float | None = None,
    axes: tuple[int, ...] | None = None,
    product: Callable[[Any, Any], Any] = jnp.matmul,
) -> Array:
    """x W with the largest weights only, and a weight gradient from the largest activations.

        y = x S(W)      dL/dx = g S(W)^T      dL/dW = T(x)^T g      g = dL/dy

    S and T keep the k largest entries in magnitude, of all of W and of all of x, and zeros
    elsewhere. The gradient of the weights is dense: those that S left out are trained too,
    and may return. Backward needs S(W) and T(x), never x.

    Passes jvp, vjp, hvp, remat, vmap and scan: the tangent is that of the product at T(x)
    and S(W).

    Args:
      x: activations; T sees all of the batch. Under `jax.vmap`, one example's.
      w: weights, one layer's.
      sparsity: fraction of zeros in S(W), in [0, 1); k = round((1 - sparsity) * size). 0
        where the weights are sparse already, as those of `tk.sparsify`.
      activation_sparsity: fraction of zeros in T(x); None: as `sparsity`.
      axes: of `x` that make up one selection of T; None: all, as in the paper.
      product: `(x, w) -> y`, linear in each: an einsum, a convolution. It must not close
        over traced arrays.
    Returns:
      product(x, S(W)). Ties go to the first. A NaN counts as the largest, hence is kept
      and seen.
    Raises:
      ValueError: a sparsity outside [0, 1) or one that keeps nothing, axes that `x` does
        not have, or arrays that are not of real floats.
    Example:
      >>> x = jnp.array([[1.0, -2.0], [3.0, 0.0]])
      >>> w = jnp.array([[5.0, 1.0], [-2.0, 4.0]])
      >>> swat(x, w, 0.5).tolist()
      [[5.0, -8.0], [15.0, 0.0]]
      >>> jax.grad(lambda w: swat(x, w, 0.5).sum())(w).tolist()
      [[3.0, 3.0], [-2.0, -2.0]]
      >>> jax.grad(lambda x: swat(x, w, 0.5).sum())(x).tolist()
      [[5.0, 4.0], [5.0, 4.0]]

    Reference:
      Raihan and Aamodt, "Sparse Weight Activation Training", 2020, arXiv 2001.01969.
    """
    x, w = _floats(x, "swat", "x"), _floats(w, "swat", "w")
    within = _within(range(x.ndim) if axes is None else axes, x.shape, "swat")
    size = math.prod(x.shape[a] for a in within)
    of_x = sparsity if activation_sparsity is None else activation_sparsity
    k_w = _count(sparsity, None, w.size, "swat: weights")
    k_x = _count(of_x, None, size, "swat: activations")
    if not _whole(k_w, w.size):
        w = _straight_through(w, top_k(_magnitude(w), k_w))
    if _whole(k_x, size):
        return product(x, w)
    return _product(product, within, k_x, x, w)


@jax.custom_jvp
def _straight_through(w: Array, kept: Array) -> Array:
    """S(W); the tangent passes everywhere."""
    return jnp.where(kept, w, jnp.zeros_like(w))


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    return _straight_through(*primals), tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _product(
    product: Callable[[Any, Any], Any],
    within: tuple[int, ...],
    k: int,
    x: Array,
    w: Array,
) -> Array:
    """A product that is differentiated at T(x). T is computed where a gradient is."""
    del within, k
    return product(x, w)


def _product_jvp(product: Any, within: Any, k: Any, primals: Any, tangents: Any) -> Any:
    (x, w), (dx, dw) = primals, tangents
    y = _product(product, within, k, x, w)
    # A zero tangent that is written out would cost a product of its own.
    dy = jnp.zeros_like(y) if isinstance(dx, SymbolicZero) else product(dx, w)
    if isinstance(dw, SymbolicZero):
        return y, dy
    kept = top_k(_magnitude(x), k, within)
    of_weights = product(jnp.where(kept, x, jnp.zeros_like(x)), dw)
    return y, of_weights if isinstance(dx, SymbolicZero) else dy + of_weights


_product.defjvp(_product_jvp, symbolic_zeros=True)


def _magnitude(x: Array) -> Array:
    """|x|, a NaN as infinity: `top_k` puts NaN last, and what is left out is not seen."""
    x = jax.lax.stop_gradient(x)
    return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))


def _floats(x: Any, name: str, what: str) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: {what} must be real floats, not {x.dtype}")
    return x


def _within(axes: Any, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Axes counted from the front, ascending."""
    rank = len(shape)
    found = sorted(a + rank if a < 0 else a for a in axes)
    if len(set(found)) < len(found) or not set(found) <= set(range(rank)):
        raise ValueError(
            f"{name}: axes={tuple(axes)} are not axes of an array of shape {shape}"
        )
    return tuple(found)


def require_amount(sparsity: Any, k: Any, name: str) -> None:
    """Raises ValueError unless one of sparsity, in [0, 1), and k, at least 1, is given."""
    if (sparsity is None) == (k is None):
        raise ValueError(
            f"{name}: give sparsity or k, one of the two; got sparsity={sparsity!r}, "
            f"k={k!r}"
        )
    if k is None:
        require_sparsity(sparsity, f"{name}: sparsity")
    elif isinstance(k, bool | float):
        raise ValueError(f"{name}: k={k!r} must be an integer: entries that are kept")
    elif isinstance(k, int | np.integer) and k < 1:
        raise ValueError(f"{name}: k={k} would keep nothing; the least is 1")


def _count(sparsity: Any, k: Any, size: int, name: str) -> Any:
    """How many of `size` entries are kept."""
    require_amount(sparsity, k, name)
    if k is None:
        k = round((1 - sparsity) * size)
        if k < 1 and size:
            raise ValueError(
                f"{name}: sparsity={sparsity} of {size} entries would keep none; at "
                f"most {1 - 1 / size:.6g} keeps one"
            )
    elif isinstance(k, int | np.integer) and k > size:
        raise ValueError(
            f"{name}: k={k} is more than the {size} entries that there are"
        )
    return k


def _whole(k: Any, size: int) -> bool:
    """Whether everything is kept, and this is known."""
    return isinstance(k, int | np.integer) and k == size

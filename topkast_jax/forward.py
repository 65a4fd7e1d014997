"""The weights that the network sees: alpha, differentiable or for export."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from topkast_jax import _trees
from topkast_jax._types import Masks, PyTree
from topkast_jax.layouts.packed import BlockMatrix, Index, Probed, expand, scatter


@jax.custom_jvp
def _on_forward_set(theta: Any, forward: Any, seen: Any, shrink: Any) -> Any:
    """alpha; the tangent of theta passes on `seen`, B with P."""
    del seen
    return _alpha(theta, forward, shrink)


@_on_forward_set.defjvp
def _on_forward_set_jvp(primals: Any, tangents: Any) -> Any:
    theta, forward, seen, shrink = primals
    tangent = tangents[0]
    # where, never a product: 0 * NaN would let a masked NaN through.
    return (
        _on_forward_set(theta, forward, seen, shrink),
        jnp.where(seen, tangent, jnp.zeros_like(tangent)),
    )


def _alpha(theta: Any, forward: Any, shrink: Any) -> Any:
    """theta on A, its magnitude less `shrink`; zero elsewhere."""
    if shrink is not None:
        shrunk = jnp.maximum(jnp.abs(theta) - shrink, 0)
        theta = (jnp.sign(theta) * shrunk).astype(theta.dtype)
    return jnp.where(forward, theta, jnp.zeros_like(theta))


def sparsify(theta: PyTree, masks: Masks, expanded: bool | None = None) -> PyTree:
    """alpha: theta on A and exact zeros elsewhere, with a gradient that reaches B and P.

    The forward pass, and so the gradient of the activations, uses A only. The gradient
    with respect to theta is dL/dalpha on B and P, zero elsewhere: entries of B outside A
    are trained by the gradient at alpha, as in Top-KAST (arXiv 2106.03517). Passes jvp,
    vjp, hvp, remat, vmap and scan.

    Args:
      theta: parameters.
      masks: `tk.masks(opt_state)`.
      expanded: whether packed parameters become dense arrays, or `BlockMatrix`, which
        `tk.ops.sparse_matmul` takes; None: as their layout is meant.
    Returns:
      Tree like `theta`; dense parameters are passed on as they are.
    Example:
      >>> import topkast_jax as tk
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]]), "bias": jnp.zeros(2)}
      >>> tx = tk.sparse(optax.sgd(0.1), tk.top_kast(0.5, 0.25))
      >>> masks = tk.masks(tx.init(params))
      >>> sparsify(params, masks)["kernel"].tolist()
      [[0.0, 0.0], [3.0, -4.0]]
      >>> jax.grad(lambda theta: sparsify(theta, masks)["kernel"].sum())(params)["kernel"].tolist()
      [[0.0, 1.0], [1.0, 1.0]]
    """

    def leaf(forward: Any, backward: Any, probe: Any, shrink: Any, value: Any) -> Any:
        if forward is None:
            return value
        if isinstance(value, Probed):
            return expand(value.values, forward) + value.delta
        if isinstance(forward, Index):
            by_unit = forward.multiplied if expanded is None else not expanded
            return BlockMatrix(value, forward) if by_unit else expand(value, forward)
        seen = backward if probe is None else backward | probe
        return _on_forward_set(value, forward, seen, shrink)

    return jax.tree.map(leaf, *masks[:3], _shrink(masks), theta, is_leaf=_is_leaf)


def export(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """Dense arrays with exact zeros off A: what evaluation, EMA and serving should see.

    Args:
      params: the parameters that are trained (theta; or alpha under `tk.drop_in`).
      opt_state: any optimizer state that contains `tk.sparse`.
    Returns:
      Tree like `params`.
    Raises:
      ValueError: no `tk.sparse` in the state.
    Example:
      >>> import topkast_jax as tk
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]]), "bias": jnp.zeros(2)}
      >>> tx = tk.sparse(optax.sgd(0.1), tk.top_kast(0.5, 0.25))
      >>> export(params, tx.init(params))["kernel"].tolist()
      [[0.0, 0.0], [3.0, -4.0]]
    """
    masks = _trees.masks(opt_state)
    return apply_masks(params, masks.forward, _shrink(masks))


def apply_masks(params: PyTree, forward: PyTree, shrink: PyTree = None) -> PyTree:
    """`params` on a tree of masks, exact zeros elsewhere; None leaves a leaf as it is."""

    def leaf(mask: Any, less: Any, param: Any) -> Any:
        if mask is None:
            return param
        if isinstance(mask, Index):
            return expand(param, mask)
        return _alpha(param, mask, less)

    less = _shrink(Masks(forward, None, None, shrink))
    return jax.tree.map(leaf, forward, less, params, is_leaf=_is_leaf)


def _shrink(masks: Masks) -> PyTree:
    """The tree of what alpha is smaller by, also where all of it was left out."""
    if masks.shrink is not None:
        return masks.shrink
    return jax.tree.map(lambda _: None, masks.forward, is_leaf=_is_leaf)


def _is_leaf(node: Any) -> bool:
    return node is None or isinstance(node, Index)


def dense_masks(opt_state: PyTree) -> Masks:
    """Masks of every `tk.sparse` inside an optimizer state, bool arrays in any layout.

    Args:
      opt_state: state of a transformation that contains `tk.sparse`, however deep; or
        its masks, from `tk.masks`.
    Returns:
      `Masks` of bool arrays, each of its parameter's shape; P too, all False where the
      method never probes. None where a parameter is dense.
    Raises:
      ValueError: as `tk.masks`.
    Example:
      >>> import topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.rigl(0.75))
      >>> state = tx.init({"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)})
      >>> jax.tree.map(jnp.shape, dense_masks(state).probe)
      {'bias': None, 'kernel': (4, 4)}
    """
    found = opt_state if isinstance(opt_state, Masks) else _trees.masks(opt_state)

    def marks(index: Index, some: Array) -> Array:
        # Marks made from the index, so that they are sharded like it.
        there = index.index.reshape(*index.index.shape, *(1 for _ in index.grid.unit))
        return scatter(jnp.broadcast_to(some & (there >= 0), index.stored), index)

    def forward(mask: Any) -> Any:
        return marks(mask, mask.in_forward) if isinstance(mask, Index) else mask

    def backward(first: Any, second: Any) -> Any:
        return marks(first, jnp.array(True)) if isinstance(first, Index) else second

    def everywhere(first: Any, mask: Any, seen: Any) -> Any:
        if mask is None:
            return None
        if isinstance(first, Index) and seen is not None:
            return listed(first, seen)
        return jnp.broadcast_to(False if seen is None else seen, mask.shape)

    a = jax.tree.map(forward, found.forward, is_leaf=_is_leaf)
    b = jax.tree.map(backward, found.forward, found.backward, is_leaf=_is_leaf)
    p = jax.tree.map(everywhere, found.forward, a, found.probe, is_leaf=_is_leaf)
    return Masks(a, b, p)


def listed(index: Index, numbers: Any) -> Array:
    """Units of a parameter, given by number, as a bool array of its shape; -1 for none."""
    grid = index.grid
    flat = numbers.reshape(grid.whole[0], -1)
    flat = jnp.where(flat < 0, grid.count, flat)
    marks = jnp.zeros((grid.whole[0], grid.count), bool)
    marks = jax.vmap(lambda m, at: m.at[at].set(True, mode="drop"))(marks, flat)
    shaped = marks.reshape(*marks.shape, *(1 for _ in grid.unit))
    found: Array = grid.from_units(jnp.broadcast_to(shaped, (*marks.shape, *grid.unit)))
    return found

"""What a run is made of: sparsity, churn, overlap, dead units, FLOPs, bytes.

All take masks as `tk.masks` gives them, None where a parameter is dense. `overlap`,
`ever_active`, `reservoir_used` and `dead_units` look at single entries and want bool
arrays: `tk.dense_masks` in the packed layouts. Counts are exact integers; the functions
marked "host" return Python numbers.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from topkast_jax import _trees
from topkast_jax._trees import AxesRules
from topkast_jax._types import Masks, PyTree
from topkast_jax.layouts.packed import Index


def _named(tree: PyTree) -> dict[str, Any]:
    """`{path: mask}` of the sparse leaves."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_index)[0]
    return {_trees.path_name(keys): mask for keys, mask in flat}


def _is_index(node: Any) -> bool:
    return isinstance(node, Index)


def _nnz(mask: Array) -> int:
    return int(jnp.sum(mask, dtype=jnp.int32))


def _sizes(masks: Masks) -> dict[str, tuple[int, int, int]]:
    """`{path: (|A|, |B|, size)}` in any layout."""
    backward = _named(masks.backward)
    found = {}
    for path, mask in _named(masks.forward).items():
        if isinstance(mask, Index):
            each = mask.grid.whole[0] * mask.grid.entries
            n = mask.index.shape[-1]
            size = math.prod(mask.grid.shape)
            found[path] = (each * mask.k_forward, each * n, size)
        else:
            found[path] = (_nnz(mask), _nnz(backward[path]), mask.size)
    return found


def sparsity(masks: Masks) -> dict[str, tuple[float, float]]:
    """`{path: (of A, of B)}`, fractions of zeros, with "total" over sparse leaves; host.

    Example:
      >>> import topkast_jax as tk
      >>> tx = tk.sparse(optax.adam(0.1), tk.top_kast(0.75, 0.5))
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
      >>> masks = tk.masks(tx.init(params))
      >>> sparsity(masks)
      {'kernel': (0.75, 0.5), 'total': (0.75, 0.5)}
    """
    counts: dict[str, tuple[int, ...]] = dict(_sizes(masks))
    counts["total"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    return {path: (1 - a / n, 1 - b / n) for path, (a, b, n) in counts.items()}


def churn(before: Masks, after: Masks) -> Float[Array, ""]:
    """Share of A that was not in A before, over all sparse leaves; a jit-able scalar."""
    old, new = _named(before.forward), _named(after.forward)
    entered = total = jnp.float32(0)
    for path, mask in new.items():
        if isinstance(mask, Index):
            each = mask.grid.entries
            mask, was = _first(mask), _first(old[path])
            stayed = jax.vmap(jnp.isin)(mask, was)
            entered += each * _float_count(~stayed)
            total += each * mask.size
        else:
            entered += _float_count(mask & ~old[path])
            total += _float_count(mask)
    return entered / total


def _first(index: Index) -> Array:
    """Units of A, [slices, n_A]."""
    return index.index[..., : index.k_forward].reshape(-1, index.k_forward)


def _float_count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)


def overlap(a: PyTree, b: PyTree) -> dict[str, float]:
    """`{path: |a and b| / |a or b|}` of two trees of masks, with "total"; host.

    Example:
      >>> overlap({"w": jnp.array([True, True])}, {"w": jnp.array([True, False])})
      {'w': 0.5, 'total': 0.5}
    """
    first, second = _named(a), _named(b)
    counts: dict[str, tuple[int, ...]] = {
        path: (_nnz(mask & second[path]), _nnz(mask | second[path]))
        for path, mask in first.items()
    }
    counts["total"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    return {path: both / max(1, either) for path, (both, either) in counts.items()}


def ever_active(ever: PyTree, masks: Masks) -> PyTree:
    """Union of a tree of masks with A; start from the first A and carry it along."""
    return jax.tree.map(jnp.logical_or, ever, masks.forward)


def exploration_rate(opt_state: optax.OptState) -> Float[Array, ""]:
    """R_s, the share of entries that were ever in A, in any layout; a jit-able scalar.

    Of the parameters whose method remembers it, as a bool array: `tk.rigl_itop`. For
    other methods carry `ever_active` along.

    Raises:
      ValueError: no method remembers what was ever in A.
    Example:
      >>> import topkast_jax as tk
      >>> tx = tk.sparse(optax.adam(0.1), tk.rigl_itop(0.75))
      >>> float(exploration_rate(tx.init({"kernel": jnp.ones((4, 4))})))
      0.25

    Reference:
      Liu et al., 2021, arXiv 2102.02887, section 3.
    """
    memories = [state.sparse_memory for state in _trees.find_states(opt_state)]
    ever = [x for x in jax.tree.leaves(memories) if x.dtype == jnp.bool_]
    if not ever:
        raise ValueError(
            "no method here remembers what was ever in A: use tk.rigl_itop, or carry "
            "tk.metrics.ever_active along"
        )
    size = sum(x.size for x in ever)
    return jnp.asarray(sum(_float_count(x) for x in ever) / jnp.float32(size))


def reservoir_used(first: PyTree, ever: PyTree) -> Float[Array, ""]:
    """Share of the entries outside the first A that have been in A since; a scalar."""
    outside = sum(_float_count(~f) for f in jax.tree.leaves(first))
    came = jax.tree.map(lambda f, e: _float_count(~f & e), first, ever)
    return jnp.asarray(sum(jax.tree.leaves(came)) / jnp.maximum(outside, 1))


def dead_units(masks: Masks, axes: AxesRules | None = None) -> dict[str, int]:
    """`{path: output units without a single input in A}`, over all slices; host.

    Example:
      >>> import topkast_jax as tk
      >>> tx = tk.sparse(optax.adam(0.1), tk.top_kast(0.75, 0.5))
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
      >>> masks = tk.masks(tx.init(params))
      >>> dead_units(masks)  # equal magnitudes: the first row is in A, whole
      {'kernel': 0}
    """
    named = _named(masks.forward)
    rules = AxesRules({}) if axes is None else axes
    roles = rules.resolve({path: mask.shape for path, mask in named.items()})
    return {
        path: _nnz(~jnp.any(mask, axis=roles[path].window + roles[path].inputs))
        for path, mask in named.items()
    }


class Flops(NamedTuple):
    """Multiplications and additions of one training step in matrix products.

    Attributes:
      dense: of the dense network: three products of equal cost.
      forward: of the forward pass, with A only.
      train: of the step: forward with A, gradient of activations with A, of weights
        with B (and P in a step that probes everything).
    """

    dense: float
    forward: float
    train: float

    @property
    def fraction(self) -> float:
        """(2 f_fwd + f_bwd) / 3 of the dense step. Analytic: says nothing of time."""
        return self.train / self.dense


def flops(params: PyTree, masks: Masks | None, uses: Mapping[str, int]) -> Flops:
    """FLOPs of the next training step; host.

    Args:
      params: the parameters, or their shapes.
      masks: `tk.masks(opt_state)`; None for a dense network.
      uses: `{path: times}` each entry of a weight is used in one step, as a rule the
        tokens of the batch (times output positions of a convolution). Weights left out
        count as free.
    Returns:
      `Flops`.
    Raises:
      ValueError: `uses` names a parameter that does not exist.
    Example:
      >>> import topkast_jax as tk
      >>> tx = tk.sparse(optax.adam(0.1), tk.top_kast(0.75, 0.5))
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
      >>> masks = tk.masks(tx.init(params))
      >>> flops(params, masks, {"kernel": 100}).fraction  # (2 * 0.25 + 0.5) / 3
      0.3333333333333333
    """
    sizes = {p.path: p.array.size for p in _trees.parameters(params)[0]}
    _trees.require_matches(uses, list(sizes), "uses")
    counts: dict[str, tuple[int, int, int]] = {}
    backward: dict[str, Any] = {}
    probe: dict[str, Any] = {}
    if masks is not None:
        counts = _sizes(masks)
        backward, probe = _named(masks.backward), _named(masks.probe)
    dense = sparse_forward = train = 0.0
    for path, times in uses.items():
        size = a = b = sizes[path]
        if path in counts:
            a, b, size = counts[path]
        if path in backward and path in probe:
            b = _nnz(backward[path] | probe[path])
        dense += 3 * 2 * size * times
        sparse_forward += 2 * a * times
        train += 2 * (2 * a + b) * times
    return Flops(dense, sparse_forward, train)


class Bytes(NamedTuple):
    """Bytes of the arrays a training run keeps."""

    parameters: int
    masks: int
    optimizer: int


def bytes_of(params: PyTree, opt_state: optax.OptState) -> Bytes:
    """Bytes of parameters, of masks, and of the rest of the optimizer state.

    Args:
      params: arrays, or their shapes.
      opt_state: any optimizer state, with or without `tk.sparse`, or its shapes.
    Example:
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> bytes_of(params, optax.adam(0.1).init(params))
      Bytes(parameters=64, masks=0, optimizer=132)
    """
    masks = sum(_bytes(state.sparse_masks) for state in _trees.find_states(opt_state))
    return Bytes(_bytes(params), masks, _bytes(opt_state) - masks)


def _bytes(tree: PyTree) -> int:
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))

"""Sparse products inside unmodified NNX models."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from topkast_jax._types import PyTree
from topkast_jax.flax import contraction, nnx_observed
from topkast_jax.flax.nnx_activations import meprop, swat
from topkast_jax.flax.slots import Kernel, Note, put_product, why_not
from topkast_jax.layouts.packed import BlockMatrix, Index, expand
from topkast_jax.ops.api import choose
from topkast_jax.statistics import Tapped

__all__ = ["meprop", "merge", "routes", "swat"]


def merge(graphdef: nnx.GraphDef, *states: PyTree) -> Any:
    """`nnx.merge` for states that hold `tk.BlockMatrix` or `tk.Tapped` kernels.

    nnx.Linear, nnx.LinearGeneral, nnx.Einsum and 1x1 nnx.Conv layers of the model
    multiply by units, also inside nnx.scan and nnx.remat; the kernels of other layers
    are expanded. `routes` tells which is which. Where the model reads the kernel of such
    a layer in another way than by calling it, it gets the expanded array.

    Where a kernel has taps (`tk.tap`), the same layers and any nnx.Conv give them
    statistics as their gradient. Taps of a layer that is not called stay zero.

    The classes of the layers are left as they are: the product is put into the slots for
    it that NNX layers have (`dot_general`, `einsum_op`, `conv_general_dilated`).

    Args:
      graphdef: from `nnx.split`.
      *states: all of them, as for `nnx.merge`.
    Returns:
      The model.
    Raises:
      ValueError: a kernel with taps is that of no such layer, or its stack axes are not
        declared; when the model is called: it is read in another way than by calling
        its layer, or the layer's product has no statistics. Path and layer are named.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> x = jnp.ones((2, 8))
      >>> graphdef, params = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Param)
      >>> tx = tk.sparse(optax.sgd(0.1), tk.static(0.5), layout="block")
      >>> theta, opt_state, _ = tk.start(tx, params)
      >>> alpha = tk.sparsify(theta, tk.masks(opt_state))
      >>> dense = nnx.merge(graphdef, tk.export(theta, opt_state))
      >>> bool(jnp.allclose(merge(graphdef, alpha)(x), dense(x)))
      True
    """
    return _merge(graphdef, states, lambda path, index: _ignore)


def routes(
    graphdef: nnx.GraphDef, states: Sequence[PyTree], *args: Any, **kwargs: Any
) -> dict[str, str]:
    """How each sparse parameter of a model is multiplied, by path.

    From one abstract call of the model.

    Args:
      graphdef: from `nnx.split`.
      states: those that `merge` takes; shapes suffice.
      *args: of the call; shapes suffice.
      **kwargs: of the call.
    Returns:
      The name of an implementation (`tk.ops.IMPLEMENTATIONS`), or "expanded: " and why
      the layer cannot multiply by units.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> graphdef, params = nnx.split(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.Param)
      >>> method = tk.static(0.5, structure=tk.fan_in(1, 64))
      >>> tx = tk.sparse(optax.sgd(0.1), method, layout="block")
      >>> theta, opt_state, _ = tk.start(tx, params)
      >>> alpha = tk.sparsify(theta, tk.masks(opt_state))
      >>> routes(graphdef, [alpha], jnp.ones((2, 64)))
      {'kernel': 'columns'}
    """
    reasons: dict[str, str] = {}
    indices: dict[str, Index] = {}

    def watch(path: str, index: Index) -> Note:
        indices[path] = index

        def note(reason: str) -> None:
            reasons[path] = reasons.get(path) or reason

        return note

    def call(states: Any, *args: Any, **kwargs: Any) -> None:
        _merge(graphdef, states, watch)(*args, **kwargs)

    contraction.abstract_call(call, tuple(states), *args, **kwargs)
    found = {}
    for path, index in indices.items():
        reason = reasons.get(path, "no layer of the model multiplies by it")
        found[path] = f"expanded: {reason}" if reason else choose(index)
    return found


def _ignore(reason: str) -> None:
    del reason


def _merge(
    graphdef: nnx.GraphDef,
    states: Sequence[PyTree],
    watch: Callable[[str, Index], Note],
) -> Any:
    """`merge`; `watch(path, index)` gives what is told why a kernel is expanded."""

    def held(node: Any) -> Any:
        if isinstance(node, Tapped):
            return dataclasses.replace(node, value=held(node.value))
        return Kernel(node.values, node.index) if _is_block(node) else node

    model = nnx.merge(graphdef, *jax.tree.map(held, states, is_leaf=_is_special))
    nodes = list(nnx.iter_graph(model))
    kernels = {
        id(node): (node, watch("/".join(map(str, path)), _matrix(node).index))
        for path, node in nodes
        if isinstance(node, nnx.Variable) and _is_block(_matrix(node))
    }
    served = set()
    for _, layer in nodes:
        param: Any = getattr(layer, "kernel", None)
        if isinstance(layer, nnx.Variable) or id(param) not in kernels:
            continue
        note = kernels[id(param)][1]
        reason = why_not(layer, _matrix(param).index)
        if reason:
            note(reason)
        else:
            served.add(id(param))
            put_product(layer, note)
    for key, (param, _) in kernels.items():
        if key not in served:
            matrix, value = _matrix(param), param.get_raw_value()
            dense = expand(matrix.values, matrix.index)
            tapped = isinstance(value, Tapped)
            param.set_raw_value(
                dataclasses.replace(value, value=dense) if tapped else dense
            )
    nnx_observed.observe(model)
    return model


def _matrix(param: nnx.Variable) -> Any:
    """The value of a parameter, without taps."""
    value = param.get_raw_value()
    return value.value if isinstance(value, Tapped) else value


def _is_block(node: Any) -> bool:
    return isinstance(node, BlockMatrix)


def _is_special(node: Any) -> bool:
    return isinstance(node, BlockMatrix | Tapped)

"""meProp and SWAT inside unmodified NNX models."""

import math
from typing import Any

from flax import nnx

from topkast_jax._trees import Where
from topkast_jax.activations import require_amount
from topkast_jax.distribution import Distribution, uniform
from topkast_jax.flax import products
from topkast_jax.flax.activations import (
    Layer,
    Rules,
    choose,
    einsum_layer,
    meprop_rules,
    swat_rules,
)
from topkast_jax.flax.slots import rank_of, slot_of

_PRODUCTS = {
    "dot_general": products.dot_general,
    "einsum_op": products.einsum,
    "conv_general_dilated": products.convolution,
}


def meprop(
    model: Any,
    sparsity: float | None = None,
    *,
    k: int | None = None,
    unified: bool = False,
    where: Where | None = None,
) -> Any:
    """A copy of an NNX model, its layers with meProp in their backward pass.

    What multiplies is a static part of the model, so `nnx.split` keeps it in the graphdef:
    change first, then split. Under `tk.flax.nnx.merge` kernels of these layers that are
    `tk.BlockMatrix` are expanded.

    Args:
      model: any NNX module.
      sparsity: as in `tk.flax.meprop`.
      k: likewise.
      unified: likewise.
      where: likewise; layers are nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv.
    Returns:
      The copy. It has parameters of its own, equal to the model's.
    Raises:
      ValueError: amounts that make no sense, a pattern that matches no layer, a layer
        that cannot; a row that is too short, when it is called.
    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = meprop(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), k=1)
      >>> def loss(model):
      ...     y = model(jnp.array([[1.0, 2.0]]))
      ...     return (y * jnp.array([1.0, -3.0, 2.0])).sum()
      >>> nnx.grad(loss)(model)["kernel"][...].tolist()
      [[0.0, -3.0, 0.0], [0.0, -6.0, 0.0]]
    """
    require_amount(sparsity, k, "tk.flax.nnx.meprop")
    return _changed(model, where, meprop_rules(sparsity, k, unified))


def swat(
    model: Any,
    sparsity: float,
    *,
    activation_sparsity: float | None = None,
    distribution: Distribution = uniform,
    where: Where | None = None,
) -> Any:
    """A copy of an NNX model, its layers multiplying as `tk.swat` does.

    Args:
      model: any NNX module.
      sparsity: as in `tk.flax.swat`.
      activation_sparsity: likewise.
      distribution: likewise.
      where: as in `meprop`.
    Returns:
      As `meprop`.
    Raises:
      ValueError: as `meprop`.
    Example:
      >>> import jax.numpy as jnp
      >>> model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
      >>> model.kernel[...] = jnp.array([[5.0, 1.0], [-2.0, 4.0]])
      >>> swat(model, 0.5)(jnp.array([[1.0, -2.0]])).tolist()
      [[5.0, -8.0]]
    """
    rules = swat_rules(sparsity, activation_sparsity, distribution, "tk.flax.nnx.swat")
    return _changed(model, where, rules)


def _changed(model: Any, where: Where | None, rules: Rules) -> Any:
    model = nnx.merge(*nnx.split(model))
    layers = {
        "/".join((*map(str, path), "kernel")): node
        for path, node in nnx.iter_graph(model)
        if isinstance(getattr(node, "kernel", None), nnx.Variable)
    }
    shapes = choose({path: _layer(node) for path, node in layers.items()}, where)
    for path, rule in rules(shapes).items():
        slot = slot_of(layers[path])
        assert slot is not None
        setattr(layers[path], slot.name, _PRODUCTS[slot.name](rule, path))
    return model


def _layer(layer: Any) -> Layer:
    shape, slot = layer.kernel.shape, slot_of(layer)
    if slot is None:
        name = type(layer).__name__
        return Layer(
            shape, f"{name} is not a Linear, LinearGeneral, Einsum or Conv layer"
        )
    own = getattr(layer, slot.name) not in slot.defaults
    if own or getattr(layer, "dot_general_cls", None):
        return Layer(shape, f"the layer has a {slot.name} of its own")
    shape = shape[-rank_of(layer) :]
    if isinstance(layer, nnx.Einsum):
        return einsum_layer(layer.einsum_str.replace(" ", ""), shape)
    if isinstance(layer, nnx.LinearGeneral):
        outputs = math.prod(layer.out_features)
        shape = (math.prod(shape) // outputs, outputs)
    return Layer(shape, "")

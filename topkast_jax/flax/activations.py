"""meProp and SWAT inside unmodified Linen models."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from topkast_jax import _trees
from topkast_jax._trees import Where
from topkast_jax.activations import require_amount
from topkast_jax.distribution import Distribution, require_sparsity, uniform
from topkast_jax.flax import contraction, layers, linen, products
from topkast_jax.flax.products import MeProp, Rule, Swat


class Layer(NamedTuple):
    """What one layer multiplies by.

    Attributes:
      shape: of its kernel, (window..., inputs, outputs), without a stack.
      refused: why its product cannot be differentiated in another way, or "".
    """

    shape: tuple[int, ...]
    refused: str


Rules = Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Rule]]
"""`{path: shape of the kernel}` of the chosen layers -> `{path: rule}`."""


def meprop(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    k: int | None = None,
    unified: bool = False,
    where: Where | None = None,
) -> Callable[..., Any]:
    """`model.apply`, its layers with meProp in their backward pass; see `tk.meprop`.

    A row is one place's outputs: the features of nn.Dense, nn.DenseGeneral, nn.Einsum,
    and of nn.Conv at one position. Biases keep their whole gradient.

    Args:
      model: any Linen module.
      sparsity: fraction of a row that is zeroed; in each layer of its own width.
      k: instead, how many entries of a row pass, in every layer.
      unified: one choice for all rows of a batch.
      where: layers, by the paths of their kernels, as in `tk.sparse`: patterns, or a
        predicate `(path, shape)`; None: all layers that can. The papers leave out the
        last layer: `where="*hidden*/kernel"`.
    Returns:
      `(variables, *args, **kwargs)`, as `model.apply`, and `tk.flax.apply` where there
      are `tk.BlockMatrix` leaves (kernels of these layers are then expanded).
    Raises:
      ValueError: amounts that make no sense, at once; from the call, before it computes:
        a pattern that matches no layer, a layer that cannot, a row that is too short.
    Example:
      >>> import jax, jax.numpy as jnp
      >>> model, x = nn.Dense(3), jnp.array([[1.0, 2.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss(params):
      ...     y = meprop(model, k=1)({"params": params}, x)
      ...     return (y * jnp.array([1.0, -3.0, 2.0])).sum()
      >>> jax.grad(loss)(params)["kernel"].tolist()
      [[0.0, -3.0, 0.0], [0.0, -6.0, 0.0]]
    """
    require_amount(sparsity, k, "tk.flax.meprop")
    return _changed(model, where, meprop_rules(sparsity, k, unified))


def swat(
    model: nn.Module,
    sparsity: float,
    *,
    activation_sparsity: float | None = None,
    distribution: Distribution = uniform,
    where: Where | None = None,
) -> Callable[..., Any]:
    """`model.apply`, its layers multiplying as `tk.swat` does.

    With `tk.uniform` this is the paper's SWAT-U, with `distribution=tk.erk` its SWAT-ERK.
    In evaluation the same function gives the network that was trained, with S(W).

    Args:
      model: any Linen module.
      sparsity: fraction of zeros in the weights; 0 where they are sparse already, as
        those of `tk.sparsify`.
      activation_sparsity: fraction of zeros in the activations that the weight gradient
        sees; None: the one of the layer's weights, as in the paper.
      distribution: of the weights' sparsity over the layers.
      where: as in `meprop`. The authors leave out the first layer, and as a rule the
        last.
    Returns:
      As `meprop`.
    Raises:
      ValueError: as `meprop`.
    Example:
      >>> import jax, jax.numpy as jnp
      >>> model, x = nn.Dense(2, use_bias=False), jnp.array([[1.0, -2.0]])
      >>> params = {"kernel": jnp.array([[5.0, 1.0], [-2.0, 4.0]])}
      >>> swat(model, 0.5)({"params": params}, x).tolist()
      [[5.0, -8.0]]
      >>> def loss(params):
      ...     return swat(model, 0.5)({"params": params}, x).sum()
      >>> jax.grad(loss)(params)["kernel"].tolist()
      [[0.0, 0.0], [-2.0, -2.0]]
    """
    rules = swat_rules(sparsity, activation_sparsity, distribution, "tk.flax.swat")
    return _changed(model, where, rules)


def meprop_rules(sparsity: float | None, k: int | None, unified: bool) -> Rules:
    """meProp, the same in all layers."""
    rule = MeProp(sparsity, k, unified)
    return lambda shapes: dict.fromkeys(shapes, rule)


def swat_rules(
    sparsity: float, of_x: float | None, distribution: Distribution, name: str
) -> Rules:
    """SWAT, its weights' sparsity distributed over the layers."""
    require_sparsity(sparsity, f"{name}: sparsity")
    if of_x is not None:
        require_sparsity(of_x, f"{name}: activation_sparsity")

    def rules(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Rule]:
        share = dict.fromkeys(shapes, sparsity)
        if distribution is not uniform:
            counts = distribution(shapes, sparsity, {})
            share = {p: 1 - counts[p] / math.prod(s) for p, s in shapes.items()}
        return {p: Swat(s, s if of_x is None else of_x) for p, s in share.items()}

    return rules


def _changed(model: nn.Module, where: Where | None, rules: Rules) -> Callable[..., Any]:
    def call(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        variables = {**variables, "params": nn.meta.unbox(variables["params"])}
        shapes = choose(_layers(model, variables, *args, **kwargs), where)
        with nn.intercept_methods(_interceptor(rules(shapes))):
            return linen.apply(model)(variables, *args, **kwargs)

    return call


def choose(
    layers: Mapping[str, Layer], where: Where | None
) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of the layers that are changed.

    Raises:
      ValueError: there are none, or a layer that was asked for cannot be.
    """
    if where is None:
        chosen = [path for path, layer in layers.items() if not layer.refused]
        if not chosen:
            said = "; ".join(f"{p!r}: {layer.refused}" for p, layer in layers.items())
            raise ValueError(f"no layer of the model can be changed: {said or 'none'}")
    else:
        shapes = {path: layer.shape for path, layer in layers.items()}
        chosen = _trees.selected(where, shapes)
    for path in chosen:
        if layers[path].refused:
            raise ValueError(f"{path!r}: {layers[path].refused}; leave it out of where")
    return {path: layers[path].shape for path in chosen}


def _layers(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Layer]:
    """Whatever of a model is called and has a kernel, by the kernel's path."""
    found: dict[str, Layer] = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module: Any = context.module
        out = next_call(*args, **kwargs)  # first: what is wrong with a call, it says
        if context.method_name == "__call__" and module.has_variable(
            "params", "kernel"
        ):
            path = "/".join((*module.path, "kernel"))
            found.setdefault(path, _layer(module, *args, **kwargs))
        return out

    linen.watch(model, record, variables, *args, **kwargs)
    return found


def _layer(module: Any, *args: Any, **kwargs: Any) -> Layer:
    shape = module.get_variable("params", "kernel").shape
    if not layers.known(module):
        name = type(module).__name__
        return Layer(
            shape, f"{name} is not a Dense, DenseGeneral, Einsum or Conv layer"
        )
    slots = ("dot_general", "conv_general_dilated")
    for slot in (*slots, *(f"{slot}_cls" for slot in slots)):
        if getattr(module, slot, None) is not None:
            return Layer(shape, f"the layer has a {slot} of its own")
    if isinstance(module, nn.Conv):
        return Layer(shape, "")
    if isinstance(module, nn.Einsum):
        return einsum_layer(_equation(module, *args[1:], **kwargs), shape)
    outputs = math.prod(shape[-np.size(module.features) :])
    return Layer((math.prod(shape) // outputs, outputs), "")


def einsum_layer(text: str, shape: tuple[int, ...]) -> Layer:
    """A layer that multiplies by an equation; the shape is its kernel's."""
    try:
        how = contraction.of_einsum(text, 0)
    except NotImplementedError as error:
        return Layer(shape, str(error))
    sizes = zip(how.kernel, shape, strict=True)
    outputs = math.prod(size for label, size in sizes if label not in how.x)
    return Layer((math.prod(shape) // outputs, outputs), "")


def _equation(module: Any, *given: Any, **named: Any) -> str:
    named.pop("inputs", None)
    (text,) = {module.einsum_str, *given, *named.values()} - {None}
    return text.replace(" ", "")


def _interceptor(rules: Mapping[str, Rule]) -> Callable[..., Any]:
    """Each chosen layer is called as a copy of itself with another product in its slot."""

    def change(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module: Any = context.module
        path = "/".join((*module.path, "kernel"))
        if context.method_name != "__call__" or path not in rules:
            return next_call(*args, **kwargs)
        rule = rules[path]
        if isinstance(module, nn.Einsum):
            return _einsum(module, products.einsum(rule, path), *args, **kwargs)
        slot, product = "dot_general", products.dot_general(rule, path)
        if isinstance(module, nn.Conv):
            slot, product = "conv_general_dilated", products.convolution(rule, path)
        if getattr(module, slot) is not None:  # this is the copy
            return next_call(*args, **kwargs)
        return module.clone(parent=module.scope, **{slot: product})(*args, **kwargs)

    return change


def _einsum(module: Any, product: Any, inputs: Any, *given: Any, **named: Any) -> Any:
    """nn.Einsum has no slot: its call, with another product."""
    text = _equation(module, *given, **named)
    kernel = module.get_variable("params", "kernel")
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x, kernel, bias = module.promote_dtype(inputs, kernel, bias, dtype=module.dtype)
    settings = {
        name: getattr(module, name) for name in ("precision", "preferred_element_type")
    }
    y = product(text, x, kernel, **settings)
    return contraction.add_bias(y, bias, contraction.of_einsum(text, x.ndim))

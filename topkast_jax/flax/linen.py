"""Sparse products inside unmodified Linen models."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from topkast_jax._trees import path_name
from topkast_jax._types import PyTree
from topkast_jax.flax import contraction, layers, observed
from topkast_jax.layouts.packed import BlockMatrix, expand
from topkast_jax.ops.api import choose
from topkast_jax.statistics import Tapped

Path = tuple[str, ...]
T = TypeVar("T")


def apply(model: nn.Module) -> Callable[..., Any]:
    """`model.apply` for parameters that hold `tk.BlockMatrix` or `tk.Tapped` leaves.

    nn.Dense, nn.DenseGeneral, nn.Einsum and 1x1 nn.Conv layers multiply by units, also
    inside nn.scan and nn.remat; no other layer can, so their parameters are expanded
    first. `routes` tells which is which. A kernel that the model also reads in another
    way than by calling its layer (a tied output) must stay dense. Where a kernel has taps
    (`tk.tap`), the same layers and any nn.Conv give them statistics as their gradient;
    for others that is an error. Parameters without either go to `model.apply` as they are.

    Args:
      model: any Linen module.
    Returns:
      `(variables, *args, **kwargs)`, as `model.apply`.
    Example:
      >>> import optax, topkast_jax as tk
      >>> model = nn.Dense(4)
      >>> x = jnp.ones((2, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = tk.sparse(optax.sgd(0.1), tk.static(0.5), layout="block")
      >>> theta, opt_state, _ = tk.start(tx, params)
      >>> alpha = tk.sparsify(theta, tk.masks(opt_state))
      >>> dense = model.apply({"params": tk.export(theta, opt_state)}, x)
      >>> bool(jnp.allclose(apply(model)({"params": alpha}, x), dense))
      True
    """

    def call(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        plain = jax.tree.map(_without_tap, variables["params"], is_leaf=_is_special)
        tapped = _leaves(variables["params"], Tapped)
        if not _sparse(plain) and not tapped:
            return model.apply(variables, *args, **kwargs)
        given = nn.meta.unbox(variables["params"])
        variables = {**variables, "params": nn.meta.unbox(plain)}
        reasons = _reasons(model, variables, *args, **kwargs)
        if tapped:
            dense = {
                **variables,
                "params": jax.tree.map(_dense, plain, is_leaf=_is_block),
            }
            observed.require(model.apply, dense, tapped, *args, **kwargs)

        def ready(path: Any, leaf: Any) -> Any:
            if isinstance(leaf, Tapped):
                return dataclasses.replace(leaf, value=ready(path, leaf.value))
            if isinstance(leaf, BlockMatrix) and reasons.get(_words(path), "unused"):
                return expand(leaf.values, leaf.index)
            return leaf

        params = jax.tree_util.tree_map_with_path(ready, given, is_leaf=_is_special)
        with nn.intercept_methods(_multiply):
            return model.apply({**variables, "params": params}, *args, **kwargs)

    return call


def routes(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, str]:
    """How each sparse parameter of a model is multiplied, by path.

    Args:
      model: any Linen module.
      variables: with `tk.BlockMatrix` leaves under "params".
      *args: of the call; shapes suffice.
      **kwargs: of the call.
    Returns:
      The name of an implementation (`tk.ops.IMPLEMENTATIONS`), or "expanded: " and why
      the layer cannot multiply by units.
    Example:
      >>> import optax, topkast_jax as tk
      >>> model, x = nn.Dense(64), jnp.ones((2, 64))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> method = tk.static(0.5, structure=tk.fan_in(1, 64))
      >>> tx = tk.sparse(optax.sgd(0.1), method, layout="block")
      >>> theta, opt_state, _ = tk.start(tx, params)
      >>> alpha = tk.sparsify(theta, tk.masks(opt_state))
      >>> routes(model, {"params": alpha}, x)
      {'kernel': 'columns'}
    """
    variables = {**variables, "params": nn.meta.unbox(variables["params"])}
    reasons = _reasons(model, variables, *args, **kwargs)
    found = {}
    for path, matrix in _sparse(variables["params"]).items():
        reason = reasons.get(path, "no layer of the model multiplies by it")
        found["/".join(path)] = (
            f"expanded: {reason}" if reason else choose(matrix.index)
        )
    return found


def _is_block(node: Any) -> bool:
    return isinstance(node, BlockMatrix)


def _words(path: Any) -> Path:
    return tuple(path_name(path).split("/"))


def _is_special(node: Any) -> bool:
    return isinstance(node, BlockMatrix | Tapped)


def _without_tap(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Tapped) else leaf


def _dense(leaf: Any) -> Any:
    """Zeros of the shape of a kernel, for calls that compute nothing."""
    if not _is_block(leaf):
        return leaf
    return jnp.zeros(leaf.index.grid.shape, leaf.values.dtype)


def _sparse(params: PyTree) -> dict[Path, BlockMatrix]:
    return _leaves(params, BlockMatrix)


def _leaves(params: PyTree, kind: type[T]) -> dict[Path, T]:
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_special)[0]
    return {_words(path): leaf for path, leaf in flat if isinstance(leaf, kind)}


def _reasons(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[Path, str]:
    """Why the layer of each sparse kernel cannot multiply by units; "" where it can.

    From one abstract call with dense shapes.
    """
    sparse = _sparse(variables["params"])
    found: dict[Path, str] = {}
    if not sparse:
        return found

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        path = (*module.path, "kernel")
        out = next_call(*args, **kwargs)  # first: what is wrong with a call, it says
        if context.method_name == "__call__" and path in sparse:
            why = _why_not(module, args, kwargs, sparse[path])
            found[path] = found.get(path) or why
        return out

    watch(model, record, variables, *args, **kwargs)
    return found


def watch(
    model: nn.Module, interceptor: Any, variables: Any, *args: Any, **kwargs: Any
) -> None:
    """One abstract call of a model, with dense shapes, under an interceptor."""

    def call(variables: Any, *args: Any, **kwargs: Any) -> None:
        params = jax.tree.map(_dense, variables["params"], is_leaf=_is_block)
        with nn.intercept_methods(interceptor):
            model.apply({**variables, "params": params}, *args, **kwargs)

    contraction.abstract_call(call, variables, *args, **kwargs)


def _why_not(module: nn.Module, args: Any, kwargs: Any, matrix: BlockMatrix) -> str:
    if not layers.known(module):
        name = type(module).__name__
        return f"{name} is not a Dense, DenseGeneral, Einsum or 1x1 Conv layer"
    for name in ("dot_general", "dot_general_cls"):
        if getattr(module, name, None):
            return "the layer has a dot_general of its own"
    if getattr(module, "precision", None) is not None:
        return "the layer asks for a precision"
    if getattr(module, "preferred_element_type", None) is not None:
        return "the layer asks for an element type"
    most = 2 if isinstance(module, nn.Einsum) else 1
    if not 1 <= len(args) <= most or len(args) + len(kwargs) > most:
        return f"{type(module).__name__} was called with more than its input"
    grid = matrix.index.grid
    if grid.axes.stack != tuple(range(len(grid.axes.stack))):
        return "its stack axes do not come first"
    try:
        x, how = layers.product(module, *args, **kwargs)
        contraction.require(how, x.shape, grid.inner(len(grid.axes.stack)))
    except NotImplementedError as error:
        return str(error)
    return ""


def _multiply(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Interceptor: the layer's own call, with a sparse product for its kernel.

    And with eyes on what goes in and comes out, where the kernel has taps.
    """
    module: Any = context.module
    if context.method_name != "__call__" or not layers.known(module):
        return next_call(*args, **kwargs)
    kernel: Any = module.get_variable("params", "kernel")
    if isinstance(kernel, Tapped):
        call = functools.partial(_alone, module, kernel.value)
        if isinstance(kernel.value, BlockMatrix):
            call = functools.partial(_by_units, module, kernel.value)
        return observed.observe(module, call(*args, **kwargs), kernel, *args, **kwargs)
    if not isinstance(kernel, BlockMatrix):
        return next_call(*args, **kwargs)
    return _by_units(module, kernel, *args, **kwargs)


def _alone(module: Any, kernel: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer's call with this kernel."""
    params = {**module.variables["params"], "kernel": kernel}
    return module.clone().apply({"params": params}, *args, **kwargs)


def _by_units(
    module: Any, kernel: BlockMatrix, x: Any, *more: Any, **kwargs: Any
) -> Any:
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x, values, bias = module.promote_dtype(x, kernel.values, bias, dtype=module.dtype)
    x, how = layers.product(module, x, *more, **kwargs)
    y = contraction.multiply(x, BlockMatrix(values, kernel.index), how)
    return contraction.add_bias(y, bias, how)

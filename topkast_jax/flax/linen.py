"""Sparse products inside unmodified Linen models."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax._trees import path_name
from topkast_jax._types import PyTree
from topkast_jax.flax import contraction
from topkast_jax.flax.contraction import Contraction
from topkast_jax.layouts.packed import BlockMatrix, expand
from topkast_jax.ops.api import choose

Path = tuple[str, ...]
_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)


def apply(model: nn.Module) -> Callable[..., Any]:
    """`model.apply` for parameters that hold `tk.BlockMatrix` leaves.

    nn.Dense, nn.DenseGeneral, nn.Einsum and 1x1 nn.Conv layers multiply by units, also
    inside nn.scan and nn.remat; no other layer can, so their parameters are expanded
    first. `routes` tells which is which. A kernel that the model also reads in another
    way than by calling its layer (a tied output) must stay dense. Parameters without a
    BlockMatrix go to `model.apply` as they are.

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
        if not _sparse(variables["params"]):
            return model.apply(variables, *args, **kwargs)
        variables = {**variables, "params": nn.meta.unbox(variables["params"])}
        reasons = _reasons(model, variables, *args, **kwargs)

        def ready(path: Any, leaf: Any) -> Any:
            if isinstance(leaf, BlockMatrix) and reasons.get(_words(path), "unused"):
                return expand(leaf.values, leaf.index)
            return leaf

        params = jax.tree_util.tree_map_with_path(
            ready, variables["params"], is_leaf=_is_block
        )
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


def _sparse(params: PyTree) -> dict[Path, BlockMatrix]:
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_block)[0]
    return {_words(path): leaf for path, leaf in flat if _is_block(leaf)}


def _reasons(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[Path, str]:
    """Why the layer of each sparse kernel cannot multiply by units; "" where it can.

    From one abstract call with dense shapes.
    """
    sparse = _sparse(variables["params"])
    found: dict[Path, str] = {}

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

    def dense(leaf: Any) -> Any:
        if not _is_block(leaf):
            return leaf
        return jnp.zeros(leaf.index.grid.shape, leaf.values.dtype)

    def call(variables: Any, *args: Any, **kwargs: Any) -> None:
        params = jax.tree.map(dense, variables["params"], is_leaf=_is_block)
        with nn.intercept_methods(interceptor):
            model.apply({**variables, "params": params}, *args, **kwargs)

    contraction.abstract_call(call, variables, *args, **kwargs)


def known(module: nn.Module) -> bool:
    """Whether calling a module is what calling one of `_LAYERS` is."""
    own = type(module).__call__
    return any(isinstance(module, layer) and own is layer.__call__ for layer in _LAYERS)


def _why_not(module: nn.Module, args: Any, kwargs: Any, matrix: BlockMatrix) -> str:
    if not known(module):
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
        x, how = _product(module, *args, **kwargs)
        contraction.require(how, x.shape, grid.inner(len(grid.axes.stack)))
    except NotImplementedError as error:
        return str(error)
    return ""


def _product(module: Any, x: Any, *more: Any, **named: Any) -> tuple[Any, Contraction]:
    """What a layer called with these arguments multiplies by its kernel, and how.

    Raises:
      NotImplementedError: no plain product.
    """
    if isinstance(module, nn.Einsum):
        (text,) = {module.einsum_str, *more, *named.values()} - {None}
        return x, contraction.of_einsum(text, x.ndim)
    if isinstance(module, nn.Conv):
        return _pointwise(module, x)
    axes, batch = (-1,), ()
    features = tuple(np.atleast_1d(module.features).tolist())
    if isinstance(module, nn.DenseGeneral):
        axes = np.atleast_1d(module.axis).tolist()
        batch = np.atleast_1d(module.batch_dims).tolist()
    inputs = sorted(a % x.ndim for a in axes)
    dimensions = ((inputs, range(len(inputs))), (batch, batch))
    rank = len(inputs) + len(features)
    return x, contraction.of_dot_general(dimensions, x.ndim, rank)


def _pointwise(module: Any, x: Any) -> tuple[Any, Contraction]:
    size = tuple(np.atleast_1d(module.kernel_size).tolist())
    if set(size) != {1}:
        raise NotImplementedError(f"Conv has a window of {'x'.join(map(str, size))}")
    if module.feature_group_count != 1 or module.mask is not None:
        raise NotImplementedError("Conv has feature groups or a mask")
    if module.padding not in ("SAME", "VALID"):
        raise NotImplementedError(f"Conv has the padding {module.padding!r}")
    if set(np.atleast_1d(module.input_dilation or 1).tolist()) != {1}:
        raise NotImplementedError("Conv dilates its input")
    if module.conv_general_dilated or module.conv_general_dilated_cls:
        raise NotImplementedError("the layer has a convolution of its own")
    steps = tuple(np.broadcast_to(module.strides or 1, len(size)).tolist())
    return contraction.of_pointwise(x, size, steps)


def _multiply(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Interceptor: the layer's own call, with a sparse product for its kernel."""
    module: Any = context.module
    if context.method_name != "__call__" or not known(module):
        return next_call(*args, **kwargs)
    kernel: Any = module.get_variable("params", "kernel")
    if not isinstance(kernel, BlockMatrix):
        return next_call(*args, **kwargs)
    x, *more = args
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x, values, bias = module.promote_dtype(x, kernel.values, bias, dtype=module.dtype)
    x, how = _product(module, x, *more, **kwargs)
    y = contraction.multiply(x, BlockMatrix(values, kernel.index), how)
    return contraction.add_bias(y, bias, how)

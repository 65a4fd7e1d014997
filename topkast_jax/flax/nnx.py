"""Sparse products inside unmodified NNX models."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from topkast_jax._types import PyTree
from topkast_jax.flax import contraction
from topkast_jax.flax.contraction import Contraction
from topkast_jax.layouts.packed import BlockMatrix, Index, expand
from topkast_jax.ops.api import choose

Reading = Callable[..., tuple[Any, Contraction]]
Note = Callable[[str], None]


def merge(graphdef: nnx.GraphDef, *states: PyTree) -> Any:
    """`nnx.merge` for states that hold `tk.BlockMatrix` in the place of kernels.

    nnx.Linear, nnx.LinearGeneral, nnx.Einsum and 1x1 nnx.Conv layers of the model
    multiply by units, also inside nnx.scan and nnx.remat; the kernels of other layers
    are expanded. `routes` tells which is which. Where the model reads the kernel of such
    a layer in another way than by calling it, it gets the expanded array.

    The classes of the layers are left as they are: the product is put into the slots for
    it that NNX layers have (`dot_general`, `einsum_op`, `conv_general_dilated`).

    Args:
      graphdef: from `nnx.split`.
      *states: all of them, as for `nnx.merge`.
    Returns:
      The model.
    Example:
      >>> import optax, topkast_jax as tk
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
      >>> import optax, topkast_jax as tk
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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "index"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class _Kernel(BlockMatrix):
    """A BlockMatrix as the value of an nnx.Param.

    Layers read `param[...]`; what else reads it means the dense array.
    """

    def __getitem__(self, key: Any) -> Any:
        return self if key is ... else self.__jax_array__()[key]

    def __jax_array__(self) -> jax.Array:
        return expand(self.values, self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.here.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def T(self) -> jax.Array:  # noqa: N802
        return self.__jax_array__().T


def _merge(
    graphdef: nnx.GraphDef,
    states: Sequence[PyTree],
    watch: Callable[[str, Index], Note],
) -> Any:
    """`merge`; `watch(path, index)` gives what is told why a kernel is expanded."""

    def held(node: Any) -> Any:
        return _Kernel(node.values, node.index) if _is_block(node) else node

    model = nnx.merge(graphdef, *jax.tree.map(held, states, is_leaf=_is_block))
    nodes = list(nnx.iter_graph(model))
    kernels = {
        id(node): (node, watch("/".join(map(str, path)), node.get_raw_value().index))
        for path, node in nodes
        if isinstance(node, nnx.Variable) and _is_block(node.get_raw_value())
    }
    served = set()
    for _, layer in nodes:
        param: Any = getattr(layer, "kernel", None)
        if not isinstance(layer, nnx.Module) or id(param) not in kernels:
            continue
        note = kernels[id(param)][1]
        reason = _why_not(layer, param.get_raw_value().index)
        if reason:
            note(reason)
        else:
            served.add(id(param))
            _put_product(layer, note)
    for key, (param, _) in kernels.items():
        if key not in served:
            matrix = param.get_raw_value()
            param.set_raw_value(expand(matrix.values, matrix.index))
    return model


def _is_block(node: Any) -> bool:
    return isinstance(node, BlockMatrix)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a kind of layer keeps the function that multiplies.

    Attributes:
      name: of the attribute.
      defaults: what it holds unless somebody has put something else there.
      dense: the product of arrays.
      kernel: position of the kernel among its arguments.
      read: its arguments -> the input, and how it is multiplied.
    """

    name: str
    defaults: tuple[Any, ...]
    dense: Callable[..., Any]
    kernel: int
    read: Reading


def _of_dot_general(x: Any, kernel: Any, dimensions: Any) -> tuple[Any, Contraction]:
    return x, contraction.of_dot_general(dimensions, x.ndim, len(kernel.shape))


def _of_einsum(text: str, x: Any, kernel: Any) -> tuple[Any, Contraction]:
    del kernel
    return x, contraction.of_einsum(text, x.ndim)


def _of_convolution(
    x: Any,
    kernel: Any,
    strides: Any,
    padding: Any,
    *,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: int,
) -> tuple[Any, Contraction]:
    del rhs_dilation, dimension_numbers  # of no meaning for one point; channels last
    size = kernel.shape[:-2]
    if set(size) != {1}:
        raise NotImplementedError(f"Conv has a window of {'x'.join(map(str, size))}")
    if feature_group_count != 1:
        raise NotImplementedError("Conv has feature groups or a mask")
    if padding not in ("SAME", "VALID"):
        raise NotImplementedError(f"Conv has the padding {padding!r}")
    if set(lhs_dilation) != {1}:
        raise NotImplementedError("Conv dilates its input")
    return contraction.of_pointwise(x, size, tuple(strides))


_DOT = _Slot(
    "dot_general", (lax.dot_general, None), lax.dot_general, 1, _of_dot_general
)
_EINSUM = _Slot("einsum_op", (jnp.einsum,), jnp.einsum, 2, _of_einsum)
_CONVOLUTION = _Slot(
    "conv_general_dilated",
    (lax.conv_general_dilated,),
    lax.conv_general_dilated,
    1,
    _of_convolution,
)
_SLOTS: dict[type, _Slot] = {
    nnx.Linear: _DOT,
    nnx.LinearGeneral: _DOT,
    nnx.Einsum: _EINSUM,
    nnx.Conv: _CONVOLUTION,
}


def _slot(layer: nnx.Module) -> _Slot | None:
    """The slot of a layer whose call is that of one of `_SLOTS`."""
    for known, slot in _SLOTS.items():
        if isinstance(layer, known) and type(layer).__call__ is known.__call__:
            return slot
    return None


def _rank(layer: Any) -> int:
    """Axes of a layer's kernel, by its settings: without those of a stack."""
    if isinstance(layer, nnx.Linear):
        return 2
    if isinstance(layer, nnx.LinearGeneral):
        shapes = (layer.batch_axis, layer.in_features, layer.out_features)
        return sum(map(len, shapes))
    return len(layer.kernel_shape)


def _why_not(layer: Any, index: Index) -> str:
    """What keeps a layer from multiplying by units, whatever it is called with."""
    slot, name = _slot(layer), type(layer).__name__
    if slot is None:
        return f"{name} is not a Linear, LinearGeneral, Einsum or 1x1 Conv layer"
    own = getattr(layer, slot.name)
    if own not in slot.defaults or getattr(layer, "dot_general_cls", None):
        return f"the layer has a {slot.name} of its own"
    if getattr(layer, "mask", None) is not None:
        return "Conv has feature groups or a mask"
    grid = index.grid
    stacked = len(grid.shape) - _rank(layer)
    if grid.axes.stack != tuple(range(stacked)):
        return (
            f"its kernel has {stacked} axes more than the layer reads; declare them, "
            "and no others, as a stack with tk.axes"
        )
    return ""


@dataclasses.dataclass(frozen=True)
class _Product:
    """What stands in a slot: by units where the kernel is a BlockMatrix."""

    slot: _Slot
    note: Note

    def __call__(
        self,
        *operands: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
        **rest: Any,
    ) -> Any:
        at = self.slot.kernel
        kernel = operands[at]
        asked = {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
            "out_sharding": out_sharding,
        }
        if isinstance(kernel, _Kernel):
            try:
                x, how = self._plain(kernel, asked, *operands, **rest)
            except NotImplementedError as error:
                self.note(str(error))
                kernel = kernel.__jax_array__()
            else:
                self.note("")
                return contraction.multiply(x, kernel, how)
        operands = (*operands[:at], kernel, *operands[at + 1 :])
        return self.slot.dense(*operands, **asked, **rest)

    def _plain(
        self, kernel: _Kernel, asked: dict[str, Any], *operands: Any, **rest: Any
    ) -> tuple[Any, Contraction]:
        for name, value in asked.items():
            if value is not None:
                raise NotImplementedError(f"the layer asks for a {name}")
        if kernel.index.index.ndim > 1:
            raise NotImplementedError("a stack of kernels is used at once")
        x, how = self.slot.read(*operands, **rest)
        contraction.require(how, x.shape, kernel.index.here)
        return x, how


@dataclasses.dataclass(frozen=True)
class _Promote:
    """A layer's `promote_dtype`, for the values of its kernel."""

    own: Callable[..., Any]

    def __call__(self, arrays: Any, **settings: Any) -> Any:
        x, kernel, bias = arrays
        if not isinstance(kernel, _Kernel):
            return self.own(arrays, **settings)
        x, values, bias = self.own((x, kernel.values, bias), **settings)
        return x, _Kernel(values, kernel.index), bias


def _put_product(layer: Any, note: Note) -> None:
    slot = _slot(layer)
    assert slot is not None
    setattr(layer, slot.name, _Product(slot, note))
    layer.promote_dtype = _Promote(layer.promote_dtype)

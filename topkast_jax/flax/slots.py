"""Where NNX layers keep the functions that multiply, and what is put there instead."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from topkast_jax.flax import contraction
from topkast_jax.flax.contraction import Contraction
from topkast_jax.layouts.packed import BlockMatrix, Index, expand

Reading = Callable[..., tuple[Any, Contraction]]
Note = Callable[[str], None]
"""Is told why a kernel is expanded, "" where it is not."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "index"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Kernel(BlockMatrix):
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


def why_not(layer: Any, index: Index) -> str:
    """What keeps a layer from multiplying by units, whatever it is called with."""
    slot, name = slot_of(layer), type(layer).__name__
    if slot is None:
        return f"{name} is not a Linear, LinearGeneral, Einsum or 1x1 Conv layer"
    own = getattr(layer, slot.name)
    if own not in slot.defaults or getattr(layer, "dot_general_cls", None):
        return f"the layer has a {slot.name} of its own"
    if getattr(layer, "mask", None) is not None:
        return "Conv has feature groups or a mask"
    grid = index.grid
    stacked = len(grid.shape) - rank_of(layer)
    if grid.axes.stack != tuple(range(stacked)):
        return (
            f"its kernel has {stacked} axes more than the layer reads; declare them, "
            "and no others, as a stack with tk.axes"
        )
    return ""


def put_product(layer: Any, note: Note) -> None:
    """Makes one layer multiply by units; `note` is told why a call does not."""
    slot = slot_of(layer)
    assert slot is not None
    setattr(layer, slot.name, _Product(slot, note))
    layer.promote_dtype = _Promote(layer.promote_dtype)


@dataclasses.dataclass(frozen=True)
class Slot:
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


_DOT = Slot("dot_general", (lax.dot_general, None), lax.dot_general, 1, _of_dot_general)
_EINSUM = Slot("einsum_op", (jnp.einsum,), jnp.einsum, 2, _of_einsum)
_CONVOLUTION = Slot(
    "conv_general_dilated",
    (lax.conv_general_dilated,),
    lax.conv_general_dilated,
    1,
    _of_convolution,
)
_SLOTS: dict[type, Slot] = {
    nnx.Linear: _DOT,
    nnx.LinearGeneral: _DOT,
    nnx.Einsum: _EINSUM,
    nnx.Conv: _CONVOLUTION,
}


def slot_of(layer: nnx.Module) -> Slot | None:
    """The slot of a layer whose call is that of one of `_SLOTS`."""
    for known, slot in _SLOTS.items():
        if isinstance(layer, known) and type(layer).__call__ is known.__call__:
            return slot
    return None


def rank_of(layer: Any) -> int:
    """Axes of a layer's kernel, by its settings: without those of a stack."""
    if isinstance(layer, nnx.Linear):
        return 2
    if isinstance(layer, nnx.LinearGeneral):
        shapes = (layer.batch_axis, layer.in_features, layer.out_features)
        return sum(map(len, shapes))
    return len(layer.kernel_shape)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What stands in a slot: by units where the kernel is a BlockMatrix."""

    slot: Slot
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
        if isinstance(kernel, Kernel):
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
        self, kernel: Kernel, asked: dict[str, Any], *operands: Any, **rest: Any
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
        if not isinstance(kernel, Kernel):
            return self.own(arrays, **settings)
        x, values, bias = self.own((x, kernel.values, bias), **settings)
        return x, Kernel(values, kernel.index), bias

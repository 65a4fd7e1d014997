"""Taps at the layers of unmodified NNX models: see `tk.taps`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from flax import nnx
from jax import lax

from topkast_jax.flax import sums
from topkast_jax.flax.slots import Slot, rank_of, slot_of
from topkast_jax.statistics import Tapped


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "taps", "key"],
    meta_fields=["path"],
)
@dataclasses.dataclass(frozen=True)
class TappedKernel(Tapped):
    """A kernel with taps as the value of an nnx.Param.

    Layers read `param[...]`. What else reads it would multiply unseen, and is refused.

    Attributes:
      path: of the parameter.
    """

    path: str

    def __getitem__(self, key: Any) -> "TappedKernel":
        return self if key is ... else self.__jax_array__()

    def __jax_array__(self) -> NoReturn:
        reason = "the model also reads it in another way than by calling its layer"
        raise ValueError(sums.refusal(self.path, reason))

    @property
    def shape(self) -> tuple[int, ...]:
        found: tuple[int, ...] = self.value.shape
        return found

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def T(self) -> NoReturn:  # noqa: N802
        self.__jax_array__()


def observe(model: Any) -> None:
    """Makes the layers of a merged model show what they see to the taps of their kernels.

    Args:
      model: with `Tapped` values, of arrays or of kernels that its layers multiply by.
    Raises:
      ValueError: a parameter is named, and why it has no statistics.
    """
    nodes = list(nnx.iter_graph(model))
    paths: dict[int, str] = {}
    for words, node in nodes:
        if not isinstance(node, nnx.Variable):
            continue
        value = node.get_raw_value()
        if isinstance(value, Tapped):
            paths[id(node)] = path = "/".join(map(str, words))
            node.set_raw_value(TappedKernel(value.value, value.taps, value.key, path))
    served = set()
    for _, layer in nodes:
        param: Any = getattr(layer, "kernel", None)
        if isinstance(layer, nnx.Variable) or id(param) not in paths:
            continue
        reason = _why_not(layer, param.get_raw_value())
        if reason:
            raise ValueError(sums.refusal(paths[id(param)], reason))
        served.add(id(param))
        _watch(layer)
    for key in paths.keys() - served:
        reason = "no layer of the model multiplies by it"
        raise ValueError(sums.refusal(paths[key], reason))


def _why_not(layer: Any, tapped: Tapped) -> str:
    """What keeps a layer from being observed, whatever it is called with."""
    name = type(layer).__name__
    if slot_of(layer) is None:
        return f"{name} is not a Linear, LinearGeneral, Einsum or Conv layer"
    if getattr(layer, "dot_general_cls", None) is not None:
        return f"{name} makes its dot_general anew at every call (dot_general_cls)"
    if getattr(layer, "mask", None) is not None:
        return f"{name} has feature groups or a mask"
    sides = (tapped.taps.inputs.shape, tapped.taps.outputs.shape)
    of_inputs, of_outputs = (side[: len(side) - rank_of(layer)] for side in sides)
    reason = sums.unstacked(of_inputs, of_outputs)
    return reason and f"{name}: {reason}"


def _watch(layer: Any) -> None:
    slot = slot_of(layer)
    assert slot is not None
    product = getattr(layer, slot.name) or slot.dense
    setattr(layer, slot.name, _Watching(slot, product, type(layer).__name__))
    layer.promote_dtype = _Promote(layer.promote_dtype)


@dataclasses.dataclass(frozen=True)
class _Watching:
    """What stands in a slot: the layer's own product, and eyes on it at a tapped kernel."""

    slot: Slot
    product: Callable[..., Any]
    layer: str

    def __call__(self, *operands: Any, **settings: Any) -> Any:
        at = self.slot.kernel
        tapped = operands[at]
        if not isinstance(tapped, TappedKernel):
            return self.product(*operands, **settings)
        plain = (*operands[:at], tapped.value, *operands[at + 1 :])
        try:
            if self.slot.name == "conv_general_dilated":
                return self._convolution(tapped, *plain, **settings)
            x, how = self.slot.read(*plain)
            wanted = sums.sides(how, x.shape)
            self._require(sums.why_not(tapped.taps, wanted))
        except NotImplementedError as error:
            reason = f"{self.layer}: {error}"
            raise ValueError(sums.refusal(tapped.path, reason)) from error
        y = self.product(*plain, **settings)
        return sums.of_product(x, y, tapped, how)

    def _convolution(
        self,
        tapped: TappedKernel,
        x: Any,
        kernel: Any,
        *how: Any,
        feature_group_count: int,
        **settings: Any,
    ) -> Any:
        if feature_group_count != 1:
            raise NotImplementedError("it has feature groups or a mask")
        self._require(sums.why_not(tapped.taps, (*kernel.shape[:-1], 1)))
        groups = {"feature_group_count": feature_group_count}
        y = self.product(x, kernel, *how, **groups, **settings)
        kept = {
            name: value
            for name, value in settings.items()
            if name not in ("preferred_element_type", "out_sharding")
        }

        def convolve(x: Any, kernel: Any) -> Any:
            return lax.conv_general_dilated(x, kernel, *how, **kept)

        return sums.of_convolution(x, y, tapped, convolve)

    def _require(self, reason: str) -> None:
        if reason:
            raise NotImplementedError(reason)


@dataclasses.dataclass(frozen=True)
class _Promote:
    """A layer's `promote_dtype`, for the value of a tapped kernel."""

    own: Callable[..., Any]

    def __call__(self, arrays: Any, **settings: Any) -> Any:
        x, kernel, bias = arrays
        if not isinstance(kernel, TappedKernel):
            return self.own(arrays, **settings)
        x, value, bias = self.own((x, kernel.value, bias), **settings)
        return x, dataclasses.replace(kernel, value=value), bias

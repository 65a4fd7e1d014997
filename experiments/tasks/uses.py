"""How often a model multiplies by each of its weights."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from experiments.models.tables import Projection


def count_uses(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Multiplications per kernel entry in one call of `model`, by path.

    Read off the shapes that layers are called with, so it follows the model through
    every change. A layer called twice counts twice. An entry of a convolution's kernel is
    used once for each output position, strides and groups notwithstanding; positions
    where it meets padding count too. An `nn.Embed` counts where it is multiplied by
    (`attend`, or the `nats` of a `Table`), not where rows are looked up.

    Args:
      model: a Flax module.
      *args: inputs of the call; shapes (`jax.ShapeDtypeStruct`) suffice.
      **kwargs: settings of the call.
    Raises:
      NotImplementedError: a kernel belongs to a layer that is not counted here.
    """
    uses: dict[str, int] = {}

    def count(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, call = context.module, context.method_name
        out = next_call(*args, **kwargs)
        if isinstance(module, nn.Embed) and call in ("attend", "nats"):
            name, times = "embedding", args[0].size // args[0].shape[-1]
        elif isinstance(module, Projection) and call in ("__call__", "attend"):
            name, times = "kernel", args[0].size // args[0].shape[-1]
        elif isinstance(module, nn.Dense | nn.DenseGeneral) and call == "__call__":
            axes = module.axis if isinstance(module, nn.DenseGeneral) else -1
            contracted = math.prod(args[0].shape[axis] for axis in np.atleast_1d(axes))
            name, times = "kernel", args[0].size // contracted
        elif isinstance(module, nn.Conv) and call == "__call__":
            name, times = "kernel", out.size // out.shape[-1]
        else:
            return out
        path = "/".join((*module.path, name))
        uses[path] = uses.get(path, 0) + times
        return out

    def call(key: jax.Array, *args: Any) -> Mapping[str, Any]:
        with nn.intercept_methods(count):
            return model.init(key, *args, **kwargs)

    shapes = jax.eval_shape(call, jax.random.key(0), *args)["params"]
    kernels = {p for p in flatten_dict(shapes, sep="/") if p.split("/")[-1] == "kernel"}
    if missing := sorted(kernels - uses.keys()):
        raise NotImplementedError(
            f"{', '.join(missing)}: kernels of layers other than nn.Dense, "
            "nn.DenseGeneral and nn.Conv; teach count_uses how often they are used"
        )
    return uses

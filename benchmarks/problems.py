"""What the benchmarks train: parameters, a loss on one fixed batch, axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import topkast_jax as tk

PyTree = Any
AXES = {"*/attention/out/kernel": "i i o", "*/attention/*/kernel": "i o o"}


class Problem(NamedTuple):
    """What is trained.

    Attributes:
      title: of the table.
      params: as Flax names them.
      carry: goes from step to step, not trained.
      loss: (alpha, carry) -> (loss, carry), on one fixed batch; products and activations
        are in the dtype of alpha.
      axes: what the axes of the parameters mean.
      uses: how often each entry of a weight is used in a step, for the FLOPs.
      floor: the same without its projections, which no layout can go below; None where
        projections are all there is.
    """

    title: str
    params: PyTree
    carry: PyTree
    loss: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]
    axes: Mapping[str, str]
    uses: Mapping[str, int]
    floor: "Problem | None" = None


def product(weight: Any, x: jax.Array) -> jax.Array:
    """weight^T @ x, whichever form `tk.sparsify` has given the weight."""
    if isinstance(weight, tk.BlockMatrix):
        return tk.ops.sparse_matmul(x, weight, features_first=True)
    return weight.T @ x


def in_dtype(tree: PyTree, dtype: Any) -> PyTree:
    """Floating-point leaves in another dtype; positions and counts stay."""

    def one(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def _dtype(alpha: PyTree) -> Any:
    dtypes = (x.dtype for x in jax.tree.leaves(alpha))
    return next(dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))


def mlp(widths: Sequence[int], rows: int) -> Problem:
    """Regression by layers of these widths, input and output included, with ReLU.

    Activations are [features, rows], the dense ones too.
    """
    *keys, data, target = jax.random.split(jax.random.key(0), len(widths) + 1)
    x = jax.random.normal(data, (widths[0], rows))
    y = jax.random.normal(target, (widths[-1], rows))

    def layer(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
        kernel = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    def loss(alpha: PyTree, carry: PyTree) -> tuple[jax.Array, PyTree]:
        z = x.astype(_dtype(alpha))
        for i, weights in enumerate(alpha):
            z = jax.nn.relu(z) if i else z
            z = product(weights["kernel"], z) + weights["bias"][:, None]
        return jnp.mean((z - y) ** 2), carry

    shapes = zip(keys, widths[:-1], widths[1:], strict=True)
    title = f"MLP {'-'.join(map(str, widths))}, batch {rows}"
    uses = {f"{i}/kernel": rows for i in range(len(widths) - 1)}
    return Problem(title, [layer(*shape) for shape in shapes], (), loss, {}, uses)


def stack(layers: int, width: int, inner: int, rows: int, *, scanned: bool) -> Problem:
    """Equal residual layers of two products each, every one recomputed backward.

    Scanned, the kernels of all layers are one parameter [layers, inputs, outputs], and
    one layer at a time is at work; else they are called one after another.
    """
    data, first, second = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(data, (width, rows))
    up = jax.random.normal(first, (layers, width, inner)) / width**0.5
    down = jax.random.normal(second, (layers, inner, width)) / inner**0.5

    @jax.checkpoint
    def layer(z: jax.Array, weights: PyTree) -> tuple[jax.Array, None]:
        inside = jax.nn.relu(product(weights["up"]["kernel"], z))
        return z + product(weights["down"]["kernel"], inside), None

    def loss(alpha: PyTree, carry: PyTree) -> tuple[jax.Array, PyTree]:
        z = x.astype(_dtype(alpha))
        if scanned:
            z, _ = jax.lax.scan(layer, z, alpha)
        else:
            for weights in alpha:
                z, _ = layer(z, weights)
        return jnp.mean(z.astype(jnp.float32) ** 2), carry

    params: PyTree = {"up": {"kernel": up}, "down": {"kernel": down}}
    uses = dict.fromkeys(("up/kernel", "down/kernel"), rows)
    axes = {"*kernel": "s i o"}
    if not scanned:
        params = [
            {"up": {"kernel": one}, "down": {"kernel": other}}
            for one, other in zip(up, down, strict=True)
        ]
        uses = {f"{i}/{name}": n for i in range(layers) for name, n in uses.items()}
        axes = {}
    way = "scanned" if scanned else "unrolled"
    title = f"{layers} layers of {width}-{inner}-{width}, {way}, batch {rows}"
    return Problem(title, params, (), loss, axes, uses)


def transformer(
    layers: int, width: int, rows: int, segment: int, heads: int = 2
) -> Problem:
    """The quickstart's Transformer-XL at another size, on random bytes."""
    from configs import quickstart  # needs more packages than the rest does
    from experiments import tasks

    config = quickstart.get_config("method=dense")
    config.batch_size = rows
    config.model.update(
        layers=layers,
        d_model=width,
        heads=heads,
        d_head=width // heads,
        d_inner=4 * width,
        segment=segment,
        memory=segment,
    )
    task = tasks.make(config)
    params, carry = jax.jit(task.init)(jax.random.key(0))
    text = np.random.default_rng(0).integers(0, 256, (rows, segment + 1), np.int32)
    batch = {
        "inputs": jnp.asarray(text[:, :-1]),
        "targets": jnp.asarray(text[:, 1:]),
        "weights": jnp.ones((rows, segment)),
        "start": jnp.zeros(rows, bool),
    }

    def loss(alpha: PyTree, carry: PyTree) -> tuple[jax.Array, PyTree]:
        value, (carry, _) = task.loss(alpha, carry, batch, jax.random.key(0))
        return value, carry

    def loss_of_floor(alpha: PyTree, carry: PyTree) -> tuple[jax.Array, PyTree]:
        with nn.intercept_methods(_without_product):
            return loss(alpha, carry)

    title = f"Transformer-XL, {layers} layers of {width}, batch {rows} x {segment}"
    flat = flatten_dict(params)
    rest = unflatten_dict({k: v for k, v in flat.items() if k[-1] != "kernel"})
    floor = Problem("floor", rest, carry, loss_of_floor, {}, {})
    return Problem(title, params, carry, loss, AXES, task.uses, floor)


def _without_product(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Interceptor: a dense layer without kernel, its input repeated or cut to shape."""
    layer: Any = context.module
    if not isinstance(layer, nn.Dense | nn.DenseGeneral):
        return next_call(*args, **kwargs)
    (x,) = args
    axis = np.atleast_1d(getattr(layer, "axis", -1))
    rows = x.shape[: x.ndim - len(axis)]
    shape = tuple(np.atleast_1d(layer.features).tolist())
    x = x.reshape(*rows, -1)
    size = int(np.prod(shape))
    x = jnp.tile(x, -(-size // x.shape[-1]))[..., :size].reshape(*rows, *shape)
    return x + layer.get_variable("params", "bias") if layer.use_bias else x


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "tiny": lambda: mlp((256, 512), rows=8),
    "mlp-4096": lambda: mlp((1024, 4096, 1024), rows=512),
    "mlp-8192": lambda: mlp((2048, 8192, 2048), rows=512),
    "mlp-32768": lambda: mlp((8192, 32768, 8192), rows=4096),  # for accelerators
    "unrolled": lambda: stack(4, 1024, 4096, rows=256, scanned=False),
    "scanned": lambda: stack(4, 1024, 4096, rows=256, scanned=True),
    "transformer-small": lambda: transformer(layers=4, width=128, rows=16, segment=64),
    "transformer": lambda: transformer(layers=4, width=256, rows=16, segment=128),
    "transformer-xl-128": lambda: transformer(12, 512, rows=8, segment=128, heads=8),
    "transformer-xl-512": lambda: transformer(12, 512, rows=4, segment=512, heads=8),
}

"""A short run of one parameter in any layout, on a loss whose gradients are exact."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilation import fast_compilation

import topkast_jax as tk

STEPS, EVERY, ROWS = 20, 3, 7
PLAIN, STACKED = (16, 24), (3, 16, 8)
COMPILATION = fast_compilation()


class Seen(NamedTuple):
    """After one update: the loss before it, A, B, and the exported weights."""

    loss: float
    forward: np.ndarray
    backward: np.ndarray
    weights: np.ndarray


def assert_same(masked: list[Seen], packed: list[Seen]) -> None:
    """Sets to the bit, numbers nearly."""
    for t, (one, two) in enumerate(zip(masked, packed, strict=True)):
        np.testing.assert_array_equal(one.forward, two.forward, f"A after {t}")
        np.testing.assert_array_equal(one.backward, two.backward, f"B after {t}")
        np.testing.assert_allclose(one.weights, two.weights, rtol=1e-5, atol=1e-6)
        assert abs(one.loss - two.loss) <= 1e-4 * abs(one.loss), t


def loss(theta: Any, opt_state: Any, step: Any) -> jax.Array:
    """Squares of differences to 64ths: gradients have no rounding of their own.

    So layouts agree to the last bit, whatever XLA fuses, and many gradients tie.
    """
    alpha = tk.sparsify(theta, tk.masks(opt_state), expanded=True)
    kernel = alpha["one"]["kernel"]
    count = jnp.arange(kernel.size).reshape(kernel.shape)
    wave = ((37 * count + 11 * step) % 128 - 64) / 64.0
    bias = jnp.sum((alpha["one"]["bias"] - 1) ** 2)
    return 0.5 * jnp.sum((kernel - wave) ** 2) + bias


def observed_loss(
    theta: Any, opt_state: Any, step: Any, zeros: Any = None
) -> jax.Array:
    """`loss`, and a product by the kernel as the layout multiplies, seen by taps.

    Inputs are 8ths and the product's cotangents are 16ths, whatever the weights are:
    statistics have no rounding either, and change from step to step.
    """
    alpha = tk.sparsify(theta, tk.masks(opt_state))
    kernel = (alpha if zeros is None else tk.tap(alpha, zeros))["one"]["kernel"]
    grid = tk.masks(opt_state).forward["one"]["kernel"]
    *stack, inputs, outputs = getattr(grid, "grid", grid).shape
    x = ((23 * jnp.arange(ROWS * inputs) + 5 * step) % 17 - 3).reshape(ROWS, -1) / 8.0
    slope = ((7 * jnp.arange(ROWS * outputs) + step) % 13 - 4).reshape(ROWS, -1) / 16.0

    def product(kernel: Any) -> jax.Array:
        value = kernel.value if isinstance(kernel, tk.Tapped) else kernel
        packed = isinstance(value, tk.BlockMatrix)
        y = tk.ops.sparse_matmul(x, value) if packed else x @ value
        y = tk.observe(x, y, kernel) if isinstance(kernel, tk.Tapped) else y
        return jnp.sum(y * slope)

    if stack:
        _, each = jax.lax.scan(lambda _, one: (None, product(one)), None, kernel)
        return loss(theta, opt_state, step) + jnp.sum(each)
    return loss(theta, opt_state, step) + product(kernel)


def run(
    layout: Any,
    method: tk.Method,
    shape: tuple[int, ...] = PLAIN,
    inner: optax.GradientTransformation | None = None,
    dtype: Any = jnp.float32,
    delay: int = 0,
) -> list[Seen]:
    """Trains for twenty steps, masks refreshed by whichever way the layout has.

    A method that draws by statistics has `observed_loss`, others `loss`.
    """
    objective = loss if method.statistics is None else observed_loss
    axes = tk.axes({"*/kernel": "s i o"}) if len(shape) == 3 else None
    inner = optax.adam(0.05) if inner is None else inner
    tx = tk.sparse(inner, method, layout=layout, seed=7, axes=axes, refresh_delay=delay)
    kernel = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    theta: Any = {"one": {"kernel": kernel, "bias": jnp.zeros(shape[-1])}}
    packed = layout != "masked"
    store = None
    if packed:
        theta, state, store = tk.start(tx, theta)
    else:
        state = jax.jit(tx.init, compiler_options=COMPILATION)(theta)

    @jax.jit
    def step(theta: Any, state: Any, t: Any) -> Any:
        zeros = tk.taps(tx, theta, state)
        if method.statistics is None:
            value, grads = jax.value_and_grad(loss)(theta, state, t)
            updates, state = tx.update(grads, state, theta)
        else:
            both = jax.value_and_grad(observed_loss, argnums=(0, 3))
            value, (grads, stats) = both(theta, state, t, zeros)
            updates, state = tx.update(grads, state, theta, stats=stats)
        return optax.apply_updates(theta, updates), state, value

    seen, chosen = [], None
    for t in range(STEPS):
        found = None
        reads = method.probe or method.needs_gradient
        if packed and reads and tk.due(tx, t + 1 + delay):
            found = tk.probe(objective, theta, state, t)
        theta, state, value = step(theta, state, t)
        if packed and delay and tk.due(tx, t + 1 + delay):
            chosen = tk.choose(tx, theta, state, store, found)
        if packed and tk.due(tx, t + 1):
            theta, state, store = tk.refresh(tx, theta, state, store, found, chosen)
        masks, alpha = tk.dense_masks(state), tk.export(theta, state)
        seen.append(
            Seen(
                float(value),
                np.asarray(masks.forward["one"]["kernel"]),
                np.asarray(masks.backward["one"]["kernel"]),
                np.asarray(alpha["one"]["kernel"], np.float32),
            )
        )
    return seen

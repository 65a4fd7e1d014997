"""A short run of one parameter in any layout, on a loss whose gradients are exact."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilation import fast_compilation

import topkast_jax as tk

STEPS, EVERY = 10, 3
PLAIN, STACKED = (16, 24), (3, 16, 8)
COMPILATION = fast_compilation()


class Seen(NamedTuple):
    """After one update: the loss before it, A, B, and the exported weights."""

    loss: float
    forward: np.ndarray
    backward: np.ndarray
    weights: np.ndarray


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


def run(
    layout: Any,
    method: tk.Method,
    shape: tuple[int, ...] = PLAIN,
    inner: optax.GradientTransformation | None = None,
    dtype: Any = jnp.float32,
    delay: int = 0,
) -> list[Seen]:
    """Trains for ten steps, masks refreshed by whichever way the layout has."""
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
        value, grads = jax.value_and_grad(loss)(theta, state, t)
        updates, state = tx.update(grads, state, theta)
        return optax.apply_updates(theta, updates), state, value

    seen, chosen = [], None
    for t in range(STEPS):
        found = None
        reads = method.probe or method.needs_gradient
        if packed and reads and tk.due(tx, t + 1 + delay):
            found = tk.probe(loss, theta, state, t)
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

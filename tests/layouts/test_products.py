"""Blocks multiplied by themselves in training: the masked layout's losses, step by step."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lockstep import COMPILATION

import topkast_jax as tk
from topkast_jax.ops.api import choose

STEPS, EVERY, ROWS, WIDTHS = 20, 5, 32, (128, 256, 128)
METHODS: dict[str, Any] = {
    "top_kast": lambda **o: tk.top_kast(0.75, 0.5, refresh=tk.every(EVERY), **o),
    "static": lambda **o: tk.static(0.75, **o),
    "set": lambda **o: tk.set_(0.75, refresh=tk.every(EVERY), **o),
    "rigl": lambda **o: tk.rigl(0.75, refresh=tk.every(EVERY), **o),
}
STRUCTURES = {
    "blocks_rows_first": tk.blocks(32, 32),
    "columns": tk.fan_in(1, 64),
    "entries": tk.unstructured,
}


def losses(layout: Any, method: tk.Method) -> tuple[list[float], Any, set[str]]:
    """Of each step, A at the end, and how the layers were multiplied."""
    draw = np.random.default_rng(0)
    params = {
        str(i): jnp.asarray(draw.normal(size=pair) / pair[0] ** 0.5, jnp.float32)
        for i, pair in enumerate(itertools.pairwise(WIDTHS))
    }
    x = jnp.asarray(draw.normal(size=(ROWS, WIDTHS[0])), jnp.float32)
    y = jnp.sin(x @ jnp.asarray(draw.normal(size=(WIDTHS[0], WIDTHS[-1]))) / 8)
    tx = tk.sparse(optax.adam(1e-3), method._replace(where="*"), layout=layout, seed=3)
    store, state = None, None
    if layout == "masked":
        state = tx.init(params)
    else:
        params, state, store = tk.start(tx, params)

    def objective(theta: Any, state: Any) -> jax.Array:
        alpha, z = tk.sparsify(theta, tk.masks(state)), x
        for name in sorted(alpha):
            matrix = alpha[name]
            sparse = isinstance(matrix, tk.BlockMatrix)
            z = tk.ops.sparse_matmul(z, matrix) if sparse else z @ matrix
            z = jax.nn.gelu(z) if name == "0" else z
        return jnp.mean((z - y) ** 2)

    @functools.partial(jax.jit, compiler_options=COMPILATION)
    def step(theta: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(objective)(theta, state)
        updates, state = tx.update(grads, state, theta)
        return optax.apply_updates(theta, updates), state, value

    found = []
    for t in range(STEPS):
        due, seen = layout != "masked" and bool(tk.due(tx, t + 1)), None
        if due and method.probe:
            seen = tk.probe(objective, params, state)
        params, state, value = step(params, state)
        found.append(float(value))
        if due:
            params, state, store = tk.refresh(tx, params, state, store, seen)
    indices = [i for i in tk.masks(state).forward.values() if isinstance(i, tk.Index)]
    return found, tk.dense_masks(state).forward, {choose(i) for i in indices}


CELLS = [
    ("blocks_rows_first", "rigl"),
    ("columns", "set"),
    ("entries", "static"),
]
REST = [
    (route, name)
    for route in ("blocks_rows_first", "columns")
    for name in METHODS
    if (route, name) not in CELLS
]


@pytest.mark.parametrize(
    ("route", "name"),
    [*CELLS, *(pytest.param(*x, marks=pytest.mark.slow) for x in REST)],
)
def test_losses_are_those_of_the_masked_layout(route, name):
    method = METHODS[name](structure=STRUCTURES[route])
    if route == "entries":  # where they are few enough
        method = tk.static(0.98)
    masked, of_masked, _ = losses("masked", method)
    block, of_block, routes = losses("block", method)
    assert routes == {route}
    np.testing.assert_allclose(block, masked, rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, of_masked, of_block)
    assert masked[-1] < masked[0]

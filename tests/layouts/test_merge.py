"""Groups merged into one matrix mean the same, and cost less."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk

STRUCTURES = {
    "outputs": tk.groups_of(4),
    "inputs": tk.groups_of(4, along="inputs"),
    "blocks": tk.groups_of(4, tk.blocks(2, 2)),
    "blocks, inputs": tk.groups_of(4, tk.blocks(2, 2), along="inputs"),
    "fan-in": tk.groups_of(4, tk.fan_in(1, 2)),
    "N:M": tk.groups_of(4, tk.n_of_m(4)),
    "N:M, inputs": tk.groups_of(2, tk.n_of_m(4), along="inputs"),
}


def started(structure: Any, shape: tuple[int, ...], axes: str, layout: Any) -> Any:
    method = tk.top_kast(0.5, 0.25, structure=structure)
    tx = tk.sparse(optax.sgd(1.0), method, layout=layout, axes=tk.axes({"*": axes}))
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    theta, state, _ = tk.start(tx, {"kernel": kernel})
    return theta, tk.masks(state), tk.export(theta, state)["kernel"]


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize(
    ("shape", "axes"), [((16, 16), "i o"), ((3, 8, 16), "s i o"), ((8, 4, 4), "i o o")]
)
def test_alpha_and_gradients_stay(name: str, shape: tuple[int, ...], axes: str) -> None:
    theta, masks, alpha = started(STRUCTURES[name], shape, axes, "packed")
    whole, everything = tk.merge_groups(theta, masks)
    assert everything.forward["kernel"].grid.structure.parts == 1
    np.testing.assert_array_equal(tk.sparsify(whole, everything)["kernel"], alpha)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def total(theta: Any, merged: bool) -> jax.Array:
        own, marks = tk.merge_groups(theta, masks) if merged else (theta, masks)
        return jnp.sum(tk.sparsify(own, marks)["kernel"] * weight)

    found, expected = (jax.grad(total)(theta, merged) for merged in (True, False))
    np.testing.assert_array_equal(found["kernel"], expected["kernel"])


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("blocks", "blocks"), ("blocks, inputs", "blocks"), ("fan-in", "columns")],
)
def test_products_stay(name: str, implementation: str) -> None:
    theta, masks, alpha = started(STRUCTURES[name], (16, 16), "i o", "block")
    whole, everything = tk.merge_groups(theta, masks)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 16)), jnp.float32)

    def through(x: jax.Array) -> jax.Array:
        return tk.ops.sparse_matmul(
            x, tk.sparsify(whole, everything)["kernel"], implementation
        )

    y, back = jax.vjp(through, x)
    np.testing.assert_allclose(y, x @ alpha, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(y)[0], y @ alpha.T, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_merged_is_passed_on() -> None:
    fan_in = tk.groups_of(4, tk.fan_in(1, 2), along="inputs")
    for structure, axes in ((fan_in, "i o"), (tk.groups_of(4), "o i")):
        theta, masks, _ = started(structure, (16, 16), axes, "packed")
        whole, everything = tk.merge_groups(theta, masks)
        assert whole["kernel"] is theta["kernel"]
        assert everything.forward["kernel"] is masks.forward["kernel"]


def test_one_partial_sum_instead_of_one_for_each_group() -> None:
    theta, masks, _ = started(STRUCTURES["blocks"], (16, 16), "i o", "block")
    x = jnp.ones((64, 16))

    def gradient(merged: bool) -> str:
        own, marks = tk.merge_groups(theta, masks) if merged else (theta, masks)
        matrix = tk.sparsify(own, marks)["kernel"]

        def objective(x: jax.Array) -> jax.Array:
            return jnp.sum(tk.ops.sparse_matmul(x, matrix, "blocks") ** 2)

        return str(jax.make_jaxpr(jax.grad(objective))(x))

    assert "f32[4,8,2,64]" in gradient(merged=False)
    assert "f32[4,8,2,64]" not in gradient(merged=True)

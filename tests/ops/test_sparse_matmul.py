"""Every implementation against float64, on fresh inputs whose seed is printed."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk
from topkast_jax.ops import xla
from topkast_jax.ops.api import choose

INPUTS, OUTPUTS = 32, 48
STRUCTURES = {
    "entries": tk.unstructured,
    "blocks": tk.blocks(4, 8),
    "fan_in": tk.fan_in(),
    "fan_in_blocks": tk.fan_in(2, 8),
    "n_of_m": tk.n_of_m(8),
    "groups": tk.groups_of(2, tk.blocks(4, 8)),
    "groups_of_inputs": tk.groups_of(2, tk.fan_in(2, 8), along="inputs"),
}
SHAPES = {
    "i o": (32, 48),
    "i o o": (32, 6, 8),
    "i i o": (8, 4, 48),
    "k i o": (2, 16, 48),
}
BLOCKED = ("blocks", "fan_in_blocks", "groups", "groups_of_inputs")


def matrix(structure: tk.Structure, axes: str = "i o", seed: int = 0) -> Any:
    """A packed matrix, and in float64: alpha [I, O], and B as [I, O]."""
    tx = tk.sparse(
        optax.sgd(0.1),
        tk.top_kast(0.7, 0.4, structure=structure),
        layout="block",
        axes=tk.axes({"kernel": axes}),
    )
    dense = jax.random.normal(jax.random.key(seed), SHAPES[axes])
    theta, state, _ = tk.start(tx, {"kernel": dense})
    found = tk.sparsify(theta, tk.masks(state), expanded=False)["kernel"]
    alpha = np.asarray(tk.export(theta, state)["kernel"], np.float64)
    b = np.asarray(tk.dense_masks(state).backward["kernel"])
    return found, alpha.reshape(INPUTS, OUTPUTS), b.reshape(INPUTS, OUTPUTS)


@pytest.mark.parametrize(
    "axes",
    [
        "i o",
        "i i o",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ("i o o", "k i o")),
    ],
)
@pytest.mark.parametrize(
    ("name", "structure"),
    [
        *(("expanded", s) for s in STRUCTURES),
        *(("blocks", s) for s in BLOCKED),
        *(("blocks_rows_first", s) for s in BLOCKED),
        *(("batch", s) for s in BLOCKED),
        ("columns", "fan_in_blocks"),
        *(("entries", s) for s in ("entries", "fan_in", "n_of_m")),
    ],
)
def test_products_and_gradients(name, structure, axes):
    seed = time.time_ns() % 2**31
    print(f"seed {seed}")  # pytest shows it when something fails
    random = np.random.default_rng(seed)
    found, alpha, b = matrix(STRUCTURES[structure], axes)
    x = random.normal(size=(3, 5, INPUTS))
    g = random.normal(size=(3, 5, OUTPUTS))

    def product(x: Any, values: Any) -> Any:
        return tk.ops.sparse_matmul(x, tk.BlockMatrix(values, found.index), name)

    if structure == "groups_of_inputs" and axes == "k i o" and name != "expanded":
        with pytest.raises(NotImplementedError, match="along the inputs of a window"):
            product(x, found.values)
        return
    y, vjp = jax.vjp(product, jnp.asarray(x, jnp.float32), found.values)
    dx, dvalues = vjp(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(y, x @ alpha, atol=2e-5)
    np.testing.assert_allclose(dx, g @ alpha.T, atol=2e-5)
    every = tk.BlockMatrix(dvalues, _all_forward(found.index))
    dense = tk.ops.sparse_matmul(jnp.eye(INPUTS), every, "expanded")
    wanted = x.reshape(-1, INPUTS).T @ g.reshape(-1, OUTPUTS)
    np.testing.assert_allclose(dense, wanted * b, atol=2e-5)


def _all_forward(index: tk.Index) -> tk.Index:
    return tk.Index(index.index, index.grid, index.index.shape[-1])


@pytest.mark.parametrize("name", ["blocks", "blocks_rows_first", "batch", "columns"])
@pytest.mark.parametrize("structure", ["entries", "fan_in", "n_of_m"])
def test_single_entries_are_declined(name, structure):
    found, *_ = matrix(STRUCTURES[structure])
    with pytest.raises(NotImplementedError, match="single entries"):
        tk.ops.sparse_matmul(jnp.ones((2, INPUTS)), found, name)


@pytest.mark.parametrize("structure", ["blocks", "fan_in_blocks", "groups"])
def test_blocks_are_no_single_entries(structure):
    found, *_ = matrix(STRUCTURES[structure])
    with pytest.raises(NotImplementedError, match="no single entries"):
        tk.ops.sparse_matmul(jnp.ones((2, INPUTS)), found, "entries")


@pytest.mark.parametrize("at_once", [1, 100, 4096])
def test_any_number_of_entries_at_once(at_once, monkeypatch):
    monkeypatch.setattr(xla, "AT_ONCE", at_once)
    found, alpha, _ = matrix(STRUCTURES["entries"], "i o o")
    x = np.random.default_rng(0).normal(size=(7, INPUTS)).astype(np.float32)
    y = tk.ops.sparse_matmul(x, found, "entries")
    np.testing.assert_allclose(y, x @ alpha, atol=2e-5)


def test_columns_need_a_constant_number():
    found, *_ = matrix(STRUCTURES["blocks"])
    with pytest.raises(NotImplementedError, match="not fan_in"):
        tk.ops.sparse_matmul(jnp.ones((2, INPUTS)), found, "columns")


def test_features_first():
    found, alpha, _ = matrix(STRUCTURES["blocks"])
    x = np.random.default_rng(0).normal(size=(INPUTS, 7)).astype(np.float32)
    y = tk.ops.sparse_matmul(x, found, "blocks", features_first=True)
    np.testing.assert_allclose(y, alpha.T @ x, atol=2e-5)


@pytest.mark.parametrize("turns", [0, 16])
@pytest.mark.parametrize("name", ["blocks", "blocks_rows_first"])
def test_loops_written_out_or_not(name, turns, monkeypatch):
    monkeypatch.setattr(xla, "WRITTEN_OUT", turns)
    found, alpha, _ = matrix(STRUCTURES["blocks"])
    x = np.random.default_rng(0).normal(size=(7, INPUTS)).astype(np.float32)
    y = tk.ops.sparse_matmul(x, found, name)
    np.testing.assert_allclose(y, x @ alpha, atol=2e-5)


@pytest.mark.parametrize(
    ("x", "name", "message"),
    [
        ((2, 31), None, "does not fit a matrix of 32 inputs"),
        ((2, 32), "fast", "implementation='fast' is not one of expanded"),
    ],
)
def test_bad_arguments(x, name, message):
    found, *_ = matrix(tk.unstructured)
    with pytest.raises(ValueError, match=message):
        tk.ops.sparse_matmul(jnp.ones(x), found, name)


def test_choice_by_structure():
    for structure, expected in (
        (tk.unstructured, "expanded"),
        (tk.n_of_m(8), "expanded"),
        (tk.blocks(4, 8), "expanded"),  # too small to be worth it
    ):
        assert choose(matrix(structure)[0].index) == expected


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [(0.97, 0.97, "entries"), (0.98, 0.95, "entries"), (0.95, 0.95, "expanded")],
)
@pytest.mark.parametrize("structure", [tk.unstructured, tk.fan_in()])
def test_few_single_entries_are_multiplied_one_by_one(
    forward, backward, expected, structure
):
    method = tk.top_kast(forward, backward, structure=structure)
    tx = tk.sparse(optax.sgd(0.1), method, layout="block")
    kernel = jax.random.normal(jax.random.key(0), (400, 20))
    _, state, _ = tk.start(tx, {"kernel": kernel})
    assert choose(tk.masks(state).forward["kernel"]) == expected


def test_products_are_chosen_for_the_platform_that_is_compiled_for():
    def of(structure):
        tx = tk.sparse(
            optax.sgd(0.1), tk.static(0.98, structure=structure), layout="block"
        )
        _, state, _ = tk.start(tx, {"kernel": jnp.ones((512, 512))})
        return tk.masks(state).forward["kernel"]

    blocks, entries = of(tk.blocks(64, 64)), of(tk.unstructured)
    with tk.ops.compiling_for("tpu"):
        assert [choose(x) for x in (blocks, entries)] == ["batch", "expanded"]
        with tk.ops.compiling_for("cpu"):
            assert choose(entries) == "entries"
    if jax.default_backend() == "cpu":
        assert [choose(x) for x in (blocks, entries)] == [
            "blocks_rows_first",
            "entries",
        ]


def test_blocks_form_no_dense_array():
    """Neither the matrix nor its gradient exists in a step on blocks."""
    tx = tk.sparse(
        optax.adam(0.1), tk.static(0.75, structure=tk.blocks(32, 32)), layout="block"
    )
    theta, state, _ = tk.start(tx, {"kernel": jnp.ones((256, 320))})
    x = jnp.ones((24, 256))

    def loss(theta: Any) -> Any:
        alpha = tk.sparsify(theta, tk.masks(state))
        return jnp.sum(tk.ops.sparse_matmul(x, alpha["kernel"]) ** 2)

    text = jax.jit(jax.grad(loss)).lower(theta).compile().as_text()
    assert "f32[20,32,32]" in text
    for dense in ("256,320", "320,256", "81920"):
        assert dense not in text


@pytest.mark.parametrize("name", ["expanded", "blocks", "batch"])
def test_dtypes_promote_as_in_a_dense_product(name):
    found, *_ = matrix(STRUCTURES["blocks"])
    x = jnp.ones((2, INPUTS), jnp.bfloat16)
    assert tk.ops.sparse_matmul(x, found, name).dtype == jnp.float32


def test_a_stack_is_refused():
    tx = tk.sparse(
        optax.sgd(0.1),
        tk.static(0.5),
        layout="block",
        axes=tk.axes({"kernel": "s i o"}),
    )
    theta, state, _ = tk.start(tx, {"kernel": jnp.ones((3, 8, 8))})
    alpha = tk.sparsify(theta, tk.masks(state))
    with pytest.raises(ValueError, match="a stack of matrices .3,.: take one"):
        tk.ops.sparse_matmul(jnp.ones((2, 8)), alpha["kernel"])

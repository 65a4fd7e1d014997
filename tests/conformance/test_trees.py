"""Every kind of parameter tree: the same invariants, the same names, the same draws."""

import dataclasses
from collections.abc import Callable
from typing import Any

import battery
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import HIDDEN, INPUTS, OUTPUTS, Model
from flax import nnx

import topkast_jax as tk


def matrices(path: str, shape: tuple[int, ...]) -> bool:
    """Which parameters are sparse where the last word of a path says nothing."""
    del path
    return len(shape) >= 2


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(OUTPUTS, name="two")(jnp.tanh(nn.Dense(HIDDEN, name="one")(x)))


def linen() -> Model:
    module = LinenMlp()
    params = module.init(jax.random.key(0), jnp.zeros((1, INPUTS)))["params"]
    return Model(params, lambda p, x: module.apply({"params": p}, x))


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one = nnx.Linear(INPUTS, HIDDEN, rngs=rngs)
        self.two = nnx.Linear(HIDDEN, OUTPUTS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.two(jnp.tanh(self.one(x)))


def nnx_split() -> Model:
    graph, params = nnx.split(NnxMlp(nnx.Rngs(0)), nnx.Param)
    return Model(params, lambda p, x: nnx.merge(graph, p)(x))


def nnx_state() -> Model:
    """As a loop that keeps the module: parameters read from it, the rest set aside."""
    module = NnxMlp(nnx.Rngs(0))
    graph, _, rest = nnx.split(module, nnx.Param, ...)
    params = nnx.state(module, nnx.Param)
    return Model(params, lambda p, x: nnx.merge(graph, p, rest)(x))


def tuples() -> Model:
    first, second = (
        battery.kernel(INPUTS, HIDDEN),
        battery.kernel(HIDDEN, OUTPUTS, seed=1),
    )
    params = ((first, jnp.zeros((HIDDEN,))), (second,))

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return battery.two_layers(p[0][0], p[0][1], p[1][0], x)

    return Model(params, apply, where=matrices)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """As Equinox stores one: arrays as fields, None for a bias that is not there."""

    weight: Any
    bias: Any
    name: str = dataclasses.field(metadata={"static": True})


def registered_dataclass() -> Model:
    params = (
        Layer(battery.kernel(INPUTS, HIDDEN), jnp.zeros((HIDDEN,)), "one"),
        Layer(battery.kernel(HIDDEN, OUTPUTS, seed=1), None, "two"),
    )

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return battery.two_layers(p[0].weight, p[0].bias, p[1].weight, x)

    return Model(params, apply)


def none_leaves() -> Model:
    params = {
        "one": {"kernel": battery.kernel(INPUTS, HIDDEN), "bias": None},
        "two": {"kernel": battery.kernel(HIDDEN, OUTPUTS, seed=1), "bias": None},
        "unused": None,
    }

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return battery.two_layers(p["one"]["kernel"], None, p["two"]["kernel"], x)

    return Model(params, apply)


def stacked() -> Model:
    """What nn.scan makes: one kernel for three layers; the last one is a tenth as big.

    Without a stack axis, selection over all of it would starve the last layer.
    """
    scale = jnp.array([1.0, 0.5, 0.1], jnp.float32)[:, None, None]
    params = {
        "blocks": {"kernel": scale * battery.kernel(3, INPUTS, INPUTS)},
        "out": {"kernel": battery.kernel(INPUTS, OUTPUTS, seed=1)},
    }

    def apply(p: Any, x: jax.Array) -> jax.Array:
        def block(h: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return h + jnp.tanh(h @ kernel), None

        return jax.lax.scan(block, x, p["blocks"]["kernel"])[0] @ p["out"]["kernel"]

    return Model(params, apply, stacked=("blocks",))


TREES: dict[str, Callable[[], Model]] = {
    "linen": linen,
    "nnx_split": nnx_split,
    "nnx_state": nnx_state,
    "tuples": tuples,
    "registered_dataclass": registered_dataclass,
    "none_leaves": none_leaves,
}
CELLS = [(m, t) for m in ("top_kast", "rigl") for t in TREES]
CELLS += [("gse", "nnx_state")]
REST = [(m, t) for m in tk.METHODS for t in TREES if (m, t) not in CELLS]


def run_cell(method: str, tree: str) -> None:
    model = TREES[tree]()
    tx = tk.sparse(
        optax.adam(0.05),
        battery.make_method(method, model.where),
        learning_rate=battery.RATE,
    )
    battery.assert_conforms(battery.train(model, tx), tx, method)


@pytest.mark.parametrize(("method", "tree"), CELLS)
def test_tree(method: str, tree: str) -> None:
    run_cell(method, tree)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tree"), REST)
def test_tree_of_the_full_product(method: str, tree: str) -> None:
    run_cell(method, tree)


# The others are instances of these: one kind of drawing, scoring or schedule each.
STACKED = (
    "top_kast",
    "static",
    "set",
    "rigl",
    "gse",
    "dsr",
    "deep_r",
    "srigl",
    "magnitude",
)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in STACKED else [pytest.mark.slow])
        for name in tk.METHODS
    ],
)
def test_stacked_kernels_keep_k_in_each_slice(method: str) -> None:
    model = stacked()
    axes = tk.axes({"blocks/kernel": "s i o"})
    tx = tk.sparse(
        optax.adam(0.05),
        battery.make_method(method),
        axes=axes,
        learning_rate=battery.RATE,
    )
    battery.assert_conforms(battery.train(model, tx), tx, method)


def test_undeclared_stack_starves_a_layer() -> None:
    """The test above would notice: this is what it guards against."""
    model = stacked()
    tx = tk.sparse(optax.adam(0.05), battery.make_method("top_kast"))
    forward = tk.masks(battery.initial(tx, model)).forward["blocks"]["kernel"]
    per_slice = np.asarray(forward).sum((1, 2))
    assert per_slice.sum() == round((1 - battery.FORWARD) * forward.size)
    assert per_slice[0] > 50 * max(1, per_slice[2])


def test_names_and_draws_do_not_depend_on_the_tree() -> None:
    """A Linen tree, an NNX state and a plain dict of one model: equal static masks."""
    method = battery.make_method("static")
    tx = tk.sparse(optax.sgd(0.1), method, seed=3)
    models = [battery.plain_dict(), linen(), nnx_split()]
    tables = [[row.path for row in tk.plan(tx, m.params).rows] for m in models]
    assert [sorted(table) for table in tables] == [sorted(tables[0])] * 3
    masks = [jax.tree.leaves(tk.masks(battery.initial(tx, m)).forward) for m in models]
    for one, *others in zip(*masks, strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)

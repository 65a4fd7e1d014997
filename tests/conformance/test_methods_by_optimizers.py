"""Every method with every kind of optimizer: the invariants hold for each pair."""

import functools
from collections.abc import Callable

import battery
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from battery import RATE

import topkast_jax as tk

Build = Callable[[tk.Method], optax.GradientTransformation]


def inside(inner: Callable[[], optax.GradientTransformation]) -> Build:
    """`tk.sparse` around an optimizer, made anew for each cell."""
    return lambda method: tk.sparse(inner(), method, learning_rate=RATE)


def momentum() -> optax.GradientTransformation:
    return optax.sgd(0.1, momentum=0.9)


def adam() -> optax.GradientTransformation:
    return optax.adam(0.05)


def adamw() -> optax.GradientTransformation:
    return optax.adamw(0.05, weight_decay=0.1)


def by_layer(
    one: optax.GradientTransformation, two: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One transformation for each layer of the model."""
    return optax.multi_transform({"a": one, "b": two}, {"one": "a", "two": "b"})


OPTIMIZERS: dict[str, Build] = {
    "sgd": inside(lambda: optax.sgd(0.3)),
    "momentum": inside(momentum),
    "adam": inside(adam),
    "adamw": inside(adamw),
    "adafactor": inside(lambda: optax.adafactor(0.05)),
    "adafactor_factored": inside(
        lambda: optax.adafactor(0.05, min_dim_size_to_factor=4)
    ),
    "lion": inside(lambda: optax.lion(0.03)),
    "rmsprop": inside(lambda: optax.rmsprop(0.02, momentum=0.5)),
    "muon": inside(lambda: optax.contrib.muon(0.05)),
    "schedule_free": inside(
        lambda: optax.contrib.schedule_free(adam(), learning_rate=0.05)
    ),
    "inject_hyperparams": inside(
        lambda: optax.inject_hyperparams(optax.adam)(
            learning_rate=optax.linear_schedule(0.05, 0.02, 6)
        )
    ),
    "clip_inside": inside(lambda: optax.chain(optax.clip_by_global_norm(1.0), adam())),
    "ema": inside(lambda: optax.chain(adam(), optax.ema(0.5))),
    "multi_steps_inside": inside(
        lambda: optax.MultiSteps(adam(), 2).gradient_transformation()
    ),
    "multi_transform_inside": inside(lambda: by_layer(adam(), momentum())),
    "multi_steps_outside": lambda method: optax.MultiSteps(
        tk.sparse(adam(), method, learning_rate=RATE), 2
    ).gradient_transformation(),
    "multi_transform_outside": lambda method: by_layer(
        tk.sparse(adam(), method, learning_rate=RATE),
        tk.sparse(momentum(), method, learning_rate=RATE),
    ),
    "multi_transform_dense_layer": lambda method: by_layer(
        tk.sparse(adam(), method, learning_rate=RATE), momentum()
    ),
    "apply_if_finite": lambda method: optax.apply_if_finite(
        tk.sparse(adam(), method, learning_rate=RATE), max_consecutive_errors=3
    ),
}

MOST = ("momentum", "adamw", "adafactor", "multi_transform_outside")
ROWS = [(m, "momentum") for m in tk.METHODS]
COLUMNS = [("top_kast", o) for o in OPTIMIZERS]
COLUMNS += [(m, o) for m in ("rigl", "magnitude") for o in MOST]
DYNAMIC = (
    "granet",
    "acdc",
    "rigl_itop",
    "snfs",
    "mest",
    "srigl",
    "dsr",
    "deep_r",
    "gse",
)
# Another optimizer for some: what it does to a state hangs little on the method.
DIAGONAL = [("gse", "adafactor"), ("dsr", "multi_steps_outside")]
DEFAULT = list(dict.fromkeys(ROWS + COLUMNS + DIAGONAL))
REST = [(m, o) for m in tk.METHODS for o in OPTIMIZERS if (m, o) not in DEFAULT]


@functools.cache
def with_momentum(name: str) -> tuple[optax.GradientTransformation, battery.Run]:
    """Six steps, for the cells of this optimizer and for the comparison of methods."""
    tx = OPTIMIZERS["momentum"](battery.make_method(name))
    return tx, battery.train(battery.plain_dict(), tx, 6)


def run_cell(method: str, optimizer: str) -> None:
    if optimizer == "momentum":
        tx, run = with_momentum(method)
    else:
        tx = OPTIMIZERS[optimizer](battery.make_method(method))
        steps = 10 if optimizer == "multi_steps_outside" else 6
        run = battery.train(battery.plain_dict(), tx, steps)
    battery.assert_conforms(run, tx, method)


def test_every_method_is_in_the_battery() -> None:
    assert battery.METHODS.keys() == battery.FACTS.keys() == tk.METHODS.keys()
    for name in tk.METHODS:
        assert battery.make_method(name).name == name


@pytest.mark.parametrize(("method", "optimizer"), DEFAULT)
def test_cell(method: str, optimizer: str) -> None:
    run_cell(method, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "optimizer"), REST)
def test_cell_of_the_full_product(method: str, optimizer: str) -> None:
    run_cell(method, optimizer)


@pytest.mark.parametrize("method", ["top_kast", "rigl"])
def test_apply_if_finite_withholds_the_whole_update(method: str) -> None:
    """A NaN in the data leaves parameters, masks, moments and clock as they were."""

    def batches(step: int) -> tuple[jnp.ndarray, jnp.ndarray]:
        x, y = battery.batch(step)
        return (x * jnp.nan if step == 1 else x), y

    tx = OPTIMIZERS["apply_if_finite"](battery.make_method(method))
    run = battery.train(battery.plain_dict(), tx, 4, batches)
    assert np.isnan(run.losses).tolist() == [False, True, False, False]
    assert [battery.clock(state) for state in run.states] == [0, 1, 1, 2, 3]
    before, after = (
        battery.named(battery.sparse_states(state)) for state in run.states[1:3]
    )
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path])
    battery.assert_off_mask(run, method)
    battery.assert_moves_when_due(run, method)


def test_factored_moments_are_named_in_the_plan() -> None:
    """Adafactor keeps rows and columns of the kernels: nothing there can be reset."""
    params = battery.plain_dict().params
    method = battery.make_method("top_kast")
    factored = OPTIMIZERS["adafactor_factored"](method)
    assert set(tk.plan(factored, params).slotless) == {"one/kernel", "two/kernel"}
    assert tk.plan(OPTIMIZERS["adam"](method), params).slotless == ()

"""Any two methods train differently, unless they are listed as aliases."""

import os
import pathlib

import battery
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk

SHAPE, STEPS = (8, 16), 12
RATE = 0.05


def end(name: str) -> np.ndarray:
    """Weights after some steps towards a fixed target, from one start, seed and sparsity."""
    tx = tk.sparse(
        optax.sgd(RATE, momentum=0.9),
        battery.make_method(name),
        seed=5,
        learning_rate=RATE,
    )
    start = {"kernel": jax.random.normal(jax.random.key(0), SHAPE)}
    target = jax.random.normal(jax.random.key(1), SHAPE)

    def step(carry: tuple[jax.Array, optax.OptState], t: jax.Array) -> tuple:
        theta, state = carry

        def loss(theta: dict[str, jax.Array]) -> jax.Array:
            alpha = tk.sparsify(theta, tk.masks(state))["kernel"]
            return jnp.sum((alpha - jnp.roll(target, t, axis=0)) ** 2)

        updates, state = tx.update(jax.grad(loss)(theta), state, theta)
        return (optax.apply_updates(theta, updates), state), None

    def train(start: dict[str, jax.Array]) -> jax.Array:
        (theta, _), _ = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(STEPS))
        return theta["kernel"]

    return np.asarray(jax.jit(train, compiler_options=battery.COMPILATION)(start))


@pytest.fixture(scope="session")
def ends(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that all workers of pytest-xdist share: weights by name of the method."""
    own = tmp_path_factory.getbasetemp()  # of a worker, in the one of the session
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = shared / "ends"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("name", tk.METHODS)
def test_trajectories_differ_unless_they_are_aliases(
    name: str, ends: pathlib.Path
) -> None:
    """Each writes its end and then reads all there are, so one of any two sees both."""
    mine = end(name)
    assert np.isfinite(mine).all()
    np.save(ends / f"{name}.part.npy", mine)
    os.replace(ends / f"{name}.part.npy", ends / name)
    for other in tk.METHODS.keys() - {name}:
        if (ends / other).exists():
            same = tk.ALIASES.get(name) == other or tk.ALIASES.get(other) == name
            assert np.array_equal(mine, np.load(ends / other)) == same, other


def test_aliases_are_methods() -> None:
    assert tk.ALIASES.items() <= {(a, b) for a in tk.METHODS for b in tk.METHODS}

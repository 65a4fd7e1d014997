"""Any two methods train differently, unless they are listed as aliases."""

import itertools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def test_trajectories_differ_unless_they_are_aliases() -> None:
    ends = {name: end(name) for name in tk.METHODS}
    assert set(tk.ALIASES) <= set(ends)
    for one, two in itertools.combinations(ends, 2):
        same = two in (tk.ALIASES.get(one), one) or one == tk.ALIASES.get(two)
        assert np.array_equal(ends[one], ends[two]) == same, (one, two)

"""sparsify: alpha forward, B and P backward, in every transformation of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import topkast_jax as tk
from topkast_jax import Masks

THETA = {"w": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.ones(3)}
A = jnp.array([[1, 0, 0], [0, 0, 1]], bool)
B = jnp.array([[1, 1, 0], [0, 0, 1]], bool)
MASKS = Masks({"w": A, "b": None}, {"w": B, "b": None}, {"w": None, "b": None})


def loss(theta, masks=MASKS):
    alpha = tk.sparsify(theta, masks)
    return jnp.sum(
        jnp.sin(alpha["w"]) ** 2 * jnp.arange(1.0, 7.0).reshape(2, 3)
    ) + jnp.sum(alpha["b"])


def test_value_and_gradient_by_hand():
    alpha = tk.sparsify(THETA, MASKS)
    np.testing.assert_array_equal(alpha["w"], [[1, 0, 0], [0, 0, 6]])
    assert alpha["b"] is THETA["b"]
    seen = jax.grad(lambda t: jnp.sum(tk.sparsify(t, MASKS)["w"] * 2))(THETA)["w"]
    np.testing.assert_array_equal(seen, 2 * B)


@pytest.mark.parametrize("probe", [True, False])
def test_probe_shows_everything(probe):
    masks = MASKS._replace(probe={"w": jnp.asarray(probe), "b": None})
    seen = jax.grad(lambda t: jnp.sum(tk.sparsify(t, masks)["w"]))(THETA)["w"]
    np.testing.assert_array_equal(seen, np.ones((2, 3)) if probe else B)


def test_probe_of_a_subset():
    some = jnp.array([[0, 0, 1], [0, 0, 0]], bool)
    masks = MASKS._replace(probe={"w": some, "b": None})
    seen = jax.grad(lambda t: jnp.sum(tk.sparsify(t, masks)["w"]))(THETA)["w"]
    np.testing.assert_array_equal(seen, B | some)


def test_gradient_is_that_of_explicit_zeros():
    """The gradient at alpha, with the rest explicitly zero, then masked to B."""
    zeroed = {"w": jnp.where(A, THETA["w"], 0), "b": THETA["b"]}
    everything = Masks(*({"w": jnp.ones((2, 3), bool), "b": None},) * 2, MASKS.probe)
    want = jax.grad(loss)(zeroed, everything)["w"]
    np.testing.assert_array_equal(jax.grad(loss)(THETA)["w"], jnp.where(B, want, 0))


def test_transformations():
    want = jax.grad(loss)(THETA)["w"]
    rematerialised = jax.grad(jax.checkpoint(loss))(THETA)["w"]
    np.testing.assert_allclose(rematerialised, want, rtol=1e-6)
    direction = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    _, slope = jax.jvp(loss, (THETA,), (direction,))
    assert float(slope) == pytest.approx(float(want.sum()), rel=1e-5)
    hvp = jax.jvp(jax.grad(loss), (THETA,), (direction,))[1]["w"]
    assert hvp.shape == (2, 3)
    assert not bool(jnp.any(jnp.where(B, 0, hvp)))
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), THETA)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(loss))(stacked)["w"][0], want, rtol=1e-6
    )

    def scanned(theta):
        def body(total, _):
            return total + loss(theta), None

        return jax.lax.scan(jax.checkpoint(body), 0.0, jnp.arange(3))[0]

    np.testing.assert_allclose(jax.grad(scanned)(THETA)["w"], 3 * want, rtol=1e-6)


def test_nan_off_the_mask_stays_there():
    theta = {"w": jnp.where(B, THETA["w"], jnp.nan), "b": THETA["b"]}
    assert bool(jnp.isfinite(loss(theta)))
    assert bool(jnp.isfinite(jax.grad(loss)(theta)["w"]).all())

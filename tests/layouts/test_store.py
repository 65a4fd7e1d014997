"""The reservoir on disk: mapped, saved, and refused by name when it is not whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk

PARAMS = {
    "kernel": jax.random.normal(jax.random.key(0), (12, 20)),
    "bias": jnp.zeros(20),
}


def transformation() -> tk.Sparse:
    method = tk.top_kast(0.8, 0.6, refresh=tk.every(1))
    return tk.sparse(optax.adam(0.05), method, layout="packed")


def trained(tx, theta, state, store, steps=3):
    for t in range(steps):
        grads = jax.tree.map(jnp.cos, theta)
        updates, state = tx.update(grads, state, theta)
        theta = optax.apply_updates(theta, updates)
        assert tk.due(tx, t + 1)
        theta, state, store = tk.refresh(tx, theta, state, store)
    return theta, state, store


def test_a_mapped_reservoir_is_one_in_memory(tmp_path):
    tx = transformation()
    one = trained(tx, *tk.start(tx, PARAMS))
    two = trained(tx, *tk.start(tx, PARAMS, reservoir=tmp_path / "theta"))
    jax.tree.map(np.testing.assert_array_equal, one[:2], two[:2])
    assert isinstance(two[2].theta["kernel"].base, np.memmap)
    assert two[2].folder == tmp_path / "theta"
    # What is written is on disk: another process maps the same.
    again = tk.load_store(tmp_path / "theta", mapped=True)
    np.testing.assert_array_equal(again.theta["kernel"], one[2].theta["kernel"])
    again.theta["kernel"][0, 0] = 7.0
    assert tk.load_store(tmp_path / "theta").theta["kernel"][0, 0] == 7.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saved_and_loaded(tmp_path, dtype):
    values = np.arange(6, dtype=np.float32).reshape(1, 6).astype(dtype)
    store = tk.Store({"a/kernel": values, "b": values[:, :2]})
    store.save(tmp_path / "saved")
    found = tk.load_store(tmp_path / "saved")
    assert found.theta.keys() == store.theta.keys() and found.nbytes == store.nbytes
    for path, x in found.theta.items():
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, store.theta[path])
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_an_empty_store_is_one_too(tmp_path):
    tk.Store().save(tmp_path / "saved")
    assert tk.load_store(tmp_path / "saved").theta == {}


def test_what_is_not_whole_is_named(tmp_path):
    store = tk.Store({"a/kernel": np.ones((1, 6), np.float32)})
    store.save(tmp_path / "saved")
    file = tmp_path / "saved" / "0.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="'a/kernel', has 23 bytes instead of 24"):
        tk.load_store(tmp_path / "saved")
    file.unlink()
    with pytest.raises(ValueError, match="'a/kernel', has 0 bytes instead of 24"):
        tk.load_store(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds no reservoir"):
        tk.load_store(tmp_path)


def test_of_another_model():
    tx = transformation()
    theta, state, store = tk.start(tx, PARAMS)
    with pytest.raises(ValueError, match="has nothing for 'kernel'"):
        tk.refresh(tx, theta, state, tk.Store())
    other = tk.Store({"kernel": store.theta["kernel"][:, :-1]})
    with pytest.raises(ValueError, match="an array of .1, 239. for 'kernel'"):
        tk.refresh(tx, theta, state, other)

"""When masks change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import topkast_jax as tk


def fires(due, steps=30):
    return [int(s) for s in np.flatnonzero(due(np.arange(steps)))]


def test_every():
    assert fires(tk.every(10)) == [10, 20]
    assert fires(tk.every(10, start=5)) == [5, 15, 25]
    assert fires(tk.every(10, start=0)) == [10, 20]  # never at 0
    assert fires(tk.every(10, stop=20)) == [10]
    assert fires(tk.every(1, stop=4)) == [1, 2, 3]
    assert bool(jax.jit(tk.every(10))(jnp.int32(20)))


def test_at():
    assert fires(tk.at([7, 3, 7])) == [3, 7]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tk.every(0), "at least 1"),
        (lambda: tk.every(10, stop=10), "never fires"),
        (lambda: tk.every(10, start=30, stop=20), "never fires"),
        (lambda: tk.every(10, start=-1), "negative"),
        (lambda: tk.at([]), "never fires"),
        (lambda: tk.at([0, 3]), "begin at step 1"),
        (lambda: tk.cosine(0.3, 0), "at least 1"),
        (lambda: tk.cubic(0.0, 0.9, 5, 5), "start < stop"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_first_due():
    assert tk.first_due(tk.every(100), 101) == 100
    assert tk.first_due(tk.every(100), 100) is None
    assert tk.first_due(tk.at([3]), 2) is None


def test_values():
    cosine = tk.cosine(0.3, 100)
    np.testing.assert_allclose(
        [cosine(0), cosine(50), cosine(100)], [0.3, 0.15, 0], atol=1e-7
    )
    assert float(cosine(500)) == pytest.approx(0, abs=1e-7)
    cubic = tk.cubic(0.0, 0.9, 10, 20)
    np.testing.assert_allclose(
        [cubic(0), cubic(10), cubic(15), cubic(20), cubic(99)],
        [0, 0, 0.9 * (1 - 0.125), 0.9, 0.9],
        rtol=1e-6,
    )

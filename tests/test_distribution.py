"""Sparsity becomes counts once, and the counts add up."""

import math
import re

import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import topkast_jax as tk

SHAPES = {"a/kernel": (8, 16), "b/kernel": (3, 3, 4, 5), "c/kernel": (2, 3)}
shapes = st.lists(
    st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
).map(lambda all_: {f"layer{i}/kernel": shape for i, shape in enumerate(all_)})
sparsities = st.floats(0, 0.99)


@given(shapes, sparsities)
def test_uniform_rounds_each(given_shapes, sparsity):
    want = oracle.uniform(given_shapes, sparsity)
    assert tk.uniform(given_shapes, sparsity) == want


@settings(deadline=None)
@given(shapes, sparsities)
def test_erk_is_the_oracle(given_shapes, sparsity):
    got = tk.erk(given_shapes, sparsity)
    want = oracle.erdos_renyi(given_shapes, sparsity, kernel=True)
    total = sum(math.prod(s) for s in given_shapes.values())
    assert sum(got.values()) == sum(want.values()) == round((1 - sparsity) * total)
    for path, k in got.items():
        assert abs(k - want[path]) <= 1  # equal remainders may go to either layer
        assert 0 <= k <= math.prod(given_shapes[path])


def test_erdos_renyi_counts_the_window_as_inputs():
    got = tk.erdos_renyi({"conv": (3, 3, 4, 64), "dense": (100, 200)}, 0.9)
    density = {"conv": got["conv"] / 2304, "dense": got["dense"] / 20000}
    want = ((36 + 64) / (36 * 64)) / ((100 + 200) / (100 * 200))
    assert density["conv"] / density["dense"] == pytest.approx(want, rel=0.01)


def test_erk_makes_small_layers_dense_and_keeps_the_total():
    got = tk.erk({"tiny": (2, 2), "large": (100, 100)}, 0.5)
    assert got == {"tiny": 4, "large": 4998}


def test_stacked_slices_share_one_count():
    got = tk.erk({"scan": (10, 10), "head": (20, 30)}, 0.8, {"scan": 7})
    total = 7 * got["scan"] + got["head"]
    assert 0 <= round(0.2 * (7 * 100 + 600)) - total < 7


def test_by_path():
    rule = tk.by_path({"a/*": 0.0, re.compile("c/.*"): 0.5}, rest=tk.erk)
    got = rule(SHAPES, 0.9, {})
    assert got["a/kernel"] == 128
    assert got["c/kernel"] == 3
    assert got["b/kernel"] == 18


def test_by_path_keeps_the_total():
    rule = tk.by_path({"c/*": 0.0}, keep_total=True)
    got = rule(SHAPES, 0.9, {})
    assert got["c/kernel"] == 6
    assert sum(got.values()) == pytest.approx(0.1 * (128 + 180 + 6), abs=2)
    with pytest.raises(ValueError, match=r"cannot be reached.*0\.980"):
        rule(SHAPES, 0.99, {})


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"'x/\*' matches no parameter.*a/kernel"):
        tk.by_path({"x/*": 0.5})(SHAPES, 0.9, {})
    for wrong in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match="sparsity"):
            tk.uniform(SHAPES, wrong)
    with pytest.raises(ValueError, match=r"by_path: 'a'"):
        tk.by_path({"a": 1.0})

"""Exact k, whatever the scores: ties, NaN, bf16, slices, masks, trees."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import topkast_jax as tk

SIZE = 24  # one shape for all examples: one compiled program
top_k = jax.jit(tk.top_k)
top_k_among = jax.jit(lambda s, k, among: tk.top_k(s, k, among=among))
top_k_keyed = jax.jit(lambda s, k, key: tk.top_k(s, k, key=key))

numbers = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1.0, -1.0]),
)
vectors = st.lists(numbers, min_size=SIZE, max_size=SIZE).map(np.float32)
counts = st.integers(0, SIZE)
marks = st.lists(st.booleans(), min_size=SIZE, max_size=SIZE).map(np.array)


@settings(max_examples=150, deadline=None)
@given(vectors, counts)
def test_is_the_stable_sort(scores, k):
    got = np.asarray(top_k(scores, jnp.int32(k)))
    np.testing.assert_array_equal(got, oracle.top_k(scores, k))


@settings(max_examples=100, deadline=None)
@given(vectors, counts, marks)
def test_chooses_only_among_the_marked(scores, k, among):
    got = np.asarray(top_k_among(scores, jnp.int32(k), among))
    k = min(k, int(among.sum()))
    np.testing.assert_array_equal(got, oracle.top_k(scores, k, among=among))


@settings(max_examples=50, deadline=None)
@given(vectors, counts, st.integers(0, 2**31))
def test_random_ties_keep_the_count_and_the_threshold(scores, k, seed):
    got = np.asarray(top_k_keyed(scores, jnp.int32(k), jax.random.key(seed)))
    assert got.sum() == k
    values = np.nan_to_num(scores, nan=-np.inf)
    if 0 < k < SIZE:
        assert values[got].min() >= values[~got].max()


distinct = st.lists(
    st.floats(width=32, allow_nan=False), min_size=SIZE, max_size=SIZE, unique=True
)


@settings(max_examples=30, deadline=None)
@given(distinct, counts, st.randoms(use_true_random=False))
def test_is_equivariant_away_from_ties(scores, k, random):
    scores = np.float32(scores)
    order = random.sample(range(SIZE), SIZE)
    got = np.asarray(top_k(scores, jnp.int32(k)))
    shuffled = np.asarray(top_k(scores[order], jnp.int32(k)))
    np.testing.assert_array_equal(shuffled, got[order])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32", "int8", "uint32"])
def test_dtypes(dtype):
    scores = jnp.asarray(np.random.default_rng(0).integers(0, 9, 500)).astype(dtype)
    got = np.asarray(tk.top_k(scores, 123))
    want = oracle.top_k(np.asarray(scores, np.float64), 123)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_all_equal_goes_to_the_lowest_indices(k):
    got = tk.top_k(jnp.zeros((2, 4)), k)
    np.testing.assert_array_equal(got.ravel(), np.arange(8) < k)


def test_random_ties_spread():
    """All-zero gradients must not grow at the lowest positions (a peer's defect)."""
    hits = sum(
        np.asarray(tk.top_k(jnp.zeros(100), 20, key=jax.random.key(i)))[:20].sum()
        for i in range(30)
    )
    assert 70 < hits < 170  # 120 expected, deviation under 10


def test_slices_are_apart():
    """One slice whose scores are larger must not starve the others."""
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (4, 10, 6)))
    scale = jnp.array([1.0, 2.0, 0.5, 0.1]).reshape(4, 1, 1)
    got = tk.top_k(scores * scale, 12, (1, 2))
    np.testing.assert_array_equal(got.sum((1, 2)), [12] * 4)
    np.testing.assert_array_equal(got[2], tk.top_k(scores[2], 12))
    ragged = tk.top_k(scores, jnp.array([0, 1, 30, 60]).reshape(4, 1, 1), (1, 2))
    np.testing.assert_array_equal(ragged.sum((1, 2)), [0, 1, 30, 60])


def test_static_k_out_of_range():
    with pytest.raises(ValueError, match=r"k=9 is outside \[0, 8\]"):
        tk.top_k(jnp.zeros((2, 4)), 9)
    with pytest.raises(ValueError, match="k=-1"):
        tk.top_k(jnp.zeros(3), -1)
    with pytest.raises(ValueError, match="real"):
        tk.top_k(jnp.zeros(3, jnp.complex64), 1)


def test_slices_too_large_to_index_are_refused():
    shape = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="2147483647"):
        jax.eval_shape(lambda x: tk.top_k(x, 5), shape)


def test_k_beyond_float32():
    """float32 counts are wrong past 2**24 (a peer keeps one entry too many)."""
    size = 2**24 + 1001
    k = 2**24 + 1
    got = jax.jit(lambda: tk.top_k(jnp.arange(size, dtype=jnp.int32), k))()
    assert int(jnp.sum(got)) == k
    assert not bool(got[size - k - 1])


@pytest.mark.parametrize("k", [0, 1, 17, 50, 59, 60])
@pytest.mark.parametrize("keyed", [False, True])
def test_tree_is_one_selection(k, keyed):
    draw = np.random.default_rng(3)
    tree = {"a": draw.integers(0, 4, (4, 5)), "b": [draw.integers(0, 4, 40)]}
    tree = jax.tree.map(jnp.float32, tree)
    key = jax.random.key(1) if keyed else None
    got = tk.top_k_tree(tree, k, key=key)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(got)])
    scores = np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    if keyed:
        assert flat.sum() == k
        assert k in (0, 60) or scores[flat].min() >= scores[~flat].max()
    else:
        np.testing.assert_array_equal(flat, oracle.top_k(scores, k))


def test_tree_among_and_errors():
    tree = {"a": jnp.arange(6.0), "b": jnp.arange(6.0)}
    among = {"a": jnp.zeros(6, bool), "b": jnp.arange(6) < 4}
    got = tk.top_k_tree(tree, 2, among)
    assert not got["a"].any()
    np.testing.assert_array_equal(got["b"], [False, False, True, True, False, False])
    with pytest.raises(ValueError, match="outside"):
        tk.top_k_tree(tree, 13)
    with pytest.raises(ValueError, match="dtypes"):
        tk.top_k_tree({"a": jnp.zeros(2), "b": jnp.zeros(2, jnp.bfloat16)}, 1)


def test_counts_carry_over_leaves():
    """Whole-tree counts are exact beyond int32: pairs in base 2**30."""
    from topkast_jax.select import _Count

    big = _Count.of(2**33 + 5)
    assert int(big.high) * 2**30 + int(big.low) == 2**33 + 5
    total = _Count.of(2**30 - 1).plus(_Count.of(2**30 - 1)).plus(_Count.of(3))
    assert int(total.high) * 2**30 + int(total.low) == 2**31 + 1
    back = total.minus(_Count.of(2**31 + 1))
    assert (int(back.high), int(back.low)) == (0, 0)
    assert bool(total.at_least(_Count.of(2**31 + 1)))
    assert not bool(total.at_least(_Count.of(2**31 + 2)))


def test_vmap_and_grad_free_tracing():
    scores = jax.random.normal(jax.random.key(0), (3, 40))
    got = jax.vmap(lambda s: tk.top_k(s, 7))(scores)
    want = jnp.stack([tk.top_k(s, 7) for s in scores])
    np.testing.assert_array_equal(got, want)

"""Patterns of masks: units are whole, counts are exact where they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk
from topkast_jax._types import Axes, Counts
from topkast_jax.grid import Grid, grid

PLAIN = Axes((), (), (0,), (1,))


def masks_of(method, shape, axes=None, seed=0):
    theta = {"kernel": jax.random.normal(jax.random.key(seed), shape)}
    tx = tk.sparse(
        optax.sgd(0.1), method, axes=tk.axes({"kernel": axes} if axes else {})
    )
    masks = tk.masks(tx.init(theta))
    return (
        np.asarray(theta["kernel"]),
        masks.forward["kernel"],
        masks.backward["kernel"],
    )


def test_blocks_by_hand():
    theta = jnp.array(
        [
            [1.0, 1.0, 0.0, 9.0],
            [1.0, 1.0, 0.0, 0.0],
            [3.0, 3.0, 2.0, 2.0],
            [3.0, 3.0, 2.0, 2.0],
        ]
    )
    tx = tk.sparse(optax.sgd(0.1), tk.top_kast(0.75, 0.5, structure=tk.blocks(2, 2)))
    masks = tk.masks(tx.init({"kernel": theta}))
    forward, backward = masks.forward["kernel"], masks.backward["kernel"]
    # Sums of blocks: 4, 9 / 12, 8. A keeps one of four, B two.
    assert forward.astype(int).tolist() == [[0] * 4] * 2 + [[1, 1, 0, 0]] * 2
    assert backward.astype(int).tolist() == [[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2


@pytest.mark.parametrize("size", [(2, 4), (1, 8), (4, 1)])
@pytest.mark.parametrize("axes", [None, "s i o", "i o o"])
def test_units_are_whole(size, axes):
    shape = (8, 16) if axes is None else (4, 4, 8)
    *_, mask = masks_of(tk.static(0.5, structure=tk.blocks(*size)), shape, axes)
    slices = {"s i o": 4}.get(axes, 1)
    rows = shape[-2] if axes == "s i o" else shape[0]
    matrix = np.asarray(mask).reshape(slices, rows, -1)
    high, wide = min(size[0], rows), min(size[1], matrix.shape[2])
    units = matrix.reshape(slices, rows // high, high, -1, wide)
    full, some = units.all((2, 4)), units.any((2, 4))
    np.testing.assert_array_equal(full, some)
    np.testing.assert_array_equal(full.sum((1, 2)), [full[0].size // 2] * slices)


def test_outputs_before_inputs():
    """Roles may come in any order: a block is inputs x outputs all the same."""
    theta, mask, _ = masks_of(
        tk.top_kast(0.5, 0.5, structure=tk.blocks(4, 1)), (6, 8), "o i"
    )
    sums = np.abs(theta).reshape(6, 2, 4).sum(2)
    units = np.asarray(mask).reshape(6, 2, 4)
    np.testing.assert_array_equal(units.all(2), units.any(2))
    assert sums[units.all(2)].min() > sums[~units.all(2)].max()


@pytest.mark.parametrize("make", [tk.static, tk.set_, tk.rigl])
def test_constant_fan_in(make):
    *_, mask = masks_of(make(0.75, structure=tk.fan_in()), (16, 5))
    np.testing.assert_array_equal(np.asarray(mask).sum(0), [4] * 5)


def test_constant_fan_in_keeps_the_largest_of_each_column():
    theta, forward, backward = masks_of(
        tk.top_kast(0.75, 0.5, structure=tk.fan_in()), (16, 5)
    )
    order = np.sort(np.abs(theta), axis=0)[::-1]
    np.testing.assert_array_equal(forward, np.abs(theta) >= order[3])
    np.testing.assert_array_equal(backward, np.abs(theta) >= order[7])


def test_n_of_m():
    theta, mask, _ = masks_of(tk.top_kast(0.5, 0.5, structure=tk.n_of_m(4)), (16, 5))
    groups = np.asarray(mask).reshape(4, 4, 5)
    np.testing.assert_array_equal(groups.sum(1), np.full((4, 5), 2))
    sizes = np.abs(theta).reshape(4, 4, 5)
    assert (
        np.where(groups, sizes, np.inf).min(1) > np.where(groups, 0, sizes).max(1)
    ).all()


STRUCTURES = [tk.blocks(2, 4), tk.fan_in(), tk.fan_in(1, 4), tk.n_of_m(4)]


METHODS = {
    "top_kast": lambda **o: tk.top_kast(0.75, 0.5, **o),
    "top_kast_random": lambda **o: tk.top_kast(0.75, 0.5, explore="random", **o),
    "set": lambda **o: tk.set_(0.75, **o),
    "rigl": lambda **o: tk.rigl(0.75, **o),
}
# Each method once; the rest is slow.
FAST = list(zip(METHODS, STRUCTURES, strict=True))
CELLS = [
    pytest.param(
        METHODS[name],
        structure,
        id=f"{name}-{structure.name}",
        marks=[] if (name, structure) in FAST else pytest.mark.slow,
    )
    for name in METHODS
    for structure in STRUCTURES
]


@pytest.mark.parametrize(("make", "structure"), CELLS)
def test_refreshes_keep_the_pattern(make, structure):
    """Ten steps: the counts stay, A lies in B, the masks move, units stay whole."""
    method = make(refresh=tk.every(2), structure=structure)
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
    tx = tk.sparse(optax.adam(0.3), method, seed=3)
    state = tx.init(params)
    target = jax.random.normal(jax.random.key(1), (16, 8))

    @jax.jit
    def step(params, state):
        def loss(theta):
            alpha = tk.sparsify(theta, tk.masks(state))
            return jnp.sum((alpha["kernel"] - target) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    units = Grid((16, 8), PLAIN, structure)
    first = np.asarray(tk.masks(state).forward["kernel"])
    moved = False
    for _ in range(10):
        params, state = step(params, state)
        tk.check(params, state)
        a, b = (tk.masks(state)[i]["kernel"] for i in (0, 1))
        assert not np.any(a & ~b)
        for mask, k in zip(
            (a, b), (32, 32 if not method.reservoir else 64), strict=True
        ):
            assert int(mask.sum()) == k
            chosen = units.of_entries(mask)
            np.testing.assert_array_equal(units.spread(chosen), mask)
            per = np.asarray(chosen).sum(units.roles.within)
            assert len(set(np.ravel(per).tolist())) == 1
        moved |= bool((np.asarray(a) != first).any())
    assert moved


def test_the_penalty_counts_units():
    """The factor 1/D is that of the units, hence of the entries."""
    params = {"kernel": jnp.arange(1.0, 17).reshape(4, 4)}
    method = tk.top_kast(0.75, 0.5, structure=tk.blocks(2, 2), penalty=0.5)
    tx = tk.sparse(optax.sgd(1.0), method)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    ratio = np.asarray(updates["kernel"] / params["kernel"])
    np.testing.assert_allclose(np.unique(ratio.round(6)), [-2.0, -0.5, 0.0])


@pytest.mark.parametrize(
    ("structure", "counts", "expected"),
    [
        (tk.unstructured, Counts(13, 26), Counts(13, 26)),
        (tk.blocks(4, 4), Counts(13, 26), Counts(1, 2)),
        (tk.blocks(8, 8), Counts(13, 26), Counts(1, 1)),
        (tk.fan_in(), Counts(13, 26), Counts(2, 3)),
        (tk.n_of_m(8), Counts(13, 26), Counts(1, 2)),
        (tk.blocks(99, 99), Counts(13, 26), Counts(1, 1)),
    ],
)
def test_counts_become_units(structure, counts, expected):
    assert grid(structure, "kernel", (16, 8), PLAIN).quantise(counts) == expected


def test_the_plan_shows_both_numbers():
    tx = tk.sparse(optax.adam(0.1), tk.static(0.9, structure=tk.blocks(4, 4)))
    plan = tk.plan(tx, {"kernel": jnp.ones((16, 8))})
    assert plan.rows[0].k_forward == 16 and plan.rows[0].asked == (13, 13)
    assert "blocks 4x4: asked for k_A 13, k_B 13" in str(plan)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (tk.blocks(5, 2), "'kernel' has 16 inputs, not a multiple of 5, as blocks 5x2"),
        (tk.blocks(2, 3), "'kernel' has 8 outputs, not a multiple of 3"),
        (tk.n_of_m(3), "'kernel' has 16 inputs, not a multiple of 3, as N:3"),
    ],
)
def test_what_does_not_divide_is_named(structure, message):
    tx = tk.sparse(optax.sgd(0.1), tk.static(0.5, structure=structure))
    with pytest.raises(ValueError, match=message):
        tx.init({"kernel": jnp.ones((16, 8))})


@pytest.mark.parametrize(
    "make", [lambda: tk.blocks(0, 4), lambda: tk.fan_in(2, -1), lambda: tk.n_of_m(1)]
)
def test_impossible_structures(make):
    with pytest.raises(ValueError, match="at least"):
        make()

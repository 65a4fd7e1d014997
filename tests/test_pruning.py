"""The magnitude family: exact budgets, nesting, scopes, what it refuses."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import fast_compilation

import topkast_jax as tk
from topkast_jax.methods.shrinking import Budget, between

COMPILATION = fast_compilation()
SHAPE = (8, 12)


def params() -> Any:
    return {"kernel": jax.random.normal(jax.random.key(1), SHAPE), "bias": jnp.ones(12)}


def train(tx: Any, theta: Any, steps: int) -> tuple[list[Any], list[Any]]:
    """Parameters and states, before each step and after the last."""

    def step(theta: Any, state: Any, t: Any) -> Any:
        def loss(theta: Any) -> jax.Array:
            alpha = tk.sparsify(theta, tk.masks(state))
            waves = [
                jnp.sum((x - jnp.sin(t + jnp.arange(x.size)).reshape(x.shape)) ** 2)
                for x in jax.tree.leaves(alpha)
            ]
            return sum(waves, jnp.float32(0))

        updates, state = tx.update(jax.grad(loss)(theta), state, theta)
        return optax.apply_updates(theta, updates), state

    compiled = jax.jit(step, compiler_options=COMPILATION)
    thetas, states = [theta], [jax.jit(tx.init, compiler_options=COMPILATION)(theta)]
    for t in range(steps):
        theta, state = compiled(thetas[-1], states[-1], t)
        thetas.append(theta)
        states.append(state)
    return thetas, states


def kept(states: list[Any], path: str = "kernel") -> list[int]:
    return [int(tk.masks(state).forward[path].sum()) for state in states]


# Budgets -----------------------------------------------------------------------------


def test_counts_are_exact_beyond_what_float32_knows() -> None:
    """A peer keeps 5,000,001 of 50,000,001 entries at 90 %: it counts in float32."""
    first, last, start, stop = 50_000_001, 5_000_000, 7, 1007
    budget, due = between(tk.every(10), start, stop, "cubic")
    count = jax.jit(lambda t: budget.entries(first, last, t))
    steps = [t for t in range(stop + 100) if due(t)]
    assert steps == [*range(10, stop, 10), stop]
    assert int(count(0)) == first and int(count(stop)) == int(count(5000)) == last
    for t in (10, 500, 510, 1000):
        left = Fraction(stop - t, stop - start) ** 3
        exact = last + (first - last) * left
        assert abs(int(count(t)) - exact) <= Fraction(1, 2)
        assert int(count(t + 3)) == int(count(t))  # between refreshes


def test_totals_beyond_32_bits() -> None:
    first, last = 40_000_000_003, 4_000_000_001
    budget, _ = between(tk.every(10), 0, 100, "linear")
    for t, exact in ((0, first), (50, (first + last) // 2), (100, last)):
        high, low = jax.jit(lambda t: budget.total(first, last, t))(t)
        assert int(high) * 2**30 + int(low) == exact


def test_top_k_tree_takes_pairs() -> None:
    scores = [jnp.arange(5.0), jnp.arange(7.0) + 0.5]
    one = jax.jit(lambda high, low: tk.top_k_tree(scores, (high, low)))(0, 4)
    two = tk.top_k_tree(scores, 4)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    everything = tk.top_k_tree(scores, (jnp.int32(3), jnp.int32(1)))
    assert all(mask.all() for mask in everything)


def test_halves_go_to_even() -> None:
    budget = Budget((Fraction(1), Fraction(1, 2), Fraction(0)), lambda step: step)
    assert budget.table(5, 2) == [5, 4, 2] and budget.table(7, 2) == [7, 4, 2]


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        ("cubic", [67, 67, 67, 37, 26, 24, 24]),
        ("linear", [67, 67, 67, 53, 38, 24, 24]),
        (lambda p: p**0.5, [67, 67, 67, 42, 32, 24, 24]),
    ],
)
def test_every_step_has_its_count(ramp: Any, expected: list[int]) -> None:
    """24 + 43 times what is left of the way, from step 2 to 5; none is ever back."""
    method = tk.magnitude(
        0.75, initial_sparsity=0.3, start=2, stop=5, refresh=tk.every(1), ramp=ramp
    )
    thetas, states = train(tk.sparse(optax.adam(0.1), method), params(), 6)
    assert kept(states) == expected
    masks = [np.asarray(tk.masks(state).forward["kernel"]) for state in states]
    for before, after in pairwise(masks):
        assert not (after & ~before).any()
    # The updates alone land on the mask: there is no further call to forget.
    for theta, state in zip(thetas[1:], states[1:], strict=True):
        exported = tk.export(theta, state)
        np.testing.assert_array_equal(exported["kernel"], theta["kernel"])


def test_a_given_mask_is_where_it_begins() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[2:, 3:] = True
    masks = {"kernel": mask, "bias": None}
    method = tk.magnitude(
        0.75, initial_sparsity=1 - mask.mean(), start=0, stop=2, init=masks
    )
    _, states = train(tk.sparse(optax.sgd(0.1), method), params(), 2)
    np.testing.assert_array_equal(tk.masks(states[0]).forward["kernel"], mask)
    assert kept(states) == [54, 54, 24]
    assert not (np.asarray(tk.masks(states[2]).forward["kernel"]) & ~mask).any()


def test_rules_by_path_begin_dense_too() -> None:
    method = tk.magnitude(
        0.75, start=0, stop=1, distribution=tk.by_path({"head/*": 0.5})
    )
    theta = {"body": params(), "head": params()}
    _, states = train(tk.sparse(optax.sgd(0.1), method), theta, 1)
    sizes = [
        [int(tk.masks(s).forward[part]["kernel"].sum()) for part in theta]
        for s in states
    ]
    assert sizes == [[96, 96], [24, 48]]


# Scopes ------------------------------------------------------------------------------


def uneven() -> Any:
    """The second kernel is a hundredth of the first."""
    one, two = jax.random.split(jax.random.key(0))
    return {
        "one": {"kernel": jax.random.uniform(one, SHAPE, minval=1.0, maxval=2.0)},
        "two": {"kernel": jax.random.uniform(two, (5, 7)) / 100},
    }


@pytest.mark.parametrize("name", ["magnitude", "saliency", "random_pruning"])
def test_parameters_compete_for_one_budget(name: str) -> None:
    method = tk.METHODS[name](0.6, start=0, stop=4, refresh=tk.every(2), scope="global")
    _, states = train(tk.sparse(optax.sgd(0.0), method), uneven(), 5)
    sizes = [
        [int(tk.masks(s).forward[part]["kernel"].sum()) for part in ("one", "two")]
        for s in states
    ]
    total = 96 + 35
    last = round(0.4 * total)
    middle = round(last + (total - last) * Fraction(1, 8))
    assert [sum(pair) for pair in sizes] == [total] * 2 + [middle] * 2 + [last] * 2
    if name == "magnitude":  # as in the literature: nothing protects a small layer
        assert sizes[-1] == [last, 0]
        assert tk.metrics.sparsity(tk.masks(states[-1]))["two/kernel"] == (1.0, 1.0)
    if name == "random_pruning":
        assert sizes[-1][1] == pytest.approx(0.4 * 35, abs=8)  # 3 deviations


def test_parameters_of_two_dtypes_compete() -> None:
    theta = uneven()
    theta["two"]["kernel"] = 1.5 + theta["two"]["kernel"].astype(jnp.bfloat16)
    method = tk.one_shot(0.5, at=1, scope="global")
    _, states = train(tk.sparse(optax.sgd(0.0), method), theta, 1)
    masks = tk.masks(states[-1]).forward
    assert int(masks["one"]["kernel"].sum() + masks["two"]["kernel"].sum()) == 66


def test_snip_looks_and_then_trains() -> None:
    """Ten times the cost of what follows, in one step; dense parameters train in it."""
    thetas, states = train(tk.sparse(optax.adam(0.1), tk.snip(0.9)), params(), 2)
    np.testing.assert_array_equal(thetas[1]["bias"] != thetas[0]["bias"], True)
    uses = {"kernel": 1}
    looking, after = (
        tk.metrics.flops(thetas[0], tk.masks(s), uses) for s in states[:2]
    )
    assert looking.fraction == 1.0
    assert after.fraction == 10 / 96
    assert np.asarray(tk.export(thetas[0], states[0])["kernel"]).all()


def test_dense_phases_cost_what_dense_costs() -> None:
    method = tk.acdc(0.75, warmup=1, compressed=1, dense=1, last=3, scope="layer")
    thetas, states = train(tk.sparse(optax.adam(0.1), method), params(), 4)
    cost = [
        tk.metrics.flops(theta, tk.masks(state), {"kernel": 1}).fraction
        for theta, state in zip(thetas, states, strict=True)
    ]
    assert cost == [1.0, 0.25, 1.0, 0.25, 0.25]
    came_back = np.asarray(tk.masks(states[2]).backward["kernel"]) & ~np.asarray(
        tk.masks(states[1]).backward["kernel"]
    )
    assert (
        came_back.sum() == 72 and not np.asarray(thetas[2]["kernel"])[came_back].any()
    )


# Aliases and layouts -----------------------------------------------------------------


def test_straight_through_is_top_kast_with_all_of_b() -> None:
    due = tk.every(2)
    runs = [
        train(tk.sparse(optax.adam(0.1), method, seed=4), params(), 5)
        for method in (
            tk.straight_through(0.8, refresh=due),
            tk.top_kast(0.8, 0.0, penalty=0.0, refresh=due),
        )
    ]
    jax.tree.map(np.testing.assert_array_equal, *runs)


def test_soft_weights_enter_at_zero() -> None:
    """By slice of a stack, and with fewer than k left where magnitudes tie."""
    kernel = jnp.array([[[1.0, -2.0], [3.0, -4.0]], [[5.0, 5.0], [-5.0, 1.0]]])
    tx = tk.sparse(
        optax.sgd(0.1),
        tk.straight_through(0.5, soft=True),
        axes=tk.axes({"kernel": "s i o"}),
    )
    state = tx.init({"kernel": kernel})
    assert tk.masks(state).shrink["kernel"].shape == (2, 1, 1)
    alpha = tk.export({"kernel": kernel}, state)["kernel"]
    assert alpha.tolist() == [[[0, 0], [1, -2]], [[0, 0], [0, 0]]]
    with pytest.raises(ValueError, match="under straight_through alpha is smaller"):
        tk.drop_in(tx).init({"kernel": kernel})


CHANGING: dict[str, tk.Method] = {
    "magnitude": tk.magnitude(0.8, start=0, stop=9),
    "saliency": tk.saliency(0.8, start=0, stop=9),
    "random_pruning": tk.random_pruning(0.8, start=0, stop=9),
    "one_shot": tk.one_shot(0.8, at=5),
    "snip": tk.snip(0.8),
    "acdc": tk.acdc(0.8, warmup=1, compressed=1, dense=1, last=9),
    "granet": tk.granet(0.8, start=0, stop=9),
    "set": tk.delayed(tk.set_(0.8), 5),
}


@pytest.mark.parametrize("layout", ["packed", "block"])
@pytest.mark.parametrize("name", CHANGING)
def test_sizes_that_change_need_the_masked_layout(name: str, layout: str) -> None:
    message = f"{layout}.*: {name} changes how many entries .* use layout=.masked."
    with pytest.raises(ValueError, match=message):
        tk.sparse(optax.sgd(0.1), CHANGING[name], layout=layout)


def test_soft_needs_the_masked_layout() -> None:
    method = tk.straight_through(0.5, soft=True)
    tx = tk.sparse(optax.sgd(0.1), method, layout="packed")
    with pytest.raises(ValueError, match="'kernel': alpha that is smaller .*masked"):
        tk.start(tx, params())


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_one_shot_at_the_start_fits_any_layout(score: Any) -> None:
    method = tk.one_shot(0.75, at=0, score=score)
    masked, packed = (
        tk.sparse(optax.sgd(0.1), method, layout=layout)
        for layout in ("masked", "packed")
    )
    expected = tk.dense_masks(masked.init(params())).forward["kernel"]
    found = tk.dense_masks(tk.start(packed, params())[1]).forward["kernel"]
    np.testing.assert_array_equal(expected, found)
    size = np.abs(params()["kernel"])
    assert (size[expected].min() > size[~np.asarray(expected)].max()) == (
        score == "magnitude"
    )


# A dense beginning -------------------------------------------------------------------


def test_dense_until_it_begins() -> None:
    """Like the optimizer alone, then from the largest trained weights."""
    inner = optax.adam(0.1)
    later = tk.delayed(tk.set_(0.75, init="magnitude", refresh=tk.every(2)), 3)
    thetas, states = train(tk.sparse(inner, later, seed=1), params(), 6)
    plain, _ = train(tk.sparse(inner, tk.one_shot(0.75, at=99)), params(), 3)
    for one, two in zip(thetas[:3], plain, strict=False):
        jax.tree.map(np.testing.assert_array_equal, one, two)
    assert kept(states) == [96] * 3 + [24] * 4
    first = np.asarray(tk.masks(states[3]).forward["kernel"])
    size = np.abs(np.asarray(plain[3]["kernel"]))
    assert size[first].min() >= size[~first].max()
    masks = [np.asarray(tk.masks(s).forward["kernel"]) for s in states]
    moved = [t for t in range(1, 7) if (masks[t] != masks[t - 1]).any()]
    assert moved == [3, 5]
    assert not np.asarray(thetas[3]["kernel"])[~first].any()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (tk.snip(0.75), [(96, 96), (96, 96), (96, 0), (24, 24)]),
        (tk.top_kast(0.75, 0.5), [(96, 96), (96, 96), (24, 48), (24, 48)]),
        (
            tk.straight_through(0.75, soft=True),
            [(96, 96), (96, 96), (24, 96), (24, 96)],
        ),
        (
            tk.acdc(0.75, warmup=1, compressed=9, dense=1, last=9),
            [(96, 96), (96, 96), (96, 96), (24, 24)],
        ),
    ],
    ids=["snip", "top_kast", "soft", "acdc"],
)
def test_what_begins_at_step_two(method: tk.Method, expected: Any) -> None:
    thetas, states = train(
        tk.sparse(optax.sgd(0.1), tk.delayed(method, 2)), params(), 3
    )
    found = [
        (int(m.forward["kernel"].sum()), int(m.backward["kernel"].sum()))
        for m in map(tk.masks, states)
    ]
    assert found == expected
    np.testing.assert_array_equal(  # alpha is theta while the network is dense
        tk.export(thetas[1], states[1])["kernel"], thetas[1]["kernel"]
    )


# Plans and errors --------------------------------------------------------------------


def test_plans_say_what_their_counts_mean() -> None:
    def said(method: tk.Method) -> str:
        return str(tk.plan(tk.sparse(optax.adam(0.1), method), params()))

    text = said(tk.magnitude(0.75, start=10, stop=90))
    assert (
        "magnitude: k_B entries of A and B before step 10, k_A from step 90 on" in text
    )
    row = next(line.split() for line in text.splitlines() if line.startswith("kernel"))
    assert row[4:6] == ["24", "96"]
    assert "compete for the sum" in said(tk.snip(0.75))
    assert "dense and untrained before step 1, k_A entries after" in said(tk.snip(0.75))
    assert "set: dense before step 7" in said(tk.delayed(tk.set_(0.75), 7))
    assert "compressed ones, the last from step 9" in said(CHANGING["acdc"])
    assert said(tk.static(0.75)).splitlines()[-1].startswith("all")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tk.magnitude(0.5, start=5, stop=5), "0 <= start < stop"),
        (lambda: tk.magnitude(0.5, start=-1, stop=5), "0 <= start < stop"),
        (lambda: tk.magnitude(1.0, start=0, stop=5), "sparsity=1.0 must lie in"),
        (
            lambda: tk.magnitude(0.5, initial_sparsity=0.6, start=0, stop=5),
            "initial_sparsity=0.6 is above sparsity=0.5",
        ),
        (
            lambda: tk.magnitude(0.5, start=0, stop=5, ramp=lambda p: 1 - p),
            "does not rise from 0 to 1",
        ),
        (
            lambda: tk.snip(0.5, structure=tk.fan_in()),
            'scope="global" compares single entries',
        ),
        (lambda: tk.one_shot(0.5, at=-1), "at=-1 must not be negative"),
        (
            lambda: tk.one_shot(0.5, at=0, score="saliency"),
            "at=0 .* use at=1, or tk.sn",
        ),
        (lambda: tk.one_shot(0.5, at=0, scope="global"), "at=0 .* use at=1, or tk.sn"),
        (lambda: tk.snip(0.5, batches=0), "batches=0 must be at least 1"),
        (
            lambda: tk.acdc(0.5, warmup=0, compressed=1, dense=1, last=5),
            "warmup=0 must be at least 1",
        ),
        (
            lambda: tk.acdc(0.5, warmup=4, compressed=1, dense=1, last=3),
            "last=3 comes before",
        ),
        (
            lambda: tk.straight_through(0.5, soft=True, structure=tk.blocks(2, 2)),
            "soft=True shrinks single entries",
        ),
        (
            lambda: tk.granet(0.5, start=0, stop=5, drop_fraction=1.5),
            "drop_fraction=1.5",
        ),
        (lambda: tk.delayed(tk.static(0.5), 0), "start=0 must be at least 1"),
        (
            lambda: tk.delayed(tk.top_kast(0.5, 0.5, penalty_mode="decoupled"), 3),
            "top_kast changes every update by a rule of its own",
        ),
    ],
)
def test_what_makes_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda word: tk.magnitude(0.5, start=0, stop=5, ramp=word), "ramp"),
        (lambda word: tk.saliency(0.5, start=0, stop=5, scope=word), "scope"),
        (lambda word: tk.one_shot(0.5, at=1, score=word), "score"),
        (lambda word: tk.snip(0.5, average=word), "average"),
    ],
)
def test_unknown_words(make: Any, word: str) -> None:
    """A ValueError; here the annotations, which tests check, are faster."""
    with pytest.raises((ValueError, TypeError), match=word):
        make("steep")

"""GSE: 50 steps against the oracle, its bounds, its relation to RigL."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from oracles import gse

import topkast_jax as tk

STEPS, EVERY, ALPHA, SPARSITY = 50, 4, 0.5, 0.7
X = jax.random.normal(jax.random.key(1), (20, 6))
Y = jax.random.normal(jax.random.key(2), (20, 4))
PATHS = ("one/kernel", "two/kernel")


def start():
    one, two = jax.random.split(jax.random.key(0))
    return {
        "one/kernel": jax.random.normal(one, (6, 12)),
        "one/bias": jnp.zeros(12),
        "two/kernel": jax.random.normal(two, (12, 4)) / 3,
    }


def loss(alpha):
    hidden = jnp.tanh(X @ alpha["one/kernel"] + alpha["one/bias"])
    return jnp.mean((hidden @ alpha["two/kernel"] - Y) ** 2)


def train(method, inner, stats=None, steps=STEPS, of=loss):
    """Masks, P and alpha before every step, and after the last."""
    tx = tk.sparse(inner, method, seed=11)
    params = start()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda t: of(tk.sparsify(t, tk.masks(state))))(params)
        updates, state = tx.update(grads, state, params, stats=stats)
        return optax.apply_updates(params, updates), state

    seen = []
    for t in range(steps + 1):
        masks = jax.tree.map(np.asarray, tk.masks(state))
        alpha = jax.tree.map(np.asarray, tk.export(params, state))
        seen.append((masks.forward, masks.probe, alpha))
        if t < steps:
            params, state = step(params, state)
    return seen


STATISTICS = {
    path: tk.Taps(jnp.arange(i)[:, None] + 0.0, jnp.arange(1.0, o + 1)[None], False)
    for path, (i, o) in {"one/kernel": (6, 12), "two/kernel": (12, 4)}.items()
} | {"one/bias": None}


@pytest.mark.parametrize(
    ("scope", "candidates", "inner"),
    [
        ("layer", "uniform", "momentum"),
        ("layer", "grabo", "adam"),
        pytest.param("layer", "all", "momentum", marks=pytest.mark.slow),
        ("global", "uniform", "adam"),
        ("global", "all", "momentum"),
    ],
)
def test_fifty_steps(scope, candidates, inner):
    """The oracle is handed what was drawn, and the gradients at our weights."""
    ours, theirs = {
        "momentum": (optax.sgd(0.05, momentum=0.9), oracle.sgd(0.05, momentum=0.9)),
        "adam": (optax.adam(0.05), oracle.adam(0.05)),
    }[inner]
    t_end = 40
    method = tk.gse(
        SPARSITY,
        candidates=candidates,
        subset=1.5,
        drop_fraction=tk.cosine(ALPHA, t_end),
        refresh=tk.every(EVERY, stop=t_end + 1),
        scope=scope,
    )
    stats = STATISTICS if candidates == "grabo" else None
    seen = train(method, ours, stats)
    dense = jax.jit(jax.grad(loss))

    def drawn(step, path, run):
        if candidates == "all":
            return None
        probe = seen[step - 1][1][path]
        assert probe.any() and probe.sum() <= 1.5 * 72
        return np.flatnonzero(probe)

    history = gse.gse(
        {path: np.asarray(value) for path, value in start().items()},
        {path: seen[0][0][path] for path in PATHS},
        theirs,
        lambda alpha, t: {p: np.asarray(g) for p, g in dense(seen[t][2]).items()},
        due=lambda step: step % EVERY == 0 and step <= t_end,
        alpha=ALPHA,
        t_end=t_end,
        candidates=drawn,
        scope=scope,
        steps=STEPS,
    )
    total = sum(seen[0][0][path].sum() for path in PATHS)
    moved = 0
    for t, (snapshot, (forward, _, alpha)) in enumerate(
        zip(history, seen, strict=True)
    ):
        for path in PATHS:
            np.testing.assert_array_equal(forward[path], snapshot.forward[path], f"{t}")
            # float32 sums in another order over 50 steps.
            np.testing.assert_allclose(
                alpha[path], snapshot.alpha[path], rtol=2e-3, atol=2e-4
            )
            if scope == "layer":
                assert forward[path].sum() == seen[0][0][path].sum()
        assert sum(forward[path].sum() for path in PATHS) == total
        moved += any((forward[p] != seen[max(t - 1, 0)][0][p]).any() for p in PATHS)
    assert moved >= 5
    if scope == "global":
        assert any(f["one/kernel"].sum() != seen[0][0]["one/kernel"].sum()
                   for f, *_ in seen)  # fmt: skip


def test_what_is_pruned_does_not_grow_in_the_same_refresh():
    """Every gradient is as large as the next, and every entry of A is a candidate."""

    def flat(alpha):
        return sum(jnp.sum(alpha[path]) for path in PATHS)

    method = tk.gse(
        SPARSITY, subset=20.0, drop_fraction=1.0, refresh=tk.every(2),
    )  # fmt: skip
    seen = train(method, optax.sgd(0.0), steps=6, of=flat)
    for before, after in ((1, 2), (3, 4), (5, 6)):
        for path in PATHS:
            old, probe = seen[before][0][path], seen[before][1][path]
            new = seen[after][0][path]
            free = (probe & ~old).sum()
            assert free > 0
            # As many as there are candidates; what stays are entries that were not pruned.
            assert (new & ~old).sum() == min(old.sum(), free)
            assert (new & old).sum() == old.sum() - min(old.sum(), free)
            assert not (new & ~old & ~probe).any()


def squares_apart(alpha):
    """Gradients on A are a hundredth of those off it: what is dropped never regrows."""
    wave = {
        p: 1 + jnp.arange(v.size).reshape(v.shape) / v.size for p, v in start().items()
    }
    return sum(
        0.5 * jnp.sum(jnp.where(alpha[p] == 0, 1, 0.01) * (alpha[p] - wave[p]) ** 2)
        for p in PATHS
    )


def test_everything_as_candidates_is_rigl():
    """Where RigL regrows nothing of what it drops, and rounds to the same number.

    Targets off A are large and those on A are reached, so gradients on A are small.
    """
    options = dict(refresh=tk.every(2), drop_fraction=0.5, distribution=tk.by_path(
        {"one/kernel": 1 - 20 / 72, "two/kernel": 1 - 12 / 48}))  # fmt: skip
    one = train(
        tk.gse(0.7, candidates="all", **options),
        optax.sgd(0.1),
        steps=10,
        of=squares_apart,
    )
    two = train(tk.rigl(0.7, **options), optax.sgd(0.1), steps=10, of=squares_apart)
    moved = 0
    for (a, p, _), (b, q, _) in zip(one, two, strict=True):
        jax.tree.map(np.testing.assert_array_equal, (a, p), (b, q))
        moved += (a["one/kernel"] != one[0][0]["one/kernel"]).any()
    assert moved > 5


def test_everything_as_candidates_over_all_parameters_is_global_rigl():
    """The oracle lets what was dropped grow again, as RigL does, over all of them."""
    inner = optax.sgd(0.125)
    method = tk.gse(
        SPARSITY,
        candidates="all",
        scope="global",
        drop_fraction=tk.cosine(ALPHA, 12),
        refresh=tk.every(2),
    )
    seen = train(method, inner, steps=10, of=squares_apart)
    dense = jax.jit(jax.grad(squares_apart))
    histories = [
        gse.gse(
            {path: np.asarray(value) for path, value in start().items()},
            {path: seen[0][0][path] for path in PATHS},
            oracle.sgd(0.125),
            lambda alpha, t: {p: np.asarray(g) for p, g in dense(seen[t][2]).items()},
            due=lambda step: step % 2 == 0,
            alpha=ALPHA,
            t_end=12,
            candidates=gse.everything,
            scope="global",
            regrow=regrow,
            steps=10,
        )
        for regrow in (True, False)
    ]
    first = seen[0][0]
    moved = 0
    for t, (forward, probe, _) in enumerate(seen):
        for path in PATHS:
            for history in histories:
                np.testing.assert_array_equal(forward[path], history[t].forward[path])
            assert probe[path] == (t % 2 == 1)  # everything is seen, at due steps alone
        moved += any((forward[path] != first[path]).any() for path in PATHS)
    assert moved == 9
    sizes = [{path: int(f[path].sum()) for path in PATHS} for f, *_ in seen]
    assert len({sum(size.values()) for size in sizes}) == 1
    assert sizes[-1] != sizes[0]


def test_candidates_follow_the_statistics():
    """Rows of weight zero are never drawn; before there are statistics, all are."""
    method = tk.gse(0.5, candidates="grabo", subset=8.0, refresh=tk.every(1))
    first, *rest = train(method, optax.sgd(0.05), STATISTICS, steps=4)
    assert first[1]["one/kernel"][0].any()
    for _, probe, _ in rest:
        assert not probe["one/kernel"][0].any()
        assert probe["one/kernel"].any()


def test_statistics_are_asked_for():
    tx = tk.sparse(optax.sgd(0.1), tk.gse(0.5, candidates="graest"))
    params = start()
    state = tx.init(params)
    with pytest.raises(ValueError, match="gse draws its candidates by statistics"):
        tx.update(params, state, params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": 0.0}, "subset=0.0 must be above 0"),
        ({"drop_fraction": 1.5}, "drop_fraction=1.5 must lie in"),
        ({"scope": "global", "structure": tk.fan_in()}, "fan-in keeps the same number"),
        ({"scope": "global", "structure": tk.groups_of(2)}, "in 2 groups keeps"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        tk.gse(0.5, **options)


def test_sizes_that_move_need_the_masked_layout():
    with pytest.raises(ValueError, match="gse changes how many entries"):
        tk.sparse(optax.sgd(0.1), tk.gse(0.5, scope="global"), layout="packed")

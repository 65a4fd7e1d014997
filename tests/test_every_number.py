"""Every number of every method takes a schedule, or refuses it and says why."""

import functools
import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import topkast_jax as tk

SHAPE = (16, 32)
REQUIRED = {
    "magnitude": dict(start=1, stop=3),
    "saliency": dict(start=1, stop=3),
    "random_pruning": dict(start=1, stop=3),
    "granet": dict(start=1, stop=3),
    "one_shot": dict(at=2),
    "acdc": dict(warmup=1, compressed=1, dense=1, last=3),
}
VALUES = dict(
    forward_sparsity=0.75, backward_sparsity=0.5, sparsity=0.75, initial_sparsity=0.25
)
OTHER = dict(snfs=dict(redistribute=False))
"""What else a method is told, or its sparsity could not move."""


def numbers_of(method):
    """{number: whether a schedule fits}, as the signature says."""
    found = {}
    for name, parameter in inspect.signature(tk.METHODS[method]).parameters.items():
        kind = str(parameter.annotation)
        if kind == "<class 'float'>" or kind.startswith("float | "):
            found[name] = "Callable" in kind
    return found


NUMBERS = [
    (method, number, moves)
    for method in tk.METHODS
    for number, moves in numbers_of(method).items()
]
# Those that are refused cost nothing, those that move cost two programs.
QUICK = ("top_kast", "set", "gse", "mest")
CELLS = [
    pytest.param(
        *cell, marks=[pytest.mark.slow] if cell[2] and cell[0] not in QUICK else []
    )
    for cell in NUMBERS
]


def made(method, **numbers):
    make = tk.METHODS[method]
    parameters = inspect.signature(make).parameters
    first = {
        name: VALUES[name]
        for name in ("forward_sparsity", "backward_sparsity", "sparsity")
        if name in parameters
    }
    often = {"refresh": tk.every(1)} if "refresh" in parameters else {}
    given = first | often | REQUIRED.get(method, {}) | OTHER.get(method, {}) | numbers
    return make(**given)


def trained(method, steps=5):
    """Parameters and A after each step, gradients random where they are seen."""
    tx = tk.sparse(optax.sgd(0.1, momentum=0.5), method, learning_rate=0.1)
    params = {"kernel": jax.random.normal(jax.random.key(0), SHAPE)}
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for step in range(steps):
        masks = tk.masks(state)
        probe = masks.probe["kernel"]
        seen = masks.backward["kernel"] | (False if probe is None else probe)
        dense = jax.random.normal(jax.random.key(step + 1), SHAPE)
        updates, state = update({"kernel": jnp.where(seen, dense, 0)}, state, params)
        params = optax.apply_updates(params, updates)
        tk.check(params, state)
        masks = tk.masks(state)
        found.append(tuple(np.asarray(t["kernel"]) for t in (params, *masks[:2])))
    return found


@functools.cache
def trained_once(method, **numbers):
    """With the defaults, of which most numbers are, a method is trained once."""
    return trained(made(method, **numbers))


@pytest.mark.parametrize(("method", "number", "moves"), CELLS)
def test_a_schedule_that_stands_still_is_the_number(method, number, moves, monkeypatch):
    default = inspect.signature(tk.METHODS[method]).parameters[number].default
    value = VALUES.get(number, 0.5 if default is inspect.Parameter.empty else default)
    value = float(np.float32(value))

    def still(step):
        return value + 0 * jnp.asarray(step, jnp.float32)

    if not moves:
        # The types of the signature would complain first.
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        with pytest.raises(
            ValueError, match=f"{number} must be a number, not a schedule"
        ):
            made(method, **{number: still})
        return
    # Drawn candidates have a bound, which differs where the number of weights moves.
    more = dict(candidates="all") if (method, number) == ("gse", "sparsity") else {}
    usual = value == VALUES.get(number, default)
    plain = trained_once(method, **more, **({} if usual else {number: value}))
    moving = trained(made(method, **{number: still}, **more))
    for one, two in zip(plain, moving, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


def test_there_are_numbers_of_both_kinds():
    assert {moves for _, _, moves in NUMBERS} == {True, False}
    assert {method for method, _, _ in NUMBERS} == set(tk.METHODS)


FOLLOWS = [
    (method, number)
    for method, number, moves in NUMBERS
    if moves and number.endswith("sparsity") and method not in ("mest", "srigl")
]


def falling(step):
    return jnp.maximum(0.75 - 0.125 * step, 0.5)


def rising(step):
    return jnp.minimum(0.5 + 0.125 * step, 0.875)


@pytest.mark.parametrize("sparsity", [falling, rising])
@pytest.mark.parametrize(("method", "number"), FOLLOWS)
def test_sets_follow_a_sparsity(method, number, sparsity):
    """At each refresh, to the unit; GSE as far as its candidates reach: here all."""
    more = dict(candidates="all") if method == "gse" else {}
    if number == "backward_sparsity":
        more["forward_sparsity"] = 0.9375
    if number == "forward_sparsity":
        more["backward_sparsity"] = 0.25
    tried = made(method, **{number: sparsity}, **more)
    assert not tried.fixed
    which = 2 if number == "backward_sparsity" else 1
    sizes = [int(found[which].sum()) for found in trained(tried)]
    assert sizes == [round((1 - float(sparsity(t))) * 512) for t in range(1, 6)]


@pytest.mark.parametrize("sparsity", [falling, rising])
def test_a_soft_bound_follows_a_sparsity(sparsity):
    tried = made("mest", sparsity=sparsity, soft=True, drop_fraction=0.25)
    sizes = [int(found[1].sum()) for found in trained(tried)]
    wanted = [(1 - float(sparsity(t))) * 512 for t in range(1, 6)]
    assert sizes == [round(1.25 * k) for k in wanted]


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("sparsity", [falling, rising])
def test_neurons_follow_a_sparsity(sparsity, gamma):
    """A of each neuron that lives has one size, and the budget bounds the whole."""
    for step, (_, forward, _) in enumerate(
        trained(made("srigl", sparsity=sparsity, gamma_sal=gamma)), 1
    ):
        fan_in = forward.sum(axis=0)
        (size,) = set(fan_in[fan_in > 0].tolist())
        budget = round((1 - float(sparsity(step))) * 512)
        if gamma == 0:
            assert size * 32 == budget
        assert budget - (fan_in > 0).sum() < forward.sum() <= budget


def test_units_of_a_structure_follow_a_sparsity():
    tried = made("set", sparsity=falling, structure=tk.blocks(4, 8))
    for step, (_, forward, _) in enumerate(trained(tried), 1):
        units = forward.reshape(4, 4, 4, 8).sum(axis=(1, 3))
        assert set(units.reshape(-1).tolist()) <= {0, 32}
        assert (units > 0).sum() == round((1 - float(falling(step))) * 16)


def test_parameters_share_a_sparsity_that_moves():
    """Each keeps what the distribution gives it at that sparsity."""
    params = {
        "wide/kernel": jax.random.normal(jax.random.key(0), (10, 100)),
        "small/kernel": jax.random.normal(jax.random.key(1), (10, 10)),
    }
    method = tk.set_(rising, refresh=tk.every(1), distribution=tk.erk)
    tx = tk.sparse(optax.sgd(0.1), method)
    state = tx.init(params)
    shapes = {path: x.shape for path, x in params.items()}
    for step in range(4):
        wanted = tk.erk(shapes, float(rising(step)))
        masks = tk.masks(state).forward
        assert {path: int(mask.sum()) for path, mask in masks.items()} == wanted
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)


def test_a_distribution_that_cannot_reach_every_sparsity():
    """The nearest that it can have; what it is asked for at step 0 must be reachable."""
    params = {
        "body/kernel": jnp.ones((10, 10)),
        "head/kernel": jnp.ones((10, 10)),
    }
    spread = tk.by_path({"head/*": 0.0}, keep_total=True)

    def started(sparsity):
        method = tk.set_(sparsity, refresh=tk.every(1), distribution=spread)
        tx = tk.sparse(optax.sgd(0.1), method)
        state = tx.init(params)
        for _ in range(4):
            _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return {p: int(m.sum()) for p, m in tk.masks(state).forward.items()}

    assert started(lambda step: 0.25 + 0.125 * jnp.minimum(step, 4)) == {
        "body/kernel": 1,
        "head/kernel": 100,
    }
    with pytest.raises(ValueError, match="total sparsity 0.75 cannot be reached"):
        started(lambda step: 0.75 + 0 * step)


def test_a_delayed_sparsity_counts_from_its_beginning():
    tried = tk.delayed(tk.rigl(rising, refresh=tk.every(1)), 2)
    sizes = [int(found[1].sum()) for found in trained(tried)]
    assert sizes == [512, 256, 192, 128, 64]


def test_a_given_mask_and_a_delayed_sparsity():
    mask = {"kernel": np.arange(512).reshape(SHAPE) < 32}
    tried = tk.delayed(tk.rigl(rising, refresh=tk.every(1), init=mask), 2)
    found = trained(tried)
    assert [int(forward.sum()) for _, forward, _ in found] == [512, 256, 192, 128, 64]
    assert found[1][1][mask["kernel"]].all()


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (
            lambda step: 0.5 + 0.25 * step,
            r"sparsity at step 2=1.0 must lie in \[0, 1\)",
        ),
        (lambda step: jnp.full(3, 0.5), r"an array of shape \(3,\) at step 0"),
    ],
)
def test_schedules_that_are_no_sparsity(sparsity, message):
    with pytest.raises(ValueError, match=message):
        tk.rigl(sparsity)


def test_packed_arrays_refuse_sizes_that_move():
    with pytest.raises(ValueError, match="packed arrays have one size"):
        tk.sparse(optax.sgd(0.1), tk.set_(rising), layout="packed")


@pytest.mark.parametrize("layout", ["masked", "packed", "block"])
def test_candidates_of_gse_follow_a_schedule(layout):
    """Four draws for each weight at first, a quarter of one from step 3 on."""

    def fewer(step):
        return jnp.where(step < 3, 4.0, 0.25)

    method = tk.gse(0.75, subset=fewer, refresh=tk.every(1))
    tx = tk.sparse(optax.sgd(0.0), method, layout=layout)
    theta = {"kernel": jax.random.normal(jax.random.key(0), SHAPE)}
    weights = jax.random.normal(jax.random.key(1), SHAPE)
    store = None
    if layout == "masked":
        state = tx.init(theta)
    else:
        theta, state, store = tk.start(tx, theta)

    def loss(theta, state):
        return jnp.vdot(tk.export(theta, state)["kernel"], weights)

    seen = []
    for _ in range(5):
        probe = np.asarray(tk.masks(state).probe["kernel"])
        if layout == "masked":
            seen.append(set(np.flatnonzero(probe).tolist()))
            grads = {
                "kernel": jnp.where(
                    probe | tk.masks(state).backward["kernel"], weights, 0
                )
            }
            _, state = tx.update(grads, state, theta)
        else:
            seen.append(set(probe[probe >= 0].tolist()))
            found = tk.probe(loss, theta, state)
            grads = jax.tree.map(jnp.zeros_like, theta)
            _, state = tx.update(grads, state, theta)
            theta, state, store = tk.refresh(tx, theta, state, store, found)
    counts = [len(found) for found in seen]
    # 512 draws out of 512, then 32: distinct ones are fewer.
    assert min(counts[:3]) > 280
    assert all(20 < count <= 32 for count in counts[3:])


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_subsets_that_are_none(value):
    with pytest.raises(ValueError, match="must be above 0"):
        tk.gse(0.5, subset=value)
    with pytest.raises(ValueError, match="at step 4 must be above 0"):
        tk.gse(0.5, subset=lambda step: jnp.where(step < 3, 1.0, value))

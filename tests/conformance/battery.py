"""A short training run of any transformation, and what must hold at each of its steps.

The checks read states and parameters from the outside, as NumPy arrays by path; they
share no code with the library but its public functions.
"""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilation import fast_compilation
from jax.tree_util import GetAttrKey

import topkast_jax as tk

COMPILATION = fast_compilation()
EVERY = 2
"""Masks are refreshed at every second step."""
FORWARD, BACKWARD = 0.75, 0.5
DROP = 0.3

METHODS: dict[str, Callable[..., tk.Method]] = {
    "top_kast": lambda **options: tk.top_kast(FORWARD, BACKWARD, **options),
    "static": lambda refresh, **options: tk.static(FORWARD, **options),
    "set": lambda **options: tk.set_(FORWARD, drop_fraction=DROP, **options),
    "rigl": lambda **options: tk.rigl(FORWARD, drop_fraction=DROP, **options),
    "magnitude": lambda **options: tk.magnitude(FORWARD, **RAMP, **options),
    "saliency": lambda **options: tk.saliency(FORWARD, **RAMP, **options),
    "random_pruning": lambda **options: tk.random_pruning(FORWARD, **RAMP, **options),
    "one_shot": lambda refresh, **options: tk.one_shot(FORWARD, at=4, **options),
    "snip": lambda refresh, **options: tk.snip(FORWARD, scope="layer", **options),
    "straight_through": lambda **options: tk.straight_through(FORWARD, **options),
    "acdc": lambda refresh, **options: tk.acdc(
        FORWARD, **PHASES, scope="layer", **options
    ),
    "granet": lambda **options: tk.granet(
        FORWARD,
        **RAMP,
        initial_sparsity=BACKWARD,
        drop_fraction=DROP,
        scope="layer",
        distribution=tk.uniform,
        **options,
    ),
    "rigl_itop": lambda **options: tk.rigl_itop(FORWARD, drop_fraction=DROP, **options),
    "snfs": lambda **options: tk.snfs(FORWARD, drop_fraction=DROP, **options),
    "mest": lambda **options: tk.mest(
        FORWARD, drop_fraction=DROP, weight=1.0, **options
    ),
    "srigl": lambda **options: tk.srigl(
        FORWARD, drop_fraction=DROP, gamma_sal=0.7, **options
    ),
    "dsr": lambda **options: tk.dsr(
        FORWARD, threshold=0.1, drop_fraction=DROP, **options
    ),
    "deep_r": lambda **options: tk.deep_r(
        FORWARD, l1=0.05, temperature=0.05, **options
    ),
    "gse": lambda **options: tk.gse(
        FORWARD, drop_fraction=DROP, distribution=tk.uniform, **options
    ),
}
RAMP: Any = {"start": 0, "stop": 6}
PHASES: Any = {"warmup": EVERY, "compressed": EVERY, "dense": EVERY, "last": 100}


class Facts(NamedTuple):
    """What the battery must know of a method.

    Attributes:
      counts: `(size of a slice, step) -> (|A|, |B|)`.
      chooses: what a refresh leaves: "largest" of all, "nested" sets, most of A and
        something new ("exchange"), or what the counts say of it alone ("").
      due: whether masks may change at a step.
      probes: whether a step sees gradients off B; None where none ever does.
      subset: whether those are of some entries only, a mask of them.
      reservoir: whether weights off B keep their value.
      budget: what has the counts: every "slice"; the "network", between whose parameters
        entries move; or every "column" of outputs has the same number, or none.
    """

    counts: Callable[[int, int], tuple[int, int]]
    chooses: str = ""
    due: Callable[[int], bool] = lambda step: step % EVERY == 0
    probes: Callable[[int], bool] | None = None
    subset: bool = False
    reservoir: bool = False
    budget: str = "slice"


def fixed(forward: float, backward: float) -> Callable[[int, int], tuple[int, int]]:
    """The same sizes at every step."""
    return lambda size, _: (round((1 - forward) * size), round((1 - backward) * size))


def cubic(first: float) -> Callable[[int, int], tuple[int, int]]:
    """A = B, from a first sparsity to `FORWARD` along the ramp."""

    def counts(size: int, step: int) -> tuple[int, int]:
        due = step - step % EVERY  # the last refresh
        left = Fraction(max(0, RAMP["stop"] - due), RAMP["stop"]) ** 3
        first_k, last_k = (round((1 - s) * size) for s in (first, FORWARD))
        return (round(last_k + (first_k - last_k) * left),) * 2

    return counts


def dense_until(step: int) -> Callable[[int, int], tuple[int, int]]:
    """A = B, everything before a step."""
    return lambda size, t: (size,) * 2 if t < step else fixed(FORWARD, FORWARD)(size, t)


def phases(size: int, step: int) -> tuple[int, int]:
    """A = B, everything in every other phase."""
    dense = step // EVERY % 2 == 0
    return (size,) * 2 if dense else fixed(FORWARD, FORWARD)(size, step)


def looking(size: int, step: int) -> tuple[int, int]:
    """Step 0 uses everything and trains nothing."""
    return (size, 0) if step == 0 else fixed(FORWARD, FORWARD)(size, step)


def before_refresh(step: int) -> bool:
    return (step + 1) % EVERY == 0


SAME = fixed(FORWARD, FORWARD)
FACTS: dict[str, Facts] = {
    "top_kast": Facts(fixed(FORWARD, BACKWARD), "largest", reservoir=True),
    "static": Facts(SAME, due=lambda step: False),
    "set": Facts(SAME, "exchange"),
    "rigl": Facts(SAME, "exchange", probes=before_refresh),
    "magnitude": Facts(cubic(0.0), "nested"),
    "saliency": Facts(cubic(0.0), "nested"),
    "random_pruning": Facts(cubic(0.0), "nested"),
    "one_shot": Facts(dense_until(4), "nested", due=lambda step: step == 4),
    "snip": Facts(looking, due=lambda step: step == 1, probes=lambda step: step == 0),
    "straight_through": Facts(fixed(FORWARD, 0.0), "largest", reservoir=True),
    "acdc": Facts(phases),
    "granet": Facts(cubic(BACKWARD), "exchange", probes=before_refresh),
    "rigl_itop": Facts(SAME, "exchange", probes=before_refresh),
    "snfs": Facts(SAME, "exchange", probes=lambda step: True, budget="network"),
    "mest": Facts(SAME, "exchange"),
    "srigl": Facts(SAME, probes=before_refresh, budget="column"),
    "dsr": Facts(SAME, budget="network"),
    "deep_r": Facts(SAME, budget="network"),
    "gse": Facts(SAME, "exchange", probes=before_refresh, subset=True),
}
RATE = 0.05
"""Learning rate told to methods that scale by it."""


def make_method(name: str, where: Any = tk.kernels) -> tk.Method:
    """A method at the battery's sparsities, refreshed at every second step."""
    return METHODS[name](refresh=tk.every(EVERY), where=where)


class Model(NamedTuple):
    """Parameters, the function they belong to, and which of them are sparse how.

    `stacked` lists the paths whose first axis is a stack of slices.
    """

    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    where: Any = tk.kernels
    stacked: tuple[str, ...] = ()


INPUTS, HIDDEN, OUTPUTS, ROWS = 12, 16, 5, 8


def kernel(*shape: int, seed: int = 0) -> jax.Array:
    """Normal draws, scaled by the fan-in."""
    draws = np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-2])
    return jnp.asarray(draws, jnp.float32)


def two_layers(first: Any, shift: Any, second: Any, x: jax.Array) -> jax.Array:
    """A perceptron; the shift may be None."""
    hidden = x @ first
    hidden = jnp.tanh(hidden if shift is None else hidden + shift[None])
    return hidden @ second


def plain_dict() -> Model:
    """Two kernels, two biases, in nested dicts."""
    params = {
        "one": {
            "kernel": kernel(INPUTS, HIDDEN),
            "bias": jnp.full((HIDDEN,), 0.1, jnp.float32),
        },
        "two": {
            "kernel": kernel(HIDDEN, OUTPUTS, seed=1),
            "bias": jnp.zeros((OUTPUTS,)),
        },
    }

    def apply(p: Any, x: jax.Array) -> jax.Array:
        out = two_layers(p["one"]["kernel"], p["one"]["bias"], p["two"]["kernel"], x)
        return out + p["two"]["bias"][None]

    return Model(params, apply)


def batch(step: int) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets of a step; a function of the step."""
    draw = np.random.default_rng((7, step))
    x = draw.normal(size=(ROWS, INPUTS)).astype(np.float32)
    y = draw.normal(size=(ROWS, OUTPUTS)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(y)


def initial(tx: optax.GradientTransformation, model: Model) -> Any:
    """The state before the first step."""
    return jax.jit(tx.init, compiler_options=COMPILATION)(model.params)


class Run(NamedTuple):
    """What a run left behind: entry t of each list is for step t, before its update."""

    model: Model
    params: list[Any]
    states: list[Any]
    losses: list[float]
    programs: int
    init: Callable[[Any], Any]


def train(
    model: Model,
    tx: optax.GradientTransformation,
    steps: int = 6,
    batches: Callable[[int], tuple[jax.Array, jax.Array]] = batch,
) -> Run:
    """Trains for a few steps with one compiled program and keeps everything."""

    @functools.partial(jax.jit, compiler_options=COMPILATION)
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        masks = tk.masks(state)

        def loss(theta: Any) -> jax.Array:
            return jnp.mean((model.apply(tk.sparsify(theta, masks), x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    init = jax.jit(tx.init, compiler_options=COMPILATION)
    params, states, losses = [model.params], [init(model.params)], []
    for t in range(steps):
        theta, state, loss = step(params[-1], states[-1], *batches(t))
        params.append(theta)
        states.append(state)
        losses.append(float(loss))
    return Run(model, params, states, losses, step._cache_size(), init)


def assert_conforms(run: Run, tx: optax.GradientTransformation, name: str) -> None:
    """Everything that holds for every method with every optimizer on every tree."""
    assert_fixed_point(run, tx)
    assert_counts(run, name)
    assert_moves_when_due(run, name)
    assert_probes(run, name)
    assert_off_mask(run, name)
    assert_slots(run)
    assert np.isfinite(run.losses).all()


# Reading trees -----------------------------------------------------------------------


def named(tree: Any) -> dict[str, np.ndarray]:
    """`{path: array}`; what is None is left out."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in flat}


def sets(state: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A and B by path."""
    masks = tk.masks(state)
    return named(masks.forward), named(masks.backward)


def sparse_states(state: Any) -> list[tk.SparseState]:
    """Every state of `tk.sparse`, as a test sees it."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, tk.SparseState))
    return [node for node in nodes if isinstance(node, tk.SparseState)]


def clock(state: Any) -> int:
    """Updates that `tk.sparse` has seen; all of them have seen as many."""
    steps = {int(node.sparse_step) for node in sparse_states(state)}
    assert len(steps) == 1
    return steps.pop()


def in_slices(run: Run, path: str, array: np.ndarray) -> np.ndarray:
    """[slices, entries of one slice]."""
    stacked = any(name in path for name in run.model.stacked)
    return array.reshape(array.shape[0] if stacked else 1, -1)


def description(tree: Any) -> Any:
    """Tree type, shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


# What must hold ----------------------------------------------------------------------


def assert_fixed_point(run: Run, tx: optax.GradientTransformation) -> None:
    """The type of the state never changes, so one program serves every step."""
    want = description(jax.eval_shape(tx.init, run.model.params))
    for state in run.states:
        assert description(state) == want
    for params in run.params:
        assert description(params) == description(run.model.params)
    assert run.programs == 1


def assert_counts(run: Run, name: str) -> None:
    """Exactly k_A and k_B at every step, of whatever has a budget of its own; A within B,
    unless B is nothing.
    """
    theta = named(run.model.params)
    for state in run.states:
        forward, backward = sets(state)
        assert forward.keys() == backward.keys()
        assert forward
        for path, a in forward.items():
            b = backward[path]
            assert a.dtype == b.dtype == np.bool_
            assert a.shape == b.shape == theta[path].shape
            size = in_slices(run, path, a).shape[1]
            k_a, k_b = FACTS[name].counts(size, clock(state))
            assert k_b == 0 or not (a & ~b).any(), path
            if FACTS[name].budget == "slice":
                assert (in_slices(run, path, a).sum(1) == k_a).all(), path
                assert (in_slices(run, path, b).sum(1) == k_b).all(), path
            elif FACTS[name].budget == "column":
                for columns in in_slices(run, path, a).reshape(-1, *a.shape[-2:]):
                    inputs = columns.sum(0)
                    living = int((inputs > 0).sum())
                    fan_in = min(k_a // living, len(columns))
                    assert set(inputs.tolist()) - {0} == {fan_in}, path
        if FACTS[name].budget == "network":
            wanted = sum(round((1 - FORWARD) * a.size) for a in forward.values())
            assert sum(int(a.sum()) for a in forward.values()) == wanted
            assert all((a == backward[path]).all() for path, a in forward.items())


def assert_moves_when_due(run: Run, name: str) -> None:
    """Masks change at due steps and at no others, into what the method says."""
    moved = {path: False for path in sets(run.states[0])[0]}
    for t, (before, after) in enumerate(
        zip(run.states[:-1], run.states[1:], strict=True)
    ):
        old, new = sets(before), sets(after)
        step = clock(after)
        due = step > clock(before) and FACTS[name].due(step)
        for path in moved:
            same = all(
                (o[path] == n[path]).all() for o, n in zip(old, new, strict=True)
            )
            if not due:
                assert same, (path, step)
                continue
            moved[path] |= not same
            theta = run.params[t + 1]
            assert_selection(run, name, path, named(theta)[path], old[0], new)
    assert all(moved.values()) != (name == "static"), moved


def assert_selection(
    run: Run,
    name: str,
    path: str,
    theta: np.ndarray,
    old: dict[str, np.ndarray],
    new: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
) -> None:
    """What can be said of a refresh from its result alone."""
    size = in_slices(run, path, np.abs(theta))
    chooses = FACTS[name].chooses
    if chooses == "largest":
        for chosen in new:
            marks = in_slices(run, path, chosen[path])
            for magnitude, mark in zip(size, marks, strict=True):
                rest = magnitude[~mark].max(initial=0)
                assert magnitude[mark].min() >= rest, path
        return
    marks_old = in_slices(run, path, old[path])
    marks_new = in_slices(run, path, new[0][path])
    for was, now in zip(marks_old, marks_new, strict=True):
        if chooses == "nested":
            assert not (now & ~was).any(), path
        elif chooses == "exchange":
            k = min(was.sum(), now.sum())
            # GSE rounds the number up, the others to the nearest.
            most = math.ceil(DROP * k) if name == "gse" else round(DROP * k)
            assert (was & now).sum() >= k - most, path


def assert_probes(run: Run, name: str) -> None:
    """Gradients are seen in the steps whose gradient a refresh needs, only there."""
    probes_at = FACTS[name].probes
    for state in run.states:
        probes = named(tk.masks(state).probe)
        if probes_at is None:
            assert probes == {}
            continue
        assert probes.keys() == sets(state)[0].keys()
        want = probes_at(clock(state))
        for path, probe in probes.items():
            rank = sets(state)[0][path].ndim if FACTS[name].subset else 0
            assert probe.ndim == rank, path
            assert bool(probe.any()) == want, path


def assert_off_mask(run: Run, name: str) -> None:
    """Off B: the reservoir keeps its bits; without one, weights are exact zeros."""
    for t, (before, after) in enumerate(
        zip(run.states[:-1], run.states[1:], strict=True)
    ):
        tk.check(run.params[t + 1], after)
        (forward, old), new = sets(before), sets(after)[1]
        was, now = named(run.params[t]), named(run.params[t + 1])
        if clock(after) == clock(before):
            for path, value in now.items():
                np.testing.assert_array_equal(value, was[path])
            continue
        for path, b in old.items():
            if FACTS[name].reservoir:
                assert now[path][~b].tobytes() == was[path][~b].tobytes(), path
            else:  # what leaves B is zero at once, what enters starts at zero
                kept = (forward[path] | b) & new[path]
                assert not now[path][~kept].any(), path


def assert_slots(run: Run) -> None:
    """Off B, what the inner optimizer remembers is what it would begin with."""
    for params, state in zip(run.params[1:], run.states[1:], strict=True):
        backward = sets(state)[1]
        for path, slot, fresh in slots(state, run.init(params), backward):
            off = ~backward[path]
            # Adafactor adds 1e-30 to squares, so its slots are not quite zero.
            np.testing.assert_allclose(slot[off], fresh[off], rtol=0, atol=1e-25)


def slots(
    state: Any, fresh: Any, sparse: dict[str, np.ndarray]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Path, value and initial value of each array of a sparse parameter's shape."""
    found = []
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    for (keys, leaf), new in zip(flat, jax.tree.leaves(fresh), strict=True):
        if GetAttrKey("sparse_inner") not in keys:
            continue
        text = jax.tree_util.keystr(keys)
        for path, mask in sparse.items():
            if text.endswith(path) and jnp.shape(leaf) == mask.shape:
                found.append((path, np.asarray(leaf), np.asarray(new)))
    return found

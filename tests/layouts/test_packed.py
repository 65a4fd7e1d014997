"""The packed layout does what the masked one does, with arrays of B alone."""

import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lockstep import EVERY, PLAIN, STACKED, STEPS, assert_same, loss, run

import topkast_jax as tk

DUE = tk.every(EVERY)
METHODS: dict[str, Any] = {
    "top_kast": lambda **o: tk.top_kast(0.8, 0.6, refresh=DUE, **o),
    "top_kast_random": lambda **o: tk.top_kast(
        0.8, 0.6, refresh=DUE, explore="random", **o
    ),
    "top_kast_stop": lambda **o: tk.top_kast(0.8, 0.6, refresh=DUE, stop=8, **o),
    "static": lambda **o: tk.static(0.8, **o),
    "straight_through": lambda **o: tk.straight_through(0.8, refresh=DUE, **o),
    "set": lambda **o: tk.set_(0.8, refresh=DUE, **o),
    "rigl": lambda **o: tk.rigl(
        0.8, refresh=DUE, drop_fraction=tk.cosine(0.9, STEPS), **o
    ),
    "gse": lambda **o: tk.gse(
        0.8,
        subset=1.5,
        refresh=DUE,
        drop_fraction=tk.cosine(0.9, STEPS),
        distribution=tk.uniform,
        **o,
    ),
    "rigl_itop": lambda **o: tk.rigl_itop(0.8, refresh=DUE, **o),
    "mest": lambda **o: tk.mest(0.8, refresh=DUE, weight=0.5, **o),
    "srigl": lambda **o: tk.srigl(0.8, gamma_sal=0.0, refresh=DUE, **o),
}
STRUCTURES = {
    "entries": tk.unstructured,
    "blocks": tk.blocks(4, 2),
    "fan_in": tk.fan_in(),
    "fan_in_blocks": tk.fan_in(2, 4),
    "n_of_m": tk.n_of_m(8),
    "groups": tk.groups_of(4),
    "groups_of_inputs": tk.groups_of(4, along="inputs"),
    "groups_of_blocks": tk.groups_of(2, tk.blocks(4, 2), along={"*/kernel": "inputs"}),
    "groups_of_fan_in": tk.groups_of(2, tk.fan_in(2, 4)),
    "groups_of_n_of_m": tk.groups_of(2, tk.n_of_m(4), along="inputs"),
}
APART = ("top_kast_random", "srigl")
CELLS = [
    *((name, "entries", PLAIN) for name in METHODS if name not in APART),
    ("srigl", "fan_in", PLAIN),
    ("top_kast_random", "fan_in_blocks", STACKED),
    ("top_kast", "blocks", STACKED),
    ("top_kast", "n_of_m", STACKED),
    ("gse", "blocks", STACKED),
]
REST = [
    (name, structure, shape)
    for name in METHODS
    for structure in STRUCTURES
    for shape in (PLAIN, STACKED)
    if (name, structure, shape) not in CELLS
    # Too few units in a selection for RigL to change any of them.
    and not ("rigl" in name and structure.startswith("groups") and shape == STACKED)
    and not (name == "srigl" and "fan_in" not in structure)
]


@pytest.mark.parametrize(
    ("name", "structure", "shape"),
    [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in REST)],
)
def test_masks_and_weights_are_those_of_the_masked_layout(name, structure, shape):
    method = METHODS[name](structure=STRUCTURES[structure])
    masked, packed = run("masked", method, shape), run("packed", method, shape)
    assert_same(masked, packed)
    moved = any((s.forward != masked[0].forward).any() for s in masked)
    assert moved == (name != "static")


@pytest.mark.parametrize(
    ("name", "structure", "shape", "delay"),
    [
        ("top_kast", "entries", PLAIN, 2),
        ("top_kast_stop", "blocks", STACKED, 1),
        ("rigl", "entries", PLAIN, 1),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (
                ("set", "fan_in", PLAIN, 2),
                ("top_kast_random", "n_of_m", STACKED, 2),
                ("rigl", "blocks", PLAIN, 2),
            )
        ),
    ],
)
def test_delayed_masks_are_those_of_the_masked_layout(name, structure, shape, delay):
    method = METHODS[name](structure=STRUCTURES[structure])
    late = run("masked", method, shape, delay=delay)
    assert_same(late, run("packed", method, shape, delay=delay))
    at_once = run("masked", method, shape)
    # The first choice is the same; it comes into force later, and is trained later.
    first = EVERY - 1
    np.testing.assert_array_equal(at_once[first].backward, late[first + delay].backward)
    assert (at_once[first].backward != late[first].backward).any()


@pytest.mark.parametrize(
    ("method", "delay", "message"),
    [
        (tk.top_kast(0.8, 0.6, refresh=tk.every(3)), 3, "due at steps 3 and 6"),
        (tk.set_(0.8, refresh=tk.at([4, 5])), 2, "due at steps 4 and 5"),
        (tk.static(0.8), 1, "static never refreshes"),
        (tk.top_kast(0.8, 0.6), -1, "must be at least 0"),
    ],
)
def test_delays_that_make_no_sense(method, delay, message):
    with pytest.raises(ValueError, match=message):
        tk.sparse(optax.sgd(0.1), method, refresh_delay=delay)


@pytest.mark.parametrize(
    "inner",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(0.05, weight_decay=0.1),
        *(
            pytest.param(inner, marks=pytest.mark.slow)
            for inner in (
                optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.01)),
                optax.lion(0.01),
                optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
            )
        ),
    ],
    ids=["momentum", "adamw", "clip_rmsprop", "lion", "inject"],
)
def test_any_optimizer(inner):
    method = METHODS["top_kast"]()
    assert_same(run("masked", method, inner=inner), run("packed", method, inner=inner))


@pytest.mark.parametrize(
    "inner",
    [optax.adafactor(0.05, min_dim_size_to_factor=8), optax.lamb(0.05)],
    ids=["adafactor", "lamb"],
)
def test_optimizers_that_look_at_whole_arrays_see_b_alone(inner):
    """They train, with other steps than in the masked layout, as the README says."""
    method = METHODS["static"]()
    masked, packed = (run(x, method, inner=inner) for x in ("masked", "packed"))
    np.testing.assert_array_equal(masked[-1].forward, packed[-1].forward)
    assert packed[-1].loss < 0.9 * packed[0].loss
    assert not np.allclose(masked[-1].weights, packed[-1].weights, rtol=1e-3)


@pytest.mark.parametrize(
    ("letters", "along"), [("i s o", "inputs"), ("o s i", "outputs")]
)
@pytest.mark.parametrize("explore", ["random", "top"])
def test_groups_before_the_stack(letters, along, explore):
    """Draws go by the order of the axes, and what is stored has the stack first."""
    method = tk.top_kast(
        0.8, 0.6, explore=explore, structure=tk.groups_of(2, along=along)
    )
    if explore == "top":
        method = tk.static(0.6, structure=tk.groups_of(2, along=along))
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 3, 8))}
    axes = tk.axes({"kernel": letters})
    masked, packed = (
        tk.sparse(optax.sgd(0.1), method, layout=layout, axes=axes)
        for layout in ("masked", "packed")
    )
    expected = tk.dense_masks(masked.init(params))
    found = tk.dense_masks(tk.start(packed, params)[1])
    jax.tree.map(np.testing.assert_array_equal, expected[:2], found[:2])


def test_bfloat16():
    method = METHODS["top_kast"]()
    masked, packed = (
        run(layout, method, dtype=jnp.bfloat16) for layout in ("masked", "packed")
    )
    for one, two in zip(masked, packed, strict=True):
        np.testing.assert_array_equal(one.forward, two.forward)


def start(method: tk.Method, shape: tuple[int, ...] = PLAIN) -> Any:
    tx = tk.sparse(optax.adam(0.05), method, layout="packed", seed=7)
    kernel = jax.random.normal(jax.random.key(0), shape)
    return tx, *tk.start(tx, {"one": {"kernel": kernel, "bias": jnp.zeros(shape[-1])}})


def sizes(tree: Any) -> list[int]:
    return sorted(x.size for x in jax.tree.leaves(tree))


def test_the_device_holds_b_alone():
    _tx, theta, state, store = start(METHODS["top_kast"]())
    k = round(0.4 * 16 * 24)
    assert theta["one"]["kernel"].shape == (k,)
    moments = sizes(state.sparse_inner)
    assert moments.count(k) == 2 and max(moments) == k
    assert store.theta["one/kernel"].size == 16 * 24
    assert store.nbytes == 4 * 16 * 24
    assert start(METHODS["set"]())[3].nbytes == 0


def test_no_dense_array_in_the_update():
    """Given packed gradients, nothing of a leaf's dense size is in the program."""
    tx, theta, state, _ = start(METHODS["top_kast"](), (64, 96))
    text = jax.jit(tx.update).lower(theta, state, theta).compile().as_text()
    assert f"f32[{round(0.4 * 64 * 96)}]" in text
    assert "6144" not in text and "64,96" not in text


def test_a_refresh_carries_moments_along():
    """Of entries that stay; those of entries that enter are zero."""
    tx, theta, state, store = start(METHODS["top_kast"]())
    grads = jax.grad(loss)(theta, state, 0)
    for t in range(EVERY):
        updates, state = tx.update(grads, state, theta)
        theta = optax.apply_updates(theta, updates)
        before = {
            int(i): float(m)
            for i, m in zip(
                tk.masks(state).forward["one"]["kernel"].index,
                state.sparse_inner[0].mu["one"]["kernel"],
                strict=True,
            )
        }
        assert tk.due(tx, t + 1) == (t + 1 == EVERY)
    theta, state, store = tk.refresh(tx, theta, state, store)
    after = zip(
        tk.masks(state).forward["one"]["kernel"].index,
        state.sparse_inner[0].mu["one"]["kernel"],
        strict=True,
    )
    entered = 0
    for i, moment in after:
        entered += int(i) not in before
        assert float(moment) == before.get(int(i), 0.0)
    assert 0 < entered < len(before)
    assert int(state.sparse_inner[0].count) == EVERY


def test_parameters_made_one_at_a_time():
    """A function in place of the tree gives the same start."""
    tx, theta, state, store = start(METHODS["top_kast"]())

    def make() -> Any:
        kernel = jax.random.normal(jax.random.key(0), PLAIN)
        return {"one": {"kernel": kernel, "bias": jnp.zeros(PLAIN[-1])}}

    theta2, state2, store2 = tk.start(tx, make)
    jax.tree.map(np.testing.assert_array_equal, (theta, state), (theta2, state2))
    np.testing.assert_array_equal(store.theta["one/kernel"], store2.theta["one/kernel"])


def test_the_penalty_knows_a_from_b():
    method = tk.top_kast(0.8, 0.6, penalty=0.5)
    tx = tk.sparse(optax.sgd(1.0), method, layout="packed")
    theta, state, _ = tk.start(tx, {"kernel": jnp.arange(1.0, 101).reshape(10, 10)})
    zeros = jax.tree.map(jnp.zeros_like, theta)
    updates, _ = tx.update(zeros, state, theta)
    ratio = np.asarray(updates["kernel"] / theta["kernel"])
    np.testing.assert_allclose(ratio[:20], -0.5, rtol=1e-6)
    np.testing.assert_allclose(ratio[20:], -2.5, rtol=1e-6)


def test_gradients_pass_every_transformation():
    _tx, theta, state, _ = start(METHODS["top_kast"]())
    plain = jax.grad(loss)(theta, state, 0)
    rematerialised = jax.grad(jax.checkpoint(loss))(theta, state, 0)
    jax.tree.map(np.testing.assert_array_equal, plain, rematerialised)
    many = jax.vmap(jax.grad(loss), (None, None, 0))(theta, state, jnp.arange(2.0))
    np.testing.assert_allclose(
        many["one"]["kernel"][0], plain["one"]["kernel"], rtol=1e-6
    )
    _, tangent = jax.jvp(lambda t: loss(t, state, 0), (theta,), (theta,))
    products = jax.tree.map(lambda g, t: jnp.sum(g * t), plain, theta)
    assert float(tangent) == pytest.approx(float(sum(jax.tree.leaves(products))), 1e-4)


def test_nan_is_refused_and_nothing_changes():
    tx, theta, state, store = start(METHODS["top_kast"]())
    before = store.theta["one/kernel"].copy()
    theta["one"]["kernel"] = theta["one"]["kernel"].at[3].set(jnp.nan)
    with pytest.raises(ValueError, match="'one/kernel' holds NaN or Inf at step 0"):
        tk.refresh(tx, theta, state, store)
    np.testing.assert_array_equal(store.theta["one/kernel"], before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tx, _: tx.init({"kernel": jnp.ones((4, 4))}), "tk.start"),
        (
            lambda _, masked: tk.start(masked, {"kernel": jnp.ones((4, 4))}),
            'tk.start is for layout="packed"',
        ),
        (lambda _, masked: tk.due(masked, 1), 'tk.due is for layout="packed"'),
        (lambda *_: tk.start(optax.adam(1.0), {}), "not a GradientTransformation"),
        (lambda tx, _: tk.drop_in(tx), 'tk.drop_in needs layout="masked"'),
        (
            lambda *_: tk.sparse(
                optax.sgd(1.0), tk.static(0.5), layout="packed", reset="keep"
            ),
            'reset="keep" needs layout="masked"',
        ),
    ],
)
def test_the_wrong_layout_is_named(call, message):
    method = tk.static(0.5)
    both = (tk.sparse(optax.sgd(1.0), method, layout=x) for x in ("packed", "masked"))
    with pytest.raises(ValueError, match=message):
        call(*both)


def test_growth_by_gradient_asks_for_the_probe():
    tx, theta, state, store = start(METHODS["rigl"]())
    with pytest.raises(ValueError, match="'one/kernel': growth by gradient needs"):
        tk.refresh(tx, theta, state, store)


@pytest.mark.parametrize("name", ["static", "set"])
def test_only_shapes(name):
    """A kernel of 8 GiB: masks, values and refresh, in less than a twentieth of it."""
    method = METHODS[name](structure=tk.fan_in(1, 256))
    method = method._replace(
        counts=lambda *_: {"kernel": tk.Counts(256 * 200, 256 * 200)}
    )
    shape = jax.ShapeDtypeStruct((2**15, 2**16 - 256), jnp.float32)
    tx = tk.sparse(optax.adam(0.01), method, layout="block")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    theta, state, store = tk.start(tx, {"kernel": shape})
    index = tk.masks(state).forward["kernel"]
    assert theta["kernel"].shape == (255, 1, 256)
    assert float(jnp.std(theta["kernel"])) == pytest.approx(2**-7.5, rel=0.02)
    columns = np.asarray(index.index) % 255
    assert sorted(columns.tolist()) == list(range(255))  # one block a column
    for t in range(EVERY):
        updates, state = tx.update(theta, state, theta)
        theta = optax.apply_updates(theta, updates)
        if tk.due(tx, t + 1):
            theta, state, store = tk.refresh(tx, theta, state, store)
    after = np.asarray(tk.masks(state).forward["kernel"].index)
    moved = np.isin(after, np.asarray(index.index), invert=True).sum()
    assert (moved > 0) == (name == "set") and len(set(after.tolist())) == 255
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 * 2**10  # KiB


def test_shapes_where_values_are_needed():
    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    tx = tk.sparse(optax.sgd(0.1), tk.top_kast(0.5, 0.5), layout="packed")
    with pytest.raises(ValueError, match="'kernel' is only a shape.*reservoir"):
        tk.start(tx, {"kernel": shape})
    tx = tk.sparse(optax.sgd(0.1), tk.static(0.5), layout="packed")
    with pytest.raises(ValueError, match="'bias' is only a shape.*kept dense"):
        tk.start(tx, {"kernel": shape, "bias": jax.ShapeDtypeStruct((4,), jnp.float32)})


def test_nan_in_a_gradient_is_named():
    tx, theta, state, _ = start(METHODS["set"]())
    grads = jax.tree.map(jnp.zeros_like, theta)
    grads["one"]["kernel"] = grads["one"]["kernel"].at[3].set(jnp.nan)
    _, state = tx.update(grads, state, theta)
    first = tk.health(state).nonfinite
    assert (first.path, first.step, first.count) == ("one/kernel", 0, 1)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (optax.flatten(optax.adam(0.1)), "belongs to no parameter"),
        (optax.contrib.muon(0.1), "for 'kernel' when it is dense, and"),
    ],
    ids=["flatten", "muon"],
)
def test_optimizers_that_cannot_follow_are_refused(inner, message):
    tx = tk.sparse(inner, tk.static(0.5), layout="packed")
    with pytest.raises(ValueError, match=message):
        tk.start(tx, {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(16)})


def test_factored_moments_begin_anew_when_masks_move():
    """They sum over entries that are not where they were; B shrinks at step 2 besides."""
    method = tk.top_kast(
        0.5, 0.25, refresh=tk.every(1), stop=2, structure=tk.blocks(128, 128)
    )
    tx = tk.sparse(optax.adafactor(0.1), method, layout="packed")
    theta, state, store = tk.start(tx, {"kernel": jnp.ones((512, 512))})
    for t in range(3):
        updates, state = tx.update(theta, state, theta)
        theta = optax.apply_updates(theta, updates)
        if tk.due(tx, t + 1):
            theta, state, store = tk.refresh(tx, theta, state, store)
            shape = (len(theta["kernel"]), 128)
            found = [x for x in jax.tree.leaves(state) if x.shape == shape]
            assert len(found) == 2  # of rows and of columns
            assert not any(float(jnp.abs(x).max()) for x in found)
    assert theta["kernel"].shape == (8, 128, 128)


@pytest.mark.parametrize("stop", [None, 0])
def test_shapes_are_those_of_the_start(stop):
    method = tk.top_kast(0.8, 0.6, stop=stop)
    params = {"kernel": jnp.ones((10, 12)), "bias": jnp.zeros(12)}
    tx = tk.sparse(optax.adam(0.1), method, layout="packed")
    theta, state, _ = tk.start(tx, params)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), (theta, state))
    found = jax.tree.map(lambda x: (x.shape, x.dtype), tk.shapes(tx, params))
    assert expected == found
    with pytest.raises(ValueError, match="sizes for 'kernle', which is not sparse"):
        tk.shapes(tx, params, {"kernle": (2, 2)})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (tk.snfs(0.8), "snfs changes how many entries a parameter keeps"),
        (tk.snfs(0.8, redistribute=False), "snfs remembers something of every entry"),
        (tk.mest(0.8, soft=True), "mest changes how many entries"),
        (tk.srigl(0.8), "srigl changes how many entries"),
        (tk.dsr(0.8), "dsr changes how many entries"),
        (tk.deep_r(0.8), "deep_r changes how many entries"),
        (tk.deep_r(0.8, scope="leaf"), "deep_r remembers something of every entry"),
    ],
)
@pytest.mark.parametrize("layout", ["packed", "block"])
def test_methods_that_need_dense_arrays_are_declined(method, message, layout):
    with pytest.raises(ValueError, match=message):
        tk.sparse(optax.sgd(0.1), method, layout=layout, learning_rate=0.1)


def test_mest_asks_for_the_gradient_of_what_it_has():
    tx, theta, state, store = start(METHODS["mest"]())
    with pytest.raises(ValueError, match="mest chooses by the gradient .*tk.probe"):
        tk.refresh(tx, theta, state, store)
    probed = tk.probe(loss, theta, state, 0)
    grads = jax.grad(loss)(theta, state, 0)
    own = {
        "one": {"kernel": tk.Found(None, None, grads["one"]["kernel"]), "bias": None}
    }
    after = [
        tk.refresh(tx, theta, state, store, found)[0]["one"]["kernel"]
        for found in (probed, own)
    ]
    np.testing.assert_array_equal(*after)


def test_exploration_is_the_same_in_every_layout():
    method = METHODS["rigl_itop"](structure=tk.blocks(4, 2))
    params = {"one": {"kernel": jnp.ones((16, 24)), "bias": jnp.zeros(24)}}
    masked, packed = (
        tk.sparse(optax.adam(0.05), method, layout=layout, seed=7)
        for layout in ("masked", "packed")
    )
    state = masked.init(params)
    _, own, _ = tk.start(packed, params)
    memories = [s.sparse_memory["one"]["kernel"] for s in (state, own)]
    np.testing.assert_array_equal(*memories)
    assert tk.metrics.exploration_rate(own) == tk.metrics.exploration_rate(state)
    abstract = tk.shapes(packed, params)[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), own
    )


def test_what_never_refreshes_says_so():
    tx = tk.sparse(optax.sgd(0.1), tk.static(0.5), layout="packed")
    theta, state, store = tk.start(tx, {"kernel": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match=r"tk.refresh: static never refreshes"):
        tk.refresh(tx, theta, state, store)

"""Adaptive embedding and softmax against the plain ones, in NumPy and float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import topkast_jax as tk
from experiments.models import adaptive
from experiments.models import transformer_xl as xl
from experiments.tasks.uses import count_uses

V, CUTOFFS, D, B, T = 23, (5, 9, 17), 16, 2, 12

# (d_embed, div_val, tied, tied_projections)
CASES = {
    "one width": (D, 1, True, "tail"),
    "one width, projected, tied": (8, 1, True, "all"),
    "one width, projected, tail tied": (8, 1, True, "tail"),
    "one width, projected, untied": (8, 1, False, "none"),
    "narrower, tail tied": (D, 2, True, "tail"),
    "narrower, all tied": (D, 2, True, "all"),
    "narrower, untied": (D, 2, False, "none"),
}


class Ends(xl.TransformerXL):
    """The two ends of the model, with hidden states given in place of its layers."""

    @nn.compact
    def __call__(self, ids, hidden, targets):
        embed = self._embedding()
        with_targets = self._head(embed, hidden, targets)
        return embed(ids), with_targets

    @classmethod
    def of(cls, model):
        names = [n for n in model.__dataclass_fields__ if n not in ("parent", "name")]
        return cls(**{name: getattr(model, name) for name in names})


def build(case="narrower, tail tied", **changes):
    d_embed, div_val, tied, projections = CASES[case]
    settings = dict(
        vocabulary=V,
        layers=1,
        d_model=D,
        heads=2,
        d_head=8,
        d_inner=16,
        memory=4,
        d_embed=d_embed,
        cutoffs=CUTOFFS,
        div_val=div_val,
        tied_softmax=tied,
        tied_projections=projections,
    )
    return xl.TransformerXL(**(settings | changes))


def draw(model, *inputs, seed=0):
    """Random parameters of the size that tells mistakes from rounding."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]

    def leaf(path, x):
        drawn = rng.normal(0, 0.4, x.shape) + ("scale" in str(path[-1]))
        return jnp.asarray(drawn, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def draw_ids(seed=0):
    """[B, T], every id at least once."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.permutation(np.arange(B * T) % V).reshape(B, T), jnp.int32)


def plain(params, model):
    """Rows as the model sees them [V, D], and the log-probabilities of a hidden [D]."""
    flat = {
        p: np.asarray(x, np.float64) for p, x in flatten_dict(params, sep="/").items()
    }
    ends = (0, *model.cutoffs, V)
    count = len(ends) - 1

    def projection(i, of):
        tied = model.tied_projections == "all" or (
            model.tied_projections == "tail" and i > 0
        )
        if of == "head" and not tied:
            return flat.get(f"head/projection_{i}/kernel", np.eye(D))  # [D, d]
        own = flat.get(f"embed/projection_{i if model.div_val > 1 else 0}/kernel")
        own = np.eye(D) if own is None else own  # [d, D]
        return own if of == "embed" else own.T

    rows = np.concatenate(
        [
            flat[f"embed/table_{i}/embedding"] @ projection(i, "embed")
            for i in range(count)
        ]
    )

    def log_probabilities(hidden):
        outputs = "embed" if model.tied_softmax else "head"
        scores = [
            flat[f"{outputs}/table_{i}/embedding"] @ (hidden @ projection(i, "head"))
            + flat[f"head/bias_{i}"]
            for i in range(count)
        ]
        entries = (
            hidden @ projection(0, "head") @ flat["head/clusters/kernel"]
            + flat["head/clusters/bias"]
        )
        head = np.exp(np.concatenate([scores[0], entries]))
        head /= head.sum()
        found = list(head[: ends[1]])
        for i in range(1, count):
            within = np.exp(scores[i]) / np.exp(scores[i]).sum()
            found += list(head[ends[1] + i - 1] * within)
        return np.log(found)  # [V]

    return rows, log_probabilities


@pytest.mark.parametrize("case", CASES)
def test_is_the_plain_softmax(case):
    model = build(case)
    ends, ids, targets = Ends.of(model), draw_ids(), draw_ids(1)
    hidden = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    params = draw(ends, ids, hidden, targets)
    rows, log_probabilities = plain(params, model)
    expected = np.array([[log_probabilities(h) for h in row] for row in hidden])
    np.testing.assert_allclose(np.exp(expected).sum(-1), 1, rtol=1e-9)

    embedded, nats = ends.apply({"params": params}, ids, hidden, targets)
    np.testing.assert_allclose(embedded, rows[ids], rtol=1e-4, atol=1e-5)
    _, found = ends.apply({"params": params}, ids, hidden, None)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    own = np.take_along_axis(expected, np.asarray(targets)[..., None], axis=-1)
    np.testing.assert_allclose(nats, -own[..., 0], rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_all_logits():
    ends, ids, targets = Ends.of(build()), draw_ids(), draw_ids(1)
    hidden = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    params = draw(ends, ids, hidden, targets)

    def by_targets(params, hidden):
        return ends.apply({"params": params}, ids, hidden, targets)[1].mean()

    def by_logits(params, hidden):
        _, logits = ends.apply({"params": params}, ids, hidden, None)
        return -jnp.take_along_axis(logits, targets[..., None], axis=-1).mean()

    @jax.jit
    def both(params, hidden):
        return [jax.grad(f, (0, 1))(params, hidden) for f in (by_targets, by_logits)]

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
        assert jnp.abs(b).max() > 1e-4

    found, expected = both(params, hidden)
    of_embedding = flatten_dict(found[0], sep="/")
    head = of_embedding.pop("embed/projection_0/kernel")  # used for input alone
    assert not head.any()
    others = flatten_dict(expected[0], sep="/")
    for path, grad in of_embedding.items():
        close(grad, others[path])
    close(found[1], expected[1])


def test_logits_are_not_kept_for_the_backward_pass():
    # More ids than anything else is wide, so that logits are known by their size.
    model = build(vocabulary=700, cutoffs=(100, 300))
    ends, ids = Ends.of(model), draw_ids()
    hidden = jnp.ones((B, T, D))
    params = draw(ends, ids, hidden, ids)

    def largest(targets):
        def loss(hidden):
            return ends.apply({"params": params}, ids, hidden, targets)[1].sum()

        def residuals(hidden):
            return jax.tree.leaves(jax.vjp(loss, hidden)[1])

        kept = jax.eval_shape(residuals, hidden)
        return max(x.size for x in kept if x.shape[:2] == (B, T))

    assert largest(ids) < B * T * 100
    assert largest(None) >= B * T * 100


def test_model_with_targets():
    model, ids, targets = build(), draw_ids(), draw_ids(1)
    memory = model.initial_memory(B)
    params = draw(model, ids, memory)

    @jax.jit
    def run(params, memory):
        logits, after = model.apply({"params": params}, ids, memory)
        nats, again = model.apply({"params": params}, ids, memory, targets)
        return logits, nats, after, again

    logits, nats, after, again = run(params, memory)
    np.testing.assert_allclose(np.exp(logits).sum(-1), 1, rtol=1e-4)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats, -own, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, after, again)
    assert after.hidden.shape == memory.hidden.shape


@pytest.mark.parametrize("tied", [True, False])
def test_nats_of_the_plain_model(tied):
    model = build(cutoffs=(), d_embed=None, div_val=1, tied_softmax=tied)
    ids, targets, memory = draw_ids(), draw_ids(1), model.initial_memory(B)
    params = draw(model, ids, memory)
    assert "table_0" not in params["embed"]
    logits, _ = model.apply({"params": params}, ids, memory)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    nats, _ = model.apply({"params": params}, ids, memory, targets)
    np.testing.assert_allclose(nats, expected, rtol=1e-5, atol=1e-5)


def test_projected_embedding_without_clusters():
    model = build(cutoffs=(), d_embed=8, div_val=1, tied_projections="all")
    ids, memory = draw_ids(), model.initial_memory(B)
    params = draw(model, ids, memory)
    logits, _ = model.apply({"params": params}, ids, memory)
    np.testing.assert_allclose(np.exp(logits).sum(-1), 1, rtol=1e-4)
    flat = {p: x.shape for p, x in flatten_dict(params, sep="/").items()}
    ends = {p: s for p, s in flat.items() if p.startswith(("embed", "head"))}
    assert ends == {
        "embed/table_0/embedding": (V, 8),
        "embed/projection_0/kernel": (8, D),
        "head/bias_0": (V,),
    }


def test_uses_of_clusters():
    ids, memory = draw_ids(), build().initial_memory(B)
    once = B * T  # masked or not: shapes are static

    def of_ends(case):
        uses = count_uses(build(case), ids, memory, ids)
        return {p: n for p, n in uses.items() if p.startswith(("embed", "head"))}

    expected = {f"embed/table_{i}/embedding": once for i in range(4)}
    expected |= {f"embed/projection_{i}/kernel": 2 * once for i in (1, 2, 3)}
    expected |= {"embed/projection_0/kernel": once, "head/projection_0/kernel": once}
    expected |= {"head/clusters/kernel": once}
    assert of_ends("narrower, tail tied") == expected
    # One projection for all clusters is computed once.
    uses = of_ends("one width, projected, tied")
    assert uses["embed/projection_0/kernel"] == 2 * once


def test_init_std():
    model = build("narrower, untied", vocabulary=400, init_std=0.005, d_inner=64)
    ids, memory = draw_ids(), model.initial_memory(B)
    params = jax.jit(model.init)(jax.random.key(0), ids, memory)["params"]
    for path, x in flatten_dict(params, sep="/").items():
        if "projection" in path:
            expected = 0.01
        elif path.endswith(("kernel", "embedding")) or "_bias" in path:
            expected = 0.005
        else:
            continue
        assert abs(float(x.std()) / expected - 1) < 4 / np.sqrt(x.size), path


def test_bfloat16_is_for_activations_alone():
    model = build(dtype=jnp.bfloat16)
    ids, targets, memory = draw_ids(), draw_ids(1), model.initial_memory(B)
    assert memory.hidden.dtype == jnp.bfloat16
    params = draw(model, ids, memory)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    @jax.jit
    def run(params, memory):
        plain, _ = build().apply({"params": params}, ids, build().initial_memory(B))
        nats, after = model.apply({"params": params}, ids, memory, targets)
        logits, _ = model.apply({"params": params}, ids, memory)
        return plain, logits, nats, after

    plain, logits, nats, after = run(params, memory)
    assert logits.dtype == nats.dtype == jnp.float32
    assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, memory)
    assert 0 < jnp.abs(logits - plain).mean() < 0.03 * jnp.std(plain)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats, -own, rtol=1e-4, atol=1e-4)
    # Numbers of products are kept in float32: neighbours of bfloat16 are further apart.
    assert (logits.astype(jnp.bfloat16).astype(jnp.float32) != logits).mean() > 0.9


@pytest.mark.parametrize("tied", [True, False])
def test_types_of_the_plain_model_in_bfloat16(tied):
    model = build(
        cutoffs=(), d_embed=None, div_val=1, tied_softmax=tied, dtype="bfloat16"
    )
    ids, memory = draw_ids(), jax.eval_shape(lambda: model.initial_memory(B))
    params = jax.eval_shape(model.init, jax.random.key(0), ids, memory)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for targets in (None, ids):
        out, after = jax.eval_shape(model.apply, params, ids, memory, targets)
        assert out.dtype == jnp.float32
        assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, memory)
        assert memory.hidden.dtype == jnp.bfloat16


def test_sparse_tables_and_tied_projections():
    model, ids = build(), draw_ids()
    memory = model.initial_memory(B)
    params = draw(model, ids, memory)
    where = ("*projection_1/kernel", "*table_0/embedding")
    method = tk.static(0.5, where=where)
    tx = tk.sparse(optax.sgd(0.1), method, layout="block")
    theta, state, _ = tk.start(tx, params)
    alpha, dense = tk.sparsify(theta, tk.masks(state)), tk.export(theta, state)
    routes = tk.flax.routes(model, {"params": alpha}, ids, memory, ids)
    assert "Projection is not a Dense" in routes["embed/projection_1/kernel"]
    assert len(routes) == 2

    @jax.jit
    def both(alpha, dense):
        given = ids, memory, ids
        found, _ = tk.flax.apply(model)({"params": alpha}, *given)
        return found, model.apply({"params": dense}, *given)[0]

    np.testing.assert_allclose(*both(alpha, dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cutoffs=(9, 5)), r"cutoffs are \(9, 5\); they must rise.*23"),
        (dict(cutoffs=(5, V)), "cutoffs are"),
        (dict(cutoffs=(0, 5)), "cutoffs are"),
        (dict(div_val=3), "div_val is 3.*d_embed=16 divided by it 3 times"),
        (dict(div_val=0), "div_val is 0; it must be at least 1"),
        (dict(tied_projections="head"), "tied_projections is 'head'; possible are"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    model, ids = build(**change), draw_ids()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), ids, model.initial_memory(B))


def test_clusters():
    found = adaptive.clusters(267_735, (20_000, 40_000, 200_000), 1024, 4)
    assert [c.width for c in found] == [1024, 256, 64, 16]
    assert [c.stop - c.start for c in found] == [20_000, 20_000, 160_000, 67_735]


def test_only_the_memory_carries_the_answer():
    """A segment of blanks is to be answered with the id that the one before began with.

    Rare ids among them. Whose memory is emptied in between can do no better than the
    entropy of the answers.
    """
    model = build(cutoffs=(9,))
    answers = jnp.asarray([1, 6, 10, 20])  # two of each cluster
    tx = optax.adam(1e-2)
    blanks = jnp.zeros((32, 2), jnp.int32)

    def ask(params, key, keep):
        answer = jax.random.choice(key, answers, (32,))
        question = jnp.stack([answer, jnp.zeros_like(answer)], axis=1)  # [32, 2]
        empty = model.initial_memory(32)
        _, memory = model.apply({"params": params}, question, empty)
        memory = xl.forget(memory, jnp.full((32,), ~keep))
        targets = jnp.stack([answer, answer], axis=1)
        return model.apply({"params": params}, blanks, memory, targets)[0].mean()

    @jax.jit
    def train(params, keep):
        def step(carry, i):
            params, state = carry
            loss, grads = jax.value_and_grad(ask)(params, jax.random.key(i), keep)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        start = params, tx.init(params)
        _, losses = jax.lax.scan(step, start, jnp.arange(100))
        return losses[-20:].mean()  # every batch is a new draw

    memory = model.initial_memory(32)
    params = jax.jit(model.init)(jax.random.key(0), blanks, memory)["params"]
    assert train(params, jnp.bool_(True)) < 0.1
    assert 0.95 * np.log(4) < train(params, jnp.bool_(False)) < 1.2 * np.log(4)

"""Transformer-XL against plain loops, and what its memory must and must not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from experiments.models import transformer_xl as xl


def build(**changes):
    settings = dict(
        vocabulary=11, layers=2, d_model=12, heads=3, d_head=4, d_inner=16, memory=6
    )
    return xl.TransformerXL(**(settings | changes))


def draw(module, *inputs, seed=0, **settings):
    """Random parameters, as the module names them; biases and norms too."""
    init = functools.partial(module.init, **settings)
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        drawn = rng.normal(0, 0.3, x.shape) + ("scale" in str(path[-1]))
        return jnp.asarray(drawn, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def start(model, rows=2, tokens=5, seed=0):
    """Parameters, tokens [B, T], and an empty memory."""
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(model.vocabulary, size=(rows, tokens)), jnp.int32)
    memory = model.initial_memory(rows)
    return draw(model, ids, memory, seed=seed), ids, memory


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, ids, memory):
    return model.apply({"params": params}, ids, memory)


def attention_by_loops(params, segment, memory, length, clamp, u, v, same=False):
    """Section 3.3 of the paper, one query, key and head at a time.

    Shapes: segment [B, T, D], memory [B, M, D], length [B]; returns [B, T, D].
    """
    w = {name: np.asarray(params[name]["kernel"], np.float64) for name in params}
    rows, tokens, width = segment.shape
    slots = memory.shape[1]
    heads, size = u.shape
    out = np.zeros((rows, tokens, width))
    for b in range(rows):
        context = np.concatenate([memory[b], segment[b]])  # [K, D]
        for i in range(tokens):
            for h in range(heads):
                q = segment[b, i] @ w["query"][:, h]  # [E]
                seen, scores = [], []
                for j in range(slots - length[b], slots + i + 1):
                    distance = slots + i - j
                    if same and distance >= slots:
                        continue
                    if clamp is not None:
                        distance = min(distance, clamp)
                    angles = [
                        distance / 10000 ** (2 * f / width) for f in range(width // 2)
                    ]
                    r = np.concatenate([np.sin(angles), np.cos(angles)])  # [D]
                    k = context[j] @ w["key"][:, h]
                    p = r @ w["relative"][:, h]
                    seen.append(context[j] @ w["value"][:, h])
                    scores.append(((q + u[h]) @ k + (q + v[h]) @ p) / np.sqrt(size))
                weights = np.exp(np.array(scores) - max(scores))
                mixed = (weights / weights.sum()) @ np.array(seen)  # [E]
                out[b, i] += mixed @ w["out"][h]
    return out


@pytest.mark.parametrize(
    ("slots", "length", "clamp", "same"),
    [
        (6, [0, 4], None, False),
        (6, [0, 4], 3, False),
        (3, [3, 1], None, False),
        (0, [0, 0], 3, False),
        (6, [6, 4], 3, True),
        (3, [3, 1], None, True),
    ],
)
def test_attention_is_the_papers(slots, length, clamp, same):
    rng = np.random.default_rng(0)
    segment = rng.normal(size=(2, 5, 12)).astype(np.float32)
    memory = rng.normal(size=(2, slots, 12)).astype(np.float32)
    u, v = rng.normal(size=(2, 3, 4)).astype(np.float32)
    layer = xl.RelativeAttention(heads=3, d_head=4)
    inputs = (
        segment,
        np.concatenate([memory, segment], axis=1),
        xl.distance_embedding(slots + 5, 12, clamp),
        xl.attention_mask(jnp.array(length), 5, slots, same),
        u,
        v,
    )
    params = draw(layer, *inputs, train=False)
    apply = jax.jit(functools.partial(layer.apply, train=False))
    found = apply({"params": params}, *inputs)
    expected = attention_by_loops(params, segment, memory, length, clamp, u, v, same)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def model_by_loops(params, ids, memories, clamp, tied):
    """Sections 3.2 and 3.3 in NumPy: a segment, with what came before of each layer.

    Args:
      params: of a model with post-norm and a tied softmax.
      ids: [B, T].
      memories: for each layer the inputs at all earlier positions that it may see,
        [B, M, D], any M.
    Returns:
      Logits [B, T, V], and the inputs of each layer [B, T, D].
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    table = params["embed"]["embedding"]
    x = table[np.asarray(ids)] * np.sqrt(table.shape[1])
    inputs = []
    for i, memory in enumerate(memories):
        block, suffix = params[f"block_{i}"], "" if tied else f"_{i}"
        u, v = (params[f"{name}_bias{suffix}"] for name in ("content", "position"))
        inputs.append(x)
        lengths = [memory.shape[1]] * len(x)
        attended = attention_by_loops(
            block["attention"], x, memory, lengths, clamp, u, v
        )

        def norm(name, y, block=block):
            centred = y - y.mean(-1, keepdims=True)
            scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
            return scaled * block[name]["scale"] + block[name]["bias"]

        x = norm("attention_norm", x + attended)
        feed = block["feed_forward"]
        inner = np.maximum(x @ feed["in"]["kernel"] + feed["in"]["bias"], 0)
        fed = inner @ feed["out"]["kernel"] + feed["out"]["bias"]
        x = norm("feed_forward_norm", x + fed)
    return x @ table.T + params["head_bias"], inputs


@pytest.mark.parametrize(("tied", "clamp"), [(True, None), (False, 4)])
def test_model_is_the_papers(tied, clamp):
    # Three segments of 3 with 4 slots: at the third, the oldest have been forgotten.
    model = build(tied_biases=tied, clamp=clamp, memory=4)
    params, ids, memory = start(model, tokens=9)
    past = [np.zeros((2, 0, 12))] * 2
    for t in (0, 3, 6):
        segment = ids[:, t : t + 3]
        expected, inputs = model_by_loops(params, segment, past, clamp, tied)
        logits, memory = run(model, params, segment, memory)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
        past = [
            np.concatenate([p, x], axis=1)[:, -4:]
            for p, x in zip(past, inputs, strict=True)
        ]


def test_block_normalises_after_or_before():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 4, 12)).astype(np.float32)
    memory = rng.normal(size=(1, 2, 12)).astype(np.float32)
    biases = (jnp.ones((3, 4)), jnp.zeros((3, 4)))
    inputs = xl.distance_embedding(6, 12), xl.attention_mask(jnp.array([2]), 4, 2)
    settings = dict(heads=3, d_head=4, d_inner=16, dropout=0.0, attention_dropout=0.0)
    post, pre = (xl.Block(**settings, norm=norm) for norm in ("post", "pre"))
    settings = dict(train=False)
    params = draw(post, x, memory, *inputs, biases, **settings)

    def attend(context):
        layer = xl.RelativeAttention(3, 4)
        context = context, *inputs, *biases
        variables = {"params": params["attention"]}
        return layer.apply(variables, context[0][:, 2:], *context, **settings)

    def feed(y):
        variables = {"params": params["feed_forward"]}
        return xl.FeedForward(16).apply(variables, y, **settings)

    def norm(name, y):
        scale, shift = params[name]["scale"], params[name]["bias"]
        spread = jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return (y - y.mean(-1, keepdims=True)) / spread * scale + shift

    @jax.jit
    def expected(context):
        after = norm("attention_norm", x + attend(context))
        after = norm("feed_forward_norm", after + feed(after))
        before = x + attend(norm("attention_norm", context))
        return after, before + feed(norm("feed_forward_norm", before))

    @jax.jit
    def found(*inputs):
        variables = {"params": params}
        return tuple(b.apply(variables, *inputs, **settings) for b in (post, pre))

    context = jnp.concatenate([memory, x], axis=1)
    both = found(x, memory, *inputs, biases)
    for block, parts in zip(both, expected(context), strict=True):
        np.testing.assert_allclose(block, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("norm", "tied"), [("post", True), ("pre", False)])
def test_two_segments_with_memory_are_one_long_segment(norm, tied):
    model = build(norm=norm, tied_biases=tied, tied_softmax=tied)
    params, ids, memory = start(model, tokens=10)
    whole, _ = run(model, params, ids, memory)
    first, memory = run(model, params, ids[:, :5], memory)
    np.testing.assert_array_equal(memory.length, [5, 5])
    second, memory = run(model, params, ids[:, 5:], memory)
    np.testing.assert_array_equal(memory.length, [6, 6])
    parts = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)


def test_reach_grows_by_a_memory_per_layer():
    # With M slots per layer, position i of a stream in segments of 1 depends on what
    # lies up to L * M before it and on nothing older.
    model = build(memory=3)
    params, ids, empty = start(model, rows=1, tokens=12)

    def last(ids):
        memory = empty
        for t in range(ids.shape[1]):
            logits, memory = run(model, params, ids[:, t : t + 1], memory)
        return logits

    base = last(ids)
    changed = [bool(jnp.any(last(ids.at[0, t].add(1) % 11) != base)) for t in range(12)]
    assert changed == [t >= 11 - 2 * 3 for t in range(12)]


def test_no_position_sees_the_future():
    model = build()
    params, ids, memory = start(model)
    _, memory = run(model, params, ids, memory)
    logits, _ = run(model, params, ids, memory)
    for t in range(5):
        other = ids.at[:, t].set((ids[:, t] + 1) % 11)
        changed, _ = run(model, params, other, memory)
        differs = jnp.any(changed != logits, axis=(0, 2))  # [T]
        assert not differs[:t].any()
        assert differs[t]


def test_empty_memory_is_not_attended():
    # Without the count of real slots, zero vectors would take part in every softmax.
    model = build(memory=6)
    params, ids, memory = start(model)
    logits, after = run(model, params, ids, memory)
    rubbish = memory._replace(hidden=memory.hidden + 7)
    ignored, _ = run(model, params, ids, rubbish)
    np.testing.assert_array_equal(logits, ignored)
    without, _ = run(build(memory=0), params, ids, build(memory=0).initial_memory(2))
    np.testing.assert_allclose(logits, without, rtol=1e-5, atol=1e-5)
    seen, _ = run(model, params, ids, after)
    assert jnp.abs(seen - logits).max() > 0.1


def test_rows_start_afresh_one_by_one():
    model = build()
    params, ids, empty = start(model)
    first, memory = run(model, params, ids, empty)
    again, after = run(model, params, ids, xl.forget(memory, jnp.array([True, False])))
    np.testing.assert_array_equal(after.length, [5, 6])
    np.testing.assert_allclose(again[0], first[0], rtol=1e-5, atol=1e-5)
    assert jnp.abs(again[1] - first[1]).max() > 0.1
    broken = memory._replace(hidden=memory.hidden * jnp.nan)
    clean, _ = run(model, params, ids, xl.forget(broken, jnp.array([True, True])))
    np.testing.assert_allclose(clean, first, rtol=1e-5, atol=1e-5)


def test_memory_keeps_the_newest_and_takes_no_gradient():
    memory = xl.empty_memory(1, 2, 4, 3)
    steps = [jnp.arange(18.0).reshape(1, 6, 3), jnp.ones((1, 6, 3))]
    after = xl.remember(memory, steps)
    np.testing.assert_array_equal(after.hidden[:, 0], steps[0][:, -4:])
    after = xl.remember(after, [s[:, :1] for s in steps])
    np.testing.assert_array_equal(after.hidden[0, 0, :, 0], [9, 12, 15, 0])
    np.testing.assert_array_equal(after.length, [4])

    def through(x):
        return xl.remember(memory, [x, x]).hidden.sum()

    assert not jax.grad(through)(steps[0]).any()


def test_only_the_memory_carries_the_answer():
    """The answer to a segment of blanks is the byte that began the segment before."""
    model = build(vocabulary=5, layers=1, d_model=16, heads=2, d_head=8, memory=4)
    params, _, empty = start(model, rows=32)
    blanks = jnp.zeros((32, 2), jnp.int32)
    tx = optax.adam(1e-2)

    def ask(params, key, keep):
        answer = jax.random.randint(key, (32,), 1, 5)
        question = jnp.stack([answer, jnp.zeros_like(answer)], axis=1)  # [32, 2]
        _, memory = run(model, params, question, empty)
        forgotten = jnp.full((32,), not keep)
        logits, _ = run(model, params, blanks, xl.forget(memory, forgotten))
        logits = logits[:, -1]  # [32, V]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, answer).mean()
        return loss, (logits.argmax(-1) == answer).mean()

    @jax.jit
    def train(params, state, key):
        grads, _ = jax.grad(ask, has_aux=True)(params, key, True)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(150):
        params, state = train(params, state, jax.random.key(i))
    loss, right = ask(params, jax.random.key(1000), True)
    assert loss < 0.1
    assert right == 1
    loss, right = ask(params, jax.random.key(1000), False)
    assert loss > np.log(4)
    assert right < 0.6


@pytest.mark.parametrize("tied", [True, False])
def test_parameters(tied):
    model = build(tied_biases=tied, tied_softmax=tied)
    key, ids = jax.random.key(0), jnp.zeros((1, 1), int)
    params = jax.eval_shape(model.init, key, ids, model.initial_memory(1))["params"]
    shapes = {p: x.shape for p, x in flatten_dict(params, sep="/").items()}
    block = {p for p in shapes if p.startswith("block_0") and p.endswith("kernel")}
    assert {p.removeprefix("block_0/"): shapes[p] for p in block} == {
        "attention/query/kernel": (12, 3, 4),
        "attention/key/kernel": (12, 3, 4),
        "attention/value/kernel": (12, 3, 4),
        "attention/relative/kernel": (12, 3, 4),
        "attention/out/kernel": (3, 4, 12),
        "feed_forward/in/kernel": (12, 16),
        "feed_forward/out/kernel": (16, 12),
    }
    biases = {p for p in shapes if p.startswith(("content_bias", "position_bias"))}
    if tied:
        assert biases == {"content_bias", "position_bias"}
    else:
        assert len(biases) == 4
    assert all(shapes[p] == (3, 4) for p in biases)
    assert ("head/kernel" in shapes) == (not tied)


def test_every_carried_leaf_has_the_rows_first():
    model = build()
    params, ids, memory = start(model)
    _, after = run(model, params, ids, memory)
    before, after = jax.tree.leaves(memory), jax.tree.leaves(after)
    assert (
        [x.shape for x in before] == [x.shape for x in after] == [(2, 2, 6, 12), (2,)]
    )
    assert [x.dtype for x in before] == [x.dtype for x in after]


def test_no_dropout_in_evaluation():
    model = build(dropout=0.5, attention_dropout=0.5)
    params, ids, memory = start(model)
    plain, _ = run(build(), params, ids, memory)
    evaluated, _ = run(model, params, ids, memory)
    np.testing.assert_array_equal(plain, evaluated)

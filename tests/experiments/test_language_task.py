"""The language-model task: what it counts, carries, and refuses."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from experiments import evaluate, tasks
from experiments import mesh as meshes
from experiments.data import tiny_shakespeare, wikitext103

B, T, M, D, H, E, INNER, L = 2, 8, 6, 16, 2, 8, 24, 2


def make_config(data_dir=None, **model):
    settings = dict(
        layers=L, d_model=D, heads=H, d_head=E, d_inner=INNER, segment=T, memory=M
    )
    return ml_collections.ConfigDict(
        dict(
            task="language_model",
            batch_size=B,
            data_dir=data_dir,
            model=settings | model,
        )
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def task(data_dir):
    return tasks.make(make_config(data_dir))


@pytest.fixture(scope="module")
def params(task):
    return jax.jit(task.init)(jax.random.key(0))[0]


@pytest.fixture(scope="module")
def loss(task):
    return jax.jit(task.loss)


@pytest.fixture(scope="module")
def metrics(task):
    return jax.jit(task.metrics)


def draw_batch(seed=0, start=False):
    text = np.random.default_rng(seed).integers(256, size=(B, T + 1)).astype(np.int32)
    return {
        "inputs": text[:, :-1],  # [B, T]
        "targets": text[:, 1:],  # [B, T]
        "weights": np.ones((B, T), np.float32),
        "start": np.full(B, start),  # [B]
    }


def test_loss_is_mean_nats_and_bits(task, params, loss):
    value, (_, aux) = loss(params, task.carry(B), draw_batch(), jax.random.key(0))
    assert abs(value - math.log(256)) < 1.5  # untrained: about uniform over 256 bytes
    assert set(aux) == {"bits_per_byte"}
    np.testing.assert_allclose(aux["bits_per_byte"], value / math.log(2), rtol=1e-6)


def test_sums_agree_with_the_loss_and_add_up(task, params, loss, metrics):
    batch = draw_batch()
    batch["weights"][1, 3:] = 0
    value, _ = loss(params, task.carry(B), batch, jax.random.key(0))
    sums, _ = metrics(params, task.carry(B), batch)
    assert float(sums["loss"][1]) == T + 3
    np.testing.assert_allclose(sums["loss"][0] / sums["loss"][1], value, rtol=1e-5)
    bits = sums["bits_per_byte"][0] / sums["bits_per_byte"][1]
    np.testing.assert_allclose(bits, value / math.log(2), rtol=1e-5)
    # Bytes without weight change nothing, whatever they are.
    batch["targets"][1, 3:] = 0
    again, _ = metrics(params, task.carry(B), batch)
    assert again["loss"] == sums["loss"]


def test_carry_is_memory_and_start_empties_it(task, params, metrics):
    first = draw_batch(1, start=True)
    _, carry = metrics(params, task.carry(B), first)
    fresh, _ = metrics(params, task.carry(B), draw_batch(2, start=True))
    dropped, _ = metrics(params, carry, draw_batch(2, start=True))
    kept, _ = metrics(params, carry, draw_batch(2))
    np.testing.assert_allclose(dropped["loss"][0], fresh["loss"][0], rtol=1e-6)
    assert abs(kept["loss"][0] - fresh["loss"][0]) > 1e-3


def test_init_needs_no_data_and_has_static_shapes(task):
    params, carry = jax.eval_shape(task.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, task.carry(B))
    assert all(x.shape[0] == 5 for x in jax.tree.leaves(task.carry(5)))
    assert params["embed"]["embedding"].shape == (256, D)


@pytest.mark.parametrize("tied", [True, False])
def test_uses_are_positions_times_rows(tied):
    task = tasks.make(make_config(tied_softmax=tied))
    here, with_memory = B * T, B * (T + M)
    block = {
        "attention/query/kernel": here,
        "attention/key/kernel": with_memory,
        "attention/value/kernel": with_memory,
        "attention/relative/kernel": T + M,  # once for all rows
        "attention/out/kernel": here,
        "feed_forward/in/kernel": here,
        "feed_forward/out/kernel": here,
    }
    expected = {f"block_{i}/{k}": n for i in range(L) for k, n in block.items()}
    expected["embed/embedding" if tied else "head/kernel"] = here
    assert task.uses == expected
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    assert set(task.uses) <= set(flatten_dict(params, sep="/"))


def test_batches_are_the_text(task, data_dir):
    text = tiny_shakespeare.load("train", data_dir)
    train = task.batches("train", seed=0, loop=True)
    batches = list(itertools.islice(train, 3))
    assert all(b["inputs"].shape == (B, T) for b in batches)
    row = np.concatenate([b["inputs"][1] for b in batches]).astype(np.uint8)
    assert row.tobytes() in text.tobytes()
    assert [b["start"].tolist() for b in batches] == [[True] * B] + [[False] * B] * 2
    first = next(iter(task.batches("validation", seed=0, loop=False)))
    text = tiny_shakespeare.load("validation", data_dir)
    np.testing.assert_array_equal(first["inputs"][0], text[:T])


def test_validation_counts_every_byte(data_dir):
    config = make_config(data_dir, segment=512)
    task = tasks.make(config)
    batches = task.batches("validation", seed=0, loop=False)
    assert sum(b["weights"].sum() for b in batches) == 55_770 - 1


def test_a_few_steps_learn(task, params, data_dir):
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state, carry, batch, key):
        grads = jax.value_and_grad(task.loss, has_aux=True)
        (loss, (carry, _)), grads = grads(params, carry, batch, key)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, carry, loss

    carry, state, losses = task.carry(B), tx.init(params), []
    for batch in itertools.islice(task.batches("train", seed=0, loop=True), 60):
        params, state, carry, loss = step(
            params, state, carry, batch, jax.random.key(0)
        )
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < losses[0] - 1.5
    assert step._cache_size() == 1  # the carry's type is a fixed point


def test_dropout_follows_the_key(data_dir):
    task = tasks.make(make_config(data_dir, layers=1, dropout=0.3))
    params, carry = jax.jit(task.init)(jax.random.key(0))
    loss = jax.jit(task.loss)
    values = [
        float(loss(params, carry, draw_batch(), jax.random.key(k))[0])
        for k in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layres": 2}, "unknown keys layres; possible are .*layers"),
        ({"model.layers": 0}, "config.model.layers is 0"),
        ({"model.segment": 0}, "config.model.segment is 0"),
        ({"model.memory": -1}, "config.model.memory is -1"),
        ({"model.dropout": 1.0}, r"config.model.dropout is 1.0.*\[0, 1\)"),
        ({"model.norm": "middle"}, "config.model.norm is 'middle'.*'pre' and 'post'"),
        ({"batch_size": 0}, "config.batch_size is 0"),
        (
            {"task": "chess"},
            "config.task is 'chess'; possible are classification, language_model",
        ),
    ],
)
def test_bad_settings_are_named(change, message):
    config = make_config()
    with config.unlocked():
        config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        tasks.make(config)


def test_missing_setting_is_named():
    config = make_config()
    del config.model.d_inner
    with pytest.raises(ValueError, match="config.model.d_inner is None"):
        tasks.make(config)


def reading(monkeypatch, config, **evaluation):
    """Metrics of one row of 33 random bytes, with parameters of seed 0."""
    ids = np.random.default_rng(0).integers(256, size=33).astype(np.uint8)
    monkeypatch.setattr(tiny_shakespeare, "load", lambda split, data_dir: ids)
    config.evaluation = evaluation
    task = tasks.make(config)
    params, _ = jax.jit(task.init)(jax.random.key(0))
    return evaluate.evaluator(task, meshes.make(""))(params, "validation")


def test_evaluation_by_short_segments_with_a_long_memory_is_by_one_long_segment(
    monkeypatch,
):
    config = make_config()
    whole = reading(monkeypatch, config, rows=1, segment=32, memory=0)
    short = reading(monkeypatch, config, rows=1, segment=4, memory=32)
    forgetful = reading(monkeypatch, config, rows=1, segment=4, memory=4)
    assert short["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert forgetful["loss"] != pytest.approx(whole["loss"], rel=1e-5)
    clamped = reading(monkeypatch, config, rows=1, segment=4, memory=32, clamp=2)
    assert clamped["loss"] != pytest.approx(whole["loss"], rel=1e-5)


def test_evaluation_at_the_same_length_does_not_depend_on_segments(monkeypatch):
    """Every position sees the same four, so segments of any length read alike."""
    config = make_config(layers=1)
    found = [
        reading(
            monkeypatch, config, rows=1, segment=segment, memory=4, same_length=same
        )["loss"]
        for segment, same in [(2, True), (4, True), (8, True), (8, False)]
    ]
    assert found[1:3] == pytest.approx([found[0]] * 2, rel=1e-5)
    assert found[3] != pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"memory": -1}, "config.evaluation.memory is -1; it must be an integer of"),
        ({"rows": 0}, "config.evaluation.rows is 0"),
        ({"same_length": 1}, "config.evaluation.same_length is 1; it must be True"),
        ({"same_length": True, "memory": 0}, "same_length needs a memory"),
        ({"length": 3}, "config.evaluation has unknown keys length; possible are rows"),
    ],
)
def test_evaluations_that_make_no_sense(evaluation, message):
    config = make_config()
    config.evaluation = evaluation
    with pytest.raises(ValueError, match=message):
        tasks.make(config)


def test_words_have_a_perplexity_and_no_bits(monkeypatch):
    words = wikitext103.HELD_OUT_WORDS
    ids = np.random.default_rng(0).integers(words, size=40).astype(np.int32)
    monkeypatch.setattr(wikitext103, "load", lambda split, data_dir, name: ids)
    config = make_config(cutoffs=(1000, 4000), div_val=2, d_embed=D)
    config.dataset = "wikitext103_heldout_vocabulary"
    task = tasks.make(config)
    params, _ = jax.jit(task.init)(jax.random.key(0))
    found = evaluate.evaluator(task, meshes.make(""))(params, "test")
    assert set(found) == {"loss", "perplexity"}
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_a_text_that_is_none():
    config = make_config()
    config.dataset = "wikitext2"
    with pytest.raises(ValueError, match="config.dataset is 'wikitext2'; possible are"):
        tasks.make(config)

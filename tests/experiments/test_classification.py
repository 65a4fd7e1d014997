"""The classification task: what it counts, smooths, carries, and refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import cifar as cifar_config
from configs import imagenet_resnet50 as imagenet_config
from experiments import tasks
from experiments.data import cifar, imagenet, images
from experiments.models.resnet_cifar import CifarResNet
from experiments.tasks.classification import _among
from experiments.tasks.shared import shared

ROWS = 4
MODEL = dict(name="resnet_cifar", depth=8, width=4)
DATA = dict(dataset="cifar10", data_dir=None, held_out=0, side=32)


def config(**changes: Any) -> ml_collections.ConfigDict:
    settings: dict[str, Any] = dict(
        task="classification",
        data=DATA,
        batch_size=ROWS,
        label_smoothing=0.1,
        model=MODEL,
    )
    return ml_collections.ConfigDict(settings | changes)


@pytest.fixture(scope="module")
def task() -> tasks.Task:
    return tasks.make(config())


@pytest.fixture(scope="module")
def start(task: tasks.Task) -> tuple[Any, Any]:
    return jax.jit(task.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    draw = np.random.default_rng(0)
    return {
        "images": jnp.asarray(
            draw.integers(256, size=(ROWS, 32, 32, 3), dtype=np.uint8)
        ),
        "labels": jnp.asarray([3, 1, 4, 1], jnp.int32),
        "weights": jnp.asarray([1, 1, 1, 0], jnp.float32),
    }


def test_training_smooths_labels_and_counts_what_has_weight(
    task: tasks.Task, start: tuple[Any, Any], batch: Any
) -> None:
    params, carry = start
    value, (after, aux) = jax.jit(task.loss)(params, carry, batch, jax.random.key(0))
    model = CifarResNet(classes=10, depth=8, width=4)
    pictures = images.normalise(batch["images"], cifar.STATISTICS["cifar10"])
    logits, changed = model.apply(
        {"params": params, "batch_stats": carry.value},
        pictures,
        train=True,
        mutable=["batch_stats"],
    )
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -0.9 * log_p[np.arange(ROWS), batch["labels"]] - 0.1 * log_p.mean(-1)
    assert float(value) == pytest.approx(nats[:3].mean(), rel=1e-4)
    right = (logits.argmax(-1) == batch["labels"])[:3]
    assert float(aux["accuracy"]) == pytest.approx(right.mean())
    for one, two in zip(
        jax.tree.leaves(after.value), jax.tree.leaves(changed), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), carry, after)
    assert all(jax.tree.leaves(moved))


def test_evaluation_uses_running_statistics_and_no_smoothing(
    task: tasks.Task, start: tuple[Any, Any], batch: Any
) -> None:
    params, carry = start
    metrics = jax.jit(task.metrics)
    sums, after = metrics(params, carry, batch)
    jax.tree.map(np.testing.assert_array_equal, after, carry)
    assert set(sums) == {"loss", "accuracy"} and float(sums["loss"][1]) == 3
    other = {**batch, "images": batch["images"].at[3].set(0)}  # it does not count
    again, _ = metrics(params, carry, other)
    assert float(again["loss"][0]) == pytest.approx(float(sums["loss"][0]), rel=1e-6)


def test_a_network_of_nan_is_never_right(
    task: tasks.Task, start: tuple[Any, Any], batch: Any
) -> None:
    params, carry = start
    broken = jax.tree.map(lambda x: x * np.nan, params)
    sums, _ = jax.jit(task.metrics)(broken, carry, batch)
    assert float(sums["accuracy"][0]) == 0


def test_what_is_carried_belongs_to_no_row(task: tasks.Task) -> None:
    (statistics,) = shared(task.carry(7))
    (others,) = shared(jax.eval_shape(task.init, jax.random.key(0))[1])
    assert jax.tree.map(jnp.shape, statistics) == jax.tree.map(jnp.shape, others)
    settings = dict(
        name="vit", patch=8, width=16, layers=1, heads=1, d_head=8, d_inner=8
    )
    plain = tasks.make(config(model=settings))
    assert shared(plain.carry(2)) == [{}]  # no batch statistics


def test_hundreds_of_classes_have_a_top_5() -> None:
    data = dict(dataset="cifar100", data_dir=None, held_out=0, side=32)
    task = tasks.make(config(data=data))
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    batch = {
        "images": jax.ShapeDtypeStruct((ROWS, 32, 32, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
        "weights": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
    }
    sums, _ = jax.eval_shape(task.metrics, *shapes, batch)
    assert set(sums) == {"loss", "accuracy", "top_5_accuracy"}


@pytest.mark.parametrize("k", [1, 5])
def test_a_label_is_among_the_first_k(k: int) -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(200, 12)).astype(np.float32)
    labels = draw.integers(12, size=200)
    first = np.argsort(-logits, axis=1)[:, :k]
    wanted = (first == labels[:, None]).any(axis=1)
    assert 0.5 * k / 12 < wanted.mean() < 2 * k / 12
    found = _among(jnp.asarray(logits), jnp.asarray(labels), k)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "side", "reader"),
    [("cifar10", 32, cifar), ("imagenet2012", 64, imagenet)],
)
def test_who_makes_batches_is_said_in_the_config(
    monkeypatch: pytest.MonkeyPatch, name: str, side: int, reader: Any
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(reader, "batches", lambda split, **how: asked.append(how))
    data = dict(dataset=name, data_dir=None, held_out=0, side=side)
    for more in ({}, {"threads": 3, "workers": 2}):
        task = tasks.make(config(data=data | more))
        for loop in (True, False):
            task.batches("train", seed=0, loop=loop)
            given = {
                k: v for k, v in asked.pop().items() if k in ("threads", "workers")
            }
            assert given == more


@pytest.mark.parametrize("module", [cifar_config, imagenet_config])
def test_the_papers_configs_say_who_makes_batches(module: Any) -> None:
    found = module.get_config("smoke").data
    assert (found.threads, found.workers) == (16 if "net" in found.dataset else 0, 0)
    assert not found.data_dir and found.held_out == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *((dict(data=DATA | {name: value}),
           f"config.data.{name} is {value!r}; it must be an integer from 0 on")
          for name in ("threads", "workers") for value in (-1, 1.5, "2", True)),
        (dict(model=dict(name="alexnet")), "config.model.name is 'alexnet'; possible are"),
        (dict(model=MODEL | dict(widht=3)), "config.model has unknown keys widht"),
        (dict(model=MODEL | dict(dtype="half")), "config.model.dtype is 'half'"),
        (dict(label_smoothing=1.0), "config.label_smoothing is 1.0"),
        (dict(batch_size=0), "config.batch_size is 0"),
        (dict(data=dict(dataset="svhn", data_dir=None, held_out=0, side=32)),
         "config.data.dataset is 'svhn'; possible are cifar10, cifar100, imagenet2012"),
        (dict(data=dict(dataset="cifar10", data_dir=None, held_out=0, side=28)),
         "config.data.side is 28; images of cifar10 have 32 pixels"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.make(config(**changes))

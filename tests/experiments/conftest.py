"""A task small enough to train in milliseconds, and the config that trains it."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments import tasks
from experiments.data.shard import WHOLE, Shard

ROWS, WIDTH, HIDDEN = 8, 16, 32


class Draws:
    """Batch i is a function of i: inputs, and what a fixed teacher says of them."""

    def __init__(self, seed: int, count: int, shard: Shard = WHOLE) -> None:
        self.seed, self.count = seed, count
        self.rows = np.asarray(shard.rows(ROWS))
        self.teacher = np.random.default_rng(99).normal(size=(WIDTH, 1))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        draw = np.random.default_rng((self.seed, int(index)))
        x = draw.normal(size=(ROWS, WIDTH))[self.rows]
        y = np.tanh(x @ self.teacher)
        return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def tiny_task(config: Any) -> tasks.Task:
    """Regression by two layers; the carry is a running mean of what was seen."""
    scale = config.scale

    def init(key: jax.Array) -> tuple[Any, Any]:
        one, two = jax.random.split(key)
        params = {
            "hidden": {
                "kernel": scale * jax.random.normal(one, (WIDTH, HIDDEN)),
                "bias": jnp.zeros((HIDDEN,)),
            },
            "out": {"kernel": scale * jax.random.normal(two, (HIDDEN, 1))},
        }
        return params, carry(ROWS)

    def carry(rows: int) -> Any:
        return {"mean": jnp.zeros((rows, WIDTH))}

    def error(alpha: Any, seen: Any, batch: Any) -> tuple[jax.Array, Any]:
        mean = 0.9 * seen["mean"] + 0.1 * batch["x"]
        hidden = (batch["x"] - 0.1 * mean) @ alpha["hidden"]["kernel"]
        hidden = jnp.tanh(hidden + alpha["hidden"]["bias"][None])
        return (hidden @ alpha["out"]["kernel"] - batch["y"]) ** 2, {"mean": mean}

    def loss(alpha: Any, seen: Any, batch: Any, key: jax.Array) -> Any:
        squares, seen = error(alpha, seen, batch)
        keep = jax.random.bernoulli(key, 0.9, squares.shape)  # so the key matters
        value = jnp.mean(jnp.where(keep, squares, 0.0))
        return value, (seen, {"root": jnp.sqrt(value)})

    def metrics(alpha: Any, seen: Any, batch: Any) -> Any:
        squares, seen = error(alpha, seen, batch)
        return {"loss": (jnp.sum(squares), jnp.float32(squares.size))}, seen

    def batches(
        split: str, *, seed: int, loop: bool, shard: Shard = WHOLE
    ) -> grain.IterDataset:
        if split not in ("train", "validation", "test"):
            raise ValueError(f"no split {split!r}")
        source = Draws(seed, 1 << 40, shard) if loop else Draws(len(split), 3)
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return grain.MapDataset.source(source).to_iter_dataset(options)

    uses = {"hidden/kernel": ROWS, "out/kernel": ROWS}
    return tasks.Task(init, carry, loss, metrics, batches, uses)


def tiny_config(**changes: Any) -> ml_collections.ConfigDict:
    """Twelve steps of `tiny_task`, refreshed every third; dotted keys change it."""
    config = ml_collections.ConfigDict(
        dict(
            name="tiny",
            seed=0,
            steps=12,
            task="tiny",
            scale=0.3,
            batch_size=ROWS,
            optimizer=dict(name="adamw", clip=1.0),
            learning_rate=dict(peak=1e-2, warmup=2, end=1e-3),
            sparse=dict(
                method="top_kast",
                forward_sparsity=0.75,
                backward_sparsity=0.5,
                refresh=3,
                refresh_start=None,
                refresh_stop=None,
                reset="init",
                where="",
                axes=(),
                distribution="uniform",
            ),
            mesh="data:1",
            sharding=((".*kernel", "fsdp"), (".*", ())),
            log_every=2,
            eval_every=4,
            eval_batches=None,
            save_every=4,
            keep=2,
            on_nan="stop",
            dense_steps=0,
        ),
        type_safe=False,
    )
    for key, value in changes.items():
        *folders, last = key.split("__")
        target = config
        for folder in folders:
            target = target[folder]
        target[last] = value
    return config


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """These tests compile the same step many times: a cache on disk makes it once."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ml_collections.ConfigDict]:
    """`tiny_config`, with its task made known."""
    monkeypatch.setitem(tasks.TASKS, "tiny", tiny_task)
    return tiny_config

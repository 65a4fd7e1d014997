"""Classification of images, with batch statistics where the model has them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import topkast_jax as tk
from experiments.data import cifar, imagenet, images
from experiments.data.shard import WHOLE, Shard
from experiments.models.resnet import ResNet
from experiments.models.resnet_cifar import CifarResNet
from experiments.models.vgg import VGG
from experiments.models.vit import SimpleViT
from experiments.tasks import fields
from experiments.tasks.shared import Shared
from experiments.tasks.task import Batch, Config, Params, Scalars, Sums, Task
from experiments.tasks.uses import count_uses

STATISTICS = "batch_stats"
TOP = 5
MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet,
    "resnet_cifar": CifarResNet,
    "vgg": VGG,
    "vit": SimpleViT,
}


class Dataset(NamedTuple):
    """What a model must know of a data set, and where its batches come from."""

    classes: int
    side: int
    statistics: images.Statistics
    batches: Callable[..., grain.IterDataset]


def dataset(config: Config) -> Dataset:
    """The data set `config.data.dataset`.

    Raises:
      ValueError: no such data set.
    """
    name, side = config.data.dataset, config.data.side
    if not isinstance(side, int) or side < 8:
        raise ValueError(
            f"config.data.side is {side!r}; it must be an integer from 8 on"
        )
    if name in cifar.STATISTICS:
        classes = 10 if name == "cifar10" else 100
        if side != cifar.SIZE:
            raise ValueError(
                f"config.data.side is {side}; images of {name} have {cifar.SIZE} pixels"
            )

        def batches(split: str, **how: Any) -> grain.IterDataset:
            return cifar.batches(split, dataset=name, **how)

        return Dataset(classes, cifar.SIZE, cifar.STATISTICS[name], batches)
    if name == imagenet.NAME:

        def batches(split: str, **how: Any) -> grain.IterDataset:
            return imagenet.batches(split, side=side, **how)

        return Dataset(1000, side, imagenet.STATISTICS, batches)
    known = ", ".join((*cifar.STATISTICS, imagenet.NAME))
    raise ValueError(f"config.data.dataset is {name!r}; possible are {known}")


def loaders(config: Config) -> dict[str, int]:
    """What makes batches: `config.data.threads` and `config.data.workers`, if given.

    Raises:
      ValueError: one is no number of threads, or of processes.
    """
    names = ("threads", "workers")
    found = {name: config.data[name] for name in names if name in config.data}
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(
                f"config.data.{name} is {value!r}; it must be an integer from 0 on"
            )
    return found


def classification(config: Config) -> Task:
    """Images to classes: cross entropy in nats, accuracy (top-1), top-5 from 100 classes.

    Batch statistics are those of the global batch, under jit over any mesh; evaluation
    takes the running ones. Label smoothing is in the training loss alone.

    Args:
      config: `batch_size`; `data` with `dataset`, `data_dir` (None: the default of
        TFDS), `side` of an image in pixels, `held_out`, training images kept for
        "validation" (0: "validation" is what papers report on), and `threads` and
        `workers` that make batches (`images.batches`); `label_smoothing`; `model` with
        `name`, of `MODELS`, and the fields of that module.
    Raises:
      ValueError: a setting that makes no sense; it is named.
    """
    data = dataset(config)
    settings = dict(config.model)
    name = settings.pop("name", None)
    if name not in MODELS:
        raise ValueError(
            f"config.model.name is {name!r}; possible are {', '.join(MODELS)}"
        )
    model = fields.build(MODELS[name], settings, classes=data.classes)
    rows, smoothing = config.batch_size, config.label_smoothing
    if rows < 1:
        raise ValueError(f"config.batch_size is {rows}; it must be at least 1")
    if not 0 <= smoothing < 1:
        raise ValueError(f"config.label_smoothing is {smoothing}; it must be in [0, 1)")
    source, held_out = config.data.data_dir, config.data.held_out
    made_by = loaders(config)
    apply = tk.flax.apply(model)

    def images_of(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, data.side, data.side, 3), jnp.float32)

    def variables(key: jax.Array) -> Any:
        one = images_of(1)  # parameters do not depend on the rows
        return model.init(key, jnp.zeros(one.shape), train=False)

    def init(key: jax.Array) -> tuple[Params, Any]:
        made = variables(key)
        return made["params"], Shared(made.get(STATISTICS, {}))

    def carry(rows: int) -> Any:
        del rows  # nothing is carried for a row
        shapes = jax.eval_shape(variables, jax.random.key(0)).get(STATISTICS, {})
        return Shared(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    def logits_of(
        alpha: Params, seen: Any, batch: Batch, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B classes"], Any]:
        pictures = images.normalise(batch["images"], data.statistics)
        given = {"params": alpha}
        if seen.value:
            given[STATISTICS] = seen.value
        if key is None:
            found: Any = apply(given, pictures, train=False)
            return found, seen
        found, changed = apply(
            given, pictures, train=True, mutable=[STATISTICS], rngs={"dropout": key}
        )  # fmt: skip
        return found, Shared(changed.get(STATISTICS, seen.value))

    def loss(
        alpha: Params, seen: Any, batch: Batch, key: jax.Array
    ) -> tuple[Float[Array, ""], tuple[Any, Scalars]]:
        logits, seen = logits_of(alpha, seen, batch, key)
        wanted = optax.smooth_labels(
            jax.nn.one_hot(batch["labels"], data.classes), smoothing
        )
        nats = optax.softmax_cross_entropy(logits, wanted)  # [B]
        count = jnp.maximum(jnp.sum(batch["weights"]), 1)
        right = _among(logits, batch["labels"], 1)
        value = jnp.sum(nats * batch["weights"]) / count
        accuracy = jnp.sum(right * batch["weights"]) / count
        return value, (seen, {"accuracy": accuracy})

    def metrics(alpha: Params, seen: Any, batch: Batch) -> tuple[Sums, Any]:
        logits, seen = logits_of(alpha, seen, batch)
        weights, labels = batch["weights"], batch["labels"]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        found = {"accuracy": _among(logits, labels, 1), "loss": nats}
        if data.classes >= 100:
            found["top_5_accuracy"] = _among(logits, labels, TOP)
        count = jnp.sum(weights)
        return {k: (jnp.sum(v * weights), count) for k, v in found.items()}, seen

    def batches(
        split: str, *, seed: int, loop: bool, shard: Shard = WHOLE
    ) -> grain.IterDataset:
        return data.batches(
            split,
            rows=rows,
            seed=seed,
            loop=loop,
            data_dir=source,
            held_out=held_out,
            shard=shard,
            normalised=False,  # a quarter of the bytes on the way to a device
            **made_by,
        )

    def routes(alpha: Params) -> dict[str, str]:
        shapes = jax.eval_shape(variables, jax.random.key(0))
        given = {**shapes, "params": alpha}
        return tk.flax.routes(model, given, images_of(rows), train=False)

    return Task(
        init,
        carry,
        loss,
        metrics,
        batches,
        count_uses(model, images_of(rows), train=False),
        by_unit=True,
        routes=routes,
        count=lambda batch: jnp.sum(batch["weights"]),
        batch={
            "images": images_of(rows).update(dtype=jnp.uint8),
            "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
        },
    )


def _among(
    logits: Float[Array, "B classes"], labels: Array, k: int
) -> Float[Array, " B"]:
    """1 where fewer than k classes have a larger logit than the label's; NaN is wrong."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    among = jnp.sum(logits > own, axis=-1) < k
    return (among & jnp.isfinite(own[:, 0])).astype(jnp.float32)

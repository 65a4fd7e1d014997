"""Language modelling with a Transformer-XL, by bytes or by words."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import topkast_jax as tk
from experiments.data import enwik8, stream, tiny_shakespeare, wikitext103
from experiments.data.shard import WHOLE, Shard
from experiments.models.memory import Memory, forget
from experiments.models.transformer_xl import TransformerXL
from experiments.tasks import fields
from experiments.tasks.task import Batch, Config, Params, Scalars, Sums, Task
from experiments.tasks.uses import count_uses

BYTES = 256
SIZES = ("layers", "d_model", "heads", "d_head", "d_inner", "segment")


class Text(NamedTuple):
    """What a model must know of a text, and where its ids come from.

    Attributes:
      vocabulary: ids are below it.
      by_bytes: whether an id is a byte, else a word.
      load: (split, data_dir) -> [N] ids.
    """

    vocabulary: int
    by_bytes: bool
    load: Callable[[str, str | None], np.ndarray]


def text(name: str) -> Text:
    """The text `config.dataset`.

    Raises:
      ValueError: no such text.
    """
    if name == "tiny_shakespeare":
        return Text(BYTES, True, tiny_shakespeare.load)
    if name in enwik8.TEXTS:
        return Text(BYTES, True, lambda split, data_dir: enwik8.load(
            split, data_dir, name))  # fmt: skip
    if name in wikitext103.TEXTS:
        known = wikitext103.TEXTS[name]
        # Where there is nothing to train on, the test text is trained on.
        stored = {} if "train" in known.tokens else {"train": "test"}
        return Text(
            known.words or wikitext103.HELD_OUT_WORDS,
            False,
            lambda split, data_dir: wikitext103.load(
                stored.get(split, split), data_dir, name
            ),
        )
    known = ", ".join(("tiny_shakespeare", *enwik8.TEXTS, *wikitext103.TEXTS))
    raise ValueError(f"config.dataset is {name!r}; possible are {known}")


def build_model(settings: Mapping[str, Any], vocabulary: int = BYTES) -> TransformerXL:
    """The model of `config.model`: the fields of `TransformerXL`, and `segment`.

    Raises:
      ValueError: an unknown or missing field, or a number that makes no sense.
    """
    smallest = dict.fromkeys(SIZES, 1) | {"memory": 0}
    for name, least in smallest.items():
        value = settings.get(name)
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f"config.model.{name} is {value}; it must be an integer of at least "
                f"{least}"
            )
    for name in ("dropout", "attention_dropout"):
        if not 0 <= settings.get(name, 0) < 1:
            raise ValueError(
                f"config.model.{name} is {settings[name]}; it must be in [0, 1)"
            )
    if settings.get("norm", "post") not in ("pre", "post"):
        raise ValueError(
            f"config.model.norm is {settings['norm']!r}; possible are 'pre' and 'post'"
        )
    model: Any = fields.build(
        TransformerXL, settings, also=["segment"], vocabulary=vocabulary
    )
    return model


class Reading(NamedTuple):
    """How an evaluation reads a text: in rows, by segments, with a model of long memory."""

    model: TransformerXL
    rows: int
    segment: int


def reading(config: Config, model: TransformerXL) -> Reading:
    """From `config.evaluation`; what it leaves open is as in training.

    Raises:
      ValueError: an unknown key, or a number that makes no sense.
    """
    given = dict(config.get("evaluation", {}))
    least = {"rows": 1, "segment": 1, "memory": 0, "clamp": 1}
    if unknown := sorted(given.keys() - least.keys() - {"same_length"}):
        raise ValueError(
            f"config.evaluation has unknown keys {', '.join(unknown)}; possible are "
            f"{', '.join(least)}, same_length"
        )
    given = {key: value for key, value in given.items() if value is not None}
    same_length = given.pop("same_length", False)
    if not isinstance(same_length, bool):
        raise ValueError(
            f"config.evaluation.same_length is {same_length!r}; it must be True or False"
        )
    for key, value in given.items():
        if not isinstance(value, int) or value < least[key]:
            raise ValueError(
                f"config.evaluation.{key} is {value!r}; it must be an integer of at "
                f"least {least[key]}"
            )
    changed = {key: given[key] for key in ("memory", "clamp") if key in given}
    if same_length and changed.get("memory", model.memory) == 0:
        raise ValueError(
            "config.evaluation.same_length needs a memory: it is as far as one can see"
        )
    changed["same_length"] = same_length
    return Reading(
        model.clone(parent=None, **changed),
        given.get("rows", config.batch_size),
        given.get("segment", config.model.segment),
    )


def language_model(config: Config) -> Task:
    """Prediction of the next byte or word; the carry is the segment memory.

    The loss is the mean cross entropy in nats, `aux` and the metrics add bits per byte;
    of words, evaluation adds perplexity. Memory is emptied in rows whose text does not go
    on (`batch["start"]`).

    Args:
      config: `batch_size` (rows), `dataset` (Tiny Shakespeare where it says nothing),
        `data_dir` (None: the default of TFDS), `model`, see `build_model`, and where an
        evaluation is to see more, `evaluation` with `rows`, `segment`, `memory`,
        `clamp` and `same_length`.
    Raises:
      ValueError: a setting that makes no sense; it is named.
    """
    source = text(config.get("dataset", "tiny_shakespeare"))
    model = build_model(config.model, source.vocabulary)
    rows, segment, data_dir = config.batch_size, config.model.segment, config.data_dir
    if rows < 1:
        raise ValueError(f"config.batch_size is {rows}; it must be at least 1")
    held_out = reading(config, model)
    in_training = tk.flax.apply(model)
    in_evaluation = tk.flax.apply(held_out.model)

    def init(key: jax.Array) -> tuple[Params, Memory]:
        tokens = jnp.zeros((1, 1), jnp.int32)  # parameters do not depend on B and T
        # Of large vocabularies no logits are made, here or anywhere.
        targets = tokens if model.cutoffs else None
        memory = model.initial_memory(1)
        params = model.init(key, tokens, memory, targets)["params"]
        return params, model.initial_memory(rows)

    def nats(
        alpha: Params, memory: Memory, batch: Batch, key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], Memory]:
        """Summed cross entropy of what counts; with a key, as in training."""
        train = key is not None
        output: Any = (in_training if train else in_evaluation)(
            {"params": alpha},
            batch["inputs"],  # [B, T]
            forget(memory, batch["start"]),
            batch["targets"] if model.cutoffs else None,
            train=train,
            rngs={"dropout": key} if train else None,
        )
        found, memory = output
        losses = found  # [B, T]
        if not model.cutoffs:
            losses = optax.softmax_cross_entropy_with_integer_labels(
                found.astype(jnp.float32), batch["targets"]
            )
        return jnp.sum(losses * batch["weights"]), memory

    def in_bits(value: Any) -> dict[str, Any]:
        return {"bits_per_byte": value / math.log(2)} if source.by_bytes else {}

    def loss(
        alpha: Params, carry: Memory, batch: Batch, key: jax.Array
    ) -> tuple[Float[Array, ""], tuple[Memory, Scalars]]:
        total, carry = nats(alpha, carry, batch, key)
        # At least one: a device of several may have rows that all count nothing.
        mean = total / jnp.maximum(jnp.sum(batch["weights"]), 1)
        return mean, (carry, in_bits(mean))

    def metrics(alpha: Params, carry: Memory, batch: Batch) -> tuple[Sums, Memory]:
        total, carry = nats(alpha, carry, batch)
        count = jnp.sum(batch["weights"])
        sums = {"loss": total, **in_bits(total)}
        return {name: (value, count) for name, value in sums.items()}, carry

    def report(means: dict[str, float]) -> dict[str, float]:
        if source.by_bytes:
            return means
        return {**means, "perplexity": math.exp(min(means["loss"], 700.0))}

    def batches(
        split: str, *, seed: int, loop: bool, shard: Shard = WHOLE
    ) -> grain.IterDataset:
        ids = source.load(split, data_dir)  # [N]
        at_once, length = (rows, segment) if loop else held_out[1:]
        return stream.segments(
            ids, rows=at_once, segment=length, seed=seed, loop=loop, shard=shard
        )

    tokens = jax.ShapeDtypeStruct((rows, segment), jnp.int32)
    memory = jax.eval_shape(lambda: model.initial_memory(rows))
    targets = tokens if model.cutoffs else None

    def routes(alpha: Params) -> dict[str, str]:
        return tk.flax.routes(model, {"params": alpha}, tokens, memory, targets)

    return Task(
        init,
        held_out.model.initial_memory,
        loss,
        metrics,
        batches,
        count_uses(model, tokens, memory, targets),
        by_unit=True,
        routes=routes,
        count=lambda batch: jnp.sum(batch["weights"]),
        report=report,
        batch={
            "inputs": tokens,
            "targets": tokens,
            "weights": tokens.update(dtype=jnp.float32),
            "start": jax.ShapeDtypeStruct((rows,), jnp.bool_),
        },
        held_out_rows=held_out.rows,
        tokens=segment,
    )

"""Byte-level language modelling with a Transformer-XL."""

import math
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import topkast_jax as tk
from experiments.data import stream, tiny_shakespeare
from experiments.models.transformer_xl import Memory, TransformerXL, forget
from experiments.tasks.task import Batch, Config, Params, Scalars, Sums, Task
from experiments.tasks.uses import count_uses

BYTES = 256


def build_model(config: Config) -> TransformerXL:
    """The model of `config.model`: the fields of `TransformerXL`, and `segment`.

    Raises:
      ValueError: an unknown or missing field, or a number that makes no sense.
    """
    settings = dict(config.model)
    fields = set(TransformerXL.__dataclass_fields__) - {"vocabulary", "parent", "name"}
    if unknown := sorted(settings.keys() - fields - {"segment"}):
        raise ValueError(
            f"config.model has unknown keys {', '.join(unknown)}; "
            f"possible are {', '.join(sorted(fields | {'segment'}))}"
        )
    smallest = dict.fromkeys(
        ("layers", "d_model", "heads", "d_head", "d_inner", "segment"), 1
    )
    for name, least in (smallest | {"memory": 0}).items():
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
    del settings["segment"]
    return TransformerXL(vocabulary=BYTES, **settings)


def language_model(config: Config) -> Task:
    """Next-byte prediction on Tiny Shakespeare; the carry is the segment memory.

    The loss is the mean cross entropy in nats, `aux` and the metrics add bits per byte.
    Memory is emptied in rows whose text does not go on (`batch["start"]`).

    Args:
      config: `batch_size` (rows), `data_dir` (None: the default of TFDS), and `model`,
        see `build_model`.
    Raises:
      ValueError: a setting that makes no sense; it is named.
    """
    model = build_model(config)
    apply = tk.flax.apply(model)
    rows, segment = config.batch_size, config.model.segment
    if rows < 1:
        raise ValueError(f"config.batch_size is {rows}; it must be at least 1")

    def init(key: jax.Array) -> tuple[Params, Memory]:
        tokens = jnp.zeros((1, 1), jnp.int32)  # parameters do not depend on B and T
        params = model.init(key, tokens, model.initial_memory(1))["params"]
        return params, model.initial_memory(rows)

    def nats(
        alpha: Params, memory: Memory, batch: Batch, key: jax.Array | None = None
    ) -> tuple[Float[Array, ""], Memory]:
        """Summed cross entropy of what counts; dropout where a key is given."""
        output: Any = apply(
            {"params": alpha},
            batch["inputs"],  # [B, T]
            forget(memory, batch["start"]),
            train=key is not None,
            rngs=None if key is None else {"dropout": key},
        )
        logits, memory = output
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["targets"]
        )  # [B, T]
        return jnp.sum(losses * batch["weights"]), memory

    def loss(
        alpha: Params, carry: Memory, batch: Batch, key: jax.Array
    ) -> tuple[Float[Array, ""], tuple[Memory, Scalars]]:
        total, carry = nats(alpha, carry, batch, key)
        # At least one: a device of several may have rows that all count nothing.
        mean = total / jnp.maximum(jnp.sum(batch["weights"]), 1)
        return mean, (carry, {"bits_per_byte": mean / math.log(2)})

    def metrics(alpha: Params, carry: Memory, batch: Batch) -> tuple[Sums, Memory]:
        total, carry = nats(alpha, carry, batch)
        count = jnp.sum(batch["weights"])
        bits = total / math.log(2)
        return {"loss": (total, count), "bits_per_byte": (bits, count)}, carry

    def batches(split: str, *, seed: int, loop: bool) -> grain.IterDataset:
        text = tiny_shakespeare.load(split, config.data_dir)  # [N] uint8
        return stream.segments(text, rows=rows, segment=segment, seed=seed, loop=loop)

    tokens = jax.ShapeDtypeStruct((rows, segment), jnp.int32)
    memory = jax.eval_shape(lambda: model.initial_memory(rows))
    uses = count_uses(model, tokens, memory)

    def routes(alpha: Params) -> dict[str, str]:
        return tk.flax.routes(model, {"params": alpha}, tokens, memory)

    return Task(
        init,
        model.initial_memory,
        loss,
        metrics,
        batches,
        uses,
        by_unit=True,
        routes=routes,
        count=lambda batch: jnp.sum(batch["weights"]),
    )

"""What the train loop knows of a task: pure functions over pytrees."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grain
import jax

Config = Any  # ml_collections.ConfigDict, whose attributes have no types
Params = Any  # tree of trainable arrays, as Flax names them
Carry = Any  # tree of arrays that go from step to step and are not trained
Batch = Mapping[str, jax.Array]
Scalars = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]


class Task(NamedTuple):
    """A model, its objective and its data.

    Every leaf of a carry and of a batch has the rows of the global batch as axis 0, so
    that one rule shards them all; but for what stands in a `Shared`. Weights are handed in as `alpha`: the task does not
    know whether they are sparse.

    Attributes:
      init: key -> (params, carry), the carry for `config.batch_size` rows. Needs no
        data and works under `jax.eval_shape`.
      carry: rows -> the carry before any batch of an evaluation.
      loss: (alpha, carry, batch, key) -> (loss, (carry, aux)). `loss` is a mean over
        what counts in the batch, `aux` a dict of scalars; `key` is for dropout.
      metrics: (alpha, carry, batch) -> (sums, carry). `sums` maps a name to a pair
        (sum, count); add both over the batches, then divide.
      batches: (split, *, seed, loop, shard=WHOLE) -> grain.IterDataset of dicts of NumPy
        arrays, of the rows of a share (`experiments.data.shard`) of a batch with
        `config.batch_size` rows; its iterators have get_state and set_state. Endless
        and drawn by `seed` with loop=True, else one pass in order, nothing dropped, for
        which a task may take other rows.
      uses: how often each entry of a kernel is multiplied in the forward pass of one
        training step, by the path of the kernel; also an embedding that serves as the
        output layer.
      by_unit: whether the model takes `tk.BlockMatrix` in place of a kernel, as those
        that are called through `tk.flax.apply` do.
      count: batch -> how much of it counts, the number that `loss` and `aux` are means
        over; None where that is its rows. Where it is 0, on a device of several, loss
        and gradient must be finite.
      routes: alpha with `tk.BlockMatrix` leaves, or its shapes -> how the model
        multiplies by each of them, by path, see `tk.flax.routes`; None where `by_unit`
        is not so.
      report: means of the metrics over a split -> what is told of it.
      batch: ShapeDtypeStructs of a training batch; None: only the data say.
      held_out_rows: of a batch of an evaluation; None: as in training.
      tokens: of a row of a training batch; None: rows are no texts.
    """

    init: Callable[[jax.Array], tuple[Params, Carry]]
    carry: Callable[[int], Carry]
    loss: Callable[
        [Params, Carry, Batch, jax.Array], tuple[jax.Array, tuple[Carry, Scalars]]
    ]
    metrics: Callable[[Params, Carry, Batch], tuple[Sums, Carry]]
    batches: Callable[..., grain.IterDataset]
    uses: Mapping[str, int]
    by_unit: bool = False
    count: Callable[[Batch], jax.Array] | None = None
    routes: Callable[[Params], dict[str, str]] | None = None
    report: Callable[[dict[str, float]], dict[str, float]] = dict
    batch: Mapping[str, jax.ShapeDtypeStruct] | None = None
    held_out_rows: int | None = None
    tokens: int | None = None

"""Adaptive embedding and adaptive softmax: rare ids get narrow rows of their own.

Grave et al., "Efficient softmax approximation for GPUs", 2017, arXiv:1609.04309; Baevski
and Auli, "Adaptive Input Representations for Neural Language Modeling", 2019,
arXiv:1809.10853; as in Transformer-XL (arXiv:1901.02860), whose code ties both. Ids are
sorted by frequency and cut into clusters. The first is the head: its softmax is over its
own ids and one more entry for each other cluster; a rare id costs its cluster's entry
there, and itself in the softmax within the cluster.

Shapes are static here: every cluster is computed for every position, and what does not
belong to it is masked. With the cutoffs of WikiText-103 and `div_val=4` that is 1.8 times
the products of the head alone, which is all that most positions would need; with
`div_val=1`, where clusters are not narrower, it is what the full softmax costs, and only
memory is saved. Letters in shape comments: B rows, T tokens, V ids, D `d_model`.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.models.tables import Projection, Table


class Cluster(NamedTuple):
    """Ids in [start, stop), with rows of `width` entries."""

    start: int
    stop: int
    width: int


def clusters(
    vocabulary: int, cutoffs: Sequence[int], d_embed: int, div_val: int
) -> tuple[Cluster, ...]:
    """The clusters that cutoffs make, the head first.

    Args:
      vocabulary: V, ids in [0, V).
      cutoffs: where each cluster but the first begins, rising, in (0, V).
      d_embed: width of the rows of the head.
      div_val: cluster i has rows of d_embed // div_val**i entries.
    Raises:
      ValueError: cutoffs that do not rise within the vocabulary, or rows of no entries.
    Example:
      >>> clusters(10, (4, 6), 8, 2)[1:]
      (Cluster(start=4, stop=6, width=4), Cluster(start=6, stop=10, width=2))
    """
    ends = (0, *cutoffs, vocabulary)
    if any(start >= stop for start, stop in itertools.pairwise(ends)):
        raise ValueError(
            f"cutoffs are {tuple(cutoffs)}; they must rise, between 0 and the "
            f"vocabulary's {vocabulary}"
        )
    if div_val < 1 or d_embed // div_val ** len(cutoffs) < 1:
        raise ValueError(
            f"div_val is {div_val}; it must be at least 1, and d_embed={d_embed} divided "
            f"by it {len(cutoffs)} times must leave an entry"
        )
    bounds = enumerate(itertools.pairwise(ends))
    return tuple(Cluster(a, b, d_embed // div_val**i) for i, (a, b) in bounds)


class AdaptiveEmbedding(nn.Module):
    """Rows of d_embed // div_val**i entries for cluster i, projected to D.

    Attributes:
      vocabulary: V.
      cutoffs: see `clusters`; none for a plain embedding.
      d_embed: width of the head's rows.
      d_model: D, width of what comes out.
      div_val: with 1, all clusters share one projection, and have none where d_embed is
        D; else each has its own, the head too.
      embedding_init: of the rows.
      projection_init: of the projections, [width, D].
      dtype: of what comes out; None: float32.
    """

    vocabulary: int
    cutoffs: tuple[int, ...]
    d_embed: int
    d_model: int
    div_val: int
    embedding_init: Any
    projection_init: Any
    dtype: Any = None

    def setup(self) -> None:
        found = clusters(self.vocabulary, self.cutoffs, self.d_embed, self.div_val)
        self.clusters = found
        # Flax names them table_0, ..., projection_0, ...
        self.table = [
            Table(stop - start, width, self.dtype, embedding_init=self.embedding_init)
            for start, stop, width in found
        ]
        narrower = found if self.div_val > 1 else found[:1]
        projected = self.div_val > 1 or self.d_embed != self.d_model
        self.projection = [
            Projection(c.width, self.d_model, self.projection_init, self.dtype)
            for c in (narrower if projected else ())
        ]

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        one_width = self.div_val == 1
        total: Any = 0
        for i, (start, stop, _) in enumerate(self.clusters):
            inside = (tokens >= start) & (tokens < stop)  # [B, T]
            rows = self.table[i](jnp.clip(tokens - start, 0, stop - start - 1))
            rows = rows if one_width else self.projection[i](rows)
            total += jnp.where(inside[..., None], rows, 0)  # [B, T, D or d_embed]
        return self.projection[0](total) if one_width and self.projection else total


class AdaptiveSoftmax(nn.Module):
    """Negative log-likelihood of the next id, cluster by cluster.

    Attributes:
      embedding: the clusters, and what is tied.
      tied: logits are products with the rows of the embedding, or with rows of its own.
      tied_projections: whose projections, from D to the width of a cluster's rows, are
        those of the embedding transposed: "all", "none", or, as in the authors' scripts,
        the "tail", all but the head's.
      embedding_init: of rows of its own, and of the entries for clusters.
      projection_init: of projections of its own, [D, width].
      dtype: of the products; logits and softmax are float32.
    """

    embedding: AdaptiveEmbedding
    tied: bool
    tied_projections: Literal["all", "tail", "none"]
    embedding_init: Any
    projection_init: Any
    dtype: Any = None

    def setup(self) -> None:
        parts = self.embedding.clusters
        if self.tied_projections not in ("all", "tail", "none"):
            raise ValueError(
                f"tied_projections is {self.tied_projections!r}; possible are 'all', "
                "'tail' and 'none'"
            )
        first_tied = {"all": 0, "tail": 1, "none": len(parts)}[self.tied_projections]
        self.projection = {  # named projection_0, ...
            str(i): nn.Dense(
                width,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=self.projection_init,
            )
            for i, (_, _, width) in enumerate(parts)
            if self.embedding.projection and i < first_tied
        }
        self.table = [
            Table(stop - start, width, self.dtype, embedding_init=self.embedding_init)
            for start, stop, width in (() if self.tied else parts)
        ]
        self.bias = [
            self.param(f"bias_{i}", nn.initializers.zeros, (stop - start,))
            for i, (start, stop, _) in enumerate(parts)
        ]
        if len(parts) > 1:  # the head's entries for the other clusters, in float32
            self.clusters = nn.Dense(len(parts) - 1, kernel_init=self.embedding_init)

    def _inputs(self, hidden: Array) -> list[Array]:
        """What the rows of each cluster are multiplied with, [B, T, width] each."""
        tied, found = self.embedding.projection, []
        back: dict[int, Array] = {}  # with div_val=1 one projection serves them all
        for i in range(len(self.embedding.clusters)):
            of = min(i, len(tied) - 1)
            if not tied:
                found.append(hidden)
            elif str(i) in self.projection:
                found.append(self.projection[str(i)](hidden))
            else:
                if of not in back:
                    back[of] = tied[of].attend(hidden)
                found.append(back[of])
        return found

    def __call__(
        self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T"] | Float[Array, "B T V"]:
        """Nats of the targets; without targets, log-probabilities of all V ids.

        With targets no more than the logits of one cluster need exist at a time.
        """
        parts = self.embedding.clusters
        tables = self.embedding.table if self.tied else self.table
        inputs = self._inputs(hidden)
        entries = None  # [B, T, clusters - 1]
        if len(parts) > 1:
            entries = self.clusters(inputs[0].astype(jnp.float32))

        if targets is None:
            logits = [
                table.attend(x) + bias[None, None]
                for table, x, bias in zip(tables, inputs, self.bias, strict=True)
            ]
            if entries is None:
                return jax.nn.log_softmax(logits[0])
            head = jnp.concatenate([logits[0], entries], axis=-1)
            head, entries = jnp.split(
                jax.nn.log_softmax(head), [parts[0].stop], axis=-1
            )
            tail = [
                entries[..., i, None] + jax.nn.log_softmax(within)
                for i, within in enumerate(logits[1:])
            ]
            return jnp.concatenate([head, *tail], axis=-1)  # [B, T, V]

        in_head, nats = targets, jnp.zeros(targets.shape)
        for i, (start, stop, _) in enumerate(parts[1:], 1):
            inside = (targets >= start) & (targets < stop)  # [B, T]
            in_head = jnp.where(inside, parts[0].stop + i - 1, in_head)
            within = jnp.clip(targets - start, 0, stop - start - 1)
            within = tables[i].nats(inputs[i], self.bias[i], within)
            nats += jnp.where(inside, within, 0)
        return nats + tables[0].nats(inputs[0], self.bias[0], in_head, entries)

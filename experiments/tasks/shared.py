"""What a task carries besides its rows: one copy for the whole batch.

Leaves of a carry have the rows of the batch as axis 0. What has none, such as the running
statistics of batch normalisation, stands in a `Shared`: every device holds it whole, and
evaluation takes it over from training, where it begins with rows of its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

PyTree = Any


class Shared(NamedTuple):
    """A part of a carry that belongs to no row."""

    value: PyTree


def is_shared(node: Any) -> bool:
    """Whether a node of a carry is a `Shared`."""
    return isinstance(node, Shared)


def shared(carry: PyTree) -> list[Any]:
    """Values of all `Shared` of a carry, in flattening order."""
    nodes = jax.tree.leaves(carry, is_leaf=is_shared)
    return [node.value for node in nodes if is_shared(node)]


def with_shared(carry: PyTree, values: Sequence[Any]) -> PyTree:
    """A carry with these in the place of its own `Shared`, see `shared`."""
    rest = iter(values)
    return jax.tree.map(
        lambda node: Shared(next(rest)) if is_shared(node) else node,
        carry,
        is_leaf=is_shared,
    )

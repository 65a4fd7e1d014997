"""Leaves of a tree by their paths, as configs and plans write them."""

from collections.abc import Callable
from typing import Any

import jax


def named(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """`[("block_0/attention/key/kernel", leaf), ...]`, in the order of the leaves."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]
    ]

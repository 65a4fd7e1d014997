"""Where a method starts: at random, from the largest weights, or from a given mask."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np

from topkast_jax import _trees
from topkast_jax._types import Entries, Leaf, PyTree
from topkast_jax.score import magnitude

Init: TypeAlias = Literal["random", "magnitude"] | PyTree
"""A word, or a tree of bool arrays like the parameters (None where there is no mask)."""


def starting_set(init: Init) -> Callable[[Leaf, Any], Entries]:
    """`(leaf, k) -> entries`, the first A of a method.

    Args:
      init: "random"; "magnitude", the k largest |theta|, for weights that were trained
        before; or masks. A mask of fewer than k units is extended at random.
    Raises:
      ValueError: another word, or a mask that is not bool. Where a mask is missing, has
        another shape, holds more than k units or parts of units, `init` of the
        transformation raises and names the parameter.
    """
    if isinstance(init, str):
        if init not in ("random", "magnitude"):
            raise ValueError(f"init={init!r} is not 'random', 'magnitude' or masks")
        return _random if init == "random" else _largest
    masks: dict[str, Any] = {}
    for parameter in _trees.parameters(init)[0]:
        masks[parameter.path] = np.asarray(parameter.array)
        if masks[parameter.path].dtype != np.bool_:
            raise ValueError(
                f"init: the mask of {parameter.path!r} holds "
                f"{masks[parameter.path].dtype}, not bool; tk.from_zeros makes masks of "
                "weights"
            )

    def given(leaf: Leaf, k: Any) -> Entries:
        if leaf.path not in masks:
            raise ValueError(
                f"init: no mask for {leaf.path!r}; there are {', '.join(masks) or 'none'}"
            )
        # A k that is traced, of a delayed beginning, is held against nothing.
        kept = leaf.given(masks[leaf.path], k if isinstance(k, int) else leaf.size)
        return leaf.union(kept, leaf.draw(k - leaf.count(kept), outside=kept))

    return given


def _random(leaf: Leaf, k: Any) -> Entries:
    return leaf.draw(k)


def _largest(leaf: Leaf, k: Any) -> Entries:
    return leaf.top(magnitude(leaf), k)


def everything(leaf: Leaf) -> Entries:
    """All units."""
    return leaf.top(magnitude(leaf), leaf.size)

"""The largest number of layers that fits, where a trial that fails is cheap."""

import math
from collections.abc import Callable


def largest(above: int, share: Callable[[int], float | None]) -> int:
    """The largest number of layers that fits, to 1 % or one layer; 0 where none does.

    Comes from above, by steps of 1 % or one layer, so that one trial fits and the one
    before it did not. Where a guess fits, the next one is as many as its share allows.

    Args:
      above: a number that should not fit.
      share: the trial: the part of the room that layers take, None where they do not fit.
    """
    found, refused, layers = 0, None, max(1, above)
    while layers > found:
        used = share(layers)
        if used is None:
            refused, layers = layers, layers - step(layers)
            continue
        found = layers
        if refused is not None and refused - step(refused) <= found:
            break
        layers = max(found + step(found), math.ceil(1.01 * found / used))
        if refused is not None:
            layers = min(layers, refused - step(refused))
    return found


def step(layers: int) -> int:
    """1 % of the layers, at least one."""
    return max(1, layers // 100)

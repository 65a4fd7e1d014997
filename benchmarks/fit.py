"""The largest number of layers that fits, where a trial that fails is cheap."""

from collections.abc import Callable


def largest(above: int, fits: Callable[[int], bool]) -> int:
    """The largest number of layers that fits, to 1 % or one layer; 0 where none does.

    Comes from above, by steps of 1 % or one layer, so that one trial fits and those
    before it do not. Should the first one fit, it goes up until one does not.

    Args:
      above: a number that should not fit.
      fits: the trial.
    """
    layers = max(1, above)
    if fits(layers):
        while fits(layers + step(layers)):
            layers += step(layers)
        return layers
    while layers > 0:
        layers -= step(layers)
        if layers > 0 and fits(layers):
            return layers
    return 0


def step(layers: int) -> int:
    """1 % of the layers, at least one."""
    return max(1, layers // 100)

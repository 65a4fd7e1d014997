"""Masks written down as sets of linear indices, for examples."""

import numpy as np


def mask_of(indices, shape=(4, 4)):
    """True at the given linear indices."""
    mask = np.zeros(shape, bool)
    mask.flat[list(indices)] = True
    return mask


def on(mask):
    """The linear indices where a mask is True."""
    return set(np.flatnonzero(mask).tolist())

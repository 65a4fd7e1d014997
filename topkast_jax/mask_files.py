"""Masks by themselves: recovered from weights, saved and loaded alone."""

import os
import pathlib
import zipfile

import numpy as np

from topkast_jax import _trees
from topkast_jax._trees import Where, kernels
from topkast_jax._types import PyTree

_SHAPE = "shape of "


def from_zeros(params: PyTree, where: Where = kernels) -> PyTree:
    """Masks of weights that were saved without theirs: everything that is not zero.

    A weight of A that is exactly zero, as one that was just grown, counts as absent: it
    cannot be told apart. Give `init=from_zeros(params)` to a method, and
    `distribution=tk.of_masks(...)` for its counts.

    Args:
      params: dense arrays with exact zeros, as `tk.export` gives them.
      where: which parameters have masks, as for a method.
    Returns:
      Tree like `params`: bool arrays of NumPy, None where a parameter is dense.
    Raises:
      ValueError: nothing is chosen, or a chosen parameter is all zero.
    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[0.0, 2.0], [0.0, -1.0]]), "bias": jnp.zeros(2)}
      >>> from_zeros(params)["kernel"].tolist(), from_zeros(params)["bias"]
      ([[False, True], [False, True]], None)
    """
    flat, treedef = _trees.parameters(params)
    chosen = set(_trees.selected(where, {p.path: np.shape(p.array) for p in flat}))
    masks = []
    for p in flat:
        mask = np.asarray(p.array) != 0 if p.path in chosen else None
        if mask is not None and not mask.any():
            raise ValueError(f"{p.path!r} is all zero: that is no mask to train with")
        masks.append(mask)
    return treedef.unflatten(masks)


def save_masks(file: str | os.PathLike[str], masks: PyTree) -> None:
    """Writes masks to an .npz file, a bit an entry, by the path of their parameter.

    Args:
      file: to write; its name gets .npz where it has another end.
      masks: tree of bool arrays, as `tk.dense_masks(opt_state).forward`; None is left
        out.
    Example:
      >>> import tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "masks.npz"
      >>> save_masks(file, {"one": {"kernel": np.eye(3, dtype=bool), "bias": None}})
      >>> load_masks(file)["one/kernel"].astype(int).tolist()
      [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    arrays: dict[str, np.ndarray] = {}
    for p in _trees.parameters(masks)[0]:
        mask = np.asarray(p.array)
        if mask.dtype != np.bool_:
            raise ValueError(f"save_masks: {p.path!r} holds {mask.dtype}, not bool")
        arrays[p.path] = np.packbits(mask)
        arrays[_SHAPE + p.path] = np.array(mask.shape, np.int64)
    file = pathlib.Path(file).with_suffix(".npz")
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, file)


def load_masks(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Masks by path, which a method takes as its `init`.

    Raises:
      ValueError: a file that is not there, or that `save_masks` did not write.
    """
    try:
        with pathlib.Path(file).open("rb") as stream:  # np.load would leave it open
            arrays = dict(np.load(stream))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} holds no masks: {error}") from error
    masks = {}
    for name, shape in arrays.items():
        if name.startswith(_SHAPE):
            path = name.removeprefix(_SHAPE)
            if path not in arrays:
                raise ValueError(f"{file} holds no masks: {path!r} is cut short")
            size = int(np.prod(shape))
            bits = np.unpackbits(arrays[path], count=size)
            masks[path] = bits.astype(bool).reshape(shape)
    if not masks:
        raise ValueError(f"{file} holds no masks: it was not written by save_masks")
    return masks

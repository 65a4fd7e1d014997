"""Parameters that were trained before: from an Orbax checkpoint, or safetensors.

Every parameter of the model must be found, in its shape, and everything in the file must
be used: a name that matches nothing is an error, never a parameter that stays random.
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.flax

PyTree = Any
Rule = tuple[str, ...]
CHANGES = ("transpose", "reshape", "transpose reshape")


def load(path: str, rules: Sequence[Rule], shapes: PyTree) -> PyTree:
    """Reads a tree of parameters.

    Args:
      path: a file that ends with .safetensors, or the folder of an Orbax checkpoint
        that holds a tree of arrays.
      rules: (regex of a parameter's whole path, name in the file), first match wins;
        the name may refer to groups of the regex, as in (r"block_(\\d+)/up/kernel",
        r"h.\\1.mlp.c_fc.weight"). A third word changes the array: "transpose" (all axes
        reversed, as PyTorch stores Linear), "reshape", or "transpose reshape". A
        parameter that no rule covers has its own path as name.
      shapes: of the model: arrays or ShapeDtypeStructs.
    Returns:
      Tree like `shapes` of NumPy arrays, in the model's dtypes.
    Raises:
      ValueError: names that are not there, or are not used, or have another shape.
    """
    for rule in rules:
        if len(rule) not in (2, 3) or (len(rule) == 3 and rule[2] not in CHANGES):
            raise ValueError(
                f"init_map: {tuple(rule)!r} must be (regex, name) or (regex, name, one "
                f"of {', '.join(CHANGES)})"
            )
    there = _read(pathlib.Path(path))
    flat, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    named = [
        (jax.tree_util.keystr(keys, simple=True, separator="/"), leaf)
        for keys, leaf in flat
    ]
    for regex, *_ in rules:
        if not any(re.fullmatch(regex, name) for name, _ in named):
            raise ValueError(
                f"init_map: the rule {regex!r} matches no parameter; there are "
                f"{', '.join(name for name, _ in named)}"
            )
    sources = {name: _source(name, rules) for name, _ in named}
    missing = [f"{n!r} (of {p!r})" for p, (n, _) in sources.items() if n not in there]
    used = {name for name, _ in sources.values()}
    left = [repr(name) for name in there if name not in used]
    if missing or left:
        said = []
        if missing:
            said.append(f"it lacks {', '.join(missing)}")
        if left:
            said.append(f"nothing takes {', '.join(left)}")
        raise ValueError(
            f"init_from={path!r} does not fit the model: {'; '.join(said)}; say in "
            "init_map what belongs to what"
        )
    leaves = [_fit(path, p, leaf, there, *sources[p]) for p, leaf in named]
    return jax.tree.unflatten(treedef, leaves)


def _read(path: pathlib.Path) -> Mapping[str, Any]:
    """Arrays by name."""
    if not path.exists():
        raise ValueError(f"init_from={str(path)!r}: there is no such file or folder")
    if path.suffix == ".safetensors":
        try:
            return dict(safetensors.flax.load_file(path))
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"init_from={str(path)!r} cannot be read, it may be cut short: {error}"
            ) from error
    if not path.is_dir():
        raise ValueError(
            f"init_from={str(path)!r} must be a .safetensors file, or the folder of an "
            "Orbax checkpoint"
        )
    try:
        tree = ocp.StandardCheckpointer().restore(path.absolute())
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"init_from={str(path)!r} holds no Orbax checkpoint of arrays: {error}"
        ) from error
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in flat
    }


def _source(path: str, rules: Sequence[Rule]) -> tuple[str, str]:
    """Name in the file, and how the array changes."""
    for regex, name, *change in rules:
        found = re.fullmatch(regex, path)
        if found:
            return found.expand(name), change[0] if change else ""
    return path, ""


def _fit(
    file: str, path: str, leaf: Any, there: Mapping[str, Any], name: str, change: str
) -> np.ndarray:
    array = np.asarray(there[name])
    if "transpose" in change:
        array = array.T
    if "reshape" in change and array.size == math.prod(leaf.shape):
        array = array.reshape(leaf.shape)
    if array.shape != leaf.shape:
        raise ValueError(
            f"init_from={file!r}: {name!r} is {array.shape}"
            f"{f' after {change}' if change else ''}, and {path!r} is {leaf.shape}"
        )
    return array.astype(leaf.dtype)

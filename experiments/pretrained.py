"""Parameters that were trained before: from a run, an Orbax checkpoint, or safetensors.

Every parameter of the model must be found, in its shape, and everything in the file must
be used: a name that matches nothing is an error, never a parameter that stays random.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.flax
from etils import epath

from experiments import evaluate, paths
from experiments.leaves import named

PyTree = Any
Rule = tuple[str, ...]
CHANGES = ("transpose", "reshape", "transpose reshape")


def load(path: str, rules: Sequence[Rule], shapes: PyTree) -> PyTree:
    """Reads a tree of parameters.

    Args:
      path: a file that ends with .safetensors; the folder of a run, whose weights are
        those that it is evaluated with (sparse ones with their zeros, averages where it
        keeps them); or the folder of an Orbax checkpoint that holds a tree of arrays.
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
    _require_rules(rules)
    there = _read(paths.folder(path))
    parameters = named(shapes)
    sources = _sources(parameters, rules)
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
    leaves = [_fit(path, p, leaf, there, *sources[p]) for p, leaf in parameters]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def save(path: str, rules: Sequence[Rule], params: PyTree, like: str = "") -> None:
    """Writes a tree of parameters as safetensors: what `load` reads, the other way.

    Args:
      path: the file; one that is there is replaced, as a whole.
      rules: as in `load`.
      params: tree of arrays.
      like: a .safetensors file whose shapes and dtypes the arrays get; without it they
        keep their dtypes, and no rule may say "reshape".
    Raises:
      ValueError: two parameters of one name, or a name or a size that `like` has not.
    """
    _require_rules(rules)
    wanted = _read(paths.folder(like)) if like else {}
    arrays: dict[str, jax.Array] = {}
    parameters = named(params)
    sources = _sources(parameters, rules)
    for parameter, leaf in parameters:
        name, change = sources[parameter]
        if name in arrays:
            raise ValueError(f"init_map: two parameters would be called {name!r}")
        if like and name not in wanted:
            raise ValueError(f"like={like!r} lacks {name!r} (of {parameter!r})")
        arrays[name] = _unfit(parameter, jnp.asarray(leaf), change, wanted.get(name))
    if like and (left := [repr(name) for name in wanted if name not in arrays]):
        raise ValueError(f"like={like!r} has more: {', '.join(left)}")
    file = paths.folder(path)
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_bytes(safetensors.flax.save(arrays, {"format": "pt"}))
    temporary.replace(file)


def _require_rules(rules: Sequence[Rule]) -> None:
    for rule in rules:
        if len(rule) not in (2, 3) or (len(rule) == 3 and rule[2] not in CHANGES):
            raise ValueError(
                f"init_map: {tuple(rule)!r} must be (regex, name) or (regex, name, one "
                f"of {', '.join(CHANGES)})"
            )


def _sources(
    parameters: Sequence[tuple[str, Any]], rules: Sequence[Rule]
) -> dict[str, tuple[str, str]]:
    """Name in the file, and how the array changes, by parameter."""
    for regex, *_ in rules:
        if not any(re.fullmatch(regex, name) for name, _ in parameters):
            raise ValueError(
                f"init_map: the rule {regex!r} matches no parameter; there are "
                f"{', '.join(name for name, _ in parameters)}"
            )
    return {name: _source(name, rules) for name, _ in parameters}


def _read(path: epath.Path) -> Mapping[str, Any]:
    """Arrays by name."""
    if not path.exists():
        raise ValueError(f"init_from={str(path)!r}: there is no such file or folder")
    if path.suffix == ".safetensors":
        try:
            if paths.is_remote(path):
                return dict(safetensors.flax.load(path.read_bytes()))
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
    if (path / "checkpoints").is_dir():
        return _of_run(path)
    if (path / "meta").is_dir() and (path / "params").is_dir():
        raise ValueError(
            f"init_from={str(path)!r} is one checkpoint of a run; name the run's folder, "
            f"{str(path.parent.parent)!r}: its newest checkpoint is read"
        )
    try:
        tree = ocp.StandardCheckpointer().restore(paths.whole(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"init_from={str(path)!r} holds no Orbax checkpoint of arrays: {error}"
        ) from error
    return dict(named(tree))


def _of_run(path: epath.Path) -> Mapping[str, Any]:
    if jax.process_count() > 1:
        raise ValueError(
            f"init_from={str(path)!r}: a run's folder is read by one process alone; make "
            "a file of it, python -m experiments.export"
        )
    return dict(named(evaluate.read(str(path)).weights.alpha))


def _source(path: str, rules: Sequence[Rule]) -> tuple[str, str]:
    """Name in the file, and how the array changes."""
    for regex, name, *change in rules:
        found = re.fullmatch(regex, path)
        if found:
            return found.expand(name), change[0] if change else ""
    return path, ""


def _unfit(parameter: str, array: jax.Array, change: str, wanted: Any) -> jax.Array:
    """Undoes `_fit`."""
    if "reshape" in change:
        if wanted is None:
            raise ValueError(
                f"{parameter!r} was reshaped; say like=, a file with the shape it had"
            )
        if array.size != wanted.size:
            raise ValueError(f"{parameter!r} is {array.shape}, in like {wanted.shape}")
        flipped = wanted.shape[::-1] if "transpose" in change else wanted.shape
        array = array.reshape(flipped)
    if "transpose" in change:
        array = array.T
    if wanted is None:
        return array
    if array.shape != wanted.shape:
        raise ValueError(f"{parameter!r} is {array.shape}, in like {wanted.shape}")
    return array.astype(wanted.dtype)


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

"""Tree plumbing: paths, patterns, axes, keys, slots, and the states in a state."""

import dataclasses
import fnmatch
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from topkast_jax._types import Axes, KeyPath, Masks, PyTree, SparseState

Pattern: TypeAlias = str | re.Pattern[str]
Where: TypeAlias = Callable[[str, tuple[int, ...]], bool] | Pattern | Sequence[Pattern]
T = TypeVar("T")


class Parameter(NamedTuple):
    """One leaf of the parameters: its name, its key path, its array (or shape)."""

    path: str
    keys: KeyPath
    array: Any


def path_name(keys: KeyPath) -> str:
    """`"block1/conv/kernel"`; the trailing `.value` of a wrapped variable is left out.

    So a Linen tree and an NNX state of the same model have the same names, hence the
    same patterns and the same random draws.
    """
    if keys and isinstance(keys[-1], GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def parameters(tree: PyTree) -> tuple[list[Parameter], Any]:
    """Leaves of a parameter tree in flattening order, and its treedef."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [Parameter(path_name(keys), keys, leaf) for keys, leaf in flat], treedef


def flatten(tree: PyTree) -> tuple[list[Any], Any]:
    """jax.tree.flatten, with a treedef that type checkers let one use."""
    return jax.tree.flatten(tree)


def matches(pattern: Pattern, path: str) -> bool:
    """Whether a glob (a string) or a compiled regex (full match) covers a path."""
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(path, pattern)
    return pattern.fullmatch(path) is not None


def first_match(
    rules: Mapping[Pattern, T], paths: Iterable[str], what: str
) -> dict[str, T]:
    """`{path: value}` of the first rule that covers it; paths with none are left out.

    Raises:
      ValueError: a pattern covers no path at all (`what` names the argument).
    """
    paths = list(paths)
    require_matches(rules, paths, what)
    found = {}
    for path in paths:
        for pattern, value in rules.items():
            if matches(pattern, path):
                found[path] = value
                break
    return found


def require_matches(
    patterns: Iterable[Pattern], paths: Sequence[str], what: str
) -> None:
    """Raises ValueError naming the first pattern that matches nothing."""
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            text = pattern if isinstance(pattern, str) else pattern.pattern
            raise ValueError(
                f"{what}: the pattern {text!r} matches no parameter; "
                f"there are {_listing(paths)}"
            )


def _listing(paths: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(repr(path) for path in paths[:most])
    return shown + (f" and {len(paths) - most} more" if len(paths) > most else "")


def kernels(path: str, shape: tuple[int, ...]) -> bool:
    """The default `where`: weights of matrix products, never biases or norms.

    The last word of the path is kernel, weight or w, and the rank without stack axes is
    at least 2. Embeddings are sparse only when asked for by name.
    Example:
      >>> kernels("block1/conv/kernel", (3, 3, 8, 8)), kernels("norm/bias", (8,))
      (True, False)
    """
    return path.rsplit("/", 1)[-1] in ("kernel", "weight", "w") and len(shape) >= 2


def selected(where: Where, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Paths that `where` chooses of `{path: slice shape}`.

    Raises:
      ValueError: a pattern, or the whole of `where`, chooses nothing.
    """
    if callable(where):
        chosen = [path for path, shape in shapes.items() if where(path, shape)]
    else:
        patterns = [where] if isinstance(where, str | re.Pattern) else list(where)
        require_matches(patterns, list(shapes), "where")
        chosen = [
            path
            for path in shapes
            if any(matches(pattern, path) for pattern in patterns)
        ]
    if not chosen:
        name = getattr(where, "__name__", where)
        raise ValueError(
            f"where={name} selects no parameter, so nothing would be sparse; there are "
            f"{_listing(list(shapes))}"
        )
    return chosen


@dataclasses.dataclass(frozen=True)
class AxesRules:
    """Declared axes: see `axes`."""

    rules: Mapping[Pattern, str]

    def resolve(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Axes]:
        """`{path: Axes}` for every path; those no rule covers are read by default."""
        found = first_match(self.rules, shapes, "axes")
        return {
            path: _read_axes(path, shape, found.get(path))
            for path, shape in shapes.items()
        }


def axes(rules: Mapping[Pattern, str]) -> AxesRules:
    """Declares what the axes of a parameter mean, for the `axes` of `tk.sparse`.

    Letters, one per axis: `s` stack (nn.scan, experts, populations: selection runs per
    slice), `k` kernel window, `i` input, `o` output. Undeclared parameters are read as
    (window..., input, output), which is how Flax stores Dense and Conv.

    Args:
      rules: `{pattern: letters}`, the first match wins; a pattern is a glob or a
        compiled regex, such as `{"*/ScanBlock_0/*/kernel": "s i o"}`.
    Example:
      >>> axes({"*/ScanBlock_0/*/kernel": "s i o"}).rules
      {'*/ScanBlock_0/*/kernel': 's i o'}
    """
    for pattern, letters in rules.items():
        wrong = set(letters.split()) - set("skio")
        if wrong or not letters.split():
            raise ValueError(
                f"axes: {pattern!r}: {letters!r} must be letters out of s, k, i, o "
                "separated by spaces, one for each axis"
            )
    return AxesRules(dict(rules))


def _read_axes(path: str, shape: tuple[int, ...], letters: str | None) -> Axes:
    rank = len(shape)
    if letters is None:
        roles = ["k"] * (rank - 2) + ["i", "o"][max(0, 2 - rank) :]
    else:
        roles = letters.split()
    if len(roles) != rank:
        raise ValueError(
            f"axes: {path!r} has shape {shape}, but {letters!r} names {len(roles)} axes"
        )
    return Axes(
        *(tuple(i for i, r in enumerate(roles) if r == want) for want in "skio")
    )


def slice_shape(shape: tuple[int, ...], roles: Axes) -> tuple[int, ...]:
    """Shape of one slice in canonical form: (window..., inputs, outputs)."""
    window = tuple(shape[i] for i in roles.window)
    inputs = math.prod(shape[i] for i in roles.inputs)
    return (*window, inputs, math.prod(shape[i] for i in roles.outputs))


def slices(shape: tuple[int, ...], roles: Axes) -> int:
    """Number of slices along the stack axes."""
    return math.prod(shape[i] for i in roles.stack)


def path_id(path: str) -> int:
    """32 bits that stand for a path in keys and in the state."""
    return zlib.crc32(path.encode())


def leaf_key(seed: Any, path: str, step: Any) -> jax.Array:
    """Typed PRNG key of one parameter at one step; the same on any mesh and process."""
    key = jax.random.key(seed, impl="threefry2x32")
    key = jax.random.fold_in(key, path_id(path))
    return jax.random.fold_in(key, step)


def slots(state: PyTree, params: Sequence[Parameter]) -> list[int | None]:
    """For each leaf of a state, the index of the parameter whose slot it is.

    A slot belongs to a parameter when its key path ends with the parameter's key path
    and the shapes agree; the longest match wins. Never by type or by shape alone: those
    find nothing inside masked, multi_transform or muon, or the wrong parameter.
    """
    order = sorted(range(len(params)), key=lambda i: -len(params[i].keys))
    found: list[int | None] = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        owner = None
        for i in order:
            tail = params[i].keys
            if (
                keys[len(keys) - len(tail) :] == tail
                and len(keys) >= len(tail)
                and jnp.shape(leaf) == jnp.shape(params[i].array)
            ):
                owner = i
                break
        found.append(owner)
    return found


def find_states(state: PyTree) -> list[SparseState]:
    """Every SparseState inside an optimizer state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SparseState))
    return [node for node in nodes if isinstance(node, SparseState)]


def replace_state(opt_state: PyTree, new: SparseState) -> PyTree:
    """An optimizer state with its only SparseState replaced."""
    return jax.tree.map(
        lambda node: new if isinstance(node, SparseState) else node,
        opt_state,
        is_leaf=lambda x: isinstance(x, SparseState),
    )


def masks(opt_state: PyTree) -> Masks:
    """Masks of every `tk.sparse` inside an optimizer state, as one tree.

    Args:
      opt_state: state of a transformation that contains `tk.sparse`, however deep.
    Returns:
      `Masks`, each tree shaped like the parameters, None where a parameter is dense.
    Raises:
      ValueError: no state of `tk.sparse` is found, or two claim the same parameter.
    Example:
      >>> import topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.top_kast(0.75, 0.5))
      >>> state = tx.init({"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)})
      >>> jax.tree.map(jnp.sum, masks(state).backward)
      {'bias': None, 'kernel': Array(8, dtype=int32)}
    """
    states = find_states(opt_state)
    if not states:
        raise ValueError(
            "no state of tk.sparse inside this optimizer state; wrap the optimizer: "
            "tk.sparse(inner, method)"
        )
    merged = states[0].sparse_masks
    for state in states[1:]:
        merged = Masks(*map(_merge, merged, state.sparse_masks))
    return Masks(*map(unmasked, merged))


def _is_hole(node: PyTree) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def unmasked(tree: PyTree) -> PyTree:
    """A tree with None where optax.masked has put its nodes."""
    return jax.tree.map(lambda x: None if _is_hole(x) else x, tree, is_leaf=_is_hole)


def _merge(first: PyTree, second: PyTree, keys: KeyPath = ()) -> PyTree:
    """Union of two trees with disjoint holes (None or MaskedNode, leaf or subtree)."""
    if _is_hole(first):
        return second
    if _is_hole(second):
        return first
    one = jax.tree_util.tree_flatten_with_path(first, is_leaf=lambda x: x is not first)
    two = jax.tree.leaves(second, is_leaf=lambda x: x is not second)
    if len(one[0]) == 1 and one[0][0][0] == ():
        raise ValueError(f"two tk.sparse states both hold {path_name(keys)!r}")
    children = [
        _merge(a, b, keys + tail) for (tail, a), b in zip(one[0], two, strict=True)
    ]
    return jax.tree.unflatten(one[1], children)

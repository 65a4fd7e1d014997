"""The sets of sparse parameters in the masked layout, by index and as trees."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from topkast_jax import _trees, faults
from topkast_jax._types import LeafMasks, Masks, Method, PyTree, Scalar
from topkast_jax.layouts.masked import MaskedLeaf
from topkast_jax.plan import Group, Site


def is_due(method: Method, step: Any) -> Array:
    return jnp.asarray(False if method.due is None else method.due(step))


def one_by_one(method: Method) -> Callable[..., Any]:
    """`Method.across` of a method whose parameters do not compete."""

    def choose(leaves: list[Any], memories: list[Any], step: Any) -> Any:
        pairs = zip(leaves, memories, strict=True)
        return [method.refresh(leaf, memory, step) for leaf, memory in pairs]

    return choose


def probes(
    groups: list[Group], view: Callable[[Site], MaskedLeaf], step: Any
) -> dict[int, Array]:
    """P of a step: its gradient decides the refresh that is due one step later."""
    found = {}
    for method, sites in groups:
        if not method.probe:
            continue
        now = jnp.asarray(True)
        if callable(method.probe):
            now = jnp.asarray(method.probe(step))
        elif method.probe != "always":
            now = is_due(method, jnp.int32(1) + step)
        for site in sites:
            found[site.index] = now
            if method.candidates is not None:
                leaf = view(site)
                draw = partial(_candidates, method.candidates, leaf, step)
                nothing = jnp.zeros_like(leaf.forward)
                found[site.index] = faults.when(now, draw, nothing)
    return found


def _candidates(draw: Any, leaf: MaskedLeaf, step: Any, nothing: Array) -> Array:
    return nothing | draw(leaf, leaf.memory, step)


def view(
    site: Site,
    value: Array,
    sets: LeafMasks,
    grad: Array,
    seed: Array,
    step: Any,
    memory: Any = (),
    learning_rate: Scalar | None = None,
    stats: Any = None,
    seen: Any = None,
) -> MaskedLeaf:
    return MaskedLeaf(
        value=value,
        forward=sets.forward,
        backward=sets.backward,
        grad=grad,
        path=site.path,
        grid=site.grid,
        counts=site.counts_at(step),
        key=_trees.leaf_key(seed, site.path, step),
        memory=memory,
        learning_rate=learning_rate,
        stats=stats,
        seen=seen if getattr(seen, "ndim", 0) else None,
        step=step,
    )


def kept(site: Site, sets: Mapping[int, LeafMasks]) -> Array:
    """Where weights are not zero without a reservoir: on B.

    On A too where it may be larger: before SNIP has chosen, A is everything, B nothing.
    """
    mine = sets[site.index]
    return mine.backward if site.method.fixed else mine.backward | mine.forward


def changed(
    site: Site, old: Mapping[int, LeafMasks], new: Mapping[int, LeafMasks]
) -> Array:
    """Entries that enter or leave B, or are dropped from a larger A."""
    moved = old[site.index].backward ^ new[site.index].backward
    return moved if site.method.fixed else moved | (kept(site, old) ^ kept(site, new))


def tree_of(treedef: Any, by_index: dict[int, Any]) -> PyTree:
    """A tree like the parameters, None where an index is left out."""
    return treedef.unflatten([by_index.get(i) for i in range(treedef.num_leaves)])


def as_trees(
    treedef: Any, sets: dict[int, LeafMasks], probe: dict[int, Array]
) -> Masks:
    return Masks(
        tree_of(treedef, {i: s.forward for i, s in sets.items()}),
        tree_of(treedef, {i: s.backward for i, s in sets.items()}),
        tree_of(treedef, probe),
        tree_of(treedef, {i: s.shrink for i, s in sets.items()}),
    )


def pairs(treedef: Any, sets: dict[int, LeafMasks]) -> Masks:
    """As the state keeps them, apart from the masks that are in force."""
    return as_trees(treedef, sets, {})


def statistics(methods: Iterable[Method], treedef: Any, stats: PyTree) -> list[Any]:
    """What `tx.update(..., stats=...)` was given, by parameter.

    Raises:
      ValueError: a method needs it, and there is nothing.
    """
    if stats is not None:
        found: list[Any] = treedef.flatten_up_to(stats)
        return found
    for method in methods:
        if method.statistics is not None:
            raise ValueError(
                f"{method.name} draws its candidates by statistics of activations, and "
                "was given none: pass tx.update(..., stats=...), the gradient of the "
                "loss with respect to tk.taps(...)"
            )
    return [None] * treedef.num_leaves


def read_sets(treedef: Any, masks: Masks) -> tuple[dict[int, LeafMasks], list[Any]]:
    """The sets of sparse leaves, by index, and P of every leaf."""
    forward, backward, probe = map(treedef.flatten_up_to, masks[:3])
    shrink = [None] * treedef.num_leaves
    if masks.shrink is not None:
        shrink = treedef.flatten_up_to(masks.shrink)
    rows = enumerate(zip(forward, backward, shrink, strict=True))
    return {i: LeafMasks(*row) for i, row in rows if row[0] is not None}, probe

"""The optax transformation: one update of an always-sparse network, on one screen."""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from topkast_jax import _trees, faults, packed
from topkast_jax import plan as plan_lib
from topkast_jax._trees import AxesRules, Parameter
from topkast_jax._types import (
    LeafMasks,
    Masks,
    Method,
    PyTree,
    Scalar,
    Schedule,
    SparseState,
)
from topkast_jax.layouts.masked import MaskedLeaf
from topkast_jax.plan import Site
from topkast_jax.transformation import LAYOUTS, Recipe, Reset, Sparse


def sparse(
    inner: optax.GradientTransformation,
    method: Method,
    *,
    layout: str = "masked",
    seed: int | Array = 0,
    axes: AxesRules | None = None,
    reset: Reset = "init",
    learning_rate: float | Schedule | None = None,
    refresh_delay: int = 0,
) -> Sparse:
    """Trains with `inner` on the sets that `method` chooses.

    Updates are not differentiable in reverse mode where masks change.

    The last transformation: only what passes or withholds a whole update may enclose it
    (MultiSteps, apply_if_finite, masked, multi_transform); clipping, decay, schedules,
    averaging go inside. With g the gradient of the loss at `tk.sparsify(theta, masks)`:

        u = inner.update(g on B + penalty) on B,   -theta off B if there is no reservoir
        at a refresh: A, B from theta + u;  moments of entries that enter or leave B
        take the value that `inner.init` gives them

    Args:
      inner: any optax optimizer.
      method: `tk.top_kast(...)`, `tk.rigl(...)`, ...
      layout: how sparse parameters are stored. "masked": dense arrays under bool masks.
        "packed": the entries of B alone, expanded where they are used; see `tk.start`.
        "block": as packed, but multiplied unit by unit; see `tk.ops.sparse_matmul`.
      seed: of every random draw; together with step and path it fixes the masks.
      axes: `tk.axes({...})`, what the axes of parameters mean; needed for stacked ones.
      reset: what moments of entries that enter or leave B become, "init" or "keep".
      learning_rate: of the inner optimizer, a number or a schedule; only methods with a
        decoupled penalty ask for it.
      refresh_delay: d: masks are chosen from the parameters of the step where a refresh
        is due, and come into force d steps later. In packed layouts the choice then
        runs beside the training (`tk.choose`); the masked layout does the same,
        as reference.
    Returns:
      An optax transformation; its `update` needs `params`.
    Raises:
      ValueError: an unknown layout or reset, a missing learning rate, or a delay that is
        not shorter than the time between two refreshes. `init` raises
        if nothing is selected, or a parameter would keep nothing.
    Example:
      >>> import jax, topkast_jax as tk
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> tx = sparse(optax.sgd(0.1), tk.top_kast(0.5, 0.5, penalty=0.0))
      >>> state = tx.init(params)
      >>> loss = lambda theta: tk.sparsify(theta, tk.masks(state))["kernel"].sum()
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
      >>> updates["kernel"].tolist()  # only B moves
      [[0.0, 0.0], [-0.10000000149011612, -0.10000000149011612]]
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {LAYOUTS}")
    if reset not in ("init", "keep"):
        raise ValueError(f"reset={reset!r} is not one of ('init', 'keep')")
    if method.needs_learning_rate and learning_rate is None:
        raise ValueError(
            f"{method.name}: a decoupled penalty is scaled by the learning rate; pass "
            "tk.sparse(..., learning_rate=...), the one that the inner optimizer has"
        )
    if layout != "masked" and reset == "keep":
        raise ValueError(
            f'reset="keep" needs layout="masked": in layout={layout!r} an entry outside '
            "B has no moments that could be kept"
        )
    _require_time(method, refresh_delay)
    inner = optax.with_extra_args_support(inner)
    rules = AxesRules({}) if axes is None else axes
    recipe = Recipe(
        inner, method, layout, seed, rules, reset, learning_rate, refresh_delay
    )
    if layout != "masked":
        return packed.transformation(recipe)

    def init_fn(params: PyTree) -> SparseState:
        flat, treedef = _trees.parameters(params)
        key_seed = jnp.asarray(seed, jnp.uint32)
        sets, memory = {}, {}
        found = plan_lib.sites(method, rules, flat)
        for site in found:
            value = jnp.asarray(flat[site.index].array)
            nothing = LeafMasks(*[jnp.zeros_like(value, bool)] * 2)
            leaf = _view(site, value, nothing, value, key_seed, 0)
            sets[site.index], memory[site.index] = method.init(leaf)
        landed = [jnp.asarray(p.array) for p in flat]
        if not method.reservoir:  # where the first update will put the parameters
            for i, mine in sets.items():
                landed[i] = _on(mine.backward, landed[i])
        return SparseState(
            sparse_step=jnp.int32(0),
            sparse_seed=key_seed,
            sparse_masks=_as_trees(treedef, sets, probe_for(found, 0)),
            sparse_memory=_scatter(treedef, memory),
            sparse_reservoir=jnp.asarray(method.reservoir),
            leaks=jnp.int32(0),
            nonfinite_step=jnp.int32(-1),
            nonfinite_leaf=jnp.uint32(0),
            nonfinite_count=jnp.int32(0),
            sparse_inner=inner.init(treedef.unflatten(landed)),
            sparse_next=_pairs(treedef, sets) if refresh_delay else None,
        )

    def due(step: Any) -> Array:
        return jnp.asarray(False if method.due is None else method.due(step))

    def probe_for(found: list[Site], step: Any) -> dict[int, Array]:
        """P of a step: its gradient decides the refresh that is due one step later."""
        if not method.probe:
            return {}
        return {site.index: due(jnp.int32(1) + step) for site in found}

    def update_fn(
        updates: PyTree, state: SparseState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                "tk.sparse: update needs the parameters: "
                "tx.update(grads, opt_state, params)"
            )
        flat, treedef = _trees.parameters(params)
        found = plan_lib.sites(method, rules, flat)
        theta = [jnp.asarray(p.array) for p in flat]
        raw = treedef.flatten_up_to(updates)
        forward_, backward, probe = (
            treedef.flatten_up_to(t) for t in state.sparse_masks
        )
        memory_ = treedef.flatten_up_to(state.sparse_memory)
        sets = {s.index: LeafMasks(forward_[s.index], backward[s.index]) for s in found}
        memory = {s.index: memory_[s.index] for s in found}
        step = state.sparse_step

        def view(site: Site, value: Array, at: Any, own: Any = None) -> MaskedLeaf:
            i = site.index
            args = (
                (own or sets)[i],
                grads[i],
                state.sparse_seed,
                at,
                memory[i],
                recipe.rate(step),
            )
            return _view(site, value, *args)

        def off_mask(i: int, dtype: Any) -> Array:
            """What moves a weight to where it belongs off B: nowhere, or to zero."""
            rest = jnp.zeros_like(theta[i]) if method.reservoir else -theta[i]
            return rest.astype(dtype)

        # 1. The gradient on B and P. Anything nonzero elsewhere is a leak.
        grads = {}
        odd = {i: faults.count(g) for i, g in enumerate(raw) if i not in sets}
        for i in sets:
            seen = backward[i] if probe[i] is None else backward[i] | probe[i]
            odd[i] = faults.count(raw[i], seen)
            grads[i] = _on(seen, raw[i])
            if method.observe is not None:
                memory[i] = method.observe(grads[i], memory[i])

        # 2. The inner optimizer sees B, with the method's own penalty.
        inward = list(raw)
        for site in found:
            i = site.index
            inward[i] = _on(backward[i], grads[i])
            if method.penalty is not None:
                pull = method.penalty(view(site, theta[i], step))
                inward[i] += _on(backward[i], pull).astype(raw[i].dtype)
        outward, inner_state = inner.update(
            treedef.unflatten(inward), state.sparse_inner, params, **extra
        )

        # 3. and 4. Its update counts on B only; without a reservoir, the rest lands on 0.
        u = treedef.flatten_up_to(outward)
        for site in found:
            i = site.index
            if method.adjust is not None:
                u[i] = method.adjust(u[i], view(site, theta[i], step), memory[i])
            u[i] = jnp.where(backward[i], u[i], off_mask(i, u[i].dtype))

        # 5. and 6. Masks of the next step, from the parameters after this one. With a
        # reservoir a refresh leaves u alone, so this is what apply_updates makes:
        # computed once, without writing u. Else it would be one more array every step.
        ahead = _add(theta, u) if method.reservoir else None

        def chosen(operand: _Moving) -> _Moving:
            moved = ahead or _add(theta, operand.u)
            new_sets, new_memory = {}, {}
            for site in found:
                i = site.index
                leaf = view(site, moved[i], step + 1, operand.sets)
                new_sets[i], new_memory[i] = method.refresh(
                    leaf, operand.memory[i], step + 1
                )
            return operand._replace(coming=new_sets, memory=new_memory)

        def in_force(operand: _Moving) -> _Moving:
            new_sets, new_u = operand.coming, list(operand.u)
            for i in sets:
                off = off_mask(i, u[i].dtype)
                if not method.reservoir:
                    new_u[i] = jnp.where(new_sets[i].backward, operand.u[i], off)
            new_inner = operand.inner
            if reset == "init":
                fresh = inner.init(treedef.unflatten(_add(theta, new_u)))
                changed = {i: new_sets[i].backward ^ backward[i] for i in sets}
                new_inner = _reset(new_inner, fresh, flat, changed)
            return operand._replace(sets=new_sets, u=new_u, inner=new_inner)

        def refreshed(operand: _Moving) -> _Moving:
            return in_force(chosen(operand))

        def if_finite(change: Any, operand: _Moving) -> _Moving:
            moved = ahead or _add(theta, operand.u)
            finite = [jnp.all(jnp.isfinite(moved[i])) for i in sets]
            return faults.when(jnp.stack(finite).all(), change, operand)

        bad = jnp.stack([odd[i][0] for i in range(len(raw))])
        leaked = jnp.stack([leak for _, leak in odd.values()]).any()
        coming = _read_pairs(treedef, state.sparse_next) if refresh_delay else sets
        after = _Moving(sets, memory, u, inner_state, coming)
        if method.due is not None:
            now = due(step + 1) & (bad == 0).all()
            change = refreshed
            if refresh_delay:
                began = step + 1 - refresh_delay
                after = faults.when(due(began) & (began > 0), in_force, after)
                change = chosen
            after = faults.when(now, partial(if_finite, change), after)
        return treedef.unflatten(after.u), SparseState(
            sparse_step=jnp.asarray(optax.safe_increment(step)),
            sparse_seed=state.sparse_seed,
            sparse_masks=_as_trees(treedef, after.sets, probe_for(found, step + 1)),
            sparse_memory=_scatter(treedef, after.memory),
            sparse_reservoir=state.sparse_reservoir,
            leaks=state.leaks + leaked.astype(jnp.int32),
            **faults.first_nonfinite(state, flat, bad),
            sparse_inner=after.inner,
            sparse_next=_pairs(treedef, after.coming) if refresh_delay else None,
        )

    return Sparse(init_fn, update_fn, recipe)


class _Moving(NamedTuple):
    """What a refresh may replace: sets and memory by site, updates, inner state, and the
    sets that are chosen and come into force later.
    """

    sets: dict[int, LeafMasks]
    memory: dict[int, Any]
    u: list[Array]
    inner: optax.OptState
    coming: dict[int, LeafMasks]


def _require_time(method: Method, delay: int) -> None:
    """Raises ValueError where a refresh would be due before the last is in force."""
    if delay < 0:
        raise ValueError(f"refresh_delay={delay} must be at least 0")
    if delay == 0:
        return
    if method.due is None:
        raise ValueError(f"refresh_delay={delay}: {method.name} never refreshes")
    if method.observe is not None:
        raise ValueError(
            f"refresh_delay={delay}: {method.name} keeps a memory that changes at every "
            "step, and would be chosen from one that is out of date"
        )
    due = np.flatnonzero(method.due(np.arange(100_000)))
    for one, two in pairwise(due.tolist()):
        if two - one <= delay:
            raise ValueError(
                f"refresh_delay={delay}: refreshes are due at steps {one} and {two}, "
                "before the masks of the first would be in force; choose a shorter "
                "delay, or refresh less often"
            )


def _view(
    site: Site,
    value: Array,
    sets: LeafMasks,
    grad: Array,
    seed: Array,
    step: Any,
    memory: Any = (),
    learning_rate: Scalar | None = None,
) -> MaskedLeaf:
    return MaskedLeaf(
        value=value,
        forward=sets.forward,
        backward=sets.backward,
        grad=grad,
        path=site.path,
        grid=site.grid,
        counts=site.counts,
        key=_trees.leaf_key(seed, site.path, step),
        memory=memory,
        learning_rate=learning_rate,
    )


def _on(mask: Array, x: Array) -> Array:
    return jnp.where(mask, x, jnp.zeros_like(x))


def _add(theta: list[Array], u: list[Array]) -> list[Array]:
    """As optax.apply_updates."""
    return [(t + d).astype(t.dtype) for t, d in zip(theta, u, strict=True)]


def _scatter(treedef: Any, by_index: dict[int, Any]) -> PyTree:
    """A tree like the parameters, None where an index is left out."""
    return treedef.unflatten([by_index.get(i) for i in range(treedef.num_leaves)])


def _as_trees(
    treedef: Any, sets: dict[int, LeafMasks], probe: dict[int, Array]
) -> Masks:
    return Masks(
        _scatter(treedef, {i: s.forward for i, s in sets.items()}),
        _scatter(treedef, {i: s.backward for i, s in sets.items()}),
        _scatter(treedef, probe),
    )


def _pairs(treedef: Any, sets: dict[int, LeafMasks]) -> Masks:
    """As the state keeps them, apart from the masks that are in force."""
    return _as_trees(treedef, sets, {})


def _read_pairs(treedef: Any, masks: Masks) -> dict[int, LeafMasks]:
    forward, backward = (treedef.flatten_up_to(tree) for tree in masks[:2])
    pairs = enumerate(zip(forward, backward, strict=True))
    return {i: LeafMasks(*pair) for i, pair in pairs if pair[0] is not None}


def _reset(
    state: PyTree, fresh: PyTree, params: list[Parameter], changed: dict[int, Array]
) -> PyTree:
    """Slots of the inner optimizer, as in `fresh` where entries enter or leave B."""
    leaves, treedef = _trees.flatten(state)
    news = treedef.flatten_up_to(fresh)
    owners = _trees.slots(state, params)
    return treedef.unflatten(
        [
            jnp.where(changed[owner], new, old) if owner in changed else old
            for old, new, owner in zip(leaves, news, owners, strict=True)
        ]
    )

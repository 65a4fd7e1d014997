"""The optax transformation: one update of an always-sparse network, on one screen."""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from topkast_jax import _trees, faults, packed
from topkast_jax import plan as plan_lib
from topkast_jax import sets as sets_lib
from topkast_jax._trees import AxesRules, Parameter
from topkast_jax._types import (
    LeafMasks,
    Method,
    Methods,
    PyTree,
    Schedule,
    SparseState,
)
from topkast_jax.layouts.masked import MaskedLeaf
from topkast_jax.plan import Group, Site
from topkast_jax.transformation import LAYOUTS, Recipe, Reset, Sparse


def sparse(
    inner: optax.GradientTransformation,
    method: Methods,
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
      method: `tk.top_kast(...)`, `tk.rigl(...)`, ...; or `tk.groups([...])` of them.
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
      An optax transformation; its `update` needs `params`. It takes `stats`, a tree like
      the parameters, for methods that read statistics of activations (`tk.gse`), from
      `tk.taps`.
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
    for one in [method] if isinstance(method, Method) else method.methods:
        if one.needs_learning_rate and learning_rate is None:
            raise ValueError(
                f"{one.name}: what it adds to an update is scaled by the learning rate; "
                "pass tk.sparse(..., learning_rate=...), the inner optimizer's"
            )
        if layout != "masked" and not one.fixed:
            raise ValueError(
                f"layout={layout!r}: {one.name} changes how many entries a parameter "
                'keeps, and packed arrays have one size; use layout="masked"'
            )
        if layout != "masked" and one.entrywise:
            raise ValueError(
                f"layout={layout!r}: {one.name} remembers something of every entry, and "
                'packed arrays hold those of B alone; use layout="masked"'
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
        groups = plan_lib.groups(method, rules, flat)
        sites = [site for group in groups for site in group.sites]
        for site in sites:
            value = jnp.asarray(flat[site.index].array)
            nothing = LeafMasks(*[jnp.zeros_like(value, bool)] * 2)
            leaf = sets_lib.view(site, value, nothing, value, key_seed, 0)
            sets[site.index], memory[site.index] = site.method.init(leaf)

        def view(site: Site) -> MaskedLeaf:
            i = site.index
            value = jnp.asarray(flat[i].array)
            return sets_lib.view(site, value, sets[i], value, key_seed, 0, memory[i])

        landed = [jnp.asarray(p.array) for p in flat]
        for site in sites:  # where the first update will put the parameters
            if not site.method.reservoir:
                i = site.index
                landed[i] = _on(sets_lib.kept(site, sets), landed[i])
        reservoirs = {s.index: jnp.asarray(s.method.reservoir) for s in sites}
        return SparseState(
            sparse_step=jnp.int32(0),
            sparse_seed=key_seed,
            sparse_masks=sets_lib.as_trees(
                treedef, sets, sets_lib.probes(groups, view, 0)
            ),
            sparse_memory=sets_lib.tree_of(treedef, memory),
            sparse_reservoir=sets_lib.tree_of(treedef, reservoirs),
            leaks=jnp.int32(0),
            nonfinite_step=jnp.int32(-1),
            nonfinite_leaf=jnp.uint32(0),
            nonfinite_count=jnp.int32(0),
            sparse_inner=inner.init(treedef.unflatten(landed)),
            sparse_next=sets_lib.pairs(treedef, sets) if refresh_delay else None,
        )

    def update_fn(
        updates: PyTree,
        state: SparseState,
        params: PyTree = None,
        *,
        stats: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError(
                "tk.sparse: update needs the parameters: "
                "tx.update(grads, opt_state, params)"
            )
        flat, treedef = _trees.parameters(params)
        groups = plan_lib.groups(method, rules, flat)
        sites = [site for group in groups for site in group.sites]
        theta = [jnp.asarray(p.array) for p in flat]
        raw = treedef.flatten_up_to(updates)
        sets, probe = sets_lib.read_sets(treedef, state.sparse_masks)
        memory_ = treedef.flatten_up_to(state.sparse_memory)
        memory = {site.index: memory_[site.index] for site in sites}
        given = sets_lib.statistics((g.method for g in groups), treedef, stats)
        step = state.sparse_step

        def view(site: Site, value: Array, at: Any, now: Any = None) -> MaskedLeaf:
            i = site.index
            return sets_lib.view(
                site,
                value,
                (now.sets if now else sets)[i],
                grads[i],
                state.sparse_seed,
                at,
                (now.memory if now else memory)[i],
                recipe.rate(step),
                given[i],
                probe[i],
            )

        def off_mask(site: Site, dtype: Any) -> Array:
            """What moves a weight to where it belongs off B: nowhere, or to zero."""
            value = theta[site.index]
            rest = jnp.zeros_like(value) if site.method.reservoir else -value
            return rest.astype(dtype)

        def landed(site: Site, sets: Mapping[int, LeafMasks], u: Array) -> Array:
            """An update on B; the rest stays, or goes to zero off the mask."""
            mine, off = sets[site.index], off_mask(site, u.dtype)
            if site.method.fixed:
                return jnp.where(mine.backward, u, off)
            rest = jnp.where(sets_lib.kept(site, sets), jnp.zeros_like(u), off)
            return jnp.where(mine.backward, u, rest)

        # 1. The gradient on B and P. Anything nonzero elsewhere is a leak.
        grads = {}
        odd = {i: faults.count(g) for i, g in enumerate(raw) if i not in sets}
        for site in sites:
            i, seen = site.index, sets[site.index].backward
            seen = seen if probe[i] is None else seen | probe[i]
            odd[i] = faults.count(raw[i], seen)
            grads[i] = _on(seen, raw[i])
            if site.method.observe is not None:
                memory[i] = site.method.observe(grads[i], memory[i], step)

        # 2. The inner optimizer sees B, with the method's own penalty.
        inward = list(raw)
        for site in sites:
            i, backward = site.index, sets[site.index].backward
            inward[i] = _on(backward, grads[i])
            if site.method.penalty is not None:
                pull = site.method.penalty(view(site, theta[i], step))
                inward[i] += _on(backward, pull).astype(raw[i].dtype)
        outward, inner_state = inner.update(
            treedef.unflatten(inward), state.sparse_inner, params, **extra
        )

        # 3. and 4. Its update counts on B only; without a reservoir, the rest lands on 0.
        u = treedef.flatten_up_to(outward)
        for site in sites:
            i = site.index
            if site.method.adjust is not None:
                u[i] = site.method.adjust(u[i], view(site, theta[i], step), memory[i])
            u[i] = landed(site, sets, u[i])

        # 5. and 6. Masks of the next step, from the parameters after this one. With a
        # reservoir a refresh leaves u alone, so this is what apply_updates makes:
        # computed once, without writing u. Else it would be one more array every step.
        everywhere = all(site.method.reservoir for site in sites)
        ahead = _add(theta, u) if everywhere else None

        def chosen(group: Group, operand: _Moving) -> _Moving:
            moved = ahead or _add(theta, operand.u)
            choose = group.method.across or sets_lib.one_by_one(group.method)
            leaves: list[Any] = [
                view(site, moved[site.index], step + 1, operand) for site in group.sites
            ]
            memories = [operand.memory[site.index] for site in group.sites]
            coming, kept = dict(operand.coming), dict(operand.memory)
            new_u = list(operand.u)
            found = choose(leaves, memories, step + 1)
            for site, (masks, own) in zip(group.sites, found, strict=True):
                i = site.index
                coming[i], kept[i] = masks._replace(fresh=None), own
                if masks.fresh is not None:
                    zeroed = -theta[i].astype(new_u[i].dtype)
                    new_u[i] = jnp.where(masks.fresh, zeroed, new_u[i])
            return operand._replace(coming=coming, memory=kept, u=new_u)

        def in_force(group: Group, operand: _Moving) -> _Moving:
            new_sets, new_u = dict(operand.sets), list(operand.u)
            for site in group.sites:
                i = site.index
                new_sets[i] = operand.coming[i]
                if not site.method.reservoir:
                    new_u[i] = landed(site, new_sets, operand.u[i])
            new_inner = operand.inner
            if reset == "init":
                fresh = inner.init(treedef.unflatten(_add(theta, new_u)))
                changed = {
                    s.index: sets_lib.changed(s, operand.sets, new_sets)
                    for s in group.sites
                }
                new_inner = _reset(new_inner, fresh, flat, changed)
            return operand._replace(sets=new_sets, u=new_u, inner=new_inner)

        def refreshed(group: Group, operand: _Moving) -> _Moving:
            return in_force(group, chosen(group, operand))

        def if_finite(change: Any, group: Group, operand: _Moving) -> _Moving:
            moved = ahead or _add(theta, operand.u)
            finite = [jnp.all(jnp.isfinite(moved[s.index])) for s in group.sites]
            turn = partial(change, group)
            return faults.when(jnp.stack(finite).all(), turn, operand)

        bad = jnp.stack([odd[i][0] for i in range(len(raw))])
        leaked = jnp.stack([leak for _, leak in odd.values()]).any()
        coming = (
            sets_lib.read_sets(treedef, state.sparse_next)[0] if refresh_delay else sets
        )
        after = _Moving(sets, memory, u, inner_state, coming)
        for group in groups:
            if group.method.due is None:
                continue
            now = sets_lib.is_due(group.method, step + 1) & (bad == 0).all()
            change = refreshed
            if refresh_delay:
                began = step + 1 - refresh_delay
                lands = sets_lib.is_due(group.method, began) & (began > 0)
                after = faults.when(lands, partial(in_force, group), after)
                change = chosen
            after = faults.when(now, partial(if_finite, change, group), after)

        def coming_view(site: Site) -> MaskedLeaf:
            return view(site, theta[site.index], step + 1, after)

        return treedef.unflatten(after.u), SparseState(
            sparse_step=jnp.asarray(optax.safe_increment(step)),
            sparse_seed=state.sparse_seed,
            sparse_masks=sets_lib.as_trees(
                treedef, after.sets, sets_lib.probes(groups, coming_view, step + 1)
            ),
            sparse_memory=sets_lib.tree_of(treedef, after.memory),
            sparse_reservoir=state.sparse_reservoir,
            leaks=state.leaks + leaked.astype(jnp.int32),
            **faults.first_nonfinite(state, flat, bad),
            sparse_inner=after.inner,
            sparse_next=sets_lib.pairs(treedef, after.coming)
            if refresh_delay
            else None,
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


def _require_time(methods: Methods, delay: int) -> None:
    """Raises ValueError where a refresh would be due before the last is in force."""
    if delay < 0:
        raise ValueError(f"refresh_delay={delay} must be at least 0")
    if delay == 0:
        return
    every = [methods] if isinstance(methods, Method) else methods.methods
    if all(method.due is None for method in every):
        raise ValueError(f"refresh_delay={delay}: {methods.name} never refreshes")
    for method in every:
        if method.observe is not None:
            raise ValueError(
                f"refresh_delay={delay}: {method.name} keeps a memory that changes at "
                "every step, and would be chosen from one that is out of date"
            )
        due = np.flatnonzero(sets_lib.is_due(method, np.arange(100_000)))
        for one, two in pairwise(due.tolist()):
            if two - one <= delay:
                raise ValueError(
                    f"refresh_delay={delay}: refreshes are due at steps {one} and "
                    f"{two}, before the masks of the first would be in force; choose a "
                    "shorter delay, or refresh less often"
                )


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


def _on(mask: Array, x: Array) -> Array:
    return jnp.where(mask, x, jnp.zeros_like(x))


def _add(theta: list[Array], u: list[Array]) -> list[Array]:
    """As optax.apply_updates."""
    return [(t + d).astype(t.dtype) for t, d in zip(theta, u, strict=True)]

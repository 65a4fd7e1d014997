"""The refresh of packed arrays: on the host, between two updates, or beside them."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax import _trees
from topkast_jax._types import PyTree
from topkast_jax.job import Choice, Job
from topkast_jax.layouts.store import Store
from topkast_jax.moments import moved, on_mesh
from topkast_jax.packing import indexed, recipe_for, state_of, taken, wide


class Chosen(NamedTuple):
    """Masks that a thread is choosing; from `choose`, for `refresh`.

    Attributes:
      choices: by the place of the parameter in the flattened tree.
      step: updates made when it began.
    """

    choices: "Future[dict[int, Choice]]"
    step: int


def choose(
    tx: optax.GradientTransformation,
    theta: PyTree,
    opt_state: optax.OptState,
    store: Store,
    found: PyTree = None,
) -> Chosen:
    """Begins to choose A and B in a thread, from the parameters as they are now.

    Training goes on meanwhile; `refresh(..., chosen=...)`, `refresh_delay` updates later,
    puts the masks in force. Only the copy of B to the host is waited for.

    Args:
      tx: `tk.sparse(..., layout="packed", refresh_delay=d)`.
      theta: the packed parameters.
      opt_state: the state that came with them.
      store: from `tk.start`; not to be touched until the refresh.
      found: what `tk.probe` returned, for methods that grow by gradient.
    Raises:
      ValueError: NaN or Inf in theta, named by path.
    Example:
      >>> import topkast_jax as tk
      >>> method = tk.top_kast(0.5, 0.25, refresh=tk.every(10))
      >>> tx = tk.sparse(optax.sgd(0.1), method, layout="packed", refresh_delay=2)
      >>> theta, state, store = tk.start(tx, {"kernel": jnp.arange(4.0).reshape(2, 2)})
      >>> [step for step in range(30) if tk.due(tx, step)]
      [12, 22]
      >>> chosen = choose(tx, theta, state, store)  # before steps 10 and 20
      >>> theta, state, store = tk.refresh(tx, theta, state, store, chosen=chosen)
      >>> theta["kernel"].tolist()
      [2.0, 3.0, 1.0]
    """
    recipe = recipe_for(tx, "tk.choose")
    job = Job(recipe, theta, opt_state, found)
    pool = ThreadPoolExecutor(1, thread_name_prefix="topkast-refresh")
    choices = pool.submit(job.select, recipe, store)
    pool.shutdown(wait=False)
    return Chosen(choices, job.step)


def refresh(
    tx: optax.GradientTransformation,
    theta: PyTree,
    opt_state: optax.OptState,
    store: Store,
    found: PyTree = None,
    chosen: Chosen | None = None,
) -> tuple[PyTree, optax.OptState, Store]:
    """Chooses A and B anew, and replaces the packed arrays.

    Writes B back to the reservoir, selects there, and ships the new B. Moments of
    entries that stay in B go with them; those of entries that enter are what
    `inner.init` gives them (`reset="keep"` has no meaning here: what is not in B has no
    moments). Arrays that lie on a mesh are put back where they were. Of several
    processes, all of them call it, and each does so for the slices that its devices hold.

    Args:
      tx: `tk.sparse(..., layout="packed")`.
      theta: the packed parameters, after an update.
      opt_state: the state that the update returned.
      store: from `tk.start`; written in place.
      found: what `tk.probe` returned, for methods that grow by gradient.
      chosen: what `choose` began, some updates ago; None chooses now.
    Returns:
      theta, opt_state and store, for the coming step.
    Raises:
      ValueError: NaN or Inf in theta, named by path, or a method that never refreshes;
        nothing has been changed then.
    """
    recipe = recipe_for(tx, "tk.refresh")
    if recipe.method.due is None:
        raise ValueError(
            f"tk.refresh: {recipe.method.name} never refreshes; see tk.due"
        )
    job = Job(recipe, theta, opt_state, found)
    if chosen is None:
        choices = job.select(recipe, store)
    else:
        choices = chosen.choices.result()
        job.write_back(store)  # the values of B as they are by now
    new_theta = [p.array for p in job.flat]
    memory, leaving = list(job.memory), {}
    indices = dict(job.indices)
    for i, choice in choices.items():
        site, new, source = job.sites[i], choice.numbers, choice.source
        if site.method.reservoir:
            new_theta[i] = taken(job.units(i, store), new, job.shares[i])
            leaving[site.path] = job.left(i, source)
        else:
            value = job.values[i]
            shipped = np.take_along_axis(value, wide(np.maximum(source, 0), value), 1)
            shipped[source < 0] = 0
            new_theta[i] = job.shares[i].place(shipped)
        indices[i] = indexed(new, choice.masks, job.shares[i], recipe)
        memory[i] = jax.tree.map(jnp.asarray, choice.memory)
    if leaving and store.journal is not None:
        store.journal.append(leaving)
    packed = job.treedef.unflatten(new_theta)
    state = job.state
    kept = dict(enumerate(memory))
    lies = None
    if any(map(on_mesh, jax.tree.leaves(packed))):
        lies = jax.tree.map(
            lambda x: x.sharding if on_mesh(x) else None, state.sparse_inner
        )
    fresh = state_of(
        recipe, state.sparse_seed, job.treedef, indices, kept, packed, lies
    )
    moves = {
        i: job.shares[i].place(choice.source.astype(np.int32))
        for i, choice in choices.items()
    }
    slots = moved(state.sparse_inner, fresh.sparse_inner, job.flat, moves)
    new_state = state._replace(
        sparse_masks=fresh.sparse_masks._replace(probe=state.sparse_masks.probe),
        sparse_memory=job.treedef.unflatten(memory),
        sparse_inner=slots,
    )
    after = (packed, _trees.replace_state(opt_state, new_state))
    return *_placed_like(after, (theta, opt_state)), store


def _placed_like(new: PyTree, old: PyTree) -> PyTree:
    """Puts arrays where those that they replace were."""
    return jax.tree.map(
        lambda x, was: jax.device_put(x, was.sharding) if was.committed else x, new, old
    )

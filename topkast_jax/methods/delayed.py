"""A dense beginning for any method."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from topkast_jax._types import Due, Leaf, LeafMasks, Memory, Method, Schedule
from topkast_jax.methods.initial import everything


def delayed(method: Method, start: int) -> Method:
    """A method that begins at step `start`; before, the network is dense.

    A = B = everything before `start`; at `start` the method makes its first masks, from
    the weights as they are then, and goes on as if that were its step 0: its refreshes
    and schedules count from there. `init="magnitude"` keeps the largest of the trained
    weights; the default of several methods, "random", does not look at them.

    Corner cases: the method's penalty acts before `start` too, as on A. A method that
    looks first (`tk.snip`) looks from `start` on.

    Args:
      method: any method but one that adjusts updates.
      start: a step, at least 1.
    Returns:
      A `Method`, for layout="masked": its sets change in size.
    Raises:
      ValueError: a start below 1, or a method whose rule for updates cannot be put off.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> later = tk.delayed(tk.set_(0.75, init="magnitude"), 2)
      >>> tx = tk.sparse(optax.sgd(0.1), later)
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> state, left = tx.init(params), []
      >>> for _ in range(4):
      ...     left.append(int(tk.masks(state).forward["kernel"].sum()))
      ...     _, state = tx.update(params, state, params)
      >>> left
      [16, 16, 4, 4]
    """
    if start < 1:
        raise ValueError(f"delayed: start={start} must be at least 1")
    if method.adjust is not None:
        raise ValueError(
            f"delayed: {method.name} changes every update by a rule of its own, which "
            "knows no beginning; start it from a checkpoint of a dense run"
        )

    def due(step: Any) -> Any:
        begins = step == start
        if method.due is None:
            return begins
        return begins | ((step > start) & method.due(step - start))

    def init_masks(leaf: Leaf) -> tuple[LeafMasks, Memory]:
        sets, memory = method.init(leaf)
        full = everything(leaf)
        shrink = jax.tree.map(jnp.zeros_like, sets.shrink)
        return LeafMasks(full, full, shrink), memory

    def refresh(leaf: Leaf, memory: Memory, step: Any) -> tuple[LeafMasks, Memory]:
        return lax.cond(
            step == start,
            lambda: method.init(leaf),
            lambda: method.refresh(leaf, memory, step - start),
        )

    def across(leaves: list[Any], memories: list[Memory], step: Any) -> Any:
        assert method.across is not None  # only used then
        choose = method.across
        return lax.cond(
            step == start,
            lambda: [method.init(leaf) for leaf in leaves],
            lambda: choose(leaves, memories, step - start),
        )

    def candidates(leaf: Leaf, memory: Memory, step: Any) -> Any:
        assert method.candidates is not None
        return method.candidates(leaf, memory, step - start)

    def penalty(leaf: Any) -> Any:
        assert method.penalty is not None
        since = jnp.maximum(leaf.step - start, 0)
        return method.penalty(dataclasses.replace(leaf, step=since))

    def observe(grad: Any, memory: Memory, step: Any) -> Memory:
        assert method.observe is not None
        return method.observe(grad, memory, jnp.maximum(step - start, 0))

    follows = method.follows
    if follows is not None:
        follows = follows._replace(
            forward=_later(follows.forward, start),
            backward=_later(follows.backward, start),
        )

    probe = method.probe
    if callable(probe):
        seen: Due = probe

        def probe(step: Any) -> Any:
            return (step >= start) & seen(step - start)

    return method._replace(
        init=init_masks,
        refresh=refresh,
        due=due,
        across=None if method.across is None else across,
        candidates=None if method.candidates is None else candidates,
        penalty=None if method.penalty is None else penalty,
        observe=None if method.observe is None else observe,
        probe=probe,
        follows=follows,
        fixed=False,
        note=f"dense before step {start}"
        + (f"; then {method.note}" if method.note else ""),
    )


def _later(sparsity: float | Schedule, start: int) -> float | Schedule:
    """A schedule that counts from a step; a number stays."""
    if not callable(sparsity):
        return sparsity
    schedule = sparsity
    return lambda step: schedule(jnp.maximum(step - start, 0))

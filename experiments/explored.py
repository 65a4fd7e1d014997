"""How much of the weights a run has ever used: A of every step, remembered.

Top-KAST's figure 3 (Jayakumar et al., 2020, arXiv 2106.03517, section 4): the share of
the weights outside the first A, the reservoir, that have been in A since. Masked layout
only, since packed masks change outside of the update.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk

PyTree = Any


class ExploredState(NamedTuple):
    """State of `remembering`.

    Attributes:
      explored_first: A of step 0; a bool array for each sparse parameter.
      explored_ever: what has been in A so far, likewise.
      explored_inner: state of the transformation inside.
    """

    explored_first: PyTree
    explored_ever: PyTree
    explored_inner: optax.OptState


def remembering(tx: tk.Sparse) -> tk.Sparse:
    """A masked transformation that remembers what was ever in A: two bytes a weight.

    Updates pass as they are, and what is remembered is a part of the state, so that a
    checkpoint keeps it and a run that goes on does not lose it.
    """

    def init(params: PyTree) -> ExploredState:
        inner = tx.init(params)
        # Copies: each array of the state is donated once.
        first, ever = (
            jax.tree.map(jnp.copy, tk.masks(inner).forward) for _ in range(2)
        )
        return ExploredState(first, ever, inner)

    def update(
        grads: PyTree, state: ExploredState, params: PyTree = None, **more: Any
    ) -> tuple[PyTree, ExploredState]:
        updates, inner = tx.update(grads, state.explored_inner, params, **more)
        ever = tk.metrics.ever_active(state.explored_ever, tk.masks(inner))
        return updates, ExploredState(state.explored_first, ever, inner)

    return tk.Sparse(init, update, tx.recipe)


def measured(opt_state: optax.OptState) -> dict[str, float]:
    """`reservoir_used` for a row of the log; empty where nothing is remembered."""
    if not isinstance(opt_state, ExploredState):
        return {}
    used = jax.jit(tk.metrics.reservoir_used)
    return {
        "reservoir_used": float(used(opt_state.explored_first, opt_state.explored_ever))
    }

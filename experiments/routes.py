"""How the sparse layers of a packed run are multiplied, in words for the printed plan."""

import jax
import optax

import topkast_jax as tk
from experiments import packing
from experiments import state as states
from experiments.tasks import Task

ALL_EXPANDED = "every sparse layer is expanded just before its product"
SMALL = "expanded: single entries, or blocks too small for products of their own"


def described(task: Task, tx: optax.GradientTransformation, key: jax.Array) -> str:
    """A line for each sparse layer, or one for all where all are expanded.

    From shapes; nothing is computed.

    Args:
      task: gives the routes of its model.
      tx: a transformation of a packed layout.
      key: as `task.init` takes it.
    """
    if task.routes is None:
        return f"{ALL_EXPANDED}: the model of this task takes dense kernels"
    abstract = packing.abstract(task, tx, key)

    def alpha(params: object, opt_state: object) -> object:
        return states.alpha(params, opt_state, True, by_unit=True)

    found = task.routes(jax.eval_shape(alpha, abstract.params, abstract.opt_state))
    indices = jax.tree.leaves(
        tk.masks(abstract.opt_state).forward,
        is_leaf=lambda node: isinstance(node, tk.Index),
    )
    by_unit = any(index.multiplied for index in indices)
    if not by_unit and set(found.values()) == {"expanded"}:
        return ALL_EXPANDED
    width = max(map(len, found))
    lines = [
        f"{path:<{width}}  {SMALL if route == 'expanded' else route}"
        for path, route in found.items()
    ]
    return "\n".join(["how each sparse layer is multiplied:", *lines])

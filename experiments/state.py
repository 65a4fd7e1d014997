"""What training carries from step to step, and the step itself."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import topkast_jax as tk
from experiments import devices
from experiments import mesh as meshes
from experiments.accumulate import in_parts
from experiments.tasks import Task

PyTree = Any


class State(NamedTuple):
    """Everything a step reads and replaces.

    Attributes:
      params: theta, the reservoir included.
      opt_state: of the transformation, masks included where it is sparse.
      carry: what the task hands on from batch to batch; rows are axis 0.
      ema: moving average of alpha, dense arrays; () where the config wants none.
    """

    params: PyTree
    opt_state: PyTree
    carry: PyTree
    ema: PyTree = ()


Measures = dict[str, jax.Array]
StepFn = Callable[[State, Mapping[str, jax.Array], jax.Array, Any], Any]


def is_sparse(opt_state: PyTree) -> bool:
    """Whether a state of `tk.sparse` is inside; arrays or ShapeDtypeStructs."""
    try:
        tk.masks(opt_state)
    except ValueError:
        return False
    return True


def is_packed(opt_state: PyTree) -> bool:
    """Whether masks are lists of positions, which no update changes."""
    forward = tk.masks(opt_state).forward
    nodes = jax.tree.leaves(forward, is_leaf=lambda x: isinstance(x, tk.Index))
    return any(isinstance(node, tk.Index) for node in nodes)


def alpha(
    params: PyTree, opt_state: PyTree, sparse: bool, by_unit: bool = False
) -> PyTree:
    """The weights that the model uses, differentiable; packed ones expanded, or not."""
    if not sparse:
        return params
    return tk.sparsify(params, tk.masks(opt_state), expanded=not by_unit)


def initial(
    task: Task, tx: optax.GradientTransformation, *, averaged: bool = False
) -> Callable[..., State]:
    """`(key, given=None) -> State` of step 0, to run under jit with its shardings.

    `given` are parameters in place of random ones; `averaged` adds a moving average of
    alpha, which begins as alpha.
    """

    def init(key: jax.Array, given: PyTree = None) -> State:
        params, carry = task.init(key)
        params = params if given is None else given
        opt_state = tx.init(params)
        ema = alpha(params, opt_state, is_sparse(opt_state)) if averaged else ()
        return State(params, opt_state, carry, ema)

    return init


def shardings(mesh: Mesh, rules: Iterable[meshes.Rule], abstract: State) -> State:
    """Sharding of every array of a state.

    Parameters by the rules, the optimizer state like the parameters it belongs to, their
    average like them, the carry by its rows, everything else on every device.

    Args:
      mesh: from `mesh.make`.
      rules: see `mesh.parameter_shardings`.
      abstract: ShapeDtypeStructs.
    Raises:
      ValueError: rules that do not fit, or a mesh that does not divide the rows.
    """
    everywhere = meshes.replicated(mesh)
    params = dense_shardings(mesh, rules, abstract)
    if is_sparse(abstract.opt_state) and is_packed(abstract.opt_state):
        params = tk.packed_shardings(tk.masks(abstract.opt_state), params)
    opt_state = tk.state_shardings(
        abstract.opt_state, abstract.params, params, everywhere
    )
    carry = meshes.batch_shardings(mesh, abstract.carry, "carry")
    ema = params if jax.tree.leaves(abstract.ema) else ()
    return State(params, opt_state, carry, ema)


def dense_shardings(
    mesh: Mesh, rules: Iterable[meshes.Rule], abstract: State
) -> PyTree:
    """Shardings that the parameters would have in their dense form; see `shardings`."""
    dense, cut = _dense(abstract)
    return meshes.parameter_shardings(mesh, rules, dense, cut)


def _dense(abstract: State) -> tuple[PyTree, dict[str, int] | None]:
    """Shapes of the dense parameters, and in packed layouts axes cut into groups."""
    if not (is_sparse(abstract.opt_state) and is_packed(abstract.opt_state)):
        return abstract.params, None
    cut = {}

    def one(keys: Any, index: Any, leaf: Any) -> Any:
        if not isinstance(index, tk.Index):
            return leaf
        if index.grid.cut is not None:
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            cut[path] = index.grid.cut
        return jax.ShapeDtypeStruct(index.grid.shape, leaf.dtype)

    forward = tk.masks(abstract.opt_state).forward
    dense = jax.tree_util.tree_map_with_path(
        one,
        forward,
        abstract.params,
        is_leaf=lambda x: x is None or isinstance(x, tk.Index),
    )
    return dense, cut


def placed(abstract: PyTree, shardings: PyTree) -> PyTree:
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda x, s: x.update(sharding=s), abstract, shardings)


def step(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    sparse: bool,
    shardings: State | None = None,
    parts: int = 1,
    decay: float = 0.0,
) -> StepFn:
    """`(state, batch, key, step) -> (state, measures)`, pure.

    A step with NaN or Inf in its loss or gradient changes nothing: the state comes back
    as it was, and `measures["bad"]` counts what was not finite. What to do about it is
    the loop's business, and may wait until the loop looks.

    Args:
      task: gives the loss.
      tx: the transformation, `tk.sparse(...)` or any of optax.
      sparse: whether `tx` holds a `tk.sparse`.
      shardings: of a packed state; its gradients are then made device by device, and
        travel as they are stored.
      parts: into how many the batch is cut, one after the other, for one update
        (gradient accumulation).
      decay: of the moving average of alpha, where the state has one.
    Returns:
      The step. `key` is the run's, `step` an int32 scalar; both are folded together.
      Measures are scalars, but for `bad`: int32, entries that are NaN or Inf in the
      loss, then in each gradient, then in each new parameter, in flattening order. The
      last are zero unless a finite gradient made an update that is not.
    """

    def run(
        state: State, batch: Mapping[str, jax.Array], key: jax.Array, step: Any
    ) -> tuple[State, Measures]:
        def gradient(carry: PyTree, batch: Any, here: jax.Array, share: Any) -> Any:
            def objective(theta: PyTree, zeros: PyTree) -> Any:
                weights = alpha(theta, state.opt_state, sparse, task.by_unit)
                if sparse:
                    weights = tk.tap(weights, zeros, here)
                loss, rest = task.loss(weights, carry, batch, here)
                return loss * share, rest

            both = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
            return both(state.params, zeros)

        here = jax.random.fold_in(key, step)
        zeros = tk.taps(tx, state.params, state.opt_state) if sparse else None
        if shardings is not None:
            (loss, (carry, aux)), (grads, stats) = devices.gradient(
                task, shardings.params, *state[:3], batch, here, zeros
            )
        elif parts > 1:
            (loss, (carry, aux)), (grads, stats) = in_parts(
                gradient, parts, task.count, state.carry, batch, here
            )
        else:
            (loss, (carry, aux)), (grads, stats) = gradient(state.carry, batch, here, 1)
        more = {"stats": stats} if sparse else {}
        bad = _nonfinite([loss, *jax.tree.leaves(grads)])

        def update() -> State:
            updates, opt_state = tx.update(grads, state.opt_state, state.params, **more)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if jax.tree.leaves(ema):
                used = tk.export(params, opt_state) if sparse else params
                ema = optax.incremental_update(used, ema, 1 - decay)
            return State(params, opt_state, carry, ema)

        # A branch, not a select: that would hold a second copy of the state.
        after = jax.lax.cond(jnp.sum(bad) == 0, update, lambda: state)
        bad = jnp.concatenate([bad, _nonfinite(jax.tree.leaves(after.params))])
        measures = {"loss": loss, **aux, "bad": bad}
        if sparse and not is_packed(state.opt_state):
            measures["churn"] = tk.metrics.churn(
                tk.masks(state.opt_state), tk.masks(after.opt_state)
            )
        elif sparse:
            measures["churn"] = jnp.float32(0)  # of a refresh, which the loop fills in
        return after, measures

    return run


def _nonfinite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.sum(~jnp.isfinite(x), dtype=jnp.int32) for x in arrays])


def compile_step(
    run: StepFn, shardings: State, state: State, *arguments: Any
) -> jax.stages.Compiled:
    """A step compiled for these arrays: others are an error, never a recompilation.

    Args:
      run: from `step`; it donates its state.
      shardings: of the state, before and after.
      state: arrays, or ShapeDtypeStructs with shardings.
      *arguments: batch, key and step.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    outputs = (shardings, meshes.replicated(mesh))
    jitted = jax.jit(run, donate_argnums=0, out_shardings=outputs)
    return jitted.lower(state, *arguments).compile()


def blame(bad: Any, params: PyTree) -> str:
    """Names what was not finite in one step, from its `measures["bad"]`."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    said = ["loss is NaN or Inf"] if bad[0] else []
    for what, counts in (("gradient", bad[1:]), ("new value", bad[1 + len(flat) :])):
        for (path, leaf), count in zip(flat, counts, strict=False):
            if count:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                said.append(f"{what} of {name}: {count} of {leaf.size} entries")
    more = f", and {len(said) - 2} more" if len(said) > 2 else ""
    return "; ".join(said[:2]) + more


def was_applied(bad: Any) -> bool:
    """Whether a step made its update all the same: its gradient was finite."""
    return not bad[: len(bad) // 2 + 1].any()

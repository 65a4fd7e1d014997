"""What a step costs beside the dense step of the same model, measured here and now."""

import statistics
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import topkast_jax as tk
from experiments import mesh as meshes
from experiments import state as states
from experiments.tasks import Task


def with_dense(
    task: Task,
    dense: optax.GradientTransformation,
    mesh: Mesh,
    rules: Iterable[meshes.Rule],
    step: jax.stages.Compiled,
    state: states.State,
    *arguments: Any,
    rounds: int,
) -> dict[str, float]:
    """Ratios of a sparse step to the dense one, run in turns on copies of the state.

    Args:
      task: gives the loss.
      dense: the optimizer without its sparse wrapper.
      mesh: where the state lives.
      rules: of the parameters.
      step: the compiled sparse step.
      state: what the run starts from; it is left as it is.
      *arguments: batch, key and step number, the same for every run.
      rounds: how many runs of each count; one of each goes before.
    Returns:
      `step_time` and `dense_step_time` in seconds, medians; `time_ratio`;
      `state_bytes_ratio` of parameters, masks and optimizer state; and, where the
      backend says, `memory_ratio` of all that a step holds on one device.
    """

    def init(key: Any) -> Any:
        params, _ = task.init(key)
        return params, dense.init(params)

    start = meshes.place_key(jax.random.key(0), mesh)
    carry = jax.eval_shape(lambda carry: carry, state.carry)
    abstract = states.State(*jax.eval_shape(init, start), carry)
    shardings = states.shardings(mesh, rules, abstract)
    dense_step = states.compile_step(
        states.step(task, dense, sparse=False),
        shardings,
        states.placed(abstract, shardings),
        *arguments,
    )
    made = jax.jit(init, out_shardings=shardings[:2])(start)
    dense_state = states.State(*made, state.carry)
    seconds = _in_turns(
        {
            "dense": (dense_step, jax.tree.map(jnp.copy, dense_state)),
            "sparse": (step, jax.tree.map(jnp.copy, state)),
        },
        arguments,
        rounds,
    )
    held = sum(tk.metrics.bytes_of(state.params, state.opt_state))
    dense_held = sum(tk.metrics.bytes_of(dense_state.params, dense_state.opt_state))
    found = {
        "step_time": seconds["sparse"],
        "dense_step_time": seconds["dense"],
        "time_ratio": seconds["sparse"] / seconds["dense"],
        "state_bytes_ratio": held / dense_held,
    }
    memory, dense_memory = _step_bytes(step), _step_bytes(dense_step)
    if memory and dense_memory:
        found["memory_ratio"] = memory / dense_memory
    return found


def _in_turns(
    steps: dict[str, tuple[jax.stages.Compiled, states.State]],
    arguments: tuple[Any, ...],
    rounds: int,
) -> dict[str, float]:
    state_of = {name: state for name, (_, state) in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, (step, _) in steps.items():
            start = time.perf_counter()
            state_of[name], measures = step(state_of[name], *arguments)
            jax.block_until_ready((state_of[name], measures))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _step_bytes(step: jax.stages.Compiled) -> int | None:
    analysis = step.memory_analysis()
    if analysis is None:
        return None
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )

"""From the words of a config to the transformation that trains."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

import topkast_jax as tk
from experiments import methods

Schedule = Callable[[Any], Any]


def learning_rate(config: Mapping[str, Any], steps: int) -> Schedule:
    """Linear warm-up to `peak`, then cosine decay to `end` at the last step.

    Args:
      config: `peak`, `warmup` (steps) and `end`.
      steps: length of the run.
    Raises:
      ValueError: a warm-up that is as long as the run, or a rate below zero.
    """
    peak, warmup, end = config["peak"], config["warmup"], config["end"]
    if min(peak, end) < 0:
        raise ValueError(f"learning_rate: peak={peak} and end={end} must be positive")
    if not 0 <= warmup < steps:
        raise ValueError(
            f"learning_rate.warmup={warmup} must be in [0, steps), and steps={steps}"
        )
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)


def inner(config: Mapping[str, Any], rate: Schedule) -> optax.GradientTransformation:
    """The optax optimizer `config["name"]`, behind a clip of the global norm.

    Args:
      config: `name`, of optax or optax.contrib; `clip`, 0 or left out for none; the
        rest are arguments of that optimizer.
      rate: schedule of the learning rate.
    Raises:
      ValueError: an unknown name, or an argument that it does not take.
    """
    arguments = dict(config)
    name, clip = config["name"], arguments.pop("clip", 0)
    del arguments["name"]
    if clip < 0:
        raise ValueError(f"optimizer.clip={clip} must be a norm, or 0 for no clip")
    optimizer = methods.call(
        "optimizer", name, _named(name), arguments, learning_rate=rate
    )
    # Inside the wrapper: outside of it the norm would jump where a method probes.
    return (
        optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer
    )


def sparse(
    config: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    rate: Schedule,
    *,
    steps: int,
    seed: int,
) -> tuple[optax.GradientTransformation, tk.Method | tk.Mixture | None]:
    """The optimizer under the sparse method that `config` names.

    Args:
      config: where wanted, `layout`, `reset`, `axes`, `refresh_delay`; the rest as
        `methods.build` takes it.
      optimizer: what to wrap.
      rate: the schedule inside `optimizer`, for a decoupled penalty.
      steps: length of the run: a refresh must fall within it.
      seed: of the random draws.
    Returns:
      The transformation and its method; for "dense", the optimizer itself and None.
    Raises:
      ValueError: an unknown method or argument, or a value that the library refuses.
    """
    arguments = dict(config)
    if config["method"] == "dense":
        del arguments["method"]
        methods.require_taken("sparse", "dense", arguments, {})
        return optimizer, None
    layout = arguments.pop("layout", "masked")
    arguments.pop("reservoir", None)  # of the loop, see experiments/assembly.py
    delay = arguments.pop("refresh_delay", 0)
    reset, axes = arguments.pop("reset", "init"), arguments.pop("axes", ())
    method = methods.build(arguments, steps)
    tx = tk.sparse(
        optimizer,
        method,
        layout=layout,
        seed=seed,
        reset=reset,
        axes=tk.axes(dict(axes)) if axes else None,
        learning_rate=rate,
        refresh_delay=delay,
    )
    return tx, method


def _named(name: str) -> Callable[..., Any]:
    for home in (optax, optax.contrib):
        found: Any = getattr(home, name, None)
        if callable(found) and "learning_rate" in inspect.signature(found).parameters:
            return found
    raise ValueError(
        f"optimizer.name={name!r} is no optimizer of optax or optax.contrib with a "
        "learning rate, such as adamw, sgd, lion, adafactor, rmsprop or muon"
    )

"""From the words of a config to the transformation that trains."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import optax

import topkast_jax as tk
from experiments import explored, methods

Schedule = Callable[[Any], Any]


def learning_rate(config: Mapping[str, Any], steps: int) -> Schedule:
    """Linear warm-up to `peak`, then what `schedule` says.

    "cosine", where it says nothing: a cosine to `end` at the last step. "steps": times
    `factor` at each of the steps in `boundaries`. "constant".

    Args:
      config: `peak`, `warmup` (steps), and what the schedule takes.
      steps: length of the run.
    Raises:
      ValueError: an unknown schedule, a warm-up or a boundary that is not within the
        run, or a rate below zero.
    """
    name, peak, warmup = (
        config.get("schedule", "cosine"),
        *_of(config, "peak", "warmup"),
    )
    if not 0 <= warmup < steps:
        raise ValueError(
            f"learning_rate.warmup={warmup} must be in [0, steps), and steps={steps}"
        )
    if peak < 0 or config.get("end", 0) < 0:
        raise ValueError(
            f"learning_rate: peak={peak} and end={config.get('end', 0)} must be positive"
        )
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup, steps, *_of(config, "end")
        )
    if name == "constant":
        after: Schedule = optax.constant_schedule(peak)
    elif name == "steps":
        boundaries, factor = _of(config, "boundaries", "factor")
        if list(boundaries) != sorted({b for b in boundaries if warmup < b < steps}):
            raise ValueError(
                f"learning_rate.boundaries={tuple(boundaries)} must rise, and lie "
                f"between warmup={warmup} and steps={steps}"
            )
        after = optax.piecewise_constant_schedule(
            peak, {boundary - warmup: factor for boundary in boundaries}
        )
    else:
        raise ValueError(
            f"learning_rate.schedule={name!r} must be cosine, steps or constant"
        )
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def _of(config: Mapping[str, Any], *keys: str) -> list[Any]:
    return [config[key] for key in keys]


def inner(
    config: Mapping[str, Any], rate: Schedule, penalized: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The optax optimizer `config["name"]`, behind a clip of the global norm.

    Weight decay is decoupled where the optimizer has an argument for it (adamw), else
    it is added to the gradient before the optimizer sees it (sgd), as L2 is.

    Args:
      config: `name`, of optax or optax.contrib; `clip`, 0 or left out for none;
        `weight_decay`, with `decay_where`, globs of the parameters that decay, comma
        separated ("": all), and `decay_penalized`, whether it also is for parameters
        for which the sparse method has a penalty, be it 0 (true where it says nothing);
        the rest are arguments of that optimizer.
      rate: schedule of the learning rate.
      penalized: paths of those parameters.
    Raises:
      ValueError: an unknown name, or an argument that it does not take.
    """
    arguments = dict(config)
    name, clip = config["name"], arguments.pop("clip", 0)
    del arguments["name"]
    if clip < 0:
        raise ValueError(f"optimizer.clip={clip} must be a norm, or 0 for no clip")
    where = arguments.pop("decay_where", "")
    left_out = () if arguments.pop("decay_penalized", True) else penalized
    mask = _decaying(where.split(",") if where else ["*"], left_out)
    factory = _named(name)
    taken = inspect.signature(factory).parameters
    steps: list[optax.GradientTransformation] = []
    # Inside the wrapper: outside of it the norm would jump where a method probes.
    if clip:
        steps.append(optax.clip_by_global_norm(clip))
    if "weight_decay" not in taken and (decay := arguments.pop("weight_decay", 0.0)):
        steps.append(optax.add_decayed_weights(decay, mask))
    of_mask = {"mask", "weight_decay_mask"} & taken.keys()
    if (where or left_out) and "weight_decay" in taken:
        arguments |= dict.fromkeys(of_mask, mask)
    steps.append(
        methods.call("optimizer", name, factory, arguments, learning_rate=rate)
    )
    return optax.chain(*steps) if len(steps) > 1 else steps[0]


def _decaying(globs: Sequence[str], left_out: Sequence[str]) -> Callable[[Any], Any]:
    """`params -> tree of bool`, for optax."""

    def one(keys: Any, _: Any) -> bool:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return path not in left_out and any(fnmatchcase(path, g) for g in globs)

    return lambda params: jax.tree_util.tree_map_with_path(one, params)


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
      config: where wanted, `layout`, `reset`, `axes`, `refresh_delay`, and
        `track_reservoir` (see `experiments.explored`); the rest as `methods.build`
        takes it.
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
    remember = arguments.pop("track_reservoir", False)
    if remember and layout != "masked":
        raise ValueError(
            f"sparse.track_reservoir=True needs layout=masked, not {layout!r}: packed "
            "masks change outside of the update"
        )
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
    return explored.remembering(tx) if remember else tx, method


def _named(name: str) -> Callable[..., Any]:
    for home in (optax, optax.contrib):
        found: Any = getattr(home, name, None)
        if callable(found) and "learning_rate" in inspect.signature(found).parameters:
            return found
    raise ValueError(
        f"optimizer.name={name!r} is no optimizer of optax or optax.contrib with a "
        "learning rate, such as adamw, sgd, lion, adafactor, rmsprop or muon"
    )

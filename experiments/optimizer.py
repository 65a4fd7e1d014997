"""From the words of a config to the transformation that trains."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

import topkast_jax as tk

Schedule = Callable[[Any], Any]
DISTRIBUTIONS = {
    "uniform": tk.uniform,
    "erdos_renyi": tk.erdos_renyi,
    "erk": tk.erk,
}

RAMP = {"start": 0.1, "stop": 0.75}
ANCHORS = {
    "magnitude": RAMP,
    "saliency": RAMP,
    "random_pruning": RAMP,
    "granet": RAMP,
    "one_shot": {"at": 0.5},
    "acdc": {"warmup": 0.1, "compressed": 0.05, "dense": 0.05, "last": 0.8},
}
"""Steps that a config may leave open (None), by method, as shares of the run."""


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
    optimizer = _call("optimizer", name, _named(name), arguments, learning_rate=rate)
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
) -> tuple[optax.GradientTransformation, tk.Method | None]:
    """The optimizer under the sparse method that `config` names.

    Args:
      config: `method`, a name in `tk.METHODS` or "dense"; where wanted, `reset`,
        `axes`, `where`, `distribution`, `structure`, `groups`, `groups_along`,
        `layout`, `refresh_delay`, `drop_decay`, `refresh` with `refresh_start` and
        `refresh_stop`, and `begin`, before which the network is dense and from which
        the method's steps count; the rest are arguments of the method. Those in
        `ANCHORS` may be None.
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
    name = config["method"]
    del arguments["method"]
    if name == "dense":
        _require_taken("sparse", name, arguments, {})
        return optimizer, None
    if name not in tk.METHODS:
        raise ValueError(
            f"sparse.method={name!r} is unknown; there are dense, "
            f"{', '.join(sorted(tk.METHODS))}"
        )
    factory = tk.METHODS[name]
    layout = arguments.pop("layout", "masked")
    arguments.pop("reservoir", None)  # of the loop, see experiments/assembly.py
    delay = arguments.pop("refresh_delay", 0)
    begin = arguments.pop("begin", None)
    if begin is not None:
        if not 1 <= begin < steps:
            raise ValueError(f"sparse.begin={begin} must be in [1, steps={steps})")
        steps -= begin
    reset, axes = arguments.pop("reset", "init"), arguments.pop("axes", ())
    where = arguments.pop("where", "")
    masks = None
    if str(arguments.get("init", "")).endswith(".npz"):
        masks = arguments["init"] = tk.load_masks(arguments["init"])
    distribution = arguments.get("distribution", "uniform")
    arguments["distribution"] = _distribution(distribution, masks)
    structure = _structure(arguments.get("structure", "unstructured"))
    along = arguments.pop("groups_along", "outputs")
    arguments["structure"] = tk.groups_of(
        arguments.pop("groups", 1),
        structure,
        along if isinstance(along, str) else dict(along),
    )
    arguments["where"] = where.split(",") if where else tk.kernels
    if "refresh" in arguments:
        arguments["refresh"] = _due(arguments, steps)
    if "drop_fraction" in arguments:
        decay = arguments.pop("drop_decay", "constant")
        arguments["drop_fraction"] = _drop(arguments["drop_fraction"], decay, steps)
    for key, share in ANCHORS.get(name, {}).items():
        if arguments.get(key) is None:
            arguments[key] = max(1, round(share * steps))
    for key in ("stop", "at", "warmup", "last", "batches"):
        value = arguments.get(key)
        if value is not None and value >= steps:
            never = "; None never stops" if name == "top_kast" else ""
            raise ValueError(
                f"sparse.{key}={value} never comes within steps={steps}{never}"
            )
    method = _call("sparse", name, factory, arguments)
    if begin is not None:
        method = tk.delayed(method, begin)
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


def _due(arguments: dict[str, Any], steps: int) -> Any:
    every = arguments["refresh"]
    start, stop = (
        arguments.pop("refresh_start", None),
        arguments.pop("refresh_stop", None),
    )
    if tk.first_due(tk.every(every, start, stop), steps) is None:
        raise ValueError(
            f"sparse.refresh={every} (start={start}, stop={stop}) never falls within "
            f"steps={steps}, so the masks would never change; refresh earlier, train "
            "longer, or say method=static"
        )
    # Masks chosen after the last step would be exported without ever being trained.
    return tk.every(every, start, steps if stop is None else min(stop, steps))


def _drop(fraction: float, decay: str, steps: int) -> float | Schedule:
    if decay not in ("constant", "cosine"):
        raise ValueError(f"sparse.drop_decay={decay!r} must be constant or cosine")
    if decay == "constant":
        return fraction
    return optax.cosine_decay_schedule(fraction, steps)


def _distribution(config: Any, masks: Any = None) -> Any:
    if config == "of_masks":
        if masks is None:
            raise ValueError(
                "sparse.distribution='of_masks' counts the entries of masks; name their "
                "file, sparse.init=masks.npz"
            )
        return tk.of_masks(masks)
    if isinstance(config, str):
        if config not in DISTRIBUTIONS:
            raise ValueError(
                f"sparse.distribution={config!r} is unknown; there are "
                f"{', '.join(DISTRIBUTIONS)}, or a mapping {{pattern: sparsity}}"
            )
        return DISTRIBUTIONS[config]
    return tk.by_path(dict(config))


def _structure(text: str) -> tk.Structure:
    """Reads "unstructured", "blocks:8x128", "fan_in", "fan_in:1x64" or "n_of_m:32"."""
    name, _, size = text.partition(":")
    sides = [int(side) for side in size.split("x") if side.isdecimal()]
    if text == "unstructured":
        return tk.unstructured
    if name == "blocks" and len(sides) == 2:
        return tk.blocks(*sides)
    if name == "fan_in" and (not size or len(sides) == 2):
        return tk.fan_in(*sides)
    if name == "n_of_m" and len(sides) == 1:
        return tk.n_of_m(*sides)
    raise ValueError(
        f"sparse.structure={text!r} is unknown; there are unstructured, blocks:8x128, "
        "fan_in, fan_in:1x64 and n_of_m:32, with sizes of one's own"
    )


def _named(name: str) -> Callable[..., Any]:
    for home in (optax, optax.contrib):
        found: Any = getattr(home, name, None)
        if callable(found) and "learning_rate" in inspect.signature(found).parameters:
            return found
    raise ValueError(
        f"optimizer.name={name!r} is no optimizer of optax or optax.contrib with a "
        "learning rate, such as adamw, sgd, lion, adafactor, rmsprop or muon"
    )


def _call(
    section: str,
    name: str,
    factory: Callable[..., Any],
    given: Mapping[str, Any],
    **more: Any,
) -> Any:
    """`factory(**given, **more)`, where `given` comes from that section of a config."""
    parameters = dict(inspect.signature(factory).parameters)
    for key in more:
        del parameters[key]
    _require_taken(section, name, given, parameters)
    for key, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        if needed and key not in given:
            raise ValueError(f"{section}.{key} is missing; {name} needs it")
    return factory(**given, **more)


def _require_taken(
    section: str, name: str, given: Mapping[str, Any], parameters: Mapping[str, Any]
) -> None:
    for key in given:
        if key not in parameters:
            raise ValueError(
                f"{section}.{key} is no argument of {name}; it takes "
                f"{', '.join(parameters) or 'none'}"
            )

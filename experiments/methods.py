"""A sparse method from a config, or several by the paths of parameters."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax
from optax import Schedule

import topkast_jax as tk

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


def build(config: Mapping[str, Any], steps: int) -> tk.Method | tk.Mixture:
    """The method that a config names.

    Args:
      config: `method`, a name in `tk.METHODS`; where wanted, `where`, `distribution`,
        `structure`, `groups`, `groups_along`, `drop_decay`, `refresh` with
        `refresh_start` and `refresh_stop`, and `begin`, before which the network is
        dense and from which the method's steps count; the rest are arguments of the
        method. Those in `ANCHORS` may be None. Or `method="rules"` and `rules`, pairs of
        a glob and "dense" or a mapping like this one: the first match wins.
      steps: length of the run: a refresh must fall within it.
    Raises:
      ValueError: an unknown method or argument, or a value that the library refuses.
    """
    arguments = dict(config)
    name = arguments.pop("method", None)
    if name == "rules":
        rules = arguments.pop("rules", ())
        require_taken("sparse", name, arguments, {"rules": None})
        return tk.groups([_rule(rule, steps) for rule in rules])
    if name not in tk.METHODS:
        raise ValueError(
            f"sparse.method={name!r} is unknown; there are dense, rules, "
            f"{', '.join(sorted(tk.METHODS))}"
        )
    factory = tk.METHODS[name]
    begin = arguments.pop("begin", None)
    if begin is not None:
        if not 1 <= begin < steps:
            raise ValueError(f"sparse.begin={begin} must be in [1, steps={steps})")
        steps -= begin
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
    last = arguments.get("refresh_stop") or steps
    if "refresh" in arguments:
        arguments["refresh"] = _due(arguments, steps)
    if "drop_fraction" in arguments:
        decay = arguments.pop("drop_decay", "constant")
        arguments["drop_fraction"] = _drop(arguments["drop_fraction"], decay, last)
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
    method = call("sparse", name, factory, arguments)
    if begin is not None:
        method = tk.delayed(method, begin)
    return method


def _rule(rule: Sequence[Any], steps: int) -> tuple[str, tk.Method | None]:
    pattern, given = rule
    if given == "dense":
        return pattern, None
    if not isinstance(given, Mapping):
        raise ValueError(
            f"sparse.rules: the rule for {pattern!r} has {given!r}; say 'dense', or a "
            "mapping with method= and its arguments"
        )
    method = build(given, steps)
    if not isinstance(method, tk.Method):
        raise ValueError(f"sparse.rules: the rule for {pattern!r} has rules of its own")
    return pattern, method


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


def _drop(fraction: float, decay: str, last: int) -> float | Schedule:
    """RigL's schedule (arXiv 1911.11134, section 3): 0 at `last`, its T_end."""
    if decay not in ("constant", "cosine"):
        raise ValueError(f"sparse.drop_decay={decay!r} must be constant or cosine")
    if decay == "constant":
        return fraction
    return optax.cosine_decay_schedule(fraction, last)


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


def call(
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
    require_taken(section, name, given, parameters)
    for key, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        if needed and key not in given:
            raise ValueError(f"{section}.{key} is missing; {name} needs it")
    return factory(**given, **more)


def require_taken(
    section: str, name: str, given: Mapping[str, Any], parameters: Mapping[str, Any]
) -> None:
    for key in given:
        if key not in parameters:
            raise ValueError(
                f"{section}.{key} is no argument of {name}; it takes "
                f"{', '.join(parameters) or 'none'}"
            )

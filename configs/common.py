"""What config files share: their argument string, their anchors, their rhythm."""

from collections.abc import Callable, Iterable
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

TRANSFORMER_AXES = (
    ("*/attention/out/kernel", "i i o"),
    ("*/attention/*/kernel", "i o o"),
)
"""What the axes of kernels with heads mean, first match wins: inputs and outputs."""
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def parse(arg: str, **defaults: Any) -> dict[str, Any]:
    """Reads `"method=rigl,forward=0.95,smoke"` over defaults.

    Args:
      arg: comma separated `key=value`; a bare `key` means `key=True`.
      **defaults: every key there is, with its default. A value takes the type of its
        default; the default None stands for "not given" and takes a float.
    Returns:
      The defaults, with the given values in their place.
    Raises:
      ValueError: a key that is not there, or a value of another type.
    """
    found = dict(defaults)
    for item in filter(None, (part.strip() for part in arg.split(","))):
        key, equals, text = (part.strip() for part in item.partition("="))
        if key not in defaults:
            raise ValueError(
                f"config argument {key!r} is unknown; there are {', '.join(defaults)}"
            )
        found[key] = _read(key, text if equals else "true", defaults[key])
    return found


def anchors(
    multiplier: float, steps: float = 1, *, of: float = 1
) -> Callable[[float], int]:
    """`step -> step` of a run that is longer or shorter than the published one.

    Args:
      multiplier: of the length, and with it of every anchor of schedules.
      steps: length of a small form of the run.
      of: length of the run that the anchors are given for.
    Raises:
      ValueError: a multiplier that is not positive.
    Example:
      >>> anchor = anchors(2.0, 100, of=1000)
      >>> anchor(1000), anchor(300)
      (200, 60)
    """
    if multiplier <= 0:
        raise ValueError(f"config argument multiplier={multiplier} must be positive")
    return lambda step: round(step * multiplier * steps / of)


def require_size(size: str, sizes: Iterable[str]) -> None:
    """Raises ValueError where a config has no network of that size."""
    if size not in sizes:
        raise ValueError(f"config argument size={size} is none of {list(sizes)}")


def begin(name: str, steps: int) -> ml_collections.ConfigDict:
    """A config with what every run of the papers' experiments has.

    Args:
      name: of the run; names the default workdir, runs/<name>.
      steps: its length.
    """
    config = ml_collections.ConfigDict(dict(name=name, seed=0, steps=steps))
    config.init_from = placeholder(str)  # see configs/quickstart.py
    config.init_map = ()
    config.accumulate = 1  # parts of a batch, one after the other, for one update
    config.ema = 0.0  # decay of the average of weights to evaluate with; 0: none
    return config


def pictures(dataset: str, *, side: int, threads: int) -> dict[str, Any]:
    """What a config says of its images, `config.data`.

    Args:
      dataset: as experiments.prepare names it.
      side: of an image, in pixels.
      threads: the default of the key of that name.
    """
    return dict(
        dataset=dataset,
        data_dir=placeholder(str),  # of TFDS; None: its default
        held_out=0,  # training images for "validation"; 0: it is what papers report on
        side=side,
        threads=threads,  # that make batches ahead of time, in each process
        workers=0,  # processes that make batches; 0: this one does
    )


def rhythm(
    config: ml_collections.ConfigDict,
    *,
    every: int,
    evaluate: int,
    save: int,
    batches: int | None,
) -> None:
    """Adds what every config says of its log, evaluations and checkpoints.

    Args:
      config: to change.
      every: steps between rows of the log.
      evaluate: steps between evaluations.
      save: steps between checkpoints.
      batches: of an evaluation; None: the whole split.
    """
    config.compilation_cache = placeholder(str)  # folder of compiled programs
    config.profile = placeholder(str)  # steps, as in 20:25, to workdir/profile
    config.log_every = every
    config.eval_every = evaluate
    config.eval_batches = placeholder(int) if batches is None else batches
    config.save_every = save
    config.keep = 2  # checkpoints
    config.on_nan = "stop"  # at NaN or Inf: "stop", "skip" the update, or "restore"
    config.dense_steps = 0  # timed at the start, to compare; 0: none


def _read(key: str, text: str, default: Any) -> Any:
    kind = float if default is None else type(default)
    if kind is bool and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    if kind is not bool:
        try:
            return kind(text)
        except ValueError:
            pass
    raise ValueError(f"config argument {key}={text!r} is not of type {kind.__name__}")

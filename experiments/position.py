"""Where a run is, beside its arrays, and the numbers it tells about itself."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import topkast_jax as tk
from experiments import log

PyTree = Any


@dataclasses.dataclass
class Position:
    """Goes to a checkpoint's `meta` as JSON, and comes back.

    Attributes:
      step: number of steps done.
      batches: drawn from the data; more than steps where some were passed over.
      skipped: steps that changed nothing, for NaN or Inf.
      flops: of the products in `task.uses` so far, if zeros cost nothing.
      dense_flops: the same for the dense network.
      window: measures of the finite steps since the last row of the log.
    """

    step: int = 0
    batches: int = 0
    skipped: int = 0
    flops: float = 0.0
    dense_flops: float = 0.0
    window: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def add(self, measured: Sequence[Mapping[str, Any]]) -> None:
        """Takes in what steps measured, on the host."""
        for each in measured:
            if not each["bad"].any():
                numbers = {name: float(x) for name, x in each.items() if name != "bad"}
                self.window.append(numbers)


def later(due: Callable[[Any], Any], delay: int) -> Callable[[Any], Any]:
    """The steps of a schedule, so many steps later."""
    return lambda step: (step > delay) & due(step - delay)


def never(step: int) -> bool:
    """When a method without a schedule changes its masks."""
    del step
    return False


def train_row(
    position: Position,
    masks: tk.Masks | None,
    refreshed: Callable[[int], Any],
    rate: Callable[[int], Any],
) -> dict[str, float]:
    """Means over the window, and what else belongs in a row of kind "train".

    `churn` is that of the window's last refresh; it is left out where there was none.

    Args:
      position: after the window's last step.
      masks: of the coming step, None for a dense network.
      refreshed: whether masks were chosen anew for a step.
      rate: the learning rate of a step.
    """
    window, step = position.window, position.step
    row = {
        name: statistics.fmean(each[name] for each in window)
        for name in (window[0] if window else ())
        if name != "churn"
    }
    if masks is not None:
        forward, backward = tk.metrics.sparsity(masks)["total"]
        row |= {"sparsity": forward, "backward_sparsity": backward}
        churns = [each["churn"] for each in window if each["churn"]]
        if churns:
            row["churn"] = churns[-1]
        elif any(refreshed(step - back) for back in range(len(window))):
            row["churn"] = 0.0
    row |= {
        "learning_rate": float(rate(step - 1)),
        "skipped": position.skipped,
        "flops": position.flops,
        "flops_fraction": position.flops / position.dense_flops,
    }
    return row


def flops(
    params: PyTree,
    masks: tk.Masks | None,
    uses: Mapping[str, int],
    probed: Sequence[bool],
    apart: bool = False,
    drawn: float | None = None,
) -> tuple[float, float]:
    """FLOPs of some steps, and what the dense network would have taken.

    Args:
      params: arrays or shapes.
      masks: counted as those of every one of the steps; None for a dense network.
      uses: see `Task`.
      probed: for each of the steps, whether its gradient was seen everywhere.
      apart: whether that took a pass of its own for every sparse parameter (`tk.probe`):
        forward, back, and the dense gradient of the one.
      drawn: candidates for each entry of A whose gradient was seen, where it was not seen
        everywhere; apart, they take one pass together.
    """
    if drawn is not None and masks is not None:
        quiet_masks = masks._replace(probe=jax.tree.map(lambda _: None, masks.probe))
        each = tk.metrics.flops(params, quiet_masks, uses)
        more = drawn * each.forward + (each.train if apart else 0)
        spent = len(probed) * each.train + sum(map(bool, probed)) * more
        return spent, len(probed) * each.dense
    if masks is None or apart or not jax.tree.leaves(masks.probe):
        each = tk.metrics.flops(params, masks, uses)
        spent = len(probed) * each.train
        if apart:
            passes = len(tk.metrics.sparsity(masks)) - 1  # without the total
            each_probe = passes * 2 * each.forward + each.dense / 3
            spent += sum(map(bool, probed)) * each_probe
        return spent, len(probed) * each.dense

    def with_probe(on: bool) -> tk.metrics.Flops:
        probe = jax.tree.map(lambda _: jnp.asarray(on), masks.probe)
        return tk.metrics.flops(params, masks._replace(probe=probe), uses)

    quiet, loud = with_probe(False), with_probe(True)
    loudly = sum(map(bool, probed))
    spent = loudly * loud.train + (len(probed) - loudly) * quiet.train
    return spent, len(probed) * quiet.dense


def layers(masks: tk.Masks) -> dict[str, dict[str, float]]:
    """Forward and backward sparsity by path, for a row of kind "layers"."""
    found = tk.metrics.sparsity(masks)
    del found["total"]
    return {
        "forward": {path: pair[0] for path, pair in found.items()},
        "backward": {path: pair[1] for path, pair in found.items()},
    }


def words(metrics: Mapping[str, float]) -> str:
    """`"loss 2.310  bits_per_byte 3.333"`."""
    return "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def line(row: Mapping[str, float], names: Sequence[str], steps_left: int) -> str:
    """A row as the terminal shows it: some of its numbers, step time, time left.

    The time left counts steps only, neither evaluations nor saving.
    """
    shown = {name: row[name] for name in names if name in row}
    seconds = row["step_time"]
    left = log.duration(seconds * steps_left)
    return f"{words(shown)}  {1000 * seconds:.0f} ms/step  ETA {left}"

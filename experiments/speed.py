"""How fast a run is: throughput, and the share of what its devices could do."""

import re

import jax

# Dense bf16 products a second of one device, from the makers' data sheets; the first
# pattern that the kind of device contains.
PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite|TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("A100", 312e12),
    ("H100|H200", 989e12),
    ("B200", 2250e12),
)


def peak(kind: str) -> float | None:
    """FLOPs a second of one device of a kind, dense bf16 products; None: not known."""
    for pattern, flops in PEAKS:
        if re.search(pattern, kind):
            return flops
    return None


def measured(
    rows: int,
    steps: int,
    seconds: float,
    flops: float,
    mesh: jax.sharding.Mesh,
    tokens: int | None = None,
) -> dict[str, float]:
    """What belongs in a row of the log, of some steps.

    Args:
      rows: of the global batch.
      steps: how many.
      seconds: that they took.
      flops: of their products, zeros costing nothing (`Position.flops`).
      mesh: that they ran on.
      tokens: of a row; None: rows are counted.
    Returns:
      `step_time` in seconds, `tokens_per_second` or `rows_per_second`, and on devices
      whose peak is known `mfu`, model FLOPs utilisation: `flops` over what the devices could have done.
    """
    name, count = ("rows", rows) if tokens is None else ("tokens", rows * tokens)
    found = {
        "step_time": seconds / steps,
        f"{name}_per_second": count * steps / seconds,
    }
    most = peak(mesh.devices.flat[0].device_kind)
    if most is not None:
        found["mfu"] = flops / (seconds * most * mesh.size)
    return found

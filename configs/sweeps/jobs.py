"""Jobs of the sweeps in this folder, whose form experiments/jobs.py describes."""

from typing import Any


def job(
    config: str,
    row: tuple[str, str],
    column: tuple[str, str],
    seed: int,
    **overrides: Any,
) -> dict[str, Any]:
    """One run.

    Args:
      config: file:arguments.
      row: label and value of its row in the table.
      column: of its column.
      seed: of the run.
      **overrides: of keys of the config, `sparse__stop` for `sparse.stop`.
    """
    name = "-".join((row[1], column[1], str(seed))).lower()
    for old, new in ((" ", "-"), ("/", "-"), (",", ""), ("%", ""), ("=", "-")):
        name = name.replace(old, new)
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    return dict(
        name=name,
        config=config,
        overrides={"seed": seed, **settings},
        labels=dict((row, column, ("seed", str(seed)))),
    )


def percent(sparsity: float) -> str:
    """`"90"` of 0.9, `"96.5"` of 0.965."""
    return f"{100 * sparsity:g}"


def twice(forward: float) -> float:
    """The backward sparsity at which twice as many weights are trained as are used."""
    return round(1 - 2 * (1 - forward), 6)


def arguments(method: str, forward: float) -> str:
    """Of a config; Top-KAST trains twice as many weights as it uses, dense has none."""
    if method == "dense":
        return "method=dense"
    found = f"method={method},forward={forward}"
    return f"{found},backward={twice(forward)}" if method == "top_kast" else found

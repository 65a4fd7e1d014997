"""Language models dense, pruned, and Top-KAST by forward and backward sparsity.

Jayakumar et al., 2020, arXiv:2106.03517, section 4.2; the sweeps of enwik8 and
WikiText-103 are these jobs.
"""

from typing import Any

from configs.sweeps.jobs import job, percent

PAIRS = (
    (0.8, 0.0),
    (0.8, 0.6),
    (0.8, 0.8),
    (0.9, 0.0),
    (0.9, 0.6),
    (0.9, 0.8),
    (0.95, 0.9),
)
PRUNED = (0.8, 0.9, 0.95)
SEEDS = (0, 1, 2)


def sparsities(config: str, sizes: tuple[str, ...]) -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next.

    Args:
      config: file of the config.
      sizes: its `size=` arguments, a column each.
    """
    jobs = []
    for seed in SEEDS:
        for size in sizes:
            file, column = (
                f"{config}:size={size}",
                ("size", size),
            )
            jobs.append(job(f"{file},method=dense", ("run", "dense"), column, seed))
            for sparsity in PRUNED:
                jobs += [
                    job(
                        f"{file},method={method},forward={sparsity}",
                        ("run", f"{method} {percent(sparsity)}"),
                        column,
                        seed,
                    )
                    for method in ("magnitude", "rigl")
                ]
            jobs += [
                job(
                    f"{file},forward={forward},backward={backward}",
                    ("run", f"top_kast {percent(forward)}/{percent(backward)}"),
                    column,
                    seed,
                )
                for forward, backward in PAIRS
            ]
    return jobs

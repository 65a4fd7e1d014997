"""How much exploration Top-KAST needs: backward sparsity, and random against top B.

    python -m experiments.sweep --sweep=configs/sweeps/backward.py
    python -m experiments.sweep --sweep=configs/sweeps/backward.py --table

Forward sparsity 90 % on the quickstart, 500 of its 1500 steps, masked layout, three
seeds, masks every 100 steps and, where B is larger than A, every 10 and at every step.
At 90/90 there is nothing to explore, and at 90/0 B is everything, so "random" has jobs
between them only.
A job takes about a minute on one quiet CPU core.

One seed of everything comes before the next seed.
"""

from typing import Any

BACKWARD = (0.9, 0.8, 0.5, 0.0)
SEEDS = (0, 1, 2)
EVERY_JOB = {"steps": 500, "eval_every": 500, "save_every": 1000, "dense_steps": 0}


def get_sweep() -> list[dict[str, Any]]:
    """The jobs, a seed of all before the next."""
    jobs = []
    for seed in SEEDS:
        for backward in BACKWARD:
            jobs.append(_job("top", backward, seed))
            if 0 < backward < 0.9:
                jobs.append(_job("random", backward, seed))
            if backward < 0.9:
                jobs.append(_job("top, masks every 10 steps", backward, seed, 10))
                jobs.append(_job("top, masks at every step", backward, seed, 1))
    return jobs


def _job(
    explore: str, backward: float, seed: int, refresh: int | None = None
) -> dict[str, Any]:
    often = {}
    if refresh is not None:  # the last at step 400, as with the others
        often = {"sparse.refresh": refresh, "sparse.refresh_stop": 401}
    first, *_ = explore.split(",")
    name = first if refresh is None else f"{first}-every-{refresh}"
    return dict(
        name=f"{name}-{100 * backward:.0f}-{seed}",
        config=f"configs/quickstart.py:forward=0.9,backward={backward}",
        overrides={**EVERY_JOB, "seed": seed, "sparse.explore": first, **often},
        labels={
            "B beyond A": explore,
            "sparsity": f"90/{100 * backward:.0f}",
            "seed": seed,
        },
    )

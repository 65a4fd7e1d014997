"""Every method at 90 % on the quickstart, three seeds.

    python -m experiments.sweep --sweep=configs/sweeps/methods.py
    python -m experiments.sweep --sweep=configs/sweeps/methods.py --table \
        --metric=bits_per_byte,flops_fraction,time_ratio

500 of the quickstart's 1500 steps, masked layout, the methods' defaults in
configs/quickstart.py: refreshes every 100 steps where the paper has no more frequent ones,
anchors of schedules as shares of the run. "dense" and "small" are the dense network, and
one so narrow that it has the weights of the others (123,812 against 123,080).
Five steps at the start are timed beside dense ones. A gap under two deviations is a tie.
A job takes about two minutes on one CPU core.

One seed of all methods comes before the next seed.
"""

from typing import Any

METHODS = (
    "static",
    "set",
    "rigl",
    "rigl_itop",
    "snfs",
    "mest",
    "srigl",
    "dsr",
    "deep_r",
    "gse",
    "top_kast",
    "straight_through",
    "magnitude",
    "saliency",
    "random_pruning",
    "one_shot",
    "snip",
    "acdc",
    "granet",
)
SEEDS = (0, 1, 2)
EVERY_JOB = {"steps": 500, "eval_every": 500, "save_every": 1000, "dense_steps": 5}
SMALL = {"model.d_model": 46, "model.d_head": 23, "model.d_inner": 184}


def get_sweep() -> list[dict[str, Any]]:
    """The jobs, a seed of all methods before the next."""
    jobs = []
    for seed in SEEDS:
        jobs.append(_job("dense", "method=dense", seed))
        jobs.append(_job("small", "method=dense", seed, **SMALL))
        for method in METHODS:
            jobs.append(_job(method, f"method={method},forward=0.9", seed))
    return jobs


def _job(name: str, arguments: str, seed: int, **overrides: Any) -> dict[str, Any]:
    return dict(
        name=f"{name}-{seed}",
        config=f"configs/quickstart.py:{arguments}",
        overrides={**EVERY_JOB, "seed": seed, **overrides},
        labels={"method": name, "seed": seed},
    )

"""Methods on ImageNet at 80 to 99 %, as in the tables of RigL and of Top-KAST.

Evci et al., 2020, arXiv:1911.11134, tables 2 and 3; Jayakumar et al., 2020,
arXiv:2106.03517, figure 2. The backward sparsity of Top-KAST is such that twice as many
weights are trained as are used; its other pairs are in imagenet_sparsities.py.

    python -m experiments.sweep --sweep=configs/sweeps/imagenet_methods.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/imagenet_methods.py --table \
        --metric=accuracy
"""

from typing import Any

from configs.sweeps.jobs import arguments, job, percent

METHODS = ("static", "snip", "set", "rigl", "gse", "magnitude", "straight_through")
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
SEEDS = (0, 1, 2)
FILE = "configs/imagenet_resnet50.py"


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    jobs = []
    for seed in SEEDS:
        jobs.append(
            job(f"{FILE}:method=dense", ("method", "dense"), ("sparsity", "0"), seed)
        )
        for sparsity in SPARSITIES:
            column = ("sparsity", percent(sparsity))
            jobs += [
                job(f"{FILE}:method={method},forward={sparsity}", ("method", method),
                    column, seed)
                for method in METHODS
            ]  # fmt: skip
            jobs.append(
                job(
                    f"{FILE}:method=rigl,forward={sparsity},distribution=erk",
                    ("method", "rigl, ERK"),
                    column,
                    seed,
                )
            )
            jobs.append(
                job(
                    f"{FILE}:{arguments('top_kast', sparsity)}",
                    ("method", "top_kast"),
                    column,
                    seed,
                )
            )
    return jobs

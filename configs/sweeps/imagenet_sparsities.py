"""Top-KAST on ImageNet: forward against backward sparsity, and B at random.

Jayakumar et al., 2020, arXiv:2106.03517, section 4.1: its table of forward and backward
sparsities, and its ablation in which B beyond A is random.

    python -m experiments.sweep --sweep=configs/sweeps/imagenet_sparsities.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/imagenet_sparsities.py --table \
        --metric=accuracy

Three seeds; a run is 100 epochs of ResNet-50. At equal sparsities, and at a backward
sparsity of 0, there is nothing to draw.
"""

from typing import Any

from configs.sweeps.jobs import job, percent

FORWARD = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
BACKWARD = (0.0, 0.5, 0.8, 0.9, 0.95)
RANDOM = ((0.9, 0.8), (0.95, 0.8), (0.95, 0.9))
SEEDS = (0, 1, 2)
FILE = "configs/imagenet_resnet50.py"


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    jobs = []
    for seed in SEEDS:
        jobs += [
            job(
                f"{FILE}:forward={forward},backward={backward}",
                ("forward", percent(forward)),
                ("backward", percent(backward)),
                seed,
            )
            for forward in FORWARD
            for backward in sorted({*BACKWARD, forward})
            if backward <= forward
        ]
        jobs += [
            job(
                f"{FILE}:forward={forward},backward={backward}",
                ("forward", percent(forward)),
                ("backward", f"{percent(backward)} random"),
                seed,
                sparse__explore="random",
            )
            for forward, backward in RANDOM
        ]
    return jobs

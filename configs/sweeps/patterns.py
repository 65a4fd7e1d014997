"""What a pattern costs: Top-KAST on the quickstart, by structure and sparsity.

    python -m experiments.sweep --sweep=configs/sweeps/patterns.py
    python -m experiments.sweep --sweep=configs/sweeps/patterns.py --table

500 of the quickstart's 1500 steps, masked layout, three seeds. The last masks are chosen
at step 400, so what is evaluated after step 500 had time to settle. A job takes one to
two minutes on two CPU cores.

Patterns are rounded to whole units, at least one per selection: at 80/70, 90/80 and
95/90, N:M of 32 is 6, 3 and 2 of 32 forward. Blocks of 64x64 are left out at 95/90: four
of them make a kernel of 128x128, and one alone is 25 % of it, so the network would be 86 %
sparse.

The middle sparsity comes first, a seed of all patterns before the next seed, and what
says least last, so that a sweep that is cut short still compares patterns.
"""

from typing import Any

PATTERNS = {
    "unstructured": "unstructured",
    "constant fan-in": "fan_in",
    "N:M, M = 32": "n_of_m:32",
    "blocks 32x32": "blocks:32x32",
    "blocks 64x64": "blocks:64x64",
    "blocks 1x256": "blocks:1x256",
    "blocks 1x64": "blocks:1x64",
    "blocks 8x128": "blocks:8x128",
    "fan-in of blocks 1x64": "fan_in:1x64",
}
SPARSITIES = {"90/80": (0.9, 0.8), "95/90": (0.95, 0.9), "80/70": (0.8, 0.7)}
LEFT_OUT = {("blocks 64x64", "95/90")}
LATE = {"fan-in of blocks 1x64"}  # as blocks 1x64 at 90/80
SEEDS = (0, 1, 2)
EVERY_JOB = {"steps": 500, "eval_every": 500, "save_every": 1000, "dense_steps": 0}


def get_sweep() -> list[dict[str, Any]]:
    """The jobs, the most informative first."""
    first = next(iter(SPARSITIES))
    jobs: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    for sparsity in SPARSITIES:
        for seed in SEEDS:
            if sparsity == first:
                jobs.append(_dense(seed))
            for pattern in PATTERNS:
                if (pattern, sparsity) in LEFT_OUT:
                    continue
                late = pattern in LATE and sparsity != first
                (last if late else jobs).append(_sparse(pattern, sparsity, seed))
    return jobs + last


def _dense(seed: int) -> dict[str, Any]:
    return dict(
        name=f"dense-{seed}",
        config="configs/quickstart.py:method=dense",
        overrides={**EVERY_JOB, "seed": seed},
        labels={"pattern": "dense", "seed": seed},  # beside every sparsity
    )


def _sparse(pattern: str, sparsity: str, seed: int) -> dict[str, Any]:
    structure = PATTERNS[pattern]
    forward, backward = SPARSITIES[sparsity]
    return dict(
        name=f"{structure.replace(':', '-')}-{sparsity.replace('/', '-')}-{seed}",
        config=(
            f"configs/quickstart.py:structure={structure},"
            f"forward={forward},backward={backward}"
        ),
        overrides={**EVERY_JOB, "seed": seed},
        labels={"pattern": pattern, "sparsity": sparsity, "seed": seed},
    )

"""What the process itself holds: peak resident set of training, each layout by itself.

    python -m benchmarks.peak
    python -m benchmarks.peak --quick

Every row is a fresh process that makes some steps of Adam at Top-KAST 90/80. Columns:

    planned   what XLA plans for a step, `+ scratch` of `benchmarks.layouts`, MiB
    host      the reservoir in host memory, MiB
    steps     peak resident set while it steps, less what Python and JAX take, MiB
    process   peak resident set from the start on, compilation and the first dense
              weights included, MiB
    / dense   of `steps`

On CPU the reservoir is in the same memory as all else. Linux only: peaks are read from
/proc, and reset between phases.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

import topkast_jax as tk
from benchmarks import timing
from benchmarks.layouts import Training, Way
from benchmarks.problems import PROBLEMS

WAYS = {
    "dense": None,
    "masked": Way("masked", tk.unstructured),
    "packed": Way("packed", tk.unstructured),
    "block": Way("block", tk.blocks(256, 256)),
}
STEPS = 5


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most since the last `reset`."""
    with open("/proc/self/status") as lines:
        return next(int(s.split()[1]) / 1024 for s in lines if s.startswith(field))


def reset() -> None:
    """Gives back what compilation left free, and lets the peak begin anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def child(size: str, layout: str) -> dict[str, float]:
    """Trains in this process; MiB by column."""
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    runtime = resident("VmRSS")
    problem: Any = PROBLEMS[size]()
    training = Training(problem, WAYS[layout], (0.9, 0.8))
    planned = training.planned / 2**20
    del problem  # with its dense weights
    start = resident("VmHWM")
    reset()
    for _ in range(STEPS):
        training.step()
    return {
        "planned": planned,
        "host": training.store.nbytes / 2**20 if training.store else 0,
        "steps": resident("VmHWM") - runtime,
        "process": max(start, resident("VmHWM")),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak")
    parser.add_argument("--size", default="mlp-8192", choices=PROBLEMS)
    parser.add_argument("--layouts", default=",".join(WAYS), help="dense comes first")
    parser.add_argument("--child", choices=WAYS, help="used for the rows")
    parser.add_argument("--quick", action="store_true", help="tiny model")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.layouts = "tiny", "dense,block"
    if args.child:
        print(json.dumps(child(args.size, args.child)))
        return
    layouts = args.layouts.split(",")
    if layouts[0] != "dense" or not set(layouts) <= set(WAYS):
        parser.error(f"--layouts={args.layouts}: dense first, of {', '.join(WAYS)}")
    rows, dense = [], 0.0
    for layout in layouts:
        command = [sys.executable, "-m", "benchmarks.peak"]
        command += [f"--size={args.size}", f"--child={layout}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        found = json.loads(done.stdout.splitlines()[-1])
        dense = dense or found["steps"]
        cells = [f"{value:.0f}" for value in found.values()]
        rows.append([layout, *cells, f"{found['steps'] / dense:.2f}"])
    header = ["MiB", "planned", "host", "steps", "process", "/ dense"]
    print(f"{args.size}, Top-KAST 90/80, Adam, {STEPS} steps\n")
    print(timing.table(header, rows))
    print(f"\n{timing.hardware()}")


if __name__ == "__main__":
    main()

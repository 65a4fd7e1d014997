"""How much of a refresh hides behind the steps, with the choice in a thread.

    python -m benchmarks.hidden
    python -m benchmarks.hidden --quick

Top-KAST in the packed or block layout. A refresh at once stops the training; one with
`refresh_delay=d` copies B to the host, chooses in a thread while d steps go on, and then
ships the new B. Columns, milliseconds but for the last:

    step      an ordinary one
    at once   a refresh, training waiting
    choose    until the choice has begun: the copy of B
    ship      `tk.refresh` with the masks that were chosen
    slower    what the d steps in between take more than d ordinary ones
    hidden    1 - (choose + ship + slower) / at once

On CPU the thread and the steps share the cores; with an accelerator they do not.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

import topkast_jax as tk
from benchmarks import timing
from benchmarks.layouts import WAYS, Training, Way
from benchmarks.problems import PROBLEMS, Problem


def seconds(run: Any) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(problem: Problem, way: Way, delay: int, repeats: int) -> list[str]:
    """One row: medians over the repeats."""
    training = Training(problem, way, (0.9, 0.8))
    assert training.store is not None
    training.refresh()  # compiles
    training.step()
    found: dict[str, list[float]] = {
        name: [] for name in ("step", "at once", "choose", "ship", "slower")
    }
    for _ in range(repeats):
        step = statistics.median(seconds(training.step) for _ in range(delay))
        at_once = training.refresh()
        training.step()
        params, opt_state, _ = training.state
        began = time.perf_counter()
        chosen = tk.choose(training.tx, params, opt_state, training.store)
        chosen_in = time.perf_counter() - began
        between = seconds(lambda: [training.step() for _ in range(delay)])

        def ship(chosen: Any = chosen) -> None:
            params, opt_state, carry = training.state
            params, opt_state, _ = tk.refresh(
                training.tx, params, opt_state, training.store, chosen=chosen
            )
            training.state = (params, opt_state, carry)
            jax.block_until_ready(training.state)

        row = (
            step,
            at_once,
            chosen_in,
            seconds(ship),
            max(0.0, between - delay * step),
        )
        for name, value in zip(found, row, strict=True):
            found[name].append(value)
    step, at_once, choose, shipped, slower = map(statistics.median, found.values())
    hidden = 1 - (choose + shipped + slower) / at_once
    numbers = (f"{1e3 * x:.1f}" for x in (step, at_once, choose, shipped, slower))
    return [way.name, *numbers, f"{hidden:.2f}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hidden")
    parser.add_argument("--size", default="mlp-8192", choices=list(PROBLEMS))
    parser.add_argument("--delay", type=int, default=10, help="steps")
    parser.add_argument("--repeats", type=int, default=5, help="refreshes of each kind")
    parser.add_argument("--quick", action="store_true", help="tiny model, 2 refreshes")
    args = parser.parse_args(argv)
    if min(args.delay, args.repeats) < 1:
        parser.error("--delay and --repeats must be at least 1")
    problem = PROBLEMS["tiny" if args.quick else args.size]()
    delay, repeats = (2, 2) if args.quick else (args.delay, args.repeats)
    ways = [way for way in WAYS if way.layout != "masked"]
    rows = [measure(problem, way, delay, repeats) for way in ways]
    header = ["90/80, ms", "step", "at once", "choose", "ship", "slower", "hidden"]
    print(f"{problem.title}, refresh_delay={delay}\n")
    print(timing.table(header, rows))
    print(f"\n{timing.hardware()}")


if __name__ == "__main__":
    main()

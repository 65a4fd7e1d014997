"""The largest Transformer that fits a TPU, dense and sparse, by the TPU's own compiler.

    pip install libtpu
    python -m benchmarks.tpu --chips="one v5e" --ways=block
    python -m benchmarks.tpu --equal
    python -m benchmarks.tpu --quick

Runs on any CPU: whole train steps are compiled ahead of time for real topologies, and no
array is made. The network is `benchmarks.decoder`, scanned with remat: float32 weights and
Adam, bfloat16 products, one row of 1024 bytes a chip; Top-KAST at the given
forward/backward sparsities. Over several chips (FSDP) every weight is cut, and gathered
layer by layer as it is stored.

Compiling takes a minute or more, and a refusal seconds: the compiler says at once how many
bytes a program would need. A layer always takes the same, so three refusals tell how many
layers fit. The search begins a little above and takes layers away, 1 % or one at a time,
until the compiler agrees: its last refusal and that one compilation prove the number.
Columns:

    moved        MiB that the collectives of a step give out on a chip, 4 layers
    4 layers     GiB a chip of a network of that size (--equal, which compiles it)
    largest      layers x width, its weights if it were dense, its GiB a chip, and those
                 over its layers, in MiB
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import ahead, fit, timing
from benchmarks.ahead import Chip, Program, Way
from experiments import aot

SMALL, HUGE = 4, 10_000
"""Layers of the network of one size for all ways, and of one that fits nowhere."""
CHIPS = [
    Chip("one v5e", "v5e:2x2", 1, 4096),
    Chip("v5e 16x16", "v5e:16x16", 256, 8192),
    Chip("one v5p", "v5p:2x2x1", 1, 4096),
]
WAYS = [
    Way(),
    Way("block", 0.9, 0.8),
    Way("block", 0.95, 0.9),
    Way("packed", 0.9, 0.8),
    Way("packed", 0.95, 0.9),
]


class Line(NamedTuple):
    """Bytes of equal layers on a device, `base + layers * each`, and how many there are."""

    base: float
    each: float
    room: float


def line(chip: Chip, way: Way, devices: ahead.Devices) -> Line:
    """From what the compiler says of three programs that it refuses."""
    huge = ahead.refusal(chip, way, HUGE, devices)
    few = math.ceil(2 * HUGE * huge.room / huge.needed)  # named to .01 GiB
    low, high = (ahead.refusal(chip, way, n, devices).needed for n in (few, 2 * few))
    each = (high - low) / few
    return Line(low - few * each, each, huge.room)


def largest(
    chip: Chip, way: Way, near: Line, devices: ahead.Devices
) -> tuple[int, Program]:
    """The largest number of layers, and its program.

    Raises:
      ValueError: not even one layer fits.
    """
    fitting: dict[int, Program] = {}
    base = max(0.0, near.base)

    def share(layers: int) -> float | None:
        found = ahead.refusal(chip, way, layers, devices)
        print(f"  {layers} layers: {found}", file=sys.stderr, flush=True)
        if not isinstance(found, Program):
            return None
        fitting[layers] = found
        return (found.bytes - base) / (near.room - base)

    # A refusal is cheap: rather too many.
    above = math.ceil(1.015 * (near.room - near.base) / near.each)
    layers = fit.largest(above, share)
    if not layers:
        raise ValueError(f"{chip.title}, {way.title}: not even one layer fits")
    return layers, fitting[layers]


def report(chips: Sequence[Chip], ways: Sequence[Way], search: bool) -> str:
    """Table of the ways at equal size, and of the largest networks."""
    rows = []
    for chip in chips:
        devices, dense = aot.devices(chip.topology), 0
        for way in ways:
            row = [chip.title, way.title, _moved(chip, way, devices)]
            if search:
                near = line(chip, way, devices)
                layers, program = largest(chip, way, near, devices)
                dense = dense or (program.weights if way.layout is None else 0)
                row += [
                    f"{layers} x {chip.width}",
                    f"{program.weights / 1e9:.2f}",
                    f"{program.weights / dense:.1f}" if dense else "",
                    _gib(program.bytes),
                    _mib(program.bytes / layers),
                ]
            else:
                row.append(_gib(ahead.compile_step(chip, way, SMALL, devices).bytes))
            rows.append(row)
            print(" | ".join(row), file=sys.stderr, flush=True)
    header = ["chips", "way", "moved, MiB"]
    if search:
        header += ["largest", "10^9 weights, dense", "/ dense", "GiB", "a layer, MiB"]
    else:
        header.append(f"{SMALL} layers, GiB")
    return timing.table(header, rows)


def _moved(chip: Chip, way: Way, devices: ahead.Devices) -> str:
    if chip.devices == 1:
        return "-"
    traced = ahead.trace_step(chip, way, SMALL, devices)
    return _mib(ahead.moved(traced.jaxpr.jaxpr))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles and prints; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu")
    parser.add_argument("--chips", default="", help="rows with this in their name")
    parser.add_argument("--ways", default="", help="columns with this in their name")
    parser.add_argument("--equal", action="store_true", help="small networks alone")
    parser.add_argument("--quick", action="store_true", help="one small program each")
    args = parser.parse_args(argv)
    chips = [chip for chip in CHIPS if args.chips in chip.title]
    ways = [way for way in WAYS if args.ways in way.title]
    if not chips or not ways:
        parser.error("--chips or --ways is in the name of none")
    if args.quick:
        for way in ways:
            chip = chips[0]._replace(width=512)
            program = ahead.compile_step(chip, way, 2, aot.devices(chip.topology))
            print(f"{way.title}: {program.bytes / 2**20:.1f} MiB a chip")
        return
    print(f"\n{report(chips, ways, not args.equal)}\n")


if __name__ == "__main__":
    main()

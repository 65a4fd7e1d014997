"""Compiles a config's training step for a TPU that is not there, and tells its bytes.

    python -m experiments.aot --config=configs/quickstart.py:layout=packed \\
        --topology=v5e:2x2 --config.mesh=data:1

Needs `pip install libtpu`; runs on any CPU. Prints, for one device, the bytes of
arguments (parameters, masks or positions, optimizer state, batch), of temporaries, and
of both together, and the collectives of the program. The mesh takes the first devices
of the topology. A program that does not fit ends in one line that says how much it needs.
"""

import collections
import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

import topkast_jax as tk
from experiments import command
from experiments import mesh as meshes
from experiments.assembly import assemble
from experiments.config import Watched

COLLECTIVES = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
# So that libtpu asks no metadata server which TPU this is, and several may compile.
ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def devices(topology: str) -> list[Any]:
    """Devices of a TPU topology such as v5e:2x2 or v5p:2x2x1, to compile for.

    Raises:
      ValueError: libtpu is missing, or knows no such topology.
    """
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # libtpu raises what it likes
        line = str(error).strip().splitlines()[0] if str(error).strip() else "no reason"
        raise ValueError(
            f"--topology={topology}: {line} (is libtpu installed? pip install libtpu)"
        ) from error
    return list(found.devices)


@contextlib.contextmanager
def fitting(topology: str) -> Iterator[None]:
    """Within it, the compiler's refusal of a program that is too large is bad input.

    Raises:
      BadInput: the program does not fit a device; with the compiler's own words.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in first:
            raise
        raise command.BadInput(
            f"does not fit a device of {topology}: {first}"
        ) from error


def compiled(cfg: Watched, topology: str) -> jax.stages.Compiled:
    """The training step of a config for a topology; no array is made."""
    run = assemble(cfg, devices(topology))
    state = run.abstract()
    batch = run.task.batch
    if batch is None:
        batch = next(iter(run.task.batches("train", seed=cfg.seed, loop=True)))
    here = meshes.replicated(run.mesh)
    struct: Any = jax.ShapeDtypeStruct

    def shape(x: Any, sharding: Any) -> Any:
        return struct(x.shape, x.dtype, sharding=sharding)

    placed = jax.tree.map(
        shape, batch, meshes.batch_shardings(run.mesh, batch, "batch")
    )
    step = struct((), jax.numpy.int32, sharding=here)
    with tk.ops.compiling_for("tpu"):
        return run.compile(state, placed, shape(run.step_key, here), step)


def report(program: jax.stages.Compiled) -> str:
    """Lines about the bytes of one device and the collectives."""
    found: Any = program.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "together": found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes,
    }
    lines = [f"  {name:<12} {size / 2**20:12.1f} MiB" for name, size in parts.items()]
    counted = collections.Counter(COLLECTIVES.findall(program.as_text() or ""))
    said = ", ".join(f"{n} {name}" for name, n in sorted(counted.items())) or "none"
    return "\n".join([*lines, f"  collectives  {said}"])


def main(argv: list[str]) -> int:
    """Compiles, and prints."""
    del argv
    if flags.FLAGS.config is None:
        raise command.BadInput("--config is missing, as in configs/quickstart.py")
    cfg, topology = Watched(flags.FLAGS.config), flags.FLAGS.topology
    with command.checking(), fitting(topology):
        program = compiled(cfg, topology)
    print(f"{cfg.name} on {topology}, mesh {cfg.mesh}, per device:")
    print(report(program))
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "File, or file:arguments.")
    flags.DEFINE_string("topology", "v5e:2x2", "TPU topology to compile for.")
    command.run(main)

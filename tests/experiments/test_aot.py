"""Compiling for hardware that is not there."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments import aot, assembly, command
from experiments.config import Watched


def test_a_topology_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="--topology=v5e:nowhere: .*libtpu"):
        aot.devices("v5e:nowhere")


def test_the_report_tells_bytes_and_collectives() -> None:
    program = jax.jit(lambda x: x @ x).lower(jnp.ones((256, 256))).compile()
    lines = aot.report(program).splitlines()
    assert lines[0].split() == ["arguments", "0.2", "MiB"]
    assert lines[-1].split() == ["collectives", "none"]


def test_a_program_that_does_not_fit_is_one_line() -> None:
    refusal = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: the total memory required for HLO"
        " temporaries (102.91G) exceeds available HBM (15.75G).\n\nLargest buffers:\n..."
    )
    with (
        pytest.raises(command.BadInput, match=r"v5e:2x2: .*102.91G.*15.75G\)\.$"),
        aot.fitting("v5e:2x2"),
    ):
        raise jax.errors.JaxRuntimeError(refusal)
    with pytest.raises(jax.errors.JaxRuntimeError), aot.fitting("v5e:2x2"):
        raise jax.errors.JaxRuntimeError("INTERNAL: not a matter of room")


@pytest.mark.parametrize(
    "layout", ["packed", pytest.param("masked", marks=pytest.mark.slow)]
)
def test_a_step_compiles_from_shapes_alone(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """The same program as training compiles; here for the devices that there are."""
    config = tiny()
    config.sparse.layout = layout
    monkeypatch.setattr(aot, "devices", lambda topology: jax.devices())
    program = aot.compiled(Watched(config), "any")
    run = assembly.assemble(Watched(config))
    state, _ = run.begin(tmp_path)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    found: Any = program.memory_analysis()
    assert held <= found.argument_size_in_bytes < held + 4096  # and a batch

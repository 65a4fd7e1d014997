"""The printed plan of a packed run tells how each sparse layer is multiplied."""

from typing import Any

import jax
import pytest

from configs import quickstart
from experiments import routes
from experiments.assembly import assemble
from experiments.config import Watched


def plan(arg: str, **changes: Any) -> str:
    config = quickstart.get_config(arg)
    config.update_from_flattened_dict(changes)
    return assemble(Watched(config)).plan()


def routed(text: str) -> dict[str, str]:
    """`{path: route}` of the lines under the table."""
    _, _, below = text.partition("how each sparse layer is multiplied:\n")
    return dict(line.split(maxsplit=1) for line in below.splitlines())


def test_block_layout_names_the_implementation_of_every_layer() -> None:
    """1x64 blocks: of 512 inputs a tenth is worth a product, of 128 it is not."""
    found = routed(plan("layout=block,structure=fan_in:1x64"))
    assert len(found) == 4 * 7
    assert found["block_0/feed_forward/out/kernel"] == "columns"
    assert found["block_0/feed_forward/in/kernel"] == routes.SMALL


def test_block_layout_says_why_a_layer_is_expanded() -> None:
    axes = (("*/feed_forward/out/kernel", "o i"),)
    config = {"sparse.axes": axes}
    found = routed(plan("layout=block,structure=blocks:4x4,smoke", **config))
    assert found == {
        "block_0/feed_forward/in/kernel": routes.SMALL,
        "block_0/feed_forward/out/kernel": (
            "expanded: its axes are read as 'o i', and the layer multiplies as 'i o'; "
            "declare them with tk.axes"
        ),
    }


@pytest.mark.parametrize("layout", ["packed", "block"])
def test_a_task_with_dense_kernels(tiny: Any, layout: str) -> None:
    run = assemble(Watched(tiny(sparse__layout=layout)))
    table, _, said = run.plan().rpartition("\n")
    assert table.startswith("parameter")
    assert said == f"{routes.ALL_EXPANDED}: the model of this task takes dense kernels"


def test_packed_layout_in_one_line() -> None:
    text = plan("layout=packed,smoke")
    assert text.splitlines()[-1] == routes.ALL_EXPANDED
    assert not routed(text)


def test_masked_layout_says_nothing() -> None:
    assert "expanded" not in plan("smoke")


def test_nothing_is_computed() -> None:
    config = quickstart.get_config("layout=block,structure=blocks:4x4,smoke")
    run = assemble(Watched(config))
    before = len(jax.live_arrays())
    run.plan()
    assert len(jax.live_arrays()) == before

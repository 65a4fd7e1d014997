"""Packed and block layouts on eight devices: the same training, and fewer bytes."""

from typing import Any

import numpy as np
import pytest
from fake_devices import run_suite


def judge(found: dict[str, Any], cells: int) -> None:
    assert len(found) == cells
    for cell, result in found.items():
        layout, place, *_ = cell.split("/")
        if layout == "explicit":
            assert len(result) == 4 and all(result.values()), (cell, result)
            continue
        if layout == "masked":
            # Counts of eight devices, for each of the groups; a kernel has 32,768 bytes.
            assert result < 4096, (cell, result)
            continue
        assert result["masks"], cell
        assert result["lost"] == [], cell
        np.testing.assert_allclose(result["here"], result["losses"], rtol=1e-5)
        if place == "tensor":  # activations, which are as large as ever
            assert result["moved"] < 1.1 * result["dense"], (cell, result["moved"])
            continue
        # B, and in the packed layout its positions where parameters are cut; some
        # hundred bytes of biases and counts are as they were.
        parts = 2 if layout == "packed" and place == "fsdp" else 1
        limit = parts * result["share"] * result["dense"] + 1024
        assert result["moved"] < limit, (cell, result["moved"], result["dense"])


def test_packed_training_moves_what_is_stored() -> None:
    judge(run_suite("packed"), cells=7)


@pytest.mark.slow
def test_packed_training_on_any_mesh() -> None:
    judge(run_suite("packed", full=True), cells=16)


def judge_candidates(found: dict[str, Any], cells: int) -> None:
    """GSE: one device's draws, sets and weights to the bit, and nothing dense travels."""
    assert len(found) == cells
    for cell, result in found.items():
        assert result["equal"] == [True] * 6, cell
        assert result["drawn"] == [True, False] * 3, cell  # before a refresh alone
        assert result["moved"] == [True, False, True, False, True], cell
        assert result["lost"] == [], cell
        largest, travelled = result["largest"], result["bytes"]
        assert largest.keys() == travelled.keys() == {"step", "probe", "update"}
        # In parts of the kernel. An eighth of it is stored, and .75 of that is drawn; a
        # packed layer is expanded where it multiplies, and nowhere else.
        assert largest["update"] < 0.25, cell
        if cell.startswith("block"):
            assert max(largest["step"], largest["probe"]) < 0.25, cell
        if "/tensor/" not in cell:  # else activations travel
            assert max(travelled.values()) < 0.4, cell
        assert travelled["update"] < 0.01, cell


def test_candidates_are_those_of_one_device() -> None:
    judge_candidates(run_suite("candidates"), cells=2)


@pytest.mark.slow
def test_candidates_on_any_mesh() -> None:
    judge_candidates(run_suite("candidates", full=True), cells=12)


def test_groups_must_fit_the_mesh() -> None:
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import AbstractMesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import topkast_jax as tk

    mesh = AbstractMesh((4,), ("fsdp",))

    def cut(groups: int, spec: P, along: str = "outputs") -> Any:
        structure = tk.groups_of(groups, along=along)
        method = tk.static(0.5, structure=structure)
        tx = tk.sparse(optax.sgd(0.1), method, layout="packed")
        _, state = tk.shapes(
            tx, {"kernel": jax.ShapeDtypeStruct((16, 24), jnp.float32)}
        )
        shardings = {"kernel": NamedSharding(mesh, spec)}
        return tk.packed_shardings(tk.masks(state), shardings)["kernel"].spec

    assert cut(8, P(None, "fsdp")) == P("fsdp", None)
    assert cut(4, P("fsdp"), "inputs") == P("fsdp", None)
    assert cut(1, P()) == P(None)
    with pytest.raises(ValueError, match="'kernel' has 6 groups.* cut them into 4"):
        cut(6, P(None, "fsdp"))
    with pytest.raises(
        ValueError, match="along axis 0, but its groups lie along axis 1"
    ):
        cut(4, P("fsdp", None))
    with pytest.raises(ValueError, match="axis 0, but it has no groups.*groups_of.4,"):
        cut(1, P("fsdp", None))

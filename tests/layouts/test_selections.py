"""Looking numbers up in a set: through a table, and by bisection."""

import numpy as np
import pytest

from topkast_jax.layouts import selections

AMONG = {
    "table": selections.TABLE // 2,
    "bisection": 100 * selections.TABLE,
}


def some(rng: np.random.Generator, n: int, among: int) -> np.ndarray:
    return rng.choice(among, n, replace=False)


@pytest.mark.parametrize("n", [0, 1, 200])
@pytest.mark.parametrize("way", AMONG)
def test_contains(way: str, n: int) -> None:
    rng = np.random.default_rng(0)
    among = 200 * AMONG[way]
    members = np.sort(some(rng, 200, among))
    keys = np.concatenate([some(rng, n, among), members[:n]])
    found = selections.contains(members, keys)
    np.testing.assert_array_equal(found, np.isin(keys, members))
    assert not selections.contains(members[:0], keys).any()


@pytest.mark.parametrize("n", [0, 1, 200])
@pytest.mark.parametrize("way", AMONG)
def test_find(way: str, n: int) -> None:
    rng = np.random.default_rng(1)
    among = 200 * AMONG[way]
    members = some(rng, 200, among).astype(np.int32)
    keys = np.concatenate([members[:n][::-1], some(rng, n, among)]).astype(np.int32)
    found = selections.find(members, keys)
    stands = {int(m): i for i, m in enumerate(members)}
    assert found.tolist() == [stands.get(int(key), -1) for key in keys]
    assert selections.find(members[:0], keys).tolist() == [-1] * len(keys)

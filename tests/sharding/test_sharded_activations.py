"""Sparse cotangents and activations on eight devices: equal to one, and nothing gathered."""

from fake_devices import run_suite


def test_activations_are_equal_on_one_and_eight_devices() -> None:
    found = run_suite("activations")
    assert found["kept/rows"] > 0
    equal = {c: r for c, r in found.items() if c.startswith("equal/")}
    assert len(equal) == 12
    assert all(equal.values()), equal
    gathers = {c: r for c, r in found.items() if c.startswith("gathers/")}
    assert len(gathers) == 4
    assert not any(gathers.values()), gathers

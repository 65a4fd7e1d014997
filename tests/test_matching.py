"""Masks compared up to a permutation of neurons."""

import numpy as np
import pytest

import topkast_jax as tk

CHAIN = ["one", "two", "three"]


def network(seed: int, density: float = 0.2) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {"one": (12, 16), "two": (16, 20), "three": (20, 5)}
    return {name: draw.random(shape) < density for name, shape in shapes.items()}


def permuted(masks: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The same network with its hidden units in another order."""
    draw = np.random.default_rng(seed)
    first, second = draw.permutation(16), draw.permutation(20)
    return {
        "one": masks["one"][:, first],
        "two": masks["two"][first][:, second],
        "three": masks["three"][second],
    }


def test_a_permuted_network_is_found_again():
    masks = network(0)
    found = tk.matched_overlap(masks, permuted(masks, 1), CHAIN)
    for path in CHAIN:
        assert found[path].matched == 1
        assert found[path].plain < 0.5


def test_equal_networks_overlap_wholly_and_different_ones_a_little():
    same = tk.matched_overlap(network(0), network(0), CHAIN)
    assert all(each.plain == each.matched == 1 for each in same.values())
    other = tk.matched_overlap(network(0), network(1), CHAIN)
    for path in CHAIN[:2]:  # the last has no outputs to match
        assert 0 < other[path].plain < other[path].matched < 1


def test_chance_is_the_mean_overlap_of_random_masks():
    draw = np.random.default_rng(2)
    overlaps = []
    for _ in range(300):
        a, b = draw.random((2, 40, 40)) < 0.2
        overlaps.append((a & b).sum() / (a | b).sum())
    a, b = draw.random((2, 40, 40)) < 0.2
    chance = tk.matched_overlap({"w": a}, {"w": b}, ["w"])["w"].chance
    assert chance == pytest.approx(np.mean(overlaps), abs=0.015)  # density is drawn too


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (["one", "none"], "no matrix of masks at 'none'"),
        (["one", "three"], "has 20 inputs, and the layer before it 16 outputs"),
    ],
)
def test_what_is_no_chain(chain, message):
    with pytest.raises(ValueError, match=message):
        tk.matched_overlap(network(0), network(1), chain)


def test_agreement_of_one_network_under_permutations_is_whole():
    masks = [permuted(network(0), seed) for seed in range(3)]
    found = tk.mask_agreement(masks, CHAIN)
    for path in CHAIN:
        assert found[path].matched == 1
        assert found[path].plain < 0.5 and found[path].random < 0.5


def test_agreement_is_the_mean_over_pairs():
    one, two = network(0), network(1)
    found = tk.mask_agreement([one, one, two], CHAIN)["one"]
    pair = tk.matched_overlap(one, two, CHAIN)["one"]
    assert found.plain == pytest.approx((1 + 2 * pair.plain) / 3)
    assert found.matched == pytest.approx((1 + 2 * pair.matched) / 3)


def test_random_networks_agree_like_random_networks():
    draw = np.random.default_rng(3)
    chain = ["one", "two"]
    masks = [
        {"one": draw.random((60, 80)) < 0.2, "two": draw.random((80, 60)) < 0.2}
        for _ in range(5)
    ]
    for found in tk.mask_agreement(masks, chain).values():
        assert found.matched == pytest.approx(found.random, abs=0.015)


def test_one_network_has_nothing_to_agree_with():
    with pytest.raises(ValueError, match="two networks or more, not 1"):
        tk.mask_agreement([network(0)], CHAIN)

"""Different methods in one model, from a config."""

import pathlib
from typing import Any

import pytest

import topkast_jax as tk
from experiments.assembly import assemble
from experiments.config import Watched
from experiments.train import train

RULES = (
    ("hidden/bias", "dense"),
    (
        "hidden/*",
        {
            "method": "top_kast",
            "forward_sparsity": 0.75,
            "backward_sparsity": 0.5,
            "refresh": 3,
        },
    ),
    ("*", {"method": "set", "sparsity": 0.5, "drop_fraction": 0.5, "refresh": 2}),
)


def rules(*changed: Any, **more: Any) -> dict[str, Any]:
    return {"method": "rules", "rules": changed or RULES, **more}


@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_a_mixture_trains(layout: str, tiny: Any, tmp_path: pathlib.Path) -> None:
    outcome = train(tiny(sparse=rules(layout=layout)), tmp_path)
    assert outcome.step == 12
    shares = tk.metrics.sparsity(tk.masks(outcome.state.opt_state))
    assert shares["hidden/kernel"] == (0.75, 0.5)
    assert shares["out/kernel"] == (0.5, 0.5)


def test_rules_of_a_config_make_a_mixture(tiny: Any) -> None:
    run = assemble(Watched(tiny(sparse=rules())))
    assert isinstance(run.method, tk.Mixture)
    assert run.plan().count("hidden/bias") == 1
    assert "sparse, dense + top_kast + set" in run.plan()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((("*", 0.9),), "has 0.9; say 'dense', or a mapping"),
        ((("*", {"method": "ring"}),), "sparse.method='ring' is unknown"),
        ((("*", {"method": "static", "density": 1}),), "sparse.density is no argument"),
        ((("*", rules()),), "has rules of its own"),
        ((("tail/*", {"method": "static", "sparsity": 0.5}),), "matches no parameter"),
        ((("out/*", {"method": "static", "sparsity": 0.5}),), "no rule covers"),
    ],
)
def test_rules_that_make_no_sense(given: Any, message: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(Watched(tiny(sparse=rules(*given)))).abstract()


def test_rules_take_no_arguments_of_a_method(tiny: Any) -> None:
    with pytest.raises(ValueError, match="sparse.sparsity is no argument of rules"):
        assemble(Watched(tiny(sparse=rules(sparsity=0.5))))

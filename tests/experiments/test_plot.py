"""The picture is drawn from whatever rows there are."""

import json
import pathlib
from typing import Any

import pytest
from matplotlib.image import imread

from experiments import plot

DENSE = {
    "kind": "dense",
    "step": 0,
    "step_time": 0.02,
    "dense_step_time": 0.019,
    "time_ratio": 1.05,
    "state_bytes_ratio": 1.2,
    "memory_ratio": None,
}
TRAIN = [
    {"kind": "train", "step": s, "loss": 3.0 / s, "bits_per_byte": 4.3 / s,
     "flops_fraction": 0.13, **({"churn": 0.1 / s} if s % 2 else {})}
    for s in range(1, 9)
]  # fmt: skip
EVAL = [{"kind": "eval", "step": s, "bits_per_byte": 5.0 / s} for s in (4, 8)]
PATHS = [f"block_{i}/attention/query/kernel" for i in range(12)]
LAYERS = {"kind": "layers", "step": 8, "forward": dict.fromkeys(PATHS, 0.9),
          "backward": dict.fromkeys(PATHS, 0.8)}  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [DENSE],
        TRAIN,
        [{"kind": "train", "step": 1, "loss": None}],
        [{"kind": "train", "step": 1, "loss": 2.0}],
        [DENSE, *TRAIN, *EVAL, LAYERS],
    ],
    ids=["none", "dense", "train", "nan", "no bits", "all"],
)
def test_summary(tmp_path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    path = plot.summary(tmp_path, "a title")
    assert path == tmp_path / "summary.png"
    height, width, _ = imread(path).shape
    assert width > 1500 and height > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", path.name]


def test_a_fraction_of_flops_is_never_shown_as_speed() -> None:
    """The label says what it is, wherever the bar is drawn."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    plot._cost(axes, [DENSE, *TRAIN])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert "simulated:\nmasked layout" in labels[0]
    assert "measured" in labels[1] and "measured" in labels[2]
    packed = Figure().add_subplot()
    plot._cost(packed, [DENSE | {"simulated": 0.0}, *TRAIN])
    assert packed.get_yticklabels()[0].get_text() == "FLOPs\nanalytic"

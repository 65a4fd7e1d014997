"""A report shows finished runs, says what a number means, and opens in a browser."""

import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from typing import Any

import made_runs
import matplotlib.image
import pytest
from made_runs import config, write
from runs import ROOT

from experiments import command
from experiments import report as reporting
from experiments.reports import groups, pictures, runs, tables
from experiments.train import train

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
PICTURES = ("flops", "time", "parameters", "learning", "churn", "reservoir", "layers")


def read_all(*folders: pathlib.Path) -> list[runs.Run]:
    return [runs.read(folder) for folder in runs.find(map(str, folders))]


def test_a_run_is_read(tmp_path: pathlib.Path) -> None:
    sparse = runs.read(write(tmp_path / "a", config("set", 3), 0.5))
    assert sparse.metrics == {"accuracy": 0.5, "loss": 0.5}
    assert sparse.seconds == 0.5 * made_runs.STEPS  # of all steps, however logged
    assert sparse.flops == made_runs.DENSE_FLOPS / 4 and sparse.flops_fraction == 0.25
    assert sparse.size == 128 + 16 + 64
    assert sparse.parameters == (128 + 64) // 4 + 16  # a bias has no mask
    assert sparse.ratios == {"time_ratio": 1.25, "state_bytes_ratio": 1.1}
    assert sparse.simulated
    assert sparse.origin == runs.Origin(
        "0123456789abcdef-dirty", "1 x cpu", "2", "0.10.2", "2023-11-14 22:13"
    )
    dense = runs.read(write(tmp_path / "b", config("dense", 3), 0.5))
    assert dense.parameters == dense.size == 208 and not dense.simulated
    block = runs.read(write(tmp_path / "c", config("set", 3, layout="block"), 0.5))
    assert not block.simulated


def tear(path: pathlib.Path) -> None:
    path.write_text(path.read_text()[:-30])


def spoil_meta(folder: pathlib.Path) -> None:
    (folder / "checkpoints" / "40" / "meta" / "metadata").write_text("{")


def change_meta(folder: pathlib.Path) -> None:
    saved = folder / "checkpoints" / "40"
    (saved / "sha256.json").write_text(json.dumps({"meta/metadata": "0" * 64}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: shutil.rmtree(f / "checkpoints"),
            "unfinished: no checkpoint, .* 40",
        ),
        (lambda f: tear(f / "metrics.jsonl"), "damaged: .*'eval' up to step 30"),
        (lambda f: (f / "metrics.jsonl").unlink(), "damaged: .*'train' up to step 0"),
        (lambda f: (f / "metrics.jsonl").write_text("[]\n"), "damaged: TypeError"),
        (
            lambda f: (f / "metrics.jsonl").write_bytes(b"\xff"),
            "damaged: UnicodeDecode",
        ),
        (spoil_meta, "damaged: .*checkpoints/40 cannot be read"),
        (change_meta, "damaged: .*meta/metadata has changed since"),
    ],
    ids=["no checkpoint", "torn", "no log", "no rows", "no text", "no json", "changed"],
)
def test_a_run_that_cannot_be_shown_says_why(
    tmp_path: pathlib.Path, spoil: Callable[[pathlib.Path], None], said: str
) -> None:
    folder = write(tmp_path / "a", config("set", 0), 0.5)
    spoil(folder)
    with pytest.raises(runs.Unusable, match=said):
        runs.read(folder)


def test_other_runs_are_left_out_and_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        write(tmp_path / "in" / f"good-{seed}", config("set", seed), 0.5)
    write(tmp_path / "in" / "goes-on", config("set", 2), 0.5, reached=20)
    write(tmp_path / "in" / "nan", config("set", 3), None)
    write(tmp_path / "in" / "twice", config("set", 1), 0.9)
    (tmp_path / "in" / "no-run").mkdir()
    page = reporting.report([str(tmp_path / "in")], str(tmp_path / "out"))
    said = capsys.readouterr()
    reasons = {
        "goes-on": "unfinished: step 20 of 40",
        "nan": "accuracy is not finite after the last step",
        "twice": "config and seed are those of",
    }
    for name, why in reasons.items():
        assert re.search(f"left out: .*/{name}: {why}", said.err)
        assert re.search(f"/{name}</code>: {why}", page.read_text())
    assert "Accuracy of 1 group, 2 runs, 3 left out" in said.out
    assert "no-run" not in page.read_text()
    assert "| set | 2 | 0.500 ± 0.000 |" in (tmp_path / "out/table.md").read_text()


def test_groups_and_their_names(tmp_path: pathlib.Path) -> None:
    for seed in (0, 1):
        write(tmp_path / f"plain-{seed}", config("set", seed), 0.5)
        other = config("set", seed, structure="fan_in", sparsity=0.9)
        write(tmp_path / f"fan-in-{seed}", other, 0.4)
        wide = config("set", seed, structure="fan_in", sparsity=0.9)
        wide |= {"model": {"width": 32}, "data_dir": f"of/{seed}", "dense_steps": seed}
        write(tmp_path / f"wide-{seed}", wide, 0.6)
        write(tmp_path / f"dense-{seed}", config("dense", seed), 0.9)
        both = config("top_kast", seed, forward_sparsity=0.9, backward_sparsity=0.8)
        del both["sparse"]["sparsity"]
        write(tmp_path / f"top-{seed}", both, 0.7 + seed / 10)
    found = groups.grouped(read_all(tmp_path), "accuracy")
    assert [group.label for group in found] == [
        "dense", "top_kast", "set 90 fan_in width=32", "set 75", "set 90 fan_in width=16",
    ]  # fmt: skip
    assert [len(group.runs) for group in found] == [2] * 5
    assert str(found[1].metric("accuracy")) == "0.750 ± 0.071"
    lower = groups.grouped(read_all(tmp_path), "loss")
    assert lower[0].metric("loss") == groups.Spread(0.5, 0.0)
    apart = groups.told_apart(found)
    assert apart["model.width"] == [16, 16, 32, 16, 16]
    assert apart["sparse.structure"] == ["-", "-", "fan_in", "-", "fan_in"]
    assert "seed" not in apart and "steps" not in apart and "data_dir" not in apart
    assert tables.common(found)["steps"] == made_runs.STEPS


def test_a_sweep_names_its_groups(tmp_path: pathlib.Path) -> None:
    for seed in (0, 1):
        for method, name in (("set", "random growth"), ("rigl", "by gradient")):
            labels = {"method": name, "of": "A", "seed": seed}
            write(
                tmp_path / f"{method}-{seed}", config(method, seed), 0.5, labels=labels
            )
    found = groups.grouped(read_all(tmp_path), "accuracy")
    assert [group.label for group in found] == ["by gradient A", "random growth A"]
    # Of two sweeps whose names collide, the configs decide.
    write(tmp_path / "two", config("static", 0), 0.1, labels={"m": "by gradient A"})
    found = groups.grouped(read_all(tmp_path), "accuracy")
    assert [group.label for group in found] == ["rigl", "set", "static"]


def test_ties(tmp_path: pathlib.Path) -> None:
    """A gap under two deviations, the larger; one seed has none."""
    values = {"dense": (0.90, 0.92), "rigl": (0.80, 0.82), "set": (0.76, 0.80),
              "static": (0.70, 0.71), "snfs": (0.79,), "deep_r": (0.60,)}  # fmt: skip
    for method, each in values.items():
        for seed, value in enumerate(each):
            write(tmp_path / f"{method}-{seed}", config(method, seed), value)
    found = groups.grouped(read_all(tmp_path), "accuracy")
    said = dict(
        zip([g.label for g in found], groups.standing(found, "accuracy"), strict=True)
    )
    tie = ["a tie with the best of the sparse"]
    assert said == {"dense": ["best"], "rigl": ["best of the sparse"], "set": tie,
                    "snfs": tie, "static": [], "deep_r": []}  # fmt: skip
    alone = [g for g in found if g.label in ("snfs", "deep_r")]
    assert groups.standing(alone, "accuracy") == [["best"], []]


def test_a_share_of_flops_never_stands_alone(tmp_path: pathlib.Path) -> None:
    """Measured ratios beside it, and the words where nothing is left out."""
    write(tmp_path / "a", config("set", 0), 0.5)
    write(tmp_path / "b", config("dense", 0), 0.6)
    write(tmp_path / "d", config("rigl", 0), 0.4, beside=False)
    found = groups.grouped(read_all(tmp_path), "accuracy")
    rows = tables.results(found, "accuracy")
    columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}
    assert columns["group"] == ["dense", "set", "rigl"]
    assert columns["FLOPs / dense (simulated: masked layout)"] == [
        "1",
        "0.250",
        "0.250",
    ]
    assert columns["time / dense"] == ["1", "1.25", "1.00 (of another run)"]
    assert columns["bytes / dense"] == ["1", "1.10", "-"]
    assert columns["training GFLOPs"] == ["3", "0.75", "0.75"]
    assert columns["parameters"] == ["208", "64", "64"]
    assert columns["churn at last"] == ["-", "0.020", "0.020"]
    write(tmp_path / "c", config("set", 0, layout="block"), 0.5)
    found = groups.grouped(read_all(tmp_path), "accuracy")
    rows = tables.results(found, "accuracy")
    of = {row[0]: row[rows[0].index("FLOPs / dense")] for row in rows[1:]}
    assert of == {"dense": "1", "rigl": "0.250 (simulated: masked layout)",
                  "set masked": "0.250 (simulated: masked layout)",
                  "set block": "0.250"}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "gap"),
    [([0.5, 0.5, 0.52, 0.9, 0.0], 0.1), ([1, 1, 1], 0.2), ([0] * 50, 0.1), ([0.3], 1)],
)
def test_labels_keep_apart(wanted: list[float], gap: float) -> None:
    places = pictures.apart(wanted, gap)
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    by_place = sorted(range(len(wanted)), key=places.__getitem__)
    assert [wanted[i] for i in by_place] == sorted(wanted)
    ordered = sorted(places)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(ordered))


def test_labels_stay_where_there_is_room() -> None:
    assert pictures.apart([0.7, 0.1, 0.4], 0.2) == pytest.approx([0.7, 0.1, 0.4])
    assert pictures.apart([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])


@pytest.mark.parametrize(
    ("path", "out", "metric", "said"),
    [
        ("nowhere", "out", None, "nowhere is no folder"),
        ("empty", "out", None, "empty holds no run"),
        ("begun", "out", None, "no finished run: begun/a: unfinished: step 20 of 40"),
        ("nan", "out", None, "no run has a finite accuracy: nan/a: accuracy is not"),
        ("good", "out", "perplexity", "perplexity: good/a has accuracy, loss"),
        ("good", "good/a/metrics.jsonl", None, "File exists: 'good/a/metrics.jsonl'"),
    ],
)
def test_bad_input(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    out: str,
    metric: str | None,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "begun" / "a", config("set", 0), 0.5, reached=20)
    write(tmp_path / "nan" / "a", config("set", 0), None)
    write(tmp_path / "good" / "a", config("set", 0), 0.5)
    with pytest.raises(command.BadInput, match=said), command.checking():
        reporting.report([path], out, metric)
    assert not (tmp_path / "out").exists()


def test_the_program(tmp_path: pathlib.Path) -> None:
    """Folders are arguments, and what is wrong is one line."""
    root = write(tmp_path / "begun" / "a", config("set", 0), 0.5, reached=20).parent
    done = subprocess.run(
        [sys.executable, "-m", "experiments.report", str(root), "--out=never"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "unfinished: step 20 of 40" in done.stderr
    assert not (ROOT / "never").exists()


def test_runs_of_two_tasks_do_not_compare(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a", config("set", 0), 0.5)
    write(tmp_path / "b", config("set", 1), 0.5, metric="bits_per_byte")
    assert groups.choose_metric(read_all(tmp_path), None) == "loss"
    assert groups.choose_metric(read_all(tmp_path / "b"), None) == "bits_per_byte"
    one, two = read_all(tmp_path)
    with pytest.raises(ValueError, match="no metric is common to all runs"):
        groups.choose_metric([one, two._replace(metrics={"perplexity": 3.0})], None)


@pytest.mark.parametrize("many", [False, True], ids=["few groups", "many groups"])
def test_pictures(tmp_path: pathlib.Path, many: bool) -> None:
    root = made_runs.sweep(tmp_path / "in", reservoir=True)
    if many:
        for layers in range(8):
            given = config("static", 0, depth=layers)
            write(root / f"static-{layers}", given, 0.5 + layers / 50)
    out = tmp_path / "out"
    page = reporting.report([str(root)], str(out)).read_text()
    written = sorted(path.name for path in out.iterdir())
    assert written == sorted(
        [*(f"{p}.png" for p in PICTURES), "report.html", "table.md"]
    )
    for name in PICTURES:
        height, width, _ = matplotlib.image.imread(
            BytesIO((out / f"{name}.png").read_bytes())
        ).shape
        assert width > 800 and height > 300
    assert page.count('src="data:image/png;base64,') == len(PICTURES)
    assert page.count("<figcaption>") == page.count(" alt=") == len(PICTURES)
    assert not re.search(
        r"""(src|href)=["'](?!data:|#)""", page
    )  # nothing from outside
    assert "At the end set has used 40.0 %" in page.replace("rigl has", "set has")


def test_a_report_without_masks_or_reservoir(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "in" / "a", config("dense", 0), 0.5)
    page = reporting.report([str(tmp_path / "in")], str(tmp_path / "out")).read_text()
    assert "--config.sparse.track_reservoir=True" in page
    assert "there are no masks" in page and "No run changed its masks" in page
    assert "simulated" not in page
    assert not (tmp_path / "out" / "layers.png").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: the page was not opened")
@pytest.mark.parametrize("width", [1300, 500])
def test_chromium_shows_the_page(tmp_path: pathlib.Path, width: int) -> None:
    """All pictures are there, nothing complains, and the page does not run sideways."""
    root = made_runs.sweep(tmp_path / "in & <out>", reservoir=True)
    page = reporting.report([str(root)], str(tmp_path / "out"))
    probe = """<script>addEventListener("load", () => {
      const seen = [...document.images].map((i) => i.complete && i.naturalWidth > 0);
      const side = document.documentElement.scrollWidth - innerWidth;
      document.title = JSON.stringify({seen, side});
    })</script></body>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe))
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         "--virtual-time-budget=5000", f"--window-size={width},900",
         probed.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    found = json.loads(title[1])
    assert found["seen"] == [True] * len(PICTURES)
    assert found["side"] <= 0
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "in &amp; &lt;out&gt;/rigl-0" in done.stdout


def test_real_runs(tmp_path: pathlib.Path, tiny: Callable[..., Any]) -> None:
    """What train.py writes today is what a report reads."""
    for seed in (0, 1):
        given = tiny(seed=seed, name=f"tiny-{seed}", sparse__track_reservoir=True)
        train(given, tmp_path / "in" / str(seed))
    page = reporting.report([str(tmp_path / "in")], str(tmp_path / "out")).read_text()
    (group,) = groups.grouped(read_all(tmp_path / "in"), "loss")
    assert [run.config["seed"] for run in group.runs] == [0, 1]
    assert group.metric("loss").deviation > 0
    # hidden/kernel [16, 32] and out/kernel [32, 1] at 75 %, and a bias.
    assert {run.parameters for run in group.runs} == {(512 + 32) // 4 + 32}
    last = group.last("reservoir_used")
    assert last is not None and 0 < last.mean < 1
    assert "top_kast" in page and re.search(r"has used \d+\.\d %", page)
    run = group.runs[0]
    assert run.origin.devices == "1 x cpu" and run.origin.saved.startswith("20")

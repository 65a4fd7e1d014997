"""A floor of the library imports lower floors only; experiments use public names only."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = [
    ["_types", "_trees", "draw"],
    ["distribution", "schedule", "score", "select", "apportion", "structure", "halving", "grid", "levels",
     "portion", "pairs"],
    ["layouts", "forward", "ops", "activations"],
    ["methods"],
    ["mixture", "plan", "transformation", "statistics", "faults", "sets", "sharding", "packing", "moments",
     "packed", "start", "shapes", "job", "refresh", "convert", "probe",
     "optimizer", "health", "drop_in", "mask_files", "matching", "metrics"],
    ["flax"],
]  # fmt: skip
# Within a floor: the later of two may import the earlier.
ORDER = [module for floor in FLOORS for module in floor]


def imported(path: pathlib.Path) -> set[str]:
    """Dotted names of the library that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "topkast_jax":
                names |= {f"topkast_jax.{alias.name}" for alias in node.names}
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "topkast_jax"}


def test_every_module_has_a_floor():
    package = ROOT / "topkast_jax"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert modules == set(ORDER)


def test_imports_go_down():
    package = ROOT / "topkast_jax"
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imported(path):
            other = [*name.split("."), ""][1]
            if other and other in ORDER and other != own:
                assert ORDER.index(other) < ORDER.index(own), f"{path} imports {name}"


def test_only_the_named_packages():
    allowed = {"jax", "optax", "numpy", "scipy", "jaxtyping", "topkast_jax"}
    standard = __import__("sys").stdlib_module_names
    for path in (ROOT / "topkast_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                here = allowed | ({"flax"} if path.parent.name == "flax" else set())
                assert top in here or top in standard, f"{path} imports {name}"


def test_experiments_use_public_names():
    for folder in ("experiments", "configs", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert imported(path) <= {"topkast_jax"}, path


def test_models_know_nothing_of_sparsity():
    for path in (ROOT / "experiments" / "models").rglob("*.py"):
        assert not imported(path), path

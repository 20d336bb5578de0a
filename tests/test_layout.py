"""The tree keeps its shape: one op in every folder, imports downward, short files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastens"
LEVELS = [  # a module imports from its own level or below
    {"cli", "__main__"},
    {"ratios", "tune"},
    {"composition", "demo", "interop", "evaluation", "merging", "tabular", "samplers", "training", "uncertainty"},
    {"runs", "distributed"},
    {"checkpoints"},
    {
        "ensemble",
        "dropout",
        "draws",
        "adaptive",
        "aggregation",
        "parameterisation",
        "outputs",
        "laplace",
        "schemes",
        "adapters",
        "methods",
        "settings",
        "members",
        "pickled",
        "summary",
        "views",
    },
    {"capture"},
    {"fold", "report"},
    {"plan"},
    {"ops"},
    {
        "reference",
        "kernels",
        "_native",
        "_build",
        "rules",
        "schedules",
        "program",
        "_version",
        "reproducible",
        "files",
        "io",
        "provenance",
    },
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def level(module):
    return next(i for i, names in enumerate(LEVELS) if module in names)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastens" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = level(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    known = {name for names in LEVELS for name in names}
    lazily_up = {"checkpoints"} if path.name == "ensemble.py" else set()  # Ensemble(paths), from_pretrained
    for module in imported(path):
        if module in known - lazily_up:
            assert level(module) >= own, f"{path} imports fastens.{module}"


def test_every_op_has_a_reference():
    for path in (PACKAGE / "ops").glob("[a-z]*.py"):
        assert (PACKAGE / "reference" / path.name).exists(), path.name


def test_files_are_short():
    for folder in ("fastens", "csrc", "tests", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                assert len(path.read_text().splitlines()) <= 450, f"{path}: one concept, or several?"

"""The tree keeps its shape: one op in every folder, imports downward, short files."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastens"
LEVELS = [  # a module imports from its own level or below
    {"cli", "__main__"},
    {"ratios", "tune"},
    {"composition", "demo", "interop", "evaluation", "merging", "tabular", "samplers", "training", "uncertainty"},
    {"runs", "sampler_call", "distributed"},
    {
        "ensemble",
        "by_rows",
        "checkpoints",
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
        "through_forward",
        "holders",
        "generators",
        "settings",
        "members",
        "pickled",
        "summary",
        "views",
    },
    {"capture"},
    {"internal"},
    {"engine"},
    {"network", "report"},
    {"fold"},
    {"plan"},
    {"trace"},
    {"ops"},
    {
        "reference",
        "kernels",
        "_native",
        "_build",
        "device",
        "rules",
        "schedules",
        "program",
        "_version",
        "reproducible",
        "files",
        "io",
        "modes",
        "provenance",
        "proven",
        "raw",
        "refusals",
        "scopes",
    },
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def level(module):
    return next(i for i, names in enumerate(LEVELS) if module in names)


def name_of(path):
    parts = ("fastens", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def nodes_of(node):
    """What a module runs: all but what is there for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from nodes_of(child)


def imports_of(path):
    """The modules of the package that a file imports, within functions too."""
    for node in nodes_of(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [(alias.name, alias.name) for alias in node.names]
        else:
            continue
        yield from (module if module in MODULES else within for module, within in names if within.startswith("fastens"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = level(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    for module in imports_of(path):
        top = module.split(".")[1:2]
        if top:
            assert level(top[0]) >= own, f"{path} imports {module}"


def test_no_modules_import_each_other():
    graph = {name: {module for module in imports_of(path) if module in MODULES} for name, path in MODULES.items()}
    reached = {name: set(modules) for name, modules in graph.items()}
    for between in graph:  # Warshall
        for modules in reached.values():
            if between in modules:
                modules |= reached[between]
    circles = {
        frozenset(other.removeprefix("fastens.") for other in reached[name] if name in reached[other])
        for name in graph
        if name in reached[name]
    }
    assert not circles


def test_every_kernel_has_an_op():
    for path in (PACKAGE / "kernels").glob("[a-z]*.py"):
        assert (PACKAGE / "ops" / path.name).exists(), path.name


def test_every_op_has_a_reference():
    for path in (PACKAGE / "ops").glob("[a-z]*.py"):
        assert (PACKAGE / "reference" / path.name).exists(), path.name


def test_files_are_short():
    for folder in ("fastens", "csrc", "tests", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                assert len(path.read_text().splitlines()) <= 400, f"{path}: one concept, or several?"


# Beside the device itself: what compiles the library by nvcc, and what asks Triton for which driver it compiles.
NAME_A_KIND_OF_DEVICE = {"device.py", "_build.py", "kernels/_launch.py"}


def names_a_kind_of_device(node):
    """Whether code asks what a kind of GPU answers, by torch or by the kind's name."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.partition(":")[0] in ("cuda", "hip", "xpu")
    return isinstance(node, ast.Attribute) and (
        node.attr == "is_cuda" or re.match(r"torch\.((backends|version)\.)?(cuda|cudnn|hip|xpu)\b", ast.unparse(node))
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_questions_to_a_device_are_asked_of_the_device(path):
    """Another kind of GPU is one file; a list of torch's own names is no question."""
    found = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if names_a_kind_of_device(node)]
    if path.relative_to(PACKAGE).as_posix() not in NAME_A_KIND_OF_DEVICE:
        assert not found
    else:
        assert found


def test_types_are_checked_in_all_packages_alike():
    """A rule is switched off for a kernel's file, which is not Python, or for a line, with the reason; nowhere else."""
    assert "executionEnvironments" not in (ROOT / "pyproject.toml").read_text()
    for path in FILES:
        for line in path.read_text().splitlines():
            if "# pyright: " in line and not re.search(r"# pyright: ignore\[\w+(, \w+)*\]  # \w", line):
                assert path.parent.name == "kernels", f"{path}: {line}"
                assert re.match(r"# pyright: (\w+=false(, )?)+$", line), f"{path}: {line}"


def defined_in(tree):
    """Names that the classes of a file define: methods, class attributes, attributes of instances."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (each.name for each in node.body if isinstance(each, ast.FunctionDef))
            targets = [t for each in node.body if isinstance(each, ast.Assign) for t in each.targets]
            targets += [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_no_private_of_another_class_is_read():
    """What modules of the package ask of an ensemble beside its public surface is in ``fastens.internal``."""
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    own = {path: {name for name in defined_in(tree) if name.startswith("_")} for path, tree in trees.items()}
    ours = set().union(*own.values()) - {*dir(nn.Module()), *dir(torch.Tensor), "_make"}  # of torch and named tuples
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} reads {ast.unparse(node)}"
        for path, tree in trees.items()
        if path != PACKAGE / "internal.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ours - own[path] and not node.attr.startswith("__")
        if ast.unparse(node.value) not in ("self", "cls", "super()")
    ]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_taken_from_a_change_of_its_mode(path):
    """A class's own ``train()`` may return nothing; fastens/modes.py returns the module itself."""
    tree = ast.parse(path.read_text())
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    taken = [
        ast.unparse(node)
        for node in set(ast.walk(tree)) - alone
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("eval", "train", "to_empty")
        and ast.unparse(node.func) != "xgboost.train"
    ]
    assert not taken


BESIDE = sorted(path for folder in ("bench", "examples", "tests", "docs") for path in (ROOT / folder).rglob("*.py"))


def is_there(module, name):
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("path", BESIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_of_the_package_is_there(path):
    """Benchmarks, and modules that tests run in processes of their own, are imported by no test."""
    imported = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fastens"
        for alias in node.names
    ]
    assert not [f"{module}.{name}" for module, name in imported if not is_there(module, name)]

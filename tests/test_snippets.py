"""The documents' snippets: Python runs as it is written, commands exist and take their options, files are there."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from fastens.checkpoints import Checkpoints
from fastens.cli import _parser
from fastens.fold.dispatch import RULES
from fastens.network import registry
from fastens.ops import OPS
from tests.interop.libraries import library
from tests.interop.stand_ins import lucid_files
from tests.stand_ins import FUNCTIONS, STAND_INS, ens, imported, write_files

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.S | re.M)
COMMAND = re.compile(r"`((?:fastens|make|python -m)\s[^`]+|bench/\w+\.sh[^`]*)`")
COMMANDS = "demo info inspect sample evaluate tune bench completion".split()
FILE = re.compile(r"`((?:fastens|tests|bench|examples|docs|csrc|\.ci)/[\w/.*]+)`")


def fences(path, language):
    return [match for match in FENCE.finditer(path.read_text()) if match["language"] == language]


def snippets():
    for path in DOCUMENTS:
        for number, match in enumerate(fences(path, "python"), 1):
            marks = [pytest.mark.skip(reason=match["why"])] if match["why"] else []
            yield pytest.param(match["body"], id=f"{path.relative_to(ROOT)}-{number}", marks=marks)


def commands():
    for path in DOCUMENTS:
        text = path.read_text()
        lines = [line for match in fences(path, "") for line in match["body"].splitlines()]
        for line in [*lines, *COMMAND.findall(FENCE.sub("", text))]:
            words = shlex.split(line.translate(str.maketrans("", "", "[]")), comments=True)
            if words:
                yield pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)}")


def names_in(code):
    """The names that a snippet reads, in functions and comprehensions too."""
    inner = [names_in(constant) for constant in code.co_consts if hasattr(constant, "co_names")]
    return set(code.co_names).union(*inner)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("documents")
    write_files(root)
    return root


@pytest.fixture
def registries():
    """Keep nothing of what a snippet registers."""
    kept = [(table, dict(table)) for table in (OPS, RULES, registry._REGISTRY)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


@pytest.mark.parametrize("text", list(snippets()))
@pytest.mark.filterwarnings("error:fastens")
@pytest.mark.usefixtures("registries")
def test_a_snippet_runs_as_it_is_written(text, folder, monkeypatch):
    for name in re.findall(r"^(?:import|from) (k_diffusion|denoising_diffusion_pytorch|torchdiffeq)", text, re.M):
        library(name)
    if "ForestDiffusion" in text:
        pytest.importorskip("ForestDiffusion.diffusion_with_trees_class", exc_type=ImportError)
    if "GaussianDiffusion" in text:
        lucid_files(folder)
    monkeypatch.chdir(folder)
    ens.cache_clear()
    code = compile(text, "snippet", "exec")
    namespace = {"__name__": "snippet", **imported(), **FUNCTIONS}
    namespace |= {name: make() for name, make in STAND_INS.items() if name in names_in(code)}
    exec(code, namespace)
    for value in namespace.values():
        if isinstance(value, Checkpoints):  # which are read when they are asked for
            assert len(list(value)) == len(value) > 0


def test_every_stand_in_is_named_by_a_snippet():
    named = set().union(*(names_in(compile(text.values[0], "snippet", "exec")) for text in snippets()))
    assert {*STAND_INS, *FUNCTIONS} - named == set()


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_exists_and_takes_its_options(words):
    program, *arguments = words
    if program == "fastens" and len(arguments) == 1:
        assert arguments[0] in COMMANDS
    elif program == "fastens":
        assert _parser().parse_args(arguments).command == arguments[0]
    elif program == "make":
        targets = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines()}
        assert {argument for argument in arguments if "=" not in argument} <= targets
    elif program == "python":
        assert importlib.util.find_spec(arguments[1]) is not None
    else:
        assert (ROOT / program).is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(path):
    assert [name for name in FILE.findall(path.read_text()) if not any(ROOT.glob(name))] == []

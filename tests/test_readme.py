"""What the README says is there: a family's lines to change and its tests, links; and the reference has every name."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

import fastens
from tests.fresh import python

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TABLE = README.partition("| family | lines to change | test |")[2].partition("\n\n")[0]
FAMILIES = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TABLE.strip().splitlines()[1:]]
NAMES = "diffusers k-diffusion EDM score_sde guided-diffusion denoising-diffusion-pytorch torchcfm".split()


def test_every_family_is_there():
    assert len(FAMILIES) == len(NAMES)
    assert all(family[0].startswith(name) for family, name in zip(FAMILIES, NAMES, strict=True))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_a_family_changes_a_line_and_links_its_tests(family):
    _, lines, tests = family
    code = re.findall("`([^`]+)`", lines)
    assert 1 <= len(code) <= 2
    for line in code:
        assert "fastens." in line
        compile(line.replace("...", "x"), "README.md", "exec")
    links = re.findall(r"\]\(([^)]+)\)", tests)
    assert links
    for link in links:
        assert "def test_" in (ROOT / link).read_text()


PACKAGES = "composition evaluation rules samplers schedules schemes tabular training uncertainty".split()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
ENTRIES = dict(re.findall(r"^::: (fastens\S*)(?:\n    options: {members: (.*)})?$", REFERENCE, re.M))


def test_the_reference_has_every_public_name():
    documented = {path.split(".")[1] for path in ENTRIES}
    assert set(fastens.__all__) - documented == {"__version__", "demo"}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_name_of(package):
    def there(name: str, found: object) -> bool:
        members = ENTRIES.get(module.__name__, "none")
        # A submodule of the same name is what the reference would show: such a function has an entry of its own.
        listed = members == "" or name in re.findall(r"\w+", members)
        shown = listed and not (ROOT / "fastens" / package / f"{name}.py").exists()
        return shown or f"{found.__module__}.{name}" in ENTRIES or f"fastens.{name}" in ENTRIES

    module = importlib.import_module(f"fastens.{package}")
    names = {name: getattr(module, name) for name in module.__all__}
    assert [n for n, found in names.items() if callable(found) and not there(n, found)] == []


def test_names_in_the_documents_are_there():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    lines = [line for page in pages for line in page.read_text().splitlines() if not line.startswith(":::")]
    names = set(re.findall(r"(?<![\w/.-])(?<!python -m )fastens(?:\.[A-Za-z_]\w*)+", "\n".join(lines)))
    assert len(names) > 50
    # In a process of its own: here other tests may have imported what nothing else does.
    code = "import fastens, operator, sys\nfor name in sys.argv[1:]: operator.attrgetter(name[8:])(fastens)"
    result = python(code, *sorted(names))
    assert result.returncode == 0, result.stderr


def test_versions_agree():
    demo = tomllib.loads((ROOT / "demo" / "pyproject.toml").read_text())["project"]["version"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert {demo, cited, newest} == {fastens.__version__}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []

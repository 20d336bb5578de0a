"""What the README says is there: a family's lines to change and its tests, links; and the reference has every name."""

import re
import tomllib
from pathlib import Path

import pytest

import fastens

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


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.md").read_text()
    documented = set(re.findall(r"^::: fastens\.(\w+)", page, re.M))
    assert set(fastens.__all__) - documented == {"__version__", "demo"}


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

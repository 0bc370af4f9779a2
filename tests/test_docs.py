"""The documentation: the configuration reference is up to date, every link leads somewhere, and README stays short."""

import re
import runpy
from pathlib import Path

import pytest

from sclite.evaluate.table import HEADER

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")


def test_configuration_reference_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs/configuration.py"))["page"]
    found = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert found == page(), "run: python docs/configuration.py"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_leads_to_a_file_and_a_heading(page):
    for name, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{name}#{anchor}"


def test_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_shows_the_table_that_eval_prints():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert list(HEADER) in [re.split(r" {2,}", line.strip()) for line in lines]


def test_every_column_of_the_table_is_explained():
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    explained = ", ".join(re.findall(r"^\| ([^|`]+) \|", text, re.M)).split(", ")
    assert set(HEADER) - {"student"} <= set(explained)

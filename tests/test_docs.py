"""The documentation: the configuration reference is up to date, every link works, and the README stays short."""

import ast
import html
import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from sclite.inspect.summaries import HEADER

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
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


def test_readme_is_short_and_has_the_table_of_eval_whose_columns_are_explained():
    assert len(README) <= 150
    assert list(HEADER) in [re.split(r" {2,}", line.strip()) for line in README]
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    explained = ", ".join(re.findall(r"^\| ([^|`]+) \|", text, re.M)).split(", ")
    assert set(HEADER) - {"student"} <= set(explained)


def test_the_picture_shows_a_recorded_screen_in_its_colors():
    draw = runpy.run_path(str(ROOT / "docs/picture.py"))["draw"]
    drawn = draw("> How many?\n  \x1b[31m✗ 1\x1b[0m so 3" + 20 * "\n" + "the last line\n\n")
    found = re.findall(r"<text[^>]*>([^<]*)<", drawn)
    texts = [html.unescape(text).replace("\xa0", " ").strip() for text in found]
    assert [text for text in texts if text] == ["sclite chat", "> How many?", "✗ 1", "so 3", "the last line"]
    colors = dict(re.findall(r"\.(\S+) \{ fill: (#\w+)", drawn))
    marked = re.search(r'class="(\S+)"[^>]*>[^<]*✗', drawn).group(1)
    plain = re.search(r'class="(\S+)"[^>]*>[^<]*so', drawn).group(1)
    assert colors[marked] != colors[plain]


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("examples/**/*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("tests/benchmarks/*.py")],
    ids=lambda path: path.name,
)
def test_what_scripts_import_from_sclite_exists(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sclite":
            module = importlib.import_module(node.module)
            for whole in (f"{node.module}.{alias.name}" for alias in node.names):
                name = whole.rpartition(".")[2]
                assert hasattr(module, name) or importlib.util.find_spec(whole), whole

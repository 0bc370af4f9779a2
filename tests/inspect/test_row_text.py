"""A row in the terminal: its colors and headings; no reply can control the terminal."""

import pytest

from sclite.inspect.rows import format_row, highlight
from sclite.records import Attempt, Drop, Pair, Problem, Review, Row, Template

REVIEW = (
    "<Step1>48 + 24 = 72\n<Key>Carry.</Key>\n</Step1>\n<Step2>72 / 2 = 38\n<Cause>Half of 72 is not 38.</Cause>\n"
    "<Correction>72 / 2 = 36</Correction>\n</Step2>\n<Generalized>Halve.</Generalized>\n<Answer>36</Answer>"
)
PROBLEM = Problem(id="p1", question="How many [bold]?", answer="36", solution="It is 36.")


def style(text, words: str) -> str:
    """The style of these words in a highlighted text."""
    begin = text.plain.index(words)
    covering = [span for span in text.spans if span.start <= begin and begin + len(words) <= span.end]
    return str(covering[-1].style) if covering else ""


def test_tags_their_contents_and_the_wrong_step_are_colored():
    text = highlight(REVIEW)
    assert text.plain == REVIEW
    assert style(text, "<Step1>") == style(text, "</Cause>") == "dim cyan"
    assert style(text, "48 + 24 = 72") == ""
    assert style(text, "Carry.") == "yellow"
    assert style(text, "Half of 72 is not 38.") == "red"
    assert style(text, "72 / 2 = 36") == "green"
    assert style(text, "Halve.") == "magenta"
    text = highlight(REVIEW, wrong=2)
    assert style(text, "72 / 2 = 38") == "red"
    assert style(text, "48 + 24 = 72") == ""
    assert style(text, "72 / 2 = 36") == "green"


def test_malformed_text_is_shown_unchanged_but_for_control_characters():
    for text in ("", "no tags < 5 > 3", "<Step", "<Cause>open", "</Key></Key>", "<Step9><Step1>"):
        assert highlight(text).plain == text
    shown = highlight("a\x1b[2J\x1b]0;title\x07\x9b1m\rb\r\nc\td").plain
    assert shown == "a␛[2J␛]0;title␇␡1m␍b\nc\td"


PAIR = {"sample": 0, "step": 1, "kind": "content", "attempt": "a", "prefix": ("<Step1>x\n", "<Cause>")}
ATTEMPT = {"sample": 0, "trace": REVIEW, "answer": "36", "first_error": 2}
TEMPLATE = Template(id="p9", question="Its own?", answer="7", trace=REVIEW)
WRONG = {"72 / 2 = 38": "red"}


@pytest.mark.parametrize(
    ("row", "begin", "end", "styles"),
    [
        (
            Review(id="p1", sample=3, step=2, cause="c", correction="d", trace=REVIEW, requests=2),
            "5/9  p1  sample 3  wrong at step 2\nHow many [bold]?\ngold answer 36\n<Step1>",
            "</Answer>\n\n",
            {**WRONG, "5/9": "dim"},
        ),
        (
            Pair(id="p1", chosen="good</Cause>\n", rejected="bad</Cause>\n", origin="teacher", **PAIR),
            "5/9  p1  sample 0, content at step 1  chosen by teacher\n",
            "<Step1>x\n<Cause>\nchosen   good</Cause>\nrejected bad</Cause>\n\n",
            {"good</Cause>": "green", "bad</Cause>": "red"},
        ),
        (
            Drop(stage="templates", id="p7", reason="no_steps", detail="no tags", raw="Sure! [red]<html>"),
            "5/9  p7  templates  no_steps\nno tags\n",
            "\nSure! [red]<html>\n\n",
            {"no_steps": "bold red"},
        ),
        (Attempt(id="p1", correct=True, **ATTEMPT), "5/9  p1  sample 0  right\n", "\n\n", WRONG),
        (Attempt(id="p1", correct=False, **ATTEMPT), "5/9  p1  sample 0  wrong\n", "\n\n", {}),
        (Attempt(id="p1", correct=None, **ATTEMPT), "5/9  p1  sample 0  outcome unknown\n", "\n\n", {}),
        (PROBLEM, "5/9  p1\nHow many [bold]?\ngold answer 36\nIt is", " 36.\n\n", {}),
        (TEMPLATE, "5/9  p9\nIts own?\ngold answer 7\n<Step1>", "\n\n", {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Row) else "",
)
def test_a_row_shows_its_heading_question_and_text(row, begin, end, styles):
    text = format_row(row, 5, 9, {"p1": PROBLEM})
    assert text.plain.startswith(begin)
    assert text.plain.endswith(end)
    assert {words: style(text, words) for words in styles} == styles

"""The HTML report: its content, no external resources, and no model text as markup."""

import math
import re
from html.parser import HTMLParser

import pytest

from sclite.evaluate.metrics import Outcome, compute_metrics
from sclite.evaluate.report import write_report
from sclite.trace import Step, Trace, render

FIRST = render(Trace((Step("7 · 8 = 54"), Step("54 + 1 = 55")), answer="55"))
SECOND = render(Trace((Step("7 · 8 = 56"), Step("56 + 1 = 57")), answer="57"))
VOID = {"meta", "link", "br", "img", "line", "circle", "polyline"}


def outcome(correct1, correct2, number=0, **more):
    base = {"id": f"p{number}", "question": "7 · 8 + 1?", "gold": "57", "first": FIRST, "second": SECOND}
    return Outcome(**base | {"correct1": correct1, "correct2": correct2, "format_ok": True} | more)


def figures(*verdicts):
    return compute_metrics([outcome(*pair, number=k) for k, pair in enumerate(verdicts)], bootstrap=50)


MODELS = {"base": figures((True, True), (False, False), (None, None))}
MODELS["dpo"] = figures(*[(False, True), (True, True)] * 20)
SUMMARY = {"models": MODELS, "n": 40, "notes": ["2 problems overlap the training set"]}
REVIEW = {"accused": 1, "cause": "7 · 8 is 56", "correction": "7 · 8 = 56"}
EXAMPLE = outcome(False, True, true_step=1, true_known=True, **REVIEW)


class Reader(HTMLParser):
    """Collects tags, attributes and visible text, and checks that every tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes, closed=False):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID and not closed:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes, closed=True)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not {"style", "title"} & set(self.open):
            self.text.append(text)


@pytest.fixture
def write(tmp_path):
    def write(summary=SUMMARY, examples=(), curves=None):
        path = tmp_path / "eval" / "report.html"
        whole = {"baselines": {}, "n": 40, "notes": [], "source": "mine.jsonl", **summary}
        write_report(path, whole, examples, curves or {})
        page = path.read_text(encoding="utf-8")
        reader = Reader(page)
        return page, " ".join(" ".join(reader.text).split()), reader

    return write


def test_page_has_no_external_resources(write):
    curves = {"sft": losses(*(1 / (k + 1) for k in range(9)))}
    page, _, reader = write(examples=[("", EXAMPLE)], curves=curves)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(reader.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in reader.attributes}
    assert not re.search(r"url\(|@import|https?:", page)
    assert "default-src 'none'" in page


def test_figures_notes_and_unknown_outcomes_are_shown(write):
    model = MODELS["dpo"] | {"location": 0.591, "correction_rate_given_location": 0.628}
    _, text, _ = write(SUMMARY | {"models": MODELS | {"dpo": model}})
    for shown in (
        "base, dpo on 40 held-out problems from mine.jsonl",
        "59.1",
        "62.8",
        "1 unknown",
        *SUMMARY["notes"],
    ):
        assert shown in text
    _, text, _ = write({"models": {"sft": figures((None, None), (None, None))}, "n": 2})
    assert "2 unknown" in text


def test_undefined_figures_are_dashes(write):
    _, text, _ = write({"models": {"m": figures((None, None))}})
    assert text.rpartition(" m – ")[2].startswith("– – – – – –")  # up to the p-value
    _, text, _ = write({"models": {"m": MODELS["dpo"] | {"mcnemar_p": 1e-9}}})
    assert "< 0.001" in text


def test_example_shows_the_wrong_step_its_cause_and_correction(write):
    page, text, _ = write(examples=[("dpo", EXAMPLE)])
    # the second step is the second answer's
    assert re.findall(r"</span><div>\s*<p>(.*?)</p>", page) == ["7 · 8 = 54", "56 + 1 = 57"]
    assert "flagged, and the first wrong step" in text
    assert "&lt;Answer&gt;57" in page
    for shown in ("7 · 8 is 56", "dpo · p0", "First answer 55 wrong", "After review 57 right"):
        assert shown in text


def test_model_text_never_becomes_markup(write):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    texts = dict.fromkeys(("question", "gold", "note", "cause", "correction"), evil)
    hostile = EXAMPLE.model_copy(update=texts | {"first": f"<Step1>{evil}\n</Step1>"})
    summary = {"models": {evil: MODELS["dpo"]}, "notes": [evil], "source": evil}
    curves = {evil: [{"step": k, evil: k} for k in range(3)]}
    _, text, reader = write(summary, [(evil, hostile)], curves)
    assert not {"script", "img"} & set(reader.tags)
    assert "onerror" not in {name for name, _ in reader.attributes}
    assert text.count("<script>alert(1)</script>") >= 7


def test_dots_are_at_their_values(write):
    page, _, _ = write({"models": {"m": MODELS["dpo"] | {"acc_t1": 0.5, "acc_t1_interval": [0.25, 0.75]}}})
    assert '<line class="range before" x1="25.0%" x2="75.0%"' in page
    assert '<circle class="dot before" cx="50.0%"' in page


def test_curves_skip_missing_values_and_unplotted_metrics(write):
    row = {"phase": "dpo", "loss": 2.0, "dpo_loss": 0.69, "learning_rate": 1e-4}
    page, _, _ = write(curves={"dpo": [{"step": step, **row} for step in range(3)]})
    assert re.findall(r"<figcaption><b>(.*?)</b>", page) == ["dpo · loss", "dpo · dpo loss"]
    gaps = {"sft": [*losses(1.0, math.nan, 3.0), {"step": 3}, {"step": 4, "loss": 2.0}]}
    page, text, _ = write(curves=gaps)
    assert re.findall('points="(.*?)"', page) == ["0.00,100.00 50.00,0.00 100.00,50.00"]
    assert "sft · loss 2 3 1 0 4 " in f"{text} "  # last, highest and lowest value, first and last step
    page, _, _ = write(curves={"sft": losses(1.0, math.nan)})
    assert "<polyline" not in page


def losses(*values):
    return [{"step": step, "loss": value} for step, value in enumerate(values)]

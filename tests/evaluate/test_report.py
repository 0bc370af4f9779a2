"""The HTML report: its content, no external resources, and no model text as markup."""

import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sclite.evaluate import report
from sclite.evaluate.metrics import Outcome, compute_metrics
from sclite.evaluate.report import POINTS, Axis, curve_plots, example_parts, percent, write_report
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


def measured(acc_t2, difference, interval=None):
    return {"acc_t1": 0.5, "acc_t2": acc_t2, "difference": difference, "difference_interval": interval}


@pytest.mark.parametrize(
    ("row", "ending"),
    [
        (measured(0.5, 0.0), "answers, unchanged."),
        (measured(0.52, 0.02, [-0.01, 0.05]), "up from 50.0 %, which may be chance."),
        (measured(0.4, -0.1, [-0.2, -0.05]), "down from 50.0 %."),
        ({"acc_t1": None, "acc_t2": None}, "No results."),
    ],
)
def test_headline_claims_no_more_than_was_measured(write, row, ending):
    _, text, _ = write()
    assert "dpo gets 100.0 % right after reviewing its own answers, up from 50.0 %." in text
    assert "base and dpo on 40 held-out problems" in text
    page, _, _ = write({"models": {"m": row}})
    assert re.search(r"<h1>(.*)</h1>", page)[1].endswith(ending)


def test_figures_notes_and_unknown_outcomes_are_shown(write):
    model = MODELS["dpo"] | {"location": 0.591, "correction_rate_given_location": 0.628}
    _, text, _ = write(SUMMARY | {"models": MODELS | {"dpo": model}})
    for shown in ("59.1", "62.8", "base: 1 of 3 outcomes are unknown", "1 unknown", *SUMMARY["notes"]):
        assert shown in text
    _, text, _ = write({"models": {"sft": figures((None, None), (None, None))}, "n": 2})
    assert "No results." in text
    assert "sft: 2 of 2 outcomes are unknown" in text


def test_undefined_figures_are_dashes_and_numbers_typographic(write):
    assert percent(None) == report.decimal(None) == percent(math.nan) == "–"
    assert percent(0.0) == "0.0"
    _, text, _ = write({"models": {"m": {"acc_t1": 0.25, "acc_t2": None}}})
    assert text.split(" m 25.0 ")[1].startswith("– – – – – –")  # up to the p-value
    _, text, _ = write({"models": {"m": {"mcnemar_p": 1e-9}}})
    assert "< 0.001" in text
    values = (-0.034, 0.034, -0.00001, 0.00001, 0.10, -0.201)
    written = ["−3.4", "+3.4", "0.0", "0.0", "+10.0", "−20.1"]
    assert [percent(value, signed=True) for value in values] == written


def test_example_shows_the_wrong_step_its_cause_and_correction(write):
    shown = example_parts(EXAMPLE)
    first, second = (tuple(step[key] for key in ("number", "text", "accused")) for step in shown["steps"])
    assert (first, second) == ((1, "7 · 8 = 54", True), (2, "56 + 1 = 57", False))  # the second answer's
    assert (shown["cause"], shown["correction"]) == ("7 · 8 is 56", "7 · 8 = 56")
    assert shown["before"] == {"text": "55", "verdict": "wrong"}
    assert shown["after"] == {"text": "57", "verdict": "right"}
    assert example_parts(outcome(False, None))["after"]["verdict"] == "unknown"
    page, text, _ = write(examples=[("dpo", EXAMPLE)])
    assert "flagged, and the first wrong step" in text
    assert '<span class="tag-answer">&lt;Answer&gt;</span>57' in page
    assert "7 · 8 is 56" in text
    assert "dpo · p0" in text
    _, text, _ = write(examples=[("", outcome(False, True, first="fifty-five", second=None))])  # no steps
    assert "fifty-five" in text
    assert "no answer" in text
    assert "Second text" not in text


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


TAGS = st.sampled_from(["<Step1>", "</Step 12 >", "<Cause", "</cause>", "a < b", "\n"])


@given(st.text() | st.lists(TAGS).map("".join))
def test_pieces_join_to_the_text(text):
    shown = example_parts(outcome(False, True, first=text, second=None))["texts"]
    assert ["".join(piece for _, piece in pieces) for _, pieces in shown] == [text] * bool(text)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_enclose_the_values(low, span):
    values = Axis([low, low + span]).ticks
    assert values[0] <= low + 1e-6 * span
    assert values[-1] >= low + span - 1e-6 * span
    assert 2 <= len(values) <= 7


def test_dots_are_at_their_values():
    plot = report.accuracy_plot([{"name": "m", "acc_t1": 0.5, "acc_t1_interval": [0.4, 0.6], "acc_t2": 0.8}])
    row, marks = plot["rows"][0], {mark["text"]: mark["at"] for mark in plot["marks"]}
    assert row["first"]["at"] == marks["50"]
    assert (row["first"]["low"], row["first"]["high"]) == (marks["40"], marks["60"])
    assert row["second"]["at"] == row["second"]["low"] == marks["80"]
    figures = {"name": "m", "acc_t1": 0.5, "acc_t2": None}
    assert report.accuracy_plot([figures])["rows"][0]["second"] is None
    assert report.accuracy_plot([{"name": "m", "acc_t1": None}]) is None


def test_curves_have_losses_first_skip_missing_metrics_and_are_thinned():
    row = {"margin": 1, "dpo_loss": 0.69, "loss": 2.0, "learning_rate": 1e-4, "kind": "x"}
    plots = curve_plots({"dpo": [{"step": step, **row} for step in range(3)]})
    assert [plot["name"] for plot in plots] == ["loss", "DPO loss", "margin, chosen minus rejected"]
    assert [plot["level"] is not None for plot in plots] == [False, True, True]
    (plot,) = curve_plots({"sft": [*losses(1.0, None, math.nan, 9.0), {"step": 3, "loss": 0.5}]})
    assert len(plot["points"].split()) == 2
    assert plot["last"] == "0.5"
    assert curve_plots({"sft": losses(1.0, None, math.nan)}) == []
    (plot,) = curve_plots({"sft": losses(*[1.0] * 5000)})
    assert 100 < len(plot["points"].split()) <= POINTS


def losses(*values, **more):
    return [{"step": step, "loss": value, **more} for step, value in enumerate(values)]


def test_partial_last_batch_is_not_part_of_the_curves():
    steps = losses(*(1 / (k + 1) for k in range(8)), tokens=4000.0)
    last = {"step": 8, "loss": 9.0, "tokens": 250.0}
    (whole,), (plot,) = curve_plots({"sft": steps}), curve_plots({"sft": [*steps, last]})
    assert plot == whole
    (evaluated,) = curve_plots({"sft": [*steps, last, {"step": 8, "loss": None, "eval_loss": 0.5}]})
    assert evaluated == whole
    (kept,) = curve_plots({"sft": [*steps, last | {"tokens": 3000.0}]})
    assert kept["last"] == "9"

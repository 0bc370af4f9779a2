"""Traces: one canonical form, and a parser that reads whatever models write."""

import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sclite import trace as module
from sclite.trace import CAUSE, Issue, ParsedTrace, Step, Trace, corrected, parse, render

WHOLE = (
    "<Step1>48 + 24 = 72\n<Key>Carry the ten.</Key>\n</Step1>\n"
    "<Step2>72 / 2 = 36\n</Step2>\n"
    "<Generalized>Add, then share.</Generalized>\n<Answer>36</Answer>"
)
REVIEW = (
    "<Step1>48 + 24 = 62\n<Cause>The carry is lost.</Cause>\n<Correction>It is 72.</Correction>\n</Step1>\n"
    "<Step2>72 / 2 = 36\n</Step2>\n<Answer>36</Answer>"
)
LAST = Step("72 / 2 = 36")
SOLUTION = Trace((Step("48 + 24 = 72", "Carry the ten."), LAST), "Add, then share.", "36")
REVIEWED = Trace((Step("48 + 24 = 62", None, "The carry is lost.", "It is 72."), LAST), None, "36")

_odd = ["<", ">", "</", "< step", "<Stepping>", "a < b > c", "\\frac{1}{2}", "<think>", "</think>"]
_odd += ["<key", "step1>", "<cauſe>", "\n\n", "١", "\x1c", "<answer", " :>"]
_bits = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(_odd)), max_size=5)
texts = _bits.map("".join).map(module.clean)
names = ("Step1", "Step2", "Step", "Key", "Cause", "Correction", "Generalized", "Answer", "step 3:", " key ")
tags = st.sampled_from([f"<{slash}{name}>" for name in names for slash in ("", "/")])
filled = texts.filter(bool)
steps = st.builds(Step, texts, st.none() | filled, st.none() | filled, st.none() | filled)
traces = st.builds(Trace, st.lists(steps, max_size=5).map(tuple), st.none() | filled, st.none() | filled)
quickly = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@settings(quickly, max_examples=300)
@given(traces)
def test_parsing_a_rendered_trace_gives_the_same_trace(trace):
    parsed = parse(render(trace))
    assert parsed.trace == trace
    assert {issue.name for issue in parsed.issues} <= {"empty_step", "no_steps", "no_answer"}


@settings(quickly, max_examples=300)
@given(traces)
def test_causes_and_closers_start_a_line_and_a_piece(trace):
    pieces = module.all_pieces(trace)
    assert "".join(pieces) == render(trace)
    for before, piece in pairwise(pieces):
        if piece == CAUSE or re.match(r"</Step\d+>|<Correction>", piece):
            assert before.endswith("\n")
    assert pieces.count(CAUSE) == sum(step.cause is not None for step in trace.steps)


def test_canonical_text_is_that_of_the_method():
    assert render(SOLUTION) == WHOLE
    assert render(REVIEWED) == REVIEW
    assert parse(WHOLE) == ParsedTrace(WHOLE, SOLUTION, ())
    assert parse(REVIEW) == ParsedTrace(REVIEW, REVIEWED, ())


def test_text_that_cannot_be_parsed_back_is_rejected():
    for text in (" padded", "padded\n", "a <Step2> inside", "</key>", "< ANSWER : >"):
        with pytest.raises(ValueError, match="must be stripped, free of tags"):
            Step(text)
    for build in (lambda: Step("x", ""), lambda: Trace((), None, "")):
        with pytest.raises(ValueError, match="not empty"):
            build()


@settings(quickly, max_examples=300)
@given(st.text() | st.sampled_from(["<<Key>Step1>", "<St<Key>ep1>", "<<Step1>/Step1>", "<K<Key><Key>ey>"]))
def test_cleaned_text_is_always_a_valid_step(text):
    Step(module.clean(text))


@settings(quickly, max_examples=2000)
@given(st.text() | st.lists(tags | _bits.map("".join), max_size=12).map("".join))
def test_no_text_makes_the_parser_raise(text):
    trace = parse(text).trace
    assert parse(render(trace)).trace == trace


@pytest.mark.parametrize("whole", [WHOLE, REVIEW])
def test_every_missing_tag_is_noticed(whole):
    for tag in {piece[: piece.index(">") + 1] for piece in ("<" + p for p in whole.split("<")[1:])}:
        damaged = parse(whole.replace(tag, "", 1))
        assert damaged.issues or damaged.trace != parse(whole).trace, tag


HOSTILE = {
    "blanks after an opening angle": "<" + " " * 1_000_000,
    "blanks inside a tag": "<step" + " " * 1_000_000 + "x",
    "tabs before the digits": "<answer\t" * 120_000,
    "digits without end": "<Step" + "1" * 1_000_000,
    "openers": "<Step1>" * 140_000,
    "full openers": "<Step1>a" * 125_000,
    "stray closers inside a step": "<Step1>" + "a</Key>" * 140_000,
    "keys that open and never close": "<Step1>" + "<Key>a" * 160_000,
    "answers": "<Answer>a" * 110_000,
    "a think block that never ends": "<think>" * 140_000,
    "think closers": "<think>" + "</think" * 140_000,
    "blanks before a think block": " " * 1_000_000 + "<thin",
    "angles": "<" * 1_000_000,
    "a step of a megabyte": "<Step1>" + "7" * 1_000_000 + "\n</Step1>",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_megabyte_is_parsed(text):
    parse(text)  # takes a second; in quadratic time, hours


FORGIVEN = {
    "lower case": WHOLE.lower().replace("carry", "Carry").replace("add", "Add"),
    "upper case tags": WHOLE.replace("Step", "STEP").replace("Answer", "ANSWER").replace("Key", "KEY"),
    "a blank before the number": WHOLE.replace("Step1", "Step 1").replace("Step2", "Step 2"),
    "a colon in the tag": WHOLE.replace("<Step1>", "<Step 1:>").replace("<Answer>", "<Answer:>"),
    "blanks inside the angles": WHOLE.replace("<Step2>", "< Step2 >").replace("</Key>", "< / Key >"),
    "no newlines": WHOLE.replace("\n", ""),
    "windows newlines": WHOLE.replace("\n", "\r\n"),
    "a greeting and a farewell": f"Sure, here it is:\n{WHOLE}\nI hope that helps.",
    "a think block": f"<think>\nMaybe <Step1>no</Step1> <Answer>7</Answer>\n</think>\n\n{WHOLE}",
    "steps without numbers": WHOLE.replace("Step1", "Step").replace("Step2", "Step"),
    "generalization": WHOLE.replace("Generalized", "Generalization"),
}


@pytest.mark.parametrize("text", FORGIVEN.values(), ids=FORGIVEN)
def test_variants_are_parsed_like_the_canonical_form(text):
    assert parse(text) == ParsedTrace(text, SOLUTION, ())


@pytest.mark.parametrize(
    "text",
    [
        "&lt;Step1&gt;a &lt; b&lt;/Step1&gt;&lt;Answer&gt;5&lt;/Answer&gt;",
        "＜Step1＞a < b＜/Step1＞＜Answer＞5＜/Answer＞",
        "**<Step1>** a < b **</Step1>**\n**<Answer>** 5 **</Answer>**",
        "```xml\n<Step_1>a < b</Step_1>\n<Answer>5</Answer>\n```",
        "<step-1>a < b</step-1><FinalAnswer>5</FinalAnswer>",
        '<Step number="1">a < b</Step>\\n<Final Answer>5</Final Answer>',
        '<Step1 title="Add">a < b</Step1>**<Answer>5</Answer>**',
    ],
)
def test_escaped_and_decorated_tags_are_parsed(text):
    assert parse(text) == ParsedTrace(text, Trace((Step("a < b"),), None, "5"), ())


ISSUES = r"""
<Step1>a\n<Step2>b\n</Step2>\n<Answer>1</Answer> | missing_closer | step 1, character 9
<Step1>a\n<Key>k\n</Step1>\n<Answer>1</Answer> | missing_closer | step 1, character 16
<Step1>a\n</Step1>\n<Answer>1 | missing_closer | answer, character 27
<Step1>a<Step1>\n<Step2>b</Step2><Answer>1</Answer> | opener_as_closer | step 1, character 8
<Step1>a\n<Key>k<Key>\n</Step1><Answer>1</Answer> | opener_as_closer | step 1, character 15
<Step1>a\n</Step1>\n<Answer>1<Answer> | opener_as_closer | answer, character 27
<Step1>a</Step1></Step1><Answer>1</Answer> | stray_closer | the top level, character 16
<Step1>a</Cause></Step1><Answer>1</Answer> | stray_closer | step 1, character 8
<Step1>a</Step1></Answer><Answer>1</Answer> | stray_closer | the top level, character 16
<Step1>a</Step2><Answer>1</Answer> | wrong_step_number | step 1, character 8
<Step1>a</Step1><Step3>b</Step3><Answer>1</Answer> | wrong_step_number | step 2, character 16
<Step0>a</Step0><Answer>1</Answer> | wrong_step_number | step 1, character 0
<Step1>a</Step1><Answer>1</Answer><Step2>b</Step2> | step_after_the_end | the top level, character 34
<Step1>a</Step1><Key>k</Key><Answer>1</Answer> | tag_outside_a_step | the top level, character 16
<Step1>a<Key>k</Key><Key>l</Key></Step1><Answer>1</Answer> | second_key | step 1, character 20
<Step1>a<Cause>k</Cause><Cause>l</Cause></Step1><Answer>1</Answer> | second_cause | step 1, character 24
<Step1>a<Correction>k</Correction><Correction>l</Correction></Step1> | second_correction | step 1, character 34
<Generalized>g</Generalized><Generalized>h</Generalized> | second_generalized | the top level, character 28
<Step1>a</Step1><Answer>1</Answer><Answer>2</Answer> | second_answer | the top level, character 34
<Answer>1</Answer><Generalized>g</Generalized> | generalized_after_the_answer | the top level, character 18
<Step1>a</Step1> so then <Answer>1</Answer> | text_between_tags | the top level, character 16
<Step1>\n</Step1><Answer>1</Answer> | empty_step | step 1
<Answer>1</Answer> | no_steps | the top level
<Step1>a</Step1> | no_answer | the end, character 16
<Step1>a</Step1><Answer> </Answer> | no_answer | the end, character 34
"""


@pytest.mark.parametrize("line", ISSUES.strip().split("\n"))
def test_each_issue_has_a_name_and_a_place(line):
    text, name, place = line.split(" | ")
    issue = Issue(name, place)
    assert issue in parse(text.replace("\\n", "\n")).issues
    assert str(issue) == f"{name.replace('_', ' ')} at {place}"


LATEX = r"if $a<b$ and $c>d$ then $\langle x,y\rangle$, so <x> is < 5 and \(2<3>1\)"
SENTENCE = "Natalia sold 72 clips altogether, in April and May."


@pytest.mark.parametrize(
    ("text", "texts", "answer", "issues"),
    [
        ("<Step1>one\n<Step2>two\n</Step2>\n<Answer>3</Answer>", ["one", "two"], "3", {"missing_closer"}),
        ("<Step1>1<Step1>\n<Step2>2<Step2>\n<Answer>3<Answer>", ["1", "2"], "3", {"opener_as_closer"}),
        ("<Step1>a</Step1><Answer>1</Answer><Answer>2</Answer>", ["a"], "2", {"second_answer"}),
        (f"<Step1>{LATEX}\n</Step1>\n<Answer>$x<5$</Answer>", [LATEX], "$x<5$", set()),
        (f"<Step1>a</Step1><Answer>\n{SENTENCE}\n</Answer>", ["a"], SENTENCE, set()),
        # lookalikes are not tags: a long s, and a Cyrillic letter
        ("<Step1>a <cauſe> b</Step1><Answer>1</Answer>", ["a <cauſe> b"], "1", set()),
        ("<Step1>a <Keу> b</Step1><Answer>1</Answer>", ["a <Keу> b"], "1", set()),
        ("<Step1>a <think>b</think></Step1><Answer>1</Answer>", ["a <think>b</think>"], "1", set()),
    ],
)
def test_broken_and_odd_texts_are_recovered(text, texts, answer, issues):
    parsed = parse(text)
    assert [step.text for step in parsed.trace.steps] == texts
    assert parsed.trace.answer == answer
    assert {issue.name for issue in parsed.issues} == issues


@pytest.mark.parametrize(
    "thought",
    ["<think>{}</think>", "<THINK>{}</THINK>", "<thought>{}</thought>", "[THINK]{}[/THINK]", "Hm. {}\n</think>",
     "<think>a</think><reasoning>{}</reasoning>", "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>"],
)  # fmt: skip
def test_drafts_in_thoughts_do_not_count(thought):
    draft = "<Step1>7?</Step1><Answer>7</Answer>"
    found = parse(thought.format(draft) + "\n<Step1>a</Step1><Answer>5</Answer>")
    assert (found.trace, found.issues) == (Trace((Step("a"),), None, "5"), ())
    assert parse(f"<think>{WHOLE}").trace == SOLUTION  # which must end
    assert [issue.name for issue in parse(f"<think>{WHOLE}</think>").issues] == ["no_steps", "no_answer"]


def test_review_yields_its_first_wrong_step_its_solution_and_its_prefixes():
    assert module.first_corrected(REVIEWED) == 1
    assert module.first_corrected(SOLUTION) is None
    assert corrected(REVIEWED) == parse(REVIEW).work == Trace((Step("It is 72."), LAST), None, "36")
    assert corrected(SOLUTION) == SOLUTION
    step = Step("48 + 24 = 62", "Carry.")
    assert module.open_piece(2, step) == "<Step2>48 + 24 = 62\n<Key>Carry.</Key>\n"
    assert render(Trace((step,))) == "<Step1>48 + 24 = 62\n<Key>Carry.</Key>\n</Step1>"

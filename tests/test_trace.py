"""Traces: one canonical form, and a parser that reads whatever models write."""

import json
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sclite.trace import (
    CAUSE,
    Issue,
    Parsed,
    Step,
    Trace,
    all_pieces,
    clean,
    corrected,
    first_corrected,
    open_piece,
    parse,
    render,
    work_of,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WHOLE = (
    "<Step1>48 + 24 = 72\n<Key>Carry the ten.</Key>\n</Step1>\n"
    "<Step2>72 / 2 = 36\n</Step2>\n"
    "<Generalized>Add, then share.</Generalized>\n<Answer>36</Answer>"
)
REVIEW = (
    "<Step1>48 + 24 = 62\n<Cause>The carry is lost.</Cause>\n<Correction>It is 72.</Correction>\n</Step1>\n"
    "<Step2>72 / 2 = 36\n</Step2>\n<Answer>36</Answer>"
)

_bits = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            ["<", ">", "</", "< step", "<Stepping>", "a < b > c", "\\frac{1}{2}", "<think>", "</think>"]
        ),
        st.sampled_from(["<key", "step1>", "<cauſe>", "\n\n", "١", "\x1c", "<answer", " :>"]),
    ),
    max_size=5,
)
texts = _bits.map("".join).map(clean)
filled = texts.filter(bool)
steps = st.builds(Step, texts, st.none() | filled, st.none() | filled, st.none() | filled)
traces = st.builds(Trace, st.lists(steps, max_size=5).map(tuple), st.none() | filled, st.none() | filled)
quickly = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


def names(text: str) -> list[str]:
    return [error.name for error in parse(text).issues]


# -- one form, both ways -------------------------------------------------------------------------------------------


@settings(quickly, max_examples=500)
@given(traces)
def test_parsing_a_rendered_trace_gives_the_same_trace(trace):
    parsed = parse(render(trace))
    assert parsed.trace == trace
    expected = {"empty_step", "no_steps", "no_answer"}
    assert {error.name for error in parsed.issues} <= expected


@settings(quickly, max_examples=300)
@given(traces)
def test_the_pieces_join_to_the_rendered_text(trace):
    assert "".join(all_pieces(trace)) == render(trace)


@settings(quickly, max_examples=200)
@given(traces)
def test_causes_and_closers_start_a_line_and_a_piece(trace):
    pieces = all_pieces(trace)
    for before, piece in pairwise(pieces):
        if piece == CAUSE or piece.startswith(("</Step", "<Correction")):
            assert before.endswith("\n")
    assert sum(piece == CAUSE for piece in pieces) == sum(s.cause is not None for s in trace.steps)


def test_the_canonical_text_matches_the_method():
    trace = Trace((Step("48 + 24 = 72", "Carry the ten."), Step("72 / 2 = 36")), "Add, then share.", "36")
    assert render(trace) == WHOLE
    review = Trace(
        (Step("48 + 24 = 62", None, "The carry is lost.", "It is 72."), Step("72 / 2 = 36")), None, "36"
    )
    assert render(review) == REVIEW
    assert parse(WHOLE).issues == parse(REVIEW).issues == ()


@pytest.mark.parametrize("text", [" padded", "padded\n", "a <Step2> inside", "</key>", "< ANSWER : >"])
def test_text_that_cannot_be_parsed_back_is_rejected(text):
    with pytest.raises(ValueError, match="must be stripped, free of tags"):
        Step(text)


def test_an_empty_key_or_answer_is_rejected():
    with pytest.raises(ValueError, match="key"):
        Step("x", "")
    with pytest.raises(ValueError, match="answer"):
        Trace((), None, "")


@settings(quickly, max_examples=300)
@given(st.text())
def test_cleaned_text_is_always_a_valid_step(text):
    Step(clean(text))


@pytest.mark.parametrize("text", ["<<Key>Step1>", "<St<Key>ep1>", "<<Step1>/Step1>", "<K<Key><Key>ey>"])
def test_tags_that_join_when_another_is_removed_are_removed(text):
    Step(clean(text))


# -- any text ------------------------------------------------------------------------------------------------------


@settings(quickly, max_examples=1500)
@given(st.text() | _bits.map("".join))
def test_no_text_makes_the_parser_raise(text):
    parsed = parse(text)
    assert parse(render(parsed.trace)).trace == parsed.trace


TAGS = [
    *(
        f"<{slash}{name}>"
        for name in ("Step1", "Step2", "Step", "Key", "Cause", "Correction", "Generalized", "Answer")
        for slash in ("", "/")
    ),
    "<step 3:>",
    "<ANSWER:>",
    "< / key >",
]


def _mutated(text: str, draw: random.Random) -> str:
    """One to four deletions, repetitions, changes of case, truncations or inserted tags."""
    for _ in range(draw.randint(1, 4)):
        a = draw.randrange(len(text) + 1)
        b = min(len(text), a + draw.randint(1, 20))
        text = draw.choice(
            (
                text[:a] + text[b:],
                text[:b] + text[a:],
                text[:a] + text[a:b].swapcase() + text[b:],
                text[:a],
                text[:a] + draw.choice(TAGS) + text[a:],
            )
        )
    return text


def test_parsing_eight_thousand_damaged_traces_is_stable():
    draw = random.Random(5)
    for _ in range(8000):
        text = _mutated(draw.choice((WHOLE, REVIEW)), draw)
        trace = parse(text).trace
        assert parse(render(trace)).trace == trace, text


def test_every_missing_tag_is_noticed():
    for whole in (WHOLE, REVIEW):
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
def test_a_hostile_megabyte_is_parsed_in_linear_time(text):
    def seconds(part: str) -> float:
        began = time.process_time()
        parse(part)
        return time.process_time() - began

    seconds(text[:10_000])
    eighth = max(seconds(text[: len(text) // 8]), 0.02)
    assert seconds(text) < 8 * eighth * 4


# -- what models really write --------------------------------------------------------------------------------------

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
}


@pytest.mark.parametrize("text", FORGIVEN.values(), ids=FORGIVEN)
def test_variants_are_parsed_like_the_canonical_form(text):
    parsed = parse(text)
    assert parsed.issues == ()
    assert [s.text for s in parsed.trace.steps] == ["48 + 24 = 72", "72 / 2 = 36"]
    assert parsed.trace.steps[0].key == "Carry the ten."
    assert (parsed.trace.generalized, parsed.trace.answer) == ("Add, then share.", "36")


@pytest.mark.parametrize(
    ("text", "error", "place"),
    [
        ("<Step1>a\n<Step2>b\n</Step2>\n<Answer>1</Answer>", "missing_closer", "step 1, character 9"),
        ("<Step1>a\n<Key>k\n</Step1>\n<Answer>1</Answer>", "missing_closer", "step 1, character 16"),
        ("<Step1>a\n</Step1>\n<Answer>1", "missing_closer", "answer, character 27"),
        ("<Step1>a<Step1>\n<Step2>b</Step2><Answer>1</Answer>", "opener_as_closer", "step 1, character 8"),
        ("<Step1>a\n<Key>k<Key>\n</Step1><Answer>1</Answer>", "opener_as_closer", "step 1, character 15"),
        ("<Step1>a\n</Step1>\n<Answer>1<Answer>", "opener_as_closer", "answer, character 27"),
        ("<Step1>a</Step1></Step1><Answer>1</Answer>", "stray_closer", "the top level, character 16"),
        ("<Step1>a</Cause></Step1><Answer>1</Answer>", "stray_closer", "step 1, character 8"),
        ("<Step1>a</Step1></Answer><Answer>1</Answer>", "stray_closer", "the top level, character 16"),
        ("<Step1>a</Step2><Answer>1</Answer>", "wrong_step_number", "step 1, character 8"),
        ("<Step1>a</Step1><Step3>b</Step3><Answer>1</Answer>", "wrong_step_number", "step 2, character 16"),
        ("<Step0>a</Step0><Answer>1</Answer>", "wrong_step_number", "step 1, character 0"),
        (
            "<Step1>a</Step1><Answer>1</Answer><Step2>b</Step2>",
            "step_after_the_end",
            "the top level, character 34",
        ),
        (
            "<Step1>a</Step1><Key>k</Key><Answer>1</Answer>",
            "tag_outside_a_step",
            "the top level, character 16",
        ),
        ("<Step1>a<Key>k</Key><Key>l</Key></Step1><Answer>1</Answer>", "second_key", "step 1, character 20"),
        (
            "<Step1>a<Cause>k</Cause><Cause>l</Cause></Step1><Answer>1</Answer>",
            "second_cause",
            "step 1, character 24",
        ),
        (
            "<Step1>a<Correction>k</Correction><Correction>l</Correction></Step1><Answer>1</Answer>",
            "second_correction",
            "step 1, character 34",
        ),
        (
            "<Step1>a</Step1><Generalized>g</Generalized><Generalized>h</Generalized><Answer>1</Answer>",
            "second_generalized",
            "the top level, character 44",
        ),
        (
            "<Step1>a</Step1><Answer>1</Answer><Answer>2</Answer>",
            "second_answer",
            "the top level, character 34",
        ),
        (
            "<Step1>a</Step1><Answer>1</Answer><Generalized>g</Generalized>",
            "generalized_after_the_answer",
            "the top level, character 34",
        ),
        ("<Step1>a</Step1> so then <Answer>1</Answer>", "text_between_tags", "the top level, character 16"),
        ("<Step1>\n</Step1><Answer>1</Answer>", "empty_step", "step 1"),
        ("<Answer>1</Answer>", "no_steps", "the top level"),
        ("<Step1>a</Step1>", "no_answer", "the end, character 16"),
        ("<Step1>a</Step1><Answer> </Answer>", "no_answer", "the end, character 34"),
    ],
)
def test_each_issue_has_a_name_and_a_place(text, error, place):
    issues = parse(text).issues
    assert Issue(error, place) in issues
    assert str(Issue(error, place)) == f"{error.replace('_', ' ')} at {place}"


def test_a_missing_closer_is_recovered_at_the_next_step():
    parsed = parse("<Step1>one\n<Step2>two\n</Step2>\n<Answer>3</Answer>")
    assert [s.text for s in parsed.trace.steps] == ["one", "two"]
    assert [f.name for f in parsed.issues] == ["missing_closer"]


def test_an_opener_used_as_a_closer_starts_no_step():
    parsed = parse("<Step1>one<Step1>\n<Step2>two<Step2>\n<Answer>3<Answer>")
    assert [s.text for s in parsed.trace.steps] == ["one", "two"]
    assert parsed.trace.answer == "3"
    assert {f.name for f in parsed.issues} == {"opener_as_closer"}


def test_the_last_of_two_answers_counts():
    assert parse("<Step1>a</Step1><Answer>1</Answer><Answer>2</Answer>").trace.answer == "2"


def test_comparisons_and_latex_with_angle_brackets_are_text():
    body = r"if $a<b$ and $c>d$ then $\langle x,y\rangle$, so <x> is < 5 and \(2<3>1\)"
    parsed = parse(f"<Step1>{body}\n</Step1>\n<Answer>$x<5$</Answer>")
    assert parsed.issues == ()
    assert parsed.trace.steps[0].text == body
    assert parsed.trace.answer == "$x<5$"


def test_a_sentence_as_an_answer_is_kept_whole():
    sentence = "Natalia sold 72 clips altogether, in April and May."
    assert parse(f"<Step1>a</Step1><Answer>\n{sentence}\n</Answer>").trace.answer == sentence


def test_a_think_block_must_come_first_and_end():
    assert parse(f"<think>{WHOLE}</think>").issues == (
        Issue("no_steps", "the top level"),
        Issue("no_answer", f"the end, character {len(WHOLE) + 15}"),
    )
    assert parse(f"<think>{WHOLE}").trace == parse(WHOLE).trace
    assert "<think>" in parse("<Step1>a <think>b</think></Step1><Answer>1</Answer>").trace.steps[0].text


def test_lookalike_letters_do_not_make_a_tag():
    assert names("<Step1>a <cauſe> b</Step1><Answer>1</Answer>") == []  # a long s
    assert names("<Step1>a <Keу> b</Step1><Answer>1</Answer>") == []  # the last letter is Cyrillic


# -- reviews -------------------------------------------------------------------------------------------------------


def test_a_review_yields_its_first_wrong_step_and_a_solution():
    trace = parse(REVIEW).trace
    assert first_corrected(trace) == 1
    assert first_corrected(parse(WHOLE).trace) is None
    plain = corrected(trace)
    assert [s.text for s in plain.steps] == ["It is 72.", "72 / 2 = 36"]
    assert first_corrected(plain) is None
    assert corrected(parse(WHOLE).trace) == parse(WHOLE).trace
    assert work_of(render(trace)) == plain


def test_the_prefix_of_a_decision_ends_before_the_closer():
    step = Step("48 + 24 = 62", "Carry.")
    assert open_piece(2, step) == "<Step2>48 + 24 = 62\n<Key>Carry.</Key>\n"
    assert render(Trace((step,))) == "<Step1>48 + 24 = 62\n<Key>Carry.</Key>\n</Step1>"


# -- real solutions ------------------------------------------------------------------------------------------------


def _solutions():
    for name in ("gsm8k-train", "gsm8k-model-solutions", "math-sample", "mr-gsm8k"):
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").split("\n"):
            if not line:
                continue
            row = json.loads(line)
            if "steps" in row:
                yield row["steps"], str(row["ground_truth_answer"])
            for text in (row.get("answer"), row.get("solution"), row.get("ground_truth")):
                if text:
                    yield text.split("\n"), "1"
            for value in row.values():
                if isinstance(value, dict):
                    yield value["solution"].split("\n"), "1"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared sample data")
def test_real_solutions_survive_a_round_trip():
    count = 0
    for lines, answer in _solutions():
        trace = Trace(tuple(Step(clean(line)) for line in lines if clean(line)), None, answer)
        parsed = parse(render(trace))
        assert parsed.trace == trace
        assert not {f.name for f in parsed.issues} - {"no_steps"}
        parse("\n".join(lines))
        count += 1
    assert count > 4000


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
    assert parse(text) == Parsed(Trace((Step("a < b"),), None, "5"), ())


def test_generalization_is_generalized():
    assert (
        parse("<Step1>a</Step1><Generalization>b</Generalization><Answer>5</Answer>").trace.generalized == "b"
    )


@pytest.mark.parametrize(
    "thought",
    ["<think>{}</think>", "<THINK>{}</THINK>", "<thought>{}</thought>", "[THINK]{}[/THINK]", "Hm. {}\n</think>",
     "<think>a</think><reasoning>{}</reasoning>", "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>"],
)  # fmt: skip
def test_drafts_in_thoughts_do_not_count(thought):
    draft = "<Step1>7?</Step1><Answer>7</Answer>"
    found = parse(thought.format(draft) + "\n<Step1>a</Step1><Answer>5</Answer>")
    assert found == Parsed(Trace((Step("a"),), None, "5"), ())

"""Overlap of questions in training and evaluation: 13 words in a row, or a whole shorter question."""

import os

import datasets
import pytest

from sclite.config import Config
from sclite.context import Context
from sclite.data.problems import build_index, find_overlap, gather_problems
from sclite.errors import DataError, NetworkError
from sclite.evaluation import held_out
from sclite.progress import ProgressDisplay
from sclite.records import Drop, Problem, Template
from sclite.run import Report, Run
from sclite.settings import load

LONG = "Anna has twelve nuts and buys three more bags with seven nuts in each of them"
WORDS = LONG.split()
REST = " and then he goes home, to sleep. How many are left of them all on the next day?"


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (f"Ben says: {' '.join(WORDS[2:15])}{REST}", LONG, True),  # thirteen words in a row
        (f"Ben says: {' '.join(WORDS[3:15])}{REST}", LONG, False),  # twelve
        (LONG.upper().replace(" ", ",\n "), LONG, True),  # case, punctuation and white space do not count
        ("what is  2 + 1", "What is $2+1$?", True),  # a short question overlaps as a whole
        ("What is 2 + 1", "What is 2 + 1 more than?", False),
        (" ".join(WORDS[:6]), LONG, False),
        ("What is 2 - 1?", "What is 2 + 1?", False),  # its signs count
    ],
)
def test_thirteen_shared_words_or_a_whole_short_question_overlap(first, second, found):
    assert (find_overlap(first, build_index([("x", second)])) == "x") is found


def plain(text, **more):
    return {"question": text, "answer": "1", **more}


def settings(*given: str) -> Config:
    return load(None, given, {}, own_file=False)


def test_training_row_that_overlaps_evaluation_is_dropped(write, run):
    rows = [plain("First?"), plain(f"1. {LONG}", id="bad"), plain("Second?"), plain("Third?")]
    source = write("p.jsonl", *rows)
    measured = write("e.jsonl", plain("Zeroth?", id="e0"), plain(LONG, id="e1"))
    report = Report("problems")
    chosen = settings(f"problems.source={source}", f"eval.source={measured}", "problems.limit=2")
    problems = gather_problems(chosen, run, report)
    assert [p.question for p in problems] == ["First?", "Second?"]  # the limit counts kept problems
    assert run.read("problems.jsonl", Problem) == problems
    (drop,) = run.read("dropped.jsonl", Drop)
    assert (drop.stage, drop.id, drop.reason) == ("problems", "bad", "overlaps_evaluation")
    assert f"e1 of {measured}" in drop.detail
    assert report.dropped == {"overlaps_evaluation": 1}
    assert run.manifest("problems")["dropped"] == report.dropped


def test_rows_to_avoid_need_no_answer_and_ignore_the_limit(write, run):
    source = write("p.jsonl", plain("First?"), plain("Second?"), plain("Third?"))
    one = write("a.jsonl", {"question": "Nothing?"}, {"question": "third"})
    other = write("b.jsonl", {"problem": "Second?"})
    chosen = settings(f"problems.source={source}", f'problems.avoid=["{one}", "{other}"]')
    assert [p.question for p in gather_problems(chosen, run)] == ["First?"]
    chosen = settings(f"problems.source={source}", f'problems.avoid=["{other}"]')
    assert len(gather_problems(chosen, run)) == 2


def test_imported_problems_file_is_not_rewritten(write, run):
    rows = [Problem(id=i, question=q, answer="1") for i, q in (("a", "First?"), ("b", "Second?"))]
    run.replace("problems.jsonl", rows)
    chosen = settings(f"eval.source={write('e.jsonl', plain('second'))}")
    for _ in range(2):
        assert [p.id for p in gather_problems(chosen, run)] == ["a"]
        assert run.read("problems.jsonl", Problem) == rows
        assert [d.id for d in run.read("dropped.jsonl", Drop)] == ["b"]


def test_an_equal_file_leaves_nothing_but_the_same_source_is_trained_on(write, run):
    source, measured = (write(name, plain("First?"), plain("Second?")) for name in ("p.jsonl", "e.jsonl"))
    with pytest.raises(DataError, match="every problem overlaps") as error:
        gather_problems(settings(f"problems.source={source}", f"eval.source={measured}"), run)
    assert error.value.hint
    chosen = settings(f"problems.source={source}", f"eval.source={source}", "problems.limit=1")
    assert len(gather_problems(chosen, run)) == 1


def test_unreachable_evaluation_set_is_an_error_with_an_alternative(write, run, monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = write("p.jsonl", plain("First?"))
    with pytest.raises(NetworkError, match=r"eval\.source, whose .* some/set cannot be reached") as error:
        gather_problems(settings(f"problems.source={source}", "eval.source=some/set"), run)
    assert "as eval.source" in error.value.hint
    assert "--set eval.source= skips" in error.value.hint
    with pytest.raises(DataError, match=r"problems\.avoid, whose .*none\.jsonl does not exist"):
        gather_problems(settings(f"problems.source={source}", 'problems.avoid=["none.jsonl"]'), run)


def test_evaluation_skips_and_counts_problems_that_were_trained_on(write, run):
    index = build_index([("t1", "What?"), ("t2", f"Once {LONG}"), ("t3", "WHY"), ("t4", LONG)])
    assert [find_overlap(question, index) for question in (LONG, "Why?", "Who?")] == ["t2", "t3", None]
    rows = [plain(f"What is {i} + {i}?", id=f"e{i}") for i in range(60)]
    rows += [plain(f"{LONG}?", id="long"), plain("Own?", id="own")]
    run.replace("problems.jsonl", [Problem(id="t1", question=f"Well. {LONG}", answer="1")])
    trace = "<Step1>x\n</Step1>\n<Answer>1</Answer>"
    run.replace("templates.jsonl", [Template(id="t2", question="own", answer="1", trace=trace)])
    context = Context(settings(f"eval.source={write('e.jsonl', *rows)}"), run, ProgressDisplay(quiet=True))
    found = held_out(context)
    assert {p.id for p in [*found.problems, *found.fitting]} == {f"e{i}" for i in range(60)}
    assert found.dropped == {"overlaps_training": 2}
    drops = {d.id: d for d in run.read("dropped.jsonl", Drop)}
    assert {(d.stage, d.reason) for d in drops.values()} == {("eval", "overlaps_training")}
    assert drops["long"].detail.endswith("training problem t1")
    assert drops["own"].detail.endswith("training problem t2")
    skipped = Run(run.folder / "skipped")  # problems skipped in training can be evaluated
    asked = [Problem(id=i, question=f"What is {i} + {i}?", answer="1") for i in ("1", "99")]
    skipped.replace("problems.jsonl", asked)
    chosen = settings(f"eval.source={write('e.jsonl', *rows[:60])}")
    assert len(gather_problems(chosen, skipped)) == 1
    assert held_out(Context(chosen, skipped, ProgressDisplay(quiet=True))).dropped == {}


def test_problems_that_were_trained_on_stay_and_new_ones_are_checked(write, run):
    old, new = [plain(f"What is {n} + {n}?") for n in range(3)], plain("Why?")
    source = f"problems.source={write('p.jsonl', *old)}"
    before = gather_problems(settings(source), run)
    run.path("sft").mkdir()
    write("p.jsonl", *old, new)
    chosen = settings(source, f"eval.source={write('e.jsonl', old[1], new)}")
    assert gather_problems(chosen, run) == before
    assert [(d.reason, d.raw) for d in run.read("dropped.jsonl", Drop)] == [("overlaps_evaluation", "Why?")]
    retrained = gather_problems(chosen, run, fresh=True)
    assert [p.question for p in retrained] == ["What is 0 + 0?", "What is 2 + 2?"]
    assert gather_problems(settings(source), run) == retrained  # problems left out are not trained on later
    assert len(gather_problems(settings(source), run, fresh=True)) == 4


def test_imported_problems_that_were_trained_on_stay(write, run):
    run.replace("problems.jsonl", [Problem(id=i, question=f"{i}?", answer="1") for i in "abc"])
    before = settings(f"eval.source={write('e.jsonl', plain('c?'))}")
    assert [p.id for p in gather_problems(before, run)] == ["a", "b"]
    run.path("sft").mkdir()
    chosen = settings(f"eval.source={write('f.jsonl', plain('b?'), plain('c?'))}")
    for reread in (False, True):
        assert [p.id for p in gather_problems(chosen, run, reread=reread)] == ["a", "b"]
    assert [p.id for p in gather_problems(chosen, run, fresh=True)] == ["a"]


@pytest.mark.parametrize(("key", "gone"), [("eval.source", False), ("problems.avoid", True)])
def test_run_keeps_its_problems_if_others_are_to_be_avoided(write, run, key, gone):
    source = write("p.jsonl", *(plain(f"What is {n} + {n}?") for n in range(9)))
    before = gather_problems(settings(f"problems.source={source}", "problems.limit=4"), run)
    if gone:
        os.remove(source)
    other = write("e.jsonl", plain("What is 1 + 1?"))
    chosen = settings(f"problems.source={source}", f'{key}=["{other}"]' if gone else f"{key}={other}")
    assert gather_problems(chosen, run, reread=gone) == before == run.read("problems.jsonl", Problem)


@pytest.mark.parametrize("own", [False, True])
def test_a_dropped_problem_drops_no_other_problem(write, run, own):
    rows = [plain(f"Why? {LONG}", id="left"), plain("Other?", id="other"), plain(f"{LONG}. Who?", id="new")]
    source = "" if own else f"problems.source={write('p.jsonl', *rows[:2])}"
    if own:
        run.replace("problems.jsonl", [Problem.model_validate(row) for row in rows[:2]])
    measured = f"eval.source={write('e.jsonl', rows[0])}"
    chosen = [name for name in (source, measured) if name]
    assert [p.id for p in gather_problems(settings(*chosen), run)] == ["other"]
    run.path("sft").mkdir()
    if own:
        run.replace("problems.jsonl", [Problem.model_validate(row) for row in rows])
    else:
        write("p.jsonl", *rows)
    assert [p.id for p in gather_problems(settings(*chosen[:-1]), run)] == ["other", "new"]
    (drop,) = run.read("dropped.jsonl", Drop)
    assert drop.detail.endswith("with an earlier set to avoid")

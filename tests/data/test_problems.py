"""The problems of a run: distinct rows of a source, kept in the run, and split between the stages."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from sclite import config
from sclite.config import Source
from sclite.data.problems import gather_problems, load_problems, split_for_stages, split_problems
from sclite.errors import DataError, UsageError
from sclite.records import Drop, Problem
from sclite.run import Report
from sclite.settings import load


def plain(number, **more):
    return {"question": f"What is {number} + 1?", "answer": str(number + 1), **more}


@pytest.fixture
def load_rows(write):
    def load_rows(rows, drops=None, **options) -> list[Problem]:
        return load_problems(Source(source=write("p.jsonl", *rows)), drops=drops, **options)

    return load_rows


def test_ids_do_not_depend_on_the_order_and_a_limit_stops_reading(load_rows):
    before = load_rows(map(plain, range(5)))
    after = load_rows(map(plain, [9, 4, 3, 2, 1, 0]))
    assert len({p.id for p in after}) == 6
    assert set(before) < set(after)
    drops: list[Drop] = []
    assert len(load_rows([plain(1), plain(1), plain(2), {"no": "columns"}], drops, limit=2)) == 2
    assert len(drops) == 1


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (plain(1, answer=" 2"), "duplicate_question", "same question as"),
        ({"question": "  what IS 1 +\n1?", "answer": "2"}, "duplicate_question", "same question as"),
        (plain(3, id="x"), "duplicate_id", "same id as line 1 (make ids unique, or remove them)"),
    ],
)
def test_repeated_question_or_id_is_dropped(load_rows, row, reason, detail):
    drops: list[Drop] = []
    (kept,) = load_rows([plain(1, id="x"), row], drops)
    assert kept.question == "What is 1 + 1?"
    assert [drop.reason for drop in drops] == [reason]
    assert f"p.jsonl, line 2: {detail}" in drops[0].detail
    assert drops[0].raw == row["question"].strip()


def test_row_without_an_answer_is_dropped_and_an_error_if_alone(load_rows):
    bad = {"question": "q", "answer": None}
    drops: list[Drop] = []
    kept = load_rows([plain(1), bad, plain(2)], drops)
    assert [problem.answer for problem in kept] == ["2", "3"]
    assert [(drop.id, drop.reason) for drop in drops] == [("line 2", "no_answer")]
    assert "p.jsonl, line 2: no answer" in drops[0].detail
    said = r"p\.jsonl: no usable row \(1 no answer\); line 1: no answer"
    with pytest.raises(DataError, match=said) as error:
        load_rows([bad])
    assert "####" in error.value.hint
    with pytest.raises(DataError, match=r"\(1 no question\); line 1: the question is empty"):
        load_rows([plain(1, question=" ")])


def test_problems_are_written_to_the_run_and_read_from_it(write, run):
    with pytest.raises(DataError) as caught:
        gather_problems(config.Config(), run)
    assert "problems.source" in caught.value.hint
    rows = [{"say": row["question"], "gold": row["answer"]} for row in map(plain, (1, 2, 2))]
    names = ["problems.question_column=say", "problems.answer_column=gold"]
    source = write("p.jsonl", *rows)
    problems = gather_problems(load(None, [f"problems.source={source}", *names], {}), run)
    assert [(p.question, p.answer) for p in problems] == [("What is 1 + 1?", "2"), ("What is 2 + 1?", "3")]
    assert run.read("problems.jsonl", Problem) == problems
    assert [d.reason for d in run.read("dropped.jsonl", Drop)] == ["duplicate_question"]
    assert gather_problems(config.Config(), run) == problems


def numbered(count: int) -> list[Problem]:
    return [Problem(id=f"p{n}", question="?", answer="1") for n in range(count)]


def ids(problems: Iterable[Problem]) -> set[str]:
    return {problem.id for problem in problems}


def test_split_follows_the_share_and_new_problems_move_no_others():
    problems = numbered(2000)
    first, second = split_for_stages(problems, 0.3, 0)
    assert 540 < len(second) < 660
    assert sorted(first + second, key=lambda p: int(p.id[1:])) == problems
    fewer_first, fewer_second = split_for_stages(problems[::-2], 0.3, 0)
    assert set(fewer_first) < set(first)
    assert set(fewer_second) < set(second)
    assert split_for_stages(problems, 0.3, 1)[1] != second
    smaller = split_for_stages(problems, 0.2, 0)[1]
    assert set(smaller) < set(second)


def test_problems_are_split_by_id_and_by_position_in_the_quickstart():
    shared = {"problems": {"correction_share": 0.3, "fit_share": 0.25}}
    embedded = config.Config.model_validate({**shared, "teacher": {"model": "embedded/tutor"}})
    problems = numbered(400)
    assert split_problems(embedded, problems) == (problems[:210], problems[210:300], problems[300:])
    any_teacher = config.Config.model_validate({**shared, "teacher": {"model": "openai/a"}})
    split = split_problems(any_teacher, problems)
    assert ids(split.sft) | ids(split.stage2) | ids(split.fit) == ids(problems)
    assert sum(map(len, split)) == 400
    assert 80 < len(split.fit) < 120
    assert 60 < len(split.stage2) < 120


def test_fit_keeps_50_problems_and_none_that_was_trained_on():
    for count, least, most in ((199, 0, 0), (200, 50, 50), (400, 50, 50), (4000, 340, 460)):
        assert least <= len(split_problems(config.Config(), numbered(count)).fit) <= most
    none = config.Config(problems=config.Problems(fit_share=0))
    assert split_problems(none, numbered(400)).fit == []
    before: set[str] = set()
    for count in range(200, 1500, 37):
        split = split_problems(config.Config(), numbered(count))
        assert not before & ids(split.fit)
        before = ids(split.sft) | ids(split.stage2)


@pytest.mark.parametrize("first", ["own", "a.jsonl"])
def test_only_a_command_that_reads_the_problems_replaces_them(write, run, capsys, first):
    """For example `eval` with the sclite.toml of another run; and never those that came with the run."""
    named = lambda name: load(None, [f"problems.source={name}"], {})  # noqa: E731
    a, b = write("a.jsonl", plain(1)), write("b.jsonl", plain(2))
    if first == "own":
        run.replace("problems.jsonl", [Problem(id="own", **plain(1))])
    else:
        gather_problems(named(a), run)
    before = run.path("problems.jsonl").read_bytes()
    for reread in (False, True) if first == "own" else (False,):
        (kept,) = gather_problems(named(b), run, reread=reread)
        assert kept.question == "What is 1 + 1?"
        assert run.path("problems.jsonl").read_bytes() == before
    if first != "own":
        assert "problems.source or its columns have changed" in capsys.readouterr().err
        gather_problems(config.Config(), run)  # without a source this time: they still come from one
        (new,) = gather_problems(named(b), run)
        assert new.question == "What is 2 + 1?"


def test_a_kill_before_the_problems_are_signed_does_not_make_them_the_runs_own(write, run, monkeypatch):
    chosen = load(None, [f"problems.source={write('a.jsonl', plain(1))}"], {})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "sign", killed)
        with pytest.raises(KeyboardInterrupt):
            gather_problems(chosen, run)
    with run.recording(chosen):
        assert len(gather_problems(chosen, run)) == 1


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("edit", ["an answer", "a row"])
def test_edited_problems_stay_until_their_source_is_read_again(write, run, edit, gone):
    source = write("p.jsonl", *map(plain, range(9)))
    name = f"problems.source={source}"
    rows = gather_problems(load(None, [name, "problems.limit=4"], {}), run)
    rows[0] = rows[0].model_copy(update={"answer": "one"})
    edited = rows[1:] if edit == "a row" else rows
    run.replace("problems.jsonl", edited)
    if gone:
        Path(source).unlink()
    report = Report("problems")
    assert gather_problems(load(None, [name], {}), run, report, reread=gone) == edited
    assert run.read("problems.jsonl", Problem) == edited
    assert (report.counts, report.skipped) == ({"problems": len(edited)}, True)
    with pytest.raises(DataError, match=r"typo\.jsonl does not exist"):  # it was never read
        gather_problems(load(None, ["problems.source=typo.jsonl"], {}), run)


def test_edited_problems_that_were_trained_on_stay_if_their_source_is_read(write, run):
    name = f"problems.source={write('p.jsonl', plain(1), plain(2))}"
    before = gather_problems(load(None, [name], {}), run)
    run.path("sft").mkdir()
    run.replace("problems.jsonl", [before[0].model_copy(update={"answer": "two"}), before[1]])
    chosen = load(None, [name, f"eval.source={write('e.jsonl', plain(1))}"], {})
    assert gather_problems(chosen, run) == before


def test_new_rows_of_an_imported_file_are_checked(write, run):
    rows = [Problem(id=str(n), **plain(n)) for n in range(3)]
    chosen = load(None, [f"eval.source={write('e.jsonl', plain(1), plain(2))}"], {})
    run.replace("problems.jsonl", rows[:2])
    for found in (rows[:2], rows):
        run.replace("problems.jsonl", found)
        assert gather_problems(chosen, run, reread=False) == rows[:1]


@pytest.mark.parametrize("own", [False, True])
def test_damaged_problems_are_restored_from_their_source_or_named(write, run, own):
    """The user's own rows can only be fixed: no command writes them."""
    given = [] if own else [f"problems.source={write('p.jsonl', *map(plain, range(3)))}"]
    if own:
        run.replace("problems.jsonl", [Problem(id=str(n), **plain(n)) for n in range(3)])
    chosen, path = load(None, given, {}), run.path("problems.jsonl")
    gather_problems(chosen, run)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"question"', b'"queston"', 1))
    with pytest.raises(DataError, match=r"problems\.jsonl, line 1: question") as error:
        gather_problems(chosen, run, reread=own)
    assert error.value.hint.startswith("fix or remove the line, or ")
    assert ("sclite build-data" in error.value.hint) is not own
    if not own:
        gather_problems(chosen, run)
        assert path.read_bytes() == whole


def test_own_problems_can_be_removed_for_those_of_a_source(write, run):
    run.replace("problems.jsonl", [Problem(id="own", **plain(1))])
    gather_problems(config.Config(), run)
    chosen = load(None, [f"problems.source={write('p.jsonl', plain(2))}"], {})
    with pytest.raises(UsageError, match="has other problems than"), run.recording(chosen):
        pass
    run.path("problems.jsonl").unlink()
    with run.recording(chosen):
        (found,) = gather_problems(chosen, run, reread=False)
    assert found.question == "What is 2 + 1?"
    assert not run.has_own_problems()

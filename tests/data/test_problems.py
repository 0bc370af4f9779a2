"""Problems from files of every format, and the errors for unusable files."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from sclite import config
from sclite.data.problems import gather_problems, load_problems, split_for_stages, split_problems
from sclite.errors import DataError, NetworkError, UsageError
from sclite.records import Drop, Problem
from sclite.settings import load

GSM8K = {
    "question": "How many clips?",
    "answer": "She sold 48/2 = <<48/2=24>>24 in May.\nThat is 48+24 = <<48+24=72>>72.\n#### 72",
}
MATH = {
    "problem": "Evaluate $x$.",
    "level": "Level 2",
    "solution": r"First $\boxed{3}$ was tried, then $x = \boxed{\frac{1}{\sqrt{2}}}$.",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain(number):
    return {"question": f"What is {number} + 1?", "answer": str(number + 1)}


def error(source, **options) -> DataError:
    with pytest.raises(DataError) as caught:
        load_problems(source, **options)
    assert caught.value.code == 3
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


def test_gsm8k_answer_is_extracted_and_calculator_marks_removed(tmp_path):
    (problem,) = load_problems(write(tmp_path / "p.jsonl", [GSM8K]))
    assert problem.answer == "72"
    assert problem.solution == "She sold 48/2 = 24 in May.\nThat is 48+24 = 72."


def test_math_answer_is_the_last_box_with_nested_braces(tmp_path):
    (problem,) = load_problems(write(tmp_path / "p.jsonl", [MATH]))
    assert problem.question == "Evaluate $x$."
    assert problem.answer == r"\frac{1}{\sqrt{2}}"
    assert problem.solution == MATH["solution"]


def test_plain_rows_keep_id_and_solution(tmp_path):
    rows = [{**plain(1), "id": 7}, {**plain(2), "solution": "Count on."}, {**MATH, "answer": "0.7"}]
    first, second, third = load_problems(write(tmp_path / "p.jsonl", rows))
    assert (first.id, first.answer, first.solution) == ("7", "2", None)
    assert second.solution == "Count on."
    assert third.answer == "0.7"


def test_ids_do_not_change_if_rows_are_added_or_moved(tmp_path):
    before = load_problems(write(tmp_path / "a.jsonl", map(plain, range(5))))
    after = load_problems(write(tmp_path / "b.jsonl", map(plain, [9, 4, 3, 2, 1, 0])))
    assert len({p.id for p in after}) == 6
    assert set(before) < set(after)


def test_csv_json_and_parquet_give_the_same_problems_as_jsonl(tmp_path):
    import datasets

    rows = [plain(i) for i in range(4)]
    expected = load_problems(write(tmp_path / "p.jsonl", rows))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.csv").write_text(
        "question,answer\n" + "".join(f'"{r["question"]}",{r["answer"]}\n' for r in rows)
    )
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    for suffix in ("json", "csv", "parquet"):
        assert load_problems(str(tmp_path / f"p.{suffix}")) == expected


def test_duplicate_question_is_dropped(tmp_path):
    drops: list[Drop] = []
    source = write(tmp_path / "p.jsonl", [plain(1), plain(2), {**plain(1), "answer": " 2"}])
    assert len(load_problems(source, drops=drops)) == 2
    assert [d.reason for d in drops] == ["duplicate_question"]
    assert "line 3" in drops[0].detail


def test_duplicate_questions_ignore_case_and_white_space(tmp_path):
    drops: list[Drop] = []
    rows = [plain(1), {**plain(1), "question": "  what IS 1 +\n1?"}]
    (kept,) = load_problems(write(tmp_path / "p.jsonl", rows), drops=drops)
    assert kept.question == "What is 1 + 1?"
    assert [(d.reason, d.raw) for d in drops] == [("duplicate_question", "what IS 1 +\n1?")]


def test_limit_counts_distinct_problems_and_stops_reading(tmp_path):
    path = tmp_path / "p.jsonl"
    write(path, [plain(1), plain(1), plain(2)])
    path.write_text(path.read_text() + "not json\n")
    assert len(load_problems(str(path), limit=2)) == 2


def test_missing_file_and_folder_are_reported(tmp_path):
    assert "nothing.jsonl does not exist" in error(str(tmp_path / "nothing.jsonl")).message
    for name in ("nothing.txt", "nothing.jsonl.gz", "./nothing"):
        assert f"{Path(name)} does not exist" in error(name).message
    assert "is a folder" in error(str(tmp_path)).message
    with pytest.raises(UsageError, match=r"problems\.source"):
        load_problems("")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv"])
def test_empty_file_is_reported(tmp_path, name):
    (tmp_path / name).write_text("\n" if name == "p.jsonl" else "")
    assert f"{name} is empty" in error(str(tmp_path / name)).message


def test_line_that_is_not_json_is_reported(tmp_path):
    path = tmp_path / "p.jsonl"
    write(path, map(plain, range(6)))
    path.write_text(path.read_text() + '{"question": "half\n' + json.dumps(plain(7)) + "\n")
    drops: list[Drop] = []
    assert len(load_problems(str(path), drops=drops)) == 7
    (drop,) = drops
    assert (drop.reason, drop.raw) == ("row_not_readable", '{"question": "half')
    assert "p.jsonl, line 7: column 14: not JSON: Unterminated string" in drop.detail
    (tmp_path / "p.json").write_text('[\n{"question": "q", "answer": "1"},\n{]')
    assert "p.json, line 3, column 2: not JSON" in error(str(tmp_path / "p.json")).message


def test_rows_that_are_not_objects_are_reported(tmp_path):
    (tmp_path / "p.jsonl").write_text("[1, 2]\n")
    assert "line 1: not a JSON object" in error(str(tmp_path / "p.jsonl")).message
    (tmp_path / "p.json").write_text('{"rows": []}')
    assert "not a list of objects" in error(str(tmp_path / "p.json")).message


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": None},
        {"question": "q", "answer": "worked but #### "},
        {"problem": "p", "solution": "no box here 5"},
        {"problem": "p", "solution": r"an open \boxed{5"},
    ],
)
def test_row_without_an_answer_is_dropped(tmp_path, row):
    source = write(tmp_path / "p.jsonl", [plain(1), row, plain(2)])
    drops: list[Drop] = []
    assert [problem.answer for problem in load_problems(source, drops=drops)] == ["2", "3"]
    (drop,) = drops
    assert drop.reason == "no_answer"
    assert "p.jsonl, line 2: no answer" in drop.detail
    found = error(write(tmp_path / "q.jsonl", [row]))
    assert "q.jsonl: no usable row (1 no answer); line 1: no answer" in found.message
    assert "####" in found.message + found.hint


def test_empty_question_is_reported(tmp_path):
    found = error(write(tmp_path / "p.jsonl", [{**plain(1), "question": " "}]))
    assert "(1 no question); line 1: the question is empty" in found.message


def test_unknown_columns_are_reported_with_the_expected_names(tmp_path):
    found = error(write(tmp_path / "p.jsonl", [{"prompt": "q", "target": "a"}]))
    assert "found: prompt, target" in found.message
    assert "question and answer" in found.hint


def test_configured_columns_are_read_from_every_format(tmp_path, monkeypatch):
    import datasets

    rows = [{"n": f"x{i}", "query": f"{i}?", "gold": str(i), "work": f"so {i}\n#### {i}"} for i in range(3)]
    columns = {"question": "query", "answer": "gold", "solution": "work", "id": "n"}
    expected = [Problem(id=f"x{i}", question=f"{i}?", answer=str(i), solution=f"so {i}") for i in range(3)]
    write(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.json").write_text(json.dumps(rows))
    with open(tmp_path / "p.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert load_problems(str(tmp_path / f"p.{suffix}"), columns=columns) == expected
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    assert load_problems("some/set", columns=columns) == expected


def test_missing_column_is_reported_with_the_existing_ones(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"query": "q", "gold": "1"}])
    found = error(source, columns={"question": "query", "answer": "golden"})
    assert found.message.endswith("(1 columns missing); line 1: no column golden, found: query, gold")
    assert "answer_column" in found.hint
    assert "no known columns" in error(source, columns={"question": "query"}).message
    (kept,) = load_problems(source, columns={"question": "query", "answer": "gold"})
    assert kept.answer == "1"


def test_columns_from_the_configuration_are_used(tmp_path, run):
    source = write(tmp_path / "p.jsonl", [{"query": "q", "gold": "1"}])
    names = ["problems.question_column=query", "problems.answer_column=gold"]
    (kept,) = gather_problems(load(None, [f"problems.source={source}", *names], {}), run)
    assert (kept.question, kept.answer) == ("q", "1")


def test_csv_with_bom_newlines_and_quotes_is_read(tmp_path):
    text = '\ufeffquestion,answer\r\n"How many,\r\n""in all""?",5\r\nOne\u2028line?,6\r\n'
    (tmp_path / "p.csv").write_bytes(text.encode())
    first, second = load_problems(str(tmp_path / "p.csv"))
    assert (first.question, first.answer) == ('How many,\r\n"in all"?', "5")
    assert second.question == "One\u2028line?"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('"a"b,2', "not CSV: ',' expected after '\"'"),
        ('"open,2', "not CSV: unexpected end of data"),
        ("q, with a comma,2", "more fields than the header has names"),
        ("q,", "no answer"),
    ],
)
def test_invalid_csv_row_is_dropped_with_its_first_line(tmp_path, line, said):
    path, drops = tmp_path / "p.csv", []
    path.write_text(f'question,answer\n"a\nb",1\n{line}\n')
    assert [problem.answer for problem in load_problems(str(path), drops=drops)] == ["1"]
    assert [f"p.csv, line 4: {said}" in drop.detail for drop in drops] == [True]


def test_unclosed_csv_quote_over_several_lines_is_an_error(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('question,answer\nq,1\n"open,2\nr,3\n')
    assert "p.csv, line 3 to 4: not CSV: unexpected end of data" in error(str(path)).message


def test_invalid_parquet_file_is_reported(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 but not really")
    assert "p.parquet cannot be read" in error(str(tmp_path / "p.parquet")).message


def test_answer_is_read_from_the_last_line_of_a_solution(tmp_path):
    rows = [
        {"problem": "a", "solution": "so.\n#### 72\nThe answer is: 72"},
        {"problem": "b", "solution": "It is 3 twice. The answer is: 6."},
    ]
    assert [p.answer for p in load_problems(write(tmp_path / "p.jsonl", rows))] == ["72", "6"]
    rows = [{"problem": "c", "solution": "The answer is 5, I think.\nOr not."}]
    assert "no answer" in error(write(tmp_path / "p.jsonl", rows)).message


def test_duplicate_id_is_dropped(tmp_path):
    source = write(tmp_path / "p.jsonl", [{**plain(1), "id": "x"}, {**plain(2), "id": "x"}])
    drops: list[Drop] = []
    assert len(load_problems(source, drops=drops)) == 1
    assert [(drop.id, drop.reason) for drop in drops] == [("x", "duplicate_id")]
    assert "p.jsonl, line 2: same id as line 1" in drops[0].detail


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_row_that_is_not_utf8_is_dropped(tmp_path, name):
    rows = b"question,answer\n" if name == "p.csv" else b""
    for question in (b"one", b"caf\xe9", b"two"):
        rows += (
            question + b",1\n" if rows[:1] == b"q" else b'{"question": "' + question + b'", "answer": 1}\n'
        )
    (tmp_path / name).write_bytes(rows)
    drops: list[Drop] = []
    assert [p.question for p in load_problems(str(tmp_path / name), drops=drops)] == ["one", "two"]
    assert "the text is not UTF-8 (convert the file: iconv" in drops[0].detail
    (tmp_path / "p.json").write_bytes(b'[{"question": "caf\xe9"}]')
    assert "not UTF-8" in error(str(tmp_path / "p.json")).message


def test_unreachable_dataset_error_has_a_hint(monkeypatch):
    import datasets

    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(NetworkError, match="openai/gsm8k cannot be reached") as found:
        load_problems("openai/gsm8k", subset="main")
    assert "JSONL" in found.value.hint


def test_full_disk_is_not_a_network_error(monkeypatch):
    import datasets

    def load_dataset(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "No space left" in error("openai/gsm8k").message


def test_hub_row_without_an_answer_is_dropped(monkeypatch):
    import datasets

    rows = [MATH, {"problem": "Prove it.", "solution": "So it is."}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    drops: list[Drop] = []
    assert len(load_problems("some/set", drops=drops)) == 1
    assert [(d.id, d.reason) for d in drops] == [("row 2", "no_answer")]


def test_split_follows_the_share_and_new_problems_move_no_others():
    problems = [Problem(id=str(i), question=f"q{i}", answer="1") for i in range(2000)]
    first, second = split_for_stages(problems, 0.3, 0)
    assert 540 < len(second) < 660
    assert sorted(first + second, key=lambda p: int(p.id)) == problems
    fewer_first, fewer_second = split_for_stages(problems[::-2], 0.3, 0)
    assert set(fewer_first) < set(first)
    assert set(fewer_second) < set(second)
    assert split_for_stages(problems, 0.3, 1)[1] != second
    smaller = split_for_stages(problems, 0.2, 0)[1]
    assert set(smaller) < set(second)


def test_problems_are_written_to_the_run_and_read_from_it(tmp_path, run):
    source = write(tmp_path / "p.jsonl", [plain(1), plain(2), plain(2)])
    problems = gather_problems(load(None, [f"problems.source={source}"], {}), run)
    assert run.read("problems.jsonl", Problem) == problems
    assert [d.reason for d in run.read("dropped.jsonl", Drop)] == ["duplicate_question"]
    assert gather_problems(config.Config(), run) == problems


def test_missing_problems_error_has_a_hint(run):
    with pytest.raises(DataError) as caught:
        gather_problems(config.Config(), run)
    assert "problems.source" in caught.value.hint


def numbered(count: int) -> list[Problem]:
    return [Problem(id=f"p{n}", question="?", answer="1") for n in range(count)]


def ids(problems: Iterable[Problem]) -> set[str]:
    return {problem.id for problem in problems}


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


@pytest.mark.parametrize(
    ("count", "least", "most"), [(199, 0, 0), (200, 50, 50), (400, 50, 50), (4000, 340, 460)]
)
def test_fit_keeps_50_problems_if_there_are_enough(count, least, most):
    assert least <= len(split_problems(config.Config(), numbered(count)).fit) <= most


def test_a_new_problem_never_moves_another_from_training_to_the_fit():
    before: set[str] = set()
    for count in range(200, 1500, 37):
        split = split_problems(config.Config(), numbered(count))
        assert not before & ids(split.fit)
        before = ids(split.sft) | ids(split.stage2)


def test_no_problems_are_kept_if_fit_share_is_zero():
    assert split_problems(config.Config(problems=config.Problems(fit_share=0)), numbered(1000)).fit == []

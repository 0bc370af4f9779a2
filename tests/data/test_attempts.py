"""Attempts: sampled in blocks that survive a kill, graded, or imported from a file."""

import gzip
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from sclite import config
from sclite.config import Config
from sclite.data.attempts import attempts_inputs, deduplicate, write_attempts
from sclite.data.imported import import_attempts
from sclite.errors import DataError
from sclite.records import Attempt, Drop, Problem
from sclite.run import Run
from sclite.student.base import Reply
from sclite.student.endpoint import Endpoint
from sclite.teacher.client import Teacher
from sclite.teacher.ledger import Entry, Ledger
from sclite.trace import Step, Trace, parse, render
from tests.replay import TeacherServer, fail, say

PROBLEMS = [Problem(id=f"p{i}", question=f"What is {i} + 1?", answer=str(i + 1)) for i in range(5)]


def config_of(**attempts) -> Config:
    return Config.model_validate({"attempts": {"samples": 3, **attempts}, "student": {"batch": 4}})


@dataclass
class Deterministic:
    """A student whose reply depends only on the request; may stop after some blocks, as if killed."""

    blocks: int = 10**9
    finish: Callable[[int], str] = lambda seed: "stop"
    asked: list = field(default_factory=list)

    def generate(self, requests):
        if len(self.asked) == self.blocks:
            raise KeyboardInterrupt
        self.asked.append(list(requests))
        for index in reversed(range(len(requests))):
            request = requests[index]
            number = int(request.messages[-1]["content"].split("What is ")[1].split(" ")[0])
            said = number + 1 + (request.seed % 3 == 0)
            text = f"<Step1>seed {request.seed}\n</Step1>\n<Answer>{said}</Answer>"
            yield Reply(index, text, 9, 20, self.finish(request.seed))


def sample(run, grader, student, **attempts):
    config = config_of(**attempts)
    return write_attempts(config, run, problems=PROBLEMS, student=student, grader=grader)


# -- sampling ------------------------------------------------------------------------------------------------------


def test_every_sample_of_a_problem_has_its_own_seed(run, grader):
    student = Deterministic()
    report = sample(run, grader, student)
    rows = run.read("attempts.jsonl", Attempt)
    assert [(r.id, r.sample) for r in rows] == [(p.id, s) for p in PROBLEMS for s in range(3)]
    assert [len(block) for block in student.asked] == [4, 4, 4, 3]
    requests = [r for block in student.asked for r in block]
    assert len({r.seed for r in requests}) == 15
    assert {(r.temperature, r.top_p, r.max_tokens) for r in requests} == {(0.8, 0.95, 1024)}
    for row, request in zip(rows, requests, strict=True):
        assert f"seed {request.seed}" in row.trace  # replies come in any order
    assert report.counts["attempts"] == 15
    assert report.counts["right"] + report.counts["wrong"] == 15


def test_attempt_is_right_if_its_answer_equals_gold(run, grader):
    sample(run, grader, Deterministic())
    for row in run.read("attempts.jsonl", Attempt):
        assert row.answer == parse(row.trace).trace.answer
        assert row.correct is (row.answer == str(int(row.id[1:]) + 1))


def test_another_batch_size_keeps_the_attempts(run, grader):
    sample(run, grader, Deterministic())
    before = run.path("attempts.jsonl").read_bytes()
    other = Config.model_validate({"attempts": {"samples": 3}, "student": {"batch": 7}})
    report = write_attempts(other, run, problems=PROBLEMS, student=None, grader=grader)
    assert report.skipped
    assert run.path("attempts.jsonl").read_bytes() == before


def test_failed_call_leaves_the_outcome_unknown(run, grader):
    report = sample(run, grader, Deterministic(finish=lambda seed: "error"))
    assert report.counts == {"attempts": 15, "right": 0, "wrong": 0, "unknown": 15}
    assert {row.correct for row in run.read("attempts.jsonl", Attempt)} == {None}


@pytest.mark.parametrize(
    "tail", ["", '{"id":"p2","sam', '{"id":"p2","sample":2,"trace":"x","answer":null,"correct":null}\n']
)
@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_resume_after_a_kill_gives_the_file_of_an_uninterrupted_run(tmp_path, grader, blocks, tail):
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    sample(whole, grader, Deterministic())
    with pytest.raises(KeyboardInterrupt):
        sample(broken, grader, Deterministic(blocks))
    with open(broken.path("attempts.jsonl"), "a") as file:
        file.write(tail)
    student = Deterministic()
    sample(broken, grader, student)
    assert broken.path("attempts.jsonl").read_bytes() == whole.path("attempts.jsonl").read_bytes()
    assert len(student.asked) == 4 - blocks  # complete blocks are not sampled again


def test_rows_made_with_other_settings_are_discarded(run, grader):
    with pytest.raises(KeyboardInterrupt):
        sample(run, grader, Deterministic(2))
    student = Deterministic()
    sample(run, grader, student, temperature=0.5)
    assert len(student.asked) == 4


def test_finished_stage_needs_no_student(run, grader):
    first = sample(run, grader, Deterministic())
    again = sample(run, grader, None)
    assert again.skipped
    assert again.counts == first.counts


def test_identical_attempts_count_once():
    text, same, other = (
        "<Step1>a\n</Step1>\n<Answer>1</Answer>",
        "<step 1>a</step 1><answer>1</answer>",
        "<Answer>1</Answer>",
    )
    rows = [
        Attempt(id=i, sample=s, trace=t, answer="1", correct=True)
        for i, s, t in (("p1", 0, text), ("p1", 1, same), ("p1", 2, other), ("p2", 0, text))
    ]
    assert [(r.id, r.sample) for r in deduplicate(rows)] == [("p1", 0), ("p1", 2), ("p2", 0)]


@dataclass
class Prose(Deterministic):
    """Writes steps for some seeds only."""

    steps: Callable[[int], bool] = lambda seed: False

    def generate(self, requests):
        for reply in super().generate(requests):
            formed = self.steps(requests[reply.index].seed)
            yield reply if formed else replace(reply, text="It is 1, I think.")


@pytest.mark.parametrize(("share", "warned"), [(0, True), (1, False)])
def test_warning_if_most_attempts_are_unreadable(run, grader, share, warned):
    said = []

    def progress(done, total, spent=None, *, note="", warning=""):
        said.extend([warning] if warning else [])

    student = Prose(steps=lambda seed: bool(share))
    report = write_attempts(
        config_of(), run, problems=PROBLEMS, student=student, grader=grader, progress=progress
    )
    assert report.figures.get("warnings", []) == said
    assert len(said) == warned
    if warned:
        assert said[0].startswith("15 of 15 attempts have no readable steps, most often: no steps; train SFT")


# -- imported ------------------------------------------------------------------------------------------------------


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_imported_attempts_keep_labels_and_get_a_verdict(run, grader, tmp_path):
    source = write(
        tmp_path / "mine.jsonl",
        {"question": "What  is 1 + 1?", "steps": ["1 + 1 = 3", "So 3"], "first_error_step": 1},
        {"question": "Something else?", "steps": ["x"]},
        {"question": "What is 0 + 1?", "steps": ["0 + 1 = 1"], "first_error_step": 0},
        {"question": "What is 1 + 1?", "steps": ["a <Step2> b", "#### 2"], "answer": 2},
        {"question": "What is 3 + 1?", "steps": ["5"], "answer": "5", "first_error_step": None},
    )
    report = sample(run, grader, None, source=str(source))
    rows = run.read("attempts.jsonl", Attempt)
    assert [(r.id, r.sample, r.correct, r.first_error) for r in rows] == [
        ("p0", 0, True, None),
        ("p1", 0, False, 1),
        ("p1", 1, True, None),
        ("p3", 0, False, None),
    ]
    assert parse(rows[1].trace).trace == Trace((Step("1 + 1 = 3"), Step("So 3")), None, "3")
    assert rows[2].answer == "2"
    assert report.counts == {"attempts": 4, "right": 2, "wrong": 2, "unknown": 0}


def test_unicode_line_separator_does_not_end_a_line(grader, tmp_path):
    source = write(tmp_path / "mine.jsonl", {"question": "What is 1 + 1?", "steps": ["one\u2028two", "2"]})
    assert len(import_attempts(source, PROBLEMS, grader)) == 1


@pytest.mark.parametrize(
    "row",
    [
        '{"question": "What is 1 + 1?"}',
        '{"steps": ["a"]}',
        '{"question": "What is 1 + 1?", "steps": []}',
        '{"question": "What is 1 + 1?", "steps": "one string"}',
        '{"question": "What is 1 + 1?", "steps": ["a", " "]}',
        '{"question": "What is 1 + 1?", "steps": ["a"], "first_error_step": 2}',
        '{"question": "What is 1 + 1?", "steps": ["a"], "first_error_step": -2}',
        '{"question": "What is 1 + 1?", "steps": ["a"], "first_error_step": "first"}',
        '{"question": "What is 1 + 1?", "steps": ["a"], "label": 0}',
        '{"question": "What is 1 + 1?", "steps": [NaN]}',
        '{"question": "What is 1 + 1?", "steps": ["\\ud83d"]}',
        '{"question": 7, "steps": ["a"]}',
        "[1]",
        "not JSON",
    ],
)
def test_unusable_row_is_skipped_with_file_and_line(run, grader, tmp_path, row):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "What is 0 + 1?", "steps": ["1"]}\n\n' + row + "\n")
    report = sample(run, grader, None, source=str(path))
    assert report.counts["attempts"] == 1
    assert report.dropped == {"row_not_readable": 1}
    (drop,) = run.read("dropped.jsonl", Drop)
    assert (drop.stage, drop.id, drop.raw) == ("attempts", "line 3", row)
    assert "mine.jsonl, line 3: " in drop.detail
    path.write_text(row + "\n")
    with pytest.raises(DataError, match=r"no usable row: 1 row_not_readable; .*mine\.jsonl, line 1: "):
        import_attempts(path, PROBLEMS, grader)


def test_gzipped_attempts_are_read_without_lines_that_are_not_utf8(run, grader, tmp_path):
    path = tmp_path / "mine.jsonl.gz"
    row = b'{"question": "What is 0 + 1?", "steps": ["1"]}\n'
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + row + row.replace(b'"1"', b'"caf\xe9"')))
    assert sample(run, grader, None, source=str(path)).dropped == {"row_not_readable": 1}
    (drop,) = run.read("dropped.jsonl", Drop)
    assert drop.detail.endswith("line 2: the text is not UTF-8")


def test_row_with_an_unknown_question_is_skipped(run, grader, tmp_path):
    rows = [{"question": q, "steps": ["1"]} for q in ("what is  0 + 1?", "Something else?")]
    report = sample(run, grader, None, source=str(write(tmp_path / "mine.jsonl", *rows)))
    assert [r.id for r in run.read("attempts.jsonl", Attempt)] == ["p0"]  # ignoring case and white space
    assert report.dropped == {"question_unknown": 1}
    (drop,) = run.read("dropped.jsonl", Drop)
    assert json.loads(drop.raw) == rows[1]


@pytest.mark.parametrize("label", [0, -1])
def test_label_without_an_error_makes_the_attempt_right(grader, tmp_path, label):
    rows = [
        {"question": "What is 1 + 1?", "steps": ["two"], "first_error_step": label},
        {"question": "What is 1 + 1?", "steps": ["so 2"], "first_error_step": label},
        {"question": "What is 1 + 1?", "steps": ["so 3"], "first_error_step": label},
    ]
    drops: list[Drop] = []
    found = import_attempts(write(tmp_path / "mine.jsonl", *rows), PROBLEMS, grader, drops)
    assert [(r.sample, r.correct, r.first_error, r.answer) for r in found] == [
        (0, True, None, "2"),  # has no readable answer and gets the right one
        (1, True, None, "2"),
    ]
    assert not parse(found[0].trace).issues
    assert [(d.id, d.reason) for d in drops] == [("line 3", "label_contradicts_answer")]


def test_labelled_step_makes_the_attempt_wrong_despite_its_answer(grader, tmp_path):
    row = {"question": "What is 1 + 1?", "steps": ["1 + 1 = 3", "so 2"], "first_error_step": 1}
    (found,) = import_attempts(write(tmp_path / "mine.jsonl", row), PROBLEMS, grader)
    assert (found.correct, found.first_error) == (False, 1)


def test_label_column_of_another_benchmark_is_rejected(grader, tmp_path):
    source = write(tmp_path / "mine.jsonl", {"problem": "What is 1 + 1?", "steps": ["3"], "label": 0})
    with pytest.raises(DataError, match=r"has `label` but no `first_error_step`: .* add 1"):
        import_attempts(source, PROBLEMS, grader)


def test_missing_file_and_unknown_questions_have_different_errors(grader, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        import_attempts(tmp_path / "none.jsonl", PROBLEMS, grader)
    other = write(tmp_path / "other.jsonl", {"question": "Something else?", "steps": ["x"]})
    with pytest.raises(DataError, match="none of its questions is among the run's problems"):
        import_attempts(other, PROBLEMS, grader)


def test_imported_attempt_is_written_in_canonical_form(grader, tmp_path):
    source = write(
        tmp_path / "mine.jsonl", {"question": "What is 1 + 1?", "steps": ["a", "b"], "answer": "2"}
    )
    (row,) = import_attempts(source, PROBLEMS, grader)
    assert row.trace == render(parse(row.trace).trace)


# -- other students ------------------------------------------------------------------------------------------------


def solve_with_seed(body, nth):
    """The reply of a sampling model, determined by question and seed."""
    number = int(body["messages"][-1]["content"].split("What is ")[1].split(" ")[0])
    said = number + 1 + (body["seed"] % 3 == 0)
    return say(f"<Step1>seed {body['seed']}\n</Step1>\n<Answer>{said}</Answer>", seconds=0.01 * (said % 3))


@contextmanager
def endpoint(run, url, **settings):
    made = {"model": "openai/small", "api_base": url, "repairs": 0, "attempts_per_call": 1, **settings}
    with (
        Ledger(run.path("ledger.sqlite")) as ledger,
        Teacher(config.Teacher.model_validate(made), ledger) as client,
    ):
        yield Endpoint(client, "attempts")


def sample_endpoint(run, grader, url, progress=None, **attempts):
    asked = config_of(student="openai/small", api_base=url, **attempts)
    with endpoint(run, url) as student:
        return write_attempts(
            asked, run, problems=PROBLEMS, student=student, grader=grader, progress=progress
        )


@pytest.mark.parametrize("rows", [4, 12])
def test_interrupted_endpoint_run_resumes_without_paying_twice(tmp_path, grader, rows):
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")

    def interrupt(done, total):
        if done >= rows:
            raise KeyboardInterrupt

    with TeacherServer(solve_with_seed) as server:
        sample_endpoint(whole, grader, server.url)
        assert len(server.requests) == 15
    with TeacherServer(solve_with_seed) as server:
        with pytest.raises(KeyboardInterrupt):
            sample_endpoint(broken, grader, server.url, interrupt)
        assert len(broken.read("attempts.jsonl", Attempt)) == rows
        with Ledger(broken.path("ledger.sqlite")) as ledger:
            paid, asked = ledger.totals("attempts")["requests"], len(server.requests)
        sample_endpoint(broken, grader, server.url)
        assert len(server.requests) - asked == 15 - paid
        broken.path("done/attempts.json").unlink()
        broken.path("attempts.jsonl").unlink()
        before = len(server.requests)
        sample_endpoint(broken, grader, server.url)
        assert len(server.requests) == before
    assert broken.path("attempts.jsonl").read_bytes() == whole.path("attempts.jsonl").read_bytes()


def test_endpoint_does_not_wait_for_a_block_to_finish(run, grader):
    with TeacherServer(lambda body, nth: say("<Answer>1</Answer>", seconds=0.3)) as server:
        sample_endpoint(run, grader, server.url)
        assert server.most_in_flight > 4  # the block size
    assert len(run.read("attempts.jsonl", Attempt)) == 15


def test_next_run_repeats_only_the_failed_calls(run, grader):
    down = [True]

    def answer(body, nth):
        lost = down[0] and "What is 3 " in body["messages"][-1]["content"]
        return fail(429, "not now", retry_after="900") if lost else solve_with_seed(body, nth)

    with TeacherServer(answer) as server:
        first = sample_endpoint(run, grader, server.url)
        assert first.counts["unknown"] == 3
        rows = run.read("attempts.jsonl", Attempt)
        assert {r.id for r in rows if r.correct is None} == {"p3"}
        down[0] = False
        second = sample_endpoint(run, grader, server.url)
        assert not second.skipped
        assert second.counts["unknown"] == 0
        assert len(server.requests) == 15 + 3
        assert sample_endpoint(run, grader, server.url).skipped


def test_report_has_the_cost_of_an_endpoint_but_not_of_a_local_student(run, grader):
    assert sample(run, grader, Deterministic()).cost_usd == 0.0
    assert not run.path("ledger.sqlite").exists()
    with Ledger(run.path("ledger.sqlite")) as ledger:
        ledger.sent("one", "attempts", "openai/small")
        ledger.put("one", Entry("a", "stop", 1, 1, 0.25, 1.0))
        ledger.sent("two", "templates", "openai/teacher")
        ledger.put("two", Entry("b", "stop", 1, 1, 4.0, 1.0))
    assert sample(run, grader, Deterministic(), temperature=0.5).cost_usd == 0.25


def test_inputs_change_with_student_and_address_not_concurrency(run, tmp_path):
    def inputs(**attempts):
        return attempts_inputs(config_of(**attempts), run, PROBLEMS)

    here = {"student": "openai/small", "api_base": "http://here/v1"}
    assert inputs(**here) == inputs(**here | {"concurrency": 200, "api_base": "http://here/v1/"})
    assert inputs(**here) != inputs(**here | {"api_base": "http://there/v1"})
    assert inputs(**here) != inputs(**here | {"student": "openai/large"})
    assert inputs(**here) != inputs()
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF one")
    before = inputs(student=str(file))
    (tmp_path / "copy.gguf").write_bytes(b"GGUF one")
    assert inputs(student=str(tmp_path / "copy.gguf")) == before
    file.write_bytes(b"GGUF other")
    assert inputs(student=str(file)) != before

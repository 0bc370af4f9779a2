"""Attempts: sampled in blocks that survive a kill, and graded."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from sclite import config
from sclite.config import Config
from sclite.data.attempts import attempts_inputs, deduplicate, write_attempts
from sclite.progress import no_progress
from sclite.records import Attempt, Drop
from sclite.run import Run
from sclite.student.base import Reply
from sclite.student.endpoint import Endpoint
from sclite.teacher.ledger import Ledger
from sclite.trace import parse
from tests.replay import TeacherServer, client, fail, number_of, say, sums
from tests.toy import pay

PROBLEMS = sums(5, solution=None)


def config_of(batch=4, **attempts) -> Config:
    return Config.model_validate({"attempts": {"samples": 3, **attempts}, "student": {"batch": batch}})


def solve(question: str, seed: int) -> str:
    """The attempt of a sampling model, determined by question and seed; a third of them is wrong."""
    number = int(question.split("What is ")[1].split(" ")[0])
    return f"<Step1>seed {seed}\n</Step1>\n<Answer>{number + 1 + (seed % 3 == 0)}</Answer>"


@dataclass
class Deterministic:
    """A student whose reply depends only on the request; may stop after some blocks, as if killed."""

    blocks: int = 10**9
    finish: str = "stop"
    write: Callable[[str, int], str] = solve
    backwards: bool = True
    asked: list = field(default_factory=list)

    def generate(self, requests):
        if len(self.asked) == self.blocks:
            raise KeyboardInterrupt
        self.asked.append(list(requests))
        for index in sorted(range(len(requests)), reverse=self.backwards):
            request = requests[index]
            text = self.write(request.messages[-1]["content"], request.seed)
            yield Reply(index, text, 9, 20, self.finish)


def sample(run, grader, solver, progress=no_progress, batch=4, **attempts):
    options = {"problems": PROBLEMS, "student": solver, "grader": grader, "progress": progress}
    return write_attempts(config_of(batch, **attempts), run, **options)


@pytest.mark.parametrize("backwards", [True, False])
def test_attempts_are_graded_and_each_sample_has_its_own_seed(run, grader, backwards):
    student = Deterministic(backwards=backwards)
    report = sample(run, grader, student)
    rows = run.read("attempts.jsonl", Attempt)
    assert [(r.id, r.sample) for r in rows] == [(p.id, s) for p in PROBLEMS for s in range(3)]
    assert [len(block) for block in student.asked] == [4, 4, 4, 3]
    requests = [r for block in student.asked for r in block]
    assert len({r.seed for r in requests}) == 15
    assert {(r.temperature, r.top_p, r.max_tokens) for r in requests} == {(0.8, 0.95, 1024)}
    for row, request in zip(rows, requests, strict=True):
        assert f"seed {request.seed}" in row.trace  # replies come in any order
        assert row.answer == parse(row.trace).trace.answer
        assert row.correct is (row.answer == str(int(row.id[1:]) + 1))
    assert report.counts["attempts"] == 15
    assert report.counts["right"] + report.counts["wrong"] == 15


def test_finished_stage_needs_no_student_and_no_equal_batch_size(run, grader):
    first = sample(run, grader, Deterministic())
    before = run.path("attempts.jsonl").read_bytes()
    for batch in (4, 7):
        again = sample(run, grader, None, batch=batch)
        assert again.skipped
        assert again.counts == first.counts
    assert run.path("attempts.jsonl").read_bytes() == before


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


def test_rows_of_other_settings_and_drops_of_an_import_are_discarded(run, grader):
    run.append("dropped.jsonl", [Drop(stage=stage, id="1", reason="r") for stage in ("attempts", "eval")])
    with pytest.raises(KeyboardInterrupt):
        sample(run, grader, Deterministic(2))
    failing = Deterministic(finish="error")
    report = sample(run, grader, failing, temperature=0.5)
    assert len(failing.asked) == 4
    assert report.counts == {"attempts": 15, "right": 0, "wrong": 0, "unknown": 15}  # of failed calls
    assert [drop.stage for drop in run.read("dropped.jsonl", Drop)] == ["eval"]


def test_identical_attempts_count_once_and_a_changed_copy_is_parsed_again():
    text = "<Step1>a\n</Step1>\n<Answer>1</Answer>"
    same, other = "<step 1>a</step 1><answer>1</answer>", "<Answer>1</Answer>"
    rows = [
        Attempt(id=i, sample=s, trace=t, answer="1", correct=True)
        for i, s, t in (("p1", 0, text), ("p1", 1, same), ("p1", 2, other), ("p2", 0, text))
    ]
    failed = [Attempt(id="p2", sample=s, trace="", answer=None, correct=None) for s in (1, 2)]
    found = [(row.id, row.sample) for row in deduplicate([*rows, *failed])]
    assert found == [("p1", 0), ("p1", 2), ("p2", 0), ("p2", 1), ("p2", 2)]
    row = Attempt(id="p", sample=0, trace="<Answer>1</Answer>", answer="1", correct=True)
    assert row.parsed is row.parsed
    assert row.parsed.trace.answer == "1"


def answer_with_seed(body, nth):
    text = solve(body["messages"][-1]["content"], body["seed"])
    return say(text, seconds=0.01 * (body["seed"] % 3))


def sample_endpoint(run, grader, url, progress=no_progress, **more):
    settings = {"model": "openai/small", "api_base": url, "repairs": 0, "attempts_per_call": 1}
    with client(run, config.Teacher.model_validate(settings)) as made:
        student = Endpoint(made, "attempts")
        return sample(run, grader, student, progress, student="openai/small", api_base=url, **more)


def test_interrupted_endpoint_run_resumes_without_paying_twice(tmp_path, grader):
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with TeacherServer(answer_with_seed) as server:
        sample_endpoint(whole, grader, server.url)
        assert len(server.requests) == 15
        assert server.most_in_flight > 4  # the batch size of a local student
    with TeacherServer(answer_with_seed) as server:
        with pytest.raises(KeyboardInterrupt):
            sample_endpoint(broken, grader, server.url, interrupt, concurrency=1)
        assert len(broken.read("attempts.jsonl", Attempt)) == 4
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


def test_next_run_repeats_only_the_failed_calls(run, grader):
    down = [True]

    def answer(body, nth):
        lost = down[0] and number_of(body) == 3
        return fail(429, "not now", retry_after="900") if lost else answer_with_seed(body, nth)

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
    pay(run, "attempts", 0.25)
    pay(run, "templates", 4.0)
    assert sample(run, grader, Deterministic(), temperature=0.5).cost_usd == 0.25


def test_inputs_change_with_student_and_address_not_concurrency(run, tmp_path):
    def inputs(**attempts):
        return attempts_inputs(config_of(**attempts), run, PROBLEMS)

    here = {"student": "openai/small", "api_base": "http://here/v1"}
    assert inputs(**here) == inputs(**here | {"concurrency": 200, "api_base": "http://here/v1/"})
    others = ({}, here | {"api_base": "http://there/v1"}, here | {"student": "openai/large"})
    assert inputs(**here) not in [inputs(**other) for other in others]
    file, copy = tmp_path / "mine.gguf", tmp_path / "copy.gguf"
    for path in (file, copy):
        path.write_bytes(b"GGUF one")
    before = inputs(student=str(file))
    assert inputs(student=str(copy)) == before
    file.write_bytes(b"GGUF other")
    assert inputs(student=str(file)) != before

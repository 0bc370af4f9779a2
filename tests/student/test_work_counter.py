"""Counting a student's work."""

from dataclasses import replace

from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student
from sclite.student.work_counter import WorkCounter


class Echo(Student):
    def generate(self, requests):
        for index, request in enumerate(requests):
            yield Reply(index, request.messages[-1]["content"], 1, 1, "stop")

    def score(self, requests):
        for index, _ in enumerate(requests):
            yield Scores(index, (0.0,), 1)


def test_replies_and_scores_pass_unchanged_and_are_counted():
    seen = []
    student = WorkCounter(Echo(), 2, 2, lambda *counts: seen.append(counts))
    requests = [Request([{"role": "user", "content": text}], max_tokens=1) for text in "ab"]
    assert [reply.text for reply in student.generate(requests)] == ["a", "b"]
    asked = ScoreRequest([], ("",), (0,), (("a", "b"),))
    assert [found.index for found in student.score([asked])] == [0]
    unsure = ScoreRequest([], ("",), (-1,), (("a", None),))
    assert [found.index for found in student.score([unsure])] == [0]  # of the same text: it counts once
    assert seen[:2] == [(1, 1 / 6, "1 texts written"), (2, 2 / 6, "2 texts written")]
    assert seen[2:] == [(2, 0.5, "2 texts written, 1 reviewed")] * 2
    correction = replace(requests[0], pieces=("<Step1>1 + 1 = 2\n",))
    assert len(list(student.generate([correction]))) == 1  # as many as scores are expected
    assert seen[-1] == (2, 4 / 6, "3 texts written, 1 reviewed")

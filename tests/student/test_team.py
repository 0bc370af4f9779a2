"""Several students that share the work."""

import pytest

from sclite.errors import DataFault
from sclite.student.base import Reply, Request
from sclite.student.team import NEIGHBOURS, Team, open_student
from tests.tiny import tiny_gguf, tiny_llama


class Echo:
    """Answers with the user's text; fails on the word fail."""

    def generate(self, requests):
        for index, request in enumerate(requests):
            text = request.messages[0]["content"]
            if text == "fail":
                raise DataFault("this one fails")
            yield Reply(index, text, 1, 1, "stop")


def asked(texts):
    return [Request(({"role": "user", "content": text},)) for text in texts]


def test_every_request_gets_its_own_reply():
    texts = [str(number) for number in range(11)]
    replies = list(Team([Echo(), Echo(), Echo()]).generate(asked(texts)))
    assert {reply.index: reply.text for reply in replies} == dict(enumerate(texts))


def test_requests_in_a_row_go_to_the_same_member():
    class Heard(Echo):
        def generate(self, requests):
            self.texts = [request.messages[0]["content"] for request in requests]
            yield from super().generate(requests)

    team = Team([Heard(), Heard()])
    texts = [str(number) for number in range(3 * NEIGHBOURS + 1)]
    list(team.generate(asked(texts)))
    assert team.members[0].texts == texts[:NEIGHBOURS] + texts[2 * NEIGHBOURS : 3 * NEIGHBOURS]
    assert team.members[1].texts == texts[NEIGHBOURS : 2 * NEIGHBOURS] + texts[3 * NEIGHBOURS :]


def test_fault_of_one_member_is_raised_and_not_lost():
    with pytest.raises(DataFault, match="this one fails"):
        list(Team([Echo(), Echo()]).generate(asked([*"abcdefg", "fail"])))


def test_small_gguf_gives_the_same_replies_shared_or_not(tmp_path):
    from sclite.student.engine import Engine

    path = tiny_gguf(tiny_llama(tmp_path / "model"), tmp_path / "tiny.gguf")
    requests = [
        Request(r.messages, max_tokens=8, temperature=0.9, seed=i) for i, r in enumerate(asked("abcdefg"))
    ]
    with open_student(path, parallel=32, context=256) as shared:
        assert {member.parallel for member in getattr(shared, "members", [shared])} == {1}
        together = {r.index: r.text for r in shared.generate(requests)}
    with Engine(path, parallel=4, context=256) as alone:
        assert together == {r.index: r.text for r in alone.generate(requests)}


def test_a_small_gguf_on_a_gpu_is_one_engine_with_all_its_sequences(tmp_path, monkeypatch):
    from sclite.student.engine import Engine, llama

    path = tiny_gguf(tiny_llama(tmp_path / "model"), tmp_path / "tiny.gguf")
    monkeypatch.setattr(llama(), "llama_supports_gpu_offload", lambda: True)
    with open_student(path, parallel=8, context=256) as student:
        assert isinstance(student, Engine)
        assert student.parallel == 8

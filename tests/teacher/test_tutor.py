"""The quickstart's tutor as a teacher."""

from sclite import config, prompts
from sclite.quickstart import stories, tutor, tutor_provider
from sclite.teacher.client import Job, Teacher


def test_tutor_is_reached_through_litellm_free_of_charge(ledger):
    chats = [
        prompts.teacher_messages("teacher_template", problem.question, problem.solution, problem.answer)
        for problem in stories.generate(12, 5)
    ]
    jobs = [Job(str(n), lambda error, chat=chat: chat, lambda reply: None) for n, chat in enumerate(chats)]
    with Teacher(config.Teacher(model=tutor_provider.MODEL), ledger, tutor_provider.register) as teacher:
        results = {int(result.id): result.text for result in teacher.ask_all(jobs)}
    assert results == {number: tutor.reply(chat) for number, chat in enumerate(chats)}
    totals = ledger.totals()
    assert (totals["requests"], totals["cost_usd"], totals["unpriced"]) == (12, 0.0, 0)
    assert totals["completion_tokens"] > 200

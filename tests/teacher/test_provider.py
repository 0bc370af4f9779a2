"""The quickstart's tutor as a teacher."""

from sclite import config, prompts
from sclite.quickstart import stories, tutor, tutor_provider
from sclite.teacher.client import Job, Rejection, Teacher
from sclite.teacher.ledger import Ledger


def test_tutor_is_reached_through_litellm_free_of_charge(tmp_path):
    problems = stories.generate(12, 5)

    def job(problem):
        def messages(error):
            return prompts.template_messages(problem.question, problem.solution, problem.answer, error)

        return Job(problem.id, messages, lambda reply: None if "<Answer>" in reply else Rejection("x", reply))

    settings = config.Teacher(model=tutor_provider.MODEL)
    with (
        Ledger(tmp_path / "l.sqlite") as ledger,
        Teacher(settings, ledger, tutor_provider.register) as teacher,
    ):
        results = {result.id: result for result in teacher.ask_all(job(p) for p in problems)}
        totals = ledger.totals()
    for problem in problems:
        assert results[problem.id].text == tutor.reply(job(problem).messages(""))
    assert totals["requests"] == 12
    assert totals["completion_tokens"] > 200
    assert (totals["cost_usd"], totals["unpriced"]) == (0.0, 0)

"""A teacher that thinks: its parameters reach it, its reasoning reaches no template, and its budget is not wasted."""

import pytest

from sclite.data.templates import write_templates
from sclite.errors import BudgetError, UsageError
from sclite.records import Template
from sclite.settings import load
from tests.replay import Answer, TeacherServer, fail, job, number_of, question, say, sums, template

EXTRA = {
    "reasoning_effort": "low", "service_tier": "flex", "top_k": 20,
    "extra_body": {"chat_template_kwargs": {"enable_thinking": True}},
}  # fmt: skip
THOUGHT = "Hmm, 9 of those <Step1>wrong</Step1><Generalized>No.</Generalized><Answer>-1</Answer>"
PRICE = (1.0, 10.0)  # US dollars per million tokens


def thought(text, finish_reason="stop", tokens=(20, 90), reasoning_tokens=None, **message):
    body = say(text, finish_reason, tokens=tokens).body
    body["choices"][0]["message"] |= message
    if reasoning_tokens:
        body["usage"]["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return Answer(body=body)


EATEN = [
    thought(None, "length", (10, 100), reasoning_content=THOUGHT),
    thought(None, "length", (10, 100), reasoning=THOUGHT),
    thought("", "length", (10, 100), reasoning_tokens=100),
    thought("", "length", (10, 100)),
    thought("<Step1>Cou", "length", (10, 100), reasoning_tokens=90),
    thought("<Step1>Cou", "length", (10, 100)),
    thought("<Step1>Cou", "length", (10, 100), reasoning_content=THOUGHT),
    thought(f"<think>{THOUGHT}", "length", (10, 100)),
    thought(f"<think>{THOUGHT}</think><Step1>", "length", (10, 100)),
    thought(f"<|channel|>analysis<|message|>{THOUGHT}", "length", (10, 100)),
]
REASONED = [
    lambda text: thought(f"<think>\n{THOUGHT}\n</think>\n\n{text}"),
    lambda text: thought(text, reasoning_content=THOUGHT),
    lambda text: thought(text, reasoning=THOUGHT),
    lambda text: thought(text, reasoning_tokens=60),
    lambda text: thought([{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}, {"type": "text", "text": text}]),
]  # fmt: skip


@pytest.mark.parametrize("model", ["openai/replay", "hosted_vllm/replay"])
@pytest.mark.parametrize("direct", [True, False])
def test_extra_parameters_are_in_the_request_and_the_key(ask, model, direct):
    with TeacherServer(lambda request, nth: say("good")) as server:
        for extra in (EXTRA, EXTRA, {}):
            ask(server, [job(1)], model=model, direct=direct, extra=extra)
    first, without = server.requests
    expected = {**EXTRA, **EXTRA["extra_body"]}
    del expected["extra_body"]
    assert {name: value for name, value in first.items() if name not in without} == expected


def test_extra_goes_through_litellm_if_needed_and_not_to_the_inspector(asked, ask):
    named = {"allowed_openai_params": ["reasoning_effort"], "reasoning_effort": "low"}
    results, requests = asked(lambda request, nth: say("good"), [job(2)], extra=named)
    assert (results[0].text, requests[0]["reasoning_effort"]) == ("good", "low")
    extra = {"metadata": {"a": "b"}, "mock_response": "from LiteLLM"}
    results, requests = asked(lambda request, nth: say("good"), [job(1)], extra=extra)
    assert (results[0].text, requests) == ("from LiteLLM", [])
    judged = job(1, inspect=lambda reply: [{"role": "user", "content": reply}])
    with TeacherServer(lambda request, nth: say("<Verdict>accept</Verdict>")) as server:
        ask(server, [judged], extra=EXTRA, inspector="openai/judge", inspector_api_base=server.url)
    assert [("top_k" in request) for request in server.requests] == [True, False]


@pytest.mark.parametrize(
    "setting", ['teacher.extra={"top_k": 20}', "teacher.extra={top_k = 20}", "teacher.extra.top_k=20"]
)
def test_extra_is_json_toml_or_a_dotted_key(setting, tmp_path):
    assert load(None, [setting], {}, own_file=False).teacher.extra == {"top_k": 20}
    file = tmp_path / "sclite.toml"
    file.write_text("[teacher.extra]\nreasoning_effort = 'high'\n")
    both = {"reasoning_effort": "high", "top_k": 20}
    assert load(file, ["teacher.extra.top_k=20"], {}).teacher.extra == both
    for emptied in ("teacher.extra=", "teacher.extra.reasoning_effort="):
        assert load(file, [emptied], {}).teacher.extra == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"model": "x"}', "sclite sets model itself, use teacher.model"),
        ('{"max_completion_tokens": 9}', "sclite sets max_completion_tokens itself, use teacher.max_tokens"),
        ('{"extra_body": {"messages": []}}', "sclite sets messages itself"),
        ('{"api_key": "sk-1"}', "api_key looks like a secret"),
        ('{"extra_body": {"aws_session_token": "sk-1"}}', "aws_session_token looks like a secret"),
        ('{"api_key": "sk-1"', "this is not a JSON object"),
        ('{"a": [{"b": null}]}', "null, NaN and Infinity are not allowed"),
        ('{"a": NaN}', "null, NaN and Infinity are not allowed"),
        ('{"a": 1', "this is not a JSON object"),
        ("7", "input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_parameter_that_sclite_sets_or_cannot_store_is_refused(value, message):
    with pytest.raises(UsageError, match=r"teacher\.extra") as caught:
        load(None, [f"teacher.extra={value}"], {}, own_file=False)
    assert message in caught.value.message
    assert "sk-1" not in caught.value.message + caught.value.hint


def test_limit_reserves_the_price_of_the_service_tier(teacher_of):
    import litellm

    listed = litellm.model_cost["gpt-5-mini"]
    assert listed["output_cost_per_token_priority"] > listed["output_cost_per_token"]
    for tier, name in (("priority", "_priority"), ("flex", "")):
        with teacher_of("", model="openai/gpt-5-mini", extra={"service_tier": tier}) as teacher:
            assert teacher.price().completion_usd == listed[f"output_cost_per_token{name}"]


@pytest.mark.parametrize("direct", [True, False])
def test_thinking_teacher_gives_templates_without_its_reasoning(teacher_of, ledger, run, grader, direct):
    problems = sums(120)
    kinds = REASONED if direct else REASONED[:-1]  # LiteLLM cannot read parts from openai/
    used = []

    def answer(request, nth):
        number = number_of(request)
        found = kinds[number % len(kinds)](template(number + 1))
        if number % 3 == 0 and request["max_tokens"] == 100:
            found = EATEN[number // 3 % len(EATEN)]
        used.append(found.body["usage"])
        return found

    with TeacherServer(answer) as server, teacher_of(server, price=PRICE, direct=direct) as teacher:
        settings = load(None, ["teacher.repairs=3"], {}, own_file=False)
        report = write_templates(settings, run, teacher=teacher, grader=grader, problems=problems)
    assert (report.counts["templates"], report.dropped) == (120, {})
    traces = "".join(row.trace for row in run.rows("templates.jsonl", Template))
    assert "Hmm" not in traces
    assert "wrong" not in traces
    assert len(used) == 120 + 40
    cost = sum(u["prompt_tokens"] * PRICE[0] + u["completion_tokens"] * PRICE[1] for u in used) / 1e6
    assert ledger.spent_usd == pytest.approx(cost)


@pytest.mark.parametrize("answer", EATEN)
def test_budget_spent_on_reasoning_is_doubled_once(asked, answer, capsys):
    results, requests = asked(lambda request, nth: answer, [job(1), job(2)], price=PRICE)
    assert sorted(request["max_tokens"] for request in requests) == [100, 100, 200, 200]
    assert set(map(question, requests)) == {"question 1.", "question 2."}  # not "shorter"
    assert {result.rejection.reason for result in results} == {"reasoning_too_long"}
    text = results[0].rejection.text
    assert all(word in text for word in ("200 tokens", "teacher.max_tokens", "reasoning_effort"))
    assert capsys.readouterr().err.count("sent once more with 200") == 1


@pytest.mark.parametrize("reasoning", [{}, {"reasoning": "so"}])
def test_reply_that_is_too_long_is_not_taken_for_reasoning(asked, reasoning):
    long = thought("word " * 60, "length", (10, 100), 30 if reasoning else None, **reasoning)
    results, requests = asked(lambda request, nth: long, [job(1)], price=PRICE)
    assert results[0].rejection.reason == "cut_off"
    assert {request["max_tokens"] for request in requests} == {100}
    assert "shorter" in question(requests[1])


@pytest.mark.parametrize(
    ("replies", "budgets"),
    [
        ([say("word " * 60, "length"), EATEN[0], say("good")], [100, 100, 200]),
        ([EATEN[0], say("word " * 100, "length"), say("good")], [100, 200, 200]),
    ],
)
def test_budget_is_doubled_after_a_repair_too_and_repairs_keep_it(asked, replies, budgets):
    answers = iter(replies)
    (result,), requests = asked(lambda request, nth: next(answers), [job(1)])
    assert [request["max_tokens"] for request in requests] == budgets
    assert (result.text, result.requests) == ("good", 3)


@pytest.mark.parametrize(
    "settings", [{"repairs": 0}, {"max_tokens": 32768}, {"max_tokens": 16384, "model": "openai/gpt-4o"}]
)
def test_budget_is_not_enlarged_without_repairs_or_beyond_a_bound(asked, settings):
    results, requests = asked(lambda request, nth: EATEN[0], [job(1)], **settings)
    assert (len(requests), results[0].rejection.reason) == (1, "reasoning_too_long")


def test_reasoning_without_a_reply_or_a_larger_budget_is_reported(asked):
    def answer(request, nth):
        return EATEN[0] if request["max_tokens"] == 100 else fail(400, "max_tokens is too large")

    results, _ = asked(answer, [job(1)])
    assert "used up the budget of 100 tokens" in results[0].rejection.text
    results, _ = asked(lambda request, nth: thought(f"<think>{THOUGHT}"), [job(1)], repairs=0)
    assert (results[0].rejection.reason, results[0].text) == ("empty_reply", None)


def test_larger_budget_is_reserved_against_the_limit(ask, ledger):
    """Two requests of at most 100 * $10 / 10**6 fit into $0.0025; after one, 200 * $10 / 10**6 does not."""
    with TeacherServer(lambda request, nth: EATEN[0]) as server:
        with pytest.raises(BudgetError):
            ask(server, [job(1)], price=PRICE, max_cost=0.0025)
        assert len(server.requests) == 1
        ask(server, [job(1)], price=PRICE, max_cost=0.005)  # the paid reply is not requested again
    assert [request["max_tokens"] for request in server.requests] == [100, 200]
    assert ledger.totals()["cost_usd"] == pytest.approx(2 * (10 * 1 + 100 * 10) / 1e6)

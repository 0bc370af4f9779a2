"""Stage 2 with a student that this run does not train: a real endpoint and a real GGUF, from problems to pairs."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sclite import evaluation, exports, forecast, pipeline, prompts
from sclite.context import Context
from sclite.data.attempts import attempts_inputs
from sclite.errors import DataError, UsageError
from sclite.inspect.plan import print_plan
from sclite.progress import ProgressDisplay
from sclite.records import Attempt, Drop, Pair, Problem, Review
from sclite.run import Report
from sclite.settings import load
from sclite.student.tokenization import piece_ids, prompt_ids
from sclite.trace import CAUSE, Step, Trace, render, step_pieces
from tests.replay import TeacherServer, say
from tests.toy import raises, tiny_gguf, tiny_llama, write_rows

STEPS = ("I look at both numbers.", "It is 90.")
OWN = "Hm.</Cause>\n<Correction>It is 80.</Correction>"


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def problems(count: int, name: str = "mine.jsonl", first: int = 1) -> None:
    numbers = range(first, first + count)
    write_rows(name, [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in numbers])


def attempt(answer="80", notes=(None, None)):
    cause, correction = notes
    return render(Trace((Step(STEPS[0]), Step(STEPS[1], None, cause, correction)), "Add.", answer))


def model(body, nth):
    """Teacher and student at one address: the model's name tells them apart."""
    text = body["messages"][-1]["content"]
    gold = str(2 * int(re.search(r"What is (\d+) \+", text)[1]))
    if body["model"] == "teacher":
        return say(attempt(gold, ("It is not 90.", f"It is {gold}.")))
    review = "Work to check" in text
    own = attempt("80", ("Hm.", "It is 80."))
    return say(own if review else attempt(gold if body["seed"] % 3 == 0 else "80"))


def prepare(run):
    """Eight problems and a template, ready to be trained on."""
    problems(8)
    template = {"id": "p", "question": "What is 1 + 1?", "answer": "2", "trace": attempt("2")}
    write_rows(run.path("templates.jsonl"), [template])


def settings(url, **more):
    teacher = {"teacher.model": "openai/teacher", "teacher.api_base": url, "teacher.attempts_per_call": 1}
    chosen = {**teacher, "problems.source": "mine.jsonl", "student.batch": 4, **more}
    return [f"{key}={value}" for key, value in chosen.items()]


def context_of(run, url, **more):
    config = load(None, [f"run={run.folder}", *settings(url, **more)], {}, own_file=False)
    return Context(config, run, ProgressDisplay(quiet=True))


def test_build_data_goes_from_problems_to_pairs_with_an_endpoint(run, sclite, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123456")  # which the fixture sclite removes
    problems(12)
    with TeacherServer(model) as server:
        own = {"attempts.student": "openai/student", "attempts.api_base": server.url}
        chosen = [word for setting in settings(server.url, **own) for word in ("--set", setting)]
        command = ("build-data", "--only", "corrections", "--run", run.folder, "--json", *chosen)
        figures = json.loads(sclite(*command).out)
        asked = len(server.requests)
        assert json.loads(sclite(*command).out)["pairs"] == figures["pairs"]
        assert len(server.requests) == asked
    pairs = run.read("pairs.jsonl", Pair)
    assert figures["pairs"] == len(pairs)
    contents = [pair for pair in pairs if pair.kind == "content"]
    assert contents
    for pair in contents:
        assert (pair.step, pair.rejected) == (2, OWN + "\n")
        assert pair.chosen.startswith("It is not 90.")
    wrong = [row for row in run.read("attempts.jsonl", Attempt) if row.correct is False]
    assert wrong
    assert {review.step for review in run.read("reviews.jsonl", Review)} <= {None, 2}
    assert not run.path("sft").exists()
    for path in run.folder.rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes()


def test_another_endpoint_is_sampled_again_and_only_new_attempts_corrected(run):
    problems(8)
    with TeacherServer(model) as server:
        for name in ("student", "other"):
            own = {"attempts.student": f"openai/{name}", "attempts.api_base": server.url}
            context = context_of(run, server.url, **own)
            pipeline.build_corrections(context, alone=True)
            assert context.reports[-1].stage == "pairs"
        asked = [body["model"] for body in server.requests]
    assert asked.count("student") == asked.count("other") > 0
    assert asked.count("teacher") == len({r.id for r in run.read("reviews.jsonl", Review) if r.step})


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """An overfitted tiny model: it makes the same mistake in every problem, and has one correction for it."""
    folder = tiny_llama(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    steps = tuple(Step(text) for text in STEPS)
    end = "<Generalized>Add.</Generalized>\n<Answer>80</Answer><|im_end|>"
    rows = []
    for question in ("What is 1 + 1?", "What is 2 + 2?"):
        solve, review = prompts.solve_messages(question), prompts.review_messages(question, attempt())
        first, second = step_pieces(steps), step_pieces((steps[0], Step("It is 80.")))
        rows += [(solve, [], "".join(first) + end), (review, [*first[:3], CAUSE], OWN), (solve, second, end)]
    encoded = []
    for messages, prefix, text in rows:
        before = prompt_ids(tokenizer, messages) + [i for ids in piece_ids(tokenizer, prefix) for i in ids]
        new = tokenizer(text, add_special_tokens=False).input_ids
        encoded.append((before + new, [-100] * len(before) + new))
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([ids + [2] * (width - len(ids)) for ids, _ in encoded])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in encoded])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(150):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.03:
            break
    model.save_pretrained(folder)
    return tiny_gguf(folder, folder / "student.gguf")


def test_a_gguf_gives_attempts_and_its_own_corrections_of_them(run, gguf):
    problems(4)
    with TeacherServer(model) as server:
        context = context_of(run, server.url, **{"attempts.student": gguf, "attempts.temperature": 0})
        pipeline.build_corrections(context)
        report = pipeline.build_pairs(context)
        assert {body["model"] for body in server.requests} == {"teacher"}
        again = (pipeline.build_corrections(context), pipeline.build_pairs(context))
        assert [report.skipped for report in again] == [True, True]
    attempts = run.read("attempts.jsonl", Attempt)
    assert {row.trace for row in attempts} == {attempt()}
    pairs = run.read("pairs.jsonl", Pair)
    contents = [pair for pair in pairs if pair.kind == "content"]
    assert len(contents) == report.counts["content"] == len({row.id for row in attempts})
    assert {pair.rejected for pair in contents} == {OWN + "\n"}
    for name in ("attempts.jsonl", "pairs.jsonl"):
        run.path(name).unlink()
    pipeline.build_corrections(context)  # the replies of the teacher are in the ledger
    pipeline.build_pairs(context)
    assert (run.read("attempts.jsonl", Attempt), run.read("pairs.jsonl", Pair)) == (attempts, pairs)


PRICED = {"teacher.price": "[10, 20]"}


def plan_of(run, folder, capsys, url="http://127.0.0.1:9/v1", **more):
    """(context, what is printed) of the plan of a run with a student in the folder."""
    context = context_of(run, url, **{"student.model": folder, "student.backend": "plain", **more})
    context.display = ProgressDisplay()
    print_plan(forecast.plan_run(context))
    return context, capsys.readouterr().out


def test_the_plan_of_a_run_counts_the_wrong_attempts_at_any_price(run, folder, capsys):
    problems(20)
    _, shown = plan_of(run, folder, capsys, **PRICED, **{"attempts.source": "tries.jsonl"})
    assert "Templates from the teacher: 20, about $" in shown
    assert "Corrections from the teacher: unknown" in shown  # the number of imported attempts
    wrong = {"sample": 0, "trace": attempt("1"), "answer": "1", "correct": False}
    attempted = pipeline.divided_problems(context_of(run, "http://x")).stage2[:2]
    write_rows(run.path("attempts.jsonl"), [{"id": problem.id, **wrong} for problem in attempted])
    _, shown = plan_of(run, folder, capsys, "http://teacher.example/v1")
    assert "Corrections from the teacher: 2, cost unknown\n" in shown


def test_run_with_plan_shows_it_and_starts_nothing(run, folder, sclite):
    problems(300)
    own = {"teacher.price": "[10, 20]", "attempts.samples": 1, "student.model": folder}
    chosen = [word for setting in settings("http://127.0.0.1:9/v1", **own) for word in ("--set", setting)]
    command = ("run", "mine.jsonl", "--run", run.folder, "--plan", *chosen)
    shown = sclite(*command)
    plan = json.loads(sclite(*command, "--json").out)
    trained = plan["templates"]["requests"]
    assert 200 < trained <= 250  # at least 50 are kept for the threshold
    assert plan["templates"]["cost_usd"] > 0
    assert 0 < plan["teacher"]["requests"] < trained
    assert (shown.code, plan["teacher"]["at_most"]) == (0, True)
    assert f"Templates from the teacher: {trained}, about $" in shown.out
    assert f"Corrections from the teacher: at most {plan['teacher']['requests']}, about $" in shown.out
    assert set(plan["stages"]) == {"sft", "warmup", "dpo"}
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"attempts.source": "none.jsonl"}, "attempts.source: none.jsonl does not exist"),
        ({"attempts.student": "none.gguf"}, "attempts.student: none.gguf does not exist"),
        ({"attempts.student": "torn.gguf"}, "torn.gguf"),
        ({"problems.source": ""}, "problems.jsonl is missing, and stage 2 needs problems"),
        ({"problems.correction_share": 1e-9}, "no problems are kept for stage 2"),
    ],
)
def test_train_reports_what_stage_2_lacks_before_sft(run, tmp_path, monkeypatch, more, said):
    def start(*_):
        raise InterruptedError

    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(pipeline, "train_stage", start)
    monkeypatch.setattr(exports, "check_chat_template", lambda _: None)
    prepare(run)
    context = context_of(run, "http://127.0.0.1:9/v1", **more)
    with pytest.raises(DataError) as error:
        pipeline.train(context)
    assert said in error.value.message
    with pytest.raises(InterruptedError):
        pipeline.train(context, "sft")
    run.path("templates.jsonl").unlink()
    write_rows(run.path("sft/adapter/adapter_model.safetensors"), [])
    with pytest.raises(DataError, match=r"templates\.jsonl is missing"):  # stage 2 replays them
        pipeline.train(context)
    prepare(run)
    write_rows(run.path("pairs.jsonl"), [{"id": "p"}])
    with pytest.raises(DataError, match=r"reviews\.jsonl is missing, and the warm-up trains on reviews"):
        pipeline.train(context_of(run, "http://127.0.0.1:9/v1"))


@pytest.mark.parametrize(("offloads", "warned"), [(False, True), (True, False), ("broken", False)])
def test_train_warns_of_a_cpu_build_of_llama_cpp_on_a_gpu(run, monkeypatch, capsys, offloads, warned):
    monkeypatch.setattr(pipeline, "llama_offloads", lambda: offloads)
    monkeypatch.setattr(exports, "check_chat_template", None)
    prepare(run)
    context = context_of(run, "http://127.0.0.1:9/v1")
    context.isolated, context.display = True, ProgressDisplay()
    with pytest.raises(TypeError):
        pipeline.train(context)
    assert ("llama-cpp-python runs on the CPU" in capsys.readouterr().err.replace("\n", " ")) == warned


def test_other_attempts_are_refused_before_they_are_paid_for(run, monkeypatch):
    prepare(run)
    write_rows(run.path("sft/adapter/adapter_model.safetensors"), [])
    context = context_of(run, "http://127.0.0.1:9/v1")
    kept, _ = pipeline.problems_to_attempt(context)
    run.sign("attempts", {**attempts_inputs(context.config, run, kept), "unanswered": 2}, Report("attempts"))
    started = []
    monkeypatch.setattr(exports, "check_chat_template", lambda _: None)
    monkeypatch.setattr(pipeline, "build_corrections", lambda *given: started.append(given))
    monkeypatch.setattr(pipeline, "train_stage", None)
    other = context_of(run, "http://127.0.0.1:9/v1", **{"attempts.samples": 7})
    with pytest.raises(TypeError):  # what comes after the corrections
        pipeline.train(other, "dpo")
    run.sign("warmup", {}, Report("warmup"))
    with raises(UsageError, "trained on attempts with other settings: sampling changed", hint="--fresh"):
        pipeline.train(other, "dpo")
    for allowed, fresh in ((other, True), (context, False)):
        with pytest.raises(TypeError):
            pipeline.train(allowed, "dpo", fresh)
    assert len(started) == 3


@pytest.mark.parametrize("more", [{}, {"attempts.source": "x"}])
def test_the_pairs_of_a_trained_student_wait_for_its_warm_up(run, more):
    problems(4)
    write_rows(run.path("sft/adapter/adapter_model.safetensors"), [])
    context = context_of(run, "http://x", **more)
    (problem, *_) = pipeline.divided_problems(context).stage2
    row = {"id": problem.id, "sample": 0, "trace": attempt("2")}
    write_rows(run.path("attempts.jsonl"), [{**row, "answer": "2", "correct": True}])
    write_rows(run.path("reviews.jsonl"), [{**row, "step": None}])
    pipeline.build_corrections(context, alone=True)
    assert [report.stage for report in context.reports] == ["problems", "corrections"]


def test_imported_attempts_become_decisions_without_any_student(run):
    problems(4)
    work = {"steps": list(STEPS), "answer": "80", "first_error_step": 2}
    write_rows("tries.jsonl", [{"question": f"What is {n} + {n}?", **work} for n in range(1, 5)])
    with TeacherServer(model) as server:
        context = context_of(run, server.url, **{"attempts.source": "tries.jsonl"})
        pipeline.build_corrections(context, alone=True)
    report = context.reports[-1]
    pairs = run.read("pairs.jsonl", Pair)
    assert {(p.step, p.chosen) for p in pairs} == {(1, "</Step1>\n"), (2, CAUSE)}
    assert set(report.dropped) == {"no_student_review"}
    assert {d.reason for d in run.read("dropped.jsonl", Drop)} == {"no_student_review"}


def test_a_student_that_writes_no_steps_is_blamed_not_its_training(run):
    problems(8)
    with TeacherServer(lambda body, nth: say("I would say 80.")) as server:
        own = {"attempts.student": "openai/student", "attempts.api_base": server.url}
        with pytest.raises(DataError, match=r"attempt not readable") as error:
            pipeline.build_corrections(context_of(run, server.url, **own))
    assert "attempts.student" in error.value.hint


def test_too_few_problems_for_a_threshold_load_no_model(tmp_path, run):
    rows = [Problem(id=str(n), question=f"{n} + 1?", answer=str(n + 1)) for n in range(40)]
    run.replace("problems.jsonl", rows)
    adapters = [f"{stage}/adapter/adapter_model.safetensors" for stage in ("sft", "dpo")]
    for name in (*adapters, "export/dpo-q4_k_m.gguf"):
        run.path(name).parent.mkdir(parents=True, exist_ok=True)
        run.path(name).write_bytes(b"no model")
    context = Context(load(None, [f"run={run.folder}"], {}), run, ProgressDisplay(quiet=True))
    exports.fit_review_threshold(context, pipeline.untrained_problems(context))
    assert "too few to fit the threshold" in context.reports[-1].figures["off"]


def test_an_adapter_gguf_is_not_used_for_chat(run, monkeypatch):
    for name in ("sft/adapter/adapter_model.safetensors", "export/sft-lora.gguf"):
        run.path(name).parent.mkdir(parents=True)
        run.path(name).write_bytes(b"GGUF")
    context, made = context_of(run, "http://x"), run.path("export/sft-q4_k_m.gguf")

    def export(_):
        made.write_bytes(b"GGUF")
        return [Report("export-sft", figures={"gguf": str(made)})]

    monkeypatch.setattr(exports, "export", export)
    assert exports.for_chat(context, None, False)[0] == made


def test_evaluation_on_other_problems_keeps_those_of_the_run(run):
    """Two of the evaluated questions were trained on: the evaluation skips them, the run keeps them."""
    problems(220)
    context = context_of(run, "http://unused")
    fit = pipeline.divided_problems(context).fit
    before = {name: run.path(name).read_bytes() for name in ("problems.jsonl", "done/problems.json")}
    problems(21, "measured.jsonl", first=219)
    measured = context_of(run, "http://unused", **{"eval.source": "measured.jsonl"})
    untrained = pipeline.untrained_problems(measured)
    assert untrained == fit
    assert {name: run.path(name).read_bytes() for name in before} == before
    held_out = evaluation.held_out(measured, untrained)
    assert held_out.dropped == {"overlaps_training": 2}
    assert (len(held_out.problems), list(held_out.fitting)) == (19, fit)


def test_new_evaluation_set_pays_for_nothing_and_reads_no_more_problems(run, sclite, monkeypatch):
    """The limit of the first command is not saved; the second pays for no attempt and no correction."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123456")  # which the fixture sclite removes
    problems(60)
    problems(29, "measured.jsonl")
    with TeacherServer(model) as server:
        own = {"attempts.student": "openai/student", "attempts.api_base": server.url}
        chosen = [word for setting in settings(server.url, **own) for word in ("--set", setting)]
        command = ("build-data", "--only", "corrections", "--run", run.folder, *chosen)
        assert sclite(*command, "--limit", "12").code == 0
        asked, names = len(server.requests), ("problems.jsonl", "attempts.jsonl", "reviews.jsonl")
        before = {name: run.path(name).read_bytes() for name in names}
        assert sclite(*command, "--set", "eval.source=measured.jsonl").code == 0
        assert len(server.requests) == asked
    assert before["problems.jsonl"].count(b"\n") == 12
    assert {name: run.path(name).read_bytes() for name in names} == before

"""Files put into the run replace their stage; labelled work is corrected without a student."""

import numpy as np
import pytest
from safetensors.numpy import save

from sclite import config, pipeline
from sclite.context import Context
from sclite.data.pairs import write_pairs
from sclite.errors import DataError, UsageError
from sclite.progress import ProgressDisplay
from sclite.records import Attempt, Pair, Problem, Review, Template
from sclite.run import Report
from sclite.settings import load
from sclite.student.base import Reply
from sclite.trace import CAUSE, Step, Trace, parse, render
from sclite.train.sft import train_sft
from sclite.train.stage import training_inputs
from sclite.train.warmup import train_warmup
from tests.replay import TeacherServer, say, template
from tests.toy import raises

STEPS = ("There are 4 boxes", "They hold 4 * 6 = 24", "24 + 9 = 33", "So 33 in all")
COUNT = 12


def problem(number: int) -> dict:
    return {"question": f"Task {number}: 4 boxes of 6, and 9?", "answer": "33", "solution": "24 + 9 = 33"}


def labelled(number: int) -> dict:
    """Work whose first wrong step is 1, 2, 3 or 4; later steps follow from it."""
    label = number % 4 + 1
    steps = [*STEPS[: label - 1], *(f"{step} or so 9{number}" for step in STEPS[label - 1 :])]
    return {"question": problem(number)["question"], "steps": steps, "first_error_step": label}


def teach(request, nth):
    """Finds the first wrong step, except once, and once ends in a wrong answer."""
    asked = request["messages"][-1]["content"]
    number = int(asked.split("Task ")[1].split(":")[0])
    label = labelled(number)["first_error_step"]
    at = label % 4 + 1 if number == 3 and "could not be used" not in asked else label
    pieces = [f"<Step{n}>{text}\n</Step{n}>\n" for n, text in enumerate(labelled(number)["steps"][:at], 1)]
    noted = f"{CAUSE}No.</Cause>\n<Correction>{STEPS[at - 1]}</Correction>\n</Step"
    pieces[-1] = pieces[-1].replace("</Step", noted)
    pieces += [f"<Step{n}>{text}\n</Step{n}>\n" for n, text in enumerate(STEPS[at:], at + 1)]
    said = 34 if number == 5 else 33
    return say("".join(pieces) + f"<Generalized>Go on.</Generalized>\n<Answer>{said}</Answer>")


class Student:
    """Every third of its corrections is right."""

    def __init__(self):
        self.written = 0

    def generate(self, requests):
        for index, request in enumerate(requests):
            if request.pieces[-1] == CAUSE:
                self.written += 1
                text = f"Hm.</Cause>\n<Correction>own {self.written % 3 == 0}</Correction>\n"
            else:
                said = 33 if "own True" in "".join(request.pieces) else 35
                text = f"<Step9>so {said}\n</Step9>\n<Answer>{said}</Answer>"
            yield Reply(index, text, 8, 30, "stop")


def context_of(run, *given: str) -> Context:
    return Context(load(None, given, {}, own_file=False), run, ProgressDisplay(quiet=True))


@pytest.fixture
def labelled_run(run, write):
    """The configuration of a run with labelled work, and its teacher's requests."""
    source = write("p.jsonl", *map(problem, range(COUNT)))
    mine = write("mine.jsonl", *map(labelled, range(COUNT)))
    with TeacherServer(teach) as server:
        given = (f"problems.source={source}", f"attempts.source={mine}", "teacher.model=openai/replay")
        yield (*given, f"teacher.api_base={server.url}", "teacher.repairs=1"), server.requests


def test_labelled_work_is_corrected_at_its_label_without_a_student(run, labelled_run, grader):
    context = context_of(run, *labelled_run[0])
    report = pipeline.build_corrections(context)
    assert report.dropped == {"wrong_answer": 1}  # task 5; task 3 was retried
    assert report.counts["corrected"] == COUNT - 1  # problems of both stages, not only of the second
    write_pairs(context.config, run, student=Student(), grader=grader)
    tasks = {p.id: int(p.question.split()[1][:-1]) for p in run.read("problems.jsonl", Problem)}
    pairs = run.read("pairs.jsonl", Pair)
    assert {p.kind for p in pairs} == {"decision", "content"}
    for pair in pairs:
        row = labelled(tasks[pair.id])
        work = parse(pair.attempt).trace
        assert [step.text for step in work.steps] == row["steps"]
        assert (pair.step == row["first_error_step"]) is (CAUSE in (pair.chosen, *pair.prefix))
        assert "".join(pair.prefix).removesuffix(CAUSE) == render(work).partition(f"</Step{pair.step}>")[0]
        if pair.kind == "content" and pair.origin == "student":
            assert "own True" in pair.chosen
    for review in run.read("reviews.jsonl", Review):
        assert grader.equal(parse(review.trace).trace.answer, "33") is True


def test_run_continues_if_its_source_files_are_deleted(run, labelled_run, tmp_path):
    given, asked = labelled_run
    made = pipeline.build_corrections(context_of(run, *given))
    before = len(asked)
    for name in ("p.jsonl", "mine.jsonl"):
        (tmp_path / name).unlink()
    context = context_of(run, *given)
    again = pipeline.build_corrections(context)
    assert len(asked) == before
    assert again.skipped
    assert again.counts == made.counts


WORK = Trace((Step("48 + 24 = 72"), Step("72 / 2 = 38")), None, "38")
ATTEMPT = Attempt(id="p0", sample=0, trace=render(WORK), answer="38", correct=False, first_error=2)
NOTED = Trace((WORK.steps[0], Step("72 / 2 = 38", None, "2 * 38 is 76.", "72 / 2 = 36")), None, "36")
NOTES = {"cause": "2 * 38 is 76.", "correction": "72 / 2 = 36"}
REVIEW = Review(id="p0", sample=0, step=2, trace=render(NOTED), **NOTES)
PREFIX = ("<Step1>48 + 24 = 72\n", "</Step1>\n", "<Step2>72 / 2 = 38\n")
OF = {"id": "p0", "sample": 0, "step": 2, "attempt": ATTEMPT.trace}
DECISION = Pair(**OF, kind="decision", prefix=PREFIX, chosen=CAUSE, rejected="</Step2>\n")
CHOSEN = "a</Cause>\n<Correction>b</Correction>\n"
CONTENT = Pair(**OF, kind="content", prefix=(*PREFIX, CAUSE), chosen=CHOSEN, rejected="c")


@pytest.fixture
def filled(run):
    run.replace("problems.jsonl", [Problem(id="p0", question="Half of 48 + 24?", answer="36")])
    run.replace("attempts.jsonl", [ATTEMPT])
    return run


TEMPLATE = Template(id="p0", question="q", answer="1", trace=template("1"))
BUILD = {
    "templates": pipeline.build_templates, "attempts": pipeline.build_corrections,
    "reviews": pipeline.build_corrections, "pairs": pipeline.build_pairs,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rows", "counts"),
    [
        ("templates", [TEMPLATE], {"templates": 1, "imported": 1}),
        ("reviews", [REVIEW], {"corrected": 1, "confirmed": 0, "imported": 1}),
        ("pairs", [DECISION, CONTENT], {"decision": 1, "content": 1, "imported": 2}),
    ],
)
def test_imported_rows_replace_their_stage_and_need_neither_student_nor_teacher(filled, name, rows, counts):
    if name == "templates":  # nor problems
        filled.path("problems.jsonl").unlink()
    filled.replace(f"{name}.jsonl", rows)
    report = BUILD[name](context_of(filled))
    assert (report.skipped, report.counts) == (True, counts)
    assert filled.read(f"{name}.jsonl", type(rows[0])) == rows


def test_imported_attempts_are_corrected_and_unsigned_rows_are_not_imported(filled, grader):
    before = filled.path("attempts.jsonl").read_bytes()
    with TeacherServer(lambda request, nth: say(render(NOTED))) as server:
        context = context_of(filled, "teacher.model=openai/replay", f"teacher.api_base={server.url}")
        report = pipeline.build_corrections(context)
    assert report.counts["corrected"] == 1
    assert filled.path("attempts.jsonl").read_bytes() == before
    filled.path("done/corrections.json").unlink()  # as after a kill before signing
    assert not filled.is_imported("corrections", "reviews.jsonl")
    # As after a kill between writing the rows and signing the stage.
    filled.replace("reviews.jsonl", [REVIEW])
    write_pairs(config.Config(), filled, student=Student(), grader=grader)
    filled.path("done/pairs.json").unlink()
    assert not filled.is_imported("pairs", "pairs.jsonl")


CHANGED = render(NOTED).replace("48 + 24", "24 + 48")


@pytest.mark.parametrize(
    ("name", "row", "change", "said"),
    [
        ("templates", TEMPLATE, {"trace": "<Step1>open"}, "missing closer"),
        ("attempts", ATTEMPT, {"sample": 1, "id": "p9"}, "no problem has this id"),
        ("attempts", ATTEMPT, {}, "sample 0 occurs twice"),
        ("attempts", ATTEMPT, {"sample": 1, "first_error": 3}, "first_error is 3, but it has 2 steps"),
        (
            "attempts",
            ATTEMPT,
            {"sample": 1, "correct": True},
            "first_error is 2, but it has 2 steps, and correct is True",
        ),
        (
            "attempts",
            ATTEMPT,
            {"sample": 1, "first_error": 0},
            "first_error is 0, but it has 2 steps, and correct is False",
        ),
        ("reviews", REVIEW, {"sample": 4}, "attempts.jsonl has no attempt with this id and sample 4"),
        ("reviews", REVIEW, {"step": 1}, "step is 1, but its trace corrects 2"),
        ("reviews", REVIEW, {"step": None}, "step is None, but its trace corrects 2"),
        ("reviews", REVIEW, {"trace": "<Step1>x"}, "missing closer"),
        ("reviews", REVIEW, {"trace": CHANGED}, "step 1 must be exactly as the student wrote it"),
        ("reviews", REVIEW, {"cause": None}, "cause or correction is missing"),
        ("pairs", DECISION, {"id": "p9"}, "no problem has this id"),
        ("pairs", CONTENT, {"sample": 1}, "its attempt has no decision"),
        ("pairs", DECISION, {"step": 3}, "step is 3, but the attempt has 2 steps"),
        ("pairs", DECISION, {"step": 1}, "prefix is not the attempt up to step 1"),
        ("pairs", DECISION, {"prefix": ("".join(PREFIX),)}, "prefix is not the attempt up to step 2"),
        ("pairs", DECISION, {"rejected": "</Step2>"}, "chosen and rejected must be"),
        ("pairs", CONTENT, {"rejected": CHOSEN}, "chosen and rejected are identical"),
        ("pairs", CONTENT, {"chosen": "a</Cause>\nb\n"}, "chosen must be a cause"),
    ],
)
def test_invalid_imported_row_is_reported(filled, name, row, change, said):
    before = {"attempts": [ATTEMPT], "pairs": [DECISION, CONTENT]}.get(name, [])
    filled.replace(f"{name}.jsonl", [*before, row.model_copy(update=change)])
    with raises(DataError, rf"{name}\.jsonl, row {len(before) + 1} \(p\d\): {said}"):
        BUILD[name](context_of(filled))


def test_imported_rows_that_contradict_each_other_are_reported(filled):
    of = {"step": 1, "prefix": PREFIX[:1], "rejected": "</Step1>\n"}
    content = {"step": 1, "prefix": (PREFIX[0], CAUSE)}
    rows = [DECISION.model_copy(update=of), DECISION, CONTENT.model_copy(update=content)]
    filled.replace("pairs.jsonl", rows)
    message = r"row 2 \(p0\): step is 2, after its attempt's content pair at step 1"
    with pytest.raises(DataError, match=message):
        pipeline.build_pairs(context_of(filled))
    filled.replace("attempts.jsonl", [ATTEMPT.model_copy(update={"id": "p9"})])
    filled.replace("reviews.jsonl", [REVIEW.model_copy(update={"id": "p9"})])
    with pytest.raises(DataError, match=r"reviews\.jsonl, row 1 \(p9\): no problem has this id"):
        pipeline.build_corrections(context_of(filled))


WEIGHTS = save({"lora_A": np.zeros((2, 2), np.float32)})


def put_adapter(run) -> None:
    run.path("sft/adapter").mkdir(parents=True)
    run.path("sft/adapter/adapter_model.safetensors").write_bytes(WEIGHTS)
    run.path("sft/adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')


def test_imported_adapter_replaces_sft_if_it_is_a_lora(run):
    put_adapter(run)
    report = train_sft(config.Config(), run)
    assert (report.skipped, report.counts) == (True, {"imported": 1})
    assert run.path("sft/adapter/adapter_model.safetensors").read_bytes() == WEIGHTS
    run.path("sft/adapter/adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(DataError, match="does not describe a LoRA"):
        train_sft(config.Config(), run)
    run.path("sft/adapter/adapter_config.json").unlink()
    with raises(DataError, r"adapter_config\.json", hint="--fresh"):
        train_sft(config.Config(), run)


def test_without_warmup_epochs_the_adapter_is_copied_over_no_trained_one(run):
    put_adapter(run)
    trained = load(None, ["student.model=embedded"], {}, own_file=False)
    with raises(DataError, r"reviews\.jsonl is missing", hint="warmup.num_train_epochs=0"):
        train_warmup(trained, run)
    chosen = load(None, ["student.model=embedded", "warmup.num_train_epochs=0"], {}, own_file=False)
    train_warmup(chosen, run)
    assert run.path("warmup/adapter/adapter_model.safetensors").read_bytes() == WEIGHTS
    assert train_warmup(chosen, run).skipped
    run.path("attempts.jsonl").write_text("other inputs\n")
    assert not train_warmup(chosen, run).skipped  # a copy costs nothing, so it is repeated and not refused
    # what was trained is replaced with fresh only
    run.path("warmup/adapter/adapter_model.safetensors").write_bytes(b"trained")
    run.sign("warmup", training_inputs(trained, run, "warmup"), Report("warmup"))
    with pytest.raises(UsageError, match="warmup was trained with other inputs"):
        train_warmup(chosen, run)
    assert run.path("warmup/adapter/adapter_model.safetensors").read_bytes() == b"trained"
    train_warmup(chosen, run, fresh=True)
    assert run.path("warmup/adapter/adapter_model.safetensors").read_bytes() == WEIGHTS

"""Preference pairs from reviews: a decision pair for every step up to the first wrong one, a content pair for that one.

The student's own corrections are sampled here: a wrong one is rejected, and a right one, if any, is chosen over the
teacher's (METHOD section 4: self-written text is worth more). Who writes them, and how:

- the run's warmed-up adapter, or the GGUF of `attempts.student`: guided, from `<Cause>` at the step the teacher accuses;
- an endpoint: a free review of the whole attempt. Its cause and correction are used if it accuses the same step and
  keeps the steps before it; other reviews are counted by reason;
- nobody, if attempts are imported and there is no student: decision pairs only.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.data.attempts import add_warning, endpoint_cost_usd, external_student_digest
from sclite.data.imported import reject_row
from sclite.grading.extract import answer_of
from sclite.grading.worker import Grader
from sclite.records import Attempt, Drop, Pair, Problem, Review
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.student.base import Student
from sclite.student.self_correction import NO_REPLY, Reviewed, ReviewSettings, correct_steps, review_free
from sclite.trace import CAUSE, Trace, close_piece, open_piece, parse, render, step_pieces, work_of

Key = tuple[str, int]
"""(id, sample) of an attempt."""
Own = tuple[str, bool | None]
"""A student's own cause and correction, as a continuation of `<Cause>`, and whether it leads to the gold answer."""
Progress = Callable[[int, int], None]
"""(done, total)."""
UNREADABLE, UNANSWERED = "student_review_not_readable", "student_did_not_reply"


def pairs_inputs(config: Config, run: Run) -> dict[str, Any]:
    """The inputs that decide the pairs."""
    trained = config.attempts.kind == "trained"
    external = [external_student_digest(config), config.attempts.max_tokens]
    return ({} if trained else {"student": digest(external)}) | {
        "reviews": run.file_digest("reviews.jsonl"),
        "warmup": run.file_digest("warmup/adapter/adapter_model.safetensors") if trained else "",
        "sampling": digest([config.attempts.reviews, config.attempts.temperature, config.seed]),
        "prompts": prompts.digest(
            "student_system", "student_solve", "student_review", folder=config.prompts.folder
        ),
    }


def write_pairs(
    config: Config,
    run: Run,
    *,
    student: Student | None,
    grader: Grader,
    progress: Progress | None = None,
) -> Report:
    """Sample the student's corrections of its wrong attempts and write pairs.jsonl; without a student, decisions only.

    An imported pairs.jsonl replaces the stage, once each row has been checked against the attempt that it holds.
    """
    if run.is_imported("pairs", "pairs.jsonl"):
        return _validate_imported(run)
    inputs, report = pairs_inputs(config, run), Report("pairs")
    if manifest := run.done("pairs", inputs, "pairs.jsonl"):
        return Report.of(manifest)
    with timed(report):
        reviews = run.require("reviews.jsonl", Review, "run `sclite build-data --only corrections` first")
        attempts = {(a.id, a.sample): a for a in run.read("attempts.jsonl", Attempt)}
        problems = {p.id: p for p in run.read("problems.jsonl", Problem)}
        wrong = [review for review in reviews if review.step is not None]
        own: dict[Key, list[Own]] = {}
        reasons: dict[Key, list[str]] = {}  # why other reviews by the student are unusable
        if student is None:
            reasons = {(review.id, review.sample): ["no_student_review"] for review in wrong}
        elif config.attempts.kind == "endpoint":
            own, reasons = sample_free_corrections(
                config, student, wrong, attempts, problems, grader, progress
            )
        else:
            own = sample_guided_corrections(config, student, wrong, attempts, problems, grader, progress)
        pairs, drops = [], []
        for review in reviews:
            key = review.id, review.sample
            work = work_of(attempts[key].trace)
            pairs += decision_pairs(review, work)
            if review.step is not None:
                common = Counter(reasons.get(key, [UNREADABLE])).most_common(1)[0][0]
                made = content_pair(review, work, own.get(key, []), common)
                (drops if isinstance(made, Drop) else pairs).append(made)
        run.mark_started("pairs")
        run.replace("pairs.jsonl", pairs)
        run.replace_drops({"pairs"}, drops)
    report.counts |= Counter(pair.kind for pair in pairs)
    report.counts["own_corrections_chosen"] = sum(pair.origin == "student" for pair in pairs)
    report.dropped = dict(Counter(drop.reason for drop in drops))
    if student is not None:
        add_warning(report, progress, _few_contents_warning(report))
    if config.attempts.kind == "endpoint":
        report.figures["own_reviews"] = dict(Counter(reason for each in reasons.values() for reason in each))
        report.cost_usd = endpoint_cost_usd(run, "pairs")
    unanswered = report.figures.get("own_reviews", {}).get(UNANSWERED, 0)
    # failed calls: this signature matches no inputs, so the next run requests them again
    signed = {**inputs, "unanswered": unanswered} if unanswered else inputs
    run.sign("pairs", signed, report, {"pairs.jsonl": len(pairs)})
    return report


def _few_contents_warning(report: Report) -> str:
    """A warning if most content pairs were dropped, else an empty string."""
    dropped = sum(report.dropped.values())
    contents = dropped + report.counts.get("content", 0)
    if 2 * dropped <= contents:
        return ""
    reason = max(report.dropped, key=report.dropped.__getitem__).replace("_", " ")
    remedy = "raise attempts.reviews, or inspect them with `sclite show drops --kind pairs`"
    return f"{dropped} of {contents} content pairs were dropped, most often: {reason}; {remedy}"


def _validate_imported(run: Run) -> Report:
    """The report of an imported pairs.jsonl, each row checked."""
    known = {problem.id for problem in run.read("problems.jsonl", Problem)}
    pairs, contents = run.read("pairs.jsonl", Pair), set()
    for number, pair in enumerate(pairs, 1):
        if pair.id not in known:
            reject_row(
                run, "pairs.jsonl", number, pair, "no problem has this id", "use the ids of problems.jsonl"
            )
        if rejection := pair_rejection(pair):
            reject_row(run, "pairs.jsonl", number, pair, rejection)
        if pair.kind == "content":
            if (pair.id, pair.sample) in contents:
                reject_row(
                    run, "pairs.jsonl", number, pair, f"a second content pair for sample {pair.sample}"
                )
            contents.add((pair.id, pair.sample))
    decided = {(pair.id, pair.sample) for pair in pairs if pair.kind == "decision"}
    for number, pair in enumerate(pairs, 1):
        if (pair.id, pair.sample) not in decided:
            reject_row(
                run, "pairs.jsonl", number, pair, "its attempt has no decision pair", "add one at its step"
            )
    counts = Counter(pair.kind for pair in pairs)
    return Report("pairs", {**counts, "imported": len(pairs)}, skipped=True)


def pair_rejection(pair: Pair) -> str | None:
    """Why a pair cannot be trained on: a prefix that is not the attempt up to the step, or a malformed side; else None."""
    work = parse(pair.attempt).trace
    if not 1 <= pair.step <= len(work.steps):
        return f"step is {pair.step}, but the attempt has {len(work.steps)} steps"
    content = pair.kind == "content"
    if pair.prefix != (*_prefix(work, pair.step), *([CAUSE] if content else [])):
        return f"prefix is not the attempt up to step {pair.step}, in pieces"
    if not content:
        if {pair.chosen, pair.rejected} == {CAUSE, close_piece(pair.step)}:
            return None
        return f"chosen and rejected must be {CAUSE} and the step's closing tag"
    if pair.chosen == pair.rejected:
        return "chosen and rejected are identical"
    written = parse("".join(pair.prefix) + pair.chosen + close_piece(pair.step)).trace.steps[pair.step - 1]
    if not (written.cause and written.correction and pair.chosen.endswith("</Correction>\n")):
        return "chosen must be a cause, </Cause>, <Correction>, a correction, </Correction> and a newline"
    return None


def sample_guided_corrections(
    config: Config,
    student: Student,
    reviews: Sequence[Review],
    attempts: Mapping[Key, Attempt],
    problems: Mapping[str, Problem],
    grader: Grader,
    progress: Progress | None = None,
) -> dict[Key, list[Own]]:
    """Sample `attempts.reviews` corrections of each wrong step from the student, each continued to its answer."""
    settings = _settings(config)
    cases = [(review, sample) for review in reviews for sample in range(config.attempts.reviews)]
    found: dict[Key, list[Own]] = {}
    size = max(config.student.batch, 1)
    for start in range(0, len(cases), size):
        block = cases[start : start + size]
        inputs = [
            (problems[r.id].question, work_of(attempts[r.id, r.sample].trace), r.step) for r, _ in block
        ]
        corrected = correct_steps(student, inputs, replace(settings, seed=config.seed + start))
        verdicts = grader.equal_many(
            (answer_of(c.text) if c.accused is not None else None, problems[r.id].answer)
            for c, (r, _) in zip(corrected, block, strict=True)
        )
        for (review, _), outcome, right in zip(block, corrected, verdicts, strict=True):
            if outcome.accused is not None:
                found.setdefault((review.id, review.sample), []).append((continuation(outcome), right))
        if progress is not None:
            progress(min(start + size, len(cases)), len(cases))
    return found


def _settings(config: Config) -> ReviewSettings:
    return ReviewSettings(
        max_tokens=config.attempts.max_tokens,
        temperature=config.attempts.temperature,
        prompt_folder=config.prompts.folder,
        seed=config.seed,
    )


def sample_free_corrections(
    config: Config,
    student: Student,
    reviews: Sequence[Review],
    attempts: Mapping[Key, Attempt],
    problems: Mapping[str, Problem],
    grader: Grader,
    progress: Progress | None = None,
) -> tuple[dict[Key, list[Own]], dict[Key, list[str]]]:
    """Sample `attempts.reviews` whole reviews of each wrong attempt from the student.

    Returns, by attempt, the corrections at the step that the teacher accuses, and the reasons why other reviews are
    unusable.
    """
    found: dict[Key, list[Own]] = {}
    reasons: dict[Key, list[str]] = {}
    works = [work_of(attempts[r.id, r.sample].trace) for r in reviews]
    questions, texts = [problems[r.id].question for r in reviews], [render(work) for work in works]
    total = len(reviews) * config.attempts.reviews
    for sample in range(config.attempts.reviews):

        def report_progress(done: int, _: int, before: int = sample * len(reviews)) -> None:
            if progress is not None:
                progress(before + done, total)

        settings = replace(_settings(config), seed=config.seed + sample)
        written = review_free(student, questions, texts, settings, report_progress)
        verdicts = grader.equal_many(
            (answer_of(own.text), problems[r.id].answer) for own, r in zip(written, reviews, strict=True)
        )
        for review, work, own, right in zip(reviews, works, written, verdicts, strict=True):
            reason, key = free_rejection(review, work, own), (review.id, review.sample)
            if reason is None:
                found.setdefault(key, []).append((continuation(own), right))
            else:
                reasons.setdefault(key, []).append(reason)
    return found, reasons


def free_rejection(review: Review, work: Trace, own: Reviewed) -> str | None:
    """Why a student's free review of `work` is unusable at the step that `review` accuses, or None."""
    if own.note:
        return UNANSWERED if own.note == NO_REPLY else UNREADABLE
    if own.accused is None:
        return "student_review_accuses_nothing"
    if own.accused != review.step:
        return "student_review_accuses_another_step"
    if not own.cause or not own.correction:
        return UNREADABLE
    before = parse(own.text).trace.steps[: review.step - 1]
    same = [s.text.split() for s in before] == [s.text.split() for s in work.steps[: review.step - 1]]
    return None if same else "student_review_changes_steps"


def continuation(reviewed: Reviewed | Review) -> str:
    """The text after `<Cause>`: cause and correction, with the newline before the step's closing tag."""
    return f"{reviewed.cause}</Cause>\n<Correction>{reviewed.correction}</Correction>\n"


def decision_pairs(review: Review, work: Trace) -> list[Pair]:
    """One pair for each step that the review judges: accuse the wrong one, close the right ones."""
    last = review.step or len(work.steps)
    return [
        Pair(
            id=review.id,
            sample=review.sample,
            step=step,
            kind="decision",
            attempt=render(work),
            prefix=_prefix(work, step),
            chosen=CAUSE if step == review.step else close_piece(step),
            rejected=close_piece(step) if step == review.step else CAUSE,
        )
        for step in range(1, last + 1)
    ]


def _prefix(work: Trace, step: int) -> tuple[str, ...]:
    return (*step_pieces(work.steps[: step - 1]), open_piece(step, work.steps[step - 1]))


def content_pair(review: Review, work: Trace, own: Sequence[Own], no_review: str = UNREADABLE) -> Pair | Drop:
    """The chosen cause and correction against a wrong one by the student; a drop if it has none.

    `no_review` is the reason if the student has written neither a right nor a wrong one.
    """
    right = [text for text, correct in own if correct is True]
    wrong = [text for text, correct in own if correct is False]
    reason = None
    if not wrong:
        reason = "student_review_already_right" if right else no_review
    elif wrong[0] == (chosen := right[0] if right else continuation(review)):
        reason = "both_sides_alike"
    if reason:
        raw = own[0][0] if own else ""
        return Drop(stage="pairs", id=review.id, sample=review.sample, reason=reason, raw=raw)
    return Pair(
        id=review.id,
        sample=review.sample,
        step=review.step,
        kind="content",
        attempt=render(work),
        prefix=(*_prefix(work, review.step), CAUSE),
        chosen=chosen,
        rejected=wrong[0],
        origin="student" if right else "teacher",
    )

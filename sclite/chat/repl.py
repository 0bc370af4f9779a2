"""Chat with a GGUF in the terminal. With self-correction the model finds and corrects its own wrong step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sclite import console, prompts
from sclite.config import Config
from sclite.console import escape
from sclite.errors import DataError, ScliteError
from sclite.student.base import Request
from sclite.student.llama_cpp.engine import Engine
from sclite.student.llama_cpp.probe import check_gguf
from sclite.student.self_correction import (
    NEVER,
    SAME_RESULT,
    Reviewed,
    ReviewSettings,
    review_free,
    review_guided,
)
from sclite.trace import Step, parse

RIGHT, WRONG, UNREVIEWED = "[green]✓[/]", "[red]✗[/]", "[dim]·[/]"
LEGEND = "✓ no error found, ✗ error found, · not reviewed"


def run_chat(
    path: Path,
    config: Config,
    threshold: float | None,
    *,
    self_correct: bool,
    question: str | None = None,
    example: str = "",
    familiar: Callable[[str], bool] = lambda _: True,
    as_json: bool = False,
) -> bool:
    """Answer one question, or those that are typed or piped in. Returns whether each was answered.

    `example` is for students that know only one kind of problem; a note says when a question is not `familiar`.
    An error or Ctrl-C ends the answer, not the session.
    """
    off = review_off_reason(path, config, threshold, self_correct)
    check_gguf(path)
    with Engine(path, parallel=1, context=config.eval.context) as engine:
        if not as_json:
            where = "on the GPU" if engine.offloaded else "on the CPU"
            console.note(f"[dim]{escape(path.name)}: {escape(engine.description)}, {where}[/]")
        if off and not as_json:
            console.note(f"[dim]{escape(off)}[/]")
        settings = ReviewSettings(
            threshold or 0.0, max(1, config.review.rounds), config.eval.max_tokens, config.prompts.folder
        )

        def answer(text: str) -> Answer:
            known = familiar(text)
            if not known:
                console.note(
                    "[yellow]note:[/] the model was not trained on this kind of problem; expect a wrong answer"
                )
            return _answer(engine, text, config, settings, off, known)

        if question is not None:
            found = answer(question)
            console.print_json(_as_json(found, off if self_correct else "")) if as_json else show(found)
            return True
        interactive, answered = console.is_interactive(), True
        for typed in console.read_inputs(_greeting(example, reviews=not off)):
            try:
                found = answer(typed)
                show(found) if interactive else console.print(escape(" ".join(found.result.split())))
            except ScliteError as error:
                console.error(error)
                answered = False
                if not interactive:
                    console.print()
            except KeyboardInterrupt:
                if not interactive:
                    raise
                console.note("interrupted; use Ctrl-D or /bye to exit")
        return answered or interactive


def review_off_reason(path: Path, config: Config, threshold: float | None, self_correct: bool) -> str:
    """Why answers are not reviewed; "" if they are."""
    if not self_correct:
        return "review is off; turn it on with --self-correct"
    if config.review.mode == "free":
        return ""
    if threshold is None:
        return (
            f"review is off: {path.name} has no fitted threshold. Fit one with `sclite eval PROBLEMS`, or use "
            "--set review.threshold=0 or --set review.mode=free"
        )
    if threshold >= NEVER:
        return f"review is off: no threshold improved the answers of {path.name} in its evaluation"
    return ""


def _greeting(example: str, reviews: bool) -> str:
    legend = f" {LEGEND}." if reviews else ""
    known = f"\nThis model only knows problems like this one:\n{escape(example)}" if example else ""
    return f"Type or paste a problem, /bye to exit.{legend}{known}"


@dataclass(frozen=True)
class Answer:
    """The first answer to a question and its review; `doubt` says why no step is marked right."""

    question: str
    first: str
    review: Reviewed | None
    doubt: str = ""

    @property
    def result(self) -> str:
        """The final answer; the whole text if there is none."""
        text = self.review.text if self.review is not None else self.first
        return parse(text).trace.answer or text


def _answer(
    engine: Engine, question: str, config: Config, settings: ReviewSettings, off: str, familiar: bool
) -> Answer:
    request = Request(prompts.solve_messages(question, config.prompts.folder), max_tokens=settings.max_tokens)
    reply = next(engine.generate([request]))
    if reply.finish == "error":
        longer_context = f"shorten the question, or use --set eval.context={2 * engine.context}"
        hint = longer_context if engine.context < engine.trained_context else "shorten the question"
        raise DataError(f"cannot answer the question: {reply.error}", hint)
    trace, cut = parse(reply.text).trace, reply.finish == "length"
    review, doubt = None, ""
    if not off and trace.steps:
        method = review_guided if config.review.mode == "guided" else review_free
        (review,) = method(engine, [question], [reply.text], settings)
        doubt = "" if review.note == SAME_RESULT else review.note
    if not trace.steps:
        doubt = "the answer has no steps to review"
    elif cut:
        doubt = f"the answer was cut off at {settings.max_tokens} tokens; increase eval.max_tokens"
    elif trace.answer is None:
        doubt = doubt or "the steps reach no answer"
    elif not familiar:
        doubt = doubt or "unfamiliar problem"
    return Answer(question, reply.text, review, doubt)


def _as_json(found: Answer, off: str) -> dict:
    review = found.review
    final = review.text if review is not None else found.first
    row = {"question": found.question, "first": found.first, "answer": parse(final).trace.answer}
    if review is not None:
        row |= {
            "accused": review.accused,
            "cause": review.cause,
            "correction": review.correction,
            "step_scores": [round(score, 4) for score in review.scores],
            "final": final,
        }
    return row | {"note": off or found.doubt or (review.note if review is not None else "")}


def show(found: Answer) -> None:
    """Print the first answer step by step with its marks, then the corrected rest."""
    trace, review = parse(found.first).trace, found.review
    mark = RIGHT if review is not None and not found.doubt else UNREVIEWED
    if not trace.steps:
        console.print(escape(found.first))
    for number, step in enumerate(trace.steps, 1):
        accused = review is not None and number == review.accused
        corrected = step.correction is not None  # corrected while solving, before any review
        _print_step(WRONG if accused or corrected else mark, number, step)
        if corrected:
            _print_correction(step.cause, step.correction)
        if accused:
            _print_correction(review.cause, review.correction)
            break
    if review is not None and review.accused is not None:
        final = parse(review.text).trace
        for number, step in enumerate(final.steps[review.accused :], review.accused + 1):
            _print_step(UNREVIEWED if step.correction is None else WRONG, number, step)
            if step.correction is not None:
                _print_correction(step.cause, step.correction)
        console.print(
            f"\n  answer {escape(trace.answer or '–')} → [bold green]{escape(final.answer or '–')}[/]"
        )
    elif trace.steps:
        console.print(f"\n  answer [bold]{escape(trace.answer or '–')}[/]")
    note = found.doubt or (review.note if review is not None else "")
    if note:
        console.note(f"[yellow]note:[/] {escape(note)}")


def _print_correction(cause: str | None, correction: str | None) -> None:
    if cause:
        console.print(f"      [red]why wrong[/]  {escape(cause)}")
    console.print(f"      [green]corrected[/]  {escape(correction or '')}")


def _print_step(mark: str, number: int, step: Step) -> None:
    console.print(f"  {mark} [dim]{number}[/] {escape(step.text)}")
    if step.key:
        console.print(f"      [cyan]key[/]  {escape(step.key)}")

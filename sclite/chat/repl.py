"""Talking to a GGUF in the terminal: it solves, and with self-correction it looks for its own wrong step and mends it."""

from collections.abc import Callable
from pathlib import Path

from sclite import console, prompts
from sclite.config import Config
from sclite.errors import DataFault, UsageFault
from sclite.student.base import Request
from sclite.student.engine import Engine
from sclite.student.probe import check_gguf
from sclite.student.review import Reviewed, Settings, free, guided
from sclite.trace import Step, parse


def talk(
    path: Path,
    config: Config,
    threshold: float | None,
    *,
    self_correct: bool,
    question: str | None = None,
    example: str = "",
    familiar: Callable[[str], bool] = lambda _: True,
    as_json: bool = False,
) -> None:
    """Answer one question, or those typed until an empty line or the end of input.

    A student that knows one kind of problems alone has an `example` of them; where one is not `familiar`, that is said.

    Raises UsageFault where a guided review is asked for and no threshold is known.
    """
    if self_correct and threshold is None and config.review.mode == "guided":
        raise UsageFault(
            f"no threshold is stored for {path}",
            "run `sclite eval PROBLEMS`, which fits one; or give --set review.threshold=0, or --set review.mode=free",
        )
    check_gguf(path)
    with Engine(path, parallel=1, context=config.eval.context) as engine:
        if not as_json:
            where = "with layers on the GPU" if engine.offloaded else "on the CPU (nothing is offloaded)"
            console.note(f"[dim]{path.name}: {engine.description}, {where}[/]")
        settings = Settings(
            threshold or 0.0, max(1, config.review.rounds), config.eval.max_tokens, config.prompts.folder
        )

        def answer(asked: str) -> None:
            if not familiar(asked):
                console.note(
                    "[yellow]note:[/] it has learned no problems of this kind, length and size; its answer says little"
                )
            _answer(engine, asked, config, settings, self_correct, as_json)

        if question is not None:
            answer(question)
            return
        for typed in console.lines(_invitation(example)):
            answer(typed)


def _invitation(example: str) -> str:
    if not example:
        return "Type a problem; an empty line ends."
    return f"Type a problem; an empty line ends. This student knows only stories with numbers such as these:\n{console.plain(example)}"


def _answer(
    engine: Engine, question: str, config: Config, settings: Settings, self_correct: bool, as_json: bool
) -> None:
    request = Request(prompts.solve_messages(question, config.prompts.folder), max_tokens=settings.max_tokens)
    reply = next(engine.generate([request]))
    if reply.finish == "error":
        raise DataFault(f"the question cannot be answered: {reply.error}", "raise eval.context")
    review = None
    if self_correct:
        review = (guided if config.review.mode == "guided" else free)(
            engine, [question], [reply.text], settings
        )[0]
    if as_json:
        console.print_json(_as_json(question, reply.text, review))
        return
    _show(reply.text, review, settings)


def _as_json(question: str, first: str, review: Reviewed | None) -> dict:
    final = review.text if review is not None else first
    row = {"question": question, "first": first, "answer": parse(final).trace.answer}
    if review is not None:
        row |= {
            "accused": review.accused,
            "cause": review.cause,
            "correction": review.correction,
            "step_scores": [round(score, 4) for score in review.scores],
            "final": final,
            "note": review.note,
        }
    return row


def _show(first: str, review: Reviewed | None, settings: Settings) -> None:
    """The first answer step by step, with its marks; then what the review made of it."""
    trace = parse(first).trace
    if not trace.steps:
        console.say(_plain(first))
        console.note("[yellow]note:[/] this answer has no steps, so there is nothing to review")
        return
    for number, step in enumerate(trace.steps, 1):
        accused = review is not None and number == review.accused
        mended = step.correction is not None  # while it was solving, without being asked
        mark = "[red]✗[/]" if accused or mended else "[green]✓[/]" if review is not None else " "
        _line(mark, number, step)
        if mended:
            _mending(step.cause, step.correction)
        if accused:
            _mending(review.cause, review.correction)
            break
    final = trace
    if review is not None and review.accused is not None:
        final = parse(review.text).trace
        for number, step in enumerate(final.steps[review.accused :], review.accused + 1):
            _line("[green]✓[/]" if step.correction is None else "[red]✗[/]", number, step)
            if step.correction is not None:
                _mending(step.cause, step.correction)
        console.say(
            f"\n  answer {_plain(trace.answer or '–')} → [bold green]{_plain(final.answer or '–')}[/]"
        )
    else:
        console.say(f"\n  answer [bold]{_plain(trace.answer or '–')}[/]")
    if review is not None and review.note:
        console.note(f"[yellow]note:[/] {review.note}; the answer stands")


def _mending(cause: str | None, correction: str | None) -> None:
    if cause:
        console.say(f"      [red]why wrong[/]  {_plain(cause)}")
    console.say(f"      [green]corrected[/]  {_plain(correction or '')}")


def _line(mark: str, number: int, step: Step) -> None:
    console.say(f"  {mark} [dim]{number}[/] {_plain(step.text)}")
    if step.key:
        console.say(f"      [cyan]key[/]  {_plain(step.key)}")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)

"""A conversation with a student: questions, answers, and the commands of the chat."""

import os
import shlex
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sclite import console
from sclite.chat.answer import Answer, Settings, open_gguf, probability, solve_and_review
from sclite.chat.view import AnswerView, showing
from sclite.console import escape
from sclite.errors import DataError, ScliteError, TeacherError, UsageError
from sclite.records import FEEDBACK, Feedback
from sclite.run import Run
from sclite.student.base import Reply, Student
from sclite.student.self_correction import stream
from sclite.trace import corrected, parse

KEYS: dict[str, tuple[type[int] | type[float], int, int]] = {
    "temperature": (float, 0, 2),
    "seed": (int, 0, 2**31 - 1),
    "max_tokens": (int, 1, 1_000_000),
    "threshold": (float, -100, 100),
    "confidence_weight": (float, 0, 1),
    "rounds": (int, 1, 100),
}
"""What /set changes, besides history and mode: type, minimum and maximum."""


@dataclass
class Chat:
    """A conversation with a student. Methods named `do_..` are the commands; their docstrings are shown by /help."""

    student: Student
    context: int  # of a GGUF; 0: a model behind an API
    path: Path
    name: str
    run: Run
    settings: Settings
    review_mode: str = "guided"
    history: bool = False
    left: bool = False
    answers: list[Answer] = field(default_factory=list)

    def ask(self, question: str, quiet: bool = False, temperature: float | None = None) -> Answer:
        """Answer a question and show it. Raises DataError if the student cannot: the question is too long."""
        # bytes that are not UTF-8, which Python reads as lone surrogates, become U+FFFD
        question = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        earlier = [each for each in self.answers if self.history and each.complete]
        settings = self.settings if temperature is None else replace(self.settings, temperature=temperature)
        # one text, as students are trained on single problems
        texts = [*(f"{each.question}\nAnswer: {each.result}" for each in earlier), question]
        asked, view = "\n\n".join(texts), AnswerView()
        try:
            with nullcontext() if quiet else showing(view):
                for event in stream(self.student, solve_and_review(asked, settings), pieces=not quiet):
                    view.feed(event)
        except (KeyboardInterrupt, ScliteError) as error:  # what was written becomes the answer
            finish = "error" if isinstance(error, ScliteError) else "cancelled"
            reply = Reply(0, view.solution, 0, 0, finish)
            self.answers.append(Answer(question, reply, parse(view.solution).trace, asked=asked))
            raise
        assert view.answer is not None  # the last event
        answer = replace(view.answer, question=question, asked=asked)
        self.answers.append(answer)
        if answer.first.finish == "error":
            message = f"cannot answer the question: {answer.first.error}"
            if not self.context:
                raise TeacherError(message, "ask again, or choose another model")
            shorten = "/clear the history" if earlier else "shorten the question"
            hint = f"{shorten}, or --set eval.context={2 * self.context} if the model allows it"
            raise DataError(message, hint)
        if answer.note and not quiet:
            console.note(f"[yellow]note:[/] {escape(answer.note)}")
        if not quiet and console.is_interactive():
            rate = answer.tokens / max(answer.seconds, 1e-3)
            cost = f"{answer.tokens} tokens, {rate:.0f} tokens/s"
            if answer.review is not None:
                cost += f"; review {answer.review_seconds:.1f} s, {answer.review.prefill} prompt tokens"
            if self.context:
                cost += f"; context {answer.first.prompt_tokens + answer.first.tokens}/{self.context}"
            console.note(f"  [dim]{cost}[/]")
        return answer

    def command(self, typed: str) -> None:
        """Run a command such as `/set seed 3`. Raises UsageError for an unknown one."""
        name, _, rest = typed[1:].partition(" ")
        method = getattr(self, f"do_{name.lower()}", None)
        if method is None:
            raise UsageError(f"unknown command: /{name}", "/help lists the commands")
        if (method.__doc__ or "").startswith("FILE: ") and not rest.strip():
            raise UsageError(f"/{name} needs a file name", f"/{name} chat.json")
        method(rest.strip())

    def last(self, complete: bool = False) -> Answer:
        """The last answer. Raises UsageError if there is none, or if it must be `complete` but was stopped or failed."""
        if not self.answers:
            raise UsageError("there is no answer yet", "ask a question first")
        if complete and not self.answers[-1].complete:
            stopped = self.answers[-1].first.finish == "cancelled"
            message = "the last answer was stopped" if stopped else "the last question has no answer"
            raise UsageError(message, "/retry answers it again")
        return self.answers[-1]

    # -- commands --------------------------------------------------------------------------------------------------

    def do_help(self, _: str) -> None:
        """show this list"""
        for name, method in vars(Chat).items():
            if name.startswith("do_"):
                usage, _, about = f": {method.__doc__}".rpartition(": ")
                command = f"/{name.removeprefix('do_')} {usage[2:]}"
                console.print(f"  [cyan]{escape(command):18}[/] {escape(about)}")
        console.print("\nThe settings of /set:")
        self.command("/set")
        console.print(
            "Enter sends, Alt-Enter inserts a new line, Ctrl-C stops an answer, Ctrl-D exits.\n"
            "The percentage is the probability that a step is wrong. ✗ flagged as wrong, → corrected, · not flagged."
        )

    def do_clear(self, _: str) -> None:
        """forget all questions and answers"""
        self.answers.clear()
        console.note("[dim]cleared[/]")

    def do_retry(self, _: str) -> None:
        """answer the last question again, sampled with a new seed"""
        before = self.last()
        self.settings = replace(self.settings, seed=self.settings.seed + 1)
        self.answers.pop()
        try:
            self.ask(before.question, temperature=self.settings.temperature or 0.8)
        except ScliteError:
            self.answers[-1] = before
            raise

    def do_undo(self, _: str) -> None:
        """forget the last question and its answer"""
        console.note(f"[dim]forgot: {escape(self.last().question[:60])}[/]")
        self.answers.pop()

    def do_set(self, rest: str) -> None:
        """KEY VALUE: change a setting, such as temperature 0.5"""
        if not rest:
            values = [f"{key} {round(getattr(self.settings, key), 4):.10g}" for key in KEYS]
            values += [f"mode {self.review_mode}", f"history {'on' if self.history else 'off'}"]
            return console.print(", ".join(values))
        key, _, value = rest.partition(" ")
        value = value.strip()
        hint = f"/set KEY VALUE; the keys are {', '.join(KEYS)}, mode (guided, free), history (on, off)"
        try:
            if key in KEYS:
                kind, least, most = KEYS[key]
                hint = f"{key} is a {'whole ' if kind is int else ''}number from {least} to {most}"
                number = kind(value)
                if not least <= number <= most:  # NaN too
                    raise ValueError
                changed: dict[str, Any] = {key: number}
                self.settings = replace(self.settings, **changed)
            elif key == "history" and value in ("on", "off"):
                self.history = value == "on"
            elif key == "mode" and value in ("guided", "free"):
                if value == "guided" and not self.context:
                    hint = "a model behind an API cannot score its steps: /set mode free"
                    raise ValueError
                self.review_mode = value
                self.settings = replace(self.settings, mode=value)
            else:
                raise ValueError
        except ValueError:
            raise UsageError(f"cannot set {rest}", hint) from None
        console.note(f"[dim]{escape(key)} = {escape(value)}[/]")

    def do_correct(self, rest: str) -> None:
        """on|off: review and correct each answer"""
        if rest not in ("on", "off"):
            raise UsageError("/correct takes on or off", "/correct on")
        self.settings = replace(self.settings, mode=self.review_mode if rest == "on" else "")
        console.note(f"[dim]review is {rest}[/]")

    def do_compare(self, _: str) -> None:
        """show the base model's answer next to the trained one's"""
        answer = self.last(complete=True)
        if not self.context:
            raise UsageError(f"{self.name} is an endpoint: it has no base model here", "chat with a GGUF")
        base = next(iter(sorted(self.path.parent.glob("base-*.gguf"))), None)
        if base is None:
            message = f"there is no base-*.gguf next to {self.path.name}"
            raise UsageError(message, "run `sclite eval PROBLEMS --models base`")
        view, greedy = AnswerView(), replace(self.settings, mode="", temperature=0.0)
        console.print(f"[bold]{escape(base.name)}[/]")
        with open_gguf(base, self.context, 1) as student, showing(view):
            for event in stream(student, solve_and_review(answer.asked or answer.question, greedy)):
                view.feed(event)
        first = answer.trace.answer or answer.first.text
        after = "" if answer.final is answer.trace else f", after review {answer.result}"
        console.print(f"[bold]{escape(self.path.name)}[/]\n  answer {escape(first + after)}")

    def do_why(self, _: str) -> None:
        """show the probability of an error for each step"""
        answer = self.last(complete=True)
        review = answer.review
        if review is None or not review.scores:
            hint = "/set mode guided, then /retry" if self.context else "only the steps of a GGUF have scores"
            hint = answer.note if answer.note and self.settings.mode == "guided" else hint
            raise UsageError("the last answer has no scores", hint)
        rows, limit = [], self.settings.threshold
        steps = corrected(answer.trace).steps
        for number, (step, odds) in enumerate(zip(steps, review.scores, strict=False), 1):
            flag = "flagged" if number == review.accused else "above" if odds > limit else ""
            score = f"{100 * probability(odds):.1f} %", f"{odds:+.2f}"
            rows.append([str(number), escape(step.text), *score, flag])
        title = f"now, steps above log-odds {limit:+.2f} ({100 * probability(limit):.0f} %) are corrected"
        console.print_table(title, ["step", "text", "error", "log-odds", ""], rows, texts=2)

    def do_save(self, rest: str) -> None:
        """FILE: write the conversation as JSON"""
        path = Path(os.path.expanduser(rest))
        path.write_bytes(TypeAdapter(list[Answer]).dump_json(self.answers, indent=1))
        console.note(f"[dim]saved to {escape(str(path))}[/]")

    def do_load(self, rest: str) -> None:
        """FILE: continue a saved conversation"""
        path = Path(os.path.expanduser(rest))
        try:
            self.answers = TypeAdapter(list[Answer]).validate_json(path.read_bytes())
        except ValidationError as error:
            message = f"{path} is not a saved conversation: {error.errors()[0]['msg']}"
            raise DataError(message, "choose a file written by /save") from None
        console.note(f"[dim]loaded {len(self.answers)} answer{'s' * (len(self.answers) != 1)}[/]")

    def do_good(self, _: str) -> None:
        """the answer is right; `build-data` confirms it"""
        self.judge(good=True)

    def do_bad(self, _: str) -> None:
        """the answer is wrong; `build-data` has it corrected"""
        self.judge(good=False)

    def judge(self, good: bool) -> None:
        """Add the last answer and a verdict on it to the feedback of the run."""
        answer = self.last(complete=True)
        row = Feedback(
            question=answer.asked or answer.question,
            attempt=answer.first.text,
            final=answer.text,
            accused=None if answer.review is None else answer.review.accused,
            good=good,
            model=self.name,
        )
        self.run.append(FEEDBACK, [row])
        command = f"sclite build-data --run {shlex.quote(str(self.run.folder))}"
        console.note(f"[dim]saved to {escape(str(self.run.path(FEEDBACK)))}; `{escape(command)}` uses it[/]")

    def do_bye(self, _: str) -> None:
        """leave the chat, like exit, quit and Ctrl-D"""
        self.left = True

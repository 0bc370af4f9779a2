"""Chat in the terminal: the model solves a problem, reviews its own steps and corrects the wrong one."""

import difflib
import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from pydantic import TypeAdapter, ValidationError

from sclite import console, prompts
from sclite.chat.answer import (
    Answer,
    Settings,
    probability,
    solve_and_review,
    with_history,
)
from sclite.chat.view import AnswerView, readable, showing
from sclite.config import Config
from sclite.console import escape
from sclite.errors import DataError, ScliteError, UsageError
from sclite.records import FEEDBACK, Feedback
from sclite.run import Run
from sclite.student.base import Request, Student
from sclite.student.llama_cpp.engine import Engine
from sclite.student.llama_cpp.probe import check_gguf
from sclite.student.self_correction import NEVER, stream
from sclite.trace import parse

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

KEYS: dict[str, tuple[type[int] | type[float], float]] = {
    "temperature": (float, 0.0),
    "seed": (int, 0),
    "max_tokens": (int, 1),
    "threshold": (float, -NEVER),
    "rounds": (int, 1),
}
"""What /set changes, besides history and mode: type and smallest value."""
RETRY_TEMPERATURE = 0.8


def run_chat(
    path: Path,
    config: Config,
    threshold: float | None,
    run: Run,
    *,
    off: str = "",
    endpoint: Student | None = None,
    question: str | None = None,
    example: str = "",
    familiar: Callable[[str], bool] = lambda _: True,
    as_json: bool = False,
) -> bool:
    """Answer one question, or those that are typed or piped in. Returns whether each was answered.

    `off`: why answers are not reviewed, "" if they are. `endpoint`: the student, if it is not the GGUF `path`; then
    `path` is its name, and reviews are free. `example` is for students that know only one kind of problem; a note says
    when a question is not `familiar`. An error or Ctrl-C ends an answer, not the session.
    """
    interactive = question is None and console.is_interactive()
    settings = Settings(
        mode="" if off else "free" if endpoint is not None else config.review.mode,
        threshold=threshold or 0.0,
        rounds=max(1, config.review.rounds),
        max_tokens=config.eval.max_tokens,
        seed=config.seed,
        prompt_folder=config.prompts.folder,
    )
    with ExitStack() as stack:
        student, context, about = endpoint, 0, ""
        if student is None:
            spinner = console.make_console(stderr=True).status(f"loading {path.name}")
            with spinner if interactive else nullcontext():
                check_gguf(path)
                # one sequence keeps the solution while the other one reviews it
                engine = stack.enter_context(Engine(path, parallel=2, context=config.eval.context))
                if interactive:  # the system prompt stays in the cache, so that the first word comes sooner
                    warm = prompts.solve_messages("1", settings.prompt_folder)
                    list(engine.generate([Request(warm, max_tokens=1)]))
            student, context = engine, engine.context
            about = f": {engine.description}, on the {'GPU' if engine.offloaded else 'CPU'}"
        chat = Chat(student, context, path, run, settings, familiar, settings.mode or config.review.mode)
        if off and not as_json:
            console.note(f"[dim]{escape(off)}[/]")
        if question is not None:
            answer = chat.ask(question, quiet=as_json)
            if as_json:
                console.print_json(answer.as_json() | {"note": answer.note or off})
            return True
        if not interactive:
            return answer_lines(chat, as_json)
        console.note(f"[dim]{escape(path.name + about)}[/]")
        if example:
            console.note(f"This model only knows problems like this one:\n{escape(example)}")
        converse(chat)
        return True


def answer_lines(chat: "Chat", as_json: bool) -> bool:
    """Answer each line of standard input with one line; an error gives an empty line, or an object."""
    complete = True
    while line := console.read_line():
        if not line.strip():
            continue
        try:
            answer = chat.ask(line.strip(), quiet=True)
            text = escape(" ".join(answer.result.split()))
            console.print_json_line(answer.as_json()) if as_json else console.print(text)
        except ScliteError as error:
            complete = False
            console.error(error)
            row = {"question": line.strip(), "error": error.message}
            console.print_json_line(row) if as_json else console.print()
    return complete


@dataclass
class Chat:
    """A conversation with a student. Methods named `do_..` are the commands; their docstrings are /help."""

    student: Student
    context: int
    path: Path
    run: Run
    settings: Settings
    familiar: Callable[[str], bool] = lambda _: True
    review_mode: str = "guided"
    history: bool = False
    left: bool = False

    def __post_init__(self) -> None:
        self.answers: list[Answer] = []

    def ask(self, question: str, quiet: bool = False, temperature: float | None = None) -> Answer:
        """Answer a question and show it. Raises DataError if the student cannot, such as a question that is too long."""
        if not self.familiar(question):
            console.note(
                "[yellow]note:[/] the model was not trained on this kind of problem; expect a wrong answer"
            )
        earlier = self.answers if self.history else []
        settings = self.settings if temperature is None else replace(self.settings, temperature=temperature)
        view = AnswerView()
        answer = None
        with nullcontext(lambda: None) if quiet else showing(view) as draw:
            while True:
                script = solve_and_review(with_history(question, earlier), settings)
                for event in stream(self.student, script):
                    view.feed(event)
                    draw()
                    answer = event if isinstance(event, Answer) else answer
                if answer is None or answer.first.finish != "error" or not earlier:
                    break
                earlier = earlier[1:]  # too long: the oldest go first
        if answer is None or answer.first.finish == "error":
            reason = answer.first.error if answer is not None else "no reply"
            hint = "shorten the question"
            if self.context:
                hint += f", or use --set eval.context={2 * self.context}, if the model allows it"
            raise DataError(f"cannot answer the question: {reason}", hint)
        answer = replace(answer, question=question)
        self.answers.append(answer)
        if answer.note and not quiet:
            console.note(f"[yellow]note:[/] {escape(answer.note)}")
        if not quiet and console.is_interactive():
            console.note(f"  [dim]{escape(view.footer(self.context))}[/]")
        return answer

    def command(self, typed: str) -> None:
        """Run a command such as `/set seed 3`. Raises UsageError for an unknown one, with what it may have meant."""
        name, _, rest = typed[1:].partition(" ")
        method = getattr(self, f"do_{name}", None)
        if method is None:
            close = difflib.get_close_matches(name, self.commands(), 1, 0.5)
            hint = f"/{close[0]}" if close else "/help lists the commands"
            raise UsageError(f"there is no command /{name}", hint)
        method(rest.strip())

    @classmethod
    def commands(cls) -> list[str]:
        """The names of all commands."""
        return [name.removeprefix("do_") for name in vars(cls) if name.startswith("do_")]

    def last(self) -> Answer:
        """The last answer. Raises UsageError if there is none."""
        if not self.answers:
            raise UsageError("there is no answer yet", "ask a question first")
        return self.answers[-1]

    # -- commands --------------------------------------------------------------------------------------------------

    def do_help(self, _: str) -> None:
        """show this list"""
        for name in self.commands():
            usage, _, about = f": {getattr(self, f'do_{name}').__doc__}".rpartition(": ")
            console.print(f"  [cyan]{escape(f'/{name} {usage[2:]}'):18}[/] {escape(about)}")
        settings = ", ".join(f"{key} {getattr(self.settings, key)}" for key in KEYS)
        console.print(
            f"\nKeys of /set: {settings}, mode {self.review_mode}, history {'on' if self.history else 'off'}.\n"
            "Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, Ctrl-D leaves.\n"
            "Each question is solved on its own, as the model was trained. After /set history on, earlier questions "
            "and answers come before it.\n"
            "Beside each step is the probability that it is wrong. ✗ found wrong, → corrected, · nothing found: that "
            "does not mean right."
        )

    def do_clear(self, _: str) -> None:
        """forget all questions and answers"""
        self.answers.clear()
        console.note("[dim]cleared[/]")

    def do_retry(self, _: str) -> None:
        """answer the last question again, as another sample"""
        before = self.last()
        self.settings = replace(self.settings, seed=self.settings.seed + 1)
        self.answers.pop()
        try:
            self.ask(before.question, temperature=self.settings.temperature or RETRY_TEMPERATURE)
        except (ScliteError, KeyboardInterrupt):
            self.answers.append(before)
            raise

    def do_undo(self, _: str) -> None:
        """forget the last question and its answer"""
        console.note(f"[dim]forgot: {escape(self.last().question[:60])}[/]")
        self.answers.pop()

    def do_set(self, rest: str) -> None:
        """KEY VALUE: change a setting, such as temperature 0.5"""
        key, _, value = rest.partition(" ")
        value = value.strip()
        try:
            if key in KEYS:
                kind, least = KEYS[key]
                number = kind(value)
                if not least <= number < math.inf:  # NaN too
                    raise ValueError
                changed: dict[str, Any] = {key: number}
                self.settings = replace(self.settings, **changed)
            elif key == "history" and value in ("on", "off"):
                self.history = value == "on"
            elif key == "mode" and value in ("guided", "free"):
                self.review_mode = value
                self.settings = replace(self.settings, mode=value)
            else:
                raise ValueError
        except ValueError:
            keys = ", ".join([*KEYS, "mode (guided, free)", "history (on, off)"])
            raise UsageError(
                f"cannot set {rest or 'nothing'}", f"/set KEY VALUE; the keys are {keys}"
            ) from None
        console.note(f"[dim]{escape(key)} = {escape(value)}[/]")

    def do_correct(self, rest: str) -> None:
        """on|off: review and correct each answer"""
        if rest not in ("on", "off"):
            raise UsageError("say on or off", "/correct on")
        self.settings = replace(self.settings, mode=self.review_mode if rest == "on" else "")
        console.note(f"[dim]review is {rest}[/]")

    def do_compare(self, _: str) -> None:
        """the base model's answer beside the trained one's"""
        answer = self.last()
        base = next(iter(sorted(self.path.parent.glob("base-*.gguf"))), None)
        if base is None:
            raise UsageError(
                f"there is no base-*.gguf beside {self.path.name}", "run `sclite eval PROBLEMS --models base`"
            )
        request = Request(
            prompts.solve_messages(answer.question, self.settings.prompt_folder),
            max_tokens=self.settings.max_tokens,
        )
        with Engine(base, parallel=1, context=self.context) as student:
            reply = next(student.generate([request]))
        console.print(f"[bold]{escape(base.name)}[/]")
        for part in (Answer(answer.question, reply, parse(reply.text).trace), answer):
            view = AnswerView()
            view.feed(replace(part, review=None))
            if part is answer:
                console.print(f"\n[bold]{escape(self.path.name)}[/], before its review")
            with showing(view):
                pass
        if answer.review is not None and answer.review.trace is not None:
            console.print(f"  after review [bold]{escape(readable(answer.result))}[/]")

    def do_why(self, _: str) -> None:
        """the probability of an error of each step"""
        answer = self.last()
        review = answer.review
        if review is None or not review.scores:
            raise UsageError("the last answer has no scores", "/set mode guided, /correct on, then /retry")
        limit = self.settings.threshold
        rows = []
        for number, (step, odds) in enumerate(zip(answer.trace.steps, review.scores, strict=False), 1):
            flag = "flagged" if number == review.accused else "above" if odds > limit else ""
            rows.append(
                [str(number), readable(step.text), f"{100 * probability(odds):.1f} %", f"{odds:+.2f}", flag]
            )
        title = f"corrected from log-odds {limit:+.2f} ({100 * probability(limit):.0f} %)"
        console.print_table(title, ["step", "text", "error", "log-odds", ""], rows, texts=2)
        if review.cause:
            console.print(f"  why: {escape(review.cause)}\n  corrected: {escape(review.correction or '')}")
        if answer.note:
            console.print(f"  {escape(answer.note)}")

    def do_save(self, rest: str) -> None:
        """FILE: write the conversation as JSON"""
        path = file_argument(rest, "/save chat.json")
        try:
            path.write_bytes(TypeAdapter(list[Answer]).dump_json(self.answers, indent=1))
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}", "choose another file") from error
        console.note(f"[dim]saved {len(self.answers)} answers to {escape(str(path))}[/]")

    def do_load(self, rest: str) -> None:
        """FILE: continue a saved conversation"""
        path = file_argument(rest, "/load chat.json")
        try:
            self.answers = TypeAdapter(list[Answer]).validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}", "give a file of /save") from error
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise DataError(f"{path} is not a saved conversation: {reason}", "give a file of /save") from None
        console.note(f"[dim]loaded {len(self.answers)} answers[/]")

    def do_good(self, _: str) -> None:
        """the answer is right; noted in the run's feedback.jsonl"""
        self._judge(True)

    def do_bad(self, _: str) -> None:
        """the answer is wrong; noted in the run's feedback.jsonl"""
        self._judge(False)

    def do_bye(self, _: str) -> None:
        """leave; so do exit, quit and Ctrl-D"""
        self.left = True

    def _judge(self, good: bool) -> None:
        answer = self.last()
        review = answer.review
        row = Feedback(
            question=with_history(answer.question, self.answers[:-1] if self.history else ()),
            attempt=answer.first.text,
            final=answer.text,
            accused=review.accused if review is not None else None,
            good=good,
            model=self.path.name,
        )
        self.run.append(FEEDBACK, [row])
        console.note(f"[dim]noted in {escape(str(self.run.path(FEEDBACK)))}; `sclite build-data` uses it[/]")


def file_argument(rest: str, example: str) -> Path:
    """The file that a command names. Raises UsageError if there is none."""
    with suppress(ValueError):
        words = shlex.split(rest)
        if len(words) == 1:
            return Path(words[0]).expanduser()
    raise UsageError("name one file", example)


# -- typing ------------------------------------------------------------------------------------------------------------


def converse(chat: Chat) -> None:
    """Answer what is typed or pasted until Ctrl-D, /bye, or Ctrl-C twice at an empty prompt.

    A paste is one input, blank lines included.
    """
    console.note("Type or paste a problem; /help lists the commands.")
    session = open_prompt(chat)
    warned = False
    try:
        while not chat.left:
            try:
                typed = session.prompt().strip()
            except KeyboardInterrupt:
                if warned:
                    return
                warned = True
                console.note("[dim]Ctrl-C again, Ctrl-D or /bye leaves.[/]")
                continue
            except EOFError:
                return
            warned = False
            if typed in ("exit", "quit"):
                return
            if typed.startswith('"""'):
                typed = typed.strip('"').strip()
            try:
                if typed.startswith("/"):
                    chat.command(typed)
                elif typed:
                    chat.ask(typed)
            except ScliteError as error:
                console.error(error)
            except KeyboardInterrupt:
                console.note("[dim]stopped[/]")
    finally:  # what was typed ahead must not reach the shell
        import termios

        with suppress(OSError, termios.error):
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)


def open_prompt(chat: Chat) -> "PromptSession[str]":
    """The prompt: Enter sends, Alt-Enter and an open triple quote start a new line, Ctrl-C clears what is typed."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = buffer.text.strip()
        if text.startswith('"""') and (len(text) < 6 or not text.endswith('"""')):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    def toolbar() -> str:
        review = f"review {chat.settings.mode}" if chat.settings.mode else "review off"
        used = ""
        if chat.answers and chat.context:
            first = chat.answers[-1].first
            used = f" · context {100 * (first.prompt_tokens + first.tokens) // chat.context}%"
        turns = f" · {len(chat.answers)} earlier" if chat.history and chat.answers else ""
        return f"{chat.path.name} · {review}{used}{turns} · /help"

    history: FileHistory | InMemoryHistory = InMemoryHistory()
    file = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "sclite" / "chat_history"
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        history = FileHistory(str(file))
    words = [f"/{name}" for name in Chat.commands()]
    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=history,
        completer=WordCompleter(words, sentence=True),
        complete_while_typing=False,
        bottom_toolbar=toolbar,
        output=None
        if os.environ.get("TERM") == "dumb"
        else create_output(cast(TextIO, console.make_console(stderr=True).file)),
    )

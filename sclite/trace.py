"""The thought trace: numbered steps in tags, its canonical text, and a tolerant parser.

Templates, attempts and reviews are all traces; a review has a cause and a correction inside its first wrong step.
`render` writes the canonical form, in which every inner tag and every step's closing tag starts a line, because a
newline followed by `</` or `<C` is a clean token boundary. `parse` reads what models actually write and never raises.
"""

import html
import re
from dataclasses import dataclass, replace

TAG = re.compile(  # possessive (*+): no catastrophic backtracking on a thousand blanks after a <
    r"<[ \t]*+(/?)[ \t]*+(step|key|cause|correction|generali[sz](?:ed|ation)|(?:final[ \t_]?)?answer)[ \t_-]*+(\d{0,4})"
    r'[ \t]*+(?>(?:(?<=[ \t])[\w-]++="[^"<>\n]{0,80}+"[ \t]*+)*):?[ \t]*+>',  # a possessive group fails in Python 3.11.2
    re.I | re.A,
)
"""A tag as models write it; groups: the slash of a closing tag, the name, the number of a step."""
_BOLD = re.compile(rf"\*\*[ \t]*+({TAG.pattern})[ \t]*+\*\*", re.I | re.A)
_DECORATION = re.compile(r"(?>(?:[\s*`_#>\u200b-]|\\n|(?:Step ?)?\d{1,4}[.:]?|</?\w{1,30} ?/?>)*)", re.I)
"""Harmless between tags: Markdown, list numbers, wrapper tags, line ends that were escaped twice."""
_WIDE = str.maketrans("＜＞／", "<>/")
_NAMES = r"(?:think|thinking|thoughts?|reasoning|analysis|scratchpad|(?:seed|budget):think(?:ing)?)"
THOUGHT = re.compile(rf"\s*+(?:<{_NAMES}\b[^>\n]{{0,80}}>|\[think\])", re.I)
_THOUGHT_END = re.compile(rf"(?:</{_NAMES}>|\[/think\])\s*", re.I)
_CHANNEL = re.compile(r"<\|channel\|>(\w+)[^<]{0,80}<\|message\|>")
_SPECIAL = re.compile(r"<\|(?:end|return|start|call)\|>")
INNER = ("key", "cause", "correction")
OUTER = ("generalized", "answer")


@dataclass(frozen=True)
class Step:
    """One step: its text, an optional reminder, and in a review the cause of its error and its correction."""

    text: str
    key: str | None = None
    cause: str | None = None
    correction: str | None = None

    def __post_init__(self):
        _check("step", self.text, empty=True)
        for name in INNER:
            _check(name, getattr(self, name))


@dataclass(frozen=True)
class Trace:
    """Steps (numbered from 1), how to solve problems of this kind, and the final answer."""

    steps: tuple[Step, ...] = ()
    generalized: str | None = None
    answer: str | None = None

    def __post_init__(self):
        _check("generalized", self.generalized)
        _check("answer", self.answer)


@dataclass(frozen=True)
class Issue:
    """A formal error in a text and its place; `parse` lists the names."""

    name: str
    place: str

    def __str__(self) -> str:
        return f"{self.name.replace('_', ' ')} at {self.place}"


@dataclass(frozen=True)
class ParsedTrace:
    """A text, the trace that could be read from it, and the issues found, in order of their place."""

    text: str
    trace: Trace
    issues: tuple[Issue, ...]

    @property
    def work(self) -> Trace:
        """The trace with the student's own corrections applied."""
        return corrected(self.trace)


def _check(name: str, text: str | None, empty: bool = False) -> None:
    if text is None:
        return
    # searching for "<" is a hundred times faster than for a tag, and most texts have neither
    if text != text.strip() or ("<" in text and TAG.search(text)) or not (text or empty):
        raise ValueError(f"the text of a {name} must be stripped, free of tags and not empty: {text[:60]!r}")


def clean(text: str) -> str:
    """Turn any text into a valid text of a step: remove tags and strip."""
    if "<" not in text:
        return text.strip()
    text = TAG.sub(" ", text)
    if TAG.search(text):  # removing a tag has joined its neighbours into another
        text = text.replace("<", " ")
    return text.strip()


def without_thoughts(text: str) -> str:
    """The text after a model's thoughts: `<think>..</think>` and variants, a bare `</think>`, gpt-oss' channels."""
    start = thoughts_end(text)
    said = text[start:]
    return _SPECIAL.split(said, maxsplit=1)[0] if start and _CHANNEL.search(text) else said


def thoughts_end(text: str) -> int:
    """The offset at which the thoughts at the beginning of a text end; 0 if it has none, or they never end."""
    if (tag := TAG.search(text)) and not text[: tag.start()].strip():
        return 0  # the text begins with a trace
    if "|channel|" in text:
        return next((channel.end() for channel in _CHANNEL.finditer(text) if channel[1] == "final"), 0)
    position = 0
    while (opened := THOUGHT.match(text, position)) and (closed := _THOUGHT_END.search(text, opened.end())):
        position = closed.end()
    bare = text.rfind("</think>") if not position else -1  # the chat template has opened it
    return bare + len("</think>") if bare >= 0 and text[bare + len("</think>") :].strip() else position


def open_piece(number: int, step: Step) -> str:
    """`<Stepn>text`, the key and a newline: step n up to the decision point."""
    key = f"\n<Key>{step.key}</Key>" if step.key else ""
    return f"<Step{number}>{step.text}{key}\n"


def close_piece(number: int) -> str:
    """`</Stepn>` and a newline."""
    return f"</Step{number}>\n"


def step_pieces(steps: tuple[Step, ...]) -> list[str]:
    """The steps, without notes, as alternating open and close pieces, each tokenized separately."""
    return [piece for n, step in enumerate(steps, 1) for piece in (open_piece(n, step), close_piece(n))]


CAUSE = "<Cause>"
"""The piece that marks a step as wrong, in place of the step's closing tag."""
OTHER_TAGS = ("<Key>", "<Correction>")
"""Other tags that a model may write in that place."""


def all_pieces(trace: Trace) -> list[str]:
    """A whole trace in the pieces in which it is tokenized; joined they equal `render(trace)`.

    A review's notes are two pieces before the step's closing tag: `<Cause>`, and the rest.
    """
    pieces = []
    for number, step in enumerate(trace.steps, 1):
        pieces.append(open_piece(number, step))
        notes = ""
        if step.cause is not None:
            pieces.append(CAUSE)
            notes = f"{step.cause}</Cause>\n"
        if step.correction is not None:
            notes += f"<Correction>{step.correction}</Correction>\n"
        pieces += [notes, close_piece(number)] if notes else [close_piece(number)]
    outer = (("Generalized", trace.generalized), ("Answer", trace.answer))
    if ending := [f"<{tag}>{text}</{tag}>" for tag, text in outer if text is not None]:
        pieces.append("\n".join(ending))
    elif pieces:
        pieces[-1] = pieces[-1].removesuffix("\n")
    return pieces


def render(trace: Trace) -> str:
    """The canonical text; `parse(render(t)).trace == t` for every trace."""
    return "".join(all_pieces(trace))


class _Reader:
    """Builds the trace from the tags of a text in order, recording issues instead of raising."""

    def __init__(self) -> None:
        self.steps: list[dict[str, list[str]]] = []  # for each tag, the pieces of its text
        self.outer: dict[str, list[str]] = {}
        self.open: list[str] = []  # step and maybe a tag inside it; or generalized; or answer
        self.number = 0  # the number of the open step
        self.issues: list[Issue] = []

    def report(self, name: str, offset: int) -> None:
        where = self.open[0] if self.open else "the top level"
        where = f"step {len(self.steps)}" if where == "step" else where
        self.issues.append(Issue(name, f"{where}, character {offset}"))

    def add_text(self, text: str, offset: int) -> None:
        """Add the text between two tags to the open one."""
        if self.open:
            slots = self.steps[-1] if self.open[0] == "step" else self.outer
            pieces = slots.setdefault(self.open[-1], [])
            if stripped := text.strip():
                pieces.append(stripped)
        elif not _DECORATION.fullmatch(text) and self.steps and "answer" not in self.outer:
            # a greeting before the first step or after the answer is harmless
            self.report("text_between_tags", offset)

    def close(self, depth: int, offset: int) -> None:
        """Close all open tags but the outermost `depth`; each lacks a closing tag."""
        while len(self.open) > depth:
            self.report("missing_closer", offset)
            self.open.pop()

    def add_tag(self, name: str, closing: bool, number: int | None, offset: int) -> None:
        """A tag of a step, which has a number, of a note inside one, or generalized or answer."""
        if name == "step":
            if self.open and self.open[0] != "step":
                self.close(0, offset)
            if self.open and not closing and number == self.number and self.steps[-1].get("step"):
                self.report("opener_as_closer", offset)
                closing = True
            if closing:
                if not self.open:
                    self.report("stray_closer", offset)
                elif number not in (None, self.number):
                    self.report("wrong_step_number", offset)
                self.close(1, offset)
                self.open.clear()
                return
            self.close(0, offset)
            if self.outer:
                self.report("step_after_the_end", offset)
            self.steps.append({})
            self.open = ["step"]
            self.number = number if number is not None else len(self.steps)
            if self.number != len(self.steps):
                self.report("wrong_step_number", offset)
            return
        depth, slots = 0, self.outer
        if name in INNER:
            if self.open[:1] != ["step"]:
                self.report("stray_closer" if closing else "tag_outside_a_step", offset)
                return
            depth, slots = 1, self.steps[-1]
        is_open = self.open[-1:] == [name]
        if is_open and not closing and slots.get(name):
            self.report("opener_as_closer", offset)
            closing = True
        if closing:
            if not is_open:
                self.report("stray_closer", offset)
            if is_open or name in INNER:
                del self.open[depth:]
            return
        self.close(depth, offset)
        if name in slots:
            self.report(f"second_{name}", offset)
            if name in OUTER:
                slots[name] = []  # the last one counts
        if name == "generalized" and "answer" in slots:
            self.report("generalized_after_the_answer", offset)
        self.open.append(name)


def parse(text: str) -> ParsedTrace:
    """Parse any text as a trace, in linear time and without raising.

    Case, blanks, attributes and a colon inside a tag are ignored, and so are bold markers around it, text before the
    first step or after the answer, and a leading think block. Issues: missing_closer, opener_as_closer, stray_closer,
    wrong_step_number, step_after_the_end, tag_outside_a_step, second_key, second_cause, second_correction,
    second_generalized, second_answer, generalized_after_the_answer, text_between_tags, empty_step, no_steps, no_answer.
    """
    given = text
    if ("&lt;" in text or "＜" in text) and not TAG.search(text):
        text = html.unescape(text).translate(_WIDE)
    if "**" in text:
        text = _BOLD.sub(r"\1", text)
    reader, position, end = _Reader(), thoughts_end(text), len(text)
    for match in TAG.finditer(text, position):
        reader.add_text(text[position : match.start()], position)
        position = match.end()
        number = int(match[3]) if match[3] else None
        reader.add_tag(tag_name(match[2]), bool(match[1]), number, match.start())
    reader.add_text(text[position:], position)
    reader.close(0, end)

    def joined(slots: dict[str, list[str]], name: str) -> str:
        return clean(" ".join(slots.get(name, [])))

    steps = [Step(joined(s, "step"), *(joined(s, name) or None for name in INNER)) for s in reader.steps]
    trace = Trace(tuple(steps), *(joined(reader.outer, name) or None for name in OUTER))
    issues = reader.issues + [Issue("empty_step", f"step {n}") for n, s in enumerate(steps, 1) if not s.text]
    if not steps:
        issues.append(Issue("no_steps", "the top level"))
    if trace.answer is None:
        issues.append(Issue("no_answer", f"the end, character {end}"))
    return ParsedTrace(given, trace, tuple(issues))


def tag_name(written: str) -> str:
    """The canonical name of a tag: Generalization is generalized, FinalAnswer is answer."""
    written = written.lower()
    if written.startswith("generali"):
        return "generalized"
    return "answer" if written.endswith("answer") else written


def corrected_steps(trace: Trace) -> set[int]:
    """The numbers, from 1, of the steps with a correction."""
    return {n for n, step in enumerate(trace.steps, 1) if step.correction is not None}


def first_corrected(trace: Trace) -> int | None:
    """The number (from 1) of the first step with a cause or a correction; None if there is none."""
    noted = (n for n, step in enumerate(trace.steps, 1) if (step.cause, step.correction) != (None, None))
    return next(noted, None)


def corrected(trace: Trace) -> Trace:
    """A review as a plain solution: corrections replace the wrong steps, causes are removed."""
    return replace(trace, steps=tuple(Step(step.correction or step.text, step.key) for step in trace.steps))

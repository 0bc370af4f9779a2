"""The prompts: one Jinja file each, shipped in the wheel; `prompts.folder` in the configuration may replace any of them."""

import hashlib
from functools import cache
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sclite.errors import DataError

NAMES = (
    "student_system",
    "student_solve",
    "student_review",
    "teacher_system",
    "teacher_template",
    "teacher_correction",
    "inspector_template",
    "inspector_correction",
)

_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(RecursionError, MemoryError),
)
"""What a template of a user's own may raise: a line of it is Python's in all but name."""


def shipped_folder() -> Path:
    """Where the prompt files lie: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "_prompts"
    return installed if installed.is_dir() else here.parent / "prompts"


@cache
def _source(name: str, folder: str) -> str:
    if folder and not Path(folder).is_dir():
        raise DataError(
            f"prompts.folder: {folder} is not a folder", "check the path; --set prompts.folder= unsets it"
        )
    own = Path(folder) / f"{name}.txt"
    path = own if folder and own.is_file() else shipped_folder() / f"{name}.txt"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "save it as UTF-8 text" if path == own else "reinstall sclite"
        raise DataError(f"the prompt {path} cannot be read: {error}", hint) from error


@cache
def _template(name: str, folder: str) -> jinja2.Template:
    # prompts.folder may come with a run that somebody else made: its templates must not reach the system
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    try:
        return environment.from_string(_source(name, folder))
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the prompt {name}.txt, line {error.lineno}: {error.message}", f"fix it in {folder}"
        ) from error


def render(name: str, folder: str = "", **values: str) -> str:
    """The text of a prompt with its values filled in, ends stripped."""
    try:
        return _template(name, folder).render(**values).strip()
    except jinja2.UndefinedError as error:
        raise DataError(
            f"the prompt {name}.txt asks for a value that does not exist: {error}",
            f"it may use {', '.join(values) or 'no values'}",
        ) from error
    except _TEMPLATE_ERRORS as error:
        raise DataError(
            f"the prompt {name}.txt cannot be rendered: {error}", f"fix it in {folder}"
        ) from error


@cache
def _system(name: str, folder: str) -> str:
    """A prompt without values, filled in once for all chats."""
    return render(name, folder)


def digest(*names: str, folder: str = "") -> str:
    """A short hash of the named prompts' sources; it changes when any word of them does."""
    return hashlib.sha256("\0".join(_source(name, folder) for name in names).encode()).hexdigest()[:16]


def solve_messages(question: str, folder: str = "") -> tuple[dict[str, str], ...]:
    """What the student sees when it solves: in training, sampling, evaluation and chat alike."""
    return _chat(_system("student_system", folder), render("student_solve", folder, question=question))


def review_messages(question: str, work: str, folder: str = "") -> tuple[dict[str, str], ...]:
    """What the student sees when it reviews `work`, without any gold solution."""
    return _chat(
        _system("student_system", folder), render("student_review", folder, question=question, work=work)
    )


def template_messages(question: str, solution: str, answer: str, error: str = "", folder: str = ""):
    """What the teacher sees when it turns a gold solution into a thought trace."""
    text = render(
        "teacher_template", folder, question=question, solution=solution, answer=answer, error=error
    )
    return _chat(_system("teacher_system", folder), text)


def correction_messages(
    question: str, solution: str, answer: str, work: str, error: str = "", folder: str = ""
):
    """What the teacher sees when it corrects an attempt; the work stands last."""
    values = {"question": question, "solution": solution, "answer": answer, "work": work, "error": error}
    return _chat(_system("teacher_system", folder), render("teacher_correction", folder, **values))


def inspection_messages(name: str, question: str, solution: str, answer: str, work: str, folder: str = ""):
    """What the inspector sees: `name` is inspector_template or inspector_correction; the work stands last."""
    values = {"question": question, "solution": solution, "answer": answer, "work": work}
    return _chat(_system("teacher_system", folder), render(name, folder, **values))


def _chat(system: str, user: str) -> tuple[dict[str, str], ...]:
    return ({"role": "system", "content": system}, {"role": "user", "content": user})

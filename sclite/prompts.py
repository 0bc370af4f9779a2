"""The prompts: one Jinja file each, shipped in the wheel; files in `prompts.folder` replace them one by one."""

import hashlib
from functools import cache
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sclite.errors import DataError

Messages = tuple[dict[str, str], ...]
"""Chat messages, each {"role": ..., "content": ...}."""

_HERE = Path(__file__).resolve().parent
SHIPPED = _HERE / "_prompts" if (_HERE / "_prompts").is_dir() else _HERE.parent / "prompts"
"""The folder of the shipped prompts: inside the installed package, or next to it in a checkout."""


@cache
def _environment(folder: str) -> ImmutableSandboxedEnvironment:
    if folder and not Path(folder).is_dir():
        hint = "check the path; --set prompts.folder= unsets it"
        raise DataError(f"prompts.folder: {folder} is not a folder", hint)
    # prompts.folder may come from somebody else's run: its templates must not reach the system
    loader = jinja2.FileSystemLoader([folder, SHIPPED] if folder else SHIPPED)
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return ImmutableSandboxedEnvironment(loader=loader, **options)


def _render(name: str, folder: str, values: dict[str, str]) -> str:
    try:
        return _environment(folder).get_template(f"{name}.txt").render(**values).strip()
    # a user's template may raise any of these: its expressions are Python in all but name
    except (
        *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
        *(RecursionError, MemoryError),
    ) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        hint = f"fix it in {folder}; the available values are: {', '.join(values) or 'none'}"
        raise DataError(f"the prompt {name}.txt{line}: {error}", hint) from error


def digest_prompts(*names: str, folder: str = "") -> str:
    """A short hash of the sources of these prompts; it changes with every edit."""
    environment, sources = _environment(folder), []
    assert environment.loader is not None
    for name in names:
        try:
            sources.append(environment.loader.get_source(environment, f"{name}.txt")[0])
        except UnicodeDecodeError as error:
            message = f"the prompt {name}.txt in {folder} cannot be read: {error}"
            raise DataError(message, "save it as UTF-8 text") from error
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def _messages(name: str, folder: str, **values: str) -> Messages:
    system = {"student": "student_system", "baseline": ""}.get(name.partition("_")[0], "teacher_system")
    user: dict[str, str] = {"role": "user", "content": _render(name, folder, values)}
    if not system:
        return (user,)
    text = _render(system, folder, {})
    if not text:  # some chat templates insert a system prompt of their own then
        raise DataError(f"the prompt {system}.txt is empty", "write at least one sentence")
    return ({"role": "system", "content": text}, user)


def solve_messages(question: str, folder: str = "", name: str = "student_solve") -> Messages:
    """The chat in which the student solves a problem, the same in training, sampling, evaluation and chat.

    The `name` baseline_solve is for a model that was not trained here: no system prompt, no format of the steps.
    """
    return _messages(name, folder, question=question)


def review_messages(question: str, work: str, folder: str = "") -> Messages:
    """The chat in which the student reviews `work`, without any gold solution."""
    return _messages("student_review", folder, question=question, work=work)


def teacher_messages(
    question: str, solution: str, answer: str, error: str = "", *, work: str | None = None, folder: str = ""
) -> Messages:
    """The chat in which the teacher rewrites a gold solution as a trace or, given its `work`, corrects an attempt.

    `error` says why the teacher's last reply failed.
    """
    values = {"question": question, "solution": solution, "answer": answer, "error": error}
    if work is None:
        return _messages("teacher_template", folder, **values)
    return _messages("teacher_correction", folder, **values, work=work)


def inspection_messages(
    name: str, question: str, solution: str, answer: str, work: str, folder: str = ""
) -> Messages:
    """The chat of the inspector: `name` is inspector_template or inspector_correction; the work comes last."""
    return _messages(name, folder, question=question, solution=solution, answer=answer, work=work)

"""Settings: defaults < run.toml < sclite.toml < environment < command line."""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sclite.config import Config, keys
from sclite.errors import DataError, UsageError

FILE = "sclite.toml"
RUN_FILE = "run.toml"
PREFIX = "SCLITE_"
NOT_SAVED: dict[str, Any] = {
    "run": True,
    "problems": {"limit"},
    "eval": {"limit"},
    "export": {"ollama", "push"},
}
"""What is not saved to run.toml (pydantic's `exclude`): the run's path, and options that apply to one command only."""
OF_SOURCE = ("subset", "split", "question_column", "answer_column", "solution_column", "id_column")
"""Settings of `problems` and `eval` that describe a source: those in run.toml do not apply to another source."""


def load(
    path: Path | None = None,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    own_file: bool = True,
) -> Config:
    """Load the configuration: `defaults` < run.toml of the run < file < environment < `settings` (KEY=VALUE).

    `path` must exist; without it ./sclite.toml is read if present, unless `own_file` is False. An empty value on any
    level resets a key to its default. Raises UsageError with all unknown keys and invalid values in one message, and
    DataError if run.toml is damaged.
    """
    path = path or (Path(FILE) if own_file and Path(FILE).is_file() else None)
    file = _read_file(path) if path is not None else {}
    variables: dict[str, Any] = {}
    flat = [key.replace(".", "_") for key in keys()]
    for name, value in sorted((os.environ if environment is None else environment).items()):
        parts = name.removeprefix(PREFIX).lower().split("__")
        # SCLITE_LLAMA_CPP is not a setting; SCLITE_SFT_LEARNING_RATE is a mistyped one
        if name.startswith(PREFIX) and (len(parts) > 1 or difflib.get_close_matches(parts[0], flat, 1, 0.75)):
            _assign(variables, parts, value)
    typed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            hint = "write --set KEY=VALUE, for example --set sft.num_train_epochs=2; --set KEY= restores the default"
            raise UsageError(f"--set {setting}: no value", hint)
        _assign(typed, key.strip().split("."), value.strip())
    layers = (file, variables, typed)
    named = [str(layer["run"]) for layer in layers if "run" in layer] or [""]
    folder = named[-1] or (defaults or {}).get("run") or Config.model_fields["run"].default
    saved = Path(os.path.expanduser(folder)) / RUN_FILE
    tree: dict[str, Any] = {}
    if saved.is_file():
        advice = f"fix it, or remove {saved}: settings then come only from {FILE} and the command line"
        try:
            tree = _read_file(saved)
            Config.model_validate(tree)
        except UsageError as failure:
            raise DataError(failure.message, advice) from failure
        except ValidationError as error:
            message, hint = _explain(error)
            raise DataError(f"{saved}: {message}", f"{hint} {advice}") from None
    for section in tree.keys() & {"problems", "eval"}:
        sections = (layer.get(section) for layer in layers)
        sources = [part["source"] for part in sections if isinstance(part, Mapping) and part.get("source")]
        known = tree[section].get("source")
        # absolute, since a file has several names; as text, since other types are rejected below
        names = {os.path.abspath(os.path.expanduser(str(name))) for name in (*sources[-1:], known)}
        if sources and known and len(names) > 1:
            tree[section] = {k: v for k, v in tree[section].items() if k not in OF_SOURCE}
    for layer in layers:
        _merge(tree, layer)
    try:
        return Config.model_validate(_merge(_merge({}, defaults or {}), tree))
    except ValidationError as error:
        raise UsageError(*_explain(error)) from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a BOM
    except OSError as error:
        message = f"cannot read the configuration {path}: {error.strerror}"
        raise UsageError(message, "check --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", "fix this line; the file is TOML") from error


def _merge(tree: dict[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Merge `other` into `tree` and return it; an empty value removes a known key."""
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.setdefault(key, {}), dict):
            _merge(tree[key], value, f"{prefix}{key}.")
        elif value == "" and prefix + key in keys():
            tree.pop(key, None)
        else:
            tree[key] = value
    return tree


def _assign(tree: dict[str, Any], path: list[str], text: str) -> None:
    """Set the key at `path`; `text` is read as a TOML value, else as a string."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    field = keys().get(".".join(path))
    if field is not None and field.annotation is str and not isinstance(value, str):
        value = text  # a model called 7, a run called 2026-11-23
    for key in path[:-1]:
        branch = tree.get(key)
        tree[key] = branch if isinstance(branch, dict) else {}
        tree = tree[key]
    tree[path[-1]] = value


PLAIN = {
    "tuple_type": 'write a list, such as ["a", "b"] or [0.5, 1.5]',
    "missing": "a value is missing",
    "model_type": "this is a section: set one of its keys",
}
"""Messages instead of pydantic's, by its type of error."""


def _explain(error: ValidationError) -> tuple[str, str]:
    """(message, hint): all errors in one message, and a suggestion for each unknown key, which it names if there are several."""
    known, lines, meanings = keys(), [], []
    hints: dict[str, list[str]] = {}  # suggestion -> unknown keys
    names = {key: key for key in known}  # also by part of the name: `sft.epochs` means sft.num_train_epochs
    for key in known:
        section, _, name = key.rpartition(".")
        for part in (name, *name.split("_")):
            names.setdefault(part, key)
            names.setdefault(f"{section}.{part}", key)
    for failure in error.errors():
        key = ".".join(str(part) for part in failure["loc"])
        if failure["type"] == "extra_forbidden":
            inner = failure["input"] if isinstance(failure["input"], dict) else {}
            for unknown in [f"{key}.{name}" for name in inner] or [key]:
                lines.append(f"unknown key {unknown}")
                section = unknown.partition(".")[0]
                valid = [key.removeprefix(f"{section}.") for key in known if key.startswith(f"{section}.")]
                # part of a name easily resembles another: `sft.lr` and the `per` of sft.per_device_train_batch_size
                like = difflib.get_close_matches
                near = like(unknown, names, 1, 0.8) or like(unknown, known, 1, 0.75)
                hint = f"{section} has {', '.join(valid)}." if valid else ""
                hint = f"did you mean {names[near[0]]}?" if near else hint
                if re.search(r"api_?key|secret|password|(?<!max)_token$|\btoken$", unknown):
                    hint = "keys and tokens come from the environment, such as OPENAI_API_KEY"
                hints.setdefault(hint, []).append(unknown)
        else:
            # a rejected value in teacher.extra may be a secret
            shown = key if key == "teacher.extra" else f"{key} = {failure['input']!r}"
            message = PLAIN.get(failure["type"]) or f"{failure['msg'][0].lower()}{failure['msg'][1:]}"
            lines.append(f"{shown}: {message}")
            if (field := known.get(key)) is not None and field.description:
                meanings.append(f"{key}: {field.description}.")
    hints.pop("", None)
    several = len(lines) > 1
    advice = [f"{', '.join(unknown)}: {hint}" if several else hint for hint, unknown in hints.items()]
    advice = advice or ["`sclite init` writes a file that explains every key"]
    return "configuration: " + "; ".join(lines), " ".join([*meanings, *advice])

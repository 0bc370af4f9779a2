"""Settings: defaults < run.toml < sclite.toml < environment < command line."""

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sclite.config import SECRET_PARAMETER, Config, keys
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
        try:
            tree = _read_file(saved)
            _validate(tree, str(saved))
        except UsageError as failure:
            remove = f"or remove {saved}: settings then come only from {FILE} and the command line"
            raise DataError(failure.message, f"{failure.hint}, {remove}") from failure
    for layer in layers:
        _merge(tree, layer)
    return _validate(_merge(_merge({}, defaults or {}), tree))


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


def _validate(tree: dict[str, Any], place: str = "configuration") -> Config:
    """The configuration; UsageError has all errors in one message, with a suggestion or an explanation for each key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        failures = error.errors()
    known, lines, hints = keys(), list[str](), list[str]()
    names = {key: key for key in known}  # also by part of the name: `sft.epochs` means sft.num_train_epochs
    for key in known:
        section, _, name = key.rpartition(".")
        for part in (name, *name.split("_")):
            names.setdefault(part, key)
            names.setdefault(f"{section}.{part}", key)
    for failure in failures:
        key = ".".join(str(part) for part in failure["loc"])
        if failure["type"] == "extra_forbidden":
            inner = failure["input"] if isinstance(failure["input"], dict) else {}
            for unknown in [f"{key}.{name}" for name in inner] or [key]:
                lines.append(f"unknown key {unknown}")
                # part of a name easily resembles another: `sft.lr` and the `per` of sft.per_device_train_batch_size
                like = difflib.get_close_matches
                near = like(unknown, names, 1, 0.8) or like(unknown, known, 1, 0.75)
                if SECRET_PARAMETER.search(unknown.rpartition(".")[2]):
                    hints.append("keys and tokens come from the environment, such as OPENAI_API_KEY")
                elif near:
                    hints.append(f"did you mean {names[near[0]]}?")
        else:
            # a rejected value in teacher.extra may be a secret
            shown = key if key == "teacher.extra" else f"{key} = {failure['input']!r}"
            message = f"{failure['msg'][0].lower()}{failure['msg'][1:]}"
            if failure["type"] == "tuple_type":
                message = 'write a list, such as ["a", "b"] or [0.5, 1.5]'
            lines.append(f"{shown}: {message}")
            if (field := known.get(key)) is not None:
                hints.append(f"{key}: {field.description}.")
    hints = hints or ["`sclite init` writes a file that explains every key"]
    raise UsageError(f"{place}: {'; '.join(lines)}", " ".join(dict.fromkeys(hints)))

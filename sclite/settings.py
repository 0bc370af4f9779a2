"""Where settings come from: defaults < run.toml < sclite.toml < environment < command line; every error at once."""

import difflib
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sclite.config import Config, keys
from sclite.errors import DataError, UsageError

FILE = "sclite.toml"
RUN_FILE = "run.toml"
PREFIX = "SCLITE_"
FORGOTTEN: dict[str, Any] = {"run": True, "problems": {"limit"}, "eval": {"limit"}, "export": {"ollama"}}
"""What run.toml never holds, as pydantic's `exclude`: the run's own place, and what filters or asks for one command."""


def load(
    path: Path | None = None,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    own_file: bool = True,
) -> Config:
    """Read the configuration: `defaults` < run.toml of the run < file < environment < `settings`.

    `path` is a file that must exist; without it ./sclite.toml is read where there is one, unless `own_file` is False.
    `settings` are KEY=VALUE from the command line. An empty value, wherever it stands, puts a key back to its default.
    Raises UsageFault with every unknown key and wrong value in one message, DataFault where run.toml is damaged.
    """
    file = _read_file(path) if path is not None or own_file else {}
    variables = _variables(os.environ if environment is None else environment)
    typed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(
                f"--set {setting}: no value",
                "write --set KEY=VALUE, for example --set sft.num_train_epochs=2; --set KEY= goes back to the default",
            )
        _put(typed, key.strip().split("."), value.strip())
    layers = (file, variables, typed)
    named = [str(layer["run"]) for layer in (defaults or {}, *layers) if layer.get("run")]
    tree = _remembered(Path(named[-1] if named else Config.model_fields["run"].default) / RUN_FILE)
    for layer in layers:
        _merge(tree, layer)
    try:
        return Config.model_validate(_merge(_merge({}, defaults or {}), tree))
    except ValidationError as error:
        raise UsageError(*_explain(error)) from None


def _variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings among the environment variables: SCLITE_SEED, SCLITE_SFT__LEARNING_RATE.

    A variable without `__` that is no key is somebody else's, unless it is spelled like one (SCLITE_SFT_LEARNING_RATE).
    """
    found: dict[str, Any] = {}
    flat = [key.replace(".", "_") for key in keys()]
    for name, value in sorted(environment.items()):
        path = name.removeprefix(PREFIX).lower().split("__")
        ours = len(path) > 1 or difflib.get_close_matches(path[0], flat, 1, 0.75)
        if name.startswith(PREFIX) and ours:
            _put(found, path, value)
    return found


def _remembered(path: Path) -> dict[str, Any]:
    """What earlier commands have noted in run.toml; raises DataFault, with a way on, where it cannot be used."""
    if not path.is_file():
        return {}
    remedy = f"fix it, or remove {path}: settings then come from {FILE} and the command line alone"
    try:
        tree = _read_file(path)
        Config.model_validate(tree)
    except UsageError as failure:
        raise DataError(failure.message, remedy) from failure
    except ValidationError as error:
        message, hint = _explain(error)
        raise DataError(f"{path}: {message}", f"{hint} {remedy}") from None
    return tree


def _read_file(path: Path | None) -> dict[str, Any]:
    found = path or Path(FILE)
    if path is None and not found.is_file():
        return {}
    try:
        return tomllib.loads(found.read_text(encoding="utf-8-sig"))  # editors on Windows write a BOM
    except OSError as error:
        raise UsageError(
            f"the configuration {found} cannot be read: {error.strerror}", "check --config"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{found}: {error}", "fix this line; the file is TOML") from error


def _merge(tree: dict[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Put `other` over `tree`, which is returned; an empty value takes a known key out."""
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.setdefault(key, {}), dict):
            _merge(tree[key], value, f"{prefix}{key}.")
        elif value == "" and prefix + key in keys():
            tree.pop(key, None)
        else:
            tree[key] = value
    return tree


def _put(tree: dict[str, Any], path: list[str], text: str) -> None:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if not isinstance(value, str) and _is_text(path):
        value = text
    for key in path[:-1]:
        branch = tree.get(key)
        tree[key] = branch if isinstance(branch, dict) else {}
        tree = tree[key]
    tree[path[-1]] = value


def _is_text(path: list[str]) -> bool:
    """Whether the key wants a string, so that a model called 7 or a run called 2026-11-23 stays one."""
    model: Any = Config
    for key in path:
        field = getattr(model, "model_fields", {}).get(key)
        if field is None:
            return False
        model = field.annotation
    return model is str


def _nearest(key: str, known: Sequence[str], sections: Collection[str]) -> str:
    """What an unknown key may have meant; of a known section else what it has."""
    section, _, name = key.partition(".")
    if section not in sections:
        for like in difflib.get_close_matches(section, sections, 1, 0.6):
            return f"did you mean {like}.{name}?" if f"{like}.{name}" in known else f"did you mean {like}?"
    own = [k.partition(".")[2] for k in known if k.startswith(f"{section}.")]
    near = [f"{section}.{n}" for n in difflib.get_close_matches(name, own, 1, 0.6)] if name and own else []
    last = key.split(".")[-1]
    for candidates in ([f"{section}.{n}" for n in own], known):  # `epochs` means num_train_epochs
        words = {k: k.split(".")[-1].split("_") for k in candidates}
        near = (
            near
            or [k for k, parts in words.items() if k.endswith(f".{last}") or {last, f"{last}s"} & set(parts)][
                :1
            ]
        )
    if not near and not own:
        near = difflib.get_close_matches(key, [*known, *sections], 1, 0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"{section} has {', '.join(own)}." if own else ""


def _explain(error: ValidationError) -> tuple[str, str]:
    """One message for all faults, and the nearest known key for each unknown one."""
    known, lines, hints, meanings = keys(), [], [], []
    sections = {key.split(".")[0] for key in known}
    for failure in error.errors():
        key = ".".join(str(part) for part in failure["loc"])
        if failure["type"] == "extra_forbidden":
            inner = list(failure["input"]) if isinstance(failure["input"], dict) else []
            for each in [f"{key}.{name}" for name in inner] or [key]:
                lines.append(f"unknown key {each}")
                hints.append(_nearest(each, list(known), sections))
        else:
            lines.append(f"{key} = {failure['input']!r}: {failure['msg'][0].lower()}{failure['msg'][1:]}")
            if (field := known.get(key)) is not None and field.description:
                meanings.append(f"{key}: {field.description}.")
    remedy = [hint for hint in hints if hint] or ["`sclite init` writes every key with its meaning"]
    return "configuration: " + "; ".join(lines), " ".join([*meanings, *remedy])

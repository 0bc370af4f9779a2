"""Where settings come from: defaults < run.toml < sclite.toml < environment < `--set`, all faults told at once."""

import difflib
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sclite.config import Config, keys
from sclite.errors import UsageFault

FILE = "sclite.toml"
RUN_FILE = "run.toml"
PREFIX = "SCLITE_"
MOVED = {"dpo.rank": "sft.rank", "dpo.alpha": "sft.alpha"}
"""Keys of older versions that decided nothing, and those that do: DPO trains the adapter of SFT on."""


def load(
    path: Path | None = None,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    own_file: bool = True,
) -> Config:
    """Read the configuration: `defaults` < run.toml of the run < file < environment < `settings`.

    `path` is a file that must exist; without it sclite.toml of the working folder is read where there is one, unless
    `own_file` is False. `settings` are KEY=VALUE from the command line. run.toml is what an earlier command on the same
    run has resolved. Raises UsageFault with every unknown key and wrong value in one message.
    """
    given: dict[str, Any] = {}
    if path is not None or own_file:
        _merge(given, _read_file(path))
    for key, value in sorted((os.environ if environment is None else environment).items()):
        if key.startswith(PREFIX) and "__" in key:
            _put(given, key.removeprefix(PREFIX).lower().split("__"), value)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageFault(
                f"--set {setting}: no value", "write --set KEY=VALUE, for example --set sft.epochs=2"
            )
        _put(given, key.strip().split("."), value.strip())
    tree: dict[str, Any] = {}
    _merge(tree, defaults or {})
    run = given.get("run") or tree.get("run") or Config.model_fields["run"].default
    remembered = Path(str(run)) / RUN_FILE
    if remembered.is_file():
        _merge(tree, _read_file(remembered))
        _forget_moved(tree)
    _merge(tree, given)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageFault(*_explain(error)) from None


def _read_file(path: Path | None) -> dict[str, Any]:
    found = path or Path(FILE)
    if path is None and not found.is_file():
        return {}
    try:
        return tomllib.loads(found.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageFault(
            f"the configuration {found} cannot be read: {error.strerror}", "check --config"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageFault(f"{found}: {error}", "mend this line; the file is TOML") from error


def _forget_moved(tree: dict[str, Any]) -> None:
    """Take out what an older version has written into a run by itself."""
    for key in MOVED:
        section, _, name = key.partition(".")
        if isinstance(tree.get(section), dict):
            tree[section].pop(name, None)


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping):
            branch = tree.setdefault(key, {})
            if isinstance(branch, dict):
                _merge(branch, value)
                continue
        tree[key] = value


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
    near = near or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    if not near and not own:
        near = difflib.get_close_matches(key, [*known, *sections], 1, 0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"{section} has {', '.join(own)}." if own else ""


def _explain(error: ValidationError) -> tuple[str, str]:
    """One message for all faults, and the nearest known key for each unknown one."""
    known, lines, hints, meanings = keys(), [], [], []
    sections = {key.split(".")[0] for key in known}
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            inner = list(fault["input"]) if isinstance(fault["input"], dict) else []
            for each in [f"{key}.{name}" for name in inner] or [key]:
                lines.append(f"unknown key {each}")
                moved = (
                    f"did you mean {MOVED[each]}? DPO trains the adapter of SFT on" if each in MOVED else ""
                )
                hints.append(moved or _nearest(each, list(known), sections))
        else:
            lines.append(f"{key} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
            if (field := known.get(key)) is not None and field.description:
                meanings.append(f"{key}: {field.description}.")
    remedy = [hint for hint in hints if hint] or ["`sclite init` writes every key with its meaning"]
    return "configuration: " + "; ".join(lines), " ".join([*meanings, *remedy])

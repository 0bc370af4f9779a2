"""Damage to the files of a finished run, and the commands that must survive it."""

import json
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from sclite.__main__ import main

CODES = {0, 1, 2, 3, 4, 5, 6}
"""The documented exit codes of a command that is not interrupted."""
COMMANDS = (
    ("status",),
    ("show",),
    ("show", "drops", "--limit", "3"),
    ("build-data", "--yes"),
    ("train", "--plan"),
    ("export",),
    ("eval", "held-out.jsonl", "--models", "dpo"),
    ("chat", "--self-correct", "What is 3 + 4?"),
)


def _truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) or 1)]


def _flip_bits(data: bytes, draw: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 5, 50)) if found else 0):
        found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


def _load(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _change_shape(data: bytes, draw: random.Random) -> bytes:
    """JSON with the wrong structure: one value, or the whole document, has another type."""
    lines = data.splitlines() or [b"{}"]
    at = draw.randrange(len(lines))
    odd = draw.choice((None, [], {}, "x", -1, 1e400, [[[]]], {"a": {}}))
    whole = _load(data)
    target = whole if whole is not None else _load(lines[at])
    if isinstance(target, dict) and target and draw.random() < 0.8:
        target[draw.choice(sorted(target))] = odd
    else:
        target = odd
    text = json.dumps(target).encode()
    return text if whole is not None else b"\n".join([*lines[:at], text, *lines[at + 1 :], b""])


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": _truncate,
    "bits flipped": _flip_bits,
    "another shape": _change_shape,
    "empty": lambda data, draw: b"",
    "binary": lambda data, draw: draw.randbytes(draw.choice((1, 100, 5000))),
}


def damages(run: Path, count: int, seed: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """(file, kind of damage, damaged bytes) for the files of a finished run; each file once before any is repeated."""
    draw = random.Random(seed)
    files = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and p.name != ".lock")
    texts = [name for name in files if not name.endswith((".gguf", ".safetensors", ".md", ".html"))]
    order: list[str] = []
    for _ in range(count):
        order = order or draw.sample(files, len(files)) + draw.sample(texts, len(texts))
        name, kind = order.pop(), draw.choice(sorted(KINDS))
        yield name, kind, KINDS[kind]((run / name).read_bytes(), draw)


def paid_keys(run: Path) -> set[str]:
    """The keys of all replies in the ledger."""
    with closing(sqlite3.connect(run / "ledger.sqlite")) as ledger:
        return {key for (key,) in ledger.execute("SELECT key FROM requests WHERE state = 'replied'")}


def survive(
    whole: Path, name: str, content: bytes, folder: Path, capsys, monkeypatch, commands=COMMANDS
) -> list[str]:
    """Damage a copy of the run in `folder` and run the commands on it; returns the problems, one line each."""
    run, wrong = folder / "run", []
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    (run / name).write_bytes(content)
    keys = paid_keys(whole)
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["sclite", *command, "--run", str(run)])
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        except Exception as error:  # noqa: BLE001 - this is what the test looks for
            code = f"{type(error).__name__}: {error}"
        said = "".join(capsys.readouterr())
        if code not in CODES or "Traceback" in said or "unexpected " in said:
            wrong.append(f"{' '.join(command)}: {code}: {said[-300:]}")
    if name != "ledger.sqlite" and not keys <= paid_keys(run):
        wrong.append("paid replies are lost")
    return wrong

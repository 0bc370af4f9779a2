"""Write configuration.md from sclite.config: python docs/configuration.py"""

import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/configuration.md"
INTRODUCTION = """\
# Configuration

<!-- Generated from sclite/config.py by docs/configuration.py. Do not edit. -->

`sclite init` writes a `sclite.toml` with every setting, its default and a comment. A setting is taken from the first of these
places that has it:

1. the command line: `--set sft.num_train_epochs=2`, or an option such as `--limit`
2. the environment: `SCLITE_SEED=1`, `SCLITE_SFT__NUM_TRAIN_EPOCHS=2`, `SCLITE_RUN=DIR`
3. `sclite.toml` in the current folder, or the file given by `--config`
4. `run.toml` in the run folder, where `build-data`, `train`, `run` and `quickstart` save their settings
5. the default

An empty value resets a setting to its default: `--set teacher.price=` discards a price that the run has saved. `run.toml`
never contains `problems.limit`, `eval.limit`, `export.ollama` or `export.push`: `sclite build-data problems.jsonl` without `--limit` uses all
rows again. `eval`, `export` and `chat` save nothing. The quickstart has its own defaults and reads a `sclite.toml` only if
passed with `--config`.

Unknown keys and invalid values are errors, all reported at once, with the nearest known key. API keys are
read from the environment only (`OPENAI_API_KEY`, ...) and are never written to disk. In a path, a leading `~`
is the home folder.
"""


def page() -> str:
    """The whole page: one table per section of the configuration."""
    sys.path.insert(0, str(ROOT))
    from sclite.config import Config, Section

    settings: dict[str, list[str]] = {"": []}
    titles = {"": "Top level"}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            titles[name] = f"[{name}]"
            fields = field.annotation.model_fields
            settings[name] = [
                field.annotation.__doc__ or "",
                *(row(key, each) for key, each in fields.items()),
            ]
        else:
            settings[""].append(row(name, field))
    blocks = [INTRODUCTION]
    for name, (*rows,) in settings.items():
        about = [rows.pop(0).strip(), ""] if name else []
        blocks.append(
            "\n".join(
                [f"## {titles[name]}", "", *about, "| key | default | meaning |", "|---|---|---|", *rows, ""]
            )
        )
    return "\n".join(blocks)


def row(key: str, field: Any) -> str:
    """One row of a table. A setting without a default is `not set`; choices are listed before the description."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    meaning = "; ".join(
        filter(None, [" or ".join(f"`{choice}`" for choice in choices), field.description or ""])
    )
    return f"| `{key}` | {default(field.default)} | {meaning.replace('|', '&#124;').replace('<', '&lt;')} |"


def default(value: Any) -> str:
    """A default value, as written in TOML."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, dict):
        return f"`{json.dumps(value)}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

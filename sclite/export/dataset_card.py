"""The data card of an export: where the rows come from, what was left out, what they cost, and how each trainer reads them.

Every figure is read from the run; what the run does not know is said to be unknown.
"""

import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sclite import __version__, prompts
from sclite.config import Config
from sclite.records import Drop
from sclite.run import Run
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger

UNKNOWN = "unknown"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_HUB_NAME = re.compile(r"[\w.-]*\w/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.csv)(?<!\.parquet)")
_STUDENT = ("student_system", "student_solve", "student_review")
_WHAT = {
    "templates": "`messages`: the student's prompt and the teacher's thought trace",
    "reviews": "`messages`: work to check and its whole review, for the warm-up before DPO (sclite's own also shows wrong "
    "work in the solving form, with loss on the ends of its steps alone, which no chat row can hold)",
    "pairs": "`prompt`, `chosen`, `rejected` as text, and `prefix`",
    "step_dpo": "the pairs with the fields of Math-Step-DPO-10K",
}


def text(config: Config, run: Run, counts: dict[str, int]) -> str:
    """The card as Markdown with the front matter of a Hugging Face data set; `counts` are rows by file."""
    parts = [_front(counts), _introduction(), _files(counts), _origin(config, run), _left_out(run)]
    return "\n".join([*parts, _cost(run), _reading(counts), _limits(counts)])


def source_name(config: Config) -> str:
    """The problems' source as a card may show it."""
    if config.teacher.embedded:
        return "the arithmetic stories that sclite's quickstart makes"
    return _public(config.problems.source)


def _public(name: str) -> str:
    """A hub name as it is; of a file or folder the last part alone, because a path says more than a card should."""
    return name if _HUB_NAME.fullmatch(name) else Path(name).name or UNKNOWN


def _front(counts: dict[str, int]) -> str:
    size = next((name for limit, name in _SIZES if sum(counts.values()) < limit), "n>1M")
    lines = ["---", "license: unknown # TO FILL IN before this is published: see Licence below"]
    lines += [
        "task_categories:",
        "- text-generation",
        "tags:",
        "- sclite",
        "- reasoning",
        "- self-correction",
    ]
    lines += ["- dpo"] if counts["pairs"] else []
    lines += ["size_categories:", f"- {size}", "configs:"]
    for name, count in counts.items():
        lines += [f"- config_name: {name}", f"  data_files: {name}.jsonl"] if count else []
    return "\n".join([*lines, "---", ""])


def _introduction() -> str:
    return f"""# Thought templates and corrections

Written by `sclite export --format data` (sclite {__version__}), after SuperCorrect (arXiv 2410.09008): a teacher turns worked
solutions into numbered steps, and corrects a student's own wrong attempts at their first wrong step.

## Licence

> **TO FILL IN.** The rows hold problems of the source and text of the models that are named below. Which licence that allows
> is for you to find out: read the terms of all of them, then set `license` in the first lines of this file.
"""


def _files(counts: dict[str, int]) -> str:
    rows = [f"| {name}.jsonl | {count} | {_WHAT[name]} |" for name, count in counts.items() if count]
    return "\n".join(["## Files", "", "| file | rows | fields |", "|---|---|---|", *rows, ""])


def _origin(config: Config, run: Run) -> str:
    signed = {stage: (run.finished(stage) or {}) for stage in ("templates", "corrections")}
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "litellm"))
    subset = " ".join(part for part in (config.problems.subset, config.problems.split) if part)
    lines = [
        "## Where the rows come from",
        "",
        f"- Problems: {source_name(config)}{f' ({subset})' if '/' in source_name(config) else ''}",
        f"- Teacher: {config.teacher.model or UNKNOWN}",
        f"- Student: {_public(config.student.model)}{_attempts(config)}",
        *(
            f"- Teacher's prompts for {stage}: {manifest.get('inputs', {}).get('prompts', UNKNOWN)}"
            for stage, manifest in signed.items()
        ),
        *(f"- Prompt {name}: {prompts.digest(name, folder=config.prompts.folder)}" for name in _STUDENT),
        *(
            f"- Stage {stage}: sclite {manifest['sclite']}"
            for stage, manifest in signed.items()
            if "sclite" in manifest
        ),
        f"- Written with: {packages}",
        "",
        "Prompts are named by the first 16 digits of a SHA-256. Rows that were brought along, and not made by this run, have",
        "unknown prompts.",
        "",
    ]
    return "\n".join(lines)


def _attempts(config: Config) -> str:
    """Where the attempts that were corrected come from, where that is not the student itself."""
    source, student = config.attempts.source, config.attempts.student
    if source:
        return f"; the attempts that were corrected were brought along ({_public(source)})"
    return f"; the attempts that were corrected are those of {_public(student)}" if student else ""


def _left_out(run: Run) -> str:
    drops = Counter((drop.stage, drop.reason) for drop in run.read("dropped.jsonl", Drop))
    lines = ["## What was left out", ""]
    if not drops:
        return "\n".join([*lines, "Nothing.", ""])
    table = [
        f"| {stage} | {reason.replace('_', ' ')} | {n} |" for (stage, reason), n in sorted(drops.items())
    ]
    return "\n".join([*lines, "| stage | reason | rows |", "|---|---|---|", *table, ""])


def _cost(run: Run) -> str:
    lines = ["## What the teacher cost", ""]
    if not run.path(LEDGER).is_file():
        return "\n".join([*lines, "Unknown: the run has no ledger.", ""])
    with Ledger(run.path(LEDGER)) as ledger:
        totals: dict[str, Any] = ledger.totals()
    lines += [
        f"- {totals['requests']} requests, {totals['prompt_tokens']} tokens read, {totals['completion_tokens']} written",
        f"- {totals['cost_usd']:.6f} USD"
        + (f"; {totals['unpriced']} requests have no known price" if totals["unpriced"] else ""),
        "",
    ]
    return "\n".join(lines)


def _reading(counts: dict[str, int]) -> str:
    lines = ["## How trainers read it", "", "```python", "from datasets import load_dataset", ""]
    lines += [
        f'{name} = load_dataset(".", "{name}", split="train")' for name, count in counts.items() if count
    ]
    lines += ["```", ""]
    if counts["templates"] or counts["reviews"]:
        lines += [
            "Chats: TRL's SFTTrainer reads `messages` (set `assistant_only_loss`, else the prompt is trained too), Axolotl as",
            "`type: chat_template`, LLaMA-Factory as `sclite_templates` and `sclite_reviews` of dataset_info.json.",
            "",
        ]
    return "\n".join(lines) + ("\n" + _PAIRS if counts["pairs"] else "")


_PAIRS = """Pairs: sclite trains a pair on `prompt` without loss, then on `chosen` against `rejected` without an end token, because both stop
in mid-answer, and it tokenises each piece of `prefix` and each completion by itself. What others make of the same rows:

| trainer | end token after the completion | tokenised |
|---|---|---|
| LLaMA-Factory, `sclite_pairs` with `template: empty` | no | prompt and completion apart |
| Step-DPO's own trainer on step_dpo.jsonl | no | joined; its prompt formats know neither this system prompt nor the review |
| TRL's DPOTrainer | **yes, on both sides** | joined, and with a second start token where the tokenizer adds one |
| Axolotl, `rl: dpo` (TRL inside) | **yes, on both sides** | joined |

A student trained with the end token is taught to stop after `<Cause>`. sclite's examples/trl-multi-gpu and examples/axolotl hold a
subclass of a few lines that leaves it away. `prompt` is text in the chat template of the student named above: for a student
with another template export again with `--set student.model=NAME` (from a copy of the run, which remembers its settings).
There is no conversational form of the pairs: the assistant's prefix would be closed, and a second turn opened after it.
"""


def _limits(counts: dict[str, int]) -> str:
    lines = ["## What to know before training", ""]
    lines += (
        [
            "- Pairs hold one student's own mistakes; for another student they are off-policy, and help less.",
            "- DPO by itself does not teach a student to accuse a step that it gives no probability: train on reviews first.",
            "- Decision pairs (`kind`) weigh one tag against another, content pairs two texts: keep both.",
        ]
        if counts["pairs"]
        else []
    )
    lines += [
        "- A template that this run asked for has the gold answer; the steps before it were checked by no one."
    ]
    return "\n".join([*lines, ""])

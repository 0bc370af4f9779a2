"""The cards that the Hub shows: of an exported dataset and of an exported model.

Every figure comes from the run; what the run does not record is written as unknown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sclite import __version__, prompts
from sclite.config import Config
from sclite.records import Drop, Review, from_feedback
from sclite.run import Run
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger

UNKNOWN = "unknown"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_HUB_ID = re.compile(r"[\w.-]*\w/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.csv)(?<!\.parquet)")
_LICENSE = """> **TO FILL IN.** Check the terms of {}, then export again with
> `--set export.license=NAME`."""
_FIELDS = {
    "templates": "`messages`: the student's prompt and the teacher's thought template",
    "reviews": "`messages`: an attempt and its review, for the warm-up before DPO (sclite's own warm-up also shows wrong "
    "attempts in the solving format, with loss on the end of each step only, which a chat row cannot express)",
    "pairs": "`prompt`, `chosen`, `rejected` as text, and `prefix`",
    "step_dpo": "the pairs with the fields of Math-Step-DPO-10K",
}


def source_name(config: Config) -> str:
    """The source of the problems as a card may show it."""
    if config.teacher.embedded:
        return "the arithmetic word problems of sclite's quickstart"
    return _public_name(config.problems.source)


def _public_name(name: str) -> str:
    """A Hub ID unchanged; only the last part of a path, because a path may reveal more than a card should."""
    return name if _HUB_ID.fullmatch(name) else Path(name).name or UNKNOWN


def _front_matter(config: Config, **data: Any) -> str:
    from huggingface_hub import CardData

    return f"---\n{CardData(license=config.export.license or UNKNOWN, **data).to_yaml()}\n---\n"


def _sources(config: Config, student: str = "") -> list[str]:
    subset = " ".join(part for part in (config.problems.subset, config.problems.split) if part)
    source = source_name(config)
    return [
        f"- Problems: {source}{f' ({subset})' if '/' in source else ''}",
        f"- Teacher: {config.teacher.model or UNKNOWN}",
        f"- Student: {_public_name(config.student.model)}{student}",
    ]


def build_dataset_card(config: Config, run: Run, counts: dict[str, int]) -> str:
    """The dataset card as Markdown with Hugging Face front matter; `counts` holds the number of rows of each file."""
    files = {name: count for name, count in counts.items() if count}
    student = ""
    if config.attempts.source:
        student = f"; the corrected attempts were imported from {_public_name(config.attempts.source)}"
    elif config.attempts.student:
        student = f"; the corrected attempts are by {_public_name(config.attempts.student)}"
    manifests = {stage: (run.manifest(stage) or {}) for stage in ("templates", "corrections")}
    sources = _sources(config, student)
    for stage, manifest in manifests.items():
        sources.append(f"- Teacher prompts for {stage}: {manifest.get('inputs', {}).get('prompts', UNKNOWN)}")
    for name in ("student_system", "student_solve", "student_review"):
        sources.append(f"- Prompt {name}: {prompts.digest_prompts(name, folder=config.prompts.folder)}")
    sources += [f"- Stage {stage}: sclite {m['sclite']}" for stage, m in manifests.items() if "sclite" in m]
    if judged := sum(map(from_feedback, run.rows("reviews.jsonl", Review))):
        sources.append(f"- Reviews of answers that were judged in the chat: {judged} (`feedback-..`)")
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "litellm"))
    drops = Counter((drop.stage, drop.reason) for drop in run.read("dropped.jsonl", Drop))
    rows = [f"| {stage} | {reason.replace('_', ' ')} | {n} |" for (stage, reason), n in sorted(drops.items())]
    cost = "Unknown: the run has no ledger."
    if run.path(LEDGER).is_file():
        with Ledger(run.path(LEDGER)) as ledger:
            totals = ledger.totals()
        unpriced = f"; {totals['unpriced']} requests have no known price" if totals["unpriced"] else ""
        cost = (
            f"- {totals['requests']} requests, {totals['prompt_tokens']} prompt tokens, "
            f"{totals['completion_tokens']} completion tokens\n- {totals['cost_usd']:.6f} USD{unpriced}"
        )
    front = _front_matter(
        config,
        task_categories=["text-generation"],
        tags=["sclite", "reasoning", "self-correction", *(["dpo"] if "pairs" in files else [])],
        size_categories=[next((name for limit, name in _SIZES if sum(counts.values()) < limit), "n>1M")],
        configs=[{"config_name": name, "data_files": f"{name}.jsonl"} for name in files],
    )
    return _DATASET_CARD.format(
        front=front,
        version=__version__,
        license=config.export.license or _LICENSE.format("the problems and of the models named below"),
        files="\n".join(f"| {name}.jsonl | {count} | {_FIELDS[name]} |" for name, count in files.items()),
        sources="\n".join([*sources, f"- Written with: {packages}"]),
        drops="\n".join(["| stage | reason | rows |", "|---|---|---|", *rows]) if rows else "None.",
        cost=cost,
        loading="\n".join(f'{name} = load_dataset(".", "{name}", split="train")' for name in files),
        chats=_CHATS if counts["templates"] or counts["reviews"] else "",
        pairs=_PAIRS if counts["pairs"] else "",
        limits=_PAIR_LIMITS if counts["pairs"] else "",
    )


_DATASET_CARD = """{front}# Thought templates and corrections

Written by `sclite export --format data` (sclite {version}), following SuperCorrect (arXiv 2410.09008): a teacher rewrites
worked solutions as numbered steps, and corrects a student's wrong attempts at their first wrong step.

## License

{license}

## Files

| file | rows | fields |
|---|---|---|
{files}

## Sources

{sources}

A prompt is identified by the first 16 digits of its SHA-256. The prompts of imported rows are unknown.

## Dropped rows

{drops}

## Teacher cost

{cost}

## Loading

```python
from datasets import load_dataset

{loading}
```
{chats}{pairs}
## Before you train

{limits}- Templates requested by this run reach the gold answer. The steps before the answer were not verified.
"""
_CHATS = """
Chats: TRL's SFTTrainer reads `messages` (set `assistant_only_loss`, or the prompt is trained too), Axolotl as
`type: chat_template`, LLaMA-Factory as `sclite_templates` and `sclite_reviews` in dataset_info.json.
"""
_PAIRS = """
Pairs: sclite computes no loss on `prompt`, then trains `chosen` against `rejected` without an end-of-turn token, because both
stop mid-answer. It tokenizes each piece of `prefix` and each completion separately. Other trainers treat the same rows differently:

| trainer | end token after the completion | tokenization |
|---|---|---|
| LLaMA-Factory, `sclite_pairs` with `template: empty` | no | prompt and completion separately |
| Step-DPO's own trainer on step_dpo.jsonl | no | jointly; its prompt formats have neither this system prompt nor the review |
| TRL's DPOTrainer | **yes, on both sides** | jointly, with a second start token if the tokenizer adds one |
| Axolotl, `rl: dpo` (uses TRL) | **yes, on both sides** | jointly |

Training with the end token teaches the student to stop after `<Cause>`. sclite's examples/trl-multi-gpu and examples/axolotl contain
a short subclass that omits it. `prompt` is rendered with the chat template of the student named above. For a student with another
template, export again with `--set student.model=NAME` (from a copy of the run, because a run remembers its settings). Pairs have no
conversational form: a trainer would close the assistant's prefix and open a second turn after it.
"""
_PAIR_LIMITS = """- Pairs contain the mistakes of one student. For another student they are off-policy and help less.
- DPO alone does not teach a student to flag a wrong step if it gives that no probability: train on reviews first.
- Decision pairs (`kind`) compare two tags, content pairs compare two texts: keep both.
"""


def build_model_card(config: Config, run: Run, name: str, form: str, figures: Mapping[str, Any]) -> str:
    """The model card of an exported student (base, sft or dpo) in one of the forms of `_USE`. `figures`: those of its GGUFs."""
    base = _public_name(config.student.model)
    settings = []
    for stage in {"base": (), "sft": ("sft",), "dpo": ("sft", "warmup", "dpo")}[name]:
        if manifest := run.manifest(stage):
            counts = ", ".join(f"{count} {what}" for what, count in manifest["counts"].items())
            own = getattr(config, stage)
            settings.append(
                f"- {stage}: {counts}, {own.num_train_epochs:g} epochs, learning rate {own.learning_rate:g}"
            )
    if settings:
        settings.append(f"- LoRA: r {config.lora.r}, alpha {config.lora.lora_alpha}; seed {config.seed}")
    files = []
    for file, about in figures.get("files", {}).items():
        kl = figures["parity"]["files"][file].get("kl")
        files.append(f"| {file} | {about['megabytes']:g} MB | {UNKNOWN if kl is None else f'{kl:.4f}'} |")
    tables = []
    for path in sorted(run.path("eval").glob("*/summary.json")):
        summary = run.read_json(str(path.relative_to(run.folder)), dict[str, Any])
        if summary is None:
            continue
        tables += ["", f"{path.parent.name}, with 95 % intervals:", ""]
        tables += ["| model | problems | first answers | after review |", "|---|---|---|---|"]
        for model, f in summary["models"].items():
            tables.append(f"| {model} | {f['n']} | {_share(f, 'acc_t1')} | {_share(f, 'acc_t2')} |")
    return _MODEL_CARD.format(
        front=_front_matter(
            config,
            base_model=base if _HUB_ID.fullmatch(base) else None,
            pipeline_tag="text-generation",
            library_name="transformers" if form == "merged" else None,
            tags=["sclite", *(["gguf"] if form != "merged" else []), "reasoning", "self-correction"],
        ),
        name=f"{base}-{name}",
        version=__version__,
        license=config.export.license
        or _LICENSE.format("the base model, of the problems and of the teacher"),
        sources="\n".join(_sources(config) + settings),
        files="\n".join([_FILES, *files, ""]) if files else "",
        evaluation="\n".join(tables[1:]) or "Not evaluated: run `sclite eval`, then `sclite export` again.",
        use=_USE[form].format(
            file=next(iter(figures.get("files", {})), f"{name}-lora.gguf"),
            repository=config.export.push or f"{name}-merged",
            base=base,
        ),
    )


def _share(figures: Mapping[str, Any], key: str) -> str:
    """A share with its interval, in percent."""
    low, high = figures[f"{key}_interval"] or (None, None)
    return UNKNOWN if figures[key] is None else f"{figures[key]:.1%} [{low:.1%}, {high:.1%}]"


_FILES = """## Files

| file | size | KL divergence from the trained model, in nats |
|---|---|---|"""
_USE = {
    "gguf": "llama-server -m {file}\nollama create NAME -f Modelfile\nsclite chat --model {file}",
    "lora": "llama-server -m BASE.gguf --lora {file}  # BASE: {base}",
    "merged": "vllm serve {repository}",
}
"""How to run each form of an export."""
_MODEL_CARD = """{front}# {name}

Trained with sclite {version} after SuperCorrect (arXiv 2410.09008): it solves problems in numbered steps and reviews them.

## License

{license}

## Training

{sources}

{files}
## Evaluation

{evaluation}

## Use

```
{use}
```

llama.cpp, Ollama and vLLM run the solving pass, and a review if you ask for one. The guided review, which looks at the probability
of an error in each step, needs `sclite chat` or `sclite serve`. The chat template is the one of training: system, user and
assistant turns, no tools, no thinking switch.

## Limits

The student answers every problem, also those unlike its training problems, and its steps are not verified.
"""

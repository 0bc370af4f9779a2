"""The cards of an exported dataset and of an exported model on the Hub, from the Markdown templates in this folder.

Every figure comes from the run; what the run does not record is written as unknown.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sclite import __version__, prompts
from sclite.config import Config
from sclite.records import Drop
from sclite.run import Run
from sclite.student.adapters import STUDENTS, adapter_weights
from sclite.student.ggufs import source_digest
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger

UNKNOWN = "unknown"
_HUB_ID = re.compile(r"[\w.-]*\w/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.csv)(?<!\.parquet)")


def source_name(config: Config) -> str:
    """The source of the problems as a card may show it."""
    if config.teacher.embedded:
        return "the arithmetic word problems of sclite's quickstart"
    return _public_name(config.problems.source)


def _public_name(name: str) -> str:
    """A Hub ID unchanged; only the last part of a path, because a path may reveal more than a card should."""
    on_hub = _HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if on_hub else Path(name).name or UNKNOWN


def _public_model(name: str) -> str:
    """A LiteLLM model, PROVIDER/NAME, where NAME may be the Hub ID or the folder that a local server uses as a name."""
    provider, _, model = name.partition("/")
    if not provider or name.endswith(".gguf"):
        return _public_name(name)
    return f"{provider}/{Path(model).name}" if model.startswith(("/", ".", "~")) else name


def model_title(config: Config, name: str) -> str:
    """The name of an exported student (base, sft or dpo) on its card and in its GGUFs."""
    return f"{_public_name(config.student.model).rpartition('/')[2]}-{name}"


def _sources(config: Config, student: str = "") -> list[str]:
    subset = " ".join(part for part in (config.problems.subset, config.problems.split) if part)
    source = source_name(config)
    return [
        f"- Problems: {source}{f' ({subset})' if '/' in source else ''}",
        f"- Teacher: {_public_model(config.teacher.model)}",
        f"- Student: {_public_name(config.student.model)}{student}",
    ]


def _fill(template: str, config: Config, front: Mapping[str, Any], **values: Any) -> str:
    """A Jinja template of this folder with Hugging Face front matter."""
    from huggingface_hub import CardData, RepoCard

    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    data = CardData(license=config.export.license or UNKNOWN, **front)
    return f"{RepoCard.from_template(data, template_str=text, version=__version__, **values)}\n"


def build_dataset_card(config: Config, run: Run, counts: Mapping[str, int]) -> str:
    """The dataset card as Markdown; `counts` has the number of rows of each file."""
    files, student = {name: count for name, count in counts.items() if count}, ""
    if config.attempts.source:
        student = f"; the corrected attempts were imported from {_public_name(config.attempts.source)}"
    elif config.attempts.student:
        student = f"; the corrected attempts are by {_public_model(config.attempts.student)}"
    sources = _sources(config, student)
    for stage in ("templates", "corrections"):
        used = (run.manifest(stage) or {"inputs": {}})["inputs"].get("prompts", UNKNOWN)
        sources.append(f"- Teacher prompts for {stage}: {used}")
    for name in ("student_system", "student_solve", "student_review"):
        sources.append(f"- Prompt {name}: {prompts.digest_prompts(name, folder=config.prompts.folder)}")
    totals = None
    if run.path(LEDGER).is_file():
        with Ledger(run.path(LEDGER)) as ledger:
            totals = ledger.totals()
    front = {
        "task_categories": ["text-generation"],
        "tags": ["sclite", "reasoning", "self-correction", *(["dpo"] if "pairs" in files else [])],
        "configs": [{"config_name": name, "data_files": f"{name}.jsonl"} for name in files],
    }
    return _fill(
        "dataset_card.md",
        config,
        front,
        files=files,
        sources="\n".join(sources),
        drops=sorted(Counter((drop.stage, drop.reason) for drop in run.read("dropped.jsonl", Drop)).items()),
        totals=totals,
    )


def build_model_card(config: Config, run: Run, name: str, form: str, figures: Mapping[str, Any]) -> str:
    """The model card of an exported student (base, sft or dpo) as "gguf", "lora" or "merged"; `figures`: those of its GGUFs."""
    base, files = _public_name(config.student.model), figures.get("files", {})
    settings = list[str]()
    for stage in {"base": (), "sft": ("sft",), "dpo": ("sft", "warmup", "dpo")}[name]:
        manifest = run.manifest(stage)
        if manifest is None or manifest["figures"].get("adapter") != run.file_digest(adapter_weights(stage)):
            settings.append(f"- {stage}: {UNKNOWN}")  # imported
            continue
        counts, used = ", ".join(f"{n} {what}" for what, n in manifest["counts"].items()), manifest["inputs"]
        rates = "{num_train_epochs:g} epochs, learning rate {learning_rate:g}".format(**used[stage])
        lora = "; LoRA r {r}, alpha {lora_alpha}".format(**used["lora"]) if "lora" in used else ""
        settings.append(f"- {stage}: {counts}, {rates}, seed {used['seed']}{lora}")
    evaluations, current = dict[str, Any](), {each: source_digest(config, run, each) for each in STUDENTS}
    for path in sorted(run.path("eval").glob("*/summary.json")):
        summary = run.read_json(str(path.relative_to(run.folder)), dict[str, Any]) or {"models": {}}
        models = {
            each if row["made_from"] else _public_model(each): row  # "" is a model behind an API
            for each, row in summary["models"].items()
            if row["made_from"] in ("", current.get(each))
        }
        evaluations |= {path.parent.name: models} if models else {}
    front = {
        "base_model": base if _HUB_ID.fullmatch(base) else None,
        "pipeline_tag": "text-generation",
        "library_name": "transformers" if form == "merged" else None,
        "tags": ["sclite", *(["gguf"] if form != "merged" else []), "reasoning", "self-correction"],
    }
    return _fill(
        "model_card.md",
        config,
        front,
        name=model_title(config, name),
        sources="\n".join([*_sources(config), *settings]),
        files=files,
        parity=figures["parity"]["files"] if files else {},
        evaluations=evaluations,
        form=form,
        own_template=config.export.keep_template,
        file=next(iter(files), f"{name}-lora.gguf"),
        repository=config.export.push or f"{name}-merged",
        chats={
            "solve": prompts.solve_messages("PROBLEM", config.prompts.folder),
            "review": prompts.review_messages("PROBLEM", "STEPS", config.prompts.folder),
        },
        overflows=form == "merged" and "gemma" in base.casefold(),
        base=base,
    )

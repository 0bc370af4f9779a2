"""The export stage: base and adapter merged, written as GGUF, quantised, compared with the original, a Modelfile beside."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataFault
from sclite.export import ollama, parity
from sclite.export.convert import convert
from sclite.export.merge import merge
from sclite.export.quantize import known_quantisation, quantize
from sclite.run import Report, Run, timed, write_text
from sclite.signature import digest
from sclite.student.engine import Engine
from sclite.student.load import local_folder
from sclite.trace import Step, Trace, all_pieces

ADAPTERS = {"base": None, "sft": "sft/adapter", "dpo": "dpo/adapter"}
PARITY_LIMIT = 2_000_000_000
"""Bytes of weights up to which the GGUF's probabilities are compared too, not its tokens alone."""


def gguf_path(run: Run, name: str, config: Config) -> Path:
    return run.path(f"export/{name}-{config.export.quant.lower()}.gguf")


def made_from(config: Config, run: Run, name: str) -> str:
    """A short hash of what the GGUF of base, sft or dpo is made from, in whatever quantization."""
    return digest({**inputs_of(config, run, name), "quant": ""})


def inputs_of(config: Config, run: Run, name: str) -> dict[str, Any]:
    """What decides the GGUF of base, sft or dpo."""
    adapter = ADAPTERS[name]
    return {
        "adapter": run.file_digest(f"{adapter}/adapter_model.safetensors") if adapter else "",
        "student": digest(config.student.model),
        "quant": config.export.quant,
    }


def export_model(config: Config, run: Run, name: str, *, compare: bool = True) -> Report:
    """Write export/<name>-<quant>.gguf for base, sft or dpo; with `compare` also parity.json.

    Skipped where the file was made from the same adapter. Raises DataFault where the adapter is missing.
    """
    stage, report = f"export-{name}", Report(f"export-{name}")
    adapter = run.path(ADAPTERS[name]) if ADAPTERS[name] else None
    if adapter is not None and not (adapter / "adapter_model.safetensors").is_file():
        raise DataFault(f"{adapter} is missing", "run `sclite train` first")
    out = gguf_path(run, name, config)
    inputs = inputs_of(config, run, name)
    known_quantisation(config.export.quant)
    if (manifest := run.done(stage, inputs)) and out.is_file():
        return Report.of(manifest)
    with timed(report):
        base = local_folder(config.student)
        merged, full = run.path(f"export/{name}-merged"), run.path(f"export/{name}-full.gguf")
        try:
            merge(base, adapter, merged)
            convert(merged, full, outtype="f32" if config.export.quant == "f32" else "f16")
            quantize(full, out, config.export.quant)
            report.figures = _describe(run, config, name, merged, full, out, compare)
        finally:
            shutil.rmtree(merged, ignore_errors=True)
            full.unlink(missing_ok=True)
    run.sign(stage, inputs, report)
    return report


def _describe(
    run: Run, config: Config, name: str, merged: Path, full: Path, out: Path, compare: bool
) -> dict[str, Any]:
    figures: dict[str, Any] = {"gguf": str(out), "megabytes": round(out.stat().st_size / 1e6, 2)}
    if compare:
        figures["parity"] = _parity(merged, full)
        run.write_json("export/parity.json", figures["parity"])
    return figures


def _parity(merged: Path, full: Path) -> dict[str, Any]:
    """Tokens, and for small models probabilities, of the merged folder against the unquantised GGUF."""
    question = "Anna has 12 nuts and buys 3 more. How many has she?"
    trace = Trace(
        (Step("12 + 3 = 15.", "Add.", "The sum is 15.", "12 + 3 = 15."),), "Add what is bought.", "15"
    )
    chats = [prompts.solve_messages(question), prompts.review_messages(question, "".join(all_pieces(trace)))]
    size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    return parity.check(merged, full, all_pieces(trace), chats, weights=size <= PARITY_LIMIT)


def write_modelfile(run: Run, config: Config, name: str) -> tuple[Path, Sequence[str]]:
    """Write export/Modelfile for a model's GGUF; returns its path and what a user should know about it."""
    out = gguf_path(run, name, config)
    with Engine(out, parallel=1, context=512, gpu_layers=0, cache_gb=0.1) as engine:
        template, special, longest = engine.chat_template, engine.special_tokens, engine.trained_context
    system = prompts.render("student_system", config.prompts.folder)
    text, warnings = ollama.modelfile(
        out.name,
        template,
        system=system,
        num_ctx=min(config.export.num_ctx, longest),
        bos=special.get("bos_token", ""),
        eos=special.get("eos_token", ""),
    )
    path = run.path("export/Modelfile")
    write_text(path, text)
    return path, warnings

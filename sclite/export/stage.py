"""The export stage: merge base and adapter, write and quantize a GGUF, compare it with the trained model, add a Modelfile."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError, ScliteError
from sclite.export import parity
from sclite.export.gguf import convert_model
from sclite.export.merge import BaseWeights, merge
from sclite.export.ollama import build_modelfile
from sclite.export.quantize import quantization_type, quantize
from sclite.export.tensors import read_json
from sclite.run import Report, Run, timed, write_text
from sclite.signature import digest
from sclite.student.llama_cpp.engine import Engine
from sclite.student.llama_cpp.probe import check_gguf
from sclite.student.loader import check_vocabulary, fetch_base_model, load_tokenizer, read_config
from sclite.student.origin import read_origin
from sclite.student.tokenization import piece_ids, prompt_ids
from sclite.trace import Step, Trace, all_pieces

ADAPTERS = {"base": None, "sft": "sft/adapter", "dpo": "dpo/adapter"}
UNFINISHED = "export/unfinished"
"""Everything until it has passed its checks; chat, eval and export look into export/ alone."""


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


def export_model(config: Config, run: Run, name: str) -> Report:
    """Write export/<name>-<quant>.gguf for base, sft or dpo, and export/parity.json.

    Skipped where the file was made from the same adapter and is whole. The GGUF gets its name after llama.cpp has loaded
    it and it was compared with the trained model. Raises DataFault where the adapter is missing or cannot be merged, or
    llama.cpp cannot read the result; ScliteError where the GGUF is not the trained model.
    """
    stage, report = f"export-{name}", Report(f"export-{name}")
    adapter = run.path(ADAPTERS[name]) if ADAPTERS[name] else None
    if adapter is not None and not (adapter / "adapter_model.safetensors").is_file():
        raise DataError(f"{adapter} is missing", "run `sclite train` first")
    out = gguf_path(run, name, config)
    inputs = inputs_of(config, run, name)
    quantization_type(config.export.quant)
    if (manifest := run.done(stage, inputs)) and _is_whole(run, out, manifest):
        return Report.of(manifest)
    work = run.path(UNFINISHED)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with timed(report):
        try:
            made, full = work / out.name, work / "full.gguf"
            base = fetch_base_model(config.student)
            tokenizer = load_tokenizer(str(base))
            check_vocabulary(tokenizer, read_config(str(base)), str(base))
            outtype = "f32" if config.export.quant == "f32" else "f16"
            convert_model(
                merge(base, adapter, work / f"{name}-merged", outtype=outtype), full, outtype=outtype
            )
            shutil.rmtree(work / f"{name}-merged")
            check_gguf(full)
            quantize(full, made, config.export.quant)
            check_gguf(made)
            result = _parity(config, tokenizer, base, adapter, full, made)
            run.write_json("export/parity.json", result)
            if different := parity.issues(result):
                out.unlink(missing_ok=True)
                raise ScliteError(
                    f"{out.name} is not the model that was trained: {'; '.join(different)}",
                    f"nothing was exported; {run.path('export/parity.json')} has the figures. Try another --quant; if "
                    "tokens differ, make added tokens normal ones (special=False) or use another base model",
                )
            _publish(made, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    size = round(out.stat().st_size / 1e6, 2)
    report.figures = {
        "gguf": str(out),
        "megabytes": size,
        "sha256": run.file_digest(str(out.resolve())),
        "parity": result,
    }
    run.sign(stage, inputs, report)
    return report


def _is_whole(run: Run, out: Path, manifest: dict[str, Any]) -> bool:
    return out.is_file() and run.file_digest(str(out.resolve())) == manifest["figures"].get("sha256")


def _publish(made: Path, out: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk."""
    with open(made, "rb+") as file:
        os.fsync(file.fileno())
    made.replace(out)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _parity(
    config: Config, tokenizer: Any, base: Path, adapter: Path | None, full: Path, made: Path
) -> dict[str, Any]:
    """What parity.json holds: the files compared, their tokens and, where the base fits into memory, their probabilities."""
    question = "Anna has 12 nuts and buys 3 more. How many has she?"
    trace = Trace(
        (Step("12 + 3 = 15.", "Add.", "The sum is 15.", "12 + 3 = 15."),), "Add what is bought.", "15"
    )
    pieces, folder = all_pieces(trace), config.prompts.folder
    chats = [
        prompts.solve_messages(question, folder),
        prompts.review_messages(question, "".join(pieces), folder),
    ]
    result = {"file": made.name, "quantization": config.export.quant.lower(), "skipped": None}
    result |= parity.check_tokens(tokenizer, made, pieces, chats)
    needed, free = BaseWeights(base).float32_bytes() * 1.2, free_memory()
    if free is not None and needed > free:
        return result | {"skipped": f"{needed / 1e9:.0f} GB of RAM needed, {free / 1e9:.0f} GB free"}
    answer = [i for ids in piece_ids(tokenizer, pieces) for i in ids]
    expected = parity.references(base, adapter, [prompt_ids(tokenizer, chat) + answer for chat in chats])
    whole = parity.compare(expected, full)
    same = made.stat().st_size == full.stat().st_size and result["quantization"] in ("f16", "f32")
    return result | {"unquantized": whole, "quantized": whole if same else parity.compare(expected, made)}


def free_memory() -> int | None:
    """Bytes of RAM that are available; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable")), None
    )


def write_modelfile(run: Run, config: Config, name: str) -> tuple[Path, Sequence[str]]:
    """Write export/Modelfile for a model's GGUF; returns its path and what a user should know about it."""
    out = gguf_path(run, name, config)
    with Engine(out, parallel=1, context=512, gpu_layers=0, cache_gb=0.1) as engine:
        template, special, longest = engine.chat_template, engine.special_tokens, engine.trained_context
    system = prompts.render("student_system", config.prompts.folder)
    text, warnings = build_modelfile(
        out.name,
        template,
        system=system,
        num_ctx=min(config.export.num_ctx, longest),
        bos=special.get("bos_token", ""),
        eos=special.get("eos_token", ""),
    )
    path = run.path("export/Modelfile")
    write_text(path, text)
    return path, [*warnings, *_other_base(config, run.path(f"{name}/adapter"))]


def _other_base(config: Config, adapter: Path) -> list[str]:
    """A warning where an adapter without a record of its base weights names another base than the student's."""
    named = (read_json(adapter / "adapter_config.json") if adapter.is_dir() else {}).get(
        "base_model_name_or_path"
    )
    same = not isinstance(named, str) or Path(named).name == Path(config.student.model).name
    if same or read_origin(adapter).weights:
        return []
    return [f"the adapter names {named} as its base; it was merged into {config.student.model}"]

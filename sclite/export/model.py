"""The export stage: merge base and adapter, write and quantize a GGUF, compare it with the trained model, write a Modelfile."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError, ScliteError
from sclite.export import parity
from sclite.export.chat_format import derive_format, write_format
from sclite.export.gguf import convert_model
from sclite.export.merge import BaseWeights, merge
from sclite.export.ollama import build_modelfile
from sclite.export.quantize import quantization_type, quantize
from sclite.export.tensors import read_json
from sclite.files import sync, write_text
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.student.chat_template import render_chat
from sclite.student.cuda_memory import available_ram
from sclite.student.llama_cpp.engine import Engine
from sclite.student.llama_cpp.probe import check_gguf
from sclite.student.loader import check_vocabulary, fetch_base_model, load_tokenizer, read_config
from sclite.student.origin import read_origin
from sclite.student.tokenization import piece_ids, prompt_ids, prompt_text
from sclite.trace import Step, Trace, all_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTERS = {"base": None, "sft": "sft/adapter", "dpo": "dpo/adapter"}
UNFINISHED = "export/unfinished"
"""Where files stay until they have passed their checks. chat, eval and export only look in export/ itself."""


def gguf_path(run: Run, name: str, config: Config) -> Path:
    return run.path(f"export/{name}-{config.export.quant.lower()}.gguf")


def source_digest(config: Config, run: Run, name: str) -> str:
    """A short hash of what the GGUF of base, sft or dpo is made from, for any quantization type."""
    return digest({**inputs_of(config, run, name), "quant": ""})


def inputs_of(config: Config, run: Run, name: str) -> dict[str, Any]:
    """What decides the GGUF of base, sft or dpo."""
    adapter = ADAPTERS[name]
    return {
        "adapter": run.file_digest(f"{adapter}/adapter_model.safetensors") if adapter else "",
        "student": digest(config.student.model),
        "quant": config.export.quant,
        "keep_template": config.export.keep_template,
    }


def export_model(config: Config, run: Run, name: str) -> Report:
    """Write export/<name>-<quant>.gguf for base, sft or dpo, and export/parity.json.

    Skipped if the GGUF is undamaged and made from the same adapter. The file gets its final name only after llama.cpp has
    loaded it and it matches the trained model. Raises DataError if the adapter is missing or cannot be merged, or llama.cpp
    cannot load the result; ScliteError if the GGUF does not match the trained model.
    """
    stage, report = f"export-{name}", Report(f"export-{name}")
    adapter = run.path(ADAPTERS[name]) if ADAPTERS[name] else None
    if adapter is not None and not (adapter / "adapter_model.safetensors").is_file():
        raise DataError(f"{adapter} is missing", "run `sclite train` first")
    out = gguf_path(run, name, config)
    inputs = inputs_of(config, run, name)
    quantization_type(config.export.quant)
    manifest = run.done(stage, inputs)
    if manifest and out.is_file() and _sha256(run, out) == manifest["figures"].get("sha256"):
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
            form = None
            if not config.export.keep_template:
                bos = tokenizer.bos_token or ""
                form = derive_format(lambda chat, answer: prompt_text(tokenizer, chat, answer), bos)
            outtype = "f32" if config.export.quant == "f32" else "f16"
            merged = merge(base, adapter, work / f"{name}-merged", outtype=outtype)
            if form:
                write_format(form, tokenizer, merged)
            convert_model(merged, full, outtype=outtype)
            shutil.rmtree(merged)
            check_gguf(full)
            quantize(full, made, config.export.quant)
            check_gguf(made)
            result = _check_parity(config, tokenizer, base, adapter, full, made)
            run.write_json("export/parity.json", result)
            if violations := parity.find_violations(result):
                out.unlink(missing_ok=True)
                raise ScliteError(
                    f"{out.name} does not match the trained model: {'; '.join(violations)}",
                    f"nothing was exported; see {run.path('export/parity.json')}. Try another --quant. If tokens "
                    "differ, add tokens with special=False or use another base model",
                )
            sync(made)
            made.replace(out)
            sync(out.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    report.figures = {
        "gguf": str(out),
        "megabytes": round(out.stat().st_size / 1e6, 2),
        "sha256": _sha256(run, out),
        "parity": result,
    }
    run.sign(stage, inputs, report)
    return report


def _sha256(run: Run, out: Path) -> str:
    return run.file_digest(str(out.resolve()))


def _check_parity(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
    adapter: Path | None,
    full: Path,
    made: Path,
) -> dict[str, Any]:
    """The content of parity.json. Probabilities are compared only if the base model fits in memory."""
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
    result |= parity.compare_tokens(tokenizer, made, pieces, chats)
    needed, available = BaseWeights(base).float32_bytes() * 1.2, available_ram()
    if available is not None and needed > available:
        return result | {"skipped": f"{needed / 1e9:.0f} GB of RAM needed, {available / 1e9:.0f} GB free"}
    answer = [i for ids in piece_ids(tokenizer, pieces) for i in ids]
    sequences = [prompt_ids(tokenizer, chat) + answer for chat in chats]
    references = parity.compute_references(base, adapter, sequences)
    unquantized = quantized = parity.compare_probabilities(references, full)
    if made.stat().st_size != full.stat().st_size or result["quantization"] not in ("f16", "f32"):
        quantized = parity.compare_probabilities(references, made)
    return result | {"unquantized": unquantized, "quantized": quantized}


def write_modelfile(run: Run, config: Config, name: str) -> tuple[Path, list[str]]:
    """Write export/Modelfile for a model's GGUF. Returns its path and warnings for the user."""
    out, warnings = gguf_path(run, name, config), []
    with Engine(out, parallel=1, context=512, gpu_layers=0, cache_gb=0.1) as engine:
        jinja, tokens, max_context = engine.chat_template, engine.special_tokens, engine.trained_context
        bos, adds_bos = tokens["bos_token"], engine.vocabulary.adds_bos
    try:
        render = lambda chat, answer: render_chat(jinja, chat, tokens, generation_prompt=answer)  # noqa: E731
        template = derive_format(render, bos).go_template(bos if adds_bos else "")
    except DataError as error:
        template = ""
        warnings.append(f"the Modelfile has no TEMPLATE, which Ollama before 0.30 needs: {error.message}")
    text = build_modelfile(
        out.name,
        template,
        system=prompts.solve_messages("", config.prompts.folder)[0]["content"],
        num_ctx=min(config.export.num_ctx, max_context),
        stops=(tokens["eos_token"],),
    )
    path, adapter = run.path("export/Modelfile"), run.path(f"{name}/adapter")
    write_text(path, text)
    # an adapter from elsewhere has no record of its base weights, only the name of its base
    if adapter.is_dir() and not read_origin(adapter).weights:
        base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        if isinstance(base, str) and Path(base).name != Path(config.student.model).name:
            warnings.append(f"the adapter was trained on {base} but was merged into {config.student.model}")
    return path, warnings

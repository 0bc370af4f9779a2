"""The export stage: merge base and adapter, write and quantize GGUFs, compare them with the trained model."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError, ScliteError
from sclite.export import parity
from sclite.export.cards import build_model_card, model_title
from sclite.export.chat_format import trained_format, write_format
from sclite.export.gguf import convert_model, converter, quantization_type, quantize, run_script
from sclite.export.merge import merge, read_settings
from sclite.export.reference import (
    QUESTION,
    Sample,
    Trained,
    compute_references,
    format_size,
    measure_importance,
    read_samples,
    split_samples,
    spread,
)
from sclite.export.weights import BaseWeights, read_json
from sclite.files import sync, write_text
from sclite.records import Problem
from sclite.run import Report, Run, timed
from sclite.student.adapters import ORIGIN_FILE
from sclite.student.ggufs import LORA_FILE, export_stage, inputs_of, source_digest
from sclite.student.llama_cpp.engine import check_gguf
from sclite.student.loader import fetch_model, load_tokenizer, model_name

UNFINISHED = "export/unfinished"  # for files until they have passed their checks
CALIBRATION_TOKENS = 8192
"""Tokens of the run that the importance matrix is measured on; probabilities are compared on others."""


def finished_export(config: Config, run: Run, name: str) -> Report | None:
    """The report of an earlier export, if its GGUFs are intact and were made from the same adapter."""
    names = [f"{name}-{quant}.gguf" for quant in config.export.types]
    manifest = run.done(export_stage(name, config), inputs_of(config, run, name))
    if not manifest or manifest["figures"].get("files") != _describe(run, names):
        return None
    report = Report.of(manifest)
    report.stage = f"export-{name}"
    report.figures["gguf"] = str(run.path(f"export/{names[0]}"))  # the run may have been moved
    return report


def export_model(config: Config, run: Run, name: str) -> Report:
    """Write export/<name>-<type>.gguf of base, sft or dpo for each quantization type, and export/parity.json.

    Skipped if it is finished. A file gets its final name only after llama.cpp has
    loaded it and all match the trained model; files that a killed export has finished are kept for the next one.
    Raises DataError if the adapter is missing or cannot be merged, or llama.cpp cannot load the result; ScliteError if a
    GGUF does not match the trained model, or the disk is too small.
    """
    adapter, folder = run.path(f"{name}/adapter") if name != "base" else None, run.path("export")
    types, report = config.export.types, Report(f"export-{name}")
    for quant in types:
        quantization_type(quant)
    names = [f"{name}-{quant}.gguf" for quant in types]
    if found := finished_export(config, run, name):
        run.write_json("export/parity.json", found.figures["parity"])  # it may belong to another student
        parity.check_bounds(found.figures["parity"], config.export)
        return found
    run.path("export/parity.json").unlink(missing_ok=True)
    with timed(report):
        try:
            student, samples = _load(config, adapter), read_samples(config, run)
            rest, wanted = split_samples(samples)[1], list[str]()
            if config.export.imatrix is not False:  # it helps below 5 bits
                wanted = [q for q in types if config.export.imatrix or re.match(r"(i?q|tq)[1-4]", q)]
            full, made, measured = _write_parts(config, run, name, student, rest, wanted)
            rows = run.read("problems.jsonl", Problem)
            questions = spread([row.question for row in rows] or [QUESTION], parity.GREEDY)
            chats = [prompts.solve_messages(question, config.prompts.folder) for question in questions]
            result = parity.compare_export(student, full, made, samples, chats)
            result["importance"] = measured
            run.write_json("export/parity.json", result)
            for file in names:  # of an earlier export
                (folder / file).unlink(missing_ok=True)
            parity.check_bounds(result, config.export)
            for path in made.values():
                sync(path)
                path.replace(folder / path.name)
            sync(folder)
        except (ScliteError, OSError):
            shutil.rmtree(run.path(UNFINISHED), ignore_errors=True)
            raise
    shutil.rmtree(run.path(UNFINISHED))
    files, warnings = _describe(run, names), list[str]()
    for file, about in result["files"].items():
        warnings += [f"{file}: {about['fallback']}"] if about["fallback"] else []
        if about["quantization"] in wanted and not measured:
            why = "too few rows in the run, or a model that cannot be run layer by layer"
            warnings.append(f"{file}: written without an importance matrix: {why}")
    if adapter and (answers := result["answers"])["readable"] < answers["asked"]:
        warnings.append(
            f"{answers['asked'] - answers['readable']} of {answers['asked']} greedy answers of {names[0]} do not end within "
            f"{parity.ANSWER_TOKENS} tokens or cannot be read: train on more templates, or for more epochs"
        )
    first = {"gguf": str(folder / names[0]), "megabytes": files[names[0]]["megabytes"]}
    report.figures = {**first, "files": files, "parity": result, "warnings": warnings}
    run.sign(export_stage(name, config), inputs_of(config, run, name), report)
    return report


def _check_space(folder: Path, needed: int) -> None:
    """Raise ScliteError if there are fewer bytes free."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise ScliteError(
            f"the export needs about {format_size(needed)} of disk space in {folder}, but only {format_size(free)} are free",
            "free some space, or export fewer or smaller types (export.quant)",
        )


@contextmanager
def _workplace(run: Run) -> Iterator[Path]:
    """Yield an empty folder UNFINISHED, and remove it at the end."""
    work = run.path(UNFINISHED)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _load(config: Config, adapter: Path | None) -> Trained:
    """The student with this adapter. Raises DataError if the adapter is missing."""
    if adapter is not None and not (adapter / "adapter_model.safetensors").is_file():
        raise DataError(f"{adapter} is missing", "run `sclite train` first")
    base = fetch_model(model_name(config.student))
    return Trained(base, adapter, load_tokenizer(str(base)))


def _write_parts(
    config: Config, run: Run, name: str, student: Trained, samples: list[Sample], wanted: list[str]
) -> tuple[Path, dict[str, Path], list[str]]:
    """The 16- or 32-bit GGUF, its quantizations by type, and the types with an importance matrix, in a folder of UNFINISHED.

    The `wanted` types use an importance matrix, measured on the samples. Each file is renamed once it is complete, so those
    that a killed export has left in the folder are kept.
    """
    work, types = run.path(f"{UNFINISHED}/{source_digest(config, run, name)}"), config.export.types
    for path in work.parent.glob("*"):  # what a killed export of something else has left
        if path != work:
            shutil.rmtree(path)
    work.mkdir(parents=True, exist_ok=True)
    outtype = "f32" if {"f32", "bf16"} & set(types) else "f16"
    full, merged = work / f"full-{outtype}.gguf", work / f"merged-{outtype}"
    made = {quant: work / f"{name}-{quant}.gguf" for quant in types}
    missing = {quant: path for quant, path in made.items() if not path.exists()}
    needed, whole = sum(map(student.size, missing)), student.size(outtype)
    _check_space(work, needed if full.exists() else whole + max(whole, needed))
    if not full.exists():
        if not merged.exists():
            part = work / "merged.part"
            shutil.rmtree(part, ignore_errors=True)
            _merge(config, student, part, outtype).replace(merged)
        convert_model(merged, full, outtype=outtype, title=model_title(config, name))
    shutil.rmtree(merged, ignore_errors=True)
    check_gguf(full)
    importance, texts = dict[str, Any](), list[list[int]]()
    if samples and set(wanted) & set(missing):
        for sample in samples:
            if sum(map(len, texts)) <= CALIBRATION_TOKENS:
                texts.append(student.ids(sample))
        importance = measure_importance(student, full, texts)
    for quant, path in missing.items():
        quantize(full, path, quant, importance if quant in wanted else None)
    return full, made, wanted if importance or (samples and not set(wanted) & set(missing)) else []


def export_merged(config: Config, run: Run, name: str) -> dict[str, Any]:
    """Write export/<name>-merged: a Hugging Face folder in 16 bits, with its card, for vLLM, LM Studio and transformers.

    Returns its path, `merged`, chats_compared and chats_equal (in their token ids), and what parity.measure_difference finds
    in transformers; top1_agreement and kl are None if it could not be run. Raises ScliteError if it is not the trained model.
    """
    adapter, out = run.path(f"{name}/adapter") if name != "base" else None, run.path(f"export/{name}-merged")
    student, samples = _load(config, adapter), read_samples(config, run)
    figures, faults = dict[str, Any](top1_agreement=None, kl=None), list[str]()
    with _workplace(run) as work:
        _check_space(work, student.size("f16"))
        folder = _merge(config, student, work / out.name, "f16")
        # the base's bfloat16 would round the changes of a small adapter away when the folder is loaded
        settings = read_json(folder / "config.json")
        for part in filter(None, (settings, settings.get("text_config"))):
            part.pop("torch_dtype", None)
            part["dtype"] = "float16"
        write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
        merged = Trained(folder, None, load_tokenizer(str(folder)))
        equal = sum(merged.ids(sample) == student.ids(sample) for sample in samples)
        sequences = student.held_out(samples)
        wanted = compute_references(student.base, adapter, sequences)
        if found := compute_references(folder, None, sequences):
            figures = parity.measure_difference(wanted, [each.trained for each in found])
            faults += [f"it has {excess}" for excess in parity.find_excesses(figures, "f16", config.export)]
        if equal < len(samples):
            faults.append(f"its tokenizer reads {len(samples) - equal} of {len(samples)} chats differently")
        if faults:
            hint = "nothing was exported; use another base model, or report it with the model's name"
            raise ScliteError(f"{out.name} does not match the trained model: {'; '.join(faults)}", hint)
        write_text(folder / "README.md", build_model_card(config, run, name, "merged", {}))
        if out.exists():  # a kill never leaves a partial folder under its final name
            out.replace(work / "earlier")
        folder.replace(out)
    return {"merged": str(out), "chats_compared": len(samples), "chats_equal": equal, **figures}


def export_lora(config: Config, run: Run, name: str) -> dict[str, Any]:
    """Write only the adapter of sft or dpo as export/<name>-lora.gguf, for llama.cpp's --lora, with its card next to it.

    Returns its path, `lora`, and the figures of compare_probabilities on its 16-bit base. Raises DataError for an adapter
    that cannot be written so, ScliteError if base and adapter in llama.cpp differ from the trained model.
    """
    adapter = run.path(f"{name if name != 'base' else 'sft'}/adapter")
    student, out = _load(config, adapter), run.path(f"export/{name}{LORA_FILE}")
    with _workplace(run) as work:
        _check_space(work, 2 * student.size("f16"))
        settings, weights = read_settings(adapter), adapter / "adapter_model.safetensors"
        if odd := next(filter(settings.get, ("alpha_pattern", "rank_pattern", "modules_to_save")), ""):
            hint = "use `sclite export --format gguf`, which merges it"
            raise DataError(f"the adapter {adapter} has its own {odd}, which a LoRA file cannot store", hint)
        BaseWeights(student.base, adapter)  # rejects an adapter of other weights
        # the converter takes the name in the GGUF from the folder, scales every update by lora_alpha / r, and drops all other
        # settings; rank-stabilized ones are scaled by alpha / sqrt(r) (arXiv 2312.03732)
        alpha = settings["lora_alpha"] * (math.sqrt(settings["r"]) if settings.get("use_rslora") else 1)
        made, plain = work / out.name, work / model_title(config, name)
        plain.mkdir()
        (plain / weights.name).symlink_to(weights.resolve())
        write_text(plain / "adapter_config.json", json.dumps({"peft_type": "LORA", "lora_alpha": alpha}))
        merged = merge(student.base, None, work / "merged", outtype="f16")
        arguments = [str(plain), "--base", str(merged), "--outtype", "f16"]
        run_script(converter(), "convert_lora_to_gguf.py", arguments, made, f"the adapter in {adapter}")
        # without the record of what it was trained on: with a GGUF it is not used on NF4 weights
        ignored = shutil.ignore_patterns(ORIGIN_FILE)
        shutil.copytree(adapter.resolve(), work / "adapter", ignore=ignored, copy_function=os.symlink)
        base = convert_model(merged, work / "base.gguf", title=model_title(config, "base"))
        sequences = student.held_out(read_samples(config, run))
        wanted = compute_references(student.base, work / "adapter", sequences)
        figures = parity.compare_probabilities(wanted, base, made) if wanted else {}
        if figures and (faults := parity.find_inexact(figures)):
            hint = "nothing was exported; use `sclite export --format gguf`, which merges the adapter"
            raise ScliteError(f"{out.name} does not match the trained model: {'; '.join(faults)}", hint)
        write_text(out.with_suffix(".md"), build_model_card(config, run, name, "lora", {}))
        made.replace(out)
    return {"lora": str(out), **figures}


def write_sampling_gguf(config: Config, adapter: Path | None, work: Path, *, small: bool) -> Path:
    """Write base and adapter as a GGUF in the folder `work`, in 16 bits or, if `small`, in 8; returns its path.

    It is for attempts and own corrections, so it is not compared with the trained model.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    merged = _merge(config, _load(config, adapter), work / "merged", "f16")
    # llama.cpp recognizes Phi-3, and its spaces after special tokens, by the name
    path = convert_model(merged, work / "f16.gguf", outtype="f16", title=model_title(config, "sft"))
    shutil.rmtree(merged)
    check_gguf(path)
    if small:
        quantize(path, work / "q8_0.gguf", "q8_0")
        path = work / "q8_0.gguf"
    return path


def _merge(config: Config, student: Trained, out: Path, outtype: str) -> Path:
    """Merge base and adapter, and write the chat format that was trained."""
    form = trained_format(config, student.tokenizer)
    merge(student.base, student.adapter, out, outtype=outtype)
    if form:
        write_format(form, student.tokenizer, out)
    return out


def _describe(run: Run, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and digest of the exported files that exist."""
    paths = {name: run.path(f"export/{name}").resolve() for name in names}
    return {
        name: {"megabytes": round(path.stat().st_size / 1e6, 2), "sha256": run.file_digest(str(path))}
        for name, path in paths.items()
        if path.is_file()
    }

"""The export stage: merge base and adapter, write and quantize GGUFs, compare them with the trained model."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError, ScliteError
from sclite.export import parity
from sclite.export.cards import build_model_card, model_title
from sclite.export.chat_format import trained_format, write_format
from sclite.export.gguf import check_convertible, convert_model, converter, run_script
from sclite.export.merge import copy_settings, merge, write_plain
from sclite.export.quantize import estimate_bytes, measure_importance, quantization_type, quantize
from sclite.export.reference import Trained, compute_references, format_size
from sclite.export.samples import QUESTION, Sample, read_samples, split_samples, spread
from sclite.export.tensors import BaseWeights, read_json
from sclite.files import sync, write_text
from sclite.records import Problem
from sclite.run import Report, Run, timed
from sclite.student.adapters import STUDENTS, adapter_weights
from sclite.student.ggufs import LORA_FILE, export_stage, inputs_of
from sclite.student.llama_cpp.probe import check_gguf
from sclite.student.loader import check_tokenizer, fetch_model, load_tokenizer, model_name, read_config
from sclite.student.origin import FILE as RECORD_OF_ORIGIN
from sclite.student.origin import chat_digest, read_origin

UNFINISHED = "export/unfinished"  # for files until they have passed their checks
CALIBRATION_TOKENS = 8192
"""Tokens of the run that the importance matrix is measured on; probabilities are compared on others."""


def describe_sizes(config: Config) -> str:
    """The files of an export with their approximate sizes."""
    parameters = BaseWeights(fetch_model(model_name(config.student))).count_parameters()
    return ", ".join(f"{q} about {format_size(estimate_bytes(parameters, q))}" for q in config.export.types)


def export_model(config: Config, run: Run, name: str) -> Report:
    """Write export/<name>-<type>.gguf of base, sft or dpo for each quantization type, and export/parity.json.

    Skipped if the GGUFs are intact and were made from the same adapter. A file gets its final name only after llama.cpp has
    loaded it and all match the trained model; files that a killed export has finished are kept for the next one.
    Raises DataError if the adapter is missing or cannot be merged, or llama.cpp cannot load the result; ScliteError if a
    GGUF does not match the trained model, or the disk is too small.
    """
    stage, report = export_stage(name, config), Report(f"export-{name}")
    adapter = run.path(f"{name}/adapter") if name != "base" else None
    types, inputs, folder = config.export.types, inputs_of(config, run, name), run.path("export")
    for quant in types:
        quantization_type(quant)
    names = [f"{name}-{quant}.gguf" for quant in types]
    manifest = run.done(stage, inputs)
    if manifest and manifest["figures"].get("files") == _describe(run, names):
        found = Report.of(manifest)
        found.stage = report.stage
        found.figures["gguf"] = str(folder / names[0])  # the run may have been moved
        if run.read_json("export/parity.json") != found.figures["parity"]:  # it belongs to another student
            run.write_json("export/parity.json", found.figures["parity"])
        _check_bounds(config, run, names, found.figures["parity"])
        return found
    run.path("export/parity.json").unlink(missing_ok=True)
    work = run.path(UNFINISHED)
    with timed(report):
        try:
            student, samples = _load(config, adapter), read_samples(config, run)
            check_tokenizer(student.tokenizer, read_config(str(student.base)), str(student.base))
            full, parts, importance = _write_parts(config, run, name, student, samples)
            made = {quant: work / file for quant, file in zip(types, names, strict=True)}
            questions = spread(
                [row.question for row in run.read("problems.jsonl", Problem)] or [QUESTION], parity.GREEDY
            )
            chats = [prompts.solve_messages(question, config.prompts.folder) for question in questions]
            result = parity.compare_export(student, full, made, samples, chats) | {"importance": importance}
            run.write_json("export/parity.json", result)
            later = [run.path(adapter_weights(each)) for each in STUDENTS[STUDENTS.index(name) + 1 :]]
            shared = () if any(path.is_file() for path in later) else ("Modelfile", "README.md")
            for file in (*names, *shared):  # of an earlier export
                (folder / file).unlink(missing_ok=True)
            _check_bounds(config, run, names, result)
            for file in names:
                sync(work / file)
                (work / file).replace(folder / file)
            sync(folder)
        except (ScliteError, OSError):
            shutil.rmtree(work, ignore_errors=True)
            raise
    shutil.rmtree(work)
    files = _describe(run, names)
    first = {"gguf": str(folder / names[0]), "megabytes": files[names[0]]["megabytes"]}
    warnings = [f"{file}: {parts[file]['warning']}" for file in names if parts[file]["warning"]]
    if adapter and (answers := result["answers"])["readable"] < answers["asked"]:
        warnings.append(
            f"{answers['asked'] - answers['readable']} of {answers['asked']} greedy answers of {names[0]} do not end within "
            f"{parity.ANSWER_TOKENS} tokens or cannot be read: train on more templates, or for more epochs"
        )
    report.figures = {**first, "files": files, "parity": result, "warnings": warnings}
    run.sign(stage, inputs, report)
    return report


def _check_bounds(config: Config, run: Run, names: list[str], result: dict[str, Any]) -> None:
    """Raise ScliteError if figures of parity.json exceed their bounds."""
    if violations := parity.find_violations(result, config.export):
        raise ScliteError(
            f"{', '.join(names)} does not match the trained model: {'; '.join(violations)}",
            f"see {run.path('export/parity.json')}. Try another type (export.quant). If tokens differ, use another base model, "
            "or add its extra tokens with special=False",
        )


def _check_space(folder: Path, needed: int) -> None:
    """Raise ScliteError if there are fewer bytes free."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise ScliteError(
            f"the export needs about {format_size(needed)} of disk space in {folder}, but only {format_size(free)} are free",
            "free some space, or export fewer or smaller types (export.quant)",
        )


@contextmanager
def _workplace(run: Run, name: str) -> Iterator[Path]:
    """Yield an empty folder in UNFINISHED, and remove it at the end."""
    work = run.path(UNFINISHED) / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):  # a killed export of GGUFs keeps its files there
            work.parent.rmdir()


def _load(config: Config, adapter: Path | None) -> Trained:
    """The student with this adapter. Raises DataError if the adapter is missing."""
    if adapter is not None and not (adapter / "adapter_model.safetensors").is_file():
        raise DataError(f"{adapter} is missing", "run `sclite train` first")
    base = fetch_model(model_name(config.student))
    tokenizer, trained = load_tokenizer(str(base)), read_origin(adapter).chat if adapter else ""
    if trained not in ("", chat_digest(tokenizer)):
        message = f"the chat template of {base} is not the one that {adapter} was trained with"
        raise DataError(
            message,
            "set student.model to a folder with the original model, or train again with --fresh",
        )
    return Trained(base, adapter, tokenizer)


def _write_parts(
    config: Config, run: Run, name: str, student: Trained, samples: list[Sample]
) -> tuple[Path, dict[str, dict[str, Any]], list[str]]:
    """The 16- or 32-bit GGUF and its quantizations, in the folder UNFINISHED; keeps those that a killed export has finished.

    Returns the former, what is known of each file by its name, and the types that use an importance matrix.
    """
    work, types = run.path(UNFINISHED), config.export.types
    source, record = {**inputs_of(config, run, name), "quant": ""}, f"{UNFINISHED}/parts.json"
    outtype = "f32" if {"f32", "bf16"} & set(types) else "f16"
    full, merged = work / f"full-{outtype}.gguf", work / f"merged-{outtype}"
    found = run.read_json(record, dict[str, Any]) or {}
    parts: dict[str, dict[str, Any]] = {}
    for file, about in found.get("files", {}).items() if found.get("source") == source else ():
        # the merged folder and the full file were renamed once complete: checking their digests would take too long
        if (work / file).exists() and about["sha256"] in ("", run.file_digest(f"{UNFINISHED}/{file}")):
            parts[file] = about
    for path in work.iterdir() if work.is_dir() else ():
        if path.name not in (*parts, Path(record).name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.mkdir(parents=True, exist_ok=True)

    def keep(path: Path, sha256: str = "", warning: str = "") -> None:
        parts[path.name] = {"sha256": sha256, "warning": warning}
        run.write_json(record, {"source": source, "files": parts})

    missing = {quant: file for quant in types if (file := f"{name}-{quant}.gguf") not in parts}
    whole, needed = student.size(outtype), sum(map(student.size, missing))
    if full.name not in parts:
        needed = max(whole, needed) + (whole if merged.name not in parts else 0)
    _check_space(work, needed)
    if full.name not in parts:
        if merged.name not in parts:
            check_convertible(student.base)
            _merge(config, student, work / "merged.part", outtype).replace(merged)
            keep(merged)
        convert_model(merged, full, outtype=outtype, title=model_title(config, name))
        check_gguf(full)
        keep(full)
    shutil.rmtree(merged, ignore_errors=True)
    wanted, importance, (_, rest) = list[str](), None, split_samples(samples)
    if config.export.imatrix is not False:  # it helps below 5 bits
        wanted = [quant for quant in types if config.export.imatrix or re.match(r"(i?q|tq)[1-4]", quant)]
    if rest and any(quant in wanted for quant in missing):
        texts = list[list[int]]()
        for sample in rest:
            if sum(map(len, texts)) <= CALIBRATION_TOKENS:
                texts.append(student.ids(sample))
        importance = measure_importance(full, texts)
    for quant, file in missing.items():
        odd, others = quantize(full, work / file, quant, importance if quant in wanted else None)
        check_gguf(work / file)
        fallback = (
            f"{odd} tensors have rows not divisible by 256 and are stored as {others} instead of {quant}"
        )
        notes = [fallback] if odd else []
        if quant in wanted and not rest:
            notes.append("written without an importance matrix: the run has too few rows to measure one")
        keep(work / file, run.file_digest(f"{UNFINISHED}/{file}"), "; ".join(notes))
    return full, parts, wanted if rest else []


def export_merged(config: Config, run: Run, name: str) -> dict[str, Any]:
    """Write export/<name>-merged: a Hugging Face folder in 16 bits, with its card, for vLLM, LM Studio and transformers.

    Returns its path, `merged`, chats_compared and chats_equal (in their token ids), and what parity.measure_difference finds
    in transformers; top1_agreement and kl are None if it could not be run. Raises ScliteError if it is not the trained model.
    """
    adapter, out = run.path(f"{name}/adapter") if name != "base" else None, run.path(f"export/{name}-merged")
    student, samples = _load(config, adapter), read_samples(config, run)
    figures, faults = dict[str, Any](top1_agreement=None, kl=None), list[str]()
    with _workplace(run, "merged") as work:
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
        sequences, shortage = student.held_out(samples), student.ram_shortage()
        with suppress(DataError) if shortage else nullcontext():  # some models cannot be run layer by layer
            wanted = compute_references(student.base, adapter, sequences, bool(shortage))
            found = compute_references(folder, None, sequences, bool(shortage))
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
    counts = {"chats_compared": len(samples), "chats_equal": equal}
    return {"merged": str(out), **counts, **figures}


def export_lora(config: Config, run: Run, name: str) -> dict[str, Any]:
    """Write only the adapter of sft or dpo as export/<name>-lora.gguf, for llama.cpp's --lora, with its card next to it.

    Returns its path, `lora`, and the figures of compare_probabilities on its 16-bit base. Raises DataError for an adapter
    that cannot be written so, ScliteError if base and adapter in llama.cpp differ from the trained model.
    """
    adapter = run.path(f"{name if name != 'base' else 'sft'}/adapter")
    student, out = _load(config, adapter), run.path(f"export/{name}{LORA_FILE}")
    with _workplace(run, "lora") as work:
        _check_space(work, 2 * student.size("f16"))
        # the converter takes the name in the GGUF from the folder
        made, settings, plain = work / out.name, work / "settings", work / model_title(config, name)
        BaseWeights(student.base, adapter)  # rejects an adapter of other weights
        write_plain(adapter, plain)
        settings.mkdir()
        copy_settings(student.base, settings)  # the converter would run the code of a model folder
        arguments = [str(plain), "--base", str(settings), "--outtype", "f16"]
        run_script(converter(), "convert_lora_to_gguf.py", arguments, made, f"the adapter in {adapter}")
        # without the record of what it was trained on: with a GGUF it is not used on NF4 weights
        ignored = shutil.ignore_patterns(RECORD_OF_ORIGIN)
        shutil.copytree(adapter.resolve(), work / "adapter", ignore=ignored, copy_function=os.symlink)
        merged = merge(student.base, None, work / "merged", outtype="f16")
        base = convert_model(merged, work / "base.gguf", outtype="f16")
        sequences, shortage, figures = student.held_out(read_samples(config, run)), student.ram_shortage(), {}
        with suppress(DataError) if shortage else nullcontext():  # some models cannot be run layer by layer
            wanted = compute_references(student.base, work / "adapter", sequences, bool(shortage))
            figures = parity.compare_probabilities(wanted, base, made)
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
        path.unlink()
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

"""The export stage: a GGUF is published only if it matches the trained model."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sclite import exports
from sclite.config import Config, Export
from sclite.context import Context
from sclite.errors import DATA, FAILED, DataError, ScliteError
from sclite.export import model as export
from sclite.export import ollama, parity, reference
from sclite.export.cards import build_model_card
from sclite.export.gguf import run_converter
from sclite.export.reference import Sample, Trained, split_samples
from sclite.progress import ProgressDisplay
from sclite.records import Template
from sclite.run import Report, Run
from sclite.student.adapters import adapter_weights, record_origin
from sclite.student.ggufs import exports_of, gguf_path, source_digest
from sclite.student.llama_cpp.engine import Engine
from sclite.student.loader import load_tokenizer
from sclite.student.tokenization import prompt_ids
from sclite.train.stage import training_inputs
from tests.toy import LINEAR, file_limit, raises, random_adapter, sample_texts, tiny_gguf, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small Llama in bfloat16, like most models on the Hub."""
    folder = tiny_llama(tmp_path_factory.mktemp("base"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A LoRA whose changes are about as large as bfloat16 rounding."""
    folder = tmp_path_factory.mktemp("adapter")
    record_origin(random_adapter(base, folder, std=0.01, r=4, target_modules=LINEAR), base, folder)
    return folder


@pytest.fixture
def run(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "run/sft/adapter")
    return Run(tmp_path / "run")


def config_of(base, quant="q8_0", **export):
    tree = {"student": {"model": str(base)}, "export": {"quant": quant, **export}}
    return Config.model_validate(tree)


def fail_to_export(config, run, message, code=FAILED, left=("parity.json",)):
    """The export must end with this error and leave these files only."""
    with pytest.raises(ScliteError, match=message) as error:
        export.export_model(config, run, "sft")
    assert error.value.code == code
    assert {path.name for path in run.path("export").iterdir()} == set(left)
    return error.value


@pytest.fixture
def instead(monkeypatch):
    """Replace one of the stage's functions; the replacement gets the original as its first argument."""

    def replace(name, function):
        monkeypatch.setattr(export, name, functools.partial(function, getattr(export, name)))

    return replace


def test_parity_describes_the_exported_file(base, run):
    report = export.export_model(config_of(base), run, "sft")
    kept = json.loads(run.path("export/parity.json").read_text())
    assert kept == report.figures["parity"]
    assert kept["skipped"] is None
    assert kept["tokens_equal"] == kept["tokens_compared"] > 30
    assert kept["end_of_turn"] == "<|im_end|>"
    assert kept["greedy"]["equal"] == kept["greedy"]["answers"] == 2
    assert kept["answers"] == {"asked": 1, "ended": 0, "readable": 0}
    assert report.figures["warnings"][0].startswith("1 of 1 greedy answers of sft-q8_0.gguf do not end")
    assert kept["unquantized"]["kl"] < kept["files"]["sft-q8_0.gguf"]["kl"] < 0.03
    assert kept["unquantized"]["adapter_share"] == pytest.approx(1, abs=0.05)
    line = parity.summarize(kept)
    assert line.startswith("Checked against the trained model: ")
    assert "% (KL 0.0" in line
    assert re.search(r"; 2 of 2 greedy texts equal, (99\.9|100\.0)% of the adapter's effect$", line)
    assert "\n" not in line
    assert sorted(path.name for path in run.path("export").iterdir()) == ["parity.json", "sft-q8_0.gguf"]
    name = GGUFReader(run.path("export/sft-q8_0.gguf")).get_field("general.name").contents()
    assert name == f"{base.name}-sft"


def test_complete_and_readable_answers_are_counted(tmp_path, monkeypatch):
    """A student that has memorized two answers, one of them without tags."""
    folder = tiny_llama(tmp_path / "student")
    tokenizer, model = load_tokenizer(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    chats = [[{"role": "user", "content": each}] for each in ("Say A.", "Say B.")]
    known = ["<Step1>1 + 1 = 2.\n</Step1>\n<Generalized>Add.</Generalized>\n<Answer>2</Answer>", "It is 2."]
    pairs = zip(chats, known, strict=True)
    rows = [prompt_ids(tokenizer, chat) + tokenizer(text).input_ids + [2] for chat, text in pairs]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        for row in rows:
            model(torch.tensor([row]), labels=torch.tensor([row])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    gguf = tiny_gguf(folder, tmp_path / "student.gguf")
    trained, samples = Trained(folder, None, tokenizer), [Sample(chats[0], [known[0]])]
    answers = lambda: parity.compare_export(trained, gguf, {"f32": gguf}, samples, chats)["answers"]  # noqa: E731
    assert answers() == {"asked": 2, "ended": 2, "readable": 1}
    monkeypatch.setattr(parity, "ANSWER_TOKENS", 5)
    assert answers() == {"asked": 2, "ended": 0, "readable": 0}


def rounded(tensors, before):
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def scaled(tensors, before):
    name = "model.layers.1.mlp.down_proj.weight"
    return tensors | {name: tensors[name] * 1.05}


def merged_twice(tensors, before):
    return {name: (2 * each.float() - before[name].float()).to(each.dtype) for name, each in tensors.items()}


def not_merged(tensors, before):
    return before


@pytest.mark.parametrize("failure", [rounded, scaled, merged_twice, not_merged])
def test_wrong_weights_fail_the_export(base, run, instead, failure):
    def damage(folder):
        path, before = folder / "model-00001.safetensors", load_file(base / "model.safetensors")
        save_file(failure(load_file(path), before), path, metadata={"format": "pt"})
        return folder

    instead("convert_model", lambda convert, folder, *more, **named: convert(damage(folder), *more, **named))
    fail_to_export(config_of(base), run, r"sft-q8_0\.gguf does not match the trained model")
    assert exports_of(run, "sft") == []


def ffn_down(path):
    """The quantized bytes of a matrix in a GGUF: each block of q8_0 is a scale in float16 and 32 values."""
    return next(t for t in GGUFReader(path, "r+").tensors if t.name == "blk.1.ffn_down.weight").data


def noisy(path):
    """Noise in one quantized tensor."""
    data = ffn_down(path)
    data[:, 2:34] = np.random.default_rng(0).integers(0, 255, data[:, 2:34].shape, dtype=np.uint8)


def with_scaled_tensor(path):
    """One tensor times 1.05."""
    data = ffn_down(path)
    for start in range(0, data.shape[1], 34):
        scales = data[:, start : start + 2].copy().view("float16") * 1.05
        data[:, start : start + 2] = scales.astype("float16").view("uint8")


def with_scale_that_is_no_number(path):
    ffn_down(path)[0, :2] = np.array([np.nan], "float16").view("uint8")


def write_token(reader, token, text):
    tokens = reader.get_field("tokenizer.ggml.tokens")
    data = tokens.parts[tokens.data[token]]
    data[:] = np.frombuffer(text.ljust(len(data))[: len(data)].encode(), dtype=np.uint8)


def without_end_of_turn(path):
    """The end token differs, and llama.cpp does not recognize the trained one by its name."""
    reader = GGUFReader(path, "r+")
    reader.get_field("tokenizer.ggml.eos_token_id").parts[-1][0] = 3
    types = reader.get_field("tokenizer.ggml.token_type")
    types.parts[types.data[2]][0] = 1
    write_token(reader, 2, "<|im_eot|>")


def with_swapped_tokens(path):
    """<|im_start|> and <|im_end|> are swapped."""
    reader = GGUFReader(path, "r+")
    write_token(reader, 1, "<|im_end|>")
    write_token(reader, 2, "<|im_start|>")


def with_another_template(path):
    template = GGUFReader(path, "r+").get_field("tokenizer.chat_template").parts[-1]
    changed = bytes(template).replace(b"user\\n", b"uuer\\n", 1)
    template[:] = np.frombuffer(changed, dtype=np.uint8)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("fault", "quant", "messages"),
    [
        (noisy, "q8_0", ["sft-q8_0.gguf has a KL divergence"]),
        (with_scaled_tensor, "q8_0", ["blk.1.ffn_down.weight of sft-q8_0.gguf differs from the unquantized"]),
        (with_scale_that_is_no_number, "q8_0", ["KL divergence of nan nats", "differs from the unquantized"]),
        (without_end_of_turn, "q8_0", ["that ends a turn in training does not end one in sft-q8_0.gguf"]),
        (with_swapped_tokens, "q8_0", ["sft-q8_0.gguf splits"]),
        (with_another_template, "q8_0", ["sft-q8_0.gguf splits"]),
        (truncated, "q8_0", ["sft-q8_0.gguf"]),
        (without_end_of_turn, "q4_0", ["does not end one in sft-q4_0.gguf"]),
        (with_another_template, "q4_0", ["sft-q4_0.gguf splits"]),
    ],
)
def test_fault_in_a_finished_gguf_fails_the_export(base, run, instead, fault, quant, messages):
    """A fault in q4_0, the second of two files, fails the export of both."""

    def quantize_wrongly(quantize, source, out, *given):
        done = quantize(source, out, *given)
        if quant in out.name:
            fault(out)
        return done

    instead("quantize", quantize_wrongly)
    with pytest.raises(ScliteError) as error:
        export.export_model(config_of(base, "q8_0" if quant == "q8_0" else "q8_0,q4_0"), run, "sft")
    assert all(message in error.value.message for message in messages)
    assert error.value.code == (DATA if fault == truncated else FAILED)
    assert not list(run.path("export").glob("*.gguf"))


def test_next_tokens_alone_can_fail_the_export(base, run, instead):
    """A file with fewer bits than its name says, but a KL divergence within the limit for that name."""
    instead("quantize", lambda quantize, source, out, _, *given: quantize(source, out, "q3_k_m", *given))
    message = r"trained model: sft-q4_0.gguf has another next token at \d\d\.\d% of positions, near ties aside \(at most"
    assert "KL" not in fail_to_export(config_of(base, "q4_0"), run, message).message


@pytest.mark.parametrize(
    "figure",
    ["mean_abs_logprob_diff", "top1_agreement", "adapter_share", "largest_gap", "kl", "top1_up_to_ties"],
)
def test_nan_is_a_violation(figure):
    full = {"mean_abs_logprob_diff": 0.0, "top1_agreement": 1.0, "adapter_share": 1.0, "adapter_effect": 1.0}
    file = {"quantization": "q8_0", "kl": 0.0, "top1_agreement": 1.0, "top1_up_to_ties": 1.0, "changed": None}
    result = {
        "tokens_of": "sft-q8_0.gguf",
        "tokens_equal": 9,
        "tokens_compared": 9,
        "end_of_turn": "</s>",
        "skipped": None,
    }
    result |= {"unquantized": full, "greedy": {"largest_gap": 0.0}, "files": {"sft-q8_0.gguf": file}}
    parity.check_bounds(result, Export())
    next(part for part in (full, file, result["greedy"]) if figure in part)[figure] = float("nan")
    with pytest.raises(ScliteError, match="does not match the trained model"):
        parity.check_bounds(result, Export())


@pytest.fixture(autouse=True)
def _without_probe(request, monkeypatch):
    """GGUFs are not opened in another process first, except in tests of those that llama.cpp cannot open."""
    if "probe" not in request.fixturenames:
        monkeypatch.setattr(export, "check_gguf", lambda path: None)


@pytest.fixture
def probe():
    """GGUFs are opened in another process first."""


def test_several_types_share_one_merge_and_are_rewritten_if_one_is_damaged(base, run, instead):
    calls = []
    instead("merge", lambda merge, *given, **named: calls.append(given) or merge(*given, **named))
    config = config_of(base, "q4_k_m, Q8_0,bf16,q8_0")
    report = export.export_model(config, run, "sft")
    assert list(report.figures["files"]) == ["sft-q4_k_m.gguf", "sft-q8_0.gguf", "sft-bf16.gguf"]
    assert gguf_path(run, "sft", config).name == "sft-q4_k_m.gguf"
    kls = [figures["kl"] for figures in report.figures["parity"]["files"].values()]
    assert kls[0] > kls[1] > kls[2] > report.figures["parity"]["unquantized"]["kl"]
    assert len(calls) == 1
    assert not export.export_model(config_of(base, "f16"), run, "sft").skipped
    assert export.export_model(config, run, "sft").skipped
    path = run.path("export/sft-q8_0.gguf")
    path.unlink()
    assert not export.export_model(config, run, "sft").skipped
    path.write_bytes(path.read_bytes()[:1_000_000])
    with raises(DataError, r"llama\.cpp cannot load", hint="sclite export"):
        Engine(path)
    assert not export.export_model(config, run, "sft").skipped
    with Engine(path, parallel=1, context=256) as engine:
        assert engine.vocabulary.size == 512


INTERRUPTED = """
import sys
from pathlib import Path
from sclite.config import Config
from sclite.export import model
from sclite.run import Run

run, function, when, half = Run(sys.argv[1]), *sys.argv[3:]
owner, name = (model.parity, function[7:]) if function.startswith("parity.") else (model, function)
proceed = getattr(owner, name)

def wait(*given, **named):
    if when in str(given):
        if half:
            path = next(run.path(model.UNFINISHED).iterdir()) / half
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"GGUF")
        print("waiting", flush=True)
        sys.stdin.read()
    return proceed(*given, **named)

setattr(owner, name, wait)
model.export_model(Config.model_validate_json(sys.argv[2]), run, "sft")
"""
BOTH = ["sft-q4_0.gguf", "sft-q8_0.gguf"]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("function", "when", "half", "kept", "how"),
    [
        ("merge", "", "merged.part/model.safetensors", [], signal.SIGKILL),
        ("convert_model", "", "full-f16.gguf.part", ["merged-f16"], signal.SIGKILL),
        slow("quantize", "'q8_0'", "sft-q8_0.gguf.part", ["full-f16.gguf"], signal.SIGKILL),
        ("quantize", "'q4_0'", "sft-q4_0.gguf.part", ["full-f16.gguf", BOTH[1]], signal.SIGKILL),
        slow("quantize", "'q4_0'", "sft-q4_0.gguf.part", ["full-f16.gguf", BOTH[1]], signal.SIGINT),
        slow("parity.compare_export", "", "", ["full-f16.gguf", *BOTH], signal.SIGKILL),
        slow("sync", "sft-q8_0.gguf", "", ["full-f16.gguf", *BOTH], signal.SIGKILL),
        ("sync", "sft-q4_0.gguf", "", ["full-f16.gguf", BOTH[0]], signal.SIGKILL),
    ],
)
def test_killed_export_keeps_what_it_has_finished(base, run, monkeypatch, function, when, half, kept, how):
    config = config_of(base, "q8_0,q4_0")
    given = (str(run.folder), config.model_dump_json(), function, when, half)
    command = [sys.executable, "-c", INTERRUPTED, *given]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(how)
        process.wait()
    (work,) = run.path(export.UNFINISHED).iterdir()
    before = {path.name: path.stat().st_ino for path in work.iterdir()}
    assert set(before) == {*kept, *([half.partition("/")[0]] if half else [])}
    # of two files, the first can have its final name before the second
    whole = {path: path.read_bytes() for path in run.path("export").glob("*.gguf")}
    assert len(whole) == (when == "sft-q4_0.gguf")
    for name, finished in (("merge", kept), ("convert_model", "full-f16.gguf" in kept)):
        if finished:
            monkeypatch.setattr(export, name, None)
    report = export.export_model(config, run, "sft")
    after = {path.name: path.stat().st_ino for path in run.path("export").iterdir()}
    assert sorted(after) == ["parity.json", *BOTH]
    assert all(after[name] == before[name] for name in kept if name in after)
    assert all(path.read_bytes() == content for path, content in whole.items())
    assert report.figures["parity"]["files"]["sft-q4_0.gguf"]["kl"] < 0.5


def test_kept_files_of_another_adapter_are_rewritten(base, run, instead):
    config, calls = config_of(base, "q8_0,q4_0"), []

    def quantize_and_count(quantize, source, out, quant, importance):
        calls.append(quant)
        if calls == ["q8_0", "q4_0"]:
            raise KeyboardInterrupt
        return quantize(source, out, quant, importance)

    instead("quantize", quantize_and_count)
    with pytest.raises(KeyboardInterrupt):
        export.export_model(config, run, "sft")
    path = run.path("sft/adapter/adapter_model.safetensors")
    save_file({name: each * 2 for name, each in load_file(path).items()}, path, metadata={"format": "pt"})
    export.export_model(config, run, "sft")
    assert calls == ["q8_0", "q4_0", "q8_0", "q4_0"]


def test_type_below_five_bits_gets_an_importance_matrix_from_the_run(base, run):
    rows = enumerate(text.split("\n", 1) for text in sample_texts(30))
    templates = [Template(id=str(i), question=q, trace=t, answer="1") for i, (q, t) in rows]
    run.replace("templates.jsonl", templates)
    configs = [config_of(base, "q3_k_m", imatrix=imatrix) for imatrix in (None, False)]
    with_it, without = (export.export_model(each, run, "sft").figures["parity"] for each in configs)
    assert (with_it["importance"], without["importance"]) == (["q3_k_m"], [])
    run.replace("templates.jsonl", templates[:8])
    report = export.export_model(config_of(base, "q3_k_m,q8_0", imatrix=None), run, "sft")
    assert report.figures["parity"]["importance"] == []
    (named,) = [each for each in report.figures["warnings"] if "importance matrix" in each]
    assert named.startswith("sft-q3_k_m.gguf: written without an importance matrix: too few rows")
    assert with_it["files"]["sft-q3_k_m.gguf"]["kl"] < without["files"]["sft-q3_k_m.gguf"]["kl"]


def test_compared_samples_are_spread_over_all_and_not_those_of_the_importance_matrix():
    rows = [Sample((), [f"{kind} {n}"]) for kind in ("template", "attempt", "review") for n in range(30)]
    held_out, rest = split_samples([*rows[:2], *rows])
    assert held_out[:2] == rows[:2]
    assert sorted(held_out[2:] + rest) == sorted(rows)
    assert len(held_out[2:]) == 8
    for part in (held_out[2:], rest[:9]):  # a large vocabulary leaves memory for the first ones only
        assert {sample.pieces[0].split()[0] for sample in part} == {"template", "attempt", "review"}
    assert split_samples(rows[:10])[1] == []


@pytest.mark.parametrize(
    ("function", "size"), [("export_model", "6 MB"), ("export_merged", "3 MB"), ("export_lora", "6 MB")]
)
def test_too_small_or_full_disk_is_an_error_and_leaves_no_files(base, run, monkeypatch, function, size):
    write = getattr(export, function)
    with monkeypatch.context() as small:
        small.setattr(export.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
        small.setattr(export, "merge", None)
        with pytest.raises(ScliteError, match=rf"needs about {size} of disk space .* but only 1 MB are free"):
            write(config_of(base), run, "sft")
    monkeypatch.setattr(export, "converter", lambda: None)
    monkeypatch.setattr(export, "run_script", lambda *given: None)
    with raises(ScliteError, "cannot be written", hint="disk space"), file_limit(100_000):
        write(config_of(base), run, "sft")
    assert list(run.path("export").iterdir()) == []


def test_bounds_come_from_the_configuration_even_after_the_export(base, run):
    config = config_of(base, max_kl='{"q8_0": 1e-9}')
    assert config.export.max_kl["q4"] == Config().export.max_kl["q4"]
    export.export_model(config_of(base), run, "sft")
    ollama.write_modelfile(run, config, "sft")
    message = r"sft-q8_0.gguf has a KL divergence of .* \(at most 1e-09\)"
    with pytest.raises(ScliteError, match=message):
        export.export_model(config, run, "sft")
    assert export.export_model(config_of(base), run, "sft").skipped
    run.path("export/sft-q8_0.gguf").write_bytes(b"GGUF")
    fail_to_export(config, run, message, left=("parity.json", "Modelfile", "README.md"))


def test_modelfile_and_card_stay_those_of_the_student_that_was_trained_last(base, run):
    """Whatever else is exported; `sclite eval --models base` does this."""
    context = Context(config_of(base), run, ProgressDisplay(quiet=True))
    exports.export(context)
    for earlier in (["base"], ["sft"]):
        if earlier == ["sft"]:
            shutil.copytree(run.path("sft/adapter"), run.path("dpo/adapter"))
            exports.export(context)
        last = context.students()[-1]
        described = {name: run.path(f"export/{name}").read_text() for name in ("Modelfile", "README.md")}
        assert described["Modelfile"].startswith(f"FROM ./{last}-q8_0.gguf\n")
        assert f"\n# {base.name}-{last}\n" in described["README.md"]
        run.path(f"export/{earlier[0]}-q8_0.gguf").unlink(missing_ok=True)
        (report,) = exports.export(context, earlier)
        assert not report.skipped
        assert run.path(f"export/{earlier[0]}-q8_0.gguf").is_file()
        assert {name: run.path(f"export/{name}").read_text() for name in described} == described


def test_chat_uses_a_gguf_of_the_newest_adapter_in_any_quantization(base, run):
    """A retrained student is exported first; files of the earlier one are no substitute."""
    display = ProgressDisplay(quiet=True)
    context = {quant: Context(config_of(base, quant), run, display) for quant in ("q8_0", "f16")}
    chosen = lambda quant: exports.for_chat(context[quant], None, False)[0].name  # noqa: E731
    for quant in context:
        exports.export(context[quant])
    before = {path: path.read_bytes() for path in run.path("export").glob("*.gguf")}
    assert [chosen(quant) for quant in context] == ["sft-q8_0.gguf", "sft-f16.gguf"]
    assert {path: path.read_bytes() for path in before} == before
    random_adapter(base, run.path("sft/adapter"), std=0.05, r=4, target_modules=LINEAR)
    assert [chosen("f16"), chosen("q8_0")] == ["sft-f16.gguf", "sft-f16.gguf"]
    assert [path.name for path in before if path.read_bytes() == before[path]] == ["sft-q8_0.gguf"]


def test_gguf_for_sampling_has_the_name_of_the_student(base, run, tmp_path):
    """llama.cpp knows by the name whether spaces after special tokens count, as in Phi-3."""
    adapter = run.path("sft/adapter")
    made = export.write_sampling_gguf(config_of(base), adapter, tmp_path / "work", small=False)
    name = GGUFReader(made).get_field("general.name").contents()
    assert name.lower().replace(" ", "-") == f"{base.name}-sft".lower()


def test_finished_export_is_described_where_it_is_now_and_a_failed_one_not(base, run, tmp_path):
    shutil.copytree(run.path("sft/adapter"), run.path("dpo/adapter"))
    for name in ("sft", "dpo"):
        export.export_model(config_of(base), run, name)
    moved = Run(run.folder.rename(tmp_path / "moved"))
    report = export.export_model(config_of(base), moved, "sft")
    assert (report.stage, report.skipped) == ("export-sft", True)
    assert report.figures["gguf"] == str(moved.path("export/sft-q8_0.gguf"))
    kept = json.loads(moved.path("export/parity.json").read_text())
    assert list(kept["files"]) == ["sft-q8_0.gguf"]
    path = moved.path("sft/adapter/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read"):
        export.export_model(config_of(base), moved, "sft")
    assert not moved.path("export/parity.json").exists()


def test_texts_longer_than_the_student_supports_are_not_compared(base, run, monkeypatch):
    chats = export.read_samples(config_of(base), run)
    student = Trained(base, None, AutoTokenizer.from_pretrained(base))
    lengths = sorted(len(student.ids(sample)) for sample in chats)
    monkeypatch.setattr("sclite.export.reference.max_positions", lambda _: lengths[-1] - 1)
    assert [len(ids) for ids, _ in student.held_out(chats)] == lengths[:-1]


def test_merged_folder_is_what_was_trained(base, run, monkeypatch):
    found, folder = export.export_merged(config_of(base), run, "sft"), run.path("export/sft-merged")
    assert found["merged"] == str(folder)
    assert found["chats_equal"] == found["chats_compared"] == 2
    assert found["top1_agreement"] > 0.99
    assert 0 <= found["kl"] < 1e-3
    assert [path.name for path in run.path("export").iterdir()] == ["sft-merged"]
    ids = torch.tensor([list(range(300, 340))])
    # bfloat16 would round the adapter away
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float16
    before, merged = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (base, folder))
    trained = PeftModel.from_pretrained(before, run.path("sft/adapter"))
    with torch.inference_mode():
        assert torch.allclose(trained(ids).logits, merged(ids).logits, atol=0.02)
    removed, remove = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **named: (removed.append(path), remove(path, **named)))
    export.export_merged(config_of(base), run, "sft")  # again: files at their final path are not removed
    assert folder not in removed
    assert [path.name for path in run.path("export").iterdir()] == ["sft-merged"]
    template = AutoTokenizer.from_pretrained(folder).chat_template
    assert '"<|im_start|>user\\n"' in template
    assert "message['role'] + " not in template


def forgotten_adapter(folder, base):
    shutil.copy(base / "model.safetensors", folder / "model-00001.safetensors")


def changed_template(folder, base):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("user", "uuer"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (forgotten_adapter, "it has a KL divergence of"),
        (changed_template, "its tokenizer reads 2 of 2 chats differently"),
    ],
)
def test_merged_folder_of_another_model_is_not_exported(base, run, instead, fault, message):
    def write_wrongly(write_format, form, tokenizer, folder):
        write_format(form, tokenizer, folder)
        fault(folder, base)

    instead("write_format", write_wrongly)
    with pytest.raises(ScliteError, match=rf"^sft-merged does not match the trained model: {message}"):
        export.export_merged(config_of(base, max_kl={"f16": 1e-5}), run, "sft")
    assert list(run.path("export").iterdir()) == []


@pytest.mark.parametrize("skipped", [None, ["lm_head", "model.layers.0.mlp.down_proj"]])
def test_adapter_trained_in_nf4_is_merged_into_nf4_weights(base, run, tmp_path, skipped):
    """Unsloth keeps some layers in 16 bits, such as those of Mamba."""
    pytest.importorskip("bitsandbytes")
    folder, settings = run.path("sft/adapter"), {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    settings["quantization_config"] = BitsAndBytesConfig(  # as in `load_plain`
        load_in_4bit=True,
        llm_int8_skip_modules=skipped,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(base, **settings)
    record_origin(random_adapter(model, folder, std=0.01, r=4, target_modules=LINEAR), base, folder)
    kept = json.loads((folder / "trained_on.json").read_text())
    assert len(kept["nf4"]) == 2 * 7 - bool(skipped)
    figures = export.export_model(config_of(base, "f16"), run, "sft").figures["parity"]["unquantized"]
    ids = list(range(300, 400))
    plain = AutoModelForCausalLM.from_pretrained(base, **settings)
    trained = PeftModel.from_pretrained(plain.dequantize().float(), folder)
    with torch.inference_mode():
        wanted = trained(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    (found,) = reference.compute_references(base, folder, [(ids, 1)])
    assert np.abs(found.trained - wanted).max() < 1e-3
    (folder / "trained_on.json").write_text(json.dumps(kept | {"nf4": []}))
    references = reference.compute_references(base, folder, [(ids, 1)])
    sixteen = parity.compare_probabilities(references, run.path("export/sft-f16.gguf"))
    assert figures["mean_abs_logprob_diff"] < 0.004
    assert sixteen["mean_abs_logprob_diff"] > 10 * figures["mean_abs_logprob_diff"]


def sign_sft(run, config):
    report = Report("sft", counts={"rows": 12})
    report.figures["adapter"] = run.file_digest("sft/adapter/adapter_model.safetensors")
    run.sign("sft", training_inputs(config, run, "sft"), report)


def evaluated(run, config, folder, *names):
    figures = {"n": 50, "acc_t1": 0.5, "acc_t1_interval": [0.4, 0.6], "acc_t2": None, "acc_t2_interval": None}
    digests = {name: source_digest(config, run, name) for name in names}
    models = {n: {**figures, "file": f"{n}-q8_0.gguf", "made_from": digests[n]} for n in names}
    run.write_json(f"eval/{folder}/summary.json", {"models": models})


def test_model_card_has_the_settings_and_figures_of_the_model_that_it_describes(base, run):
    """Neither the current configuration, nor measurements of an earlier adapter."""
    config, figures = config_of(base), {"files": {}}
    sign_sft(run, config)
    evaluated(run, config, "first", "base", "sft")
    today = {"sft": {"num_train_epochs": 9, "learning_rate": 1e-6}, "lora": {"r": 4}, "seed": 7}
    today = Config.model_validate(config.model_dump() | today)
    card = build_model_card(today, run, "sft", "gguf", figures)
    assert "\n- sft: 12 rows, 3 epochs, learning rate 0.0001, seed 0; LoRA r 32, alpha 64\n" in card
    assert "| sft-q8_0.gguf | 50 |" in card
    random_adapter(base, run.path("sft/adapter"), std=0.02, r=4, target_modules=LINEAR)
    card = build_model_card(config, run, "sft", "gguf", figures)
    assert "\n- sft: unknown\n" in card
    assert "| base-q8_0.gguf | 50 |" in card
    assert "| sft-q8_0.gguf | 50 |" not in card
    evaluated(run, config, "first", "sft")
    assert "| sft-q8_0.gguf | 50 |" in build_model_card(config, run, "sft", "gguf", figures)
    evaluated(run, today, "first", "sft")
    random_adapter(base, run.path("sft/adapter"), std=0.03, r=4, target_modules=LINEAR)
    assert "Not evaluated" in build_model_card(config, run, "sft", "gguf", figures)


def test_model_card_of_dpo_lists_every_stage(base, run):
    config, wanted = config_of(base), ("sft", "warmup", "dpo")
    for stage in wanted:
        run.path(f"{stage}/adapter").mkdir(parents=True, exist_ok=True)
        run.path(adapter_weights(stage)).write_bytes(stage.encode())
        report = Report(stage, {"rows": 3}, figures={"adapter": run.file_digest(adapter_weights(stage))})
        run.sign(stage, training_inputs(config, run, stage), report)
    card = build_model_card(config, run, "dpo", "lora", {})
    assert re.findall("^- (sft|warmup|dpo): 3 rows", card, re.M) == [*wanted]
    run.path(adapter_weights("sft")).write_bytes(b"imported")
    card = build_model_card(config, run, "dpo", "lora", {})
    found = re.findall("^- (sft|warmup|dpo): (3 rows|unknown)", card, re.M)
    assert found == [("sft", "unknown"), ("warmup", "3 rows"), ("dpo", "3 rows")]


def test_model_card_has_base_files_and_evaluation(base, run):
    known = {"problems": {"source": "openai/gsm8k"}, "teacher": {"model": "openai/large"}}
    config = Config.model_validate(config_of(base).model_dump() | known)
    sign_sft(run, config)
    report = export.export_model(config, run, "sft")
    assert ollama.write_modelfile(run, config, "sft")[1] == report.figures["warnings"]
    text = run.path("export/README.md").read_text()
    assert "Not evaluated" in text
    assert "\nsclite serve --model sft-q8_0.gguf\n" in text
    assert "The chat template is the one used in training" in text
    keeping = Config.model_validate(config.model_dump() | {"export": {"keep_template": True}})
    own = build_model_card(keeping, run, "sft", "gguf", report.figures)
    assert f"The chat template is that of {base.name}, unchanged" in own
    assert "one used in training" not in own
    evaluated(run, config, "test", "sft")
    summary = run.read_json("eval/test/summary.json")
    summary["models"]["openai//data/alice/Qwen"] = summary["models"]["sft"] | {"file": "", "made_from": ""}
    run.write_json("eval/test/summary.json", summary)
    run.path("eval/damaged").mkdir()
    run.path("eval/damaged/summary.json").write_text("{")
    ollama.write_modelfile(run, config, "sft")
    card = ModelCard.load(run.path("export/README.md"))
    assert card.data.to_dict()["pipeline_tag"] == "text-generation"
    kl = report.figures["parity"]["files"]["sft-q8_0.gguf"]["kl"]
    for line in (
        "- Problems: openai/gsm8k (train)",
        "- Teacher: openai/large",
        "- sft: 12 rows, 3 epochs, learning rate 0.0001, seed 0; LoRA r 32, alpha 64",
        f"| sft-q8_0.gguf | {report.figures['megabytes']:g} MB | {kl:.4f} |",
        "| sft-q8_0.gguf | 50 | 50.0% [40.0%, 60.0%] | unknown |",
        "| openai/Qwen | 50 | 50.0% [40.0%, 60.0%] | unknown |",
    ):
        assert f"\n{line}\n" in card.text
    assert str(base) not in card.text


def test_tokenizer_that_aborts_llama_cpp_is_an_error(base, run, monkeypatch, probe):
    """Without byte tokens llama.cpp aborts with an uncaught std::out_of_range."""
    add = GGUFWriter.add_token_list
    without_bytes = lambda self, tokens: add(self, [token.replace(b"<0x", b"<1x") for token in tokens])  # noqa: E731
    monkeypatch.setattr(GGUFWriter, "add_token_list", without_bytes)
    error = fail_to_export(config_of(base), run, r"llama.cpp cannot read .*signal 6", code=DATA, left=())
    assert "another base model" in error.hint


def test_token_that_the_gguf_splits_differently_fails_the_export(base, run, tmp_path):
    """An added token that only tokenizer.json defines: transformers finds it in text, the GGUF does not."""
    folder = tmp_path / "added"
    shutil.copytree(base, folder)
    kept = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    merges = kept["model"]["merges"]
    joined = ["".join(pair) for pair in merges]
    text = next(text for text in reversed(joined) if not any(text in each for each in merges))
    kept["model"]["merges"] = [pair for pair in merges if "".join(pair) != text]
    number = kept["model"]["vocab"]["<Cause>"] = kept["model"]["vocab"].pop(text)
    kept["added_tokens"].append({"id": number, "content": "<Cause>", **settings})
    (folder / "tokenizer.json").write_text(json.dumps(kept), encoding="utf-8")
    fail_to_export(config_of(folder), run, r"sft-q8_0\.gguf splits .*<Cause>.* into tokens")


def test_adapter_of_another_base_is_not_exported(run, tmp_path):
    other = tiny_llama(tmp_path / "other", seed=5)
    message = "adapter .* was not trained on the weights in .*other"
    assert "student.model" in fail_to_export(config_of(other), run, message, code=DATA, left=()).hint


def test_model_with_other_names_is_compared_in_tokens_and_tensors(base, run, monkeypatch, instead):
    monkeypatch.setattr(parity, "compute_references", lambda *_: [])
    result = export.export_model(config_of(base), run, "sft").figures["parity"]
    assert "other names" in result["skipped"]
    assert "probabilities not compared" in parity.summarize(result)
    parity.check_bounds(result, Export())
    instead("quantize", lambda quantize, source, out, *given: (quantize(source, out, *given), noisy(out))[0])
    run.path("export/sft-q8_0.gguf").unlink()
    with pytest.raises(ScliteError, match=r"ffn_down.weight of sft-q8_0.gguf differs from the unquantized"):
        export.export_model(config_of(base), run, "sft")


def test_code_in_a_model_folder_does_not_run(base, run, converter, tmp_path):
    """Not in transformers, and not in llama.cpp's converter, which loads tokenizers with trust_remote_code=True."""
    ran = tmp_path / "ran"
    folder = tmp_path / "with-code"
    shutil.copytree(base, folder)
    (folder / "tokenizer.model").unlink()  # otherwise the converter would not use transformers
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').write('x')\nfrom transformers import PreTrainedTokenizerFast as T, LlamaConfig as C\n"
    )
    for name, settings in (
        ("config.json", {"auto_map": {"AutoConfig": "own.C"}, "architectures": ["DreamModel"]}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "own.T"]}}),
    ):
        found = json.loads((folder / name).read_text()) | settings
        (folder / name).write_text(json.dumps(found))
    with pytest.raises(DataError, match="converter cannot convert"):  # it is not a Dream model
        export.export_model(config_of(folder), run, "sft")
    assert not ran.exists()
    with pytest.raises(DataError):
        run_converter(converter, folder, tmp_path / "out.gguf")
    assert ran.exists()  # the converter runs the code of the unmerged folder

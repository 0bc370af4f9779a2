"""From a model folder to a GGUF: written by sclite or llama.cpp's converter, quantized, and compared with the original."""

import ctypes
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from packaging.requirements import Requirement
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sclite.config import Config
from sclite.errors import DataError, NetworkError, ScliteError, UsageError
from sclite.export import gguf as conversion
from sclite.export import parity, reference
from sclite.export.gguf import quantize, write_gguf
from sclite.export.model import export_lora
from sclite.export.reference import Sample
from sclite.student.adapters import record_origin
from sclite.student.base import Request
from sclite.student.llama_cpp.engine import Engine
from sclite.student.tokenization import TRICKY
from tests.toy import file_limit, raises, random_adapter, sample_texts, tiny_gguf, write_tokenizer

SYSTEM, USER = "Solve in steps.", "2 + 3?\n\nThink  well."
CHAT = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": USER})


@pytest.fixture(scope="module")
def gguf(student, tmp_path_factory):
    return tiny_gguf(student, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def read_all(path):
    reader = GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return values, {tensor.name: tensor for tensor in reader.tensors}


@pytest.fixture
def no_converter(tmp_path, monkeypatch):
    """llama.cpp's converter is not on this machine."""
    monkeypatch.delenv("SCLITE_LLAMA_CPP", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_lora(student, run):
    return export_lora(Config.model_validate({"student": {"model": str(student)}}), run, "sft")


@pytest.fixture
def grouped(student, tmp_path):
    """The student's folder with two key-value heads and an untied output head."""
    folder, shape = tmp_path / "grouped", LlamaConfig.from_pretrained(student)
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shape.num_key_value_heads, shape.tie_word_embeddings = 2, False
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("base", "outtype"), [("student", "f32"), ("student", "f16"), ("grouped", "f32")])
def test_writer_gives_the_same_file_as_llama_cpp(request, converter, tmp_path, base, outtype):
    folder, theirs = request.getfixturevalue(base), tmp_path / "theirs.gguf"
    ours = write_gguf(folder, tmp_path / "ours.gguf", outtype=outtype, title="Toy-1.4M-sft")
    conversion.run_converter(converter, folder, theirs, outtype=outtype, title="Toy-1.4M-sft")
    (our_values, our_tensors), (their_values, their_tensors) = read_all(ours), read_all(theirs)
    their_values.pop("general.size_label", None)
    assert our_values == their_values
    assert our_values["general.name"] == "Toy-1.4M-sft"
    assert set(our_tensors) == set(their_tensors)
    for name, tensor in our_tensors.items():
        other = their_tensors[name]
        assert tensor.tensor_type == other.tensor_type, name
        assert np.array_equal(tensor.data, other.data), name
    assert ("output.weight" in our_tensors) == (base == "grouped")


def test_small_llama_needs_no_converter(student, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "converter", lambda: pytest.fail("called the converter"))
    conversion.convert_model(student, tmp_path / "small.gguf")
    with Engine(tmp_path / "small.gguf", parallel=1, context=256) as engine:
        (reply,) = engine.generate([Request(CHAT, max_tokens=3)])
    assert reply.tokens == 3


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 16, "use_rslora": True}], ids=["plain", "rslora"])
def test_adapter_gguf_on_its_base_matches_peft(student, gguf, converter, run, settings):
    settings = {"lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings
    folder = run.path("sft/adapter")
    trained = random_adapter(student, folder, std=0.05, **settings).eval()
    record_origin(trained, student, folder)
    origin = json.loads((folder / "trained_on.json").read_text())
    origin["nf4"] = ["model.layers.0.mlp.gate_proj"]  # not with a GGUF of the base
    (folder / "trained_on.json").write_text(json.dumps(origin))
    found = write_lora(student, run)
    assert Path(found["lora"]) == run.path("export/sft-lora.gguf")
    assert sorted(path.name for path in run.path("export").iterdir()) == ["sft-lora.gguf", "sft-lora.md"]
    assert found["adapter_share"] == pytest.approx(1, abs=0.01)
    name = GGUFReader(found["lora"]).get_field("general.name").contents()
    assert name == f"{student.name} sft".title()
    ids = [1, 300, 301, 302, 50, 60]
    with Engine(gguf, parallel=1, context=256, exact=True) as engine:
        plain = engine.log_probabilities(ids)
    with Engine(gguf, parallel=1, context=256, exact=True) as applied:
        api, context = applied.scheduler.api, applied.scheduler.context
        loaded = api.llama_adapter_lora_init(api.llama_get_model(context), found["lora"].encode())
        assert loaded
        loras = (api.llama_adapter_lora_p_ctypes * 1)(loaded)
        api.llama_set_adapters_lora(context, loras, 1, (ctypes.c_float * 1)(1.0))
        beside = applied.log_probabilities(ids)
    with torch.inference_mode():
        wanted = trained(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    assert np.abs(beside - wanted).max() < 0.02  # the LoRA is in float16
    assert np.abs(plain - wanted).max() > 0.1


def test_adapter_gguf_that_is_another_model_is_not_exported(student, converter, run, monkeypatch):
    """As written by llama.cpp's converter, which does not support rank-stabilized scaling."""
    settings = {"r": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
    random_adapter(student, run.path("sft/adapter"), std=0.05, **settings)
    monkeypatch.setattr("sclite.export.model.math", SimpleNamespace(sqrt=lambda _: 1.0))
    message = r"^sft-lora.gguf does not match the trained model: .*% of the adap"
    with raises(ScliteError, message, hint="--format gguf"):
        write_lora(student, run)
    assert list(run.path("export").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"modules_to_save": ["norm"]}, "its own modules_to_save, which a LoRA file cannot store"),
        ({"alpha_pattern": {"q_proj": 40}}, "its own alpha_pattern"),
        ({"rank_pattern": {"q_proj": 4}, "use_rslora": True}, "its own rank_pattern"),
    ],
    ids=["saved", "alpha", "rank"],
)
def test_adapter_that_a_lora_file_cannot_store_is_rejected(student, run, settings, reason):
    random_adapter(student, run.path("sft/adapter"), r=2, target_modules=["q_proj"], **settings)
    with raises(DataError, reason, hint="--format gguf"):
        write_lora(student, run)
    assert list(run.path("export").iterdir()) == []


def test_missing_converter_is_a_network_error_with_instructions(no_converter, student, tmp_path, monkeypatch):
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", ""), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    with pytest.raises(NetworkError, match="cannot download") as error:
        conversion.converter()
    assert "pip download --no-deps --no-binary llama-cpp-python" in error.value.hint
    assert "SCLITE_LLAMA_CPP" in error.value.hint
    other = shutil.copytree(student, tmp_path / "qwen")
    shape = (other / "config.json").read_text().replace("LlamaForCausalLM", "Qwen2ForCausalLM")
    (other / "config.json").write_text(shape)
    with pytest.raises(NetworkError):
        conversion.convert_model(other, tmp_path / "other.gguf")


def test_only_a_source_distribution_with_the_pinned_digest_is_unpacked(no_converter, tmp_path, monkeypatch):
    sdist, digests = tmp_path / "llama_cpp_python.tar.gz", {version("llama_cpp_python"): "0" * 64}
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("convert_hf_to_gguf.py", "gguf-py/gguf/__init__.py", "src/llama.cpp"):
            entry = tarfile.TarInfo(f"llama_cpp_python/vendor/llama.cpp/{name}")
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))

    def download(command, **_):
        shutil.copy(sdist, command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(conversion.subprocess, "run", download)
    monkeypatch.setattr(conversion, "SHA256", digests)
    with pytest.raises(ScliteError, match="not the published one"):
        conversion.converter()
    assert not (tmp_path / "cache").exists()
    digests[version("llama_cpp_python")] = hashlib.sha256(sdist.read_bytes()).hexdigest()
    folder = conversion.converter()
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert files == {name: name for name in ("convert_hf_to_gguf.py", "gguf-py/gguf/__init__.py")}
    assert list(folder.parent.iterdir()) == [folder]
    monkeypatch.setenv("SCLITE_LLAMA_CPP", str(tmp_path))
    with pytest.raises(UsageError, match="convert_hf_to_gguf"):
        conversion.converter()
    monkeypatch.delenv("SCLITE_LLAMA_CPP")
    monkeypatch.setattr(conversion, "version", lambda _: "0.4.0")
    with pytest.raises(ScliteError, match=r"does not know .* llama-cpp-python 0\.4\.0"):
        conversion.converter()


def test_every_admitted_version_of_llama_cpp_python_has_a_pinned_digest():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (admitted,) = re.findall(r'"(llama-cpp-python[^"]*)"', text)
    newest = max(conversion.SHA256, key=lambda v: tuple(map(int, v.split("."))))
    after = re.sub(r"\d+$", lambda last: str(int(last[0]) + 1), newest)
    assert all(Requirement(admitted).specifier.contains(v) for v in conversion.SHA256)
    assert not Requirement(admitted).specifier.contains(after)
    assert version("llama_cpp_python") in conversion.SHA256


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("import sys; sys.exit('Model Foo is not supported')", "Model Foo is not supported"),
        ("len(\n  (1, 2)[3])", "IndexError: tuple index out of range"),
        # Python marks a part of the line above AssertionError
        ("assert (1, 2)[1] == 3", r"assert \(1, 2\)\[1\] == 3"),
    ],
)
def test_converter_failure_reports_the_reason_and_leaves_no_file(student, tmp_path, failure, reason):
    (tmp_path / conversion.SCRIPT).write_text(failure)
    with raises(DataError, reason, hint="--format merged"):
        conversion.run_converter(tmp_path, student, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


FULL_DISK = """
import sys
print("OSError: [Errno 28] No space left on device", file=sys.stderr)
sys.exit("\\rWriting:  64%|######3   | 4.61M/7.23M [00:00<00:00, 211Mbyte/s]")
"""


@pytest.mark.parametrize("real", [False, True])
def test_disk_that_fills_up_during_the_conversion_is_reported(request, student, tmp_path, real):
    """The converter's progress bar ends after the error."""
    (tmp_path / conversion.SCRIPT).write_text(FULL_DISK)
    source = request.getfixturevalue("converter") if real else tmp_path
    message = r"cannot convert .*OSError: .*(No space|and .* written)"
    with raises(DataError, message, hint="free some space"), file_limit(1_000_000):
        conversion.run_converter(source, student, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["q8_0", "q4_k_m", "q6_k", "q4_0", "q2_k", "iq4_xs", "bf16"])
def test_quantized_file_is_smaller_and_runs(gguf, tmp_path, name):
    out = tmp_path / "small.gguf"
    quantize(gguf, out, name)
    assert out.stat().st_size < 0.7 * gguf.stat().st_size
    assert parity.compare_tensors(gguf, out, name)["changed"] is None
    with Engine(out, parallel=1, context=256) as engine:
        (reply,) = engine.generate([Request(CHAT, max_tokens=3)])
    assert reply.tokens == 3
    assert not list(tmp_path.glob("*.part"))


def test_type_with_blocks_of_32_has_no_fallback(tmp_path):
    """With rows of 64 values: iq4_nl supports them, and only its larger types fall back."""
    write_tokenizer(tmp_path / "narrow", sample_texts(), vocab_size=512)
    shape = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    shape.num_attention_heads = shape.num_key_value_heads = 2
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "narrow")
    full = tiny_gguf(tmp_path / "narrow", tmp_path / "full.gguf")
    fallback = {}
    for name in ("q4_k_m", "iq4_nl"):
        quantize(full, tmp_path / "small.gguf", name)
        fallback[name] = parity.compare_tensors(full, tmp_path / "small.gguf", name)["fallback"]
    assert re.match(r"\d tensors have rows not divisible by 256 and are stored as .*q5_0", fallback["q4_k_m"])
    assert "iq4_nl" not in fallback["iq4_nl"]


def test_unknown_type_is_an_error_that_lists_the_known_ones(gguf, tmp_path):
    with pytest.raises(UsageError, match="q4_k_x") as error:
        quantize(gguf, tmp_path / "x.gguf", "q4_k_x")
    for known in ("q4_k_m", "f32", "f16", "bf16", "q5_k_m", "q6_k", "q8_0", "q4_0"):
        assert f" {known}" in error.value.hint


@pytest.mark.parametrize(
    ("name", "limit"), [("iq2_xxs", None), ("q8_0", 100_000)], ids=["no-importance", "full-disk"]
)
def test_quantization_that_fails_names_the_remedies(gguf, tmp_path, name, limit):
    message, hint = (
        f"cannot quantize .* to {name}: ",
        "choose another type (export.quant), or free some disk space",
    )
    with raises(DataError, message, hint=hint), file_limit(limit):
        quantize(gguf, tmp_path / "x.gguf", name)
    assert not list(tmp_path.iterdir())


def test_damaged_file_is_an_error_and_leaves_nothing(gguf, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:100_000])
    with pytest.raises(DataError):
        quantize(broken, tmp_path / "x.gguf", "q8_0")
    assert not list(tmp_path.glob("x.gguf*"))


def test_parity_of_a_float32_file_is_exact(student, gguf):
    tokenizer = AutoTokenizer.from_pretrained(student)
    texts = ["</Step1>\n<Cause>", "  12 €\n\n", *sample_texts(4)]
    found = parity.compare_tokens(tokenizer, gguf, [Sample(CHAT, texts)])
    assert found["tokens_equal"] == found["tokens_compared"] == len(TRICKY) + 7
    assert found["differences"] == []
    sequences = [(tokenizer(text).input_ids, 1) for text in texts[2:]]
    found = parity.compare_probabilities(reference.compute_references(student, None, sequences), gguf)
    assert json.loads(json.dumps(found)) == found
    assert found["positions"] > 200
    assert found["top1_agreement"] > 0.99
    assert found["mean_abs_logprob_diff"] < 1e-4
    assert found["adapter_share"] is None

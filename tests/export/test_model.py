"""The export stage: a GGUF is published only if it matches the trained model."""

import json
import shutil

import pytest

from sclite.config import Config
from sclite.errors import FAILED, DataError, ScliteError
from sclite.export import gguf, parity
from sclite.export import model as export
from sclite.run import Run
from sclite.student.llama_cpp.engine import Engine
from sclite.student.llama_cpp.probe import check_gguf
from sclite.student.origin import record_origin
from tests.tiny import sample_texts, tiny_llama

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small Llama in bfloat16, like most models on the Hub."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path_factory.mktemp("base"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A LoRA whose changes are about as large as bfloat16 rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    return save_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), base, folder)


def save_adapter(model, base, folder):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.003)
    model.save_pretrained(folder)
    record_origin(model, base, folder)
    return folder


@pytest.fixture
def run(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "run/sft/adapter")
    return Run(tmp_path / "run")


def config_of(base, quant="q8_0"):
    return Config.model_validate({"student": {"model": str(base)}, "export": {"quant": quant}})


def test_parity_describes_the_exported_file(base, run):
    report = export.export_model(config_of(base), run, "sft")
    kept = json.loads(run.path("export/parity.json").read_text())
    assert kept == report.figures["parity"]
    assert (kept["file"], kept["quantization"], kept["skipped"]) == ("sft-q8_0.gguf", "q8_0", None)
    assert kept["tokens_equal"] == kept["tokens_compared"] > 5
    assert kept["unquantized"]["mean_abs_logprob_diff"] < kept["quantized"]["mean_abs_logprob_diff"]
    assert kept["unquantized"]["adapter_share"] == pytest.approx(1, abs=0.05)
    line = parity.summarize(kept)
    assert line.startswith("parity of sft-q8_0.gguf: tokens ")
    assert "\n" not in line
    assert sorted(path.name for path in run.path("export").iterdir()) == ["parity.json", "sft-q8_0.gguf"]


def rounded(tensors, before):
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def scaled(tensors, before):
    name = "model.layers.1.mlp.down_proj.weight"
    return tensors | {name: tensors[name] * 1.05}


def merged_twice(tensors, before):
    return {
        name: (2 * tensor.float() - before[name].float()).to(tensor.dtype) for name, tensor in tensors.items()
    }


def not_merged(tensors, before):
    return before


@pytest.mark.parametrize("failure", [rounded, scaled, merged_twice, not_merged])
def test_wrong_merge_fails_the_export(base, run, monkeypatch, failure):
    from safetensors.torch import load_file, save_file

    merge = export.merge

    def merge_wrongly(*given, **named):
        path = merge(*given, **named) / "model.safetensors"
        before = load_file(base / "model.safetensors")
        save_file(failure(load_file(path), before), path, metadata={"format": "pt"})
        return path.parent

    monkeypatch.setattr(export, "merge", merge_wrongly)
    with pytest.raises(ScliteError, match=r"sft-q8_0\.gguf does not match the trained model") as error:
        export.export_model(config_of(base), run, "sft")
    assert error.value.code == FAILED
    assert [path.name for path in run.path("export").iterdir()] == ["parity.json"]
    assert run.manifest("export-sft") is None


def test_adapter_trained_in_nf4_is_merged_into_nf4_weights(base, run, tmp_path):
    pytest.importorskip("bitsandbytes")
    import torch
    from transformers import AutoModelForCausalLM

    from sclite.student.loader import nf4_config

    settings = {"quantization_config": nf4_config(), "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    folder = run.path("sft/adapter")
    save_adapter(AutoModelForCausalLM.from_pretrained(base, **settings), base, folder)
    kept = json.loads((folder / "trained_on.json").read_text())
    assert len(kept["nf4"]) == 2 * 7
    figures = export.export_model(config_of(base, "f16"), run, "sft").figures["parity"]["unquantized"]
    other = kept | {"nf4": []}
    (folder / "trained_on.json").write_text(json.dumps(other))
    sixteen = parity.compare_probabilities(
        parity.compute_references(base, folder, [list(range(300, 400))]), run.path("export/sft-f16.gguf")
    )
    assert figures["mean_abs_logprob_diff"] < 0.004
    assert sixteen["mean_abs_logprob_diff"] > 10 * figures["mean_abs_logprob_diff"]


def test_damaged_gguf_is_exported_again_and_an_intact_one_is_skipped(base, run):
    config = config_of(base)
    assert not export.export_model(config, run, "sft").skipped
    assert export.export_model(config, run, "sft").skipped
    path = run.path("export/sft-q8_0.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"llama\.cpp cannot load") as error:
        check_gguf(path)
    assert "sclite export" in error.value.hint
    assert not export.export_model(config, run, "sft").skipped
    with Engine(path, parallel=1, context=256) as engine:
        assert engine.vocabulary_size == 512


def test_unfinished_file_is_ignored(run):
    from sclite import evaluation
    from sclite.context import Context
    from sclite.progress import ProgressDisplay

    run.path(export.UNFINISHED).mkdir(parents=True)
    run.path(f"{export.UNFINISHED}/sft-q4_k_m.gguf").write_bytes(b"GGUF")
    context = Context(Config(), run, ProgressDisplay(quiet=True))
    with pytest.raises(DataError, match="holds no GGUF"):
        evaluation.find_gguf(context, None)
    assert evaluation.fitted_gguf(context, run.path("export/sft-q8_0.gguf")) is None


def test_adapter_that_names_another_base_gives_a_warning(base, run):
    config = config_of(base)
    export.export_model(config, run, "sft")
    assert export.write_modelfile(run, config, "sft")[1] == []
    run.path("sft/adapter/trained_on.json").unlink()
    path = run.path("sft/adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/other"}))
    assert "was trained on org/other" in export.write_modelfile(run, config, "sft")[1][0]


def test_full_disk_is_an_error_and_leaves_no_files(base, run):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a write beyond the limit fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ScliteError, match="cannot be written") as error:
            export.export_model(config_of(base), run, "sft")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "disk space" in error.value.hint
    assert list(run.path("export").iterdir()) == []


def test_tokenizer_that_aborts_llama_cpp_is_an_error(base, run, monkeypatch):
    """Without byte tokens llama.cpp aborts with an uncaught std::out_of_range."""
    import gguf

    add = gguf.GGUFWriter.add_token_list
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_token_list",
        lambda self, tokens: add(self, [token.replace("<0x", "<1x") for token in tokens]),
    )
    with pytest.raises(DataError, match=r"llama.cpp cannot read .*signal 6") as error:
        export.export_model(config_of(base), run, "sft")
    assert "another base model" in error.value.hint
    assert list(run.path("export").iterdir()) == []


def test_tokenizer_larger_than_the_embedding_is_an_error(base, run, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(base, tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "more")
    tokenizer.add_tokens(["<Cause>"])
    tokenizer.save_pretrained(tmp_path / "more")
    with pytest.raises(DataError, match=r"ids up to 512 .* embedding 512 rows") as error:
        export.export_model(config_of(tmp_path / "more"), run, "sft")
    assert "resize_token_embeddings" in error.value.hint


def test_token_that_the_gguf_splits_differently_fails_the_export(base, run, tmp_path):
    """An added token that only tokenizer.json defines: transformers finds it in text, the GGUF does not."""
    folder = tmp_path / "added"
    shutil.copytree(base, folder)
    kept = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    merges = kept["model"]["merges"]
    text = next(
        "".join(pair) for pair in reversed(merges) if not any("".join(pair) in each for each in merges)
    )
    kept["model"]["merges"] = [pair for pair in merges if "".join(pair) != text]
    number = kept["model"]["vocab"].pop(text)
    kept["model"]["vocab"]["<Cause>"] = number
    kept["added_tokens"].append({"id": number, "content": "<Cause>", **settings})
    (folder / "tokenizer.json").write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(ScliteError, match=r"the GGUF splits .*<Cause>.* into tokens") as error:
        export.export_model(config_of(folder), run, "sft")
    assert error.value.code == FAILED
    assert [path.name for path in run.path("export").iterdir()] == ["parity.json"]


def test_probabilities_are_skipped_if_the_model_does_not_fit_in_memory(base, run, monkeypatch):
    monkeypatch.setattr(export, "available_ram", lambda: 1_000_000)
    result = export.export_model(config_of(base), run, "sft").figures["parity"]
    assert "GB of RAM needed" in result["skipped"]
    assert "probabilities not compared" in parity.summarize(result)
    assert parity.find_violations(result) == []


def test_code_in_a_model_folder_does_not_run(base, run, tmp_path, monkeypatch):
    """Not in transformers, and not in llama.cpp's converter, which loads tokenizers with trust_remote_code=True."""
    source = gguf.cache_folder()
    if not (source / gguf.SCRIPT).is_file():
        pytest.skip("llama.cpp's converter is not on this machine; `sclite export` downloads it")
    ran = tmp_path / "ran"
    folder = tmp_path / "with-code"
    shutil.copytree(base, folder)
    (folder / "tokenizer.model").unlink()  # or the converter would not use transformers
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
        gguf.run_converter(source, folder, tmp_path / "out.gguf")
    assert ran.exists()  # the converter runs the code of the unmerged folder


def test_trace_texts_have_the_same_tokens(base, run):
    export.export_model(config_of(base, "f16"), run, "sft")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    found = parity.compare_tokens(tokenizer, run.path("export/sft-f16.gguf"), sample_texts(20), [])
    assert (found["tokens_equal"], found["differences"]) == (20, [])

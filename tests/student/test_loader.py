"""Loading the student: which GPU is visible, when batches are padding-free, models that cannot be loaded."""

import json
import os
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from sclite.config import Sft, Student
from sclite.errors import DataError, DeviceError, NetworkError
from sclite.student import loader
from sclite.student.base import Request
from sclite.student.hf_model import HFModel
from sclite.student.loader import (
    check_tokenizer,
    fetch_model,
    is_padding_free,
    load_student,
    load_tokenizer,
    read_config,
    select_backend,
    select_gpu,
)
from tests.toy import raises, tiny_llama, toy_config


def shaped(*kinds, family="llama"):
    """A model configuration with nothing but its layer types."""
    shape = SimpleNamespace(layer_types=list(kinds) or None, model_type=family)
    return SimpleNamespace(get_text_config=lambda: shape)


def test_stateful_layers_are_never_padding_free():
    asked = Sft(padding_free=True)
    assert is_padding_free(shaped("full_attention", "sliding_attention"), Sft(), "unsloth")
    assert not is_padding_free(shaped("full_attention", family="granite"), Sft(), "unsloth")
    assert is_padding_free(shaped(), asked, "plain")
    assert not is_padding_free(shaped(), Sft(), "plain")
    assert not is_padding_free(shaped("linear_attention", "full_attention"), Sft(), "unsloth")
    assert not is_padding_free(shaped(family="gemma2"), Sft(), "unsloth")
    for mixing in (shaped("linear_attention"), shaped(family="gemma2")):
        with pytest.raises(DataError, match="would mix the rows"):
            is_padding_free(mixing, asked, "unsloth")


def test_weights_that_could_not_be_merged_are_refused_before_they_are_loaded(tmp_path):
    path = tiny_llama(tmp_path) / "config.json"
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantized))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"are quantized \(fp8\)") as error:
        load_student(toy_config(tmp_path), "sft", train=True)
    assert error.value.hint == "set student.model to the unquantized model"


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("3,1", "3"), ("", "")])
def test_default_is_the_first_visible_gpu(monkeypatch, before, after):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    select_gpu(None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def changed_tokenizer(folder, change):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama(folder))
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return toy_config(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.add_tokens(["<Cause>"]),
            r"up to 512 \('<Cause>' is 512\), but the model's embedding has only 512 rows",
        ),
        (lambda t: t.add_special_tokens({"pad_token": "[PAD]"}), r"'\[PAD\]' is 512"),
    ],
)
def test_token_without_embedding_is_rejected(tmp_path, change, said):
    name = changed_tokenizer(tmp_path / "student", change).student.model
    with raises(DataError, said, hint="resize_token_embeddings"):
        check_tokenizer(load_tokenizer(name), read_config(name), name)


def test_special_tokens_may_lack_embeddings_or_be_missing(tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    extra = {"additional_special_tokens": ["<image_soft_token>"]}
    config = changed_tokenizer(tmp_path / "student", lambda t: t.add_special_tokens(extra))
    model, tokenizer = load_student(config, "sft")
    check_tokenizer(tokenizer, model.config, "it")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    config = changed_tokenizer(tmp_path / "endless", lambda t: setattr(t, "eos_token", None))
    path = tmp_path / "endless/tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    tokenizer = load_tokenizer(config.student.model)  # which pads with the end of turn
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (None, "<|im_end|>")


def refused(status):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))
    return HfHubHTTPError(f"{status} Error", response=response)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        *((error("no route"), NetworkError) for error in (httpx.ProxyError, httpx.ReadError, TimeoutError)),
        (httpx.RemoteProtocolError("closed"), NetworkError),
        (refused(429), NetworkError),
        (refused(503), NetworkError),
        (refused(401), DataError),
        (OSError(28, "No space left on device"), DataError),
    ],
)
def test_failed_download_blames_the_network_or_the_name(monkeypatch, raised, kind):
    def snapshot_download(*_, **__):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with raises(kind, "the student me/model cannot be downloaded", hint="student.model"):
        fetch_model("me/model")


def test_a_gated_model_is_named_with_what_opens_it(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("You are trying to access a gated repo.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(DataError, match="gated repo") as error:
        fetch_model("me/model")
    assert "hf auth login" in error.value.hint


def test_a_model_without_safetensors_is_refused_before_it_is_trained(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="has no weights as safetensors") as error:
        fetch_model(str(tmp_path))
    assert "save_pretrained" in error.value.hint


@pytest.mark.parametrize(
    ("backend", "why", "trained"),
    [("auto", "too old", None), ("auto", "", "plain"), ("plain", "too old", "plain")],
)
def test_an_old_driver_is_an_error_not_a_training_on_the_cpu(monkeypatch, backend, why, trained):
    monkeypatch.setattr(loader, "has_driver", lambda: True)
    monkeypatch.setattr(loader, "cuda_failure", lambda: why)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    student = Student(backend=backend)
    if trained:
        assert select_backend(student) == trained
        return
    with pytest.raises(DeviceError, match="CUDA cannot be initialized: too old"):
        select_backend(student)


def test_weights_in_other_formats_are_not_downloaded(monkeypatch, tmp_path):
    (tmp_path / "model-1-of-1.safetensors").touch()
    files = ["config.json", "model-1-of-1.safetensors", "consolidated.safetensors", "original/params.json"]
    found = []
    listed = lambda _, **patterns: found.extend(filter_repo_objects(files, **patterns)) or tmp_path  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", listed)
    fetch_model("me/model")
    assert found == files[:2]


def test_code_in_a_model_folder_never_runs(tmp_path):
    folder, ran = tiny_llama(tmp_path / "student"), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    code = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", "own.T"]}
    for name in ("config.json", "tokenizer_config.json"):
        own = {"auto_map": code, "model_type": "own", "tokenizer_class": "Own"}
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | own))
    with raises(DataError, "cannot be loaded"):
        load_student(toy_config(folder), "sft")
    assert not ran.exists()


def test_adapter_does_not_convert_the_16_bit_inputs_of_autocast(tmp_path, monkeypatch):
    """PEFT would convert each to float32, and autocast back to 16 bits."""
    monkeypatch.setattr("sclite.student.backends.cpu_training_dtype", lambda _: torch.bfloat16)
    model, _ = load_student(toy_config(tiny_llama(tmp_path / "student")), "sft", train=True)
    seen = set()
    for name, module in model.named_modules():
        if "lora_A.default" in name:
            module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert seen == {torch.bfloat16}


ASK = Request(({"role": "user", "content": "Tom has 20 nuts. He buys 11 more."},), max_tokens=40)


def test_settings_of_the_checkpoint_change_nothing(folder):
    model, tokenizer = load_student(toy_config(folder, student={"load_in_4bit": False}), "sft")
    student = HFModel(model, tokenizer)
    before = list(student.generate([ASK]))
    model.generation_config.repetition_penalty = 5.0
    assert list(HFModel(model, tokenizer).generate([ASK])) == before

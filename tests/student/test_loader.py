"""Loading the student: which GPU is visible, when batches are padding-free, adapters that do not fit."""

import os
import shutil
from types import SimpleNamespace

import pytest

from sclite.config import Sft
from sclite.errors import DataError
from sclite.student.adapters import load_adapter
from sclite.student.loader import is_padding_free, load_student, select_gpu
from tests.tiny import tiny_llama
from tests.train.test_sft import config_of


def shaped(*kinds):
    """A model configuration of which only the kinds of its layers are known."""
    shape = SimpleNamespace(layer_types=list(kinds) or None, model_type="qwen3_5_text")
    return SimpleNamespace(get_text_config=lambda: shape)


def test_stateful_layers_are_never_padding_free():
    asked = Sft(padding_free=True)
    assert is_padding_free(shaped("full_attention", "sliding_attention"), Sft(), "unsloth")
    assert is_padding_free(shaped(), asked, "plain")
    assert not is_padding_free(shaped(), Sft(), "plain")
    assert not is_padding_free(shaped("linear_attention", "full_attention"), Sft(), "unsloth")
    with pytest.raises(DataError, match="would mix the rows"):
        is_padding_free(shaped("linear_attention"), asked, "unsloth")


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("3,1", "3"), ("", "")])
def test_default_is_the_first_visible_gpu(monkeypatch, before, after):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    select_gpu(None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_cudnn_attention_is_disabled(tmp_path):
    import torch

    torch.backends.cuda.enable_cudnn_sdp(True)
    load_student(config_of(tiny_llama(tmp_path / "student")), "sft")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_adapter_of_another_shape_is_rejected(tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = load_student(config_of(tiny_llama(tmp_path / "student")), "sft", train=True)
    model.save_pretrained(tmp_path / "whole")
    load_adapter(model, tmp_path / "whole")
    whole = load_file(tmp_path / "whole/adapter_model.safetensors")
    renamed = {name.replace("layers.0", "layers.99"): value for name, value in whole.items()}
    wider = {name: value.repeat(2, 1) for name, value in whole.items()}
    for weights in (dict(list(whole.items())[2:]), renamed, wider):
        shutil.copytree(tmp_path / "whole", tmp_path / "other", dirs_exist_ok=True)
        save_file(weights, tmp_path / "other/adapter_model.safetensors")
        with pytest.raises(DataError, match="does not fit the student"):
            load_adapter(model, tmp_path / "other")

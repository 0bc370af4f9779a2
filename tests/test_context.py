"""The student that samples attempts and its own corrections: with llama.cpp if possible, else with transformers."""

import pytest
import torch

from sclite import prompts
from sclite.context import Context
from sclite.errors import NetworkError
from sclite.export import model as export
from sclite.progress import ProgressDisplay
from sclite.run import Run
from sclite.student.base import Request
from sclite.student.hf_model import HFModel
from sclite.student.llama_cpp import engine
from sclite.student.loader import load_student
from tests.toy import tiny_llama, toy_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Context:
    """A run whose SFT adapter changes every answer."""
    folder = tmp_path_factory.mktemp("sampling")
    config = toy_config(tiny_llama(folder / "student"), student={"load_in_4bit": False})
    run = Run(folder / "run")
    model, _ = load_student(config, "sft", train=True)
    torch.manual_seed(1)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.3)
    model.save_pretrained(run.path("sft/adapter"))
    return Context(config, run, ProgressDisplay(quiet=True))


def answers(student) -> list[str]:
    requests = [Request(prompts.solve_messages(f"What is {n} + 1?"), max_tokens=5) for n in range(4)]
    return [reply.text for reply in sorted(student.generate(requests), key=lambda reply: reply.index)]


@pytest.fixture(scope="module")
def expected(trained) -> list[str]:
    model, tokenizer = load_student(trained.config, "sft", trained.run.path("sft/adapter"))
    return answers(HFModel(model, tokenizer, 4))


def test_llama_cpp_samples_from_the_trained_student_and_leaves_no_file(trained, expected):
    left = trained.run.path("export/sampling/merged/model.safetensors")  # by a killed sampler
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    with trained.sampler("sft/adapter") as student:
        assert type(student) is engine.Engine
        assert answers(student) == expected
    assert not trained.run.path("export/sampling").exists()


def test_without_a_converter_transformers_samples(trained, expected, monkeypatch):
    def no_network(*_, **__):
        raise NetworkError("cannot download llama.cpp's converter", "connect")

    monkeypatch.setattr(export, "convert_model", no_network)
    warnings = []
    with trained.sampler("sft/adapter", lambda *_, warning: warnings.append(warning)) as student:
        assert type(student) is HFModel
        assert answers(student) == expected
    assert warnings == ["cannot download llama.cpp's converter: sampling with transformers, which is slower"]
    assert not trained.run.path("export/sampling").exists()


@pytest.mark.parametrize("offloads", [True, False], ids=["build_uses_the_gpu", "build_for_cpus_only"])
def test_on_a_gpu_llama_cpp_samples_in_8_bits_if_its_build_can_use_it(trained, offloads, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine.llama(), "llama_supports_gpu_offload", lambda: offloads)
    if not offloads:
        monkeypatch.setattr("sclite.student.loader.load_student", lambda *_: (_ for _ in ()).throw(Loaded))
        with pytest.raises(Loaded), trained.sampler("sft/adapter"):
            pass
        return
    with trained.sampler("sft/adapter") as student:
        assert "Q8_0" in student.description


class Loaded(Exception):
    """The model is loaded with transformers, which has no GPU on this machine."""

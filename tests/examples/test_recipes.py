"""Recipes for other trainers: each file passes its tool's parser or schema, and the TRL recipe trains on the CPU."""

import ast
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from sclite.export.datasets import FOLDER, export_data
from sclite.records import Pair, Problem
from sclite.student.loader import load_tokenizer
from sclite.train.dpo import build_bundles
from tests.toy import CHATML, export_config, make_run, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
TRL, AXOLOTL = ROOT / "examples/trl-multi-gpu", ROOT / "examples/axolotl"
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]
MISSING = "Axolotl is not installed: pip install axolotl==0.19.0 in a separate environment"
requires_axolotl = pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason=MISSING)
SHOWN = "message['content'] + '<|im_end|>\n' }}"
MARKED = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
CHOSEN = "'' }}{% if message['role'] == 'assistant' %}" + MARKED + "{% else %}{{ " + SHOWN + "{% endif %}"
GENERATION = CHATML.replace(SHOWN, CHOSEN)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The student folder and the run of an export; the chat template marks the assistant's text."""
    student = tiny_llama(tmp_path_factory.mktemp("student"))
    (student / "chat_template.jinja").write_text(GENERATION)
    run = make_run(tmp_path_factory.mktemp("work") / "runs/default")
    export_data(export_config(student), run)
    return student, run


def parse_config(classes, path: Path):
    """Parse a configuration with TRL's parser, which raises for unknown keys."""
    arguments = ["--config", str(path), *ON_CPU]
    return TrlParser(classes).parse_args_and_config(arguments, fail_with_unknown_args=True)


def test_trl_parser_accepts_the_recipes():
    classes = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    _, training, model, data = parse_config(classes, TRL / "sft.yaml")
    assert training.assistant_only_loss
    assert model.use_peft
    assert [Path(entry.data_files).name for entry in data.datasets] == ["templates.jsonl", "reviews.jsonl"]
    script, training, _ = parse_config((ScriptArguments, DPOConfig, ModelConfig), TRL / "dpo.yaml")
    assert (script.dataset_name, script.dataset_config) == ("runs/default/export/data", "pairs")
    assert training.loss_type == ["sigmoid", "sft"]


def test_accelerate_accepts_its_configuration():
    config = load_config_from_file(str(TRL / "accelerate.yaml"))
    assert config.distributed_type.value == "MULTI_GPU"
    assert config.num_processes == 4


@requires_axolotl
@pytest.mark.parametrize("name", ["sft.yaml", "dpo.yaml"])
def test_axolotl_schema_accepts_the_recipe(name):
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig

    raw = yaml.safe_load((AXOLOTL / name).read_text())
    assert set(raw) <= set(AxolotlInputConfig.model_fields)
    gpu = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 4, "n_node": 1, "compute_capability": "sm_90"}
    config = validate_config(DictDefault(raw), capabilities=gpu, env_capabilities={"torch_version": "2.11.0"})
    assert config.output_dir == raw["output_dir"]


def test_recipes_read_files_that_the_export_writes_and_dpo_the_merged_model(exported):
    _, run = exported
    written = {f"runs/default/{FOLDER}/{path.name}" for path in run.path(FOLDER).iterdir()}
    named = {entry["path"] for name in ("sft", "dpo") for entry in load_recipe(AXOLOTL, name)["datasets"]}
    named |= {entry["data_files"] for entry in load_recipe(TRL, "sft")["datasets"]}
    assert named <= written
    assert load_recipe(TRL, "dpo")["dataset_name"] == f"runs/default/{FOLDER}"
    assert load_recipe(TRL, "dpo")["model_name_or_path"] == f"{load_recipe(TRL, 'sft')['output_dir']}-merged"
    assert load_recipe(AXOLOTL, "dpo")["base_model"] == f"{load_recipe(AXOLOTL, 'sft')['output_dir']}/merged"


def load_recipe(folder: Path, name: str) -> dict:
    return yaml.safe_load((folder / f"{name}.yaml").read_text())


def test_recipe_has_the_token_ids_that_sclite_trains(exported):
    student, run = exported
    tokenizer = load_tokenizer(str(student))
    encode = runpy.run_path(str(TRL / "dpo.py"))["encode"]
    rows = [json.loads(line) for line in run.path(f"{FOLDER}/pairs.jsonl").read_text().splitlines()]
    questions = {problem.id: problem.question for problem in run.read("problems.jsonl", Problem)}
    bundles = {b.key: b for b in build_bundles(tokenizer, run.read("pairs.jsonl", Pair), questions)}
    for row in rows:
        ids, bundle = encode(row, tokenizer), bundles[f"{row['id']}/{row['sample']}"]
        if row["kind"] == "content":
            assert ids["prompt_ids"] + ids["chosen_ids"] == bundle.review.ids
            assert ids["prompt_ids"] + ids["rejected_ids"] == bundle.rejected.ids
        else:
            mark = bundle.review.marks[row["step"] - 1]
            assert ids["prompt_ids"] == bundle.review.ids[: mark + 1]
            decoded = [tokenizer.decode(ids[side]) for side in ("chosen_ids", "rejected_ids")]
            assert decoded == [row["chosen"], row["rejected"]]


def test_both_recipes_encode_pairs_alike():
    def source(path: Path) -> str:
        tree = ast.parse(path.read_text())
        return next(ast.unparse(node) for node in tree.body if getattr(node, "name", "") == "encode")

    assert source(AXOLOTL / "partial_completions.py") == source(TRL / "dpo.py")


def launch(work: Path, *arguments: str) -> str:
    """Run a script with accelerate on two processes without a GPU, in a folder with runs/; return its output."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    captured = {"capture_output": True, "text": True, "timeout": 400, "check": False}
    done = subprocess.run([*command, *arguments], cwd=work, env=environment, **captured)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_trl_recipe_trains_on_two_processes_and_starts_at_ln_2(exported, tmp_path):
    student, run = exported
    shutil.copytree(run.folder.parents[1], tmp_path, dirs_exist_ok=True)
    short = [*ON_CPU, "--dtype", "float32", "--max_steps", "2", "--gradient_accumulation_steps", "1"]
    short += ["--logging_steps", "1", "--gradient_checkpointing", "false"]
    sft = importlib.util.find_spec("trl.scripts.sft").origin
    launch(tmp_path, sft, "--config", str(TRL / "sft.yaml"), *short, "--model_name_or_path", str(student))
    assert (tmp_path / "runs/default/trl-sft/adapter_model.safetensors").is_file()
    dpo = [str(TRL / "dpo.py"), "--config", str(TRL / "dpo.yaml"), *short]
    adapter = [sys.executable, *dpo, "--model_name_or_path", "runs/default/trl-sft"]
    refused = subprocess.run(adapter, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "is an adapter" in refused.stderr
    folders = ["runs/default/trl-sft", "runs/default/trl-sft-merged"]
    subprocess.run([sys.executable, str(TRL / "merge.py"), *folders], cwd=tmp_path, check=True)
    only = ["--loss_type", "sigmoid", "--loss_weights", "1.0"]
    output = launch(tmp_path, *dpo, *only)
    assert f"{len(run.read('pairs.jsonl', Pair))} pairs, 0 longer than max_length" in output
    assert output.count("longer than max_length") == 1  # only one of the two processes prints
    state = max((tmp_path / "runs/default/trl-dpo").glob("checkpoint-*/trainer_state.json"))
    first = json.loads(state.read_text())["log_history"][0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    trained = json.loads((tmp_path / "runs/default/trl-dpo/adapter_config.json").read_text())
    assert trained["base_model_name_or_path"] == "runs/default/trl-sft-merged"

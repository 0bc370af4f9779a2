"""`sclite train --plan`: memory, tokens, steps, hours, disk and corrections of a toy run; unknown values stay unknown."""

import json

import huggingface_hub.constants
import pytest
import torch

from sclite.config import Config
from sclite.data import corrections
from sclite.data.problems import Split
from sclite.errors import DataError, DeviceError, NetworkError
from sclite.inspect.plan import plan, print_plan
from sclite.records import Attempt, Pair, Problem, Review, Template
from sclite.run import Report
from sclite.student.loader import EMBEDDED_FOLDER, load_tokenizer, read_config
from sclite.train.memory import Setting, architecture, estimate
from sclite.train.sft import solve_rows
from tests.toy import pay, raises, write_pairs, write_rows, write_toy
from tests.train.architectures import QWEN_MATH_7B, config_of, recipe_architecture

LONG = Template(id="long", question="How?", answer="2", trace=f"<Step1>{'1 ' * 9000}\n</Step1>")
GPU = {"name": "GPU 24", "total_gb": 24.0, "free_gb": 23.4, "processes": []}


def config(run, **sections) -> Config:
    """A 7B student with only its configuration; four rows per step."""
    student = run.folder / "student-7b"
    student.mkdir(parents=True, exist_ok=True)
    (student / "config.json").write_text(json.dumps(QWEN_MATH_7B))
    sft = {"num_train_epochs": 3, "batch_size": 4, "per_device_train_batch_size": 4}
    return Config.model_validate({"student": {"model": str(student)}, "sft": sft, **sections})


def planned(run, gpu=GPU, unseen=frozenset(), tokenizer=None, **sections):
    tokenizer = tokenizer or load_tokenizer(str(EMBEDDED_FOLDER))
    kept = [Problem(id=id, question=f"{id}?", answer="1") for id in unseen or ()]
    split = None if unseen is None else Split([], kept, [])
    return plan(config(run, **sections), run, gpu=gpu, split=split, tokenizer=tokenizer)


def stage_of(name, run, *arguments, **sections):
    return planned(run, *arguments, **sections)["stages"][name]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture
def toy(run):
    """A run with toy rows."""
    write_toy(run)
    return run


def test_each_stage_fits_the_memory_that_other_processes_leave(run):
    stages = planned(run)["stages"]
    assert list(stages) == ["sft", "warmup", "dpo"]
    for name, stage in stages.items():
        assert stage["fits"] is True
        assert stage["micro_batch"] * stage["accumulation"] == stage["batch"]
        setting = Setting(name, stage["micro_batch"], 2048, 32)
        wanted = estimate(recipe_architecture("qwen2.5-math-7b"), setting).total
        assert stage["total_gb"] == wanted / 1e9 <= 23.4
        assert stage["total_gb"] == pytest.approx(sum(stage["memory_gb"].values()), abs=0.01)
        assert 2048 <= stage["largest_length"] <= 4096
    some, less, least = (stage_of("sft", run, {**GPU, "free_gb": gb}) for gb in (8.9, 8.6, 2.0))
    assert (some["fits"], some["micro_batch"], some["accumulation"]) == (True, 1, 4)
    assert less["fits"] is False
    assert less["length"] == less["largest_length"] < 2048
    assert (least["fits"], least["largest_length"]) == (False, None)


def test_without_a_gpu_the_plan_is_float32_and_fits_in_the_ram_or_not(run, monkeypatch, capsys):
    monkeypatch.setattr("sclite.train.memory.cpu_training_dtype", lambda _: torch.float32)
    for ram, fits in ((1 << 40, True), (int(30e9), False), (None, None)):
        monkeypatch.setattr("sclite.inspect.plan.available_ram", lambda ram=ram: ram)
        found = planned(run, None)
        assert [(s["fits"], s["largest_length"]) for s in found["stages"].values()] == [(fits, None)] * 3
        print_plan(found)  # an estimate of RAM is no reason to fail
        assert ("GB of RAM needed, 30.0 GB available" in capsys.readouterr().out) is (fits is False)
    on_card = planned(run)
    assert found["gpu"] is None
    assert (found["bits"], on_card["bits"]) == (32, 4)
    memory = found["stages"]["sft"]["memory_gb"]
    assert memory["weights"] == 4 * recipe_architecture("qwen2.5-math-7b").parameters / 1e9
    assert memory["optimizer"] == pytest.approx(2 * memory["adapter"], abs=0.002)
    assert memory["activations"] > 20 * on_card["stages"]["sft"]["memory_gb"]["activations"]


def test_the_forecast_of_an_empty_run_is_unknown(run):
    found = planned(run, unseen=None)
    for stage in found["stages"].values():
        assert [stage[key] for key in ("rows", "tokens", "steps", "hours", "tokens_per_second")] == [None] * 5
    assert found["hours"] is None
    assert found["teacher"] == {"requests": None, "at_most": False, "cost_usd": None, "spent_usd": None}
    json.dumps(found)


def test_planned_tokens_are_those_of_sft(toy, tokenizer):
    counts = ("rows", "steps", "tokens")
    stage = stage_of("sft", toy, tokenizer=tokenizer, unseen=frozenset({"p1"}))
    rows = solve_rows(tokenizer, [row for row in toy.read("templates.jsonl", Template) if row.id != "p1"], "")
    tokens = sum(len(row.ids) for row in rows)
    assert [stage[key] for key in counts] == [5, 4, 3 * tokens]  # three epochs, four rows a step
    toy.append("templates.jsonl", [LONG])
    stage = stage_of("sft", toy, tokenizer=tokenizer)
    assert (stage["rows"], stage["too_long"]) == (6, 1)


def test_the_plan_of_the_warmup_has_solving_and_closed_rows(toy, tokenizer):
    shares = ({"batch_size": 4, "replay_share": share} for share in (1.0, 0.0))
    one, none = (stage_of("warmup", toy, tokenizer=tokenizer, warmup=each) for each in shares)
    assert (one["rows"], one["steps"]) == (16, 4)
    assert (none["rows"], none["steps"]) == (10, 3)
    assert one["tokens"] > none["tokens"]


def test_reviews_of_attempts_that_are_sampled_again_are_not_planned(toy, tokenizer):
    attempts, reviews = toy.read("attempts.jsonl", Attempt), toy.read("reviews.jsonl", Review)
    gone = reviews[0].id
    toy.replace("attempts.jsonl", [attempt for attempt in attempts if attempt.id != gone])
    warmup = {"replay_share": 0.0, "batch_size": 4}
    some = stage_of("warmup", toy, tokenizer=tokenizer, warmup=warmup)["rows"]
    assert 0 < some < 10
    toy.replace("attempts.jsonl", [])
    assert stage_of("warmup", toy, tokenizer=tokenizer, warmup=warmup)["rows"] is None


def test_the_plan_of_dpo_counts_both_sides_and_replay(toy, tokenizer):
    wrong, right = (f"<Step1>{answer}\n</Step1>\n<Answer>{answer}</Answer>" for answer in "12")
    made = {"sample": 0, "step": 1, "prefix": ("<Step1>1\n",)}
    noted = made | {"prefix": ("<Step1>1\n", "<Cause>")}
    rows = [
        Pair(id="p1", kind="decision", attempt=wrong, chosen="<Cause>", rejected="</Step1>", **made),
        Pair(id="p1", kind="content", attempt=wrong, chosen="abcd" * 5, rejected="abcd" * 7, **noted),
        Pair(id="p0", kind="decision", attempt=right, chosen="</Step1>", rejected="<Cause>", **made),
    ]
    toy.replace("pairs.jsonl", rows)
    shares = ({"batch_size": 4, "num_train_epochs": 1, "replay_share": share} for share in (1.0, 0.0))
    replayed, without = (stage_of("dpo", toy, tokenizer=tokenizer, dpo=each) for each in shares)
    assert (without["rows"], without["steps"]) == (2, 1)
    assert replayed["tokens"] > without["tokens"]
    toy.append("templates.jsonl", [LONG])
    unseen, dpo = frozenset({"long"}), {"batch_size": 4, "num_train_epochs": 1}
    long = stage_of("dpo", toy, tokenizer=tokenizer, unseen=unseen, dpo=dpo)  # it trains without replay
    assert [long[key] for key in ("rows", "too_long", "tokens")] == [2, 0, without["tokens"]]
    long = stage_of("dpo", toy, tokenizer=tokenizer, dpo={**dpo, "max_length": 64})
    assert [long[key] for key in ("rows", "too_long")] == [0, 2]


def test_hours_come_from_the_timed_steps_of_the_run(toy, tokenizer):
    assert stage_of("sft", toy, tokenizer=tokenizer)["hours"] is None
    timed = enumerate((50, 100, 900))
    rows = [{"phase": "sft", "step": step, "tokens_per_second": speed} for step, speed in timed]
    write_rows(toy.path("sft/metrics.jsonl"), [*rows, '{"phase": "s'])  # half-written
    stages = planned(toy, tokenizer=tokenizer)["stages"]
    assert [stages[name]["tokens_per_second"] for name in ("sft", "warmup", "dpo")] == [100, 100, None]
    assert stages["sft"]["hours"] == pytest.approx(stages["sft"]["tokens"] / 100 / 3600, abs=1e-3)
    write_pairs(toy)
    for name in ("sft", "dpo"):  # seconds are not rounded to none
        row = {"phase": name, "step": 1, "tokens_per_second": 5000}
        write_rows(toy.path(f"{name}/metrics.jsonl"), [row])
    found = planned(toy, tokenizer=tokenizer)
    seconds = sum(stage["tokens"] for stage in found["stages"].values()) / 5000
    assert 1 < seconds < 10
    assert 3600 * found["hours"] == pytest.approx(seconds, abs=1)


def test_disk_use_grows_with_rank_and_quantization_bits(run):
    small = planned(run)["disk_gb"]
    large = planned(run, lora={"r": 64}, export={"quant": "q8_0"})["disk_gb"]
    assert small["adapters"] < large["adapters"]
    assert 4.4 < small["gguf"] < 4.9 < 7.9 < large["gguf"] < 8.3
    assert small["merged"] == pytest.approx(15.23, abs=0.01)
    both = planned(run, export={"quant": "q4_k_m,q8_0"})["disk_gb"]["gguf"]
    assert both == pytest.approx(small["gguf"] + large["gguf"], abs=0.001)


def test_corrections_are_priced_like_the_templates_so_far(toy):
    for name in ("attempts.jsonl", "reviews.jsonl"):
        toy.path(name).unlink()
    pay(toy, "templates", *[0.02] * 9)  # six templates, three repairs
    teacher = planned(toy, unseen=frozenset({"p1", "p2"}), attempts={"samples": 4})["teacher"]
    assert teacher == {"requests": 8, "at_most": True, "cost_usd": 0.24, "spent_usd": 0.18}
    imported = {"samples": 4, "source": "tries.jsonl"}  # which may contain more of them
    teacher = planned(toy, unseen=frozenset({"p1", "p2"}), attempts=imported)["teacher"]
    assert teacher == {"requests": None, "at_most": False, "cost_usd": None, "spent_usd": 0.18}


def test_with_attempts_each_distinct_wrong_one_is_a_request(toy):
    toy.path("reviews.jsonl").unlink()
    attempts = toy.read("attempts.jsonl", Attempt)
    toy.append("attempts.jsonl", [row.model_copy(update={"sample": 1}) for row in attempts])
    assert planned(toy)["teacher"]["cost_usd"] is None
    pay(toy, "templates", *[0.02] * 6)
    teacher = planned(toy)["teacher"]
    assert (teacher["requests"], teacher["at_most"], teacher["cost_usd"]) == (4, False, 0.08)


def test_an_unknown_price_stays_unknown(toy):
    toy.path("reviews.jsonl").unlink()
    pay(toy, "templates", 0.02, None)
    teacher = planned(toy)["teacher"]
    assert (teacher["cost_usd"], teacher["spent_usd"]) == (None, 0.02)


def test_finished_or_imported_corrections_cost_nothing(toy, capsys):
    pay(toy, "templates", *[0.02] * 6)
    assert planned(toy)["teacher"]["requests"] == 0  # imported
    toy.write_json("corrections.begun.json", {})
    assert planned(toy)["teacher"]["requests"] == 4  # started, not finished
    toy.sign("corrections", corrections.corrections_inputs(config(toy), toy), Report("corrections"))
    found = planned(toy)
    assert (found["teacher"]["requests"], found["teacher"]["cost_usd"]) == (0, 0.0)
    print_plan(found)
    assert "none left to request; the run has cost $0.12 so far" in capsys.readouterr().out


def test_short_times_and_small_sizes_are_not_shown_as_zero(run, capsys):
    found = planned(run) | {"hours": 0.02, "disk_gb": {"adapters": 0.004, "total": 0.07}}
    found["stages"]["sft"]["hours"] = 0.006
    print_plan(found)
    shown = capsys.readouterr().out
    assert "about 22 s" in shown
    assert "Training time: about 1 min 12 s" in shown
    assert "Disk: about 70 MB (adapters 4 MB)" in shown


def test_the_architecture_is_read_from_config_json_or_an_error_has_a_hint(tmp_path, monkeypatch):
    monkeypatch.setattr("sclite.train.memory.cpu_training_dtype", lambda _: torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(QWEN_MATH_7B))
    assert architecture(read_config(str(tmp_path))) == architecture(config_of(QWEN_MATH_7B))
    assert architecture(read_config(str(EMBEDDED_FOLDER))).parameters < 10_000_000
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with raises(NetworkError, "nobody/nothing cannot be loaded", hint="student.model"):
        read_config("nobody/nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json"):
        read_config(str(tmp_path))


def test_the_terminal_shows_fit_memory_holders_and_unknowns(toy, capsys):
    holder = {"pid": 4242, "name": "python [serve]", "gb": 12.4}
    with pytest.raises(DeviceError, match="not every stage fits on this GPU"):
        print_plan(planned(toy, {**GPU, "free_gb": 7.8, "processes": [holder]}))
    said = " ".join(capsys.readouterr().out.split())
    assert "12.4 GB used by python [serve] (PID 4242)" in said
    assert "sft does not fit" in said
    assert "unknown until every stage has run a step" in said
    print_plan(planned(toy, None))
    said = capsys.readouterr().out
    assert "No CUDA GPU" in said
    assert max(map(len, said.splitlines()[1:])) <= 120  # the first line contains a path

"""Configuration: precedence, parsing of values, and errors that are reported together."""

import pytest
from pydantic import ValidationError

from sclite.config import Config
from sclite.errors import UsageError
from sclite.settings import load
from sclite.train.stage import training_inputs


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_defaults_then_file_then_environment_then_settings(tmp_path):
    (tmp_path / "sclite.toml").write_text("[sft]\nnum_train_epochs = 2\nbatch_size = 2\n[lora]\nr = 2\n")
    defaults = {"sft": {"num_train_epochs": 1, "batch_size": 1}, "lora": {"r": 1, "lora_alpha": 1}}
    variables = {"SCLITE_SFT__NUM_TRAIN_EPOCHS": "3", "SCLITE_LORA__R": "3"}
    variables |= {"SCLITE_LLAMA_CPP": "/src/llama.cpp", "OTHER__THING": "1"}  # these are not settings
    found = load(None, ["sft.num_train_epochs=4"], variables, defaults)
    values = (found.lora.lora_alpha, found.sft.batch_size, found.lora.r, found.sft.num_train_epochs)
    assert values == (1, 2, 3, 4)
    assert found.sft.per_device_train_batch_size == Config().sft.per_device_train_batch_size
    assert defaults["sft"] == {"num_train_epochs": 1, "batch_size": 1}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_file_may_have_a_bom_any_line_ending_and_another_name(tmp_path, end):
    (tmp_path / "sclite.toml").write_bytes("\ufeffseed = 3\n[lora]\nr = 2\n".replace("\n", end).encode())
    found = load(None, (), {})
    assert (found.seed, found.lora.r) == (3, 2)
    (tmp_path / "mine.toml").write_text("[lora]\nr = 4\n")  # replaces the one in the folder
    found = load(tmp_path / "mine.toml", (), {})
    assert (found.seed, found.lora.r) == (0, 4)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("student.model=7", "student.model", "7"),
        ("student.model=2026-11-23", "student.model", "2026-11-23"),
        ("student.model=true", "student.model", "true"),
        ('student.model="a b"', "student.model", "a b"),
        ("student.model=a=b", "student.model", "a=b"),
        ("student.model=", "student.model", ""),
        (" sft.num_train_epochs = 2 ", "sft.num_train_epochs", 2.0),
        ("sft.learning_rate=1e-4", "sft.learning_rate", 1e-4),
        ("student.load_in_4bit=false", "student.load_in_4bit", False),
        ("review.threshold=-3.5", "review.threshold", -3.5),
        ("seed=0", "seed", 0),
        ("review.threshold=0", "review.threshold", 0.0),  # not the default, which is None
    ],
)
def test_text_is_converted_to_the_type_of_its_key(text, key, value):
    found = load(None, [text], {})
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("problems.source", "attempts.source", "attempts.student", "student.model", "eval.source")
    named = [f"{name}=~/x" for name in (*names, "prompts.folder", "run")] + ['problems.avoid=["~/x"]']
    found, home = load(None, named, {}), f"{tmp_path}/x"
    assert {found.problems.source, found.attempts.source, found.attempts.student} == {home}
    assert {found.student.model, found.eval.source, found.prompts.folder, found.run} == {home}
    assert found.problems.avoid == (home,)
    assert load(None, ["problems.source=~nobody-here/x"], {}).problems.source == "~nobody-here/x"


def test_all_errors_are_reported_together():
    with pytest.raises(UsageError) as error:
        load(None, ["sft.epoch=1", "dpo.beta=-1", "models=x", "eval.limit=none"], {})
    message, hint = error.value.message, error.value.hint
    for part in ("unknown key sft.epoch", "dpo.beta = -1", "unknown key models", "eval.limit = 'none'"):
        assert part in message
    assert "did you mean sft.num_train_epochs?" in hint
    assert "\n" not in message


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        (["dpo.betta=1"], ["dpo.beta"]),
        (["sft.learningrate=1"], ["sft.learning_rate"]),
        (["studnt.model=x", "studnt.batch=2"], ["student.model", "student.batch"]),
        (["num_train_epochs=2"], ["sft.num_train_epochs"]),
        (["sft.epoch="], ["sft.num_train_epochs"]),
    ],
)
def test_every_unknown_key_gets_a_suggestion(wrong, meant):
    with pytest.raises(UsageError) as error:
        load(None, wrong, {})
    unknown = [setting.partition("=")[0] for setting in wrong]
    assert error.value.message == "configuration: " + "; ".join(f"unknown key {key}" for key in unknown)
    hints = [f"did you mean {key}?" for key in meant]
    assert error.value.hint == " ".join(hints)


def test_malformed_settings_are_errors_and_a_configuration_is_immutable():
    for setting in ("sft=3", "=3", "sft.=3", ".seed=1", "sft.num_train_epochs.more=1"):
        with pytest.raises(UsageError):
            load(None, [setting], {})
    with pytest.raises(ValidationError, match="frozen"):
        Config().sft.num_train_epochs = 2


def test_only_what_has_an_effect_on_a_training_is_among_its_inputs(run):
    def inputs(**settings):
        config = Config.model_validate({"student": {"model": "embedded"}, "dpo": settings})
        return training_inputs(config, run, "dpo")

    assert inputs(checkpoints=3, per_device_train_batch_size=2) == inputs()
    assert inputs(beta=0.1) != inputs()


def test_an_impossible_number_is_rejected():
    epochs = ("dpo.num_train_epochs=0", "sft.num_train_epochs=0", "sft.num_train_epochs=inf")
    for setting in (*epochs, "dpo.learning_rate=nan"):
        with pytest.raises(UsageError, match=setting.partition("=")[0].replace(".", r"\.")) as error:
            load(None, [setting], {})
        assert "train --only sft" in error.value.hint or not setting.startswith("dpo.num_train")

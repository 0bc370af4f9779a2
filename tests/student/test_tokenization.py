"""Token ids of prompts and pieces, with a real tokenizer: concatenation, loss weights, decision marks."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from sclite import prompts
from sclite.errors import DataError
from sclite.export.merge import copy_settings
from sclite.student.base import Reply, Request
from sclite.student.loader import load_tokenizer
from sclite.student.self_correction import ReviewSettings, correct_step
from sclite.student.tokenization import (
    TRICKY,
    decision_ids,
    encode_review,
    encode_solution,
    end_id,
    piece_ids,
    prompt_ids,
    prompt_text,
)
from sclite.trace import CAUSE, Step, Trace, all_pieces, open_piece, render, step_pieces
from tests.toy import CHATML, sample_texts, write_tokenizer

SOLVE = prompts.solve_messages("Anna has 3 apples and buys 4. How many?")
TRACE = Trace((Step("3 + 4 = 7", "Count."), Step("7 + 0 = 7")), "Add.", "7")
NOTED = Step("7 + 1 = 9", None, "Too many.", "7 + 1 = 8")
REVIEW = Trace((Step("3 + 4 = 7"), NOTED, Step("8 = 8")), None, "8")
OPENER = "{% if add_generation_prompt and enable_thinking is not defined %}{{ '<think>' }}{% endif %}"
PLAIN = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made, sample_texts(), vocab_size=512)
    return made


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def with_template(folder, template):
    made = AutoTokenizer.from_pretrained(folder)
    made.chat_template = template
    return made


def flat(rows):
    return [i for row in rows for i in row]


def test_prompt_ends_where_the_assistant_begins_with_thinking_off(tokenizer, folder):
    text = prompt_text(tokenizer, SOLVE)
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith(f"<|im_start|>system\n{SOLVE[0]['content']}<|im_end|>")
    assert tokenizer.decode(prompt_ids(tokenizer, SOLVE)) == text
    assert not prompt_text(with_template(folder, CHATML + OPENER), SOLVE).endswith("<think>")


def test_end_of_turn_comes_from_the_template(folder, tokenizer):
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert end_id(tokenizer) == tokenizer.eos_token_id == end
    assert end_id(with_template(folder, CHATML.replace("<|im_end|>", "<|im_start|>"))) == start
    assert end_id(with_template(folder, PLAIN)) == end


def test_unusable_tokenizers_are_rejected(folder, tokenizer):
    """Without a template or an end token, or with one first token for causes and closers."""
    accuse, close = decision_ids(tokenizer)
    assert accuse != close
    assert {piece_ids(tokenizer, [f"</Step{n}>\n"])[0][0] for n in range(1, 20)} == {close}
    letters = lambda pieces, **_: {"input_ids": [list(map(ord, piece)) for piece in pieces]}  # noqa: E731
    with pytest.raises(DataError, match="same first token") as error:
        decision_ids(letters)
    assert error.value.hint == "choose another student"
    endless = with_template(folder, PLAIN)
    endless.eos_token = None
    cases = {"no chat template": with_template(folder, None), "no end-of-turn token": endless}
    for reason, broken in cases.items():
        with pytest.raises(DataError, match=reason) as error:
            end_id(broken)
        assert error.value.hint == "choose an instruct model"


def test_training_ids_are_those_of_prompt_and_pieces_up_to_any_prefix(tokenizer):
    row = encode_solution(tokenizer, SOLVE, TRACE)
    before = prompt_ids(tokenizer, SOLVE)
    alone = flat(tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in all_pieces(TRACE))
    assert row.ids == [*before, *alone, end_id(tokenizer)]
    assert row.weights == [0.0] * len(before) + [1.0] * (len(alone) + 1)
    assert tokenizer.decode(row.ids) == prompt_text(tokenizer, SOLVE) + render(TRACE) + "<|im_end|>"
    # wherever text is forced in use, the ids up to there are those of training
    whole = encode_review(tokenizer, SOLVE, REVIEW).ids
    pieces = [*step_pieces(REVIEW.steps[:1]), open_piece(2, REVIEW.steps[1]), CAUSE]
    for count in range(1, len(pieces) + 1):
        part = prompt_ids(tokenizer, SOLVE) + flat(piece_ids(tokenizer, pieces[:count]))
        assert whole[: len(part)] == part


@pytest.mark.parametrize("step", [1, 2])
def test_continuation_has_loss_only_after_the_step(tokenizer, step):
    wrong = Trace(tuple(Step(s.text) for s in TRACE.steps), "Add.", "7")
    steps = [*wrong.steps[: step - 1], Step("It is 999."), *wrong.steps[step:]]
    work = Trace(tuple(steps), "Add.", "7")
    script, asked = correct_step("2 + 5?", wrong, step, ReviewSettings()), None
    written = Reply(0, "It is not.</Cause>\n<Correction>It is 999.</Correction>", 9, 9, "stop")
    while not isinstance(asked, Request) or asked.pieces[-1] == CAUSE:
        asked = script.send(written if isinstance(asked, Request) else None)
    given = prompt_ids(tokenizer, SOLVE) + flat(piece_ids(tokenizer, asked.pieces))
    row = encode_solution(tokenizer, SOLVE, work, after=step)
    assert row.ids == encode_solution(tokenizer, SOLVE, work).ids
    assert row.ids[: len(given)] == given  # as guided review requests it
    assert row.weights == [0.0] * len(given) + [1.0] * (len(row.ids) - len(given))


def test_decisions_follow_each_step_up_to_the_flagged_one_or_the_last(tokenizer):
    row = encode_review(tokenizer, SOLVE, REVIEW, decision_weight=4.0)
    assert row.accused == (False, True)
    accuse, close = decision_ids(tokenizer)
    assert [row.ids[mark + 1] for mark in row.marks] == [close, accuse]
    for number, mark in enumerate(row.marks, 1):
        assert tokenizer.decode(row.ids[: mark + 1]).endswith(open_piece(number, REVIEW.steps[number - 1]))
    assert [w for w in row.weights if w > 1] == [5.0, 5.0]
    assert row.weights[-1] == 1.0
    row = encode_review(tokenizer, SOLVE, TRACE)
    assert row.ids == encode_solution(tokenizer, SOLVE, TRACE).ids
    assert row.accused == (False, False)
    assert set(row.weights) == {0.0, 1.0}
    assert row.weights[row.marks[0] + 1] == 1.0


def test_wrong_step_has_no_loss_in_its_review(tokenizer):
    row = encode_review(tokenizer, SOLVE, REVIEW)
    answer = len(prompt_ids(tokenizer, SOLVE))
    masked = [i for i, weight in enumerate(row.weights) if not weight and i >= answer]
    assert tokenizer.decode([row.ids[i] for i in masked]) == open_piece(2, REVIEW.steps[1])


# -- a tokenizer.json that transformers' class for the model reads only in part, such as SmolLM2's on the Hub


@pytest.fixture
def split_digits(tmp_path):
    """(folder, its tokenizer.json): a byte-level BPE that splits digits, with GPT-2's class."""
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([*sample_texts(), *["of  42\n\n12"] * 50], trainer)
    folder = tmp_path / "base"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **names}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 600}))
    return folder, tokenizer


def encoded(tokenizer):
    return [tokenizer.encode(text, add_special_tokens=False) for text in TRICKY]


def test_the_whole_file_is_read_even_from_an_export(split_digits, tmp_path):
    folder, file = split_digits
    expected = [file.encode(text, add_special_tokens=False).ids for text in TRICKY]
    assert encoded(AutoTokenizer.from_pretrained(folder)) != expected  # the class that the model names
    loaded = load_tokenizer(str(folder))
    assert encoded(loaded) == expected
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|im_end|>")
    sampling = {"repetition_penalty": 1.1, "temperature": 0.7, "do_sample": True}  # vLLM would use them
    (folder / "generation_config.json").write_text(json.dumps(sampling | {"eos_token_id": 2}))
    (tmp_path / "out").mkdir()
    copy_settings(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": 2}
    # as llama.cpp's converter loads it
    assert encoded(AutoTokenizer.from_pretrained(tmp_path / "out")) == expected

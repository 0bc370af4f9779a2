"""A tokenizer.json that transformers' class for the model reads only in part, such as SmolLM2's on the Hub."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from sclite.export.merge import copy_settings
from sclite.student.loader import load_tokenizer
from sclite.student.tokenizer_file import TRICKY
from tests.toy import sample_texts

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def split_digits(tmp_path):
    """(folder, its tokenizer.json): a byte-level BPE that splits digits, with GPT-2's class."""
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
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

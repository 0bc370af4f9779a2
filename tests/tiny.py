"""Small real models for tests: a random Llama with a SentencePiece tokenizer that trains in a second."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ("<|im_start|>", "<|im_end|>")


def write_tokenizer(
    folder: Path, texts: Iterable[str], vocab_size: int = 512, template: str = CHATML
) -> None:
    """Train a SentencePiece BPE vocabulary on `texts` and write every file transformers and llama.cpp read.

    The ids of SentencePiece, of `AutoTokenizer` and of the GGUF made from the folder are the same for any text. Ids:
    0 <unk>, 1 <|im_start|>, 2 <|im_end|> (end of turn and padding), 3 newline, then 256 bytes, then the learned pieces.
    tokenizer.model is the vocabulary; tokenizer.json is derived from it here, because what transformers derives by
    itself depends on its version. `vocab_size` should be divisible by 256 (K-quants).
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.split("\n") if line]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        byte_fallback=True,
        split_digits=True,
        control_symbols=list(CONTROL),
        user_defined_symbols=["\n"],
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    _write_fast_tokenizer(folder, template)


def _write_fast_tokenizer(folder: Path, template: str) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja from the pieces of tokenizer.model."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces[
        3:
    ]:  # in order of falling score; <0x41> and the like split into nothing that is a piece
        merges += [
            (piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if not model.is_byte(ids[piece]) and piece[:cut] in ids and piece[cut:] in ids
        ]
    fast = Tokenizer(BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", *CONTROL)])
    fast.add_tokens([AddedToken("\n", special=False, normalized=False)])
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "bos_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def sample_texts(count: int = 400, seed: int = 0) -> list[str]:
    """Short arithmetic traces in the form of METHOD section 1."""
    draw = random.Random(seed)
    names = ["Anna", "Ben", "Chen", "Dara", "Emil"]
    texts = []
    for _ in range(count):
        a, b = draw.randint(1, 99), draw.randint(1, 99)
        texts.append(
            f"{draw.choice(names)} has {a} apples and buys {b} more. How many apples are there?\n"
            f"<Step1>Add the apples: {a} + {b} = {a + b}.\n<Key>Carry the ten.</Key>\n</Step1>\n"
            f"<Cause>The sum forgot the carry.</Cause>\n<Correction>It is {a + b}.</Correction>\n"
            f"<Generalized>Add what is bought.</Generalized>\n<Answer>{a + b}</Answer>"
        )
    return texts


def tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A folder with a random float32 LlamaForCausalLM (about 1.4M parameters) and its tokenizer; returns `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder, sample_texts(), vocab_size=512)
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(shape).float()
    model.save_pretrained(folder)
    return folder


def tiny_gguf(folder: Path, out: Path, *, outtype: str = "f32") -> Path:
    """The model in `folder` as a GGUF; returns `out`."""
    from sclite.export.gguf_writer import write_gguf

    return write_gguf(folder, out, outtype=outtype)


def first_token_odds(model, tokenizer, request) -> list[float]:
    """The log-odds of a ScoreRequest's two options after each mark, by their first tokens, from transformers' logits."""
    import torch

    from sclite.student.tokenization import piece_ids, prompt_ids

    ids, ends = prompt_ids(tokenizer, request.messages), []
    for piece in piece_ids(tokenizer, request.pieces):
        ids = ids + piece
        ends.append(len(ids))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    odds = []
    for mark, options in zip(request.marks, request.options, strict=True):
        first, second = (tokens[0] for tokens in piece_ids(tokenizer, options))
        odds.append(float(logits[ends[mark] - 1, first] - logits[ends[mark] - 1, second]))
    return odds

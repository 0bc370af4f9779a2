"""The embedded student's SentencePiece vocabulary, with the same IDs in transformers and llama.cpp."""

import json
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
    """Train a SentencePiece BPE vocabulary on `texts` and write all files that transformers and llama.cpp read.

    SentencePiece, `AutoTokenizer` and a GGUF converted from the folder give the same IDs for any text: 0 <unk>,
    1 <|im_start|>, 2 <|im_end|> (end of turn and padding), 3 newline, then 256 bytes, then the learned pieces.
    tokenizer.json is derived from tokenizer.model here, because the conversion of transformers depends on its version.
    `vocab_size` should be divisible by 256 (K-quants).
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
    # in order of falling score; <0x41> and the like do not split into pieces
    for piece in pieces[3:]:
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

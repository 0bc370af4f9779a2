"""tokenizer.json, which transformers' classes for some models read only in part: DeepSeek's, and SmolLM2's from the Hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

FILE = "tokenizer.json"
TRICKY = (
    "\n", "\n\n", "\n \n", "  ", " 7", "  42", " 1234567890", "3.14159", "1,234.5", "x1y2", "a\tb", "- one\n- two",
    "1. First\n2. Second\n\n   a) third", "if x:\n    return y\n", "# A\n\n\n## B\n", "don't we'll I'm", "…–—“”‘’",
    "naïve café Größe", "数学的问题", "привет мир", "مرحبا", "שלום", "🙂👩‍👩‍👧", "∑ᵢ xᵢ² ≤ ∞", "½ + ¼ = ¾",
    r"\frac{1}{2} \times \sqrt{x}", "$x^2$ and \\(y\\)", "```python\nprint(1)\n```", "<b>bold</b> &amp;", '{"a": [1, 2]}',
    "http://example.org/a?b=c#d", "A" * 50, "0" * 30, "!?!?...", "<Step1>", "</Step12>\n", "<Answer>-0.5</Answer>\n",
)  # fmt: skip
"""Texts on which tokenizers differ: line ends, runs of spaces, digits after spaces, scripts, markup."""


def is_ignored(tokenizer: "Tokenizer", name: str) -> bool:
    """Whether a tokenizer loaded from a folder or Hub ID produces other tokens than its tokenizer.json.

    False without one, and for SentencePiece, where tokenizer.model counts.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    silent = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    path = cached_file(name, FILE, **silent)
    kind = type(tokenizer)
    reads_all = kind is PreTrainedTokenizerFast or "__init__" not in vars(kind)
    if path is None or reads_all:
        return False
    if "ByteLevel" not in json.dumps(json.loads(Path(path).read_bytes()).get("pre_tokenizer")):
        return False
    whole = PreTrainedTokenizerFast(tokenizer_file=path)
    ids, other = (each(list(TRICKY), add_special_tokens=False)["input_ids"] for each in (whole, tokenizer))
    return bool(ids != other)

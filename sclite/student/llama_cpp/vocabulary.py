"""The tokens of a GGUF, as llama.cpp reads them."""

import ctypes
from collections.abc import Callable
from types import ModuleType


class Vocabulary:
    """The tokens of a GGUF: text to ids, an id to its bytes, which ids end a turn, whether texts begin with BOS."""

    def __init__(self, api: ModuleType, model: int):
        self._api, self._of = api, api.llama_model_get_vocab(model)
        self.size: int = api.llama_vocab_n_tokens(self._of)
        self.ends = frozenset(token for token in range(self.size) if api.llama_vocab_is_eog(self._of, token))
        self.adds_bos: bool = api.llama_vocab_get_add_bos(self._of)
        self._pieces: dict[int, bytes] = {}

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Token ids of the text on its own, without BOS. `special`: parse control tokens in the text."""
        data = text.encode("utf-8")
        count = -len(data) - 8  # llama.cpp returns minus the room needed if there is too little
        while count < 0:
            found = (self._api.llama_token * -count)()
            count = self._api.llama_tokenize(self._of, data, len(data), found, -count, False, special)
        return found[:count]

    def piece(self, token: int) -> bytes:
        """The bytes of a token (possibly part of a character); empty for control tokens."""
        if token not in self._pieces:
            room = ctypes.create_string_buffer(512)
            count = self._api.llama_token_to_piece(self._of, token, room, len(room), 0, False)
            self._pieces[token] = room.raw[: max(count, 0)]
        return self._pieces[token]

    def name(self, token: int) -> str:
        """How a token is written in a chat template."""
        text = self._api.llama_vocab_get_text(self._of, token) if token >= 0 else b""
        return (text or b"").decode("utf-8", "replace")

    def special_tokens(self, has: Callable[[str], object]) -> dict[str, str]:
        """bos_token, eos_token for the chat template; `has(key)` checks the file, since llama.cpp invents missing ids."""
        found = {"bos": self._api.llama_vocab_bos, "eos": self._api.llama_vocab_eos}
        return {
            f"{kind}_token": self.name(get(self._of)) if has(f"tokenizer.ggml.{kind}_token_id") else ""
            for kind, get in found.items()
        }

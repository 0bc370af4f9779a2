"""The tokens of a GGUF, and one sequence of them: which logits are read, how it is sampled, when it ends."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event
from types import ModuleType

import numpy as np

from sclite.errors import DeviceError
from sclite.student.base import Request


class Vocabulary:
    """The tokens of a GGUF: text to ids, an id to its bytes, which ids end a turn, whether texts begin with BOS.

    `special_tokens` has bos_token and eos_token for the chat template, "" for those that the file lacks.
    """

    def __init__(self, api: ModuleType, model: int, has: Callable[[str], object]):
        """`has` checks whether the file has a key, since llama.cpp invents missing ids."""
        self._api, self._of = api, api.llama_model_get_vocab(model)
        self.size: int = api.llama_vocab_n_tokens(self._of)
        self.ends = frozenset(token for token in range(self.size) if api.llama_vocab_is_eog(self._of, token))
        self.adds_bos: bool = api.llama_vocab_get_add_bos(self._of)
        found = {"bos": api.llama_vocab_bos, "eos": api.llama_vocab_eos}
        self.special_tokens = {
            f"{kind}_token": self.name(get(self._of)) if has(f"tokenizer.ggml.{kind}_token_id") else ""
            for kind, get in found.items()
        }

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
        room = ctypes.create_string_buffer(512)
        count = self._api.llama_token_to_piece(self._of, token, room, len(room), 0, False)
        return room.raw[: max(count, 0)]

    def name(self, token: int) -> str:
        """How a token is written in a chat template."""
        text = self._api.llama_vocab_get_text(self._of, token) if token >= 0 else b""
        return (text or b"").decode("utf-8", "replace")


@dataclass(eq=False)
class Run:
    """The sequences of one call.

    `events` tells the caller what happens: (sequence, whether it is finished), or an error that ends the call.
    """

    cancel: Event
    stream: bool
    dropped: bool = False
    events: "SimpleQueue[tuple[TokenSequence, bool] | DeviceError]" = field(default_factory=SimpleQueue)


@dataclass(eq=False)
class TokenSequence:
    """Ids that go through the model once, and the log-probabilities read along the way.

    `reads` maps a position to the tokens whose log-probabilities after it are wanted (None: all tokens); `read` gets them
    as float64 arrays. With a `request` the sequence is continued instead: sampled tokens are appended to `ids` until an
    end token, a stop string or `limit` new tokens.
    """

    ids: list[int]
    reads: dict[int, tuple[int, ...] | None] = field(default_factory=dict)
    request: Request | None = None
    limit: int = 0

    read: dict[int, np.ndarray] = field(default_factory=dict, init=False)
    text: bytearray = field(default_factory=bytearray, init=False)
    finish: str = field(default="", init=False)
    error: str | None = field(default=None, init=False)
    prompt: np.ndarray = field(init=False)
    past: int = field(default=0, init=False)
    computed: int = field(default=0, init=False)
    """Ids that were not in the cache when the sequence was admitted."""
    run: Run = field(init=False)

    def __post_init__(self):
        self.prompt = np.array(self.ids, dtype=np.int32)
        self._stops = tuple(stop.encode() for stop in self.request.stop) if self.request else ()
        self._random = np.random.default_rng(self.request.seed) if self.request else None

    @property
    def generated(self) -> int:
        """Number of tokens generated so far."""
        return len(self.ids) - len(self.prompt)

    def option(self, at: int, tokens: list[int]) -> "Option":
        """Where to read an option after position `at`: in this sequence if it contains it, else in a separate one."""
        present = self.ids[at + 1 : at + len(tokens)] == tokens[:-1]
        sequence = self if present else TokenSequence(self.ids[: at + 1] + tokens[:-1])
        places = list(enumerate(tokens, at))
        for position, token in places:
            sequence.reads[position] = (*(sequence.reads.get(position) or ()), token)
        return sequence, places

    def take(self, positions: list[int], rows: np.ndarray, vocabulary: Vocabulary) -> None:
        """Process the logits `rows`, one per position: read log-probabilities, or sample the next token.

        Sets `finish` after the last read, at an end token, a stop string or the limit.
        """
        if self.request is None:
            for position, row in zip(positions, rows, strict=True):
                top, tokens = row.max(), self.reads[position]
                total = np.float64(top) + np.log(np.exp(row - top).sum(dtype=np.float64))
                self.read[position] = (row if tokens is None else row[list(tokens)]).astype(
                    np.float64
                ) - total
            if len(self.read) == len(self.reads):
                self.finish = "stop"
            return
        token = sample(rows[0], self.request, self._random)
        self.ids.append(token)
        if token in vocabulary.ends:
            self.finish = "stop"
            return
        text = self.text + vocabulary.piece(token)
        if ends := [text.find(stop) + len(stop) for stop in self._stops if stop in text]:
            self.text, self.finish = text[: min(ends)], "stop"
            return
        self.text = text  # complete at once: another thread may be reading it
        if self.generated >= self.limit:
            self.finish = "length"


SMALLEST = 1e-9
"""The smallest probability of any other text: log-odds are at most 20.7."""
Option = tuple[TokenSequence, list[tuple[int, int]]]
"""A sequence, and its (position, token) pairs whose log-probabilities add up to that of an option."""


def log_odds(first: Option, second: Option | None = None) -> float:
    """log p of an option - log p of the other one, or of anything else, whose probability is at least SMALLEST.

    NaN if one of their sequences could not run.
    """
    likely = []
    for sequence, places in (first, second) if second else (first,):
        if sequence.finish != "stop":
            return float("nan")
        reads = ((sequence.read[at], sequence.reads[at] or (), token) for at, token in places)
        likely.append(float(sum(row[tokens.index(token)] for row, tokens, token in reads)))
    return likely[0] - (likely[1] if second else math.log(max(-math.expm1(likely[0]), SMALLEST)))


def sample(logits: np.ndarray, request: Request, random: np.random.Generator | None) -> int:
    """One token by temperature and top-p (the smallest set of most probable tokens whose mass reaches top_p)."""
    if request.temperature <= 0 or random is None:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / request.temperature
    weights = np.exp(scaled - scaled.max())
    ids, kept = np.arange(len(weights)), len(weights)
    if request.top_p < 1:
        least = request.top_p * weights.sum()
        # sorting a few candidates is a hundred times cheaper than sorting a vocabulary
        for floor in (1e-4, 0.0):
            ids = np.flatnonzero(weights >= floor)
            ids = ids[np.argsort(-weights[ids], kind="stable")]
            if weights[ids].sum() >= least:
                break
        kept = int(np.searchsorted(np.cumsum(weights[ids]), least)) + 1
    mass = np.cumsum(weights[ids[:kept]])
    drawn = int(np.searchsorted(mass, random.random() * mass[-1], side="right"))
    return int(ids[min(drawn, len(mass) - 1)])

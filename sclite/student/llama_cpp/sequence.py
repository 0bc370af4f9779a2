"""One sequence of tokens: which logits are read, how tokens are sampled, when it ends."""

import math
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event

import numpy as np

from sclite.errors import DeviceError
from sclite.student.base import Request
from sclite.student.llama_cpp.vocabulary import Vocabulary


@dataclass(eq=False)
class Run:
    """The sequences of one call: `left` of them are unfinished.

    `events` tells the caller what happens: (sequence, whether it is finished), or an error that ends the call.
    """

    left: int
    cancel: Event
    stream: bool
    dropped: bool = False
    events: "SimpleQueue[tuple[TokenSequence, bool] | DeviceError]" = field(default_factory=SimpleQueue)


@dataclass(eq=False)
class TokenSequence:
    """Ids that go through the model once, and the log-probabilities read along the way.

    `reads` maps a position to the tokens whose log-probabilities after it are wanted (None: all tokens); results are
    collected in `read`, float64 arrays in order of position. With a `request` the sequence is continued instead: sampled
    tokens are appended to `ids` until an end token, a stop string or `limit` new tokens.
    """

    ids: list[int]
    reads: dict[int, tuple[int, ...] | None] = field(default_factory=dict)
    request: Request | None = None
    limit: int = 0

    read: list[np.ndarray] = field(default_factory=list, init=False)
    text: bytearray = field(default_factory=bytearray, init=False)
    finish: str = field(default="", init=False)
    error: str | None = field(default=None, init=False)
    prompt: np.ndarray = field(init=False)
    past: int = field(default=0, init=False)
    shared: int = field(default=0, init=False)
    computed: int = field(default=0, init=False)
    """Ids that were not in the cache when the sequence was admitted."""
    run: Run = field(init=False)

    def __post_init__(self):
        self.prompt = np.array(self.ids, dtype=np.int32)
        self._stops = tuple(stop.encode() for stop in self.request.stop if stop) if self.request else ()
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

    def wanted(self, start: int, stop: int) -> list[int]:
        """Positions of [start, stop) whose logits are needed."""
        if self.request is not None:
            return [stop - 1] if stop == len(self.ids) else []
        return [position for position in self.reads if start <= position < stop]

    def take(self, positions: list[int], rows: np.ndarray, best: np.ndarray, vocabulary: Vocabulary) -> None:
        """Process the logits `rows` (one per position) and their argmax `best`; sets `finish` at the end."""
        if self.request is not None:
            greedy = self.request.temperature <= 0
            self.append(int(best[0]) if greedy else sample(rows[0], self.request, self._random), vocabulary)
            return
        for position, row in zip(positions, rows, strict=True):
            top, tokens = row.max(), self.reads[position]
            total = np.float64(top) + np.log(np.exp(row - top).sum(dtype=np.float64))
            self.read.append((row if tokens is None else row[list(tokens)]).astype(np.float64) - total)
        if len(self.read) == len(self.reads):
            self.finish = "stop"

    def append(self, token: int, vocabulary: Vocabulary) -> None:
        """Add a generated token; sets `finish` at an end token, a stop string or the limit."""
        self.ids.append(token)
        if token in vocabulary.ends:
            self.finish = "stop"
            return
        piece = vocabulary.piece(token)
        tail = self.text[max(0, len(self.text) - max(map(len, self._stops), default=1) + 1) :]
        places = ((stop, (tail + piece).find(stop)) for stop in self._stops)
        if ends := [at + len(stop) for stop, at in places if at >= 0]:
            self.text += piece[: min(ends) - len(tail)]
            self.finish = "stop"
            return
        self.text += piece  # complete at once: another thread may be reading it
        if self.generated >= self.limit:
            self.finish = "length"


SMALLEST = 1e-9
"""The smallest probability of any other text: log-odds are at most 20.7."""
Option = tuple[TokenSequence, list[tuple[int, int]]]
"""A sequence, and its (position, token) pairs whose log-probabilities add up to that of an option."""


def log_prob(option: Option) -> float:
    """log p of an option, from a finished sequence; NaN if it could not run."""
    sequence, places = option
    if sequence.finish != "stop":
        return float("nan")
    rows = dict(zip(sequence.reads, sequence.read, strict=True))
    return float(sum(rows[at][(sequence.reads[at] or ()).index(token)] for at, token in places))


def log_odds(first: Option, second: Option | None) -> float:
    """log p of an option - log p of the other one, or of anything else, whose probability is at least SMALLEST."""
    likely = log_prob(first)
    return likely - (log_prob(second) if second else math.log(max(-math.expm1(likely), SMALLEST)))


def sample(logits: np.ndarray, request: Request, random: np.random.Generator) -> int:
    """One token by temperature and top-p (the smallest set of most probable tokens whose mass reaches top_p)."""
    scaled = logits.astype(np.float64) / request.temperature
    weights = np.exp(scaled - scaled.max())
    total = weights.sum()
    if request.top_p >= 1:
        mass = np.cumsum(weights)
        return min(int(np.searchsorted(mass, random.random() * mass[-1], side="right")), len(mass) - 1)
    if total <= 1 / request.top_p:  # the most probable token, whose weight is 1, suffices
        random.random()
        return int(scaled.argmax())
    for floor in (1e-4, 0.0):  # sorting a few candidates is a hundred times cheaper than sorting a vocabulary
        ids = np.flatnonzero(weights >= floor)
        ids = ids[np.argsort(-weights[ids], kind="stable")]
        mass = np.cumsum(weights[ids])
        if mass[-1] >= request.top_p * total:
            break
    kept = int(np.searchsorted(mass, request.top_p * total)) + 1
    mass = mass[:kept]
    return int(ids[min(int(np.searchsorted(mass, random.random() * mass[-1], side="right")), len(mass) - 1)])

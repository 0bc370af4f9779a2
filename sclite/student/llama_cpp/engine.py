"""A GGUF file in llama.cpp that decodes many sequences at once."""

import codecs
import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import chain
from pathlib import Path
from threading import Event
from types import ModuleType

import numpy as np

from sclite.cores import usable_cores, wait_briefly
from sclite.errors import DataError, DeviceError
from sclite.student.base import Messages, Reply, Request, ScoreRequest, Scores
from sclite.student.chat_template import render_chat
from sclite.student.llama_cpp.scheduler import MEMORY_HINT, Scheduler
from sclite.student.llama_cpp.sequence import Option, TokenSequence, Vocabulary, log_odds

_log: deque[str] = deque(maxlen=40)
"""The last lines that llama.cpp logged; shown only if it fails."""
_kept: list[object] = []
"""Callbacks: ctypes needs them until the process ends."""
FEW = 4
"""With fewer sequences, as in a chat, what is in their caches is worth keeping."""
SMALL = 20_000_000
"""With fewer parameters, the weights stay in the CPU's cache: more threads or sequences cost more than they gain."""


@functools.cache
def llama() -> ModuleType:
    """llama.cpp's C functions, with logging silenced. Raises DeviceError if its library cannot be loaded."""
    wait_briefly()
    # a CUDA build needs torch's CUDA libraries: its wheels contain none
    package, nvidia = importlib.util.find_spec("llama_cpp"), importlib.util.find_spec("nvidia")
    origin = package.origin if package else None
    folders = nvidia.submodule_search_locations if nvidia else None
    if origin and folders and Path(origin).with_name("lib").joinpath("libggml-cuda.so").is_file():
        names = ("libcudart.so.*", "libcublasLt.so.*", "libcublas.so.*")
        for path in chain.from_iterable(Path(folders[0]).glob(f"*/lib/{name}") for name in names):
            with suppress(OSError):
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    try:
        import llama_cpp.llama_cpp as api
    except (RuntimeError, OSError) as error:
        hint = "run `sclite doctor`: it shows how to install a build for this machine"
        raise DeviceError(f"llama-cpp-python cannot be loaded: {error}", hint) from error

    @api.llama_log_callback
    def keep(level: int, text: bytes, _: object) -> None:
        _log.append(text.decode("utf-8", "replace"))

    _kept.append(keep)
    api.llama_log_set(keep, None)
    api.llama_backend_init()
    return api


def last_errors() -> str:
    """The errors among the last log lines of llama.cpp."""
    lines = [line.strip() for line in "".join(_log).splitlines()]
    errors = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return "; ".join(errors[-3:]) or "no reason given"


def check_gguf(path: Path) -> None:
    """Load a new file and run the model in a child process, because llama.cpp aborts the process that loads certain files.

    Raises DataError if that fails.
    """
    command = [sys.executable, "-m", "sclite.student.llama_cpp.engine", str(path)]
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}  # otherwise it starts a debugger
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        said = (done.stderr.decode("utf-8", "replace").strip() or "no reason given").splitlines()[-1]
        signal = f"it ends with signal {-done.returncode}: " if done.returncode < 0 else ""
        raise DataError(
            f"llama.cpp cannot read {path}: {signal}{said.partition('Error: ')[2] or said}",
            "llama.cpp does not support its tokenizer or header: use another base model, or another copy of the file",
        )


class Engine(AbstractContextManager["Engine"]):
    """One GGUF file as a student (protocol of sclite/student/base.py).

    Attributes: `vocabulary`; `description` (from llama.cpp, such as "llama 7B Q4_K - Medium"); `offloaded` (whether layers
    are on a GPU); `chat_template` (Jinja, "" if the file has none); `parallel`; `context` (tokens).
    Threads may share an engine: their requests then share its batches.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        parallel: int | None = None,
        context: int = 4096,
        gpu_layers: int = -1,
        cache_gb: float = 4.0,
        exact: bool = False,
    ):
        """Load the file. `context`: maximum tokens of a sequence (capped at the length the model was trained for).
        `parallel`: sequences decoded at once (default: as many as fit with their caches in `cache_gb` GB, at most 32,
        or 4 for a model under 20M parameters on a CPU); fewer if memory is short.

        Each sequence has its own cache, so the same requests give the same texts in every run.
        A model with factors for long contexts (Phi) gets the context of its short ones, which training uses.
        `exact`: float32 cache, no flash attention and no products of weights in RAM on a GPU, for comparisons (errors of
        1e-5 instead of 1e-2 nats; slower).
        Raises DataError (no such file, not a GGUF) or DeviceError (not enough memory).
        """
        self._api = api = llama()
        self._model = self._context = None
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path} does not exist", "run `sclite export` first")
        _log.clear()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        self._model = api.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            why = last_errors()
            if "allocate" in why or "out of memory" in why:
                raise DeviceError(f"{path} does not fit in memory: {why}", MEMORY_HINT)
            hint = "re-create it with `sclite export`, or copy it again"
            raise DataError(f"llama.cpp cannot load {path}: {why}", hint)
        self.offloaded: bool = bool(api.llama_supports_gpu_offload()) and gpu_layers != 0
        self.vocabulary = Vocabulary(api, self._model, self._metadata)
        count, buffer = api.llama_model_n_params(self._model), ctypes.create_string_buffer(256)
        api.llama_model_desc(self._model, buffer, len(buffer))
        size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
        self.description: str = buffer.value.decode("utf-8", "replace").replace("?B", size)
        template: bytes | None = api.llama_model_chat_template(self._model, None)
        self.chat_template = (template or b"").decode("utf-8", "replace")
        self.special_tokens = self.vocabulary.special_tokens
        self.trained_context: int = api.llama_model_n_ctx_train(self._model) or context
        kind = self._metadata("general.architecture")
        original = int(self._metadata(f"{kind}.rope.scaling.original_context_length") or 0)
        if 256 <= original < self.trained_context and self._metadata(f"{kind}.rope.scaling.type") != "yarn":
            # Phi-3.5 and Phi-4-mini: in a longer context llama.cpp uses other position factors, for short rows too
            self.trained_context = original // 256 * 256
        self.context = -(-min(context, self.trained_context) // 256) * 256
        # cache bytes per token: keys and values of every layer in float16; layer 0 may have no attention
        head = api.llama_model_n_embd(self._model) // max(1, api.llama_model_n_head(self._model))
        lengths = [int(self._metadata(f"{kind}.attention.{x}_length") or head) for x in ("key", "value")]
        heads = api.llama_model_n_head_kv(self._model) or api.llama_model_n_head(self._model)
        cell = 2 * api.llama_model_n_layer(self._model) * heads * sum(lengths)
        fitting = int(cache_gb * 1e9) // max(1, cell * self.context)
        most = 4 if count < SMALL and not self.offloaded else 32
        self.parallel: int = parallel or max(1, min(most, fitting))
        self.scheduler = self._open_context(count, exact)

    def _metadata(self, key: str) -> str | None:
        """A scalar of the GGUF as text, None if absent."""
        buffer = ctypes.create_string_buffer(256)
        found = self._api.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if found >= 0 else None

    def _open_context(self, count: int, exact: bool) -> Scheduler:
        """Open a context for the sequences of a model with `count` parameters."""
        api, model = self._api, self._model
        # Small models decode with one thread. Others get the cores that this process may use, or half of them if more
        # than 8 (hyperthreads); and one sequence of a model under 1B parameters half of the cores: on a busy machine a
        # 135M model wrote 78 tokens/s with 1 of 2 cores, 29 with both.
        cores = usable_cores()
        threads = 1 if count < SMALL else cores if cores <= 8 else cores // 2
        one = max(1, cores // 2) if SMALL <= count < 1_000_000_000 else threads
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = self.parallel * self.context, self.parallel
        parameters.n_batch, parameters.kv_unified = 2048, False
        parameters.n_threads, parameters.n_threads_batch = one, threads
        parameters.swa_full = True  # a cache pruned to the window cannot be shared
        if exact:
            parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            parameters.type_k = parameters.type_v = api.GGML_TYPE_F32
            parameters.op_offload = False
        _log.clear()
        while not (context := api.llama_init_from_model(model, parameters)) and self.parallel > 1:
            self.parallel //= 2
            parameters.n_ctx, parameters.n_seq_max = self.parallel * self.context, self.parallel
        self._context = context
        if not self._context:
            self.close()
            what = f"{self.parallel} sequences of {self.context} tokens"
            raise DeviceError(f"llama.cpp cannot open {self.path} for {what}: {last_errors()}", MEMORY_HINT)
        shares = not (api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model))
        return Scheduler(api, self._context, self.vocabulary, slots=self.parallel, shares=shares)

    def close(self) -> None:
        """Free the model's memory; the engine cannot be used afterwards."""
        if self._context:
            self.scheduler.close()
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = self._context = None

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- text and tokens

    def chat_ids(self, messages: Messages) -> list[int]:
        """Prompt ids: the rendered chat template, up to where the assistant begins. DataError without a template."""
        if not self.chat_template:
            raise DataError(f"{self.path} has no chat template", "export it from a chat (instruct) model")
        text = render_chat(self.chat_template, messages, self.special_tokens)
        return self.vocabulary.ids(text, special=True)

    def _ids(self, messages: Messages, pieces: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of prompt and pieces, and their number after each piece and, last, after the prompt."""
        ids, ends = self.chat_ids(messages), []
        prompt = len(ids)
        for piece in pieces:
            ids = ids + self.vocabulary.ids(piece)
            ends.append(len(ids))
        return ids, [*ends, prompt]

    # -- the student

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Yield each reply as it finishes. Greedy at temperature 0; `tokens` includes the end token.

        A prompt that does not fit yields a reply with finish "error" and the reason; a reply that reaches the end of the
        context has finish "length". Sampling depends only on the request's seed.
        """
        sequences = {self._sequence(request): index for index, request in enumerate(requests)}
        for done in self.scheduler.run(sequences):
            text, counts = done.text.decode("utf-8", "replace"), (done.generated, len(done.prompt))
            yield Reply(sequences[done], text, *counts, done.finish, done.error, done.computed)

    def stream(
        self, ask: Request | ScoreRequest, cancel: Event | None = None, pieces: bool = True
    ) -> Iterator[str | Reply | Scores]:
        """As in `Student`. Setting `cancel` frees the slot before the next token: finish "cancelled", or NaN scores."""
        if isinstance(ask, ScoreRequest):
            yield from self.score([ask], cancel)
            return
        sequence, sent = self._sequence(ask), 0
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        for _ in self.scheduler.run([sequence], cancel, stream=pieces):
            new = bytes(sequence.text[sent:])
            sent += len(new)
            if text := decode(new, final=bool(sequence.finish) and sent == len(sequence.text)):
                yield text
        text, counts = sequence.text.decode("utf-8", "replace"), (sequence.generated, len(sequence.prompt))
        yield Reply(0, text, *counts, sequence.finish, sequence.error, sequence.computed)

    def _sequence(self, request: Request) -> TokenSequence:
        """The sequence of a request; finished already if it does not fit."""
        ids, _ = self._ids(request.messages, request.pieces)
        room = self.context - len(ids)
        sequence = TokenSequence(ids, request=request, limit=min(request.max_tokens, room))
        if room < 1:
            # LiteLLM recognizes this wording, and then tries a model with a longer context
            limit = f"this model's maximum context length is {self.context} tokens"
            sequence.error = f"{limit}, the prompt has {len(ids)}: use a longer context"
            sequence.finish = "error"
        return sequence

    def score(self, requests: Sequence[ScoreRequest], cancel: Event | None = None) -> Iterator[Scores]:
        """Yield the log-odds of the options at each mark: one prefill per request, plus the options that are not in it.

        A request that does not fit, or is cancelled, gives NaN at every mark.
        """
        odds_of: dict[int, list[list[Option]]] = {}
        owner: dict[TokenSequence, int] = {}
        for index, request in enumerate(requests):
            ids, ends = self._ids(request.messages, request.pieces)
            others = [self.vocabulary.ids(option)[0] for option in request.others]
            whole, odds_of[index] = TokenSequence(ids), []
            for mark, texts in zip(request.marks, request.options, strict=True):
                options = [self.vocabulary.ids(text) for text in texts if text is not None]
                heads = [*(option[0] for option in options), *others]
                if len(options) == 2 and all(heads.count(option[0]) == 1 for option in options):
                    options = [option[:1] for option in options]  # first tokens suffice
                odds_of[index].append([whole.option(ends[mark] - 1, option) for option in options])
            # last marks first: each sequence finds its prefix in the cache of the one before
            latest = sorted(chain(*odds_of[index]), key=lambda option: -option[1][0][0])
            parts = [part for part in dict.fromkeys([whole, *(part for part, _ in latest)]) if part.reads]
            if max(len(part.ids) for part in parts) > self.context:
                yield Scores(index, (float("nan"),) * len(request.marks))
            else:
                owner.update(dict.fromkeys(parts, index))
        missing, prefill = Counter(owner.values()), Counter[int]()
        # few slots: one after another in one slot, so that another keeps the solution in its cache for the continuation
        runs = [[part] for part in owner] if self.parallel < FEW else [list(owner)]
        for done in chain.from_iterable(self.scheduler.run(run, cancel) for run in runs):
            index = owner[done]
            missing[index] -= 1
            prefill[index] += done.computed
            if not missing[index]:
                odds = tuple(log_odds(*options) for options in odds_of.pop(index))
                yield Scores(index, odds, prefill[index])

    def log_probabilities(self, ids: Sequence[int]) -> np.ndarray:
        """log p of every token after each of the ids: float64 (len(ids), size of the vocabulary)."""
        sequence = TokenSequence(list(ids), reads=dict.fromkeys(range(len(ids))))
        (done,) = self.scheduler.run([sequence])
        return np.stack([done.read[position] for position in range(len(ids))])


if __name__ == "__main__":  # for check_gguf
    with Engine(sys.argv[1], parallel=1, context=256, gpu_layers=0) as loaded:
        loaded.log_probabilities(loaded.vocabulary.ids("<Step1>2 + 3 = 5 €\n</Step1>\n<Cause>"))

"""Many sequences at once in one llama.cpp context: slots, mixed batches, shared prefixes.

A sequence is fed from `fed` to the end of its ids; prefill and decoding are the same operation. A finished sequence's
slot goes to the next one in the queue before the next batch, so a batch is always as full as the queue allows. The cache
of a slot is kept until its space is needed, and a new sequence with the same prefix copies it instead of computing it.
Only the scheduler's own thread touches the context: callers wait for events, so Ctrl-C never stops it halfway.
"""

import ctypes
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Thread

import numpy as np

from sclite.errors import DeviceError
from sclite.student.llama_cpp.sequence import TokenSequence
from sclite.student.llama_cpp.vocabulary import Vocabulary

WORTH_SHARING = 16
"""A shorter common prefix, in tokens, is recomputed."""


@dataclass(eq=False)
class _Slot:
    number: int
    sequence: TokenSequence | None = None
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    freed_at: int = 0

    def held(self) -> tuple[np.ndarray, int]:
        """Ids of this slot and how many of them are in the cache."""
        if self.sequence is None:
            return self.kept, len(self.kept)
        return self.sequence.prompt, min(self.sequence.fed, len(self.sequence.prompt))


@dataclass(eq=False)
class _Run:
    """The sequences of one call, and what has happened to them: (sequence, whether it is finished), or an error."""

    cancel: Event
    stream: bool
    left: int
    dropped: bool = False
    events: SimpleQueue = field(default_factory=SimpleQueue)


class Scheduler:
    """Feeds sequences to one llama.cpp context. Several runs may overlap, also from several threads."""

    def __init__(
        self, api, context, vocabulary: Vocabulary, *, slots: int, cells: int, unified: bool, shares: bool
    ):
        """`cells`: size of the whole cache in tokens; `unified`: one cache for all slots, else an equal part per slot."""
        self.api, self.context, self.vocabulary = api, context, vocabulary
        self.memory = api.llama_get_memory(context)
        self.cells, self.unified, self.shares = cells, unified, shares
        self.slots = [_Slot(number) for number in range(slots)]
        self.waiting: deque[tuple[TokenSequence, _Run]] = deque()
        self.active: dict[_Slot, _Run] = {}
        self.steps = self.fed_tokens = self.shared_tokens = self.preempted = 0
        self._seen: tuple[int | None, int] = (None, 0)
        self._build_batch(api.llama_n_batch(context))
        self._inbox: SimpleQueue[tuple[list[TokenSequence], _Run] | None] = SimpleQueue()
        self._runs: set[_Run] = set()
        self._stopped = False
        self._thread = Thread(target=self._work, name="llama.cpp", daemon=True)
        self._thread.start()

    def run(
        self, sequences: Iterable[TokenSequence], cancel: Event | None = None, stream: bool = False
    ) -> Iterator[TokenSequence]:
        """Yield each sequence as it finishes, with `stream` also when it has new text. The newest run goes first.

        Closing the iterator, or setting `cancel` from any thread, frees the slots before the next batch; cancelled
        sequences finish as "cancelled".
        """
        sequences = list(sequences)
        run = _Run(cancel or Event(), stream, len(sequences))
        self._inbox.put((sequences, run))
        left = len(sequences)
        try:
            while left:
                if self._stopped:  # it may have missed this run
                    raise DeviceError("the llama.cpp engine is closed", "load the model again")
                event = run.events.get()
                if isinstance(event, Exception):
                    raise event
                sequence, finished = event
                left -= finished
                yield sequence
        finally:
            run.dropped = True

    def close(self) -> None:
        """Stop after the current batch."""
        self._inbox.put(None)
        self._thread.join()

    # -- in the scheduler's thread ---------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._receive():
                if self.waiting or self.active:
                    self._step()
        finally:
            self._stopped = True
            self._receive(wait=False)
            self._fail(DeviceError("the llama.cpp engine stopped", "load the model again"))

    def _receive(self, wait: bool = True) -> bool:
        """Take new runs, waiting for one if there is nothing to do, and drop cancelled ones. False: close."""
        wait = wait and not (self.waiting or self.active)
        while True:
            try:
                new = self._inbox.get(block=wait)
            except Empty:
                break
            if new is None:
                return False
            sequences, run = new
            wait = False
            self._runs.add(run)
            self.waiting.extendleft((sequence, run) for sequence in reversed(sequences))
        for run in [run for run in self._runs if run.dropped or run.cancel.is_set()]:
            stopped = [sequence for sequence, owner in self.waiting if owner is run]
            self.waiting = deque(entry for entry in self.waiting if entry[1] is not run)
            for slot in [slot for slot, owner in self.active.items() if owner is run]:
                stopped.append(slot.sequence)
                self._release(slot)
            for sequence in stopped:
                sequence.finish = sequence.finish or "cancelled"
                self._report(sequence, run)
            self._runs.discard(run)
        return True

    def _report(self, sequence: TokenSequence, run: _Run) -> None:
        run.events.put((sequence, True))
        run.left -= 1
        if not run.left:
            self._runs.discard(run)

    def _fail(self, error: DeviceError) -> None:
        """End every run with an error, and clear the cache."""
        for run in self._runs:
            run.events.put(error)
        self._runs.clear()
        self.waiting.clear()
        for slot in list(self.active):
            self._release(slot)
        for slot in self.slots:
            slot.kept = slot.kept[:0]
        self.api.llama_memory_clear(self.memory, True)

    def _step(self) -> None:
        self._admit()
        spans = self._fill()
        if not spans:
            return
        code = self.api.llama_decode(self.context, self.batch)
        if code == 1:
            self._make_room()
            return
        if code != 0:
            self._fail(
                DeviceError(
                    f"llama.cpp could not compute a batch of {self.batch.n_tokens} tokens (code {code})",
                    "use fewer parallel sequences, a shorter context, or fewer GPU layers",
                )
            )
            return
        self.steps += 1
        self.fed_tokens += self.batch.n_tokens
        self._read(spans)

    def _read(self, spans: list[tuple[_Slot, int, list[int]]]) -> None:
        """Pass the logits of the last batch to their sequences, and free the slots of finished ones."""
        total = sum(len(positions) for _, _, positions in spans)
        if total:
            pointer = self.api.llama_get_logits(self.context)
            place = ctypes.cast(pointer, ctypes.c_void_p).value
            if (place, total) != self._seen:  # their address rarely changes, and making the array takes long
                self._seen = place, total
                self._rows = np.ctypeslib.as_array(pointer, (total, self.vocabulary.size))
            rows = self._rows
            best = rows.argmax(axis=1)
        row = 0
        for slot, stop, positions in spans:
            sequence, run = slot.sequence, self.active[slot]
            sequence.fed = stop
            if positions:
                end = row + len(positions)
                sequence.take(positions, rows[row:end], best[row:end], self.vocabulary)
                row = end
                if sequence.finish:
                    self._release(slot)
                    self._report(sequence, run)
                elif run.stream:
                    run.events.put((sequence, False))

    # -- slots

    def _admit(self) -> None:
        """Put waiting sequences into free slots, as far as the cache has room."""
        free = [slot for slot in self.slots if slot.sequence is None]
        while self.waiting and free:
            sequence, run = self.waiting[0]
            if sequence.finish:  # it could not even start
                self.waiting.popleft()
                self._report(sequence, run)
                continue
            source, common, ready = self._longest_prefix(sequence)
            if common - ready >= WORTH_SHARING:
                return  # the prefix is being computed now: after this batch it can be copied
            needed = len(sequence.ids) - ready + 32  # cells, with room to decode
            needed += sum(len(s.sequence.ids) - s.sequence.shared + 32 for s in self.active)
            if self.unified and self.active and needed > self.cells:
                return
            self.waiting.popleft()
            slot = min(free, key=lambda s: (len(s.kept) > 0, s.freed_at))
            if source in free and (len(slot.kept) or ready == len(source.kept)):
                slot = source  # else the source's own end stays in the cache, such as the solution that is reviewed
            free.remove(slot)
            self._copy_prefix(source, slot, ready)
            slot.sequence, sequence.fed, sequence.shared = sequence, ready, ready
            self.shared_tokens += ready
            self.active[slot] = run

    def _longest_prefix(self, sequence: TokenSequence) -> tuple[_Slot | None, int, int]:
        """The slot that shares the longest prefix with the sequence; its length; how much of it is in the cache."""
        source, common, ready = None, 0, 0
        if not self.shares:
            return source, common, ready
        ids = sequence.prompt
        most = min(len(ids), sequence.first_read)
        for slot in self.slots:
            held, cached = slot.held()
            length = min(len(held), most)
            if length < max(WORTH_SHARING, common):
                continue
            different = held[:length] != ids[:length]
            length = int(different.argmax()) if different.any() else length
            if length >= WORTH_SHARING and (length, min(cached, length)) > (common, ready):
                source, common, ready = slot, length, min(cached, length)
        return source, common, ready if ready >= WORTH_SHARING else 0

    def _copy_prefix(self, source: _Slot | None, slot: _Slot, count: int) -> None:
        """Set the cache of `slot` to the first `count` tokens of `source`."""
        if not count or source is not slot:
            self.api.llama_memory_seq_rm(self.memory, slot.number, -1, -1)
        if count and source is not slot:  # separate caches can only be copied whole
            end = count if self.unified else -1
            self.api.llama_memory_seq_cp(
                self.memory, source.number, slot.number, 0 if self.unified else -1, end
            )
        if count:
            self.api.llama_memory_seq_rm(self.memory, slot.number, count, -1)

    def _release(self, slot: _Slot) -> None:
        sequence = slot.sequence
        slot.kept = np.array(sequence.ids[: sequence.fed], dtype=np.int32)
        slot.sequence, slot.freed_at = None, self.steps
        del self.active[slot]

    def _make_room(self) -> None:
        """The unified cache is full: clear the idle slots, or else put the newest sequence back into the queue."""
        cleared = [slot for slot in self.slots if slot.sequence is None and len(slot.kept)]
        if not cleared:
            slot, run = list(self.active.items())[-1]
            sequence = slot.sequence
            alone = len(self.active) == 1
            self._release(slot)
            if alone:
                sequence.finish = "error"
                sequence.error = f"the cache of {self.cells} tokens is too small for this request"
                self._report(sequence, run)
            else:
                self.preempted += 1
                sequence.read.clear()
                self.waiting.appendleft((sequence, run))
            cleared = [slot]
        for slot in cleared:
            self.api.llama_memory_seq_rm(self.memory, slot.number, -1, -1)
            slot.kept = slot.kept[:0]

    # -- the batch

    def _build_batch(self, size: int) -> None:
        """Build a llama_batch over numpy arrays, so that filling it takes slices instead of a call per token."""
        self.size = size
        self.tokens, self.positions, self.owners = (np.zeros(size, np.int32) for _ in range(3))
        self.outputs, counts = np.zeros(size, np.int8), np.ones(size, np.int32)
        pointers = (self.owners.ctypes.data + 4 * np.arange(size)).astype(np.uintp)
        self._alive = (counts, pointers)
        fields = zip(
            ("token", "pos", "n_seq_id", "seq_id", "logits"),
            (self.tokens, self.positions, counts, pointers, self.outputs),
            strict=True,
        )
        self.batch = self.api.llama_batch()
        for name, array in fields:
            kind = dict(self.batch._fields_)[name]
            setattr(self.batch, name, ctypes.cast(array.ctypes.data, kind))

    def _fill(self) -> list[tuple[_Slot, int, list[int]]]:
        """Fill the batch: decoding sequences first, then prompts. Returns (slot, fed up to, positions read).

        In order of slots: llama.cpp computes consecutive slots together, others one at a time.
        """
        count, spans = 0, []
        for slot in sorted(self.active, key=lambda s: (len(s.sequence.ids) - s.sequence.fed > 1, s.number)):
            sequence = slot.sequence
            start = sequence.fed
            stop = min(len(sequence.ids), start + self.size - count)
            if stop == start:
                break
            end = count + stop - start
            self.tokens[count:end] = sequence.ids[start:stop]
            self.positions[count:end] = range(start, stop)
            self.owners[count:end] = slot.number
            self.outputs[count:end] = 0
            wanted = sequence.wanted(start, stop)
            for position in wanted:
                self.outputs[count + position - start] = 1
            spans.append((slot, stop, wanted))
            count = end
        self.batch.n_tokens = count
        return spans

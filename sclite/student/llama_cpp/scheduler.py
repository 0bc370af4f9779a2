"""Many sequences at once in one llama.cpp context: slots, mixed batches, shared prefixes.

A sequence is decoded from `past` to the end of its ids; prefill and decoding are the same operation. A finished sequence's
slot goes to the next one in the queue before the next batch, so batches are always as full as the queue allows. The cache
of a slot is kept until its space is needed, and a new sequence with the same prefix copies it instead of computing it.
Only the scheduler's own thread touches the context: callers wait for events, so Ctrl-C never stops it halfway.
"""

import ctypes
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Thread
from types import ModuleType

import numpy as np

from sclite.errors import DeviceError
from sclite.student.llama_cpp.sequence import Run, TokenSequence
from sclite.student.llama_cpp.vocabulary import Vocabulary

WORTH_SHARING = 16
"""Tokens; a shorter common prefix is recomputed."""
MOST_READ = 256
"""Maximum number of logits read from a batch, each a row of the vocabulary: 0.16 GB for 152k tokens."""
MEMORY_HINT = "close other programs that use the memory, export a smaller quantization, or lower eval.context (or --parallel of serve)"


@dataclass(eq=False)
class _Slot:
    number: int
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Ids in the cache since the slot was freed."""
    freed_at: int = 0


class Scheduler:
    """Feeds sequences to one llama.cpp context. Several runs may overlap, also from several threads."""

    def __init__(
        self,
        api: ModuleType,
        context: int,
        vocabulary: Vocabulary,
        *,
        slots: int,
        cells: int,
        unified: bool,
        shares: bool,
    ):
        """`cells`: size of the whole cache in tokens; `unified`: one cache for all slots, else an equal part per slot."""
        self.api, self.context, self.vocabulary = api, context, vocabulary
        self.memory = api.llama_get_memory(context)
        self.cells, self.unified, self.shares = cells, unified, shares
        self.slots = [_Slot(number) for number in range(slots)]
        self.waiting: deque[TokenSequence] = deque()
        self.active: dict[_Slot, TokenSequence] = {}
        self.steps = self.shared_tokens = self.preempted = 0
        self._seen: tuple[int | None, int] = (None, 0)
        self.size = size = api.llama_n_batch(context)
        # a llama_batch over numpy arrays: filling it takes slices instead of a call per token
        self.tokens, self.positions, self.owners = (np.zeros(size, np.int32) for _ in range(3))
        self.outputs = np.zeros(size, np.int8)
        self._arrays: dict[str, np.ndarray] = {  # kept: the batch has only their addresses
            "token": self.tokens,
            "pos": self.positions,
            "n_seq_id": np.ones(size, np.int32),
            "seq_id": (self.owners.ctypes.data + 4 * np.arange(size)).astype(np.uintp),
            "logits": self.outputs,
        }
        self.batch = api.llama_batch()
        kinds = dict(self.batch._fields_)
        for name, array in self._arrays.items():
            setattr(self.batch, name, ctypes.cast(array.ctypes.data, kinds[name]))
        self._inbox: SimpleQueue[list[TokenSequence] | None] = SimpleQueue()
        self._runs: set[Run] = set()
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
        left = len(sequences)
        run = Run(left, cancel or Event(), stream)
        for sequence in sequences:
            sequence.run = run
        self._inbox.put(sequences)
        try:
            while left:
                if self._stopped:  # it may have missed this run
                    raise DeviceError("the llama.cpp engine is closed", "load the model again")
                event = run.events.get()
                if isinstance(event, DeviceError):
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
            wait = False
            self._runs.update(sequence.run for sequence in new)
            self.waiting.extendleft(reversed(new))
        for run in [run for run in self._runs if run.dropped or run.cancel.is_set()]:
            stopped = [sequence for sequence in self.waiting if sequence.run is run]
            self.waiting = deque(sequence for sequence in self.waiting if sequence.run is not run)
            stopped += [self._release(slot) for slot, seq in list(self.active.items()) if seq.run is run]
            for sequence in stopped:
                sequence.finish = sequence.finish or "cancelled"
                self._report(sequence)
        return True

    def _report(self, sequence: TokenSequence) -> None:
        run = sequence.run
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
        """Compute one batch: decoding sequences first, then prompts.

        In order of slots: llama.cpp computes consecutive slots together, others one at a time.
        """
        self._admit()
        count, room = 0, MOST_READ
        spans: list[tuple[_Slot, int, list[int]]] = []  # slot, decoded up to, positions read
        prompts_last = sorted(self.active.items(), key=lambda e: (len(e[1].ids) - e[1].past > 1, e[0].number))
        for slot, sequence in prompts_last:
            start = sequence.past
            stop = min(len(sequence.ids), start + self.size - count)
            wanted = sequence.wanted(start, stop)
            if len(wanted) > room:
                stop, wanted = wanted[room], wanted[:room]
            if stop == start:
                break
            room -= len(wanted)
            end = count + stop - start
            self.tokens[count:end] = sequence.ids[start:stop]
            self.positions[count:end] = range(start, stop)
            self.owners[count:end] = slot.number
            self.outputs[count:end] = 0
            for position in wanted:
                self.outputs[count + position - start] = 1
            spans.append((slot, stop, wanted))
            count = end
        if not spans:
            return
        self.batch.n_tokens = count
        code = self.api.llama_decode(self.context, self.batch)
        if code == 1:
            # the unified cache is full: clear the idle slots, or else the newest sequence waits again
            cleared = [slot for slot in self.slots if slot not in self.active and len(slot.kept)]
            if not cleared:
                cleared = [list(self.active)[-1]]
                sequence = self._release(cleared[0])
                if self.active:
                    self.preempted += 1
                    sequence.read.clear()
                    self.waiting.appendleft(sequence)
                else:
                    sequence.finish = "error"
                    sequence.error = f"the cache of {self.cells} tokens is too small for this request"
                    self._report(sequence)
            for slot in cleared:
                self.api.llama_memory_seq_rm(self.memory, slot.number, -1, -1)
                slot.kept = slot.kept[:0]
            return
        if code != 0:
            what = f"llama.cpp could not compute a batch of {count} tokens (code {code})"
            self._fail(DeviceError(what, MEMORY_HINT))
            return
        self.steps += 1
        self._read(spans)

    def _read(self, spans: list[tuple[_Slot, int, list[int]]]) -> None:
        """Pass the logits of the last batch to their sequences, and free the slots of finished ones."""
        total = sum(len(positions) for _, _, positions in spans)
        if total:
            pointer = self.api.llama_get_logits(self.context)
            place = ctypes.cast(pointer, ctypes.c_void_p).value
            if (place, total) != self._seen:  # the address rarely changes, and creating the array is slow
                self._seen = place, total
                self._rows = np.ctypeslib.as_array(pointer, (total, self.vocabulary.size))
            rows = self._rows
            best = rows.argmax(axis=1)
        row = 0
        for slot, stop, positions in spans:
            sequence = self.active[slot]
            sequence.past = stop
            if positions:
                end = row + len(positions)
                sequence.take(positions, rows[row:end], best[row:end], self.vocabulary)
                row = end
                if sequence.finish:
                    self._release(slot)
                    self._report(sequence)
                elif sequence.run.stream:
                    sequence.run.events.put((sequence, False))

    # -- slots

    def _admit(self) -> None:
        """Put waiting sequences into free slots while the cache has room."""
        free = [slot for slot in self.slots if slot not in self.active]
        while self.waiting and free:
            sequence = self.waiting[0]
            if sequence.finish:  # it could not even start
                self._report(self.waiting.popleft())
                continue
            # the slot with the longest common prefix, the prefix's length, and how much of it is in the cache
            source: _Slot | None = None
            common = ready = 0
            read = min(sequence.reads, default=len(sequence.ids) - 1)  # computed whatever the cache holds
            most = min(len(sequence.prompt), read) if self.shares else 0
            for other in self.slots:
                owner = self.active.get(other)
                held = other.kept if owner is None else owner.prompt
                length = min(len(held), most)
                if length < max(WORTH_SHARING, common):
                    continue
                different = held[:length] != sequence.prompt[:length]
                length = int(different.argmax()) if different.any() else length
                cached = min(length, len(held) if owner is None else owner.past)
                if length >= WORTH_SHARING and (length, cached) > (common, ready):
                    source, common, ready = other, length, cached
            ready = ready if ready >= WORTH_SHARING else 0
            if common - ready >= WORTH_SHARING:
                return  # the prefix is being computed: it can be copied after this batch
            needed = len(sequence.ids) - ready + 32  # cells, with room to decode
            needed += sum(len(running.ids) - running.shared + 32 for running in self.active.values())
            if self.unified and self.active and needed > self.cells:
                return
            self.waiting.popleft()
            slot = min(free, key=lambda s: (len(s.kept) > 0, s.freed_at))
            if source is not None and source in free and (len(slot.kept) or ready == len(source.kept)):
                slot = source  # else the rest of the source stays in the cache, such as the solution under review
            free.remove(slot)
            if source is not slot or not ready:
                self.api.llama_memory_seq_rm(self.memory, slot.number, -1, -1)
            if ready and source is not None:
                if source is not slot:  # separate caches can only be copied whole
                    place = (0, ready) if self.unified else (-1, -1)
                    self.api.llama_memory_seq_cp(self.memory, source.number, slot.number, *place)
                self.api.llama_memory_seq_rm(self.memory, slot.number, ready, -1)
            sequence.past = sequence.shared = ready
            sequence.computed += len(sequence.ids) - ready
            self.shared_tokens += ready
            self.active[slot] = sequence

    def _release(self, slot: _Slot) -> TokenSequence:
        sequence = self.active.pop(slot)
        slot.kept, slot.freed_at = np.array(sequence.ids[: sequence.past], dtype=np.int32), self.steps
        return sequence

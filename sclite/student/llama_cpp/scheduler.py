"""Many sequences at once in one llama.cpp context: slots, mixed batches, shared prefixes.

A sequence is decoded from `past` to the end of its ids; prefill and decoding are the same operation. A finished sequence's
slot goes to the next one in the queue before the next batch, so batches are always as full as the queue allows. The cache
of a slot is kept until its space is needed, and a new sequence with the same prefix copies it instead of computing it.
Only the scheduler's own thread touches the context: callers wait for events, so Ctrl-C never stops it halfway.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread
from types import ModuleType

import numpy as np

from sclite.errors import DeviceError
from sclite.student.llama_cpp.sequence import Run, TokenSequence, Vocabulary

WORTH_SHARING = 16
"""Tokens; a shorter common prefix is recomputed."""
MOST_READ = 256
"""Maximum number of logits read from a batch, each a row of the vocabulary: 0.16 GB for 152k tokens."""
MEMORY_HINT = "close other programs that use the memory, export a smaller quantization, or lower eval.context (or --parallel of serve)"


class Scheduler:
    """Feeds sequences to one llama.cpp context. Several runs may overlap, also from several threads."""

    def __init__(self, api: ModuleType, context: int, vocabulary: Vocabulary, *, slots: int, shares: bool):
        """`shares`: whether a prefix in the cache of one sequence can be copied to another."""
        self.api, self.context, self.vocabulary, self.shares = api, context, vocabulary, shares
        self.memory = api.llama_get_memory(context)
        self.waiting: deque[TokenSequence] = deque()
        self.active: dict[int, TokenSequence] = {}  # by slot
        # of each slot: the ids in its cache since it was freed, and the step at which that was
        self.kept, self.freed_at = [np.zeros(0, np.int32)] * slots, [0] * slots
        self.steps = 0
        self.size: int = api.llama_n_batch(context)
        self.batch = api.llama_batch_init(self.size, 0, 1)
        self._inbox: SimpleQueue[list[TokenSequence] | None] = SimpleQueue()
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
        yield from (sequence for sequence in sequences if sequence.finish)  # those that do not fit
        sequences = [sequence for sequence in sequences if not sequence.finish]
        run, left = Run(cancel or Event(), stream), len(sequences)
        for sequence in sequences:
            sequence.run = run
        self._inbox.put(sequences)
        try:
            while left:
                try:
                    event = run.events.get(timeout=1)
                except Empty:
                    if self._thread.is_alive():
                        continue
                    raise DeviceError("the llama.cpp engine is closed", "load the model again") from None
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
        self.api.llama_batch_free(self.batch)

    # -- in the scheduler's thread ---------------------------------------------------------------------------------

    def _work(self) -> None:
        """Take new runs, waiting for one if there is nothing to do, drop cancelled ones, and compute a batch."""
        while True:
            with suppress(Empty):
                while (new := self._inbox.get(block=not (self.waiting or self.active))) is not None:
                    self.waiting.extendleft(reversed(new))
                return  # closed
            running = [*self.waiting, *self.active.values()]
            if stopped := {seq for seq in running if seq.run.dropped or seq.run.cancel.is_set()}:
                self.waiting = deque(sequence for sequence in self.waiting if sequence not in stopped)
                for slot in [slot for slot, sequence in self.active.items() if sequence in stopped]:
                    self._release(slot)
                for sequence in stopped:
                    sequence.finish = "cancelled"
                    sequence.run.events.put((sequence, True))
            if self.waiting or self.active:
                self._step()

    def _step(self) -> None:
        """Compute one batch: decoding sequences first, then prompts.

        In order of slots: llama.cpp computes consecutive slots together, others one at a time.
        """
        self._admit()
        batch, count, read = self.batch, 0, 0
        spans: list[tuple[int, int, list[int]]] = []  # slot, decoded up to, positions read
        prompts_last = sorted(self.active.items(), key=lambda e: (len(e[1].ids) - e[1].past > 1, e[0]))
        for slot, sequence in prompts_last:
            start = sequence.past
            stop = min(len(sequence.ids), start + self.size - count)
            # the positions whose logits are needed
            wanted = sorted(position for position in sequence.reads if start <= position < stop)
            if sequence.request is not None:
                wanted = [stop - 1] if stop == len(sequence.ids) else []
            if len(wanted) > MOST_READ - read:
                stop, wanted = wanted[MOST_READ - read], wanted[: MOST_READ - read]
            if stop == start:
                break
            for position in range(start, stop):
                batch.token[count], batch.pos[count] = sequence.ids[position], position
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, slot
                batch.logits[count] = 0
                count += 1
            for position in wanted:
                batch.logits[count - stop + position] = 1
            read += len(wanted)
            spans.append((slot, stop, wanted))
        batch.n_tokens = count
        if code := self.api.llama_decode(self.context, batch):
            what = f"llama.cpp could not compute a batch of {count} tokens (code {code})"
            for run in {sequence.run for sequence in (*self.waiting, *self.active.values())}:
                run.events.put(DeviceError(what, MEMORY_HINT))
            self.waiting.clear()
            self.active.clear()
            self.kept = [ids[:0] for ids in self.kept]
            self.api.llama_memory_clear(self.memory, True)
            return
        self.steps += 1
        if read:
            rows = np.ctypeslib.as_array(
                self.api.llama_get_logits(self.context), (read, self.vocabulary.size)
            )
        row = 0
        for slot, stop, wanted in spans:
            sequence = self.active[slot]
            sequence.past = stop
            if wanted:
                sequence.take(wanted, rows[row : row + len(wanted)], self.vocabulary)
                row += len(wanted)
                if sequence.finish:
                    self._release(slot)
                if sequence.finish or sequence.run.stream:
                    sequence.run.events.put((sequence, bool(sequence.finish)))

    # -- slots

    def _admit(self) -> None:
        """Put waiting sequences into free slots."""
        free = [slot for slot in range(len(self.kept)) if slot not in self.active]
        while self.waiting and free:
            sequence = self.waiting[0]
            # the slot with the longest common prefix, the prefix's length, and how much of it is in the cache
            source: int | None = None
            common = ready = 0
            read = min(sequence.reads, default=len(sequence.ids) - 1)  # computed whatever the cache holds
            most = min(len(sequence.prompt), read) if self.shares else 0
            for other, kept in enumerate(self.kept):
                owner = self.active.get(other)
                held = kept if owner is None else owner.prompt
                length = min(len(held), most)
                different = held[:length] != sequence.prompt[:length]
                length = int(different.argmax()) if different.any() else length
                cached = length if owner is None else min(length, owner.past)
                if length >= WORTH_SHARING and (length, cached) > (common, ready):
                    source, common, ready = other, length, cached
            if ready < common:
                return  # the prefix is being computed: it can be copied after this batch
            self.waiting.popleft()
            slot = min(free, key=lambda slot: (len(self.kept[slot]) > 0, self.freed_at[slot]))
            if source in free and (len(self.kept[slot]) or ready == len(self.kept[source])):
                slot = source  # else the rest of the source stays in the cache, such as the solution under review
            free.remove(slot)
            if source != slot:
                self.api.llama_memory_seq_rm(self.memory, slot, -1, -1)
            if source is not None:
                if source != slot:  # separate caches can only be copied whole
                    self.api.llama_memory_seq_cp(self.memory, source, slot, -1, -1)
                self.api.llama_memory_seq_rm(self.memory, slot, ready, -1)
            sequence.past = ready
            sequence.computed += len(sequence.ids) - ready
            self.active[slot] = sequence

    def _release(self, slot: int) -> None:
        sequence = self.active.pop(slot)
        self.kept[slot], self.freed_at[slot] = np.array(sequence.ids[: sequence.past], np.int32), self.steps

"""A transformers model as a student: batched generation and scoring with the model that is trained."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from sclite.errors import DataError
from sclite.signature import digest
from sclite.student.base import Messages, Reply, Request, ScoreRequest, Scores, Student, tokens_to_compare
from sclite.student.cuda_memory import free_memory, is_out_of_memory
from sclite.student.loader import max_positions
from sclite.student.log_probs import autocast, hidden_states, log_probs_at, pad
from sclite.student.tokenization import Encoded, end_id, piece_ids, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Read = tuple[int, int, int]
"""(row, position, token): the log-probability of this token after this position."""
SCORED_TOKENS = 16_384
"""Tokens, padding included, of a forward pass that only reads scores."""


class HFModel(Student):
    """A transformers model with its tokenizer. Sampling is seeded per batch: `batch_size` requests share one seed."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int = 64):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.fitting_size = batch_size
        self.positions = max_positions(model.config)
        self.end = end_id(tokenizer)

    def _ids(self, messages: Messages, pieces: Sequence[str]) -> list[int]:
        return [*prompt_ids(self.tokenizer, messages), *chain(*piece_ids(self.tokenizer, pieces))]

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Generate in batches. Requests of one batch should have the same temperature and stop strings.

        If a batch does not fit in GPU memory, the batch size is halved for this and all later batches.
        """
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            begin = 0
            while begin < len(batch):
                size = min(self.fitting_size, len(batch) - begin)
                try:
                    replies = list(self._generate(batch[begin : begin + size], start + begin))
                except RuntimeError as error:
                    if size == 1 or not is_out_of_memory(error):
                        raise
                    self.fitting_size = size // 2
                    free_memory()
                else:
                    yield from replies
                    begin += size

    def _generate(self, batch: Sequence[Request], start: int) -> Iterator[Reply]:
        import torch

        first, tokenizer = batch[0], self.tokenizer
        prompts = [self._ids(request.messages, request.pieces) for request in batch]
        width, max_tokens = max(map(len, prompts)), max(request.max_tokens for request in batch)
        if width + max_tokens > self.positions:
            raise DataError(
                f"a prompt of {width} tokens and an answer of {max_tokens} exceed the student's {self.positions} positions",
                "lower attempts.max_tokens",
            )
        settings: dict[str, Any] = {"do_sample": first.temperature > 0}
        if first.temperature > 0:
            settings |= {"temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
            torch.manual_seed(int(digest([[r.seed for r in batch], prompts[0]]), 16) % 2**63)
        if first.stop:
            settings |= {"stop_strings": list(first.stop), "tokenizer": tokenizer}
        ends = [self.end]
        if tokenizer.eos_token_id not in (None, self.end):
            ends.append(tokenizer.eos_token_id)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode(), autocast(self.model):
            out = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max_tokens,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                **settings,
            )
        self.model.train(was_training)
        new_rows = out[:, width:].tolist()
        for index, (request, prompt, row) in enumerate(zip(batch, prompts, new_rows, strict=True), start):
            stop_at = next((i for i, token in enumerate(row) if token in ends), None)
            new = row[:stop_at]
            text = tokenizer.decode(new, skip_special_tokens=True)
            finish = "length" if stop_at is None else "stop"
            for stop in request.stop:
                if stop in text:
                    text, finish = text[: text.index(stop) + len(stop)], "stop"
            yield Reply(index, text, len(new), len(prompt), finish)

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        """Yield the log-odds of the two options after each mark, from one row per request and one per absent option.

        Only the positions that are read go through the head, in float32: logits of all would take tens of gigabytes.
        """
        rows: list[list[int]] = []
        plans: list[
            tuple[int, list[list[Read]]]
        ] = []  # per request: its length, and the reads of each option
        for request in requests:
            new_rows, reads = self._plan_reads(request, len(rows))
            plans.append((len(new_rows[0]), reads))
            rows += new_rows
        was_training = self.model.training
        self.model.eval()
        log_probs = self._read(rows, {read for _, options in plans for reads in options for read in reads})
        self.model.train(was_training)
        for index, (length, options) in enumerate(plans):
            sums = [sum(log_probs[read] for read in reads) for reads in options]
            odds = tuple(first - second for first, second in zip(sums[::2], sums[1::2], strict=True))
            yield Scores(index, odds, length)

    def _plan_reads(self, request: ScoreRequest, first_row: int) -> tuple[list[list[int]], list[list[Read]]]:
        """(rows, reads of each option of each mark); the rows are numbered from `first_row`."""
        ids, ends = self._ids(request.messages, ()), []
        for piece in piece_ids(self.tokenizer, request.pieces):
            ids = ids + piece
            ends.append(len(ids))
        rows, plan = [ids], []
        others = piece_ids(self.tokenizer, request.others)
        for mark, texts in zip(request.marks, request.options, strict=True):
            at = ends[mark] - 1
            for tokens in tokens_to_compare(*piece_ids(self.tokenizer, texts), others):
                row = 0
                if ids[at + 1 : at + len(tokens)] != tokens[:-1]:
                    row = len(rows)
                    rows.append(ids[: at + 1] + tokens[:-1])
                plan.append([(first_row + row, place, token) for place, token in enumerate(tokens, at)])
        return rows, plan

    def _read(self, rows: Sequence[list[int]], wanted: set[Read]) -> dict[Read, float]:
        import torch

        log_probs: dict[Read, float] = {}
        of_row: dict[int, list[Read]] = {}
        for read in sorted(wanted):
            of_row.setdefault(read[0], []).append(read)
        encoded = [Encoded(ids, [0.0] * len(ids)) for ids in rows]
        for start, batch in _batches(encoded, self.batch_size, SCORED_TOKENS):
            reads = [read for row in range(start, start + len(batch)) for read in of_row.get(row, ())]
            if not reads:
                continue
            numbers, places, tokens = zip(*reads, strict=True)
            with torch.inference_mode(), autocast(self.model):
                hidden = hidden_states(self.model, pad(batch, self.tokenizer.pad_token_id))
                states = hidden.at([number - start for number in numbers], places)
                values = log_probs_at(self.model, states, torch.tensor(tokens))
            log_probs.update(zip(reads, values.tolist(), strict=True))
        return log_probs


def _batches(
    rows: Sequence[Encoded], max_rows: int, max_tokens: int
) -> Iterator[tuple[int, Sequence[Encoded]]]:
    """(number of the first row, consecutive rows), within both limits; tokens are counted with padding."""
    start = 0
    while start < len(rows):
        end, width = start, 0
        while end < len(rows) and end - start < max_rows:
            width = max(width, len(rows[end].ids))
            if end > start and width * (end - start + 1) > max_tokens:
                break
            end += 1
        yield start, rows[start:end]
        start = end

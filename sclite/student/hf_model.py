"""A transformers model as a student: batched generation and scoring with the model that is trained."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from sclite.errors import DataError
from sclite.signature import digest
from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student, tokens_to_compare
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
        self.positions = max_positions(model.config)
        self.end, self.pad_id = end_id(tokenizer), tokenizer.pad_token_id

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Generate in batches. Requests of one batch should have the same temperature and stop strings.

        If a batch does not fit in GPU memory, the batch size is halved for this and all later batches.
        """
        start = 0
        while start < len(requests):
            batch = requests[start : start + self.batch_size]
            try:
                replies = list(self._generate(batch, start))
            except RuntimeError as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                self.batch_size = len(batch) // 2
                free_memory()
            else:
                yield from replies
                start += len(batch)

    def _generate(self, batch: Sequence[Request], start: int) -> Iterator[Reply]:
        import torch

        first, tokenizer = batch[0], self.tokenizer
        prompts = [
            [*prompt_ids(tokenizer, request.messages), *chain(*piece_ids(tokenizer, request.pieces))]
            for request in batch
        ]
        width, max_tokens = max(map(len, prompts)), max(request.max_tokens for request in batch)
        if width + max_tokens > self.positions:
            raise DataError(
                f"a prompt of {width} tokens and an answer of {max_tokens} exceed the student's {self.positions} positions",
                "lower attempts.max_tokens",
            )
        settings: dict[str, object] = {"do_sample": first.temperature > 0}
        if first.temperature > 0:
            settings |= {"temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
            torch.manual_seed(int(digest([[r.seed for r in batch], prompts[0]]), 16) % 2**63)
        if first.stop:
            settings |= {"stop_strings": list(first.stop), "tokenizer": tokenizer}
        ends = [self.end]
        if tokenizer.eos_token_id not in (None, self.end):
            ends.append(tokenizer.eos_token_id)
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode(), autocast(self.model):
            out = self.model.generate(  # type: ignore[operator]  # torch.nn.Module hides its type
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max_tokens,
                eos_token_id=ends,
                pad_token_id=self.pad_id,
                **settings,
            )
        self.model.train(was_training)
        new_rows = out[:, width:].tolist()
        for index, (request, prompt, row) in enumerate(zip(batch, prompts, new_rows, strict=True), start):
            stop_at = next((i for i, token in enumerate(row) if token in ends), None)
            new = row[:stop_at]
            text = str(tokenizer.decode(new, skip_special_tokens=True))
            finish = "length" if stop_at is None else "stop"
            for stop in request.stop:
                if stop in text:
                    text, finish = text[: text.index(stop) + len(stop)], "stop"
            yield Reply(index, text, len(new), len(prompt), finish)

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        """Yield the log-odds of the two options after each mark, from one row per request and one per absent option."""
        rows: list[list[int]] = []
        lengths: list[int] = []  # of each request
        plans: list[list[list[Read]]] = []  # of each request: the reads of each option
        for request in requests:
            whole, plan, ends = len(rows), [], []
            ids = prompt_ids(self.tokenizer, request.messages)
            for piece in piece_ids(self.tokenizer, request.pieces):
                ids = ids + piece
                ends.append(len(ids))
            rows.append(ids)
            others = piece_ids(self.tokenizer, request.others)
            for mark, options in zip(request.marks, request.options, strict=True):
                end = ends[mark]
                first, second = piece_ids(self.tokenizer, options)
                for tokens in tokens_to_compare(first, second, others):
                    row = whole
                    if ids[end : end + len(tokens) - 1] != tokens[:-1]:
                        row = len(rows)
                        rows.append(ids[:end] + tokens[:-1])
                    plan.append([(row, place, token) for place, token in enumerate(tokens, end - 1)])
            lengths.append(len(ids))
            plans.append(plan)
        log_probs = self._read(rows, [read for plan in plans for reads in plan for read in reads])
        for index, (length, plan) in enumerate(zip(lengths, plans, strict=True)):
            sums = [sum(log_probs[read] for read in reads) for reads in plan]
            odds = tuple(first - second for first, second in zip(sums[::2], sums[1::2], strict=True))
            yield Scores(index, odds, length)

    def _read(self, rows: Sequence[list[int]], reads: Sequence[Read]) -> dict[Read, float]:
        """The log-probability of each read.

        Only the positions that are read go through the head, in float32: logits of all would take tens of gigabytes.
        """
        import torch

        of_row: list[list[Read]] = [[] for _ in rows]
        for read in dict.fromkeys(reads):
            of_row[read[0]].append(read)
        log_probs: dict[Read, float] = {}
        was_training = self.model.training
        self.model.eval()
        start = 0
        while start < len(rows):
            end, width = start, 0
            while end < len(rows) and end - start < self.batch_size:
                width = max(width, len(rows[end]))
                if end > start and width * (end - start + 1) > SCORED_TOKENS:
                    break
                end += 1
            if wanted := [read for row in of_row[start:end] for read in row]:
                batch = pad([Encoded(ids, [0.0] * len(ids)) for ids in rows[start:end]], self.pad_id)
                numbers, places, tokens = zip(*wanted, strict=True)
                with torch.inference_mode(), autocast(self.model):
                    states = hidden_states(self.model, batch).at([row - start for row in numbers], places)
                    values = log_probs_at(self.model, states, torch.tensor(tokens))
                log_probs.update(zip(wanted, values.tolist(), strict=True))
            start = end
        self.model.train(was_training)
        return log_probs

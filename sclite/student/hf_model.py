"""The student that is trained, as a student like any other: batched generation and scoring with transformers."""

from collections.abc import Iterator, Sequence
from typing import Any

from sclite.errors import DataError
from sclite.signature import digest
from sclite.student.base import Reply, Request, ScoreRequest, Scores, tokens_to_compare
from sclite.student.cuda_memory import free_memory, is_out_of_memory
from sclite.student.log_probs import autocast, hidden_states, log_probs_at, pad
from sclite.student.tokenization import Encoded, end_id, piece_ids, prompt_ids

Read = tuple[int, int, int]
"""(row, position, token): the log-probability of this token after this position."""
SCORED_TOKENS = 16_384  # of a forward pass that only reads odds


class HFModel:
    """A transformers model with its tokenizer. Sampling is seeded block by block: `batch` requests share one seed."""

    def __init__(self, model: Any, tokenizer: Any, batch: int = 64):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.at_once = batch
        shape = model.config.get_text_config()
        self.positions = getattr(shape, "max_position_embeddings", None) or 1 << 20
        self.end = end_id(tokenizer)

    def _ids(self, messages, pieces: Sequence[str]) -> list[int]:
        return prompt_ids(self.tokenizer, messages) + [
            i for ids in piece_ids(self.tokenizer, pieces) for i in ids
        ]

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Replies in blocks of `batch`. Requests of one block should ask for the same temperature and stop strings.

        Where a block does not fit into the card's memory, it goes on in halves, and so do those after it.
        """
        for start in range(0, len(requests), self.batch):
            block = requests[start : start + self.batch]
            begin = 0
            while begin < len(block):
                size = min(self.at_once, len(block) - begin)
                try:
                    replies = list(self._block(block[begin : begin + size], start + begin))
                except RuntimeError as error:
                    if size == 1 or not is_out_of_memory(error):
                        raise
                    self.at_once = size // 2
                    free_memory()
                else:
                    yield from replies
                    begin += size

    def _block(self, block: Sequence[Request], start: int) -> Iterator[Reply]:
        import torch

        first = block[0]
        prompts = [self._ids(r.messages, r.pieces) for r in block]
        ids, mask = self._pad(prompts)
        longest = ids.shape[1] + max(request.max_tokens for request in block)
        if longest > self.positions:
            raise DataError(
                f"a prompt of {ids.shape[1]} tokens and an answer: {longest} in all, the student has {self.positions}",
                "lower attempts.max_tokens",
            )
        settings: dict[str, Any] = {"do_sample": first.temperature > 0}
        if first.temperature > 0:
            settings |= {"temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
            torch.manual_seed(int(digest([[r.seed for r in block], prompts[0]]), 16) % 2**63)
        if first.stop:
            settings |= {"stop_strings": list(first.stop), "tokenizer": self.tokenizer}
        ends = [
            self.end,
            *([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id not in (None, self.end) else []),
        ]
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode(), autocast(self.model):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(r.max_tokens for r in block),
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id,
                **settings,
            )
        self.model.train(was_training)
        for offset, (request, prompt, row) in enumerate(
            zip(block, prompts, out[:, ids.shape[1] :].tolist(), strict=True)
        ):
            yield self._reply(start + offset, request, len(prompt), row, ends)

    def _reply(
        self, index: int, request: Request, prompt_tokens: int, row: list[int], ends: list[int]
    ) -> Reply:
        stop_at = next((i for i, token in enumerate(row) if token in ends), None)
        new = row[:stop_at] if stop_at is not None else row
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        finish = "stop" if stop_at is not None else "length"
        for stop in request.stop:
            if stop in text:
                text, finish = text[: text.index(stop) + len(stop)], "stop"
        return Reply(index, text, len(new), prompt_tokens, finish)

    def _pad(self, rows: list[list[int]]):
        """Left-padded (ids, mask), each [rows, longest]."""
        import torch

        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.model.device), mask.to(self.model.device)

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        """Log-odds of the two options after each mark. One row for each request, and one for each option that does not stand
        there.

        The vocabulary is looked at only there, in float32: a table of all positions would take tens of gigabytes.
        """
        rows: list[list[int]] = []
        found: list[
            tuple[int, list[list[Read]]]
        ] = []  # of each request: its length, and what its options are read from
        for request in requests:
            ids, options = self._options(request, len(rows))
            found.append((len(ids[0]), options))
            rows += ids
        was_training = self.model.training
        self.model.eval()
        log_prob = self._log_probs(
            rows, {read for _, options in found for reads in options for read in reads}
        )
        self.model.train(was_training)
        for index, (length, options) in enumerate(found):
            sums = [sum(log_prob[read] for read in reads) for reads in options]
            odds = tuple(first - second for first, second in zip(sums[::2], sums[1::2], strict=True))
            yield Scores(index, odds, length)

    def _options(self, request: ScoreRequest, number: int) -> tuple[list[list[int]], list[list[Read]]]:
        """(rows, what is read of them for each option of each mark); the first row has this number."""
        ids, ends = self._ids(request.messages, ()), []
        for piece in piece_ids(self.tokenizer, request.pieces):
            ids = ids + piece
            ends.append(len(ids))
        rows, found = [ids], []
        others = piece_ids(self.tokenizer, request.others)
        for mark, texts in zip(request.marks, request.options, strict=True):
            at = ends[mark] - 1
            for tokens in tokens_to_compare(*piece_ids(self.tokenizer, texts), others):
                row = 0
                if ids[at + 1 : at + len(tokens)] != tokens[:-1]:
                    row = len(rows)
                    rows.append(ids[: at + 1] + tokens[:-1])
                found.append([(number + row, place, token) for place, token in enumerate(tokens, at)])
        return rows, found

    def _log_probs(self, rows: Sequence[list[int]], wanted: set[Read]) -> dict[Read, float]:
        import torch

        found: dict[Read, float] = {}
        of_row: dict[int, list[Read]] = {}
        for read in sorted(wanted):
            of_row.setdefault(read[0], []).append(read)
        encoded = [Encoded(ids, [0.0] * len(ids)) for ids in rows]
        for start, block in _blocks(encoded, self.batch, SCORED_TOKENS):
            reads = [read for row in range(start, start + len(block)) for read in of_row.get(row, ())]
            if not reads:
                continue
            numbers, places, tokens = zip(*reads, strict=True)
            with torch.inference_mode(), autocast(self.model):
                hidden = hidden_states(self.model, pad(block, self.tokenizer.pad_token_id))
                states = hidden.at([number - start for number in numbers], list(places))
                values = log_probs_at(self.model, states, torch.tensor(tokens))
            found.update(zip(reads, values.tolist(), strict=True))
        return found


def _blocks(rows: Sequence[Encoded], most: int, tokens: int) -> Iterator[tuple[int, Sequence[Encoded]]]:
    """(number of the first, rows) of neighbouring rows, at most so many and so many tokens with their padding."""
    start = 0
    while start < len(rows):
        end, width = start, 0
        while end < len(rows) and end - start < most:
            width = max(width, len(rows[end].ids))
            if end > start and width * (end - start + 1) > tokens:
                break
            end += 1
        yield start, rows[start:end]
        start = end

"""The tokens and loss weights of rows, as the trainer sees them (`sclite show templates --labels`)."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.text import Text

from sclite import prompts
from sclite.config import Config
from sclite.console import visible
from sclite.errors import DataError, UsageError
from sclite.records import Attempt, Pair, Problem, Review, Template
from sclite.run import Run
from sclite.student.loader import load_tokenizer, model_name
from sclite.student.tokenization import TrainingSequence, encode_solution, end_id
from sclite.trace import CAUSE
from sclite.train.bundle import build_bundles
from sclite.train.warmup import rows_of_review

SHOWN = ("templates", "reviews", "pairs")
LEGEND = {
    "▸": "the following tokens count in the loss, up to the next dim ones",
    "⟦": "tokens between ⟦ ⟧ have this loss weight",
    "◆": "a decision follows, to flag the step or to close it; pairs train the odds between the two",
}
"""The signs in a row and their meaning."""


class Labels:
    """Rows as training sequences. Raises UsageError for rows that are not trained on."""

    def __init__(self, config: Config, run: Run, what: str):
        if what not in SHOWN:
            raise UsageError(f"--labels: {what} are not trained on", f"show any of {', '.join(SHOWN)}")
        self.config = config
        self.tokenizer = load_tokenizer(model_name(config.student))
        self.end = end_id(self.tokenizer)
        self.questions = {problem.id: problem.question for problem in run.rows("problems.jsonl", Problem)}
        attempts = run.rows("attempts.jsonl", Attempt) if what == "reviews" else ()
        self.works = {(row.id, row.sample): row for row in attempts}

    def sequences(self, row: Template | Review | Pair) -> Iterator[tuple[str, TrainingSequence]]:
        """(name, tokens with weights) of each training sequence of a row: two for a pair, three for a correction."""
        folder = self.config.prompts.folder
        if isinstance(row, Template):
            messages = prompts.solve_messages(row.question, folder)
            yield "sft", encode_solution(self.tokenizer, messages, row.parsed.trace)
            return
        question = self.questions.get(row.id, "")
        if isinstance(row, Review):
            attempt = self.works.get((row.id, row.sample))
            if attempt is None:
                why = f"attempts.jsonl no longer has sample {row.sample} of {row.id}"
                raise DataError(why, "re-run `sclite train`: it corrects the new attempts")
            work = attempt.parsed.work
            yield from rows_of_review(self.tokenizer, question, work, row, self.config).items()
        else:
            bundle = build_bundles(self.tokenizer, [row], {row.id: question}, folder)[0]
            choice = "to flag the step" if row.chosen == CAUSE else "to close the step"
            yield "chosen" if row.kind == "content" else f"decision, {choice} chosen", bundle.review
            if bundle.rejected is not None:
                yield "rejected", bundle.rejected

    def as_json(self, row: Template | Review | Pair) -> dict[str, Any]:
        """{"id", "end_of_turn", "sequences": {name: [{"id", "text", "weight", "decision" if one follows}]}}."""
        found = {
            name: [
                {"id": id, "text": self.decode([id]), "weight": weight}
                | ({"decision": True} if place in encoded.marks else {})
                for place, (id, weight) in enumerate(zip(encoded.ids, encoded.weights, strict=True))
            ]
            for name, encoded in self.sequences(row)
        }
        return {"id": row.id, "end_of_turn": self.decode([self.end]), "sequences": found}

    def format_row(self, row: Template | Review | Pair, number: int, total: int) -> Text:
        """One row. Dim: no loss; green: loss; yellow: another loss weight; on green: the end of turn; cyan: decisions."""
        lines = Text().append(f"{number}/{total}  ", "dim").append(visible(row.id), "bold cyan")
        for name, encoded in self.sequences(row):
            with_loss = sum(weight > 0 for weight in encoded.weights)
            heading = f"\n{name}: {len(encoded.ids)} tokens, {with_loss} with loss"
            if encoded.marks:
                heading += f", {len(encoded.marks)} decision{'s' * (len(encoded.marks) > 1)}"
            lines.append(heading, "bold")
            lines.append(f", ends with {self.decode([encoded.ids[-1]])!r}\n")
            places = enumerate(zip(encoded.weights, encoded.ids, strict=True))
            tokens = [(weight, place in encoded.marks, id) for place, (weight, id) in places]
            for (weight, marked), group in groupby(tokens, key=lambda token: token[:2]):
                ids = [id for *_, id in group]
                last = ids.pop() if weight and ids[-1] == self.end else None
                text = visible(self.decode(ids))
                if weight not in (0.0, 1.0):
                    text = f"⟦{text} ×{weight:g}⟧"
                lines.append(text, "dim" if not weight else "green" if weight == 1 else "bold yellow")
                if last is not None:
                    lines.append(visible(self.decode([last])), "black on green")
                if marked:
                    lines.append("◆", "bold cyan")
                elif not weight and with_loss:
                    lines.append("▸", "bold cyan")
        lines.append("\n")
        for sign, meaning in LEGEND.items():
            if sign in lines.plain:
                lines.append(f"\n{sign}  {meaning}", "dim")
        return lines.append("\n\n")

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

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
from sclite.student.tokenization import TrainingSequence, encode_solution
from sclite.trace import CAUSE
from sclite.train.dpo import build_bundles
from sclite.train.warmup import rows_of_review

SHOWN = ("templates", "reviews", "pairs")
LEGEND = """⟦ ⟧ tokens that count in the loss, ×N with this weight
◆  a decision follows, to flag the step or to close it; pairs train the odds between the two"""


class Labels:
    """Rows as training sequences. Raises UsageError for rows that are not trained on."""

    def __init__(self, config: Config, run: Run, what: str):
        if what not in SHOWN:
            raise UsageError(f"--labels: {what} are not trained on", f"show any of {', '.join(SHOWN)}")
        self.config = config
        self.tokenizer = load_tokenizer(model_name(config.student))
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
        """{"id", "sequences": {name: [{"id", "text", "weight", "decision": whether one follows}]}}."""
        found = {
            name: [
                {
                    "id": id,
                    "text": self.tokenizer.decode([id]),
                    "weight": weight,
                    "decision": place in encoded.marks,
                }
                for place, (id, weight) in enumerate(zip(encoded.ids, encoded.weights, strict=True))
            ]
            for name, encoded in self.sequences(row)
        }
        return {"id": row.id, "sequences": found}

    def format_row(self, row: Template | Review | Pair, number: int, total: int) -> Text:
        """One row. Dim: no loss; green: loss; yellow: another loss weight; cyan: decisions."""
        lines = Text().append(f"{number}/{total}  ", "dim").append(visible(row.id), "bold cyan")
        for name, encoded in self.sequences(row):
            with_loss, marks = sum(weight > 0 for weight in encoded.weights), len(encoded.marks)
            decisions = f", {marks} decision{'s' * (marks > 1)}" if marks else ""
            lines.append(f"\n{name}: {len(encoded.ids)} tokens, {with_loss} with loss{decisions}\n", "bold")
            tokens = [
                (weight, place in encoded.marks, id)
                for place, (weight, id) in enumerate(zip(encoded.weights, encoded.ids, strict=True))
            ]
            for (weight, marked), group in groupby(tokens, key=lambda token: token[:2]):
                text = visible(str(self.tokenizer.decode([id for *_, id in group])))
                if weight:
                    text = f"⟦{text}⟧" if weight == 1 else f"⟦{text} ×{weight:g}⟧"
                lines.append(text, "dim" if not weight else "green" if weight == 1 else "bold yellow")
                lines.append("◆" if marked else "", "bold cyan")
        return lines.append(f"\n\n{LEGEND}", "dim").append("\n\n")

"""The warm-up of stage 2: a short supervised training on whole reviews, mixed with three kinds of solving.

DPO alone cannot teach the student to flag a step, and reviews alone destroy solving. DPO starts from the adapter of the warm-up and
uses it as its reference. The rows of solving:

- *solved*: a template, if possible one that SFT has not seen;
- *continued*: solve on after a corrected step, as guided review requires. A correction is seldom written like a step,
  and a student that never saw one there gets lost after it;
- *closed*: wrong work in the solve context, with loss only on the closing tags of its steps and the end: steps are
  flagged in a review, never while solving. Without such rows a small student flags its own steps while solving, and
  corrects, or spoils, what review could have corrected.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from sclite import prompts
from sclite.config import Config
from sclite.progress import Progress, no_progress
from sclite.records import Attempt, Problem, Review, Template
from sclite.run import Report, Run
from sclite.student.tokenization import TrainingSequence, encode_pieces, encode_review, encode_solution
from sclite.trace import Trace, all_pieces, corrected, render
from sclite.train.sft import read_templates, replay_templates, solve_rows, supervised
from sclite.train.stage import BuildTask, TrainingJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def train_warmup(
    config: Config,
    run: Run,
    *,
    unseen: frozenset[str] = frozenset(),
    fresh: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Train sft/adapter on reviews, attempts and templates (0 epochs: copy it); writes warmup/adapter."""

    def prepare(job: TrainingJob, tokenizer: Tokenizer) -> BuildTask:
        hint = "run `sclite build-data --only corrections` first, or skip the warm-up: --set warmup.num_train_epochs=0"
        reviews = run.require("reviews.jsonl", Review, hint)
        names, rows = mixed_rows(
            tokenizer, run, reviews, replay_templates(read_templates(run), unseen), config
        )
        job.report.counts["reviews"] = len(reviews)
        return supervised(job, names, rows, tokenizer)

    return TrainingJob("warmup", config, run, unseen, fresh, progress).train(prepare)


def mixed_rows(
    tokenizer: Tokenizer, run: Run, reviews: Sequence[Review], templates: Sequence[Template], config: Config
) -> tuple[list[str], list[TrainingSequence]]:
    """(names, rows) of the warm-up, shuffled; reads attempts.jsonl and problems.jsonl.

    All reviews and all closed rows, and `replay_share` rows of solving for each review: solved ones, in random order,
    alternate with continued ones, in their order, and none is used twice before each was used once. With a share of 1 and
    half of the reviews confirmations, every continued row is used. If a review is too long to be trained, its work is not
    closed either: nothing would say that the step is wrong.
    """
    attempts = {(a.id, a.sample): a for a in run.read("attempts.jsonl", Attempt)}
    questions = {p.id: p.question for p in run.read("problems.jsonl", Problem)}
    made: dict[str, list[tuple[str, TrainingSequence]]] = {"review": [], "continued": [], "closed": []}
    for review in reviews:
        work, name = attempts[review.id, review.sample].parsed.work, f"{review.id}/{review.sample}"
        rows = rows_of_review(tokenizer, questions[review.id], work, review, config)
        if len(rows["review"].ids) > config.warmup.max_length:
            rows.pop("closed", None)
        for kind, row in rows.items():
            made[kind].append((name if kind == "review" else f"{name}/{kind}", row))
    encoded = solve_rows(tokenizer, templates, config.prompts.folder)
    solved = [(template.id, row) for template, row in zip(templates, encoded, strict=True)]
    draw = random.Random(config.seed)
    pairs = zip_longest(draw.sample(solved, len(solved)), made["continued"])
    solving = [row for pair in pairs for row in pair if row is not None]
    wanted = round(config.warmup.replay_share * len(reviews)) if solving else 0
    mixed = [*made["review"], *made["closed"], *(solving[i % len(solving)] for i in range(wanted))]
    draw.shuffle(mixed)
    return [name for name, _ in mixed], [row for _, row in mixed]


def rows_of_review(
    tokenizer: Tokenizer, question: str, work: Trace, review: Review, config: Config
) -> dict[str, TrainingSequence]:
    """The rows of a review, its decisions weighted: {"review"} and, if it corrects a step, {"continued", "closed"}.

    Work without an answer gives no closed row, which would teach the student to end there.
    """
    folder, weight, noted = config.prompts.folder, config.warmup.decision_weight, review.parsed.trace
    messages = prompts.review_messages(question, render(work), folder)
    rows = {"review": encode_review(tokenizer, messages, noted, weight)}
    if review.step is not None:
        solve = prompts.solve_messages(question, folder)
        rows["continued"] = encode_solution(tokenizer, solve, corrected(noted), after=review.step)
        if work.answer is not None:
            # loss on the first token of each closer, weighted for the wrong step as for its decision in the review
            pieces = all_pieces(work)
            weights = [(float(piece.startswith("</Step")), 0.0) for piece in pieces]
            weights[2 * review.step - 1] = (1.0 + weight, 0.0)
            rows["closed"] = encode_pieces(tokenizer, solve, pieces, weights)
    return rows

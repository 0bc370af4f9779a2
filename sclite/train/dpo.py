"""Stage 2 training: cross-model DPO, starting from the warm-up's adapter, which is also the reference.

The DPO term of every pair is -log sigmoid(beta * (policy odds - reference odds)) (Rafailov et al. 2023, equation 7);
likelihood terms on the chosen texts and on solved rows (replay) keep the student from forgetting.

A row is a bundle of all pairs of an attempt: the review sequence (the context, the attempt's steps with a decision after
each up to the first wrong one, and the chosen cause and correction), the rejected text if the attempt is wrong, and a
solved row for replay. All decisions of an attempt are read off one forward pass, as in use; a row for each pair would
repeat the whole context: about ten times the tokens for an attempt of five steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sclite import prompts
from sclite.config import Config, Dpo
from sclite.errors import DataError
from sclite.progress import Progress, no_progress
from sclite.records import Pair, Problem
from sclite.run import Report, Run
from sclite.signature import digest
from sclite.student.tokenization import TrainingSequence, decision_ids, piece_ids, prompt_ids
from sclite.trace import CAUSE, render
from sclite.train.losses import Reference, dpo_loss, reference_log_probs
from sclite.train.sft import read_templates, replay_templates, solve_rows
from sclite.train.stage import BuildTask, TrainingJob
from sclite.train.trainer import TrainingTask, catch_out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Bundle:
    """`review` has the decisions, and loss on the chosen content; `rejected` has loss on the other content."""

    key: str
    review: TrainingSequence
    rejected: TrainingSequence | None = None
    replay: TrainingSequence | None = None

    @property
    def sides(self) -> list[TrainingSequence]:
        """The sequences of the bundle."""
        return [side for side in (self.review, self.rejected, self.replay) if side is not None]


def build_bundles(
    tokenizer: Tokenizer, pairs: Iterable[Pair], questions: dict[str, str], folder: str = ""
) -> list[Bundle]:
    """Gather the pairs of each attempt into a bundle. `questions` maps problem ids to questions.

    Raises DataError if a position that decides is not followed by the decision that was chosen, as when it is used.
    """
    flag, close = decision_ids(tokenizer)
    groups: dict[tuple[str, int], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.id, pair.sample].append(pair)
    bundles = []
    for (id, sample), group in groups.items():
        decisions = sorted((p for p in group if p.kind == "decision"), key=lambda p: p.step)
        content = next((p for p in group if p.kind == "content"), None)
        messages = prompts.review_messages(questions[id], render(group[0].work), folder)
        ids, ends = prompt_ids(tokenizer, messages), {}
        for number, piece in enumerate(piece_ids(tokenizer, (content or decisions[-1]).prefix), 1):
            ids = ids + piece
            ends[number] = len(ids) - 1  # the last position of a prefix of `number` pieces
        marks = tuple(ends[len(pair.prefix)] for pair in decisions)
        accused = tuple(pair.chosen == CAUSE for pair in decisions)
        masked, rejected, chosen_ids = [0.0] * len(ids), None, list[int]()
        if content is not None:
            chosen_ids, rejected_ids = piece_ids(tokenizer, [content.chosen, content.rejected])
            rejected = TrainingSequence(ids + rejected_ids, masked + [1.0] * len(rejected_ids))
        review = TrainingSequence(ids + chosen_ids, masked + [1.0] * len(chosen_ids), marks, accused)
        for mark, wrong in zip(marks, accused, strict=True):
            if review.ids[mark + 1 : mark + 2] not in ([], [flag if wrong else close]):
                odd = f"the pairs of {id}/{sample}: the next token is not the chosen decision"
                raise DataError(odd, "check pairs.jsonl and the student's tokenizer")
        bundles.append(Bundle(f"{id}/{sample}", review, rejected))
    return bundles


def train_dpo(
    config: Config,
    run: Run,
    *,
    unseen: frozenset[str] = frozenset(),
    fresh: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Train on pairs.jsonl, from warmup/adapter; writes dpo/adapter, dpo/reference.json and dpo/metrics.jsonl.

    Resumes if it was interrupted. Raises DataError if no pair fits, UsageError as `train_sft` does.
    """

    def prepare(job: TrainingJob, tokenizer: Tokenizer) -> BuildTask:
        hint = "run `sclite train`, which builds them from the student's attempts"
        pairs = run.require("pairs.jsonl", Pair, hint)
        questions = {problem.id: problem.question for problem in run.read("problems.jsonl", Problem)}
        folder, limit = config.prompts.folder, config.dpo.max_length
        bundles = build_bundles(tokenizer, pairs, questions, folder)
        solved = solve_rows(tokenizer, replay_templates(read_templates(run), unseen), folder)
        fitting = [
            solved[i] for i in job.drop_long_rows([len(row.ids) for row in solved], what="solved rows")
        ]
        keys = [bundle.key.rpartition("/") for bundle in bundles]
        kept = job.drop_long_rows(
            [max(len(side.ids) for side in bundle.sides) for bundle in bundles],
            [(id, int(sample)) for id, _, sample in keys],
        )
        if not kept:
            raise DataError(f"no pair fits in dpo.max_length = {limit} tokens", "raise dpo.max_length")
        bundles = with_replay([bundles[i] for i in kept], fitting, config.dpo.replay_share)
        job.report.counts |= {"bundles": len(bundles), "pairs": len(pairs)}
        # the reference, if the run has one for these inputs
        stored, signature = run.read_json("dpo/reference.json", dict[str, Any]) or {}, digest(job.inputs)
        reference = stored["log_probs"] if stored.get("signature") == signature else None

        def build_task(model: PeftModel, micro_batch: int) -> TrainingTask:
            log_probs = reference
            if log_probs is None:  # the model has the adapter that DPO starts from, even on a resume
                with catch_out_of_memory(job.stage, micro_batch):
                    log_probs = reference_log_probs(model, bundles, tokenizer, micro_batch, progress)
                run.write_json("dpo/reference.json", {"signature": signature, "log_probs": log_probs})
            return preference_task(config.dpo, config.seed, bundles, log_probs, tokenizer)

        return build_task

    return TrainingJob("dpo", config, run, unseen, fresh, progress).train(prepare)


def with_replay(bundles: Sequence[Bundle], rows: Sequence[TrainingSequence], share: float) -> list[Bundle]:
    """Spread solved rows evenly over a `share` of the bundles, cycling through the rows."""
    numbers = [int(share * number) if rows else 0 for number in range(len(bundles) + 1)]
    return [
        replace(bundle, replay=rows[before % len(rows)] if after > before else None)
        for bundle, (before, after) in zip(bundles, pairwise(numbers), strict=True)
    ]


def preference_task(
    settings: Dpo, seed: int, bundles: Sequence[Bundle], reference: Reference, tokenizer: Tokenizer
) -> TrainingTask:
    """The DPO task: means over the pairs of an optimizer step, and over the tokens of its solved rows."""
    lengths, counts = [], []
    for bundle in bundles:
        lengths.append(sum(len(side.ids) for side in bundle.sides))
        decisions = len(bundle.review.marks)
        solved = sum(weight > 0 for weight in bundle.replay.weights) if bundle.replay is not None else 0
        pairs = decisions + (bundle.rejected is not None)
        counts.append({"pairs": pairs, "decisions": decisions, "replay_tokens": solved})
    return TrainingTask(
        phase="dpo",
        settings=settings,
        seed=seed,
        lengths=lengths,
        counts=counts,
        collate=lambda numbers: [bundles[number] for number in numbers],
        losses=partial(dpo_loss, tokenizer=tokenizer, settings=settings, reference=reference),
    )

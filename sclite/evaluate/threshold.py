"""The review threshold, fitted for one GGUF (quantization shifts the log-odds) and one set of prompts."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from sclite import prompts
from sclite.config import Config
from sclite.evaluate.answers import NO_STEPS, grade, review_settings, solve_problems
from sclite.evaluate.metrics import auc
from sclite.grading.grader import Grader
from sclite.records import Problem
from sclite.run import Run
from sclite.signature import digest
from sclite.student.base import Student
from sclite.student.self_correction import NEVER, correct_steps, run_together
from sclite.student.step_scores import Cutoff, Odds, pool, read_odds
from sclite.trace import Trace

FILE = "export/threshold.json"
"""The fitted thresholds, by the digests of their GGUF and of what they were fitted for."""
FITTED_ON = "export/fitted_on.json"
"""Digests of all questions that a threshold of the run was fitted on; they are not tested."""
MIN_PROBLEMS = 50
"""With fewer problems, one answer moves the threshold far."""
Z = 1.645
"""The normal quantile of a one-sided test at the 5 % level, for differences in what thresholds gain."""
WEIGHTS, MARGIN = (0.0, 0.5), 0.05
"""The weights of the confidence in a step's score to try, and the AUC margin by which one must beat the last."""
BLOCK, MAX_SHARE = 0.1, 0.6
"""Shares of the problems whose steps are corrected: per block, and at most in total."""


@dataclass
class Trial:
    """One problem to fit the threshold on: whether the first answer is right, and the log-odds of an error in each step.

    Step scores give the `confidence` the `weight`, and the `review` the rest.
    `results`: whether the final answer is right after correcting a step (from 1), for the steps tried. None is unknown.
    """

    problem: Problem
    trace: Trace
    correct: bool | None
    review: Odds
    confidence: Odds
    weight: float = 0.0
    results: dict[int, bool | None] = field(default_factory=dict)

    @property
    def scores(self) -> Odds:
        """The score of each step."""
        return pool(self.review, self.confidence, self.weight)

    def accusable_steps(self, floor: float = -math.inf) -> list[tuple[int, float, float]]:
        """Each step that a threshold of at least `floor` can flag: (step, lowest, upper bound of these thresholds).

        A threshold flags the first step that scores above it, so only steps that score above all earlier ones count.
        """
        found, highest = [], -math.inf
        for step, score in enumerate(self.scores, 1):
            if score > highest:
                found += [(step, highest, score)] if score >= floor else []
                highest = score
        return found


class FittedThreshold(BaseModel):
    """A fitted threshold, or the reason why review stays off, with what it does on the n graded fitting problems.

    It applies to step scores in which the confidence has the weight `confidence_weight`.
    Accuracies, wrong_to_right and right_to_wrong are shares of n. `assumed` counts flagged steps whose correction was
    not tried. `best_*` describe the most accurate threshold without the bound on harm: what the bound costs.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    threshold: float | None
    confidence_weight: float = 0.0
    off: str = ""
    problems: int
    n: int = 0
    acc_t1: float | None = None
    acc_t2: float | None = None
    wrong_to_right: float = 0.0
    right_to_wrong: float = 0.0
    accused: int = 0
    assumed: int = 0
    best_threshold: float | None = None
    best_acc_t2: float = 0.0
    best_right_to_wrong: float = 0.0
    max_harm: float

    @property
    def cutoff(self) -> Cutoff | None:
        """When to correct a step; None if review stays off."""
        return None if self.threshold is None else Cutoff(self.threshold, self.confidence_weight)

    @property
    def summary(self) -> str:
        """The fit in one line."""
        if self.threshold is None or self.acc_t1 is None or self.acc_t2 is None:
            return f"review stays off: {self.off}"
        weighted = f", confidence weight {self.confidence_weight:g}," if self.confidence_weight else ""
        return (
            f"{self.threshold:.2f}{weighted} fitted on {self.n} problems: {100 * self.acc_t1:.1f} → {100 * self.acc_t2:.1f} % "
            f"right, {100 * self.right_to_wrong:.1f} % spoiled{self.given_up}"
        )

    @property
    def given_up(self) -> str:
        """What the bound on harm costs, or an empty string."""
        allowed = most_spoiled(self.n, self.max_harm)
        if self.best_threshold is None or round(self.best_right_to_wrong * self.n) <= allowed:
            return ""
        return (
            f"; {self.best_threshold:.2f} would reach {100 * self.best_acc_t2:.1f} % and spoil "
            f"{100 * self.best_right_to_wrong:.1f} %, more than review.max_harm ({100 * self.max_harm:g} %) allows"
        )


# -- the fit -------------------------------------------------------------------------------------------------------


def most_spoiled(n: int, max_harm: float) -> int:
    """How many of n right answers a threshold may spoil: the share `max_harm`, rounded up."""
    return math.ceil(round(max_harm * n, 9))


def fit_threshold(trials: Sequence[Trial], max_harm: float) -> FittedThreshold:
    """Choose the middle of the thresholds that are as good as the best one that does not spoil too many answers.

    The first step whose log-odds exceed the threshold is flagged; if none does, the first answer is kept. Candidates are
    the midpoints between adjacent distinct log-odds, and one below all. A threshold may spoil `most_spoiled` right
    answers. It is as good as the best if it helps and does not gain significantly less (sign test on the answers on which
    both differ, normal approximation). An unknown result of a flagged step counts as the worse outcome, so a caller may
    try only the corrections that could matter. Problems with an unknown first answer are skipped.

    Why the middle: of 60 to 400 problems drawn from 1,500 of the quickstart, it gained as much on the others as the
    highest threshold with the most right answers (60 problems: 4.35 and 4.08 points, 400: 4.56 and 4.53), and spoiled half
    as many (0.40 and 0.85 %; 0.30 and 0.41 %). Why a count instead of a test
    of the count: on 818 problems of examples/smollm2, 200 times split into 318 for the fit and 500 others, it gained 2.2 points
    and spoiled 0.8 % with max_harm 1 %; with every count that is not significantly above 1 %, 2.5 points and 1.3 %.
    """
    known = [trial for trial in trials if trial.correct is not None]
    n, right = len(known), sum(bool(trial.correct) for trial in known)
    fitted = FittedThreshold(threshold=None, problems=len(trials), n=n, max_harm=max_harm)
    if not n:
        return fitted.model_copy(update={"off": "no fitting problem has a known outcome"})
    values = np.unique(np.array([score for trial in known for score in trial.scores], float))
    candidates = np.concatenate(([-NEVER], (values[1:] + values[:-1]) / 2, [NEVER]))
    # Row c of each column is the change against candidate c - 1: accused, assumed, gained, spoiled.
    change = np.zeros((len(candidates) + 1, 4), int)
    for trial in known:
        for step, low, high in trial.accusable_steps():
            result = trial.results.get(step)
            fixed, lost = result is True and not trial.correct, result is not True and bool(trial.correct)
            effect = (1, result is None, fixed, lost)
            change[bisect_left(candidates, low)] += effect
            change[bisect_left(candidates, high)] -= effect
    accused, assumed, gained, spoiled = change.cumsum(axis=0)[:-1].T
    net = gained - spoiled
    best = len(net) - 1 - int(net[::-1].argmax())
    fitted.acc_t1 = fitted.acc_t2 = right / n
    if net[best] > 0:
        fitted.best_threshold = float(candidates[best])
        fitted.best_acc_t2 = float(right + net[best]) / n
        fitted.best_right_to_wrong = float(spoiled[best]) / n
    helps = (net > 0) & (spoiled <= most_spoiled(n, max_harm))
    if helps.any():
        top = int(np.where(helps, net, 0).argmax())
        differing = abs(gained[top] - gained) + abs(spoiled[top] - spoiled)
        good = np.flatnonzero(helps & (net[top] - net <= Z * np.sqrt(differing)))[::-1]
        middle = (max(candidates[good[-1]], values[0]) + candidates[good[0]]) / 2
        chosen = good[abs(candidates[good] - middle).argmin()]
        fitted.threshold = float(candidates[chosen])
        fitted.acc_t2 = float(right + net[chosen]) / n
        fitted.wrong_to_right, fitted.right_to_wrong = float(gained[chosen]) / n, float(spoiled[chosen]) / n
        fitted.accused, fitted.assumed = int(accused[chosen]), int(assumed[chosen])
        return fitted
    bound = f", with at most {100 * max_harm:g} % spoiled (review.max_harm)" if net[best] > 0 else ""
    fitted.off = (
        f"on the {n} problems used for the fit, no threshold corrects more answers than it spoils{bound}"
    )
    return fitted


def choose_weight(trials: Sequence[Trial], weights: Sequence[float]) -> float:
    """The weight of the confidence that best ranks the answers that a correction fixes above those that it spoils.

    Answers are ranked by their highest step score (AUC), where its correction was tried. It is the last weight unless
    another one is better by MARGIN.

    Measured on 500 problems each of SmolLM2 and of the quickstart, by 60 to 200 random splits into problems to fit on and
    others: gains of 2.6 and 4.8 points with this choice, 1.7 and 4.4 with the review alone. Without the margin a fit on 238
    problems of SmolLM2 took the review alone in one split of six (2.5 points). A choice of five weights gained 2.4 and 4.4,
    the weight with the best AUC of wrong answers 2.5 and 4.4.
    """
    quality: dict[float, float] = {}
    for weight in weights:
        fixed, ranked = list[bool](), list[float]()
        for trial in trials:
            scores = pool(trial.review, trial.confidence, weight)
            result = trial.results.get(scores.index(max(scores)) + 1) if scores else None
            if None not in (result, trial.correct) and result != trial.correct:
                fixed.append(bool(result))
                ranked.append(max(scores))
        quality[weight] = auc(ranked, fixed) or 0.0
    best = max(weights, key=lambda weight: quality[weight])
    return best if quality[best] > quality[weights[-1]] + MARGIN else weights[-1]


def try_corrections(student: Student, trials: Sequence[Trial], config: Config, grader: Grader) -> None:
    """Correct the steps that the fitted threshold may flag, and add the results to the trials.

    Highest scores first, until two blocks in a row fix no more answers than they spoil, or MAX_SHARE is reached.
    """
    ranked = sorted((trial for trial in trials if trial.scores), key=lambda trial: -max(trial.scores))
    most, size, futile_blocks = round(MAX_SHARE * len(ranked)), max(1, round(BLOCK * len(ranked))), 0
    seen: set[tuple[int, int]] = set()
    for end in range(size, most + size, size):
        chosen = list(enumerate(ranked[: min(end, most)]))
        floor = max(chosen[-1][1].scores)
        places = [(n, step) for n, trial in chosen for step, *_ in trial.accusable_steps(floor)]
        block = [(ranked[n], step) for n, step in places if (n, step) not in seen]
        seen.update(places)
        new = [(trial, step) for trial, step in block if step not in trial.results]
        cases = [(trial.problem.question, trial.trace, step) for trial, step in new]
        corrected = correct_steps(student, cases, review_settings(config))
        verdicts = grade(grader, [each.answer for each in corrected], [trial.problem for trial, _ in new])
        for (trial, step), outcome, verdict in zip(new, corrected, verdicts, strict=True):
            trial.results[step] = verdict if outcome.trace else trial.correct
        wrong = sum(trial.correct is False for trial, _ in block)
        fixed = sum(trial.correct is False and trial.results[step] is True for trial, step in block)
        spoiled = sum(trial.correct is True and trial.results[step] is not True for trial, step in block)
        if fixed > spoiled:
            futile_blocks = 0
        elif wrong or spoiled:
            futile_blocks += 1
        if futile_blocks == 2:
            break


# -- the file ------------------------------------------------------------------------------------------------------


def prompts_digest(config: Config) -> str:
    """A short hash of the prompts that decide what a student answers and reviews."""
    used = ("student_system", "student_solve", "student_review")
    return prompts.digest_prompts(*used, folder=config.prompts.folder)


def weights_to_try(config: Config) -> list[float]:
    """The weights of the confidence that a fit chooses from: the configured one, or WEIGHTS."""
    weight = config.review.confidence_weight
    return list(WEIGHTS) if weight is None else [weight]


def threshold_key(config: Config, gguf_digest: str) -> str:
    """The key of a fit in FILE: the digest of the GGUF and of what it was fitted for."""
    purpose = digest([prompts_digest(config), weights_to_try(config), config.review.max_harm])
    return f"{gguf_digest}:{purpose}"


def load_threshold(config: Config, run: Run, gguf: Path) -> FittedThreshold | None:
    """The fit for this exact file and these settings, stored in this run or next to the file; None if there is none."""
    beside = gguf.parent / Path(FILE).name
    for name in dict.fromkeys((str(run.path(FILE).resolve()), str(beside.resolve()))):
        if known := run.read_json(name, dict[str, FittedThreshold]):
            key = threshold_key(config, run.file_digest(str(gguf.resolve())))
            if key in known:
                return known[key]
    return None


def store_threshold(config: Config, run: Run, gguf: Path, fitted: FittedThreshold) -> FittedThreshold:
    """Store the fit for a file, for chat, eval and the server; it replaces an earlier one for the same settings."""
    known = run.read_json(FILE, dict[str, FittedThreshold]) or {}
    known[threshold_key(config, run.file_digest(str(gguf.resolve())))] = fitted
    run.write_json(FILE, {key: each.model_dump() for key, each in known.items()})
    return fitted


def is_current(fitted: FittedThreshold | None, count: int) -> bool:
    """Whether a stored fit used as many problems; too few problems never replace one."""
    return fitted is not None and (count < MIN_PROBLEMS or fitted.problems >= count)


def ensure_threshold(
    config: Config, run: Run, gguf: Path, student: Student | None, problems: Sequence[Problem], grader: Grader
) -> FittedThreshold:
    """The threshold of a GGUF, which `student` runs: the stored one if it is current, else fitted now and stored.

    The problems are used nowhere else. Fewer than MIN_PROBLEMS need no student: review stays off.
    """
    stored, total = load_threshold(config, run, gguf), len(problems)
    if stored is not None and is_current(stored, total):
        return stored
    fitted = FittedThreshold(threshold=None, problems=total, max_harm=config.review.max_harm)
    if total < MIN_PROBLEMS or student is None:
        fitted.off = f"{total} problems are too few to fit the threshold ({MIN_PROBLEMS} needed)"
        return store_threshold(config, run, gguf, fitted)
    questions = {digest(problem.question) for problem in problems}
    run.write_json(FITTED_ON, sorted(questions.union(run.read_json(FITTED_ON, list[str]) or [])))
    weights, answers = weights_to_try(config), solve_problems(student, problems, config, grader)
    scripts = [
        read_odds(each.problem.question, each.reviewable, config.prompts.folder, weights) for each in answers
    ]
    trials = [
        Trial(answer.problem, answer.parsed.work, answer.correct, *odds)
        for answer, odds in zip(answers, run_together(student, scripts), strict=True)
    ]
    for weight in weights:
        for trial in trials:
            trial.weight = weight
        try_corrections(student, trials, config, grader)
    weight = choose_weight(trials, weights)
    for trial in trials:
        trial.weight = weight
    graded = sum(trial.correct is not None for trial in trials)
    if not any(trial.scores for trial in trials):
        fitted.off = NO_STEPS
    elif graded < MIN_PROBLEMS:
        fitted.off = f"only {graded} of {len(trials)} answers to fitting problems could be graded"
    else:
        fitted = fit_threshold(trials, config.review.max_harm)
    fitted.problems, fitted.confidence_weight = total, weight
    return store_threshold(config, run, gguf, fitted)

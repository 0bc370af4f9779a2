"""The review threshold: fitted on the very GGUF that will run, on problems used nowhere else, and stored beside it.

METHOD section 5: the most right answers after review among the thresholds that do not harm too many. What is fitted
holds for one file and one set of prompts: quantization shifts the log-odds.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from sclite import prompts
from sclite.config import Config
from sclite.evaluate.answers import grade, review_settings, solve
from sclite.evaluate.metrics import LogOdds
from sclite.grading.worker import Grader
from sclite.records import Problem, Row
from sclite.run import Run
from sclite.student.base import Student
from sclite.student.self_correction import NEVER, correct_steps, score_traces
from sclite.trace import Trace

FILE = "export/threshold.json"
"""The fitted thresholds, by the digest of their GGUF."""
MIN_PROBLEMS = 50
"""With fewer problems, one answer moves the threshold far."""
ALPHA, Z = 0.05, 1.645
"""The one-sided level, and its normal quantile, at which a threshold is too harmful, or gains less than another one."""
BLOCK, MAX_SHARE = 0.1, 0.6
"""Shares of the problems: how many have steps corrected per block, and at most in all."""
MANY_PROBLEMS = 200
"""From this number on, half of the problems show first whether the student's corrections fix anything."""


class Scored(Row):
    """One problem to fit the threshold on: its first answer, and the result of correcting each step.

    `corrected[j]`: whether the final answer is right after correcting step j + 1; None if not tried or not gradable.
    """

    id: str
    correct1: bool | None
    step_scores: tuple[LogOdds, ...]
    corrected: tuple[bool | None, ...]

    @model_validator(mode="after")
    def _one_result_per_step(self):
        if len(self.step_scores) != len(self.corrected):
            raise ValueError(f"{len(self.step_scores)} step_scores, {len(self.corrected)} corrected")
        return self


class Fitted(BaseModel):
    """A fitted threshold, or the reason why review stays off, with what the threshold does on the n fitting problems.

    `problems` were given, `n` of them have a known first answer; accuracies, wrong_to_right and right_to_wrong are
    shares of n. `assumed` counts accused steps whose correction was not tried. `best_*` describe the most accurate
    threshold without the bound on harm: what the bound gives up. `max_harm` and `prompts` (a digest) are those it was
    fitted with.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    threshold: float | None
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
    prompts: str = ""

    @property
    def summary(self) -> str:
        """The fit in one line."""
        if self.threshold is None or self.acc_t1 is None or self.acc_t2 is None:
            return f"review stays off: {self.off}"
        return (
            f"{self.threshold:.2f} fitted on {self.n} problems: {100 * self.acc_t1:.1f} → {100 * self.acc_t2:.1f} % "
            f"right, {100 * self.right_to_wrong:.1f} % spoiled{self.given_up}"
        )

    @property
    def given_up(self) -> str:
        """What the bound on harm gives up, or an empty string."""
        allowed = most_spoiled(self.n, self.max_harm)
        if self.best_threshold is None or round(self.best_right_to_wrong * self.n) <= allowed:
            return ""
        return (
            f"; {self.best_threshold:.2f} would reach {100 * self.best_acc_t2:.1f} % and spoil "
            f"{100 * self.best_right_to_wrong:.1f} %, more than review.max_harm ({100 * self.max_harm:g} %) allows"
        )


# -- the fit -------------------------------------------------------------------------------------------------------


def most_spoiled(n: int, max_harm: float) -> int:
    """The largest number of spoiled answers among n that is not significantly more than the share `max_harm`.

    One-sided exact binomial test at level ALPHA; the same as a Clopper-Pearson lower bound of at most `max_harm`.
    """
    if max_harm in (0, 1):
        return round(max_harm * n)
    count, tail = 0, 1.0  # P(at least `count` spoiled) if the true share is max_harm
    while tail >= ALPHA and count <= n:
        ways = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
        tail -= math.exp(ways + count * math.log(max_harm) + (n - count) * math.log1p(-max_harm))
        count += 1
    return count - 1


def fit_threshold(rows: Sequence[Scored], max_harm: float) -> Fitted:
    """The middle of the log-odds thresholds that are as good as the best one which does not spoil too many answers.

    The first step whose log-odds exceed the threshold is accused; if none does, the first answer stands. Candidates are
    the midpoints between adjacent distinct log-odds, and one below all. A threshold may spoil `most_spoiled` right
    answers. As good as the best is one that helps and does not gain significantly less (sign test on the answers on which
    both differ, normal approximation). An unknown result of an accused step counts as the worse outcome: a right answer is
    spoiled, a wrong one stays wrong. So a caller may try only the corrections that could matter, and stays on the safe
    side. Problems with an unknown first answer are left out.
    """
    known = [row for row in rows if row.correct1 is not None]
    n, right = len(known), sum(bool(row.correct1) for row in known)
    fitted = Fitted(threshold=None, problems=len(rows), n=n, max_harm=max_harm)
    if not n:
        return fitted.model_copy(update={"off": "no fitting problem has a known outcome"})
    values = np.unique(np.array([s for row in known for s in row.step_scores], float))
    candidates = np.concatenate(([-NEVER], (values[1:] + values[:-1]) / 2, [NEVER]))
    # Row c of each column is the change against candidate c - 1: accused, assumed, gained, spoiled.
    change = np.zeros((len(candidates) + 1, 4), int)
    for row in known:
        highest = -math.inf
        for score, result in zip(row.step_scores, row.corrected, strict=True):
            if score > highest:  # accused by the thresholds from the highest score before it up to its own
                spoiled = row.correct1 and result is not True
                effect = (1, result is None, not row.correct1 and result is True, spoiled)
                change[bisect_left(candidates, highest)] += effect
                change[bisect_left(candidates, score)] -= effect
                highest = score
    accused, assumed, gained, spoiled = change.cumsum(axis=0)[:-1].T
    net = gained - spoiled
    best = len(net) - 1 - int(net[::-1].argmax())
    found = {"acc_t1": right / n, "acc_t2": right / n}
    if net[best] > 0:
        found |= {
            "best_threshold": float(candidates[best]),
            "best_acc_t2": (right + net[best]) / n,
            "best_right_to_wrong": spoiled[best] / n,
        }
    helps = (net > 0) & (spoiled <= most_spoiled(n, max_harm))
    if helps.any():
        top = int(np.where(helps, net, 0).argmax())
        differing = abs(gained[top] - gained) + abs(spoiled[top] - spoiled)
        good = np.flatnonzero(helps & (net[top] - net <= Z * np.sqrt(differing)))[::-1]
        middle = (max(candidates[good[-1]], values[0]) + candidates[good[0]]) / 2
        chosen = good[abs(candidates[good] - middle).argmin()]
        found |= {
            "threshold": float(candidates[chosen]),
            "acc_t2": (right + net[chosen]) / n,
            "wrong_to_right": gained[chosen] / n,
            "right_to_wrong": spoiled[chosen] / n,
            "accused": int(accused[chosen]),
            "assumed": int(assumed[chosen]),
        }
        return fitted.model_copy(update=found)
    off = f"on {n} fitting problems no threshold corrects more answers than it spoils"
    bound = f", with at most {100 * max_harm:g} % spoiled (review.max_harm)" if net[best] > 0 else ""
    return fitted.model_copy(update={**found, "off": off + bound})


class Trials:
    """A student's first answers to fitting problems, their step scores, and the results of correcting some steps."""

    def __init__(self, student: Student, config: Config, grader: Grader):
        self.student, self.config, self.grader = student, config, grader
        self.problems: list[Problem] = []
        self.traces: list[Trace] = []
        self.correct: list[bool | None] = []
        self.scores: list[Sequence[float]] = []
        self.results: dict[tuple[int, int], bool | None] = {}

    def add(self, problems: Sequence[Problem], progress: Callable[[], None]) -> None:
        """Have the student solve more problems, score its steps, and try the corrections that could matter.

        Only steps that score above all earlier ones can be accused, so only those are corrected. Problems are tried in
        blocks, highest scores first, until two consecutive blocks fix no more answers than they spoil, or MAX_SHARE
        is reached.
        """
        first = solve(self.student, problems, self.config, self.grader, progress)
        questions = [problem.question for problem in problems]
        self.scores += score_traces(self.student, questions, first.traces, self.config.prompts.folder)
        self.problems += first.problems
        self.traces += first.traces
        self.correct += first.correct
        scores = self.scores
        ranked = sorted((i for i, s in enumerate(scores) if s), key=lambda i: -max(scores[i]))
        most, size = round(MAX_SHARE * len(ranked)), max(1, round(BLOCK * len(ranked)))
        futile_blocks, seen = 0, set[tuple[int, int]]()
        for end in range(size, most + size, size):
            chosen = ranked[: min(end, most)]
            floor = max(scores[chosen[-1]])
            accusable = {(i, step) for i in chosen for step in accusable_steps(scores[i], floor)}
            newest = sorted(accusable - seen)
            self._correct([place for place in newest if place not in self.results])
            seen |= accusable
            wrong = [self.results[i, step] for i, step in newest if self.correct[i] is False]
            spoiled = sum(self.results[i, step] is not True for i, step in newest if self.correct[i])
            if wrong or spoiled:
                futile_blocks = 0 if sum(map(bool, wrong)) > spoiled else futile_blocks + 1
            if futile_blocks == 2:
                break

    def _correct(self, places: Sequence[tuple[int, int]]) -> None:
        """Have the student correct these (problem, step) places."""
        cases = [(self.problems[i].question, self.traces[i], step) for i, step in places]
        corrected = correct_steps(self.student, cases, review_settings(self.config, 0.0))
        verdicts = grade(self.grader, [c.text for c in corrected], [self.problems[i] for i, _ in places])
        for (i, step), outcome, verdict in zip(places, corrected, verdicts, strict=True):
            self.results[i, step] = verdict if outcome.changed else self.correct[i]

    @property
    def any_fixed(self) -> bool:
        """Whether a correction has made a wrong answer right."""
        return any(result and self.correct[i] is False for (i, _), result in self.results.items())

    def rows(self) -> list[Scored]:
        return [
            Scored(
                id=problem.id,
                correct1=self.correct[i],
                step_scores=self.scores[i],
                corrected=tuple(self.results.get((i, step)) for step in range(1, len(self.scores[i]) + 1)),
            )
            for i, problem in enumerate(self.problems)
        ]


def accusable_steps(scores: Sequence[float], floor: float) -> list[int]:
    """The steps (from 1) that some threshold >= `floor` accuses: those that score above all earlier ones."""
    before = accumulate(scores, max, initial=-math.inf)
    steps = enumerate(zip(scores, before, strict=False), 1)
    return [step for step, (score, highest) in steps if score >= floor and score > highest]


def fit_student(
    student: Student,
    problems: Sequence[Problem],
    config: Config,
    grader: Grader,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fitted:
    """Fit the threshold of a student on problems that are used nowhere else.

    Of many problems, every other one is used first, and the rest only if a correction fixed any of those. Fewer than
    MIN_PROBLEMS are not tried: then review stays off. `progress` gets (solved, problems).
    """
    count, harm = len(problems), config.review.max_harm
    if count < MIN_PROBLEMS:
        off = f"{count} problems are too few to fit its threshold, {MIN_PROBLEMS} are needed"
        return Fitted(threshold=None, off=off, problems=count, max_harm=harm)
    trials, solved = Trials(student, config, grader), 0

    def report() -> None:
        nonlocal solved
        solved += 1
        progress(solved, count)

    many = count >= MANY_PROBLEMS
    trials.add(problems[::2] if many else problems, report)
    if many and trials.any_fixed:
        trials.add(problems[1::2], report)
    if not any(trials.scores):
        return Fitted(threshold=None, off="its answers have no steps", problems=count, max_harm=harm)
    return fit_threshold(trials.rows(), harm).model_copy(update={"problems": count})


# -- the file ------------------------------------------------------------------------------------------------------


def prompts_digest(config: Config) -> str:
    """A short hash of the prompts that decide what a student answers and reviews."""
    return prompts.digest("student_system", "student_solve", "student_review", folder=config.prompts.folder)


def load_threshold(config: Config, run: Run, gguf: Path) -> Fitted | None:
    """What was fitted on this very file with these prompts, in this run or beside the file; None if nothing was."""
    beside = gguf.parent / Path(FILE).name
    for name in dict.fromkeys((str(run.path(FILE).resolve()), str(beside.resolve()))):
        known = run.read_json(name, dict[str, Fitted]) or {}
        fitted = known.get(run.file_digest(str(gguf.resolve()))) if known else None
        if fitted is not None and fitted.prompts == prompts_digest(config):
            return fitted
    return None


def store_threshold(config: Config, run: Run, gguf: Path, fitted: Fitted) -> Fitted:
    """Store what was fitted on a file for chat, eval and the server, in place of an earlier fit."""
    fitted = fitted.model_copy(update={"prompts": prompts_digest(config)})
    known = run.read_json(FILE, dict[str, Fitted]) or {}
    known[run.file_digest(str(gguf.resolve()))] = fitted
    run.write_json(FILE, {digest: each.model_dump() for digest, each in known.items()})
    return fitted


def is_current(config: Config, fitted: Fitted | None, count: int) -> bool:
    """Whether a stored fit makes another one on `count` problems needless: as many problems, the same max_harm."""
    return fitted is not None and fitted.problems >= count and fitted.max_harm == config.review.max_harm


def ensure_threshold(
    config: Config,
    run: Run,
    gguf: Path,
    student: Student,
    problems: Sequence[Problem],
    *,
    grader: Grader,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fitted:
    """The threshold of a GGUF, which `student` runs: the stored one if it is current, else fitted now and stored."""
    stored = load_threshold(config, run, gguf)
    if stored is not None and is_current(config, stored, len(problems)):
        return stored
    return store_threshold(config, run, gguf, fit_student(student, problems, config, grader, progress))

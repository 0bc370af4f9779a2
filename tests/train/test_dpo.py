"""DPO with the real trainer, from a nonzero adapter: first loss, reference, and saved adapter."""

import math

import pytest
import torch

from sclite import prompts
from sclite.errors import UsageError
from sclite.records import Attempt, Pair, Problem, Review, Template
from sclite.run import Run
from sclite.settings import load
from sclite.student import tokenization
from sclite.student.loader import load_student, load_tokenizer
from sclite.student.log_probs import pad
from sclite.student.step_scores import read_odds
from sclite.student.tokenization import TrainingSequence, piece_ids, prompt_ids
from sclite.trace import open_piece, parse, render
from sclite.train.dpo import build_bundles, train_dpo, with_replay
from sclite.train.losses import pair_log_probs, reference_log_probs
from sclite.train.sft import solve_rows, train_sft
from sclite.train.warmup import train_warmup
from tests.toy import adapter, largest_change, metrics_of, part_of, toy_config, write_pairs, write_toy

SHORT = {"batch_size": 4, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def config(folder):
    once = {**SHORT, "num_train_epochs": 1}
    return toy_config(folder, sft={"num_train_epochs": 2}, warmup=once, dpo=SHORT)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run with an SFT adapter, a warm-up adapter on top, and pairs: everything that DPO starts from."""
    run = Run(tmp_path_factory.mktemp("run"))
    write_toy(run)
    train_sft(config, run)
    train_warmup(config, run)
    write_pairs(run)
    return run


@pytest.fixture(scope="module")
def report(config, run):
    """The report of DPO; its adapter is then in the run."""
    return train_dpo(config, run)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def questions(run):
    return {problem.id: problem.question for problem in run.read("problems.jsonl", Problem)}


@pytest.fixture(scope="module")
def bundles(run, tokenizer, questions):
    """The bundles of all pairs."""
    return build_bundles(tokenizer, run.read("pairs.jsonl", Pair), questions)


@pytest.fixture(scope="module")
def attempts(run):
    """By the bundles' keys."""
    return {f"{a.id}/{a.sample}": a for a in run.read("attempts.jsonl", Attempt)}


def test_dpo_starts_at_ln_2_with_zero_margins_and_learns_the_toy_pairs(run, report):
    first, *_ = rows = metrics_of(run, "dpo")
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["margin"] == pytest.approx(0, abs=1e-3)
    assert first["loss"] > first["dpo_loss"]  # the likelihood terms are in the loss and not in dpo_loss
    assert [row["step"] for row in rows] == list(range(1, report.counts["steps"] + 1))
    assert rows[-1]["dpo_loss"] < rows[0]["dpo_loss"] - 0.05
    assert rows[-1]["margin"] > 0.05
    logged = {"chosen_logp", "rejected_logp", "nll", "replay_nll", "accuracy", "decision_accuracy"}
    assert logged <= rows[0].keys()
    assert report.counts["bundles"] == 6
    assert report.counts["pairs"] == len(run.read("pairs.jsonl", Pair))
    assert largest_change(adapter(run, "warmup"), adapter(run, "dpo")) > 0


def test_the_reference_is_the_start(config, run, report, bundles):
    model, tokenizer = load_student(config, "dpo", run.path("warmup/adapter"))
    kept = run.read_json("dpo/reference.json")["log_probs"]
    shown = []
    fresh = reference_log_probs(model, bundles, tokenizer, 1, lambda *_, note: shown.append(note))
    assert shown == [f"reference of {n} of 6 reviews" for n in range(1, 7)]
    assert kept.keys() == fresh.keys() == {f"p{i}/0" for i in range(6)}
    assert_same(kept, fresh)


def assert_same(one, other) -> None:
    for key, found in one.items():
        assert (found["content"] is None) == (other[key]["content"] is None)
        sides, others = ([*row["decisions"], row["content"] or []] for row in (found, other[key]))
        for side, same in zip(sides, others, strict=True):
            assert side == pytest.approx(same, abs=1e-3)


def test_long_pairs_are_dropped_and_counted(config, run, bundles, tmp_path):
    lengths, other = sorted(len(bundle.review.ids) for bundle in bundles), part_of(run, tmp_path, "dpo")
    few = config.dpo.model_copy(update={"max_length": lengths[1], "num_train_epochs": 0.5})
    report = train_dpo(config.model_copy(update={"dpo": few}), other)
    left = report.dropped["longer_than_max_length"]
    assert left >= 1
    assert report.counts["bundles"] == 6 - left


def test_replay_share_sets_the_number_of_replay_rows_which_come_in_turn(run, tokenizer, bundles):
    rows = solve_rows(tokenizer, run.read("templates.jsonl", Template), "")
    for share, wanted in ((0.0, 0), (0.5, 3), (1.0, 6)):
        assert sum(b.replay is not None for b in with_replay(bundles, rows, share)) == wanted
    for share, wanted in ((0.25, "---a---b---c"), (0.5, "-a-b-c-d-a-b"), (1.0, "abcdabcdabcd")):
        replayed = with_replay(bundles * 2, list("abcd"), share)
        assert "".join(b.replay or "-" for b in replayed) == wanted
    with pytest.raises(UsageError, match=r"dpo\.replay_share.* less than or equal to 1"):
        load(None, ["dpo.replay_share=2"], {}, own_file=False)


def test_marks_are_on_the_last_token_of_each_step(run, tokenizer, bundles, attempts):
    reviews = {f"{r.id}/{r.sample}": r for r in run.read("reviews.jsonl", Review)}
    for bundle in bundles:
        work, review = parse(attempts[bundle.key].trace).trace, reviews[bundle.key]
        judged = review.step or len(work.steps)
        assert bundle.review.accused == tuple(n == review.step for n in range(1, judged + 1))
        for number, mark in enumerate(bundle.review.marks, 1):
            text = tokenizer.decode(bundle.review.ids[: mark + 1])
            assert text.endswith(open_piece(number, work.steps[number - 1]))
        assert len(bundle.review.marks) == judged


def test_bundle_ids_are_the_ids_of_prompt_and_pieces(run, tokenizer, bundles, questions):
    pairs = [p for p in run.read("pairs.jsonl", Pair) if p.kind == "content"]
    by_key = {bundle.key: bundle for bundle in bundles}
    for pair in pairs:
        messages = prompts.review_messages(questions[pair.id], pair.attempt)
        before = sum(piece_ids(tokenizer, pair.prefix), prompt_ids(tokenizer, messages))
        bundle = by_key[f"{pair.id}/{pair.sample}"]
        for side, text in ((bundle.review, pair.chosen), (bundle.rejected, pair.rejected)):
            after = piece_ids(tokenizer, [text])[0]
            assert side.ids == before + after
            assert side.weights == [0.0] * len(before) + [1.0] * len(after)


def test_partial_completions_have_no_end_token_and_show_canonical_work(tokenizer, bundles, attempts):
    end = tokenization.end_id(tokenizer)
    for bundle in bundles:
        for side in filter(None, (bundle.review, bundle.rejected)):
            assert end not in [i for i, w in zip(side.ids, side.weights, strict=True) if w]
            assert side.ids[-1] != end
    shown = render(parse(attempts[bundles[0].key].trace).trace)
    assert f"Work to check:\n{shown}<|im_end|>" in tokenizer.decode(bundles[0].review.ids)


def first_token_odds(model, tokenizer, request) -> list[float]:
    """The log-odds of a ScoreRequest's two options after each mark, by their first tokens, from transformers' logits."""
    ids, ends = prompt_ids(tokenizer, request.messages), []
    for piece in piece_ids(tokenizer, request.pieces):
        ids = ids + piece
        ends.append(len(ids))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    odds = []
    for mark, options in zip(request.marks, request.options, strict=True):
        first, second = (tokens[0] for tokens in piece_ids(tokenizer, options))
        odds.append(float(logits[ends[mark] - 1, first] - logits[ends[mark] - 1, second]))
    return odds


def test_decision_odds_in_training_equal_the_scores_in_use(config, run, report, bundles, attempts, questions):
    """Trained on the token positions that review asks for: the bundles and transformers' own logits agree to 1e-4."""
    model, tokenizer = load_student(config, "dpo", run.path("dpo/adapter"))
    decisions, *_ = pair_log_probs(model, bundles, tokenizer)
    signed = (decisions[:, 0] - decisions[:, 1]).tolist()
    for bundle in bundles:
        attempt = attempts[bundle.key]
        asked = next(read_odds(questions[attempt.id], parse(attempt.trace).trace))
        trained = [signed.pop(0) * (1 if accused else -1) for accused in bundle.review.accused]
        used = first_token_odds(model, tokenizer, asked)
        assert used[: len(trained)] == pytest.approx(trained, abs=1e-4)
    assert signed == []


def test_log_probabilities_are_sums_over_a_sides_own_tokens(config, run, bundles):
    model, tokenizer = load_student(config, "dpo", run.path("warmup/adapter"))
    bundles = [bundle for bundle in bundles if bundle.rejected is not None]
    with torch.no_grad():
        _, contents, tokens = pair_log_probs(model, bundles, tokenizer)
        for number, bundle in enumerate(bundles):
            for side, found in zip((bundle.review, bundle.rejected), contents.T, strict=True):
                logits = model(input_ids=torch.tensor([side.ids])).logits[0].log_softmax(-1)
                places = [i for i, w in enumerate(side.weights) if w]
                expected = sum(float(logits[i - 1, side.ids[i]]) for i in places)
                assert float(found[number]) == pytest.approx(expected, abs=1e-2, rel=1e-4)
            assert int(tokens[number]) == sum(w > 0 for w in bundle.review.weights)


def test_padding_changes_no_odds_and_has_neither_attention_nor_weight(config, run, bundles):
    model, tokenizer = load_student(config, "dpo", run.path("warmup/adapter"))
    together = reference_log_probs(model, bundles, tokenizer, size=6)
    assert_same(together, reference_log_probs(model, bundles[::-1], tokenizer, size=1))
    batch = pad([TrainingSequence([4, 5, 6], [0.0, 1.0, 1.0]), TrainingSequence([7], [0.0])], 2)
    assert batch.ids.tolist() == [[4, 5, 6], [7, 2, 2]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.weights.tolist() == [[0, 1, 1], [0, 0, 0]]


def test_padding_free_rows_give_the_same_gradients(config, run, bundles):
    found = []
    for padding_free in (False, True):
        dpo = config.dpo.model_copy(update={"padding_free": padding_free})
        changed = config.model_copy(update={"dpo": dpo})
        model, tokenizer = load_student(changed, "dpo", run.path("warmup/adapter"), train=True)
        assert model.padding_free is padding_free
        decisions, contents, _ = pair_log_probs(model, bundles, tokenizer)
        sides = [*decisions.T, *contents.T]
        sum(side.sum() for side in sides).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        found.append(([side.tolist() for side in sides], gradients))
    (padded, gradients), (free, others) = found
    for side, other in zip(padded, free, strict=True):
        assert side == pytest.approx(other, abs=1e-3)
    for gradient, other in zip(gradients, others, strict=True):
        assert float((gradient - other).abs().max()) < 1e-3 * max(1.0, float(gradient.abs().max()))

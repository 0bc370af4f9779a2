"""`sclite show WHAT --labels`: rows as the trainer sees them, token by token."""

import pytest

from sclite.data.pairs import continuation, make_pairs
from sclite.errors import DataError, UsageError
from sclite.inspect.labels import Labels
from sclite.records import Review, Template
from sclite.run import Run
from sclite.trace import parse, render
from tests.toy import toy_config, toy_problems, toy_trace, write_toy


@pytest.fixture(scope="module")
def config(folder):
    return toy_config(folder, warmup={"decision_weight": 8.0})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run"))
    write_toy(run)
    return run


def weighted_text(found: list[dict], weighted=bool) -> str:
    return "".join(token["text"] for token in found if weighted(token["weight"]))


def test_a_template_a_confirmation_and_a_correction_have_their_sequences(config, run):
    made = Labels(config, run, "templates").as_json(run.read("templates.jsonl", Template)[0])
    assert weighted_text(made["sequences"]["sft"]) == render(toy_trace(0)) + "<|im_end|>"
    labels = Labels(config, run, "reviews")
    confirmation, review, *_ = run.read("reviews.jsonl", Review)
    assert list(labels.as_json(confirmation)["sequences"]) == ["review"]
    made = labels.as_json(review)["sequences"]
    assert list(made) == ["review", "continued", "closed"]
    after_the_wrong_step = review.trace[review.trace.index("<Cause>") :]  # its first one
    assert weighted_text(made["review"]) == after_the_wrong_step + "<|im_end|>"
    assert weighted_text(made["continued"]).endswith(f"<Answer>{toy_problems()[1].answer}</Answer><|im_end|>")
    assert weighted_text(made["closed"], lambda weight: weight == 9.0).startswith("</")
    assert "Correction" not in weighted_text(made["closed"])


def test_both_sides_of_a_pair_are_shown(config, run):
    review = run.read("reviews.jsonl", Review)[1]
    work = parse(render(toy_trace(1, 1))).trace
    wrong = review.model_copy(update={"correction": "12 + 31 = 44"})
    content = make_pairs(review, work, [(continuation(wrong), False)])[0][-1]
    made = Labels(config, run, "pairs").as_json(content)["sequences"]
    assert list(made) == ["chosen", "rejected"]
    assert review.correction in weighted_text(made["chosen"])
    assert "12 + 31 = 44" in weighted_text(made["rejected"])
    decision = Labels(config, run, "pairs").as_json(make_pairs(review, work)[0][0])["sequences"]
    (marked,) = [token for token in decision["decision, to flag the step chosen"] if token["decision"]]
    assert marked["weight"] == 0


def test_a_page_counts_loss_tokens_and_marks_weights_and_decisions(config, run):
    row = run.read("reviews.jsonl", Review)[1]
    page = Labels(config, run, "reviews").format_row(row, 2, 6).plain
    assert page.startswith("2/6  p1")
    assert "\nclosed: " in page
    assert ", 3 with loss\n" in page  # two closers and the end
    assert "<|im_end|>⟧" in page
    assert "×9⟧" in page
    work = parse(render(toy_trace(1, 1))).trace
    page = Labels(config, run, "pairs").format_row(make_pairs(row, work)[0][0], 1, 1).plain
    assert "0 with loss, 1 decision\n" in page
    assert page.count("◆") == 2  # there, and in the legend
    assert page.count("⟦") == 1  # in the legend


def test_review_of_an_attempt_that_is_gone_and_untrained_rows_are_refused(config, run):
    (review, *_) = run.read("reviews.jsonl", Review)
    labels = Labels(config, run, "reviews")
    with pytest.raises(DataError, match="no longer has sample 7 of"):
        list(labels.sequences(review.model_copy(update={"sample": 7})))
    with pytest.raises(UsageError, match="attempts are not trained on") as error:
        Labels(config, run, "attempts")
    assert "templates, reviews, pairs" in error.value.hint

"""The rows of the warm-up: how they are mixed, and the loss mask of each kind."""

import pytest

from sclite import prompts
from sclite.records import Attempt, Review, Template
from sclite.run import Run
from sclite.student.loader import load_tokenizer
from sclite.student.tokenization import decision_ids, encode_solution, end_id
from sclite.trace import parse, render
from sclite.train.warmup import mixed_rows
from tests.toy import toy_config, toy_problems, toy_trace, write_toy


def rows_of(folder, tmp_path, change=lambda id, trace: trace, **warmup):
    """(tokenizer, the rows of the toy run by their names), after a `change` of its attempts' traces."""
    run, config = Run(tmp_path), toy_config(folder, warmup=warmup)
    write_toy(run)
    rows = [attempt.model_dump() for attempt in run.read("attempts.jsonl", Attempt)]
    changed = [Attempt(**row | {"trace": change(row["id"], row["trace"])}) for row in rows]
    run.replace("attempts.jsonl", changed)
    tokenizer = load_tokenizer(config.student.model)
    reviews, templates = run.read("reviews.jsonl", Review), run.read("templates.jsonl", Template)
    names, rows = mixed_rows(tokenizer, run, reviews, templates, config)
    return tokenizer, dict(zip(names, rows, strict=True))


@pytest.fixture
def mixed(folder, tmp_path):
    """The names of the rows of a run with nine reviews, six corrections and, by default, nine templates, in order."""
    run = Run(tmp_path)
    write_toy(run, 9)
    tokenizer, reviews = load_tokenizer(str(folder)), run.read("reviews.jsonl", Review)
    known = run.read("templates.jsonl", Template)

    def names(share: float, seed: int = 0, templates=known, reviews=reviews) -> list[str]:
        config = toy_config(folder, warmup={"replay_share": share}).model_copy(update={"seed": seed})
        return mixed_rows(tokenizer, run, reviews, templates, config)[0]

    return names


CONFIRMED = [f"p{i}/0" for i in range(0, 9, 3)]
CORRECTED = [f"p{i}/0" for i in range(9) if i % 3]
SOLVED, CONTINUED = [f"p{i}" for i in range(9)], [f"{name}/continued" for name in CORRECTED]


def solving(names: list[str]) -> list[str]:
    return [name for name in names if "/" not in name or name.endswith("/continued")]


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0), (0.5, 4), (1.0, 9), (2.5, 22)])
def test_all_reviews_and_closed_rows_and_a_share_of_solving_rows_are_mixed(mixed, share, wanted):
    rows = mixed(share)
    others = [name for name in rows if name not in solving(rows)]
    assert sorted(others) == sorted([*CONFIRMED, *CORRECTED, *(f"{name}/closed" for name in CORRECTED)])
    assert len(solving(rows)) == wanted
    continued = sum(name in CONTINUED for name in rows)
    assert continued == (wanted // 2 if wanted < 15 else 6 + 3)  # each of the 15 once, then seven again


def test_the_seed_decides_the_order_and_no_row_is_drawn_twice_before_all(mixed):
    first, same, other = (mixed(0.6, seed) for seed in (3, 3, 4))
    assert first == same != other
    # DPO replays from the first row on: otherwise the same few rows would be trained twice.
    assert len({name for seed in range(5) for name in mixed(0.5, seed) if name in SOLVED}) > 4
    assert sorted(solving(mixed(15 / 9))) == sorted([*SOLVED, *CONTINUED])


def test_without_templates_or_corrections_the_other_rows_are_used(mixed, tmp_path):
    corrections = solving(mixed(0.5, templates=[]))
    assert sorted(corrections) == CONTINUED[:4]
    confirmations = [row for row in Run(tmp_path).read("reviews.jsonl", Review) if row.step is None]
    assert solving(mixed(1.0, templates=[], reviews=confirmations)) == []


def test_decisions_of_a_review_weigh_more(folder, tmp_path):
    tokenizer, rows = rows_of(folder, tmp_path, decision_weight=8.0)
    accuse, close = decision_ids(tokenizer)
    for row in (row for name, row in rows.items() if name.endswith("/0")):
        heavy = [i for i, weight in enumerate(row.weights) if weight > 1]
        assert heavy == [mark + 1 for mark in row.marks]
        assert {row.weights[i] for i in heavy} == {9.0}
        assert [row.ids[i] for i in heavy] == [accuse if a else close for a in row.accused]
        assert row.ids[-1] == end_id(tokenizer)
        assert row.weights[-1] == 1.0


def test_reviews_end_in_the_right_answer_and_continued_rows_show_no_cause(folder, tmp_path):
    tokenizer, rows = rows_of(folder, tmp_path, replay_share=4.0)
    for problem in toy_problems():
        row = rows[f"{problem.id}/0"]
        text = tokenizer.decode([i for i, w in zip(row.ids, row.weights, strict=True) if w])
        assert parse(text.removesuffix("<|im_end|>")).trace.answer == problem.answer
    for number, step in ((1, 1), (2, 2), (4, 1), (5, 2)):
        row = rows[f"p{number}/0/continued"]
        given = tokenizer.decode([i for i, w in zip(row.ids, row.weights, strict=True) if not w])
        assert toy_trace(number).steps[step - 1].text in given
        assert "The tens slip." not in given


@pytest.mark.parametrize("noted", [False, True])
def test_closed_rows_have_loss_on_closing_tags_and_the_end_alone(folder, tmp_path, noted):
    """Corrections within an attempt are removed from its work."""

    def change(id, trace):
        if not noted or id not in ("p2", "p5"):
            return trace
        slip = "<Step1>1 + 1 = 3\n<Cause>It is 2.</Cause>\n<Correction>"
        return trace.replace("<Step1>", slip).replace("\n<Key>", "</Correction>\n<Key>")

    tokenizer, rows = rows_of(folder, tmp_path, change, decision_weight=8.0)
    _, close = decision_ids(tokenizer)
    for number, step in ((1, 1), (2, 2), (4, 1), (5, 2)):
        row, work = rows[f"p{number}/0/closed"], toy_trace(number, step)
        asked = prompts.solve_messages(toy_problems()[number].question)
        assert row.ids == encode_solution(tokenizer, asked, work).ids
        heard = [(i, w) for i, w in zip(row.ids, row.weights, strict=True) if w]
        closers = [(close, 9.0 if n == step else 1.0) for n in (1, 2)]
        assert heard == [*closers, (end_id(tokenizer), 1.0)]
        assert "<Cause>" not in tokenizer.decode(row.ids)
        assert render(work) in tokenizer.decode(row.ids)
        assert "It is 2." not in tokenizer.decode(rows[f"p{number}/0"].ids)


def test_work_without_an_answer_or_with_too_long_a_review_is_not_closed(folder, tmp_path):
    """The end token after the former would teach to end there."""
    broken = lambda id, trace: trace.partition("<Answer>")[0] if id == "p1" else trace  # noqa: E731
    _, rows = rows_of(folder, tmp_path / "broken", broken, replay_share=4.0)
    assert "p1/0/continued" in rows
    assert "p1/0/closed" not in rows
    assert "p2/0/closed" in rows
    _, rows = rows_of(folder, tmp_path / "all")
    longest = max(len(rows[f"p{i}/0"].ids) for i in (1, 2, 4, 5))
    _, short = rows_of(folder, tmp_path / "short", max_length=longest - 1)
    gone = {name for name in rows if name not in short}
    assert gone == {f"p{i}/0/closed" for i in (1, 2, 4, 5) if len(rows[f"p{i}/0"].ids) == longest}
    assert gone

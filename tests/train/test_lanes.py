"""Shares of a micro-batch side by side on a CPU."""

import threading

import pytest

from sclite.errors import DataFault
from sclite.records import Template
from sclite.run import Run
from sclite.student.load import load_student, load_tokenizer
from sclite.train.bundle import reference_log_probs
from sclite.train.checkpoints import Checkpoints
from sclite.train.lanes import MOST, Lanes, side_by_side
from sclite.train.sft import solve_rows, supervised
from sclite.train.trainer import train_adapter
from sclite.train.watch import read_metrics
from tests.tiny import tiny_llama
from tests.train.test_dpo import assert_same, bundles_of, write_pairs
from tests.train.test_sft import config_of, write_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("student"))


@pytest.fixture
def threads():
    """Sets the number of torch's threads; afterwards it is as it was."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def linear():
    import torch

    return torch.nn.Linear(2, 2)


def test_rows_are_dealt_out_and_no_lane_is_empty():
    assert Lanes(2).split([5, 6, 7]) == [[5, 7], [6]]
    assert Lanes(4).split([5, 6]) == [[5], [6]]
    assert Lanes(1).split([5, 6]) == [[5, 6]]


@pytest.mark.parametrize(
    ("available", "rows", "lanes", "each"), [(1, 8, 1, 1), (2, 8, 2, 1), (2, 1, 1, 2), (9, 8, MOST, 2)]
)
def test_there_is_a_lane_for_each_thread_as_far_as_there_are_rows(threads, available, rows, lanes, each):
    import torch

    threads(available)
    with side_by_side(linear(), rows) as found:
        assert found.count == lanes
        assert found.map(lambda _: torch.get_num_threads(), range(lanes)) == [each] * lanes
    assert torch.get_num_threads() == available


def test_results_stand_in_the_order_of_the_shares_whichever_is_done_first(threads):
    threads(2)
    second_done = threading.Event()

    def work(share):
        if share == "first":
            assert second_done.wait(30), "the shares do not run side by side"
        second_done.set()
        return share

    with side_by_side(linear(), 2) as lanes:
        assert lanes.map(work, ["first", "second"]) == ["first", "second"]


def test_a_fault_in_a_lane_is_raised_and_the_threads_are_as_before(threads):
    import torch

    threads(2)

    def work(share):
        if share:
            raise DataFault("this one fails")

    with pytest.raises(DataFault, match="this one fails"), side_by_side(linear(), 2) as lanes:
        lanes.map(work, [0, 1])
    assert torch.get_num_threads() == 2


def trained(folder, run, place, micro_batch=4, used=None):
    """(metrics, adapter weights) after SFT on half of the templates, the others kept for evaluation.

    `used` is given the names of the threads in which losses were computed.
    """
    config = config_of(folder, sft={"epochs": 3, "checkpoints": 1})
    tokenizer = load_tokenizer(config.student.model)
    rows = solve_rows(tokenizer, run.read("templates.jsonl", Template), "")
    model, _ = load_student(config.student, config.sft, train=True)
    lesson = supervised("sft", rows, tokenizer.pad_token_id, 0.5, 0)
    if used is not None:
        parts = lesson.parts

        def noted(model, batch):
            used.add(threading.current_thread().name)
            return parts(model, batch)

        object.__setattr__(lesson, "parts", noted)
    train_adapter(
        model, tokenizer, lesson, config.sft, Checkpoints(place / "checkpoints"), place / "metrics.jsonl",
        rate=1e-3, epochs=3, seed=0, micro_batch=micro_batch,
    )  # fmt: skip
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return read_metrics(place / "metrics.jsonl"), weights


def test_training_and_evaluation_in_lanes_give_what_they_give_without(folder, tmp_path, threads):
    run = Run(tmp_path / "run")
    write_toy(run, 16)
    used: set[str] = set()
    threads(1)
    one, weights = trained(folder, run, tmp_path / "one")
    threads(2)
    two, same = trained(folder, run, tmp_path / "two", micro_batch=2, used=used)
    assert len(used) == 2
    assert [row.keys() for row in one] == [row.keys() for row in two]
    assert any("eval_loss" in row for row in one)
    for name in ("loss", "grad_norm", "tokens", "eval_loss"):
        assert [row[name] for row in two if name in row] == pytest.approx(
            [row[name] for row in one if name in row], rel=1e-4
        )
    for name, weight in weights.items():
        assert (weight - same[name]).abs().max() < 1e-4, name


def test_slopes_of_a_step_do_not_depend_on_which_lane_ends_first(folder, tmp_path, threads):
    run = Run(tmp_path / "run")
    write_toy(run, 16)
    threads(2)
    _, first = trained(folder, run, tmp_path / "a")
    _, again = trained(folder, run, tmp_path / "b")
    assert all(bool((weight == again[name]).all()) for name, weight in first.items())


def test_the_reference_of_dpo_is_the_same_in_lanes(folder, tmp_path, threads):
    run = Run(tmp_path / "run")
    write_toy(run)
    write_pairs(run)
    config = config_of(folder)
    model, tokenizer = load_student(config.student, config.sft, train=True)
    bundles = bundles_of(config, run, tokenizer)
    threads(1)
    one = reference_log_probs(model, bundles, tokenizer, size=4)
    threads(2)
    two = reference_log_probs(model, bundles, tokenizer, size=4)
    assert one.keys() == two.keys()
    assert_same(one, two)

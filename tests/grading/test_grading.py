"""The grader: a table of pairs with verdicts, extraction of answers, and workers that hang, die or are orphaned."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclite import helper_process
from sclite.errors import ScliteError
from sclite.grading import grader as grading
from sclite.grading.algebra import same_formula
from sclite.grading.extract import answer_of, extract
from sclite.grading.grader import Grader
from sclite.helper_process import HelperProcess
from sclite.trace import parse
from tests.toy import wait_until

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "answer_pairs.jsonl").read_text().splitlines()]
SHARED = Path(os.environ.get("SCLITE_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "data"
ROOT = (r"\sqrt{8}", r"2\sqrt{2}")
TOWER = "9^{9^{9^{9}}}"  # has more digits than there are atoms; sympy tries to print them
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real problems at {SHARED}")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def grader():
    with Grader(seconds=30) as grader:
        yield grader


@pytest.fixture(scope="module")
def verdicts(grader):
    return grader.equal_many([(p["given"], p["gold"]) for p in PAIRS])


@pytest.mark.parametrize("kind", sorted({pair["kind"] for pair in PAIRS}))
def test_every_pair_of_the_table_gets_its_verdict(verdicts, kind):
    pairs = [(p, v) for p, v in zip(PAIRS, verdicts, strict=True) if p["kind"] == kind]
    assert [(p["given"], p["gold"], v) for p, v in pairs if v is not p["equal"]] == []


def test_verdicts_are_symmetric_and_a_quick_comparison_never_raises(grader, verdicts):
    dice = random.Random(1)
    real = [p for p in PAIRS if p["kind"] != "hostile"]
    texts = [p[side] for p in real for side in ("given", "gold") if p[side].strip()]
    pairs = [(dice.choice(texts), dice.choice(texts)) for _ in range(4000)] + [(t, t) for t in texts]
    compared = [(pair, *(grading.compare_quickly(*p)[0] for p in (pair, pair[::-1]))) for pair in pairs]
    assert [pair for pair, verdict, turned in compared if verdict != turned] == []
    turned = grader.equal_many([(p["gold"], p["given"]) for p in PAIRS])
    found = zip(PAIRS, verdicts, turned, strict=True)
    assert [(p["given"], p["gold"]) for p, v, t in found if v is not t and p["given"].strip(" $")] == []


def test_every_gold_answer_equals_itself_in_dollars_and_boxed(grader):
    real = {p["gold"] for p in PAIRS if p["kind"] != "hostile"}
    golds = sorted(gold for gold in real if not re.search(r"\$|boxed|^'|<", gold))
    frames = ("${}$", "\\boxed{{{}}}", " {} . ")
    written = [(frames[n % 3].format(gold), gold) for n, gold in enumerate(golds)]
    found = grader.equal_many(written)
    assert [pair for pair, verdict in zip(written, found, strict=True) if verdict is not True] == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x=\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"first \boxed{3}, no: \boxed{4}", "4"), (r"\boxed{\boxed{7}}", "7"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed {5}", "5"), (r"\boxed{3} and then \boxed{4", "3"), (r"#### 9 and \boxed{3}", "3"),
        ("48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72", "72"), ("#### 1,000\n", "1,000"),
        ("#### 1. Add them\n<Answer>5</Answer>", "5"), ("<Step1>2</Step1>\n<Answer>final 12</Answer>", "final 12"),
        ("<answer:> $x = 3$ </ANSWER>", "$x = 3$"), ("<Answer>\nEvelyn", "Evelyn"), ("<Answer></Answer> 8", "8"),
        ("The answer is 5. I hope it is correct.", "5"), ("**Answer:** 3.5 because so", "3.5"),
        ("The final answer to this question is: $\\frac{3}{4}$.", r"$\frac{3}{4}$"), ("The answers are 1 and 2.", "1 and 2"),
        ("Final Answer:\n\nEvelyn", "Evelyn"), ("She makes $<<9*2=18>>18\nA: 18", "18"),
        ("so 3 + 4 makes 7 in all", "7"), ("it fell to -3.5", "-3.5"), ("5-3", "3"),
        ("it costs $1,234.50, I think", "$1,234.50"), ("nothing here", None), ("", None), (r"\boxed{}", None),
        ("The answer is:\n$$\n42\n$$", "42"), ("The answer is\n\n\\[ \n x = 42\n\\]", "x = 42"),
        ("**Answer:** $$\n42\n$$", "42"), ("A: $$\n42\n$$", "42"), ("The answer is: $$42$$", "$$42$$"),
    ],
)  # fmt: skip
def test_the_final_answer_is_extracted(text, answer):
    assert extract(text) == answer


def test_an_answer_is_not_looked_for_in_the_thoughts_before_it():
    assert answer_of(parse("<think>Is it \\boxed{3}? No.</think>\nThe answer is 5.")) == "5"
    assert answer_of(parse("<think>Is it \\boxed{3}? Yes.</think>")) == "3"  # there is nothing after them


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="\\boxed{}<>/Answeris:# 19.,$-=*\n\u0000é", max_size=200))
def test_any_text_is_graded_without_raising(text):
    answer = extract(text)
    assert answer is None or answer.strip() == answer != ""
    assert grading.compare_quickly(answer, "5")[0] in (True, False, None)


PARTS = ("\\boxed{", "}", "#### ", "<answer", "answer ", "1,", "A:\n", "\\")
STARTS = ("####", "answer", "answer:", "answer:$$", "<", "\\boxed", "A:")


@pytest.mark.parametrize(
    "text",
    [
        *(part * (200_000 // len(part)) for part in PARTS),
        *(start + " " * 200_000 + "x" for start in STARTS),
        "####" + "1" * 200_000 + "x",
        "ab_" * 200 + " " * 200 + "!",
    ],
    ids=lambda text: repr(text[:9]),
)
def test_hostile_texts_take_linear_time(text):
    begin = time.perf_counter()
    extract(text)
    grading.compare_quickly(text[:1000], "5")
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    ("given", "gold", "verdict"),
    [
        ("(" * 100_000, "5", False), ("5" + " and so on" * 100, "5", False),  # over 1,000 characters
        ("so " * 500 + "\\boxed{5}", "5", True), ("x " * 600, "y " * 600, None),
        ("7" * 100_000, "7" * 100_000, True), ("{" * 900, "5", False),
        (None, "5", False), ("", "5", False), (" \n", "", False),
    ],
    ids=range(9),
)  # fmt: skip
def test_very_long_and_missing_answers_are_wrong_but_long_gold_unknown(grader, given, gold, verdict):
    assert grader.equal(given, gold) is verdict


def test_plain_numbers_start_no_worker_and_import_no_sympy(monkeypatch):
    monkeypatch.setattr(HelperProcess, "start", lambda _helper: pytest.fail("a worker was started"))
    plain = [("72", "72"), ("$1,234.50", "1234.5"), ("12 apples", "12"), ("3 1/2", r"\frac{7}{2}")]
    assert Grader().equal_many([*plain, ("73", "72")]) == [True] * 4 + [False]
    code = "import sys, sclite.grading.grader as g; g.Grader().equal('1/2', '0.5')"
    code += "; print(sorted({'sympy', 'math_verify'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_hung_worker_is_killed_and_the_verdict_unknown():
    with Grader(seconds=2, processes=2) as grader:
        assert grader.equal(*ROOT) is True
        first = grader.idle.queue[-1].process
        assert grader.equal(TOWER, "5") is None
        assert first.poll() is not None
        pairs = [ROOT, (TOWER, "5"), (r"\sqrt{8}", r"2\sqrt{3}"), ("5", "5"), (None, "5")]
        assert grader.equal_many(pairs) == [True, None, False, True, False]


def test_a_hung_comparison_does_not_block_others():
    roots = [(f"\\sqrt{{{2 * n * n}}}", f"{n}\\sqrt2") for n in range(3, 8)]
    with Grader(seconds=4, processes=2) as grader, ThreadPoolExecutor(1) as pool:
        hung = pool.submit(grader.equal, TOWER, "5")
        assert grader.equal_many(roots) == [True] * 5
        assert not hung.done()
        assert hung.result() is None


def test_there_is_one_worker_per_core_and_many_threads_share_them(monkeypatch, grader):
    monkeypatch.setattr(grading, "usable_cores", lambda: 3)
    assert Grader().processes == 3
    monkeypatch.setattr(grading, "usable_cores", lambda: 500)
    assert Grader().processes == grading.MAX_PROCESSES
    roots = [(f"\\sqrt{{{n * n * 2}}}", f"{n}\\sqrt{{2}}") for n in range(2, 8)] * 5
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda pair: grader.equal(*pair), roots)) == [True] * 30


def test_failed_grader_is_not_a_wrong_answer(monkeypatch):
    import math_verify

    def fail(*_args, **_options):
        raise ZeroDivisionError

    monkeypatch.setattr(math_verify, "verify", fail)
    assert same_formula(r"\begin{pmatrix}1\end{pmatrix}", r"\begin{pmatrix}2\end{pmatrix}") is None


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "import time; time.sleep(60)"], ids=["dies", "hangs"])
def test_a_worker_that_dies_or_never_replies_is_not_a_wrong_answer(monkeypatch, end):
    monkeypatch.setattr(helper_process, "COMMAND", f"print('\"\"', flush=True); input(); {end}")
    with Grader(seconds=0.3) as grader:
        assert grader.equal(*ROOT) is None
        assert grader.idle.queue[-1].process is None


def test_a_dead_worker_is_replaced_and_a_closed_grader_leaves_none():
    with Grader(seconds=30) as grader:
        assert grader.equal(r"\sqrt{8}", r"2\sqrt{2}") is True
        first = grader.idle.queue[-1].process
        assert os.getpgid(first.pid) != os.getpgid(0)  # Ctrl-C in a terminal is not for it
        first.kill()
        first.wait()
        assert grader.equal(r"\sqrt{8}", r"2\sqrt{2}") is True
        second = grader.idle.queue[-1].process
    assert second.poll() is not None


def test_missing_math_verify_is_reported_with_a_hint(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no math_verify here')")
    monkeypatch.syspath_prepend(tmp_path)
    with Grader() as grader, pytest.raises(ScliteError, match="no math_verify here") as error:
        grader.equal(r"\sqrt{8}", r"2\sqrt{2}")
    assert "pip install" in error.value.hint


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_proc
@pytest.mark.parametrize("hung", [False, True], ids=["idle", "hung"])
def test_a_worker_ends_when_its_parent_is_killed(hung):
    """The script has no `if __name__ == "__main__"`; workers must not need it."""
    script = f"""
        import time, sclite.grading.grader as grader
        class Shown(grader.HelperProcess):
            def start(self):
                process = super().start()
                print(process.pid, flush=True)
                return process
        grader.HelperProcess = Shown
        grader.Grader(seconds=1.5).equal({TOWER if hung else "x+1"!r}, "5")
        print("idle", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    time.sleep(0.5) if hung else parent.stdout.readline()
    assert _runs(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not _runs(worker))


def _shared(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHARED / name).read_text().splitlines()]


@needs_shared
def test_published_labels_of_1200_solutions_are_reproduced(grader):
    rows = _shared("gsm8k-model-solutions.jsonl")
    solutions = [(row["ground_truth"], s) for row in rows for s in row.values() if isinstance(s, dict)]
    verdicts = grader.equal_many((extract(s["solution"]), extract(gold)) for gold, s in solutions)
    assert len(verdicts) == 1200
    assert [s for (_, s), v in zip(solutions, verdicts, strict=True) if v is not s["is_correct"]] == []


@needs_shared
@pytest.mark.parametrize("equal", [True, False])
def test_300_real_gold_answers_equal_their_variants_and_differ_from_each_other(grader, equal):
    """Each is compared with its own variants, else with the next one and the tenth after it."""
    golds = [extract(row["solution"]) for row in _shared("math-sample.jsonl")]
    pairs = [(new, gold) for gold in golds for new in _variants(gold)]
    if not equal:
        golds = [gold.replace("\\$", "") for gold in golds]
        pairs = [(a, b) for a, b in [*pairwise(golds), *zip(golds, golds[10:], strict=False)] if a != b]
    verdicts = grader.equal_many(pairs)
    assert (len(golds), len(pairs) > 250) == (300, True)
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not equal] == []


def _variants(gold: str) -> set[str]:
    plain = gold.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    spaced = gold if re.search(r"\d,(\\!)?\d{3}", gold) else re.sub(r"([-+=,/])", r" \1 ", gold)
    unsized = gold.replace("\\left", "").replace("\\right", "")
    framed = {f"${gold}$", f"\\({gold}\\)", f"\\boxed{{{gold}}}", f"{gold}.", f"  {gold}\n"}
    return {gold, plain, plain.replace("\\frac", "\\dfrac"), spaced, unsized, *framed}

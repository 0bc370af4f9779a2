"""Prompts: their values, the student never sees a solution, and custom prompts."""

import pytest

from sclite import prompts
from sclite.errors import DataError


def text_of(messages) -> str:
    return "\n".join(m["content"] for m in messages)


def test_solving_and_reviewing_share_a_system_prompt():
    solve, review = (
        prompts.solve_messages("How many?"),
        prompts.review_messages("How many?", "<Step1>x</Step1>"),
    )
    assert [m["role"] for m in solve] == [m["role"] for m in review] == ["system", "user"]
    assert solve[0] == review[0]
    assert solve[0]["content"].strip()


def test_values_are_inserted_verbatim():
    odd = "What is {{ 7 * 6 }} {% raise %} <b> & \\frac{1}{2}?"
    assert odd in text_of(prompts.solve_messages(odd))
    assert odd in text_of(prompts.template_messages(odd, odd, odd, odd))


def test_the_correction_prompt_ends_with_the_work():
    plain = prompts.correction_messages("Q?", "the way", "41", "<Step1>x\n</Step1>")
    assert plain[-1]["content"].endswith("The student's work:\n<Step1>x\n</Step1>")
    assert "could not be used" not in text_of(plain)
    again = prompts.correction_messages("Q?", "the way", "41", "<Step1>x\n</Step1>", "step 2 is missing")
    assert "could not be used: step 2 is missing." in text_of(again)
    assert "could not be used" not in text_of(prompts.template_messages("Q?", "the way", "41"))


def test_the_teacher_sees_solution_and_answer():
    for messages in (
        prompts.template_messages("Q?", "the way", "41"),
        prompts.correction_messages("Q?", "the way", "41", "w"),
    ):
        assert "the way" in text_of(messages)
        assert "41" in text_of(messages)


def test_a_custom_prompt_replaces_only_the_shipped_one(tmp_path):
    (tmp_path / "student_solve.txt").write_text("Please: {{ question }}\n")
    mine = prompts.solve_messages("How many?", str(tmp_path))
    assert mine[1]["content"] == "Please: How many?"
    assert mine[0] == prompts.solve_messages("How many?")[0]


def test_the_digest_depends_on_the_text_and_the_names(tmp_path):
    before = prompts.digest("student_system", "student_solve")
    assert before == prompts.digest("student_system", "student_solve", folder=str(tmp_path))
    own = tmp_path / "own"
    own.mkdir()
    (own / "student_solve.txt").write_text("Please: {{ question }}")
    assert prompts.digest("student_system", "student_solve", folder=str(own)) != before
    assert prompts.digest("student_solve") != before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ question", "student_solve.txt, line 1: "),
        ("Hi {{ name }}", "uses an undefined value: 'name' is undefined"),
        ("{% if x %}", "student_solve.txt, line 1: "),
    ],
)
def test_an_invalid_custom_prompt_is_reported_with_its_line(tmp_path, source, said):
    (tmp_path / "student_solve.txt").write_text(source)
    with pytest.raises(DataError) as error:
        prompts.solve_messages("How many?", str(tmp_path))
    assert said in error.value.message


def test_a_prompt_cannot_reach_the_system(tmp_path):
    ran = tmp_path / "ran"
    call = "cycler.__init__.__globals__.os.system('touch " + str(ran) + "')"
    (tmp_path / "student_solve.txt").write_text("{{ " + call + " }}")
    with pytest.raises(DataError, match=r"student_solve\.txt cannot be rendered: access to attribute"):
        prompts.solve_messages("How many?", str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ question / 0 }}", "cannot be rendered: unsupported operand"),
        ("{{ 1 / 0 }}", "cannot be rendered: division by zero"),
        ("{% include '/etc/passwd' %}", "cannot be rendered: "),
        ("{{ question | nofilter }}", "line 1: No filter named 'nofilter'"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "cannot be rendered: range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot be rendered: maximum recursion depth"),
    ],
)
def test_a_failing_prompt_is_reported_with_the_reason(tmp_path, source, said):
    (tmp_path / "student_solve.txt").write_text(source)
    with pytest.raises(DataError) as error:
        prompts.solve_messages("How many?", str(tmp_path))
    assert "student_solve.txt" in error.value.message
    assert said.lower() in error.value.message.lower()
    assert str(tmp_path) in error.value.hint


def test_a_wrong_encoding_and_a_missing_folder_are_errors(tmp_path):
    (tmp_path / "student_solve.txt").write_bytes(b"Caf\xe9: {{ question }}")
    with pytest.raises(DataError, match=r"student_solve\.txt cannot be read: 'utf-8' codec") as error:
        prompts.solve_messages("How many?", str(tmp_path))
    assert "UTF-8" in error.value.hint
    with pytest.raises(DataError, match=r"prompts\.folder: .*nowhere is not a folder"):
        prompts.solve_messages("How many?", str(tmp_path / "nowhere"))

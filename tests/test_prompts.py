"""Prompts: their values, the student never sees a solution, and custom prompts."""

import pytest

from sclite import prompts
from sclite.errors import DataError


def text_of(messages) -> str:
    return "\n".join(m["content"] for m in messages)


def test_both_chats_share_a_system_prompt_and_values_are_inserted_verbatim():
    solve = prompts.solve_messages("How many?")
    review = prompts.review_messages("How many?", "<Step1>x</Step1>")
    assert [m["role"] for m in solve] == [m["role"] for m in review] == ["system", "user"]
    assert solve[0] == review[0]
    assert solve[0]["content"].strip()
    odd = "What is {{ 7 * 6 }} {% raise %} <b> & \\frac{1}{2}?"
    assert odd in text_of(prompts.solve_messages(odd))
    assert odd in text_of(prompts.teacher_messages(odd, odd, odd, odd))


def test_teacher_sees_the_solution_and_why_its_reply_failed(tmp_path):
    given, work = ("Q?", "the way", "41"), "<Step1>x\n</Step1>"
    first = prompts.teacher_messages(*given, work=work)
    again = prompts.teacher_messages(*given, "no step 2", work=work)
    assert first[-1]["content"].endswith(f"The student's work:\n{work}")
    for messages in (first, prompts.teacher_messages(*given)):
        assert "the way" in text_of(messages)
        assert "41" in text_of(messages)
        assert "could not be used" not in text_of(messages)
    assert "could not be used: no step 2." in text_of(again)
    # a value that would always be empty
    (tmp_path / "teacher_template.txt").write_text("It is {{ work }}.")
    with pytest.raises(DataError, match="'work' is undefined"):
        prompts.teacher_messages(*given, folder=str(tmp_path))
    (tmp_path / "inspector_template.txt").write_text("It is {{ error }}.")
    with pytest.raises(DataError, match="'error' is undefined"):
        prompts.inspection_messages("inspector_template", *given, "<Step1>x", folder=str(tmp_path))


def test_custom_prompt_replaces_only_the_shipped_one_in_a_folder_that_exists(tmp_path):
    (tmp_path / "student_solve.txt").write_text("Please: {{ question }}\n")
    mine = prompts.solve_messages("How many?", str(tmp_path))
    assert mine[1]["content"] == "Please: How many?"
    assert mine[0] == prompts.solve_messages("How many?")[0]
    with pytest.raises(DataError, match=r"prompts\.folder: .*nowhere is not a folder"):
        prompts.solve_messages("How many?", str(tmp_path / "nowhere"))


def test_digest_depends_on_the_text_and_the_names(tmp_path):
    before = prompts.digest_prompts("student_system", "student_solve")
    assert before == prompts.digest_prompts("student_system", "student_solve", folder=str(tmp_path))
    assert before != prompts.digest_prompts("student_solve")
    own = tmp_path / "own"
    own.mkdir()
    (own / "student_solve.txt").write_text("Please: {{ question }}")
    assert before != prompts.digest_prompts("student_system", "student_solve", folder=str(own))


def test_empty_system_prompt_is_refused(tmp_path):
    """Some chat templates would put one of their own in its place."""
    (tmp_path / "student_system.txt").write_text("{# nothing #}\n")
    with pytest.raises(DataError, match=r"the prompt student_system.txt is empty"):
        prompts.solve_messages("How many?", str(tmp_path))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ question", "student_solve.txt, line 1: "),
        ("{% if x %}", "student_solve.txt, line 1: "),
        ("{{ question | nofilter }}", "line 1: No filter named 'nofilter'"),
        ("Hi {{ name }}", "'name' is undefined"),
        ("{{ question / 0 }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include '/etc/passwd' %}", "/etc/passwd"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
        ("{{ cycler.__init__.__globals__.os.system('touch ran') }}", "access to"),
        (b"Caf\xe9: {{ question }}", "student_solve.txt: 'utf-8' codec"),
    ],
)
def test_failing_prompt_is_reported_with_the_reason(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student_solve.txt").write_bytes(source if isinstance(source, bytes) else source.encode())
    with pytest.raises(DataError) as error:
        prompts.solve_messages("How many?", str(tmp_path))
    assert "student_solve.txt" in error.value.message
    assert said.lower() in error.value.message.lower()
    assert error.value.hint
    assert not (tmp_path / "ran").exists()

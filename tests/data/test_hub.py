"""Datasets on the Hugging Face Hub by name: local copies of their layout with our own rows, read by `datasets`."""

import json

import datasets
import pytest

from sclite.config import Source
from sclite.data.problems import load_problems
from sclite.errors import DataError, NetworkError
from sclite.records import Problem
from tests.toy import raises

CHAT = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "So \\boxed{9}."}]
HALF = {
    "problem": "Halve 7.", "level": "Level 2", "type": "Prealgebra", "solution": "It is $\\boxed{\\frac{7}{2}}$.",
}  # fmt: skip
ROWS = {
    "openai/gsm8k": {"question": "Ann has 3, gets 4?", "answer": "It is 3 + 4 = <<3+4=7>>7 nuts.\n#### 7"},
    "EleutherAI/hendrycks_math": HALF,
    "DigitalLearningGmbH/MATH-lighteval": HALF,
    "HuggingFaceH4/MATH-500": {
        "problem": "Add $1$ and $1$.", "solution": "We get $\\boxed{2}$.", "answer": "2", "subject": "Algebra",
        "level": 1, "unique_id": "test/algebra/1.json",
    },
    "AI-MO/NuminaMath-CoT": {
        "source": "synthetic_math", "problem": "Square 3.", "solution": "\\[3^2 = \\boxed{9}\\]", "messages": CHAT,
    },
    "meta-math/MetaMathQA": {
        "type": "GSM_Rephrased", "query": "Bo buys 2 pens for 3 each. What does he pay?",
        "original_question": "Bo buys 2 pens at 3. Total?", "response": "He pays 2 * 3 = 6.\n#### 6\nThe answer is: 6",
    },
    "zwhe99/DeepMath-103K": {
        "question": "What is the limit of $1/n$?", "final_answer": "0", "difficulty": 4.5, "topic": "Calculus",
        "r1_solution_1": "Hm, is it 1? No.\n</think>\n\nIt falls below any bound, so \\boxed{0}.",
        "r1_solution_2": "I see.\n</think>\n\n\\boxed{0}", "r1_solution_3": "Well.\n</think>\n\n\\boxed{0}",
    },
    "open-r1/OpenR1-Math-220k": {
        "problem": "Solve $2x = 8$.", "solution": "Divide by 2: $x = 4$.", "answer": "4", "problem_type": "Algebra",
        "question_type": "math-word-problem", "source": "olympiads", "uuid": "1f0c", "is_reasoning_complete": [True, True],
        "generations": ["<think>\nDivide.\n</think>\n\\boxed{4}", "<think>\nHalf.\n</think>\n\\boxed{4}"],
        "correctness_math_verify": [True, True], "correctness_llama": None, "finish_reasons": None, "correctness_count": 2,
        "messages": CHAT,
    },
}  # fmt: skip
WANTED = {
    "openai/gsm8k": ("7", "It is 3 + 4 = 7 nuts."),
    "EleutherAI/hendrycks_math": ("\\frac{7}{2}", HALF["solution"]),
    "DigitalLearningGmbH/MATH-lighteval": ("\\frac{7}{2}", HALF["solution"]),
    "HuggingFaceH4/MATH-500": ("2", "We get $\\boxed{2}$."),
    "AI-MO/NuminaMath-CoT": ("9", "\\[3^2 = \\boxed{9}\\]"),
    "meta-math/MetaMathQA": ("6", "He pays 2 * 3 = 6."),
    "zwhe99/DeepMath-103K": ("0", "It falls below any bound, so \\boxed{0}."),
    "open-r1/OpenR1-Math-220k": ("4", "Divide by 2: $x = 4$."),
}
SUBSETS = {
    "openai/gsm8k": ("main", "socratic"),
    "EleutherAI/hendrycks_math": ("algebra", "geometry"),
    "DigitalLearningGmbH/MATH-lighteval": ("default", "algebra"),
    "open-r1/OpenR1-Math-220k": ("all", "default", "extended"),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder per dataset, laid out as on the Hub, in place of the Hub."""
    for name, row in ROWS.items():
        folder, config = tmp_path / name, ""
        folder.mkdir(parents=True)
        for subset in SUBSETS.get(name, ("",)):
            split = "test" if name.endswith("MATH-500") else "train"
            (folder / subset).mkdir(exist_ok=True)
            if name.startswith(("meta-math", "HuggingFaceH4")):  # these two are JSON files
                lines = [row] if split == "train" else row
                (folder / f"{split}.json").write_text(json.dumps(lines) + "\n")
            else:
                path = folder / subset / f"{split}-00000-of-00001.parquet"
                datasets.Dataset.from_list([row]).to_parquet(path)
            if subset:
                files = f"  - split: train\n    path: {subset}/train-*\n"
                config += f"- config_name: {subset}\n  data_files:\n{files}"
        if config:
            (folder / "README.md").write_text(f"---\nconfigs:\n{config}---\n")
    real = datasets.load_dataset

    def load_dataset(name, *arguments, **options):
        return real(str(tmp_path / name), *arguments, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def load(name, **more) -> list[Problem]:
    return load_problems(Source(source=name, **more))


@pytest.mark.parametrize("name", ROWS)
def test_hub_datasets_are_read_by_name(hub, name):
    subsets = SUBSETS.get(name, ("default",))
    more = {} if "default" in subsets else {"subset": subsets[0]}
    (problem,) = load(name, **more, **({"split": "test"} if name.endswith("MATH-500") else {}))
    row = ROWS[name]
    assert problem.question == (row.get("question") or row.get("problem") or row.get("query"))
    assert (problem.answer, problem.solution) == WANTED[name]
    assert problem.id == row.get("unique_id", problem.id)


def test_missing_subset_and_split_errors_list_those_that_exist(hub):
    for given in ({}, {"subset": "algebra"}):
        with raises(DataError, r"openai/gsm8k .*\['main', 'socratic'\]", hint="--set problems.subset=main"):
            load("openai/gsm8k", **given)
    with raises(DataError, r"MATH-500 .*train.* \['test'\]", hint="problems.split"):
        load("HuggingFaceH4/MATH-500")


UNREACHABLE = ConnectionError("Couldn't reach 'some/set'\nmore")
GATED = datasets.exceptions.DatasetNotFoundError("Dataset 'some/set' is a gated dataset on the Hub.")


@pytest.mark.parametrize(
    ("raised", "kind", "message", "hint"),
    [
        (UNREACHABLE, NetworkError, "some/set cannot be reached", "JSONL"),
        (OSError(28, "No space left on device"), DataError, "No space left", ""),
        (GATED, DataError, "is a gated dataset", "hf auth login"),
    ],
    ids=["unreachable", "full disk", "gated"],
)
def test_what_fails_has_its_own_remedy(monkeypatch, raised, kind, message, hint):
    def load_dataset(*arguments, **options):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with raises(kind, message, hint=hint):
        load("some/set")


def test_unknown_columns_refer_to_the_settings_of_their_section(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"q": "1 + 1?", "a": "2"}\n')
    for section in ("problems", "eval"):
        with pytest.raises(DataError) as error:
            load_problems(Source(source=str(path)), key=f"{section}.source")
        assert f"--set {section}.question_column=NAME and {section}.answer_column=NAME" in error.value.hint

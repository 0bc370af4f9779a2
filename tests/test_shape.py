"""The shape of the code (DESIGN): imports point down, importing is fast, functions are few and long, names are unique."""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import typer

from sclite import config, prompts, settings
from sclite.cli import app

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "sclite").rglob("*.py"))
NAMES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
FILES = {name.removesuffix(".__init__"): path for name, path in zip(NAMES, SOURCES, strict=True)}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef

LAYERS = {
    "sclite.__main__": 11,
    "sclite.cli": 10,
    "sclite.commands": 9,
    **dict.fromkeys(("sclite.quickstart.flow", "sclite.options", "sclite.forecast"), 8),
    "sclite.pipeline": 7,
    **dict.fromkeys(("sclite.evaluation", "sclite.exports", "sclite.inspect"), 6),
    **dict.fromkeys(("sclite.context", "sclite.doctor"), 5),
    **dict.fromkeys(("sclite.data", "sclite.train", "sclite.export", "sclite.evaluate"), 4),
    **dict.fromkeys(("sclite.chat", "sclite.quickstart"), 4),
    "sclite.student.endpoint": 4,  # a student made of a teacher's client; stages get it as an argument, like any other
    **dict.fromkeys(("sclite.teacher", "sclite.student"), 3),
    "sclite.run": 2,
}
"""Modules and packages from the top; every other module is part of the method's vocabulary and at the bottom."""
BOTTOM = 1
HEAVY = "torch transformers trl peft unsloth litellm openai httpx datasets llama_cpp math_verify sympy matplotlib".split()  # noqa: SIM905


def part(module: str) -> str:
    """The entry of LAYERS that a module belongs to, else the module itself."""
    while module not in LAYERS and module.count(".") > 1:
        module = module.rpartition(".")[0]
    return module


def layer(module: str) -> int:
    return LAYERS.get(part(module), BOTTOM)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it is; `from a import b` gives a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in FILES else node.module


# -- layers --------------------------------------------------------------------------------------------------------


def upward(importer: str, imported: str) -> bool:
    """Whether this import points up, or sideways from one stage into another."""
    if imported == "sclite" or part(importer) == part(imported):
        return False
    if layer(importer) == layer(imported) == BOTTOM:
        return False
    return layer(importer) <= layer(imported)


def test_imports_point_down():
    wrong = [
        f"{FILES[module].relative_to(ROOT)}:{line} imports {name}"
        for module, tree in TREES.items()
        for line, name in imports(tree)
        if name.split(".")[0] == "sclite" and upward(module, name)
    ]
    assert wrong == []


def test_the_layer_check_distinguishes_up_from_down():
    up = """data.pairs:train.sft student.self_correction:data.pairs student.self_correction:teacher.client trace:run
        data.attempts:student.endpoint pipeline:cli quickstart.tutor:quickstart.flow"""
    down = """data.pairs:data.attempts data.pairs:student.self_correction student.endpoint:teacher.client
        quickstart.flow:quickstart.tutor"""
    for expected, pairs in ((True, up), (False, down)):
        for importer, imported in (pair.split(":") for pair in pairs.split()):
            assert upward(f"sclite.{importer}", f"sclite.{imported}") == expected, (importer, imported)


def test_modules_at_the_bottom_have_no_import_cycle():
    """Modules at the bottom may use one another, in one direction."""
    bottom = {module for module in FILES if layer(module) == BOTTOM and module != "sclite"}
    graph = {module: bottom & {name for _, name in imports(TREES[module])} for module in bottom}
    while graph:
        free = [module for module, needed in graph.items() if not needed & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for module in free:
            del graph[module]


def test_importing_any_module_loads_nothing_heavy():
    code = (
        "import importlib, sys\n"
        f"heavy, seen = {HEAVY!r}, set()\n"
        f"for module in {sorted(FILES)!r}:\n"
        "    importlib.import_module(module)\n"
        "    found = {name for name in heavy if name in sys.modules} - seen\n"
        "    seen |= found\n"
        "    if found: print(module, 'loads', *sorted(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_help_imports_neither_pydantic_nor_rich():
    code = "import sys, sclite.__main__, sclite.cli; print({'pydantic', 'rich', 'numpy', 'jinja2'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


# -- size and names ------------------------------------------------------------------------------------------------

MOST_LINES, LEAST_MEAN_LENGTH, MOST_CALLED_ONCE = 18_220, 15.0, 129
PRIVATE_ELSEWHERE = {"student/llama_cpp/test_engine.py _step"}
"""Private names that another module may use."""


def test_functions_are_few_and_long():
    """Many functions of a few lines, each called once, are harder to read than the code inline."""
    functions, words = [], Counter()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTION):
                functions.append(node)
            elif isinstance(node, ast.Name | ast.Attribute):
                words[node.id if isinstance(node, ast.Name) else node.attr] += 1
    mean = sum(node.end_lineno - node.lineno + 1 for node in functions) / len(functions)
    rare = [node for node in functions if words[node.name] == 1 and not node.decorator_list]
    called_once = [node.name for node in rare if not node.name.startswith("__")]
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in FILES.values())
    assert lines <= MOST_LINES
    assert mean >= LEAST_MEAN_LENGTH
    assert len(called_once) <= MOST_CALLED_ONCE


def test_no_two_modules_and_no_two_public_functions_share_a_name():
    """The commands have the names that users type."""
    modules = Counter(path.stem for path in FILES.values() if path.stem != "__init__")
    trees = [tree for module, tree in TREES.items() if not module.startswith("sclite.commands")]
    named = [node.name for tree in trees for node in tree.body if isinstance(node, FUNCTION)]
    functions = Counter(name for name in named if not name.startswith("_"))
    assert [name for name, count in modules.items() if count > 1] == []
    assert [name for name, count in functions.items() if count > 1] == []


def test_private_names_are_used_in_their_own_module_only():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")}
    trees |= {FILES[module]: tree for module, tree in TREES.items()}
    private, defined, used = re.compile("_[a-zA-Z].*(?<!_)$").match, defaultdict(set), set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            name = getattr(node, "name", getattr(node, "id", getattr(node, "attr", "")))
            if not isinstance(name, str) or not private(name):
                continue
            if isinstance(node, FUNCTION | ast.ClassDef) or isinstance(getattr(node, "ctx", None), ast.Store):
                defined[name].add(path)
            if isinstance(node, ast.alias | ast.Attribute):
                used.add((path, name))
    folders = (ROOT / "tests", ROOT / "sclite")
    wrong = {
        f"{path.relative_to(folders[folders[1] in path.parents])} {name}"
        for path, name in used
        if path not in defined[name] and any(folders[1] in other.parents for other in defined[name])
    }
    assert wrong - PRIVATE_ELSEWHERE == set()


# -- documentation -------------------------------------------------------------------------------------------------

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])


def command_lines(text: str) -> list[str]:
    """Every `sclite ..` in a code block or between backticks."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.S | re.M)
    spans = re.findall(r"`(sclite [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [m[1] for line in lines for m in re.finditer(r"(?:^|[$/&;] ?)(sclite [^&;|#<\n]+)", line)]
    return [line.strip() for line in [*found, *spans]]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_command_line_in_the_documentation_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no sclite.toml, no run
    group = typer.main.get_command(app)
    for line in command_lines(page.read_text(encoding="utf-8")):
        _, name, *arguments = shlex.split(line)
        if name.startswith("-") or name == "..":
            continue
        assert name in group.commands, f"no such command: {line}"
        if "--help" in arguments or ".." in arguments:
            continue
        try:
            given = group.commands[name].make_context(name, list(arguments)).params
        except Exception as error:  # noqa: BLE001 - the parser's own error classes belong to no public module
            pytest.fail(f"{line}: {type(error).__name__}: {error}")
        settings.load(None, given.get("settings") or [], {})


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_setting_in_the_documentation_exists(page):
    known = set(config.keys())
    sections = "|".join({key.partition(".")[0] for key in known if "." in key})
    named = re.findall(rf"`((?:{sections})\.[a-z]\w*)(?:=[^`]*)?`", page.read_text(encoding="utf-8"))
    assert {key for key in named if not key.endswith((".jsonl", ".yaml", ".py"))} <= known


def test_command_lines_are_found_in_code_blocks_and_backticks():
    text = "Say `sclite eval F --limit 5`.\n```sh\n$ sclite a b # why\nx && .venv/bin/sclite c\nsclite d \\\n  --e\n```\n"
    assert command_lines(text) == ["sclite a b", "sclite c", "sclite d    --e", "sclite eval F --limit 5"]


def test_every_command_takes_the_four_common_options_and_at_most_six_more():
    common = {"--run", "--config", "--set", "--json"}
    for name, command in typer.main.get_command(app).commands.items():
        options = {option for p in command.params for option in p.opts if option.startswith("--")}
        assert len(options - common - {"--help"}) <= 6, name
        assert common <= options or name in ("doctor", "init", "runs"), name


# -- what is shipped -----------------------------------------------------------------------------------------------


def third_party(tree: ast.AST) -> set[str]:
    names = {name.split(".")[0] for _, name in imports(tree)}
    return names - set(sys.stdlib_module_names) - {"sclite"}


def test_every_third_party_import_is_declared():
    project = PYPROJECT["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted}
    known = packages_distributions()
    plain = lambda name: {d.lower().replace("_", "-") for d in known.get(name, [name])}  # noqa: E731
    found = {(module, name) for module, tree in TREES.items() for name in third_party(tree)}
    assert [(module, name) for module, name in found if not plain(name) & declared] == []


def test_every_prompt_is_a_file_that_the_wheel_includes():
    shipped = {path.stem: path.read_text(encoding="utf-8").strip() for path in (ROOT / "prompts").iterdir()}
    assert shipped
    assert all(shipped.values())
    assert prompts.SHIPPED == ROOT / "prompts"
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["sclite"]
    assert wheel["force-include"]["prompts"] == "sclite/_prompts"


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no git checkout")
def test_nothing_that_is_shipped_is_ignored_by_git():
    """Hatchling leaves out what .gitignore lists."""
    shipped = [p for top in ("sclite", "prompts") for p in (ROOT / top).rglob("*") if p.is_file()]
    names = "\n".join(str(p.relative_to(ROOT)) for p in shipped if "__pycache__" not in p.parts)
    asked = ["git", "check-ignore", "--stdin", "--no-index"]
    done = subprocess.run(asked, cwd=ROOT, input=names, capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed")
def test_the_wheel_contains_every_prompt_and_data_file(tmp_path):
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    subprocess.run([*wheel, ROOT], check=True, capture_output=True)
    held = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert {f"sclite/_prompts/{path.name}" for path in prompts.SHIPPED.iterdir()} <= held
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "sclite").rglob("*") if p.is_file()}
    assert {name for name in data if "__pycache__" not in name} <= held


# -- style ---------------------------------------------------------------------------------------------------------

PRINTS = {"sclite.console", "sclite.progress", "sclite.__main__"}


def test_only_console_and_progress_print():
    wrong = []
    for module in TREES.keys() - PRINTS:
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                elsewhere = any(k.arg == "file" and isinstance(k.value, ast.Name) for k in node.keywords)
                wrong += [] if elsewhere else [f"{module}:{node.lineno} print"]
            stream = isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")
            if stream and isinstance(node.value, ast.Name) and node.value.id == "sys":
                wrong.append(f"{module}:{node.lineno}")
    assert wrong == []


def test_nobody_swallows_every_exception():
    """`except Exception` is allowed only if it re-raises."""
    wrong = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                every = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                again = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
                wrong += [f"{module}:{node.lineno}"] if every and not again else []
    assert wrong == []


def test_no_pattern_has_a_possessive_group():
    """Python 3.11.2, which is Debian 12's, never matches some of them; an atomic group says the same."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
    assert [name for name, text in texts.items() if re.search(r"\)[*+?]\+", text)] == []


def test_every_module_says_what_it_is_and_none_imports_click():
    assert [m for m, tree in TREES.items() if FILES[m].stat().st_size and not ast.get_docstring(tree)] == []
    assert [m for m, tree in TREES.items() if "click" in third_party(tree)] == []

"""The recipes: each loads without an unknown key and fits on its GPU; the README has the right commands and figures."""

import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from sclite.cli import app
from sclite.config import keys
from sclite.inspect.plan import STAGES
from sclite.settings import load
from sclite.train.memory import choose, estimate, wanted_setting
from tests.train.architectures import RECIPES, recipe_architecture

FOLDER = Path(__file__).resolve().parents[2] / "examples/recipes"
FREE = 22_800_000_000
"""Free bytes of a 24 GB GPU that also drives a desktop."""


def load_recipe(name: str):
    return load(FOLDER / f"{name}.toml", [], {})


def test_each_architecture_has_a_recipe_whose_figures_are_in_the_readme():
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(RECIPES)
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([\w.-]+)\.toml` \|[^|]+\| ([\d.]+ \| [\d.]+) \|$", text, re.M))
    for name in RECIPES:
        one = [replace(wanted_setting(load_recipe(name), stage), micro_batch=1) for stage in ("sft", "dpo")]
        figures = [f"{estimate(recipe_architecture(name), setting).total / 1e9:.1f}" for setting in one]
        assert table[name] == " | ".join(figures)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_loads_and_has_no_unknown_key(name):
    config = load_recipe(name)
    assert config.run == f"runs/{name}"
    assert config.student.model
    tree = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    sections = {name: value for name, value in tree.items() if isinstance(value, dict)}
    used = {f"{name}.{key}" for name, section in sections.items() for key in section}
    assert used | (tree.keys() - sections.keys()) <= set(keys())


@pytest.mark.parametrize("name", RECIPES)
def test_each_stage_of_a_recipe_fits_on_a_24_gb_gpu_and_into_the_positions(name):
    config, found = load_recipe(name), recipe_architecture(name)
    lengths = (config.sft.max_length, config.dpo.max_length, config.export.num_ctx, config.eval.context)
    assert max(lengths) <= RECIPES[name]["max_position_embeddings"]
    assert config.lora.r <= config.lora.lora_alpha <= 2 * config.lora.r
    for stage in STAGES:
        for backend in ("unsloth", "plain"):
            two = replace(wanted_setting(config, stage, backend), micro_batch=2)
            chosen = choose(found, two, 16, FREE)
            assert (chosen.fits, chosen.setting) == (True, two), f"{stage}, {backend}: {chosen.verdict}"


def test_every_command_in_the_recipes_parses_and_its_recipe_exists():
    group = typer.main.get_command(app)
    files = [*FOLDER.glob("*.toml"), FOLDER / "README.md"]
    commands = [m for path in files for m in re.findall(r"^#? *(sclite .+)$", path.read_text(), re.M)]
    assert len(commands) == 3 + 2 * len(RECIPES)
    for line in commands:
        _, name, *arguments = shlex.split(line)
        context = group.commands[name].make_context(name, list(arguments))
        assert (FOLDER.parents[1] / context.params["config"]).is_file(), line

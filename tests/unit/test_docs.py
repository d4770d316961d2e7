"""The pages describe what is there: snippets run, names are documented, papers are listed, links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import matplotlib
import pytest
import torch
import tyro
from matplotlib import pyplot

import grpo_core
from drivers.convert_dataset import ConvertConfig
from drivers.make_countdown import CountdownConfig
from drivers.make_gym import GymConfig
from drivers.pass_rates import PassRatesConfig
from drivers.report import ReportConfig
from drivers.settings.command_line import parse
from drivers.settings.evaluate import EvaluateConfig
from drivers.sweeps.plan import SweepConfig, parse_program_flags, plan
from drivers.sweeps.presets import SWEEPS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTED_BY_THEIR_FILE = (ROOT / "docs/api.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_of_a_page_run(page):
    """The Python blocks of a page, one after the other; a block that shows an error shows the one it raises."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        shown = re.search(r"^# (\w+Error): .*?'(\w+)'", block, flags=re.MULTILINE)
        if shown:
            with pytest.raises(Exception, match=shown[2]) as raised:
                exec(compile(block, str(page), "exec"), names)
            assert type(raised.value).__name__ == shown[1]
        else:
            exec(compile(block, str(page), "exec"), names)


@pytest.mark.slow
def test_the_notebook_runs_and_its_policy_learns(monkeypatch):
    """Cell by cell, without Jupyter. As it is stored it has been run, and shows nothing but results."""
    matplotlib.use("agg")
    monkeypatch.setattr(pyplot, "show", lambda: None)
    cells = json.loads((ROOT / "docs/tutorials/grpo.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert all(
        output["output_type"] in ("execute_result", "display_data") for cell in code for output in cell["outputs"]
    )
    names: dict = {}
    with torch.random.fork_rng():
        for cell in code:
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    pyplot.close(names["figure"])
    for history in names["runs"]["as in GRPO"]:
        assert history[0]["reward"] < 0.2
        assert sum(row["reward"] for row in history[-10:]) > 9.5


@pytest.mark.parametrize("name", grpo_core.__all__)
def test_a_public_name_stands_in_the_reference(name):
    value = getattr(grpo_core, name)
    module = getattr(value, "__module__", "grpo_core.types")
    module = module if module.startswith("grpo_core.") else "grpo_core.types"
    assert f"::: {module}\n" in DOCUMENTED_BY_THEIR_FILE + "\n"


def test_papers_of_docstrings_are_listed():
    listed = (ROOT / "docs/papers.md").read_text()
    cited = {
        number
        for file in (ROOT / "grpo_core").glob("*.py")
        for number in re.findall(r"arXiv:(\d{4}\.\d{5})", file.read_text())
    }
    assert cited
    assert not {number for number in cited if number not in listed}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (page.parent / target).exists(), target


def test_the_verbs_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    verbs = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert {"train", "test"} <= verbs
    assert all(re.search(rf"^{verb}:", makefile, flags=re.MULTILINE) for verb in verbs)


def commands_of(page):
    """The command lines in bash blocks, continued lines joined and comments left out, and in tables."""
    in_tables = re.findall(r"^\|.*?`(drivers/\w+\.py [^`]+)` *\|", page.read_text(), flags=re.MULTILINE)
    for block in (*re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL), *in_tables):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("$MODEL", "m"), comments=True)
            programs = [k for k, word in enumerate(words) if word.startswith("drivers/") and word.endswith(".py")]
            if programs:
                yield words[programs[0]].removeprefix("drivers/").removesuffix(".py"), words[programs[0] + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_are_understood(page, capsys):
    """By the program itself, as far as it goes without a model: each flag is there, each value can be."""
    for program, arguments in commands_of(page):
        assert (ROOT / f"drivers/{program}.py").exists(), program
        if {"--help", "--list"} & set(arguments):
            continue
        match program:
            case "train" | "sft" | "expert_iteration":
                parse_program_flags(program, arguments)
            case "evaluate":
                parse(EvaluateConfig, arguments, EvaluateConfig())
            case "sweep":
                config, shared = tyro.cli(SweepConfig, args=arguments, return_unknown_args=True)
                assert plan(config, shared)
            case "report":
                tyro.cli(ReportConfig, args=arguments)
            case "convert_dataset":
                tyro.cli(ConvertConfig, args=arguments)
            case "make_countdown":
                tyro.cli(CountdownConfig, args=arguments)
            case "make_gym":
                tyro.cli(GymConfig, args=arguments)
            case "pass_rates":
                tyro.cli(PassRatesConfig, args=arguments)


def test_commands_in_tables_are_looked_at_too():
    found = [arguments[0] for program, arguments in commands_of(ROOT / "docs/tutorials/experiments.md")]
    assert set(found) >= set(SWEEPS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_is_left_to_be_written(page):
    assert not re.findall(r"^[A-Z]{5,}$|\bTODO\b|\bFIXME\b", page.read_text(), flags=re.MULTILINE)


def test_every_verb_that_a_page_names_exists():
    verbs = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL))
        assert set(re.findall(r"^make ([a-z]+)", blocks, flags=re.MULTILINE)) <= verbs

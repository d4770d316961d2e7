"""Pages match the code: snippets run, public names are documented, papers are listed, and links resolve."""

import inspect
import json
import re
import shlex
from pathlib import Path

import griffe
import matplotlib
import pytest
import torch
import tyro
from matplotlib import pyplot

import grpo_core
import grpo_core.testing
from drivers.convert_dataset import ConvertConfig
from drivers.make_task import Task
from drivers.pass_rates import PassRatesConfig
from drivers.report import ReportConfig
from drivers.settings.of_run import parse_evaluate_config
from drivers.sweeps.plan import SweepConfig, parse_program_flags, plan
from drivers.sweeps.presets import SWEEPS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTED_BY_THEIR_FILE = (ROOT / "docs/api.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_snippets_run(page):
    """The Python blocks of a page run in order; a block that shows an error must raise it."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        shown = re.search(r"^# (\w+Error): ((?:.|\n# )*)", block, flags=re.MULTILINE)
        if shown:
            with pytest.raises(Exception, match=re.escape(shown[2].replace("\n# ", " "))) as raised:
                exec(compile(block, str(page), "exec"), names)
            assert type(raised.value).__name__ == shown[1]
        else:
            exec(compile(block, str(page), "exec"), names)


@pytest.mark.slow
def test_notebook_runs_and_learns(monkeypatch):
    """The cells run without Jupyter, variants for a few steps. The stored notebook shows results and no errors."""
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
            source = "".join(cell["source"])
            for variant in ("cliprange=1e9)", "normalize_by_std=False)"):
                source = source.replace(f"train(seed, {variant}", f"train(seed, {variant[:-1]}, n_steps=5)")
            exec(compile(source, cell["id"], "exec"), names)
    pyplot.close(names["figure"])
    lengths = {name: {len(history) for history in histories} for name, histories in names["runs"].items()}
    assert lengths == {"as in GRPO": {120}, "without the clip": {5}, "without the deviation": {5}}
    for history in names["runs"]["as in GRPO"]:
        assert history[0]["reward"] < 0.2
        assert sum(row["reward"] for row in history[-10:]) > 9.5


@pytest.mark.parametrize("name", grpo_core.__all__)
def test_reference_names_every_public_name(name):
    value = getattr(grpo_core, name)
    module = getattr(value, "__module__", "grpo_core.types")
    module = module if module.startswith("grpo_core.") else "grpo_core.types"
    assert f"::: {module}\n" in DOCUMENTED_BY_THEIR_FILE + "\n"


def draw_functions_page():
    """Return docs/functions.md: every public function in the order of the API page and of its file."""
    lines = [
        "# Functions",
        "",
        "Every public function of `grpo_core`, with the first line of its docstring. The [API](api.md) has the rest:",
        "arguments, results, errors and examples.",
    ]
    values = [*vars(grpo_core).values(), grpo_core.testing.check_objective, grpo_core.testing.check_advantage]
    functions = [value for value in values if inspect.isfunction(value)]
    for heading, module in re.findall(r"^## (.*)|^::: (.*)", DOCUMENTED_BY_THEIR_FILE, flags=re.MULTILINE):
        of_module = [function for function in functions if function.__module__ == module]
        of_module.sort(key=lambda function: inspect.unwrap(function).__code__.co_firstlineno)
        if heading:
            lines += ["", f"## {heading.partition(',')[0]}"]
        elif of_module:
            lines += ["", f"`{module.replace('.', '/')}.py`", ""]
            lines += [f"- `{function.__name__}`: {function.__doc__.splitlines()[0]}" for function in of_module]
    return "\n".join(lines) + "\n"


def test_functions_page_has_every_public_function():
    page = draw_functions_page()
    assert set(re.findall(r"^- `(\w+)`", page, flags=re.MULTILINE)) == {
        *(name for name in grpo_core.__all__ if inspect.isfunction(getattr(grpo_core, name))),
        *("check_objective", "check_advantage"),
    }
    assert (ROOT / "docs/functions.md").read_text() == page, f"write this to docs/functions.md:\n{page}"


@pytest.mark.parametrize(
    "name", [name for name in grpo_core.__all__ if ">>>" in (getattr(grpo_core, name).__doc__ or "")]
)
def test_docstring_examples_are_read_as_code(name):
    """The docs builder shows `>>>` as code in a section that it knows, and as running text anywhere else."""
    sections = griffe.Docstring(inspect.getdoc(getattr(grpo_core, name))).parse("google")
    (examples,) = [section for section in sections if section.kind is griffe.DocstringSectionKind.examples]
    kinds = [kind for kind, _ in examples.value]
    assert griffe.DocstringSectionKind.examples in kinds
    elsewhere = [str(section.value) for section in sections if section is not examples]
    elsewhere += [text for kind, text in examples.value if kind is griffe.DocstringSectionKind.text]
    assert not any(">>>" in text for text in elsewhere)


def test_papers_page_lists_papers_of_docstrings():
    listed = (ROOT / "docs/papers.md").read_text()
    cited = {
        number
        for file in (ROOT / "grpo_core").rglob("*.py")
        for number in re.findall(r"arXiv:(\d{4}\.\d{5})", file.read_text())
    }
    assert cited
    assert not {number for number in cited if number not in listed}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_local_links_exist(page):
    prose = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (page.parent / target).exists(), target


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    verbs = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert {"train", "test"} <= verbs
    assert all(re.search(rf"^{verb}:", makefile, flags=re.MULTILINE) for verb in verbs)


def commands_of(page):
    """Return the command lines of bash blocks, with continued lines joined and without comments, and of tables."""
    in_tables = re.findall(r"^\|.*?`(drivers/\w+\.py [^`]+)` *\|", page.read_text(), flags=re.MULTILINE)
    for block in (*re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL), *in_tables):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("$MODEL", "m"), comments=True)
            programs = [k for k, word in enumerate(words) if word.startswith("drivers/") and word.endswith(".py")]
            if programs:
                yield words[programs[0]].removeprefix("drivers/").removesuffix(".py"), words[programs[0] + 1 :]


@pytest.mark.medium
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_commands_are_valid(page, capsys):
    """The program itself parses each flag and value."""
    for program, arguments in commands_of(page):
        assert (ROOT / f"drivers/{program}.py").exists(), program
        if {"--help", "--list"} & set(arguments):
            continue
        match program:
            case "train" | "sft" | "expert_iteration":
                parse_program_flags(program, arguments)
            case "evaluate":
                parse_evaluate_config(arguments)
            case "sweep":
                config, shared = tyro.cli(SweepConfig, args=arguments, return_unknown_args=True)
                assert plan(config, shared)
            case "report":
                tyro.cli(ReportConfig, args=arguments)
            case "convert_dataset":
                tyro.cli(ConvertConfig, args=arguments)
            case "make_task":
                tyro.cli(Task, args=arguments)
            case "pass_rates":
                tyro.cli(PassRatesConfig, args=arguments)


def test_page_commands_in_tables_are_found():
    found = [arguments[0] for program, arguments in commands_of(ROOT / "docs/tutorials/experiments.md")]
    assert set(found) >= set(SWEEPS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_have_no_placeholders(page):
    assert not re.findall(r"^[A-Z]{5,}$|\bTODO\b|\bFIXME\b", page.read_text(), flags=re.MULTILINE)


def test_page_make_targets_exist():
    verbs = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL))
        assert set(re.findall(r"^make ([a-z]+)", blocks, flags=re.MULTILINE)) <= verbs


def test_troubleshooting_quotes_messages_of_the_programs():
    page = (
        (ROOT / "docs/troubleshooting.md").read_text().partition("## The run does not start")[2].partition("\n## ")[0]
    )
    symptoms = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ") and "symptom" not in line]
    quoted = [part for text in symptoms for quote in re.findall(r"`([^`]+)`", text) for part in quote.split(" ... ")]
    source = "".join(path.read_text() for path in (ROOT / "drivers").rglob("*.py"))
    assert len(quoted) >= 5
    assert [part for part in quoted if part not in source] == []

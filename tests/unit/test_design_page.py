"""The table of folders in docs/design.md is drawn from the imports of the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/design.md"
# From the lowest layer to the highest; folders of one layer do not import each other.
LAYERS = (
    ("common",),
    ("settings", "tasks", "reports"),
    ("policy", "grading", "sweeps"),
    ("engines",),
    ("runs",),
    ("evaluation",),
    ("training",),
)
PROGRAMS = "programs"


def folder_of(module: str) -> str:
    """Return the folder of a module of drivers; the modules at the top are the programs."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (ROOT / "drivers" / parts[-1]).is_dir() else PROGRAMS


def imported_modules(path: Path) -> set[str]:
    """Return the modules of drivers that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = ROOT / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = submodule.with_suffix(".py").exists() or submodule.is_dir()
                modules.add(f"{node.module}.{alias.name}" if is_module else str(node.module))
    return {module for module in modules if module.startswith("drivers.")}


def files_of(folder: str) -> list[Path]:
    """Return the Python files of a folder without its `__init__.py`."""
    parent = ROOT / "drivers" if folder == PROGRAMS else ROOT / "drivers" / folder
    return sorted(path for path in parent.glob("*.py") if path.name != "__init__.py")


def folders_imported_by(folder: str) -> list[str]:
    """Return the other folders that a folder imports, from the lowest layer to the highest."""
    found = {folder_of(module) for path in files_of(folder) for module in imported_modules(path)} - {folder}
    return [name for layer in LAYERS for name in layer if name in found] + [PROGRAMS] * (PROGRAMS in found)


def purpose_of(folder: str) -> str:
    """Return the docstring of a folder."""
    text = ast.get_docstring(ast.parse((ROOT / "drivers" / folder / "__init__.py").read_text()))
    assert text, f"drivers/{folder}/__init__.py needs a docstring"
    return text.partition("\n")[0].removesuffix(".")


def draw_table() -> str:
    """Draw the table of folders, the highest layer first."""
    rows = ["| folder | what it holds | imports |", "|---|---|---|"]
    programs = ", ".join(f"`{path.stem}`" for path in files_of(PROGRAMS))
    rows.append(f"| `drivers/*.py` | The programs: {programs} | {', '.join(folders_imported_by(PROGRAMS))} |")
    for layer in reversed(LAYERS):
        rows += [f"| `{name}` | {purpose_of(name)} | {', '.join(folders_imported_by(name))} |" for name in layer]
    return "\n".join(rows)


def test_design_page_has_the_table_drawn_from_the_imports():
    (table,) = re.findall(r"<!-- folders of drivers -->\n(.*?)\n<!-- end -->", PAGE.read_text(), flags=re.DOTALL)
    assert table == draw_table(), f"paste this into docs/design.md:\n{draw_table()}"


def test_layers_name_every_folder():
    assert sorted(name for layer in LAYERS for name in layer) == sorted(
        path.name for path in (ROOT / "drivers").iterdir() if (path / "__init__.py").exists()
    )


@pytest.mark.parametrize("folder", [name for layer in LAYERS for name in layer])
def test_folder_imports_lower_layers_only(folder):
    level = next(i for i, layer in enumerate(LAYERS) if folder in layer)
    lower = {name for layer in LAYERS[:level] for name in layer}
    assert set(folders_imported_by(folder)) <= lower


@pytest.mark.parametrize("path", files_of(PROGRAMS), ids=lambda path: path.stem)
def test_program_imports_no_program(path):
    assert PROGRAMS not in {folder_of(module) for module in imported_modules(path)}

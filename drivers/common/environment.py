"""Environment variables that must be set before torch and vLLM are imported; importing this module sets them.

A variable that the caller has set keeps its value.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

DEFAULTS = {
    # On a few cores the OpenMP pools of torch and vLLM spin against each other: 3-8 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Spinning for a few microseconds before sleeping costs other threads nothing and saves a fifth of the time.
    "GOMP_SPINCOUNT": "3000",
    # No library sends usage statistics during a run.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # vLLM would give up after 10 minutes; --engine-deadline-s decides.
    "VLLM_ENGINE_READY_TIMEOUT_S": str(7 * 24 * 3600),
    "TOKENIZERS_PARALLELISM": "false",
    # Keep the progress bars and banners of libraries off the screen, which shows the run's own lines.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "WANDB_SILENT": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}


for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)


# vLLM logs before it reads its log level and warns about its use of torch. Its processes import the program that
# started them, so this silences them too.
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")

# `python drivers/train.py` puts drivers/ first on the path, where evaluate.py would shadow the package `evaluate`.
_drivers = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _drivers]

"""Environment variables that must stand before torch and vLLM are imported; importing this module sets them.

Each is only a default: what the caller's environment says wins.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

DEFAULTS = {
    # On a few cores the OpenMP pools of torch and vLLM spin against each other: 3-8 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Waiting a few microseconds before sleeping costs nobody anything and saves a fifth of the time on free cores.
    "GOMP_SPINCOUNT": "3000",
    # A model or data set is a local path or was fetched on purpose; nothing phones home in the middle of a run.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    # A screen for the run's own lines: no progress bars and banners of libraries.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "WANDB_SILENT": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}


for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)


# vLLM speaks before it has read its level, and of what is between it and torch; in its own processes too, which import
# the program that started them.
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")

# `python drivers/train.py` puts this folder first on the path, where `evaluate` or `data` would hide such packages.
_here = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _here]

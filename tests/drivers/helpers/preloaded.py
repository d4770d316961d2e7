"""Import what programs import, early or late, for a process that they are forked from."""

import os
import warnings
from contextlib import suppress

with suppress(ImportError):
    import setproctitle

    setproctitle.getproctitle()  # it looks for the title of the process once, beside the environment of its start

from drivers.engines.supervision import TRAINER

# This process is no engine, even if the test process has started one: an engine ends with its trainer.
os.environ.pop(TRAINER, None)

import transformers.generation.utils
import transformers.models.llama.modeling_llama  # noqa: F401

import tests.drivers.helpers.rank_process
import tests.drivers.helpers.struck_program  # noqa: F401

with warnings.catch_warnings(), suppress(ImportError):
    warnings.simplefilter("ignore")
    import drivers.engines.vllm  # noqa: F401  takes five seconds

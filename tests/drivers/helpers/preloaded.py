"""Import what programs import, early or late, for a process that they are forked from."""

import transformers.generation.utils
import transformers.models.llama.modeling_llama  # noqa: F401

import tests.drivers.helpers.rank_process
import tests.drivers.helpers.struck_program  # noqa: F401

"""Import what a run imports late, for a process that ranks are forked from."""

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch.distributed.checkpoint.hf_storage
import torch.distributed.tensor
import torch.utils.tensorboard  # noqa: F401
import transformers.generation.utils
import transformers.models.llama.modeling_llama  # noqa: F401

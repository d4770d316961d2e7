"""Values of flags that `grpo_core` defines too: written again, because `--help` must not wait for torch."""

from typing import Literal

Aggregation = Literal["sequence_mean", "token_mean", "prompt_mean", "sequence_sum", "constant"]
Counting = Literal["count", "drop"]
KLEstimator = Literal["k1", "k2", "k3", "abs", "ratio_k3"]
Divergence = Literal["binary_kl", "total_variation", "k2", "k3"]
ImportanceLevel = Literal["token", "sequence", "geometric"]

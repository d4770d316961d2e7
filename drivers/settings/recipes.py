"""Recipes: named settings as plain data. A flag overrides its recipe."""

from typing import TYPE_CHECKING, Any, Literal

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
"""Model whose weights come with the environment; --model-path accepts this name, a folder or a hub name."""
QUICKSTART: dict[str, Any] = {
    "model_path": EMBEDDED_MODEL,
    "data_path": "data/wordadd/train.jsonl",
    "val_data_path": ("data/wordadd/validation.jsonl",),
    "prompt_path": "data/prompts/wordadd.prompt",
    "n_grpo_steps": 15,
    "learning_rate": 3e-5,
    "rollout_batch_size": 64,
    "train_batch_size": 64,
    "micro_batch_tokens": 1024,
    "sampling_min_tokens": 0,
    "sampling_max_tokens": 32,
    "n_val_examples": 256,
}
"""A task for a laptop. It runs without a model and a recipe, and is the base of any recipe without a model."""
CLIP = {"loss_type": "grpo_clip", "cliprange": 0.2}
RATIO_TO_SAMPLER = {"aggregation": "token_mean", "old_policy": "sampler", "sampling_min_tokens": 0}
"""A minimum length would bias ratios to the sampler, because it hides the end token there."""
RECIPES: dict[str, dict[str, Any]] = {
    "quickstart": {},
    # Papers: each changes what the paper changes; model, data, rates and batches stay those of the base.
    "grpo": {**CLIP, "kl_coef": 0.04},
    "dr-grpo": {**CLIP, "use_std_normalization": False, "aggregation": "constant"},
    "dapo": {
        **CLIP,
        "cliprange_high": 0.28,
        "aggregation": "token_mean",
        "length_penalty": "soft_overlong",
        "max_refills": 4,
    },
    "gspo": {"loss_type": "gspo", "cliprange": 3e-4, "cliprange_high": 4e-4},
    "gspo-token": {"loss_type": "gspo_token", "cliprange": 3e-4, "cliprange_high": 4e-4},
    "gmpo": {"loss_type": "gmpo", "cliprange": 0.4},
    "luspo": {"loss_type": "luspo", "cliprange": 2e-3, "cliprange_high": 2.5e-3},
    "cispo": {"loss_type": "cispo", "aggregation": "token_mean"},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo", **RATIO_TO_SAMPLER},
    "dppo-tv": {"loss_type": "dppo_tv", **RATIO_TO_SAMPLER},
    "dppo-kl": {"loss_type": "dppo_kl", "cliprange": 0.05, **RATIO_TO_SAMPLER},
    "m2po": {"loss_type": "grpo_no_clip", "second_moment_threshold": 0.04, **RATIO_TO_SAMPLER},
    "clip-cov": {"loss_type": "clip_cov", "cliprange": 0.2, "aggregation": "token_mean"},
    "kl-cov": {"loss_type": "kl_cov", "aggregation": "token_mean"},
    "rloo": {"advantage": "leave_one_out", "aggregation": "sequence_sum"},
    "reinforce-plus-plus": {
        **CLIP,
        "advantage": "reinforce_plus_plus",
        "aggregation": "token_mean",
        "kl_coef": 0.01,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    "reinforce-plus-plus-baseline": {**CLIP, "advantage": "reinforce_plus_plus_baseline", "aggregation": "token_mean"},
    "lite-ppo": {**CLIP, "advantage": "batch_std", "advantage_eps": 1e-4, "aggregation": "token_mean"},
    "gdpo": {**CLIP, "advantage": "gdpo", "advantage_eps": 1e-4},
    "opo": {"advantage": "opo", "aggregation": "token_mean"},
    "gpg": {"advantage": "gpg", "aggregation": "token_mean"},
    "maxrl": {"advantage": "maxrl", "aggregation": "sequence_sum"},
    "remax": {"advantage": "remax", "aggregation": "sequence_sum"},
    "pass-at-k": {**CLIP, "advantage": "pass_at_k", "pass_k": 4, "aggregation": "token_mean"},
    "pkpo": {"advantage": "pkpo", "pass_k": 4, "aggregation": "sequence_sum"},
    "entropy": {"entropy_coef": 0.005, "entropy_target": 0.2},
    # Programs: their default objective and learning rate; group sizes, batches and lengths stay those of the base.
    # docs/parity.md lists what cannot be set.
    "cs336": {"learning_rate": 1e-5, "loss_type": "reinforce_with_baseline", "aggregation": "sequence_mean"},
    "cs336-2026": {  # the edition of 2026 has its own model, data and sizes
        "model_path": "allenai/OLMo-2-0425-1B",
        "data_path": "data/gsm8k/train-6400.jsonl",
        "val_data_path": ("data/gsm8k/test.jsonl",),
        "n_grpo_steps": 200,
        "learning_rate": 1e-5,
        "rollout_batch_size": 256,
        "train_batch_size": 256,
        "group_size": 8,
        "gradient_accumulation_steps": 32,
        "sampling_min_tokens": 0,
        "sampling_max_tokens": 512,
        "n_val_examples": 1024,
        "eval_steps": 10,
    },
    "trl-default": {
        **CLIP,
        "sampling_min_tokens": 0,
        "learning_rate": 1e-6,
        "advantage_eps": 1e-4,
        "aggregation": "token_mean",
        "importance": "mask",
        "importance_level": "sequence",
        "importance_high": 3.0,
    },
    "verl-default": {**CLIP, "learning_rate": 1e-6, "dual_clip": 3.0, "aggregation": "token_mean"},
}


if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = Literal[tuple(RECIPES)]
"""The choices of --recipe."""

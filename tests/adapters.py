"""Adapters for the official tests of CS336 assignment 5, edition 2025: each is a function of grpo_core.

Copy this file over `tests/adapters.py` of the course's repository. docs/tutorials/cs336.md explains both editions.
"""

import grpo_core

run_tokenize_prompt_and_output = grpo_core.tokenize_prompt_and_output
run_compute_group_normalized_rewards = grpo_core.compute_group_normalized_rewards
run_compute_entropy = grpo_core.compute_entropy
run_get_response_log_probs = grpo_core.get_response_log_probs
run_compute_naive_policy_gradient_loss = grpo_core.compute_naive_policy_gradient_loss
run_compute_grpo_clip_loss = grpo_core.compute_grpo_clip_loss
run_compute_policy_gradient_loss = grpo_core.compute_policy_gradient_loss
run_masked_mean = grpo_core.masked_mean
run_masked_normalize = grpo_core.masked_normalize
run_sft_microbatch_train_step = grpo_core.sft_microbatch_train_step
run_grpo_microbatch_train_step = grpo_core.grpo_microbatch_train_step

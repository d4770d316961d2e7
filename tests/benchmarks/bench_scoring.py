"""One group through a model of the quickstart's size, forward and backward: group row, padded rows, and full logits.

`python tests/benchmarks/bench_scoring.py`. Random weights; medians of interleaved repeats; times as ratios to the
group row of the same run.
"""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import platform
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drivers.policy.devices import cpu_bfloat16_is_fast
from grpo_core import get_group_log_probs, get_response_log_probs

PROMPT, RESPONSES, TOKENS, REPEATS = 137, 8, 26, 5


def make_policy(dtype):
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def group_row(policy, prompt, responses):
    return get_group_log_probs(policy, prompt, responses, return_token_entropy=True, detach_entropy=True)["log_probs"]


def padded_rows(policy, prompt, responses):
    rows = torch.tensor([[*prompt, *response] for response in responses])
    mask = (torch.arange(1, rows.shape[1]) >= len(prompt)).expand(len(rows), -1)
    options = {"response_mask": mask, "return_token_entropy": True, "detach_entropy": True}
    scored = get_response_log_probs(policy, rows[:, :-1], rows[:, 1:], **options)
    return scored["log_probs"][:, len(prompt) - 1 :]


def full_logits(policy, prompt, responses):
    """Logits at every position, the prompt's too: the plain loop of the assignment."""
    rows = torch.tensor([[*prompt, *response] for response in responses])
    scored = get_response_log_probs(policy, rows[:, :-1], rows[:, 1:], return_token_entropy=True)
    return scored["log_probs"][:, len(prompt) - 1 :]


def main(_: list[str] | None = None):
    dtype = torch.bfloat16 if cpu_bfloat16_is_fast() else torch.float32
    policy = make_policy(dtype)
    tokens = torch.randint(3, 49152, (PROMPT + RESPONSES * TOKENS,)).tolist()
    prompt, rest = tokens[:PROMPT], tokens[PROMPT:]
    responses = [rest[k * TOKENS : (k + 1) * TOKENS] for k in range(RESPONSES)]
    seconds = {way: [] for way in (group_row, padded_rows, full_logits)}
    for repeat in range(REPEATS + 1):
        for way, times in seconds.items():
            begin = time.perf_counter()
            (-way(policy, prompt, responses).mean()).backward()
            if repeat:  # the first round warms up
                times.append(time.perf_counter() - begin)
            policy.zero_grad()
    medians = {way.__name__: statistics.median(times) for way, times in seconds.items()}
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {dtype}")
    print(f"prompt of {PROMPT} tokens, {RESPONSES} responses of {TOKENS}, forward and backward, median of {REPEATS}")
    for name, median in medians.items():
        print(f"{name:12} {median:6.2f} s   {median / medians['group_row']:5.2f} x group_row")


if __name__ == "__main__":
    main()

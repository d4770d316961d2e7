"""GRPO in one file: a language model of 135 million parameters learns to add, by trial and error.

    .venv/bin/python docs/examples/minimal_grpo.py

The reward of a step, the share of correct responses, rises from about 0.1 to 0.8 within some minutes on a CPU.
`make train` solves the same task faster, and unpacks the model into ~/.cache/grpo_core. This file uses that copy if
it exists. Otherwise it downloads the model from the Hugging Face hub. `--model` takes any folder or name of the hub.

One step of GRPO (Shao et al. 2024, arXiv:2402.03300):
1. Draw P questions and write a prompt for each.                                    main
2. Sample G responses to each prompt from the policy: the model that learns.        sample
3. Grade each response: reward 1 if its answer is right, else 0.                    r1_zero_reward_fn
4. Compare each response with its group, the G responses to the same prompt:
   advantage = (reward - mean of the group) / standard deviation of the group.      normalize_group_rewards
5. Compute the log-prob of each sampled token under the policy, with gradients.     get_group_log_probs
6. Compute the loss: it makes tokens more likely where the advantage is positive.   grpo_microbatch_loss
7. Update the policy with the gradients of all groups.                              train_step
There is no value network: the mean of the group is the baseline. There is no reward model: a function grades.

Shapes in the comments:
    P  prompts in a step        N = P * G  responses in a step; the G responses to a prompt are neighbors
    G  responses per prompt     T  tokens of the longest response; shorter ones are padded on the right
    L  prompt tokens            V  tokens in the vocabulary
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

from grpo_core import get_group_log_probs, grpo_microbatch_loss, normalize_group_rewards, r1_zero_reward_fn

DATA = Path(__file__).resolve().parents[2] / "data"
UNPACKED = Path("~/.cache/grpo_core/SmolLM2-135M-Instruct").expanduser()
STOP = "</answer>"


class Response(NamedTuple):
    token_ids: list[int]  # as sampled, the end token included; tokenizing the text again may give other tokens
    log_probs: torch.Tensor  # (T,) of each sampled token, under the policy that sampled it
    text: str


@torch.no_grad()
def sample(policy, tokenizer, prompts: list[str], group_size: int, max_tokens: int) -> list[Response]:
    """Sample `group_size` responses to each prompt."""
    # Every row is continued at its right end, so padding goes to the left.
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(policy.device)  # (P, L)
    # Sample from the policy itself: with top-k, top-p or another temperature, log-probs would be of another policy.
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        stop_strings=[STOP],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    input_ids, attended = inputs["input_ids"], inputs["attention_mask"]
    # Run each prompt once, up to its last token, and copy its keys and values for the G responses.
    cache = DynamicCache(config=policy.config)
    positions = (attended.cumsum(dim=1) - 1).clamp(min=0)  # (P, L) padding has no position
    known = {"attention_mask": attended[:, :-1], "position_ids": positions[:, :-1], "past_key_values": cache}
    policy.base_model(input_ids[:, :-1], **known)
    cache.batch_repeat_interleave(group_size)
    input_ids, attended = (tensor.repeat_interleave(group_size, dim=0) for tensor in (input_ids, attended))  # (N, L)
    keywords = {"attention_mask": attended, "past_key_values": cache, "tokenizer": tokenizer}
    output = policy.generate(input_ids, generation_config=config, **keywords)
    sampled = output.sequences[:, input_ids.shape[1] :]  # (N, L + T) -> (N, T)
    scores = torch.stack(output.scores, dim=1)  # (N, T, V), in float32
    log_probs = scores.log_softmax(-1).gather(-1, sampled[:, :, None])[:, :, 0]  # (N, T)
    responses = []
    for token_ids, row in zip(sampled.tolist(), log_probs, strict=True):
        n = count_response_tokens(tokenizer, token_ids)
        text = tokenizer.decode(token_ids[:n], skip_special_tokens=True)
        responses.append(Response(token_ids[:n], row[:n], text))
    return responses


def count_response_tokens(tokenizer, token_ids: list[int]) -> int:
    """Return the length of the response in a padded row, the end token or stop string included.

    A token alone does not show whether it is padding, because the end token serves as padding too.
    """
    for n in range(1, len(token_ids) + 1):
        if token_ids[n - 1] == tokenizer.eos_token_id or STOP in tokenizer.decode(token_ids[:n]):
            return n
    return len(token_ids)  # truncated at the token limit


def grade(response: Response, example: dict) -> float:
    return r1_zero_reward_fn(response.text, example["answer"])["reward"]


def train_step(policy, tokenizer, optimizer, examples: list[dict], args) -> dict[str, float]:
    """Take one step of GRPO on P examples and return its metrics."""
    size = args.group_size
    responses = sample(policy, tokenizer, [example["prompt"] for example in examples], size, args.max_tokens)  # N
    rewards = torch.tensor([grade(response, examples[n // size]) for n, response in enumerate(responses)])  # (N,)
    advantages = normalize_group_rewards(rewards, size)  # (N,)

    losses, ratios = [], []
    for p, example in enumerate(examples):  # one group at a time saves memory; the gradients of the groups add up
        rows = slice(p * size, (p + 1) * size)
        if not advantages[rows].any():
            continue  # all rewards of the group are equal: its gradient is zero
        group = responses[rows]
        prompt_ids = tokenizer(example["prompt"])["input_ids"]
        log_probs = get_group_log_probs(policy, prompt_ids, [response.token_ids for response in group])["log_probs"]
        old_log_probs = pad_sequence([response.log_probs for response in group], batch_first=True)  # (G, T)
        mask = pad_sequence([torch.ones_like(response.log_probs) for response in group], batch_first=True).bool()
        # The clipped objective limits how far several updates on one batch move the policy. This file makes one
        # update per batch, so each ratio exp(log_probs - old_log_probs) is 1 and its gradient is that of log_probs.
        loss, _ = grpo_microbatch_loss(
            log_probs,  # (G, T)
            mask,  # (G, T)
            gradient_accumulation_steps=len(examples),  # divides by P, so that the sum over groups is a mean
            loss_type="grpo_clip",
            advantages=advantages[rows, None].to(log_probs.device),  # (G, 1): one for all tokens of a response
            old_log_probs=old_log_probs,
            cliprange=0.2,
        )
        loss.backward()
        losses.append(loss.item())
        ratios.append((log_probs.detach() - old_log_probs).exp()[mask].mean().item())

    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm=1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return {
        "reward": rewards.mean().item(),
        "signal": len(losses) / len(examples),  # the share of the groups that teach something
        "ratio": sum(ratios) / max(1, len(ratios)),  # must be 1: otherwise the two log-probs are not of one policy
        "loss": sum(losses),  # near 0 in every step, as the advantages of a group sum to 0: it shows no progress
        "grad_norm": grad_norm,
    }


def evaluate(policy, tokenizer, examples: list[dict], args) -> float:
    """Return the accuracy of one sampled response to each question."""
    rewards = []
    for start in range(0, len(examples), 64):
        batch = examples[start : start + 64]
        responses = sample(policy, tokenizer, [example["prompt"] for example in batch], 1, args.max_tokens)
        rewards += map(grade, responses, batch)
    return sum(rewards) / len(rewards)


def load_examples(file: str) -> list[dict]:
    """Return question, answer and prompt of each line of a data file."""
    template = (DATA / "prompts/wordadd.prompt").read_text().removesuffix("\n")
    examples = [json.loads(line) for line in (DATA / "wordadd" / file).read_text().splitlines()]
    return [example | {"prompt": template.replace("{question}", example["question"])} for example in examples]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GRPO in one file: a small language model learns to add.")
    parser.add_argument("--model", default=str(UNPACKED) if UNPACKED.exists() else f"HuggingFaceTB/{UNPACKED.name}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--prompts-per-step", type=int, default=8, help="P")
    parser.add_argument("--group-size", type=int, default=8, help="G")
    parser.add_argument("--max-tokens", type=int, default=32, help="token limit of a response")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--eval-questions", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    train_set, held_out = load_examples("train.jsonl"), load_examples("validation.jsonl")[: args.eval_questions]
    print(f"step 0: held-out accuracy {evaluate(policy, tokenizer, held_out, args):.3f}", flush=True)
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        examples = draw.sample(train_set, args.prompts_per_step)  # P
        metrics = train_step(policy, tokenizer, optimizer, examples, args)
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"step {step}: {numbers}  {time.perf_counter() - start:.1f} s", flush=True)
        if step % 5 == 0 or step == args.steps:
            print(f"step {step}: held-out accuracy {evaluate(policy, tokenizer, held_out, args):.3f}", flush=True)
    return policy


if __name__ == "__main__":
    main(parse_arguments())

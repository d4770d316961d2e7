"""The small functions, beside the same in plain torch and in TRL, verl and Liger where these have one of their own.

`python -m tests.benchmarks losses`; in .venv-parity the others run too. TRL and verl put most formulas inside larger
functions: those cells stay empty. The whole step of a micro-batch is there for all, each with its own metrics.
"""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import argparse
import functools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.benchmarks._harness import describe, digits, make_table, measure

PLAIN, OURS = "torch", "ours"
GROUP, CLIPRANGE = 8, 0.2
BLOCK_SECONDS = 0.01
# Two results of one case may differ by rounding, and by the constants that a library adds to a denominator.
TOLERANCE = 1e-3


@dataclass
class Inputs:
    policy: Tensor  # batch seq, in nats, like the next two
    old: Tensor
    reference: Tensor
    mask: Tensor  # batch seq
    advantages: Tensor  # batch 1
    rewards: Tensor  # batch
    narrow: Tensor  # responses tokens vocab, `batch` distributions in all
    wide: Tensor
    labels: Tensor  # responses tokens

    @property
    def leaves(self) -> list[Tensor]:
        return [self.policy, self.narrow, self.wide]


def make_inputs(batch: int, seq: int, narrow: int, wide: int) -> Inputs:
    """Ragged responses; no ratio is beyond verl's second clip, and none close to the first."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    policy = -0.1 - 3 * draw(batch, seq)
    away = torch.where(draw(batch, seq) < 0.05, 0.4, 0.15 * draw(batch, seq))
    tokens = (GROUP, batch // GROUP)
    return Inputs(
        policy=policy.requires_grad_(),
        old=policy.detach() + away * (draw(batch, seq) - 0.5).sign(),
        reference=policy.detach() + draw(batch, seq) - 0.5,
        mask=torch.arange(seq) < seq * (1 / 3 + 2 / 3 * draw(batch, 1)),
        advantages=draw(batch, 1) * 2 - 1,
        rewards=(draw(batch) * 2).round(),
        narrow=(draw(*tokens, narrow) * 10).requires_grad_(),
        wide=(draw(*tokens, wide) * 10).requires_grad_(),
        labels=(draw(*tokens) * wide).long(),
    )


def torch_cases(given: Inputs) -> dict:
    """Return the cases written in plain torch, for the result alone."""
    mask, count, seq = given.mask, given.mask.sum(), given.mask.shape[1]

    def loss():
        ratio = (given.policy - given.old).exp()
        clipped = ratio.clamp(1 - CLIPRANGE, 1 + CLIPRANGE)
        return -torch.min(ratio * given.advantages, clipped * given.advantages), ratio

    def step():
        losses, ratio = loss()
        with torch.no_grad():
            low = (ratio < 1 - CLIPRANGE) & (given.advantages < 0)
            high = (ratio > 1 + CLIPRANGE) & (given.advantages > 0)
            log_ratio = given.policy - given.old
            for metric in (low, high, low | high, ratio, ratio - 1 - log_ratio):
                (metric * mask).sum() / count
        return _sequence_mean(losses, mask)

    def advantages():
        groups = given.rewards.view(-1, GROUP)
        centered = groups - groups.mean(dim=1, keepdim=True)
        return (centered / (groups.std(dim=1, keepdim=True) + 1e-6)).flatten()

    def entropy(logits):
        log_probs = logits.log_softmax(dim=-1)
        return -(log_probs.exp() * log_probs).sum(dim=-1)

    def k3():
        x = given.reference - given.policy
        return x.exp() - x - 1

    return {
        "masked mean": lambda: (given.policy * mask).sum() / mask.sum(),
        "masked mean of rows": lambda: (given.policy * mask).sum(dim=1) / mask.sum(dim=1),
        "masked sum of rows over a constant": lambda: (given.policy * mask).sum(dim=1) / seq,
        "group advantages": advantages,
        "clip loss of tokens": lambda: loss()[0],
        "sequence mean of losses": lambda: _sequence_mean(given.policy, mask),
        "clip step with metrics": step,
        "k3 of tokens": k3,
        "importance ratios of tokens": lambda: (given.old - given.reference).exp() * mask,
        "entropy, narrow": lambda: entropy(given.narrow),
        "entropy, wide": lambda: entropy(given.wide),
        "label's log-prob, wide": lambda: (
            given.wide.log_softmax(dim=-1).gather(-1, given.labels.unsqueeze(-1)).squeeze(-1)
        ),
    }


def _sequence_mean(losses: Tensor, mask: Tensor) -> Tensor:
    return ((losses * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def trl_cases(given: Inputs) -> dict:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    from tests.parity.peers import trl_trainer

    trainer = trl_trainer("grpo", loss_type="grpo")
    prompt = torch.ones(len(given.mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones_like(given.mask, dtype=torch.long),
        "completion_mask": given.mask.long(),
        "advantages": given.advantages.squeeze(1),
        "old_per_token_logps": given.old,
        "num_items_in_batch": given.mask.sum(),
    }

    def model(**_):
        return SimpleNamespace(log_probs=given.policy, entropy=given.reference)

    return {
        "clip step with metrics": lambda: trainer._compute_loss(model, inputs),
        "entropy, narrow": lambda: entropy_from_logits(given.narrow),
        "entropy, wide": lambda: entropy_from_logits(given.wide),
        "label's log-prob, wide": lambda: selective_log_softmax(given.wide, given.labels),
    }


def verl_cases(given: Inputs) -> dict:
    import verl.utils.torch_functional as functional
    from verl.trainer.ppo import core_algos

    from tests.parity.peers import verl_config

    config, index = verl_config(), torch.arange(len(given.rewards)).div(GROUP, rounding_mode="floor").numpy()
    clip = core_algos.get_policy_loss_fn("vanilla")
    # The faster of its two: "grpo" loops over the responses.
    estimate = core_algos.get_adv_estimator_fn("grpo_vectorized")
    rewards, ones = given.rewards[:, None], torch.ones_like(given.rewards[:, None])
    advantages = given.advantages.expand(given.mask.shape)
    seq, mode = given.mask.shape[1], "seq-mean-token-mean"
    return {
        "masked mean": lambda: functional.masked_mean(given.policy, given.mask),
        "masked mean of rows": lambda: functional.masked_mean(given.policy, given.mask, axis=1),
        "masked sum of rows over a constant": lambda: functional.masked_sum(given.policy, given.mask, axis=1) / seq,
        "group advantages": lambda: estimate(rewards, ones, index)[0],
        "sequence mean of losses": lambda: core_algos.agg_loss(given.policy, given.mask, mode),
        "clip step with metrics": lambda: clip(given.old, given.policy, advantages, given.mask, mode, config)[0],
        "k3 of tokens": lambda: core_algos.kl_penalty(given.policy, given.reference, "k3"),
        "entropy, narrow": lambda: functional.entropy_from_logits(given.narrow),
        "entropy, wide": lambda: functional.entropy_from_logits(given.wide),
        "label's log-prob, wide": lambda: functional.logprobs_from_logits(given.wide, given.labels),
    }


def liger_cases(given: Inputs) -> dict:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction, k3_loss_fn

    mask, advantages = given.mask.long(), given.advantages.squeeze(1)
    options = {"old_per_token_logps": given.old, "beta": 0.0, "loss_type": "grpo"}
    clip = LigerFusedLinearGRPOFunction.ppo_loss_fn
    return {
        "clip step with metrics": lambda: clip(given.policy, mask, advantages, mask, **options)[0],
        "k3 of tokens": lambda: k3_loss_fn(given.reference, given.policy),
    }


def our_cases(given: Inputs) -> dict:
    import grpo_core

    seq = given.mask.shape[1]
    clip = {"advantages": given.advantages, "old_log_probs": given.old, "cliprange": CLIPRANGE}

    def aggregate():
        weights = grpo_core.compute_token_weights(given.mask, "sequence_mean")
        return grpo_core.sum_weighted_losses(given.policy, weights)

    return {
        "masked mean": lambda: grpo_core.masked_mean(given.policy, given.mask),
        "masked mean of rows": lambda: grpo_core.masked_mean(given.policy, given.mask, dim=1),
        "masked sum of rows over a constant": lambda: grpo_core.masked_normalize(given.policy, given.mask, seq, dim=1),
        "group advantages": lambda: grpo_core.normalize_group_rewards(given.rewards, GROUP),
        "clip loss of tokens": lambda: grpo_core.compute_grpo_clip_loss(policy_log_probs=given.policy, **clip)[0],
        "sequence mean of losses": lambda: grpo_core.aggregate_token_losses(given.policy, given.mask, "sequence_mean"),
        "clip step with metrics": lambda: grpo_core.grpo_microbatch_loss(
            given.policy, given.mask, 1, "grpo_clip", **clip
        )[0],
        "k3 of tokens": lambda: grpo_core.estimate_kl(given.policy, given.reference, "k3"),
        "importance ratios of tokens": lambda: grpo_core.compute_importance_ratios(
            given.old, given.reference, given.mask, "token"
        ),
        "entropy, narrow": lambda: grpo_core.compute_entropy(given.narrow),
        "entropy, wide": lambda: grpo_core.compute_entropy(given.wide),
        "label's log-prob, wide": lambda: grpo_core.select_log_probs(given.wide, given.labels),
    }


COLUMNS = {PLAIN: torch_cases, "TRL": trl_cases, "verl": verl_cases, "Liger": liger_cases, OURS: our_cases}
BACKWARD = " + backward"


def build(column: str, *, sizes: tuple[int, ...]):
    given = make_inputs(*sizes)
    cases = COLUMNS[column](given)

    def forward(case):
        with torch.no_grad():
            return [case()]

    def backward(case):
        """All gradients, which are taken away again."""
        case().sum().backward()
        gradients = [leaf.grad for leaf in given.leaves if leaf.grad is not None]
        for leaf in given.leaves:
            leaf.grad = None
        return gradients

    calls = {}
    for name, case in cases.items():
        calls[name] = functools.partial(forward, case)
        if case().requires_grad:
            calls[name + BACKWARD] = functools.partial(backward, case)

    def check():
        """One number for each result and each gradient, the same for all who compute the same."""
        return {name: sum(float(part.double().square().sum()) for part in call()) for name, call in calls.items()}

    return calls, check


def main(arguments: list[str]) -> dict[str, str]:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks losses", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256, help="rows; a multiple of the group size, 8")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--narrow", type=int, default=1024, help="the smaller vocabulary")
    parser.add_argument("--wide", type=int, default=49152, help="the larger one")
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args(arguments)
    sizes = (chosen.batch, chosen.seq, chosen.narrow, chosen.wide)
    measured = measure(__spec__.name, list(COLUMNS), {"sizes": sizes}, rounds=chosen.rounds, block=BLOCK_SECONDS)
    _require_agreement({column: way.facts for column, way in measured.items()})
    facts = (
        "cpu, float32",
        f"[{chosen.batch}, {chosen.seq}] tokens, {chosen.batch} distributions over {chosen.narrow} (narrow) or"
        f" {chosen.wide} (wide) tokens",
        f"microseconds, median of {chosen.rounds} interleaved blocks of at least {1000 * BLOCK_SECONDS:.0f} ms",
    )
    rows = []
    for case in measured[PLAIN].results:
        micro = {column: 1e6 * way.results[case].median for column, way in measured.items() if case in way.results}
        fastest = min(value for column, value in micro.items() if column != OURS)
        cells = [digits(micro[column]) if column in micro else "-" for column in measured]
        rows.append([case, *cells, f"{micro[OURS] / fastest:.2f}"])
    header = ["function", *measured, "ours / fastest other"]
    table = f"{describe('cpu', *facts)}\n\n{make_table(header, rows)}"
    print(f"\n{table}")
    return {"losses": table}


def _require_agreement(facts: dict[str, dict[str, float]]) -> None:
    """Raise a ValueError if a peer computes something else."""
    for column, numbers in facts.items():
        for case, number in numbers.items():
            expected = facts[PLAIN][case]
            if not abs(number - expected) <= TOLERANCE * abs(expected):
                raise ValueError(f"{case}: {column} has {number}, {PLAIN} {expected}")

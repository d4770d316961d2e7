"""The table of docs/parity.md: each member of the family beside its counterpart in TRL, verl or Liger.

A row that is not equal gives a reason, and `changed` is our call with that one change: it must equal theirs, or the
reason is wrong. No row states whether it is equal; `measure` decides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import grpo_core as g
from tests.parity import peers
from tests.parity.cases import Case, draw

TOLERANCE = 1e-6
SEEDS = range(12)
VOCABULARY_TEMPERATURE = 0.7
LENGTHS, LONGEST, BUFFER = [3, 8, 9, 11, 12, 15, 20], 12, 4


@dataclass(frozen=True)
class Row:
    """One comparison. Both sides take a case; if they return a scalar loss, its gradient is compared as well."""

    member: str
    peer: str
    setting: str
    ours: Callable[[Case], Tensor]
    theirs: Callable[[Case], Tensor]
    because: str = ""
    changed: Callable[[Case], Tensor] | None = None
    ragged: bool = True

    @property
    def name(self) -> str:
        return f"{self.member} / {self.peer} {self.setting}"


class Measured(NamedTuple):
    value: float  # largest difference, over the largest value of theirs
    gradient: float | None
    factors: tuple[float, float] | None  # min and max, if theirs is a multiple of ours in every batch
    explained: bool  # whether `changed` equals theirs

    @property
    def verdict(self) -> str:
        worst = max(self.value, self.gradient or 0.0)
        if worst <= TOLERANCE:
            return "equal"
        if self.factors:
            low, high = self.factors
            if high - low <= TOLERANCE * high:
                return f"equal up to the factor {high:.4g}"
            return f"equal up to a factor per batch, {low:.3g} to {high:.3g}"
        reason = "different" if self.explained else "different, NOT EXPLAINED"
        same_pull = self.gradient is not None and self.gradient <= TOLERANCE
        return f"gradient equal, value {reason}" if same_pull else reason


def measure(row: Row) -> Measured:
    cases = [draw(seed, row.ragged) for seed in SEEDS]
    theirs = [_value_and_gradient(row.theirs, case) for case in cases]
    ours = [_value_and_gradient(row.ours, case) for case in cases]
    value, gradient = _differences(ours, theirs)
    factors = [float((b[-1] * a[-1]).sum() / (a[-1] * a[-1]).sum()) for a, b in zip(ours, theirs, strict=True)]
    scaled = [tuple(c * part for part in a) for a, c in zip(ours, factors, strict=True)]
    # One number is a multiple of any other.
    fits = theirs[0][-1].numel() > 1 and max(x for x in _differences(scaled, theirs) if x is not None) <= TOLERANCE
    explained = False
    if row.changed:
        changed = [_value_and_gradient(row.changed, case) for case in cases]
        explained = max(x for x in _differences(changed, theirs) if x is not None) <= TOLERANCE
    return Measured(value, gradient, (min(factors), max(factors)) if fits else None, explained)


def _value_and_gradient(function: Callable[[Case], Tensor], case: Case) -> tuple[Tensor, ...]:
    value = function(case)
    if not value.requires_grad:
        return (value.double(),)
    (gradient,) = torch.autograd.grad(value, case.policy)
    return value.detach().double(), gradient


def _differences(ours: list[tuple[Tensor, ...]], theirs: list[tuple[Tensor, ...]]) -> tuple[float, float | None]:
    parts = [
        max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
        / max(float(b.abs().max()) for b in right)
        for left, right in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    return parts[0], parts[1] if len(parts) > 1 else None


# Helpers from a loss per token to a number


def tokens(case: Case) -> float:
    return float(case.mask.sum())


def mean(case: Case, losses: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean over the tokens of the batch, times a correction for the sampler."""
    token_weights = g.compute_token_weights(case.mask, "token_mean")
    return g.sum_weighted_losses(losses, token_weights if weights is None else token_weights * weights)


def mean_of_means(case: Case, losses: Tensor) -> Tensor:
    return g.sum_weighted_losses(losses, g.compute_token_weights(case.mask, "sequence_mean"))


def clip(case: Case, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> Tensor:
    return g.compute_grpo_clip_loss(
        case.advantages, case.policy, case.old, low, cliprange_high=high, dual_clip=dual, response_mask=case.mask
    )[0]


def some_missing(rewards: Tensor) -> Tensor:
    """Return the rewards with every fourth one missing, counted over all rewards of all responses."""
    return torch.where((torch.arange(rewards.numel()) % 4 == 1).view(rewards.shape), torch.nan, rewards)


def over_tokens(case: Case, advantages: Tensor) -> Tensor:
    """Return one advantage per token, as verl does."""
    return (advantages[:, None] if advantages.dim() == 1 else advantages) * case.mask


def kappa(case: Case, level: str) -> Tensor:
    return g.compute_importance_ratios(case.old, case.sampler, case.mask, level)


def group_scores(case: Case, eps: float) -> Tensor:
    columns = [g.normalize_group_rewards(c, case.group_sizes, advantage_eps=eps) for c in case.components.T]
    return torch.stack(columns).sum(dim=0)


def truncated(case: Case) -> Tensor:
    return torch.arange(len(case.mask)) % 2 == 0


def without_row(case: Case, row: int = 1) -> Tensor:
    """Return the mask with all tokens of one response masked."""
    return case.mask & (torch.arange(len(case.mask)) != row)[:, None]


def collisions(case: Case) -> Tensor:
    """Return any sums of squared probabilities that the tokens' own probabilities allow."""
    own = case.old.exp()
    return own.square() + 0.5 * (1 - own).square()


def longest_tail(case: Case) -> Tensor:
    """Return the tokens at places that exceed the number of tokens of every other response of the group."""
    rows = []
    for lengths in case.lengths.split(case.group_sizes):
        for index in range(len(lengths)):
            others = torch.cat([lengths[:index], lengths[index + 1 :]])
            rows.append(torch.arange(case.mask.shape[1]) >= (others.max() if lengths[index] > others.max() else 99))
    return torch.stack(rows) & case.mask


def dpo(case: Case, label_smoothing: float = 0.0, sign: float = 1.0) -> Tensor:
    """Return the mean loss of pairs; with `sign` -1, the second half of the responses is the preferred one."""
    pairs = len(case.mask) // 2
    halves = [(x[:pairs], x[pairs : 2 * pairs])[:: int(sign)] for x in (case.policy, case.reference, case.mask)]
    losses, _ = g.compute_dpo_loss(*(half for both in halves for half in both), 0.1, label_smoothing=label_smoothing)
    return losses.mean()


def imitation(case: Case) -> Tensor:
    """Return the mean negative log-likelihood of the tokens of the first half of the responses."""
    first = (torch.arange(len(case.mask)) < len(case.mask) // 2)[:, None]
    losses = g.compute_cross_entropy_loss(case.policy, response_mask=case.mask)
    return g.sum_weighted_losses(losses, g.compute_token_weights(case.mask & first, "token_mean"))


def student_logits(case: Case) -> Tensor:
    """Return logits that depend on the policy, so that their gradient is one of the policy."""
    return case.logits + case.policy[..., None] * torch.linspace(-0.2, 0.2, case.logits.shape[-1])


def teacher_logits(case: Case) -> Tensor:
    return case.logits.flip(-1)


def best_tokens(case: Case, k: int) -> tuple[Tensor, Tensor]:
    """Return the teacher's k largest log-probs of each token, and whose they are."""
    return tuple(teacher_logits(case).log_softmax(dim=-1).topk(k))


def forward_kl_without_tail(case: Case, k: int) -> Tensor:
    log_probs, ids = best_tokens(case, k)
    return (log_probs.exp() * (log_probs - student_logits(case).log_softmax(dim=-1).gather(-1, ids))).sum(dim=-1)


ADVANTAGES = [
    Row(
        "`normalize_group_rewards`, ε 1e-4",
        "TRL",
        '`scale_rewards="group"`',
        lambda c: g.normalize_group_rewards(c.rewards, c.group_sizes, advantage_eps=1e-4),
        lambda c: peers.trl_advantages(c),
        ragged=False,
    ),
    Row(
        "`normalize_group_rewards`",
        "verl",
        "`grpo`",
        lambda c: over_tokens(c, g.normalize_group_rewards(c.rewards, c.group_sizes)),
        lambda c: peers.verl_advantages(c, "grpo"),
    ),
    Row(
        "`normalize_group_rewards`",
        "verl",
        "`grpo_vectorized`",
        lambda c: over_tokens(c, g.normalize_group_rewards(c.rewards, c.group_sizes)),
        lambda c: peers.verl_advantages(c, "grpo_vectorized"),
    ),
    Row(
        "`normalize_group_rewards`, no std",
        "TRL",
        '`scale_rewards="none"`',
        lambda c: g.normalize_group_rewards(c.rewards, c.group_sizes, normalize_by_std=False),
        lambda c: peers.trl_advantages(c, scale_rewards="none"),
        ragged=False,
    ),
    Row(
        "`normalize_group_rewards`, no std",
        "verl",
        "`grpo`, `norm_adv_by_std_in_grpo=False`",
        lambda c: over_tokens(c, g.normalize_group_rewards(c.rewards, c.group_sizes, normalize_by_std=False)),
        lambda c: peers.verl_advantages(c, "grpo", norm_adv_by_std_in_grpo=False),
    ),
    Row(
        "`compute_leave_one_out_advantages`",
        "TRL",
        "`RLOOTrainer`, β 0",
        lambda c: g.compute_leave_one_out_advantages(c.rewards, c.group_sizes),
        lambda c: peers.trl_advantages(c, "rloo"),
        ragged=False,
    ),
    Row(
        "`compute_leave_one_out_advantages` of rewards minus 0.05 k1",
        "TRL",
        "`RLOOTrainer`, β 0.05",
        lambda c: g.compute_leave_one_out_advantages(
            c.rewards - 0.05 * g.estimate_kl(c.old, c.reference, "k1", response_mask=c.mask).sum(dim=1), c.group_sizes
        ),
        lambda c: peers.trl_advantages(c, "rloo", kl_coef=0.05),
        because="its sum of k1 includes tool output, because it has no `env_mask`",
        changed=lambda c: g.compute_leave_one_out_advantages(
            c.rewards
            - 0.05 * g.estimate_kl(c.old, c.reference, "k1", response_mask=peers.attended(c.mask)).sum(dim=1),
            c.group_sizes,
        ),
        ragged=False,
    ),
    Row(
        "`compute_leave_one_out_advantages`",
        "TRL",
        '`GRPOTrainer`, `scale_rewards="none"`',
        lambda c: g.compute_leave_one_out_advantages(c.rewards, c.group_sizes),
        lambda c: peers.trl_advantages(c, scale_rewards="none"),
        because="the centered reward is (G - 1)/G times leave-one-out",
        changed=lambda c: g.compute_leave_one_out_advantages(c.rewards, c.group_sizes) * (1 - 1 / c.group_sizes[0]),
        ragged=False,
    ),
    Row(
        "`compute_leave_one_out_advantages`",
        "verl",
        "`rloo`",
        lambda c: over_tokens(c, g.compute_leave_one_out_advantages(c.rewards, c.group_sizes)),
        lambda c: peers.verl_advantages(c, "rloo"),
    ),
    Row(
        "`compute_leave_one_out_advantages`",
        "verl",
        "`rloo_vectorized`",
        lambda c: over_tokens(c, g.compute_leave_one_out_advantages(c.rewards, c.group_sizes)),
        lambda c: peers.verl_advantages(c, "rloo_vectorized"),
    ),
    Row(
        "`compute_batch_std_advantages`",
        "TRL",
        '`scale_rewards="batch"`',
        lambda c: g.compute_batch_std_advantages(c.rewards, c.group_sizes),
        lambda c: peers.trl_advantages(c, scale_rewards="batch"),
        ragged=False,
    ),
    Row(
        "`compute_gdpo_advantages`",
        "TRL",
        '`multi_objective_aggregation="normalize_then_sum"`',
        lambda c: g.compute_gdpo_advantages(c.components, c.group_sizes),
        lambda c: peers.trl_advantages(c, rewards=c.components, multi_objective_aggregation="normalize_then_sum"),
        ragged=False,
    ),
    Row(
        "`compute_gdpo_advantages`",
        "verl",
        "`gdpo`",
        lambda c: over_tokens(c, g.compute_gdpo_advantages(c.components, c.group_sizes)),
        lambda c: peers.verl_gdpo(c),
        because="verl whitens over tokens instead of responses (ε 1e-8), after dividing by each group's s + 1e-6",
        changed=lambda c: over_tokens(
            c, g.whiten_over_tokens(group_scores(c, 1e-6)[:, None], c.mask, advantage_eps=1e-8)
        ),
    ),
    *(
        Row(
            f"`{function.__name__}`{note}, some rewards missing",
            "TRL",
            setting,
            lambda c, function=function, options=options: function(some_missing(c.rewards), c.group_sizes, **options),
            lambda c, kind=kind: peers.trl_advantages(c, kind, rewards=some_missing(c.rewards)),
            ragged=False,
        )
        for function, options, note, kind, setting in [
            (g.normalize_group_rewards, {"advantage_eps": 1e-4}, ", ε 1e-4", "grpo", '`scale_rewards="group"`'),
            (g.compute_leave_one_out_advantages, {}, "", "rloo", "`RLOOTrainer`, β 0"),
        ]
    ),
    Row(
        "`compute_gdpo_advantages`, some rewards missing",
        "TRL",
        '`multi_objective_aggregation="normalize_then_sum"`',
        lambda c: g.compute_gdpo_advantages(some_missing(c.components), c.group_sizes),
        lambda c: peers.trl_advantages(
            c, rewards=some_missing(c.components), multi_objective_aggregation="normalize_then_sum"
        ),
        ragged=False,
    ),
    Row(
        "`compute_opo_advantages`",
        "verl",
        "`opo`",
        lambda c: over_tokens(c, g.compute_opo_advantages(c.rewards, c.group_sizes, c.lengths)),
        lambda c: peers.verl_advantages(c, "opo"),
    ),
    Row(
        "`compute_otb_advantages`",
        "verl",
        "`optimal_token_baseline`, `handle_zero_tail=False`",
        lambda c: g.compute_otb_advantages(c.rewards, c.group_sizes, c.old, collisions(c), c.mask),
        lambda c: peers.verl_advantages(
            c, "optimal_token_baseline", old_log_probs=c.old, sum_pi_squared=collisions(c), handle_zero_tail=False
        ),
    ),
    Row(
        "`compute_otb_advantages`",
        "verl",
        "`optimal_token_baseline`",
        lambda c: g.compute_otb_advantages(c.rewards, c.group_sizes, c.old, collisions(c), c.mask),
        lambda c: peers.verl_advantages(
            c, "optimal_token_baseline", old_log_probs=c.old, sum_pi_squared=collisions(c)
        ),
        because="where one response is longer than all others, its baseline is 0",
        changed=lambda c: torch.where(
            longest_tail(c),
            c.rewards[:, None],
            g.compute_otb_advantages(c.rewards, c.group_sizes, c.old, collisions(c), c.mask),
        ),
    ),
    Row(
        "`compute_gpg_advantages`",
        "verl",
        "`gpg`",
        lambda c: over_tokens(c, g.compute_gpg_advantages(c.rewards, c.group_sizes)),
        lambda c: peers.verl_advantages(c, "gpg"),
        because="its α counts responses with nonzero reward, not responses in groups with signal",
        changed=lambda c: over_tokens(
            c,
            g.normalize_group_rewards(c.rewards, c.group_sizes, normalize_by_std=False)
            * (len(c.rewards) / c.rewards.count_nonzero()),
        ),
    ),
    Row(
        "`compute_best_of_advantages`",
        "verl",
        "`grpo_passk`, `norm_adv_by_std_in_grpo=False`",
        lambda c: over_tokens(c, g.compute_best_of_advantages(c.rewards, c.group_sizes)),
        lambda c: peers.verl_advantages(c, "grpo_passk", config=peers.AlgoConfig(norm_adv_by_std_in_grpo=False)),
    ),
    Row(
        "`compute_best_of_advantages`",
        "verl",
        "`grpo_passk`",
        lambda c: over_tokens(c, g.compute_best_of_advantages(c.rewards, c.group_sizes)),
        lambda c: peers.verl_advantages(c, "grpo_passk"),
        because="verl divides by the group's s + 1e-6",
        changed=lambda c: over_tokens(
            c,
            torch.cat(
                [
                    g.compute_best_of_advantages(rewards, len(rewards)) / (rewards.std() + 1e-6)
                    for rewards in c.rewards.split(c.group_sizes)
                ]
            ),
        ),
    ),
    Row(
        "`compute_remax_advantages`",
        "verl",
        "`remax`",
        lambda c: over_tokens(c, g.compute_remax_advantages(c.rewards, c.group_sizes, c.greedy_rewards)),
        lambda c: peers.verl_advantages(c, "remax", reward_baselines=c.greedy_rewards[c.groups]),
        because="tool output in a response gets advantage r, but has no loss",
        changed=lambda c: (
            over_tokens(c, g.compute_remax_advantages(c.rewards, c.group_sizes, c.greedy_rewards))
            + c.rewards[:, None] * (peers.attended(c.mask) & ~c.mask)
        ),
    ),
    Row(
        "`whiten_over_tokens` of `compute_reward_to_go`",
        "verl",
        "`reinforce_plus_plus`, γ 0.9",
        lambda c: g.whiten_over_tokens(g.compute_reward_to_go(c.token_rewards, c.mask, discount=0.9), c.mask),
        lambda c: peers.verl_advantages(
            c, "reinforce_plus_plus", token_rewards=c.token_rewards, config=peers.AlgoConfig(gamma=0.9)
        ),
    ),
    Row(
        "`whiten_over_tokens` of centered rewards",
        "verl",
        "`reinforce_plus_plus_baseline`",
        lambda c: over_tokens(
            c,
            g.whiten_over_tokens(
                g.normalize_group_rewards(c.rewards, c.group_sizes, normalize_by_std=False)[:, None], c.mask
            ),
        ),
        lambda c: peers.verl_advantages(c, "reinforce_plus_plus_baseline"),
    ),
]

TOKEN_LOSSES = [
    Row(
        "`compute_naive_policy_gradient_loss`",
        "verl",
        "`gpg`",
        lambda c: mean(c, g.compute_naive_policy_gradient_loss(c.advantages, c.policy, response_mask=c.mask)),
        lambda c: peers.verl_loss(c, "gpg"),
    ),
    Row(
        "`compute_naive_policy_gradient_loss` times truncated π/μ",
        "verl",
        "`bypass_mode`, `reinforce`, token weights up to 2",
        lambda c: mean(
            c,
            g.compute_naive_policy_gradient_loss(c.advantages, c.policy, response_mask=c.mask),
            g.truncate_importance_weights(
                g.compute_importance_ratios(c.policy.detach(), c.old, c.mask, "token"), high=2.0
            ),
        ),
        lambda c: peers.verl_loss(
            c,
            "bypass_mode",
            rollout_correction={"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 2.0},
        ),
    ),
    Row(
        "`compute_grpo_clip_loss`, 0.2/0.28",
        "TRL",
        '`loss_type="dapo"`',
        lambda c: mean(c, clip(c, 0.2, 0.28)),
        lambda c: peers.trl_loss(c, loss_type="dapo", epsilon_high=0.28),
    ),
    Row(
        "`compute_grpo_clip_loss`, 0.2/0.28",
        "Liger",
        '`loss_type="dapo"`',
        lambda c: mean(c, clip(c, 0.2, 0.28)),
        lambda c: peers.liger_loss(c, "dapo", epsilon_high=0.28),
    ),
    Row(
        "`compute_grpo_clip_loss`, 0.2/0.2",
        "verl",
        "`vanilla`",
        lambda c: mean(c, clip(c)),
        lambda c: peers.verl_loss(c, "vanilla"),
        because="dual clip is on by default: `clip_ratio_c=3`",
        changed=lambda c: mean(c, clip(c, dual=3.0)),
    ),
    Row(
        "`compute_grpo_clip_loss`, 0.2/0.28, dual clip 4",
        "TRL",
        '`loss_type="dapo"`, `delta=4`',
        lambda c: mean(c, clip(c, 0.2, 0.28, 4.0)),
        lambda c: peers.trl_loss(c, loss_type="dapo", epsilon_high=0.28, delta=4.0),
    ),
    Row(
        "`compute_grpo_clip_loss`, 0.2/0.28, dual clip 4",
        "verl",
        "`vanilla`, `clip_ratio_c=4`",
        lambda c: mean(c, clip(c, 0.2, 0.28, 4.0)),
        lambda c: peers.verl_loss(c, "vanilla", clip_ratio_high=0.28, clip_ratio_c=4.0),
    ),
    Row(
        "`compute_grpo_no_clip_loss`",
        "TRL",
        '`loss_type="dapo"`, `epsilon=1e9`',
        lambda c: mean(c, g.compute_grpo_no_clip_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.trl_loss(c, loss_type="dapo", epsilon=1e9),
    ),
    Row(
        "`compute_cispo_loss`, ratios 0 to 5",
        "TRL",
        '`loss_type="cispo"`, `epsilon_high=5`',
        lambda c: mean(c, g.compute_cispo_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.trl_loss(c, loss_type="cispo", epsilon_high=5.0),
    ),
    Row(
        "`compute_cispo_loss`, ratios 0 to 5",
        "TRL",
        '`loss_type="cispo"`',
        lambda c: mean(c, g.compute_cispo_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.trl_loss(c, loss_type="cispo"),
        because="`epsilon_high` is the bound itself and defaults to 0.2",
        changed=lambda c: mean(
            c, g.compute_cispo_loss(c.advantages, c.policy, c.old, 0.0, 0.2, response_mask=c.mask)[0]
        ),
    ),
    Row(
        "`compute_cispo_loss`, ratios 0 to 5",
        "Liger",
        '`loss_type="cispo"`, `epsilon_high=5`',
        lambda c: mean(c, g.compute_cispo_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.liger_loss(c, "cispo", epsilon_high=5.0),
    ),
    Row(
        "`compute_cispo_loss`, ratios 0 to 5",
        "verl",
        "`cispo`, `clip_ratio_low=1`, `clip_ratio_high=4`",
        lambda c: mean(c, g.compute_cispo_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.verl_loss(c, "cispo", clip_ratio_low=1.0, clip_ratio_high=4.0),
    ),
    Row(
        "`compute_cispo_loss`, ratios 0 to 5",
        "verl",
        "`cispo`",
        lambda c: mean(c, g.compute_cispo_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.verl_loss(c, "cispo"),
        because="its default bounds are 1 - 0.2 and 1 + 0.2",
        changed=lambda c: mean(
            c, g.compute_cispo_loss(c.advantages, c.policy, c.old, 0.8, 1.2, response_mask=c.mask)[0]
        ),
    ),
    Row(
        "`compute_sapo_loss`",
        "TRL",
        '`loss_type="sapo"`',
        lambda c: mean_of_means(c, g.compute_sapo_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.trl_loss(c, loss_type="sapo"),
    ),
    Row(
        "`compute_sapo_loss`",
        "verl",
        "`sapo`",
        lambda c: mean_of_means(c, g.compute_sapo_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.verl_loss(c, "sapo"),
    ),
    Row(
        "`compute_sapo_loss`",
        "Liger",
        '`loss_type="sapo"`',
        lambda c: mean_of_means(c, g.compute_sapo_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.liger_loss(c, "sapo"),
    ),
    Row(
        "`compute_dppo_tv_loss`",
        "verl",
        "`dppo_tv`, `clip_ratio_c=1e9`",
        lambda c: mean(c, g.compute_dppo_tv_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.verl_loss(c, "dppo_tv", clip_ratio_c=1e9),
        because="verl computes -sg[ρ] A M log p, which has the same gradient",
        changed=lambda c: mean(c, dppo_as_verl(c, g.compute_dppo_tv_loss, (0.2, 0.2), 1e9)),
    ),
    Row(
        "`compute_dppo_tv_loss`",
        "verl",
        "`dppo_tv`",
        lambda c: mean(c, g.compute_dppo_tv_loss(c.advantages, c.policy, c.old, response_mask=c.mask)[0]),
        lambda c: peers.verl_loss(c, "dppo_tv"),
        because="verl computes -sg[min(ρ, 3)] A M log p: `clip_ratio_c` caps the weight",
        changed=lambda c: mean(c, dppo_as_verl(c, g.compute_dppo_tv_loss, (0.2, 0.2), 3.0)),
    ),
    Row(
        "`compute_dppo_kl_loss`, 0.2",
        "verl",
        "`dppo_kl`, `clip_ratio_c=1e9`",
        lambda c: mean(c, g.compute_dppo_kl_loss(c.advantages, c.policy, c.old, 0.2, response_mask=c.mask)[0]),
        lambda c: peers.verl_loss(c, "dppo_kl", clip_ratio_c=1e9),
        because="verl computes -sg[ρ] A M log p, which has the same gradient",
        changed=lambda c: mean(c, dppo_as_verl(c, g.compute_dppo_kl_loss, (0.2,), 1e9)),
    ),
    Row(
        "`compute_dro_loss`, 0.5",
        "verl",
        "`dro`, `dro_beta=0.5`",
        lambda c: mean(c, g.compute_dro_loss(c.advantages, c.policy, c.old, 0.5, response_mask=c.mask)[0]),
        lambda c: peers.verl_loss(c, "dro", dro_beta=0.5),
        because="verl computes -A log p, not -A log ρ, which has the same gradient",
        changed=lambda c: mean(
            c,
            g.compute_dro_loss(c.advantages, c.policy, c.old, 0.5, response_mask=c.mask)[0] - c.advantages * c.old,
        ),
    ),
    Row(
        "`compute_kl_cov_loss`, a tenth penalized by 0.1",
        "verl",
        "`kl_cov`, `kl_cov_ratio=0.1`",
        lambda c: mean(
            c,
            g.compute_kl_cov_loss(
                c.advantages,
                c.policy,
                c.old,
                g.select_high_covariance(c.advantages, c.policy, c.mask, 0.1),
                0.1,
                response_mask=c.mask,
            )[0],
        ),
        lambda c: peers.verl_loss(c, "kl_cov", kl_cov_ratio=0.1),
    ),
    Row(
        "`compute_grpo_clip_loss` without `select_high_covariance` in (0.5, 5)",
        "verl",
        "`clip_cov`, `clip_cov_ratio=1`, `clip_cov_lb=0.5`",
        lambda c: mean(
            c, clip(c), (~g.select_high_covariance(c.advantages, c.policy, c.mask, 1.0, low=0.5, high=5.0)).double()
        ),
        lambda c: peers.verl_loss(c, "clip_cov", clip_cov_ratio=1.0, clip_cov_lb=0.5),
        because="verl never selects clipped tokens: they keep their value and have no gradient",
        changed=lambda c: mean(c, clip(c), (~chosen_by_clip_cov(c)).double()),
    ),
]

SEQUENCE_LOSSES = [
    Row(
        "`compute_gspo_loss`, 0.1/0.15",
        "TRL",
        '`loss_type="grpo"`, `importance_sampling_level="sequence"`',
        lambda c: by_response(c, g.compute_gspo_loss(*whole(c), 0.1, cliprange_high=0.15)[0]),
        lambda c: peers.trl_loss(
            c, loss_type="grpo", importance_sampling_level="sequence", epsilon=0.1, epsilon_high=0.15
        ),
    ),
    Row(
        "`compute_gspo_loss`, 0.1/0.15",
        "TRL",
        '`loss_type="dapo"`, `importance_sampling_level="sequence"`',
        lambda c: by_response(c, g.compute_gspo_loss(*whole(c), 0.1, cliprange_high=0.15)[0]),
        lambda c: peers.trl_loss(
            c, loss_type="dapo", importance_sampling_level="sequence", epsilon=0.1, epsilon_high=0.15
        ),
        because="responses are weighted by length",
        changed=lambda c: (
            g.compute_gspo_loss(*whole(c), 0.1, cliprange_high=0.15)[0][:, 0] * c.lengths / tokens(c)
        ).sum(),
    ),
    Row(
        "`compute_gspo_loss`, 0.1/0.15",
        "verl",
        "`gspo`, `seq-mean-token-mean`",
        lambda c: by_response(c, g.compute_gspo_loss(*whole(c), 0.1, cliprange_high=0.15)[0]),
        lambda c: peers.verl_loss(c, "gspo", "seq-mean-token-mean", clip_ratio_low=0.1, clip_ratio_high=0.15),
    ),
    Row(
        "`compute_gspo_token_loss`, 0.1/0.15",
        "verl",
        "`gspo`, `token-mean`",
        lambda c: mean(c, g.compute_gspo_token_loss(*whole(c), 0.1, cliprange_high=0.15)[0]),
        lambda c: peers.verl_loss(c, "gspo", clip_ratio_low=0.1, clip_ratio_high=0.15),
    ),
    Row(
        "`compute_gmpo_loss`, 0.4",
        "TRL",
        "`GMPOTrainer`",
        lambda c: by_response(c, g.compute_gmpo_loss(*whole(c), 0.4)[0]),
        lambda c: peers.trl_loss(c, "gmpo"),
    ),
    Row(
        "`compute_gmpo_loss`, 0.4",
        "verl",
        "`geo_mean`, `clip_ratio=0.4`",
        lambda c: by_response(c, g.compute_gmpo_loss(*whole(c), 0.4)[0]),
        lambda c: peers.verl_loss(c, "geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4),
    ),
    Row(
        "`compute_luspo_loss`, 0.1/0.15",
        "TRL",
        '`loss_type="luspo"`, `importance_sampling_level="sequence"`',
        lambda c: by_response(c, g.compute_luspo_loss(*whole(c), 0.1, cliprange_high=0.15)[0]),
        lambda c: peers.trl_loss(
            c, loss_type="luspo", importance_sampling_level="sequence", epsilon=0.1, epsilon_high=0.15
        ),
    ),
    Row(
        "`compute_luspo_loss`, 0.1/0.15",
        "Liger",
        '`loss_type="luspo"`, `importance_sampling_level="sequence"`',
        lambda c: by_response(c, g.compute_luspo_loss(*whole(c), 0.1, cliprange_high=0.15)[0]),
        lambda c: peers.liger_loss(
            c, "luspo", importance_sampling_level="sequence", epsilon_low=0.1, epsilon_high=0.15
        ),
    ),
    Row(
        "`compute_vespo_loss`",
        "TRL",
        '`loss_type="vespo"`',
        lambda c: mean(c, g.compute_vespo_loss(*whole(c))[0]),
        lambda c: peers.trl_loss(c, loss_type="vespo"),
    ),
    Row(
        "`compute_vespo_loss` from the sampler's log-probs",
        "TRL",
        '`loss_type="vespo"`, `vllm_importance_sampling_mode="token_truncate"`',
        lambda c: mean(c, g.compute_vespo_loss(c.advantages, c.policy, c.sampler, c.mask)[0]),
        lambda c: peers.trl_loss(c, loss_type="vespo", importance=peers.trl_importance(c, "token_truncate")),
        ragged=False,
    ),
    Row(
        "`compute_vespo_loss`",
        "Liger",
        '`loss_type="vespo"`',
        lambda c: mean(c, g.compute_vespo_loss(*whole(c))[0]),
        lambda c: peers.liger_loss(c, "vespo"),
    ),
    Row(
        "`compute_gspo_loss`, 0.2",
        "TRL",
        "`RLOOTrainer`",
        lambda c: by_response(c, g.compute_gspo_loss(*whole(c), 0.2)[0]),
        lambda c: peers.trl_loss(c, "rloo"),
        because="its response ratio is the product, not the geometric mean: `compute_grpo_clip_loss` of summed "
        "log-probs",
        changed=lambda c: g.compute_grpo_clip_loss(
            c.advantages,
            torch.where(c.mask, c.policy, 0.0).sum(dim=1, keepdim=True),
            torch.where(c.mask, c.old, 0.0).sum(dim=1, keepdim=True),
            0.2,
        )[0].mean(),
    ),
]

KL = [
    *(
        Row(
            f'`estimate_kl`, "{estimator}"',
            "verl",
            f"`{theirs}`",
            lambda c, ours=estimator: mean(c, g.estimate_kl(c.policy, c.reference, ours, response_mask=c.mask)),
            lambda c, theirs=theirs: peers.verl_aggregate(peers.verl_kl(c, theirs), c.mask, "token-mean"),
        )
        for estimator, theirs in [("k1", "kl"), ("k2", "mse"), ("abs", "abs")]
    ),
    Row(
        '`estimate_kl`, "k3"',
        "verl",
        "`low_var_kl`",
        lambda c: mean(c, g.estimate_kl(c.policy, c.reference, "k3", response_mask=c.mask)),
        lambda c: peers.verl_aggregate(peers.verl_kl(c, "low_var_kl"), c.mask, "token-mean"),
        because="clamped to 10, with zero gradient beyond",
        changed=lambda c: mean(c, g.estimate_kl(c.policy, c.reference, "k3", response_mask=c.mask).clamp(-10.0, 10.0)),
    ),
    Row(
        '`estimate_kl`, "k1"',
        "verl",
        "`k1+`",
        lambda c: mean(c, g.estimate_kl(c.policy, c.reference, "k1", response_mask=c.mask)),
        lambda c: peers.verl_aggregate(peers.verl_kl(c, "k1+"), c.mask, "token-mean"),
        because="`k1+` has the value of k1 and the gradient of k2",
        changed=lambda c: mean(c, with_gradient_of_k2(c, "k1")),
    ),
    Row(
        '`compute_grpo_clip_loss` + 0.1 `estimate_kl`, "k3"',
        "TRL",
        '`loss_type="dapo"`, `beta=0.1`, `use_bias_correction_kl=False`',
        lambda c: mean(c, clip(c) + 0.1 * g.estimate_kl(c.policy, c.reference, "k3", response_mask=c.mask)),
        lambda c: peers.trl_loss(c, loss_type="dapo", kl_coef=0.1, use_bias_correction_kl=False),
    ),
    Row(
        '`compute_grpo_clip_loss` + 0.1 `estimate_kl`, "ratio_k3"',
        "TRL",
        '`loss_type="dapo"`, `beta=0.1`',
        lambda c: mean(
            c,
            clip(c)
            + 0.1 * g.estimate_kl(c.policy, c.reference, "ratio_k3", old_log_probs=c.old, response_mask=c.mask),
        ),
        lambda c: peers.trl_loss(c, loss_type="dapo", kl_coef=0.1),
    ),
    Row(
        '`compute_grpo_clip_loss` + 0.1 `estimate_kl`, "k3"',
        "Liger",
        '`loss_type="dapo"`, `beta=0.1`',
        lambda c: mean(c, clip(c) + 0.1 * g.estimate_kl(c.policy, c.reference, "k3", response_mask=c.mask)),
        lambda c: peers.liger_loss(c, "dapo", beta=0.1),
    ),
]

AGGREGATION = [
    *(
        Row(
            f"`compute_token_weights`, {ours}",
            "verl",
            f"`{theirs}`",
            lambda c, ours=ours, options=options: g.sum_weighted_losses(
                clip(c), g.compute_token_weights(c.mask, ours, **options)
            ),
            lambda c, theirs=theirs, scale=scale: peers.verl_aggregate(clip(c), c.mask, theirs, **scale),
        )
        for ours, options, theirs, scale in [
            ("token_mean", {}, "token-mean", {}),
            ("sequence_mean", {}, "seq-mean-token-mean", {}),
            ("sequence_sum", {}, "seq-mean-token-sum", {}),
            ("constant", {"normalize_constant": 64.0}, "seq-mean-token-sum-norm", {"loss_scale_factor": 64}),
        ]
    ),
    Row(
        "`compute_token_weights`, constant 64",
        "verl",
        "`seq-mean-token-sum-norm`",
        lambda c: g.sum_weighted_losses(clip(c), constant(c, 64.0)),
        lambda c: peers.verl_aggregate(clip(c), c.mask, "seq-mean-token-sum-norm"),
        because="without `loss_scale_factor` the constant is the padded width, here 9",
        changed=lambda c: g.sum_weighted_losses(clip(c), constant(c, float(c.mask.shape[1]))),
    ),
    *(
        Row(
            f"`compute_token_weights`, {ours}",
            "TRL",
            f'`loss_type="{theirs}"`{note}',
            lambda c, ours=ours, options=options: g.sum_weighted_losses(
                clip(c), g.compute_token_weights(c.mask, ours, **options)
            ),
            lambda c, theirs=theirs: peers.trl_loss(c, loss_type=theirs, max_completion_length=64),
        )
        for ours, options, theirs, note in [
            ("token_mean", {}, "bnpo", ", one micro-batch"),
            ("sequence_mean", {}, "grpo", ""),
            ("sequence_sum", {}, "luspo", ', `importance_sampling_level="token"`'),
            ("constant", {"normalize_constant": 64.0}, "dr_grpo", ""),
        ]
    ),
    Row(
        "`compute_token_weights`, constant 64",
        "Liger",
        '`loss_type="dr_grpo"`',
        lambda c: g.sum_weighted_losses(clip(c), constant(c, 64.0)),
        lambda c: peers.liger_loss(c, "dr_grpo", max_completion_length=64),
    ),
    Row(
        "`compute_token_weights`, sequence_mean, one empty response",
        "TRL",
        '`loss_type="grpo"`',
        lambda c: g.sum_weighted_losses(clip(c), g.compute_token_weights(without_row(c), "sequence_mean")),
        lambda c: peers.trl_loss(c, loss_type="grpo", mask=without_row(c)),
    ),
    Row(
        "`compute_token_weights`, sequence_mean, one empty response",
        "verl",
        "`seq-mean-token-mean`",
        lambda c: g.sum_weighted_losses(clip(c), g.compute_token_weights(without_row(c), "sequence_mean")),
        lambda c: peers.verl_aggregate(clip(c), without_row(c), "seq-mean-token-mean"),
        because='verl does not count it in N: `empty_responses="drop"`',
        changed=lambda c: g.sum_weighted_losses(
            clip(c),
            g.compute_token_weights(without_row(c), "sequence_mean", empty_responses="drop"),
        ),
    ),
    Row(
        "`compute_token_weights`, token_mean, rejected responses",
        "verl",
        "`seq_mean_k1` at 0.8 to 1.25",
        lambda c: g.sum_weighted_losses(
            clip(c), g.compute_token_weights(c.mask, "token_mean", kept=kept(c, 0.8, 1.25) & c.mask)
        ),
        lambda c: peers.verl_loss(
            c, "vanilla", mask=peers.verl_rejection(c, "seq_mean_k1", "0.8_1.25"), clip_ratio_c=1e9
        ),
        because='rejected tokens leave the denominator: `rejected_tokens="drop"`',
        changed=lambda c: g.sum_weighted_losses(
            clip(c),
            g.compute_token_weights(c.mask, "token_mean", kept=kept(c, 0.8, 1.25) & c.mask, rejected_tokens="drop"),
        ),
    ),
]

SAMPLER = [
    Row(
        "`truncate_importance_weights`, token, 3",
        "TRL",
        "`token_truncate`",
        lambda c: g.truncate_importance_weights(kappa(c, "token"), high=3.0),
        lambda c: peers.trl_importance(c, "token_truncate") * c.mask,
        ragged=False,
    ),
    Row(
        "`mask_importance_weights`, token, 1.2",
        "TRL",
        "`token_mask`, `clip_max=1.2`",
        lambda c: g.mask_importance_weights(kappa(c, "token"), high=1.2),
        lambda c: peers.trl_importance(c, "token_mask", vllm_importance_sampling_clip_max=1.2) * c.mask,
        ragged=False,
    ),
    Row(
        "`truncate_importance_weights`, sequence, 1.2",
        "TRL",
        "`sequence_truncate`, `clip_max=1.2`",
        lambda c: g.truncate_importance_weights(kappa(c, "sequence"), high=1.2),
        lambda c: peers.trl_importance(c, "sequence_truncate", vllm_importance_sampling_clip_max=1.2),
        ragged=False,
    ),
    Row(
        "`mask_importance_weights`, sequence, 3",
        "TRL",
        "`sequence_mask` (default)",
        lambda c: g.mask_importance_weights(kappa(c, "sequence"), high=3.0),
        lambda c: peers.trl_importance(c, "sequence_mask"),
        ragged=False,
    ),
    Row(
        "`truncate_importance_weights`, token, 1.2",
        "verl",
        "`rollout_is=token`, 1.2",
        lambda c: g.truncate_importance_weights(kappa(c, "token"), high=1.2),
        lambda c: peers.verl_importance(c, "token", 1.2),
    ),
    Row(
        "`truncate_importance_weights`, sequence, 2",
        "verl",
        "`rollout_is=sequence`, 2",
        lambda c: g.truncate_importance_weights(kappa(c, "sequence"), high=2.0) * c.mask,
        lambda c: peers.verl_importance(c, "sequence", 2.0),
    ),
    Row(
        "`mask_importance_weights`, token, 0.8 to 1.5",
        "verl",
        "`rollout_is=token`, 0.8_1.5",
        lambda c: g.mask_importance_weights(kappa(c, "token"), low=0.8, high=1.5),
        lambda c: peers.verl_importance(c, "token", "0.8_1.5"),
    ),
    Row(
        "`keep_within_bounds`, geometric, 0.8 to 1.1",
        "verl",
        "`seq_mean_k1`, 0.8_1.1",
        lambda c: kept(c, 0.8, 1.1) & c.mask,
        lambda c: peers.verl_rejection(c, "seq_mean_k1", "0.8_1.1"),
        because="its k1 is -log κ, so the bounds apply to 1/κ",
        changed=lambda c: kept(c, 1 / 1.1, 1 / 0.8) & c.mask,
    ),
    *(
        Row(
            f"`keep_within_bounds` of `compute_importance_divergences`, {measure}, {level}, {high}",
            "verl",
            f"`{theirs}`, {high}",
            lambda c, measure=measure, level=level, high=high: (
                g.keep_within_bounds(
                    g.compute_importance_divergences(c.old, c.sampler, c.mask, measure, level), low=0.0, high=high
                )
                & c.mask
            ),
            lambda c, theirs=theirs, high=high: peers.verl_rejection(c, theirs, str(high)),
        )
        for measure, level, theirs, high in [
            ("k2", "token", "token_k2", 0.05),
            ("k3", "token", "token_k3", 0.05),
            ("k3", "sequence", "seq_sum_k3", 0.3),
            ("k2", "geometric", "seq_mean_k2", 0.06),
        ]
    ),
    Row(
        "`self_normalize_weights`, token",
        "verl",
        "`rollout_is_batch_normalize`",
        lambda c: g.self_normalize_weights(g.truncate_importance_weights(kappa(c, "token"), high=2.0), c.mask),
        lambda c: peers.verl_importance(c, "token", 2.0, rollout_is_batch_normalize=True),
    ),
    Row(
        "`self_normalize_weights`, sequence",
        "verl",
        "`rollout_is_batch_normalize`",
        lambda c: (
            g.self_normalize_weights(g.truncate_importance_weights(kappa(c, "sequence"), high=2.0), c.mask) * c.mask
        ),
        lambda c: peers.verl_importance(c, "sequence", 2.0, rollout_is_batch_normalize=True),
    ),
    Row(
        "`effective_sample_size`, token",
        "verl",
        "`rollout_is_eff_sample_size`",
        lambda c: g.effective_sample_size(g.truncate_importance_weights(kappa(c, "token"), high=2.0), c.mask),
        lambda c: peers.verl_correction_metric(c, "rollout_is_eff_sample_size", 2.0),
    ),
    Row(
        "`describe_mismatch`, `mismatch_kl`",
        "verl",
        "`k3_kl`",
        lambda c: g.describe_mismatch(c.old, c.sampler, c.mask)["mismatch_kl"],
        lambda c: peers.verl_correction_metric(c, "k3_kl", 2.0),
    ),
    Row(
        "`describe_mismatch`, `mismatch_mean` and `mismatch_max`",
        "TRL",
        "`sampling/sampling_logp_difference`",
        lambda c: torch.stack(
            [g.describe_mismatch(c.old, c.sampler, c.mask)[name] for name in ("mismatch_mean", "mismatch_max")]
        ),
        lambda c: peers.trl_mismatch(c),
        ragged=False,
    ),
    Row(
        "`compute_grpo_clip_loss` times `mask_importance_weights`, sequence, 1.2",
        "TRL",
        '`loss_type="dapo"`, `sequence_mask`, `clip_max=1.2`',
        lambda c: mean(c, clip(c), g.mask_importance_weights(kappa(c, "sequence"), high=1.2).expand(c.mask.shape)),
        lambda c: peers.trl_loss(
            c,
            loss_type="dapo",
            importance=peers.trl_importance(c, "sequence_mask", vllm_importance_sampling_clip_max=1.2),
        ),
        ragged=False,
    ),
    Row(
        "`compute_grpo_clip_loss` times `mask_importance_weights`, token, 0.8 to 1.5",
        "verl",
        "`vanilla`, `clip_ratio_c=1e9`, 0.8_1.5",
        lambda c: mean(c, clip(c), g.mask_importance_weights(kappa(c, "token"), low=0.8, high=1.5)),
        lambda c: peers.verl_loss(
            c, "vanilla", clip_ratio_c=1e9, importance=peers.verl_importance(c, "token", "0.8_1.5")
        ),
    ),
]

REST = [
    Row(
        "`keep_on_policy_sequences`, 0.1",
        "TRL",
        "`off_policy_mask_threshold=0.1`",
        lambda c: g.keep_on_policy_sequences(c.advantages, c.policy, c.sampler, c.mask, 0.1),
        lambda c: peers.trl_off_policy_mask(c, 0.1),
    ),
    *(
        Row(
            f"`select_high_entropy`, {fraction}",
            "TRL",
            f"`top_entropy_quantile={fraction}`",
            lambda c, fraction=fraction: g.select_high_entropy(peers.entropy_of(c), c.mask, fraction),
            lambda c, fraction=fraction: peers.trl_high_entropy_mask(c, fraction),
            because=because,
            changed=lambda c, fraction=fraction: g.select_high_entropy(
                peers.entropy_of(c), c.mask, (int(fraction * (tokens(c) - 1)) + 0.5) / tokens(c)
            ),
        )
        for fraction, because in [
            (0.25, ""),
            (
                0.37,
                "an interpolated quantile keeps ⌊0.37 (n - 1)⌋ + 1 of n tokens, not ⌈0.37 n⌉",
            ),
        ]
    ),
    Row(
        "`drop_truncated_responses`",
        "TRL",
        "`mask_truncated_completions=True`",
        lambda c: g.drop_truncated_responses(peers.attended(c.mask), truncated(c)),
        lambda c: peers.trl_truncated(c, truncated(c))["completion_mask"],
        ragged=False,
    ),
    Row(
        "`adapt_entropy_coefficient`, from 0.1",
        "TRL",
        "`use_adaptive_entropy=True`",
        lambda c: torch.tensor(
            g.adapt_entropy_coefficient(0.1, float(g.masked_mean(peers.entropy_of(c), c.mask)), 1.0)
        ),
        lambda c: torch.tensor(peers.trl_entropy_coefficient(c, 0.1, 1.0)),
    ),
    Row(
        "`compute_entropy`",
        "verl",
        "`entropy_from_logits`",
        lambda c: g.compute_entropy(c.logits, temperature=VOCABULARY_TEMPERATURE),
        lambda c: peers.verl_entropy(c.logits / VOCABULARY_TEMPERATURE),
    ),
    Row(
        "`compute_soft_overlong_penalty`",
        "TRL",
        "`get_soft_overlong_punishment`",
        lambda _: g.compute_soft_overlong_penalty(torch.tensor(LENGTHS), LONGEST, BUFFER),
        lambda _: peers.trl_overlong(LENGTHS, LONGEST, BUFFER),
    ),
    Row(
        "`compute_soft_overlong_penalty`",
        "verl",
        "`dapo` reward manager",
        lambda _: g.compute_soft_overlong_penalty(torch.tensor(LENGTHS), LONGEST, BUFFER),
        lambda _: peers.verl_overlong(LENGTHS, LONGEST, BUFFER),
        because="no floor: the penalty keeps falling beyond the limit",
        changed=lambda _: torch.where(
            torch.tensor(LENGTHS) <= LONGEST,
            g.compute_soft_overlong_penalty(torch.tensor(LENGTHS), LONGEST, BUFFER),
            (LONGEST - BUFFER - torch.tensor(LENGTHS)) / BUFFER,
        ),
    ),
]

TEACHERS = [
    *(
        Row(
            f"`compute_dpo_loss`, β 0.1{note}",
            "TRL",
            setting,
            lambda c, share=share: dpo(c) + share * imitation(c),
            lambda c, options=options: peers.trl_dpo_loss(c, len(c.mask) // 2, beta=0.1, **options),
        )
        for note, setting, share, options in [
            ("", "`DPOTrainer`", 0.0, {}),
            (
                " + 0.5 `compute_cross_entropy_loss` of the preferred responses",
                '`DPOTrainer`, `loss_type=["sigmoid", "sft"]`, `loss_weights=[1, 0.5]`',
                0.5,
                {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.5)},
            ),
        ]
    ),
    Row(
        "`compute_dpo_loss`, β 0.1, label smoothing 0.2",
        "TRL",
        '`DPOTrainer`, `loss_type="robust"`, `label_smoothing=0.2`',
        lambda c: dpo(c, 0.2),
        lambda c: peers.trl_dpo_loss(c, len(c.mask) // 2, beta=0.1, loss_type="robust", label_smoothing=0.2),
        because="`robust` subtracts the loss of the flipped preference, and divides by 1 - 2ε",
        changed=lambda c: (0.8 * dpo(c) - 0.2 * dpo(c, sign=-1.0)) / 0.6,
    ),
    Row(
        "`compute_dpo_loss`, β 0.1",
        "Liger",
        "`LigerFusedLinearDPOFunction`",
        dpo,
        lambda c: peers.liger_dpo_loss(c, len(c.mask) // 2, beta=0.1),
    ),
    Row(
        "`compute_jensen_shannon_divergence`, β 0.3, τ 0.7",
        "TRL",
        "`GKDTrainer`",
        lambda c: mean(
            c, g.compute_jensen_shannon_divergence(student_logits(c), teacher_logits(c), 0.3, temperature=0.7)
        ),
        lambda c: peers.trl_jsd(student_logits(c), teacher_logits(c), c.mask, 0.3, 0.7),
    ),
    Row(
        "`compute_jensen_shannon_divergence`, β 0.3",
        "Liger",
        "`LigerFusedLinearJSDFunction`",
        lambda c: mean(c, g.compute_jensen_shannon_divergence(student_logits(c), teacher_logits(c), 0.3)) * tokens(c),
        lambda c: peers.liger_jsd(student_logits(c), teacher_logits(c), c.mask, 0.3),
    ),
    Row(
        "`compute_top_k_forward_kl`, k 2",
        "TRL",
        "`ServerDistillationTrainer`, `loss_add_tail=True`",
        lambda c: mean(c, g.compute_top_k_forward_kl(student_logits(c), *best_tokens(c, 2))),
        lambda c: peers.trl_forward_kl(student_logits(c), best_tokens(c, 2), c.mask, add_tail=True),
    ),
    Row(
        "`compute_top_k_forward_kl`, k of the vocabulary",
        "verl",
        "`forward_kl_topk`",
        lambda c: mean(c, g.compute_top_k_forward_kl(student_logits(c), *best_tokens(c, 5))),
        lambda c: peers.verl_aggregate(
            peers.verl_forward_kl(student_logits(c), best_tokens(c, 5)), c.mask, "token-mean"
        ),
    ),
    Row(
        "`compute_top_k_forward_kl`, k 2",
        "verl",
        "`forward_kl_topk`",
        lambda c: mean(c, g.compute_top_k_forward_kl(student_logits(c), *best_tokens(c, 2))),
        lambda c: peers.verl_aggregate(
            peers.verl_forward_kl(student_logits(c), best_tokens(c, 2)), c.mask, "token-mean"
        ),
        because="verl leaves out the term of all other tokens",
        changed=lambda c: mean(c, forward_kl_without_tail(c, 2)),
    ),
    Row(
        "`compute_distillation_advantages`",
        "verl",
        "`k1`, `use_policy_gradient=True`",
        lambda c: g.compute_distillation_advantages(c.policy, c.reference, c.mask),
        lambda c: torch.where(c.mask, -peers.verl_kl(c, "k1").detach(), 0.0),
    ),
]

SECTIONS = {
    "Advantages": ADVANTAGES,
    "Token losses": TOKEN_LOSSES,
    "Response losses": SEQUENCE_LOSSES,
    "KL divergence": KL,
    "Aggregation": AGGREGATION,
    "Importance correction": SAMPLER,
    "Selection, entropy, length": REST,
    "Preferences and teachers": TEACHERS,
}


def whole(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the leading arguments of the response losses."""
    return case.advantages, case.policy, case.old, case.mask


def by_response(case: Case, losses: Tensor) -> Tensor:
    return g.sum_weighted_losses(losses, g.compute_sequence_weights(case.mask))


def constant(case: Case, length: float) -> Tensor:
    return g.compute_token_weights(case.mask, "constant", normalize_constant=length)


def kept(case: Case, low: float, high: float) -> Tensor:
    return g.keep_within_bounds(kappa(case, "geometric"), low=low, high=high)


def dppo_as_verl(case: Case, loss: Callable, thresholds: tuple[float, ...], cap: float) -> Tensor:
    """Return -sg[min(ρ, cap)] A M log p, with the M of our loss."""
    flags = loss(case.advantages, case.policy, case.old, *thresholds, response_mask=case.mask)[1]
    weighted = g.compute_cispo_loss(case.advantages, case.policy, case.old, ratio_high=cap, response_mask=case.mask)[0]
    return torch.where(flags["is_clipped"], 0.0, weighted)


def chosen_by_clip_cov(case: Case) -> Tensor:
    chosen = g.select_high_covariance(case.advantages, case.policy, case.mask, 1.0, low=0.5, high=5.0)
    flags = g.compute_grpo_clip_loss(case.advantages, case.policy, case.old, 0.2, response_mask=case.mask)[1]
    return chosen & ~flags["is_clipped"]


def with_gradient_of_k2(case: Case, estimator: str) -> Tensor:
    value = g.estimate_kl(case.policy, case.reference, estimator, response_mask=case.mask).detach()
    k2 = g.estimate_kl(case.policy, case.reference, "k2", response_mask=case.mask)
    return value + k2 - k2.detach()

"""Policy-gradient losses, one value per token; nothing here masks or reduces."""

from typing import TYPE_CHECKING, TypeAlias, TypeVar, assert_never, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_core._check import shape_checked
from grpo_core.types import LossType, Metadata

if TYPE_CHECKING:
    LossTypeName: TypeAlias = LossType
else:
    # mypy holds a caller to the names; at run time any string comes in, so that a wrong one meets our own error.
    LossTypeName = str

T = TypeVar("T")

_LOSS_TYPES = get_args(LossType)


@shape_checked
def compute_naive_policy_gradient_loss(
    raw_rewards_or_advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
) -> Float[Tensor, "batch seq"]:
    r"""$\ell_{it} = -A_i \log \pi_\theta(o_{it})$: REINFORCE, whose gradient in the log-probability is $-A_i$.

    Differentiable in `policy_log_probs` alone. Prompt and padding tokens get a value too.

    Args:
        raw_rewards_or_advantages: $A_i$, constant over the tokens of response $i$, in units of reward (or of none).
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.

    Returns:
        The loss of each token.

    Example:
        >>> compute_naive_policy_gradient_loss(torch.tensor([[2.0]]), torch.tensor([[-0.5, -1.0]]))
        tensor([[1., 2.]])

    References:
        Williams 1992, doi:10.1007/BF00992696, eq. 1.
    """
    return -raw_rewards_or_advantages.detach() * policy_log_probs


@shape_checked
def compute_grpo_clip_loss(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    cliprange: float,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""GRPO-Clip loss of each token: PPO's clipped surrogate with one advantage per response.

    $$\ell_{it} = -\min\bigl(\rho_{it} A_i,\ \operatorname{clip}(\rho_{it}, 1-\epsilon, 1+\epsilon)\,A_i\bigr),
    \qquad \rho_{it} = \pi_\theta(o_{it}) / \pi_{\mathrm{old}}(o_{it})$$

    Differentiable in `policy_log_probs` alone: $-\rho_{it} A_i$, and 0 where the clip lowered the objective. Prompt
    and padding tokens get a value too. The ratio is not bounded: in float32 it overflows 88 nats above the old policy.

    Args:
        advantages: $A_i$, constant over the tokens of response $i$; no unit.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, from the policy that sampled it.
        cliprange: $\epsilon \ge 0$, the half-width of the trust region around a ratio of 1.

    Returns:
        The loss of each token, and `{"is_clipped": Bool "batch seq"}`: where the clip lowered the objective.

    Raises:
        ValueError: if `cliprange` is negative or NaN.

    Example:
        >>> old = torch.tensor([[0.5, 0.5]])
        >>> compute_grpo_clip_loss(torch.tensor([[2.0]]), torch.tensor([[0.25, 1.0]]).log(), old.log(), 0.5)
        (tensor([[-1., -3.]]), {'is_clipped': tensor([[False,  True]])})

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7; Shao et al. 2024, arXiv:2402.03300, eq. 3 without the KL term.
    """
    if not cliprange >= 0:
        raise ValueError(f"cliprange={cliprange} must be at least 0: it is the half-width of an interval around 1")
    advantages = advantages.detach()
    ratio = torch.exp(policy_log_probs - old_log_probs.detach())
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -torch.minimum(surrogate, clipped), {"is_clipped": clipped < surrogate}


@shape_checked
def compute_grpo_no_clip_loss(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""GRPO loss of each token, unclipped: $\ell_{it} = -\rho_{it} A_i$, $\rho = \pi_\theta / \pi_{\mathrm{old}}$.

    Differentiable in `policy_log_probs` alone: $-\rho_{it} A_i$. Prompt and padding tokens get a value too. For the
    ablation of the clip: nothing bounds how far an update moves the policy.

    Args:
        advantages: $A_i$, constant over the tokens of response $i$; no unit.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, from the policy that sampled it.

    Returns:
        The loss of each token, and no metadata.

    Example:
        >>> old = torch.tensor([[0.5, 0.5]])
        >>> compute_grpo_no_clip_loss(torch.tensor([[2.0]]), torch.tensor([[0.25, 1.0]]).log(), old.log())
        (tensor([[-1., -4.]]), {})

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 6.
    """
    ratio = torch.exp(policy_log_probs - old_log_probs.detach())
    return -ratio * advantages.detach(), {}


@shape_checked
def compute_policy_gradient_loss(
    policy_log_probs: Float[Tensor, "batch seq"],
    loss_type: LossTypeName,
    raw_rewards: Float[Tensor, "batch 1"] | None = None,
    advantages: Float[Tensor, "batch 1"] | None = None,
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    cliprange: float | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""$\ell_{it}$ of the chosen objective: one door to the losses of this file.

    Differentiable in `policy_log_probs` alone. What the chosen loss does not need is not looked at.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        loss_type: "no_baseline" ($-r_i \log \pi_\theta$), "reinforce_with_baseline" ($-A_i \log \pi_\theta$),
            "grpo_clip" or "grpo_no_clip".
        raw_rewards: $r_i$, for "no_baseline".
        advantages: $A_i$, for the other three.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, for the two GRPO losses.
        cliprange: $\epsilon$, for "grpo_clip".

    Returns:
        The loss of each token, and the metadata of the chosen loss: `is_clipped` (Bool "batch seq") for "grpo_clip",
        nothing for the others.

    Raises:
        ValueError: if `loss_type` is none of the four, or an argument that it needs is None.

    Example:
        >>> compute_policy_gradient_loss(torch.tensor([[-0.5]]), "no_baseline", raw_rewards=torch.tensor([[1.0]]))
        (tensor([[0.5000]]), {})
    """
    if loss_type not in _LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is unknown: choose one of {', '.join(_LOSS_TYPES)}")
    match loss_type:
        case "no_baseline":
            raw_rewards = _required(raw_rewards, "raw_rewards", loss_type)
            return compute_naive_policy_gradient_loss(raw_rewards, policy_log_probs), {}
        case "reinforce_with_baseline":
            advantages = _required(advantages, "advantages", loss_type)
            return compute_naive_policy_gradient_loss(advantages, policy_log_probs), {}
        case "grpo_clip":
            advantages = _required(advantages, "advantages", loss_type)
            old_log_probs = _required(old_log_probs, "old_log_probs", loss_type)
            cliprange = _required(cliprange, "cliprange", loss_type)
            return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)
        case "grpo_no_clip":
            advantages = _required(advantages, "advantages", loss_type)
            old_log_probs = _required(old_log_probs, "old_log_probs", loss_type)
            return compute_grpo_no_clip_loss(advantages, policy_log_probs, old_log_probs)
        case _:  # pragma: no cover - mypy shows that nothing is left
            assert_never(loss_type)


def _required(value: T | None, name: str, loss_type: str) -> T:
    if value is None:
        raise ValueError(f"loss_type={loss_type!r} needs {name}; got None")
    return value

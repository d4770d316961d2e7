"""Distances of the policy from a teacher, on the policy's own samples."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core.losses._ratios import compute_log_ratio

# exp(-1e4) is 0 in every type, and 0 times -1e4 is 0: a token of probability 0 adds nothing, and no NaN.
_MIN_LOG_PROB = -1e4


@shape_checked
def compute_distillation_advantages(
    policy_log_probs: Float[Tensor, "batch seq"],
    teacher_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
) -> Float[Tensor, "batch seq"]:
    r"""Return $A_{it} = \operatorname{sg}[\log \pi_T(o_{it}) - \log \pi_\theta(o_{it})]$, an advantage from a teacher.

    With these advantages, REINFORCE on the policy's own samples follows the gradient of $\mathrm{KL}(\pi_\theta \Vert
    \pi_T)$ of each token's distribution, for a fixed prefix: every token has its own signal, while a reward gives
    one to the whole response. The log-probs may be those from before the update. To mix both signals, add multiples of
    the advantages of rewards. Detached; 0 outside the mask, where no value is read. A token that the teacher excludes
    has an advantage of $-\infty$.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        teacher_log_probs: $\log \pi_T$ of each token after the same prefix, in nats, at the same temperature.
        response_mask: True where a token belongs to a response.

    Returns:
        The advantages, in nats.

    Examples:
        >>> policy, teacher = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
        >>> compute_distillation_advantages(policy, teacher, torch.ones(1, 2).bool())
        tensor([[-0.6931,  0.6931]])

    References:
        Agarwal et al. 2023, arXiv:2306.13649 (on-policy distillation); Xiaomi 2026, arXiv:2601.02780 (advantage).
    """
    return -compute_log_ratio(policy_log_probs.detach(), teacher_log_probs, response_mask)


@shape_checked
def compute_jensen_shannon_divergence(
    policy_logits: Float[Tensor, "*batch vocab"],
    teacher_logits: Float[Tensor, "*batch vocab"],
    beta: float,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    r"""Return $\beta \mathrm{KL}(T \Vert M) + (1 - \beta) \mathrm{KL}(S \Vert M)$, $M = \beta T + (1 - \beta) S$.

    $S$ is the policy (the student) and $T$ the teacher. The divergence is 0 if and only if they are equal, and at most
    $\log 2$. Divided by $\beta$, it tends to $\mathrm{KL}(T \Vert S)$ as $\beta \to 0$, and divided by $1 - \beta$, to
    $\mathrm{KL}(S \Vert T)$ as $\beta \to 1$. Differentiable in `policy_logits`: the gradient is
    $\frac{1 - \beta}{\tau} S_v \bigl(\log \frac{S_v}{M_v} - \mathrm{KL}(S \Vert M)\bigr)$. A logit of $-\infty$, in
    one or in both, is a probability of 0. Computed in float32 or the wider type of the logits; the call holds a few
    tensors of their size.

    Args:
        policy_logits: logits of $S$.
        teacher_logits: logits of $T$ after the same prefix; detached.
        beta: $\beta$ in $(0, 1)$, the weight of the teacher in $M$.
        temperature: $\tau > 0$, which divides the logits of both.

    Returns:
        The divergence of each pair of distributions, in nats.

    Raises:
        ValueError: unless $0 < \beta < 1$ and $\tau > 0$.

    Examples:
        >>> policy, teacher = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()
        >>> compute_jensen_shannon_divergence(policy, teacher, 0.5)
        tensor([0.3681])

    References:
        Agarwal et al. 2023, arXiv:2306.13649, eq. 1 (generalized knowledge distillation).
    """
    require(0 < beta < 1, "beta", beta, "between 0 and 1, both excluded")
    student, teacher = _compute_log_probs(policy_logits, temperature), _compute_log_probs(teacher_logits, temperature)
    teacher = teacher.detach()
    weights = student.new_tensor([beta, 1 - beta]).log()
    mixture = torch.logaddexp(teacher + weights[0], student + weights[1])
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(dim=-1)
    return beta * of_teacher + (1 - beta) * (student.exp() * (student - mixture)).sum(dim=-1)


@shape_checked
def compute_top_k_forward_kl(
    policy_logits: Float[Tensor, "*batch vocab"],
    teacher_log_probs: Float[Tensor, "*batch k"],
    teacher_ids: Int[Tensor, "*batch k"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    r"""Return $\sum_{v \in K} T_v \log \frac{T_v}{S_v} + T_R \log \frac{T_R}{S_R}$ for the teacher's $k$ best tokens.

    $S$ is the policy (the student), $T$ the teacher, and $R$ all tokens outside $K$, with $T_R = 1 - \sum_{v \in K}
    T_v$: the forward KL divergence in which these count as one token. It is at most $\mathrm{KL}(T \Vert S)$, equal to
    it if $K$ is the vocabulary, and 0 where the student agrees with the teacher. Without the term of $R$, the minimum
    would be elsewhere: at a student that puts all its probability on $K$. Differentiable in `policy_logits`: the
    gradient is $(S_v - T_v) / \tau$ for $v \in K$ and $S_v (1 - T_R / S_R) / \tau$ for the others. Computed in float32
    or the wider type of the logits.

    Args:
        policy_logits: logits of $S$.
        teacher_log_probs: $\log T_v$ of the tokens of $K$, in nats, at the same temperature; detached.
        teacher_ids: the tokens of $K$, all different.
        temperature: $\tau > 0$, which divides the student's logits.

    Returns:
        The divergence of each pair of distributions, in nats.

    Raises:
        ValueError: unless $\tau > 0$.

    Examples:
        >>> policy, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.5]]).log()
        >>> compute_top_k_forward_kl(policy, teacher, torch.tensor([[0]]))
        tensor([0.])
        >>> compute_top_k_forward_kl(policy, teacher, torch.tensor([[2]]))
        tensor([0.1438])

    References:
        Agarwal et al. 2023, arXiv:2306.13649 (forward KL on the student's samples).
    """
    student = _compute_log_probs(policy_logits, temperature)
    best = teacher_log_probs.detach().to(student.dtype).clamp(min=_MIN_LOG_PROB)
    divergence = (best.exp() * (best - student.gather(-1, teacher_ids.long()))).sum(dim=-1)
    if teacher_ids.shape[-1] == policy_logits.shape[-1]:
        return divergence
    # Rounding can make the sum of the teacher's probabilities exceed 1.
    rest = (1 - best.exp().sum(dim=-1)).clamp(min=0)
    others = student.scatter(-1, teacher_ids.long(), _MIN_LOG_PROB).logsumexp(dim=-1)
    return divergence + torch.where(rest > 0, rest * (rest.clamp(min=1e-30).log() - others), 0.0)


def _compute_log_probs(logits: Float[Tensor, "*batch vocab"], temperature: float) -> Float[Tensor, "*batch vocab"]:
    """Return log-probs in float32 or wider, those of impossible tokens finite."""
    require(temperature > 0, "temperature", temperature, "positive")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide / temperature).log_softmax(dim=-1).clamp(min=_MIN_LOG_PROB)

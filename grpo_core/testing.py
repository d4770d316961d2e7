"""Ask a function of your own for the laws that the objectives and advantages of `grpo_core` obey.

Needs torch alone, so a test, a notebook or a program can call it. The batches are small and fixed.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from grpo_core._checks import require

LENGTHS = (5, 3, 1, 0)
"""Response tokens per row of the batch; the last response has lost all its tokens to a mask."""
_Batch = Mapping[str, Tensor]


class _Outcome(NamedTuple):
    """The losses of a batch, their flags, and the gradient of their sum in the log-probs of the policy."""

    losses: Tensor
    flags: Mapping[str, Tensor]
    gradient: Tensor


class _Function:
    """A function that gets the arguments that its parameters ask for by name."""

    def __init__(self, function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
        self.function, self.settings = function, settings
        self.name = getattr(function, "__name__", repr(function))
        self.parameters = inspect.signature(function).parameters

    def call(self, batch: Mapping[str, Any]) -> Any:
        """Return the function's result; raise an AssertionError if it raises anything."""
        offered = {**batch, **self.settings}
        arguments = {name: offered[name] for name in self.parameters if name in offered}
        try:
            return self.function(**arguments)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise AssertionError(f"{self.name}: raises {type(error).__name__} on a valid batch ({reason})") from error

    def describe(self, batch: _Batch) -> _Outcome:
        """Return the outcome of an objective."""
        policy = batch["policy_log_probs"].clone().requires_grad_()
        result = self.call({**batch, "policy_log_probs": policy})
        losses, flags = result if isinstance(result, tuple) else (result, {})
        losses.sum().backward()
        return _Outcome(losses.detach(), flags, torch.zeros_like(policy) if policy.grad is None else policy.grad)


def check_objective(
    function: Callable[..., Any],
    *,
    laws: Sequence[str] | None = None,
    token_advantages: bool = False,
    **settings: Any,
) -> Literal["token", "response"]:
    r"""Raise an AssertionError that says in one sentence which law of the objectives `function` breaks.

    The function is called by the names of its parameters: `policy_log_probs`, `old_log_probs` (Float "batch seq"),
    `advantages`, `raw_rewards` (Float "batch 1") and `response_mask` (Bool "batch seq"), as the objectives of
    `grpo_core`, and whatever `settings` holds. It returns the losses $\ell$, or a tuple of them and a dict of flags.

    - `shape`: one loss per token ("batch seq") or per response ("batch 1"); flags are Bool, of one of these shapes.
    - `gradient`: the loss depends on `policy_log_probs`, and on no other tensor that requires a gradient.
    - `finite`: losses and gradient are finite, also where a response has no token.
    - `rows`: a response has the same loss in any micro-batch, so that micro-batches add up to their step.
    - `padding`: columns after the longest response change nothing.
    - `mask`: NaN and infinity outside the mask change nothing; the loss and its gradient are exactly 0 there.
    - `nan`: a NaN inside the mask reaches the loss.
    - `bounded`: losses and gradient stay finite at ratios of $e^{\pm 10000}$.
    - `signal`: an advantage or a reward of 0 has no gradient.
    - `on_policy`: at $\pi_\theta = \pi_{\mathrm{old}}$ the gradient is that of REINFORCE, $-A$ for each token; of a
      response's mean, $-A / \lvert o \rvert$.

    Args:
        function: the objective.
        laws: names of the laws to check. Default: all. drivers/train.py requires `REQUIRED_LAWS` and warns of others.
        token_advantages: give each token its own advantage, instead of one to each response.
        settings: other arguments of the function, by parameter.

    Returns:
        What has one loss: "token" or "response".

    Raises:
        AssertionError: a law is broken, or the function raises an error.
        ValueError: a law has another name, or a setting is no parameter of the function.

    Examples:
        >>> def reinforce(advantages, policy_log_probs):
        ...     return -advantages.detach() * policy_log_probs
        >>> check_objective(reinforce, laws=REQUIRED_LAWS)
        'token'
        >>> check_objective(lambda policy_log_probs: -policy_log_probs.mean())
        Traceback (most recent call last):
            ...
        AssertionError: <lambda>: returns shape (), but must return (4, 5), a loss per token, or (4, 1), per response
    """
    objective, batch = _Function(function, settings), _make_batch(token_advantages=token_advantages)
    _check_parameters(objective, batch)
    for law in _choose(laws, OBJECTIVE_LAWS):
        _refuse(objective, OBJECTIVE_LAWS[law](objective, batch))
    return "response" if objective.describe(batch).losses.shape[1] == 1 else "token"


def check_advantage(function: Callable[..., Any], *, laws: Sequence[str] | None = None, **settings: Any) -> None:
    """Raise an AssertionError that says in one sentence which law of the advantages `function` breaks.

    The function is called by the names of its parameters: `rewards` (Float " batch"), `group_sizes` (an int: the
    responses to each question, which are consecutive), `lengths` (Int " batch", tokens), `greedy_rewards` (one per
    question), and whatever `settings` holds. The rewards of the check are 0 and 1, and NaN for `unscored`.

    - `shape`: one finite advantage per response (" batch").
    - `unscored`: a response without a reward (NaN) gets 0, and no other advantage becomes NaN.
    - `order`: the order of the groups, and of the responses in a group, changes no advantage.
    - `equal_rewards`: a group of equal rewards gets 0.
    - `detached`: the advantages have no gradient in the rewards.

    Args:
        function: the advantage estimator.
        laws: names of the laws to check, in this order. Default: all. drivers/train.py requires the first three.
        settings: other arguments of the function, by parameter.

    Raises:
        AssertionError: a law is broken, or the function raises an error.

    Examples:
        >>> check_advantage(lambda rewards: rewards - rewards.nanmean())
        Traceback (most recent call last):
            ...
        AssertionError: <lambda>: gives a response without a reward (NaN) the advantage nan instead of 0
    """
    estimator = _Function(function, settings)
    inputs = {
        "rewards": torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 1]),
        "group_sizes": 4,
        "lengths": torch.arange(20) % 7 + 1,
        "greedy_rewards": torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]),
    }
    _check_parameters(estimator, inputs)
    for law in _choose(laws, ADVANTAGE_LAWS):
        _refuse(estimator, ADVANTAGE_LAWS[law](estimator, inputs))


def _choose(laws: Sequence[str] | None, table: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of the laws to check; raise ValueError for an unknown one."""
    unknown = [law for law in laws or () if law not in table]
    require(not unknown, "laws", unknown, f"among {', '.join(table)}")
    return list(table) if laws is None else laws


def _refuse(function: _Function, problem: str | None) -> None:
    if problem is not None:
        raise AssertionError(f"{function.name}: {problem}")


def _check_parameters(function: _Function, offered: Mapping[str, Any]) -> None:
    """Raise an AssertionError if a parameter has neither a default nor an argument."""
    for name in function.settings.keys() - function.parameters.keys():
        raise ValueError(f"{name}: is no parameter of {function.name}")
    for name, parameter in function.parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise AssertionError(f"{function.name}: its parameter {name} must be one that can be passed by name")
        is_required = parameter.default is parameter.empty and "VAR" not in parameter.kind.name
        if is_required and name not in {**offered, **function.settings}:
            raise AssertionError(f"{function.name}: its parameter {name} needs a value or a default")


def _is_close(value: Tensor, expected: Tensor) -> bool:
    return torch.allclose(value, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def _make_batch(*, token_advantages: bool) -> _Batch:
    generator = torch.Generator().manual_seed(0)
    shape = rows, seq = len(LENGTHS), max(LENGTHS)
    old = -1.1 - 2 * torch.rand(shape, generator=generator)
    advantages = torch.tensor([[1.0], [-0.5], [0.75], [-1.25]])
    if token_advantages:
        advantages = advantages * torch.linspace(0.5, 1.5, seq)
    return {
        "policy_log_probs": old + torch.rand(shape, generator=generator) - 0.5,
        "old_log_probs": old,
        "advantages": advantages,
        "raw_rewards_or_advantages": advantages,
        "raw_rewards": torch.tensor([[1.0], [0.0], [1.0], [0.5]]),
        "response_mask": torch.arange(seq) < torch.tensor(LENGTHS)[:, None],
        "penalized": torch.zeros(rows, seq, dtype=torch.bool),
    }


_SIGNALS = ("advantages", "raw_rewards_or_advantages", "raw_rewards")


def _check_shape(objective: _Function, batch: _Batch) -> str | None:
    result = objective.call(batch)
    losses, flags = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    per_token = tuple(batch["response_mask"].shape)
    allowed = (per_token, (per_token[0], 1))
    wanted = f"{allowed[0]}, a loss per token, or {allowed[1]}, per response"
    if not isinstance(losses, Tensor):
        return f"returns {type(losses).__name__}, but must return a tensor of shape {wanted}"
    if tuple(losses.shape) not in allowed or not losses.is_floating_point():
        return f"returns shape {tuple(losses.shape)}, but must return {wanted}"
    if not isinstance(flags, Mapping):
        return f"returns {type(flags).__name__} beside the losses, but must return a dict of flags"
    for name, flag in flags.items():
        if not isinstance(flag, Tensor) or flag.dtype != torch.bool or tuple(flag.shape) not in allowed:
            return f"returns a flag {name} that is no Bool tensor of shape {allowed[0]} or {allowed[1]}"
    return None


def _check_gradient(objective: _Function, batch: _Batch) -> str | None:
    others = ("old_log_probs", *_SIGNALS)
    leaves = {name: batch[name].clone().requires_grad_() for name in ("policy_log_probs", *others)}
    result = objective.call({**batch, **leaves})
    losses = result[0] if isinstance(result, tuple) else result
    if losses.requires_grad:
        losses.sum().backward()
    policy = leaves["policy_log_probs"].grad
    if policy is None or not (policy != 0).any():
        return "has no gradient in policy_log_probs, so it would train nothing"
    reached = [name for name in others if leaves[name].grad is not None]
    if reached:
        return f"has a gradient in {reached[0]}; it must have one in policy_log_probs alone, so detach the rest"
    return None


def _check_finite(objective: _Function, batch: _Batch) -> str | None:
    outcome = objective.describe(batch)
    for what, values in (("loss", outcome.losses), ("gradient", outcome.gradient)):
        broken = ~values.isfinite().all(dim=1)
        if broken.any():
            row = int(broken.nonzero()[0])
            return f"has a {what} that is not finite for a response of {LENGTHS[row]} tokens"
    return None


def _check_rows(objective: _Function, batch: _Batch) -> str | None:
    whole = objective.describe(batch)
    for rows in ([0], [1, 2], [3, 0]):
        part = objective.describe({name: value[rows] for name, value in batch.items()})
        same = _is_close(part.losses, whole.losses[rows])
        if not (same and _is_close(part.gradient, whole.gradient[rows])):
            return "gives a response another loss or gradient in another micro-batch; its rows must be independent"
    return None


def _check_padding(objective: _Function, batch: _Batch) -> str | None:
    mask, whole = batch["response_mask"], objective.describe(batch)
    seq = mask.shape[1]
    wide = {
        name: torch.nn.functional.pad(value, (0, 2)) if value.shape[1] == seq else value
        for name, value in batch.items()
    }
    padded = objective.describe(wide)
    counted = mask if whole.losses.shape == mask.shape else mask.any(dim=1, keepdim=True)
    for shown, before, after in ((counted, whole.losses, padded.losses), (mask, whole.gradient, padded.gradient)):
        if not _is_close(after[:, : shown.shape[1]][shown], before[shown]):
            return "changes with the number of padding columns; use response_mask in every mean and sum over tokens"
    return None


def _check_mask(objective: _Function, batch: _Batch) -> str | None:
    mask, whole = batch["response_mask"], objective.describe(batch)
    hidden = ~mask if whole.losses.shape == mask.shape else ~mask.any(dim=1, keepdim=True)
    for garbage in (torch.nan, torch.inf, -torch.inf, 1e30):
        tokens = {
            name: torch.where(mask, value, garbage)
            for name, value in batch.items()
            if value.shape == mask.shape and value.is_floating_point()
        }
        outcome = objective.describe({**batch, **tokens})
        if not (outcome.losses[hidden] == 0).all() or not (outcome.gradient[~mask] == 0).all():
            return f"has a loss or gradient other than 0 outside response_mask, where a log-prob is {garbage}"
        same = torch.equal(outcome.losses, whole.losses) and torch.equal(outcome.gradient, whole.gradient)
        if not same:
            return f"changes with a log-prob of {garbage} outside response_mask; replace what is outside first"
    return None


def _check_nan(objective: _Function, batch: _Batch) -> str | None:
    policy = batch["policy_log_probs"].clone()
    policy[0, 1] = torch.nan
    losses = objective.describe({**batch, "policy_log_probs": policy}).losses
    if not losses[0].isnan().any():
        return "hides a log-prob that is NaN; a broken number must reach the loss"
    return None


def _check_bounded(objective: _Function, batch: _Batch) -> str | None:
    for gap in (1e4, -1e4):
        policy, old = batch["policy_log_probs"].clone(), batch["old_log_probs"].clone()
        old[:, 0] = -1.0 - abs(gap)
        policy[:, 0] = old[:, 0] + gap
        outcome = objective.describe({**batch, "policy_log_probs": policy, "old_log_probs": old})
        if not (outcome.losses.isfinite().all() and outcome.gradient.isfinite().all()):
            return f"is not finite at a log ratio of {gap:g}; clamp the log ratio before the exponential"
    return None


def _check_signal(objective: _Function, batch: _Batch) -> str | None:
    if not set(_SIGNALS) & set(objective.parameters):
        return None
    silent = {name: torch.zeros_like(batch[name]) for name in _SIGNALS}
    if (objective.describe({**batch, **silent}).gradient != 0).any():
        return "has a gradient where advantage and reward are 0"
    return None


def _check_on_policy(objective: _Function, batch: _Batch) -> str | None:
    outcome = objective.describe({**batch, "policy_log_probs": batch["old_log_probs"]})
    mask = batch["response_mask"]
    signal = next((batch[name] for name in _SIGNALS if name in objective.parameters), torch.ones(len(mask), 1))
    whole, of_mean = torch.ones(()), 1 / mask.sum(dim=1, keepdim=True).clamp(min=1)
    shares = [whole] if outcome.losses.shape == mask.shape else [whole, of_mean]
    gradient = torch.where(mask, outcome.gradient, 0.0)
    expected = torch.where(mask, -signal, 0.0)
    if not any(_is_close(gradient, expected * share) for share in shares):
        place = tuple(((gradient - expected).abs() > 1e-5).nonzero()[0])
        found = f"{gradient[place].item():.3g}, not {expected[place].item():.3g}"
        return f"has another gradient than REINFORCE (-A for each token) where no policy has moved: {found}"
    return None


OBJECTIVE_LAWS: Mapping[str, Callable[[_Function, _Batch], str | None]] = {
    "shape": _check_shape,
    "gradient": _check_gradient,
    "finite": _check_finite,
    "rows": _check_rows,
    "padding": _check_padding,
    "mask": _check_mask,
    "nan": _check_nan,
    "bounded": _check_bounded,
    "signal": _check_signal,
    "on_policy": _check_on_policy,
}
"""The laws of `check_objective`, by name."""
REQUIRED_LAWS = ("shape", "gradient", "finite", "rows", "padding")
"""The laws of objectives without which a run would train on something else than it says."""


_Inputs = Mapping[str, Any]


def _check_advantage_shape(estimator: _Function, inputs: _Inputs) -> str | None:
    advantages = estimator.call(inputs)
    wanted = tuple(inputs["rewards"].shape)
    if not isinstance(advantages, Tensor) or tuple(advantages.shape) != wanted:
        found = tuple(advantages.shape) if isinstance(advantages, Tensor) else type(advantages).__name__
        return f"returns {found}, but must return a tensor of shape {wanted}, an advantage per response"
    return None if advantages.isfinite().all() else "returns an advantage that is not finite"


def _check_unscored(estimator: _Function, inputs: _Inputs) -> str | None:
    rewards = inputs["rewards"].clone()
    rewards[1] = torch.nan
    advantages = estimator.call({**inputs, "rewards": rewards})
    if advantages[1] != 0:
        return f"gives a response without a reward (NaN) the advantage {advantages[1].item():g} instead of 0"
    if not advantages.isfinite().all():
        return "gives other responses NaN where one has no reward (NaN)"
    return None


def _check_order(estimator: _Function, inputs: _Inputs) -> str | None:
    groups, advantages = torch.tensor([3, 1, 0, 4, 2]), estimator.call(inputs)
    order = (4 * groups[:, None] + torch.tensor([2, 0, 3, 1])).flatten()
    moved = {"rewards": inputs["rewards"][order], "lengths": inputs["lengths"][order]}
    shuffled = estimator.call({**inputs, **moved, "greedy_rewards": inputs["greedy_rewards"][groups]})
    if not _is_close(shuffled, advantages[order]):
        return "depends on the order of the groups, or of the responses in a group"
    return None


def _check_equal_rewards(estimator: _Function, inputs: _Inputs) -> str | None:
    advantages = estimator.call(inputs)
    if (advantages[8:12] != 0).any() or (advantages[16:] != 0).any():
        return "gives a group of equal rewards advantages other than 0"
    return None


def _check_detached(estimator: _Function, inputs: _Inputs) -> str | None:
    advantages = estimator.call({**inputs, "rewards": inputs["rewards"].clone().requires_grad_()})
    return "has a gradient in rewards; detach the advantages" if advantages.requires_grad else None


ADVANTAGE_LAWS: Mapping[str, Callable[[_Function, _Inputs], str | None]] = {
    "shape": _check_advantage_shape,
    "unscored": _check_unscored,
    "order": _check_order,
    "equal_rewards": _check_equal_rewards,
    "detached": _check_detached,
}
"""The laws of `check_advantage`, by name."""

"""Expectations taken exactly, by summing over every response of two tokens from a vocabulary of three."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import (
    aggregate_token_losses,
    compute_group_normalized_rewards,
    compute_policy_gradient_loss,
    grpo_microbatch_loss,
    select_log_probs,
)
from tests.oracle import reference
from tests.strategies import fewer, floats, tensors

VOCAB = 3
RESPONSES = torch.tensor(list(itertools.product(range(VOCAB), repeat=2)))
MASK = torch.ones(len(RESPONSES), 2, dtype=torch.bool)
# One distribution for the first token, and one for the second after each first.
PARAMETERS = tensors((1 + VOCAB, VOCAB), floats(-2, 2))
REWARDS = tensors((len(RESPONSES), 1), floats(-2, 2))


def log_probs_of(parameters: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    contexts = torch.stack([torch.zeros(len(responses), dtype=torch.long), 1 + responses[:, 0]], dim=1)
    return select_log_probs(parameters[contexts], responses)


def expected_loss(loss_type, parameters, sampler, rewards) -> torch.Tensor:
    """The loss of each response, a sum over its tokens, weighted by its probability under the sampler."""
    old = log_probs_of(sampler, RESPONSES).detach()
    losses, _ = compute_policy_gradient_loss(
        log_probs_of(parameters, RESPONSES), loss_type, rewards, rewards, old, cliprange=0.2
    )
    weights = old.sum(dim=1, keepdim=True).exp()
    return aggregate_token_losses(weights * losses, MASK, "token_mean", normalize_constant=1.0)


def gradient_of_expected_reward(parameters, rewards) -> torch.Tensor:
    parameters = parameters.clone().requires_grad_()
    probabilities = log_probs_of(parameters, RESPONSES).sum(dim=1, keepdim=True).exp()
    return torch.autograd.grad((probabilities * rewards).sum(), parameters)[0]


@given(PARAMETERS, REWARDS, st.sampled_from(["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"]))
def test_the_expected_on_policy_gradient_is_that_of_the_expected_reward(parameters, rewards, loss_type):
    """E[grad loss] = -grad E[R]: the policy-gradient theorem, for every loss at pi = pi_old."""
    policy = parameters.clone().requires_grad_()
    (actual,) = torch.autograd.grad(expected_loss(loss_type, policy, parameters, rewards), policy)
    assert_close(actual, -gradient_of_expected_reward(parameters, rewards), rtol=1e-9, atol=1e-12)


@given(PARAMETERS, PARAMETERS, tensors((VOCAB, 1), floats(-2, 2)))
def test_the_ratio_makes_up_for_the_sampler(policy, sampler, rewards):
    """One-token responses: E_old[ratio * R] = E[R] in value and gradient, and E_old[ratio] = 1."""
    responses, first = torch.arange(VOCAB)[:, None], policy[:1].clone().requires_grad_()
    old = select_log_probs(sampler[:1].expand(VOCAB, -1), responses[:, 0])[:, None]

    def expectation(values):
        current = select_log_probs(first.expand(VOCAB, -1), responses[:, 0])[:, None]
        losses, _ = compute_policy_gradient_loss(current, "grpo_no_clip", None, values, old)
        return -(old.exp() * losses).sum()

    assert_close(expectation(torch.ones(VOCAB, 1).double()).item(), 1.0)
    direct = (first.softmax(dim=1) * rewards.T).sum()
    assert_close(expectation(rewards), direct)
    (actual,) = torch.autograd.grad(expectation(rewards), first)
    (expected,) = torch.autograd.grad(direct, first)
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@given(PARAMETERS, PARAMETERS)
def test_the_drift_metrics_estimate_what_they_say(policy, sampler):
    """E_old[approx_kl] = KL(old || policy) and E_old[mean_ratio] = 1, sample by sample."""
    one = torch.ones(1, 1)
    p, q = sampler[0].softmax(0), policy[0].softmax(0)
    approx_kl = mean_ratio = 0.0
    for token in range(VOCAB):
        _, metadata = grpo_microbatch_loss(
            q[token].log().view(1, 1), one.bool(), 1, "grpo_no_clip", None, one, p[token].log().view(1, 1)
        )
        approx_kl += (p[token] * metadata["approx_kl"]).item()
        mean_ratio += (p[token] * metadata["mean_ratio"]).item()
    assert_close(approx_kl, reference.kl(p.tolist(), q.tolist()), rtol=1e-9, atol=1e-12)
    assert_close(mean_ratio, 1.0)


@fewer
@given(tensors((1, VOCAB), floats(-2, 2)), tensors((VOCAB,), st.sampled_from([0.0, 0.25, 1.0])), st.integers(2, 3))
def test_the_group_mean_costs_a_known_factor(parameters, rewards, size):
    """Over every group of G one-token responses, centered advantages give (G-1)/G of the gradient of E[R]."""
    policy = parameters.clone().requires_grad_()
    table = dict(enumerate(rewards.tolist()))
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(VOCAB), repeat=size):
        names = [str(token) for token in group]
        advantages, _, _ = compute_group_normalized_rewards(
            lambda response, truth: {"reward": table[int(response)]}, names, names, size, 0.0, False
        )
        log_probs = select_log_probs(policy.expand(size, -1), torch.tensor(group))[:, None]
        loss, _ = grpo_microbatch_loss(
            log_probs, torch.ones(size, 1).bool(), 1, "reinforce_with_baseline", None, advantages[:, None]
        )
        total = total + log_probs.sum().exp().detach() * loss
    (actual,) = torch.autograd.grad(total, policy)
    expected_reward = (policy.softmax(dim=1) * rewards).sum()
    (expected,) = torch.autograd.grad(expected_reward, policy)
    assert_close(actual, -(size - 1) / size * expected, rtol=1e-5, atol=1e-7)

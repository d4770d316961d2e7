"""Expectations taken exactly, by summing over every response of two tokens from a vocabulary of three."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import (
    aggregate_token_losses,
    compose_policy_loss,
    compute_collision_probs,
    compute_group_normalized_rewards,
    compute_importance_ratios,
    compute_leave_one_out_advantages,
    compute_maxrl_advantages,
    compute_naive_policy_gradient_loss,
    compute_otb_advantages,
    compute_pkpo_advantages,
    compute_policy_gradient_loss,
    compute_remax_advantages,
    compute_reward_to_go,
    estimate_kl,
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


def truncated(parameters: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a sampler left of each context: the two likeliest tokens, and token 0 never first (a minimum length)."""
    shortest = parameters.clone()
    shortest[0, 0] = -torch.inf
    kept = shortest.topk(2, dim=1).indices
    contexts = torch.stack([torch.zeros(len(RESPONSES), dtype=torch.long), 1 + RESPONSES[:, 0]], dim=1)
    return {"kept_ids": kept[contexts]}


def gradients_under_truncation(parameters, rewards) -> dict[str, torch.Tensor]:
    """E[grad loss] of REINFORCE over the responses of a truncated sampler, with its sets replayed and without."""
    sets = truncated(parameters)
    possible = (sets["kept_ids"] == RESPONSES[..., None]).any(dim=2).all(dim=1)
    responses, kept = RESPONSES[possible], sets["kept_ids"][possible]
    contexts = torch.stack([torch.zeros(len(responses), dtype=torch.long), 1 + responses[:, 0]], dim=1)
    policy = parameters.clone().requires_grad_()
    replayed = select_log_probs(policy[contexts], responses, kept_ids=kept)
    whole = select_log_probs(policy[contexts], responses)
    probabilities = replayed.sum(dim=1, keepdim=True).exp()
    assert_close(probabilities.sum().item(), 1.0)
    objectives = {"exact": -(probabilities * rewards[possible]).sum()}
    for name, log_probs in (("replayed", replayed), ("whole", whole)):
        losses = compute_naive_policy_gradient_loss(rewards[possible], log_probs)
        objectives[name] = (probabilities.detach() * losses).sum()
    # How much of the policy the sampler left, response by response.
    left = (whole - replayed).sum(dim=1, keepdim=True)
    objectives["lost"] = -(probabilities.detach() * rewards[possible] * left).sum()
    ratios = (whole - replayed).exp()
    gradients = {name: torch.autograd.grad(value, policy, retain_graph=True)[0] for name, value in objectives.items()}
    return gradients | {"mean_ratio": (probabilities * ratios).sum(dim=0).detach()}


@given(PARAMETERS, REWARDS)
def test_replayed_sets_give_gradient_of_truncated_reward(parameters, rewards):
    """With the sets, the policy-gradient theorem for the truncated policy; without, the pull of the sets is added."""
    gradients = gradients_under_truncation(parameters, rewards)
    assert_close(gradients["replayed"], gradients["exact"], rtol=1e-9, atol=1e-12)
    assert_close(gradients["whole"], gradients["exact"] + gradients["lost"], rtol=1e-9, atol=1e-12)
    assert (gradients["mean_ratio"] < 1).all()  # it would be 1 if the sampler drew from the policy


@given(PARAMETERS)
def test_equal_rewards_have_gradient_only_without_replay(parameters):
    """What is lost: without any signal, unreplayed REINFORCE takes probability from what the sampler left out."""
    gradients = gradients_under_truncation(parameters, torch.ones(len(RESPONSES), 1).double())
    assert_close(gradients["replayed"], torch.zeros_like(parameters), rtol=0, atol=1e-12)
    assert gradients["whole"].abs().max() > 1e-3
    policy = parameters.clone().requires_grad_()
    kept = truncated(parameters)["kept_ids"][0, 0]
    left = policy[0].log_softmax(dim=0)[kept].exp().sum()
    (direction,) = torch.autograd.grad(left, policy)
    assert (direction[0] * -gradients["whole"][0]).sum() > 0


def gradient_of_expected_reward(parameters, rewards) -> torch.Tensor:
    parameters = parameters.clone().requires_grad_()
    probabilities = log_probs_of(parameters, RESPONSES).sum(dim=1, keepdim=True).exp()
    return torch.autograd.grad((probabilities * rewards).sum(), parameters)[0]


@given(PARAMETERS, REWARDS, st.sampled_from(["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"]))
def test_on_policy_gradient_is_unbiased(parameters, rewards, loss_type):
    """E[grad loss] = -grad E[R]: the policy-gradient theorem, for every loss at pi = pi_old."""
    policy = parameters.clone().requires_grad_()
    (actual,) = torch.autograd.grad(expected_loss(loss_type, policy, parameters, rewards), policy)
    assert_close(actual, -gradient_of_expected_reward(parameters, rewards), rtol=1e-9, atol=1e-12)


@given(PARAMETERS, PARAMETERS, tensors((VOCAB, 1), floats(-2, 2)))
def test_token_ratio_corrects_for_sampler(policy, sampler, rewards):
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
def test_drift_metrics_estimate_their_divergence(policy, sampler):
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
def test_group_mean_scales_gradient_by_known_factor(parameters, rewards, size):
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


def grouped_gradient(estimator, parameters, rewards, size):
    """E over every group of G one-token responses of mean_i A_i grad log pi(o_i), as an ascent direction."""
    policy = parameters.clone().requires_grad_()
    log_probs = policy.log_softmax(dim=1)[0]
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(VOCAB), repeat=size):
        picked = log_probs[torch.tensor(group)]
        advantages = estimator(rewards[torch.tensor(group)], size)
        total = total + picked.sum().exp().detach() * (advantages * picked).mean()
    return torch.autograd.grad(total, policy)[0]


ONE_TOKEN = tensors((1, VOCAB), floats(-2, 2))


@fewer
@given(ONE_TOKEN, tensors((VOCAB,), floats(-2, 2)), st.integers(2, 4))
def test_leave_one_out_is_unbiased(parameters, rewards, size):
    policy = parameters.clone().requires_grad_()
    (expected,) = torch.autograd.grad((policy.softmax(dim=1) * rewards).sum(), policy)
    actual = grouped_gradient(compute_leave_one_out_advantages, parameters, rewards, size)
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@fewer
@given(ONE_TOKEN, tensors((VOCAB,), floats(-2, 2)), st.integers(2, 4), st.data())
def test_pkpo_is_unbiased_for_best_of_k(parameters, rewards, size, data):
    k = data.draw(st.integers(1, size))
    policy = parameters.clone().requires_grad_()
    probabilities = policy.softmax(dim=1)[0]
    best = sum(
        probabilities[torch.tensor(draws)].prod() * rewards[torch.tensor(draws)].max()
        for draws in itertools.product(range(VOCAB), repeat=k)
    )
    (expected,) = torch.autograd.grad(best, policy)
    actual = grouped_gradient(lambda r, n: compute_pkpo_advantages(r, n, k), parameters, rewards, size)
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@fewer
@given(ONE_TOKEN, st.sampled_from([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), st.integers(2, 4))
def test_maxrl_gradient_is_that_of_truncated_log_success(parameters, rewards, size):
    """G - 1 terms of grad log p = sum_k (1 - p)^(k-1) grad p: the mean of the group costs the last one."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    policy = parameters.clone().requires_grad_()
    success = (policy.softmax(dim=1) * rewards).sum()
    (expected,) = torch.autograd.grad(-sum((1 - success) ** k / k for k in range(1, size)), policy)
    actual = grouped_gradient(compute_maxrl_advantages, parameters, rewards, size)
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)


POSSIBLE = torch.tensor([0.5, 0.25, 0.25]).log().double().expand(1 + VOCAB, VOCAB)
# Each response as often in a group of 16 as under this policy: sums over the group are expectations.
POPULATION = RESPONSES.repeat_interleave(
    (16 * log_probs_of(POSSIBLE, RESPONSES).sum(dim=1).exp()).round().long(), dim=0
)


@given(tensors((len(RESPONSES),), floats(-2, 2)))
@fewer
def test_token_baseline_keeps_gradient_and_has_least_variance_at_first_token(by_response):
    """In a group that equals its expectation, a token's baseline is a constant, which adds nothing to a gradient."""
    policy = POSSIBLE.clone().requires_grad_()
    rewards = by_response[3 * POPULATION[:, 0] + POPULATION[:, 1]]
    contexts = torch.stack([torch.zeros(16, dtype=torch.long), 1 + POPULATION[:, 0]], dim=1)
    log_probs, sharpened = (select_log_probs(policy[contexts], POPULATION, temperature=tau) for tau in (1.0, 0.5))
    collisions = compute_collision_probs(log_probs, sharpened)
    advantages = compute_otb_advantages(rewards, 16, log_probs, collisions, torch.ones(16, 2).bool())
    (actual,) = torch.autograd.grad((advantages * log_probs).sum() / 16, policy, retain_graph=True)
    assert_close(actual, gradient_of_expected_reward(policy.detach(), by_response[:, None]), rtol=1e-9, atol=1e-9)

    scores = [torch.autograd.grad(log_probs[k, 0], policy, retain_graph=True)[0][0] for k in range(16)]
    squares = torch.stack(scores).square().sum(dim=1)

    def second_moment(baseline):
        return (squares * (rewards - baseline).square()).sum().item()

    if rewards.max() - rewards.min() > 1e-3:
        best = (rewards - advantages[:, 0]).mean()
        moments = [second_moment(best + shift) for shift in (-0.1, 0.1)]
        assert second_moment(best) < min(moments)
        assert second_moment(best) <= second_moment(rewards.mean()) + 1e-12


def kl_gradient(estimator, policy, reference, sampler):
    """The expected gradient of an estimate used as a loss, one token per response, sampled from `sampler`."""
    policy = policy.clone().requires_grad_()
    current, fixed, old = (x.log_softmax(dim=1).T for x in (policy, reference, sampler))
    values = estimate_kl(current, fixed, estimator, old_log_probs=old)
    return torch.autograd.grad((old.exp().detach() * values).sum(), policy)[0]


def divergence_gradient(policy, reference, *, reverse):
    policy = policy.clone().requires_grad_()
    p, q = policy.log_softmax(dim=1), reference.log_softmax(dim=1)
    value = (p.exp() * (p - q)).sum() if reverse else (q.exp() * (q - p)).sum()
    return torch.autograd.grad(value, policy)[0]


@given(ONE_TOKEN, ONE_TOKEN)
def test_kl_estimator_gradient_is_that_of_its_divergence(policy, reference):
    gradients = {name: kl_gradient(name, policy, reference, policy) for name in ("k1", "k2", "k3", "ratio_k3")}
    reverse = divergence_gradient(policy, reference, reverse=True)
    assert_close(gradients["k1"], torch.zeros_like(policy), rtol=0, atol=1e-12)
    assert_close(gradients["k2"], reverse, rtol=1e-9, atol=1e-12)
    assert_close(gradients["k3"], divergence_gradient(policy, reference, reverse=False), rtol=1e-9, atol=1e-12)
    assert_close(gradients["ratio_k3"], reverse, rtol=1e-9, atol=1e-12)
    trained = policy.clone().requires_grad_()
    variation = (trained.softmax(dim=1) - reference.softmax(dim=1)).abs().sum() / 2
    (total_variation,) = torch.autograd.grad(variation, trained)
    kinks = (policy.log_softmax(dim=1) - reference.log_softmax(dim=1)).abs().min() < 1e-9
    if not kinks:
        assert_close(kl_gradient("abs", policy, reference, policy), 2 * total_variation, rtol=1e-9, atol=1e-12)


@given(ONE_TOKEN, ONE_TOKEN, ONE_TOKEN)
def test_ratio_k3_off_policy_gradient_is_that_of_kl(policy, reference, sampler):
    """Sampled from another policy, ratio_k3 still descends KL(policy || reference), and has it as its mean."""
    actual = kl_gradient("ratio_k3", policy, reference, sampler)
    assert_close(actual, divergence_gradient(policy, reference, reverse=True), rtol=1e-9, atol=1e-12)
    current, fixed, old = (x.log_softmax(dim=1).T for x in (policy, reference, sampler))
    mean = (old.exp() * estimate_kl(current, fixed, "ratio_k3", old_log_probs=old)).sum().item()
    expected = reference_kl(policy, reference)
    assert_close(mean, expected, rtol=1e-9, atol=1e-12)
    for name in ("k1", "k3"):
        mean = (current.exp() * estimate_kl(current, fixed, name)).sum().item()
        assert_close(mean, expected, rtol=1e-9, atol=1e-12)


def reference_kl(policy, other):
    return reference.kl(policy.softmax(dim=1)[0].tolist(), other.softmax(dim=1)[0].tolist())


@given(PARAMETERS, PARAMETERS, floats(0, 2))
def test_kl_in_reward_gradient_is_that_of_response_kl(parameters, other, beta):
    """A = -beta * reward-to-go of k1 has -beta grad KL(pi || ref) over two tokens as its policy gradient."""
    policy = parameters.clone().requires_grad_()
    log_probs, fixed = log_probs_of(policy, RESPONSES), log_probs_of(other, RESPONSES)
    penalty = beta * compute_reward_to_go(estimate_kl(log_probs, fixed, "k1"), MASK)
    losses = compute_naive_policy_gradient_loss(-penalty, log_probs)
    weights = log_probs.sum(dim=1, keepdim=True).exp().detach()
    (actual,) = torch.autograd.grad((weights * losses).sum(), policy)
    whole = log_probs_of(policy, RESPONSES).sum(dim=1)
    divergence = (whole.exp() * (whole - fixed.sum(dim=1))).sum()
    (expected,) = torch.autograd.grad(beta * divergence, policy)
    assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@given(PARAMETERS, PARAMETERS, REWARDS)
def test_sequence_ratio_corrects_for_sampler(parameters, sampler, rewards):
    """E over the sampler of the product ratio times REINFORCE is the gradient of E[R]: only variance is lost."""
    policy = parameters.clone().requires_grad_()
    log_probs, drawn = log_probs_of(policy, RESPONSES), log_probs_of(sampler, RESPONSES)
    ratios = compute_importance_ratios(log_probs, drawn, MASK, "sequence")
    losses = compute_naive_policy_gradient_loss(rewards, log_probs)
    loss = compose_policy_loss(losses, drawn.sum(dim=1, keepdim=True).exp().expand(-1, 2), importance_weights=ratios)
    (actual,) = torch.autograd.grad(loss, policy)
    assert_close(actual, -gradient_of_expected_reward(parameters, rewards), rtol=1e-9, atol=1e-12)


@given(PARAMETERS, REWARDS)
def test_baseline_of_question_keeps_gradient_unbiased(parameters, rewards):
    """ReMax: the greedy reward does not depend on the sample, so the expected gradient is that of the reward."""
    greedy = rewards[log_probs_of(parameters, RESPONSES).sum(dim=1).argmax()]
    advantages = compute_remax_advantages(rewards[:, 0], len(RESPONSES), greedy)[:, None]
    policy = parameters.clone().requires_grad_()
    loss = expected_loss("reinforce_with_baseline", policy, parameters, advantages)
    (actual,) = torch.autograd.grad(loss, policy)
    assert_close(actual, -gradient_of_expected_reward(parameters, rewards), rtol=1e-9, atol=1e-9)

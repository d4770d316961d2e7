"""Every recipe's gradient on one recorded batch equals an oracle's in plain floats; some recipes also learn."""

import math
from itertools import combinations

import pytest
import torch
from torch.testing import assert_close

from drivers.settings.recipes import QUICKSTART, RECIPES
from drivers.settings.tables import OBJECTIVES
from drivers.training.advantages import compute_rewards, prepare_rollouts
from drivers.training.batch import make_rollout_batch
from drivers.training.metrics import UpdateMetrics
from drivers.training.objective import weigh_step
from drivers.training.update import accumulate_gradients
from tests.drivers.helpers.letters import (
    clone_policy,
    letter_reward,
    make_completion,
    make_tiny_config,
)
from tests.drivers.helpers.runs import TWO_UPDATES, run_training
from tests.oracle import estimators
from tests.oracle import objectives as oracle
from tests.property.objectives import OF_RESPONSES
from tests.tiny import make_tiny_policy

GROUP_SIZE, LONGEST = 8, 6
REINFORCE = ("compute_naive_policy_gradient_loss", {})
CLIP = ("compute_grpo_clip_loss", {"cliprange": 0.2})
GRPO = ("normalize_group_rewards", {"advantage_eps": 1e-6, "normalize_by_std": True, "correction": 1})
CENTERED = ("normalize_group_rewards", {"advantage_eps": 0.0, "normalize_by_std": False, "correction": 1})
SAMPLER_AS_OLD = {"old": "sampler", "aggregation": "token_mean"}
# What each paper and program prescribes, in its own numbers: the loss, the advantage, and the rest of the objective.
PRESCRIBED = {
    "quickstart": (REINFORCE, GRPO, {}),
    "grpo": (CLIP, GRPO, {"kl_coef": 0.04}),
    "dr-grpo": (CLIP, CENTERED, {"aggregation": "constant"}),
    "dapo": (
        ("compute_grpo_clip_loss", {"cliprange": 0.2, "cliprange_high": 0.28}),
        GRPO,
        {"aggregation": "token_mean", "overlong_buffer": 1},
    ),
    "gspo": (("compute_gspo_loss", {"cliprange": 3e-4, "cliprange_high": 4e-4}), GRPO, {}),
    "gspo-token": (("compute_gspo_token_loss", {"cliprange": 3e-4, "cliprange_high": 4e-4}), GRPO, {}),
    "gmpo": (("compute_gmpo_loss", {"cliprange": 0.4, "cliprange_high": None}), GRPO, {}),
    "luspo": (("compute_luspo_loss", {"cliprange": 2e-3, "cliprange_high": 2.5e-3}), GRPO, {}),
    "cispo": (
        ("compute_cispo_loss", {"ratio_low": 0.0, "ratio_high": 5.0}),
        GRPO,
        {"aggregation": "token_mean"},
    ),
    "sapo": (("compute_sapo_loss", {"temperature_positive": 1.0, "temperature_negative": 1.05}), GRPO, {}),
    "vespo": (("compute_vespo_loss", {"positive": (2.0, 3.0), "negative": (3.0, 2.0)}), GRPO, SAMPLER_AS_OLD),
    "dppo-tv": (("compute_dppo_tv_loss", {"threshold_low": 0.2, "threshold_high": 0.2}), GRPO, SAMPLER_AS_OLD),
    "dppo-kl": (("compute_dppo_kl_loss", {"threshold": 0.05}), GRPO, SAMPLER_AS_OLD),
    "m2po": (("compute_grpo_no_clip_loss", {}), GRPO, SAMPLER_AS_OLD | {"second_moment": True}),
    "clip-cov": (CLIP, GRPO, {"aggregation": "token_mean", "covariance": "drop"}),
    "kl-cov": (
        ("compute_kl_cov_loss", {"kl_coef": 1.0}),
        GRPO,
        {"aggregation": "token_mean", "covariance": "penalize"},
    ),
    "rloo": (REINFORCE, ("compute_leave_one_out_advantages", {}), {"aggregation": "sequence_sum"}),
    "reinforce-plus-plus": (
        CLIP,
        ("rewards", {}),
        {"aggregation": "token_mean", "kl_in_reward": 0.01, "whitens": True},
    ),
    "reinforce-plus-plus-baseline": (CLIP, CENTERED, {"aggregation": "token_mean", "whitens": True}),
    "lite-ppo": (CLIP, ("compute_batch_std_advantages", {"advantage_eps": 1e-4}), {"aggregation": "token_mean"}),
    "gdpo": (CLIP, ("gdpo", {}), {}),
    "opo": (REINFORCE, ("compute_opo_advantages", {}), {"aggregation": "token_mean"}),
    "gpg": (REINFORCE, ("compute_gpg_advantages", {}), {"aggregation": "token_mean"}),
    "maxrl": (REINFORCE, ("compute_maxrl_advantages", {}), {"aggregation": "sequence_sum"}),
    "remax": (REINFORCE, ("compute_remax_advantages", {}), {"aggregation": "sequence_sum"}),
    "pass-at-k": (CLIP, ("compute_pass_at_k_advantages", {"k": 4}), {"aggregation": "token_mean"}),
    "pkpo": (REINFORCE, ("compute_pkpo_advantages", {"k": 4}), {"aggregation": "sequence_sum"}),
    "entropy": (REINFORCE, GRPO, {"entropy_coef": 0.005}),
    "cs336": (REINFORCE, GRPO, {}),
    "cs336-2026": (REINFORCE, GRPO, {}),
    "trl-default": (
        CLIP,
        (GRPO[0], GRPO[1] | {"advantage_eps": 1e-4}),
        {"aggregation": "token_mean", "importance_high": 3.0},
    ),
    "verl-default": (
        ("compute_grpo_clip_loss", {"cliprange": 0.2, "dual_clip": 3.0}),
        GRPO,
        {"aggregation": "token_mean"},
    ),
}
# What decides no gradient of a given batch: model, data, sizes and schedule, which these tests choose themselves.
OF_RUN = QUICKSTART.keys() | {"gradient_accumulation_steps", "group_size", "eval_steps"}
OBJECTIVE = {
    recipe: {name: value for name, value in settings.items() if name not in OF_RUN}
    for recipe, settings in RECIPES.items()
}
# The papers' share of tokens, 2 in 10,000, would select none of a batch of 100, and M2PO's 0.04 would drop none.
SCALED = {
    "m2po": {"second_moment_threshold": 0.02},
    "clip-cov": {"covariance_fraction": 0.2, "covariance_bounds": (0.05, 5.0)},
    "kl-cov": {"covariance_fraction": 0.2},
}


def perturb(policy, seed, scale):
    """Move all weights by noise, far enough that clip bounds are active."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


class Recorded:
    """32 responses of 4 questions, their rewards, and four policies: sampler, old, reference and current."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.old, self.reference = perturb(make_tiny_policy(0), 1, 0.01), make_tiny_policy(5)
        self.policy = perturb(clone_policy(self.old), 2, 0.02)
        self.completions = []
        for row in range(32):
            n_tokens = int(torch.randint(1, LONGEST + 1, (), generator=generator))
            tokens = torch.randint(5, 60, (n_tokens,), generator=generator).tolist()
            self.completions.append(make_completion([7, 8, 9 + row // GROUP_SIZE], tokens))
        noise = 0.2 * torch.randn(32, LONGEST, generator=generator)
        for row, values in enumerate(score_by_hand(self.old, self.completions)[0]):
            sampled = (values.detach() + noise[row, : len(values)]).tolist()
            one = self.completions[row]
            self.completions[row] = make_completion(one.prompt_token_ids, one.token_ids, sampled)
        right = map(int, "10010100010000001110111111001001")
        self.scores = [
            {"reward": float(r), "answer_reward": float(r), "format_reward": float(r or row % 3 == 0)}
            for row, r in enumerate(right)
        ]
        self.greedy = [0.0, 1.0, 1.0, 0.0]
        self.log_probs = {
            name: [values.tolist() for values in score_by_hand(policy, self.completions)[0]]
            for name, policy in (("old", self.old), ("reference", self.reference))
        } | {"sampler": [list(one.log_probs) for one in self.completions]}


def score_by_hand(policy, completions):
    """Return the log-probs and entropies of each response in float64, one forward pass per response."""
    policy = clone_policy(policy).double()
    log_probs, entropies = [], []
    for one in completions:
        ids = torch.tensor([*one.prompt_token_ids, *one.token_ids])
        rows = policy(ids[None]).logits[0, len(one.prompt_token_ids) - 1 : -1].log_softmax(-1)
        log_probs.append(rows.gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0])
        entropies.append(-(rows.exp() * rows).sum(-1))
    return log_probs, entropies, policy


def in_groups(values):
    return [values[begin : begin + GROUP_SIZE] for begin in range(0, len(values), GROUP_SIZE)]


def advantages_by_hand(advantage, recorded, more):
    """Return the advantage of each token, of all 32 responses."""
    (name, extra), lengths = advantage, [len(one.token_ids) for one in recorded.completions]
    rewards = [score["reward"] for score in recorded.scores]
    if buffer := more.get("overlong_buffer"):
        rewards = [r + min(0.0, (LONGEST - buffer - n) / buffer) for r, n in zip(rewards, lengths, strict=True)]
    if name == "rewards":
        per_response = rewards
    elif name == "gdpo":
        columns = [[score[part] for score in recorded.scores] for part in ("format_reward", "answer_reward")]
        per_response = estimators.gdpo([in_groups(column) for column in columns], [1.0, 1.0], 1e-4)
    else:
        extra = extra | {"lengths": in_groups(lengths), "greedy_rewards": recorded.greedy}
        per_response = estimators.advantages(name, in_groups(rewards), extra)
    per_token = [[a] * n for a, n in zip(per_response, lengths, strict=True)]
    if coef := more.get("kl_in_reward"):
        for row, values in enumerate(per_token):
            pairs = zip(recorded.log_probs["old"][row], recorded.log_probs["reference"][row], strict=True)
            gaps = [p - q for p, q in pairs]
            per_token[row] = [a - coef * math.fsum(gaps[t:]) for t, a in enumerate(values)]
    if more.get("whitens"):
        per_token = estimators.whiten(per_token, [[True] * n for n in lengths], 1e-8, 1)
    return per_token


def select_by_covariance(advantages, log_probs, drops):
    """Return the fifth of the tokens with the highest covariance of advantage and log-prob, as lists of flags."""
    pairs = [pair for a, p in zip(advantages, log_probs, strict=True) for pair in zip(a, p, strict=True)]
    means = [math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True)]
    low, high = SCALED["clip-cov"]["covariance_bounds"] if drops else (0.0, math.inf)
    products = [(a - means[0]) * (p - means[1]) for a, p in pairs]
    chosen = sorted((value for value in products if low < value < high), reverse=True)[: int(0.2 * len(pairs))]
    flags = iter([value in chosen for value in products])
    return [[next(flags) for _ in row] for row in advantages]


def gradient_by_hand(recipe, recorded, rows):
    """Return the loss and the gradient of one update, on the responses `rows` of the recorded batch."""
    (name, hyper), advantage, more = PRESCRIBED[recipe]
    whole = recorded.log_probs | {"advantages": advantages_by_hand(advantage, recorded, more)}
    advantages, old, reference, sampler = (
        [whole[name][row] for row in rows] for name in ("advantages", "old", "reference", "sampler")
    )
    completions = [recorded.completions[row] for row in rows]
    log_probs, entropies, policy = score_by_hand(recorded.policy, completions)
    masks = [[True] * len(one.token_ids) for one in completions]
    kept, penalized, corrections = masks, [[False] * len(row) for row in masks], [1.0] * len(rows)
    if covariance := more.get("covariance"):
        selected = select_by_covariance(advantages, old, covariance == "drop")
        assert any(map(any, selected))
        if covariance == "drop":
            kept = [[not flag for flag in row] for row in selected]
        else:
            penalized = selected
    if more.get("second_moment"):
        bound = SCALED["m2po"]["second_moment_threshold"]
        squares = [[(p - q) ** 2 for p, q in zip(*pair, strict=True)] for pair in zip(old, sampler, strict=True)]
        left = sorted(square for row in squares for square in row)
        while math.fsum(left) / len(left) > bound:
            left.pop()
        kept = [[square <= left[-1] for square in row] for row in squares]
        assert not all(map(all, kept))
    if bound := more.get("importance_high"):
        ratios = [math.exp(math.fsum(a) - math.fsum(b)) for a, b in zip(old, sampler, strict=True)]
        corrections = [ratio if ratio <= bound else 0.0 for ratio in ratios]
    aggregation = more.get("aggregation", "sequence_mean")
    constant = LONGEST if aggregation == "constant" else None
    sizes = [GROUP_SIZE] * (len(rows) // GROUP_SIZE)
    token_weights = oracle.weights(aggregation, masks, masks, constant, sizes, "count", "count")
    how = "sequence" if name in OF_RESPONSES else aggregation
    weights = oracle.weights(how, masks, kept, constant, sizes, "count", "count")
    total, surrogate, n_clipped = 0.0, torch.zeros((), dtype=torch.float64), 0
    for row, own in enumerate(log_probs):
        p, q = own.tolist(), (sampler if more.get("old") == "sampler" else old)[row]
        values, slopes, flags = oracle.response_oracle(name, p, q, advantages[row], penalized[row], hyper)
        n_clipped += sum(one.get("is_clipped", False) for one in (flags if isinstance(flags, list) else [flags]))
        if name in OF_RESPONSES:
            values = [values / len(p)] * len(p)
        for t, log_prob in enumerate(own):
            weight = corrections[row] * weights[row][0 if name in OF_RESPONSES else t]
            total, slope = total + weight * values[t], weight * slopes[t]
            if coef := more.get("kl_coef"):  # k3 = r - log r - 1 with r = reference / policy
                log_r = reference[row][t] - p[t]
                total += coef * token_weights[row][t] * (math.exp(log_r) - log_r - 1)
                slope += coef * token_weights[row][t] * (1 - math.exp(log_r))
            bonus = more.get("entropy_coef", 0.0) * token_weights[row][t]
            total -= bonus * entropies[row][t].item()
            surrogate = surrogate + slope * log_prob - bonus * entropies[row][t]
    assert n_clipped > 0 or "cliprange" not in hyper
    surrogate.backward()
    return total, torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.fixture(scope="module")
def recorded():
    return Recorded()


def gradients_of_updates(recorded, **settings):
    """Return loss and gradient of both updates that the loop makes on the recorded batch."""
    config = make_tiny_config(**TWO_UPDATES | settings, sampling_max_tokens=LONGEST)
    rewards = compute_rewards(config, recorded.completions, recorded.scores)
    rollouts = make_rollout_batch(recorded.completions, rewards, GROUP_SIZE)
    greedy = torch.tensor(recorded.greedy) if config.advantage == "remax" else None
    batch = prepare_rollouts(config, recorded.old, recorded.reference, rollouts, recorded.scores, greedy)
    for half in batch.split(config.train_batch_size):
        policy = clone_policy(recorded.policy)
        weighted, _ = weigh_step(config, half)
        loss = accumulate_gradients(policy, weighted, config, config.entropy_coef, UpdateMetrics())
        yield loss.item(), torch.cat([p.grad.flatten() for p in policy.parameters()]).double()


@pytest.mark.medium
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_gradient_equals_oracle(recipe, recorded):
    """Both updates of a rollout batch, by a policy that differs from the old one, the sampler and the reference."""
    gradients = []
    settings = OBJECTIVE[recipe] | SCALED.get(recipe, {})
    for number, (loss, gradient) in enumerate(gradients_of_updates(recorded, **settings)):
        total, expected = gradient_by_hand(recipe, recorded, range(16 * number, 16 * number + 16))
        assert loss == pytest.approx(total, rel=1e-4, abs=1e-6)
        assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
        gradients.append(gradient)
    assert gradients[0].abs().max() > 1e-3
    assert not torch.allclose(*gradients)


@pytest.mark.medium
def test_objectives_off_policy_differ(recorded):
    """No two objectives have the same gradient, unless their papers say so."""
    gradients = {}
    for loss_type, objective in OBJECTIVES.items():
        settings = SCALED.get(loss_type.replace("_", "-"), {})
        # Probabilities are about 1 in 100, so that a bound on the divergence must be small to be active.
        narrow = {"cliprange": 1e-5 if loss_type == "dppo_kl" else 0.005, "ratio_low": 0.95, "ratio_high": 1.05}
        settings |= {name: value for name, value in narrow.items() if name in objective.reads}
        (_, gradients[loss_type]), _ = gradients_of_updates(recorded, loss_type=loss_type, **settings)
    for first, second in combinations(gradients, 2):
        if {first, second} != {"gspo", "gspo_token"}:
            assert not torch.allclose(gradients[first], gradients[second], rtol=0, atol=1e-6), (first, second)


def test_every_recipe_has_prescribed_formula():
    assert PRESCRIBED.keys() == RECIPES.keys()


# One for each path through the loop; `make nightly` trains by all of them.
LEARNERS = ("grpo", "dapo", "gspo", "remax")


def reward_letter(response, ground_truth):
    """Return 1 or 0, for advantages that count right answers."""
    right = float(ground_truth in response)
    return {"reward": right, "format_reward": 1.0, "answer_reward": right}


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [name if name in LEARNERS else pytest.param(name, marks=pytest.mark.nightly) for name in RECIPES]
)
def test_recipe_learns_the_letter(tmp_path, recipe):
    settings = OBJECTIVE[recipe] | {"learning_rate": 1e-2}
    reward_fn = reward_letter if settings.get("advantage") == "pass_at_k" else letter_reward
    # Two updates per rollout batch: on-policy no bound is active, and all objectives are equal.
    _, steps, _ = run_training(tmp_path, reward_fn=reward_fn, **settings | TWO_UPDATES)
    gain = 0.1 if settings.get("kl_coef", 0.0) >= 0.1 else 0.6  # held back by design
    assert sum(row["reward"] for row in steps[-3:]) / 3 > gain + steps[0]["reward"]
    if settings.get("loss_type") in ("grpo_clip", "gspo", "gspo_token", "gmpo", "luspo"):
        assert max(row.get("clip_fraction", 0.0) for row in steps) > 0.01

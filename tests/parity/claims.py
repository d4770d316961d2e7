"""The specification's claims about TRL, verl and Liger that can be executed.

Each check runs their code and returns whether the claim holds, and the measured values as text.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import grpo_core as g
from tests.parity import members as m
from tests.parity import peers
from tests.parity.cases import Case, draw, place


class Claim(NamedTuple):
    section: str
    text: str
    check: Callable[[], tuple[bool, str]]


def _number(value: Tensor) -> float:
    return float(value.detach())


def _same(first: Tensor, second: Tensor) -> bool:
    return bool(torch.allclose(first.double(), second.double(), rtol=1e-6, atol=1e-9))


def _close(first: float, second: float, tolerance: float = 1e-6) -> bool:
    return math.isclose(first, second, rel_tol=tolerance, abs_tol=1e-12)


def _raises(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, AssertionError, NotImplementedError) as error:
        return type(error).__name__
    return "nothing"


def _list(values) -> str:
    return ", ".join(f"{float(value):.4g}" for value in values)


def _facts(facts: dict[str, bool]) -> tuple[bool, str]:
    """Return the verdict and text of a claim with several parts."""
    return all(facts.values()), "; ".join(f"{name}: {'yes' if fact else 'no'}" for name, fact in facts.items())


def _values(found: dict[str, float], expected: list[float], tolerance: float = 1e-3) -> tuple[bool, str]:
    holds = all(_close(a, b, tolerance) for a, b in zip(found.values(), expected, strict=True))
    return holds, "; ".join(f"{name} {value:.4g}" for name, value in found.items())


def _pull(loss: Callable[[Case], Tensor], case: Case) -> Tensor:
    """Return the weight of each token's advantage: -gradient / A, times the number of tokens."""
    (gradient,) = torch.autograd.grad(loss(case), case.policy)
    return -gradient / case.advantages * case.mask.sum()


def _of_rewards(rewards: list[float], group_sizes: list[int]) -> Case:
    rows = len(rewards)
    values = torch.tensor(rewards, dtype=torch.float64)
    return place([[0.0, 0.0]] * rows, [0.0] * rows, group_sizes=group_sizes, rewards=values)


# Advantages


def _spread(advantages: Callable[[Case], Tensor], pooled: int, inside: bool = False) -> tuple[int, float]:
    """Return (ddof, ε) of A = (r - mean) / (s + ε), s over `pooled` rewards, from two batches (0, a, 0, a).

    With `inside`, A = (r - mean) / sqrt(s² + ε).
    """
    power, a = (2 if inside else 1), 2.0**-10
    large, small = (
        (size / 2 / float(advantages(_of_rewards([0.0, size, 0.0, size], [2, 2]))[1].max())) ** power
        for size in (1.0, a)
    )
    eps = (small - a**power * large) / (1 - a**power)
    spreads = {ddof: (0.5 * math.sqrt(pooled / (pooled - ddof))) ** power for ddof in (0, 1)}
    return min(spreads, key=lambda ddof: abs(spreads[ddof] - (large - eps))), eps


def _check_spread(advantages: Callable[[Case], Tensor], pooled: int, eps: float, inside: bool = False):
    ddof, found = _spread(advantages, pooled, inside)
    return ddof == 1 and _close(found, eps, 0.02), f"ddof {ddof}, ε {found:.1e}"


def _vectorized_passes() -> tuple[bool, str]:
    rewards = [4096 + step / 8 for step in (0, 1, 3, 2)]
    found = peers.verl_advantages(_of_rewards(rewards, [4]), "grpo_vectorized")[:, 0]
    exact = g.normalize_group_rewards(torch.tensor(rewards, dtype=torch.float64), 4)
    error = float((found - exact).abs().max() / exact.abs().max())
    return error > 1e-2, f"rewards around 4096 give an error of {error:.0e}, so it takes two passes"


def _batch_std_is_of_raw_rewards() -> tuple[bool, str]:
    near, far = (
        float(peers.trl_advantages(_of_rewards([0.0, 1.0, x, x + 1.0], [2, 2]), scale_rewards="batch")[1])
        for x in (0.0, 10.0)
    )
    return far < near / 2, f"shifting one group by 10 changes an advantage from {near:.3g} to {far:.3g}"


def _singletons() -> tuple[bool, str]:
    case = _of_rewards([0.75, 0.0, 1.0], [1, 2])
    names = ["grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gpg"]
    found = {name: float(peers.verl_advantages(case, name)[0, 0]) for name in names}
    return _values(found, [0.75, 0.75, 0.75, 0.0, 0.75, 0.75 * 1.5], 1e-5)


def _unscored() -> tuple[bool, str]:
    found = peers.trl_advantages(_of_rewards([0.0, 1.0, math.nan, 0.0], [4]))
    ours = g.normalize_group_rewards(torch.tensor([0.0, 1.0, math.nan, 0.0]), 4, advantage_eps=1e-4)
    return _same(found, ours) and float(found[2]) == 0.0, f"rewards 0, 1, None, 0 give {_list(found)}"


def _dr_grpo() -> tuple[bool, str]:
    case = draw(0, ragged=False)
    kept = _same(peers.trl_advantages(case, loss_type="dr_grpo"), peers.trl_advantages(case))
    return _facts({"same advantages as other loss types": kept})


def _tool_spans() -> tuple[bool, str]:
    mask = torch.tensor([[True, False, True], [True, True, True]])
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    case = place([[0.0] * 3] * 2, [0.0, 0.0], mask=mask, token_rewards=rewards)
    found = peers.verl_advantages(case, "reinforce_plus_plus", token_rewards=rewards)
    return _same(found[0, 0], found[0, 2]), f"before and after the span: {_list(found[0, [0, 2]])}"


def _gpg_alpha() -> tuple[bool, str]:
    found = float(peers.verl_advantages(_of_rewards([1.0, 0.0, 0.5, 0.5], [2, 2]), "gpg")[0, 0]) / 0.5
    silent = peers.verl_advantages(_of_rewards([0.0, 0.0], [2]), "gpg").abs().max()
    return _close(found, 4 / 3) and silent == 0, f"α {found:.4g} if 3 of 4 rewards are nonzero; 0 if all are 0"


def _optimal_token_baseline() -> tuple[bool, str]:
    found = peers.verl_default_of("optimal_token_baseline", "handle_zero_tail")
    return found is True, f"handle_zero_tail={found}"


def _whiten_by_verl(case: Case) -> Tensor:
    return peers.verl_whiten(case.rewards[:, None], torch.ones(len(case.rewards), 1))


# Objectives


def _clamps() -> tuple[bool, str]:
    """Check the log of the loss at a log ratio of 30 nats, which a negative advantage does not clip."""
    case = place([[30.0]], [-1.0], level=-31.0)
    found = {
        f"verl {name}": math.log(_number(peers.verl_loss(case, name, clip_ratio_c=1e30)))
        for name in ("vanilla", "gspo", "clip_cov", "kl_cov", "geo_mean")
    }
    found["TRL"] = math.log(_number(peers.trl_loss(case, loss_type="dapo")))
    found["Liger"] = math.log(_number(peers.liger_loss(case, "dapo")))
    return _values(found, [20.0, 20.0, 20.0, 20.0, 20.0, 30.0, 30.0])


def _dual_clip_default() -> tuple[bool, str]:
    case = place([[2.0, 0.9]], [-1.0])
    found = _pull(lambda c: peers.verl_loss(c, "vanilla"), case)[0]
    delta = peers.trl_trainer("grpo").args.delta
    return found[0] == 0 and found[1] > 0 and delta is None, (
        f"verl: ratio e² has gradient {found[0]:.3g}, e^0.9 {found[1]:.3g}; TRL: delta={delta}"
    )


def _delta_is_dual_clip() -> tuple[bool, str]:
    case = draw(3)

    def agree(bound: float) -> bool:
        ours = m.mean(case, m.clip(case, 0.2, 0.28, bound))
        return _same(ours, peers.trl_loss(case, loss_type="dapo", epsilon_high=0.28, delta=bound))

    holds = agree(1.28) and agree(4.0) and not agree(1.1)
    return holds, f"bound 4: {agree(4.0)}; 1.28: {agree(1.28)}; 1.1: {agree(1.1)}"


def _clip_metric_after_delta() -> tuple[bool, str]:
    case = place([[math.log(1.5)]], [1.0])
    logged = []
    for options in ({}, {"delta": 1.1}):
        peers.trl_loss(case, loss_type="dapo", **options)
        logged.append(peers.trl_metric("clip_ratio/high_mean", loss_type="dapo", **options))
    return logged == [1.0, 0.0], f"ratio 1.5 counts {logged[0]:g} without delta, {logged[1]:g} with delta 1.1"


def _binding_side() -> tuple[bool, str]:
    case = place([[0.5, -0.5]], [-1.0])
    peers.trl_loss(case, loss_type="dapo")
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean")
    found = [peers.trl_metric(name, loss_type="dapo") for name in names]
    return found == [0.5, 0.0], f"ratios e^0.5 and e^-0.5 with A < 0: low {found[0]:g}, high {found[1]:g}"


def _gspo_forms() -> tuple[bool, str]:
    case = draw(2)
    sequence = torch.autograd.grad(
        peers.trl_loss(case, loss_type="grpo", importance_sampling_level="sequence"), case.policy
    )[0]
    token = torch.autograd.grad(peers.verl_loss(case, "gspo", "seq-mean-token-mean"), case.policy)[0]
    uneven = place([[0.0, 0.0]], [1.0, 3.0])
    pull = torch.autograd.grad(peers.verl_loss(uneven, "gspo"), uneven.policy)[0]
    return _facts(
        {
            "same gradient in verl and TRL": _same(sequence, token),
            "verl takes one A per token": pull[0, 1] == 3 * pull[0, 0],
        }
    )


def _who_overrides_the_aggregation() -> tuple[bool, str]:
    case = draw(1)
    return _facts(
        {
            name: _same(peers.verl_loss(case, name), peers.verl_loss(case, name, "seq-mean-token-mean"))
            for name in ("gspo", "sapo")
        }
    )


def _reach(loss: Callable[[Case], Tensor]) -> float:
    """Return the largest log ratio in nats at which a token with A > 0 still has a gradient, to 0.01."""
    steps = [step / 100 for step in range(100)]
    return max(step for step in steps if _pull(loss, place([[step - 0.005]], [1.0]))[0, 0] != 0)


def _gmpo_thresholds() -> tuple[bool, str]:
    found = {
        "TRL GMPO up to": _reach(lambda c: peers.trl_loss(c, "gmpo")),
        "verl geo_mean": _reach(lambda c: peers.verl_loss(c, "geo_mean")),
        "TRL GRPO (log 1.2)": _reach(lambda c: peers.trl_loss(c, loss_type="dapo")),
    }
    holds = all(abs(a - b) < 0.006 for a, b in zip(found.values(), (0.4, 0.2, math.log(1.2)), strict=True))
    return holds, "; ".join(f"{name} {value:.2f} nats" for name, value in found.items())


def _gmpo_without_tokens() -> tuple[bool, str]:
    case = place([[0.3], [0.3]], [0.0, 5.0])
    mask = torch.tensor([[True], [False]])
    losses = {"TRL": peers.trl_loss(case, "gmpo", mask=mask), "verl": peers.verl_loss(case, "geo_mean", mask=mask)}
    found = {name: _number(loss) for name, loss in losses.items()}
    pulled = any(torch.autograd.grad(loss, case.policy)[0][1].any() for loss in losses.values())
    return found == {"TRL": -2.5, "verl": -2.5} and not pulled, (
        f"two responses with A 0 and 5, the second empty: loss {found['TRL']:.3g} in TRL, "
        f"{found['verl']:.3g} in verl; gradient 0 in both"
    )


def _gmpo_plain_mean() -> tuple[bool, str]:
    case = draw(4)
    info = {"global_batch_info": {"batch_num_tokens": 1000, "global_batch_size": 100}}

    def moved(name: str) -> bool:
        plain = peers.verl_loss(case, name)
        return not _same(plain, peers.verl_loss(case, name, "seq-mean-token-sum", **info))

    return not moved("geo_mean") and moved("vanilla"), (
        f"mode and global batch change vanilla: {moved('vanilla')}; geo_mean: {moved('geo_mean')}"
    )


def _cispo_bounds() -> tuple[bool, str]:
    case = place([[math.log(ratio) for ratio in (0.1, 0.9, 3.0)]], [1.0])
    found = {
        "TRL": _pull(lambda c: peers.trl_loss(c, loss_type="cispo"), case)[0],
        "Liger": _pull(lambda c: peers.liger_loss(c, "cispo"), case)[0],
        "verl": _pull(lambda c: peers.verl_loss(c, "cispo"), case)[0],
    }
    expected = {"TRL": [0.1, 0.2, 0.2], "Liger": [0.1, 0.2, 0.2], "verl": [0.8, 0.9, 1.2]}
    holds = all(_same(found[name], torch.tensor(expected[name])) for name in found)
    return holds, "ratios 0.1, 0.9, 3 get weights " + "; ".join(f"{_list(w)} in {name}" for name, w in found.items())


def _sapo_at_one() -> tuple[bool, str]:
    found = {}
    for advantage, tau in ((1.0, 1.0), (-1.0, 1.05)):
        case = place([[0.0]], [advantage])
        expected = -2 * advantage / tau
        for name, loss in (("TRL", peers.trl_loss(case, loss_type="sapo")), ("verl", peers.verl_loss(case, "sapo"))):
            found[f"{name}, A {advantage:g}:"] = (_number(loss), expected)
    holds = all(_close(a, b) for a, b in found.values())
    return holds, "; ".join(f"{name} {a:.4g}" for name, (a, _) in found.items())


def _vespo_masked_ratio() -> tuple[bool, str]:
    case = place([[0.0, 0.0]], [1.0])
    weights = {}
    for name, importance in (("1, 1", [1.0, 1.0]), ("1, 0", [1.0, 0.0])):
        kappa = torch.tensor([importance], dtype=torch.float64)
        weights[name] = float(_pull(lambda c, k=kappa: peers.trl_loss(c, loss_type="vespo", importance=k), case)[0, 0])
    log_w = (math.log(weights["1, 0"]) - 3) / 2
    return _close(weights["1, 1"], 1.0) and abs(log_w + 18.42) < 0.01, (
        f"κ = 1, 1 gives weight {weights['1, 1']:.3g}; κ = 1, 0 gives weight {weights['1, 0']:.1e} (log W {log_w:.2f})"
    )


def _dppo_cap() -> tuple[bool, str]:
    case = place([[math.log(10.0)]], [1.0])
    found = float(_pull(lambda c: peers.verl_loss(c, "dppo_tv"), case)[0, 0])
    default = peers.verl_yaml("actor_rollout_ref.actor.clip_ratio_c")
    return _close(
        found, 3.0
    ) and default == 3.0, f"ratio 10 gets weight {found:.3g}; clip_ratio_c is {default:g} in its YAML"


def _clip_cov_is_random() -> tuple[bool, str]:
    case, losses = draw(5), []
    for seed in range(8):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            losses.append(round(_number(peers.verl_loss(case, "clip_cov", clip_cov_lb=0.1)), 9))
    return len(set(losses)) > 1, f"8 seeds give {len(set(losses))} different losses"


def _kl_cov_defaults() -> tuple[bool, str]:
    class_default = peers.verl_config().policy_loss.ppo_kl_coef
    yaml = peers.verl_yaml("actor_rollout_ref.actor.policy_loss.ppo_kl_coef")
    case = place([[2.0, 0.0]], [1.0], mask=torch.tensor([[True, True]]))
    unclipped = float(_pull(lambda c: peers.verl_loss(c, "kl_cov", ppo_kl_coef=0.0), case)[0, 0])
    return yaml == 0.1 and class_default == 0.1 and _close(unclipped, math.exp(2)), (
        f"{class_default:g} in the class, {yaml:g} in the YAML; ratio e² gets weight {unclipped:.3g}"
    )


def _dro() -> tuple[bool, str]:
    case = place([[0.5]], [2.0])
    (gradient,) = torch.autograd.grad(peers.verl_loss(case, "dro", dro_beta=0.1), case.policy)
    error = _raises(lambda: peers.verl_loss(case, "dro"))
    return _close(float(gradient), -2 + 0.1 * 0.5) and error == "ValueError", (
        f"A 2, d 0.5, β 0.1: gradient {float(gradient):.4g}; without β: {error}"
    )


def _off_policy_mask() -> tuple[bool, str]:
    case = draw(6)
    keep = g.keep_on_policy_sequences(case.advantages, case.policy, case.sampler, case.mask, 0.1)
    kl = g.estimate_kl(case.policy, case.reference, "ratio_k3", old_log_probs=case.old, response_mask=case.mask)
    ours = m.mean(case, m.clip(case) * keep + 0.1 * kl)
    theirs = peers.trl_loss(case, loss_type="dapo", off_policy_mask_threshold=0.1, kl_coef=0.1)
    return _facts(
        {
            "against μ, KL term not masked, all tokens in the denominator": _same(ours, theirs),
            "some responses dropped": not keep.all(),
        }
    )


def _no_old_log_probs() -> tuple[bool, str]:
    case = replace(draw(9), old=None)
    loss = peers.trl_loss(case, loss_type="dapo")
    (gradient,) = torch.autograd.grad(loss, case.policy)
    plain = m.mean(case, g.compute_naive_policy_gradient_loss(case.advantages, case.policy, response_mask=case.mask))
    ones = m.mean(case, -case.advantages.expand(case.policy.shape))
    return _facts(
        {
            "value of ratio 1": _same(loss, ones),
            "gradient of REINFORCE": _same(gradient, torch.autograd.grad(plain, case.policy)[0]),
        }
    )


def _order() -> tuple[bool, str]:
    case = draw(7, ragged=False)
    weights = peers.trl_importance(case, "token_truncate")
    kl = g.estimate_kl(case.policy, case.reference, "ratio_k3", old_log_probs=case.old, response_mask=case.mask)
    ours = m.mean(case, m.clip(case) * weights + 0.1 * kl)
    theirs = peers.trl_loss(case, loss_type="dapo", importance=weights, kl_coef=0.1)
    return _facts({"clip, times κ, plus β KL without κ": _same(ours, theirs)})


# Aggregation


def _generation_batch() -> tuple[bool, str]:
    case = draw(8)
    n = int(case.mask.sum())
    config = {"loss_type": "dapo", "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    found = _number(peers.trl_loss(case, items=4 * n, accumulation_steps=2, **config))
    factor = found / (_number(m.mean(case, m.clip(case))) / 2)
    return _close(factor, 0.5), f"S 4, K 2: {factor:.3g} times the token mean"


def _empty_responses() -> tuple[bool, str]:
    case = draw(9)
    mask, rows = m.without_row(case), len(case.mask)
    local = _number(peers.verl_aggregate(m.clip(case), mask, "seq-mean-token-mean"))
    nominal = _number(peers.verl_aggregate(m.clip(case), mask, "seq-mean-token-mean", global_batch_size=rows))
    trl = _number(peers.trl_loss(case, loss_type="grpo", mask=mask))
    return _close(local * (rows - 1), trl * rows) and _close(nominal, trl), (
        f"{rows} responses, one empty: N is {round(trl * rows / local)} in verl, {round(trl * rows / nominal)} with "
        f"its global_batch_size, {rows} in TRL"
    )


def _nan_under_the_mask() -> tuple[bool, str]:
    case = place([[0.1, math.nan]], [1.0], mask=torch.tensor([[True, False]]))
    found = {
        "verl token-mean": peers.verl_loss(case, "vanilla"),
        "verl seq-mean-token-sum": peers.verl_loss(case, "vanilla", "seq-mean-token-sum"),
        "TRL": peers.trl_loss(case, loss_type="dapo"),
    }
    finite = {name: bool(value.isfinite()) for name, value in found.items()}
    (gradient,) = torch.autograd.grad(found["verl token-mean"], case.policy)
    clean = bool(gradient.isfinite().all())
    kinds = "; ".join(f"{name}: value {'finite' if ok else 'NaN'}" for name, ok in finite.items())
    return list(finite.values()) == [True, True, False] and clean, (
        f"{kinds}; gradient in verl token-mean {'finite' if clean else 'NaN'}"
    )


def _rejection_denominators() -> tuple[bool, str]:
    case = draw(10)
    mask = peers.verl_rejection(case, "token_k1", "0.8_1.25")
    icepop = peers.verl_importance(case, "token", "0.8_1.25")
    rejected = peers.verl_aggregate(torch.ones_like(case.old), mask, "token-mean")
    weighted = peers.verl_aggregate((icepop > 0).double(), case.mask, "token-mean")
    share = float((icepop > 0).sum() / case.mask.sum())
    return _close(float(rejected), 1.0) and _close(float(weighted), share), (
        f"a loss of 1 everywhere becomes {float(rejected):.3g} under RS and {float(weighted):.3g} under IcePop, "
        f"with {share:.3g} of the tokens kept"
    )


# Divergence


def _kl_clamps() -> tuple[bool, str]:
    case = place([[0.0]], [1.0], level=-40.0, reference=torch.tensor([[-15.0]], dtype=torch.float64))
    names = ("kl", "mse", "abs", "low_var_kl")
    found = {f"verl {name}": _number(peers.verl_kl(case, name)) for name in names}
    trl = _number(peers.trl_loss(case, loss_type="dapo", kl_coef=1.0, use_bias_correction_kl=False)) + 1
    found["log of TRL k3"] = math.log(trl)
    return _values(found, [-25.0, 312.5, 25.0, 10.0, 25.0])


def _kl_plus() -> tuple[bool, str]:
    case = draw(11)
    gradients = {
        name: torch.autograd.grad(peers.verl_kl(case, name).sum(), case.policy)[0] for name in ("k1+", "k3+", "k2")
    }
    return _facts(
        {
            "k3+ runs, with the value of k3": _same(peers.verl_kl(case, "k3+"), peers.verl_kl(case, "k3")),
            "k1+ and k3+ have the gradient of k2": _same(gradients["k1+"], gradients["k2"])
            and _same(gradients["k3+"], gradients["k2"]),
        }
    )


def _gmpo_kl() -> tuple[bool, str]:
    case = draw(0)
    kl = g.estimate_kl(case.policy, case.reference, "k3", response_mask=case.mask)
    policy = m.by_response(case, g.compute_gmpo_loss(*m.whole(case), 0.4)[0])
    found = peers.trl_loss(case, "gmpo", kl_coef=0.1)
    return _facts({"mean of response means": _same(found, policy + 0.1 * m.mean_of_means(case, kl))})


def _kl_direction() -> tuple[bool, str]:
    """Compare E[gradient], on-policy over a whole vocabulary, with the gradients of both divergences."""
    random = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(1, 6, generator=random, dtype=torch.float64) for _ in range(2))
    parameters = logits.clone().requires_grad_()
    p, q = parameters.log_softmax(dim=1), other.log_softmax(dim=1)
    reverse, forward = (
        torch.autograd.grad(divergence.sum(), parameters, retain_graph=True)[0]
        for divergence in (p.exp() * (p - q), q.exp() * (q - p))
    )
    case = place([[0.0] * 6], [0.0], policy=p, old=p.detach(), reference=q)
    found = {}
    for corrected in (False, True):
        loss = 6 * peers.trl_loss(case, loss_type="dapo", kl_coef=1.0, use_bias_correction_kl=corrected)
        (each,) = torch.autograd.grad(loss, p, retain_graph=True)
        (expected,) = torch.autograd.grad(p, parameters, p.detach().exp() * each, retain_graph=True)
        names = [name for name, one in (("reverse", reverse), ("forward", forward)) if _same(expected, one)]
        found[corrected] = " and ".join(names) or "neither"
    return found == {False: "forward", True: "reverse"}, f"k3: {found[False]}; ρ·k3: {found[True]}"


# Entropy


def _entropy_bonus() -> tuple[bool, str]:
    case = draw(1)
    entropy = float(g.masked_mean(peers.entropy_of(case).double(), case.mask))
    found = {}
    for name in ("dapo", "grpo", "dr_grpo"):
        plain, rewarded = (_number(peers.trl_loss(case, loss_type=name, entropy_coef=coef)) for coef in (0.0, 0.5))
        found[name] = (plain - rewarded) / 0.5
    return all(_close(value, entropy) for value in found.values()), (
        f"mean over tokens {entropy:.4g}; " + "; ".join(f"{name} {value:.4g}" for name, value in found.items())
    )


def _entropy_first_step() -> tuple[bool, str]:
    case, options = draw(2), {"use_adaptive_entropy": True, "entropy_target": 5.0, "entropy_coef": 0.5}
    plain = _number(peers.trl_loss(case, loss_type="dapo"))
    peers.trl_trainer.cache_clear()  # so that the first step is one
    first, second = (plain - _number(peers.trl_loss(case, loss_type="dapo", **options)) for _ in range(2))
    return abs(first) < 1e-9 and second > 0.1, f"bonus {abs(first):.3g} in the first step, {second:.3g} in the second"


def _entropy_mask_denominator() -> tuple[bool, str]:
    case = draw(3)
    chosen = g.select_high_entropy(peers.entropy_of(case), case.mask, 0.25)
    theirs = peers.trl_loss(case, loss_type="dapo", top_entropy_quantile=0.25)
    return _facts({"all tokens in the denominator": _same(theirs, m.mean(case, m.clip(case), chosen.double()))})


# The sampler


def _sequence_mask_default() -> tuple[bool, str]:
    args = peers.trl_trainer("grpo").args
    mode, cap = args.vllm_importance_sampling_mode, args.vllm_importance_sampling_clip_max
    return (mode, cap) == ("sequence_mask", 3.0), f"{mode}, {cap:g}"


def _long_responses() -> tuple[bool, str]:
    sampler = torch.full((2, 100), -5.0, dtype=torch.float64)
    sampler[0] -= 0.012
    case = place([[0.0] * 100] * 2, [1.0, 1.0], sampler=sampler)
    found = {
        mode: float(peers.trl_importance(case, mode, vllm_importance_sampling_clip_max=cap)[0, 0])
        for mode, cap in (("sequence_truncate", 100.0), ("sequence_mask", 3.0))
    }
    return _close(found["sequence_truncate"], math.exp(1.2), 1e-3) and found["sequence_mask"] == 0.0, (
        f"100 tokens with log κ 0.012: product {found['sequence_truncate']:.3g}, weight {found['sequence_mask']:.3g}"
    )


def _two_defaults() -> tuple[bool, str]:
    text = " ".join(peers.trl_documentation().split())
    return _facts(
        {
            "text calls token_truncate the default": "Token-level truncated IS (default)" in text,
            "signature says sequence_mask": 'defaults to `"sequence_mask"`' in text,
        }
    )


def _verl_correction_defaults() -> tuple[bool, str]:
    level = peers.verl_yaml("algorithm.rollout_correction.rollout_is")
    cap = peers.verl_yaml("algorithm.rollout_correction.rollout_is_threshold")
    return level is None and cap == 2.0, f"rollout_is={level}, rollout_is_threshold={cap:g}"


def _verl_presets() -> tuple[bool, str]:
    found = {
        "geometric RS": peers.verl_preset("decoupled_geo_rs").rollout_rs_threshold,
        "sequence RS": peers.verl_preset("decoupled_seq_is_rs").rollout_rs_threshold,
        "IcePop": peers.verl_preset("decoupled_token_icepop").rollout_is_threshold,
        "k3 RS": str(peers.verl_preset("decoupled_k3_rs").rollout_rs_threshold),
    }
    holds = list(found.values()) == ["0.999_1.001", "0.5_2.0", "0.5_5.0", "0.01"]
    return holds, "; ".join(f"{name} {value}" for name, value in found.items())


def _verl_sequence_clamp() -> tuple[bool, str]:
    sampler = torch.full((1, 100), -6.0, dtype=torch.float64)
    case = place([[0.0] * 100], [1.0], sampler=sampler)
    found = math.log(float(peers.verl_importance(case, "sequence", 1e30)[0, 0]))
    return _close(found, 20.0), f"a log product of 100 becomes {found:.4g}"


def _bypass() -> tuple[bool, str]:
    case = draw(4)
    correction = {"loss_type": "ppo_clip", "rollout_is": "token", "rollout_is_threshold": 2.0}
    found = peers.verl_loss(case, "bypass_mode", rollout_correction=correction)
    return _facts({"ppo_clip in bypass_mode equals vanilla without κ": _same(found, peers.verl_loss(case, "vanilla"))})


def _k1_bounds() -> tuple[bool, str]:
    old = torch.tensor([[-5.0, -5.0]], dtype=torch.float64)
    sampler = old - torch.tensor([[math.log(1.4), -math.log(1.4)]], dtype=torch.float64)
    case = place([[0.0, 0.0]], [1.0], sampler=sampler)
    keep = peers.verl_rejection(case, "token_k1", "0.5_1.2")[0]
    found = ["kept" if kept else "rejected" for kept in keep]
    return found == ["kept", "rejected"], f"bounds 0.5_1.2: κ 1.4 {found[0]}, κ 1/1.4 {found[1]}"


# Filtering


def _overlong() -> tuple[bool, str]:
    lengths = [8, 10, 12, 20]
    trl, verl = peers.trl_overlong(lengths, 12, 4), peers.verl_overlong(lengths, 12, 4)
    expected = torch.tensor([[0.0, -0.5, -1.0, -1.0], [0.0, -0.5, -1.0, -3.0]])
    return _same(torch.stack([trl, verl]), expected), (
        f"L 12, buffer 4, lengths 8, 10, 12, 20: TRL {_list(trl)}; verl {_list(verl)}"
    )


def _end_tokens() -> tuple[bool, str]:
    kept = peers.trl_keeps(place([[0.0, 0.0]] * 2, [0.0, 0.0]), 8, end_tokens=(1, 8))
    return not kept, f"a response that ends with the model's second end token is {'kept' if kept else 'masked'}"


def _truncated_denominator() -> tuple[bool, str]:
    case = place([[0.0] * 3] * 2, [0.0, 0.0])
    items = int(peers.trl_truncated(case, torch.tensor([True, False]))["num_items_in_batch"])
    return items == 3, f"two responses of 3 tokens, one truncated: num_items_in_batch {items}"


# Defaults


def _trl_defaults() -> tuple[bool, str]:
    args = peers.trl_trainer("grpo").args
    found = {
        "G": args.num_generations,
        "T": args.temperature,
        "tokens": args.max_completion_length,
        "lr": args.learning_rate,
        "β": peers.trl_config_default("grpo", "beta"),
        "ε": args.epsilon,
    }
    ok, text = _values(found, [8, 1.0, 512, 1e-6, 0.0, 0.2])
    return ok and args.loss_type == "dapo", f"{args.loss_type}; {text}"


def _verl_defaults() -> tuple[bool, str]:
    actor = "actor_rollout_ref.actor"
    names = [peers.verl_yaml("algorithm.adv_estimator"), peers.verl_yaml(f"{actor}.loss_agg_mode")]
    paths = {
        "n": "actor_rollout_ref.rollout.n",
        "T": "actor_rollout_ref.rollout.temperature",
        "ε": f"{actor}.clip_ratio",
        "dual clip": f"{actor}.clip_ratio_c",
        "lr": f"{actor}.optim.lr",
        "weight decay": f"{actor}.optim.weight_decay",
        "KL coef": f"{actor}.kl_loss_coef",
        "minibatch": f"{actor}.ppo_mini_batch_size",
        "tokens": "data.max_response_length",
    }
    found = {name: peers.verl_yaml(path) for name, path in paths.items()}
    ok, text = _values(found, [1, 1, 0.2, 3, 1e-6, 0.01, 1e-3, 256, 512])
    off = peers.verl_yaml(f"{actor}.use_kl_loss") is False
    return ok and off and names == ["gae", "token-mean"], f"{', '.join(names)}; KL loss off: {off}; {text}"


def _trl_rloo_defaults() -> tuple[bool, str]:
    found = {name: peers.trl_config_default("rloo", name) for name in ("beta", "epsilon")}
    return _values(found, [0.05, 0.2])


def _padded_width() -> tuple[bool, str]:
    losses, mask = torch.ones(1, 4), torch.tensor([[1, 1, 0, 0]])
    found = {
        width: _number(peers.verl_aggregate(losses[:, :width], mask[:, :width], "seq-mean-token-sum-norm"))
        for width in (2, 4)
    }
    return _same(torch.tensor(list(found.values())), torch.tensor([1.0, 0.5])), (
        f"the same response gives {found[2]:.3g} padded to 2 tokens and {found[4]:.3g} padded to 4"
    )


def _liger_is_trl() -> tuple[bool, str]:
    case = draw(6)
    names = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
    return _facts(
        {
            name: _same(peers.liger_loss(case, name, max_completion_length=512), peers.trl_loss(case, loss_type=name))
            for name in names
        }
    )


CLAIMS = [
    Claim(
        "2.1", "TRL divides by the group's s with ddof 1, ε 1e-4", lambda: _check_spread(peers.trl_advantages, 2, 1e-4)
    ),
    Claim(
        "2.1",
        "verl divides by the group's s with ddof 1, ε 1e-6",
        lambda: _check_spread(lambda c: peers.verl_advantages(c, "grpo"), 2, 1e-6),
    ),
    Claim("2.1", "verl's vectorized variance takes one pass in float32", _vectorized_passes),
    Claim("2.1", "groups of one: verl `grpo` and `rloo` give A = r, `rloo_vectorized` gives 0", _singletons),
    Claim(
        "2.1",
        "TRL raises an error for groups of one",
        lambda: (
            _raises(lambda: peers.trl_trainer("grpo", num_generations=1)) == "ValueError",
            _raises(lambda: peers.trl_trainer("grpo", num_generations=1)),
        ),
    ),
    Claim("2.1", "TRL `dr_grpo` changes only the normalizer and still divides by s", _dr_grpo),
    Claim("2.1", "TRL RLOO: β 0.05, clip 0.2", _trl_rloo_defaults),
    Claim(
        "2.1",
        "verl `masked_whiten`: ddof 1, rsqrt(var + 1e-8)",
        lambda: _check_spread(_whiten_by_verl, 4, 1e-8, inside=True),
    ),
    Claim("2.1", "verl REINFORCE++ carries the reward across tool spans", _tool_spans),
    Claim(
        "2.1",
        'TRL `scale_rewards="batch"`: ddof 1, ε 1e-4',
        lambda: _check_spread(lambda c: peers.trl_advantages(c, scale_rewards="batch"), 4, 1e-4),
    ),
    Claim("2.1", "the batch s is of the raw rewards, not the centered ones", _batch_std_is_of_raw_rewards),
    Claim("2.1", "verl GPG: α = B / count_nonzero(score), guarded if all are 0", _gpg_alpha),
    Claim("2.1", "verl's optimal token baseline zeroes the tail by default", _optimal_token_baseline),
    Claim("2.1", "TRL excludes unscored rewards from mean and s and gives them 0", _unscored),
    Claim("2.0", "TRL without old log-probs: value of ratio 1, gradient of log π", _no_old_log_probs),
    Claim("2.2", "verl clamps log ratios to 20 nats, TRL does not", _clamps),
    Claim("2.2", "verl `vanilla` has dual clip 3 by default, TRL none", _dual_clip_default),
    Claim("2.2", "TRL's δ and verl's c agree if the bound is at least 1 + ε", _delta_is_dual_clip),
    Claim("2.2", "TRL counts clipped tokens after the δ clamp", _clip_metric_after_delta),
    Claim("2.2", "TRL counts only the binding side as clipped", _binding_side),
    Claim("2.2", "GSPO: verl has the token form, with the gradient of the sequence form", _gspo_forms),
    Claim("2.2", "verl GSPO and SAPO override `loss_agg_mode`", _who_overrides_the_aggregation),
    Claim("2.2", "GMPO clips in log space: TRL at 0.4, verl at `clip_ratio` 0.2", _gmpo_thresholds),
    Claim("2.2", "GMPO: an empty response adds -A to the loss, nothing to the gradient", _gmpo_without_tokens),
    Claim("2.2", "verl GMPO is a plain mean of the micro-batch in any mode and global batch", _gmpo_plain_mean),
    Claim("2.2", "CISPO: TRL and Liger cap the weight at 0.2, verl bounds it by 0.8 and 1.2", _cispo_bounds),
    Claim("2.2", "SAPO has the value -2A/τ at ratio 1, τ 1.0 and 1.05", _sapo_at_one),
    Claim("2.2", "VESPO in TRL: one κ masked to 0 adds -18.4 to log W and silences the response", _vespo_masked_ratio),
    Claim("2.2", "verl DPPO: C is 3 from `ActorConfig`; the function's default 20 is unreachable", _dppo_cap),
    Claim("2.2", "verl Clip-Cov selects tokens at random", _clip_cov_is_random),
    Claim("2.2", "verl KL-Cov: coefficient 0.1 in the YAML, no clip", _kl_cov_defaults),
    Claim("2.2", "verl DRO: gradient -A + βd, β must be set", _dro),
    Claim("2.2", "TRL's off-policy mask compares with μ, keeps the KL term and the denominators", _off_policy_mask),
    Claim("2.2", "TRL: clip, then κ, then + β KL without κ", _order),
    Claim("2.3", "TRL's DAPO gradient is off by K/S if generation and accumulation differ", _generation_batch),
    Claim("2.3", "verl `seq-mean-token-sum-norm` divides by the padded width", _padded_width),
    Claim(
        "2.3",
        "empty responses: excluded by verl's fallback, counted by its global path and TRL",
        _empty_responses,
    ),
    Claim("2.3", "verl: rejection shrinks the denominator, IcePop does not", _rejection_denominators),
    Claim("2.0", "NaN under the mask is harmless in verl, not in TRL", _nan_under_the_mask),
    Claim("2.4", "verl clamps k3 to 10, TRL clamps nothing", _kl_clamps),
    Claim("2.4", "verl `kX+`: the value of kX with the gradient of k2", _kl_plus),
    Claim("2.4", "TRL: k3 in the loss descends forward KL, ρ·k3 reverse KL", _kl_direction),
    Claim(
        "2.4",
        "TRL `use_bias_correction_kl` is False",
        lambda: (
            not peers.trl_config_default("grpo", "use_bias_correction_kl"),
            str(peers.trl_config_default("grpo", "use_bias_correction_kl")),
        ),
    ),
    Claim("2.4", "TRL GMPO takes the KL term as a mean over responses", _gmpo_kl),
    Claim("2.5", "TRL's entropy bonus is a mean over tokens for every loss type", _entropy_bonus),
    Claim("2.5", "TRL's adaptive bonus uses the entropy of the previous step", _entropy_first_step),
    Claim("2.5", "TRL's top-entropy selection keeps the denominator", _entropy_mask_denominator),
    Claim("2.6", "TRL corrects by `sequence_mask` at 3 by default", _sequence_mask_default),
    Claim("2.6", "a difference of 0.012 nats per token drops a response of 100 tokens", _long_responses),
    Claim("2.6", "verl's correction is off by default, with cap 2", _verl_correction_defaults),
    Claim("2.6", "verl presets: geometric 0.999 to 1.001, sequence 0.5 to 2, IcePop 0.5 to 5, k3 0.01", _verl_presets),
    Claim("2.6", "verl's k1 is -log κ, but its bounds are ratios", _k1_bounds),
    Claim("2.6", "verl clamps the log of a product to 20", _verl_sequence_clamp),
    Claim("2.6", "verl does not apply κ twice in bypass mode", _bypass),
    Claim("2.7", "soft overlong: exact in TRL, without floor in verl", _overlong),
    Claim("2.7", "TRL recognizes only the tokenizer's end token", _end_tokens),
    Claim("2.7", "TRL recounts the denominator after masking truncated responses", _truncated_denominator),
    Claim("2.11", "TRL: dapo, G 8, T 1, 512 tokens, lr 1e-6, β 0, ε 0.2", _trl_defaults),
    Claim(
        "2.11",
        "verl: gae, token-mean, n 1, T 1, ε 0.2, dual clip 3, lr 1e-6, weight decay 0.01, KL off (0.001),"
        " minibatch 256, 512 tokens",
        _verl_defaults,
    ),
    Claim("2.12", "TRL's documentation calls both `token_truncate` and `sequence_mask` the default", _two_defaults),
    Claim("2.12", "Liger's loss types equal TRL's", _liger_is_trl),
]

"""Policy-gradient losses: losses/_ratios.py, policy_gradient.py, token.py, sequence.py."""

from tests.mutants.table import breaks

FAMILY, LAWS = "tests/property/test_family.py", "tests/property/test_losses.py"
TRACED = "tests/property/test_transforms.py"
CORRECTIONS, ERRORS = "tests/property/test_corrections.py", "tests/unit/test_errors.py"


def in_family(name: str) -> str:
    return f"{FAMILY} -k {name}"


CLIP = f"{ERRORS} {LAWS} {FAMILY} -k 'test_errors and clip or test_losses or compute_grpo_clip_loss'"

RATIOS = [
    *breaks(
        "_ratios.clamp_log_ratio",
        "losses/_ratios.py",
        f"{CORRECTIONS} {FAMILY} -k 'held or ratios_by or kl_by or wild'",
        ("the gradient is cut too", "return attach_gradient(clamped, None, log_ratio)", "return clamped"),
        (
            "traced: the gradient is cut too",
            "return clamped + (finite - finite.detach())",
            "return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
        ),
        (
            "traced: the difference of two large numbers",
            "return clamped + (finite - finite.detach())",
            "return log_ratio + (clamped - log_ratio).detach()",
        ),
        ("traced: inf - inf", "finite = log_ratio.nan_to_num()", "finite = log_ratio"),
        (
            "no lower bound",
            "detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
            "detach().clamp(max=MAX_LOG_RATIO)",
        ),
        (
            "no upper bound",
            "detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
            "detach().clamp(min=-MAX_LOG_RATIO)",
        ),
        (
            "not held",
            "    clamped = log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
            "    clamped = log_ratio.detach().clone()",
        ),
        ("held twice as far out", "MAX_LOG_RATIO = 20.0", "MAX_LOG_RATIO = 40.0"),
    ),
    *breaks(
        "_ratios.compute_binary_kl",
        "losses/_ratios.py",
        f"{CORRECTIONS} {LAWS} {FAMILY} -k 'divergences or test_losses or compute_dppo_kl_loss'",
        (
            "without the other tokens",
            "(old_log_probs - policy_log_probs) + others",
            "(old_log_probs - policy_log_probs)",
        ),
        ("the other tokens alone", "return p_old * (old_log_probs - policy_log_probs) + others", "return others"),
        ("a certain token is NaN", "((1 - p_old + _EPS) / (1 - p + _EPS)).log()", "((1 - p_old) / (1 - p)).log()"),
        (
            "the other direction",
            "p, p_old = policy_log_probs.exp(), old_log_probs.exp()",
            "p_old, p = policy_log_probs.exp(), old_log_probs.exp()",
        ),
        ("weighted by the new policy", "return p_old * (old", "return p * (old"),
    ),
    *breaks(
        "_ratios.zero_outside_mask",
        "losses/_ratios.py",
        f"{FAMILY} -k 'outside_the_mask or nan_in_a_response or never_read and sequence'",
        ("mask multiplied", "torch.where(mask, values, 0.0)", "values * mask"),
        ("what is NaN in a response is hidden too", "torch.where(mask, values, 0.0)", "values.nan_to_num(0.0) * mask"),
        ("the caller's tensor is overwritten", "torch.where(mask, values, 0.0)", "values.masked_fill_(~mask, 0.0)"),
        ("nothing hidden", "values if mask is None else torch.where(mask, values, 0.0)", "values"),
        ("a large negative number for nothing", "torch.where(mask, values, 0.0)", "torch.where(mask, values, -1e9)"),
    ),
    *breaks(
        "_ratios.compute_log_ratio",
        "losses/_ratios.py",
        f"{FAMILY} -k 'compute_grpo_clip_loss or compute_gspo_loss'",
        (
            "the old policy carries gradient",
            "zero_outside_mask(old_log_probs.detach(), mask)",
            "zero_outside_mask(old_log_probs, mask)",
        ),
        (
            "upside down",
            "zero_outside_mask(policy_log_probs, mask) - zero_outside_mask(old_log_probs.detach(), mask)",
            "zero_outside_mask(old_log_probs.detach(), mask) - zero_outside_mask(policy_log_probs, mask)",
        ),
        (
            "the policy carries none",
            "zero_outside_mask(policy_log_probs, mask) - ",
            "zero_outside_mask(policy_log_probs.detach(), mask) - ",
        ),
        (
            "the old policy is not hidden",
            "- zero_outside_mask(old_log_probs.detach(), mask)",
            "- old_log_probs.detach()",
        ),
        (
            "a difference of probabilities",
            "zero_outside_mask(policy_log_probs, mask) - zero_outside_mask(old_log_probs.detach(), mask)",
            "zero_outside_mask(policy_log_probs, mask).exp() - zero_outside_mask(old_log_probs.detach(), mask).exp()",
        ),
    ),
    *breaks(
        "_ratios.mean_over_response",
        "losses/_ratios.py",
        f"{CORRECTIONS} {FAMILY} -k 'ratios_by or compute_gspo_loss or compute_gmpo'",
        ("nothing over nothing", "mask.sum(dim=1, keepdim=True).clamp(min=1)", "mask.sum(dim=1, keepdim=True)"),
        ("over padding", "/ mask.sum(dim=1, keepdim=True).clamp(min=1)", "/ mask.shape[1]"),
        ("by the tokens of the batch", "/ mask.sum(dim=1, keepdim=True).clamp(min=1)", "/ mask.sum().clamp(min=1)"),
        (
            "by the mean length",
            "/ mask.sum(dim=1, keepdim=True).clamp(min=1)",
            "/ mask.sum(dim=1).double().mean().clamp(min=1)",
        ),
        ("one token too many", "mask.sum(dim=1, keepdim=True).clamp(min=1)", "(mask.sum(dim=1, keepdim=True) + 1)"),
    ),
    *breaks(
        "_ratios.resolve_clip_bounds",
        "losses/_ratios.py",
        f"{ERRORS} {LAWS} {FAMILY} -k 'distance or test_losses or compute_gmpo_loss'",
        (
            "the second bound forgotten",
            "high = cliprange if cliprange_high is None else cliprange_high",
            "high = cliprange",
        ),
        (
            "the second bound for both",
            "return center - cliprange, center + high",
            "return center - high, center + high",
        ),
        (
            "lower bound in log space",
            "return center - cliprange, center + high",
            "return center / (1 + cliprange), center + high",
        ),
        (
            "a bound of 0 is none",
            "if cliprange_high is None else cliprange_high",
            "if not cliprange_high else cliprange_high",
        ),
        (
            "bounds around 1 for log ratios too",
            "return center - cliprange, center + high",
            "return 1 - cliprange, 1 + high",
        ),
        ("negative ranges", "require(value >= 0, name", "require(value > -1, name"),
        (
            "the second is not looked at",
            '(("cliprange", cliprange), ("cliprange_high", high))',
            '(("cliprange", cliprange),)',
        ),
    ),
    *breaks(
        "_ratios.mask_flags",
        "losses/_ratios.py",
        f"{FAMILY} -k 'never_read and token_mean'",
        (
            "flags of padding",
            "flags if mask is None else {name: flag & mask for name, flag in flags.items()}",
            "flags",
        ),
    ),
]

LOSSES = [
    *breaks(
        "compute_cross_entropy_loss",
        "losses/policy_gradient.py",
        in_family("compute_cross_entropy_loss"),
        (
            "climbs",
            "return -zero_outside_mask(policy_log_probs, response_mask)",
            "return zero_outside_mask(policy_log_probs, response_mask)",
        ),
        ("mask ignored", "return -zero_outside_mask(policy_log_probs, response_mask)", "return -policy_log_probs"),
        (
            "mask multiplied",
            "return -zero_outside_mask(policy_log_probs, response_mask)",
            "return -policy_log_probs if response_mask is None else -policy_log_probs * response_mask",
        ),
        (
            "probability for its logarithm",
            "return -zero_outside_mask(policy_log_probs, response_mask)",
            "return -zero_outside_mask(policy_log_probs.exp(), response_mask)",
        ),
        (
            "divided by its length",
            "return -zero_outside_mask(policy_log_probs, response_mask)",
            "return -zero_outside_mask(policy_log_probs, response_mask) / policy_log_probs.shape[1]",
        ),
    ),
    *breaks(
        "compute_naive_policy_gradient_loss",
        "losses/policy_gradient.py",
        f"{LAWS} {FAMILY} -k 'test_losses or compute_naive'",
        ("rewards carry gradient", "-raw_rewards_or_advantages.detach() *", "-raw_rewards_or_advantages *"),
        ("climbs", "losses = -raw_rewards_or_advantages", "losses = raw_rewards_or_advantages"),
        (
            "hidden after the product alone",
            "detach() * zero_outside_mask(policy_log_probs, response_mask)\n",
            "detach() * policy_log_probs\n",
        ),
        (
            "hidden before the product alone",
            "return zero_outside_mask(losses, response_mask)\n",
            "return losses\n",
        ),
        (
            "probability for its logarithm",
            "* zero_outside_mask(policy_log_probs, response_mask)\n",
            "* zero_outside_mask(policy_log_probs, response_mask).exp()\n",
        ),
        (
            "a baseline of the micro-batch",
            "-raw_rewards_or_advantages.detach() *",
            "-(raw_rewards_or_advantages - raw_rewards_or_advantages.mean()).detach() *",
        ),
    ),
    *breaks(
        "compute_grpo_clip_loss",
        "losses/policy_gradient.py",
        CLIP,
        ("the other sign below", ".masked_fill_(advantages < 0, low)", ".masked_fill_(advantages > 0, low)"),
        ("the other sign above", ".masked_fill_(advantages > 0, high)", ".masked_fill_(advantages < 0, high)"),
        ("no lower bound", "losses = torch.maximum(ratio, lower)", "losses = ratio.clone()"),
        ("no upper bound", "torch.minimum(losses, upper, out=losses).mul_(", "losses.mul_("),
        (
            "range in log space",
            "lower = torch.full",
            "low, high = math.exp(low - 1), math.exp(high - 1)\n        lower = torch.full",
        ),
        ("clipped tokens still pull", '.mul_(~flags["is_clipped"])', ""),
        ("nothing pulls but what is clipped", '.mul_(~flags["is_clipped"])', '.mul_(flags["is_clipped"])'),
        ("counted where it does not bind", '"is_clipped_high": ratio > upper}', '"is_clipped_high": ratio > high}'),
        ("low: counted where it does not bind", '"is_clipped_low": ratio < lower', '"is_clipped_low": ratio < low'),
        (
            "counted without an advantage",
            ".masked_fill_(advantages > 0, high)",
            ".masked_fill_(advantages >= 0, high)",
        ),
        (
            "dual clip for every sign",
            "            upper.masked_fill_(advantages < 0, dual_clip)",
            "            upper.clamp_(max=dual_clip)",
        ),
        ("dual clip: no bound", "            upper.masked_fill_(advantages < 0, dual_clip)\n", ""),
        (
            "dual clip: a distance from 1",
            "masked_fill_(advantages < 0, dual_clip)",
            "masked_fill_(advantages < 0, 1 + dual_clip)",
        ),
        ("dual clip: counted where it does not bind", "(ratio > dual_clip) & (advantages < 0)", "ratio > dual_clip"),
        ("dual clip: not counted among all", 'flags["is_clipped"] |= flags["is_clipped_dual"]', "pass"),
        ("padding pulls", "            slope.masked_fill_(~response_mask, 0)\n", ""),
        ("padding has a loss", "            losses.masked_fill_(~response_mask, 0)\n", ""),
        ("dual clip: below 1", "require(dual_clip > 1", "require(dual_clip > 0"),
        (
            "traced: not hidden",
            "return zero_outside_mask(losses, response_mask), mask_flags(flags, response_mask)\n    with",
            "return losses, mask_flags(flags, response_mask)\n    with",
        ),
        ("traced: no dual clip", "advantages, (low, high), dual_clip)", "advantages, (low, high))"),
        ("traced: one bound", "advantages, (low, high), dual_clip)", "advantages, (low, 2 - low), dual_clip)"),
    ),
    *breaks(
        "_ratios.compute_clip_surrogate",
        "losses/_ratios.py",
        f"{FAMILY} -k 'traced-compute_grpo_clip_loss or gspo'",
        ("the optimistic maximum", "objective = torch.minimum(", "objective = torch.maximum("),
        (
            "the clip alone, without the minimum",
            "torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)",
            "(ratio.clamp(low, high) * advantages)",
        ),
        ("no lower bound", "ratio.clamp(low, high) * advantages)", "ratio.clamp(max=high) * advantages)"),
        ("dual clip for every sign", "(ratio > dual_clip) & (advantages < 0)", "ratio > dual_clip"),
        (
            "dual clip: a distance from 1",
            "dual_clip * advantages, objective",
            "(1 + dual_clip) * advantages, objective",
        ),
        ("dual clip: not counted", 'flags["is_clipped"] | flags["is_clipped_dual"]', 'flags["is_clipped"]'),
        ("counted where it does not bind", "(ratio < low) & (advantages < 0)", "ratio < low"),
        ("counted above where it does not bind", "(ratio > high) & (advantages > 0)", "ratio > high"),
        ("the sign", "return -objective, flags", "return objective, flags"),
    ),
    *breaks(
        "compute_grpo_clip_loss",
        "losses/_ratios.py",
        CLIP,
        ("no gradient", "return _AttachGradient.apply(values, slope, of)", "return values + 0 * of"),
        ("a slope of 1", "gradient if slope is None else gradient * slope", "gradient"),
        (
            "the ratio is not held",
            ".clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp_()",
            ".exp_()",
        ),
        ("upside down", "(policy_log_probs - old_log_probs).clamp_", "(old_log_probs - policy_log_probs).clamp_"),
    ),
    *breaks(
        "compute_grpo_no_clip_loss",
        "losses/policy_gradient.py",
        f"{LAWS} {FAMILY} {TRACED} -k 'test_losses or compute_grpo_no_clip_loss or attached_gradient'",
        (
            "the sign",
            "old_log_probs) * -advantages.detach()",
            "old_log_probs) * advantages.detach()",
        ),
        ("not hidden", "        losses = zero_outside_mask(losses, response_mask)\n", ""),
        (
            "a slope of 1",
            "attach_gradient(losses, losses.clone(), policy_log_probs)",
            "attach_gradient(losses, None, policy_log_probs)",
        ),
        (
            "another slope",
            "attach_gradient(losses, losses.clone(), policy_log_probs)",
            "attach_gradient(losses, -advantages.expand_as(losses), policy_log_probs)",
        ),
        ("a slope that changes with the value", "losses.clone(), policy_log_probs", "losses, policy_log_probs"),
        (
            "traced: not hidden",
            "zero_outside_mask(ratio * -advantages.detach(), response_mask)",
            "ratio * -advantages.detach()",
        ),
        (
            "traced: the sign",
            "zero_outside_mask(ratio * -advantages.detach()",
            "zero_outside_mask(ratio * advantages.detach()",
        ),
        (
            "traced: advantages carry gradient",
            "zero_outside_mask(ratio * -advantages.detach()",
            "zero_outside_mask(ratio * -advantages",
        ),
        (
            "the two policies swapped",
            "compute_detached_ratio(policy_log_probs, old_log_probs) * -",
            "compute_detached_ratio(old_log_probs, policy_log_probs) * -",
        ),
        (
            "the log ratio for the ratio",
            "compute_detached_ratio(policy_log_probs, old_log_probs) * -",
            "compute_detached_ratio(policy_log_probs, old_log_probs).log() * -",
        ),
    ),
    *breaks(
        "compute_policy_gradient_loss",
        "losses/policy_gradient.py",
        "tests/property/test_steps.py -k 'reference or metadata'",
        (
            "REINFORCE of the raw rewards",
            "compute_naive_policy_gradient_loss(advantages, p",
            "compute_naive_policy_gradient_loss(raw_rewards, p",
        ),
        (
            "no baseline, of the advantages",
            "compute_naive_policy_gradient_loss(raw_rewards, p",
            "compute_naive_policy_gradient_loss(advantages, p",
        ),
        (
            "the two policies swapped",
            "compute_grpo_clip_loss(\n                advantages, policy_log_probs, old_log_probs, cliprange,",
            "compute_grpo_clip_loss(\n                advantages, old_log_probs, policy_log_probs, cliprange,",
        ),
        (
            "no clip, whatever is asked",
            "compute_grpo_clip_loss(\n                advantages, policy_log_probs, old_log_probs, cliprange,",
            "compute_grpo_no_clip_loss(\n                advantages, policy_log_probs, old_log_probs,",
        ),
        (
            "a clip, whatever is asked",
            'case "grpo_clip":',
            'case "grpo_clip" | "grpo_no_clip":\n            cliprange = cliprange or 0.2',
        ),
    ),
]

TOKEN_LOSSES = [
    *breaks(
        "compute_cispo_loss",
        "losses/token.py",
        in_family("compute_cispo_loss"),
        ("the weight carries gradient", "response_mask)).detach().exp()", "response_mask)).exp()"),
        (
            "bounds as distances from 1",
            "ratio.clamp(ratio_low, ratio_high)",
            "ratio.clamp(1 - ratio_low, 1 + ratio_high)",
        ),
        ("no lower bound", "ratio.clamp(ratio_low, ratio_high)", "ratio.clamp(max=ratio_high)"),
        (
            "a token beyond the bound loses its gradient",
            "ratio.clamp(ratio_low, ratio_high)",
            "torch.where(ratio > ratio_high, 0.0, ratio.clamp(min=ratio_low))",
        ),
        ("counted for good tokens alone", "ratio > ratio_high}", "(ratio > ratio_high) & (advantages > 0)}"),
        (
            "probability for its logarithm",
            "-weight * zero_outside_mask(policy_log_probs,",
            "-weight * zero_outside_mask(policy_log_probs.exp(),",
        ),
        (
            "hidden after the product alone",
            "-weight * zero_outside_mask(policy_log_probs, response_mask), ",
            "-weight * policy_log_probs, ",
        ),
        (
            "advantages carry gradient",
            "ratio.clamp(ratio_low, ratio_high) * advantages.detach()",
            "ratio.clamp(ratio_low, ratio_high) * advantages",
        ),
        (
            "the clip of PPO on the weight",
            "ratio.clamp(ratio_low, ratio_high) * advantages.detach()",
            "torch.minimum(ratio * advantages, ratio.clamp(ratio_low, ratio_high) * advantages).detach()",
        ),
    ),
    *breaks(
        "compute_sapo_loss",
        "losses/token.py",
        in_family("compute_sapo_loss"),
        (
            "temperatures swapped",
            "torch.full_like(ratio, temperature_negative).masked_fill(advantages > 0, temperature_positive)",
            "torch.full_like(ratio, temperature_positive).masked_fill(advantages > 0, temperature_negative)",
        ),
        ("not divided by the temperature", "-4 / temperature * torch", "-4 * torch"),
        ("gate not centered", "temperature * (ratio - 1)", "temperature * ratio"),
        ("gate in log space", "temperature * (ratio - 1)", "temperature * ratio.log()"),
        ("another gate", "torch.sigmoid(", "torch.tanh("),
        ("advantages carry gradient", "    advantages = advantages.detach()\n    ratio", "    ratio"),
        (
            "the log ratio is not held",
            "clamp_log_ratio(compute_log_ratio(policy_log_probs, old_log_probs, response_mask)).exp()\n    temp",
            "compute_log_ratio(policy_log_probs, old_log_probs, response_mask).exp()\n    temp",
        ),
        (
            "temperature upside down",
            "torch.sigmoid(temperature * (ratio - 1))",
            "torch.sigmoid((ratio - 1) / temperature)",
        ),
    ),
    *breaks(
        "compute_dppo_tv_loss",
        "losses/token.py",
        in_family("compute_dppo_tv_loss"),
        (
            "a distance of ratios",
            "moved = policy.detach().exp() - old.exp()",
            "moved = (policy.detach() - old).exp() - 1",
        ),
        ("a distance of logarithms", "moved = policy.detach().exp() - old.exp()", "moved = policy.detach() - old"),
        (
            "half the distance",
            "moved = policy.detach().exp() - old.exp()",
            "moved = (policy.detach().exp() - old.exp()) / 2",
        ),
        (
            "whichever way it moved",
            "moved < -threshold_low, moved > threshold_high",
            "moved.abs() > threshold_low, moved.abs() > threshold_high",
        ),
        (
            "thresholds swapped",
            "moved < -threshold_low, moved > threshold_high",
            "moved < -threshold_high, moved > threshold_low",
        ),
        ("ratio upside down", "(advantages, policy - old, low, high", "(advantages, old - policy, low, high"),
        (
            "the old policy carries gradient",
            "zero_outside_mask(old_log_probs.detach(), response_mask)\n    moved = policy.detach().exp()",
            "zero_outside_mask(old_log_probs, response_mask)\n    moved = policy.detach().exp()",
        ),
    ),
    *breaks(
        "compute_dppo_kl_loss",
        "losses/token.py",
        f"{LAWS} {FAMILY} -k 'test_losses or compute_dppo_kl_loss'",
        ("the other direction", "compute_binary_kl(policy.detach(), old)", "compute_binary_kl(old, policy.detach())"),
        ("whichever way it moved", "far & (moved < 0), far & (moved > 0)", "far, far"),
        ("the wrong way", "far & (moved < 0), far & (moved > 0)", "far & (moved > 0), far & (moved < 0)"),
        ("the log ratio alone", "compute_binary_kl(policy.detach(), old)", "moved.abs()"),
        ("ratio upside down", "(advantages, policy - old, far", "(advantages, old - policy, far"),
        (
            "the old policy carries gradient",
            "zero_outside_mask(old_log_probs.detach(), response_mask)\n    moved = policy.detach() - old\n",
            "zero_outside_mask(old_log_probs, response_mask)\n    moved = policy.detach() - old\n",
        ),
    ),
    *breaks(
        "compute_dro_loss",
        "losses/token.py",
        in_family("compute_dro_loss"),
        ("not halved", "penalty / 2 * log_ratio.square()", "penalty * log_ratio.square()"),
        ("a distance, not its square", "penalty / 2 * log_ratio.square()", "penalty / 2 * log_ratio.abs()"),
        ("a reward for moving", "* log_ratio + penalty / 2", "* log_ratio - penalty / 2"),
        (
            "the ratio, not its logarithm",
            "-advantages.detach() * log_ratio + penalty",
            "-advantages.detach() * log_ratio.exp() + penalty",
        ),
        (
            "the penalty carries no gradient",
            "penalty / 2 * log_ratio.square()",
            "penalty / 2 * log_ratio.detach().square()",
        ),
        ("advantages carry gradient", "losses = -advantages.detach() * log_ratio", "losses = -advantages * log_ratio"),
        (
            "padding has a loss",
            "log_ratio.square()\n    return zero_outside_mask(losses, response_mask), {}",
            "log_ratio.square()\n    return losses, {}",
        ),
    ),
    *breaks(
        "compute_kl_cov_loss",
        "losses/token.py",
        in_family("compute_kl_cov_loss"),
        (
            "all tokens penalized",
            "torch.where(penalized, kl_coef * log_ratio.abs(), 0.0)",
            "kl_coef * log_ratio.abs()",
        ),
        ("signed", "kl_coef * log_ratio.abs()", "kl_coef * log_ratio"),
        ("squared", "kl_coef * log_ratio.abs()", "kl_coef * log_ratio.square() / 2"),
        ("a reward for moving", "advantages.detach() + penalty", "advantages.detach() - penalty"),
        (
            "the objective left out where penalized",
            "losses = -clamp_log_ratio(log_ratio).exp() * advantages.detach() + penalty",
            "losses = torch.where(penalized, penalty, -clamp_log_ratio(log_ratio).exp() * advantages.detach())",
        ),
        ("the penalty carries no gradient", "kl_coef * log_ratio.abs()", "kl_coef * log_ratio.detach().abs()"),
        ("advantages carry gradient", "* advantages.detach() + penalty", "* advantages + penalty"),
        ("the coefficient forgotten", "kl_coef * log_ratio.abs()", "log_ratio.abs()"),
    ),
    *breaks(
        "_masked_ratio_loss",
        "losses/token.py",
        in_family("dppo"),
        ("low: the sign of the advantage forgotten", "too_low & (advantages < 0)", "too_low"),
        ("high: the sign of the advantage forgotten", "too_high & (advantages > 0)", "too_high"),
        (
            "clipped, the value stays",
            'torch.where(flags["is_clipped"], 0.0, -clamp_log_ratio(log_ratio).exp() * advantages)',
            'torch.where(flags["is_clipped"], log_ratio.detach(), log_ratio).exp().neg() * advantages',
        ),
        (
            "the log ratio is not held",
            "0.0, -clamp_log_ratio(log_ratio).exp() * advantages)",
            "0.0, -log_ratio.exp() * advantages)",
        ),
        ("advantages carry gradient", "    advantages = advantages.detach()\n    flags", "    flags"),
        (
            "what moved too far up stays",
            'torch.where(flags["is_clipped"], 0.0',
            'torch.where(flags["is_clipped_low"], 0.0',
        ),
    ),
]

PREFERENCES = [
    *breaks(
        "compute_dpo_loss",
        "losses/preference.py",
        f"{LAWS} -k dpo",
        (
            "the other is preferred",
            "beta * (chosen.sum(dim=1, keepdim=True) - rejected.sum(dim=1, keepdim=True))",
            "beta * (rejected.sum(dim=1, keepdim=True) - chosen.sum(dim=1, keepdim=True))",
        ),
        ("means, not sums", "beta * (chosen.sum(dim=1, keepdim=True) -", "beta * (chosen.mean(dim=1, keepdim=True) -"),
        (
            "no reference",
            "chosen = compute_log_ratio(chosen_log_probs, reference_chosen_log_probs, chosen_mask)",
            "chosen = torch.where(chosen_mask, chosen_log_probs, 0.0)",
        ),
        (
            "the sigmoid, not its logarithm",
            "-(1 - label_smoothing) * log_sigmoid(margin)",
            "-(1 - label_smoothing) * margin.sigmoid()",
        ),
        ("not smoothed", " - label_smoothing * log_sigmoid(-margin)", ""),
        ("smoothed twice", "-(1 - label_smoothing) * log_sigmoid", "-(1 - 2 * label_smoothing) * log_sigmoid"),
        ("beta forgotten", "margin = beta * (chosen", "margin = (chosen"),
        ("metadata carry gradient", "    margin = margin.detach()\n", ""),
    ),
]

MEAN = "mean_over_response(log_ratio, response_mask)"

SEQUENCE_LOSSES = [
    *breaks(
        "compute_gspo_loss",
        "losses/sequence.py",
        in_family("compute_gspo_loss"),
        (
            "a product, not a mean",
            MEAN,
            "log_ratio.sum(dim=1, keepdim=True)",
        ),
        (
            "the arithmetic mean of the ratios",
            MEAN,
            "(1 + mean_over_response(log_ratio.expm1(), response_mask)).log()",
        ),
        (
            "a mean over padding",
            MEAN,
            "log_ratio.mean(dim=1, keepdim=True)",
        ),
        ("a loss of nothing", "torch.where(has_tokens, losses, 0.0)", "losses"),
        (
            "advantages carry gradient",
            "(response_ratio, advantages.detach(), bounds)",
            "(response_ratio, advantages, bounds)",
        ),
        (
            "the log ratio is not held",
            "clamp_log_ratio(mean_over_response(log_ratio, response_mask)).exp()",
            "mean_over_response(log_ratio, response_mask).exp()",
        ),
        (
            "the ratio of the last token",
            MEAN,
            "log_ratio[:, -1:]",
        ),
    ),
    *breaks(
        "compute_gspo_token_loss",
        "losses/sequence.py",
        in_family("compute_gspo_token_loss"),
        (
            "the mean carries gradient too",
            "mean_over_response(log_ratio.detach(), response_mask)",
            "mean_over_response(log_ratio, response_mask)",
        ),
        (
            "the stop-gradient on the other factor",
            "log_ratio.detach(), response_mask)).exp()\n    ratio = response_ratio * (policy - policy.detach()).exp()",
            "log_ratio, response_mask)).exp()\n    ratio = response_ratio.expand_as(policy)",
        ),
        ("it falls where it ought to rise", "(policy - policy.detach()).exp()", "(policy.detach() - policy).exp()"),
        (
            "the ratio of each token",
            "clamp_log_ratio(mean_over_response(log_ratio.detach(), response_mask)).exp()",
            "clamp_log_ratio(log_ratio.detach()).exp()",
        ),
        (
            "a product, not a mean",
            "clamp_log_ratio(mean_over_response(log_ratio.detach(), response_mask)).exp()",
            "clamp_log_ratio(log_ratio.detach().sum(dim=1, keepdim=True)).exp()",
        ),
        (
            "not hidden",
            "return zero_outside_mask(losses, response_mask), mask_flags(flags, response_mask)",
            "return losses, mask_flags(flags, response_mask)",
        ),
        (
            "the policy is not hidden",
            "policy = zero_outside_mask(policy_log_probs, response_mask)",
            "policy = policy_log_probs",
        ),
        (
            "advantages carry gradient",
            "compute_clip_surrogate(ratio, advantages.detach()",
            "compute_clip_surrogate(ratio, advantages",
        ),
        (
            "divided by its length",
            "(policy - policy.detach()).exp()",
            "mean_over_response(policy - policy.detach(), response_mask).exp()",
        ),
    ),
    *breaks(
        "compute_gmpo_loss",
        "losses/sequence.py",
        in_family("compute_gmpo_loss"),
        ("low: cut whatever the sign", "(log_ratio < low) & (advantages < 0)", "log_ratio < low"),
        ("high: cut whatever the sign", "(log_ratio > high) & (advantages > 0)", "log_ratio > high"),
        (
            "the mean cut, not the tokens",
            "mean_over_response(clipped, response_mask)",
            "mean_over_response(log_ratio, response_mask).clamp(low, high)",
        ),
        (
            "bounds of ratios",
            "low, high = resolve_clip_bounds(cliprange, cliprange_high, center=0.0)",
            "low, high = (math.log(bound) for bound in resolve_clip_bounds(cliprange, cliprange_high))",
        ),
        ("a product, not a mean", "mean_over_response(clipped, response_mask)", "clipped.sum(dim=1, keepdim=True)"),
        (
            "the arithmetic mean of the ratios",
            "clamp_log_ratio(mean_over_response(clipped, response_mask)).exp()",
            "(1 + mean_over_response(zero_outside_mask(clamp_log_ratio(clipped).expm1(), response_mask), "
            "response_mask))",
        ),
        (
            "a loss of nothing",
            "torch.where(response_mask.any(dim=1, keepdim=True), losses, 0.0), mask",
            "losses, mask",
        ),
        ("advantages carry gradient", "    advantages = advantages.detach()\n    log_ratio", "    log_ratio"),
        (
            "what is cut is left out",
            'torch.where(flags["is_clipped_high"], high, log_ratio)',
            'torch.where(flags["is_clipped_high"], 0.0, log_ratio)',
        ),
    ),
    *breaks(
        "compute_luspo_loss",
        "losses/sequence.py",
        in_family("compute_luspo_loss"),
        ("the longest length", "losses * response_mask.sum(dim=1, keepdim=True)", "losses * response_mask.shape[1]"),
        ("no length", "return losses * response_mask.sum(dim=1, keepdim=True), flags", "return losses, flags"),
        (
            "the mean length of the batch",
            "losses * response_mask.sum(dim=1, keepdim=True)",
            "losses * response_mask.sum() / len(response_mask)",
        ),
        (
            "the root of the length",
            "losses * response_mask.sum(dim=1, keepdim=True)",
            "losses * response_mask.sum(dim=1, keepdim=True).sqrt()",
        ),
        ("the second bound forgotten", "cliprange, cliprange_high=cliprange_high\n    )", "cliprange\n    )"),
        (
            "divided by the length",
            "losses * response_mask.sum(dim=1, keepdim=True)",
            "losses / response_mask.sum(dim=1, keepdim=True).clamp(min=1)",
        ),
    ),
    *breaks(
        "compute_vespo_loss",
        "losses/sequence.py",
        in_family("compute_vespo_loss"),
        ("the weight carries gradient", "response_mask).detach()\n    log_weight", "response_mask)\n    log_weight"),
        (
            "a mean, not a product",
            "clamp_log_ratio(log_ratio.sum(dim=1, keepdim=True))",
            "clamp_log_ratio(mean_over_response(log_ratio, response_mask))",
        ),
        (
            "power and decay swapped",
            "power * log_weight + decay * (1 - log_weight.exp())",
            "decay * log_weight + power * (1 - log_weight.exp())",
        ),
        ("the two signs swapped", "masked_fill(advantages < 0, below)", "masked_fill(advantages >= 0, below)"),
        ("not 1 at a ratio of 1", "decay * (1 - log_weight.exp())", "decay * -log_weight.exp()"),
        (
            "hidden after the product alone",
            "zero_outside_mask(-weight * zero_outside_mask(policy_log_probs, response_mask), ",
            "zero_outside_mask(-weight * policy_log_probs, ",
        ),
        ("advantages carry gradient", "    advantages = advantages.detach()\n    power", "    power"),
        ("it decays with the logarithm", "decay * (1 - log_weight.exp())", "decay * -log_weight"),
    ),
]

MUTANTS = [*RATIOS, *LOSSES, *TOKEN_LOSSES, *PREFERENCES, *SEQUENCE_LOSSES]

"""What surrounds a loss: selection, importance, regularizers, shaping, diagnostics and evaluation."""

from tests.mutants.table import breaks

CORRECTIONS, ERRORS = "tests/property/test_corrections.py", "tests/unit/test_errors.py"


def of(*words: str) -> str:
    return f"{CORRECTIONS} -k '{' or '.join(words)}'"


MEAN_DIVERGENCE = """-mean_over_response(
        compute_log_ratio(policy_log_probs.detach(), behavior_log_probs, response_mask), response_mask
    )"""
SELECTION = [
    *breaks(
        "select_high_covariance",
        "losses/selection.py",
        of("high_covariance", "share"),
        (
            "means over padding",
            "(values - values.sum() / count) * (scores - scores.sum() / count)",
            "(values - values.mean()) * (scores - scores.mean())",
        ),
        ("advantages not centered", "(values - values.sum() / count)", "values"),
        ("log-probs not centered", "(scores - scores.sum() / count)", "scores"),
        ("rounded up", "math.floor(fraction * int", "math.ceil(fraction * int"),
        (
            "possibly none",
            "max(1, math.floor(fraction * int(response_mask.sum()) + 1e-9))",
            "math.floor(fraction * int(response_mask.sum()))",
        ),
        (
            "a token less for a rounding",
            "math.floor(fraction * int(response_mask.sum()) + 1e-9)",
            "math.floor(fraction * int(response_mask.sum()))",
        ),
        ("without a covariance too", "(covariance > low)", "(covariance >= low)"),
        (
            "by size, whatever the sign",
            "(scores - scores.sum() / count)\n",
            "(scores - scores.sum() / count)\n    covariance = covariance.abs()\n",
        ),
        (
            "a share of the candidates",
            "math.floor(fraction * int(response_mask.sum()) + 1e-9)",
            "math.floor(fraction * int(candidates.sum()) + 1e-9)",
        ),
        ("padding is chosen", "candidates = response_mask & (covariance > low)", "candidates = (covariance > low)"),
        ("no upper bound", " & (covariance < high)", ""),
        (
            "means of each response",
            "(values - values.sum() / count) * (scores - scores.sum() / count)",
            "(values - mean_over_response(values, response_mask))"
            " * (scores - mean_over_response(scores, response_mask))",
        ),
    ),
    *breaks(
        "select_high_entropy",
        "losses/selection.py",
        of("high_entropy", "share"),
        (
            "rounded down",
            "math.ceil(fraction * int(response_mask.sum()) - 1e-9)",
            "math.floor(fraction * int(response_mask.sum()))",
        ),
        (
            "a token more for a rounding",
            "math.ceil(fraction * int(response_mask.sum()) - 1e-9)",
            "math.ceil(fraction * int(response_mask.sum()))",
        ),
        (
            "a share of padding too",
            "math.ceil(fraction * int(response_mask.sum())",
            "math.ceil(fraction * response_mask.numel()",
        ),
        ("the lowest", "_select_largest(token_entropy.detach(), ", "_select_largest(-token_entropy.detach(), "),
        ("the share that is left out", "math.ceil(fraction * int", "math.ceil((1 - fraction) * int"),
        (
            "the threshold of padding too",
            "return _select_largest(token_entropy.detach(), response_mask, n_selected)",
            "everything = torch.ones_like(response_mask)\n"
            "    return response_mask & _select_largest(token_entropy.detach(), everything, n_selected)",
        ),
        (
            "a threshold of entropy",
            "return _select_largest(token_entropy.detach(), response_mask, n_selected)",
            "return response_mask & (token_entropy >= 1 - fraction)",
        ),
    ),
    *breaks(
        "keep_on_policy_sequences",
        "losses/selection.py",
        of("on_policy_sequences"),
        ("the divergence upside down", "divergence = -mean_over_response(", "divergence = mean_over_response("),
        (
            "a sum, not a mean",
            MEAN_DIVERGENCE,
            "-compute_log_ratio(policy_log_probs.detach(), behavior_log_probs, response_mask)"
            ".sum(dim=1, keepdim=True)",
        ),
        (
            "a mean over padding",
            MEAN_DIVERGENCE,
            "-compute_log_ratio(policy_log_probs.detach(), behavior_log_probs, response_mask)"
            ".mean(dim=1, keepdim=True)",
        ),
        ("good responses too", "~((advantages < 0) & (divergence", "~((divergence"),
        ("good responses alone", "(advantages < 0) & (divergence", "(advantages > 0) & (divergence"),
        ("responses without an advantage too", "(advantages < 0) & (divergence", "(advantages <= 0) & (divergence"),
        ("whichever way it moved", "(divergence > threshold)", "(divergence.abs() > threshold)"),
        ("either of the two", "(advantages < 0) & (divergence", "(advantages < 0) | (divergence"),
    ),
    *breaks(
        "keep_within_second_moment",
        "losses/selection.py",
        of("second_moment"),
        ("the ratios, not their squares", "log_ratio.square().nan_to_num", "log_ratio.abs().nan_to_num"),
        (
            "a bound on each token",
            "return response_mask & (squares < ordered[n_kept]) if n_kept < len(ordered) else response_mask.clone()",
            "return response_mask & (squares <= threshold)",
        ),
        ("ties are kept", "(squares < ordered[n_kept])", "(squares <= ordered[n_kept])"),
        ("the threshold excluded", "(means <= threshold)", "(means < threshold)"),
        (
            "sums, not means",
            "ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)",
            "ordered.cumsum(0)",
        ),
        ("means of one more", "torch.arange(1, len(ordered) + 1,", "torch.arange(2, len(ordered) + 2,"),
        (
            "the smallest are dropped",
            "squares[response_mask].sort().values",
            "squares[response_mask].sort(descending=True).values",
        ),
        ("padding counts", "ordered = squares[response_mask].sort()", "ordered = squares.flatten().sort()"),
        ("NaN spreads", ".nan_to_num(math.inf, math.inf)", ""),
        (
            "padding is kept",
            "if n_kept < len(ordered) else response_mask.clone()",
            "if n_kept < len(ordered) else torch.ones_like(response_mask)",
        ),
    ),
    *breaks(
        "drop_truncated_responses",
        "losses/selection.py",
        of("truncated_responses"),
        ("the complete ones", "response_mask & ~truncated[:, None]", "response_mask & truncated[:, None]"),
        ("none", "return response_mask & ~truncated[:, None]", "return response_mask.clone()"),
        (
            "the last token alone",
            "~truncated[:, None]",
            "~(truncated[:, None] & (response_mask.cumsum(1) == response_mask.sum(1, keepdim=True)))",
        ),
        ("padding back in", "response_mask & ~truncated[:, None]", "~truncated[:, None].expand_as(response_mask)"),
        ("one cut, all dropped", "~truncated[:, None]", "~truncated.any()"),
        (
            "the caller's mask is overwritten",
            "return response_mask & ~truncated[:, None]",
            "response_mask[truncated] = False\n    return response_mask",
        ),
    ),
    *breaks(
        "_select_largest",
        "losses/selection.py",
        of("high_covariance", "high_entropy"),
        ("one too many", "min(count, len(candidate_values))", "min(count + 1, len(candidate_values))"),
        ("ties are left out", "(values >= threshold)", "(values > threshold)"),
        ("padding above the threshold", "return candidates & (values >=", "return (values >="),
        ("none is one", "count = min(count, len", "count = min(max(1, count), len"),
        ("the largest alone", ".values[-1]\n", ".values[0]\n"),
    ),
]

RATIOS = of("ratios_by", "samplers_own")
BOUNDS = f"{ERRORS} {CORRECTIONS} -k 'truncation or test_errors and low'"
IMPORTANCE = [
    *breaks(
        "compute_importance_ratios",
        "losses/importance.py",
        RATIOS,
        (
            "upside down",
            "compute_detached_ratio(old_log_probs, sampler_log_probs).masked",
            "compute_detached_ratio(sampler_log_probs, old_log_probs).masked",
        ),
        ("1 outside the mask", ".masked_fill_(~response_mask, 0.0)\n    log_ratio", "\n    log_ratio"),
        ("geometric and sequence swapped", 'if level == "geometric" else', 'if level == "sequence" else'),
        (
            "the arithmetic mean of the ratios",
            "mean_over_response(log_ratio, response_mask) if",
            "(1 + mean_over_response(log_ratio.expm1(), response_mask)).log() if",
        ),
        (
            "the old policy carries gradient",
            "compute_log_ratio(old_log_probs.detach(), sampler_log_probs, response_mask)\n    total",
            "compute_log_ratio(old_log_probs, sampler_log_probs, response_mask)\n    total",
        ),
        ("the product is not clamped", "return clamp_log_ratio(total).exp()", "return total.exp()"),
        (
            "the factors are clamped",
            "else log_ratio.sum(dim=1, keepdim=True)",
            "else clamp_log_ratio(log_ratio).sum(dim=1, keepdim=True)",
        ),
        (
            "a mean over padding",
            "mean_over_response(log_ratio, response_mask) if",
            "log_ratio.mean(dim=1, keepdim=True) if",
        ),
    ),
    *breaks(
        "compute_importance_divergences",
        "losses/importance.py",
        of("divergences"),
        ("one way alone", "(old.exp() - sampler.exp()).abs()", "(old.exp() - sampler.exp())"),
        ("a difference of log-probs", "(old.exp() - sampler.exp()).abs()", "(old - sampler).abs()"),
        ("the other direction", "compute_binary_kl(old, sampler)", "compute_binary_kl(sampler, old)"),
        ("k2 not halved", "(old - sampler).square() / 2", "(old - sampler).square()"),
        (
            "k3 of the other policy",
            "log_ratio = clamp_log_ratio(old - sampler)",
            "log_ratio = clamp_log_ratio(sampler - old)",
        ),
        ("negative by rounding", "divergences = divergences.clamp(min=0)", "divergences = divergences.clone()"),
        (
            "sum and mean exchanged",
            'if level == "geometric":\n        return mean',
            'if level == "sequence":\n        return mean',
        ),
        (
            "a mean over padding",
            "return mean_over_response(divergences, response_mask)",
            "return divergences.mean(dim=1, keepdim=True)",
        ),
        (
            "the trainer carries gradient",
            "zero_outside_mask(old_log_probs.detach(), response_mask)",
            "zero_outside_mask(old_log_probs, response_mask)",
        ),
    ),
    *breaks(
        "truncate_importance_weights",
        "losses/importance.py",
        BOUNDS,
        ("no lower bound", "ratios.detach().clamp(low, high)", "ratios.detach().clamp(max=high)"),
        ("no upper bound", "ratios.detach().clamp(low, high)", "ratios.detach().clamp(min=low)"),
        ("distances from 1", "ratios.detach().clamp(low, high)", "ratios.detach().clamp(1 - low, 1 + high)"),
        ("the ratios carry gradient", "ratios.detach().clamp(low, high)", "ratios.clamp(low, high)"),
        (
            "the caller's ratios are overwritten",
            "ratios.detach().clamp(low, high)",
            "ratios.detach().clamp_(low, high)",
        ),
        (
            "left out, not cut",
            "ratios.detach().clamp(low, high)",
            "torch.where(ratios.detach() <= high, ratios.detach(), 0.0).clamp(min=low)",
        ),
    ),
    *breaks(
        "mask_importance_weights",
        "losses/importance.py",
        BOUNDS,
        ("weight 1 for what is kept", "(ratios <= high), ratios, 0.0)", "(ratios <= high), 1.0, 0.0)"),
        (
            "cut, not left out",
            "torch.where((ratios >= low) & (ratios <= high), ratios, 0.0)",
            "ratios.clamp(low, high)",
        ),
        (
            "no lower bound",
            "torch.where((ratios >= low) & (ratios <= high), ratios, 0.0)",
            "torch.where(ratios <= high, ratios, 0.0)",
        ),
        (
            "bounds excluded",
            "torch.where((ratios >= low) & (ratios <= high), ratios",
            "torch.where((ratios > low) & (ratios < high), ratios",
        ),
        (
            "the ratios carry gradient",
            "    ratios = ratios.detach()\n    return torch.where",
            "    return torch.where",
        ),
        ("what lies outside alone", "(ratios <= high), ratios, 0.0)", "(ratios <= high), 0.0, ratios)"),
        (
            "a distance from 1",
            "torch.where((ratios >= low) & (ratios <= high), ratios",
            "torch.where((ratios - 1).abs() <= high, ratios",
        ),
    ),
    *breaks(
        "keep_within_bounds",
        "losses/importance.py",
        BOUNDS,
        ("bounds excluded", "return (ratios >= low) & (ratios <= high)", "return (ratios > low) & (ratios < high)"),
        ("no lower bound", "return (ratios >= low) & (ratios <= high)", "return ratios <= high"),
        ("no upper bound", "return (ratios >= low) & (ratios <= high)", "return ratios >= low"),
        ("either bound", "return (ratios >= low) & (ratios <= high)", "return (ratios >= low) | (ratios <= high)"),
        (
            "what lies outside",
            "return (ratios >= low) & (ratios <= high)",
            "return ~((ratios >= low) & (ratios <= high))",
        ),
        (
            "the upper bound in log space",
            "return (ratios >= low) & (ratios <= high)",
            "return (ratios >= 1 / high) & (ratios <= high)",
        ),
    ),
    *breaks(
        "self_normalize_weights",
        "losses/importance.py",
        of("self_normalize"),
        ("a mean over padding", "kept * counted.sum() /", "kept * counted.numel() /"),
        ("a sum of 1", "kept * counted.sum() /", "kept /"),
        (
            "mask multiplied",
            "kept = torch.where(counted, weights.detach(), 0.0)\n    total",
            "kept = weights.detach() * counted\n    total",
        ),
        ("all 0 gives NaN", "torch.where(total > 0, total, 1.0)", "total"),
        (
            "the weights carry gradient",
            "kept = torch.where(counted, weights.detach(), 0.0)\n    total",
            "kept = torch.where(counted, weights, 0.0)\n    total",
        ),
        ("each response by itself", "total = kept.sum()", "total = kept.sum(dim=1, keepdim=True)"),
    ),
    *breaks(
        "effective_sample_size",
        "losses/importance.py",
        of("self_normalize"),
        ("the sum not squared", "kept.sum().square() /", "kept.sum() /"),
        ("a number, not a share", "squares = counted.sum() * kept.square().sum()", "squares = kept.square().sum()"),
        ("a share of padding too", "squares = counted.sum() *", "squares = counted.numel() *"),
        (
            "all 0 gives NaN",
            "torch.where(squares > 0, kept.sum().square() / torch.where(squares > 0, squares, 1.0), 0.0)",
            "kept.sum().square() / squares",
        ),
        (
            "the weights carry gradient",
            "kept = torch.where(counted, weights.detach(), 0.0)\n    squares",
            "kept = torch.where(counted, weights, 0.0)\n    squares",
        ),
        (
            "mask multiplied",
            "kept = torch.where(counted, weights.detach(), 0.0)\n    squares",
            "kept = weights.detach() * counted\n    squares",
        ),
        ("the squares of the sum", "kept.square().sum()", "kept.sum().square()"),
    ),
    *breaks(
        "describe_mismatch",
        "losses/importance.py",
        of("mismatch", "samplers_own"),
        ("the mean signed", "log_ratio.abs().sum() / tokens", "log_ratio.sum() / tokens"),
        ("a mean over padding", "tokens = response_mask.sum().clamp(min=1)", "tokens = response_mask.numel()"),
        ("nothing over nothing", "tokens = response_mask.sum().clamp(min=1)", "tokens = response_mask.sum()"),
        ("the other divergence", "clamped.expm1() - clamped", "clamped.neg().expm1() + clamped"),
        ("the largest signed", "log_ratio.abs().max() if", "log_ratio.max() if"),
        (
            "the sample size of the logarithms",
            "effective_sample_size(clamped.exp(), response_mask)",
            "effective_sample_size(clamped.abs(), response_mask)",
        ),
        ("ratios not clamped", "clamped = clamp_log_ratio(log_ratio)", "clamped = log_ratio"),
        (
            "the old policy carries gradient",
            "compute_log_ratio(old_log_probs.detach(), sampler_log_probs, response_mask)\n    tokens",
            "compute_log_ratio(old_log_probs, sampler_log_probs, response_mask)\n    tokens",
        ),
        ("k1 for k3", "masked_sum(clamped.expm1() - clamped, response_mask)", "masked_sum(-clamped, response_mask)"),
    ),
    *breaks(
        "_counted",
        "losses/importance.py",
        of("self_normalize"),
        ("empty responses count", "mask.any(dim=1, keepdim=True)", "torch.ones_like(weights, dtype=torch.bool)"),
        ("responses without padding alone", "mask.any(dim=1, keepdim=True)", "mask.all(dim=1, keepdim=True)"),
        ("padding counts", "return mask if weights.shape", "return torch.ones_like(mask) if weights.shape"),
    ),
    *breaks(
        "_check_bounds",
        "losses/importance.py",
        BOUNDS,
        ("any order", "require(0 <= low <= high,", "require(0 <= low and 0 <= high,"),
        ("any sign", "require(0 <= low <= high,", "require(low <= high,"),
    ),
]

KL = [
    *breaks(
        "estimate_kl",
        "losses/regularizers.py",
        of("kl"),
        ("k1: its sign", "            return -x\n", "            return x\n"),
        ("policy and reference swapped", "x = -compute_log_ratio(", "x = compute_log_ratio("),
        ("k2: not halved", "x.square() / 2", "x.square()"),
        ("k3: not clamped", "growth = clamp_log_ratio(x).expm1()", "growth = x.expm1()"),
        ("k3: both terms clamped", "value = growth - x", "value = growth - clamp_log_ratio(x)"),
        ("k3: a slope of 1", "attach_gradient(value, growth, x)", "attach_gradient(value, None, x)"),
        ("traced k3: not clamped", "k3 = clamp_log_ratio(x).expm1() - x", "k3 = x.expm1() - x"),
        ("traced k3: 1 forgotten", "k3 = clamp_log_ratio(x).expm1() - x", "k3 = clamp_log_ratio(x).exp() - x"),
        ("k3: 1 forgotten", "value = growth - x", "value = growth + 1 - x"),
        (
            "ratio_k3: the ratio carries no gradient",
            "response_mask)).exp() * k3",
            "response_mask)).exp().detach() * k3",
        ),
        ("ratio_k3: upside down", "response_mask)).exp() * k3", "response_mask)).neg().exp() * k3"),
        (
            "ratio_k3: the gradient of the ratio alone",
            "response_mask)).exp() * k3",
            "response_mask)).exp() * k3.detach()",
        ),
        ("abs: signed", "return x.abs()", "return x"),
        ("mask forgotten", "reference_log_probs, response_mask)\n    match", "reference_log_probs)\n    match"),
        (
            "mask multiplied",
            "x = -compute_log_ratio(policy_log_probs, reference_log_probs, response_mask)",
            "x = -compute_log_ratio(policy_log_probs, reference_log_probs)\n    if response_mask is not None:\n"
            "        x = x * response_mask",
        ),
        ("k1: never negative", "            return -x\n", "            return (-x).clamp(min=0)\n"),
    ),
    *breaks(
        "compute_reward_to_go",
        "losses/regularizers.py",
        of("reward_to_go"),
        ("of the past", "rewards.flip(1).cumsum(1).flip(1)", "rewards.cumsum(1)"),
        ("without the own reward", "rewards.flip(1).cumsum(1).flip(1)", "rewards.flip(1).cumsum(1).flip(1) - rewards"),
        (
            "of the whole response",
            "rewards.flip(1).cumsum(1).flip(1)",
            "rewards.sum(1, keepdim=True).expand_as(rewards)",
        ),
        (
            "a hole is a step",
            "torch.where(response_mask[:, column], rewards[:, column] + discount * running, running)",
            "rewards[:, column] + discount * running",
        ),
        ("not discounted", "rewards[:, column] + discount * running", "rewards[:, column] + running"),
        (
            "the own reward discounted too",
            "rewards[:, column] + discount * running",
            "discount * (rewards[:, column] + running)",
        ),
        (
            "rewards carry gradient",
            "zero_outside_mask(token_rewards.detach(), response_mask)",
            "zero_outside_mask(token_rewards, response_mask)",
        ),
        (
            "holes carry what lies beyond, undiscounted",
            "zero_outside_mask(rewards.flip(1).cumsum(1).flip(1), response_mask)",
            "rewards.flip(1).cumsum(1).flip(1)",
        ),
        (
            "holes carry what lies beyond, discounted",
            "return zero_outside_mask(returns, response_mask)",
            "return returns",
        ),
    ),
]

SHAPING = [
    *breaks(
        "compute_soft_overlong_penalty",
        "advantages/shaping.py",
        of("overlong"),
        ("it starts at the limit", "(max_length - buffer - lengths)", "(max_length - lengths)"),
        ("no floor", ".clamp(-1, 0) if", ".clamp(max=0) if"),
        ("no ceiling", ".clamp(-1, 0) if", ".clamp(min=-1) if"),
        ("a reward", "(excess / buffer).clamp(-1, 0)", "(-excess / buffer).clamp(0, 1)"),
        ("a share of the limit", "(excess / buffer)", "(excess / max_length)"),
        ("no buffer: at the limit too", "torch.where(excess < 0,", "torch.where(excess <= 0,"),
        ("all at once", "(excess / buffer).clamp(-1, 0) if", "(excess / buffer).floor().clamp(-1, 0) if"),
    ),
    *breaks(
        "compute_cosine_length_reward",
        "advantages/shaping.py",
        of("cosine"),
        ("not halved", "end + 0.5 * (start - end)", "end + (start - end)"),
        ("the ends swapped", "end + 0.5 * (start - end)", "start + 0.5 * (end - start)"),
        (
            "beyond the limit it comes back",
            "lengths.to(torch.float32).clamp(max=max_length)",
            "lengths.to(torch.float32)",
        ),
        ("a whole period", "torch.cos(math.pi * share)", "torch.cos(2 * math.pi * share)"),
        ("a straight line", "torch.cos(math.pi * share)", "(1 - 2 * share)"),
        ("half a turn too little", "(1 + torch.cos(math.pi * share))", "2 * torch.cos(math.pi * share / 2)"),
    ),
    *breaks(
        "adapt_entropy_coefficient",
        "losses/regularizers.py",
        of("entropy_coefficient"),
        ("away from the target", "step if entropy <= target else -step", "-step if entropy <= target else step"),
        ("at the target down", "step if entropy <= target", "step if entropy < target"),
        (
            "no lower bound",
            "max(low, coefficient + (step if entropy <= target else -step))",
            "coefficient + (step if entropy <= target else -step)",
        ),
        (
            "no upper bound",
            "min(high, max(low, coefficient + (step if entropy <= target else -step)))",
            "max(low, coefficient + (step if entropy <= target else -step))",
        ),
        ("in proportion", "(step if entropy <= target else -step)", "step * (target - entropy)"),
        ("never down", "step if entropy <= target else -step", "step if entropy <= target else 0"),
        (
            "a factor",
            "coefficient + (step if entropy <= target else -step)",
            "coefficient * (1 + (step if entropy <= target else -step))",
        ),
    ),
]

DIAGNOSTICS = [
    *breaks(
        "estimate_mean_interval",
        "evaluation.py",
        of("wilson"),
        ("of one side", "inv_cdf((1 + confidence) / 2)", "inv_cdf(confidence)"),
        ("a square forgotten", "z**2 / (4 * m**2)", "z**2 / (4 * m)"),
        ("not scaled", "scale = 1 + z**2 / m", "scale = 1"),
        ("around the mean", "middle = mean + z**2 / (2 * m)", "middle = mean * (1 + z**2 / m)"),
        ("standard errors alone", " / m + z**2 / (4 * m**2))", " / m)"),
        ("one question fewer", "m, mean = len(given), ", "m, mean = max(1, len(given) - 1), "),
        ("the variance of the values", "mean * (1 - mean) / m", "given.var(correction=0).item() / m"),
    ),
    *breaks(
        "compute_majority_accuracy",
        "evaluation.py",
        of("majority"),
        (
            "of those that tie, the first",
            "for answer, count in votes.items() if count == max(votes.values())]",
            "for answer, count in votes.items() if count == max(votes.values())][:1]",
        ),
        ("no answer is an answer", "Counter(answer for answer in row if answer is not None)", "Counter(row)"),
        ("more than half of the votes", "if count == max(votes.values())]", "if 2 * count > sum(votes.values())]"),
        (
            "any answer right",
            "winners = [answer for answer, count in votes.items() if count == max(votes.values())]",
            "winners = [answer for answer in votes if answer in right] or list(votes)",
        ),
        (
            "ties in favor",
            "sum(answer in right for answer in winners) / len(winners) if",
            "float(any(answer in right for answer in winners)) if",
        ),
        (
            "mean accuracy",
            "values.append(sum(answer in right for answer in winners) / len(winners) if winners else 0.0)",
            "values.append(sum(verdicts) / len(verdicts))",
        ),
        ("no vote is right", "if winners else 0.0", "if winners else 1.0"),
    ),
    *breaks(
        "compute_sign_flip_p_value",
        "evaluation.py",
        of("sign_flip", "p_value"),
        ("nothing is left of a small one", "max(sys.float_info.min, extreme)", "extreme"),
        ("one-sided", "shares[sums.abs() >= abs(int(differences.sum()))]", "shares[sums >= int(differences.sum())]"),
        ("more extreme alone", "sums.abs() >= abs(", "sums.abs() > abs("),
        ("sizes forgotten", "abs(difference) for difference", "1 for difference"),
        ("signs are dependent", "shares[size:] += shares[:-size].clone()", "shares[size:] += shares[:-size]"),
        ("positive sums alone", "2 * torch.arange(len(shares)) - sum(sizes)", "torch.arange(len(shares))"),
        ("the absolute sum is observed", "abs(int(differences.sum()))", "sum(sizes)"),
    ),
    *breaks(
        "find_signal_groups",
        "advantages/groups.py",
        of("silent_groups"),
        (
            "neither all 0 nor all 1",
            "return split_groups(rewards, group_sizes).has_signal.squeeze(1)",
            "mean = split_groups(rewards, group_sizes).mean.squeeze(1)\n    return (mean > 0) & (mean < 1)",
        ),
        (
            "any reward at all",
            "return split_groups(rewards, group_sizes).has_signal.squeeze(1)",
            "return (split_groups(rewards, group_sizes).mean > 0).squeeze(1)",
        ),
        (
            "what was not scored is 0",
            "split_groups(rewards, group_sizes).has_signal.squeeze(1)",
            "split_groups(rewards.nan_to_num(0.0), group_sizes).has_signal.squeeze(1)",
        ),
        (
            "decided by the deviation",
            "split_groups(rewards, group_sizes).has_signal.squeeze(1)",
            "(split_groups(rewards, group_sizes).std(1) > 0).squeeze(1)",
        ),
        (
            "those without",
            "return split_groups(rewards, group_sizes).has_signal",
            "return ~split_groups(rewards, group_sizes).has_signal",
        ),
    ),
    *breaks(
        "describe_silent_groups",
        "advantages/groups.py",
        of("silent_groups"),
        (
            "a mean of 0 is silent",
            "wrong = no_signal & scored & (groups.mean <= 0)",
            "wrong = scored & (groups.mean <= 0)",
        ),
        (
            "nothing scored is wrong",
            "wrong = no_signal & scored & (groups.mean <= 0)",
            "wrong = no_signal & (groups.mean <= 0)",
        ),
        (
            "the best reward is always 1",
            "groups.mean >= best_reward - 1e-6 * abs(best_reward)",
            "groups.mean >= 1 - 1e-6",
        ),
        ("decided by equality", "groups.mean >= best_reward - 1e-6 * abs(best_reward)", "groups.mean == best_reward"),
        ("shares of the silent groups", "n = max(1, len(groups.rewards))", "n = max(1, int(no_signal.sum()))"),
        ("all others", '"other": no_signal & ~right & ~wrong', '"other": ~right & ~wrong'),
        ("negative is something else", "(groups.mean <= 0) & ~right", "(groups.mean == 0) & ~right"),
        ("shares of responses", "n = max(1, len(groups.rewards))", "n = max(1, len(rewards))"),
    ),
    *breaks(
        "compute_gradient_share",
        "losses/diagnostics.py",
        of("gradient_share"),
        ("signed", "log_prob_gradients.detach().abs().sum(dim=1)", "log_prob_gradients.detach().sum(dim=1)"),
        ("of the sum over a response", "detach().abs().sum(dim=1)", "detach().sum(dim=1).abs()"),
        ("of squares", "detach().abs().sum(dim=1)", "detach().square().sum(dim=1)"),
        ("of the largest", "detach().abs().sum(dim=1)", "detach().abs().amax(dim=1)"),
        ("no gradient gives NaN", "torch.where(total > 0, total, 1.0)", "total"),
        ("of the others", "torch.where(selected, magnitude, 0.0)", "torch.where(selected, 0.0, magnitude)"),
        (
            "a share of responses",
            "torch.where(selected, magnitude, 0.0).sum() / torch.where(total > 0, total, 1.0)",
            "selected.to(magnitude).mean()",
        ),
        ("the gradients carry gradient", "log_prob_gradients.detach().abs()", "log_prob_gradients.abs()"),
    ),
]

TEACHER = "tests/property/test_distillation.py"
DISTILLATION = [
    *breaks(
        "compute_distillation_advantages",
        "losses/distillation.py",
        f"{TEACHER} -k advantages",
        ("the student teaches", "return -compute_log_ratio(policy", "return compute_log_ratio(policy"),
        ("the policy carries gradient", "(policy_log_probs.detach(), teacher", "(policy_log_probs, teacher"),
        ("padding is read", "teacher_log_probs, response_mask)", "teacher_log_probs, None)"),
        (
            "the ratio",
            "return -compute_log_ratio(policy_log_probs.detach(), teacher_log_probs, response_mask)",
            "return (-compute_log_ratio(policy_log_probs.detach(), teacher_log_probs, response_mask)).expm1()",
        ),
        (
            "the teacher alone",
            "-compute_log_ratio(policy_log_probs.detach(), teacher",
            "-compute_log_ratio(0 * policy_log_probs.detach(), teacher",
        ),
    ),
    *breaks(
        "compute_jensen_shannon_divergence",
        "losses/distillation.py",
        f"{TEACHER} -k 'jensen_shannon or certain_teacher'",
        ("weights exchanged", "new_tensor([beta, 1 - beta])", "new_tensor([1 - beta, beta])"),
        (
            "the arithmetic mean of log-probs",
            "torch.logaddexp(teacher + weights[0], student + weights[1])",
            "beta * teacher + (1 - beta) * student",
        ),
        ("the teacher's part forgotten", "return beta * of_teacher + (1 - beta)", "return (1 - beta)"),
        ("the teacher carries gradient", "    teacher = teacher.detach()\n", ""),
        ("the mixture carries none", "(student - mixture)).sum", "(student - mixture.detach())).sum"),
        (
            "always even",
            "return beta * of_teacher + (1 - beta) * (student",
            "return 0.5 * of_teacher + 0.5 * (student",
        ),
        ("impossible tokens are NaN", ".log_softmax(dim=-1).clamp(min=_MIN_LOG_PROB)", ".log_softmax(dim=-1)"),
        ("no temperature", "(wide / temperature).log_softmax", "wide.log_softmax"),
    ),
    *breaks(
        "compute_top_k_forward_kl",
        "losses/distillation.py",
        f"{TEACHER} -k 'top_k or certain_teacher'",
        (
            "without the other tokens",
            "return divergence + torch.where(rest > 0, rest * (rest.clamp(min=1e-30).log() - others), 0.0)",
            "return divergence",
        ),
        (
            "the other direction",
            "(best.exp() * (best - student.gather(-1, teacher_ids.long())))",
            "(student.gather(-1, teacher_ids.long()).exp() * (student.gather(-1, teacher_ids.long()) - best))",
        ),
        (
            "the others are all tokens",
            "student.scatter(-1, teacher_ids.long(), _MIN_LOG_PROB).logsumexp",
            "student.logsumexp",
        ),
        (
            "the others carry no gradient",
            "_MIN_LOG_PROB).logsumexp(dim=-1)",
            "_MIN_LOG_PROB).logsumexp(dim=-1).detach()",
        ),
        (
            "the whole vocabulary has others",
            "if teacher_ids.shape[-1] == policy_logits.shape[-1]:",
            "if teacher_ids.shape[-1] > policy_logits.shape[-1]:",
        ),
        ("the teacher carries gradient", "best = teacher_log_probs.detach().to", "best = teacher_log_probs.to"),
        ("renormalized", "best = teacher_log_probs.detach()", "best = teacher_log_probs.detach().log_softmax(-1)"),
    ),
]

MUTANTS = [*DISTILLATION, *SELECTION, *IMPORTANCE, *KL, *SHAPING, *DIAGNOSTICS]

"""Each loss of the family once more, over plain floats: values, and slopes in the log-probability by closed form.

A loss of tokens maps one token to (value, slope, flags); a loss of responses maps one response to (value, the slope of
each token, flags). Imports nothing but `math`.
"""

import math

Flags = dict[str, bool]


def held(log_ratio: float) -> float:
    return max(-20.0, min(20.0, log_ratio))


def clipped(low: bool, high: bool, **more: bool) -> Flags:
    flags = {"is_clipped_low": low, "is_clipped_high": high} | more
    return flags | {"is_clipped": any(flags.values())}


def grpo_clip(p, old, a, *, cliprange, cliprange_high=None, dual_clip=None):
    """By cases of the sign: no minimum of two products."""
    ratio = math.exp(held(p - old))
    ceiling = 1 + (cliprange if cliprange_high is None else cliprange_high)
    if a > 0:
        binds = ratio > ceiling
        return -a * min(ratio, ceiling), 0.0 if binds else -ratio * a, {"high": binds}
    floor = max(ratio, 1 - cliprange)
    low, dual = ratio < 1 - cliprange and a < 0, dual_clip is not None and ratio > dual_clip and a < 0
    return -a * (dual_clip if dual else floor), 0.0 if low or dual else -ratio * a, {"low": low, "dual": dual}


def token_oracle(name, p, old, a, penalized, hyper):
    """(value, slope, flags) of one token of a loss that looks at each token alone."""
    ratio = math.exp(held(p - old))
    match name:
        case "compute_cross_entropy_loss":
            return -p, -1.0, {}
        case "compute_naive_policy_gradient_loss":
            return -a * p, -a, {}
        case "compute_grpo_no_clip_loss":
            return -ratio * a, -ratio * a, {}
        case "compute_grpo_clip_loss":
            value, slope, sides = grpo_clip(p, old, a, **hyper)
            more = {"is_clipped_dual": sides.get("dual", False)} if hyper.get("dual_clip") is not None else {}
            return value, slope, clipped(sides.get("low", False), sides.get("high", False), **more)
        case "compute_cispo_loss":
            weight = min(max(ratio, hyper["ratio_low"]), hyper["ratio_high"]) * a
            return -weight * p, -weight, clipped(ratio < hyper["ratio_low"], ratio > hyper["ratio_high"])
        case "compute_sapo_loss":
            tau = hyper["temperature_positive"] if a > 0 else hyper["temperature_negative"]
            # Far below 0 the exponential of its negative overflows; the sigmoid is 0 long before.
            gate = 1 / (1 + math.exp(-tau * (ratio - 1))) if tau * (ratio - 1) > -700 else 0.0
            return -4 / tau * gate * a, -4 * gate * (1 - gate) * ratio * a, {}
        case "compute_dppo_tv_loss":
            moved = math.exp(p) - math.exp(old)
            low, high = a < 0 and moved < -hyper["threshold_low"], a > 0 and moved > hyper["threshold_high"]
            value = 0.0 if low or high else -ratio * a
            return value, value, clipped(low, high)
        case "compute_dppo_kl_loss":
            new, was = math.exp(p), math.exp(old)
            divergence = was * (old - p) + (1 - was) * math.log((1 - was + 1e-8) / (1 - new + 1e-8))
            far = divergence > hyper["threshold"]
            low, high = far and a < 0 and new < was, far and a > 0 and new > was
            value = 0.0 if low or high else -ratio * a
            return value, value, clipped(low, high)
        case "compute_dro_loss":
            beta = hyper["penalty"]
            return (p - old) * (beta * (p - old) / 2 - a), beta * (p - old) - a, {}
        case "compute_kl_cov_loss":
            coefficient = hyper["kl_coef"] if penalized else 0.0
            sign = math.copysign(1.0, p - old) if p != old else 0.0
            slope = -ratio * a + coefficient * sign
            return -ratio * a + coefficient * abs(p - old), slope, {"is_penalized": penalized}
    raise NotImplementedError(f"{name} has no oracle: write one")


def response_oracle(name, ps, olds, advantages, penalized, hyper):
    """Values and slopes of the tokens of one response, its tokens alone; for a loss of responses one value."""
    n = len(ps)
    log_ratios = [p - old for p, old in zip(ps, olds, strict=True)]
    if name in ("compute_gspo_loss", "compute_luspo_loss", "compute_gspo_token_loss"):
        s = held(math.fsum(log_ratios) / n)
        per_token = [grpo_clip(s, 0.0, a, **hyper) for a in advantages]
        flags = [clipped(f.get("low", False), f.get("high", False)) for _, _, f in per_token]
        if name == "compute_gspo_token_loss":
            return [value for value, _, _ in per_token], [slope for _, slope, _ in per_token], flags
        share = 1 / n if name == "compute_gspo_loss" else 1.0
        value, slope, _ = per_token[0]
        return value * share * n, [slope * share] * n, flags[0]
    if name == "compute_gmpo_loss":
        a, low = advantages[0], -hyper["cliprange"]
        high = hyper["cliprange"] if hyper["cliprange_high"] is None else hyper["cliprange_high"]
        flags = [clipped(a < 0 and d < low, a > 0 and d > high) for d in log_ratios]
        bounded = [min(d, high) if a > 0 else max(d, low) if a < 0 else d for d in log_ratios]
        value = -math.exp(held(math.fsum(bounded) / n)) * a
        return value, [0.0 if f["is_clipped"] else value / n for f in flags], flags
    if name == "compute_vespo_loss":
        log_w = held(math.fsum(log_ratios))
        k, decay = hyper["negative"] if advantages[0] < 0 else hyper["positive"]
        weight = math.exp(max(-700.0, k * log_w + decay * (1 - math.exp(log_w)))) * advantages[0]
        return [-weight * p for p in ps], [-weight] * n, [{}] * n
    tokens = [token_oracle(name, *token, hyper) for token in zip(ps, olds, advantages, penalized, strict=True)]
    return [value for value, _, _ in tokens], [slope for _, slope, _ in tokens], [flags for _, _, flags in tokens]


def weights(aggregation, masks, kept, constant, sizes, rejected, empty):
    """The weight of each token, by the words of the definition."""
    carries = [[m and k for m, k in zip(*rows, strict=True)] for rows in zip(masks, kept, strict=True)]
    counted = [sum(row) for row in (masks if rejected == "count" else carries)]
    responses = len(masks) if empty == "count" else max(1, sum(n > 0 for n in counted))
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    tokens_of = [sum(n for n, g in zip(counted, groups, strict=True) if g == group) for group in range(len(sizes))]
    prompts = len(sizes) if empty == "count" else max(1, sum(n > 0 for n in tokens_of))

    def weight(row):
        match aggregation:
            case "sequence_mean":
                return 1 / responses / max(1, counted[row])
            case "token_mean":
                return 1 / (constant or max(1, sum(counted)))
            case "prompt_mean":
                return 1 / prompts / max(1, tokens_of[groups[row]])
            case "sequence_sum" | "sequence":
                return 1 / responses
            case "constant":
                return 1 / responses / constant
        raise NotImplementedError(f"{aggregation} has no oracle: write one")

    if aggregation == "sequence":
        return [[weight(row) if any(carries[row]) else 0.0] for row in range(len(masks))]
    return [[weight(row) if c else 0.0 for c in carries[row]] for row in range(len(masks))]

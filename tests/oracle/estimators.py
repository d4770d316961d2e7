"""Each advantage estimator once more, over lists of groups of plain floats; None stands for what was not scored.

Subsets are enumerated, never counted. Imports nothing but `math` and `itertools`.
"""

import itertools
import math

Group = list[float | None]


def scored(group: Group) -> list[float]:
    return [reward for reward in group if reward is not None]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: list[float], correction: int) -> float:
    if len(values) <= correction:
        return 0.0
    return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - correction))


def is_silent(group: Group) -> bool:
    values = scored(group)
    return not values or max(values) - min(values) <= 1e-6 * max(map(abs, values))


def of_one(name: str, group: Group, index: int, groups: list[Group], number: int, extra: dict) -> float:
    """The advantage of a scored response of a group with signal."""
    reward, values = group[index], scored(group)
    others = [other for place, other in enumerate(group) if place != index and other is not None]
    match name:
        case "normalize_group_rewards":
            scale = deviation(values, extra["correction"]) + extra["advantage_eps"]
            return (reward - mean(values)) / (scale if extra["normalize_by_std"] else 1.0)
        case "compute_leave_one_out_advantages":
            return reward - mean(others)
        case "compute_batch_std_advantages":
            batch = [value for one in groups for value in scored(one)]
            return (reward - mean(values)) / (deviation(batch, 1) + extra["advantage_eps"])
        case "compute_gpg_advantages":
            teaching = sum(len(scored(one)) for one in groups if not is_silent(one))
            return (reward - mean(values)) * sum(len(scored(one)) for one in groups) / teaching
        case "compute_maxrl_advantages":
            return reward / mean(values) - 1
        case "compute_opo_advantages":
            weighed = [(n, r) for n, r in zip(extra["lengths"][number], group, strict=True) if r is not None]
            total = sum(n for n, _ in weighed)
            return reward - math.fsum(n * r for n, r in weighed) / total if total else 0.0
        case "compute_best_of_advantages":
            return max(0.0, reward - max(others))
        case "compute_pass_at_k_advantages":
            places = [place for place, value in enumerate(group) if value is not None]
            if len(places) < extra["k"]:
                return 0.0
            subsets = list(itertools.combinations(places, extra["k"]))
            best = [max(group[place] for place in subset) for subset in subsets]
            spread = deviation(best, 0)
            own = [value for subset, value in zip(subsets, best, strict=True) if index in subset]
            return (mean(own) - mean(best)) / spread if spread else 0.0
        case "compute_pkpo_advantages":
            if len(values) < extra["k"]:
                return 0.0
            if extra["k"] == 1:
                return reward - mean(others)
            rivals = itertools.combinations(others, extra["k"] - 1)
            return extra["k"] * mean([max(0.0, reward - max(subset)) for subset in rivals])
    raise NotImplementedError(f"{name} has no oracle: write one")


def advantages(name: str, groups: list[Group], extra: dict) -> list[float]:
    result = []
    for number, group in enumerate(groups):
        for index, reward in enumerate(group):
            if reward is None:
                result.append(0.0)
            elif name == "compute_remax_advantages":
                greedy = extra["greedy_rewards"][number]
                result.append(reward - greedy if math.isfinite(greedy) else 0.0)
            else:
                silent = is_silent(group)
                result.append(0.0 if silent else of_one(name, group, index, groups, number, extra))
    return result


def gdpo(columns: list[list[Group]], weights: list[float], eps: float) -> list[float]:
    """Each reward normalized in its groups, summed, then normalized over the batch."""
    options = {"advantage_eps": eps, "normalize_by_std": True, "correction": 1}
    parts = [advantages("normalize_group_rewards", groups, options) for groups in columns]
    sums = [math.fsum(w * a for w, a in zip(weights, row, strict=True)) for row in zip(*parts, strict=True)]
    flat = [[value for group in groups for value in group] for groups in columns]
    counted = [any(value is not None for value in row) for row in zip(*flat, strict=True)]
    kept = [value for value, counts in zip(sums, counted, strict=True) if counts]
    if len(kept) < 2 or max(kept) - min(kept) <= 1e-6 * max(map(abs, kept)):
        return [0.0] * len(sums)
    centered = [(value - mean(kept)) / (deviation(kept, 1) + eps) for value in sums]
    return [value if counts else 0.0 for value, counts in zip(centered, counted, strict=True)]


def otb(
    groups: list[Group], log_probs: list[list[float]], collisions: list[list[float]], masks: list[list[bool]]
) -> list[list[float]]:
    """The advantage of each token, against the rewards weighed by the squared gradient so far."""
    result, start = [], 0
    for group in groups:
        rows = range(start, start + len(group))
        start += len(group)
        for row, reward in zip(rows, group, strict=True):
            result.append([])
            for place, is_token in enumerate(masks[row]):
                weighed = []
                for other, value in zip(rows, group, strict=True):
                    if value is not None and masks[other][place]:
                        steps = [s for s in range(place + 1) if masks[other][s]]
                        squares = (1 - 2 * math.exp(log_probs[other][s]) + collisions[other][s] for s in steps)
                        weighed.append((math.fsum(squares), value))
                total = math.fsum(weight for weight, _ in weighed)
                counts = is_token and reward is not None and not is_silent(group) and len(weighed) > 1 and total > 0
                baseline = math.fsum(weight * value for weight, value in weighed) / total if counts else 0.0
                result[-1].append(reward - baseline if counts else 0.0)
    return result


def whiten(values: list[list[float]], masks: list[list[bool]], eps: float, correction: int) -> list[list[float]]:
    kept = [v for row, mask in zip(values, masks, strict=True) for v, m in zip(row, mask, strict=True) if m]
    if len(kept) < 2 or max(kept) - min(kept) <= 1e-6 * max(map(abs, kept)):
        return [[0.0] * len(row) for row in values]
    center, scale = mean(kept), deviation(kept, correction) + eps
    return [
        [(v - center) / scale if m else 0.0 for v, m in zip(row, mask, strict=True)]
        for row, mask in zip(values, masks, strict=True)
    ]

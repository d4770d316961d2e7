"""Every equation once more, over plain floats, one token at a time: imports nothing but `math`."""

import math

Row = list[float]


def masked_sum(values: Row, mask: list[bool]) -> float:
    return math.fsum(value for value, kept in zip(values, mask, strict=True) if kept)


def masked_mean(values: Row, mask: list[bool]) -> float:
    return masked_sum(values, mask) / sum(mask) if any(mask) else math.nan


def probabilities(logits: Row) -> Row:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def entropy(logits: Row) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities(logits) if p > 0)


def entropy_gradient(logits: Row) -> Row:
    return [-p * (math.log(p) + entropy(logits)) if p > 0 else 0.0 for p in probabilities(logits)]


def log_prob(logits: Row, label: int) -> float:
    return math.log(probabilities(logits)[label])


def log_prob_gradient(logits: Row, label: int) -> Row:
    return [(1.0 if token == label else 0.0) - p for token, p in enumerate(probabilities(logits))]


def log_prob_over(logits: Row, label: int, members: list[int]) -> tuple[float, Row]:
    """Log-prob of the label under the softmax over `members`, and its gradient in all logits."""
    log_sum = math.log(math.fsum(math.exp(logits[token] - logits[label]) for token in members))
    shares = [
        math.exp(logits[token] - logits[label] - log_sum) if token in members else 0.0 for token in range(len(logits))
    ]
    return -log_sum, [(token == label) - share for token, share in enumerate(shares)]


def entropy_over(logits: Row, members: list[int]) -> tuple[float, Row]:
    """Entropy of the softmax over `members`, and its gradient in all logits."""
    surprise = {token: -log_prob_over(logits, token, members)[0] for token in members}
    value = math.fsum(math.exp(-s) * s for s in surprise.values())
    return value, [
        math.exp(-surprise[token]) * (surprise[token] - value) if token in members else 0.0
        for token in range(len(logits))
    ]


def kl(p: Row, q: Row) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def group_advantages(rewards: Row, eps: float, by_std: bool) -> Row:
    """One group. Two-pass, unbiased."""
    if max(rewards) == min(rewards):
        return [0.0 for _ in rewards]
    mean = math.fsum(rewards) / len(rewards)
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    return [(reward - mean) / (math.sqrt(variance) + eps if by_std else 1.0) for reward in rewards]


def clip_binds(advantage: float, policy: float, old: float, eps: float) -> bool:
    """The clip matters only where it takes something away: a good token already likelier, a bad one already rarer."""
    ratio = math.exp(policy - old)
    return (advantage > 0 and ratio > 1 + eps) or (advantage < 0 and ratio < 1 - eps)


def token_loss(
    loss_type: str, reward: float, advantage: float, policy: float, old: float, eps: float
) -> tuple[float, float]:
    """Loss of one token and its derivative in `policy`. The clip in Achiam's form: a ceiling chosen by the sign."""
    if loss_type == "no_baseline":
        return -reward * policy, -reward
    if loss_type == "reinforce_with_baseline":
        return -advantage * policy, -advantage
    slope = -math.exp(policy - old) * advantage
    if loss_type == "grpo_no_clip":
        return slope, slope
    ceiling = (1 + eps) * advantage if advantage >= 0 else (1 - eps) * advantage
    return -min(-slope, ceiling), 0.0 if clip_binds(advantage, policy, old, eps) else slope


def token_weight(aggregation: str, row: int, masks: list[list[bool]], constant: float) -> float:
    """What one response token of the row counts in the loss of the batch, each response a group of its own."""
    return {
        "sequence_mean": 1 / (len(masks) * max(1, sum(masks[row]))),
        "token_mean": 1 / constant,
        "prompt_mean": 1 / (len(masks) * max(1, sum(masks[row]))),
        "sequence_sum": 1 / len(masks),
        "constant": 1 / (len(masks) * constant),
    }[aggregation]


def aggregate(losses: list[Row], masks: list[list[bool]], aggregation: str, constant: float) -> float:
    return math.fsum(
        token_weight(aggregation, row, masks, constant) * masked_sum(losses[row], masks[row])
        for row in range(len(losses))
    )


def k3(policy: float, old: float) -> float:
    ratio = math.exp(policy - old)
    return ratio - 1 - math.log(ratio)


def tokenized_row(prompt: list[int], output: list[int], width: int, pad: int) -> list[tuple[int, int, bool]]:
    """(input, label, is the label output?) at each place, one place at a time."""
    places = []
    for place in range(width - 1):
        here, there = [
            prompt[at] if at < len(prompt) else output[at - len(prompt)] if at < len(prompt) + len(output) else pad
            for at in (place, place + 1)
        ]
        places.append((here, there, len(prompt) <= place + 1 < len(prompt) + len(output)))
    return places


def dpo(
    chosen: tuple[Row, Row], rejected: tuple[Row, Row], beta: float, smoothing: float
) -> tuple[float, float, float]:
    """Loss of one pair, its derivative in a log-prob of the chosen response, and the margin."""
    rewards = [beta * (math.fsum(policy) - math.fsum(reference)) for policy, reference in (chosen, rejected)]
    wins, loses = (math.exp(reward) / math.fsum(map(math.exp, rewards)) for reward in rewards)
    value = -(1 - smoothing) * math.log(wins) - smoothing * math.log(loses)
    return value, -beta * ((1 - smoothing) * loses - smoothing * wins), rewards[0] - rewards[1]


def jensen_shannon(student: Row, teacher: Row, beta: float) -> tuple[float, Row]:
    """The divergence of two rows of logits, and its derivative in each logit of the student."""
    s, t = probabilities(student), probabilities(teacher)
    m = [beta * b + (1 - beta) * a for a, b in zip(s, t, strict=True)]

    def distance(p: Row) -> float:
        return math.fsum(a * math.log(a / b) for a, b in zip(p, m, strict=True) if a > 0)

    slopes = [(1 - beta) * a * (math.log(a / b) - distance(s)) if a > 0 else 0.0 for a, b in zip(s, m, strict=True)]
    return beta * distance(t) + (1 - beta) * distance(s), slopes


def top_k_forward_kl(student: Row, teacher: Row, ids: list[int]) -> tuple[float, Row]:
    """The KL divergence in which all tokens outside `ids` are one, and its derivative in each logit of the student."""
    s, t = probabilities(student), probabilities(teacher)
    others = [token for token in range(len(s)) if token not in ids]
    cells = [[token] for token in ids] + [others] * bool(others)
    sums = [[math.fsum(p[token] for token in cell) for cell in cells] for p in (t, s)]
    slopes = {
        token: a * (1 - q / p) for cell, q, p in zip(cells, *sums, strict=True) for token in cell for a in [s[token]]
    }
    return kl(*sums), [slopes[token] for token in range(len(s))]

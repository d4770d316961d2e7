"""A reward for random weights: it differs between the responses to a question, so that all have a gradient."""


def spread_reward(response: str, ground_truth: str) -> dict[str, float]:
    """Return a number from 0 to 1 that any change of the response changes."""
    value = sum(map(ord, response)) % 7 / 7
    return {"reward": value, "format_reward": 1.0, "answer_reward": value}

r"""Rewards of responses to mathematics questions: a format, and an answer that matches the reference."""

from grpo_core._checks import shape_checked
from grpo_core.grading.answers import answer_text, boxed_answers, extract_boxed_answer, is_right
from grpo_core.types import GroundTruth


@shape_checked
def r1_zero_reward_fn(response: str, ground_truth: GroundTruth) -> dict[str, float]:
    r"""Reward of a response to the r1-zero prompt: `... </think> <answer> ... </answer>` around a right answer.

    The format is the text `</think> <answer>`, one space between the tags, and after it `</answer>`. The answer is
    what stands between them; if it holds a `\boxed{}`, what stands in the box. Text before and after is free.

    A response cannot gain by naming several answers: with a second `<answer>` tag after the first block began, or with
    boxes of different content in the block, no answer is right. It cannot gain by work left undone either: where `37`
    is right, `35 + 2` is not. An empty answer is never right.

    Args:
        response: what the model wrote after the prompt. Any text is graded; none raises.
        ground_truth: the reference answer, or a list of alternatives of which any one counts.

    Returns:
        `format_reward`, 1.0 if the response has the format; `answer_reward`, 1.0 if it also has the right answer (by
        `answers_match`; besides, `5 m` is right where `5` is, and `40320` where `8!` is); `reward`, the same as
        `answer_reward`.

    Raises:
        ValueError: `ground_truth` is empty, or holds an empty text or a number that is not finite.

    Example:
        >>> r1_zero_reward_fn(r"Half of one. </think> <answer> \boxed{0.5} </answer>", r"\frac{1}{2}")
        {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
        >>> r1_zero_reward_fn("Half of one. </think> <answer> 2 </answer>", r"\frac{1}{2}")
        {'reward': 0.0, 'format_reward': 1.0, 'answer_reward': 0.0}
        >>> r1_zero_reward_fn("Half of one. </think> <answer> 1 - 0.5 </answer>", r"\frac{1}{2}")
        {'reward': 0.0, 'format_reward': 1.0, 'answer_reward': 0.0}
    """
    references = _references(ground_truth)
    _, tag, rest = response.partition("</think> <answer>")
    answer, end, after = rest.partition("</answer>")
    if not (tag and end):
        return _rewards(formatted=False, right=False)
    boxes = boxed_answers(answer)
    if "<answer>" in answer or "<answer>" in after or len(set(boxes)) > 1:
        return _rewards(formatted=True, right=False)
    return _rewards(formatted=True, right=_any_match(boxes[0] if boxes else answer, references))


@shape_checked
def question_only_reward_fn(response: str, ground_truth: GroundTruth) -> dict[str, float]:
    r"""Reward of a response to a bare question: a right answer in the last `\boxed{}`.

    Earlier boxes are not graded, so naming several answers gains nothing: the last one counts. If that is never
    closed, as in a response cut off, the response has no answer; a `\boxed` with nothing behind it is no box. Work
    left undone earns nothing: `35 + 2` is not `37`.

    Args:
        response: what the model wrote. Any text is graded; none raises.
        ground_truth: the reference answer, or a list of alternatives of which any one counts.

    Returns:
        `format_reward`, 1.0 if there is a boxed answer; `answer_reward`, 1.0 if it is right, as for
        `r1_zero_reward_fn`; `reward`, the same as `answer_reward`.

    Raises:
        ValueError: `ground_truth` is empty, or holds an empty text or a number that is not finite.

    Example:
        >>> question_only_reward_fn(r"So there are \boxed{1{,}200} of them.", 1200)
        {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
    """
    references = _references(ground_truth)
    answer = extract_boxed_answer(response)
    if answer is None:
        return _rewards(formatted=False, right=False)
    return _rewards(formatted=True, right=_any_match(answer, references))


def _any_match(answer: str, references: list[str]) -> bool:
    return any(is_right(answer.strip(), reference) for reference in references)


def _references(ground_truth: GroundTruth) -> list[str]:
    """The alternatives as text, none of them empty."""
    alternatives = ground_truth if isinstance(ground_truth, list) else [ground_truth]
    references = [answer_text(alternative, "ground_truth") for alternative in alternatives]
    if not references or not all(references):
        raise ValueError(f"ground_truth={ground_truth!r} must hold an answer: a text that is not blank, or a number")
    return references


def _rewards(*, formatted: bool, right: bool) -> dict[str, float]:
    return {"reward": float(right), "format_reward": float(formatted), "answer_reward": float(right)}

r"""Rewards for answers to mathematics questions: a format, and an answer that matches the reference."""

import re

from grpo_core.grading._type_checks import type_checked
from grpo_core.grading.answers import answer_text, boxed_answers, extract_boxed_answer, is_right
from grpo_core.types import GroundTruth


@type_checked
def r1_zero_reward_fn(response: str, ground_truth: GroundTruth) -> dict[str, float]:
    r"""Return the reward of a response to the r1-zero prompt: `... </think> <answer> ... </answer>`.

    The format is `</think> <answer>`, with one space between the tags, followed by `</answer>`. The answer is the text
    between them, or the content of a `\boxed{}` in that text. Text before and after is free.

    Several answers gain nothing: with a second `<answer>` tag, or with boxes of different content, the answer is
    wrong. Unfinished arithmetic gains nothing: `35 + 2` is not `37`. An empty answer is wrong.

    Args:
        response: the text of the model after the prompt. No text raises an error.
        ground_truth: the reference answer, or a list of accepted answers.

    Returns:
        `format_reward`, 1.0 if the response has the format; `answer_reward`, 1.0 if the answer is also correct (by
        `answers_match`; in addition, `5 m` is correct for `5` and `40320` for `8!`); `reward`, equal to
        `answer_reward`.

    Raises:
        ValueError: `ground_truth` is empty, or contains an empty text or a number that is not finite.

    Examples:
        >>> r1_zero_reward_fn(r"Half of one. </think> <answer> \boxed{0.5} </answer>", r"\frac{1}{2}")
        {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
        >>> r1_zero_reward_fn("Half of one. </think> <answer> 2 </answer>", r"\frac{1}{2}")
        {'reward': 0.0, 'format_reward': 1.0, 'answer_reward': 0.0}
        >>> r1_zero_reward_fn("Half of one. </think> <answer> 1 - 0.5 </answer>", r"\frac{1}{2}")
        {'reward': 0.0, 'format_reward': 1.0, 'answer_reward': 0.0}
    """
    _, tag, rest = response.partition("</think> <answer>")
    return _grade_block(tag, rest, _references(ground_truth))


@type_checked
def think_answer_reward_fn(response: str, ground_truth: GroundTruth) -> dict[str, float]:
    r"""Return the reward of `... </think>`, white space, `<answer> ... </answer>`, as chat models write it.

    Instruct models that think write `</think>`, a newline or two, and then the answer. Any white space between the two
    tags is allowed, and so is none. Everything else is as in `r1_zero_reward_fn`.

    Args:
        response: the text of the model after the prompt. No text raises an error.
        ground_truth: the reference answer, or a list of accepted answers.

    Returns:
        `format_reward`, `answer_reward` and `reward`, as in `r1_zero_reward_fn`.

    Raises:
        ValueError: `ground_truth` is empty, or contains an empty text or a number that is not finite.

    Examples:
        >>> think_answer_reward_fn("Half of one.\n</think>\n\n<answer>0.5</answer>", r"\frac{1}{2}")
        {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
        >>> think_answer_reward_fn("Half of one.\n</think>\n\nSo: <answer>0.5</answer>", r"\frac{1}{2}")
        {'reward': 0.0, 'format_reward': 0.0, 'answer_reward': 0.0}
    """
    tags = _TAGS.search(response)
    tag, rest = (tags[0], response[tags.end() :]) if tags else ("", "")
    return _grade_block(tag, rest, _references(ground_truth))


_TAGS = re.compile(r"</think>\s*<answer>")


def _grade_block(tag: str, rest: str, references: list[str]) -> dict[str, float]:
    """Grade what follows the opening tags; `tag` is empty if the response has none."""
    answer, end, after = rest.partition("</answer>")
    if not (tag and end):
        return _rewards(formatted=False, right=False)
    boxes = boxed_answers(answer)
    if "<answer>" in answer or "<answer>" in after or len(set(boxes)) > 1:
        return _rewards(formatted=True, right=False)
    return _rewards(formatted=True, right=_any_match(boxes[0] if boxes else answer, references))


@type_checked
def question_only_reward_fn(response: str, ground_truth: GroundTruth) -> dict[str, float]:
    r"""Return the reward of a response to a bare question: a correct answer in the last `\boxed{}`.

    Only the last box is graded, so several answers gain nothing. If the last box is never closed, as in a truncated
    response, there is no answer; a `\boxed` followed by nothing is not a box. Unfinished arithmetic gains nothing:
    `35 + 2` is not `37`.

    Args:
        response: the text of the model. No text raises an error.
        ground_truth: the reference answer, or a list of accepted answers.

    Returns:
        `format_reward`, 1.0 if there is a boxed answer; `answer_reward`, 1.0 if it is correct, as in
        `r1_zero_reward_fn`; `reward`, equal to `answer_reward`.

    Raises:
        ValueError: `ground_truth` is empty, or contains an empty text or a number that is not finite.

    Examples:
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
    """Return the accepted answers as text; raise a ValueError if one is empty."""
    alternatives = ground_truth if isinstance(ground_truth, list) else [ground_truth]
    references = [answer_text(alternative, "ground_truth") for alternative in alternatives]
    if not references or not all(references):
        raise ValueError(f"ground_truth={ground_truth!r} must hold an answer: a text that is not blank, or a number")
    return references


def _rewards(*, formatted: bool, right: bool) -> dict[str, float]:
    return {"reward": float(right), "format_reward": float(formatted), "answer_reward": float(right)}

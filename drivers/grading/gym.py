"""The verifiers of reasoning-gym, as a reward: `--reward drivers.grading.gym:reward --sampling-stop "</answer>"`.

`answer` of a data file (drivers/make_gym.py writes them) is JSON text: the task, its parameters, and the entry that
its verifier asks for.
"""

import json
from functools import lru_cache
from typing import Any

from drivers.grading.countdown import answer_of
from grpo_core import GroundTruth

try:
    import reasoning_gym
except ImportError as error:
    raise ImportError("the package reasoning-gym is not installed: pip install 'grpo_core[gym]'") from error


def reward(response: str, ground_truth: GroundTruth) -> dict[str, float]:
    """Of a response with `</think> <answer> ... </answer>`: what the task's verifier gives its answer, from 0 to 1.

    `answer_reward` is 1 for all of it. Without an answer there is none of the points that some verifiers give to every
    text, and an answer at which a verifier fails is wrong.
    """
    try:
        task = json.loads(ground_truth)  # type: ignore[arg-type]
        name, parameters, entry = task["task"], json.dumps(task["parameters"]), task["entry"]
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(
            f"ground_truth={str(ground_truth)[:200]!r}: a task of reasoning-gym is required; drivers/make_gym.py "
            "writes them"
        ) from error
    verifier, answer, score = _verifier(name, parameters), answer_of(response), 0.0
    if answer:
        try:
            score = float(verifier.score_answer(answer, entry))
        except MemoryError:
            raise
        except Exception:  # it was written for answers that can be read
            score = 0.0
    return {"reward": score, "format_reward": float(answer is not None), "answer_reward": float(score == 1)}


@lru_cache(maxsize=256)
def _verifier(name: str, parameters: str) -> Any:
    return reasoning_gym.create_dataset(name, **json.loads(parameters))

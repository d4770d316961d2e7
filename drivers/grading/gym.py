"""Grade with the verifiers of reasoning-gym: `--reward gym`.

`answer` of a data file (drivers/make_task.py writes it) is JSON text: the task, its parameters, and the entry that
its verifier needs.
"""

import json
from functools import lru_cache
from typing import Any

from drivers.grading.countdown import extract_answer
from grpo_core import GroundTruth

try:
    import reasoning_gym
except ImportError as error:
    raise ImportError(
        "the package reasoning-gym is not installed; in this clone, run: .venv/bin/pip install -e '.[gym]'"
    ) from error


def reward(response: str, ground_truth: GroundTruth) -> dict[str, float]:
    """Return the verifier's score, from 0 to 1, of the answer in `</think> <answer> ... </answer>`.

    `answer_reward` is 1 only for a full score. A missing answer scores 0, although some verifiers give points to any
    text; so does an answer at which the verifier fails.
    """
    try:
        task = json.loads(ground_truth)  # type: ignore[arg-type]
        name, parameters, entry = task["task"], json.dumps(task["parameters"]), task["entry"]
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(
            f"ground_truth={str(ground_truth)[:200]!r}: expected a task of reasoning-gym; write the data with "
            "drivers/make_task.py gym"
        ) from error
    verifier, answer, score = _create_verifier(name, parameters), extract_answer(response), 0.0
    if answer:
        try:
            score = float(verifier.score_answer(answer, entry))
        except MemoryError:
            raise
        except Exception:  # verifiers assume answers that they can parse
            score = 0.0
    return {"reward": score, "format_reward": float(answer is not None), "answer_reward": float(score == 1)}


@lru_cache(maxsize=256)
def _create_verifier(name: str, parameters: str) -> Any:
    return reasoning_gym.create_dataset(name, **json.loads(parameters))

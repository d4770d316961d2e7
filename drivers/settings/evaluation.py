"""Settings of evaluations during training, and names of question sets."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from drivers.common.errors import UsageError
from drivers.settings.base import NonNegativeFloat, PositiveInt, Share
from drivers.settings.sampling import Sampling, SamplingSettings


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(SamplingSettings):
    """When the policy is evaluated during training, and how the held-out questions are asked."""

    heading: ClassVar[str] = "evaluation"

    eval_steps: PositiveInt = 5
    """Steps between evaluations; the model is also evaluated before the first step and after the last."""
    n_val_examples: PositiveInt = 1024
    """Questions to ask of each file of --val-data-path, from the top; at most as many as it has. A file is written as
    PATH or NAME=PATH."""
    eval_samples: PositiveInt = 1
    """Responses per held-out question. Several give avg@n, pass@k and maj@k with intervals."""
    eval_temperature: NonNegativeFloat | None = None
    """Temperature of evaluations; 0 is greedy. Default: --sampling-temperature."""
    eval_top_p: Share | None = None
    """Top-p of evaluations. Default: as in training."""
    eval_max_tokens: PositiveInt | None = None
    """Maximum length of a response in evaluations, in tokens. Default: --sampling-max-tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_max_tokens is not None and self.eval_max_tokens < self.sampling_min_tokens:
            raise UsageError(
                f"{self.flag('eval_max_tokens')}: must be at least {self.flag('sampling_min_tokens')}, which holds in "
                "evaluations too; raise it, or lower --sampling-min-tokens"
            )
        if self.eval_temperature == 0 and self.eval_samples > 1:
            raise UsageError(
                f"{self.flag('eval_samples')}: greedy responses are all the same; pass --eval-samples 1, or an "
                "--eval-temperature above 0"
            )

    def for_evaluation(self, sampling: Sampling) -> Sampling:
        """Return the parameters of evaluations, given those of training."""
        values = {"temperature": self.eval_temperature, "top_p": self.eval_top_p, "max_tokens": self.eval_max_tokens}
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return replace(sampling, n=self.eval_samples, replays=False, **given)


def split_name(entry: str) -> tuple[str | None, str]:
    """Return the name and the path of an entry `name=path`; a path alone has the name None."""
    named = re.fullmatch(r"([\w-]+)=(.+)", entry)
    return (named[1], named[2]) if named else (None, entry)


def name_sets(flag: str, entries: Sequence[str]) -> dict[str, str]:
    """Return the path of each question set by its name, in order; errors name `flag`.

    An entry is `name=path` or a path. A path is named after its file, or by itself if two files have the same name.
    """
    if not entries:
        raise UsageError(f"{flag}: is empty; pass at least one file of questions")
    pairs = [split_name(entry) for entry in entries]
    short = [name or Path(path).stem for name, path in pairs]
    sets: dict[str, str] = {}
    for (given, path), stem in zip(pairs, short, strict=True):
        name = path if given is None and short.count(stem) > 1 else stem
        if name in sets:
            raise UsageError(
                f"{flag} {' '.join(entries)}: {name} is given twice; give each file once, or a name of its "
                f"own: NAME={path}"
            )
        sets[name] = path
    return sets

"""Evaluate a model on question files: `python drivers/evaluate.py --model-path RUN/final_model --data-path FILE`."""

# isort: off
from drivers.common import environment  # noqa: F401  before torch, because OpenMP reads its settings once

# isort: on

import sys
from collections.abc import Sequence

from drivers.common.cli import exit_with
from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.parser import parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    try:
        config = parse(EvaluateConfig, sys.argv[1:] if arguments is None else arguments, EvaluateConfig())
        from drivers.evaluation.standalone import evaluate  # it loads torch, which takes seconds

        evaluate(config)
    except UsageError as error:
        exit_with("evaluate.py", error, status=2)
    except TrainingAbortedError as error:
        exit_with("evaluate.py", error, status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

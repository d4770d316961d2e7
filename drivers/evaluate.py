"""Evaluate a model on questions: `python drivers/evaluate.py --model-path RUN/final_model`.

The model of a run is asked as in that run, unless flags say otherwise.
"""

import sys
from collections.abc import Sequence

import drivers.common.environment  # noqa: F401  before torch: OpenMP reads its settings once
from drivers.common.cli import exit_on_user_error
from drivers.settings.of_run import parse_evaluate_config


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    with exit_on_user_error("evaluate.py"):
        config = parse_evaluate_config(sys.argv[1:] if arguments is None else arguments)
        from drivers.evaluation.standalone import evaluate  # it loads torch, which takes seconds
        from drivers.training.self_check import check_evaluation_engine

        evaluate(config, check_evaluation_engine)


if __name__ == "__main__":
    main()

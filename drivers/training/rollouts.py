"""Sample and grade the rollouts of a step."""

import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import compress
from statistics import fmean
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from drivers.common import distributed
from drivers.common.errors import EngineDiedError, TrainingAbortedError
from drivers.engines.conversations import sample_responses
from drivers.engines.protocol import Completion, RolloutEngine, describe_completions
from drivers.engines.rank_zero import run_with_engine
from drivers.evaluation.outcomes import correctness_values, pass_at_k_of_questions
from drivers.evaluation.policy import grade_completions
from drivers.grading.summary import describe_grades
from drivers.grading.verdicts import Graded
from drivers.runs.completions import describe_sample, describe_tokens
from drivers.settings.groups import RolloutSettings
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.questions import Question
from drivers.training.advantages import compute_rewards
from drivers.training.batch import Scores, StepRollouts
from drivers.training.components import Components
from drivers.training.run import Run
from drivers.training.state import TrainingState
from drivers.training.step_timer import StepTimer
from grpo_core import describe_rewards, describe_silent_groups, find_signal_groups, read_rewards


class Group(NamedTuple):
    """The G responses to one question, with their verdicts."""

    question: Question
    completions: list[Completion]
    verdicts: list[Graded]


class SampledGroups(NamedTuple):
    """Groups that were sampled for one step."""

    kept: list[Group]
    """Groups to train on, at most P."""
    sampled: list[Group]
    """All groups, in the order in which they were sampled."""
    n_refills: int
    n_missing: int


def collect(
    config: GrpoConfig, components: Components, draw: random.Random, run: Run, step: int, timer: StepTimer
) -> StepRollouts:
    """Sample, grade and summarize the rollouts of one step.

    Afterwards, an engine that shares the policy's GPU frees its memory.
    """
    groups = sample_groups(config, components, draw, step, timer)
    if groups.n_missing:
        run.warn(
            f"step {step}: {groups.n_missing} of {config.n_prompts_per_rollout_batch} groups are missing after "
            f"{groups.n_refills} refills, because all other groups have zero signal. Use easier or harder questions, "
            "or raise --max-refills"
        )
    questions = [group.question for group in groups.kept]
    greedy: list[Completion] = []
    with timer.phase("rollout"):
        if config.estimator.uses_greedy_response:
            sampling = config.sampling.untruncated(n=1, temperature=0.0)
            greedy = sample_responses(
                components.engine, components.rollout, questions, sampling, seed=sampling_seed(config, step)
            )
        components.engine.sleep()  # until the next push: everything is sampled
    with timer.phase("reward"):
        completions, verdicts = flatten(groups.kept)
        scores: Scores = [verdict.scores for verdict in verdicts]
        rewards, greedy_rewards = compute_rewards(config, completions, scores), None
        if greedy:
            greedy_verdicts = grade_completions(components.grade, greedy, questions)
            greedy_rewards = compute_rewards(config, greedy, [verdict.scores for verdict in greedy_verdicts])
        metrics = rollout_metrics(config, step, groups, greedy, rewards, greedy_rewards)
    n_rows, asked = config.n_logged_completions, [item for item in questions for _ in range(config.group_size)]
    rows = [
        describe_sample(question, completion, verdict) | describe_tokens(completion, run.tokenizer)
        for question, completion, verdict in zip(asked[:n_rows], completions[:n_rows], verdicts[:n_rows], strict=True)
    ]
    return StepRollouts(completions, scores, rewards, greedy_rewards, metrics, rows)


def flatten(groups: Sequence[Group]) -> tuple[list[Completion], list[Graded]]:
    """Return the completions of all groups, and their verdicts."""
    completions = [completion for group in groups for completion in group.completions]
    return completions, [verdict for group in groups for verdict in group.verdicts]


def sample_groups(
    config: GrpoConfig, components: Components, draw: random.Random, step: int, timer: StepTimer
) -> SampledGroups:
    """Sample a group for each of P questions; with `--max-refills`, replace zero-signal groups in further rounds.

    If no group has signal, keep the groups of the last round rather than an empty batch.
    """
    n_wanted = config.n_prompts_per_rollout_batch
    candidates = train_set = curriculum_subset(config, components.train_set, step)
    kept: list[Group] = []
    sampled: list[Group] = []
    for refill in range(config.max_refills + 1):
        questions = draw.sample(candidates, min(n_wanted, len(candidates)))
        groups, rewards = sample_round(config, components, questions, step, refill, timer)
        sampled += groups
        has_signal = find_signal_groups(rewards, config.group_size).tolist()
        kept += compress(groups, has_signal) if config.max_refills else groups
        if len(kept) >= n_wanted:
            break
        # No question twice in one step. A question without signal may be drawn again, with other random seeds.
        kept_ids = {id(group.question) for group in kept}
        candidates = [question for question in train_set if id(question) not in kept_ids]
        if not candidates:
            break
    return SampledGroups(kept[:n_wanted] or groups, sampled, refill, max(0, n_wanted - len(kept)))


def sample_round(
    config: GrpoConfig, components: Components, questions: Sequence[Question], step: int, refill: int, timer: StepTimer
) -> tuple[list[Group], Tensor]:
    """Sample and grade G responses to each question, and return the groups and the reward of each response."""
    size = config.group_size
    with timer.phase("rollout"):
        seed = sampling_seed(config, step, refill)
        completions = sample_responses(components.engine, components.rollout, questions, config.sampling, seed=seed)
    with timer.phase("reward"):
        repeated = [question for question in questions for _ in range(size)]
        verdicts = grade_completions(components.grade, completions, repeated)
        try:
            rewards = read_rewards([verdict.scores for verdict in verdicts])
        except ValueError as error:
            raise TrainingAbortedError(f"step {step}: {error}") from error
    starts = range(0, len(completions), size)
    parts = [(completions[start : start + size], verdicts[start : start + size]) for start in starts]
    return [Group(question, *part) for question, part in zip(questions, parts, strict=True)], rewards


def sampling_seed(config: GrpoConfig, step: int, refill: int = 0) -> int:
    """Return the first random seed of a sampling round; no two responses of a run share a seed."""
    n_rounds = step * (1 + config.max_refills) + refill
    return ((config.seed << 32) + n_rounds * config.rollout_batch_size) % 2**62


def rollout_metrics(
    config: GrpoConfig,
    step: int,
    groups: SampledGroups,
    greedy: Sequence[Completion],
    rewards: Tensor,
    greedy_rewards: Tensor | None,
) -> dict[str, float]:
    """Return the metrics of a step's rollouts; docs/metrics.md defines them."""
    completions, verdicts = flatten(groups.sampled)
    scores: Scores = [verdict.scores for verdict in verdicts]
    metrics = {
        **drop_nan(describe_rewards(scores, config.group_size)),
        **describe_grades(verdicts),
        **describe_pass_at_k(groups.sampled),
        **describe_silent_groups(read_rewards(scores), config.group_size),
        **describe_completions(completions),
        "sampled_tokens": float(sum(completion.n_sampled for completion in (*completions, *greedy))),
    }
    versions = [completion.weight_version for group in groups.kept for completion in group.completions]
    known_versions = [version for version in versions if version is not None]
    if known_versions:
        metrics["staleness"] = step - 1 - fmean(known_versions)
    if config.max_refills:
        metrics |= {"refills": float(groups.n_refills), "missing_groups": float(groups.n_missing)}
    if config.length_penalty != "none":
        metrics |= drop_nan({"shaped_reward": rewards.nanmean().item()})
    if greedy_rewards is not None:
        metrics |= drop_nan({"greedy_reward": greedy_rewards.nanmean().item()})
    return metrics


def describe_pass_at_k(groups: Sequence[Group]) -> dict[str, float]:
    """Return pass@k for k = 2, 4, ... and the group size: the mean over the groups with k scored responses."""
    scored = [correctness_values([verdict.scores for verdict in group.verdicts]) for group in groups]
    size = len(groups[0].verdicts)
    ks = {2**power for power in range(size.bit_length())} | {size}
    values = {f"pass_at_{k}": pass_at_k_of_questions(scored, k) for k in sorted(ks - {1})}
    return {name: fmean(rates) for name, rates in values.items() if rates}


def curriculum_subset(config: RolloutSettings, train_set: Sequence[Question], step: int) -> Sequence[Question]:
    """Return the questions that a step draws from: with `--curriculum-steps`, the easiest first and more each step.

    The subset depends only on the step, so a resumed run draws the same questions.
    """
    if step >= config.curriculum_steps:
        return train_set
    n_questions = math.ceil(len(train_set) * step / config.curriculum_steps)
    return train_set[: max(n_questions, config.n_prompts_per_rollout_batch)]


def drop_nan(metrics: dict[str, float]) -> dict[str, float]:
    """Drop means over nothing, which occur if no response was scored."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


class _Prefetch(NamedTuple):
    """Rollouts that a background thread is sampling."""

    step: int
    timer: StepTimer
    future: Future[StepRollouts]
    draw_state: tuple[Any, ...]
    """State of `TrainingState.draw` before this step, to draw the same questions again if the engine dies."""


class RolloutPrefetcher:
    """Rollouts of a run's steps. With `--async-steps 1`, those of the next step are sampled during the update."""

    def __init__(
        self,
        collect_step: Callable[[int, StepTimer], StepRollouts],
        engine: RolloutEngine,
        state: TrainingState,
        run: Run,
    ) -> None:
        """Collect a step's rollouts with `collect_step`, which puts the engine to sleep at its end."""
        self._collect, self._engine, self._state, self._run = collect_step, engine, state, run
        is_async = run.config.async_steps and distributed.is_rank_zero()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if is_async else None
        self._prefetch: _Prefetch | None = None

    def __enter__(self) -> "RolloutPrefetcher":
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Wait for the background thread, except after an error: then the run saves a checkpoint first.

        The engine's `close` waits for the thread in that case.
        """
        if self._worker is not None:
            self._worker.shutdown(wait=error is None, cancel_futures=True)

    def get(self, step: int) -> StepRollouts:
        """Return the step's rollouts on all ranks: prefetched, from the checkpoint, or sampled now."""
        return run_with_engine(self._engine, lambda: self._get(step))

    def _get(self, step: int) -> StepRollouts:
        rollouts, self._state.pending = self._state.pending, None
        prefetch, self._prefetch = self._prefetch, None
        if prefetch is not None:
            rollouts = prefetch.future.result()
            self._run.timer.add(prefetch.timer)
        if rollouts is None:
            return self._collect(step, self._run.timer)
        self._engine.sleep()
        return rollouts

    def prefetch(self, step: int) -> None:
        """Start to sample the step's rollouts in the background, from the engine's current weights."""
        if self._worker is not None and step <= self._run.config.n_grpo_steps:
            timer, draw_state = self._run.timer.in_background(), self._state.draw.getstate()
            self._prefetch = _Prefetch(step, timer, self._worker.submit(self._collect, step, timer), draw_state)

    def drain(self) -> None:
        """Wait until nothing is being sampled, so that weights can be pushed and the state saved.

        If the engine died, the same questions are sampled again when their step begins.
        """
        if self._prefetch is not None:
            with self._run.timer.phase("wait"):
                try:
                    self._state.pending = self._prefetch.future.result()
                except EngineDiedError as error:
                    self._run.warn(f"{error}: the rollouts of step {self._prefetch.step} are sampled when it begins")
                    self._state.draw.setstate(self._prefetch.draw_state)
                    self._prefetch = None

"""The rollouts of one step: sampled, graded, and where asked sampled again for groups that teach nothing."""

import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType

from drivers.common import distributed
from drivers.common.errors import EngineDiedError, TrainingAbortedError
from drivers.engines.protocol import Completion, RolloutEngine, describe_completions
from drivers.engines.rank_zero import run_with_engine
from drivers.grading.summary import describe_grades
from drivers.grading.verdicts import Graded, Grader, grade_all
from drivers.runs.completions import describe_sample, describe_tokens
from drivers.settings.groups import RolloutSettings
from drivers.settings.grpo import GrpoConfig
from drivers.settings.objectives import ADVANTAGES
from drivers.tasks.questions import Question
from drivers.training.advantages import shape_rewards
from drivers.training.batch import Scores, StepRollouts
from drivers.training.run import Run
from drivers.training.state import TrainingState
from grpo_core import describe_rewards, describe_silent_groups, find_signal_groups, read_rewards


class RolloutPrefetcher:
    """The batches of a run. With `async_steps`, that of the next step is sampled while this one is trained on."""

    def __init__(
        self,
        collect_step: Callable[[Run, int], StepRollouts],
        state: TrainingState,
        run: Run,
        async_steps: int,
        engine: RolloutEngine,
    ) -> None:
        self._collect, self._state, self._run, self._engine = collect_step, state, run, engine
        ahead = async_steps and distributed.is_rank_zero()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if ahead else None
        self._ahead: tuple[int, Run, Future[StepRollouts]] | None = None

    def __enter__(self) -> "RolloutPrefetcher":
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Whatever is being sampled is sampled to its end; where the run has failed, what it made is saved first.

        The engine's `close` waits for what is being sampled.
        """
        if self._worker is not None:
            self._worker.shutdown(wait=error is None, cancel_futures=True)

    def of(self, step: int) -> StepRollouts:
        """The batch of this step: what was begun for it, or else sampled now. The same on all ranks."""
        return run_with_engine(self._engine, lambda: self._of(step))

    def _of(self, step: int) -> StepRollouts:
        pending, self._state.pending = self._state.pending, None
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            pending = ahead[2].result()
            self._run.add_times(ahead[1])
        if pending is None:
            return self._collect(self._run, step)
        self._engine.sleep()  # a batch that was not sampled now did not end with it
        return pending

    def begin(self, step: int) -> None:
        """Sample the batch of this step in the background, from the weights that the engine has now."""
        if self._worker is not None and step <= self._run.config.n_grpo_steps:
            twin = self._run.in_background()
            self._drawn = self._state.draw.getstate()
            self._ahead = step, twin, self._worker.submit(self._collect, twin, step)

    def wait(self) -> None:
        """Until nothing is being sampled: only then may the engine be given other weights, and the state be marked.

        What an engine that died was sampling is sampled again when its step begins, on the same questions.
        """
        if self._ahead is not None:
            with self._run.phase("wait"):
                try:
                    self._state.pending = self._ahead[2].result()
                except EngineDiedError as error:
                    self._run.warn(f"{error}: the rollouts of step {self._ahead[0]} are sampled when it begins")
                    self._state.draw.setstate(self._drawn)
                    self._ahead = None


def collect(
    config: GrpoConfig,
    engine: RolloutEngine,
    grade: Grader,
    train_set: Sequence[Question],
    draw: random.Random,
    run: Run,
    step: int,
) -> StepRollouts:
    """Whole groups; with `max_refills`, only groups with signal, as far as that many further rounds find them."""
    sampled: list[Completion] = []
    graded: list[Graded] = []
    kept: list[tuple[Question, list[Completion], list[Graded]]] = []
    wanted, size, refill = config.n_prompts_per_rollout_batch, config.group_size, 0
    open_questions = train_set = curriculum_subset(config, train_set, step)
    while True:
        with run.phase("rollout"):
            questions = draw.sample(open_questions, min(wanted, len(open_questions)))
            completions = engine.generate(
                [question.prompt_token_ids for question in questions],
                config.sampling,
                seed=run.sampling_seed(step, refill),
            )
        with run.phase("reward"):
            asked = [question for question in questions for _ in range(size)]
            verdicts = _graded(grade, completions, asked)
            signal = [True] * len(questions)
            try:
                rewards = read_rewards([verdict.scores for verdict in verdicts])
            except ValueError as error:
                raise TrainingAbortedError(f"step {step}: {error}") from error
            if config.max_refills:
                signal = find_signal_groups(rewards, size).tolist()
        sampled += completions
        graded += verdicts
        groups = [
            (question, completions[k * size : (k + 1) * size], verdicts[k * size : (k + 1) * size])
            for k, question in enumerate(questions)
        ]
        kept += [group for group, teaches in zip(groups, signal, strict=True) if teaches]
        # No question twice in one step; a silent one may be asked again, with other noise.
        taken = {id(question) for question, _, _ in kept}
        open_questions = [question for question in train_set if id(question) not in taken]
        if len(kept) >= wanted or refill == config.max_refills or not open_questions:
            break
        refill += 1
    missing = max(0, wanted - len(kept))
    if missing:
        run.warn(
            f"step {step}: {missing} of {wanted} groups are missing after {refill} refills, all others are silent; it "
            "trains on what there is. Easier or harder questions, or a higher --max-refills, would fill it"
        )
    kept = kept[:wanted] or groups  # nothing teaches: a step of silent groups, and not of nothing
    with run.phase("rollout"):
        greedy = _greedy_responses(config, engine, [question for question, _, _ in kept], run.sampling_seed(step))
        engine.sleep()
    with run.phase("reward"):
        trained = [completion for _, part, _ in kept for completion in part]
        trained_scores = [verdict.scores for _, _, part in kept for verdict in part]
        raw_rewards = shape_rewards(config, trained, trained_scores)
        greedy_rewards = None
        if greedy is not None:
            greedy_verdicts = _graded(grade, greedy, [question for question, _, _ in kept])
            greedy_rewards = shape_rewards(config, greedy, [verdict.scores for verdict in greedy_verdicts])
        everything: Scores = [verdict.scores for verdict in graded]
        facts = {
            **drop_nan(describe_rewards(everything, size)),
            **describe_grades(graded),
            **describe_silent_groups(read_rewards(everything), size),
            **describe_completions(sampled),
            "sampled_tokens": float(sum(len(completion.token_ids) for completion in (*sampled, *(greedy or ())))),
        }
        versions = [completion.weight_version for completion in trained if completion.weight_version is not None]
        if versions:
            facts["staleness"] = step - 1 - sum(versions) / len(versions)
        if config.max_refills:
            facts |= {"refills": float(refill), "missing_groups": float(missing)}
        if config.length_penalty != "none":
            facts |= drop_nan({"shaped_reward": raw_rewards.nanmean().item()})
        if greedy_rewards is not None:
            facts |= drop_nan({"greedy_reward": greedy_rewards.nanmean().item()})
    samples = ((question, *one) for question, *parts in kept for one in zip(*parts, strict=True))
    shown = [
        describe_sample(*sample) | describe_tokens(sample[1], run.tokenizer)
        for sample in islice(samples, config.n_logged_completions)
    ]
    return StepRollouts(trained, trained_scores, raw_rewards, greedy_rewards, facts, shown)


def _graded(grade: Grader, completions: Sequence[Completion], asked: Sequence[Question]) -> list[Graded]:
    texts = [completion.text for completion in completions]
    return grade_all(grade, texts, [one.answer for one in asked], [one.example.question for one in asked])


def curriculum_subset(config: RolloutSettings, train_set: Sequence[Question], step: int) -> Sequence[Question]:
    """What this step draws from: with `curriculum_steps`, of a set in order of difficulty, a growing first part.

    It follows from the step alone, so a run that is gone on with draws as it would have.
    """
    if step >= config.curriculum_steps:
        return train_set
    share = math.ceil(len(train_set) * step / config.curriculum_steps)
    return train_set[: max(share, config.n_prompts_per_rollout_batch)]


def drop_nan(facts: dict[str, float]) -> dict[str, float]:
    """Without the means of nothing, where nothing was scored."""
    return {name: value for name, value in facts.items() if not math.isnan(value)}


def _greedy_responses(
    config: GrpoConfig, engine: RolloutEngine, questions: Sequence[Question], seed: int
) -> list[Completion] | None:
    if not ADVANTAGES[config.advantage].uses_greedy_response:
        return None
    prompts = [question.prompt_token_ids for question in questions]
    return engine.generate(prompts, config.sampling.greedy(), seed=seed)

"""A run around its loop: the parts that it is built from, and what it shows, writes and checks on the way."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivers.common import distributed
from drivers.common.atomic_files import free_path, remove_unfinished, rename_superseded
from drivers.common.display import Display
from drivers.common.errors import TrainingAbortedError, UsageError, first_line
from drivers.common.signals import defer_signals
from drivers.engines.protocol import RolloutEngine
from drivers.engines.rank_zero import run_with_engine
from drivers.evaluation.policy import evaluate_policy
from drivers.grading.verdicts import Grader
from drivers.policy import fsdp
from drivers.reports.curves import draw_curves
from drivers.runs.checkpoint import TENSORS, WRITE_ERRORS, publish_model, read_facts, read_tensors, save_checkpoint
from drivers.runs.completions import with_values
from drivers.runs.folder import later_checkpoints, newest_checkpoint, prune_checkpoints, release_run_lock
from drivers.runs.log import NoLog, RunLog
from drivers.settings.groups import TrainingSettings
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.questions import Question
from drivers.training.anomalies import Anomaly
from drivers.training.memory import pop_peak_memory
from drivers.training.self_check import DEFAULT_TOLERANCE, Agreement, check_engine
from drivers.training.state import TrainingState

N_SELF_CHECK_PROMPTS = 4


EVALUATION_SEED = 1 << 30


class Run:
    """The folder, the log and the screen of one training run."""

    def __init__(
        self,
        config: GrpoConfig,
        folder: Path,
        tokenizer: Any,
        display: Display,
        checkpoint: Path | None = None,
        settings: TrainingSettings | None = None,
        data: str | None = None,
    ) -> None:
        """`checkpoint`: of this run, to go on from; what was logged after it is dropped.

        `settings`: the program's own, which are written down, where they are not `config`. `data`: the `fingerprint`
        of what is drawn from, which checkpoints keep.
        """
        self.config, self.folder, self.tokenizer, self.display = config, folder, tokenizer, display
        self.state: TrainingState | None = None
        self._checkpoint, self._settings, self._data = checkpoint, settings, data
        self._begun_after = -1 if checkpoint is None else int(read_facts(checkpoint)["step"])
        self._log: RunLog | NoLog = NoLog()
        self._seconds: dict[str, float] = {}
        self._is_in_background = False
        self._told: set[tuple[int, str]] = set()
        # A thousand tokens tell enough, whatever the length limit of the run.
        longest = min(config.sampling_max_tokens, config.sampling_min_tokens + 64)
        # Not top-p: its log-probs are of another distribution, however well the weights agree.
        self._check_sampling = replace(config.sampling, n=min(8, config.group_size), max_tokens=longest, top_p=1.0)

    @property
    def step(self) -> int:
        """The last step whose updates are all in the weights."""
        return 0 if self.state is None else self.state.step

    def begin(self, state: TrainingState) -> TrainingState:
        """The state of this run, as it is or filled from the checkpoint. Only then is anything logged."""
        if self._checkpoint is not None:
            try:
                read_tensors(self._checkpoint / TENSORS, state.tensors())
                state.restore(read_facts(self._checkpoint))
            except UsageError:
                raise
            except Exception as error:  # a state that another program has written fails in any way
                if isinstance(error, RuntimeError) and distributed.is_peer_failure(error):
                    raise
                raise UsageError(
                    f"--resume {self._checkpoint}: cannot resume from it ({type(error).__name__}: {first_line(error)})"
                ) from error
            self.display.say(f"Going on after step {state.step}, from {self._checkpoint}/")
        self.state = state
        distributed.run_on_rank_zero(self._open_folder)
        return state

    def _open_folder(self) -> None:
        """What is there of steps that are still to be made gives way; from now on there is a log."""
        try:
            remove_unfinished(self.folder)
            for later in later_checkpoints(self.folder, self.step) if self._checkpoint is not None else ():
                rename_superseded(later)
            self._log = RunLog(self.folder, self.config, after=self._begun_after, settings_of=self._settings)
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot be written to ({error.strerror or error})") from error

    def steps(self) -> Iterator[int]:
        """The next one, ... n_grpo_steps."""
        for step in range(self.step + 1, self.config.n_grpo_steps + 1):
            self._seconds.clear()
            self.display.begin_step()
            yield step

    def is_first(self, step: int) -> bool:
        """Whether it is the first step of this process, after which the engine is checked: a resumed run too."""
        return step == max(self._begun_after, 0) + 1

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the block, and show it as what is going on."""
        return self.display.phase(name, self._seconds, shown=not self._is_in_background)

    def in_background(self) -> "Run":
        """The same run for another thread: its times are its own, and what it does is not shown as going on."""
        twin = copy.copy(self)
        twin._seconds, twin._is_in_background = {}, True
        return twin

    def add_times(self, twin: "Run") -> None:
        """What was done in the background for this step."""
        for name, seconds in twin._seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def sampling_seed(self, step: int, refill: int = 0) -> int:
        """Another noise stream for each step and each refill of it; one response uses one seed."""
        batches = step * (1 + self.config.max_refills) + refill
        return ((self.config.seed << 32) + batches * self.config.rollout_batch_size) % 2**62

    def warn(self, text: str) -> None:
        """What a person should know of a step, and the run survives."""
        self.display.say(f"warning: {text}")

    def should_apply_update(self, step: int, anomalies: Sequence[Anomaly]) -> bool:
        """Whether an update may be made in spite of these: they are logged, and --on-anomaly says. It may end the run.

        One kind is told once, until a step is without it.
        """
        choice = self.config.on_anomaly
        for anomaly in anomalies:
            if (step, anomaly.kind) not in self._told:
                self._log.log("anomaly", step, anomaly._asdict())
                if (step - 1, anomaly.kind) not in self._told:
                    self.warn(f"step {step}: {anomaly.text}")
            self._told.add((step, anomaly.kind))
        fatal = [one for one in anomalies if choice == "stop" or (choice == "auto" and one.is_fatal)]
        if fatal:
            raise TrainingAbortedError(
                f"step {step}: {fatal[0].text}; this update was not made, the weights are as before. "
                "--on-anomaly skip goes on without such updates"
            )
        return not any(choice == "skip" or one.is_unusable for one in anomalies)

    def check_engine(
        self, engine: RolloutEngine, policy: nn.Module, prompts: Sequence[Question], *, version: int
    ) -> Agreement:
        """Stop the run unless the engine samples from the policy's weights."""
        tolerance = self.config.self_check_tolerance
        if tolerance is None:
            tolerance = DEFAULT_TOLERANCE[fsdp.computing_dtype(policy)]
        with self.phase("check"):
            agreement = check_engine(
                engine,
                policy,
                [question.prompt_token_ids for question in prompts[:N_SELF_CHECK_PROMPTS]],
                self._check_sampling,
                version=version,
                tolerance=tolerance,
                seed=EVALUATION_SEED - 1,
            )
        if self._checkpoint is None:  # the run that was never interrupted has none at a start from a checkpoint
            self._log.log("check", version, asdict(agreement))
        self.display.say(f"self-check at step {version}: {agreement}; {tolerance:g} mean allowed")
        return agreement

    def evaluate(self, engine: RolloutEngine, questions: Sequence[Question], grade: Grader, *, step: int) -> None:
        """Held-out accuracy, logged and shown with some completions. The same noise at every evaluation."""
        n_shown, sampling = self.config.n_logged_completions, self.config.sampling.alone()
        with self.phase("evaluate"):
            values, rows = run_with_engine(
                engine,
                lambda: evaluate_policy(
                    engine,
                    questions,
                    sampling,
                    grade,
                    seed=EVALUATION_SEED,
                    n_shown=n_shown,
                    tokenizer=self.tokenizer,
                ),
            )
        if self.state is not None:
            self.state.accuracies |= {step: values["accuracy"]} if "accuracy" in values else {}
        self._log.log("eval", step, values | {"time_evaluate_s": self._seconds["evaluate"]})
        self._log.log_completions("eval", step, rows[:n_shown])
        self.display.show_evaluation(step, values, rows[:n_shown])

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """The step's line everywhere."""
        times = {f"time_{name}_s": seconds for name, seconds in self._seconds.items()}
        speed = {"update_tokens_per_s": values["trained_tokens"] / self._seconds["update"]}
        if "rollout" in self._seconds:  # not where they came with the checkpoint
            speed["rollout_tokens_per_s"] = values["sampled_tokens"] / self._seconds["rollout"]
        values = {**values, **speed, **times, **pop_peak_memory(), "learning_rate": self.config.learning_rate}
        self._log.log("train", step, values)
        self.display.end_step(step, values)

    def log_samples(
        self,
        step: int,
        rows: Sequence[Mapping[str, Any]],
        values: Sequence[Mapping[str, Sequence[float]]],
        advantages: torch.Tensor | None = None,
    ) -> None:
        """Some of what a step trained on. `values` are those of their tokens, `advantages` those of all responses."""
        taken = [None] * len(rows) if advantages is None else advantages[: len(rows)].tolist()
        self._log.log_completions("train", step, map(with_values, rows, values, taken))

    def save(self, policy: nn.Module, name: str) -> Path | None:
        """A checkpoint that transformers and vLLM load, and that training goes on from unless it is in mid-step.

        None, and a warning, where it cannot be written: the earlier ones stay, and the run may go on. Of several
        ranks, and at the end, that ends the run. A signal waits until it is written.
        """
        assert self.state is not None
        folder, seconds, state = self.folder / name, dict[str, float](), self.state
        whole = state.is_at_snapshot and name.startswith("checkpoint")
        facts, tensors = ({"step": state.step}, None)
        if whole:
            facts, tensors = state.facts() | ({"data": self._data} if self._data else {}), state.tensors()
        with self.display.phase("save", seconds), defer_signals():
            try:
                self._log.sync()
                save_checkpoint(policy, self.tokenizer, folder, facts=facts, tensors=tensors)
            except WRITE_ERRORS as error:
                reason = f"{folder}: no checkpoint can be written ({first_line(error)})"
                if distributed.size() > 1 or state.step == self.config.n_grpo_steps:
                    raise TrainingAbortedError(reason) from error
                with suppress(OSError):
                    remove_unfinished(self.folder)
                last = newest_checkpoint(self.folder)
                self.warn(f"{reason}; the run goes on, and the last one is {last.name if last else 'none'}")
                return None
            if distributed.is_rank_zero():
                try:
                    prune_checkpoints(self.folder, state.accuracies, self.config.keep_checkpoints)
                except (OSError, ValueError, KeyError) as error:  # what was there before costs no run
                    self.warn(f"{self.folder}: earlier checkpoints cannot be tidied up ({first_line(error)})")
        self._log.log("save", state.step, {"time_save_s": seconds["save"]})
        return folder

    def publish(self, name: str) -> Path:
        """The model of the last checkpoint, which holds all that was made, under a name of its own."""
        checkpoint, folder = distributed.run_on_rank_zero(self.last_checkpoint), self.folder / name
        assert checkpoint is not None
        try:
            distributed.run_on_rank_zero(partial(publish_model, checkpoint, folder))
        except OSError as error:
            raise TrainingAbortedError(
                f"{folder}: cannot be written ({first_line(error)}); the same model is in {checkpoint}/"
            ) from error
        return folder

    def free_name(self, name: str) -> str:
        """`name`, or if an earlier process of this run has used it, another."""
        return free_path(self.folder / name).name

    def last_checkpoint(self) -> Path | None:
        """If it holds all that was made since."""
        newest = newest_checkpoint(self.folder)
        whole = self.state is not None and self.state.is_at_snapshot
        return newest if whole and newest is not None and read_facts(newest)["step"] == self.step else None

    def summary(self) -> str:
        """What the run came to."""
        assert self.state is not None
        accuracies = self.state.accuracies
        if not accuracies:
            return "no held-out response could be scored"
        first, last = accuracies[min(accuracies)], accuracies[max(accuracies)]
        return f"held-out accuracy {first:.3f} before the first step, {last:.3f} after step {self.step}"

    def finish(self) -> None:
        """Close the log and draw its picture."""
        self._log.close()
        release_run_lock(self.folder)
        if distributed.is_rank_zero():
            try:
                draw_curves(self.folder)
            except Exception as error:  # a picture is not worth a run, whatever it fails of
                self.warn(f"curves.png could not be drawn ({type(error).__name__}: {error})")

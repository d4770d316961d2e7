"""One training run: what its loop restores, checks, logs and saves."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivers.common import distributed
from drivers.common.atomic_files import remove_unfinished, rename_superseded
from drivers.common.display import Display
from drivers.common.errors import TrainingAbortedError, UsageError, first_line
from drivers.common.signals import StepSignals, defer_signals
from drivers.engines.factory import blame_engine
from drivers.engines.rank_zero import run_with_engine
from drivers.evaluation.outcomes import number_questions, summarize
from drivers.evaluation.policy import EVALUATION_SEED, evaluate_policy
from drivers.policy import fsdp
from drivers.reports.curves import draw_curves
from drivers.runs.checkpoint import STATE_TENSORS, read_state_values, read_tensors
from drivers.runs.completions import with_values
from drivers.runs.folder import discard_run, find_later_checkpoints
from drivers.runs.lock import release_run_lock
from drivers.runs.log import RunLog
from drivers.runs.resume import RUN_MARKER
from drivers.settings.evaluation import name_sets
from drivers.settings.groups import TrainingSettings
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.questions import Question
from drivers.training.anomalies import AnomalyPolicy
from drivers.training.checkpointer import Checkpointer
from drivers.training.components import Components
from drivers.training.memory import pop_peak_memory
from drivers.training.self_check import DEFAULT_TOLERANCE, check_engine, self_check_sampling
from drivers.training.state import TrainingState
from drivers.training.step_timer import StepTimer

N_SELF_CHECK_PROMPTS = 4


class Run:
    """The log, the screen, the timer, the checkpoints and the anomaly policy of one run."""

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
        """Create a run in `folder`, to be resumed from `checkpoint` if there is one.

        `settings` are those of the program, for config.json; default: `config`. `data` is the fingerprint of the
        prompts and answers.
        """
        self.config, self.folder, self.tokenizer, self.display = config, folder, tokenizer, display
        self.timer = StepTimer(display)
        self.anomalies = AnomalyPolicy(config.on_anomaly, self.log, self.warn)
        self.checkpointer = Checkpointer(config, folder, tokenizer, self.warn, self._sync_log, data)
        self._checkpoint, self._settings = checkpoint, settings
        self._resumed_step = 0 if checkpoint is None else int(read_state_values(checkpoint)["step"])
        self._state: TrainingState | None = None
        self._save_seconds: dict[str, float] = {}
        """Time that the loop has spent on the checkpoint that is being written."""
        self._signals = StepSignals(lambda: display.say("Stopping after this step; a second signal stops at once"))
        self._log: RunLog | None = None  # open on rank 0 from `begin` to `finish`

    @property
    def state(self) -> TrainingState:
        """The training state; an error before `start`."""
        if self._state is None:
            raise RuntimeError("call Run.start first")
        return self._state

    @property
    def step(self) -> int:
        """The last step whose updates are all in the weights."""
        return 0 if self._state is None else self._state.step

    # --- begin and end ----------------------------------------------------------------------------------------------
    def start(self, state: TrainingState, components: Components) -> TrainingState:
        """Restore the state, push the weights, check the engine, and evaluate if no step was made yet."""
        self.begin(state)
        with blame_engine(self.config.engine, str(self.config.model_path)):
            run_with_engine(components.engine, partial(components.engine.load_weights, version=state.step))
            self.check_engine(components, version=state.step)
        if state.step == 0:
            self.evaluate(components, step=0)
        return state

    def begin(self, state: TrainingState) -> None:
        """Restore `state` from the checkpoint if the run is resumed, then open the log."""
        if self._checkpoint is not None:
            try:
                read_tensors(self._checkpoint / STATE_TENSORS, state.tensors())
                state.restore(read_state_values(self._checkpoint))
            except Exception as error:  # a state that another program wrote can fail in any way
                is_peer_failure = isinstance(error, RuntimeError) and distributed.is_peer_failure(error)
                if is_peer_failure or isinstance(error, UsageError):
                    raise
                raise UsageError(
                    f"--resume {self._checkpoint}: cannot resume from it ({type(error).__name__}: {first_line(error)})"
                ) from error
            self.display.say(f"Resuming after step {state.step} from {self._checkpoint}/")
        self._state = state
        distributed.run_on_rank_zero(self._open_log)

    def _open_log(self) -> None:
        """Open the log, and rename checkpoints of steps that will be repeated."""
        try:
            remove_unfinished(self.folder)
            if self._checkpoint is not None:
                for later in find_later_checkpoints(self.folder, self.step):
                    rename_superseded(later)
            last_kept_step = -1 if self._checkpoint is None else self._resumed_step
            self._log = RunLog(
                self.folder, self.config, after=last_kept_step, settings=self._settings, say=self.display.say
            )
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot be written to ({error.strerror or error})") from error

    def finish(self) -> None:
        """Close the log, wait for a checkpoint in progress, release the lock and draw curves.png."""
        self._signals.discard()
        if self._log is not None:
            self._log.close()
            self._log = None
        with defer_signals():
            self.checkpointer.close()
        release_run_lock(self.folder)
        if distributed.is_rank_zero():
            try:
                draw_curves(self.folder)
            except Exception as error:  # a plotting error must not end a run
                self.warn(f"curves.png could not be drawn ({type(error).__name__}: {error})")

    def discard_without_result(self) -> None:
        """Remove the files of a new run that ended before its first evaluation: the next try can have its folder."""
        has_result = self.step > 0 or self._checkpoint is not None or bool(self._state and self._state.accuracies)
        if distributed.is_rank_zero() and not has_result:
            with suppress(OSError):  # the error that ended the run matters more
                discard_run(self.folder, RUN_MARKER)

    def summary(self) -> str:
        """Return the first and the last held-out accuracy in a sentence."""
        accuracies = self.state.accuracies
        if not accuracies:
            return "no held-out response could be scored"
        first, last = accuracies[min(accuracies)], accuracies[max(accuracies)]
        text = f"held-out accuracy {first:.3f} before the first step, {last:.3f} after step {self.step}"
        return text if self.state.grad_norms else f"{text}; no step had a gradient, so nothing was learned"

    # --- steps ------------------------------------------------------------------------------------------------------
    def steps(self) -> Iterator[int]:
        """Yield the numbers of the remaining steps."""
        for step in range(self.step + 1, self.config.n_grpo_steps + 1):
            self.timer.start_step()
            yield step

    def is_first_step(self, step: int) -> bool:
        """Return whether `step` is the first of this process, after which the engine is checked again."""
        return step == self._resumed_step + 1

    def is_evaluation_due(self, step: int) -> bool:
        """Return whether the policy is evaluated after `step`."""
        return step % self.config.eval_steps == 0 or step == self.config.n_grpo_steps

    def push_weights(self, components: Components, step: int) -> None:
        """Push the policy's weights to the engine. After the first step of this process, repeat the self-check."""
        with self.timer.phase("push"), defer_signals():
            run_with_engine(components.engine, partial(components.engine.load_weights, version=step))
        if self.is_first_step(step):
            self.check_engine(components, version=step)

    def check_engine(self, components: Components, *, version: int) -> None:
        """Stop the run unless the engine samples from the policy's weights."""
        tolerance = self.config.self_check_tolerance
        if tolerance is None:
            tolerance = DEFAULT_TOLERANCE[fsdp.computing_dtype(components.policy)]
        with self.timer.phase("check"):
            agreement = check_engine(
                components.engine,
                components.policy,
                [question.prompt_token_ids for question in components.val_set[:N_SELF_CHECK_PROMPTS]],
                self_check_sampling(self.config),
                version=version,
                tolerance=tolerance,
                seed=EVALUATION_SEED - 1,
                merges_lora=self.config.lora_push == "merged",
            )
        if self._checkpoint is None:  # a resumed run logs the same rows as a run without interruption
            self.log("check", version, asdict(agreement))
        self.display.say(f"self-check at step {version}: {agreement}; {tolerance:g} mean allowed")

    def evaluate(self, components: Components, *, step: int) -> None:
        """Measure, log and show the accuracy on each set of held-out questions."""
        first, *_ = name_sets("--val-data-path", self.config.val_data_path)
        sets = {first: components.val_set, **components.other_val_sets}
        with self.timer.phase("evaluate"):
            results = {name: self._ask(components, questions) for name, questions in sets.items()}
        n_asked = sum(len(rows) for _, rows in results.values())
        n_failed = sum(metrics["grader_errors"] + metrics["grader_timeouts"] for metrics, _ in results.values())
        if step == 0 and n_failed == n_asked:
            raise TrainingAbortedError(
                f"--reward {self.config.reward}: failed on all {n_asked} held-out responses before the first step; "
                "correct the function"
            )
        logged, others = results[first][0], [name for name in sets if name != first]
        if "accuracy" in logged:
            self.state.accuracies[step] = logged["accuracy"]
        of_others = {f"{name}/{key}": value for name in others for key, value in results[name][0].items()}
        self.log("eval", step, logged | of_others | {"time_evaluate_s": self.timer.seconds["evaluate"]})
        for name, (metrics, rows) in results.items():
            shown = rows[:: self.config.eval_samples][: self.config.n_logged_completions]
            if others:
                shown = [{"dataset": name, **row} for row in shown]
            self._log_completions("eval", step, shown)
            self.display.show_evaluation(step, metrics, shown, name if others else None)

    def _ask(
        self, components: Components, questions: Sequence[Question]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return the metrics and the graded responses of a set of held-out questions."""
        call = partial(
            evaluate_policy,
            components.engine,
            questions,
            self.config.eval_sampling,
            components.grade,
            seed=EVALUATION_SEED,
            n_shown=self.config.n_logged_completions,
            tokenizer=self.tokenizer,
            rollout=components.rollout,
        )
        metrics, rows = run_with_engine(components.engine, call)
        if self.config.eval_samples > 1:
            metrics |= summarize(number_questions(rows, self.config.eval_samples), self.config.reward)
        return metrics, rows

    def hold_signals(self) -> None:
        """Let Ctrl-C wait for the end of the step, because from here on its weights are between two steps.

        Several ranks would each stop in another step, so there a signal interrupts and the last checkpoint stands.
        """
        if distributed.size() == 1:
            self._signals.hold()

    def end_step(self, policy: nn.Module) -> None:
        """Mark the end of the current step in the state, save a checkpoint if one is due, and stop if asked to.

        The checkpoint is written while the next steps run; after the last step, the run waits for it.
        """
        self.state.snapshot()
        is_last = self.step == self.config.n_grpo_steps
        if self.step % self.config.checkpoint_steps == 0 or is_last:
            self.save(policy, f"checkpoint-{self.step}")
        if is_last or self.checkpointer.is_written():
            self.finish_save()
        self._signals.release()

    def save(self, policy: nn.Module, name: str) -> None:
        """Start to write a checkpoint, after the one before is written; a signal waits until the state is copied."""
        self.finish_save()
        with self.display.phase("save", self._save_seconds), defer_signals():
            self.checkpointer.start(policy, self.state, name)

    def finish_save(self) -> Path | None:
        """Wait for the checkpoint that is being written, log its times and return it; a signal waits too."""
        with self.display.phase("save", self._save_seconds), defer_signals():
            saved = self.checkpointer.finish()
        waited_s = self._save_seconds.pop("save")
        if saved is None:
            return None
        self.log("save", saved.step, {"time_save_s": waited_s, "time_write_s": saved.write_s})
        return saved.folder

    # --- logging ----------------------------------------------------------------------------------------------------
    def warn(self, text: str) -> None:
        """Print a warning; the run continues."""
        self.display.say(f"warning: {text}")

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Log one row of metrics; ranks other than 0 log nothing."""
        if self._log is not None:
            self._log.log(phase, step, values)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log and show the metrics of a step, with times, speeds and memory."""
        seconds = self.timer.seconds
        speeds = {"update_tokens_per_s": metrics["trained_tokens"] / seconds["update"]}
        if "rollout" in seconds:  # absent if the rollouts came with the checkpoint
            speeds["rollout_tokens_per_s"] = metrics["sampled_tokens"] / seconds["rollout"]
        times = {f"time_{name}_s": value for name, value in seconds.items()}
        of_optimizer = {"learning_rate": self.config.learning_rate_at(step)}
        if self.state.optimizer.scales_loss:
            of_optimizer["loss_scale"] = self.state.optimizer.loss_scale
        metrics = {**metrics, **speeds, **times, **pop_peak_memory(), **of_optimizer}
        self.log("train", step, metrics)
        self.display.end_step(step, metrics)

    def log_samples(
        self,
        step: int,
        rows: Sequence[Mapping[str, Any]],
        token_values: Sequence[Mapping[str, Sequence[float]]],
        advantages: torch.Tensor | None = None,
    ) -> None:
        """Log the first completions of a step with their token values and advantages."""
        logged = [None] * len(rows) if advantages is None else advantages[: len(rows)].tolist()
        self._log_completions("train", step, list(map(with_values, rows, token_values, logged)))

    def _log_completions(self, phase: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._log is not None:
            self._log.log_completions(phase, step, rows)

    def _sync_log(self) -> None:
        if self._log is not None:
            self._log.sync()

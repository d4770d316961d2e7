"""A run around its loop: the parts that it is built from, and what it shows, writes and checks on the way."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from drivers import ranks
from drivers.checkpoint import (
    FACTS,
    TENSORS,
    WRITE_ERRORS,
    precision_of,
    publish_model,
    read_facts,
    read_tensors,
    save_checkpoint,
)
from drivers.config import GrpoConfig, Settings
from drivers.curves import draw_curves
from drivers.data import Prompt, Question, easiest_first, load_examples, load_prompt, make_questions
from drivers.display import Display
from drivers.errors import UnsoundRunError, UsageError
from drivers.evaluate import evaluate_policy, start_grading
from drivers.files import free_path, set_aside, sweep
from drivers.grading import BUILT_IN, Grader, GradingPool, check_file, one_by_one
from drivers.guards import Anomaly
from drivers.interrupts import uninterrupted
from drivers.lora import add_lora
from drivers.memory import settle_memory, take_peak, weight_bytes
from drivers.models import (
    choose_device,
    choose_dtype,
    context_length,
    default_policy_device,
    default_rollout_device,
    keep_freed_memory,
    load_policy,
    load_tokenizer,
    resolve_model,
)
from drivers.optim import training_state_bytes
from drivers.rollout import FollowingEngine, HFReplica, RolloutEngine, end_token_ids, make_engine
from drivers.run_folder import (
    abandon_run_folder,
    checkpoints,
    create_run_folder,
    find_checkpoint,
    hold,
    later_checkpoints,
    let_go,
    newest_checkpoint,
    tidy,
)
from drivers.run_log import NoLog, RunLog
from drivers.samples import with_values
from drivers.self_check import DEFAULT_TOLERANCE, Agreement, check_engine
from drivers.state import TrainingState, check_resumed, fingerprint
from drivers.weights import PolicyWeights

N_SELF_CHECK_PROMPTS = 4
EVALUATION_SEED = 1 << 30
RUN_MARKER = "metrics.jsonl"
FINAL = "final_model"


class Run:
    """The folder, the log and the screen of one training run."""

    def __init__(
        self,
        config: GrpoConfig,
        folder: Path,
        tokenizer: Any,
        display: Display,
        checkpoint: Path | None = None,
        settings: Settings | None = None,
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
                if isinstance(error, RuntimeError) and ranks.is_lost(error):
                    raise
                raise UsageError(
                    f"--resume {self._checkpoint}: cannot be gone on from ({type(error).__name__}: {_reason(error)})"
                ) from error
            self.display.say(f"Going on after step {state.step}, from {self._checkpoint}/")
        self.state = state
        ranks.lead(self._open_folder)
        return state

    def _open_folder(self) -> None:
        """What is there of steps that are still to be made gives way; from now on there is a log."""
        try:
            sweep(self.folder)
            for later in later_checkpoints(self.folder, self.step) if self._checkpoint is not None else ():
                set_aside(later)
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

    def allows(self, step: int, anomalies: Sequence[Anomaly]) -> bool:
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
            raise UnsoundRunError(
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
            tolerance = DEFAULT_TOLERANCE[ranks.computing_dtype(policy)]
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
            values, rows = ranks.lead(
                lambda: evaluate_policy(
                    engine,
                    questions,
                    sampling,
                    grade,
                    seed=EVALUATION_SEED,
                    n_shown=n_shown,
                    tokenizer=self.tokenizer,
                )
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
        values = {**values, **speed, **times, **take_peak(), "learning_rate": self.config.learning_rate}
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
        whole = state.is_whole and name.startswith("checkpoint")
        facts, tensors = ({"step": state.step}, None)
        if whole:
            facts, tensors = state.facts() | ({"data": self._data} if self._data else {}), state.tensors()
        with self.display.phase("save", seconds), uninterrupted():
            try:
                self._log.sync()
                save_checkpoint(policy, self.tokenizer, folder, facts=facts, tensors=tensors)
            except WRITE_ERRORS as error:
                reason = f"{folder}: no checkpoint can be written ({_reason(error)})"
                if ranks.size() > 1 or state.step == self.config.n_grpo_steps:
                    raise UnsoundRunError(reason) from error
                with suppress(OSError):
                    sweep(self.folder)
                last = newest_checkpoint(self.folder)
                self.warn(f"{reason}; the run goes on, and the last one is {last.name if last else 'none'}")
                return None
            if ranks.is_first():
                try:
                    tidy(self.folder, state.accuracies, self.config.keep_checkpoints)
                except (OSError, ValueError, KeyError) as error:  # what was there before costs no run
                    self.warn(f"{self.folder}: earlier checkpoints cannot be tidied up ({_reason(error)})")
        self._log.log("save", state.step, {"time_save_s": seconds["save"]})
        return folder

    def publish(self, name: str) -> Path:
        """The model of the last checkpoint, which holds all that was made, under a name of its own."""
        checkpoint, folder = ranks.lead(self.last_checkpoint), self.folder / name
        assert checkpoint is not None
        try:
            ranks.lead(partial(publish_model, checkpoint, folder))
        except OSError as error:
            raise UnsoundRunError(
                f"{folder}: cannot be written ({_reason(error)}); the same model is in {checkpoint}/"
            ) from error
        return folder

    def free_name(self, name: str) -> str:
        """`name`, or if an earlier process of this run has used it, another."""
        return free_path(self.folder / name).name

    def last_checkpoint(self) -> Path | None:
        """If it holds all that was made since."""
        newest = newest_checkpoint(self.folder)
        whole = self.state is not None and self.state.is_whole
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
        let_go(self.folder)
        if ranks.is_first():
            try:
                draw_curves(self.folder)
            except Exception as error:  # a picture is not worth a run, whatever it fails of
                self.warn(f"curves.png could not be drawn ({type(error).__name__}: {error})")


class Parts(NamedTuple):
    """What `train` is given beside its settings."""

    policy: nn.Module
    engine: RolloutEngine
    grade: Grader
    train_set: Sequence[Question]
    val_set: Sequence[Question]
    reference: nn.Module | None = None
    """What a divergence is taken from: the model as it was before training, frozen."""

    def close(self) -> None:
        """End the processes that sample and grade."""
        try:
            self.engine.close()
        finally:
            if isinstance(self.grade, GradingPool):
                self.grade.close()


def prepare(config: GrpoConfig, display: Display) -> tuple[Run, Parts]:
    """Everything that the settings name."""
    examples = load_examples("--data-path", config.data_path)
    if len(examples) < config.n_prompts_per_rollout_batch:
        raise UsageError(
            f"--data-path {config.data_path}: holds {len(examples)} questions, and a step asks "
            f"{config.n_prompts_per_rollout_batch} different ones (rollout_batch_size / group_size): "
            "lower --rollout-batch-size or raise --group-size"
        )
    if config.curriculum_steps:
        examples = easiest_first("--curriculum-steps", examples)
    return build(config, display, partial(make_questions, examples, prompt_of(config)))


def prompt_of(config: GrpoConfig) -> Prompt:
    """How the settings put a question."""
    return load_prompt(config.prompt_path, config.chat_template, config.system_prompt_path)


def build(
    config: GrpoConfig,
    display: Display,
    make_train_set: Callable[..., Sequence[Question]],
    settings: Settings | None = None,
) -> tuple[Run, Parts]:
    """The parts. Cheap checks first: a bad file stops the run before a model is loaded.

    `make_train_set`: what `make_questions` is once it has its examples. `settings`: the program's own.
    """
    val_examples = load_examples("--val-data-path", config.val_data_path)[: config.n_val_examples]
    check_file(config.reward)
    prompt = prompt_of(config)
    devices = choose_devices(config)
    assert config.model_path is not None  # the command line refuses that
    model_path = ranks.lead(partial(resolve_model, config.model_path))
    tokenizer = load_tokenizer(model_path, for_chat=config.chat_template)
    context = context_length(model_path)
    train_set, val_set = (
        make(tokenizer, max_new_tokens=config.sampling_max_tokens, context=context)
        for make in (make_train_set, partial(make_questions, val_examples, prompt))
    )
    with ExitStack() as unless_prepared:
        grade: Grader = one_by_one(BUILT_IN["r1_zero"])  # of other ranks, which are never asked
        if ranks.is_first():
            grade = unless_prepared.enter_context(start_grading(config, lambda text: display.say(f"warning: {text}")))
        folder, checkpoint = ranks.lead(partial(open_run_folder, config, display.say))
        data = fingerprint(train_set)
        try:
            if checkpoint is not None:
                check_resumed(config, read_facts(checkpoint), data)
            # In a prompt and a response of sampling_max_tokens there is room for each demonstration too.
            longest = max(question.n_tokens(config.sampling_max_tokens) for question in (*train_set, *val_set))
            longest -= config.sampling_max_tokens
            before = None if checkpoint is None else precision_of(checkpoint)
            policy, reference, engine = load_models(config, display, model_path, tokenizer, devices, longest, before)
        except BaseException:
            if ranks.is_first() and checkpoint is None:
                abandon_run_folder(folder, RUN_MARKER)
            let_go(folder)
            raise
        display.say(f"{len(train_set)} training and {len(val_set)} held-out questions; run folder {folder}/")
        run = Run(config, folder, tokenizer, display, checkpoint, settings, data)
        unless_prepared.pop_all()
    for warning in config.warnings:
        run.warn(warning)
    return run, Parts(policy, engine, grade, train_set, val_set, reference)


def _reason(error: BaseException) -> str:
    """In one line."""
    return str(error).partition("\n")[0]


def open_run_folder(config: GrpoConfig, say: Callable[[str], None]) -> tuple[Path, Path | None]:
    """The run's folder, held by this process, and the checkpoint in it to go on from, if there is one."""
    name = config.recipe or Path(str(config.model_path)).name
    if config.resume is None:
        folder = create_run_folder("--save-dir", config.save_dir, name, marker=RUN_MARKER)
        hold("--save-dir", folder)
        return folder, None
    if config.resume != "auto":
        path = Path(config.resume)
        hold("--resume", path.parent if (path / FACTS).exists() else path)
        checkpoint = find_checkpoint(path, say)
        if checkpoint is None:
            raise UsageError(
                f"--resume {config.resume}: a checkpoint with a folder {TENSORS}, or a run that has one, is required"
            )
        return checkpoint.parent, checkpoint
    assert config.save_dir is not None  # the settings refuse that
    folder = Path(config.save_dir)
    hold("--save-dir", folder)
    checkpoint = find_checkpoint(folder, say)
    if checkpoint is None:
        if (folder / FINAL).exists():
            raise UsageError(
                f"--resume auto: {folder} has a {FINAL}, and no checkpoint with a folder {TENSORS} to go on from: "
                f"pass a new --save-dir, and --model-path {folder / FINAL} to begin from its weights"
            )
        for _, useless in checkpoints(folder):
            say(f"warning: nothing can go on from {useless}; it is set aside, and the run begins again")
            set_aside(useless)
        for file in (RUN_MARKER, "completions.jsonl"):  # it ended before its first one
            set_aside(folder / file)
        create_run_folder("--save-dir", config.save_dir, name, marker=RUN_MARKER)
        hold("--save-dir", folder)
    return folder, checkpoint


def finished_model(config: GrpoConfig) -> Path | None:
    """Of the run that is to be gone on with, if all its steps are made."""
    if config.resume is None:
        return None
    final = Path(str(config.save_dir) if config.resume == "auto" else config.resume) / FINAL
    try:
        return final if final.exists() and read_facts(final)["step"] >= config.n_grpo_steps else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--resume: {final} cannot be read ({type(error).__name__}: {error}); move it away, and the run is gone "
            "on with from its last checkpoint"
        ) from error


def choose_devices(config: GrpoConfig) -> tuple[torch.device, torch.device]:
    """Where the policy of this process and the engine run."""
    policy_device = choose_device("--policy-device", config.policy_device, default_policy_device())
    if ranks.size() > 1:
        policy_device = device_of_rank(config, policy_device)
        if not ranks.is_first():  # the engine is the first one's, on its machine
            return policy_device, policy_device
    if config.rollout_url:
        if config.engine == "hf" or config.rollout_process != "auto" or config.rollout_device != "auto":
            raise UsageError(
                f"--rollout-url {' '.join(config.rollout_url)}: the servers are the engine; --engine vllm is "
                "required, and neither --rollout-device nor --rollout-process"
            )
        return policy_device, policy_device
    if config.engine == "hf":
        elsewhere = policy_device
    elif ranks.size() > 1 and policy_device.type == "cuda":
        elsewhere = torch.device("cuda", int(os.environ["LOCAL_WORLD_SIZE"]))  # the first one after theirs
    else:
        elsewhere = default_rollout_device(policy_device)
    rollout_device = choose_device("--rollout-device", config.rollout_device, elsewhere)
    if rollout_device.type != policy_device.type or (config.engine == "hf" and rollout_device != policy_device):
        raise UsageError(
            f"--rollout-device {rollout_device}: the policy is on {policy_device}; both on the CPU or both on CUDA is "
            "required, and with --engine hf the same device"
        )
    together = rollout_device == policy_device
    if config.rollout_process == "own" and config.engine == "hf":
        raise UsageError("--rollout-process own: --engine hf shares the policy's weights; pass --rollout-process auto")
    if ranks.size() > 1:
        check_device_beside_ranks(config, rollout_device)
        return policy_device, rollout_device
    if config.rollout_process == "own" and together and policy_device.type == "cuda":
        raise UsageError(
            f"--rollout-process own: policy and engine take turns on {policy_device}, in one process: a second GPU is "
            "required (--rollout-device), or pass --rollout-process auto"
        )
    if config.rollout_process == "shared" and not together:
        raise UsageError(
            f"--rollout-process shared: vLLM on {rollout_device} and the policy on {policy_device} are two processes; "
            "pass --rollout-process auto"
        )
    default = type(config).__dataclass_fields__["engine_deadline_s"].default
    if together and config.rollout_process != "own" and config.engine_deadline_s != default:
        raise UsageError(
            f"--engine-deadline-s {config.engine_deadline_s:g}: has no effect on an engine in the trainer's own "
            f"process, which nobody waits for: pass --rollout-process own, or leave it at {default:g}"
        )
    if config.async_steps and together and policy_device.type == "cuda":
        raise UsageError(
            f"--async-steps {config.async_steps}: policy and engine take turns on {policy_device}: a second GPU is "
            "required (--rollout-device), or pass --async-steps 0"
        )
    return policy_device, rollout_device


def device_of_rank(config: GrpoConfig, policy_device: torch.device) -> torch.device:
    """Each rank has the GPU of its number on its machine."""
    if policy_device.type == "cpu":
        return policy_device
    if config.policy_device != "auto":
        raise UsageError(
            f"--policy-device {config.policy_device}: each rank takes the GPU of its number; pass auto, and choose "
            "GPUs by CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def check_device_beside_ranks(config: GrpoConfig, rollout_device: torch.device) -> None:
    """VLLM has a process of its own there, and a GPU of its own if any."""
    if config.rollout_process == "shared":
        raise UsageError("--rollout-process shared: several ranks need vLLM in a process of its own; pass auto")
    n_local = int(os.environ["LOCAL_WORLD_SIZE"])
    free = range(n_local, torch.cuda.device_count())
    if config.engine == "vllm" and rollout_device.type == "cuda" and rollout_device.index not in free:
        raise UsageError(
            f"--rollout-device {rollout_device}: the {n_local} ranks have the GPUs 0 to {n_local - 1}; one more is "
            "required for vLLM: lower --nproc-per-node, or pass --rollout-url"
        )


def load_models(
    config: GrpoConfig,
    display: Display,
    model_path: str,
    tokenizer: Any,
    devices: tuple[torch.device, torch.device],
    longest_prompt: int,
    earlier_dtype: str | None = None,
) -> tuple[nn.Module, nn.Module | None, RolloutEngine]:
    """Policy, frozen reference where one is needed, and engine: what takes long. Says what they are.

    `earlier_dtype`: of the run that is gone on with. Measured anew, `auto` might be another.
    """
    display.say("Loading the model ...")
    policy_device, rollout_device = devices
    asked: str = config.dtype
    if asked == "auto":
        asked = earlier_dtype or ("float32" if config.deterministic else "auto")
    dtype = ranks.lead(partial(choose_dtype, asked, policy_device))  # it may measure
    if config.deterministic and policy_device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it
        torch.use_deterministic_algorithms(True)
    if policy_device.type == "cpu":
        keep_freed_memory()
    longest_row = longest_prompt + config.group_size * config.sampling_max_tokens
    load = partial(load_sharded, config, model_path, policy_device, dtype, longest_row)
    policy = load(lora=config.lora_rank > 0)
    if config.chat_template:  # it is saved so, and whoever samples from a checkpoint ends there too
        generation: Any = policy.generation_config
        generation.eos_token_id = end_token_ids(policy, tokenizer)
    reference, reference_bytes = None, 0
    if config.needs_reference and config.lora_rank == 0:  # else the policy without its adapters is it
        reference = load(lora=False).requires_grad_(False)
        reference_bytes = weight_bytes(reference)
    plan = settle_memory(config, policy, longest_prompt, reference_bytes, rollout_device)
    weights = PolicyWeights(policy, dtype)
    engine: RolloutEngine
    if not ranks.is_first():
        engine = FollowingEngine(weights)
    elif config.engine == "hf" and ranks.size() > 1:
        copy = load_policy(model_path, policy_device, dtype, longest_row, config.attention)
        engine = HFReplica(copy, tokenizer, weights)
    else:
        engine = make_engine(
            config.engine,
            model_path=model_path,
            policy=policy,
            tokenizer=tokenizer,
            device=rollout_device,
            dtype=dtype,
            max_model_len=longest_prompt + config.sampling_max_tokens,
            gpu_memory_utilization=config.gpu_memory_utilization,
            reserved_bytes=training_state_bytes(policy) + reference_bytes,
            seed=config.seed,
            own_process=config.rollout_process == "own" or ranks.size() > 1,
            deadline_s=config.engine_deadline_s,
            urls=config.rollout_url,
            say=display.say,
        )
    size, several = sum(p.numel() for p in policy.parameters()), f"{ranks.size()} x " if ranks.size() > 1 else ""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    adapted = "" if trained == size else f" ({trained / 1e6:.1f} M of them trained)"
    display.say(
        f"{config.model_path}: {size / 1e6:.0f} M parameters{adapted}, {str(dtype).removeprefix('torch.')}, policy on "
        f"{several}{policy_device}, {config.engine} on {', '.join(config.rollout_url) or rollout_device}"
    )
    display.say(f"memory: {plan}")
    if plan.share is not None and plan.share < config.gpu_memory_utilization:
        display.say(
            f"warning: --gpu-memory-utilization {config.gpu_memory_utilization:g}: beside what training keeps on "
            f"{rollout_device}, vLLM gets {plan.share:.2f} of it"
        )
    if not plan.fits:
        display.say("warning: that may not fit: lower --micro-batch-tokens, or pass --gradient-checkpointing on")
    return policy, reference, engine


def load_sharded(
    config: GrpoConfig, model_path: str, device: torch.device, dtype: torch.dtype, longest_row: int, *, lora: bool
) -> nn.Module:
    """The model in `dtype`; of several ranks each keeps its shard, in float32, which is what the optimizer updates."""
    several = ranks.size() > 1
    # The host holds it whole for a moment; it comes to the device a shard at a time.
    place = torch.device("cpu") if several else device
    policy = load_policy(model_path, place, dtype, longest_row, config.attention, on=device)
    if lora:
        add_lora(policy, config.lora_rank, config.lora_alpha, seed=config.seed, base=str(config.model_path))
    return ranks.shard(policy, dtype, device) if several else policy

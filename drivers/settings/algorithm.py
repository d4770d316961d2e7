"""All settings that decide a gradient, and which of them can be combined."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from drivers.common.errors import UsageError
from drivers.settings.base import check_multiple, spell_flag
from drivers.settings.groups import GradingSettings, RolloutSettings, UpdateSettings
from drivers.settings.objective import ImportanceSettings, KLSettings, ObjectiveSettings, TeacherSettings
from drivers.settings.reward_spec import parse_mix
from drivers.settings.sampling import Sampling, make_sampling
from drivers.settings.tables import ADVANTAGES, OBJECTIVES, Choice


def _find_readers(decider: str, table: Mapping[Any, Choice]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return for each setting in `table` the flag that decides whether it is read, and that flag's values."""
    names = dict.fromkeys(name for row in table.values() for name in row.reads)
    return {name: (decider, tuple(key for key, row in table.items() if name in row.reads)) for name in names}


# A flag that has no effect is a misunderstanding, so it is an error.
OPTIONS_READ_BY_LOSS = {
    **_find_readers("loss_type", OBJECTIVES),
    **_find_readers("advantage", ADVANTAGES),
    "off_policy_threshold": ("loss_type", tuple(name for name, row in OBJECTIVES.items() if row.uses_advantages)),
    "importance_level": ("importance", ("truncate", "mask", "reject")),
    "importance_measure": ("importance", ("reject",)),
    "importance_low": ("importance", ("truncate", "mask", "reject")),
    "importance_high": ("importance", ("truncate", "mask", "reject")),
    "overlong_buffer": ("length_penalty", ("soft_overlong",)),
}
"""For each setting: the flag that decides whether it is read, and the values of that flag under which it is."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings(
    UpdateSettings,
    TeacherSettings,
    KLSettings,
    ImportanceSettings,
    ObjectiveSettings,
    RolloutSettings,
    GradingSettings,
):
    """The settings that decide a step's gradient, given the model and the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_batches(self)
        _check_unread_options(self)
        _check_advantage(self)
        _check_importance(self)
        _check_token_advantages(self)
        _check_teacher(self)
        _check_sampler(self)
        _check_refills(self)

    @property
    def sampling(self) -> Sampling:
        """Return the parameters that draw a group for each prompt."""
        return replace(make_sampling(self, self.reward, self.group_size), replays=self.sampling_replay)

    @property
    def passes_per_update(self) -> int:
        """Return over how many passes an optimizer step extends; they have one gradient, which is computed once."""
        return max(1, self.train_batch_size // self.rollout_batch_size)

    @property
    def updates_per_rollout_batch(self) -> int:
        """Return the number of optimizer steps on each rollout batch."""
        return self.rollout_batch_size * self.epochs_per_rollout_batch // self.train_batch_size

    @property
    def is_off_policy(self) -> bool:
        """Return whether some update of a step starts from weights that did not sample the batch."""
        return self.updates_per_rollout_batch > 1

    @property
    def uses_ratio(self) -> bool:
        """Return whether the loss or the KL penalty uses the ratio to the old policy."""
        return self.objective.uses_ratio or (self.kl_coef > 0 and self.kl_estimator == "ratio_k3")

    @property
    def uses_current_policy_as_old(self) -> bool:
        """Return whether the policy that began the step is still the policy of each forward pass."""
        return not self.is_off_policy and self.old_policy == "trainer"

    @property
    def selects_by_old_policy(self) -> bool:
        """Return whether the old policy scores the whole batch first, to select tokens or to shape rewards."""
        return (
            self.objective.high_covariance != "train"
            or self.top_entropy_fraction is not None
            or self.second_moment_threshold is not None
            or self.has_token_advantages
        )

    @property
    def has_token_advantages(self) -> bool:
        """Return whether each token has its own advantage, which depends on the policy before the first update."""
        return self.has_kl_in_reward or self.teacher is not None or self.has_token_baselines

    @property
    def has_token_baselines(self) -> bool:
        """Return whether the estimator of the rewards gives each token its own advantage."""
        return self.estimator.is_per_token and self.objective.uses_advantages and not self.teacher_only

    @property
    def computes_importance_weights_in_forward(self) -> bool:
        """Return whether the loss's forward pass yields importance weights: each depends on its own response alone."""
        is_per_response = not self.self_normalize and self.rejected_tokens == "count"
        needs_no_other_pass = self.uses_current_policy_as_old and not self.selects_by_old_policy
        return self.importance != "none" and is_per_response and needs_no_other_pass

    @property
    def needs_old_log_probs(self) -> bool:
        """Return whether a pass before the first update scores the rollouts; on-policy, the update's own pass does."""
        corrects_before = self.importance != "none" and not self.computes_importance_weights_in_forward
        needs_old_ratio = self.is_off_policy and self.uses_ratio and self.old_policy == "trainer"
        return corrects_before or needs_old_ratio or self.selects_by_old_policy

    @property
    def has_signal_in_equal_groups(self) -> bool:
        """Return whether a batch has a policy gradient even if the rewards of every group are equal."""
        needs_no_signal = not self.objective.uses_advantages or self.objective.has_gradient_without_signal
        return needs_no_signal or self.teacher is not None or self.estimator.has_gradient_in_equal_groups

    @property
    def has_regularization_gradient(self) -> bool:
        """Return whether a step of zero-signal groups has a gradient, from other terms of the loss alone."""
        has_signal = self.has_signal_in_equal_groups or self.length_penalty != "none"
        has_terms = self.has_entropy_bonus or self.kl_coef > 0 or self.positive_nll_coef > 0
        return has_terms and not has_signal

    @property
    def penalized_tokens(self) -> int:
        """Return the number of tokens before the limit over which `soft_overlong` grows."""
        return self.sampling_max_tokens // 5 if self.overlong_buffer is None else self.overlong_buffer

    @property
    def weights_of_parts(self) -> dict[str, float]:
        """Return the weight of each reward that `gdpo` normalizes on its own."""
        names = ("format_reward", "answer_reward")
        return parse_mix(self.reward_mix) or dict(zip(names, self.reward_weights, strict=True))


def _check_batches(settings: AlgorithmSettings) -> None:
    rollouts, size = settings.rollout_batch_size, settings.train_batch_size
    if size <= rollouts:
        check_multiple("rollout_batch_size", rollouts, "train_batch_size", size)
        return
    check_multiple("train_batch_size", size, "rollout_batch_size", rollouts)
    if settings.epochs_per_rollout_batch % settings.passes_per_update:
        raise UsageError(
            f"{settings.flag('train_batch_size')}: takes {settings.passes_per_update} passes over "
            f"{settings.flag('rollout_batch_size')}, which {settings.flag('epochs_per_rollout_batch')} is no multiple "
            f"of; pass --train-batch-size {rollouts}, or --epochs-per-rollout-batch {settings.passes_per_update}"
        )


def _check_unread_options(settings: AlgorithmSettings) -> None:
    read_by_own = {name for row in (settings.objective, settings.estimator) if row.own_function for name in row.reads}
    for name, (decider, readers) in OPTIONS_READ_BY_LOSS.items():
        is_read = getattr(settings, decider) in readers or name in read_by_own
        if settings.is_changed(name) and not is_read:
            words = decider.replace("_", "-")
            raise UsageError(
                f"{settings.flag(name)}: has no effect with {settings.flag(decider)}; it applies to --{words} "
                f"{', '.join(readers)}"
            )


def _check_advantage(settings: AlgorithmSettings) -> None:
    is_single = settings.group_size == 1 and not settings.teacher_only
    if is_single and settings.use_std_normalization and settings.advantage == "group":
        raise UsageError(
            "--group-size 1: one response has no standard deviation; pass at least 2, or --no-use-std-normalization "
            "with --loss-type no_baseline"
        )
    advantage, uses_advantages = settings.estimator, settings.objective.uses_advantages
    if is_single and uses_advantages and advantage.compares_within_group:
        raise UsageError(
            f"--group-size 1: makes every advantage 0 with {settings.flag('loss_type')}; pass at least 2, or "
            "--loss-type no_baseline"
        )
    if "pass_k" in advantage.reads and settings.pass_k > settings.group_size:
        raise UsageError(
            f"{settings.flag('pass_k')}: must not exceed {settings.flag('group_size')}; lower --pass-k, or raise "
            "--group-size"
        )
    if advantage.compares_reward_parts and settings.reward_mix and settings.is_changed("reward_weights"):
        raise UsageError(
            f"{settings.flag('reward_weights')}: has no effect with {settings.flag('reward_mix')}, which sets the "
            "weights of --advantage gdpo; pass only one of the two"
        )
    buffer = settings.overlong_buffer
    if buffer is not None and not 0 <= buffer <= settings.sampling_max_tokens:
        raise UsageError(
            f"{settings.flag('overlong_buffer')}: must be between 0 and {settings.flag('sampling_max_tokens')}"
        )


def _check_importance(settings: AlgorithmSettings) -> None:
    has_response_ratio = settings.objective.has_response_ratio
    if has_response_ratio and settings.importance != "none" and settings.importance_level == "token":
        raise UsageError(
            f"--importance-level token: gives each token a weight, but {settings.flag('loss_type')} has one ratio per "
            "response; pass --importance-level sequence or geometric"
        )
    if settings.importance_measure != "ratio" and not settings.is_changed("importance_high"):
        raise UsageError(
            f"{settings.flag('importance_measure')}: needs its own bound, because the default of "
            "--importance-high bounds a ratio; pass --importance-high"
        )
    if settings.objective.has_response_loss and settings.second_moment_threshold is not None:
        raise UsageError(
            f"{settings.flag('second_moment_threshold')}: selects tokens, but {settings.flag('loss_type')} has one "
            "loss per response; pass a loss with one per token"
        )
    if settings.old_policy == "sampler" and not settings.uses_ratio:
        raise UsageError(
            f"--old-policy sampler: has no effect with {settings.flag('loss_type')}, which has no ratio; pass "
            "--old-policy trainer"
        )
    if settings.async_steps and settings.importance == "none" and settings.old_policy == "trainer":
        raise UsageError(
            f"{settings.flag('async_steps')}: trains on samples of the previous policy, which nothing corrects; pass "
            "--importance truncate, or --old-policy sampler with a loss that has a ratio"
        )


def _check_token_advantages(settings: AlgorithmSettings) -> None:
    if not settings.has_token_advantages:
        return
    flag, remedy = "--kl-in reward", "pass --kl-in loss"
    if not settings.has_kl_in_reward:
        name = "teacher" if settings.teacher is not None else "advantage"
        flag, remedy = settings.flag(name), "pass --loss-type reinforce_with_baseline"
    if not settings.objective.accepts_token_advantages:
        raise UsageError(
            f"{flag}: gives each token its own advantage, which {settings.flag('loss_type')} does not accept; {remedy}"
        )
    if settings.off_policy_threshold is not None:
        raise UsageError(
            f"{settings.flag('off_policy_threshold')}: uses the advantage of a response, but {flag} gives "
            "each token its own; omit one of the two"
        )


def _check_teacher(settings: AlgorithmSettings) -> None:
    """Raise if a setting has no effect with `--teacher-only`, or asks a server for what vLLM does not return."""
    for name in ("advantage", "length_penalty", *settings.estimator.reads) if settings.teacher_only else ():
        if settings.is_changed(name):
            raise UsageError(
                f"{settings.flag(name)}: has no effect with --teacher-only, which gives rewards no advantage; omit "
                "one of the two"
            )
    if settings.has_teacher_server and settings.sampling_temperature != 1:
        raise UsageError(
            f"{settings.flag('sampling_temperature')}: a server gives the teacher's log-probs at temperature 1 only; "
            f"pass --sampling-temperature 1, or a folder or Hub name instead of {settings.flag('teacher')}"
        )
    if settings.has_teacher_server and settings.sampling_replay:
        raise UsageError(
            "--sampling-replay: a server gives the teacher's log-probs over all tokens only; omit it, or pass a "
            f"folder or Hub name instead of {settings.flag('teacher')}"
        )


def _check_sampler(settings: AlgorithmSettings) -> None:
    """Raise if a setting uses the sampler's log-probs and another one makes them differ from the policy's."""
    if settings.sampling_replay:
        if not settings.sampling.truncates and settings.sampling_min_tokens == 0:
            raise UsageError(
                "--sampling-replay: has no effect, because the sampler draws from all tokens; pass --sampling-top-k, "
                "--sampling-top-p, --sampling-min-p or --sampling-min-tokens, or omit it"
            )
        return
    user = _find_use_of_sampler(settings)
    for name, off in (("sampling_top_p", 1), ("sampling_top_k", 0), ("sampling_min_p", 0)):
        if user and getattr(settings, name) != off:
            raise UsageError(
                f"{settings.flag(name)}: renormalizes the sampler's log-probs, which biases {user}; pass "
                f"--sampling-replay, or {spell_flag(name, off)}"
            )
    if user and settings.sampling_min_tokens > 0:
        raise UsageError(
            f"{settings.flag('sampling_min_tokens')}: hides the end token in the sampler alone, which biases {user}; "
            "pass --sampling-replay, or --sampling-min-tokens 0"
        )


def _find_use_of_sampler(settings: AlgorithmSettings) -> str | None:
    """Return what is computed from the sampler's log-probs, or None."""
    if settings.importance != "none":
        return settings.flag("importance")
    if settings.old_policy == "sampler":
        return "the ratio of --old-policy sampler"
    for name in ("off_policy_threshold", "second_moment_threshold"):
        if getattr(settings, name) is not None:
            return settings.flag(name)
    if settings.kl_coef > 0 and settings.kl_reference == "sampler":
        return "the KL penalty of --kl-reference sampler"
    return None


def _check_refills(settings: AlgorithmSettings) -> None:
    if settings.max_refills and (settings.has_signal_in_equal_groups or settings.group_size == 1):
        cause = "advantage" if settings.objective.uses_advantages else "loss_type"
        cause = "teacher" if settings.teacher is not None else cause
        reason = f"with {settings.flag(cause)} they have a gradient too"
        if settings.group_size == 1:
            reason = "with --group-size 1 every group has equal rewards"
        raise UsageError(
            f"{settings.flag('max_refills')}: replaces groups with equal rewards, but {reason}; pass --max-refills 0"
        )

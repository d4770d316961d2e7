"""Which settings may stand together. Each refusal is one line that names the flags and the way out."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from drivers.common.errors import UsageError
from drivers.settings.objectives import ADVANTAGES, OBJECTIVES, Choice

if TYPE_CHECKING:
    from drivers.settings.grpo import GrpoConfig

RESPONSE_OBJECTIVES = tuple(name for name, row in OBJECTIVES.items() if row.has_response_loss)
"""Objectives with one loss per response."""


RATIO_OBJECTIVES = tuple(name for name, row in OBJECTIVES.items() if row.uses_ratio)
"""Objectives that use the ratio to the old policy."""


EQUAL_GROUP_ADVANTAGES = tuple(name for name, row in ADVANTAGES.items() if row.has_gradient_in_equal_groups)
"""Advantages under which a group of equal rewards can have a gradient."""


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
    "importance_low": ("importance", ("truncate", "mask", "reject")),
    "importance_high": ("importance", ("truncate", "mask", "reject")),
    "overlong_buffer": ("length_penalty", ("soft_overlong",)),
}
"""For each setting: the flag that decides whether it is read, and the values of that flag under which it is."""


def check_combination(config: "GrpoConfig") -> None:
    """Raise for settings that contradict each other, or that would compute something other than they say."""
    _check_unread(config)
    _check_advantage(config)
    _check_objective(config)
    _check_sampler(config)
    _check_penalties(config)
    _check_async(config)


def _check_unread(config: "GrpoConfig") -> None:
    defaults = type(config).__dataclass_fields__
    for flag, (decider, readers) in OPTIONS_READ_BY_LOSS.items():
        value, chosen = getattr(config, flag), getattr(config, decider)
        if value != defaults[flag].default and chosen not in readers:
            raise UsageError(
                f"{flag}={value} has no effect with {decider}={chosen}: it is read by {', '.join(readers)}"
            )


def _check_advantage(config: "GrpoConfig") -> None:
    if config.group_size == 1:
        if config.loss_type != "no_baseline" and config.advantage not in ("remax", "reinforce_plus_plus"):
            if config.use_std_normalization and config.advantage == "group":
                raise UsageError(
                    "group_size=1 has no standard deviation: at least 2 is required, or pass "
                    "--no-use-std-normalization with --loss-type no_baseline"
                )
            raise UsageError(
                f"group_size=1 makes every advantage 0, so loss_type={config.loss_type} would learn nothing: "
                "at least 2 is required, or pass --loss-type no_baseline"
            )
        if config.use_std_normalization and config.advantage == "group":
            raise UsageError(
                "group_size=1 has no standard deviation: at least 2 is required, or pass --no-use-std-normalization"
            )
    if config.loss_type == "no_baseline" and config.advantage != "group":
        raise UsageError(
            f"advantage={config.advantage} has no effect with loss_type=no_baseline, which takes the rewards as they "
            "are: pass --loss-type reinforce_with_baseline"
        )
    if config.advantage in ("pass_at_k", "pkpo") and config.pass_k > config.group_size:
        raise UsageError(f"pass_k={config.pass_k} must not exceed group_size={config.group_size}")
    if config.advantage in ("pass_at_k", "maxrl") and config.length_penalty != "none":
        raise UsageError(
            f"length_penalty={config.length_penalty} makes rewards that are negative or between 0 and 1, which "
            f"advantage={config.advantage} cannot take: pass --length-penalty none"
        )
    if config.advantage == "gdpo" and config.length_penalty != "none":
        raise UsageError(
            f"length_penalty={config.length_penalty} has no effect with advantage=gdpo, which compares the format and "
            "the answer reward: pass --length-penalty none"
        )
    if config.advantage == "gdpo" and config.reward_mix and config.reward_weights != (1.0, 1.0):
        raise UsageError(
            f"reward_weights={config.reward_weights} has no effect with reward_mix={' '.join(config.reward_mix)}, "
            "which has the weights of the parts that advantage=gdpo compares; leave one of the two out"
        )


def _check_objective(config: "GrpoConfig") -> None:
    per_response = config.loss_type in RESPONSE_OBJECTIVES
    if (per_response or config.loss_type == "gspo_token") and config.aggregation != "sequence_mean":
        raise UsageError(
            f"loss_type={config.loss_type} is an objective of whole responses, and aggregation={config.aggregation} "
            "would weigh them by length: pass --aggregation sequence_mean (luspo weighs GSPO by length on purpose)"
        )
    if per_response and config.top_entropy_fraction is not None:
        raise UsageError(
            f"top_entropy_fraction={config.top_entropy_fraction} chooses tokens, and loss_type={config.loss_type} has "
            "one loss per response: pass a loss of tokens"
        )
    of_ratio = per_response or config.loss_type == "gspo_token"
    if of_ratio and config.importance != "none" and config.importance_level == "token":
        raise UsageError(
            f"importance_level=token gives each token a weight, and loss_type={config.loss_type} has one ratio per "
            "response: pass --importance-level sequence or geometric"
        )


def _check_sampler(config: "GrpoConfig") -> None:
    corrects, uses_sampler = config.importance != "none", _uses_sampler(config)
    if corrects and config.old_policy == "sampler":
        raise UsageError(
            f"importance={config.importance} with old_policy=sampler corrects for the sampler twice, for the ratio is "
            "to the sampler already: pass --old-policy trainer or --importance none"
        )
    if uses_sampler and config.sampling_top_p < 1:
        raise UsageError(
            f"sampling_top_p={config.sampling_top_p} renormalizes the sampler's log-probs, so that {uses_sampler} "
            "would be off by the mass that was kept: pass --sampling-top-p 1"
        )
    if uses_sampler and config.sampling_min_tokens > 0:
        raise UsageError(
            f"sampling_min_tokens={config.sampling_min_tokens} hides the end token in the sampler alone, so that "
            f"{uses_sampler} would be off there: pass --sampling-min-tokens 0"
        )
    has_ratio = config.loss_type in RATIO_OBJECTIVES or (config.kl_coef > 0 and config.kl_estimator == "ratio_k3")
    if config.old_policy == "sampler" and not has_ratio:
        raise UsageError(f"old_policy=sampler has no effect with loss_type={config.loss_type}, which has no ratio")
    if not 0 <= config.importance_low <= config.importance_high:
        raise UsageError(
            f"importance_low={config.importance_low} must lie between 0 and importance_high={config.importance_high}"
        )
    if config.self_normalize and config.importance not in ("truncate", "mask"):
        raise UsageError(
            f"self_normalize=True has no effect with importance={config.importance}: there are no weights to divide"
        )
    if config.ratio_low > config.ratio_high:
        raise UsageError(f"ratio_low={config.ratio_low} must not exceed ratio_high={config.ratio_high}")
    if config.dual_clip is not None and not config.dual_clip > 1:
        raise UsageError(f"dual_clip={config.dual_clip} must be greater than 1")
    if config.cliprange_high is not None and config.cliprange_high < 0:
        raise UsageError(f"cliprange_high={config.cliprange_high} must not be negative")
    if min(config.sapo_temperatures) <= 0:
        raise UsageError(f"sapo_temperatures={config.sapo_temperatures} must be greater than 0")


def _check_async(config: "GrpoConfig") -> None:
    if not config.async_steps:
        return
    if config.engine == "hf":
        raise UsageError(
            f"async_steps={config.async_steps} samples from weights that the policy has left behind, and engine=hf "
            "has the policy's own: pass --engine vllm, or --async-steps 0"
        )
    if config.importance == "none" and config.old_policy == "trainer":
        raise UsageError(
            f"async_steps={config.async_steps} trains on samples of the policy before the last update, which nothing "
            "corrects: pass --importance truncate, or --old-policy sampler with a loss that has a ratio"
        )


def _uses_sampler(config: "GrpoConfig") -> str | None:
    """What is computed from the sampler's log-probs, if anything is."""
    if config.importance != "none":
        return f"importance={config.importance}"
    if config.old_policy == "sampler":
        return "the ratio of old_policy=sampler"
    if config.off_policy_threshold is not None:
        return f"off_policy_threshold={config.off_policy_threshold}"
    if config.kl_coef > 0 and config.kl_reference == "sampler":
        return "the divergence of kl_reference=sampler"
    return None


def _check_penalties(config: "GrpoConfig") -> None:
    if config.kl_coef > 0 and config.kl_in == "loss" and config.kl_estimator == "k1":
        raise UsageError(
            "kl_estimator=k1 in the loss has an expected gradient of 0: pass --kl-estimator k2 (or ratio_k3 "
            "off-policy), or --kl-in reward"
        )
    if config.kl_coef > 0 and config.kl_in == "reward":
        if config.kl_estimator != "k1":
            raise UsageError(
                f"kl_estimator={config.kl_estimator} in the reward has not the gradient of a divergence: pass "
                "--kl-estimator k1, or --kl-in loss"
            )
        if config.loss_type in (*RESPONSE_OBJECTIVES, "vespo", "no_baseline"):
            raise UsageError(
                f"kl_in=reward gives each token an advantage of its own, which loss_type={config.loss_type} cannot "
                "take: pass --kl-in loss"
            )
        if config.off_policy_threshold is not None:
            raise UsageError(
                f"off_policy_threshold={config.off_policy_threshold} looks at the advantage of a response, and "
                "kl_in=reward gives each token its own: pass --kl-in loss"
            )
    if config.entropy_target is not None and config.entropy_target <= 0:
        raise UsageError(f"entropy_target={config.entropy_target} must be greater than 0")
    if config.overlong_buffer is not None and not 0 <= config.overlong_buffer <= config.sampling_max_tokens:
        raise UsageError(
            f"overlong_buffer={config.overlong_buffer} must lie between 0 and "
            f"sampling_max_tokens={config.sampling_max_tokens}"
        )
    if config.covariance_bounds[0] >= config.covariance_bounds[1]:
        raise UsageError(f"covariance_bounds={config.covariance_bounds} must be a lower and a higher number")
    _check_refills(config)


def _check_refills(config: "GrpoConfig") -> None:
    if not config.max_refills:
        return
    reason = (
        "group_size=1 every group is one"
        if config.group_size == 1
        else "loss_type=no_baseline those teach too"
        if config.loss_type == "no_baseline"
        else f"advantage={config.advantage} those teach too"
        if config.advantage in EQUAL_GROUP_ADVANTAGES
        else None
    )
    if reason:
        raise UsageError(
            f"max_refills={config.max_refills} replaces groups of equal rewards, and with {reason}: pass "
            "--max-refills 0"
        )

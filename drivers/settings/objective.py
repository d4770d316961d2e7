"""Groups of settings that define the objective; each field is written here once."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from drivers.common.errors import UsageError
from drivers.settings.base import (
    Bounds,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Settings,
    Share,
    is_server_address,
)
from drivers.settings.choices import Aggregation, Counting, Divergence, ImportanceLevel, KLEstimator
from drivers.settings.own_objective import find_advantage, find_objective
from drivers.settings.tables import Advantage, AdvantageName, Objective, ObjectiveName


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(Settings):
    """From rewards to advantages, and from advantages to a loss."""

    heading: ClassVar[str] = "objective"

    loss_type: ObjectiveName = "reinforce_with_baseline"
    """Policy loss, or your own as `file.py:function`. All except `no_baseline` and `reinforce_with_baseline` use the
    ratio to the policy at the start of the step (--old-policy). `gspo`, `gmpo` and `luspo` have one per response."""
    advantage: AdvantageName = "group"
    """Advantage, or your own as `file.py:function`. `group` subtracts the group's mean reward and, with
    --use-std-normalization, divides by its standard deviation."""
    aggregation: Aggregation = "sequence_mean"
    """Average the token losses over each response, over all tokens of an optimizer step, or over the tokens of each
    question; or sum them over each response; `constant` divides that sum by --sampling-max-tokens (Dr. GRPO)."""
    use_std_normalization: bool = True
    """Divide a group's centered rewards by their standard deviation."""
    advantage_eps: NonNegativeFloat = 1e-6
    """Constant added to that standard deviation."""
    std_correction: Literal[0, 1] = 1
    """For `group`: 1 divides the variance by G - 1, 0 by G."""
    pass_k: PositiveInt = 4
    """For `pass_at_k` and `pkpo`: the k of pass@k."""
    reward_weights: tuple[float, float] = (1.0, 1.0)
    """For `gdpo`: weights of the format reward and of the answer reward. --reward-mix sets them for your own
    rewards."""
    length_penalty: Literal["none", "soft_overlong", "cosine"] = "none"
    """Length term of the reward. `soft_overlong` adds 0 to -1 over the last --overlong-buffer tokens. `cosine`
    replaces the reward, by length: 2 to 1 if correct, -10 to 0 if wrong, -10 if truncated."""
    overlong_buffer: int | None = None
    """For `soft_overlong`: tokens before the limit over which the penalty grows. Default: a fifth of
    --sampling-max-tokens."""

    cliprange: NonNegativeFloat = 0.2
    """Distance below 1 at which the ratio is clipped. `gmpo` clips the log ratio (nats), `dppo_tv` a difference of
    probabilities, `dppo_kl` a KL divergence (nats)."""
    cliprange_high: float | None = None
    """Distance above 1 at which the ratio is clipped. Default: --cliprange."""
    dual_clip: Annotated[float, Bounds(above=1)] | None = None
    """For `grpo_clip` and `clip_cov`: largest ratio of tokens with a negative advantage. Default: no limit."""
    ratio_low: NonNegativeFloat = 0.0
    """For `cispo`: lower bound of the ratio."""
    ratio_high: float = 5.0
    """For `cispo`: upper bound of the ratio."""
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    """For `sapo`: temperatures for positive and for other advantages."""
    dro_penalty: NonNegativeFloat = 0.05
    """For `dro`: weight of half the squared log ratio of each token."""
    covariance_fraction: Share = 2e-4
    """For `clip_cov` and `kl_cov`: share of an optimizer step's tokens that are dropped or penalized."""
    covariance_bounds: tuple[float, float] = (1.0, 5.0)
    """For `clip_cov`: range of the covariance of advantage and log-prob in which tokens are dropped."""
    kl_cov_coef: PositiveFloat = 1.0
    """For `kl_cov`: weight of |log ratio| on the penalized tokens."""

    positive_nll_coef: NonNegativeFloat = 0.0
    """Weight of the mean negative log-likelihood, in nats, over the tokens of an optimizer step's responses with a
    positive reward (VAPO uses 0.1)."""
    mask_truncated: bool = False
    """Exclude truncated responses from the loss and from token counts (overlong filtering); --empty-responses decides
    whether they count as responses."""
    top_entropy_fraction: Share | None = None
    """Train only on this share of an optimizer step's tokens, those with the highest entropy. Default: all tokens."""
    rejected_tokens: Counting = "count"
    """`count` or `drop`: include tokens excluded by an importance ratio, second moment, entropy or covariance in the
    denominators, or not. Tokens excluded by --off-policy-threshold are always included."""
    empty_responses: Counting = "count"
    """`count` or `drop`: include responses without any token left in the number of responses, or not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_advantage()
        self._check_loss()

    @property
    def objective(self) -> Objective:
        """Return the row of --loss-type."""
        return find_objective(self.loss_type)

    @property
    def estimator(self) -> Advantage:
        """Return the row of --advantage."""
        return find_advantage(self.advantage)

    def _check_advantage(self) -> None:
        advantage = self.estimator
        if not self.objective.uses_advantages and self.is_changed("advantage"):
            raise UsageError(
                f"{self.flag('advantage')}: has no effect with {self.flag('loss_type')}, which uses the rewards "
                "themselves; pass --loss-type reinforce_with_baseline"
            )
        if self.length_penalty != "none" and not advantage.accepts_shaped_rewards:
            raise UsageError(
                f"{self.flag('length_penalty')}: makes rewards that are negative or between 0 and 1, which "
                f"{self.flag('advantage')} does not accept; pass --length-penalty none"
            )
        if self.length_penalty != "none" and advantage.compares_reward_parts:
            raise UsageError(
                f"{self.flag('length_penalty')}: has no effect with {self.flag('advantage')}, which compares "
                "parts of the reward; pass --length-penalty none"
            )

    def _check_loss(self) -> None:
        if self.ratio_low > self.ratio_high:
            raise UsageError(f"{self.flag('ratio_low')}: must not exceed {self.flag('ratio_high')}; lower --ratio-low")
        if self.cliprange_high is not None and self.cliprange_high < 0:
            raise UsageError(f"{self.flag('cliprange_high')}: must be at least 0")
        if min(self.sapo_temperatures) <= 0:
            raise UsageError(f"{self.flag('sapo_temperatures')}: must be greater than 0")
        if self.covariance_bounds[0] >= self.covariance_bounds[1]:
            raise UsageError(f"{self.flag('covariance_bounds')}: must be a lower and a higher number")
        if self.objective.has_response_ratio and self.aggregation != "sequence_mean":
            raise UsageError(
                f"{self.flag('aggregation')}: would weight the responses of {self.flag('loss_type')} by length; pass "
                "--aggregation sequence_mean (luspo weights GSPO by length on purpose)"
            )
        if self.objective.has_response_loss and self.top_entropy_fraction is not None:
            raise UsageError(
                f"{self.flag('top_entropy_fraction')}: selects tokens, but {self.flag('loss_type')} has one loss per "
                "response; pass a loss with one per token"
            )


@dataclass(frozen=True, kw_only=True)
class ImportanceSettings(Settings):
    """Corrections for a sampler whose log-probs differ from the trainer's."""

    heading: ClassVar[str] = "importance correction"

    old_policy: Literal["trainer", "sampler"] = "trainer"
    """Denominator of the loss's ratio: the trainer's log-probs at the start of the step, or the sampler's, so that the
    ratio corrects for the sampler too."""
    importance: Literal["none", "truncate", "mask", "reject"] = "none"
    """Correct for a sampler whose log-probs differ from the trainer's: weight the loss by their ratio, clipped to the
    bounds (truncate) or 0 outside them (mask), or exclude what is outside (reject)."""
    importance_level: ImportanceLevel = "token"
    """Ratio of each token, or the product (sequence) or geometric mean of a response's ratios. With a divergence as
    --importance-measure, `sequence` is its sum over the response and `geometric` its mean."""
    importance_measure: Literal["ratio", Divergence] = "ratio"
    """For `reject`: compare to the bounds the ratio, or a divergence of the two probabilities of the sampled token:
    binary KL (nats), total variation, or the estimates k2 or k3 of the KL (nats)."""
    importance_low: float = 0.0
    """Lower bound of the ratio or divergence."""
    importance_high: float = 2.0
    """Upper bound of the ratio or divergence."""
    self_normalize: bool = False
    """Divide importance weights by their mean over the optimizer step."""
    off_policy_threshold: float | None = None
    """Exclude responses with a negative advantage whose mean log-prob fell by more than this since sampling, in nats
    per token (off-policy sequence masking). Default: exclude none."""

    second_moment_threshold: NonNegativeFloat | None = None
    """Exclude the tokens of an optimizer step that differ most from the sampler, until the mean squared log ratio of
    the others is at most this (M2PO uses 0.04). Default: exclude none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance != "none" and self.old_policy == "sampler":
            raise UsageError(
                f"{self.flag('importance')}: corrects for the sampler twice, because --old-policy sampler already "
                "takes the ratio to it; pass --old-policy trainer or --importance none"
            )
        if not 0 <= self.importance_low <= self.importance_high:
            raise UsageError(f"{self.flag('importance_low')}: must be between 0 and {self.flag('importance_high')}")
        if self.self_normalize and not self.has_importance_weights:
            raise UsageError(
                f"--self-normalize: has no effect with {self.flag('importance')}, which has no weights; pass "
                "--importance truncate or mask"
            )

    @property
    def has_importance_weights(self) -> bool:
        """Return whether the loss is multiplied by importance weights."""
        return self.importance in ("truncate", "mask")


@dataclass(frozen=True, kw_only=True)
class KLSettings(Settings):
    """The KL penalty and the entropy bonus."""

    heading: ClassVar[str] = "KL and entropy"

    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty. Above 0, --kl-reference model keeps a second copy of the model in memory."""
    kl_estimator: KLEstimator = "k3"
    """Estimate of the KL for each token. In the loss, k2 and ratio_k3 minimize KL(policy, reference), k3 the
    reverse."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Add the KL penalty to the loss, or subtract it from the advantages as reward-to-go, which needs k1."""
    kl_reference: Literal["model", "sampler"] = "model"
    """Reference of the KL: the model that training started from, or the policy that sampled."""
    kl_reference_steps: PositiveInt | None = None
    """Steps after which the reference of --kl-reference model moves to the policy, again and again. Default: never."""
    kl_reference_share: Share = 1.0
    """Share of the distance to the policy by which --kl-reference-steps moves each weight of the reference: 1 replaces
    it, less keeps an exponential average. In bfloat16 and float16, small shares are lost in rounding."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus, per nat."""
    entropy_target: PositiveFloat | None = None
    """Target entropy in nats per token. Below it, --entropy-coef grows by 0.005 and is applied; above it, it shrinks
    and is not. Clamped to [0, 1]. Default: constant --entropy-coef."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_coef > 0 and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UsageError(
                "--kl-estimator k1: has an expected gradient of 0 with --kl-in loss; pass --kl-estimator k2 (or "
                "ratio_k3 off-policy), or --kl-in reward"
            )
        if self.has_kl_in_reward and self.kl_estimator != "k1":
            raise UsageError(
                f"{self.flag('kl_estimator')}: gives a biased gradient with --kl-in reward; pass --kl-estimator k1, "
                "or --kl-in loss"
            )

        if self.kl_reference_steps is not None and not self.needs_reference:
            raise UsageError(
                f"{self.flag('kl_reference_steps')}: has no effect without a reference model; pass --kl-coef above 0 "
                "with --kl-reference model"
            )
        if self.kl_reference_steps is None and self.is_changed("kl_reference_share"):
            raise UsageError(
                f"{self.flag('kl_reference_share')}: has no effect on a reference that never moves; pass "
                "--kl-reference-steps too"
            )

    @property
    def has_kl_in_reward(self) -> bool:
        """Return whether a KL penalty is part of the advantages, which gives each token its own."""
        return self.kl_coef > 0 and self.kl_in == "reward"

    @property
    def has_entropy_bonus(self) -> bool:
        """Return whether the loss has an entropy bonus."""
        return self.entropy_coef > 0 or self.entropy_target is not None

    @property
    def needs_reference(self) -> bool:
        """Return whether a frozen copy of the model is needed."""
        return self.kl_coef > 0 and self.kl_reference == "model"


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Settings):
    """On-policy distillation."""

    heading: ClassVar[str] = "teacher"

    teacher: str | None = None
    """Model that scores the policy's responses: a folder or Hugging Face hub name, which is loaded as a second model,
    or http://HOST:PORT of a vLLM server. It has the policy's tokenizer. Adds --teacher-coef (log pi_teacher - log pi)
    to the advantage of each token. Default: none."""
    teacher_coef: PositiveFloat = 1.0
    """Weight of the teacher's advantage, per nat."""
    teacher_only: bool = False
    """Learn from the teacher alone: rewards are logged, but give no advantage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_coef", "teacher_only"):
            if self.teacher is None and self.is_changed(name):
                raise UsageError(f"{self.flag(name)}: has no effect without a teacher; pass --teacher too")
        if "://" in (self.teacher or "") and not self.has_teacher_server:
            raise UsageError(
                f"{self.flag('teacher')}: is not a server's address; pass one such as http://127.0.0.1:8000, a folder "
                "or a Hub name"
            )

    @property
    def has_teacher_server(self) -> bool:
        """Return whether the teacher is a vLLM server instead of a model that is loaded."""
        return self.teacher is not None and is_server_address(self.teacher)

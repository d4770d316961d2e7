"""The table of objectives and the table of advantages. Everything that depends on their names reads these tables.

To add an objective or an advantage, write its function in `grpo_core`, then add its row to the table. A function of
the user's own (`module:function`) gets its row from drivers/settings/own_objective.py.

A row names its function, because settings do not import torch. It gives the function's parameters in two mappings:
`inputs` takes them from the rollouts, `settings` from the settings. In `settings` and in formulas, a name may have an
index, as in `str.format`: `sapo_temperatures[0]`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal


def _same(*names: str) -> dict[str, str]:
    """Map each name to itself, because parameters often have the names of their values."""
    return dict(zip(names, names, strict=True))


RATIO_INPUTS = _same("advantages", "policy_log_probs", "old_log_probs", "response_mask")
GROUP_INPUTS = _same("rewards", "group_sizes")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A row of either table."""

    formula: str
    """The formula for `--show`, a `str.format` template over the settings. Other symbols are {A} for the advantage,
    {old} for the old policy and {sum_of_parts} for the weighted sum that `gdpo` takes."""
    special_formulas: Mapping[tuple[str, object], str] = field(default_factory=dict)
    """Formulas that replace `formula` where a setting has a certain value, by (setting, value)."""
    paper: str | None = None
    """The arXiv number, or None where the method is older."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Names of the settings, by parameter of the function."""
    other_settings: tuple[str, ...] = ()
    """Settings that the method reads outside the function."""
    fixed_arguments: Mapping[str, object] = field(default_factory=dict)
    """Arguments that neither rollouts nor settings decide, by parameter of the function."""
    inputs: Mapping[str, str]
    """Names of the rollouts' values, by parameter of the function."""
    own_function: Callable[..., Any] | None = None
    """The user's own function; None if it is one of `grpo_core`."""
    source_hash: str | None = None
    """Hash of the file that defines the own function."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Return the names of all settings that belong to this choice."""
        in_function = (name.partition("[")[0] for name in self.settings.values())
        return tuple(dict.fromkeys([*in_function, *self.other_settings]))

    def get_arguments(self, inputs: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the function's arguments by parameter, from the rollouts' values and the settings' values."""
        from_inputs = {parameter: inputs[name] for parameter, name in self.inputs.items()}
        from_settings = {
            parameter: Formatter().get_field(name, (), values)[0] for parameter, name in self.settings.items()
        }
        return {**from_inputs, **from_settings, **self.fixed_arguments}

    def format_formula(self, values: Mapping[str, Any]) -> str:
        """Return the formula with the values of settings and symbols in it."""
        special = (text for (name, value), text in self.special_formulas.items() if values[name] == value)
        return next(special, self.formula).format_map(values)


@dataclass(frozen=True, kw_only=True)
class Objective(Choice):
    """A value of `--loss-type`."""

    function: str
    """The function of `grpo_core` that computes the losses, or the name of an own function."""
    inputs: Mapping[str, str] = field(default_factory=lambda: RATIO_INPUTS)
    has_response_loss: bool = False
    """One loss per response instead of one per token."""
    has_response_ratio: bool = False
    """One ratio for all tokens of a response, so that responses must be averaged whole."""
    accepts_token_advantages: bool = True
    """Tokens of one response may have different advantages."""
    has_gradient_without_signal: bool = False
    """A response has a gradient even if its advantage or reward is 0."""
    broken_laws: tuple[str, ...] = ()
    """Sentences about the laws of `grpo_core.testing` that an own function breaks, perhaps on purpose."""
    high_covariance: Literal["train", "drop", "penalize"] = "train"
    """Treatment of the tokens with the highest covariance of advantage and log-prob."""

    @property
    def uses_ratio(self) -> bool:
        """Return whether the loss uses the ratio to the old policy."""
        return "old_log_probs" in self.inputs.values()

    @property
    def uses_advantages(self) -> bool:
        """Return whether the loss uses advantages; otherwise it uses the rewards themselves."""
        return "advantages" in self.inputs.values()


@dataclass(frozen=True, kw_only=True)
class Advantage(Choice):
    """A value of `--advantage`."""

    function: str | None
    """The function of `grpo_core` that computes the advantages, or the name of an own function; None takes the rewards
    as they are."""
    inputs: Mapping[str, str] = field(default_factory=lambda: GROUP_INPUTS)
    compares_within_group: bool = True
    """The other responses of the group are the baseline, so a group of one has nothing to be compared with."""
    accepts_shaped_rewards: bool = True
    """Rewards may be negative or fractional, as a length penalty makes them."""
    whitens_over_tokens: bool = False
    """Advantages are then whitened over all response tokens of the rollout batch."""

    @property
    def compares_reward_parts(self) -> bool:
        """Return whether the named parts of the reward are compared, not their sum."""
        return "reward_parts" in self.inputs.values()

    @property
    def is_per_token(self) -> bool:
        """Return whether each token has its own advantage, which depends on the policy before the first update."""
        return "collision_probs" in self.inputs.values()

    @property
    def uses_greedy_response(self) -> bool:
        """Return whether one greedy response to each question is the baseline."""
        return "greedy_rewards" in self.inputs.values()

    @property
    def has_gradient_in_equal_groups(self) -> bool:
        """Return whether advantages can differ from 0 in a batch whose groups all have equal rewards."""
        return not self.compares_within_group or self.compares_reward_parts


def resolve_values(config: Any) -> dict[str, Any]:
    """Return the settings by name, where a default that depends on other settings has its value."""
    high = config.cliprange if config.cliprange_high is None else config.cliprange_high
    return {**vars(config), "cliprange_high": high, "reward_weights": list(config.weights_of_parts.values())}


CLIP = _same("cliprange", "cliprange_high")
CLIPPED = "min(rho_it {A}, clip(rho_it, 1 - {cliprange:g}, 1 + {cliprange_high:g}) {A})"
CLIPPED_RESPONSE = (
    "min(s_i A_i, clip(s_i, 1 - {cliprange:g}, 1 + {cliprange_high:g}) A_i),  s_i = exp(mean_t log rho_it)"
)
PER_RESPONSE: dict[str, Any] = {
    "has_response_loss": True,
    "has_response_ratio": True,
    "accepts_token_advantages": False,
    "settings": CLIP,
}
DUAL_CLIP: dict[str, Any] = {
    "function": "compute_grpo_clip_loss",
    "settings": CLIP | _same("dual_clip"),
    "formula": f"-{CLIPPED},  or -max({CLIPPED}, {{dual_clip:g}} {{A}}) where {{A}} < 0",
    "special_formulas": {("dual_clip", None): f"-{CLIPPED}"},
}
OBJECTIVES: dict[str, Objective] = {
    "no_baseline": Objective(
        function="compute_naive_policy_gradient_loss",
        inputs={"raw_rewards_or_advantages": "raw_rewards"} | _same("policy_log_probs", "response_mask"),
        accepts_token_advantages=False,
        formula="-r_i log pi(o_it)",
    ),
    "reinforce_with_baseline": Objective(
        function="compute_naive_policy_gradient_loss",
        inputs={"raw_rewards_or_advantages": "advantages"} | _same("policy_log_probs", "response_mask"),
        formula="-{A} log pi(o_it)",
    ),
    "grpo_clip": Objective(**DUAL_CLIP, paper="2402.03300"),
    "grpo_no_clip": Objective(function="compute_grpo_no_clip_loss", formula="-rho_it {A}", paper="1707.06347"),
    "gspo": Objective(
        function="compute_gspo_loss", **PER_RESPONSE, formula=f"-{CLIPPED_RESPONSE}", paper="2507.18071"
    ),
    "gspo_token": Objective(
        function="compute_gspo_token_loss",
        settings=CLIP,
        has_response_ratio=True,
        formula=(
            "-min(s_it {A}, clip(s_it, 1 - {cliprange:g}, 1 + {cliprange_high:g}) {A}),  s_it = sg[s_i] pi / sg[pi]"
        ),
        paper="2507.18071",
    ),
    "gmpo": Objective(
        function="compute_gmpo_loss",
        **PER_RESPONSE,
        formula=(
            "-A_i exp(mean_t z_it),  z = min(log rho, {cliprange_high:g}) if A_i > 0, "
            "max(log rho, -{cliprange:g}) if A_i < 0"
        ),
        paper="2507.20673",
    ),
    "luspo": Objective(
        function="compute_luspo_loss", **PER_RESPONSE, formula=f"-|o_i| {CLIPPED_RESPONSE}", paper="2602.05261"
    ),
    "cispo": Objective(
        function="compute_cispo_loss",
        settings=_same("ratio_low", "ratio_high"),
        formula="-sg[clip(rho_it, {ratio_low:g}, {ratio_high:g})] {A} log pi(o_it)",
        paper="2506.13585",
    ),
    "sapo": Objective(
        function="compute_sapo_loss",
        settings={"temperature_positive": "sapo_temperatures[0]", "temperature_negative": "sapo_temperatures[1]"},
        formula=(
            "-(4 / tau) sigmoid(tau (rho_it - 1)) {A},  "
            "tau = {sapo_temperatures[0]:g} if {A} > 0, else {sapo_temperatures[1]:g}"
        ),
        paper="2511.20347",
    ),
    "vespo": Objective(
        function="compute_vespo_loss",
        accepts_token_advantages=False,
        formula=(
            "-sg[W_i^k exp(lambda (1 - W_i))] A_i log pi(o_it),  W_i = prod_t rho_it,  "
            "(k, lambda) = (2, 3) if A_i >= 0, else (3, 2)"
        ),
        paper="2602.10693",
    ),
    "dppo_tv": Objective(
        function="compute_dppo_tv_loss",
        settings={"threshold_low": "cliprange", "threshold_high": "cliprange_high"},
        formula="-rho_it {A}, and 0 where pi - {old} > {cliprange_high:g} with {A} > 0 "
        "or < -{cliprange:g} with {A} < 0",
        paper="2602.04879",
    ),
    "dppo_kl": Objective(
        function="compute_dppo_kl_loss",
        settings={"threshold": "cliprange"},
        formula="-rho_it {A}, and 0 where the binary KL({old}, pi) > {cliprange:g} in the direction of {A}",
        paper="2602.04879",
    ),
    "dro": Objective(
        function="compute_dro_loss",
        settings={"penalty": "dro_penalty"},
        has_gradient_without_signal=True,  # the square pulls every token back
        formula="-{A} log rho_it + {dro_penalty:g} / 2 (log rho_it)^2",
        paper="2405.19107",
    ),
    "clip_cov": Objective(
        **DUAL_CLIP,
        other_settings=("covariance_fraction", "covariance_bounds"),
        high_covariance="drop",
        paper="2505.22617",
    ),
    "kl_cov": Objective(
        function="compute_kl_cov_loss",
        inputs=RATIO_INPUTS | _same("penalized"),
        settings={"kl_coef": "kl_cov_coef"},
        other_settings=("covariance_fraction",),
        high_covariance="penalize",
        formula="-rho_it {A} + {kl_cov_coef:g} |log rho_it| on the penalized tokens",
        paper="2505.22617",
    ),
}
ADVANTAGES: dict[str, Advantage] = {
    "group": Advantage(
        function="normalize_group_rewards",
        settings=_same("advantage_eps")
        | {"normalize_by_std": "use_std_normalization", "correction": "std_correction"},
        formula="(r_i - mean_group(r)) / (std_group(r) + {advantage_eps:g}),  std over G - {std_correction}",
        special_formulas={("use_std_normalization", False): "r_i - mean_group(r)"},
        paper="2402.03300",
    ),
    "leave_one_out": Advantage(
        function="compute_leave_one_out_advantages",
        formula="r_i - mean of the other G - 1 rewards of the group",
        paper="2402.14740",
    ),
    "batch_std": Advantage(
        function="compute_batch_std_advantages",
        settings=_same("advantage_eps"),
        formula="(r_i - mean_group(r)) / (std_batch(r) + {advantage_eps:g})",
        paper="2508.08221",
    ),
    "reinforce_plus_plus": Advantage(
        function=None,
        inputs={},
        compares_within_group=False,
        whitens_over_tokens=True,
        formula="r_i",
        paper="2501.03262",
    ),
    "reinforce_plus_plus_baseline": Advantage(
        function="normalize_group_rewards",
        fixed_arguments={"normalize_by_std": False},
        whitens_over_tokens=True,
        formula="r_i - mean_group(r)",
        paper="2501.03262",
    ),
    "gdpo": Advantage(
        function="compute_gdpo_advantages",
        inputs={"rewards": "reward_parts", "group_sizes": "group_sizes"},
        settings=_same("reward_weights", "advantage_eps"),
        formula=(
            "S_i / (std_batch(S) + {advantage_eps:g}),  S_i = {sum_of_parts}, "
            "each (r_i - mean_group(r)) / (std_group(r) + {advantage_eps:g})"
        ),
        paper="2601.05242",
    ),
    "opo": Advantage(
        function="compute_opo_advantages",
        inputs=GROUP_INPUTS | _same("lengths"),
        formula="r_i - sum_group(|o| r) / sum_group(|o|)",
        paper="2505.23585",
    ),
    "otb": Advantage(
        function="compute_otb_advantages",
        inputs=GROUP_INPUTS | {"log_probs": "old_log_probs"} | _same("collision_probs", "response_mask"),
        formula=(
            "r_i - sum_group(W_jt r_j) / sum_group(W_jt),  "
            "W_jt = sum_(s <= t) [1 - 2 pi_old(o_js) + sum_v pi_old(v)^2]"
        ),
        paper="2602.07078",
    ),
    "gpg": Advantage(
        function="compute_gpg_advantages",
        formula="(r_i - mean_group(r)) B / (B - M),  M of B responses in groups of equal rewards",
        paper="2504.02546",
    ),
    "maxrl": Advantage(
        function="compute_maxrl_advantages",
        accepts_shaped_rewards=False,
        formula="(r_i - mean_group(r)) / mean_group(r)",
        paper="2602.02710",
    ),
    "remax": Advantage(
        function="compute_remax_advantages",
        inputs=GROUP_INPUTS | _same("greedy_rewards"),
        compares_within_group=False,
        formula="r_i - r(greedy response)",
        paper="2310.10505",
    ),
    "best_of": Advantage(
        function="compute_best_of_advantages",
        formula="r_i - second best of the group if r_i is the best, else 0",
        paper="2503.19595",
    ),
    "pass_at_k": Advantage(
        function="compute_pass_at_k_advantages",
        settings={"k": "pass_k"},
        accepts_shaped_rewards=False,
        formula="(mean reward of the {pass_k}-subsets with i - R) / sqrt(R (1 - R)),  R = pass@{pass_k}",
        paper="2508.10751",
    ),
    "pkpo": Advantage(
        function="compute_pkpo_advantages",
        settings={"k": "pass_k"},
        formula="{pass_k} mean_J max(0, r_i - max_J r),  J: every subset of {pass_k} - 1 others",
        special_formulas={("pass_k", 1): "r_i - mean of the other G - 1 rewards of the group"},
        paper="2505.15201",
    ),
}

if TYPE_CHECKING:
    ObjectiveName = str
    AdvantageName = str
else:
    ObjectiveName, AdvantageName = Literal[tuple(OBJECTIVES)] | str, Literal[tuple(ADVANTAGES)] | str
"""The choices of --loss-type and of --advantage, and the name of an own function."""

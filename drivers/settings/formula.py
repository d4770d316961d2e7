"""`--show`: the settings that were resolved, and what they compute, as formulas."""

from dataclasses import asdict, fields
from typing import assert_never

from drivers.settings.grpo import GrpoConfig
from drivers.settings.legality import RATIO_OBJECTIVES, RESPONSE_OBJECTIVES
from drivers.settings.reward_spec import parse_mix


def show(config: GrpoConfig) -> str:
    """All settings, those that differ from the defaults marked, and the loss that they make."""
    defaults = {field.name: field.default for field in fields(GrpoConfig)}
    lines = [
        f"{'*' if value != defaults[name] else ' '} {name:28} {value}"
        for name, value in asdict(config).items()
        if name != "show"
    ]
    return "\n".join([*lines, "", "* differs from the default", "", *formula(config)])


def formula(config: GrpoConfig) -> list[str]:
    """The objective, a line for each of its parts."""
    lines = [f"r_i      = {_reward(config)}"]
    if config.loss_type != "no_baseline":
        lines += _advantages(config)
    if config.loss_type in RATIO_OBJECTIVES or (config.kl_coef > 0 and config.kl_estimator == "ratio_k3"):
        lines.append(f"rho_it   = pi(o_it) / {_old(config)}(o_it)")
    lines += [f"{'loss_' + _unit(config):8} = {_objective(config)}"]
    if config.importance in ("truncate", "mask"):
        lines.append(f"kappa    = {_importance(config)}")
    terms = [f"{_weights(config)} {'kappa ' if config.importance in ('truncate', 'mask') else ''}loss_{_unit(config)}"]
    if config.kl_coef > 0 and config.kl_in == "loss":
        terms.append(f"+ {config.kl_coef:g} {_weights(config, tokens=True)} KL_it,  KL = {_kl(config)}")
    if config.entropy_coef > 0 or config.entropy_target is not None:
        adaptive = "" if config.entropy_target is None else f" (adapted to {config.entropy_target:g} nats)"
        terms.append(f"- {config.entropy_coef:g}{adaptive} {_weights(config, tokens=True)} H_it")
    lines += [f"L        = {terms[0]}", *(f"           {term}" for term in terms[1:])]
    return lines + [f"  where  {note}" for note in _notes(config)]


def _advantages(config: GrpoConfig) -> list[str]:
    """From the reward to what the objective takes, each stage under a name of its own."""
    whitened, penalized = config.advantage.startswith("reinforce_plus_plus"), _per_token(config)
    if not (whitened or penalized):
        return [f"A_i      = {_advantage(config)}"]
    lines, last = [f"B_i      = {_advantage(config)}"], "B_i"
    if penalized:
        name = "C_it" if whitened else "A_it"
        reference = "mu" if config.kl_reference == "sampler" else "pi_ref"
        lines.append(f"{name}     = B_i - {config.kl_coef:g} sum_(s >= t) [log pi_old(o_is) - log {reference}(o_is)]")
        last = name
    if whitened:
        name = "A_it" if penalized else "A_i "
        lines.append(
            f"{name}     = ({last} - mean) / (std + 1e-08),  both over all response tokens of the rollout batch"
        )
    return lines


def _unit(config: GrpoConfig) -> str:
    return "i" if config.loss_type in RESPONSE_OBJECTIVES else "it"


def _reward(config: GrpoConfig) -> str:
    function = config.reward.rpartition(":")[2]
    weights = parse_mix(config.reward_mix)
    reward = " + ".join(f"{weight:g} {function}(o_i)[{name}]" for name, weight in weights.items())
    reward = reward or f"{function}(o_i)"
    longest = config.sampling_max_tokens
    match config.length_penalty:
        case "none":
            return reward
        case "soft_overlong":
            buffer = config.penalized_tokens
            if buffer == 0:
                return f"{reward} - 1 where |o_i| > {longest}"
            return f"{reward} + clip(({longest - buffer} - |o_i|) / {buffer}, -1, 0)"
        case "cosine":
            angle = f"cos(pi |o_i| / {longest})"
            return f"1.5 + 0.5 {angle} if right, -5 - 5 {angle} if wrong, -10 if cut off"


def _advantage(config: GrpoConfig) -> str:
    eps = f"{config.advantage_eps:g}"
    match config.advantage:
        case "group":
            if not config.use_std_normalization:
                return "r_i - mean_group(r)"
            return f"(r_i - mean_group(r)) / (std_group(r) + {eps}),  std over G - {config.std_correction}"
        case "leave_one_out":
            return "r_i - mean of the other G - 1 rewards of the group"
        case "batch_std":
            return f"(r_i - mean_group(r)) / (std_batch(r) + {eps})"
        case "reinforce_plus_plus":
            return "r_i"
        case "reinforce_plus_plus_baseline":
            return "r_i - mean_group(r)"
        case "gdpo":
            parts = {name.removesuffix("_reward"): weight for name, weight in config.weights_of_parts.items()}
            total = " + ".join(f"{weight:g} A_i^{name}" for name, weight in parts.items()).replace("+ -", "- ")
            return f"S_i / (std_batch(S) + {eps}),  S_i = {total}, each (r_i - mean_group(r)) / (std_group(r) + {eps})"
        case "opo":
            return "r_i - sum_group(|o| r) / sum_group(|o|)"
        case "gpg":
            return "(r_i - mean_group(r)) B / (B - M),  M of B responses in groups of equal rewards"
        case "maxrl":
            return "(r_i - mean_group(r)) / mean_group(r)"
        case "remax":
            return "r_i - r(greedy response)"
        case "best_of":
            return "r_i - second best of the group if r_i is the best, else 0"
        case "pass_at_k":
            return (
                f"(mean reward of the {config.pass_k}-subsets with i - R) / sqrt(R (1 - R)),  R = pass@{config.pass_k}"
            )
        case "pkpo":
            if config.pass_k == 1:
                return "r_i - mean of the other G - 1 rewards of the group"
            k = config.pass_k
            return f"{k} mean over the {k - 1}-subsets J of the others of max(0, r_i - max_J r)"
        case _:  # pragma: no cover - mypy shows that nothing is left
            assert_never(config.advantage)


def _old(config: GrpoConfig) -> str:
    if config.old_policy == "sampler":
        return "mu"
    return "sg[pi]" if config.uses_current_policy_as_old else "pi_old"


def _objective(config: GrpoConfig) -> str:
    low = config.cliprange
    high = low if config.cliprange_high is None else config.cliprange_high
    advantage = "A_it" if _per_token(config) else "A_i"
    bounds = f"1 - {low:g}, 1 + {high:g}"
    match config.loss_type:
        case "no_baseline":
            return "-r_i log pi(o_it)"
        case "reinforce_with_baseline":
            return f"-{advantage} log pi(o_it)"
        case "grpo_clip" | "clip_cov":
            plain = f"min(rho_it {advantage}, clip(rho_it, {bounds}) {advantage})"
            if config.dual_clip is None:
                return f"-{plain}"
            return f"-{plain},  or -max({plain}, {config.dual_clip:g} {advantage}) where {advantage} < 0"
        case "grpo_no_clip":
            return f"-rho_it {advantage}"
        case "gspo":
            return f"-min(s_i A_i, clip(s_i, {bounds}) A_i),  s_i = exp(mean_t log rho_it)"
        case "gspo_token":
            return f"-min(s_it {advantage}, clip(s_it, {bounds}) {advantage}),  s_it = sg[s_i] pi / sg[pi]"
        case "gmpo":
            return f"-A_i exp(mean_t z_it),  z = min(log rho, {high:g}) if A_i > 0, max(log rho, -{low:g}) if A_i < 0"
        case "luspo":
            return f"-|o_i| min(s_i A_i, clip(s_i, {bounds}) A_i),  s_i = exp(mean_t log rho_it)"
        case "cispo":
            return f"-sg[clip(rho_it, {config.ratio_low:g}, {config.ratio_high:g})] {advantage} log pi(o_it)"
        case "sapo":
            positive, other = config.sapo_temperatures
            return (
                f"-(4 / tau) sigmoid(tau (rho_it - 1)) {advantage},  tau = {positive:g} if {advantage} > 0, "
                f"else {other:g}"
            )
        case "vespo":
            return (
                "-sg[W_i^k exp(lambda (1 - W_i))] A_i log pi(o_it),  W_i = prod_t rho_it,  (k, lambda) = (2, 3) if "
                "A_i >= 0, else (3, 2)"
            )
        case "dppo_tv":
            return (
                f"-rho_it {advantage}, and 0 where pi - {_old(config)} > {high:g} with {advantage} > 0 or < -{low:g} "
                f"with {advantage} < 0"
            )
        case "dppo_kl":
            return (
                f"-rho_it {advantage}, and 0 where the binary KL({_old(config)}, pi) > {low:g} in the direction of "
                f"{advantage}"
            )
        case "kl_cov":
            return f"-rho_it {advantage} + {config.kl_cov_coef:g} |log rho_it| on the penalized tokens"
        case _:  # pragma: no cover - mypy shows that nothing is left
            assert_never(config.loss_type)


def _per_token(config: GrpoConfig) -> bool:
    return config.kl_coef > 0 and config.kl_in == "reward"


def _importance(config: GrpoConfig) -> str:
    ratio = {
        "token": "pi_old(o_it) / mu(o_it)",
        "sequence": "prod_t pi_old(o_it) / mu(o_it)",
        "geometric": "(prod_t pi_old(o_it) / mu(o_it))^(1 / |o_i|)",
    }[config.importance_level]
    low, high = f"{config.importance_low:g}", f"{config.importance_high:g}"
    weight = (
        f"clip({ratio}, {low}, {high})"
        if config.importance == "truncate"
        else f"{ratio} if in [{low}, {high}], else 0"
    )
    return f"({weight}) / its mean over the optimizer step" if config.self_normalize else weight


def _kl(config: GrpoConfig) -> str:
    reference = "mu" if config.kl_reference == "sampler" else "pi_ref"
    form = {
        "k1": "-x",
        "k2": "x^2 / 2",
        "k3": "exp(x) - x - 1",
        "abs": "|x|",
        "ratio_k3": "rho (exp(x) - x - 1)",
    }[config.kl_estimator]
    return f"{form},  x = log {reference} - log pi"


def _weights(config: GrpoConfig, *, tokens: bool = False) -> str:
    if config.loss_type in RESPONSE_OBJECTIVES and not tokens:
        return "1/N sum_i"
    return {
        "sequence_mean": "1/N sum_i 1/|o_i| sum_t",
        "token_mean": "1/(sum_i |o_i|) sum_i sum_t",
        "prompt_mean": "1/P sum_p 1/(sum_(i in p) |o_i|) sum_(i in p) sum_t",
        "sequence_sum": "1/N sum_i sum_t",
        "constant": f"1/N sum_i 1/{config.sampling_max_tokens} sum_t",
    }[config.aggregation]


def _notes(config: GrpoConfig) -> list[str]:
    per_step = config.rollout_batch_size // config.train_batch_size * config.epochs_per_rollout_batch
    notes = [
        f"N = {config.train_batch_size} responses in an update; {per_step} update{'s' if per_step > 1 else ''} on "
        f"each rollout batch of {config.n_prompts_per_rollout_batch} questions x {config.group_size} responses"
    ]
    if config.loss_type in RATIO_OBJECTIVES and config.uses_current_policy_as_old:
        notes.append("pi_old is the policy of the same pass: every ratio is 1, and no bound ever binds")
    if config.async_steps:
        notes.append("mu is the policy before the last update: a batch is sampled while the one before is trained on")
    notes += config.warnings
    if config.importance == "reject":
        notes.append(
            f"what has a {config.importance_level} ratio pi_old / mu outside [{config.importance_low:g}, "
            f"{config.importance_high:g}] is left out"
        )
    if config.mask_truncated:
        counts = "still count" if config.empty_responses == "count" else "do not count"
        notes.append(f"responses that were cut off are left out, their tokens of |o_i| too; they {counts} in N")
    if config.top_entropy_fraction is not None:
        notes.append(f"only the {config.top_entropy_fraction:g} of the step's tokens with the highest entropy count")
    if config.loss_type in ("clip_cov", "kl_cov"):
        verb = "left out" if config.loss_type == "clip_cov" else "penalized"
        notes.append(
            f"the {config.covariance_fraction:g} of the step's tokens with the highest covariance of A and log pi_old "
            f"are {verb}"
        )
    if config.off_policy_threshold is not None:
        notes.append(
            f"responses with A < 0 and mean_t (log mu - log pi) > {config.off_policy_threshold:g} are left out; they "
            "still count in the denominators"
        )
    if "drop" in (config.rejected_tokens, config.empty_responses):
        notes.append(
            f"in the denominators, rejected tokens {config.rejected_tokens} and empty responses "
            f"{config.empty_responses}"
        )
    if config.max_refills:
        notes.append(
            f"groups of equal rewards are replaced, in at most {config.max_refills} further rounds of sampling"
        )
    return notes

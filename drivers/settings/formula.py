"""`--show`: print the resolved settings, and the loss that they define as formulas."""

from drivers.settings.grpo import GrpoConfig
from drivers.settings.parser import sort_by_heading
from drivers.settings.reward_spec import parse_mix
from drivers.settings.tables import Advantage, Objective, resolve_values

_DIVERGENCES = {
    "binary_kl": "binary KL(mu, pi_old)",
    "total_variation": "difference |pi_old - mu|",
    "k2": "log(pi_old / mu)^2 / 2",
    "k3": "pi_old / mu - 1 - log(pi_old / mu)",
}


def show(config: GrpoConfig) -> str:
    """Return all settings, with a mark at each that differs from its default, and the formulas of the loss."""
    names = [name for members in sort_by_heading(GrpoConfig).values() for name in members if name != "show"]
    lines = [f"{'*' if config.is_changed(name) else ' '} {name:28} {getattr(config, name)}" for name in names]
    return "\n".join([*lines, "", "* differs from the default", "", *formula(config)])


def formula(config: GrpoConfig) -> list[str]:
    """Return the formulas of the loss, one line per part."""
    objective = config.objective
    unit, kappa = "i" if objective.has_response_loss else "it", config.has_importance_weights
    lines = [f"r_i      = {_format_reward(config)}"]
    if objective.uses_advantages:
        lines += _format_advantages(config, config.estimator)
    if config.uses_ratio:
        lines.append(f"rho_it   = pi(o_it) / {_format_old_policy(config)}(o_it)")
    symbols = {"A": "A_it" if config.has_token_advantages else "A_i", "old": _format_old_policy(config)}
    lines.append(f"{'loss_' + unit:8} = {objective.format_formula(resolve_values(config) | symbols)}")
    if kappa:
        lines.append(f"kappa    = {_format_importance(config)}")
    token_weights = _format_token_weights(config)
    weights = "1/N sum_i" if objective.has_response_loss else token_weights
    terms = [f"{weights} {'kappa ' if kappa else ''}loss_{unit}"]
    if config.kl_coef > 0 and config.kl_in == "loss":
        terms.append(f"+ {config.kl_coef:g} {token_weights} KL_it,  KL = {_format_kl(config)}")
    if config.has_entropy_bonus:
        adaptive = "" if config.entropy_target is None else f" (adapted to {config.entropy_target:g} nats)"
        terms.append(f"- {config.entropy_coef:g}{adaptive} {token_weights} H_it")
    if config.positive_nll_coef > 0:
        positive = "sum_(i: r_i > 0)"
        terms.append(f"- {config.positive_nll_coef:g} 1/({positive} |o_i|) {positive} sum_t log pi(o_it)")
    lines += [f"L        = {terms[0]}", *(f"           {term}" for term in terms[1:])]
    return lines + [f"  where  {note}" for note in _make_notes(config, objective)]


def _format_reward(config: GrpoConfig) -> str:
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
            return f"1.5 + 0.5 {angle} if correct, -5 - 5 {angle} if wrong, -10 if truncated"


def _format_advantages(config: GrpoConfig, advantage: Advantage) -> list[str]:
    """Return one line for each stage from the reward to the advantage, each with its own symbol."""
    parts = {name.removesuffix("_reward"): weight for name, weight in config.weights_of_parts.items()}
    sum_of_parts = " + ".join(f"{weight:g} A_i^{name}" for name, weight in parts.items()).replace("+ -", "- ")
    estimate = advantage.format_formula(resolve_values(config) | {"sum_of_parts": sum_of_parts})
    taught = f"{config.teacher_coef:g} [log pi_T(o_it) - log pi_old(o_it)]"
    stages = [("it", taught)] if config.teacher_only else [("it" if advantage.is_per_token else "i", estimate)]
    if config.has_kl_in_reward:
        kl = f"[log pi_old(o_is) - log {_format_reference(config)}(o_is)]"
        stages.append(("it", f"{{last}} - {config.kl_coef:g} sum_(s >= t) {kl}"))
    if advantage.whitens_over_tokens:
        whitened = "({last} - mean) / (std + 1e-08),  both over all response tokens of the rollout batch"
        stages.append((stages[-1][0], whitened))
    if config.teacher is not None and not config.teacher_only:
        stages.append(("it", f"{{last}} + {taught}"))
    lines, last = [], ""
    for letter, (index, form) in zip([*"BCD"[: len(stages) - 1], "A"], stages, strict=True):
        lines.append(f"{f'{letter}_{index}':8} = {form.replace('{last}', last)}")
        last = f"{letter}_{index}"
    return lines


def _format_old_policy(config: GrpoConfig) -> str:
    if config.old_policy == "sampler":
        return "mu"
    return "sg[pi]" if config.uses_current_policy_as_old else "pi_old"


def _format_importance(config: GrpoConfig) -> str:
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


def _format_reference(config: GrpoConfig) -> str:
    return "mu" if config.kl_reference == "sampler" else "pi_ref"


def _format_kl(config: GrpoConfig) -> str:
    form = {
        "k1": "-x",
        "k2": "x^2 / 2",
        "k3": "exp(x) - x - 1",
        "abs": "|x|",
        "ratio_k3": "rho (exp(x) - x - 1)",
    }[config.kl_estimator]
    return f"{form},  x = log {_format_reference(config)} - log pi"


def _format_token_weights(config: GrpoConfig) -> str:
    return {
        "sequence_mean": "1/N sum_i 1/|o_i| sum_t",
        "token_mean": "1/(sum_i |o_i|) sum_i sum_t",
        "prompt_mean": "1/P sum_p 1/(sum_(i in p) |o_i|) sum_(i in p) sum_t",
        "sequence_sum": "1/N sum_i sum_t",
        "constant": f"1/N sum_i 1/{config.sampling_max_tokens} sum_t",
    }[config.aggregation]


def _make_notes(config: GrpoConfig, objective: Objective) -> list[str]:
    per_step = config.updates_per_rollout_batch
    notes = [
        f"N = {min(config.train_batch_size, config.rollout_batch_size)} responses in an update; {per_step} "
        f"update{'s' if per_step > 1 else ''} on "
        f"each rollout batch of {config.n_prompts_per_rollout_batch} questions x {config.group_size} responses"
    ]
    if objective.uses_ratio and config.uses_current_policy_as_old:
        notes.append("pi_old is the policy of the same forward pass: every ratio is 1, and no bound ever binds")
    if config.async_steps:
        notes.append(
            "mu is the policy before the last update: a batch is sampled while the previous one is trained on"
        )
    notes += config.warnings
    if config.importance == "reject":
        excluded = "tokens" if config.importance_level == "token" else "responses"
        measured = f"{config.importance_level} ratio pi_old / mu"
        if config.importance_measure != "ratio":
            form = {"token": "", "sequence": "sum over t of ", "geometric": "mean over t of "}[config.importance_level]
            measured = f"{form}{_DIVERGENCES[config.importance_measure]}"
        low, high = config.importance_low, config.importance_high
        notes.append(f"{excluded} with a {measured} outside [{low:g}, {high:g}] are excluded")
    if config.mask_truncated:
        counts = "still count" if config.empty_responses == "count" else "do not count"
        notes.append(f"truncated responses are excluded, and their tokens from |o_i|; they {counts} in N")
    if config.top_entropy_fraction is not None:
        notes.append(f"only the {config.top_entropy_fraction:g} of the step's tokens with the highest entropy count")
    if config.second_moment_threshold is not None:
        notes.append(
            "the step's tokens of largest (log pi_old - log mu)^2, pi_old of the trainer, are excluded until its mean "
            f"over the others is at most {config.second_moment_threshold:g}"
        )
    if objective.high_covariance != "train":
        fate = "excluded" if objective.high_covariance == "drop" else "penalized"
        notes.append(
            f"the {config.covariance_fraction:g} of the step's tokens with the highest covariance of A and log pi_old "
            f"are {fate}"
        )
    if config.teacher is not None:
        notes.append(f"pi_T is the teacher, {config.teacher}")
    if config.kl_reference_steps is not None:
        share, period = config.kl_reference_share, config.kl_reference_steps
        notes.append(f"pi_ref <- {share:g} pi + {1 - share:g} pi_ref after every {period} steps")
    if config.off_policy_threshold is not None:
        notes.append(
            f"responses with A < 0 and mean_t (log mu - log pi) > {config.off_policy_threshold:g} are excluded; they "
            "still count in the denominators"
        )
    if "drop" in (config.rejected_tokens, config.empty_responses):
        notes.append(
            f"in the denominators, rejected tokens {config.rejected_tokens} and empty responses "
            f"{config.empty_responses}"
        )
    if config.sampling_replay:
        notes.append("pi is the softmax over the tokens that the sampler could draw (arXiv:2512.02556, section 3.1)")
    if config.max_refills:
        notes.append(
            f"groups of equal rewards are replaced, in at most {config.max_refills} further rounds of sampling"
        )
    return notes + _cite_papers(config, objective)


def _cite_papers(config: GrpoConfig, objective: Objective) -> list[str]:
    papers = {f"--loss-type {config.loss_type}": objective.paper}
    if objective.uses_advantages:
        papers[f"--advantage {config.advantage}"] = None if config.teacher_only else config.estimator.paper
    if config.teacher is not None:
        papers["--teacher"] = "2306.13649"
    return [f"{choice} is defined in arXiv:{paper}" for choice, paper in papers.items() if paper is not None]

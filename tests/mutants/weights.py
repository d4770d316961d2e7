"""From losses to one number and one step: losses/aggregation.py, losses/steps.py."""

from tests.mutants.table import breaks

FAMILY, CORRECTIONS = "tests/property/test_family.py", "tests/property/test_corrections.py"
ERRORS, EXAMPLES = "tests/unit/test_errors.py", "tests/unit/test_worked_examples.py"
ORACLE, TRACED = "tests/oracle/test_oracle.py", "tests/property/test_transforms.py"
WEIGHTS = f"{FAMILY} -k weights_by_definition"
STEPS = f"{EXAMPLES} tests/parity/test_conventions.py tests/property/test_steps.py -k 'step or garbage'"
SFT = f"{EXAMPLES} {ORACLE} -k sft"
COMPOSE = f"{ERRORS} {CORRECTIONS} -k 'terms or test_errors and weights'"

GRPO_CALL = "        normalize_constant=normalize_constant,\n        group_sizes=group_sizes,\n    )\n"
SFT_CALL = "response_mask, gradient_accumulation_steps, normalize_constant\n    )\n"

AGGREGATION = [
    *breaks(
        "compute_token_weights",
        "losses/aggregation.py",
        f"{ERRORS} {FAMILY} -k 'test_errors or weights_by_definition'",
        (
            "sequence_mean: by the mean length",
            "return 1 / (responses * tokens.clamp(min=1))",
            "return torch.ones_like(tokens) / (responses * tokens.mean().clamp(min=1))",
        ),
        (
            "sequence_mean: over padding",
            "return 1 / (responses * tokens.clamp(min=1))",
            "return torch.ones_like(tokens) / (responses * counted.shape[1])",
        ),
        ("sequence_mean: a sum over responses", "1 / (responses * tokens.clamp(min=1))", "1 / tokens.clamp(min=1)"),
        ("token_mean: over padding", "total = tokens.sum().clamp(min=1)", "total = counted.numel()"),
        (
            "token_mean: what was rejected counts",
            'return weighted, response_mask if rejected_tokens == "count" else weighted',
            "return weighted, response_mask",
        ),
        (
            "token_mean: the constant forgotten",
            "total if normalize_constant is None else _check_normalize_constant(normalize_constant, aggregation)",
            "total",
        ),
        (
            "prompt_mean: a mean of the means of responses",
            "return 1 / (_count_parts(per_group, empty_responses) * per_group.clamp(min=1))[group]",
            "return 1 / (_count_parts(per_group, empty_responses) * sizes[group] * tokens.clamp(min=1))",
        ),
        (
            "prompt_mean: a sum over questions",
            "1 / (_count_parts(per_group, empty_responses) * per_group",
            "1 / (per_group",
        ),
        (
            "prompt_mean: rows dealt out in turn",
            "torch.arange(len(sizes), device=tokens.device).repeat_interleave(sizes)",
            "torch.arange(len(tokens)) % len(sizes)",
        ),
        (
            "prompt_mean: empty questions always count",
            "1 / (_count_parts(per_group, empty_responses)",
            "1 / (len(sizes)",
        ),
        (
            "sequence_sum: by the tokens",
            "torch.ones_like(tokens) / responses",
            "torch.ones_like(tokens) / tokens.sum().clamp(min=1)",
        ),
        ("sequence_sum: a sum over responses", "torch.ones_like(tokens) / responses", "torch.ones_like(tokens)"),
        (
            "constant: a sum over responses",
            "/ (responses * _check_normalize_constant(normalize_constant, aggregation))",
            "/ _check_normalize_constant(normalize_constant, aggregation)",
        ),
        (
            "what was rejected keeps its weight",
            "torch.where(weighted, per_response",
            "torch.where(response_mask, per_response",
        ),
        ("float32", "tokens = counted.sum(dim=1).to(torch.float64)", "tokens = counted.sum(dim=1).to(torch.float32)"),
    ),
    *breaks(
        "_select_tokens",
        "losses/aggregation.py",
        WEIGHTS,
        (
            "what was rejected always counts",
            'response_mask if rejected_tokens == "count" else weighted',
            "response_mask",
        ),
        ("what was rejected never counts", 'response_mask if rejected_tokens == "count" else weighted', "weighted"),
        (
            "count and drop swapped",
            'response_mask if rejected_tokens == "count"',
            'response_mask if rejected_tokens == "drop"',
        ),
        ("kept padding carries loss", "weighted = response_mask & kept", "weighted = kept.expand_as(response_mask)"),
        ("nothing is rejected", "weighted = response_mask & kept", "weighted = response_mask"),
    ),
    *breaks(
        "_count_parts",
        "losses/aggregation.py",
        WEIGHTS,
        (
            "empty ones always count",
            'torch.ones_like(tokens) if empty == "count" else (tokens > 0).to(tokens)',
            "torch.ones_like(tokens)",
        ),
        (
            "empty ones never count",
            'torch.ones_like(tokens) if empty == "count" else (tokens > 0).to(tokens)',
            "(tokens > 0).to(tokens)",
        ),
        ("count and drop swapped", 'if empty == "count" else', 'if empty == "drop" else'),
        ("tokens counted", "else (tokens > 0).to(tokens)", "else tokens"),
        ("a single token is none", "(tokens > 0)", "(tokens > 1)"),
    ),
    *breaks(
        "compute_sequence_weights",
        "losses/aggregation.py",
        f"{FAMILY} -k 'weights_by_definition and sequence'",
        (
            "by length",
            "1 / responses, 0.0)",
            "counted.sum(dim=1, keepdim=True) / (responses * counted.sum().clamp(min=1)), 0.0)",
        ),
        (
            "a weight for nothing",
            "torch.where(weighted.any(dim=1, keepdim=True), 1",
            "torch.where(torch.ones_like(weighted[:, :1]), 1",
        ),
        (
            "one token rejected, all rejected",
            "weighted.any(dim=1, keepdim=True), 1",
            "(weighted == response_mask).all(dim=1, keepdim=True), 1",
        ),
        ("padded responses have none", "weighted.any(dim=1, keepdim=True), 1", "weighted.all(dim=1, keepdim=True), 1"),
        (
            "what was rejected counts",
            "_count_parts(counted.sum(dim=1).to(torch.float64), ",
            "_count_parts(response_mask.sum(dim=1).to(torch.float64), ",
        ),
        (
            "a mean of those that are left",
            "1 / responses, 0.0)",
            "1 / weighted.any(dim=1).sum().double().clamp(min=1), 0.0)",
        ),
        ("a sum", "1 / responses, 0.0)", "1.0, 0.0).double()"),
    ),
    *breaks(
        "sum_weighted_losses",
        "losses/aggregation.py",
        # The sum does not ask whose losses it adds up: one member of the family is enough.
        f"{ERRORS} {CORRECTIONS} {FAMILY} {TRACED} -k 'test_errors or without_weight or compute_naive or garbage'",
        ("NaN times 0", ".masked_fill_(weights == 0, 0.0)", ""),
        (
            "a mean",
            "attach_gradient(weighted, slope, losses).sum()",
            "attach_gradient(weighted, slope, losses).mean()",
        ),
        ("a weighted mean", "losses).sum()\n", "losses).sum() / weights.sum().clamp(min=1e-9)\n"),
        ("a slope of 1", "attach_gradient(weighted, slope, losses)", "attach_gradient(weighted, None, losses)"),
        ("the precision of the weights", "slope = weights.to(losses.dtype)", "slope = weights"),
        ("traced: NaN times 0", "torch.where(weights == 0, 0.0, losses) *", "losses *"),
        ("traced: a mean", "losses.dtype)).sum()", "losses.dtype)).mean()"),
        ("traced: weights carry gradient", "weights.detach().to(", "weights.to("),
        ("any shape that fits", "if losses.shape != weights.shape:", "if losses.shape[0] != weights.shape[0]:"),
    ),
    *breaks(
        "aggregate_token_losses",
        "losses/aggregation.py",
        f"{ERRORS} {EXAMPLES} {ORACLE} -k 'test_errors and constant or aggregation'",
        (
            "mean over tokens",
            "return 1 / (responses * tokens.clamp(min=1))",
            "return torch.ones_like(tokens) / tokens.sum().clamp(min=1)",
        ),
        (
            "sum over sequences",
            "/ (responses * _check_normalize_constant(normalize_constant, aggregation))",
            "/ _check_normalize_constant(normalize_constant, aggregation)",
        ),
        (
            "the constant forgotten",
            "_compute_weight_per_token(response_mask, aggregation, normalize_constant,",
            "_compute_weight_per_token(response_mask, aggregation, normalize_constant and 1.0,",
        ),
        (
            "token_mean of the micro-batch",
            '    if aggregation == "token_mean":\n'
            "        _check_normalize_constant(normalize_constant, aggregation)\n",
            "",
        ),
        (
            "always sequence_mean",
            "_compute_weight_per_token(response_mask, aggregation,",
            '_compute_weight_per_token(response_mask, "sequence_mean",',
        ),
    ),
]

STEP = [
    *breaks(
        "compose_policy_loss",
        "losses/steps.py",
        COMPOSE,
        ("importance carries gradient", "importance_weights.detach().to", "importance_weights.to"),
        (
            "importance for its mean",
            "importance_weights.detach().to(policy_losses.dtype)",
            "(importance_weights / importance_weights.mean()).detach()",
        ),
        (
            "importance forgotten",
            "policy_losses = importance_weights.detach().to(policy_losses.dtype) * policy_losses",
            "pass",
        ),
        (
            "entropy is a cost",
            '("token_entropy", -entropy_coef, token_entropy)',
            '("token_entropy", entropy_coef, token_entropy)',
        ),
        ("divergence is a bonus", '(("kl", kl_coef, kl)', '(("kl", -kl_coef, kl)'),
        ("the coefficients forgotten", "coefficient * sum_weighted_losses(values", "sum_weighted_losses(values"),
        (
            "KL and entropy weighed by importance",
            "coefficient * sum_weighted_losses(values, token_weights)",
            "coefficient * sum_weighted_losses("
            "values if importance_weights is None else values * importance_weights.detach(), token_weights)",
        ),
        ("what costs nothing is read", "if values is not None and coefficient != 0:", "if values is not None:"),
        ("the last term alone", "loss = loss + coefficient", "loss = loss * 0 + coefficient"),
        ("costs alone, no bonus", "coefficient != 0:", "coefficient > 0:"),
        ("imitation is avoided", "loss + nll_coef * sum", "loss - nll_coef * sum"),
        (
            "imitation of all tokens",
            "sum_weighted_losses(nll, nll_weights)",
            "sum_weighted_losses(nll, token_weights)",
        ),
    ),
    *breaks(
        "grpo_microbatch_loss",
        "losses/steps.py",
        STEPS,
        ("not divided by the accumulation", "return loss / shares", "return loss"),
        ("token_mean divided too", '1 if aggregation == "token_mean" else gradient', "gradient"),
        ("padding is read", "cliprange, response_mask=response_mask", "cliprange, response_mask=None"),
        ("losses of tokens doubled", "(\n        token_losses,\n", "(\n        2 * token_losses,\n"),
        (
            "the metrics know no old policy",
            "describe_policy_update(policy_log_probs, response_mask, flags, old_log_probs)",
            "describe_policy_update(policy_log_probs, response_mask, flags)",
        ),
    ),
    *breaks(
        "describe_policy_update",
        "losses/steps.py",
        f"{CORRECTIONS} -k describe_policy_update",
        (
            "metrics carry gradient",
            "        with torch.no_grad():\n            log_ratio",
            "        if True:\n            log_ratio",
        ),
        ("KL the other way", "growth.sub_(log_ratio)", "(-log_ratio).expm1_().add_(log_ratio)"),
        (
            "a share of padding too",
            "(flag & response_mask).sum() / counted",
            "flag.expand(response_mask.shape).sum() / counted",
        ),
        ("padding has a ratio of 1", "(growth.sum() + tokens) / counted", "(growth.sum() + growth.numel()) / counted"),
        ("the ratio less 1", "(growth.sum() + tokens) / counted", "growth.sum() / counted"),
        ("nothing over nothing", "counted = tokens.clamp(min=1)", "counted = tokens"),
        (
            "the log ratio is not held",
            "clamp_log_ratio(policy_log_probs - old_log_probs)",
            "(policy_log_probs - old_log_probs)",
        ),
    ),
    *breaks(
        "grpo_microbatch_train_step",
        "losses/steps.py",
        STEPS,
        ("no backward", f"{GRPO_CALL}    loss.backward()", GRPO_CALL),
        ("backward twice", f"{GRPO_CALL}    loss.backward()", f"{GRPO_CALL}    (2 * loss).backward()"),
        (
            "the loss with its graph",
            f"{GRPO_CALL}    loss.backward()",
            f"{GRPO_CALL}    loss.backward()\n    return loss, metadata",
        ),
        (
            "sequence_mean, whatever is asked",
            f"        aggregation=aggregation,\n{GRPO_CALL}    loss",
            f"{GRPO_CALL}    loss",
        ),
        (
            "rewards for advantages",
            "        loss_type,\n        raw_rewards,\n        advantages,\n",
            "        loss_type,\n        raw_rewards,\n        raw_rewards,\n",
        ),
    ),
    *breaks(
        "sft_microbatch_loss",
        "losses/steps.py",
        SFT,
        ("climbs", "losses = compute_cross_entropy_loss(", "losses = -compute_cross_entropy_loss("),
        ("not divided", "return loss / gradient_accumulation_steps", "return loss"),
        ("divided twice", "/ gradient_accumulation_steps, {", "/ gradient_accumulation_steps**2, {"),
        (
            "the constant forgotten",
            '"constant", normalize_constant=normalize_constant)',
            '"constant", normalize_constant=1.0)',
        ),
        (
            "a mean over tokens",
            '"constant", normalize_constant=normalize_constant)',
            '"token_mean", normalize_constant=normalize_constant)',
        ),
    ),
    *breaks(
        "sft_microbatch_train_step",
        "losses/steps.py",
        SFT,
        ("no backward", f"{SFT_CALL}    loss.backward()", SFT_CALL),
        ("backward twice", f"{SFT_CALL}    loss.backward()", f"{SFT_CALL}    (2 * loss).backward()"),
        (
            "the loss with its graph",
            f"{SFT_CALL}    loss.backward()",
            f"{SFT_CALL}    loss.backward()\n    return loss, metadata",
        ),
        ("the constant forgotten", SFT_CALL, "response_mask, gradient_accumulation_steps\n    )\n"),
        ("not divided", SFT_CALL, "response_mask, 1, normalize_constant\n    )\n"),
    ),
]

MUTANTS = [*AGGREGATION, *STEP]

"""Masked means, distributions and group rows."""

from tests.mutants.table import breaks

ORACLE = "tests/oracle/test_oracle.py"
MASKING = "tests/unit/test_worked_examples.py tests/parity/test_conventions.py tests/unit/test_errors.py"
MASKING += " tests/property/test_masking.py -k 'mask or mean_over_nothing or test_errors and divides'"
DISTRIBUTIONS = (
    f"tests/unit/test_errors.py tests/unit/test_worked_examples.py tests/property/test_distributions.py {ORACLE}"
)
DISTRIBUTIONS += " -k 'entropy or distributions or log_probs or temperature or labels'"
SCORING = f"tests/unit/test_worked_examples.py tests/property/test_scoring.py {ORACLE} -k 'scor or a_model'"
GROUP_ROWS = "tests/property/test_group_rows.py"

MUTANTS = [
    *breaks(
        "explain_type_error",
        "_type_errors.py",
        "tests/unit/test_errors.py -k 'invalid_type or numpy or own_function'",
        ("each function is this one", ' or f"{fn.__module__}.{fn.__qualname__}." not in message:', ":"),
        (
            "the size of an axis is not known",
            "known = int(axis) if axis.isdigit() else axes.get(axis, size)",
            "known = size",
        ),
        ("any kind of number", 'if tensor.__name__.partition("[")[0] != kind or', "if"),
        ("a broadcast axis is an axis", ' and not (size == 1 and word.startswith("#")):', ":"),
        ("integers of NumPy are objects", "        return int(value)\n", "        return value\n"),
        (
            "a list of them too",
            "        return [to_plain_number(member) for member in value]\n",
            "        return value\n",
        ),
    ),
    *breaks(
        "shape_checked",
        "_checks.py",
        "tests/unit/test_errors.py -k 'invalid_type or full_message'",
        ("sixty lines above", "raise TypeCheckError(message) from None", "raise TypeCheckError(message) from error"),
        ("jaxtyping's own words", "            if message is None:\n", "            if True:\n"),
        ("no near name", "near = get_close_matches(value, choices, n=1)", "near: list[str] = []"),
    ),
    *breaks(
        "masked_sum",
        "masking.py",
        MASKING,
        ("mask multiplied", "torch.where(mask, tensor, 0.0)", "tensor * mask"),
        ("every NaN hidden", "torch.where(mask, tensor, 0.0)", "torch.nan_to_num(tensor) * mask"),
        ("mask upside down", "torch.where(mask, tensor, 0.0)", "torch.where(mask, 0.0, tensor)"),
        ("all dimensions", "kept.sum() if dim is None else kept.sum(dim)", "kept.sum()"),
        ("a mean", "kept.sum() if dim is None else kept.sum(dim)", "kept.mean() if dim is None else kept.mean(dim)"),
    ),
    *breaks(
        "masked_mean",
        "masking.py",
        MASKING,
        ("nothing gives 0", "masked_sum(tensor, mask, dim) / count", "masked_sum(tensor, mask, dim) / count.clamp(1)"),
        (
            "over all entries",
            "mask.sum() if dim is None else mask.sum(dim)",
            "mask.numel() if dim is None else mask.shape[dim]",
        ),
        ("one count for all slices", "mask.sum() if dim is None else mask.sum(dim)", "mask.sum()"),
        ("one entry fewer", "masked_sum(tensor, mask, dim) / count", "masked_sum(tensor, mask, dim) / (count - 1)"),
        ("all dimensions", "masked_sum(tensor, mask, dim) / count", "masked_sum(tensor, mask) / mask.sum()"),
    ),
    *breaks(
        "masked_normalize",
        "masking.py",
        MASKING,
        ("upside down", "dim) / normalize_constant", "dim) * normalize_constant"),
        ("the constant forgotten", "dim) / normalize_constant", "dim)"),
        ("a mean too", "dim) / normalize_constant", "dim) / normalize_constant / mask.sum()"),
        (
            "all dimensions",
            "masked_sum(tensor, mask, dim) / normalize_constant",
            "masked_sum(tensor, mask) / normalize_constant",
        ),
        ("divided by 0", "if normalize_constant == 0 or not math", "if not math"),
    ),
    *breaks(
        "compute_entropy",
        "scoring/_softmax_stats.py",
        DISTRIBUTIONS,
        ("sign of the mean", "log_sum - weighted_sum.div_(exp_sum)", "log_sum + weighted_sum.div_(exp_sum)"),
        ("0 times infinity", "shifted.clamp_(min=_MIN_LOG_PROB)", "shifted"),
        ("0 times infinity in the slope", "log_p.clamp_(min=_MIN_LOG_PROB).add_", "log_p.add_"),
        ("no shift", "torch.sub(z, max_logit[rows], out=shifted)", "shifted.copy_(z)"),
        ("half precision stays half", "torch.promote_types(logits.dtype, torch.float32)", "logits.dtype"),
        ("no temperature", "out if scaling.temperature == 1 else out.div_(scaling.temperature)", "out"),
        ("temperature upside down", "out.div_(scaling.temperature)", "out.mul_(scaling.temperature)"),
        ("the slope of another distribution", "return self.max_logit + self.exp_sum.log()", "return self.max_logit"),
        (
            "one tile",
            "    for tile in split_range(rows, max(1, size)):",
            "    for tile in split_range(min(rows, size), max(1, size)):",
        ),
    ),
    *breaks(
        "compute_collision_probs",
        "scoring/distributions.py",
        "tests/property/test_token_baseline.py -k collision",
        (
            "the token's own square",
            "(2 * log_probs.detach() - sharpened_log_probs.detach())",
            "(2 * log_probs.detach())",
        ),
        ("not squared", "(2 * log_probs.detach()", "(log_probs.detach()"),
        ("the sign", "- sharpened_log_probs.detach())", "+ sharpened_log_probs.detach())"),
        ("a gradient", "(2 * log_probs.detach()", "(2 * log_probs"),
        ("above 1", ".exp().clamp(max=1.0)", ".exp()"),
    ),
    *breaks(
        "compute_entropy",
        "scoring/distributions.py",
        DISTRIBUTIONS,
        ("sign of the second term", "entropy = normalizer - (z", "entropy = normalizer + (z"),
        ("0 times infinity", "torch.where(z == -math.inf, 0.0, z)", "z"),
        ("no shift", "z = z - z.amax(dim=-1, keepdim=True).detach()", "pass"),
        (
            "probabilities carry no gradient",
            "(z.softmax(dim=-1) * reachable)",
            "(z.softmax(dim=-1).detach() * reachable)",
        ),
        (
            "temperature upside down",
            "logits.to(get_wide_dtype(logits)) / temperature",
            "logits.to(get_wide_dtype(logits)) * temperature",
        ),
        ("softmax over the batch", "z.softmax(dim=-1)", "z.softmax(dim=0)"),
        (
            "an entropy without a slope",
            "stats, grad = SoftmaxStats(*columns), ",
            "stats, grad = SoftmaxStats(*columns)._replace(entropy=columns[1] * 0), ",
        ),
    ),
    *breaks(
        "select_log_probs",
        "scoring/distributions.py",
        DISTRIBUTIONS,
        ("logits, not normalized", ".squeeze(-1) - normalizer", ".squeeze(-1)"),
        ("the normalizer carries no gradient", ".squeeze(-1) - normalizer", ".squeeze(-1) - normalizer.detach()"),
        ("against the likeliest token", ".squeeze(-1) - normalizer", ".squeeze(-1)"),
        (
            "another label",
            "labels.long().unsqueeze(-1)",
            "(labels.long() + 1).remainder(logits.shape[-1]).unsqueeze(-1)",
        ),
        ("any temperature", "if not 0 < temperature < math.inf:", "if False:"),
    ),
    *breaks(
        "select_log_probs",
        "scoring/_softmax_stats.py",
        DISTRIBUTIONS,
        ("logits, not normalized", "log_probs.sub_(log_sum)", "log_probs"),
        (
            "the first label",
            "shifted.gather(1, labels[rows, None])",
            "shifted.gather(1, labels[:1, None].expand(len(z), 1))",
        ),
        (
            "no pull on the label",
            "gradient if labels is None else gradient.scatter_add_(1, labels[:, None], label_grad)",
            "gradient",
        ),
        (
            "the wrong sign",
            "gradient = p.mul_(-label_grad)",
            "gradient = p.mul_(label_grad)",
        ),
        ("the same temperature for all", "scaled_grad = grad.divide(temperature)", "scaled_grad = grad"),
    ),
    *breaks(
        "get_response_log_probs",
        "scoring/response_log_probs.py",
        SCORING,
        (
            "log-probs at another temperature",
            "compute_log_probs_and_entropy(logits, labels, temperature, return_token_entropy)",
            "compute_log_probs_and_entropy(logits, labels, 1.0, return_token_entropy)",
        ),
        ("entropy never carries gradient", "entropy.detach() if detach_entropy else entropy", "entropy.detach()"),
        ("entropy always carries gradient", "entropy.detach() if detach_entropy else entropy", "entropy"),
        ("columns that every row needs", "response_mask.any(dim=0)", "response_mask.all(dim=0)"),
        ("scores of other labels too", "torch.where(mask, values, 0.0))", "values)"),
        ("labels outside the mask are read", "torch.where(kept, labels[:, columns], 0)", "labels[:, columns]"),
        (
            "every column",
            "logits = compute_logits_at(model, input_ids, columns)",
            "logits = compute_logits_at(model, input_ids, None)[:, columns]",
        ),
    ),
    *breaks(
        "pack_group_rows",
        "scoring/group_rows.py",
        GROUP_ROWS,
        ("positions run on", "(range(len(prompt), len(prompt) +", "(range(len(row.ids), len(row.ids) +"),
        ("a first token predicted by its neighbor", "[len(prompt) - 1, *range", "[len(row.ids) - 1, *range"),
        ("sources of another row", "k * width + column for k", "column for k"),
        ("an empty response takes a place", "        if response:\n", "        if True:\n"),
        ("responses share a segment", "([number] * len", "([1] * len"),
        ("padding is prompt", "_PADDING = -1", "_PADDING = 0"),
        ("rows may be missing", "len(prompt_token_ids) == len(response_token_ids),", "True,"),
    ),
    *breaks(
        "mask_group_rows",
        "scoring/group_rows.py",
        GROUP_ROWS,
        ("responses see each other", "(key == query) | (key == 0)", "(key <= query) | (key == 0)"),
        ("the prompt is hidden", "((key == query) | (key == 0))", "(key == query)"),
        ("the future is seen", " & (position[:, None] >= position[None, :])", ""),
        ("nobody sees himself", "position[:, None] >= position", "position[:, None] > position"),
        (
            "keys and queries exchanged",
            "query, key = ",
            "key, query = ",
        ),
        ("the prompt sees responses", "(key == 0)", "(query == 0) | (key == 0)"),
    ),
    *breaks(
        "get_group_log_probs",
        "scoring/group_rows.py",
        GROUP_ROWS,
        ("mask not handed on", "attention_mask=attention_mask, ", ""),
        (
            "temperature forgotten",
            "return_token_entropy, temperature, detach_entropy",
            "return_token_entropy, 1.0, detach_entropy",
        ),
        ("positions not handed on", ', position_ids=rows["position_ids"]', ""),
        ("the wrong half is hidden", "masked_fill(~visible", "masked_fill(visible"),
        ("padding is NaN", "values.new_zeros(response_mask.shape)", "values.new_full(response_mask.shape, torch.nan)"),
    ),
]

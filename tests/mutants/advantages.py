"""From rewards to advantages: _groups.py, advantages/, and pass@k."""

from tests.mutants.table import breaks

ESTIMATORS, CORRECTIONS = "tests/property/test_estimators.py", "tests/property/test_corrections.py"
ERRORS, ORACLE = "tests/unit/test_errors.py", "tests/oracle/test_oracle.py"
NORMALIZE = "tests/unit/test_worked_examples.py tests/parity/test_conventions.py tests/property/test_advantages.py"
NORMALIZE += f" {ESTIMATORS} -k 'group or normalize or test_advantages'"


def of(*words: str) -> str:
    return f"{ESTIMATORS} -k '{' or '.join(words)}'"


GROUPS = breaks(
    "_groups",
    "_groups.py",
    f"tests/unit/test_errors.py tests/unit/test_worked_examples.py tests/property/test_advantages.py {ESTIMATORS}",
    ("members interleaved", "padded[present] = wide", "padded.T[present.T] = wide"),
    ("rewards carry gradient", "rewards.detach().to(torch.float64)", "rewards.to(torch.float64)"),
    ("infinite rewards count", "scored = padded.isfinite()", "scored = ~padded.isnan()"),
    ("half precision stays half", "torch.promote_types(rewards.dtype, torch.float32)", "rewards.dtype"),
    ("float64 is given back as float32", "torch.promote_types(rewards.dtype, torch.float32)", "torch.float32"),
    (
        "what was not scored counts",
        "self.scored.sum(dim=1, keepdim=True).to",
        "self.present.sum(dim=1, keepdim=True).to",
    ),
    (
        "mean over padding",
        "self.rewards.sum(dim=1, keepdim=True) / self.n_scored.clamp(min=1)",
        "self.rewards.mean(dim=1, keepdim=True)",
    ),
    (
        "mean of the batch",
        "self.rewards.sum(dim=1, keepdim=True) / self.n_scored.clamp(min=1)",
        "self.rewards.sum() / self.n_scored.sum().clamp(min=1)",
    ),
    ("deviation of padding", "torch.where(self.scored, self.rewards - self.mean, 0.0)", "(self.rewards - self.mean)"),
    ("always unbiased", "(self.n_scored - correction).clamp(min=1)", "(self.n_scored - 1).clamp(min=1)"),
    ("always biased", "(self.n_scored - correction).clamp(min=1)", "self.n_scored.clamp(min=1)"),
    (
        "one pass: squares whose difference has no digits left",
        "torch.where(self.scored, self.rewards - self.mean, 0.0).square().sum(dim=1, keepdim=True)",
        "(self.rewards.square().sum(dim=1, keepdim=True) - self.n_scored * self.mean.square()).clamp(min=0)",
    ),
    (
        "signal decided by the deviation",
        "return high - low > RELATIVE_NOISE * self.rewards.abs().amax(dim=1, keepdim=True)",
        "return self.std(1) > 0",
    ),
    ("signal decided by equality", "RELATIVE_NOISE = 1e-6", "RELATIVE_NOISE = 0.0"),
    ("noise in units of reward", "RELATIVE_NOISE * self.rewards.abs().amax(dim=1, keepdim=True)", "RELATIVE_NOISE"),
    ("a group of zeros has signal", "return high - low > ", "return high - low >= "),
    (
        "padding lowers the minimum",
        "torch.where(self.scored, self.rewards, torch.inf).amin(dim=1, keepdim=True)",
        "self.rewards.amin(dim=1, keepdim=True)",
    ),
    ("an advantage for what was not scored", "torch.where(self.scored, values, 0.0)[self", "values[self"),
    ("always float64", "[self.present].to(self.dtype)", "[self.present]"),
    (
        "silent groups speak",
        "self.flatten_scored(torch.where(self.has_signal, values, 0.0))",
        "self.flatten_scored(values)",
    ),
    (
        "sizes need not fill the batch",
        "min(sizes, default=1) < 1 or sum(sizes) != rollouts",
        "min(sizes, default=1) < 1",
    ),
    ("the last group may be smaller", "if group_sizes < 1 or rollouts % group_sizes:", "if group_sizes < 1:"),
)

ADVANTAGES = [
    *breaks(
        "normalize_group_rewards",
        "advantages/estimators.py",
        NORMALIZE,
        (
            "epsilon inside the root",
            "(groups.std(correction) + advantage_eps)",
            "(groups.std(correction).square() + advantage_eps).sqrt()",
        ),
        (
            "epsilon as a floor",
            "(groups.std(correction) + advantage_eps)",
            "groups.std(correction).clamp(min=advantage_eps)",
        ),
        ("biased deviation", "groups.std(correction) + ", "groups.std(0) + "),
        ("not centered", "    advantages = groups.rewards - groups.mean\n", "    advantages = groups.rewards\n"),
        (
            "mean of the batch",
            "    advantages = groups.rewards - groups.mean\n",
            "    advantages = groups.rewards - groups.rewards[groups.scored].mean()\n",
        ),
        ("always divided", "    if normalize_by_std:\n", "    if normalize_by_std or correction:\n"),
        (
            "constant decided by the deviation",
            "groups.flatten_with_signal(advantages)",
            "groups.flatten_scored(torch.where(groups.std(1) == 0, 0.0, advantages))",
        ),
        ("no group of one, divided or not", "if normalize_by_std and 1 in sizes:", "if 1 in sizes:"),
    ),
    *breaks(
        "compute_leave_one_out_advantages",
        "advantages/estimators.py",
        of("leave_one_out"),
        ("the own reward among the others", "keepdim=True) - groups.rewards\n", "keepdim=True)\n"),
        (
            "divided by the size of the group",
            "others / (groups.n_scored - 1).clamp(min=1)",
            "others / groups.n_scored.clamp(min=1)",
        ),
        (
            "its factor upside down",
            "groups.rewards - others / (groups.n_scored - 1).clamp(min=1)",
            "(groups.rewards - groups.mean) * (groups.n_scored - 1) / groups.n_scored.clamp(min=1)",
        ),
        (
            "padding among the others",
            "others / (groups.n_scored - 1).clamp(min=1)",
            "others / max(1, groups.rewards.shape[1] - 1)",
        ),
        (
            "the others of the whole batch",
            "others = groups.rewards.sum(dim=1, keepdim=True) - ",
            "others = groups.rewards.sum() - ",
        ),
        (
            "rounding for a signal",
            "groups.flatten_with_signal(groups.rewards - others",
            "groups.flatten_scored(groups.rewards - others",
        ),
    ),
    *breaks(
        "compute_batch_std_advantages",
        "advantages/estimators.py",
        of("batch_std"),
        (
            "deviation of the centered rewards",
            "everything = groups.rewards[groups.scored]",
            "everything = (groups.rewards - groups.mean)[groups.scored]",
        ),
        ("biased deviation", "everything.std()", "everything.std(correction=0)"),
        ("deviation of the group", "(spread + advantage_eps)", "(groups.std(1) + advantage_eps)"),
        (
            "mean of the batch",
            "(groups.rewards - groups.mean) / (spread",
            "(groups.rewards - everything.mean()) / (spread",
        ),
        (
            "deviation of padding",
            "everything = groups.rewards[groups.scored]",
            "everything = groups.rewards.flatten()",
        ),
        ("epsilon inside the root", "(spread + advantage_eps)", "(spread.square() + advantage_eps).sqrt()"),
        (
            "silent groups left out of the deviation",
            "everything = groups.rewards[groups.scored]",
            "everything = groups.rewards[groups.scored & groups.has_signal]",
        ),
    ),
    *breaks(
        "compute_gdpo_advantages",
        "advantages/estimators.py",
        of("gdpo"),
        ("weights forgotten", "[w * column.double()", "[column.double()"),
        (
            "one scale drowns another",
            "normalize_group_rewards(column, group_sizes, advantage_eps=advantage_eps)",
            "normalize_group_rewards(column, group_sizes, normalize_by_std=False)",
        ),
        ("no second normalization", "white = _whiten(total, scored, advantage_eps, correction=1)", "white = total"),
        ("biased deviation", "scored, advantage_eps, correction=1)", "scored, advantage_eps, correction=0)"),
        ("one reward missing, all missing", "rewards.isfinite().any(dim=1)", "rewards.isfinite().all(dim=1)"),
        ("what was not scored counts", "rewards.isfinite().any(dim=1)", "torch.ones_like(total, dtype=torch.bool)"),
        ("epsilon of the second division alone", "group_sizes, advantage_eps=advantage_eps) for", "group_sizes) for"),
        ("mean of the rewards", "strict=True)]).sum(dim=0)", "strict=True)]).mean(dim=0)"),
        ("silent groups get the rounding of the mean", "torch.where(total == 0, 0.0, white)", "white"),
    ),
    *breaks(
        "compute_otb_advantages",
        "advantages/token_baseline.py",
        "tests/property/test_token_baseline.py",
        ("the gradient of the token alone", ".clamp(min=0).cumsum(dim=1)", ".clamp(min=0)"),
        ("the sign of a probability", "1 - 2 * log_probs", "1 + 2 * log_probs"),
        ("no sum of squares", " + collision_probs.detach().double()", ""),
        (
            "sums over the batch",
            "index_add_(0, group_of, values)[group_of]",
            "index_add_(0, group_of * 0, values)[group_of * 0]",
        ),
        ("what was not scored weighs", "(groups.scored & groups.has_signal)", "(groups.present & groups.has_signal)"),
        ("groups without signal", "(groups.scored & groups.has_signal)", "groups.scored"),
        ("ended responses keep their weight", ".cumsum(dim=1) * mask", ".cumsum(dim=1)"),
        ("a lone token is compared with nothing", " & (sum_group(mask.double()) > 1)", ""),
        ("certain policies get the reward", "(total > 0) & (sum_group", "(sum_group"),
    ),
    *breaks(
        "compute_opo_advantages",
        "advantages/estimators.py",
        of("compute_opo"),
        (
            "lengths forgotten",
            "(tokens * groups.rewards).sum(dim=1, keepdim=True) / total.clamp(min=1)",
            "groups.mean",
        ),
        ("tokens of what was not scored", "    tokens = torch.where(groups.scored, tokens, 0.0)\n", ""),
        ("short responses weigh more", "= lengths.to(tokens)", "= 1 / lengths.to(tokens).clamp(min=1)"),
        ("length of the batch", "total = tokens.sum(dim=1, keepdim=True)", "total = tokens.sum()"),
        (
            "nothing but empty responses: the raw reward",
            "torch.where(total > 0, groups.rewards - baseline, 0.0)",
            "groups.rewards - baseline",
        ),
        ("lengths of other responses", "tokens[groups.present] =", "tokens.T[groups.present.T] ="),
        ("an empty response weighs too", "= lengths.to(tokens)", "= lengths.to(tokens).clamp(min=1)"),
    ),
    *breaks(
        "compute_gpg_advantages",
        "advantages/estimators.py",
        of("gpg"),
        ("not scaled", "scale = groups.n_scored.sum() / with_signal.clamp(min=1)", "scale = 1.0"),
        (
            "scaled down",
            "groups.n_scored.sum() / with_signal.clamp(min=1)",
            "with_signal / groups.n_scored.sum().clamp(min=1)",
        ),
        (
            "groups counted and not responses",
            "groups.n_scored.sum() / with_signal.clamp(min=1)",
            "len(groups.rewards) / groups.has_signal.sum().clamp(min=1)",
        ),
        ("what was not scored counts", "groups.n_scored.sum() / with_signal", "groups.present.sum() / with_signal"),
        (
            "divided by the deviation",
            "scale * (groups.rewards - groups.mean)",
            "scale * (groups.rewards - groups.mean) / (groups.std(1) + 1e-6)",
        ),
        ("the silent ones counted", "groups.n_scored * groups.has_signal", "groups.n_scored * ~groups.has_signal"),
    ),
    *breaks(
        "compute_maxrl_advantages",
        "advantages/estimators.py",
        of("maxrl"),
        (
            "divided by the deviation",
            "(groups.rewards - mean) / mean",
            "(groups.rewards - mean) / groups.std(1).clamp(1e-6)",
        ),
        ("not centered", "(groups.rewards - mean) / mean", "groups.rewards / mean"),
        ("divided by the root", "(groups.rewards - mean) / mean", "(groups.rewards - mean) / mean.sqrt()"),
        ("an epsilon", "(groups.rewards - mean) / mean", "(groups.rewards - mean) / (mean + 1e-6)"),
        (
            "mean of the others",
            "(groups.rewards - mean) / mean",
            "(groups.rewards - mean) / (mean + (mean - groups.rewards) / (groups.n_scored - 1))",
        ),
        ("mean over padding", "groups.mean, 1.0)", "groups.rewards.mean(dim=1, keepdim=True), 1.0)"),
        ("a reward of 0 refused", "groups.rewards.min() < 0", "groups.rewards.min() <= 0"),
    ),
    *breaks(
        "compute_remax_advantages",
        "advantages/estimators.py",
        of("remax", "definition"),
        (
            "baseline of the samples",
            "difference = groups.rewards - baseline",
            "difference = groups.rewards - groups.mean",
        ),
        ("wrong way around", "difference = groups.rewards - baseline", "difference = baseline - groups.rewards"),
        (
            "silent groups, though the greedy response differs",
            "groups.flatten_scored(advantages.nan_to_num(0.0))",
            "groups.flatten_with_signal(advantages.nan_to_num(0.0))",
        ),
        (
            "rounding for a difference",
            "torch.where(difference.abs() > RELATIVE_NOISE * size, difference, 0.0)",
            "torch.where(size.isfinite(), difference, 0.0)",
        ),
        ("noise in units of reward", "difference.abs() > RELATIVE_NOISE * size", "difference.abs() > RELATIVE_NOISE"),
        (
            "a greedy response that was not scored got 0",
            "rearrange(greedy_rewards.detach().double(), ",
            "rearrange(greedy_rewards.detach().double().nan_to_num(0.0), ",
        ),
        ("greedy rewards carry gradient", "greedy_rewards.detach().double()", "greedy_rewards.double()"),
        (
            "divided by the deviation",
            "difference = groups.rewards - baseline",
            "difference = (groups.rewards - baseline) / (groups.std(1) + 1e-6)",
        ),
    ),
    *breaks(
        "whiten_over_tokens",
        "advantages/estimators.py",
        of("whiten"),
        (
            "each response counts once",
            "white = _whiten(wide, response_mask, advantage_eps, correction)",
            "white = _whiten(wide, response_mask.cumsum(1).eq(1) & response_mask, advantage_eps, correction)"
            " * response_mask.sum(dim=1, keepdim=True)",
        ),
        ("statistics over padding", "_whiten(wide, response_mask, ", "_whiten(wide, torch.ones_like(response_mask), "),
        ("always unbiased", "response_mask, advantage_eps, correction)", "response_mask, advantage_eps, 1)"),
        ("advantages carry gradient", "wide = advantages.detach().double()", "wide = advantages.double()"),
        (
            "spread over padding",
            "white.sum(dim=1, keepdim=True) / response_mask.sum(dim=1, keepdim=True).clamp(min=1)",
            "white.mean(dim=1, keepdim=True)",
        ),
        (
            "an empty response gets NaN",
            "/ response_mask.sum(dim=1, keepdim=True).clamp(min=1)",
            "/ response_mask.sum(dim=1, keepdim=True)",
        ),
    ),
    *breaks(
        "_whiten",
        "advantages/estimators.py",
        of("whiten", "gdpo"),
        ("not centered", "(values - kept.mean()) / (kept", "values / (kept"),
        ("mean over padding", "(values - kept.mean()) / (kept", "(values - values.mean()) / (kept"),
        (
            "epsilon inside the root",
            "(kept.std(correction=correction) + eps)",
            "(kept.var(correction=correction) + eps).sqrt()",
        ),
        ("deviation over padding", "kept.std(correction=correction)", "values.std(correction=correction)"),
        (
            "constant decided by the deviation",
            "kept.max() - kept.min() <= RELATIVE_NOISE * kept.abs().max()",
            "kept.std() == 0",
        ),
        (
            "mask multiplied",
            "torch.where(counted, (values - kept.mean()) / (kept.std(correction=correction) + eps), 0.0)",
            "(values - kept.mean()) / (kept.std(correction=correction) + eps) * counted",
        ),
    ),
]

GRADED = f"tests/unit/test_worked_examples.py {ORACLE} tests/property/test_advantages.py"
GRADED += " -k 'group or each_pair or every_score'"
REWARDS = [
    *breaks(
        "read_rewards",
        "advantages/reward_stats.py",
        f"{ERRORS} {ORACLE} tests/unit/test_worked_examples.py -k 'reward_fn or group_normalized or not_be_scored'",
        ("what could not be scored is 0", "        return math.nan\n", "        return 0.0\n"),
        ("a missing reward is not told", 'or "reward" not in score:', "or not score:"),
        ("anything goes", "    if not abs(reward) <= torch.finfo(torch.float32).max:", "    if False:"),
        (
            "NaN goes",
            "if not abs(reward) <= torch.finfo(torch.float32).max:",
            "if abs(reward) > torch.finfo(torch.float32).max:",
        ),
        ("what float64 holds goes", "torch.finfo(torch.float32).max", "torch.finfo(torch.float64).max"),
        ("float64", "enumerate(scores)], dtype=torch.float32)", "enumerate(scores)], dtype=torch.float64)"),
        ("the reward of the answer", 'float(score["reward"])', 'float(score.get("answer_reward", score["reward"]))'),
    ),
    *breaks(
        "describe_rewards",
        "advantages/reward_stats.py",
        GRADED,
        ("biased deviation", "correction=min(1, len(known) - 1)", "correction=0"),
        ("a single rollout has NaN", "known.std(correction=min(1, len(known) - 1))", "known.std()"),
        ("groups with signal", "(~groups.has_signal).float()", "groups.has_signal.float()"),
        ("a part that any score has", "if all(score.get(name) is not", "if any(score.get(name) is not"),
        (
            "parts summed",
            "sum(float(score[name]) for score in scored) / len(scored)",
            "sum(float(score[name]) for score in scored)",
        ),
        (
            "parts over all rollouts",
            "sum(float(score[name]) for score in scored) / len(scored)",
            "sum(float(score[name]) for score in scored) / len(scores)",
        ),
        ("what was not scored is 0", "known = rewards[~rewards.isnan()] if", "known = rewards.nan_to_num() if"),
        ("what was scored", "1 - len(scored) / len(scores)", "len(scored) / len(scores)"),
        ("nothing scored is 0", "else rewards[:1]  # a", "else rewards[:1].nan_to_num()  # a"),
        ("a number of groups", "has_signal).float().mean().item()", "has_signal).float().sum().item()"),
        ("the parts forgotten", '("format_reward", "answer_reward")\n', '("format_reward",)\n'),
    ),
    *breaks(
        "compute_group_normalized_rewards",
        "advantages/reward_stats.py",
        GRADED,
        ("truth and response swapped", "reward_fn(response, truth) for", "reward_fn(truth, response) for"),
        (
            "each response graded twice",
            "    rewards = read_rewards(scores)\n    advantages",
            "    rewards = read_rewards([*map(reward_fn, rollout_responses, repeated_ground_truths)])\n    advantages",
        ),
        (
            "epsilon forgotten",
            "rewards, group_size, advantage_eps=advantage_eps, normalize_by_std=normalize_by_std",
            "rewards, group_size, normalize_by_std=normalize_by_std",
        ),
        (
            "always divided",
            "rewards, group_size, advantage_eps=advantage_eps, normalize_by_std=normalize_by_std",
            "rewards, group_size, advantage_eps=advantage_eps",
        ),
        (
            "statistics of one group",
            "describe_rewards(scores, group_size)\n",
            "describe_rewards(scores, len(scores))\n",
        ),
        ("rewards first", "return advantages, rewards, describe", "return rewards, advantages, describe"),
        (
            "truths of other questions",
            "pairs = zip(rollout_responses, repeated_ground_truths, strict=True)",
            "pairs = zip(rollout_responses, repeated_ground_truths[::-1], strict=True)",
        ),
    ),
]

PASS_AT_K = [
    *breaks(
        "estimate_pass_at_k",
        "evaluation.py",
        f"tests/unit/test_errors.py {CORRECTIONS} -k 'pass_at or test_errors and between'",
        (
            "drawn with replacement",
            "(math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k) for",
            "1 - (1 - c / n) ** k for",
        ),
        (
            "one wrong response too few",
            "math.comb(n - c, k)) / math.comb(n, k) for",
            "math.comb(max(0, n - c - 1), k)) / math.comb(n, k) for",
        ),
        (
            "all of k right",
            "(math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k) for",
            "math.comb(c, k) / math.comb(n, k) for",
        ),
        (
            "float32",
            "strict=True)]\n    return torch.tensor(values, dtype=torch.float64)",
            "strict=True)]\n    return torch.tensor(values)",
        ),
        ("the samples of the first question", "else n_samples.tolist()", "else [int(n_samples[0])] * len(right)"),
        ("k of the samples may be missing", "1 <= k <= min(samples, default=k), ", "1 <= k, "),
        (
            "rounded twice",
            "(math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k) for",
            "1 - math.comb(n - c, k) / math.comb(n, k) for",
        ),
        ("c / n whatever k is", "(math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k) for", "c / n for"),
    ),
    *breaks(
        "compute_best_of_advantages",
        "advantages/pass_at_k.py",
        of("best_of", "best"),
        (
            "baseline of the mean",
            "groups.rewards == best, best - second, 0.0",
            "groups.rewards == best, best - groups.mean, 0.0",
        ),
        (
            "padding takes part",
            "torch.where(groups.scored, groups.rewards, -torch.inf).sort",
            "groups.rewards.sort",
        ),
        (
            "two best, both with an advantage",
            "    second = ranked[:, 1:2] if ranked.shape[1] > 1 else best\n",
            "    second = torch.where(ranked < best, ranked, -torch.inf).amax(dim=1, keepdim=True)\n",
        ),
        ("the others pay for it", "best, best - second, 0.0)", "best, best - second, second - best)"),
        ("no baseline", "best, best - second, 0.0)", "best, best, 0.0)"),
        ("the worst is best", "descending=True", "descending=False"),
        (
            "rounding for a signal",
            "flatten_with_signal(torch.where(groups.rewards == best",
            "flatten_scored(torch.where(groups.rewards == best",
        ),
    ),
    *breaks(
        "compute_pass_at_k_advantages",
        "advantages/pass_at_k.py",
        of("pass_at"),
        (
            "subsets drawn with replacement",
            "(math.comb(n, k) - math.comb(wrong, k)) / math.comb(n, k)",
            "1 - (wrong / n) ** k",
        ),
        (
            "subsets that hold a response: one wrong too many",
            "math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)",
            "math.comb(wrong, k - 1) / math.comb(n - 1, k - 1)",
        ),
        (
            "subsets that hold a response: out of all responses",
            "math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)",
            "math.comb(wrong - 1, k - 1) / math.comb(n, k - 1)",
        ),
        ("divided by the variance", "math.sqrt(success * (1 - success))", "success * (1 - success)"),
        ("right and wrong swapped", "is_right = groups.rewards[row] == 1", "is_right = groups.rewards[row] == 0"),
        (
            "what was not scored is wrong",
            "groups.n_scored.flatten().int().tolist()",
            "groups.present.sum(dim=1).tolist()",
        ),
        ("float32", "groups.rewards.new_tensor(failing_with_it)", "failing_with_it"),
        (
            "every subset with a wrong response fails",
            "groups.rewards.new_tensor(failing_with_it)",
            "groups.rewards.new_tensor(1.0)",
        ),
        (
            "the bias away: subsets without the response for a baseline",
            "1 - success - torch.where",
            "math.comb(wrong, k) / math.comb(n - 1, k) - torch.where",
        ),
    ),
    *breaks(
        "compute_pkpo_advantages",
        "advantages/pass_at_k.py",
        of("pkpo"),
        ("the factor k forgotten", "[order]] = k * added", "[order]] = added"),
        ("subsets one too large", "math.comb(j, k - 2) / math.comb(n - 1", "math.comb(j, k - 1) / math.comb(n - 1"),
        ("subsets of all responses", "/ math.comb(n - 1, k - 1) for j", "/ math.comb(n, k - 1) for j"),
        ("the response beats itself", "values * (shares.cumsum(0) - shares)", "values * shares.cumsum(0)"),
        ("no baseline", " - ((shares * values).cumsum(0) - shares * values)", ""),
        ("sorted and not put back", "kept.nonzero().flatten()[order]", "kept.nonzero().flatten()"),
        ("k = 1: the own reward in the baseline", "(values.sum() - values) / max(1, n - 1)", "values.mean()"),
        ("largest first", "[kept].sort()", "[kept].sort(descending=True)"),
        ("what was not scored has 0", "enumerate(groups.scored)", "enumerate(groups.present)"),
    ),
]

MUTANTS = [*GROUPS, *ADVANTAGES, *REWARDS, *PASS_AT_K]

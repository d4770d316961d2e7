"""The parts of the training loop: drivers/training/."""

from tests.mutants.table import breaks

DRIVERS = "tests/drivers"
LOOP, FLAGS = f"{DRIVERS}/test_loop.py", f"{DRIVERS}/test_flags.py"
GRPO = f"{LOOP} -k 'not sft and not expert and not fine_tuning'"
OBJECTIVE, BATCH = f"{DRIVERS}/test_objective.py", f"{DRIVERS}/test_batch.py"
RESUME, GUARDS, SAMPLES = f"{DRIVERS}/test_resume.py", f"{DRIVERS}/test_guards.py", f"{DRIVERS}/test_samples.py"
RUN_FILES, GRADING = f"{DRIVERS}/test_run_files.py", f"{DRIVERS}/test_grading.py"

RUN = "drivers/training/run.py"
ROLLOUTS = "drivers/training/rollouts.py"
SHORTCUTS = "drivers/training/shortcuts.py"
MUTANTS = [
    *breaks(
        "Run.start",
        RUN,
        GRPO,
        (
            "the weights are not pushed",
            "run_with_engine(components.engine, partial(components.engine.load_weights, version=state.step))\n",
            "pass\n",
        ),
        ("the engine is not checked", "self.check_engine(components, version=state.step)", "pass"),
        (
            "no evaluation before the first step",
            "        if state.step == 0:\n            self.evaluate(components, step=0)\n",
            "",
        ),
    ),
    *breaks(
        "Run.discard_without_result",
        "drivers/training/run.py",
        "tests/drivers/test_one_line.py -k 'failed_start or sample'",
        ("a failed start stays", "distributed.is_rank_zero() and not has_result:", "False:"),
        ("each failed run goes", "distributed.is_rank_zero() and not has_result:", "True:"),
    ),
    *breaks(
        "Run.evaluate",
        RUN,
        GRPO,
        ("on the training set", "{first: components.val_set, **", "{first: components.train_set, **"),
        ("on some questions", "{first: components.val_set, **", "{first: components.val_set[:4], **"),
        ("on one set", "{first: components.val_set, **components.other_val_sets}", "{first: components.val_set}"),
        (
            "with other noise each time",
            "            seed=EVALUATION_SEED,\n",
            "            seed=EVALUATION_SEED + self.step,\n",
        ),
        (
            "with a group for each question",
            "            self.config.eval_sampling,\n",
            "            self.config.sampling,\n",
        ),
        ("all responses are logged", "[:: self.config.eval_samples][: self.config.n_logged_completions]", ""),
        ("responses to one question are logged", "rows[:: self.config.eval_samples]", "rows"),
        ("the last set decides", 'logged["accuracy"]\n', "[*results.values()][-1][0]['accuracy']\n"),
        ("metrics without their set", '{f"{name}/{key}": value for', "{key: value for"),
        ("completions without their set", '{"dataset": name, **row}', "row"),
        ("no rates of several responses", "if self.config.eval_samples > 1:", "if False:"),
    ),
    *breaks(
        "Run.check_engine",
        RUN,
        f"{LOOP} {FLAGS} -k 'check or engine or tolerance'",
        ("with the noise of evaluations", "seed=EVALUATION_SEED - 1", "seed=EVALUATION_SEED"),
        (
            "with training questions",
            "in components.val_set[:N_SELF_CHECK_PROMPTS]",
            "in components.train_set[:N_SELF_CHECK_PROMPTS]",
        ),
        (
            "the tolerance of the settings is ignored",
            "tolerance = self.config.self_check_tolerance\n",
            "tolerance = None\n",
        ),
        ("any difference is tolerated", "                tolerance=tolerance,\n", "                tolerance=1e30,\n"),
    ),
    *breaks(
        "Run.push_weights",
        RUN,
        GRPO,
        ("the version of the step before", "load_weights, version=step))", "load_weights, version=step - 1))"),
        (
            "not checked after the first update",
            "        if self.is_first_step(step):\n            self.check_engine",
            "        if False:\n            self.check_engine",
        ),
        (
            "checked after every update",
            "        if self.is_first_step(step):\n            self.check_engine",
            "        if True:\n            self.check_engine",
        ),
        (
            "checked after the second update",
            "return step == self._resumed_step + 1",
            "return step == self._resumed_step + 2",
        ),
    ),
    *breaks(
        "Run.steps",
        RUN,
        f"{LOOP} {DRIVERS}/test_train.py -k 'log or schedule'",
        (
            "one step too few",
            "range(self.step + 1, self.config.n_grpo_steps + 1)",
            "range(self.step + 1, self.config.n_grpo_steps)",
        ),
        (
            "one step too many",
            "range(self.step + 1, self.config.n_grpo_steps + 1)",
            "range(self.step + 1, self.config.n_grpo_steps + 2)",
        ),
        ("times add up over steps", "            self.timer.start_step()\n", ""),
        (
            "the last step is not evaluated",
            "return step % self.config.eval_steps == 0 or step == self.config.n_grpo_steps",
            "return step % self.config.eval_steps == 0",
        ),
        (
            "evaluated a step early",
            "return step % self.config.eval_steps == 0",
            "return (step + 1) % self.config.eval_steps == 0",
        ),
        (
            "the last step is not saved",
            "if self.step % self.config.checkpoint_steps == 0 or is_last:",
            "if self.step % self.config.checkpoint_steps == 0:",
        ),
    ),
    *breaks(
        "Run.report",
        RUN,
        GRPO,
        ("a learning rate of 0", '"learning_rate": self.config.learning_rate_at(step),', '"learning_rate": 0.0,'),
        (
            "the full learning rate",
            '"learning_rate": self.config.learning_rate_at(step),',
            '"learning_rate": self.config.learning_rate,',
        ),
        (
            "speed of the update over the sampling",
            'metrics["trained_tokens"] / seconds["update"]',
            'metrics["trained_tokens"] / seconds.get("rollout", 1.0)',
        ),
        (
            "speed of sampling in trained tokens",
            'metrics["sampled_tokens"] / seconds["rollout"]',
            'metrics["trained_tokens"] / (1 + seconds["rollout"])',
        ),
        ("no times", "            **times,\n", ""),
    ),
    *breaks(
        "Run.summary",
        RUN,
        GRPO,
        (
            "first and last exchanged",
            "accuracies[min(accuracies)], accuracies[max(accuracies)]",
            "accuracies[max(accuracies)], accuracies[min(accuracies)]",
        ),
        ("the best one", "accuracies[max(accuracies)]", "max(accuracies.values())"),
    ),
    *breaks(
        "Run.begin",
        RUN,
        f"{RESUME} -k 'run_begin or resume_after_stop'",
        (
            "nothing but tensors is restored",
            "                state.restore(read_state_values(self._checkpoint))\n",
            "",
        ),
        (
            "tensors are not restored",
            "                read_tensors(self._checkpoint / STATE_TENSORS, state.tensors())\n",
            "",
        ),
        (
            "the log starts over",
            "last_kept_step = -1 if self._checkpoint is None else self._resumed_step",
            "last_kept_step = -1",
        ),
        (
            "later lines are kept",
            "last_kept_step = -1 if self._checkpoint is None else self._resumed_step",
            "last_kept_step = self.config.n_grpo_steps",
        ),
    ),
    *breaks(
        "Run.log_samples",
        RUN,
        f"{SAMPLES} -k 'trained_values or token_advantages'",
        ("the last advantages", "advantages[: len(rows)].tolist()", "advantages[-len(rows) :].tolist()"),
        ("advantages in reverse", "advantages[: len(rows)].tolist()", "advantages[: len(rows)].flip(0).tolist()"),
    ),
    *breaks(
        "collect",
        ROLLOUTS,
        GRPO,
        (
            "all groups, kept or not",
            "completions, verdicts = flatten(groups.kept)",
            "completions, verdicts = flatten(groups.sampled)",
        ),
        (
            "the engine stays awake",
            "        components.engine.sleep()  # until",
            "        # until",
        ),
        (
            "sampling counts as grading",
            '    with timer.phase("rollout"):\n        prompts',
            '    with timer.phase("reward"):\n        prompts',
        ),
    ),
    *breaks(
        "collect",
        ROLLOUTS,
        GRPO,
        (
            "the length penalty is left out",
            "rewards, greedy_rewards = compute_rewards(config, completions, scores), None",
            "rewards, greedy_rewards = read_rewards(scores), None",
        ),
        (
            "all responses are logged",
            "n_rows, asked = config.n_logged_completions,",
            "n_rows, asked = len(completions),",
        ),
    ),
    *breaks(
        "describe_pass_at_k",
        ROLLOUTS,
        f"{LOOP} -k 'pass_at_k'",
        ("powers of two alone", "range(size.bit_length())} | {size}", "range(size.bit_length())}"),
        (
            "the first k only",
            "pass_at_k_of_questions(scored, k) for k",
            "pass_at_k_of_questions([scored[0]], k) for k",
        ),
        ("pass@1 is logged", "sorted(ks - {1})", "sorted(ks)"),
    ),
    *breaks(
        "sample_groups",
        ROLLOUTS,
        f"{LOOP} {DRIVERS}/test_pass_rates.py {OBJECTIVE} -k 'collect or steps_ask or curriculum or dynamic'",
        (
            "a question may be drawn twice",
            "draw.sample(candidates, min(n_wanted, len(candidates)))",
            "draw.choices(candidates, k=min(n_wanted, len(candidates)))",
        ),
        (
            "always the first questions",
            "draw.sample(candidates, min(n_wanted, len(candidates)))",
            "draw.sample(candidates[:n_wanted], min(n_wanted, len(candidates)))",
        ),
        ("refills with the noise of the first round", "questions, step, refill, timer)", "questions, step, 0, timer)"),
        ("one round too few", "range(config.max_refills + 1)", "range(max(1, config.max_refills))"),
    ),
    *breaks(
        "sample_round",
        ROLLOUTS,
        f"{LOOP} {SAMPLES} -k 'collect or steps_ask or trained_values or rewards'",
        ("another seed than the step's", "seed=sampling_seed(config, step, refill))", "seed=config.seed)"),
        (
            "graded with the questions in turn",
            "repeated = [question for question in questions for _ in range(size)]",
            "repeated = [question for _ in range(size) for question in questions]",
        ),
        ("verdicts of the first group for all", "verdicts[start : start + size])", "verdicts[:size])"),
        ("responses of the neighbors", "completions[start : start + size]", "completions[start : start + size][::-1]"),
    ),
    *breaks(
        "select_signal_groups",
        ROLLOUTS,
        f"{LOOP} -k collect",
        (
            "the groups without signal",
            "kept += compress(groups, has_signal)",
            "kept += compress(groups, [not one for one in has_signal])",
        ),
    ),
    *breaks(
        "sampling_seed",
        ROLLOUTS,
        f"{LOOP} -k 'seed'",
        ("the seed of the settings is ignored", "(config.seed << 32)", "(0 << 32)"),
        ("refills use seeds again", "step * (1 + config.max_refills) + refill", "step * (1 + config.max_refills)"),
        ("refills overlap the next steps", "step * (1 + config.max_refills) + refill", "step + refill"),
        ("rounds overlap", "n_rounds * config.rollout_batch_size", "n_rounds * config.group_size"),
    ),
    *breaks(
        "sample_greedy",
        ROLLOUTS,
        f"{LOOP} -k remax",
        (
            "sampled, not greedy",
            "replace(config.sampling, n=1, temperature=0.0, top_p=1.0)",
            "replace(config.sampling, n=1)",
        ),
        (
            "questions in reverse",
            "prompts = [question.prompt_token_ids for question in questions]\n            sampling",
            "prompts = [question.prompt_token_ids for question in questions[::-1]]\n            sampling",
        ),
        (
            "graded with the first question",
            "grade_completions(components.grade, greedy, questions)",
            "grade_completions(components.grade, greedy, questions[:1] * len(greedy))",
        ),
        ("not counted as sampled", "for completion in (*completions, *greedy)", "for completion in completions"),
    ),
    *breaks(
        "rollout_metrics",
        ROLLOUTS,
        GRPO,
        (
            "of the kept groups only",
            "completions, verdicts = flatten(groups.sampled)",
            "completions, verdicts = flatten(groups.kept)",
        ),
        (
            "grades of the kept groups only",
            "completions, verdicts = flatten(groups.sampled)",
            "completions, verdicts = flatten(groups.sampled)[0], flatten(groups.kept)[1]",
        ),
        ("staleness counted from the step", "step - 1 - fmean(known_versions)", "step - fmean(known_versions)"),
        (
            "number of rounds instead of refills",
            '"refills": float(groups.n_refills)',
            '"refills": float(groups.n_refills + 1)',
        ),
    ),
    *breaks(
        "curriculum_subset",
        ROLLOUTS,
        f"{DRIVERS}/test_pass_rates.py -k curriculum",
        ("all questions at once", "if step >= config.curriculum_steps:", "if True:"),
        (
            "the hardest first",
            "return train_set[: max(n_questions, config.n_prompts_per_rollout_batch)]",
            "return train_set[-max(n_questions, config.n_prompts_per_rollout_batch) :]",
        ),
        (
            "fewer questions than a step needs",
            "train_set[: max(n_questions, config.n_prompts_per_rollout_batch)]",
            "train_set[:n_questions]",
        ),
        (
            "a step behind",
            "math.ceil(len(train_set) * step / config.curriculum_steps)",
            "math.ceil(len(train_set) * (step - 1) / config.curriculum_steps)",
        ),
    ),
    *breaks(
        "RolloutPrefetcher",
        ROLLOUTS,
        f"{DRIVERS}/test_overlap.py -k prefetcher",
        (
            "a batch is trained on twice",
            "rollouts, self._state.pending = self._state.pending, None",
            "rollouts = self._state.pending",
        ),
        ("a batch is drawn twice", "prefetch, self._prefetch = self._prefetch, None", "prefetch = self._prefetch"),
        (
            "one step beyond the last",
            "step <= self._run.config.n_grpo_steps:",
            "step <= self._run.config.n_grpo_steps + 1:",
        ),
        (
            "the batch sampled ahead is not saved",
            "self._state.pending = self._prefetch.future.result()",
            "self._prefetch.future.result()",
        ),
    ),
    *breaks(
        "compute_rewards",
        "drivers/training/advantages.py",
        f"{OBJECTIVE} {GRADING} -k 'length_penalty or compute_rewards'",
        (
            "the penalty is added twice",
            "return rewards + core.compute_soft_overlong_penalty(",
            "return rewards + 2 * core.compute_soft_overlong_penalty(",
        ),
        (
            "the penalty replaces the reward",
            "return rewards + core.compute_soft_overlong_penalty(",
            "return 0 * rewards + core.compute_soft_overlong_penalty(",
        ),
        (
            "correct and wrong exchanged",
            "torch.where(torch.tensor(answers) > 0, correct, wrong)",
            "torch.where(torch.tensor(answers) > 0, wrong, correct)",
        ),
        (
            "every answer is correct",
            "torch.where(torch.tensor(answers) > 0, correct, wrong)",
            "torch.where(torch.tensor(answers) >= 0, correct, wrong)",
        ),
    ),
    *breaks(
        "prepare_rollouts",
        "drivers/training/advantages.py",
        (
            f"{OBJECTIVE} {LOOP}"
            " -k 'prepare or kl_in_reward or calls_its_function or gets_the_prepared or importance_weights'"
        ),
        (
            "the policy is the reference",
            'known["reference_log_probs"] = score_all(initial,',
            'known["reference_log_probs"] = score_all(policy,',
        ),
        (
            "the sampler is the reference",
            'score_all(initial, rollouts, config)["log_probs"]',
            "rollouts.sampler_log_probs",
        ),
        (
            "the sampler's log-probs are the old ones",
            "known |= {names[name]: values for name, values in scored.items()}",
            'known["old_log_probs"] = rollouts.sampler_log_probs',
        ),
        (
            "advantages before shaping",
            "return replace(batch, advantages=finish_advantages(config, batch))",
            "return batch",
        ),
    ),
    *breaks(
        "prepare_rollouts",
        "drivers/training/advantages.py",
        f"{OBJECTIVE} -k top_entropy",
        ("no entropies", "with_entropy=config.top_entropy_fraction is not None)", "with_entropy=False)"),
    ),
    *breaks(
        "estimate_advantages",
        "drivers/training/advantages.py",
        f"{OBJECTIVE} -k 'calls_its_function or gdpo'",
        (
            "the rewards of other rows",
            "estimator, rewards = config.estimator, rollouts.rewards[:, 0]",
            "estimator, rewards = config.estimator, rollouts.rewards[:, 0].roll(1)",
        ),
        ("one group", '"group_sizes": config.group_size,', '"group_sizes": len(rewards),'),
        ("groups of two", '"group_sizes": config.group_size,', '"group_sizes": 2,'),
        ("no lengths", '"lengths": rollouts.lengths,', '"lengths": torch.ones_like(rollouts.lengths),'),
    ),
    *breaks(
        "finish_advantages",
        "drivers/training/advantages.py",
        f"{OBJECTIVE} {GRADING} -k 'kl_in_reward or calls_its_function or unscored_response_tokens'",
        ("the penalty is a bonus", "advantages - config.kl_coef * core", "advantages + config.kl_coef * core"),
        ("no coefficient", "advantages - config.kl_coef * core", "advantages - core"),
        ("the penalty of the token alone", "core.compute_reward_to_go(kl, mask)", "kl"),
        (
            "not whitened",
            "return core.whiten_over_tokens(advantages, mask) if whitens else advantages",
            "return advantages",
        ),
    ),
    *breaks(
        "weigh_step",
        "drivers/training/objective.py",
        (
            f"{OBJECTIVE} {GRADING} -k 'truncated or top_entropy or kl_in_reward or reject or calls_its_function"
            " or unscored or importance_weights'"
        ),
        (
            "no importance weights",
            "        importance_weights = correction.weights\n        metrics |=",
            "        metrics |=",
        ),
        (
            "rejection also truncates",
            'if config.importance != "truncate":\n            filters.append',
            "if True:\n            filters.append",
        ),
        ("nothing is rejected", "            filters.append(correction.is_in_bounds)\n", "            pass\n"),
        (
            "low entropies",
            "filters.append(core.select_high_entropy(batch.old_entropy, mask",
            "filters.append(core.select_high_entropy(-batch.old_entropy, mask",
        ),
    ),
    *breaks(
        "select_trained_responses",
        "drivers/training/objective.py",
        f"{OBJECTIVE} {GRADING} -k 'truncated or unscored'",
        (
            "truncated responses are trained on",
            "batch.unscored | batch.truncated if config.mask_truncated else batch.unscored",
            "batch.unscored",
        ),
        (
            "truncated responses are always excluded",
            "batch.unscored | batch.truncated if config.mask_truncated else batch.unscored",
            "batch.unscored | batch.truncated",
        ),
        (
            "unscored responses are trained on",
            "batch.unscored | batch.truncated if config.mask_truncated else batch.unscored",
            "batch.truncated if config.mask_truncated else torch.zeros_like(batch.unscored)",
        ),
    ),
    *breaks(
        "weigh_imitation",
        "drivers/training/objective.py",
        f"{OBJECTIVE} -k positive_nll",
        ("all responses", "mask & (batch.rewards > 0) &", "mask &"),
        ("rewards of 0 too", "(batch.rewards > 0)", "(batch.rewards >= 0)"),
        ("truncated responses too", "imitated = mask &", "imitated = batch.response_mask &"),
        ("the mean of each response", 'weights(imitated, "token_mean")', 'weights(imitated, "sequence_mean")'),
    ),
    *breaks(
        "choose_old_log_probs",
        "drivers/training/objective.py",
        f"{OBJECTIVE} {DRIVERS}/test_train.py -k 'old_policy or ratio_on_policy'",
        (
            "the sampler's always",
            'return batch.sampler_log_probs if config.old_policy == "sampler" else batch.old_log_probs',
            "return batch.sampler_log_probs",
        ),
        (
            "the trainer's always",
            'return batch.sampler_log_probs if config.old_policy == "sampler" else batch.old_log_probs',
            "return batch.old_log_probs",
        ),
        (
            "always the current policy",
            "    if config.uses_current_policy_as_old:\n        return None\n",
            "    if True:\n        return None\n",
        ),
    ),
    *breaks(
        "compute_objective_weights",
        "drivers/training/objective.py",
        f"{OBJECTIVE} -k 'truncated or rejected or aggregation_constant or missing_group or gradient_equals'",
        (
            "excluded tokens keep their weight",
            "config.aggregation, kept=kept, **arguments, **counting)",
            "config.aggregation, **arguments, **counting)",
        ),
        (
            "excluded responses keep their weight",
            "core.compute_sequence_weights(mask, kept=kept, **counting)",
            "core.compute_sequence_weights(mask, **counting)",
        ),
        (
            "one aggregation for all",
            "core.compute_token_weights(mask, config.aggregation, kept=kept",
            'core.compute_token_weights(mask, "sequence_mean", kept=kept',
        ),
        (
            "the length of the rollouts as the constant",
            "float(config.sampling_max_tokens)",
            "float(batch.response_mask.shape[1])",
        ),
    ),
    *breaks(
        "correct_for_sampler",
        "drivers/training/objective.py",
        f"{FLAGS} {OBJECTIVE} -k 'importance or self_normalize'",
        (
            "the ratio in reverse",
            "core.compute_importance_ratios(log_probs, sampler_log_probs,",
            "core.compute_importance_ratios(sampler_log_probs, log_probs,",
        ),
        ("always per token", "sampler_log_probs, mask, config.importance_level)", 'sampler_log_probs, mask, "token")'),
        ("no lower bound", '{"low": config.importance_low,', '{"low": 0.0,'),
        ("always by the ratio", 'if config.importance_measure == "ratio":', "if True:"),
        ("no upper bound", '"high": config.importance_high}', '"high": 1e9}'),
    ),
    *breaks(
        "describe_correction",
        "drivers/training/objective.py",
        f"{OBJECTIVE} -k 'importance_weights or importance_correction'",
        (
            "over the first micro-batch",
            "torch.cat([part[name] for part in parts], dim=1)",
            "torch.cat([part[name] for part in parts[:1]], dim=1)",
        ),
        (
            "policy and sampler exchanged",
            'core.describe_mismatch(whole["old"], whole["sampler"], whole["mask"])',
            'core.describe_mismatch(whole["sampler"], whole["old"], whole["mask"])',
        ),
        (
            "the number in bounds, not the share",
            'whole["is_in_bounds"].sum() / _count_tokens(whole["mask"])',
            'whole["is_in_bounds"].sum()',
        ),
    ),
    *breaks(
        "find_responses_with_gradient",
        "drivers/training/objective.py",
        f"{OBJECTIVE} {DRIVERS}/test_train.py -k 'find_responses_with_gradient or skipping'",
        ("the entropy bonus has none", "if entropy_coef > 0 or (config.kl_coef", "if (config.kl_coef"),
        (
            "the KL penalty has none",
            'entropy_coef > 0 or (config.kl_coef > 0 and config.kl_in == "loss")',
            "entropy_coef > 0",
        ),
        ("penalized tokens have none", " | batch.penalized.any(dim=1)", ""),
        ("imitated tokens have none", " | (batch.imitation_weights > 0).any(dim=1)", ""),
        (
            "the reward decides",
            "batch.advantages if config.objective.uses_advantages else batch.rewards",
            "batch.rewards",
        ),
    ),
    *breaks(
        "compute_loss",
        "drivers/training/objective.py",
        (
            f"{DRIVERS}/test_recipes.py {FLAGS}"
            " -k '(equals_oracle and (grpo or entropy or trl or cov)) or threshold or entropy_target or kl_estimator'"
        ),
        ("no KL coefficient", "        kl_coef=config.kl_coef,\n", "        kl_coef=1.0,\n"),
        ("no KL penalty", "        kl=kl,\n", "        kl=None,\n"),
        ("the KL is detached", "        kl=kl,\n", "        kl=None if kl is None else kl.detach(),\n"),
        (
            "another estimator",
            "batch.reference_log_probs, config.kl_estimator, old_log_probs=old",
            'batch.reference_log_probs, "k3", old_log_probs=old',
        ),
    ),
    *breaks(
        "EntropyBonus",
        "drivers/training/objective.py",
        f"{OBJECTIVE} -k adaptive",
        ("applied above the target", "return self.value if entropy <= self._target else 0.0", "return self.value"),
        (
            "applied below the target only",
            "return self.value if entropy <= self._target else 0.0",
            "return self.value if entropy < self._target else 0.0",
        ),
        (
            "not adapted",
            "self.value = core.adapt_entropy_coefficient(",
            "self._adapted = core.adapt_entropy_coefficient(",
        ),
    ),
    *breaks(
        "score",
        "drivers/training/scoring.py",
        f"{BATCH} -k 'score_divides or flat_response'",
        (
            "the temperature is left out",
            "        temperature=temperature,\n        logit_softcap",
            "        temperature=1.0,\n        logit_softcap",
        ),
        (
            "the temperature is left out of log-probs of logits",
            "select_log_probs(logits, labels, temperature=temperature)",
            "select_log_probs(logits, labels)",
        ),
        (
            "the temperature is left out of entropies of logits",
            "compute_entropy(source, temperature=temperature)",
            "compute_entropy(source)",
        ),
        ("the entropy never has a gradient", "if with_entropy and detach_entropy else {}", "if with_entropy else {}"),
    ),
    *breaks(
        "score_all",
        "drivers/training/scoring.py",
        f"{BATCH} -k score_all",
        (
            "at temperature 1",
            "rollouts.select(members), config.sampling_temperature, rows",
            "rollouts.select(members), 1.0, rows",
        ),
        (
            "rows in the order of micro-batches",
            "whole[name][members, : values.shape[1]]",
            "whole[name][sorted(members), : values.shape[1]]",
        ),
        (
            "the last token is left out",
            "whole[name][members, : values.shape[1]] = values.to",
            "whole[name][members, : values.shape[1] - 1] = values[:, :-1].to",
        ),
    ),
    *breaks(
        "accumulate_gradients",
        "drivers/training/update.py",
        (
            f"{LOOP} {DRIVERS}/test_train.py {DRIVERS}/test_recipes.py"
            " -k 'logged_rewards or skipping or (equals_oracle and (entropy or cs336))'"
        ),
        ("at temperature 1", "            config.sampling_temperature,\n", "            1.0,\n"),
        ("the loss of the last micro-batch", "total += outputs.loss.detach()", "total = outputs.loss.detach()"),
        (
            "the entropy has no gradient",
            "            detach_entropy=is_entropy_only_logged,\n",
            "            detach_entropy=True,\n",
        ),
        (
            "no response counts as skipped",
            "metrics.skipped_responses += len(weighted_batch) - len(responses)",
            "metrics.skipped_responses += 0",
        ),
    ),
    *breaks(
        "update",
        "drivers/training/update.py",
        f"{FLAGS} {GUARDS} -k 'max_grad_norm or skipped_exactly or missing_sampler'",
        (
            "the gradient is not clipped",
            "state.optimizer.clip_gradient(config.max_grad_norm)",
            "state.optimizer.clip_gradient(1e9)",
        ),
        (
            "every update is made",
            "apply=run.anomalies.should_apply_update(step, anomalies))",
            "apply=run.anomalies.should_apply_update(step, anomalies) or True)",
        ),
        ("anomalies of rollouts are forgotten", "[*rollout_anomalies, *check_update", "[*check_update"),
        (
            "skipped updates are not counted",
            "metrics.add_update(loss, norm, batch_metrics, made=is_made)",
            "metrics.add_update(loss, norm, batch_metrics)",
        ),
    ),
    *breaks(
        "UpdateMetrics",
        "drivers/training/metrics.py",
        f"{RUN_FILES} {GUARDS} {SAMPLES} -k 'update_metrics or drift or first_pass'",
        (
            "an advantage of 0 is positive",
            "micro.advantages[:, 0] > 0, lengths",
            "micro.advantages[:, 0] >= 0, lengths",
        ),
        ("median responses are long", "lengths > lengths.float().median()", "lengths >= lengths.float().median()"),
        (
            "a mean over micro-batches",
            "torch.where(tokens > 0, values * tokens, 0.0).sum() / tokens.sum().clamp(min=1)",
            "values.mean()",
        ),
        ("the sum of losses", '"loss": torch.stack(self._losses).mean()', '"loss": torch.stack(self._losses).sum()'),
    ),
    *breaks(
        "RolloutBatch",
        "drivers/training/batch.py",
        f"{BATCH} {OBJECTIVE} {LOOP} -k 'rollout_batch or duplicate or gets_the_prepared or epoch or docstring'",
        ("the mask has one token too many", "[None] < lengths[:, None]", "[None] <= lengths[:, None]"),
        (
            "the first token is masked",
            "torch.arange(max(1, int(lengths.max())))[None] < lengths[:, None]",
            "torch.arange(1, 1 + max(1, int(lengths.max())))[None] < lengths[:, None]",
        ),
        (
            "every response is a group",
            "torch.arange(len(completions))[:, None] // group_size",
            "torch.arange(len(completions))[:, None]",
        ),
        (
            "advantages of other rows after sorting",
            "return tensor[index, :width] if tensor.shape[1] == full_width else tensor[index]",
            "return tensor[index, :width] if tensor.shape[1] == full_width else tensor[: len(rows)]",
        ),
    ),
    *breaks(
        "WeightedBatch",
        "drivers/training/batch.py",
        f"{GRADING} {OBJECTIVE} -k 'old_policy or unscored or step_with or step_rollouts'",
        (
            "a missing reward stays NaN",
            "batch.rewards.masked_fill(batch.rewards.isnan(), 0.0)",
            "batch.rewards",
        ),
        (
            "a missing reward becomes 0 in JSON",
            "[None if math.isnan(reward) else reward for reward in rewards.tolist()]",
            "[0.0 if math.isnan(reward) else reward for reward in rewards.tolist()]",
        ),
        (
            "the reference is the old policy",
            "        return cls.extending(batch, rewards=",
            "        return cls.extending(batch, reference_log_probs=batch.old_log_probs, rewards=",
        ),
    ),
    *breaks(
        "imitation_batch",
        "drivers/training/batch.py",
        f"{DRIVERS}/test_expert_iteration.py {DRIVERS}/test_sft.py -k 'imitation_batch or sft_loss or imitates'",
        (
            "every response is a group",
            "enumerate(groupby(completions, key=lambda completion: completion.prompt_token_ids))",
            "enumerate(groupby(completions, key=id))",
        ),
        (
            "a reward of 0",
            "make_rollout_batch(completions, torch.ones(len(completions)))",
            "make_rollout_batch(completions, torch.zeros(len(completions)))",
        ),
        (
            "the prompt is the response",
            "one.prompt_token_ids, one.response_token_ids, (0.0,) * len(one.response_token_ids)",
            "one.prompt_token_ids, one.prompt_token_ids, (0.0,) * len(one.prompt_token_ids)",
        ),
    ),
    *breaks(
        "plan_micro_batches",
        "drivers/training/micro_batches.py",
        f"{BATCH} -k 'plan or docstring or uses_planned'",
        (
            "one row beyond the budget",
            "if taken and slots + width > config.micro_batch_tokens:",
            "if taken and slots > config.micro_batch_tokens:",
        ),
        ("masks are free", "(1 + masked_cost * one_row.n_tokens)", "(1 + causal_cost * one_row.n_tokens)"),
        (
            "short rows first",
            "rows.sort(key=lambda row: (-row.n_tokens, row.members))",
            "rows.sort(key=lambda row: (row.n_tokens, row.members))",
        ),
        (
            "padding is not counted",
            "width = row.n_tokens if packed or not taken else taken[0].n_tokens",
            "width = row.n_tokens",
        ),
        (
            "unwanted responses too",
            "    wanted = [i for i in wanted if rollouts.completions[i].token_ids]\n",
            "    wanted = [i for i in range(len(rollouts)) if rollouts.completions[i].token_ids]\n",
        ),
    ),
    *breaks(
        "TrainingState",
        "drivers/training/state.py",
        (
            f"{GUARDS} {RESUME} -k 'enters_median or goes_on_alike or entropy_coefficient or takes_effect"
            " or without_effect or other_questions or stop_inside'"
        ),
        ("the step is not restored", '        self.step = values["step"]\n', ""),
        (
            "updates are not restored",
            '        self.optimizer.finish_loading(values["updates"])\n',
            "        self.optimizer.finish_loading(0)\n",
        ),
        ("the watch is not restored", 'CollapseWatch(**values.get("collapse", {}))', "CollapseWatch()"),
        ("the order of questions is not restored", "        self.draw.setstate((version, tuple(words), gauss))\n", ""),
        (
            "the order of groups is not restored",
            '        self.shuffle.set_state(torch.tensor(values["shuffle"], dtype=torch.uint8))\n',
            "",
        ),
    ),
    *breaks(
        "TrainingState.__init__",
        "drivers/training/state.py",
        f"{LOOP} {FLAGS} -k 'other_seed or learning_rate or epoch or adam'",
        ("questions without the seed", "self.draw = random.Random(config.seed)", "self.draw = random.Random(0)"),
        ("the rate of the step before", "learning_rate_at(self.step + 1)", "learning_rate_at(self.step)"),
        ("the rate of the first step", "learning_rate_at(self.step + 1)", "learning_rate_at(1)"),
    ),
    *breaks(
        "check_update",
        "drivers/training/anomalies.py",
        f"{GUARDS} -k check_update",
        ("the mean of the norms", "SPIKE * median(earlier_norms)", "SPIKE * sum(earlier_norms) / len(earlier_norms)"),
        ("too early", "len(earlier_norms) >= N_NORMS // 2", "len(earlier_norms) >= 1"),
        ("NaN drift is no anomaly", "if not value <= limit:", "if value > limit:"),
        ("one limit for all", 'limit = MAX_LOG_RATIO if name == "max_log_ratio" else MAX_DRIFT', "limit = MAX_DRIFT"),
    ),
    *breaks(
        "check_rollouts",
        "drivers/training/anomalies.py",
        f"{GUARDS} -k 'check_rollouts or check_zero or not_finite_reward'",
        ("some truncated are all", '    if counts["truncated"] >= 1:', '    if counts["truncated"] > 0:'),
        ("some unscored are all", '    if counts["unscored"] >= 1:', '    if counts["unscored"] > 0:'),
        ("infinite entropy is fine", "if not MIN_ENTROPY <= entropy < math.inf:", "if not MIN_ENTROPY <= entropy:"),
        ("no collapse", "if not MIN_ENTROPY <= entropy < math.inf:", "if not 0 <= entropy < math.inf:"),
    ),
    *breaks(
        "AnomalyPolicy",
        "drivers/training/anomalies.py",
        f"{GUARDS} -k 'check_zero or run_not_finite or repeated'",
        ("auto stops at all", 'self._choice == "auto" and anomaly.is_fatal', 'self._choice == "auto"'),
        ("auto never stops", 'self._choice == "auto" and anomaly.is_fatal', "False"),
        ("stop goes on", 'if self._choice == "stop" or', "if"),
        ("skip makes the update", 'self._choice == "skip" or anomaly.is_unusable', "anomaly.is_unusable"),
    ),
    *breaks(
        "Checkpointer",
        "drivers/training/checkpointer.py",
        (
            f"{FLAGS} {RESUME} {DRIVERS}/test_train.py"
            " -k 'keep_checkpoints or stop_inside or stop_between or full_disk or failure_warns or lines_wait'"
        ),
        (
            "the log is not flushed first",
            "            self._sync_log()\n            if distributed.size() > 1:",
            "            if distributed.size() > 1:",
        ),
        ("no older state makes room", "drop_old_states(self._folder, keep=n_kept_states)", "pass"),
        (
            "the last model needs its state",
            "attempts += [(1, model_alone), (0, model_alone)]",
            "attempts += [(0, save.content)]",
        ),
        (
            "the newest state stays in any case",
            "attempts += [(1, model_alone), (0, model_alone)]",
            "attempts += [(1, model_alone)]",
        ),
        (
            "any failure deletes states",
            "if not is_full(self._folder, checkpoint_bytes(save.content.policy)):",
            "if False:",
        ),
        ("each failure warns", "        if not self._has_failed:", "        if True:"),
        ("later failures do not warn", "self._has_failed, self._newest = False, (", "self._newest = ("),
        ("the model alone is not published", "self._newest[0] == state.step", "False"),
        (
            "a full disk at the last step is a warning",
            "                if save.step == self._config.n_grpo_steps:",
            "                if False:",
        ),
        (
            "a full disk ends the run",
            "                if save.step == self._config.n_grpo_steps:",
            "                if True:",
        ),
        ("all checkpoints are kept", "state.accuracies, self._config.keep_checkpoints)", "state.accuracies, None)"),
    ),
    *breaks(
        "Checkpointer.close",
        "drivers/training/checkpointer.py",
        f"{RESUME} -k 'close_commits or another_rank or leaves_the_cores'",
        ("half a checkpoint is committed", "            if has_all_shards(save.folder):", "            if True:"),
        ("a whole checkpoint is left", "            if has_all_shards(save.folder):", "            if False:"),
        ("another rank's failure is ignored", "    if failed:\n", "    if error:\n"),
        ("the thread takes the step's cores", "        os.nice(NICENESS)\n", "        os.nice(0)\n"),
    ),
    *breaks(
        "Run.end_step",
        RUN,
        f"{RESUME} -k 'during_write or during_later or second_save or failed_write or full_disk'",
        ("two saves at a time", "        self.finish_save()\n        with self.display", "        with self.display"),
        (
            "the end does not wait",
            "if is_last or self.checkpointer.is_written():",
            "if self.checkpointer.is_written():",
        ),
        ("a failure waits for the next save", "if is_last or self.checkpointer.is_written():", "if is_last:"),
        ("each save is waited for", "if is_last or self.checkpointer.is_written():", "if True:"),
        ("the lock does not cover the thread", "            self.checkpointer.close()\n", "            pass\n"),
    ),
    *breaks(
        "save_on_abort",
        "drivers/training/launch.py",
        f"{RESUME} -k 'stop_during_write'",
        (
            "a save in progress is overlooked",
            "                run.finish_save()\n                if",
            "                if",
        ),
    ),
    *breaks(
        "checkpoint_copy_bytes",
        "drivers/training/memory.py",
        f"{DRIVERS}/test_memory.py {DRIVERS}/test_checkpoint.py -k 'plan_memory or copy_content'",
        ("the copy is free", "self.logits + self.engine + self.checkpoint", "self.logits + self.engine"),
        (
            "masters are copied twice",
            "in zip(parameters, is_master, strict=True) if not is_shared)",
            "in zip(parameters, is_master, strict=True))",
        ),
    ),
    *breaks(
        "check_engine",
        "drivers/training/self_check.py",
        f"{DRIVERS}/test_engines.py {LOOP} -k 'self_check or check_asks'",
        ("at temperature 1", "score(policy, rollouts, sampling.temperature)", "score(policy, rollouts, 1.0)"),
        ("any difference is fine", "if not agreement.mean <= tolerance:", "if False:"),
        (
            "the largest difference decides",
            "if not agreement.mean <= tolerance:",
            "if not agreement.largest <= tolerance / 4:",
        ),
        (
            "the hidden end token is compared",
            "is_compared[:, : sampling.min_tokens] = False",
            "is_compared[:, :0] = False",
        ),
    ),
    *breaks(
        "check_evaluation_engine",
        "drivers/training/self_check.py",
        f"{DRIVERS}/test_evaluate.py {FLAGS} -k 'check_evaluation or (evaluate_flag and self_check)'",
        (
            "greedy log-probs",
            "temperature=config.sampling_temperature or 1.0,",
            "temperature=config.sampling_temperature,",
        ),
        ("log-probs of top-p", "        top_p=1.0,\n        min_tokens=0,", "        min_tokens=0,"),
        ("only the minimum", "        min_tokens=0,\n        max_tokens=min(64", "        max_tokens=min(64"),
        ("a fixed tolerance", "    tolerance = config.self_check_tolerance\n", "    tolerance = None\n"),
    ),
    *breaks(
        "describe_setup",
        "drivers/training/setup.py",
        f"{DRIVERS}/test_architectures.py -k run_prints",
        ("nothing on shortcuts", "    lines += describe_shortcuts(policy)\n", ""),
    ),
    *breaks(
        "shares_rows",
        SHORTCUTS,
        f"{DRIVERS}/test_architectures.py {DRIVERS}/test_batch.py -k 'an_architecture or obstacle or shares_rows'",
        ("any architecture", "if config.model_type not in ARCHITECTURES_THAT_SHARE:", "if False:"),
        ("any window", "    if windows:\n", "    if False:\n"),
        ("any rotary embedding", 'return "" if rotary in ROTARY_TYPES else', 'return "" if True else'),
        ("no trial", " and trial_holds(_sharing_holds, policy)", ""),
        ("no word of it", "    if not packs_rows(policy) and not shares_rows(policy):", "    if False:"),
    ),
    *breaks(
        "find_head",
        SHORTCUTS,
        f"{DRIVERS}/test_architectures.py {DRIVERS}/test_batch.py -k 'an_architecture or head'",
        ("a scale before the head", '        torch.equal(seen["input"], seen.get("body", states))', "        True"),
        (
            "a scale after the head",
            "        and _are_equal(large, logits, rounding=8",
            "        or _are_equal(large, logits, rounding=8",
        ),
        ("small logits", "LARGE_LOGIT = 50.0", "LARGE_LOGIT = 0.01"),
        (
            "rounding of bfloat16",
            "rounding=8 * torch.finfo(torch.float32).eps",
            "rounding=8 * torch.finfo(torch.bfloat16).eps",
        ),
        ("no soft cap", "    if head.softcap is not None:\n        large", "    if False:\n        large"),
        ("no word of it", "    if find_head(policy) is None:\n        lines", "    if False:\n        lines"),
    ),
    *breaks(
        "setup_run",
        "drivers/training/setup.py",
        f"{FLAGS} -k 'test_setup or val_ or deterministic or lora_alpha or attention or system_prompt or chat'",
        (
            "held-out questions are those of the training",
            'load_examples("--val-data-path", path)',
            'load_examples("--val-data-path", config.data_path)',
        ),
        ("all held-out questions", "[: config.n_val_examples]", "[:]"),
        ("the first set twice", "dict(list(val_sets.items())[1:])", "dict(val_sets)"),
        ("no room for evaluations", "max_model_len=max(trained, asked)", "max_model_len=trained"),
        ("no room for training", "max_model_len=max(trained, asked)", "max_model_len=asked"),
        ("held-out questions fit training", "max_new_tokens=eval_tokens, flag=flag", "max_new_tokens=1, flag=flag"),
        ("the flag of training", "max_new_tokens=eval_tokens, flag=flag", "max_new_tokens=eval_tokens"),
        (
            "the seed does not reach the engine",
            "        seed=config.seed,\n        gpu_memory",
            "        seed=0,\n        gpu_memory",
        ),
        (
            "the memory share does not reach the engine",
            "        gpu_memory_utilization=config.gpu_memory_utilization,\n",
            "        gpu_memory_utilization=0.85,\n",
        ),
    ),
    *breaks(
        "check_disk",
        "drivers/training/disk.py",
        f"{RESUME} -k check_disk",
        ("without moments", "+ 12 * sum", "+ 4 * sum"),
        ("without the one that is written", "N_RESUMABLE + 1)", "N_RESUMABLE)"),
        ("models are free", " + n_models * model", ""),
        ("the best is forgotten", "config.keep_checkpoints + 1 -", "config.keep_checkpoints -"),
        ("one that does not fit is a warning", "    if free < whole:", "    if False:"),
    ),
    *breaks(
        "CollapseWatch",
        "drivers/training/anomalies.py",
        f"{GUARDS} -k collapse",
        ("formless responses collapse", "well_formed >= MIN_FORMAT and ", ""),
        ("right responses collapse", "reward <= MAX_REWARD and ", ""),
        ("short is a fixed length", "tokens < SHORT * first", "tokens < 30"),
        ("a fifth of the start", "SHORT = 0.15", "SHORT = 0.2"),
        ("steps add up over the run", "self.n_steps + 1 if is_collapsed else 0", "self.n_steps + is_collapsed"),
        ("a step too late", "if self.n_steps < N_COLLAPSED:", "if self.n_steps <= N_COLLAPSED:"),
        ("the start is the step before", "tokens if first is None else first", "tokens"),
        ("without a reward", 'metrics.get("reward", 1.0))', 'metrics.get("reward", 0.0))'),
    ),
    *breaks(
        "explain_missing_gradient",
        "drivers/training/anomalies.py",
        f"{GUARDS} -k missing_gradient",
        ("one reward of several", "if len(scored) != 1:", "if not scored:"),
        ("unscored responses have a reward", " if not math.isnan(reward)}", "}"),
        ("all right is all wrong", "    if reward > 0:", "    if reward > 1:"),
    ),
    *breaks(
        "Run.evaluate",
        "drivers/training/run.py",
        f"{GUARDS} -k 'always_fails or repeated'",
        ("a reward that fails always is trained on", "if step == 0 and n_failed == n_asked:", "if False:"),
        ("abstention is failure", "n_failed == n_asked", '"accuracy" not in results[first][0]'),
        (
            "a run without gradient ends as any other",
            "return text if self.state.grad_norms else",
            "return text if True else",
        ),
    ),
]

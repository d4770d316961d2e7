"""GRPO (Algorithm 3): `python drivers/train.py --help`."""

# isort: off
from drivers import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import random
import sys
from collections.abc import Sequence

import torch
from torch import nn

from drivers.batch import RolloutBatch, make_rollout_batch, score, with_old_log_probs
from drivers.config import GrpoConfig, exit_with, parse_train_config
from drivers.data import Question
from drivers.display import Display
from drivers.errors import UnsoundRunError, UsageError
from drivers.interrupts import terminate_as_interrupt, uninterrupted
from drivers.metrics import UpdateMetrics, describe_completions
from drivers.optim import PolicyOptimizer
from drivers.rollout import RolloutEngine
from drivers.run import Run, prepare
from grpo_core import RewardFn, compute_group_normalized_rewards, grpo_microbatch_train_step


def train(
    config: GrpoConfig,
    policy: nn.Module,
    engine: RolloutEngine,
    reward_fn: RewardFn,
    train_set: Sequence[Question],
    val_set: Sequence[Question],
    run: Run,
) -> None:
    """The loop. Its parts are built by `drivers.run.prepare`, or by you."""
    optimizer = PolicyOptimizer(policy, config.learning_rate)
    draw, shuffle = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
    engine.load_weights(version=0)
    run.check_engine(engine, policy, val_set, version=0)
    run.evaluate(engine, val_set, reward_fn, step=0)

    for step in run.steps():
        # D_b ~ D;  o_1 .. o_G ~ pi_old(. | q) for each question q of D_b.
        with run.phase("rollout"):
            questions = draw.sample(train_set, config.n_prompts_per_rollout_batch)
            prompts = [question.prompt_token_ids for question in questions]
            completions = engine.generate(prompts, config.sampling, seed=run.sampling_seed(step))
            engine.sleep()

        # r_i = R(q, o_i);  A_i = r_i, normalized within its group.
        with run.phase("reward"):
            responses = [completion.text for completion in completions]
            answers = [question.answer for question in questions for _ in range(config.group_size)]
            advantages, raw_rewards, rewards = compute_group_normalized_rewards(
                reward_fn, responses, answers, config.group_size, config.advantage_eps, config.use_std_normalization
            )
            rollouts = make_rollout_batch(completions, advantages, raw_rewards)

        # pi <- ascend the objective on these rollouts; off-policy, in several updates against the same pi_old.
        metrics = UpdateMetrics()
        with run.phase("update"):
            if config.needs_old_log_probs:
                rollouts = with_old_log_probs(policy, rollouts, config)
            for _ in range(config.epochs_per_rollout_batch):
                for train_batch in rollouts.shuffled(shuffle).split(config.train_batch_size):
                    loss = accumulate_gradients(policy, train_batch, config, metrics)
                    with uninterrupted():
                        metrics.add_update(loss, grad_norm=optimizer.step(loss, config.max_grad_norm))

        # pi_old <- pi.
        with run.phase("push"), uninterrupted():
            engine.load_weights(version=step)
            run.step = step
        if step == 1:
            run.check_engine(engine, policy, val_set, version=step)
        if step % config.eval_steps == 0 or step == config.n_grpo_steps:
            run.evaluate(engine, val_set, reward_fn, step=step)
        if step % config.checkpoint_steps == 0:
            run.save(policy, f"checkpoint-{step}", step)
        run.report(step, rewards | describe_completions(completions) | metrics.summary())


def accumulate_gradients(
    policy: nn.Module, train_batch: RolloutBatch, config: GrpoConfig, metrics: UpdateMetrics
) -> torch.Tensor:
    """The loss of one optimizer step, its gradient added up over micro-batches."""
    device = next(policy.parameters()).device
    total = torch.zeros((), device=device)
    for micro in train_batch.split(config.micro_train_batch_size):
        if not micro.has_signal(config.loss_type):
            metrics.skipped_micro_batches += 1  # every advantage is 0: so is the gradient, without a forward pass
            continue
        micro = micro.to(device)
        scored = score(policy, micro, config.sampling_temperature, with_entropy=True)
        # On-policy, pi_old is the policy of this very pass: the ratio is exactly 1, its gradient is not 0.
        old_log_probs = micro.old_log_probs if config.is_off_policy else scored["log_probs"].detach()
        loss, metadata = grpo_microbatch_train_step(
            scored["log_probs"],
            micro.response_mask,
            config.gradient_accumulation_steps,
            config.loss_type,
            micro.raw_rewards,
            micro.advantages,
            old_log_probs,
            config.cliprange,
            aggregation=config.aggregation,
            normalize_constant=config.normalize_constant(train_batch.n_response_tokens),
        )
        total += loss
        metrics.add_micro_batch(micro, scored, metadata)
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: settings, parts, the loop, and how it may end."""
    try:
        config = parse_train_config(sys.argv[1:] if arguments is None else arguments)
        with Display(config.n_grpo_steps) as display, terminate_as_interrupt():
            run, parts = prepare(config, display)
            policy, engine = parts[0], parts[1]
            try:
                train(config, *parts, run)
                saved = run.save(policy, "final_model", run.step)
            except BaseException:  # whatever ends the run, the steps that were made are kept
                if run.step:
                    with uninterrupted():
                        saved = run.save(policy, f"checkpoint-{run.step}-stopped", run.step)
                    display.say(f"Stopped after step {run.step}; the weights of the last update are in {saved}/")
                raise
            finally:
                try:
                    run.finish()
                finally:
                    engine.close()
            display.say(f"Done: {run.summary()}. Model: {saved}/  Curves: {run.folder}/curves.png")
    except UsageError as error:
        exit_with("train.py", error, status=2)
    except UnsoundRunError as error:
        exit_with("train.py", error, status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

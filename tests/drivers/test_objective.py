"""The whole family in the loop: every recipe learns, settings combine, and illegal combinations are rejected."""

import random
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

import grpo_core as core
from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.policy.reference import mix_into_reference
from drivers.settings.command_line import parse_train_config
from drivers.settings.formula import formula, show
from drivers.settings.grpo import GrpoConfig
from drivers.settings.recipes import QUICKSTART, RECIPES
from drivers.settings.sampling import Sampling
from drivers.settings.tables import ADVANTAGES, OBJECTIVES
from drivers.training import update as update_step
from drivers.training.advantages import compute_rewards, prepare_rollouts
from drivers.training.batch import make_rollout_batch
from drivers.training.components import Components
from drivers.training.forward import forward, forward_all
from drivers.training.metrics import UpdateMetrics
from drivers.training.objective import EntropyBonus, compute_objective, find_responses_with_gradient, weigh_step
from drivers.training.rollouts import collect
from drivers.training.update import accumulate_gradients
from grpo_core import LossType, grpo_microbatch_train_step, normalize_group_rewards
from grpo_core.types import Aggregation
from tests.drivers.helpers.letters import (
    clone_policy,
    letter_grader,
    make_completion,
    make_run,
    make_tiny_config,
    make_tiny_parts,
    sample_rollouts,
)
from tests.drivers.helpers.runs import TWO_UPDATES, run_training
from tests.tiny import make_tiny_policy

ROOT = Path(__file__).resolve().parents[2]
TINY_RATE = {"learning_rate": 1e-2}


def reward_letter(response, ground_truth):
    """Return 1 or 0, for advantages that count right answers."""
    right = float(ground_truth in response)
    return {"reward": right, "format_reward": 1.0, "answer_reward": right}


# Off-policy, with all settings that can be combined.
EVERYTHING = [
    {"loss_type": "gspo", "cliprange": 0.01, "importance": "truncate", "importance_level": "sequence"},
    {"loss_type": "gmpo", "cliprange": 0.01, "kl_coef": 0.1, "entropy_coef": 0.01},
    {"loss_type": "cispo", "aggregation": "token_mean", "importance": "mask", "self_normalize": True},
    {"loss_type": "clip_cov", "covariance_fraction": 0.3, "covariance_bounds": (0.0, 5.0), "rejected_tokens": "drop"},
    {"loss_type": "kl_cov", "covariance_fraction": 0.3, "aggregation": "prompt_mean", "positive_nll_coef": 0.5},
    {"loss_type": "vespo", "old_policy": "sampler", "aggregation": "constant", "second_moment_threshold": 0.001},
    {"loss_type": "dppo_tv", "cliprange": 0.01, "kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward"},
    {"loss_type": "sapo", "top_entropy_fraction": 0.5, "off_policy_threshold": 0.001, "aggregation": "token_mean"},
    {"advantage": "reinforce_plus_plus", "kl_coef": 0.05, "kl_estimator": "k1", "kl_in": "reward"},
    {"importance": "reject", "importance_measure": "total_variation", "importance_high": 0.01},
    {"importance": "reject", "importance_low": 0.5, "empty_responses": "drop", "mask_truncated": True},
]


@pytest.mark.medium
@pytest.mark.parametrize("settings", EVERYTHING, ids=lambda s: s.get("loss_type") or next(iter(s)))
def test_gradient_is_independent_of_micro_batches(settings, monkeypatch):
    """All responses at once, groups, single responses and rows sorted into a token budget give one gradient.

    Statistics are those of the optimizer step. The current policy, the old policy and the reference are three
    different models. No row is skipped here, because means are over the trained tokens.
    """
    monkeypatch.setattr(update_step, "find_responses_with_gradient", lambda _, batch, __: list(range(len(batch))))
    gradients = []
    cuts = [{"gradient_accumulation_steps": steps} for steps in (1, 4, 16)]
    cuts += [{"micro_batch_tokens": tokens} for tokens in (1, 40, 60, 1000)]
    for cut in cuts:
        config = make_tiny_config(**TWO_UPDATES | settings | cut)
        parts, reference = make_tiny_parts(), make_tiny_policy(5) if settings.get("kl_coef") else None
        rollouts, scores = sample_rollouts(config, parts)
        batch = prepare_rollouts(config, make_tiny_policy(1), reference, rollouts, scores, None)
        weighed, _ = weigh_step(config, next(batch.split(config.train_batch_size)))
        metrics = UpdateMetrics()
        loss = accumulate_gradients(parts.policy, weighed, config, config.entropy_coef, metrics)
        weights = torch.cat([p.grad.flatten() for p in parts.policy.parameters()])
        metrics.add_update(loss, weights.norm(), {})
        gradients.append((loss, weights, metrics.summary()))
    assert gradients[0][1].abs().max() > 0.1
    for loss, weights, summary in gradients[1:]:
        assert_close(loss, gradients[0][0], rtol=1e-4, atol=1e-5)
        assert_close(weights, gradients[0][1], rtol=0, atol=2e-6)
        for name in summary.keys() - {"micro_batches", "skipped_responses"}:
            assert summary[name] == pytest.approx(gradients[0][2][name], rel=1e-3, abs=1e-5), name


@pytest.mark.medium
@pytest.mark.parametrize("loss_type", get_args(LossType))
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant", "sequence_sum"])
def test_gradient_equals_grpo_microbatch_train_step(loss_type, aggregation):
    """Weights of the whole step equal `grpo_microbatch_train_step` on one micro-batch."""
    config, parts = make_tiny_config(loss_type=loss_type, aggregation=aggregation), make_tiny_parts()
    twin = clone_policy(parts.policy)
    rollouts, scores = sample_rollouts(config, parts)
    batch = prepare_rollouts(config, parts.policy, None, rollouts, scores, None)
    weighed, _ = weigh_step(config, batch)
    loss = accumulate_gradients(parts.policy, weighed, config, 0.0, UpdateMetrics())
    log_probs = forward(twin, rollouts, 1.0)["log_probs"]
    advantages = normalize_group_rewards(rollouts.rewards[:, 0], 8)[:, None]
    constant = {"token_mean": float(rollouts.n_response_tokens), "constant": float(config.sampling_max_tokens)}
    expected, _ = grpo_microbatch_train_step(
        log_probs,
        rollouts.response_mask,
        1,
        loss_type,
        rollouts.rewards,
        advantages,
        log_probs.detach(),
        config.cliprange,
        aggregation=aggregation,
        normalize_constant=constant.get(aggregation),
    )
    assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(parts.policy.parameters(), twin.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_old_policy_sampler_uses_sampler_log_probs():
    config, parts = make_tiny_config(loss_type="grpo_clip", old_policy="sampler"), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    batch, _ = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    assert torch.equal(batch.old_log_probs, rollouts.sampler_log_probs)
    assert not config.needs_old_log_probs


def test_old_policy_trainer_uses_log_probs_before_the_first_update():
    """Sampler, old policy and reference are three different ones."""
    config, parts = make_tiny_config(loss_type="grpo_clip", kl_coef=0.1, **TWO_UPDATES), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    before, first = make_tiny_policy(1), make_tiny_policy(5)
    batch, _ = weigh_step(config, prepare_rollouts(config, before, first, rollouts, scores, None))
    mask = rollouts.response_mask
    for found, model in ((batch.old_log_probs, before), (batch.reference_log_probs, first)):
        assert_close(found[mask], forward(model, rollouts, 1.0)["log_probs"].detach()[mask], rtol=1e-4, atol=1e-5)


def test_rejected_responses_have_no_weight_in_losses_of_responses():
    settings = {"loss_type": "gspo", "importance": "reject", "importance_level": "sequence", "importance_high": 1.5}
    config, parts = make_tiny_config(**settings, **TWO_UPDATES), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    sampled = rollouts.sampler_log_probs.clone()
    sampled[3:8, 0] -= 1.0
    rollouts = replace(rollouts, sampler_log_probs=sampled)
    batch, step_metrics = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    assert [row for row in range(32) if batch.objective_weights[row] == 0] == [3, 4, 5, 6, 7]
    lengths = rollouts.lengths
    assert step_metrics["kept_tokens"] == pytest.approx(1 - (lengths[3:8].sum() / lengths.sum()).item())


def test_importance_weights_are_trainer_over_sampler():
    config, parts = make_tiny_config(importance="truncate", importance_high=1.5, **TWO_UPDATES), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    rollouts = replace(rollouts, sampler_log_probs=rollouts.sampler_log_probs - 0.25)
    batch, step_metrics = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    mask = rollouts.response_mask
    assert_close(batch.importance_weights[mask], torch.full_like(batch.importance_weights[mask], 2.718281828**0.25))
    assert step_metrics["mismatch_mean"] == pytest.approx(0.25, abs=1e-4)
    assert step_metrics["mismatch_kl"] == pytest.approx(2.718281828**0.25 - 1.25, abs=1e-4)
    assert step_metrics["importance_ess"] == pytest.approx(1.0, abs=1e-4)
    assert step_metrics["importance_in_bounds"] == 1.0
    bound = replace(config, importance_high=1.1)
    clipped, _ = weigh_step(bound, prepare_rollouts(bound, parts.policy, None, rollouts, scores, None))
    assert_close(clipped.importance_weights[mask], torch.full_like(clipped.importance_weights[mask], 1.1))
    assert (clipped.objective_weights[mask] > 0).all()
    narrow = replace(config, importance="reject", importance_high=1.1)
    rejected, step_metrics = weigh_step(narrow, prepare_rollouts(narrow, parts.policy, None, rollouts, scores, None))
    assert step_metrics["kept_tokens"] == 0.0
    assert (rejected.objective_weights == 0).all()


@pytest.mark.medium
@pytest.mark.parametrize("importance", ["truncate", "mask", "reject"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_importance_correction_on_policy_needs_no_extra_pass(importance, level, mask_truncated, monkeypatch):
    """Without a pass before the update, gradient and metrics are the same."""
    config = make_tiny_config(
        importance=importance,
        importance_level=level,
        importance_low=0.8,
        importance_high=1.1,
        mask_truncated=mask_truncated,
        loss_type="gspo" if level == "sequence" else "grpo_clip",
    )
    found = []
    for in_pass in (True, False):
        if not in_pass:
            monkeypatch.setattr(GrpoConfig, "computes_importance_weights_in_forward", False)
        assert config.computes_importance_weights_in_forward is in_pass
        assert config.needs_old_log_probs is not in_pass
        parts = make_tiny_parts()
        rollouts, scores = sample_rollouts(config, parts)
        noise = torch.rand(rollouts.response_mask.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        rollouts = replace(rollouts, sampler_log_probs=rollouts.sampler_log_probs + 0.4 * noise)
        batch, step_metrics = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
        metrics = UpdateMetrics()
        monkeypatch.setattr(update_step, "find_responses_with_gradient", lambda _, batch, __: list(range(len(batch))))
        loss = accumulate_gradients(parts.policy, batch, config, 0.0, metrics)
        weights = torch.cat([p.grad.flatten() for p in parts.policy.parameters()])
        metrics.add_update(loss, weights.norm(), step_metrics)
        found.append((loss, weights, metrics.summary()))
    (loss, weights, summary), (other_loss, other_weights, other_summary) = found
    assert weights.abs().max() > 0.01
    assert_close(loss, other_loss, rtol=1e-4, atol=1e-6)
    assert_close(weights, other_weights, rtol=0, atol=2e-6)
    assert summary.keys() == other_summary.keys()
    assert 0.05 < summary["importance_in_bounds"] < 1.0
    for name, value in summary.items():
        assert value == pytest.approx(other_summary[name], rel=1e-3, abs=1e-5), name


def test_truncated_responses_leave_loss_and_token_counts():
    config, parts = make_tiny_config(mask_truncated=True, aggregation="token_mean"), make_tiny_parts()
    ended, cut = make_completion([1], [4, 5, 6]), make_completion([1], [7, 8, 9], finish_reason="length")
    rollouts = make_rollout_batch([ended, cut], torch.tensor([1.0, 0.0]))
    config = replace(config, rollout_batch_size=2, group_size=2, train_batch_size=2, gradient_accumulation_steps=1)
    scores = [{"reward": 1.0}, {"reward": 0.0}]
    batch, step_metrics = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    assert batch.objective_weights.tolist() == [[1 / 3] * 3, [0.0] * 3]
    assert step_metrics["kept_tokens"] == 0.5
    assert (batch.advantages != 0).all()  # still compared with the truncated response


def test_aggregation_constant_divides_by_the_longest_allowed_response():
    sizes = {"rollout_batch_size": 2, "group_size": 2, "train_batch_size": 2, "gradient_accumulation_steps": 1}
    config = make_tiny_config(aggregation="constant", sampling_max_tokens=10, **sizes)
    rollouts = make_rollout_batch([make_completion([1], [4] * n) for n in (3, 2)], torch.tensor([1.0, 0.0]), 2)
    scores = [{"reward": 1.0}, {"reward": 0.0}]
    batch, _ = weigh_step(config, prepare_rollouts(config, make_tiny_policy(), None, rollouts, scores, None))
    assert_close(batch.objective_weights.float(), torch.tensor([[0.05] * 3, [0.05, 0.05, 0.0]]))
    assert_close(batch.token_weights, batch.objective_weights)


def test_length_penalty_values():
    config = make_tiny_config(length_penalty="soft_overlong", overlong_buffer=4, sampling_max_tokens=8)
    completions = [make_completion([1], [4] * n) for n in (2, 6, 8)]
    scores = [{"reward": 1.0, "answer_reward": a} for a in (1.0, 1.0, 0.0)]
    assert compute_rewards(config, completions, scores).tolist() == [1.0, 0.5, 0.0]
    cosine = make_tiny_config(length_penalty="cosine", sampling_max_tokens=8)
    assert_close(compute_rewards(cosine, completions, scores)[2].item(), 0.0, rtol=0, atol=1e-6)
    assert (
        1.0 < compute_rewards(cosine, completions, scores)[1] < compute_rewards(cosine, completions, scores)[0] < 2.0
    )
    cut = [replace(one, finish_reason="length") for one in completions]
    assert compute_rewards(cosine, cut, scores).tolist() == [-10.0] * 3  # reaching the limit never pays


@pytest.mark.slow
def test_kl_penalty_limits_drift(tmp_path):
    free, steps, _ = run_training(tmp_path / "free", kl_coef=1e-6)
    held, held_steps, _ = run_training(tmp_path / "held", kl_coef=5.0, kl_estimator="k2")
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-9)  # both are equal before the first update
    assert held_steps[-1]["kl"] < 0.1 * steps[-1]["kl"]
    in_reward, reward_steps, _ = run_training(tmp_path / "r", kl_coef=5.0, kl_estimator="k1", kl_in="reward")
    assert reward_steps[-1]["reward"] < steps[-1]["reward"]
    del free, held, in_reward


@pytest.mark.medium
def test_reference_is_replaced_every_second_step(tmp_path):
    """The divergence is 0 again in the step after, and nowhere else."""
    settings = {"kl_coef": 0.01, "kl_reference_steps": 2, "n_grpo_steps": 5, "learning_rate": 1e-2}
    _, steps, _ = run_training(tmp_path, **settings)
    assert [row["kl"] < 1e-9 for row in steps] == [True, False, True, False, True]
    notes = "\n".join(formula(make_tiny_config(**settings, kl_reference_share=0.25)))
    assert "pi_ref <- 0.25 pi + 0.75 pi_ref after every 2 steps" in notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.25, 0.6, 1.0])
def test_mix_into_reference_matches_definition(share, dtype):
    reference, policy = make_tiny_policy(0).to(dtype), make_tiny_policy(1)
    before = [weight.clone() for weight in reference.parameters()]
    mix_into_reference(reference, policy, share)
    for old, new, mixed in zip(before, policy.parameters(), reference.parameters(), strict=True):
        expected = (1 - share) * old.double() + share * new.to(dtype).double()
        assert_close(mixed.double(), expected, rtol=0, atol=torch.finfo(dtype).eps * expected.abs().max().item())
        if share == 1.0:
            assert torch.equal(mixed, new.to(dtype))


@pytest.mark.slow
def test_entropy_bonus_raises_entropy(tmp_path):
    _, steps, _ = run_training(tmp_path / "a")
    _, open_steps, _ = run_training(tmp_path / "b", entropy_coef=1.0)
    assert open_steps[-1]["rollout_entropy"] > 2 * steps[-1]["rollout_entropy"]


def test_adaptive_entropy_coefficient_follows_rollout_entropy():
    bonus = EntropyBonus(make_tiny_config(entropy_coef=0.01, entropy_target=1.0))
    assert bonus.adapt(2.0) == 0.0  # above the target it decreases and is not applied
    assert bonus.adapt(0.5) == pytest.approx(0.01)
    assert bonus.adapt(1.0) == pytest.approx(0.015)
    assert [bonus.adapt(9.0) for _ in range(9)] == [0.0] * 9
    assert bonus.adapt(0.5) == pytest.approx(0.005)  # never below 0
    assert EntropyBonus(make_tiny_config(entropy_coef=0.02)).adapt(9.0) == 0.02


@pytest.mark.medium
def test_adaptive_entropy_coefficient_is_logged_as_applied(tmp_path):
    _, steps, _ = run_training(tmp_path, entropy_target=4.0, learning_rate=3e-2, n_grpo_steps=12)
    applied = [row["entropy_coef"] for row in steps]
    assert applied[0] == 0.0
    assert all((row["entropy_coef"] > 0) == (row["rollout_entropy"] <= 4.0) for row in steps)
    assert max(applied) > 0


def test_dynamic_sampling_replaces_zero_signal_groups(tmp_path):
    """Half of the groups have no signal at first; further rounds with other noise replace them."""
    _, steps, _ = run_training(tmp_path, reward_fn=reward_letter, max_refills=4, n_grpo_steps=4)
    assert steps[0]["zero_std_groups"] > 0
    assert all(row["refills"] <= 4 for row in steps)
    assert max(row["sampled_tokens"] for row in steps) > 32 * 6
    assert all(row["trained_tokens"] <= 32 * 6 for row in steps)
    assert any(row["micro_batches"] == 4 and row["skipped_responses"] == 0 for row in steps)


def test_dynamic_sampling_without_signal_ends_and_warns(tmp_path, capsys):
    """Data without any signal lead to a bounded number of rounds, a warning and a gradient of zero."""

    def hopeless(response, ground_truth):
        return {"reward": 0.5, "format_reward": 0.0, "answer_reward": 0.0}

    _, steps, _ = run_training(tmp_path, reward_fn=hopeless, max_refills=2, n_grpo_steps=2)
    assert [row["refills"] for row in steps] == [2.0, 2.0]
    assert [row["missing_groups"] for row in steps] == [4.0, 4.0]
    assert [row["grad_norm"] for row in steps] == [0.0, 0.0]
    assert "warning: step 1: 4 of 4 groups are missing after 2 refills" in " ".join(capsys.readouterr().out.split())


def test_step_with_missing_group_is_mean_of_others(tmp_path, monkeypatch):
    """With three groups instead of four, the loss is their mean, unscaled."""
    from drivers.training import rollouts as program

    found = iter([[True, True, True, False], [False], [False]])
    monkeypatch.setattr(program, "find_signal_groups", lambda rewards, size: torch.tensor(next(found)))
    _, steps, _ = run_training(tmp_path, max_refills=2, n_grpo_steps=1)
    assert 8 * steps[0]["micro_batches"] + steps[0]["skipped_responses"] == 24
    assert (steps[0]["refills"], steps[0]["missing_groups"]) == (2.0, 1.0)
    config, parts = make_tiny_config(), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    some = rollouts.select(range(24))
    batch, _ = weigh_step(config, prepare_rollouts(config, parts.policy, None, some, scores[:24], None))
    lengths = some.lengths[:, None].double()
    assert_close(batch.objective_weights.sum(1, keepdim=True), (lengths > 0).double() / 24)


def test_prepare_rollouts_without_reference_raises():
    config, parts = make_tiny_config(kl_coef=0.1), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    with pytest.raises(
        ValueError, match=r"kl_coef=0.1 needs reference, a frozen copy of the initial policy; got None"
    ):
        prepare_rollouts(config, parts.policy, None, rollouts, scores, None)


def test_advantage_invalid_rewards_raise_usage_error(tmp_path):
    with pytest.raises(TrainingAbortedError, match=r"--advantage pass_at_k: rewards hold .* must be 0 or 1"):
        run_training(tmp_path, advantage="pass_at_k")


# Recipes and formulas.


@pytest.mark.medium
def test_recipes_are_legal():
    names = {field.name for field in fields(GrpoConfig)}
    for recipe, settings in RECIPES.items():
        assert settings.keys() <= names
        for arguments in (["--recipe", recipe], ["--recipe", recipe, "--model-path", "somewhere"]):
            config = parse_train_config(arguments)
            given = {"model_path": "somewhere"} if "--model-path" in arguments else {}
            assert {name: getattr(config, name) for name in settings} == settings | (
                given if "model_path" in settings else {}
            )
            assert config.recipe == recipe


def test_recipe_without_model_uses_quickstart_data():
    small, large = (parse_train_config(["--recipe", "gspo", *more]) for more in ([], ["--model-path", "somewhere"]))
    assert {name: getattr(small, name) for name in QUICKSTART} == QUICKSTART
    assert (large.model_path, large.n_grpo_steps, large.rollout_batch_size) == ("somewhere", 200, 256)
    assert small.loss_type == large.loss_type == "gspo"


def test_recipe_with_model_is_not_of_the_quickstart():
    """The edition of 2026: 200 steps on 6,400 questions, 32 at a time, in micro-batches of 8 responses."""
    bare, other = (
        parse_train_config(["--recipe", "cs336-2026", *more]) for more in ([], ["--model-path", "somewhere"])
    )
    assert (bare.model_path, other.model_path) == ("allenai/OLMo-2-0425-1B", "somewhere")
    assert replace(bare, model_path="somewhere") == other
    assert bare.n_grpo_steps * bare.n_prompts_per_rollout_batch == 6400
    assert (bare.micro_train_batch_size, bare.micro_batch_tokens, bare.learning_rate) == (8, None, 1e-5)
    assert (bare.sampling_max_tokens, bare.eval_steps, bare.n_val_examples) == (512, 10, 1024)
    assert bare.sampling.stop == ("</answer>",)


def test_papers_page_names_existing_recipes():
    page = (ROOT / "docs/papers.md").read_text()

    named = {
        name
        for cell in re.findall(r"recipes? ((?:`[a-z0-9-]+`(?:, | and )?)+)", page)
        for name in re.findall(r"`([^`]+)`", cell)
    }
    assert named
    assert named <= set(RECIPES)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_formula_exists_for_every_objective(loss_type, aggregation):
    if loss_type in ("gspo", "gspo_token", "gmpo", "luspo") and aggregation != "sequence_mean":
        with pytest.raises(
            UsageError, match=f"--aggregation {aggregation}: would weight the responses of --loss-type {loss_type}"
        ):
            make_tiny_config(loss_type=loss_type, aggregation=aggregation)
        return
    config = make_tiny_config(loss_type=loss_type, aggregation=aggregation, kl_coef=0.1, entropy_coef=0.01)
    lines = formula(config)
    assert lines[0].startswith("r_i ")
    assert any(line.startswith("L ") for line in lines)
    assert "KL_it" in "\n".join(lines)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_formula_exists_for_every_advantage(advantage):
    lines = formula(make_tiny_config(advantage=advantage))
    assert lines[1].startswith(("A_i      = ", "B_i      = ", "A_it     = "))
    assert lines[1].startswith("A_it") == ADVANTAGES[advantage].is_per_token


def test_show_prints_formula_and_settings(capsys):
    from drivers.train import main

    main(["--recipe", "dapo", "--train-batch-size", "32", "--gradient-accumulation-steps", "4", "--show"])
    text = capsys.readouterr().out
    assert "* cliprange_high               0.28" in text
    assert "* aggregation                  token_mean" in text
    assert "loss_it  = -min(rho_it A_i, clip(rho_it, 1 - 0.2, 1 + 0.28) A_i)" in text
    assert "rho_it   = pi(o_it) / pi_old(o_it)" in text
    assert "L        = 1/(sum_i |o_i|) sum_i sum_t loss_it" in text
    assert "r_i      = r1_zero(o_i) + clip((26 - |o_i|) / 6, -1, 0)" in text
    assert show(parse_train_config(["--recipe", "dapo"])).startswith("* recipe ")


# Each objective must equal its function of grpo_core, called by hand.
BY_HAND = {
    "no_baseline": lambda a, p, o, m, r: core.compute_naive_policy_gradient_loss(r, p, response_mask=m),
    "reinforce_with_baseline": lambda a, p, o, m, r: core.compute_naive_policy_gradient_loss(a, p, response_mask=m),
    "grpo_clip": lambda a, p, o, m, r: core.compute_grpo_clip_loss(
        a, p, o, 0.1, cliprange_high=0.15, dual_clip=1.5, response_mask=m
    ),
    "clip_cov": lambda a, p, o, m, r: core.compute_grpo_clip_loss(a, p, o, 0.1, cliprange_high=0.15, response_mask=m),
    "grpo_no_clip": lambda a, p, o, m, r: core.compute_grpo_no_clip_loss(a, p, o, response_mask=m),
    "gspo": lambda a, p, o, m, r: core.compute_gspo_loss(a, p, o, m, 0.1, cliprange_high=0.15),
    "gspo_token": lambda a, p, o, m, r: core.compute_gspo_token_loss(a, p, o, m, 0.1, cliprange_high=0.15),
    "gmpo": lambda a, p, o, m, r: core.compute_gmpo_loss(a, p, o, m, 0.1, cliprange_high=0.15),
    "luspo": lambda a, p, o, m, r: core.compute_luspo_loss(a, p, o, m, 0.1, cliprange_high=0.15),
    "cispo": lambda a, p, o, m, r: core.compute_cispo_loss(a, p, o, 0.9, 1.2, response_mask=m),
    "sapo": lambda a, p, o, m, r: core.compute_sapo_loss(a, p, o, 0.5, 2.0, response_mask=m),
    "vespo": lambda a, p, o, m, r: core.compute_vespo_loss(a, p, o, m),
    "dppo_tv": lambda a, p, o, m, r: core.compute_dppo_tv_loss(a, p, o, 0.1, 0.15, response_mask=m),
    "dppo_kl": lambda a, p, o, m, r: core.compute_dppo_kl_loss(a, p, o, 0.1, response_mask=m),
    "dro": lambda a, p, o, m, r: core.compute_dro_loss(a, p, o, 0.3, response_mask=m),
    "kl_cov": lambda a, p, o, m, r: core.compute_kl_cov_loss(a, p, o, m, 0.3, response_mask=m),
}
BY_HAND_FLAGS = {
    "grpo_clip": {"dual_clip": 1.5},
    "cispo": {"ratio_low": 0.9, "ratio_high": 1.2},
    "sapo": {"sapo_temperatures": (0.5, 2.0)},
    "dro": {"dro_penalty": 0.3},
    "kl_cov": {"kl_cov_coef": 0.3},
    "dppo_kl": {"cliprange": 0.1},
}


@pytest.mark.medium
@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_loss_type_calls_its_function(loss_type):
    flags = BY_HAND_FLAGS.get(loss_type, {})
    if "cliprange_high" in OBJECTIVES[loss_type].reads:
        flags = {"cliprange": 0.1, "cliprange_high": 0.15, **flags}
    config, parts = make_tiny_config(loss_type=loss_type, **flags), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    batch, _ = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    batch = replace(batch, penalized=batch.response_mask)
    generator = torch.Generator().manual_seed(0)
    shape = batch.response_mask.shape
    policy, old = (-4 * torch.rand(shape, generator=generator) for _ in range(2))
    losses, metadata = compute_objective(config, batch, policy, old)
    expected = BY_HAND[loss_type](batch.advantages, policy, old, batch.response_mask, batch.rewards)
    expected, flags = expected if isinstance(expected, tuple) else (expected, {})
    assert torch.equal(losses, expected)
    assert metadata.keys() == flags.keys()
    assert losses.abs().max() > 0


def estimate_by_token(rewards, rollouts):
    """Return the advantages of the optimal token baseline, from what the policy scores."""
    scored = forward_all(make_tiny_parts().policy, rollouts, make_tiny_config(), with_collisions=True)
    inputs = scored["log_probs"], scored["collision_probs"], rollouts.response_mask
    return core.compute_otb_advantages(rewards, 8, *inputs)


# Each advantage must equal its function of grpo_core, on rewards for which all of them differ.
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0] * 2 + [1.0] * 8 + [1.0, 1.0, 1.0, 0.0] * 2)
ESTIMATES = {
    "group": lambda r, b: core.normalize_group_rewards(r, 8, advantage_eps=0.1, correction=0),
    "leave_one_out": lambda r, b: core.compute_leave_one_out_advantages(r, 8),
    "batch_std": lambda r, b: core.compute_batch_std_advantages(r, 8, advantage_eps=0.1),
    "reinforce_plus_plus": lambda r, b: core.whiten_over_tokens(r[:, None], b.response_mask)[:, 0],
    "reinforce_plus_plus_baseline": lambda r, b: core.whiten_over_tokens(
        core.normalize_group_rewards(r, 8, normalize_by_std=False)[:, None], b.response_mask
    )[:, 0],
    "gdpo": lambda r, b: core.compute_gdpo_advantages(
        torch.stack([1 - r, r], dim=1), 8, reward_weights=[0.5, 2.0], advantage_eps=0.1
    ),
    "opo": lambda r, b: core.compute_opo_advantages(r, 8, b.lengths),
    "otb": lambda r, b: estimate_by_token(r, b),
    "gpg": lambda r, b: core.compute_gpg_advantages(r, 8),
    "maxrl": lambda r, b: core.compute_maxrl_advantages(r, 8),
    "remax": lambda r, b: core.compute_remax_advantages(r, 8, torch.tensor([0.5, 0.0, 1.0, 0.25])),
    "best_of": lambda r, b: core.compute_best_of_advantages(r, 8),
    "pass_at_k": lambda r, b: core.compute_pass_at_k_advantages(r, 8, 3),
    "pkpo": lambda r, b: core.compute_pkpo_advantages(r, 8, 3),
}


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_advantage_calls_its_function(advantage):
    flags = {
        "group": {"advantage_eps": 0.1, "std_correction": 0},
        "batch_std": {"advantage_eps": 0.1},
        "gdpo": {"advantage_eps": 0.1, "reward_weights": (0.5, 2.0)},
        "pass_at_k": {"pass_k": 3},
        "pkpo": {"pass_k": 3},
    }.get(advantage, {})
    config, parts = make_tiny_config(advantage=advantage, **flags), make_tiny_parts()
    completions = [make_completion([1 + k // 8], [4] * (1 + k % 5)) for k in range(32)]
    scores = [{"reward": r, "format_reward": 1 - r, "answer_reward": r} for r in REWARDS.tolist()]
    rollouts = make_rollout_batch(completions, REWARDS, 8)
    greedy = torch.tensor([0.5, 0.0, 1.0, 0.25])
    batch = prepare_rollouts(config, parts.policy, None, rollouts, scores, greedy)
    expected = ESTIMATES[advantage](REWARDS, rollouts)
    assert_close(batch.advantages, expected.view(len(REWARDS), -1), rtol=0, atol=0)
    assert batch.advantages.abs().max() > 0 or advantage == "best_of"


def test_gdpo_weighs_parts_of_reward_mix():
    config, parts = (
        make_tiny_config(advantage="gdpo", reward="m:f", reward_mix=("right=2", "brief=0.25")),
        make_tiny_parts(),
    )
    rollouts = make_rollout_batch([make_completion([1 + k // 8], [4] * (1 + k % 5)) for k in range(32)], REWARDS, 8)
    brief = torch.linspace(0, 1, 32) ** 2
    scores = [{"reward": 9.0, "right": r, "brief": b} for r, b in zip(REWARDS.tolist(), brief.tolist(), strict=True)]
    batch = prepare_rollouts(config, parts.policy, None, rollouts, scores, None)
    expected = core.compute_gdpo_advantages(
        torch.stack([REWARDS, brief], dim=1), 8, reward_weights=[2.0, 0.25], advantage_eps=config.advantage_eps
    )
    assert_close(batch.advantages[:, 0], expected, rtol=0, atol=0)
    assert "S_i = 2 A_i^right + 0.25 A_i^brief" in "\n".join(formula(config))
    with pytest.raises(UsageError, match=r"--reward-weights 1.0 2.0: .* with --reward-mix right=2 brief=0.25"):
        replace(config, reward_weights=(1.0, 2.0))


@pytest.mark.parametrize("advantage", ["group", "reinforce_plus_plus"])
def test_kl_in_reward_is_sum_of_future_tokens(advantage):
    config, parts = (
        make_tiny_config(advantage=advantage, kl_coef=0.5, kl_in="reward", kl_estimator="k1"),
        make_tiny_parts(),
    )
    rollouts, scores = sample_rollouts(config, parts)
    reference = make_tiny_policy(5)
    batch = prepare_rollouts(config, parts.policy, reference, rollouts, scores, None)
    mask = rollouts.response_mask
    gap = (forward(parts.policy, rollouts, 1.0)["log_probs"] - forward(reference, rollouts, 1.0)["log_probs"]).detach()
    ahead = torch.stack([torch.where(mask, gap, 0.0)[:, t:].sum(1) for t in range(mask.shape[1])], dim=1)
    base = rollouts.rewards
    if advantage == "group":
        base = normalize_group_rewards(base[:, 0], 8)[:, None]
    expected = base - 0.5 * ahead
    if advantage != "group":
        kept = expected[mask]
        expected = (expected - kept.mean()) / kept.std()
    assert_close(batch.advantages[mask], expected[mask], rtol=1e-4, atol=1e-4)
    _, step_metrics = weigh_step(config, batch)
    assert step_metrics["kl"] == pytest.approx(gap[mask].mean().item(), abs=1e-4)


def test_rows_with_gradient_cases():
    """Zero-signal rewards alone give no gradient; a KL penalty, an entropy bonus or a token penalty does."""
    parts = make_tiny_parts()
    silent = torch.full((32,), 0.5)

    def answer(entropy_coef=0.0, rewards=silent, **settings):
        config = make_tiny_config(**settings)
        rollouts, scores = sample_rollouts(config, parts, rewards)
        reference = make_tiny_policy(5) if config.needs_reference else None
        batch, _ = weigh_step(config, prepare_rollouts(config, parts.policy, reference, rollouts, scores, None))
        return bool(find_responses_with_gradient(config, batch, entropy_coef))

    assert not answer()
    assert answer(rewards=torch.arange(32.0))
    assert answer(loss_type="no_baseline")
    assert not answer(loss_type="no_baseline", rewards=torch.zeros(32))
    assert answer(kl_coef=0.1)
    assert answer(entropy_coef=0.01)
    assert answer(loss_type="dro")
    assert answer(positive_nll_coef=0.1)
    assert not answer(positive_nll_coef=0.1, rewards=-silent)
    assert answer(kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    assert not answer(loss_type="kl_cov", covariance_fraction=0.5)  # no covariance is positive if A is constant
    assert not answer(rewards=torch.arange(32.0), importance="reject", importance_high=1e-9, **TWO_UPDATES)


def test_rows_with_gradient_of_penalized_tokens_have_one():
    """`kl_cov` penalizes them whatever their advantage is."""
    config, parts = make_tiny_config(loss_type="kl_cov", covariance_fraction=0.1), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    batch, _ = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    penalized = torch.zeros_like(batch.penalized)
    penalized[[2, 9], 0] = True
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages), penalized=penalized)
    assert find_responses_with_gradient(config, batch, 0.0) == [2, 9]


def test_positive_nll_is_mean_over_tokens_of_positive_responses():
    """Groups of equal rewards have no other gradient; unscored and truncated responses are not imitated."""
    parts = make_tiny_parts()
    rewards = torch.tensor([1.0] * 8 + [0.0] * 8 + [-1.0] * 8 + [0.5] * 7 + [float("nan")])
    config = make_tiny_config(positive_nll_coef=0.25, mask_truncated=True)
    rollouts, scores = sample_rollouts(config, parts, rewards)
    ends = ("stop", "stop", "length")
    cut = [replace(one, finish_reason=ends[row % 3]) for row, one in enumerate(rollouts.completions)]
    rollouts = replace(rollouts, completions=tuple(cut))
    batch, _ = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    imitated = torch.tensor([not cut and r > 0 for cut, r in zip(rollouts.truncated.tolist(), rewards, strict=True)])
    assert 0 < imitated.sum() < 15
    assert find_responses_with_gradient(config, batch, 0.0) == imitated.nonzero().flatten().tolist()
    loss = accumulate_gradients(parts.policy, batch, config, 0.0, UpdateMetrics())
    log_probs = forward(clone_policy(parts.policy), rollouts, 1.0)["log_probs"][
        rollouts.response_mask & imitated[:, None]
    ]
    policy_loss = 0.0  # all advantages are 0
    assert_close(loss.double(), policy_loss - 0.25 * log_probs.double().mean(), rtol=1e-5, atol=1e-6)
    assert "- 0.25 1/(sum_(i: r_i > 0) |o_i|) sum_(i: r_i > 0) sum_t log pi(o_it)" in "\n".join(formula(config))


def test_rejected_tokens_leave_token_counts_if_requested():
    """This holds for a mask of weights as well as for rejection."""
    parts = make_tiny_parts()
    for importance in ("mask", "reject"):
        sums = []
        for counting in ("count", "drop"):
            settings = {"importance": importance, "importance_high": 1.05, "aggregation": "token_mean", **TWO_UPDATES}
            config = make_tiny_config(**settings, rejected_tokens=counting)
            rollouts, scores = sample_rollouts(config, parts)
            noise = torch.rand(rollouts.response_mask.shape, generator=torch.Generator().manual_seed(0)) - 0.5
            rollouts = replace(rollouts, sampler_log_probs=rollouts.sampler_log_probs + 0.4 * noise)
            batch, step_metrics = weigh_step(
                config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None)
            )
            assert 0.2 < step_metrics["kept_tokens"] < 0.9
            sums.append(batch.objective_weights.sum().item())
        assert sums[0] < 0.9
        assert sums[1] == pytest.approx(1.0)


@pytest.mark.parametrize(("level", "high"), [("token", 0.02), ("sequence", 0.2), ("geometric", 0.04)])
def test_importance_measure_rejects_by_divergence(level, high):
    """The rejected are those of which the divergence exceeds the bound, whichever way the probability moved."""
    settings = {"importance": "reject", "importance_level": level, "importance_measure": "k2", "importance_high": high}
    config, parts = make_tiny_config(**settings, **TWO_UPDATES), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    noise = torch.rand(rollouts.response_mask.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    rollouts = replace(rollouts, sampler_log_probs=rollouts.sampler_log_probs + noise)
    batch, step_metrics = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    mask = rollouts.response_mask
    divergence = torch.where(mask, noise, 0.0) ** 2 / 2
    if level != "token":
        divergence = divergence.sum(1, keepdim=True) / (mask.sum(1, keepdim=True) if level == "geometric" else 1)
    near = (divergence <= high) & mask
    assert torch.equal(batch.objective_weights > 0, near)
    assert 0 < near.sum() < mask.sum()
    assert step_metrics["importance_in_bounds"] == pytest.approx((near.sum() / mask.sum()).item())
    assert any(f"log(pi_old / mu)^2 / 2 outside [0, {high:g}] are excluded" in line for line in formula(config))


def test_top_entropy_fraction_trains_on_the_tokens_of_highest_entropy():
    config, parts = make_tiny_config(top_entropy_fraction=0.25), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    prepared = prepare_rollouts(config, parts.policy, None, rollouts, scores, None)
    entropy = forward(parts.policy, rollouts, 1.0, with_entropy=True)["token_entropy"].detach()
    mask = rollouts.response_mask
    assert_close(prepared.old_entropy[mask], entropy[mask], rtol=1e-5, atol=1e-5)
    weighed, step_metrics = weigh_step(config, prepared)
    kept = weighed.objective_weights > 0
    assert step_metrics["kept_tokens"] == pytest.approx(0.25, abs=0.01)
    assert entropy[kept].min() >= entropy[mask & ~kept].max()


def test_rejection_changes_no_advantage():
    """Advantages come from rewards: a rejected response stays in its group."""
    parts, found = make_tiny_parts(), []
    for settings in ({}, {"importance": "reject", "importance_high": 1.01}):
        config = make_tiny_config(**settings)
        rollouts, scores = sample_rollouts(config, parts)
        rollouts = replace(rollouts, sampler_log_probs=rollouts.sampler_log_probs - 1.0)
        prepared = prepare_rollouts(config, parts.policy, None, rollouts, scores, None)
        found.append(prepared.advantages)
    assert found[0].abs().max() > 0.5
    assert torch.equal(*found)


def test_ppo_with_sequence_mean_warns():
    assert "hardly ever binds" in "\n".join(formula(make_tiny_config(loss_type="gspo")))
    across = make_tiny_config(loss_type="grpo_clip", train_batch_size=128, epochs_per_rollout_batch=4)
    assert "N = 32 responses in an update; 1 update on each rollout batch" in "\n".join(formula(across))
    (warning,) = across.warnings
    assert warning.startswith("--train-batch-size 128 is 4 passes over the rollout batch from the same weights")
    assert "--train-batch-size 32 takes 4 off-policy updates instead" in warning
    assert not make_tiny_config(loss_type="grpo_clip", epochs_per_rollout_batch=4).warnings
    assert "hardly ever binds" not in "\n".join(formula(make_tiny_config(loss_type="gspo", cliprange=3e-4)))


def test_formula_with_async_steps_names_sampler():
    config = {"async_steps": 1, "engine": "vllm", "importance": "truncate"}
    assert "mu is the policy before the last update" in "\n".join(formula(make_tiny_config(**config)))
    assert "before the last update" not in "\n".join(formula(make_tiny_config()))


def test_formula_names_each_stage_once():
    lines = formula(make_tiny_config(advantage="reinforce_plus_plus_baseline", loss_type="grpo_clip"))
    assert lines[1] == "B_i      = r_i - mean_group(r)"
    assert lines[2].startswith("A_i      = (B_i - mean) / (std + 1e-08)")
    lines = formula(make_tiny_config(advantage="reinforce_plus_plus", kl_coef=0.1, kl_estimator="k1", kl_in="reward"))
    assert [line.split()[0] for line in lines[1:4]] == ["B_i", "C_it", "A_it"]
    assert lines[4] == "loss_it  = -A_it log pi(o_it)"
    lines = formula(make_tiny_config(loss_type="grpo_clip", dual_clip=3.0))
    assert lines[3].endswith("or -max(min(rho_it A_i, clip(rho_it, 1 - 0.2, 1 + 0.2) A_i), 3 A_i) where A_i < 0")


def test_duplicate_question_is_two_groups(tmp_path):
    """Data may hold a question twice; it makes two groups."""
    completions = [make_completion([1], [4, 5])] * 4
    rollouts = make_rollout_batch(completions, torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    assert rollouts.group_sizes == [2, 2]
    assert rollouts.select([2, 3, 0, 1]).group_sizes == [2, 2]


def test_reward_not_a_number_raises_usage_error(tmp_path):
    with pytest.raises(TrainingAbortedError, match=r"step 1: the reward of 32 responses is not a finite number; "):
        run_training(
            tmp_path, reward_fn=lambda *_: {"reward": float("nan"), "format_reward": 0.0, "answer_reward": 0.0}
        )


ILLEGAL = [
    ({"rollout_batch_size": 36}, "--rollout-batch-size 36: must be a multiple of --group-size 8; pass 32 or 40"),
    ({"rollout_batch_size": 48}, "--rollout-batch-size 48: must be a multiple of --train-batch-size 32"),
    ({"train_batch_size": 48}, "--train-batch-size 48: must be a multiple of --rollout-batch-size 32; pass 32 or 64"),
    (
        {"train_batch_size": 96, "epochs_per_rollout_batch": 4},
        "--train-batch-size 96: takes 3 passes over --rollout-batch-size 32, which --epochs-per-rollout-batch 4 is no "
        "multiple of; pass --train-batch-size 32, or --epochs-per-rollout-batch 3",
    ),
    ({"sampling_min_tokens": 7}, "--sampling-min-tokens 7: must not exceed --sampling-max-tokens 6"),
    ({"lora_alpha": 5}, "--lora-alpha 5: has no effect without LoRA"),
    ({"lora_push": "adapter"}, "--lora-push adapter: has no effect without LoRA; pass --lora-rank too"),
    ({"lora_push": "adapter", "lora_rank": 4}, "pass --lora-push merged, or omit --engine hf"),
    (
        {"lora_push": "adapter", "lora_rank": 4, "engine": "vllm", "rollout_url": ("http://a:1", "http://b:2")},
        "only a vLLM of this program takes an adapter; pass --lora-push merged, or omit --rollout-url http://a:1",
    ),
    ({"learning_rate": float("inf")}, "--learning-rate inf: must be a finite number"),
    ({"learning_rate": 0.0}, "--learning-rate 0.0: must be greater than 0"),
    ({"max_refills": 2, "advantage": "remax"}, "with --advantage remax they have a gradient too"),
    ({"max_refills": 2, "advantage": "gdpo"}, "with --advantage gdpo they have a gradient too"),
    ({"entropy_coef": -0.1}, "--entropy-coef -0.1: must be at least 0"),
    ({"loss_type": "sapo", "sapo_temperatures": (1.0, float("nan"))}, "must be a number"),
    ({"loss_type": "grpo_clip", "cliprange_high": float("nan")}, "--cliprange-high nan: must be a number"),
    ({"loss_type": "cispo", "cliprange": 0.1}, "--cliprange 0.1: has no effect with --loss-type cispo"),
    ({"advantage": "gpg", "advantage_eps": 0.1}, "--advantage-eps 0.1: has no effect with --advantage gpg"),
    ({"async_steps": 1, "engine": "vllm"}, "which nothing corrects; pass --importance truncate"),
    ({"async_steps": 1, "importance": "truncate"}, "--engine hf shares the policy's weights"),
    ({"importance_high": 3.0}, "--importance-high 3.0: has no effect with --importance none"),
    ({"loss_type": "no_baseline", "off_policy_threshold": 0.1}, "--off-policy-threshold 0.1: has no effect"),
    ({"loss_type": "clip_cov", "covariance_bounds": (5.0, 1.0)}, "must be a lower and a higher number"),
    ({"loss_type": "gspo_token", "importance": "truncate"}, "pass --importance-level sequence or geometric"),
    ({"loss_type": "gspo", "aggregation": "token_mean"}, "pass --aggregation sequence_mean"),
    ({"loss_type": "gspo_token", "aggregation": "constant"}, "pass --aggregation sequence_mean"),
    ({"loss_type": "gmpo", "top_entropy_fraction": 0.2}, "has one loss per response"),
    (
        {"advantage": "otb", "loss_type": "gspo"},
        "--advantage otb: gives each token its own advantage, which --loss-type gspo does not accept; pass",
    ),
    ({"advantage": "otb", "off_policy_threshold": 1.0}, "but --advantage otb gives each token its own; omit one"),
    ({"loss_type": "luspo", "importance": "truncate"}, "pass --importance-level sequence or geometric"),
    ({"loss_type": "grpo_clip", "importance": "mask", "old_policy": "sampler"}, "corrects for the sampler twice"),
    ({"importance": "truncate", "sampling_top_p": 0.9}, "renormalizes the sampler"),
    ({"importance": "truncate", "sampling_top_k": 9}, "pass --sampling-replay, or --sampling-top-k 0"),
    ({"importance": "truncate", "sampling_min_p": 0.1}, "pass --sampling-replay, or --sampling-min-p 0"),
    ({"sampling_min_p": 1.5}, "--sampling-min-p 1.5: must be at least 0 and at most 1"),
    ({"sampling_replay": True}, "--sampling-replay: has no effect, because the sampler draws from all tokens"),
    ({"sampling_replay": True, "sampling_top_p": 0.9, "engine": "vllm"}, "pass --sampling-top-k 100"),
    (
        {"loss_type": "grpo_clip", "old_policy": "sampler", "sampling_top_p": 0.9},
        "renormalizes the sampler",
    ),
    ({"importance": "truncate", "sampling_min_tokens": 2}, "hides the end token in the sampler alone"),
    ({"off_policy_threshold": 0.1, "sampling_top_p": 0.5}, "biases --off-policy-threshold 0.1"),
    ({"second_moment_threshold": 0.1, "sampling_top_p": 0.5}, "biases --second-moment-threshold 0.1"),
    ({"loss_type": "gspo", "second_moment_threshold": 0.1}, "--second-moment-threshold 0.1: selects tokens"),
    (
        {"kl_coef": 0.1, "kl_reference": "sampler", "sampling_top_p": 0.5},
        "penalty of --kl-reference sampler",
    ),
    ({"old_policy": "sampler"}, "has no effect with --loss-type reinforce_with_baseline"),
    (
        {"importance": "mask", "importance_low": 3.0},
        "must be between 0 and --importance-high 2.0",
    ),
    ({"importance": "reject", "self_normalize": True}, "which has no weights"),
    (
        {"importance": "mask", "importance_measure": "k3"},
        "--importance-measure k3: has no effect with --importance mask",
    ),
    ({"importance": "reject", "importance_measure": "k2"}, "--importance-measure k2: needs its own bound"),
    ({"kl_reference_steps": 2}, "--kl-reference-steps 2: has no effect without a reference model"),
    ({"kl_coef": 0.1, "kl_reference_share": 0.5}, "--kl-reference-share 0.5: has no effect on a reference that never"),
    (
        {"kl_coef": 0.1, "kl_reference_steps": 2, "lora_rank": 4},
        "the reference is the model without its updates; pass --lora-rank 0",
    ),
    ({"kl_coef": 0.1, "kl_estimator": "k1"}, "expected gradient of 0"),
    ({"kl_coef": 0.1, "kl_in": "reward"}, "--kl-estimator k3: gives a biased gradient with --kl-in reward"),
    ({"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1", "loss_type": "gspo"}, "pass --kl-in loss"),
    (
        {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1", "off_policy_threshold": 0.1},
        "--kl-in reward gives each token its own",
    ),
    ({"loss_type": "cispo", "cliprange_high": 0.3}, "--cliprange-high 0.3: has no effect with --loss-type cispo"),
    ({"loss_type": "cispo", "ratio_low": 6.0}, "--ratio-low 6.0: must not exceed --ratio-high 5.0"),
    ({"advantage": "maxrl", "use_std_normalization": False}, "--no-use-std-normalization: has no effect"),
    ({"advantage": "pkpo", "pass_k": 9}, "--pass-k 9: must not exceed --group-size 8"),
    ({"advantage": "opo", "loss_type": "no_baseline"}, "which uses the rewards themselves"),
    ({"advantage": "maxrl", "length_penalty": "cosine"}, "pass --length-penalty none"),
    ({"advantage": "gdpo", "length_penalty": "cosine"}, "pass --length-penalty none"),
    ({"loss_type": "grpo_clip", "dual_clip": 0.5}, "--dual-clip 0.5: must be greater than 1"),
    ({"loss_type": "grpo_clip", "cliprange_high": -0.1}, "--cliprange-high -0.1: must be at least 0"),
    ({"loss_type": "sapo", "sapo_temperatures": (0.0, 1.0)}, "must be greater than 0"),
    ({"max_refills": 1, "loss_type": "no_baseline"}, "with --loss-type no_baseline they have a gradient too"),
    ({"entropy_target": -1.0}, "--entropy-target -1.0: must be greater than 0"),
    ({"length_penalty": "soft_overlong", "overlong_buffer": 7}, "--overlong-buffer 7: must be between 0 and"),
    ({"overlong_buffer": 2}, "--overlong-buffer 2: has no effect with --length-penalty none"),
    ({"top_entropy_fraction": 0.0}, "--top-entropy-fraction 0.0: must be greater than 0 and at most 1"),
    ({"sampling_top_p": 1.5}, "--sampling-top-p 1.5: must be greater than 0 and at most 1"),
]


@pytest.mark.parametrize(("settings", "message"), ILLEGAL, ids=lambda value: str(value)[:60])
def test_config_illegal_combination_raises_usage_error(settings, message):
    with pytest.raises(UsageError) as refused:
        make_tiny_config(**settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_config_sampling_is_that_of_the_flags():
    drawn = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "min_tokens": 2, "max_tokens": 5}
    drawn["stop"] = ("x",)
    config = make_tiny_config(group_size=4, **{f"sampling_{name}": value for name, value in drawn.items()})
    assert config.sampling == Sampling(n=4, **drawn)
    assert replace(config, sampling_replay=True).sampling == Sampling(n=4, replays=True, **drawn)


def test_config_derives_questions_and_micro_batches():
    config = make_tiny_config(rollout_batch_size=64, group_size=8, train_batch_size=32, gradient_accumulation_steps=2)
    assert (config.n_prompts_per_rollout_batch, config.micro_train_batch_size) == (8, 16)


def test_top_p_samples_likeliest_tokens_only():
    """The log-probs of the engine are renormalized, which is why ratios to them are rejected."""
    config, parts = make_tiny_config(sampling_top_p=0.05), make_tiny_parts()
    prompts = [question.prompt_token_ids for question in parts.questions]
    policy = make_tiny_policy()
    narrow, wide = (
        parts.engine.generate(prompts, sampling, seed=1) for sampling in (config.sampling, make_tiny_config().sampling)
    )
    assert len({t for one in narrow for t in one.token_ids}) < len({t for one in wide for t in one.token_ids})
    rollouts = make_rollout_batch(narrow, torch.zeros(len(narrow)))
    own = forward(policy, rollouts, 1.0)["log_probs"].detach()[rollouts.response_mask]
    assert (rollouts.sampler_log_probs[rollouts.response_mask] > own + 1).all()


def test_remax_baseline_is_greedy_response(tmp_path):
    config, parts = make_tiny_config(advantage="remax"), make_tiny_parts()
    run = make_run(config, tmp_path, parts.tokenizer)
    components = Components(parts.policy, parts.engine, letter_grader, parts.questions, parts.questions)
    collected = collect(config, components, random.Random(0), run, 1, run.timer)
    assert collected.greedy_rewards.shape == (4,)
    batch = make_rollout_batch(collected.completions, collected.rewards)
    batch = prepare_rollouts(config, parts.policy, None, batch, collected.scores, collected.greedy_rewards)
    expected = collected.rewards - collected.greedy_rewards.repeat_interleave(8)
    assert_close(batch.advantages[:, 0], expected)
    run.finish()

"""The loops as a whole: who is asked what, in which order and with which random seeds, and what is logged of it."""

import json
import math
import random
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, groupby, pairwise
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drivers import expert_iteration, sft
from drivers import train as train_program
from drivers.evaluation.policy import EVALUATION_SEED
from drivers.expert_iteration import iterate
from drivers.grading.verdicts import Graded, GradeStatus, make_inline_grader
from drivers.policy.optimizer import PolicyOptimizer
from drivers.settings.imitation import ExpertIterationConfig, SftConfig
from drivers.sft import fine_tune
from drivers.train import train
from drivers.training.rollouts import Group, collect, describe_pass_at_k, sampling_seed
from tests.drivers.helpers.letters import letter_reward, make_tiny_config
from tests.drivers.helpers.runs import (
    LETTER_RESPONSES,
    TINY_EXPERT_ITERATION,
    TINY_SFT,
    RecordingEngine,
    Sampled,
    has_letter,
    make_held_out_questions,
    make_letter_demonstrations,
    run_recorded,
    run_recorded_training,
)
from tests.tiny import make_tiny_tokenizer

TWO_STEPS = {"n_grpo_steps": 2, "eval_steps": 1, "n_logged_completions": 3, "sampling_temperature": 0.9}


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """Return two steps of GRPO with an evaluation after each."""
    return run_recorded_training(tmp_path_factory.mktemp("grpo"), **TWO_STEPS)


def run_recorded_sft(folder, **changes):
    """Fine-tune on ten demonstrations. Return what `run_recorded` returns."""
    demonstrations = make_letter_demonstrations(*LETTER_RESPONSES)
    settings = SftConfig(**TINY_SFT | changes)
    config = settings.as_grpo(len(demonstrations))

    def loop(components, run):
        fine_tune(config, components, demonstrations, run)

    return run_recorded(folder, loop, config, settings)


def run_recorded_expert_iteration(folder, **changes):
    """Run expert iteration. Return what `run_recorded` returns."""
    settings = ExpertIterationConfig(**TINY_EXPERT_ITERATION | changes)

    def loop(components, run):
        iterate(settings, components, run)

    return run_recorded(folder, loop, settings.as_grpo(), settings, has_letter)


@pytest.fixture(scope="module")
def fine_tuning(tmp_path_factory):
    """Return three steps of fine-tuning with an evaluation after the last."""
    return run_recorded_sft(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """Return two steps of expert iteration with an evaluation after the last."""
    return run_recorded_expert_iteration(tmp_path_factory.mktemp("ei"), n_ei_steps=2)


def name_calls(recorded):
    """Return the engine's calls as words, with the weight version of every sample."""
    held_out = [question.prompt_token_ids for question in recorded.components.val_set]
    shown = []
    for call in recorded.engine.calls:
        if isinstance(call, Sampled):
            asked = [tuple(prompt) for prompt in call.prompts]
            purpose = {len(held_out): "evaluate", 4: "check"}[len(asked)] if set(asked) <= set(held_out) else "sample"
            shown.append(f"{purpose} {call.version}")
        else:
            shown.append(call)
    return shown


def list_evaluations(recorded):
    """Return the calls that ask all held-out questions."""
    return [call for call in recorded.engine.sampled if len(call.prompts) == len(recorded.components.val_set)]


def list_rollouts(recorded):
    """Return the calls that ask training questions."""
    asked = {question.prompt_token_ids for question in recorded.components.train_set}
    return [call for call in recorded.engine.sampled if set(map(tuple, call.prompts)) <= asked]


def read_phase(recorded, phase):
    return [row for row in recorded.rows if row["phase"] == phase]


def read_completions(recorded, phase):
    lines = (recorded.folder / "completions.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["phase"] == phase]


# The engine.


def test_train_calls_of_engine_follow_the_algorithm(grpo):
    """Each evaluation and each step samples from the weights of the last update."""
    start = ["push 0", "check 0", "evaluate 0"]
    first = ["sample 0", "sleep", "push 1", "check 1", "evaluate 1"]  # the check is repeated after the first update
    assert name_calls(grpo) == [*start, *first, "sample 1", "sleep", "push 2", "evaluate 2"]


def test_sft_calls_of_engine_follow_the_algorithm(fine_tuning):
    """The engine gets weights for the check and for evaluations only, and sleeps during updates."""
    start = ["push 0", "check 0", "evaluate 0", "sleep"]
    assert name_calls(fine_tuning) == [
        *start,
        *("push 1", "check 1", "sleep"),
        *("push 3", "evaluate 3", "sleep"),
    ]


def test_expert_iteration_calls_of_engine_follow_the_algorithm(expert):
    start = ["push 0", "check 0", "evaluate 0"]
    assert name_calls(expert) == [
        *start,
        "sample 0",
        "sleep",
        "push 1",
        "check 1",
        "sample 1",
        "sleep",
        "push 2",
        "evaluate 2",
    ]


@pytest.mark.parametrize("name", ["grpo", "fine_tuning", "expert"])
def test_evaluations_ask_all_held_out_questions_with_the_same_noise(name, request):
    recorded = request.getfixturevalue(name)
    questions = [question.prompt_token_ids for question in recorded.components.val_set]
    evaluations = list_evaluations(recorded)
    assert len(evaluations) == len(read_phase(recorded, "eval"))
    for call in evaluations:
        assert [tuple(prompt) for prompt in call.prompts] == questions
        assert call.seed == EVALUATION_SEED
        assert call.sampling == replace(recorded.config.sampling, n=1)


@pytest.mark.parametrize("name", ["grpo", "expert"])
def test_steps_ask_different_training_questions_with_their_own_seeds(name, request):
    recorded = request.getfixturevalue(name)
    steps = list_rollouts(recorded)
    assert [call.seed for call in steps] == [sampling_seed(recorded.config, step) for step in (1, 2)]
    for call in steps:
        assert len(set(map(tuple, call.prompts))) == recorded.config.n_prompts_per_rollout_batch
        assert call.sampling == recorded.config.sampling
        assert call.sampling.n == recorded.config.group_size
    assert list(steps[0].prompts) != list(steps[1].prompts)


def test_train_check_asks_for_few_tokens_with_its_own_seed(grpo):
    (before, after) = [
        call for call in grpo.engine.sampled if len(call.prompts) == 4 and call.seed == EVALUATION_SEED - 1
    ]
    assert (before.version, after.version) == (0, 1)
    assert before.sampling.temperature == 0.9
    assert [row["step"] for row in read_phase(grpo, "check")] == [0, 1]


def test_train_other_seed_draws_other_questions_and_samples(tmp_path, grpo):
    other = run_recorded_training(tmp_path, **TWO_STEPS | {"n_grpo_steps": 1, "seed": 1})
    (ours,), theirs = list_rollouts(other), list_rollouts(grpo)[0]
    assert ours.seed != theirs.seed
    assert list(ours.prompts) != list(theirs.prompts)
    same = list_evaluations(other)[0]
    assert [one.token_ids for one in same.completions] == [
        one.token_ids for one in list_evaluations(grpo)[0].completions
    ]


@given(st.integers(-3, 3), st.integers(0, 2), st.integers(1, 64))
def test_sampling_seed_of_each_response_is_used_once(seed, refills, n_prompts):
    """Request k of a round has the random seed of the round plus k, in every step and every round of refills."""
    size = 8 * n_prompts
    sizes = {"rollout_batch_size": size, "train_batch_size": size, "gradient_accumulation_steps": 1}
    used = [
        sampling_seed(make_tiny_config(seed=value, max_refills=refills, **sizes), step, refill)
        for value in (seed, seed + 1)
        for step in range(1, 4)
        for refill in range(refills + 1)
    ]
    used.sort()
    assert used[0] >= 0
    assert all(second - first >= size for first, second in pairwise(used))


def test_pass_at_k_counts_subsets_of_the_scored_responses():
    """Each group has six responses. A group with fewer than k scored ones does not count for k."""
    rewards = [(1.0, 0.0, 0.0, 1.0, 0.0, 0.0), (0.0, 0.5, 0.0, 0.0, 0.0, 0.0), (1.0, 0.0, None, None, None, None)]
    groups = [Group(None, [], [Graded({"reward": r}, GradeStatus.PARSED) for r in row]) for row in rewards]
    expected = {}
    for k in (2, 4, 6):
        scored = [[r for r in row if r is not None] for row in rewards]
        subsets = [[*combinations(row, k)] for row in scored if len(row) >= k]
        expected[f"pass_at_{k}"] = fmean(fmean(1.0 in subset for subset in some) for some in subsets)
    assert describe_pass_at_k(groups) == pytest.approx(expected)
    right = {"reward": 0.5, "answer_reward": 1.0}
    assert describe_pass_at_k([Group(None, [], [Graded(right, GradeStatus.PARSED)] * 2)]) == {"pass_at_2": 1.0}
    assert describe_pass_at_k([Group(None, [], [Graded({"reward": 1.0}, GradeStatus.PARSED)])]) == {}


def collect_once(recorded, config, reward_fn=letter_reward, step=3, version=2):
    """Collect one step's rollouts with the components of a recorded run. Return them and the calls of the engine."""
    engine = RecordingEngine(recorded.components.policy, recorded.run.tokenizer)
    engine.load_weights(version)
    components = replace(recorded.components, engine=engine, grade=make_inline_grader(reward_fn))
    collected = collect(config, components, random.Random(0), recorded.run, step, recorded.run.timer)
    return collected, engine.sampled


def test_collect_refills_have_other_noise_and_skip_kept_questions(grpo):
    """Only groups without signal are asked again, and not with the noise that gave them none."""
    config = make_tiny_config(max_refills=3)
    signal = {"say it 1", "say it 2"}

    def reward(response, ground_truth, question):
        return {"reward": float(len(set(response)) % 3) if question in signal else 0.5}

    collected, calls = collect_once(grpo, config, reward)
    assert [call.seed for call in calls] == [sampling_seed(config, 3, refill) for refill in range(4)]
    assert len({call.seed for call in calls}) == 4
    prompts = {question.prompt_token_ids: question.example.question for question in grpo.components.train_set}
    asked = [{prompts[tuple(prompt)] for prompt in call.prompts} for call in calls]
    found = set()
    for questions in asked:
        assert len(questions) == 4
        assert not questions & found
        found |= questions & signal
    assert found == signal
    assert {prompts[one.prompt_token_ids] for one in collected.completions} == signal
    assert len(collected.completions) == len(collected.scores) == len(collected.rewards) == 16
    assert (collected.metrics["refills"], collected.metrics["missing_groups"]) == (3, 2)
    sampled = [one for call in calls for one in call.completions]
    assert collected.metrics["sampled_tokens"] == sum(len(one.token_ids) for one in sampled)
    assert collected.metrics["response_tokens"] == pytest.approx(fmean(len(one.token_ids) for one in sampled))
    assert collected.metrics["zero_std_groups"] == 14 / 16


def test_collect_refills_skip_rows_that_repeat_a_kept_question(grpo):
    """Rows that are equal are one question, which has its group already."""
    first, *others = grpo.components.train_set
    repeated = SimpleNamespace(**vars(grpo) | {"components": replace(grpo.components, train_set=[first] * 9 + others)})

    def reward(response, ground_truth, question):
        return {"reward": float(len(set(response)) % 3) if question == first.example.question else 0.5}

    _, calls = collect_once(repeated, make_tiny_config(max_refills=2), reward)
    assert first.prompt_token_ids in calls[0].prompts
    assert all(first.prompt_token_ids not in call.prompts for call in calls[1:])


def test_collect_rewards_have_the_length_penalty(grpo):
    """The scores that are logged have none, and neither has the choice of groups."""
    config = make_tiny_config(length_penalty="soft_overlong", overlong_buffer=4)
    collected, _ = collect_once(grpo, config)
    lengths = torch.tensor([len(one.token_ids) for one in collected.completions])
    scores = torch.tensor([one["reward"] for one in collected.scores])
    assert (lengths > 2).any()
    assert torch.allclose(collected.rewards, scores - (lengths - 2).clamp(0, 4) / 4)
    assert collected.metrics["reward"] == pytest.approx(scores.mean().item(), abs=1e-6)
    assert collected.metrics["shaped_reward"] == pytest.approx(collected.rewards.mean().item(), abs=1e-6)


def test_collect_enough_groups_asks_no_more(grpo):
    collected, calls = collect_once(
        grpo, make_tiny_config(max_refills=3), lambda response, _: float(len(set(response)))
    )
    assert len(calls) == 1
    assert collected.metrics["refills"] == collected.metrics["missing_groups"] == 0


def test_collect_remax_baseline_is_sampled_greedily(grpo):
    """One response at temperature 0 to each question of the step, in order, is graded with its own answer."""
    config = make_tiny_config(advantage="remax", sampling_temperature=0.7)

    def reward(response, ground_truth, question):
        return 100.0 * int(question[-1]) + len(set(response))

    collected, (sampled, greedy) = collect_once(grpo, config, reward)
    assert greedy.sampling == replace(config.sampling, n=1, temperature=0.0, top_p=1.0)
    assert list(greedy.prompts) == list(sampled.prompts)
    prompts = {question.prompt_token_ids: question.example.question for question in grpo.components.train_set}
    texts = [one.text for one in greedy.completions]
    expected = [100.0 * int(prompts[tuple(p)][-1]) + len(set(t)) for p, t in zip(greedy.prompts, texts, strict=True)]
    assert collected.greedy_rewards.tolist() == expected
    assert collected.rewards.tolist() == [
        reward(one.text, "a", prompts[one.prompt_token_ids]) for one in collected.completions
    ]
    assert collected.metrics["greedy_reward"] == pytest.approx(fmean(expected))
    tokens = [len(one.token_ids) for one in (*sampled.completions, *greedy.completions)]
    assert collected.metrics["sampled_tokens"] == sum(tokens)  # but the lengths are those of the rollouts
    assert collected.metrics["response_tokens"] == fmean(tokens[:32])


def test_collect_times_sampling_and_grading_apart(grpo):
    phases, current = [], []

    class Timer:
        @contextmanager
        def phase(self, name):
            current.append(name)
            yield
            current.pop()

    class Engine(RecordingEngine):
        def generate(self, prompts, sampling, *, seed):
            phases.append(("generate", *current))
            return super().generate(prompts, sampling, seed=seed)

    def grade(responses, ground_truths):
        phases.append(("grade", *current))
        return make_inline_grader(letter_reward)(responses, ground_truths)

    engine = Engine(grpo.components.policy, grpo.run.tokenizer)
    components = replace(grpo.components, engine=engine, grade=grade)
    collect(make_tiny_config(advantage="remax"), components, random.Random(0), grpo.run, 1, Timer())
    assert phases == [("generate", "rollout"), ("grade", "reward")] * 2


def test_collect_staleness_is_steps_since_the_sampling_weights(grpo):
    """The rollouts of step 5 from the weights of step 2 are two steps old: fresh ones have the weights of step 4."""
    collected, _ = collect_once(grpo, make_tiny_config(), step=5, version=2)
    assert collected.metrics["staleness"] == 2.0
    assert collected.metrics["rollout_entropy"] == pytest.approx(
        -fmean(value for one in collected.completions for value in one.log_probs)
    )


# Updates.


@contextmanager
def record_updates(program):
    """Record the updates of a loop instead of making them: settings, batch, step and the other arguments."""
    updates = []

    def update(config, policy, batch, run, step, metrics, *others):
        updates.append((config, batch, step, others))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "update", update)
        yield updates


@pytest.mark.parametrize("name", ["train", "expert_iteration"])
def test_each_epoch_has_its_own_order_of_groups(tmp_path, name):
    """Every epoch trains on every response once, in batches of the requested size."""
    if name == "train":
        settings = {"epochs_per_rollout_batch": 3, "train_batch_size": 16, "gradient_accumulation_steps": 2}
        with record_updates(train_program) as updates:
            run_recorded_training(tmp_path, n_grpo_steps=1, **settings)
        size = 16
    else:
        with record_updates(expert_iteration) as updates:
            run_recorded_expert_iteration(tmp_path, n_ei_steps=1, epochs=3, train_batch_size=2)
        size = 2
    batches = [batch for _, batch, _, _ in updates]
    per_epoch = len(batches) // 3
    assert {len(batch) for batch in batches[: per_epoch - 1]} == {size}
    epochs = [
        [one for batch in batches[start : start + per_epoch] for one in batch.completions]
        for start in range(0, len(batches), per_epoch)
    ]
    assert len(epochs) == 3
    tokens = [[(one.prompt_token_ids, one.token_ids) for one in epoch] for epoch in epochs]
    assert sorted(tokens[0]) == sorted(tokens[1]) == sorted(tokens[2])
    assert len({tuple(epoch) for epoch in tokens}) > 1


def test_train_update_gets_the_prepared_rollouts(tmp_path, monkeypatch):
    """Advantages, old and reference log-probs stay at their responses in every batch and epoch."""
    prepared, prepare = [], train_program.prepare_rollouts

    def recorded(*arguments):
        prepared.append(prepare(*arguments))
        return prepared[-1]

    monkeypatch.setattr(train_program, "prepare_rollouts", recorded)
    settings = {"n_grpo_steps": 1, "loss_type": "grpo_clip", "epochs_per_rollout_batch": 2, "kl_coef": 0.1}
    settings |= {"train_batch_size": 16, "gradient_accumulation_steps": 2, "entropy_coef": 0.03}
    with record_updates(train_program) as updates:
        run_recorded_training(tmp_path, **settings)
    (whole,) = prepared
    row_of = {id(one): row for row, one in enumerate(whole.completions)}
    assert len(updates) == 4
    for config, batch, step, (anomalies, entropy_coef) in updates:
        assert (config.loss_type, step, list(anomalies), entropy_coef) == ("grpo_clip", 1, [], 0.03)
        rows = [row_of[id(one)] for one in batch.completions]
        width = batch.response_mask.shape[1]
        for name in ("advantages", "rewards"):
            assert torch.equal(getattr(batch, name), getattr(whole, name)[rows])
        for name in ("response_mask", "sampler_log_probs", "old_log_probs", "reference_log_probs"):
            assert torch.equal(getattr(batch, name), getattr(whole, name)[rows, :width])
        assert not batch.old_log_probs.isnan().any()


def test_train_entropy_coefficient_of_the_update_is_the_logged_one(tmp_path):
    with record_updates(train_program) as updates:
        recorded = run_recorded_training(tmp_path, n_grpo_steps=2, entropy_target=9.0, entropy_coef=0.01)
    assert [others[1] for *_, others in updates] == pytest.approx([0.015, 0.02])
    rows = [row for row in recorded.rows if row["phase"] == "train"]
    assert [row["entropy_coef"] for row in rows] == pytest.approx([0.015, 0.02])


def test_train_anomaly_of_the_rollouts_reaches_each_update(tmp_path):
    with record_updates(train_program) as updates:
        run_recorded_training(tmp_path, n_grpo_steps=1, sampling_max_tokens=1, epochs_per_rollout_batch=2)
    assert [[one.kind for one in others[0]] for *_, others in updates] == [["all_truncated"]] * 2


def test_sft_updates_take_the_batches_of_the_seed(tmp_path):
    """Each epoch takes every demonstration once; the loss has temperature 1 and no entropy bonus."""
    taken = []
    for seed in (0, 1):
        with record_updates(sft) as updates:
            run_recorded_sft(tmp_path / str(seed), epochs=2, seed=seed, sampling_temperature=0.5)
        assert [len(batch) for _, batch, _, _ in updates] == [4, 4, 2] * 2
        assert [step for _, _, step, _ in updates] == [1, 2, 3, 4, 5, 6]
        assert {config.sampling_temperature for config, *_ in updates} == {1.0}
        taken.append([[one.token_ids for one in batch.completions] for _, batch, _, _ in updates])
    everything = sorted(one.response_token_ids for one in make_letter_demonstrations(*LETTER_RESPONSES))
    for batches in taken:
        for epoch in (batches[:3], batches[3:]):
            assert sorted(one for batch in epoch for one in batch) == everything
        assert batches[:3] != batches[3:]
    assert taken[0] != taken[1]


# The log.


@pytest.mark.parametrize("name", ["grpo", "fine_tuning", "expert"])
def test_logged_accuracy_is_that_of_the_held_out_responses(name, request):
    recorded = request.getfixturevalue(name)
    reward = has_letter if name == "expert" else lambda *texts: letter_reward(*texts)["reward"]
    expected = [fmean(reward(one.text, "b") for one in call.completions) for call in list_evaluations(recorded)]
    rows = read_phase(recorded, "eval")
    assert [row["accuracy"] for row in rows] == pytest.approx(expected)
    assert [row["n_examples"] for row in rows] == [5] * len(rows)
    assert recorded.run.state.accuracies == {row["step"]: row["accuracy"] for row in rows}


OWN_EVALUATION = {
    "val_data_path": ("first.jsonl", "second.jsonl"),
    "n_grpo_steps": 1,
    "sampling_min_tokens": 1,
    "eval_samples": 4,
    "eval_temperature": 0.5,
    "eval_top_p": 0.9,
    "eval_max_tokens": 3,
    "n_logged_completions": 2,
}


def letter_or_nothing(response, ground_truth):
    return {"reward": float(ground_truth in response), "format_reward": float(len(response) > 2)}


def test_evaluation_asks_each_set_with_its_own_settings(tmp_path):
    """Metrics of sets after the first have their name; only the first decides which checkpoint is the best."""
    config = make_tiny_config(**OWN_EVALUATION)
    second = make_held_out_questions(make_tiny_tokenizer(), n=7)[5:]
    second = [replace(q, example=replace(q.example, answer="")) for q in second]  # which every response contains
    recorded = run_recorded(
        tmp_path,
        lambda components, run: train(config, components, run),
        config,
        reward_fn=letter_or_nothing,
        other_val_sets={"second": second},
    )
    asked = [call for call in recorded.engine.sampled if call.seed == EVALUATION_SEED]
    assert [len(call.prompts) for call in asked] == [5, 2, 5, 2]
    plain = config.sampling
    for call in asked:
        assert call.sampling == replace(plain, n=4, temperature=0.5, top_p=0.9, max_tokens=3)
        assert (plain.n, plain.temperature, plain.top_p, plain.max_tokens) == (8, 1.0, 1.0, 6)
    rows = read_phase(recorded, "eval")
    assert recorded.run.state.accuracies == {row["step"]: row["accuracy"] for row in rows}
    assert all(row["accuracy"] < row["second/accuracy"] == 1 for row in rows)
    for number, row in enumerate(rows):
        for prefix, call in (("", asked[2 * number]), ("second/", asked[2 * number + 1])):
            right = [("" if prefix else "b") in one.text for one in call.completions]
            groups = [right[start : start + 4] for start in range(0, len(right), 4)]
            expected = {
                "accuracy": fmean(right),
                "avg_at_4": fmean(right),
                "pass_at_4": fmean(map(any, groups)),
                "pass_at_2": fmean(fmean(any(pair) for pair in combinations(group, 2)) for group in groups),
                "format_reward": fmean(len(one.text) > 2 for one in call.completions),
                "n_examples": len(groups),
            }
            assert {key: row[f"{prefix}{key}"] for key in expected} == pytest.approx(expected)
            assert row[f"{prefix}pass_at_4_low"] <= row[f"{prefix}pass_at_4"] <= row[f"{prefix}pass_at_4_high"]
        of_first = {key for key in row if "/" not in key} - {"phase", "step", "time_evaluate_s"}
        assert {key.removeprefix("second/") for key in row if "/" in key} == of_first
    logged = read_completions(recorded, "eval")
    shown = ["spell 1", "spell 2", "spell 6", "spell 7"]  # the first response to each question
    assert [(row["dataset"], row["question"]) for row in logged] == 2 * list(
        zip(["first", "first", "second", "second"], shown, strict=True)
    )
    assert [row["response"] for row in logged[:2]] == [asked[0].completions[at].text for at in (0, 4)]
    assert all(len(row["tokens"]) == row["response_tokens"] for row in logged)


def test_run_summary_names_first_and_last_accuracy(grpo, monkeypatch):
    monkeypatch.setattr(grpo.run.state, "accuracies", {0: 0.25, 1: 0.75, 2: 0.5})
    assert grpo.run.summary() == "held-out accuracy 0.250 before the first step, 0.500 after step 2"


def test_logged_completions_are_the_first_of_the_step_and_of_the_evaluation(grpo):
    evaluated, trained = read_completions(grpo, "eval"), read_completions(grpo, "train")
    assert [row["step"] for row in evaluated] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["question"] for row in evaluated] == ["spell 1", "spell 2", "spell 3"] * 3
    assert {row["answer"] for row in evaluated} == {"b"}
    assert [row["step"] for row in trained] == [1, 1, 1, 2, 2, 2]
    sampled = [one.text for call in list_rollouts(grpo) for one in call.completions[:3]]
    assert [row["response"] for row in trained] == sampled
    assert {row["answer"] for row in trained} == {"a"}


@pytest.mark.parametrize("name", ["grpo", "fine_tuning", "expert"])
def test_logged_step_has_its_rate_times_and_speeds(name, request):
    recorded = request.getfixturevalue(name)
    steps = read_phase(recorded, "train")
    assert [row["step"] for row in steps] == list(range(1, recorded.config.n_grpo_steps + 1))
    for row in steps:
        assert row["learning_rate"] == recorded.config.learning_rate
        assert row["update_tokens_per_s"] == pytest.approx(row["trained_tokens"] / row["time_update_s"])
        if name != "fine_tuning":
            assert row["rollout_tokens_per_s"] == pytest.approx(row["sampled_tokens"] / row["time_rollout_s"])
    common = {"time_update_s"}
    if name != "fine_tuning":
        common |= {"time_push_s", "time_rollout_s", "time_reward_s"}
    timed = [{key for key in row if key.startswith("time_")} for row in steps]
    evaluated = [row["step"] for row in read_phase(recorded, "eval")]
    for row, names in zip(steps, timed, strict=True):
        own = {"time_check_s"} if row["step"] == 1 else set()
        own |= {"time_evaluate_s"} if row["step"] in evaluated else set()
        own |= {"time_push_s"} if own else set()
        assert names == common | own
    for row in read_phase(recorded, "eval"):
        assert row["time_evaluate_s"] > 0


RISING_AND_FALLING = {"warmup_steps": 1, "lr_schedule": "linear", "learning_rate": 1e-2}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("record", "settings", "n_updates"),
    [
        (run_recorded_training, {"n_grpo_steps": 3, "train_batch_size": 16}, [2, 2, 2]),
        (run_recorded_sft, {}, [1, 1, 1]),
        (run_recorded_expert_iteration, {"n_ei_steps": 3, "train_batch_size": 2}, None),
    ],
    ids=["grpo", "sft", "expert"],
)
def test_updates_have_the_learning_rate_of_their_step(tmp_path, monkeypatch, record, settings, n_updates):
    """A run has three steps: the first is the warm-up, and the last has half of the rate."""
    made, step = [], PolicyOptimizer.step
    monkeypatch.setattr(PolicyOptimizer, "step", lambda self, rate: made.append(rate) or step(self, rate))
    recorded = record(tmp_path, **RISING_AND_FALLING | settings)
    rates = [row["learning_rate"] for row in read_phase(recorded, "train")]
    assert rates == [0.5e-2, 1e-2, 0.5e-2]
    runs = [(rate, len(list(equal))) for rate, equal in groupby(made)]
    assert [rate for rate, _ in runs] == rates
    assert [count for _, count in runs] == n_updates or (n_updates is None and max(runs)[1] > 1)


def test_logged_rewards_are_those_of_the_sampled_responses(grpo):
    for row, call in zip(read_phase(grpo, "train"), list_rollouts(grpo), strict=True):
        rewards = [letter_reward(one.text, "a")["reward"] for one in call.completions]
        assert row["reward"] == pytest.approx(fmean(rewards))
        assert row["sampled_tokens"] == row["trained_tokens"] == sum(len(one.token_ids) for one in call.completions)
        assert row["truncated"] == fmean(one.finish_reason == "length" for one in call.completions)
        assert row["staleness"] == 0
        assert row["sampler_log_prob_diff"] < 1e-4  # the policy is scored at the temperature of the sampler
        assert math.isfinite(row["loss"])


def test_sft_log_has_the_demonstrations_of_the_step(fine_tuning):
    rows = read_completions(fine_tuning, "train")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 2
    assert sorted(row["response"].replace("<eos>", "") for row in rows) == sorted(LETTER_RESPONSES)

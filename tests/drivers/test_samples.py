"""completions.jsonl holds for each token what the policy and the sampler computed."""

import json
import math
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from drivers.engines.protocol import Completion
from drivers.runs.completions import round_for_log, token_texts, with_values
from drivers.training.batch import StepRollouts
from drivers.training.forward import forward
from drivers.training.metrics import UpdateMetrics
from grpo_core import normalize_group_rewards
from tests.drivers.helpers.letters import (
    letter_reward,
    make_batch,
    make_completion,
    make_tiny_config,
    make_tiny_parts,
    sample_rollouts,
)
from tests.drivers.helpers.runs import (
    make_letter_demonstrations,
    read_rows,
    run_expert_iteration,
    run_sft,
    run_training,
)


def read_logged_completions(folder, phase="train", step=None):
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase and step in (None, row["step"])]


class ByteTokenizer:
    """A tokenizer in which a byte is a token and a leading space is lost, as in byte-level tokenizers."""

    def __init__(self):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self._tokenizer = Tokenizer(models.BPE({letter: k for k, letter in enumerate(alphabet)}, []))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()

    def encode(self, text):
        return self._tokenizer.encode(text).ids

    def decode(self, ids):
        return self._tokenizer.decode(list(ids), skip_special_tokens=False).removeprefix(" ")


def test_token_texts_multi_token_character_is_in_last_token():
    tokenizer = ByteTokenizer()
    for text in ("", "a b", "Grüße, 世界 🙂!", "  x", "🙂" * 3):
        texts = token_texts(tokenizer, tokenizer.encode(text))
        assert len(texts) == len(text.encode())
        assert "".join(texts) == text.removeprefix(" ")
    assert token_texts(tokenizer, tokenizer.encode("a🙂b")) == ["a", "", "", "", "🙂", "b"]
    assert token_texts(tokenizer, tokenizer.encode("a🙂")[:3]) == ["a", "", "\N{REPLACEMENT CHARACTER}"]
    assert token_texts(tokenizer, tokenizer.encode("x y"))[1:] == [" ", "y"]


def test_round_for_log_is_short_and_null_for_nan():
    assert round_for_log([-1.23456789, 0.0, math.nan, -math.inf]) == [-1.2346, 0.0, None, None]
    row = {"tokens": ["a", "b"]}
    assert with_values(row, {"entropy": [1.0, 2.0]}, [0.5]) == row | {"entropy": [1.0, 2.0], "advantage": 0.5}
    assert with_values(row, {}, [0.5, math.nan, 7.0])["advantage"] == [0.5, None]
    assert with_values(row, {}, None) == row


def test_logged_completions_hold_trained_values(tmp_path):
    """Texts, rewards and group advantages; the policy's log-probs before the update are the sampler's."""
    run_training(tmp_path, n_grpo_steps=2, n_logged_completions=10, eval_steps=2)
    for step in (1, 2):
        rows = read_logged_completions(tmp_path, step=step)
        assert len(rows) == 10
        assert [row["question"] for row in rows[:8]] == [rows[0]["question"]] * 8
        assert rows[8]["question"] == rows[9]["question"] != rows[0]["question"]
        rewards = torch.tensor([row["reward"] for row in rows[:8]])
        assert rewards.tolist() == [letter_reward(row["response"], "a")["reward"] for row in rows[:8]]
        expected = normalize_group_rewards(rewards, 8).tolist()
        assert [row["advantage"] for row in rows[:8]] == pytest.approx(expected, abs=1e-4)
        for row in rows:
            assert re.sub("<eos>|<pad>", "", "".join(row["tokens"])) == row["response"]
            assert len(row["tokens"]) == row["response_tokens"] == len(row["sampler_log_probs"])
            assert ("log_probs" in row) == ("entropy" in row) == (row["advantage"] != 0)
            if "log_probs" in row:
                assert row["log_probs"] == pytest.approx(row["sampler_log_probs"], abs=2e-4)
                assert all(0 <= value <= math.log(101) for value in row["entropy"])
                assert len(row["entropy"]) == row["response_tokens"]
    assert any("log_probs" in row for row in read_logged_completions(tmp_path))
    evaluated = read_logged_completions(tmp_path, "eval")
    assert [row["step"] for row in evaluated] == [0] * 4 + [2] * 4
    assert all(re.sub("<eos>|<pad>", "", "".join(row["tokens"])) == row["response"] for row in evaluated)
    assert all("sampler_log_probs" in row and "advantage" not in row for row in evaluated)


def test_logged_completions_hold_first_pass_values(tmp_path):
    """Micro-batches reorder responses, and later epochs have other weights."""
    config, parts = make_tiny_config(), make_tiny_parts()
    rollouts, _ = sample_rollouts(config, parts)
    expected = forward(parts.policy, rollouts, 1.0, with_entropy=True)
    metrics = UpdateMetrics(rollouts.completions[:3])
    for epoch in range(2):
        for rows in ([9, 2, 0], [1, 5]):
            micro = rollouts.select(rows)
            token_values = forward(parts.policy, micro, 1.0, with_entropy=True)
            token_values = {name: values.detach() + epoch for name, values in token_values.items()}
            metrics.add_micro_batch(micro, token_values, {"response_tokens": micro.response_mask.sum().float()})
        metrics.add_update(torch.zeros(()), torch.zeros(()), {})
    metrics.summary()
    found = metrics.logged_token_values()
    assert len(found) == 3
    for place, values in enumerate(found):
        length = len(rollouts.completions[place].token_ids)
        for name, key in (("log_probs", "log_probs"), ("entropy", "token_entropy")):
            assert values[name] == pytest.approx(expected[key][place, :length].tolist(), abs=1e-5)
    assert UpdateMetrics(make_batch(([1], [4, 4])).completions).logged_token_values() == [
        {}
    ]  # without a pass there are no values


def test_logged_completions_hold_token_advantages(tmp_path):
    settings = {"advantage": "reinforce_plus_plus", "kl_in": "reward", "kl_coef": 0.5, "kl_estimator": "k1"}
    run_training(tmp_path, n_grpo_steps=1, learning_rate=1e-3, **settings)
    for row in read_logged_completions(tmp_path):
        assert len(row["advantage"]) == row["response_tokens"]


@pytest.mark.slow
def test_logged_completions_of_sft_and_expert_iteration(tmp_path):
    run_sft(
        tmp_path / "sft", make_letter_demonstrations("abab", "ba", "b"), train_batch_size=2, n_logged_completions=1
    )
    first, second = read_logged_completions(tmp_path / "sft")
    steps = read_rows(tmp_path / "sft")
    likelihoods = [row["nll"] for row in steps if row["phase"] == "train"]
    assert not {"reward", "sampler_log_probs", "advantage"} & first.keys()
    assert second["response"] == "".join(second["tokens"])
    assert second["response_tokens"] == len(second["log_probs"]) == len(second["entropy"])
    assert -sum(second["log_probs"]) / len(second["log_probs"]) == pytest.approx(likelihoods[1], abs=1e-4)
    run_expert_iteration(tmp_path / "ei", n_ei_steps=1, n_logged_completions=64)
    rows = read_logged_completions(tmp_path / "ei")
    assert len(rows) == 64
    assert 0 < sum("log_probs" in row for row in rows) == sum(row["reward"] == 1 for row in rows) < 64


def test_step_rollouts_json_keeps_logged_rows():
    rows = [{"question": "q", "reward": 1.0, "tokens": ["a"], "sampler_log_probs": [-0.5]}]
    one = Completion("a", (1,), (2,), (-0.5,), "stop")
    collected = StepRollouts([one, make_completion([1], [3])], [{"reward": 1.0}] * 2, torch.ones(2), None, {}, rows)
    again = StepRollouts.from_json(json.loads(json.dumps(collected.to_json())))
    assert again.logged_rows == rows
    assert again.logged_completions == [one]
    older = collected.to_json()
    del older["shown"]
    assert StepRollouts.from_json(older).logged_completions == []

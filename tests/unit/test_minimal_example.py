"""The example that explains GRPO in one file: it is short, stands alone, and takes the step that it explains."""

import ast
import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

from grpo_core import get_response_log_probs, normalize_group_rewards
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

EXAMPLE = Path(__file__).resolve().parents[2] / "docs/examples/minimal_grpo.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("minimal_grpo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share_of_vowels(response: str, _: str) -> dict[str, float]:
    """A reward that differs between the responses of a random model."""
    return {"reward": sum(letter in "aeiou" for letter in response) / 32}


def test_example_is_short_and_imports_no_driver():
    source = EXAMPLE.read_text()
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert len(source.splitlines()) <= 200
    assert {name.split(".")[0] for name in imported} & {"grpo_core", "drivers", "vllm"} == {"grpo_core"}


def test_sample_with_prompts_of_different_lengths_returns_log_probs_of_the_policy(example):
    """Of exactly the sampled tokens: left padding changes nothing, and a response ends at its end token."""
    policy, tokenizer = make_tiny_policy(), make_tiny_tokenizer()
    prompts = ["2 + 2 =", "a much longer prompt: 40 + 2 ="]
    torch.manual_seed(0)
    responses = example.sample(policy, tokenizer, prompts, 16, 100)
    assert len(responses) == 32
    lengths = {len(response.token_ids) for response in responses}
    assert min(lengths) < 100 == max(lengths)
    for response, prompt in zip(responses, [p for p in prompts for _ in range(16)], strict=True):
        n = len(response.token_ids)
        ended = response.token_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in response.token_ids[:-1]
        assert ended == (n < 100)
        assert response.text == tokenizer.decode(response.token_ids, skip_special_tokens=True)
        ids = torch.tensor([tokenizer.encode(prompt) + response.token_ids])
        with torch.no_grad():
            expected = get_response_log_probs(policy, ids[:, :-1], ids[:, 1:])["log_probs"][0, -n:]
        torch.testing.assert_close(response.log_probs, expected, rtol=1e-4, atol=1e-4)


def test_count_response_tokens_stops_at_end_token_or_stop_string(example):
    tokenizer = make_tiny_tokenizer()
    answer = tokenizer.encode("5 </answer>")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert example.count_response_tokens(tokenizer, [*answer, end, end]) == len(answer)  # the end token as padding
    assert example.count_response_tokens(tokenizer, [*answer[:4], end, pad, pad]) == 5
    assert example.count_response_tokens(tokenizer, answer[:4]) == 4


def test_train_step_with_one_group_takes_the_gradient_of_its_advantages(example, monkeypatch):
    """On-policy the gradient is that of the mean over responses of -A times the mean log-prob of its tokens."""
    monkeypatch.setattr(example, "r1_zero_reward_fn", share_of_vowels)
    policy, tokenizer = make_tiny_policy(), make_tiny_tokenizer()
    args = example.parse_arguments(["--group-size", "6", "--max-tokens", "8"])
    prompts = ["2 + 2 =", "a longer one: 3 + 4 ="]
    examples = [{"prompt": prompt, "answer": ""} for prompt in prompts]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    gradient: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(
        optimizer, "step", lambda: gradient.update({n: p.grad.clone() for n, p in policy.named_parameters()})
    )
    torch.manual_seed(0)
    metrics = example.train_step(policy, tokenizer, optimizer, examples, args)
    torch.manual_seed(0)
    responses = example.sample(policy, tokenizer, prompts, 6, 8)
    rewards = torch.tensor([share_of_vowels(response.text, "")["reward"] for response in responses])
    advantages = normalize_group_rewards(rewards, 6)
    torch.testing.assert_close(advantages.reshape(2, 6).sum(1), torch.zeros(2), rtol=0, atol=1e-5)
    assert advantages.reshape(2, 6).any(dim=1).all()
    loss = torch.zeros(())
    for response, advantage, prompt in zip(responses, advantages, [p for p in prompts for _ in range(6)], strict=True):
        ids = torch.tensor([tokenizer.encode(prompt) + response.token_ids])
        log_probs = get_response_log_probs(policy, ids[:, :-1], ids[:, 1:])["log_probs"][0, -len(response.token_ids) :]
        loss = loss - advantage * log_probs.mean() / 12
    policy.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-4)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_main_with_two_steps_changes_the_policy_and_prints_finite_numbers(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(example, "r1_zero_reward_fn", share_of_vowels)
    model = str(save_tiny(tmp_path / "model"))
    flags = ["--prompts-per-step", "2", "--group-size", "4", "--max-tokens", "8", "--eval-questions", "4"]
    policy = example.main(example.parse_arguments(["--model", model, "--device", "cpu", "--steps", "2", *flags]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1", "step 2", "step 2"]
    for line in lines[1:3]:
        metrics = {name: float(value) for name, value in re.findall(r"(\w+) (\S+)  ", line)}
        assert metrics.keys() == {"reward", "signal", "ratio", "loss", "grad_norm"}
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["ratio"] == 1
    weights = zip(make_tiny_policy().parameters(), policy.parameters(), strict=True)
    assert all(not torch.equal(before, after) for before, after in weights)

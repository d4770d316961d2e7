"""The public surface: names, the signatures that CS336 A5 fixed, and the shape check on every function."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

import grpo_core

# Parameter names in order; those that came after the named API are keyword-only and stand behind the bar.
SIGNATURES = {
    "tokenize_prompt_and_output": "prompt_strs output_strs tokenizer",
    "compute_group_normalized_rewards": (
        "reward_fn rollout_responses repeated_ground_truths group_size advantage_eps normalize_by_std"
    ),
    "compute_entropy": "logits | temperature=1.0 kept_ids=None excluded_ids=None",
    "get_response_log_probs": (
        "model input_ids labels return_token_entropy=False | temperature=1.0 response_mask=None detach_entropy=False"
    ),
    "compute_naive_policy_gradient_loss": "raw_rewards_or_advantages policy_log_probs | response_mask=None",
    "compute_grpo_clip_loss": (
        "advantages policy_log_probs old_log_probs cliprange | cliprange_high=None dual_clip=None response_mask=None"
    ),
    "compute_policy_gradient_loss": (
        "policy_log_probs loss_type raw_rewards=None advantages=None old_log_probs=None cliprange=None"
        " | response_mask=None"
    ),
    "masked_mean": "tensor mask dim=None",
    "masked_normalize": "tensor mask normalize_constant=1.0 dim=None",
    "grpo_microbatch_train_step": (
        "policy_log_probs response_mask gradient_accumulation_steps loss_type raw_rewards=None advantages=None"
        " old_log_probs=None cliprange=None | aggregation='sequence_mean' normalize_constant=None group_sizes=None"
    ),
    "sft_microbatch_train_step": ("policy_log_probs response_mask gradient_accumulation_steps normalize_constant=1.0"),
    "r1_zero_reward_fn": "response ground_truth",
    "think_answer_reward_fn": "response ground_truth",
    "question_only_reward_fn": "response ground_truth",
}
FUNCTIONS = [name for name in grpo_core.__all__ if inspect.isfunction(getattr(grpo_core, name))]


def written(function) -> str:
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "|" not in words:
            words.append("|")
        words.append(
            parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
        )
    return " ".join(words)


@pytest.mark.parametrize("name", SIGNATURES)
def test_named_function_keeps_its_signature(name):
    assert written(getattr(grpo_core, name)) == SIGNATURES[name]


def test_microbatch_loss_has_signature_of_train_step():
    assert written(grpo_core.grpo_microbatch_loss) == SIGNATURES["grpo_microbatch_train_step"]
    assert written(grpo_core.sft_microbatch_loss) == SIGNATURES["sft_microbatch_train_step"]


def test_public_names_are_sorted_and_complete():
    assert list(grpo_core.__all__) == sorted(grpo_core.__all__)
    assert set(SIGNATURES) <= set(grpo_core.__all__)
    tree = ast.parse(Path(grpo_core.__file__).read_text())
    seen_by_type_checkers = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    } - {"TYPE_CHECKING", "Any"}
    assert seen_by_type_checkers == set(grpo_core.__all__)
    assert all(hasattr(grpo_core, name) for name in grpo_core.__all__)
    assert set(grpo_core.__all__) | {"losses", "grading", "__version__"} <= set(dir(grpo_core))
    assert not hasattr(grpo_core, "compute_loss")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_function_checks_shapes_and_has_example(name):
    function = getattr(grpo_core, name)
    assert hasattr(function, "__wrapped__"), "decorate it with @shape_checked"
    assert function.__doc__
    assert "Examples:" in function.__doc__ or "References:" in function.__doc__


def test_inconsistent_shapes_raise():
    """A vector of advantages would broadcast without a word wherever batch and seq agree."""
    with pytest.raises(TypeError, match="raw_rewards_or_advantages"):
        grpo_core.compute_naive_policy_gradient_loss(torch.zeros(3), torch.zeros(3, 3))
    with pytest.raises(TypeError, match="mask"):
        grpo_core.masked_mean(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(TypeError, match="old_log_probs"):
        grpo_core.compute_grpo_no_clip_loss(torch.zeros(2, 1), torch.zeros(2, 3), torch.zeros(2, 4))


def test_loss_compiles_into_one_graph():
    """`fullgraph` refuses a break: the shape check must step aside, and the errors must not be in the way."""

    def loss_of(log_probs, mask, advantages, old):
        return grpo_core.grpo_microbatch_loss(
            log_probs, mask, 2, "grpo_clip", None, advantages, old, 0.2, aggregation="constant", normalize_constant=4.0
        )

    inputs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]]), torch.ones(1, 1), torch.full((1, 2), -1.5)
    loss, metadata = torch.compile(loss_of, fullgraph=True, backend="eager")(*inputs)
    expected, expected_metadata = loss_of(*inputs)
    torch.testing.assert_close([loss, metadata], [expected, expected_metadata])


def test_shape_check_is_skipped_while_compiling(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert grpo_core.compute_naive_policy_gradient_loss(torch.ones(3), torch.ones(3, 3)).shape == (3, 3)


def test_vmap_of_grad_matches_closed_form():
    """vmap over per-example gradients, as a reader of JAX would try first."""
    logits, labels = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 1])
    gradients = torch.func.vmap(torch.func.grad(grpo_core.select_log_probs))(logits, labels)
    one_hot = torch.nn.functional.one_hot(labels)
    torch.testing.assert_close(gradients, one_hot - logits.softmax(dim=1))

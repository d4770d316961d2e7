"""The memory plan against what a pass really keeps, and gradient checkpointing that changes nothing but that."""

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from drivers import scoring
from drivers.batch import make_rollout_batch
from drivers.errors import UsageError
from drivers.memory import GIB, MemoryPlan, enable_checkpointing, head_bytes, most_tokens, plan_memory
from drivers.optim import PolicyOptimizer, training_state_bytes
from drivers.rollout import HFEngine, Sampling
from drivers.scoring import score
from tests.drivers.parts import clone_policy, completion, tiny_config, tiny_parts


def make_policy(attention="sdpa", dtype=torch.float32, dropout=0.0):
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def kept_bytes(policy, rows, row):
    """What autograd keeps for a pass over `rows` responses in rows of `row` tokens, weights and logits left out."""
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    rollouts = make_rollout_batch([completion([5 + k] * (row - 8), [9] * 8) for k in range(rows)], torch.zeros(rows))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        score(policy, rollouts, 1.0, with_entropy=True)["log_probs"].sum()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_is_near_what_a_pass_keeps(attention, dtype):
    policy, row = make_policy(attention, dtype), 128
    config = tiny_config(
        sampling_max_tokens=8, rollout_batch_size=8, group_size=8, train_batch_size=8, gradient_accumulation_steps=2
    )
    plan = plan_memory(config, policy, row - 8)
    assert most_tokens(config, row - 8) == 4 * row
    assert 0.75 < plan.activations / kept_bytes(policy, 4, row) < 1.5


def test_the_state_of_training_is_counted_to_the_byte():
    for dtype in (torch.float32, torch.bfloat16):
        policy = make_policy(dtype=dtype)
        optimizer = PolicyOptimizer(policy, 1e-3)
        policy(torch.tensor([[1, 2]])).logits.sum().backward()
        optimizer.clip(1.0)
        optimizer.step()
        tensors = {t.data_ptr(): t for p in optimizer._masters for t in (p, p.grad)}
        tensors |= {p.data_ptr(): p for p in policy.parameters()}
        moments = [t for state in optimizer._adamw.state.values() for t in state.values() if t.ndim]
        tensors |= {t.data_ptr(): t for t in moments}
        assert training_state_bytes(policy) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_plan_says_what_it_is_of_and_whether_it_fits():
    plan = MemoryPlan(2 * GIB, 3 * GIB, GIB // 2, GIB, 8 * GIB, checkpointed=False)
    assert str(plan) == (
        "about 6.5 GiB (policy and optimizer 2.0 + activations 3.0 + logits 0.5 + engine 1.0) of 8 GiB"
    )
    assert plan.fits
    assert not MemoryPlan(2 * GIB, 5 * GIB, GIB // 2, GIB, 8 * GIB, checkpointed=False).fits
    unknown = MemoryPlan(2 * GIB, 3 * GIB, GIB // 2, GIB, 0, checkpointed=False)
    assert unknown.fits
    assert str(unknown).endswith(" of an amount that this system does not tell")


def test_the_head_is_planned_as_it_is_computed():
    """Logits in the type of the weights on a CPU, kept up to a limit; all of them where the head is no product."""
    policy = make_policy(dtype=torch.bfloat16)
    weight, tiles = 500 * 256 * 2, 2 * 100 * 500 * 4
    assert head_bytes(policy, 100) == 100 * 500 * 2 + tiles + weight
    assert head_bytes(policy, 10**7) == (1 << 29) + 2 * (3 << 20) + weight + 2 * weight
    scoring._HEADS[policy] = None
    assert head_bytes(policy, 100) == 2 * 100 * 500 * 2 + tiles


def test_checkpointing_keeps_less_and_changes_no_gradient():
    """Dropout, which training mode would bring back, is off."""
    plain, checkpointed = make_policy(dropout=0.5), make_policy(dropout=0.5)
    for policy in (plain, checkpointed):
        policy.lm_head.weight = policy.model.embed_tokens.weight
    enable_checkpointing(checkpointed)
    assert kept_bytes(checkpointed, 2, 64) < 0.5 * kept_bytes(plain, 2, 64)
    rollouts = make_rollout_batch([completion([5, 6, 7], [8, 9]), completion([5, 6], [3])], torch.zeros(2))
    for policy in (plain, checkpointed):
        score(policy, rollouts, 1.0)["log_probs"].sum().backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_checkpointing_turns_off_dropout_that_is_a_number():
    small = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    policy = OPTForCausalLM(OPTConfig(**small, word_embed_proj_dim=32, dropout=0.5)).eval()
    ids = torch.arange(2, 9)[None]
    expected = policy(ids).logits
    enable_checkpointing(policy)
    assert policy.training
    assert torch.equal(policy(ids).logits, expected)


def test_checkpointing_is_refused_where_dropout_cannot_be_turned_off():
    policy = make_policy()
    layer = policy.model.layers[0]
    forward = layer.forward
    layer.forward = lambda x, **more: forward(torch.dropout(x, 0.5, layer.training), **more)
    with pytest.raises(UsageError, match="gives other values"):
        enable_checkpointing(policy)


def test_the_reference_engine_goes_back_to_training_after_an_error():
    parts = tiny_parts()
    parts.policy.train()
    with pytest.raises(IndexError):
        HFEngine(parts.policy, parts.tokenizer).generate([[10**6]], Sampling(), seed=0)
    assert parts.policy.training


def test_the_reference_engine_samples_the_same_from_a_checkpointed_policy():
    parts = tiny_parts()
    twin = clone_policy(parts.policy)
    enable_checkpointing(twin)
    prompts = [question.prompt_token_ids for question in parts.questions]
    sampling = Sampling(n=2, max_tokens=5, stop=())
    expected = parts.engine.generate(prompts, sampling, seed=3)
    found = HFEngine(twin, parts.tokenizer).generate(prompts, sampling, seed=3)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert twin.training

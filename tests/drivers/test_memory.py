"""The memory plan against what a pass really keeps; gradient checkpointing, which changes memory only."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from drivers.common import distributed
from drivers.common.errors import UsageError
from drivers.engines.hf import HFEngine
from drivers.engines.placement import engine_memory_fraction, shares_gpu
from drivers.policy.optimizer import PolicyOptimizer, training_state_bytes
from drivers.settings.groups import OptimizerSettings
from drivers.settings.sampling import Sampling
from drivers.training import memory, shortcuts
from drivers.training.batch import make_rollout_batch
from drivers.training.forward import forward
from drivers.training.memory import (
    GIB,
    MemoryPlan,
    enable_checkpointing,
    head_bytes,
    max_micro_batch_tokens,
    plan_memory,
)
from tests.drivers.helpers.letters import clone_policy, make_completion, make_tiny_config, make_tiny_parts


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


def measure_kept_bytes(policy, rows, row):
    """Return the bytes that autograd keeps for `rows` rows of `row` tokens, without weights and logits."""
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    rollouts = make_rollout_batch(
        [make_completion([5 + k] * (row - 8), [9] * 8) for k in range(rows)], torch.zeros(rows)
    )
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward(policy, rollouts, 1.0, with_entropy=True)["log_probs"].sum()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_memory_is_near_measured_activations(attention, dtype):
    policy, row = make_policy(attention, dtype), 128
    config = make_tiny_config(
        sampling_max_tokens=8, rollout_batch_size=8, group_size=8, train_batch_size=8, gradient_accumulation_steps=2
    )
    plan = plan_memory(config, policy, row - 8)
    assert max_micro_batch_tokens(config, row - 8) == 4 * row
    assert plan.checkpoint == sum(p.numel() for p in policy.parameters()) * (12 if dtype == torch.float32 else 14)
    assert 0.75 < plan.activations / measure_kept_bytes(policy, 4, row) < 1.5


def test_training_state_bytes_is_exact():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        policy = make_policy(dtype=dtype)
        optimizer = PolicyOptimizer(policy, OptimizerSettings())
        policy(torch.tensor([[1, 2]])).logits.sum().backward()
        optimizer.clip_gradient(1.0)
        optimizer.step(1e-3)
        tensors = {t.data_ptr(): t for p in optimizer._masters for t in (p, p.grad)}
        tensors |= {p.data_ptr(): p for p in policy.parameters()}
        moments = [t for state in optimizer._adamw.state.values() for t in state.values() if t.ndim]
        tensors |= {t.data_ptr(): t for t in moments}
        assert training_state_bytes(policy) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_plan_memory_prints_parts_and_fit():
    plan = MemoryPlan(2 * GIB, 3 * GIB, GIB // 2, GIB, 8 * GIB, checkpointed=False)
    assert str(plan) == (
        "about 6.5 GiB (policy and optimizer 2.0 + activations 3.0 + logits 0.5 + engine 1.0) of 8 GiB"
    )
    assert plan.fits
    assert not MemoryPlan(2 * GIB, 5 * GIB, GIB // 2, GIB, 8 * GIB, checkpointed=False).fits
    assert not replace(plan, checkpoint=GIB).fits
    assert "engine 1.0 + checkpoint 1.0)" in str(replace(plan, checkpoint=GIB))
    unknown = MemoryPlan(2 * GIB, 3 * GIB, GIB // 2, GIB, 0, checkpointed=False)
    assert unknown.fits
    assert str(unknown).endswith(" of an amount that this system does not report")


def test_engine_memory_fraction_leaves_room_for_training():
    layer = torch.nn.Linear(1000, 1000, bias=False)  # 1 M parameters
    assert engine_memory_fraction(training_state_bytes(layer), 160_000_000) == pytest.approx(0.9 - 16 / 160)
    assert engine_memory_fraction(training_state_bytes(layer.bfloat16()), 160_000_000) == pytest.approx(0.9 - 18 / 160)
    with pytest.raises(UsageError, match=r"use a second GPU for vLLM \(--rollout-device\), pass --lora-rank 16"):
        engine_memory_fraction(training_state_bytes(layer), 20_500_000)
    with pytest.raises(UsageError, match="no room for vLLM; pass --lora-rank 16, train on several GPUs"):
        engine_memory_fraction(training_state_bytes(layer), 19_000_000)  # a second GPU would not help


def test_shares_gpu_only_in_one_process(monkeypatch):
    cpu, one, two = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
    vllm, hf = make_tiny_config(engine="vllm"), make_tiny_config(engine="hf")
    servers = make_tiny_config(engine="vllm", rollout_url=("http://one:8000",))
    cases = [(vllm, one, one), (vllm, one, two), (vllm, cpu, cpu), (hf, one, one), (servers, one, one)]
    assert [shares_gpu(*case) for case in cases] == [True, False, False, False, False]
    monkeypatch.setattr(distributed, "size", lambda: 2)
    assert not shares_gpu(vllm, one, one)


def test_configure_memory_shared_gpu_prints_both_phases(monkeypatch):
    """The GPU holds 100 times 16 bytes per parameter: vLLM gets 0.9 minus 0.16, or less if requested."""
    policy = make_policy()
    total = 100 * sum(p.numel() for p in policy.parameters())
    monkeypatch.setattr(memory, "available_bytes", lambda _: total)
    monkeypatch.setattr(memory, "shares_gpu", lambda *_: True)
    monkeypatch.setattr(memory, "enable_checkpointing", lambda _: None)
    small = {"sampling_max_tokens": 2, "group_size": 2, "train_batch_size": 2, "rollout_batch_size": 2}
    small |= {"gradient_accumulation_steps": 1}
    for asked, share, checkpointing in ((0.85, 0.74, "off"), (0.85, 0.74, "on"), (0.3, 0.3, "off")):
        config = make_tiny_config(
            engine="vllm", gpu_memory_utilization=asked, gradient_checkpointing=checkpointing, **small
        )
        plan = memory.configure_memory(config, policy, 2, 0, torch.device("cpu"))
        assert plan.share == pytest.approx(share)
        assert "GiB while it trains, the engine asleep; while it samples, policy and optimizer" in str(plan)
        assert f"({share:.2f} of the GPU)" in str(plan)
        assert plan.checkpointed == (checkpointing == "on")
    whole = replace(plan, states=16 * GIB, available=80 * GIB)
    assert str(whole).endswith("policy and optimizer 16.0 + engine 24.0 (0.30 of the GPU)")
    monkeypatch.setattr(memory, "available_bytes", lambda _: training_state_bytes(policy) + 1)
    with pytest.raises(UsageError, match="which leaves no room for vLLM; pass --lora-rank 16"):
        memory.configure_memory(config, policy, 2, 0, torch.device("cpu"))


def test_configure_memory_states_beyond_device_are_refused(monkeypatch):
    """Smaller micro-batches cannot help. After a warning, the first step of the optimizer would fail."""
    policy, config = make_policy(), make_tiny_config(engine="hf")
    monkeypatch.setattr(memory, "available_bytes", lambda _: training_state_bytes(policy) - 1)
    with pytest.raises(UsageError, match=r"--model-path .*: weights and optimizer take .* GiB; pass --lora-rank 16"):
        memory.configure_memory(config, policy, 2, 0, torch.device("cpu"))
    for unknown_or_enough in (0, training_state_bytes(policy)):
        monkeypatch.setattr(memory, "available_bytes", lambda _, size=unknown_or_enough: size)
        memory.configure_memory(config, policy, 2, 0, torch.device("cpu"))


def test_pop_peak_memory_is_fullest_gpu_since_last_call(monkeypatch):
    assert memory.pop_peak_memory() == {}
    peaks = [GIB, 3 * GIB]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.__setitem__(device, 0))
    assert memory.pop_peak_memory() == {"peak_memory_gib": 3.0}
    assert memory.pop_peak_memory() == {"peak_memory_gib": 0.0}


def test_plan_memory_head_follows_computation():
    """Logits have the weights' dtype on a CPU and a size limit; a head that is not a product makes all."""
    policy = make_policy(dtype=torch.bfloat16)
    weight, tiles = 500 * 256 * 2, 2 * 100 * 500 * 4
    assert head_bytes(policy, 100) == 100 * 500 * 2 + tiles + weight
    assert head_bytes(policy, 10**7) == (1 << 29) + 2 * (3 << 20) + weight + 2 * weight
    assert head_bytes(make_policy(dtype=torch.float16), 100) == 100 * 500 * 2 + tiles + weight + 2 * weight
    shortcuts._HEADS[policy] = None
    assert head_bytes(policy, 100) == 2 * 100 * 500 * 2 + tiles


def test_gradient_checkpointing_saves_memory_and_keeps_gradient():
    """Training mode would enable dropout, which therefore stays off."""
    plain, checkpointed = make_policy(dropout=0.5), make_policy(dropout=0.5)
    for policy in (plain, checkpointed):
        policy.lm_head.weight = policy.model.embed_tokens.weight
    enable_checkpointing(checkpointed)
    assert measure_kept_bytes(checkpointed, 2, 64) < 0.5 * measure_kept_bytes(plain, 2, 64)
    rollouts = make_rollout_batch([make_completion([5, 6, 7], [8, 9]), make_completion([5, 6], [3])], torch.zeros(2))
    for policy in (plain, checkpointed):
        forward(policy, rollouts, 1.0)["log_probs"].sum().backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_disables_numeric_dropout():
    small = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    policy = OPTForCausalLM(OPTConfig(**small, word_embed_proj_dim=32, dropout=0.5)).eval()
    ids = torch.arange(2, 9)[None]
    expected = policy(ids).logits
    enable_checkpointing(policy)
    assert policy.training
    assert torch.equal(policy(ids).logits, expected)


def test_gradient_checkpointing_fixed_dropout_raises_usage_error():
    policy = make_policy()
    layer = policy.model.layers[0]
    forward = layer.forward
    layer.forward = lambda x, **more: forward(torch.dropout(x, 0.5, layer.training), **more)
    with pytest.raises(UsageError, match="gives other values"):
        enable_checkpointing(policy)


def test_hf_engine_error_restores_training_mode():
    parts = make_tiny_parts()
    parts.policy.train()
    with pytest.raises(IndexError):
        HFEngine(parts.policy, parts.tokenizer).generate([[10**6]], Sampling(), seed=0)
    assert parts.policy.training


def test_hf_engine_with_gradient_checkpointing_samples_the_same():
    parts = make_tiny_parts()
    twin = clone_policy(parts.policy)
    enable_checkpointing(twin)
    prompts = [question.prompt_token_ids for question in parts.questions]
    sampling = Sampling(n=2, max_tokens=5, stop=())
    expected = parts.engine.generate(prompts, sampling, seed=3)
    found = HFEngine(twin, parts.tokenizer).generate(prompts, sampling, seed=3)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert twin.training

"""The weights that are pushed to an engine, and the checksums that verify a push."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drivers.common import distributed
from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.engines.factory import make_engine
from drivers.engines.hf import HFReplica
from drivers.policy import fsdp
from drivers.policy.checksums import check_loaded, checksum, checksums, find_differing
from drivers.policy.lora import adapter_weights, add_lora, scaled_adapter
from drivers.policy.weights import PolicyWeights, WeightGatherer, stochastic_round
from drivers.training.advantages import prepare_rollouts
from drivers.training.components import Components
from drivers.training.forward import forward_all
from tests.drivers.helpers.architectures import make_architecture
from tests.drivers.helpers.engines import make_options
from tests.drivers.helpers.letters import make_tiny_config, make_tiny_parts, sample_rollouts
from tests.tiny import make_tiny_policy, make_tiny_tokenizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def compute_checksum_by_hand(tensor):
    """Return the checksum from the bytes, in Python integers."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    row, sums = 8 * 256, []
    whole = len(raw) // row * row
    for start in range(0, whole, row):
        words = [int.from_bytes(raw[k : k + 8], "little") for k in range(start, start + row, 8)]
        sums.append(sum(words))
    sums.append(sum(place * octet for place, octet in enumerate(raw[whole:], start=1)))

    def signed(value):
        value %= 1 << 64
        return value - (1 << 64) if value >= 1 << 63 else value

    return signed(sum(sums)), signed(sum(place * value for place, value in enumerate(sums, start=1)))


@given(st.integers(1, 3000), st.sampled_from(DTYPES), st.integers(0, 2**31 - 1))
def test_checksum_equals_definition(size, dtype, seed):
    values = np.random.default_rng(seed).integers(0, 256, size * dtype.itemsize, dtype=np.uint8)
    tensor = torch.from_numpy(values.copy()).view(dtype)
    assert tuple(checksum(tensor).tolist()) == compute_checksum_by_hand(tensor)


@given(st.integers(1, 3000), st.data())
def test_checksum_any_changed_value_differs(size, data):
    tensor = torch.arange(size, dtype=torch.float32)
    place = data.draw(st.integers(0, size - 1))
    changed = tensor.clone()
    changed[place] = data.draw(st.floats(-1e6, 1e6, width=32).filter(lambda x: x != float(place)))
    assert checksum(changed).tolist() != checksum(tensor).tolist()


def test_checksum_depends_on_row_order_and_not_on_layout():
    tensor = torch.randn(4, 2048)
    assert checksum(tensor.flip(0)).tolist() != checksum(tensor).tolist()
    assert checksum(tensor.T.contiguous().T).tolist() == checksum(tensor).tolist()
    packed = torch.zeros(4 * 2048 * 4 + 2, dtype=torch.uint8)  # not aligned, as in a buffer of many tensors
    packed[2:] = tensor.view(-1).view(torch.uint8)
    assert checksum(packed[2:]).tolist() == checksum(tensor).tolist()


def test_checksum_empty_tensor_exists():
    assert checksum(torch.zeros(0)).tolist() == [0, 0]
    assert checksum(torch.zeros(0, 5)).tolist() == [0, 0]
    assert checksum(torch.tensor(3, dtype=torch.int8)).tolist() == [3, 3]


def test_check_arrived_names_differing_tensors():
    policy = make_tiny_policy(0)
    ours = PolicyWeights(policy, torch.float32).checksums()
    assert ours == checksums(policy.named_parameters())
    assert find_differing(ours, dict(ours)) == []
    assert checksums([]) == {}
    name = list(ours)[3]
    with torch.no_grad():
        dict(policy.named_parameters())[name].view(-1)[0] += 1e-6
    theirs = PolicyWeights(policy, torch.float32).checksums()
    assert find_differing(ours, theirs) == [name]
    missing = {k: v for k, v in ours.items() if k != name}
    assert find_differing(ours, missing) == find_differing(missing, ours) == [name]


def test_check_loaded_names_the_worker_and_the_flag_that_works():
    check_loaded(["", ""], 3)
    with pytest.raises(
        TrainingAbortedError, match=r"push 3 did not load into worker 1 of the engine: 2 par.*--engine hf"
    ):
        check_loaded(["", "2 parameters got no weight: a, b"], 3)


def test_policy_weights_have_engine_dtype_and_model_names():
    policy = make_tiny_policy(0)
    weights = PolicyWeights(policy, torch.bfloat16)
    for _ in range(2):  # iterates again each time
        found = dict(weights)
        assert found.keys() == dict(policy.named_parameters()).keys()
        assert all(torch.equal(found[name], p.bfloat16()) for name, p in policy.named_parameters())
    assert [(m.name, m.shape) for m in weights.metadata()] == [(n, tuple(t.shape)) for n, t in found.items()]
    assert {m.dtype for m in weights.metadata()} == {torch.bfloat16}


@pytest.mark.medium
@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "Glm4Moe", "GptOss", "Phi3", "GPT2"])
@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "from_config"])
def test_policy_weights_are_those_that_the_saver_writes(name, is_loaded, tmp_path):
    """transformers holds the experts of a layer in one tensor. Files, and so engines, have one for each of them."""
    policy = make_architecture(name)
    policy.save_pretrained(tmp_path)
    if is_loaded:
        policy = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected, weights = load_file(tmp_path / "model.safetensors"), PolicyWeights(policy, torch.float32)
    found = dict(weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert [(m.name, m.dtype, m.shape) for m in weights.metadata()] == [
        (key, tensor.dtype, tuple(tensor.shape)) for key, tensor in found.items()
    ]
    assert dict(PolicyWeights(policy, torch.float32, as_files=False)).keys() == dict(policy.named_parameters()).keys()
    in_bfloat16 = dict(PolicyWeights(policy, torch.bfloat16))
    rounded = {key for key, tensor in in_bfloat16.items() if tensor.dtype == torch.bfloat16}
    kept = in_bfloat16.keys() - rounded  # buffers
    assert all("e_score_correction_bias" in key for key in kept)
    assert bool(kept) is (name == "Glm4Moe")


@pytest.mark.medium
def test_policy_weights_lora_update_reaches_the_names_of_the_files():
    plain, policy = make_architecture("Qwen3Moe"), make_architecture("Qwen3Moe")
    add_lora(policy, 2, 8.0, seed=5, base="tiny")
    before = dict(PolicyWeights(plain, torch.float32))
    perturb(policy)
    after = dict(PolicyWeights(policy, torch.float32))
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "_proj" in name and "experts" not in name}
    with pytest.raises(UsageError, match=r"--lora-rank 2: peft adapts model\.layers\.1\.mlp\.experts of Glm4Moe"):
        add_lora(make_architecture("Glm4Moe"), 2, 8.0, seed=5, base="tiny")


def test_policy_weights_groups_are_small():
    """No more than the experts of one layer are converted together."""
    weights = PolicyWeights(make_architecture("Qwen3Moe"), torch.float32)
    groups = [group.names for group in weights._groups]
    fused = [names for names in groups if len(names) > 1]
    layers = [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    assert sorted(map(sorted, fused)) == [[f"{layer}.down_proj", f"{layer}.gate_up_proj"] for layer in layers]
    assert len(groups) == len(list(make_architecture("Qwen3Moe").parameters())) - 2


def test_weights_that_cannot_be_converted_are_refused_before_vllm_starts(monkeypatch):
    """One line names the flag that works; nothing was started."""
    policy = make_architecture("Mixtral")
    weights = WeightGatherer(policy, torch.float32)

    def fail(*_):
        raise KeyError("no reverse")

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", fail)
    with pytest.raises(UsageError, match=r"the weights of MixtralForCausalLM cannot be converted.*pass --engine hf"):
        make_engine("vllm", make_options(), weights, SimpleNamespace(eos_token_id=1))
    assert len(dict(PolicyWeights(policy, torch.float32, as_files=False))) == len(list(policy.parameters()))

    def fuse_all(policy, weights):
        """Give one tensor of everything, which no part of the weights can give."""
        return {"all": torch.empty(sum(weight.numel() for weight in weights.values()), device="meta")}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", fuse_all)
    with pytest.raises(UsageError, match="one layer after the other; pass --engine hf"):
        WeightGatherer(policy, torch.float32).metadata()


def test_hf_replica_of_experts_receives_module_names_and_reports_files():
    """With several ranks, Hugging Face samples with a copy, whose checksums the self-check compares."""
    policy, copy = make_architecture("Qwen3Moe"), make_architecture("Qwen3Moe")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    gatherer = WeightGatherer(policy, torch.float32, as_files=False)
    replica = HFReplica(copy, make_tiny_tokenizer(), gatherer)
    assert find_differing(PolicyWeights(policy, torch.float32).checksums(), replica.received()[0])
    replica.load_weights(1)
    assert not find_differing(PolicyWeights(policy, torch.float32).checksums(), replica.received()[0])


@pytest.fixture
def events(monkeypatch):
    """Record what a rank of two broadcasts and gathers."""
    events = []

    def gather(tensor):
        events.append("gather")
        return tensor

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast_object", lambda message: events.append(type(message).__name__))
    monkeypatch.setattr(fsdp, "full_tensor", gather)
    return events


def test_weight_gatherer_abandoned_gather_is_completed_first(events):
    """The other ranks wait in the gather that an engine left when it died."""
    policy = make_tiny_policy(0)
    gatherer, n_weights = WeightGatherer(policy, torch.float32), len(list(policy.parameters()))

    def push_twice():
        next(iter(gatherer))  # the engine dies after one tensor
        assert len(dict(gatherer)) == n_weights
        next(iter(gatherer))
        return 7

    assert gatherer.run_on_rank_zero(push_twice) == 7
    assert events == [*["_Gather", *["gather"] * n_weights] * 3, "_Done"]


def test_weight_gatherer_other_rank_serves_until_done(events, monkeypatch):
    policy, messages = make_tiny_policy(0), []
    gatherer = WeightGatherer(policy, torch.float32)
    monkeypatch.setattr(distributed, "broadcast_object", messages.append)
    gatherer.run_on_rank_zero(lambda: list(gatherer))
    events.clear()
    monkeypatch.setattr(distributed, "is_rank_zero", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda _: messages.pop(0))
    assert len(gatherer.run_on_rank_zero(lambda: 1 / 0)) == len(events) == len(list(policy.parameters()))
    assert not messages


def test_weight_gatherer_adapter_is_gathered_by_all_ranks(events, monkeypatch):
    policy, messages = make_lora_policy(), []
    n_adapter = sum(".lora_" in name for name, _ in policy.named_parameters())
    gatherer = WeightGatherer(policy, torch.float32, merges_lora=False)
    monkeypatch.setattr(distributed, "broadcast_object", messages.append)
    adapter = gatherer.run_on_rank_zero(gatherer.adapter)
    assert len(adapter) == len(events) == n_adapter
    events.clear()
    monkeypatch.setattr(distributed, "is_rank_zero", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda _: messages.pop(0))
    assert gatherer.run_on_rank_zero(lambda: 1 / 0).keys() == adapter.keys()
    assert events == ["gather"] * n_adapter
    assert not messages


def make_lora_policy(seed=0, rank=2, alpha=8.0, sharper=1.0):
    """Return a tiny policy with LoRA; `sharper` scales the fixed output layer, so that tokens can be likely."""
    policy = make_tiny_policy(seed)
    policy.get_input_embeddings().weight.data.mul_(sharper)
    add_lora(policy, rank, alpha, seed=5, base="tiny")
    return policy


def perturb(policy):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_lora_starts_at_base_and_pushes_merged_weights():
    """A plain model with the merged weights gives the logits of the policy with its adapters."""
    plain, policy, ids = make_tiny_policy(0), make_lora_policy(), torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(policy(ids).logits, plain(ids).logits)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert all(f".{layer}." in " ".join(trained) for layer in ("q_proj", "o_proj", "gate_proj", "down_proj"))
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if name not in trained}
    perturb(policy)
    weights = PolicyWeights(policy, torch.float32)
    merged = dict(weights)
    assert merged.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(merged, strict=False)
    expected = policy(ids).logits
    assert torch.allclose(plain(ids).logits, expected, atol=1e-5)
    assert not torch.allclose(make_tiny_policy(0)(ids).logits, expected, atol=1e-2)
    for name, p in policy.named_parameters():  # merging has not changed the policy
        assert name in trained or torch.equal(p, before[name])
    one = merged["model.layers.0.mlp.down_proj.weight"]
    layer = policy.get_submodule("model.layers.0.mlp.down_proj")
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert torch.allclose(one, layer.base_layer.weight + 8.0 / 2 * (b @ a), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_without_adapters_is_the_reference(dtype):
    """It gives the bits of a frozen copy, which is therefore not needed; training stays enabled."""
    config, parts = make_tiny_config(loss_type="grpo_clip", kl_coef=0.1, lora_rank=2), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    policy = make_tiny_policy(0).to(dtype)
    add_lora(policy, 2, 8.0, seed=5, base="tiny")
    perturb(policy)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    found, expected = (
        prepare_rollouts(config, policy, reference, rollouts, scores, None)
        for reference in (None, make_tiny_policy(0).to(dtype))
    )
    assert torch.equal(found.reference_log_probs, expected.reference_log_probs)
    now = forward_all(policy, rollouts, config)["log_probs"]
    assert (now - found.reference_log_probs).abs().max() > 1e-2  # adapters are on again
    assert trained == [name for name, p in policy.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="needs reference, a frozen copy of the initial policy; got None"):
        prepare_rollouts(replace(config, lora_rank=0), policy, None, rollouts, scores, None)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_stochastic_round_is_unbiased_and_exact_if_representable(dtype, bits):
    """The oracle uses exact fractions of the gap between the two neighbors."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 500, generator=generator).to(dtype).float()
    weight = weight.where(weight.abs() > 1e-3, 1.0)  # where the gaps of float16 are those of its exponent
    assert torch.equal(stochastic_round(weight, "a", dtype), weight.to(dtype))
    for share in (0.004, 0.1, 0.5, 0.9):
        gap = 2.0 ** (torch.frexp(weight).exponent.float() - bits)  # at each weight
        update = share * gap * torch.randint(0, 2, weight.shape, generator=generator).mul(2).sub(1)
        moved = stochastic_round(weight + update, "a", dtype).float() - weight
        grows = (update * weight) > 0  # the next gap towards 0 may be half as wide
        assert set((moved / gap)[grows].abs().unique().tolist()) == {0.0, 1.0}
        kept = (moved * update)[grows].sum() / (update * update)[grows].sum()
        count = int(grows.sum())
        assert abs(kept - 1) < 5 * ((1 - share) / share / count) ** 0.5
    nearest = (weight + 0.1 * 2.0 ** (torch.frexp(weight).exponent.float() - bits)).to(dtype).float() - weight
    assert nearest.abs().max() == 0  # hence stochastic rounding
    one, other, same = (stochastic_round(weight * 1.001, name, dtype) for name in "aba")
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    extreme = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45])
    assert torch.equal(stochastic_round(extreme, "a", dtype)[:4].float(), extreme[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_bfloat16_push_keeps_small_updates(dtype):
    """Updates of a hundredth of the gap between neighboring weights survive on average in the merged tensors."""
    policy = make_tiny_policy(0).to(dtype)
    add_lora(policy, 2, 2, seed=5, base="tiny")
    before = {name: weight.float() for name, weight in PolicyWeights(policy, dtype)}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(1e-4)
    weights = PolicyWeights(policy, dtype)
    asked = got = 0.0
    for (name, exact), (_, pushed) in zip(PolicyWeights(policy, torch.float32), weights, strict=True):
        update = exact - before[name]
        asked += float((update * update).sum())
        got += float((update * (pushed.float() - before[name])).sum())
    assert asked > 0
    assert got / asked == pytest.approx(1.0, abs=0.25)
    assert checksums(weights) == checksums(weights)


def test_lora_initialization_depends_on_seed_only():
    torch.manual_seed(1)
    first = adapter_weights(make_lora_policy())
    torch.manual_seed(2)
    drawn = torch.rand(3)
    torch.manual_seed(2)
    second = adapter_weights(make_lora_policy())
    assert torch.equal(torch.rand(3), drawn)  # the global generator was not used
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_tiny_policy(0)
    add_lora(other, 2, 8.0, seed=6, base="tiny")
    assert any(not torch.equal(first[name], weight) for name, weight in adapter_weights(other).items())


def test_lora_checkpoint_loads_in_peft(tmp_path):
    """Loaded by peft onto the base model, the adapter gives the logits of the checkpoint's merged model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from drivers.runs.checkpoint import copy_content, save_checkpoint
    from tests.tiny import make_tiny_tokenizer

    policy, ids = make_lora_policy(), torch.tensor([[3, 4, 5, 6]])
    perturb(policy)
    content = copy_content(policy, make_tiny_tokenizer(), values={"step": 1})
    folder = save_checkpoint(content, tmp_path / "c")
    expected = policy(ids).logits
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, expected, atol=1e-5)
    adapted = PeftModel.from_pretrained(make_tiny_policy(0), folder / "adapter")
    assert torch.allclose(adapted(ids).logits, expected, atol=1e-5)


def test_lora_base_and_scaled_adapter_make_the_merged_weights():
    """`--lora-push adapter` sends both; the adapter's own scale is 1, whatever that of LoRA is."""
    policy = make_lora_policy(alpha=7)
    perturb(policy)
    base, merged = (dict(PolicyWeights(policy, torch.float32, merges_lora=merges)) for merges in (False, True))
    adapter = scaled_adapter(policy, torch.float32)
    prefix, updates = "base_model.model.", {name: weight for name, weight in adapter.items() if ".lora_A." in name}
    for name, down in updates.items():
        weight = name.removeprefix(prefix).replace(".lora_A.", ".")
        update = adapter[name.replace(".lora_A.", ".lora_B.")] @ down
        torch.testing.assert_close(base.pop(weight) + update, merged.pop(weight))
        assert update.abs().max() > 0.1
    assert len(updates) == 14
    assert base.keys() == merged.keys()
    assert all(torch.equal(weight, merged[name]) for name, weight in base.items())
    assert {weight.dtype for weight in scaled_adapter(policy, torch.bfloat16).values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lora_training_learns_and_keeps_base(tmp_path):
    from drivers.engines.hf import HFReplica
    from drivers.train import train
    from tests.drivers.helpers.letters import letter_grader, make_run, make_tiny_config, make_tiny_parts

    config, parts = make_tiny_config(n_grpo_steps=25, learning_rate=1e-2), make_tiny_parts()
    policy = make_lora_policy(rank=4, sharper=5.0)
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}
    weights = PolicyWeights(policy, torch.float32)
    engine = HFReplica(make_tiny_policy(0), parts.tokenizer, weights)
    run = make_run(config, tmp_path / "run", parts.tokenizer)
    train(config, Components(policy, engine, letter_grader, parts.questions, parts.questions), run)
    run.finish()
    assert run.state.accuracies[25] > run.state.accuracies[0] + 0.3
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters() if name in before)

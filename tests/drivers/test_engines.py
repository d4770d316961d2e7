"""One contract, every engine: the Hugging Face reference and the real vLLM."""

import gc
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from drivers.common.errors import EngineDiedError, TrainingAbortedError, UsageError
from drivers.engines.factory import make_engine
from drivers.engines.hf import HFEngine
from drivers.policy.weights import checksums
from drivers.settings.sampling import Sampling
from drivers.training.self_check import check_engine
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # vLLM's own deprecations
    pytest.mark.xdist_group("vllm"),
]
PROMPTS = ((5, 6, 7, 8), (9, 10), (11, 12, 13))
TOLERANCE = 1e-4


class Subject:
    """An engine, the policy it follows, and how to push."""

    def __init__(self, kind, policy, engine):
        self.kind, self.policy, self.engine, self.version = kind, policy, engine, -1

    def push(self):
        self.version += 1
        self.engine.load_weights(self.version)

    def perturb(self, seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def make_vllm(folder, policy, own_process=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from drivers.engines.vllm import VLLMEngine

        save_tiny(folder)
        return VLLMEngine(
            str(folder),
            policy,
            device=torch.device("cpu"),
            dtype=torch.float32,
            max_model_len=64,
            gpu_memory_utilization=0.5,
            reserved_bytes=0,
            seed=0,
            own_process=own_process,
        )


VLLM = [
    pytest.param("vllm", marks=pytest.mark.vllm),
    pytest.param("vllm in its own process", marks=[pytest.mark.vllm, pytest.mark.slow]),
]


@pytest.fixture(scope="module", params=["hf", *VLLM])
def subject(request, tmp_path_factory):
    policy = make_tiny_policy(3)
    if request.param == "hf":
        engine = HFEngine(policy, make_tiny_tokenizer())
    else:
        engine = make_vllm(tmp_path_factory.mktemp("tiny"), policy, own_process=request.param != "vllm")
    subject = Subject(request.param, policy, engine)
    subject.push()
    yield subject
    engine.close()
    gc.collect()


def policy_log_probs(policy, completion, temperature=1.0):
    ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
    with torch.no_grad():
        rows = torch.log_softmax(policy(ids).logits[0].double() / temperature, dim=-1)
    begin = len(completion.prompt_token_ids) - 1
    return [rows[begin + k, token].item() for k, token in enumerate(completion.token_ids)]


def test_completions_come_in_the_order_of_the_prompts(subject):
    completions = subject.engine.generate(PROMPTS, Sampling(n=3, max_tokens=5, stop=()), seed=1)
    assert [c.prompt_token_ids for c in completions] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({c.token_ids for c in completions}) == len(completions)  # each sample has noise of its own
    assert all(1 <= len(c.token_ids) <= 5 for c in completions)
    assert all(len(c.log_probs) == len(c.token_ids) for c in completions)


def test_log_probs_are_the_policys(subject):
    for temperature in (1.0, 0.6):
        for c in subject.engine.generate(PROMPTS, Sampling(n=2, max_tokens=6, temperature=temperature), seed=2):
            assert c.log_probs == pytest.approx(policy_log_probs(subject.policy, c, temperature), abs=TOLERANCE)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(subject):
    sampling = Sampling(n=2, max_tokens=6)
    first, again, other = (
        [c.token_ids for c in subject.engine.generate(PROMPTS, sampling, seed=seed)] for seed in (4, 4, 5000)
    )
    assert first == again
    assert first != other


def test_temperature_zero_is_the_likeliest_token(subject):
    (c,) = subject.engine.generate(PROMPTS[:1], Sampling(temperature=0.0, max_tokens=6, stop=()), seed=0)
    ids = torch.tensor([[*c.prompt_token_ids, *c.token_ids]])
    with torch.no_grad():
        likeliest = subject.policy(ids).logits[0].argmax(dim=-1).tolist()
    begin = len(c.prompt_token_ids) - 1
    assert list(c.token_ids) == likeliest[begin : begin + len(c.token_ids)]


def test_a_stop_string_ends_the_response_and_stays_in_it(subject):
    """Every character is a token, so one that is sampled somewhere serves as a stop string."""
    (free,) = subject.engine.generate(PROMPTS[:1], Sampling(max_tokens=12, stop=()), seed=6)
    stop = make_tiny_tokenizer().decode([free.token_ids[3]])
    (stopped,) = subject.engine.generate(PROMPTS[:1], Sampling(max_tokens=12, stop=(stop,)), seed=6)
    first = free.token_ids.index(free.token_ids[3])
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.text.endswith(stop)
    assert stopped.finish_reason == "stop"
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 12


def test_the_end_token_ends_the_response_and_is_kept(subject):
    """Bias the policy towards its end token: responses end there, with its id in token_ids and not in the text."""
    eos = make_tiny_tokenizer().eos_token_id
    before = {name: p.detach().clone() for name, p in subject.policy.named_parameters()}
    with torch.no_grad():  # the tied embedding of the end token points where the others do on average, only more so
        embedding = subject.policy.model.embed_tokens.weight
        hidden = subject.policy.model(torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        embedding[eos] = 20 * hidden / hidden.norm() ** 2
    subject.push()
    try:
        ended = subject.engine.generate(PROMPTS[:1], Sampling(n=4, max_tokens=8, stop=()), seed=7)
        longer = subject.engine.generate(PROMPTS[:1], Sampling(n=4, min_tokens=3, max_tokens=8, stop=()), seed=7)
    finally:
        with torch.no_grad():
            for name, parameter in subject.policy.named_parameters():
                parameter.copy_(before[name])
        subject.push()
    assert [(c.token_ids, c.text, c.finish_reason) for c in ended] == [((eos,), "", "stop")] * 4
    assert all(len(c.token_ids) >= 3 and eos not in c.token_ids[:3] for c in longer)


def test_after_a_push_the_samples_are_the_new_policys(subject):
    """Greedy output and log-probs follow the policy through several pushes; without a push they do not."""
    sampling = Sampling(temperature=0.0, max_tokens=8, stop=())
    outputs = []
    for seed in range(3):
        subject.perturb(seed)
        subject.push()
        completions = subject.engine.generate(PROMPTS, sampling, seed=0)
        outputs.append([c.token_ids for c in completions])
        sampled = subject.engine.generate(PROMPTS, Sampling(n=2, max_tokens=8), seed=seed)
        assert {c.weight_version for c in sampled} == {subject.version}
        for c in sampled:
            assert c.log_probs == pytest.approx(policy_log_probs(subject.policy, c), abs=TOLERANCE)
    assert outputs[0] != outputs[1] != outputs[2]


def check(subject, version=None, sampling=None):
    return check_engine(
        subject.engine,
        subject.policy,
        PROMPTS,
        sampling or Sampling(n=4, max_tokens=8),
        version=subject.version if version is None else version,
        tolerance=1e-3,
        seed=11,
    )


def test_the_self_check_passes_after_a_push(subject):
    agreement = check(subject)
    assert agreement.largest < TOLERANCE
    assert agreement.n_tokens > 20


class RawLogProbs(HFEngine):
    """Log-probs of the distribution before the temperature: what a sampler reports that was not asked for its own."""

    def generate(self, prompts, sampling, *, seed):
        completions = super().generate(prompts, sampling, seed=seed)
        return [replace(c, log_probs=tuple(policy_log_probs(self._policy, c, 1.0))) for c in completions]


def test_the_self_check_notices_log_probs_of_another_temperature():
    policy = make_tiny_policy(3)
    subject = Subject("hf", policy, RawLogProbs(policy, make_tiny_tokenizer()))
    subject.push()
    assert check(subject).mean < TOLERANCE  # at temperature 1 they are the same
    with pytest.raises(TrainingAbortedError, match="disagree on the log-probs"):
        check(subject, sampling=Sampling(n=4, max_tokens=8, temperature=0.6))


def test_any_of_several_end_tokens_ends_a_response():
    """A model may have more than the tokenizer knows of: what ends there was not cut off."""
    policy = make_tiny_policy(3)
    (free,) = HFEngine(policy, make_tiny_tokenizer()).generate(PROMPTS[:1], Sampling(max_tokens=9, stop=()), seed=6)
    end = free.token_ids[4]
    policy.generation_config.eos_token_id = [make_tiny_tokenizer().eos_token_id, end]
    (ended,) = HFEngine(policy, make_tiny_tokenizer()).generate(PROMPTS[:1], Sampling(max_tokens=9, stop=()), seed=6)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert (ended.finish_reason, free.finish_reason) == ("stop", "length")


def test_the_end_token_of_the_tokenizer_ends_a_response_too(subject, monkeypatch):
    """As a chat template sets it; the model's folder does not name it."""
    sampling = Sampling(n=2, max_tokens=9, stop=())
    free = subject.engine.generate(PROMPTS[:1], sampling, seed=6)
    end, engine = free[0].token_ids[4], subject.engine
    if subject.kind == "hf":
        tokenizer = make_tiny_tokenizer()
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        engine = HFEngine(subject.policy, tokenizer)
    else:
        monkeypatch.setattr(engine, "_end_token_id", end)
    for cut, whole in zip(engine.generate(PROMPTS[:1], sampling, seed=6), free, strict=True):
        length = whole.token_ids.index(end) + 1 if end in whole.token_ids else len(whole.token_ids)
        assert cut.token_ids == whole.token_ids[:length]
        assert cut.log_probs == pytest.approx(whole.log_probs[:length], abs=TOLERANCE)
        assert cut.finish_reason == ("stop" if end in whole.token_ids else whole.finish_reason)


@pytest.mark.vllm
def test_a_shared_gpu_is_woken_in_order_weights_push_cache(tmp_path, monkeypatch):
    """The cache only when the weights are there: their peaks do not add up. The calls, on an engine of the CPU."""
    policy, calls = make_tiny_policy(3), []
    engine = make_vllm(tmp_path, policy)
    try:
        send = engine._sender.send_weights
        monkeypatch.setattr(engine._sender, "send_weights", lambda: (calls.append("send"), send()))
        monkeypatch.setattr(engine._llm, "wake_up", lambda tags: calls.append(*tags))
        monkeypatch.setattr(engine._llm, "sleep", lambda level: calls.append(f"sleep {level}"))
        engine._shares_gpu = True
        engine.load_weights(0)
        engine.sleep()
        engine.sleep()  # it does already
        engine.load_weights(1)
        assert calls == ["send", "sleep 2", "weights", "send", "kv_cache"]
    finally:
        engine.close()


def test_the_self_check_leaves_out_the_tokens_where_the_end_is_hidden(subject):
    """With min_tokens the sampler's log-probs differ there by nats, and the check passes all the same."""
    assert check(subject, sampling=Sampling(n=4, min_tokens=4, max_tokens=8)).largest < TOLERANCE
    with pytest.raises(TrainingAbortedError, match="no token to compare"):
        check(subject, sampling=Sampling(n=4, min_tokens=8, max_tokens=8))


def test_a_skipped_push_is_noticed_by_its_version(subject):
    with pytest.raises(TrainingAbortedError, match="a weight push did not arrive"):
        check(subject, version=subject.version + 1)


class Lying:
    """What gathers weights, and gives others in their place."""

    def __init__(self, source, fault):
        self.source, self.fault = source, fault

    def __iter__(self):
        list(self.source)
        return iter(self.fault)


@pytest.mark.vllm
@pytest.mark.parametrize("seen", ["push", "checksums", "log-probs"])
@pytest.mark.parametrize("fault", ["nothing", "stale", "partial"])
def test_a_push_that_lies_is_noticed_by_its_checksums_and_by_its_log_probs(subject, fault, seen, monkeypatch):
    """The version says the weights arrived; they are none, the last ones, or all but the head's layer.

    Each would notice alone: checksums what did not arrive, at the push and when the policy is asked again, log-probs
    what is not computed with.
    """
    from drivers.engines import vllm

    if subject.kind == "hf":
        pytest.skip("this engine shares the policy's weights: no push can go wrong")
    stale = [(name, p.detach().clone()) for name, p in subject.policy.named_parameters()]
    subject.perturb(20)
    fresh = [(name, p.detach().clone()) for name, p in subject.policy.named_parameters()]
    sent = {
        "nothing": [],
        "stale": stale,
        "partial": [pair for pair in fresh if "layers.1" not in pair[0]] + [p for p in stale if "layers.1" in p[0]],
    }
    with monkeypatch.context() as patch:
        patch.setattr(subject.engine._sender, "source", Lying(subject.engine._weights, sent[fault]))
        message = "disagree on the log-probs" if seen == "log-probs" else "others than the policy"
        if seen == "push":
            with pytest.raises(TrainingAbortedError, match=message):
                subject.push()
        else:
            patch.setattr(vllm, "check_arrived", lambda *_: None)
            subject.push()
            if seen == "log-probs":
                patch.setattr(subject.engine, "received", list)
            with pytest.raises(TrainingAbortedError, match=message):
                check(subject)
    subject.push()
    assert check(subject).largest < TOLERANCE
    assert check(subject).n_weights == len(list(subject.policy.parameters()))


@pytest.mark.vllm
def test_a_push_that_is_never_sent_is_noticed_though_the_last_one_arrived(subject, monkeypatch):
    """In any step, not in those of the self-check alone: no tensor was gathered for it."""
    if subject.kind == "hf":
        pytest.skip("this engine shares the policy's weights: no push can go wrong")
    with monkeypatch.context() as patch:
        patch.setattr(subject.engine._sender, "send_weights", lambda: None)
        with pytest.raises(TrainingAbortedError, match="of the 0 tensors of push"):
            subject.push()
    subject.push()


@pytest.mark.vllm
def test_samples_of_another_push_than_the_last_one_are_not_taken(subject):
    """By whatever name: an engine that somebody else has given weights. Or by none, or by two in one response."""
    from drivers.engines.vllm_transfer import version_of

    if subject.kind == "hf":
        pytest.skip("this engine has the policy's weights")
    subject.engine._llm.update_weight_version("somebody's")
    try:
        with pytest.raises(EngineDiedError, match=f"push None, {subject.version} was the last one"):
            subject.engine.generate(PROMPTS, Sampling(max_tokens=2), seed=1)
    finally:
        subject.push()
    assert [version_of(spans) for spans in (["7"], ["7", "7"], ["6", "7"], [])] == [7, 7, None, None]


class Loading:
    """A model of a worker that notes what it is given."""

    def __init__(self):
        self.loaded = {}

    def load_weights(self, weights):
        self.loaded |= dict(weights)


@pytest.mark.vllm
def test_what_comes_over_nccl_is_summed_up_chunk_by_chunk(monkeypatch):
    """Without a GPU: what unpacks the buffers is told what would come. The model is itself again after a failure."""
    from vllm.distributed.weight_transfer import nccl_engine

    from drivers.engines.vllm_transfer import CheckedNCCLEngine

    tensors, model, asked = dict(make_tiny_policy().named_parameters()), Loading(), []
    names, fails = list(tensors), False

    def consume(iterator, group, src, post_unpack_func, **more):
        asked.append((dict(iterator), group, src, more["buffer_size_bytes"]))
        post_unpack_func([(name, tensors[name]) for name in names[:7]])
        if fails:
            raise RuntimeError("the connection is gone")
        post_unpack_func([(name, tensors[name]) for name in names[7:]])

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_consumer", consume)
    engine = object.__new__(CheckedNCCLEngine)
    engine.model, engine.model_update_group, engine.device = model, "group", torch.device("cpu")
    engine.packed, engine.packed_buffer_size_bytes, engine.packed_num_buffers = True, 1000, 2
    shapes = [list(tensors[name].shape) for name in names]
    update = nccl_engine.NCCLWeightTransferUpdateInfo(names, ["float32"] * len(names), shapes)
    engine.receive_weights(update)
    assert engine.received.checksums() == checksums(tensors.items())
    assert model.loaded.keys() == tensors.keys()
    assert asked == [({name: (list(t.shape), t.dtype) for name, t in tensors.items()}, "group", 0, 1000)]
    assert engine.model is model
    fails = True
    with pytest.raises(RuntimeError, match="the connection is gone"):
        engine.receive_weights(update)
    assert engine.model is model
    assert list(engine.received.checksums()) == names[:7]


@pytest.mark.vllm
def test_over_nccl_the_trainer_is_the_first_of_a_group_with_every_worker():
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    from drivers.engines.vllm import VLLMEngine
    from drivers.engines.vllm_transfer import PACKED_BUFFER_BYTES, HostTrainerInit

    engine = object.__new__(VLLMEngine)
    engine._llm, engine._own_process = SimpleNamespace(get_world_size=lambda: 2), True
    ours = engine._transfer_init(own_gpu=True)
    assert isinstance(ours, NCCLTrainerInitInfo)
    assert (ours.rank, ours.world_size, ours.is_sender, ours.packed) == (0, 3, True, True)
    assert (ours.master_address, ours.packed_buffer_size_bytes) == ("127.0.0.1", PACKED_BUFFER_BYTES)
    assert 1024 <= ours.master_port < 65536
    assert engine._transfer_init(own_gpu=False) == HostTrainerInit(rank=0, by_file=True)


@pytest.mark.vllm
def test_the_engine_is_placed_where_it_was_asked_to_be():
    from drivers.engines.vllm import placement

    own = placement(torch.device("cuda", 1), shared=False, gpu_memory_utilization=0.85)
    assert own == {"device_ids": [1], "gpu_memory_utilization": 0.85, "enable_sleep_mode": False}
    shared = placement(torch.device("cuda", 0), shared=True, gpu_memory_utilization=0.3)
    assert shared == {"device_ids": [0], "gpu_memory_utilization": 0.3, "enable_sleep_mode": True}
    assert "device_ids" not in placement(torch.device("cpu"), shared=False, gpu_memory_utilization=0.85)


@pytest.mark.vllm
def test_the_other_build_of_vllm_is_one_clear_line():
    from drivers.engines.vllm import VLLMEngine

    with pytest.raises(UsageError, match="rollout_device=cuda:0: this vLLM is built for cpu"):
        VLLMEngine(
            "tiny",
            make_tiny_policy(),
            device=torch.device("cuda", 0),
            dtype=torch.float32,
            max_model_len=64,
            gpu_memory_utilization=0.5,
            reserved_bytes=0,
            seed=0,
        )


@pytest.mark.vllm
def test_an_engine_that_cannot_start_is_one_clear_line(tmp_path):
    save_tiny(tmp_path)
    with pytest.raises(UsageError, match="--engine vllm: vLLM cannot start: "):
        make_engine(
            "vllm",
            model_path=str(tmp_path),
            policy=make_tiny_policy(),
            tokenizer=make_tiny_tokenizer(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            max_model_len=100_000,
            gpu_memory_utilization=0.5,
            reserved_bytes=0,
            seed=0,
        )

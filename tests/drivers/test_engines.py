"""One contract for every engine: the Hugging Face reference and the real vLLM."""

import gc
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from drivers.common.errors import EngineDiedError, TrainingAbortedError, UsageError
from drivers.engines.conversations import sample_responses
from drivers.engines.hf import HFEngine
from drivers.policy.checksums import checksums
from drivers.policy.weights import PolicyWeights, WeightGatherer, WeightShape
from drivers.settings.sampling import Sampling
from drivers.tasks.questions import Example, Question
from drivers.training.batch import make_rollout_batch
from drivers.training.forward import forward
from drivers.training.self_check import check_engine
from tests.drivers.helpers.architectures import make_architecture
from tests.drivers.helpers.conversations import INSERTED, interrupt, make_rollout
from tests.drivers.helpers.engines import (
    PROMPTS,
    FaultyWeights,
    compute_log_probs,
    make_options,
    make_vllm_engine,
    start_vllm,
)
from tests.drivers.helpers.forked import EngineContext
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations
TOLERANCE = 1e-4


class Subject:
    """An engine, the policy whose weights it has, and a way to push them."""

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


VLLM = [pytest.param(kind, marks=pytest.mark.vllm) for kind in ("vllm", "vllm in its own process")]


@pytest.fixture(scope="module", params=["hf", *VLLM])
def subject(request, tmp_path_factory):
    has_own_process = request.param == "vllm in its own process"
    policy = make_architecture("Qwen3Moe") if has_own_process else make_tiny_policy(3)  # experts are pushed one by one
    if request.param == "hf":
        engine = HFEngine(policy, make_tiny_tokenizer())
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vllm.v1.engine.utils.get_mp_context", EngineContext)
            engine = start_vllm(tmp_path_factory.mktemp("tiny"), policy, own_process=has_own_process)
    subject = Subject(request.param, policy, engine)
    subject.push()
    yield subject
    engine.close()
    gc.collect()


def test_generate_returns_completions_in_prompt_order(subject):
    completions = subject.engine.generate(PROMPTS, Sampling(n=3, max_tokens=5, stop=()), seed=1)
    assert [c.prompt_token_ids for c in completions] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({c.token_ids for c in completions}) == len(completions)  # each sample has its own noise
    assert all(1 <= len(c.token_ids) <= 5 for c in completions)
    assert all(len(c.log_probs) == len(c.token_ids) for c in completions)


def test_generate_keeps_the_limit_of_each_prompt(subject):
    """The prompts of a conversation's round have as many tokens left as their inserted tokens left them."""
    sampling = Sampling(n=2, max_tokens=6, stop=(), limits=(1, 6, 3))
    completions = subject.engine.generate(PROMPTS, sampling, seed=1)
    lengths = [len(completion.token_ids) for completion in completions]
    assert all(length <= limit for length, limit in zip(lengths, (1, 1, 6, 6, 3, 3), strict=True))
    assert lengths[:2] == [1, 1]
    assert max(lengths) > 3


def test_generate_log_probs_equal_policy(subject):
    for temperature in (1.0, 0.6):
        for c in subject.engine.generate(PROMPTS, Sampling(n=2, max_tokens=6, temperature=temperature), seed=2):
            assert c.log_probs == pytest.approx(compute_log_probs(subject.policy, c, temperature), abs=TOLERANCE)


def test_conversation_log_probs_equal_policy(subject):
    questions = [Question(Example(f"{k}?", "a", f"here:{k}"), prompt) for k, prompt in enumerate(PROMPTS)]
    rollout = make_rollout(interrupt, make_tiny_tokenizer())
    responses = sample_responses(subject.engine, rollout, questions, Sampling(n=2, max_tokens=8, stop=()), seed=2)
    assert {one.sampled.count(False) for one in responses} == {len(INSERTED)}
    assert max(len(one.token_ids) for one in responses) == 8
    for one in responses:
        of_policy = compute_log_probs(subject.policy, one)
        expected = [value if flag else 0.0 for value, flag in zip(of_policy, one.sampled, strict=True)]
        assert one.log_probs == pytest.approx(expected, abs=TOLERANCE)


def test_generate_same_seed_gives_same_tokens(subject):
    sampling = Sampling(n=2, max_tokens=6)
    first, again, other = (
        [c.token_ids for c in subject.engine.generate(PROMPTS, sampling, seed=seed)] for seed in (4, 4, 5000)
    )
    assert first == again
    assert first != other


def test_generate_temperature_zero_is_greedy(subject):
    (c,) = subject.engine.generate(PROMPTS[:1], Sampling(temperature=0.0, max_tokens=6, stop=()), seed=0)
    ids = torch.tensor([[*c.prompt_token_ids, *c.token_ids]])
    with torch.no_grad():
        likeliest = subject.policy(ids).logits[0].argmax(dim=-1).tolist()
    begin = len(c.prompt_token_ids) - 1
    assert list(c.token_ids) == likeliest[begin : begin + len(c.token_ids)]


def test_generate_stop_string_ends_and_stays(subject):
    """Every character is a token, so any sampled character can serve as a stop string."""
    (free,) = subject.engine.generate(PROMPTS[:1], Sampling(max_tokens=12, stop=()), seed=6)
    stop = make_tiny_tokenizer().decode([free.token_ids[3]])
    (stopped,) = subject.engine.generate(PROMPTS[:1], Sampling(max_tokens=12, stop=(stop,)), seed=6)
    first = free.token_ids.index(free.token_ids[3])
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.text.endswith(stop)
    assert stopped.finish_reason == "stop"
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 12


def test_generate_end_token_ends_and_stays(subject):
    """A policy biased to its end token ends responses with it: the id is in token_ids, not in the text."""
    eos = make_tiny_tokenizer().eos_token_id
    before = {name: p.detach().clone() for name, p in subject.policy.named_parameters()}
    with (
        torch.no_grad()
    ):  # point the end token's tied embedding along the hidden state, so that it becomes the likeliest token
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


def test_generate_after_push_uses_new_weights(subject):
    """Greedy output and log-probs follow the policy through several pushes."""
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
            assert c.log_probs == pytest.approx(compute_log_probs(subject.policy, c), abs=TOLERANCE)
    assert outputs[0] != outputs[1] != outputs[2]


def copy_weights(policy):
    """Return copies of the weights that are pushed."""
    return [(name, weight.clone()) for name, weight in PolicyWeights(policy, torch.float32)]


def run_self_check(subject, version=None, sampling=None):
    return check_engine(
        subject.engine,
        subject.policy,
        PROMPTS,
        sampling or Sampling(n=4, max_tokens=8),
        version=subject.version if version is None else version,
        tolerance=1e-3,
        seed=11,
    )


def test_self_check_tolerates_one_token_and_no_mean():
    """A single token may differ by more than the mean may."""
    policy = make_tiny_policy()
    engine = HFEngine(policy, make_tiny_tokenizer())
    engine.load_weights(0)
    generate = engine.generate

    def generate_shifted(prompts, sampling, *, seed):
        first, *others = generate(prompts, sampling, seed=seed)
        return [replace(first, log_probs=(first.log_probs[0] - 0.5, *first.log_probs[1:])), *others]

    engine.generate = generate_shifted

    def check(tolerance):
        return check_engine(
            engine, policy, PROMPTS, Sampling(n=4, max_tokens=8), version=0, tolerance=tolerance, seed=1
        )

    agreement = check(0.1)
    assert agreement.largest == pytest.approx(0.5, abs=1e-4)
    assert agreement.mean == pytest.approx(0.5 / agreement.n_tokens, abs=1e-4)
    with pytest.raises(TrainingAbortedError, match="disagree on the log-probs"):
        check(agreement.mean / 2)


def test_self_check_after_push_passes(subject):
    agreement = run_self_check(subject)
    assert agreement.largest < TOLERANCE
    assert agreement.n_tokens > 20


class RawLogProbs(HFEngine):
    """An engine that reports log-probs of the distribution before the temperature."""

    def generate(self, prompts, sampling, *, seed):
        completions = super().generate(prompts, sampling, seed=seed)
        return [replace(c, log_probs=tuple(compute_log_probs(self._policy, c, 1.0))) for c in completions]


def test_self_check_wrong_temperature_fails():
    policy = make_tiny_policy(3)
    subject = Subject("hf", policy, RawLogProbs(policy, make_tiny_tokenizer()))
    subject.push()
    assert run_self_check(subject).mean < TOLERANCE  # at temperature 1 both are equal
    with pytest.raises(TrainingAbortedError, match="disagree on the log-probs"):
        run_self_check(subject, sampling=Sampling(n=4, max_tokens=8, temperature=0.6))


def test_generate_any_end_token_ends_response():
    """A model may have more end tokens than the tokenizer names; a response that ends there is not truncated."""
    policy = make_tiny_policy(3)
    (free,) = HFEngine(policy, make_tiny_tokenizer()).generate(PROMPTS[:1], Sampling(max_tokens=9, stop=()), seed=6)
    end = free.token_ids[4]
    policy.generation_config.eos_token_id = [make_tiny_tokenizer().eos_token_id, end]
    (ended,) = HFEngine(policy, make_tiny_tokenizer()).generate(PROMPTS[:1], Sampling(max_tokens=9, stop=()), seed=6)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert (ended.finish_reason, free.finish_reason) == ("stop", "length")


def test_generate_tokenizer_end_token_ends_response(subject, monkeypatch):
    """A chat template may set an end token that the model's folder does not name."""
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
def test_vllm_on_shared_gpu_sleeps_and_wakes_in_two_parts(tmp_path, monkeypatch):
    """vLLM's own engine core, whose worker only records what it is told: on a CPU it cannot give memory back.

    The cache comes back after the push, so that their peaks do not add up. After each sleep the samples are right.
    """
    from drivers.engines.vllm_startup import Placement

    policy, calls = make_tiny_policy(3), []
    engine = start_vllm(tmp_path, policy)
    try:
        core = engine._llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        send = engine._sender.transfer.send_weights
        monkeypatch.setattr(engine._sender.transfer, "send_weights", lambda: (calls.append("send"), send()))
        monkeypatch.setattr(type(worker), "wake_up", lambda _, tags=None: calls.append(*tags))
        monkeypatch.setattr(type(worker), "sleep", lambda _, level=1: calls.append(f"sleep {level}"))
        engine._placement = Placement(has_own_gpu=False, shares_gpu=True, has_own_process=False)
        for version in range(3):
            engine.load_weights(version)
            assert calls == (["weights", "send", "kv_cache"] if version else ["send"])
            state = (core.is_sleeping(), core.is_scheduler_paused(), core.model_executor.sleeping_tags)
            assert state == (False, False, set())
            for c in engine.generate(PROMPTS, Sampling(n=2, max_tokens=6, stop=()), seed=1):
                assert c.log_probs == pytest.approx(compute_log_probs(policy, c), abs=TOLERANCE)
                assert c.weight_version == version
            calls.clear()
            engine.sleep()
            engine.sleep()  # it is asleep already
            assert calls == ["sleep 2"]
            state = (core.is_sleeping(), core.is_scheduler_paused(), core.model_executor.sleeping_tags)
            assert state == (True, True, {"weights", "kv_cache"})
            calls.clear()
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1.1)
        model = weakref.ref(worker.model_runner.get_model())
        del core, worker
    finally:
        engine.close()
    # The model is freed: a second engine in this process needs its memory.
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_k": 90, "top_p": 0.5}, {"top_k": 400, "min_p": 0.7}, {}], ids=str)
def test_generate_replays_sets(subject, cut):
    """The softmax over the sets that the engine returns gives the log-probs that it returns, also at the beginning."""
    sampling = Sampling(n=4, min_tokens=3, max_tokens=6, temperature=0.7, stop=(), replays=True, **cut)
    completions = subject.engine.generate(PROMPTS, sampling, seed=3)
    eos, sizes = make_tiny_tokenizer().eos_token_id, set()
    for c in completions:
        if cut:
            sets = c.kept.unpack()
            assert c.excluded == ()
            assert all(eos not in kept for kept in sets[:3])
            assert all(token in kept for token, kept in zip(c.token_ids, sets, strict=True))
            sizes |= set(map(len, sets))
        else:
            assert (c.kept, c.excluded) == (None, ((eos,),) * 3)
    assert not sizes or max(sizes) < 98
    if cut == {"top_k": 5}:
        assert sizes == {5}
    rollouts = make_rollout_batch(completions, torch.zeros(len(completions)))
    replayed = forward(subject.policy, rollouts, 0.7)["log_probs"].detach()
    assert_close(replayed, rollouts.sampler_log_probs, rtol=0, atol=TOLERANCE)
    agreement = run_self_check(subject, sampling=sampling)
    assert agreement.largest < TOLERANCE
    assert agreement.n_tokens >= 36  # those below the minimum length too


def test_self_check_skips_tokens_below_min_tokens(subject):
    """There the sampler excludes the end token, so that its log-probs differ by nats from the policy's."""
    assert run_self_check(subject, sampling=Sampling(n=4, min_tokens=4, max_tokens=8)).largest < TOLERANCE
    with pytest.raises(TrainingAbortedError, match="no token to compare"):
        run_self_check(subject, sampling=Sampling(n=4, min_tokens=8, max_tokens=8))


def test_self_check_skipped_push_fails_by_version(subject):
    with pytest.raises(TrainingAbortedError, match="a weight push did not arrive"):
        run_self_check(subject, version=subject.version + 1)


@pytest.mark.vllm
@pytest.mark.parametrize("seen", ["push", "checksums", "log-probs"])
@pytest.mark.parametrize("fault", ["nothing", "stale", "partial"])
def test_faulty_push_fails_by_checksum_and_by_log_probs(subject, fault, seen, monkeypatch):
    """The version says that the weights arrived, but none, the last ones or only a part did.

    Each check alone notices it: the checksums at the push and in the self-check, the log-probs in the self-check.
    """
    from drivers.engines import vllm

    if subject.kind == "hf":
        pytest.skip("this engine shares the policy's weights: no push can go wrong")
    stale = copy_weights(subject.policy)
    subject.perturb(20)
    fresh = copy_weights(subject.policy)
    sent = {
        "nothing": [],
        "stale": stale,
        "partial": [pair for pair in fresh if "layers.1" not in pair[0]] + [p for p in stale if "layers.1" in p[0]],
    }
    with monkeypatch.context() as patch:
        transfer = subject.engine._sender.transfer
        patch.setattr(transfer, "source", FaultyWeights(transfer.source, sent[fault]))
        message = "disagree on the log-probs" if seen == "log-probs" else "differ between the policy"
        if seen == "push":
            with pytest.raises(TrainingAbortedError, match=message):
                subject.push()
        else:
            for check in ("check_arrived", "check_loaded"):
                patch.setattr(vllm, check, lambda *_: None)
            subject.push()
            if seen == "log-probs":
                patch.setattr(subject.engine, "received", list)
            with pytest.raises(TrainingAbortedError, match=message):
                run_self_check(subject)
    subject.push()
    assert run_self_check(subject).largest < TOLERANCE
    assert run_self_check(subject).n_weights == len(fresh)


@pytest.mark.vllm
@pytest.mark.parametrize("fault", ["lacking", "half", "foreign", "misshapen"])
def test_push_that_vllm_does_not_load_fails(subject, fault, monkeypatch):
    """All tensors arrive, but vLLM has no use for some of them. It says so only where it raises an error."""
    from drivers.engines import vllm

    if subject.kind == "hf":
        pytest.skip("this engine shares the policy's weights: no push can go wrong")
    weights = copy_weights(subject.policy)
    name, tensor = next((name, tensor) for name, tensor in weights if "o_proj" in name)
    sent, message = {
        "lacking": (
            [pair for pair in weights if ".o_proj" not in pair[0]],
            "2 of the model's parameters got no weight: .*o_proj",
        ),
        "half": (
            [pair for pair in weights if ".mlp." not in pair[0]],
            "[46] of the model's parameters got no weight: .*layers.0.mlp",
        ),
        "foreign": (
            [*weights, ("model.layers.7.mlp.down_proj.weight", tensor.clone())],
            "load_weights raises ValueError",
        ),
        "misshapen": ([(key, w[:3] if key == name else w) for key, w in weights], "load_weights raises"),
    }[fault]
    with monkeypatch.context() as patch:
        transfer = subject.engine._sender.transfer
        patch.setattr(transfer, "source", FaultyWeights(transfer.source, sent))
        patch.setattr(vllm, "check_arrived", lambda *_: None)
        with pytest.raises(TrainingAbortedError, match=f"did not load into worker 0.*{message}.*pass --engine hf"):
            subject.push()
    subject.push()
    assert run_self_check(subject).largest < TOLERANCE


@pytest.mark.vllm
@pytest.mark.nightly
@pytest.mark.parametrize("own_process", [False, True], ids=["one process", "own process"])
@pytest.mark.parametrize(
    "name",
    [
        "Mixtral",
        "Olmoe",
        "Qwen2Moe",
        "Gemma2",
        "Gemma3Text",
        "Phi3",
        "GPT2",
        "OPT",
        "Cohere",
        "Glm4",
        "Olmo2",
        "GPTNeoX",
    ],
)
def test_push_of_an_architecture_reaches_all_parameters(name, own_process, tmp_path):
    """Fused layers, experts, biases, tied and scaled heads, and models that vLLM takes from transformers."""
    policy = make_architecture(name, sharper=2.0)
    subject = Subject("vllm", policy, start_vllm(tmp_path, policy, own_process=own_process))
    try:
        for seed in range(2):
            subject.push()
            assert run_self_check(subject).mean < TOLERANCE
            subject.perturb(seed)
    finally:
        subject.engine.close()
        gc.collect()


@pytest.mark.vllm
def test_push_never_sent_fails(subject, monkeypatch):
    """The push itself fails, in every step: no tensor was gathered for it."""
    if subject.kind == "hf":
        pytest.skip("this engine shares the policy's weights: no push can go wrong")
    with monkeypatch.context() as patch:
        patch.setattr(subject.engine._sender.transfer, "send_weights", lambda: None)
        with pytest.raises(TrainingAbortedError, match="of the 0 tensors of push"):
            subject.push()
    subject.push()


@pytest.mark.vllm
def test_generate_other_weight_version_fails(subject):
    """Another program has pushed weights; or a response has no version, or two."""
    from drivers.engines.vllm_transfer import version_of

    if subject.kind == "hf":
        pytest.skip("this engine has the policy's weights")
    subject.engine._llm.update_weight_version("somebody's")
    try:
        with pytest.raises(EngineDiedError, match=f"weight version None, expected {subject.version}"):
            subject.engine.generate(PROMPTS, Sampling(max_tokens=2), seed=1)
    finally:
        subject.push()
    assert [version_of(spans) for spans in (["7"], ["7", "7"], ["6", "7"], [])] == [7, 7, None, None]


class Loading(torch.nn.Module):
    """A model of vLLM in small: two layers and a head, and the loader of files that vLLM's models have."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (torch.nn.Linear(2, 2) for _ in range(3))

    def load_weights(self, weights):
        own = dict(self.named_parameters())
        for name, weight in weights:
            if name not in own:
                raise ValueError(f"no place for {name}\nin this model")
            own[name].weight_loader(own[name], weight)


@pytest.fixture
def loading(monkeypatch):
    """Return the small model at the beginning of a push."""
    from vllm.model_executor.layers import vocab_parallel_embedding
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload, record_metadata_for_reloading

    model = Loading()
    model.head.__class__ = type("Head", (torch.nn.Linear,), {})
    monkeypatch.setattr(vocab_parallel_embedding, "ParallelLMHead", type(model.head))
    record_metadata_for_reloading(model)
    initialize_layerwise_reload(model)
    return model


@pytest.mark.medium
def test_receiving_model_names_parameters_without_a_weight(loading):
    """A layer of which all is loaded, one of which a half is, and a head that may be tied."""
    from drivers.engines.vllm_transfer import ReceivingModel

    weights = {name: torch.ones(shape) for name, shape in (("first.weight", (2, 2)), ("first.bias", (2,)))}
    received = ReceivingModel(loading)
    received.load_weights(weights.items())
    received.load_weights([("second.weight", torch.ones(2, 2))])
    received.finish(is_tied=True)
    assert received.describe_unloaded() == "1 of the model's parameters got no weight: second.bias"
    received.finish(is_tied=False)
    assert (
        received.describe_unloaded()
        == "3 of the model's parameters got no weight: head.bias, head.weight, second.bias"
    )
    received.load_weights([("second.bias", torch.ones(2))])
    received.finish(is_tied=True)
    assert received.describe_unloaded() == ""
    assert len(received.checksums()) == 4


@pytest.mark.medium
def test_receiving_model_error_is_reported_after_all_arrived(loading):
    """The sender of NCCL would wait for a receiver that raises an error."""
    from drivers.engines.vllm_transfer import ReceivingModel

    received, asked = ReceivingModel(loading), []

    def send():
        for name in ("first.weight", "unknown.weight", "second.weight"):
            asked.append(name)
            yield name, torch.ones(2, 2)

    received.load_weights(send())
    received.load_weights([("head.weight", torch.ones(2, 2)), ("another.weight", torch.ones(2, 2))])
    received.finish(is_tied=True)
    assert asked == ["first.weight", "unknown.weight", "second.weight"]
    assert list(received.checksums()) == [*asked, "head.weight", "another.weight"]
    assert received.describe_unloaded() == "Loading.load_weights raises ValueError: no place for unknown.weight"


@pytest.mark.medium
def test_nccl_engine_reports_unloaded_weights(loading, monkeypatch):
    """Before vLLM ends the push, and through the method that the trainer calls."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    from drivers.engines.vllm_transfer import CheckedNCCLReceiver, ReceivingModel, WorkerExtension

    engine, config = object.__new__(CheckedNCCLReceiver), SimpleNamespace(tie_word_embeddings=False)
    engine.received = ReceivingModel(loading)
    engine.model_config = SimpleNamespace(hf_config=config, hf_text_config=config)
    worker = WorkerExtension()
    worker.weight_transfer_engine = engine
    seen = []
    monkeypatch.setattr(
        NCCLWeightTransferEngine, "finish_weight_update", lambda _: seen.append(worker.unloaded_weights())
    )
    engine.finish_weight_update()
    assert seen == ["6 of the model's parameters got no weight: first.bias, first.weight, head.bias ..."]
    engine.received = None
    assert worker.unloaded_weights() == ""


class RecordingModel:
    """The model of a worker, which records the weights that it gets."""

    def __init__(self):
        self.loaded = {}

    def load_weights(self, weights):
        self.loaded |= dict(weights)


@pytest.mark.medium
def test_nccl_engine_checksums_each_chunk(monkeypatch):
    """A fake receiver delivers the tensors, so no GPU is needed. After a failure the engine's model is restored."""
    from vllm.distributed.weight_transfer import nccl_engine

    from drivers.engines.vllm_transfer import CheckedNCCLReceiver

    tensors, model, asked = dict(make_tiny_policy().named_parameters()), RecordingModel(), []
    names, fails = list(tensors), False

    def consume(iterator, group, src, post_unpack_func, **more):
        asked.append((dict(iterator), group, src, more["buffer_size_bytes"]))
        post_unpack_func([(name, tensors[name]) for name in names[:7]])
        if fails:
            raise RuntimeError("the connection is gone")
        post_unpack_func([(name, tensors[name]) for name in names[7:]])

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_consumer", consume)
    engine = object.__new__(CheckedNCCLReceiver)
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


@pytest.mark.medium
def test_nccl_transfer_trainer_is_rank_zero():
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    from drivers.engines.vllm import VLLMEngine
    from drivers.engines.vllm_startup import Placement
    from drivers.engines.vllm_transfer import MIN_BUFFER_BYTES, HostSenderInit

    weights = WeightGatherer(make_tiny_policy(), torch.float32)
    engine = object.__new__(VLLMEngine)
    engine._llm = SimpleNamespace(get_world_size=lambda: 2)
    engine._placement = Placement(has_own_gpu=True, shares_gpu=False, has_own_process=True)
    ours = engine._transfer_init(weights)
    assert isinstance(ours, NCCLTrainerInitInfo)
    assert (ours.rank, ours.world_size, ours.is_sender, ours.packed) == (0, 3, True, True)
    assert (ours.master_address, ours.packed_buffer_size_bytes) == ("127.0.0.1", MIN_BUFFER_BYTES)
    large, small = WeightShape("large", torch.bfloat16, (1 << 20, 300)), WeightShape("small", torch.float32, (2,))
    weights.metadata = lambda: [large, small]
    assert engine._transfer_init(weights).packed_buffer_size_bytes == 2 * 300 << 20
    assert 1024 <= ours.master_port < 65536
    engine._placement = Placement(has_own_gpu=False, shares_gpu=False, has_own_process=True)
    assert engine._transfer_init(weights) == HostSenderInit(rank=0, by_file=True)


@pytest.mark.medium
def test_placement_uses_requested_device():
    from drivers.engines.vllm_startup import device_arguments

    def list_sleep_modes(arguments):
        return {arguments.pop(name) for name in ("enable_sleep_mode", "sleep_mode_offload_cudagraph")}

    own = device_arguments(torch.device("cuda", 1), sleeps=False, gpu_memory_utilization=0.85)
    assert list_sleep_modes(own) == {False}
    assert own == {"device_ids": [1], "gpu_memory_utilization": 0.85}
    shared = device_arguments(torch.device("cuda", 0), sleeps=True, gpu_memory_utilization=0.3)
    assert list_sleep_modes(shared) == {True}
    assert shared == {"device_ids": [0], "gpu_memory_utilization": 0.3}
    on_cpu = device_arguments(torch.device("cpu"), sleeps=False, gpu_memory_utilization=0.85)
    assert "device_ids" not in on_cpu


@pytest.mark.medium
@pytest.mark.parametrize(("may_sleep", "same_gpu"), [(True, True), (False, True), (True, False)])
def test_engine_sleeps_only_in_training_on_shared_gpu(may_sleep, same_gpu, monkeypatch):
    """Two models of an evaluation follow each other in one process, where vLLM allows one engine that sleeps."""
    from drivers.engines import vllm_startup

    total = SimpleNamespace(total_memory=100)
    monkeypatch.setattr(vllm_startup.torch.cuda, "get_device_properties", lambda _: total)
    options = make_options(device=torch.device("cuda", 0), may_sleep=may_sleep)
    placement = vllm_startup.place(options, torch.device("cuda", 0 if same_gpu else 1))
    arguments = vllm_startup._llm_arguments(options, placement)
    assert arguments["enable_sleep_mode"] is (may_sleep and same_gpu)


@pytest.mark.medium
def test_engine_on_cuda_keeps_float32_logits_as_the_policy_does(tmp_path, monkeypatch):
    """On a CPU both round logits to the model's type. vLLM takes the override into its configuration."""
    from vllm.engine.arg_utils import EngineArgs

    from drivers.engines import vllm_startup

    monkeypatch.setattr(vllm_startup.torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=100))
    for device, dtype in ((torch.device("cuda", 0), torch.float32), (torch.device("cpu"), torch.bfloat16)):
        options = make_options(save_tiny(tmp_path), device=device, dtype=torch.bfloat16)
        arguments = vllm_startup._llm_arguments(options, vllm_startup.place(options, device))
        overrides = {name: arguments[name] for name in ("model", "dtype", "hf_overrides") if name in arguments}
        assert EngineArgs(**overrides).create_model_config().head_dtype == dtype


@pytest.mark.medium
def test_handshake_of_weight_transfer_has_a_limit():
    """An error of the worker is not reported, so without a limit the wait would last an hour."""
    from drivers.engines.vllm import VLLMEngine
    from drivers.engines.vllm_startup import Placement

    engine, never = object.__new__(VLLMEngine), threading.Event()
    engine._placement = Placement(has_own_gpu=True, shares_gpu=False, has_own_process=True)
    engine._deadline_s, engine._processes, closed = 3600.0, [], []
    engine.close = lambda: closed.append(never.set())
    with pytest.raises(EngineDiedError, match=r"did not finish the handshake within 0.1 s \(--engine-deadline-s\)"):
        engine._call("the handshake", lambda: never.wait(30), 0.1)
    assert closed


@pytest.mark.medium
def test_vllm_wrong_build_raises_usage_error():
    from drivers.engines.vllm import VLLMEngine

    with pytest.raises(UsageError, match="--rollout-device cuda:0: the installed vLLM is built for cpu"):
        VLLMEngine(make_options(device=torch.device("cuda", 0)), WeightGatherer(make_tiny_policy(), torch.float32))


@pytest.mark.medium
@pytest.mark.parametrize("own_process", [False, True])
def test_vllm_head_size_without_a_kernel_is_refused_before_the_start(tmp_path, own_process, monkeypatch):
    save_tiny(tmp_path)
    config = make_tiny_policy().config
    config.head_dim = 16
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("drivers.engines.vllm_startup.LLM", lambda **_: pytest.fail("vLLM was started"))
    with pytest.raises(
        UsageError, match=r"has attention heads of size 16, but vLLM's CPU attention takes only 32, 64"
    ):
        make_vllm_engine(make_tiny_policy(), tmp_path, own_process=own_process)


@pytest.mark.vllm
def test_vllm_start_failure_raises_usage_error(tmp_path):
    save_tiny(tmp_path)
    with pytest.raises(UsageError, match="--engine vllm: vLLM cannot start: "):
        make_vllm_engine(make_tiny_policy(), tmp_path, max_model_len=100_000)

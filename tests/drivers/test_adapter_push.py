"""`--lora-push adapter`: the real vLLM adds the adapter of each push to weights that were sent once."""

import gc
import os
import signal

import pytest
import torch

from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.policy.lora import add_lora
from drivers.policy.weights import WeightGatherer
from drivers.settings.sampling import Sampling
from drivers.train import train
from drivers.training.components import Components
from drivers.training.self_check import check_engine
from tests.drivers.helpers.engines import PROMPTS, compute_log_probs, make_vllm_engine
from tests.drivers.helpers.letters import letter_grader, make_run, make_tiny_config, make_tiny_parts
from tests.drivers.helpers.processes import list_descendants
from tests.drivers.helpers.runs import read_rows
from tests.tiny import make_tiny_policy, save_tiny

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 1e-4
SAMPLING = Sampling(n=4, max_tokens=8, stop=())


class Subject:
    """A policy with LoRA of rank 3, for which vLLM has no buffers, and an engine that gets its adapter."""

    def __init__(self, folder, **options):
        save_tiny(folder)
        self.policy, self.version, self.messages = make_tiny_policy(), -1, []
        self.policy.get_input_embeddings().weight.data.mul_(5)  # so that tokens can be likely
        add_lora(self.policy, 3, 8, seed=5, base="tiny")
        weights = WeightGatherer(self.policy, torch.float32, merges_lora=False)
        options |= {"adapter": self.policy.lora_settings}
        self.engine = make_vllm_engine(self.policy, folder, weights=weights, say=self.messages.append, **options)

    def perturb(self, seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def push(self):
        self.version += 1
        self.engine.load_weights(self.version)

    def check(self):
        """Check the samples by their tokens, and the workers by what they hold, as a run does."""
        completions = self.engine.generate(PROMPTS, SAMPLING, seed=1)
        assert {c.weight_version for c in completions} == {self.version}
        for c in completions:
            assert c.log_probs == pytest.approx(compute_log_probs(self.policy, c), abs=TOLERANCE)
        arguments = (self.engine, self.policy, PROMPTS, SAMPLING)
        agreement = check_engine(*arguments, version=self.version, tolerance=1e-3, seed=2, merges_lora=False)
        assert agreement.largest < TOLERANCE
        assert agreement.n_weights == 2 * 7 * 2 + 20  # two layers of seven matrices; the base has 20 tensors
        return [c.token_ids for c in completions]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    subject = Subject(tmp_path_factory.mktemp("tiny"))
    subject.push()
    yield subject
    subject.engine.close()
    gc.collect()


def test_adapter_push_gives_the_policys_log_probs(subject, monkeypatch):
    """Also with an adapter that is trained; the frozen weights are not sent again, and old adapters are dropped."""
    monkeypatch.setattr(subject.engine._sender, "send", lambda: pytest.fail("the frozen weights were sent again"))
    tokens = [subject.check()]
    for seed in range(2):
        subject.perturb(seed)
        subject.push()
        tokens.append(subject.check())
    assert tokens[0] != tokens[1] != tokens[2]
    assert subject.engine._llm.llm_engine.list_loras() == {subject.engine._adapter.request.lora_int_id}


@pytest.fixture
def vllm_adapter():
    """Return the module, which imports vLLM and its warnings."""
    from drivers.engines import vllm_adapter

    return vllm_adapter


def test_adapter_push_that_does_not_arrive_fails(subject, vllm_adapter, monkeypatch):
    """Each worker reports the adapter that its kernels read, not the one that it was given."""
    write, prefix = vllm_adapter.write_adapter, "base_model.model.model.layers.1.mlp"
    wrong, foreign = f"{prefix}.up_proj.lora_B.weight", {f"{prefix}.sideways.lora_A.weight": torch.ones(3, 64)}
    faults = {
        4: lambda adapter: {name: weight for name, weight in adapter.items() if ".up_proj" not in name},
        1: lambda adapter: adapter | {wrong: adapter[wrong] + 1e-3},
    }
    subject.perturb(7)
    for n_wrong, change in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(vllm_adapter, "write_adapter", lambda adapter, folder: write(change(adapter), folder))  # noqa: B023
            with pytest.raises(TrainingAbortedError, match=rf"of the 48 tensors of push \d+, {n_wrong} differ"):
                subject.push()
    with monkeypatch.context() as patch:
        patch.setattr(subject.engine._llm.llm_engine, "add_lora", lambda request: True)
        with pytest.raises(TrainingAbortedError, match=r"of the 48 tensors of push \d+, 28 differ"):
            subject.push()
    with monkeypatch.context() as patch:
        patch.setattr(vllm_adapter, "write_adapter", lambda adapter, folder: write(adapter | foreign, folder))
        with pytest.raises(UsageError, match=r"vLLM cannot load the adapter: .*sideways.*; pass --lora-push merged"):
            subject.push()
    subject.push()
    subject.check()


def test_adapter_push_after_sleep_brings_the_frozen_weights_again(subject, monkeypatch):
    """Sleep of level 2 drops both; here the worker's sleep overwrites them."""
    from drivers.engines.vllm_startup import Placement

    core = subject.engine._llm.llm_engine.engine_core.engine_core
    worker, calls = core.model_executor.driver_worker.worker, []

    def sleep(_, level=1):
        for layer in worker.model_runner.get_model().modules():
            tensors = [*layer.parameters(recurse=False), *getattr(layer, "lora_a_stacked", ())]
            for tensor in [*tensors, *getattr(layer, "lora_b_stacked", ())]:
                tensor.data.fill_(torch.nan)
        calls.append(f"sleep {level}")

    monkeypatch.setattr(type(worker), "sleep", sleep)
    monkeypatch.setattr(type(worker), "wake_up", lambda _, tags=None: calls.append(*tags))
    monkeypatch.setattr(subject.engine, "_placement", Placement(False, shares_gpu=True, has_own_process=False))
    subject.engine.sleep()
    subject.perturb(8)
    subject.push()
    assert calls == ["sleep 2", "weights", "kv_cache"]
    subject.check()


def test_train_with_adapter_pushes_learns(subject, tmp_path):
    changes = {"n_grpo_steps": 25, "learning_rate": 1e-2, "lora_rank": 3, "lora_alpha": 8, "lora_push": "adapter"}
    config, parts = make_tiny_config(engine="vllm", **changes), make_tiny_parts()
    run = make_run(config, tmp_path / "run", parts.tokenizer)
    try:
        components = Components(subject.policy, subject.engine, letter_grader, parts.questions, parts.questions)
        train(config, components, run)
    finally:
        run.finish()
    rows = read_rows(tmp_path / "run", "train")
    assert sum(row["reward"] for row in rows[-3:]) / 3 > rows[0]["reward"] + 0.3
    assert max(row["sampler_log_prob_diff"] for row in rows if "sampler_log_prob_diff" in row) < 1e-3
    assert [row["step"] for row in read_rows(tmp_path / "run", "check")] == [0, 1]


@pytest.mark.usefixtures("forked_engine")
def test_adapter_engine_that_died_gets_base_and_adapter(tmp_path):
    """In its own process, to which the frozen weights go by a file in memory."""
    import vllm.envs

    vllm.envs.disable_envs_cache()  # an engine in this process, of another test, has filled it
    subject = Subject(tmp_path, own_process=True)
    try:
        for _ in range(2):
            subject.perturb(1)
            subject.push()
        tokens = subject.check()
        (process,) = [child for child in list_descendants(os.getpid()) if child.name() == "VLLM::EngineCore"]
        os.kill(process.pid, signal.SIGKILL)
        assert subject.check() == tokens
        assert len(subject.messages) == 1
    finally:
        subject.engine.close()


def test_adapter_of_a_rank_without_buffers_is_refused(vllm_adapter):
    policy = make_tiny_policy()
    add_lora(policy, 513, 8, seed=5, base="tiny")
    with pytest.raises(UsageError, match=r"vLLM takes ranks up to 512, not --lora-rank 513; pass --lora-push merged"):
        vllm_adapter.adapter_arguments(policy.lora_settings)
    policy = make_tiny_policy()
    add_lora(policy, 9, 18, seed=5, base="tiny")
    arguments = vllm_adapter.adapter_arguments(policy.lora_settings)
    assert arguments["max_lora_rank"] == 16
    assert "lm_head" not in arguments["lora_target_modules"]
    assert len(arguments["lora_target_modules"]) == 7

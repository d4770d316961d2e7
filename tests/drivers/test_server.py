"""vLLM servers as the engine: the samples of an engine of one's own, pushes that are checked, a server that dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from drivers.errors import EngineDiedError, UnsoundRunError, UsageError
from drivers.rollout import Sampling, make_engine
from drivers.self_check import check_engine
from tests.drivers.parts import letter_reward, make_run, tiny_config, tiny_parts
from tests.drivers.test_engines import PROMPTS, policy_log_probs
from tests.drivers.test_supervision import family_of, wait_until
from tests.drivers.test_train import weights
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.xdist_group("vllm"),
    pytest.mark.slow,
    pytest.mark.vllm,
]


def free_port():
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_server(folder, port, *more):
    """As docs/scaling.md has it; the wheel for CPUs has no working `vllm` command."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--enable-scale-out",
        "--enforce-eager",
        "--dtype",
        "float32",
    ]
    command += ["--logprobs-mode", "processed_logprobs", "--load-format", "dummy", "--max-model-len", "64"]
    command += ["--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20), "--no-enable-chunked-prefill"]
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return subprocess.Popen(
        [*command, *more], env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


OURS = (
    "--weight-transfer-config",
    '{"backend": "host"}',
    "--worker-extension-cls",
    "drivers.vllm_engine.WorkerExtension",
)


@contextmanager
def server(folder, port, *more):
    process = start_server(folder, port, *(more or OURS))
    try:
        yield process
    finally:
        children = family_of(process.pid)
        process.terminate()
        process.wait(60)
        for child in children:
            if child.is_running():
                child.kill()


def connect(url, policy, said, **options):
    settings = {"max_model_len": 64, "deadline_s": 60.0} | options
    return make_engine(
        "vllm",
        model_path="unused",
        policy=policy,
        tokenizer=make_tiny_tokenizer(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        gpu_memory_utilization=0.5,
        reserved_bytes=0,
        seed=0,
        urls=url,
        say=said.append,
        **settings,
    )


def check(engine, policy, version):
    return check_engine(engine, policy, PROMPTS, Sampling(n=4, max_tokens=8), version=version, tolerance=1e-3, seed=11)


def test_two_servers_are_one_engine(tmp_path):
    """Prompts are spread, weights pushed to both; every fault in a push is noticed; one dies and comes back."""
    save_tiny(tmp_path)
    policy, said, ports = make_tiny_policy(3), [], (free_port(), free_port())
    urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
    with server(tmp_path, ports[0]), server(tmp_path, ports[1]) as second:
        engine = connect(urls, policy, said)
        engine.load_weights(0)
        assert check(engine, policy, 0).n_weights == len(list(policy.parameters()))
        assert len(engine.received()) == 2

        sampling = Sampling(n=3, max_tokens=6, temperature=0.7, stop=())
        completions = engine.generate(PROMPTS, sampling, seed=2)
        assert [c.prompt_token_ids for c in completions] == [prompt for prompt in PROMPTS for _ in range(3)]
        assert len({c.token_ids for c in completions}) == len(completions)
        assert {c.weight_version for c in completions} == {0}
        for c in completions:
            assert c.log_probs == pytest.approx(policy_log_probs(policy, c, 0.7), abs=1e-4)
        assert engine.generate(PROMPTS, sampling, seed=2) == completions
        assert engine.generate(PROMPTS, sampling, seed=900) != completions

        # It is what an engine in this process samples.
        alone = make_engine(
            "vllm",
            model_path=str(tmp_path),
            policy=policy,
            tokenizer=make_tiny_tokenizer(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            max_model_len=64,
            gpu_memory_utilization=0.5,
            reserved_bytes=0,
            seed=0,
        )
        alone.load_weights(0)
        stopping = Sampling(n=2, max_tokens=6, stop=(completions[0].text[1:2],))
        for one in (sampling, stopping):
            ours, theirs = (some.generate(PROMPTS, one, seed=2) for some in (engine, alone))
            assert [(c.token_ids, c.text, c.finish_reason) for c in ours] == [
                (c.token_ids, c.text, c.finish_reason) for c in theirs
            ]
        alone.close()

        # Faults: a push that is skipped, cut short, or of the weights before.
        stale = [(name, p.detach().clone()) for name, p in policy.named_parameters()]
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.05 * torch.randn_like(p))
        with pytest.raises(UnsoundRunError, match="others than the policy"):
            check(engine, policy, 0)
        fresh = [(name, p.detach().clone()) for name, p in policy.named_parameters()]
        sender = engine._engine._sender
        source = sender.source
        for fault in (stale, fresh[:-1], fresh[:-1] + stale[-1:]):
            sender.source = fault
            engine.load_weights(1)
            with pytest.raises(UnsoundRunError, match="self-check: of the"):
                check(engine, policy, 1)
        sender.source = source
        engine.load_weights(1)
        check(engine, policy, 1)

        # One dies; whoever watches over it starts it again.
        expected = engine.generate(PROMPTS, sampling, seed=2)
        second.send_signal(signal.SIGKILL)
        second.wait()
        for child in family_of(second.pid):
            child.kill()
        begin = time.monotonic()
        with pytest.raises(EngineDiedError, match="no answer when asked to answer 3 prompts"):
            engine._engine.generate(PROMPTS, sampling, seed=2)
        assert time.monotonic() - begin < 30
        with server(tmp_path, ports[1]):
            assert engine.generate(PROMPTS, sampling, seed=2) == expected
            assert "it is started again" in said[-1]
            assert check(engine, policy, 1).n_weights
            trained(tmp_path, urls)
        engine.close()


def trained(folder, urls):
    """The steps of a run with `generate` and with the servers: other samples, the same kind of weights. It learns."""
    from drivers.train import train

    config, parts, said = tiny_config(engine="vllm", n_grpo_steps=15, eval_steps=15), tiny_parts(), []
    engine = connect(urls, parts.policy, said)
    run = make_run(config, folder / "run", parts.tokenizer)
    before = weights(parts.policy)
    try:
        train(config, parts.policy, engine, letter_reward, parts.questions, parts.questions, run)
    finally:
        run.finish()
        engine.close()
    assert run.state.accuracies[-1] > 0.8
    assert not torch.equal(before, weights(parts.policy))


def test_a_server_that_cannot_serve_is_one_clear_line(tmp_path):
    save_tiny(tmp_path)
    port, policy = free_port(), make_tiny_policy(3)
    url = (f"http://127.0.0.1:{port}",)
    with server(tmp_path, port, "--enable-prefix-caching"):  # without what training needs
        wait_until(lambda: is_up(url[0]), 120)
        with pytest.raises(UsageError, match="is to be started with: VLLM_SERVER_DEV_MODE=1"):
            connect(url, policy, [])
    from drivers.vllm_server import ServerEngine

    with pytest.raises(EngineDiedError, match="did not answer within 1 s"):
        ServerEngine(url, policy, dtype=torch.float32, max_model_len=64, start_s=1.0)


def is_up(url):
    try:
        return httpx.get(f"{url}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False

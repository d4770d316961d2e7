"""vLLM servers as the engine: the samples of an engine of one's own, pushes that are checked, a server that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from drivers.common.errors import EngineDiedError, TrainingAbortedError, UsageError
from drivers.engines import supervision
from drivers.engines.factory import make_engine
from drivers.policy.weights import PolicyWeights, checksums
from drivers.settings.sampling import Sampling
from drivers.training.self_check import check_engine
from tests.drivers.parts import letter_grader, make_run, tiny_config, tiny_parts
from tests.drivers.test_engines import PROMPTS, Lying, policy_log_probs
from tests.drivers.test_supervision import family_of, wait_until
from tests.drivers.test_train import weights
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("vllm"), pytest.mark.vllm]


def free_port():
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_server(folder, port, *more, development="1"):
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
    command += ["--logprobs-mode", "processed_logprobs", "--load-format", "dummy", "--max-model-len", "512"]
    command += ["--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20), "--no-enable-chunked-prefill"]
    command += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": development,
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
    "drivers.engines.vllm_transfer.WorkerExtension",
)


@contextmanager
def server(folder, port, *more, **options):
    process = start_server(folder, port, *(more or OURS), **options)
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


@pytest.mark.slow
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
        with pytest.raises(TrainingAbortedError, match="others than the policy"):
            check(engine, policy, 0)
        fresh = [(name, p.detach().clone()) for name, p in policy.named_parameters()]
        sender = engine._engine._sender
        source = sender.source
        for fault in (stale, fresh[:-1], fresh[:-1] + stale[-1:]):
            sender.source = Lying(source, fault)
            with pytest.raises(TrainingAbortedError, match="self-check: of the"):
                engine.load_weights(1)
            with pytest.raises(TrainingAbortedError, match="self-check: of the"):
                check(engine, policy, 1)
        sender.source = source
        engine.load_weights(1)
        check(engine, policy, 1)

        # One dies; whoever watches over it starts it again.
        expected = engine.generate(PROMPTS, sampling, seed=2)
        family = family_of(second.pid)  # who is dead has none
        assert family
        second.send_signal(signal.SIGKILL)
        second.wait()
        for child in family:
            child.kill()
        begin = time.monotonic()
        with pytest.raises(EngineDiedError, match="no answer when asked to answer 3 prompts"):
            engine._engine.generate(PROMPTS, sampling, seed=2)
        assert time.monotonic() - begin < 30
        with pytest.raises(EngineDiedError, match="no answer when asked to take the weights over"):
            engine._engine.load_weights(1)  # the other server has begun
        with server(tmp_path, ports[1]):
            assert engine.generate(PROMPTS, sampling, seed=2) == expected
            assert "it is started again" in said[-1]
            assert check(engine, policy, 1).n_weights
            trained(tmp_path, urls)
            the_program_runs(tmp_path, urls)
        engine.close()


def trained(folder, urls):
    """The steps of a run with `generate` and with the servers: other samples, the same kind of weights. It learns."""
    from drivers.train import train

    config, parts, said = tiny_config(engine="vllm", n_grpo_steps=15, eval_steps=15), tiny_parts(), []
    engine = connect(urls, parts.policy, said)
    run = make_run(config, folder / "run", parts.tokenizer)
    before = weights(parts.policy)
    try:
        train(config, parts.policy, engine, letter_grader, parts.questions, parts.questions, run)
    finally:
        run.finish()
        engine.close()
    assert run.state.accuracies[config.n_grpo_steps] > 0.8
    assert not torch.equal(before, weights(parts.policy))


def the_program_runs(folder, urls):
    """train.py itself, from its command line."""
    from drivers import train

    flags = (
        f"--recipe quickstart --model-path {folder} --dtype float32 --n-grpo-steps 2 --rollout-batch-size 8 "
        "--group-size 4 --train-batch-size 8 --gradient-accumulation-steps 2 --sampling-max-tokens 4 "
        f"--n-val-examples 4 --save-dir {folder / 'out'} --wandb-project None --rollout-url {' '.join(urls)}"
    )
    train.main(flags.split())
    rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "train"] == [1, 2]
    assert [row["n_weights"] for row in rows if row["phase"] == "check"] == [20, 20]


@pytest.mark.slow
def test_a_server_that_cannot_serve_is_one_clear_line(tmp_path):
    save_tiny(tmp_path)
    ports, policy = (free_port(), free_port()), make_tiny_policy(3)
    urls = [(f"http://127.0.0.1:{port}",) for port in ports]
    without_weights = server(tmp_path, ports[0], "--enable-prefix-caching")
    with without_weights, server(tmp_path, ports[1], *OURS, development="0"):
        for url in urls:
            wait_until(lambda url=url: is_up(url[0]), 120)
            with pytest.raises(UsageError, match="is to be started with: VLLM_SERVER_DEV_MODE=1"):
                connect(url, policy, [])
    from drivers.engines.vllm_server import ServerEngine

    with pytest.raises(EngineDiedError, match="did not answer within 1 s"):
        ServerEngine(urls[0], policy, dtype=torch.float32, max_model_len=64, start_s=1.0)


def is_up(url):
    try:
        return httpx.get(f"{url}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


# Without vLLM's server


class Stub(ThreadingHTTPServer):
    """Answers as vLLM's server does, but for what a test puts into `answers`: a status, a body, or what is called."""

    daemon_threads = True

    def handle_error(self, *_):
        """Who asked has gone."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked, self.received = [], {}
        self.answers = {
            "get_world_size": {"world_size": 1},
            "collective_rpc": lambda: {"results": [self.received]},
            "v1/models": {"data": [{"max_model_len": 64}]},
            "reset_prefix_cache": {"success": True},
        }


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path, body = self.path.strip("/"), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((path, json.loads(body or "null")))
        if path == "update_weights" and (file := self.server.asked[-1][1]["update_info"].get("path")):
            self.server.received = checksums(load_file(file).items())
        answer = self.server.answers.get(path, {})
        answer = answer() if callable(answer) else answer
        if answer is None:  # the connection breaks off
            return
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer if isinstance(answer, dict) else {"error": "no"}).encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    server = Stub()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def impatient(monkeypatch):
    """Who is left behind is not waited for."""
    monkeypatch.setattr(supervision, "_COME_OUT_S", 0.2)


def engine_of(*stubs, policy=None, **options):
    from drivers.engines.vllm_server import ServerEngine

    settings = {"dtype": torch.float32, "max_model_len": 64, "deadline_s": 60.0} | options
    return ServerEngine([one.url for one in stubs], policy or make_tiny_policy(3), **settings)


def threads_of_servers():
    return {thread for thread in threading.enumerate() if thread.name.startswith("server")}


@pytest.mark.parametrize("path", ["get_world_size", "collective_rpc", "v1/models", "init_weight_transfer_engine"])
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (404, UsageError, "is to be started with: VLLM_SERVER_DEV_MODE=1"),
        (500, EngineDiedError, "answers 500"),
        (lambda: None, EngineDiedError, "no answer when asked to get ready for weights"),
    ],
    ids=["refused", "broken", "gone"],
)
def test_whatever_goes_wrong_at_the_start_is_one_clear_line(stub, path, answer, error, message):
    stub.answers[path] = answer
    if (path, answer) == ("collective_rpc", 500):  # so answers a server without our extension
        error, message = UsageError, "is to be started with"
    before = threads_of_servers()
    with pytest.raises(error, match=message) as caught:
        engine_of(stub)
    assert stub.url in str(caught.value)
    wait_until(lambda: threads_of_servers() <= before)


def test_a_refusal_is_told_though_the_sender_waits_for_whom_it_refuses(stub, impatient, monkeypatch):
    """As nccl's does, in a rendezvous that hears of no error."""
    from drivers.engines import vllm_server

    def trainer_init(init_info, *, client, source):
        rendezvous = threading.Thread(target=try_to, args=(client.init_weight_transfer_engine, {}), daemon=True)
        rendezvous.start()
        time.sleep(30)

    monkeypatch.setattr(vllm_server.WeightTransferTrainerFactory, "trainer_init", trainer_init)
    stub.answers["init_weight_transfer_engine"] = 400
    begin = time.monotonic()
    with pytest.raises(UsageError, match="is to be started with"):
        engine_of(stub)
    assert time.monotonic() - begin < 10


def try_to(call, *arguments):
    with suppress(Exception):
        call(*arguments)


def test_servers_on_several_sides_all_come_to_the_store_of_the_group(monkeypatch):
    """It listens where all can come to it; each is told this machine's address as it sees it."""
    from vllm.distributed.utils import StatelessProcessGroup

    from drivers.engines import vllm_server

    sides = {"http://one:8000": "127.0.0.1", "http://two:8000": "127.0.0.2"}
    monkeypatch.setattr(vllm_server, "_address_towards", sides.get)
    servers, told = vllm_server.Servers(list(sides), 60.0), []
    servers.sizes = [2, 1]
    monkeypatch.setattr(servers, "call", lambda method, path, bodies: told.extend(bodies))
    engine = object.__new__(vllm_server.ServerEngine)
    engine._servers, engine._device = servers, torch.device("cuda", 0)
    ours = engine._transfer_init()
    servers.init_weight_transfer_engine({"rank_offset": 1, "master_address": ours.master_address, "world_size": 4})
    infos = [body["init_info"] for body in told]
    assert infos == [
        {"rank_offset": 1, "master_address": "127.0.0.1", "world_size": 4},
        {"rank_offset": 3, "master_address": "127.0.0.2", "world_size": 4},
    ]

    def join(address, rank):
        group = StatelessProcessGroup.create(address, ours.master_port, rank, ours.world_size, store_timeout=10)
        return group, group.broadcast_obj("hello" if rank == 0 else None, src=0)

    places = [(ours.master_address, 0), ("127.0.0.1", 1), ("127.0.0.1", 2), ("127.0.0.2", 3)]
    with ThreadPoolExecutor(4) as threads:
        joined = list(threads.map(join, *zip(*places, strict=True)))
    assert [heard for _, heard in joined] == ["hello"] * 4

    sides["http://two:8000"] = "127.0.0.1"
    assert engine._transfer_init().master_address == "127.0.0.1"  # open to nobody else
    servers.close()


def test_this_machine_has_an_address_towards_another():
    from drivers.engines.vllm_server import _address_towards

    assert _address_towards("http://127.0.0.1:1") == "127.0.0.1"
    with pytest.raises(EngineDiedError, match="no way to it"):
        _address_towards("http://no.such.host.invalid:1")


def test_workers_that_cannot_be_asked_what_they_received_are_refused(stub):
    """Of a server with several engines only the first one answers: no push to the others could be checked."""
    stub.answers["get_world_size"] = {"world_size": 2}
    with pytest.raises(UsageError, match=r"only 1 of its 2 workers .* without --data-parallel-size"):
        engine_of(stub)


@pytest.mark.parametrize("version", ["6", "none", None])
def test_samples_of_other_weights_are_not_taken(stub, version):
    """A server that somebody has started again holds dummy weights, and says so with each sample."""
    choice = {"index": 0, "text": "a", "token_ids": [1], "finish_reason": "stop"}
    choice["logprobs"] = {"content": [{"logprob": -1.0}]}
    engine = engine_of(stub)
    engine.load_weights(7)
    stub.answers["inference/v1/generate"] = {"choices": [choice | {"weight_versions": [{"version": "7"}]}]}
    assert engine.generate([[1]], Sampling(), seed=0)[0].weight_version == 7
    spans = [{"version": version}] if version else []
    stub.answers["inference/v1/generate"] = {"choices": [choice | {"weight_versions": spans}]}
    with pytest.raises(EngineDiedError, match="7 was the last one: it has been started again"):
        engine.generate([[1]], Sampling(), seed=0)
    engine.close()


def test_a_cache_that_is_not_dropped_is_noticed(stub, monkeypatch):
    from drivers.engines import vllm_server

    monkeypatch.setattr(vllm_server, "RESET_WAIT_S", 0.01)
    engine = engine_of(stub)
    refusals = 3

    def answer():
        nonlocal refusals
        refusals -= 1
        return {"success": refusals < 0}

    stub.answers["reset_prefix_cache"] = answer
    engine.load_weights(0)
    assert refusals == -1
    refusals = 10_000
    with pytest.raises(RuntimeError, match="refused to drop the prefix cache"):
        engine.load_weights(1)
    engine.close()


def test_closing_does_not_wait_for_a_dead_server(stub, monkeypatch):
    from drivers.engines import vllm_server

    monkeypatch.setattr(vllm_server, "CLOSE_S", 0.3)
    engine, end = engine_of(stub), threading.Event()
    stub.answers["shutdown_weight_transfer_engine"] = end.wait
    begin = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - begin < 5
    end.set()
    with pytest.raises(EngineDiedError, match="were given up"):
        engine.load_weights(0)


ENDING = """
    import sys
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace
    from drivers import environment
    from drivers.errors import EngineDiedError
    from tests.drivers.test_server import engine_of
    engine = engine_of(*(SimpleNamespace(url=url) for url in sys.argv[1:]), deadline_s=3600.0)
    threads = ThreadPoolExecutor(1)  # as nccl's sender asks
    engine._sender.send_weights = lambda: threads.submit(engine._servers.update_weights, {}).result()
    try:
        engine.load_weights(0)
    except EngineDiedError:
        print("told", flush=True)
    engine.close()
"""


def test_a_process_ends_though_a_server_never_answers(stub, tmp_path):
    """The other one has failed, which ends the run: who still waits for the first must not keep the process."""
    script, end, other = tmp_path / "ending.py", threading.Event(), Stub()
    script.write_text(textwrap.dedent(ENDING))
    threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True).start()
    stub.answers["update_weights"] = lambda: end.wait(120) and {}
    other.answers["update_weights"] = 500
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), stub.url, other.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert any(line == "told\n" for line in process.stdout)
            assert process.wait(30) == 0
        finally:
            process.kill()
            end.set()
            other.shutdown()
            other.server_close()


def test_who_waits_for_an_answer_comes_out_when_the_servers_are_given_up(stub):
    """vLLM's own sender asks in a thread that Python waits for at its end."""
    engine, end, came_out = engine_of(stub), threading.Event(), threading.Event()
    stub.answers["update_weights"] = end.wait

    def ask():
        with suppress(EngineDiedError):
            engine._servers.update_weights({})
        came_out.set()

    threading.Thread(target=ask, daemon=True).start()
    wait_until(lambda: stub.asked[-1][0] == "update_weights")
    engine.close()
    assert came_out.wait(10)
    end.set()


def test_a_host_that_vanishes_is_noticed_by_the_kernel(stub, monkeypatch):
    """On every connection, of either client; and no proxy of the environment is asked for one."""
    from drivers.engines import vllm_server

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    made = []

    class Noting(socket.socket):
        def setsockopt(self, *option):
            made.append(option)
            super().setsockopt(*option)

    monkeypatch.setattr(vllm_server.socket, "socket", Noting)
    choice = {"index": 0, "text": "a", "token_ids": [1], "finish_reason": "stop"}
    choice |= {"logprobs": {"content": [{"logprob": -1.0}]}, "weight_versions": [{"version": "7"}]}
    stub.answers["inference/v1/generate"] = {"choices": [choice]}
    engine = engine_of(stub)
    engine.load_weights(7)
    for ask in (lambda: engine.received(), lambda: engine.generate([[1]], Sampling(), seed=0)):
        made.clear()
        ask()
        assert set(vllm_server.keepalive()) <= set(made)
    engine.close()
    wanted = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3, socket.TCP_USER_TIMEOUT: 60000}
    assert {name: value for level, name, value in vllm_server.keepalive() if level == socket.IPPROTO_TCP} == wanted
    monkeypatch.delattr(socket, "TCP_KEEPIDLE")  # as on some systems
    assert len(vllm_server.keepalive()) == 4


def test_a_push_that_was_broken_off_is_ended_before_the_next(stub):
    """vLLM starts none while one is open."""
    is_open = True  # since a trainer was killed

    def start():
        nonlocal is_open
        before, is_open = is_open, True
        return 500 if before else {}

    def finish():
        nonlocal is_open
        before, is_open = is_open, False
        return {} if before else 500

    stub.answers |= {"start_weight_update": start, "finish_weight_update": finish}
    engine = engine_of(stub)
    engine.load_weights(0)
    engine.load_weights(1)
    assert [path for path, _ in stub.asked].count("update_weights") == 2
    stub.answers["start_weight_update"] = 500
    with pytest.raises(EngineDiedError, match="answers 500"):
        engine.load_weights(2)
    engine.close()


class Watched:
    """Weights, and how often they were gathered; what to do in the middle."""

    def __init__(self, between=lambda: None):
        self.begun, self.between = 0, between

    def __iter__(self):
        self.begun += 1
        yield "one", torch.ones(2)
        self.between()
        yield "two", torch.ones(2)


def test_who_was_given_up_gathers_no_weights(stub, impatient):
    """The answer to the start of a push comes too late; nccl would gather after it."""
    engine, late = engine_of(stub, deadline_s=0.5), threading.Event()
    stub.answers["start_weight_update"] = lambda: late.wait(20) and {}
    source = Watched()
    errors = []

    def send():
        try:
            engine._servers.start_weight_update()
            list(source)
        except EngineDiedError as error:
            errors.append(error)

    engine._sender.send_weights = send
    engine._servers._timeout_s = 20.0
    threading.Timer(1.5, late.set).start()  # while it is being closed
    with pytest.raises(EngineDiedError, match="did not take the weights over within"):
        engine.load_weights(0)
    wait_until(lambda: errors)
    assert source.begun == 0


def test_a_push_whose_server_dies_is_told_though_the_sender_waits_for_it(stub, impatient):
    """As nccl's does, whose receiver is gone."""
    engine = engine_of(stub)
    stub.answers["update_weights"] = lambda: None

    def send():
        threading.Thread(target=try_to, args=(engine._servers.update_weights, {}), daemon=True).start()
        time.sleep(30)

    engine._sender.send_weights = send
    begin = time.monotonic()
    with pytest.raises(EngineDiedError, match="no answer when asked to take the weights over"):
        engine.load_weights(0)
    assert time.monotonic() - begin < 10


def test_who_gathers_when_it_is_shut_down_writes_to_no_file_of_another():
    """The number of a file that was closed is the next one's."""
    from drivers.engines.vllm_transfer import HostTrainerEngine, HostTrainerInit

    class Client:
        def init_weight_transfer_engine(self, _):
            pass

    def shut_down():
        number = sender.file.fileno()
        sender.shutdown()
        others.append(os.memfd_create("another"))
        assert others == [number]

    others = []
    sender = HostTrainerEngine.trainer_init(
        HostTrainerInit(rank=0, by_file=True), client=Client(), source=Watched(shut_down)
    )
    with pytest.raises(ValueError, match="closed file"):
        sender.send_weights()
    assert os.fstat(others[0]).st_size == 0
    os.close(others[0])


def test_weights_on_a_gpu_are_sent_from_it_when_they_are_done(monkeypatch):
    """A new thread's device is the first one, and the sender's streams wait for nobody's."""
    from drivers.engines.vllm import VLLMEngine
    from drivers.engines.vllm_server import ServerEngine

    done = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("device", device)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(("wait", device)))

    class Anything:
        def __getattr__(self, name):
            return lambda *_, **__: [{"success": True}]

        def send_weights(self):
            done.append("send")

    device = torch.device("cuda", 1)
    ours, theirs = object.__new__(VLLMEngine), object.__new__(ServerEngine)
    ours._asleep, ours._policy_device, ours._llm = False, device, Anything()
    theirs._device, theirs._servers = device, Anything()
    theirs._servers.urls = ["http://one:8000"]
    for engine in (ours, theirs):
        engine._sender, engine._weights = Anything(), PolicyWeights(make_tiny_policy(), torch.float32)
        engine._received = lambda: [{}]
        engine._load_weights(0)
        assert done == [("device", device), ("wait", device), "send", ("device", device), ("wait", device)]
        done.clear()

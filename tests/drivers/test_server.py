"""vLLM servers as the engine: the samples of a local engine, checked pushes, and a server that dies."""

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drivers.common.errors import EngineDiedError, TrainingAbortedError, UsageError
from drivers.engines import supervision
from drivers.engines.teacher_server import TeacherServer
from drivers.policy.weights import WeightGatherer
from drivers.settings.sampling import Sampling
from drivers.training.components import Components
from drivers.training.self_check import check_engine
from tests.drivers.helpers.engines import (
    PROMPTS,
    TRANSFER_FLAGS,
    FaultyWeights,
    StubServer,
    compute_log_probs,
    connect_to_stubs,
    is_up,
    make_options,
    make_vllm_engine,
    push_to_hanging_server,
    run_server,
    run_stub_server,
)
from tests.drivers.helpers.forked import ForkedProgram
from tests.drivers.helpers.letters import flatten_weights, letter_grader, make_run, make_tiny_config, make_tiny_parts
from tests.drivers.helpers.processes import find_free_port, list_descendants, wait_until
from tests.drivers.helpers.runs import read_rows
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # vLLM's own deprecations
    pytest.mark.medium,  # all import vLLM
]


def run_self_check(engine, policy, version, sampling=None):
    sampling = sampling or Sampling(n=4, max_tokens=8)
    return check_engine(engine, policy, PROMPTS, sampling, version=version, tolerance=1e-3, seed=11)


def describe(completion):
    """Return what was sampled, and the sets that it was drawn from."""
    kept = completion.kept and [frozenset(ids) for ids in completion.kept.unpack()]
    return completion.token_ids, completion.text, completion.finish_reason, kept, completion.excluded


@pytest.mark.vllm
def test_server_engine_two_servers_equal_one_engine(tmp_path):
    """Prompts are distributed and weights pushed to both; every faulty push is noticed; one dies and returns."""
    save_tiny(tmp_path)
    policy, messages, ports = make_tiny_policy(3), [], (find_free_port(), find_free_port())
    urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
    with run_server(tmp_path, ports[0]), run_server(tmp_path, ports[1]) as second:
        engine = make_vllm_engine(policy, urls=urls, say=messages.append, deadline_s=60.0)
        engine.load_weights(0)
        assert run_self_check(engine, policy, 0).n_weights == len(list(policy.parameters()))
        assert len(engine.received()) == 2

        sampling = Sampling(n=3, max_tokens=6, temperature=0.7, stop=())
        completions = engine.generate(PROMPTS, sampling, seed=2)
        assert [c.prompt_token_ids for c in completions] == [prompt for prompt in PROMPTS for _ in range(3)]
        assert len({c.token_ids for c in completions}) == len(completions)
        assert {c.weight_version for c in completions} == {0}
        for c in completions:
            assert c.log_probs == pytest.approx(compute_log_probs(policy, c, 0.7), abs=1e-4)
        assert engine.generate(PROMPTS, sampling, seed=2) == completions
        assert engine.generate(PROMPTS, sampling, seed=900) != completions
        check_teacher(tmp_path, urls[0], policy, completions)

        # The samples equal those of an engine in this process.
        alone = make_vllm_engine(policy, tmp_path)
        alone.load_weights(0)
        stopping = Sampling(n=2, max_tokens=6, stop=(completions[0].text[1:2],))
        replayed = Sampling(n=2, max_tokens=6, stop=(), min_tokens=3, replays=True)
        truncated = replace(replayed, top_k=90, top_p=0.5)
        for one in (sampling, stopping, replayed, truncated):
            ours, theirs = (list(map(describe, some.generate(PROMPTS, one, seed=2))) for some in (engine, alone))
            assert ours == theirs
        assert run_self_check(engine, policy, 0, truncated).n_tokens > 0
        alone.close()

        # Faults: a push that is skipped, cut short, or has the previous weights.
        stale = [(name, p.detach().clone()) for name, p in policy.named_parameters()]
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.05 * torch.randn_like(p))
        with pytest.raises(TrainingAbortedError, match="differ between the policy"):
            run_self_check(engine, policy, 0)
        fresh = [(name, p.detach().clone()) for name, p in policy.named_parameters()]
        sender = engine._engine._sender.transfer
        source = sender.source
        for fault in (stale, fresh[:-1], fresh[:-1] + stale[-1:]):
            sender.source = FaultyWeights(source, fault)
            with pytest.raises(TrainingAbortedError, match="self-check: of the"):
                engine.load_weights(1)
            with pytest.raises(TrainingAbortedError, match="self-check: of the"):
                run_self_check(engine, policy, 1)
        sender.source = source
        engine.load_weights(1)
        run_self_check(engine, policy, 1)

        # One server dies and is started again.
        expected = engine.generate(PROMPTS, sampling, seed=2)
        family = list_descendants(second.pid)  # a dead process has none
        assert family
        second.kill()
        second.join()
        for child in family:
            child.kill()
        begin = time.monotonic()
        with pytest.raises(EngineDiedError, match="no response during sampling from 3 prompts"):
            engine._engine.generate(PROMPTS, sampling, seed=2)
        assert time.monotonic() - begin < 30
        with pytest.raises(EngineDiedError, match="no response during the weight push"):
            engine._engine.load_weights(1)  # the other server has begun its push
        with run_server(tmp_path, ports[1]):
            assert engine.generate(PROMPTS, sampling, seed=2) == expected
            assert "restarting the engine" in messages[-1]
            assert run_self_check(engine, policy, 1).n_weights
            check_training(tmp_path, urls)
            check_program(tmp_path, urls)
        engine.close()


def check_training(folder, urls):
    """Check that a run with servers learns."""
    from drivers.train import train

    config, parts, messages = make_tiny_config(engine="vllm", n_grpo_steps=15, eval_steps=15), make_tiny_parts(), []
    engine = make_vllm_engine(parts.policy, urls=urls, say=messages.append, deadline_s=60.0)
    run = make_run(config, folder / "run", parts.tokenizer)
    before = flatten_weights(parts.policy)
    try:
        train(config, Components(parts.policy, engine, letter_grader, parts.questions, parts.questions), run)
    finally:
        run.finish()
        engine.close()
    assert run.state.accuracies[config.n_grpo_steps] > 0.8
    assert not torch.equal(before, flatten_weights(parts.policy))


def check_teacher(folder, url, policy, completions):
    """Check that a server is a teacher: it scores as the model that was pushed to it does."""
    teacher = TeacherServer(url, 60.0)
    teacher.check(make_tiny_tokenizer(), last_id=97, longest=511)
    expected = [value for completion in completions for value in compute_log_probs(policy, completion)]
    assert teacher.compute_log_probs(completions) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UsageError, match=rf"--teacher {url}/v1/completions: responds with 400: .*out of vocabulary"):
        teacher.check(make_tiny_tokenizer(), last_id=98, longest=511)
    rows = run_program(folder, "taught", f"--teacher {url} --teacher-only --engine hf")
    divergences = [row["teacher_kl"] for row in rows if row["phase"] == "train"]
    assert len(divergences) == 2
    assert divergences[0] > 0


def check_program(folder, urls):
    """Check that train.py runs with servers."""
    rows = run_program(folder, "out", f"--rollout-url {' '.join(urls)}")
    assert [row["step"] for row in rows if row["phase"] == "train"] == [1, 2]
    assert [row["n_weights"] for row in rows if row["phase"] == "check"] == [20, 20]


def run_program(folder, name, flags):
    """Return the log of a run of train.py from its command line."""
    from drivers import train

    small = (
        f"--recipe quickstart --model-path {folder} --dtype float32 --n-grpo-steps 2 --rollout-batch-size 8 "
        "--group-size 4 --train-batch-size 8 --gradient-accumulation-steps 2 --sampling-max-tokens 4 "
        f"--n-val-examples 4 --save-dir {folder / name} --wandb-project None"
    )
    train.main([*small.split(), *flags.split()])
    return read_rows(folder / name)


@pytest.mark.vllm
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("flags", "development"),
    [(("--enable-prefix-caching",), "1"), (TRANSFER_FLAGS, "0")],
    ids=["without the weight transfer", "without the development mode"],
)
def test_server_engine_unfit_server_raises_usage_error(tmp_path, flags, development):
    """The stub below refuses each request; these are the two ways in which a real server lacks something."""
    save_tiny(tmp_path)
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    with run_server(tmp_path, port, *flags, development=development):
        wait_until(lambda: is_up(url), 120)
        with pytest.raises(UsageError, match="start it with: VLLM_SERVER_DEV_MODE=1"):
            make_vllm_engine(make_tiny_policy(3), urls=(url,), deadline_s=60.0)


def test_server_engine_without_server_raises():
    from drivers.engines.vllm_server import ServerEngine

    options = make_options(urls=(f"http://127.0.0.1:{find_free_port()}",))
    with pytest.raises(EngineDiedError, match="did not respond within 1 s"):
        ServerEngine(options, WeightGatherer(make_tiny_policy(3), torch.float32), start_s=1.0)


# With a stub of vLLM's server


@pytest.fixture
def stub():
    with run_stub_server() as server:
        yield server


@pytest.fixture
def impatient(monkeypatch):
    """Do not wait for abandoned threads."""
    monkeypatch.setattr(supervision, "_MAX_UNWIND_S", 0.2)


def list_server_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("server")}


@pytest.mark.parametrize("path", ["get_world_size", "collective_rpc", "v1/models", "init_weight_transfer_engine"])
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (404, UsageError, "start it with: VLLM_SERVER_DEV_MODE=1"),
        (500, EngineDiedError, "responds with 500"),
        (lambda: None, EngineDiedError, "no response during the setup of the weight transfer"),
    ],
    ids=["refused", "broken", "gone"],
)
def test_server_engine_start_failure_is_one_line(stub, path, answer, error, message):
    stub.answers[path] = answer
    if (path, answer) == ("collective_rpc", 500):  # the answer of a server without our extension
        error, message = UsageError, "start it with"
    before = list_server_threads()
    with pytest.raises(error, match=message) as caught:
        connect_to_stubs(stub)
    assert stub.url in str(caught.value)
    wait_until(lambda: list_server_threads() <= before)


def test_server_engine_refusal_is_raised_while_sender_waits(stub, impatient, monkeypatch):
    """nccl's rendezvous waits without learning of the error."""
    from drivers.engines import vllm_transfer

    def trainer_init(init_info, *, client, source):
        rendezvous = threading.Thread(target=call_quietly, args=(client.init_weight_transfer_engine, {}), daemon=True)
        rendezvous.start()
        time.sleep(30)

    monkeypatch.setattr(vllm_transfer.WeightTransferTrainerFactory, "trainer_init", trainer_init)
    stub.answers["init_weight_transfer_engine"] = 400
    begin = time.monotonic()
    with pytest.raises(UsageError, match="start it with"):
        connect_to_stubs(stub)
    assert time.monotonic() - begin < 10


def call_quietly(call, *arguments):
    with suppress(Exception):
        call(*arguments)


def test_servers_on_other_hosts_join_transfer_group(monkeypatch):
    """Rank 0 listens where every server can connect; each server gets this machine's address as it sees it."""
    from vllm.distributed.utils import StatelessProcessGroup

    from drivers.engines import vllm_http, vllm_server

    sides = {"http://one:8000": "127.0.0.1", "http://two:8000": "127.0.0.2"}
    monkeypatch.setattr(vllm_http, "local_address_towards", sides.get)
    servers, bodies_sent = vllm_http.Servers(list(sides), 60.0), []
    servers.n_workers = [2, 1]
    monkeypatch.setattr(servers, "call", lambda method, path, bodies: bodies_sent.extend(bodies))
    engine = object.__new__(vllm_server.ServerEngine)
    engine._servers, engine._device = servers, torch.device("cuda", 0)
    weights = WeightGatherer(make_tiny_policy(3), torch.float32)
    ours = engine._transfer_init(weights)
    servers.init_weight_transfer_engine({"rank_offset": 1, "master_address": ours.master_address, "world_size": 4})
    infos = [body["init_info"] for body in bodies_sent]
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
    assert engine._transfer_init(weights).master_address == "127.0.0.1"  # closed to other machines
    servers.close()


def test_address_towards_host():
    from drivers.engines.vllm_http import local_address_towards

    assert local_address_towards("http://127.0.0.1:1") == "127.0.0.1"
    with pytest.raises(EngineDiedError, match="no route"):
        local_address_towards("http://no.such.host.invalid:1")


def test_server_engine_data_parallel_workers_are_refused(stub):
    """With data parallelism only the first engine of a server answers, so no push to the others can be checked."""
    stub.answers["get_world_size"] = {"world_size": 2}
    with pytest.raises(UsageError, match=r"only 1 of its 2 workers .* without --data-parallel-size"):
        connect_to_stubs(stub)


@pytest.mark.parametrize("version", ["6", "none", None])
def test_server_engine_other_weight_version_fails(stub, version):
    """A restarted server holds dummy weights and reports so with each sample."""
    choice = {"index": 0, "text": "a", "token_ids": [1], "finish_reason": "stop"}
    choice["logprobs"] = {"content": [{"logprob": -1.0}]}
    engine = connect_to_stubs(stub)
    engine.load_weights(7)
    stub.answers["inference/v1/generate"] = {"choices": [choice | {"weight_versions": [{"version": "7"}]}]}
    assert engine.generate([[1]], Sampling(), seed=0)[0].weight_version == 7
    spans = [{"version": version}] if version else []
    stub.answers["inference/v1/generate"] = {"choices": [choice | {"weight_versions": spans}]}
    with pytest.raises(EngineDiedError, match="expected 7: it was restarted"):
        engine.generate([[1]], Sampling(), seed=0)
    engine.close()


def test_server_engine_replay_without_token_ids_raises_usage_error(stub):
    token = {"token": "7", "logprob": -1.0}  # a text that could be an id
    choice = {"index": 0, "text": "a", "token_ids": [1], "finish_reason": "stop", "weight_versions": []}
    choice["logprobs"] = {"content": [token | {"top_logprobs": [token]}]}
    stub.answers["inference/v1/generate"] = {"choices": [choice]}
    engine = connect_to_stubs(stub)
    with pytest.raises(UsageError, match="start it with --return-tokens-as-token-ids"):
        engine.generate([[1]], Sampling(top_k=5, replays=True), seed=0)
    engine.close()


def test_server_engine_prefix_cache_not_reset_fails(stub, monkeypatch):
    from drivers.engines import vllm_server

    monkeypatch.setattr(vllm_server, "RESET_WAIT_S", 0.01)
    engine = connect_to_stubs(stub)
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


def test_server_engine_push_that_is_not_loaded_fails(stub):
    engine = connect_to_stubs(stub)
    engine.load_weights(0)
    stub.unloaded = "2 parameters got no weight: model.norm.weight, lm_head.weight"
    with pytest.raises(TrainingAbortedError, match=r"push 1 did not load into worker 0.*2 parameters got no weight"):
        engine.load_weights(1)
    engine.close()


def test_server_engine_close_does_not_wait(stub, monkeypatch):
    from drivers.engines import vllm_server

    monkeypatch.setattr(vllm_server, "CLOSE_S", 0.3)
    engine, end = connect_to_stubs(stub), threading.Event()
    stub.answers["shutdown_weight_transfer_engine"] = end.wait
    begin = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - begin < 5
    end.set()
    with pytest.raises(EngineDiedError, match="was closed"):
        engine.load_weights(0)


@pytest.mark.medium
def test_server_engine_hanging_server_lets_process_exit(stub, tmp_path):
    """Another server has failed, which ends the run; the thread that waits for the first must not keep the process."""
    end, other = threading.Event(), StubServer()
    threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True).start()
    stub.answers["update_weights"] = lambda: end.wait(120) and {}
    other.answers["update_weights"] = 500
    program = ForkedProgram(push_to_hanging_server, [stub.url, other.url], output=tmp_path / "said")
    try:
        wait_until(lambda: "raised\n" in program.output, 60)
        assert program.wait(30) == 0
    finally:
        program.process.kill()
        end.set()
        other.shutdown()
        other.server_close()


def test_server_engine_close_releases_waiting_threads(stub):
    """Python waits at its exit for the threads of vLLM's own sender."""
    engine, end, came_out = connect_to_stubs(stub), threading.Event(), threading.Event()
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


def test_servers_closed_while_connecting_leave_no_socket(stub, monkeypatch):
    """A connection that is made after the close must still be closed after its answer."""
    from drivers.engines.vllm_http import Servers

    servers, connect, made = Servers([stub.url], 60.0), socket.create_connection, []

    def connect_and_close(*arguments, **named):
        made.append(connect(*arguments, **named))
        servers.close()
        return made[0]

    monkeypatch.setattr(socket, "create_connection", connect_and_close)
    with suppress(TimeoutError):  # the answer is faster, or not
        servers.post("reset_prefix_cache")
    wait_until(lambda: made[0].fileno() == -1, 10)
    assert stub.asked == [("reset_prefix_cache", None)]


def test_server_engine_connections_use_keepalive(stub, monkeypatch):
    """This holds for every connection of both clients, and none uses a proxy of the environment."""
    from drivers.engines import vllm_http

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    made = []

    class Noting(socket.socket):
        def setsockopt(self, *option):
            made.append(option)
            super().setsockopt(*option)

    monkeypatch.setattr(vllm_http.socket, "socket", Noting)
    choice = {"index": 0, "text": "a", "token_ids": [1], "finish_reason": "stop"}
    choice |= {"logprobs": {"content": [{"logprob": -1.0}]}, "weight_versions": [{"version": "7"}]}
    stub.answers["inference/v1/generate"] = {"choices": [choice]}
    engine = connect_to_stubs(stub)
    engine.load_weights(7)
    for ask in (lambda: engine.received(), lambda: engine.generate([[1]], Sampling(), seed=0)):
        made.clear()
        ask()
        assert set(vllm_http.keepalive_options()) <= set(made)
    engine.close()
    wanted = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3, socket.TCP_USER_TIMEOUT: 60000}
    assert {
        name: value for level, name, value in vllm_http.keepalive_options() if level == socket.IPPROTO_TCP
    } == wanted
    monkeypatch.delattr(socket, "TCP_KEEPIDLE")  # some systems lack it
    assert len(vllm_http.keepalive_options()) == 4


def test_server_engine_interrupted_push_is_finished_first(stub):
    """vLLM starts no push while another one is open."""
    is_open = True  # a killed trainer has left it open

    def start():
        nonlocal is_open
        before, is_open = is_open, True
        return 500 if before else {}

    def finish():
        nonlocal is_open
        before, is_open = is_open, False
        return {} if before else 500

    stub.answers |= {"start_weight_update": start, "finish_weight_update": finish}
    engine = connect_to_stubs(stub)
    engine.load_weights(0)
    engine.load_weights(1)
    assert [path for path, _ in stub.asked].count("update_weights") == 2
    stub.answers["start_weight_update"] = 500
    with pytest.raises(EngineDiedError, match="responds with 500"):
        engine.load_weights(2)
    engine.close()


class CountingSource:
    """A source of weights that counts how often it is gathered and calls a function halfway."""

    def __init__(self, between=lambda: None):
        self.begun, self.between = 0, between

    def __iter__(self):
        self.begun += 1
        yield "one", torch.ones(2)
        self.between()
        yield "two", torch.ones(2)


def test_server_engine_abandoned_push_gathers_nothing(stub, impatient):
    """The answer to the start of a push comes too late, and nccl would gather after it."""
    engine, late = connect_to_stubs(stub, deadline_s=0.5), threading.Event()
    stub.answers["start_weight_update"] = lambda: late.wait(20) and {}
    source = CountingSource()
    errors = []

    def send():
        try:
            engine._servers.start_weight_update()
            list(source)
        except EngineDiedError as error:
            errors.append(error)

    engine._sender.transfer.send_weights = send
    engine._servers._timeout_s = 20.0
    threading.Timer(1.5, late.set).start()  # during close
    with pytest.raises(EngineDiedError, match="did not finish the weight push within"):
        engine.load_weights(0)
    wait_until(lambda: errors)
    assert source.begun == 0


def test_server_engine_death_in_push_is_raised_while_sender_waits(stub, impatient):
    """nccl's sender waits for a receiver that is gone."""
    engine = connect_to_stubs(stub)
    stub.answers["update_weights"] = lambda: None

    def send():
        threading.Thread(target=call_quietly, args=(engine._servers.update_weights, {}), daemon=True).start()
        time.sleep(30)

    engine._sender.transfer.send_weights = send
    begin = time.monotonic()
    with pytest.raises(EngineDiedError, match="no response during the weight push"):
        engine.load_weights(0)
    assert time.monotonic() - begin < 10


def test_host_sender_after_shutdown_writes_nothing():
    """The descriptor of a closed file belongs to the next file that is opened."""
    from drivers.engines.vllm_transfer import HostSender, HostSenderInit

    class Client:
        def init_weight_transfer_engine(self, _):
            pass

    def shut_down():
        number = sender.file.fileno()
        sender.shutdown()
        others.append(os.memfd_create("another"))
        assert others == [number]

    others = []
    sender = HostSender.trainer_init(
        HostSenderInit(rank=0, by_file=True), client=Client(), source=CountingSource(shut_down)
    )
    with pytest.raises(ValueError, match="closed file"):
        sender.send_weights()
    assert os.fstat(others[0]).st_size == 0
    os.close(others[0])


def test_push_from_gpu_sets_device_and_synchronizes(monkeypatch):
    """A new thread uses the first device, and the sender's streams do not wait for other streams."""
    from drivers.engines.vllm import VLLMEngine
    from drivers.engines.vllm_server import ServerEngine
    from drivers.engines.vllm_transfer import WeightSender

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
    ours._is_asleep, ours._policy_device, ours._llm, ours._adapter = False, device, Anything(), None
    theirs._device, theirs._servers = device, Anything()
    theirs._servers.urls = ["http://one:8000"]
    sender = object.__new__(WeightSender)
    sender.transfer, sender._weights = Anything(), SimpleNamespace(device=device, take_checksums=dict)
    for engine in (ours, theirs):
        engine._sender = sender
        engine._received, engine._unloaded = lambda: [{}], list
        engine._load_weights(0)
        assert done == [("device", device), ("wait", device), "send", ("device", device), ("wait", device)]
        done.clear()


def test_format_command_depends_on_the_policy_device():
    """A policy on a GPU sends by NCCL, and keeps float32 logits, which vLLM would round."""
    from drivers.engines.vllm_server import format_command

    on_cpu, on_gpu = (format_command(torch.bfloat16, torch.device(name)) for name in ("cpu", "cuda"))
    assert (
        on_gpu.replace(""" --hf-overrides '{"head_dtype": "float32"}'""", "").replace("checked_nccl", "host") == on_cpu
    )
    assert "--hf-overrides" in on_gpu
    assert "--hf-overrides" not in on_cpu
    assert (
        """--dtype bfloat16 --max-model-len TOKENS --weight-transfer-config '{"backend": "host"}' --worker""" in on_cpu
    )

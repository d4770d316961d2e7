"""Engines for tests: scripted, vLLM in one or two processes, vLLM servers and a stub of a server."""

import json
import runpy
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import torch
from safetensors.torch import load_file

from drivers.common.errors import EngineDiedError
from drivers.engines.factory import make_engine
from drivers.engines.options import EngineOptions
from drivers.policy.checksums import checksums
from drivers.policy.weights import WeightGatherer
from tests.drivers.helpers.forked import ForkedProgram, fork_engine_from_here
from tests.drivers.helpers.letters import make_completion
from tests.drivers.helpers.processes import list_descendants
from tests.tiny import make_tiny_policy, make_tiny_tokenizer

PROMPTS = ((5, 6, 7, 8), (9, 10), (11, 12, 13))
VLLM_SETTINGS = {
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "max_model_len": 64,
    "gpu_memory_utilization": 0.5,
    "seed": 0,
}


class ScriptedEngine:
    """An engine that answers with the given texts."""

    def __init__(self, *texts):
        self.texts = texts

    def generate(self, prompts, sampling, *, seed):
        assert len(prompts) * sampling.n == len(self.texts)
        return [
            make_completion(prompts[k // sampling.n], [3] * (k + 1), text=text) for k, text in enumerate(self.texts)
        ]


def compute_log_probs(policy, completion, temperature=1.0):
    """Return the policy's own log-probs of a completion's tokens."""
    ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
    with torch.no_grad():
        rows = torch.log_softmax(policy(ids).logits[0].double() / temperature, dim=-1)
    begin = len(completion.prompt_token_ids) - 1
    return [rows[begin + k, token].item() for k, token in enumerate(completion.token_ids)]


class FaultyWeights:
    """A source of weights that gathers all and yields others in their place."""

    def __init__(self, source, fault):
        self.source, self.fault = source, fault

    def __iter__(self):
        list(self.source)
        return iter(self.fault)


def make_options(model_path="unused", **changes):
    """Return the options of an engine for the tiny model on a CPU."""
    return EngineOptions(model_path=str(model_path), **VLLM_SETTINGS | changes)


def make_vllm_engine(policy, model_path="unused", *, tokenizer=None, weights=None, say=print, **changes):
    """Return the engine that a program makes for `--engine vllm`: servers, supervised or in this process."""
    options = make_options(model_path, **changes)
    weights = weights or WeightGatherer(policy, options.dtype)
    return make_engine("vllm", options, weights, tokenizer or make_tiny_tokenizer(), say)


def start_vllm(folder, policy, own_process=False, dtype=torch.float32):
    """Start vLLM on a tiny model without supervision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from drivers.engines.vllm import VLLMEngine

        policy.save_pretrained(folder)
        make_tiny_tokenizer().save_pretrained(folder)
        options = make_options(folder, own_process=own_process, dtype=dtype)
        return VLLMEngine(options, WeightGatherer(policy, dtype))


# vLLM servers

TRANSFER_FLAGS = (
    "--weight-transfer-config",
    '{"backend": "host"}',
    "--worker-extension-cls",
    "drivers.engines.vllm_transfer.WorkerExtension",
)


@contextmanager
def run_server(folder, port, *flags, development="1"):
    """Run a vLLM server as docs/scaling.md starts it, in a fork of the process that has imported vLLM."""
    command = ["api_server", "--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enable-scale-out", "--enforce-eager", "--dtype", "float32", "--logprobs-mode", "processed_logprobs"]
    command += ["--load-format", "dummy", "--max-model-len", "512", "--block-size", "32"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--no-enable-chunked-prefill", "--max-logprobs", "-1"]
    command += ["--return-tokens-as-token-ids"]
    command += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
    variables = {"VLLM_SERVER_DEV_MODE": development, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    output = folder / f"server-{port}"
    program = ForkedProgram(serve, [*command, *(flags or TRANSFER_FLAGS)], output=output, variables=variables)
    process = program.process
    try:
        yield process
    finally:
        children = list_descendants(process.pid)
        process.terminate()
        process.join(30)
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()


def serve(command):
    """Run `python -m vllm.entrypoints.openai.api_server`; the wheel for CPUs has no working `vllm` command."""
    fork_engine_from_here()
    sys.argv = command
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


def is_up(url):
    """Return whether a server answers."""
    try:
        return httpx.get(f"{url}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


class StubServer(ThreadingHTTPServer):
    """A server that answers as vLLM's does; a test changes `answers`: a status, a body or a function."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        """Ignore a client that has disconnected."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked, self.received, self.unloaded = [], {}, ""
        self.answers = {
            "get_world_size": {"world_size": 1},
            "collective_rpc": lambda: {"results": [self.answer_worker(self.asked[-1][1]["method"])]},
            "v1/models": {"data": [{"max_model_len": 64}]},
            "reset_prefix_cache": {"success": True},
        }

    def answer_worker(self, method):
        """Return what our extension of a worker answers."""
        return {"received_checksums": self.received, "unloaded_weights": self.unloaded}[method]

    def answer(self, path, body):
        """Return the answer to a request."""
        answer = self.answers.get(path, {})
        return answer() if callable(answer) else answer


class StubTeacher(StubServer):
    """A server that scores prompts as vLLM's does; a test changes an answer by a function in `changes`."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.tokenizer, self.changes = teacher, make_tiny_tokenizer(), {}

    def answer(self, path, body):
        return self.changes.get(path, lambda answer: answer)(self.make_answer(path, body))

    def make_answer(self, path, body):
        """Return vLLM's answer."""
        if path == "detokenize":
            return {"prompt": self.tokenizer.decode(body["tokens"])}
        if path != "v1/completions":
            return super().answer(path, body)
        assert (body["max_tokens"], body["prompt_logprobs"]) == (1, 0)
        first, *others = body["prompt"]
        values = compute_log_probs(self.teacher, make_completion([first], others))
        entries = [{str(token): {"logprob": value}} for token, value in zip(others, values, strict=True)]
        return {"choices": [{"prompt_logprobs": [None, *entries]}]}


class StubHandler(BaseHTTPRequestHandler):
    """The handler of StubServer's requests."""

    protocol_version = "HTTP/1.1"  # keeps a connection open for more requests, as vLLM does

    def do_GET(self):
        path, body = self.path.strip("/"), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(body or "null")
        self.server.asked.append((path, body))
        if path == "update_weights" and (file := body["update_info"].get("path")):
            self.server.received = checksums(load_file(file).items())
        answer = self.server.answer(path, body)
        if answer is None:
            self.close_connection = True
            return
        status, content = (answer, {"error": "no"}) if isinstance(answer, int) else (200, answer)
        text = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@contextmanager
def run_stub_server(server=None):
    """Run a stub of a vLLM server in a thread."""
    server = server or StubServer()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def connect_to_stubs(*stubs, policy=None, **options):
    """Return a ServerEngine that is connected to stubs, or to anything with a `url`."""
    from drivers.engines.vllm_server import ServerEngine

    settings = make_options(urls=[stub.url for stub in stubs], **{"deadline_s": 60.0} | options)
    return ServerEngine(settings, WeightGatherer(policy or make_tiny_policy(3), settings.dtype))


def push_to_hanging_server(urls):
    """Push from a thread of its own, as NCCL's sender does, and print when the push has failed."""
    engine = connect_to_stubs(*(SimpleNamespace(url=url) for url in urls), deadline_s=3600.0)
    threads = ThreadPoolExecutor(1)
    engine._sender.transfer.send_weights = lambda: threads.submit(engine._servers.update_weights, {}).result()
    try:
        engine.load_weights(0)
    except EngineDiedError:
        print("raised", flush=True)
    engine.close()

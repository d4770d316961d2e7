"""HTTP client of one or several vLLM servers."""

import socket
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx

from drivers.common.errors import EngineDiedError, UsageError
from drivers.engines.supervision import in_thread

CONNECT_S = 60.0
"""Longest time to connect, and longest silence of a host before it counts as lost."""
_POLL_INTERVAL_S = 0.2
_MAX_CONNECTIONS = 512


def keepalive_options() -> list[tuple[int, int, int]]:
    """Return socket options by which the kernel notices a lost host after `CONNECT_S`, even during a request.

    A machine that loses its power closes no connection; without these options the kernel would wait for hours.
    """
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    # Probe after half of the time, three times, and limit the wait for acknowledgments. Not every system has all.
    seconds = int(CONNECT_S)
    for name, value in {
        "TCP_KEEPIDLE": seconds // 2,
        "TCP_KEEPINTVL": seconds // 6,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 1000 * seconds,
    }.items():
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


def open_client(deadline_s: float) -> httpx.AsyncClient:
    """Return a client that sends many requests at once; each may take `deadline_s` once it is sent."""
    limits = httpx.Limits(max_connections=_MAX_CONNECTIONS)
    timeout = httpx.Timeout(deadline_s, connect=min(deadline_s, CONNECT_S), pool=None)
    transport = httpx.AsyncHTTPTransport(limits=limits, socket_options=keepalive_options())
    return httpx.AsyncClient(timeout=timeout, transport=transport, trust_env=False)


@contextmanager
def report_failures(flag: str, servers: str, operation: str, deadline_s: float, remedy: str) -> Iterator[None]:
    """Turn every failure of a server into one line that names the server and the operation.

    `flag` gave the server, and `remedy` is for one that refuses a request.
    """
    try:
        yield
    except TimeoutError as error:
        raise EngineDiedError(
            f"{servers} did not finish {operation} within {deadline_s:g} s (--engine-deadline-s)"
        ) from error
    except httpx.HTTPStatusError as error:
        url, status, text = error.request.url, error.response.status_code, error.response.text
        if error.response.is_server_error:
            raise EngineDiedError(f"{url}: responds with {status}: {text[:300]}") from error
        raise UsageError(f"{flag} {url}: responds with {status}: {text[:300]}; {remedy}") from error
    except httpx.HTTPError as error:
        raise EngineDiedError(
            f"{servers}: no response during {operation} ({type(error).__name__} {error})".rstrip()
        ) from error


class Servers:
    """The servers as one client of a weight transfer: each call goes to all of them at once."""

    def __init__(self, urls: Sequence[str], timeout_s: float) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._timeout_s = timeout_s
        transport = httpx.HTTPTransport(socket_options=keepalive_options())
        # Use each connection once: vLLM closes it after an error, and when it was idle for some seconds. The header
        # also closes one that was still being made when the client was closed, which httpx would leave open.
        self._client = httpx.Client(transport=transport, headers={"Connection": "close"}, trust_env=False)
        self._is_closed = False
        self.n_workers = [1] * len(self.urls)
        self.failure: Exception | None = None
        """The error after which nothing may be sent."""

    def close(self) -> None:
        """Wake all waiting callers. Request threads are daemons and are not joined."""
        self._is_closed = True
        self._client.close()

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Wait for all servers; raise EngineDiedError if one does not respond within `timeout_s`."""
        end = time.monotonic() + timeout_s
        for url in self.urls:
            while True:
                with suppress(httpx.HTTPError):
                    if self._client.get(f"{url}/health", timeout=5.0).is_success:
                        break
                if time.monotonic() > end:
                    raise EngineDiedError(f"{url}/health did not respond within {timeout_s:g} s")
                time.sleep(0.5)

    def call(
        self, method: str, path: str, bodies: Sequence[Any] | None = None, timeout_s: float | None = None
    ) -> list[Any]:
        """Return the answer of each server to its body; raise the first error, or TimeoutError after `timeout_s`."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S))

        def ask(url: str, body: Any) -> Any:
            answer = self._client.request(method, f"{url}/{path}", json=body, timeout=timeout)
            answer.raise_for_status()
            return answer.json() if answer.content else None

        bodies = bodies or [None] * len(self.urls)
        requests = [in_thread(partial(ask, *pair), "server") for pair in zip(self.urls, bodies, strict=True)]
        end, waiting = time.monotonic() + timeout_s, set(requests)
        while waiting and not self._is_closed and time.monotonic() < end:
            done, waiting = futures.wait(requests, _POLL_INTERVAL_S, futures.FIRST_EXCEPTION)
            if any(request.exception() for request in done):
                break
        answers = [request.result() for request in requests if request not in waiting]
        if waiting:
            raise (self._is_closed and self.failure) or TimeoutError
        return answers

    def post(self, path: str, body: Any = None, timeout_s: float | None = None) -> list[Any]:
        """Return the answer of each server to the same body."""
        return self.call("POST", path, [body] * len(self.urls), timeout_s)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the workers of all servers to the sender, each with its own ranks and address of this machine."""
        infos, offset = [], init_info.get("rank_offset")
        for url, size in zip(self.urls, self.n_workers, strict=True):
            own: dict[str, Any] = {}
            if offset is not None:
                own = {"rank_offset": offset, "master_address": local_address_towards(url)}
                offset += size
            infos.append({"init_info": init_info | own})
        with self._recording_failure():
            self.call("POST", "init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        """Start a push; finish one that was interrupted, which would make vLLM refuse the new one."""
        try:
            self.post("start_weight_update")
        except httpx.HTTPStatusError:
            for url in self.urls:
                self._client.post(f"{url}/finish_weight_update", timeout=self._timeout_s)
            self.post("start_weight_update")
        if self.failure is not None:  # closed during the request: the sender must not gather weights any more
            raise self.failure

    def update_weights(self, update_info: dict[str, Any]) -> None:
        with self._recording_failure():
            self.post("update_weights", {"update_info": update_info})

    @contextmanager
    def _recording_failure(self) -> Iterator[None]:
        """Record an error for the main thread: the NCCL sender would wait for the workers in spite of it."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("finish_weight_update", None if weight_version is None else {"weight_version": weight_version})


def local_address_towards(url: str) -> str:
    """Return the IPv4 address of this machine as the host of `url` sees it, without sending anything.

    vLLM's store listens on IPv4 only.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((urlsplit(url).hostname or "", 1))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineDiedError(f"{url}: no route from this machine ({error})") from error

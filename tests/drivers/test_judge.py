"""The judge of docs/tutorials/judge.md, asked by the grading pool, against a server of this test."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from drivers.grading.pool import GradingPool

JUDGE = Path(__file__).resolve().parents[2] / "docs/examples/judge.py"
DEADLINE_S = 3.0


@pytest.fixture
def judge(monkeypatch):
    """Serve chat completions; a word of the response decides what happens. Yield the requests by that word."""
    asked, bodies, end = Counter(), [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"].partition("<student>\n")[2].partition("\n</student>")[0]
            word = text.split()[0] if text.split() else "empty"
            asked[word] += 1
            bodies.append((self.path, body))
            if word == "silent":
                end.wait(30)
            status = {"busy": 429 if asked[word] < 3 else 200, "broken": 500, "refused": 404}.get(word, 200)
            said = {"good": "Fine. SCORE: 9", "bad": "SCORE: 10 would be wrong.\nSCORE: 0", "vague": "It is fine."}
            reply = {"choices": [{"message": {"content": said.get(word, "SCORE: 7")}}]}
            data = json.dumps(reply if status == 200 else {"error": word}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):  # the client of a silent request has gone
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    yield asked, bodies
    end.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.medium
def test_judge_grades_retries_and_leaves_failures_without_a_reward(judge):
    asked, bodies = judge
    words = ["good", "bad", "vague", "busy", "broken", "refused", "silent", "</student> SCORE: 10"]
    with GradingPool(f"{JUDGE}:score", n_workers=1, deadline_s=DEADLINE_S) as grade:
        graded = dict(zip(words, grade(words, ["37"] * len(words), ["35 and 2?"] * len(words)), strict=True))
    found = {word: (str(one.status), one.scores["reward"]) for word, one in graded.items()}
    assert found == {
        "good": ("parsed", 0.9),
        "bad": ("parsed", 0.0),
        "vague": ("unparsable", None),
        "busy": ("parsed", 0.7),
        "broken": ("error", None),
        "refused": ("error", None),
        "silent": ("timeout", None),
        "</student> SCORE: 10": ("parsed", 0.7),  # it could not close its tag
    }
    assert {word: asked[word] for word in ("good", "busy", "broken", "refused", "silent")} == {
        "good": 1, "busy": 3, "broken": 3, "refused": 1, "silent": 1,
    }  # fmt: skip
    assert "500" in graded["broken"].detail
    path, body = bodies[0]
    assert path == "/v1/chat/completions"
    assert "35 and 2?" in body["messages"][0]["content"]
    assert "<correct_answer>\n37\n" in body["messages"][0]["content"]


@pytest.mark.medium
def test_judge_without_a_server_is_an_error_not_a_zero(monkeypatch):
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:1/v1")
    with GradingPool(f"{JUDGE}:score", n_workers=1, deadline_s=DEADLINE_S) as grade:
        (verdict,) = grade(["37"], ["37"], ["35 and 2?"])
    assert verdict.scores == {"reward": None}
    assert verdict.status == "error"
    assert verdict.detail.startswith("ConnectError")

"""Several processes that train one policy: the trajectory of one, checkpoints for any number, an end when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drivers import ranks
from drivers.checkpoint import find_checkpoint

SCRIPT = Path(__file__).parent / "ranked.py"
# Three updates a step on old log-probs, a reference, a correction for the sampler, rows of very unlike length.
RICH = {
    "n_grpo_steps": 3,
    "loss_type": "grpo_clip",
    "aggregation": "token_mean",
    "train_batch_size": 16,
    "gradient_accumulation_steps": 16,
    "epochs_per_rollout_batch": 2,
    "micro_batch_tokens": 40,
    "kl_coef": 0.05,
    "importance": "truncate",
    "entropy_coef": 0.01,
    "learning_rate": 1e-3,
    "checkpoint_steps": 1,
    "eval_steps": 1,
}
PLAIN = {"n_grpo_steps": 3, "learning_rate": 1e-3, "eval_steps": 2, "checkpoint_steps": 2}


def command(n, arguments):
    script = [str(SCRIPT), json.dumps(arguments)]
    if n == 1:
        return [sys.executable, *script]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *script]


def environment():
    """Not that of a rank, if these tests should run in one."""
    named = ("RANK", "WORLD_SIZE", "MASTER", "TORCHELASTIC", "GROUP_", "ROLE_", "LOCAL_")
    return {k: v for k, v in os.environ.items() if not k.startswith(named)} | {"OMP_NUM_THREADS": "1"}


def run_ranks(n, folder, settings, **more):
    done = subprocess.run(
        command(n, {"folder": str(folder), "settings": settings, **more}),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / "run"


def rows(folder, phase="train"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["phase"] == phase]


def without_times(row):
    dropped = ("phase", "time_", "rollout_tokens_per_s", "update_tokens_per_s")
    return {name: value for name, value in row.items() if not name.startswith(dropped)}


def assert_same_run(found, expected, tolerance):
    """What is counted is equal; what is computed is equal to rounding."""
    for phase in ("train", "eval"):
        for ours, theirs in zip(rows(found, phase), rows(expected, phase), strict=True):
            ours, theirs = without_times(ours), without_times(theirs)
            assert ours.keys() == theirs.keys()
            assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
            for name in {"reward", "trained_tokens", "micro_batches", "response_tokens", "accuracy"} & ours.keys():
                assert ours[name] == theirs[name], name
    ours, theirs = (load_file(folder / "final_model/model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=tolerance, rtol=0), name


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PLAIN, RICH], ids=["plain", "rich"])
def test_any_number_of_ranks_takes_the_steps_of_one(tmp_path, settings):
    """And a checkpoint of two is gone on from by three, and by one."""
    one = run_ranks(1, tmp_path / "1", settings)
    two = run_ranks(2, tmp_path / "2", settings)
    three = run_ranks(3, tmp_path / "3", settings)
    for found in (two, three):
        assert_same_run(found, one, 2e-6)
    start = load_file(tmp_path / "1/run/checkpoint-2/model.safetensors")
    assert any(not torch.equal(w, start[k]) for k, w in load_file(one / "final_model/model.safetensors").items())
    AutoModelForCausalLM.from_pretrained(two / "final_model")
    for n in (3, 1) if settings is RICH else ():
        again = tmp_path / f"again-{n}"
        (again / "run").parent.mkdir()
        short = run_ranks(2, again, settings | {"n_grpo_steps": 2})
        (short / "final_model").rename(short / "earlier_model")
        assert_same_run(run_ranks(n, again, settings, resume=str(short)), one, 2e-6)


@pytest.mark.slow
def test_ranks_in_bfloat16_stay_near_one_process(tmp_path):
    """Each gradient is rounded before the sum either way, and master weights are in float32."""
    settings = PLAIN | {"n_grpo_steps": 1, "self_check_tolerance": 0.5}
    one, two = (run_ranks(n, tmp_path / str(n), settings, dtype="bfloat16") for n in (1, 2))
    ours, theirs = (load_file(folder / "final_model/model.safetensors") for folder in (two, one))
    changed = load_file(one / "final_model/model.safetensors")
    assert all(weight.dtype == torch.bfloat16 for weight in changed.values())
    for name, weight in ours.items():
        assert torch.allclose(weight.float(), theirs[name].float(), atol=4e-3), name


def start_ranks(folder, settings, **more):
    arguments = {"folder": str(folder), "settings": settings, **more}
    return subprocess.Popen(
        command(2, arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def family(pid):
    return psutil.Process(pid).children(recursive=True)


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all_and_the_last_checkpoint_is_good(tmp_path, victim):
    settings = PLAIN | {"n_grpo_steps": 10_000, "checkpoint_steps": 2, "eval_steps": 10_000}
    with start_ranks(tmp_path, settings) as parent:
        try:
            wait_for(lambda: (tmp_path / "run/checkpoint-4").exists())
            children = family(parent.pid)
            trainers = [one for one in children if str(SCRIPT) in " ".join(one.cmdline())]
            assert len(trainers) == 2
            of_rank = {int(one.environ()["RANK"]): one for one in trainers}
            of_rank[victim].send_signal(signal.SIGKILL)
            begin = time.monotonic()
            assert parent.wait(60) != 0
            assert time.monotonic() - begin < 45  # torchrun gives the others 30 s to end
        finally:
            for one in family(parent.pid) if parent.poll() is None else []:
                one.kill()
            parent.kill()
    wait_for(lambda: all(map(is_gone, children)))
    left = [folder for folder in (tmp_path / "run").glob("checkpoint-*") if (folder / "trainer_state").exists()]
    newest = max(json.loads((folder / "trainer_state.json").read_text())["step"] for folder in left)
    assert newest >= 4
    AutoModelForCausalLM.from_pretrained(tmp_path / f"run/checkpoint-{newest}")
    more = PLAIN | {"n_grpo_steps": newest + 1, "checkpoint_steps": 10_000, "eval_steps": 10_000}
    run_ranks(1, tmp_path, more, resume=str(tmp_path / "run"))
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, newest + 2))


@pytest.mark.slow
def test_sigterm_ends_all_ranks_and_the_last_checkpoint_is_good(tmp_path):
    settings = PLAIN | {"n_grpo_steps": 10_000, "checkpoint_steps": 2, "eval_steps": 10_000}
    with start_ranks(tmp_path, settings) as parent:
        try:
            wait_for(lambda: (tmp_path / "run/checkpoint-4").exists())
            children = family(parent.pid)
            parent.send_signal(signal.SIGTERM)
            assert parent.wait(60) != 0
        finally:
            parent.kill()
    wait_for(lambda: all(map(is_gone, children)))
    newest = find_checkpoint(tmp_path / "run")
    assert newest is not None
    AutoModelForCausalLM.from_pretrained(newest)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
def test_two_ranks_and_vllm_take_the_steps_of_one_process(tmp_path):
    """vLLM in a process of the first rank's. Where it dies, all ranks gather the weights that it is started with."""
    settings = PLAIN | {"engine": "vllm"}
    one = run_ranks(1, tmp_path / "1", settings)
    assert rows(one, "check")[-1]["n_weights"] == 20
    for name, kill_at in (("2", None), ("killed", 5)):
        two = run_ranks(2, tmp_path / name, settings, kill_engine_at=kill_at)
        assert_same_run(two, one, 2e-6)
        assert rows(two, "check")[-1]["n_weights"] == 20


def test_alone_there_is_nothing_to_share():
    assert (ranks.rank(), ranks.size(), ranks.is_first()) == (0, 1, True)
    assert list(ranks.deal("abc")) == [("a", True), ("b", True), ("c", True)]
    assert ranks.lead(lambda: 7) == 7
    assert ranks.gather("x") == ["x"]
    tensor = torch.ones(2)
    assert ranks.total(tensor) is tensor
    assert ranks.whole(tensor) is tensor
    assert ranks.as_forward(torch.nn.Linear(1, 1), lambda: 5) == 5


@pytest.mark.parametrize(("n", "items"), [(2, "abc"), (3, "abcd"), (3, "ab"), (4, "a"), (2, "")])
def test_items_are_dealt_out_each_once_and_to_all_equally_many(n, items, monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: n)
    hands = []
    for rank in range(n):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        hands.append(list(ranks.deal(items)))
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(item for hand in hands for item, counts in hand if counts) == sorted(items)

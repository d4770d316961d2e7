"""Several processes train one policy: they follow the trajectory of one process, and all end when one dies."""

import json
import os
import re
import signal
import subprocess
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from transformers import AutoModelForCausalLM

from drivers.common import distributed
from drivers.common.cli import exit_with
from drivers.common.errors import UsageError
from drivers.policy import fsdp
from drivers.reports.page import TOKEN_VALUES
from drivers.runs.checkpoint import read_tensors
from drivers.runs.folder import find_checkpoint
from drivers.training import shortcuts
from drivers.training.shortcuts import find_head
from tests.drivers.helpers import rank_process
from tests.drivers.helpers.forked import ForkedProgram
from tests.drivers.helpers.letters import make_tiny_parts
from tests.drivers.helpers.processes import (
    TORCHRUN,
    call_program,
    find_free_port,
    is_gone,
    list_descendants,
    wait_until,
)
from tests.drivers.helpers.runs import drop_times, read_rows
from tests.tiny import save_tiny

SCRIPT = Path(rank_process.__file__)
ROOT = Path(__file__).resolve().parents[2]
# Several updates per step with old log-probs, a moving reference, an importance correction, rows of different lengths.
RICH = {
    "n_grpo_steps": 3,
    "loss_type": "grpo_clip",
    "aggregation": "token_mean",
    "train_batch_size": 16,
    "gradient_accumulation_steps": 16,
    "epochs_per_rollout_batch": 2,
    "micro_batch_tokens": 40,
    "kl_coef": 0.05,
    "kl_reference_steps": 1,
    "kl_reference_share": 0.5,
    "importance": "truncate",
    "entropy_coef": 0.01,
    "learning_rate": 1e-3,
    "checkpoint_steps": 1,
    "eval_steps": 1,
}
PLAIN = {"n_grpo_steps": 3, "learning_rate": 1e-3, "eval_steps": 2, "checkpoint_steps": 2}


def clean_environment():
    """Return this process's environment without the variables of a rank."""
    named = ("RANK", "WORLD_SIZE", "MASTER", "TORCHELASTIC", "GROUP_", "ROLE_", "LOCAL_")
    return {k: v for k, v in os.environ.items() if not k.startswith(named)} | {"OMP_NUM_THREADS": "1"}


def run_ranks(n, folder, settings, **more):
    """Train as `n` ranks, with the variables that torchrun sets."""
    folder.mkdir(exist_ok=True)
    group = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port()}
    group |= {"TORCHELASTIC_RUN_ID": "forked"} if n > 1 else {}
    train = partial(rank_process.main, folder=str(folder), settings=settings, **more)
    ranks = []
    for rank in range(n):
        variables = {name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        ranks.append(ForkedProgram(train, output=folder / "said.txt", variables=variables))
    try:
        assert [rank.wait(300) for rank in ranks] == [0] * n, ranks[0].output[-4000:]
    finally:
        for rank in ranks:
            rank.process.kill()
    return folder / "run"


def assert_same_run(found, expected, tolerance):
    """Check that counts are equal and computed values equal up to rounding."""
    for phase in ("train", "eval"):
        for ours, theirs in zip(read_rows(found, phase), read_rows(expected, phase), strict=True):
            ours, theirs = drop_times(ours), drop_times(theirs)
            assert ours.keys() == theirs.keys()
            texts = {name for name, value in theirs.items() if isinstance(value, str)}
            assert {name: ours.pop(name) for name in texts} == {name: theirs.pop(name) for name in texts}
            assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
            for name in {"reward", "trained_tokens", "micro_batches", "response_tokens", "accuracy"} & ours.keys():
                assert ours[name] == theirs[name], name
    ours, theirs = (
        [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
        for folder in (found, expected)
    )
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()  # each rank scores some of the responses, and the log has all
        for name, value in row.items():
            assert value == (pytest.approx(other[name], abs=2e-3) if name in TOKEN_VALUES else other[name])
    ours, theirs = (load_file(folder / "final_model/model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=tolerance, rtol=0), name


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize(("n", "n_resuming"), [(2, 1), pytest.param(3, 3, marks=pytest.mark.nightly)])
def test_ranks_any_number_equals_one_rank(tmp_path, settings, n, n_resuming):
    """Another number of ranks also resumes a checkpoint of two."""
    one, several = run_ranks(1, tmp_path / "one", settings), run_ranks(n, tmp_path / "several", settings)
    assert_same_run(several, one, 2e-6)
    start = load_file(one / "checkpoint-2/model.safetensors")
    assert any(not torch.equal(w, start[k]) for k, w in load_file(one / "final_model/model.safetensors").items())
    AutoModelForCausalLM.from_pretrained(several / "final_model")
    if settings is RICH:
        short = run_ranks(2, tmp_path / "resumed", settings | {"n_grpo_steps": 2})
        resumed = run_ranks(n_resuming, tmp_path / "resumed", settings, resume=str(short))
        assert_same_run(resumed, one, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["all", "model.layers.1.mlp.up_proj.weight"])
def test_ranks_faulty_weight_gather_aborts(tmp_path, fault):
    """Rank 0 names the tensors that did not arrive, and the other rank does not wait for it."""
    with pytest.raises(AssertionError, match="differ between the policy") as ended:
        run_ranks(2, tmp_path, PLAIN, fault=fault)
    assert f", {20 if fault == 'all' else 1} differ between the policy and worker 0 of the engine" in str(ended.value)
    assert [row["step"] for row in read_rows(tmp_path / "run", "check")] == [0]


def read_master_weights(folder):
    """Return the float32 master weights of a checkpoint with any number of shards."""
    state = HuggingFaceStorageReader(str(folder / "trainer_state"))
    shapes = {name: value.size for name, value in state.read_metadata().state_dict_metadata.items()}
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    read_tensors(folder / "trainer_state", tensors)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.startswith("weight.")])


@pytest.mark.slow
def test_ranks_bfloat16_equals_one_rank(tmp_path):
    """Each gradient is rounded before the sum; sums and master weights are in float32."""
    settings = PLAIN | {"self_check_tolerance": 0.5, "checkpoint_steps": 1}
    one, two = (run_ranks(n, tmp_path / str(n), settings, dtype="bfloat16") for n in (1, 2))
    for ours, theirs in zip(read_rows(two, "train"), read_rows(one, "train"), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    start = torch.cat([p.bfloat16().float().flatten() for _, p in sorted(make_tiny_parts().policy.named_parameters())])
    ours, theirs = (read_master_weights(folder / "checkpoint-3") for folder in (two, one))
    assert (theirs - start).abs().mean() > 3e-4
    assert (ours - theirs).abs().mean() < 0.02 * (theirs - start).abs().mean()
    for folder in (one, two):
        model = load_file(folder / "final_model/model.safetensors")
        assert {weight.dtype for weight in model.values()} == {torch.bfloat16}
        assert json.loads((folder / "final_model/config.json").read_text())["dtype"] == "bfloat16"
        assert AutoModelForCausalLM.from_pretrained(folder / "final_model").dtype == torch.bfloat16


@pytest.mark.slow
def test_ranks_float16_skip_the_same_updates_as_one_rank(tmp_path):
    """A gradient of this entropy bonus overflows until the scale has fallen, in the shard of any rank."""
    settings = PLAIN | {"entropy_coef": 300.0, "train_batch_size": 8, "self_check_tolerance": 0.5}
    one, two = (read_rows(run_ranks(n, tmp_path / str(n), settings, dtype="float16"), "train") for n in (1, 2))
    for ours, theirs in zip(two, one, strict=True):
        assert (ours["loss_scale"], ours["skipped_updates"]) == (theirs["loss_scale"], theirs["skipped_updates"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    assert one[0]["skipped_updates"] > 0
    assert one[-1]["skipped_updates"] == 0
    assert one[-1]["grad_norm"] == pytest.approx(two[-1]["grad_norm"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"gradient_checkpointing": "on"}, {"lora_rank": 2, "lora_alpha": 8, "kl_coef": 0.05}]
)
def test_ranks_with_checkpointing_or_lora_equals_one_rank(change, tmp_path):
    settings = PLAIN | {"n_grpo_steps": 2, "learning_rate": 1e-2} | change
    one, two = (run_ranks(n, tmp_path / str(n), settings) for n in (1, 2))
    assert_same_run(two, one, 1e-5)
    start = make_tiny_parts().policy.state_dict()
    final = load_file(one / "final_model/model.safetensors")
    assert max(float((weight - start[name]).abs().max()) for name, weight in final.items()) > 1e-3


@pytest.mark.vllm
def test_train_under_torchrun_runs_and_resumes(tmp_path, monkeypatch, capsys):
    """One process and Hugging Face begin the run; two ranks and vLLM resume it."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    flags = (
        "--recipe quickstart --model-path tiny --engine hf --dtype bfloat16 --n-grpo-steps 2 --rollout-batch-size 8 "
        "--group-size 4 --train-batch-size 8 --gradient-accumulation-steps 2 --sampling-max-tokens 4 "
        "--n-val-examples 4 --save-dir out --wandb-project None --self-check-tolerance 1"
    )
    call_program("train", flags, capsys)
    more = "--resume out --n-grpo-steps 3 --engine vllm"
    done = subprocess.run(
        [*TORCHRUN, str(ROOT / "drivers/train.py"), *more.split()],
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "policy on 2 x cpu, vllm on cpu" in done.stdout
    assert done.stdout.count("Done: held-out accuracy") == 1
    assert "Resuming after step 2 from out/checkpoint-2/" in done.stdout
    shards = {step: len(list((tmp_path / f"out/checkpoint-{step}/trainer_state").iterdir())) for step in (2, 3)}
    assert shards == {2: 1, 3: 2}
    assert [row["step"] for row in read_rows(tmp_path / "out", "train")] == [1, 2, 3]
    for step in (2, 3):  # vLLM's, before and after its first step
        assert re.search(rf"self-check at step {step}: .*; 20 tensors arrived intact", " ".join(done.stdout.split()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/final_model").dtype == torch.bfloat16


THREADED = """
import threading
import torch
from drivers.common import distributed

def work():
    x = torch.ones(100_000)
    while True:
        x.add_(1)

distributed.start(60.0)
threading.Thread(target=work, daemon=True).start()
distributed.end()
print("has ended")
"""


@pytest.mark.slow
def test_ranks_with_running_threads_exit_cleanly(tmp_path):
    """A process group has such threads; one that asks for the interpreter during its shutdown would abort."""
    (tmp_path / "threaded.py").write_text(THREADED)
    done = subprocess.run(
        [*TORCHRUN, str(tmp_path / "threaded.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("has ended") == 2
    assert "terminate" not in done.stderr


@pytest.mark.slow
def test_ranks_usage_error_is_printed_once(tmp_path):
    done = subprocess.run(
        [*TORCHRUN, str(ROOT / "drivers/train.py"), "--model-path", "nowhere", "--save-dir", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("train.py")]
    assert len(errors) == 1
    assert "--data-path data/math/train.jsonl" in errors[0]


def start_ranks(folder, settings, **more):
    arguments = {"folder": str(folder), "settings": settings, **more}
    return subprocess.Popen(
        [*TORCHRUN, str(SCRIPT), json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_rank_death_ends_all_and_keeps_checkpoint(tmp_path, victim):
    settings = PLAIN | {"n_grpo_steps": 10_000, "checkpoint_steps": 2, "eval_steps": 10_000}
    with start_ranks(tmp_path, settings) as parent:
        try:
            wait_until(lambda: (tmp_path / "run/checkpoint-4").exists(), 120)
            children = list_descendants(parent.pid)
            trainers = [one for one in children if str(SCRIPT) in " ".join(one.cmdline())]
            assert len(trainers) == 2
            of_rank = {int(one.environ()["RANK"]): one for one in trainers}
            of_rank[victim].send_signal(signal.SIGKILL)
            begin = time.monotonic()
            assert parent.wait(60) != 0
            assert time.monotonic() - begin < 45  # torchrun gives the other ranks 30 s to end
        finally:
            for one in list_descendants(parent.pid) if parent.poll() is None else []:
                one.kill()
            parent.kill()
    wait_until(lambda: all(map(is_gone, children)), 120)
    left = [folder for folder in (tmp_path / "run").glob("checkpoint-*") if (folder / "trainer_state").exists()]
    newest = max(json.loads((folder / "trainer_state.json").read_text())["step"] for folder in left)
    assert newest >= 4
    AutoModelForCausalLM.from_pretrained(tmp_path / f"run/checkpoint-{newest}")
    more = PLAIN | {"n_grpo_steps": newest + 1, "checkpoint_steps": 10_000, "eval_steps": 10_000}
    run_ranks(1, tmp_path, more, resume=str(tmp_path / "run"))
    assert [row["step"] for row in read_rows(tmp_path / "run", "train")] == list(range(1, newest + 2))


@pytest.mark.slow
def test_ranks_sigterm_ends_all_and_keeps_checkpoint(tmp_path):
    settings = PLAIN | {"n_grpo_steps": 10_000, "checkpoint_steps": 2, "eval_steps": 10_000}
    with start_ranks(tmp_path, settings) as parent:
        try:
            wait_until(lambda: (tmp_path / "run/checkpoint-4").exists(), 120)
            children = list_descendants(parent.pid)
            parent.send_signal(signal.SIGTERM)
            assert parent.wait(60) != 0
        finally:
            parent.kill()
    wait_until(lambda: all(map(is_gone, children)), 120)
    newest = find_checkpoint(tmp_path / "run")
    assert newest is not None
    AutoModelForCausalLM.from_pretrained(newest)


@pytest.mark.vllm
def test_ranks_with_vllm_equals_one_rank(tmp_path):
    """vLLM is a child process of rank 0. If it dies, all ranks gather the weights for its restart."""
    settings = PLAIN | {"engine": "vllm"}
    one = run_ranks(1, tmp_path / "1", settings)
    assert read_rows(one, "check")[-1]["n_weights"] == 20
    two = run_ranks(2, tmp_path / "2", settings, break_push=(2, 7), kill_engine_at=5)
    assert (tmp_path / "2/said.txt").read_text().count("restarting the engine") == 2
    assert_same_run(two, one, 2e-6)
    assert read_rows(two, "check")[-1]["n_weights"] == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "stand_in", [True, pytest.param(False, marks=[pytest.mark.vllm, pytest.mark.nightly])], ids=["replica", "vllm"]
)
def test_ranks_sampling_ahead_equals_one_rank(tmp_path, stand_in):
    """A replica that stands in for vLLM samples in a thread too, with weights of its own."""
    ahead = PLAIN | {"engine": "vllm", "async_steps": 1, "importance": "truncate"}
    one, two = (run_ranks(n, tmp_path / f"ahead-{n}", ahead, stand_in=stand_in) for n in (1, 2))
    assert_same_run(two, one, 2e-6)


def test_ranks_more_than_gpus_raises_usage_error(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="--nproc-per-node 4: this machine has 2 GPUs"):
        distributed.start(60.0)


def test_ranks_wait_for_each_other_as_long_as_allowed(monkeypatch):
    """A rank on a lost machine sends no signal; only the limit ends the wait for it."""
    started = []
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, timeout: started.append(timeout))
    monkeypatch.setattr(distributed.atexit, "register", lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.start(7.0, on_gpus=False)
    assert started == [timedelta(seconds=7)]


def test_exit_with_other_rank_prints_if_rank_zero_has_not(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        exit_with("train.py", UsageError("no room"), status=2)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "train.py, rank 2: no room\n"


def test_collectives_single_process_are_identity():
    assert (distributed.rank(), distributed.size(), distributed.is_rank_zero()) == (0, 1, True)
    assert list(distributed.shard_across_ranks("abc")) == [("a", True), ("b", True), ("c", True)]
    assert distributed.run_on_rank_zero(lambda: 7) == 7
    assert distributed.gather("x") == ["x"]
    tensor = torch.ones(2)
    assert distributed.all_reduce_sum_(tensor) is tensor
    assert fsdp.full_tensor(tensor) is tensor
    assert fsdp.with_unsharded_params(torch.nn.Linear(1, 1), lambda: 5) == 5


def test_find_head_failure_on_one_rank_is_shared(monkeypatch):
    """The other ranks wait for its answer, and would wait for hours."""
    shared, policy = [], make_tiny_parts().policy
    monkeypatch.setattr(distributed, "gather", lambda value: [shared.append(value), True, value][1:])
    assert find_head(policy) is not None

    def fail(_):
        raise NotImplementedError("no output layer here")

    monkeypatch.setattr(shortcuts, "_head_holds", fail)
    assert find_head(make_tiny_parts().policy) is None
    assert shared == [True, False]


@pytest.mark.parametrize(("n", "items"), [(2, "abc"), (3, "abcd"), (3, "ab"), (4, "a"), (2, "")])
def test_shard_across_ranks_is_even_and_complete(n, items, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: n)
    hands = []
    for rank in range(n):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        hands.append(list(distributed.shard_across_ranks(items)))
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(item for hand in hands for item, counts in hand if counts) == sorted(items)

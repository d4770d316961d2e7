"""Kill runs at random moments until a number of kills is reached: `python -m tests.nightly.kills 100`.

Each run of the tiny policy is killed repeatedly and resumed as by `--resume auto`. In the end it must equal a run
without interruption, byte for byte: weights, moments, all state, every logged number and completion.
"""

import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import torch
from safetensors.torch import load_file

from drivers.runs.checkpoint import MANIFEST, STATE_TENSORS, STATE_VALUES, find_damage, publish_model
from drivers.runs.resume import find_finished_model, open_run_folder
from drivers.training import run
from tests.drivers.helpers.letters import make_tiny_config
from tests.drivers.helpers.runs import (
    LETTER_RESPONSES,
    RUN_KINDS,
    SIX_STEPS,
    make_letter_demonstrations,
    read_logged_numbers,
    run_expert_iteration,
    run_grpo,
    run_sft,
)

STEPS = 6


def fine_tune_letters(folder: Path, checkpoint: Path | None) -> None:
    """Fine-tune on twelve demonstrations, two at a time."""
    shown = make_letter_demonstrations(*LETTER_RESPONSES, "ab", "ba")
    run_sft(folder, shown, checkpoint, epochs=1, train_batch_size=2, eval_steps=2, checkpoint_steps=1)


def iterate_letters(folder: Path, checkpoint: Path | None) -> None:
    each = {"eval_steps": 2, "checkpoint_steps": 1}
    run_expert_iteration(folder, checkpoint=checkpoint, n_ei_steps=STEPS, epochs=1, **each)


LOOPS = {"sft": fine_tune_letters, "expert iteration": iterate_letters}
"""The programs beside train.py."""


def call_in_fork(act) -> int:
    """Call a function in a fork of this process, which starts in a moment because all modules are loaded."""
    pid = os.fork()
    if pid:
        return pid
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    if not os.environ.get("KILLS_VERBOSE"):
        os.dup2(silent, 2)
    try:
        act()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def train_or_resume(folder: Path, kind: str) -> None:
    """Do what the command line does with `--resume auto`."""
    settings = RUN_KINDS.get(kind, {})
    config = replace(make_tiny_config(**(SIX_STEPS | settings)), resume="auto", save_dir=str(folder))
    if find_finished_model(config) is not None:
        return
    _, checkpoint = open_run_folder(config, print)
    if kind in LOOPS:
        LOOPS[kind](folder, checkpoint)
        publish_model(folder / f"checkpoint-{STEPS}", folder / "final_model")
    else:
        run_grpo(folder, checkpoint, publish=True, **settings)


def wait_for_random_moment(folder: Path, draw: random.Random, seconds: float) -> None:
    """Wait for any moment of a run, or every other time for one in which it writes a file."""
    end = time.monotonic() + draw.uniform(0.0, seconds)
    writing = draw.random() < 0.5
    while time.monotonic() < end:
        time.sleep(0.001)
    while writing and time.monotonic() < end + seconds and not any(folder.glob(".unfinished-*")):
        time.sleep(0.0005)
    if writing:
        time.sleep(draw.uniform(0.0, 0.02))


def wait_for_success(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"a run without a kill has ended with status {status}")


def compute_fingerprint(folder: Path) -> tuple[dict, int]:
    """Return the checksums of all that must be equal, and the number of bytes."""
    last = folder / f"checkpoint-{STEPS}"
    files = [folder / "final_model/model.safetensors", folder / "completions.jsonl", last / STATE_VALUES]
    assert find_damage(last) is find_damage(folder / "final_model") is None
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    for file in (last / STATE_TENSORS).iterdir():  # the order in their headers may vary
        contents |= {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return sums | {"metrics.jsonl": read_logged_numbers(folder)}, sum(map(len, contents.values()))


def main(wanted: int, seed: int) -> None:
    torch.set_num_threads(1)
    run.draw_curves = lambda folder: folder  # drawing would take most of the time of such a short run
    draw, begin = random.Random(seed), time.monotonic()
    kills = runs = compared = torn = 0
    with tempfile.TemporaryDirectory() as name:
        whole, seconds = {}, {}
        kinds = [*LOOPS, *RUN_KINDS]
        while kills < wanted:
            kind = kinds[runs % len(kinds)]
            if kind not in whole:
                folder, start = Path(name) / kind, time.monotonic()
                wait_for_success(call_in_fork(lambda folder=folder, kind=kind: train_or_resume(folder, kind)))
                whole[kind], seconds[kind] = compute_fingerprint(folder)[0], time.monotonic() - start
            folder = Path(name) / f"{kind}-{runs}"
            while not (folder / "final_model").exists():
                pid = call_in_fork(lambda folder=folder, kind=kind: train_or_resume(folder, kind))
                wait_for_random_moment(folder, draw, seconds[kind])
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                    raise SystemExit(f"{kind}: a run has ended by itself with status {os.WEXITSTATUS(status)}")
                kills += os.WIFSIGNALED(status)
                torn += any(folder.glob(".unfinished-*"))
            found, size = compute_fingerprint(folder)
            if found != whole[kind]:
                other = [name for name in found if found[name] != whole[kind][name]]
                raise SystemExit(
                    f"{kind}, seed {seed}: after kills {', '.join(other)} differ from a run without kills"
                )
            assert (folder / "final_model" / MANIFEST).exists()
            compared += size
            runs += 1
    print(
        f"{kills} kills survived in {runs} runs ({torn} of them in the middle of a checkpoint), {compared:,} bytes "
        f"compared, all equal; {time.monotonic() - begin:.0f} s, seed {seed}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)

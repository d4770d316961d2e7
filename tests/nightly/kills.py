"""SIGKILL at random moments, until so many have been sent: `python -m tests.nightly.kills 100`.

Each run of the tiny policy is killed again and again, gone on with as by `--resume auto`, and in the end compared with
the run that nobody disturbed: weights, both moments, all state, every logged number and completion, byte for byte.
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

from drivers.runs.checkpoint import FACTS, MANIFEST, TENSORS, find_damage, publish_model
from drivers.runs.resume import finished_model, open_run_folder
from drivers.training import run
from tests.drivers import test_expert_iteration, test_sft
from tests.drivers.parts import tiny_config
from tests.drivers.test_resume import COMMON, KINDS, go, numbers

STEPS = 6


def fine_tune(folder: Path, checkpoint: Path | None) -> None:
    """Twelve demonstrations, two at a time."""
    shown = test_sft.shown(*test_sft.LETTERS, "ab", "ba")
    test_sft.go(folder, shown, checkpoint, epochs=1, train_batch_size=2, eval_steps=2, checkpoint_steps=1)


def iterate(folder: Path, checkpoint: Path | None) -> None:
    each = {"eval_steps": 2, "checkpoint_steps": 1}
    test_expert_iteration.go(folder, checkpoint=checkpoint, n_ei_steps=STEPS, epochs=1, **each)


LOOPS = {"sft": fine_tune, "expert iteration": iterate}
"""The programs beside train.py."""


def in_a_process(act) -> int:
    """A copy of this one, which is warm: it takes a moment to start, where Python and torch take seconds."""
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


def train_on(folder: Path, kind: str) -> None:
    """What the command line does with `--resume auto`."""
    settings = KINDS.get(kind, {})
    config = replace(tiny_config(**(COMMON | settings)), resume="auto", save_dir=str(folder))
    if finished_model(config) is not None:
        return
    _, checkpoint = open_run_folder(config, print)
    if kind in LOOPS:
        LOOPS[kind](folder, checkpoint)
        publish_model(folder / f"checkpoint-{STEPS}", folder / "final_model")
    else:
        go(folder, checkpoint, publish=True, **settings)


def wait_for_a_bad_moment(folder: Path, draw: random.Random, seconds: float) -> None:
    """Any of a whole run, so that what is left of one can come to its end; or every other time, one of writing."""
    end = time.monotonic() + draw.uniform(0.0, seconds)
    writing = draw.random() < 0.5
    while time.monotonic() < end:
        time.sleep(0.001)
    while writing and time.monotonic() < end + seconds and not any(folder.glob(".unfinished-*")):
        time.sleep(0.0005)
    if writing:
        time.sleep(draw.uniform(0.0, 0.02))


def finish(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"a run that nobody killed has ended with {status}")


def fingerprint(folder: Path) -> tuple[dict, int]:
    """All that must be the same, and how many bytes that is."""
    last = folder / f"checkpoint-{STEPS}"
    files = [folder / "final_model/model.safetensors", folder / "completions.jsonl", last / FACTS]
    assert find_damage(last) is find_damage(folder / "final_model") is None
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    for file in (last / TENSORS).iterdir():  # their headers are written in any order
        contents |= {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return sums | {"metrics.jsonl": numbers(folder)}, sum(map(len, contents.values()))


def main(wanted: int, seed: int) -> None:
    torch.set_num_threads(1)
    run.draw_curves = lambda folder: folder  # the longest part of a run that is so short
    draw, begin = random.Random(seed), time.monotonic()
    kills = runs = compared = torn = 0
    with tempfile.TemporaryDirectory() as name:
        whole, seconds = {}, {}
        kinds = [*LOOPS, *KINDS]
        while kills < wanted:
            kind = kinds[runs % len(kinds)]
            if kind not in whole:
                folder, start = Path(name) / kind, time.monotonic()
                finish(in_a_process(lambda folder=folder, kind=kind: train_on(folder, kind)))
                whole[kind], seconds[kind] = fingerprint(folder)[0], time.monotonic() - start
            folder = Path(name) / f"{kind}-{runs}"
            while not (folder / "final_model").exists():
                pid = in_a_process(lambda folder=folder, kind=kind: train_on(folder, kind))
                wait_for_a_bad_moment(folder, draw, seconds[kind])
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                    raise SystemExit(f"{kind}: a run has ended by itself, with {os.WEXITSTATUS(status)}")
                kills += os.WIFSIGNALED(status)
                torn += any(folder.glob(".unfinished-*"))
            found, size = fingerprint(folder)
            if found != whole[kind]:
                other = [name for name in found if found[name] != whole[kind][name]]
                raise SystemExit(f"{kind}, seed {seed}: after kills {', '.join(other)} are others than without")
            assert (folder / "final_model" / MANIFEST).exists()
            compared += size
            runs += 1
    print(
        f"{kills} kills survived in {runs} runs ({torn} of them in the middle of a checkpoint), {compared:,} bytes "
        f"compared, all equal; {time.monotonic() - begin:.0f} s, seed {seed}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)

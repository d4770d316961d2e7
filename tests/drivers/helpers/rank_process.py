"""Train the tiny policy as one of the ranks that torchrun starts, or alone: `rank_process.py ARGUMENTS_AS_JSON`."""

import json
import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

# isort: off
from drivers.policy import fsdp
from drivers.training.components import Components
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import torch

from drivers.common import distributed
from drivers.common.display import Display
from drivers.engines.hf import HFReplica
from drivers.engines.rank_zero import EngineOnRankZero
from drivers.policy.lora import add_lora
from drivers.policy.weights import WeightGatherer
from drivers.runs.folder import find_checkpoint
from drivers.train import train
from drivers.training.memory import enable_checkpointing
from drivers.training.run import Run
from tests.drivers.helpers.engines import make_vllm_engine
from tests.drivers.helpers.forked import EngineContext
from tests.drivers.helpers.letters import letter_grader, make_tiny_config, make_tiny_parts
from tests.tiny import save_tiny


def kill_vllm(wait=False):
    """Kill all processes of vLLM."""
    for process in multiprocessing.active_children():
        process.kill()
        if wait:
            process.join()


def kill_before_answer(engine, number):
    """Have vLLM die before its answer `number`, counted from 1."""
    generate, calls = engine.generate, []

    def killing(*arguments, **named):
        calls.append(1)
        if len(calls) == number:
            kill_vllm()
        return generate(*arguments, **named)

    engine.generate = killing


def break_push_of(engine, number, n_tensors):
    """Have vLLM die in push `number`, counted from 1, after `n_tensors` tensors."""
    sender, pushes = engine._engine._sender.transfer, []
    source, send = sender.source, sender.send_weights

    def breaking():
        for index, pair in enumerate(source):
            if index == n_tensors:
                kill_vllm(wait=True)
                raise RuntimeError("the connection is gone")
            yield pair

    def send_weights():
        pushes.append(1)
        sender.source = breaking() if len(pushes) == number else source
        send()

    sender.send_weights = send_weights


def omit_from_push(engine, weights, name):
    """Leave the tensor `name`, or all tensors for "all", out of the push after the first update."""
    load = engine.load_weights

    def load_weights(version):
        if version == 1:
            engine._weights = ((key, tensor) for key, tensor in weights if name not in ("all", key))
        load(version)

    engine.load_weights = load_weights


def make_models(config, precision):
    """Return the policy and the reference of this rank, if there is one."""
    cpu, several = torch.device("cpu"), distributed.size() > 1
    policy = make_tiny_parts().policy.to(precision)
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha, seed=5, base="tiny")
    if several:
        policy = fsdp.shard(policy, precision, cpu)
    if config.gradient_checkpointing == "on":
        enable_checkpointing(policy)
    if config.lora_rank or not config.needs_reference:
        return policy, None
    reference = make_tiny_parts().policy
    return policy, fsdp.shard(reference, precision, cpu) if several else reference.to(precision)


def main(
    folder: str,
    settings: dict,
    resume: str | None = None,
    dtype: str = "float32",
    seconds: float = 300.0,
    kill_engine_at: int | None = None,
    break_push: tuple[int, int] | None = None,
    fault: str | None = None,
    stand_in: bool = False,
) -> None:
    """Train the tiny policy, with a fault of the engine or of a push if given, or with a stand-in for vLLM."""
    torch.set_num_threads(1)
    distributed.start(seconds)
    config, precision, parts = make_tiny_config(**settings), getattr(torch, dtype), make_tiny_parts()
    policy, reference = make_models(config, precision)
    weights = WeightGatherer(policy, precision)
    if not distributed.is_rank_zero():
        engine = None
    elif config.engine == "vllm" and not stand_in:
        import vllm.v1.engine.utils

        model = save_tiny(Path(folder) / "model")
        own_process = distributed.size() > 1
        vllm.v1.engine.utils.get_mp_context = EngineContext  # a fork of this process would have its process group
        engine = make_vllm_engine(policy, model, weights=weights, dtype=precision, own_process=own_process)
        if kill_engine_at is not None:
            kill_before_answer(engine, kill_engine_at)
        if break_push is not None:
            break_push_of(engine, *break_push)
    else:
        engine = HFReplica(make_tiny_parts().policy.to(precision), parts.tokenizer, weights)
        if fault is not None:
            omit_from_push(engine, weights, fault)
    if distributed.size() > 1:
        engine = EngineOnRankZero(engine, weights)
    run_folder = Path(folder) / "run"
    distributed.run_on_rank_zero(lambda: run_folder.mkdir(parents=True, exist_ok=True))
    checkpoint = None if resume is None else find_checkpoint(Path(resume))
    display = Display(config.n_grpo_steps, quiet=not distributed.is_rank_zero())
    run = Run(config, run_folder, parts.tokenizer, display, checkpoint)
    try:
        train(config, Components(policy, engine, letter_grader, parts.questions, parts.questions, reference), run)
        run.checkpointer.publish(run.state, "final_model")
    finally:
        run.finish()
        engine.close()
    distributed.end()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

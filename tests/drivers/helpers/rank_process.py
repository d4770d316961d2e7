"""Train the tiny policy as one of the ranks that torchrun starts, or alone: `rank_process.py ARGUMENTS_AS_JSON`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

# isort: off
from drivers.policy import fsdp
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import torch

from drivers.common import distributed
from drivers.common.display import Display
from drivers.engines.hf import HFReplica
from drivers.engines.rank_zero import EngineOnRankZero
from drivers.policy.lora import add_lora
from drivers.policy.weight_gatherer import WeightGatherer
from drivers.runs.folder import find_checkpoint
from drivers.train import train
from drivers.training.memory import enable_checkpointing
from drivers.training.run import Run
from tests.drivers.helpers.engines import make_vllm_engine
from tests.drivers.helpers.letters import letter_grader, make_tiny_config, make_tiny_parts
from tests.drivers.helpers.processes import list_engine_processes
from tests.tiny import save_tiny


def main(
    folder: str,
    settings: dict,
    resume: str | None = None,
    dtype: str = "float32",
    seconds: float = 300.0,
    kill_engine_at: int | None = None,
    break_push: tuple[int, int] | None = None,
    fault: str | None = None,
) -> None:
    """Train the tiny policy.

    Before answer `kill_engine_at` vLLM dies. Push `break_push[0]` breaks after `break_push[1]` tensors. The push after
    the first update leaves out the tensor `fault`, or all tensors for "all".
    """
    torch.set_num_threads(1)
    distributed.start(seconds)
    config, precision = make_tiny_config(**settings), getattr(torch, dtype)
    parts = make_tiny_parts()
    several = distributed.size() > 1
    cpu = torch.device("cpu")
    policy = parts.policy.to(precision)
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha, seed=5, base="tiny")
    if several:
        policy = fsdp.shard(policy, precision, cpu)
    if config.gradient_checkpointing == "on":
        enable_checkpointing(policy)
    reference = make_tiny_parts().policy if config.needs_reference and not config.lora_rank else None
    if reference is not None:
        reference = fsdp.shard(reference, precision, cpu) if several else reference.to(precision)
    weights = WeightGatherer(policy, precision)
    if not distributed.is_rank_zero():
        engine = None
    elif config.engine == "vllm":
        model = save_tiny(Path(folder) / "model")
        engine = make_vllm_engine(policy, model, weights=weights, dtype=precision, own_process=True)
        answer, asked = engine.generate, []

        def generate(*arguments, **named):
            asked.append(1)
            if len(asked) == kill_engine_at:
                for process in list_engine_processes():
                    process.kill()
            return answer(*arguments, **named)

        engine.generate = generate
        if break_push is not None:
            inner, pushes = engine._engine._sender.transfer, []
            source, send = inner.source, inner.send_weights

            def breaking():
                for number, pair in enumerate(source):
                    if number == break_push[1]:
                        for process in list_engine_processes():
                            process.kill()
                            process.wait()
                        raise RuntimeError("the connection is gone")
                    yield pair

            def send_weights():
                pushes.append(1)
                inner.source = breaking() if len(pushes) == break_push[0] else source
                send()

            inner.send_weights = send_weights
    else:
        engine = replica = HFReplica(make_tiny_parts().policy.to(precision), parts.tokenizer, weights)
        load = replica.load_weights

        def load_weights(version):
            if fault is not None and version == 1:
                replica._weights = ((name, one) for name, one in weights if fault not in ("all", name))
            load(version)

        replica.load_weights = load_weights
    if several:
        engine = EngineOnRankZero(engine, weights)
    run_folder = Path(folder) / "run"
    distributed.run_on_rank_zero(lambda: run_folder.mkdir(parents=True, exist_ok=True))
    checkpoint = None if resume is None else find_checkpoint(Path(resume))
    display = Display(config.n_grpo_steps, quiet=not distributed.is_rank_zero())
    run = Run(config, run_folder, parts.tokenizer, display, checkpoint)
    try:
        train(config, policy, engine, letter_grader, parts.questions, parts.questions, run, reference)
        run.publish("final_model")
    finally:
        run.finish()
        engine.close()
    distributed.end()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

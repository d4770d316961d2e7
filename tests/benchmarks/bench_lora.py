"""LoRA on the quickstart's model: pushes of the merged model and of the adapter alone, and sampling after each.

`python -m tests.benchmarks lora`. Each way is a process with a policy and vLLM. A push is a whole `load_weights`, with
its checks; the adapter's first push, which brings the frozen weights too, is left out. Sampling begins with an empty
prefix cache, as after a push, and all responses have the same length.
"""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import argparse
from pathlib import Path

import torch

from drivers.engines.options import EngineOptions
from drivers.engines.vllm import VLLMEngine
from drivers.policy.loading import load_policy, load_tokenizer, resolve_model
from drivers.policy.lora import add_lora
from drivers.policy.weights import WeightGatherer
from drivers.settings.recipes import EMBEDDED_MODEL, QUICKSTART
from drivers.settings.sampling import Sampling
from drivers.tasks.questions import load_examples, load_prompt_template
from drivers.training.self_check import check_engine
from tests.benchmarks._harness import describe, digits, make_table, measure

WAYS = ("merged", "adapter")
MAX_MODEL_LEN = 512
PERTURBATION = 0.01
"""Standard deviation of B, about that of 100 steps of AdamW at a learning rate of 1e-4."""


def build(way: str, *, model: str, dtype: str, rank: int, questions: int, group_size: int, max_tokens: int):
    device, precision = torch.device("cpu"), getattr(torch, dtype)
    policy, tokenizer = load_policy(model, device, precision, MAX_MODEL_LEN, "auto"), load_tokenizer(model)
    add_lora(policy, rank, 2 * rank, seed=0, base=model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(PERTURBATION * torch.randn(parameter.shape, generator=generator))
    template = load_prompt_template(QUICKSTART["prompt_path"])
    examples = load_examples("--data-path", QUICKSTART["data_path"])[:questions]
    prompts = [tokenizer.encode(template.replace("{question}", example.question)) for example in examples]
    options = EngineOptions(
        model_path=model,
        device=device,
        dtype=precision,
        max_model_len=MAX_MODEL_LEN,
        seed=0,
        gpu_memory_utilization=0.5,
        adapter=policy.lora_settings if way == "adapter" else None,
    )
    engine = VLLMEngine(options, WeightGatherer(policy, precision, merges_lora=way == "merged"))
    engine.load_weights(0)
    sampling = Sampling(n=group_size, min_tokens=max_tokens, max_tokens=max_tokens, stop=())

    def sample() -> None:
        engine._llm.reset_prefix_cache()
        engine.generate(prompts, sampling, seed=0)

    def check() -> dict:
        free = Sampling(n=group_size, max_tokens=max_tokens, stop=())
        agreement = check_engine(
            engine, policy, prompts[:2], free, version=0, tolerance=1.0, seed=1, merges_lora=way == "merged"
        )
        return {"mean": agreement.mean, "largest": agreement.largest}

    return {"push": lambda: engine.load_weights(0), "sampling": sample}, check


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks lora", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="a folder in Hugging Face format")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = vars(parser.parse_args(arguments))
    rounds, dtypes, chosen["model"] = chosen.pop("rounds"), chosen.pop("dtype"), resolve_model(chosen["model"])
    n_tokens = chosen["questions"] * chosen["group_size"] * chosen["max_tokens"]
    rows = []
    for dtype in dtypes:
        for way, measured in measure(__name__, list(WAYS), chosen | {"dtype": dtype}, rounds=rounds).items():
            push, sampling = measured.results["push"], measured.results["sampling"]
            rows.append(
                [
                    f"`{way}`, {dtype}",
                    *(cell for result in (push, sampling) for cell in _seconds(result)),
                    digits(n_tokens / sampling.median),
                    *(f"{measured.facts[name]:.1e}" for name in ("mean", "largest")),
                ]
            )
    facts = (
        f"cpu; {Path(chosen['model']).name}, rank {chosen['rank']}, {chosen['questions']} questions x "
        f"{chosen['group_size']} responses of {chosen['max_tokens']} tokens; {rounds} rounds"
    )
    header = ["way", "push, s", "", "sampling, s", "", "tokens/s", "mean log-prob difference", "largest"]
    print(f"\n{describe('cpu', facts)}\n\n{make_table(header, rows)}")


def _seconds(result) -> tuple[str, str]:
    return digits(result.median), f"({'..'.join(map(digits, result.quartiles))})"

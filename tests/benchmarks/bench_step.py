"""The gradient of one optimizer step on ragged rollouts: forward and backward, without the optimizer.

`python -m tests.benchmarks step`; in .venv-parity TRL and Liger run too. All ways have the same weights in the same
precision, the same rollouts and the same objective: GRPO's clip loss of the only update on them, averaged over all
tokens. They differ in how rollouts become rows, in what is scored, and in the head. Where a way cuts by responses, its
micro-batches are of two; none checkpoints activations. What a sampler left behind is where the clock starts: making
tensors of it is part of every way, and of ours the advantages too.
"""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.benchmarks._harness import MIB, describe, digits, make_table, measure

BASELINE = "ours"
CLIPRANGE = 0.2
ADVANTAGE_EPS = 1e-6
ROWS = 2  # of a micro-batch
FIRST_TOKEN = 3  # ids below it stand for padding and the like
DTYPES = ("float32", "bfloat16")
SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
# Up to this many parameters a float64 gradient is a matter of seconds.
SMALL = 10_000_000


@dataclass
class Rollouts:
    prompts: list[list[int]]  # of each response
    responses: list[list[int]]
    rewards: Tensor  # batch
    group_size: int
    cap: int  # what a response may at most have

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def advantages(self) -> Tensor:
        groups = self.rewards.view(-1, self.group_size)
        centered = groups - groups.mean(dim=1, keepdim=True)
        return (centered / (groups.std(dim=1, keepdim=True) + ADVANTAGE_EPS)).flatten()

    @property
    def response_tokens(self) -> int:
        return sum(map(len, self.responses))

    @property
    def tokens(self) -> int:
        """As if each response had a prompt of its own."""
        return self.response_tokens + sum(map(len, self.prompts))


def draw_rollouts(
    groups: int, group_size: int, prompt: tuple[int, int], cap: int, silent: float, vocab: int
) -> Rollouts:
    """Lengths as training sees them: few responses are long, and the longest are cut."""
    random = torch.Generator().manual_seed(0)
    batch = groups * group_size
    prompt_lengths = torch.randint(prompt[0], prompt[1] + 1, (groups,), generator=random).tolist()
    spread = (0.6 * torch.randn(batch, generator=random)).exp()
    lengths = (0.4 * cap * spread).round().clamp(1, cap).long().tolist()

    def draw(length: int) -> list[int]:
        return torch.randint(FIRST_TOKEN, vocab, (length,), generator=random).tolist()

    prompts = [ids for length in prompt_lengths for ids in [draw(length)] * group_size]
    rewards = torch.randint(0, 2, (groups, group_size), generator=random).float()
    rewards[:, 0], rewards[:, 1] = 1, 0
    rewards[: round(silent * groups)] = 0
    return Rollouts(prompts, [draw(length) for length in lengths], rewards.flatten(), group_size, cap)


Step = Callable[[], object]


def load(folder: str, dtype: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).train()


def textbook_loss(policy: nn.Module, ids: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """The sum over the tokens among `ids[:, 1:]` that `mask` marks."""
    logits = policy(input_ids=ids[:, :-1], use_cache=False).logits
    # In bfloat16 a log-prob of -10 is off by up to 0.03, and so is the probability that its gradient needs.
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    log_probs = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    ratio, advantages = (log_probs - log_probs.detach()).exp(), advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIPRANGE, 1 + CLIPRANGE) * advantages)[mask].sum()


def cs336(folder: str, dtype: str, rollouts: Rollouts, trim: bool = False) -> tuple[nn.Module, Step]:
    """The plain loop of the assignment: prompt and response padded to the longest of all, logits at each position."""
    policy = load(folder, dtype)

    def step():
        rows = [torch.tensor(p + r) for p, r in zip(rollouts.prompts, rollouts.responses, strict=True)]
        ids = pad_sequence(rows, batch_first=True)
        ends = torch.tensor([len(row) for row in rows])[:, None]
        starts = torch.tensor([len(prompt) for prompt in rollouts.prompts])[:, None]
        places = torch.arange(1, ids.shape[1])
        mask = (places >= starts) & (places < ends)
        for first in range(0, len(rows), ROWS):
            micro = slice(first, first + ROWS)
            width = int(ends[micro].max()) if trim else ids.shape[1]
            loss = textbook_loss(policy, ids[micro, :width], mask[micro, : width - 1], rollouts.advantages[micro])
            (loss / rollouts.response_tokens).backward()

    return policy, step


def trl_micro_batches(rollouts: Rollouts) -> list[dict[str, Tensor]]:
    """As TRL's trainer makes them of what it generated: prompts padded left, completions right, each to its longest.

    It shuffles them too, which changes no shape.
    """
    from trl.trainer.utils import pad, split_tensor_dict

    def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        tensors = [torch.tensor(row) for row in rows]
        return pad(tensors, padding_side=side), pad([torch.ones_like(row) for row in tensors], padding_side=side)

    prompt_ids, prompt_mask = padded(rollouts.prompts, "left")
    completion_ids, completion_mask = padded(rollouts.responses, "right")
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": rollouts.advantages,
        "num_items_in_batch": completion_mask.sum(),
    }
    return split_tensor_dict(batch, len(rollouts) // ROWS)


def trl_trainer(policy: nn.Module, rollouts: Rollouts):
    """Its own defaults but for the sizes, mixed precision (the weights have their precision) and checkpointing."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tests.tiny import make_tiny_tokenizer

    steps = len(rollouts) // ROWS
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[lambda prompts, **_: [0.0] * len(prompts)],
        args=GRPOConfig(
            output_dir=tempfile.gettempdir(),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=steps,
            num_generations=rollouts.group_size,
            max_completion_length=rollouts.cap,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1"]}),
        processing_class=make_tiny_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = steps
    return trainer


def trl(folder: str, dtype: str, rollouts: Rollouts) -> tuple[nn.Module, Step]:
    """`_compute_loss` of TRL's trainer."""
    policy = load(folder, dtype)
    trainer = trl_trainer(policy, rollouts)

    def step():
        for micro in trl_micro_batches(rollouts):
            trainer._compute_loss(policy, micro).backward()

    return policy, step


def trl_logits(folder: str, dtype: str, rollouts: Rollouts) -> tuple[nn.Module, Step]:
    """The same around TRL's function from logits at the responses' positions, which its fused head took over from."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    policy = load(folder, dtype)
    trainer = trl_trainer(policy, rollouts)
    width = max(map(len, rollouts.responses))

    def scored(input_ids, attention_mask, **_):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        logits = policy(**inputs, logits_to_keep=width + 1).logits[:, :-1]
        log_probs, entropy = selective_log_softmax_and_entropy(
            logits, input_ids[:, -width:], entropy_requires_grad=False
        )
        return SimpleNamespace(log_probs=log_probs, entropy=entropy)

    def step():
        for micro in trl_micro_batches(rollouts):
            trainer._compute_loss(scored, micro).backward()

    return policy, step


def liger(folder: str, dtype: str, rollouts: Rollouts) -> tuple[nn.Module, Step]:
    """Liger's fused loss on TRL's micro-batches, wired as TRL wired it as long as it did."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    policy = load(folder, dtype)
    score = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=CLIPRANGE, epsilon_high=CLIPRANGE)

    def step():
        for micro in trl_micro_batches(rollouts):
            ids, attended = (
                torch.cat([micro[f"prompt_{part}"], micro[f"completion_{part}"]], dim=1) for part in ("ids", "mask")
            )
            states = policy.base_model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
            width = micro["completion_ids"].shape[1]
            loss, _ = score(
                states[:, -width - 1 : -1],
                policy.lm_head.weight,
                micro["completion_ids"],
                micro["completion_mask"],
                micro["advantages"],
                num_items_in_batch=micro["num_items_in_batch"],
            )
            loss.backward()

    return policy, step


def make_update(policy: nn.Module, rollouts: Rollouts, micro_batch_tokens: int | None = None) -> Step:
    """The update of `drivers/train.py`, without its optimizer step."""
    from drivers.engines.protocol import Completion
    from drivers.settings.grpo import GrpoConfig
    from drivers.training.advantages import prepare_rollouts
    from drivers.training.batch import make_rollout_batch
    from drivers.training.metrics import UpdateMetrics
    from drivers.training.objective import weigh_step
    from drivers.training.update import accumulate_gradients

    config = GrpoConfig(
        loss_type="grpo_clip",
        cliprange=CLIPRANGE,
        advantage_eps=ADVANTAGE_EPS,
        aggregation="token_mean",
        rollout_batch_size=len(rollouts),
        train_batch_size=len(rollouts),
        group_size=rollouts.group_size,
        sampling_min_tokens=0,
        sampling_max_tokens=rollouts.cap,
        gradient_accumulation_steps=len(rollouts) // ROWS,
        micro_batch_tokens=micro_batch_tokens,
    )
    completions = [
        Completion("", tuple(prompt), tuple(response), (0.0,) * len(response), "stop")
        for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True)
    ]

    def step():
        batch = make_rollout_batch(completions, rollouts.rewards, rollouts.group_size)
        batch = prepare_rollouts(config, policy, None, batch, [], None)
        batch, _ = weigh_step(config, batch)
        accumulate_gradients(policy, batch, config, 0.0, UpdateMetrics())

    return step


def ours(folder: str, dtype: str, rollouts: Rollouts, micro_batch_tokens: int | None = None) -> tuple[nn.Module, Step]:
    """With the model as train.py loads it."""
    from drivers.policy.loading import load_policy, tune_malloc

    tune_malloc()
    longest_row = max(map(len, rollouts.prompts)) + rollouts.group_size * rollouts.cap
    policy = load_policy(folder, torch.device("cpu"), getattr(torch, dtype), longest_row)
    return policy, make_update(policy, rollouts, micro_batch_tokens)


WAYS = {
    "cs336": cs336,
    "cs336_trim": partial(cs336, trim=True),
    "trl": trl,
    "trl_logits": trl_logits,
    "liger": liger,
    "ours_accumulate": ours,
    BASELINE: ours,
}


def build(way: str, *, directory: str, dtype: str, micro_batch_tokens: int):
    rollouts = Rollouts(**torch.load(Path(directory, "rollouts.pt")))
    options = {"micro_batch_tokens": micro_batch_tokens} if way == BASELINE else {}
    policy, step = WAYS[way](directory, dtype, rollouts, **options)
    for parameter in policy.parameters():
        parameter.sum()  # so that it is in memory before memory is measured

    def run():
        step()
        policy.zero_grad()

    def check():
        slots = []
        counter = policy.base_model.register_forward_pre_hook(
            lambda _, __, inputs: slots.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        step()
        counter.remove()
        path = Path(directory, "gradient.pt")
        reference = torch.load(path, mmap=True) if path.exists() else {}
        errors = [_relative_error(policy.get_parameter(name).grad, exact) for name, exact in reference.items()]
        return {"slots": sum(slots), "off": max(errors, default=None)}

    return {"": run}, check


def _relative_error(gradient: Tensor, exact: Tensor) -> float:
    return float((gradient.to(exact.dtype) - exact).abs().max() / exact.abs().max())


def write_inputs(directory: str, shape: dict[str, int], dtype: str, rollouts: Rollouts, reference: str) -> int:
    """Make the inputs of all ways and the textbook gradient in `reference` precision; return the number of parameters.

    The model's norms and rotary angles are in float32 whatever its precision: float64 is right to about 1e-7.
    """
    torch.manual_seed(0)
    longest = max(map(len, rollouts.prompts)) + rollouts.cap
    options = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": longest}
    policy = LlamaForCausalLM(LlamaConfig(**shape, **options, tie_word_embeddings=True)).to(getattr(torch, dtype))
    policy.save_pretrained(directory)
    torch.save(vars(rollouts), Path(directory, "rollouts.pt"))
    size = sum(p.numel() for p in policy.parameters())
    if reference == "auto":
        reference = "float64" if size <= SMALL else "none"
    if reference == "none":
        return size
    policy = load(directory, reference)  # not converted: rounding once would have rounded its rotary frequencies too
    for prompt, response, advantage in zip(
        rollouts.prompts, rollouts.responses, rollouts.advantages.to(policy.dtype), strict=True
    ):
        ids = torch.tensor([prompt + response])
        mask = torch.arange(1, ids.shape[1])[None] >= len(prompt)
        (textbook_loss(policy, ids, mask, advantage[None]) / rollouts.response_tokens).backward()
    gradient = {name: parameter.grad for name, parameter in policy.named_parameters()}
    torch.save(gradient, Path(directory, "gradient.pt"))
    return size


def make_step_table(chosen: argparse.Namespace, shape: dict[str, int], dtype: str, silent: float) -> str:
    rollouts = draw_rollouts(
        chosen.groups, chosen.group_size, tuple(chosen.prompt), chosen.cap, silent, shape["vocab_size"]
    )
    with tempfile.TemporaryDirectory() as directory:
        size = write_inputs(directory, shape, dtype, rollouts, chosen.reference)
        ways = [name for name in chosen.ways if name != BASELINE] + [BASELINE]
        options = {"directory": directory, "dtype": dtype, "micro_batch_tokens": chosen.micro_batch_tokens}
        # The first call, which is not counted, warms up.
        measured = measure(__spec__.name, ways, options, rounds=chosen.rounds, warmups=0)
    facts = (
        f"cpu, {dtype}",
        f"Llama of {size / 1e6:.3g} M parameters, {shape['num_hidden_layers']} layers, vocabulary"
        f" {shape['vocab_size']}",
        f"{chosen.groups} groups of {chosen.group_size}, {round(silent * chosen.groups)} with zero signal; prompts of"
        f" {chosen.prompt[0]} to {chosen.prompt[1]} tokens, {rollouts.response_tokens} response tokens, at most"
        f" {chosen.cap} each; micro-batches of {ROWS} responses, `{BASELINE}` of {chosen.micro_batch_tokens} tokens",
        f"{chosen.rounds} rounds",
    )
    header = ["way", "s", "", f"x {BASELINE}", "tokens/s", "slots/token", "peak", "first call, s", "error"]
    baseline = measured[BASELINE].results[""].median
    rows = []
    for name, way in measured.items():
        result, error = way.results[""], way.facts["off"]
        cells = [
            digits(result.median),
            f"({'..'.join(map(digits, result.quartiles))})",
            f"{result.median / baseline:.2f}",
            digits(rollouts.tokens / result.median),
            f"{way.facts['slots'] / rollouts.tokens:.2f}",
            f"{result.peak / MIB:.0f}",
            digits(result.first),
            "-" if error is None else f"{error:.1e}",
        ]
        rows.append([f"`{name}`", *cells])
    return f"{describe('cpu', *facts)}\n\n{make_table(header, rows)}"


def main(arguments: list[str]) -> dict[str, str]:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks step", description=__doc__.splitlines()[0])
    for name, usual in SMOLLM2.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=usual)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, nargs=2, default=(100, 300), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument(
        "--cap", type=int, default=128, help="tokens of the longest responses; the median has 0.4 of them"
    )
    parser.add_argument("--silent", type=float, nargs="+", default=[0.0, 0.25], help="shares of groups without signal")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help=f"of `{BASELINE}`")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help=f"beside {BASELINE}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--reference",
        choices=("auto", "float64", "float32", "none"),
        default="auto",
        help=f"precision of the gradient that all are held against; auto: float64 up to {SMALL:,} parameters",
    )
    chosen = parser.parse_args(arguments)
    if chosen.group_size < 2 or chosen.groups * chosen.group_size % ROWS:
        parser.error(f"groups of 2 or more are required, and a number of responses that {ROWS} divides")
    shape = {name: getattr(chosen, name) for name in SMOLLM2}
    tables = {}
    for silent in chosen.silent:
        parts = []
        for dtype in chosen.dtype:
            parts.append(make_step_table(chosen, shape, dtype, silent))
            print(f"\n{parts[-1]}", flush=True)
        tables["step-silent" if silent else "step"] = "\n\n".join(parts)
    return tables

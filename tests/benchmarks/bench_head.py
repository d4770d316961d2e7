"""From hidden states to the label's log-probability and entropy and back, through GRPO's clip loss.

`python -m tests.benchmarks head`; in .venv-parity TRL, verl, Liger and cut-cross-entropy run too, each through its own
functions. All get the same hidden states, weight and mask, and leave the same two gradients. A way without a mask of
its own is given the counted rows alone, as by a caller who packs them; the column "rows" says what each computes.
"""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks._harness import MIB, describe, digits, make_table, measure

CLIPRANGE = 0.2
ENTROPY_COEF = 0.01
BASELINE = "products"
# vocab, width, batch, seq: SmolLM2-135M with few and with many tokens, and Qwen2.5-Math-1.5B.
SIZES = {"short": (49152, 576, 2, 512), "long": (49152, 576, 8, 512), "wide": (151936, 1536, 2, 400)}
WITH_BONUS = "short"  # an entropy bonus takes a gradient of its own; one size shows what it costs
DTYPES = ("float32", "bfloat16")
IGNORED = -100  # the label that Liger and cut-cross-entropy leave out

Outcome = tuple[Tensor | None, Tensor | None, Tensor | None]  # loss; log-probs and entropy of the counted tokens


@dataclass
class Inputs:
    hidden: Tensor  # batch seq width
    weight: Tensor  # vocab width
    labels: Tensor  # batch seq; 0 outside the mask
    mask: Tensor  # batch seq
    advantages: Tensor  # batch 1
    old: Tensor  # batch seq, in nats; 0 outside the mask
    entropy_coef: float

    @property
    def counted(self) -> tuple[Tensor, Tensor]:
        """Hidden states and labels of the counted tokens."""
        return self.hidden[self.mask], self.labels[self.mask]

    def through_loss(self, log_probs: Tensor, entropy: Tensor | None = None) -> Outcome:
        """The loss that all ways share which give log-probabilities, of all tokens or of the counted ones."""
        if log_probs.shape == self.mask.shape:
            log_probs, entropy = (part if part is None else part[self.mask] for part in (log_probs, entropy))
        advantages = self.advantages.expand(self.mask.shape)[self.mask]
        ratio = (log_probs - self.old[self.mask]).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIPRANGE, 1 + CLIPRANGE) * advantages).mean()
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy.mean()
        return loss, log_probs, entropy


@dataclass
class Way:
    make: Callable[[], Callable[[Inputs], Outcome]]  # imports what it needs, then returns the call
    gives: str
    rows: str
    bonus: bool | None = None  # whether it runs with an entropy bonus or without; None: either


def products():
    """Compute what no way can save: the logits and the two gradients, as matrix products without results to check."""

    @torch.no_grad()
    def way(inputs):
        rows, _ = inputs.counted
        logits = rows @ inputs.weight.T
        gradients = logits @ inputs.weight, logits.T @ rows
        return None, *gradients

    return way


def textbook_scores(hidden, weight, labels):
    log_probs = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(dim=-1)
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_probs.exp() * log_probs).sum(dim=-1)


def textbook(scores=textbook_scores):
    return lambda inputs: inputs.through_loss(*scores(inputs.hidden, inputs.weight, inputs.labels))


def textbook_compiled():
    return textbook(torch.compile(textbook_scores))


def trl_logits():
    """TRL's path from logits: what its trainer took before its fused head."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return lambda inputs: inputs.through_loss(
        *selective_log_softmax_and_entropy(inputs.hidden @ inputs.weight.T, inputs.labels)
    )


def _trl_fused(rows_of):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as tile

    def way(inputs):
        hidden, labels = rows_of(inputs)
        log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, inputs.weight, None, labels, 1.0, tile, None, 1.0, ("log_probs", "entropy")
        )
        shape = inputs.mask.shape if len(hidden) == inputs.mask.numel() else hidden.shape[:1]
        return inputs.through_loss(log_probs.view(shape), entropy.view(shape))

    return way


def trl_fused():
    return _trl_fused(lambda inputs: inputs.counted)


def trl_fused_padded():
    """As its trainer calls it where there is no Triton: at every position."""
    return _trl_fused(lambda inputs: (inputs.hidden.flatten(0, 1), inputs.labels.flatten()))


def verl_torch():
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    score = FusedLinearForPPO()

    def way(inputs):
        hidden, labels = inputs.counted
        return inputs.through_loss(*score(hidden, inputs.weight, labels))

    return way


def verl_kernel():
    """verl's Triton kernels, for CUDA."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def way(inputs):
        hidden, labels = inputs.counted
        return inputs.through_loss(*linear_cross_entropy(hidden, inputs.weight, labels, 1.0, "none"))

    return way


def liger():
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    options = {"epsilon_low": CLIPRANGE, "epsilon_high": CLIPRANGE, "beta": 0.0, "use_ref_model": False}
    score = LigerFusedLinearGRPOLoss(loss_type="dapo", **options)

    def way(inputs):
        loss, _ = score(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            inputs.mask.long(),
            inputs.advantages.squeeze(1),
            old_per_token_logps=inputs.old,
        )
        return loss, None, None

    return way


def liger_sce():
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def way(inputs):
        hidden, labels = inputs.counted
        losses, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, inputs.weight, labels, 1.0, IGNORED, 1, True
        )
        return inputs.through_loss(-losses, entropy)

    return way


def cce():
    from cut_cross_entropy import linear_cross_entropy

    def way(inputs):
        losses = linear_cross_entropy(
            inputs.hidden,
            inputs.weight,
            inputs.labels.masked_fill(~inputs.mask, IGNORED),
            reduction="none",
            impl="cce" if inputs.hidden.is_cuda else "torch_compile",
        )
        return inputs.through_loss(-losses)

    return way


def ours_log_probs():
    from grpo_core import fused_linear_log_probs

    def way(inputs):
        scores = fused_linear_log_probs(inputs.hidden, inputs.weight, inputs.labels, response_mask=inputs.mask)
        return inputs.through_loss(scores["log_probs"], scores["token_entropy"])

    return way


def ours_grpo_loss():
    from grpo_core import compute_token_weights, fused_linear_grpo_loss

    def way(inputs):
        loss, told = fused_linear_grpo_loss(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            response_mask=inputs.mask,
            advantages=inputs.advantages,
            old_log_probs=inputs.old,
            cliprange=CLIPRANGE,
            weights=compute_token_weights(inputs.mask, "token_mean"),
        )
        return loss, told["log_probs"][inputs.mask], told["token_entropy"][inputs.mask]

    return way


def ours_token_loss():
    from grpo_core import (
        compose_policy_loss,
        compute_grpo_clip_loss,
        compute_token_weights,
        fused_linear_token_loss,
    )

    def way(inputs):
        weights = compute_token_weights(inputs.mask, "token_mean")

        def loss_fn(log_probs, entropy, take):
            losses, _ = compute_grpo_clip_loss(take(inputs.advantages), log_probs, take(inputs.old), CLIPRANGE)
            bonus = {"token_entropy": entropy, "entropy_coef": inputs.entropy_coef, "token_weights": take(weights)}
            return compose_policy_loss(losses, take(weights), **bonus)

        loss, told = fused_linear_token_loss(
            inputs.hidden, inputs.weight, inputs.labels, loss_fn, response_mask=inputs.mask
        )
        return loss, told["log_probs"][inputs.mask], told["token_entropy"][inputs.mask]

    return way


WAYS = {
    "products": Way(products, "-", "counted"),
    "textbook": Way(textbook, "log-prob, entropy", "all"),
    "textbook_compiled": Way(textbook_compiled, "log-prob, entropy", "all"),
    "trl_logits": Way(trl_logits, "log-prob, entropy", "all"),
    "trl_fused_padded": Way(trl_fused_padded, "log-prob, entropy", "all"),
    "trl_fused": Way(trl_fused, "log-prob, entropy", "counted"),
    "verl_torch": Way(verl_torch, "log-prob, entropy", "counted"),
    "verl_kernel": Way(verl_kernel, "log-prob, entropy", "counted"),
    "liger": Way(liger, "loss", "all", bonus=False),
    "liger_sce": Way(liger_sce, "log-prob, entropy", "counted"),
    "cce": Way(cce, "log-prob", "counted", bonus=False),
    "ours_log_probs": Way(ours_log_probs, "log-prob, entropy", "counted"),
    "ours_grpo_loss": Way(ours_grpo_loss, "loss, log-prob, entropy", "counted", bonus=False),
    "ours_token_loss": Way(ours_token_loss, "loss, log-prob, entropy", "counted", bonus=True),
}


def write_inputs(path: Path, size: tuple[int, ...], dtype: str, device: str, entropy_coef: float) -> int:
    """Write the inputs of all ways with textbook results in float64, and return the number of counted tokens.

    Labels are drawn from the model's own distribution, as sampled tokens are. No ratio comes close to the clip range,
    where the rounding of a logit would decide whether a token has a gradient.
    """
    vocab, width, batch, seq = size
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, seq, width, generator=random).to(getattr(torch, dtype))
    weight = (torch.randn(vocab, width, generator=random) * 3 / width**0.5).to(hidden.dtype)
    mask = torch.arange(seq) < torch.linspace(seq / 3, seq, batch).round()[:, None]
    nudge = torch.rand(batch, seq, generator=random) * 0.2 - 0.1
    nudge = torch.where(torch.arange(seq) % 16 == 0, nudge.sign() * 0.5, nudge)
    dice = torch.rand(batch, seq, generator=random)
    inputs = Inputs(
        hidden=hidden,
        weight=weight,
        labels=torch.zeros(batch, seq, dtype=torch.long),
        mask=mask,
        advantages=torch.randn(batch, 1, generator=random),
        old=torch.zeros(batch, seq),
        entropy_coef=entropy_coef,
    )
    wide = weight.to(device, torch.float64).requires_grad_()
    reference = {name: [] for name in ("log_probs", "entropy", "hidden")}
    for places in mask.nonzero().split(128):
        place = tuple(places.T)
        rows = hidden[place].to(device, torch.float64).requires_grad_()
        with torch.no_grad():
            below = (rows @ wide.T).softmax(dim=-1).cumsum(dim=-1) < dice[place].to(rows)[:, None]
            labels = below.sum(dim=-1).clamp(max=vocab - 1)
        log_probs, entropy = textbook_scores(rows, wide, labels)
        inputs.labels[place] = labels.cpu()
        inputs.old[place] = log_probs.detach().cpu().float() + nudge[place]
        part = Inputs(
            hidden=rows,
            weight=wide,
            labels=labels,
            mask=torch.ones_like(labels, dtype=torch.bool),
            advantages=inputs.advantages.expand(mask.shape)[place].to(device),
            old=inputs.old[place].to(device),
            entropy_coef=entropy_coef,
        )
        loss, _, _ = part.through_loss(log_probs, entropy)
        (loss * len(rows) / mask.sum()).backward()
        for name, value in (("log_probs", log_probs), ("entropy", entropy), ("hidden", rows.grad)):
            reference[name].append(value.detach().cpu())
    reference = {name: torch.cat(parts) for name, parts in reference.items()} | {"weight": wide.grad.cpu()}
    torch.save({"inputs": vars(inputs), "reference": reference}, path)
    return int(mask.sum())


def build(way: str, *, path: str, device: str):
    call = WAYS[way].make()
    # Mapped: a weight of a gigabyte stands in memory once, however many processes there are.
    given = torch.load(path, mmap=True)
    inputs = Inputs(
        **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in given["inputs"].items()}
    )
    for name in ("hidden", "weight"):
        getattr(inputs, name).sum()  # so that it is in memory before memory is measured
        getattr(inputs, name).requires_grad_()

    def forward_and_backward():
        loss, log_probs, entropy = call(inputs)
        if loss is not None:
            loss.backward()
        return log_probs, entropy

    def run():
        forward_and_backward()
        inputs.hidden.grad = inputs.weight.grad = None

    def check():
        if way == BASELINE:
            return {}
        log_probs, entropy = forward_and_backward()
        reference = given["reference"]
        outside = inputs.hidden.grad[~inputs.mask]
        assert not outside.any(), "a gradient outside the mask"
        facts = {
            "dhidden": _error(inputs.hidden.grad[inputs.mask], reference["hidden"], relative=True),
            "dweight": _error(inputs.weight.grad, reference["weight"], relative=True),
        }
        for name, value in (("log_probs", log_probs), ("entropy", entropy)):
            if value is not None:
                facts[name] = _error(value.detach(), reference[name])
        return facts

    return {"": run}, check


def _error(value: Tensor, reference: Tensor, relative: bool = False) -> float:
    """The largest; in blocks of rows, for a wide copy of a whole gradient might not fit."""
    blocks = zip(value.split(4096), reference.split(4096), strict=True)
    error = torch.stack([(block.cpu().double() - exact).abs().max() for block, exact in blocks]).max()
    return float(error / reference.abs().max() if relative else error)


def make_head_table(
    names: list[str], size: tuple[int, ...], dtype: str, device: str, rounds: int, entropy_coef: float
) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "inputs.pt")
        counted = write_inputs(path, size, dtype, device, entropy_coef)
        ways = [name for name in (BASELINE, *names) if WAYS[name].bonus in (None, entropy_coef > 0)]
        options = {"path": str(path), "device": device}
        measured = measure(__spec__.name, ways, options, rounds=rounds, warmups=2)
    vocab, width, batch, seq = size
    bonus = f", entropy bonus {entropy_coef}" if entropy_coef else ""
    facts = (
        f"{device}, {dtype}",
        f"vocabulary {vocab}, width {width}, {batch} responses of up to {seq} tokens, {counted} counted{bonus}",
        f"{rounds} rounds",
    )
    header = ["way", "gives", "rows", "ms", "", f"x {BASELINE}", "peak", "kept", "first call, s"]
    header += ["log-prob", "entropy", "d hidden", "d weight"]
    rows = []
    for name, way in measured.items():
        result = way.results[""]
        errors = [way.facts.get(fact) for fact in ("log_probs", "entropy", "dhidden", "dweight")]
        quartiles = "..".join(digits(1000 * seconds) for seconds in result.quartiles)
        cells = [
            digits(1000 * result.median),
            f"({quartiles})",
            f"{result.median / measured[BASELINE].results[''].median:.2f}",
            f"{result.peak / MIB:.0f}",
            f"{result.kept / MIB:.0f}",
            digits(result.first),
            *("-" if error is None else f"{error:.1e}" for error in errors),
        ]
        rows.append([f"`{name}`", WAYS[name].gives, WAYS[name].rows, *cells])
    return f"{describe(device, *facts)}\n\n{make_table(header, rows)}"


def main(arguments: list[str]) -> dict[str, str]:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks head", description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES), help="which of the usual sizes")
    for name in ("vocab", "width", "batch", "seq"):
        parser.add_argument(f"--{name}", type=int, help="a size of your own; what is left out is that of `short`")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help=f"beside {BASELINE}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args(arguments)
    names = [name for name in chosen.ways if name != BASELINE]
    own = (chosen.vocab, chosen.width, chosen.batch, chosen.seq)
    sizes = {name: SIZES[name] for name in chosen.size}
    if any(own):
        sizes = {"own": tuple(mine or usual for mine, usual in zip(own, SIZES["short"], strict=True))}
    tables = {}
    for name, size in sizes.items():
        parts = []
        for entropy_coef in (0.0, ENTROPY_COEF) if name in (WITH_BONUS, "own") else (0.0,):
            for dtype in chosen.dtype:
                parts.append(make_head_table(names, size, dtype, chosen.device, chosen.rounds, entropy_coef))
                print(f"\n{parts[-1]}", flush=True)
        tables[f"head-{name}"] = "\n\n".join(parts)
    return tables

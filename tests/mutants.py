"""Break the library by hand and see that a test turns red: `python tests/mutants.py [substring of a description]`.

Each mutant is one replacement in one file, applied to a temporary copy of the package; the tests that ought to notice
run against the copy. Exit status 1 if a mutant survives, or if a test fails on the copy with nothing broken in it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Small examples first: most mutants die there, before the slow imports of the others.
EXAMPLES = ["tests/parity/test_conventions.py", "tests/unit/test_worked_examples.py"]
ORACLE, FAMILY = "tests/oracle/test_oracle.py", "tests/property/test_family.py"


class Mutant(NamedTuple):
    """`before`, found exactly once in `file`, becomes `after`."""

    name: str
    file: str
    before: str
    after: str


SUITES = {
    "clip": ["tests/property/test_losses.py", FAMILY],
    "group": ["tests/property/test_advantages.py", ORACLE],
    "mean": ["tests/property/test_masking.py", ORACLE],
    "entropy": ["tests/property/test_distributions.py", ORACLE],
    "step": [FAMILY, ORACLE],
    "row": ["tests/property/test_group_rows.py"],
}

MUTANTS = [
    # The clip loss.
    Mutant("clip: max for min", "losses.py", "torch.minimum(", "torch.maximum("),
    Mutant("clip: advantages carry gradient", "losses.py", "    advantages = advantages.detach()\n", ""),
    Mutant(
        "clip: the old policy carries gradient",
        "losses.py",
        "old_log_probs.detach())\n    surrogate",
        "old_log_probs)\n    surrogate",
    ),
    Mutant("clip: no lower bound", "losses.py", "clamp(1 - cliprange, 1 + cliprange)", "clamp(max=1 + cliprange)"),
    Mutant(
        "clip: range in log space",
        "losses.py",
        "clamp(1 - cliprange, 1 + cliprange)",
        "clamp(math.exp(-cliprange), math.exp(cliprange))",
    ),
    Mutant("clip: counted on the side that does not bind", "losses.py", "clipped < surrogate", "clipped != surrogate"),
    Mutant("clip: no clip at all", "losses.py", "-torch.minimum(surrogate, clipped)", "-surrogate"),
    # Group normalization.
    Mutant(
        "group: biased deviation",
        "advantages.py",
        "groups.std(dim=1, keepdim=True)",
        "groups.std(dim=1, keepdim=True, correction=0)",
    ),
    Mutant(
        "group: epsilon inside the root",
        "advantages.py",
        "(groups.std(dim=1, keepdim=True) + advantage_eps)",
        "(groups.var(dim=1, keepdim=True) + advantage_eps).sqrt()",
    ),
    Mutant(
        "group: constant decided by the deviation",
        "advantages.py",
        "torch.where(_carries_no_signal(groups),",
        "torch.where(groups.std(dim=1, keepdim=True) == 0,",
    ),
    Mutant("group: constant decided by equality", "advantages.py", "_RELATIVE_NOISE = 1e-6", "_RELATIVE_NOISE = 0.0"),
    Mutant("group: members interleaved", "advantages.py", 'wide, "(group member)', 'wide, "(member group)'),
    Mutant(
        "group: mean of the batch",
        "advantages.py",
        "groups - groups.mean(dim=1, keepdim=True)",
        "groups - groups.mean()",
    ),
    Mutant("group: rewards carry gradient", "advantages.py", "rewards.detach().to(", "rewards.to("),
    # The masked mean.
    Mutant("mean: mask multiplied", "masking.py", "torch.where(mask, tensor, 0.0)", "tensor * mask"),
    Mutant(
        "mean: every NaN hidden", "masking.py", "torch.where(mask, tensor, 0.0)", "torch.nan_to_num(tensor) * mask"
    ),
    Mutant(
        "mean: nothing gives 0",
        "masking.py",
        "masked_sum(tensor, mask, dim) / count",
        "masked_sum(tensor, mask, dim) / count.clamp(min=1)",
    ),
    Mutant(
        "mean: over all entries",
        "masking.py",
        "mask.sum() if dim is None else mask.sum(dim)",
        "mask.numel() if dim is None else mask.shape[dim]",
    ),
    Mutant(
        "mean: one count for all slices", "masking.py", "mask.sum() if dim is None else mask.sum(dim)", "mask.sum()"
    ),
    Mutant("mean: mask upside down", "masking.py", "torch.where(mask, tensor, 0.0)", "torch.where(mask, 0.0, tensor)"),
    # Entropy.
    Mutant(
        "entropy: sign of the second term",
        "distributions.py",
        "logsumexp(dim=-1) - (shifted",
        "logsumexp(dim=-1) + (shifted",
    ),
    Mutant(
        "entropy: 0 times infinity", "distributions.py", "torch.where(shifted == -math.inf, 0.0, shifted)", "shifted"
    ),
    Mutant("entropy: no shift", "distributions.py", "scaled - scaled.amax(dim=-1, keepdim=True).detach()", "scaled"),
    Mutant(
        "entropy: probabilities carry no gradient",
        "distributions.py",
        "shifted.softmax(dim=-1)",
        "shifted.softmax(dim=-1).detach()",
    ),
    Mutant("entropy: temperature upside down", "distributions.py", "wide / temperature", "wide * temperature"),
    Mutant(
        "entropy: half precision stays half",
        "distributions.py",
        "logits.to(torch.promote_types(logits.dtype, torch.float32))",
        "logits",
    ),
    Mutant("entropy: softmax over the batch", "distributions.py", "shifted.softmax(dim=-1)", "shifted.softmax(dim=0)"),
    # The micro-batch step.
    Mutant("step: not divided by the accumulation", "steps.py", "return loss / shares", "return loss"),
    Mutant(
        "step: token_mean divided too",
        "steps.py",
        '1 if aggregation == "token_mean" else accumulation',
        "accumulation",
    ),
    Mutant(
        "step: policy not cleaned", "steps.py", "torch.where(response_mask, policy_log_probs, 0.0)", "policy_log_probs"
    ),
    Mutant(
        "step: old policy not cleaned", "steps.py", "torch.where(response_mask, old_log_probs, 0.0)", "old_log_probs"
    ),
    Mutant(
        "step: mean over tokens",
        "aggregation.py",
        "(row_sums / response_mask.sum(dim=1).clamp(min=1)).mean()",
        "row_sums.sum() / response_mask.sum().clamp(min=1)",
    ),
    Mutant("step: sum over sequences", "aggregation.py", "row_sums.mean() / _req", "row_sums.sum() / _req"),
    Mutant("step: sft climbs", "steps.py", "return -log_likelihood", "return log_likelihood"),
    Mutant("step: sft not divided", "steps.py", "-log_likelihood / accumulation", "-log_likelihood"),
    Mutant("step: KL the other way", "steps.py", "log_ratio.expm1() - log_ratio", "(-log_ratio).expm1() + log_ratio"),
    Mutant(
        "step: metrics carry gradient", "steps.py", "_drift(policy_log_probs.detach(),", "_drift(policy_log_probs,"
    ),
    Mutant(
        "step: no backward",
        "steps.py",
        "    loss.backward()  # type: ignore[no-untyped-call]\n    return loss.detach(), metadata\n\n\ndef",
        "    return loss.detach(), metadata\n\n\ndef",
    ),
    # Group rows.
    Mutant(
        "row: responses see each other",
        "group_rows.py",
        "    own_or_prompt = (segment[:, None] == segment[None, :]) | (",
        "    own_or_prompt = (segment[:, None] >= segment[None, :]) | (",
    ),
    Mutant("row: the prompt is hidden", "group_rows.py", " | (segment[None, :] == 0)", ""),
    Mutant(
        "row: the future is seen",
        "group_rows.py",
        "own_or_prompt & (place[:, None] >= place[None, :])",
        "own_or_prompt",
    ),
    Mutant(
        "row: positions run on", "group_rows.py", "prompt + within])[None]", "prompt + torch.arange(len(flat))])[None]"
    ),
    Mutant(
        "row: a first token predicted by its neighbor",
        "group_rows.py",
        "torch.where(within == 0, prompt - 1, prompt + torch.arange(len(flat)) - 1)",
        "prompt + torch.arange(len(flat)) - 1",
    ),
    Mutant("row: mask not handed on", "group_rows.py", "attention_mask=hidden[None, None], ", ""),
    Mutant(
        "row: temperature forgotten",
        "group_rows.py",
        "return_token_entropy, temperature, detach_entropy",
        "return_token_entropy, 1.0, detach_entropy",
    ),
]


def first_red(copy: Path, tests: list[str]) -> str | None:
    """The first test that fails in the copy; None if all pass."""
    environment = os.environ | {"HYPOTHESIS_PROFILE": "ci", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    red = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return red[0].split(" - ")[0].split("::")[-1] if red else done.stdout[-500:] + done.stderr[-500:]


def survives(mutant: Mutant, copy: Path) -> bool:
    path = copy / "grpo_core" / mutant.file
    whole = path.read_text()
    if whole.count(mutant.before) != 1:
        sys.exit(
            f"{mutant.name}: {mutant.before!r} stands {whole.count(mutant.before)} times in {mutant.file}; want 1"
        )
    path.write_text("import math\n" * ("math." in mutant.after) + whole.replace(mutant.before, mutant.after))
    started = time.monotonic()
    red = first_red(copy, EXAMPLES) or first_red(copy, SUITES[mutant.name.partition(":")[0]])
    path.write_text(whole)
    verdict = "killed  " if red else "SURVIVED"
    print(f"{verdict} {mutant.name}  [{red or 'no test'}, {time.monotonic() - started:.0f} s]")
    return red is None


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for folder in ("grpo_core", "tests"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        suites = {test for mutant in chosen for test in SUITES[mutant.name.partition(":")[0]]}
        if red := first_red(copy, [*EXAMPLES, *sorted(suites)]):
            sys.exit(f"red with nothing broken: {red}")
        survivors = sum(survives(mutant, copy) for mutant in chosen)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()

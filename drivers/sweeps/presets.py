"""Define the preset sweeps: the experiments of CS336's fifth assignment.

Some values depend on the model and the shared flags: `base(program)` returns the settings of a program under them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drivers.settings.recipes import EMBEDDED_MODEL

Base = Callable[[str], Any]


@dataclass(frozen=True)
class Variant:
    """One run of a sweep before its seed: a label, a program and the flags that the sweep varies."""

    label: str
    program: str
    flags: dict[str, Any]


def _train(label: str, **flags: Any) -> Variant:
    return Variant(label, "train", flags)


def learning_rates(base: Base) -> list[Variant]:
    """Vary the learning rate, from too low to too high."""
    rates = [f"{base('train').learning_rate * factor:.3g}" for factor in (0.1, 0.3, 1.0, 3.0, 10.0)]
    return [_train(rate, learning_rate=float(rate)) for rate in rates]


def baselines(base: Base) -> list[Variant]:
    """Train with and without subtracting the mean reward of the group."""
    return [_train(name.replace("_", "-"), loss_type=name) for name in ("no_baseline", "reinforce_with_baseline")]


def length_normalization(base: Base) -> list[Variant]:
    """Average token losses over each response, by a constant, or over the whole batch."""
    return [_train(name.replace("_", "-"), aggregation=name) for name in ("sequence_mean", "constant", "token_mean")]


def std_normalization(base: Base) -> list[Variant]:
    """Train with and without dividing advantages by the standard deviation of the group."""
    return [_train("std", use_std_normalization=True), _train("no-std", use_std_normalization=False)]


def off_policy(base: Base) -> list[Variant]:
    """Vary the number of updates per rollout batch: passes over it, and train batches per pass."""
    return [
        _train(f"{epochs}-epochs-of-{parts}", loss_type="grpo_clip", **_reuse(base, epochs, parts))
        for epochs, parts in ((1, 1), (1, 4), (2, 2), (4, 1), (4, 4))
    ]


def clip(base: Base) -> list[Variant]:
    """Train with and without clipping, with four updates per rollout batch."""
    forms = {"clipped": "grpo_clip", "not-clipped": "grpo_no_clip", "no-ratio": "reinforce_with_baseline"}
    return [_train(label, loss_type=name, **_reuse(base, 2, 2)) for label, name in forms.items()]


def variants(base: Base) -> list[Variant]:
    """Compare GRPO, its sum over a constant, Dr. GRPO, RFT and MaxRL (CS336, edition 2026)."""
    forms: dict[str, dict[str, Any]] = {
        "grpo-constant": {},
        "dr-grpo": {"use_std_normalization": False},
        "rft": {"loss_type": "no_baseline"},
        "maxrl": {"advantage": "maxrl"},
    }
    constant = [_train(label, aggregation="constant", **flags) for label, flags in forms.items()]
    return [_train("grpo", aggregation="sequence_mean"), *constant]


def off_policy_32(base: Base) -> list[Variant]:
    """Make 32 updates per rollout batch: without a ratio, with one, clipped, and with GSPO (CS336, edition 2026)."""
    forms: dict[str, dict[str, Any]] = {
        "no-ratio": {"loss_type": "reinforce_with_baseline"},
        "not-clipped": {"loss_type": "grpo_no_clip"},
        "clipped": {"loss_type": "grpo_clip", "cliprange": 0.2},
        "gspo": {"loss_type": "gspo", "cliprange": 3e-4},
    }
    return [_train(label, **flags, **_reuse(base, 1, 32)) for label, flags in forms.items()]


def prompts(base: Base) -> list[Variant]:
    """Vary the prompt, with the reward that grades its format."""
    given = base("train")
    forms = {
        given.prompt_path: given.reward,
        "data/prompts/r1_zero.prompt": "r1_zero",
        "data/prompts/r1_zero_three_shot.prompt": "r1_zero",
        "data/prompts/question_only.prompt": "question_only",
        "data/prompts/question_only_2026.prompt": "question_only",
    }
    return [
        _train(path.rsplit("/", 1)[-1].removesuffix(".prompt").replace("_", "-"), prompt_path=path, reward=reward)
        for path, reward in forms.items()
    ]


def objectives(base: Base) -> list[Variant]:
    """Compare the recipes of papers, with two updates per rollout batch."""
    names = ("dr-grpo", "dapo", "gspo", "cispo", "rloo", "maxrl")
    return [_train(name, recipe=name, **_reuse(base, 1, 2)) for name in names]


def methods(base: Base) -> list[Variant]:
    """Compare SFT, expert iteration and GRPO."""
    return [Variant("sft", "sft", {}), Variant("expert-iteration", "expert_iteration", {}), _train("grpo")]


def sft_sizes(base: Base) -> list[Variant]:
    """Vary the number of demonstrations, with and without the wrong ones."""
    sizes = (128, 256, 512, 1024, None)  # None is all of them
    return [
        Variant(f"{n or 'all'}-{name}", "sft", {"n_examples": n, "correct_only": correct_only})
        for correct_only, name in ((False, "as-they-are"), (True, "right"))
        # Only 913 of the embedded demonstrations are correct, so 1,024 of them would equal all.
        for n in sizes
        if not (correct_only and n == 1024 and base("sft").model_path == EMBEDDED_MODEL)
    ]


def expert_iterations(base: Base) -> list[Variant]:
    """Vary responses per question, passes over the correct ones, and questions per step."""
    n = base("expert_iteration").question_batch_size
    return [
        Variant(
            f"{size}-of-{questions}-{epochs}-epochs",
            "expert_iteration",
            {"group_size": size, "question_batch_size": questions, "epochs": epochs},
        )
        for size, questions, epochs in ((4, n, 1), (8, n, 1), (8, n, 2), (8, n // 2, 2))
    ]


def _reuse(base: Base, epochs: int, parts: int) -> dict[str, Any]:
    """Return flags for `epochs` passes over the rollouts in `parts` batches each, with unchanged micro-batches."""
    given = base("train")
    flags: dict[str, Any] = {"epochs_per_rollout_batch": epochs, "train_batch_size": given.rollout_batch_size // parts}
    if given.micro_batch_tokens is None:
        flags["gradient_accumulation_steps"] = max(1, given.gradient_accumulation_steps // parts)
    return flags


SWEEPS: dict[str, Callable[[Base], list[Variant]]] = {
    "learning-rates": learning_rates,
    "baselines": baselines,
    "length-normalization": length_normalization,
    "std-normalization": std_normalization,
    "off-policy": off_policy,
    "clip": clip,
    "variants": variants,
    "off-policy-32": off_policy_32,
    "prompts": prompts,
    "objectives": objectives,
    "methods": methods,
    "sft-sizes": sft_sizes,
    "expert-iterations": expert_iterations,
}
SEEDS: dict[str, tuple[int, ...]] = dict.fromkeys(("variants", "off-policy-32"), (0, 1, 2, 3))
"""Seeds of the sweeps that have more than one by default."""
SHORT: dict[str, dict[str, Any]] = {
    "train": {"n_grpo_steps": 10, "n_val_examples": 128},
    "sft": {"n_val_examples": 128},
    "expert_iteration": {"n_val_examples": 128},
}
"""Settings without --model-path: a short quickstart that still shows differences."""

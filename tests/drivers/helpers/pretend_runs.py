"""Updates and runs on the pretend device and on the CPU, for a process of their own. Results are JSON files."""

import json
import warnings
from pathlib import Path

import torch

from drivers.common.display import Display
from drivers.engines.hf import HFEngine
from drivers.grading.verdicts import make_inline_grader
from drivers.policy.lora import add_lora
from drivers.train import train
from drivers.training import run as run_module
from drivers.training.advantages import prepare_rollouts
from drivers.training.components import Components
from drivers.training.forward import forward
from drivers.training.metrics import UpdateMetrics
from drivers.training.objective import weigh_step
from drivers.training.run import Run
from drivers.training.update import accumulate_gradients
from tests.benchmarks.spread_reward import spread_reward
from tests.drivers.helpers import pretend_device
from tests.drivers.helpers.letters import make_tiny_config, make_tiny_parts, sample_rollouts
from tests.drivers.helpers.runs import drop_times, read_rows

SMALL = {
    "n_grpo_steps": 2,
    "eval_steps": 2,
    "rollout_batch_size": 8,
    "train_batch_size": 8,
    "group_size": 4,
    "gradient_accumulation_steps": 2,
    "sampling_max_tokens": 4,
}


def compare_updates(folder, settings):
    """Write the largest gradient error of each settings' update, and the synchronizations inside its loop."""
    policies = [make_tiny_parts().policy.to(device) for device in ("cpu", pretend_device.install())]
    found = {}
    for name, changes in settings.items():
        config, parts = make_tiny_config(**SMALL | {"micro_batch_tokens": 40} | changes), make_tiny_parts()
        parts.questions = parts.questions[:2]
        rollouts, scores = sample_rollouts(config, parts)
        gradients = []
        for policy in policies:
            batch, _ = weigh_step(config, prepare_rollouts(config, policy, None, rollouts, scores, None))
            forward(policy, batch.select([0]), 1.0)  # the trials of shortcuts are not part of the loop
            policy.zero_grad()
            pretend_device.synchronizations.clear()
            accumulate_gradients(policy, batch, config, config.entropy_coef, UpdateMetrics())
            synchronizations = list(pretend_device.synchronizations)
            gradients.append(torch.cat([p.grad.cpu().flatten() for p in policy.parameters()]))
        expected, gradient = gradients
        found[name] = {
            "error": float((gradient - expected).abs().max() / expected.abs().max()),
            "largest": float(expected.abs().max()),
            "synchronizations": synchronizations,
        }
    Path(folder, "updates.json").write_text(json.dumps(found))


def run(folder, device, changes, checkpoint=None):
    """Train in `folder` on a device; return the logged rows and the weights."""
    config, parts = make_tiny_config(**SMALL | changes), make_tiny_parts()
    dtype = getattr(torch, config.dtype)
    policy = parts.policy.to(dtype)
    if config.lora_rank:
        add_lora(policy, config.lora_rank, config.lora_alpha, seed=0, base="tiny")
    policy = policy.to(device)
    needs_copy = config.needs_reference and not config.lora_rank
    reference = make_tiny_parts().policy.to(device, dtype).requires_grad_(False) if needs_copy else None
    folder.mkdir(parents=True, exist_ok=True)
    own = Run(config, folder, parts.tokenizer, Display(config.n_grpo_steps, quiet=True), checkpoint)
    grade = make_inline_grader(spread_reward)
    components = Components(
        policy, HFEngine(policy, parts.tokenizer), grade, parts.questions[:2], parts.questions[2:3], reference
    )
    try:
        train(config, components, own)
    finally:
        own.finish()
    return [drop_times(row) for row in read_rows(folder) if row["phase"] != "save"], list(policy.parameters())


def compare_runs(folder, settings):
    """Write the logged rows of whole runs: {name: {"cpu": rows, "pretend": rows}}."""
    run_module.draw_curves = lambda _: None
    warnings.simplefilter("ignore")
    device, folder = pretend_device.install(), Path(folder)
    rows = {
        name: {
            kind: run(folder / f"{name}-{kind}", on, changes)[0] for kind, on in (("cpu", "cpu"), ("pretend", device))
        }
        for name, changes in settings.items()
    }
    (folder / "runs.json").write_text(json.dumps(rows))


def compare_resumed(folder):
    """Write whether a run on the device that is resumed after its first step ends with the same weights and rows."""
    run_module.draw_curves = lambda _: None
    warnings.simplefilter("ignore")
    device, folder, changes = pretend_device.install(), Path(folder), {"checkpoint_steps": 1}
    rows, weights = run(folder / "run", device, changes)
    again, resumed = run(folder / "run", device, changes, folder / "run/checkpoint-1")
    same = [torch.equal(a.detach().cpu(), b.detach().cpu()) for a, b in zip(weights, resumed, strict=True)]
    found = {"weights": all(same), "rows": rows == again, "steps": [row["step"] for row in again]}
    (folder / "resumed.json").write_text(json.dumps(found))

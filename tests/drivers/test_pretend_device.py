"""The loop on a device other than the CPU: a pretend accelerator, which needs no GPU.

Its values lie in host memory; it fails where tensors of host and device meet, and counts what the host waits for.
"""

import json
import math

import pytest

from drivers.settings.tables import OBJECTIVES
from tests.drivers.helpers import pretend_device, pretend_runs
from tests.drivers.helpers.forked import ForkedProgram

SETTINGS = {
    "KL in the loss": {
        "loss_type": "grpo_clip",
        "importance": "truncate",
        "kl_coef": 0.1,
        "epochs_per_rollout_batch": 2,
        "micro_batch_tokens": 40,
    },
    "KL in the reward": {
        "loss_type": "gspo_token",
        "importance": "reject",
        "importance_level": "sequence",
        "kl_coef": 0.1,
        "kl_in": "reward",
        "kl_estimator": "k1",
        "max_refills": 1,
    },
    "LoRA": {"lora_rank": 4, "lora_alpha": 8, "kl_coef": 0.1, "entropy_target": 6.0, "entropy_coef": 0.01},
}
ONE_STEP = {"n_grpo_steps": 1, "eval_steps": 1}
OBJECTIVE_SETTINGS = {name: {"loss_type": name, "entropy_coef": 0.01} for name in OBJECTIVES}


def run_apart(function, folder, *arguments, file):
    """Run a function in its own process, because the device stays known to torch; return what it wrote."""
    program = ForkedProgram(function, str(folder), *arguments, output=folder / "said.txt")
    assert program.wait(300) == 0, program.output
    return json.loads((folder / file).read_text())


@pytest.mark.slow
def test_update_of_each_objective_equals_cpu_and_never_synchronizes(tmp_path):
    found = run_apart(pretend_runs.compare_updates, tmp_path, OBJECTIVE_SETTINGS, file="updates.json")
    assert found.keys() == OBJECTIVES.keys()
    for name, update in found.items():
        assert update["largest"] > 1e-4, name
        assert update["error"] < 1e-4, name
        assert update["synchronizations"] == [], name


def assert_same(runs):
    for name, rows in runs.items():
        assert [row["phase"] for row in rows["pretend"]] == [row["phase"] for row in rows["cpu"]]
        for found, expected in zip(rows["pretend"], rows["cpu"], strict=True):
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                is_number = isinstance(value, float) and math.isfinite(value)
                wanted = pytest.approx(value, rel=1e-4, abs=1e-5) if is_number else value
                assert found[key] == wanted or value != value, (name, key)
        assert any(row.get("grad_norm", 0) > 1e-3 for row in rows["cpu"]), name


@pytest.mark.slow
def test_train_on_pretend_device_equals_cpu(tmp_path):
    assert_same(run_apart(pretend_runs.compare_runs, tmp_path, SETTINGS, file="runs.json"))


@pytest.mark.nightly
def test_train_of_each_objective_on_pretend_device_equals_cpu(tmp_path):
    settings = {name: changes | ONE_STEP for name, changes in OBJECTIVE_SETTINGS.items()}
    assert_same(run_apart(pretend_runs.compare_runs, tmp_path, settings, file="runs.json"))


@pytest.mark.slow
def test_resume_on_pretend_device_is_bit_identical(tmp_path):
    found = run_apart(pretend_runs.compare_resumed, tmp_path, file="resumed.json")
    assert found == {"weights": True, "rows": True, "steps": found["steps"]}
    assert max(found["steps"]) == 2


def check_that_device_tells_host_apart():
    """Fail unless the device refuses what CUDA refuses, and counts waits."""
    import torch

    device = pretend_device.install()
    here, there = torch.arange(3.0), torch.arange(3.0, device="cpu").to(device)
    for mix in (lambda: here + there, lambda: torch.where(here > 1, there, there), lambda: there @ here):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mix()
    assert (there + 1).cpu().tolist() == [1, 2, 3]
    pretend_device.synchronizations.clear()
    for wait in (there.sum().item, there.cpu, there.nonzero, lambda: there[there > 1], there.tolist):
        wait()
        assert len(pretend_device.synchronizations) == 1
        pretend_device.synchronizations.clear()
    there.add_(1).mul_(2).to(torch.bfloat16).sum()
    there[torch.tensor([0, 1]).to(device)]
    assert not pretend_device.synchronizations


@pytest.mark.medium
def test_pretend_device_refuses_mixed_devices_and_counts_waits(tmp_path):
    program = ForkedProgram(check_that_device_tells_host_apart, output=tmp_path / "said.txt")
    assert program.wait(120) == 0, program.output

"""docs/tutorials/trl.md, run: its class takes the steps of TRL's own loss. Skipped where TRL is not installed."""

import re
from pathlib import Path

import pytest
import torch

from tests.parity import peers
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

PAGE = (Path(__file__).resolve().parents[2] / "docs/tutorials/trl.md").read_text()
pytestmark = [
    pytest.mark.skipif("TRL" in peers.MISSING, reason="TRL is not installed; make parity installs and runs it"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _rng():
    """A trainer of TRL seeds the generator when it is built."""
    with torch.random.fork_rng():
        yield


def block(title: str) -> str:
    (found,) = re.findall(rf'```python title="{title}"\n(.*?)```', PAGE, flags=re.DOTALL)
    return found


@pytest.fixture
def page() -> dict:
    """What the first two blocks of the page define."""
    names: dict = {}
    for title in ("trl_trainer.py", "trl_reward.py"):
        exec(compile(block(title), title, "exec"), names)
    return names


def trained(kind, folder, **settings):
    """The weights of the tiny policy after some updates, and what was logged."""
    from datasets import Dataset
    from trl import GRPOConfig

    arguments = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
        **settings,
    }
    trainer = kind(
        make_tiny_policy(3),
        lambda completions, **_: [float(sum(character in "abcdefghij" for character in text)) for text in completions],
        args=GRPOConfig(output_dir=str(folder), **arguments),
        train_dataset=Dataset.from_list([{"prompt": f"{n}+1="} for n in range(8)]),
        processing_class=make_tiny_tokenizer(),
    )
    trainer.train()
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]), trainer.state.log_history


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2, "num_iterations": 2}],
    ids=["one update", "accumulated, used twice"],
)
def test_the_class_takes_the_steps_of_trls_own_loss(settings, page, tmp_path):
    from trl import GRPOTrainer

    before = torch.cat([weight.detach().flatten() for weight in make_tiny_policy(3).parameters()])
    theirs, their_log = trained(GRPOTrainer, tmp_path, loss_type="grpo", **settings)
    ours, our_log = trained(page["Trainer"], tmp_path, **settings)
    assert (theirs - before).norm() > 0.1
    assert (ours - theirs).norm() < 1e-4 * (theirs - before).norm()
    clipped = [row["clip_ratio/region_mean"] for row in their_log if "clip_ratio/region_mean" in row]
    assert [row["clip_fraction"] for row in our_log if "clip_fraction" in row] == pytest.approx(clipped, abs=1e-6)
    assert (max(clipped) > 0.05) == ("num_iterations" in settings)


def test_another_loss_takes_other_steps(page, tmp_path):
    """Or the comparison above would compare nothing."""
    from trl import GRPOTrainer

    theirs, _ = trained(GRPOTrainer, tmp_path, loss_type="dapo", num_iterations=2)
    ours, _ = trained(page["Trainer"], tmp_path, num_iterations=2)
    assert (ours - theirs).norm() > 1e-3 * theirs.norm()


def test_the_reward_and_the_run_of_the_page(page, tmp_path):
    assert page["right_answer"](["so </think> <answer> 4 </answer>", "4"], answer=["4", "4"]) == [1.0, 0.0]
    model = save_tiny(tmp_path / "model")
    text = block("train_with_trl.py")
    for shown, small in {
        '"Qwen/Qwen2.5-Math-1.5B"': repr(str(model)),
        '"runs/trl"': f'{str(tmp_path / "run")!r}, report_to="none", use_cpu=True, bf16=False, max_steps=1',
        "max_completion_length=64": "max_completion_length=8",
        "\\n": " ",
    }.items():
        assert shown in text
        text = text.replace(shown, small)
    exec(compile(text, "train_with_trl.py", "exec"), page)

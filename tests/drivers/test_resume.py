"""A run that is ended and gone on with is the run that was not."""

import json
import random

import pytest
import torch

from drivers.checkpoint import FACTS, TENSORS, find_checkpoint, read_facts
from drivers.errors import UsageError
from drivers.rollout import HFReplica
from drivers.run import Run
from drivers.run_log import RunLog
from drivers.train import keep_what_was_made, train
from drivers.weights import PolicyWeights
from tests.drivers.parts import letter_reward, tiny_config, tiny_parts
from tests.drivers.test_train import weights

COMMON = {"n_grpo_steps": 6, "learning_rate": 1e-2, "eval_steps": 2, "checkpoint_steps": 1}
KINDS = {
    "plain": {},
    "off-policy": {"train_batch_size": 16, "epochs_per_rollout_batch": 2, "loss_type": "grpo_clip"},
    "adaptive": {"entropy_target": 6.0, "entropy_coef": 0.01},
    "ahead": {"async_steps": 1, "importance": "truncate", "engine": "vllm"},
    "bfloat16": {"dtype": "bfloat16", "self_check_tolerance": 1.0},
    "refills": {"max_refills": 2, "kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
}


class Stop(Exception):
    """The run ends here."""


def go(folder, checkpoint=None, stop_at=None, **settings):
    """`stop_at`: how many times the engine answers before it ends the run."""
    config = tiny_config(**(COMMON | settings))
    parts, dtype = tiny_parts(), getattr(torch, config.dtype)
    policy = parts.policy.to(dtype)
    reference = tiny_parts().policy.to(dtype) if config.needs_reference else None
    engine = HFReplica(tiny_parts().policy.to(dtype), parts.tokenizer, PolicyWeights(policy, dtype))
    answer, answered = engine.generate, []

    def generate(*arguments, **named):
        answered.append(1)
        if stop_at is not None and len(answered) > stop_at:
            raise Stop
        return answer(*arguments, **named)

    engine.generate = generate
    folder.mkdir(exist_ok=True)
    from drivers.display import Display

    run = Run(config, folder, parts.tokenizer, Display(1, quiet=True), checkpoint)
    try:
        train(config, policy, engine, letter_reward, parts.questions, parts.questions, run, reference)
    except Stop:
        keep_what_was_made(run, policy)
    finally:
        run.finish()
    moments = {name: tensor.clone() for name, tensor in run.state.tensors().items()}
    return weights(policy), moments, len(answered)


def numbers(folder):
    """All that was logged, but for times and the writing of checkpoints, which each process does for itself."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time_", "rollout_tokens_per_s", "update_tokens_per_s")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows if row["phase"] != "save"]


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in found[1].items())


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_anywhere_and_gone_on_with_it_is_the_same_to_the_last_bit(tmp_path, kind):
    """Weights, both moments, every logged number, every logged completion."""
    settings = KINDS[kind]
    *whole, answers = go(tmp_path / "whole", **settings)
    chosen = random.Random(kind).sample(range(5, answers), 2)
    for stop_at in chosen:
        folder = tmp_path / f"stopped-{stop_at}"
        go(folder, stop_at=stop_at, **settings)
        checkpoint = find_checkpoint(folder)
        assert checkpoint is not None
        again = go(folder, checkpoint, **settings)
        assert_same(again, whole)
        assert numbers(folder) == numbers(tmp_path / "whole")
        assert (folder / "completions.jsonl").read_bytes() == (tmp_path / "whole/completions.jsonl").read_bytes()


def test_only_the_newest_checkpoint_holds_what_training_goes_on_from(tmp_path):
    go(tmp_path / "run")
    left = sorted(folder.name for folder in (tmp_path / "run").glob("checkpoint-*") if (folder / TENSORS).exists())
    assert left == ["checkpoint-6"]
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 6
    assert not list((tmp_path / "run").rglob(".unfinished-*"))
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-6"
    assert find_checkpoint(tmp_path / "run/checkpoint-5") is None
    assert find_checkpoint(tmp_path) is None


def test_a_stop_between_two_checkpoints_keeps_what_was_made(tmp_path):
    """The weights of the last step, resumable; and where the last checkpoint holds them all, no second one."""
    folder = tmp_path / "run"
    go(folder, stop_at=6, checkpoint_steps=2, eval_steps=100)
    stopped = find_checkpoint(folder)
    assert stopped is not None
    step = read_facts(stopped)["step"]
    assert (stopped.name, step) == ("checkpoint-3-stopped", 3)
    go(tmp_path / "other", stop_at=6, eval_steps=100)
    assert not list((tmp_path / "other").glob("*-stopped"))


def test_a_stop_inside_a_step_of_several_updates_cannot_be_gone_on_from(tmp_path, monkeypatch):
    """The weights are of a moment that no step begins at: they are kept, and marked by what they lack."""
    import drivers.train as program

    updates, original = [], program.accumulate_gradients

    def fail(*arguments, **named):
        updates.append(1)
        if len(updates) == 4:  # the second of the second step
            raise Stop
        return original(*arguments, **named)

    monkeypatch.setattr(program, "accumulate_gradients", fail)
    go(tmp_path / "run", train_batch_size=16, checkpoint_steps=100)
    (stopped,) = (tmp_path / "run").glob("*-stopped")
    assert json.loads((stopped / FACTS).read_text()) == {"step": 1}
    assert not (stopped / TENSORS).exists()
    assert find_checkpoint(tmp_path / "run") is None


def test_another_models_checkpoint_is_refused_with_the_reason(tmp_path):
    go(tmp_path / "run", n_grpo_steps=1)
    config, parts = tiny_config(**COMMON), tiny_parts()
    with torch.no_grad():
        parts.policy.model.layers = parts.policy.model.layers[:1]
    from drivers.display import Display

    run = Run(config, tmp_path / "run", parts.tokenizer, Display(1, quiet=True), find_checkpoint(tmp_path / "run"))
    with pytest.raises(UsageError, match="tensors do not fit this model's"):
        train(config, parts.policy, parts.engine, letter_reward, parts.questions, parts.questions, run)
    run.finish()


def test_the_log_is_cut_where_the_checkpoint_is(tmp_path):
    """Later rows are dropped, and a last line that a kill has torn."""
    lines = [{"phase": "train", "step": step} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"phase": "tr')
    (tmp_path / "completions.jsonl").write_text(text)
    RunLog(tmp_path, tiny_config(), after=2).close()
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2]

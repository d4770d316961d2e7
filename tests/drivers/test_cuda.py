"""On a CUDA GPU: the same numbers as on the CPU, and a loop that learns."""

import pytest
import torch
from torch.testing import assert_close

from drivers.engines.hf import HFEngine
from drivers.engines.placement import engine_memory_fraction
from drivers.policy.optimizer import training_state_bytes
from drivers.train import train
from drivers.training.advantages import prepare_rollouts
from drivers.training.components import Components
from drivers.training.forward import forward
from drivers.training.metrics import UpdateMetrics
from drivers.training.objective import weigh_step
from drivers.training.update import accumulate_gradients
from grpo_core import compute_entropy, compute_grpo_clip_loss, grpo_microbatch_loss, normalize_group_rewards
from tests.drivers.helpers.engines import make_vllm_engine
from tests.drivers.helpers.letters import (
    LONG_PROMPT,
    SHORT_PROMPT,
    clone_policy,
    letter_grader,
    make_batch,
    make_run,
    make_tiny_config,
    make_tiny_parts,
    sample_rollouts,
)
from tests.drivers.helpers.runs import ON_POLICY, TWO_EPOCHS, read_rows
from tests.tiny import save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_core_functions_on_cuda_equal_cpu():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 50, generator=generator)
    policy, old = -torch.rand(4, 6, generator=generator), -torch.rand(4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.7
    rewards = torch.tensor([1.0, 0.0, 0.1, 0.1])

    def everything(device):
        advantages = normalize_group_rewards(rewards.to(device), 2)[:, None]
        inputs = policy.to(device), old.to(device)
        loss, _ = grpo_microbatch_loss(
            inputs[0], mask.to(device), 2, "grpo_clip", advantages=advantages, old_log_probs=inputs[1], cliprange=0.2
        )
        return (
            compute_entropy(logits.to(device)),
            compute_grpo_clip_loss(advantages, *inputs, 0.2)[0],
            loss,
            advantages,
        )

    for on_gpu, on_cpu in zip(everything("cuda"), everything("cpu"), strict=True):
        assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [LONG_PROMPT, SHORT_PROMPT], ids=["group row", "padded rows"])
def test_forward_on_cuda_equals_cpu(prompt):
    policy = make_tiny_parts().policy
    rollouts = make_batch((prompt, [5, 6, 7]), (prompt, [8]))
    expected = forward(policy, rollouts, 1.0)["log_probs"]
    token_values = forward(clone_policy(policy).cuda(), rollouts.to(torch.device("cuda")), 1.0)["log_probs"]
    assert_close(token_values.cpu(), expected, rtol=0, atol=1e-4)


def test_accumulate_gradients_on_cuda_never_synchronizes():
    config, parts = (
        make_tiny_config(micro_batch_tokens=60, loss_type="grpo_clip", importance="truncate"),
        make_tiny_parts(),
    )
    policy = parts.policy.cuda()
    rollouts, scores = sample_rollouts(config, make_tiny_parts())
    batch, _ = weigh_step(config, prepare_rollouts(config, policy, None, rollouts, scores, None))
    forward(policy, batch.select([0]), 1.0)  # the trial of the head is not part of the loop
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulate_gradients(policy, batch, config, 0.0, UpdateMetrics())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", [ON_POLICY, TWO_EPOCHS], ids=["on-policy", "two-epochs"])
def test_train_on_cuda_learns(tmp_path, dtype, schedule):
    config, parts = make_tiny_config(self_check_tolerance=0.1, loss_type="grpo_clip", **schedule), make_tiny_parts()
    policy = parts.policy.to("cuda", dtype)
    run = make_run(config, tmp_path, parts.tokenizer)
    engine = HFEngine(policy, parts.tokenizer)
    try:
        train(config, Components(policy, engine, letter_grader, parts.questions, parts.questions), run)
    finally:
        run.finish()
    rows = read_rows(tmp_path)
    rewards = [row["reward"] for row in rows if row["phase"] == "train"]
    assert rewards[0] < 0.15
    assert sum(rewards[-3:]) / 3 > 0.9


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_train_with_vllm_on_shared_gpu_takes_turns(tmp_path, record_property):
    """vLLM sleeps while the policy trains and frees its memory. Weights arrive, and the run logs what it used."""
    config, parts = (
        make_tiny_config(engine="vllm", n_grpo_steps=4, eval_steps=4, self_check_tolerance=0.1),
        make_tiny_parts(),
    )
    policy, device = parts.policy.to("cuda", torch.bfloat16), torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    free_bytes = []

    def grade(responses, ground_truths):
        free_bytes.append(torch.cuda.mem_get_info()[0])
        return letter_grader(responses, ground_truths)

    engine = make_vllm_engine(
        policy,
        save_tiny(tmp_path / "tiny"),
        device=device,
        dtype=torch.bfloat16,
        gpu_memory_utilization=0.3,
        reserved_bytes=training_state_bytes(policy),
    )
    run = make_run(config, tmp_path / "run", parts.tokenizer)
    try:
        train(config, Components(policy, engine, grade, parts.questions, parts.questions), run)
        engine.sleep()
        asleep = torch.cuda.mem_get_info()[0]
    finally:
        run.finish()
        engine.close()
    rows = read_rows(tmp_path / "run")
    steps = [row for row in rows if row["phase"] == "train"]
    assert [row["n_weights"] for row in rows if row["phase"] == "check"] == [20, 20]
    assert {row["staleness"] for row in steps} == {0.0}
    assert (
        asleep - min(free_bytes) > 0.5 * min(0.3, engine_memory_fraction(training_state_bytes(policy), total)) * total
    )
    for name in ("time_push_s", "peak_memory_gib"):
        record_property(name, [row[name] for row in steps])
        print(name, *(f"{row[name]:.3f}" for row in steps))

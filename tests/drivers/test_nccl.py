"""The NCCL push between two real processes, over a stand-in for the wire."""

import pytest
import torch

from drivers.settings.sampling import Sampling
from tests.drivers.helpers.engines import PROMPTS, compute_log_probs, make_vllm_engine
from tests.tiny import make_tiny_policy, save_tiny


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations
@pytest.mark.usefixtures("forked_engine")
def test_nccl_push_in_chunks_arrives_and_survives_a_kill(tmp_path, monkeypatch):
    """Three pushes of fused and tied weights, in chunks; in the second, vLLM is killed and started again."""
    from drivers.engines import vllm, vllm_startup, vllm_transfer
    from tests.drivers.helpers import nccl_stand_in

    arguments, kill = vllm_startup._llm_arguments, tmp_path / "kill"
    extension = {"worker_extension_cls": f"{nccl_stand_in.__name__}.StandInExtension"}
    placement = vllm_startup.Placement(has_own_gpu=True, shares_gpu=False, has_own_process=True)
    monkeypatch.setattr(vllm, "place", lambda *_: placement)
    monkeypatch.setattr(vllm_startup, "_llm_arguments", lambda *options: arguments(*options) | extension)
    monkeypatch.setattr(vllm_transfer, "MIN_BUFFER_BYTES", 1)
    monkeypatch.setenv(nccl_stand_in.KILL, str(kill))
    nccl_stand_in.install(monkeypatch.setattr)

    policy, messages = make_tiny_policy(3), []
    engine = make_vllm_engine(
        policy, save_tiny(tmp_path / "tiny"), own_process=True, deadline_s=120.0, say=messages.append
    )
    try:
        for version, n_chunks in enumerate((8, 4 + 8, 8)):
            if version == 1:
                kill.write_text(str(8 + 4))  # the fourth chunk of the second push
            nccl_stand_in.sent_sizes.clear()
            engine.load_weights(version)
            assert len(nccl_stand_in.sent_sizes) == n_chunks
            completions = engine.generate(PROMPTS, Sampling(n=2, max_tokens=6, stop=()), seed=version)
            assert {c.weight_version for c in completions} == {version}
            for c in completions:
                assert c.log_probs == pytest.approx(compute_log_probs(policy, c), abs=1e-4)
            assert len(engine.received()[0]) == len(list(policy.parameters()))
            generator = torch.Generator().manual_seed(version)
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    finally:
        engine.close()
    assert len(messages) == 1
    assert "exited during the weight push: killed by SIGKILL" in messages[0]

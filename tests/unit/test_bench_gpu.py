"""`make bench-gpu`, rehearsed on the CPU at toy sizes."""

import json
from dataclasses import asdict

import pytest

from tests.benchmarks import gpu, gpu_sections

SIZES = json.loads(json.dumps(asdict(gpu.TOY)))


def test_head_and_step_are_measured_and_tabled(tmp_path, monkeypatch, capsys):
    """In this process. What is not installed is named, and what compiles for long is left to the whole rehearsal."""
    monkeypatch.setattr(gpu_sections, "HEAD_WAYS", ("ours_log_probs", "ours_grpo_loss", "trl_fused", "textbook"))

    def run_here(name, sizes, limit_s):
        return {"results": dict(gpu_sections.SECTIONS[name](SIZES)), "seconds": 1.0, "problem": None}

    monkeypatch.setattr(gpu, "run_section", run_here)
    gpu.main(["--toy", "--sections", "head", "step", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    head, step = found["head"]["results"], found["step"]["results"]
    assert 0 <= head["float32 ours_log_probs"]["error"] < 1e-4
    assert head["bfloat16 3 products"]["seconds"] > 0
    assert step["update"]["slots"] > 0
    assert step["update"]["share_of_matmul"] > 0
    report = (tmp_path / "gpu.md").read_text()
    assert report.strip() in capsys.readouterr().out
    assert "| `ours_grpo_loss` | bfloat16 |" in report
    assert "| share of the fastest product, attention not counted |" in report


def test_section_beyond_its_limit_is_cut_off():
    section = gpu.run_section("head", gpu.TOY, 0.2)
    assert section["problem"] == "cut off after 0.2 s"
    assert section["results"] == {}
    assert "Section head: cut off after 0.2 s." in gpu.make_report({"head": section}, gpu.TOY)


def test_limits_leave_room_in_nine_minutes():
    assert sum(gpu.LIMITS.values()) <= 9 * 60


def test_model_has_the_size_of_qwen2_5_math_1_5b():
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        policy = Qwen2ForCausalLM(Qwen2Config(**gpu.QWEN2_5_MATH_1_5B))
    assert sum(p.numel() for p in policy.parameters()) == 1_543_714_304


@pytest.mark.vllm
@pytest.mark.nightly
def test_whole_rehearsal_finds_something_in_each_section(tmp_path):
    gpu.main(["--toy", "--out", str(tmp_path)])
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {name: section["problem"] for name, section in sections.items()} == dict.fromkeys(gpu.LIMITS)
    assert sections["tests"]["results"]["tests"]["counts"] == {"skipped": 1}
    assert sections["vllm"]["results"].keys() == {
        *("start-up", "first push", "push", "sampling", "sleep", "wake and push")
    }
    assert sections["training"]["results"]["training"]["phases"]["time_update_s"] > 0

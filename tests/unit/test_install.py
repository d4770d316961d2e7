"""What `make install` checks before it installs, and what the lock files hold."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("version", "status"), [("550.54.15", 1), ("579.9", 1), ("580.65.06", 0), ("590.1", 0), ("unknown", 0)]
)
def test_check_driver_old_driver_is_refused_before_install(tmp_path, version, status):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho {version}\necho {version}\n")
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([".ci/check-driver"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert ("needs 580 or newer" in done.stderr) == bool(status)


def test_gpu_lock_has_no_two_owners_of_cuda_bindings():
    """cuda-python 12 holds files of cuda-bindings 13, and has no wheels for Python 3.13."""
    lock = (ROOT / ".ci/requirements-gpu.txt").read_text()
    (major,) = re.findall(r"^cuda-python==(\d+)", lock, flags=re.MULTILINE)
    assert int(major) >= 13

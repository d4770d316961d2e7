"""What `make install` checks before it installs, and what the lock files hold."""

import os
import re
import runpy
import subprocess
import zipfile
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


def test_check_lock_names_paths_that_two_wheels_own(tmp_path):
    """Equal files, and what each wheel says of itself, may lie in several."""
    find_owned_twice = runpy.run_path(str(ROOT / ".ci/check-lock"))["find_owned_twice"]
    contents = {
        "one.whl": {"pkg/a.so": "1", "pkg/__init__.py": "", "one.dist-info/RECORD": "x"},
        "two.whl": {"two.data/purelib/pkg/a.so": "2", "pkg/__init__.py": "", "pkg/b.so": "2"},
    }
    for name, files in contents.items():
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            for path, text in files.items():
                wheel.writestr(path, text)
    found = find_owned_twice([f"file://{tmp_path}/{name}" for name in contents])
    assert found == ["pkg/a.so is in one.whl and two.whl"]

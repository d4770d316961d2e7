"""Fuzz readers and graders with thousands of inputs: `python -m tests.nightly.fuzz`."""

import os
import re
import subprocess
import sys
import time

FILES = ("tests/property/test_fuzz.py", "tests/property/test_grading.py", "tests/unit/test_grading.py")


def main() -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "--hypothesis-show-statistics", *FILES],
        env=os.environ | {"HYPOTHESIS_PROFILE": "nightly"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stdout[-6000:])
    inputs = sum(map(int, re.findall(r"(\d+) passing, \d+ failing", done.stdout)))
    if inputs == 0:
        sys.exit("the statistics of Hypothesis have an unknown form")
    print(f"{inputs:,} inputs fuzzed, none beyond one clear line; {time.monotonic() - begin:.0f} s")
    subprocess.run([sys.executable, "-m", "tests.benchmarks", "grading"], check=True)


if __name__ == "__main__":
    main()

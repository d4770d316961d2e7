"""Train the real model by SFT, expert iteration and GRPO for half an hour: `python -m tests.nightly.methods`.

A paired test of the model before and after must show that each method answers more held-out questions.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, *arguments: str) -> None:
    subprocess.run([sys.executable, f"{ROOT}/drivers/{program}.py", *arguments], cwd=ROOT, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        sweep, asked = Path(name) / "sweep", ["--sampling-max-tokens", "32", "--n-examples", "128"]
        run("sweep", "methods", "--wandb-project", "None", "--save-dir", str(sweep))
        run("evaluate", *asked, "--output-dir", f"{name}/before")
        results = []
        for model in sorted(sweep.glob("*/final_model")):
            after = f"{name}/{model.parent.name}"
            compared = ["--compare-to", f"{name}/before", "--output-dir", after]
            run("evaluate", *asked, "--model-path", str(model), *compared)
            found = json.loads(Path(after, "results.json").read_text())["comparison"]["validation"]
            results.append(f"{model.parent.name}: {found['difference']:+.3f}, p = {found['p_value']:.1g}")
            if not (found["difference"] > 0 and found["p_value"] < 0.01):
                sys.exit(f"{results[-1]}: nothing was learned")
        if len(results) != 3:
            sys.exit(f"three runs are required, found {results}")
    print("; ".join(results))


if __name__ == "__main__":
    main()

"""The page of a report in a real browser: its script draws, filters and colors, on wide and narrow screens."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from drivers.reports.page import write_report
from tests.drivers.helpers.reports import HOSTILE_TEXT, make_step_rows, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --hide-scrollbars"
)


def open_in_browser(tmp_path, page, width, script=""):
    """Return the page after all its scripts and `script` have run, and what the browser printed."""
    text = page.read_text()
    opened = tmp_path / f"opened-{width}.html"
    # The page's security policy would refuse the test's own scripts.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    probe = (
        "<script>window.addEventListener('error', (e) => document.title = `broken: ${e.message}`);</script>",
        f"<script>{script}</script>",
    )
    opened.write_text(text.replace("<head>", f"<head>{probe[0]}").replace("</body>", f"{probe[1]}</body>"))
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path}/profile-{width}", f"--window-size={width},900"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=4000", "--dump-dom", opened.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "<title>broken" not in done.stdout, re.search("<title>.*?</title>", done.stdout)
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Write the page of two runs of one experiment and one of another, with anomalies and hostile responses."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {"phase": "eval", "step": 0, "accuracy": 0.1, "n_examples": 100, "time_evaluate_s": 1.0},
        *make_step_rows([0.1, 0.5, 0.9], grad_norm=1.0, time_rollout_s=3.0, rollout_entropy=1.0, part_brief=0.25),
        {"phase": "eval", "step": 3, "accuracy": 0.8, "n_examples": 100},
        {"phase": "anomaly", "step": 2, "kind": "x", "value": 1.0, "limit": 0.5, "text": HOSTILE_TEXT},
    ]
    response = {"phase": "train", "question": "q", "answer": "4", "response": f"abc {HOSTILE_TEXT}", "reward": 1.0}
    response |= {"tokens": ["abc", " ", HOSTILE_TEXT], "log_probs": [-0.1, -2.0, -5.0], "advantage": 0.5}
    responses = [{**response, "step": step, "reward": step % 2} for step in range(1, 4) for _ in range(5)]
    runs = [write_run(folder / f"run-{seed}", rows, responses, seed=seed, rate=1e-5) for seed in (0, 1)]
    runs.append(write_run(folder / "other", rows, responses, seed=0, rate=3e-5))
    return write_report(runs, folder / "report", "A title")


@pytest.mark.parametrize("width", [1280, 360])
def test_page_in_browser_draws_curves_and_responses(page, tmp_path, width):
    check = """
      const seen = {
        plots: document.querySelectorAll('.plot svg').length,
        lines: document.querySelectorAll('.plot svg path.line').length,
        bands: document.querySelectorAll('.plot svg path.band').length,
        marks: document.querySelectorAll('.plot svg path.mark').length,
        rows: document.querySelectorAll('tr.response').length,
        alerts: document.querySelectorAll('img').length,
        wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      };
      document.querySelector('tr.response').click();
      const tokens = [...document.querySelectorAll('.tokens span')];
      seen.tokens = tokens.map((token) => token.textContent);
      seen.colored = tokens.filter((token) => token.style.backgroundColor).length;
      document.querySelector('#legend button').click();
      seen.fewer = document.querySelectorAll('.plot svg path.line').length;
      const radio = document.querySelector('input[value=time]');
      radio.checked = true;
      radio.dispatchEvent(new Event('change'));
      seen.axis = [...document.querySelectorAll('.plot svg text')].map((text) => text.textContent).join(' ');
      const found = document.createElement('pre');
      found.id = 'found';
      found.textContent = JSON.stringify(seen);
      document.body.append(found);
    """
    shown = open_in_browser(tmp_path, page, width, check)
    seen = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', shown, re.DOTALL).group(1)))
    titles = re.findall(r"<figcaption><strong>(.*?)</strong>", shown)
    assert titles == [
        "Reward",
        "Parts of the reward",
        "Held-out accuracy",
        "Entropy",
        "Gradient norm",
        "Time by phase",
    ]
    assert seen["plots"] == len(titles)
    assert seen["bands"] == 5  # two seeds are one line with a band
    assert seen["marks"] == 3 * (len(titles) - 1)  # one per run in each panel
    assert seen["rows"] == 10  # per page
    assert seen["alerts"] == 0
    assert seen["wide"] <= 0  # nothing overflows a narrow screen
    assert seen["tokens"] == ["abc", " ", HOSTILE_TEXT]
    assert seen["colored"] == 3
    assert seen["fewer"] < seen["lines"]
    assert "seconds" in seen["axis"]
    assert "step" not in seen["axis"]


def test_page_in_browser_policy_allows_script(page, tmp_path):
    """The unchanged page names its script by checksum in its security policy."""
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path}/own", "--virtual-time-budget=4000"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    drawn, _, _ = done.stdout.partition('id="data"')
    assert drawn.count("<svg") >= 6
    assert drawn.count('<tr class="response"') == 10

"""What comes from outside, in any state: data files, settings, checkpoints, logs. One clear line, or it works.

What was found this way stands beside each property as an example.
"""
# ruff: noqa: PT017  each input may be refused or not

import json
import shutil
from dataclasses import fields
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from drivers.common.display import Display
from drivers.common.errors import UsageError
from drivers.convert_dataset import convert_demonstration, convert_row
from drivers.runs.checkpoint import MANIFEST, STATE_TENSORS, STATE_VALUES, find_damage, write_manifest
from drivers.runs.folder import find_checkpoint
from drivers.runs.log import JsonlWriter, RunLog
from drivers.settings.command_line import parse_train_config
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.grpo import GrpoConfig
from drivers.settings.of_run import take_settings
from drivers.tasks.layouts import KEYS
from drivers.tasks.questions import load_examples, read_example
from drivers.tasks.reference_answers import BadRowError
from drivers.training.run import Run
from drivers.training.state import TrainingState
from tests.drivers.helpers.letters import make_tiny_config, make_tiny_parts

# Files of one test are overwritten by the next example.
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
LINES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"question": JSON, "answer": JSON}).map(lambda row: json.dumps(row).encode()),
    st.tuples(st.text(min_size=1), st.text(min_size=1)).map(
        lambda pair: json.dumps({"question": pair[0], "answer": pair[1]}).encode()
    ),
)


@given(st.lists(LINES, max_size=4).map(b"\n".join))
@example(b'{"question": ' + b"[" * 100_000)
@example(b'{"question": "\\ud800", "answer": "a"}')
@example(b'{"question": "q", "answer": ' + b"9" * 5000 + b"}")
@example(b'{"question": "q", "answer": NaN}')
@example("\ufeff{}".encode())
@shared_folder
def test_a_data_file_is_read_or_refused_in_one_line(tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    try:
        examples = load_examples("--data-path", str(tmp_path / "data.jsonl"))
    except UsageError as error:
        assert "data.jsonl" in str(error)
        assert "\n" not in str(error)
        return
    lines = JsonlWriter(tmp_path / "log.jsonl")  # what is read can be logged
    for one in examples:
        assert lines.add({"question": one.question, "answer": one.answer}) is None
    lines.close()
    assert len(examples) <= content.count(b"\n") + 1


KEYED = st.sampled_from(sorted({*chain(*KEYS.values()), "unit", "error", "is_multiple_answer", "other"}))
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.text(max_size=5) | JSON}
    ),
    max_size=3,
)
ANSWERS = st.sampled_from(
    ["1", "B", r"\boxed{2}", r"\\frac", "#### 3", '["1"]', "proof", 1, ["A"], {"text": ["1"], "label": ["A"]}]
)


@given(st.dictionaries(KEYED, JSON | TURNS | ANSWERS, max_size=6), st.sampled_from([None, "r1_zero", "question_only"]))
@example({"choices": {"label": ["A"], "text": ["1", "2"]}, "question": "q", "answer": "A"}, None)
@example({"question": "q", "answer": {"ground_truth": {"value": None}}}, None)
@example({"prompt": [{"from": None}], "answer": "1"}, None)
def test_a_row_is_converted_or_refused_in_one_line(row, form):
    try:
        converted = convert_row(row).row if form is None else convert_demonstration(row, form).row
        written = json.dumps(converted)
    except BadRowError as error:
        assert str(error).startswith(error.reason)
        return
    try:
        read_example(Path("f.jsonl"), 1, json.loads(written))
    except UsageError as error:
        assert "surrogate" in str(error)


FIELDS = {field.name: field for field in fields(GrpoConfig)}
OTHER = st.dictionaries(st.sampled_from(sorted(FIELDS)), JSON, max_size=4)
NUMBERS = st.integers(-2, 300) | st.floats() | st.sampled_from([0.5, 1.0, 1e-9, 1e300])
PLAUSIBLE = st.dictionaries(
    st.sampled_from([name for name, field in FIELDS.items() if isinstance(field.default, int | float)]), NUMBERS
)


@given(PLAUSIBLE)
def test_settings_are_whole_or_refused_in_one_line(changes):
    try:
        config = GrpoConfig(model_path="m", **changes)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert config.rollout_batch_size % config.group_size == 0
    assert config.learning_rate > 0


@given(OTHER | JSON)
@example({"rollout_url": [5]})
@example({"group_size": "8"})
@example({"sapo_temperatures": None})
@example({"advantage": None})
@example({"save_dir": 3, "no_such_setting": 1})
@shared_folder
def test_the_settings_of_an_earlier_run_are_read_or_refused(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps({"config": changes}))
    (tmp_path / "metrics.jsonl").touch()
    try:
        config = parse_train_config(["--resume", str(tmp_path)])
    except UsageError as error:
        assert "config.json" in str(error) or "--" in str(error)
        return
    except SystemExit as ended:  # of the command line's own parser, which has told why
        assert ended.code == 2
        return
    assert config.resume == str(tmp_path)


@given(OTHER | JSON, JSON)
@example({"val_data_path": 5}, {})
@example({"reward_mix": ["a"]}, {"folder": 3})
@example({"prompt_path": "a\x00b", "reward": "\x00.py:f"}, {"folder": "\x00"})
@shared_folder
def test_the_settings_of_an_evaluated_run_are_read_or_refused(tmp_path, changes, environment):
    written = {"config": changes, "environment": environment}
    (tmp_path / "config.json").write_text(json.dumps(written))
    try:
        settings = take_settings("--model-path m", tmp_path)
    except UsageError as error:
        assert str(error).startswith("--model-path m: the settings of its run cannot be read")
        assert "\n" not in str(error)
        return
    EvaluateConfig(**settings)


@pytest.fixture(scope="module")
def run_of_one_step(tmp_path_factory):
    from tests.drivers.helpers.runs import run_grpo

    folder = tmp_path_factory.mktemp("run")
    run_grpo(folder, n_grpo_steps=1, async_steps=0)
    return folder


@pytest.mark.medium
@given(st.data())
@shared_folder
def test_a_checkpoint_that_was_touched_is_refused(run_of_one_step, tmp_path, data):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_of_one_step / "checkpoint-1", copy)
    names = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    file = copy / data.draw(st.sampled_from(names))
    before = file.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    changed = before[:place] + data.draw(st.binary(max_size=9)) + before[place + data.draw(st.integers(0, 9)) :]
    file.write_bytes(changed)
    reason = find_damage(copy)
    if changed == before:
        assert reason is None
    elif file.name != MANIFEST:
        assert reason is not None
        assert "\n" not in reason


def begin(folder, checkpoint):
    """Return the state of a run that is resumed from the checkpoint; another model's weights raise at once."""
    config, parts = make_tiny_config(n_grpo_steps=3), make_tiny_parts()
    run = Run(config, folder, parts.tokenizer, Display(1, quiet=True), checkpoint)
    try:
        state = TrainingState(config, parts.policy)
        run.begin(state)
    finally:
        if run._log is not None:
            run._log.close()
    return state


@pytest.mark.slow
@given(st.data())
@shared_folder
def test_state_values_of_any_kind_resume_or_are_refused(run_of_one_step, tmp_path, data):
    """Whole by its sums, and yet no state of a run: what another program may have written."""
    copy = tmp_path / "checkpoint-1"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_of_one_step / "checkpoint-1", copy)
    values = json.loads((copy / STATE_VALUES).read_text())
    name = data.draw(st.sampled_from(sorted(values)))
    if data.draw(st.booleans()):
        values[name] = data.draw(JSON)
    else:
        values.pop(name)
    (copy / STATE_VALUES).write_text(json.dumps(values))
    write_manifest(copy)
    said = []
    checkpoint = find_checkpoint(tmp_path, said.append)
    if checkpoint is None:
        assert said
        return
    try:
        state = begin(tmp_path, checkpoint)
    except UsageError as error:
        assert "--resume" in str(error)
        assert "\n" not in str(error)
        return
    assert isinstance(state.step, int)


@pytest.mark.slow
@given(st.data())
@shared_folder
def test_state_tensors_of_any_kind_resume_or_are_refused(run_of_one_step, tmp_path, data):
    copy = tmp_path / "checkpoint-1"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run_of_one_step / "checkpoint-1", copy)
    (file,) = (copy / STATE_TENSORS).iterdir()
    before = file.read_bytes()
    place = data.draw(st.integers(0, 3000) | st.integers(0, len(before) - 1))
    file.write_bytes(
        before[:place] + data.draw(st.binary(max_size=4)) + before[place + data.draw(st.integers(0, 4)) :]
    )
    write_manifest(copy)
    try:
        begin(tmp_path, copy)
    except UsageError as error:
        assert "--resume" in str(error)
        assert "\n" not in str(error)


@given(
    st.lists(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()), max_size=5), st.booleans()
)
@example([b'{"step": 1}', b"\xff\xfe", b'{"step": 2}'], True)
@example([b'{"step": null}', b"[1]", b"3", b""], True)
@shared_folder
def test_run_log_in_any_state_is_continued(tmp_path, lines, ends):
    """What is no line of it is dropped, and told; whole lines of earlier steps stay."""
    good = [b'{"phase": "train", "step": 1}', b'{"phase": "train", "step": 7}']
    text = b"\n".join([good[0], *lines, good[1]]) + (b"\n" if ends else b"")
    (tmp_path / "metrics.jsonl").write_bytes(text)
    log = RunLog(tmp_path, make_tiny_config(wandb_project=None), after=3)
    log.log("train", 4, {"reward": 1.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"phase": "train", "step": 1}
    assert rows[-1] == {"phase": "train", "step": 4, "reward": 1.0}
    assert all(isinstance(row, dict) and row["step"] <= 4 for row in rows)


@given(st.dictionaries(st.text(max_size=5), SCALARS, max_size=4))
@example({"a": "\ud800"})
@example({"a": float("inf")})
@shared_folder
def test_any_row_is_one_line_of_json(tmp_path, row):
    file = tmp_path / "rows.jsonl"
    file.unlink(missing_ok=True)
    lines = JsonlWriter(file)
    assert lines.add(row) is None
    lines.close()
    text = file.read_bytes()
    assert text.count(b"\n") == 1
    found = json.loads(text)
    assert found.keys() == {json.loads(json.dumps(key)) for key in row}


@pytest.mark.medium
def test_there_is_a_state_to_fuzz(run_of_one_step):
    assert find_damage(run_of_one_step / "checkpoint-1") is None
    state = begin(run_of_one_step, Path(run_of_one_step / "checkpoint-1"))
    assert state.step == 1
    assert all(tensor.isfinite().all() for tensor in state.tensors().values())
    assert torch.is_tensor(next(iter(state.tensors().values())))

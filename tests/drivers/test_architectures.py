"""Shared rows and the head apart, in many architectures: allowed only if log-probs are those of plain passes."""

import pytest
import torch

from drivers.training import shortcuts
from drivers.training.batch import make_rollout_batch
from drivers.training.forward import forward
from drivers.training.memory import plan_memory
from drivers.training.setup import describe_setup
from drivers.training.shortcuts import ARCHITECTURES_THAT_SHARE, describe_shortcuts, find_head, shares_rows
from tests.drivers.helpers.architectures import ARCHITECTURES, make_architecture, make_config
from tests.drivers.helpers.letters import make_completion, make_tiny_config

PROMPT_LENGTH = 80  # five times the windows and chunks of the table
N_VALUES = (5, 9, 3, 30)
DTYPES = [torch.float32, torch.bfloat16]
KINDS = [(torch.float32, "sdpa"), (torch.float32, "eager"), (torch.bfloat16, "sdpa")]
MIXED = [
    "Llama",
    "Qwen2",
    "Qwen3Moe",
    "GPTNeo",
    "Llama4Text",
    "Mpt",
    "FalconH1",
    "RecurrentGemma",
    "Granite",
    "Gemma2",
]
"""Ten that differ in what they do: some share, some split off the head, some neither."""


def draw_completions():
    """Return four responses of different lengths to one long prompt."""
    generator = torch.Generator().manual_seed(1)
    prompt, *responses = (torch.randint(3, 90, (n,), generator=generator).tolist() for n in (PROMPT_LENGTH, *N_VALUES))
    return [make_completion(prompt, tokens) for tokens in responses]


@torch.no_grad()
def forward_alone(model, completions):
    """Return the log-probs of each response from the model's own logits, in float64, and the largest logit."""
    rows, largest = [], 0.0
    for item in completions:
        ids = torch.tensor([item.prompt_token_ids + item.token_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
        largest = max(largest, logits.abs().max().item())
        chosen = logits.log_softmax(-1)[PROMPT_LENGTH - 1 : -1]
        rows.append(chosen.gather(1, torch.tensor(item.token_ids)[:, None])[:, 0])
    return torch.cat(rows), largest


@torch.no_grad()
def measure_error(model, completions, expected):
    """Return the differences between `forward` and `expected`."""
    log_probs = forward(model, make_rollout_batch(completions, torch.zeros(4), 4), 1.0)["log_probs"].double()
    found = torch.cat([log_probs[row, : len(item.token_ids)] for row, item in enumerate(completions)])
    return (found - expected).abs()


def is_exact_if_forced(name, *, sharing, head):
    """Return whether the log-probs in float32 are right with a shortcut that nothing has checked."""
    model, completions = make_architecture(name, sharper=4.0), draw_completions()
    expected, _ = forward_alone(model, completions)
    shortcuts._SHARING[model], shortcuts._HEADS[model] = sharing, None
    try:
        if head:
            shortcuts._HEADS[model] = shortcuts._split(model)
        return bool(measure_error(model, completions, expected).max() < 1e-3)
    except (NotImplementedError, AttributeError, ValueError):  # no such part, or no such mask
        return False


def examine(name):
    """Check an architecture in both types and with both kinds of attention, and return its row of the table."""
    may_share = is_exact_if_forced(name, sharing=True, head=False)
    may_split = is_exact_if_forced(name, sharing=False, head=True)
    found = []
    for dtype, attention in KINDS:
        model, completions = make_architecture(name, dtype, sharper=4.0), draw_completions()
        if attention == "eager":
            model.set_attn_implementation(attention)
        shares, splits = shares_rows(model), find_head(model) is not None
        assert shares == (model.config.model_type in ARCHITECTURES_THAT_SHARE)
        assert may_share >= shares, "responses that share a row see what they must not see"
        assert splits == may_split or (dtype == torch.bfloat16 and may_split)  # Mamba's body returns float32
        found.append((shares, splits))
        notes = "\n".join(describe_shortcuts(model))
        assert ("a row to itself" in notes) is not shares
        assert ("all logits are computed" in notes) is not splits
        expected, largest = forward_alone(model, completions)
        error = measure_error(model, completions, expected)
        assert error.mean() <= 2 * torch.finfo(dtype).eps * largest
        assert largest > 5.0
    shared, split = (
        "no" if not any(answers) else "yes" if all(answers) else "in float32" for answers in zip(*found, strict=True)
    )
    return name, shared, "yes" if may_share else "no", split, "yes" if may_split else "no"


@pytest.mark.medium
@pytest.mark.parametrize("name", MIXED)
def test_shortcuts_of_an_architecture_keep_its_log_probs(name):
    examine(name)


def test_architectures_that_share_are_in_the_table():
    known = {make_config(name).model_type for name in ARCHITECTURES}
    assert known >= ARCHITECTURES_THAT_SHARE


@pytest.mark.nightly
def test_shortcuts_of_all_architectures_keep_their_log_probs(capsys):
    """Print the table of docs/performance.md."""
    rows = [examine(name) for name in ARCHITECTURES]
    assert len(rows) >= 40
    with capsys.disabled():
        print("\n| architecture | shares rows | would be right | head apart | would be right |\n|---|---|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Mistral", {"sliding_window": 4096}, "limited by the sliding_window of 4096"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 300, "max_window_layers": 1},
            "sliding_window of 300",
        ),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "length of a row"),
        ("GPTNeo", {}, "gpt_neo is not among"),
    ],
)
def test_sharing_obstacle_names_what_a_short_trial_cannot_see(name, changes, reason):
    """A window of 4096 tokens acts in no short row."""
    model = make_architecture(name, **changes)
    assert not shares_rows(model)
    (note,) = describe_shortcuts(model)
    assert reason in note


def test_run_prints_which_shortcut_its_model_does_not_take():
    config, device = make_tiny_config(), torch.device("cpu")
    for name, n_notes in (("Llama", 0), ("Granite", 1), ("Llama4Text", 2)):
        model = make_architecture(name)
        plan = plan_memory(config, model, 16)
        lines = describe_setup(config, model, torch.float32, (device, device), plan)
        assert sum(line.startswith("note: ") for line in lines) == n_notes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1.001, 1.02])
def test_find_head_sees_a_small_scale_in_any_type(dtype, scale):
    """Both before and after the output layer; a soft cap under another name is a member of the table."""
    model = make_architecture("Granite", dtype, logits_scaling=scale)
    assert (find_head(model) is not None) is (scale == 1.0)
    llama = make_architecture("Llama", dtype)
    llama.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * scale,))
    assert (find_head(llama) is not None) is (scale == 1.0 or (dtype == torch.bfloat16 and scale == 1.001))

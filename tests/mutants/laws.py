"""The public laws: grpo_core/testing.py."""

from tests.mutants.table import breaks

LAWS = "tests/unit/test_laws.py"

MUTANTS = [
    *breaks(
        "check_objective",
        "testing.py",
        LAWS,
        ("no response is empty", "LENGTHS = (5, 3, 1, 0)", "LENGTHS = (5, 3, 1, 1)"),
        ("losses may be integers", " or not losses.is_floating_point():", ":"),
        ("any gradient will do", "if policy is None or not (policy != 0).any():", "if policy is None:"),
        ("gradients are free", "    if reached:\n", "    if False:\n"),
        ("one micro-batch", "for rows in ([0], [1, 2], [3, 0]):", "for rows in ([0, 1, 2, 3],):"),
        ("no padding", "torch.nn.functional.pad(value, (0, 2))", "torch.nn.functional.pad(value, (0, 0))"),
        ("the rest is read", "        if not same:\n", "        if False:\n"),
        ("small steps", "for gap in (1e4, -1e4):", "for gap in (1e1, -1e1):"),
        (
            "advantages are never 0",
            'silent = {name: torch.zeros_like(batch[name]) for name in _SIGNALS}',
            'silent = {name: batch[name] for name in _SIGNALS}',
        ),
        (
            "on-policy is off-policy",
            '{**batch, "policy_log_probs": batch["old_log_probs"]})',
            '{**batch, "policy_log_probs": batch["policy_log_probs"]})',
        ),
        ("the sum of a response alone", "[whole] if outcome.losses.shape == mask.shape else", "[whole] if True else"),
        ("settings are not passed", "offered = {**batch, **self.settings}", "offered = {**batch}"),
        ("the kind is forgotten", "losses.shape[1] == 1 else", "losses.shape[1] == 0 else"),
    ),
    *breaks(
        "check_advantage",
        "testing.py",
        LAWS,
        ("any shape", "or tuple(advantages.shape) != wanted:", "or False:"),
        ("every response is scored", "    rewards[1] = torch.nan\n", "    rewards[1] = 0.0\n"),
        ("neighbors may be NaN", 'return "gives other responses NaN', 'return None and "gives other responses NaN'),
        ("one order", "groups, advantages = torch.tensor([3, 1, 0, 4, 2])", "groups, advantages = torch.arange(5)"),
        ("no group is equal", "if (advantages[8:12] != 0).any() or (advantages[16:] != 0).any():", "if False:"),
        ("gradients are free", 'the advantages" if advantages.requires_grad', 'the advantages" if False'),
    ),
]  # fmt: skip

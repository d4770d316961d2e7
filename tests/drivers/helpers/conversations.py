"""Functions for `--rollout`, and what they need."""

import asyncio
from types import SimpleNamespace

from drivers.engines.conversations import Rollout

INSERTED = (20, 21)
"""Tokens that the functions insert."""


async def interrupt(sample, question):
    """Sample two tokens, insert two, and sample the rest."""
    first = await sample(question.prompt_token_ids, max_tokens=2)
    token_ids = [*first.token_ids, *INSERTED]
    second = await sample([*question.prompt_token_ids, *token_ids])
    sampled = [True] * len(first.token_ids) + [False] * len(INSERTED) + [True] * len(second.token_ids)
    return [*token_ids, *second.token_ids], sampled


async def hesitate(sample, question):
    """Do the same after a pause."""
    await asyncio.sleep(0.2)
    return await interrupt(sample, question)


def make_rollout(play, tokenizer=None, deadline_s=60.0):
    """Return the function as `--rollout` has it."""
    return Rollout("file.py:play", play, tokenizer or SimpleNamespace(decode=lambda ids, **_: "x"), deadline_s)

"""A response with a calculator: after each `=` that the policy writes, the result is inserted."""

import operator
import re

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
EXPRESSION = re.compile(r"(\d+) *([-+*]) *(\d+) *=$")


async def play(sample, question):
    """Return the token ids of a response to `question`, and which of them the policy sampled."""
    token_ids, sampled = [], []
    while True:
        turn = await sample([*question.prompt_token_ids, *token_ids], stop=["="])
        token_ids += turn.token_ids
        sampled += [True] * len(turn.token_ids)
        if turn.stop != "=":  # the response is over
            return token_ids, sampled
        expression = EXPRESSION.search(turn.text)
        if expression:
            left, operation, right = expression.groups()
            result = OPERATIONS[operation](int(left), int(right))
            inserted = sample.tokenizer.encode(f" {result}", add_special_tokens=False)
            token_ids += inserted
            sampled += [False] * len(inserted)

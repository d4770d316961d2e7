"""From text to tokens and rewards: scoring/tokenization.py and grading/."""

from tests.mutants.table import breaks

TOKENIZATION = "tests/unit/test_worked_examples.py tests/property/test_tokenization.py -k tokenization"
GRADING, REWARDS = "tests/unit/test_grading.py", "tests/unit/test_rewards.py"

MUTANTS = [
    *breaks(
        "tokenize_prompt_and_output",
        "scoring/tokenization.py",
        TOKENIZATION,
        ("labels not shifted", "token_ids[:, 1:].clone()", "token_ids[:, :-1].clone()"),
        ("mask not shifted", "is_output[:, 1:].clone()", "is_output[:, :-1].clone()"),
        ("mask by the padding token", "is_output[:, 1:].clone()", "(is_output & (token_ids != pad_id))[:, 1:]"),
        ("the prompt is a response too", "is_output[row, len(prompt) : end] = True", "is_output[row, :end] = True"),
        (
            "padding is a response too",
            "is_output[row, len(prompt) : end] = True",
            "is_output[row, len(prompt) :] = True",
        ),
        (
            "special tokens between prompt and output",
            "tokenizer.encode(output, add_special_tokens=False)",
            "tokenizer.encode(output)",
        ),
        (
            "inputs and labels share memory",
            'token_ids[:, :-1].clone(),\n        "labels": token_ids[:, 1:].clone()',
            'token_ids[:, :-1],\n        "labels": token_ids[:, 1:]',
        ),
        ("padding on the left", "token_ids[row, :end] =", "token_ids[row, longest - end :] ="),
    ),
    *breaks(
        "extract_boxed_answer",
        "grading/answers.py",
        f"{GRADING} -k boxed",
        ("the first box", "boxed_answers(text[start:])", "boxed_answers(text)"),
        (
            "if the last is not closed, the one before",
            "boxes = boxed_answers(text[start:])\n    return boxes[0]",
            "boxes = boxed_answers(text)\n    return boxes[-1]",
        ),
        ("up to the first closing brace", "closing_brace(text, found.end() - 1)", 'text.find("}", found.end())'),
        ("up to the last closing brace", "closing_brace(text, found.end() - 1)", 'text.rfind("}")'),
        ("no space before the brace", r"(?![A-Za-z])[^\S\n]*(?:\{|", r"(?![A-Za-z])(?:\{|"),
        ("outer space stays", "text[found.end() : end].strip()", "text[found.end() : end]"),
        ("without a box the whole text", "return boxes[0] if boxes else None", "return boxes[0] if boxes else text"),
    ),
    *breaks(
        "normalize_answer",
        "grading/answers.py",
        f"{GRADING} -k normal_form",
        (
            "the unit stays",
            "split_unit(tighten(without_thousands(clean(answer))))[0]",
            "tighten(without_thousands(clean(answer)))",
        ),
        ("thousands separators stay", "tighten(without_thousands(clean(answer)))", "tighten(clean(answer))"),
        ("wrappers stay", "tighten(without_thousands(clean(answer)))", "tighten(without_thousands(answer.strip()))"),
        ("space stays", "tighten(without_thousands(clean(answer)))", "without_thousands(clean(answer))"),
        ("variables in lower case", "return text.casefold() if is_prose(text) else text", "return text.casefold()"),
        ("words as they are", "return text.casefold() if is_prose(text) else text", "return text"),
    ),
    *breaks(
        "answers_match",
        "grading/answers.py",
        f"{GRADING} -k 'equal or different'",
        ("the same text alone", "        return bool(first)\n", "        return bool(first)\n    return False\n"),
        ("nothing matches nothing", "        return bool(first)\n", "        return True\n"),
        (
            "nearly the same number",
            "        return numbers[0] == numbers[1]\n    if max",
            "        return math.isclose(float(first), float(second), rel_tol=1e-3)\n    if max",
        ),
        (
            "one reading alone",
            "for a in _readings(first) for b in _readings(second)",
            "for a in _readings(first)[:1] for b in _readings(second)[:1]",
        ),
    ),
    *breaks(
        "answers_match",
        "grading/comparison.py",
        f"{GRADING} -k 'equal or different'",
        ("lists in order", 'if kinds == {"union"} else self.in_order', "if False else self.in_order"),
        (
            "tuples out of order",
            'self.pairs_off(first, second) if kinds == {"union"} else self.in_order(first.parts, second.parts)',
            "self.pairs_off(first, second)",
        ),
        ("any brackets", "if len(kinds) > 1 or len(first.parts)", "if len(first.parts)"),
        ("units may differ", "(first.unit and second.unit and first.unit != second.unit)", "False"),
        ("part of a set", "self.covers(first, second) and self.covers(second, first)", "self.covers(first, second)"),
        ("words with their case", "first.text.casefold() == second.text.casefold()", "first.text == second.text"),
    ),
    *breaks(
        "question_only_reward_fn",
        "grading/answers.py",
        f"{GRADING} {REWARDS}",
        ("a letter is never a unit", "given, unit = split_letter(given)", "pass"),
        ("any unit will do", "if unit and wanted and unit != wanted:", "if False:"),
        (
            "what is left undone is not done",
            "return _symbolic.comes_to(given, value, _symbolic.Budget())",
            "return False",
        ),
        ("a box needs braces", "if found[1]:", "if False:"),
    ),
    *breaks(
        "r1_zero_reward_fn",
        "grading/rewards.py",
        f"{REWARDS} -k r1_zero",
        ("an answer that is never closed", "if not (tag and end):", "if not tag:"),
        ("several answers in boxes, the first counts", " or len(set(boxes)) > 1:", ":"),
        ("a second answer after the first", '"<answer>" in answer or "<answer>" in after', '"<answer>" in answer'),
        ("an answer within the answer", '"<answer>" in answer or "<answer>" in after', '"<answer>" in after'),
        (
            "a right answer without the format",
            "return _rewards(formatted=False, right=False)\n    boxes",
            "return _rewards(formatted=False, right=_any_match(response, references))\n    boxes",
        ),
        ("the box is not opened", "boxes[0] if boxes else answer", "answer"),
        (
            "all alternatives",
            "any(is_right(answer.strip(), reference)",
            "all(is_right(answer.strip(), reference)",
        ),
        ("a reward for the format", '{"reward": float(right)', '{"reward": float(formatted)'),
    ),
    *breaks(
        "question_only_reward_fn",
        "grading/rewards.py",
        f"{REWARDS} -k 'question or reference'",
        ("any box", "answer = extract_boxed_answer(response)", "answer = next(iter(boxed_answers(response)), None)"),
        (
            "the last closed box",
            "answer = extract_boxed_answer(response)",
            "answer = (boxed_answers(response) or [None])[-1]",
        ),
        (
            "without a box the whole response",
            "    if answer is None:\n        return _rewards(formatted=False, right=False)\n",
            "    answer = response if answer is None else answer\n",
        ),
        ("an empty reference", "if not references or not all(references):", "if not references:"),
        ("no reference", "if not references or not all(references):", "if not all(references):"),
        ("the first alternative alone", "for reference in references)", "for reference in references[:1])"),
    ),
]

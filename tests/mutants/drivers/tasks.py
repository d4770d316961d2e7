"""Questions and demonstrations: drivers/tasks/."""

from tests.mutants.table import breaks

DATA, SFT, CHAT, COUNTDOWN, PASS_RATES = (
    f"tests/drivers/test_{name}.py" for name in ("data", "sft", "chat", "countdown", "pass_rates")
)
QUESTIONS = "drivers/tasks/questions.py"

MUTANTS = [
    *breaks(
        "load_examples",
        QUESTIONS,
        f"{DATA} {PASS_RATES}",
        ("other separators split lines", 'text.split("\\n"), start=1', "text.splitlines(), start=1"),
        ("lines from 0", 'text.split("\\n"), start=1', 'text.split("\\n"), start=0'),
        ("the first alternative", "texts if isinstance(answer, list) else texts[0]", "texts[0]"),
        ("blank answers", "        return bool(value.strip())\n", "        return True\n"),
    ),
    *breaks(
        "fit_context",
        QUESTIONS,
        f"{DATA} {SFT} -k 'fit_context or long_demonstrations or formatted'",
        ("one token too many", "length <= context]", "length < context]"),
        ("the shortest is named", "longest = max(range", "longest = min(range"),
        ("always refused", 'if long_prompts == "refuse" or not kept:', "if True:"),
        ("never refused", 'if long_prompts == "refuse" or not kept:', "if not kept:"),
    ),
    *breaks(
        "encode_prompt",
        QUESTIONS,
        f"{DATA} -k encode_prompt",
        (
            "the appended token stays",
            "return token_ids if token_ids[-len(of_text) :] == of_text else token_ids[:-1]",
            "return token_ids",
        ),
        (
            "any end token is dropped",
            "return token_ids if token_ids[-len(of_text) :] == of_text else token_ids[:-1]",
            "return token_ids[:-1]",
        ),
    ),
    *breaks(
        "Prompt",
        QUESTIONS,
        f"{DATA} {CHAT} -k 'prompt or encode'",
        (
            "braces in questions",
            'self.template.replace("{question}", question)',
            "self.template.format(question=question)",
        ),
        (
            "no system message",
            'messages = [] if self.system is None else [{"role": "system", "content": self.system}]',
            "messages = []",
        ),
        ("two start tokens", "tokenizer.encode(whole, add_special_tokens=False)", "tokenizer.encode(whole)"),
        (
            "no turn of the model",
            '{"role": "user", "content": text}], to_answer=True)',
            '{"role": "user", "content": text}], to_answer=False)',
        ),
    ),
    *breaks(
        "make_demonstrations",
        "drivers/tasks/demonstrations.py",
        f"{SFT} {CHAT} -k demonstration",
        ("never an end token", "            response.append(tokenizer.eos_token_id)\n", "            pass\n"),
        ("always an end token", "if not example.response.endswith(tuple(stop)) and tokenizer", "if tokenizer"),
        (
            "a whole prompt is formatted again",
            'own_prompt = Prompt("{question}") if example.has_prompt else prompt',
            "own_prompt = prompt",
        ),
        (
            "a start token in the response",
            "tokenizer.encode(example.response, add_special_tokens=False)",
            "tokenizer.encode(' ' + example.response, add_special_tokens=False)",
        ),
    ),
    *breaks(
        "make_countdown",
        "drivers/tasks/countdown.py",
        f"{COUNTDOWN} -k make_countdown",
        (
            "held-out numbers with another target",
            "if key in held_out or (key, target) in seen:",
            "if (key, target) in seen:",
        ),
        ("puzzles repeat", "if key in held_out or (key, target) in seen:", "if key in held_out:"),
        ("the order of the numbers hides repeats", "key = tuple(sorted(numbers))", "key = tuple(numbers)"),
        ("the seed is ignored", "rng = random.Random(config.seed)", "rng = random.Random(0)"),
    ),
    *breaks(
        "make_wordadd",
        "drivers/tasks/wordadd.py",
        DATA,
        ("held-out sums in training", '(pair in held_out) == (split == "validation")', "True"),
        ("wrong sums", '"answer": str(a + b)}', '"answer": str(a - b)}'),
    ),
]

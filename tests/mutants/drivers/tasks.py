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
        ("other separators split lines", "enumerate(file, start=1)", "enumerate(file.read().splitlines(), start=1)"),
        ("lines from 0", "enumerate(file, start=1)", "enumerate(file, start=0)"),
        ("a byte order mark", 'line.decode("utf-8-sig" if number == 1 else "utf-8")', 'line.decode("utf-8")'),
        ("bytes of the line", "(byte {start + error.start})", "(byte {error.start})"),
        ("long integers are no JSON", "    except ValueError:  # more", "    except LookupError:  # more"),
        (
            "large integers are no answers",
            "return type(value) is int or (isinstance(value, float) and math.isfinite(value))",
            "return isinstance(value, int | float) and math.isfinite(value)",
        ),
        ("whole values in messages", "return text if len(text) <= width else", "return text if True else"),
        (
            "unpaired surrogates",
            "        except UnicodeEncodeError:\n            return False",
            "        except UnicodeEncodeError:\n            return True",
        ),
        ("tables are read", 'if file.suffix in (".csv", ".tsv", ".parquet"):', "if False:"),
        (
            "no command for JSON",
            '    return f"; {how_to_convert(path)}" if path.suffix == ".json" else ""',
            '    return ""',
        ),
        ("equal rows are kept apart", "known.setdefault(example.content, example)", "example"),
        (
            "answers do not tell rows apart",
            "return self.question, answer, self.pass_rate",
            "return self.question, self.pass_rate",
        ),
        (
            "pass rates do not tell rows apart",
            "return self.question, answer, self.pass_rate",
            "return self.question, answer",
        ),
        ("the first alternative", "texts if isinstance(answer, list) else texts[0]", "texts[0]"),
        ("blank answers", "        return bool(value.strip())\n", "        return True\n"),
    ),
    *breaks(
        "fit_context",
        QUESTIONS,
        f"{DATA} {SFT} -k 'fit_context or long_demonstrations or formatted'",
        ("one token too many", "q.n_tokens(max_new_tokens) <= context]", "q.n_tokens(max_new_tokens) < context]"),
        ("the shortest is named", "longest = max(questions", "longest = min(questions"),
        ("always refused", 'if long_prompts == "refuse" or not kept:', "if True:"),
        ("never refused", 'if long_prompts == "refuse" or not kept:', "if not kept:"),
    ),
    *breaks(
        "encode_prompt",
        QUESTIONS,
        f"{DATA} -k encode_prompt",
        ("the appended token stays", "            encoded[index].pop()\n", "            pass\n"),
        ("any end token is dropped", "if encoded[index][-len(of_text) :] != of_text:", "if True:"),
    ),
    *breaks(
        "make_questions",
        QUESTIONS,
        f"{DATA} -k 'equal_rows or together or memory'",
        (
            "only the first call",
            "range(0, len(questions), N_AT_ONCE)",
            "range(0, min(len(questions), N_AT_ONCE), N_AT_ONCE)",
        ),
        ("calls overlap", "questions[start : start + N_AT_ONCE]]", "questions[start : start + N_AT_ONCE + 1]]"),
        ("equal rows are tokenized again", "    different = distinct(examples)\n", "    different = list(examples)\n"),
        (
            "the last of equal objects only",
            "{id(item): item for item in items}.values()",
            "{0: item for item in items}.values()",
        ),
        ("ids as Python objects", 'return [array("I", token_ids) for', "return [list(token_ids) for"),
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
        (
            "two start tokens",
            "encode(tokenizer, texts, add_special_tokens=False)\n            else:",
            "encode(tokenizer, texts)\n            else:",
        ),
        ("the clock goes on", "to_answer=True, day=self.day, arguments", "to_answer=True, arguments"),
        (
            "no turn of the model",
            "asked, to_answer=True, day",
            "asked, to_answer=False, day",
        ),
    ),
    *breaks(
        "make_demonstrations",
        "drivers/tasks/demonstrations.py",
        f"{SFT} {CHAT} {DATA} -k 'demonstration or together or equal_rows'",
        ("never an end token", "                token_ids.append(tokenizer.eos_token_id)\n", "                pass\n"),
        ("always an end token", "if not text.endswith(tuple(stop)) and tokenizer", "if tokenizer"),
        (
            "a whole prompt is formatted again",
            '((True, Prompt("{question}")), (False, prompt))',
            "((True, prompt), (False, prompt))",
        ),
        (
            "a start token in the response",
            "encode(tokenizer, texts, add_special_tokens=False)",
            "encode(tokenizer, [f' {text}' for text in texts], add_special_tokens=False)",
        ),
        ("responses do not tell rows apart", "super().content, self.response, self.has_prompt", "super().content"),
        (
            "only the first call",
            "range(0, len(responses), N_AT_ONCE)",
            "range(0, min(len(responses), N_AT_ONCE), N_AT_ONCE)",
        ),
    ),
    *breaks(
        "render",
        "drivers/tasks/chat.py",
        f"{CHAT} -k 'chat'",
        (
            "the clock is always passed",
            'if day is not None and "strftime_now" in str(tokenizer.chat_template):',
            "if day is not None:",
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

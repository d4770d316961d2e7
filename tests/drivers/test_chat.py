"""Prompts through a chat template: they equal the template's own output token by token, and turns end."""

import importlib
import json
import re
import sys
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers.processors import TemplateProcessing

from drivers.common.atomic_files import write_json
from drivers.common.errors import UsageError
from drivers.engines.hf import HFEngine
from drivers.policy.loading import embedded_model, load_tokenizer
from drivers.settings.chat_args import parse_chat_args
from drivers.settings.command_line import parse_train_config
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.imitation import ExpertIterationConfig, SftConfig
from drivers.tasks.chat import render, use_end_of_turn_as_eos
from drivers.tasks.demonstrations import WorkedExample, make_demonstrations
from drivers.tasks.questions import Example, Prompt, load_prompt, make_questions
from drivers.training.setup import load_prompt_from_settings
from tests.drivers.helpers.engines import make_vllm_engine
from tests.drivers.helpers.letters import ask, make_tiny_config
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

START, END, BOS = "<|im_start|>", "<|im_end|>", "<s>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '<eos>' }}{% endif %}{% endfor %}"
)
SILENT = CHATML.replace("m['content'] + '<|im_end|>\n'", "(m['content'] if m['role'] != 'assistant' else '')")
EMPTY_THOUGHTS = CHATML.replace(
    "m['content'] +", "('<think></think>' if m['role'] == 'assistant' else '') + m['content'] +"
)


def make_chat_tokenizer(template, *, writes_bos=False):
    """Return a tokenizer with characters, the usual special tokens and an end token that ends a text, not a turn."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    if writes_bos:
        tokenizer.add_special_tokens({"bos_token": BOS})
        bos = (BOS, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    tokenizer.chat_template = template
    return tokenizer


def encode(tokenizer, *pieces):
    """Return special tokens as they are and texts character by character."""
    return tuple(
        token
        for piece in pieces
        for token in (
            [tokenizer.convert_tokens_to_ids(piece)]
            if piece in tokenizer.all_special_tokens
            else [tokenizer.convert_tokens_to_ids(character) for character in piece]
        )
    )


def test_chat_prompt_question_is_user_message():
    tokenizer = make_chat_tokenizer(CHATML)
    prompt = Prompt("Solve: {question}!", is_message=True)
    (question,) = make_questions([Example("1+1", "2", "a:1")], prompt, tokenizer)
    expected = encode(tokenizer, START, "user\nSolve: 1+1!", END, "\n", START, "assistant\n")
    assert question.prompt_token_ids == expected
    with_system = Prompt("{question}", is_message=True, system="Be short.")
    assert ask(with_system, "1+1", tokenizer) == encode(
        tokenizer, START, "system\nBe short.", END, "\n", START, "user\n1+1", END, "\n", START, "assistant\n"
    )


DATED = CHATML + "{{ strftime_now('%d %b %Y %H:%M:%S') }}"


def test_chat_prompt_shows_the_day_of_the_run(monkeypatch):
    """Without a day, a template's clock goes on, and a resumed run would have other prompts."""
    tokenizer = make_chat_tokenizer(DATED)
    prompt = Prompt("{question}", is_message=True, day=date(2026, 11, 29))
    assert ask(prompt, "1+1", tokenizer) == encode(
        tokenizer, START, "user\n1+1", END, "\n", START, "assistant\n29 Nov 2026 00:00:00"
    )
    assert ask(prompt, "1+1", make_chat_tokenizer(CHATML)) == ask(Prompt("{question}", True), "1+1", tokenizer)[:-20]
    use_end_of_turn_as_eos(tokenizer, "m")
    assert tokenizer.eos_token == END
    refusing = SimpleNamespace(
        chat_template=CHATML, apply_chat_template=lambda _, tokenize, add_generation_prompt: "t"
    )
    assert render(refusing, [], to_answer=True, day=date(2026, 11, 29)) == "t"  # it accepts no other argument


def test_chat_date_is_kept_with_the_settings():
    assert make_tiny_config().chat_date is None
    for kind in (make_tiny_config, partial(EvaluateConfig, model_path="m")):
        assert kind(chat_template=True).chat_date == date.today().isoformat()
        assert kind(chat_template=True, chat_date="20261129").chat_date == "2026-11-29"
        with pytest.raises(UsageError, match=r"--chat-date tomorrow: must be a day like 2026-11-29"):
            kind(chat_template=True, chat_date="tomorrow")
        with pytest.raises(UsageError, match=r"--chat-date 2026-11-29: has no effect without a chat template"):
            kind(chat_date="2026-11-29")


THINKING = CHATML.replace(
    "assistant\n'", "assistant\n' + ('' if enable_thinking else '<think></think>') + style | string"
)


def test_chat_template_args_reach_the_template_with_their_types():
    """A text `false` would be true in a template."""
    tokenizer = make_chat_tokenizer(THINKING)
    for entries, written in (
        (["enable_thinking=false", "style=2"], "<think></think>2"),
        (["enable_thinking=true", "style=a=b"], "a=b"),
        (["style=0.50", "enable_thinking=0"], "<think></think>0.5"),
    ):
        config = make_tiny_config(chat_template=True, chat_template_args=tuple(entries))
        assert ask(load_prompt_from_settings(config), "1+1", tokenizer)[-len(written) :] == encode(tokenizer, written)
    assert parse_chat_args(["a=", "b=1e3", "c=nan", "d=-7", "e=True"]) == {
        "a": "", "b": 1000.0, "c": "nan", "d": -7, "e": "True",
    }  # fmt: skip
    with pytest.raises(
        UsageError, match="args enable_thinkin: the model's chat template reads no such name; correct it"
    ):
        ask(Prompt("{question}", True, arguments={"enable_thinkin": False}), "1+1", tokenizer)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            ["enable_thinking"],
            "--chat-template-args enable_thinking: must be a name and a value, such as enable_thinkin",
        ),
        (["=1"], "--chat-template-args =1: must be a name and a value"),
        (["a b=1"], "--chat-template-args a b=1: must be a name and a value"),
        (["a=1", "a=2"], "--chat-template-args a=2: each name must be unique"),
        (["tokenize=true"], "tokenize belongs to transformers, not to the template; omit it"),
    ],
)
@pytest.mark.parametrize("kind", [make_tiny_config, EvaluateConfig], ids=["train", "evaluate"])
def test_chat_template_args_that_cannot_be_passed_are_refused(kind, entries, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        kind(chat_template=True, chat_template_args=tuple(entries))
    with pytest.raises(UsageError, match="has no effect without a chat template; pass --chat-template too"):
        kind(chat_template_args=tuple(entries))


def test_chat_date_of_a_resumed_run_is_its_own(tmp_path):
    settings = make_tiny_config(chat_template=True, chat_date="2026-11-29")
    write_json(tmp_path / "config.json", {"config": asdict(settings), "program": "train.py"})
    (tmp_path / "metrics.jsonl").touch()
    assert parse_train_config(["--resume", str(tmp_path)]).chat_date == "2026-11-29"


def test_chat_prompt_has_one_bos_token():
    tokenizer = make_chat_tokenizer(INST, writes_bos=True)
    assert ask(Prompt("{question}"), "ab", tokenizer) == encode(tokenizer, BOS, "ab")
    assert ask(Prompt("{question}", is_message=True), "ab", tokenizer) == encode(tokenizer, BOS, "[INST] ab [/INST]")


def test_end_of_turn_ends_samples_and_demonstrations():
    """Base models name the token that ends a text; training teaches them to end turns."""
    tokenizer = make_chat_tokenizer(CHATML)
    assert tokenizer.eos_token == "<eos>"
    use_end_of_turn_as_eos(tokenizer, "tiny")
    assert tokenizer.eos_token == END
    engine = HFEngine(make_tiny_policy(), tokenizer)
    assert set(engine._end_ids) == set(tokenizer.convert_tokens_to_ids([END, "<eos>"]))
    shown = [WorkedExample("1+1", "2", "a:1", "It is 2", has_prompt=False)]
    (one,) = make_demonstrations(shown, Prompt("{question}", is_message=True), (), tokenizer)
    assert one.prompt_token_ids == encode(tokenizer, START, "user\n1+1", END, "\n", START, "assistant\n")
    assert one.response_token_ids == encode(tokenizer, "It is 2", END)


@pytest.mark.parametrize("urls", [(), ("http://127.0.0.1:1",)])
def test_vllm_engine_gets_end_of_turn_token(urls, monkeypatch):
    """vLLM reads the model's folder itself, which may name another token."""
    captured = {}

    def start(_options, _weights, end_token_id):
        captured["end_token_id"] = end_token_id

    monkeypatch.setitem(sys.modules, "drivers.engines.vllm", SimpleNamespace(VLLMEngine=start))
    monkeypatch.setitem(sys.modules, "drivers.engines.vllm_server", SimpleNamespace(ServerEngine=start))
    here = SimpleNamespace(place=lambda *_: SimpleNamespace(has_own_process=False))
    monkeypatch.setitem(sys.modules, "drivers.engines.vllm_startup", here)
    tokenizer = make_chat_tokenizer(CHATML)
    use_end_of_turn_as_eos(tokenizer, "tiny")
    make_vllm_engine(make_tiny_policy(), tokenizer=tokenizer, urls=urls)
    assert captured["end_token_id"] == tokenizer.convert_tokens_to_ids(END)


def test_chat_demonstration_with_prompt_is_unchanged():
    tokenizer = make_chat_tokenizer(CHATML)
    shown = [WorkedExample("Q: ", "2", "a:1", "2", has_prompt=True)]
    (one,) = make_demonstrations(shown, Prompt("{question}", True), (), tokenizer)
    assert one.prompt_token_ids == encode(tokenizer, "Q: ")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (INST, "<eos>"),  # needs no opening, and ends a turn like a text
        (CHATML.replace("<|im_end|>\n", "\n"), "<eos>"),  # ends a turn without a token
        (SILENT, "<eos>"),  # does not show what the model said
        (EMPTY_THOUGHTS, END),  # hides earlier thoughts, and the response begins with thoughts
        (CHATML.replace("assistant\n", "assistant\n<think>"), END),  # opens more text than an answered turn holds
        (CHATML.replace("'<|im_end|>\n'", "' <|im_end|>\n'"), END),
    ],
)
def test_chat_prompt_other_templates_render(template, end):
    tokenizer = make_chat_tokenizer(template, writes_bos=True)
    use_end_of_turn_as_eos(tokenizer, "tiny")
    assert tokenizer.eos_token == end


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "--chat-template: the tokenizer of tiny has no chat template"),
        ("", "has no chat template"),
        (CHATML.partition("{% if add")[0], "answers follow '<|im_start|>assistant'"),
        ("{{ raise_exception('only tools') }}", "refuses messages of user and assistant (only tools)"),
        ("{% for %}", "refuses messages of user and assistant"),
    ],
)
def test_chat_invalid_template_raises_usage_error(template, message):
    with pytest.raises(UsageError) as raised:
        use_end_of_turn_as_eos(make_chat_tokenizer(template), "tiny")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_chat_template_without_system_raises_usage_error():
    tokenizer = make_chat_tokenizer(INST, writes_bos=True)
    with pytest.raises(UsageError, match=r"refuses messages of system and user \(no system here\)"):
        ask(Prompt("{question}", is_message=True, system="S"), "1", tokenizer)


def test_system_prompt_path_is_read_and_requires_chat_template(tmp_path):
    (tmp_path / "system.txt").write_text("Be short.\n")
    path = str(tmp_path / "system.txt")
    assert load_prompt("data/prompts/question_only.prompt", True, path) == Prompt("{question}", True, "Be short.")
    with pytest.raises(UsageError, match=r"--system-prompt-path nowhere\.txt: cannot be read"):
        load_prompt("data/prompts/question_only.prompt", True, "nowhere.txt")
    makers = (
        make_tiny_config,
        SftConfig,
        ExpertIterationConfig,
        EvaluateConfig,
    )
    for make in makers:
        with pytest.raises(UsageError, match=f"--system-prompt-path {path}: has no effect without a chat template"):
            make(system_prompt_path=path)
        assert make(chat_template=True, system_prompt_path=path).system_prompt_path == path


@pytest.mark.parametrize("program", ["train", "sft", "expert_iteration", "evaluate"])
def test_programs_chat_template_without_template_exit_with_one_line(program, tmp_path, capsys, monkeypatch):
    """A tokenizer without a template ends each program with one line, before it loads a model."""
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("tiny"))
    data = {"sft": "sft", "evaluate": "validation"}.get(program, "train")
    flags = f"--model-path tiny --chat-template --data-path data/wordadd/{data}.jsonl"
    flags += " --prompt-path data/prompts/boxed.prompt"
    if program != "evaluate":
        flags += " --val-data-path data/wordadd/validation.jsonl --sampling-max-tokens 8"
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"drivers.{program}").main(flags.split())
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert "has no chat template; omit the flag" in errors
    assert "Traceback" not in errors
    assert not Path("runs").exists()


def test_shipped_chat_prompts_do_not_open_the_response():
    for name in ("boxed", "think_and_answer"):
        template = load_prompt(f"data/prompts/{name}.prompt").template
        assert template.startswith("{question}\n")
        assert not template.endswith("<think>")
    assert load_prompt("data/prompts/countdown.prompt").template.endswith("User: {question}\nAssistant: <think>")


@pytest.mark.slow
def test_embedded_model_chat_prompt_equals_transformers():
    tokenizer = load_tokenizer(str(embedded_model()), for_chat=True)
    assert tokenizer.eos_token == END
    user, system = {"role": "user", "content": "What is 2 + 2?"}, {"role": "system", "content": "Be short."}
    for prompt, messages in [
        (Prompt("What is {question}?", True), [user]),
        (Prompt("What is {question}?", True, "Be short."), [system, user]),
    ]:
        whole = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
        assert ask(prompt, "2 + 2", tokenizer) == tuple(whole["input_ids"])
        assert ask(prompt, "2 + 2", tokenizer).count(tokenizer.bos_token_id) == 3  # one each


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "sft", "expert_iteration"])
def test_run_with_chat_template_saves_end_of_turn(program, tmp_path, monkeypatch):
    """Whole runs of one step, on a model whose files name another end token."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_chat_tokenizer(CHATML)
    tokenizer.save_pretrained("tiny")
    make_tiny_policy(vocab_size=len(tokenizer)).save_pretrained("tiny")
    data = "sft" if program == "sft" else "train"
    flags = f"--model-path tiny --chat-template --engine hf --dtype float32 --data-path data/wordadd/{data}.jsonl "
    flags += "--val-data-path data/wordadd/validation.jsonl --prompt-path data/prompts/question_only.prompt "
    flags += "--reward question_only --sampling-min-tokens 0 --sampling-max-tokens 6 --n-val-examples 2 "
    flags += "--wandb-project None --save-dir out --train-batch-size 8 "
    flags += {
        "train": "--n-grpo-steps 1 --rollout-batch-size 8 --group-size 4 --gradient-accumulation-steps 1",
        "sft": "--n-examples 8 --sampling-max-tokens 64",
        "expert_iteration": "--n-ei-steps 1 --question-batch-size 2 --group-size 2",
    }[program]
    importlib.import_module(f"drivers.{program}").main(flags.split())
    saved = load_tokenizer("out/final_model")
    assert saved.eos_token == END
    ends = json.loads(Path("out/final_model/generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == set(saved.convert_tokens_to_ids([END, "<eos>"]))

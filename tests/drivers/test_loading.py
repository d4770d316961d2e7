"""Models from files: what cannot be trained, pushed or saved is refused in one line, or repaired with one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, GPTNeoConfig

from drivers import evaluate as evaluate_program
from drivers import train as train_program
from drivers.common.errors import UsageError
from drivers.engines.hf import HFEngine
from drivers.policy import loading
from drivers.policy.loading import check_token_ids, load_policy
from drivers.settings.sampling import Sampling
from drivers.tasks.questions import Example, Question
from tests.drivers.helpers.engines import PROMPTS, compute_log_probs
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

CPU = torch.device("cpu")
FLAGS = (
    "--recipe quickstart --engine hf --dtype float32 --n-grpo-steps 1 --rollout-batch-size 8 --group-size 4 "
    "--train-batch-size 8 --gradient-accumulation-steps 1 --sampling-max-tokens 4 --n-val-examples 2 "
    "--wandb-project None --save-dir out --model-path"
)


@pytest.fixture(autouse=True)
def warnings_are_new():
    """Warn again of what an earlier test has warned of."""
    loading._warn_once.cache_clear()


@pytest.fixture
def tiny(tmp_path):
    return save_tiny(tmp_path / "tiny")


def change_weights(folder, change):
    """Replace the weights in a model's folder by `change` of them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(*parts):
    return lambda weights: {k: w for k, w in weights.items() if not any(part in k for part in parts)}


def load(folder):
    return load_policy(str(folder), CPU, torch.float32)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_load_policy_tied_head_is_not_missing(tiny, capsys):
    policy = load(tiny)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), make_tiny_policy().parameters(), strict=True))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("layers.1.mlp.up_proj"),
            "lack 1 of the model's tensors, .*: model.layers.1.mlp.up_proj.weight; pass",
        ),
        (without("layers.1"), r"lack 9 of the model's tensors, .*layers.1.*, .*, .* and 6 more; pass"),
        (without("embed_tokens"), "lack .*embed_tokens.weight"),
        (
            lambda weights: {f"inner.{name}": weight for name, weight in weights.items()},
            r"lack .* of the model's tensors.*; they hold others instead: inner\.",
        ),
    ],
    ids=["a tensor", "a layer", "the tied embedding", "other names"],
)
def test_load_policy_missing_weights_are_refused_by_name(tiny, change, message):
    change_weights(tiny, change)
    with pytest.raises(UsageError, match=message) as raised:
        load(tiny)
    assert str(raised.value).startswith(f"--model-path {tiny}: its files ")
    assert "\n" not in str(raised.value)


def test_load_policy_untied_head_must_be_there(tmp_path):
    policy = make_tiny_policy()
    config = policy.config.to_dict() | {"tie_word_embeddings": False}
    untied = type(policy)(type(policy.config)(**config))
    untied.save_pretrained(tmp_path)
    load(tmp_path)
    change_weights(tmp_path, without("lm_head"))
    with pytest.raises(UsageError, match=r"lack 1 of .*: lm_head.weight"):
        load(tmp_path)


@pytest.mark.parametrize(("attention", "chosen"), [("auto", "eager"), ("eager", "eager"), ("sdpa", None)])
def test_load_policy_model_without_sdpa_gets_eager(tmp_path, attention, chosen):
    layers = {"num_layers": 1, "attention_types": [[["global"], 1]]}
    config = GPTNeoConfig(hidden_size=32, num_heads=2, vocab_size=98, bos_token_id=None, eos_token_id=1, **layers)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    if chosen is None:
        with pytest.raises(UsageError, match=r"--attention sdpa: .*does not support.*; pass --attention auto"):
            load_policy(str(tmp_path), CPU, torch.float32, attention=attention)
        return
    assert load_policy(str(tmp_path), CPU, torch.float32, attention=attention).config._attn_implementation == chosen


def test_load_policy_auto_attention_is_sdpa_but_for_short_rows(tiny):
    for longest_row, chosen in ((None, "sdpa"), (512, "eager"), (513, "sdpa")):
        assert load_policy(str(tiny), CPU, torch.float32, longest_row).config._attn_implementation == chosen


def test_load_policy_other_shapes_are_refused(tiny):
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(UsageError, match=r"the model cannot be loaded|lack 6 of the model's tensors"):
        load(tiny)


def test_load_policy_unexpected_weights_warn_once(tiny, capsys):
    change_weights(tiny, lambda weights: weights | {f"value_head.{n}": torch.ones(2) for n in range(4)})
    for _ in range(2):
        load(tiny)
    names = "value_head.0, value_head.1, value_head.2 and 1 more"
    assert capsys.readouterr().out == f"warning: --model-path {tiny}: the model has no place for {names}\n"


def test_load_policy_weights_beyond_float16_are_refused(tiny):
    change_weights(tiny, lambda weights: weights | {"model.norm.weight": 1e5 * weights["model.norm.weight"]})
    with pytest.raises(
        UsageError, match=r"--dtype float16: .* beyond 65504, .* \(model\.norm\.weight\); pass bfloat16 or"
    ):
        load_policy(str(tiny), torch.device("cpu"), torch.float16)
    load_policy(str(tiny), torch.device("cpu"), torch.bfloat16)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("program", "flags"),
    [
        (train_program, FLAGS),
        (evaluate_program, "--engine hf --sampling-max-tokens 4 --n-examples 2 --output-dir out --model-path"),
    ],
    ids=["train", "evaluate"],
)
def test_program_missing_weights_exit_with_one_line(tiny, program, flags, monkeypatch, capsys):
    monkeypatch.chdir(tiny.parent)
    change_weights(tiny, without("layers.1"))
    with pytest.raises(SystemExit) as ended:
        program.main([*flags.split(), "tiny"])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "--model-path tiny: its files lack 9 of the model's tensors" in shown
    assert "Traceback" not in shown
    assert not (tiny.parent / "out").exists()


# --- generation config -----------------------------------------------------------------------------------------------


def write_generation_config(folder, **values):
    """Write what transformers would refuse to write."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0} | values))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("values", "change"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, "do_sample is set to true"),
        ({"early_stopping": True, "length_penalty": 0.5}, "only its special tokens are kept"),
    ],
)
def test_train_invalid_generation_config_is_repaired(tiny, values, change, monkeypatch, capsys):
    """The run would end at its first checkpoint, after hours."""
    monkeypatch.chdir(tiny.parent)
    write_generation_config(tiny, **values)
    train_program.main([*FLAGS.split(), "tiny"])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("warning: --model-path tiny: its generation config is invalid and could not be saved") == 1
    assert change in shown
    saved = GenerationConfig.from_pretrained("out/final_model")
    saved.validate(strict=True)
    assert (saved.eos_token_id, saved.pad_token_id) == (1, 0)
    assert saved.do_sample is (True if "temperature" in values else None)
    AutoModelForCausalLM.from_pretrained("out/final_model")


@pytest.mark.parametrize(
    "values",
    [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [*range(5, 90)]}, {"top_k": 2}],
    ids=lambda values: next(iter(values)),
)
def test_hf_engine_ignores_generation_config_of_model(tiny, values):
    """Samples are those of the policy's own distribution, as vLLM's are."""
    write_generation_config(tiny, do_sample=True, **values)
    policy, plain = load(tiny), make_tiny_policy()
    own = policy.generation_config
    for sampling in (Sampling(n=2, max_tokens=6, stop=()), Sampling(temperature=0.0, max_tokens=6, stop=())):
        found, expected = (
            HFEngine(model, make_tiny_tokenizer()).generate(PROMPTS, sampling, seed=3) for model in (policy, plain)
        )
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        for one in found:
            assert one.log_probs == pytest.approx(compute_log_probs(plain, one), abs=1e-4)
    assert policy.generation_config is own


def test_train_model_that_cannot_be_saved_exits_before_first_step(tiny, monkeypatch, capsys):
    """Whatever a checkpoint contains is saved once before training, so that no step is lost."""
    monkeypatch.chdir(tiny.parent)

    def fail(*_):
        raise TypeError("no JSON\n")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(SystemExit) as ended:
        train_program.main([*FLAGS.split(), "tiny"])
    assert ended.value.code == 2
    assert "the trained model could not be saved (TypeError: no JSON)" in capsys.readouterr().err
    assert not (tiny.parent / "out").exists()


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_check_token_ids_beyond_embedding_names_the_token(tiny):
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    questions = [Question(Example("q", "1", "a:1"), (5, 6)), Question(Example("q", "1", "a:2"), (7,))]
    check_token_ids(str(tiny), tokenizer, questions)
    beyond = tokenizer.convert_tokens_to_ids("<extra>")
    questions.append(Question(Example("q", "1", "a:3"), (5, beyond)))
    with pytest.raises(UsageError, match=f"the tokenizer's '<extra>' has id {beyond}, but the model has {beyond} emb"):
        check_token_ids(str(tiny), tokenizer, questions)

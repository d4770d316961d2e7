"""Conversations: a function composes responses, and only what the policy sampled counts."""

import asyncio
import json
from dataclasses import replace
from itertools import product
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from drivers.common.errors import UsageError
from drivers.engines.conversations import load_rollout, sample_responses
from drivers.engines.kept_tokens import KeptTokens
from drivers.engines.protocol import Completion, describe_completions
from drivers.engines.sampler import Sampler
from drivers.runs.folder import find_checkpoint
from drivers.settings.sampling import ConversationSettings, Sampling
from drivers.tasks.questions import Example, Question
from drivers.training import state
from drivers.training.batch import StepRollouts, make_rollout_batch
from drivers.training.forward import forward
from drivers.training.micro_batches import Row
from drivers.training.state import validate_resume
from tests.drivers.helpers.conversations import INSERTED, interrupt, make_rollout
from tests.drivers.helpers.engines import compute_log_probs
from tests.drivers.helpers.letters import clone_policy, make_completion, make_tiny_config, make_tiny_parts
from tests.drivers.helpers.processes import ROOT
from tests.drivers.helpers.runs import RecordingEngine, run_grpo, run_training
from tests.tiny import make_tiny_policy, make_tiny_tokenizer

INTERRUPT = "tests.drivers.helpers.conversations:interrupt"
QUESTION = Question(Example("which?", "a", "here:1"), (5, 6, 7))


@pytest.fixture(scope="module")
def parts():
    return make_tiny_parts()


def converse(parts, play=interrupt, sampling=None, seed=1):
    """Return conversations of the tiny policy, and its engine."""
    engine = RecordingEngine(parts.policy, parts.tokenizer)
    sampling = sampling or Sampling(n=3, max_tokens=9, stop=())
    rollout = make_rollout(play, parts.tokenizer)
    return sample_responses(engine, rollout, parts.questions, sampling, seed=seed), engine


# --- what is sampled -------------------------------------------------------------------------------------------------
def test_conversation_log_probs_are_those_of_policy_and_inserted_tokens_have_none(parts):
    responses, _ = converse(parts)
    assert [one.prompt_token_ids for one in responses] == [q.prompt_token_ids for q in parts.questions for _ in "123"]
    assert len({one.token_ids for one in responses}) == len(responses)
    for one in responses:
        place = one.sampled.index(False)
        assert one.token_ids[place : place + 2] == INSERTED
        assert one.sampled.count(False) == 2
        of_policy = compute_log_probs(parts.policy, one)
        expected = [value if flag else 0.0 for value, flag in zip(of_policy, one.sampled, strict=True)]
        assert one.log_probs == pytest.approx(expected, abs=1e-5)
        assert one.text == parts.tokenizer.decode(one.token_ids, skip_special_tokens=True)


def test_conversations_take_one_call_of_the_engine_per_turn_and_equal_seeds_give_equal_responses(parts):
    responses, engine = converse(parts)
    first, second = engine.sampled
    assert len(first.prompts) == len(second.prompts) == len(responses)
    assert first.seed == 1
    assert abs(second.seed - first.seed) > 2**32  # far from the first turns of other steps
    assert second.sampling.limits == tuple(9 - len(INSERTED) - one.sampled.index(False) for one in responses)
    assert converse(parts)[0] == responses
    assert converse(parts, seed=2)[0] != responses


def test_conversation_of_one_turn_equals_a_completion(parts):
    async def plain(sample, question):
        turn = await sample(question.prompt_token_ids)
        return turn.token_ids, [True] * len(turn.token_ids)

    sampling = Sampling(n=1, max_tokens=6, stop=("a", "b", "c"))
    responses, engine = converse(parts, plain, sampling)
    alone = engine.generate([q.prompt_token_ids for q in parts.questions], sampling, seed=1)
    assert [replace(one, sampled=()) for one in responses] == alone
    assert all(one.sampled == (True,) * len(one.token_ids) for one in responses)


def test_conversation_turn_reports_its_stop_and_the_response_keeps_its_own(parts):
    seen = []

    async def until_letter(sample, question):
        turn = await sample(question.prompt_token_ids, stop=list("abcdefghijklm"))
        seen.append(turn)
        return turn.token_ids, [True] * len(turn.token_ids)

    responses, _ = converse(parts, until_letter, Sampling(n=8, max_tokens=9, stop=tuple("nopqrstuvwxyz")))
    assert {turn.stop is None for turn in seen} == {True, False}
    for turn, one in zip(seen, responses, strict=True):
        assert (turn.stop is not None) == (turn.text[-1:] in set("abcdefghijklm"))
        assert one.finish_reason == turn.finish_reason


def test_conversation_is_cut_at_its_longest_length(parts):
    """A turn has the room that is left, a full response gets an empty turn, and what exceeds the limit is cut off."""
    seen = []

    async def overflow(sample, question):
        turn = await sample(question.prompt_token_ids, max_tokens=4)
        ids = [*turn.token_ids, *[30] * 9]
        seen.append(await sample([*question.prompt_token_ids, *ids]))
        return ids, [True] * len(turn.token_ids) + [False] * 9

    for longest in (6, 13):  # too many tokens, and as many as there may be
        responses, _ = converse(parts, overflow, Sampling(max_tokens=longest, min_tokens=6, stop=()))
        assert {(turn.token_ids, turn.finish_reason) for turn in seen} == {((), "length")}
        assert {(len(one.token_ids), one.n_sampled, one.finish_reason) for one in responses} == {
            (longest, 4, "length")
        }
    responses, _ = converse(parts, overflow, Sampling(max_tokens=14, min_tokens=6, stop=()))
    assert {(len(one.token_ids), one.finish_reason) for one in responses} == {(13, "stop")}


def test_conversation_minimum_length_counts_the_whole_response(parts):
    _, engine = converse(parts, sampling=Sampling(max_tokens=9, min_tokens=5, stop=()))
    first, second = engine.sampled
    assert first.sampling.min_tokens == 2  # the turn's limit
    assert second.sampling.min_tokens == 5 - 4


@pytest.mark.parametrize("truncated", [{"top_p": 0.5}, {"min_tokens": 5}], ids=["top-p", "minimum"])
def test_conversation_replays_the_sets_of_its_samples(parts, truncated):
    """Also if it returns only the beginning of a turn."""

    async def drop_end(sample, question):
        first = await sample(question.prompt_token_ids, max_tokens=3)
        ids = [first.token_ids[0], *INSERTED]
        second = await sample([*question.prompt_token_ids, *ids])
        return [*ids, *second.token_ids[:2]], [True, False, False, *[True] * len(second.token_ids[:2])]

    sampling = Sampling(n=3, max_tokens=9, stop=(), replays=True, **truncated)
    responses = [one for play in (interrupt, drop_end) for one in converse(parts, play, sampling)[0]]
    rollouts = make_rollout_batch(responses, torch.zeros(len(responses)), 3)
    token_values = forward(parts.policy, rollouts, 1.0)["log_probs"].detach()
    assert_close(token_values, rollouts.sampler_log_probs, rtol=0, atol=1e-5)
    bare = replace(rollouts, completions=tuple(replace(c, kept=None, excluded=()) for c in responses))
    assert (forward(parts.policy, bare, 1.0)["log_probs"].detach() - token_values).abs().max() > 1e-3


# --- what is composed ------------------------------------------------------------------------------------------------
PIECES = st.lists(st.tuples(st.booleans(), st.lists(st.integers(2, 60), min_size=1, max_size=4)), min_size=1)


@given(pieces=PIECES, n_dropped=st.integers(0, 2))
def test_compose_any_pieces_keep_their_log_probs(pieces, n_dropped):
    """Sampled and inserted pieces in any order; of the last sample, the function may return the beginning alone."""
    sampler = Sampler(QUESTION, Sampling(max_tokens=1000), make_tiny_tokenizer())
    ids, flags, log_probs = [], [], []
    for number, (is_sampled, tokens) in enumerate(pieces):
        if is_sampled:
            values = [-0.1 * number - 0.01 * k - 0.001 for k in range(len(tokens))]
            context = (*QUESTION.prompt_token_ids, *ids)
            sample = Completion("", context, tuple(tokens), tuple(values), "stop", weight_version=7)
            sampler._samples.setdefault(context, []).append(sample)
        ids += tokens
        flags += [is_sampled] * len(tokens)
        log_probs += values if is_sampled else [0.0] * len(tokens)
    length = max(1, len(ids) - (min(n_dropped, len(pieces[-1][1]) - 1) if pieces[-1][0] else 0))
    if not any(flags):
        with pytest.raises(ValueError, match="nothing to train on"):
            sampler.compose(ids, flags)
        return
    composed = sampler.compose(ids[:length], flags[:length])
    assert composed.token_ids == tuple(ids[:length])
    assert composed.sampled == tuple(flags[:length])
    assert composed.log_probs == tuple(log_probs[:length])
    assert composed.weight_version == 7
    assert composed.finish_reason == "stop"


@pytest.mark.parametrize(
    "change",
    [
        lambda ids, flags: ([ids[0] + 1, *ids[1:]], flags),  # another token
        lambda ids, flags: (ids, [True] * len(ids)),  # inserted tokens count as sampled
        lambda ids, flags: (ids[1:], flags[1:]),  # another context
        lambda ids, flags: ([20, *ids], [False, *flags]),
        lambda ids, flags: ([*ids[:2], 9, *ids[2:]], [True, True, True, *flags[2:]]),
    ],
)
def test_conversation_token_that_was_not_sampled_there_is_an_error(parts, change):
    async def cheat(sample, question):
        return change(*map(list, await interrupt(sample, question)))

    with pytest.raises(UsageError, match="counts as sampled, but was not sampled after the tokens before it"):
        converse(parts, cheat, Sampling(max_tokens=9, stop=(), min_tokens=9))


# --- what is learned -------------------------------------------------------------------------------------------------
@pytest.mark.medium
@settings(max_examples=15)
@given(data=st.data(), has_head=st.booleans())
def test_forward_leaves_inserted_tokens_out_in_every_layout(data, has_head):
    """Values and gradients are those of one forward pass per response, over the sampled tokens alone."""
    policy = make_tiny_policy(1).double()
    twin, prompt = clone_policy(policy), tuple(range(5, 17))
    tokens = st.lists(st.tuples(st.integers(2, 60), st.booleans()), min_size=1, max_size=6)
    completions = []
    for pairs in data.draw(st.lists(tokens, min_size=1, max_size=3)):
        ids, flags = zip(*[(5, True), *pairs], strict=True)
        completions.append(replace(make_completion(prompt, ids, [-1.0 * flag for flag in flags]), sampled=flags))
    rollouts = make_rollout_batch(completions, torch.zeros(len(completions)))
    apart = [Row(c.prompt_token_ids, (i,), (len(c.token_ids),)) for i, c in enumerate(completions)]
    with pytest.MonkeyPatch.context() as patch:
        if not has_head:
            patch.setattr("drivers.training.forward.find_head", lambda _: None)
        both = [forward(policy, rollouts, 0.7, rows, with_entropy=True) for rows in (None, apart)]
    loss = 0.0
    for number, one in enumerate(completions):
        logits = twin(torch.tensor([[*prompt, *one.token_ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        table = torch.log_softmax(logits, dim=-1)
        mask = torch.tensor(one.sampled)
        values = torch.where(mask, table[range(len(one.token_ids)), list(one.token_ids)], 0.0)
        entropy = torch.where(mask, -(table.exp() * table).sum(dim=-1), 0.0)
        for outputs in both:
            for name, expected in (("log_probs", values), ("token_entropy", entropy)):
                assert_close(outputs[name][number, : len(expected)], expected.to(outputs[name]), rtol=0, atol=1e-6)
        loss = loss + (values * (1.0 + torch.arange(len(values)))).sum()
    for outputs in both:
        (outputs["log_probs"] * (1.0 + torch.arange(outputs["log_probs"].shape[1]))).sum().backward()
    loss.backward()
    for ours, theirs in zip(policy.parameters(), twin.parameters(), strict=True):
        assert_close(ours.grad, 2 * theirs.grad, rtol=1e-4, atol=1e-5)


def test_gradient_with_a_tool_is_that_of_the_expected_reward():
    """Over all conversations of two sampled tokens and a tool's token between them, which depends on the first."""
    policy = make_tiny_policy(2).double()
    vocab, tool = range(4), lambda first: 10 + (3 * first) % 5
    completions = [
        replace(make_completion((7, 8), (a, tool(a), b), [0.0] * 3), sampled=(True, False, True))
        for a, b in product(vocab, vocab)
    ]
    rewards = torch.randn(len(completions), generator=torch.Generator().manual_seed(0)).double()

    def restrict(logits):
        return torch.log_softmax(logits[:, :, list(vocab)], dim=-1)

    twin = clone_policy(policy)
    expected = 0.0
    for one, reward in zip(completions, rewards, strict=True):
        a, inserted, b = one.token_ids
        table = restrict(twin(torch.tensor([[7, 8, a, inserted]])).logits)[0]
        expected = expected + reward * (table[1, a] + table[3, b]).exp()
    expected.backward()

    sets = KeptTokens.pack([list(vocab), [], list(vocab)])
    batch = make_rollout_batch([replace(one, kept=sets) for one in completions], rewards.float())
    log_probs = forward(policy, batch, 1.0)["log_probs"]
    probability = log_probs.detach().sum(dim=1).exp()
    assert_close(probability.sum(), torch.ones_like(probability.sum()), rtol=0, atol=1e-6)
    (probability * rewards * log_probs.sum(dim=1)).sum().backward()
    for ours, theirs in zip(policy.parameters(), twin.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_batch_counts_sampled_tokens_alone():
    one = replace(make_completion([1], [4, 9, 5], [-0.5, 0.0, -0.25]), sampled=(True, False, True))
    batch = make_rollout_batch([one, make_completion([1], [6], [-2.0])], torch.tensor([1.0, 0.0]))
    assert batch.response_mask.tolist() == [[True, False, True], [True, False, False]]
    assert batch.sampler_log_probs.tolist() == [[-0.5, 0.0, -0.25], [-2.0, 0.0, 0.0]]
    assert (batch.n_response_tokens, batch.lengths.tolist()) == (3, [2, 1])
    assert batch.select([0]).response_mask.tolist() == [[True, False, True]]
    metrics = describe_completions(batch.completions)
    assert metrics["rollout_entropy"] == pytest.approx(fmean([0.5, 0.25, 2.0]))
    assert (metrics["response_tokens"], metrics["inserted_tokens"]) == (1.5, 0.5)
    assert "inserted_tokens" not in describe_completions(batch.completions[1:])


# --- runs ------------------------------------------------------------------------------------------------------------
@pytest.mark.medium
def test_train_with_conversations_learns_and_logs_who_wrote_what(tmp_path):
    """The letter that the function inserts is no reward for the policy, which learns to write it in its own turns."""
    settings = {"rollout": INTERRUPT, "sampling_max_tokens": 8, "loss_type": "grpo_clip", "importance": "truncate"}
    _, steps, (start, end) = run_training(tmp_path, **settings)
    assert end["accuracy"] > start["accuracy"] + 0.2
    assert {row["inserted_tokens"] for row in (start, end)} == {2.0}
    with_gradient = [row for row in steps if row["micro_batches"]]
    assert all(row["sampler_log_prob_diff"] < 1e-5 for row in with_gradient)
    assert all(abs(row["importance_ess"] - 1) < 1e-4 for row in with_gradient)
    assert all(row["trained_tokens"] == pytest.approx(32 * row["response_tokens"], abs=0.5) for row in steps)
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    for row in rows:
        inserted = [k for k, flag in enumerate(row["sampled"]) if not flag]
        assert [row["tokens"][k] for k in inserted] == list(make_tiny_tokenizer().decode(INSERTED))
        for name in {"log_probs", "entropy", "sampler_log_probs"} & row.keys():
            assert [value is None for value in row[name]] == [not flag for flag in row["sampled"]]


@pytest.mark.medium
def test_train_with_conversations_resumes_exactly(tmp_path):
    settings = {"rollout": INTERRUPT, "async_steps": 1, "importance": "truncate", "engine": "vllm"}
    whole, _, _ = run_grpo(tmp_path / "whole", **settings)
    run_grpo(tmp_path / "cut", stop_at=9, **settings)
    checkpoint = find_checkpoint(tmp_path / "cut")
    resumed, _, _ = run_grpo(tmp_path / "cut", checkpoint, **settings)
    assert torch.equal(whole, resumed)


def test_pending_conversations_survive_a_checkpoint(parts):
    responses, _ = converse(parts, sampling=Sampling(max_tokens=9, stop=(), replays=True, top_p=0.9, min_tokens=2))
    pending = StepRollouts(responses, [{}] * len(responses), torch.zeros(len(responses)), None, {})
    assert StepRollouts.from_json(json.loads(json.dumps(pending.to_json()))).completions == responses


def test_resume_with_a_changed_function_is_refused(tmp_path):
    """A run saves the file as it was at the start, even if it is changed or removed meanwhile."""
    file = tmp_path / "turn_taking.py"
    source = "async def play(sample, question): return [], []"
    file.write_text(source)
    config = make_tiny_config(rollout=f"{file}:play")
    running = state.TrainingState(config, make_tiny_policy())
    file.unlink()
    running.snapshot()
    file.write_text(source)
    validate_resume(config, running.values())
    file.write_text(source + "\n")
    running.snapshot()
    with pytest.raises(UsageError, match=r"--rollout .*turn_taking\.py:play: its file has changed"):
        validate_resume(config, running.values())


# --- errors ----------------------------------------------------------------------------------------------------------
async def fail(sample, question):
    raise RuntimeError("the tool is broken")


async def return_one_list(sample, question):
    return [1, 2, 3]


async def return_unequal(sample, question):
    turn = await sample(question.prompt_token_ids)
    return turn.token_ids, [True]


async def return_numbers(sample, question):
    turn = await sample(question.prompt_token_ids)
    return turn.token_ids, [1] * len(turn.token_ids)


async def insert_unknown(sample, question):
    turn = await sample(question.prompt_token_ids)
    return [*turn.token_ids, 1000], [True] * len(turn.token_ids) + [False]


async def insert_all(sample, question):
    return [5, 6], [False, False]


async def never_stop(sample, question):
    for _ in range(200):
        await sample([*question.prompt_token_ids, *[5] * 9])


async def sample_text(sample, question):
    await sample("What is 1 + 1?")


async def sample_nothing(sample, question):
    await sample([])


async def stop_at_text(sample, question):
    await sample(question.prompt_token_ids, stop="</answer>")


async def sample_no_token(sample, question):
    await sample(question.prompt_token_ids, max_tokens=0)


@pytest.mark.parametrize(
    ("play", "message"),
    [
        (
            fail,
            r"failed at test_conversations.py:\d+ in a response to 'say it 1' \(RuntimeError: the tool is",
        ),
        (return_one_list, "must return two lists"),
        (return_unequal, "returned 9 token ids, but 1 flags"),
        (return_numbers, "must return True or False"),
        (insert_unknown, "returned the token 1000, but token ids are integers from 0 to"),
        (insert_all, "no token of the response was sampled"),
        (never_stop, "got 100 empty turns; return the response after finish_reason 'length'"),
        (sample_text, "sample takes a list of token ids"),
        (sample_nothing, "sample takes a list of token ids"),
        (stop_at_text, r"stop must be a list of strings: pass stop=\['</answer>'\]"),
        (sample_no_token, "max_tokens is 0, but a turn has at least one token"),
    ],
)
def test_conversation_function_that_fails_is_named_in_one_line(parts, play, message):
    with pytest.raises(UsageError, match=f"--rollout file.py:play: .*{message}") as raised:
        converse(parts, play, Sampling(max_tokens=9, min_tokens=9, stop=()))
    assert "\n" not in str(raised.value)


def test_conversation_that_waits_too_long_is_an_error(parts):
    async def wait(sample, question):
        await asyncio.sleep(60)

    async def wait_in_turns(sample, question):
        await asyncio.sleep(0.1 * int(question.example.question[-1]))
        return await interrupt(sample, question)

    for play in (wait, wait_in_turns):  # the deadline is one for all conversations, which wait at the same time
        rollout = make_rollout(play, parts.tokenizer, deadline_s=0.15)
        with pytest.raises(UsageError, match=r"did not continue for 0\.15 s .*raise --rollout-deadline-s"):
            sample_responses(parts.engine, rollout, parts.questions, Sampling(), seed=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def play(sample, question): pass", "must be an `async def`"),
        ("async def play(sample): pass", r"must take \(sample, question\)"),
        ("async def other(sample, question): pass", "has no function play"),
    ],
)
def test_load_rollout_that_cannot_be_played_is_an_error(tmp_path, source, message):
    file = tmp_path / f"tool_{abs(hash(source))}.py"
    file.write_text(source)
    with pytest.raises(UsageError, match=message):
        load_rollout(ConversationSettings(rollout=f"{file}:play"), make_tiny_tokenizer())


def test_rollout_settings_without_a_function_are_refused():
    with pytest.raises(UsageError, match="--rollout calculator: must be your own function as"):
        ConversationSettings(rollout="calculator")
    with pytest.raises(UsageError, match=r"--rollout-deadline-s 5\.0: has no effect without --rollout"):
        ConversationSettings(rollout_deadline_s=5.0)


# --- the example -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("turns", "response"),
    [
        ([" 35 + 2 =", " </think>"], " 35 + 2 = 37 </think>"),
        (["7 * 6=", "!"], "7 * 6= 42!"),
        (["4 - 9 =", "=", "."], "4 - 9 = -5=."),  # nothing to compute before the second sign
        (["no sum"], "no sum"),
    ],
)
def test_calculator_example_inserts_results(turns, response):
    tokenizer, said = make_tiny_tokenizer(), iter(turns)

    class Engine:
        def generate(self, prompts, sampling, *, seed):
            text = next(said)
            ids = tokenizer.encode(text, add_special_tokens=False)
            return [Completion(text, tuple(prompts[0]), tuple(ids), (-1.0,) * len(ids), "stop")]

    settings = ConversationSettings(rollout=f"{ROOT / 'docs/examples/calculator.py'}:play")
    (one,) = sample_responses(Engine(), load_rollout(settings, tokenizer), [QUESTION], Sampling(stop=()), seed=0)
    assert one.text == response
    assert "".join(c for c, flag in zip(one.text, one.sampled, strict=True) if flag) == "".join(turns)

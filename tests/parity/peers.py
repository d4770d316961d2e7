"""TRL, verl and Liger running their own code on a `Case`: nothing of theirs is typed out again here.

TRL's formulas are methods of its trainers. A real trainer is built, around a model of 100k parameters, so that its
settings are what its own constructor makes of its own defaults; then the method is called with a model that returns
the log-probabilities of the case. verl's are functions of a registry, Liger's a static method.
"""

import contextlib
import functools
import importlib.resources
import importlib.util
import inspect
import io
import logging
import tempfile
import warnings
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from tests.parity.cases import Case
from tests.tiny import make_tiny_policy, make_tiny_tokenizer

NAMES = {"TRL": "trl", "verl": "verl", "Liger": "liger_kernel"}
MISSING = [name for name, module in NAMES.items() if importlib.util.find_spec(module) is None]

if not MISSING:
    # Loading them warns of versions of packages that nothing here uses.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import verl.utils.torch_functional as verl_functional
        from datasets import Dataset
        from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
        from omegaconf import OmegaConf
        from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
        from trl.experimental.gkd import GKDTrainer
        from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
        from trl.experimental.server_distillation import ServerDistillationTrainer
        from trl.rewards import get_soft_overlong_punishment
        from verl import DataProto
        from verl.trainer.config import AlgoConfig, RolloutCorrectionConfig
        from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
        from verl.trainer.ppo import core_algos, rollout_corr_helper
        from verl.workers.config import ActorConfig, DistillationLossConfig, PolicyLossConfig
        from verl.workers.reward_manager.dapo import DAPORewardManager

    logging.getLogger("trl").setLevel(logging.ERROR)
    TRAINERS = {
        "grpo": (GRPOTrainer, GRPOConfig),
        "gmpo": (GMPOTrainer, GMPOConfig),
        "rloo": (RLOOTrainer, RLOOConfig),
    }


def versions() -> dict[str, str]:
    return {name: version(module.replace("_", "-")) for name, module in NAMES.items()}


# TRL


@functools.cache
def trl_trainer(kind: str, rewards: int = 1, end_tokens: tuple[int, ...] = (), **config):
    """A trainer of TRL in training mode."""
    trainer_class, config_class = TRAINERS[kind]
    model = make_tiny_policy().train()
    model.generation_config.eos_token_id = list(end_tokens) or model.generation_config.eos_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=model,
            reward_funcs=[functools.partial(_given, column=column) for column in range(rewards)],
            # beta needs a reference model from the hub: it is set afterwards
            args=config_class(
                output_dir=tempfile.gettempdir(), report_to="none", use_cpu=True, bf16=False, **{"beta": 0.0} | config
            ),
            train_dataset=Dataset.from_dict({"prompt": ["1"]}),
            processing_class=make_tiny_tokenizer(),
        )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _given(column: int, **_):
    """A reward function that returns what it was given."""
    return [None if row[column] != row[column] else row[column] for row in _given.rewards.tolist()]


class _Returning:
    """A model whose log-probabilities and entropies are given."""

    def __init__(self, log_probs: Tensor, entropy: Tensor):
        prompt = torch.zeros(len(log_probs), 1, dtype=log_probs.dtype)
        whole = torch.cat([prompt, log_probs], dim=1)
        self.output = SimpleNamespace(
            log_probs=whole,
            entropy=torch.cat([prompt, entropy], dim=1),
            mean_logits=torch.zeros_like(whole),
            is_top1=torch.zeros_like(whole, dtype=torch.bool),
        )

    def __call__(self, **_):
        return self.output


@contextlib.contextmanager
def _set(thing, **attributes):
    before = dict(vars(thing))
    vars(thing).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                vars(thing)[name] = before[name]
            else:
                del vars(thing)[name]


def entropy_of(case: Case) -> Tensor:
    """Any entropies will do, as long as both sides get the same; float32, as TRL casts them."""
    return torch.distributions.Categorical(logits=case.logits).entropy().float()


def trl_loss(
    case: Case,
    kind: str = "grpo",
    *,
    mask: Tensor | None = None,
    kl_coef: float = 0.0,
    importance: Tensor | None = None,
    items: int | None = None,
    accumulation_steps: int = 1,
    **config,
) -> Tensor:
    """`_compute_loss` of the trainer; `importance` stands for what it made of the sampler's log-probabilities."""
    trainer = trl_trainer(kind, **config)
    mask = (case.mask if mask is None else mask).long()
    prompt = torch.ones(len(mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": case.advantages.squeeze(1),
        "old_per_token_logps": case.old,
        "sampling_per_token_logps": case.sampler,
        "ref_per_token_logps": case.reference,
        "old_logps": None if case.old is None else (case.old * mask).sum(dim=1),
        "num_items_in_batch": torch.tensor(int(mask.sum()) if items is None else items),
    }
    changes = {"beta": kl_coef, "current_gradient_accumulation_steps": accumulation_steps}
    if importance is not None:
        inputs["importance_sampling_ratio"] = importance
        changes["use_vllm"] = True
    with _set(trainer, **changes):
        loss = trainer._compute_loss(_Returning(case.policy, entropy_of(case)), inputs)
    return loss


def trl_metric(name: str, kind: str = "grpo", **config) -> float:
    """What the trainer logged last."""
    return trl_trainer(kind, **config)._metrics["train"][name][-1]


def trl_entropy_coefficient(case: Case, coefficient: float, target: float) -> float:
    """What its controller makes of it in one step."""
    options = {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_target": target}
    trainer = trl_trainer("grpo", **options)
    with _set(trainer, entropy_coef=coefficient, _entropy_window_stats=None, _last_world_entropy=0.0):
        trl_loss(case, **options)
        return trainer.entropy_coef


def trl_generated(
    case: Case,
    kind: str = "grpo",
    *,
    rewards: Tensor | None = None,
    kl_coef: float = 0.0,
    last_token: list[int] | None = None,
    **config,
):
    """What TRL makes of finished responses: its advantages, and its correction of the sampler's log-probabilities."""
    rewards = case.rewards if rewards is None else rewards
    _given.rewards = rewards[:, None] if rewards.dim() == 1 else rewards
    rows, size = len(case.mask), case.group_sizes[0]
    trainer = _generating(kind, rewards=_given.rewards.shape[1], rows=rows, size=size, **config)
    ends = attended(case.mask).sum(dim=1).tolist()
    ids = [[2] * (end - 1) + [last] for end, last in zip(ends, last_token or [2] * rows, strict=True)]
    rollout = {
        "prompt_ids": [[2]] * rows,
        "completion_ids": ids,
        "logprobs": [row[:end].tolist() for row, end in zip(case.sampler, ends, strict=True)],
        "env_mask": [row[:end].long().tolist() for row, end in zip(case.mask, ends, strict=True)],
    }
    answers = iter([(case.old, None, None), (case.reference, None, None)])
    # Any reference model will do: its log-probabilities are among the answers.
    changes = {"_get_per_token_logps_and_entropies": lambda *_, **__: next(answers), "beta": kl_coef, "ref_model": 1}
    if kind == "grpo":
        changes |= {"rollout_func": lambda *_: rollout, "use_vllm": True, "_last_loaded_step": 0}
    else:
        changes |= {"_generate": lambda _: (rollout["prompt_ids"], ids, [""] * rows)}
    with _set(trainer, **changes):
        return trainer._generate_and_score_completions([{"prompt": "1"}] * rows)


def _generating(kind: str = "grpo", *, rewards: int = 1, rows: int, size: int, **config):
    return trl_trainer(kind, rewards=rewards, per_device_train_batch_size=rows, num_generations=size, **config)


def trl_mismatch(case: Case) -> Tensor:
    trl_generated(case)
    logged = _generating(rows=len(case.mask), size=case.group_sizes[0])._metrics["train"]
    return torch.tensor([logged[f"sampling/sampling_logp_difference/{name}"][-1] for name in ("mean", "max")])


def trl_truncated(case: Case, truncated: Tensor) -> dict:
    """What it makes of responses of which those that are not truncated end with the end token."""
    last = torch.where(truncated, 2, make_tiny_tokenizer().eos_token_id).tolist()
    return trl_generated(case, last_token=last, mask_truncated_completions=True)


def trl_keeps(case: Case, last: int, end_tokens: tuple[int, ...]) -> bool:
    """Whether a response that ends with `last` is no truncated one, for a model that declares `end_tokens`."""
    options = {"end_tokens": end_tokens, "mask_truncated_completions": True}
    return bool(trl_generated(case, last_token=[last] * len(case.mask), **options)["completion_mask"].all())


def trl_config_default(kind: str, name: str):
    return TRAINERS[kind][1].__dataclass_fields__[name].default


def trl_documentation() -> str:
    return GRPOConfig.__doc__


def attended(mask: Tensor) -> Tensor:
    """A response with what tools put into it."""
    return mask.flip(1).cumsum(1).flip(1) > 0


def trl_advantages(case: Case, kind: str = "grpo", **options) -> Tensor:
    return trl_generated(case, kind, **options)["advantages"]


def trl_importance(case: Case, mode: str, **config) -> Tensor:
    """One column for the modes of sequences."""
    return trl_generated(case, vllm_importance_sampling_mode=mode, **config)["importance_sampling_ratio"]


def trl_off_policy_mask(case: Case, threshold: float) -> Tensor:
    return GRPOTrainer.get_off_policy_mask(
        case.advantages, case.policy, case.sampler, case.mask.long(), threshold
    ).bool()


def trl_high_entropy_mask(case: Case, fraction: float) -> Tensor:
    return trl_trainer("grpo").get_high_entropy_mask(entropy_of(case), case.mask.long(), 1 - fraction)


def trl_overlong(lengths: list[int], longest: int, buffer: int) -> Tensor:
    return torch.tensor(get_soft_overlong_punishment(longest, buffer)([[0] * length for length in lengths]))


@functools.cache
def trl_dpo_trainer(**config):
    """Return a DPO trainer of TRL in training mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DPOTrainer(
            model=make_tiny_policy().train(),
            ref_model=make_tiny_policy(),
            args=DPOConfig(output_dir=tempfile.gettempdir(), report_to="none", use_cpu=True, bf16=False, **config),
            train_dataset=Dataset.from_dict({"prompt": ["1"], "chosen": ["2"], "rejected": ["3"]}),
            processing_class=make_tiny_tokenizer(),
        )


def trl_dpo_loss(case: Case, pairs: int, **config) -> Tensor:
    """Return `_compute_loss` of the trainer: the first `pairs` responses are preferred to the next ones."""
    mask = torch.nn.functional.pad(case.mask[: 2 * pairs].long(), (1, 0))
    inputs = {"completion_mask": mask, "input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask)}
    entropy = entropy_of(case)[: 2 * pairs]
    policy, reference = (
        _Returning(torch.where(case.mask, log_probs, 0.0)[: 2 * pairs], entropy)
        for log_probs in (case.policy, case.reference)
    )
    trainer = trl_dpo_trainer(**config)
    with _set(trainer, ref_model=reference):
        return trainer._compute_loss(policy, inputs, return_outputs=False)


def trl_jsd(student: Tensor, teacher: Tensor, mask: Tensor, beta: float, temperature: float) -> Tensor:
    """Return the loss of the GKD trainer: a mean over tokens."""
    labels = torch.where(mask, 0, -100)
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, temperature)


def trl_forward_kl(student: Tensor, best: tuple[Tensor, Tensor], mask: Tensor, *, add_tail: bool) -> Tensor:
    """Return the loss of the trainer whose teacher is a server, which returns the best log-probs and their tokens."""
    trainer = SimpleNamespace(
        loss_add_tail=add_tail, _reduce_divergence_loss=ServerDistillationTrainer._reduce_divergence_loss
    )
    result = {"topk_logprobs": best[0], "topk_token_ids": best[1]}
    return ServerDistillationTrainer._compute_server_forward_kl_loss(
        trainer, result, student.log_softmax(dim=-1), torch.where(mask, 0, -100)
    )


# verl


def verl_config(**options):
    """An actor's configuration: verl's defaults but for `options`, of which some belong to the policy loss."""
    nested = {name: options.pop(name) for name in list(options) if name in PolicyLossConfig.__dataclass_fields__}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(**nested),
        **options,
    )


def verl_loss(
    case: Case,
    name: str,
    aggregation: str = "token-mean",
    *,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
    **options,
) -> Tensor:
    """The policy loss registered under `name`."""
    loss, _ = core_algos.get_policy_loss_fn(name)(
        old_log_prob=case.old,
        log_prob=case.policy,
        advantages=case.advantages.expand(case.policy.shape),
        response_mask=case.mask if mask is None else mask,
        loss_agg_mode=aggregation,
        config=verl_config(**options),
        rollout_is_weights=importance,
    )
    return loss


def verl_aggregate(losses: Tensor, mask: Tensor, aggregation: str, **options) -> Tensor:
    return core_algos.agg_loss(losses, mask, aggregation, **options)


def verl_advantages(case: Case, name: str, *, token_rewards: Tensor | None = None, **options) -> Tensor:
    """The advantage estimator registered under `name`; a response's reward lies on its last token."""
    last = attended(case.mask).sum(dim=1, keepdim=True) - 1
    at_the_end = torch.zeros_like(case.old).scatter(1, last, case.rewards[:, None])
    advantages, _ = core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=at_the_end if token_rewards is None else token_rewards.clone(),
        response_mask=case.mask.long(),
        **{"index": case.groups.numpy(), "config": AlgoConfig()} | options,
    )
    return advantages


def verl_gdpo(case: Case) -> Tensor:
    keys = [f"reward {column}" for column in range(case.components.shape[1])]
    attended = torch.cat([torch.ones(len(case.mask), 1, dtype=torch.long), case.mask.long()], dim=1)
    return verl_advantages(
        case,
        "gdpo",
        config=AlgoConfig(gdpo_reward_keys=keys),
        non_tensor_batch=dict(zip(keys, case.components.T.numpy(), strict=True)),
        batch={"prompts": attended[:, :1], "attention_mask": attended},
    )


def _verl_correction(case: Case, **options) -> tuple:
    return rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
        case.old, case.sampler, case.mask.long(), **options
    )


def verl_importance(case: Case, level: str, threshold: float | str, **options) -> Tensor:
    correction, _, _ = _verl_correction(case, rollout_is=level, rollout_is_threshold=threshold, **options)
    return correction.batch["rollout_is_weights"]


def verl_rejection(case: Case, criterion: str, threshold: str) -> Tensor:
    """What is left of the mask."""
    _, mask, _ = _verl_correction(case, rollout_rs=criterion, rollout_rs_threshold=threshold)
    return mask.bool()


def verl_correction_metric(case: Case, name: str, threshold: float) -> Tensor:
    _, _, metrics = _verl_correction(case, rollout_is="token", rollout_is_threshold=threshold)
    return torch.tensor(metrics[f"rollout_corr/{name}"], dtype=torch.float64)


def verl_kl(case: Case, estimator: str) -> Tensor:
    return core_algos.kl_penalty(case.policy, case.reference, estimator)


def verl_forward_kl(student: Tensor, best: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of each token from the teacher's best log-probs and their tokens."""
    log_probs, ids = (torch.nested.nested_tensor(list(values), layout=torch.jagged) for values in best)
    found = compute_forward_kl_topk(
        student.flatten(0, 1)[None],
        log_probs,
        ids,
        SimpleNamespace(distillation_loss=DistillationLossConfig()),
        data_format="thd",
    )
    return found["distillation_losses"].view(student.shape[:2])


def verl_whiten(values: Tensor, mask: Tensor) -> Tensor:
    return verl_functional.masked_whiten(values, mask.long())


def verl_entropy(logits: Tensor) -> Tensor:
    return verl_functional.entropy_from_logits(logits)


def verl_overlong(lengths: list[int], longest: int, buffer: int) -> Tensor:
    """DAPO's reward manager, around a score that is always 0."""
    width = max(lengths)
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "", eos_token="<eos>")
    manager = DAPORewardManager(
        tokenizer,
        num_examine=0,
        compute_score=lambda **_: 0.0,
        max_resp_len=longest,
        overlong_buffer_cfg=SimpleNamespace(enable=True, len=buffer, penalty_factor=1.0, log=False),
    )
    attended = (torch.arange(width + 1) <= torch.tensor(lengths)[:, None]).long()
    batch = DataProto.from_dict(
        tensors={"prompts": attended[:, :1], "responses": attended[:, 1:], "attention_mask": attended},
        non_tensors={
            "reward_model": np.array([{"ground_truth": ""}] * len(lengths)),
            "data_source": np.array([""] * len(lengths)),
            "extra_info": np.array([{} for _ in lengths]),
        },
    )
    return manager(batch).sum(dim=1)


def verl_yaml(path: str):
    """A default of the trainer's own configuration file."""
    return functools.reduce(lambda node, key: node[key], path.split("."), _verl_yaml())


@functools.cache
def _verl_yaml():
    file = importlib.resources.files("verl.trainer.config") / "_generated_ppo_trainer.yaml"
    return OmegaConf.create(file.read_text())


def verl_preset(name: str):
    return getattr(RolloutCorrectionConfig, name)()


def verl_default_of(estimator: str, argument: str):
    return inspect.signature(core_algos.get_adv_estimator_fn(estimator)).parameters[argument].default


# Liger


def liger_dpo_loss(case: Case, pairs: int, **options) -> Tensor:
    """Return the loss inside the fused kernel, which takes the log-prob of each response."""
    policy, reference = (torch.where(case.mask, x, 0.0).sum(dim=1) for x in (case.policy, case.reference))
    loss, *_ = LigerFusedLinearDPOFunction.preference_loss_fn(
        policy[:pairs],
        policy[pairs : 2 * pairs],
        torch.zeros(2 * pairs, 1),
        reference[:pairs],
        reference[pairs : 2 * pairs],
        **options,
    )
    return loss


def liger_jsd(student: Tensor, teacher: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return the loss inside the fused kernel: a sum over tokens."""
    target = torch.where(mask, 0, -100).flatten()
    return LigerFusedLinearJSDFunction.distillation_loss_fn(
        student.flatten(0, 1), teacher.flatten(0, 1), beta=beta, target=target
    )


def liger_loss(case: Case, loss_type: str, **options) -> Tensor:
    """The loss inside its fused kernel, which takes log-probabilities."""
    mask = case.mask.to(case.old)
    loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        case.policy,
        mask,
        case.advantages.squeeze(1),
        mask,
        ref_per_token_logps=case.reference,
        old_per_token_logps=case.old,
        loss_type=loss_type,
        **{"beta": 0.0} | options,
    )
    return loss

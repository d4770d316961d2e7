"""Settings of evaluate.py."""

from dataclasses import dataclass
from typing import Literal

from drivers.common.errors import UsageError
from drivers.settings.base import check_number, stop_strings
from drivers.settings.recipes import EMBEDDED_MODEL
from drivers.settings.reward_spec import check_reward
from drivers.settings.sampling import Sampling


@dataclass(frozen=True)
class EvaluateConfig:
    """Grade a model's responses to the questions of a jsonl file, and keep them all."""

    model_path: str = EMBEDDED_MODEL
    """Folder or hub name of a Hugging Face causal language model; a checkpoint of train.py is one."""
    data_path: tuple[str, ...] = ("data/wordadd/validation.jsonl",)
    """Questions: jsonl with `question` and `answer`; several files are told apart in the results."""
    prompt_path: str = "data/prompts/wordadd.prompt"
    """Template of a prompt: a text file that contains {question}."""
    reward: str = "r1_zero"
    """How a response is graded. `r1_zero`: answer inside <answer> tags after </think>; `question_only`: in \\boxed{}
    anywhere; `countdown`: the tags around an expression of the given numbers; or a function of your own,
    `my_module:function` or `path/to/file.py:function` (docs/grading.md)."""
    output_dir: str | None = None
    """Where results.json and completions.jsonl go; it must not hold another evaluation's. Left out: a new folder under
    runs/."""

    n_examples: int | None = None
    """Use this many questions, from the top; left out: all."""
    n_samples: int = 1
    """Responses per question."""
    sampling_temperature: float = 1.0
    """0 is greedy."""
    sampling_top_p: float = 1.0
    """Sample from the likeliest tokens that have so much probability together."""
    sampling_min_tokens: int = 0
    """Before this many tokens a response may not end."""
    sampling_max_tokens: int = 1024
    """A response is cut off here."""

    engine: Literal["vllm", "hf"] = "vllm"
    """What samples: vLLM, or the model's own `generate`."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: the first GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, and on a CPU on which it measures faster."""
    gpu_memory_utilization: float = 0.85
    """Share of the GPU that vLLM may fill."""
    seed: int = 0
    """Of sampling."""

    reward_mix: tuple[str, ...] = ()
    """Of a --reward of your own that returns several numbers by name: the reward is their sum, weighted by these,
    `name=weight` each."""
    grader_workers: int = 0
    """Processes that grade; 0: half of the cores, at most 8."""
    grader_deadline_s: float = 10.0
    """Seconds for the grade of one response. What takes longer is not scored."""
    sampling_stop: tuple[str, ...] | None = None
    """Texts that end a response. Left out: </answer> under r1_zero and countdown, else none."""
    chat_template: bool = False
    """For instruct models: what --prompt-path makes of a question is the user's message in the tokenizer's chat
    template, and the token that ends a turn there ends a response."""
    system_prompt_path: str | None = None
    """Text file of the system message before it. Left out: none, or what the chat template has for one."""
    compare_to: str | None = None
    """Another model, which is asked the same questions, or the folder of an earlier evaluation that asked them: how
    much better --model-path is, with an interval and a test of paired differences."""
    n_shown: int = 2
    """Responses of each category (right, right in format alone, not even that) to show in the terminal."""

    def __post_init__(self) -> None:
        if not self.data_path:
            raise UsageError("data_path is empty; a file of questions is required")
        for name in ("n_samples", "sampling_max_tokens", "gpu_memory_utilization", "grader_deadline_s"):
            check_number(name, getattr(self, name), "must be greater than 0", above=0)
        for name in ("sampling_temperature", "sampling_min_tokens", "grader_workers", "n_shown"):
            check_number(name, getattr(self, name), "must not be negative", least=0)
        if not 0 < self.sampling_top_p <= 1:
            raise UsageError(f"sampling_top_p={self.sampling_top_p} must be greater than 0 and at most 1")
        if self.n_examples is not None:
            check_number("n_examples", self.n_examples, "must be greater than 0", above=0)
        if self.sampling_min_tokens > self.sampling_max_tokens:
            raise UsageError(
                f"sampling_min_tokens={self.sampling_min_tokens} must not exceed "
                f"sampling_max_tokens={self.sampling_max_tokens}"
            )
        if self.sampling_temperature == 0 and self.n_samples > 1:
            raise UsageError(
                f"n_samples={self.n_samples} with sampling_temperature=0: a greedy response is the same each time; "
                "give one of the two another value"
            )
        if self.system_prompt_path is not None and not self.chat_template:
            raise UsageError(f"system_prompt_path={self.system_prompt_path} has no effect: it asks for chat_template")
        check_reward(self.reward, self.reward_mix)

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            n=self.n_samples,
            temperature=self.sampling_temperature,
            top_p=self.sampling_top_p,
            min_tokens=self.sampling_min_tokens,
            max_tokens=self.sampling_max_tokens,
            stop=stop_strings(self.reward) if self.sampling_stop is None else self.sampling_stop,
        )

"""Settings of evaluate.py."""

from dataclasses import dataclass
from typing import ClassVar

from drivers.common.errors import UsageError
from drivers.settings.base import NonNegativeFloat, NonNegativeInt, PositiveInt
from drivers.settings.evaluation import name_sets
from drivers.settings.groups import EngineSettings, GradingSettings, ModelSettings, PromptSettings
from drivers.settings.recipes import EMBEDDED_MODEL
from drivers.settings.sampling import ConversationSettings, NucleusSettings, Sampling, make_sampling


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(
    EngineSettings, ConversationSettings, NucleusSettings, GradingSettings, PromptSettings, ModelSettings
):
    """Grade a model's responses to questions, and write all of them down.

    The model of a run is asked as in that run: unless a flag sets them, questions, prompt, reward and sampling are
    those of the run's config.json.
    """

    heading: ClassVar[str] = "run"

    model_path: str = EMBEDDED_MODEL
    """Model to evaluate: a folder or Hugging Face hub name of a causal language model, such as a checkpoint."""
    data_path: tuple[str, ...] = ("data/wordadd/validation.jsonl",)
    """Questions: JSONL with `question` and `answer`. Several files are reported separately; `name=path` gives one a
    name other than its own."""
    prompt_path: str = "data/prompts/wordadd.prompt"
    n_examples: PositiveInt | None = None
    """Number of questions to ask, from the top of each file. Default: all."""
    n_samples: PositiveInt = 1
    """Responses per question."""
    sampling_temperature: NonNegativeFloat = 1.0
    """Temperature of sampling; 0 is greedy."""
    sampling_min_tokens: NonNegativeInt = 0
    device: str = "auto"
    """Device of the model: cpu, cuda or cuda:N. `auto` is the first GPU, else the CPU."""
    output_dir: str | None = None
    """Folder for results.json and completions.jsonl; it must not contain another evaluation. Default: a new folder
    under runs/."""
    compare_to: str | None = None
    """Compare with another model, which is asked the same questions, or with the folder of an earlier evaluation that
    asked them: reports the paired difference with an interval and a test. Default: no comparison."""
    self_check_tolerance: float | None = None
    """Largest mean absolute log-prob difference, in nats, between the engine and the model on some of the engine's
    samples; above it nothing is evaluated. Default: 0.001 in float32, 0.08 in bfloat16, 0.01 in float16."""
    n_shown: NonNegativeInt = 2
    """Responses of each category (correct, correct format only, neither) to print."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare_to is not None and self.long_prompts == "drop":
            raise UsageError(
                f"{self.flag('compare_to')}: both models must get the same questions, but --long-prompts drop may "
                "leave out others for each tokenizer; pass --long-prompts refuse"
            )
        name_sets("--data-path", self.data_path)
        if self.sampling_temperature == 0 and self.n_samples > 1:
            raise UsageError(
                f"{self.flag('n_samples')}: greedy responses are all the same; pass --n-samples 1, or a "
                "--sampling-temperature above 0"
            )

    @property
    def sampling(self) -> Sampling:
        """Return the parameters that draw the responses to a question."""
        return make_sampling(self, self.reward, self.n_samples)

"""A teacher: a model that scores the policy's tokens."""

from typing import Any

from drivers.common.errors import UsageError
from drivers.policy.loading import count_embeddings, load_tokenizer, name_flag, resolve_model


def resolve_teacher(teacher: str, model_path: str, tokenizer: Any) -> str:
    """Return the teacher's folder or Hub name. Raise a UsageError if it cannot score every token of the policy.

    `tokenizer` is the policy's. Equal ids must mean equal tokens, because the teacher gets the ids that were sampled.
    """
    with name_flag("--teacher"):
        path = resolve_model(teacher)
        vocabulary, n_embeddings = load_tokenizer(path).get_vocab(), count_embeddings(path)
    different = vocabulary.items() ^ tokenizer.get_vocab().items()
    if different:
        token, number = min(different, key=lambda pair: (pair[1], pair[0]))
        raise UsageError(
            f"--teacher {teacher}: its tokenizer is not the policy's ({token!r} has id {number} in only one of them); "
            "pass a teacher with the tokenizer of --model-path"
        )
    if n_embeddings < count_embeddings(model_path):
        raise UsageError(
            f"--teacher {teacher}: has {n_embeddings} embeddings, fewer than the policy's "
            f"{count_embeddings(model_path)}; pass a teacher that has as many"
        )
    return path

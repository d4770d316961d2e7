"""Find files that the repository ships."""

from pathlib import Path


def repository_path(path: str) -> Path:
    """Return `path` if it exists in the current folder, else the same path in the repository if it exists there."""
    in_repository = Path(__file__).resolve().parents[2] / path
    return in_repository if in_repository.exists() and not Path(path).exists() else Path(path)

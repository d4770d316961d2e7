"""Find files that the repository ships."""

from pathlib import Path


def repository_path(path: str) -> Path:
    """Return `path` relative to the current folder, else relative to the repository or the installed package."""
    drivers = Path(__file__).resolve().parents[1]
    places = (Path(path), drivers.parent / path, drivers / "shipped" / path)
    return next((place for place in places if place.exists()), Path(path))

"""The settings that come with the package, by name. Imports nothing heavy, so that `--help` can list them."""

from pathlib import Path


def preset_files() -> dict[str, Path]:
    """Names of the presets of this package, and their files."""
    package_folder = Path(__file__).parent
    # Inside the package in a wheel, at the top of the repository in an editable install.
    folders = (package_folder / "configs", package_folder.parents[1] / "configs")
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))]
    return {file.stem: file for file in reversed(files)}

"""The settings that come with the package, by name. Imports nothing heavy, so that `--help` can list them."""

import importlib.util
from pathlib import Path


def preset_files() -> dict[str, Path]:
    """Names of the presets of the installed package, and their files; none where it is not installed."""
    package = importlib.util.find_spec("holitom_hf")
    if package is None:
        return {}
    package_folder = Path(package.origin).parent
    # Inside the package in a wheel, at the top of the repository in an editable install.
    folders = (package_folder / "configs", package_folder.parents[1] / "configs")
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))]
    return {file.stem: file for file in reversed(files)}

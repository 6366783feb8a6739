"""`python -m tests_upstream.download FOLDER`: the tests of the installed transformers' source distribution."""

import subprocess
import sys
import tarfile
from pathlib import Path

import transformers


def download_tests(cache: Path) -> Path:
    """
    Downloads with pip, unpacks, and returns the folder of tests; what is there already is not downloaded again.

    Raises:
        FileNotFoundError: If this version's source distribution carries no tests.
    """
    name = f"transformers-{transformers.__version__}"
    tests = cache / name / "tests"
    if not tests.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        requirement = f"transformers=={transformers.__version__}"
        subprocess.run([*pip, "--no-deps", "--no-binary", ":all:", "--dest", cache, requirement], check=True)
        with tarfile.open(cache / f"{name}.tar.gz") as archive:
            members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(cache, members, filter="data")
        (tests / "__init__.py").touch()
    if not (tests / "test_modeling_common.py").is_file():
        raise FileNotFoundError(f"the source distribution of {name} carries no tests/test_modeling_common.py")
    return tests


if __name__ == "__main__":
    print(download_tests(Path(sys.argv[1])))

"""What installs the project: the lock fits the requirements, the Dockerfile copies what is there."""

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import google_crc32c
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
FOLDER = "quintet-0.1.0.dist-info"


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_a_version_within_every_range(python):
    about = {"python_version": python, "python_full_version": f"{python}.0"}
    about |= {"sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix"}
    locked = {}
    for each in requirements("requirements.lock"):
        if each.marker is None or each.marker.evaluate(about):
            name = canonicalize_name(each.name)
            assert name not in locked, f"two versions of {name} for Python {python}"
            locked[name] = str(each.specifier).removeprefix("==")
    for wanted in requirements("requirements.txt"):
        assert locked[canonicalize_name(wanted.name)] in wanted.specifier, wanted


def test_the_dockerfile_copies_files_that_are_there_and_runs_valid_shell():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    commands = re.findall(r"^([A-Z]+) (.+)$", text, re.M)
    copied = [words.split()[0] for name, words in commands if name == "COPY"]
    assert copied == ["requirements.txt", "."]
    assert all((ROOT / path).exists() for path in copied)
    for shell in (words for name, words in commands if name == "RUN"):
        subprocess.run(["bash", "-n", "-c", shell], check=True)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "data", "output"} <= set(ignored)


def test_pip_install_brings_the_requirements_and_the_extras(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("base", "models"):  # packages that setuptools finds where it looks for them
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    program = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        about = message_from_string(wheel.read(f"{FOLDER}/METADATA").decode())
    assert {name.split("/")[0] for name in names} == {FOLDER}
    wanted = [Requirement(line) for line in about.get_all("Requires-Dist")]
    always = {str(each) for each in wanted if each.marker is None}
    assert always == {str(each) for each in requirements("requirements.txt")}
    extra = [each for each in wanted if each.marker and each.marker.evaluate({"extra": "demo"})]
    assert [each.name for each in extra] == ["gradio"]


def test_checksums_of_tfrecord_files_are_computed_in_c():
    # google-crc32c 1.5 needs pkg_resources, which setuptools no longer has: 5 MB/s instead of GB/s
    assert google_crc32c.implementation == "c"

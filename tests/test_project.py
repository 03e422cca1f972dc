"""Files that must say the same thing do."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import reglib
from reglib.objectives.similarity import ncc
from reglib.registration import Registration

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by their canonical name."""
    parsed = map(Requirement, lines)
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pins(name: str) -> dict[str, str]:
    """Exact versions of a requirements file."""
    lines = [line for line in text_of(name).splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", line), f"{name}: not a pin: {line}"
        package, version = line.split("==")
        found[canonicalize_name(package)] = version
    return found


def tracked_files() -> list[str]:
    """Files of the repository as git lists them, untracked ones included."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [name for name in listing.splitlines() if (ROOT / name).is_file()]


def test_torch_is_a_lower_bound_only():
    assert str(requirements(PROJECT["dependencies"])["torch"].specifier) == ">=2.6"


def test_environment_yml_agrees_with_pyproject():
    environment = yaml.safe_load(text_of("environment.yml"))
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    listed = requirements([item.replace("pytorch", "torch") for item in conda])
    for name, wanted in requirements(PROJECT["dependencies"]).items():
        assert listed.pop(name).specifier == wanted.specifier, name
    assert str(listed.pop("python").specifier) == PROJECT["requires-python"]
    book = requirements(PROJECT["optional-dependencies"]["book"])
    for name in set(listed) - {"pip"}:
        assert listed[name].specifier == book[name].specifier, name
    [pip] = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["-e .[book,test]"]


def test_constraints_pin_what_pyproject_names_within_its_bounds():
    pinned = pins("constraints.txt")
    extras = PROJECT["optional-dependencies"]
    for lines in (PROJECT["dependencies"], extras["book"], extras["test"]):
        for name, wanted in requirements(lines).items():
            assert Version(pinned[name]) in wanted.specifier, name


def test_oracle_file_holds_pins_and_marks_what_make_installs_alone():
    assert pins("requirements-oracles.txt")["digital-diffeomorphism"] == "1.1.1"
    alone = text_of("requirements-oracles.txt").split("# --no-deps", 1)[1]
    assert re.findall(r"^([\w-]+)==", alone, re.MULTILINE) == ["digital-diffeomorphism"]


def test_one_version():
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == reglib.__version__
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "reglib/__init__.py"
    assert PROJECT["dynamic"] == ["version"]


def test_one_repository_address():
    address = reglib.REPOSITORY
    assert address in reglib.INSTALL_SOURCE
    assert PROJECT["urls"]["Repository"] == address
    assert all(url.startswith(address) for url in PROJECT["urls"].values())
    assert yaml.safe_load(text_of("_config.yml"))["repository"]["url"] == address
    assert yaml.safe_load(text_of("CITATION.cff"))["repository-code"] == address
    assert f"git+{address}" in text_of("README.md")


def test_no_file_names_another_address():
    """A fork changes the constant and is told of every other place."""
    host, own = reglib.REPOSITORY.removeprefix("https://").split("/", 1)
    for name in tracked_files():
        if Path(name).suffix in {".png", ".npz", ".gz", ".mat", ".safetensors"}:
            continue
        text = text_of(name)
        found = re.findall(rf"{re.escape(host)}/([\w-]+/reglib)\b", text)
        found += [f"{owner}/reglib" for owner in re.findall(r"([\w-]+)\.github\.io/reglib", text)]
        assert set(found) <= {own}, name


def test_readme_is_short_and_its_picture_and_links_exist():
    text = text_of("README.md")
    assert len(text.splitlines()) <= 80
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", text)
    links += re.findall(r"src=\"(?!https?://)([^\"]+)\"", text)
    assert "book/_static/readme.png" in links
    for link in links:
        assert (ROOT / link).exists(), link
    for link in re.findall(rf"{reglib.REPOSITORY}/blob/main/([^)\s]+)", text):
        assert (ROOT / link).exists(), link
    assert "make test" in text
    assert "make book" in text


def test_readme_code_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    fixed = names["fixed"].image
    assert names["warped_labels"].tensor.shape == fixed.tensor.shape
    # Deformable registration must do better than leaving the brains where they are.
    before, after = (
        ncc(image.tensor, fixed.tensor).item()
        for image in (
            Registration(
                affine=torch.eye(4).unsqueeze(0),
                field=torch.zeros(1, 3, *fixed.tensor.shape[2:]),
                fixed_affine=fixed.affine,
                moving_affine=names["moving"].image.affine,
                moving_shape=tuple(names["moving"].image.tensor.shape[2:]),
            ).apply(names["moving"].image),
            names["registration"].apply(names["moving"].image),
        )
    )
    assert after < before / 2
    assert (tmp_path / "result" / "field.nii.gz").is_file()
    assert re.fullmatch(r"\d+\.\d\d % of the voxels fold\n", capsys.readouterr().out)


def test_readme_quotes_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", "book/index.md"):
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", text_of(name), re.MULTILINE)) <= targets


def test_workflows_call_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.stem for path in workflows] == ["book", "notebooks", "tests"]
    for path in workflows:
        called = set(re.findall(r"\bmake ([a-z]+)", path.read_text(encoding="utf-8")))
        assert called, path.name
        assert called <= targets
    versions = yaml.safe_load(text_of(".github/workflows/tests.yml"))["jobs"]["test"]["strategy"]
    assert versions["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_toc_holds_every_notebook_and_every_page():
    toc = yaml.safe_load(text_of("book/_toc.yml"))
    listed = {toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])}
    pages = {f"book/{path.stem}" for path in (ROOT / "book").glob("*.md")}
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert listed == pages | notebooks


def test_console_script_is_reserved():
    [script] = [e for e in entry_points(group="console_scripts") if e.name == "reglib"]
    assert script.value == "reglib.cli:main"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names of the files in a wheel built from the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, str(ROOT), *options], check=True)
    [path] = folder.glob("*.whl")
    assert path.stat().st_size < 15e6
    return set(zipfile.ZipFile(path).namelist())


def test_wheel_holds_code_and_data_and_nothing_else(wheel):
    packaged = {n for n in wheel if not re.match(r"reglib-[\w.]+\.dist-info/", n)}
    files = tracked_files()
    below = {n for n in files if n.startswith("reglib/")}
    assert packaged == below | {f"reglib/{n}" for n in files if n.startswith("results/")}
    assert "reglib/py.typed" in packaged
    assert any(n.endswith(".mplstyle") for n in packaged)
    assert any(n.startswith("reglib/data/samples/") for n in packaged)
    assert any(n.endswith(".safetensors") for n in packaged)
    for licence in ("LICENSE", "NOTICE"):
        assert any(n.endswith(f"dist-info/licenses/{licence}") for n in wheel)


def test_embedded_data_stay_small():
    sizes = {
        suffix: sum(
            (ROOT / name).stat().st_size for name in tracked_files() if re.search(pattern, name)
        )
        for suffix, pattern in {
            "samples": r"^reglib/data/samples/",
            "weights": r"\.safetensors$",
        }.items()
    }
    assert 0 < sizes["samples"] <= 8e6
    assert 0 < sizes["weights"] <= 5e6


def test_no_git_object_is_large():
    large = [n for n in tracked_files() if (ROOT / n).stat().st_size > 4 * 2**20]
    assert large == []


def test_nothing_is_skipped_but_where_an_oracle_is_absent():
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"mark\.(?:skip|xfail)|pytest\.(?:skip|xfail)\(", text), path.name
        skippable = re.findall(r"importorskip\(\s*[\"'](\w+)", text)
        assert set(skippable) <= {"monai", "digital_diffeomorphism"}, path.name

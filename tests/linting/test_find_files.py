"""Which files of a folder the doctor reads: the user's own, each once, and no endless walk."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from microbatch.linting.find_files import find_files, shown
from microbatch.linting.finding import Finding

FILES = [
    "train.py",
    "nested/deep/model.py",
    "nested/notes.ipynb",
    "readme.md",
    ".hidden.py",
    ".git/hook.py",
    ".venv/lib/torch.py",
    "env/lib/torch.py",
    "node_modules/gyp/gyp.py",
    "build/lib/train.py",
    "__pycache__/train.py",
    "old/train_v1.py",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "env" / "pyvenv.cfg").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*paths: str, exclude: Sequence[str] = (), base: Path | None = None) -> list[str]:
    files = find_files([Path(path) for path in paths], exclude=exclude, base=base)
    return [f"{file.path}: {file.message}" if isinstance(file, Finding) else shown(file) for file in files]


def test_a_folder_is_walked_without_what_is_not_the_users_own(folder: Path) -> None:
    everything = ["train.py", "nested/notes.ipynb", "nested/deep/model.py", "old/train_v1.py"]
    assert found(".") == everything
    assert found(str(folder)) == everything


def test_what_is_named_is_read_whatever_it_is_called(folder: Path) -> None:
    assert found(".hidden.py", "build", "readme.md") == [".hidden.py", "build/lib/train.py", "readme.md"]


def test_a_file_is_found_once(folder: Path) -> None:
    assert found("train.py", "./train.py", str(folder / "train.py"), ".")[:2] == ["train.py", "nested/notes.ipynb"]


@pytest.mark.parametrize("exclude", ["old", "old/", "./old", "train_*.py", "old/train_v1.py", "*/train_v1.py"])
def test_patterns_leave_out_names_and_paths(folder: Path, exclude: str) -> None:
    assert found(".", exclude=[exclude]) == ["train.py", "nested/notes.ipynb", "nested/deep/model.py"]


def test_patterns_are_relative_to_the_folder_of_the_settings(folder: Path) -> None:
    assert found("nested", exclude=["nested/deep"]) == ["nested/notes.ipynb"]
    assert found("nested", exclude=["deep/model.py"], base=folder / "nested") == ["nested/notes.ipynb"]
    assert found("nested", exclude=["deep/model.py"]) == ["nested/notes.ipynb", "nested/deep/model.py"]


def test_a_path_that_is_not_there_is_a_finding(folder: Path) -> None:
    assert found("gone.py", "train.py") == ["gone.py: cannot be read: there is no such file or folder", "train.py"]
    assert "cannot be read" in found("a\0b")[0]
    assert "cannot be read" in found("a" * 5_000)[0]


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    before = found(".")
    (folder / "nested" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "self.py").symlink_to(folder / "self.py")
    (folder / "broken.py").symlink_to(folder / "gone.py")
    (folder / "again.py").symlink_to(folder / "train.py")
    assert [name for name in found(".") if name not in {"self.py", "broken.py"}] == ["again.py", *before[1:]]
    # The negative control: a walk that follows them does not end by itself.
    steps = 0
    for _ in os.walk(folder, followlinks=True):
        steps += 1
        if steps > 100:
            break
    assert steps > 100


def test_a_deep_tree_is_walked(folder: Path) -> None:
    deep = folder / "/".join(["d"] * 400)
    deep.mkdir(parents=True)
    (deep / "end.py").touch()
    assert found("d") == ["d/" * 400 + "end.py"]

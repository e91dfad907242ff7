"""Settings come from the nearest pyproject.toml that has a table of the doctor's, and flags go over them."""

from pathlib import Path

import pytest

from microbatch.errors import ConfigError, LintError
from microbatch.linting.settings import DoctorSettings, read_settings

TABLE = "[tool.microbatch.doctor]\n"


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(text)
    return folder


def test_without_a_file_everything_is_reported(tmp_path: Path) -> None:
    settings = read_settings(tmp_path)
    assert settings == DoctorSettings()
    assert settings.keeps("MB105")


def test_the_nearest_table_counts(tmp_path: Path) -> None:
    write(tmp_path, TABLE + 'select = ["MB1", "mb201"]\nignore = ["MB110"]\nexclude = ["old"]\nstrict = true\n')
    inner = write(tmp_path / "a" / "b", "[tool.other]\nx = 1\n")
    settings = read_settings(inner / "train.py")
    assert settings == DoctorSettings(("MB1", "MB201"), ("MB110",), ("old",), strict=True, base=tmp_path)
    nearer = write(tmp_path / "a", TABLE)
    assert read_settings(inner) == DoctorSettings(base=nearer)


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    write(tmp_path, TABLE + 'select = ["MB1"]\nignore = ["MB110"]\nexclude = ["old"]\n')
    settings = read_settings(tmp_path, select=["MB2,MB3"], ignore=["MB201", "tail-leaks"], exclude=["a,b"], strict=True)
    assert settings == DoctorSettings(("MB2", "MB3"), ("MB201", "MB110"), ("a", "b"), strict=True)


@pytest.mark.parametrize(
    ("select", "ignore", "kept"),
    [
        ((), (), {"MB101", "MB105", "MB201"}),
        (("MB1",), (), {"MB101", "MB105"}),
        (("MB1",), ("MB105",), {"MB101"}),
        (("MB105",), ("MB1",), {"MB105"}),
        ((), ("MB1",), {"MB201"}),
        (("ALL",), ("MB1",), {"MB201"}),
        ((), ("ALL",), set[str]()),
        (("window-phase",), (), {"MB105"}),
        (("MB105",), ("MB105",), set[str]()),
    ],
)
def test_codes_and_their_beginnings(
    tmp_path: Path, select: tuple[str, ...], ignore: tuple[str, ...], kept: set[str]
) -> None:
    settings = read_settings(tmp_path, select=select, ignore=ignore)
    assert {code for code in ("MB101", "MB105", "MB201") if settings.keeps(code)} == kept
    assert settings.keeps("MB000")  # what could not be read is always said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("selct = []", "no key 'selct'; its keys are select, ignore, exclude and strict"),
        ('select = "MB1"', "select must be a list of texts, not 'MB1'"),
        ("ignore = [1]", "ignore must be a list of texts, not [1]"),
        ('strict = "yes"', "strict must be true or false, not 'yes'"),
        ("strict = 1", "strict must be true or false, not 1"),
        ("select = [", "is not TOML"),
    ],
)
def test_what_cannot_work_is_refused_with_the_file_and_the_value(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, TABLE + text)
    with pytest.raises(ConfigError, match=r"pyproject\.toml") as error:
        read_settings(tmp_path)
    assert words in str(error.value)


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "[tool.microbatch]\ndoctor = true\n")
    with pytest.raises(ConfigError, match="must be a table, not True"):
        read_settings(tmp_path)


def test_a_code_that_no_rule_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LintError, match="'MB9'"):
        read_settings(tmp_path, select=["MB9"])
    write(tmp_path, TABLE + 'ignore = ["E501"]')
    with pytest.raises(LintError, match="'E501'"):
        read_settings(tmp_path)


def test_files_of_others_are_no_concern(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes(b"\xff\xfe broken [")
    assert read_settings(tmp_path) == DoctorSettings()
    write(tmp_path, "broken [")
    assert read_settings(tmp_path) == DoctorSettings()
    assert read_settings(Path("nul\0l")) == DoctorSettings()

"""The rubric library: what ships, what is refused, what a judge gets to read."""

from pathlib import Path

import pytest

from raylign.errors import ConfigError
from rewards.judging.rubrics import library, library_rubric, load_rubric, principle_rubric


def test_the_library_covers_pictures_reasoning_and_code_in_every_mode() -> None:
    assert set(library()) == {"code", "image_quality", "reasoning_quality", "text_to_image_alignment"}
    for rubric in library().values():
        assert rubric.modes == ("point", "pair", "binary")
        assert rubric.source
        assert rubric.task == rubric.task.strip()


def test_options_have_the_labels_of_the_layout() -> None:
    rubric = library_rubric("code")
    assert list(rubric.options("point", "r3")) == ["1", "2", "3", "4", "5"]
    assert list(rubric.options("binary", "r3")) == ["true", "false"]
    pair = rubric.options("pair", "mr3")
    assert list(pair) == ["Assistant A", "Assistant B"]
    assert pair["Assistant B"].startswith("Assistant B is")
    assert "{" not in "".join(pair.values())
    assert rubric.options("pair", "r3")["Response 1"].startswith("Response 1 is")


def test_a_wrong_name_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'image_quality'"):
        library_rubric("image-quality")
    with pytest.raises(ConfigError, match="there are: code, "):
        library_rubric("zzz")


def test_an_own_file_is_read_by_configuration_only(tmp_path: Path) -> None:
    path = tmp_path / "manners.toml"
    path.write_text('name = "manners"\ntask = "t"\n[binary]\ntrue = "polite"\nfalse = "rude"\n', encoding="utf-8")
    rubric = load_rubric(str(path))
    assert (rubric.name, rubric.version, rubric.modes) == ("manners", 1, ("binary",))
    with pytest.raises(ConfigError, match="no point criteria, only binary"):
        rubric.options("point", "r3")
    with pytest.raises(ConfigError, match="no rubric"):
        library_rubric(str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('name = "other"\ntask = "t"\n[binary]\ntrue = "a"\nfalse = "b"\n', "name the file after"),
        ('name = "mine"\ntask = "t"\n', "needs criteria"),
        ('name = "mine"\ntask = "t"\n[point]\nscore_1 = "a"\n', "score_2"),
        ('name = "mine"\ntask = "t"\n[binary]\ntrue = "a"\nfalse = ""\n', "binary.false"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        load_rubric(str(path))


def test_a_principle_becomes_a_rubric_for_every_mode() -> None:
    rubric = principle_rubric("prefer short answers")
    assert "prefer short answers" in rubric.task
    assert rubric.modes == ("point", "pair", "binary")

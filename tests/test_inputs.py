"""Prompts: read from the command line or a file, one for each seed."""

import pytest

from dtrak.data.captions import choose_prompts, read_prompts


def test_a_text_or_the_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(" a wave \n\nfog\n", encoding="utf-8")
    assert read_prompts(str(file)) == ["a wave", "fog"]
    assert read_prompts("a wave.") == ["a wave."]
    # longer than a file name may be
    assert read_prompts("wave " * 100) == ["wave " * 100]


def test_files_that_hold_none(tmp_path):
    file = tmp_path / "prompts.txt"
    with pytest.raises(FileNotFoundError, match="--prompts must be a text or a file of them"):
        read_prompts(str(file))
    file.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="with one prompt per line, got none in"):
        read_prompts(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be a text file in UTF-8"):
        read_prompts(str(file))


def test_a_seed_keeps_its_prompt_whatever_is_drawn():
    assert choose_prompts(["a", "b"], range(5)) == ["a", "b", "a", "b", "a"]
    assert choose_prompts(["a", "b"], [3]) == ["b"]
    assert choose_prompts(["a", "b", "c"], range(3)) == ["a", "b", "c"]

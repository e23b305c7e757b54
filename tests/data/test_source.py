import logging
import shutil

import pytest

from moejax.data import DataError, TextFiles, python_stdlib


def split_names(source):
    return {s: [n for n, _ in source._split(s)] for s in ("train", "eval")}


def test_splits_are_disjoint_sorted_and_complete(folder):
    names = split_names(TextFiles(path=str(folder), holdout_every=5))
    assert names["train"] == sorted(names["train"])
    assert not set(names["train"]) & set(names["eval"])
    assert len(names["train"]) + len(names["eval"]) == 60
    assert 5 <= len(names["eval"]) <= 20


def test_split_and_fingerprint_do_not_depend_on_where_the_folder_is(folder, tmp_path):
    source = TextFiles(path=str(folder), holdout_every=5)
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, moved)
    other = TextFiles(path=str(moved), holdout_every=5)
    assert split_names(source) == split_names(other)
    for split in ("train", "eval"):
        assert source.fingerprint(split) == other.fingerprint(split)
        assert list(source.documents(split)) == list(other.documents(split))


def test_adding_a_file_moves_no_other_file_to_another_split(folder):
    source = TextFiles(path=str(folder), holdout_every=5)
    before = split_names(source)
    (folder / "aaa.py").write_text("x = 1\n")
    after = split_names(source)
    assert set(before["train"]) <= set(after["train"])
    assert set(before["eval"]) <= set(after["eval"])


def test_fingerprint_sees_an_edit_of_the_same_size_and_only_in_its_split(folder):
    source = TextFiles(path=str(folder), holdout_every=5)
    before = {s: source.fingerprint(s) for s in ("train", "eval")}
    path = folder / split_names(source)["eval"][3]
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    assert source.fingerprint("eval") != before["eval"]
    assert source.fingerprint("train") == before["train"]


def test_line_ends_are_kept(tmp_path):
    (tmp_path / "a.py").write_bytes(b"a\r\nb\rc\n")
    (tmp_path / "b.py").write_bytes(b"a\r\nb\rc\n")
    assert next(iter(TextFiles(path=str(tmp_path)).documents("train"))) == "a\r\nb\rc\n"


def test_junk_is_skipped_with_one_warning_that_names_the_first(folder, caplog):
    (folder / "a_latin1.py").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "b_binary.py").write_bytes(b"\x7fELF\0\0\1")
    (folder / "c_empty.py").write_bytes(b"")
    source = TextFiles(path=str(folder), holdout_every=1000)
    with caplog.at_level(logging.WARNING):
        texts = list(source.documents("train"))
    assert 55 <= len(texts) <= 60
    assert all("caf" not in t and "ELF" not in t for t in texts)
    (message,) = [r.getMessage() for r in caplog.records]
    assert "skipped 2 files" in message
    assert "a_latin1.py (byte 3 is not UTF-8)" in message


def test_exclude_and_pattern(tmp_path):
    for name in ("a.py", "b.txt", "build/c.py", "src/build2/d.py", "src/deep/er/e.py", "x_gen.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")

    def found(**kwargs):
        return [n for n, _ in TextFiles(path=str(tmp_path), **kwargs).files()]

    assert found(exclude=("build", "*_gen.py")) == ["a.py", "src/build2/d.py", "src/deep/er/e.py"]
    assert found(pattern="*.py", exclude=()) == ["a.py", "x_gen.py"]
    assert found(pattern="src/**/*.py") == ["src/build2/d.py", "src/deep/er/e.py"]
    assert found(pattern="*.txt") == ["b.txt"]


def test_bad_folders_are_named(tmp_path):
    missing = TextFiles(path=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere.*does not exist"):
        missing.fingerprint("train")
    with pytest.raises(DataError, match="holds no file that matches"):
        list(TextFiles(path=str(tmp_path)).documents("train"))
    (tmp_path / "one.py").write_text("x")
    with pytest.raises(DataError, match="at least two"):
        [list(TextFiles(path=str(tmp_path)).documents(s)) for s in ("train", "eval")]
    with pytest.raises(DataError, match="is a file"):
        list(TextFiles(path=str(tmp_path / "one.py")).documents("train"))
    with pytest.raises(DataError, match="holdout_every=1"):
        list(TextFiles(path=str(tmp_path), holdout_every=1).documents("train"))
    with pytest.raises(DataError, match="'test'"):
        list(TextFiles(path=str(tmp_path)).documents("test"))


def test_a_folder_of_junk_is_an_error(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.py").write_bytes(b"\0\1")
    with pytest.raises(DataError, match="no readable text"):
        list(TextFiles(path=str(tmp_path)).documents("train"))


def test_two_files_give_one_to_each_split(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(name)
    source = TextFiles(path=str(tmp_path))
    assert sorted([*source.documents("train"), *source.documents("eval")]) == ["a.py", "b.py"]


def test_python_stdlib_is_large_and_has_no_tests_or_packages():
    source = python_stdlib()
    names = [n for n, _ in source.files()]
    sizes = sum(p.stat().st_size for _, p in source.files())
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert 6e6 < sizes < 30e6
    parts = {part for n in names for part in n.split("/")}
    assert not parts & {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    assert not [n for n in names if "_sysconfigdata" in n]


def test_a_link_to_a_folder_is_not_followed_and_said(folder, tmp_path, caplog):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.py").write_text("text")
    (folder / "link").symlink_to(tmp_path / "other")
    (folder / "file_link.py").symlink_to(tmp_path / "other" / "x.py")
    with caplog.at_level(logging.WARNING):
        names = [name for name, _ in TextFiles(path=str(folder)).files()]
    assert "file_link.py" in names
    assert "link/x.py" not in names
    assert "links to folders" in caplog.text
    assert "the first is link" in caplog.text

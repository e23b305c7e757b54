"""Small corpora for the tests of moejax.data."""

import pytest

from moejax.data import ByteTokenizer, Data, TextFiles

WORDS = (
    *("def", "return", "import", "self", "yield", "lambda", "zero", "eins", "deux"),
    *("três", "четыре", "五", "🚀", "x1", "_y", "(a+b)*c"),
)


def text(number: int, num_words: int) -> str:
    """A text that names its number, with non-ASCII characters, indentation and line ends."""
    parts = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(num_words)]
    return f"# text {number}\n" + "".join(
        p + ("\n    " if i % 9 == 8 else " ") for i, p in enumerate(parts)
    )


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "default_cache"))


@pytest.fixture
def folder(tmp_path):
    """60 text files in two folders; lengths from 1 to 180 words."""
    for i in range(60):
        path = tmp_path / "corpus" / f"d{i % 2}" / f"f{i:02d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(i, 1 + 3 * i), encoding="utf-8")
    return tmp_path / "corpus"


@pytest.fixture
def data(folder, tmp_path):
    return Data(
        train=TextFiles(path=str(folder), holdout_every=5),
        tokenizer=ByteTokenizer(),
        cache_dir=str(tmp_path / "cache"),
    )

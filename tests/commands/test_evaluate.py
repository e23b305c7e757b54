"""`moejax evaluate` and `sample` on imported and published models, as a user types them."""

import json

import jax
import numpy as np
import pytest

from moejax.commands import main
from moejax.data.subword import HFTokenizer
from moejax.interop import hf


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path_factory.getbasetemp() / "moejax-cache"))


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    """What `import-hf` makes of it."""
    folder = tmp_path_factory.mktemp("imported") / "olmoe"
    assert main(["import-hf", str(published), str(folder)]) == 0
    return folder


def error_of(capsys, *words):
    """The last line: an earlier test's log may come before it."""
    assert main([str(word) for word in words]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    return last


def evaluated(tmp_path, *words):
    out = tmp_path / "out.json"
    assert main(["evaluate", *map(str, words), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def by_hand(folder, text):
    """Nats of all tokens of a text behind the end token, from one pass over all of it."""
    model, variables = hf.load(folder)
    tokenizer = HFTokenizer(path=str(folder)).prepare(None, "")
    ids = np.array([tokenizer.eos_id, *tokenizer.encode(text)])
    logits = jax.jit(lambda tokens: model.apply(variables, tokens).logits)(ids[None, :-1])
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)[0]
    return -log_probs[np.arange(len(ids) - 1), ids[1:]].sum(), len(ids) - 1


TEXT = "def tokenized(source):\n    return source\n"
QUESTIONS = [
    {"question": "return", "choices": ["source", "a tokenizer"], "answer": 0},
    {"question": "import", "choices": ["numpy", "ünlikely"], "answer": 1},
]


@pytest.mark.slow
def test_an_import_and_its_source_give_the_same_figures(
    published,
    imported,
    tmp_path,
    capsys,
):
    text, other, questions = (tmp_path / name for name in ("a.txt", "b.txt", "q.jsonl"))
    text.write_text(TEXT)
    other.write_text("yield 3\n")
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    words = ["--text", text, other, "--multiple-choice", questions, "--batch-tokens", 64]
    found = evaluated(tmp_path, imported, *words)
    shown = capsys.readouterr().out
    assert found | {"model": ""} == evaluated(tmp_path, published, *words) | {"model": ""}
    nats, count = by_hand(published, TEXT)
    figures = found["text"][str(text)]
    assert (figures["tokens"], figures["bytes"]) == (count, len(TEXT))
    assert figures["bits per byte"] == pytest.approx(nats / np.log(2) / len(TEXT), rel=1e-5)
    assert figures["perplexity per token"] == pytest.approx(np.exp(nats / count), rel=1e-4)
    assert found["text"]["all"]["bytes"] == len(TEXT) + 8
    for line in (f"{text}: {count} tokens", "2 questions", "acc_norm", "+- "):
        assert line in shown

    capsys.readouterr()
    assert main(["sample", str(imported), "--prompt", "def ", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_mistakes(imported, published, tmp_path, capsys):
    capsys.readouterr()
    assert "only a run has data of its own" in error_of(capsys, "evaluate", imported)
    assert "no run and has no step 3" in error_of(capsys, "evaluate", published, "--step", 3)
    text = error_of(capsys, "evaluate", imported, "--text", tmp_path / "nowhere")
    assert "cannot read" in text
    text = error_of(capsys, "evaluate", imported, "--stride", 3)
    assert "--stride is for --text" in text
    text = error_of(capsys, "evaluate", imported, "--length", 0)
    assert "--length 0 must be at least 1" in text
    text = error_of(capsys, "sample", imported, "--mesh", "expret=2", "--prompt", "a")
    assert "'expret=2' is not AXIS=N" in text
    text = error_of(capsys, "evaluate", "configs/tiny.py", "--text", "README.md")
    assert "configs/tiny.py is a file: name the folder" in text
    assert "no prompts are given" in error_of(capsys, "sample", imported)

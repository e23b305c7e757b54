"""`moejax trace` as a user types it: of a run, of a published model, of an import."""

import json
import sysconfig

import fiddle as fdl
import numpy as np
import pytest

from moejax.analysis.trace_file import TraceFile
from moejax.commands import main
from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.config.run_directory import store
from moejax.data.subword import train_bpe
from moejax.interop import hf
from moejax.train.checkpoint import Checkpointer
from moejax.train.init_from import CHECKPOINTS
from moejax.train.restore import TOKENIZER, fingerprints_of
from tests.interop.tiny_checkpoints import written
from tests.models.tiny_model import random_model_variables

TINY = "configs/tiny.py:smoke"
TEXTS = ("def one():\n    return 1\n", "Ein Satz, und noch einer. " * 3)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path_factory.getbasetemp() / "moejax-cache"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in zip(("python.txt", "german.txt"), TEXTS, strict=True):
        (folder / name).write_text(text)
    return [str(folder / "python.txt"), str(folder / "german.txt")]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A random OLMoE of two layers with a tokenizer, as transformers stores them."""
    folder = tmp_path_factory.mktemp("published") / "olmoe"
    config = hf.model_config(written("olmoe", folder.with_name("golden")))
    config.vocab_size, config.dtype, config.param_dtype = 300, "float32", "float32"
    model = fdl.build(config)
    hf.save(model, random_model_variables(model), folder)
    spec = train_bpe([text * 30 for text in TEXTS], 260).spec()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end = {"id": 259, "content": "<|end|>", "special": True} | flags
    (folder / "tokenizer.json").write_text(json.dumps(spec["model"] | {"added_tokens": [end]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder


def error_of(capsys, *words):
    assert main([str(word) for word in words]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def content(path):
    (batch,) = TraceFile(path).batches()
    return batch


def untrained_run(folder, **extra):
    """A run's folder with a checkpoint of step 3, without the cost of training."""
    config = apply_overrides(load_config(TINY), [f"workdir={folder}"])
    store(folder, config, {})
    experiment = build_config(config)
    data = experiment.prepare_data()
    data.tokenizer.save(folder / TOKENIZER)
    model = experiment.build_model(data.tokenizer.vocab_size)
    with Checkpointer(str(folder / CHECKPOINTS)) as checkpointer:
        checkpointer.save(3, random_model_variables(model), fingerprints_of(data) | extra)
        checkpointer.wait()
    return data


@pytest.mark.slow
def test_a_run(tmp_path, texts, capsys, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    data = untrained_run(run)
    assert main(["trace", str(run)]) == 0
    held_out = TraceFile(run / "traces" / "held_out.npz")
    assert held_out.num_tokens == data.num_held_out_tokens
    first = data.eval.batch(0)
    tokens = np.asarray(first.tokens)[np.asarray(first.segment_ids) > 0]
    np.testing.assert_array_equal(next(held_out.batches()).tokens, tokens)
    assert held_out.info.documents == "pieces"
    assert held_out.info.sources == (sysconfig.get_paths()["stdlib"],)
    assert held_out.info.weights["step"] == 3
    assert held_out.info.tokenizer == data.tokenizer.fingerprint()

    words = ["trace", str(run), "--text", *texts]
    assert main(words) == 0
    once = run / "traces" / "python.npz"
    assert f"moejax report {once}" in capsys.readouterr().out
    assert TraceFile(once).info.sources == tuple(texts)
    assert TraceFile(once).num_documents == 2
    again = tmp_path / "again.npz"
    assert main([*words, "--output", str(again)]) == 0
    assert once.read_bytes() == again.read_bytes()
    monkeypatch.setattr(type(data.tokenizer), "fingerprint", lambda self: str(id(self)))
    for command in ("trace", "evaluate"):
        assert "give another tokenizer than the one it was" in error_of(capsys, command, run)


@pytest.mark.slow
def test_a_run_whose_held_out_data_changed_is_refused(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    untrained_run(run, held_out_fingerprint="another")
    for command in ("trace", "evaluate"):
        assert "held-out data are not what they were" in error_of(capsys, command, run)


@pytest.mark.slow
def test_a_published_model_and_its_import_route_alike(published, tmp_path, texts, capsys):
    imported = tmp_path / "imported"
    assert main(["import-hf", str(published), str(imported)]) == 0
    options = ["--text", *texts, "--sequence-length", "32", "--output"]  # 4 sequences
    for name, folder in (("hf", published), ("import", imported)):
        assert main(["trace", str(folder), *options, str(tmp_path / f"{name}.npz")]) == 0
    one, other = (content(tmp_path / f"{name}.npz") for name in ("hf", "import"))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.experts, other.experts)
    np.testing.assert_array_equal(one.sequence_probs, other.sequence_probs)
    assert one.lengths.max() == 32
    prints = {TraceFile(p).info.weights["fingerprint"] for p in tmp_path.glob("*.npz")}
    assert len(prints) == 1
    assert "only a run has data of its own: name text" in error_of(capsys, "trace", imported)
    assert "has no step 1" in error_of(capsys, "trace", imported, "--step", 1, "--text", texts[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lines"], "are about the files of --text: name some"),
        (["--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["--output", "trace.txt"], "--output trace.txt must end in .npz"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt is no file"),
    ],
)
def test_mistakes_are_one_sentence(capsys, words, message):
    assert message in error_of(capsys, "trace", TINY, *words)

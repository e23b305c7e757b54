"""`moejax neighbours`: from prompts to the table that RoMA reads, and training with it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.commands import main
from moejax.data.subword import HFTokenizer
from moejax.interop import hf
from moejax.objectives.neighbours import Neighbours

CONFIG = "configs/router_tuning.py"
NUM_RIGHT = 8


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path_factory.getbasetemp() / "moejax-cache"))


@pytest.fixture(scope="module")
def records(published, tmp_path_factory):
    """A file of prompts, some of which are answered as the model itself would."""
    model, variables = hf.load(published)
    tokenizer = HFTokenizer(path=str(published)).prepare(None, "")
    prompts = [f"def f{i}(x{i % 7}" for i in range(60)]
    ids = [[tokenizer.eos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, own in zip(tokens, ids, strict=True):
        row[: len(own)] = own
    segments = (np.arange(tokens.shape[1]) < np.array([[len(own)] for own in ids])).astype(int)
    logits = model.apply(variables, jnp.asarray(tokens), segment_ids=jnp.asarray(segments)).logits
    said = [int(np.argmax(row[len(own) - 1])) for row, own in zip(logits, ids, strict=True)]
    lines, right = [], []
    for prompt, token in zip(prompts, said, strict=True):
        text = tokenizer.decode(np.array([token]))
        mine = bool(text.strip()) and list(tokenizer.encode(text)) == [token]
        right.append(mine and sum(right) < NUM_RIGHT)
        lines.append({"prompt": prompt, "response": text if right[-1] else "@@"})
    assert sum(right) == NUM_RIGHT
    path = tmp_path_factory.mktemp("records") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path, {line["prompt"]: ok for line, ok in zip(lines, right, strict=True)}


def arguments(published, records):
    path, _ = records
    data = ("data.train=moejax.data.chat:Chat", f"data.train.path={path}", "sequence_length=32")
    return (CONFIG, f"init_from={published}", *data, "data.train.holdout_every=30")


@pytest.fixture(scope="module")
def texts(published, records, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    assert main(["neighbours", *arguments(published, records), "--texts", str(path)]) == 0
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_the_texts_are_the_training_prompts_in_order(records, texts):
    _, right = records
    prompts = list(right)
    assert 50 < len(texts) < len(prompts), "some lines are held out"
    assert texts == [prompt for prompt in prompts if prompt in set(texts)]


@pytest.mark.slow
def test_from_embeddings_to_training(published, records, texts, tmp_path, capsys):
    _, right = records
    embeddings, out = tmp_path / "e.npy", tmp_path / "n.npz"
    points = np.random.default_rng(0).normal(size=(len(texts), 4)).astype(np.float32)
    np.save(embeddings, points)
    own = arguments(published, records)
    command = ["neighbours", *own, "--embeddings", str(embeddings), "--out", str(out), "--k", "1"]
    assert main([*command, "--layers", "1"]) == 0
    count = sum(right[text] for text in texts)
    assert f"answers {count} of {len(texts)} rightly" in capsys.readouterr().out
    table = Neighbours.load(out)
    assert (table.keys.shape, table.layers) == ((2, len(texts)), (1,))
    np.testing.assert_array_equal(table.spreads, 0)  # of one neighbour each
    successes = np.flatnonzero([right[text] for text in texts])
    assert len(np.unique(table.means.round(6), axis=0)) <= len(successes)

    training = ("steps=2", "mesh.data=1", "eval_every=0", "log_every=1", f"workdir={tmp_path}/run")
    objective = ("objective=moejax.objectives.roma:RoMA", f"objective.neighbours={out}")
    schedule = ("optimizer.schedule.warmup_steps=1",)
    assert main(["train", *own, *training, *objective, *schedule]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line["values"] for line in map(json.loads, lines) if line["kind"] == "train"]
    assert len(steps) == 2
    for values in steps:
        assert values["aligned"] == 1, "every packed sample is found"
        assert 0 < values["loss/manifold"] <= 2


def test_wrong_embeddings_are_said(published, records, texts, tmp_path, capsys):
    own = ["neighbours", *arguments(published, records), "--out", str(tmp_path / "n.npz")]
    path = tmp_path / "e.npy"

    def said(*more):
        assert main([*own, *more]) == 2
        return capsys.readouterr().err

    assert "give --texts FILE, or --embeddings" in said()
    assert "no .npy file" in said("--embeddings", str(tmp_path / "none.npy"))
    np.save(path, np.full((3, 2), np.nan, np.float32))
    assert "not finite" in said("--embeddings", str(path))
    np.save(path, np.arange(6).reshape(3, 2))
    assert "array [documents, d] of floats" in said("--embeddings", str(path))
    assert "--k 0 must be at least 1" in said("--embeddings", str(path), "--k", "0")
    np.save(path, np.ones((3, 2), np.float32))
    assert f"has 3 rows and the training data {len(texts)} documents" in said(
        "--embeddings", str(path)
    )
    assert not (tmp_path / "n.npz").exists()

"""The second user's three commands: import, train, export."""

import dataclasses

import numpy as np
import pytest

from moejax.commands import main
from moejax.evaluation.open_model import open_model
from moejax.interop import hf
from moejax.types import named_leaves
from moejax.verification.contracts.cases import quick_jit
from tests.commands.published import publish
from tests.interop.tiny_checkpoints import MODELS, edit_config, edit_tensors, variables, written

TUNING = "configs/router_tuning.py"
QUICK = (
    "steps=2",
    "optimizer.schedule.warmup_steps=1",
    "sequence_length=64",
    "mesh.data=1",
    "eval_every=0",
    "log_every=1",
    "data.train.pattern=p*/METADATA",
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path_factory.getbasetemp() / "moejax-cache"))


def tensors(folder):
    return named_leaves(hf.load(folder)[1])


def assert_same(left, right, *, but=()):
    assert left.keys() == right.keys()
    different = {k for k in left if not np.array_equal(left[k], right[k])}
    assert different == set(but)


@pytest.mark.slow
@pytest.mark.parametrize("imported", [True, False])
def test_import_tune_export(published, tmp_path, capsys, imported):
    start, run, out = published, tmp_path / "run", tmp_path / "tuned"
    if imported:
        start = tmp_path / "imported"
        assert main(["import-hf", str(published), str(start)]) == 0
        assert f"moejax train configs/router_tuning.py init_from={start}" in capsys.readouterr().out
    words = [f"init_from={start}", f"workdir={run}", *QUICK]
    assert main(["train", TUNING, *words]) == 0
    assert main(["export-hf", str(run), str(out), "--dtype", "bfloat16"]) == 0
    router = "params/layers_0/ffn/router/kernel"
    assert_same(tensors(published), tensors(out), but=[router])
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    assert {path.name for path in out.iterdir()} == set(names)
    assert (out / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    # A run that finished goes on from its own folder alone.
    assert main(["evaluate", str(run)]) == 0


@pytest.mark.slow
def test_a_published_correction_bias_stays(tmp_path):
    """Sigmoid scores lie in (0, 1): a thousandth each step would soon be another model."""
    published, start = publish(tmp_path / "glm", dtype="float32", name="glm4_moe"), tmp_path / "a"
    assert main(["import-hf", str(published), str(start)]) == 0
    words = [f"init_from={start}", f"workdir={tmp_path / 'run'}", *QUICK]
    assert main(["train", TUNING, *words]) == 0
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    before, after = tensors(published), tensors(tmp_path / "out")
    (router,) = (path for path in before if path.endswith("ffn/router/kernel"))
    assert any(np.abs(bias).max() > 0 for path, bias in before.items() if "_bias" in path)
    assert_same(before, after, but=[router])
    words[1] = f"workdir={tmp_path / 'lora'}"
    assert main(["train", "configs/lora.py", *words]) == 0
    assert main(["export-peft", str(tmp_path / "lora"), str(tmp_path / "adapter")]) == 0


def test_an_import_is_exported_bit_for_bit(published, tmp_path):
    assert main(["import-hf", str(published), str(tmp_path / "a")]) == 0
    assert main(["export-hf", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    before, after = published / "model.safetensors", tmp_path / "b" / "model.safetensors"
    assert before.read_bytes() == after.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_architecture_goes_through(name, tmp_path):
    source = written(name, tmp_path / "hf")
    assert main(["import-hf", str(source), str(tmp_path / "a")]) == 0
    assert main(["export-hf", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert_same(tensors(source), tensors(tmp_path / "b"))
    assert tensors(source).keys() == named_leaves(variables(name)).keys()


@pytest.mark.slow
@pytest.mark.long
def test_overrides_reach_inside_the_model_that_was_given(published, tmp_path, capsys):
    words = ["model.boundaries=[1]", 'trainable=["layers_1/*/router/*"]', f"init_from={published}"]
    assert main(["train", TUNING, *words, f"workdir={tmp_path / 'run'}", *QUICK]) == 0
    assert (
        main(["export-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype=bfloat16"]) == 0
    )
    before, after = tensors(published), tensors(tmp_path / "out")
    router = "params/layers_0/ffn/router/kernel"
    assert_same(before, after, but=[router])
    np.testing.assert_array_equal(before[router][0], after[router][0])


@pytest.mark.slow
@pytest.mark.long
def test_what_lora_added_is_merged_on_export(published, tmp_path):
    run, out = tmp_path / "run", tmp_path / "merged"
    words = [f"init_from={published}", f"workdir={run}", "optimizer.schedule.peak=0.1", *QUICK]
    assert main(["train", "configs/lora.py", *words]) == 0
    assert main(["export-hf", str(run), str(out), "--dtype", "float32"]) == 0
    before, after = tensors(published), tensors(out)
    experts = ("ffn/experts/gate", "ffn/experts/up", "ffn/experts/down")
    attention = tuple(f"attention/{name}/kernel" for name in ("query", "key", "value", "output"))
    adapted = {f"params/layers_0/{name}" for name in experts + attention}
    assert before.keys() == after.keys()
    assert {p for p in before if not np.array_equal(before[p], after[p])} == adapted
    opened, (plain, variables) = open_model(run), hf.load(out)
    ids = np.arange(12)[None] % 7
    logits = lambda model, values: quick_jit(model.apply)(values, ids).logits
    adapted = dataclasses.replace(opened.model, dtype="float32")
    expected = logits(adapted, opened.variables)
    np.testing.assert_allclose(logits(plain, variables), expected, rtol=1e-5, atol=1e-6)


def error_of(capsys, *words):
    assert main([str(word) for word in words]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_a_config_without_a_model_names_the_folder_it_would_take_it_from(capsys, tmp_path):
    text = error_of(capsys, "train", TUNING, f"init_from={tmp_path / 'nowhere'}")
    assert "nowhere" in text


def test_nothing_half_written_is_left(published, tmp_path, capsys):
    source = written("olmoe", tmp_path / "hf")
    edit_tensors(source, lambda values: values.pop("model.layers.1.mlp.gate.weight"))
    text = error_of(capsys, "import-hf", source, tmp_path / "out")
    assert "lacks tensor model.layers.1.mlp.gate.weight" in text
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_unknown_architecture_is_refused(tmp_path, capsys):
    source = written("olmoe", tmp_path / "hf")
    edit_config(source, model_type="bert")
    assert "'bert' is not an architecture" in error_of(capsys, "import-hf", source, tmp_path / "o")


def test_an_export_of_changed_weights_is_refused(published, tmp_path, capsys):
    assert main(["import-hf", str(published), str(tmp_path / "a")]) == 0
    state = tmp_path / "a" / "checkpoints" / "step_00000000" / "state"
    data = max(
        (path for path in state.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    text = error_of(capsys, "export-hf", tmp_path / "a", tmp_path / "b")
    assert "is not what was saved" in text or "cannot be read" in text
    assert not (tmp_path / "b").exists()


def test_a_folder_that_holds_something_is_not_written_to(published, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "is not empty" in error_of(capsys, "import-hf", published, tmp_path / "out")

"""Adapters as commands: train one, export it, import it with its base, train on, export again."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from moejax.commands import main
from moejax.evaluation.open_model import open_model
from moejax.train.manifest import Manifest
from moejax.verification.contracts.cases import quick_jit
from tests.commands.test_import_export import QUICK, error_of
from tests.interop.peft_folders import CONFIG, assert_same_bits, edit, tensors

LORA = "configs/lora.py"
TUNING = "configs/router_tuning.py"
FACTOR = "params/lora/layers_0/attention/query/a"
FAST = (*QUICK, "optimizer.schedule.peak=0.1")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEJAX_CACHE", str(tmp_path_factory.getbasetemp() / "moejax-cache"))
        yield


@pytest.fixture(scope="module")
def folders(published, tmp_path_factory):
    """A run with LoRA everywhere, and its adapter as PEFT has it."""
    folder = tmp_path_factory.mktemp("peft")
    words = [f"init_from={published}", f"workdir={folder / 'run'}", *FAST]
    assert main(["train", LORA, *words]) == 0
    words = [str(folder / "run"), str(folder / "adapter"), "--base", "allenai/olmoe"]
    assert main(["export-peft", *words]) == 0
    return folder


def logits(opened):
    model = dataclasses.replace(opened.model, dtype="float32")
    ids = np.arange(12)[None] % 7
    return np.asarray(quick_jit(model.apply)(opened.variables, ids).logits)


@pytest.mark.slow
def test_an_adapter_that_was_trained_here_is_imported_with_its_base(folders, published, tmp_path):
    assert json.loads((folders / "adapter" / CONFIG).read_text())["base_model_name_or_path"]
    out = tmp_path / "imported"
    words = [str(published), str(out), "--adapter", str(folders / "adapter")]
    assert main(["import-hf", *words]) == 0
    run, imported = open_model(folders / "run"), open_model(out)
    assert_same_bits(imported.variables["lora"], run.variables["lora"])
    assert imported.model.adapter.linear == run.model.adapter.linear
    np.testing.assert_allclose(logits(imported), logits(run), atol=1e-5, rtol=0)
    assert main(["export-peft", str(out), str(tmp_path / "again")]) == 0
    assert_same_bits(tensors(tmp_path / "again"), tensors(folders / "adapter"))
    # What is merged is the same model, too.
    assert main(["export-hf", str(out), str(tmp_path / "merged"), "--dtype=float32"]) == 0
    merged = open_model(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged), logits(run), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.long
def test_training_goes_on_with_the_adapter_of_the_folder(folders, published, tmp_path, capsys):
    start = tmp_path / "imported"
    words = [str(published), str(start), "--adapter", str(folders / "adapter")]
    assert main(["import-hf", *words]) == 0
    assert f"init_from={start} 'trainable=[\"lora/*\"]'" in capsys.readouterr().out
    words = [f"init_from={start}", f"workdir={tmp_path / 'run'}", *FAST, 'trainable=["lora/*"]']
    assert main(["train", TUNING, *words]) == 0
    first, second = tensors(folders / "adapter"), tmp_path / "second"
    assert main(["export-peft", str(tmp_path / "run"), str(second)]) == 0
    later = tensors(second)
    assert later.keys() == first.keys()
    assert all(np.abs(later[name] - first[name]).max() > 0 for name in first)
    before, after = (open_model(path).variables["params"] for path in (start, tmp_path / "run"))
    assert_same_bits(before, after)


@pytest.mark.slow
def test_another_adapter_than_the_folders_is_an_error(folders, tmp_path, capsys):
    words = [f"init_from={folders / 'run'}", f"workdir={tmp_path / 'run'}", *FAST]
    assert main(["train", LORA, *words, "adapter.linear.rank=3"]) == 2
    assert "another adapter: here adapter.linear.rank is 3 and not 16" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_what_a_run_trained_besides_is_not_lost(folders, published, tmp_path, capsys):
    words = [f"init_from={published}", f"workdir={tmp_path / 'run'}", *FAST]
    patterns = 'trainable=["lora/*", "*/router/*"]'
    assert main(["train", LORA, *words, patterns]) == 0
    capsys.readouterr()
    text = error_of(capsys, "export-peft", tmp_path / "run", tmp_path / "adapter")
    assert "trained params/layers_0/ffn/router/kernel too" in text
    assert not (tmp_path / "adapter").exists()


def test_what_has_no_adapter_is_refused(published, tmp_path, capsys):
    assert main(["import-hf", str(published), str(tmp_path / "imported")]) == 0
    text = error_of(capsys, "export-peft", tmp_path / "imported", tmp_path / "adapter")
    assert "has no adapter" in text


@pytest.mark.slow
def test_a_wrong_adapter_leaves_nothing(folders, published, tmp_path, capsys):
    adapter = shutil.copytree(folders / "adapter", tmp_path / "adapter")
    edit(adapter, use_dora=True)
    text = error_of(capsys, "import-hf", published, tmp_path / "out", "--adapter", adapter)
    assert "use_dora=True is not supported" in text
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
def test_a_changed_factor_is_not_exported(folders, tmp_path, capsys):
    run = shutil.copytree(folders / "run", tmp_path / "run")
    newest = sorted((run / "checkpoints").glob("step_*"))[-1] / "manifest" / "manifest.json"
    manifest = Manifest.from_text(newest.read_text())
    leaf = manifest.leaves[FACTOR]
    other = dataclasses.replace(leaf, fingerprint=leaf.fingerprint[::-1])
    manifest = dataclasses.replace(manifest, leaves=manifest.leaves | {FACTOR: other})
    newest.write_text(json.dumps(manifest.to_json()))
    text = error_of(capsys, "export-peft", run, tmp_path / "adapter")
    assert f"the leaf {FACTOR}" in text
    assert "is not what was saved" in text
    assert not (tmp_path / "adapter").exists()

"""Mixtures of MoE-PEFT as commands: import one with its base, train on, export it again."""

import json

import jax
import numpy as np
import pytest

from moejax.commands import main
from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.evaluation.open_model import open_model
from moejax.experts.mixlora import MixLoRA
from moejax.train.restore import model_of, open_slices
from moejax.types import tree_of
from tests.commands.test_import_export import QUICK, error_of
from tests.interop import mixtures
from tests.interop.peft_folders import CONFIG, assert_same_bits, opened, tensors


def adapter(folder, kind, modules, **values):
    stated = mixtures.described(kind, modules, **values)
    return mixtures.by_hand(folder, mixtures.mixture_tensors(kind, modules), stated)


def test_a_mixture_is_imported_with_its_base_and_exported_again(tmp_path, capsys):
    base = mixtures.base(tmp_path / "base")
    modules = ("mlp.down_proj", "mlp.up_proj", "self_attn.v_proj")
    given = adapter(tmp_path / "adapter", "MIXLORA", modules, router_init_range=0.5)
    out = tmp_path / "imported"
    words = ["import-hf", str(base), str(out), "--adapter", str(given)]
    text = error_of(capsys, *words, "--check")
    assert "which PEFT does not know: leave --check out" in text
    assert not out.exists()
    assert main(words) == 0
    model = model_of(build_config(load_config(out)), out)  # it has no tokenizer
    assert isinstance(model.adapter.mlp, MixLoRA)
    assert (
        abs(np.std(model.adapter.mlp.router.gate_init(jax.random.key(0), (100, 90))) - 0.5) < 0.02
    )
    leaves = {leaf.path: leaf[()] for leaf in open_slices(out, None)[1]}
    own = {path: x for path, x in leaves.items() if path.startswith("params/lora/")}
    assert_same_bits(tree_of(own)["params"]["lora"], opened(base, given)[1]["lora"])
    assert main(["export-peft", str(out), str(tmp_path / "again"), "--base", "a/base"]) == 0
    assert_same_bits(tensors(tmp_path / "again"), tensors(given))
    written, stated = (json.loads((x / CONFIG).read_text()) for x in (tmp_path / "again", given))
    del stated["router_init_range"]  # of what is not drawn any more
    assert {name: written[name] for name in stated} == stated


@pytest.mark.slow
@pytest.mark.long
def test_training_goes_on_with_a_mixture(published, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    given = adapter(tmp_path / "adapter", "MOLA", ("self_attn.q_proj",), router_loss=True)
    start, run, out = (tmp_path / name for name in ("imported", "run", "out"))
    assert main(["import-hf", str(published), str(start), "--adapter", str(given)]) == 0
    words = [f"init_from={start}", f"workdir={run}", *QUICK, "optimizer.schedule.peak=0.1"]
    assert main(["train", "configs/router_tuning.py", *words, 'trainable=["lora/*"]']) == 0
    assert main(["export-peft", str(run), str(out)]) == 0
    first, later = tensors(given), tensors(out)
    assert later.keys() == first.keys()
    assert all(np.abs(later[name] - first[name]).max() > 0 for name in first)
    assert_same_bits(open_model(run).variables["params"], open_model(start).variables["params"])

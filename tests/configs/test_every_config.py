"""Every function of every file in configs/: its text, its parameters, one owner per number.

`MOEJAX_UPDATE_GOLDEN=1 pytest tests/configs` rewrites the golden texts; read the diff.
"""

import functools
import os
import pathlib

import fiddle as fdl
import jax
import pytest

from moejax.config.build import build_config
from moejax.config.check import duplicate_quantities
from moejax.config.load import config_functions, load_config
from moejax.config.serialize import dump_config, load_dumped
from moejax.config.symbols import import_file
from moejax.config.text import config_diff, config_text
from moejax.types import named_leaves

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "configs"
FILES = sorted(path for path in (ROOT / "configs").glob("*.py"))
CONFIGS = [
    f"{path.relative_to(ROOT)}:{name}"
    for path in FILES
    for name in config_functions(import_file(str(path)))
]
VOCABULARY = 1000


@pytest.fixture(params=CONFIGS)
def spec(request, monkeypatch):
    monkeypatch.chdir(ROOT)
    return request.param


def assert_golden(name, text):
    path = GOLDEN / name
    if os.environ.get("MOEJAX_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"no golden text {path}: see the top of this file"
    assert text == path.read_text(encoding="utf-8")


def stem(spec):
    path, _, function = spec.partition(":")
    return f"{pathlib.Path(path).stem}.{function}"


def test_text(spec):
    assert_golden(f"{stem(spec)}.config.txt", config_text(load_config(spec)))


@functools.cache
def parameters(model):
    """Path, dtype, shape and logical axes, line by line. Configs for machines share a model."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    is_names = lambda leaf: isinstance(leaf, tuple)
    axes = jax.tree.leaves(model.logical_axes(), is_leaf=is_names)
    lines = [
        f"{path} {leaf.dtype}{list(leaf.shape)} {', '.join(map(str, names))}\n"
        for (path, leaf), names in zip(named_leaves(shapes).items(), axes, strict=True)
    ]
    return "".join(lines)


def test_parameters(spec):
    config = load_config(spec)
    if "model" not in fdl.ordered_arguments(config):
        pytest.skip("its model is that of the folder init_from")
    model = build_config(config).build_model(VOCABULARY)
    assert_golden(f"{stem(spec)}.parameters.txt", parameters(model))


def test_every_number_lives_at_one_path(spec):
    assert duplicate_quantities(load_config(spec)) == {}


def test_the_stored_config_is_the_same_and_needs_no_trust(spec):
    config = load_config(spec)
    assert config_diff(config, load_dumped(dump_config(config, {}))) == ""


def test_every_file_has_a_config_a_smoke_and_a_notebook_entry():
    for path in FILES:
        module = import_file(str(path))
        assert {"config", "smoke"} <= set(config_functions(module)), path
        for word in ("Command", "Cost", "Result"):
            assert word in module.__doc__, f"{path}: its docstring has no {word}"

"""The file that MoE-PEFT itself saves, and the conversion back to it; needs torch."""

import os

import fiddle as fdl
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.interop import peft
from tests.interop.mixtures import LLAMA, described, mixture_tensors
from tests.interop.mixtures import by_hand as safe_folder
from tests.interop.peft_folders import WEIGHTS, adapted, assert_same_bits, tensors

torch = pytest.importorskip("torch", exc_type=ImportError)
safetensors_torch = pytest.importorskip("safetensors.torch", exc_type=ImportError)

PICKLE = "adapter_model.bin"
MODULES = ("self_attn.q_proj", "mlp.down_proj")


@pytest.fixture
def folder(tmp_path):
    """As MoE-PEFT leaves it: parameters in a pickle, and nothing else."""
    given = mixture_tensors("MIXLORA", MODULES)
    out = safe_folder(tmp_path / "adapter", given, described("MIXLORA", MODULES))
    stored = {name: torch.nn.Parameter(torch.from_numpy(x)) for name, x in given.items()}
    torch.save(stored, out / PICKLE)
    (out / WEIGHTS).unlink()
    return out


def loaded(folder):
    model = adapted(LLAMA, fdl.build(peft.adapter_config(folder, LLAMA)))
    return model, peft.load(folder, model)


def test_what_moe_peft_saved_is_read_with_every_bit(folder, tmp_path):
    model, variables = loaded(folder)
    peft.save(model, variables, tmp_path / "again")
    assert_same_bits(tensors(tmp_path / "again"), mixture_tensors("MIXLORA", MODULES))
    # And back, as docs/fine_tuning.md says.
    values = safetensors_torch.load_file(tmp_path / "again" / WEIGHTS)
    torch.save(values, tmp_path / "again" / PICKLE)
    (tmp_path / "again" / WEIGHTS).unlink()
    assert_same_bits(loaded(tmp_path / "again")[1], variables)


def test_bfloat16_and_float16_keep_their_bits(folder):
    values = torch.load(folder / PICKLE, weights_only=True)
    halves = {name: x.to(torch.bfloat16) for name, x in values.items()}
    name = "mixlora.layers.0.mlp.moe_gate.weight"
    torch.save(halves, folder / PICKLE)
    _, variables = loaded(folder)
    gate = variables["lora"]["layers_0"]["ffn"]["routing"]["gate"]["kernel"]
    assert gate.dtype == "bfloat16"
    wanted = halves[name].detach().float().numpy().T
    np.testing.assert_array_equal(gate[0].astype(np.float32), wanted)
    torch.save({name: x.to(torch.float16) for name, x in values.items()}, folder / PICKLE)
    assert loaded(folder)[1]["lora"]["layers_0"]["ffn"]["down_adapters"]["a"].dtype == np.float16


class _Runs:
    """What a pickle may do."""

    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    "content, text",
    [
        ({"a": _Runs()}, "holds more than tensors"),
        ([1.0], "holds no tensors by name"),
        ({"a": 1.0}, "holds no tensors by name"),
        ({"a": torch.zeros(2)}, "holds a, which is no part of the mixture"),
    ],
)
def test_pickles_that_hold_something_else(folder, content, text):
    torch.save(content, folder / PICKLE)
    with pytest.raises(UserError, match=text):
        peft.adapter_config(folder, LLAMA)


def test_a_damaged_pickle_and_a_wrong_shape_or_dtype(folder):
    values = torch.load(folder / PICKLE, weights_only=True)
    name = "mixlora.layers.0.mlp.moe_gate.weight"
    for changed, text in (
        (values[name].double(), "is stored as float64"),
        (values[name].T, r"has shape \[16, 3\], but"),
    ):
        torch.save(values | {name: changed}, folder / PICKLE)
        with pytest.raises(UserError, match=text):
            peft.adapter_config(folder, LLAMA)
    (folder / PICKLE).write_bytes((folder / PICKLE).read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        peft.adapter_config(folder, LLAMA)


def test_safetensors_go_before_a_pickle(folder):
    given = mixture_tensors("MIXLORA", MODULES, seed=1)
    safetensors_torch.save_file(
        {k: torch.from_numpy(x) for k, x in given.items()}, folder / WEIGHTS
    )
    gate = loaded(folder)[1]["lora"]["layers_0"]["ffn"]["routing"]["gate"]["kernel"]
    np.testing.assert_array_equal(gate[1].T, given["mixlora.layers.1.mlp.moe_gate.weight"])

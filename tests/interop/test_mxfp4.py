"""MXFP4 experts are read as the numbers they stand for, in slices, and saved as bfloat16."""

import dataclasses
import itertools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moejax.errors import UserError
from moejax.experts.glu import GLU
from moejax.interop import hf
from moejax.interop.mxfp4 import Mxfp4Files
from moejax.verification.contracts.cases import quick_jit, random_tree
from tests.interop.tiny_checkpoints import MODELS, WEIGHTS, edit_config, edit_tensors, tensors

BF16 = ml_dtypes.bfloat16
D, F, E = 64, 32, 4
WHOLE = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
QUANTISED = {"modules_to_not_convert": WHOLE, "quant_method": "mxfp4"}  # as openai/gpt-oss-20b
SHAPES = {"gate_up_proj": (E, 2 * F, D), "down_proj": (E, D, F)}  # [E, out, in]


def value(code: int, scale: int) -> float:
    """What a code E2M1 and a scale E8M0 stand for, bit by bit."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return (-magnitude if code & 8 else magnitude) * 2.0 ** (scale - 127)


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64 `[E, in, out]`, one value after another."""
    num_experts, outputs, num_blocks, width = blocks.shape
    out = np.empty((num_experts, 2 * width * num_blocks, outputs))
    for e, o, b, i in itertools.product(*map(range, blocks.shape)):
        codes = blocks[e, o, b, i] & 15, blocks[e, o, b, i] >> 4
        for half, code in enumerate(codes):
            out[e, 2 * (width * b + i) + half, o] = value(int(code), int(scales[e, o, b]))
    return out


def store(path, **arrays) -> Mxfp4Files:
    path.mkdir(exist_ok=True)
    safetensors.numpy.save_file(arrays, path / WEIGHTS)
    return Mxfp4Files(path)


def bits(array) -> np.ndarray:
    return np.asarray(array).view(np.uint16)


def test_every_code_with_the_smallest_the_middle_and_the_largest_scale(tmp_path):
    low = np.arange(16, dtype=np.uint8)
    blocks = np.stack([low | np.roll(low, shift) << 4 for shift in (3, 0, 9)])[None, :, None]
    scales = np.array([0, 127, 254], np.uint8)[None, :, None]
    files = store(tmp_path / "x", x_blocks=blocks, x_scales=scales)
    assert files.names == {"x"}
    assert (files.shape("x"), files.dtype("x")) == ((1, 32, 3), np.dtype(BF16))
    found = np.asarray(files.read("x", (1, 32, 3)))
    assert found.dtype == BF16
    with np.errstate(over="ignore"):
        expected = decoded(blocks, scales).astype(BF16)
    np.testing.assert_array_equal(bits(found), bits(expected))
    ones = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    np.testing.assert_array_equal(found[0, ::2, 1], ones + [-x for x in ones])
    assert found[0, 2, 0] == 2.0**-128  # 0.5 at the smallest scale, which is not a normal number
    assert found[0, 6, 2] == 1.5 * 2.0**127  # the largest that is finite
    assert found[0, 8, 2] == np.inf


def test_every_byte_and_scale_equal_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="the extra hf (torch) is not installed")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers is absent")
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (1, 255, 16, 16))
    scales = np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], (1, 255, 16))
    blocks, scales = np.ascontiguousarray(blocks), np.ascontiguousarray(scales)
    expected = mxfp4.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    found = store(tmp_path / "x", x_blocks=blocks, x_scales=scales).read("x", (1, 512, 255))
    np.testing.assert_array_equal(bits(found), expected.view(torch.uint16).numpy())


SLICES = [
    (slice(None), slice(None), slice(None)),
    (slice(1, 2), slice(3, 40), slice(0, 64, 2)),
    (slice(0, 4, 2), slice(33, 34), slice(5, 9)),
    (slice(2, 4), slice(31, 64, 3), slice(1, 64, 7)),
]


def test_slices_of_slices_are_those_of_the_whole(tmp_path):
    rng = np.random.default_rng(0)
    blocks, scales = _drawn(rng, (E, 2 * F, D))
    packed = store(tmp_path / "x", x_blocks=blocks, x_scales=scales).read("x", (E, D, 2 * F))
    whole = np.asarray(packed)
    for index in SLICES:
        part = packed[index]
        assert part.shape == whole[index].shape
        np.testing.assert_array_equal(bits(part), bits(np.ascontiguousarray(whole[index])))
        half = (..., slice(1, part.shape[-1], 2))
        np.testing.assert_array_equal(
            bits(part[half]), bits(np.ascontiguousarray(whole[index][half]))
        )
        rows = (slice(0, 1), slice(1, None, 2), slice(None))
        if part.shape[1] > 1:
            again = np.ascontiguousarray(whole[index][rows])
            np.testing.assert_array_equal(bits(part[rows]), bits(again))


def _drawn(rng, shape):
    """Random bytes, with scales that give weights of ordinary size."""
    num_experts, outputs, inputs = shape
    scales = rng.integers(121, 126, (num_experts, outputs, inputs // 32), np.uint8)
    return rng.integers(0, 256, (*scales.shape, 16), np.uint8), scales


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A gpt-oss directory, float32 but for its experts, which are packed as in published files."""
    block = MODELS["gpt_oss"].block
    ffn = block.ffn.clone(experts=GLU(d_ff=F, activation="swiglu_clamped", use_bias=True))
    model = dataclasses.replace(MODELS["gpt_oss"], d_model=D, block=block.clone(ffn=ffn))
    drawn = random_tree(jax.eval_shape(model.init, jax.random.key(0)))
    directory = tmp_path_factory.mktemp("mxfp4") / "hf"
    hf.save(model, drawn, directory)
    rng = np.random.default_rng(1)

    def pack(found):
        for layer, (name, shape) in itertools.product(range(2), SHAPES.items()):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            del found[key]
            found[f"{key}_blocks"], found[f"{key}_scales"] = _drawn(rng, shape)

    edit_tensors(directory, pack)
    edit_config(directory, quantization_config=QUANTISED)
    return directory


def copied(stored, tmp_path, edit=None):
    """The directory with its tensors changed by `edit`."""
    target = tmp_path / "hf"
    target.mkdir()
    for path in stored.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if edit is not None:
        edit_tensors(target, edit)
    return target


def test_a_directory_gives_what_its_blocks_stand_for(stored):
    model, loaded = hf.load(stored)
    assert model.block.ffn.experts.d_ff == F
    found = tensors(stored)
    layers = loaded["params"]
    for layer in range(2):
        experts = layers[f"layers_{layer}"]["ffn"]["experts"]
        key = f"model.layers.{layer}.mlp.experts"
        fused, down = (
            decoded(found[f"{key}.{name}_blocks"], found[f"{key}.{name}_scales"]) for name in SHAPES
        )
        for part, expected in (("gate", fused[..., ::2]), ("up", fused[..., 1::2]), ("down", down)):
            assert experts[part].dtype == BF16
            assert experts[part].shape == (1, *expected.shape)
            np.testing.assert_array_equal(np.float64(experts[part][0]), expected)
        assert experts["gate_bias"].dtype == np.float32


def test_transformers_reads_the_same_model_from_the_same_directory(stored):
    torch = pytest.importorskip("torch", reason="the extra hf (torch) is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    pytest.importorskip("accelerate", reason="transformers reads MXFP4 only with accelerate")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        stored,
        attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )
    tokens = np.random.default_rng(0).integers(0, 24, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.float().numpy()
    model, loaded = hf.load(stored)
    logits = quick_jit(lambda v, t: model.apply(v, t).logits)(loaded, tokens)
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_what_is_saved_is_bfloat16_and_says_so(stored, tmp_path):
    model, loaded = hf.load(stored)
    hf.save(model, loaded, tmp_path / "out", source=stored)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    with safetensors.safe_open(tmp_path / "out" / WEIGHTS, "numpy") as file:
        names = set(file.keys())
        one = file.get_slice("model.layers.0.mlp.experts.gate_up_proj")
        assert (one.get_dtype(), one.get_shape()) == ("BF16", [E, D, 2 * F])
    assert not [name for name in names if name.endswith(("_blocks", "_scales"))]
    same, again = hf.load(tmp_path / "out")
    assert same == model
    jax.tree.map(np.testing.assert_array_equal, again, loaded)


def test_only_what_is_asked_for_is_decoded(stored, tmp_path):
    """A scale that stands for no number, in layer 1: layer 0 is read, and layer 1 is refused."""
    name = "model.layers.1.mlp.experts.down_proj_scales"
    target = copied(stored, tmp_path, lambda found: found[name].fill(255))
    _, leaves = hf.stored(target)
    leaves = {leaf.path: leaf for leaf in leaves}
    assert leaves["params/layers_0/ffn/experts/down"][0, slice(1, 3)].shape == (2, F, D)
    with pytest.raises(UserError, match=f"tensor {name} holds the scale 255, which") as error:
        leaves["params/layers_1/ffn/experts/down"][0, slice(1, 3)]
    assert str(target) in str(error.value)


KEY = "model.layers.0.mlp.experts.down_proj"


def _swap(name, change):
    return lambda found: found.update({name: change(found[name])})


@pytest.mark.parametrize(
    "edit, text",
    [
        (lambda s: s.pop(f"{KEY}_scales"), f"lacks tensor {KEY}_scales, the other half"),
        (lambda s: s.pop(f"{KEY}_blocks"), f"lacks tensor {KEY}_blocks, the other half"),
        (
            lambda s: [s.pop(f"{KEY}_{part}") for part in ("blocks", "scales")],
            f"lacks tensor {KEY} ",
        ),
        (_swap(f"{KEY}_scales", np.float32), "_scales is stored as F32 and not as U8"),
        (_swap(f"{KEY}_blocks", lambda x: x[:, :, :, :8]), "_scales have shapes .* should have"),
        (_swap(f"{KEY}_blocks", lambda x: x[:2]), "_scales have shapes .* should have"),
        (
            lambda s: s.update({k: s[k][:, :32] for k in (f"{KEY}_blocks", f"{KEY}_scales")}),
            rf"{KEY} has shape \[4, 32, 32\], but config.json asks for \[4, 32, 64\]",
        ),
        (lambda s: s.update({KEY: np.zeros((E, F, D), np.float32)}), "both as it is and as"),
    ],
)
def test_damaged_files_are_one_sentence(stored, tmp_path, edit, text):
    target = copied(stored, tmp_path, edit)
    with pytest.raises(UserError, match=text) as error:
        hf.load(target)
    assert str(target) in str(error.value)
    assert "\n" not in str(error.value)


def test_blocks_without_a_word_in_config_json_are_not_guessed(stored, tmp_path):
    target = copied(stored, tmp_path)
    edit_config(target, quantization_config=...)
    with pytest.raises(UserError, match=f"holds tensor {KEY}_blocks and 7 more, which the model"):
        hf.load(target)


def test_other_methods_are_refused(stored, tmp_path):
    target = copied(stored, tmp_path)
    edit_config(target, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="quantised by the method 'fp8' cannot be read"):
        hf.load(target)

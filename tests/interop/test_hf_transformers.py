"""Directories written by transformers are read, and ours by transformers: equal logits and bits."""

import copy
import functools
import math

import jax
import numpy as np
import pytest

from moejax.interop import hf
from moejax.verification.contracts.cases import quick_jit

torch = pytest.importorskip("torch", reason="the extra hf (torch) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from safetensors import torch as safetensors_torch  # noqa: E402

from tools import golden_models  # noqa: E402  (it imports transformers)

ARCHITECTURES = tuple(golden_models.model_configs())
LATENT = ("deepseek_v2", "deepseek_v3")
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 12))
MASK = np.arange(12) < np.array([[12], [8]])  # the second row ends in padding


@functools.cache
def theirs(name: str):
    """A tiny model of transformers with weights large enough to matter, in float32."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(golden_models.model_configs()[name])
    for key, value in model.state_dict().items():
        mean, std = (1, 0.1) if "norm" in key else (0, 1 / math.sqrt(16))
        value.copy_(mean + std * torch.randn(value.shape))
    return model.eval()


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.from_numpy(TOKENS), attention_mask=torch.from_numpy(MASK)).logits
    return logits.float().numpy()[MASK]


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("moejax")]


def our_logits(model, variables) -> np.ndarray:
    apply = quick_jit(lambda v, t, s: model.apply(v, t, segment_ids=s).logits)
    return np.asarray(apply(variables, TOKENS, MASK.astype(np.int32)))[MASK]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_their_directory_gives_their_logits_and_ours_gives_them_back(name, tmp_path, caplog):
    theirs(name).save_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs(name))
    model, variables = hf.load(tmp_path / "theirs")
    assert not warnings(caplog)  # every value of their config.json is known
    logits = our_logits(model, variables)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert (logits.argmax(-1) == expected.argmax(-1)).all()

    hf.save(model, variables, tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    np.testing.assert_array_equal(their_logits(again.eval()), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_bit_of_16_bit_weights_survives(name, dtype, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(
        theirs(name).config, dtype=getattr(torch, dtype)
    )
    for key, buffer in model.named_buffers():
        if key.endswith("correction_bias"):
            buffer.data = buffer.data.float()  # as in published files, and as theirs loads it
    model.load_state_dict(theirs(name).state_dict())
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    ours, variables = hf.load(tmp_path / "theirs")
    hf.save(ours, variables, tmp_path / "ours", source=tmp_path / "theirs")
    theirs_again, ours_again = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert theirs_again.keys() == ours_again.keys()
    for key, value in theirs_again.items():
        assert ours_again[key].dtype == value.dtype, key
        assert torch.equal(ours_again[key], value), key


def stored(directory) -> dict:
    """Every tensor of every file, read by the library of the format."""
    files = sorted(directory.glob("*.safetensors"))
    return {k: v for file in files for k, v in safetensors_torch.load_file(file).items()}


@pytest.mark.parametrize("name", LATENT)
def test_packed_sequences_give_their_logits(name, tmp_path):
    """Transformers tells packed sequences by positions that begin again."""
    lengths = (5, 7)
    positions = np.broadcast_to(np.concatenate([np.arange(n) for n in lengths]), TOKENS.shape)
    segments = np.broadcast_to(np.repeat([1, 2], lengths), TOKENS.shape)
    theirs(name).save_pretrained(tmp_path)
    model, variables = hf.load(tmp_path)
    apply = quick_jit(
        lambda v, t, s, p: model.apply(v, t, segment_ids=s, positions=p).logits,
    )
    logits = np.asarray(apply(variables, TOKENS, segments, positions))
    with torch.no_grad():
        expected = theirs(name)(
            torch.from_numpy(TOKENS), position_ids=torch.tensor(positions), use_cache=False
        ).logits.numpy()
        whole = theirs(name)(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert (logits.argmax(-1) == expected.argmax(-1)).all()
    assert np.abs(expected - whole)[:, 5:].max() > 0.1  # packing changes something


def test_pairs_that_are_not_interleaved_are_read_as_they_are(tmp_path):
    config = copy.deepcopy(theirs("deepseek_v3").config)
    config.rope_interleave = False
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(theirs("deepseek_v3").state_dict())
    model.save_pretrained(tmp_path / "theirs")
    ours, variables = hf.load(tmp_path / "theirs")
    expected = their_logits(model)
    np.testing.assert_allclose(our_logits(ours, variables), expected, atol=1e-4, rtol=0)
    assert np.abs(expected - their_logits(theirs("deepseek_v3"))).max() > 0.01
    hf.save(ours, variables, tmp_path / "ours", source=tmp_path / "theirs")
    for key, value in stored(tmp_path / "theirs").items():
        assert torch.equal(stored(tmp_path / "ours")[key], value), key


def test_long_rows_of_phi_have_the_logits_of_short_ones_with_the_long_factors(tmp_path):
    """Transformers 5 takes the short factors whatever the length, so it is told other ones."""
    long = golden_models.PHI_ROPE | {"original_max_position_embeddings": 8}
    told = golden_models.PHI_ROPE | {"short_factor": long["long_factor"], "short_mscale": 1.25}
    models = []
    for rope in (told, long):
        config = copy.deepcopy(theirs("phimoe").config)
        config.rope_parameters = dict(rope)
        config.original_max_position_embeddings = rope["original_max_position_embeddings"]
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model.load_state_dict(theirs("phimoe").state_dict())
        models.append(model)
    expected = their_logits(models[0])
    models[1].save_pretrained(tmp_path)
    ours, variables = hf.load(tmp_path)
    assert ours.block.attention.rope.scaling.original_context == 8
    np.testing.assert_allclose(our_logits(ours, variables), expected, atol=1e-4, rtol=0)
    assert np.abs(expected - their_logits(theirs("phimoe"))).max() > 0.01


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_tied_head_gives_their_logits_and_is_stored_once(name, tmp_path):
    """As in the smaller Llama 3.2 and Qwen3 models."""
    config = copy.deepcopy(theirs(name).config)
    config.tie_word_embeddings = True
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(theirs(name).state_dict() | {"lm_head.weight": _embedding(name)})
    model.save_pretrained(tmp_path / "theirs")
    ours, variables = hf.load(tmp_path / "theirs")
    assert "head" not in variables["params"]
    expected = their_logits(model)
    np.testing.assert_allclose(our_logits(ours, variables), expected, atol=1e-4, rtol=0)
    assert np.abs(expected - their_logits(theirs(name))).max() > 0.1
    hf.save(ours, variables, tmp_path / "ours")
    assert "lm_head.weight" not in stored(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    np.testing.assert_array_equal(their_logits(again.eval()), expected)


def _embedding(name: str):
    return theirs(name).state_dict()["model.embed_tokens.weight"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4_moe", "phimoe", *LATENT])
def test_fused_and_per_expert_files_of_theirs_are_one_tree(name, tmp_path):
    theirs(name).save_pretrained(tmp_path / "each")
    theirs(name).save_pretrained(tmp_path / "fused", save_original_format=False)
    (model, each), (same, fused) = hf.load(tmp_path / "each"), hf.load(tmp_path / "fused")
    assert model == same
    assert jax.tree.structure(each) == jax.tree.structure(fused)
    jax.tree.map(np.testing.assert_array_equal, each, fused)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_published_sizes_say_is_understood(name, tmp_path, caplog):
    """The defaults of each configuration class are those of a published checkpoint."""
    stated = {"num_experts_per_tok": 6} if name == "deepseek_v2" else {}  # it has no default
    type(golden_models.model_configs()[name])(**stated).save_pretrained(tmp_path)
    config = hf.model_config(tmp_path)
    assert config.d_model >= 2048
    assert not warnings(caplog)

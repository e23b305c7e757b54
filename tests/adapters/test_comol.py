"""CoMoL: published parameter counts, and the algebra of its core space."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.adapters.comol import CoMoL, CoreBank, InputRoutedCoreBank
from moejax.adapters.lora import LoRA
from moejax.layers.linear import Linear
from moejax.layers.mixing.granularity import Static
from moejax.layers.mixing.router import Softmax
from moejax.types import named_leaves
from moejax.verification.contracts.cases import make_context, quick_jit, random_variables

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
CONTEXT = make_context(np.ones((2, 5), bool))
# Qwen3-8B: query, key, value, output, down in 36 layers.
QWEN3_8B = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (12288, 4096))


@pytest.mark.parametrize(
    "adapter, millions",
    [
        (LoRA(rank=16), 24_772_608),
        (CoMoL(bank=CoreBank(num_adapters=8)), 25_164_288),
        (CoMoL(bank=CoreBank(num_adapters=64)), 27_906_048),
        (CoMoL(bank=InputRoutedCoreBank(num_adapters=8)), 33_398_784),
    ],
)
def test_parameter_counts_are_the_published_ones(adapter, millions):
    def count(d_in, d_out):
        module = adapter.clone(features=d_out)
        x = jax.ShapeDtypeStruct((1, 1, d_in), jnp.float32)
        context = make_context(np.ones((1, 1), bool))
        shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, context), x)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes["lora"]))

    assert 36 * sum(count(*shape) for shape in QWEN3_8B) == millions


def built(adapter):
    module = adapter.clone(features=6)
    variables = random_variables(module, X, CONTEXT)
    base = Linear(features=6).apply({"params": variables["params"]}, X, CONTEXT)
    return module, variables, np.asarray(base)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("bank", [CoreBank, InputRoutedCoreBank])
def test_equals_cores_merged_token_by_token(bank):
    module, variables, base = built(CoMoL(bank=bank(num_adapters=3, rank=4, alpha=6.0)))
    y = quick_jit(module.apply)(variables, X, CONTEXT)
    a, b, cores = (np.asarray(variables["lora"]["adapters"][n]) for n in ("a", "b", "cores"))
    gate = np.asarray(variables["lora"]["routing"]["gate"]["kernel"])
    x = np.asarray(X)
    weights = softmax((x @ a if bank is CoreBank else x) @ gate)
    merged = np.einsum("bse,erq->bsrq", weights, cores)
    expected = base + 1.5 * np.einsum("bsi,ir,bsrq,qo->bso", x, a, merged, b)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def with_cores(variables, cores):
    adapters = variables["lora"]["adapters"] | {"cores": jnp.asarray(cores, jnp.float32)}
    return variables | {"lora": variables["lora"] | {"adapters": adapters}}


def test_equal_cores_make_the_router_irrelevant_and_one_identity_is_lora():
    module, variables, base = built(CoMoL(bank=CoreBank(num_adapters=3, rank=4, alpha=4.0)))
    run = quick_jit(module.apply)
    alike = with_cores(variables, np.broadcast_to(np.eye(4), (3, 4, 4)))
    a, b = (np.asarray(variables["lora"]["adapters"][n]) for n in ("a", "b"))
    np.testing.assert_allclose(run(alike, X, CONTEXT), base + X @ a @ b, rtol=1e-4, atol=1e-5)
    routing = jax.tree.map(lambda leaf: -3 * leaf, alike["lora"]["routing"])
    other = alike | {"lora": alike["lora"] | {"routing": routing}}
    np.testing.assert_allclose(run(other, X, CONTEXT), run(alike, X, CONTEXT), rtol=1e-4, atol=1e-5)


def test_with_weights_that_all_share_one_matrix_of_rank_r_stands_for_it():
    adapter = CoMoL(
        router=Softmax(granularity=Static()), bank=CoreBank(num_adapters=3, rank=2, alpha=2.0)
    )
    module, variables, _ = built(adapter)
    matrix = np.asarray(module.bind(variables).matrix(jnp.float32))
    y = quick_jit(module.apply)(variables, X, CONTEXT)
    np.testing.assert_allclose(y, X @ matrix, rtol=1e-4, atol=1e-5)
    added = matrix - named_leaves(variables)["params/kernel"]
    assert np.linalg.matrix_rank(added, tol=1e-4) == 2

"""Loss and gradient of packed dialogues are those of their responses, computed one by one."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from moejax.attention.full import FullAttention
from moejax.balance.unbalanced import Unbalanced
from moejax.data import ByteTokenizer, Chat, Data
from moejax.experts.glu import GLU
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.models.block import Block
from moejax.models.moe import MoE
from moejax.models.transformer import Transformer
from moejax.objectives.lm import NextToken
from moejax.routers.topk import TopK
from moejax.transport.local import Local
from moejax.types import named_leaves

LENGTH = 32


def model():
    return Transformer(
        num_layers=1,
        d_model=16,
        block=Block(
            attention=FullAttention(num_heads=2, num_kv_heads=1, linear=Linear()),
            ffn=MoE(
                num_experts=4,
                router=TopK(k=2),
                experts=GLU(d_ff=8),
                transport=Local(),
                balance=(Unbalanced(),),
            ),
            norm=RMSNorm(),
        ),
        vocab_size=ByteTokenizer().prepare(None, "").vocab_size,
    )


def test_loss_and_gradient_are_those_of_the_responses_alone(tmp_path):
    records = [{"prompt": f"say {i} ", "response": f"it is {i}" * (1 + i % 2)} for i in range(48)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    source = Chat(path=str(path), holdout_every=4)
    data = Data(train=source, tokenizer=ByteTokenizer(), cache_dir=str(tmp_path / "cache"))
    loaders = data.prepare(seq_len=LENGTH, batch_size=12, seed=0)
    net, tokenizer = model(), loaders.tokenizer
    variables = net.init(jax.random.key(0))
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    dialogues = list(source.documents("eval"))
    assert len(loaders.eval) == 1
    batch = jax.tree.map(jnp.asarray, loaders.eval.batch(0))
    assert batch.segment_ids.max() > 1, "some rows hold several records"

    def packed(params):
        token_bytes = tokenizer.token_bytes()
        result = NextToken()(net, rest | {"params": params}, batch, token_bytes=token_bytes)
        total, count = result.terms["lm"]
        return total / count, (result.terms["lm"], result.measures["bits_per_byte"])

    rows = np.zeros((len(dialogues), LENGTH + 1), np.int32)
    scored = np.zeros(rows.shape, bool)
    for row, mask, one in zip(rows, scored, dialogues, strict=True):
        prompt, response = one.prompt.encode(), one.response.encode()
        ids = [tokenizer.eos_id, *prompt, *response, tokenizer.eos_id]
        row[: len(ids)] = ids
        mask[1 + len(prompt) : len(ids)] = True

    def one_by_one(params):
        tokens = jnp.asarray(rows[:, :-1])  # what follows a record cannot reach it
        log_probs = jax.nn.log_softmax(net.apply(rest | {"params": params}, tokens).logits)
        nll = -jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=-1)[..., 0]
        return jnp.where(scored[:, 1:], nll, 0).sum() / scored.sum()

    params = variables["params"]
    (loss, sums), grads = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(one_by_one))(params)
    (total, count), (bits, num_bytes) = sums
    assert count == scored.sum() == sum(len(d.response.encode()) + 1 for d in dialogues)
    assert num_bytes == sum(len(d.response.encode()) for d in dialogues)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(bits, total / np.log(2), rtol=1e-6)
    wanted_leaves = named_leaves(wanted_grads)
    for name, leaf in named_leaves(grads).items():
        np.testing.assert_allclose(leaf, wanted_leaves[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert np.abs(wanted_leaves["embed/embedding"]).max() > 1e-3

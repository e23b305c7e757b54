import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data.tokenizer import Bytes
from moejax.errors import UserError
from moejax.evaluation.likelihood import Request, Scorer
from moejax.parallel.mesh import Mesh


@pytest.fixture(scope="module")
def logits_of(model, variables):
    """Of ids [n]: logits [n, V], from one pass over them alone."""
    apply = jax.jit(lambda tokens: model.apply(variables, tokens).logits)

    def logits(ids):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids  # causal: what follows changes nothing before
        return np.asarray(apply(jnp.asarray(tokens))[0, : len(ids)], np.float64)

    return logits


@pytest.fixture(scope="module")
def by_hand(logits_of):
    """(log-probability, greedy) of a request, on the host in float64."""

    def score(request):
        ids = np.concatenate([request.context, request.target])
        logits = logits_of(ids)[len(request.context) - 1 : -1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        greedy = (logits.argmax(-1) == request.target).all()
        return log_probs[np.arange(len(logits)), request.target].sum(), bool(greedy)

    return score


def requests_of(sizes, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, 256, n).astype(np.int32)
    return [Request(draw(n), draw(m)) for n, m in sizes]


SIZES = [(1, 1), (30, 4), (3, 29), (2, 40), (20, 20), (1, 33), (5, 5), (32, 1)]


def test_scores_are_those_of_one_request_at_a_time(scorer_of, by_hand):
    scorer = scorer_of(64, batch_tokens=128)
    requests = requests_of(SIZES)
    scores = scorer(requests)
    for request, score in zip(requests, scores, strict=True):
        expected, greedy = by_hand(request)
        assert score.log_prob == pytest.approx(expected, rel=1e-5)
        assert (score.greedy, score.num_cut) == (greedy, 0)
    assert scorer._step._cache_size() == 2, "rows of 32 and of 64"


def test_a_greedy_continuation_is_noticed_and_one_wrong_token_too(scorer_of, logits_of):
    ids = [Bytes.eos_id, 65, 66]
    for _ in range(6):
        ids.append(int(logits_of(np.array(ids))[-1].argmax()))
    request = lambda target: Request(np.array(ids[:3]), np.array(target))
    found = scorer_of(32)([request(ids[3:]), request([*ids[3:6], ids[6] ^ 1, *ids[7:]])])
    assert [score.greedy for score in found] == [True, False]
    assert found[0].log_prob > found[1].log_prob


def test_a_long_context_loses_its_beginning_and_that_is_counted(scorer_of, by_hand):
    (request,) = requests_of([(50, 7)])
    (score,) = scorer_of(20)([request])
    kept = Request(request.context[-14:], request.target)  # 20 inputs: 14 + 7 - 1
    assert score.num_cut == 36
    assert score.log_prob == pytest.approx(by_hand(kept)[0], rel=1e-5)


def test_what_cannot_be_scored_is_an_error(scorer_of):
    scorer = scorer_of(20)
    assert len(scorer(requests_of([(1, 20)]))) == 1
    with pytest.raises(UserError, match="21 tokens are to be scored at once and the model sees 20"):
        scorer(requests_of([(1, 21)]))
    with pytest.raises(UserError, match="at least one token"):
        scorer(requests_of([(0, 3)]))
    with pytest.raises(UserError, match="a length of 0 tokens"):
        scorer_of(0)
    assert scorer([]) == []


@pytest.mark.slow
def test_a_mesh_changes_no_score(scorer_of):
    requests = requests_of(SIZES[:1] * 5)
    one = scorer_of(32)(requests)
    many = scorer_of(32, data=2, fsdp=2, context=2)(requests)
    for a, b in zip(one, many, strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, rel=1e-5)
        assert a.greedy == b.greedy


def test_a_probability_that_is_nan_is_an_error_and_no_answer(model, variables):
    mesh = Mesh(data=1).build()
    broken = jax.tree.map(lambda x: x * np.nan, variables)
    scorer = Scorer(model, broken, mesh, max_length=20)
    with pytest.raises(UserError, match="the probability NaN: look for NaN in the weights"):
        scorer(requests_of([(3, 2)]))

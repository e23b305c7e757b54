import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from moejax.data.subword import HFTokenizer, Subwords
from moejax.data.tokenizer import Bytes, load
from moejax.errors import UserError
from moejax.evaluation.reading import Reading

START = Bytes.eos_id


def words(*merged, special=()):
    """A tokenizer of letters and of these pieces, each made by merges from the left."""
    vocab = [*dict.fromkeys("abcdefgh ."), *merged]
    merges = [(piece[:-1], piece[-1]) for piece in merged]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(vocab)}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated") if not merged else None
    backend.add_special_tokens(["<eos>", *special])
    model = json.loads(backend.to_str())
    size = backend.get_vocab_size()
    return Subwords(model, vocab_size=size, eos_id=backend.token_to_id("<eos>"))


def spelt(tokenizer, request):
    return tuple(
        [tokenizer.decode([i]) for i in part] for part in (request.context, request.target)
    )


def reading(tokenizer, beginning=(), start=0):
    return Reading(tokenizer=tokenizer, beginning=beginning, start=start)


def test_both_are_tokenised_as_one_text():
    tokenizer = words(" a", " ab")
    assert spelt(tokenizer, reading(tokenizer).pair("c.", " ab")) == (["c", "."], [" ab"])
    # a blank at the context's end goes to the continuation, where it is part of a word
    assert spelt(tokenizer, reading(tokenizer).pair("c. ", "ab")) == (["c", "."], [" ab"])
    # the split is by count: here the word of context and continuation is one token
    assert spelt(tokenizer, reading(tokenizer).pair("c a", "bd")) == (["c", " a"], ["d"])
    with pytest.raises(UserError, match="'b' adds no token"):
        reading(tokenizer).pair("c a", "b")


def test_an_empty_context_is_the_start():
    tokenizer = words(" a", " ab")
    pair = reading(tokenizer, start=7).pair("", " ab")
    assert pair.context.tolist() == [7]
    assert [tokenizer.decode([i]) for i in pair.target] == [" ab"]
    # what begins with the start itself is not given it twice
    spelled = reading(tokenizer, start=int(tokenizer.encode("c")[0])).pair("", "cd")
    assert spelt(tokenizer, spelled) == (["c"], ["d"])
    blank = reading(tokenizer, start=7).pair("  ", "c")
    assert blank.context.tolist() == [7]
    assert "".join(tokenizer.decode([i]) for i in blank.target) == "  c"
    with pytest.raises(UserError, match="without text"):
        reading(tokenizer).pair("", "")


def test_the_beginning_is_in_front_of_every_context_once():
    read = reading(Bytes(), beginning=(START,), start=START)
    pair = read.pair("ab", " c")
    assert pair.context.tolist() == [START, 97, 98]
    assert pair.target.tolist() == [32, 99]
    assert read.pair("", " c").context.tolist() == [START]
    tokenizer = words(special=["<bos>"])
    bos = tokenizer.special_ids()["<bos>"]
    assert reading(tokenizer, beginning=(bos,)).encode("<bos>ab").tolist()[:2] == [bos, 0]


def test_what_a_published_tokenizer_puts_in_front_is_known(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("ab")}, merges=[]))
    backend.add_special_tokens(["<s>", "</s>"])
    files = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(files))
    config, seen = HFTokenizer(path=str(tmp_path)), []
    for single in ("$A", "<s> $A"):
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 2)]
        )
        backend.save(str(tmp_path / "tokenizer.json"))
        tokenizer = config.prepare(None, "")
        for one in (tokenizer, load(tokenizer.save(tmp_path / "saved"))):
            assert (one.bos_id, one.eos_id) == (2, 3)
            seen.append(one.beginning().tolist())
            assert one.encode("ab").tolist() == [0, 1]
    assert seen == [[], [], [2], [2]]
    assert Bytes().beginning().tolist() == []


def test_a_special_token_that_a_template_wrote_is_one():
    tokenizer = words(special=["<user>"])
    ids = reading(tokenizer).encode("a<user>b<eos>").tolist()
    special = tokenizer.special_ids()
    assert ids == [0, special["<user>"], 1, special["<eos>"]]
    assert special["<eos>"] not in tokenizer.encode("a<eos>")  # of documents it is text


def test_windows_are_those_of_the_harness():
    """The example of its documentation: ten tokens, four at a time."""
    read = reading(Bytes(), start=START)
    found = [
        ((*w.context, *w.target)[:-1], tuple(w.target))
        for w in read.windows("abcdefghij", length=4, stride=4)
    ]
    ids = np.frombuffer(b"abcdefghij", np.uint8)
    pick = lambda *at: tuple(ids[list(at)])
    assert found == [
        ((START, *pick(0, 1, 2)), pick(0, 1, 2, 3)),
        (pick(3, 4, 5, 6), pick(4, 5, 6, 7)),
        (pick(5, 6, 7, 8), pick(8, 9)),
    ]


@given(st.integers(0, 40), st.integers(1, 12), st.data())
def test_windows_score_every_token_once_with_all_the_context_there_is_room_for(n, length, data):
    stride = data.draw(st.integers(1, length))
    ids = np.arange(n, dtype=np.int32) % 251
    text = bytes(ids.tolist()).decode("latin-1") if n < 128 else ""
    windows = list(reading(Bytes(), start=START).windows(text, length=length, stride=stride))
    assert [t for w in windows for t in w.target] == ids.tolist()
    for number, w in enumerate(windows):
        inputs = len(w.context) + len(w.target) - 1
        assert inputs == (min(n, length) if number == 0 else length)
        assert number == 0 or len(w.target) <= stride

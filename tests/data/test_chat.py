"""Chat sources: which records are refused, and which tokens of the others are scored."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from moejax.data import (
    BPE,
    BestFit,
    ByteTokenizer,
    Chat,
    ConcatChunk,
    Data,
    DataError,
    JsonLines,
    Mixture,
)
from moejax.data.chat import parsed
from moejax.data.dialogue import Conversation, Pair, encoded
from moejax.data.tokenizer import Bytes

EOS = Bytes.eos_id


def write(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def pairs(count):
    return [{"prompt": f"ask {i}? " * (1 + i % 5), "response": f"no {i}é"} for i in range(count)]


def data_of(path, tmp_path, **changes):
    source = Chat(path=path, holdout_every=4)
    data = Data(train=source, tokenizer=ByteTokenizer(), cache_dir=str(tmp_path / "cache"))
    return dataclasses.replace(data, **changes)


def sizes(**changes):
    return {"seq_len": 64, "batch_size": 2, "seed": 0} | changes


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


BAD = [
    ("{no", "is not JSON"),
    ("[1]", "is not an object"),
    ({"prompt": "a"}, "no 'response'"),
    ({"text": "a"}, "'text' but no 'prompt'"),
    ({"prompt": "a", "response": 3}, "response is int, not a text"),
    ({"prompt": None, "response": "a"}, "prompt is NoneType, not a text"),
    ({"prompt": "a", "response": " \n"}, "response is empty"),
    ({"prompt": "a", "messages": []}, "has messages and prompt"),
    ({"messages": []}, "not a list of at least one"),
    ({"messages": ["hello"]}, "message 0 is not an object"),
    ({"messages": [user("a"), {"role": "assistant"}]}, "message 1 has no 'content'"),
    ({"messages": [{"content": "a"}]}, "message 0 has no 'role'"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "role 'bot': use one of system, user"),
    ({"messages": [user("a"), assistant(["b"])]}, "message 1: content is list, not a text"),
    ({"messages": [user("a"), assistant("")]}, "message 1 is empty"),
    ({"messages": [user("a"), assistant("b") | {"weight": 0}]}, "'weight', which would be ignored"),
    ({"messages": [user("a")]}, "no message of the assistant"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_a_bad_record_is_named_by_file_and_line(bad, message, tmp_path):
    path = write(tmp_path / "a.jsonl", ["", pairs(1)[0], bad])
    source = Chat(path=path, holdout_every=2)
    with pytest.raises(DataError) as caught:
        [list(source.documents(split)) for split in ("train", "eval")]
    assert str(caught.value).startswith("a.jsonl:3")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def spelt(ids):
    return bytes(i for i in ids if i < 256).decode()


def test_a_pair_is_its_two_texts_and_the_response_with_the_end_counts():
    (found,) = encoded([Pair(prompt="2 + 2 =", response=" 4é", where="")], Bytes())
    assert spelt(found.ids) == "2 + 2 = 4é"
    assert spelt(found.ids[found.scored[:-1]]) == " 4é"
    assert found.scored[-1]
    assert found.num_bytes == len(" 4é".encode())
    (found,) = encoded([Pair(prompt="", response="x", where="")], Bytes())
    assert spelt(found.ids) == "x"
    assert found.scored.all()


def test_without_a_template_every_turn_of_the_assistant_counts_with_its_end():
    turns = (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    (found,) = encoded([Conversation(messages=turns, where="")], Bytes())
    text = "<|system|>\nS\n<|user|>\na\n<|assistant|>\nb@\n<|user|>\nc\n<|assistant|>\nd@"
    scored = text.replace("b@", "^^").replace("d@", "^^")
    scored = "".join(c if c == "^" else " " for c in scored)
    with_end = [*found.ids, EOS]
    assert "".join("@" if i == EOS else chr(i) for i in with_end) == text
    assert "".join("^" if s else " " for s in found.scored) == scored
    assert found.num_bytes == 2
    # a conversation that ends with the user teaches nobody to stop there
    (found,) = encoded([Conversation(messages=turns[:4], where="")], Bytes())
    assert not found.scored[-1]


def test_batches_score_the_responses_and_nothing_else(tmp_path):
    records = pairs(40)
    loaders = data_of(write(tmp_path / "a.jsonl", records), tmp_path).prepare(**sizes())
    wanted = {r["prompt"] + r["response"]: r["response"] for r in records}
    seen, scored_tokens = [], 0
    for batch in loaders.eval:
        scored_tokens += int(batch.loss_mask.sum())
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                at = batch.segment_ids[row] == segment
                assert batch.tokens[row][at][0] == EOS
                assert batch.targets[row][at][-1] == EOS
                text = spelt(batch.targets[row][at])
                mask = batch.loss_mask[row] & at
                assert spelt(batch.targets[row][mask]) == wanted[text]
                assert mask.sum() == len(wanted[text].encode()) + 1
                seen.append(text)
    assert not any(b.loss_mask[b.segment_ids == 0].any() for b in loaders.eval)
    held = [d.text for d in Chat(path=str(tmp_path / "a.jsonl"), holdout_every=4).documents("eval")]
    assert sorted(seen) == sorted(held)
    assert loaders.num_held_out_tokens == scored_tokens
    assert loaders.held_out_bytes == sum(len(wanted[text].encode()) for text in held)
    assert list(loaders.held_out_texts()) == [wanted[text] for text in held]


def test_a_record_longer_than_a_row_is_cut_and_one_without_a_response_is_left_out(tmp_path, caplog):
    fits = [{"prompt": "p" * 10, "response": f"r{i:02d}"} for i in range(30)]
    cut = {"prompt": "q" * 20, "response": "0123456789" * 20}
    lost = {"prompt": "z" * 100, "response": "never"}
    path = write(tmp_path / "a.jsonl", [*fits, cut, lost])
    data = data_of(path, tmp_path, train=Chat(path=path, holdout_every=1000))
    with caplog.at_level(logging.WARNING):
        loaders = data.prepare(**sizes(batch_size=1))
    held = {d.prompt for d in data.train.documents("eval")}
    assert held == {"p" * 10}, "the hash holds out one of those that fit"
    (message,) = [r.getMessage() for r in caplog.records if "longer than a row" in r.getMessage()]
    assert "of 31 records 2 are longer than a row of 64 tokens" in message
    assert "1 of them were left out" in message
    rows = [loaders.train.batch(t) for t in range(loaders.train.num_rows)]
    text = "".join(spelt(b.targets[b.segment_ids > 0]) for b in rows)
    assert "z" not in text
    assert text.count("q") == 20
    scored = "".join(spelt(b.targets[b.loss_mask]) for b in rows)
    assert ("0123456789" * 20)[:44] in scored
    assert ("0123456789" * 20)[:45] not in scored
    assert all(b.loss_mask.any() for b in rows)
    assert loaders.num_scored_tokens == sum(int(b.loss_mask.sum()) for b in rows)
    assert loaders.num_train_tokens == sum(int((b.segment_ids > 0).sum()) for b in rows)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        data.prepare(**sizes(batch_size=1))
    assert "2 are longer" in caplog.text, "said again when everything comes from the cache"


def test_what_would_lose_every_response_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(40))
    with pytest.raises(DataError, match="ConcatChunk cuts records in two.*BestFit"):
        data_of(path, tmp_path, packing=ConcatChunk()).prepare(**sizes(seq_len=40))
    with pytest.raises(DataError, match="within the first 4 tokens: raise sequence_length"):
        data_of(path, tmp_path).prepare(**sizes(seq_len=4))
    with pytest.raises(DataError, match="holds no record"):
        list(Chat(path=write(tmp_path / "b.jsonl", [])).documents("train"))


def test_one_file_read_as_text_and_as_a_chat_shares_no_cache(tmp_path):
    records = [r | {"text": r["prompt"] + r["response"]} for r in pairs(40)]
    path = write(tmp_path / "a.jsonl", records)
    chat, text = Chat(path=path, holdout_every=4), JsonLines(path=path, holdout_every=4)
    assert chat.fingerprint("train") != text.fingerprint("train")
    as_chat = data_of(path, tmp_path).prepare(**sizes())
    as_text = data_of(path, tmp_path, train=text).prepare(**sizes())
    assert as_chat.fingerprint != as_text.fingerprint
    one, other = as_chat.train.batch(0), as_text.train.batch(0)
    np.testing.assert_array_equal(one.tokens, other.tokens)  # the same tokens, another mask
    np.testing.assert_array_equal(other.loss_mask, other.segment_ids > 0)
    assert one.loss_mask.sum() < other.loss_mask.sum() / 2
    assert as_text.num_scored_tokens == as_text.num_train_tokens == as_chat.num_train_tokens


def test_a_mixture_of_text_and_chat_scores_each_in_its_own_way(tmp_path):
    path = write(tmp_path / "a.jsonl", [r | {"text": "plain " * 8} for r in pairs(40)])
    chat, text = Chat(path=path, holdout_every=4), JsonLines(path=path, holdout_every=4)
    mixture = Mixture(sources=(chat, text), weights=(1.0, 1.0))
    loaders = data_of(path, tmp_path, train=mixture).prepare(**sizes(batch_size=8))
    batch = loaders.train.batch(0)
    for row in range(8):
        mask, real = batch.loss_mask[row], batch.segment_ids[row] > 0
        if "plain" in spelt(batch.targets[row][real]):
            np.testing.assert_array_equal(mask, real)
        else:
            assert 0 < mask.sum() < real.sum()


def test_a_tokenizer_can_be_trained_on_a_chat(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(40))
    data = data_of(path, tmp_path, tokenizer=BPE(vocab_size=270), packing=BestFit())
    loaders = data.prepare(**sizes())
    held = list(data.train.documents("eval"))
    assert loaders.held_out_bytes == sum(len(d.response.encode()) for d in held)


def test_a_field_that_is_there_twice_is_an_error():
    with pytest.raises(DataError, match="the field 'response' is there twice"):
        parsed(b'{"prompt": "a", "response": "b", "response": "c"}', "f:1")

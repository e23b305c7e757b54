"""Samples in packed rows are found by their tokens, wherever they lie."""

import numpy as np

from moejax.objectives.samples import before_responses, document_keys
from moejax.types import Batch


def packed(rows):
    """A batch from rows of (tokens, number of prompt tokens) pairs."""
    length = max(sum(len(tokens) for tokens, _ in row) for row in rows) + 2
    fields = {name: np.zeros((len(rows), length), np.int32) for name in ("t", "s", "p")}
    mask = np.zeros((len(rows), length), bool)
    for r, row in enumerate(rows):
        at = 0
        for segment, (tokens, num_prompt) in enumerate(row, start=1):
            end = at + len(tokens)
            fields["t"][r, at:end], fields["s"][r, at:end] = tokens, segment
            fields["p"][r, at:end] = np.arange(len(tokens))
            mask[r, at + num_prompt - 1 : end] = True
            at = end
    return Batch(
        tokens=fields["t"],
        targets=np.roll(fields["t"], -1, axis=1),
        loss_mask=mask,
        segment_ids=fields["s"],
        positions=fields["p"],
    )


A, B, C = ([5, 6, 7, 8], 2), ([5, 6, 8, 7], 3), ([9, 1], 1)


def test_the_token_before_each_response():
    found = np.asarray(before_responses(packed([[A, B], [C, A, C]])))
    expected = np.zeros_like(found)
    expected[0, [1, 4 + 2]] = True
    expected[1, [0, 2 + 1, 2 + 4]] = True
    np.testing.assert_array_equal(found, expected)


def test_a_second_response_of_a_chat_is_not_a_second_sample():
    batch = packed([[([1, 2, 3, 4, 5, 6], 2)]])
    mask = batch.loss_mask.copy()
    mask[0, 3] = False
    found = np.asarray(before_responses(Batch(**vars(batch) | {"loss_mask": mask})))
    assert np.flatnonzero(found[0]).tolist() == [1]


def test_a_key_is_that_of_the_tokens_wherever_they_lie():
    keys = np.asarray(document_keys(packed([[A, B], [C, A, C]])))
    first = {"A": keys[:, 0, 0], "B": keys[:, 0, 4], "C": keys[:, 1, 0]}
    np.testing.assert_array_equal(keys[:, 1, 2], first["A"])
    np.testing.assert_array_equal(keys[:, 1, 6], first["C"])
    np.testing.assert_array_equal(keys[:, 0, :4], keys[:, 0, :1].repeat(4, axis=1))
    for half in (0, 1):
        assert len({int(key[half]) for key in first.values()}) == 3, "order and content count"
    assert not keys[:, 0, 8:].any(), "padding has no key"
    salted = np.asarray(document_keys(packed([[A, B], [C, A, C]]), salt=1))
    assert (salted[:, 0, :8] != keys[:, 0, :8]).all()


def test_keys_of_many_documents_differ():
    """2,000 documents that differ in one token or in order: no two 64-bit keys are equal."""
    documents = [([i % 50, i // 50, 7, 7 + i % 3], 1) for i in range(1000)]
    documents += [(tokens[::-1], 1) for tokens, _ in documents]
    distinct = {tuple(tokens) for tokens, _ in documents}
    keys = np.asarray(document_keys(packed([[d] for d in documents])))[:, :, 0]
    assert len(np.unique(keys, axis=1).T) == len(distinct) > 1900

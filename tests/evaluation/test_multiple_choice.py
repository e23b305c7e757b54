"""Which choice each metric takes, its standard error, and the files that are refused."""

import dataclasses
import json
import logging
import math
import statistics

import numpy as np
import pytest

from moejax.data.tokenizer import Bytes
from moejax.errors import UserError
from moejax.evaluation.likelihood import Score
from moejax.evaluation.multiple_choice import Question, accuracies, answer, read_questions
from moejax.evaluation.perplexity import TextScore, read_text, score_texts
from moejax.evaluation.reading import Reading

READING = Reading(tokenizer=Bytes(), beginning=(), start=Bytes.eos_id)


def answers(question, *log_probs):
    seen = []

    def scorer(requests):
        seen.extend(bytes(r.target.tolist()).decode() for r in requests)
        return [Score(p, False, n) for n, p in enumerate(log_probs)]

    (found,) = answer(scorer, READING, [question])
    assert seen == [f" {choice}" for choice in question.choices]
    return found


def test_the_metrics_divide_by_nothing_by_characters_and_by_bytes():
    question = Question(context="Q", choices=("ab", "abcd", "äöüß"), answer=1)
    found = answers(
        question, -4.0, -6.0, -6.4
    )  # per character -2, -1.5, -1.6; bytes -2, -1.5, -0.8
    assert found.right == {"acc": False, "acc_norm": True, "acc_bytes": False}
    assert found.log_probs == (-4.0, -6.0, -6.4)
    assert found.num_cut == 2
    equal = Question(context="Q", choices=("x", "y"), answer=0)
    assert answers(equal, -1.0, -1.0).right["acc"], "the first wins among equals"


def test_standard_errors_are_of_the_sample():
    question = Question(context="Q", choices=("a", "b"), answer=0)
    outcomes = [True, True, False, True, False]
    found = accuracies([answers(question, -1.0 if ok else -3.0, -2.0) for ok in outcomes])
    value, error = found["acc"]
    assert value == 0.6
    assert error == pytest.approx(statistics.stdev(map(float, outcomes)) / math.sqrt(5))
    assert math.isnan(accuracies([answers(question, -1.0, -2.0)])["acc"][1])


GOOD = {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}


def test_records_of_both_spellings(tmp_path):
    path = tmp_path / "q.jsonl"
    other = {"context": "", "choices": ["a", "b", "c"], "answer": 0, "id": 7}
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(other)}\n")
    assert read_questions(str(path)) == [
        Question(context="2 + 2 =", choices=("3", "4"), answer=1),
        Question(context="", choices=("a", "b", "c"), answer=0),
    ]


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{", "is not JSON"),
        ("3", "is not an object"),
        ({"choices": ["a", "b"], "answer": 0}, "one of 'context' and 'question'"),
        (GOOD | {"context": "x"}, "one of 'context' and 'question'"),
        (GOOD | {"question": None}, "question is NoneType, not a text"),
        (GOOD | {"choices": "ab"}, "not a list of two"),
        (GOOD | {"choices": ["a"]}, "not a list of two"),
        (GOOD | {"choices": ["a", ""]}, "the choice '' is not a text, or empty"),
        (GOOD | {"choices": ["a", 3]}, "the choice 3 is not a text"),
        (GOOD | {"answer": 2}, "answer is 2, not the index of a choice, 0 to 1"),
        (GOOD | {"answer": -1}, "answer is -1"),
        (GOOD | {"answer": "B"}, "answer is 'B'"),
        (GOOD | {"answer": True}, "answer is True"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(bad, message, tmp_path):
    path = tmp_path / "q.jsonl"
    text = bad if isinstance(bad, str) else json.dumps(bad)
    path.write_text(f"\n{json.dumps(GOOD)}\n{text}\n")
    with pytest.raises(UserError) as caught:
        read_questions(str(path))
    assert f"{path}:3" in str(caught.value)
    assert message in str(caught.value)


def test_files_that_hold_no_question_or_no_text(tmp_path):
    (tmp_path / "e").write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(str(tmp_path / "e"))
    with pytest.raises(UserError, match="cannot read .*nowhere"):
        read_questions(str(tmp_path / "nowhere"))
    (tmp_path / "b").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="not UTF-8 text .byte 2."):
        read_text(str(tmp_path / "b"))
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        read_text(str(tmp_path / "c"))
    (tmp_path / "d").write_bytes("a\r\nä".encode())
    assert read_text(str(tmp_path / "d")) == "a\r\nä"


def test_texts_are_scored_each_on_its_own_and_figures_add_up(scorer_of):
    texts = ["The quick brown fox. " * 4, "ä"]
    scorer = scorer_of(32)
    long, short = score_texts(scorer, READING, texts)
    assert short == score_texts(scorer, READING, texts[1:])[0]
    assert (long.num_tokens, long.num_bytes) == (84, 84)
    assert (short.num_tokens, short.num_bytes) == (2, 2)
    (strided,) = score_texts(scorer, READING, texts[:1], stride=5)
    assert strided.num_tokens == 84
    assert strided.log_prob != pytest.approx(long.log_prob), "more context before every token"
    with pytest.raises(UserError, match="a stride of 33"):
        score_texts(scorer, READING, texts, stride=33)
    with pytest.raises(UserError, match="an empty text"):
        score_texts(scorer, READING, [""])


def test_figures():
    score = TextScore(log_prob=-8 * np.log(2), num_tokens=4, num_bytes=16)
    total = score + TextScore(log_prob=-4 * np.log(2), num_tokens=2, num_bytes=4)
    assert total.figures() == pytest.approx(
        {"perplexity per token": 4.0, "bits per token": 2.0, "bits per byte": 0.6}
    )


def test_text_that_the_tokenizer_leaves_out_is_reported(scorer_of, caplog):
    """Bits per byte would be of fewer bytes than they say."""

    class Forgetful(Bytes):
        def encode(self, text):
            return super().encode(text.replace("quick", ""))

    reading = dataclasses.replace(READING, tokenizer=Forgetful())
    with caplog.at_level(logging.WARNING):
        score_texts(scorer_of(32), reading, ["The quick brown fox."])
        assert "keeps 15 of the 20 bytes" in caplog.text
        caplog.clear()
        score_texts(scorer_of(32), READING, ["The quick brown fox."])
    assert not caplog.text

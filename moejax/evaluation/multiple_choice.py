"""Multiple choice by log-likelihood, as EleutherAI's lm-evaluation-harness (0.4.13) counts it.

Each choice is scored as a continuation of the context, with a blank between them. `acc` takes the
choice of the highest log-likelihood, `acc_norm` that of the highest per character of the choice,
`acc_bytes` per UTF-8 byte; the blank is not counted. The first wins among equals. A standard
error is the sample's standard deviation / sqrt(n). Facts from its `api/task.py` and
`api/metrics.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.evaluation.likelihood import Request, Score
from moejax.evaluation.reading import Reading

DELIMITER = " "
_CONTEXT = ("context", "question")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A context, its choices, and which of them is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """A question's log-likelihoods, one per choice, and by each metric whether it is right.

    `num_cut` is the most context tokens that any of its choices lost on the left.
    """

    log_probs: tuple[float, ...]
    right: dict[str, bool]
    num_cut: int


def answer(
    scorer: Callable[[Sequence[Request]], list[Score]],
    reading: Reading,
    questions: Sequence[Question],
) -> list[Answered]:
    """Scores every choice of every question, all at once; `scorer` is a `Scorer`."""
    requests = [reading.pair(q.context, DELIMITER + c) for q in questions for c in q.choices]
    scores = iter(scorer(requests))
    out = []
    for question in questions:
        own = [next(scores) for _ in question.choices]
        log_probs = np.array([score.log_prob for score in own])
        out.append(
            Answered(
                log_probs=tuple(log_probs.tolist()),
                right={
                    name: int(np.argmax(log_probs / sizes)) == question.answer
                    for name, sizes in _sizes(question.choices).items()
                },
                num_cut=max(score.num_cut for score in own),
            )
        )
    return out


def _sizes(choices: Sequence[str]) -> dict[str, np.ndarray]:
    """What each metric divides the log-likelihoods by."""
    return {
        "acc": np.ones(len(choices)),
        "acc_norm": np.array([len(choice) for choice in choices], np.float64),
        "acc_bytes": np.array([len(choice.encode()) for choice in choices], np.float64),
    }


def accuracies(answered: Sequence[Answered]) -> dict[str, tuple[float, float]]:
    """{metric: (share of right answers, its standard error)}; NaN as the error of one question."""
    out = {}
    for name in answered[0].right:
        right = np.array([one.right[name] for one in answered], np.float64)
        error = right.std(ddof=1) / math.sqrt(len(right)) if len(right) > 1 else math.nan
        out[name] = (float(right.mean()), float(error))
    return out


def read_questions(path: str) -> list[Question]:
    """The records of a `.jsonl` file: {"context" or "question", "choices", "answer": index}.

    Raises UserError that names file and line of the first that is none.
    """
    try:
        lines = pathlib.Path(path).expanduser().read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    found = [_question(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{path} holds no question: write one object per line")
    return found


def _question(line: bytes, where: str) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): write one object per line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object with question, choices and answer")
    given = [key for key in _CONTEXT if key in record]
    if len(given) != 1:
        raise UserError(f"{where} needs one of 'context' and 'question'")
    context, choices, right = record[given[0]], record.get("choices"), record.get("answer")
    if not isinstance(context, str):
        raise UserError(f"{where}: {given[0]} is {type(context).__name__}, not a text")
    choices = _choices(choices, where)
    return Question(context=context, choices=choices, answer=_index(right, len(choices), where))


def _choices(choices: Any, where: str) -> tuple[str, ...]:
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where}: choices is not a list of two texts or more")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise UserError(f"{where}: the choice {choice!r} is not a text, or empty")
    return tuple(choices)


def _index(right: Any, num_choices: int, where: str) -> int:
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < num_choices:
        raise UserError(
            f"{where}: answer is {right!r}, not the index of a choice, 0 to {num_choices - 1}"
        )
    return right

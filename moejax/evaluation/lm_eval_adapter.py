"""moejax models in EleutherAI's lm-evaluation-harness, under the name `moejax`.

    python -m moejax.evaluation --model moejax --model_args path=runs/tiny --tasks arc_easy

is `lm_eval run` with that name known: the harness (0.4.13) finds models of other packages only
once they are imported. In Python, `import moejax.evaluation.lm_eval_adapter` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from moejax.errors import UserError
from moejax.evaluation.likelihood import Scorer
from moejax.evaluation.open_model import open_model
from moejax.models.generate import Sampling, generate
from moejax.parallel.mesh import AXES, Mesh

_NEW_TOKENS = 256  # where a task does not say
_PROMPTS = 8  # continued at a time
_SHORTEST = 32  # prompts are filled up to a power of two, so that few programs are compiled
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


@register_model("moejax")
class MoejaxLM(LM):
    """A run, an import or a Hugging Face folder.

    Args:
      path: the folder, as for `moejax evaluate`.
      step: of a run, the checkpoint.
      max_length: tokens that the model sees at a time.
      batch_tokens: positions computed at a time. The harness's batch_size, max_batch_size and
        device, which come with defaults of their own, say nothing here.
      seed: of sampling, where a task samples.
      data, fsdp, expert, tensor, context: sizes of the mesh; none is one device.
    """

    def __init__(
        self,
        path: str,
        step: int | None = None,
        max_length: int | None = None,
        batch_tokens: int = 4096,
        seed: int = 0,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: str | None = None,
        **mesh: int,
    ):
        super().__init__()
        del batch_size, max_batch_size, device  # given whether or not the user chose them
        unknown = sorted(mesh.keys() - set(AXES))
        if unknown:
            raise UserError(f"model_args {unknown[0]} is unknown; mesh axes are {', '.join(AXES)}")
        self._opened = open_model(path, step=step, mesh=Mesh(**mesh) if mesh else None)
        self._seed, self._max_length = seed, max_length or self._opened.length
        self._scorer = Scorer(
            self._opened.model,
            self._opened.variables,
            self._opened.mesh,
            max_length=self._max_length,
            batch_tokens=batch_tokens,
        )

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        """(log-likelihood, whether greedy) of continuations given contexts."""
        del disable_tqdm
        pairs = [request.args for request in requests]
        scores = self._scorer([self._opened.reading.pair(*pair) for pair in pairs])
        found = [(score.log_prob, score.greedy) for score in scores]
        return self._cached("loglikelihood", requests, found)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        """Log-likelihood of whole texts, window by window; every token counts once."""
        del disable_tqdm
        length, reading = self._max_length, self._opened.reading
        windows = [
            list(reading.windows(request.args[0], length=length, stride=length))
            for request in requests
        ]
        scores = iter(self._scorer([window for own in windows for window in own]))
        found = [math.fsum(next(scores).log_prob for _ in own) for own in windows]
        return self._cached("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
        """Continuations, cut before the first stop text; greedy unless the task samples.

        A context that leaves no room for them loses its beginning.
        """
        del disable_tqdm
        groups: dict[tuple[Sampling, int], list[int]] = {}
        prompts, stops = [], []
        for number, request in enumerate(requests):
            context, given = request.args
            sampling, stop = _sampling(given)
            room = self._max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"{sampling.max_new_tokens} new tokens leave no room for a context in "
                    f"{self._max_length}: raise max_length, or lower the task's max_gen_toks"
                )
            ids = self._opened.reading.encode(context)[-room:]
            prompts.append(ids if len(ids) else np.array([self._opened.reading.start], np.int32))
            stops.append(stop)
            power = max(_SHORTEST, 1 << (len(prompts[-1]) - 1).bit_length())
            groups.setdefault((sampling, min(power, room)), []).append(number)
        texts = dict(self._continued(groups, prompts))
        found = [_cut(texts[number], stop) for number, stop in enumerate(stops)]
        return self._cached("generate_until", requests, found)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a generation prompt its last turn is left open."""
        template = self._opened.tokenizer.chat
        if template is None:
            raise UserError("this tokenizer has no chat template: leave out --apply_chat_template")
        turns = [(turn["role"], turn["content"]) for turn in chat_history]
        if add_generation_prompt:
            return template.render(turns, add_generation_prompt=True)
        return template.render(turns[:-1], add_generation_prompt=True) + turns[-1][1]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, for the harness's records."""
        template = self._opened.tokenizer.chat
        return template.text if chat_template and template is not None else ""

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's caches of requests."""
        return f"moejax-{self._opened.tokenizer.fingerprint()}"

    def _continued(
        self, groups: dict[tuple[Sampling, int], list[int]], prompts: Sequence[np.ndarray]
    ) -> Iterator[tuple[int, str]]:
        """(number, text) of every prompt; batches of one group have one shape."""
        tokenizer = self._opened.tokenizer
        for (sampling, longest), numbers in groups.items():
            filler = np.full(longest, tokenizer.eos_id, np.int32)
            for start in range(0, len(numbers), _PROMPTS - 1):
                some = numbers[start : start + _PROMPTS - 1]
                num_fillers = _PROMPTS - len(some)
                batch = [prompts[n] for n in some] + [filler] * num_fillers
                with jax.set_mesh(self._opened.mesh):
                    new = generate(
                        self._opened.model,
                        self._opened.variables,
                        batch,
                        sampling,
                        seed=self._seed,
                        numbers=some + [len(prompts)] * num_fillers,
                        stop_id=tokenizer.eos_id,
                    )
                yield from zip(some, map(tokenizer.decode, new), strict=False)

    def _cached(self, name: str, requests: Sequence[Any], found: list) -> list:
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial(name, request.args, one)
        return found


def _sampling(given: dict) -> tuple[Sampling, list[str]]:
    """How a task wants a continuation: (sampling, stop texts)."""
    wanted = normalize_gen_kwargs(given, _NEW_TOKENS)
    unknown = sorted(wanted.keys() - _KNOWN)
    if unknown:
        raise UserError(f"generation with {unknown[0]}={wanted[unknown[0]]!r} is not supported")
    sampling = Sampling(
        max_new_tokens=wanted["max_gen_toks"],
        temperature=float(wanted.get("temperature", 1.0)) if wanted.get("do_sample") else 0.0,
        top_p=float(wanted.get("top_p", 1.0)),
    )
    return sampling, [stop for stop in wanted.get("until", []) if stop]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text

"""The same figures as lm-evaluation-harness's own class for transformers, on the same weights."""

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'moejax[lm-eval]'")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from moejax.commands import main  # noqa: E402
from moejax.data.subword import HFTokenizer  # noqa: E402
from moejax.errors import UserError  # noqa: E402
from moejax.evaluation.lm_eval_adapter import MoejaxLM  # noqa: E402
from moejax.evaluation.reading import Reading  # noqa: E402
from tests.commands.published import publish  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LENGTH = 32

PAIRS = [
    ("def f(x):\n    return", " x + 1"),
    ("def f(x):\n    return ", "x + 1"),  # a blank that moves
    ("", "import numpy"),
    ("", "<|end|>import"),  # begins with what stands for an empty context
    ("<|end|>class A", ":"),
    ("import json\n" * 12, "import os"),  # longer than the model may see
    ("a", " ünïcödé 🚀"),
]
QUESTIONS = [
    {"question": "return", "choices": ["source", "a tokenizer that has", "x"], "answer": 2},
    {"question": "import ", "choices": ["numpy", "ünlikely", "y"], "answer": 1},
    {"question": "class A", "choices": ["of documents", "B", "zeta"], "answer": 1},
    {"question": "for i in", "choices": ["range", "the", "w"], "answer": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("published") / "olmoe"
    return publish(out, dtype="float32", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def ours(folder):
    return MoejaxLM(str(folder), max_length=LENGTH, batch_tokens=256)


@pytest.fixture(scope="module")
def theirs(folder):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = TEMPLATE
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, device="cpu")


def instances(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]


def test_log_likelihoods(ours, theirs):
    requests = instances("loglikelihood", *PAIRS)
    expected = theirs.loglikelihood(requests)
    found = ours.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in expected], rtol=2e-5)
    assert len({round(p, 3) for p, _ in found}) == len(PAIRS) - 1, "the blank makes two alike"


def test_rolling_log_likelihoods(ours, theirs):
    texts = [("def f(x):\n    return x\n" * 5,), ("short",), ("x" * 40,)]
    requests = instances("loglikelihood_rolling", *texts)
    found = ours.loglikelihood_rolling(requests)
    np.testing.assert_allclose(found, theirs.loglikelihood_rolling(requests), rtol=2e-5)


def test_greedy_continuations(ours, theirs):
    prompts = ["def f(x):\n", "import", "class A:\n    x = 1\n" * 8]
    plain = {"until": [], "max_gen_toks": 8}
    requests = instances("generate_until", *((prompt, plain) for prompt in prompts))
    expected = theirs.generate_until(requests)
    assert ours.generate_until(requests) == expected
    assert all(expected)
    stop = expected[0][2:4]
    requests = instances("generate_until", (prompts[0], plain | {"until": [stop]}))
    (found,) = ours.generate_until(requests)
    assert [found] == theirs.generate_until(requests)
    assert found == expected[0].split(stop)[0] != expected[0]


def test_what_cannot_be_done_is_refused(ours, folder):
    request = instances("generate_until", ("a", {"until": [], "max_gen_toks": LENGTH}))
    with pytest.raises(UserError, match="no room for a context"):
        ours.generate_until(request)
    request = instances("generate_until", ("a", {"until": [], "repetition_penalty": 2.0}))
    with pytest.raises(UserError, match="repetition_penalty=2.0 is not supported"):
        ours.generate_until(request)
    with pytest.raises(UserError, match="model_args expret is unknown"):
        MoejaxLM(str(folder), expret=2)


def test_a_beginning_token_is_where_the_harness_has_it(theirs, folder, tmp_path, monkeypatch):
    """A tokenizer that puts a token of its own in front of every text, as Llama's does."""
    model = json.loads((folder / "tokenizer.json").read_text())
    begin = {"id": "<|end|>", "type_id": 0}
    model["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": begin}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [299], "tokens": ["<|end|>"]}},
    }
    config = {"eos_token": "<|end|>", "bos_token": "<|end|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    mine = HFTokenizer(path=str(tmp_path)).prepare(None, "")
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), **config
    )
    monkeypatch.setattr(theirs, "tokenizer", other)
    assert (mine.beginning().tolist(), mine.bos_id) == ([299], theirs.prefix_token_id)
    reading = Reading(tokenizer=mine, beginning=(299,), start=mine.bos_id)
    for context, continuation in PAIRS:
        if context:
            found = reading.pair(context, continuation)
            expected = theirs._encode_pair(context, continuation)
            assert (found.context.tolist(), found.target.tolist()) == expected
            assert expected[0][0] == 299


def test_chat_templates(ours, theirs):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for history, prompt in ((turns[:1], True), (turns, True), (turns, False)):
        expected = theirs.apply_chat_template(history, add_generation_prompt=prompt)
        assert ours.apply_chat_template(history, add_generation_prompt=prompt) == expected
    assert ours.chat_template(True) == TEMPLATE


def test_a_task_gives_what_moejax_evaluate_gives(ours, theirs, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    metrics = "".join(f"\n  - metric: {name}" for name in ("acc", "acc_norm", "acc_bytes"))
    task = tmp_path / "tasks" / "four.yaml"
    task.parent.mkdir()
    task.write_text(
        "task: four\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {path}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        f"metric_list:{metrics}\n"
    )
    tasks = TaskManager(include_path=str(task.parent), include_defaults=False)
    given = {"tasks": ["four"], "task_manager": tasks, "bootstrap_iters": 2}
    found, expected = (
        simple_evaluate(model=model, **given)["results"]["four"] for model in (ours, theirs)
    )
    out = tmp_path / "out.json"
    words = ["--multiple-choice", path, "--length", LENGTH, "--json", out]
    assert main(["evaluate", str(folder), *map(str, words)]) == 0
    own = json.loads(out.read_text())["multiple_choice"]
    for name in ("acc", "acc_norm", "acc_bytes"):
        value, error = expected[f"{name},none"], expected[f"{name}_stderr,none"]
        assert found[f"{name},none"] == own[name]["value"] == value
        assert found[f"{name}_stderr,none"] == pytest.approx(error)
        assert own[name]["stderr"] == pytest.approx(error)
    assert {expected[f"{name},none"] for name in ("acc", "acc_norm")} - {0.0, 1.0}

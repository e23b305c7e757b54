import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from moejax.data import BPE, ByteTokenizer, DataError, HFTokenizer, TextFiles, train_bpe
from moejax.data.tokenizer import Bytes, load
from tests.data.conftest import text

TEXTS = [text(i, 40) for i in range(40)]
TOKENIZERS = {"bytes": Bytes(), "bpe": train_bpe(TEXTS, 320)}
AWKWARD = [
    "",
    " ",
    "\n\n\t \r\n  x",
    "<|endoftext|></s>[UNK]",
    "a\0b\x7f\x85\u2028\u2029\ufeff",
    "e\u0301 \u00e9 \U0001f469\u200d\U0001f52c \u0645\u0631\u062d\u0628\u0627",
    "1234567 3.14e-10 __init__.py",
]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("sample", AWKWARD)
def test_round_trip_of_awkward_text(name, sample):
    check_lossless(TOKENIZERS[name], sample)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(sample=st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_round_trip_of_any_text(name, sample):
    check_lossless(TOKENIZERS[name], sample)


def check_lossless(tokenizer, sample):
    ids = tokenizer.encode(sample)
    assert ids.dtype == np.int32
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == sample
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == sample
    assert tokenizer.token_bytes()[ids].sum() == len(sample.encode())
    np.testing.assert_array_equal(tokenizer.encode_batch(["x", sample])[1], ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    tokenizer = TOKENIZERS[name]
    file = tokenizer.save(tmp_path / "checkpoint")
    assert file.name == "tokenizer.json"
    for path in (file, file.parent):
        again = load(path)
        assert again.fingerprint() == tokenizer.fingerprint()
        assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        np.testing.assert_array_equal(again.encode(TEXTS[3]), tokenizer.encode(TEXTS[3]))
        np.testing.assert_array_equal(again.token_bytes(), tokenizer.token_bytes())


def test_fingerprints_differ():
    other = train_bpe(TEXTS[:30], 320)
    assert len({t.fingerprint() for t in (*TOKENIZERS.values(), other)}) == 3


def test_bpe_has_exactly_the_vocabulary_asked_for_and_is_shorter_than_bytes():
    bpe = TOKENIZERS["bpe"]
    assert (bpe.vocab_size, bpe.eos_id) == (320, 319)
    assert (bpe.token_bytes() == 0).sum() == 1
    assert len(bpe.encode(TEXTS[5])) < 0.6 * len(TEXTS[5].encode())


def test_bpe_is_the_same_in_another_process():
    program = (
        "from moejax.data import train_bpe; from tests.data.conftest import text;"
        "print(train_bpe([text(i, 40) for i in range(40)], 320).fingerprint())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == TOKENIZERS["bpe"].fingerprint()


def test_bpe_is_cached_by_source_and_size_and_mended(folder, tmp_path, caplog):
    source = TextFiles(path=str(folder), holdout_every=5)
    cache = str(tmp_path / "c")
    first = BPE(vocab_size=300).prepare(source, cache)
    (file,) = (tmp_path / "c" / "tokenizers").iterdir()
    written = file.stat().st_mtime_ns
    assert BPE(vocab_size=300).prepare(source, cache).fingerprint() == first.fingerprint()
    assert file.stat().st_mtime_ns == written
    assert BPE(vocab_size=301).prepare(source, cache).vocab_size == 301
    file.write_text(file.read_text()[:200])
    assert BPE(vocab_size=300).prepare(source, cache).fingerprint() == first.fingerprint()
    assert "training the tokenizer again" in caplog.text
    assert load(file).fingerprint() == first.fingerprint()


def test_held_out_text_does_not_shape_the_bpe(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.py").write_text(text(i, 100))
    source = TextFiles(path=str(tmp_path), holdout_every=5)
    for _, path in source._split("eval"):
        path.write_text("qqqqzzzz " * 500)
    vocabulary = BPE(vocab_size=300).prepare(source, str(tmp_path / "c")).spec()["model"]
    assert not any("qz" in token or "qq" in token for token in vocabulary["model"]["vocab"])


def test_bad_sizes_and_files_are_errors(tmp_path):
    with pytest.raises(DataError, match="256|257"):
        train_bpe(TEXTS, 200)
    with pytest.raises(DataError, match="gives only"):
        train_bpe(["ab"], 1000)
    with pytest.raises(DataError, match="no tokenizer at"):
        load(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a moejax tokenizer"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path)


def hugging_face_folder(path):
    """A GPT-2 style tokenizer with added special tokens and a post-processor that adds one."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens(["<|end|>", "<|start|>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", backend.token_to_id("<|start|>"))]
    )
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    return backend


def test_hugging_face_tokenizer(tmp_path):
    backend = hugging_face_folder(tmp_path / "hf")
    tokenizer = HFTokenizer(path=str(tmp_path / "hf"), vocab_size=320).prepare(None, "")
    assert tokenizer.eos_id == backend.token_to_id("<|end|>")
    assert tokenizer.vocab_size == 320
    check_lossless(tokenizer, "say <|end|> to " + TEXTS[7])
    assert backend.encode(TEXTS[7]).ids[1:] == tokenizer.encode(TEXTS[7]).tolist()
    tokenizer.save(tmp_path / "saved")
    check_lossless(load(tmp_path / "saved"), "say <|end|> to " + TEXTS[7])
    assert HFTokenizer(path=str(tmp_path / "saved")).prepare(None, "").fingerprint() == (
        tokenizer.fingerprint()
    )


def test_sentencepiece_style_tokenizer(tmp_path):
    """As Mixtral's: "\u2581" for a blank, one in front of the text, bytes as "<0x0A>"."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    words = ["\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *bytes_, *words])}
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "ab")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    backend.save(str(tmp_path / "t.json"))
    tokenizer = HFTokenizer(path=str(tmp_path / "t.json"), eos_token="</s>").prepare(None, "")
    sample = "ab a\nb \u00e9</s> ab"
    ids = tokenizer.encode(sample)
    assert tokenizer.eos_id == 2
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, 2]) == sample
    assert tokenizer.token_bytes()[ids].sum() == len(sample.encode()) + 1  # the blank in front


def test_hugging_face_errors(tmp_path):
    hugging_face_folder(tmp_path / "hf")
    with pytest.raises(DataError, match="end-of-document token '<nope>'"):
        HFTokenizer(path=str(tmp_path / "hf"), eos_token="<nope>").prepare(None, "")
    with pytest.raises(DataError, match="below the 302 ids"):
        HFTokenizer(path=str(tmp_path / "hf"), vocab_size=300).prepare(None, "")
    (tmp_path / "hf" / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="eos_token"):
        HFTokenizer(path=str(tmp_path / "hf")).prepare(None, "")
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="not a Hugging Face tokenizer"):
        HFTokenizer(path=str(tmp_path / "x.json")).prepare(None, "")


def test_byte_tokenizer_config():
    tokenizer = ByteTokenizer().prepare(None, "")
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.vocab_size % 8 == 0


def test_settings_that_a_stored_tokenizer_would_ignore_are_refused(tmp_path):
    path = str(TOKENIZERS["bpe"].save(tmp_path / "t"))
    assert HFTokenizer(path=path, vocab_size=320).prepare(None, "").vocab_size == 320
    for ignored in ({"vocab_size": 512}, {"eos_token": "t"}):
        with pytest.raises(DataError, match="leave out eos_token and vocab_size"):
            HFTokenizer(path=path, **ignored).prepare(None, "")


def test_files_are_read_as_utf_8_whatever_the_locale(tmp_path):
    """In Latin-1 the byte-level alphabet would be read as other letters, without an error."""
    hugging_face_folder(tmp_path / "hf")
    code = (
        "import sys, warnings; from moejax.data import HFTokenizer\n"
        "warnings.filterwarnings('error', category=EncodingWarning, module='moejax')\n"
        "stored = HFTokenizer(path=sys.argv[1]).prepare(None, '').save(sys.argv[2])\n"
        "HFTokenizer(path=str(stored)).prepare(None, '')"
    )
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code]
    folders = [str(tmp_path / "hf"), str(tmp_path / "stored")]
    done = subprocess.run([*command, *folders], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr

"""The tokenizer: special ids, one clear line for an impossible vocabulary, and the stored tokens of every sample."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from harness.catalogue.catalogue import Catalogue
from harness.commands import tokenizer as module
from harness.commands.ingest import IngestConfig
from harness.commands.ingest import run as ingest
from harness.commands.tokenizer import TokenizerConfig, run
from harness.core.errors import UserError
from harness.text.special_tokens import SpecialTokens
from harness.text.tokenizer import Tokenizer, TokenStore
from tests.catalogues import make_catalogue

WORDS = ("red", "green", "blue", "wool", "cotton", "silk", "shirt", "scarf", "jacket", "sleeve", "collar", "winter")
QUERY_TITLE = "worn zipper"  # the train queries' text, which no document has
VAL_TITLE = "Ω"  # a character that only the val split has
VOCAB = 36


def write_catalogue(folder: Path, texts: list[tuple[str, str, str, str]]) -> Path:
    """A catalogue of (kind, split, title, description) that all show one image."""
    make_catalogue(folder, classes=1, queries=1, size=16, ingest=False)
    lines = [f"{i}\t{'	'.join(row)}\timages/000-00.jpg" for i, row in enumerate(texts)]
    manifest = folder / "m.tsv"
    manifest.write_text("\n".join(["id\tkind\tsplit\ttitle\tdescription\timage", *lines]) + "\n", encoding="utf-8")
    ingest(IngestConfig(manifest=manifest, images=folder, out=folder / "cat", workers=1, rows_per_part=16))
    return folder / "cat"


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    texts = [
        ("document", "all", " ".join(rng.choice(WORDS, 3)), " ".join(rng.choice(WORDS, int(rng.integers(0, 20)))))
        for _ in range(40)
    ]
    texts += [("query", "train", QUERY_TITLE, ""), ("query", "val", VAL_TITLE, ""), ("document", "all", "", "")]
    folder = write_catalogue(tmp_path_factory.mktemp("text"), texts)
    run(TokenizerConfig(catalogue=folder, vocab_size=VOCAB))
    return folder


def test_special_ids_and_files(catalogue):
    tokenizer = Tokenizer.load(catalogue)
    assert tokenizer.special == SpecialTokens(vocab_size=VOCAB, pad=0, unk=1, bos=2, eos=3, mask=4)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [tokenizer._pieces.id_of(piece) for piece in pieces] == [0, 1, 2, 3, 4]
    meta = json.loads((catalogue / "tokenizer/tokenizer.json").read_text())
    assert meta["vocab_size"] == tokenizer.vocab_size == VOCAB
    assert [meta[f"{name}_id"] for name in ("pad", "unk", "bos", "eos", "mask")] == [0, 1, 2, 3, 4]
    assert (meta["format"], meta["fields"], meta["model_type"]) == (1, ["title", "description"], "unigram")
    assert {path.name for path in (catalogue / "tokenizer").iterdir()} == {
        "spm.model", "tokenizer.json", "manifest.json",
        *(f"{field}.{name}.npy" for field in ("title", "description") for name in ("tokens", "offsets")),
    }  # fmt: skip


def test_text_survives_and_special_tokens_cannot_be_forged(catalogue):
    tokenizer = Tokenizer.load(catalogue)
    ids = tokenizer.encode("blue wool scarf")
    assert tokenizer.decode(ids) == "blue wool scarf"
    assert tokenizer.decode([2, *ids, 3, 0, 0, 4]) == "blue wool scarf"
    assert not set(tokenizer.encode("[CLS] red [SEP] <unk> [MASK] [PAD]")) & {0, 2, 3, 4}
    assert tokenizer.encode("") == [] == tokenizer.encode("  ")


def test_learns_from_the_train_split_of_both_kinds(catalogue):
    tokenizer = Tokenizer.load(catalogue)
    assert tokenizer.special.unk not in tokenizer.encode(QUERY_TITLE)
    assert tokenizer.special.unk in tokenizer.encode(VAL_TITLE)
    assert any(tokenizer._pieces.id_of("\u2581" + word) is not None for word in WORDS)
    summary = run(TokenizerConfig(catalogue=catalogue, vocab_size=VOCAB, split="val"))
    try:
        assert Tokenizer.load(catalogue).special.unk not in Tokenizer.load(catalogue).encode(VAL_TITLE)
        assert summary["unknown"] > 0  # the train query's words
    finally:
        run(TokenizerConfig(catalogue=catalogue, vocab_size=VOCAB))


def test_store_holds_the_tokens_of_every_sample(catalogue):
    tokenizer, table = Tokenizer.load(catalogue), Catalogue(catalogue).table(["title", "description"])
    for field in ("title", "description"):
        tokens = np.load(catalogue / f"tokenizer/{field}.tokens.npy", mmap_mode="r")
        offsets = np.load(catalogue / f"tokenizer/{field}.offsets.npy", mmap_mode="r")
        assert (tokens.dtype, offsets.dtype, offsets.shape) == (np.int32, np.int64, (table.num_rows + 1,))
        stored = [tokens[offsets[row] : offsets[row + 1]].tolist() for row in range(table.num_rows)]
        assert stored == [tokenizer.encode(text) for text in table[field].to_pylist()]
        assert offsets[0] == 0 and offsets[-1] == len(tokens)


def plain_row(tokenizer: Tokenizer, texts: list[str], max_length: int) -> list[int]:
    """The same layout, one token at a time."""
    ids, room = [tokenizer.special.bos], max_length - 1 - len(texts)
    for text in texts:
        tokens = tokenizer.encode(text)[:room]
        room -= len(tokens)
        ids += [*tokens, tokenizer.special.eos]
    return ids + [tokenizer.special.pad] * (max_length - len(ids))


@pytest.mark.parametrize("max_length", [3, 4, 7, 16, 200])
@pytest.mark.parametrize("fields", [("title", "description"), ("title",), ("description", "title")])
def test_batch_matches_a_plain_layout(catalogue, max_length, fields):
    tokenizer, store = Tokenizer.load(catalogue), TokenStore.open(catalogue)
    table = Catalogue(catalogue).table(list(fields))
    texts = list(zip(*(table[field].to_pylist() for field in fields), strict=True))
    samples = np.random.default_rng(1).integers(0, table.num_rows, 100)
    batch = store.batch(samples, max_length, fields)
    assert (batch.dtype, batch.shape) == (np.int64, (100, max_length))
    assert batch.tolist() == [plain_row(tokenizer, list(texts[sample]), max_length) for sample in samples]


def test_batch_edges(catalogue):
    store, last = TokenStore.open(catalogue), Catalogue(catalogue).num_samples - 1
    assert store.batch(np.array([last]), 6).tolist() == [[2, 3, 3, 0, 0, 0]]  # no text at all
    assert store.batch(np.array([], np.int64), 6).shape == (0, 6)
    with pytest.raises(ValueError, match="max_length 2 holds no"):
        store.batch(np.array([0]), 2)


def test_training_is_deterministic_and_replaces(catalogue):
    files = {path.name: path.read_bytes() for path in (catalogue / "tokenizer").iterdir()}
    run(TokenizerConfig(catalogue=catalogue, vocab_size=VOCAB))
    assert {path.name: path.read_bytes() for path in (catalogue / "tokenizer").iterdir()} == files
    assert not list(catalogue.glob("tokenizer.tmp*"))


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_too_large_a_vocabulary_is_capped_and_said(catalogue, capfd, model_type):
    capfd.readouterr()
    try:
        summary = run(TokenizerConfig(catalogue=catalogue, vocab_size=8000, model_type=model_type))
        largest, told = summary["vocab_size"], capfd.readouterr()
        assert f"the text fills {largest:,} pieces, not --vocab-size 8,000" in told.out
        assert "SentencePiece" not in told.err and "trainer" not in told.err  # its own chatter
        files = {path.name: path.read_bytes() for path in (catalogue / "tokenizer").iterdir()}
        # The same as if the largest had been asked for, and one more is too many.
        assert (
            run(TokenizerConfig(catalogue=catalogue, vocab_size=largest, model_type=model_type))["vocab_size"]
            == largest
        )
        assert "fills" not in capfd.readouterr().out
        assert {path.name: path.read_bytes() for path in (catalogue / "tokenizer").iterdir()} == files
        more = run(TokenizerConfig(catalogue=catalogue, vocab_size=largest + 1, model_type=model_type))
        assert more["vocab_size"] == largest
    finally:
        run(TokenizerConfig(catalogue=catalogue, vocab_size=VOCAB))


@pytest.mark.parametrize("title", ["office chair", "a", "椅子", "7", "-- ~~"])
def test_the_default_vocabulary_fits_any_text(tmp_path, title):
    folder = write_catalogue(tmp_path, [("document", "all", title, "")] * 3)
    run(TokenizerConfig(catalogue=folder))
    own = Tokenizer.load(folder)
    assert own.decode(own.encode(title)) == title


def test_too_small_a_vocabulary_names_the_least(catalogue):
    with pytest.raises(UserError) as raised:
        run(TokenizerConfig(catalogue=catalogue, vocab_size=8))
    match = re.search(
        r"cannot hold the text's characters\. The least is --vocab-size (\d+), or lower", str(raised.value)
    )
    assert match is not None, str(raised.value)
    try:
        run(TokenizerConfig(catalogue=catalogue, vocab_size=int(match[1])))
    finally:
        run(TokenizerConfig(catalogue=catalogue, vocab_size=VOCAB))
    for options, message in (
        ({"vocab_size": 5}, "--vocab-size is 5. 5 are special pieces already"),
        ({"character_coverage": 2.0}, "--character-coverage is 2.0. It must be between 0.9 and 1"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            run(TokenizerConfig(catalogue=catalogue, **options))


def test_no_text_at_all(tmp_path):
    folder = write_catalogue(tmp_path, [("document", "all", "", " "), ("query", "val", "words", "")])
    with pytest.raises(UserError, match=r"no sample of split 'train' of .* has a title or a description"):
        run(TokenizerConfig(catalogue=folder, vocab_size=50))
    assert not (folder / "tokenizer").exists()


def test_long_and_odd_texts_are_learned_from(tmp_path):
    long = " ".join(f"qz{word}" for word in WORDS * 80)  # beyond SentencePiece's default limit of 4,192 bytes
    folder = write_catalogue(
        tmp_path, [("document", "all", "green\0 tea", long), ("document", "all", "緑茶 e\u0301", "")]
    )
    run(TokenizerConfig(catalogue=folder, vocab_size=32))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.special.unk not in tokenizer.encode("qzred") + tokenizer.encode("緑茶")
    assert TokenStore.open(folder).batch(np.array([0]), 2000).shape == (1, 2000)


def test_texts_are_thinned_evenly(catalogue, monkeypatch):
    seen: list[list[str]] = []

    class Trainer:
        @staticmethod
        def train(sentence_iterator, **_):
            seen.append(list(sentence_iterator))

    monkeypatch.setattr(module.sentencepiece, "SentencePieceTrainer", Trainer)
    all_texts = list(module._texts(Catalogue(catalogue), "train"))
    for limit in (len(all_texts), 10, 1):
        _, origin = module._train(Catalogue(catalogue), TokenizerConfig(catalogue=catalogue, max_texts=limit))
        assert origin["texts"] == len(seen[-1]) <= limit
    assert seen[0] == all_texts and seen[1] == all_texts[:: -(-len(all_texts) // 10)]


def test_what_is_missing_or_damaged_is_named(tmp_path):
    folder = write_catalogue(tmp_path, [("document", "all", " ".join(WORDS), "")])
    for opener in (Tokenizer.load, TokenStore.open):
        with pytest.raises(UserError, match=r"has no tokenizer\. Run `shelfmark tokenizer"):
            opener(folder)
    run(TokenizerConfig(catalogue=folder, vocab_size=26))
    model = folder / "tokenizer/spm.model"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"spm\.model differs from its checksum"):
        Tokenizer.load(folder)
    np.save(folder / "tokenizer/title.offsets.npy", np.zeros(5, np.int64))
    with pytest.raises(UserError, match=r"the title tokens in .* do not fit the catalogue"):
        TokenStore.open(folder)


def test_a_kept_tokenizer_encodes_a_grown_catalogue_as_before(tmp_path):
    old, grown = (make_catalogue(tmp_path / name, classes=n) for name, n in (("old", 6), ("grown", 9)))
    run(TokenizerConfig(catalogue=old, vocab_size=48))
    figures = run(TokenizerConfig(catalogue=grown, keep_from=old))
    kept, first = (json.loads((c / "tokenizer" / "tokenizer.json").read_text()) for c in (grown, old))
    assert kept == first and figures["vocab_size"] == 48
    assert Tokenizer.load(grown).encode("red disc no 8") == Tokenizer.load(old).encode("red disc no 8")
    assert (
        TokenStore.open(grown).batch(np.arange(6), 16).tolist() == TokenStore.open(old).batch(np.arange(6), 16).tolist()
    )
    (old / "tokenizer" / "spm.model").write_bytes(b"damaged")
    with pytest.raises(UserError, match="differs from its checksum"):
        run(TokenizerConfig(catalogue=grown, keep_from=old))
    with pytest.raises(UserError, match="has no tokenizer"):
        run(TokenizerConfig(catalogue=grown, keep_from=tmp_path))
    assert Tokenizer.load(grown).vocab_size == 48, "a mistake took away what was there"

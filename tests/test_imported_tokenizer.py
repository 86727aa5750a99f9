"""Tokenizers that come with weights: the ids that `transformers` gives, and a run that trains on them."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
import yaml

from harness.commands.import_weights import ImportConfig
from harness.commands.import_weights import run as import_weights
from harness.commands.tokenizer import TokenizerConfig, run
from harness.core.cli import leaves
from harness.core.errors import UserError
from harness.data.masking import MaskConfig, draw_masks, mask_words
from harness.text.imported_tokenizer import FILES, read_imported
from harness.text.special_tokens import SpecialTokens
from harness.text.tokenizer import Tokenizer, TokenStore
from harness.text.tower_check import require_fit
from harness.train.run import train
from models.item import StreamConfig
from models.text import TextConfig
from tests.runs import arguments

TEXTS = [
    "",
    " ",
    "red wool scarf",
    "  Red  WOOL,\tscarf\n no. 12! ",
    "Café crème, cafe\u0301",
    "緑茶 500g ①",
    "🧣 scarf-like (100% wool) don't",
    "jacket " * 40,
]
FORGED = "[SEP] wool </s> <s> <|endoftext|> [MASK] <mask> <pad> [PAD] <eos>"


def spm(folder: Path, file: str, **settings: Any) -> None:
    """Trains a SentencePiece model on the texts."""
    model = io.BytesIO()
    sentences = [text for text in TEXTS if text.strip()] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=90, hard_vocab_limit=False, minloglevel=3,
        character_coverage=0.98, **settings,
    )  # fmt: skip
    folder.mkdir()
    (folder / file).write_bytes(model.getvalue())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, as the hub has them."""
    hub = tmp_path_factory.mktemp("hub")
    for name in ("Bert", "Roberta", "CLIP", "Siglip2"):
        made = getattr(transformers, f"{name}Tokenizer")().train_new_from_iterator([*TEXTS, FORGED] * 3, 300)
        made.save_pretrained(hub / name.lower())
    shutil.copytree(hub / "bert", hub / "bare")  # bert-base-uncased has no names of its special tokens
    (hub / "bare" / "tokenizer_config.json").unlink()
    file = hub / "bare" / "tokenizer.json"
    padded = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    cut = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    file.write_text(
        json.dumps(
            json.loads(file.read_text()) | {"padding": {**padded, "pad_to_multiple_of": None}, "truncation": cut}
        )
    )
    shutil.copytree(hub / "siglip2", hub / "framed")  # the hub's template has only an end, and its class is Gemma's
    text = (hub / "framed" / "tokenizer_config.json").read_text().replace("Siglip2Tokenizer", "GemmaTokenizer")
    (hub / "framed" / "tokenizer_config.json").write_text(text)
    file = hub / "framed" / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(file))
    end = ("<eos>", library.token_to_id("<eos>"))
    library.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", "$A $B <eos>", [end])
    library.save(str(file))
    spm(hub / "xlmr", "sentencepiece.bpe.model")
    spm(hub / "siglip", "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=3)
    (hub / "siglip" / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    pad = {"content": "</s>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
    (hub / "siglip" / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
    return hub


KINDS = {
    "bert": "BertTokenizer",
    "bare": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "clip": "CLIPTokenizer",
    "xlmr": "XLMRobertaTokenizer",
    "siglip": "SiglipTokenizer",
    "siglip2": "Siglip2Tokenizer",
    "framed": "Siglip2Tokenizer",
}


def opened(folder: Path) -> Tokenizer:
    found = read_imported(folder)
    return Tokenizer(found.model, found.special, found.kind)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(hub: Path, kind: str) -> None:
    tokenizer = opened(hub / kind)
    folder = hub / ("bert" if kind == "bare" else kind)  # theirs would keep the file's padding
    theirs = getattr(transformers, KINDS[kind]).from_pretrained(folder)
    special = tokenizer.special
    assert tokenizer.encode_all(TEXTS) == [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert tokenizer.vocab_size == len(theirs)
    assert (special.pad, special.unk, special.mask) == (theirs.pad_token_id, theirs.unk_token_id, theirs.mask_token_id)
    framed = theirs("")["input_ids"] or [theirs.eos_token_id]  # Siglip2Tokenizer without the hub's template
    assert [x for x in (special.bos, special.eos) if x is not None] == framed
    without = "siglip", "siglip2", "framed"
    assert (special.bos is None) == (kind in without) and (special.mask is None) == (kind in ("clip", "siglip"))
    assert set(theirs.all_special_ids) <= set(special.ids)
    # Rows of one field are what the library gives a model.
    if kind != "siglip2":
        rows = TokenStore.encode(tokenizer, {"title": TEXTS}).batch(np.arange(len(TEXTS)), 12, ("title",))
        right = {"padding": "max_length", "max_length": 12, "truncation": True, "padding_side": "right"}
        assert rows.tolist() == theirs(TEXTS, **right)["input_ids"]
    # What stands for a special token in a text is text; nor does an unknown character end one (CLIP's [UNK] is its
    # end).
    never = set(special.ids) - {special.unk} | {special.pad, special.eos}
    assert not set(tokenizer.encode(FORGED + " \u2603")) & never
    if kind not in ("xlmr", "siglip"):
        forged = theirs(FORGED, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode(FORGED) == [token for token in forged if token not in never]
    assert "wool" in tokenizer.decode(tokenizer.encode("red wool scarf"))


def test_two_fields_without_a_first_token(hub: Path) -> None:
    tokenizer = opened(hub / "siglip")
    a, b = tokenizer.encode_all(["red wool", "scarf"])
    store = TokenStore.encode(tokenizer, {"title": ["red wool", ""], "description": ["scarf", "scarf"]})
    end, pad = tokenizer.special.eos, tokenizer.special.pad
    rows = [[*a, end, *b, end], [end, *b, end]]
    length = len(rows[0]) + 2
    assert store.batch(np.arange(2), length).tolist() == [row + [pad] * (length - len(row)) for row in rows]
    assert store.batch(np.arange(2), 2).tolist() == [[end, end]] * 2
    with pytest.raises(ValueError, match=r"max_length 1 holds no 2 \[SEP\]"):
        store.batch(np.arange(2), 1)


@pytest.mark.parametrize("kind", ["bert", "xlmr", "roberta"])
def test_special_tokens_are_never_masked_and_never_drawn(hub: Path, kind: str) -> None:
    special = opened(hub / kind).special
    special = replace(special, more=(20, special.vocab_size - 2))
    ordinary = np.setdiff1d(np.arange(special.vocab_size), special.ids)
    tokens = np.random.default_rng(0).integers(0, special.vocab_size, (4000, 12))
    replaced, masked = mask_words(tokens, 1.0, special, 3, 0, np.arange(4000))
    assert np.array_equal(masked, np.isin(tokens, ordinary))
    assert np.array_equal(replaced[~masked], tokens[~masked])
    other = replaced[masked & (replaced != special.mask)]
    assert set(other.tolist()) == set(ordinary.tolist()), "drawn pieces are the ordinary ones, all of them"


def test_without_a_mask_token_no_word_can_be_masked(hub: Path) -> None:
    special, tokens = opened(hub / "clip").special, np.arange(24).reshape(2, 12)
    with pytest.raises(UserError, match=r"has no mask token .*data\.masking\.word_rate"):
        draw_masks(MaskConfig(), tokens, 16, special, 3, 0, np.arange(2))
    masks = draw_masks(MaskConfig(word_rate=0.0), tokens, 16, special, 3, 0, np.arange(2))
    assert np.array_equal(masks.tokens, tokens) and not masks.words.any() and masks.patches.any()


def test_what_cannot_be_kept_is_named(hub: Path, tmp_path: Path) -> None:
    def refused(message: str, **files: bytes) -> None:
        for name in files:
            (tmp_path / name.replace("_", ".")).write_bytes(files[name])
        with pytest.raises(UserError, match=message):
            read_imported(tmp_path)

    refused("has no tokenizer.* It can be a run")
    refused(r"has vocab\.txt, but no tokenizer\.json.*save_pretrained", vocab_txt=b"[PAD]\n")
    refused(r"spiece\.model: not a SentencePiece model", spiece_model=b"nothing")
    shutil.copyfile(hub / "siglip" / "spiece.model", tmp_path / "sentencepiece.bpe.model")
    refused(r"sentencepiece\.bpe\.model: its first pieces are not")
    refused(r"tokenizer\.json: not a tokenizer\.json of the tokenizers library", tokenizer_json=b'{"model": 1}')
    text = (hub / "bert" / "tokenizer.json").read_text().replace("[PAD]", "[FILL]")
    refused(r"does not say which of its tokens is pad.*\(pad_token\)", tokenizer_json=text.encode())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[FILL]"}}))
    assert opened(tmp_path).special.pad == opened(hub / "bert").special.pad


ODD = [None, True, 3, 1e300, "x", "\x1b[2J", [], ["[PAD]"], {}, {"content": 3}, {"content": ["[PAD]"]}]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_odd_words_on_special_tokens_are_one_line(hub: Path, tmp_path: Path, file: str) -> None:
    folder, told = shutil.copytree(hub / "bert", tmp_path / "bert"), 0

    def tried(content: str) -> None:
        nonlocal told
        (folder / file).write_text(content)
        try:
            read_imported(folder)
        except UserError as error:
            assert file in str(error) or "does not say which" in str(error)
            assert str(error).isprintable() and len(str(error)) < 500
            told += 1

    for key in ("pad_token", "cls_token", "mask_token", "tokenizer_class", "add_bos_token"):
        for value in ODD:
            tried(json.dumps({key: value}))
    for content in (
        "",
        "[]",
        "3",
        "[" * 100_000,
        '{"pad_token": NaN}',
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ):
        tried(content)
    assert told > 25


@pytest.mark.parametrize("kind", ["bert", "xlmr", "siglip", "siglip2"])
def test_odd_vocabularies_are_one_line(hub: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(hub / kind, tmp_path / kind)
    file = next(file for file in folder.iterdir() if file.name in FILES)
    content = file.read_bytes()
    for garbage in (b"", b"[" * 100_000, b"[]", b"\xff" * 999, content[: len(content) // 2], bytes(len(content))):
        file.write_bytes(garbage)
        with pytest.raises(UserError, match=file.name) as error:
            read_imported(folder)
        assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_a_vocabulary_of_absurd_ids_or_without_a_piece_for_what_is_unknown_is_told(hub: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hub / "bert", tmp_path / "bert")
    text = json.loads((folder / "tokenizer.json").read_text())
    text["model"]["vocab"]["absurd"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"it has the id 2,147,483,648; a vocabulary may have 16,777,216"):
        read_imported(folder)
    del text["model"]["vocab"]["absurd"], text["model"]["vocab"]["[UNK]"]
    text["added_tokens"] = [token for token in text["added_tokens"] if token["content"] != "[UNK]"]
    (folder / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json of the tokenizers library"):
        read_imported(folder)


def test_a_tower_of_other_ids_is_named() -> None:
    special = SpecialTokens(vocab_size=300, pad=1, unk=3, bos=0, eos=2, mask=299)
    fits = TextConfig(vocab_size=300, pad_id=1, eos_id=2, pooling="eos")
    require_fit(special, fits, "model.text")
    require_fit(special, replace(fits, vocab_size=0), "model.text")
    require_fit(special, replace(fits, eos_id=9, pooling="class"), "model.text")
    require_fit(special, StreamConfig(pad_id=1), "model.text")
    for change, message in (
        ({"pad_id": 0}, r"pads with 1, model\.query\.pad_id is 0"),
        ({"eos_id": 9}, r"ends texts with 2, model\.query\.eos_id is 9"),
        ({"vocab_size": 299}, r"has 300 ids, model\.query\.vocab_size is 299"),
    ):
        with pytest.raises(UserError, match=message):
            require_fit(special, replace(fits, **change), "model.query")


def test_an_imported_tower_is_trained_on_its_own_ids(hub: Path, catalogue: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hub / "bert", tmp_path / "bert")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    vocab = len(transformers.BertTokenizer.from_pretrained(folder))
    transformers.BertModel(transformers.BertConfig(**size, vocab_size=vocab)).save_pretrained(folder)
    start, out = tmp_path / "start", tmp_path / "run"
    import_weights(ImportConfig(out=start, text=folder))
    own = shutil.copytree(catalogue, tmp_path / "catalogue")
    recipe = dict(leaves(yaml.safe_load((start / "recipe.yaml").read_text())))
    recipe |= {"model.text.max_length": 16, "train.init_from": start, "train.steps": 2}
    line = arguments(own, out, **recipe)
    roberta = shutil.copytree(hub / "roberta", tmp_path / "roberta")
    run(TokenizerConfig(catalogue=own, keep_from=roberta))
    with pytest.raises(UserError, match=rf"does not fit model\.text: the tokenizer has 300 ids, .*is {vocab}\. Give"):
        train(line)
    figures = run(TokenizerConfig(catalogue=own, keep_from=start))
    assert (figures["vocab_size"], figures["texts"]) == (vocab, 0)
    meta = json.loads((own / "tokenizer" / "tokenizer.json").read_text())
    assert (meta["format"], meta["kind"], meta["source"]) == (2, "tokenizers", "tokenizer.json")
    train(line)
    theirs = opened(folder)
    for place in (own, out):
        assert Tokenizer.load(place).special == theirs.special
        assert Tokenizer.load(place).encode_all(TEXTS) == theirs.encode_all(TEXTS)
    assert TokenStore.open(own).special == theirs.special
    # A run's tokenizer is kept like any other, and a damaged one is not.
    before = (own / "tokenizer" / "title.tokens.npy").read_bytes()
    run(TokenizerConfig(catalogue=own, keep_from=out))
    assert json.loads((own / "tokenizer" / "tokenizer.json").read_text()) == meta
    assert (own / "tokenizer" / "title.tokens.npy").read_bytes() == before
    file = out / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"pad_id": 0', '"pad_id": 7'))
    with pytest.raises(UserError, match=r"tokenizers\.json differs from its checksum"):
        run(TokenizerConfig(catalogue=own, keep_from=out))

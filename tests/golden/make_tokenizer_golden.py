"""Writes tests/golden/tokenizer/*.json: small tokenizers of every supported component, and what the
Hugging Face tokenizers library makes of difficult texts with them (ids, byte offsets, decoding).

    python make_tokenizer_golden.py        (needs: pip install tokenizers; made with 0.23.3)
"""
import json
import pathlib

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors, trainers)

OUT = pathlib.Path(__file__).parent / "tokenizer"
CORPUS = [
    "the quick brown fox jumps over the lazy dog", "the other day the fox was there with them",
    "she sells sea shells by the sea shore, and she's sure they're sea shells",
    "for (int i = 0; i < 10; ++i) { print(i); }", "caf\u00e9 na\u00efve \u00fcber \u00e9t\u00e9 gar\u00e7on",
    "\u4f60\u597d\u4e16\u754c \u4f60\u597d", "2024 was 365 + 1 days", "I'll say we'd don't can't won't",
] * 4
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = [
    "", " ", "   ", "\n", " \n\n  x", "hello", " hello", "the fox", "The  Fox's   den\t\r\n\r\nend ",
    "she'LL they'RE I'm don't '\u017ft", "caf\u00e9 cafe\u0301 \u00fc\u0323 a\u0323\u0302\u0301", "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab\u1100\u116e\u11a8",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 ok", "1234567 3.14 \u0663\u0664 \u00bd\u00b2",
    "a<sep>b <sep> c", "<s>the fox</s>", " <s> </s> ", "x <mask>  y<mask>z", "sub word subword sub",
    "<s><s>  <mask>\n</s>", "\ufb01ne \u210c\u2460 \uff21\uff22\uff23", "\u0130stanbul \u00c0\u00c9", "\u180ea\u200bb\u00a0c\u3000d\u2003", "\u2581under\u2581score __",
    "tabs\tand\x0bvertical\x85next", "emoji\ufe0f\u20e3 \u0e01\u0e33\u0e49 \u0928\u093f", "\u212b\u2126\u1e9b\u0323 \u0958", "zzzzqqqq\u0416\u0416x\u0416",
    "x" * 70 + " " + "ab" * 40, "the" * 60,
]


def train(tokenizer, size, **kwargs):
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **kwargs)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def added(tokenizer, normalized=False):
    tokenizer.add_special_tokens([AddedToken(t, normalized=normalized, special=True) for t in ("<s>", "</s>")])
    tokenizer.add_tokens([
        AddedToken("<sep>", normalized=False),
        AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False, special=True),
        AddedToken("sub", single_word=True, normalized=True),
    ])
    return tokenizer


def template(tokenizer):
    ids = [(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
    return processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)


def byte_level_split():
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    train(t, 310, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    added(t)
    t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template(t)])
    return t


def gpt2_prefix():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    t.decoder = decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=True)
    return added(train(t, 320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def ignore_merges():
    t = byte_level_split()
    whole = json.loads(t.to_str())
    whole["model"]["ignore_merges"] = True
    whole["model"]["merges"] = whole["model"]["merges"][:40]
    whole["normalizer"] = None
    return Tokenizer.from_str(json.dumps(whole))


def sentencepiece(normalized):
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    train(t, 400, special_tokens=["<unk>"] + ["<0x%02X>" % b for b in range(256)])
    t.pre_tokenizer = None
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    added(t, normalized)
    t.post_processor = template(t)
    return plain_bytes(t)


def plain_bytes(t):
    """The trainer made added tokens of <unk> and the byte tokens; real files have the bytes in the model alone."""
    whole = json.loads(t.to_str())
    whole["added_tokens"] = [a for a in whole["added_tokens"] if not a["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(whole))


def metaspace(scheme, split, fuse):
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=fuse))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    t.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return added(train(t, 140, special_tokens=["<unk>"], limit_alphabet=30))


def no_unknown():
    """Characters that the vocabulary lacks vanish."""
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(),
                                         normalizers.Replace(Regex(r"\s+"), " ")])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)])
    return added(train(t, 120), normalized=True)


def decomposed(form, behavior, invert):
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.normalizer = form
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[\s,.]|\d"), behavior, invert), pre_tokenizers.Digits(False)])
    return added(train(t, 130, special_tokens=["<unk>"]))


def whitespace():
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return added(train(t, 130, special_tokens=["<unk>"]))


FIXTURES = {
    "byte_level_split": byte_level_split, "gpt2_prefix": gpt2_prefix, "ignore_merges": ignore_merges,
    "sentencepiece": lambda: sentencepiece(False), "sentencepiece_normalized": lambda: sentencepiece(True),
    "metaspace_first": lambda: metaspace("first", True, False),
    "metaspace_whole": lambda: metaspace("always", False, True),
    "no_unknown": no_unknown, "whitespace": whitespace,
    "nfd_removed": lambda: decomposed(normalizers.NFD(), "removed", False),
    "nfkd_contiguous": lambda: decomposed(normalizers.NFKD(), "contiguous", False),
    "nfc_previous": lambda: decomposed(normalizers.NFC(), "merged_with_previous", False),
    "nfkc_next_inverted": lambda: decomposed(normalizers.NFKC(), "merged_with_next", True),
}


def case(tokenizer, reader, text, add_special):
    encoding = tokenizer.encode(text, add_special_tokens=add_special)
    starts = [0]
    for character in text:
        starts.append(starts[-1] + len(character.encode()))
    offsets = [[starts[a], starts[b]] for a, b in encoding.offsets]
    # The library says (0, 0) for whatever the post-processor adds; ours is the place of insertion.
    if add_special and offsets and encoding.ids[-1] == tokenizer.token_to_id("</s>") and offsets[-1] == [0, 0]:
        offsets[-1] = [starts[-1], starts[-1]]
    out = {"text": text, "add_special_tokens": add_special, "ids": encoding.ids, "offsets": offsets,
           "decoded": reader.decode(encoding.ids, skip_special_tokens=False)}
    without = reader.decode(encoding.ids, skip_special_tokens=True)
    if without != out["decoded"]:
        out["decoded_without_special"] = without
    return out


def main():
    OUT.mkdir(exist_ok=True)
    for name, make in FIXTURES.items():
        tokenizer = make()
        file = json.loads(tokenizer.to_str())
        # Since 0.22 the library decodes a normalized added token to its normalized form, and then no
        # longer skips it as special; as before, and as its other implementations do, we decode to the
        # content.
        plain = json.loads(tokenizer.to_str())
        for token in plain["added_tokens"]:
            token["normalized"] = False
        reader = Tokenizer.from_str(json.dumps(plain))
        cases = [case(tokenizer, reader, text, add) for i, text in enumerate(TEXTS)
                 for add in (False, True) if not add or (file["post_processor"] and i % 7 == 2)]
        path = OUT / (name + ".json")
        path.write_text(json.dumps({"tokenizer": file, "cases": cases}, separators=(",", ":"), ensure_ascii=False) + "\n",
                        encoding="utf-8")
        print(name, len(cases), path.stat().st_size)


if __name__ == "__main__":
    main()

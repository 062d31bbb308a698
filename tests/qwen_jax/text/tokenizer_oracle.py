"""Texts that are awkward for a tokenizer, and transformers to judge what becomes of them."""

import argparse
import inspect
from pathlib import Path

import hypothesis
import transformers
from hypothesis import strategies as st

from qwen_jax.text.tokenizer.tokenizer import Tokenizer

CORPUS = [
    inspect.getsource(argparse),
    "The quick brown fox doesn't jump; they'll've jumped 1234567890 times.\r\n\r\n\tTabs   too.",
    "Ελληνικά, кириллица, עברית, العربية, हिन्दी, ไทย, 汉字漢字, かな, 한국어, ქართული.",
    "naïve café e\u0301 ﬁ Å 👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈",
] * 2
AWKWARD = [
    "",
    " ",
    "don't I'LL we've 'ſ",
    "1234567890 3.14 ٣٤٥",
    "a\r\nb\r\n\r\nc\rd\n",
    "x" + " " * 300 + "y" + "\n" * 70 + "\t" * 9,
    "e\u0301 \u1112\u1161\u11ab \u212b ﬁ",
    "👩‍👩‍👧‍👦 🇩🇪🇫🇷 🏳️‍🌈 ✌🏽",
    "\x00\x07\x1b[0m\x7f\x85\u2028\u200d\ufeff\ufdd0\U0010ffff",
    "Ελλάδα Россия ישראל العربية हिन्दी ไทย 汉字 かな 한국어 ქართ",
    "<|im_end|>",
    "a <|im_start|>user\nhi<|im_end|> b<|endoftext|>",
    "<tool_call>{}</tool_call> <|fim_prefix|>x<|fim_middle|>",
    "<<|im_end|>> <|im_<|im_end|>end|> <|im_end|>\u0338 <|im_ end|>",
]
characters = st.characters(exclude_categories=("Cs",))
texts = st.lists(
    st.one_of(st.sampled_from(AWKWARD), st.text(characters, max_size=6)), max_size=8
).map("".join)
fuzz = hypothesis.settings(max_examples=150, deadline=None)


def load(tok: Tokenizer, folder: Path, **options):
    """What transformers makes of a tokenizer's files."""
    tok.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, **options)

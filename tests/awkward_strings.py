"""Two hundred texts that tokenizers stumble over."""

from __future__ import annotations

import numpy as np

_WRITTEN = [
    "",
    *(" ", "  ", "   ", " " * 17, "\t", "\n", "\n\n\n", "\r\n", " \n ", "\n ", "\u00a0", "\u3000"),
    *("a", " a", "a ", "  a  b   c    d", "a\nb", "a\n\n b", "\ta\tb", "a\r\nb\rc", "a\u2028b"),
    *("0", "1234567890", "3.14159", "1,000,000", "12 345", "٣٤٥", "½ ² ₃ Ⅳ", "0x1F", "1e-9", "-1"),
    *("Hello, world!", "don't can't I'll we've they'RE it'S", "naïve café", "straße", "İstanbul"),
    *("a-b_c/d\\e", "...", "!?!?", "(((", "`code`", "$100%", "a@b.c", "#tag", "<b>x</b>", "&amp;"),
    *("🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "👍🏽", "🙂🙂🙂", "a🙂b", "☃", "\U0001f9ff" * 3),
    *("日本語", "中文 字符", "한국어", "カタカナ", "ﾊﾝｶｸ", "全角ＡＢＣ", "你好，世界！", "𠮷"),
    *("العربية", "עברית", "ไทย", "हिन्दी", "Ελληνικά", "Русский", "ქართული", "አማርኛ"),
    *("e\u0301", "é", "a\u0300\u0301\u0302", "\u0301", "Å Å Å", "ﬁ ﬂ", "Z\u0351\u036b\u0343"),
    *("\u200b", "a\u200bb", "\u200d", "\ufeff", "\ufeffa", "a\u00adb", "\u202eabc\u202c"),
    *("\x00", "a\x00b", "\x01\x02\x1f", "\x7f", "\x80\x9f", "\ufffd", "\ufffe", "\U0010ffff"),
    *("x" * 700, "ab" * 300, "The quick brown fox " * 20, "a" * 99 + " " + "b" * 99, "é" * 120),
    *("<s>", "</s>", "<unk>", "<s> a", "a<s>b", "a <s> b", " <s>", "<s></s>", "<s><s>", "a</s>"),
    *("<tool>", "a <tool> b", "a<tool>b", "  <tool>  ", "<tool", "tool>", "<S>", "< s >", "<s >"),
    *("▁", "▁a", "a▁b", "▁▁", "Ġ", "Ġa", "Ċ", "<0x0A>", "<0xE6><0x97>", "##ing", "\\n", "\\u0041"),
    *("def f(x):\n    return x  # y\n", '{"a": [1, 2.0, null]}', "x = y**2;", "SELECT * FROM t;"),
    *("https://a.b/c?d=e&f=%20", "C:\\a\\b", "user@host:~$", "2026-11-26T02:22:22Z", "A.B.C."),
    *("the the the", "TheCamelCase", "snake_case_name", "ALL CAPS", "tHe", "s", "'s", "'", "''"),
    *("a .", "a ,b", "a ' b", "do n't", "it 's", "a ?", "a !", "“quoted” – dash — em"),
]


def awkward_texts() -> list[str]:
    """The written ones, and pieces of them put together by chance up to 200."""
    rng, texts = np.random.default_rng(0), list(_WRITTEN)
    while len(texts) < 200:
        chosen = rng.integers(len(_WRITTEN), size=3)
        texts.append("".join(_WRITTEN[i][:40] + " " * rng.integers(3) for i in chosen))
    return texts

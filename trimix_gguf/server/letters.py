"""Which of some languages a text is in, as far as its letters tell."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

_LATIN = "abcdefghijklmnopqrstuvwxyz"
_RUSSIAN = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
_ARABIC = "ءآأؤإئابةتثجحخدذرزسشصضطظعغفقكلمنهوىي"
_PERSIAN = "ءآأؤئابپتثجچحخدذرزژسشصضطظعغفقکگلمنهوی"
# Language -> its letters; a word in capitals is a script, as Unicode names its letters.
_LETTERS = {
    "ar": _ARABIC,
    "az": "abcçdeəfgğhxıijkqlmnoöprsştuüvyz",
    "ba": _RUSSIAN + "әөүғҡңҙҫһ",
    "bn": "BENGALI",
    "bo": "TIBETAN",
    "ckb": "ئابپتجچحخدرڕزژسشعغفڤقکگلڵمنوۆهھەیێ",
    "dz": "TIBETAN",
    "en": _LATIN,
    "fa": _PERSIAN,
    "hi": "DEVANAGARI",
    "ja": "HIRAGANA KATAKANA CJK",
    "ka": "GEORGIAN",
    "kk": _RUSSIAN + "әғқңөұүһі" + "ءابپتجچحدرزسشعفقكگلمنڭھهوۇۆۋىيە",
    "km": "KHMER",
    "ko": "HANGUL",
    "ky": _RUSSIAN + "ңөү",
    "lo": "LAO",
    "mn": _RUSSIAN + "өү MONGOLIAN",
    "my": "MYANMAR",
    "or": "ORIYA",
    "ps": _PERSIAN + "ټځڅډړږښګڼۀېۍۓيك",
    "ru": _RUSSIAN,
    "si": "SINHALA",
    "ta": "TAMIL",
    "te": "TELUGU",
    "tg": _RUSSIAN + "ғӣқӯҳҷ",
    "th": "THAI",
    "tk": "abçdeäfghijžklmnňoöprsştuüwyýz",
    "tr": "abcçdefgğhıijklmnoöprsştuüvyz",
    "tt": _RUSSIAN + "әөүҗңһ",
    "ug": "ئابپتجچخدرزژسشغفقكگلمنڭھوۇۆۈۋېىيە",
    "uk": "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя",
    "ur": "ءآابپتٹثجچحخدڈذرڑزژسشصضطظعغفقکگلمنںوہھیے",
    "uz": _LATIN + "ʻʼ‘’" + _RUSSIAN + "ўқғҳ",
    "zh": "CJK",
}


def closest(text: str, choices: Sequence[Sequence[str]]) -> int:
    """The index of the choice, a list of language codes, that has most of the text's letters.

    Of several that have as many, the one with the fewest letters: a Russian text is Russian, though
    Kazakh has its letters too. Where the text has no letter of any, the first.
    """
    counts = Counter(c for c in unicodedata.normalize("NFC", text).lower() if c.isalpha())
    ranks = []
    for codes in choices:
        known = [_letters(code) for code in codes]
        own = sum(n for c, n in counts.items() if any(_has(c, *one) for one in known))
        ranks.append((own, -sum(len(letters) for letters, _ in known) if own else 0))
    return ranks.index(max(ranks))


@cache
def _letters(code: str) -> tuple[frozenset[str], frozenset[str]]:
    """The letters of a language, and the scripts that it has whole; of 'kk-Cyrl' those of 'kk'."""
    text = _LETTERS.get(code.replace("_", "-").split("-")[0].lower(), "")
    scripts = frozenset(word for word in text.split() if word.isupper())
    return frozenset("".join(word for word in text.split() if word not in scripts)), scripts


def _has(letter: str, letters: frozenset[str], scripts: frozenset[str]) -> bool:
    return letter in letters or unicodedata.name(letter, "").split(" ")[0] in scripts

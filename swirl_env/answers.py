"""The official metrics as pure functions.

HotPotQA and CofCA: `hotpot_evaluate_v1.py`. BeerQA: `utils/eval_beerqa.py`, which keeps HotPotQA's rule for yes and no.
MuSiQue: `metrics/answer.py`, SQuAD's F1 without that rule. GSM8K: numeric equality of the one number an answer holds.
All take the maximum over the accepted gold forms (`TaskSet.metrics`).

Departure: in the scripts of HotPotQA, BeerQA and MuSiQue a gold that normalises to nothing ("The The") equals every answer
that does too, an empty one included; here it must match as written, so that no metric can be had for nothing.
Kept, because official: text metrics drop punctuation, so `72.` equals `72` but `72.0` reads as `720`.
"""

import re
import string
from collections import Counter
from fractions import Fraction

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces (HotPotQA `normalize_answer`)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1.0 if both normalise to the same text, else 0.0. A gold that normalises to nothing must match as written."""
    left, right = normalize(prediction), normalize(gold)
    return float(left == right if right else prediction.strip() == gold.strip())


def _overlap(left: str, right: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the words of two normalised texts; zeros where none is common."""
    left_tokens, right_tokens = left.split(), right.split()
    common = sum((Counter(left_tokens) & Counter(right_tokens)).values())
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(left_tokens), common / len(right_tokens)
    return precision, recall, 2 * precision * recall / (precision + recall)


def precision_recall_f1(prediction: str, gold: str) -> tuple[float, float, float]:
    """Token precision, recall and F1 over normalised text (HotPotQA `f1_score`).

    Where either side is `yes`, `no` or `noanswer`, anything but equality scores zero.
    """
    left, right = normalize(prediction), normalize(gold)
    if left != right and {left, right} & {"yes", "no", "noanswer"}:
        return 0.0, 0.0, 0.0
    return _overlap(left, right)


def f1(prediction: str, gold: str) -> float:
    """Token F1 of `precision_recall_f1`."""
    return precision_recall_f1(prediction, gold)[2]


def token_f1(prediction: str, gold: str) -> float:
    """Token F1 as in SQuAD and MuSiQue: no rule for yes and no; where either side has no token, exact match."""
    left, right = normalize(prediction), normalize(gold)
    return _overlap(left, right)[2] if left and right else exact_match(prediction, gold)


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
# never a part of something longer: 1,0000 and 1.2.3 are no numbers
_NUMBER = re.compile(
    rf"(?<![\w.])(?<!\d,)(-?)\s?[$€£]?\s?(-?)((?:{_DIGITS})(?:e[+-]?\d+\b)?)(?:\s?/\s?((?:{_DIGITS})))?(?!\d|[.,]\d)",
    re.I,
)
_DASH = re.compile(r"[\u2212\u2013\u2014](?=\s?[$€£]?\s?\d)")
_EQUALS = re.compile(r"(?<![!<>=])=(?!=)")


def parse_number(text: str) -> Fraction | None:
    """The one number a text holds, or `None` if it holds none or several.

    Reads `1,234`, `$1,000`, `72.`, `-3`, `3/4`, `50%` (as 50) and units (`72 km`); of an equation, the right side.
    """
    text = _EQUALS.split(_DASH.sub("-", text))[-1]
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    minus, minus_too, digits, below = found[0].groups()
    if any(len(part or "") > 400 or len((part or "").lower().partition("e")[2]) > 4 for part in (digits, below)):
        return None  # no gold is that long, and writing it out would take for ever
    value = Fraction(digits.replace(",", "").rstrip("."))
    if below is not None:
        divisor = Fraction(below.replace(",", "").rstrip("."))
        if not divisor:
            return None
        value /= divisor
    return -value if bool(minus) != bool(minus_too) else value


def numeric_equal(prediction: str, gold: str) -> float:
    """1.0 if both hold exactly one number and the numbers are equal, else 0.0 (GSM8K). Fractions: relative 1e-9."""
    left, right = parse_number(prediction), parse_number(gold)
    if left is None or right is None:
        return 0.0
    whole = left.denominator == right.denominator == 1
    return float(abs(left - right) <= (0 if whole else abs(right) / 10**9))

"""Numbers as prose writes them: digits, number words, fractions, percentages, and the constants that units imply."""

import re
from functools import lru_cache

_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
WORDS = {word: float(i) for i, word in enumerate(_SMALL)} | {
    word: 10.0 * i for i, word in enumerate(["thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 3)
}
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "k": 1e3}
# what else a word says, beyond its own number
_IMPLIED = {
    r"half|halves|halfway|halved": (2, 0.5, 1.5),
    r"thirds?": (3, 1 / 3, 2 / 3),
    r"quarters?": (4, 0.25, 0.75, 25),
    r"fourths?": (4, 0.25, 0.75),
    r"fifths?": (5, 0.2),
    r"sixths?": (6, 1 / 6),
    r"sevenths?": (7, 1 / 7),
    r"eighths?": (8, 0.125),
    r"ninths?": (9, 1 / 9),
    r"tenths?": (10, 0.1),
    r"first|once|single|each|every|per|an?|another|more|less|fewer": (1,),
    r"second|twice|doubled?|doubles|doubling|both|couples?|pairs?|duo|twins?|two-\w+|two\w+|other|another|again": (2,),
    r"thrice|tripled?|triples|tripling|triplets?|trio": (3,),
    r"quadrupled?|quadruples|quadruplets?|square": (4,),
    r"quintupled?": (5,),
    r"dozens?": (12,),
    r"decades?": (10,),
    r"century|centuries": (100,),
    r"percent|percentage|%|discount|cents?|\xa2|dollars?|\$|pennies|penny": (100, 0.01),
    r"dimes?": (10, 0.1),
    r"nickels?": (5, 0.05),
    r"seconds?|minutes?|hours?|hourly|mph|minute-\w+|hour-\w+": (60, 3600),
    r"a\.?m|p\.?m|o'clock|noon|midnight|morning|afternoon|evening": (12, 24, 60),
    r"days?|daily|hours?|nights?": (24, 7),
    r"weeks?|weekly|daily|everyday|weekdays?|weekends?|days?|fortnight": (7, 5, 2, 52, 14),
    r"months?|monthly": (12, 30, 4, 31, 28, 52),
    r"january|march|may|july|august|october|december": (31,),
    r"april|june|september|november": (30,),
    r"february": (28, 29),
    r"years?|yearly|annual|annually": (12, 52, 365),
    r"foot|feet|inch|inches": (12,),
    r"yards?": (3, 36),
    r"miles?": (5280, 1760),
    r"pounds?|lbs?|ounces?|oz": (16,),
    r"gallons?|quarts?|pints?|cups?": (4, 2, 8, 16),
    r"tons?|kilograms?|kg|grams?|kilometers?|km|meters?|liters?|litres?|ml|milliliters?|kilo\w*": (1000, 2000),
    r"centimeters?|cm|meters?": (100,),
    r"triangles?|triangular": (3, 2),
    r"rectangles?|rectangular|squares?|perimeter|length|width": (4, 2),
    r"radius|diameter": (2,),
    r"chickens?|birds?|ducks?|bicycles?|bikes?|legs?|shoes|socks|eyes|ears|hands|feet": (2, 4),
    r"cows?|dogs?|cats?|horses?|cars?|tables?|chairs?|tires?|wheels?|animals?|sheep|pigs?|goats?": (4,),
    r"spiders?|octopus\w*": (8,),
    r"insects?": (6,),
    r"average|mean": (2,),
}
_IMPLIED_RE = [(re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.I), values) for pattern, values in _IMPLIED.items()]

_DIGITS = re.compile(r"(?<![\w.])-?\$?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:\s?/\s?(\d+))?\s?(%)?", re.I)
_LETTERS = re.compile(r"[a-z]+")


def key(value: float) -> float:
    """A number rounded so that equal values compare equal as floats."""
    return round(value, 9)


def _spelled(text: str) -> set[float]:
    """Values of runs of number words: `twenty-five`, `two hundred`, `1.5 million` is left to the digits."""
    found, total, current, running = set(), 0.0, 0.0, False
    for word in [*_LETTERS.findall(text.lower()), ""]:
        if word in WORDS:
            found.add(WORDS[word])
            if current % 10 or (current and WORDS[word] >= 10 and current % 100):
                found.add(total + current)
                total, current = 0.0, 0.0
            current += WORDS[word]
            running = True
        elif running and word in _SCALES and word != "k":
            current = (current or 1) * _SCALES[word]
            if _SCALES[word] > 100:
                total, current = total + current, 0.0
        elif not (running and word == "and"):
            if running:
                found.add(total + current)
            total, current, running = 0.0, 0.0, False
    return found


@lru_cache(maxsize=4096)
def written(text: str) -> frozenset[float]:
    """The numbers above 1 that a text writes, in digits or words, and nothing derived from them."""
    digits = {float(match[1].replace(",", "")) for match in _DIGITS.finditer(text)}
    return frozenset(key(value) for value in digits | _spelled(text) if value > 1)


def uses(literals: frozenset[float], number: float) -> bool:
    """Whether a calculation with these literals uses a number: as it is, or as a percentage (also of the rest or the sum)."""
    share = number / 100
    return not literals.isdisjoint(map(key, (number, share, 1 - share, 1 + share, 100 - number, 100 + number)))


@lru_cache(maxsize=4096)
def mentioned(text: str) -> frozenset[float]:
    """Every number that a text writes in digits or words, with what percentages and fractions say."""
    found = _spelled(text)
    for match in _DIGITS.finditer(text):
        value = float(match[1].replace(",", ""))
        found.add(value)
        scale = re.match(r"\s?([a-z]+)", text[match.end() : match.end() + 12], re.I)
        if scale and scale[1].lower() in _SCALES:
            found.add(value * _SCALES[scale[1].lower()])
        if match[2] and float(match[2]):
            below = float(match[2])
            found |= {below, value / below, 1 - value / below, 1 + value / below, below - value, below + value}
        if match[3] or (scale and scale[1].lower() in ("percent", "per")):
            found |= {value / 100, 1 - value / 100, 1 + value / 100, 100 - value, 100 + value, 100.0, 0.01}
    for time in re.finditer(r"\b(\d{1,2}):(\d\d)\b", text):
        found |= {float(time[1]), float(time[2]), float(time[1]) + float(time[2]) / 60}
    if re.search(r"\bcents?\b|\xa2", text, re.I):
        found |= {value / 100 for value in found}
    return frozenset(map(key, found))


@lru_cache(maxsize=4096)
def implied(text: str) -> frozenset[float]:
    """Constants that the words of a text stand for: 12 for `dozen`, 60 for `hours`, 2 for `twice`, 100 for `percent`."""
    return frozenset(key(value) for pattern, values in _IMPLIED_RE if pattern.search(text) for value in values)

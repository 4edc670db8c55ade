"""The `rules` judge: scores a step by rules, without a model and without the gold answer.

In the spirit of the paper's judge (section 2.1, appendix E): is this step reasonable given what has been shown? GOOD is
a score of at least 0.5. Because the score is a reward, each rule also closes a way to farm it.

Any step       0 if its thought states something false or from nowhere about numbers (`judges.written`: every equation, chains of
               equations, equations between letters, numbers of calculations, the boxed answer).
Thought        0.5 if it says something new; the second in a row scores 0.
Malformed      0.
Other tools    0.6 for a new call, 0.5 after one of that tool that was refused; 0.2 after two of these, or after four calls.
Any call       0 on the last step (its result could never be used) or if its evidence is already shown.
Calculation    evaluates; is not a lone number or something that reduces to one (x + 0, x * 1, x - x); is new, also in
               another order; its numbers come from the question (digits, number words, percentages, units), an earlier
               result or small constants; where three results wait unused it uses one of them; and all but three
               calculations of an episode use a number of the question for the first time, or join two waiting results;
               those three score 0.8, 0.6 and 0.5, below a sound answer, or a policy would learn to calculate for ever.
Search         holds a word; is new (not the words of an earlier query that found something, not a paragraph already
               shown); at least half of its content words come from the question or the evidence; from the fourth query
               on, one of them from the evidence; not nearly the words of an earlier query that found something; lower once two paragraphs are shown, so that answering is worth more.
Answer         0 before any evidence; bad if its thought says that it is a guess. After calculations: the latest result, also rounded as written; bad if most numbers
               of the question were never used, lower the fewer were, if another result waits, and after a single
               calculation for three numbers. After searches: `yes` or `no` exactly where the question asks for one, and
               only after two paragraphs that it names; else words that stand together in a paragraph, at most twelve,
               that do not merely repeat the question (unless it offers a choice), with a number or a name where it asks
               for one; lower after a single paragraph, and the less of the question the paragraphs speak of. Number
               words and digits are equal; `yes, both` is a yes.

`RulesJudge(written=True)` (by name `rules-written`) is for solutions written out in prose without tools, as in ProcessBench,
where thoughts follow each other by nature: a thought scores 1, or 0 where `judges.written` finds it wrong or it doubts
itself. It rewards no form at all, so it can be farmed by saying nothing: do not train on it.

What it cannot see: whether a sound calculation is the right one, or a grounded answer the asked one.
"""

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from swirl_env import answers, numerals
from swirl_env.errors import ConfigError, ToolError, near
from swirl_env.judges import written as checks_of
from swirl_env.tools.calculator import evaluate, parse, tidy
from swirl_env.tools.search import words
from swirl_env.types import Step, StepView, ToolCall, Verdict

NAME = "rules@2"

MAX_IDLE = 3
"""Calculations of an episode that may bring nothing new together (more: 0.5 % of the steps of GSM8K's worked solutions)."""

NEAR_REPEAT = 0.7
"""Share of common content words (of those of either) from which a query repeats another."""

HABITS = ("near_repeat", "guess")
"""Rules on searches and answers that can be left out by name, as those of `written.CHECKS`, to measure what each adds."""

_STOP = frozenset(
    [
        "a",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "been",
        "being",
        "by",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "many",
        "me",
        "much",
        "my",
        "no",
        "not",
        "of",
        "on",
        "or",
        "our",
        "she",
        "so",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "to",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "whom",
        "whose",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
    ]
)
_POLAR = re.compile(r"\b(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should)\b", re.I)
_WH = re.compile(r"\b(?:what|which|who|whom|whose|where|when|how|why|name)\b", re.I)
_CHOICE = re.compile(
    r"\bor\b|\bbetween\b|\bout of\b|\bof the two\b|\b\w+(?:er|est)\b.*,|\b(?:first|more|most|both)\b", re.I
)
_ASKS_NUMBER = re.compile(r"\bhow (?:many|much|old|long|tall|far|large|high)\b|\b(?:what|which) year\b", re.I)
_ASKS_PERSON = re.compile(r"^\W*(?:who|whose|whom)\b", re.I)
_GUESS = re.compile(
    r"\b(?:I (?:recall|think|believe|guess|assume)|from memory|not sure|uncertain|unsure|likely|probably|maybe|perhaps|assum\w+|unclear"
    r"|might be|unable|insufficient|(?:couldn't|could not|can't|cannot|did not|didn't|do not|don't|does not|doesn't|no)"
    r" (?:be )?(?:find|found|determined?|identif\w+|verif\w+|confirm|mention|specify|provide|information|direct|explicit|results?|know)"
    r"|not (?:explicitly|directly|provided|mentioned|found|specified))\b",
    re.I,
)


def _verdict(score: float, reason: str) -> Verdict:
    return Verdict(score, reason, NAME)


class RulesJudge:
    """Scores steps by rules, without a model and without the gold answer. Deterministic and stateless.

    Args:
        written: judge what solutions written in prose state, and not the form of an episode with tools.
        off: rules to leave out, by name, of `HABITS` and `written.CHECKS`.

    Examples:
        >>> import gymnasium as gym, swirl_env
        >>> env = gym.make("swirl/GSM8K-v0", judge="rules")
        >>> text, info = env.reset(seed=0)  # ... if Darius scored 10 points? Marius 3 more, Matt 5 more
        >>> for action in ("<calculator>10+3</calculator>", "<calculator>10+3</calculator>", "<answer>99</answer>"):
        ...     verdict = env.step(action)[4]["step"].verdict
        ...     print(verdict.score, verdict.reason)
        1.0 a new calculation from known numbers
        0.0 was calculated before
        0.0 not a result that was calculated
    """

    uses_gold = False

    def __init__(self, written: bool = False, off: Iterable[str] = ()):
        self.written, self.off = written, frozenset(off)
        known = [*checks_of.CHECKS, *HABITS]
        for name in self.off.difference(known):
            raise ConfigError(f"off= names a rule that is not there: {name!r}.{near(name, known)}")
        checks = tuple(checks_of.CHECKS.values()) if written else checks_of.STATEMENTS
        self._checks = tuple(check for check in checks if check.__name__ not in self.off)
        self.name = NAME.replace("rules", "rules-written") if written else NAME
        self.name += "".join(f"-{name}" for name in sorted(self.off))

    def __call__(self, views: list[StepView]) -> list[Verdict]:
        verdicts = [self._judge(view) for view in views]
        return verdicts if self.name == NAME else [replace(verdict, judge=self.name) for verdict in verdicts]

    def _judge(self, view: StepView) -> Verdict:
        action = view.action
        if action.malformed is not None:
            return _verdict(0.0, f"malformed: {action.malformed}")
        if fault := self.fault(view):
            return _verdict(0.0, f"the thought is wrong: {fault}")
        if action.answer is not None:
            verdict = _answer(view, action.answer)
            if verdict.good and "guess" not in self.off and (guess := _GUESS.search(action.thought)):
                return _verdict(0.3, f"a guess: {guess[0]!r}")
            return verdict
        if view.steps_left == 0:
            return _verdict(0.0, "the last step, and not an answer")
        if not action.calls:
            return _verdict(1.0, "nothing false was found") if self.written else _thought(view)
        earlier = _evidence(view.steps)
        verdicts = []
        for call in action.calls:
            if "expression" in call.arguments:
                verdicts.append(_calculation(view.question, earlier, call))
            elif "query" in call.arguments and call.name != "sql":
                verdict = _query(view.question, earlier, call)
                if verdict.good and "near_repeat" not in self.off and _near_repeat(earlier, call):
                    verdict = _verdict(0.2, "nearly the words of an earlier query that found something")
                verdicts.append(verdict)
            else:
                verdicts.append(_other(earlier, call))
            earlier.append(_Shown(call, None))  # a repeat inside one action is a repeat
        return min(verdicts, key=lambda verdict: verdict.score or 0.0)

    def fault(self, view: StepView) -> str | None:
        """What the step's thought states that is false or from nowhere; `None` where nothing is found."""
        text = view.action.thought
        if not text or not (self.written or checks_of.states(text)):
            return None
        said = [
            text for step in view.steps for text in (step.action.thought, *(result.text for result in step.results))
        ]
        return checks_of.wrong(view.question, said, text, self._checks)


@dataclass(frozen=True, slots=True)
class _Shown:
    """An earlier call and what it returned; `None`: nothing yet, or an error."""

    call: ToolCall
    text: str | None

    @property
    def result(self) -> float | None:
        """The value of a calculation."""
        return _float(self.text) if self.text is not None and "expression" in self.call.arguments else None


def _evidence(steps: tuple[Step, ...]) -> list[_Shown]:
    return [
        _Shown(call, result.text if result.error is None else None)
        for step in steps
        for call, result in zip(step.action.calls, step.results, strict=True)
    ]


# -- thoughts


def wrong_equation(text: str) -> str | None:
    """The first written equation that is false (`48 / 2 = 25`), allowing for rounding as written; else `None`."""
    return checks_of.false_equation("", (), text)


def _thought(view: StepView) -> Verdict:
    before = view.steps[-1].action if view.steps else None
    if before is not None and not before.calls:
        return _verdict(0.0, "a second step in a row without a call")
    said = content(view.question).union(*(content(step.action.thought) for step in view.steps))
    thought = content(view.action.thought)
    if len(thought) < 2 or thought <= said:
        return _verdict(0.0, "the thought says nothing new")
    return _verdict(0.5, "a new thought")


# -- calculations


@dataclass(frozen=True, slots=True)
class _Expression:
    form: str
    """Reduced: the same for expressions that differ only by order, brackets of sums and products, or what cancels."""
    literals: tuple[tuple[str, float], ...]
    """Each number as written and its value."""

    @property
    def changes(self) -> bool:
        """False for a lone number and for what reduces to one: x + 0, x * 1, x - x, x * k / k."""
        return not re.fullmatch(r"-?[\d.e+]+", self.form)


@lru_cache(maxsize=4096)
def _read(expression: str) -> _Expression | str:
    """What an expression is, or the sentence that refuses it."""
    try:
        tree = parse(expression)
        evaluate(expression)
    except ToolError as refusal:
        return str(refusal)
    text = tidy(expression)
    literals = tuple(
        (text[node.col_offset : node.end_col_offset], numerals.key(float(node.value)))
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and node.value < 1e300
    )
    return _Expression(_form(tree), literals)


def _form(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
        sums = isinstance(node.op, (ast.Add, ast.Sub))
        parts: Counter[str] = Counter()
        _collect(node, 1, sums, parts)
        neutral = "0" if sums else "1"
        left = {part: count for part, count in parts.items() if count and part != neutral}
        if not left:
            return neutral
        if list(left.values()) == [1]:
            return next(iter(left))
        return f"{'sum' if sums else 'product'}({', '.join(f'{left[part]} x {part}' for part in sorted(left))})"
    if isinstance(node, ast.UnaryOp):
        inner = _form(node.operand)
        return inner if isinstance(node.op, ast.UAdd) else inner[1:] if inner.startswith("-") else f"-{inner}"
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return f"{float(node.value):.12g}" if node.value < 1e300 else str(node.value)
    if isinstance(node, ast.BinOp):
        return f"{type(node.op).__name__}({_form(node.left)}, {_form(node.right)})"
    return ast.dump(node)


def _collect(node: ast.expr, sign: int, sums: bool, parts: Counter[str]) -> None:
    """Add the terms of a sum, or the factors of a product, with their signs."""
    down, up = (ast.Sub, ast.Add) if sums else (ast.Div, ast.Mult)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (down, up)):
        _collect(node.left, sign, sums, parts)
        _collect(node.right, -sign if isinstance(node.op, down) else sign, sums, parts)
    elif sums and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _collect(node.operand, -sign, sums, parts)
    else:
        parts[_form(node)] += sign


def _calculation(question: str, earlier: list[_Shown], call: ToolCall) -> Verdict:
    expression = _read(str(call.arguments["expression"]))
    if isinstance(expression, str):
        return _verdict(0.0, f"does not evaluate: {expression}")
    if not expression.changes:
        return _verdict(0.0, "calculates nothing: a lone number, or an operation that changes nothing")
    calculations = [
        (shown, read)
        for shown in earlier
        if isinstance(read := _read(str(shown.call.arguments.get("expression", ""))), _Expression)
    ]
    if any(read.form == expression.form for _, read in calculations):
        return _verdict(0.0, "was calculated before")
    results = [value for shown in earlier if (value := shown.result) is not None]
    known = _known_numbers(question)
    for shown in earlier:
        if shown.text is not None and shown.result is None:
            known = known | numerals.mentioned(shown.text)  # a number read in a paragraph
    foreign = [
        text
        for text, value in expression.literals
        if value not in known and not any(_rounds_to(abs(result), text) for result in results)
    ]
    if "%" in str(call.arguments["expression"]):
        foreign = [text for text in foreign if text != "100"]
    if foreign:
        score = 0.4 * (1 - len(foreign) / len(expression.literals))
        return _verdict(score, f"{foreign[0]} is neither in the question nor a result")
    used = [text for _, read in calculations for text, _ in read.literals]
    waiting = [value for value in results if not any(_rounds_to(value, text) for text in used)]
    taken = sum(any(_rounds_to(value, text) for text, _ in expression.literals) for value in waiting)
    if len(waiting) >= 3 and not taken:
        return _verdict(0.2, f"{len(waiting)} results wait unused, and this uses none of them")
    if not _advances(question, expression, used, taken):
        idle = _idle(question, [(read, shown.result) for shown, read in calculations])
        if idle >= MAX_IDLE:
            return _verdict(0.2, "neither a new number of the question nor two results that wait: time to answer")
        return _verdict(max(0.5, 0.8 - 0.2 * idle), "a new calculation, but of nothing new: an answer may be due")
    return _verdict(1.0, "a new calculation from known numbers")


def _advances(question: str, expression: _Expression, used: list[str], taken: int) -> bool:
    """Whether a calculation uses a number of the question for the first time, or brings two waiting results together."""
    before = {numerals.key(float(text)) for text in used}
    fresh = {value for _, value in expression.literals} & numerals.mentioned(question) - before
    return bool(fresh) or taken >= 2


def _idle(question: str, calculations: list[tuple[_Expression, float | None]]) -> int:
    """How many of the calculations so far did not advance."""
    used: list[str] = []
    waiting: list[float] = []
    idle = 0
    for expression, result in calculations:
        taken = [value for value in waiting if any(_rounds_to(value, text) for text, _ in expression.literals)]
        idle += not _advances(question, expression, used, len(taken))
        used += [text for text, _ in expression.literals]
        waiting = [value for value in waiting if value not in taken] + ([] if result is None else [result])
    return idle


@lru_cache(maxsize=1024)
def _known_numbers(question: str) -> frozenset[float]:
    return numerals.mentioned(question) | numerals.implied(question) | {1.0, 2.0}


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _rounds_to(value: float, text: str) -> bool:
    """Whether `text` writes `value`, rounded to the places it shows (a whole number: rounded up, down or to nearest)."""
    written = _float(text)
    if written is None:
        return False
    places = len(text.partition(".")[2].rstrip("0"))
    slack = 0.999 if places == 0 else 0.51 * 10.0**-places
    if places == 0 and value == round(value):
        slack = 0.0
    return abs(value - written) <= slack + 1e-9 * abs(value)


# -- searches


@lru_cache(maxsize=4096)
def content(text: str) -> frozenset[str]:
    """Lower-case words without function words; all words where nothing else is left."""
    every = frozenset(words(text))
    return every - _STOP or every


def _query(question: str, earlier: list[_Shown], call: ToolCall) -> Verdict:
    query = content(str(call.arguments["query"]))
    if not query:
        return _verdict(0.0, "an empty query")
    if len(query) > 30:
        return _verdict(0.2, "a query of over 30 content words")
    if any(query <= content(_text_of(shown.call)) for shown in earlier if shown.text is not None or shown.call == call):
        return _verdict(0.0, "the words of an earlier query that found something, or the same query again")
    for paragraph in _paragraphs(earlier):
        title = content(paragraph.partition("\n")[0])
        if query <= title or (title <= query <= content(paragraph)):
            return _verdict(0.0, "its paragraph is already shown")
    evidence = frozenset().union(*(content(shown.text) for shown in earlier if shown.text is not None))
    asked = content(question)
    tied = len(query & (asked | evidence)) / len(query)
    if tied < 0.5:
        return _verdict(0.4 * tied, "mostly words of neither the question nor the evidence")
    if len(earlier) >= 3 and not query & (evidence - asked):
        return _verdict(0.2, "a fourth query that follows nothing found so far")
    score = (0.6 + 0.4 * tied) * (0.75 if len(_paragraphs(earlier)) > 1 else 1.0)
    return _verdict(max(score, 0.5), "a new query tied to the question or the evidence")


def _near_repeat(earlier: list[_Shown], call: ToolCall) -> bool:
    query = content(str(call.arguments["query"]))
    others = [content(_text_of(shown.call)) for shown in earlier if shown.text is not None]
    return any(len(query & other) >= NEAR_REPEAT * len(query | other) for other in others)


def _text_of(call: ToolCall) -> str:
    return " ".join(map(str, call.arguments.values()))


def _paragraphs(earlier: list[_Shown]) -> list[str]:
    """The paragraphs that searches returned; the first line of each is its title."""
    texts = [shown.text for shown in earlier if shown.text is not None and "query" in shown.call.arguments]
    return list(dict.fromkeys(paragraph for text in texts for paragraph in text.split("\n\n")))


def _other(earlier: list[_Shown], call: ToolCall) -> Verdict:
    """A tool these rules do not know: a call is good if it says something and is not a repeat."""
    if not _text_of(call).strip():
        return _verdict(0.0, "a call without arguments")
    if any(shown.call == call for shown in earlier):
        return _verdict(0.0, "the same call as before")
    mine = [shown for shown in earlier if shown.call.name == call.name]
    refused = sum(shown.text is None for shown in mine)
    if refused >= 2 or len(mine) >= 4:
        return _verdict(
            0.2, f"{refused} calls of this tool were refused" if refused >= 2 else "a fifth call of one tool"
        )
    return _verdict(0.5 if refused else 0.6, "a new call, after one that was refused" if refused else "a new call")


# -- answers


def _answer(view: StepView, answer: str) -> Verdict:
    evidence = [shown for shown in _evidence(view.steps) if shown.text is not None]
    if not evidence:
        return _verdict(0.0, "an answer before any evidence")
    read = [shown.text for shown in evidence if shown.result is None and shown.text is not None]
    by_number = _number_answer(view.question, evidence, answer) if len(read) < len(evidence) else None
    if not read or (by_number is not None and by_number.good):
        return by_number or _verdict(0.0, "an answer before any evidence")
    return _text_answer(view.question, read, answer)


def _number_answer(question: str, evidence: list[_Shown], answer: str) -> Verdict:
    calculated = [shown for shown in evidence if shown.result is not None]
    results = [shown.result for shown in calculated if shown.result is not None]
    number = answers.parse_number(answer)
    written = re.sub(r"[^\d.eE-]", "", answer.rpartition("=")[2].strip(" .")) if number is not None else ""
    if number is None or abs(number) > 10**300:
        return _verdict(0.0, "not one number")
    if float(number) != results[-1] and not _rounds_to(results[-1], written):
        if any(_rounds_to(value, written) for value in results):
            return _verdict(0.3, "an earlier result, not the latest")
        return _verdict(0.0, "not a result that was calculated")
    reads = [_read(str(shown.call.arguments["expression"])) for shown in calculated]
    literals = [literal for read in reads if isinstance(read, _Expression) for literal in read.literals]
    values = frozenset(value for _, value in literals)
    asked = numerals.written(question)
    used = sum(numerals.uses(values, number) for number in asked) / len(asked) if asked else 1.0
    if used < 0.5:
        return _verdict(0.3, "the latest result, but most numbers of the question were never used")
    waiting = any(not any(_rounds_to(abs(value), text) for text, _ in literals) for value in results[:-1])
    hasty = len(results) == 1 and len(asked) >= 3
    score = (0.5 + 0.5 * used) * (0.8 if waiting else 1.0) * (0.6 if hasty else 1.0)
    doubt = ", though another waits unused" if waiting else ", though of a single calculation" if hasty else ""
    return _verdict(max(score, 0.5), f"the latest result{doubt}")


def is_polar(question: str) -> bool:
    """Whether a question asks for yes or no: no question word and no `or`."""
    return bool(_POLAR.search(question)) and not _WH.search(question) and not re.search(r"\bor\b", question, re.I)


@lru_cache(maxsize=4096)
def _plain(text: str) -> str:
    """Normalised as for exact match, dashes as blanks, number words as digits, padded with blanks."""
    tokens = answers.normalize(re.sub(r"[-\u2010-\u2015/]", " ", text)).split()
    return f" {' '.join(f'{numerals.WORDS[token]:g}' if token in numerals.WORDS else token for token in tokens)} "


def _text_answer(question: str, paragraphs: list[str], answer: str) -> Verdict:
    plain, polar = _plain(answer), is_polar(question)
    shown = {paragraph for text in paragraphs for paragraph in text.split("\n\n")}
    titles = {paragraph.partition("\n")[0] for paragraph in shown}
    first = plain.split()[0] if plain.strip() else ""
    if polar or plain.strip() in ("yes", "no"):
        if not polar:
            return _verdict(0.0, "yes or no where the question asks for something else")
        if first not in ("yes", "no"):
            return _verdict(0.0, "the question asks for yes or no")
        named = [title for title in titles if content(title) & content(question)]
        if len(named) < 2:
            return _verdict(0.2, "yes or no before two paragraphs that the question names")
        return _verdict(0.8, "yes or no after two paragraphs that the question names")
    if not plain.strip():
        return _verdict(0.0, "an answer without words")
    if len(plain.split()) > 12:
        return _verdict(0.2, "an answer of over twelve words")
    if _ASKS_NUMBER.search(question) and not any(character.isdigit() for character in plain):
        return _verdict(0.1, "the question asks for a number")
    if _ASKS_PERSON.search(question) and not any(character.isupper() for character in answer):
        return _verdict(0.2, "the question asks for someone, and this names nobody")
    if not any(plain in _plain(text) for text in paragraphs):
        return _verdict(0.0, "does not stand in what was found")
    if not content(answer) - _STOP:
        return _verdict(0.0, "only function words")
    if content(answer) <= content(question) and not _CHOICE.search(question):
        return _verdict(0.3, "repeats the question")
    asked = content(question) - _STOP
    covered = len(asked & frozenset().union(*map(content, shown))) / len(asked) if asked else 1.0
    score = 0.5 + 0.25 * covered + (0.25 if len(shown) > 1 else 0.0)
    return _verdict(
        score, "stands in what was found" if len(shown) > 1 else "stands in the one paragraph that was found"
    )


WRITTEN = RulesJudge(written=True)
"""`rules-written`: scores solutions written out in prose, step by step, without tools.

Examples:
    >>> from swirl_env.judges import make_judge
    >>> from swirl_env.types import Action, StepView
    >>> thoughts = ["Half of 48 is 48/2 = 24.", "Then 48 + 24 = 73."]
    >>> views = [StepView("Ann sold 48 clips, then half as many. How many in all?", (), Action(t, thought=t)) for t in thoughts]
    >>> [verdict.score for verdict in make_judge("rules-written")(views)]
    [1.0, 0.0]
"""

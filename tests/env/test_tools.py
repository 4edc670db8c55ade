"""Calculator, search, and calls of any tool."""

import pickle
import time
from fractions import Fraction
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_env.errors import ConfigError, DataError, ToolError
from swirl_env.tools import Search, calculator, call_tool, make_tool, tool
from swirl_env.tools.calculator import evaluate, show
from swirl_env.tools.search import Bm25, words
from swirl_env.types import Document, ToolCall


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"), ("1,234+1", "1235"), ("$5*2", "10"), ("50%*20", "10"), ("50% of 20", "10"), ("2^3", "8"),
        ("3×4", "12"), ("10÷4", "2.5"), ("3 x 4", "12"), ("48/2=", "24"), ("0.1+0.2", "0.3"), ("1/3*3", "1"),
        ("2**100", "1267650600228229401496703205376"), ("10 % 3", "1"), ("20%", "0.2"), ("(1+2)*3", "9"), ("-5+2", "-3"),
        ("max(1, 234)", "234"), ("12345678901234567890.0+1", "12345678901234567891"), ("10% of 50+1", "6"), ("round(sqrt(2)*10**20)", "1.41421356237e+20"), ("round(-2.5)", "-2"), ("1.10*3", "3.3"), ("0.1*3", "0.3"), ("round(2.5)", "3"), ("round(2.567,2)", "2.57"), ("sqrt(16)", "4"), ("9**0.5", "3"),
        ("007+1", "8"), ("1e3", "1000"), ("7//2", "3"), ("12345678901234567890+1", "12345678901234567891"),
        ("1,000,000*2", "2000000"), ("£3·2", "6"), ("5−2", "3"), ("log10(1000)", "3"), ("0.1^2", "0.01"),
    ],
)  # fmt: skip
def test_calculates_what_people_write(expression, result):
    assert calculator(expression=expression) == result


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("9**9**9", "too large"), ("10**100000", "too large"), ("2**0.5**-99999", "too large"), ("1e400", "too large"),
        ("exp(1000)", "too large"), ("1/0", "zero"), ("5%0", "zero"), ("0**-1", "zero"), ("(-8)**0.5", "not a real number"),
        ("sqrt(-1)", "not a real number"), ("", "empty"), ("  ", "empty"), ("a+1", "'a' is not a number"),
        ("__import__('os').system('id')", "Only numbers"), ("().__class__", "Only numbers"), ("x.y", "Only numbers"),
        ("open('f')", "cannot be called"), ("factorial(9)", "cannot be called"), ("2(3)", "multiplication sign"),
        ("48/2=24", "without '='"), ("5 dollars", "Cannot read"), ("(1", "Cannot read"), ("1+1;2", "Cannot read"),
        ("lambda: 1", "Only numbers"), ("[1]*9", "Only numbers"), ("'a'*9", "Only numbers"), ("True", "Only numbers"),
        ("1j", "Only numbers"), ("-" * 300 + "1", "nested"), ("1+" * 300 + "1", "601 characters"), ("\x00", "Cannot read"),
        ("(" * 195 + "1", "Cannot read"), ("min()", "cannot be called"), ("round(1,2,3)", "does not take 3"), ("9" * 500, "500 characters"),
        ("round(1.5, 10**60)", "does not take"), ("sqrt(10**999)", "too large"), ("max(1,234)", "thousands"),
        ("round(1,050/2)", "thousands"), ("min(2,000, 3,000)", "thousands"), ("100/(20)%", "Cannot read"), ("log(0)", "not a real"),
        ("1e-999999999", "too small"), ("1.0e999999999", "too large"), ("(10**400)**0.5", "too large"),
    ],
)  # fmt: skip
def test_refuses_in_a_sentence_and_fast(expression, says):
    seconds = []
    for _ in range(3):  # one of them may meet a collection of garbage
        start = time.process_time()
        with pytest.raises(ToolError, match=says.replace("(", r"\(")):
            evaluate(expression)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("(10.5\n+2.5)", "13"),
        ("(100.25\n+1.5)", "101.75"),
        ("1.5+\n2.5", "4"),
        ("1.5 +\t2.5", "4"),
        ("½+1", None),
        ("éééé*1.5*1/0", None),
    ],
)
def test_lines_and_letters_do_not_shift_decimals(expression, result):
    if result is None:
        with pytest.raises(ToolError, match="Cannot read"):
            evaluate(expression)
    else:
        assert show(evaluate(expression)) == result


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30), st.sampled_from("+-*"))
def test_integers_are_exact(a, b, op):
    assert evaluate(f"({a}){op}({b})") == {"+": a + b, "-": a - b, "*": a * b}[op]


@given(st.integers(-999, 999), st.integers(1, 999))
def test_division_is_exact(a, b):
    assert evaluate(f"({a})/{b}*{b}") == a
    assert evaluate(f"({a})/{b}") == Fraction(a, b)


@given(st.text(alphabet="0123456789+-*/%^().,$ xe=minaqrtlogpu", max_size=60) | st.text(max_size=60))
def test_any_text_is_a_number_or_a_sentence(text):
    start = time.process_time()
    result = call_tool({"calculator": calculator}, ToolCall("calculator", {"expression": text}))
    assert result.error in (None, "tool_error")
    assert result.text
    assert time.process_time() - start < 0.25


FILMS = [
    Document("Big Fish", "Big Fish is a 2003 film directed by Tim Burton."),
    Document("Tim Burton", "Tim Burton was born in Burbank."),
    Document("Burbank", "Burbank is a city in California."),
]


def bound(**settings):
    search = Search(**settings)
    search.bind(FILMS)
    return search


def test_search_finds_title_and_text():
    assert bound()(query="Big Fish film") == "Big Fish\nBig Fish is a 2003 film directed by Tim Burton."
    assert bound(k=2)(query="Tim Burton").split("\n\n")[0].startswith("Tim Burton\n")
    assert len(bound(k=3)(query="Burton Burbank").split("\n\n")) == 3


@pytest.mark.parametrize(("query", "says"), [("", "no word"), ("?!", "no word"), ("zebra", "Nothing was found")])
def test_search_that_finds_nothing_says_so(query, says):
    with pytest.raises(ToolError, match=says):
        bound()(query=query)


def test_search_without_documents():
    with pytest.raises(ToolError, match="nothing to search"):
        Search()(query="x")


def test_search_in_a_corpus(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"title": "Zebra", "text": "A striped animal."}\n')
    search = Search(corpus=str(corpus))
    search.bind(FILMS)
    assert search(query="zebra") == "Zebra\nA striped animal."
    assert pickle.loads(pickle.dumps(search))(query="zebra") == search(query="zebra")
    corpus_without_text = tmp_path / "bad.jsonl"
    corpus_without_text.write_text('{"title": "Zebra"}\n')
    with pytest.raises(DataError, match="bad.jsonl:1"):
        Search(corpus=str(corpus_without_text))


def test_search_pickles_with_its_documents():
    assert pickle.loads(pickle.dumps(bound()))(query="Burbank city") == bound()(query="Burbank city")


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2"])
def test_search_wants_a_positive_k(k):
    with pytest.raises(ConfigError, match="positive whole number"):
        Search(k=k)


@tool
def repeat(text: str, times: int = 2, loud: bool = False) -> str:
    """Says a text again and again.

    Args:
        text: What to say.
        times: How often.
        loud: In capitals.
    """
    if text == "refuse":
        raise ToolError("I will not say that.")
    if text == "crash":
        raise KeyError("bug")
    said = text * times
    return said.upper() if loud else said


def test_schema_comes_from_hints_and_docstring():
    assert repeat.description == "Says a text again and again."
    assert repeat.parameters["required"] == ["text"]
    assert repeat.parameters["properties"]["times"] == {"default": 2, "type": "integer", "description": "How often."}


@pytest.mark.parametrize(
    ("name", "arguments", "error", "says"),
    [
        ("repeat", {"text": "ab"}, None, "abab"),
        ("repeat", {"text": "ab", "times": "3"}, None, "ababab"),
        ("repeat", {"text": "ab", "loud": "true"}, None, "ABAB"),
        ("repeat", {"text": "</result>"}, None, "&lt;/result>&lt;/result>"),
        ("repeat", {}, "bad_arguments", "repeat takes text, times, loud; got nothing"),
        ("repeat", {"txt": "a"}, "bad_arguments", "got 'txt'"),
        ("repeat", {"text": "a", "times": "many"}, "bad_arguments", "times must be of type integer, got 'many'"),
        ("repeat", {"text": 5}, "bad_arguments", "text must be of type string"),
        ("repeat", {"text": "a", "times": True}, "bad_arguments", "times must be of type integer"),
        ("repeat", {"text": "refuse"}, "tool_error", "I will not say that."),
        ("repeat", {"text": "crash"}, "crash", "KeyError"),
        ("repaet", {"text": "a"}, "unknown_tool", "Did you mean 'repeat'?"),
        ("repeat", {"text": "a", "times": 9000}, None, "more characters were cut"),
    ],
)
def test_every_call_is_a_result(name, arguments, error, says):
    result = call_tool({"repeat": repeat}, ToolCall(name, arguments))
    assert result.error == error
    assert says in result.text


def test_what_is_no_tool_is_told_what_is_missing():
    def bare(x):
        return x

    def untyped(x):
        """Says x."""
        return x

    for value, says in [(bare, "needs a docstring"), (untyped, "needs a type hint for its argument 'x'"), (5, "got 5")]:
        with pytest.raises(ConfigError, match=says):
            make_tool(value)
    assert make_tool(repeat) is repeat


@tool
def typed(
    numbers: list[int], color: Literal["red", "blue"] = "red", half: int | None = None, x: float = 0.0, schema: str = ""
) -> str:
    """Takes many kinds.

    Args:
        numbers: Some.
    """
    return f"{sum(numbers)} {color} {half} {x} {schema}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"numbers": "[1, 2]", "half": "4", "schema": "s"}, "3 red 4 0.0 s"),
        ({"numbers": ["a"]}, "numbers.0: Input should be a valid integer"),
        ({"numbers": [1], "color": "green"}, "color: Input should be 'red' or 'blue'"),
        ({"numbers": [1], "x": "NaN"}, "x: Input should be a finite number"),
        ({"numbers": [1], "x": "1e999"}, "x: Input should be a finite number"),
    ],
)
def test_types_are_held_all_the_way_down(arguments, says):
    result = call_tool({"typed": typed}, ToolCall("typed", arguments))
    assert says in result.text
    assert result.error in (None, "bad_arguments")


def test_whatever_a_tool_does_is_a_result():
    class Silent(Exception):
        def __str__(self):
            raise ValueError("no words")

    def raises() -> str:
        """Raises."""
        raise Silent

    def leaves() -> str:
        """Leaves."""
        raise SystemExit(3)

    def forgets() -> str:
        """Forgets."""

    for function in (raises, leaves, forgets):
        made = tool(function)
        assert call_tool({made.name: made}, ToolCall(made.name, {})).error == "crash"
        with pytest.raises(pickle.PicklingError, match="inside a function"):
            pickle.dumps(made)

    async def later(x: str) -> str:
        """Comes later."""
        return x

    def positional(x: str, /) -> str:
        """Wants a place."""
        return x

    for function in (later, positional):
        with pytest.raises(ConfigError):
            tool(function)


def test_scripts_without_blanks_are_searched_by_pairs():
    assert words("東京は日本の首都です, Tōkyō") == [
        *(a + b for a, b in zip("東京は日本の首都で", "京は日本の首都です", strict=True)),
        "tōkyō",
    ]
    found = Bm25([Document("東京", "東京は日本の首都です"), Document("大阪", "大阪は西の都市です")]).search("首都", 2)
    assert [document.title for document in found] == ["東京"]

r"""One spelling for every way of writing the same thing: `\dfrac12`, `\frac {1}{2}`, `$\tfrac{1}{2}$.`.

Only spelling is decided here, token by token; what is equal is decided in `math_equal.py`. The result is LaTeX that
people and parsers read in one way: arguments in braces, plain-text mathematics (`sqrt(2)`, `x**2`, `pi/4`) turned into
commands, no spacing, sizing or font commands, no thousands separators, no final full stop.
"""
# ruff: noqa: RUF001 (the look-alike characters below are what people type)

from __future__ import annotations

import re
from collections.abc import Callable

from opdkit.tasks.math.sentences import is_lead
from opdkit.tasks.math.text import enclosed, nesting, split_top

MAX_CHARACTERS = 2000
MAX_NESTING = 200

_TOKEN = re.compile(
    r"\\[A-Za-z]+\*?|\\.|[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[A-Za-z]+|\s+|.",
    re.DOTALL,
)
_TEXT_COMMANDS = {
    *("\\text", "\\textbf", "\\textit", "\\textrm", "\\textnormal", "\\texttt", "\\textsf", "\\mathrm"),
    *("\\textsc", "\\emph", "\\mbox", "\\hbox", "\\operatorname", "\\operatorname*"),
}
_WORD_TEXT = {
    **{"infinity": "\\infty", "or": "\\lor", "and": ",", "": " "},
    **dict.fromkeys(("percent", "per cent", "pct"), "\\%"),
}
_SIZES = {
    *("\\left", "\\right", "\\middle", "\\big", "\\Big", "\\bigg", "\\Bigg", "\\bigl", "\\bigr", "\\Bigl", "\\Bigr"),
    *("\\biggl", "\\biggr", "\\Biggl", "\\Biggr"),
}
# Commands that mean the same as another token, or nothing.
_SYNONYMS = {
    **dict.fromkeys(("\\,", "\\;", "\\:", "\\>", "\\ ", "~", "\\thinspace"), " "),
    **dict.fromkeys(("\\quad", "\\qquad", "\\enspace"), "  "),
    **dict.fromkeys(("$", "\\(", "\\)", "\\[", "\\]", "\\!", "\\displaystyle", "\\textstyle", "\\limits"), ""),
    **dict.fromkeys(("\\mathbf", "\\boldsymbol", "\\bm", "\\mathit", "\\mathsf", "\\mathnormal", "\\pmb"), ""),
    **dict.fromkeys(("\\mathtt", "\\underline", "\\rm", "\\bf", "\\it", "\\sf", "\\tt", "\\em", "\\nolimits"), ""),
    **dict.fromkeys(("\\scriptstyle", "\\scriptsize", "\\footnotesize", "\\small", "\\normalsize"), ""),
    **dict.fromkeys(("\\large", "\\Large", "\\LARGE", "\\huge", "\\Huge"), ""),
    **dict.fromkeys(("\\dfrac", "\\tfrac", "\\cfrac"), "\\frac"),
    **dict.fromkeys(("\\dbinom", "\\tbinom"), "\\binom"),
    **dict.fromkeys(("\\leq", "\\leqslant", "\\leqq"), "\\le"),
    **dict.fromkeys(("\\geq", "\\geqslant", "\\geqq"), "\\ge"),
    **dict.fromkeys(("\\times", "\\ast", "*"), "\\cdot"),
    **dict.fromkeys(("\\langle", "\\lparen"), "("),
    **dict.fromkeys(("\\rangle", "\\rparen"), ")"),
    **dict.fromkeys(("\\vert", "\\lvert", "\\rvert", "\\mid"), "|"),
    **dict.fromkeys(("\\backslash", "\\smallsetminus"), "\\setminus"),
    **dict.fromkeys(("\\dots", "\\cdots", "\\dotsc", "…"), "\\ldots"),
    **dict.fromkeys(("\\land",), ","),
    **{"\\neq": "\\ne", "\\lt": "<", "\\gt": ">", "%": "\\%", "\\infin": "\\infty", "\\varnothing": "\\emptyset"},
    **{"\\pounds": "£", "\\textsterling": "£", "\\euro": "€", "\\texteuro": "€", "\\textdollar": "\\$", "\\yen": "¥"},
    **{"\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]", "\\colon": ":"},
}
_INFIX = {"\\over": "\\frac", "\\choose": "\\binom"}
_ONE_ARGUMENT = {"\\mathbb", "\\mathcal", "\\overline", "\\bar", "\\vec", "\\hat", "\\tilde"}
_MATRICES = {"matrix", "bmatrix", "Bmatrix", "pmatrix", "smallmatrix"}
_FUNCTIONS = ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh")
_GREEK = ("pi", "alpha", "beta", "theta", "lambda", "sigma", "omega", "phi")
# Plain words that stand for a command when a person types mathematics without LaTeX.
_WORDS = {
    **{name: f"\\{name}" for name in (*_FUNCTIONS, *_GREEK, "ln", "log", "exp", "gcd", "lcm", "max", "min", "infty")},
    **{"infinity": "\\infty", "inf": "\\infty", "oo": "\\infty", "asin": "\\arcsin", "acos": "\\arccos"},
    **{"atan": "\\arctan", "or": "\\lor", "and": ",", "percent": "\\%", "pct": "\\%"},
}
_ALSO_UNITS = {"min", "sec"}
_ENDS = {"", ")", "]", "}", ",", ";", ".", "=", "<", ">", "/", "+", "-"}
_NAMED_OPERATORS = {*_FUNCTIONS, "ln", "log", "exp", "gcd", "lcm", "max", "min", "det", "deg", "arg", "dim", "ker"}
_UNICODE = str.maketrans({
    **{"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "\\div ", "π": "\\pi "},
    **{"∞": "\\infty ", "√": " sqrt ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap "},
    **{"∈": "\\in ", "°": "^{\\circ}", "±": "\\pm ", "∓": "\\mp ", "′": "'", "’": "'", "½": "\\frac{1}{2}"},
    **{"¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}"},
    **{"ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℚ": "\\mathbb{Q}", "ℕ": "\\mathbb{N}", "ℂ": "\\mathbb{C}"},
    **{"∅": "\\emptyset ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ", "φ": "\\phi "},
    **{"\u00a0": " ", "\u2009": " ", "\u202f": " ", "％": "\\%", "⟨": "(", "⟩": ")", "≈": "\\approx "},
})  # fmt: skip
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉ₙ]+")
_LEVEL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789+-n0123456789n")
_BEFORE_TOKENS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    # Markdown and HTML around mathematics: `73`, **73**, *73*, <b>73</b>. The power 2**3**2 has no space before it.
    (re.compile(r"```(?:latex|math|text)\b|`+"), " "),
    (re.compile(r"(?<![^\s(:=])\*\*(?=[^\s*])([^*]*)(?<=\S)\*\*(?![^\s.,;:)])"), r" \1 "),
    (re.compile(r"^\s*(\*|__?)(?=[^\s*_])([^*]*)(?<=[^\s*_])\1\s*$"), r"\2"),
    (re.compile(r"<(b|i|u|em|strong|code|span|mark|p)>([^<>]*)</\1>"), r" \2 "),
    (_RAISED, lambda match: "^{" + match[0].translate(_LEVEL) + "}"),
    (_LOWERED, lambda match: "_{" + match[0].translate(_LEVEL) + "}"),
    (re.compile(r"\\begin\{array\}\s*\{[^{}]*\}"), r"\\begin{matrix}"),
    (re.compile(r"\\end\{array\}"), r"\\end{matrix}"),
    (re.compile(r",\s*\\!\s*|\{,\}"), ","),  # 10,\!080 and 10{,}080
    (re.compile(r"\\degree(?![A-Za-z])"), r"^{\\circ}"),
    (re.compile(r"\\lg(?![A-Za-z])"), r"\\log_{10}"),
    # One spelling of congruences: \bmod 7, \pmod 7, (mod 7), (\text{mod } 7) are \pmod{7}.
    (re.compile(r"\(\s*(?:\\(?:text|mathrm)\{\s*mod\s*\}|\\?b?mod(?![A-Za-z]))\s*([^()]*?)\s*\)"), r"\\pmod{\1}"),
    (re.compile(r"\\(?:bmod|mod|pmod)(?![A-Za-z])\s*(?:\{([^{}]*)\}|([0-9]+|[A-Za-z]))"), r"\\pmod{\1\2}"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:hspace|vspace|phantom|label|tag|color|textcolor|colorbox)\*?\{[^{}]*\}"), " "),
]
_COMMA = re.compile(r"[,;]")
_SET_PARTS = re.compile(r"[,;:|]")
_UNARY_PLUS = re.compile(r"(?:(?<=[(\[,;=])|^)\+(?=.)")
_BRACKETED_MATRIX = re.compile(r"\[(\\begin\{pmatrix\}(?:(?!\\begin|\\end).)*\\end\{pmatrix\})\]")
_DOUBLED_BACKSLASH = re.compile(r"\\\\(?=[A-Za-z])")


class Unreadable(ValueError):
    """The answer is longer or deeper than anyone means it."""


def canonical(text: str, *, join_thousands: bool = True) -> str:
    """The answer in its one spelling; "" if nothing is left. `join_thousands=False` reads 100,200 as a list.

    Raises Unreadable beyond MAX_CHARACTERS or MAX_NESTING (spec/sandbox.md, section 5: nothing honest is).
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"the answer has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    if nesting(text) > MAX_NESTING:
        raise Unreadable(f"the answer nests {nesting(text)} brackets; at most {MAX_NESTING} are read")
    text = text.translate(_UNICODE)
    if "\\begin" not in text:  # in a matrix a doubled backslash starts a row, elsewhere it is an escaped one
        text = _DOUBLED_BACKSLASH.sub(r"\\", text)
    for pattern, replacement in _BEFORE_TOKENS:
        text = pattern.sub(replacement, text)
    tokens = _translate(_text_groups(_TOKEN.findall(text)), join_thousands)
    return _strip(_join(_Completer(tokens).items()))


def _text_groups(tokens: list[str]) -> list[str]:
    r"""Joins `\text`, `{`, words, `}` into one token, or resolves it: `\text{ or }` -> `\lor`, `\mathrm{e}` -> `e`."""
    result: list[str] = []
    index = 0
    while index < len(tokens):
        command = tokens[index]
        index += 1
        start = index
        while start < len(tokens) and tokens[start].isspace():
            start += 1
        if command not in _TEXT_COMMANDS or start >= len(tokens) or tokens[start] != "{":
            result.append(command)
            continue
        depth, index = 1, start + 1
        while index < len(tokens) and depth:
            depth += (tokens[index] == "{") - (tokens[index] == "}")
            index += 1
        inner = tokens[start + 1 : index - 1 if depth == 0 else index]
        inner = [" " if _SYNONYMS.get(token) in (" ", "  ") else token for token in inner]  # \\mathrm{~kg}
        words = " ".join("".join(token for token in inner if token not in ("$", "{", "}")).split())
        result += _resolve_text(command, words, inner)
    return result


def _resolve_text(command: str, words: str, inner: list[str]) -> list[str]:
    if words.casefold().strip(",") in _WORD_TEXT:
        return [" ", _WORD_TEXT[words.casefold().strip(",")], " "]
    if words in _NAMED_OPERATORS and command.startswith("\\operatorname"):
        return [f"\\{words}"]
    if command == "\\mathrm" and len(words) == 1:
        return [words]
    if words[0].isdigit() or words[0] in "+-\\." or "=" in words:
        return [" ", *_text_groups(inner), " "]  # mathematics in a text command: \text{15 cm}, \textbf{12}
    start = next((index for index, token in enumerate(inner) if token[0] in "+-\\.$" or token[0].isdigit()), len(inner))
    lead = "".join(inner[:start]).strip()
    if start < len(inner) and is_lead(lead):  # \text{The answer is 5}
        return [f"\\text{{{lead}}}", *_text_groups(inner[start:]), " "]
    return [f"\\text{{{words}}}"]


def _translate(tokens: list[str], join_thousands: bool) -> list[str]:
    result: list[str] = []
    after_size = False
    for token in tokens:
        if token not in _SIZES and not (after_size and token == "."):  # \left.
            meaning = _SYNONYMS.get(token, token)
            result.append(meaning)
        after_size = token in _SIZES
    result = [_word(result, index) for index in range(len(result))]
    return _clean_numbers(_join_spaced_thousands([token for token in result if token]), join_thousands)


def _word(tokens: list[str], index: int) -> str:
    """What a plain word stands for. `min` is a function if it has an argument, a unit in `10 min`, else a word."""
    token = tokens[index]
    if token in _ALSO_UNITS or token in ("max", "log"):
        following = next((other for other in tokens[index + 1 :] if not other.isspace()), "")
        spaced = index + 1 < len(tokens) and tokens[index + 1].isspace()
        if following in _ENDS or (spaced and following.isalpha() and len(following) > 1):
            return token
    return _WORDS.get(token, token)


def _join_spaced_thousands(tokens: list[str]) -> list[str]:
    """12 000 345 -> 12000345"""
    result: list[str] = []
    joined = False  # whether the last number has grown already
    for token in tokens:
        follows = len(result) >= 2 and result[-1] == " " and result[-2].isdigit() and (joined or len(result[-2]) <= 3)
        if follows and len(token) == 3 and token.isdigit():
            result.pop()
            result[-1] += token
            joined = True
        else:
            result.append(token)
            joined = joined and token == " "
    return result


def _clean_numbers(tokens: list[str], join_thousands: bool) -> list[str]:
    result: list[str] = []
    depth = 0  # of brackets, in which a comma separates elements
    for token in tokens:
        depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            pieces = [token.replace(",", "")] if join_thousands and depth <= 0 else token.split(",")
            for index, piece in enumerate(pieces):
                whole, dot, decimals = piece.partition(".")
                result += [","] * (index > 0) + [(whole.lstrip("0") or "0") + dot + decimals]
        else:
            result.append(" " if token.isspace() else token)
    return result


class _Completer:
    r"""Puts every argument in braces: `\frac12` -> `\frac{1}{2}`, `x^2` -> `x^{2}`, `sqrt(2)` -> `\sqrt{2}`."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0

    def items(self, closing: str | None = None) -> list[str]:
        """Up to (and past) `closing` at this level, or to the end."""
        result: list[str] = []
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            if token == closing:
                return result
            if token in _INFIX:  # TeX's own {3 \over 8}
                return [f"{_INFIX[token]}{{{_join(result)}}}{{{_join(self.items(closing))}}}"]
            result += self._item(token)
        return result

    def _item(self, token: str) -> list[str]:
        if token in ("\\frac", "\\binom"):
            return [token, "{", *self._argument(), "}", "{", *self._argument(), "}"]
        if token in ("\\sqrt", "sqrt"):
            root = self._optional()
            return ["\\sqrt", *root, "{", *self._argument(whole_number=token == "sqrt", parentheses=True), "}"]
        if token in ("^", "_"):
            argument = self._argument(whole_number=True, parentheses=token == "^")
            if argument and all(prime == "\\prime" for prime in argument):
                return ["'"] * len(argument)
            return [token, "{", *argument, "}"]
        if token in _ONE_ARGUMENT:
            return [token, "{", *self._argument(), "}"]
        if token in ("\\begin", "\\end"):
            name = "".join(self._argument())
            return [f"{token}{{{'pmatrix' if name in _MATRICES else name}}}"]
        if token == "{":
            inner = self.items("}")
            return inner if len(inner) == 1 else ["{", *inner, "}"]
        if token.startswith("\\") and self._next() == "{":  # any other command keeps its braces: \overline{3}
            self.at += 1
            return [token, "{", *self.items("}"), "}"]
        return [token]

    def _next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _optional(self) -> list[str]:
        if self._next() != "[":
            return []
        self.at += 1
        return ["[", *self.items("]"), "]"]

    def _argument(self, *, whole_number: bool = False, parentheses: bool = False) -> list[str]:
        while self._next() == " ":
            self.at += 1
        token = self._next()
        if token is None or token == "}":
            return []
        self.depth += 1  # of arguments without braces: ^^^^, \\frac\\frac
        if self.depth > MAX_NESTING:
            raise Unreadable(f"the answer nests more than {MAX_NESTING} arguments")
        self.at += 1
        argument = self._argument_from(token, whole_number, parentheses)
        self.depth -= 1
        return argument

    def _argument_from(self, token: str, whole_number: bool, parentheses: bool) -> list[str]:
        if token == "{":
            return self.items("}")
        if token == "(" and parentheses:
            return self._parenthesised()
        if token == "-" and whole_number:  # plain text: 10^-3
            return ["-", *self._argument(whole_number=True, parentheses=parentheses)]
        if len(token) > 1 and (token.isalpha() or (token[0].isdigit() and not whole_number)):
            # TeX takes one character. Not so for a power, 2^10: nobody means 2^1 times 0.
            self.at -= 1
            self.tokens[self.at] = token[1:]
            return [token[0]]
        return self._item(token)

    def _parenthesised(self) -> list[str]:
        result: list[str] = []
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            if token == ")":
                break
            result += ["(", *self._parenthesised(), ")"] if token == "(" else self._item(token)
        return result


def _join(items: list[str]) -> str:
    """Spaces only where they separate: after a command that a letter follows, between words, between numbers."""
    result: list[str] = []
    spaced = False
    for item in items:
        if item == " ":
            spaced = True
            continue
        previous = result[-1] if result else ""
        after_command = previous.startswith("\\") and previous[-1:].isalpha()
        both_words = spaced and previous[-1:].isalnum() and item[0].isalnum()
        if item[0].isalpha() if after_command else both_words:
            result.append(" ")
        result.append(item)
        spaced = False
    return "".join(result)


def _strip(text: str) -> str:
    text = text.strip().rstrip(".,;: ").lstrip("=:, ")
    text = text.rstrip("\\ ")
    text = _UNARY_PLUS.sub("", text)
    while text.startswith("(") and text.endswith(")") and enclosed(text) and len(split_top(text[1:-1], _COMMA)) == 1:
        text = text[1:-1]
    while text.startswith("{") and text.endswith("}") and enclosed(text):  # {2, 3, 5} is meant as a set
        text = f"\\{{{text[1:-1].strip()}\\}}" if _SET_PARTS.search(text) else text[1:-1]
    bracketed = _BRACKETED_MATRIX.fullmatch(text)
    return bracketed[1] if bracketed else text

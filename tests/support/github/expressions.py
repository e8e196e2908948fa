"""The part of GitHub's expressions that this repository's action and workflows use."""

import re

_TOKEN = re.compile(
    r"\s*(?:(?P<text>'(?:[^']|'')*')|(?P<op>==|!=|&&|\|\||!|\(|\))|(?P<name>[A-Za-z_][\w.-]*(?:\(\))?))"
)
_STATUS = ("always()", "success()", "failure()", "cancelled()")


def evaluate(text, contexts, *, condition=False):
    """Return the value of an expression.

    Args:
        text: The expression.
        contexts: Dictionaries by name (``inputs``, ``steps``, ...), and whether the job has ``failed``.
        condition: Whether it is an ``if:``, which asks for success unless it names a status.

    Raises:
        SyntaxError: It is no expression, or uses a part of the language that is not here.
        KeyError: The context is unknown.
    """
    if condition and not any(status in text for status in _STATUS):
        text = f"success() && ({text})"
    tokens = _tokens(text)
    value = _either(tokens, contexts)
    if tokens:
        raise SyntaxError(f"{text!r}: {tokens[0]!r} was not expected")
    return value


def interpolate(text, contexts):
    """Return ``text`` with the values of its ``${{ }}``."""
    return re.sub(r"\$\{\{(.*?)\}\}", lambda found: shown(evaluate(found[1], contexts)), text)


def shown(value):
    """Return a value as GitHub writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _tokens(text):
    found, end = [], 0
    text = text.rstrip()
    while end < len(text):
        match = _TOKEN.match(text, end)
        if match is None:
            raise SyntaxError(f"{text!r}: not understood from {text[end:]!r} on")
        found.append(match[0].strip())
        end = match.end()
    return found


def _either(tokens, contexts):
    value = _both(tokens, contexts)
    while tokens and tokens[0] == "||":
        tokens.pop(0)
        other = _both(tokens, contexts)
        value = value or other
    return value


def _both(tokens, contexts):
    value = _compared(tokens, contexts)
    while tokens and tokens[0] == "&&":
        tokens.pop(0)
        other = _compared(tokens, contexts)
        value = value and other
    return value


def _compared(tokens, contexts):
    value = _one(tokens, contexts)
    if tokens and tokens[0] in ("==", "!="):
        operator = tokens.pop(0)
        other = _one(tokens, contexts)
        same = shown(value).lower() == shown(other).lower()  # GitHub ignores case
        return same == (operator == "==")
    return value


def _one(tokens, contexts):
    word = tokens.pop(0)
    if word == "(":
        value = _either(tokens, contexts)
        assert tokens.pop(0) == ")"
        return value
    if word == "!":
        return not _one(tokens, contexts)
    if word.startswith("'"):
        return word[1:-1].replace("''", "'")
    if word in _STATUS:
        status = {"always()": True, "success()": not contexts["failed"], "failure()": contexts["failed"]}
        return status.get(word, False)
    if word in ("true", "false"):
        return word == "true"
    return _looked_up(word.split("."), contexts)


def _looked_up(names, contexts):
    """Return what a path leads to; what is not there is empty, but its context has to be known."""
    value = contexts[names[0]]
    for name in names[1:]:
        value = value.get(name, "") if isinstance(value, dict) else ""
    return value

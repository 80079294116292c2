"""Triton's interpreter without work of which nothing comes: the tests of the kernels spend most of their time in it.

For a launch it puts its own functions in the place of those of `triton.language`, and again for every helper that a
kernel calls: some six hundred members looked at, thousands of times. Here that happens once in a launch for each set of
modules that functions know. It also computes whether sums of integers overflow, and does not look at the result but in
its debug mode. Both are private to Triton: where they are not as they are known here, nothing is changed, and
`test_interpreter.py` fails.
"""

from __future__ import annotations

from dataclasses import replace

from triton import language
from triton.runtime import interpreter

replace_functions = getattr(interpreter, "_patch_lang", None)
_replaced: set[frozenset[int]] = set()  # modules, by identity, whose functions are replaced in this launch


class Scope:
    """What puts everything back at the end of a launch."""

    def __init__(self, own: interpreter._LangPatchScope | None):
        self.own = own

    def restore(self) -> None:
        _replaced.clear()
        if self.own is not None:
            self.own.restore()


def replace_once(function) -> Scope:
    values = function.__globals__.values()
    known = frozenset(id(value) for value in values if value is language or value is language.core)
    own = None if known in _replaced else replace_functions(function)
    _replaced.add(known)
    return Scope(own)


def make_faster() -> None:
    if replace_functions is not None and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = replace_once
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow") and not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)

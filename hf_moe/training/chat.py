"""Which tokens of a rendered chat the assistant wrote.

A template with `{% generation %}` says so itself. For any other one, the chat is rendered up to each assistant turn and
up to its end: what a longer rendering adds to a shorter one is that turn. This holds only where rendering more
messages leaves the text of those before as it is, and that is checked.
"""

import re
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from .sources import DataError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Stands for a turn's content, to see where the template puts it.
MARK = "\u2402hf\u2403moe\u2404"


def encode_chat(tokenizer, messages: list[dict[str, Any]], where: str, learn_from: int = 0, **template) -> tuple:
    """Token ids of a chat, and for each whether it is of an assistant's turn at index `learn_from` or behind.

    Args:
        tokenizer: with a chat template.
        messages: the turns.
        where: the sample's place, for messages.
        template: `tools` and further arguments of the template.

    Raises:
        DataError: where the template refuses the chat, or does not show which part is the assistant's.
    """
    source = tokenizer.get_chat_template(tools=template.get("tools"))
    if GENERATION_TAG.search(source) and not learn_from:
        if not tokenizer.is_fast:  # Transformers finds the tagged part by offsets, which only fast ones have
            return _encode_spans(tokenizer, *_tagged_spans(tokenizer, source, messages, where, **template), where)
        return _encode_tagged(tokenizer, messages, where, **template)
    full = _render(tokenizer, messages, where, **template)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index >= learn_from:
            spans.append(_span(tokenizer, messages, index, full, where, **template))
    return _encode_spans(tokenizer, full, spans, where)


def _encode_tagged(tokenizer, messages, where: str, **template) -> tuple[list[int], list[bool]]:
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **template
        )
    except (TemplateError, TypeError) as error:
        raise DataError(f"{where}: the chat template refuses this chat: {error}") from error
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def _tagged_spans(tokenizer, source: str, messages, where: str, tools=None, **template) -> tuple[str, list]:
    """The rendered chat, and the characters [start, end) of it that are tagged."""
    values = {**tokenizer.special_tokens_map, **template}
    try:
        rendered, spans = render_jinja_template(
            [messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **values
        )
    except (TemplateError, TypeError) as error:
        raise DataError(f"{where}: the chat template refuses this chat: {error}") from error
    return rendered[0], spans[0]


def _render(tokenizer, messages, where: str, **template) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **template)
    except (TemplateError, TypeError) as error:
        raise DataError(f"{where}: the chat template refuses this chat: {error}") from error


def _span(tokenizer, messages, index: int, full: str, where: str, **template) -> tuple[int, int]:
    """Characters [start, end) of `full` that turn `index` is, without what a prompt for it would hold."""
    upto = _render(tokenizer, messages[: index + 1], where, **template)
    if not full.startswith(upto):
        raise DataError(
            f"{where}: this chat template renders turn {index + 1} differently once more turns follow, so that the "
            "assistant's part cannot be told; give a template with {% generation %} by --chat_template_path, or learn "
            "everything with --no_assistant_only_loss"
        )
    if index:
        prompt = _render(tokenizer, messages[:index], where, add_generation_prompt=True, **template)
        if len(prompt) < len(upto) and upto.startswith(prompt):
            return len(prompt), len(upto)
    # The prompt for a turn holds more than the turn's own beginning, as an opened <think>; or there is no prompt.
    marked = _render(tokenizer, [*messages[:index], {**messages[index], "content": MARK}], where, **template)
    start = marked.find(MARK)
    if start < 0 or not upto.startswith(marked[:start]):
        raise DataError(
            f"{where}: cannot tell which part of the rendered chat turn {index + 1} is; give a template with "
            "{% generation %} by --chat_template_path, or learn everything with --no_assistant_only_loss"
        )
    return start, len(upto)


def _encode_spans(tokenizer, full: str, spans: list[tuple[int, int]], where: str) -> tuple[list[int], list[bool]]:
    if tokenizer.is_fast:
        encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # A token that only ends within a span counts: it holds the turn's first characters.
        mask = [any(start < last and first < end for start, end in spans) for first, last in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), mask
    # No offsets: the tokens of each part of the text must be the first ones of the whole.
    ids = list(tokenizer(full, add_special_tokens=False, verbose=False)["input_ids"])
    mask = [False] * len(ids)
    for span in spans:
        first, last = (_count_tokens(tokenizer, full[:end], ids, where) for end in span)
        mask[first:last] = [True] * (last - first)
    return ids, mask


def _count_tokens(tokenizer, text: str, ids: list[int], where: str) -> int:
    part = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if ids[: len(part)] != part:
        raise DataError(f"{where}: this tokenizer joins an assistant's turn with the text around it")
    return len(part)

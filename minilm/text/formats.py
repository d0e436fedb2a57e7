"""Preference rows of the usual data sets as minilm's own: a prompt and two completions, as text."""

import itertools
from collections.abc import Sequence
from typing import Any

TURN = "\n\nAssistant:"  # of Anthropic/hh-rlhf: the answer begins after the last one


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the texts `prompt`, `chosen` and `rejected`; one of no known shape as it is.

    Known are TRL's plain and conversational forms, with the prompt or with the conversation so far
    in both answers (HuggingFaceH4/ultrafeedback_binarized); whole dialogues as text
    (Anthropic/hh-rlhf); two summaries and a choice (openai/summarize_from_feedback).

    >>> asked = "\\n\\nHuman: Hi\\n\\nAssistant:"
    >>> row = plain({"chosen": f"{asked} Hello", "rejected": f"{asked} No"})
    >>> row["chosen"], row["prompt"] == asked
    (' Hello', True)
    """
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    prompt: Any = row.get("prompt")
    if _summaries(row):
        better, worse = row["summaries"][row["choice"]], row["summaries"][1 - row["choice"]]
        info = row.get("info") or {}
        asked = info.get("post") or info.get("article") or ""
        texts = {"prompt": asked, "chosen": better["text"], "rejected": worse["text"]}
        return row | texts
    if _messages(chosen) and _messages(rejected):
        shared = _shared(chosen, rejected)
        if prompt is None:
            prompt = chosen[:shared]
        elif isinstance(prompt, str) and any(m["content"] == prompt for m in chosen[:shared]):
            prompt = chosen[:shared]  # the conversation, of which `prompt` is the last question
        else:
            shared = 0
        asked = prompt if isinstance(prompt, str) else _flat(prompt)
        texts = {"prompt": asked, "chosen": _flat(chosen[shared:])}
        return row | texts | {"rejected": _flat(rejected[shared:])}
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        common = chosen[: _shared(chosen, rejected)]
        end = common.rfind(TURN) + len(TURN)
        if TURN in common:
            texts = {"chosen": chosen[end:], "rejected": rejected[end:], "prompt": common[:end]}
            return row | texts
    return row


def _summaries(row: dict[str, Any]) -> bool:
    found: Any = row.get("summaries")
    two = isinstance(found, list) and len(found) == 2
    return two and row.get("choice") in (0, 1) and all(isinstance(s, dict) for s in found)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _messages(value: Any) -> bool:
    """Whether it is a conversation: objects with role and content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value)
    )


def _flat(messages: Sequence[dict[str, Any]]) -> str:
    """Contents, a blank line between turns; who speaks is told where several turns are."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m.get('role', 'user')}: {m['content']}" for m in messages)

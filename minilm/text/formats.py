"""Preference rows of the usual data sets as minilm's own: a prompt and two completions, as text."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from minilm.errors import UserError

TURN = "\n\nAssistant:"  # of Anthropic/hh-rlhf: the answer begins after the last one


def pairwise(rows: Sequence[dict[str, Any]], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row's place and the row; lists with ratings or ranks, and rated answers, as their pairs.

    Known are lists (`prompt`, `completions` and `ratings`, higher is better, or `ranks`, 1 is best;
    or openbmb/UltraFeedback's `instruction` and completions with a `response` and an
    `overall_score`), and answers rated one by one (`prompt`, `completion` and `rating`, or TRL's
    unpaired `label`, a rating of 1 if true and of 0 if false), which are compared with the others
    of their prompt. What is rated the same is no pair.

    Raises:
      UserError: texts and ratings that do not fit together, or a label that is neither true nor
        false, by line number.
    """
    answers: dict[str, list[tuple[str, float]]] = {}
    for number, row in enumerate(rows, 1):
        place = f"{where}:{number}"
        if "completions" in row:
            asked, rated = _rated_list(row, place)
            yield from ((place, pair) for pair in _ordered(asked, rated))
        elif "completion" in row and {"rating", "label"} & row.keys() and "chosen" not in row:
            prompt, text = plain_text(row.get("prompt", "")), plain_text(row["completion"])
            if not (isinstance(prompt, str) and isinstance(text, str)):
                raise UserError("prompt and completion must be texts", where=place, value=row)
            answers.setdefault(prompt, []).append((text, _rating(row, place)))
        else:
            yield place, row
    for asked, rated in answers.items():
        yield from ((where, pair) for pair in _ordered(asked, rated))


def example(row: dict[str, Any], place: str) -> tuple[str, str]:
    """A row of supervised fine-tuning as a prompt, on which there is no loss, and a completion.

    Known are TRL's `prompt` and `completion` (texts or conversations), `messages`, of which the
    last is the completion, and `text`, which is one as a whole; and Alpaca's `instruction`, `input`
    and `output`.

    Raises:
      UserError: none of these, or an empty completion, by line number.

    >>> example({"messages": [{"role": "user", "content": "Hi"}, {"content": "Yes?"}]}, "a:1")
    ('Hi', 'Yes?')
    """
    if "completion" in row:
        prompt, completion = row.get("prompt", ""), row["completion"]
    elif _messages(row.get("messages")):
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    elif "output" in row:
        asked = [row.get("instruction", ""), row.get("input")]
        prompt, completion = "\n\n".join(str(x) for x in asked if x), row["output"]
    else:
        prompt, completion = "", row.get("text")
    prompt, completion = plain_text(prompt), plain_text(completion)
    if not (isinstance(prompt, str) and isinstance(completion, str) and completion.strip()):
        allowed = "prompt and completion; messages; text; instruction, input and output"
        raise UserError("no completion to learn", where=place, value=sorted(row), allowed=allowed)
    return prompt, completion


def whole(row: dict[str, Any]) -> str | None:
    """A conversation, or what is asked and answered, as one text to pretrain on; else None.

    >>> whole({"prompt": "2 + 2 =", "completion": " 4"})
    '2 + 2 = 4'
    """
    if _messages(row.get("messages")):
        return _flat(row["messages"])
    try:
        prompt, completion = example(row, "")
    except UserError:
        return None
    return prompt + ("\n\n" if prompt and "completion" not in row else "") + completion


def plain_text(value: Any) -> Any:
    """A text, or a conversation as one."""
    return _flat(value) if _messages(value) else value


def _rated_list(row: dict[str, Any], place: str) -> tuple[str, list[tuple[str, float]]]:
    texts = row["completions"]
    asked = plain_text(row.get("prompt", row.get("instruction", "")))
    if isinstance(texts, list) and texts and all(isinstance(c, dict) for c in texts):
        ratings = [c.get("overall_score", c.get("rating")) for c in texts]
        texts = [c.get("response", c.get("content")) for c in texts]
    elif "ranks" in row:
        ranks = row["ranks"]
        ratings = [-x if real(x) else x for x in ranks] if isinstance(ranks, list) else ranks
    else:
        ratings = row.get("ratings", row.get("scores"))
    if not (isinstance(texts, list) and isinstance(ratings, list) and len(texts) == len(ratings)):
        problem = "a list needs as many `ratings` (or `ranks`) as `completions`"
        raise UserError(problem, where=place, value=sorted(row))
    texts = [plain_text(t) for t in texts]
    for text in (asked, *texts):
        if not isinstance(text, str):
            raise UserError("prompt and completions must be texts", where=place, value=text)
    values = [_number(x, place) for x in ratings]
    lowest = min(values, default=0.0) if "ranks" in row else 0.0
    return asked, [(t, x - lowest) for t, x in zip(texts, values, strict=True)]


def _rating(row: dict[str, Any], place: str) -> float:
    if row.get("rating") is not None or "label" not in row:
        return _number(row.get("rating"), place)
    if not isinstance(row["label"], bool):
        problem = "the label of a completion must be true (good) or false (bad)"
        raise UserError(problem, where=place, value=row["label"])
    return float(row["label"])


def _number(value: Any, place: str) -> float:
    if not real(value):
        raise UserError("a rating must be a finite number", where=place, value=value)
    return float(value)


def real(value: Any) -> bool:
    """Whether it is a number that a float can hold: JSON's readers also take NaN, 1e999 and 10⁴⁰⁰.

    >>> [real(x) for x in (3, float("nan"), 10**400, True, "3")]
    [True, False, False, False, False]
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _ordered(asked: str, rated: Sequence[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """The pairs of different texts with different ratings, the better one first."""
    for (one, first), (other, second) in itertools.combinations(rated, 2):
        if first == second or one == other:
            continue
        if second > first:
            one, first, other, second = other, second, one, first
        ratings = {"rating_chosen": first, "rating_rejected": second}
        yield {"prompt": asked, "chosen": one, "rejected": other, **ratings}


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
        info: Any = row.get("info")
        info = info if isinstance(info, dict) else {}
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
        asked: Any = prompt
        asked = _flat(asked) if asked == [] or _messages(asked) else asked
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
    texts = two and all(isinstance(s, dict) and isinstance(s.get("text"), str) for s in found)
    return texts and row.get("choice") in (0, 1)


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
    if len(messages) < 2:
        return "" if not messages else messages[0]["content"]
    return "\n\n".join(f"{m.get('role', 'user')}: {m['content']}" for m in messages)

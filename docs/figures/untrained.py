"""Easy questions to a model that was not trained to think softly, under some settings.

coconut-serve serve smollm2 --dtype float32 --port 8011
python docs/figures/untrained.py http://127.0.0.1:8011/v1
"""

import asyncio
import json
import re
import sys
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import openai

QUESTIONS = json.loads((Path(__file__).parent / "easy-questions.json").read_text())
Settings = dict[str, Any]


def topk(**mixture: Any) -> Settings:
    """Soft Thinking's mixture, changed."""
    return {"mixture": {"kind": "topk", "top_k": 10, "temperature": 0.6, "top_p": 0.95} | mixture}


def confidence(p_max: float, **mixture: Any) -> Settings:
    """The switching rule of ThinkRouter over such a mixture."""
    return {"switch": {"rule": "confidence", "p_max": p_max}, **topk(**mixture)}


RUNS: list[tuple[str, Settings]] = [
    *((mode, {}) for mode in ("cot", "distribution", "auto")),
    *(
        ("distribution", {"steps": steps, **topk(**mixture)})
        for steps in (16, 8, 4)
        for mixture in ({}, {"temperature": 0.3}, {"top_p": 0.5}, {"top_k": 2})
    ),
    *(("auto", {"steps": steps, "switch": {"rule": "swi"}}) for steps in (16, 4)),
    ("auto", {"steps": 16, **confidence(0.6)}),
    *(("auto", {"steps": steps, **confidence(0.9)}) for steps in (16, 4)),
    ("auto", {"steps": 16, **confidence(0.6, temperature=0.3)}),
]


async def ask(client: openai.AsyncOpenAI, mode: str, settings: Settings, question: str) -> Any:
    """Ask one question; the message that comes back."""
    reply = await client.chat.completions.create(
        model=f"smollm2:{mode}",
        messages=[{"role": "user", "content": question}],
        max_tokens=32,
        temperature=0,
        extra_body={"reasoning": settings},
    )
    return reply.choices[0].message


def has(text: str, answer: str) -> bool:
    """Whether the word is in the text; one letter must stand in quotes or end a clause."""
    kind = rf"[\"']{answer}[\"']|\b{answer}[.,]" if len(answer) == 1 else rf"(?i)\b{answer}\b"
    return re.search(kind, text) is not None


async def main(url: str) -> None:
    """Print a table; `like cot` is the mean ratio of matching characters (difflib)."""
    print("| mode | settings | right | right in `content` | like `cot` |\n|---|---|---|---|---|")
    usual: list[str] = []
    async with openai.AsyncOpenAI(base_url=url, api_key="-", timeout=900) as client:
        for mode, settings in RUNS:
            messages = await asyncio.gather(
                *(ask(client, mode, settings, item["question"]) for item in QUESTIONS)
            )
            wholes = [(getattr(m, "reasoning", None) or "") + (m.content or "") for m in messages]
            usual = usual or wholes
            answers = [item["answer"] for item in QUESTIONS]
            right = sum(map(has, wholes, answers))
            shown = sum(has(m.content or "", a) for m, a in zip(messages, answers, strict=True))
            like = sum(
                SequenceMatcher(None, a, b).ratio() for a, b in zip(wholes, usual, strict=True)
            )
            row = (f"`{mode}`", json.dumps(settings), right, shown, f"{like / len(usual):.0%}")
            print(f"| {' | '.join(map(str, row))} |", flush=True)


asyncio.run(main(sys.argv[1]))

"""The demo's answers by the slow, obvious loop: the whole sequence anew for each position."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

START, END, ANSWER, EOS = 3, 5, 9, 2  # of the demo's vocabulary


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    prompt: Sequence[int],
    mode: str,
    *,
    steps: int = 6,
    top_k: int = 5,
    max_tokens: int = 20,
) -> list[int]:
    """Continue a prompt greedily in a mode of the server; the end token is not part of it.

    `none` puts `###` after the prompt; `latent` and `distribution` put start token, thoughts, end.
    """
    embed = model.get_input_embeddings()
    inputs = embed(torch.tensor([list(prompt)]))  # [1, length, hidden_size]

    def feed(vector: Tensor) -> None:
        nonlocal inputs
        inputs = torch.cat([inputs, vector.reshape(1, 1, -1)], dim=1)

    def feed_token(token: int) -> None:
        feed(embed(torch.tensor(token)))

    def forward() -> tuple[Tensor, Tensor]:
        out = model(inputs_embeds=inputs, use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][0, -1], out.logits[0, -1]

    if mode == "none":
        feed_token(ANSWER)
    if mode in ("latent", "distribution"):
        feed_token(START)
        for _ in range(steps):
            hidden, logits = forward()
            likeliest = torch.softmax(logits, dim=-1).topk(top_k)
            weights = likeliest.values / likeliest.values.sum()
            feed(hidden if mode == "latent" else weights @ embed(likeliest.indices))
        feed_token(END)
    tokens: list[int] = []
    while len(tokens) < max_tokens and (token := int(forward()[1].argmax())) != EOS:
        tokens.append(token)
        feed_token(token)
    return tokens

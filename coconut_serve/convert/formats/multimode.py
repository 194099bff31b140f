"""Models that answer at once, after text, or after latents, as the end of the prompt says.

Layout (connordilgren/are-lrms-easily-interpretable, arXiv 2604.04902): COCONUT's or CODI's files
with other added tokens. After the question, and on Llama its `<|eot_id|>`: `<|eocot|>` and the
answer; `<|bocot|>`, text, `<|eocot|>` and the answer; `<|bocot|>`, latents, `<|eocot|>` and the
answer. The model says the `<|eocot|>` after text itself.
"""

from typing import Any

from coconut_serve.convert.job import Job

BEGIN, END = "<|bocot|>", "<|eocot|>"
METHOD = "multimode"
_END_OF_TURN = "<|eot_id|>"


def describe(
    job: Job, config: dict[str, Any], *, begin: int, end: int, eos: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The manifest's tokens and prompt, without the template.

    Args:
        job: For the id of Llama's end of turn.
        config: Whether it is a Llama.
        begin: The id of `<|bocot|>`.
        end: The id of `<|eocot|>`.
        eos: CODI trained without remove_eos: what goes around the latents.

    Raises:
        StartupError: A Llama, and nothing says what its end of turn is.
    """
    is_llama = config["model_type"] == "llama"
    turn = (*eos, *((job.need_token(_END_OF_TURN)["id"],) if is_llama else ()))
    tokens = {"start": {"id": begin, "text": BEGIN}, "end": {"id": end, "text": END}}
    think = [*turn, begin]
    return {
        "tokens": {
            **tokens, **{f"think_{name}": token for name, token in tokens.items()},
            "added": True, "never_emit": [begin],
        },
        "prompt": {
            "chat_template": False, "add_bos": True,
            "suffix_ids": think, "end_ids": [end, *eos],
            "mode_suffix_ids": {"none": [*turn, end], "cot": think, "distribution": think},
        },
    }  # fmt: skip

"""Models that answer at once, after text, or after latents; the end of the prompt selects which.

Layout (connordilgren/are-lrms-easily-interpretable, arXiv 2604.04902): COCONUT's or CODI's files
with other added tokens. The question, with Llama's `<|eot_id|>` after it, is followed by
`<|eocot|>`; by `<|bocot|>`, text, `<|eocot|>`; or by `<|bocot|>`, latents, `<|eocot|>`; and then
the answer. The model itself generates the `<|eocot|>` after text.
"""

from typing import Any

from coconut_serve.convert.job import Job

BEGIN, END = "<|bocot|>", "<|eocot|>"
METHOD = "multimode"
_END_OF_TURN = "<|eot_id|>"


def describe(
    job: Job, config: dict[str, Any], *, begin: int, end: int, eos: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Build the manifest's tokens and prompt, without the template.

    Args:
        job: Finds the id of Llama's end of turn.
        config: Shows whether the model is a Llama.
        begin: The id of `<|bocot|>`.
        end: The id of `<|eocot|>`.
        eos: CODI trained without remove_eos: the tokens around the latents.

    Raises:
        StartupError: The model is a Llama and its end of turn is unknown.
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

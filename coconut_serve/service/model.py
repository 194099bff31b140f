"""What the served model can do."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from coconut_serve.checkpoint.manifest import FILE_NAME, Manifest
from coconut_serve.errors import StartupError
from coconut_serve.reasoning.registry import (
    NO_THINKING,
    Feeds,
    mode_names,
    properties_of,
    untrained_modes,
)
from coconut_serve.service.tokenizer import Tokenizer


def declared_modes(manifest: Manifest | None) -> tuple[str, ...]:
    """The modes that a checkpoint supports.

    Raises:
        StartupError: Its manifest names a mode that does not exist, or one outside its `modes`.
    """
    if manifest is None or manifest.modes is None:
        modes = untrained_modes()
    else:
        modes = tuple(manifest.modes)
    own = manifest or Manifest()
    unknown = [mode for mode in modes if mode not in mode_names()]
    if unknown:
        what = f"{unknown[0]!r} is none of {', '.join(mode_names())}"
        raise StartupError(f"{FILE_NAME}: modes: {what}", param="modes")
    if own.default_mode is not None and own.default_mode not in modes:
        what = f"default_mode {own.default_mode!r} is not in modes"
        raise StartupError(f"{FILE_NAME}: {what}", param="default_mode")
    name = "prompt.mode_suffix_ids"
    for mode in own.prompt.mode_suffix_ids:
        if mode not in modes or has_slots(mode, manifest):
            what = "has prompt.suffix_ids" if mode in modes else "is not in modes"
            raise StartupError(f"{FILE_NAME}: {name}: {mode} {what}", param=name)
    return modes


def choose_modes(
    manifest: Manifest | None,
    engine_modes: tuple[str, ...],
    *,
    allowed_modes: tuple[str, ...] | None,
    default_mode: str | None,
) -> tuple[tuple[str, ...], str]:
    """Choose the modes to serve, and the default among them.

    Raises:
        StartupError: As `declared_modes`, or the server's settings name a mode the model lacks.
            `latent` may be allowed for any model: some adapters need no training.
    """
    declared = declared_modes(manifest)
    modes = tuple(m for m in engine_modes if m in declared)
    for mode in allowed_modes or ():
        is_free = mode in mode_names() and properties_of(mode).feeds is Feeds.HIDDEN
        if mode not in modes and not is_free:
            raise StartupError(
                f"--allowed-reasoning-modes: this model has no mode {mode!r}, but "
                f"{', '.join(modes)}",
                param="--allowed-reasoning-modes",
            )
    if allowed_modes is not None:
        modes = tuple(m for m in modes if m in allowed_modes)
    if default_mode is not None and default_mode not in modes:
        raise StartupError(
            f"--default-reasoning-mode {default_mode!r} is not one of {', '.join(modes)}",
            param="--default-reasoning-mode",
        )
    preferred = default_mode or (manifest.default_mode if manifest else None)
    in_text = (mode for mode in modes if properties_of(mode).thinks_in_text)
    fallback = next(in_text, next(iter(modes), NO_THINKING))
    return modes, preferred if preferred in modes else fallback


def has_slots(mode: str, manifest: Manifest | None) -> bool:
    """Whether a mode's steps fill latent positions; soft tokens do if the model was trained so."""
    own = properties_of(mode)
    is_trained = manifest is not None and manifest.distribution.slots == "latent"
    return own.is_steady and (own.feeds is Feeds.HIDDEN or is_trained)


def _allows_hidden(modes: tuple[str, ...] | None) -> bool:
    return modes is None or any(properties_of(mode).feeds is Feeds.HIDDEN for mode in modes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReasoning:
    """What the served model can do, read once from manifest and tokenizer."""

    modes: tuple[str, ...]
    default_mode: str
    manifest: Manifest | None
    think_start_id: int | None
    think_end_id: int | None
    max_model_len: int
    adapters: tuple[str, ...] = ()  # the engine's
    eos_token_ids: tuple[int, ...] = ()  # what ends an answer
    encode: Callable[[str], list[int]] | None = None  # of the tokenizer, without special tokens

    def find_token(self, token: int | str) -> int | None:
        """The id of a token given by id or by its text; None if the text is not one token."""
        if isinstance(token, int):
            return token
        ids = self.encode(token) if self.encode else []
        return ids[0] if len(ids) == 1 else None

    @classmethod
    def read(
        cls,
        manifest: Manifest | None,
        tokenizer: Tokenizer | None,
        *,
        engine_modes: tuple[str, ...],
        allowed_modes: tuple[str, ...] | None,
        default_mode: str | None,
        max_model_len: int,
        adapters: tuple[str, ...] = (),
        eos_token_ids: tuple[int, ...] = (),
    ) -> "ModelReasoning":
        """Combine manifest, tokenizer and server settings.

        Raises:
            StartupError: As `choose_modes`.
        """
        modes, default = choose_modes(
            manifest, engine_modes, allowed_modes=allowed_modes, default_mode=default_mode
        )
        start = manifest.tokens.think_start if manifest else None
        end = manifest.tokens.think_end if manifest else None
        find = tokenizer.find_id if tokenizer else lambda _: None
        end_id = end.id if end else find("</think>")
        start_id = start.id if start else None if end else find("<think>")
        is_thinker = end_id is not None and (end is not None or start_id is not None)
        return cls(
            modes=modes,
            default_mode=default,
            manifest=manifest,
            think_start_id=start_id if is_thinker else None,
            think_end_id=end_id if is_thinker else None,
            max_model_len=max_model_len,
            encode=partial(tokenizer.encode, add_special_tokens=False) if tokenizer else None,
            adapters=adapters if _allows_hidden(allowed_modes) else (),
            eos_token_ids=eos_token_ids,
        )

    def suffix_ids(self, mode: str) -> tuple[int, ...]:
        """Ids that end a question in a mode without latent positions; () unless in the manifest."""
        suffixes = (self.manifest or Manifest()).prompt.mode_suffix_ids
        return next((tuple(ids) for name, ids in suffixes.items() if name == mode), ())

    @property
    def is_thinker(self) -> bool:
        """Whether an end-of-thought token bounds the model's thinking."""
        return self.think_end_id is not None

    def lacks_training(self, mode: str) -> bool:
        """Whether a mode feeds soft tokens to a model whose manifest does not name it."""
        is_named = self.manifest is not None and self.manifest.modes is not None
        return properties_of(mode).feeds is Feeds.MIXTURE and not is_named

    def has_slots(self, mode: str) -> bool:
        return has_slots(mode, self.manifest)

    @property
    def template_has_speed(self) -> bool:
        """Whether the question template has a {speed}."""
        return "{speed}" in (self.question_template or "")

    @property
    def default_speed(self) -> int | str | None:
        """The template's {speed} for requests that set none."""
        return (self.manifest or Manifest()).prompt.speed

    @property
    def question_template(self) -> str | None:
        """The template of a model that takes questions, not chats; else None."""
        prompt = (self.manifest or Manifest()).prompt
        return None if prompt.chat_template else prompt.template or "{question}"

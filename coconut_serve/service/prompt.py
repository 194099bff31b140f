"""Builds engine requests from a normalised API request: tokens, limits, reasoning."""

import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from coconut_serve.engines.base import EngineInfo
from coconut_serve.errors import ContextLengthError, InvalidRequestError, require
from coconut_serve.params import (
    MAX_FORCED_TOKENS,
    MIN_TEMPERATURE,
    HaltParams,
    ReasoningParams,
    SamplingParams,
    TraceLevel,
)
from coconut_serve.reasoning.registry import Feeds, properties_of
from coconut_serve.service import presets, reasoning
from coconut_serve.service.ask import GenerateCall, SamplingFields
from coconut_serve.service.branches import has_noise
from coconut_serve.service.model import ModelReasoning
from coconut_serve.service.prompt_text import bad_word_ids, derive_seed, keep_last, notes_on
from coconut_serve.service.reasoning import Resolved
from coconut_serve.service.replay import add_replay
from coconut_serve.service.tokenizer import ChatMessage, Tokenizer, require_tokenizer
from coconut_serve.types import Request

# Last tokens of a rendered chat, written by its template: "<think>\n\n</think>\n\n" is 4.
_TEMPLATE_TAIL = 4
_MAX_CHARACTERS_PER_TOKEN = 64
_SEED_BITS = 53  # of a seed drawn here: JSON readers keep 53 bits exactly
_DEFAULT_ANSWER_TOKENS = 16  # of completions; chat answers until EOS or the end of the context


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Engine requests of one API call; request i answers prompt i // num_sequences."""

    requests: tuple[Request, ...]
    prompt_token_ids: tuple[tuple[int, ...], ...]  # by prompt
    mode: str
    resolved: Resolved
    ask: GenerateCall

    @property
    def num_sequences(self) -> int:
        """Sequences of each prompt."""
        return self.ask.n * self.resolved.branches

    @property
    def num_choices(self) -> int:
        """Choices of each prompt that the client sees."""
        return self.num_sequences if self.resolved.select == "all" else self.ask.n


class PromptBuilder:
    """Builds engine requests for one served model.

    Args:
        tokenizer: None for a model without one: it takes token ids only.
        model: What the model can do.
        info: The engine's limits.
        max_n: Choices a request may ask for.
        trace_bounds: The least and the most detailed trace the server gives.
        check_size: Raises if a call of so many sequences can never be served.
        sampling_defaults: The model's own, by field of SamplingParams.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        model: ModelReasoning,
        info: EngineInfo,
        max_n: int,
        trace_bounds: tuple[TraceLevel, TraceLevel],
        check_size: Callable[[int], None],
        sampling_defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._info = info
        self._max_n = max_n
        self._trace_bounds = trace_bounds
        self._check_size = check_size
        self.sampling_defaults = sampling_defaults

    def prepare(self, ask: GenerateCall) -> Prepared:
        """Build the requests of a call.

        Raises:
            InvalidRequestError: Something in it cannot be served; `param` names it.
        """
        given = ask.sampling
        ask = replace(ask, sampling=given.with_defaults(self.sampling_defaults))
        require(1 <= ask.n <= self._max_n, "n", f"must be in 1..{self._max_n}")
        if ask.sampling.stop:
            require_tokenizer(self._tokenizer, "stop", "use stop_token_ids")
        preset = presets.PRESETS.get(ask.reasoning.get("preset", ""), {})
        mode = ask.mode or preset.get("mode") or self._model.default_mode
        reasoning.check_mode(mode, self._model, {**preset, **ask.reasoning})
        prompts = self._tokenise(ask, mode)
        fallback = _DEFAULT_ANSWER_TOKENS if ask.has_default_max_tokens else None
        # A continued text is left as it is: `cot` thinks only if it ends inside a thought.
        may_think = not properties_of(mode).thinks_in_text or not ask.is_continued
        may_think = may_think or any(self._ends_in_thought(ask, p, mode) for p in prompts)
        resolved = reasoning.resolve(
            mode,
            {**ask.reasoning, **({"mode": ask.mode} if ask.mode else {})},
            self._model,
            effort=ask.effort,
            trace_bounds=self._trace_bounds,
            num_prompt_tokens=min(max(map(len, prompts)), self._most_prompt_tokens(ask)),
            max_tokens=given.max_tokens or fallback or 1,
            has_speed=self._model.template_has_speed and ask.messages is not None,
            is_open=may_think,
        )
        self._check_size(len(prompts) * ask.n * resolved.branches)
        resolved = add_replay(resolved, ask.replay, self._info, self._trace_bounds[1])
        self._check_resolved(resolved, ask.sampling)
        asked = ask.sampling.seed
        # With a requested seed equal prompts sample alike; without one they differ.
        seeds = [random.getrandbits(_SEED_BITS) if asked is None else asked for _ in prompts]
        of_thinking = [seed if resolved.seed is None else resolved.seed for seed in seeds]
        resolved = resolved.seeded(seeds[0], "server" if asked is None else "request")
        prompts = self._truncate(ask, prompts, resolved, given.max_tokens or fallback or 1)
        notes = notes_on(ask, prompts, self._model, self._tokenizer)
        prompts = [self._start(p, resolved.suffix_ids) for p in prompts]
        default = fallback or self.sampling_defaults.get("max_tokens")
        both = zip(seeds, of_thinking, strict=True)
        requests = tuple(self._requests(ask, mode, resolved, prompts, default, both))
        drawn = requests[0].thinking or requests[0].sampling  # without `after`
        sampled = given.report(drawn, self.sampling_defaults)
        return Prepared(
            requests=requests,
            prompt_token_ids=tuple(prompts),
            mode=mode,
            resolved=replace(
                resolved,
                parameters=resolved.parameters | sampled,
                warnings=(*resolved.warnings, *notes),
            ),
            ask=ask,
        )

    def _requests(
        self,
        ask: GenerateCall,
        mode: str,
        resolved: Resolved,
        prompts: Sequence[tuple[int, ...]],
        default: int | None,
        seeds: Iterable[tuple[int, int]],
    ) -> Iterator[Request]:
        """Yield engine requests, prompt by prompt; `seeds` are (answer, thinking) by prompt."""
        # The engine gets unique ids: two calls may carry the same client id at once.
        unique = uuid.uuid4().hex
        bad_words = bad_word_ids(ask.sampling.bad_words, self._tokenizer, self._info.vocab_size)
        by_logprob = resolved.branches > 1 and resolved.select == "logprob"
        for index, (prompt, (seed, thinking_seed)) in enumerate(zip(prompts, seeds, strict=True)):
            params = resolved.params
            is_text = properties_of(mode).thinks_in_text and ask.is_continued
            if is_text and not self._ends_in_thought(ask, prompt, mode):
                # Other prompts of this call do end in a thought.
                params = replace(params, steps=0, end_token_ids=(), halt=HaltParams())
            max_tokens = self._answer_tokens(prompt, params, default, ask)
            sampling = self._sampling(
                ask.sampling, max_tokens, bad_words, needs_logprobs=by_logprob
            )
            num_sequences = ask.n * resolved.branches
            for number in range(num_sequences):
                scores = ask.sampling.num_prompt_logprobs if number == 0 else None
                answer = replace(
                    sampling, seed=derive_seed(seed, number), num_prompt_logprobs=scores,
                    **resolved.after,
                )  # fmt: skip
                seeded = derive_seed(thinking_seed, number)
                thinking = replace(sampling, seed=seeded, num_prompt_logprobs=scores)
                yield Request(
                    request_id=f"{ask.request_id}-{index * num_sequences + number}.{unique}",
                    prompt_token_ids=prompt,
                    sampling=answer,
                    thinking=thinking if thinking != answer else None,
                    reasoning=params,
                    group_id=f"{unique}-{index}" if num_sequences > 1 else None,
                )

    def _tokenise(self, ask: GenerateCall, mode: str) -> list[tuple[int, ...]]:
        """Turn messages or prompts into token ids, before the start-of-thought token."""
        if ask.truncate_prompt_tokens is None:
            self._check_length(ask)
        if ask.messages is not None:
            ids = self.tokenise_chat(
                ask.messages,
                mode=mode,
                speed=ask.reasoning.get("speed"),
                options=ask.chat_template_options,
                add_special_tokens=ask.add_special_tokens,
            )
            prompts = [ids]
        else:
            special = ask.add_special_tokens
            prompts = [self._ids(p, special) if isinstance(p, str) else p for p in ask.prompts]
        if self._is_bounded(ask, mode):
            prompts = [self._bound_thinking(p, mode, self._tail(ask, p, mode)) for p in prompts]
        for prompt in prompts:
            require(bool(prompt), "prompt", "must not be empty")
            is_valid = min(prompt) >= 0 and max(prompt) < self._info.vocab_size
            last = self._info.vocab_size - 1
            require(is_valid, "prompt", f"has token ids outside 0..{last}")
        return prompts

    def _is_bounded(self, ask: GenerateCall, mode: str) -> bool:
        """Whether to open or close the thinking phase of a prompt, or to end its question."""
        is_text = ask.messages is None
        if self._model.suffix_ids(mode):
            return is_text or not ask.is_continued
        is_implied = self._model.is_thinker and self._model.think_start_id is None
        # Asked for by name, so the phase is opened in a text too, or closed where it is open.
        own = properties_of(mode)
        is_named = own.feeds is Feeds.MIXTURE
        is_named |= not own.thinks and (is_implied or not is_text)
        return is_named or not ask.is_continued

    def _check_length(self, ask: GenerateCall) -> None:
        """Reject prompts that can never fit before tokenising them."""
        limit = self._info.max_model_len
        most = _MAX_CHARACTERS_PER_TOKEN * limit
        if ask.num_characters > most * max(1, len(ask.prompts)):
            detail = f"the text is longer than {most} characters. Please shorten it."
            raise ContextLengthError(limit, detail, param=ask.text_field)
        longest = max((len(p) for p in ask.prompts if not isinstance(p, str)), default=0)
        if longest > limit:
            detail = f"the prompt has {longest}. Please shorten it."
            raise ContextLengthError(limit, detail, param=ask.text_field)

    def _most_prompt_tokens(self, ask: GenerateCall) -> int:
        """Most prompt tokens to keep; half the context where the prompt is cut to fit (-1)."""
        count, limit = ask.truncate_prompt_tokens, self._info.max_model_len
        return limit if count is None else limit // 2 if count < 0 else count

    def _truncate(
        self, ask: GenerateCall, prompts: list[tuple[int, ...]], resolved: Resolved, num_answer: int
    ) -> list[tuple[int, ...]]:
        """Cut prompts to truncate_prompt_tokens; the start tokens are appended later."""
        count, limit = ask.truncate_prompt_tokens, self._info.max_model_len
        if count is None:
            return prompts
        is_possible = count == -1 or 1 <= count <= limit
        require(is_possible, "truncate_prompt_tokens", f"must be -1 or in 1..{limit}")
        if count == -1:
            taken = len(resolved.suffix_ids) + resolved.params.max_thinking
            count = max(1, limit - taken - num_answer)
        head = self._ids("", ask.add_special_tokens) if self._tokenizer and ask.prompts else ()
        return [keep_last(p, count, head) for p in prompts]

    def _ids(
        self, text: str, add_special_tokens: bool | None, param: str = "prompt"
    ) -> tuple[int, ...]:
        tokenizer = require_tokenizer(self._tokenizer, param, "send token ids to /v1/completions")
        if add_special_tokens is None:
            manifest = self._model.manifest
            add_special_tokens = manifest.prompt.add_bos if manifest else True
        return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def tokenise_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        mode: str | None = None,
        speed: int | str | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        add_special_tokens: bool | None = None,
    ) -> tuple[int, ...]:
        """Render a chat: the model's chat template, or the manifest's question template.

        Args:
            messages: Already checked.
            mode: None: the model's default.
            speed: reasoning.speed; None: the model's default.
            options: Variables of the chat template.
            add_special_tokens: To the rendered text; None: the model's default.

        Raises:
            InvalidRequestError: The model has no template, or refuses these messages.
        """
        template = self._model.question_template
        if template is not None:
            for name in ("continue_final_message", "add_generation_prompt"):
                require(name not in options, name, "needs a model with a chat template")
            question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), None)
            if question is None:
                raise InvalidRequestError("messages must have a user message", param="messages")
            speed = self._model.default_speed if speed is None else speed
            text = template.replace("{speed}", str(speed)).replace("{question}", str(question))
            return self._ids(text, add_special_tokens, "messages")
        if self._tokenizer is None or not self._tokenizer.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        is_thinking = properties_of(mode or self._model.default_mode).thinks
        options = {"enable_thinking": is_thinking, **options}
        text = self._tokenizer.render_chat(messages, **options)
        special = bool(add_special_tokens)
        return tuple(self._tokenizer.encode(text, add_special_tokens=special))

    def _bound_thinking(self, ids: tuple[int, ...], mode: str, tail: int) -> tuple[int, ...]:
        """Open the thinking phase of a thinking model, or close it for `none`.

        The template may have opened it already.
        """
        start, end = self._model.think_start_id, self._model.think_end_id
        suffix = self._model.suffix_ids(mode)
        if suffix and not {start, end} & {*ids[len(ids) - tail :]}:
            return (*ids, *suffix)
        own = properties_of(mode)
        is_raw = own.thinks_in_text and bool(suffix)  # a text to continue unchanged
        if end is None or is_raw or self._model.has_slots(mode):
            return ids
        is_open = self._is_thinking_open(ids, tail)
        if not own.thinks:
            return (*ids, end) if is_open else ids
        return ids if is_open or start is None else (*ids, start)

    def _start(self, prompt: tuple[int, ...], start_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Append the start tokens, unless that is the think token and the template wrote it."""
        is_think = start_ids == (self._model.think_start_id,)
        is_there = is_think and self._is_thinking_open(prompt, _TEMPLATE_TAIL)
        return prompt if is_there else prompt + start_ids

    def _tail(self, ask: GenerateCall, prompt: tuple[int, ...], mode: str) -> int:
        """How many of a prompt's last ids decide whether it ends in a thought."""
        if ask.messages is None:
            return len(prompt)
        if self._model.suffix_ids(mode):
            return 0
        if not ask.chat_template_options.get("continue_final_message") or not self._model.encode:
            return _TEMPLATE_TAIL
        return _TEMPLATE_TAIL + len(self._model.encode(str(ask.messages[-1].get("content"))))

    def _ends_in_thought(self, ask: GenerateCall, prompt: tuple[int, ...], mode: str) -> bool:
        return self._is_thinking_open(prompt, self._tail(ask, prompt, mode))

    def _is_thinking_open(self, ids: tuple[int, ...], tail: int) -> bool:
        """Whether a prompt ends inside a thinking phase, by the think tokens in its last ids.

        In a chat only the template's own ids count: earlier ones may be a user's text. A model
        without a start token thinks from the end of the prompt on.
        """
        bounds = (self._model.think_start_id, self._model.think_end_id)
        last = next((i for i in reversed(ids[-tail:]) if i in bounds), None)
        return last == bounds[0]

    def _check_resolved(self, resolved: Resolved, sampling: SamplingFields) -> None:
        """Check the reasoning settings against other fields."""
        params = resolved.params
        draws = params.steps > 0 and params.mixture.kind == "multiplex"
        is_random = sampling.params.get("temperature", 1.0) >= MIN_TEMPERATURE
        is_possible = is_random or not draws
        require(is_possible, "temperature", "must be above 0: multiplex draws its tokens")
        self._check_branches(resolved, sampling)
        is_short = len(resolved.suffix_ids) <= MAX_FORCED_TOKENS
        require(is_short, "reasoning.start", f"must be at most {MAX_FORCED_TOKENS} tokens")
        named = {
            "start": resolved.suffix_ids,
            "end": params.end_token_ids,
            "halt.stop_tokens": params.halt.stop_token_ids,
        }
        for name, ids in named.items():
            outside = [i for i in ids if not 0 <= i < self._info.vocab_size]
            require(not outside, f"reasoning.{name}", f"{outside}: not in the vocabulary")

    def _check_branches(self, resolved: Resolved, sampling: SamplingFields) -> None:
        if resolved.branches == 1:
            return
        params, manifest = resolved.params, self._model.manifest
        adapter = manifest.adapters.get(params.adapter) if manifest else None
        temperature = sampling.params.get("temperature", 1.0)
        differs = has_noise(params, temperature, adapter.type if adapter else None)
        require(
            differs,
            "reasoning.branches",
            "above 1 needs noise while thinking (latent_noise_std, mixture.noise, ...): all would "
            "be the same",
        )

    def _num_thinking(self, params: ReasoningParams) -> int:
        """Positions that thinking is certain to take."""
        is_certain = params.is_fixed or params.pad_positions or not self._model.is_thinker
        return params.max_thinking if is_certain else 0

    def _answer_tokens(
        self,
        prompt: tuple[int, ...],
        params: ReasoningParams,
        default: int | None,
        ask: GenerateCall,
    ) -> int:
        """Return max_tokens, which must fit beside prompt and thinking; cut a default to fit."""
        limit, thinking = self._info.max_model_len, self._num_thinking(params)
        asked, room = ask.sampling.max_tokens, limit - len(prompt) - thinking
        if room < (asked or 1):
            thought = f", {thinking} in thinking" if thinking else ""
            raise ContextLengthError(
                limit,
                f"you requested {len(prompt) + thinking + (asked or 1)} tokens ({len(prompt)} in "
                f"the {ask.text_field}{thought}, {asked or 1} in the completion). Please reduce "
                f"the length of the {ask.text_field} or completion.",
                param=ask.text_field if room < 1 else ask.sampling.max_tokens_field,
            )
        return asked or min(room, default or room)

    def _sampling(
        self,
        ask: SamplingFields,
        max_tokens: int,
        bad_words: tuple[tuple[int, ...], ...],
        *,
        needs_logprobs: bool,
    ) -> SamplingParams:
        """Resolve the sampling fields; the defaults are OpenAI's."""
        size = self._info.vocab_size
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            outside = [i for i in getattr(ask, name) if not 0 <= i < size]
            require(not outside, name, f"has token ids outside 0..{size - 1}")
        manifest = self._model.manifest
        eos = () if ask.ignore_eos else self._model.eos_token_ids
        if ask.allowed_token_ids:
            refused = {word[0] for word in bad_words if len(word) == 1}
            refused |= {*manifest.tokens.never_emit} if manifest else set()
            refused |= {*eos, *ask.stop_token_ids} if ask.params.get("min_tokens") else set()
            is_left = bool({*ask.allowed_token_ids} - refused)
            require(is_left, "allowed_token_ids", "has none but what other fields forbid")
        return SamplingParams(
            max_tokens=max_tokens,
            logit_bias=tuple(ask.logit_bias.items()),
            allowed_token_ids=ask.allowed_token_ids,
            bad_words=bad_words,
            banned_token_ids=tuple(manifest.tokens.never_emit) if manifest else (),
            stop_token_ids=frozenset((*eos, *ask.stop_token_ids)),
            num_logprobs=0 if needs_logprobs and ask.num_logprobs is None else ask.num_logprobs,
            **ask.params,
        )

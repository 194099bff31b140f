"""Runs an unmodified transformers model over a paged cache; tests itself at load."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from coconut_serve.checkpoint.files import one_line
from coconut_serve.checkpoint.fit import refuse_misfits
from coconut_serve.checkpoint.stages import stage
from coconut_serve.engines.native import attention
from coconut_serve.engines.native.attention import AttentionPlan, Chunk, LayerAttention, Plan
from coconut_serve.engines.native.lengths import LongRotary, narrowed
from coconut_serve.engines.native.linear import PackedLinear, PackedTable, pack_linears, pad_rows
from coconut_serve.errors import StartupError
from coconut_serve.reasoning.embedding import ROWS_AT_ONCE, Embedding

_TEST_LENGTH = 24  # positions of the self-test's prompt
# What incompatible modelling code raises.
_REFUSALS = (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores for each position."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_position(self, dtype: torch.dtype) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class _ShapeProbe(Plan):
    """Stands in for a step's plan and records the shapes each layer would store."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(self, layer: int, attend: LayerAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.shapes[layer] = LayerShape(k.shape[0], k.shape[-1], v.shape[-1])
        return q.new_zeros(q.shape[1], q.shape[0], v.shape[-1])


class PagedModel:
    """A decoder whose attention reads and writes a paged cache.

    The modelling code is transformers' own; only its attention function is replaced, through
    transformers' attention interface, and on CPU its linear layers are packed. Caches are made
    by `make_caches` and passed in by plan.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model = model
        self._decoder = _decoder(model)
        self._head = model.get_output_embeddings()
        self._finish_logits = _logit_transform(model.config.get_text_config())
        self.device = device
        self.dtype = model.dtype
        self.embed_tokens: Callable[[Tensor], Tensor] = model.get_input_embeddings()
        table: Tensor = model.get_input_embeddings().weight
        self._is_packed = any(isinstance(module, PackedLinear) for module in model.modules())
        multiply = PackedTable(table) if self._is_packed else None
        self.embedding = Embedding(self.embed_tokens, table, multiply=multiply)
        config = model.config.get_text_config()
        self.config = config
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_model_len: int | None = max_positions(config)
        self._rotary = LongRotary.replace(model)
        self.layers = self._probe_layers()

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        is_packed: bool = True,
        show_progress: bool = False,
    ) -> Self:
        """Load a Hugging Face directory and check the paged forward pass against the plain one.

        Args:
            directory: config.json and safetensors.
            dtype: Of weights and cache.
            device: Where to run.
            is_packed: Pack linear layers on CPU.
            show_progress: Draw bars instead of logging lines.

        Raises:
            StartupError: The directory cannot be loaded, or the model's attention does more than
                the paged function knows (ALiBi, attention sinks, ...), so its logits differ.
        """
        attention.register()
        with stage("loading weights", show_progress=show_progress, has_own_bar=True):
            model = _load_plain(directory, dtype)
        token_ids = torch.arange(_TEST_LENGTH) * 7 % model.config.get_text_config().vocab_size
        token_ids = token_ids.to(device)
        with torch.inference_mode(), narrowed(model):
            with stage("self-test: plain model", show_progress=show_progress):
                model = model.to(device)
                places = _test_positions(model)
                expected = [(at, _plain_logits(model, token_ids, at)) for at in places]
            if device.type == "cpu" and is_packed:
                with stage("packing weights", show_progress=show_progress):
                    pack_linears(model, dtype)
            try:
                with stage("self-test: paged model", show_progress=show_progress):
                    model.set_attn_implementation(attention.IMPLEMENTATION)
                    paged = cls(model, device)
                    for first, logits in expected:
                        paged._check(token_ids, first, logits)
            except _REFUSALS as error:
                raise _unsupported(directory, str(error)) from error
        return paged

    @property
    def long_after(self) -> int | None:
        """Length above which a sequence uses LongRoPE's long factors; None: there are none."""
        return self._rotary.original_length if self._rotary else None

    def forward(
        self, inputs: Tensor, positions: Tensor, plan: AttentionPlan, is_long: Tensor | None = None
    ) -> Tensor:
        """Run the decoder.

        Args:
            inputs: [num_rows, hidden_size] embeddings.
            positions: [num_rows] int64.
            plan: Where the rows read and write.
            is_long: [num_rows] bool, rows of sequences longer than `long_after`; None: no row is.

        Returns:
            [num_rows, hidden_size], after the final norm.
        """
        num_rows = inputs.shape[0]
        if self._is_packed:
            inputs, positions = pad_rows(inputs), pad_rows(positions)
            is_long = is_long if is_long is None else pad_rows(is_long)
        if self._rotary:
            self._rotary.is_long = is_long
        output = self._decoder(
            inputs_embeds=inputs.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            plan=plan,
        )
        hidden: Tensor = output.last_hidden_state[0, :num_rows]
        return hidden

    def project(self, hidden: Tensor) -> Tensor:
        """Apply the output head alone; [n, hidden] -> [n, vocab]."""
        rows = pad_rows(hidden) if self._is_packed else hidden
        logits: Tensor = self._head(rows)[: hidden.shape[0]]
        return logits

    def vocabulary(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of the output head and of the embedding, [n, hidden_size] each, in order."""
        eye = torch.eye(self.hidden_size, dtype=self.dtype, device=self.device)
        head = (self.project(eye) - self.project(torch.zeros_like(eye[:1]))).T  # without its bias
        ids = torch.arange(self.vocab_size, device=self.device)
        for rows, part in zip(*(torch.split(t, ROWS_AT_ONCE) for t in (head, ids)), strict=True):
            yield rows, self.embed_tokens(part)

    def project_logits(self, hidden: Tensor) -> Tensor:
        """Compute logits, scaled and capped as the model does; [n, hidden] -> [n, vocab]."""
        return self._finish_logits(self.project(hidden))

    def make_caches(self, num_slots: int) -> list[tuple[Tensor, Tensor]]:
        """Create keys and values [num_slots, kv_heads, dim] for each layer.

        On CPU memory is committed as it is written. Slot 0, which padding reads, is zero.
        """

        def make(layer: LayerShape, dim: int) -> Tensor:
            shape = (num_slots, layer.num_kv_heads, dim)
            cache = torch.empty(shape, dtype=self.dtype, device=self.device)
            cache[0] = 0
            return cache

        return [(make(x, x.key_dim), make(x, x.value_dim)) for x in self.layers]

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights, packed copies included."""
        packed = [m.nbytes for m in self._model.modules() if isinstance(m, PackedLinear)]
        total: int = sum(p.nbytes for p in self._model.parameters()) + sum(packed)
        return total

    @property
    def bytes_per_position(self) -> int:
        """Cache memory of one position: keys, values and the input vector kept for replay."""
        layers = sum(layer.bytes_per_position(self.dtype) for layer in self.layers)
        vector: int = self.hidden_size * self.dtype.itemsize
        return layers + vector

    def _probe_layers(self) -> list[LayerShape]:
        """Run one position and record what each layer would store."""
        probe = _ShapeProbe()
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._decoder(
            inputs_embeds=self.embed_tokens(zero).unsqueeze(0),
            position_ids=zero.unsqueeze(0),
            use_cache=False,
            plan=probe,
        )
        if sorted(probe.shapes) != list(range(len(probe.shapes))) or not probe.shapes:
            raise ValueError("its layers do not all go through the attention interface")
        return [probe.shapes[layer] for layer in sorted(probe.shapes)]

    def _check(self, token_ids: Tensor, first: int, expected: Tensor) -> None:
        """Compare prefill in two chunks plus decode rows with the plain logits.

        The prompt's first position id is `first`.
        """
        caches = self.make_caches(2 * _TEST_LENGTH)
        slots = torch.arange(_TEST_LENGTH, 2 * _TEST_LENGTH, device=self.device)
        cuts = [0, _TEST_LENGTH // 3, _TEST_LENGTH - 2, _TEST_LENGTH - 1, _TEST_LENGTH]
        is_long = self.long_after is not None and first + _TEST_LENGTH > self.long_after
        hidden = []
        for start, end in itertools.pairwise(cuts):
            positions = torch.arange(first + start, first + end, device=self.device)
            is_decode = end - start == 1
            plan = AttentionPlan(
                write_slots=slots[start:end],
                num_decode=int(is_decode),
                decode_slots=slots[None, :end],
                decode_lengths=torch.tensor([end], device=self.device),
                chunks=[] if is_decode else [Chunk(0, end - start, end, slots[:end])],
                caches=caches,
            )
            inputs, long = self.embed_tokens(token_ids[start:end]), torch.ones_like(positions) > 0
            hidden.append(self.forward(inputs, positions, plan, long if is_long else None))
        logits = self.project_logits(torch.cat(hidden)).float()
        scale = expected.abs().max().clamp_min(1e-6)
        error = float((logits - expected).abs().max() / scale)
        limit = 1e-3 if self.dtype == torch.float32 else 0.1
        if not error <= limit:  # also refuses NaN
            raise ValueError(
                f"paged logits differ from the plain model's by {error:.2g} of their range "
                f"(allowed {limit:g})"
            )


def _test_positions(model: PreTrainedModel) -> list[int]:
    """First position id of each self-test prompt: one for each set of rotary factors."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return [0]
    return [0, max(1, rope["original_max_position_embeddings"] - _TEST_LENGTH // 2)]


def _plain_logits(model: PreTrainedModel, token_ids: Tensor, first: int) -> Tensor:
    """Logits of the plain model; [num_ids, vocab_size] float32."""
    places: dict[str, Tensor] = {}
    if first:
        positions = torch.arange(first, first + len(token_ids), device=token_ids.device)
        places["position_ids"] = positions[None]
    logits: Tensor = model(token_ids[None], use_cache=False, **places).logits[0]
    return logits.float()


def read_config(directory: Path) -> PreTrainedConfig:
    """Read config.json with transformers; errors name the directory."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # wrong values make transformers raise nearly anything
        raise _unreadable(directory, error) from error


def _load_plain(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load with transformers; errors name the directory."""
    config = read_config(directory)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:
        raise _unreadable(directory, error) from error
    # Files of multimodal models hold more weights than the text model takes.
    refuse_misfits(directory, type(model).__name__, {**info, "unexpected_keys": ()})
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def _unreadable(directory: Path, error: Exception) -> StartupError:
    return StartupError(f"cannot load {directory}: {one_line(error)}", param="MODEL")


def _unsupported(directory: Path, reason: str) -> StartupError:
    return StartupError(
        f"the native engine cannot run {directory}: {reason}. "
        "Models whose attention goes beyond causal softmax attention (ALiBi, sinks) are refused.",
        param="MODEL",
    )


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The module whose last_hidden_state the output head reads."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        decoder = model.base_model
    assert isinstance(decoder, nn.Module)
    return decoder


def _logit_transform(config: PreTrainedConfig) -> Callable[[Tensor], Tensor]:
    """The family's own step after the head: a scale (Cohere, Granite), a soft-cap (Gemma 2)."""
    scale: Any = getattr(config, "logit_scale", None)
    divisor: Any = getattr(config, "logits_scaling", None)
    cap: Any = getattr(config, "final_logit_softcapping", None)

    def transform(logits: Tensor) -> Tensor:
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence the model was made for; None if its config does not say."""
    for name in ("max_position_embeddings", "n_positions"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None

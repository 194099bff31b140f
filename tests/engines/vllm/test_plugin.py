"""What the hooks rest on in vLLM, and what they refuse; no engine is started here."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def _ready() -> None:
    import vllm.v1.worker.cpu.shm  # noqa: F401 (before any Model Runner V2 module)


def test_every_hooked_function_is_there_with_its_parameters() -> None:
    """Fails by name when a new vLLM moves something; see docs/vllm.md on upgrading."""
    from coconut_serve.engines.vllm.plugin import HOOKS, find, find_changes

    assert find_changes() == []
    for path in HOOKS:
        owner, name = find(path)
        assert callable(getattr(owner, name))


def test_what_the_hooks_read_is_there() -> None:
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.request import Request
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.output import SamplerOutput
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    read = {"idx_mapping_np", "query_start_loc_np", "num_computed_tokens_np", "logits_indices"}
    assert read <= {*InputBatch.__dataclass_fields__}
    assert "logprobs_tensors" in SamplerOutput.__dataclass_fields__
    assert LogprobsTensors._fields[:3] == (
        "logprob_token_ids", "logprobs", "selected_token_ranks",
    )  # fmt: skip
    assert "num_prompt_tokens" in inspect.getsource(Request.__init__)
    sampler = inspect.getsource(Sampler.__init__)
    for name in ("penalties_state", "logits_processors", "needs_logits_processing"):
        assert f"self.{name}" in sampler
    remove = inspect.getsource(GPUModelRunner._remove_request)
    state, slot = remove.index("model_state.remove_request"), remove.index("req_states.remove")
    assert state < slot, "the state must see the slot before it is freed"


def test_a_change_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from coconut_serve.engines.vllm import plugin

    gone = {"vllm.v1.worker.gpu.sample.sampler:Sampler.no_such": ()}
    moved = {"vllm.v1.worker.gpu.sample.sampler:Sampler.__call__": ("logits",)}
    monkeypatch.setattr(plugin, "HOOKS", gone | moved)
    first, second = plugin.find_changes()
    assert "no_such is gone" in first
    assert "__call__ takes" in second


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "1.0.0"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from coconut_serve.engines.vllm import plugin
    from coconut_serve.errors import StartupError

    monkeypatch.setattr(plugin, "vllm_version", lambda: version)
    with pytest.raises(StartupError, match=r">= 0\.31, < 0\.34"):
        plugin.check_version()


def test_plugin_is_inert_unless_switched_on_and_installs_once() -> None:
    code = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.core import kv_cache_utils as k
from coconut_serve.engines.vllm import plugin
first = k._gen_prompt_embeds_extra_hash_keys
print(hasattr(first, "__wrapped__"))
plugin.install()
second = k._gen_prompt_embeds_extra_hash_keys
plugin.install()
print(plugin.is_installed(), k._gen_prompt_embeds_extra_hash_keys is second)
"""
    for enabled, expected in (("0", "False\nTrue True"), ("1", "True\nTrue True")):
        environment = {**os.environ, "COCONUT_VLLM": enabled}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment,
            timeout=120, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == expected


def config(**changes: Any) -> Any:
    parallel = {
        "pipeline_parallel_size": 1, "prefill_context_parallel_size": 1, "enable_dbo": False,
        "enable_batch_sharded_sampling": None,
    }  # fmt: skip
    model = {
        "enable_prompt_embeds": True,
        "logits_processors": ["coconut_serve.engines.vllm.params:ReasoningParamsCheck"],
    }
    top = {
        "speculative_config": None, "kv_transfer_config": None, "watermark_config": None,
        "use_v2_model_runner": True,
    }  # fmt: skip
    groups: tuple[dict[str, Any], ...] = (parallel, model, top)
    for group in groups:
        group |= {name: value for name, value in changes.items() if name in group}
    return SimpleNamespace(
        **top, parallel_config=SimpleNamespace(**parallel), model_config=SimpleNamespace(**model)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV transfer"),
        ({"watermark_config": object()}, "watermarking"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"enable_batch_sharded_sampling": True}, "batch-sharded sampling"),
        ({"enable_dbo": True}, "dual batch overlap"),
        ({"use_v2_model_runner": False}, "Model Runner V2"),
        ({"enable_prompt_embeds": False}, "--enable-prompt-embeds"),
        ({"logits_processors": None}, "--logits-processors"),
    ],
)
def test_what_cannot_work_is_refused_at_start(changes: dict[str, Any], message: str) -> None:
    from coconut_serve.engines.vllm.hooks import check_config

    check_config(config())
    with pytest.raises(ValueError, match=message):
        check_config(config(**changes))


def cot(**more: Any) -> dict[str, Any]:
    return {"reasoning_mode": "cot", "reasoning_steps": 3, **more}


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"reasoning_mode": "latnet"}, "reasoning_mode must be one of"),
        ({"reasoning_mode": "latent"}, "reasoning_steps is needed"),
        ({"reasoning_mode": "latent", "reasoning_steps": -1}, "reasoning_steps must be in"),
        ({"reasoning_mode": "latent", "reasoning_steps": 3}, "reasoning_hidden_token_id is needed"),
        ({"reasoning_mode": "latent", "reasoning_steps": 2.5}, "reasoning_steps must be a int"),
        ({"reasoning_mode": "cot", "reasoning_steps": 3, "reasoning_stepz": 3}, "stepz is not"),
        (
            {"reasoning_mode": "latent", "reasoning_steps": 3, "reasoning_hidden_token_id": 7},
            "must not be in stop_token_ids",
        ),
        (
            {"reasoning_mode": "distribution", "reasoning_steps": 3, "reasoning_noise": "loud"},
            "reasoning_noise must be one of",
        ),
        (
            {"reasoning_mode": "cot", "reasoning_steps": 3, "reasoning_end_token_ids": "</think>"},
            "must be a list of token ids",
        ),
        (cot(reasoning_end_token_ids=[-5]), "must be a list of token ids"),
        (cot(reasoning_stop_token_ids=[2**63]), "must be a list of token ids"),
        (cot(reasoning_seed=2**63), "reasoning_seed must be in"),
        (cot(reasoning_steps=float("inf")), "reasoning_steps must be a int"),
        (cot(reasoning_report_width=10**10), "reasoning_report_width"),
        (cot(reasoning_num_logprobs=3), "reasoning_num_logprobs is not known"),
        (cot(reasoning_min_tokens=1), "reasoning_min_tokens is not known"),
        (cot(reasoning_draw=[1.0]), "reasoning_draw is not known"),
        (cot(reasoning_kind="gated"), "reasoning_kind gated needs an adapter"),
        (cot(reasoning_answer_tokens=3), "reasoning_answer_tokens is not known"),
        (cot(reasoning_pad_positions=True), "reasoning_pad_positions is not known"),
        (cot(reasoning_replay_token_ids=[1]), "reasoning_replay_token_ids is not known"),
        (cot(reasoning_replay_vectors="AAAA"), "reasoning_replay_vectors must be"),
        (cot(reasoning_answer_stop_token_ids=[1]), "answer_stop_token_ids is not known"),
        (cot(reasoning_adapter="default"), "reasoning_adapter is not supported here"),
        ({"reasoning_steps": 3}, "must be 0 in mode none"),
    ],
)
def test_bad_settings_are_refused_where_they_come_in(
    extra_args: dict[str, Any], message: str
) -> None:
    from vllm import SamplingParams

    from coconut_serve.engines.vllm.params import ReasoningParamsCheck

    with pytest.raises(ValueError, match=message):
        ReasoningParamsCheck.validate_params(
            SamplingParams(extra_args=extra_args, stop_token_ids=[7])
        )


def test_settings_survive_the_way_to_the_worker() -> None:
    from coconut_serve.engines.vllm.params import from_extra_args, to_extra_args, worker_params
    from tests.engines.native.test_exactness import mixed_requests

    for request in mixed_requests():
        thinking = worker_params(request, hidden_size=64, hidden_token_id=1)
        assert from_extra_args(to_extra_args(thinking)) == thinking
    assert from_extra_args(None) is None
    assert from_extra_args({"other": 1}) is None


def test_ids_beyond_the_vocabulary_never_reach_a_table() -> None:
    from coconut_serve.engines.vllm.params import from_extra_args

    sent = cot(reasoning_end_token_ids=[9, 10**9], reasoning_hidden_token_id=500)
    thinking = from_extra_args({**sent, "reasoning_stop_token_ids": [200]})
    assert thinking is not None
    inside = thinking.within(128)
    assert inside.params.end_token_ids == (9, 127)
    assert inside.params.halt.stop_token_ids == (127,)
    assert inside.hidden_token_id == 127


def test_limits_that_would_end_vllms_worker_are_told() -> None:
    """vLLM checks these where nothing can be answered any more."""
    from coconut_serve.config import EngineConfig
    from coconut_serve.engines.base import EngineInfo
    from coconut_serve.engines.vllm.engine import VllmEngine
    from coconut_serve.errors import InvalidRequestError
    from tests.fakes import make_request

    engine = VllmEngine(EngineConfig(model=Path("m")), ("none",), lambda _: None)
    engine._info = EngineInfo(
        engine="vllm", vocab_size=5000, max_model_len=99, kv_cache_positions=99, block_size=32,
        modes=("none",),
    )  # fmt: skip
    with pytest.raises(InvalidRequestError, match=r"reasoning\.pad_positions must be false"):
        engine._check(make_request(reasoning={"pad_positions": True}))
    many, bias = frozenset(range(129)), tuple((i, 1.0) for i in range(1024))
    engine._check(make_request(stop_token_ids=many, logit_bias=bias))
    for sampling, param in (
        ({"stop_token_ids": many, "min_tokens": 1}, "stop_token_ids"),
        ({"logit_bias": bias, "banned_token_ids": (4000,)}, "logit_bias"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            engine._check(make_request(**sampling))
        assert caught.value.param == param


def test_steps_of_several_engines_are_counted_apart() -> None:
    """Data parallel: usage is a share of one engine's blocks, which vLLM reports as a sum."""
    from coconut_serve.engines.vllm.stats import StepObserver

    seen: list[Any] = []
    observer = StepObserver(seen.append)
    observer.num_blocks, observer.num_engines = 200, 2
    for index, usage in ((0, 0.5), (1, 0.25), (0, 0.1)):
        stats = SimpleNamespace(
            num_running_reqs=1, num_waiting_reqs=0, kv_cache_usage=usage, prefix_cache_stats=None
        )
        observer.count_row("cot", "decode")
        observer.record(stats, None, engine_idx=index)
        observer.note_end()
    assert [s.num_used_blocks for s in seen] == [50, 50, 75, 75, 35, 35]
    assert [sum(s.num_rows.values()) for s in seen] == [0, 0, 0, 0, 3, 0], "none are lost"


def test_vllm_flags_are_vllms_and_ours_are_refused() -> None:
    from coconut_serve.config import EngineConfig
    from coconut_serve.engines.vllm.options import build_engine_args
    from coconut_serve.errors import StartupError

    ours = EngineConfig(model=Path("m"), kv_cache_memory="40%", max_num_seqs=3)
    args = build_engine_args(ours, ("--tensor-parallel-size", "2", "--quantization", "fp8"))
    assert (args.tensor_parallel_size, args.quantization, args.max_num_seqs) == (2, "fp8", 3)
    assert args.gpu_memory_utilization == 0.4
    for flags, message in (
        (("--max-num-seqs", "4"), "use --max-num-seqs"),
        (("--enable-prompt-embeds", "--seed", "1"), "is set by coconut-serve"),
        (("--no-such-flag",), "vLLM does not take"),
    ):
        with pytest.raises(StartupError, match=message):
            build_engine_args(ours, flags)


def test_adapter_that_changes_the_embedding_is_refused(tmp_path: Path) -> None:
    from coconut_serve.engines.vllm.options import check_adapter
    from coconut_serve.errors import StartupError

    (tmp_path / "adapter_config.json").write_text('{"target_modules": ".*embed_tokens"}')
    for value, message in (
        ("a", "NAME=PATH"),
        (f"a={tmp_path}", "changes the embedding"),
        ("a=/no/such/adapter", "cannot read the adapter"),
    ):
        with pytest.raises(StartupError, match=message):
            check_adapter(("--lora-modules", value))


def test_realign_needs_plain_tables() -> None:
    from torch import nn

    from coconut_serve.engines.vllm.hooks import _add_realign, _rows
    from coconut_serve.reasoning.adapters import AdapterBank

    assert _rows(SimpleNamespace(quant_method=object())) is None, "quantised"
    bank: Any = AdapterBank()
    nothing: Any = None
    _add_realign(bank, nn.Linear(2, 2), nothing, nothing)
    assert bank.names == ()

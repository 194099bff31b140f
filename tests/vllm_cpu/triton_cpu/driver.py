from typing import Any

from triton.backends.driver import DriverBase


class CpuDriver(DriverBase):
    """Is there, and no more: the interpreter needs no driver."""

    def __init__(self) -> None:
        """Do not look for a device."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> Any:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

"""What routes share: the loaded service, and the header of ignored fields."""

from starlette.requests import Request

from coconut_serve.errors import NotReadyError
from coconut_serve.service.service import Service


def get_service(request: Request) -> Service:
    """The loaded service.

    Raises:
        NotReadyError: The model is still loading.
    """
    service: Service | None = getattr(request.app.state, "service", None)
    if service is None:
        raise NotReadyError("the model is loading", retry_after_seconds=2)
    return service


def ignored_header(service: Service, ignored: list[str]) -> dict[str, str]:
    """Count unknown fields that were ignored, and name them in a header."""
    if not ignored:
        return {}
    service.metrics.add(service.metrics.ignored_params, len(ignored))
    safe = [name for name in ignored if name.isascii() and name.isprintable()]
    return {"X-Coconut-Ignored-Params": ",".join(safe)[:1000]}

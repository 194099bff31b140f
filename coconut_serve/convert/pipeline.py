"""Runs a conversion, from options to the written directory."""

from coconut_serve.convert.formats import refused
from coconut_serve.convert.job import Converted, Job
from coconut_serve.convert.model import Fitted, fit, some
from coconut_serve.convert.options import Options
from coconut_serve.convert.registry import find_format
from coconut_serve.convert.report import Report
from coconut_serve.convert.source import read_source
from coconut_serve.convert.write import check_manifest, check_target, write
from coconut_serve.errors import StartupError


def convert(options: Options) -> Report:
    """Convert one checkpoint.

    Returns:
        The fate of each tensor; also written as convert_report.json.

    Raises:
        StartupError: The checkpoint is damaged, unknown or does not fit; nothing was written.
    """
    check_target(options.target)
    refused.check(options.source)
    source = read_source(options.source)
    chosen = find_format(source, options.method)
    report = Report()
    report.format = chosen.name
    if source.unread:
        report.note(f"not read: {', '.join(source.unread)}")
    job = Job(source, options, report)
    converted = chosen.convert(job)
    fitted = fit(converted.config, converted.tensors, report)
    _refuse_unused(job, converted, fitted)
    check_manifest(converted, fitted.vocab_size)
    write(job, converted, fitted)
    return report


def _refuse_unused(job: Job, converted: Converted, fitted: Fitted) -> None:
    """Raise StartupError if a tensor was neither written, merged nor dropped on purpose.

    This includes a weight under two names, of which only the last is written.
    """
    written = (*fitted.tensors.values(), *converted.adapter.values())
    accounted = job.report.accounted | {id(tensor) for tensor in written}
    unused = [name for name, tensor in job.source.tensors.items() if id(tensor) not in accounted]
    if unused:
        raise StartupError(
            f"{some(unused)} that {job.report.format} has no use for: another variant of it?",
            param="SRC",
        )

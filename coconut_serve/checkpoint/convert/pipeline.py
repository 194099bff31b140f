"""From options to a written directory."""

from coconut_serve.checkpoint.convert.command import Options
from coconut_serve.checkpoint.convert.formats import refused
from coconut_serve.checkpoint.convert.job import Job
from coconut_serve.checkpoint.convert.model import fit
from coconut_serve.checkpoint.convert.registry import find_format
from coconut_serve.checkpoint.convert.report import Report
from coconut_serve.checkpoint.convert.source import read_source
from coconut_serve.checkpoint.convert.write import check_manifest, check_target, write


def convert(options: Options) -> Report:
    """Convert one checkpoint.

    Returns:
        What became of each tensor; also written as convert_report.json.

    Raises:
        StartupError: The checkpoint is damaged, unknown, or does not fit; nothing was written.
    """
    check_target(options.target)
    refused.check(options.source)
    source = read_source(options.source)
    chosen = find_format(source, options.method)
    report = Report()
    report.format = chosen.name
    job = Job(source, options, report)
    converted = chosen.convert(job)
    fitted = fit(converted.config, converted.tensors, report)
    check_manifest(converted, fitted.vocab_size)
    write(job, converted, fitted)
    return report

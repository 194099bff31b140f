"""Load test: mixed modes, open or closed loop, shapes, disconnects; exits by an SLO file.

python -m locust -f loadtests/locustfile.py --headless --host http://127.0.0.1:8000 \
        --shape smoke --slo loadtests/slo/smoke.yaml --report run.json
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import gevent
from locust import LoadTestShape, User, events, task

from coconut_serve.commands.measure import Record, Target
from loadtests.scenarios.agree import compare, read_page
from loadtests.scenarios.clients import (
    POLITE,
    SCENARIOS,
    Mix,
    PooledTarget,
    Task,
    parse_weights,
    pick,
)
from loadtests.scenarios.judge import judge, read_slo, summary

# name -> [(end in seconds from the start, users)], a pair per stage
SHAPES: dict[str, list[tuple[float, int]]] = {
    "smoke": [(60, 4)],
    "steps": [(30, 1), (60, 2), (90, 4), (120, 8), (150, 16)],
    "spike": [(30, 2), (60, 20), (100, 2)],
    "overload": [(60, 40)],
    "soak": [(1800, 4)],
}


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Add our options to locust's."""
    group = parser.add_argument_group("coconut-serve")
    for flag, default, text in (
        ("modes", "none=1,cot=2,latent=3,distribution=2", "by weight"),
        ("scenarios", "stream=8,whole=2", f"by weight, of {', '.join(SCENARIOS)}"),
        ("arrivals", 0.0, "requests/s of a user, answered or not; 0: one after the other"),
        ("max-tokens", 32, "of an answer"),
        ("min-tokens", 0, "of an answer"),
        ("steps", 0, "of thinking; 0: the model's own"),
        ("task", "", "file of questions whose answers are looked at (docs/evaluation.md)"),
        ("random-seed", 1, "of what is asked"),
        ("slo", "", "file with limits; violations give status 1"),
        ("peak", "", "report of a run at capacity, for an SLO's min_goodput_of_peak"),
        ("report", "", "JSON file to write the summary to"),
        ("metrics-url", "", "server whose /metrics must agree; for runs without a refusal"),
        ("time-tolerance", 0.1, "share by which the server's mean times may differ"),
    ):
        group.add_argument(f"--{flag}", default=default, type=type(default), help=text)
    group.add_argument("--shape", choices=[*SHAPES, "none"], default="smoke", help="none: -u, -t")


class Run:
    """State shared by all users of a run."""

    def __init__(self, options: Any) -> None:
        self.target = PooledTarget(url=options.host, api_key=os.environ.get("COCONUT_API_KEY", ""))
        self.mix = Mix(
            modes=parse_weights(options.modes),
            scenarios=parse_weights(options.scenarios),
            max_tokens=options.max_tokens,
            min_tokens=options.min_tokens,
            steps=options.steps,
            task=Task.load(Path(options.task), self.target) if options.task else None,
        )
        self.rng = random.Random(options.random_seed)
        self.arrivals: float = options.arrivals
        self.records: list[Record] = []
        self.in_flight: set[gevent.Greenlet] = set()
        self.page_before: Any = None

    def ask(self) -> None:
        """Run one client of the mix and record its request."""
        scenario = pick(self.mix.scenarios, self.rng)
        record = SCENARIOS[scenario](self.target, self.mix, random.Random(self.rng.random()))
        self.records.append(record)
        fire(record)

    def arrive(self) -> None:
        """Start a client without waiting for it."""
        greenlet = gevent.spawn(self.ask)
        self.in_flight.add(greenlet)
        greenlet.link(self.in_flight.discard)


def fire(record: Record) -> None:
    """Report to locust, under a name for each scenario, status and latency."""

    def tell(kind: str, name: str, seconds: float, size: int, error: str = "") -> None:
        events.request.fire(
            request_type=kind, name=name, response_time=seconds * 1e3, response_length=size,
            exception=RuntimeError(error) if error else None, context={},
        )  # fmt: skip

    is_fault = record.scenario in POLITE and not record.is_ok and record.status not in (429, 503)
    name = f"{record.scenario} {record.status}"
    tell("POST", name, record.e2e, record.num_answer_tokens, record.error if is_fault else "")
    if record.is_ok:
        latencies = {
            "ttft": record.ttft,
            "ttfot": record.ttfot,
            "tpot": record.tpot,
            "e2e": record.e2e,
        }
        latencies["itl max"] = max(record.gaps, default=None)
        for latency, seconds in latencies.items():
            if seconds is not None:
                tell("METRIC", f"{latency}[{record.mode}]", seconds, record.num_answer_tokens)


@events.test_start.add_listener
def begin(environment: Any, **_: Any) -> None:
    """Create the run's state."""
    environment.stop_timeout = environment.stop_timeout or 60  # let the last requests end
    run = environment.run_state = Run(environment.parsed_options)
    if environment.parsed_options.metrics_url:
        run.page_before = scrape(environment.parsed_options.metrics_url)


@events.quitting.add_listener
def end(environment: Any, **_: Any) -> None:
    """Judge the run, write the report and set the exit status."""
    run: Run | None = getattr(environment, "run_state", None)
    if run is None:
        return
    options = environment.parsed_options
    gevent.joinall(list(run.in_flight), timeout=60)
    told = summary(run.records)
    peak = json.loads(Path(options.peak).read_text()) if options.peak else None
    violations = judge(told, read_slo(options.slo), peak) if options.slo else []
    if run.page_before is not None:
        after = scrape(options.metrics_url)
        told["server"] = compare(run.page_before, after, told, tolerance=options.time_tolerance)
        violations += [
            f"{row['mode']} {row['what']}: clients {row['client']}, server {row['server']}"
            for row in told["server"]["rows"]
            if not row["agrees"]
        ]
    told |= {"settings": vars(options), "violations": violations}
    if options.report:
        Path(options.report).write_text(json.dumps(told, indent=1, default=str))
    for line in told["unexpected"] + [f"SLO: {each}" for each in violations]:
        print(line)
    print(f"{told['all']['ok']} of {told['all']['requests']} answered, {told['statuses']}")
    environment.process_exit_code = 1 if violations else 0


def scrape(url: str) -> Any:
    """Read the sums of /metrics, after a pause in which the last sequences end."""
    gevent.sleep(0.5)
    status, text = Target(url=url).get("/metrics")
    assert status == 200, f"{url}/metrics answers {status}"
    return read_page(text)


class Client(User):
    """A locust user: one request after the other, or Poisson arrivals at a rate."""

    @task
    def go(self) -> None:
        """Send a request, or start one after an arrival interval."""
        run: Run = self.environment.run_state
        if run.arrivals:
            gevent.sleep(run.rng.expovariate(run.arrivals))
            run.arrive()
        else:
            run.ask()


class Shape(LoadTestShape):
    """The stages of --shape, or -u for -t."""

    def tick(self) -> tuple[int, float] | None:
        """Return the current users and the spawn rate per second; None at the end."""
        options = self.runner.environment.parsed_options
        stages = SHAPES.get(options.shape) or [(options.run_time or 60.0, options.num_users or 1)]
        for until, users in stages:
            if self.get_run_time() < until:
                return users, 100.0
        return None

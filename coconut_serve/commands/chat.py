"""`coconut-serve chat`: a conversation in the terminal, with modes, settings and live traces."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from coconut_serve.commands.connect import api_key, base_url
from coconut_serve.commands.conversation import Conversation
from coconut_serve.commands.screen import Screen
from coconut_serve.errors import StartupError
from coconut_serve.reasoning.registry import mode_names

DEFAULT_URL = "http://127.0.0.1:8000"
_QUOTES = '"""'


def add_parser(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        usage="%(prog)s [-h] [flags] [URL|MODEL] [-- flags of serve]",
        epilog="/help tells the commands. Without a terminal, all of stdin is one question: the "
        "answer goes to stdout, the rest to stderr.",
    )
    add = parser.add_argument
    about = f"server to ask, or a model, served meanwhile on a free port; default: {DEFAULT_URL}"
    add("target", nargs="?", default=DEFAULT_URL, metavar="URL|MODEL", help=about)
    about = "how to think; default: the model's own"
    add("--mode", choices=mode_names(), help=about)
    add("--system", default="", metavar="TEXT", help="system message")
    add("--trace", action="store_true", help="show each thinking step's likeliest tokens")
    about = "field of the requests, such as reasoning.steps=4 or max_tokens=64; may be repeated"
    add("--set", action="append", default=[], type=_setting, metavar="NAME=VALUE", help=about)
    add("--api-key", metavar="KEY", help="of the server; default: the first of COCONUT_API_KEY")


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, _value(value)


def _value(text: str) -> Any:
    """Read JSON, or text that is none; nothing and null are None."""
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves and return the exit status.

    Raises:
        StartupError: The server does not start or does not answer.
    """
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _leave)  # so that a server started here ends too
        signal.signal(signal.SIGHUP, _leave)
    is_terminal = sys.stdin.isatty()
    screen = Screen(sys.stdout, sys.stdout if is_terminal else sys.stderr, os.environ)
    try:
        with (
            base_url(args.target, args.more_flags, is_interactive=True) as url,
            openai.OpenAI(base_url=url, api_key=api_key(args.api_key), max_retries=0) as client,
        ):
            talk = _begin(args, client, screen)
            if not is_terminal:
                question = sys.stdin.read().strip()
                return 0 if not question or talk.ask(question) else 1
            _prepare_editing()
            converse(talk, input)
    except KeyboardInterrupt:  # while the model loads
        return 130
    return 0


def _leave(number: int, frame: object) -> None:
    del frame
    sys.exit(128 + number)


def _begin(args: argparse.Namespace, client: openai.OpenAI, screen: Screen) -> Conversation:
    """Find out which model answers."""
    try:
        model = client.models.list().data[0]
    except (openai.OpenAIError, IndexError) as error:
        told = f"{client.base_url}: {str(error).rstrip('.')}; start a server, or name a MODEL"
        raise StartupError(told, param="URL") from error
    talk = Conversation(
        client=client,
        screen=screen,
        model=model.id,
        modes=tuple((model.model_extra or {}).get("reasoning_modes", ())),
        system=args.system,
        shows_trace=args.trace,
    )
    for name, value in args.set:
        talk.set(name, value)
    if args.mode:
        set_mode(talk, args.mode)
    return talk


def _prepare_editing() -> None:
    """Give input() history, editing and completion of commands, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline

        def complete(text: str, number: int) -> str | None:
            return [*(name for name in COMMANDS if name.startswith(text)), None][number]

        readline.set_completer_delims(" ")
        readline.set_completer(complete)
        readline.parse_and_bind("tab: complete")


def converse(talk: Conversation, read: Callable[[str], str]) -> None:
    """Read messages and commands until /quit or Ctrl+D.

    Args:
        talk: The conversation.
        read: Like input(): takes the prompt, returns a line, raises EOFError at the end.
    """
    talk.screen.note(f"{talk.model}; /help tells the commands, Ctrl+D ends")
    while True:
        try:
            text = read_message(read)
        except EOFError:
            talk.screen.answer("\n")
            return
        except KeyboardInterrupt:
            talk.screen.answer("\n")
            continue
        if text == "/quit":
            return
        if text.startswith("/"):
            obey(talk, text)
        elif text:
            talk.ask(text)


def read_message(read: Callable[[str], str]) -> str:
    r"""Read a message: a line, lines that end with \, or lines between triple quotes."""
    line = read("> ")
    lines = []
    if line.lstrip().startswith(_QUOTES):
        line = line.lstrip().removeprefix(_QUOTES)
        while not line.rstrip().endswith(_QUOTES):
            lines.append(line)
            line = read(". ")
        return "\n".join([*lines, line.rstrip().removesuffix(_QUOTES)]).strip()
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = read(". ")
    return "\n".join([*lines, line]).strip()


def obey(talk: Conversation, text: str) -> None:
    """Run a command; what is wrong with it is told."""
    name, _, rest = text.partition(" ")
    if name not in COMMANDS:
        talk.screen.fault(f"{name} is no command; /help tells them")
        return
    try:
        COMMANDS[name][0](talk, rest.strip())
    except (ValueError, OSError) as error:
        talk.screen.fault(f"{name}: {error}")


def set_mode(talk: Conversation, mode: str) -> None:
    """Think in another mode from now on; without one, in the model's own."""
    if mode and talk.modes and mode not in talk.modes:
        raise ValueError(f"{mode!r} is not one of {', '.join(talk.modes)}")
    talk.set("reasoning_mode", mode or None)


def _set_mode(talk: Conversation, text: str) -> None:
    set_mode(talk, text)
    talk.screen.note(f"mode: {text or 'as the model has it'}")


def _set(talk: Conversation, text: str) -> None:
    name, _, value = text.partition(" ")
    if name:
        talk.set(name, _value(value.strip()))
    talk.screen.note(f"settings: {json.dumps(talk.settings)}")


def _set_steps(talk: Conversation, text: str) -> None:
    talk.set("reasoning.steps", int(text) if text else None)


def _set_system(talk: Conversation, text: str) -> None:
    talk.system = text


def _toggle_trace(talk: Conversation, text: str) -> None:
    del text
    talk.shows_trace = not talk.shows_trace
    talk.screen.note(f"traces are {'on' if talk.shows_trace else 'off'}")


def _clear(talk: Conversation, text: str) -> None:
    del text
    talk.clear()


def _retry(talk: Conversation, text: str) -> None:
    del text
    talk.retry()


def _save(talk: Conversation, text: str) -> None:
    told = {"model": talk.model, "settings": talk.settings, "messages": talk.messages}
    with Path(text).expanduser().open("x", encoding="utf-8") as file:
        json.dump(told, file, indent=2, ensure_ascii=False)


def _help(talk: Conversation, text: str) -> None:
    del text
    for name, (_, argument, about) in COMMANDS.items():
        talk.screen.note(f"{name + ' ' + argument:20}{about}")
    talk.screen.note('A line that ends with \\ goes on in the next; so does all between """.')


COMMANDS: dict[str, tuple[Callable[[Conversation, str], None], str, str]] = {
    "/mode": (_set_mode, "MODE", "how to think; nothing: the model's own way"),
    "/steps": (_set_steps, "N", "how many thinking steps; nothing: the model's own number"),
    "/set": (_set, "NAME VALUE", "a field of the requests: /set reasoning.halt.entropy_below 0.5"),
    "/trace": (_toggle_trace, "", "show each step's entropy and likeliest tokens, or no longer"),
    "/system": (_set_system, "TEXT", "the system message; nothing: none"),
    "/clear": (_clear, "", "forget what was said"),
    "/save": (_save, "FILE", "write the conversation to a new file, as JSON"),
    "/retry": (_retry, "", "ask the last question again"),
    "/help": (_help, "", "this list"),
    "/quit": (lambda *_: None, "", "leave; so does Ctrl+D. Ctrl+C stops an answer"),
}

"""Entry point of `coconut-serve`; `healthcheck` runs before anything heavy is imported."""

import sys


def main() -> int:
    """Run a command and return its exit status."""
    if sys.argv[1:2] == ["healthcheck"]:
        from coconut_serve.commands.healthcheck import main as check

        return check(sys.argv[1:])
    from coconut_serve.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())

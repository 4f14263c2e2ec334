"""A dataclass of options as the command line of a command."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, asdict
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
from rich.console import Console

from ..runs.console import reporting_errors, run_app
from ..runs.ranks import ranks
from ..runs.stated import stated

T = TypeVar("T")
_TRACEBACK = "traceback"
_typed: ContextVar[set[str]] = ContextVar("typed")


def add_command(
    app: typer.Typer,
    options: type[T],
    run: Callable[[T, Console], None],
    *,
    name: str | None = None,
    shares: bool = False,
) -> None:
    """Add a command to ``app`` whose options are the fields of a dataclass.

    Errors of ``run`` become one line; ``--traceback`` shows where they came from.

    Args:
        app: of the command.
        options: a dataclass whose fields are made by `stated.option` or `stated.argument`; its
            docstring is not shown.
        run: called with the options and a console on stderr; its docstring is the help.
        name: of a command of several; None for an app of one.
        shares: whether processes that were launched together divide the work; of any other command
            the first does all.
    """

    def command(context: typer.Context, **values: Any) -> None:
        console = Console(stderr=True)
        typed = {name for name in values if _was_typed(context, name)}
        here = ranks()
        # of processes that were launched together one speaks
        console.quiet = not here.is_main
        with reporting_errors(console, values.pop(_TRACEBACK)), _typing(typed):
            asked = options(**values)
            if here.is_launched and shares:
                here.agree(f"options of {name}", _in_common(asked))
            if here.is_main or shares:
                run(asked, console)

    command.__doc__ = run.__doc__
    command.__signature__ = _signature(options)  # type: ignore[attr-defined]
    app.command(name)(command)


def make_app(
    name: str, options: type[T], run: Callable[[T, Console], None], *, shares: bool = False
) -> tuple[typer.Typer, Callable[..., None]]:
    """The app of a command, and the entry point of ``python -m name``; arguments as above."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    add_command(app, options, run, shares=shares)

    def main(arguments: Sequence[str] | None = None) -> None:
        run_app(app, name, arguments)

    main.__doc__ = f"Entry point of ``python -m {name}``."
    return app, main


def typed_options() -> set[str]:
    """Names of the options that were typed, inside the ``run`` of a command."""
    return _typed.get()


def _in_common(asked: Any) -> dict[str, Any]:
    """What all processes of a launch must have in common: options, and the code."""
    from ..runs.code import describe_code

    options = {name: value for name, value in asdict(asked).items() if name != "device"}
    return json.loads(json.dumps({"options": options, **describe_code()}, default=str))


@contextmanager
def _typing(names: set[str]) -> Iterator[None]:
    token = _typed.set(names)
    try:
        yield
    finally:
        _typed.reset(token)


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _signature(options: type[Any]) -> inspect.Signature:
    hints = get_type_hints(options)
    parameters = []
    for field in stated(options):
        about = field.metadata
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        if about.get("is_argument"):
            how: Any = typer.Argument(help=about["help"])
        else:
            # a switch that is off has no way to be turned off
            alone = () if field.default is not False else (f"--{field.name.replace('_', '-')}",)
            how = typer.Option(
                *(about["flags"] or alone),
                help=about["help"],
                rich_help_panel=about["panel"] or None,
            )
        parameters.append(_parameter(field.name, hints[field.name], how, default))
    show = typer.Option("--traceback", help="Show where an error came from.")
    context = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    return inspect.Signature([context, *parameters, _parameter(_TRACEBACK, bool, show, False)])


def _parameter(name: str, kind: Any, how: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, how]
    )

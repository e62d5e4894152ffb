"""Command-line options out of the dataclasses of settings, and errors in one line."""

import argparse
import dataclasses
import types
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

METAVARS = {int: "N", float: "X", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """argparse without the usage text before an error, and without abbreviated options."""

    def __init__(self, **options: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def printable(text: str) -> str:
    """The text on one line, with control characters escaped: no file can steer a terminal."""
    line = " ".join(text.split())
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)


def add_settings(group: Any, settings: type, *, given_only: bool = False) -> None:
    """One option per field of a dataclass whose annotations are `Annotated[type, explanation]`.

    With `given_only` an option that is not given is not in the result, and no default is shown.

    The type is int, float, str, Path, a Literal of names, bool (--name and --no-name), or one of
    them `| None`, which is the default then and said in the explanation.
    """
    for name, annotation in get_type_hints(settings, include_extras=True).items():
        kind, explanation = get_args(annotation)
        default = getattr(settings, name)
        shown = "" if default is None or given_only else f" [{_shown(default)}]"
        words = (explanation + shown).replace("%", "%%")  # argparse fills in % itself
        default = argparse.SUPPRESS if given_only else default
        group.add_argument(
            "--" + name.replace("_", "-"), default=default, help=words, **_form(kind)
        )


def _form(kind: Any) -> dict[str, Any]:
    if get_origin(kind) is types.UnionType:
        [kind] = (each for each in get_args(kind) if each is not types.NoneType)
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": kind, "metavar": METAVARS.get(kind, "FOLDER")}


def _shown(default: Any) -> str:
    return ("no", "yes")[default] if isinstance(default, bool) else str(default)


def settings(arguments: argparse.Namespace, kind: type[T]) -> T:
    """The dataclass with the values of its options; a refusal ends the command in one line."""
    parser: Parser = arguments.parser
    names = [each.name for each in dataclasses.fields(cast(Any, kind))]
    try:
        return kind(**{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        parser.error(as_options(str(error), names))


def as_options(message: str, names: list[str]) -> str:
    """The message with the settings written as on the command line."""
    for name in names:
        if message.startswith(name + " "):
            return "--" + name.replace("_", "-") + message[len(name) :]
    return message


def stored(values: object, kind: type[T]) -> T:
    """The dataclass with these values, as they were read from a file.

    A setting that is not there is newer than the file, and had its default value then.

    Raises:
        ValueError: a setting is unknown, of another type, or refused by the dataclass.
    """
    hints = get_type_hints(kind)
    if not isinstance(values, dict):
        raise ValueError("it has no settings")
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(f"its settings are not this version's: {unknown[:3]}")
    for name, value in values.items():
        options = get_args(hints[name]) or (hints[name],)
        fits = value in options or type(value) in options
        fits = fits or (type(value) is int and float in options)
        demand(fits, f"{name} is of another type", repr(value))
    return kind(**values)


def demand(condition: bool, message: str, value: object) -> None:
    """A ValueError that says what must hold, and what came, unless it holds."""
    if not condition:
        raise ValueError(f"{message}; got {value}")


def duration(text: str) -> float:
    """Seconds, zero or more."""
    if not float(text) >= 0:
        raise ValueError
    return float(text)

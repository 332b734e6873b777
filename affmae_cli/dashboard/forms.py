"""Forms for commands, generated from their Typer functions, so that a new option appears without a line here."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import typer.models
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import Screen
from textual.widgets import Checkbox, Footer, Input, Label, Select, Static

_LEFT_OUT = ("json", "quiet", "tensorboard", "no_tui", "verbose")  # for scripts and other viewers, not for a form


@dataclass(frozen=True)
class Field:
    """One parameter of a command.

    option: "--out", or "" for an argument. kind: a switch, one of `choices`, or text. many: takes several values,
    separated by spaces and quoted as for a shell.
    """

    name: str
    option: str
    help: str
    kind: Literal["switch", "choice", "text"]
    default: str = ""
    choices: tuple[str, ...] = ()
    many: bool = False
    required: bool = False
    group: str = ""

    @property
    def title(self) -> str:
        """What stands before the field."""
        return self.option.removeprefix("--") if self.option else self.name.upper()


def fields_of(command: Callable[..., Any]) -> list[Field]:
    """The parameters of a Typer command, arguments first, those of a help panel last."""
    found = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind, info = _annotated(hints.get(name))
        if (
            not isinstance(info, (typer.models.OptionInfo, typer.models.ArgumentInfo))
            or info.hidden
            or name in _LEFT_OUT
        ):
            continue
        option = isinstance(info, typer.models.OptionInfo)
        # In Annotated, Typer takes the first name for a default until it builds the command.
        flags = [flag for flag in (info.default, *(info.param_decls or ())) if str(flag).startswith("--")]
        plain, many = _plain(kind)
        missing = parameter.default in (inspect.Parameter.empty, None, ...)
        found.append(
            Field(
                name=name,
                option=str(flags[0]).split("/")[0] if flags else f"--{name.replace('_', '-')}" if option else "",
                help=" ".join((info.help or "").split()),
                kind="switch" if plain is bool else "choice" if get_origin(plain) is Literal else "text",
                default="" if missing else str(parameter.default),
                choices=tuple(map(str, get_args(plain))) if get_origin(plain) is Literal else (),
                many=many,
                required=parameter.default in (inspect.Parameter.empty, ...),
                group=info.rich_help_panel if isinstance(info.rich_help_panel, str) else "",
            )
        )
    return sorted(found, key=lambda field: (bool(field.group), bool(field.option)))


def words_of(fields: Sequence[Field], values: Mapping[str, str | bool]) -> list[str]:
    """The command line for what was filled in; what equals the default is left out.

    Raises:
        ValueError: a quotation in a field is not closed.
    """
    options: list[str] = []
    arguments: list[str] = []
    for field in fields:
        value = values.get(field.name, "")
        if isinstance(value, bool):
            options += [field.option] if value and field.default != "True" else []
            continue
        if not value or value == field.default:
            continue
        parts = shlex.split(value) if field.many else [value]
        if field.option:
            for part in parts:
                options += [field.option, part]
        else:
            arguments += parts
    return (
        [*arguments, *options] if not any(word.startswith("-") for word in arguments) else [*options, "--", *arguments]
    )


def _annotated(hint: Any) -> tuple[Any, Any]:
    """The type and Typer's description in it."""
    if get_origin(hint) is Annotated:
        kind, *extras = get_args(hint)
        return kind, next((extra for extra in extras if isinstance(extra, typer.models.ParameterInfo)), None)
    return hint, None


def _plain(kind: Any) -> tuple[Any, bool]:
    """A type without None and list, and whether it was a list."""
    if get_origin(kind) in (Union, UnionType):
        kind = next((part for part in get_args(kind) if part is not NoneType), str)
    if get_origin(kind) is list:
        return (get_args(kind) or (str,))[0], True
    return kind, False


class FormScreen(Screen[list[str] | None]):
    """A form for one command; returns the words of the command line, None when it was left.

    Args:
        name: of the command.
        command: its function.
        values: what is filled in at first, by parameter.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+r", "run", "Run", priority=True),
        Binding("escape", "back", "Back"),
        Binding("down", "app.focus_next", "Next", show=False),
        Binding("up", "app.focus_previous", "Previous", show=False),
    ]

    def __init__(self, name: str, command: Callable[..., Any], values: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.command_name, self.fields = name, fields_of(command)
        self._about = " ".join((inspect.getdoc(command) or "").partition("\n\n")[0].split())
        self._filled = dict(values or {})

    def compose(self) -> ComposeResult:
        yield Static(Text.assemble((f"affmae {self.command_name}", "bold"), f"   {self._about}"), classes="form-about")
        with VerticalScroll(classes="form", can_focus=False):
            group = ""
            for field in self.fields:
                if field.group != group:
                    group = field.group
                    yield Label(group, classes="form-group", markup=False)
                with Horizontal(classes="form-row"):
                    yield Label(field.title + (" *" if field.required else ""), classes="form-name", markup=False)
                    yield self._widget(field)
                    yield Label(field.help, classes="form-help", markup=False)
        yield Static("", id="form-line", markup=False)
        yield Footer(show_command_palette=False)

    def _widget(self, field: Field) -> Input | Checkbox | Select[str]:
        value = self._filled.get(field.name, "")
        if field.kind == "switch":
            return Checkbox("", value=field.default == "True", compact=True, id=f"field-{field.name}")
        if field.kind == "choice":
            chosen = value or field.default
            options = [(choice, choice) for choice in field.choices]
            if chosen in field.choices:
                return Select(options, value=chosen, allow_blank=False, compact=True, id=f"field-{field.name}")
            return Select(options, prompt="default", compact=True, id=f"field-{field.name}")
        return Input(value, placeholder=field.default, compact=True, id=f"field-{field.name}")

    def on_mount(self) -> None:
        self.query("Input, Checkbox, Select").first().focus()
        self._show_line()

    def values(self) -> dict[str, str | bool]:
        """What is filled in."""
        found: dict[str, str | bool] = {}
        for field in self.fields:
            widget = self.query_one(f"#field-{field.name}")
            if isinstance(widget, (Input, Checkbox)):
                found[field.name] = widget.value
            elif isinstance(widget, Select):
                found[field.name] = str(widget.value) if widget.value in field.choices else ""
        return found

    @on(Input.Changed)
    @on(Checkbox.Changed)
    @on(Select.Changed)
    def _show_line(self) -> None:
        text = Text("$ ", "bold")
        try:
            text.append(shlex.join(["affmae", self.command_name, *words_of(self.fields, self.values())]))
        except ValueError as error:
            text.append(f"{error}", "red")
        missing = self._missing()
        if missing:
            text.append(f"   fill in: {', '.join(missing)}", "dim")
        self.query_one("#form-line", Static).update(text)

    def _missing(self) -> list[str]:
        values = self.values()
        return [field.title for field in self.fields if field.required and not values.get(field.name)]

    def action_run(self) -> None:
        try:
            words = words_of(self.fields, self.values())
        except ValueError as error:
            self.notify(str(error), severity="error", markup=False)
            return
        if missing := self._missing():
            self.notify(f"fill in: {', '.join(missing)}", severity="warning", markup=False)
            return
        self.dismiss([self.command_name, *words])

    def action_back(self) -> None:
        self.dismiss(None)

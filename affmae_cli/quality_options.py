"""Options of `affmae bench` that belong to `--quality`, as annotated types; `quality_plan` reads them."""

from __future__ import annotations

from typing import Annotated

import typer

_PANEL = "Quality on your own data"

QualityOption = Annotated[
    bool,
    typer.Option(
        "--quality",
        help="Pretrain both for equal time on your images, finetune both and from scratch, compare the scores.",
        rich_help_panel=_PANEL,
    ),
]
ImagesOption = Annotated[
    list[str] | None, typer.Option("--images", metavar="PATH", help="Labelled images.", rich_help_panel=_PANEL)
]
LabelsOption = Annotated[
    list[str] | None,
    typer.Option("--labels", metavar="PATH", help="Their labels, as for finetune.", rich_help_panel=_PANEL),
]
UnlabelledOption = Annotated[
    list[str] | None,
    typer.Option("--unlabelled", metavar="PATH", help="More images, for pretraining alone.", rich_help_panel=_PANEL),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="TIME", help="Of one pretraining: 90s, 10m, 2h. Default: 10m.", rich_help_panel=_PANEL
    ),
]
FinetuneBudgetOption = Annotated[
    str | None,
    typer.Option(
        "--finetune-budget",
        metavar="TIME",
        help="Of one finetuning of the slower model; both take its steps. Default: a quarter of --budget.",
        rich_help_panel=_PANEL,
    ),
]
SeedsOption = Annotated[
    int | None,
    typer.Option("--seeds", min=1, help="Times that everything is repeated. Default: 3.", rich_help_panel=_PANEL),
]
FractionsOption = Annotated[
    str | None,
    typer.Option(
        "--label-fractions",
        metavar="LIST",
        help="Shares of the labels to finetune on, besides all. Default: 0.1,0.25.",
        rich_help_panel=_PANEL,
    ),
]

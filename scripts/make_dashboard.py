"""Make the project's W&B workspace, as code: what a study is looked at with, in a browser.

    python -m scripts.make_dashboard --entity my-team --project stateful_gpt
    python -m scripts.make_dashboard --entity my-team --study mine      # only the runs of one study
    python -m scripts.make_dashboard --print                            # what would be saved

Needs ``pip install -e '.[dashboard]' -c constraints.txt`` and, to save it, ``wandb login``.
"""

import argparse
import sys
from typing import Any

from pydantic_core import to_json

from experiments.converge.settings import TrackingSettings
from experiments.settings import ConfigError
from experiments.tracking.tracker import LOGIN, has_login
from scripts._command import Failure, command

NAME = "How estimates settle"
COLUMNS = (
    *("run:displayName", "run:group", "run:state", "config:feedback.value.kind"),
    *("config:feedback.value.strength", "config:recompute.value.iterations", "summary:outcome"),
    *("summary:iterations_to_tolerance", "summary:nll", "summary:nll_plain", "summary:kl_effect"),
    *("summary:rate", "summary:lyapunov"),
)
CURVES = {  # measure: title, unit
    "oracle_error_max": ("Distance to where they end", "nats"),
    "step_max": ("Largest change since the last pass", "nats"),
    "kl_effect": ("Effect on the predictions", "KL to the plain model, nats"),
    "nll": ("Surprise", "nats per token"),
    "settled_prefix": ("Settled tokens from the start", "tokens"),
}
LOGARITHMIC = ("oracle_error_max", "step_max")
RESPONSES = {
    "iterations_to_tolerance": "Passes until settled",
    "rate": "Contraction per pass",
    "lyapunov": "Lyapunov exponent",
    "nll": "nll (nats per token)",
    "kl_effect": "Effect (KL to the plain model, nats)",
}


def workspace(*, entity: str, project: str, study: str | None = None) -> Any:
    """The workspace, not yet saved: curves by strength, settled front, response, tokens, runs."""
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as panels

    strength = panels.Config("feedback.strength")
    *curves, front = [
        panels.LinePlot(
            title=title,
            x="iteration",
            y=[measure],
            title_x="iteration (pass)",
            title_y=unit,
            log_y=measure in LOGARITHMIC,
            groupby=strength,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            layout=panels.Layout(w=12, h=8),
        )
        for measure, (title, unit) in CURVES.items()
    ]
    small = panels.Layout(w=8, h=8)
    responses = [
        panels.ScatterPlot(title=title, x=strength, y=panels.SummaryMetric(measure), layout=small)
        for measure, title in RESPONSES.items()
    ]
    half = panels.Layout(w=12, h=10)
    page = panels.MediaBrowser(
        title="Every token, every pass", media_keys=["page"], num_columns=2, layout=half
    )
    tokens = panels.CustomChart(
        query={"summaryTable": {"tableKey": "token_trajectories_table"}},
        chart_name="wandb/lineseries/v0",
        chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        chart_strings={"title": "log_prob of the tokens that move most", "xname": "iteration"},
        layout=half,
    )
    sections = {
        "How the estimates settle, by strength": curves,
        "The settled front": [front],
        "Response to strength": responses,
        "Tokens": [page, tokens],
        "Table of runs": [panels.RunComparer(diff_only="split", layout=panels.Layout(w=24, h=12))],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME if study is None else f"{NAME}: {study}",
        sections=[
            ws.Section(name=name, panels=own, is_open=True) for name, own in sections.items()
        ],
        settings=ws.WorkspaceSettings(x_axis="iteration", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters="" if study is None else expr.And(expr.Metric("Group") == study),
            order=[expr.Ordering(expr.Config("feedback.strength"), ascending=True)],
            pinned_columns=list(COLUMNS),
        ),
    )


@command("make_dashboard", ConfigError, prefix="error")
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--entity", default="", help="W&B user or team")
    parser.add_argument("--project", default=TrackingSettings().project, help="W&B project")
    parser.add_argument("--study", help="show only the runs of this study")
    parser.add_argument("--print", action="store_true", help="print it as JSON, save nothing")
    told = parser.parse_args()
    if not (told.entity or told.print):
        raise Failure("--entity must name the W&B user or team whose project it is")
    try:
        made = workspace(entity=told.entity, project=told.project, study=told.study)
    except ImportError:
        helps = "pip install -e '.[dashboard]' -c constraints.txt"
        raise Failure(f"a dashboard needs wandb-workspaces: {helps}") from None
    if told.print:
        print(to_json(made, indent=2, exclude_none=True).decode())
        return
    if not has_login():
        raise Failure(f"the dashboard cannot be saved: {LOGIN}")
    try:
        made.save()
    except Exception as error:  # W&B raises many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Failure(f"W&B does not save the dashboard of {told.project}: {reason}") from error
    print(made.url)


if __name__ == "__main__":
    sys.exit(main())

"""Make the project's W&B workspace, as code: what a study is looked at with, in a browser.

    python -m scripts.make_dashboard --entity my-team --project stateful_gpt
    python -m scripts.make_dashboard --entity my-team --study mine      # only the runs of one study
    python -m scripts.make_dashboard --print                            # what would be saved

Needs ``pip install 'stateful_gpt[dashboard]'`` and, to save it, ``wandb login``.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from experiments.converge.settings import TrackingSettings
from experiments.tracking.tracker import LOGIN, has_login

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "How estimates settle"
COLUMNS = (
    *("run:group", "run:state", "config:feedback.value.kind", "config:feedback.value.strength"),
    *("config:recompute.value.iterations", "summary:outcome", "summary:iterations_to_tolerance"),
    *("summary:nll", "summary:nll_plain", "summary:kl_effect", "summary:rate", "summary:lyapunov"),
)


def workspace(*, entity: str, project: str, study: str | None = None) -> "Workspace":
    """The workspace, not yet saved: curves by strength, settled front, response, heat map, runs."""
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as panels

    strength = panels.Config("feedback.strength")

    def curve(measure: str, title: str, unit: str, *, log: bool = False) -> panels.LinePlot:
        return panels.LinePlot(
            title=title,
            x="iteration",
            y=[measure],
            title_x="iteration (pass)",
            title_y=unit,
            log_y=log,
            groupby=strength,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            layout=panels.Layout(w=12, h=8),
        )

    def response(measure: str, title: str) -> panels.ScatterPlot:
        return panels.ScatterPlot(
            title=title,
            x=strength,
            y=panels.SummaryMetric(measure),
            layout=panels.Layout(w=8, h=8),
        )

    tokens = panels.CustomChart(
        query={"summaryTable": {"tableKey": "token_trajectories_table"}},
        chart_name="wandb/lineseries/v0",
        chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        chart_strings={"title": "log_prob of the tokens that move most", "xname": "iteration"},
        layout=panels.Layout(w=12, h=10),
    )
    differences = panels.RunComparer(diff_only="split", layout=panels.Layout(w=24, h=12))
    page = panels.MediaBrowser(
        title="Every token, every pass",
        media_keys=["page"],
        num_columns=2,
        layout=panels.Layout(w=12, h=10),
    )
    sections = [
        ("How the estimates settle, by strength", [
            curve("oracle_error_max", "Distance to where they end", "nats", log=True),
            curve("step_max", "Largest change since the last pass", "nats", log=True),
            curve("kl_effect", "Effect on the predictions", "KL to the plain model, nats"),
            curve("nll", "Surprise", "nats per token"),
        ]),
        ("The settled front", [curve("settled_prefix", "Settled tokens from the start", "tokens")]),
        ("Response to strength", [
            response("iterations_to_tolerance", "Passes until settled"),
            response("rate", "Contraction per pass"),
            response("lyapunov", "Lyapunov exponent"),
            response("nll", "nll (nats per token)"),
            response("kl_effect", "Effect (KL to the plain model, nats)"),
        ]),
        ("Tokens", [page, tokens]),
        ("Table of runs", [differences]),
    ]  # fmt: skip
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME if study is None else f"{NAME}: {study}",
        sections=[ws.Section(name=name, panels=own, is_open=True) for name, own in sections],
        settings=ws.WorkspaceSettings(x_axis="iteration", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters="" if study is None else expr.And(expr.Metric("Group") == study),
            order=[expr.Ordering(expr.Config("feedback.strength"), ascending=True)],
            pinned_columns=["run:displayName", *COLUMNS],
        ),
    )


def specification(made: "Workspace") -> dict[str, object]:
    """What W&B is sent of a workspace, as JSON has it."""
    view = made._to_model()  # the package has no public way to see it without saving it
    content: dict[str, object] = json.loads(
        view.spec.model_dump_json(by_alias=True, exclude_none=True)
    )
    return content


def main() -> int:
    defaults = TrackingSettings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--entity", help="W&B user or team")
    parser.add_argument("--project", default=defaults.project, help="W&B project")
    parser.add_argument("--study", help="show only the runs of this study")
    parser.add_argument("--print", action="store_true", help="print it as JSON, save nothing")
    arguments = parser.parse_args()
    if arguments.entity is None and not arguments.print:
        return _say("--entity must name the W&B user or team whose project it is")
    try:
        made = workspace(
            entity=arguments.entity or "", project=arguments.project, study=arguments.study
        )
    except ImportError:
        return _say("a dashboard needs wandb-workspaces: pip install 'stateful_gpt[dashboard]'")
    if arguments.print:
        print(json.dumps(specification(made), indent=2))
        return 0
    if not has_login():
        return _say(f"the dashboard cannot be saved: {LOGIN}")
    try:
        made.save()
    except Exception as error:  # W&B raises many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return _say(f"W&B does not save the dashboard of {arguments.project}: {reason}")
    print(made.url)
    return 0


def _say(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

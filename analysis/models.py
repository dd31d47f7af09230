"""Trained models as tidy frames: loss or accuracy by the depth of the recurrence.

Serves models of `experiments.train` and contestants of state tracking alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from analysis.labels import with_labels
from analysis.read.model_folder import RATES
from analysis.read.saved import SavedModel

QUESTION = ["task", "target", "trained_level", "tested_level"]


@dataclass(frozen=True)
class Models:
    """Models of one kind.

    Attributes:
        rows: index model; run_id, what was set (by dotted key) and what is known of the whole, and
            label, variant and group (see analysis.labels).
        curves: model, depth, and nll and kl (nats), or level and accuracy.
    """

    rows: pd.DataFrame
    curves: pd.DataFrame

    def only(self, run_ids: Sequence[str]) -> Models:
        """The chosen ones; an empty choice means all."""
        return self.where(self.rows["run_id"].isin(run_ids)) if run_ids else self

    def where(self, chosen: pd.Series) -> Models:
        rows = self.rows[chosen]
        return replace(self, rows=rows, curves=self.curves[self.curves["model"].isin(rows.index)])


def models_of(saved: Sequence[SavedModel], kind: str) -> Models:
    """The models of one kind, plain ones first."""
    saved = [one for one in saved if one.kind == kind]
    if not saved:
        return Models(pd.DataFrame(columns=["run_id"]), pd.DataFrame(columns=["model", "depth"]))
    rows = pd.DataFrame(
        [{"run_id": one.run_id, "place": one.place, **one.settings, **one.facts} for one in saved],
        dtype=object,
    )
    settings = list(dict.fromkeys(key for one in saved for key in one.settings))
    # a question is a panel of its own, and of several rates the best stand for a contestant
    settings = [key for key in settings if not key.startswith("task.") and key not in RATES] + (
        [] if kind == "state_tracking" else [key for key in RATES if key in settings]
    )
    if kind == "state_tracking":
        settings.insert(0, "stateful")
    rows = with_labels(rows, settings)
    rows.index.name = "model"
    curves = {one.place: one.curve for one in saved}
    parts = [curves[place].assign(model=model) for model, place in enumerate(rows["place"])]
    return Models(rows, pd.concat(parts, ignore_index=True))


def trained(models: Models) -> pd.DataFrame:
    """Index model; the losses (nats/token) that tell a training, at the depths that matter.

    first (one pass), second, last (the last trained pass), beyond (one more), generating (at the
    depth that text is generated at). Missing where there is no such depth.
    """
    nll = models.curves.pivot(index="model", columns="depth", values="nll")
    depth = pd.to_numeric(models.rows["trained_depth"])
    at = models.curves.assign(trained=models.curves["model"].map(depth)).set_index("model")
    full = pd.to_numeric(models.rows["nll_full"])
    second = nll[1] if 1 in nll else pd.Series(dtype=float)
    return pd.DataFrame(
        {
            "first": nll[0],
            "second": second,
            "last": at["nll"][at["depth"] == at["trained"]],
            "beyond": at["nll"][at["depth"] == at["trained"] + 1],
            "generating": full.fillna(nll[0]),
        },
        index=models.rows.index,
    )


def at_full_depth(contests: Models) -> pd.DataFrame:
    """(model, level) accuracy at the largest depth there is."""
    curves = contests.curves
    last = curves[curves["depth"] == curves.groupby("model")["depth"].transform("max")]
    return last.pivot(index="model", columns="level", values="accuracy")


def at_best_rates(contests: Models) -> Models:
    """Of each contestant's models on a question, those at the learning rates that did best.

    Best is the largest mean accuracy at the trained level; no level beyond it has a say.
    """
    rows = contests.rows
    accuracy = at_full_depth(contests)
    trained_level = zip(rows.index, rows["trained_level"], strict=True)
    rates = [name for name in RATES if name in rows]
    scored = rows.assign(
        score=[float(str(accuracy.at[model, level])) for model, level in trained_level]
    )
    question = [*QUESTION, "group"]
    mean = scored.groupby([*question, *rates], dropna=False)["score"].transform("mean")
    return contests.where(mean == mean.groupby([rows[name] for name in question]).transform("max"))

"""Trained models as tidy frames: loss or accuracy by the depth of the recurrence.

Serves models of `experiments.train` and contestants of state tracking alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

    def where(self, chosen: pd.Series) -> "Models":
        rows = self.rows[chosen]
        return Models(rows, self.curves[self.curves["model"].isin(rows.index)])


def models_of(saved: Sequence[SavedModel], kind: str) -> Models:
    """The models of one kind, plain ones first."""
    saved = [one for one in saved if one.kind == kind]
    if not saved:
        return Models(pd.DataFrame(columns=["run_id"]), pd.DataFrame(columns=["model", "depth"]))
    contest = kind == "state_tracking"
    rows = pd.DataFrame(
        [{"run_id": one.run_id, **one.settings, **one.facts, "curve": one.curve} for one in saved],
        dtype=object,
    )
    settings = list(dict.fromkeys(key for one in saved for key in one.settings))
    if contest:  # a question is a panel of its own, and the best rates stand for a contestant
        own = [key for key in settings if not key.startswith("task.") and key not in RATES]
        settings = ["stateful", *own]
    else:  # of early versions, how long its tokens are is all that tells a corpus from another
        rows["texts"] = rows["characters_per_token"]
    rows = with_labels(rows, settings).rename_axis("model")
    parts = [curve.assign(model=model) for model, curve in rows.pop("curve").items()]
    return Models(rows, pd.concat(parts, ignore_index=True))


def setting_name(model: pd.Series) -> str:
    """What a model is called beside those of other settings; stateful or plain if it is alone."""
    return str(model["variant"]) or ("stateful" if model["stateful"] else "plain")


def trained(models: Models) -> pd.DataFrame:
    """The rows with the losses (nats/token) that tell a training, at the depths that matter.

    first (one pass), second, last (the last trained pass), beyond (one more), generating (at the
    depth that text is generated at), best (the mean of the last over the seeds of a setting).
    Missing where there is no such depth. A training that was made twice has one row.
    """
    rows = models.rows
    nll = models.curves.set_index(["model", "depth"])["nll"]
    depth = pd.to_numeric(rows["trained_depth"])
    depths = pd.DataFrame({"first": 0, "second": 1, "last": depth, "beyond": depth + 1})
    for name, column in depths.items():
        places = pd.MultiIndex.from_arrays([rows.index, column])
        rows = rows.assign(**{str(name): nll.reindex(places).to_numpy()})
    rows["generating"] = pd.to_numeric(rows["nll_full"]).fillna(rows["first"])
    same = [*rows.columns.intersection(["group", "seed"]), *depths, "generating"]
    rows = rows.drop_duplicates(same)  # one training under two names is no second seed
    return rows.assign(best=rows.groupby("group")["generating"].transform("mean"))


def at_full_depth(contests: Models) -> pd.DataFrame:
    """(model, level) accuracy at the largest depth there is."""
    curves = contests.curves
    last = curves[curves["depth"] == curves.groupby("model")["depth"].transform("max")]
    return last.pivot(index="model", columns="level", values="accuracy")


def at_best_rates(contests: Models) -> Models:
    """Of each contestant's models on a question, those at the learning rates that did best.

    Best is the largest mean accuracy at the trained level, at the lowest rates of several; no level
    beyond it has a say. A contest that was made twice has one row.
    """
    rows, accuracy = contests.rows, at_full_depth(contests)
    rates = [name for name in RATES if name in rows]
    contestant = [*QUESTION, "group"]
    rows = rows[~rows.reindex(columns=[*contestant, *rates, "seed"]).join(accuracy).duplicated()]
    rows = rows.assign(score=accuracy.stack().reindex([*rows["trained_level"].items()]).to_numpy())
    means = rows.groupby([*contestant, *rates], dropna=False)["score"].mean().reset_index()
    # sorted by their rates
    best = means.sort_values("score", ascending=False, kind="stable").drop_duplicates(contestant)
    kept = rows.reset_index().merge(best[[*contestant, *rates]])["model"]
    return contests.where(contests.rows.index.to_series().isin(kept))

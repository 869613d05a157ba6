"""The design of the study: its cells, and the contrasts that were fixed before the runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A way to train the student.

    Attributes:
        keep_ratio: share of the rows; None for all, which the JSON calls 1.
        strategy: how they are chosen.
        metric: what they are ranked by; None where no difficulty is looked at.
        reshaping: whether the teacher's logits are reshaped by class.
        epochs_share: of the study's epochs.
        is_cached: whether the teacher's logits on recurring views are kept and taken again.
        settings: further settings of the recipe.
    """

    keep_ratio: float | None = None
    strategy: str = "medium"
    metric: str | None = None
    reshaping: bool = False
    epochs_share: float = 1.0
    is_cached: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_scores(self) -> bool:
        """Whether a pass of the teacher must come before."""
        return self.metric is not None or self.reshaping


VARIANTS = {
    "full": Variant(),
    "full@E/2": Variant(epochs_share=0.5),
    # Reshaping takes the class std from a subset, also where that is all rows.
    "full+reshape": Variant(1.0, "random", reshaping=True),
    "full+cache": Variant(is_cached=True),
    "random50": Variant(0.5, "random"),
    "medium50-centroid": Variant(0.5, "medium", "centroid"),
    "medium50-loss": Variant(0.5, "medium", "loss"),
    "random50+reshape": Variant(0.5, "random", reshaping=True),
    "medium50-centroid+reshape": Variant(0.5, "medium", "centroid", reshaping=True),
    "medium50-loss+reshape": Variant(0.5, "medium", "loss", reshaping=True),
    "medium50-loss+reshape+cache": Variant(0.5, "medium", "loss", reshaping=True, is_cached=True),
    "random70": Variant(0.7, "random"),
    "medium70-centroid": Variant(0.7, "medium", "centroid"),
    "random30": Variant(0.3, "random"),
    "random30+reshape": Variant(0.3, "random", reshaping=True),
    "medium30-loss+reshape": Variant(0.3, "medium", "loss", reshaping=True),
    "full@3E/10": Variant(epochs_share=0.3),
    "hard50-loss": Variant(0.5, "hard", "loss"),
    "hard50-centroid": Variant(0.5, "hard", "centroid"),
    "easy50-centroid": Variant(0.5, "easy", "centroid"),
    "infobatch": Variant(settings={"pruning.rule": "infobatch"}),
    # It skips about a quarter of the rows: two thirds of the epochs have the steps of a half.
    "infobatch@2E/3": Variant(epochs_share=2 / 3, settings={"pruning.rule": "infobatch"}),
}

# The cells of the study: one budget, `full` at twice that, and what a cache makes of both.
CELLS = (
    "full",
    "full@E/2",
    "full+cache",
    "random50",
    "random50+reshape",
    "medium50-loss+reshape",
    "medium50-loss+reshape+cache",
    "infobatch@2E/3",
)
# Further ones beside them: selection without reshaping, reshaping without pruning, other rules.
# The rest of VARIANTS is for --variants.
FURTHER_CELLS = ("medium50-loss", "full+reshape", "medium50-centroid+reshape", "hard50-loss")
CONTRASTS = (
    ("medium50-loss+reshape", "random50"),
    ("medium50-loss+reshape", "random50+reshape"),
    ("medium50-loss+reshape", "infobatch@2E/3"),
    ("medium50-loss+reshape", "full@E/2"),
    ("full+cache", "full"),
    ("medium50-loss+reshape+cache", "medium50-loss+reshape"),
    ("full+reshape", "full"),
    ("medium30-loss+reshape", "random30"),
    ("medium30-loss+reshape", "random30+reshape"),
    ("medium30-loss+reshape", "full@3E/10"),
)
# A cache pays where it changes accuracy by less than this: a difference that was not detected may
# still be there, an interval within the margin rules it out.
MARGINS = {"full+cache - full": 0.5, "medium50-loss+reshape+cache - medium50-loss+reshape": 0.5}

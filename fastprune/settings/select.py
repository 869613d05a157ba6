"""Settings of a selection: which rows are kept."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fastprune.settings.domains import Integer, Settings, Share

#: Formats of `fastprune export`.
EXPORT_FORMATS = ("mdslr", "rows", "dropped", "names", "indices", "huggingface")
# These two choose among all rows, without classes.
GLOBAL_STRATEGIES = ("moderate", "ccs")


class StrategySettings(Settings):
    """Which rows are kept, by the scores of one metric."""

    keep_ratio: Share = Field(description="r, share of the rows to keep, in (0, 1].")
    strategy: Literal["medium", "window", "easy", "hard", "random", "moderate", "ccs"] = Field(
        "medium",
        description='"medium" keeps the rows around the median of each class, "window" around '
        'another quantile, "easy" and "hard" the lowest and highest scores, "random" draws; '
        '"moderate" keeps the rows around the median of all, "ccs" leaves the hardest out and '
        "covers the rest of the range evenly, both without regard to classes.",
    )
    quota: Literal["proportional", "equal"] = Field(
        "proportional", description='rows per class: "proportional" to its size, or "equal".'
    )
    per_class: bool = Field(True, description="False takes all rows as one class.")
    quantile: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description='center of "window", in [0, 1].'
    )
    drop_hardest: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description='share of the hardest rows that "ccs" leaves out, in [0, 1); less if the keep '
        "ratio needs them.",
    )
    seed: Integer = Field(0, description='seed of the draws of "random" and "ccs".')
    compat: Literal["mdslr"] | None = Field(
        None, description='"mdslr" for the selection of its reference code, row for row.'
    )

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        """Refuse settings that contradict each other."""
        knows_classes = self.per_class and self.strategy not in GLOBAL_STRATEGIES
        if self.quota != "proportional" and not knows_classes:
            why = "does not use them" if self.per_class else "was told to ignore them"
            raise ValueError(
                f"quota {self.quota!r} shares rows out among classes, but strategy "
                f"{self.strategy!r} {why}. Leave the quota out, or choose per class"
            )
        is_medium = self.strategy == "medium" and self.quota == "proportional" and self.per_class
        if self.compat and not is_medium:
            raise ValueError(
                f"compat {self.compat!r} is the rule of strategy 'medium' with its own quota, per "
                f"class, but strategy {self.strategy!r}, quota {self.quota!r}, per_class "
                f"{self.per_class} were asked for. Leave those out"
            )
        return self


class SelectSettings(StrategySettings):
    """How a subset is made of a score table."""

    metric: str | None = Field(
        None,
        description="metric that ranks the rows, or a blend by rank such as "
        "centroid:0.5,loss:0.5; by default centroid, loss with mdslr, centroid_median with "
        "moderate, prototype for clusters, or the table's only metric.",
    )
    allow_empty_classes: bool = Field(
        False, description="let classes that have rows keep none of them."
    )

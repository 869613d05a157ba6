"""What the doctor finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what was looked at, such as "engine ffcv, cpu".
        verdict: "good"; "note" for what could be better or is not there; "bad" for what keeps
            fastprune from working.
        found: what is the case.
        advice: what to change; empty where there is nothing to change.
    """

    topic: str
    verdict: str
    found: str
    advice: str = ""

"""Write what was measured into README and docs: tables, sentences and a chart, from the JSON files.

    python tools/measured.py

What it writes stands between `<!-- numbers: NAME -->` and `<!-- end -->`; a test holds the pages
equal to benchmarks/results/.
"""

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _decode_page import decode_in_docs, decode_line, draw_decode
from _study_page import draw_study, study_in_choosing, study_in_log, study_in_readme

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "imagenet.md",
    ROOT / "docs" / "choosing.md",
    ROOT / "docs" / "drop-in.md",
    ROOT / "docs" / "log.md",
)
IMAGENET_ROWS = 1_281_167
IMAGES = ROOT / "docs" / "images"
STUDY = "wallclock-cifar10"
LAYOUTS = {
    "ours original": "{:.2f}×",
    "ours fast": "{:.2f}× in the fast layout",
}
BLOCK = re.compile(r"(<!-- numbers: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write every page, and draw the charts."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(updated(text), encoding="utf-8")
    for name, draw in ((STUDY, draw_study), ("decode", draw_decode)):
        result = load(name)
        if result is not None:
            draw(result, IMAGES / f"{name}.png")


def load(name: str) -> dict[str, Any] | None:
    """A result; None where it was not measured yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def updated(text: str) -> str:
    """A page with its blocks written anew."""
    return BLOCK.sub(lambda match: match[1] + block(match[2]) + match[3], text)


def block(name: str) -> str:
    """What stands between two marks; nothing where it was not measured yet."""
    if name == "measured":
        return measured()
    source, write = BLOCKS[name]
    result = load(source)
    return "" if result is None else write(result)


def measured() -> str:
    """The table of the README: one line per question that was measured."""
    lines = [line for result, make in MEASURED if (line := _line(result, make))]
    headings = "| question | answer | against FFCV on its own q90-500 re-encode |\n|---|---|---|\n"
    return headings + "\n".join(lines) + "\n"


def _line(name: str, make: Callable[[dict[str, Any]], str]) -> str | None:
    result = load(name)
    if result is None:
        return None
    line = make(result)
    # Only where views are loaded does FFCV have a smaller file of its own to read.
    return f"| {line} |" if line.count(" | ") == 2 else f"| {line} | – |"


def _converting(result: dict[str, Any]) -> str:
    rows, pixels = result["settings"]["rows"], result["pixels"]
    same = pixels["ours_bytes_identical_to_the_source"] == pixels["rows"]
    auto = result.get("ours_auto_over_ffcv")
    return (
        f"converting {rows:,} rows ({pixels['rows']:,} ImageNet JPEGs, repeated), over "
        "`ffcv.writer` at full size | with `--jpeg original` "
        + _by_workers(result["ours_over_ffcv"])
        + (", every byte identical" if same else "")
        + (f"; in the fast layout (`--jpeg auto`) {_by_workers(auto)}" if auto else "")
    )


def _by_workers(ratios: dict[str, Any]) -> str:
    one, two = (_ranged(ratios[f"{workers} workers"]) for workers in (1, 2))
    return f"{one} with one worker, {two} with two"


def _ranged(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.1f}× ({ratio['min']:.1f}–{ratio['max']:.1f})"


def converting_imagenet(result: dict[str, Any]) -> str:
    """What the rates of a conversion say of ImageNet's training set."""
    rates = result["rows_per_second"]
    copy, ours = rates["cp"]["median"], rates["ours 2 workers"]["median"]
    fast = rates.get("ours auto 2 workers")
    text = (
        f"Two workers wrote {ours:,.0f} rows/s of original bytes out of the page cache"
        + (f" and {fast['median']:,.0f} rows/s in the fast layout" if fast else "")
        + f"; `cp` copied {copy:,.0f} files/s. For {IMAGENET_ROWS:,} rows that is "
        + _minutes(ours)
        + (f", or {_minutes(fast['median'])} in the fast layout" if fast else "")
        + " *(extrapolated)*, where the disk is as fast.\n"
    )
    return textwrap.fill(text, 104) + "\n"


def _minutes(rows_per_second: float) -> str:
    return f"{IMAGENET_ROWS / rows_per_second / 60:.1f} minutes"


def _over_ffcv(result: dict[str, Any]) -> str:
    same, encoded = _layouts(result, "stock ffcv"), _layouts(result, "stock ffcv q90-500")
    return f"views per second, over stock FFCV on the same bytes | {same} | {encoded or '–'}"


def _over_dali(result: dict[str, Any]) -> str:
    ratios = _layouts(result, "dali files")
    return f"views per second, over DALI's CPU pipeline on the original files | {ratios}"


def _layouts(result: dict[str, Any], peer: str) -> str:
    """Our ratio to a peer with the most threads, for each layout that was measured."""
    *_, most = (ratios for share, ratios in result["ratios"].items() if share.startswith("full"))
    return ", ".join(
        wording.format(most[f"{ours} over {peer}"]["median"])
        for ours, wording in LAYOUTS.items()
        if f"{ours} over {peer}" in most
    )


def _starting(result: dict[str, Any]) -> str:
    # The engine "cpu" was called "ffcv" when the result was measured that is there now.
    first = result["first_batch_seconds"]
    ours, stock = (
        first.get("ours cpu", first.get("ours ffcv"))["median"],
        first["stock ffcv"]["median"],
    )
    return (
        f"first batch of a new process, compiled code cached | {ours:.1f} s (stock FFCV: "
        f"{stock:.1f} s)"
    )


def _half_epoch(result: dict[str, Any]) -> str:
    ratio = result["half_over_full"]["median"]
    return f"a distillation epoch on half of the rows, over one on all | {ratio:.3f}"


def _centroids(result: dict[str, Any]) -> str:
    share = result["share_of_ceiling_per_pass"]["fastprune float32"]["median"]
    return f"centroid kernel, share of streaming-read speed per pass, fp32 | {share:.2f}"


def _selecting(result: dict[str, Any]) -> str:
    made = [
        v["median"] for k, v in result["seconds"].items() if k not in ("write table", "read table")
    ]
    return (
        f"selecting from {result['rows']:,} rows, file to file, one core | "
        f"{min(made):.1f}–{max(made):.1f} s"
    )


MEASURED = (
    ("convert", _converting),
    ("decode", decode_line),
    ("loader", _over_ffcv),
    ("loader", _over_dali),
    ("loader", _starting),
    ("epoch-cpu", _half_epoch),
    ("kernel", _centroids),
    ("selection", _selecting),
)


BLOCKS = {
    "convert-imagenet": ("convert", converting_imagenet),
    "decode": ("decode", decode_in_docs),
    "study": (STUDY, study_in_readme),
    "study-choosing": (STUDY, study_in_choosing),
    "study-log": (STUDY, study_in_log),
}


if __name__ == "__main__":
    main()

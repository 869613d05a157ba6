import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastprune import convert, open_beton
from fastprune.base.errors import ArtifactMismatch, BetonError, InvalidValueError
from fastprune.base.provenance import Fingerprint
from fastprune.cli import main
from fastprune.report.score_pictures import (
    THUMBNAIL_SIDE,
    rank_correlations,
    read_image,
    thumbnail_png,
)
from fastprune.report.scores import Subject, class_strips, report_scores
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset
from fastprune.selection.subsets import make_subset
from tests.images import write_image_folder
from tests.selection.tables import score_table

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A beton of four classes, a table of scores for it, and a subset."""
    folder = tmp_path_factory.mktemp("report")
    write_image_folder(folder / "images", classes=4, per_class=6)
    convert(folder / "images", folder / "train.beton")
    beton = open_beton(folder / "train.beton")
    generator = np.random.default_rng(0)
    table = ScoreTable(
        labels=beton.labels.copy(),
        metrics={name: generator.random(24, dtype=np.float32) for name in ("loss", "centroid")},
        predictions=np.where(np.arange(24) % 5 == 0, 1, beton.labels),
        class_std=np.ones(4),
        class_counts=np.full(4, 6),
        fingerprint=beton.fingerprint,
        teacher={"network": "resnet8", "note": "<script>alert(1)</script>"},
    )
    table.save(folder / "scores.parquet")
    make_subset(table, keep_ratio=0.5, metric="loss").save(folder / "subset.npy")
    return folder


class _Images(HTMLParser):
    """Collects what a page's images are called."""

    def __init__(self):
        super().__init__()
        self.alts = []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.alts.append(dict(attributes)["alt"])


def images_of(page):
    parser = _Images()
    parser.feed(page)
    return parser.alts


def test_page_shows_charts_and_contact_sheets(files, tmp_path):
    result = CliRunner().invoke(
        main,
        [
            *("report", str(files / "scores.parquet"), str(files / "subset.npy")),
            *("--beton", str(files / "train.beton"), "-o", str(tmp_path / "report.html")),
            *("--classes", "2", "--images", "3"),
        ],
    )
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text()
    sheets = [alt for alt in images_of(page) if alt.startswith("row ")]
    assert len(sheets) == 2 * 3 * 3
    assert {alt.partition(", ")[2] for alt in sheets} == {"class_00", "class_03"}
    assert "<h3>class_03, kept, medium</h3>" in page
    assert [alt for alt in images_of(page) if alt not in sheets] == [
        "Histogram of loss over all rows, and over the kept ones",
        "Rows and kept rows of every class",
        "Rank correlations between loss, centroid",
    ]
    assert "12 of 24 rows (50.00%)" in page
    assert "<script>" not in page


def test_page_needs_neither_subset_nor_beton(files, tmp_path):
    report_scores(files / "scores.parquet", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert len(images_of(page)) == 2
    assert "How centroid is spread" in page


def test_every_picture_of_the_page_opens_in_a_browser(files, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    report_scores(
        files / "scores.parquet",
        tmp_path / "report.html",
        subset_path=files / "subset.npy",
        beton_path=files / "train.beton",
    )
    page = (tmp_path / "report.html").read_text()
    count = (
        "<script>addEventListener('load', () => { document.title = "
        "[...document.images].filter(i => i.naturalWidth > 50).length + ' pictures'; })</script>"
    )
    (tmp_path / "counted.html").write_text(page.replace("</body>", f"{count}</body>"))
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [browser, *arguments, (tmp_path / "counted.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert re.search(r"<title>(.*)</title>", shown.stdout)[1] == f"{len(images_of(page))} pictures"


def test_row_file_score_and_wrong_guess_stand_under_an_image(files, tmp_path):
    report_scores(
        files / "scores.parquet",
        tmp_path / "r.html",
        beton_path=files / "train.beton",
        per_strip=24,
    )
    beton = open_beton(files / "train.beton")
    table = ScoreTable.load(files / "scores.parquet")
    page = (tmp_path / "r.html").read_text()
    row = int(np.flatnonzero(table.predictions != table.labels)[0])
    name = Path(beton.manifest.table(["source"]).to_pydict()["source"][row]).name
    score = f"{table.metric('centroid')[row]:.4g}"
    assert f'row {row}<br>{name}<br>{score}<br><span class="wrong">class_01</span>' in page


def test_classes_are_chosen_by_name_or_number(files, tmp_path):
    for name in ("class_02", "2"):
        report_scores(
            *(files / "scores.parquet", tmp_path / "r.html"),
            beton_path=files / "train.beton",
            classes=[name],
        )
        page = (tmp_path / "r.html").read_text()
        assert re.findall(r"<h3>(\w+), easiest", page) == ["class_02"]
    with pytest.raises(InvalidValueError, match="Did you mean 'class_02'"):
        report_scores(
            *(files / "scores.parquet", tmp_path / "r.html"),
            beton_path=files / "train.beton",
            classes=["clas_02"],
        )


def test_hardest_and_contradicted_rows_are_lists_beside_the_page(files, tmp_path):
    report_scores(
        *(files / "scores.parquet", tmp_path / "r.html"),
        subset_path=files / "subset.npy",
        beton_path=files / "train.beton",
    )
    table = ScoreTable.load(files / "scores.parquet")
    with (tmp_path / "r-hardest.csv").open() as file:
        hardest = list(csv.DictReader(file))
    scores = table.metric("loss")
    assert [int(line["row"]) for line in hardest] == np.argsort(-scores).tolist()
    assert hardest[0]["class"] == f"class_{table.labels[int(hardest[0]['row'])]:02d}"
    assert hardest[0]["file"].endswith(".jpg")
    assert sum(int(line["kept"]) for line in hardest) == 12
    with (tmp_path / "r-suspected.csv").open() as file:
        suspected = [int(line["row"]) for line in csv.DictReader(file)]
    wrong = np.flatnonzero(table.predictions != table.labels)
    assert suspected == wrong[np.argsort(-scores[wrong])].tolist()
    assert 'href="r-suspected.csv"' in (tmp_path / "r.html").read_text()


def test_page_without_a_name_is_named_after_its_subject(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["report", str(files / "scores.parquet"), str(files / "subset.npy")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert (tmp_path / "scores-subset-report.html").exists()


def test_strips_are_the_ends_and_the_middle_of_a_class():
    table = score_table(class_sizes=(100, 20))
    members = np.flatnonzero(table.labels == 0)
    ascending = members[np.argsort(table.metric("loss")[members])]
    kept = make_subset(table, keep_ratio=0.3, metric="loss", strategy="hard").rows
    subject = Subject(table, "loss", kept, None)
    strips = class_strips(subject, 0, 4)
    assert list(strips) == ["easiest", "kept, medium", "hardest"]
    assert np.array_equal(strips["easiest"], ascending[:4])
    assert np.array_equal(strips["hardest"], ascending[-4:])
    assert np.array_equal(strips["kept, medium"], ascending[70:][13:17])
    unkept = class_strips(Subject(table, "loss", None, None), 0, 4)
    assert np.array_equal(unkept["medium"], ascending[48:52])


def test_class_with_fewer_images_than_a_strip_shows_them_all():
    subject = Subject(score_table(class_sizes=(3, 20)), "loss", None, None)
    assert [len(rows) for rows in class_strips(subject, 0, 8).values()] == [3, 3, 3]


def test_thumbnails_are_enlarged_to_whole_multiples(files):
    beton = open_beton(files / "train.beton")
    thumbnail = np.asarray(Image.open(io.BytesIO(thumbnail_png(beton, 0))))
    image = read_image(beton, 0)
    factor = THUMBNAIL_SIDE // max(image.size)
    assert factor == 3
    assert (thumbnail[:factor, :factor] == np.asarray(image)[0, 0]).all()
    assert thumbnail.shape == (factor * image.height, factor * image.width, 3)


def test_raw_images_are_read_too(files):
    beton = open_beton(files / "train.beton")
    decoded = read_image(beton, 3)

    class Raw:
        modes, widths, heights = {3: 1}, {3: decoded.width}, {3: decoded.height}

        def image_bytes(self, row):
            return np.asarray(decoded).ravel()

    assert np.array_equal(np.asarray(read_image(Raw(), 3)), np.asarray(decoded))


def test_image_that_cannot_be_decoded_is_named(files, tmp_path):
    shutil.copy(files / "train.beton", tmp_path / "train.beton")
    offset = int(open_beton(files / "train.beton").offsets[5])
    with (tmp_path / "train.beton").open("r+b") as file:
        file.seek(offset)
        file.write(bytes(16))
    with pytest.raises(BetonError, match=r"row 5 of .*train\.beton cannot be.*check .* --deep"):
        read_image(open_beton(tmp_path / "train.beton"), 5)


def test_rank_correlations_are_spearmans():
    table = score_table()
    metrics = {
        "rising": np.arange(200, dtype=np.float32),
        "also_rising": np.exp(np.arange(200, dtype=np.float32) / 20),
        "falling": -np.arange(200, dtype=np.float32),
        "constant": np.ones(200, np.float32),
        "tied": np.repeat(np.arange(2, dtype=np.float32), 100),
    }
    table = ScoreTable(**{**vars(table), "metrics": metrics})
    found = rank_correlations(table, list(metrics))
    np.testing.assert_allclose(found[0, :4], [1, 1, -1, 0], atol=1e-12)
    # Mean ranks 49.5 and 149.5: the correlation of a line with its two halves.
    np.testing.assert_allclose(found[0, 4], np.corrcoef(np.arange(200), metrics["tied"])[0, 1])


def test_a_thousand_classes_fit_the_page(tmp_path):
    table = score_table(class_sizes=(10,) * 1000)
    table.save(tmp_path / "scores.parquet")
    make_subset(table, keep_ratio=0.5).save(tmp_path / "subset.npy")
    report_scores(
        tmp_path / "scores.parquet", tmp_path / "r.html", subset_path=tmp_path / "subset.npy"
    )
    assert len(images_of((tmp_path / "r.html").read_text())) == 3


def test_scores_of_another_beton_are_refused(files, tmp_path):
    score_table().save(tmp_path / "scores.parquet")
    with pytest.raises(ArtifactMismatch, match=r"scores\.parquet was made.*\n.*fastprune score"):
        report_scores(
            tmp_path / "scores.parquet", tmp_path / "r.html", beton_path=files / "train.beton"
        )


def test_subset_of_other_scores_is_refused(files, tmp_path):
    Subset(np.array([0]), Fingerprint(200, "ee" * 16, "ff" * 16)).save(tmp_path / "subset.npy")
    with pytest.raises(ArtifactMismatch, match=r"subset\.npy was made.*\n.*fastprune select"):
        report_scores(
            files / "scores.parquet", tmp_path / "r.html", subset_path=tmp_path / "subset.npy"
        )
    Subset(np.array([0, 24])).save(tmp_path / "bare.npy")
    with pytest.raises(InvalidValueError, match=r"bare\.npy holds row 24"):
        report_scores(
            files / "scores.parquet", tmp_path / "r.html", subset_path=tmp_path / "bare.npy"
        )


def test_metric_that_is_not_there_is_refused(files, tmp_path):
    with pytest.raises(InvalidValueError, match="'el2n' is not in the score table"):
        report_scores(files / "scores.parquet", tmp_path / "r.html", metric="el2n")


def test_table_without_difficulties_is_refused(tmp_path):
    table = score_table()
    only_std = ScoreTable(**{**vars(table), "metrics": {"logit_std": table.metric("logit_std")}})
    only_std.save(tmp_path / "scores.parquet")
    with pytest.raises(InvalidValueError, match=r"no difficulty to show. Score the beton again"):
        report_scores(tmp_path / "scores.parquet", tmp_path / "r.html")


@pytest.mark.parametrize("option", ["num_classes", "per_strip"])
def test_sheets_without_classes_or_images_are_refused(files, tmp_path, option):
    with pytest.raises(InvalidValueError, match=rf"{option} \(0\) must be at least 1"):
        report_scores(files / "scores.parquet", tmp_path / "report.html", **{option: 0})

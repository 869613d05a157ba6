"""Every command and every Python block in README and docs: it is understood, and the ways run."""

import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import fastprune
from fastprune.cli import main
from fastprune.networks import build_network
from fastprune.networks.weights import save_weights
from tests.images import write_image_folder

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page, language):
    """The fenced blocks of a language in a page."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in blocks if name == language]


def _commands(page):
    """The arguments of every `fastprune` command in a page's blocks, containers included."""
    indented = re.findall(r"^    (fastprune .*)$", page.read_text(), re.MULTILINE)
    lines = "\n".join(_blocks(page, "")).replace("\\\n", " ").splitlines()
    for line in [*lines, *indented]:
        # A number of the shell's, such as $SLURM_ARRAY_TASK_ID.
        words = shlex.split(re.sub(r"\$[A-Z_]+_ID\b", "0", line), comments=True)
        places = [i for i, word in enumerate(words[:-1]) if word == "fastprune"]
        # In `compose run fastprune`, `-t fastprune` and `-o fastprune` it is another thing's name.
        if places and not words[places[0] - 1].startswith("-t") and "..." not in words:
            yield words[places[0] + 1 :]


ALL = [pytest.param(words, id=" ".join(words)) for page in PAGES for words in _commands(page)]


@pytest.mark.parametrize("words", ALL)
def test_every_command_in_the_docs_is_understood(words):
    command, words = main, list(words)
    while hasattr(command, "commands"):
        context = command.make_context("group", [], resilient_parsing=True)
        name, command, words = command.resolve_command(context, words)
    command.make_context(name, words)


def test_commands_are_found_in_the_pages():
    assert len(ALL) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile_and_import_names_that_exist(page):
    for block in _blocks(page, "python"):
        compile(block, str(page), "exec")
        for names in re.findall(r"^from fastprune import (.*)$", block, re.MULTILINE):
            assert {name.strip() for name in names.split(",")} <= set(fastprune.__all__)


@pytest.fixture
def small_images(tmp_path, monkeypatch):
    """The folders that the pages name, with few and small images, in the working folder."""
    for name in ("cifar10/train", "cifar10/test", "imagenet/train", "imagenet/val"):
        write_image_folder(tmp_path / name, classes=2, per_class=70, same_size=True)
    _write_flat_folder(tmp_path / "imagenet/val", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)


def _write_flat_folder(folder, root):
    """The images of a folder without class folders, and a file that tells their classes."""
    (root / "ILSVRC2012_img_val").mkdir()
    lines = []
    for number, file in enumerate(sorted(folder.rglob("*.*"))):
        name = f"{number:08d}{file.suffix}"
        shutil.copyfile(file, root / "ILSVRC2012_img_val" / name)
        lines.append(f"{name} {file.parent.name}\n")
    (root / "val.txt").write_text("".join(lines))


def small_teacher(*, num_classes):
    return build_network("resnet8", num_classes=num_classes)


# What stands in for the networks and images of a recipe for ImageNet.
SMALL = (
    "teacher.network=resnet8",
    "teacher.weights=",
    "teacher.checkpoint=small_teacher.safetensors",
    "student.network=resnet8",
    "data.image_size=32",
    "data.batch_size=32",
)


def _run(words):
    """Run a command as printed, but for one epoch, and with a teacher that is no download."""
    if words[0] == "train":
        words = [*words, "--set", "schedule.epochs=1"]
        if "imagenet_" in words[1]:
            words += itertools.chain(*(("--set", setting) for setting in SMALL))
    if "--teacher-weights" in words:
        words = [*itertools.takewhile(lambda word: word != "--teacher", words)]
        words += ["--teacher-factory", f"{__name__}:small_teacher", "--image-size", "32"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, (words, result.output)


@pytest.mark.full
def test_the_quick_start_runs_as_printed(small_images):
    for words in _commands(ROOT / "docs" / "quickstart.md"):
        _run(words)
    assert Path("run_random/student.safetensors").exists()
    assert Path("report.html").exists()
    assert Path("runs.html").exists()


@pytest.mark.full
def test_the_way_through_imagenet_runs_as_printed(small_images):
    save_weights(small_teacher(num_classes=2), Path("small_teacher.safetensors"))
    for words in _commands(ROOT / "docs" / "imagenet.md"):
        _run(words)
    assert Path("half.beton").exists()
    assert Path("runs.html").exists()


@pytest.mark.full
def test_the_steps_of_the_readme_run_as_printed(small_images):
    recipe = Path("recipes/small_images.toml").read_text()
    Path("recipe.toml").write_text(recipe.replace("resnet20", "resnet8"))
    Path("teacher").mkdir()
    save_weights(small_teacher(num_classes=2), Path("teacher/student.safetensors"))
    for words in _commands(ROOT / "README.md"):
        _run(words)


def test_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    homes = {f"{home}.{name}" for name, home in fastprune._HOMES.items()}
    assert [home for home in sorted(homes) if f"::: {home}\n" not in page] == []


def test_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {fastprune.__version__}\n" in citation

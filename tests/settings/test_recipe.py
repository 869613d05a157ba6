import os
from pathlib import Path

import pytest

from fastprune.base.errors import RecipeError
from fastprune.settings import load_recipe, make_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = """
[data]
train = "train.beton"
val = "/betons/val.beton"
[student]
network = "resnet8"
[schedule]
epochs = 2
[run]
out = "run"
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_recipe_paths_are_relative_to_the_working_folder(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.data.train == Path("train.beton")
    assert recipe.data.val == Path("/betons/val.beton")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path):
    assert load_recipe(path).schedule.epochs > 0


def test_recipe_that_never_ends_is_refused(tmp_path):
    os.mkfifo(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match=r"recipe\.toml is not a TOML file: it is a FIFO"):
        load_recipe(tmp_path / "recipe.toml")
    (tmp_path / "long.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(RecipeError, match=r"long\.toml is not a TOML file: it has more than"):
        load_recipe(tmp_path / "long.toml")


def test_recipe_that_is_nested_too_deeply_is_refused(recipe_file):
    nested = "[" * 10**4 + "]" * 10**4
    with pytest.raises(
        RecipeError, match=r"data\.mean must be three .* '\[\[\[.*\.\.\.\."
    ) as error:
        load_recipe(recipe_file, [f"data.mean={nested}"])
    assert len(str(error.value)) < 1000
    recipe_file.write_text(f"{RECIPE}\nseed = {nested}")
    with pytest.raises(RecipeError, match="is not a TOML file: it is nested"):
        load_recipe(recipe_file)


def test_overrides_replace_settings_in_toml_notation_or_as_bare_words(recipe_file):
    recipe = load_recipe(
        recipe_file, ["schedule.epochs=7", "schedule.milestones=[3, 5]", "schedule.policy=cosine"]
    )
    assert (recipe.schedule.epochs, recipe.schedule.milestones) == (7, (3, 5))
    assert recipe.schedule.policy == "cosine"


def test_empty_override_takes_a_key_away(recipe_file):
    assert load_recipe(recipe_file, ["data.subset=half.npy"]).data.subset == Path("half.npy")
    assert load_recipe(recipe_file, ["data.subset=half.npy", "data.subset="]).data.subset is None


def test_empty_override_takes_a_section_away(recipe_file):
    overrides = ["pruning.rule=infobatch", "pruning.full_share=0.2"]
    assert load_recipe(recipe_file, overrides).pruning is not None
    assert load_recipe(recipe_file, [*overrides, "pruning="]).pruning is None


def test_fixed_iterations_are_refused_where_epochs_skip_rows(recipe_file):
    overrides = ["pruning.rule=infobatch", "schedule.fixed_iterations=true"]
    message = r"fixed_iterations and \[pruning\] contradict each other: .*Leave one of them out"
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file, overrides)


def test_unknown_key_is_refused_with_the_nearest_known_name(recipe_file):
    with pytest.raises(
        RecipeError, match=r"data\.imagesize is unknown\. Did you mean 'image_size'\?"
    ):
        load_recipe(recipe_file, ["data.imagesize=64"])


def test_unknown_section_is_refused_with_the_nearest_known_name(recipe_file):
    with pytest.raises(RecipeError, match=r"shedule is unknown\. Did you mean 'schedule'\?"):
        load_recipe(recipe_file, ["shedule.epochs=3"])


def test_unknown_key_in_an_optional_section_is_refused(recipe_file):
    with pytest.raises(
        RecipeError, match=r"teacher\.chekpoint is unknown\. Did you mean 'checkpoint'"
    ):
        load_recipe(recipe_file, ["teacher.network=resnet20", "teacher.chekpoint=t.safetensors"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.epochs=0", r"schedule\.epochs must be an integer >= 1, not 0\."),
        (
            "schedule.policy=warp",
            r"policy must be one of 'step', 'cosine', 'one_cycle', not 'warp'",
        ),
        ("schedule.learning_rate=inf", r"learning_rate must be a float32 number > 0, not inf"),
        ("data.first_image_size=256", r"first_image_size = 256 must not be above data\.image_size"),
        ("pruning.rule=random", r"pruning\.rule must be 'infobatch', not 'random'"),
        ("loss.temperature=0", r"loss\.temperature must be a float32 number > 0, not 0\."),
        ("schedule.warmup_epochs=2", r"warmup_epochs = 2 must be below schedule\.epochs = 2"),
        ("data.std=[1, 0, 1]", r"data\.std must be three float32 numbers > 0, not \[1, 0, 1\]"),
        ("teacher.network=resnet20", r"teacher\.checkpoint is missing"),
        ("loss.reshaping=zscore", r"loss\.reshaping needs a teacher"),
        ("loss.feature_weight=25", r"loss\.feature_weight needs a teacher"),
        *(
            (
                f"loss.distillation_weight={value}",
                r"distillation_weight is .* points \[\[keep ratio",
            )
            for value in ("-1", "nan", "[]", "[[0, 1]]", "[[0.5, 1], [0.5, 2]]", "[[0.5, -1]]", "x")
        ),
    ],
)
def test_value_outside_its_domain_is_named(recipe_file, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file, [override])


def test_weight_of_the_distillation_is_linear_between_its_points(recipe_file):
    loss = load_recipe(recipe_file, ["loss.distillation_weight=[[0.4, 3], [0.8, 1]]"]).loss
    found = [loss.distillation_weight_at(keep_ratio) for keep_ratio in (0.1, 0.5, 0.8, 1.0)]
    assert found == pytest.approx([3, 2.5, 1, 1])


def test_resolved_recipe_is_a_recipe(recipe_file):
    recipe = load_recipe(recipe_file, ["loss.distillation_weight=[[0.4, 3], [0.8, 1]]"])
    assert make_recipe(recipe.model_dump(mode="json")) == recipe


def test_recipe_that_extends_another_replaces_and_adds_settings(tmp_path, recipe_file):
    (tmp_path / "half.toml").write_text(
        'extends = "recipe.toml"\n[data]\nsubset = "half.npy"\n[schedule]\nepochs = 9\n'
    )
    half = load_recipe(tmp_path / "half.toml", ["schedule.learning_rate=0.3"])
    whole = load_recipe(recipe_file, ["schedule.learning_rate=0.3"])
    assert half.data.subset == Path("half.npy")
    assert half.schedule.epochs == 9
    assert half.data.model_copy(update={"subset": None}) == whole.data
    assert half.schedule.model_copy(update={"epochs": 2}) == whole.schedule
    assert (half.student, half.run) == (whole.student, whole.run)


def test_recipes_that_extend_each_other_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    with pytest.raises(RecipeError, match=r"a\.toml extends itself.* Break the circle"):
        load_recipe(tmp_path / "a.toml")


def test_extended_recipe_is_named_where_it_is_missing(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    with pytest.raises(RecipeError, match=r"b\.toml does not exist"):
        load_recipe(tmp_path / "a.toml")


def test_only_a_file_can_be_extended(tmp_path):
    (tmp_path / "a.toml").write_text("extends = 3")
    with pytest.raises(RecipeError, match=r"extends = 3 must be the name of a file"):
        load_recipe(tmp_path / "a.toml")


def test_published_weights_stand_in_for_a_checkpoint(recipe_file):
    overrides = ["teacher.network=resnet34", "teacher.weights=DEFAULT"]
    assert load_recipe(recipe_file, overrides).teacher.weights == "DEFAULT"
    with pytest.raises(RecipeError, match=r"teacher\.weights: leave one of them out"):
        load_recipe(recipe_file, [*overrides, "teacher.checkpoint=a.pt"])


def test_reshaping_by_class_std_needs_a_subset(recipe_file):
    overrides = ["teacher.network=a", "teacher.checkpoint=b", "loss.reshaping=class_std"]
    with pytest.raises(RecipeError, match=r"needs data\.subset"):
        load_recipe(recipe_file, overrides)


@pytest.mark.parametrize(
    "override", ["epochs=3", "schedule.epochs", "a.b.c=3", ".x=1", "teachr=", "="]
)
def test_malformed_override_is_refused(recipe_file, override):
    with pytest.raises(RecipeError, match="not of the form section"):
        load_recipe(recipe_file, [override])


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.toml does not exist"):
        load_recipe(tmp_path / "nowhere.toml")


def test_broken_toml_is_named(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[data")
    with pytest.raises(RecipeError, match=r"broken\.toml is not a TOML file"):
        load_recipe(path)


def test_recipe_cannot_be_changed(recipe_file):
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.schedule.epochs = 3


def test_one_cycle_has_a_rise_of_its_own(recipe_file):
    overrides = ["schedule.policy=one_cycle", "schedule.warmup_epochs=1"]
    with pytest.raises(RecipeError, match="one_cycle rises over warmup_share"):
        load_recipe(recipe_file, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "schedule.learning_rate=1e300",
            r"must be a float32 number > 0, not 1e\+300",
        ),
        ("schedule.epochs=9000000000", r"epochs must be below 2\*\*31, not 9000000000"),
        ("run.seed=-1", r"run\.seed must be an integer >= 0, not -1"),
        (
            "run.seed=9223372036854775808",
            r"run\.seed must be below 2\*\*63, not 92233",
        ),
        ("run.out=''", r"run\.out is empty"),
        ('data.train="a\\u0000b"', "the path train holds a null"),
    ],
)
def test_values_that_nothing_can_be_done_with_are_refused(recipe_file, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file, [override])

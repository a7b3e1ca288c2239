"""What gin files may hold, what identifies a run, and where it goes by default."""

import inspect
import itertools
import os
import re
import sys

import pytest

from robust_keras.commands import configuration, gin_text, recipe_files, workdirs

GIN = configuration.gin_directory()


def config_of(*params, files=("at.gin",)):
    """The operative configuration of a training run."""
    configuration.parse(files, params)
    configuration.resolve(configuration.train)
    return configuration.operative_config()


def refused(*files, params=()):
    with pytest.raises(ValueError) as error:
        configuration.parse(files, params)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that has not been imported."""
    (tmp_path / "stranger_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield "stranger_module"
    assert "stranger_module" not in sys.modules


@pytest.mark.parametrize(
    "statement",
    ["import stranger_module", "from stranger_module import x", "from __gin__ import dynamic_registration"],
)
def test_a_gin_file_imports_nothing(tmp_path, module, statement):
    path = tmp_path / "stranger.gin"
    path.write_text(f"include 'base.gin'\n{statement}\n")
    line = refused(path)
    assert str(path) in line and statement in line and "line 2" in line
    (tmp_path / "outer.gin").write_text(f"include '{path}'\n")
    assert str(path) in refused(tmp_path / "outer.gin")
    assert statement in refused("at.gin", params=["SEED = 3", statement])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SEED = 1\nSEED = (1,\n", "TokenError|EOF|end"),
        ("SEED = 1\nSEED 2\n", "line 2"),
        ("SEED = $\n", "line 1"),
        ("  SEED = 1\n SEED = 2\n", ""),
        ("SEED = os.getcwd()\n", "line 1"),
        ("include 'no_such.gin'\n", "no_such.gin"),
        ("include 7\n", "file path"),
        ("SEED = \udcff\n", "utf-8"),
        ("include 'at.gin'\nSEED = %SEED\n", "leads to itself"),
        ("include 'at.gin'\nSEED = %SED\n", "a value for the macro SED of SEED"),
    ],
)
def test_a_malformed_gin_file_is_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "broken.gin"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    line = refused(path)
    assert re.search(message, line)
    assert "no_such" in message or "macro" in line or str(path) in line


def test_files_that_include_each_other_are_refused(tmp_path):
    (tmp_path / "a.gin").write_text(f"include '{tmp_path}/b.gin'\n")
    (tmp_path / "b.gin").write_text(f"include '{tmp_path}/a.gin'\n")
    assert "a.gin" in refused(tmp_path / "a.gin")


def test_includes_are_relative_to_the_recipes_wherever_the_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.gin").write_text("SEED = 77\n")  # Not this one.
    (tmp_path / "mine.gin").write_text("SEED = 1\ninclude 'at.gin'\nTAU = 0.5\n")
    config = config_of(files=["mine.gin"])
    assert os.getcwd() == str(tmp_path)
    assert "SEED = 0\n" in config and "TAU = 0.5\n" in config
    with pytest.raises(ValueError, match="mine.gin"):
        configuration.parse(["mine.gin"], ["pgd.no_such = 3", "include 'mine.gin'"])


def test_an_error_after_an_include_names_its_own_line(tmp_path):
    (tmp_path / "mine.gin").write_text("include 'at.gin'\n\nno_such.thing = 3\n")
    assert "mine.gin" in (line := refused(tmp_path / "mine.gin")) and "line 3" in line


def test_a_reference_without_parentheses_inside_a_list_is_seen():
    line = refused("eval/pgd40.gin", params=["evaluate.attacks = [@square(), @pgd]"])
    assert "@pgd(), for evaluate.attacks. Received: @pgd" in line


def test_bindings_that_nothing_reads_are_named():
    configuration.parse(["at.gin"], ["NO_SUCH = 3", "pgd.loss_fn = @dlr()", "other/pgd.num_steps = 2"])
    with pytest.raises(ValueError, match=r"Received: NO_SUCH, other/pgd.num_steps, which change nothing"):
        configuration.resolve(configuration.train)


def test_strategy_is_known_before_anything_is_resolved(monkeypatch):
    asked = []
    monkeypatch.setattr(configuration.strategies, "strategy", lambda name, *, tpu: asked.append((name, tpu)))
    for params in (["train.strategy = %PLACE", "PLACE = 'one'"], ["train.tpu = 'mine'"]):
        configuration.parse(["at.gin"], params)
        configuration.strategy("train")
    assert asked == [("one", None), ("auto", "mine")]


def test_the_same_recipe_written_otherwise_is_the_same():
    config = config_of("multistep.base = 0.1", "TAU = 0.995")
    for params in (["multistep.base = 1e-1", "TAU = 0.9950"], ["TAU = %T", "T = 0.995"], ["TAU = 0.995", "SEED = 0"]):
        assert configuration.differences(config, config_of(*params)) == []
    assert configuration.differences(config, config.replace("%TAU", "0.995").replace("TAU = 0.995", "")) == []
    assert configuration.differences(config, config_of("train.momentum = 0.9", "TAU = 0.995")) == []


def test_what_differs_is_named_by_its_macro_or_its_parameter():
    saved, given = config_of("TAU = 0.9", "SEED = 3"), config_of("train.momentum = 0.8", "EPSILON = '4/255'")
    assert configuration.differences(saved, given) == [
        "EPSILON = 8/255, not 4/255",
        "SEED = 3, not 0",
        "TAU = 0.9, not None",
        "train.momentum = 0.9, not 0.8",
    ]


def test_a_growing_radius_is_part_of_a_run_and_wants_an_attack():
    given = config_of("train.epsilon_warmup_steps = 5")
    assert configuration.differences(config_of(), given) == ["train.epsilon_warmup_steps = 0, not 5"]
    with pytest.raises(ValueError, match="Expected an attack .* for epsilon_warmup_steps=5. Received: None"):
        config_of("train.epsilon_warmup_steps = 5", files=("at.gin", "objectives/standard.gin"))


def test_layout_cadence_and_places_are_no_part_of_it():
    config = config_of()
    other = config_of(
        "train.strategy = 'one'",
        "train.accumulation_steps = %PARTS",
        "PARTS = 4",
        "train.validate_every = 7",
        "train.progress = False",
        "train.num_checkpoints = 9",
        "training_data.cache_dir = '/elsewhere'",
    )
    assert configuration.differences(config, other) == []


def without(config, name):
    """The configuration as a release without a parameter wrote it."""
    lines = [line for line in config.splitlines() if not line.strip("# ").startswith(name)]
    assert len(lines) < len(config.splitlines())
    return "\n".join(lines)


def test_an_option_added_since_counts_as_at_its_default():
    saved = without(config_of(), "train.momentum")
    assert configuration.differences(saved, config_of()) == []
    assert configuration.differences(saved, config_of("train.momentum = 0.8")) == ["train.momentum = 0.9, not 0.8"]


def test_an_option_removed_since_may_have_been_at_its_default():
    config = config_of()
    for value, is_default, different in (
        (3, True, []),
        (3, False, ["train.gone = 3, not (nothing)"]),
    ):
        saved = f"train.gone = {value}\n{config}" + ("#   train.gone\n" if is_default else "")
        assert configuration.differences(saved, config) == different
    assert configuration.differences(f"gone.far = 1\n{config}#   gone.far\n", config) == []


def test_a_default_that_has_changed_since_is_another_run():
    config = config_of()
    saved = config.replace("train.momentum = 0.9", "train.momentum = 0.5")
    assert configuration.differences(saved, config) == ["train.momentum = 0.5, not 0.9"]


def test_configurations_of_older_versions_are_compared(tmp_path):
    config = config_of()
    old, _, _ = config.partition("# Of these")  # It did not say what is at its default.
    assert configuration.differences(old, config) == []
    assert configuration.differences(old, config_of("SEED = 2")) == ["SEED = 0, not 2"]
    (tmp_path / "config.gin").write_text(old)
    workdirs.claim(tmp_path, config, holds_results=True)
    assert (tmp_path / "config.gin").read_text() == config


def test_a_workdir_of_another_run_is_refused_in_one_line(tmp_path):
    workdirs.claim(tmp_path, config_of(), holds_results=False)
    before = (tmp_path / "config.gin").read_text()
    with pytest.raises(ValueError, match=f"{tmp_path} of another, with SEED = 0, not 3$"):
        workdirs.claim(tmp_path, config_of("SEED = 3"), holds_results=True)
    assert (tmp_path / "config.gin").read_text() == before
    (tmp_path / "config.gin").write_text("SEED = (")
    with pytest.raises(ValueError, match=f"{tmp_path}/config.gin"):
        workdirs.claim(tmp_path, config_of(), holds_results=True)
    (tmp_path / "config.gin").write_text(before[:500])  # What a kill left.
    workdirs.claim(tmp_path, config_of(), holds_results=True)
    assert (tmp_path / "config.gin").read_text() == before


RECIPES = sorted(path.name for path in GIN.glob("*.gin") if not path.name.startswith("base"))
OVERLAYS = sorted(str(path.relative_to(GIN)) for path in GIN.glob("*/*.gin") if path.parent.name != "eval")


@pytest.mark.parametrize("second", [OVERLAYS[::4], pytest.param(OVERLAYS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_recipes_that_differ_have_workdirs_that_differ(second):
    """Over pairs of a recipe and a second file: where the workdir is the same, so is what is bound, last for it."""
    bound = {}
    second = {*second, "objectives/trades.gin", "objectives/mart.gin", "scales/mini.gin", "presets/released_code.gin"}
    for files in [(recipe,) for recipe in RECIPES] + list(itertools.product(RECIPES, sorted(second))):
        workdir = workdirs.default_workdir([f"gin/{name}" for name in files])
        assert workdir.startswith(f"runs/{files[0].removesuffix('.gin')}")
        settings = configuration.recipe(configuration.gin.config_str())
        assert bound.setdefault(workdir, settings) == settings, files
    assert {"runs/trades", "runs/trades+mini", "runs/mart+mini", "runs/at_80mti+released_code"} <= bound.keys()


def test_a_second_file_that_does_not_change_what_is_trained_adds_no_name(tmp_path):
    (tmp_path / "here.gin").write_text("train.strategy = 'one'\ntrain.log_every = 10\nSEED = 0\n")
    assert workdirs.default_workdir(["gin/at.gin", tmp_path / "here.gin"]) == "runs/at"
    assert workdirs.default_workdir(["gin/at.gin"]) == "runs/at"


@pytest.mark.parametrize("recipe", ["eval/autoattack.gin", "eval/aa_mt.gin"])
def test_a_baseline_can_be_left_out(recipe):
    configuration.parse([recipe])
    assert configuration.resolve(configuration.evaluate).keywords["baseline"] is not None
    configuration.parse([recipe], ["evaluate.baseline = None"])
    assert configuration.resolve(configuration.evaluate).keywords["baseline"] is None


def test_attacks_can_be_replaced():
    params = ["evaluate.attacks = [@square()]", "square.threat = @threat()"]
    configuration.parse(["eval/aa_mt.gin"], params)
    assert len(configuration.resolve(configuration.evaluate).keywords["attacks"]) == 1


@pytest.mark.parametrize("first", [True, False])
def test_what_is_bound_for_a_baseline_that_is_left_out_is_refused(first):
    params = ["evaluate.baseline = None", "pgd40/pgd.num_steps = 3"]
    configuration.parse(["eval/autoattack.gin"], params if first else params[::-1])
    with pytest.raises(ValueError, match="Received: pgd40/pgd.num_steps, which change nothing"):
        configuration.resolve(configuration.evaluate)
    # Nor is a misspelt one excused.
    configuration.parse(["eval/autoattack.gin"], ["evaluate.baseline = None", "pgd4/pgd.num_steps = 3"])
    with pytest.raises(ValueError, match="pgd4/pgd.num_steps"):
        configuration.resolve(configuration.evaluate)


def test_what_is_left_over():
    first = "f.a = @s/g()\ng.x = 1\ns/g.y = @h()\nt/g.z = 2\nh.w = %M\nM = 3\nN = 4"
    assert gin_text.left_over([first]) == gin_text.left_over([first, "f.b = 1"]) == set()
    assert gin_text.left_over([first, "f.a = None"]) == {"g.x", "s/g.y", "h.w", "M"}
    assert gin_text.left_over([first, "f.a = None\ng.x = 2", "h.w = 3"]) == {"s/g.y", "M"}


@pytest.mark.parametrize(
    "files, params, function, missing",
    [
        (["at.gin"], ["train.learning_rate = @warm_up()"], "warm_up", "fraction, schedule"),
        (["at.gin"], ["train.learning_rate = @piecewise_constant()"], "piecewise_constant", "boundaries, values"),
        (["at.gin"], ["train.attack = @mine/pgd()"], "mine/pgd", "loss_fn, num_steps"),
        (["at.gin"], ["train.initial_weights = @load_weights()"], "load_weights", "path"),
        (["at.gin"], ["correct_under_attack.attack = @transfer()"], "transfer", "attack, surrogate, threat"),
        (["objectives/at.gin"], [], "training/pgd", "threat"),
        (["eval/pgd40.gin"], ["evaluate.attacks = [@apgd()]"], "apgd", "threat"),
        (["eval/pgd40.gin"], ["evaluate.attacks = @autoattack()"], "autoattack", "threat"),
        (["schedules/cosine.gin"], [], "evaluate", "attacks, threat"),
    ],
)
def test_what_a_function_needs_is_asked_for_before_any_work(files, params, function, missing):
    """Of whatever is bound somewhere inside."""
    configuration.parse(files, params)
    is_evaluation = files[0].startswith(("eval", "schedules"))
    with pytest.raises(ValueError) as error:
        configuration.resolve(configuration.evaluate if is_evaluation else configuration.train)
    line = str(error.value).splitlines()[0]
    assert line == f"Expected settings of {function}. Received: none for {missing}"


def test_every_registered_function_is_asked_for_what_it_needs():
    for selector in configuration.MAY_CHANGE:
        configurable = configuration.gin.get_configurable(selector)
        configuration.gin.clear_config()
        try:
            bound = configurable()
        except ValueError as error:
            assert str(error).startswith(f"Expected settings of {selector}. Received: none for "), selector
            continue
        if selector not in ("steepest", "evaluate"):  # A value, and what `resolve` asks for.
            signature = inspect.signature(bound.func).parameters.values()
            needed = {each.name for each in signature if each.kind is each.KEYWORD_ONLY and each.default is each.empty}
            assert needed <= {"seeds", "num_steps"}, selector  # Which their callers give.


# Recipes of strangers.


def test_a_recipe_may_import_what_the_command_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_files, "_imported", {"my_module"})
    path = tmp_path / "mine.gin"
    path.write_text("import my_module\ninclude 'at.gin'\nSEED = 3\n")
    assert "SEED = 3\n" in config_of(files=[path])
    for statement in ("from my_module import x", "import my_module as m", "import my_module.inner", "import my_modul"):
        path.write_text(statement)
        assert "--import of the command imports modules" in refused(path)


def secret(folder):
    path = folder / "secret.gin"
    path.write_text("hunter2 horse\n")
    return path


@pytest.mark.parametrize(
    "named",
    ["{secret}", "../secret.gin", "link.gin", "linked/secret.gin", "notes.txt", "/etc/passwd", "pipe.gin", "x\x00"],
)
def test_an_include_opens_no_file_outside_and_quotes_none(tmp_path, named):
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "link.gin").symlink_to(secret(tmp_path))
    (folder / "linked").symlink_to(tmp_path)
    (folder / "notes.txt").write_text("hunter2 horse\n")
    os.mkfifo(folder / "pipe.gin")
    (folder / "mine.gin").write_text(
        f"include '{named.format(secret=tmp_path / 'secret.gin')}'\n".replace("\x00", "\\x00")
    )
    line = refused(folder / "mine.gin")
    assert "Expected a .gin file below gin/" in line and "horse" not in line and "hunter2" not in line
    assert "below gin/" in refused("at.gin", params=[f"include '{tmp_path / 'secret.gin'}'"])


def test_an_include_may_be_below_the_folder_of_the_recipe(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "seed.gin").write_text("SEED = 5\n")
    (tmp_path / "mine.gin").write_text("include 'at.gin'\ninclude 'parts/seed.gin'\n")
    assert "SEED = 5\n" in config_of(files=[tmp_path / "mine.gin"])
    (tmp_path / "link.gin").symlink_to(tmp_path / "mine.gin")  # What is typed may be one.
    assert "SEED = 5\n" in config_of(files=[tmp_path / "link.gin"])


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1c", "\x1d", "\x85", "\N{LINE SEPARATOR}", "\r"])
@pytest.mark.parametrize("where", ["# a comment{}{}\n", "NOTE = 'a text{}{}'\n", "NOTE = ('{}{}')\n"])
def test_no_character_hides_a_statement(tmp_path, module, character, where):
    path = tmp_path / "stranger.gin"
    text = "SEED = 2\n" + where.format(character, "import stranger_module") + "include 'at.gin'\n"
    path.write_bytes(text.encode())
    try:
        configuration.bind([path])
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    assert "stranger_module" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        "SEED = " + "(" * 5000 + ")" * 5000,
        "SEED = " + "[" * 90 + "]" * 89,
        "SEED = " + "-" * 50_000 + "1",
        "SEED = " + "9" * 10_000,
        "A = [%B, %B, %B, %B, %B, %B, %B, %B]\n"
        + "".join(f"{one} = [{', '.join([f'%{other}'] * 8)}]\n" for one, other in itertools.pairwise("BCDEFGHIJKLMNOP"))
        + "P = 1\n",
        "a" * 2_000_000,
        "\x00",
        "include 'mine.gin'\n",
        "\n" * 100_000 + "include 'last.gin'\n" * 3,
        "include 'other.gin'\ninclude 'other.gin'\n",
        "SEED = 1; import os\n",
        "train:\n  import os\n",
        "SEED = '\\\nimport os\n'",
    ],
)
def test_a_recipe_made_to_harm_is_one_line(tmp_path, text):
    names = ["mine", "other", *(f"deep{k}" for k in range(12)), "last"]
    for name, following in itertools.pairwise(names[1:]):
        (tmp_path / f"{name}.gin").write_text(f"include '{following}.gin'\n" * 2)
    (tmp_path / f"{names[-1]}.gin").write_text("SEED = 1\n")
    (tmp_path / "mine.gin").write_text(text)
    line = refused(tmp_path / "mine.gin")
    assert len(line) < 1500 and line.isprintable()

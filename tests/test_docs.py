"""What README.md and docs/ say must be so: commands, keys, names, links, and the README's commands as they stand."""

import dataclasses
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from launch.cli import app
from pipelines.config import Recipe
from pipelines.recipes import load_preparation, load_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
ROOMS = ("data_prep", "models", "pipelines", "launch")
SECTIONS = {field.name for field in dataclasses.fields(Recipe)}
CLI = typer.main.get_command(app)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced code blocks of the languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def inline(page: Path) -> list[str]:
    """Inline code outside of fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def commands(page: Path) -> list[list[str]]:
    """Arguments of every foleyscale command in the shell blocks, also behind srun, torchrun and docker run."""
    lines = re.sub(r"\s*\\\n\s*", " ", "\n".join(blocks(page, "sh"))).splitlines()
    command = r"(?:^|\s)(?:-m launch\.cli|foleyscale) (?:-- )?(?!--|\.$)(.*)"
    started = (re.search(command, line) for line in lines if "docker build" not in line)
    return [shlex.split(re.sub(r"\$\w+", "1", found[1]), comments=True) for found in started if found]


def command_of(arguments: list[str]):
    """The command that the first arguments name, and the rest of them."""
    command, rest = CLI, list(arguments)
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"{' '.join(arguments)}: no such command"
        command = command.commands[rest.pop(0)]
    return command, rest


def leaves(command=CLI, path: tuple[str, ...] = ()) -> list[str]:
    """All commands, spelled out."""
    if not hasattr(command, "commands"):
        return [" ".join(path)]
    return [leaf for name, inner in command.commands.items() for leaf in leaves(inner, (*path, name))]


@each_page
def test_commands_parse(page):
    for arguments in commands(page):
        command, rest = command_of(arguments)
        context = command.make_context(command.name, rest)  # a wrong option, type or count raises with its message
        overrides = context.params.get("overrides") or ()
        if command.name == "shards":
            load_preparation(context.params["recipe"], overrides)
        elif recipe := context.params.get("recipe"):
            load_recipe(recipe, overrides)


@each_page
def test_commands_in_the_text_exist(page):
    for text in inline(page):
        if not text.startswith("foleyscale "):
            continue
        command, rest = command_of(re.sub(r"[\[\]]", "", text).split()[1:])
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, text


def test_every_command_is_in_the_readme():
    text = (REPOSITORY / "README.md").read_text()
    assert [leaf for leaf in leaves() if f"| `foleyscale {leaf}" not in text] == []


@each_page
def test_options_in_the_text_exist(page):
    def options(command):
        inner = getattr(command, "commands", {}).values()
        return {name for parameter in command.params for name in parameter.opts}.union(*map(options, inner))

    # Those of other programs stand in shell blocks, which are not looked at here; docker's are named.
    mentioned = {text.split()[0] for text in inline(page) if text.startswith("--")}
    assert mentioned <= options(CLI) | {"--help", "--user", "--gpus", "--init", "--shm-size"}


@each_page
def test_recipe_keys_exist(page):
    for text in inline(page):
        key = text.partition("=")[0]
        if key.split(".")[0] not in SECTIONS or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+(?<!\.json)", key):
            continue
        config = load_recipe("vggsound")
        for part in key.split("."):
            assert hasattr(config, part), f"{text}: no key {part}"
            config = getattr(config, part)


@each_page
def test_names_in_the_code_exist(page):
    for text in inline(page):
        if text.split(".")[0] in ROOMS and re.fullmatch(r"\w+(\.\w+)+", text) and not text.endswith(".py"):
            assert pkgutil.resolve_name(text) is not None


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, f"{page.name}: {target}"


@each_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    mentioned = re.findall(r"(?:^    |`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)
    assert set(mentioned) <= targets


def test_every_target_is_in_the_readme():
    phony = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    text = (REPOSITORY / "README.md").read_text()
    assert [target for target in phony if f"| `make {target}`" not in text] == []


def test_the_image_gets_what_is_installed():
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert {*ROOMS, "setup.cfg", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == kept
    assert all((REPOSITORY / name).exists() for name in kept)


TINY = [
    *(f"{stage}.train.{change}" for stage in ("autoencoder", "contrastive", "generative", "preference")
      for change in ("steps=2", "batch_size=4", "log_every=1", "optimiser.warmup_steps=1")),
    "features.statistics_clips=4", "generative.sampling_steps=2", "preference.videos=4", "preference.candidates=2",
    *(f"evaluation.bars.{field.name}=null" for field in dataclasses.fields(Recipe().evaluation.bars)),
]  # fmt: skip


def test_the_readmes_own_clips(tmp_path, monkeypatch):
    """Its commands for own clips, word for word but for a few steps instead of many; then the Python of the pages."""
    from data_prep.media import probe
    from data_prep.readers.rendered import read_rendered
    from data_prep.rendering.config import RenderConfig

    monkeypatch.chdir(tmp_path)
    drawn = list(read_rendered(tmp_path / "drawn", 5, settings=RenderConfig(size=32, seconds=7.68), workers=1))
    (tmp_path / "my_videos").mkdir()
    for row in drawn[:4]:
        Path(row.source).rename(tmp_path / "my_videos" / Path(row.source).name)
    Path(drawn[4].source).rename(tmp_path / "video.mp4")
    own = [arguments for arguments in commands(REPOSITORY / "README.md") if "vggsound" not in arguments and "256" not in arguments]
    wanted = ["prep manifest folder", "prep shards", "run demo", "generate --run", "evaluate --run"]
    chosen = [next(a for a in own if " ".join(a).startswith(start)) for start in wanted]
    for arguments in chosen:
        foleyscale(*arguments, *(TINY if arguments[0] == "run" else ()), cwd=tmp_path)
    assert probe(tmp_path / "sounds" / "video.mp4").audio_start is not None
    _check_figures(tmp_path / "runs" / "mine")
    for page in PAGES:
        for block in blocks(page, "python"):
            (tmp_path / "block.py").write_text(block)
            runpy.run_path(str(tmp_path / "block.py"))
    assert probe(tmp_path / "sounds" / "again.mp4").audio_start is not None


def foleyscale(*arguments: str, cwd: Path) -> None:
    """Run a command; AssertionError with what it said where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "launch.cli", *arguments], cwd=cwd, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-4000:]}"


def _check_figures(run: Path) -> None:
    """Every figure of the evaluation is explained, and the report is there."""
    explained = (REPOSITORY / "docs" / "evaluation.md").read_text()
    for figure in json.loads((run / "evaluation.json").read_text())["figures"]:
        name = re.sub(r"@\d+", "@1", figure["name"])
        assert name in explained, name
    assert (run / "report.html").stat().st_size > 10_000

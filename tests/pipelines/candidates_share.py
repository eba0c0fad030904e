"""One of the processes that make the candidates of a test together: OUT SHARDS REWARD; round 1 from the generative stage."""

import json
import sys
from pathlib import Path

from pipelines.candidates import make_candidates
from pipelines.engine.world import join_world
from pipelines.recipes import load_recipe
from tests.fixtures.tiny_chain import overrides

if __name__ == "__main__":
    out, shards, reward = sys.argv[1:]
    recipe = load_recipe("demo", [*overrides(Path(out), shards), "preference.videos=0", f"preference.reward={reward}"])
    world, run = join_world(), recipe.folder
    make_candidates(recipe, run, str(run / "features" / "shards"), run / "generative" / "export", 1, Path(out) / "candidates", world)
    if world.is_main:
        (Path(out) / "done.json").write_text(json.dumps(world.size))

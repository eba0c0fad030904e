"""One of the processes that extract features together: OUT SHARDS, its rank from the environment."""

import sys
from pathlib import Path

from pipelines.engine.world import join_world
from pipelines.features import extract_features
from pipelines.recipes import load_recipe
from tests.fixtures.tiny_chain import overrides

if __name__ == "__main__":
    recipe = load_recipe("demo", overrides(Path(sys.argv[1]), sys.argv[2]))
    extract_features(recipe, recipe.folder / "features", join_world())

"""Training recipes: each file shows one thing that sequence models do, from the data to the trained model.

RECIPES: what `seqfuse train` knows, by name. A new recipe is one file (see base.py) and one name here.
"""

from seqfuse.recipes import charlm
from seqfuse.recipes.base import Recipe

RECIPES: dict[str, Recipe] = {module.RECIPE.name: module.RECIPE for module in (charlm,)}
